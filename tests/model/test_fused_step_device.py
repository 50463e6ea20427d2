"""The decode step of few kernels on a GPU, where a head's last program joins what the others left in memory:

JAX_PLATFORMS=cuda python -m pytest tests/model/test_fused_step_device.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fused_step import CONFIGS, as_of_many_texts, cache_behind, models, run

from pallas_kernels.svsk_matmul import why_no_triton
from svsk_jax.model.fused_step import fused_step

REASON = why_no_triton("bfloat16")
pytestmark = pytest.mark.skipif(
    REASON is not None, reason=f"NO STEP WAS RUN ON A GPU: {REASON}; set JAX_PLATFORMS=cuda on one"
)
step = jax.jit(fused_step)
CAPACITY = 2048
LENGTHS = [0, 1, 63, 64, 700, 1023, 1024, 1500]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_long_and_short_texts(name, batch):
    check(name, batch, step)


def test_small_programs_of_attention():
    with as_of_many_texts():
        check("one key head of 64", 8, jax.jit(lambda *arguments: fused_step(*arguments)))


def check(name, batch, step):
    exact, model = models(name)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 97, (batch, LENGTHS[-1] + 1)), jnp.int32)
    keys, values = cache_behind(tokens, exact, model, CAPACITY)
    item = jnp.arange(batch)
    logits = run(exact, tokens)
    for some in [LENGTHS] if batch > 1 else [[length] for length in LENGTHS]:
        lengths = jnp.asarray(some, jnp.int32)
        found = step(model, tokens[item, lengths], keys, values, lengths)
        expected = logits[item, lengths]
        error = jnp.linalg.norm(found[0] - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
        assert jnp.max(error) < 1e-2, some
        # Whichever program comes last: the same sums, in the same order.
        for _ in range(50):
            again = step(model, tokens[item, lengths], keys, values, lengths)
            assert all(map(jnp.array_equal, jax.tree.leaves(again), jax.tree.leaves(found))), some
