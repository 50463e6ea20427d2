"""Checkpoints that keep the experts of a layer as one tensor: transformers from version 5 in memory, GGUF
files always."""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Literal

import numpy as np

from convert.tensors import RawTensor
from svsk_jax.model.config import ModelConfig

STACKS: dict[str, tuple[re.Pattern[str], str]] = {
    "hf": (
        re.compile(r"((?:model\.)?layers\.\d+\.mlp\.experts)\.(gate_up|down)_proj", re.ASCII),
        "{0}.{2}.{1}_proj.weight",
    ),
    "gguf": (re.compile(r"(blk\.\d+)\.ffn_(gate|up|down)_exps\.weight", re.ASCII), "{0}.ffn_{1}.{2}.weight"),
}
"""For each format, the name of a stack [experts, out, in], and that of one expert's matrix."""


def unstack(
    tensors: Iterable[RawTensor], config: ModelConfig, format: Literal["hf", "gguf"]
) -> Iterator[RawTensor]:
    """The tensors, with a matrix for each expert in place of a stack of as many as the model has: gate_up
    [experts, 2 · hidden units, in] is gate above up."""
    pattern, name = STACKS[format]
    experts = 0 if config.mixture is None else config.mixture.num_experts
    for tensor in tensors:
        match = pattern.fullmatch(tensor.name)
        if match is None or len(tensor.shape) != 3 or tensor.shape[0] != experts:
            yield tensor
            continue
        prefix, kind = match.groups()
        height = tensor.shape[1]
        halves = {kind: (0, height)}
        if kind == "gate_up":
            halves = {"gate": (0, height // 2), "up": (height // 2, height)}
        for number in range(experts):
            for linear, rows in halves.items():
                yield _part(tensor, number, rows, name.format(prefix, linear, number))


def _part(stack: RawTensor, number: int, rows: tuple[int, int], name: str) -> RawTensor:
    height = rows[1] - rows[0]
    return RawTensor(
        name=name,
        shape=(height, *stack.shape[2:]),
        dtype=stack.dtype,
        read=partial(_read, stack, number, rows[0]),
        readable=stack.readable,
        # A stack is read by whole matrices.
        slab_rows=height,
    )


def _read(stack: RawTensor, number: int, first: int, start: int, stop: int) -> np.ndarray:
    return stack.read(number, number + 1)[0, first + start : first + stop]
