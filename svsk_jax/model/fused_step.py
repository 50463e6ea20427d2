"""A decode step of few kernels: products that end in the norm, attention or gate which follows them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step import (
    HEAD_DIMS,
    LOST,
    MOST_QUERIES,
    Boxes,
    Product,
    Residual,
    attend,
    choose_experts,
    finish_gated,
    finish_residual,
    finish_weighed,
    likeliest_over,
    product,
    why_no_exchange,
)
from pallas_kernels.svsk_matmul import TritonInt8Weight, TritonWeight, triton_int8, why_no_triton
from pallas_kernels.svsk_matmul.triton_layout import SUPERBLOCK
from pallas_kernels.svsk_matmul.triton_prepare import RUN, Prepared
from pallas_kernels.svsk_matmul.tuning import batch_of
from svsk_jax.model.config import Mixture
from svsk_jax.model.decoder import MLP, Decoder, DecoderLayer
from svsk_jax.model.linear import Linear, join_over, sum_over
from svsk_jax.model.parameters import EXPERTS

LARGEST_BATCH = 64
"""Sequences that a step takes."""
SMALL_SUM = 1 << 18
"""Bytes of a product's parts up to which XLA sums them over devices as they are. Adding up its own first is
one more launch for each device."""
MOST_ROWS_EXCHANGED = 16
"""Sequences up to which devices add up through `Boxes`."""
Caches = tuple[jax.Array, ...]
"""Keys or values of each layer."""


def why_not_fused(model: Decoder, *, interpret: bool = False) -> str | None:
    """Why `fused_step` can't run this model here, or None if it can."""
    if model.config.mixture is not None and model.axis is not None:
        return "its layers are mixtures of experts, over several devices"
    if model.config.head_dim not in HEAD_DIMS:
        return f"heads have {model.config.head_dim} columns; known are {HEAD_DIMS}"
    if model.config.num_heads > MOST_QUERIES * model.config.num_kv_heads:
        return f"more than {MOST_QUERIES} heads share a key head"
    if not interpret and (reason := why_no_triton(model.dtype)) is not None:
        return reason
    for layer in model.layers:
        for name, weight in _weights(layer).items():
            if not isinstance(weight, TritonWeight):
                return f"{name} is not laid out for the kernels as one"
    head = _head(model)
    if not isinstance(head, TritonWeight | TritonInt8Weight):
        return "the head is not laid out for the kernels"
    if isinstance(head, TritonWeight) and head.v is not None:
        return "the head has a sidecar"
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
    keys: Caches,
    values: Caches,
    lengths: Int[Array, "b"],
    *,
    greedy: bool = False,
    boxes: Boxes | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b v"] | Int[Array, "b"], Caches, Caches]:
    """f32 logits after one more token of each sequence, or the likeliest tokens, and the caches with it.

    The residual stream is f32, and x of a product is rounded to f16, not to the model's dtype.

    Args:
        model: one that `why_not_fused` says nothing against; with an axis, one device's share, under
            `jax.shard_map`.
        tokens: int32; their number is one of `batch_bucket`.
        keys, values: of each layer, [b, capacity, KV heads, head_dim]; donate them, to be written in place.
        lengths: int32, filled positions of each sequence, below the capacity.
        greedy: tokens, int32, instead of logits: devices tell one another no more than their own best. `LOST`
            where a sum through boxes was lost, and behind such a token.
        boxes: of this device, for the turns that `exchanges` counts; None, or none counted: XLA adds up.
        interpret: run the kernels in interpret mode.
    """
    config, m, d = model.config, tokens.shape[0], model.config.hidden_size
    norm: dict[str, Any] = {"columns": d, "eps": config.rms_norm_eps, "interpret": interpret}
    angles = lengths.astype(jnp.float32)[:, None] * jnp.asarray(config.inverse_frequencies)
    turns = jnp.cos(angles), jnp.sin(angles)
    layers = [_Layer(layer) for layer in model.layers]
    head = _head(model)
    boxes = boxes if _exchange(model, m) else None
    axis = None if boxes is not None else model.axis
    embed = model.embedding if boxes is None else model.embedding.part
    x, pending = embed(tokens, model.dtype), None
    if boxes is not None:
        # So that all devices learn of a token that one has lost.
        x = jnp.where(tokens[:, None] == LOST, jnp.nan, x)
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
        run = RUN if layer.router is None else SUPERBLOCK
        stream, boxes = finish_residual(
            stream.x, o, layer.mlp_norm, run=run, boxes=boxes, interpret=interpret
        )
        if layer.router is None:
            gate_up = product(stream.scaled, layer.gate_up, layer.gate_up_bias, interpret=interpret)
            hidden = finish_gated(gate_up, stream.squares, **norm)
            pending = _over_devices(product(hidden, layer.down, layer.down_bias, interpret=interpret), axis)
        else:
            assert config.mixture is not None
            pending = _experts(stream, layer, config.mixture, **norm)
        x = stream.x
        new_keys.append(layer_keys)
        new_values.append(layer_values)
    rows = {"rows": max(8, m), "run": triton_int8.RUN} if isinstance(head, TritonInt8Weight) else {}
    scale = model.final_norm.scale.get_value()
    stream, boxes = finish_residual(x, pending, scale, **rows, boxes=boxes, interpret=interpret)
    rms = jnp.sqrt(jnp.sum(stream.squares, axis=-1, keepdims=True) / d + config.rms_norm_eps)
    own = _logits(stream.scaled, head, interpret=interpret)[:m, : head.shape[0]] / rms
    if greedy:
        found = likeliest_of(own, config.vocab_size, model.axis, boxes, interpret=interpret)
    else:
        found = join_over(own, model.axis, config.vocab_size)
    return found, tuple(new_keys), tuple(new_values)


def likeliest_of(
    logits: Float[Array, "b v"],
    vocabulary: int,
    axis: str | None,
    boxes: Boxes | None = None,
    *,
    interpret: bool = False,
) -> Int[Array, "b"]:
    """The likeliest tokens, int32, of the logits that the devices along an axis hold one after another.

    Args:
        logits: of this device's tokens; of the whole vocabulary without an axis.
        vocabulary: tokens; what the last devices hold behind them means nothing.
        axis: of a mesh, under `jax.shard_map`, or None.
        boxes: of this device; None: XLA gathers.
        interpret: run the kernel in interpret mode.
    """
    if axis is None:
        return jnp.argmax(logits, axis=1).astype(jnp.int32)
    rows = logits.shape[1]
    first = rows * jax.lax.axis_index(axis)
    logits = jnp.where(first + jnp.arange(rows) < vocabulary, logits, -jnp.inf)
    best, token = jnp.max(logits, axis=1), first + jnp.argmax(logits, axis=1).astype(jnp.int32)
    if boxes is not None:
        return likeliest_over(best, token, boxes, interpret=interpret)[0]
    every, place = (jax.lax.all_gather(each, axis) for each in (best, token))
    return jnp.take_along_axis(place, jnp.argmax(every, axis=0)[None], axis=0)[0]


def exchanges(model: Decoder, sequences: int, *, greedy: bool) -> int:
    """How many turns of `Boxes` a step for some sequences takes, of one device's share of a model."""
    return 2 * model.config.num_layers + 1 + greedy if _exchange(model, sequences) else 0


def _experts(
    stream: Residual, layer: "_Layer", mixture: Mixture, *, columns: int, eps: float, interpret: bool
) -> Product:
    """What a mixture adds to the residual stream, unfinished; each expert of a token is a row of products."""
    slots = mixture.num_experts_per_tok
    chosen, weights = choose_experts(
        stream,
        layer.mlp_norm,
        layer.router,
        slots=slots,
        normalized=mixture.norm_topk_prob,
        eps=eps,
        interpret=interpret,
    )
    gate_up = product(stream.scaled, layer.gate_up, chosen=chosen, interpret=interpret)
    hidden = finish_gated(gate_up, stream.squares, columns=columns, eps=eps, interpret=interpret)
    down = product(hidden, layer.down, chosen=chosen, interpret=interpret)
    return finish_weighed(down, weights, slots=slots, interpret=interpret)


def _exchange(model: Decoder, sequences: int) -> bool:
    """Whether devices that can add up through `Boxes` do, for some sequences."""
    fits = sequences <= MOST_ROWS_EXCHANGED and why_no_exchange(sequences, model.config.hidden_size) is None
    return model.axis is not None and fits


def _over_devices(found: Product, axis: str | None) -> Product:
    """A product of columns that are divided over an axis, if there is one, with parts that XLA has summed.

    Devices hold the same U, which the next kernel applies, and have multiplied V x by the same scales: what
    is summed holds these numbers as well. A few parts of one token are left to the next kernel too.
    """
    if axis is None:
        return found
    parts = found.parts
    if parts.nbytes > SMALL_SUM:
        parts = jnp.sum(parts, axis=0, keepdims=True)
    return dataclasses.replace(found, parts=sum_over(parts, axis))


def _logits(x: Prepared, head: TritonWeight | TritonInt8Weight, *, interpret: bool) -> Float[Array, "m v"]:
    """x Ŵᵀ, f32, for the head's padded rows."""
    if isinstance(head, TritonInt8Weight):
        batch = batch_of(x.unit.shape[0])
        return triton_int8.matmul(x, head, jnp.float32, batch=batch, interpret=interpret)
    return jnp.sum(product(x, head, interpret=interpret).parts, axis=0)


class _Layer:
    """What the step reads of a layer."""

    def __init__(self, layer: DecoderLayer):
        weights = _weights(layer)
        assert all(isinstance(weight, TritonWeight) for weight in weights.values())
        self.qkv, self.o, self.gate_up, self.down = weights.values()
        self.qkv_bias, self.o_bias = _bias(layer.attention.qkv), _bias(layer.attention.o)
        if isinstance(layer.mlp, MLP):
            self.router = None
            self.gate_up_bias, self.down_bias = _bias(layer.mlp.gate_up), _bias(layer.mlp.down)
        else:
            self.router = layer.mlp.router.get_value()
        self.input_norm, self.mlp_norm = (
            norm.scale.get_value() for norm in (layer.input_norm, layer.mlp_norm)
        )
        q_norm, k_norm = layer.attention.q_norm, layer.attention.k_norm
        self.head_norms = (
            None if q_norm is None or k_norm is None else (q_norm.scale.get_value(), k_norm.scale.get_value())
        )


def _weights(layer: DecoderLayer) -> dict[str, Any]:
    """What a layer multiplies by, as it is held; None for what it holds in parts."""
    attention, mlp = layer.attention, layer.mlp
    linears = {"attention.qkv": attention.qkv, "attention.o": attention.o}
    stacks = {}
    if isinstance(mlp, MLP):
        linears |= {"mlp.gate_up": mlp.gate_up, "mlp.down": mlp.down}
    else:
        stacks = {f"{EXPERTS}.gate_up": mlp.gate_up, f"{EXPERTS}.down": mlp.down}
    held = {name: None if linear is None else linear.weight for name, linear in linears.items()} | stacks
    return {name: None if weight is None else weight.get_value() for name, weight in held.items()}


def _bias(linear: Linear | None) -> jax.Array | None:
    return None if linear is None or linear.bias is None else linear.bias.get_value()


def _head(model: Decoder) -> Any:
    return (model.embedding if model.head is None else model.head).weight.get_value()
