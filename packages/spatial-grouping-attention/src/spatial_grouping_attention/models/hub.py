"""Networks that are saved with what they were made of: weights as safetensors, arguments as JSON, nothing pickled.

Importing this module imports huggingface_hub.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from RoSE.validation import require_choice
from safetensors import SafetensorError

from .presets import SETTINGS, settings_of
from .vit import GroupingViT


class PretrainedGroupingViT(  # type: ignore[call-arg]
    GroupingViT,
    PyTorchModelHubMixin,
    library_name="spatial-grouping-attention",
    paper_url="https://arxiv.org/abs/2505.16993",
    tags=["image-segmentation"],
):
    """A network with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of huggingface_hub.

    ``config.json`` holds every argument that the network has, also those that were left at the defaults of then: a
    saved network stays what it is when defaults and presets change.

    A network that is saved in the place of another replaces it file by file, each when it is whole and on the disk: a
    program that has no room left leaves the other one, and so does one that is killed, but for the moment between the
    weights and the configuration, when it leaves the new ones beside the old.

    Args:
        spatial_dims: axes of the images: 1, 2 or 3.
        in_channels: channels of the images.
        num_classes: logits of every pixel.
        preset: ``"nano"``, ``"tiny"``, ``"base"`` or ``"large"``, whose settings hold where no keyword says otherwise;
            None for :class:`GroupingViT`'s.
        **keywords: of :class:`GroupingViT`; numbers, strings and (nested) sequences of them, ``device`` and ``dtype``
            apart.

    Raises:
        TypeError: an argument is unknown, has the wrong type or cannot be written as JSON.
        ValueError: the preset is unknown, or as :class:`GroupingViT`.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, num_classes: int, *, preset: str | None = None, **keywords: Any
    ) -> None:
        if preset is not None:
            keywords = settings_of(require_choice("preset", preset, tuple(SETTINGS)), keywords)
        arguments = _DEFAULTS | keywords
        super().__init__(spatial_dims, in_channels, num_classes, **arguments)
        first = {"spatial_dims": spatial_dims, "in_channels": in_channels, "num_classes": num_classes}
        # Where a network is put is not what it is.
        made = {name: arguments.pop(name, None) for name in ("device", "dtype")}
        arguments = {name: _plain(name, value) for name, value in arguments.items()}
        self.preset = preset
        self._hub_mixin_config = {**first, "preset": preset, **arguments, "dtype": _name_of(made["dtype"])}

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **options: Any) -> str | None:
        """Save the network in a folder; options are those of the mixin.

        Raises:
            OSError: a file cannot be written; what the folder held is as it was.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_UNFINISHED}*"):
            if time.time() - leftover.stat().st_mtime > _ABANDONED:  # by a program that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as made:
            try:
                super().save_pretrained(made, **options)
            except SafetensorError as problem:
                raise OSError(f"cannot write {folder}: {problem}; what was there is unchanged") from problem
            _move(Path(made), folder)
        if not push_to_hub:
            return None
        push: Any = self.push_to_hub
        address: str = push(**{**options, "repo_id": options.get("repo_id") or folder.name})
        return address

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> PretrainedGroupingViT:
        """Load a network from a folder or from the hub; options are those of the mixin, and arguments that win.

        Raises:
            ValueError: ``config.json`` or the weights cannot be read, or are those of something else.
        """
        _require_readable(Path(pretrained_model_name_or_path) / "config.json")
        network: PretrainedGroupingViT = super().from_pretrained(pretrained_model_name_or_path, **options)
        return network

    def _save_pretrained(self, save_directory: Path) -> None:
        # The network may have been cast since.
        config: Any = self._hub_mixin_config
        config["dtype"] = _name_of(self.stem.proj.weight.dtype)
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **given: Any) -> PretrainedGroupingViT:
        """As the mixin does, but nothing in the folder may be missing or unknown."""
        own = {*_PLACES, "map_location"}
        arguments = {name: value for name, value in given.items() if name not in own}
        if unknown := sorted(arguments.keys() - _PARAMETERS.keys() - {"preset"}):
            raise ValueError(f"config.json must have arguments of GroupingViT and a preset only; got {unknown}")
        needed = [name for name, parameter in _PARAMETERS.items() if parameter.default is parameter.empty]
        if missing := [name for name in needed if name not in arguments]:
            raise ValueError(f"config.json must have {needed}; got none of {missing}")
        if isinstance(arguments.get("dtype"), str):
            arguments["dtype"] = getattr(torch, require_choice("dtype", arguments["dtype"], _DTYPES))
        loading = {name: value for name, value in given.items() if name in own}
        network: PretrainedGroupingViT = super()._from_pretrained(strict=strict, **loading, **arguments)
        return network

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, *where: Any) -> PretrainedGroupingViT:
        try:
            network: PretrainedGroupingViT = super()._load_as_safetensor(model, model_file, *where)
        except SafetensorError as problem:
            raise ValueError(f"{model_file} must be whole; got a file that cannot be read ({problem})") from problem
        return network

    @classmethod
    def _load_as_pickle(cls, *_: Any) -> PretrainedGroupingViT:
        raise ValueError("weights must be model.safetensors; got pytorch_model.bin, a pickle, which is not read")


_PARAMETERS = {name: p for name, p in inspect.signature(GroupingViT).parameters.items() if name != "self"}
# Without those that follow from others: the reference spacing is the spacing, unless given.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in _PARAMETERS.items()
    if parameter.default is not parameter.empty and name != "reference_spacing"
}
_PLACES = ("model_id", "revision", "cache_dir", "force_download", "local_files_only", "token")
_DTYPES = ("float16", "bfloat16", "float32", "float64")


# Beside the files to be, and so on the same disk.
_UNFINISHED = ".unfinished-"
_ABANDONED = 24 * 3600.0  # seconds: another program may be saving there


def _move(made: Path, folder: Path) -> None:
    """Put files in the place of others, the weights first: without them there would be nothing to describe."""
    for file in sorted(made.iterdir(), key=lambda file: file.suffix != ".safetensors"):
        if file.name == "README.md" and (folder / file.name).exists():  # which people write in
            continue
        with file.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(file, folder / file.name)


def _require_readable(path: Path) -> None:
    """Refuse a configuration that is no JSON object; one that is not there is told of elsewhere."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as problem:
        raise ValueError(f"{path} must be JSON; got a file that cannot be read as such ({problem})") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object; got a {type(content).__name__}")


def _plain(name: str, value: Any) -> Any:
    """A value as JSON will give it back."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise TypeError(f"{name} must be numbers, strings or sequences of them to be saved; got {value!r}") from None


def _name_of(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.get_default_dtype()).removeprefix("torch.")
