"""Statistics of a mixture's experts, each from the tokens that are routed to it.

While a layer is walked, those of all its experts are one stack, under the names of the mixture's taps
(`mlp.experts.input`, …); what is stored and used afterwards is by expert (`mlp.experts.3.input`). One device
holds a stack: for Qwen3-30B-A3B that is 2 GB of second moments, for one layer at a time.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from svsk_jax.model.decoder import DecoderLayer
from svsk_jax.model.experts import Experts
from svsk_jax.model.parameters import EXPERT_INPUTS, EXPERTS, expert
from svsk_jax.quant.half_moment import HalfMoment, StoredMoment, as_stored
from svsk_jax.quant.types import InputMoment, OutputSensitivity

INPUTS = tuple(f"{EXPERTS}.{name}" for name in dict.fromkeys(EXPERT_INPUTS.values()))
"""Taps of what experts read."""
OUTPUTS = {f"{EXPERTS}.{name}": f"{EXPERTS}.{read}" for name, read in EXPERT_INPUTS.items()}
"""Taps of their linears' outputs, and what each of these linears reads."""
PLACES = (f"{EXPERTS}.expert", f"{EXPERTS}.pair")
"""Taps that say which expert a block is of and which pair of token and expert a row is."""
SHOWN = 4
"""Layers named in a warning."""
FEWEST_TOKENS = 32
"""For mean squares alone: their relative error is about √(2 / tokens), a quarter here."""

Starved = dict[str, list[int]]
"""Experts that had too few tokens for a statistic of their own, by its name within the layer."""


class Routed:
    """Rows of the blocks of a mixture's taps, for the layer whose taps they are.

    Args:
        layer: with a mixture.
        places: values of the taps `PLACES`.
    """

    def __init__(self, layer: DecoderLayer, places: Mapping[str, jax.Array]):
        assert isinstance(layer.mlp, Experts)
        self.experts, self.slots = layer.mlp.mixture.num_experts, layer.mlp.mixture.num_experts_per_tok
        self.owner, self.pair = (places[name] for name in PLACES)

    def rows(self, of_pairs: Float[Array, "pairs"]) -> Float[Array, "blocks rows"]:
        """What a value of each pair is for each row; 0 for rows that are none."""
        return jnp.append(of_pairs, jnp.zeros(1, of_pairs.dtype))[self.pair]

    def rows_of_chunks(self, mask: Float32[Array, "b"], length: int) -> Float32[Array, "blocks rows"]:
        """Likewise a value of each chunk of `length` tokens."""
        return self.rows(jnp.repeat(mask, length * self.slots))

    def pairs(self, of_rows: Float[Array, "blocks rows"], shape: tuple[int, int]) -> Float[Array, "b t k"]:
        """What a value of each row is for each slot of each token of [b, t]."""
        flat = jnp.zeros(shape[0] * shape[1] * self.slots, of_rows.dtype)
        flat = flat.at[self.pair.reshape(-1)].set(of_rows.reshape(-1), mode="drop")
        return flat.reshape(*shape, self.slots)

    def counts(self, weights: Float32[Array, "blocks rows"]) -> jax.Array:
        """Tokens of each expert with a weight other than 0, int32 [experts]."""
        return self._per_expert(jnp.sum(weights > 0, axis=1, dtype=jnp.int32))

    def moments(
        self, x: Float[Array, "blocks rows k"], weights: Float32[Array, "blocks rows"], full: bool
    ) -> InputMoment:
        """Σ w x xᵀ of each expert's tokens, or its diagonal: leaves have a leading axis of experts."""
        wide = x.astype(jnp.float32)
        if full:
            total = self._sum_of_products(wide * weights[..., None], wide)
        else:
            total = self._per_expert(jnp.sum(wide * wide * weights[..., None], axis=1))
        return InputMoment(total=total, tokens=self.counts(weights))

    def blocks(self, g: Float[Array, "blocks rows n"], height: int) -> Float32[Array, "e tiles m m"]:
        """Σ g gᵀ of each expert's tokens, in diagonal blocks of `height`, the last one padded."""
        wide = jnp.pad(g.astype(jnp.float32), ((0, 0), (0, 0), (0, -g.shape[-1] % height)))
        tiles = wide.reshape(*wide.shape[:2], -1, height).transpose(0, 2, 1, 3)
        return self._sum_of_products(tiles, tiles)

    def _per_expert(self, values: jax.Array) -> jax.Array:
        return (
            jnp.zeros((self.experts, *values.shape[1:]), values.dtype).at[self.owner].add(values, mode="drop")
        )

    def _sum_of_products(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """Σ leftᵀ right over the blocks of each expert, one block after the other into one sum."""

        def add(total: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            owner, left, right = block
            product = jnp.matmul(left.mT, right, precision=jax.lax.Precision.HIGHEST)
            return total.at[owner].add(product, mode="drop"), None

        shape = (self.experts, *left.shape[1:-2], left.shape[-1], right.shape[-1])
        total, _ = jax.lax.scan(add, jnp.zeros(shape, jnp.float32), (self.owner, left, right))
        return total


def moments_by_expert(
    moments: Mapping[str, StoredMoment],
) -> tuple[dict[str, StoredMoment], Starved]:
    """A layer's moments, as they are stored, with each expert's in place of the stacks.

    A full [K, K] moment is an expert's own if it has at least K tokens: of fewer the sum is singular, and
    what error feedback makes of it is the damping alone. Diagonals need 32 tokens. An expert with fewer gets
    the pooled moment of all experts of its layer, every token counted once for each expert that it went to.
    """
    named: dict[str, StoredMoment] = {}
    starved: Starved = {}
    for name, moment in moments.items():
        if name not in INPUTS:
            named[name] = moment
            continue
        totals, counts = np.asarray(moment.total), np.asarray(moment.tokens)
        full = isinstance(moment, HalfMoment)
        needed = moment.width if full else FEWEST_TOKENS
        pooled = as_stored(totals.sum(0), np.asarray(counts.sum(), counts.dtype), full)
        kind = name.removeprefix(f"{EXPERTS}.")
        for number, tokens in enumerate(counts):
            enough = tokens >= needed
            own = as_stored(totals[number], np.asarray(tokens), full)
            named[expert(number, kind)] = own if enough else pooled
            if not enough:
                starved.setdefault(kind, []).append(number)
    return named, starved


def sensitivities_by_expert(
    sensitivities: Mapping[str, OutputSensitivity],
) -> tuple[dict[str, OutputSensitivity], Starved]:
    """A layer's sensitivities with each expert's in place of the stacks, without weights of tokens.

    An expert's G is a mean over all tokens, of which those that are not routed to it have a gradient of zero:
    its share of the tokens is a factor of what its errors cost. It is the expert's own if it has as many
    tokens as a block has rows, else the pooled one of its layer's experts, scaled to its share (that of at
    least one token).
    """
    named: dict[str, OutputSensitivity] = {}
    starved: Starved = {}
    tokens = next(found.tokens for name, found in sensitivities.items() if name not in OUTPUTS)
    for name, sensitivity in sensitivities.items():
        if name not in OUTPUTS:
            named[name] = sensitivity
            continue
        blocks, counts = np.asarray(sensitivity.blocks), np.asarray(sensitivity.tokens)
        pooled = blocks.sum(0) / np.float32(max(1, counts.sum()))
        kind = name.removeprefix(f"{EXPERTS}.")
        for number, count in enumerate(counts):
            enough = count >= blocks.shape[-1]
            own: Any = blocks[number] if enough else pooled * np.float32(max(1, count))
            named[expert(number, kind)] = OutputSensitivity(
                blocks=own, weights=np.zeros((0, 0), np.float32), tokens=tokens
            )
            if not enough:
                starved.setdefault(kind, []).append(number)
    return named, starved


def describe_starved(starved: Mapping[str, Starved], experts: int) -> str:
    """What to tell of the experts that fell back, by layer."""
    layers = [
        f"{layer}: {len(set().union(*kinds.values()))} of {experts} experts ("
        + "; ".join(f"{kind} of {', '.join(map(str, numbers))}" for kind, numbers in kinds.items())
        + ")"
        for layer, kinds in starved.items()
    ]
    more = f"; and in {len(layers) - SHOWN} more layers" if len(layers) > SHOWN else ""
    return (
        "calibration: too few tokens were routed to some experts, which take the statistics of all experts "
        f"of their layer: {'; '.join(layers[:SHOWN])}{more}. The manifest lists them all; more --chunks "
        "give more experts their own"
    )
