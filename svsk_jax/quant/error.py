"""The layer error: how much of a linear's output a stored form loses on the calibration inputs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from svsk_jax.quant.types import InputMoment


def output_energy(E: Float[Array, "n k"], moment: InputMoment) -> Float[Array, ""]:
    """tr(E H Eᵀ), f32: mean square over tokens of E x, summed over outputs; with a diagonal moment, Σ
    hₖ eₙₖ²."""
    if moment.is_full:
        return jnp.sum(jnp.matmul(E, moment.mean, precision=jax.lax.Precision.HIGHEST) * E)
    return jnp.sum(E * E * moment.mean)


def layer_error(
    W: Float[Array, "n k"], restored: Float[Array, "n k"], moment: InputMoment
) -> Float[Array, ""]:
    """tr((W-Ŵ) H (W-Ŵ)ᵀ) / tr(W H Wᵀ), dimensionless, f32, Ŵ being `restored`; 0 when the output of W
    itself is zero."""
    return error_share(W, restored, moment.total, moment.tokens)


@jax.jit
def error_share(
    W: Float[Array, "n k"], restored: Float[Array, "n k"], total: jax.Array, tokens: jax.Array
) -> Float[Array, ""]:
    """`layer_error` of the parts of a moment."""
    W, moment = W.astype(jnp.float32), InputMoment(total=total, tokens=tokens)
    signal = output_energy(W, moment)
    lost = output_energy(W - restored, moment)
    return jnp.where(signal > 0, lost / jnp.where(signal > 0, signal, 1.0), 0.0)
