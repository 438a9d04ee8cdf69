"""What importing the package brings in, which way its imports point, and what it offers."""

import ast
import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest
import spatial_grouping_attention

PACKAGE = "spatial_grouping_attention"
ROOT = Path(spatial_grouping_attention.__file__).parent
OPTIONAL = ("timm", "torchvision", "natten", "triton", "matplotlib", "skimage", "numba", "scipy")
# Each layer of the package may import itself and what stands after it.
ORDER = ("models", "layers", "output", "assignment", "functional", "kernels", "geometry", "validation", "__about__")


def modules_after(statement: str) -> set[str]:
    """Top-level modules in sys.modules after a statement in a fresh interpreter."""
    program = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_brings_in_nothing_optional() -> None:
    """Beyond what torch itself imports, which is not ours to say."""
    ours, torchs = modules_after(f"import {PACKAGE}"), modules_after("import torch")
    assert {"torch", "einops", "RoSE", PACKAGE} <= ours
    assert not (ours - torchs) & set(OPTIONAL)


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a module imports at its top level or inside of functions."""
    relative = path.relative_to(ROOT).with_suffix("").parts
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = relative[: len(relative) - node.level] if node.level else ()
            if node.level or (node.module or "").split(".")[0] == PACKAGE:
                module = tuple((node.module or "").split(".")) if node.module else ()
                module = (*base, *module) if node.level else module[1:]
                names = [module] if module else [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split("."))[1:] for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        parts |= {name[0] for name in names if name}
    return parts


SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part not in ORDER:
        # Tools for people stand on top of everything.
        allowed = set(ORDER) | {part}
        assert part in {"plotting"}, f"{part} has no place in the order of imports"
    else:
        allowed = set(ORDER[ORDER.index(part) :])
    assert imported_parts(path) <= allowed


def test_rotary_embeddings_stay_out_of_the_operators() -> None:
    """The operators receive rotated tensors; only grids may come from RoSE below the layers."""
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] in ("functional", "kernels", "assignment"):
            assert "RoSE" not in path.read_text(encoding="utf-8"), path


def test_version_and_typing_are_shipped() -> None:
    assert re.fullmatch(r"20\d\d\.\d+\.\d+.*", spatial_grouping_attention.__version__)
    assert importlib.resources.files(PACKAGE).joinpath("py.typed").is_file()
    try:
        installed = importlib.metadata.version("spatial-grouping-attention")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the source tree
    assert installed == spatial_grouping_attention.__version__


@pytest.mark.parametrize(
    "name",
    [
        "Assignment",
        "DeformableSpatialGroupingAttention",
        "DenseSpatialGroupingAttention",
        "GroupingOutput",
        "Neighbourhood",
        "SparseSpatialGroupingAttention",
        "SpatialGroupingAttention",
        "compose",
        "functional",
        "functional.assign",
        "functional.grouping_attention",
        "functional.pool",
        "functional.select",
    ],
)
def test_public_names(name: str) -> None:
    found = spatial_grouping_attention
    for part in name.split("."):
        found = getattr(found, part)
    assert name.split(".")[0] in spatial_grouping_attention.__all__


def test_everything_offered_exists_and_is_described() -> None:
    for name in spatial_grouping_attention.__all__:
        if name != "__version__":
            assert getattr(spatial_grouping_attention, name).__doc__
