"""The Triton kernel that finds the likeliest token, of which each GPU knows the best among its own."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.exchange import Boxes, over_devices
from pallas_kernels.decode_step.launch import launch
from pallas_kernels.svsk_matmul.triton_operands import Refs

NAME = "svsk_likeliest"
LOST = -1
"""In place of a token, where GPUs waited for one another's numbers in vain."""
WARP = 32


def _work(
    ref: Refs, program: jax.Array, row: jax.Array, *, shape: tuple[int, int, int], devices: int
) -> None:
    side, device, item = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    # Whose numbers: each adds zeros to all but its own.
    place = plgpu.load(ref["addresses"].at[program, row, jnp.int32(0)])
    total = over_devices(ref, (side * shape[1] + device) * shape[2] + item)
    numbers = [plgpu.load(ref[name].at[item]) for name in ("best", "token")]
    both = jnp.where(side == 0, numbers[0], numbers[1].astype(jnp.float32))
    both = total(jnp.where(device == place, both, 0.0))
    best, token = (jnp.sum(jnp.where(side == which, both, 0.0), axis=0) for which in range(2))
    known = lax.broadcasted_iota(jnp.int32, shape[1:], 0) < devices
    lost = jnp.sum(jnp.where(known, best + token, 0.0), axis=0)
    best = jnp.where(known, best, -math.inf)
    is_best = best == jnp.max(best, axis=0)[None]
    # The first of several, as one device would take it.
    token = jnp.min(jnp.where(is_best & known, token, math.inf), axis=0).astype(jnp.int32)
    item = lax.broadcasted_iota(jnp.int32, shape[2:], 0)
    plgpu.store(ref["out"].at[item], jnp.where(lost == lost, token, LOST))


@partial(jax.jit, static_argnames="interpret")
def likeliest_over(
    best: Float[Array, "m"], token: Int[Array, "m"], boxes: Boxes, *, interpret: bool = False
) -> tuple[Int[Array, "m"], Boxes]:
    """The token whose logit is the largest on any device, for each of m texts, or `LOST`, and the boxes for
    the next sum of any program. Of equal ones it is the first.

    Args:
        best: f32, the largest logit of this device. Not a number where a sum before was lost.
        token: int32 below 2²⁴, its place in the whole vocabulary.
        boxes: of this device.
        interpret: run in interpret mode, which knows no assembly.
    """
    (m,) = best.shape
    shape = (2, 1 << (boxes.devices - 1).bit_length(), m)
    found, turn = launch(
        partial(_work, shape=shape, devices=boxes.devices),
        NAME,
        {"best": best, "token": token, **boxes.operands},
        {"out": jax.ShapeDtypeStruct((m,), jnp.int32), "next": jax.ShapeDtypeStruct((1,), jnp.int32)},
        programs=1,
        rows=1,
        warps=max(1, math.prod(shape) // WARP),
        interpret=interpret,
    )
    return found, boxes.after(turn)
