"""A decode step of few kernels: products that end in the norm, attention or gate which follows them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step import (
    HEAD_DIMS,
    MOST_QUERIES,
    Boxes,
    Product,
    attend,
    finish_gated,
    finish_residual,
    product,
    why_no_exchange,
)
from pallas_kernels.svsk_matmul import TritonInt8Weight, TritonWeight, triton_int8, why_no_triton
from pallas_kernels.svsk_matmul.tuning import batch_of
from svsk_jax.model.decoder import MLP, Decoder, DecoderLayer
from svsk_jax.model.linear import Linear, join_over, sum_over

LARGEST_BATCH = 64
"""Sequences that a step takes."""
SMALL_SUM = 1 << 18
"""Bytes of a product's parts up to which XLA sums them over devices as they are. Adding up its own first is
one more launch for each device."""
MOST_ROWS_EXCHANGED = 16
"""Sequences up to which devices add up through `Boxes`."""


def why_not_fused(model: Decoder, *, interpret: bool = False) -> str | None:
    """Why `fused_step` can't run this model here, or None if it can."""
    if model.config.mixture is not None:
        return "its layers are mixtures of experts"
    if model.config.head_dim not in HEAD_DIMS:
        return f"heads have {model.config.head_dim} columns; known are {HEAD_DIMS}"
    if model.config.num_heads > MOST_QUERIES * model.config.num_kv_heads:
        return f"more than {MOST_QUERIES} heads share a key head"
    if not interpret and (reason := why_no_triton(model.dtype)) is not None:
        return reason
    for layer in model.layers:
        for name, linear in _linears(layer).items():
            if linear is None or not isinstance(linear.weight.get_value(), TritonWeight):
                return f"{name} is not laid out for the kernels as one"
    if not isinstance(_head(model), TritonInt8Weight):
        return "the head is not int8"
    return None


def batch_bucket(sequences: int) -> int:
    """The batch that a step for some sequences has: 1, 8, 16, 32 or 64.

    Raises:
        ValueError: more than that.
    """
    if not 1 <= sequences <= LARGEST_BATCH:
        raise ValueError(f"a decode step takes 1 to {LARGEST_BATCH} sequences, got {sequences}")
    return batch_of(sequences)


def fused_step(
    model: Decoder,
    tokens: Int[Array, "b"],
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    lengths: Int[Array, "b"],
    *,
    boxes: Boxes | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b v"], tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """f32 logits after one more token of each sequence, and the caches with it.

    The residual stream is f32, and x of a product is rounded to f16, not to the model's dtype.

    Args:
        model: one that `why_not_fused` says nothing against; with an axis, one device's share, under
            `jax.shard_map`.
        tokens: int32; their number is one of `batch_bucket`.
        keys, values: of each layer, [b, capacity, KV heads, head_dim]; donate them, to be written in place.
        lengths: int32, filled positions of each sequence, below the capacity.
        boxes: of this device, for the turns that `exchanges` counts; None, or none counted: XLA adds up.
        interpret: run the kernels in interpret mode.
    """
    config, m, d = model.config, tokens.shape[0], model.config.hidden_size
    norm: dict[str, Any] = {"columns": d, "eps": config.rms_norm_eps, "interpret": interpret}
    angles = lengths.astype(jnp.float32)[:, None] * jnp.asarray(config.inverse_frequencies)
    turns = jnp.cos(angles), jnp.sin(angles)
    layers = [_Layer(layer) for layer in model.layers]
    head = _head(model)
    x = model.embedding(tokens, model.dtype)
    boxes = boxes if exchanges(model, m) else None
    axis = None if boxes is not None else model.axis
    pending = None
    arrivals = jnp.zeros((m, config.num_kv_heads), jnp.int32)
    new_keys, new_values = [], []
    for layer, layer_keys, layer_values in zip(layers, keys, values, strict=True):
        stream, boxes = finish_residual(x, pending, layer.input_norm, boxes=boxes, interpret=interpret)
        qkv = product(stream.scaled, layer.qkv, layer.qkv_bias, interpret=interpret)
        mixed, layer_keys, layer_values, arrivals = attend(
            qkv,
            stream.squares,
            layer.head_norms,
            turns,
            lengths,
            layer_keys,
            layer_values,
            arrivals,
            window=config.sliding_window,
            **norm,
        )
        o = _over_devices(product(mixed, layer.o, layer.o_bias, interpret=interpret), axis)
        stream, boxes = finish_residual(stream.x, o, layer.mlp_norm, boxes=boxes, interpret=interpret)
        gate_up = product(stream.scaled, layer.gate_up, layer.gate_up_bias, interpret=interpret)
        hidden = finish_gated(gate_up, stream.squares, **norm)
        pending = _over_devices(product(hidden, layer.down, layer.down_bias, interpret=interpret), axis)
        x = stream.x
        new_keys.append(layer_keys)
        new_values.append(layer_values)
    rows = max(8, m)
    scale = model.final_norm.scale.get_value()
    stream, _ = finish_residual(x, pending, scale, rows=rows, boxes=boxes, interpret=interpret)
    logits = triton_int8.matmul(stream.scaled, head, jnp.float32, batch=batch_of(rows), interpret=interpret)
    rms = jnp.sqrt(jnp.sum(stream.squares, axis=-1, keepdims=True) / d + config.rms_norm_eps)
    logits = join_over(logits[:m, : head.shape[0]], model.axis, config.vocab_size)
    return logits / rms, tuple(new_keys), tuple(new_values)


def exchanges(model: Decoder, sequences: int) -> int:
    """How many turns of `Boxes` a step for some sequences takes, of one device's share of a model."""
    config = model.config
    fits = sequences <= MOST_ROWS_EXCHANGED and why_no_exchange(sequences, config.hidden_size) is None
    return 2 * config.num_layers if model.axis is not None and fits else 0


def _over_devices(found: Product, axis: str | None) -> Product:
    """A product of columns that are divided over an axis, if there is one, with parts that XLA has summed.

    Devices hold the same U and scales of the sidecar, which the next kernel applies: what is summed holds the
    rows of V x as well. A few parts of one token are left to the next kernel too.
    """
    if axis is None:
        return found
    parts = found.parts
    if parts.nbytes > SMALL_SUM:
        parts = jnp.sum(parts, axis=0, keepdims=True)
    return dataclasses.replace(found, parts=sum_over(parts, axis))


class _Layer:
    """What the step reads of a layer."""

    def __init__(self, layer: DecoderLayer):
        linears = _linears(layer)
        self.qkv, self.qkv_bias = _weight(linears["attention.qkv"])
        self.o, self.o_bias = _weight(linears["attention.o"])
        self.gate_up, self.gate_up_bias = _weight(linears["mlp.gate_up"])
        self.down, self.down_bias = _weight(linears["mlp.down"])
        self.input_norm, self.mlp_norm = (
            norm.scale.get_value() for norm in (layer.input_norm, layer.mlp_norm)
        )
        q_norm, k_norm = layer.attention.q_norm, layer.attention.k_norm
        self.head_norms = (
            None if q_norm is None or k_norm is None else (q_norm.scale.get_value(), k_norm.scale.get_value())
        )


def _linears(layer: DecoderLayer) -> dict[str, Linear | None]:
    assert isinstance(layer.mlp, MLP)
    return {
        "attention.qkv": layer.attention.qkv,
        "attention.o": layer.attention.o,
        "mlp.gate_up": layer.mlp.gate_up,
        "mlp.down": layer.mlp.down,
    }


def _weight(linear: Linear | None) -> tuple[TritonWeight, jax.Array | None]:
    assert linear is not None
    weight = linear.weight.get_value()
    assert isinstance(weight, TritonWeight)
    return weight, None if linear.bias is None else linear.bias.get_value()


def _head(model: Decoder) -> Any:
    return (model.embedding if model.head is None else model.head).weight.get_value()
