"""The decode step of this tree beside another commit's, in one run: two processes on one GPU take turns.

    git worktree add ../before COMMIT
    python -m benchmarks.speed.beside ../before [--models Qwen3-8B] [--texts 1 16 64] [--layers 8]

Runs on several machines differ by 2 % and more, steps in turn by a few tenths. The models are those of
`decode_step`, of a few layers and a small vocabulary; times are by the clock, of bursts one after another,
with what the head takes. Of each round the two times are compared: the table has the medians, and the
quartiles of the difference. The other tree needs a `decode_step` with the same functions.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

LABELS = ("other", "this")
ROUNDS, CALLS = 12, 12
VOCABULARY = 8192
CONTEXT = 1000
TREE = Path(__file__).parents[2]
TINY = {"hidden_size": 256, "intermediate_size": 256, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
"""Of a model that a test runs in interpret mode."""
POLL = 0.0005
"""Seconds between two looks for the other process."""


class Turns:
    """Of two processes that meet at files in a folder."""

    def __init__(self, folder: Path, label: str):
        self.folder, self.label, self.met = folder, label, 0

    def meet(self) -> None:
        """Wait until the other has met as often."""
        self.met += 1
        (self.folder / f"{self.label}-{self.met}").touch()
        while not all((self.folder / f"{label}-{self.met}").exists() for label in LABELS):
            time.sleep(POLL)


def work(label: str, folder: Path) -> None:
    """One of the processes: what the folder's `cases.json` says, with the modules that it finds."""
    import jax
    import numpy as np

    from benchmarks.clock import median_seconds
    from benchmarks.speed import decode_step
    from svsk_jax.known_models import KNOWN
    from svsk_jax.runtime import steps
    from svsk_jax.runtime.sampling import SamplingConfig

    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    key, numbers = jax.random.key(0), SamplingConfig().numbers
    models, programs = {}, []
    for case in cases["cases"]:
        small = TINY if cases["tiny"] else {}
        config = dataclasses.replace(
            KNOWN[case["model"]], num_layers=cases["layers"], vocab_size=cases["vocabulary"], **small
        )
        if case["model"] not in models:
            models[case["model"]] = decode_step.decoder(config, cases["form"])
        leaves, structure = jax.tree.flatten(models[case["model"]])

        def burst(leaves: Any, state: Any, structure: Any = structure) -> Any:
            tokens, after = steps.fused_steps(
                structure, leaves, state, key, numbers, greedy=True, interpret=cases["tiny"]
            )
            return tokens, after._replace(lengths=state.lengths)

        state = partial(decode_step.filled, config, case["texts"], cases["context"], fused=True)
        lowered = jax.jit(burst, donate_argnums=1).lower(leaves, jax.eval_shape(state))
        programs.append((leaves, lowered, state()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(lambda program: program[1].compile(), programs))
    held = [(run, leaves, state) for run, (leaves, _, state) in zip(compiled, programs, strict=True)]
    found: list[dict[str, Any]] = [{"us": []} for _ in held]

    def call(i: int) -> jax.Array:
        run, leaves, state = held[i]
        tokens, state = run(leaves, state)
        held[i] = run, leaves, state
        return tokens

    for i, each in enumerate(found):
        each["tokens"] = np.asarray(call(i)).tolist()
    turns = Turns(folder, label)
    turns.meet()
    for _ in range(cases["rounds"]):
        for whose in LABELS:
            if whose == label:
                for i, each in enumerate(found):
                    seconds = median_seconds(partial(call, i), repeats=1, calls=cases["calls"])
                    each["us"].append(1e6 * seconds / steps.BURST)
            turns.meet()
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "cases": found}
    (folder / f"{label}.json").write_text(json.dumps(result), encoding="utf-8")


def run_both(other: Path, cases: dict[str, Any]) -> dict[str, Any]:
    """What the two processes found, by label.

    Raises:
        RuntimeError: one of them failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
        children: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for label, tree in zip(LABELS, (other, TREE), strict=True):
                paths = [str(tree.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
                environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
                environment["PYTHONPATH"] = os.pathsep.join(paths)
                # -P: this file's folder is not to be searched for modules.
                command = [sys.executable, "-P", __file__, "--work", label, str(folder)]
                with (folder / f"{label}.log").open("wb") as log:
                    children[label] = subprocess.Popen(
                        command, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
            # One that fails leaves the other waiting.
            while None in (states := [child.poll() for child in children.values()]) and not any(states):
                time.sleep(0.1)
            for label, child in children.items():
                if child.poll():
                    said = (folder / f"{label}.log").read_text(encoding="utf-8", errors="replace")
                    raise RuntimeError(f"the step of the {label} tree failed: {said[-2000:]}")
        finally:
            for child in children.values():
                child.kill()
                child.wait()
        return {label: json.loads((folder / f"{label}.json").read_text(encoding="utf-8")) for label in LABELS}


def table(cases: dict[str, Any], found: dict[str, Any]) -> str:
    """In Markdown: a row for each case."""
    lines = [
        "| model | texts | other, µs | this, µs | difference | quartiles | same tokens |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for case, other, this in zip(cases["cases"], *(found[label]["cases"] for label in LABELS), strict=True):
        differences = [b - a for a, b in zip(other["us"], this["us"], strict=True)]
        low, middle, high = statistics.quantiles(differences, n=4)
        same = "yes" if other["tokens"] == this["tokens"] else "no"
        lines.append(
            f"| {case['model']} | {case['texts']} | {statistics.median(other['us']):.1f} "
            f"| {statistics.median(this['us']):.1f} | {middle:+.1f} | {low:+.1f} to {high:+.1f} | {same} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, nargs="?", help="a checkout of another commit")
    parser.add_argument("--models", nargs="+", default=["Qwen3-8B", "Qwen3-4B", "Qwen3-0.6B"])
    parser.add_argument("--texts", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--form", default="svsk-r16")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a small model in interpret mode, without a GPU")
    parser.add_argument("--work", nargs=2, metavar=("LABEL", "FOLDER"), help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.work:
        work(flags.work[0], Path(flags.work[1]))
        return
    if flags.other is None or not (flags.other / "benchmarks" / "speed" / "decode_step.py").is_file():
        parser.error(f"{flags.other} is no checkout with benchmarks/speed/decode_step.py")
    tiny = flags.tiny
    cases = {
        "cases": [{"model": model, "texts": texts} for model in flags.models for texts in flags.texts],
        "form": flags.form,
        "layers": 1 if tiny else flags.layers,
        "vocabulary": 64 if tiny else VOCABULARY,
        "context": 20 if tiny else CONTEXT,
        "rounds": 2 if tiny else ROUNDS,
        "calls": 1 if tiny else CALLS,
        "tiny": tiny,
    }
    found = run_both(flags.other, cases)
    print(f"{found['this']['device']}, jax {found['this']['jax']}, {cases['layers']} layers, {flags.form}")
    print(table(cases, found))


if __name__ == "__main__":
    main()
