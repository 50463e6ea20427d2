"""Configurations of models that users run, by name: sizes can be told without any file."""

from typing import Any

from svsk_jax.model.config import Mixture, ModelConfig

QWEN3: dict[str, Any] = {
    "architecture": "qwen3",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "qk_norm": True,
}
LLAMA3: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def _model(
    family: dict[str, Any], hidden: int, mlp: int, layers: int, heads: int, kv_heads: int = 8, **rest: Any
) -> ModelConfig:
    fields = {**family, "head_dim": 128, **rest}
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        **fields,
    )


def _qwen3_moe(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, expert_mlp: int) -> ModelConfig:
    mixture = Mixture(
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=expert_mlp, norm_topk_prob=True
    )
    return _model(QWEN3, hidden, mlp, layers, heads, kv_heads, architecture="qwen3_moe", mixture=mixture)


KNOWN: dict[str, ModelConfig] = {
    "SmolLM2-135M": _model(
        LLAMA3,
        576,
        1536,
        30,
        9,
        3,
        head_dim=64,
        vocab_size=49152,
        rope_theta=1e5,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": _model(QWEN3, 1024, 3072, 28, 16, tie_word_embeddings=True),
    "Qwen3-1.7B": _model(QWEN3, 2048, 6144, 28, 16, tie_word_embeddings=True),
    "Qwen3-4B": _model(QWEN3, 2560, 9728, 36, 32, tie_word_embeddings=True),
    "Qwen3-8B": _model(QWEN3, 4096, 12288, 36, 32),
    "Qwen3-14B": _model(QWEN3, 5120, 17408, 40, 40),
    "Qwen3-32B": _model(QWEN3, 5120, 25600, 64, 64),
    "Qwen3-30B-A3B": _qwen3_moe(2048, 6144, 48, 32, 4, 768),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 12288, 94, 64, 4, 1536),
    "Llama-3-8B": _model(LLAMA3, 4096, 14336, 32, 32),
    "Llama-3-70B": _model(LLAMA3, 8192, 28672, 80, 64),
}
"""Sources: the config.json of each."""
