"""Commands of the command line, run in this process."""

from svsk_jax.cli import main

CALIB = ["--calib", "documentation", "--chunks", "64", "--chunk-length", "32", "--moments", "diagonal"]
"""Flags of a calibration that takes little time."""


def quantize_command(model, output):
    """Arguments of a quantization that takes little time."""
    return ["quantize", "--model", model, "--output", output, "--recipe", "classic-r8", *CALIB]


def svsk(*arguments):
    """Exit status of a command run in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code
    return 0
