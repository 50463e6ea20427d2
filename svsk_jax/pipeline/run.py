"""An unfinished quantization on disk: what is finished of it is there to go on from, whatever ended it.

.<output>.unfinished/run.json            the run's identity
.<output>.unfinished/text.safetensors    chunks of calibration text
.<output>.unfinished/statistics          what calibration measured, once it is complete
.<output>.unfinished/options             options of each layer's linears
.<output>.unfinished/handover            layers that other processes quantized, until they are stored
.<output>.unfinished/drafts              layers before polish, where there is any
.<output>.unfinished/model               what takes the output's name at the end
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svsk_jax.calibration.store import MANIFEST
from svsk_jax.pipeline.identity import differences
from svsk_jax.storage.atomic import check_output, place, write_json
from svsk_jax.storage.checkpoint import MARKER, ModelWriter
from svsk_jax.storage.handover import Handover

IDENTITY = "run.json"
KEPT = "what is finished is kept"
"""How the note begins that an exception gets where `--resume` can go on."""


class Run:
    """The parts of an unfinished run; `unfinished_run` makes one."""

    def __init__(self, output: Path):
        self.output = output.absolute()
        self.folder = run_folder(output)
        self.text = self.folder / "text.safetensors"
        self.statistics = self.folder / "statistics"
        self.options = self.folder / "options"
        self.handover = Handover(self.folder / "handover")
        self.drafts = ModelWriter(self.folder / "drafts")
        self.model = ModelWriter(self.folder / "model")

    @property
    def has_statistics(self) -> bool:
        """Whether calibration is complete."""
        return (self.statistics / MANIFEST).is_file()

    @property
    def holds_work(self) -> bool:
        """Whether going on from here would save anything that takes long."""
        measured = self.has_statistics or any(self.options.glob("*.safetensors"))
        return measured or self.drafts.layers() > 0 or self.model.layers() > 0

    def finish(self) -> None:
        """Give the model its name and remove the rest."""
        place(self.model.folder, self.output)
        discard(self.folder)


def run_folder(output: Path) -> Path:
    """Where the unfinished run for `output` lies."""
    output = output.absolute()
    return output.parent / f".{output.name}.unfinished"


def discard(folder: Path) -> None:
    """Remove a run; one that is cut short in this is not taken for a run."""
    (folder / IDENTITY).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def unfinished_run(
    output: Path, identity: Mapping[str, Any], *, overwrite: bool, resume: bool
) -> Iterator[Run]:
    """The run for `output`: a new one, or with `resume` the one that is there. When the block ends early what
    is finished stays, unless it is no more than text; the exception gets a note that says so.

    Args:
        output: the folder that the run makes; to be locked by the caller.
        identity: from `run_identity`.
        overwrite: replace a finished model in `output`, and without `resume` start over.
        resume: go on with an unfinished run, if there is one.

    Raises:
        FileExistsError: a finished or an unfinished output is in the way.
        ValueError: the unfinished run has another identity; says in what they differ.
    """
    run = Run(output)
    begun = _read_identity(run.folder)
    if begun is not None and not (overwrite or resume):
        raise FileExistsError(
            f"output {output}: an unfinished run is kept in {run.folder}; give --resume to go on with it, "
            "--overwrite to start over, or another --output"
        )
    check_output(output, overwrite, MARKER)
    if begun is not None and resume and begun != identity:
        raise ValueError(
            f"--resume: the unfinished run for {output} differs from this one: "
            f"{'; '.join(differences(begun, identity))}. Run what it was started with, or start over with "
            "--overwrite in place of --resume, or give another --output"
        )
    try:
        if begun is None or not resume:
            _start_over(run.folder, identity)
        yield run
    except BaseException as error:
        if run.holds_work:
            error.add_note(f"{KEPT} in {run.folder}: go on with the same command and --resume")
        else:
            discard(run.folder)
        raise


def _start_over(folder: Path, identity: Mapping[str, Any]) -> None:
    """An empty run in place of what is there; nothing, when an interrupt or a full disk comes between."""
    try:
        discard(folder)
        folder.mkdir()
        write_json(folder / IDENTITY, identity)
    except BaseException:
        discard(folder)
        raise


def _read_identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the run that is there; None where there is none that could be gone on with."""
    try:
        return json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
