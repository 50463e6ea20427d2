"""Linears by the strong recipe: each over several devices, by its rows, and several on a device each."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.clock import median_seconds
from benchmarks.scale.sizes import RANK, at_once, config_of, counts, machine
from pallas_kernels.svsk_matmul.devices import target_device
from svsk_jax.model.parameters import layer_shapes
from svsk_jax.parallel import make_mesh
from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.quant.joint import input_metric, plain_output_metric, quantize_joint
from svsk_jax.quant.row_parts import Devices, InputMetric, OutputMetric
from svsk_jax.quant.types import InputMoment, QuantConfig, SVSKWeight, TensorPlan, TileShape, recipe
from svsk_jax.storage import arrays

LINEARS = ("attention.q", "mlp.gate")
REPEATS = 3
LAYERS = 8
"""That devices take as `svsk quantize` gives them out, here of one linear each."""


class Linear(NamedTuple):
    """A linear and what it is quantized by."""

    W: jax.Array
    inputs: InputMetric
    outputs: OutputMetric


def quantization(tiny: bool, report: Callable[..., None]) -> None:
    report(**machine())
    config = recipe("svsk-r16")
    if tiny:
        config = dataclasses.replace(config, beam_width=1)
    shapes = {name: layer_shapes(config_of(tiny), 0)[f"{name}.weight"] for name in LINEARS}
    linears = {name: random_linear(shape, config) for name, shape in shapes.items()}
    by_rows = {
        (name, devices): partial(quantized, linear, config, jax.devices()[:devices])
        for (name, linear), devices in itertools.product(linears.items(), counts(tiny))
    }
    # Each number of devices has programs of its own, and each device compiles them for itself.
    threads = 1 if tiny else None
    weights = dict(zip(by_rows, at_once(list(by_rows.values()), threads), strict=True))
    digests = {case: arrays.sha256(weight) for case, weight in weights.items()}
    places = {device: jax.device_put(linears[LINEARS[0]], device) for device in jax.devices()}
    jax.block_until_ready(at_once([partial(quantized, each, config) for each in places.values()], threads))
    report(compiled=True)
    alone: dict[str, float] = {}
    for (name, devices), quantize in by_rows.items():
        seconds = median_seconds(quantize, REPEATS, 1)
        report(
            linear=name,
            shape=shapes[name],
            devices=devices,
            seconds=seconds,
            efficiency=alone.setdefault(name, seconds) / seconds / devices,
            bytes_equal=digests[name, devices] == digests[name, 1],
        )
    for devices in counts(tiny):
        groups = DeviceGroups.of(make_mesh(devices, 1, jax.devices()[:devices]))
        seconds = median_seconds(partial(over_layers, groups, places, config), REPEATS, 1)
        share = alone.setdefault("layers", seconds) / seconds / devices
        report(linear=LINEARS[0], layers=LAYERS, devices=devices, seconds=seconds, efficiency=share)


def random_linear(shape: tuple[int, ...], config: QuantConfig) -> Linear:
    n, k = shape
    x = jax.random.normal(jax.random.key(0), (2 * k, k)) * jnp.linspace(0.2, 2, k)
    moment = InputMoment(total=x.T @ x, tokens=jnp.int32(2 * k))
    W = jax.random.normal(jax.random.key(1), (n, k)) / jnp.float32(k**0.5)
    inputs = input_metric(moment, None, config)
    return Linear(W, inputs, plain_output_metric(W, inputs.H))


def quantized(linear: Linear, config: QuantConfig, devices: Devices = ()) -> SVSKWeight:
    n, k = linear.W.shape
    ranks = ((min(RANK, k),),) * -(-n // 512)
    plan = TensorPlan(group=16, coefficients=(0.008, 0.3), tile=TileShape(rows=512, columns=0), ranks=ranks)
    return quantize_joint(*linear, plan, config, devices).weight


def over_layers(groups: DeviceGroups, places: dict[Any, Linear], config: QuantConfig) -> list[SVSKWeight]:
    """So many linears, a device each; where they lie on devices, nothing is read or written."""

    def task(_: int, __: Devices) -> SVSKWeight:
        return jax.block_until_ready(quantized(places[target_device()], config))

    return list(groups.each(range(LAYERS), task))
