"""Settings that every test file shares; helpers live in ``rose_cases``."""

import gc

import hypothesis
import torch

torch.set_num_threads(1)  # test workers share the cores
hypothesis.settings.register_profile("suite", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Let what imports have made stay: searches for garbage among all of torch take a tenth of the time of tests."""
    gc.collect()
    gc.freeze()
