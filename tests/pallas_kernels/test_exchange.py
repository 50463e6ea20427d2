"""Sums between GPUs: devices are threads, their memories and the kernel's assembly are emulated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from peer_memory import Memory, boxes_of, emulate

from pallas_kernels.decode_step import LOST, Product, finish_residual, likeliest_over
from pallas_kernels.svsk_matmul import lay_out
from pallas_kernels.svsk_matmul.synthetic import random_weight
from svsk_jax.parallel import MODEL, make_mesh
from svsk_jax.parallel.boxes import SPECS, PeerBoxes

COLUMNS = 300
"""Of the residual stream: the last program is filled up."""


def product_of(parts):
    """One whose sum over devices is all there is to it: it has no sidecar."""
    weight = lay_out(random_weight(jax.random.key(0), COLUMNS, 64, rank=0))
    padding = weight.padded_rows - parts.shape[-1]
    return Product(parts=jnp.pad(parts, ((0, 0), (0, 0), (0, padding))), weight=weight)


def added(x, parts, boxes):
    # Rows that fill up the next product's batch share the last one's words.
    rows = x.shape[0] + 1
    return finish_residual(x, product_of(parts), jnp.ones(COLUMNS), rows=rows, boxes=boxes, interpret=True)


@pytest.mark.parametrize(("devices", "turn"), [(2, 1), (4, 2**31 - 2)])
def test_devices_add_up_in_turn(devices, turn, monkeypatch):
    memory = Memory(devices)
    emulate(monkeypatch, memory)
    mesh = make_mesh(1, devices, jax.devices()[:devices])
    scales = (1.0, -2.0, 0.5, 3.0)

    def several(parts, boxes):
        x, found = jnp.zeros((2, COLUMNS)), []
        for scale in scales:
            stream, boxes = added(x, parts[0] * jnp.float32(scale), boxes)
            x = stream.x
            found.append(x)
        return jnp.stack(found)[None], boxes.turn[None]

    parts = np.random.default_rng(1).normal(size=(devices, 3, 2, COLUMNS)).astype(np.float32)
    run = jax.shard_map(
        several,
        mesh=mesh,
        in_specs=(P(MODEL), SPECS),
        out_specs=(P(MODEL), P(MODEL)),
        check_vma=False,
    )
    found, turns = jax.jit(run)(parts, boxes_of(devices, turn))
    expected = parts.sum((0, 1))
    for scale, total in zip(np.cumsum(scales), np.moveaxis(np.asarray(found), 1, 0), strict=True):
        np.testing.assert_allclose(
            total, np.broadcast_to(scale * expected, total.shape), rtol=1e-5, atol=1e-5
        )
        assert (total == total[0]).all()
    assert np.asarray(turns).tolist() == [[np.int64(turn + 4).astype(np.int32)]] * devices
    # Two programs for each of three rows, each of which sends to every other device.
    assert memory.stores == 4 * 2 * 3 * devices * (devices - 1)


@pytest.mark.parametrize("patience", [0, 3])
def test_a_device_whose_numbers_do_not_come(patience, monkeypatch):
    """What it does not know is not a number; the next turn finds everything in its place."""
    emulate(monkeypatch, Memory(2))
    # A compiled call keeps the memory that it was traced with.
    jax.clear_caches()
    rows = 2
    x, parts = jnp.zeros((rows, COLUMNS)), jnp.ones((1, rows, COLUMNS))
    boxes = boxes_of(2, 5, patience)
    mine, other = (
        dataclasses.replace(boxes, addresses=boxes.addresses[:, place : place + 1]) for place in range(2)
    )
    stream, after = added(x, parts, mine)
    assert np.isnan(stream.x).all()
    assert int(after.turn[0]) == 6
    stream, _ = added(x, 2 * parts, other)
    assert (np.asarray(stream.x) == 3).all()


BEST = {
    "the last but one": ([1.0, 2.0, 5.0, -3.0], 30),
    "the first of two": ([1.0, 2.0, 5.0, 5.0], 30),
    "one has no row of the vocabulary": ([-9.0, -8.0, -5.0, -np.inf], 30),
    "one has lost a sum": ([1.0, 2.0, 5.0, np.nan], LOST),
}


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_the_likeliest_of_all_devices(devices, monkeypatch):
    """Of as many texts as there are cases, each of them on the last devices."""
    emulate(monkeypatch, Memory(devices))
    mesh = make_mesh(1, devices, jax.devices()[:devices])
    best = np.asarray([case[-devices:] for case, _ in BEST.values()], np.float32).T
    token = np.arange(10, 41, 10, np.int32)[-devices:, None] + np.zeros(len(BEST), np.int32)

    def twice(best, token, boxes):
        first, boxes = likeliest_over(best[0], token[0], boxes, interpret=True)
        second, boxes = likeliest_over(best[0], token[0] + 1, boxes, interpret=True)
        return jnp.stack([first, second])[None], boxes.turn[None]

    run = jax.shard_map(
        twice,
        mesh=mesh,
        in_specs=(P(MODEL), P(MODEL), SPECS),
        out_specs=(P(MODEL), P(MODEL)),
        check_vma=False,
    )
    found, turns = jax.jit(run)(best, token, boxes_of(devices, 7))
    expected = np.asarray([token for _, token in BEST.values()])
    assert (found[:, 0] == expected).all()
    assert (found[:, 1] == np.where(expected == LOST, LOST, expected + 1)).all()
    assert turns.tolist() == [[9]] * devices


def test_embeddings_that_devices_hold_parts_of(monkeypatch):
    emulate(monkeypatch, Memory(2))
    mesh = make_mesh(1, 2, jax.devices()[:2])
    x = np.random.default_rng(2).normal(size=(2, 1, COLUMNS)).astype(np.float16)

    def summed(x, boxes):
        return finish_residual(x[0], None, jnp.ones(COLUMNS), boxes=boxes, interpret=True)[0].x[None]

    run = jax.shard_map(summed, mesh=mesh, in_specs=(P(MODEL), SPECS), out_specs=P(MODEL), check_vma=False)
    found = np.asarray(jax.jit(run)(x, boxes_of(2, 1)))
    assert (found == x.astype(np.float32).sum(0)).all()


def test_too_many_numbers():
    with pytest.raises(ValueError, match=r"278528 numbers are more than 262144; add up with jax.lax.psum"):
        finish_residual(jnp.zeros((64, 4100)), None, jnp.ones(4100), boxes=boxes_of(2, 1), interpret=True)


@pytest.mark.parametrize(("data", "model", "why"), [(2, 1, "one device along"), (1, 2, "are not GPUs")])
def test_devices_without_boxes(data, model, why):
    with pytest.raises(ValueError, match=why):
        PeerBoxes(make_mesh(data, model, jax.devices()[:2]))
