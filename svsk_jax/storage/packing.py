"""Parameters as plain nested dictionaries of arrays, and a JSON description that rebuilds their types."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.svsk_matmul.layout import SUPER_GROUP, ceil_div, packed_int6_bytes, tile_spans
from pallas_kernels.svsk_matmul.types import INT8_GROUP, Int8Weight, Sidecar, SVSKWeight


def describe(value: Any) -> dict[str, Any]:
    """JSON data from which `abstract` rebuilds the shapes, dtypes and static fields of a parameter."""
    if isinstance(value, SVSKWeight):
        sidecar = value.sidecar
        return {
            "kind": "svsk",
            "shape": list(value.shape),
            "group": value.group,
            "scales": value.scale_kind,
            "codebook": value.codebook,
            "sidecar": None
            if sidecar is None
            else {"tile": list(sidecar.tile), "ranks": [list(row) for row in sidecar.ranks]},
        }
    if isinstance(value, Int8Weight):
        return {"kind": "int8", "shape": list(value.shape)}
    return {"kind": "dense", "shape": list(value.shape), "dtype": jnp.dtype(value.dtype).name}


def abstract(description: Mapping[str, Any]) -> Any:
    """The parameter that `describe` described, with `jax.ShapeDtypeStruct` leaves."""

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    shape = tuple(description["shape"])
    if description["kind"] == "dense":
        return leaf(shape, description["dtype"])
    n, k = shape
    fields: dict[str, Any]
    if description["kind"] == "int8":
        fields = {
            "values": leaf(shape, jnp.int8),
            "scales": leaf((n, ceil_div(k, INT8_GROUP)), jnp.float16),
        }
        return Int8Weight(**fields, shape=(n, k))
    if description["kind"] != "svsk":
        raise ValueError(f"unknown kind of parameter {description['kind']!r}; a newer svsk-jax may know it")
    groups, flat = ceil_div(k, description["group"]), description["scales"] == "flat"
    scales = leaf((n, groups), jnp.float16) if flat else leaf((n, packed_int6_bytes(groups)), jnp.uint8)
    fields = {
        "codes": leaf((n, ceil_div(k, 2)), jnp.uint8),
        "scales": scales,
        "super_scales": None if flat else leaf((n, ceil_div(k, SUPER_GROUP)), jnp.float16),
        "coefficients": leaf((2,), jnp.float16) if description["codebook"] == "companded" else None,
        "sidecar": None
        if description["sidecar"] is None
        else _abstract_sidecar((n, k), description["sidecar"]),
    }
    return SVSKWeight(**fields, shape=(n, k), group=description["group"])


def _abstract_sidecar(shape: tuple[int, int], description: Mapping[str, Any]) -> Sidecar:
    tile = (description["tile"][0], description["tile"][1])
    ranks = tuple(tuple(row) for row in description["ranks"])
    rows, columns = tile_spans(shape[0], tile[0]), tile_spans(shape[1], tile[1])
    u_size = sum((stop - start) * sum(row) for (start, stop), row in zip(rows, ranks, strict=True))
    v_size = sum(
        rank * (stop - start) for row in ranks for (start, stop), rank in zip(columns, row, strict=True)
    )
    fields: dict[str, Any] = {
        "u": jax.ShapeDtypeStruct((u_size,), jnp.dtype(jnp.int8)),
        "v": jax.ShapeDtypeStruct((v_size,), jnp.dtype(jnp.int8)),
        "scale": jax.ShapeDtypeStruct((sum(map(sum, ranks)),), jnp.dtype(jnp.float16)),
    }
    return Sidecar(**fields, shape=shape, tile=tile, ranks=ranks)


def to_plain(value: Any) -> Any:
    """A parameter as nested dictionaries of its arrays, absent fields left out."""
    if isinstance(value, SVSKWeight):
        fields = {
            "codes": value.codes,
            "scales": value.scales,
            "super_scales": value.super_scales,
            "coefficients": value.coefficients,
            "sidecar": None if value.sidecar is None else to_plain(value.sidecar),
        }
        return {name: field for name, field in fields.items() if field is not None}
    if isinstance(value, Sidecar):
        return {"u": value.u, "v": value.v, "scale": value.scale}
    if isinstance(value, Int8Weight):
        return {"values": value.values, "scales": value.scales}
    return value


def from_plain(plain: Any, like: Any) -> Any:
    """Inverse of `to_plain`; `like` gives the type and static fields (its leaves are not looked at)."""
    if isinstance(like, SVSKWeight):
        return SVSKWeight(
            codes=plain["codes"],
            scales=plain["scales"],
            super_scales=plain.get("super_scales"),
            coefficients=plain.get("coefficients"),
            sidecar=None if like.sidecar is None else from_plain(plain["sidecar"], like.sidecar),
            shape=like.shape,
            group=like.group,
        )
    if isinstance(like, Sidecar):
        return Sidecar(**plain, shape=like.shape, tile=like.tile, ranks=like.ranks)
    if isinstance(like, Int8Weight):
        return Int8Weight(**plain, shape=like.shape)
    return plain
