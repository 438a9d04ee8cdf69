"""Everything that is checked, each in an environment of its own: ``nox`` runs what a change must pass.

Tests run on wheels, built once in a run, not on the source tree, so a file missing from a wheel is found here.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "tools"))

from environments import (
    CONSTRAINTS,
    GROUPING,
    PINNED,
    ROOT,
    ROSE,
    SETTINGS,
    build,
    compile_kernels,
    import_alone,
    install,
    install_bench,
    install_optional,
    install_peers,
    install_training,
    list_materials,
    run_example,
    run_tests,
    take_kernels,
)

# Packages are installed uncompiled: who imports a module first keeps its bytecode. Else every process compiles torch.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = [
    "lint",
    "types",
    "tests-rose",
    "tests-attention",
    "tests-pair",
    "tests-optional",
    "tests-training",
]

SUBJECTS = ("rotation", "grouping", "layers", "compactness", "backbones", "curves", "first_call")  # of benchmarks

# The packages whose tests run beside other versions than the pinned ones.
VERSIONED = [nox.param(ROSE, id="rose"), nox.param(GROUPING, id="attention")]

# The newest that dynamic-network-architectures accepts, beside the one that is pinned.
TIMM_OF_PRIMUS = "timm==1.0.22"


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format; workflows, forms and fragments of changelogs are well formed, and workflows safe."""
    install(session, groups=("lint",))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    github = ROOT / ".github"
    session.run("zizmor", "--offline", "--strict-collection", "--pedantic", str(github))
    for kind, files in (
        ("github-workflows", github.glob("workflows/*.yml")),
        ("github-issue-forms", github.glob("ISSUE_TEMPLATE/[!c]*.yml")),
        ("github-issue-config", github.glob("ISSUE_TEMPLATE/config.yml")),
        ("dependabot", github.glob("dependabot.yml")),
    ):
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{kind}", *map(str, files))
    for package in (ROSE, GROUPING):
        session.run("towncrier", "build", "--draft", "--version", "next", "--dir", str(package), silent=True)


@nox.session
def types(session: nox.Session) -> None:
    """Mypy: strict on both packages as installed; names, attributes and calls in tests, benchmarks and tools."""
    install(session, *build(session, ROSE, GROUPING), groups=("types",))
    session.run("mypy", "--warn-unused-configs", "-p", "RoSE", "-p", "spatial_grouping_attention")
    # One after the other: files of one name are in both folders of tests.
    for folders in ((ROSE / "tests",), (GROUPING / "tests", ROOT / "benchmarks", ROOT / "tools", ROOT / "fuzz")):
        paths = os.pathsep.join(map(str, folders))
        session.run("mypy", *map(str, folders), env={"MYPYPATH": paths})


@nox.session
def tests(session: nox.Session) -> None:
    """All three test sessions."""
    for name in ("tests-rose", "tests-attention", "tests-pair"):
        session.notify(name)


@nox.session(name="tests-rose")
def tests_rose(session: nox.Session) -> None:
    """RoSE's wheel on its own, with torch alone, then its tests beside the libraries it must agree with."""
    (wheel,) = build(session, ROSE)
    install(session, wheel)
    import_alone(session, "RoSE")
    session.run("python", "-c", "import importlib.util as u; assert u.find_spec('spatial_grouping_attention') is None")
    install(session, groups=("test",))
    install_peers(session)
    run_tests(session, ROSE / "tests")


@nox.session(name="tests-attention")
def tests_attention(session: nox.Session) -> None:
    """The attention package's wheel beside RoSE's, with nothing optional installed, then its tests."""
    install(session, *build(session, ROSE, GROUPING))
    import_alone(session, "spatial_grouping_attention")
    install(session, groups=("test",))
    run_tests(session, GROUPING / "tests")


@nox.session(name="tests-pair")
def tests_pair(session: nox.Session) -> None:
    """RoSE where both are imported, code blocks and programs of pages, benchmarks' parts, tools, some fuzzing.

    Of RoSE's tests those of what is registered with torch, which another package could spoil; the attention package's
    own always run beside RoSE's wheel: see tests-attention.
    """
    install(session, *build(session, ROSE, GROUPING), groups=("test", "demo"))
    rose = (ROSE / "tests" / f"test_{name}.py" for name in ("derivatives", "modules", "package", "transforms"))
    others = (ROOT / name for name in ("docs", "benchmarks", "tools", "fuzz"))
    run_tests(session, *rose, *others, options=("-p", "spatial_grouping_attention"))


@nox.session(name="tests-newest")
@nox.parametrize("package", VERSIONED)
def tests_newest(session: nox.Session, package: Path) -> None:
    """A package's tests with the newest of everything that this Python can have, instead of the pinned versions."""
    session.install(*build(session, ROSE, GROUPING), *nox.project.dependency_groups(SETTINGS, "test"))
    run_tests(session, package / "tests")


@nox.session(name="tests-lowest")
@nox.parametrize("package", VERSIONED)
def tests_lowest(session: nox.Session, package: Path) -> None:
    """A package's tests with the lowest versions that it claims to run with; for its lowest Python."""
    project = nox.project.load_toml(package / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    claims = [*project["dependencies"], *(claim for name in ("plot", "matching") for claim in extras.get(name, ()))]
    lowest = [claim.replace(">=", "==") for claim in claims if not claim.startswith(ROSE.name)]
    lowest.append("pyparsing<3.3")  # later ones warn of how matplotlib 3.8 calls them
    session.install(*build(session, ROSE, GROUPING), *lowest, *nox.project.dependency_groups(SETTINGS, "test"))
    run_tests(session, package / "tests")


@nox.session(name="tests-slow")
def tests_slow(session: nox.Session) -> None:
    """What takes minutes: all variants exported and compiled, peak memory, interpreter and programs at length."""
    install_optional(session)
    marked = ("-m", "slow and not gpu")
    run_tests(session, ROSE / "tests", GROUPING / "tests", ROOT / "benchmarks", options=marked, TRITON_INTERPRET="1")
    run_tests(session, ROSE / "tests" / "test_graph.py", options=("-p", "spatial_grouping_attention"))
    install_training(session)
    install(session, groups=("brain",))
    # All of a file to one worker: what its tests share is trained once.
    marked = ("--dist", "loadfile", "-m", "training and slow and not gpu")
    run_tests(session, ROOT / "docs" / "examples", ROOT / "experiments", options=marked)
    # The compiler that the lowest torch installs refuses what later ones take.
    session.install("--no-deps", "triton==3.6.0")
    run_tests(session, GROUPING / "tests" / "test_triton_compiled.py", options=("-m", "triton"))


@nox.session(name="tests-optional")
def tests_optional(session: nox.Session) -> None:
    """What needs an optional library and no GPU: Triton kernels in its interpreter, NATTEN's forward pass, numba's."""
    install_optional(session)
    compile_kernels(session)
    marked = ("-m", "(triton or natten or native) and not slow")
    run_tests(session, ROSE / "tests", GROUPING / "tests", ROOT / "benchmarks", options=marked, TRITON_INTERPRET="1")


@nox.session(name="tests-libraries")
def tests_libraries(session: nox.Session) -> None:
    """Both packages under libraries that move and hook models (Lightning, PEFT, ...); RoSE in models of others."""
    install(session, *build(session, ROSE, GROUPING), "pytest", "pytest-xdist", "hypothesis")
    # What requires torch comes without its requirements, which would bring in another; the rest of them follow.
    install(
        session, "--no-deps", "lightning", "pytorch-lightning", "torchmetrics", "accelerate", "peft", "opacus", "monai"
    )
    install(session, "transformers", "safetensors", "lightning-utilities", "scipy", "opt_einsum", "psutil", "pyyaml")
    install(session, "huggingface_hub", "nibabel")
    names = ("libraries", "libraries_hub", "libraries_loops", "libraries_monai")
    tests = [ROSE / "tests" / "test_libraries.py", *(GROUPING / "tests" / f"test_{name}.py" for name in names)]
    run_tests(session, *tests, options=("-m", "libraries"))

    # Only now: torchvision, which timm needs, was built for another torch, and those above import it where it is.
    install_peers(session)
    install(session, "--no-deps", "x-transformers", "torch-einops-utils", "dynamic-network-architectures")
    install(session, "--no-deps", "segmentation-models-pytorch")
    install(session, "einops", "einx", "loguru", "onnx", "onnxscript", "onnxruntime")
    pages = ROSE / "tests" / "test_rose_docs.py", ROOT / "docs" / "test_docs.py"
    beside_timm = *sorted((ROSE / "tests").glob("test_adapters_*.py")), GROUPING / "tests" / "test_libraries_timm.py"
    run_tests(session, *beside_timm, *pages, options=("-m", "libraries"))
    session.install("--no-deps", TIMM_OF_PRIMUS)  # its own rotation fails with later ones
    older = (ROSE / "tests" / f"test_adapters_{name}.py" for name in ("timm", "primus"))
    run_tests(session, *older, options=("-m", "libraries"))


@nox.session(name="tests-training")
def tests_training(session: nox.Session) -> None:
    """The training programs, from reading files to going on after a kill, on images of a few pixels."""
    install_training(session)
    install(session, groups=("test", "brain"))
    take_kernels(session, "tests-optional")
    # All of a file to one worker: what its tests share, the trainings of two processes say, is trained once. In the
    # order given, because files of few tests, which otherwise come last, are those that take long.
    marked = ("--dist", "loadfile", "--no-loadscope-reorder", "-m", "training and not (slow or gpu)")
    run_tests(session, ROOT / "experiments", ROOT / "docs" / "examples", options=marked)


@nox.session(name="tests-gpu")
def tests_gpu(session: nox.Session) -> None:
    """The tests marked gpu, of both packages and of the training programs; fails where no test was executed."""
    session.install(*build(session, ROSE, GROUPING), *nox.project.dependency_groups(SETTINGS, "test", "train"))
    session.install("--no-deps", *nox.project.dependency_groups(SETTINGS, "train-torch"))
    session.run("python", "-c", "import torch; assert torch.cuda.is_available(), 'this session needs a CUDA device'")
    report = str(Path(session.create_tmp()).resolve() / "report.xml")
    paths = map(str, (ROSE / "tests", GROUPING / "tests", ROOT / "docs" / "examples" / "test_segmentation_gpu.py"))
    # Most of the time goes to compiling kernels, which processes share out among themselves.
    session.run("pytest", "-n", "8", "-m", "gpu", f"--junit-xml={report}", *paths, *session.posargs)
    session.run("python", str(ROOT / "tools" / "require_tests.py"), report)


@nox.session
def demo(session: nox.Session) -> None:
    """Segment a photograph with a network built from both packages; options go after ``--``."""
    install(session, *build(session, ROSE, GROUPING), groups=("demo",))
    run_example(session, "segment_coins.py")


@nox.session
def train(session: nox.Session) -> None:
    """Train a network on your own images: ``nox -s train -- --images DIR --labels DIR``; see the documentation."""
    install_training(session)
    run_example(session, "train_segmentation.py")


@nox.session
def predict(session: nox.Session) -> None:
    """Segment images with it: ``nox -s predict -- --checkpoint FILE --images DIR --out DIR``."""
    install_training(session)
    run_example(session, "predict_segmentation.py")


@nox.session(name="predict-volume")
def predict_volume(session: nox.Session) -> None:
    """Segment an image larger than memory: ``nox -s predict-volume -- --checkpoint FILE --image IN --out OUT``."""
    install_training(session)
    run_example(session, "segment_volume.py")


@nox.session
def brain(session: nox.Session) -> None:
    """Train on two thirds of a head in three dimensions and draw the third; options go after ``--``."""
    install_training(session)
    install(session, groups=("brain",))
    run_example(session, "segment_brain.py")


@nox.session
def coverage(session: nox.Session) -> None:
    """Lines and branches of both packages that their own tests reach: 95 % at least."""
    install_optional(session)
    install(session, "pytest-cov", groups=("test",))
    install_peers(session)
    compile_kernels(session)
    for package, name in ((ROSE, "RoSE"), (GROUPING, "spatial_grouping_attention")):
        measure = {"COVERAGE_FILE": str(Path(session.create_tmp()).resolve() / f"{name}.coverage")}
        session.run("coverage", "erase", env=measure)
        counted = (f"--cov={name}", f"--cov-config={ROOT / 'pyproject.toml'}", "--cov-append", "--cov-report=")
        run_tests(session, package / "tests", options=counted, **measure)
        # A package's own settings do not know the marks of the other.
        everything = (*counted, "-c", str(ROOT / "pyproject.toml"))
        marked = (*everything, "-m", "(triton or natten or native) and not slow")
        run_tests(session, package / "tests", options=marked, TRITON_INTERPRET="1", **measure)
        least = ("--show-missing", "--skip-covered", "--fail-under=95")
        session.run("coverage", "report", f"--rcfile={ROOT / 'pyproject.toml'}", *least, env=measure)


@nox.session
def mutation(session: nox.Session) -> None:
    """Mutants of what everything else is computed from, against the tests: an hour and more; survivors are listed."""
    install(session, *build(session, ROSE, GROUPING), "mutmut", groups=("test",))
    for package in (ROSE, GROUPING):
        with session.chdir(package):
            session.run("python", str(ROOT / "tools" / "mutate.py"), "run", "--max-children", "2", env=PINNED)
            session.run("mutmut", "results")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Random arguments, right and wrong, for every public constructor and forward pass; options go after ``--``."""
    install(session, *build(session, ROSE, GROUPING), "hypothesis", "numpy", "scipy", "numba")
    session.run("python", str(ROOT / "fuzz" / "main.py"), *session.posargs, env=PINNED)


@nox.session
def experiments(session: nox.Session) -> None:
    """Train whatever has no result yet: ``nox -s experiments -- --data DIR``."""
    install_training(session)
    session.run("python", str(ROOT / "experiments" / "main.py"), *session.posargs, env=PINNED)
    # Primus needs timm, and that needs torchvision, which nothing above may meet. It learns from real images only.
    if "--data" in session.posargs and "--only" not in session.posargs:
        install_peers(session)
        install(session, "--no-deps", "dynamic-network-architectures")
        install(session, "pytest", "einops")
        session.run("python", str(ROOT / "experiments" / "primus.py"), *session.posargs, env=PINNED)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, into site/; a link that leads nowhere is an error. Needs npm."""
    install(session, groups=("docs",))
    # What the site's configuration names without a path: docs/tools/formulas.py.
    session.run("zensical", "build", "--strict", "--clean", env={"PYTHONPATH": str(ROOT / "docs" / "tools")})
    session.run("python", str(ROOT / "docs" / "interactive" / "fetch_runtime.py"), str(ROOT / "site" / "interactive"))


@nox.session
def browser(session: nox.Session) -> None:
    """Look at the built site (``nox -s docs``) in Chromium, at two widths; needs one that is installed."""
    install(session, "pytest", groups=("browser",))
    session.run("pytest", str(ROOT / "docs" / "browser_faults.py"))
    checker, shots = ROOT / "docs" / "browser_check.py", ROOT / "site-screenshots"
    session.run("python", str(checker), str(ROOT / "site"), "--out", str(shots), *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure on this machine, into benchmarks/results; ``-- --quick`` only holds every entry to its oracle."""
    install_bench(session)
    if "--quick" in session.posargs:
        session.run("pytest", "--quick", *map(str, sorted((ROOT / "benchmarks").glob("bench_*.py"))), env=PINNED)
        return
    for subject in SUBJECTS:
        out = ROOT / "benchmarks" / "results" / f"cpu-{subject}.json"
        script = ROOT / "benchmarks" / f"bench_{subject}.py"
        session.run("pytest", str(script), f"--benchmark-json={out}", *session.posargs, env=PINNED)


@nox.session(name="build")
def build_distributions(session: nox.Session) -> None:
    """Source and wheel distributions of both packages, into dist/; wheels hold the package and nothing else."""
    install(session, "hatchling", "twine", "check-wheel-contents")
    out = ROOT / "dist"
    shutil.rmtree(out, ignore_errors=True)
    for package in (ROSE, GROUPING):
        with session.chdir(package):
            session.run("hatchling", "build", "-d", str(out))
        (source,) = (package / "src").iterdir()
        (wheel,) = out.glob(f"{package.name.replace('-', '_')}-*.whl")
        holds = ("--toplevel", source.name, "--package", str(source), "--package-omit", "__pycache__")
        session.run("check-wheel-contents", *holds, str(wheel))
    session.run("twine", "check", "--strict", *map(str, out.iterdir()))


@nox.session
def sdists(session: nox.Session) -> None:
    """Both sdists (``-- DIST``: those there), away from the checkout: each makes its wheel and passes its own tests."""
    install(session, "hatchling", groups=("test",))
    with tempfile.TemporaryDirectory() as folder:
        given = Path(*session.posargs[:1]) if session.posargs else Path(folder)
        sources = []
        for package in (ROSE, GROUPING):
            if not session.posargs:
                with session.chdir(package):
                    session.run("hatchling", "build", "-t", "sdist", "-d", folder, silent=True)
            (archive,) = given.glob(f"{package.name.replace('-', '_')}-*.tar.gz")
            shutil.unpack_archive(archive, folder)
            sources.append(Path(folder) / archive.name.removesuffix(".tar.gz"))
        wheels = build(session, *sources)
        for wheel in map(Path, wheels):
            if session.posargs and wheel.read_bytes() != (given / wheel.name).read_bytes():
                session.error(f"{wheel.name} must be what its sdist makes; got another in {given}")
        install(session, *wheels)
        for source in sources:
            with session.chdir(source):
                session.run("python", "-m", "pytest", "-n", "auto", env=PINNED)


@nox.session
def supply(session: nox.Session) -> None:
    """What the packages bring with them: bills of materials in dist/sbom/, licences (``-- --write``: the page)."""
    install(session, groups=("supply",))
    bills = list_materials(session, ROOT / "dist" / "sbom")
    page = ROOT / "docs" / "licences.md"
    session.run("python", str(ROOT / "tools" / "licences.py"), str(page), *map(str, bills), *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """No pinned version has a vulnerability that PyPI knows of; one that it cannot tell about fails too."""
    install(session, "pip-audit")
    session.run("pip-audit", "--strict", "--no-deps", "--disable-pip", "-r", str(CONSTRAINTS), *session.posargs)


@nox.session
def changelog(session: nox.Session) -> None:
    """Every package whose source differs from a branch has a fragment that says how: ``-- origin/main``."""
    install(session, "towncrier")
    (branch,) = session.posargs or ["main"]
    for package in (ROSE, GROUPING):
        differ = ("git", "diff", "--name-only", f"{branch}...", "--", str(package / "src"))
        if session.run(*differ, external=True, silent=True):
            session.run("towncrier", "check", "--dir", str(package), "--compare-with", branch)
