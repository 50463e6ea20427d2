"""Linears by the strong recipe, their rows over devices."""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.scale.sizes import RANK, config_of, counts, machine
from svsk_jax.model.parameters import layer_shapes
from svsk_jax.quant.joint import Quantized, input_metric, plain_output_metric, quantize_joint
from svsk_jax.quant.types import InputMoment, SVSKWeight, TensorPlan, TileShape, recipe

LINEARS = ("attention.q", "mlp.gate")


def quantization(tiny: bool, report: Callable[..., None]) -> None:
    report(**machine())
    config = recipe("svsk-r16")
    if tiny:
        config = dataclasses.replace(config, beam_width=1)
    shapes = layer_shapes(config_of(tiny), 0)
    for name in LINEARS:
        n, k = shapes[f"{name}.weight"]
        x = jax.random.normal(jax.random.key(0), (2 * k, k)) * jnp.linspace(0.2, 2, k)
        moment = InputMoment(total=x.T @ x, tokens=jnp.int32(2 * k))
        W = jax.random.normal(jax.random.key(1), (n, k)) / jnp.float32(k**0.5)
        inputs = input_metric(moment, None, config)
        outputs = plain_output_metric(W, inputs.H)
        ranks = ((min(RANK, k),),) * -(-n // 512)
        plan = TensorPlan(
            group=16, coefficients=(0.008, 0.3), tile=TileShape(rows=512, columns=0), ranks=ranks
        )
        alone: tuple[float, str] | None = None
        for devices in counts(tiny):
            quantize = partial(quantize_joint, W, inputs, outputs, plan, config, jax.devices()[:devices])
            _, compiled = timed(quantize)
            weight, seconds = timed(quantize)
            digest = digest_of(weight)
            alone = (seconds, digest) if alone is None else alone
            report(
                linear=name,
                shape=[n, k],
                devices=devices,
                seconds=seconds,
                seconds_with_compiling=compiled,
                efficiency=alone[0] / seconds / devices,
                bytes_equal=digest == alone[1],
            )


def timed(quantize: Callable[[], Quantized]) -> tuple[SVSKWeight, float]:
    start = time.perf_counter()
    weight = jax.block_until_ready(quantize().weight)
    return weight, time.perf_counter() - start


def digest_of(weight: SVSKWeight) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(weight):
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return digest.hexdigest()
