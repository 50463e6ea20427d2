"""The mesh that a user asks for."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec as P

from svsk_jax.parallel import make_mesh, parse_mesh, sharding


def test_both_axes_are_named():
    mesh = parse_mesh("data=2, model=4")
    assert dict(mesh.shape) == {"data": 2, "model": 4}


def test_devices_that_share_parameters_are_neighbours():
    mesh = make_mesh(2, 4)
    assert [device.id for device in mesh.devices[0]] == [0, 1, 2, 3]


def test_data_takes_what_is_left():
    assert dict(parse_mesh("model=4").shape) == {"data": jax.device_count() // 4, "model": 4}


@pytest.mark.parametrize("text", ["", "data", "data=0", "rows=2", "data=2,data=2", "data=2;model=2"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="data=N,model=M"):
        parse_mesh(text)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="needs 64 devices"):
        make_mesh(16, 4)


def test_a_model_axis_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide"):
        make_mesh(model=3)


def test_a_mesh_without_some_processes_devices_is_refused():
    devices = [SimpleNamespace(process_index=number // 2) for number in range(4)]
    for data, left_out in ((2, "processes 1;"), (3, "processes 0, 1;")):
        with pytest.raises(ValueError, match=left_out):
            make_mesh(data, devices=devices)


def test_logical_axes_find_their_mesh_axis():
    mesh = make_mesh(2, 4)
    assert sharding(mesh, "batch", "tokens", "hidden").spec == P("data", None, None)
    assert sharding(mesh, "moment_rows", None).spec == P("model", None)
    assert sharding(mesh, "chunks").spec == P(("data", "model"))
