"""Memory in which the GPUs of one host leave numbers for one another."""

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.decode_step import LARGEST_EXCHANGE, Boxes
from svsk_jax.parallel.mesh import DATA, MODEL

SPECS = Boxes(addresses=P(DATA, MODEL), turn=P(), patience=P())
"""How `Boxes` are divided over a mesh."""
ALREADY_ENABLED = 704
"""What CUDA answers where a GPU may read another's memory already."""
TURNS = 1 << 32
T = TypeVar("T")
PATIENCE = 1 << 24
"""Times that an exchange asks again: some 10 seconds."""
_IN_ORDER = threading.Lock()


class PeerBoxes:
    """Boxes of all devices of a mesh, each for those along its `model` axis, and whose turn it is.

    `decode_step.finish_residual` and `likeliest_over` use them. They stay where they are until this object
    goes, which may be while a call is on its way: the devices' memory is given to nothing else before that
    call ends. A program must run once with `take(…, wait=False)` before it runs in earnest.

    Raises:
        ValueError: `why_no_boxes` has a reason.
    """

    def __init__(self, mesh: Mesh):
        reason = why_no_boxes(mesh)
        if reason is not None:
            raise ValueError(f"GPUs can't write to each other's memory: {reason}")
        devices, shape = mesh.devices, (2, mesh.shape[MODEL], LARGEST_EXCHANGE, 2)
        boxes = [[jax.device_put(np.zeros(shape, np.int32), device) for device in row] for row in devices]
        self._boxes = jax.block_until_ready(boxes)
        rows = [address_rows([box.unsafe_buffer_pointer() for box in row]) for row in boxes]
        self._addresses = jax.device_put(np.stack(rows), NamedSharding(mesh, SPECS.addresses))
        self._turn = 1

    def take(self, exchanges: int, *, wait: bool = True) -> Boxes:
        """For the next call, which exchanges so often. Calls must run in the order in which they took, on all
        devices: where several threads call, or several objects share devices, `send` sees to it.

        With `wait` False devices don't wait for one another, and what the call computes means nothing: a
        program that runs for the first time is still loaded, and its kernels recorded, by a driver that may
        wait for a GPU that waits for another.
        """
        turn = np.asarray([self._turn], np.uint32).view(np.int32)
        self._turn = (self._turn + exchanges) % TURNS
        patience = np.asarray([PATIENCE if wait else 0], np.int32)
        return Boxes(addresses=self._addresses, turn=turn, patience=patience)

    def send(self, call: Callable[[Boxes], T], exchanges: int, *, wait: bool = True) -> T:
        """What `call` gives with what `take` does. No other thread sends one between, so that all GPUs get
        calls in one order; in different ones they would wait for each other."""
        with _IN_ORDER:
            return call(self.take(exchanges, wait=wait))


def address_rows(pointers: Sequence[int]) -> Any:
    """`Boxes.addresses` of devices with boxes at these addresses, int32 [n, 2 n + 1]."""
    halves = [half for pointer in pointers for half in (pointer & 0xFFFFFFFF, pointer >> 32)]
    return np.asarray([[place, *halves] for place in range(len(pointers))], np.uint32).view(np.int32)


def why_no_boxes(mesh: Mesh) -> str | None:
    """Why the devices of a mesh can't exchange by boxes, or None if they can; they may read and write each
    other's memory afterwards."""
    if mesh.shape[MODEL] == 1:
        return "there is one device along the mesh's axis model"
    if any(device.platform != "gpu" for device in mesh.devices.flat):
        return "the devices are not GPUs"
    if "NVIDIA" not in mesh.devices.flat[0].device_kind:
        return "the GPUs are not NVIDIA's"
    if jax.process_count() > 1:
        return "they belong to several processes"
    for row in mesh.devices:
        ordinals = [device.local_hardware_id for device in row]
        if (reason := _open_memory(ordinals)) is not None:
            return reason
    return None


def _open_memory(ordinals: Sequence[int]) -> str | None:
    """Let each of some GPUs use the others' memory, as XLA does too; why that can't be, or None."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"the CUDA driver can't be loaded ({error})"
    contexts = []
    for ordinal in ordinals:
        context = ctypes.c_void_p()
        if status := cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(ordinal)):
            return f"GPU {ordinal} can't be reached (CUDA status {status})"
        contexts.append(context)
    for ordinal, context in zip(ordinals, contexts, strict=True):
        cuda.cuCtxPushCurrent_v2(context)
        statuses = [cuda.cuCtxEnablePeerAccess(peer, 0) for peer in contexts if peer is not context]
        cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        wrong = [status for status in statuses if status not in (0, ALREADY_ENABLED)]
        if wrong:
            return f"GPU {ordinal} can't use another's memory (CUDA status {wrong[0]})"
    return None
