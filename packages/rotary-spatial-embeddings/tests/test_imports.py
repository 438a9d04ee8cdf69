"""Which way the imports of the package point."""

import ast
from pathlib import Path

import pytest
import RoSE

ROOT = Path(RoSE.__file__).parent
# Each part may import itself and what stands after it.
ORDER = (
    "plotting",
    "training",
    "adapters",
    "blocks",
    "attention",
    "softmax",
    "masks",
    "keywords",
    "embedding",
    "frames",
    "positions",
    "packed",
    "functional",
    "dispatch",
    "kernels",
    "layouts",
    "rotation",
    "angles",
    "aliasing",
    "grid",
    "augmentation",
    "transforms",
    "constants",
    "memo",
    "direct",
    "tracing",
    "wide",
    "frequencies",
    "validation",
    "reading",
    "__about__",
)
SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts != ("__init__.py",)]


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a module imports, at its top level or inside of functions."""
    relative = path.relative_to(ROOT).with_suffix("").parts
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom):
            base = relative[: len(relative) - node.level] if node.level else ()
            if node.level or (node.module or "").split(".")[0] == "RoSE":
                module = tuple((node.module or "").split(".")) if node.module else ()
                module = (*base, *module) if node.level else module[1:]
                names = [module] if module else [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(a.name.split("."))[1:] for a in node.names if a.name.split(".")[0] == "RoSE"]
        parts |= {name[0] for name in names if name}
    return parts


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert part in ORDER, f"{part} has no place in the order of imports"
    assert imported_parts(path) <= set(ORDER[ORDER.index(part) :])


def test_only_the_dispatch_and_the_kernels_themselves_know_the_kernels() -> None:
    for path in SOURCES:
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert "kernels" not in imported_parts(path) or part in ("dispatch", "kernels")


def test_files_stay_readable() -> None:
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 400 for path in SOURCES)
