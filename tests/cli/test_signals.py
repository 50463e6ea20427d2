"""An interrupt ends a command with its status wherever Python is when it comes."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupt_inside_exec_keeps_the_exit_status(name):
    script = f"""
import signal
from svsk_jax import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.Inspect.run = lambda self: exec("signal.raise_signal(signal.{name})", {{"signal": signal}})
cli.main(["inspect", "--model", "any"])
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "interrupted" in done.stderr) == (1, True), done.stderr


def test_interrupt_inside_garbage_collection_is_not_lost():
    script = """
import gc, signal, time
from svsk_jax import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
def collected(phase, info):
    gc.callbacks.remove(collected)
    signal.raise_signal(signal.SIGINT)
def run(self):
    gc.callbacks.append(collected)
    gc.collect()
    time.sleep(60)
cli.Inspect.run = run
cli.main(["inspect", "--model", "any"])
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "interrupted" in done.stderr) == (1, True), done.stderr
    assert "ignored" not in done.stderr
