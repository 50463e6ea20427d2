"""Whether the arrays of statistics are what was written."""

from collections.abc import Callable
from pathlib import Path

from svsk_jax.calibration.store import MANIFEST, Statistics
from svsk_jax.calibration.stored_arrays import AGAIN, DIFFERS, StoredArrays
from svsk_jax.storage.verify import Verification


def verify_statistics(folder: Path, on_file: Callable[[int, int], None] | None = None) -> Verification:
    """Read every array of statistics and compare its SHA-256 with the one stored with it. The manifest, and
    what a layer notes of its experts, have none.

    Args:
        folder: of the statistics.
        on_file: called with files done and their number.

    Raises:
        ValueError: no statistics, those of another svsk-jax, or a damaged manifest.
    """
    files = Statistics.open(folder).manifest.get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{folder}: {MANIFEST} is damaged; {AGAIN}")
    tensors = 0
    damaged: dict[str, str] = {}
    for done, file in enumerate(files, start=1):
        read, found = _verify_file(folder / file)
        tensors += read
        damaged |= {f"{file}{where}": why for where, why in found.items()}
        if on_file:
            on_file(done, len(files))
    return Verification(tensors=tensors, damaged=damaged)


def _verify_file(path: Path) -> tuple[int, dict[str, str]]:
    """How many arrays a file has, and what is wrong with it, or with each."""
    try:
        arrays = StoredArrays(path)
    except ValueError as error:
        return 0, {"": str(error)}
    damaged = {}
    names = list(arrays)
    for name in names:
        try:
            if arrays.differs(name):
                damaged[f": {name}"] = DIFFERS
        except ValueError as error:
            damaged[f": {name}"] = str(error)
    return len(names), damaged
