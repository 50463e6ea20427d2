"""svsk's models beside llama.cpp's formats and plain rounding: KL divergence and bits per weight.

    svsk calibrate --model FOLDER --output STATISTICS
    python -m benchmarks.quality.peers quantize --model FOLDER --statistics STATISTICS --output ROWS
    python -m benchmarks.quality.peers evaluate --model FOLDER --input ROWS --svsk r16=SAVED --json peers.json
    python -m benchmarks.quality.peers report --json peers.json --plot peers.svg

The importance matrices of the rows called `+im` are the second moments of the linears' inputs in STATISTICS.
Without --model it is SmolLM2-135M, dithered (see reference.py). llama.cpp's rows need
`pip install 'svsk-jax[peers]'`, or the folder of ggml's libraries in $SVSK_GGML_LIB, for `quantize` only.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import jax

from benchmarks.quality.compare import Reference, compare
from benchmarks.quality.families import about, add_arguments, evaluation_windows
from benchmarks.quality.peers_report import markdown, plot
from benchmarks.quality.reference import dithered_smollm2
from benchmarks.quality.rows import BASELINE, Row, quantize_rows, registry, saved_row, stored_rows
from svsk_jax import ModelSource, open_model
from svsk_jax.calibration.store import Statistics
from svsk_jax.storage.atomic import write_json


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("quantize", help="quantize the peers' rows and store their restored weights")
    make.add_argument("--statistics", type=Path, required=True, help="folder that `svsk calibrate` wrote")
    make.add_argument(
        "--output", type=Path, required=True, help="folder for the rows; those of a name are replaced"
    )
    make.add_argument("--rows", nargs="+", default=None, metavar="ROW", help="only these; default all")
    judge = commands.add_parser("evaluate", help="compare rows with the unquantized model")
    judge.add_argument("--input", type=Path, required=True, help="folder that `quantize` wrote")
    judge.add_argument(
        "--svsk", nargs="+", default=[], metavar="NAME=FOLDER", help="models that `svsk quantize` saved"
    )
    judge.add_argument("--json", type=Path, default=None)
    add_arguments(judge)
    show = commands.add_parser("report", help="tables and a plot of what `evaluate` found")
    show.add_argument("--json", type=Path, required=True)
    show.add_argument("--rows", nargs="+", default=None, metavar="ROW", help="only these; default all")
    for command in (judge, show):
        command.add_argument("--markdown", type=Path, default=None)
        command.add_argument("--plot", type=Path, default=None, help="SVG; needs matplotlib")
    for command in (make, judge):
        command.add_argument("--model", default=None, help="the unquantized model; default SmolLM2, dithered")
    return parser


def _say(line: str) -> None:
    print(line, flush=True)


def _named(text: str) -> Row:
    name, separator, folder = text.partition("=")
    if not separator:
        raise ValueError(f"--svsk {text}: expected NAME=FOLDER")
    return saved_row(name, folder)


def _rows(arguments: argparse.Namespace, source: ModelSource) -> list[Row]:
    rows = [*stored_rows(arguments.input), *map(_named, arguments.svsk)]
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"two rows of one name among {', '.join(names)}")
    fingerprint = source.fingerprint()
    for row in rows:
        if row.made_from != fingerprint:
            warnings.warn(
                f"{row.name} was made from a copy of the model with another fingerprint", stacklevel=2
            )
    return rows


def _evaluate(arguments: argparse.Namespace, source: ModelSource) -> None:
    rows = _rows(arguments, source)
    families = evaluation_windows(source.tokenizer(), arguments.wikitext, arguments.windows)
    records = compare(Reference(source, families), rows, BASELINE, _say)
    report: dict[str, Any] = {
        **about(source, families, "svsk-jax", "jax", "gguf"),
        "baseline": BASELINE,
        "rows": records,
    }
    if arguments.json:
        write_json(arguments.json, report)
    _report(arguments, report)


def _chosen(records: list[dict[str, Any]], names: list[str] | None) -> list[dict[str, Any]]:
    known = [record["name"] for record in records]
    unknown = set(names or ()) - set(known)
    if unknown:
        raise ValueError(
            f"--rows {', '.join(sorted(unknown))}: not in the file; there are {', '.join(known)}"
        )
    return [record for record in records if names is None or record["name"] in names]


def _report(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    text = markdown(report)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(text, encoding="utf-8")
    _say(text)
    if arguments.plot:
        plot(report, arguments.plot)


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    # Differences of 1e-3 nats between models are wanted: no TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        if arguments.command == "report":
            report = json.loads(arguments.json.read_text(encoding="utf-8"))
            _report(arguments, report | {"rows": _chosen(report["rows"], arguments.rows)})
            return
        source = open_model(arguments.model) if arguments.model else dithered_smollm2()
        if arguments.command == "evaluate":
            _evaluate(arguments, source)
            return
        known = registry(source.config)
        unknown = set(arguments.rows or ()) - set(known)
        if unknown:
            raise ValueError(f"--rows {', '.join(sorted(unknown))}: unknown; known are {', '.join(known)}")
        names = arguments.rows or list(known)
        quantize_rows(source, Statistics.open(arguments.statistics), arguments.output, names, _say)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
