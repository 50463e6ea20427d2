"""The dense restore as a Hugging Face folder: safetensors shards that transformers loads."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from svsk_jax.model.linear import restore
from svsk_jax.model.source import ModelSource
from svsk_jax.storage.atomic import output_folder, write_json

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


def export_dense(
    source: ModelSource,
    output: Path,
    names: Mapping[str, str],
    *,
    dtype: DTypeLike,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write every parameter as a dense tensor of `dtype`, layer by layer, with config, tokenizer and index
    beside.

    Args:
        source: the model, packed or not.
        output: folder to make.
        names: the checkpoint's name of each parameter by full path (`convert.names`).
        dtype: of the stored tensors.
        overwrite: replace a folder that an export wrote.
        shard_bytes: largest size of a shard.
        on_layer: called with layers done and their number.

    Returns:
        The number of tensors, shards and bytes.

    Raises:
        FileExistsError: `output` exists.
    """

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        for path, value in source.outer(dtype).items():
            yield names[path], np.asarray(restore(value, dtype=dtype))
        for index in range(source.config.num_layers):
            for path, value in source.layer(index, dtype).items():
                yield names[f"layers.{index}.{path}"], np.asarray(restore(value, dtype=dtype))
            if on_layer:
                on_layer(index + 1, source.config.num_layers)

    with output_folder(output, overwrite=overwrite, marker=INDEX) as folder:
        shards: list[dict[str, np.ndarray]] = [{}]
        files: list[list[str]] = []
        size = total = 0

        def flush() -> None:
            save_file(shards[0], folder / f"part-{len(files)}", metadata={"format": "pt"})
            files.append(list(shards[0]))
            shards[0] = {}

        for name, tensor in pieces():
            if size and size + tensor.nbytes > shard_bytes:
                flush()
                size = 0
            shards[0][name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
        flush()
        weight_map = {}
        for index, tensors in enumerate(files):
            shard = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
            (folder / f"part-{index}").rename(folder / shard)
            weight_map |= dict.fromkeys(tensors, shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(
            folder / "config.json",
            {**_without_quantization(source.hf_config), "dtype": jnp.dtype(dtype).name},
        )
        if source.generation_config:
            write_json(folder / "generation_config.json", source.generation_config)
        source.tokenizer().save_pretrained(str(folder))
    return {"output": str(output), "tensors": len(weight_map), "shards": len(files), "bytes": total}


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
