"""What importing the package brings in, which way its imports point, and what it offers."""

import ast
import importlib.metadata
import importlib.resources
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import spatial_grouping_attention

PACKAGE = "spatial_grouping_attention"
ROOT = Path(spatial_grouping_attention.__file__).parent
OPTIONAL = (
    "timm", "torchvision", "natten", "triton", "matplotlib", "skimage", "numba", "scipy", "monai", "huggingface_hub",
    "safetensors", "transformers", "lightning", "accelerate", "onnx",
)  # fmt: skip
# Each layer of the package may import itself and what stands after it.
ORDER = ("models", "layers", "output", "assignment", "functional", "backends", "geometry", "__about__")
ENGINES = ("reference", "fused", "tiled", "native", "triton", "natten", "deformable")


def modules_after(statement: str) -> set[str]:
    """Top-level modules in sys.modules after a statement in a fresh interpreter."""
    program = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_brings_in_nothing_optional() -> None:
    """Beyond what torch itself imports, which is not ours to say."""
    ours, torchs = modules_after(f"import {PACKAGE}.models.affine"), modules_after("import torch")
    assert {"torch", "einops", "RoSE", PACKAGE} <= ours
    assert not (ours - torchs) & set(OPTIONAL)


def imported_modules(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a module imports anywhere, as the parts of their names."""
    relative = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if not node.level and (node.module or "").split(".")[0] != PACKAGE:
                continue
            base = relative[: len(relative) - node.level] if node.level else ()
            module = tuple((node.module or "").split(".")) if node.module else ()
            module = (*base, *module) if node.level else module[1:]
            # What is imported from a package may be a module of its.
            found |= {(*module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (tuple(alias.name.split(".")) for alias in node.names)
            found |= {name[1:] for name in names if name[0] == PACKAGE}
    return {name for name in found if name}


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
    assert {name[0] for name in imported_modules(path)} <= allowed


def engines_named_by(path: Path) -> set[str]:
    """Engines whose modules a module imports from."""
    return {name[1] for name in imported_modules(path) if name[0] == "backends" and name[1:2] and name[1] in ENGINES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_engines_are_reached_through_one_registry(path: Path) -> None:
    """No engine imports another, and only the registry knows all of them; nobody else looks at the reference."""
    part, *rest = path.relative_to(ROOT).with_suffix("").parts
    own = {rest[0]} & set(ENGINES) if part == "backends" else set()
    named = engines_named_by(path) - own
    if (part, *rest) == ("backends", "engines"):
        assert named == set(ENGINES) - {"deformable"}
    elif (part, *rest) == ("backends", "selection"):
        assert named == {"triton", "native"}, "their self-checks, before they are trusted"
    elif (part, *rest) == ("backends", "deformable", "selection"):
        assert named == {"triton"}, "on which devices its kernels run"
    elif part in ("layers", "assignment"):
        # Deformable memberships have operators of their own, which are not a choice of backend.
        assert named <= {"deformable"}
    else:
        assert not named


def test_the_face_shows_operators_alone() -> None:
    face = spatial_grouping_attention.functional
    assert sorted(dir(face)) == sorted(face.__all__) == ["assign", "grouping_attention", "pool", "select"]


def test_rotary_embeddings_stay_out_of_the_operators() -> None:
    """The operators receive rotated tensors: below the layers, RoSE gives grids, checks and memory alone."""
    allowed = {
        "geometry": {"RoSE", "RoSE.constants", "RoSE.grid", "RoSE.memo", "RoSE.positions", "RoSE.validation"},
        "backends": {
            "RoSE.direct",
            "RoSE.kernels.sealed",
            "RoSE.kernels.selfcheck",
            "RoSE.tracing",
            "RoSE.validation",
        },
        "functional": {"RoSE.validation"},
        "assignment": {"RoSE.validation"},
    }
    for path in SOURCES:
        part = path.relative_to(ROOT).parts[0]
        if part in allowed:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
            assert {m for m in modules if m and m.split(".")[0] == "RoSE"} <= allowed[part], path


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
