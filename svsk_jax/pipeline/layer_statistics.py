"""What is known of the linears of a layer, read from its statistics one input after the other."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from svsk_jax.calibration.store import Statistics
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import linear_inputs
from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.parallel.read_ahead import ReadAhead
from svsk_jax.pipeline.working_sets import AHEAD
from svsk_jax.quant.half_moment import StoredMoment, whole_moment
from svsk_jax.quant.joint import input_metric, output_metric, plain_output_metric
from svsk_jax.quant.row_parts import InputMetric, OutputMetric
from svsk_jax.quant.types import InputMoment, OutputSensitivity, QuantConfig

Metrics = tuple[InputMetric, OutputMetric]


class OfInput(NamedTuple):
    """What was measured of an input and of the linears that read it."""

    moment: StoredMoment
    weighted: StoredMoment | None
    sensitivities: dict[str, OutputSensitivity]


StatisticsAhead = ReadAhead[tuple[int, str], OfInput]


class LinearStatistics(NamedTuple):
    """What is known of a linear of a layer."""

    name: str
    """Path within the layer."""
    moment: InputMoment
    """Of its input."""
    metrics: Metrics | None
    """What an error costs at its input and at its output; None where the recipe has no use for it."""


def statistics_ahead(
    statistics: Statistics, model: ModelConfig, config: QuantConfig, groups: DeviceGroups
) -> StatisticsAhead:
    """What was measured of each input of this process's layers, by layer and input, on the host. The next
    inputs' files are read meanwhile, over the end of a layer; where several groups of devices are at work at
    once, a layer each, theirs by turns.

    Args:
        statistics: of the model.
        model: its configuration.
        config: the recipe.
        groups: that take the layers.
    """
    several = groups.at_once

    @functools.lru_cache(maxsize=2 * several)
    def files(index: int) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
        felt, weighted = statistics.sensitivities(index) if config.needs_sensitivity else ({}, {})
        return statistics.layer(index), weighted, felt

    def read(item: tuple[int, str]) -> OfInput:
        index, source = item
        moments, weighted, felt = files(index)
        names = [name for name in _sharing(linear_inputs(model, index))[source] if name in felt]
        return OfInput(moments[source], weighted.get(source), {name: felt[name] for name in names})

    own = groups.own(model.num_layers)
    items = []
    for start in range(0, len(own), several):
        sources = [[(i, each) for each in _sharing(linear_inputs(model, i))] for i in own[start:][:several]]
        items += [item for turn in itertools.zip_longest(*sources) for item in turn if item is not None]
    return ReadAhead(read, items, AHEAD * several, AHEAD * several)


def layer_statistics(
    ahead: StatisticsAhead,
    index: int,
    weights: Mapping[str, Any],
    reads: Mapping[str, str],
    config: QuantConfig,
) -> Iterator[LinearStatistics]:
    """What is known of each linear of a layer, one after the other. An input's metric lives as long as the
    linears that share it: a layer may have hundreds.

    Args:
        ahead: of the model and the recipe, from `statistics_ahead`.
        index: of the layer.
        weights: of the layer, by path within it.
        reads: from `parameters.linear_inputs`.
        config: the recipe.
    """
    strong = config.scales == "two_level"
    for source, names in _sharing(reads).items():
        moment, by_token, felt = ahead.take((index, source))
        moment, felt = jax.device_put((whole_moment(moment), felt))
        # The weighted moment stays on the host, a half, until it is mixed in: it would be one [K, K] more.
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


def _sharing(reads: Mapping[str, str]) -> dict[str, list[str]]:
    """The linears that share each input."""
    sharing: dict[str, list[str]] = {}
    for name, source in reads.items():
        sharing.setdefault(source, []).append(name)
    return sharing
