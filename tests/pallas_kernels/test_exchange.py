"""The exchange between GPUs: devices are threads, their memories and the kernel's assembly are emulated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from peer_memory import Memory, boxes_of, emulate

from pallas_kernels.decode_step.exchange import exchange
from svsk_jax.parallel import MODEL, make_mesh
from svsk_jax.parallel.boxes import SPECS, PeerBoxes


@pytest.mark.parametrize(("devices", "turn"), [(2, 1), (4, 2**31 - 2)])
def test_devices_add_up_in_turn(devices, turn, monkeypatch):
    memory = Memory(devices)

    emulate(monkeypatch, memory)
    mesh = make_mesh(1, devices, jax.devices()[:devices])

    def several(parts, boxes):
        found = []
        for scale in (1.0, -2.0, 0.5, 3.0):
            total, boxes = exchange(parts[0] * jnp.float32(scale), boxes, interpret=True)
            found.append(total)
        return jnp.stack(found)[None], boxes.turn[None]

    # The last program is filled up.
    parts = np.random.default_rng(1).normal(size=(devices, 3, 2, 131)).astype(np.float32)
    run = jax.shard_map(
        several,
        mesh=mesh,
        in_specs=(P(MODEL), SPECS),
        out_specs=(P(MODEL), P(MODEL)),
        check_vma=False,
    )
    found, turns = jax.jit(run)(parts, boxes_of(devices, turn))
    expected = parts.sum((0, 1))
    for scale, total in zip((1.0, -2.0, 0.5, 3.0), np.moveaxis(np.asarray(found), 1, 0), strict=True):
        np.testing.assert_allclose(
            total, np.broadcast_to(scale * expected, total.shape), rtol=1e-5, atol=1e-5
        )
        assert (total == total[0]).all()
    assert np.asarray(turns).tolist() == [[np.int64(turn + 4).astype(np.int32)]] * devices
    # Two programs, each of which sends to every device.
    assert memory.stores == 4 * 2 * devices * devices


@pytest.mark.parametrize("patience", [0, 3])
def test_a_device_whose_numbers_do_not_come(patience, monkeypatch):
    """What it does not know is not a number; the next turn finds everything in its place."""
    emulate(monkeypatch, Memory(2))
    # A shape of its own: a compiled call keeps the memory that it was traced with.
    parts = jnp.ones((1, 1, 5 + patience))
    alone = jax.tree.map(lambda each: each[:, :1] if each.ndim == 3 else each, boxes_of(2, 5, patience))
    found, after = exchange(parts, alone, interpret=True)
    assert np.isnan(found).all()
    assert int(after.turn[0]) == 6
    other = dataclasses.replace(alone, addresses=boxes_of(2, 5).addresses[:, 1:])
    found, _ = exchange(2 * parts, other, interpret=True)
    assert (np.asarray(found) == 3).all()


def test_too_many_numbers():
    with pytest.raises(ValueError, match=r"262400 numbers are more than 262144; add them up"):
        exchange(jnp.zeros((1, 64, 4100)), boxes_of(2, 1), interpret=True)


@pytest.mark.parametrize(("data", "model", "why"), [(2, 1, "one device along"), (1, 2, "are not GPUs")])
def test_devices_without_boxes(data, model, why):
    with pytest.raises(ValueError, match=why):
        PeerBoxes(make_mesh(data, model, jax.devices()[:2]))
