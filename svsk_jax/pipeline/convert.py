"""Store a model unquantized."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from svsk_jax.model.parameters import parameter_shapes
from svsk_jax.model.source import ModelSource
from svsk_jax.pipeline.checks import refuse_packed, require_space
from svsk_jax.pipeline.metadata import origin
from svsk_jax.pipeline.progress import OnProgress, Progress
from svsk_jax.storage.atomic import check_output
from svsk_jax.storage.checkpoint import MARKER, writing


def convert(
    source: ModelSource,
    output: Path,
    *,
    dtype: DTypeLike,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Store a model unquantized in our format, layer by layer, every parameter in `dtype`; returns its
    metadata.

    Raises:
        ValueError: a tensor is damaged, missing or of the wrong shape.
        FileExistsError: `output` exists.
    """
    weights = sum(int(np.prod(shape)) for shape in parameter_shapes(source.config).values())
    check_output(output, overwrite, MARKER)
    require_space(output, weights * jnp.dtype(dtype).itemsize)
    with writing(output, overwrite=overwrite) as writer:
        for index in range(source.config.num_layers):
            parameters = source.layer(index, dtype)
            writer.layer(index, {path: jnp.asarray(value) for path, value in parameters.items()})
            if on_progress:
                on_progress(Progress(stage="convert", layer=index + 1, layers=source.config.num_layers))
        outer = {path: jnp.asarray(value) for path, value in source.outer(dtype).items()}
        refuse_packed(source, outer)
        metadata = {"recipe": "dense", "dtype": jnp.dtype(dtype).name, **origin(source)}
        writer.outer(outer, source, metadata)
    return metadata
