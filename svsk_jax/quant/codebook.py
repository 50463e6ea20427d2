"""Rounding to the levels of a codebook."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from pallas_kernels.svsk_matmul.layout import levels

LINEAR = (0.0, 0.5)
"""(a, δ) with which the companded levels t + a t³ - δ, t = c - 7.5, are those of the linear codebook, c -
8."""


def nearest_codes(z: Float[Array, "*b"], coefficients: Float[Array, "2"]) -> Int[Array, "*b"]:
    """The code in 0..15 whose level t + a t³ - δ, t = c - 7.5, is nearest to z; int32.

    Requires a ≥ 0, so that levels rise with the code. A z halfway between two levels takes the lower one.
    """
    table = levels(jnp.arange(16)[None], coefficients)[0]
    middles = (table[1:] + table[:-1]) / 2
    codes = jnp.zeros(z.shape, jnp.int32)
    for index in range(15):
        codes += (z > middles[index]).astype(jnp.int32)
    return codes


def decode(codes: Integer[Array, "*b"], coefficients: Float[Array, "2"]) -> Float[Array, "*b"]:
    """f32 level of each code."""
    t = codes.astype(jnp.float32) - 7.5
    return t + coefficients[0] * t * t * t - coefficients[1]


def round_to_level(w: Float[Array, "*b"], scale: Float[Array, "*#b"], coefficients: jax.Array) -> jax.Array:
    """The code whose scale · level is nearest to w, int32; `scale` may be negative. Any code will do where it
    is zero."""
    return nearest_codes(w / jnp.where(scale == 0, 1.0, scale), coefficients)
