"""Quantize one linear: base, then sidecar of what the base left."""

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
        NotImplementedError: the recipe asks for a codebook or scales that no search here fills.
    """
    if config.codebook != "linear" or config.scales != "flat":
        raise NotImplementedError(
            f"no scale search for codebook={config.codebook} with scales={config.scales} yet; use linear "
            "with flat scales"
        )
    W = W.astype(jnp.float32)
    codes, scales = search_scales(W, moment.diagonal, config.group)
    base = SVSKWeight(
        codes=pack_codes(codes + jnp.int8(8)),
        scales=scales,
        super_scales=None,
        coefficients=None,
        sidecar=None,
        shape=(W.shape[0], W.shape[1]),
        group=config.group,
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
