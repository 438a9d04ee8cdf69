"""Put ONNX Runtime Web, which the interactive page runs its network by, beside a copy of the page.

    python docs/interactive/fetch_runtime.py [FOLDER]

FOLDER is where index.html lies (by default here); the files go into its ``runtime``. They come from npm, which must be
installed, and are taken only if the package is the one whose digest is written here.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "onnxruntime-web@1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def digest(package: Path) -> str:
    """A file's digest, written as npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()


def download(folder: Path) -> Path:
    """Let npm fetch the package into a folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm must be installed: the page's runtime is one of its packages")
    subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (package,) = folder.glob("*.tgz")
    return package


def unpack(package: Path, folder: Path, integrity: str = INTEGRITY) -> None:
    """Take what the page needs out of the package, if it is the right one.

    Raises:
        SystemExit: its digest is another.
    """
    found = digest(package)
    if found != integrity:
        raise SystemExit(f"{PACKAGE} must have the digest {integrity}; got {found}")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        for name in FILES:
            content = archive.extractfile(f"package/dist/{name}")
            assert content is not None  # a file, by the digest
            (folder / name).write_bytes(content.read())


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch into the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    page = parser.parse_args(arguments).folder
    if not (page / "index.html").is_file():
        sys.exit(f"{page} must hold the page's index.html")
    with tempfile.TemporaryDirectory() as temporary:
        unpack(download(Path(temporary)), page / "runtime")
    print(f"{PACKAGE}: {len(FILES)} files in {page / 'runtime'}")


if __name__ == "__main__":
    main()
