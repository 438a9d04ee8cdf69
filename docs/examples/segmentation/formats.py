"""Which files can be read: by suffix, and whether their first bytes agree with it."""

from __future__ import annotations

from pathlib import Path

from segmentation.axes import FileError

# Longest first, so that the name before ".ome.tif" does not end in ".ome".
FORMATS = {
    **dict.fromkeys((".ome.tiff", ".ome.tif", ".tiff", ".tif"), "TIFF"),
    **dict.fromkeys((".ome.zarr", ".zarr"), "Zarr"),
    ".nii.gz": "gzip",
    ".nii": "NIfTI",
    ".png": "PNG",
    **dict.fromkeys((".jpeg", ".jpg"), "JPEG"),
}
# First bytes of files: a suffix that lies is found before a library stumbles.
CONTENTS = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
    b"\x1f\x8b": "gzip",
    b"\x89HDF": "HDF5",
    b"PK\x03\x04": "zip",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"version https://git-lfs": "Git LFS pointer",
}


def stem_of(path: Path) -> str:
    """The name of a file without its suffix, or without both where it has two: "a.ome.tif" is "a"."""
    suffix = suffix_of(path)
    return path.name[: len(path.name) - len(suffix)] if suffix else path.stem


def suffix_of(path: Path) -> str:
    """The suffix as written, if it is one that can be read; otherwise the empty word."""
    return next((path.name[-len(s) :] for s in FORMATS if path.name.lower().endswith(s)), "")


def list_files(folder: Path) -> list[Path]:
    """What can be read in a folder, by suffix, in the order of names. Hidden files are passed over."""
    return sorted(path for path in folder.iterdir() if suffix_of(path) and not path.name.startswith("."))


def checked_format(path: Path) -> str:
    """The format that the suffix promises, if the first bytes do not say otherwise."""
    kind = FORMATS.get(suffix_of(path).lower())
    if kind is None:
        raise FileError.of(path, f"one of {', '.join(FORMATS)}", f"suffix {path.suffix!r}")
    if not path.exists():
        raise FileError.of(path, "a file", "nothing of that name")
    if path.is_dir() or kind == "Zarr":
        if path.is_dir() and kind == "Zarr":
            return kind
        found = ("a file", "a directory")[path.is_dir()]
        raise FileError.of(path, "a directory" if kind == "Zarr" else "a file", found)
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise FileError.of(path, f"a {kind} file", "an empty file")
    content = next((name for first, name in CONTENTS.items() if start.startswith(first)), None)
    # NIfTI has its mark further inside, so nothing may claim it.
    if content != (None if kind == "NIfTI" else kind):
        raise FileError.of(path, f"the content of a {kind} file, as its suffix says", content or f"bytes {start[:4]!r}")
    return "NIfTI" if kind == "gzip" else kind
