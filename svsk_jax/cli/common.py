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
    TaskID,
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

    def status(self, result: dict[str, Any]) -> int:
        """Exit status of a run with this result."""
        return 0


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
    """Replace an output folder of an earlier run, finished or not."""


def _bars() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that is moved by calling it with (done, total, detail)."""
    with _bars() as bars:
        task = bars.add_task(title, total=None, detail="")
        yield lambda done, total, detail="": bars.update(task, completed=done, total=total, detail=detail)


@contextmanager
def layer_progress() -> Iterator[pipeline.OnProgress]:
    """A bar over decoder layers for each stage of a run, with the layer error so far."""
    with _bars() as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(event: pipeline.Progress) -> None:
            detail = "" if event.error is None else f"layer error {event.error:.2e}"
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.layers, detail="")
            bars.update(tasks[event.stage], completed=event.layer, detail=detail)

        yield on_progress
