"""Flags that say how a model is stored."""

import dataclasses
from pathlib import Path
from typing import Literal

from svsk_jax.pipeline import Plan
from svsk_jax.quant.types import DEFAULT_RECIPE, RECIPES, QuantConfig, recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """Which recipe, and what to change of it."""

    recipe: str = DEFAULT_RECIPE
    """How linears are stored: svsk-r16 (4.60 bits/weight) or svsk-r8 (4.44), both with groups and ranks
    allocated; svsk-r16-polish (svsk-r16, then trained a little; meant for a GPU); the published
    classic-r16 or classic-r8; q4 (their base alone); or a file that `svsk autotune` wrote."""
    rank: int | None = None
    """Rank of the sidecar in every tile instead of the recipe's; 0 for none."""
    bits: float | None = None
    """Bits per weight of the decoder linears instead of the recipe's; svsk recipes only."""
    polish: int | None = None
    """Steps of polishing instead of the recipe's: the continuous numbers of the quantized model are trained
    to predict like the original, at the same bytes. svsk recipes only; meant for a GPU."""
    embedding: Literal["int8", "q4", "bfloat16"] = "int8"
    """How embedding and head are stored: int8 (8.25 bits/weight), q4 (4.44, as the linears without their
    sidecars; svsk recipes only) or bfloat16."""

    def chosen(self) -> tuple[str, QuantConfig | Plan]:
        """The recipe's name with what was changed of it, and its configuration or plan."""
        if self.recipe not in RECIPES and Path(self.recipe).suffix == ".json":
            if self.rank is not None or self.bits is not None:
                raise ValueError("--recipe FILE fixes ranks and bits: leave out --rank and --bits")
            plan = Plan.load(Path(self.recipe))
            settings = dataclasses.replace(plan.config, embedding=self.embedding)
            if self.polish is not None:
                settings = dataclasses.replace(settings, polish=self.polish)
            return plan.recipe, dataclasses.replace(plan, config=settings)
        config, name = dataclasses.replace(recipe(self.recipe), embedding=self.embedding), self.recipe
        if self.rank is not None and self.bits is not None:
            raise ValueError("--rank and --bits exclude each other: ranks follow from the bits")
        if self.rank is not None:
            config, name = (
                dataclasses.replace(config, rank=self.rank, bits=None),
                f"{name} with rank {self.rank}",
            )
        if self.bits is not None:
            if config.bits is None:
                raise ValueError(f"--bits {self.bits}: {name} does not allocate; take svsk-r16 or svsk-r8")
            config, name = dataclasses.replace(config, bits=self.bits), f"{name} with {self.bits} bits"
        if self.polish is not None:
            if config.scales != "two_level":
                raise ValueError(f"--polish {self.polish}: {name} has flat scales; take svsk-r16 or svsk-r8")
            config = dataclasses.replace(config, polish=self.polish)
            name = f"{name}, {self.polish} steps of polish"
        return name, config
