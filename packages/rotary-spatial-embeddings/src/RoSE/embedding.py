"""``RotarySpatialEmbedding``: the wave vectors as a module, and the bookkeeping around them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import frequencies
from .aliasing import AliasingWatch
from .angles import angles_of_tokens
from .dispatch import rotate_at, rotate_heads
from .frames import FrameWatch
from .layouts import Heads, require_features
from .packed import is_nested, jagged, require_jagged, rewrap
from .positions import Coordinates, Shape, Spacing, Where, require_batch, resolve, where_of_keys
from .reading import values_are_readable
from .transforms import FORMS, make_spacing_transform
from .validation import (
    require_choice,
    require_flag,
    require_floating,
    require_head_split,
    require_int,
    require_numbers,
    require_parameter_dtype,
    require_position_dtype,
    require_real,
    require_tensor,
)
from .wide import WideModule


class RotarySpatialEmbedding(WideModule):
    """Rotate the channels of every token by angles that encode where the token is.

    Plane c of head h turns by ``<p, freqs[h, c]>`` for a token at p (see :mod:`RoSE.functional`).

    Args:
        dim: Channels over all heads; divisible by ``num_heads`` into an even head size.
        num_heads: Attention heads; every head gets the full band of wavelengths.
        spatial_dims: Number of axes of a position (1, 2, 3, ...).
        learnable: Whether ``freqs`` is a parameter; otherwise a buffer. In the state dict either way.
        base_theta: Ratio of slowest to fastest wavelength before scaling, greater than 1.
        rotary_ratio: Part that rotates, 0 to 1, rounded to whole planes (or heads) and, above 0, at least
            one.
        init_jitter_std: Relative spread of the initial wave vector lengths (log-normal), drawn from torch's
            generator. Learnable wave vectors only; fixed ones are exact.
        frequency_scaling: How the band narrows with N = ``spatial_dims``: ``"none"`` base_theta, ``"linear"``
            base_theta ** (1/N), ``"sqrt"`` base_theta ** (1/sqrt N), ``"adaptive"`` as wide as planes
            that are a factor of four apart cover (see :func:`RoSE.frequencies.scaled_theta`).
        directions: ``"axial"``, ``"mixed"`` or ``"uniform"`` (see :func:`RoSE.frequencies.wave_vectors`).
        reference_spacing: Physical distance over which the fastest plane turns by one radian; a number or one
            per axis. Set it to the finest spacing of your data, or 0.4 of the coarsest where that is more: there the
            fastest plane turns by 2.5 radians a step, and from pi on two steps look alike.
        wavelengths: ``(shortest, longest)`` in physical units, instead of base_theta, frequency_scaling and
            reference_spacing; both ends are included where an axis has two planes or more.
        rotary_partition: What ``rotary_ratio`` counts: ``"channels"`` of every head (so every head knows the
            position), or whole ``"heads"`` (the first ones; then ``freqs`` has rows for those heads only).
        interleaved: Pair neighbouring channels; False pairs channel i with i + planes (see
            :func:`RoSE.functional.rotate`).
        spacing_transform: Learnable change of the spacing before it scales positions: None or ``"identity"``,
            ``"power"`` or ``"log"`` (see :mod:`RoSE.transforms`).
        device: Where to put the wave vectors.
        dtype: Of the wave vectors, float32 or float64 (float32 for a half type). They stay what they are when the
            module is cast to a half type; what was rounded to one elsewhere is refused. FSDP wants one dtype in a
            unit: make this module one of its own (docs/rose.md, 'Fully sharded training').

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Arguments that break a rule above.
    """

    freqs: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        spatial_dims: int = 2,
        *,
        learnable: bool = True,
        base_theta: float = 1e4,
        rotary_ratio: float = 1.0,
        init_jitter_std: float = 0.02,
        frequency_scaling: str = "sqrt",
        directions: str = "mixed",
        reference_spacing: float | Iterable[float] = 1.0,
        wavelengths: tuple[float, float] | None = None,
        rotary_partition: str = "channels",
        interleaved: bool = True,
        spacing_transform: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        head_dim = require_head_split(dim, num_heads)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.spatial_dims = require_int("spatial_dims", spatial_dims, minimum=1)
        self.learnable = require_flag("learnable", learnable)
        self.base_theta = require_real("base_theta", base_theta, above=1.0)
        self.rotary_ratio = require_real("rotary_ratio", rotary_ratio, minimum=0.0, maximum=1.0)
        self.init_jitter_std = require_real("init_jitter_std", init_jitter_std, minimum=0.0)
        self.frequency_scaling = require_choice("frequency_scaling", frequency_scaling, frequencies.SCALINGS)
        self.directions = require_choice("directions", directions, frequencies.DIRECTIONS)
        self.reference_spacing = require_numbers("reference_spacing", reference_spacing, spatial_dims, positive=True)
        self.wavelengths = frequencies.require_wavelengths(wavelengths, self.reference_spacing)
        self.rotary_partition = require_choice("rotary_partition", rotary_partition, ("channels", "heads"))
        self.interleaved = require_flag("interleaved", interleaved)
        if spacing_transform is not None:
            require_choice("spacing_transform", spacing_transform, FORMS)
        dtype = torch.promote_types(require_parameter_dtype(dtype), torch.float32)
        self.spacing_transform = make_spacing_transform(spacing_transform, self.reference_spacing, device, dtype)

        by_heads = rotary_partition == "heads"
        self.rotary_heads = _part(num_heads, rotary_ratio) if by_heads else num_heads
        planes = head_dim // 2 if by_heads else _part(head_dim // 2, rotary_ratio)
        freqs = torch.empty(self.rotary_heads, planes, spatial_dims, device=device, dtype=dtype)
        # With nothing to rotate there is nothing to learn, and an unused parameter would stall
        # DistributedDataParallel.
        if learnable and freqs.numel():
            self.freqs = nn.Parameter(freqs)
        else:
            self.register_buffer("freqs", freqs)
        self._watch = AliasingWatch(None if self.wavelengths is not None else self.reference_spacing)
        self._frames = FrameWatch()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all parameters to initial values, with fresh jitter; also after ``to_empty`` from meta."""
        heads, planes, dims = self.freqs.shape
        theta = frequencies.scaled_theta(self.base_theta, self.frequency_scaling, planes, dims)
        table = frequencies.wave_vectors(
            heads, planes, dims, directions=self.directions, theta=theta, wavelengths=self.wavelengths
        )
        table = frequencies.per_axis_units(table, self.reference_spacing)
        if self.learnable and self.init_jitter_std > 0:
            table = frequencies.jitter(table, self.init_jitter_std)
        self._require_finite(table)
        self.freqs.copy_(table)
        if isinstance(self.spacing_transform, WideModule):
            self.spacing_transform.reset_parameters()

    def _require_finite(self, table: Tensor) -> None:
        """Refuse initial wave vectors that the parameter cannot hold: every angle would be NaN."""
        largest = torch.finfo(self.freqs.dtype).max
        if values_are_readable(table) and not bool((table.abs() <= largest).all()):
            raise ValueError(
                f"reference_spacing or wavelengths must be large enough, and init_jitter_std small enough, for wave "
                f"vectors below {largest:g}; got {self.reference_spacing}, {self.wavelengths} and "
                f"{self.init_jitter_std}"
            )

    def forward(
        self,
        x: Tensor,
        spacing: Spacing | None = None,
        grid_shape: Shape | None = None,
        *,
        coordinates: Coordinates | None = None,
        num_prefix_tokens: int = 0,
        layout: str = "bnd",
        k: Tensor | None = None,
        k_where: Where | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Rotate x by the positions of its tokens, and with it k, if there is one.

        Positions come either from a grid (``grid_shape`` and ``spacing``, token order row-major, first token
        at 0) or from ``coordinates``. Positions are used as they are: nothing is centred or shifted.

        Sequences of different lengths can be packed: concatenated along the tokens of one batch row with the
        ``coordinates`` of all of them, or as a jagged nested tensor with nested or concatenated coordinates.

        Args:
            x: Queries or keys, laid out as ``layout`` says.
            spacing: Distance between grid points in physical units: a number, one per axis, a tensor
                ``(spatial_dims,)``, or per sample ``(batch, spatial_dims)``. Default 1.
            grid_shape: Points along each axis. May be left out in one dimension.
            coordinates: Positions ``(tokens, spatial_dims)`` or ``(batch, tokens, spatial_dims)``, or a
                :class:`RoSE.Grid` (which has an origin), or a list of these for tokens that lie one behind the
                other. Gradients flow to tensors. With a ``spacing_transform``, give the ``spacing`` a tensor of
                coordinates was sampled at as well (beside a list: a list, None at grids).
            num_prefix_tokens: Leading tokens (class, registers) that have no position and pass unrotated;
                positions are for the tokens after them.
            layout: ``"bnd"`` (batch, tokens, dim), ``"bnhd"`` (batch, tokens, heads, head size) or ``"bhnd"``
                (batch, heads, tokens, head size).
            k: Keys to be rotated by the same call, laid out like x (see :meth:`rotate_pair`).
            k_where: Where they are; default where x is.

        Returns:
            A tensor of x's shape and dtype (x itself when ``rotary_ratio`` is 0); with k a pair of such tensors.

        Raises:
            TypeError: Arguments of the wrong type, integer tensors.
            ValueError: Shapes that disagree with the module or with each other, bad spacing, unknown layout.
        """
        where = Where(spacing, grid_shape, coordinates, num_prefix_tokens)
        turned: Tensor | tuple[Tensor, ...]
        if k is None:
            (turned,) = self._rotated({"x": x}, where, layout)
        elif k_where is None and not (is_nested(x) or is_nested(k)):
            turned = self._rotated({"q": x, "k": k}, where, layout)
        else:
            of_keys = where if k_where is None else k_where
            turned = self._rotated({"q": x}, where, layout)[0], self._rotated({"k": k}, of_keys, layout)[0]
        if isinstance(self.spacing_transform, WideModule):  # one that learns
            self._frames.look((where,) if k_where is None else (where, k_where), self.spatial_dims)
        return turned

    def rotate_pair(
        self,
        q: Tensor,
        k: Tensor,
        spacing: Spacing | None = None,
        grid_shape: Shape | None = None,
        k_spacing: Spacing | None = None,
        k_grid_shape: Shape | None = None,
        *,
        coordinates: Coordinates | None = None,
        k_coordinates: Coordinates | None = None,
        num_prefix_tokens: int = 0,
        k_num_prefix_tokens: int | None = None,
        layout: str = "bnd",
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys; when they share positions, the angles are computed once.

        Without any ``k_`` argument q and k lie on the same positions. ``k_spacing`` alone means the same grid
        shape at another spacing, ``k_grid_shape`` alone another shape at the same spacing; ``k_coordinates``
        stands for itself. Both sides use one physical frame, so let grids that do not start at the same point
        say so with ``Grid(..., origin=...)``.

        Args:
            q: Queries.
            k: Keys; same layout as q.
            spacing: See :meth:`forward`, as for all arguments without ``k_``.
            grid_shape: Of the grid.
            k_spacing: Spacing of the keys' grid.
            k_grid_shape: Shape of the keys' grid.
            coordinates: Positions instead of a grid.
            k_coordinates: Positions of the keys.
            num_prefix_tokens: Leading tokens of q, and of k unless told otherwise, that have no position.
            k_num_prefix_tokens: Leading tokens of k without position.
            layout: Of both.

        Returns:
            The rotated q and k, each of its own shape and dtype.

        Raises:
            TypeError: As :meth:`forward`.
            ValueError: As :meth:`forward`.
        """
        for name, given in (("q", q), ("k", k)):  # without k, forward would return one tensor
            require_tensor(name, given)
        where = Where(spacing, grid_shape, coordinates, num_prefix_tokens)
        k_where = where_of_keys(where, Where(k_spacing, k_grid_shape, k_coordinates), k_num_prefix_tokens)
        rotated: tuple[Tensor, Tensor] = self(
            q, spacing, grid_shape, coordinates=coordinates, num_prefix_tokens=num_prefix_tokens, layout=layout,
            k=k, k_where=None if k_where is where else k_where,
        )  # fmt: skip
        return rotated

    def _rotated(self, features: dict[str, Tensor], where: Where, layout: str) -> tuple[Tensor, ...]:
        """Rotate features that share their positions; angles are computed once."""
        x = next(iter(features.values()))
        if is_nested(x):
            require_jagged(x, where.coordinates, where.spacing, layout, where.num_prefix_tokens)
            row = jagged(x).values().unsqueeze(0)
            flat = jagged(where.coordinates).values() if is_nested(where.coordinates) else where.coordinates
            (turned,) = self._rotated({"x": row}, where._replace(coordinates=flat), layout)
            return (rewrap(turned.squeeze(0), x),)
        prefix = where.num_prefix_tokens
        heads = self.heads
        counts = [require_features(name, t, layout, heads, prefix) for name, t in features.items()]
        batch, tokens = counts[0]
        if counts[-1][1] != tokens:
            raise ValueError(
                "q and k must have the same number of tokens unless k is given positions of its own "
                f"(k_grid_shape, k_spacing or k_coordinates); got {tokens} and {counts[1][1]}"
            )
        self._require_wide(freqs=self.freqs)
        positions = self._resolved(where, tokens, x.device)
        for batch, _ in counts:
            require_batch(positions, batch)
        if not self.freqs.numel():
            return tuple(features.values())
        return rotate_at(positions, self.freqs, list(features.values()), prefix, layout, heads)

    def angles(
        self, positions: Tensor, dtype: torch.dtype = torch.float32, *, num_prefix_tokens: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle at positions from :meth:`positions`.

        Together with :meth:`rotate` this is what :meth:`forward` does, for callers that rotate different features
        at the same positions again and again.

        Args:
            positions: ``(tokens, N)`` or ``(batch, tokens, N)``, used as they are.
            dtype: Of the results, float32 or float64.
            num_prefix_tokens: Leading tokens without position; their angles are zero.

        Returns:
            Two tensors ``(..., prefix + tokens, heads, planes)``; the heads are those that rotate.

        Raises:
            TypeError: Arguments of the wrong type.
            ValueError: Positions of another shape.
        """
        self._require_wide(freqs=self.freqs)
        require_position_dtype("positions", positions)
        axes = self.spatial_dims
        if positions.dim() < 2 or positions.shape[-1] != axes:
            raise ValueError(
                f"positions must be (tokens, {axes}) or (batch, tokens, {axes}); got {tuple(positions.shape)}"
            )
        require_int("num_prefix_tokens", num_prefix_tokens, minimum=0)
        return angles_of_tokens(positions, self.freqs, num_prefix_tokens, dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "bnd") -> Tensor:
        """Rotate x by angles from :meth:`angles`.

        Args:
            x: Features, laid out as ``layout`` says.
            cos: Cosines of the angles of all its tokens, prefix included.
            sin: Sines.
            layout: See :meth:`forward`.

        Returns:
            A tensor of x's shape and dtype (x itself when ``rotary_ratio`` is 0).

        Raises:
            TypeError: Arguments that are not tensors of floating-point numbers.
            ValueError: Shapes that disagree with the module or with each other, unknown layout.
        """
        require_features("x", x, layout, self.heads, 0)
        for name, values in (("cos", cos), ("sin", sin)):
            if require_floating(name, values).dim() not in (3, 4):
                raise ValueError(
                    f"{name} must have shape ([batch,] tokens, heads, planes), as angles gives them; "
                    f"got {tuple(values.shape)}"
                )
        return rotate_heads(x, cos, sin, layout, self.heads) if self.freqs.numel() else x

    def positions(
        self,
        tokens: int,
        spacing: Spacing | None = None,
        grid_shape: Shape | None = None,
        coordinates: Coordinates | None = None,
        *,
        device: torch.device | None = None,
    ) -> Tensor:
        """The coordinates that :meth:`forward` uses: ``(tokens, N)`` or ``(batch, tokens, N)``."""
        return self._resolved(Where(spacing, grid_shape, coordinates), tokens, device)

    def _resolved(self, where: Where, tokens: int, device: torch.device | None) -> Tensor:
        return resolve(
            where, tokens, self.spatial_dims,
            transform=self.spacing_transform, freqs=self.freqs, watch=self._watch, device=device,
        )  # fmt: skip

    @property
    def heads(self) -> Heads:
        """How many heads there are, of what size, and which of them turn."""
        return Heads(self.num_heads, self.head_dim, self.rotary_heads, self.interleaved)

    def extra_repr(self) -> str:
        """What distinguishes this embedding, for ``print(module)``."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, spatial_dims={self.spatial_dims}, "
            f"planes={self.freqs.shape[1]}, directions={self.directions!r}, learnable={self.learnable}"
        )


def _part(whole: int, ratio: float) -> int:
    """``ratio`` of ``whole``, rounded half up, and at least one for any ratio above zero."""
    return max(math.floor(ratio * whole + 0.5), 1) if ratio > 0 else 0
