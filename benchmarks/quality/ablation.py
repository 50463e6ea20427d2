"""Each ingredient of the default recipe on and off, at equal bytes: layer error and KL divergence of the
whole model.

    svsk calibrate --model FOLDER --output STATISTICS        (once for each calibration subset, --seed
    differing) python -m benchmarks.quality.ablation --model FOLDER --statistics STATISTICS [STATISTICS …]
    --json ablation.json

Without --model it is SmolLM2-135M, dithered (see reference.py). With several statistics the spread between
them says which differences are real.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.quality.compare import Reference
from benchmarks.quality.families import FAMILIES, add_arguments, evaluation_windows
from benchmarks.quality.reference import dithered_smollm2
from benchmarks.quality.rows import saved_row
from svsk_jax import QuantConfig, Statistics, open_model, quantize, recipe
from svsk_jax.pipeline.progress import geometric_mean
from svsk_jax.storage.atomic import write_json


def variants() -> dict[str, QuantConfig]:
    """The default recipe and what is left of it without one ingredient, by name."""
    default = recipe("svsk-r16")
    changes: dict[str, dict[str, Any]] = {
        "svsk-r16": {},
        "no row feedback": {"feedback": "columns"},
        "no feedback": {"feedback": "none"},
        "plain H": {"fisher_share": 0.0},
        "sidecar in the H metric": {"metric": "full"},
        "linear codebook": {"codebook": "linear"},
        "groups of 32 alone": {"groups": (32,)},
        "groups of 16 alone": {"groups": (16,)},
        "groups of 16, no sidecar": {"groups": (16,), "bits": None, "rank": 0},
        "groups of 16, equal ranks of 4": {"groups": (16,), "bits": None, "rank": 4},
        "scale search weighted by h": {"importance": "second_moment"},
        "no joint round": {"joint_rounds": 0},
        "one joint round": {"joint_rounds": 1},
        "H not shrunk": {"moment_shrinkage": 0.0},
        "G not shrunk": {"sensitivity_shrinkage": 0.0},
        "svsk-r8": {"bits": recipe("svsk-r8").bits},
    }
    listed = {name: dataclasses.replace(default, **change) for name, change in changes.items()}
    return listed | {name: recipe(name) for name in ("classic-r16", "classic-r8")}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=None)
    parser.add_argument("--statistics", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", nargs="+", default=None, metavar="ROW", help="only these; default all")
    parser.add_argument("--json", type=Path, default=None)
    add_arguments(parser)
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    source = open_model(arguments.model) if arguments.model else dithered_smollm2()
    windows = evaluation_windows(source.tokenizer(), arguments.wikitext, arguments.windows)
    reference = Reference(source, windows)
    known = variants()
    unknown = set(arguments.rows or ()) - set(known)
    if unknown:
        parser.error(f"--rows {', '.join(sorted(unknown))}: unknown; known are {', '.join(known)}")
    rows = []
    print(f"{'row':32} {'bits':>6} {'layer error':>11} " + " ".join(f"{family:>20}" for family in FAMILIES))
    for name in arguments.rows or known:
        results = []
        for folder in arguments.statistics:
            with tempfile.TemporaryDirectory() as scratch:
                output = Path(scratch) / "model"
                made = quantize(source, output, known[name], recipe=name, statistics=Statistics.open(folder))
                divergences = reference.divergence(saved_row(name, str(output)))
            results.append(
                {
                    "statistics": folder.name,
                    "bits": made.budget.linear_bits,
                    "layer_error": geometric_mean(list(made.errors.values())),
                    "predicted_nats": made.predicted_nats,
                    "kld": {family: float(np.mean(part.kld)) for family, part in divergences.items()},
                }
            )
        rows.append({"name": name, "runs": results})
        klds = {family: [run["kld"][family] for run in results] for family in FAMILIES}
        print(
            f"{name:32} {results[0]['bits']:6.3f} {results[0]['layer_error']:11.2e} "
            + " ".join(f"{np.mean(values):11.4f} ± {np.std(values):.4f}" for values in klds.values()),
            flush=True,
        )
    if arguments.json:
        write_json(
            arguments.json,
            {
                "date": datetime.date.today().isoformat(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
                "versions": {name: version(name) for name in ("svsk-jax", "jax")},
                "model": Path(source.description).name,
                "families": {family: part.scored for family, part in windows.items()},
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
