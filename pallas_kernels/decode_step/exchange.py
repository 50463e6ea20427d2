"""How kernels of a decode step add up what the GPUs of one host hold, in their memories, without XLA's or
NCCL's help.

A sum of some KiB between two GPUs is all latency, and XLA launches its own from the host, between CUDA
graphs. Here each device has a box in its memory for every device's numbers. A thread writes its number into
the others' boxes, then waits for theirs in its own. A number and the turn it belongs to are one word of 64
bits, which is written and read whole (as in NCCL's protocol LL): nothing else needs to be ordered, and
nothing is cleared. Boxes have two halves, for odd and for even turns. That is enough: what a device writes at
turn t + 2 overwrites turn t, and it only gets there with all numbers of turn t + 1, which other devices send
when they have read turn t. So devices must take the same turns, in order.

A thread asks a number of times, not for ever, and then its sum is NaN: a device that has lost another says
so. With a number that is NaN it does not wait: a device that has lost another does so once, not at each sum.
A kernel that asks once only, and finds nothing, is how programs are loaded and recorded before devices wait
for one another: what the driver does then may itself wait for a GPU that waits.

Pallas lowers the assembly as free of side effects. It stays, once and in its place, because its result is
stored. A thread sends one number and waits, then the next. So a program's threads should have a number each:
16 (each of them in 16 threads) made a sum 18 µs longer, on two H200.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.svsk_matmul.triton_operands import Refs

WORD = 8
"""Bytes of a number and its turn."""
NOT_A_NUMBER = "0f7FC00000"
LARGEST = 1 << 18
"""Numbers of a sum: with more, bandwidth matters, and every device sends all it has to all."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes:
    """The boxes of the n devices that add up, as one of them finds them."""

    addresses: Any
    """int32 [1, 1, 2 n + 1]: the device's place among them, then the lower and upper halves of the address of
    each device's box. A box is int32 [2, n, `LARGEST`, 2], zero at first."""
    turn: Any
    """int32 [1]: of the next sum. From 1 on; 2³¹ - 1 is followed by -2³¹."""
    patience: Any
    """int32 [1], at least 0: how often a thread asks again for a number that has not come."""

    @property
    def devices(self) -> int:
        """n."""
        return _devices(self.addresses)

    @property
    def operands(self) -> dict[str, jax.Array]:
        """What a kernel reads, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def after(self, turn: jax.Array) -> "Boxes":
        """For the sum after one whose kernel gave this turn."""
        return dataclasses.replace(self, turn=turn)


def _devices(addresses: Any) -> int:
    """That some `Boxes.addresses` are of."""
    return (addresses.shape[2] - 1) // 2


def assembly(devices: int) -> str:
    """PTX of one thread: $0 is the sum, $1 its number, $2 the turn, $3 its word's place in a half of a box
    where the device writes, $4 where the first device writes (both in bytes), $5 the patience, $6 the
    device's place, and then the halves of addresses."""
    address = [
        f"mov.b64 at{d}, {{${7 + 2 * d}, ${8 + 2 * d}}}; setp.eq.u32 mine{d}, $6, {d};"
        for d in range(devices)
    ]
    send = [
        f"""
@mine{d} mov.b64 box, at{d}; add.u64 to, at{d}, there;
@!mine{d} st.relaxed.sys.global.b64 [to], word;"""
        for d in range(devices)
    ]
    take = [
        f"""
mov.f32 value, $1; @mine{d} bra HAVE{d};
WAIT{d}:
ld.relaxed.sys.global.b64 word, [box]; mov.b64 {{value, seen}}, word;
setp.ne.u32 late, seen, $2; setp.ne.u32 again, left, 0; and.pred again, again, late;
@again sub.u32 left, left, 1; @again bra WAIT{d};
selp.f32 value, {NOT_A_NUMBER}, value, late;
HAVE{d}:
add.f32 sum, sum, value; add.u64 box, box, {LARGEST * WORD};"""
        for d in range(devices)
    ]
    registers, own = (", ".join(f"{name}{d}" for d in range(devices)) for name in ("at", "mine"))
    lines = [
        f"{{ .reg .pred again, late, lost, {own}; .reg .b64 {registers}, there, to, word, box, off;",
        ".reg .f32 value, sum; .reg .b32 seen, left;",
        *address,
        "cvt.u64.u32 there, $3; cvt.u64.u32 off, $4; mov.b64 word, {$1, $2}; mov.b64 box, 0;",
        *send,
        "add.u64 box, box, off; mov.b32 left, $5; mov.f32 sum, 0f00000000;",
        "setp.nan.f32 lost, $1, $1;",
        "@lost mov.b32 left, 0;",
        *take,
        "mov.f32 $0, sum; }",
    ]
    return "\n".join(lines)


def over_devices(ref: Refs, index: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Within a kernel: begins to load what `Boxes` say, and gives a function of f32 numbers of this device:
    their sum over all devices, the same on each of them. Each device must get there, at the same turn, with
    numbers of the same indices, or those that do lose patience and have NaN. The turn after it goes to
    `next`.

    Args:
        ref: fields of `Boxes`, and `next`.
        index: int32, of each number's word, below `LARGEST`. Programs that share one have the same number.
    """
    devices, first = _devices(ref["addresses"]), jnp.int32(0)
    turn, patience = (plgpu.load(ref[name].at[first]) for name in ("turn", "patience"))
    entries = [plgpu.load(ref["addresses"].at[first, first, jnp.int32(i)]) for i in range(2 * devices + 1)]
    half = (turn & 1) * (devices * LARGEST * WORD) + index * WORD
    scalars = [turn, half + entries[0] * (LARGEST * WORD), half, patience, *entries]
    scalars = [jnp.broadcast_to(scalar, index.shape) for scalar in scalars]
    plgpu.store(ref["next"].at[first], turn + 1)

    def total(numbers: jax.Array) -> jax.Array:
        [found] = plgpu.elementwise_inline_asm(
            assembly(devices),
            args=[numbers, *scalars],
            constraints=",".join(["=f", "f", *"r" * len(scalars)]),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(numbers.shape, jnp.float32)],
        )
        return found

    return total
