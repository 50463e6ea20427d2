"""An unfinished calibration or quantization on disk: what is finished of it is there to go on from, whatever
ended it.

.<output>.unfinished/run.json            the run's identity

of a calibration:
.<output>.unfinished/text.safetensors    chunks of calibration text
.<output>.unfinished/walk                residual streams or gradients at the layer that it has come to
.<output>.unfinished/statistics          what takes the output's name at the end

of a quantization:
.<output>.unfinished/statistics          what calibration measured, which beside it is a run of its own
.<output>.unfinished/options             options of each layer's linears
.<output>.unfinished/handover            layers that other processes quantized, until they are stored
.<output>.unfinished/drafts              layers before polish, where there is any
.<output>.unfinished/model               what takes the output's name at the end
"""

import json
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from svsk_jax.calibration.store import MANIFEST, holds_statistics
from svsk_jax.parallel.distributed import barrier, is_lead
from svsk_jax.pipeline.identity import differences
from svsk_jax.storage.atomic import check_output, place, write_json
from svsk_jax.storage.checkpoint import MARKER, ModelWriter
from svsk_jax.storage.durable import make_folder
from svsk_jax.storage.handover import Handover

IDENTITY = "run.json"
KEPT = "what is finished is kept"
"""How the note begins that an exception gets where `--resume` can go on."""


class Unfinished(ABC):
    """The parts of a run that makes the folder `output`.

    Args:
        output: the folder.
        made: name of the part that takes its name at the end.
        marker: a path within it that only our own outputs have.
    """

    def __init__(self, output: Path, made: str, marker: str):
        self.output, self.marker = output.absolute(), marker
        self.folder = run_folder(output)
        self.made = self.folder / made

    @property
    @abstractmethod
    def holds_work(self) -> bool:
        """Whether going on from here would save anything that takes long."""

    def identity(self) -> dict[str, Any] | None:
        """Of the run that is there; None where there is none that could be gone on with."""
        try:
            return json.loads((self.folder / IDENTITY).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def finish(self) -> None:
        """Give what was made its name and remove the rest."""
        place(self.made, self.output)
        discard(self.folder)


R = TypeVar("R", bound=Unfinished)


class CalibrationRun(Unfinished):
    """A calibration.

    Args:
        output: the folder that it makes.
    """

    def __init__(self, output: Path):
        super().__init__(output, "statistics", MANIFEST)
        self.text = self.folder / "text.safetensors"
        self.walk = self.folder / "walk"

    @property
    def holds_work(self) -> bool:
        """Whether a layer is finished."""
        return any(self.walk.glob("*.bin"))


class Run(Unfinished):
    """A quantization.

    Args:
        output: the folder that it makes.
    """

    def __init__(self, output: Path):
        super().__init__(output, "model", MARKER)
        self.statistics = self.folder / "statistics"
        self.calibration = CalibrationRun(self.statistics)
        self.options = self.folder / "options"
        self.handover = Handover(self.folder / "handover")
        self.drafts = ModelWriter(self.folder / "drafts")
        self.model = ModelWriter(self.made)

    @property
    def has_statistics(self) -> bool:
        """Whether calibration is complete."""
        return holds_statistics(self.statistics)

    def is_quantized(self, layers: Iterable[int], polish: bool) -> bool:
        """Whether these layers are stored, or left for the lead to store; with polish, as they are before
        it."""
        writer = self.drafts if polish else self.model
        return all(writer.has(index) or self.handover.has(index) for index in layers)

    @property
    def holds_work(self) -> bool:
        """Whether a layer is calibrated, measured or quantized."""
        measured = (
            self.has_statistics or self.calibration.holds_work or any(self.options.glob("*.safetensors"))
        )
        return measured or self.drafts.layers() > 0 or self.model.layers() > 0


def run_folder(output: Path) -> Path:
    """Where the unfinished run for `output` lies."""
    output = output.absolute()
    return output.parent / f".{output.name}.unfinished"


def discard(folder: Path) -> None:
    """Remove a run; one that is cut short in this is not taken for a run."""
    (folder / IDENTITY).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def unfinished_run(run: R, identity: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Iterator[R]:
    """Begin a run, or with `resume` go on with what is there of it. When the block ends early what is
    finished stays, unless it is no more than text; the exception gets a note that says so. With several
    processes all call this, and the lead alone looks at files.

    Args:
        run: what is to be made; its output to be locked by the caller.
        identity: from `pipeline.identity`.
        overwrite: replace a finished output, and start over unless `resume` can go on; a run of something
            else is then discarded with a warning.
        resume: go on with an unfinished run, if there is one.

    Raises:
        FileExistsError: a finished or an unfinished output is in the way.
        ValueError: the unfinished run has another identity; says in what they differ.
    """
    if not is_lead():
        barrier()
        yield run
        return
    begun = run.identity()
    if begun is not None and not (overwrite or resume):
        raise FileExistsError(
            f"output {run.output}: an unfinished run is kept in {run.folder}; give --resume to go on with "
            "it, --overwrite to start over, or another --output"
        )
    check_output(run.output, overwrite, run.marker)
    if begun is not None and resume and not overwrite and begun != identity:
        raise ValueError(
            f"--resume: the unfinished run for {run.output} differs from this one: "
            f"{'; '.join(differences(begun, identity))}. Run what it was started with, or start over with "
            "--overwrite, or give another --output"
        )
    if begun is not None and resume and begun != identity:
        warnings.warn(
            f"the unfinished run for {run.output} differs from this one and is discarded: "
            f"{'; '.join(differences(begun, identity))}",
            stacklevel=3,
        )
    try:
        if begun is None or not resume or begun != identity:
            _start_over(run.folder, identity)
        barrier()
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
        make_folder(folder)
        write_json(folder / IDENTITY, identity)
    except BaseException:
        discard(folder)
        raise
