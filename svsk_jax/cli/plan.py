"""`svsk plan`."""

import dataclasses
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.table import Table

from convert import open_config
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.cli.common import Verb, console
from svsk_jax.cli.memory_flags import MemoryFlags
from svsk_jax.cli.recipe_flags import RecipeFlags
from svsk_jax.pipeline import Plan
from svsk_jax.pipeline.checks import refuse_polish
from svsk_jax.pipeline.forecast import Forecast, forecast, measured_costs
from svsk_jax.pipeline.memory import Machine, MemoryPlan, plan_run
from svsk_jax.pipeline.sizes import Sizes, model_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRun(RecipeFlags, MemoryFlags, Verb):
    """Say how large a model will be under a recipe, and estimate what quantizing it takes: from its
    configuration alone, before any weights are read."""

    model: Annotated[str, tyro.conf.arg(aliases=("-m",))]
    """A name (Qwen3-0.6B, 1.7B, 4B, 8B, 14B, 32B, 30B-A3B or 235B-A22B; Llama-3-8B or 70B; SmolLM2-135M), a
    folder with a config.json, a .gguf file, or a hub id, of which only config.json is fetched."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    costs: Path | None = None
    """Costs measured on another machine, instead of those that come with svsk: a file that
    `python -m benchmarks.speed.quantize --estimate --json FILE` wrote there."""
    calibration: CalibrationConfig = CalibrationConfig()
    """What will be calibrated on."""

    def run(self) -> dict[str, Any]:
        """Plan."""
        name, recipe = self.chosen()
        model = open_config(self.model, revision=self.revision)
        config = recipe.config if isinstance(recipe, Plan) else recipe
        refuse_polish(name, config, model)
        sizes = model_sizes(model, recipe)
        kind, machine = jax.devices()[0], Machine.of()
        found = forecast(model, config, self.calibration, measured_costs(kind.platform, self.costs))
        memory = plan_run(model, self.calibration.needed_by(config), machine, self.limit)
        here = f"{platform.machine()}, {os.cpu_count()} cores, {kind.device_kind}"
        _print(self.model, name, sizes, found, here)
        _print_memory(memory, machine)
        if config.polish:
            console.print(f"{config.polish} steps of polish come on top; their time is not estimated")
        return {
            "model": self.model,
            "recipe": name,
            "parameters": sizes.budget.total_weights,
            "decoder_linear_weights": sizes.budget.linear_weights,
            "bytes": sizes.budget.total_bytes,
            "decoder_linear_bytes": sizes.budget.linear_bytes,
            "bytes_are_exact": sizes.exact,
            "linear_bits_per_weight": sizes.budget.linear_bits,
            "file_bits_per_weight": sizes.budget.total_bits,
            "bytes_in_memory": sizes.in_memory,
            "estimate": dataclasses.asdict(found),
            "memory": dataclasses.asdict(memory),
            "machine": here,
        }


def _print(model: str, recipe: str, sizes: Sizes, found: Forecast, here: str) -> None:
    budget = sizes.budget
    most = "" if sizes.exact else "at most "
    table = Table(title=f"{model}, {recipe}", show_header=False)
    table.add_row(
        "parameters", f"{budget.total_weights:,}, of which {budget.linear_weights:,} in decoder linears"
    )
    table.add_row(
        "bits/weight", f"{most}{budget.linear_bits:.3f} in decoder linears, {budget.total_bits:.3f} in all"
    )
    table.add_row("on disk", f"{most}{budget.total_bytes:,} bytes, and tokenizer and metadata")
    for layout, size in sizes.in_memory.items():
        table.add_row(f"in memory, {layout}", _gigabytes(size))
    table.add_row("statistics on disk", _gigabytes(found.statistics_bytes))
    table.add_row("calibrate", _duration(found.calibrate_seconds))
    both = None
    if found.plan_seconds is not None and found.quantize_seconds is not None:
        both = found.plan_seconds + found.quantize_seconds
    table.add_row("quantize", _duration(both))
    console.print(table)
    if found.costs_of is None:
        console.print(
            f"no costs were measured for a machine like this one ({here}): times are unknown; --costs FILE "
            "takes measured ones"
        )
    else:
        console.print(
            f"times are an estimate: extrapolated from costs measured on {found.costs_of}; this machine is "
            f"{here}. Sizes on disk follow from the shapes"
        )


def _print_memory(plan: MemoryPlan, machine: Machine) -> None:
    where = "of the process beyond Python and JAX" if machine.shares_host else "of each device"
    streams = "on the devices" if plan.streams == "devices" else "off the devices"
    console.print(
        f"largest memory {where}: "
        + ", ".join(f"{stage} {_gigabytes(peak)}" for stage, peak in plan.peaks.items())
        + f"; batches of {plan.batch_tokens} tokens, residual streams {streams}, "
        f"{_gigabytes(plan.store_bytes)} of the host's memory for what lies there"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "time unknown"
    return f"about {seconds:,.0f} s" if seconds < 600 else f"about {seconds / 3600:,.1f} hours"
