"""A calibration that is cut short anywhere goes on to the bytes of one that was not, where it may."""

import dataclasses
import errno
import importlib
import json
import shutil

import jax.numpy as jnp
import pytest
from support import TINY, MemorySource

from svsk_jax import pipeline
from svsk_jax.calibration import walk_state
from svsk_jax.calibration.block_inputs import SPILL
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import MANIFEST
from svsk_jax.parallel import make_mesh
from svsk_jax.pipeline.run import KEPT, run_folder
from svsk_jax.storage import durable

pytestmark = pytest.mark.filterwarnings("ignore:calibrating on only:UserWarning")
# The package's attribute of this name is the function.
module = importlib.import_module("svsk_jax.pipeline.calibrate")

CONFIG = dataclasses.replace(TINY, num_layers=3)
CALIBRATION = CalibrationConfig(
    calib=("documentation",), chunks=9, chunk_length=16, fisher_chunks=5, batch_tokens=32
)
"""Five batches, the last one padded, of which three are walked back, the last one with a chunk too many."""
EVENTS = [(stage, layer) for stage in ("calibrate", "sensitivity") for layer in (1, 2, 3)]
ALWAYS, ONCE = 1e9, 1e-9
"""Shares of the time for states: one after each layer, or after the first one alone."""


def run(output, calibration=CALIBRATION, mesh=(1, 1), **changes):
    arguments = {"source": MemorySource(CONFIG), "mesh": make_mesh(*mesh), **changes}
    return pipeline.calibrate(arguments.pop("source"), output, calibration, **arguments)


def cut_short(output, at=("calibrate", 2), **changes):
    """Run until an event, then interrupt; the events until then."""
    events = []

    def stop(event):
        events.append((event.stage, event.layer))
        if events[-1] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        run(output, on_progress=stop, **changes)
    assert raised.value.__notes__[0].startswith(KEPT)
    assert not output.exists()
    return events


def assert_same(first, second):
    files, others = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (first, second))
    manifests = [json.loads(each.pop(MANIFEST)) for each in (files, others)]
    assert files.keys() == others.keys()
    assert [name for name in files if files[name] != others[name]] == []
    assert len(files) == 2 + 2 * CONFIG.num_layers
    for manifest in manifests:
        del manifest["seconds"]
    assert manifests[0] == manifests[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    run(folder)
    return folder


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(walk_state, "SHARE", ALWAYS)


def test_cut_short_after_every_layer_of_both_walks(reference, tmp_path, monkeypatch):
    out, drawn, draw = tmp_path / "out", [], module.calibration_chunks

    def count(*arguments):
        drawn.append(arguments)
        return draw(*arguments)

    monkeypatch.setattr(module, "calibration_chunks", count)
    measured = []
    for at in EVENTS:
        events = cut_short(out, at, resume=True)
        # What was measured before comes back through the model alone.
        again = EVENTS.index(at) if at[0] == "calibrate" else 4 - at[1]
        assert [layer for stage, layer in events if stage == "replay"] == list(range(1, again + 1))
        measured += [event for event in events if event[0] != "replay"]
        assert len(list((run_folder(out) / "walk").iterdir())) == 1
    assert measured == EVENTS
    run(out, resume=True)
    assert len(drawn) == 1
    assert_same(reference, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at", [("calibrate", 3), ("sensitivity", 2)])
def test_from_an_earlier_state(reference, tmp_path, monkeypatch, at):
    monkeypatch.setattr(walk_state, "SHARE", ONCE)
    out = tmp_path / "out"
    cut_short(out, at)
    assert [path.name for path in (run_folder(out) / "walk").iterdir()] == ["streams-00001.0.bin"]
    run(out, resume=True)
    assert_same(reference, out)


def test_with_streams_off_the_devices(reference, tmp_path, monkeypatch):
    """As `--max-memory` has it: some in memory, some on disk."""
    plan = module.plan_calibration

    def little_memory(*arguments, **settings):
        room = 6 * 32 * CONFIG.hidden_size * 4
        return dataclasses.replace(plan(*arguments, **settings), streams="store", store_bytes=room)

    monkeypatch.setattr(module, "plan_calibration", little_memory)
    out = tmp_path / "out"
    for at in (("calibrate", 2), ("sensitivity", 1)):
        cut_short(out, at, resume=True)
    assert list(run_folder(out).glob(f"{SPILL}*")) == []
    (run_folder(out) / f"{SPILL}killed").mkdir()
    run(out, resume=True)
    assert_same(reference, out)


@pytest.mark.parametrize("nth", [2, 4, 9, 14])
def test_a_full_disk_at_any_write(reference, tmp_path, monkeypatch, nth):
    out, sync, writes = tmp_path / "out", durable.sync, []

    def full(path):
        if path.is_file():
            writes.append(path)
            if len(writes) == nth:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        run(out, resume=True)
    assert not out.exists()
    run(out, resume=True)
    assert_same(reference, out)


def test_an_unfinished_run_is_neither_lost_nor_taken_for_another(reference, tmp_path, monkeypatch):
    out = tmp_path / "out"
    cut_short(out)
    with pytest.raises(FileExistsError, match=r"unfinished.*--resume.*--overwrite"):
        run(out)
    fewer = dataclasses.replace(CALIBRATION, chunks=8)
    for changes, words in (
        ({"source": MemorySource(CONFIG, seed=1)}, "model was"),
        ({"dtype": jnp.bfloat16}, "dtype was float32, is bfloat16"),
        ({"calibration": fewer}, r"calibration\.chunks was 9, is 8"),
        ({"mesh": (2, 1)}, r"mesh\.data was 1, is 2"),
    ):
        with pytest.raises(ValueError, match=rf"--resume: the unfinished run for .*out differs.*{words}"):
            run(out, resume=True, **changes)
    with monkeypatch.context() as patch:
        patch.setattr("svsk_jax.pipeline.identity.version", lambda name: "9.9")
        with pytest.raises(ValueError, match=r"versions\.svsk-jax was .*, is 9\.9"):
            run(out, resume=True)
    elsewhere = dataclasses.replace(CALIBRATION, fisher_memory=1e-6)
    assert cut_short(out, ("calibrate", 3), calibration=elsewhere, resume=True)[0] == ("replay", 1)
    # Asked for both, it goes on with its own run and replaces another.
    assert cut_short(out, ("sensitivity", 1), resume=True, overwrite=True)[0] == ("replay", 1)
    with pytest.warns(UserWarning, match=r"is discarded: calibration\.chunks was 9, is 8"):
        assert cut_short(out, ("calibrate", 1), calibration=fewer, resume=True, overwrite=True) == [EVENTS[0]]
    run(out, overwrite=True)
    assert_same(reference, out)


def test_a_finished_run_is_left_as_it_is(reference, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in reference.iterdir()}
    manifest = run(reference, resume=True)
    assert manifest["text"]["chunks"] == 9
    assert {path.name: path.stat().st_mtime_ns for path in reference.iterdir()} == before
    with pytest.raises(FileExistsError, match="exists already"):
        run(reference, dataclasses.replace(CALIBRATION, chunks=8), resume=True)


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        ("walk/streams-00002.0.bin", "walk/streams-00002.0.bin: damaged, so that .* remove this file"),
        ("statistics/layer-00001.safetensors", "--resume: a finished layer is damaged.*; remove .*/walk,"),
    ],
)
def test_damage_to_what_a_run_goes_on_from_is_named(reference, tmp_path, damaged, words):
    out = tmp_path / "out"
    cut_short(out)
    path = run_folder(out) / damaged
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        run(out, resume=True)
    shutil.rmtree(run_folder(out) / "walk")
    run(out, resume=True)
    assert_same(reference, out)
