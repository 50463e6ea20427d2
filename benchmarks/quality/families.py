"""Evaluation text of three families, none of it in the calibration parts of the same sources."""

import argparse
import datetime
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from svsk_jax import ModelSource
from svsk_jax.calibration.text import read_texts, tokenize
from svsk_jax.evaluation.windows import Windows

FAMILIES = ("encyclopedia", "documentation", "code")
WINDOW = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that every benchmark on these families takes."""
    parser.add_argument(
        "--wikitext",
        type=Path,
        default=None,
        help="folder with calibration.raw and evaluation.raw, instead of WikiText-2 from the hub",
    )
    parser.add_argument("--windows", type=int, default=24, help=f"windows of {WINDOW} tokens per family")


def about(source: ModelSource, families: Mapping[str, Windows], *packages: str) -> dict[str, Any]:
    """What a report of a comparison on these families says of when, where and on what it was made."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in packages},
        "model": Path(source.description).name,
        "families": {family: windows.scored for family, windows in families.items()},
    }


def source_of(family: str, part: str, wikitext: Path | None) -> str:
    """What `read_texts` calls a family's text."""
    if family != "encyclopedia":
        return family
    return "wikitext" if wikitext is None else str(wikitext / f"{part}.raw")


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, wikitext: Path | None, windows: int
) -> dict[str, Windows]:
    """For each family, `windows` windows of 1024 tokens spread evenly over its evaluation text."""
    cut = {}
    for family in FAMILIES:
        ids = tokenize(tokenizer, read_texts(source_of(family, "evaluation", wikitext), "evaluation"))
        if len(ids) < windows * WINDOW:
            raise ValueError(
                f"{family}: {len(ids)} tokens do not hold {windows} windows of {WINDOW}; give fewer --windows"
            )
        starts = np.linspace(0, len(ids) - WINDOW, windows).astype(np.int64)
        tokens = np.stack([ids[start : start + WINDOW] for start in starts])
        cut[family] = Windows(convention="gptq", tokens=tokens, first=0, available=len(ids))
    return cut
