"""`svsk calibrate`."""

import dataclasses
from typing import Any

from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.cli.common import ModelFlags, OutputFlags, Verb, console, layer_progress
from svsk_jax.cli.memory_flags import MemoryFlags
from svsk_jax.cli.mesh_flags import MeshFlags
from svsk_jax.models import open_model
from svsk_jax.xla_flags import take_library_products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(OutputFlags, MemoryFlags, MeshFlags, ModelFlags, Verb):
    """Measure a model's activations on calibration text once, for any number of quantize runs
    (--calib-stats)."""

    resume: bool = False
    """Go on with an unfinished run of this same command, to the same bytes; start it if there is none."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What to calibrate on."""

    def run(self) -> dict[str, Any]:
        """Calibrate."""
        take_library_products()
        mesh = self.join()
        source = open_model(self.model, revision=self.revision)
        with layer_progress() as on_progress:
            manifest = pipeline.calibrate(
                source,
                self.output,
                self.calibration,
                overwrite=self.overwrite,
                resume=self.resume,
                mesh=mesh,
                max_memory=self.limit,
                on_progress=on_progress,
            )
        text = manifest["text"]
        console.print(
            f"wrote {self.output}: {text['chunks']} chunks of {text['chunk_length']} tokens: "
            + ", ".join(f"{count} of {name}" for name, count in text["calib"].items())
        )
        return {"output": str(self.output), **manifest}
