"""What the sessions of noxfile.py do in their environments: install pinned versions, build wheels, run programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
ROSE = ROOT / "packages" / "rotary-spatial-embeddings"
GROUPING = ROOT / "packages" / "spatial-grouping-attention"
CONSTRAINTS = ROOT / "constraints.txt"
SETTINGS = nox.project.load_toml(ROOT / "pyproject.toml")

# Of packages, the wheels that this run of nox has built.
_WHEELS: dict[Path, str] = {}

# The folders of packages for several environments that this run of nox has filled.
_SHARED: set[Path] = set()

# One thread per test worker: two workers that each start a thread per core only get in each other's way.
PINNED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def install(session: nox.Session, *requirements: str, groups: tuple[str, ...] = ()) -> None:
    """Install requirements and dependency groups at the pinned versions.

    What is imported is compiled then: to compile all of torch takes longer than the tests of many a session.
    """
    if set(requirements) & set(_WHEELS.values()):
        _share(session, "torch", "torch")
    own = list(requirements)
    for group in groups:
        listed = nox.project.dependency_groups(SETTINGS, group)
        if group == "test":
            _share(session, group, *listed)
        else:
            own += listed
    if own:
        session.install("--no-compile", "-c", str(CONSTRAINTS), *own)


def _share(session: nox.Session, name: str, *requirements: str) -> None:
    """Let an environment find requirements in a folder that all share: to install and compile them takes long.

    Programs that they bring are not on its path: ``python -m`` runs them.
    """
    here = Path(session.virtualenv.location)
    # Hypothesis reads the source of all that is imported from elsewhere than site-packages, in every process.
    shared, fresh = (here.with_name(folder) / "site-packages" for folder in (name, f"{name}-incomplete"))
    if shared not in _SHARED:
        shutil.rmtree(fresh.parent, ignore_errors=True)
        session.install("--no-compile", "-c", str(CONSTRAINTS), "--target", str(fresh), *requirements)
        if fresh.exists():  # which it does not where environments are used again as they are
            shutil.rmtree(shared.parent, ignore_errors=True)
            fresh.parent.rename(shared.parent)
        _SHARED.add(shared)
    for packages in here.rglob("site-packages"):
        (packages / f"{name}.pth").write_text(f"{shared}\n", encoding="utf-8")


def install_peers(session: nox.Session) -> None:
    """Install the libraries that RoSE must agree with; their requirements would bring in another torch."""
    install(session, "--no-deps", "timm", "torchvision", "pillow", "rotary-embedding-torch")


def install_training(session: nox.Session) -> None:
    """Install both packages and what the training programs need, which is torch but not torchvision.

    MONAI and torchmetrics import torchvision where they find it, and fail on one that was built for another torch.
    """
    install(session, *build(session, ROSE, GROUPING), groups=("train",))
    install(session, "--no-deps", groups=("train-torch",))


def install_optional(session: nox.Session) -> None:
    """Install both packages and all that makes kernels for them, none of which may bring in a torch of its own."""
    install(session, *build(session, ROSE, GROUPING), "setuptools", "wheel", "numba", groups=("test",))
    session.install("--no-deps", "-c", str(CONSTRAINTS), "triton")
    # Without CUDA a pure Python wheel, built against the torch that is there.
    session.install("--no-deps", "--no-build-isolation", "-c", str(CONSTRAINTS), "natten")


def install_bench(session: nox.Session) -> None:
    """Install both packages, the suite, and the peers, none of which may bring in another torch."""
    install(session, *build(session, ROSE, GROUPING), "pytest", "pytest-benchmark", "numpy", "numba", "matplotlib")
    install_peers(session)
    install(session, "--no-deps", "monai", "x-transformers", "torch-einops-utils")
    install(session, "einops", "einx", "loguru", "pyyaml", "frozendict", "psutil", "zarr")
    session.run("python", str(ROOT / "benchmarks" / "other_process.py"), "--install")


def run_example(session: nox.Session, script: str) -> None:
    """Run a program of the documentation with the options given after ``--``."""
    # Threads that spin while they wait cost more than they gain where other work shares the processor.
    session.run(
        "python", str(ROOT / "docs" / "examples" / script), *session.posargs, env={"OMP_WAIT_POLICY": "passive"}
    )


def build(session: nox.Session, *packages: Path) -> list[str]:
    """Build wheels of packages and return their paths; what another session of this run has built is taken."""
    scratch = Path(session.create_tmp()).resolve()  # where the session's temporary files go too
    missing = [package for package in packages if package not in _WHEELS]
    if missing:
        session.install("-c", str(CONSTRAINTS), "hatchling")
    for package in missing:
        target = scratch / package.name
        with session.chdir(package):
            session.run("hatchling", "build", "-t", "wheel", "-d", str(target), silent=True)
        _WHEELS[package] = str(max(target.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime))
    return [_WHEELS[package] for package in packages]


def compile_kernels(session: nox.Session) -> None:
    """Compile the kernels that numba makes, once, and not by every worker at the same time."""
    session.run("python", str(ROOT / "tools" / "make_kernels.py"), env=PINNED)


def take_kernels(session: nox.Session, other: str) -> None:
    """Take over kernels that another session has compiled: numba keeps them beside the package, and knows its text."""
    here = Path(session.virtualenv.location)
    there = here.with_name(other)
    for kept in there.rglob("spatial_grouping_attention/backends/native/**/__pycache__/*.nbc"):
        place = here / kept.relative_to(there)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(kept, place)


def list_materials(session: nox.Session, folder: Path) -> list[Path]:
    """Write bills of materials: of each package into a folder, and of both with extras; each holds those before."""
    scratch = Path(session.create_tmp()).resolve()
    environment, described = scratch / "environment", scratch / "pyproject.toml"
    folder.mkdir(parents=True, exist_ok=True)
    session.run("virtualenv", "--quiet", "--clear", "--no-pip", str(environment))
    bring = ("pip", "--python", str(environment), "install", "--quiet", "-c", str(CONSTRAINTS))
    bills = [folder / f"{package.name}.cdx.json" for package in (ROSE, GROUPING)]
    for package, bill in zip((ROSE, GROUPING), bills, strict=True):
        (wheel,) = map(Path, build(session, package))
        version = wheel.name.split("-")[1]  # which the build reads from the source
        # By name, not by path: a bill would repeat the path.
        session.run(*bring, "--find-links", str(wheel.parent), f"{package.name}=={version}")
        text = (package / "pyproject.toml").read_text(encoding="utf-8")
        described.write_text(text.replace('dynamic = ["version"]', f'version = "{version}"'), encoding="utf-8")
        _write_bill(session, environment, bill, "--pyproject", str(described))
    session.run(*bring, f"{GROUPING.name}[cpu,hub,matching,plot]=={version}")
    # These would bring a torch of their own; what else they require is there. NATTEN is named in the page's text.
    session.run(*bring, "--no-deps", "timm", "torchvision")
    extras = scratch / "extras.cdx.json"
    _write_bill(session, environment, extras)
    return [*bills, extras]


def _write_bill(session: nox.Session, environment: Path, bill: Path, *options: str) -> None:
    how = ("--mc-type", "library", "--output-reproducible", "--output-file", str(bill))
    session.run("cyclonedx-py", "environment", *how, *options, str(environment))


def import_alone(session: nox.Session, name: str) -> None:
    """Import a package beside nothing but what it requires; a warning of its own is an error.

    That it requires torch is asked: torch is there in any case.
    """
    # torch itself warns where there is no NumPy.
    strict = f"import torch, warnings; warnings.simplefilter('error'); import {name} as it; print(it.__version__)"
    session.run("python", "-c", strict)
    distribution = "importlib.metadata.packages_distributions()[sys.argv[1]][0]"
    required = f"any(r.startswith('torch') for r in importlib.metadata.requires({distribution}))"
    session.run("python", "-c", f"import importlib.metadata, sys; assert {required}", name)


def run_tests(session: nox.Session, *paths: Path, options: tuple[str, ...] = (), **environment: str) -> None:
    """Run pytest on folders, in parallel, with the options given after ``--``."""
    run = ("python", "-m", "pytest", "-n", "auto", *options, *map(str, paths), *session.posargs)
    session.run(*run, env={**PINNED, **environment})
