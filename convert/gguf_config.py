"""Model configuration, and Hugging Face's config files, from GGUF metadata."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from convert.tensors import RawTensor
from svsk_jax.json_data import checked
from svsk_jax.model.config import Architecture, Mixture, ModelConfig, RopeScaling

ARCHITECTURES: dict[str, Architecture] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}
END_OF_TURN = {
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "</s>",
}
TYPES: dict[str, Any] = {
    "general.architecture": str,
    "tokenizer.chat_template": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.tokens": tuple[str, ...],
    "tokenizer.ggml.token_type": tuple[int, ...],
    "tokenizer.ggml.scores": tuple[float, ...],
    "tokenizer.ggml.merges": tuple[str, ...],
    **{f"tokenizer.ggml.{name}_token_id": int for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
    **{f"tokenizer.ggml.{name}": bool for name in ("add_bos_token", "add_eos_token", "add_space_prefix")},
}
"""Of the metadata that are read, beside the architecture's own."""
NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor", "rope.scale_linear")
"""Of the architecture's own, those that need not be whole."""
CONTROL = 3
"""Entry of `tokenizer.ggml.token_type` for tokens that are markup, never text."""


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """ValueError, naming the key, where a value is not of the type that the specification gives it."""
    architecture = metadata.get("general.architecture")
    numbers = {f"{architecture}.{name}": float for name in NUMBERS}
    for key, annotation in (TYPES | numbers).items():
        if key in metadata:
            checked(metadata[key], annotation, key)


def read_config(metadata: Mapping[str, Any], tensors: Iterable[RawTensor]) -> ModelConfig:
    """The decoder's configuration; biases, tying and rotary factors follow from which tensors are there.

    Raises:
        ValueError: unknown architecture or a missing key.
        NotImplementedError: a variant of a known architecture that the decoder lacks.
    """
    named = {tensor.name: tensor for tensor in tensors}
    source = metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(str(source))
    if architecture is None:
        raise ValueError(f"general.architecture: unknown {source!r}; known are {', '.join(ARCHITECTURES)}")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{source}.{key}", default)

    def size(key: str, default: int | None = None) -> int:
        value = get(key, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if isinstance(value, list):
            raise NotImplementedError(f"{source}.{key}: layers of different sizes are not supported")
        if type(value) is not int:
            raise ValueError(f"{source}.{key}: expected an integer, found {value!r}; is the file complete?")
        return value

    mixture = None
    if architecture == "qwen3_moe":
        # llama.cpp scales the weights of every model of this architecture to a sum of 1.
        mixture = Mixture(
            num_experts=size("expert_count"),
            num_experts_per_tok=size("expert_used_count"),
            moe_intermediate_size=size("expert_feed_forward_length"),
            norm_topk_prob=True,
        )
    elif get("expert_count", 0):
        raise NotImplementedError(f"{source}.expert_count: of mixtures of experts only qwen3moe is supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    hidden, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", hidden // max(1, heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise NotImplementedError(f"{source}.{key}: {get(key)} differs from the head's {head_dim}")
    qkv_bias, o_bias = "blk.0.attn_q.bias" in named, "blk.0.attn_output.bias" in named
    window = get("attention.sliding_window")
    if architecture == "llama" and window:
        architecture = "mistral"  # the same decoder; only Mistral's config.json can say so
    if architecture.startswith("qwen") and window:
        raise NotImplementedError(f"{source}.attention.sliding_window is not supported for Qwen models")
    if architecture in ("llama", "mistral") and qkv_bias != o_bias:
        raise NotImplementedError(f"{source}: biases on only some attention projections are not supported")
    return ModelConfig(
        architecture=architecture,
        vocab_size=len(tokens) if isinstance(tokens, list) else size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("feed_forward_length"),
        num_layers=size("block_count"),
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=_shortest(get("attention.layer_norm_rms_epsilon", 1e-6)),
        rope_theta=_shortest(get("rope.freq_base", 10000.0)),
        max_position_embeddings=size("context_length", 2048),
        tie_word_embeddings="output.weight" not in named,
        rope_scaling=_rope_scaling(get, named.get("rope_freqs.weight"), head_dim),
        qk_norm=architecture in ("qwen3", "qwen3_moe"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias="blk.0.ffn_down.bias" in named,
        sliding_window=size("attention.sliding_window") if window else None,
        mixture=mixture,
    )


def hf_config(config: ModelConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that transformers builds the same model from.

    Per-frequency rotary factors are written as the llama3 scaling that made them if one did, else as
    longrope with equal short and long factors, which is the same arithmetic.
    """
    scaling = config.rope_scaling
    written: dict[str, Any] = {}
    if scaling is not None and scaling.kind == "factors":
        original = _llama3_origin(config)
        if original is None:
            factors = list(scaling.factors)
            written["rope_scaling"] = {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": config.max_position_embeddings,
            }
        config = dataclasses.replace(config, rope_scaling=original)
    return config.to_hf() | written | _token_ids(metadata, ("bos", "eos", "padding"))


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The generation_config.json: start and padding tokens, and every token that ends a turn."""
    config = _token_ids(metadata, ("bos", "padding"))
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") or [] for key in ("tokens", "token_type"))
    pairs = zip(tokens, types, strict=False)
    ids += [index for index, (token, kind) in enumerate(pairs) if kind == CONTROL and token in END_OF_TURN]
    ends = list(dict.fromkeys(index for index in ids if index is not None))
    return config | ({"eos_token_id": ends} if ends else {})


def _token_ids(metadata: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names}
    return {
        f"{'pad' if name == 'padding' else name}_token_id": index
        for name, index in ids.items()
        if index is not None
    }


def _shortest(value: float) -> float:
    """The decimal that an f32 was rounded from: 9.999999747378752e-06 → 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(get: Any, factors: RawTensor | None, head_dim: int) -> RopeScaling | None:
    kind, legacy = get("rope.scaling.type", "none"), get("rope.scale_linear")
    if kind not in ("none", "linear"):
        raise NotImplementedError(f"rope.scaling.type: {kind!r} is not supported; known are none and linear")
    if factors is not None:
        if factors.shape != (head_dim // 2,):
            raise ValueError(f"rope_freqs.weight: shape {list(factors.shape)}, expected [{head_dim // 2}]")
        values = tuple(float(value) for value in factors.to_numpy(np.float32))
        if any(value <= 0 for value in values):
            raise ValueError("rope_freqs.weight: factors must be positive; download the file again")
        if any(value != 1 for value in values):
            if kind == "linear":
                raise NotImplementedError(
                    "rope.scaling.type: linear together with rope_freqs.weight is not supported"
                )
            return RopeScaling(kind="factors", factors=values)
    factor = get("rope.scaling.factor", legacy) if kind == "linear" else legacy
    if factor is None and kind == "linear":
        raise ValueError("rope.scaling.factor: missing, though rope.scaling.type is linear")
    return RopeScaling(kind="linear", factor=_shortest(factor)) if factor not in (None, 0, 1) else None


def _llama3_origin(config: ModelConfig) -> RopeScaling | None:
    """The scaling of Llama 3.1 and later that gives this config's frequencies, if any does."""
    assert config.rope_scaling is not None
    factor = round(max(config.rope_scaling.factors), 4)
    guess = RopeScaling(kind="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
    same = dataclasses.replace(config, rope_scaling=guess).inverse_frequencies
    return guess if np.allclose(same, config.inverse_frequencies, rtol=1e-5, atol=0) else None
