"""`svsk quantize`."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.cli.common import ModelFlags, OutputFlags, Verb, console, layer_progress
from svsk_jax.models import open_model
from svsk_jax.pipeline import Plan
from svsk_jax.quant.types import DEFAULT_RECIPE, RECIPES, QuantConfig, recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(OutputFlags, ModelFlags, Verb):
    """Quantize a model, layer by layer."""

    resume: bool = False
    """Go on with an unfinished run of this same command, to the same bytes; start it if there is none."""
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
    embedding: Literal["int8", "bfloat16"] = "int8"
    """How embedding and head are stored."""
    calib_stats: Path | None = None
    """Statistics that `svsk calibrate` wrote, instead of calibrating now."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What to calibrate on."""

    def _chosen(self) -> tuple[str, QuantConfig | Plan]:
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

    def run(self) -> dict[str, Any]:
        """Quantize."""
        name, config = self._chosen()
        source = open_model(self.model, revision=self.revision)
        statistics = None if self.calib_stats is None else Statistics.open(self.calib_stats)
        with layer_progress() as on_progress:
            result = pipeline.quantize(
                source,
                self.output,
                config,
                recipe=name,
                calibration=self.calibration,
                statistics=statistics,
                overwrite=self.overwrite,
                resume=self.resume,
                on_progress=on_progress,
            )
        budget = result.budget
        console.print(
            f"wrote {self.output}: {budget.linear_bits:.3f} bits/weight in the decoder linears, "
            f"{budget.total_bits:.3f} in the whole file, {budget.total_bytes / 1e6:,.1f} MB"
        )
        return {"recipe": name, **result.to_dict()}
