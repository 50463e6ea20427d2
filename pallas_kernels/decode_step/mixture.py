"""The kernels of a mixture of experts between products: which experts each token has, and what their outputs
add up to."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.decode_step.launch import launch
from pallas_kernels.decode_step.product import (
    WIDTH,
    Chosen,
    Product,
    finishing,
    inverse_rms,
    load_squares,
    plane_columns,
    starts,
)
from pallas_kernels.decode_step.residual import Residual
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import PLANE
from pallas_kernels.svsk_matmul.triton_operands import Refs, abstract
from pallas_kernels.svsk_matmul.triton_prepare import PLANES
from pallas_kernels.svsk_matmul.triton_sidecar import Gathered

ROUTER, CHOICE, ORDER, WEIGHED = "svsk_router", "svsk_choice", "svsk_order", "svsk_weighed"
ROUTER_WARPS, CHOICE_WARPS, ORDER_WARPS, WEIGHED_WARPS = 4, 1, 4, 8
TALL, WIDE = 4, 1024
"""Experts that a program of the router takes, and columns at a time."""
SIDE = 64
"""Rows whose places a program finds, and that it compares them with at a time."""
UNLIKELY = -1e30
"""In place of the logit of what is no expert, or was chosen."""


def _router(ref: Refs, block: jax.Array, item: jax.Array, *, eps: float) -> None:
    experts, columns = ref["router"].shape
    expert = block * TALL + lax.broadcasted_iota(jnp.int32, (TALL, 1), 0)
    squares = load_squares(ref, item)
    total = jnp.zeros((TALL, WIDE), jnp.float32)
    for first in range(0, columns, WIDE):
        column = first + lax.broadcasted_iota(jnp.int32, (1, WIDE), 1)
        inside = column < columns
        x = plgpu.load(ref["x"].at[item, column], mask=inside, other=0.0)
        x *= plgpu.load(ref["scale"].at[column], mask=inside, other=0).astype(jnp.float32)
        mask = inside & (expert < experts)
        weights = plgpu.load(
            ref["router"].at[jnp.broadcast_to(expert, mask.shape), jnp.broadcast_to(column, mask.shape)],
            mask=mask,
            other=0,
        )
        total += weights.astype(jnp.float32) * x
    logits = jnp.sum(total, axis=1)[:, None] * inverse_rms(squares, columns, eps)
    plgpu.store(ref["logits"].at[item, expert], logits, mask=expert < experts)


def _choice(ref: Refs, item: jax.Array, _: jax.Array, *, slots: int, normalized: bool) -> None:
    experts = ref["logits"].shape[1]
    expert = lax.broadcasted_iota(jnp.int32, (1 << (experts - 1).bit_length(),), 0)
    logits = plgpu.load(ref["logits"].at[item, expert], mask=expert < experts, other=UNLIKELY)
    largest = jnp.max(logits)
    every, chosen = jnp.sum(jnp.exp(logits - largest)), jnp.float32(0)
    slot = lax.broadcasted_iota(jnp.int32, (1 << (slots - 1).bit_length(),), 0)
    which, weight = jnp.zeros(slot.shape, jnp.int32), jnp.zeros(slot.shape, jnp.float32)
    for index in range(slots):
        best = jnp.max(logits)
        # The first of several.
        place = jnp.min(jnp.where(logits == best, expert, experts - 1))
        p = jnp.exp(best - largest)
        chosen += p
        which, weight = jnp.where(slot == index, place, which), jnp.where(slot == index, p, weight)
        logits = jnp.where(expert == place, UNLIKELY, logits)
    index = item * slots + slot
    plgpu.store(ref["chosen"].at[index], which, mask=slot < slots)
    plgpu.store(ref["weights"].at[index], weight / (chosen if normalized else every), mask=slot < slots)


def _order(ref: Refs, block: jax.Array, _: jax.Array) -> None:
    """A row's place is the number of rows that come before it."""
    (rows,) = ref["chosen"].shape
    row = block * SIDE + lax.broadcasted_iota(jnp.int32, (SIDE, 1), 0)
    own = plgpu.load(ref["chosen"].at[row], mask=row < rows, other=0)

    def some(i, place):
        other = i * SIDE + lax.broadcasted_iota(jnp.int32, (1, SIDE), 1)
        theirs = plgpu.load(ref["chosen"].at[other], mask=other < rows, other=0)
        before = (theirs < own) | ((theirs == own) & (other < row))
        return place + jnp.sum((before & (other < rows)).astype(jnp.int32), axis=1)[:, None]

    place = lax.fori_loop(0, ceil_div(rows, SIDE), some, jnp.zeros((SIDE, 1), jnp.int32))
    plgpu.store(ref["order"].at[jnp.where(row < rows, place, row)], row)


@partial(jax.jit, static_argnames=("slots", "normalized", "eps", "interpret"))
def choose_experts(
    stream: Residual,
    scale: Float[Array, "d"],
    router: Float[Array, "e d"],
    *,
    slots: int,
    normalized: bool,
    eps: float,
    interpret: bool = False,
) -> tuple[Chosen, Float[Array, "c"]]:
    """The `slots` experts of each of m tokens with the largest softmax(router · norm(x)), and those
    probabilities p, f32, or p / Σ p. Both have c = slots · m rows: a token's one after another, the likeliest
    first, of equal ones the first. Logits are f32.

    Args:
        stream: the residual stream x.
        scale: of the RMSNorm, of any float dtype.
        router: a row for each expert, of any float dtype.
        slots: experts of a token.
        normalized: whether those of a token add up to 1.
        eps: of the RMSNorm.
        interpret: run in interpret mode.
    """
    (m, _), experts = stream.x.shape, len(router)
    [logits] = launch(
        partial(_router, eps=eps),
        ROUTER,
        {"x": stream.x, "squares": stream.squares, "scale": scale, "router": router},
        {"logits": jax.ShapeDtypeStruct((m, experts), jnp.float32)},
        programs=ceil_div(experts, TALL),
        rows=m,
        warps=ROUTER_WARPS,
        interpret=interpret,
    )
    chosen, weights = launch(
        partial(_choice, slots=slots, normalized=normalized),
        CHOICE,
        {"logits": logits},
        {
            "chosen": jax.ShapeDtypeStruct((slots * m,), jnp.int32),
            "weights": jax.ShapeDtypeStruct((slots * m,), jnp.float32),
        },
        programs=m,
        rows=1,
        warps=CHOICE_WARPS,
        interpret=interpret,
    )
    if m == 1:
        # All of a token's are different.
        return Chosen(chosen, None), weights
    blocks = ceil_div(slots * m, SIDE)
    [order] = launch(
        _order,
        ORDER,
        {"chosen": chosen},
        {"order": jax.ShapeDtypeStruct((SIDE * blocks,), jnp.int32)},
        programs=blocks,
        rows=1,
        warps=ORDER_WARPS,
        interpret=interpret,
    )
    return Chosen(chosen, order), weights


def _weighed(ref: Refs, superblock: jax.Array, item: jax.Array, *, product: Product) -> None:
    slots, _, columns = ref["sums"].shape
    column = plane_columns(superblock)
    rows = [starts(superblock * WIDTH, PLANES, PLANE)]
    finish = finishing(ref, product, item, rows, PLANE, threads=32 * WEIGHED_WARPS)
    weight = plgpu.load(ref["weights"].at[item])
    [y] = finish()
    token, slot = lax.div(item, jnp.int32(slots)), lax.rem(item, jnp.int32(slots))
    plgpu.store(ref["sums"].at[slot, token, column], weight * y, mask=column < columns)


@partial(jax.jit, static_argnames=("slots", "interpret"))
def finish_weighed(
    product: Product, weights: Float[Array, "c"], *, slots: int, interpret: bool = False
) -> Product:
    """Σ weight · y over the rows y of each token, itself unfinished: its parts are a token's rows.

    Args:
        product: with `chosen`, `slots` rows for each token one after another.
        weights: of the rows, f32.
        slots: experts of a token.
        interpret: run in interpret mode.
    """
    bare = dataclasses.replace(product.weight, **Gathered()._asdict())
    rows, columns = product.parts.shape[1], product.weight.padded_rows
    [sums] = launch(
        partial(_weighed, product=abstract(product)),
        WEIGHED,
        {"weights": weights, **product.operands},
        {"sums": jax.ShapeDtypeStruct((slots, rows // slots, columns), jnp.float32)},
        programs=ceil_div(columns, WIDTH),
        rows=rows,
        warps=WEIGHED_WARPS,
        interpret=interpret,
    )
    return Product(parts=sums, weight=bare)
