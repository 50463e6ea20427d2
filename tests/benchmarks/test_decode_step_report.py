"""What the decode step's benchmark says of a model's forms, of XLA's plan and of its cases."""

import jax
import pytest

from benchmarks.speed.decode_step import FORMS, launches_of_a_token, table
from pallas_kernels.svsk_matmul.synthetic import random_weight
from svsk_jax.quant.types import recipe

PLAN = """000: kCommandBuffer [source       | next=009 (1)]
    001: kCopy         [source | sink] kCopy
009: kWhile        [prev=000 (1) | sink        ]
condition:
    010: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer      [source       | next=036 (1)]
        011: kCustomKernel [source       | next=017 (6)] loop_broadcast_fusion grid: [1, 1, 1]
        012: kGemm         [prev=011 (1) | next=013 (1)] custom-call
        013: kCustomKernel [prev=012 (1) | next=017 (5)] svsk_decode__1 grid: [34, 8, 1]
    036: kDynamicSliceFusion [prev=000 (1) | sink        ] params=1, results=1
        037: kCopy [source | sink] kCopy
038: kCommandBuffer [prev=009 (1) | sink        ]
    039: kCopy         [source | sink] kCopy
"""


def test_launches_are_those_of_the_loop():
    assert launches_of_a_token(PLAN) == 4


@pytest.mark.parametrize("form", ["svsk-r16", "classic-r16"])
def test_forms_have_the_bits_of_their_recipes(form):
    n, k = 1024, 2048
    weight = jax.eval_shape(lambda key: random_weight(key, n, k, **FORMS[form]), jax.random.key(0))
    config = recipe(form)
    assert (weight.codebook, weight.scale_kind) == (config.codebook, config.scales)
    assert weight.group in config.groups
    if config.bits is not None:
        # Its ranks are whole numbers, equal in all tiles.
        assert weight.bits_per_weight == pytest.approx(config.bits, abs=0.03)
    else:
        assert weight.sidecar.tile == (config.tile.rows, config.tile.columns)
        assert {rank for row in weight.sidecar.ranks for rank in row} == {config.rank}


def test_a_row_of_the_table_has_every_form():
    case = {"model": "a", "batch": 1, "context": 1024, "limit": 0.5, "launches": 9}
    cases = [
        {**case, "form": "svsk-r16", "tokens_per_second": 300.0},
        {**case, "form": "bf16", "limit": None, "tokens_per_second": 200.0},
        {**case, "batch": 16, "form": "svsk-r16", "tokens_per_second": 3000.0},
    ]
    assert table({"cases": cases}).splitlines()[-2:] == [
        "| a | 1 | 1024 | 300 | 200 | 0.50 | 1.50 |",
        "| a | 16 | 1024 | 3,000 | – | 0.50 | – |",
    ]
