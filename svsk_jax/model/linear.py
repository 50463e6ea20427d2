"""The only place that cares whether a matrix is dense or packed."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.svsk_matmul import Int8Weight, PackedWeight, dequantize, svsk_matmul, take_rows

Weight = jax.Array | PackedWeight


def is_packed(weight: object) -> bool:
    """Whether a parameter's value is a packed matrix rather than one array."""
    return isinstance(weight, PackedWeight)


def to_dense(weight: Weight, dtype: DTypeLike) -> Float[Array, "*shape"]:
    """A parameter as one dense array of `dtype`."""
    return dequantize(weight, dtype) if isinstance(weight, PackedWeight) else weight.astype(dtype)


def project(x: Float[Array, "*b k"], weight: Weight) -> Float[Array, "*b n"]:
    """y = x Wᵀ with W [N, K] dense or packed; f32 accumulation, y in x's dtype."""
    if isinstance(weight, PackedWeight):
        return svsk_matmul(x, weight)
    return jnp.matmul(x, weight.T.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


class Linear(nnx.Module):
    """y = x Wᵀ + b, with W [out, in] dense or packed; f32 accumulation, y in x's dtype."""

    def __init__(self, weight: Weight, bias: jax.Array | None = None):
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b n"]:
        """Apply the linear map to the last axis."""
        y = project(x, self.weight.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a [vocabulary, hidden] matrix, dense or int8."""

    def __init__(self, weight: jax.Array | Int8Weight):
        self.weight = nnx.Param(weight)

    def __call__(self, tokens: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b d"]:
        """Look tokens up, in `dtype`."""
        weight = self.weight.get_value()
        return (
            take_rows(weight, tokens, dtype)
            if isinstance(weight, Int8Weight)
            else weight[tokens].astype(dtype)
        )
