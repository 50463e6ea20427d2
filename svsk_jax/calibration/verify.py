"""Whether the arrays of statistics are what was written."""

from collections.abc import Callable
from pathlib import Path

from svsk_jax.calibration.store import MANIFEST, Statistics
from svsk_jax.calibration.stored_arrays import AGAIN, DIFFERS, StoredArrays
from svsk_jax.storage.verify import Verification


def holds_statistics(folder: Path) -> bool:
    """Whether `folder` is one that `svsk calibrate` finished."""
    return (folder / MANIFEST).is_file()


def verify_statistics(folder: Path, on_file: Callable[[int, int], None] | None = None) -> Verification:
    """Read every array of statistics and compare its SHA-256 with the one stored with it.

    Args:
        folder: of the statistics.
        on_file: called with files done and their number.

    Raises:
        ValueError: no statistics, those of another svsk-jax, or a damaged manifest.
    """
    files = Statistics.open(folder).manifest.get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{folder}: {MANIFEST} is damaged; {AGAIN}")
    tensors, damaged = 0, {}
    for done, file in enumerate(files, start=1):
        try:
            arrays = StoredArrays(folder / file)
        except ValueError as error:
            damaged[file] = str(error)
            continue
        for name in arrays:
            tensors += 1
            try:
                differs = arrays.differs(name)
            except ValueError as error:
                damaged[f"{file}: {name}"] = str(error)
                continue
            if differs:
                damaged[f"{file}: {name}"] = DIFFERS
        if on_file:
            on_file(done, len(files))
    return Verification(tensors=tensors, damaged=damaged)
