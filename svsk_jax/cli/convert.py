"""`svsk convert`."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from svsk_jax import pipeline
from svsk_jax.cli.common import ModelFlags, OutputFlags, Verb, console, layer_progress
from svsk_jax.models import open_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(OutputFlags, ModelFlags, Verb):
    """Convert a checkpoint to an unquantized orbax model, tensor by tensor."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of the stored parameters."""

    def run(self) -> dict[str, Any]:
        """Convert."""
        source = open_model(self.model, revision=self.revision)
        with layer_progress() as on_progress:
            metadata = pipeline.convert(
                source,
                self.output,
                dtype=jnp.dtype(self.dtype),
                overwrite=self.overwrite,
                on_progress=on_progress,
            )
        console.print(f"wrote {self.output}")
        return {"output": str(self.output), **metadata}
