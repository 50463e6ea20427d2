"""Disjoint calibration texts, so that quantizing from each shows how much a result hangs on the text.

    python -m benchmarks.quality.subsets OUTPUT [--count 3] [--wikitext FOLDER]

OUTPUT/K/FAMILY.jsonl holds every COUNT-th passage of a family's calibration part, for
`svsk calibrate --calib OUTPUT/K/*.jsonl`.
"""

import argparse
import json
from pathlib import Path

from benchmarks.quality.families import FAMILIES, source_of
from svsk_jax.calibration.text import read_texts

PASSAGE = 8192
"""Characters, about four chunks of 512 tokens."""


def passages(text: str) -> list[str]:
    """Pieces of about PASSAGE characters, cut at line ends."""
    pieces, start = [], 0
    while start < len(text):
        stop = text.find("\n", start + PASSAGE)
        stop = len(text) if stop < 0 else stop
        pieces.append(text[start:stop])
        start = stop + 1
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.subsets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--wikitext", type=Path, default=None, help="folder with calibration.raw")
    arguments = parser.parse_args()
    for family in FAMILIES:
        source = source_of(family, "calibration", arguments.wikitext)
        cut = passages("\n\n".join(read_texts(source, "calibration")))
        for subset in range(arguments.count):
            path = arguments.output / str(subset) / f"{family}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"text": text}) for text in cut[subset :: arguments.count]]
            path.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
