"""Rows of packed matrices by index: an embedding in 4 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import FORMS, random_weight

from pallas_kernels.svsk_matmul import dequantize, lay_out, take_rows, transpose

BARE = {name: form for name, form in FORMS.items() if not form.get("ranks")}


@pytest.mark.parametrize("form", BARE)
def test_rows_are_those_of_the_restored_matrix(form):
    weight = random_weight(np.random.default_rng(0), 200, 330, **BARE[form])
    rows = jnp.asarray([[3, 199, 64], [0, 3, 63]])
    expected = dequantize(weight)[rows]
    for stored in (weight, transpose(weight), lay_out(weight)):
        found = jax.jit(take_rows, static_argnames="dtype")(stored, rows, dtype=jnp.float32)
        assert found.shape == (2, 3, 330)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 * float(jnp.max(jnp.abs(expected))))
        assert take_rows(stored, rows[0], jnp.bfloat16).dtype == jnp.bfloat16


def test_no_sidecar():
    weight = random_weight(np.random.default_rng(0), 70, 300, ranks=3)
    for stored in (weight, transpose(weight), lay_out(weight)):
        with pytest.raises(ValueError, match="looked up by rows has no sidecar"):
            take_rows(stored, jnp.asarray([1]), jnp.float32)
