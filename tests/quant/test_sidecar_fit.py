"""The sidecar's fits are the minimisers that they claim to be, as stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.svsk_matmul import reference
from svsk_jax.quant.metric import nats
from svsk_jax.quant.sidecar import fit_diagonal
from svsk_jax.quant.sidecar_fit import TileFactors, cut, fit_tiles, rank_gains, to_sidecar

# Operation by operation, each would be compiled on its own.
dequantize_sidecar = jax.jit(reference.dequantize_sidecar)


def spd(rng, size, tokens=200):
    mix = rng.standard_normal((size, size)) * np.geomspace(3, 0.05, size)
    x = rng.standard_normal((tokens, size)) @ mix
    return jnp.asarray(x.T @ x / tokens, jnp.float32)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    E = jnp.asarray(rng.standard_normal((40, 48)), jnp.float32)
    return E, spd(rng, 48), jnp.stack([spd(rng, 20), spd(rng, 20)])


def identities(G):
    return jnp.broadcast_to(jnp.eye(G.shape[1]), G.shape)


def test_full_beats_diagonal_beats_none_in_the_inputs_metric(case):
    E, H, G = case
    plain = identities(G)
    _, full = fit_tiles(E, H, plain, [[4], [4]], 0)
    diagonal = dequantize_sidecar(fit_diagonal(E, jnp.diagonal(H), (20, 0), 4))
    assert nats(E - full, H, plain) < nats(E - diagonal, H, plain) < nats(E, H, plain)


def test_fisher_beats_full_in_the_fisher_metric(case):
    E, H, G = case
    ranks = [[4], [4]]
    _, fisher = fit_tiles(E, H, G, ranks, 0)
    _, full = fit_tiles(E, H, identities(G), ranks, 0)
    assert nats(E - fisher, H, G) < nats(E - full, H, G)
    assert nats(E - full, H, identities(G)) < nats(E - fisher, H, identities(G))


def test_coupled_tiles_beat_uncoupled_ones(case):
    E, H, G = case
    ranks = [[3] * 3] * 2
    _, coupled = fit_tiles(E, H, G, ranks, 20, coupled=True)
    _, alone = fit_tiles(E, H, G, ranks, 20, coupled=False)
    assert nats(E - coupled, H, G) < nats(E - alone, H, G)


@pytest.mark.parametrize("ranks", [((3, 0, 5), (0, 8, 1)), ((0, 0, 0), (0, 0, 2))])
def test_what_is_returned_is_what_is_stored(case, ranks):
    E, H, G = case
    factors, S = fit_tiles(E[:33], H, G, ranks, 20)
    sidecar = to_sidecar(cut(factors, ranks), (33, 48), (20, 20))
    assert sidecar.ranks == ranks
    np.testing.assert_allclose(dequantize_sidecar(sidecar), S, rtol=1e-5, atol=1e-6)


def test_gains_are_what_ranks_save(case):
    E, H, G = case
    gains = np.array(rank_gains(E, H, G, 0, 16))
    assert (np.diff(gains, axis=-1) <= 1e-6 * gains.max()).all()
    for rank in (2, 8):
        _, S = fit_tiles(E, H, G, [[rank], [rank]], 0)
        saved = nats(E, H, G) - nats(E - S, H, G)
        np.testing.assert_allclose(saved, gains[..., :rank].sum(), rtol=0.02)


def test_a_rank_as_large_as_the_tile_leaves_only_rounding(case):
    E, H, G = case
    _, S = fit_tiles(E, H, G, [[20], [20]], 0)
    assert nats(E - S, H, G) < 1e-3 * nats(E, H, G)


def test_storing_compiles_nothing():
    """Nearly every linear has lengths of its own."""
    compiled = []

    def listen(event: str, *_, **__) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 7.25)(np.ones(41, np.float32))
        assert compiled
        compiled.clear()
        for rank in (3, 5):
            tile = TileFactors(
                np.ones((37, rank), np.int8), np.ones((rank, 43), np.int8), np.ones(rank, np.float16)
            )
            sidecar = to_sidecar([[tile]], (37, 43), (37, 43))
            assert sidecar.u.shape == (37 * rank,)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
