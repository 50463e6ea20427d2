"""Input made to do harm: claims of memory, code, paths that lead elsewhere, control characters."""

import dataclasses
import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from gguf_text import encode_gguf
from mutations import DEEP
from safetensors.numpy import load_file
from support import TINY, write_checkpoint

from convert import open_checkpoint
from convert.names import source_names
from svsk_jax.cli import main
from svsk_jax.json_data import MAX_DEPTH, from_json, parse_json
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import parameter_shapes

CONFIG = dataclasses.replace(TINY, num_layers=1)
MEBIBYTE = 1 << 20


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path, 0, CONFIG)


def refused(folder, match, error=ValueError):
    """Opening and reading it ends in this error, with little memory on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match):
            open_checkpoint(str(folder)).outer(np.float32)
        assert tracemalloc.get_traced_memory()[1] < 16 * MEBIBYTE
    finally:
        tracemalloc.stop()


def write_header(path, header, body=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("dtype", ["F32", "F8_E4M3"])
def test_a_claim_of_2_to_the_60_elements_allocates_nothing(folder, dtype):
    header = {
        source_names(CONFIG, "hf")[path].hf: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
        for path, shape in parameter_shapes(CONFIG).items()
    }
    header["model.embed_tokens.weight"] |= {"shape": [1 << 30, 1 << 30], "data_offsets": [0, 4]}
    config = CONFIG.to_hf() | {"vocab_size": 1 << 30, "hidden_size": 1 << 30}
    (folder / "config.json").write_text(json.dumps(config))
    write_header(folder / "model.safetensors", header, bytes(4))
    refused(folder, "model")


def test_a_claim_in_a_gguf_file_allocates_nothing(tmp_path):
    entry = {"name": "token_embd.weight", "shape": [1 << 30, 1 << 30], "type": 0, "offset": 0}
    (tmp_path / "m.gguf").write_bytes(encode_gguf({"general.architecture": "llama"}, [entry], bytes(64)))
    refused(tmp_path / "m.gguf", r"m\.gguf: .*truncated: tensor 'token_embd\.weight'")


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "head_dim"])
def test_a_claim_in_config_json_allocates_nothing(folder, key):
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | {key: 1 << 40}))
    refused(folder, rf"{folder}: config\.json: .* must be 1 to")


@pytest.mark.torch
def test_a_torch_tensor_larger_than_its_file_is_refused(folder):
    torch = pytest.importorskip("torch")
    (folder / "model.safetensors").unlink()
    huge = torch.zeros(1).as_strided((1 << 30, 1 << 30), (0, 0))
    torch.save({"model.embed_tokens.weight": huge}, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin: tensor 'model\.embed_tokens\.weight' .* does not fit in the file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_lists_nested_deeper_than_the_parser_goes_are_refused(folder, name):
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / name).write_bytes(DEEP)
    with pytest.raises(ValueError, match=str(folder)):
        open_checkpoint(str(folder)).tokenizer()


def test_code_beside_a_tokenizer_is_not_run_nor_asked_about(folder, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    def asked(*_):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        open_checkpoint(str(folder)).tokenizer()
    assert not ran.exists()


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd", "/etc/passwd", "..", "a/b.safetensors", "a\\b.safetensors", "n" * 5000]
)
def test_shards_lie_beside_their_index(folder, shard):
    names = dict.fromkeys(load_file(folder / "model.safetensors"), shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(folder, r"index\.json: shard .* is not a file name in the same folder")


def test_links_within_a_hub_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")})
    )
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    for index, file in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        file.rename(blobs / str(index))
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", str(index)))
    assert open_checkpoint(str(snapshot)).outer(np.float32).keys() == {"embedding.weight", "final_norm.scale"}


def test_the_command_says_it_in_words(folder, tmp_path, capsys):
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"rms_norm_eps": "\x1b[2Jsmall"}))
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--model", str(folder), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert f"error: {folder}: config.json: rms_norm_eps: expected a finite number" in said
    assert "\x1b[2J" not in said


def test_a_name_cannot_write_to_the_terminal(folder, tmp_path, capsys):
    write_header(
        folder / "model.safetensors", {"\x1b[2J": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}}
    )
    with pytest.raises(SystemExit):
        main(["convert", "--model", str(folder), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "\x1b[2J" not in said
    assert "error:" in said


def test_json_becomes_typed_data_or_an_error_by_path():
    data = json.loads(json.dumps(CONFIG.to_dict()))
    assert from_json(ModelConfig, data, "c") == CONFIG
    for change, message in (
        ({"num_layers": True}, "c.num_layers: expected an integer, found True"),
        ({"rope_theta": 10**400}, "c.rope_theta: expected a finite number"),
        ({"rope_theta": float("nan")}, "c.rope_theta: expected a finite number, found nan"),
        ({"architecture": "mamba"}, "c.architecture: expected 'llama', 'mistral'"),
        (
            {"rope_scaling": {"kind": "linear", "factor": "2"}},
            "c.rope_scaling.factor: expected a finite number",
        ),
        ({"extra": 1}, "c: unknown 'extra'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_json(ModelConfig, data | change, "c")
    with pytest.raises(ValueError, match="c: missing 'vocab_size'"):
        from_json(ModelConfig, {key: value for key, value in data.items() if key != "vocab_size"}, "c")


def test_json_is_refused_by_its_depth_before_it_is_parsed(monkeypatch):
    for text in (b"\xff", b"{", "{", '"' + '\\"[' * 100_000, "[" * 150 + "]" * 151, "[" + "[]" * 300):
        with pytest.raises(ValueError, match=r"^(?!.*nested)"):
            parse_json(text)
    deepest = "[" * (MAX_DEPTH - 2) + '{"[": [%s]}' + "]" * (MAX_DEPTH - 2)
    # Brackets in strings are no lists, whatever is escaped there.
    inside = json.dumps(["[" * 300, '"[{\\' * 300])[1:-1]
    for text in (deepest % inside, (deepest % inside).encode(), (deepest % inside).encode("utf-16")):
        assert parse_json(text) == json.loads(text)
    assert parse_json(json.dumps([[{}]] * 1000)) == [[{}]] * 1000
    monkeypatch.setattr(json, "loads", None)
    for text in (DEEP, DEEP.decode(), b'{"a":' * 300, deepest % (inside + ", []"), '["\\\\",' * 300):
        with pytest.raises(ValueError, match="nested more than 200 deep"):
            parse_json(text)
