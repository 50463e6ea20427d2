import numpy as np
import pytest

from benchmarks.quality.mixes import MIXES, tensor_type
from svsk_jax.model.parameters import QUANTIZED_LINEARS

SIZES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_XS": 136}
"""Bytes of a block of 256."""


def layers_with(kind, mix, linear, layers, importance=True, gqa=3):
    types = [tensor_type(mix, linear, i, layers, importance=importance, gqa=gqa) for i in range(layers)]
    return [i for i, found in enumerate(types) if found == kind]


@pytest.mark.parametrize("linear", ["attention.v", "mlp.down"])
def test_q4_k_m_raises_the_first_and_last_eighth_and_every_third_between(linear):
    chosen = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert layers_with("Q6_K", "Q4_K_M", linear, 30) == chosen
    assert len(layers_with("Q4_K", "Q4_K_M", linear, 30)) == 16


def test_q4_k_s_raises_four_layers_of_attn_v_and_an_eighth_of_ffn_down():
    assert layers_with("Q5_K", "Q4_K_S", "attention.v", 30) == [0, 1, 2, 3]
    assert layers_with("Q5_K", "Q4_K_S", "mlp.down", 30) == [0, 1, 2]


def test_iq4_xs_depends_on_shared_heads_and_the_importance_matrix():
    assert layers_with("Q5_K", "IQ4_XS", "attention.v", 24, gqa=3) == []
    assert layers_with("Q5_K", "IQ4_XS", "attention.v", 24, gqa=4) == list(range(24))
    assert layers_with("Q5_K", "IQ4_XS", "mlp.down", 24, importance=True) == []
    assert layers_with("Q5_K", "IQ4_XS", "mlp.down", 24, importance=False) == [0, 1, 2]


@pytest.mark.parametrize("mix", MIXES)
def test_other_linears_get_the_default(mix):
    default = "IQ4_XS" if mix == "IQ4_XS" else "Q4_K"
    for linear in set(QUANTIZED_LINEARS) - {"attention.v", "mlp.down"}:
        assert len(layers_with(default, mix, linear, 30, importance=False, gqa=8)) == 30


@pytest.mark.parametrize(("mix", "bits"), [("Q4_K_M", 4.77), ("Q4_K_S", 4.53), ("IQ4_XS", 4.25)])
def test_bits_of_smollm2_without_padding(mix, bits):
    shapes = dict(
        zip(
            QUANTIZED_LINEARS,
            [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)],
            strict=True,
        )
    )
    weights = {name: np.prod(shape) for name, shape in shapes.items()}
    stored = sum(
        SIZES[tensor_type(mix, name, layer, 30, importance=True, gqa=3)] / 256 * count
        for layer in range(30)
        for name, count in weights.items()
    )
    assert round(8 * stored / (30 * sum(weights.values())), 2) == bits


@pytest.mark.parametrize(
    ("mix", "linear", "layer"), [("Q4", "mlp.up", 0), ("Q4_K_M", "up", 0), ("IQ4_XS", "mlp.up", 30)]
)
def test_mistakes_are_told(mix, linear, layer):
    with pytest.raises(ValueError, match=r"unknown|no layer"):
        tensor_type(mix, linear, layer, 30, importance=True, gqa=1)
