"""int8 with an f16 scale per 64 columns, for embeddings and heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.layout import expand_groups, pad_axis
from pallas_kernels.svsk_matmul.types import INT8_GROUP, Int8Weight


@jax.jit
def quantize_int8(W: Float[Array, "n k"]) -> Int8Weight:
    """Round W [N, K] to nearest, with scale = max |w| / 127 over each 64 columns of a row, stored as f16."""
    n, k = W.shape
    wide = W.astype(jnp.float32)
    peaks = jnp.max(jnp.abs(pad_axis(wide, 1, INT8_GROUP).reshape(n, -1, INT8_GROUP)), axis=-1)
    scales = jnp.minimum(peaks / 127, 65504.0).astype(jnp.float16)
    steps = expand_groups(scales.astype(jnp.float32), INT8_GROUP, k)
    values = jnp.clip(jnp.round(wide / jnp.where(steps == 0, 1.0, steps)), -127, 127)
    return Int8Weight(values=values.astype(jnp.int8), scales=scales, shape=(n, k))
