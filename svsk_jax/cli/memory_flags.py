"""The flag that bounds what a run holds in memory."""

import dataclasses

from svsk_jax.pipeline.memory import gigabytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryFlags:
    """How much memory."""

    max_memory: float | None = None
    """Gigabytes that may be held: of each accelerator, or on a CPU of the process's memory beyond what Python
    and JAX take by themselves (about 0.5). Calibration takes smaller batches, and keeps residual streams and
    layer inputs on the host or on disk, to stay within; what cannot is refused before any work. Smaller
    batches change statistics by rounding."""

    @property
    def limit(self) -> int | None:
        """The same in bytes; ValueError for what is not a size."""
        return gigabytes(self.max_memory)
