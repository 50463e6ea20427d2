"""`svsk verify`."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro
from rich.markup import escape

from svsk_jax import storage
from svsk_jax.calibration.store import holds_statistics
from svsk_jax.calibration.verify import verify_statistics
from svsk_jax.cli.common import Verb, console, progress_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(Verb):
    """Check every tensor of a model or of statistics that svsk wrote against the SHA-256 stored with it. Exit
    status: 0 if all are whole, 1 if any is damaged, 2 if there is nothing to check or to check by."""

    folder: tyro.conf.Positional[Path]
    """Folder of the model, or of statistics."""

    def run(self) -> dict[str, Any]:
        """Verify."""
        with progress_bar("verify") as move:
            if holds_statistics(self.folder):
                found = verify_statistics(self.folder, lambda done, total: move(done, total, "files"))
            else:
                found = storage.verify(self.folder, lambda done, total: move(done, total, "checkpoints"))
        for name, reason in found.damaged.items():
            console.print(f"[bold red]damaged:[/] {escape(f'{name}: {reason}')}", soft_wrap=True)
        if found.damaged:
            console.print(f"{self.folder}: {len(found.damaged)} of {found.tensors} tensors are damaged")
        else:
            console.print(f"{self.folder}: {found.tensors} tensors, all as they were written")
        return {"folder": str(self.folder), **dataclasses.asdict(found)}

    def status(self, result: dict[str, Any]) -> int:
        """1 if a tensor is damaged."""
        return int(bool(result["damaged"]))
