"""Sizes that the parts share, and random layers of them."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from benchmarks.speed.models import packed_parameters
from svsk_jax.known_models import KNOWN
from svsk_jax.model import ModelConfig
from svsk_jax.model.parameters import layer_parameters

T = TypeVar("T")
MODEL_NAME = "Qwen3-8B"
RANK = 9
"""In tiles of 512 rows: what svsk-r16's budget buys on average."""
TINY = dataclasses.replace(
    KNOWN[MODEL_NAME],
    vocab_size=515,
    hidden_size=256,
    intermediate_size=1024,
    num_layers=1,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
)


def config_of(tiny: bool, layers: int | None = None) -> ModelConfig:
    config = TINY if tiny else KNOWN[MODEL_NAME]
    return config if tiny or layers is None else dataclasses.replace(config, num_layers=layers)


def counts(tiny: bool) -> list[int]:
    """How many devices are taken: 1, 2, 4, … of what is here."""
    here = 2 if tiny else jax.device_count()
    return [1 << power for power in range(here.bit_length()) if 1 << power <= here]


def machine() -> dict[str, Any]:
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "jax": jax.__version__}


def at_once(calls: Sequence[Callable[[], T]], threads: int | None = None) -> list[T]:
    """What some calls give, each on a thread; default: as many threads as calls."""
    with ThreadPoolExecutor(threads or len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


class RandomSource:
    """Packed parameters of random values, made layer by layer, the same at each reading."""

    def __init__(self, config: ModelConfig):
        self.config = config
        # As little as can be outside the layers of which one is made at a time.
        self._layer = dataclasses.replace(config, num_layers=1, vocab_size=1, tie_word_embeddings=True)

    def outer(self, dtype: DTypeLike) -> dict[str, Any]:
        """Embedding, final norm and head."""
        outside = parameters_of(dataclasses.replace(self.config, num_layers=1), jax.random.key(1))
        return {path: value for path, value in outside.items() if not path.startswith("layers.")}

    def layer(self, index: int, dtype: DTypeLike) -> dict[str, Any]:
        """Of one decoder layer."""
        return layer_parameters(parameters_of(self._layer, jax.random.key(2 + index)), 0)


def parameters_of(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    return packed_parameters(config, key, rank=RANK)


def relative(actual: jax.Array, expected: jax.Array) -> float:
    """Error in the Frobenius norm."""
    difference = actual.astype(jnp.float32) - expected.astype(jnp.float32)
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected.astype(jnp.float32)))
