"""Runs that end early, and damage that is found later: exit status, what is kept, and the next step."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
from cli_support import CALIB, quantize_command, svsk

from svsk_jax import pipeline
from svsk_jax.pipeline.autotune import Tuned
from svsk_jax.pipeline.plan import Plan, fixed_plans


def test_verify(checkpoint, quantized, tmp_path, capsys):
    folder, report = tmp_path / "copy", tmp_path / "v.json"
    shutil.copytree(quantized[0], folder)
    assert svsk("verify", folder, "--json", report) == 0
    assert json.loads(report.read_text()) == {"folder": str(folder), "tensors": 20, "damaged": {}}
    for data in (folder / "svsk" / "layer_00001").glob("ocdbt.process_0/d/*"):
        data.write_bytes(b"")
    capsys.readouterr()
    assert svsk("verify", folder, "--json", report) == 1
    damaged = json.loads(report.read_text())["damaged"]
    assert damaged
    said = capsys.readouterr().err
    assert all(name.startswith("layers.1.") and f"damaged: {name}: " in said for name in damaged)
    assert "Traceback" not in said
    assert svsk("verify", checkpoint) == 2
    assert "not a model that svsk saved" in capsys.readouterr().err.replace("\n", " ")


def test_verify_statistics(checkpoint, tmp_path, capsys):
    folder, report = tmp_path / "stats", tmp_path / "v.json"
    assert svsk("calibrate", "--model", checkpoint, "--output", folder, *CALIB) == 0
    assert svsk("verify", folder, "--json", report) == 0
    # Of each of two layers four diagonals with their counts, one for the head, and the tokens.
    assert json.loads(report.read_text()) == {"folder": str(folder), "tensors": 19, "damaged": {}}
    data = bytearray((folder / "tokens.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "tokens.safetensors").write_bytes(data)
    assert svsk("verify", folder) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert "damaged: tokens.safetensors: ids: its SHA-256 is not the one stored with it" in said
    quantize = ["quantize", "--model", checkpoint, "--output", tmp_path / "out", "--recipe", "classic-r8"]
    assert svsk(*quantize, "--calib-stats", folder) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "tokens.safetensors: ids: its SHA-256" in said
    assert "run `svsk calibrate` again" in said


def test_autotune_calibrates_once(checkpoint, tmp_path, capsys, monkeypatch):
    full = [*CALIB[:-1], "full", "--fisher", "off"]
    tune = ["autotune", "--model", checkpoint, "--output", tmp_path / "t.json", "--bits", 5.5, *full]
    calibrated = []

    def interrupt(source, *arguments, statistics=None, **settings):
        statistics = statistics or arguments[0]
        calibrated.append((statistics.folder / "calibration.json").read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "autotune", interrupt)
    for _ in range(2):
        assert svsk(*tune) == 1
        said = capsys.readouterr().err.replace("\n", " ")
        assert f"what is finished is kept in {tmp_path / 't.work'}: go on with the same command" in said

    def finish(source, statistics, config, work, *, recipe, **settings):
        config = dataclasses.replace(config, bits=None)
        plan = Plan(
            recipe=recipe, config=config, tensors=fixed_plans(source.config, config), predicted_nats=0.1
        )
        return Tuned(plan=plan, default=plan, chosen={})

    monkeypatch.setattr(pipeline, "autotune", finish)
    # Measured, and cut short while the two choices are compared.
    monkeypatch.setattr(pipeline, "quantize", interrupt)
    assert svsk(*tune) == 1
    assert "what is finished is kept in" in capsys.readouterr().err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["t.work"]
    assert svsk(*tune, "--measure", "off") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    # Wall times are in it.
    assert len(calibrated) == 3
    assert len(set(calibrated)) == 1


def test_an_interrupted_run_says_how_to_go_on(checkpoint, quantized, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    command = quantize_command(checkpoint, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["svsk_jax.pipeline.quantize"], "quantize_layer", interrupt)
        assert svsk(*command) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"interrupted; what is finished is kept in {tmp_path / '.out.unfinished'}" in said
    assert svsk(*command) == 2
    assert "--resume" in capsys.readouterr().err
    assert svsk(*command, "--resume", "--rank", 3) == 2
    assert "quant_config.rank was 8, is 3" in capsys.readouterr().err.replace("\n", " ")
    assert svsk(*command, "--resume", "--json", tmp_path / "q.json") == 0
    assert json.loads((tmp_path / "q.json").read_text())["layer_errors"] == quantized[1]["layer_errors"]


@pytest.mark.parametrize(
    ("stage", "left", "words"),
    [
        ("text", [], "interrupted; no output was left behind"),
        ("calibrate", [".out.unfinished"], "interrupted; what is finished is kept in {kept}: go on with"),
        ("quantize", [".out.unfinished"], "interrupted; what is finished is kept in {kept}: go on with"),
    ],
    ids=["before-anything-is", "after-a-layer-is-measured", "after-a-layer"],
)
def test_an_interrupt_leaves_what_is_finished_and_nothing_else(checkpoint, tmp_path, stage, left, words):
    script = f"""
import signal, sys
from svsk_jax import cli, pipeline
signal.signal(signal.SIGINT, signal.default_int_handler)
quantize = pipeline.quantize
def interrupted(*arguments, on_progress, **settings):
    def then_interrupt(event):
        on_progress(event)
        if event.stage == "{stage}":
            signal.raise_signal(signal.SIGINT)
    return quantize(*arguments, on_progress=then_interrupt, **settings)
pipeline.quantize = interrupted
if "{stage}" == "text":
    from svsk_jax.calibration import chunks
    chunks.read_texts = lambda *_: signal.raise_signal(signal.SIGINT)
cli.main(sys.argv[1:])
"""
    command = quantize_command(checkpoint, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, command)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert words.format(kept=tmp_path / ".out.unfinished") in done.stderr.replace("\n", " ")
    assert os.listdir(tmp_path) == left
