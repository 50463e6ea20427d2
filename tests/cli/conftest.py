"""A small checkpoint, and a model quantized from it."""

import json

import pytest
from cli_support import quantize_command, svsk
from support import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), 0)


@pytest.fixture(scope="session")
def quantized(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "out"
    result = folder.parent / "result.json"
    assert svsk(*quantize_command(checkpoint, folder), "--json", result) == 0
    return folder, json.loads(result.read_text())
