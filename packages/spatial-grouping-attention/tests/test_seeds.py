"""The examples that users know, exactly as they stand in seed_blocks.md, with the shapes that they promise.

The two largest run in test_memory.py; the longest of the others is marked slow.
"""

import pytest
import torch
from seed_examples import BLOCKS, MEASURED, PROMISES, run_block


def test_every_block_is_run_somewhere() -> None:
    assert list(BLOCKS) == list(PROMISES)
    assert set(MEASURED) < set(PROMISES)


LONGEST = "Integration with Neural Networks"


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(title, marks=pytest.mark.slow) if title == LONGEST else title
        for title in PROMISES
        if title not in MEASURED
    ],
)
def test_block(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.inference_mode():
        run_block(title)
    assert capsys.readouterr().out.splitlines() == PROMISES[title][0]
