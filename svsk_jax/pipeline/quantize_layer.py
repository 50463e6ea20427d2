"""Quantize the linears of one decoder layer."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from svsk_jax.model.linear import restore
from svsk_jax.pipeline.checks import check_weight
from svsk_jax.pipeline.layer_statistics import StatisticsAhead, layer_statistics
from svsk_jax.pipeline.plan import Plan
from svsk_jax.quant.error import layer_error
from svsk_jax.quant.half_moment import StoredMoment, whole_moment
from svsk_jax.quant.joint import quantize_joint
from svsk_jax.quant.linear import quantize_linear
from svsk_jax.quant.row_parts import Devices
from svsk_jax.storage.checkpoint import StoredLayer


def quantize_layer(
    parameters: Mapping[str, Any],
    ahead: StatisticsAhead,
    index: int,
    reads: Mapping[str, str],
    plan: Plan,
    devices: Devices = (),
) -> StoredLayer:
    """A layer as it is stored: its linears packed as the plan says, the rest f32.

    Args:
        parameters: of the layer, by path within it.
        ahead: statistics of the model, for the plan's recipe.
        index: of the layer.
        reads: its linears and what each reads, from `parameters.linear_inputs`.
        plan: how each is stored.
        devices: that the rows of each linear are divided over, where the recipe is a strong one.
    """
    linears = {f"{name}.weight" for name in reads}
    stored: dict[str, Any] = {
        path: jnp.asarray(value, jnp.float32) for path, value in parameters.items() if path not in linears
    }
    errors: dict[str, jax.Array] = {}
    predicted = 0.0
    for name, moment, metrics in layer_statistics(ahead, index, parameters, reads, plan.config):
        path = f"{name}.weight"
        dense = check_weight(jnp.asarray(parameters[path], jnp.float32), f"layers.{index}.{path}")
        if metrics is not None:
            of_tensor = plan.tensors[f"layers.{index}.{name}"]
            result = quantize_joint(dense, *metrics, of_tensor, plan.config, devices)
            stored[path], restored = result.weight, result.restored
            predicted += result.nats
        else:
            stored[path] = quantize_linear(dense, moment, plan.config)
            restored = restore(stored[path], dtype=jnp.float32)
        errors[name] = layer_error(dense, restored, moment)
    found = jax.device_get(errors)
    in_order = {name: float(found[name]) for name in errors}
    return StoredLayer(parameters=stored, errors=in_order, predicted_nats=predicted)


def layer_errors(
    parameters: Mapping[str, Any],
    stored: Mapping[str, Any],
    moments: Mapping[str, StoredMoment],
    reads: Mapping[str, str],
) -> dict[str, float]:
    """The layer error of each linear of a stored layer; `reads` as in `quantize_layer`."""
    errors = {}
    for read in dict.fromkeys(reads.values()):
        moment = whole_moment(moments[read])
        for name in (name for name, its in reads.items() if its == read):
            W = jnp.asarray(parameters[f"{name}.weight"], jnp.float32)
            restored = restore(stored[f"{name}.weight"], dtype=jnp.float32)
            errors[name] = float(layer_error(W, restored, moment))
    return {name: errors[name] for name in reads}
