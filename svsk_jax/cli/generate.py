"""`svsk generate`."""

import dataclasses
import sys
from typing import Annotated, Any

import tyro

from svsk_jax.cli.common import ModelFlags, Verb, console
from svsk_jax.models import Weights, load_model, open_model
from svsk_jax.parallel import parse_mesh
from svsk_jax.runtime.chat import chat, encode_chat, encode_prompt, stop_ids
from svsk_jax.runtime.generate import GenerationResult, TextGenerator
from svsk_jax.runtime.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(ModelFlags, Verb):
    """Let a model write. Without --prompt, hold a conversation."""

    prompt: Annotated[str | None, tyro.conf.arg(aliases=("-p",))] = None
    """What to say to the model."""
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
        if self.raw and self.prompt is None:
            raise ValueError("--raw: give a --prompt to continue")
        mesh = None if self.mesh is None else parse_mesh(self.mesh)
        source = open_model(self.model, revision=self.revision)
        tokenizer = source.tokenizer()
        model = (
            load_model(source, weights=self.weights)
            if mesh is None
            else load_model(source, weights=self.weights, mesh=mesh)
        )
        generator = TextGenerator(model, tokenizer, stop_ids=stop_ids(source.generation_config, tokenizer))
        if self.prompt is None:
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
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": self.prompt})
        ids = encode_prompt(tokenizer, self.prompt) if self.raw else encode_chat(tokenizer, messages)
        return stream_text(generator, ids, self.max_tokens, self.sampling)


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
