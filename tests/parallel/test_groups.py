"""Layers over groups of devices, of this process and of others."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, MemorySource

from svsk_jax import pipeline
from svsk_jax.parallel import make_mesh
from svsk_jax.parallel.groups import DeviceGroups, in_threads
from svsk_jax.pipeline.options import measured_options, options_file, write_options
from svsk_jax.pipeline.plan import layers_ahead
from svsk_jax.quant.allocation import Option
from svsk_jax.quant.types import TileShape
from svsk_jax.storage import SavedModel


def test_groups_are_the_rows_of_a_mesh():
    groups = DeviceGroups.of(make_mesh(2, 3))
    devices = jax.devices()
    assert groups.local == (tuple(devices[:3]), tuple(devices[3:6]))
    assert groups.own(5) == [0, 1, 2, 3, 4]


def test_one_group_of_cpu_devices_unless_a_mesh_is_given():
    assert DeviceGroups.of().local == ((jax.devices()[0],),)


def test_groups_take_turns_and_work_on_their_own_devices():
    groups = DeviceGroups.of(make_mesh(2, 2))
    found = list(groups.each(range(3), lambda item, devices: (item, devices, jnp.zeros(2).devices())))
    devices = jax.devices()
    first, second = tuple(devices[:2]), tuple(devices[2:4])
    assert found == [(0, first, {devices[0]}), (1, second, {devices[2]}), (2, first, {devices[0]})]
    alone = DeviceGroups.of(make_mesh(2, 1)).each([7], lambda item, devices: devices)
    assert list(alone) == [()]


def test_threads_work_at_once_and_results_keep_their_order():
    """The first item ends only when the second has begun."""
    begun = threading.Event()

    def run(item, group):
        if item == 0:
            assert begun.wait(20)
        if item == 1:
            begun.set()
        return item, group

    found = list(in_threads(range(9), run, (("a",), ("b",))))
    assert [item for item, _ in found] == list(range(9))
    assert {group for _, group in found} == {("a",), ("b",)}


def test_no_thread_runs_far_ahead():
    done = []

    def run(item, group):
        done.append(item)

    results = in_threads(range(20), run, (("a",), ("b",)))
    next(results)
    assert len(done) <= 4
    results.close()
    assert len(done) <= 4


def test_an_error_in_a_thread_comes_out_and_ends_the_others():
    started = []

    def run(item, group):
        started.append(item)
        if item == 1:
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        list(in_threads(range(50), run, (("a",), ("b",))))
    assert len(started) < 50


def options_of(index):
    option = Option(
        group=16,
        coefficients=None,
        tile=TileShape(),
        shape=(4, 4),
        base_bytes=8,
        nats=float(index),
        gains=np.zeros((1, 1, 2)),
    )
    return {f"layers.{index}.attention.q": [option]}


def test_layers_of_other_processes_are_read_not_measured(tmp_path):
    """Layers 1 and 3 are another's; layer 2 was measured before."""
    groups = DeviceGroups(owners=(0, 1), local=((jax.devices()[0],),))
    for index in (1, 2, 3):
        write_options(options_file(tmp_path, index, "key"), options_of(index))
    measured, reported = [], []

    def measure(index, devices):
        measured.append(index)
        return options_of(index)

    found = measured_options(
        5, lambda index: options_file(tmp_path, index, "key"), measure, groups, reported.append
    )
    assert measured == [0, 4]
    assert reported == [1, 2, 3, 5]
    assert [listed[0].nats for listed in found.values()] == [0, 1, 2, 3, 4]
    options_file(tmp_path, 3, "key").unlink()
    with pytest.raises(FileNotFoundError, match="same file system"):
        measured_options(
            5, lambda index: options_file(tmp_path, index, "key"), measure, groups, reported.append
        )


def test_layers_come_from_the_host_also_of_a_model_that_svsk_saved(tmp_path):
    """On the device that orbax restores to, every group would work there."""
    pipeline.convert(MemorySource(TINY), tmp_path / "saved", dtype=jnp.float32)
    with layers_ahead(SavedModel(tmp_path / "saved"), jnp.float32, DeviceGroups.of()) as layers:
        assert all(type(value) is np.ndarray for value in layers.take(1).values())
