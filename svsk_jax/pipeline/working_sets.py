"""Bytes that the parts of a run work with at once, from the model's configuration alone."""

import dataclasses
import math
from collections.abc import Callable

from svsk_jax.calibration.self_text import MAX_BATCH, SAMPLE_LENGTH
from svsk_jax.calibration.sensitivity import HEAD_TOKENS
from svsk_jax.model.config import ModelConfig
from svsk_jax.model.parameters import (
    EXPERTS,
    input_widths,
    layer_kinds,
    layer_linears,
    outer_shapes,
    parameter_shapes,
)
from svsk_jax.quant.half_moment import half_size, part_size
from svsk_jax.quant.types import SENSITIVITY_TILE

AHEAD = 3
"""Inputs of linears whose statistics are read ahead for each layer at work: with the one at hand, all of a
dense layer's."""
WRITTEN_AT_ONCE = 2
"""Layers whose statistics are being written while the next one is measured: one is hashed while the other is
waited for by the disk."""
WORKING_COPIES = 12
"""f32 [N, K] arrays alive at once while a linear is rounded: W, its two best forms, and what the compiled
search, feedback and fit keep."""
FITTING_COPIES = 6
"""Likewise while its sidecar is fitted."""
FACTOR_COPIES = {"cpu": 5, "gpu": 2}
"""f32 [K, K] arrays that inverting or factoring one H takes beside its input and result. A CPU's library
wants matrices column by column, and XLA copies them."""


def height(n: int) -> int:
    """Rows of a block of the output sensitivity of a linear with n outputs."""
    return min(n, SENSITIVITY_TILE)


def device_bytes(config: ModelConfig, platform: str = "gpu") -> int:
    """Largest device memory at once: while the metrics of a linear are made, beside those of the one before,
    or while it is rounded, or its sidecar fitted, beside its own."""
    most, copies = 0, FACTOR_COPIES["cpu" if platform == "cpu" else "gpu"]
    for index in layer_kinds(config):
        before = 0
        for n, k in layer_linears(config, index).values():
            blocks = math.ceil(n / height(n)) * height(n) ** 2
            # Moment, H (in place of the mixed moment) and its factor; sensitivity, G and its factor.
            preparing = (3 + copies) * k**2 + 3 * blocks
            rounding = 3 * k**2 + 2 * blocks + WORKING_COPIES * n * k
            fitting = (4 + copies) * k**2 + 2 * blocks + FITTING_COPIES * n * k
            most = max(most, 4 * (before + preparing), 4 * rounding, 4 * fitting)
            before = 2 * k**2 + 2 * blocks
    return most


def ahead_bytes(model: ModelConfig, itemsize: int) -> int:
    """What is read ahead while a linear is worked on, in host memory, where one layer is at work at a time,
    as on a CPU: the next layer, and the halves of the next inputs' moments and weighted moments."""
    largest = max(
        sum(half_size(width) for width in sorted(input_widths(model, index).values())[-AHEAD:])
        for index in layer_kinds(model)
    )
    return itemsize * layer_weights(model) + 2 * 4 * largest


def layer_weights(model: ModelConfig) -> int:
    """Weights of the linears of the largest layer."""
    return max(sum(n * k for n, k in layer_linears(model, index).values()) for index in layer_kinds(model))


def slab_rows(model: ModelConfig) -> int:
    """Rows of embedding or head that are rounded at a time: with them they have no more weights than the
    largest linear."""
    largest = max(n * k for index in layer_kinds(model) for n, k in layer_linears(model, index).values())
    return max(1, largest // model.hidden_size)


def slab_bytes(model: ModelConfig) -> int:
    """What rounding so many rows of a head in 4 bits works with."""
    return 4 * (3 * model.hidden_size**2 + WORKING_COPIES * slab_rows(model) * model.hidden_size)


def tail_weights(model: ModelConfig) -> int:
    """Numbers in final norm and head."""
    return model.hidden_size * (model.vocab_size + 1)


def outer_weights(model: ModelConfig) -> int:
    """Numbers in embedding and head."""
    return sum(math.prod(shape) for shape in outer_shapes(model).values())


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of the activations of a token in a layer: of its stream, of its MLP's hidden units, of its scores."""

    stream: int
    hidden: int
    heads: int

    @classmethod
    def of(cls, model: ModelConfig) -> "Widths":
        """Of a model's widest layer."""
        hidden, stream = model.intermediate_size, max(model.hidden_size, model.num_heads * model.head_dim)
        if model.mixture is not None:
            mixture = model.mixture
            hidden = max(hidden, mixture.num_experts_per_tok * mixture.moe_intermediate_size)
            stream *= 1 + mixture.num_experts_per_tok
        return cls(stream, hidden, model.num_heads)

    def forwards(self, tokens: int, length: int, size: int) -> int:
        """Bytes that XLA takes to run a layer on so many tokens."""
        scores = 2 * 4 * tokens * self.heads * length
        attention = scores + 2 * size * tokens * self.stream
        return max(attention, (3 * self.hidden + 3 * self.stream) * size * tokens)

    @staticmethod
    def head(length: int, vocabulary: int, platform: str = "gpu") -> int:
        """Bytes that XLA takes to differentiate the head for a chunk: the noise of its labels, padded to
        whole pieces, and the logits of a piece. A CPU takes most before that, while it makes the noise in
        several steps."""
        if platform == "cpu":
            return 7 * 4 * length * vocabulary
        piece = min(length, HEAD_TOKENS)
        padded = math.ceil(length / piece) * piece
        return 4 * (padded + 3 * piece) * vocabulary

    def backwards(self, tokens: int, length: int, size: int) -> int:
        """Likewise to differentiate it."""
        scores = 4 * tokens * self.heads * length
        mlp = 2 * scores + (9 * self.hidden + 7 * self.stream) * size * tokens
        return max(mlp, 4 * scores + 3 * size * tokens * self.stream)


def text_bytes(model: ModelConfig, itemsize: int) -> int:
    """The whole model, its cache, and logits of a batch of texts."""
    weights = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    context = min(SAMPLE_LENGTH, model.max_position_embeddings)
    cache = 2 * model.num_layers * MAX_BATCH * context * model.num_kv_heads * model.head_dim
    logits = 4 * 4 * MAX_BATCH * model.vocab_size
    return itemsize * (weights + 2 * cache) + logits


def moment_bytes(model: ModelConfig, full: bool, devices: int = 1) -> int:
    """The moments of a layer, f32, on one of so many devices that divide their rows."""
    return _of_layer(model, devices, lambda width, parts: width // parts * width if full else width)


def stored_moment_bytes(model: ModelConfig, full: bool, devices: int = 1) -> int:
    """The moments of a layer as they are stored, f32: what the last of so many devices makes of its rows."""
    return _of_layer(model, devices, lambda width, parts: part_size(width, parts) if full else width)


def _of_layer(model: ModelConfig, devices: int, size: Callable[[int, int], int]) -> int:
    """Bytes of f32 arrays of so many numbers for each input of the largest layer, given its width and the
    devices that divide it: experts' inputs, and others that they do not divide, are on each."""
    return 4 * max(
        sum(
            size(width, 1 if width % devices or name.startswith(EXPERTS) else devices)
            for name, width in input_widths(model, index).items()
        )
        for index in layer_kinds(model)
    )


def block_bytes(model: ModelConfig) -> int:
    """The output sensitivities of a layer in blocks, f32."""
    return 4 * max(
        sum(math.ceil(n / height(n)) * height(n) ** 2 for n, _ in layer_linears(model, index).values())
        for index in layer_kinds(model)
    )
