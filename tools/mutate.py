"""Mutation testing by mutmut in a package's folder, with tests that are collected once: ``python tools/mutate.py``.

mutmut lets pytest collect a mutant's tests by their names, some hundreds, anew for every mutant and in no order; that
takes many times as long as the first test to fail. Here pytest collects all once, every mutant is tried in a fork
of that process, and those tests go first that have found most mutants, quick ones before others. Records, limits of
time and the list of results are mutmut's.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from mutmut.__main__ import cli
from mutmut.configuration import config
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.runners.harness import PytestRunner, TestRunner
from mutmut.state import state
from mutmut.utils.file_utils import change_cwd
from mutmut.workers import isolation


class _Collected(TestRunner):
    """Runs tests of a session that has collected them, until one fails; which one, all forks write into one file."""

    def __init__(self, session: pytest.Session, found: Path) -> None:
        self.session, self.found = session, found
        found.touch()

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        items = {item.nodeid: item for item in self.session.items}
        mutants, seconds = Counter(self.found.read_text("utf-8").splitlines()), state().duration_by_test
        ordered = [items[name] for name in sorted(tests, key=lambda name: (-mutants[name], seconds[name], name))]
        for item, following in zip(ordered, [*ordered[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.testsfailed:
                with self.found.open("a", encoding="utf-8") as file:
                    file.write(f"{item.nodeid}\n")
                return 1
        return 0


class _Server(isolation.ForkServerRunner):
    """mutmut's server, which forks a process for every mutant, in the middle of a session of pytest."""

    def _forkserver_main(self, work_fd: int, result_fd: int) -> None:
        serve = super()._forkserver_main

        class Serve:
            def pytest_runtestloop(self, session: pytest.Session) -> bool:
                runner = _Collected(session, Path("mutmut-found.txt").absolute())
                _require_success(runner)
                server.test_runner_class = lambda: runner
                serve(work_fd, result_fd)
                return True

        server = self
        # What a fork captures in files would be written into those of all others, and mutmut leaves files open.
        options = ["-qq", "--capture=sys", "-p", "no:unraisableexception"]
        with change_cwd("mutants"):
            PytestRunner().execute_pytest([*options, *config().pytest_add_cli_args_test_selection], plugins=[Serve()])


def _require_success(runner: _Collected) -> None:
    """Try a mutant that there is not, as all others are tried: a test that fails here would seem to find them all."""
    child = os.fork()
    if not child:
        set_mutant_under_test("")
        with open(os.devnull, "w") as sys.stdout:
            os._exit(runner.run_tests(mutant_name="", tests=state().duration_by_test))
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("tests must pass without a mutant; one failed or came to no end")


if __name__ == "__main__":
    isolation.ForkServerRunner = _Server
    cli()
