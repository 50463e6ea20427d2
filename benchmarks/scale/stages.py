"""Peak memory of calibrating, measuring options and quantizing a large random model, beside the memory plan.

    python -m benchmarks.scale.stages [--model Qwen3-1.7B] [--layers N] [--chunks 16] [--length 512]
        [--recipe svsk-r16] [--max-memory GB] [--threads N] [--seconds 420] [--json results.json]
    python -m benchmarks.scale.stages --tiny

A checkpoint of the model's shapes with random weights (safetensors, bf16, as the hub has them) is written to
a temporary folder, or to --folder, and calibrated on random tokens; its linears' options are measured, and it
is quantized as they say: each in a process of its own, on the devices that JAX finds (JAX_PLATFORMS=cpu for
the CPU). Memory of an accelerator is `peak_bytes_in_use` of the first device by the end of a stage; of a CPU
the process's largest resident set in a stage, beyond what it is after importing everything and one small
computation. What the host holds is told beside an accelerator too, though the plan does not bound it.

--json has all that is known by the end of each process. One that is not done when the --seconds are over is
ended, and its layers so far count: a stage's memory hardly hangs on how many there are, and --layers takes
fewer. --tiny is a quick trial of the benchmark itself.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.scale.children import status_of
from benchmarks.scale.meter import Meter
from benchmarks.scale.pinned import pin
from benchmarks.scale.stages_report import markdown
from benchmarks.speed.block import write_checkpoint
from svsk_jax import CalibrationConfig, Statistics, calibrate, open_model, quantize, recipe
from svsk_jax.calibration.mixture import Chunks
from svsk_jax.known_models import KNOWN
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import parameter_shapes
from svsk_jax.pipeline.allocator import give_back_freed_arrays
from svsk_jax.pipeline.checks import default_dtype
from svsk_jax.pipeline.memory import Machine, gigabytes, plan_run
from svsk_jax.pipeline.plan import Plan, plan_model
from svsk_jax.pipeline.progress import OnProgress
from svsk_jax.quant.types import RECIPES
from svsk_jax.storage.atomic import write_json
from svsk_jax.xla_flags import take_library_products

PROCESSES = ("model", "calibrate", "options", "quantize")
TINY = ModelConfig(
    architecture="qwen3",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    qk_norm=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run, as it is handed from process to process."""

    model: str
    layers: int | None
    chunks: int
    length: int
    recipe: str
    limit: int | None
    tiny: bool

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        known = TINY if self.tiny else KNOWN[self.model]
        return known if self.layers is None else dataclasses.replace(known, num_layers=self.layers)

    @property
    def calibration(self) -> CalibrationConfig:
        """What is measured on the random tokens."""
        return CalibrationConfig(
            chunks=self.chunks, chunk_length=self.length, fisher_chunks=max(1, self.chunks // 2)
        )


def predicted(settings: Settings) -> dict[str, int]:
    """Peaks that the run follows on this machine, by stage."""
    machine, config = Machine.of(), settings.config
    return plan_run(config, settings.calibration, machine, settings.limit, has_text=True).peaks


def work(process: str, settings: Settings, folder: Path, on_progress: OnProgress) -> None:
    """What one process does."""
    source = open_model(str(folder / "model"))
    if process == "calibrate":
        shape = (settings.chunks, settings.length)
        ids = np.random.default_rng(1).integers(0, settings.config.vocab_size, shape, np.int32)
        calibrate(
            source,
            folder / "statistics",
            settings.calibration,
            chunks=Chunks(ids=ids, counts={"random tokens": settings.chunks}),
            max_memory=settings.limit,
            on_progress=on_progress,
        )
        return
    statistics = Statistics.open(folder / "statistics")
    if process == "options":
        # What `quantize` measures, which then finds it; on an accelerator `quantize` also compiles ahead.
        give_back_freed_arrays()
        plan = plan_model(
            source,
            statistics,
            recipe(settings.recipe),
            recipe=settings.recipe,
            dtype=default_dtype(),
            on_progress=on_progress,
        )
        plan.save(folder / "plan.json")
        return
    quantize(
        source,
        folder / "out",
        Plan.load(folder / "plan.json"),
        recipe=settings.recipe,
        statistics=statistics,
        max_memory=settings.limit,
        on_progress=on_progress,
    )


def within(process: str, settings: Settings, folder: Path) -> None:
    """A process's work; what is found by the end of each layer is left in `folder`."""
    if process == "model":
        (folder / "model").mkdir()
        write_checkpoint(folder / "model", settings.config)
        return
    jax.block_until_ready(jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    found = {"device": jax.devices()[0].device_kind, "predicted_bytes": predicted(settings)}
    start = time.perf_counter()

    def keep(meter: Meter, done: bool = False) -> None:
        seconds = time.perf_counter() - start
        write_json(folder / f"{process}.json", found | {"seconds": seconds, "done": done} | meter.found())

    meter = Meter(keep)
    work(process, settings, folder, meter)
    keep(meter, done=True)


def run(process: str, settings: Settings, folder: Path, seconds: float) -> dict[str, Any]:
    """One process, ended after so many seconds; what it found."""
    command = [sys.executable, "-m", "benchmarks.scale.stages", "--folder", str(folder)]
    command += ["--within", process, json.dumps(dataclasses.asdict(settings))]
    # A checkpoint is written by numpy.
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if process == "model" else {})
    status = status_of(command, environment, max(seconds, 1))
    path = folder / f"{process}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"done": process == "model"}
    if status != 0:
        found |= {"done": False, "error": "not done in time" if status is None else f"status {status}"}
    return found


def measure(settings: Settings, folder: Path, seconds: float, keep: Callable[[dict[str, Any]], None]) -> bool:
    """All processes one after another, within so many seconds; whether all were done."""
    deadline, rows = time.monotonic() + seconds, {}
    for process in PROCESSES:
        start = time.monotonic()
        found = run(process, settings, folder, deadline - start)
        rows[process] = found | {"wall_seconds": time.monotonic() - start}
        keep(rows)
        print(f"{process}: {rows[process]['wall_seconds']:.0f} s {found.get('error', '')}", flush=True)
        if not found["done"]:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.stages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="Qwen3-1.7B", choices=sorted(KNOWN))
    parser.add_argument("--layers", type=int, default=None, help="default: as many as the model has")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a chunk")
    parser.add_argument(
        "--recipe", default="svsk-r16", choices=[name for name, known in RECIPES.items() if not known.polish]
    )
    parser.add_argument("--max-memory", type=float, default=None, help="as of `svsk quantize`")
    parser.add_argument("--threads", type=int, default=None, help="CPU cores that are used")
    parser.add_argument("--seconds", type=float, default=420, help="for all processes together")
    parser.add_argument("--tiny", action="store_true", help="a model of 0.1 M parameters, few tokens")
    parser.add_argument("--folder", type=Path, default=None, help="for everything that is written; kept")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--within", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.within:
        process, settings = arguments.within
        take_library_products()
        within(process, Settings(**json.loads(settings)), arguments.folder)
        return
    pin(arguments.threads)
    settings = Settings(
        model=arguments.model,
        layers=arguments.layers,
        chunks=4 if arguments.tiny else arguments.chunks,
        length=32 if arguments.tiny else arguments.length,
        recipe=arguments.recipe,
        limit=gigabytes(arguments.max_memory),
        tiny=arguments.tiny,
    )
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        "settings": dataclasses.asdict(settings),
        "layers": settings.config.num_layers,
        "parameters": sum(int(np.prod(shape)) for shape in parameter_shapes(settings.config).values()),
    }

    def keep(rows: dict[str, Any]) -> None:
        report["processes"] = rows
        if arguments.json:
            write_json(arguments.json, report)

    place = nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory()
    with place as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        done = measure(settings, folder, arguments.seconds, keep)
    print(markdown(report))
    sys.exit(not done)


if __name__ == "__main__":
    main()
