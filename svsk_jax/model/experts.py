"""A mixture of experts: which tokens go to which, and the experts' products by blocks of rows."""

from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.svsk_matmul import SVSKWeight, stack
from svsk_jax.model.config import Mixture, ModelConfig
from svsk_jax.model.linear import Weight, project
from svsk_jax.model.parameters import EXPERT_LINEARS, EXPERTS, expert
from svsk_jax.model.tap import Tap, no_tap

FEWEST_ROWS, MOST_ROWS = 8, 128
"""Rows of a block: products of up to 8 cost about as much as of one, and beyond 128 no less each."""


class Blocks(NamedTuple):
    """Pairs of token and expert in blocks of rows that go to one expert each.

    `expert`: expert of each block, the number of experts for one that is not used. `pair`: which pair each
    row is, token · experts per token + slot, or the number of pairs for a row that is none.
    """

    expert: Int32[Array, "blocks"]
    pair: Int32[Array, "blocks rows"]


def block_rows(tokens: int, mixture: Mixture) -> int:
    """Rows of a block: about as many as an expert gets of so many tokens; one for a single token, whose
    experts are all different."""
    if tokens == 1:
        return 1
    each = tokens * mixture.num_experts_per_tok // mixture.num_experts
    return min(MOST_ROWS, max(FEWEST_ROWS, 1 << (each - 1).bit_length() if each else 0))


def route(
    logits: Float32[Array, "t e"], mixture: Mixture
) -> tuple[Int32[Array, "t k"], Float32[Array, "t k"]]:
    """The experts of each token and their weights: the largest of softmax(logits), scaled to a sum of 1 where
    the model says so."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), mixture.num_experts_per_tok)
    if mixture.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights


def in_blocks(chosen: Int[Array, "t k"], experts: int, rows: int) -> Blocks:
    """The pairs sorted by expert, each expert's filled up to whole blocks of `rows`."""
    pairs = chosen.size
    order = jnp.argsort(chosen.reshape(-1), stable=True).astype(jnp.int32)
    counts = jnp.bincount(chosen.reshape(-1), length=experts).astype(jnp.int32)
    ends = jnp.cumsum((counts + rows - 1) // rows)
    most = min(pairs, pairs // rows + min(experts, pairs))
    number = jnp.arange(most, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
    known = jnp.minimum(owner, experts - 1)
    before = ends[known] - (counts[known] + rows - 1) // rows
    within = (number - before)[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)
    first = jnp.cumsum(counts)[known] - counts[known]
    valid = (owner < experts)[:, None] & (within < counts[known][:, None])
    place = jnp.clip(first[:, None] + within, 0, pairs - 1)
    return Blocks(expert=owner, pair=jnp.where(valid, order[place], pairs))


def grouped(
    x: Float[Array, "blocks rows k"], weight: Weight, owner: Int[Array, "blocks"], width: int
) -> Float[Array, "blocks rows {width}"]:
    """y = x W[owner]ᵀ of each block, W a stack of [width, K] matrices of any form; blocks that are not used
    are skipped and give zeros. A block reads its expert's weights once."""
    experts = jax.tree.leaves(weight)[0].shape[0]

    # Differentiated, each block would keep a copy of its expert's weights: it takes them again instead.
    @partial(jax.checkpoint, prevent_cse=False)
    def one(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, index = block

        def product() -> jax.Array:
            return project(rows, weight, jnp.minimum(index, experts - 1))

        return jax.lax.cond(index < experts, product, lambda: jnp.zeros_like(rows, shape=(len(rows), width)))

    return jax.lax.map(one, (x, owner))


class Experts(nnx.Module):
    """y = Σ_e p_e W_down,e (silu(W_gate,e x) ⊙ W_up,e x) over the experts e that the router chooses for x.

    Router and weights p are computed in f32, whatever dtype x has: which experts are chosen changes in a
    step. The experts' matrices are one stack for each of gate, up and down (`stack_experts`), or of gate and
    up joined, and down; single ones are stacked here.
    """

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Any]):
        assert config.mixture is not None
        self.mixture = config.mixture
        self.hidden_size = config.hidden_size
        self.router = nnx.Param(parameters["mlp.router.weight"])
        stacked = stack_experts(dict(parameters))
        if f"{EXPERTS}.gate_up.weight" in stacked:
            self.gate_up = nnx.Param(stacked[f"{EXPERTS}.gate_up.weight"])
        else:
            self.gate_up = None
            self.gate, self.up = (nnx.Param(stacked[f"{EXPERTS}.{name}.weight"]) for name in ("gate", "up"))
        self.down = nnx.Param(stacked[f"{EXPERTS}.down.weight"])

    def __call__(self, x: Float[Array, "b t d"], tap: Tap = no_tap) -> Float[Array, "b t d"]:
        """Apply to the last axis.

        `tap` sees, in place of what a dense MLP has, the experts' activations in blocks
        [blocks, rows, width], and before them `mlp.experts.expert` and `mlp.experts.pair`, which say what
        each row is (`Blocks`).
        """
        mixture, flat = self.mixture, x.reshape(-1, x.shape[-1])
        router = self.router.get_value().astype(jnp.float32)
        logits = jnp.matmul(flat.astype(jnp.float32), router.T, precision=jax.lax.Precision.HIGHEST)
        chosen, weights = route(logits, mixture)
        blocks = in_blocks(chosen, mixture.num_experts, block_rows(len(flat), mixture))
        owner = tap(f"{EXPERTS}.expert", blocks.expert)
        pair = tap(f"{EXPERTS}.pair", blocks.pair)
        slots, pairs = mixture.num_experts_per_tok, chosen.size
        valid = (pair < pairs)[..., None]
        rows = jnp.where(valid, flat[jnp.minimum(pair // slots, len(flat) - 1)], jnp.zeros((), x.dtype))
        rows = tap(f"{EXPERTS}.input", rows)
        units = mixture.moe_intermediate_size
        if self.gate_up is None:
            gate, up = (grouped(rows, each.get_value(), owner, units) for each in (self.gate, self.up))
        else:
            gate, up = jnp.split(grouped(rows, self.gate_up.get_value(), owner, 2 * units), 2, axis=-1)
        gate, up = tap(f"{EXPERTS}.gate", gate), tap(f"{EXPERTS}.up", up)
        hidden = tap(f"{EXPERTS}.hidden", jax.nn.silu(gate) * up)
        y = tap(f"{EXPERTS}.down", grouped(hidden, self.down.get_value(), owner, self.hidden_size))
        each = jnp.zeros((pairs, x.shape[-1]), jnp.float32)
        each = each.at[pair.reshape(-1)].set(y.reshape(-1, x.shape[-1]).astype(jnp.float32), mode="drop")
        total = jnp.sum(each.reshape(-1, slots, x.shape[-1]) * weights[..., None], axis=1)
        return total.astype(x.dtype).reshape(x.shape)


def stack_experts(parameters: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The parameters with the matrices of each mixture's experts stacked, `…mlp.experts.gate.weight` for
    `…mlp.experts.0.gate.weight` and so on. Takes them out of `parameters` on the way; where none are single
    nothing is changed."""
    for first in [path for path in parameters if path.endswith(f"{expert(0, EXPERT_LINEARS[0])}.weight")]:
        prefix = first.removesuffix(f"{expert(0, EXPERT_LINEARS[0])}.weight")
        for name in EXPERT_LINEARS:
            weights, number = [], 0
            while (path := f"{prefix}{expert(number, name)}.weight") in parameters:
                weights.append(parameters.pop(path))
                number += 1
            parameters[f"{prefix}{EXPERTS}.{name}.weight"] = _stack(weights)
    return parameters


def is_stack(path: str) -> bool:
    """Whether `stack_experts` made the parameter of this path."""
    return path.endswith(tuple(f"{EXPERTS}.{name}.weight" for name in EXPERT_LINEARS))


def _stack(weights: Sequence[Any]) -> Any:
    return stack(weights) if isinstance(weights[0], SVSKWeight) else jnp.stack(weights)
