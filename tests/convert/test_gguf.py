"""GGUF files: values of each type, permuted rows, configurations, damage."""

import dataclasses
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from support_convert import write_gguf

from convert import load_decoder, open_checkpoint
from svsk_jax.model import ModelConfig, RopeScaling

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
VARIANTS = {
    "llama": {},
    "untied-bias": {"tie_word_embeddings": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen2": {"architecture": "qwen2", "qkv_bias": True},
    "qwen3": {"architecture": "qwen3", "qk_norm": True, "head_dim": 32, "rms_norm_eps": 1e-6},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_round_trip(tmp_path, monkeypatch, variant, kind):
    monkeypatch.setattr("convert.tensors.CHUNK_VALUES", 1000)
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    expected = write_gguf(tmp_path / "m.gguf", config, kind)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert checkpoint.config == config
    for path, value in expected.items():
        np.testing.assert_array_equal(checkpoint.parameter(path, np.float32), value, err_msg=path)
    assert open_checkpoint(str(tmp_path)).config == config


def test_hf_config_reopens(tmp_path):
    config = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", config, extra=extra)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert checkpoint.config == config
    assert ModelConfig.from_hf(checkpoint.hf_config) == config


def test_sliding_window_is_mistral(tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, extra={"llama.attention.sliding_window": 32})
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert checkpoint.config == dataclasses.replace(CONFIG, architecture="mistral", sliding_window=32)
    assert checkpoint.hf_config["architectures"] == ["MistralForCausalLM"]


def test_rope_factors(tmp_path):
    ones, factors = np.ones(8, np.float32), np.linspace(1, 3, 8, dtype=np.float32)
    write_gguf(tmp_path / "ones.gguf", CONFIG, tensors={"rope_freqs.weight": ones})
    assert open_checkpoint(str(tmp_path / "ones.gguf")).config == CONFIG
    write_gguf(tmp_path / "own.gguf", CONFIG, tensors={"rope_freqs.weight": factors})
    own = open_checkpoint(str(tmp_path / "own.gguf"))
    assert own.config.rope_scaling == RopeScaling(kind="factors", factors=tuple(factors.tolist()))
    assert own.hf_config["rope_scaling"]["short_factor"] == factors.tolist()

    scaling = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    llama3 = dataclasses.replace(CONFIG, rope_theta=500000.0, rope_scaling=scaling)
    plain = dataclasses.replace(llama3, rope_scaling=None)
    ratio = (plain.inverse_frequencies / llama3.inverse_frequencies).astype(np.float32)
    write_gguf(tmp_path / "l3.gguf", plain, tensors={"rope_freqs.weight": ratio})
    found = open_checkpoint(str(tmp_path / "l3.gguf"))
    np.testing.assert_allclose(found.config.inverse_frequencies, llama3.inverse_frequencies, rtol=1e-6)
    assert ModelConfig.from_hf(found.hf_config) == llama3


@pytest.mark.torch
def test_longrope_is_the_same_arithmetic(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    factors = np.linspace(1, 3, 8, dtype=np.float32)
    write_gguf(tmp_path / "own.gguf", CONFIG, tensors={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(str(tmp_path / "own.gguf"))
    rotary = LlamaRotaryEmbedding(LlamaConfig(**checkpoint.hf_config))
    cos, _ = rotary(torch.zeros(1), torch.arange(5)[None])
    angles = np.arange(5)[:, None] * checkpoint.config.inverse_frequencies
    np.testing.assert_allclose(cos[0, :, :8].numpy(), np.cos(angles), rtol=1e-5, atol=1e-6)


def test_end_tokens(tmp_path):
    tokens = [f"t{index}" for index in range(93)] + ["<|im_end|>", "<|endoftext|>", "</s>"]
    extra = {
        "tokenizer.ggml.token_type": [1] * 93 + [3, 3, 1],
        "tokenizer.ggml.bos_token_id": 4,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 93,
        "tokenizer.ggml.padding_token_id": 0,
    }
    write_gguf(tmp_path / "m.gguf", CONFIG, extra=extra, tokens=tokens)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    expected = {"bos_token_id": 4, "pad_token_id": 0, "eos_token_id": [7, 93, 94]}
    assert checkpoint.generation_config == expected
    assert checkpoint.hf_config["eos_token_id"] == 7


@pytest.mark.parametrize("extra", [{"llama.expert_count": 8}, {"llama.rope.scaling.type": "yarn"}])
def test_unsupported_variants(tmp_path, extra):
    write_gguf(tmp_path / "m.gguf", CONFIG, extra=extra)
    with pytest.raises(NotImplementedError, match=r"m\.gguf: llama\.|rope\.scaling\.type"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_unknown_tensor_and_integers(tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, tensors={"blk.0.surprise": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"unknown \(1\): blk\.0\.surprise"):
        open_checkpoint(str(tmp_path / "m.gguf"))
    untied = {"output.weight": np.ones((96, 64), np.int32)}
    write_gguf(tmp_path / "i.gguf", CONFIG, tensors=untied)
    with pytest.raises(ValueError, match=r"output\.weight: .*found I32"):
        open_checkpoint(str(tmp_path / "i.gguf")).parameter("head.weight", np.float32)


def test_type_that_cannot_be_dequantized(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", CONFIG, Kind.Q8_0)
    monkeypatch.delitem(gguf.quants._type_traits, Kind.Q8_0)
    with pytest.raises(ValueError, match=r"token_embd\.weight: tensor type Q8_0 cannot be dequantized"):
        open_checkpoint(str(tmp_path / "m.gguf")).parameter("embedding.weight", np.float32)


@pytest.mark.parametrize("keep", [0, 3, 20, 500, -100])
def test_truncated(tmp_path, keep):
    write_gguf(tmp_path / "m.gguf", CONFIG)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"m\.gguf: cannot be read as GGUF"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_absurd_counts(tmp_path):
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
    for item in (8, 4):  # strings, uint32
        (tmp_path / "m.gguf").write_bytes(head + key + item.to_bytes(4, "little") + b"\xff" * 8)
        with pytest.raises(ValueError, match="cannot be read as GGUF"):
            open_checkpoint(str(tmp_path / "m.gguf"))


def test_peak_memory(tmp_path):
    """Loading everything as bf16 holds little besides the result, though one tensor dominates it."""
    config = dataclasses.replace(CONFIG, vocab_size=50_000, hidden_size=256)
    write_gguf(tmp_path / "m.gguf", config, Kind.Q8_0)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    tracemalloc.start()
    values = [checkpoint.outer(ml_dtypes.bfloat16)] + [
        checkpoint.layer(index, ml_dtypes.bfloat16) for index in range(config.num_layers)
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = sum(value.nbytes for part in values for value in part.values())
    assert total > 25e6
    assert peak < 1.3 * total


def test_load_onto_a_mesh(tmp_path):
    import jax
    import jax.numpy as jnp

    write_gguf(tmp_path / "m.gguf", dataclasses.replace(CONFIG, num_layers=1))
    source = open_checkpoint(str(tmp_path / "m.gguf"))
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    forward = jax.jit(lambda model, ids: model(ids))
    alone = load_decoder(source, jnp.float32)
    spread = load_decoder(source, jnp.float32, mesh)
    weight = spread.layers[0].mlp.up.weight.get_value()
    assert weight.sharding.shard_shape(weight.shape) == (16, 64)
    assert spread.final_norm.scale.get_value().sharding.is_fully_replicated
    np.testing.assert_allclose(forward(spread, tokens), forward(alone, tokens), atol=1e-5)
