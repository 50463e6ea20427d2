"""Start several processes of one `svsk` command on this host.

    python -m svsk_jax.parallel.launch --processes 2 -- quantize --model my-model --output my-model-r16

Each gets `--distributed` and where to find the others. The first that fails ends them all; its exit status is
the launcher's.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

GRACE = 15.0
"""Seconds that the other processes have to end by themselves when one has failed."""


def environment(process: int, devices: int | None) -> dict[str, str]:
    """What process `process` sees: with `devices` given, that many GPUs of its own, or fake CPU devices."""
    if devices is None:
        return dict(os.environ)
    own = ",".join(str(device) for device in range(process * devices, (process + 1) * devices))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    return {**os.environ, "JAX_LOCAL_DEVICE_IDS": own, "XLA_FLAGS": flags}


def launch(command: Sequence[str], processes: int, devices: int | None = None) -> int:
    """Run `svsk command…` in several processes; the exit status of the first that fails, or 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "svsk_jax.cli", *command, "--distributed"]
    start += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes)]
    running = [
        subprocess.Popen(
            [*start, "--process-id", str(process)],
            env=environment(process, devices),
            # A terminal would interrupt it once more, in the midst of its cleaning up.
            start_new_session=True,
        )
        for process in range(processes)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in running:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    failed = 0
    deadline: float | None = None
    while any(process.poll() is None for process in running):
        failed = failed or next((process.returncode for process in running if process.returncode), 0)
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.1)
    failed = failed or next((process.returncode for process in running if process.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def main() -> None:
    """Parse the command line and launch."""
    parser = argparse.ArgumentParser(prog="python -m svsk_jax.parallel.launch", description=__doc__)
    parser.add_argument("--processes", type=int, required=True, help="how many processes")
    parser.add_argument("--devices", type=int, help="GPUs of each process, or fake devices on CPU")
    parser.add_argument("command", nargs="+", help="-- and an svsk command: calibrate, quantize or autotune")
    arguments = parser.parse_args()
    if arguments.processes < 1 or (arguments.devices is not None and arguments.devices < 1):
        parser.error("--processes and --devices: expected at least 1")
    sys.exit(launch(arguments.command, arguments.processes, arguments.devices))


if __name__ == "__main__":
    main()
