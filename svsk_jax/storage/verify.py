"""Whether a saved model's tensors are what was written."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from svsk_jax.storage import arrays
from svsk_jax.storage.checkpoint import MARKER, OUTER, checkpoint_paths, is_saved_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found."""

    tensors: int
    """How many were checked."""
    damaged: dict[str, str]
    """What is wrong with each damaged tensor, by path; a checkpoint whose metadata cannot be read stands for
    all of its tensors, by the name of its folder."""


def verify(folder: Path, on_checkpoint: Callable[[int, int], None] | None = None) -> Verification:
    """Read every tensor of a saved model and compare its SHA-256 with the one in the metadata.

    Args:
        folder: the model's folder.
        on_checkpoint: called with checkpoints done and their number.

    Raises:
        ValueError: not a saved model, or one that was saved without digests, by an earlier svsk-jax.
    """
    if not is_saved_model(folder):
        raise ValueError(f"{folder}: not a model that svsk saved (no {MARKER})")
    (outer,) = checkpoint_paths(folder, 0).values()
    try:
        metadata = arrays.read_metadata(outer)
    except ValueError as error:
        return Verification(tensors=0, damaged={OUTER: str(error)})
    if "sha256" not in metadata:
        raise ValueError(
            f"{folder}: saved by an earlier svsk-jax, which stored no digests: its tensors can be used but "
            "not checked; make the model again to have digests"
        )
    tensors, damaged = 0, {}
    checkpoints = checkpoint_paths(folder, metadata["model_config"]["num_layers"])
    for done, (prefix, path) in enumerate(checkpoints.items(), start=1):
        try:
            metadata = arrays.read_metadata(path)
        except ValueError as error:
            damaged[path.name] = str(error)
            continue
        for name in metadata["tensors"]:
            tensors += 1
            # One at a time: orbax restores all that it is asked for or nothing.
            try:
                differs = arrays.differing(arrays.restore(path, metadata, [name]), metadata)
            except ValueError as error:
                damaged[f"{prefix}{name}"] = str(error)
                continue
            if differs:
                damaged[f"{prefix}{name}"] = "its SHA-256 is not the one in the metadata"
        if on_checkpoint:
            on_checkpoint(done, len(checkpoints))
    return Verification(tensors=tensors, damaged=damaged)
