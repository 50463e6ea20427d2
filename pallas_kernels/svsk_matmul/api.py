"""Dispatch of a product with a packed weight to an implementation."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.svsk_matmul import reference, transposed, triton, triton_reference
from pallas_kernels.svsk_matmul.devices import target_device
from pallas_kernels.svsk_matmul.transposed import TransposedInt8Weight, TransposedWeight
from pallas_kernels.svsk_matmul.triton_int8 import TritonInt8Weight, lay_out_int8
from pallas_kernels.svsk_matmul.triton_layout import TritonWeight, lay_out
from pallas_kernels.svsk_matmul.types import Int8Weight, PackedWeight, SVSKWeight

MINIMUM_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that the Triton kernels run on: Ampere."""

ForTriton = TritonWeight | TritonInt8Weight
Transposed = TransposedWeight | TransposedInt8Weight
LaidOutWeight = ForTriton | Transposed
Weight = PackedWeight | LaidOutWeight
Implementation = Callable[[jax.Array, Weight, jax.Array | None], jax.Array]


def _reference(x: jax.Array, weight: Weight, layer: jax.Array | None) -> jax.Array:
    if layer is not None:
        weight = jax.tree.map(lambda leaf: leaf[layer], weight)
    if isinstance(weight, PackedWeight):
        return reference.matmul(x, weight)
    if isinstance(weight, Transposed):
        raise _laid_out_for("blockwise", not_for="reference")
    dense = triton_reference.restore(weight).astype(x.dtype)
    return jnp.matmul(x, dense.T, preferred_element_type=jnp.float32).astype(x.dtype)


def _triton(x: jax.Array, weight: Weight, layer: jax.Array | None) -> jax.Array:
    reason = why_no_triton(x.dtype)
    if reason:
        raise NotImplementedError(f"svsk_matmul: implementation 'triton' cannot run: {reason}")
    return _by_kernels(x, weight, layer, interpret=False)


def _triton_interpret(x: jax.Array, weight: Weight, layer: jax.Array | None) -> jax.Array:
    return _by_kernels(x, weight, layer, interpret=True)


def _blockwise(x: jax.Array, weight: Weight, layer: jax.Array | None) -> jax.Array:
    if layer is not None:
        weight = jax.tree.map(lambda leaf: leaf[layer], weight)
    if isinstance(weight, ForTriton):
        raise _laid_out_for("triton", not_for="blockwise")
    if isinstance(weight, SVSKWeight):
        weight = transposed.transpose(weight)
    elif isinstance(weight, Int8Weight):
        weight = transposed.transpose_int8(weight)
    return transposed.matmul(x, weight)


def _by_kernels(x: jax.Array, weight: Weight, layer: jax.Array | None, *, interpret: bool) -> jax.Array:
    if isinstance(weight, Transposed):
        raise _laid_out_for("blockwise", not_for="triton_interpret" if interpret else "triton")
    if layer is not None and isinstance(weight, Int8Weight | TritonInt8Weight):
        raise NotImplementedError(
            "svsk_matmul: the Triton kernel for int8 matrices takes no stack of layers; index the stack first"
        )
    if isinstance(weight, Int8Weight):
        weight = lay_out_int8(weight)
    elif isinstance(weight, SVSKWeight):
        weight = jax.vmap(lay_out)(weight) if layer is not None else lay_out(weight)
    return triton.matmul(x, weight, layer=layer, interpret=interpret)


def _laid_out_for(implementation: str, *, not_for: str) -> NotImplementedError:
    return NotImplementedError(
        f"svsk_matmul: implementation {not_for!r} cannot run: the weight is laid out for {implementation!r}; "
        "name none, or give the weight as stored"
    )


IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "reference": _reference,
        "blockwise": _blockwise,
        "triton": _triton,
        "triton_interpret": _triton_interpret,
    }
)


def why_no_triton(dtype: DTypeLike) -> str | None:
    """Why the Triton kernels can't take x of this dtype here, or None if they can."""
    if jnp.dtype(dtype) not in triton.DTYPES:
        return f"x must be bf16 or f16, not {jnp.dtype(dtype)}"
    device = target_device()
    if device.platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, this is {device.platform}"
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        return None
    if not re.fullmatch(r"\d+\.\d+", str(capability)):
        return f"it needs an NVIDIA GPU, this is {device.device_kind}"
    if tuple(map(int, capability.split("."))) < MINIMUM_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, this GPU has {capability}"
    return None


def svsk_matmul(
    x: Float[Array, "*b k"],
    weight: Weight,
    implementation: str | None = None,
    *,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*b n"]:
    """y = x Ŵᵀ for a packed weight of shape [N, K]; f32 accumulation, result in x's dtype.

    Args:
        x: bf16 or f16 for the kernels, any float dtype for the reference.
        weight: as stored, or laid out once, at load: for the kernels with `lay_out` or `lay_out_int8`, for a
            CPU with `transpose` or `transpose_int8`. One that is not is laid out on every call that needs it.
            Several laid out together for the kernels give their rows one after another.
        implementation: one of `IMPLEMENTATIONS`; None takes what the weight is laid out for, where it can
            run, else the reference. `blockwise` never holds the restored weight; `triton_interpret` runs the
            kernels' arithmetic anywhere, slowly.
        layer: index into a stack of weights (a leading axis on every leaf), int32.

    Raises:
        ValueError: x's last axis is not K, or an unknown implementation.
        NotImplementedError: the named implementation can't run; says why.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"svsk_matmul: x has {x.shape[-1]} columns, the weight {list(weight.shape)} wants "
            f"{weight.shape[1]}"
        )
    if implementation is None:
        fits = isinstance(weight, ForTriton) and why_no_triton(x.dtype) is None
        implementation = "triton" if fits else "reference"
        if isinstance(weight, Transposed):
            implementation = "blockwise"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"svsk_matmul: unknown implementation {implementation!r}; known are {', '.join(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation](x, weight, layer)


def take_rows(weight: Weight, rows: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b k"]:
    """Rows of Ŵ by index (an embedding look-up), in `dtype`; of one weight in any form.

    Raises:
        ValueError: it has a sidecar.
    """
    sidecar = weight.sidecar if isinstance(weight, SVSKWeight) else getattr(weight, "v", None)
    if sidecar is not None:
        raise ValueError("take_rows: a matrix that is looked up by rows has no sidecar")
    if isinstance(weight, ForTriton):
        return triton_reference.take_rows(weight, rows, dtype)
    if isinstance(weight, Transposed):
        return transposed.take_rows(weight, rows, dtype)
    return reference.take_rows(weight, rows, dtype)
