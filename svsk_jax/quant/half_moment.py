"""Symmetric second moments by their lower halves, as they lie on disk and travel between host and device.

A matrix [K, K] is cut into strips of `STRIP` rows. The half has the strips one after the other, each row by
row and up to the column where the strip's last row meets the diagonal: K² / 2 + K · `STRIP` / 2 numbers where
`STRIP` divides K.
"""

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from svsk_jax.quant.types import InputMoment, MomentValue

STRIP = 512
"""Rows of a strip; a narrower matrix is kept whole."""


def half_size(width: int) -> int:
    """Numbers in the half of a matrix [width, width]."""
    strips, rest = divmod(width, STRIP)
    return STRIP**2 * strips * (strips + 1) // 2 + rest * width


def half_width(size: int) -> int:
    """The width of the matrix whose half has `size` numbers.

    Raises:
        ValueError: no matrix has one of that size.
    """
    strips = (math.isqrt(1 + 8 * (size // STRIP**2)) - 1) // 2
    whole = strips * STRIP
    rest = (math.isqrt(whole**2 + 4 * (size - half_size(whole))) - whole) // 2
    if half_size(whole + rest) != size:
        raise ValueError(f"{size} numbers: no symmetric matrix has a half of so many")
    return whole + rest


def diagonal_places(width: int) -> np.ndarray:
    """Where in the half of a matrix its diagonal is, int64 [width]."""
    rows = np.arange(width)
    columns = np.minimum((rows // STRIP + 1) * STRIP, width)
    return np.cumsum(columns) - columns + rows


def part_size(width: int, devices: int) -> int:
    """Numbers in the largest part of the half of a matrix whose rows lie on so many devices: the last's."""
    first = width - width // devices
    return half_size(width) - int(diagonal_places(width)[first]) + first


@partial(jax.jit, static_argnames="first")
def lower_rows(rows: Float[Array, "*batch r k"], first: int = 0) -> Float[Array, "*batch size"]:
    """What the half has of rows `first`, `first` + 1, … of a matrix [K, K]: of all of them, the half."""
    *batch, count, width = rows.shape
    cuts = [first, *range((first // STRIP + 1) * STRIP, first + count, STRIP), first + count]
    parts = []
    for start, end in itertools.pairwise(cuts):
        columns = min((start // STRIP + 1) * STRIP, width)
        parts.append(rows[..., start - first : end - first, :columns].reshape(*batch, -1))
    return jnp.concatenate(parts, axis=-1)


@jax.jit
def mirrored(half: Float32[Array, "size"]) -> Float32[Array, "k k"]:
    """The matrix that is symmetric to the last bit and has this lower half. Beside argument and result it
    takes no more than a strip."""
    width, place = half_width(half.size), 0
    found = jnp.zeros((width, width), half.dtype)
    for start in range(0, width, STRIP):
        end = min(start + STRIP, width)
        strip = half[place : (place := place + (end - start) * end)].reshape(end - start, end)
        corner = jnp.tril(strip[:, start:])
        found = found.at[start:end, :start].set(strip[:, :start])
        found = found.at[:start, start:end].set(strip[:, :start].T)
        found = found.at[start:end, start:end].set(corner + jnp.tril(corner, -1).T)
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfMoment:
    """A full `InputMoment` whose lower half, f32 [size], is `parts` one after the other: one, or what each
    device of a mesh made, and where it made it. A stack of experts' has an axis of experts in front,
    as have its `tokens`."""

    parts: tuple[MomentValue, ...]
    tokens: MomentValue

    @property
    def total(self) -> MomentValue:
        """The lower half, f32 [size]; several parts are put together on the host."""
        return self.parts[0] if len(self.parts) == 1 else np.concatenate(jax.device_get(self.parts), axis=-1)

    @property
    def width(self) -> int:
        """K."""
        return half_width(sum(part.shape[-1] for part in self.parts))

    @property
    def whole(self) -> InputMoment:
        """The moment, on the default device where the half is on the host."""
        return InputMoment(total=mirrored(self.total), tokens=self.tokens)

    @property
    def mean(self) -> jax.Array:
        """H = E[x xᵀ], f32 [K, K]."""
        return self.whole.mean


StoredMoment = InputMoment | HalfMoment
"""A moment as it is stored: a diagonal, or the lower half of a matrix."""


def as_stored(total: MomentValue, tokens: MomentValue, full: bool) -> StoredMoment:
    """The moment that is stored as `total`: of a full one the lower half, else the diagonal."""
    if full:
        return HalfMoment(parts=(total,), tokens=tokens)
    return InputMoment(total=total, tokens=tokens)


def whole_moment(moment: StoredMoment) -> InputMoment:
    """The whole of a half; a diagonal moment is one already."""
    return moment.whole if isinstance(moment, HalfMoment) else moment


def halved(moment: InputMoment) -> HalfMoment:
    """The lower half of a full moment [K, K], or of experts' [E, K, K], made on the devices where it lies and
    left there: of rows divided over several each makes a part, of a replicated one the first copy counts."""
    total = jnp.asarray(moment.total)
    parts = {shard.index[-2].start or 0: shard.data for shard in reversed(total.addressable_shards)}
    return HalfMoment(
        parts=tuple(lower_rows(parts[first], first) for first in sorted(parts)), tokens=moment.tokens
    )
