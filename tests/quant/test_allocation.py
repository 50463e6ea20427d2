"""Budgets are kept and spent where they help."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svsk_jax.quant.allocation import Option, allocate
from svsk_jax.quant.types import TileShape

SHAPE = (48, 64)
TILE = TileShape(rows=24, columns=0)


def option(rng, group=16, base_bytes=2000, scale=1.0):
    gains = scale * np.sort(rng.exponential(size=(2, 1, 12)))[..., ::-1]
    return Option(
        group=group,
        coefficients=(0.008, 0.3),
        tile=TILE,
        shape=SHAPE,
        base_bytes=base_bytes,
        nats=float(gains.sum() + rng.uniform(0, 5)),
        gains=gains,
    )


def model(seed, tensors=5):
    rng = np.random.default_rng(seed)
    return {f"t{index}": [option(rng, scale=10.0 ** rng.uniform(-2, 1))] for index in range(tensors)}


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(0, 12), extra=st.integers(0, 300))
def test_never_worse_than_equal_ranks_and_within_the_budget(seed, rank, extra):
    options = model(seed)
    equal = {name: np.full((2, 1), rank) for name in options}
    budget = sum(listed[0].bytes_with(equal[name]) for name, listed in options.items()) + extra
    found = allocate(options, budget)
    assert found.bytes <= budget
    assert found.nats <= sum(listed[0].nats_with(equal[name]) for name, listed in options.items()) + 1e-9


def test_more_bytes_never_cost_nats():
    options = model(3)
    nats = [allocate(options, 10_000 + 500 * step).nats for step in range(12)]
    assert (np.diff(nats) <= 1e-9).all()


def test_the_better_of_two_forms_is_chosen_by_price():
    rng = np.random.default_rng(1)
    fine = option(rng, group=16, base_bytes=2200)
    coarse = Option(**{**vars(fine), "group": 32, "base_bytes": 2000, "nats": fine.nats + 30})
    assert allocate({"t": [fine, coarse]}, 2100).plans["t"].group == 32
    assert allocate({"t": [fine, coarse]}, 2400).plans["t"].group == 16


def test_too_small_a_budget_says_what_is_needed():
    with pytest.raises(ValueError, match="9000 bytes is less than the 10000"):
        allocate(model(0), 9000)
