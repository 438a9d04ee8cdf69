"""Parameters that decide angles are float32 at least, on every road by which a narrower type could reach them.

A half type rounds a wavelength by up to 0.4 %, which far from the origin is many turns. Casting a module leaves these
parameters as they are. What has been rounded elsewhere cannot be restored, so it is refused: in a checkpoint when it is
loaded, and in the module before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .validation import POSITION_DTYPES, require_tensor


class WideModule(nn.Module):
    """A module whose own parameters and buffers are all float32 at least."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast as any module, but to no type narrower than float32: then the type stays."""

        def widened(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device)
            return moved

        return super()._apply(widened, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load as any module, but report what was saved in a narrower type (with ``assign=True`` too)."""
        for name in (*self._parameters, *self._buffers):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype not in POSITION_DTYPES:
                error_msgs.append(
                    f"{prefix}{name} must be float64 or float32; got {value.dtype}: its values were rounded when the "
                    "checkpoint was cast. Save model.bfloat16().state_dict(), which keeps them, or accept the rounding "
                    f"with state_dict[{prefix + name!r}] = state_dict[{prefix + name!r}].float()"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _require_wide(self, **parameters: Tensor) -> None:
        """Refuse parameters that became narrow behind the module's back, before they are used."""
        for name, value in parameters.items():
            if require_tensor(name, value).dtype not in POSITION_DTYPES:
                raise TypeError(
                    f"{name} of {type(self).__name__} must be float64 or float32; got {value.dtype}, which rounds "
                    "every angle. Cast with module.to(dtype), which leaves it out, and load into the cast module "
                    "instead of casting while loading; in FSDP make every RotarySpatialEmbedding a unit of its own, "
                    "without param_dtype (docs/rose.md, 'Fully sharded training', has the lines); after an assignment "
                    "to .data restore the float32 values"
                )
