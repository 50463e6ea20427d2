"""Quantized decoder linears against the unquantized model: KL divergence, ratios, and their errors."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.rows import Row
from convert.load import load_parameters
from svsk_jax import ModelSource
from svsk_jax.evaluation.divergence import DivergenceReport, Estimate, TokenDivergence, token_divergence
from svsk_jax.evaluation.evaluate import chunk_rows
from svsk_jax.evaluation.windows import Windows
from svsk_jax.model import Decoder
from svsk_jax.model.decoder import Tail
from svsk_jax.model.parameters import QUANTIZED_LINEARS, parameter_shapes
from svsk_jax.quant.budget import predict
from svsk_jax.quant.types import recipe

BATCH = 4
"""Windows that run at once."""


class Reference:
    """The unquantized model in f32: its tail, and its final hidden states over all windows, computed once."""

    def __init__(self, source: ModelSource, families: Mapping[str, Windows]):
        self.config = source.config
        self.families = families
        self.parameters = load_parameters(source, jnp.float32)
        self.tail = Tail(self.config, self.parameters)
        model = Decoder(self.config, self.parameters, jnp.float32)
        self.hidden = {
            family: [np.asarray(_hidden_states(model, tokens)) for tokens in _batches(windows)]
            for family, windows in families.items()
        }

    def divergence(self, row: Row) -> dict[str, TokenDivergence]:
        """By family, each scored token's divergence: the fields are [tokens].

        Only the row's linears are its own; embedding, norms, biases and head are the reference's.
        """
        parameters = dict(self.parameters)
        for index in range(self.config.num_layers):
            for path, value in row.layer(index).items():
                parameters[f"layers.{index}.{path}"] = jnp.asarray(value, jnp.float32)
        return self.divergence_of(parameters)

    def divergence_of(self, parameters: Mapping[str, Any]) -> dict[str, TokenDivergence]:
        """Likewise of a whole model's parameters, dense or packed."""
        model = Decoder(self.config, parameters, jnp.float32)
        chunk = chunk_rows(self.config.vocab_size)
        results = {}
        for family, windows in self.families.items():
            parts = [
                jax.device_get(_divergence(self.tail, jnp.asarray(hidden), model, tokens, chunk=chunk))
                for tokens, hidden in zip(_batches(windows), self.hidden[family], strict=True)
            ]
            results[family] = jax.tree.map(lambda *fields: np.concatenate(fields), *parts)
        return results


def _batches(windows: Windows) -> list[jax.Array]:
    return [
        jnp.asarray(windows.tokens[start : start + BATCH]) for start in range(0, len(windows.tokens), BATCH)
    ]


@jax.jit
def _hidden_states(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model.hidden_states(tokens)


@partial(jax.jit, static_argnames="chunk")
def _divergence(
    tail: Tail, hidden: jax.Array, model: Decoder, tokens: jax.Array, *, chunk: int
) -> TokenDivergence:
    """Of the predictions at every position but the last, each field [b (t - 1)].

    The logits of `chunk` positions are alive at a time.
    """

    def compare(position: tuple[jax.Array, jax.Array, jax.Array]) -> TokenDivergence:
        x_reference, x_model, target = position
        return token_divergence(tail.logits(x_reference), model.logits(x_model), target)

    width = hidden.shape[-1]
    x = (states[:, :-1].reshape(-1, width) for states in (hidden, model.hidden_states(tokens)))
    return jax.lax.map(compare, (*x, tokens[:, 1:].reshape(-1)), batch_size=chunk)


def ratio(values: np.ndarray, base: np.ndarray) -> Estimate:
    """mean(values) / mean(base) of paired tokens; error by the delta method, tokens taken as independent."""
    values, base = values.astype(np.float64), base.astype(np.float64)
    quotient = values.mean() / base.mean()
    residual = values - quotient * base
    error = residual.std(ddof=1) / math.sqrt(values.size) / base.mean()
    return Estimate(value=float(quotient), error=float(error))


def geometric_mean(estimates: Sequence[Estimate]) -> Estimate:
    """Of independent positive estimates; error by the delta method."""
    value = math.exp(sum(math.log(each.value) for each in estimates) / len(estimates))
    relative = math.sqrt(sum((each.error / each.value) ** 2 for each in estimates)) / len(estimates)
    return Estimate(value=value, error=value * relative)


def compare(
    reference: Reference, rows: Sequence[Row], baseline: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Evaluate every row; one record each, ready for JSON, with estimates as {value, error}.

    Raises:
        ValueError: no row is called `baseline`.
    """
    names = [row.name for row in rows]
    if baseline not in names:
        raise ValueError(f"ratios are to {baseline}, which is not among the rows: {', '.join(names)}")
    base: dict[str, TokenDivergence] = {}
    records = []
    for row in sorted(rows, key=lambda row: row.name != baseline):
        tokens = reference.divergence(row)
        base = base or tokens
        reports = {
            family: DivergenceReport.from_tokens(*map(np.asarray, fields)).to_dict()
            for family, fields in tokens.items()
        }
        ratios = {
            family: ratio(np.asarray(fields.kld), np.asarray(base[family].kld))
            for family, fields in tokens.items()
        }
        mean = geometric_mean(list(ratios.values()))
        records.append(
            {
                "name": row.name,
                **sizes(row, parameter_shapes(reference.config)),
                "families": {
                    family: {**reports[family], "kld_ratio": vars(ratios[family])} for family in reports
                },
                "kld_ratio": vars(mean),
                **row.notes,
            }
        )
        say(f"{row.name}: {mean.value:.3f} × {baseline}")
    return sorted(records, key=lambda record: names.index(record["name"]))


def sizes(row: Row, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Bits per weight: of the decoder linears, of the whole file, and of the linears with their padding.

    The file of every row has embedding and head in int8 with an f16 scale per 64, whatever its own has.
    """
    endings = tuple(f".{name}.weight" for name in QUANTIZED_LINEARS)
    linears = [path.removesuffix(".weight") for path in shapes if path.endswith(endings)]
    rest = predict(shapes, linears, recipe("q4"))
    outside = rest.total_bytes - rest.linear_bytes
    return {
        "bits_linears": 8 * row.linear_bytes / rest.linear_weights,
        "bits_file": 8 * (row.linear_bytes + outside) / rest.total_weights,
        "bits_linears_with_padding": 8 * (row.linear_bytes + row.padding) / rest.linear_weights,
    }
