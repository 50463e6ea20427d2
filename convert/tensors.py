"""One tensor of a checkpoint file: its shape is known, its values are read in slabs of rows on demand."""

import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

CHUNK_VALUES = 1 << 18
"""Values converted at a time: bounds the wide copies that a conversion makes beside its result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A tensor on disk: `read(start, stop)` gives that part of its first axis, in a float type of its own."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], np.ndarray]
    readable: bool = True
    slab_rows: int | None = None
    """Rows converted at a time; None for about `CHUNK_VALUES` values."""

    def to_numpy(self, dtype: DTypeLike) -> np.ndarray:
        """All values as `dtype`, converted slab by slab.

        Raises:
            ValueError: the tensor holds no floating-point values, holds NaN or Inf, or overflows `dtype`.
        """
        if not self.readable:
            raise ValueError(
                f"{self.name}: expected floating-point values (F16, BF16, F32 or F64), found {self.dtype}; "
                "if the checkpoint is quantized (GPTQ, AWQ, FP8, ...) convert from the unquantized one"
            )
        target = np.dtype(jnp.dtype(dtype))
        if not jnp.issubdtype(target, jnp.floating):
            raise ValueError(f"{self.name}: expected a floating-point dtype to convert to, got {target}")
        out = np.empty(self.shape, target)
        broken = overflowing = 0
        for start, stop in self._slabs():
            values = self.read(start, stop)
            with np.errstate(over="ignore", invalid="ignore"):
                out[start:stop] = values
            lost = int(np.count_nonzero(~np.isfinite(out[start:stop])))
            if lost:
                here = int(np.count_nonzero(~np.isfinite(values)))
                broken, overflowing = broken + here, overflowing + lost - here
        if broken:
            raise ValueError(
                f"{self.name}: {broken} of {out.size} values are NaN or Inf; the checkpoint is damaged or "
                "its training diverged: download it again or choose another revision"
            )
        if overflowing:
            raise ValueError(
                f"{self.name}: {overflowing} of {out.size} values overflow {target}; load it as "
                "bfloat16 or float32"
            )
        return out

    def _slabs(self) -> Iterator[tuple[int, int]]:
        rows = self.shape[0]
        values = max(1, int(np.prod(self.shape, dtype=np.int64)))
        step = self.slab_rows or max(1, CHUNK_VALUES * rows // values)
        for start in range(0, rows, step):
            yield start, min(rows, start + step)
