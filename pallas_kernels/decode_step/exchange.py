"""The Triton kernel that adds up what the GPUs of one host hold, in their memories, without XLA's or NCCL's
help.

A sum of some KiB between two GPUs is all latency, and XLA launches its own from the host, between CUDA
graphs. Here each device has a box in its memory for every device's numbers. A thread writes its number into
all boxes, then waits for the others' in its own. A number and the turn it belongs to are one word of 64 bits,
which is written and read whole (as in NCCL's protocol LL): nothing else needs to be ordered, and nothing is
cleared. Boxes have two halves, for odd and for even turns. That is enough: what a device writes at turn t + 2
overwrites turn t, and it only gets there with all numbers of turn t + 1, which other devices send when they
have read turn t. So devices must take the same turns, in order.

A thread asks a number of times, not for ever, and then its sum is NaN: a device that has lost another says
so. A kernel that asks once only, and finds nothing, is how programs are loaded and recorded before devices
wait for one another: what the driver does then may itself wait for a GPU that waits.

Pallas lowers the assembly as free of side effects. It stays, once and in its place, because its result is
stored.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.decode_step.launch import launch
from pallas_kernels.svsk_matmul.layout import ceil_div
from pallas_kernels.svsk_matmul.triton_operands import Refs

NAME = "svsk_exchange"
THREADS = 256
"""Numbers of a program, one for each thread."""
WORD = 8
"""Bytes of a number and its turn."""
NOT_A_NUMBER = "0f7FC00000"
LARGEST = 1 << 18
"""Numbers that an exchange takes: with more, bandwidth matters, and every device sends all it has to all."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes:
    """The boxes of the n devices that add up, as one of them finds them."""

    addresses: Any
    """int32 [1, 1, 2 n + 1]: the device's place among them, then the lower and upper halves of the address of
    each device's box. A box is int32 [2, n, `LARGEST`, 2], zero at first."""
    turn: Any
    """int32 [1]: of the next exchange. From 1 on; 2³¹ - 1 is followed by -2³¹."""
    patience: Any
    """int32 [1], at least 0: how often an exchange asks again for numbers that have not come; then it gives
    NaN."""


def assembly(devices: int) -> str:
    """PTX of one thread: $0 is the sum, $1 its number, $2 the turn, $3 its word's place in a half of a box
    where the device writes, $4 where the first device writes (both in bytes), $5 the patience, $6 the
    device's place, and then the halves of addresses."""
    address = [f"mov.b64 at{d}, {{${7 + 2 * d}, ${8 + 2 * d}}};" for d in range(devices)]
    send = [f"add.u64 to, at{d}, there; st.relaxed.sys.global.b64 [to], word;" for d in range(devices)]
    # Its own number comes by its own box too: all devices add in the same order.
    own = [f"setp.eq.u32 mine, $6, {d}; selp.b64 box, at{d}, box, mine;" for d in range(devices)]
    take = [
        f"""
WAIT{d}:
ld.relaxed.sys.global.b64 word, [box]; mov.b64 {{value, seen}}, word;
setp.ne.u32 late, seen, $2; setp.ne.u32 again, left, 0; and.pred again, again, late;
@again sub.u32 left, left, 1; @again bra WAIT{d};
selp.f32 value, {NOT_A_NUMBER}, value, late; add.f32 sum, sum, value;
add.u64 box, box, {LARGEST * WORD};"""
        for d in range(devices)
    ]
    registers = ", ".join(f"at{d}" for d in range(devices))
    lines = [
        f"{{ .reg .pred again, late, mine; .reg .b64 {registers}, there, to, word, box, off;",
        ".reg .f32 value, sum; .reg .b32 seen, left;",
        *address,
        "cvt.u64.u32 there, $3; cvt.u64.u32 off, $4; mov.b64 word, {$1, $2};",
        *send,
        "mov.b64 box, 0;",
        *own,
        "add.u64 box, box, off; mov.b32 left, $5; mov.f32 sum, 0f00000000;",
        *take,
        "mov.f32 $0, sum; }",
    ]
    return "\n".join(lines)


def _work(ref: Refs, program: jax.Array, _: jax.Array) -> None:
    parts, numbers = ref["parts"].shape
    devices = (ref["addresses"].shape[2] - 1) // 2
    index = program * THREADS + lax.broadcasted_iota(jnp.int32, (THREADS,), 0)
    inside = index < numbers
    values = [
        plgpu.load(ref["parts"].at[jnp.int32(part), index], mask=inside, other=0.0) for part in range(parts)
    ]
    first = jnp.int32(0)
    turn = plgpu.load(ref["turn"].at[first])
    entries = [plgpu.load(ref["addresses"].at[first, first, jnp.int32(i)]) for i in range(2 * devices + 1)]
    half = (turn & 1) * (devices * LARGEST * WORD) + index * WORD
    patience = plgpu.load(ref["patience"].at[first])
    scalars = [turn, half + entries[0] * (LARGEST * WORD), half, patience, *entries]
    [total] = plgpu.elementwise_inline_asm(
        assembly(devices),
        args=[sum(values[1:], values[0]), *(jnp.broadcast_to(scalar, (THREADS,)) for scalar in scalars)],
        constraints=",".join(["=f", "f", *"r" * len(scalars)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((THREADS,), jnp.float32)],
    )
    plgpu.store(ref["sum"].at[index], total, mask=inside)
    plgpu.store(ref["next"].at[first], turn + 1)


def why_no_exchange(parts: Float[Array, "parts m rows"]) -> str | None:
    """Why `exchange` can't take these parts, or None if it can."""
    numbers = parts.shape[1] * parts.shape[2]
    return None if numbers <= LARGEST else f"{numbers} numbers are more than {LARGEST}"


@partial(jax.jit, static_argnames="interpret")
def exchange(
    parts: Float[Array, "parts m rows"], boxes: Boxes, *, interpret: bool = False
) -> tuple[Float[Array, "1 m rows"], Boxes]:
    """The sum of all parts of all devices, the same on each of them, and the boxes for the next exchange.

    Every device must get here, with parts of one shape, or those that do lose patience, and have NaN.

    Args:
        parts: f32, of this device.
        boxes: of this device; those that come back are for the next exchange of any program.
        interpret: run in interpret mode, which the assembly has no part in.

    Raises:
        ValueError: more numbers than `LARGEST`.
    """
    reason = why_no_exchange(parts)
    if reason is not None:
        raise ValueError(f"exchange of parts {parts.shape}: {reason}; add them up with jax.lax.psum")
    count, m, rows = parts.shape
    numbers = m * rows
    found, turn = launch(
        _work,
        NAME,
        {
            "parts": parts.reshape(count, numbers),
            "addresses": boxes.addresses,
            "turn": boxes.turn,
            "patience": boxes.patience,
        },
        {
            "sum": jax.ShapeDtypeStruct((numbers,), jnp.float32),
            "next": jax.ShapeDtypeStruct((1,), jnp.int32),
        },
        programs=ceil_div(numbers, THREADS),
        rows=1,
        warps=THREADS // 32,
        interpret=interpret,
    )
    return found.reshape(1, m, rows), dataclasses.replace(boxes, turn=turn)
