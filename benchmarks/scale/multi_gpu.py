"""What several GPUs of one host do: calibration, quantization, decoding and restoring, in one call.

    python -m benchmarks.scale.multi_gpu --output FOLDER [--parts exchange decode ...] [--seconds 520]
    python -m benchmarks.scale.multi_gpu --output FOLDER --tiny

Each part runs in a process of its own, so that one that fails or hangs costs the others nothing, and prints a
line of JSON for each thing that it finds, as soon as it has it; FOLDER/multi_gpu.json has them all. --tiny
tries every part on 8 fake CPU devices, with the kernels in interpret mode: its times mean nothing.

decode       tensor-parallel decoding of Qwen3-8B, random weights, fused step: ms and tokens/s at batches 1
             and 16 on 1, 2, … GPUs, sums by boxes and by XLA, and logits against one GPU's
exchange     sums between GPUs and the residual kernel alone, by XLA under options that decide how it makes
             small ones, and by boxes; and the step of fewer layers on two GPUs by the best
kernels      device time by kernel of such a step
calibration  second moments of one block of Qwen3-8B, texts over 1, 2, … GPUs: tokens/s, efficiency, and H
             against one GPU's
restore      layers saved from a mesh and restored onto others: seconds, and whether bytes are equal
quantization linears of Qwen3-8B by svsk-r16, rows over 1, 2, … GPUs: seconds, and whether bytes are equal;
             and layers over as many
"""

import argparse
import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scale.children import status_of

SECONDS = {
    "decode": 360,
    "exchange": 120,
    "kernels": 150,
    "calibration": 90,
    "restore": 60,
    "quantization": 150,
}
"""That a process of each part may take, in the order in which they run."""
WITHOUT_GRAPHS = "--xla_gpu_enable_command_buffer="
FAKE_DEVICES = "--xla_force_host_platform_device_count=8"


def run_process(part: str, folder: Path, tiny: bool, seconds: float) -> None:
    """One part in a process of its own; what it finds goes to standard output and to a file in `folder`."""
    environment = dict(os.environ)
    flags = WITHOUT_GRAPHS if part == "kernels" else ""
    more = f"{flags} {FAKE_DEVICES}" if tiny else flags
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {more}".strip()
    if tiny:
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "benchmarks.scale.multi_gpu", "--output", str(folder), "--within", part]
    command += ["--tiny"] if tiny else []
    status = status_of(command, environment, seconds)
    if status is None:
        write(folder, {"part": part, "error": f"not done after {seconds:.0f} s"})
    elif status:
        write(folder, {"part": part, "error": f"ended with status {status}"})


def write(folder: Path, result: dict[str, Any]) -> None:
    """Print a line of JSON, and keep it."""
    line = json.dumps(result)
    print(line, flush=True)
    with (folder / "lines.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def within(part: str, folder: Path, tiny: bool) -> None:
    """A part, in this process."""
    start = time.perf_counter()

    def report(**found: Any) -> None:
        write(folder, {"part": part, **found, "at": round(time.perf_counter() - start, 1)})

    try:
        work(part)(tiny, report)
    except Exception as error:
        report(error=repr(error)[:2000], where=traceback.format_exc()[-3000:])


def work(part: str) -> Callable[..., None]:
    # JAX starts after the flags are set, and only in a process of its own.
    if part == "calibration":
        from benchmarks.scale.calibration import calibration as found
    elif part == "quantization":
        from benchmarks.scale.quantization import quantization as found
    elif part == "restore":
        from benchmarks.scale.restore import restore as found
    else:
        from benchmarks.scale import decode

        found = {"decode": decode.decode, "exchange": decode.with_options, "kernels": decode.kernels}[part]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.multi_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for multi_gpu.json")
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--seconds", type=float, default=520, help="for all parts together")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--within", choices=SECONDS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    if flags.within:
        within(flags.within, flags.output, flags.tiny)
        return
    lines = flags.output / "lines.jsonl"
    lines.unlink(missing_ok=True)
    deadline = time.monotonic() + flags.seconds
    for part in [part for part in SECONDS if part in flags.parts]:
        left = deadline - time.monotonic()
        if left < 5:
            write(flags.output, {"part": part, "error": "no time was left"})
            continue
        limit = left if flags.tiny else min(left, SECONDS[part])
        run_process(part, flags.output, flags.tiny, limit)
    document = {
        "date": datetime.date.today().isoformat(),
        "tiny": flags.tiny,
        "results": [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()],
    }
    path = flags.output / "multi_gpu.json"
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    failed = [result for result in document["results"] if "error" in result]
    print(f"{path}: {len(document['results'])} results, {len(failed)} of them errors", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
