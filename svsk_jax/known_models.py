"""Configurations of models that users run, by name: sizes can be told without any file."""

from svsk_jax.model.config import ModelConfig


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, *, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        architecture="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        qk_norm=True,
    )


def _llama3(hidden: int, mlp: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


KNOWN: dict[str, ModelConfig] = {
    "SmolLM2-135M": ModelConfig(
        architecture="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Llama-3-8B": _llama3(4096, 14336, 32, 32),
    "Llama-3-70B": _llama3(8192, 28672, 80, 64),
}
"""Sources: the config.json of each."""
MIXTURES = ("Qwen3-30B-A3B", "Qwen3-235B-A22B")
"""Known, but mixtures of experts, which the decoder lacks."""
