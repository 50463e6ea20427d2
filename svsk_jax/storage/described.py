"""Whether what a saved model says of its tensors can be true."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pallas_kernels.svsk_matmul.layout import tile_spans
from pallas_kernels.svsk_matmul.types import Codebook, ScaleKind
from svsk_jax.json_data import from_json, shown
from svsk_jax.quant.types import MAX_RANK


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiles:
    tile: tuple[int, int]
    ranks: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Packed:
    kind: Literal["svsk"]
    shape: tuple[int, int]
    group: Literal[16, 32, 64]
    scales: ScaleKind
    codebook: Codebook
    sidecar: _Tiles | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Int8:
    kind: Literal["int8"]
    shape: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Dense:
    kind: Literal["dense"]
    shape: tuple[int, ...]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]


KINDS: dict[Any, type] = {"svsk": _Packed, "int8": _Int8, "dense": _Dense}


def check_described(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> Mapping[str, Any]:
    """The metadata of one checkpoint themselves, if they describe these tensors in a form that there is.

    Args:
        metadata: with `tensors`, by path, as `packing.describe` writes them.
        shapes: the model's shape of each of the tensors.
        path: of the checkpoint, which heads error messages.

    Raises:
        ValueError: a tensor that is missing, unknown, of another shape, or of no form that there is.
    """
    tensors = metadata["tensors"]
    if not isinstance(tensors, Mapping) or tensors.keys() != shapes.keys():
        raise ValueError(
            f"{path}: its tensors are not those of the model ({shown(tensors)}); it is damaged, make it again"
        )
    for name, tensor in tensors.items():
        kind = tensor.get("kind") if isinstance(tensor, Mapping) else None
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"{path}: {name}: unknown kind {shown(kind)}; a newer svsk-jax may know it")
        found = from_json(KINDS[kind], tensor, f"{path}: {name}")
        if found.shape != shapes[name]:
            raise ValueError(
                f"{path}: {name} has shape {list(found.shape)}, the model {list(shapes[name])}; it is "
                "damaged, make it again"
            )
        if kind == "svsk" and found.sidecar is not None:
            _check_tiles(found.sidecar, found.shape, f"{path}: {name}")
    return metadata


def _check_tiles(tiles: _Tiles, shape: tuple[int, int], name: str) -> None:
    rows, columns = tiles.tile
    if rows < 1 or columns < 0:
        raise ValueError(f"{name}: no sidecar has tiles of {rows} × {columns}; it is damaged, make it again")
    check_ranks(tiles.ranks, (rows, columns), shape, name)


def check_ranks(
    ranks: tuple[tuple[int, ...], ...], tile: tuple[int, int], shape: tuple[int, int], name: str
) -> None:
    """ValueError, headed by `name`, unless there is a rank of 0 to 128 for each tile of an [N, K] matrix."""
    down, across = len(tile_spans(shape[0], tile[0])), len(tile_spans(shape[1], tile[1]))
    if len(ranks) != down or any(len(row) != across for row in ranks):
        raise ValueError(f"{name}: expected ranks of {down} × {across} tiles, found {shown(ranks)}")
    if not all(0 <= rank <= MAX_RANK for row in ranks for rank in row):
        raise ValueError(f"{name}: ranks must be 0 to {MAX_RANK}, found {shown(ranks)}")
