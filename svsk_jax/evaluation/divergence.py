"""How far a quantized model's predictions are from the original's, by token and in summary with errors."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class TokenDivergence(NamedTuple):
    """Per token, each [*b]: KL divergence and both NLLs in nats (f32), whether the likeliest token agrees."""

    kld: Float[Array, "*b"]
    same_top1: Bool[Array, "*b"]
    nll_reference: Float[Array, "*b"]
    nll_model: Float[Array, "*b"]


@jax.jit
def token_nll(logits: Float[Array, "*b v"], targets: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """-log softmax(logits)[target] in nats, f32."""
    return _pick_nll(jax.nn.log_softmax(logits.astype(jnp.float32)), targets)


@jax.jit
def token_divergence(
    reference: Float[Array, "*b v"], model: Float[Array, "*b v"], targets: Int[Array, "*b"]
) -> TokenDivergence:
    """KL(p‖q) = Σ p (log p - log q) in nats; p, q: softmax of the reference's and the model's logits; f32.

    The sum is taken as Σ (q - p + p (log p - log q)): its terms are nonnegative, and a rounding error δ of a
    log-normalizer changes it by δ (Σq - Σp) rather than by δ, so that divergences far below f32's rounding of
    log v are still resolved.
    """
    log_p = jax.nn.log_softmax(reference.astype(jnp.float32))
    log_q = jax.nn.log_softmax(model.astype(jnp.float32))
    p, q, difference = jnp.exp(log_p), jnp.exp(log_q), log_q - log_p
    near = jnp.abs(difference) < 1
    # expm1 keeps its digits where p ≈ q; far from there it could overflow, and subtraction loses nothing.
    small = p * (jnp.expm1(jnp.where(near, difference, 0)) - difference)
    kld = jnp.sum(jnp.where(near, small, q - p - p * difference), axis=-1)
    return TokenDivergence(
        kld=kld,
        same_top1=jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1),
        nll_reference=_pick_nll(log_p, targets),
        nll_model=_pick_nll(log_q, targets),
    )


def _pick_nll(log_p: jax.Array, targets: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A statistic and its standard error, in the same unit."""

    value: float
    error: float


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean of n values and s / √n with s² the unbiased variance (f64).

    Tokens count as independent, as in llama.cpp's perplexity tool.

    Raises:
        ValueError: fewer than two values.
    """
    values = np.asarray(values, np.float64).ravel()
    if values.size < 2:
        raise ValueError(f"an error needs at least 2 scored tokens, got {values.size}; evaluate more text")
    return Estimate(value=float(values.mean()), error=float(values.std(ddof=1) / math.sqrt(values.size)))


def quantile_estimate(values: np.ndarray, p: float) -> Estimate:
    """The p-quantile (linear interpolation) and its distribution-free standard error from order statistics.

    The number of n values below the quantile is binomial with mean n p and deviation √(n p (1 - p)); the
    error is half the distance between the order statistics at ranks n p ± √(n p (1 - p)), rounded outwards
    and clipped to 1 … n.

    Raises:
        ValueError: fewer than two values.
    """
    ordered = np.sort(np.asarray(values, np.float64).ravel())
    n = ordered.size
    if n < 2:
        raise ValueError(f"an error needs at least 2 scored tokens, got {n}; evaluate more text")
    spread = math.sqrt(n * p * (1 - p))
    low = min(max(math.floor(n * p - spread), 1), n)
    high = min(max(math.ceil(n * p + spread), 1), n)
    return Estimate(
        value=float(np.quantile(ordered, p)), error=float(ordered[high - 1] - ordered[low - 1]) / 2
    )


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate; error by the delta method, exp(x) · error."""
    value = math.exp(estimate.value) if estimate.value < 709 else math.inf
    return Estimate(value=value, error=value * estimate.error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityReport:
    """NLL (nats per token) and perplexity exp(NLL) of one model over `tokens` scored tokens."""

    tokens: int
    nll: Estimate
    ppl: Estimate

    @classmethod
    def from_tokens(cls, nll: np.ndarray) -> "PerplexityReport":
        """Summarise per-token NLLs of any shape. Raises ValueError for fewer than two."""
        mean = mean_estimate(nll)
        return cls(tokens=int(np.size(nll)), nll=mean, ppl=exponential(mean))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: each estimate as {value, error}."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergenceReport:
    """A model against its reference over `tokens` scored tokens; divergences and NLLs in nats per token.

    `delta_nll` = NLL(model) - NLL(reference), with its error from the paired per-token differences: most of
    the variance of the two NLLs is the text's and cancels. `ppl_ratio` = exp(delta_nll). `same_top1` is a
    fraction. Errors: `mean_estimate`; `quantile_estimate` for `kld_median` and `kld_999` (99.9 %);
    `exponential` for perplexities; the largest divergence has none. Source: the statistics of llama.cpp
    `perplexity --kl-divergence`.
    """

    tokens: int
    mean_kld: Estimate
    kld_median: Estimate
    kld_999: Estimate
    kld_max: float
    same_top1: Estimate
    delta_nll: Estimate
    ppl_ratio: Estimate
    nll_reference: Estimate
    nll_model: Estimate
    ppl_reference: Estimate
    ppl_model: Estimate

    @classmethod
    def from_tokens(
        cls, kld: np.ndarray, same_top1: np.ndarray, nll_reference: np.ndarray, nll_model: np.ndarray
    ) -> "DivergenceReport":
        """Summarise a `TokenDivergence`'s fields, of any shape, in f64. ValueError below two tokens."""
        reference, model = mean_estimate(nll_reference), mean_estimate(nll_model)
        delta = mean_estimate(np.asarray(nll_model, np.float64) - np.asarray(nll_reference, np.float64))
        return cls(
            tokens=int(np.size(kld)),
            mean_kld=mean_estimate(kld),
            kld_median=quantile_estimate(kld, 0.5),
            kld_999=quantile_estimate(kld, 0.999),
            kld_max=float(np.max(kld)),
            same_top1=mean_estimate(same_top1),
            delta_nll=delta,
            ppl_ratio=exponential(delta),
            nll_reference=reference,
            nll_model=model,
            ppl_reference=exponential(reference),
            ppl_model=exponential(model),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: each estimate as {value, error}."""
        return dataclasses.asdict(self)
