"""`svsk tune-kernels`."""

import dataclasses
import datetime
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import jax
from rich.table import Table

from pallas_kernels.aot import targeting
from pallas_kernels.device_time import without_graphs
from pallas_kernels.svsk_matmul import why_no_triton
from pallas_kernels.svsk_matmul.figures import abstract_weight, rank
from pallas_kernels.svsk_matmul.search import BATCHES, search
from pallas_kernels.svsk_matmul.shapes import MODELS, unique_shapes
from pallas_kernels.svsk_matmul.tuning import FOLDER_VARIABLE, TABLES, Blocks, candidates, table_path
from svsk_jax.cli.common import Verb, console
from svsk_jax.storage.atomic import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneKernels(Verb):
    """Find the fastest block configurations of the kernels on this machine's GPU, and keep them for it."""

    models: tuple[str, ...] = tuple(MODELS)
    """Whose matrix shapes to tune."""
    shapes: tuple[str, ...] = ()
    """Shapes to tune instead, rows x columns, such as 3072x4096 for a device's share of a matrix."""
    seconds: float = float("inf")
    """After so many no other shape and batch is begun; those that are done are kept."""
    batches: tuple[int, ...] = BATCHES
    """For how many rows of x, of 1, 8, 16, 32 and 64."""
    target: Literal["sm_80", "sm_89", "sm_90", "sm_120"] = "sm_90"
    """Without a GPU: the architecture to estimate for."""
    output: Path = TABLES
    """Folder of the table; the kernels read their own and, before it, the one in $SVSK_TUNED_KERNELS."""

    def run(self) -> dict[str, Any]:
        """Tune."""
        unknown = [name for name in self.models if name not in MODELS]
        if unknown:
            raise ValueError(f"--models {' '.join(unknown)}: known are {', '.join(MODELS)}")
        wrong = [batch for batch in self.batches if batch not in BATCHES]
        if wrong:
            raise ValueError(f"--batches {wrong}: choose from {', '.join(map(str, BATCHES))}")
        if not self.seconds > 0:
            raise ValueError(f"--seconds {self.seconds}: expected more than 0")
        shapes = [shape_of(text) for text in self.shapes] or unique_shapes(self.models)
        without_graphs()
        reason = why_no_triton("bfloat16")
        if reason is not None:
            return self._rank(shapes, reason)
        kind = jax.devices()[0].device_kind

        def show(shape: tuple[int, int], batch: int, blocks: Blocks, time: float) -> None:
            console.print(f"{shape[0]} × {shape[1]}, {batch} rows of x: {describe(blocks)}, {time:.1f} µs")

        path = table_path(kind, self.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise ValueError(
                f"--output {path.parent}: can't be written; give another folder and point {FOLDER_VARIABLE} "
                "at it"
            )
        found = search(shapes, self.batches, show, seconds=self.seconds)
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))["blocks"]
            found = {shape: known.get(shape, {}) | found.get(shape, {}) for shape in known | found}
        document = {
            "device": kind,
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "blocks": found,
        }
        write_json(path, document)
        console.print(f"wrote {path}")
        return document

    def _rank(self, shapes: list[tuple[int, int]], reason: str) -> dict[str, Any]:
        """By figures of the compiled kernels, where nothing can be timed."""
        console.print(
            f"nothing can be timed here ({reason}); estimates for {self.target}, no table is written"
        )
        columns = ("matrix", "rows of x", "blocks", "µs", "instructions / weight", "registers")
        table = Table(*columns)
        ranked = []
        for shape in shapes:
            weight = abstract_weight(*shape)
            for batch in self.batches:
                with targeting(self.target):
                    choices = candidates(weight, batch)
                for time, blocks, figures in rank(weight, batch, self.target, choices):
                    executed = figures.instructions or figures.whole
                    numbers = (f"{time:.1f}", f"{executed:.2f}", str(figures.registers))
                    table.add_row(f"{shape[0]} × {shape[1]}", str(batch), describe(blocks), *numbers)
                    ranked.append({"shape": shape, "batch": batch, "us": time} | dataclasses.asdict(blocks))
        console.print(table)
        return {"target": self.target, "ranked": ranked}


def shape_of(text: str) -> tuple[int, int]:
    """The shape that `--shapes` names; ValueError if it is none."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise ValueError(f"--shapes {text}: expected rows x columns, such as 3072x4096")
    return int(match[1]), int(match[2])


def describe(blocks: Blocks) -> str:
    """Blocks in words."""
    return (
        f"{blocks.rows} rows, {blocks.superblocks} superblocks, {blocks.warps} warps, {blocks.stages} stages"
    )
