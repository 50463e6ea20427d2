"""What is continuous in a stored weight (super-scales, codebook coefficients, the sidecar's factors), made
trainable; codes and int6 scales stay as they are."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.svsk_matmul.layout import SUPER_GROUP, expand_groups, levels, unpack_codes, unpack_int6
from pallas_kernels.svsk_matmul.reference import Factors, multiply_factors, sidecar_factors
from pallas_kernels.svsk_matmul.types import SIDECAR_UNIT, Sidecar, SVSKWeight
from svsk_jax.quant.sidecar_fit import TileFactors, round_factors, to_sidecar


class Deviation(NamedTuple):
    """How far each continuous number of a weight is from its stored value, f32: super-scales and coefficients
    as a share of themselves, an entry of the sidecar's U or V as a share of the root mean square of its
    column or row."""

    super_scales: Float[Array, "n s"]
    coefficients: Float[Array, "2"]
    factors: Factors

    @classmethod
    def none(cls, weight: SVSKWeight) -> "Deviation":
        """Zeros for a weight with two-level scales."""
        if weight.super_scales is None:
            raise ValueError("polish: expected two-level scales, got flat ones; take an svsk recipe")
        factors = [] if weight.sidecar is None else sidecar_factors(weight.sidecar)
        return cls(
            jnp.zeros(weight.super_scales.shape, jnp.float32),
            jnp.zeros(2, jnp.float32),
            jax.tree.map(jnp.zeros_like, factors),
        )


def _super_scales(weight: SVSKWeight, deviation: Deviation) -> Float[Array, "n s"]:
    assert weight.super_scales is not None
    return weight.super_scales.astype(jnp.float32) * (1 + deviation.super_scales)


def _coefficients(weight: SVSKWeight, deviation: Deviation) -> Float[Array, "2"] | None:
    if weight.coefficients is None:
        return None
    return weight.coefficients.astype(jnp.float32) * (1 + deviation.coefficients)


def _factors(sidecar: Sidecar, deviation: Deviation) -> Factors:
    def moved(x: jax.Array, by: jax.Array, axis: int) -> jax.Array:
        return x + by * jnp.sqrt(jnp.mean(x * x, axis=axis, keepdims=True))

    return [
        [(moved(u, du, 0), moved(v, dv, 1)) for (u, v), (du, dv) in zip(row, moves, strict=True)]
        for row, moves in zip(sidecar_factors(sidecar), deviation.factors, strict=True)
    ]


def _stored(factors: TileFactors) -> tuple[Float[Array, "m r"], Float[Array, "r c"]]:
    scale = jnp.asarray(factors.scale).astype(jnp.float32) * SIDECAR_UNIT
    return jnp.asarray(factors.u).astype(jnp.float32) * scale, jnp.asarray(factors.v).astype(jnp.float32)


def _f16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float16).astype(jnp.float32)


def restore(weight: SVSKWeight, deviation: Deviation, rounded: bool) -> Float[Array, "n k"]:
    """Ŵ with its continuous numbers moved, f32; differentiable in `deviation` unless `rounded` to what
    `store` would keep of them."""
    k = weight.shape[1]
    groups = -(-k // weight.group)
    supers, coefficients = _super_scales(weight, deviation), _coefficients(weight, deviation)
    if rounded:
        supers = _f16(supers)
        coefficients = None if coefficients is None else _f16(coefficients)
    steps = expand_groups(supers, SUPER_GROUP // weight.group, groups)
    scales = unpack_int6(weight.scales, groups).astype(jnp.float32) * steps
    base = expand_groups(scales, weight.group, k) * levels(unpack_codes(weight.codes, k), coefficients)
    if weight.sidecar is None:
        return base
    factors = _factors(weight.sidecar, deviation)
    if rounded:
        factors = [[_stored(round_factors(u, v)) for u, v in row] for row in factors]
    return base + multiply_factors(factors)


def store(weight: SVSKWeight, deviation: Deviation) -> SVSKWeight:
    """The weight with its continuous numbers moved and rounded to the stored format; of the same bytes."""
    coefficients, sidecar = _coefficients(weight, deviation), weight.sidecar
    if sidecar is not None:
        tiles = [
            [TileFactors(*jax.device_get(round_factors(u, v))) for u, v in row]
            for row in _factors(sidecar, deviation)
        ]
        sidecar = to_sidecar(tiles, sidecar.shape, sidecar.tile)
    return dataclasses.replace(
        weight,
        super_scales=_super_scales(weight, deviation).astype(jnp.float16),
        coefficients=None if coefficients is None else coefficients.astype(jnp.float16),
        sidecar=sidecar,
    )
