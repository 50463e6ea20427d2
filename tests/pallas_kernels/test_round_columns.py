"""The kernel that rounds columns with error feedback, in interpret mode, against XLA's way."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.error_feedback import round_columns, why_no_kernel
from svsk_jax.quant.beam_search import _round_block

COMPANDED = (0.008, 0.3)
ROWS = 24


def problem(columns, beams, seed=0):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((columns, beams, ROWS), np.float32)
    scales = rng.uniform(0.1, 0.3, (columns, ROWS)).astype(np.float32)
    scales *= rng.choice([-1, 1], scales.shape)
    scales[1, :5] = 0
    x = rng.standard_normal((4 * columns, columns)) + rng.standard_normal((4 * columns, 1))
    U = np.linalg.cholesky(np.linalg.inv(x.T @ x / len(x))).T
    cost = np.sort(rng.uniform(0, 1, (beams, ROWS)), axis=0).astype(np.float32)
    cost[1:, :7] = np.inf
    coefficients = jnp.asarray(COMPANDED, jnp.float16).astype(jnp.float32)
    return (*map(jnp.float32, (W, scales, U)), coefficients, jnp.float32(cost))


@pytest.mark.parametrize(("columns", "beams"), [(16, 1), (16, 2), (8, 4)])
def test_what_it_rounds_is_what_xla_rounds(columns, beams):
    operands = problem(columns, beams)
    ours, theirs = round_columns(*operands, interpret=True), _round_block(*operands)
    # Beams that cost the same may come in any order.
    order, other = jnp.argsort(ours.cost, axis=0), jnp.argsort(theirs.cost, axis=0)
    np.testing.assert_allclose(
        jnp.take_along_axis(ours.cost, order, axis=0),
        jnp.take_along_axis(theirs.cost, other, axis=0),
        rtol=1e-4,
    )
    alive = np.isfinite(np.sort(theirs.cost, axis=0))
    for field in ("codes", "errors", "ancestors"):
        found, expected = (
            np.asarray(
                jnp.take_along_axis(getattr(each, field), at if field == "ancestors" else at[None], -2)
            )
            for each, at in ((ours, order), (theirs, other))
        )
        same = np.isclose(found, expected, rtol=1e-3, atol=1e-3) | ~alive
        assert np.mean(same) > 0.98, field


def test_costs_are_those_of_the_errors():
    W, scales, U, coefficients, cost = problem(16, 4)
    found = round_columns(W, scales, U, coefficients, cost, interpret=True)
    begun = jnp.take_along_axis(cost, found.ancestors, axis=0)
    np.testing.assert_allclose(found.cost, begun + jnp.sum(found.errors**2, axis=0), rtol=1e-5)
    assert found.codes.max() <= 15


def test_a_machine_without_a_gpu_and_other_beams_are_named():
    assert "GPU" in (why_no_kernel(4) or "")
    assert "3" in (why_no_kernel(3) or "")
