"""An embedding or head in int8 or in 4 bits, some rows at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.layout import pack_codes, pack_int6
from pallas_kernels.svsk_matmul.types import Int8Weight
from svsk_jax.quant.codebook import LINEAR
from svsk_jax.quant.int8 import quantize_int8
from svsk_jax.quant.joint import quantize_base
from svsk_jax.quant.row_parts import InputMetric
from svsk_jax.quant.types import EMBEDDING_GROUP, QuantConfig, SVSKWeight


def quantize_embedding_int8(W: Any, rows: int) -> Int8Weight:
    """`quantize_int8` of an embedding or head [vocabulary, hidden], so many rows at a time to bound memory.
    W may lie on the host."""

    def rounded(slab: Float[Array, "n k"]) -> dict[str, Array]:
        weight = quantize_int8(slab)
        return {"values": weight.values, "scales": weight.scales}

    return Int8Weight(**_by_slabs(W, rows, rounded), shape=(W.shape[0], W.shape[1]))


def quantize_embedding(W: Any, inputs: InputMetric | None, config: QuantConfig, rows: int) -> SVSKWeight:
    """An embedding or head [vocabulary, hidden] as `joint.quantize_base` rounds a linear: of a head the error
    of a logit is kept small, tr(E H Eᵀ), of an embedding that of its rows, tr(E Eᵀ).

    A pure function: the same input gives the same bytes.

    Args:
        W: weights; may lie on the host.
        inputs: metric of what the head reads; None for an embedding that is no head: it is read as it is, and
            its weights are rounded each by itself.
        config: the recipe; its groups, sidecar and feedback across rows are those of linears alone.
        rows: rounded at a time, to bound memory. Rows do not see each other, so that it changes no byte but
            where XLA chooses other kernels for it.
    """
    pair = config.coefficients if config.codebook == "companded" else LINEAR
    stored = jnp.asarray(pair, jnp.float16)
    feedback = "none" if inputs is None or config.feedback == "none" else "columns"
    own = dataclasses.replace(config, feedback=feedback, metric="full")
    if inputs is None:
        unit = jnp.eye(W.shape[1])
        inputs = InputMetric(unit, jnp.arange(W.shape[1]), unit)

    def rounded(slab: Float[Array, "n k"]) -> dict[str, Array]:
        W = slab.astype(jnp.float32)
        base = quantize_base(W, inputs, None, stored.astype(jnp.float32), EMBEDDING_GROUP, own)
        return {
            "codes": pack_codes(base.codes),
            "scales": pack_int6(base.integers),
            "super_scales": base.super_scales,
        }

    return SVSKWeight(
        **_by_slabs(W, rows, rounded),
        coefficients=stored if config.codebook == "companded" else None,
        sidecar=None,
        shape=(W.shape[0], W.shape[1]),
        group=EMBEDDING_GROUP,
    )


def _by_slabs(
    W: Any, rows: int, quantized: Callable[[Float[Array, "rows k"]], dict[str, Array]]
) -> dict[str, Array]:
    """What is made of so many rows at a time, the last ones filled with zeros: one program for all."""
    rows = min(rows, len(W))
    slabs = []
    for start in range(0, len(W), rows):
        slab = jax.device_put(W[start : start + rows])
        slabs.append(quantized(jnp.pad(slab, ((0, rows - len(slab)), (0, 0)))))
    return {name: jnp.concatenate([slab[name] for slab in slabs])[: len(W)] for name in slabs[0]}
