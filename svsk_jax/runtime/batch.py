"""Several texts at a time."""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.svsk_matmul.layout import ceil_div
from svsk_jax.model.fused_step import LARGEST_BATCH, batch_bucket
from svsk_jax.runtime.detokenize import Detokenizer
from svsk_jax.runtime.generate import GenerationResult, TextGenerator, fetched
from svsk_jax.runtime.sampling import SamplingConfig
from svsk_jax.runtime.steps import State


def generate_batch(
    generator: TextGenerator,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    sampling: SamplingConfig | None = None,
) -> list[GenerationResult]:
    """Continue several prompts, each as `generator.generate` continues it alone, up to rounding.

    Where the model runs by the fused step, up to 64 texts take each step together, on each copy of a model
    over a mesh; elsewhere they come one after another. `tokens_per_second` of a result counts its own tokens
    over the time of its whole group. All draw with the same seed: equal prompts give equal texts. Each of the
    step's 1, 8, 16, 32 or 64 places holds a cache of the generator's capacity.

    Raises:
        ValueError: as `TextGenerator.stream`, with the number of the first prompt that is wrong.
    """
    sampling = SamplingConfig() if sampling is None else sampling
    budgets = []
    for index, prompt in enumerate(prompts):
        try:
            budgets.append(generator.check(prompt, max_tokens))
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
    if not generator.fused:
        return [generator.generate(prompt, max_tokens=max_tokens, sampling=sampling) for prompt in prompts]
    results: list[GenerationResult] = []
    most = LARGEST_BATCH * generator.copies
    for start in range(0, len(prompts), most):
        group = slice(start, start + most)
        results += _group(generator, prompts[group], budgets[group], sampling)
    return results


@dataclasses.dataclass
class _Text:
    """One text on its way."""

    prompt: Sequence[int]
    budget: int
    prefill_seconds: float
    ids: list[int] = dataclasses.field(default_factory=list)
    stopped: bool = False

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.ids) == self.budget

    def take(self, tokens: Sequence[int], stop_ids: frozenset[int]) -> None:
        for token in tokens:
            if self.finished:
                return
            if token in stop_ids:
                self.stopped = True
            else:
                self.ids.append(token)


def _group(
    generator: TextGenerator,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    sampling: SamplingConfig,
) -> list[GenerationResult]:
    texts: list[_Text] = []
    together: State | None = None
    for index, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
        seconds, tokens, state = generator.prefill(prompt, sampling)
        if together is None:
            together = _empty(state, _places(len(prompts), generator.copies))
        together = _placed(together, state, jnp.int32(index))
        texts.append(_Text(prompt, budget, seconds))
        texts[-1].take(np.asarray(tokens)[:, 0].tolist(), generator.stop_ids)
    assert together is not None
    together = generator.divided(together)
    step, together = generator.compiled_step(together, sampling)
    start = time.perf_counter()
    tokens, together = step(together)
    while not all(text.finished for text in texts):
        # The next burst runs while this one is fetched; the one after the last token is wasted.
        ahead, together = step(together)
        for text, column in zip(texts, fetched(tokens).T.tolist(), strict=False):
            text.take(column, generator.stop_ids)
        tokens = ahead
    seconds = time.perf_counter() - start
    return [_result(generator, text, seconds) for text in texts]


def _result(generator: TextGenerator, text: _Text, seconds: float) -> GenerationResult:
    detokenizer = Detokenizer(generator.tokenizer, list(text.prompt))
    pieces = [detokenizer.push(token) for token in text.ids] + [detokenizer.flush()]
    decoded = len(text.ids) + text.stopped - 1
    return GenerationResult(
        text="".join(pieces),
        token_ids=tuple(text.ids),
        finish_reason="stop" if text.stopped else "length",
        prompt_tokens=len(text.prompt),
        prefill_seconds=text.prefill_seconds,
        tokens_per_second=decoded / seconds if decoded else 0.0,
    )


def _places(texts: int, copies: int) -> int:
    """Of a step for some texts, as many for each copy of the model; one for all where there is one text."""
    return 1 if texts == 1 else copies * batch_bucket(ceil_div(texts, copies))


def _empty(state: State, batch: int) -> State:
    """Room for `batch` texts like the one of a state, divided over the devices as it is."""
    return jax.tree.map(
        lambda leaf: jnp.zeros((batch, *leaf.shape[1:]), leaf.dtype, device=leaf.sharding), state
    )


@partial(jax.jit, donate_argnames="together")
def _placed(together: State, state: State, index: jax.Array) -> State:
    """The states together, with one text's in its place."""
    return jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, index, axis=0), together, state
    )
