"""Dispatch of a product with a packed weight to an implementation."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul import reference
from pallas_kernels.svsk_matmul.types import PackedWeight

Implementation = Callable[[jax.Array, PackedWeight], jax.Array]
IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType({"reference": reference.matmul})


def svsk_matmul(
    x: Float[Array, "*b k"], weight: PackedWeight, implementation: str | None = None
) -> Float[Array, "*b n"]:
    """y = x Ŵᵀ for a packed weight of shape [N, K]; f32 accumulation, result in x's dtype.

    `implementation` names one of `IMPLEMENTATIONS`; None takes the best that supports the case.

    Raises:
        ValueError: x's last axis is not K, or an unknown implementation.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"svsk_matmul: x has {x.shape[-1]} columns, the weight {list(weight.shape)} wants "
            f"{weight.shape[1]}"
        )
    name = implementation or "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"svsk_matmul: unknown implementation {name!r}; known are {', '.join(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[name](x, weight)
