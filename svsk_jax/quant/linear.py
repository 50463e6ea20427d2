"""Quantize one linear by the published method: base, then sidecar of what the base left."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.layout import pack_codes
from pallas_kernels.svsk_matmul.reference import dequantize_base
from svsk_jax.quant.native_q4 import search_scales
from svsk_jax.quant.sidecar import fit_diagonal
from svsk_jax.quant.types import InputMoment, QuantConfig, SVSKWeight


@functools.partial(jax.jit, static_argnames="config")
def quantize_linear(W: Float[Array, "n k"], moment: InputMoment, config: QuantConfig) -> SVSKWeight:
    """The stored form of W [N, K] under a recipe, from the second moment of its input. A pure function: the
    same input gives the same bytes.

    Raises:
        ValueError: the recipe's scales are not flat.
    """
    if config.scales != "flat":
        raise ValueError("quantize_linear: the published method has flat scales; use `joint.quantize_joint`")
    W = W.astype(jnp.float32)
    codes, scales = search_scales(W, moment.diagonal, config.groups[0])
    base = SVSKWeight(
        codes=pack_codes(codes + jnp.int8(8)),
        scales=scales,
        super_scales=None,
        coefficients=None,
        sidecar=None,
        shape=(W.shape[0], W.shape[1]),
        group=config.groups[0],
    )
    if config.rank == 0:
        return base
    tile = (config.tile.rows, config.tile.columns)
    sidecar = fit_diagonal(W - dequantize_base(base), moment.diagonal, tile, config.rank)
    return SVSKWeight(
        codes=base.codes,
        scales=base.scales,
        super_scales=None,
        coefficients=None,
        sidecar=sidecar,
        shape=base.shape,
        group=base.group,
    )
