"""Bounds on a model's configuration: beyond them a file is damaged or hostile."""

import dataclasses

from svsk_jax.model.config import Mixture, ModelConfig

MAX_LAYERS = 10_000
"""Parameters are listed layer by layer, so their number bounds time and memory."""
MAX_EXPERTS = 200_000
"""In all layers, for the same reason."""
MAX_SIZE = 2**31 - 1
"""JAX's default integers are int32."""


def check_config(config: ModelConfig, name: str) -> ModelConfig:
    """The configuration itself, if every size and number is within bounds.

    Args:
        config: as it was read; its types are right.
        name: of the file, which heads error messages.

    Raises:
        ValueError: names the field and its bounds.
    """
    integers = {
        field.name: value
        for field in dataclasses.fields(config)
        if isinstance(value := getattr(config, field.name), int) and not isinstance(value, bool)
    }
    for field, value in integers.items():
        most = MAX_LAYERS if field == "num_layers" else MAX_SIZE
        if not 1 <= value <= most:
            raise ValueError(f"{name}: {field} must be 1 to {most:,}, got {value}")
    if config.num_heads * config.head_dim > MAX_SIZE:
        raise ValueError(
            f"{name}: {config.num_heads} heads of {config.head_dim} are more than {MAX_SIZE:,} channels"
        )
    if config.rope_theta <= 0 or config.rms_norm_eps < 0:
        raise ValueError(
            f"{name}: rope_theta must be above 0 and rms_norm_eps at least 0, got {config.rope_theta} and "
            f"{config.rms_norm_eps}"
        )
    if config.mixture is not None:
        _check_mixture(config.mixture, config.num_layers, name)
    scaling = config.rope_scaling
    if scaling is not None:
        numbers = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
        if min(*numbers, scaling.original_max_position_embeddings, *scaling.factors) <= 0:
            raise ValueError(f"{name}: rope_scaling: its numbers must be above 0, got {scaling}")
        if scaling.kind == "llama3" and scaling.high_freq_factor == scaling.low_freq_factor:
            raise ValueError(f"{name}: rope_scaling: low_freq_factor and high_freq_factor must differ")
        if scaling.kind == "factors" and len(scaling.factors) != config.head_dim // 2:
            raise ValueError(
                f"{name}: rope_scaling has {len(scaling.factors)} factors, expected {config.head_dim // 2}"
            )
    return config


def _check_mixture(mixture: Mixture, layers: int, name: str) -> None:
    sizes = (mixture.num_experts, mixture.moe_intermediate_size, mixture.decoder_sparse_step)
    if max(sizes) > MAX_SIZE or layers * mixture.num_experts > MAX_EXPERTS:
        raise ValueError(
            f"{name}: {layers} layers of {mixture.num_experts} experts of {mixture.moe_intermediate_size} "
            f"hidden units are beyond what is taken: {MAX_EXPERTS:,} experts in all, sizes of {MAX_SIZE:,}"
        )
    outside = [index for index in mixture.mlp_only_layers if not 0 <= index < layers]
    if outside:
        raise ValueError(
            f"{name}: mlp_only_layers names layer {outside[0]}, the model has layers 0 to {layers - 1}"
        )
