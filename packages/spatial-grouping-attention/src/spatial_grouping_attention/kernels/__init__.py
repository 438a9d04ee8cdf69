"""Triton kernels of the windowed operators.

Nothing outside this folder imports triton, and this folder is only imported by the first call that needs it
(:mod:`..functional.triton_backend`), so the package works where triton is not installed.

Two passes each way, each writing its results once: the *token* pass gives every program a tile of fine tokens and
walks over the groups they see, the *group* pass gives it a tile of groups and walks over their members. Sums are
gathered where they belong, never scattered, so results do not depend on the order of programs.
"""
