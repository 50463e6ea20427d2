"""Block configurations of the Triton kernels: found by a search on the device, else by rule."""

import dataclasses
import json
import os
from functools import cache
from pathlib import Path

from pallas_kernels.svsk_matmul.devices import is_hopper, target_device
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_layout import SUPERBLOCK, TritonWeight, padded
from pallas_kernels.svsk_matmul.triton_sidecar import LARGEST_BLOCK

FUSED_LIMIT = 129
"""Rows of x from which the weight is restored first (`docs/decisions/0004-kernels.md`)."""
WAVE = 1000
"""Programs of two warps that a launch wants at least, to fill a large GPU."""
LONGEST_SUM = 16
"""Superblocks of a program that the search tries at most."""
TABLES = Path(__file__).parent / "tuned"
"""A table for each kind of device, as `svsk tune-kernels` writes it."""
KIN = ("NVIDIA H100 80GB HBM3", "NVIDIA H200"), ("H100", "H200", "H800")
"""Kinds of devices with tables, and names of all that have the same multiprocessors, which take those blocks
where they have none of their own."""
FOLDER_VARIABLE = "SVSK_TUNED_KERNELS"
"""Of the environment: a folder whose tables go before these."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a launch is cut up."""

    rows: int
    """Rows of the weight that a program computes."""
    superblocks: int
    """Superblocks of 256 columns that it adds up; the rest of K goes to other programs."""
    warps: int
    """Warps of a program."""
    stages: int = 2
    """Stages of the software pipeline."""
    batch: int = 1
    """Rows of x that a program computes."""

    def misfits(self, weight: TritonWeight, m: int) -> list[str]:
        """What does not divide the padded weight and m rows of x, or is too tall for a sidecar."""
        tall = self.rows > LARGEST_BLOCK and weight.v is not None
        return [f"rows = {self.rows} is more than {LARGEST_BLOCK} with a sidecar"] * tall + [
            f"{name} = {part} does not divide {whole}"
            for name, part, whole in (
                ("superblocks", self.superblocks, weight.superblocks),
                ("batch", self.batch, m),
                *(("rows", self.rows, padded(rows)) for rows in weight.rows),
            )
            if whole % part
        ]

    def check(self, weight: TritonWeight, m: int) -> None:
        """ValueError unless the blocks divide the padded weight and m rows of x; batch 1 is for one row."""
        misfits = self.misfits(weight, m)
        if self.batch == 1 and m > 1:
            misfits.append(f"batch = 1 is for one row of x, not {m}")
        if misfits:
            raise ValueError(f"{self}: {', '.join(misfits)}")


def batch_of(m: int) -> int:
    """Rows of x that a program computes of m."""
    return 1 if m == 1 else next((size for size in (8, 16, 32) if m <= size), 64)


def configuration(weight: TritonWeight, m: int, matrices: int = 1) -> Blocks:
    """Blocks for m rows of x on the device that code is traced for: those of its table for this shape, where
    it has them and they fit, else the heuristic's. A table is of launches with one matrix: with several of a
    stack it is not asked."""
    if matrices > 1:
        return heuristic(weight, m, matrices)
    batch = batch_of(m)
    known = table(target_device().device_kind).get(shape_key(weight), {}).get(batch)
    fits = known is not None and not known.misfits(weight, batch)
    return known if known is not None and fits else heuristic(weight, m)


def shape_key(weight: TritonWeight) -> str:
    """A weight's padded shape, as tables write it."""
    return f"{weight.padded_rows}x{weight.superblocks * SUPERBLOCK}"


def table_path(device_kind: str, folder: Path = TABLES) -> Path:
    """Where the table of a kind of device lies."""
    return folder / f"{device_kind.replace(' ', '_').replace('/', '_')}.json"


@cache
def table(device_kind: str) -> dict[str, dict[int, Blocks]]:
    """Tuned blocks by padded shape and batch: of the user's folder, else the device's own, else those of its
    kin; empty for a kind of device of which neither it nor its kin has been tuned."""
    known, names = KIN
    kin = (
        [kind for kind in known if kind != device_kind] if any(name in device_kind for name in names) else []
    )
    paths = [table_path(kind) for kind in (*kin, device_kind)]
    if FOLDER_VARIABLE in os.environ:
        paths.append(table_path(device_kind, Path(os.environ[FOLDER_VARIABLE])))
    tuned: dict[str, dict[int, Blocks]] = {}
    for path in filter(Path.exists, paths):
        for shape, batches in json.loads(path.read_text(encoding="utf-8"))["blocks"].items():
            blocks = {int(batch): Blocks(**found, batch=int(batch)) for batch, found in batches.items()}
            tuned[shape] = tuned.get(shape, {}) | blocks
    return tuned


def heuristic(weight: TritonWeight, m: int, matrices: int = 1) -> Blocks:
    """A configuration for m rows of x on the device that code is traced for: what the search on an H100 found
    for most shapes. With several matrices in a launch each is cut into fewer programs."""
    if m == 1:
        # With groups of 32 the fewer instructions of taller programs fit the registers.
        rows = 64 if weight.group == 32 and weight.padded_rows > 8192 else 32
        superblocks = _longest_sum(weight, matrices * weight.padded_rows // rows, WAVE)
        # Two superblocks are on their way from memory while one is multiplied.
        return Blocks(rows=rows, superblocks=superblocks, warps=2, stages=3)
    batch = batch_of(m)
    rows, warps = (64, 2) if batch == 16 and weight.group == 32 else (32, 2)
    if batch > 16:
        wide = all(padded(each) % 128 == 0 for each in weight.rows)
        # Hopper multiplies in groups of four warps; elsewhere sums of four warps overflow the registers.
        rows, warps = (128, 4 if is_hopper(target_device()) else 8) if wide else (64, 4)
    programs = weight.padded_rows // rows * ceil_div(m, batch)
    superblocks = _longest_sum(weight, programs, WAVE * 2 // 3 if warps == 2 else WAVE // 3)
    return Blocks(rows=rows, superblocks=superblocks, warps=warps, batch=batch)


def _longest_sum(weight: TritonWeight, programs: int, enough: int) -> int:
    """Superblocks of a program, as many as leave enough programs, where each of `programs` is cut along K."""
    divisors = [d for d in range(weight.superblocks, 0, -1) if weight.superblocks % d == 0]
    return next((d for d in divisors if programs * (weight.superblocks // d) >= enough), 1)


def candidates(weight: TritonWeight, batch: int) -> list[Blocks]:
    """Configurations worth timing, the heuristic's first."""
    cuts = {1: ((32, 2), (64, 2), (64, 4)), 8: ((32, 2), (64, 2)), 16: ((32, 2), (64, 2))}
    found = [heuristic(weight, batch)]
    sums = [count for count in range(1, LONGEST_SUM + 1) if weight.superblocks % count == 0]
    for rows, warps in cuts.get(batch, ((64, 2), (64, 4), (128, 4))):
        for superblocks in sums:
            for stages in (2, 3, 4) if batch == 1 else (2, 3):
                blocks = Blocks(rows=rows, superblocks=superblocks, warps=warps, stages=stages, batch=batch)
                programs = weight.padded_rows // rows * (weight.superblocks // superblocks)
                few = superblocks > 1 and programs < WAVE // 5
                if blocks not in found and not blocks.misfits(weight, batch) and not few:
                    found.append(blocks)
    return found
