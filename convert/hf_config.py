"""The configuration in a config.json, its types checked before anything is made of them."""

from collections.abc import Mapping
from typing import Any

from svsk_jax.config_limits import check_config
from svsk_jax.json_data import checked, shown
from svsk_jax.model.config import ModelConfig

FILE = "config.json"
TYPES: dict[str, Any] = {
    "architectures": tuple[str, ...] | None,
    "model_type": str | None,
    "hidden_act": str,
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int | None,
    "head_dim": int | None,
    "max_position_embeddings": int,
    "sliding_window": int | None,
    "rms_norm_eps": float,
    "rope_theta": float,
    "tie_word_embeddings": bool | None,
    "attention_bias": bool | None,
    "mlp_bias": bool | None,
    "use_sliding_window": bool | None,
    "num_experts": int | None,
    "num_local_experts": int | None,
    "num_experts_per_tok": int | None,
    "moe_intermediate_size": int | None,
    "norm_topk_prob": bool | None,
    "decoder_sparse_step": int,
    "mlp_only_layers": tuple[int, ...] | None,
}
"""Of the keys that are read."""
ROPE_TYPES: dict[str, Any] = {
    "rope_type": str,
    "type": str,
    "rope_theta": float,
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}
"""Of the keys of `rope_parameters` and `rope_scaling`."""
ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_hf_config(raw: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig.from_hf` for files that nobody vouches for.

    Raises:
        ValueError: a key of the wrong type or out of bounds, an unknown architecture or a missing key.
        NotImplementedError: a variant of a known architecture that the decoder lacks.
    """
    known = {
        key: checked(raw[key], annotation, f"{FILE}: {key}")
        for key, annotation in TYPES.items()
        if key in raw
    }
    if raw.get("num_attention_heads", 1) < 1:
        raise ValueError(f"{FILE}: num_attention_heads must be positive, got {raw['num_attention_heads']}")
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key)
        if rope is not None:
            _check_rope(rope, f"{FILE}: {key}")
    return check_config(ModelConfig.from_hf({**raw, **known}), FILE)


def _check_rope(rope: Any, name: str) -> None:
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name}: expected an object, found {shown(rope)}")
    for key, annotation in ROPE_TYPES.items():
        if key in rope:
            checked(rope[key], annotation, f"{name}.{key}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    missing = [key for key in ROPE_NEEDS.get(kind, ()) if key not in rope]
    if missing:
        raise ValueError(f"{name}: {kind} scaling needs {', '.join(missing)}")
