"""AA-NativeQ4: 4-bit codes with group scales, clipped where activation statistics say that it costs least."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.svsk_matmul.layout import pad_axis

CLIP_CANDIDATES = np.linspace(0.5, 1.15, 27)
"""Tried multiples of the scale that maps a group's largest magnitude to the end of the code range."""


def round_to_codes(w: Float[Array, "*b g"], scale: Float[Array, "*b"]) -> Int[Array, "*b g"]:
    """Nearest signed code in -8..7 of w / scale; zero where the scale is zero."""
    safe = jnp.where(scale == 0, 1.0, scale)[..., None]
    codes = jnp.clip(jnp.round(w / safe), -8, 7)
    return jnp.where(scale[..., None] == 0, 0, codes).astype(jnp.int8)


def _store(scale: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The scale as f16 will hold it, in f32."""
    return jnp.clip(scale, -65504.0, 65504.0).astype(jnp.float16).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="group")
def search_scales(
    W: Float[Array, "n k"], h: Float[Array, "k"], group: int
) -> tuple[Int[Array, "n k"], Float[Array, "n g"]]:
    """Codes and f16 scales of the linear codebook that minimise Σₖ hₖ (wₖ - s·cₖ)² group by group.

    For each candidate scale (a clip ratio and a sign, since codes reach -8 but only 7): round, refit the
    scale to those codes by weighted least squares, s = Σ h w c / Σ h c²,
    round it to f16, round the weights again, and keep the candidate with the least error. All arithmetic in
    f32.

    Args:
        W: weights [N, K], f32.
        h: mean square of each input, E[x²], [K]. A group whose inputs are all zero is fitted unweighted.
        group: columns that share a scale; the last group may be ragged.

    Returns:
        Signed codes int8 [N, K] in -8..7 and scales f16 [N, ⌈K / group⌉].
    """
    n, k = W.shape
    w = pad_axis(W, 1, group).reshape(n, -1, group)
    h = pad_axis(h[None], 1, group).reshape(1, -1, group)
    h = jnp.where(jnp.sum(h, axis=-1, keepdims=True) > 0, h, 1.0)
    # Error is compared within a group only, so each group's weights may be scaled to a mean of 1, which
    # keeps tiny statistics from underflowing.
    h = h / jnp.mean(h, axis=-1, keepdims=True)
    peak_at = jnp.argmax(jnp.abs(w), axis=-1, keepdims=True)
    end_to_end = jnp.take_along_axis(w, peak_at, axis=-1)[..., 0] / -8

    def try_candidate(best, ratio):
        best_scale, best_error = best
        codes = round_to_codes(w, end_to_end * ratio).astype(jnp.float32)
        norm = jnp.sum(h * codes * codes, axis=-1)
        refit = jnp.sum(h * w * codes, axis=-1) / jnp.where(norm == 0, 1.0, norm)
        scale = _store(refit)
        residual = w - scale[..., None] * round_to_codes(w, scale).astype(jnp.float32)
        error = jnp.sum(h * residual * residual, axis=-1)
        better = error < best_error
        return (jnp.where(better, scale, best_scale), jnp.where(better, error, best_error)), None

    ratios = jnp.asarray(np.concatenate([CLIP_CANDIDATES, -CLIP_CANDIDATES]), jnp.float32)
    start = (_store(end_to_end), jnp.full(end_to_end.shape, jnp.inf, jnp.float32))
    (scale, _), _ = jax.lax.scan(try_candidate, start, ratios)
    codes = round_to_codes(w, scale).reshape(n, -1)[:, :k]
    return codes, scale.astype(jnp.float16)
