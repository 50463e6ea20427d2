"""Each ingredient of the default recipe on and off, at equal bytes: layer error and KL divergence of the
whole model, over several calibration texts.

    python -m benchmarks.quality.subsets TEXTS
    svsk calibrate --model FOLDER --calib TEXTS/0/*.jsonl --chunks 96 --output STATISTICS/0     (and 1, 2)
    python -m benchmarks.quality.ablation quantize --model FOLDER --statistics STATISTICS/* --output ROWS
    python -m benchmarks.quality.ablation evaluate --model FOLDER --input ROWS --json ablation.json
    python -m benchmarks.quality.ablation report --json ablation.json

Without --model it is SmolLM2-135M, dithered (see reference.py). The spread over the texts says which
differences are real.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.quality.ablation_report import markdown
from benchmarks.quality.compare import Reference
from benchmarks.quality.families import FAMILIES, about, add_arguments, evaluation_windows
from benchmarks.quality.reference import dithered_smollm2
from benchmarks.quality.rows import saved_row
from svsk_jax import ModelSource, QuantConfig, Statistics, open_model, quantize, recipe
from svsk_jax.pipeline.progress import geometric_mean
from svsk_jax.storage.atomic import write_json

RESULT = "ablation.json"


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
        "one beam": {"beam_width": 1},
        "no joint round": {"joint_rounds": 0},
        "H not shrunk": {"moment_shrinkage": 0.0},
        "G not shrunk": {"sensitivity_shrinkage": 0.0},
        "svsk-r8": {"bits": recipe("svsk-r8").bits},
    }
    listed = {name: dataclasses.replace(default, **change) for name, change in changes.items()}
    listed["no Fisher pass"] = default.without_sensitivity()
    return listed | {name: recipe(name) for name in ("classic-r16", "classic-r8")}


def _quantize(source: ModelSource, folders: list[Path], output: Path, names: list[str]) -> None:
    """Write OUTPUT/ROW/STATISTICS/, a saved model, for each row and folder; those of a name are replaced."""
    known = variants()
    for name, folder in itertools.product(names, folders):
        statistics, place = Statistics.open(folder), output / name / folder.name
        made = quantize(source, place, known[name], recipe=name, statistics=statistics, overwrite=True)
        result = {
            "statistics": dict(statistics.manifest["text"]),
            "bits": made.budget.linear_bits,
            "layer_error": geometric_mean(list(made.errors.values())),
            "predicted_nats": made.predicted_nats,
        }
        write_json(place / RESULT, result)
        print(f"{name}, {folder.name}: {json.dumps(result)}", flush=True)


def _evaluate(source: ModelSource, arguments: argparse.Namespace) -> None:
    windows = evaluation_windows(source.tokenizer(), arguments.wikitext, arguments.windows)
    reference = Reference(source, windows)
    rows = []
    print(f"{'row':32} {'bits':>6} {'layer error':>11} " + " ".join(f"{family:>20}" for family in FAMILIES))
    for name in variants():
        runs = []
        for path in sorted((arguments.input / name).glob(f"*/{RESULT}")):
            divergences = reference.divergence(saved_row(name, str(path.parent)))
            kld = {family: float(np.mean(part.kld)) for family, part in divergences.items()}
            runs.append({**json.loads(path.read_text(encoding="utf-8")), "kld": kld})
        if not runs:
            continue
        rows.append({"name": name, "runs": runs})
        klds = ([run["kld"][family] for run in runs] for family in FAMILIES)
        spread = " ".join(f"{np.mean(values):11.4f} ± {np.std(values):.4f}" for values in klds)
        print(f"{name:32} {runs[0]['bits']:6.3f} {runs[0]['layer_error']:11.2e} {spread}", flush=True)
    if arguments.json:
        report = {
            **about(source, windows, "svsk-jax", "jax"),
            "rows": rows,
        }
        write_json(arguments.json, report)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("quantize", help="quantize every variant from each calibration")
    make.add_argument(
        "--statistics", type=Path, nargs="+", required=True, help="folders that `svsk calibrate` wrote"
    )
    make.add_argument("--output", type=Path, required=True)
    make.add_argument("--rows", nargs="+", default=None, metavar="ROW", help="only these; default all")
    judge = commands.add_parser("evaluate", help="compare them with the unquantized model")
    judge.add_argument("--input", type=Path, required=True, help="folder that `quantize` wrote")
    judge.add_argument("--json", type=Path, default=None)
    add_arguments(judge)
    show = commands.add_parser("report", help="a table of what `evaluate` found, against the first row")
    show.add_argument("--json", type=Path, required=True)
    for command in (make, judge):
        command.add_argument("--model", default=None, help="the unquantized model; default SmolLM2, dithered")
    arguments = parser.parse_args()
    if arguments.command == "report":
        print(markdown(json.loads(arguments.json.read_text(encoding="utf-8"))))
        return
    jax.config.update("jax_default_matmul_precision", "highest")
    source = open_model(arguments.model) if arguments.model else dithered_smollm2()
    if arguments.command == "evaluate":
        _evaluate(source, arguments)
        return
    unknown = set(arguments.rows or ()) - set(variants())
    if unknown:
        parser.error(f"--rows {', '.join(sorted(unknown))}: unknown; known are {', '.join(variants())}")
    _quantize(source, arguments.statistics, arguments.output, arguments.rows or list(variants()))


if __name__ == "__main__":
    main()
