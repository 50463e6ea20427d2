"""A run that is cut short anywhere goes on to the bytes of one that was not, and only where it may."""

import dataclasses
import errno
import importlib
import shutil
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SQUARE, TINY, MemorySource

from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.pipeline.identity import differences
from svsk_jax.pipeline.progress import Progress
from svsk_jax.pipeline.run import KEPT, run_folder
from svsk_jax.quant.types import QuantConfig, TileShape, recipe
from svsk_jax.storage import SavedModel, arrays
from svsk_jax.storage.lock import locked

# The package's attribute of this name is the function.
module = importlib.import_module("svsk_jax.pipeline.quantize")

CALIBRATION = CalibrationConfig(calib=("documentation",), chunks=64, chunk_length=32, fisher_chunks=8)
SMALL = QuantConfig(rank=4, tile=TileShape(rows=32, columns=32))
STRONG = dataclasses.replace(
    recipe("svsk-r16"),
    bits=5.5,
    groups=(16,),
    tile=TileShape(rows=32, columns=0),
    feedback="none",
    beam_width=1,
    joint_rounds=0,
    polish=2,
)
"""Every stage, but none that takes long."""
STAGES = ("calibrate", "sensitivity", "plan", "quantize", "polish")


def contents(folder):
    """Logical bytes and metadata of a saved model."""
    model = SavedModel(folder)
    layers = [model.layer(index, jnp.float32) for index in range(model.config.num_layers)]
    values = jax.tree.map(np.asarray, (model.outer(jnp.float32), layers))
    return values, [model.metadata, *(model.layer_metadata(index) for index in range(len(layers)))]


def assert_same(first, second):
    (values, metadata), (others, other_metadata) = contents(first), contents(second)
    jax.tree.map(np.testing.assert_array_equal, values, others)
    assert metadata == other_metadata


def run(output, config=SMALL, **changes):
    arguments = {"source": MemorySource(TINY), "recipe": "r", "calibration": CALIBRATION, **changes}
    return pipeline.quantize(arguments.pop("source"), output, config, **arguments)


def cut_short(output, at=("quantize", 1), error=KeyboardInterrupt, **changes):
    """Run until an event, then raise."""

    def stop(event):
        if (event.stage, event.layer) == at:
            raise error

    with pytest.raises(error) as raised:
        run(output, on_progress=stop, **changes)
    return raised.value


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Statistics of SQUARE with the Fisher pass."""
    folder = tmp_path_factory.mktemp("stats") / "stats"
    pipeline.calibrate(MemorySource(SQUARE), folder, CALIBRATION)
    return Statistics.open(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What an undisturbed run of SMALL makes, and its result."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    return folder, run(folder)


@pytest.fixture
def done(monkeypatch):
    """The expensive steps as they are taken. Polish, which has tests of its own and takes long to compile, is
    one that leaves other values each time."""
    steps = []
    calibrate, quantize_layer = module.calibrate, module.quantize_layer

    def count_calibrate(*arguments, **settings):
        steps.append("calibrate")
        return calibrate(*arguments, **settings)

    def count_layer(*arguments):
        steps.append("layer")
        return quantize_layer(*arguments)

    def polish(source, layers, ids, count, dtype, on_progress):
        steps.append("polish")
        if on_progress:
            on_progress(Progress(stage="polish", layer=1, layers=count))
        mark = jnp.full_like(layers[0]["input_norm.scale"], steps.count("polish"))
        return [layer | {"input_norm.scale": mark} for layer in layers]

    for stand_in, name in (
        (count_calibrate, "calibrate"),
        (count_layer, "quantize_layer"),
        (polish, "polish"),
    ):
        monkeypatch.setattr(module, name, stand_in)
    return steps


def test_every_stage_of_the_whole_recipe(done, tmp_path, monkeypatch):
    events, source, compiled = [], MemorySource(SQUARE), []

    def compile_ahead(model, config, draft):
        compiled.append(({"options"} if draft else set()) | ({"layers"} if config else set()))
        return nullcontext()

    monkeypatch.setattr(module, "compile_ahead", compile_ahead)
    whole = run(tmp_path / "whole", STRONG, source=source, on_progress=events.append)
    assert tuple(dict.fromkeys(event.stage for event in events)) == STAGES
    assert done == ["calibrate", "layer", "layer", "polish"]
    out = tmp_path / "out"
    kept = []
    for stage in STAGES:
        done.clear()
        error = cut_short(out, (stage, 1), source=source, config=STRONG, resume=True)
        kept.append(any(note.startswith(KEPT) for note in getattr(error, "__notes__", [])))
        assert kept[-1] == run_folder(out).exists()
        assert not out.exists()
    assert kept == [True] * len(STAGES)
    assert done == ["layer", "polish"]
    done.clear()
    compiled.append("at last")
    result = run(out, STRONG, source=source, resume=True)
    assert done == ["polish"]
    # The whole run; those that ended while they planned, quantized and polished; and the last.
    assert compiled == [*[{"options", "layers"}] * 3, {"layers"}, "at last", set()]
    assert_same(tmp_path / "whole", out)
    assert dataclasses.replace(result, output=whole.output, seconds=whole.seconds) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_polished_layers_come_from_one_polish(measured, done, tmp_path, monkeypatch):
    out, source = tmp_path / "out", MemorySource(SQUARE)
    layer_errors = module.layer_errors

    def stop(*arguments):
        if done.count("polish") == 1 and (run_folder(out) / "model" / "svsk" / "layer_00000").exists():
            raise KeyboardInterrupt
        return layer_errors(*arguments)

    monkeypatch.setattr(module, "layer_errors", stop)
    with pytest.raises(KeyboardInterrupt):
        run(out, STRONG, source=source, statistics=measured)
    run(out, STRONG, source=source, statistics=measured, resume=True)
    scales = [SavedModel(out).layer(index, jnp.float32)["input_norm.scale"] for index in range(2)]
    np.testing.assert_array_equal(scales, np.full((2, SQUARE.hidden_size), 2.0))


def test_a_full_disk_at_any_write_of_a_layer(reference, tmp_path, monkeypatch):
    out, sync_tree, writes = tmp_path / "out", arrays.sync_tree, []

    def full(folder):
        writes.append(folder)
        if len(writes) in (1, 3, 5):
            next(path for path in folder.rglob("*") if path.is_file()).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        sync_tree(folder)

    monkeypatch.setattr(arrays, "sync_tree", full)
    for _ in range(3):
        with pytest.raises(OSError, match="No space left") as raised:
            run(out, resume=True)
        assert raised.value.__notes__[0].startswith(KEPT)
        assert not out.exists()
    run(out, resume=True)
    # Two layers and what is outside, each of which failed once.
    assert len(writes) == 6
    assert_same(reference[0], out)


def test_a_damaged_layer_is_made_again(reference, tmp_path):
    out = tmp_path / "out"
    cut_short(out, ("quantize", 2))
    for data in (run_folder(out) / "model" / "svsk" / "layer_00000").rglob("d/*"):
        data.write_bytes(b"")
    run(out, resume=True)
    assert_same(reference[0], out)


def test_an_unfinished_run_is_neither_lost_nor_taken_for_another(reference, tmp_path):
    out = tmp_path / "out"
    cut_short(out)
    with pytest.raises(FileExistsError, match=r"unfinished.*--resume.*--overwrite"):
        run(out)
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 500)
    own = dataclasses.replace(CALIBRATION, calib=(str(text),))
    for changes, words in (
        ({"source": MemorySource(TINY, seed=1)}, "model was"),
        ({"config": dataclasses.replace(SMALL, rank=3)}, r"quant_config\.rank was 4, is 3"),
        ({"recipe": "s"}, "recipe was r, is s"),
        ({"dtype": jnp.bfloat16}, "dtype was float32, is bfloat16"),
        ({"calibration": dataclasses.replace(CALIBRATION, chunks=63)}, r"calibration\.chunks was 64, is 63"),
        ({"calibration": own}, r"calibration\.calib\.documentation was 1\.0, is not given"),
    ):
        with pytest.raises(ValueError, match=rf"--resume: the unfinished run for .*out differs.*{words}"):
            run(out, resume=True, **changes)
    run(out, resume=True)
    assert_same(reference[0], out)


def test_another_version_is_another_run(tmp_path, monkeypatch):
    cut_short(tmp_path / "out")
    monkeypatch.setattr("svsk_jax.pipeline.identity.version", lambda name: "9.9")
    with pytest.raises(ValueError, match=r"versions\.svsk-jax was .*, is 9\.9; versions\.jax was"):
        run(tmp_path / "out", resume=True)


def test_the_same_path_with_another_text_is_another_run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 500)
    own = dataclasses.replace(CALIBRATION, calib=(str(text),))
    cut_short(tmp_path / "out", calibration=own)
    text.write_text("b line of text\n" * 500)
    with pytest.raises(ValueError, match=r"calibration\.calib\.sha256:"):
        run(tmp_path / "out", calibration=own, resume=True)
    text.write_text("a line of text\n" * 500)
    moved = text.rename(tmp_path / "moved.txt")
    run(tmp_path / "out", calibration=dataclasses.replace(own, calib=(str(moved),)), resume=True)


def test_overwrite_starts_over_and_replaces(reference, tmp_path):
    out = tmp_path / "out"
    cut_short(out, config=dataclasses.replace(SMALL, rank=3))
    run(out, overwrite=True)
    assert_same(reference[0], out)
    cut_short(out, config=dataclasses.replace(SMALL, rank=3), overwrite=True)
    assert_same(reference[0], out)
    with pytest.raises(FileExistsError, match="out exists already"):
        run(out, dataclasses.replace(SMALL, rank=3), resume=True)
    run(out, dataclasses.replace(SMALL, rank=3), resume=True, overwrite=True)
    assert SavedModel(out).metadata["quant_config"]["rank"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("interrupted", ["write_json", "discard"])
def test_an_interrupt_before_a_run_has_begun_leaves_nothing(interrupted, tmp_path, monkeypatch):
    cut_short(tmp_path / "out")
    run_module, calls = importlib.import_module("svsk_jax.pipeline.run"), []
    original = getattr(run_module, interrupted)

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(run_module, interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt) as raised:
        run(tmp_path / "out", overwrite=True)
    assert calls
    assert not hasattr(raised.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_while_it_was_clearing_up(reference, tmp_path):
    out = tmp_path / "out"
    cut_short(out)
    shutil.copytree(reference[0], out)
    result = run(out, resume=True)
    assert dataclasses.replace(result, output=reference[0], seconds={}) == dataclasses.replace(
        reference[1], seconds={}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_statistics_of_another_calibration(tmp_path):
    source = MemorySource(TINY)
    diagonal = dataclasses.replace(CALIBRATION, moments="diagonal")
    for name in ("a", "b"):
        pipeline.calibrate(source, tmp_path / name, diagonal)
    first, second = (Statistics.open(tmp_path / name) for name in ("a", "b"))
    cut_short(tmp_path / "out", statistics=first)
    with pytest.raises(ValueError, match=r"calibration\.calib-stats was"):
        run(tmp_path / "out", statistics=second, resume=True)
    run(tmp_path / "whole", statistics=first)
    run(tmp_path / "out", statistics=first, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_two_runs_on_one_folder(tmp_path):
    with locked(tmp_path / "out"):
        for start in (run, lambda out: pipeline.calibrate(MemorySource(TINY), out, CALIBRATION)):
            with pytest.raises(FileExistsError, match=r"out: process \d+ on .* is writing to it"):
                start(tmp_path / "out")


def test_differences_are_named_by_dots():
    before = {"a": {"b": 1, "c": 2}, "d": None}
    assert differences(before, before) == []
    assert differences(before, {"a": {"b": 1, "c": 3}, "d": "x" * 64}) == [
        "a.c was 2, is 3",
        "d was not given, is xxxxxxxxxxxx…",
    ]
