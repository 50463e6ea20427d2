"""Tokens per second of generating text, from packed and from dense weights of random values.

    python -m benchmarks.speed.decode [--models SmolLM2-135M] [--tokens 64] [--json results.json]

Each model is run as `svsk generate` runs it: a prompt of 16 tokens, then one token at a time, the likeliest.
Packed and dense take turns; the median of the rounds counts. Dense is f32 on a CPU, bf16 elsewhere.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.speed.models import dense_parameters, packed_parameters
from svsk_jax.known_models import KNOWN
from svsk_jax.model import Decoder
from svsk_jax.model.laid_out import lay_out_for_device
from svsk_jax.pipeline.checks import default_dtype
from svsk_jax.runtime.generate import GenerationResult, TextGenerator

ROUNDS = 3
FORMS: dict[str, dict[str, Any]] = {
    "packed": {"rank": 16},
    "without sidecar": {"rank": 0},
    "linear, groups of 32": {"rank": 16, "group": 32, "companded": False},
}


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def packed(name: str, form: str) -> Decoder:
    parameters = packed_parameters(KNOWN[name], jax.random.key(0), **FORMS[form])
    return Decoder(KNOWN[name], lay_out_for_device(parameters, default_dtype()), default_dtype())


def dense(name: str) -> Decoder:
    dtype = default_dtype()
    return Decoder(KNOWN[name], dense_parameters(KNOWN[name], jax.random.key(0), dtype), dtype)


def measure(name: str, forms: list[str], tokens: int) -> dict[str, Any]:
    makers: dict[str, Callable[[], Decoder]] = {
        **{form: lambda form=form: packed(name, form) for form in forms},
        "dense": lambda: dense(name),
    }
    tokenizer = tokenizer_of(KNOWN[name].vocab_size)
    row: dict[str, Any] = {"model": name}
    runs: dict[str, list[GenerationResult]] = {}
    generators = {}
    for key, make in makers.items():
        start = time.perf_counter()
        generators[key] = TextGenerator(make(), tokenizer, capacity=16 + tokens)
        row[f"{key}, s to make"] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        generators[key].generate(list(range(16)), max_tokens=tokens)
        row[f"{key}, s of the first text"] = round(time.perf_counter() - start, 1)
    for _ in range(ROUNDS):
        for key, generator in generators.items():
            runs.setdefault(key, []).append(generator.generate(list(range(16)), max_tokens=tokens))
    for key, results in runs.items():
        row[key] = statistics.median(each.tokens_per_second for each in results)
        row[f"{key}, ms to the first token"] = 1e3 * statistics.median(
            each.prefill_seconds for each in results
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M"], choices=KNOWN)
    parser.add_argument("--forms", nargs="+", default=["packed"], choices=FORMS)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    device = jax.devices()[0]
    document: dict[str, Any] = {
        "device": platform.processor() or platform.machine()
        if device.platform == "cpu"
        else device.device_kind,
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "tokens": flags.tokens,
        "rows": [measure(name, flags.forms, flags.tokens) for name in flags.models],
    }
    names = [*flags.forms, "dense"]
    print(f"{document['device']}, {document['date']}, jax {document['jax']}; tokens per second")
    print("| model | " + " | ".join(names) + " | packed / dense |")
    print("|---|" + "---:|" * (len(names) + 1))
    for row in document["rows"]:
        cells = " | ".join(f"{row[name]:.1f}" for name in names)
        print(f"| {row['model']} | {cells} | {row[names[0]] / row['dense']:.2f} |")
    if flags.json:
        flags.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
