"""`svsk quantize`."""

import dataclasses
from pathlib import Path
from typing import Any

from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.cli.common import ModelFlags, OutputFlags, Verb, console, layer_progress
from svsk_jax.cli.memory_flags import MemoryFlags
from svsk_jax.cli.mesh_flags import MeshFlags
from svsk_jax.cli.recipe_flags import RecipeFlags
from svsk_jax.models import open_model
from svsk_jax.xla_flags import take_library_products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(RecipeFlags, OutputFlags, MemoryFlags, MeshFlags, ModelFlags, Verb):
    """Quantize a model, layer by layer."""

    resume: bool = False
    """Go on with an unfinished run of this same command, to the same bytes; start it if there is none."""
    calib_stats: Path | None = None
    """Statistics that `svsk calibrate` wrote, instead of calibrating now."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What to calibrate on."""

    def run(self) -> dict[str, Any]:
        """Quantize."""
        take_library_products()
        mesh = self.join()
        name, config = self.chosen()
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
                mesh=mesh,
                max_memory=self.limit,
                on_progress=on_progress,
            )
        budget = result.budget
        console.print(
            f"wrote {self.output}: {budget.linear_bits:.3f} bits/weight in the decoder linears, "
            f"{budget.total_bits:.3f} in the whole file, {budget.total_bytes / 1e6:,.1f} MB"
        )
        return {"recipe": name, **result.to_dict()}
