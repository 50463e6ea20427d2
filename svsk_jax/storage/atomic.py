"""Output that appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svsk_jax.storage.durable import rename, sync_tree
from svsk_jax.storage.lock import locked


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file beside `path`, sync it, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        rename(Path(name), path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_output(output: Path, overwrite: bool, marker: str) -> None:
    """Refuse, before any work, an output folder that cannot be written.

    Args:
        output: the folder to make.
        overwrite: replace an existing one, but only if it holds `marker`, so that a mistyped path costs
            nothing.
        marker: a path within the folder that only our own outputs have.

    Raises:
        FileExistsError: says what stands in the way and what to do.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"output {output} exists already; give --overwrite to replace it, or another --output"
        )
    if not (output / marker).exists():
        raise FileExistsError(
            f"output {output} is not something svsk wrote, so --overwrite does not replace it; give "
            "another --output"
        )


@contextmanager
def output_folder(output: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends well, and is removed when
    it does not. What a process that was killed left of one is removed first.

    Raises:
        FileExistsError: `output` exists and is not to be overwritten, or another run is writing to it.
    """
    output = output.absolute()
    with locked(output):
        recover(output)
        check_output(output, overwrite, marker)
        partial = partial_folder(output)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            place(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def partial_folder(output: Path) -> Path:
    """Where `output_folder` has the folder while it is being made."""
    output = output.absolute()
    return output.parent / f".{output.name}.partial"


def place(partial: Path, output: Path) -> None:
    """Sync a finished folder and give it the name `output`; what had that name before is removed."""
    sync_tree(partial)
    if output.exists():
        rename(output, _replaced(output))
    rename(partial, output)
    shutil.rmtree(_replaced(output), ignore_errors=True)


def recover(output: Path) -> None:
    """Put right what a `place` that was cut short left: the old folder comes back, unless the new one is
    there."""
    replaced = _replaced(output)
    if replaced.exists() and not output.exists():
        rename(replaced, output)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(output: Path) -> Path:
    return output.parent / f".{output.name}.replaced"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
