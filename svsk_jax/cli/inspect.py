"""`svsk inspect`."""

import dataclasses
from typing import Any

import jax
import numpy as np
from rich.table import Table

from svsk_jax.cli.common import ModelFlags, Verb, console
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import parameter_shapes, quantized_paths
from svsk_jax.model.source import ModelSource
from svsk_jax.models import open_model
from svsk_jax.pipeline.progress import geometric_mean
from svsk_jax.storage.checkpoint import SavedModel
from svsk_jax.storage.packing import abstract


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(ModelFlags, Verb):
    """Show what a model is made of: shapes, stored form, bits per weight and layer error of every tensor."""

    def run(self) -> dict[str, Any]:
        """Inspect."""
        source = open_model(self.model, revision=self.revision)
        rows = _saved_rows(source) if isinstance(source, SavedModel) else _shape_rows(source)
        totals = _totals(rows, source.config)
        metadata = source.metadata if isinstance(source, SavedModel) else {}
        about = {
            key: metadata[key] for key in ("recipe", "calibration", "source", "versions") if key in metadata
        }
        _print(source, rows, totals, about)
        return {"model": source.description, **about, "totals": totals, "tensors": rows}


def _saved_rows(source: SavedModel) -> list[dict[str, Any]]:
    rows = [_saved_row(path, tensor, None) for path, tensor in source.metadata["tensors"].items()]
    for index in range(source.config.num_layers):
        layer = source.layer_metadata(index)
        for path, tensor in layer["tensors"].items():
            error = layer["errors"].get(path.removesuffix(".weight"))
            rows.append(_saved_row(f"layers.{index}.{path}", tensor, error))
    return rows


def _saved_row(path: str, tensor: dict[str, Any], error: float | None) -> dict[str, Any]:
    leaves = jax.tree.leaves(abstract(tensor))
    size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    form = tensor["kind"] if tensor["kind"] != "dense" else tensor["dtype"]
    if tensor["kind"] == "svsk":
        ranks = sorted({rank for row in (tensor["sidecar"] or {"ranks": [[0]]})["ranks"] for rank in row})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        form = f"{tensor['codebook']} g{tensor['group']} {tensor['scales'].replace('_', '-')} rank {rank}"
    return {"path": path, "shape": tensor["shape"], "form": form, "bytes": size, "error": error}


def _shape_rows(source: ModelSource) -> list[dict[str, Any]]:
    shapes = parameter_shapes(source.config)
    return [
        {"path": path, "shape": list(shape), "form": "checkpoint", "bytes": None, "error": None}
        for path, shape in shapes.items()
    ]


def _bits(rows: list[dict[str, Any]]) -> float | None:
    weights = sum(int(np.prod(row["shape"])) for row in rows)
    if not rows or any(row["bytes"] is None for row in rows):
        return None
    return 8 * sum(row["bytes"] for row in rows) / weights


def _totals(rows: list[dict[str, Any]], config: ModelConfig) -> dict[str, Any]:
    linears = {f"{name}.weight" for name in quantized_paths(config)}
    sizes = [row["bytes"] for row in rows]
    return {
        "parameters": sum(int(np.prod(row["shape"])) for row in rows),
        "bytes": None if None in sizes else sum(sizes),
        "decoder_linear_bits": _bits([row for row in rows if row["path"] in linears]),
        "file_bits": _bits(rows),
        "geometric_mean_layer_error": geometric_mean(
            [row["error"] for row in rows if row["error"] is not None]
        ),
    }


def _print(
    source: ModelSource, rows: list[dict[str, Any]], totals: dict[str, Any], about: dict[str, Any]
) -> None:
    table = Table(title=source.description)
    for column in ("tensor", "shape", "stored as"):
        table.add_column(column)
    for column in ("bytes", "bits/weight", "layer error"):
        table.add_column(column, justify="right")
    for row in rows:
        bits = _bits([row])
        table.add_row(
            row["path"],
            " × ".join(map(str, row["shape"])),
            row["form"],
            "" if row["bytes"] is None else f"{row['bytes']:,}",
            "" if bits is None else f"{bits:.3f}",
            "" if row["error"] is None else f"{row['error']:.2e}",
        )
    console.print(table)
    config = source.config
    console.print(f"{config.architecture}, {config.num_layers} layers, {totals['parameters']:,} parameters")
    if totals["bytes"] is not None:
        linears = totals["decoder_linear_bits"]
        console.print(
            f"recipe {about.get('recipe')}: {linears:.3f} bits/weight in the decoder linears, "
            f"{totals['file_bits']:.3f} in the "
            f"whole file, {totals['bytes'] / 1e6:,.1f} MB"
        )
    if totals["geometric_mean_layer_error"] is not None:
        console.print(f"geometric mean of the layer errors {totals['geometric_mean_layer_error']:.2e}")
