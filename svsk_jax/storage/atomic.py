"""Output that appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file beside `path`, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
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
    it does not."""
    check_output(output, overwrite, marker)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.partial-"))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        if output.exists():
            discarded = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.replaced-"))
            os.replace(output, discarded / "old")
            os.replace(partial, output)
            shutil.rmtree(discarded)
        else:
            os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
