"""Text from a model: prompt in one step, then token by token, shown as it comes."""

import dataclasses
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from svsk_jax.model import Decoder
from svsk_jax.model.fused_step import exchanges, why_not_fused
from svsk_jax.parallel import DATA
from svsk_jax.parallel.boxes import PeerBoxes, why_no_boxes
from svsk_jax.parallel.decoder import ParallelDecoder
from svsk_jax.runtime import steps
from svsk_jax.runtime.detokenize import Detokenizer
from svsk_jax.runtime.on_mesh import divided, prefill_on_mesh, step_on_mesh, texts_of_device
from svsk_jax.runtime.sampling import SamplingConfig

DEFAULT_CAPACITY = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What was generated and how fast. The stop token is in neither `text` nor `token_ids`.

    `finish_reason` is `stop` (a stop token came) or `length` (max_tokens or the capacity was reached).
    `prefill_seconds` runs from the padded prompt to the first token. `tokens_per_second` counts the tokens
    after it, stop token included, over the time until the last one was there, and is 0 where there were none;
    tokens that the fused step makes in its bursts and that are not wanted do not count, but their time does,
    as does what the consumer does between pieces. Neither contains compilation, which happens before each
    clock starts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    prefill_seconds: float
    tokens_per_second: float


class TextStream(Iterator[str]):
    """An iterator of pieces of text; `result` once it is exhausted."""

    def __init__(self, pieces: Generator[str, None, GenerationResult]):
        self._pieces = pieces
        self._result: GenerationResult | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as stop:
            # A second StopIteration of an exhausted generator carries no value.
            self._result = stop.value if self._result is None else self._result
            raise StopIteration from None

    @property
    def result(self) -> GenerationResult:
        """The whole outcome. Raises RuntimeError while there are pieces left."""
        if self._result is None:
            raise RuntimeError("the text is not finished; iterate to the end before asking for the result")
        return self._result


def fetched(tokens: jax.Array) -> np.ndarray:
    """The tokens of a step on the host, int32 [burst, b].

    Raises:
        RuntimeError: a GPU lost another.
    """
    found = np.asarray(tokens)
    if (found == steps.LOST).any():
        raise RuntimeError(
            "a GPU waited in vain for what another computes, and the text is lost: see whether all GPUs of "
            "the mesh are well and no other program holds one of them, and run again"
        )
    return found


class TextGenerator:
    """Generates from one model with one tokenizer, a text at a time; several with `batch.generate_batch`.

    Args:
        model: dense or packed, on one device or over a mesh.
        tokenizer: the model's.
        stop_ids: ids that end a text (`chat.stop_ids`).
        capacity: positions of prompt and text together, each of which costs cache memory; default: the
            model's context, at most 4096.

    Attributes:
        fused: whether tokens come by the decode step of few kernels, in bursts.
        why_not_fused: why they don't, or None.
        copies: of the model, which may take different texts: the size of the mesh's `data` axis.
        boxes: by which GPUs add up within the kernels of the fused step, or None: XLA adds up.

    Raises:
        ValueError: a capacity below 2 or above the model's context.
    """

    def __init__(
        self,
        model: Decoder | ParallelDecoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Collection[int] = (),
        capacity: int | None = None,
    ):
        context = model.config.max_position_embeddings
        self.capacity = min(context, DEFAULT_CAPACITY) if capacity is None else capacity
        if not 2 <= self.capacity <= context:
            raise ValueError(
                f"the capacity must be from 2 to the model's context of {context}, got {self.capacity}"
            )
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.config = model.config
        here = model.shares if isinstance(model, ParallelDecoder) else model
        # Flattened once: taking a module apart in Python costs more than a step of a small model.
        self._leaves, structure = jax.tree.flatten(here)
        self.why_not_fused = why_not_fused(here)
        self.fused = self.why_not_fused is None
        self.copies = 1
        self.mesh = mesh = model.mesh if isinstance(model, ParallelDecoder) else None
        self.boxes: PeerBoxes | None = None
        if self.fused and mesh is not None and why_no_boxes(mesh) is None:
            self.boxes = PeerBoxes(mesh)
        self._exchanges = partial(exchanges, here)
        self._rehearsed: set[tuple[int, bool]] = set()
        slots = steps.slots_for(self.capacity) if self.fused else self.capacity
        prefill = partial(steps.prefill, structure, slots)
        step = partial(steps.fused_steps if self.fused else steps.step, structure)
        if isinstance(model, ParallelDecoder):
            self.copies = model.mesh.shape[DATA]
            prefill, step = prefill_on_mesh(model.mesh, prefill), step_on_mesh(model.mesh, step)
        self._prefill = jax.jit(prefill)
        static = "greedy" if self.fused else None
        self._step = jax.jit(step, donate_argnames="state", static_argnames=static)

    def stream(
        self, prompt_ids: Sequence[int], *, max_tokens: int = 256, sampling: SamplingConfig | None = None
    ) -> TextStream:
        """Continue a prompt; text comes as soon as its characters are whole. Default: the likeliest tokens.

        Raises:
            ValueError: an empty prompt, one that leaves no room, ids outside the vocabulary, or max_tokens
                below 1.
        """
        budget = self.check(prompt_ids, max_tokens)
        return TextStream(self._pieces(list(prompt_ids), budget, sampling or SamplingConfig()))

    def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int = 256, sampling: SamplingConfig | None = None
    ) -> GenerationResult:
        """`stream` to its end."""
        stream = self.stream(prompt_ids, max_tokens=max_tokens, sampling=sampling)
        for _ in stream:
            pass
        return stream.result

    def check(self, prompt_ids: Sequence[int], max_tokens: int) -> int:
        """How many tokens may follow a prompt; ValueError as `stream` raises it."""
        if max_tokens < 1:
            raise ValueError(f"--max-tokens must be at least 1, got {max_tokens}")
        if len(prompt_ids) == 0:
            raise ValueError("the prompt is empty: give at least one token")
        if len(prompt_ids) >= self.capacity:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens and leaves no room within {self.capacity}: "
                f"shorten it or raise the capacity (the context is {self.config.max_position_embeddings})"
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.config.vocab_size:
            raise ValueError(
                f"the prompt has token ids from {min(prompt_ids)} to {max(prompt_ids)}, the vocabulary is "
                f"{self.config.vocab_size}; use the tokenizer that belongs to the model"
            )
        return min(max_tokens, self.capacity - len(prompt_ids))

    def prefill(
        self, prompt_ids: Sequence[int], sampling: SamplingConfig
    ) -> tuple[float, jax.Array, steps.State]:
        """Seconds that a prompt took, the token after it, int32 [1, 1], and the state."""
        padded = np.zeros((1, steps.prefill_bucket(len(prompt_ids), self.capacity)), np.int32)
        padded[0, : len(prompt_ids)] = prompt_ids
        key = jax.random.key(sampling.seed)
        prompt = (self._leaves, jnp.asarray(padded), jnp.int32(len(prompt_ids)), key, sampling.numbers)
        # Lowering and compiling fills jit's cache, so that the timed call finds everything compiled.
        self._prefill.lower(*prompt).compile()
        start = time.perf_counter()
        tokens, state = self._prefill(*prompt)
        tokens.block_until_ready()
        seconds = time.perf_counter() - start
        return seconds, tokens, state._replace(lengths=state.lengths[None]) if self.fused else state

    def divided(self, state: steps.State) -> steps.State:
        """A state as the steps after the first one find it, whose program then serves the first one too."""
        return state if self.mesh is None else divided(self.mesh, state)

    def compiled_step(
        self, state: steps.State, sampling: SamplingConfig
    ) -> tuple[Callable[[steps.State], tuple[jax.Array, steps.State]], steps.State]:
        """The compiled step for states like this one, and the state to begin with, in the place of the one
        given. A step gives tokens, int32 [burst, b], and the next state, which takes the state's place in
        memory."""
        greedy = sampling.temperature == 0
        static: dict[str, Any] = {"greedy": greedy} if self.fused else {}
        key, numbers = jax.random.key(sampling.seed), sampling.numbers
        boxes, turns = self.boxes, 0
        if boxes is not None and self.mesh is not None:
            turns = steps.BURST * self._exchanges(texts_of_device(self.mesh, state), greedy=greedy)
        if boxes is None or not turns:
            self._step.lower(self._leaves, state, key, numbers, **static).compile()
            return lambda state: self._step(self._leaves, state, key, numbers, **static), state

        def step(state: steps.State, *, wait: bool = True) -> tuple[jax.Array, steps.State]:
            return boxes.send(
                lambda taken: self._step(self._leaves, state, key, numbers, taken, **static), turns, wait=wait
            )

        form = len(state.tokens), greedy
        if form not in self._rehearsed:
            state = steps.rehearsed(lambda state: step(state, wait=False)[1], state)
            self._rehearsed.add(form)
        return step, state

    def _pieces(
        self, prompt_ids: list[int], budget: int, sampling: SamplingConfig
    ) -> Generator[str, None, GenerationResult]:
        detokenizer = Detokenizer(self.tokenizer, prompt_ids)
        prefill_seconds, tokens, state = self.prefill(prompt_ids, sampling)
        step = None
        if budget > 1:
            step, state = self.compiled_step(state, sampling)

        ids: list[int] = []
        pieces: list[str] = []
        finish_reason = "length"
        made = 1
        start = time.perf_counter()
        while finish_reason != "stop" and len(ids) < budget:
            # The next step runs while these tokens are fetched and shown; what follows a stop is wasted.
            ahead = step(state) if step is not None and made < budget else None
            for token_id in fetched(tokens)[: budget - len(ids), 0].tolist():
                if token_id in self.stop_ids:
                    finish_reason = "stop"
                    break
                ids.append(token_id)
                piece = detokenizer.push(token_id)
                if piece:
                    pieces.append(piece)
                    yield piece
            if ahead is not None:
                tokens, state = ahead
                made += len(tokens)
        decode_seconds = time.perf_counter() - start
        decoded = len(ids) + (finish_reason == "stop") - 1
        tail = detokenizer.flush()
        if tail:
            pieces.append(tail)
            yield tail
        return GenerationResult(
            text="".join(pieces),
            token_ids=tuple(ids),
            finish_reason=finish_reason,
            prompt_tokens=len(prompt_ids),
            prefill_seconds=prefill_seconds,
            tokens_per_second=decoded / decode_seconds if decoded else 0.0,
        )
