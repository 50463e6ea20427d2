"""Checkpoints of other projects, opened piece by piece and put on devices."""

# svsk_jax imports modules of this package: it must be loaded first, whichever of the two is asked for.
import svsk_jax.model  # noqa: F401
from convert.checkpoint import Checkpoint
from convert.config_only import open_config
from convert.load import load_decoder, load_parameters
from convert.source import open_checkpoint

__all__ = ["Checkpoint", "load_decoder", "load_parameters", "open_checkpoint", "open_config"]
