"""Random packed weights of any form that the format allows, and their products in float64.

Every shape is compiled anew, hence one program where there is a choice, not one for each operation.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.svsk_matmul import Int8Weight, Sidecar, SVSKWeight, dequantize
from pallas_kernels.svsk_matmul.layout import ceil_div, pack_codes, pack_int6, tile_spans

FORMS = {
    "companded g16": {},
    "companded g32, rank 16": {"group": 32, "ranks": 16},
    "linear g16, ranks that differ": {"coefficients": None, "ranks": (0, 40)},
    "linear g64 flat, column tiles": {
        "coefficients": None,
        "group": 64,
        "flat": True,
        "ranks": 8,
        "tile": (128, 128),
    },
    "strongly companded, tiles that divide nothing": {
        "coefficients": (0.014, -0.2),
        "ranks": (0, 5),
        "tile": (100, 90),
    },
    "rank 128": {"ranks": 128},
}
TOLERANCE = {jnp.dtype(jnp.float16): 1e-3, jnp.dtype(jnp.bfloat16): 4e-3}


def exact(x, *weights):
    """x Ŵᵀ in float64 of all weights."""
    dense = np.concatenate([np.asarray(jax.jit(dequantize)(weight), np.float64) for weight in weights])
    return np.asarray(x, np.float64) @ dense.T


def error(y, expected):
    """Relative error in the Frobenius norm."""
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


def normal(rng, *shape, dtype=jnp.float16):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def random_int8(rng: np.random.Generator, n: int, k: int) -> Int8Weight:
    """Uniform values and scales."""
    return Int8Weight(
        values=jnp.asarray(rng.integers(-128, 128, (n, k)), jnp.int8),
        scales=jnp.asarray(rng.uniform(0.5, 2, (n, ceil_div(k, 64))) / 1024, jnp.float16),
        shape=(n, k),
    )


def random_weight(
    rng: np.random.Generator,
    n: int,
    k: int,
    *,
    group: int = 16,
    flat: bool = False,
    coefficients: tuple[float, float] | None = (0.008, 0.3),
    tile: tuple[int, int] = (512, 0),
    ranks: int | tuple[int, int] = 0,
) -> SVSKWeight:
    """Uniform codes and scales of either sign. `ranks`: of every tile, or bounds of random ones."""
    groups = ceil_div(k, group)
    if flat:
        scales, supers = jnp.asarray(rng.uniform(0.5, 2, (n, groups)) / 64, jnp.float16), None
    else:
        scales = jax.jit(pack_int6)(jnp.asarray(rng.integers(-32, 32, (n, groups)), jnp.int8))
        supers = jnp.asarray(rng.uniform(1e-3, 2e-3, (n, ceil_div(k, 256))), jnp.float16)
    low, high = (ranks, ranks) if isinstance(ranks, int) else ranks
    spans, columns = tile_spans(n, tile[0]), tile_spans(k, tile[1])
    chosen = tuple(tuple(int(rng.integers(low, high + 1)) for _ in columns) for _ in spans)
    sidecar = None
    if high:
        u = sum((stop - start) * sum(row) for (start, stop), row in zip(spans, chosen, strict=True))
        v = sum(r * (b - a) for row in chosen for (a, b), r in zip(columns, row, strict=True))
        sidecar = Sidecar(
            u=jnp.asarray(rng.integers(-127, 128, u), jnp.int8),
            v=jnp.asarray(rng.integers(-127, 128, v), jnp.int8),
            scale=jnp.asarray(rng.uniform(0.05, 0.1, sum(map(sum, chosen))), jnp.float16),
            shape=(n, k),
            tile=tile,
            ranks=chosen,
        )
    return SVSKWeight(
        codes=jax.jit(pack_codes)(jnp.asarray(rng.integers(0, 16, (n, k)), jnp.uint8)),
        scales=scales,
        super_scales=supers,
        coefficients=None if coefficients is None else jnp.asarray(coefficients, jnp.float16),
        sidecar=sidecar,
        shape=(n, k),
        group=group,
    )
