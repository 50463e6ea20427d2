"""`svsk generate`."""

import dataclasses
import sys
from typing import Annotated, Any

import jax
import tyro
from transformers import PreTrainedTokenizerBase

from svsk_jax.cli.common import ModelFlags, Verb, console
from svsk_jax.models import Weights, load_model, open_model
from svsk_jax.parallel import parse_mesh
from svsk_jax.runtime.batch import generate_batch
from svsk_jax.runtime.chat import chat, encode_chat, encode_prompt, stop_ids
from svsk_jax.runtime.generate import GenerationResult, TextGenerator
from svsk_jax.runtime.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelFlags, Verb):
    """Let a model write. Without --prompt, hold a conversation."""

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("-p",))] = ()
    """What to say to the model. Several prompts are answered side by side where a GPU runs packed weights,
    one after another elsewhere."""
    system: str | None = None
    """System message."""
    raw: bool = False
    """Continue the prompt as it is, without the chat template."""
    max_tokens: int = 256
    """Most tokens to write."""
    weights: Weights = "auto"
    """Run from packed weights or from their dense restore; auto: dense on a CPU, where small models are
    faster so and larger ones take six times the memory."""
    mesh: str | None = None
    """Devices to divide the model over, such as model=2: each holds a part of every matrix. data=N is of no
    use for one text. Default: one device."""
    sampling: SamplingConfig = SamplingConfig()
    """How to choose tokens."""

    def run(self) -> dict[str, Any]:
        """Generate."""
        if self.raw and not self.prompt:
            raise ValueError("--raw: give a --prompt to continue")
        mesh = None if self.mesh is None else parse_mesh(self.mesh)
        source = open_model(self.model, revision=self.revision)
        tokenizer = source.tokenizer()
        if mesh is None:
            model = load_model(source, weights=self.weights)
        else:
            model = load_model(source, weights=self.weights, mesh=mesh)
        generator = TextGenerator(model, tokenizer, stop_ids=stop_ids(source.generation_config, tokenizer))
        if jax.default_backend() != "cpu" and generator.why_not_fused:
            console.print(f"[dim]a token at a time: {generator.why_not_fused}[/]")
        if not self.prompt:
            messages = chat(
                generator,
                ask=_ask,
                show=show,
                system=self.system,
                max_tokens=self.max_tokens,
                sampling=self.sampling,
                on_result=show_speed,
            )
            return {"messages": [dict(message) for message in messages]}
        prompts = [self._encode(tokenizer, prompt) for prompt in self.prompt]
        if len(prompts) == 1:
            return stream_text(generator, prompts[0], self.max_tokens, self.sampling)
        results = generate_batch(generator, prompts, max_tokens=self.max_tokens, sampling=self.sampling)
        for prompt, result in zip(self.prompt, results, strict=True):
            show(f"> {prompt}\n{result.text}\n\n")
            show_speed(result)
        return {"texts": [dataclasses.asdict(result) for result in results]}

    def _encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        if self.raw:
            return encode_prompt(tokenizer, prompt)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return encode_chat(tokenizer, [*messages, {"role": "user", "content": prompt}])


def stream_text(
    generator: TextGenerator, ids: list[int], max_tokens: int, sampling: SamplingConfig
) -> dict[str, Any]:
    """Print the text as it comes, then the speed; returns the result as JSON data."""
    stream = generator.stream(ids, max_tokens=max_tokens, sampling=sampling)
    for piece in stream:
        show(piece)
    show("\n")
    show_speed(stream.result)
    return dataclasses.asdict(stream.result)


def show(piece: str) -> None:
    """Print text at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def show_speed(result: GenerationResult) -> None:
    """Say how fast the text came."""
    console.print(
        f"[dim]{result.prompt_tokens} prompt tokens in {result.prefill_seconds:.2f} s, then "
        f"{len(result.token_ids)} tokens "
        f"at {result.tokens_per_second:.1f} tok/s ({result.finish_reason})[/]"
    )


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None
