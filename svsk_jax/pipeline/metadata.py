"""Metadata that every saved model carries."""

from importlib.metadata import version
from typing import Any

from svsk_jax.model.source import ModelSource


def origin(source: ModelSource) -> dict[str, Any]:
    """Where a model came from and what made it."""
    return {
        "source": source.description,
        "source_fingerprint": source.fingerprint(),
        "versions": {name: version(name) for name in ("svsk-jax", "jax")},
    }
