"""Quantize what is outside the decoder layers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from svsk_jax.calibration.store import Statistics
from svsk_jax.model.config import ModelConfig
from svsk_jax.pipeline.checks import check_weight
from svsk_jax.pipeline.working_sets import slab_rows
from svsk_jax.quant.embedding import quantize_embedding, quantize_embedding_int8
from svsk_jax.quant.half_moment import whole_moment
from svsk_jax.quant.joint import input_metric
from svsk_jax.quant.types import QuantConfig


def store_outer(
    outer: Mapping[str, Any], model: ModelConfig, config: QuantConfig, statistics: Statistics
) -> dict[str, Any]:
    """Embedding, head and norm as they are stored, in the host's memory: nothing looks at them until all
    layers are done.

    Args:
        outer: parameters by full path, unquantized.
        model: its configuration.
        config: the recipe.
        statistics: of the model, for a head in 4 bits.
    """
    head = "embedding.weight" if model.tie_word_embeddings else "head.weight"
    rows = slab_rows(model)

    def form(path: str, value: Any) -> Any:
        if value.ndim == 1:
            return jnp.asarray(value, jnp.float32)
        check_weight(value, path)
        if config.embedding == "bfloat16":
            return jnp.asarray(value, jnp.bfloat16)
        if config.embedding == "int8":
            return quantize_embedding_int8(value, rows)
        inputs = None
        if path == head:
            inputs = input_metric(jax.device_put(whole_moment(statistics.head())), None, config)
        return quantize_embedding(value, inputs, config, rows)

    return jax.device_get({path: form(path, value) for path, value in outer.items()})
