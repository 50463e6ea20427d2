"""`svsk export`."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from convert.names import source_names
from svsk_jax.cli.common import ModelFlags, OutputFlags, Verb, console, progress_bar
from svsk_jax.models import open_model
from svsk_jax.storage.export import export_dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(OutputFlags, ModelFlags, Verb):
    """Write a model for other programs."""

    to: Literal["dense"] = "dense"
    """dense: the dense restore as a Hugging Face safetensors folder, which transformers loads."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the tensors; float32 gives the same logits, the others round."""

    def run(self) -> dict[str, Any]:
        """Export."""
        source = open_model(self.model, revision=self.revision)
        names = {path: name.hf for path, name in source_names(source.config, "hf").items()}
        with progress_bar("export") as move:
            result = export_dense(
                source,
                self.output,
                names,
                dtype=jnp.dtype(self.dtype),
                overwrite=self.overwrite,
                on_layer=lambda done, total: move(done, total, "layers"),
            )
        console.print(
            f"wrote {self.output}: {result['tensors']} tensors in {result['shards']} shards, "
            f"{result['bytes'] / 1e6:,.1f} MB"
        )
        return result
