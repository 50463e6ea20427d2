"""What all verbs share: flags, progress, errors."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from svsk_jax import pipeline

console = Console(stderr=True)
"""Progress, tables and errors; standard output is for generated text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verb(ABC):
    """A command."""

    json: Path | None = None
    """Write the result as JSON to this file."""
    debug: bool = False
    """Show the traceback of an error."""

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Do the work; returns the result as JSON data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model."""

    model: Annotated[str, tyro.conf.arg(aliases=("-m",))]
    """Hub id, folder (safetensors, .bin, or one that svsk wrote) or file (.gguf, .safetensors, .bin)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where to write."""

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Folder to make."""
    overwrite: bool = False
    """Replace an output folder of an earlier run."""


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that is moved by calling it with (done, total, detail)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None, detail="")
        yield lambda done, total, detail="": progress.update(task, completed=done, total=total, detail=detail)


@contextmanager
def layer_progress(title: str) -> Iterator[pipeline.OnProgress]:
    """A bar over decoder layers, with the layer error so far."""
    with progress_bar(title) as move:

        def on_progress(event: pipeline.Progress) -> None:
            detail = "" if event.error is None else f"layer error {event.error:.2e}"
            move(event.layer, event.layers, detail)

        yield on_progress
