"""Memories of GPUs that write into each other: assembly of `decode_step.exchange`, read by an interpreter."""

import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_step.exchange import LARGEST, WORD, Boxes
from svsk_jax.parallel.boxes import address_rows

BASE = 0x7F12F8000000
"""Of the first box: its lower half is negative as an int32."""
STRIDE = 1 << 33
PATIENCE = 30.0
U64 = np.uint64


class Memory:
    """The boxes of some devices, as words of 64 bits by address."""

    def __init__(self, devices):
        self.devices = devices
        self.boxes = np.zeros((devices, 2 * devices * LARGEST), U64)
        self.late = np.random.default_rng(0)
        self.stores = 0

    def place(self, address):
        box, byte = np.divmod(address.astype(np.int64) - BASE, STRIDE)
        assert set(box) <= set(range(self.devices))
        assert not (byte % WORD).any()
        return box, byte // WORD

    def run(self, assembly, *inputs):
        """Every lane's $0; the lanes of a program go on together."""
        time.sleep(0.01 * self.late.random())
        give_up = time.monotonic() + PATIENCE
        held = {f"${index + 1}": np.ravel(value) for index, value in enumerate(inputs)}
        lanes = len(held["$1"])
        lines = [line.strip() for line in re.split(r";|(?<=:)\n", re.sub(r"\.reg [^;]*;", "", assembly))]
        lines = [line.strip("{} \n") for line in lines if line.strip("{} \n")]
        at = 0

        def bits(name, kind):
            if not re.match(r"[$a-z]", name):
                if name.startswith("0f"):
                    return np.full(lanes, int(name[2:], 16), np.uint32).view(kind)
                return np.full(lanes, int(name), kind)
            value = held[name]
            return value if value.dtype == kind else value.view(kind)

        def put(name, value):
            held[name] = value if predicate.all() else np.where(predicate, value, bits(name, value.dtype))

        while at < len(lines):
            line, at = lines[at], at + 1
            if line.endswith(":"):
                continue
            predicate = np.full(lanes, True)
            if line.startswith("@"):
                name, line = line[1:].split(" ", 1)
                predicate = ~held[name[1:]] if name.startswith("!") else held[name]
            operation, rest = line.split(" ", 1)
            names = re.findall(r"[$\w]+", rest)
            if operation == "bra":
                if predicate.any():
                    assert time.monotonic() < give_up, "waits for ever"
                    time.sleep(1e-4)
                    at = lines.index(names[0] + ":")
            elif operation == "mov.b64" and "{" in rest and rest.startswith("{"):
                word = bits(names[2], U64)
                put(names[0], word.astype(np.uint32).view(np.float32))
                put(names[1], (word >> U64(32)).astype(np.uint32))
            elif operation == "mov.b64" and "{" in rest:
                low, high = (bits(name, np.uint32).astype(U64) for name in names[1:])
                put(names[0], low | high << U64(32))
            elif operation in ("mov.b64", "mov.b32", "mov.f32"):
                kind = {"mov.b64": U64, "mov.b32": np.uint32, "mov.f32": np.float32}[operation]
                put(names[0], bits(names[1], kind))
            elif operation == "cvt.u64.u32":
                put(names[0], bits(names[1], np.uint32).astype(U64))
            elif operation == "add.u64":
                put(names[0], bits(names[1], U64) + bits(names[2], U64))
            elif operation == "sub.u32":
                put(names[0], bits(names[1], np.uint32) - bits(names[2], np.uint32))
            elif operation == "add.f32":
                put(names[0], bits(names[1], np.float32) + bits(names[2], np.float32))
            elif operation in ("setp.eq.u32", "setp.ne.u32"):
                same = bits(names[1], np.uint32) == bits(names[2], np.uint32)
                put(names[0], same if operation == "setp.eq.u32" else ~same)
            elif operation == "setp.nan.f32":
                put(names[0], np.isnan(bits(names[1], np.float32)) | np.isnan(bits(names[2], np.float32)))
            elif operation == "selp.f32":
                values = (bits(name, np.float32) for name in names[1:3])
                put(names[0], np.where(held[names[3]], *values))
            elif operation == "and.pred":
                put(names[0], held[names[1]] & held[names[2]])
            elif operation == "st.relaxed.sys.global.b64":
                if predicate.any():
                    self.boxes[self.place(held[names[0]][predicate])] = held[names[1]][predicate]
                    self.stores += 1
            elif operation == "ld.relaxed.sys.global.b64":
                put(names[0], self.boxes[self.place(held[names[1]])])
            else:
                raise AssertionError(f"unknown: {line}")
        return held["$0"].reshape(np.shape(inputs[0]))


def boxes_of(devices, turn, patience=1 << 24, groups=1):
    """As `parallel.boxes` makes them, of boxes that lie in a `Memory` of all groups' devices."""
    places = BASE + STRIDE * np.arange(groups * devices).reshape(groups, devices)
    return Boxes(
        addresses=jnp.asarray(np.stack([address_rows(group.tolist()) for group in places])),
        turn=jnp.asarray([turn], jnp.int32),
        patience=jnp.asarray([patience], jnp.int32),
    )


def emulate(patch, memory):
    """Have kernels in interpret mode run their assembly on a `Memory`."""

    def emulated(assembly, *, args, constraints, pack, result_shape_dtypes):
        assert constraints.split(",") == ["=f", "f", *["r"] * (len(args) - 1)]
        assert pack == 1
        return [jax.pure_callback(partial(memory.run, assembly), result_shape_dtypes[0], *args)]

    patch.setattr(plgpu, "elementwise_inline_asm", emulated)
