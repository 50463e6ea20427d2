"""The `svsk` command."""

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from typing import Any

import tyro
from rich.markup import escape

from svsk_jax.cli.autotune import Autotune
from svsk_jax.cli.calibrate import Calibrate
from svsk_jax.cli.common import Verb, console
from svsk_jax.cli.convert import Convert
from svsk_jax.cli.demo import Demo
from svsk_jax.cli.evaluate import Evaluate
from svsk_jax.cli.export import Export
from svsk_jax.cli.generate import Generate
from svsk_jax.cli.inspect import Inspect
from svsk_jax.cli.plan import PlanRun
from svsk_jax.cli.quantize import Quantize
from svsk_jax.cli.tune_kernels import TuneKernels
from svsk_jax.cli.verify import Verify
from svsk_jax.parallel import distributed
from svsk_jax.pipeline.run import KEPT
from svsk_jax.storage.atomic import write_json

VERBS: dict[str, type[Verb]] = {
    "convert": Convert,
    "plan": PlanRun,
    "calibrate": Calibrate,
    "quantize": Quantize,
    "autotune": Autotune,
    "evaluate": Evaluate,
    "generate": Generate,
    "inspect": Inspect,
    "verify": Verify,
    "export": Export,
    "demo": Demo,
    "tune-kernels": TuneKernels,
}
CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
USER_ERROR, OTHER_ERROR = 2, 1


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run the verb and exit: 0 when done, 2 for the user's mistake, 1 for anything
    else, damage that `verify` finds among it."""
    command = tyro.extras.subcommand_cli_from_dict(
        VERBS,
        prog="svsk",
        description="Quantize large language models to about 4.5 bits per weight, and run them.",
        args=sys.argv[1:] if arguments is None else arguments,
        config=CONFIG,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _interrupt)
        sys.unraisablehook = _raise_again
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    warnings.showwarning = _show_warning
    # It has a handler of its own; by the root's, each retry would be told twice.
    logging.getLogger("huggingface_hub").propagate = False
    warnings.filterwarnings("ignore", module=r"(orbax|transformers|datasets|huggingface_hub|jax|flax)\b.*")
    try:
        result = command.run()
        if command.json is not None and distributed.is_lead():
            write_json(command.json, result)
        status = command.status(result)
        distributed.barrier()
    except BaseException as error:
        if command.debug:
            traceback.print_exc()
        status, message = explain(error)
        console.quiet = False
        if message:
            console.print(f"[bold red]error:[/] {escape(_printable(message))}", soft_wrap=True)
        distributed.fail(status, message)
    if status:
        sys.exit(status)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and message for an error that ended a verb."""
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else OTHER_ERROR), ""
    # A run within another tells first, and the outer one how to go on.
    kept = next((note for note in getattr(error, "__notes__", [])[::-1] if note.startswith(KEPT)), None)
    status, message = _explain(error, kept or "no output was left behind")
    return status, message if kept is None or kept in message else f"{message}; {kept}"


def _explain(error: BaseException, left: str) -> tuple[int, str]:
    """Exit status and message, given what the run left."""
    if isinstance(error, KeyboardInterrupt):
        return OTHER_ERROR, f"interrupted; {left}"
    message = str(error) or type(error).__name__
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or "No space left on device" in message:
        return (
            OTHER_ERROR,
            f"the disk is full: free some space or give another --output; {left} ({message.splitlines()[0]})",
        )
    if isinstance(
        error, (ValueError, FileExistsError, FileNotFoundError, NotADirectoryError, NotImplementedError)
    ):
        return USER_ERROR, message
    if isinstance(error, OSError):
        return OTHER_ERROR, message
    return (
        OTHER_ERROR,
        f"{type(error).__name__}: {message.splitlines()[0]} (an error in svsk; --debug shows where)",
    )


def _printable(text: str) -> str:
    """The text with control characters spelled out: names in damaged files may hold any."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


class _Interrupted(KeyboardInterrupt):
    """A type of our own: a plain KeyboardInterrupt that passes through `exec`, which dataclasses and others
    call, makes CPython end the process by SIGINT, whatever its exit status."""


def _interrupt(number: int, frame: Any) -> None:
    raise _Interrupted


def _raise_again(unraisable: Any) -> None:
    """Python drops what is raised in a finalizer or a callback of garbage collection: interrupt once more,
    a little later."""
    if unraisable.exc_type is _Interrupted:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    elif not _is_of_a_failed_restore(unraisable):
        sys.__unraisablehook__(unraisable)


def _is_of_a_failed_restore(unraisable: Any) -> bool:
    """Reads that orbax left in flight, whose failure was reported: they find their event loop closed, or fail
    unawaited."""
    code = getattr(unraisable.object, "cr_code", None)
    return str(unraisable.exc_value) == "Event loop is closed" or (
        code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
    )


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    console.print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)
