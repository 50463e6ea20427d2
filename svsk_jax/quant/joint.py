"""Quantize one linear by the strong method: base by error feedback, sidecar fitted to what is left, and
again."""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.svsk_matmul.layout import SUPER_GROUP, expand_groups, pack_codes, pack_int6
from svsk_jax.quant.codebook import LINEAR, decode, round_to_level
from svsk_jax.quant.error_feedback import feedback, pad_square
from svsk_jax.quant.half_moment import StoredMoment
from svsk_jax.quant.metric import (
    band_blocks,
    bands,
    inverse_factor,
    mix_moments,
    nats,
    shrink_to_diagonal,
    shrink_to_identity,
)
from svsk_jax.quant.row_parts import (
    Devices,
    InputMetric,
    OutputMetric,
    RowPart,
    gathered,
    row_parts,
    total_nats,
)
from svsk_jax.quant.scale_search import imatrix_importance, search_two_level
from svsk_jax.quant.sidecar_fit import TileFactors, cut, fit_tiles, to_sidecar
from svsk_jax.quant.types import (
    SENSITIVITY_TILE,
    InputMoment,
    OutputSensitivity,
    QuantConfig,
    SVSKWeight,
    TensorPlan,
)

_pack_codes, _pack_int6 = jax.jit(pack_codes), jax.jit(pack_int6)


@jax.jit
def minus(A: Float[Array, "n k"], B: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """A - B, a program that can be compiled ahead."""
    return A - B


@jax.jit
def plus(A: Float[Array, "n k"], B: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """A + B, likewise."""
    return A + B


class Base(NamedTuple):
    """Codes 0..15, int6 group scales, f16 super-scales, and the f32 [N, K] matrix that they restore."""

    codes: UInt8[Array, "n k"]
    integers: Int[Array, "n g"]
    super_scales: Float[Array, "n s"]
    dense: Float[Array, "n k"]


def input_metric(moment: InputMoment, weighted: StoredMoment | None, config: QuantConfig) -> InputMetric:
    """H as the recipe mixes and shrinks it. Linears that read the same activation share it.

    Args:
        moment: full second moment of the activation.
        weighted: its moment weighted by token sensitivity; None leaves it out.
        config: the recipe.

    Beside the moment it takes four [K, K] at most, of which two are left.
    """
    H = moment.mean
    if weighted is not None and config.fisher_share > 0:
        H = _mixed(H, weighted.mean, config.fisher_share)
    return _input_metric(H, config.moment_shrinkage, config.damping)


_mixed = jax.jit(mix_moments, static_argnames="share", donate_argnames="plain")


@partial(jax.jit, donate_argnames="H")
def _input_metric(H: jax.Array, shrinkage: float | jax.Array, damping: float | jax.Array) -> InputMetric:
    H = shrink_to_diagonal(H, shrinkage)
    return InputMetric(H, *inverse_factor(H, damping))


def output_metric(sensitivity: OutputSensitivity, rows: int, config: QuantConfig) -> OutputMetric:
    """G as the recipe shrinks it, for a linear of `rows` outputs."""
    G, height = sensitivity.mean, sensitivity.blocks.shape[1]
    parts = []
    for band in bands(rows, height):
        blocks = shrink_to_identity(band_blocks(G, band), config.sensitivity_shrinkage)
        order = factor = None
        if config.feedback == "both":
            order, factor = _row_factors(blocks, config.damping)
        # Each of these would be a program of its own, a copy of what is whole already.
        if missing := height - band[2]:
            blocks = jnp.pad(blocks, ((0, 0), (0, missing), (0, missing)))
            if order is not None and factor is not None:
                tail = jnp.broadcast_to(jnp.arange(band[2], height), (len(order), missing))
                order, factor = jnp.concatenate([order, tail], axis=1), pad_square(factor, height)
        parts.append(OutputMetric(blocks, order, factor))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *each: jnp.concatenate(each), *parts)


@jax.jit
def _row_factors(G: jax.Array, damping: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    # lax.map, not vmap: on CPU, XLA's batched solvers can wait for one another for ever.
    return jax.lax.map(lambda block: inverse_factor(block, damping), G)


@jax.jit
def plain_output_metric(W: Float[Array, "n k"], H: Float[Array, "k k"]) -> OutputMetric:
    """G = 2 I / tr(W H Wᵀ), for want of sensitivities: nats become the layer error."""
    n = W.shape[0]
    height = min(SENSITIVITY_TILE, n)
    tiles = -(-n // height)
    energy = nats(W, H, jnp.broadcast_to(jnp.eye(height), (tiles, height, height)))
    eye = jnp.broadcast_to(jnp.eye(height), (tiles, height, height))
    G = eye / jnp.where(energy > 0, energy, 1.0)
    return OutputMetric(G, jnp.broadcast_to(jnp.arange(height), (tiles, height)), eye)


def quantize_base(
    W: Float[Array, "n k"],
    inputs: InputMetric,
    outputs: OutputMetric | None,
    coefficients: Float[Array, "2"],
    group: int,
    config: QuantConfig,
) -> Base:
    """Two-level scales, then codes, by error feedback where the recipe has it. f32 throughout. `outputs` are
    for feedback across rows alone."""
    integers, super_scales, scales = _search(W, inputs.H, coefficients, group, config.importance)
    if config.feedback == "none":
        codes = round_to_level(W, scales, coefficients).astype(jnp.uint8)
    else:
        rows = None
        if config.feedback == "both":
            if outputs is None or outputs.order is None or outputs.factor is None:
                raise ValueError("feedback across rows needs an output metric made for it")
            rows = (outputs.order, outputs.factor)
        columns = (inputs.order, inputs.factor)
        codes = feedback(W, scales, coefficients, columns, rows, beam_width=config.beam_width)
    return Base(codes, integers, super_scales, _restore(codes, scales, coefficients))


@partial(jax.jit, static_argnames=("group", "importance_kind"))
def _search(
    W: jax.Array, H: jax.Array, coefficients: jax.Array, group: int, importance_kind: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Integers, super-scales, and the scale of each weight."""
    h = jnp.diagonal(H)
    importance = (
        imatrix_importance(W, h, group) if importance_kind == "imatrix" else jnp.broadcast_to(h, W.shape)
    )
    integers, super_scales = search_two_level(W, importance, coefficients, group)
    steps = expand_groups(super_scales.astype(jnp.float32), SUPER_GROUP // group, integers.shape[1])
    return integers, super_scales, expand_groups(integers.astype(jnp.float32) * steps, group, W.shape[1])


@jax.jit
def _restore(codes: jax.Array, scales: jax.Array, coefficients: jax.Array) -> jax.Array:
    return scales * decode(codes, coefficients)


def fit_metric(outputs: OutputMetric, config: QuantConfig) -> Float[Array, "t m m"]:
    """The blocks of G in which the sidecar is fitted: identities unless the recipe's metric is fisher."""
    if config.metric == "fisher":
        return outputs.G
    return jnp.broadcast_to(jnp.eye(outputs.G.shape[1]), outputs.G.shape)


def tile_blocks(G: Float[Array, "t m m"], rows: int, n: int) -> Float[Array, "tiles rows rows"]:
    """The diagonal blocks of `rows` rows within those of G, for a matrix of n rows."""
    height = G.shape[1]
    if rows >= height:
        return G
    if height % rows and len(G) > 1:
        raise ValueError(f"sidecar tile: {rows} rows do not divide the sensitivity's blocks of {height}")
    padding = -height % rows
    G = jnp.pad(G, ((0, 0), (0, padding), (0, padding)))
    parts = [G[:, a : a + rows, a : a + rows] for a in range(0, height, rows)]
    return jnp.stack(parts, axis=1).reshape(-1, rows, rows)[: -(-n // rows)]


class Quantized(NamedTuple):
    """The stored form of a linear, the f32 matrix that it restores, and the nats that its base alone and all
    of it are predicted to cost."""

    weight: SVSKWeight
    restored: Float[Array, "n k"]
    base_nats: float
    nats: float


def _fit(
    part: RowPart, base: Base, plan: TensorPlan, config: QuantConfig
) -> tuple[list[list[TileFactors]], Float[Array, "n k"]]:
    """The sidecar's factors of a part's tiles, and what they restore."""
    G = tile_blocks(fit_metric(part.outputs, config), plan.tile.rows, len(part.W))
    ranks = plan.ranks[part.start // plan.tile.rows :]
    return fit_tiles(minus(part.W, base.dense), part.inputs.H, G, ranks, plan.tile.columns)


def quantize_joint(
    W: Float[Array, "n k"],
    inputs: InputMetric,
    outputs: OutputMetric,
    plan: TensorPlan,
    config: QuantConfig,
    devices: Devices = (),
) -> Quantized:
    """Q ← base(W); then S ← fit(W - Q), and for each joint round Q ← base(W - S), S ← fit(W - Q); the best
    (Q, S) in tr(G E H Eᵀ), as stored, is kept. Several beams are followed in the last round alone.

    A pure function: the same input gives the same bytes. Rows are divided over `devices` in whole tiles,
    which changes no byte but where XLA chooses other kernels for products of fewer rows, as it may on a GPU;
    the result lies on the first.
    """
    pair = LINEAR if plan.coefficients is None else plan.coefficients
    stored = jnp.asarray(pair, jnp.float16)
    coefficients = stored.astype(jnp.float32)
    rounds = config.joint_rounds if plan.has_sidecar else 0
    # Only what is kept need be rounded with all care.
    draft = dataclasses.replace(config, beam_width=1) if rounds else config
    parts = row_parts(W, inputs, outputs, (plan.tile.rows,), devices)
    bases = [quantize_base(p.W, p.inputs, p.outputs, coefficients, plan.group, draft) for p in parts]
    base_nats = total_nats(parts, [minus(p.W, base.dense) for p, base in zip(parts, bases, strict=True)])
    best = (base_nats, bases, None)
    if plan.has_sidecar:
        best = (math.inf, bases, None)
        for turn in range(1 + rounds):
            if turn:
                careful = config if turn == rounds else draft
                bases = [
                    quantize_base(minus(p.W, S), p.inputs, p.outputs, coefficients, plan.group, careful)
                    for p, (_, S) in zip(parts, fits, strict=True)
                ]
            fits = [_fit(p, base, plan, config) for p, base in zip(parts, bases, strict=True)]
            each = zip(parts, bases, fits, strict=True)
            cost = total_nats(parts, [minus(minus(p.W, base.dense), S) for p, base, (_, S) in each])
            if cost < best[0]:
                best = (cost, bases, fits)
    cost, bases, fits = best
    factors, restored = None, [base.dense for base in bases]
    if fits is not None:
        factors = [row for of_part, _ in fits for row in of_part]
        restored = [plus(dense, S) for dense, (_, S) in zip(restored, fits, strict=True)]
    base = Base(*(jnp.concatenate(each) for each in zip(*gathered(bases), strict=True)))
    tile = (plan.tile.rows, plan.tile.columns)
    shape = (W.shape[0], W.shape[1])
    weight = SVSKWeight(
        codes=_pack_codes(base.codes),
        scales=_pack_int6(base.integers),
        super_scales=base.super_scales,
        coefficients=None if plan.coefficients is None else stored,
        sidecar=None if factors is None else to_sidecar(cut(factors, plan.ranks), shape, tile),
        shape=shape,
        group=plan.group,
    )
    return Quantized(weight, jnp.concatenate(gathered(restored)), base_nats, cost)
