"""Tiny checkpoints, written in each format from the same random parameters."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from convert.names import source_names
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import random_parameters


def parameters_of(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in random_parameters(config, seed).items()}


def hf_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    names = source_names(config, "hf")
    return {names[path].hf: value for path, value in parameters_of(config, seed).items()}


def write_config(folder: Path, config: ModelConfig, **extra: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_hf() | extra))


def write_safetensors(
    folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray] | None = None
) -> None:
    write_config(folder, config)
    save_file(hf_tensors(config) if tensors is None else tensors, folder / "model.safetensors")


def write_sharded(folder: Path, config: ModelConfig) -> dict[str, str]:
    write_config(folder, config)
    tensors, weight_map = hf_tensors(config), {}
    for index in (0, 1):
        part = dict(list(tensors.items())[index::2])
        name = f"model-0000{index + 1}-of-00002.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def permute(value: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to query and key rows, one by one: row (half, i) of a head goes to 2 i + half."""
    out = np.empty_like(value)
    d = value.shape[0] // heads
    for head in range(heads):
        for half in (0, 1):
            for i in range(d // 2):
                out[head * d + 2 * i + half] = value[head * d + half * (d // 2) + i]
    return out


def write_gguf(
    path: Path,
    config: ModelConfig,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    tokens: list[str] | None = None,
) -> dict[str, np.ndarray]:
    """Write the file; returns the parameters that a reader should find, in Hugging Face's row order."""
    renamed = {"mistral": "llama", "qwen3_moe": "qwen3moe"}
    architecture = renamed.get(config.architecture, config.architecture)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.mixture is not None:
        writer.add_expert_count(config.mixture.num_experts)
        writer.add_expert_used_count(config.mixture.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.mixture.moe_intermediate_size)
    writer.add_token_list(tokens or [f"t{index}" for index in range(config.vocab_size)])
    for key, value in (extra or {}).items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(key, value)
    names, expected, stacks = source_names(config, "gguf"), {}, {}
    for parameter, value in parameters_of(config).items():
        name = names[parameter]
        heads = getattr(config, name.heads) if name.heads and architecture == "llama" else None
        stored = value if heads is None else permute(value, heads)
        if value.ndim == 2:
            packed = gguf.quants.quantize(stored, kind)
            layer, _, linear = name.gguf.removesuffix(".weight").partition(".ffn_")
            if "." in linear:  # of an expert; llama.cpp stacks them
                stacks.setdefault(f"{layer}.ffn_{linear.partition('.')[0]}_exps.weight", []).append(packed)
            else:
                writer.add_tensor(name.gguf, packed, raw_dtype=kind)
            rows = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
            expected[parameter] = rows.reshape(value.shape)
        else:
            writer.add_tensor(name.gguf, stored)
            expected[parameter] = value
    for name, matrices in stacks.items():
        writer.add_tensor(name, np.stack(matrices), raw_dtype=kind)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
