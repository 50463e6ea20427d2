"""Random packed weights, made on the device, for tuning and benchmarks."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.svsk_matmul.layout import ceil_div, packed_int6_bytes, tile_spans
from pallas_kernels.svsk_matmul.types import INT8_GROUP, Int8Weight, Sidecar, SVSKWeight

TILE = (512, 0)
"""Of a sidecar, that of the strong recipes: all columns of so many rows."""
FORM = ("group", "companded", "flat", "rank", "tile")
"""What of `random_weight` says how a weight is stored."""


@partial(jax.jit, static_argnames=("n", "k", *FORM))
def random_weight(
    key: jax.Array,
    n: int,
    k: int,
    *,
    group: int = 16,
    companded: bool = True,
    flat: bool = False,
    rank: int = 16,
    tile: tuple[int, int] = TILE,
) -> SVSKWeight:
    """An [n, k] weight with uniform codes and scales, two-level or flat, and a sidecar of equal rank in each
    of its tiles; its elements are of the order of 1 / √k."""
    keys = iter(jax.random.split(key, 6))
    sidecar = None
    if rank:
        down, across = len(tile_spans(n, tile[0])), len(tile_spans(k, tile[1]))
        ranks = down * across * rank
        sidecar = Sidecar(
            u=_int8(next(keys), n * across * rank),
            v=_int8(next(keys), down * rank * k),
            scale=jax.random.uniform(next(keys), (ranks,), jnp.float16, 0.2, 0.4) / jnp.float16(k**0.5),
            shape=(n, k),
            tile=tile,
            ranks=((rank,) * across,) * down,
        )
    supers = jax.random.uniform(next(keys), (n, ceil_div(k, 256)), jnp.float16, 0.005, 0.01)
    supers /= jnp.float16(k**0.5)
    groups = ceil_div(k, group)
    # Flat scales are as large as two-level ones may be.
    return SVSKWeight(
        codes=jax.random.bits(next(keys), (n, ceil_div(k, 2)), jnp.uint8),
        scales=32 * supers[:, jnp.arange(groups) * group // 256]
        if flat
        else jax.random.bits(next(keys), (n, packed_int6_bytes(groups)), jnp.uint8),
        super_scales=None if flat else supers,
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
