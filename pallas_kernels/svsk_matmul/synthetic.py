"""Random packed weights, made on the device, for tuning and benchmarks."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.svsk_matmul.layout import ceil_div, packed_int6_bytes, tile_spans
from pallas_kernels.svsk_matmul.types import INT8_GROUP, Int8Weight, Sidecar, SVSKWeight

TILE_ROWS = 512
"""Rows of a sidecar's tile, those of the strong recipes."""


@partial(jax.jit, static_argnames=("n", "k", "group", "companded", "rank"))
def random_weight(
    key: jax.Array, n: int, k: int, *, group: int = 16, companded: bool = True, rank: int = 16
) -> SVSKWeight:
    """An [n, k] weight with uniform codes and two-level scales, and in tiles of 512 rows a sidecar of equal
    rank; its elements are of the order of 1 / √k."""
    keys = iter(jax.random.split(key, 6))
    sidecar = None
    if rank:
        spans = tile_spans(n, TILE_ROWS)
        total = len(spans) * rank
        sidecar = Sidecar(
            u=_int8(next(keys), n * rank),
            v=_int8(next(keys), total * k),
            scale=jax.random.uniform(next(keys), (total,), jnp.float16, 0.2, 0.4) / jnp.float16(k**0.5),
            shape=(n, k),
            tile=(TILE_ROWS, 0),
            ranks=((rank,),) * len(spans),
        )
    supers = jax.random.uniform(next(keys), (n, ceil_div(k, 256)), jnp.float16, 0.005, 0.01)
    return SVSKWeight(
        codes=jax.random.bits(next(keys), (n, ceil_div(k, 2)), jnp.uint8),
        scales=jax.random.bits(next(keys), (n, packed_int6_bytes(ceil_div(k, group))), jnp.uint8),
        super_scales=supers / jnp.float16(k**0.5),
        coefficients=jnp.asarray([0.008, 0.3], jnp.float16) if companded else None,
        sidecar=sidecar,
        shape=(n, k),
        group=group,
    )


@partial(jax.jit, static_argnames=("n", "k"))
def random_int8(key: jax.Array, n: int, k: int) -> Int8Weight:
    """An [n, k] int8 matrix with uniform values; its elements are of the order of 1 / √k."""
    return Int8Weight(
        values=_int8(key, n, k),
        scales=jnp.full((n, ceil_div(k, INT8_GROUP)), 0.01 / k**0.5, jnp.float16),
        shape=(n, k),
    )


def _int8(key: jax.Array, *shape: int) -> jax.Array:
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
