"""What is known of the linears of a layer, read from its statistics one input after the other."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from svsk_jax.calibration.store import Statistics
from svsk_jax.parallel.read_ahead import ReadAhead
from svsk_jax.quant.joint import input_metric, output_metric, plain_output_metric
from svsk_jax.quant.row_parts import InputMetric, OutputMetric
from svsk_jax.quant.types import InputMoment, OutputSensitivity, QuantConfig

Metrics = tuple[InputMetric, OutputMetric]


class LinearStatistics(NamedTuple):
    """What is known of a linear of a layer."""

    name: str
    """Path within the layer."""
    moment: InputMoment
    """Of its input."""
    metrics: Metrics | None
    """What an error costs at its input and at its output; None where the recipe has no use for it."""


def layer_statistics(
    statistics: Statistics,
    index: int,
    weights: Mapping[str, Any],
    reads: Mapping[str, str],
    config: QuantConfig,
) -> Iterator[LinearStatistics]:
    """What is known of each linear of a layer, one after the other. The next input's files are read
    meanwhile; its metric lives as long as the linears that share it: a layer may have hundreds.

    Args:
        statistics: of the model.
        index: of the layer.
        weights: of the layer, by path within it.
        reads: from `parameters.linear_inputs`.
        config: the recipe.
    """
    moments = statistics.layer(index)
    sensitivities, weighted = statistics.sensitivities(index) if config.needs_sensitivity else ({}, {})
    sharing: dict[str, list[str]] = {}
    for name, source in reads.items():
        sharing.setdefault(source, []).append(name)

    def read(source: str) -> tuple[InputMoment, InputMoment | None, dict[str, OutputSensitivity]]:
        felt = {name: sensitivities[name] for name in sharing[source] if name in sensitivities}
        return moments[source], weighted.get(source), felt

    strong = config.scales == "two_level"
    with ReadAhead(read, list(sharing)) as ahead:
        for source, names in sharing.items():
            moment, by_token, felt = jax.tree.map(jnp.asarray, ahead.take(source))
            inputs = input_metric(moment, by_token, config) if strong else None
            del by_token
            for name in names:
                if inputs is None:
                    yield LinearStatistics(name, moment, None)
                    continue
                W = weights[f"{name}.weight"]
                if name in felt:
                    outputs = output_metric(felt[name], W.shape[0], config)
                else:
                    outputs = plain_output_metric(jnp.asarray(W, jnp.float32), inputs.H)
                yield LinearStatistics(name, moment, (inputs, outputs))
