"""Linears by the strong recipe, their rows over devices."""

import dataclasses
import hashlib
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.scale.sizes import RANK, config_of, counts, machine
from svsk_jax.model.parameters import layer_shapes
from svsk_jax.quant.joint import input_metric, plain_output_metric, quantize_joint
from svsk_jax.quant.types import InputMoment, QuantConfig, SVSKWeight, TensorPlan, TileShape, recipe

LINEARS = ("attention.q", "mlp.gate")
REPEATS = 3


def quantization(tiny: bool, report: Callable[..., None]) -> None:
    report(**machine())
    config = recipe("svsk-r16")
    if tiny:
        config = dataclasses.replace(config, beam_width=1)
    shapes = {name: layer_shapes(config_of(tiny), 0)[f"{name}.weight"] for name in LINEARS}
    made = {name: work(shape, config) for name, shape in shapes.items()}
    cases = list(itertools.product(LINEARS, counts(tiny)))
    # Each number of devices has programs of its own, and each device compiles them for itself.
    with ThreadPoolExecutor(1 if tiny else len(cases)) as threads:
        digests = list(threads.map(lambda case: digest_of(made[case[0]](case[1])), cases))
    report(compiled=True)
    alone: dict[str, tuple[float, str]] = {}
    for (name, devices), digest in zip(cases, digests, strict=True):
        seconds = statistics.median(timed(partial(made[name], devices)) for _ in range(REPEATS))
        before, expected = alone.setdefault(name, (seconds, digest))
        report(
            linear=name,
            shape=shapes[name],
            devices=devices,
            seconds=seconds,
            efficiency=before / seconds / devices,
            bytes_equal=digest == expected,
        )


def work(shape: tuple[int, ...], config: QuantConfig) -> Callable[[int], SVSKWeight]:
    """What quantizes a random linear on some devices."""
    n, k = shape
    x = jax.random.normal(jax.random.key(0), (2 * k, k)) * jnp.linspace(0.2, 2, k)
    moment = InputMoment(total=x.T @ x, tokens=jnp.int32(2 * k))
    W = jax.random.normal(jax.random.key(1), (n, k)) / jnp.float32(k**0.5)
    inputs = input_metric(moment, None, config)
    outputs = plain_output_metric(W, inputs.H)
    ranks = ((min(RANK, k),),) * -(-n // 512)
    plan = TensorPlan(group=16, coefficients=(0.008, 0.3), tile=TileShape(rows=512, columns=0), ranks=ranks)

    def quantize(devices: int) -> SVSKWeight:
        return quantize_joint(W, inputs, outputs, plan, config, jax.devices()[:devices]).weight

    return quantize


def timed(quantize: Callable[[], SVSKWeight]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(quantize())
    return time.perf_counter() - start


def digest_of(weight: SVSKWeight) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(weight):
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return digest.hexdigest()
