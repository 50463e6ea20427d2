"""What the benchmark of embedding and head in 4 bits compares."""

import dataclasses

import pytest
from support import SQUARE, MemorySource

from benchmarks.quality.embedding import markdown, rows
from svsk_jax.model.parameters import parameter_shapes, quantized_paths
from svsk_jax.quant.budget import predict


@pytest.mark.parametrize("tied", [True, False])
def test_what_4_bits_save_goes_to_the_linears(tied):
    source = MemorySource(dataclasses.replace(SQUARE, tie_word_embeddings=tied))
    found = rows(source, "svsk-r16")
    int8, q4, equal = (
        predict(parameter_shapes(source.config), quantized_paths(source.config), config)
        for config in found.values()
    )
    assert q4.total_bytes < int8.total_bytes
    assert q4.linear_bytes == int8.linear_bytes
    # Of both each linear's bytes are rounded down.
    assert abs(int8.total_bytes - equal.total_bytes) <= len(quantized_paths(source.config))


def test_a_line_for_each_row():
    kld = {"encyclopedia": 0.04, "documentation": 0.02, "code": 0.03}
    row = {
        "name": "svsk-r16, q4",
        "bits_linears": 4.6,
        "bits_file": 4.577,
        "bytes": 76_965_070,
        "kld": [kld, {family: value + 0.01 for family, value in kld.items()}],
        "mean_ratio": {"value": 1.388, "error": 0.005},
    }
    expected = "| svsk-r16, q4 | 4.600 | 4.577 | 77.0 | 0.0450 | 0.0250 | 0.0350 | 1.388 ± 0.005 |"
    assert markdown({"rows": [row]}).splitlines()[2:] == [expected]
