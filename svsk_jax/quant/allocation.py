"""Spend a budget of bytes where it is predicted to save the most nats."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pallas_kernels.svsk_matmul.layout import tile_spans
from svsk_jax.quant.types import TensorPlan, TileShape

BISECTIONS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One way to store a linear, before ranks are chosen.

    Invariant: `gains` [row tiles, column tiles, ranks] falls along its last axis, in nats; `nats` is what the
    base costs without a sidecar.
    """

    group: int
    coefficients: tuple[float, float] | None
    tile: TileShape
    shape: tuple[int, int]
    base_bytes: int
    nats: float
    gains: np.ndarray

    def rank_bytes(self) -> np.ndarray:
        """Bytes of one rank of each tile, [row tiles, column tiles]: a column of U, a row of V, a scale."""
        rows = [b - a for a, b in tile_spans(self.shape[0], self.tile.rows)]
        columns = [b - a for a, b in tile_spans(self.shape[1], self.tile.columns)]
        return np.add.outer(rows, columns) + 2

    def ranks_at(self, price: float) -> np.ndarray:
        """Rank of each tile when a byte costs `price` nats: as long as the next rank gains more."""
        return np.sum(self.gains > price * self.rank_bytes()[..., None], axis=-1)

    def bytes_with(self, ranks: np.ndarray) -> int:
        """Bytes stored with these ranks."""
        return self.base_bytes + int(np.sum(ranks * self.rank_bytes()))

    def nats_with(self, ranks: np.ndarray) -> float:
        """Predicted nats with these ranks."""
        kept = np.arange(self.gains.shape[-1]) < ranks[..., None]
        return self.nats - float(np.sum(self.gains * kept))

    def plan(self, ranks: np.ndarray) -> TensorPlan:
        """The choice as a plan."""
        return TensorPlan(
            group=self.group,
            coefficients=self.coefficients,
            tile=self.tile,
            ranks=tuple(tuple(int(rank) for rank in row) for row in ranks),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """The chosen plan of each linear, the bytes that they take and the nats that they are predicted to
    cost."""

    plans: Mapping[str, TensorPlan]
    bytes: int
    nats: float


def _best(options: Sequence[Option], price: float) -> tuple[Option, np.ndarray]:
    def total(option: Option) -> float:
        ranks = option.ranks_at(price)
        return option.nats_with(ranks) + price * option.bytes_with(ranks)

    chosen = min(options, key=total)
    return chosen, chosen.ranks_at(price)


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> Allocation:
    """For every linear an option and ranks, with the least predicted nats within `budget` bytes.

    Finds the price of a byte at which everything that is worth its price just fits (Lagrange's method, by
    bisection), then spends what is left on the single ranks that gain most per byte.

    Raises:
        ValueError: the budget is below the smallest options without sidecars; says what it must be.
    """
    least = sum(min(option.base_bytes for option in choices) for choices in options.values())
    if budget < least:
        raise ValueError(
            f"a budget of {budget} bytes is less than the {least} that the codes and scales take"
        )
    low, high = 0.0, 1.0

    def spent(price: float) -> int:
        picks = [_best(choices, price) for choices in options.values()]
        return sum(option.bytes_with(ranks) for option, ranks in picks)

    while spent(high) > budget:
        high *= 16
    for _ in range(BISECTIONS):
        middle = (low + high) / 2 if low else high / 16
        if spent(middle) > budget:
            low = middle
        else:
            high = middle
    picks = {name: _best(choices, high) for name, choices in options.items()}
    left = budget - sum(option.bytes_with(ranks) for option, ranks in picks.values())
    _spend_rest(picks, left)
    return Allocation(
        plans={name: option.plan(ranks) for name, (option, ranks) in picks.items()},
        bytes=sum(option.bytes_with(ranks) for option, ranks in picks.values()),
        nats=sum(option.nats_with(ranks) for option, ranks in picks.values()),
    )


def _spend_rest(picks: Mapping[str, tuple[Option, np.ndarray]], left: int) -> None:
    """Raise ranks in place, best gain per byte first, each rank once, while they fit."""
    candidates = []
    for name, (option, ranks) in picks.items():
        cost = option.rank_bytes()
        for i, j in np.ndindex(*ranks.shape):
            later = option.gains[i, j, ranks[i, j] :]
            candidates += [(gain / cost[i, j], name, i, j, int(cost[i, j])) for gain in later if gain > 0]
    for _, name, i, j, cost in sorted(candidates, key=lambda item: -item[0]):
        if cost <= left:
            picks[name][1][i, j] += 1
            left -= cost
