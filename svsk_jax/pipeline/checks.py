"""What every run asks of its input and its place of output before it starts."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from svsk_jax.model.config import ModelConfig
from svsk_jax.model.source import ModelSource
from svsk_jax.quant.types import QuantConfig

MAX_WEIGHT = 7.0 * 65504
"""The largest code of the linear codebook times the largest f16 scale. Weights beyond it would be cut off."""


@jax.jit
def largest_magnitude(W: Any) -> jax.Array:
    """max |w|."""
    return jnp.max(jnp.abs(W))


def check_weight(W: Any, name: str) -> Any:
    """The matrix itself; ValueError, which names it, where f16 scales cannot store its values."""
    peak = float(largest_magnitude(W))
    if not peak <= MAX_WEIGHT:
        raise ValueError(
            f"{name}: its largest magnitude is {peak:.3g}, f16 scales store at most {MAX_WEIGHT:,.0f}; the "
            "checkpoint is damaged or its training diverged"
        )
    return W


def default_dtype() -> DTypeLike:
    """Dtype of activations and dense weights: f32 on CPU, whose matrix products have no faster form, bf16
    elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def refuse_packed(source: ModelSource, outer: dict[str, Any]) -> None:
    """ValueError unless the model is unquantized."""
    if (
        not isinstance(outer["embedding.weight"], (np.ndarray, jax.Array))
        or getattr(source, "metadata", {}).get("recipe", "dense") != "dense"
    ):
        raise ValueError(f"--model {source.description}: already quantized; give the unquantized checkpoint")


def refuse_polish(recipe: str, config: QuantConfig, model: ModelConfig) -> None:
    """NotImplementedError for a recipe with polish and a mixture of experts."""
    if config.polish and model.mixture is not None:
        raise NotImplementedError(
            f"--recipe {recipe}: polish does not train mixtures of experts; take the recipe without polish"
        )


def files_bytes(folder: Path) -> int:
    """Bytes of the files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_space(output: Path, needed: int) -> None:
    """OSError unless the disk that `output` will lie on has `needed` bytes free."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            f"output {output}: needs {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free; "
            "free some space or give another --output"
        )
