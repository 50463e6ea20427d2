"""Statistics on disk: their digests, and what is told beside them."""

import errno
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from svsk_jax.calibration import store, stored_arrays
from svsk_jax.calibration.mixture import Chunks
from svsk_jax.calibration.stored_arrays import StoredArrays, write_arrays
from svsk_jax.calibration.verify import verify_statistics
from svsk_jax.quant.half_moment import halved
from svsk_jax.quant.types import InputMoment, OutputSensitivity
from svsk_jax.storage.atomic import write_json


@pytest.fixture
def stored(tmp_path):
    """Statistics of one layer, of random numbers."""
    rng = np.random.default_rng(5)
    moments = {
        name: halved(InputMoment(total=rng.random((8, 8), np.float32), tokens=np.array(3, np.int32)))
        for name in "abc"
    }
    sensitivity = OutputSensitivity(
        blocks=np.ones((1, 4, 4), np.float32),
        weights=np.ones((2, 3), np.float32),
        tokens=np.array(3, np.int32),
    )
    store.write_tokens(tmp_path, np.arange(12).reshape(2, 6))
    store.write_moments(tmp_path, 0, moments, {"a": [1]})
    store.write_sensitivities(tmp_path, 0, {"a": sensitivity}, moments, {"weighted.b": [2, 3]})
    text = {"moments": "full", "fisher_chunks": 2}
    store.finish(tmp_path, {"fingerprint": "abc", "model": "m", "text": text})
    return store.Statistics.open(tmp_path)


def flip(path, place):
    """Change one bit; a negative place counts from the end."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_of_an_array_is_named_where_it_is_read(stored):
    folder = stored.folder
    assert verify_statistics(folder).damaged == {}
    assert verify_statistics(folder).tensors == 1 + 6 + 9
    intact = {name: np.asarray(moment.total) for name, moment in stored.layer(0).items()}
    # The last array of the file.
    flip(folder / "layer-00000.safetensors", -1)
    assert verify_statistics(folder).damaged == {
        "layer-00000.safetensors: c.tokens": "its SHA-256 is not the one stored with it"
    }
    layer = stored.layer(0)
    np.testing.assert_array_equal(layer["a"].total, intact["a"])
    with pytest.raises(ValueError, match=r"layer-00000.*: c\.tokens: its SHA-256.*svsk calibrate` again"):
        layer["c"]


def test_what_verify_says_of_lost_files_and_headers(stored):
    folder = stored.folder
    flip(folder / "fisher-00000.safetensors", 9)
    (folder / "tokens.safetensors").unlink()
    found = verify_statistics(folder)
    assert found.damaged.keys() == {"fisher-00000.safetensors", "tokens.safetensors"}
    assert found.tensors == 6
    save_file({"ids": np.zeros((1, 4), np.int32)}, folder / "tokens.safetensors")
    with pytest.raises(ValueError, match=r"tokens\.safetensors: has no digests.*svsk calibrate` again"):
        stored.tokens()
    write_json(folder / store.MANIFEST, dict(stored.manifest) | {"files": 3})
    with pytest.raises(ValueError, match="is damaged"):
        verify_statistics(folder)


def test_a_layers_file_is_opened_once(stored, monkeypatch):
    opened, open_file = [], stored_arrays.safe_open
    monkeypatch.setattr(
        stored_arrays, "safe_open", lambda path, **kind: opened.append(path) or open_file(path, **kind)
    )
    layer, (sensitivities, weighted) = stored.layer(0), stored.sensitivities(0)
    for statistics in (layer, weighted, sensitivities):
        assert len(list(statistics.items())) in (1, 3)
    assert len(opened) == 2


def test_what_is_told_of_starved_experts_comes_back(stored):
    assert store.starved_experts(stored.folder, [0], []) == {"layers.0": {"a": [1]}}
    assert store.starved_experts(stored.folder, [0], [0]) == {"layers.0": {"a": [1], "weighted.b": [2, 3]}}


def test_chunks_are_kept_and_made_again_where_they_are_damaged(tmp_path):
    made = []

    def make():
        made.append(Chunks(ids=np.full((2, 3), len(made), np.int32), counts={"self": 2}))
        return made[-1]

    for number in (0, 0):
        kept = store.kept_chunks(tmp_path / "text", make)
        np.testing.assert_array_equal(kept.ids, made[number].ids)
        assert kept.counts == {"self": 2}
    flip(tmp_path / "text", -1)
    np.testing.assert_array_equal(store.kept_chunks(tmp_path / "text", make).ids, made[1].ids)
    assert len(made) == 2


def big():
    """Arrays of less than a piece, of one, of several and of none, and their dtypes."""
    rng = np.random.default_rng(0)
    piece = stored_arrays.PIECE // 4
    return {
        "several": rng.random((3, piece + 5), np.float32),
        "one": np.arange(piece, dtype=np.int32),
        "none": np.zeros((0, 3), np.float32),
        "less": np.asfortranarray(rng.random((3, 4), np.float32)),
    }


def test_a_file_is_one_of_safetensors_whose_arrays_come_back(tmp_path):
    path, arrays = tmp_path / "made" / "a.safetensors", big()
    write_arrays(path, arrays, told=[1, "x"])
    found = StoredArrays(path)
    assert found.note["told"] == [1, "x"]
    assert list(found) == list(arrays)
    elsewhere = load_file(path)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(elsewhere[name], value)
        assert found[name].dtype == elsewhere[name].dtype == value.dtype
    before = path.read_bytes()
    write_arrays(path, arrays, told=[1, "x"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("piece", [0, 1, 3])
def test_a_flipped_bit_of_any_piece_is_found(tmp_path, piece):
    path, arrays = tmp_path / "a.safetensors", big()
    write_arrays(path, arrays)
    flip(path, path.read_bytes().index(arrays["several"].tobytes()) + piece * stored_arrays.PIECE)
    found = StoredArrays(path)
    assert [name for name in found if found.differs(name)] == ["several"]
    with pytest.raises(ValueError, match="several: its SHA-256"):
        found["several"]


def test_nan_is_named_where_it_is_read(tmp_path):
    value = np.zeros(stored_arrays.PIECE // 2, np.float32)
    value[-1] = np.nan
    write_arrays(tmp_path / "a", {"x": value})
    with pytest.raises(ValueError, match="x holds NaN or Inf"):
        StoredArrays(tmp_path / "a")["x"]


def test_an_array_of_another_dtype_is_refused_by_name(tmp_path):
    arrays = {"fine": np.zeros(3, np.float32), "wide": np.zeros(3), "big-endian": np.zeros(3, ">f4")}
    with pytest.raises(TypeError, match=r"float32 or int32, not \{'wide': 'float64', 'big-endian': '>f4'\}"):
        write_arrays(tmp_path / "a", arrays)
    assert not list(tmp_path.iterdir())


def test_an_array_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write_arrays(tmp_path / "a", big())
    assert not list(tmp_path.iterdir())
