"""Shapes [N, K] of the matrices of models that users run, as they are launched: q, k and v as one, and gate
and up as one."""

MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "SmolLM2-135M": {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)},
    "Qwen3-0.6B": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
    "Qwen3-4B": {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)},
    "Qwen3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
    "Qwen3-32B": {"qkv": (10240, 5120), "o": (5120, 8192), "gate_up": (51200, 5120), "down": (5120, 25600)},
    "Llama-3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
"""By model, then by launch."""


def unique_shapes(models: tuple[str, ...] = tuple(MODELS)) -> list[tuple[int, int]]:
    """Every shape of these models once, in order."""
    return list(dict.fromkeys(shape for model in models for shape in MODELS[model].values()))
