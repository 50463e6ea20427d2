"""Messages to prompts, and a conversation at the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from svsk_jax.runtime.generate import GenerationResult, TextGenerator
from svsk_jax.runtime.sampling import SamplingConfig

Message = Mapping[str, str]
"""A `role` (system, user or assistant) and its `content`."""


def stop_ids(generation_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: `eos_token_id` (one or a list) of generation_config.json, and the tokenizer's."""
    declared = generation_config.get("eos_token_id")
    ids = declared if isinstance(declared, list | tuple) else [declared]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a raw prompt, with the start token if the tokenizer adds one."""
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32).tolist()


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **template_options: Any
) -> list[int]:
    """Ids of a conversation up to where the assistant speaks, by the tokenizer's chat template.

    A tokenizer without a template (a base model's) gets the contents as a raw prompt, joined by line breaks.
    `template_options` reach the template, such as `enable_thinking=False` for Qwen3.

    Raises:
        ValueError: the template refuses the messages; with its reason.
    """
    if tokenizer.chat_template is None:
        return encode_prompt(tokenizer, "\n".join(message["content"] for message in messages))
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **template_options,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template refused the messages: {error}") from error
    return np.asarray(ids).tolist()


def chat(
    generator: TextGenerator,
    *,
    ask: Callable[[], str | None],
    show: Callable[[str], None],
    system: str | None = None,
    max_tokens: int = 1024,
    sampling: SamplingConfig | None = None,
    on_result: Callable[[GenerationResult], None] | None = None,
    **template_options: Any,
) -> list[Message]:
    """Answer until there are no more questions; returns the conversation.

    Each turn reads the whole conversation again. `/reset` forgets it, `/exit` ends it. A question that does
    not fit the capacity is shown as an error and taken back.

    Args:
        generator: the model to talk to.
        ask: the next thing the user says; None at the end of input.
        show: gets pieces of the answers, each answer closed by a line break.
        system: instructions to begin with.
        max_tokens: longest answer.
        sampling: how to choose tokens; default: the likeliest.
        on_result: called after each answer, for speeds and lengths.
        template_options: passed on to the chat template.
    """
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (said := ask()) is not None and said.strip() != "/exit":
        if said.strip() == "/reset":
            messages = list(opening)
            continue
        if not said.strip():
            continue
        question: list[Message] = [*messages, {"role": "user", "content": said}]
        try:
            ids = encode_chat(generator.tokenizer, question, **template_options)
            answer = generator.stream(ids, max_tokens=max_tokens, sampling=sampling)
        except ValueError as error:
            show(f"[{error}; /reset starts over]\n")
            continue
        for piece in answer:
            show(piece)
        show("\n")
        messages = [*question, {"role": "assistant", "content": answer.result.text}]
        if on_result is not None:
            on_result(answer.result)
    return messages
