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


LISTINGS = [page for page in (*WRITTEN, ROOT / "packages" / "rotary-spatial-embeddings" / "README.md") if page.exists()]


def commands(page: Path) -> list[list[str]]:
    """Words of what a page tells people to type, from ``nox`` or a program's file on."""
    lines = re.findall(r"^```bash\n([\s\S]*?)^```|^((?: {4}\S.*\n)+)", page.read_text(), re.MULTILINE)
    found = []
    for line in "\n".join(a + b for a, b in lines).replace("\\\n", " ").splitlines():
        words = line.split(" #")[0].split("&&")[-1].split()
        starts = [i for i, word in enumerate(words) if word == "nox" or word.endswith(".py")]
        if starts:
            found.append(words[starts[0] :])
    return found


def options_of(program: Path) -> set[str]:
    """All that look like options in a program and in what it takes its options from."""
    sources = [program, *(program.parent / "segmentation").glob("options.py")]
    return set(re.findall(r'"(--[a-z-]+)"', "".join(source.read_text() for source in sources)))


PROGRAMS_OF = {
    "demo": "segment_coins.py",
    "brain": "segment_brain.py",
    "train": "train_segmentation.py",
    "predict": "predict_segmentation.py",
    "predict-volume": "segment_volume.py",
}


@pytest.mark.parametrize("page", LISTINGS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_sessions_programs_and_options_that_exist(page: Path) -> None:
    text = (ROOT / "noxfile.py").read_text()
    named = {name.replace("_", "-") for name in re.findall(r"^@nox\.session\ndef (\w+)", text, re.MULTILINE)}
    sessions = named | set(re.findall(r'^@nox\.session\(name="([\w-]+)"', text, re.MULTILINE))
    for program, *words in commands(page):
        own = words[words.index("--") + 1 :] if "--" in words else words
        if program == "nox":
            asked = [w for w in words[: words.index("--")] if w != "-s"] if "--" in words else words[1:]
            assert set(asked) - {"-l", "-s"} <= sessions, (page, words)
            name = PROGRAMS_OF.get(asked[0]) if asked else None
            path = ROOT / "docs" / "examples" / name if name else None
        else:
            path = next((p for p in (ROOT / program, page.parent / program) if p.exists()), None)
            assert path is not None, (page, program)
        if path is not None and path.parent.name == "examples":
            known = options_of(path) | {"--help"}
            assert {word for word in own if word.startswith("--")} <= known, (page, words)
