"""PyTorch state dicts (.bin, .pt), unpickled with `weights_only`, one file at a time. torch is optional."""

import dataclasses
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.tensors import RawTensor
from svsk_jax.json_data import shown


@dataclasses.dataclass
class _OpenShard:
    """The file whose tensors are in memory; opening the next lets go of it."""

    path: Path | None = None
    tensors: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def open(self, path: Path) -> Mapping[str, Any]:
        if path != self.path:
            self.path, self.tensors = None, {}
            self.tensors = _load(path)
            self.path = path
        return self.tensors


def read_torch(paths: list[Path]) -> list[tuple[Path, RawTensor]]:
    """Every tensor of the files, with the file that holds it.

    Raises:
        ValueError: torch is not installed, or a file is no state dict of tensors.
    """
    shard = _OpenShard()
    found = []
    for path in paths:
        for name, tensor in shard.open(path).items():
            found.append((path, _tensor(shard, path, name, tensor)))
    return found


def _tensor(shard: _OpenShard, path: Path, name: str, tensor: Any) -> RawTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)

    def read(start: int, stop: int) -> np.ndarray:
        whole = shard.open(path)[name].detach()
        part = whole[start:stop]
        if dtype != "bfloat16":
            return part.numpy()
        # numpy has no bfloat16 of its own: take the bits across.
        import torch

        return part.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    readable = dtype in ("bfloat16", "float16", "float32", "float64")
    return RawTensor(name=name, shape=shape, dtype=dtype, read=read, readable=readable)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path}: reading .bin and .pt files needs torch; pip install 'svsk-jax[torch]', or use a "
            "safetensors copy of the model"
        ) from error
    try:
        # Files written before torch 1.6 are not zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: is corrupt, or holds more than tensors, which is refused because unpickling it can "
            "run any code; download it again or use a safetensors copy of the model"
        ) from error
    except Exception as error:  # the unpickler and the archive raise many kinds on damaged files
        raise ValueError(f"{path}: truncated or corrupt PyTorch file ({error}); download it again") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a state dict of tensors, found {type(state).__name__}")
    size = path.stat().st_size
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise ValueError(f"{path}: expected a state dict of dense tensors, but {shown(name)} is not one")
        # A stride of 0 makes a large tensor of a few bytes.
        if value.device.type != "cpu" or value.numel() * value.element_size() > size:
            raise ValueError(
                f"{path}: tensor {shown(name)} of shape {list(value.shape)} does not fit in the file's "
                f"{size} bytes; download it again"
            )
    return state
