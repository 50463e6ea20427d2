"""Embedding and head in 4 bits: what they cost, and what their bytes buy in the decoder linears.

    svsk calibrate --model FOLDER --output STATISTICS
    python -m benchmarks.quality.embedding --model FOLDER --statistics STATISTICS [...] --json embedding.json
    python -m benchmarks.quality.embedding --report embedding.json

KL divergence of whole models, embedding and head included, where the other benchmarks of quality compare the
linears alone. Without --model it is SmolLM2-135M, dithered (see reference.py). Each row is quantized from
every STATISTICS; ratios to the first row are paired by token, errors take tokens as independent.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.compare import Reference, geometric_mean, ratio
from benchmarks.quality.families import FAMILIES, about, add_arguments, evaluation_windows
from benchmarks.quality.reference import dithered_smollm2
from convert.load import load_parameters
from svsk_jax import ModelSource, QuantConfig, Statistics, open_model, quantize, recipe
from svsk_jax.model.parameters import parameter_shapes, quantized_paths
from svsk_jax.pipeline.outer import store_outer
from svsk_jax.quant.budget import Budget, predict
from svsk_jax.storage import SavedModel
from svsk_jax.storage.atomic import write_json
from svsk_jax.xla_flags import take_library_products


def rows(source: ModelSource, name: str) -> dict[str, QuantConfig]:
    """A recipe with int8, with 4 bits, and with 4 bits and what they save spent on the linears."""
    shapes, linears = parameter_shapes(source.config), quantized_paths(source.config)
    int8 = recipe(name)
    q4 = dataclasses.replace(int8, embedding="q4")
    before, after = (predict(shapes, linears, config) for config in (int8, q4))
    assert int8.bits is not None
    saved = 8 * (before.total_bytes - after.total_bytes) / before.linear_weights
    return {
        f"{name}, int8": int8,
        f"{name}, q4": q4,
        f"{name}, q4, equal bytes": dataclasses.replace(q4, bits=int8.bits + saved),
    }


def measure(
    source: ModelSource, statistics: list[Path], reference: Reference, name: str
) -> list[dict[str, Any]]:
    """One record for each row."""
    found: dict[str, list[Any]] = {}
    sizes: dict[str, Budget] = {}
    for folder in statistics:
        opened = Statistics.open(folder)
        with tempfile.TemporaryDirectory() as work:
            saved: dict[float | None, SavedModel] = {}
            for row, config in rows(source, name).items():
                if config.bits not in saved:
                    place = Path(work) / str(len(saved))
                    made = quantize(source, place, config, recipe=row, statistics=opened)
                    saved[config.bits], sizes[row] = SavedModel(made.output), made.budget
                else:
                    # The linears are the same: only what is outside of them is made.
                    sizes[row] = predict(
                        parameter_shapes(source.config), quantized_paths(source.config), config
                    )
                parameters = dict(load_parameters(saved[config.bits], jnp.float32))
                parameters |= store_outer(source.outer(np.float32), source.config, config, opened)
                found.setdefault(row, []).append(reference.divergence_of(parameters))
                print(f"{row}, {folder.name}: {_means(found[row][-1])}", flush=True)
    base = next(iter(found.values()))
    records = []
    for row, runs in found.items():
        ratios = {}
        for family in FAMILIES:
            own, of = (np.concatenate([np.asarray(run[family].kld) for run in each]) for each in (runs, base))
            ratios[family] = ratio(own, of)
        records.append(
            {
                "name": row,
                "bits_linears": sizes[row].linear_bits,
                "bits_file": sizes[row].total_bits,
                "bytes": sizes[row].total_bytes,
                "kld": [_means(run) for run in runs],
                "ratio": {family: vars(each) for family, each in ratios.items()},
                "mean_ratio": vars(geometric_mean(list(ratios.values()))),
            }
        )
    return records


def _means(divergence: Mapping[str, Any]) -> dict[str, float]:
    return {family: float(np.mean(divergence[family].kld)) for family in FAMILIES}


def markdown(report: Mapping[str, Any]) -> str:
    """One line for each row."""
    lines = [
        "| recipe | bits/weight, linears | bits/weight, file | MB | "
        + " | ".join(f"KLD, {family}" for family in FAMILIES)
        + " | ÷ int8 |",
        "|---|" + "---:|" * (4 + len(FAMILIES)),
    ]
    for row in report["rows"]:
        means = (f"{np.mean([run[family] for run in row['kld']]):.4f}" for family in FAMILIES)
        mean = row["mean_ratio"]
        lines.append(
            f"| {row['name']} | {row['bits_linears']:.3f} | {row['bits_file']:.3f} "
            f"| {row['bytes'] / 1e6:.1f} | {' | '.join(means)} | {mean['value']:.3f} ± {mean['error']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="the unquantized model; default SmolLM2, dithered")
    parser.add_argument("--statistics", type=Path, nargs="+", help="folders that `svsk calibrate` wrote")
    parser.add_argument("--recipe", default="svsk-r16", choices=["svsk-r16", "svsk-r8"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, metavar="JSON", help="only show what an earlier run found")
    add_arguments(parser)
    flags = parser.parse_args()
    if flags.report:
        print(markdown(json.loads(flags.report.read_text(encoding="utf-8"))))
        return
    if not flags.statistics:
        parser.error("--statistics FOLDER is needed; make one with `svsk calibrate`")
    take_library_products()
    jax.config.update("jax_default_matmul_precision", "highest")
    source = open_model(flags.model) if flags.model else dithered_smollm2()
    families = evaluation_windows(source.tokenizer(), flags.wikitext, flags.windows)
    report = {
        **about(source, families, "svsk-jax", "jax"),
        "rows": measure(source, flags.statistics, Reference(source, families), flags.recipe),
    }
    if flags.json:
        write_json(flags.json, report)
    print(markdown(report))


if __name__ == "__main__":
    main()
