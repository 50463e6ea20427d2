"""Safetensors and PyTorch checkpoints: round trips, and each way in which one can be wrong."""

import builtins
import dataclasses
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support_convert import (
    hf_tensors,
    parameters_of,
    write_config,
    write_index,
    write_safetensors,
    write_sharded,
)

from convert import Checkpoint, open_checkpoint
from svsk_jax.model.parameters import parameter_shapes
from svsk_jax.model.source import ModelSource


def assert_holds(checkpoint: Checkpoint, config, dtype=np.float32) -> None:
    assert checkpoint.config == config
    for path, value in parameters_of(config).items():
        found = checkpoint.parameter(path, dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, value.astype(dtype), err_msg=path)


def test_single_file(tmp_path, tiny_config):
    write_safetensors(tmp_path, tiny_config)
    source: ModelSource = open_checkpoint(str(tmp_path))
    assert_holds(open_checkpoint(str(tmp_path)), tiny_config)
    assert_holds(open_checkpoint(str(tmp_path / "model.safetensors")), tiny_config)
    layer = source.layer(1, np.float32)
    np.testing.assert_array_equal(
        layer["mlp.up.weight"], parameters_of(tiny_config)["layers.1.mlp.up.weight"]
    )
    assert set(source.outer(np.float32)) == {"embedding.weight", "final_norm.scale"}
    assert source.local_path() == tmp_path


def test_sharded(tmp_path, tiny_config):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=False)
    write_sharded(tmp_path, config)
    assert_holds(open_checkpoint(str(tmp_path)), config)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_source_types(tmp_path, tiny_config, dtype):
    tensors = {name: value.astype(dtype) for name, value in hf_tensors(tiny_config).items()}
    write_safetensors(tmp_path, tiny_config, tensors)
    found = open_checkpoint(str(tmp_path)).parameter("embedding.weight", np.float32)
    np.testing.assert_array_equal(found, tensors["model.embed_tokens.weight"].astype(np.float32))


def test_slabs_cover_every_row(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr("convert.tensors.CHUNK_VALUES", 100)
    write_safetensors(tmp_path, tiny_config)
    assert_holds(open_checkpoint(str(tmp_path)), tiny_config, ml_dtypes.bfloat16)


@pytest.mark.torch
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path, tiny_config, legacy):
    torch = pytest.importorskip("torch")
    write_config(tmp_path, tiny_config)
    state = {name: torch.tensor(value).bfloat16() for name, value in hf_tensors(tiny_config).items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    found = open_checkpoint(str(tmp_path))
    for path, value in parameters_of(tiny_config).items():
        rounded = value.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found.parameter(path, jnp.bfloat16), rounded, err_msg=path)


@pytest.mark.torch
def test_torch_refuses_code(tmp_path, tiny_config):
    torch = pytest.importorskip("torch")
    write_config(tmp_path, tiny_config)
    torch.save({"model.norm.weight": print}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt.*more than tensors"):
        open_checkpoint(str(tmp_path / "model.pt"))
    (tmp_path / "cut.bin").write_bytes(b"PK\x03\x04 not much")
    with pytest.raises(ValueError, match=r"cut\.bin.*corrupt"):
        open_checkpoint(str(tmp_path / "cut.bin"))


def test_without_torch(tmp_path, tiny_config, monkeypatch):
    write_config(tmp_path, tiny_config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(ValueError, match=r"pip install 'svsk-jax\[torch\]'"):
        open_checkpoint(str(tmp_path))


def test_one_error_lists_every_mismatch(tmp_path, tiny_config):
    tensors = hf_tensors(tiny_config)
    tensors["norm.weight"] = tensors["model.norm.weight"]
    tensors["model.extra"] = np.zeros(3, np.float32)
    tensors |= {f"model.experts.{index}": np.zeros(1, np.float32) for index in range(30)}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((3, 4), np.float32)
    write_safetensors(tmp_path, tiny_config, tensors)
    with pytest.raises(ValueError, match="tensors are not those") as error:
        open_checkpoint(str(tmp_path))
    text = str(error.value)
    for part in (
        r"missing (1): model.layers.1.mlp.up_proj.weight [88, 48]",
        "unknown (31)",
        "and 11 more",
        "twice (1)",
        "k_proj.weight [3, 4], expected [16, 48]",
    ):
        assert part in text


def test_harmless_names_are_ignored(tmp_path, tiny_config):
    tensors = hf_tensors(tiny_config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    write_safetensors(tmp_path, tiny_config, tensors)
    assert set(open_checkpoint(str(tmp_path)).sources) == set(parameter_shapes(tiny_config))


@pytest.mark.parametrize("keep", [4, 300, -5])
def test_truncated(tmp_path, tiny_config, keep):
    write_safetensors(tmp_path, tiny_config)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt.*download it again"):
        open_checkpoint(str(tmp_path))


def test_absurd_header(tmp_path, tiny_config):
    write_config(tmp_path, tiny_config)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ValueError, match="header claims"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(tmp_path, tiny_config, bad):
    tensors = hf_tensors(tiny_config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][[3, 5]] = bad
    write_safetensors(tmp_path, tiny_config, tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: 2 of 48 values are NaN or Inf"):
        open_checkpoint(str(tmp_path)).outer(jnp.bfloat16)


def test_overflow_of_the_target(tmp_path, tiny_config):
    tensors = hf_tensors(tiny_config)
    tensors["model.norm.weight"] = np.full(48, 1e5, np.float32)
    write_safetensors(tmp_path, tiny_config, tensors)
    with pytest.raises(ValueError, match="48 of 48 values overflow float16"):
        open_checkpoint(str(tmp_path)).parameter("final_norm.scale", np.float16)


def test_integers(tmp_path, tiny_config):
    tensors = hf_tensors(tiny_config)
    tensors["model.norm.weight"] = np.zeros(48, np.int32)
    write_safetensors(tmp_path, tiny_config, tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: .*found I32.*unquantized"):
        open_checkpoint(str(tmp_path)).parameter("final_norm.scale", np.float32)


def test_already_quantized(tmp_path, tiny_config):
    write_config(tmp_path, tiny_config, quantization_config={"quant_method": "gptq"})
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"quantization_config \(gptq\)"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hosts", "..", "a\\b.safetensors"])
def test_index_stays_in_its_folder(tmp_path, tiny_config, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(hf_tensors(tiny_config), tmp_path / "outside.safetensors")
    write_config(folder, tiny_config)
    write_index(folder, dict.fromkeys(hf_tensors(tiny_config), name))
    with pytest.raises(ValueError, match="not a file name in the same folder"):
        open_checkpoint(str(folder))


def test_index_against_shards(tmp_path, tiny_config):
    weight_map = write_sharded(tmp_path, tiny_config)
    write_index(tmp_path, weight_map | {"model.norm.weight": "model-00003-of-00003.safetensors"})
    with pytest.raises(ValueError, match=r"shard model-00003-of-00003\.safetensors is missing"):
        open_checkpoint(str(tmp_path))
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    wrong = (other - {weight_map["model.norm.weight"]}).pop()
    write_index(tmp_path, weight_map | {"model.norm.weight": wrong})
    with pytest.raises(ValueError, match=r"lack 1 tensors: model\.norm\.weight"):
        open_checkpoint(str(tmp_path))


def test_nothing_there(tmp_path, tiny_config):
    with pytest.raises(ValueError, match=r"no weights; looked for model\.safetensors"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="no such file or folder"):
        open_checkpoint(str(tmp_path / "absent.gguf"))
    save_file(hf_tensors(tiny_config), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no config\.json beside model\.safetensors"):
        open_checkpoint(str(tmp_path))
    write_config(tmp_path, tiny_config)
    with pytest.raises(ValueError, match=r"no tokenizer; looked for tokenizer\.json"):
        open_checkpoint(str(tmp_path)).tokenizer()


def test_fingerprint_follows_the_weights(tmp_path, tiny_config):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name, tiny_config, hf_tensors(tiny_config, seed))
    a, b, c = (open_checkpoint(str(tmp_path / name)).fingerprint() for name in "abc")
    assert a == b != c


def test_generation_config(tmp_path, tiny_config):
    write_safetensors(tmp_path, tiny_config)
    assert open_checkpoint(str(tmp_path)).generation_config == {}
    write_config(tmp_path, tiny_config, eos_token_id=5)
    assert open_checkpoint(str(tmp_path)).generation_config == {"eos_token_id": 5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert open_checkpoint(str(tmp_path)).generation_config == {"eos_token_id": [5, 6]}
