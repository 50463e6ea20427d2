"""What a place that holds a model offers: an open checkpoint, or one of our own saved models."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from svsk_jax.model.config import ModelConfig


@runtime_checkable
class ParameterSource(Protocol):
    """A model's parameters, read piece by piece."""

    @property
    def config(self) -> ModelConfig:
        """The decoder's configuration."""
        ...

    def outer(self, dtype: DTypeLike) -> dict[str, Any]:
        """Parameters outside the layers, by full path."""
        ...

    def layer(self, index: int, dtype: DTypeLike) -> dict[str, Any]:
        """Parameters of one decoder layer, by path within the layer."""
        ...


@runtime_checkable
class ModelSource(ParameterSource, Protocol):
    """A model that is read piece by piece. Dense values come as numpy arrays of the asked dtype; packed
    ones as they are stored."""

    @property
    def description(self) -> str:
        """What was opened, for people: a hub id with revision, or a path."""
        ...

    @property
    def hf_config(self) -> dict[str, Any]:
        """The config.json to put beside a copy of this model."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """The generation_config.json: stop and start tokens and sampling defaults; may be empty."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with chat template. Raises ValueError when the source has none."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes when the model does; cheap (headers, sizes and samples, not every byte)."""
        ...

    def local_path(self) -> Path:
        """The folder or file that is read."""
        ...
