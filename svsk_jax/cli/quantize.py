"""`svsk quantize`."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.cli.common import ModelFlags, OutputFlags, Verb, console, layer_progress
from svsk_jax.models import open_model
from svsk_jax.quant.types import recipe

RecipeName = Literal["q4", "classic-r8", "classic-r16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(OutputFlags, ModelFlags, Verb):
    """Quantize a model, layer by layer."""

    recipe: RecipeName = "classic-r16"
    """How linears are stored: q4 (4-bit base alone), classic-r8 or classic-r16 (with a sidecar of that
    rank)."""
    rank: int | None = None
    """Rank of the sidecar instead of the recipe's; 0 for none."""
    embedding: Literal["int8", "bfloat16"] = "int8"
    """How embedding and head are stored."""
    calib_stats: Path | None = None
    """Statistics that `svsk calibrate` wrote, instead of calibrating now."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What to calibrate on."""

    def run(self) -> dict[str, Any]:
        """Quantize."""
        config = dataclasses.replace(recipe(self.recipe), embedding=self.embedding)
        name: str = self.recipe
        if self.rank is not None:
            config, name = dataclasses.replace(config, rank=self.rank), f"{self.recipe} with rank {self.rank}"
        source = open_model(self.model, revision=self.revision)
        statistics = None if self.calib_stats is None else Statistics.open(self.calib_stats)
        with layer_progress("quantize") as on_progress:
            result = pipeline.quantize(
                source,
                self.output,
                config,
                recipe=name,
                calibration=self.calibration,
                statistics=statistics,
                overwrite=self.overwrite,
                on_progress=on_progress,
            )
        budget = result.budget
        console.print(
            f"wrote {self.output}: {budget.linear_bits:.3f} bits/weight in the decoder linears, "
            f"{budget.total_bits:.3f} in the whole file, {budget.total_bytes / 1e6:,.1f} MB"
        )
        return {"recipe": name, **result.to_dict()}
