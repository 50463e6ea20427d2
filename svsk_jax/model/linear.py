"""The only place that cares whether a matrix is dense, packed or laid out for the kernels."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.svsk_matmul import (
    LaidOutWeight,
    PackedWeight,
    dequantize,
    svsk_matmul,
    take_rows,
)

Weight = jax.Array | PackedWeight | LaidOutWeight


def to_dense(weight: jax.Array | PackedWeight, dtype: DTypeLike) -> Float[Array, "*shape"]:
    """A parameter as one dense array of `dtype`."""
    return dequantize(weight, dtype) if isinstance(weight, PackedWeight) else weight.astype(dtype)


restore = jax.jit(to_dense, static_argnames="dtype")
"""`to_dense`, compiled."""


def project(
    x: Float[Array, "*b k"], weight: Weight, layer: Int[Array, ""] | None = None
) -> Float[Array, "*b n"]:
    """y = x Wᵀ with W [N, K] of any form, or the one at index `layer` of a stack of them; f32 accumulation, y
    in x's dtype. Derivatives are taken backwards alone (no `jax.jvp`)."""
    if isinstance(weight, PackedWeight | LaidOutWeight):
        return svsk_matmul(x, weight, layer=layer)
    return _dense_product(x, (weight if layer is None else weight[layer]).astype(x.dtype))


@jax.custom_vjp
def _dense_product(x: Float[Array, "*b k"], W: Float[Array, "n k"]) -> Float[Array, "*b n"]:
    return jnp.matmul(x, W.T, preferred_element_type=jnp.float32).astype(x.dtype)


def _gradients(
    operands: tuple[jax.Array, jax.Array], g: Float[Array, "*b n"]
) -> tuple[Float[Array, "*b k"], Float[Array, "n k"]]:
    """Of `_dense_product`. jax would raise W to f32 for them: exact products, but twice W's bytes."""
    x, W = operands
    tokens, felt = (each.reshape(-1, each.shape[-1]) for each in (x, g))
    by_x = jnp.matmul(g, W, preferred_element_type=jnp.float32).astype(x.dtype)
    return by_x, jnp.matmul(felt.T, tokens, preferred_element_type=jnp.float32).astype(W.dtype)


_dense_product.defvjp(lambda x, W: (_dense_product(x, W), (x, W)), _gradients)


def sum_over(x: Float[Array, "*b n"], axis: str | None) -> Float[Array, "*b n"]:
    """The sum of what the devices along an axis of a mesh hold; x itself without an axis."""
    return x if axis is None else jax.lax.psum(x, axis)


def join_over(x: Float[Array, "*b n"], axis: str | None, size: int) -> Float[Array, "*b size"]:
    """What the devices along an axis of a mesh hold one after another, cut to `size` columns; x itself
    without an axis."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)[..., :size]


class Linear(nnx.Module):
    """y = x Wᵀ + b, with W [out, in] of any form; f32 accumulation, y in x's dtype.

    With `axis`, each device along that axis of a mesh holds a part of the columns of W and of x: their
    products are summed over it, in x's dtype.
    """

    def __init__(self, weight: Weight, bias: jax.Array | None = None, axis: str | None = None):
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.axis = axis

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b n"]:
        """Apply the linear map to the last axis."""
        y = sum_over(project(x, self.weight.get_value()), self.axis)
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a [vocabulary, hidden] matrix, dense or packed without a sidecar.

    With `axis`, the devices along that axis of a mesh hold equal parts of the rows, in order.
    """

    def __init__(self, weight: Weight, axis: str | None = None):
        self.weight = nnx.Param(weight)
        self.axis = axis

    def __call__(self, tokens: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b d"]:
        """Look tokens up, in `dtype`."""
        return sum_over(self.part(tokens, dtype), self.axis)

    def part(self, tokens: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b d"]:
        """What this device knows of tokens: zeros for those of others. All of it without an axis."""
        if self.axis is None:
            return self._rows(tokens, dtype)
        rows = self.weight.get_value().shape[0]
        here = tokens - rows * jax.lax.axis_index(self.axis)
        inside = (here >= 0) & (here < rows)
        found = self._rows(jnp.where(inside, here, 0), dtype)
        return jnp.where(inside[..., None], found, jnp.zeros((), found.dtype))

    def _rows(self, rows: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b d"]:
        weight = self.weight.get_value()
        return (
            take_rows(weight, rows, dtype)
            if isinstance(weight, PackedWeight | LaidOutWeight)
            else weight[rows].astype(dtype)
        )
