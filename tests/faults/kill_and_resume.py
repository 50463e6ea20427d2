"""Kill `svsk quantize` with SIGKILL at random moments and resume it until it is finished, again and again;
every finished model must be that of a run that nothing disturbed, bit by bit.

`make faults` is 50 kills of the whole default recipe; tests/faults/test_kills.py is a few of a short one.
"""

import argparse
import collections
import contextlib
import dataclasses
import filecmp
import itertools
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

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import TINY, write_checkpoint  # noqa: E402

from svsk_jax.pipeline.run import Run  # noqa: E402
from svsk_jax.storage import SavedModel  # noqa: E402

SHORT = ("--recipe", "classic-r8", "--calib", "documentation", "--chunks", "16", "--chunk-length", "32")
WHOLE = (
    *("--recipe", "svsk-r16", "--bits", "5.5", "--polish", "2"),
    *("--calib", "documentation", "self", "--chunks", "16", "--chunk-length", "32", "--fisher-chunks", "8"),
)
LIMIT = 600
"""Seconds after which a run hangs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: `seconds` after a run has finished `steps` more parts (text, statistics, options or a
    layer)."""

    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """A command to disturb, and what it makes when left alone."""

    work: Path
    flags: tuple[str, ...]
    layers: int = 3

    def start(self, name: str) -> subprocess.Popen[str]:
        """The command, with its output in `work/<name>`."""
        command = [sys.executable, "-m", "svsk_jax.cli", "quantize", "--model", str(self.work / "model")]
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

    def undisturbed(self) -> None:
        """Make the model, and the reference from it."""
        (self.work / "model").mkdir()
        write_checkpoint(self.work / "model", 0, dataclasses.replace(TINY, num_layers=self.layers))
        _finish(self.start("reference"))

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
            found.append(_reached(self.work / name))
        _finish(self.start(name))
        assert_same(self.work / "reference", self.work / name)
        assert list(self.work.glob(f".{name}.*")) == []
        shutil.rmtree(self.work / name)
        return found

    def _wait_for(self, moment: Moment, name: str, process: subprocess.Popen[str]) -> None:
        """Wait until a moment of the run, or its end. It has begun when the lock says so, which a killed
        one leaves behind; imports take most of the time until then."""
        lock = self.work / f".{name}.lock"
        while process.poll() is None and not _says(lock, f"process {process.pid} on "):
            time.sleep(0.01)
        steps, reached = 0, _reached(self.work / name)
        while process.poll() is None and steps < moment.steps:
            now = _reached(self.work / name)
            steps, reached = steps + (now != reached), now
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment.seconds)


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


def _reached(output: Path) -> str:
    """The last part of a run that is finished."""
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
    return "statistics" if run.has_statistics else "text" if run.text.is_file() else "nothing"


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    kills: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(work=Path(folder), flags=WHOLE)
        faults.undisturbed()
        runs = 0
        while kills.total() < arguments.kills:
            left = arguments.kills - kills.total()
            found = faults.disturb(f"run-{runs}", itertools.islice(random_moments(rng, 1.0), left))
            runs += 1
            kills.update(found)
            print(f"run {runs}: killed after {', '.join(found) or 'its end'}; the same bytes", flush=True)
    print(f"{kills.total()} kills in {runs} runs, and every model the same bytes as undisturbed")
    print("killed after: " + ", ".join(f"{name} {count} ×" for name, count in kills.most_common()))


if __name__ == "__main__":
    main()
