"""Saved models: orbax checkpoints with metadata, and exports."""

from svsk_jax.storage.checkpoint import ModelWriter, SavedModel, is_saved_model, writing

__all__ = ["ModelWriter", "SavedModel", "is_saved_model", "writing"]
