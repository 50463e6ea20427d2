"""Parameters of a model as the machine's products want them."""

from collections.abc import Callable, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.svsk_matmul import (
    Int8Weight,
    SVSKWeight,
    lay_out,
    lay_out_int8,
    transpose,
    transpose_int8,
    why_no_triton,
)
from svsk_jax.model.experts import is_stack, stack_experts
from svsk_jax.model.parameters import JOINED_LINEARS

_lay_out_stack = jax.jit(jax.vmap(lay_out))
_transpose_stack = jax.jit(jax.vmap(transpose))


def lay_out_for_device(parameters: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """The parameters as the one device that holds them wants them for activations of `dtype`: for the kernels
    where they run, for a CPU on one; as they are elsewhere and over several devices."""
    devices = {device for leaf in jax.tree.leaves(parameters) for device in leaf.sharding.device_set}
    if len(devices) != 1:
        return parameters
    [device] = devices
    with jax.default_device(device):
        if why_no_triton(dtype) is None:
            return lay_out_parameters(parameters)
        return transpose_parameters(parameters) if device.platform == "cpu" else parameters


def lay_out_parameters(parameters: MutableMapping[str, Any]) -> dict[str, Any]:
    """The parameters with their packed matrices laid out for the kernels, and those that read the same input
    joined (`JOINED_LINEARS`) where all are packed with the same kind of scales.

    Takes them out of `parameters` on the way, so that no more than one is held twice.
    """
    result = {}
    parameters = stack_experts(parameters)
    for joined, names in JOINED_LINEARS.items():
        for first in [path for path in parameters if path.endswith(f"{names[0]}.weight")]:
            prefix = first.removesuffix(f"{names[0]}.weight")
            weights = [parameters[f"{prefix}{name}.weight"] for name in names]
            if not all(isinstance(weight, SVSKWeight) for weight in weights):
                continue
            if len({weight.scale_kind for weight in weights}) > 1:
                continue
            join = _lay_out_stack if is_stack(first) else lay_out
            result[f"{prefix}{joined}.weight"] = join(weights)
            biases = [f"{prefix}{name}.bias" for name in names]
            if biases[0] in parameters:
                result[f"{prefix}{joined}.bias"] = jnp.concatenate([parameters.pop(bias) for bias in biases])
            for name in names:
                del parameters[f"{prefix}{name}.weight"]
    return result | _each(parameters, lay_out, _lay_out_stack, jax.jit(lay_out_int8))


def transpose_parameters(parameters: MutableMapping[str, Any]) -> dict[str, Any]:
    """The parameters with their packed matrices laid out for products on a CPU, taken out of `parameters` on
    the way."""
    return _each(stack_experts(parameters), transpose, _transpose_stack, jax.jit(transpose_int8))


def _each(
    parameters: MutableMapping[str, Any],
    packed: Callable[[SVSKWeight], Any],
    stack: Callable[[SVSKWeight], Any],
    int8: Callable[[Int8Weight], Any],
) -> dict[str, Any]:
    result = {}
    for path in list(parameters):
        value = parameters.pop(path)
        if isinstance(value, SVSKWeight):
            value = stack(value) if is_stack(path) else packed(value)
        elif isinstance(value, Int8Weight):
            value = int8(value)
        result[path] = value
    return result
