"""Saved models: orbax checkpoints with metadata, and exports."""

from svsk_jax.storage.checkpoint import ModelWriter, SavedModel, is_saved_model, writing
from svsk_jax.storage.verify import Verification, verify

__all__ = ["ModelWriter", "SavedModel", "Verification", "is_saved_model", "verify", "writing"]
