"""Search of two-level scales: a signed 6-bit integer per group, an f16 super-scale per 256 columns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.svsk_matmul.layout import SUPER_GROUP, expand_groups, pad_axis
from svsk_jax.quant.codebook import decode, round_to_level

CLIP_CANDIDATES = np.linspace(0.6, 1.1, 14)
"""Tried multiples of the scale that maps a group's largest magnitude to the outermost level of its sign."""
F16_MAX = 65504.0


def imatrix_importance(W: Float[Array, "n k"], h: Float[Array, "k"], group: int) -> Float[Array, "n k"]:
    """hₖ √(2 mean(w²) + wₖ²), the mean over the weights of a group: what an error at wₖ is taken to cost in
    the scale search.

    Source: llama.cpp's quantizers with importance matrix.
    """
    n, k = W.shape
    squares = pad_axis(W * W, 1, group).reshape(n, -1, group)
    count = jnp.sum(pad_axis(jnp.ones((1, k)), 1, group).reshape(1, -1, group), axis=-1)
    mean = expand_groups(jnp.sum(squares, axis=-1) / count, group, k)
    return h * jnp.sqrt(2 * mean + W * W)


@functools.partial(jax.jit, static_argnames="group")
def search_two_level(
    W: Float[Array, "n k"], importance: Float[Array, "n k"], coefficients: Float[Array, "2"], group: int
) -> tuple[Int[Array, "n g"], Float[Array, "n s"]]:
    """Scales that minimise Σₖ iₖ (wₖ - s·level(cₖ))² with each wₖ rounded to its nearest level.

    First, for each group and either sign of the scale, the best of several clip ratios, each refitted by
    weighted least squares to its codes. Then the super-scale, which maps the largest of 256 columns' scales
    to -32. Then, for each group, the best of the three 6-bit integers around either sign's scale. All in
    f32.

    Args:
        W: weights [N, K], f32.
        importance: cost of a squared error at each weight, [N, K], not negative. A group without any is
            fitted unweighted.
        coefficients: (a, δ) of the codebook, f32; `codebook.LINEAR` for the linear one.
        group: columns that share a scale, a divisor of 256; the last group may be ragged.

    Returns:
        The integers, int8 [N, ⌈K / group⌉] in -32..31, and the super-scales, f16 [N, ⌈K / 256⌉].
    """
    n = W.shape[0]
    w = pad_axis(W, 1, group).reshape(n, -1, group)
    i = pad_axis(importance, 1, group).reshape(n, -1, group)
    mean = jnp.mean(i, axis=-1, keepdims=True)
    i = jnp.where(mean > 0, i / jnp.where(mean > 0, mean, 1.0), 1.0)
    ends = decode(jnp.array([0, 15]), coefficients)
    peak_at = jnp.argmax(jnp.abs(w), axis=-1, keepdims=True)
    peak = jnp.take_along_axis(w, peak_at, axis=-1)[..., 0]

    def error_of(scale: jax.Array) -> jax.Array:
        residual = w - scale[..., None] * decode(
            round_to_level(w, scale[..., None], coefficients), coefficients
        )
        return jnp.sum(i * residual * residual, axis=-1)

    def best_for(end: jax.Array) -> jax.Array:
        """The best scale among those that map the group's peak towards the given outermost level."""

        def try_ratio(best, ratio):
            level = decode(round_to_level(w, (peak / end * ratio)[..., None], coefficients), coefficients)
            norm, cross = jnp.sum(i * level * level, axis=-1), jnp.sum(i * w * level, axis=-1)
            refit = cross / jnp.where(norm == 0, 1.0, norm)
            # Σ i (w - s l)² without its constant Σ i w², at the least-squares s.
            error = -cross * refit
            better = error < best[1]
            return (jnp.where(better, refit, best[0]), jnp.where(better, error, best[1])), None

        start = (peak / end, jnp.full(peak.shape, jnp.inf, jnp.float32))
        (scale, _), _ = jax.lax.scan(try_ratio, start, jnp.asarray(CLIP_CANDIDATES, jnp.float32))
        return scale

    by_sign = (best_for(ends[0]), best_for(ends[1]))
    errors = (error_of(by_sign[0]), error_of(by_sign[1]))
    free = jnp.where(errors[0] <= errors[1], by_sign[0], by_sign[1])
    per_super = SUPER_GROUP // group
    blocks = pad_axis(free, 1, per_super).reshape(n, -1, per_super)
    largest_at = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
    largest = jnp.take_along_axis(blocks, largest_at, axis=-1)[..., 0]
    super_scales = jnp.clip(largest / -32, -F16_MAX, F16_MAX).astype(jnp.float16)
    step = expand_groups(super_scales.astype(jnp.float32), per_super, free.shape[1])

    def try_integer(best, candidate):
        sign, offset = candidate
        wanted = jnp.where(sign == 0, by_sign[0], by_sign[1]) / jnp.where(step == 0, 1.0, step)
        integer = jnp.clip(jnp.round(wanted) + offset, -32, 31)
        error = error_of(integer * step)
        better = error < best[1]
        return (jnp.where(better, integer, best[0]), jnp.where(better, error, best[1])), None

    start = (jnp.zeros_like(free), jnp.full(free.shape, jnp.inf, jnp.float32))
    candidates = (jnp.array([0, 0, 0, 1, 1, 1]), jnp.array([0.0, -1.0, 1.0, 0.0, -1.0, 1.0]))
    (integers, _), _ = jax.lax.scan(try_integer, start, candidates)
    return integers.astype(jnp.int8), super_scales
