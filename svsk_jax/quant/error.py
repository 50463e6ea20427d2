"""The layer error: how much of a linear's output a stored form loses on the calibration inputs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from svsk_jax.quant.types import InputMoment


@jax.jit
def output_energy(E: Float[Array, "n k"], moment: InputMoment) -> Float[Array, ""]:
    """tr(E H Eᵀ): mean square over tokens of E x, summed over outputs; with a diagonal moment, Σ hₖ eₙₖ².
    f32."""
    E = E.astype(jnp.float32)
    if moment.is_full:
        return jnp.sum(jnp.matmul(E, moment.mean, precision=jax.lax.Precision.HIGHEST) * E)
    return jnp.sum(E * E * moment.mean)


def layer_error(W: Float[Array, "n k"], approximation: Float[Array, "n k"], moment: InputMoment) -> float:
    """tr((W-Ŵ) H (W-Ŵ)ᵀ) / tr(W H Wᵀ), dimensionless; 0 when W's output is zero."""
    signal = float(output_energy(W, moment))
    return float(output_energy(W - approximation, moment)) / signal if signal > 0 else 0.0
