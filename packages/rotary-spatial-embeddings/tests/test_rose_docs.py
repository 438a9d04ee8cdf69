"""Every block of Python in the documentation runs."""

import re
from pathlib import Path

import peers
import pytest
import torch

PACKAGE = Path(__file__).parents[1]
PAGES = [PACKAGE / "README.md", *sorted((PACKAGE.parents[1] / "docs").glob("rose*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A page whose blocks need the libraries it is about, which warn of matters of their own.
BESIDE = {"rose-adapters": (pytest.mark.libraries, pytest.mark.filterwarnings("ignore"))}
# The README's examples continue one another; pages elsewhere are read block by block.
EXAMPLES = [
    pytest.param(
        "\n".join(blocks) if page.name == "README.md" else block,
        id=f"{page.stem}-{number}",
        marks=BESIDE.get(page.stem, ()),
    )
    for page in PAGES
    for blocks in [BLOCK.findall(page.read_text(encoding="utf-8"))]
    for number, block in enumerate(blocks[:1] if page.name == "README.md" else blocks)
]


# Torch's attention for jagged tensors builds one of its older nested tensors, which announce themselves.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, tmp_path, monkeypatch) -> None:
    if "plotting" in code:
        pytest.importorskip("matplotlib", reason="pictures are drawn where matplotlib is installed").use("Agg")
    for name in re.findall(r"^import (timm)|^from (transformers) ", code, re.MULTILINE):
        peers.beside_torchvision("".join(name))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(code, {"__name__": "example"})


def test_the_documentation_was_found_where_it_is_part_of_the_checkout() -> None:
    docs = PACKAGE.parents[1] / "docs"
    if not docs.is_dir():
        pytest.skip("the package's tests run here without the repository's docs folder")
    assert {"rose", "rose-adapters", "rose-in-a-transformer", "rose-migration"} <= {page.stem for page in PAGES}
    assert len(EXAMPLES) >= 10
