"""`svsk autotune`."""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import Mesh

from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.calibration.text import read_texts
from svsk_jax.cli.common import ModelFlags, Verb, console, layer_progress
from svsk_jax.cli.memory_flags import MemoryFlags
from svsk_jax.cli.mesh_flags import MeshFlags
from svsk_jax.evaluation.divergence import DivergenceReport, Estimate
from svsk_jax.evaluation.evaluate import evaluate_texts
from svsk_jax.model.source import ModelSource
from svsk_jax.models import load_model, open_model
from svsk_jax.parallel.distributed import agree, barrier, is_distributed, is_lead
from svsk_jax.pipeline import Plan
from svsk_jax.pipeline.options import remove_options
from svsk_jax.pipeline.run import KEPT
from svsk_jax.quant.types import DEFAULT_RECIPE, recipe
from svsk_jax.xla_flags import take_library_products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autotune(MemoryFlags, MeshFlags, ModelFlags, Verb):
    """Choose group size, codebook and ranks of every linear for a budget of bytes, and write
    a recipe file for `svsk quantize --recipe FILE`. A run that was cut short is taken up by the same command,
    which calibrates and measures what is still to be calibrated and measured."""

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Recipe file to write (.json)."""
    overwrite: bool = False
    """Replace an existing file."""
    recipe: str = DEFAULT_RECIPE
    """Recipe to start from: svsk-r16 or svsk-r8."""
    bits: float | None = None
    """Bits per weight of the decoder linears; default the recipe's."""
    calib_stats: Path | None = None
    """Statistics that `svsk calibrate` wrote, instead of calibrating now."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What to calibrate on."""
    measure: Literal["on", "off"] = "on"
    """Quantize by the tuned and by the default choice, and compare their divergence."""
    text: str = "builtin"
    """Text for that: a name, or the path of a .txt, .jsonl or .parquet file."""
    tokens: int = 16384
    """Tokens of it."""

    def run(self) -> dict[str, Any]:
        """Tune."""
        take_library_products()
        mesh = self.join()
        if self.output.suffix != ".json":
            raise ValueError(f"--output {self.output}: a recipe file's name ends in .json")
        if self.output.exists() and not self.overwrite:
            raise FileExistsError(f"--output {self.output}: exists; give another name or --overwrite")
        config = recipe(self.recipe)
        if self.bits is not None and config.bits is not None:
            config = dataclasses.replace(config, bits=self.bits)
        source = open_model(self.model, revision=self.revision)
        work = self.output.absolute().with_suffix(".work")
        with self._scratch() as scratch, self._kept(work), layer_progress() as on_progress:
            statistics = self._statistics(source, work, mesh, on_progress)
            tuned = pipeline.autotune(
                source,
                statistics,
                config,
                work,
                recipe=f"{self.recipe} tuned",
                mesh=mesh,
                max_memory=self.limit,
                on_progress=on_progress,
            )
            measured = {}
            if self.measure == "on":
                plans = {"default": tuned.default, "tuned": tuned.plan}
                measured = self._measure(source, statistics, plans, scratch, mesh, on_progress)
        result = {
            "predicted_nats": {
                "default": tuned.default.predicted_nats,
                "tuned": tuned.plan.predicted_nats,
            },
            "measured_kld": {name: dataclasses.asdict(value) for name, value in measured.items()},
            "chosen": tuned.chosen,
        }
        if is_lead():
            tuned.plan.save(self.output, {"tuning": result})
            # Until here a run that is cut short finds what took hours.
            if self.calib_stats is None:
                shutil.rmtree(statistics.folder)
            remove_options(work)
        unit = "nats" if statistics.has_sensitivity else "as the sum of layer errors"
        for name, plan in (("default", tuned.default), ("tuned", tuned.plan)):
            line = f"{name}: predicted {plan.predicted_nats:.4f} {unit}"
            if name in measured:
                line += f", measured KLD {measured[name].value:.4f} ± {measured[name].error:.4f}"
            console.print(line)
        for what, counts in tuned.chosen.items():
            console.print(f"{what}: " + ", ".join(f"{count} × {name}" for name, count in counts.items()))
        console.print(f"wrote {self.output}; use it with: svsk quantize --recipe {self.output}")
        return {"output": str(self.output), **result}

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A temporary folder for all processes, where they all can see it."""
        beside = self.output.absolute().parent if is_distributed() else None
        if not is_lead():
            yield Path(agree(str))
            barrier()
            return
        with tempfile.TemporaryDirectory(prefix="svsk-autotune-", dir=beside) as scratch:
            yield Path(agree(lambda: scratch))
            barrier()

    @contextmanager
    def _kept(self, work: Path) -> Iterator[None]:
        """Say with an exception where what was measured is kept."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # where there is none, or something is in it
                work.rmdir()
            if work.is_dir():
                error.add_note(f"{KEPT} in {work}: go on with the same command")
            raise

    def _statistics(
        self, source: ModelSource, work: Path, mesh: Mesh | None, on_progress: pipeline.OnProgress
    ) -> Statistics:
        if self.calib_stats is not None:
            return Statistics.open(self.calib_stats)
        folder = work / "statistics"
        pipeline.calibrate(
            source,
            folder,
            self.calibration,
            overwrite=True,
            resume=True,
            mesh=mesh,
            max_memory=self.limit,
            on_progress=on_progress,
        )
        return Statistics.open(folder)

    def _measure(
        self,
        source: ModelSource,
        statistics: Statistics,
        plans: dict[str, Plan],
        scratch: Path,
        mesh: Mesh | None,
        on_progress: pipeline.OnProgress,
    ) -> dict[str, Estimate]:
        """Mean KLD of the model quantized by each plan, on the same text; the lead alone measures."""
        reference = load_model(source, weights="dense") if is_lead() else None
        texts = read_texts(self.text, "evaluation")
        measured = {}
        for name, plan in plans.items():
            pipeline.quantize(
                source,
                scratch / name,
                plan,
                recipe=plan.recipe,
                statistics=statistics,
                mesh=mesh,
                max_memory=self.limit,
                on_progress=on_progress,
            )
            if reference is None:
                continue
            model = load_model(open_model(str(scratch / name)), weights="dense")
            (evaluation,) = evaluate_texts(
                model,
                source.tokenizer(),
                texts,
                reference=reference,
                conventions=("gptq",),
                window=min(1024, source.config.max_position_embeddings),
                max_tokens=self.tokens,
            )
            assert isinstance(evaluation.report, DivergenceReport)
            measured[name] = evaluation.report.mean_kld
        return measured
