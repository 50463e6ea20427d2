"""Kill `svsk quantize` and `svsk calibrate` with SIGKILL at random moments and resume them until they are
finished, again and again; what they make must be what a run makes that nothing disturbed, bit by bit.

`make faults` is 50 kills of the whole default recipe and 50 of a calibration by itself;
tests/faults/test_kills.py is a few of short ones.
"""

import argparse
import collections
import contextlib
import dataclasses
import filecmp
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import TINY, write_checkpoint  # noqa: E402

from svsk_jax.calibration.store import MANIFEST  # noqa: E402
from svsk_jax.calibration.walk_state import START, WalkState  # noqa: E402
from svsk_jax.pipeline.run import CalibrationRun, Run  # noqa: E402
from svsk_jax.storage import SavedModel  # noqa: E402

SHORT = ("--recipe", "classic-r8", "--calib", "documentation", "--chunks", "16", "--chunk-length", "32")
WHOLE = (
    *("--recipe", "svsk-r16", "--bits", "5.5", "--polish", "2"),
    *("--calib", "documentation", "self", "--chunks", "16", "--chunk-length", "32", "--fisher-chunks", "8"),
)
STATISTICS = (
    "--calib",
    "documentation",
    "self",
    "--chunks",
    "16",
    "--chunk-length",
    "32",
    "--fisher-chunks",
    "8",
)
Verb = Literal["quantize", "calibrate"]
COMMANDS: tuple[tuple[Verb, tuple[str, ...], float], ...] = (
    ("quantize", WHOLE, 1.0),
    ("calibrate", STATISTICS, 0.2),
)
"""Flags of each, and mean seconds before a kill."""
LIMIT = 600
"""Seconds after which a run hangs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: `seconds` after a run has finished `steps` more parts (text, a layer's statistics or
    options, or a layer)."""

    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """A command to disturb, and what it makes when left alone. Those in one folder compile once for all."""

    work: Path
    flags: tuple[str, ...]
    verb: Verb = "quantize"
    layers: int = 3

    def start(self, name: str) -> subprocess.Popen[str]:
        """The command, with its output in `work/<name>`."""
        command = [sys.executable, "-m", "svsk_jax.cli", self.verb, "--model", str(self.work / "model")]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "HF_HUB_OFFLINE": "1",
            # Compiling takes longer than everything else here.
            "JAX_COMPILATION_CACHE_DIR": str(self.work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen(
            [*command, "--output", str(self.work / name), "--resume", *self.flags],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def reference(self) -> str:
        """What a run makes that nothing disturbs."""
        return f"{self.verb}-reference"

    def undisturbed(self) -> None:
        """Make the model, and the reference from it."""
        (self.work / "model").mkdir(exist_ok=True)
        write_checkpoint(self.work / "model", 0, dataclasses.replace(TINY, num_layers=self.layers))
        _finish(self.start(self.reference))

    def disturb(self, name: str, moments: Iterator[Moment]) -> list[str]:
        """Run to the end, with a kill at each moment that comes before it, and compare.

        Returns:
            What each kill found finished.
        """
        found: list[str] = []
        while (moment := next(moments, None)) is not None:
            process = self.start(name)
            self._wait_for(moment, name, process)
            process.kill()
            _, message = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, message
            found.append(self._reached(name))
        _finish(self.start(name))
        same = assert_same if self.verb == "quantize" else assert_same_statistics
        same(self.work / self.reference, self.work / name)
        assert list(self.work.glob(f".{name}.*")) == []
        shutil.rmtree(self.work / name)
        return found

    def _wait_for(self, moment: Moment, name: str, process: subprocess.Popen[str]) -> None:
        """Wait until a moment of the run, or its end. It has begun when the lock says so, which a killed
        one leaves behind; imports take most of the time until then."""
        lock = self.work / f".{name}.lock"
        while process.poll() is None and not _says(lock, f"process {process.pid} on "):
            time.sleep(0.01)
        steps, reached = 0, self._reached(name)
        while process.poll() is None and steps < moment.steps:
            now = self._reached(name)
            steps, reached = steps + (now != reached), now
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment.seconds)

    def _reached(self, name: str) -> str:
        """The last part of a run that is finished."""
        output = self.work / name
        return _quantized(output) if self.verb == "quantize" else _calibrated(CalibrationRun(output))


def random_moments(rng: random.Random, seconds: float) -> Iterator[Moment]:
    """Moments without end: after up to 4 steps, and a time whose mean is `seconds`."""
    while True:
        yield Moment(steps=rng.randint(0, 4), seconds=rng.expovariate(1 / seconds))


def _says(path: Path, text: str) -> bool:
    try:
        return text in path.read_text()
    except FileNotFoundError:
        return False


def _finish(process: subprocess.Popen[str]) -> None:
    _, message = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, message


def _calibrated(run: CalibrationRun) -> str:
    if run.output.exists():
        return "end"
    place = WalkState(run.walk).place()
    if place != START:
        return f"{place.kind} {place.layer}"
    return "text" if run.text.is_file() else "nothing"


def _quantized(output: Path) -> str:
    run = Run(output)
    try:
        options = len(list(run.options.glob("*.safetensors")))
        drafts, layers = run.drafts.layers(), run.model.layers()
    except FileNotFoundError:  # a folder was removed while it was looked at, as they are at the end
        return "end"
    if output.exists():
        return "end"
    if drafts or layers:
        return f"layer {layers or drafts}{' polished' if drafts and layers else ''}"
    if options:
        return f"options {options}"
    return "statistics" if run.has_statistics else _calibrated(run.calibration)


def assert_same(expected: Path, actual: Path) -> None:
    """Every tensor, all metadata and every file beside the tensors are the same."""
    models = SavedModel(expected), SavedModel(actual)
    for model in models:
        assert model.config.num_layers == models[0].config.num_layers
    assert models[0].metadata == models[1].metadata
    pairs = [tuple(model.outer(jnp.float32) for model in models)]
    for index in range(models[0].config.num_layers):
        assert models[0].layer_metadata(index) == models[1].layer_metadata(index)
        pairs.append(tuple(model.layer(index, jnp.float32) for model in models))
    for pair in pairs:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *pair)
    for part in ("svsk", "."):
        names = sorted(path.name for path in (expected / part).iterdir())
        assert names == sorted(path.name for path in (actual / part).iterdir())
    files = [name for name in names if (expected / name).is_file()]
    assert filecmp.cmpfiles(expected, actual, files, shallow=False) == (files, [], [])


def assert_same_statistics(expected: Path, actual: Path) -> None:
    """Every file is the same, but for the wall time in the manifest."""
    names = sorted(path.name for path in expected.iterdir())
    assert names == sorted(path.name for path in actual.iterdir())
    manifests = [json.loads((folder / MANIFEST).read_text()) for folder in (expected, actual)]
    for manifest in manifests:
        del manifest["seconds"]
    assert manifests[0] == manifests[1]
    names.remove(MANIFEST)
    assert filecmp.cmpfiles(expected, actual, names, shallow=False) == (names, [], [])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    verbs = [verb for verb, *_ in COMMANDS]
    parser.add_argument("--verbs", nargs="+", choices=verbs, default=verbs)
    arguments = parser.parse_args()
    for verb, flags, seconds in COMMANDS:
        if verb in arguments.verbs:
            with tempfile.TemporaryDirectory() as folder:
                faults = Faults(work=Path(folder), flags=flags, verb=verb)
                _kill(faults, arguments.kills, random.Random(arguments.seed), seconds)


def _kill(faults: Faults, times: int, rng: random.Random, seconds: float) -> None:
    """Kill a command so many times, at moments a mean of `seconds` apart; prints what it finds."""
    kills: collections.Counter[str] = collections.Counter()
    faults.undisturbed()
    runs = 0
    while kills.total() < times:
        moments = itertools.islice(random_moments(rng, seconds), times - kills.total())
        found = faults.disturb(f"run-{runs}", moments)
        runs += 1
        kills.update(found)
        print(f"run {runs}: killed after {', '.join(found) or 'its end'}; the same bytes", flush=True)
    print(
        f"{faults.verb}: {kills.total()} kills in {runs} runs, and every result the same bytes as undisturbed"
    )
    print("killed after: " + ", ".join(f"{name} {count} ×" for name, count in kills.most_common()))


if __name__ == "__main__":
    main()
