"""The low-rank fit is near the best one, in its own metric, after rounding to int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.svsk_matmul import reference
from svsk_jax.quant.sidecar import fit_diagonal, low_rank

# Operation by operation, each would be compiled on its own.
dequantize_sidecar = jax.jit(reference.dequantize_sidecar)
jit_low_rank = jax.jit(low_rank, static_argnames="rank")


def residual(rng, shape):
    """Noise with a decaying spectrum on top, as quantization leaves it."""
    n, k = shape
    core = rng.standard_normal((n, 12)) * 0.7 ** np.arange(12) @ rng.standard_normal((12, k))
    return (core + 0.5 * rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(("shape", "rank"), [((60, 90), 8), ((200, 50), 16)])
def test_low_rank_reaches_the_best_approximation(shape, rank):
    A = residual(np.random.default_rng(0), shape)
    U, V = jit_low_rank(jnp.asarray(A), rank=rank)
    singular = np.linalg.svd(A.astype(np.float64), compute_uv=False)
    best = (singular[rank:] ** 2).sum()
    found = ((A - np.asarray(U, np.float64) @ np.asarray(V, np.float64)) ** 2).sum()
    assert best * (1 - 1e-6) <= found <= best * 1.005


@pytest.mark.parametrize("tile", [(32, 40), (64, 128), (512, 1024), (48, 0)])
def test_fit_against_exact_svd_per_tile(tile):
    rng = np.random.default_rng(1)
    n, k, rank = 90, 100, 6
    E = residual(rng, (n, k))
    h = rng.gamma(0.5, size=k).astype(np.float32) + 1e-3
    S = np.asarray(dequantize_sidecar(fit_diagonal(jnp.asarray(E), jnp.asarray(h), tile, rank)), np.float64)
    D = np.sqrt(h.astype(np.float64))
    best = 0.0
    for row in range(0, n, tile[0]):
        for column in range(0, k, tile[1] or k):
            block = (E * D)[row : row + tile[0], column : column + (tile[1] or k)]
            best += (np.linalg.svd(block, compute_uv=False)[rank:] ** 2).sum()
    found = (((E - S) * D) ** 2).sum()
    assert found >= best * (1 - 1e-6)
    # int8 rounding of the factors costs a little on top.
    assert found <= best * 1.02


def test_more_rank_is_better_and_weighting_pays_in_its_metric():
    rng = np.random.default_rng(2)
    E = residual(rng, (64, 96))
    h = rng.gamma(0.3, size=96).astype(np.float32) + 1e-3

    def error(h_fit, rank):
        S = dequantize_sidecar(fit_diagonal(jnp.asarray(E), jnp.asarray(h_fit), (512, 1024), rank))
        return float((h * (E - np.asarray(S)) ** 2).sum())

    none = float((h * E**2).sum())
    assert error(h, 16) < error(h, 8) < error(h, 2) < none
    assert error(h, 8) < error(np.ones_like(h), 8)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3])
def test_any_magnitude(scale):
    E = scale * residual(np.random.default_rng(3), (40, 50))
    S = np.asarray(dequantize_sidecar(fit_diagonal(jnp.asarray(E), jnp.ones(50), (512, 1024), 4)))
    assert np.isfinite(S).all()
    if scale:
        assert ((E - S) ** 2).sum() < 0.8 * (E**2).sum()
    else:
        np.testing.assert_array_equal(S, 0)


def test_rank_beyond_the_tile_restores_everything():
    E = residual(np.random.default_rng(4), (5, 80))
    sidecar = fit_diagonal(jnp.asarray(E), jnp.ones(80), (512, 1024), 16)
    assert sidecar.ranks == ((16,),)
    np.testing.assert_allclose(dequantize_sidecar(sidecar), E, atol=0.02 * np.abs(E).max())


def test_dead_inputs_do_not_break_the_fit():
    E = residual(np.random.default_rng(5), (40, 50))
    h = np.ones(50, np.float32)
    h[:10] = 0
    S = np.asarray(dequantize_sidecar(fit_diagonal(jnp.asarray(E), jnp.asarray(h), (512, 1024), 8)))
    assert np.isfinite(S).all()
    assert (h * (E - S) ** 2).sum() < (h * E**2).sum()
