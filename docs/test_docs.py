"""Every python block of the attention package's pages runs, in order, in one namespace per page."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# A page whose blocks need the libraries it is about, which warn of matters of their own. Each block runs by itself.
BESIDE = ROOT / "docs" / "models-in-other-libraries.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# RoSE's own tests run the pages about it.
WRITTEN = [
    ROOT / "README.md",
    ROOT / "packages" / "spatial-grouping-attention" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
PAGES = [p for p in WRITTEN if p != BESIDE and not p.stem.startswith("rose") and BLOCK.search(p.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path) -> None:
    namespace: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.libraries
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", BLOCK.findall(BESIDE.read_text()))
def test_blocks_run_beside_other_libraries(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library_cases import beside_torchvision

    for name in re.findall(
        r"^(?:import|from) (timm|transformers|monai|segmentation_models_pytorch)\b", code, re.MULTILINE
    ):
        beside_torchvision(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, str(BESIDE), "exec"), {"__name__": "example"})
