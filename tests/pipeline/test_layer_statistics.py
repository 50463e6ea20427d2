"""Statistics are read ahead of the layers at work, once each."""

import dataclasses
from types import SimpleNamespace

import pytest
from support import TINY

from svsk_jax.calibration.store import Statistics
from svsk_jax.model.parameters import linear_inputs
from svsk_jax.parallel.groups import DeviceGroups
from svsk_jax.pipeline.layer_statistics import statistics_ahead
from svsk_jax.quant.types import recipe

MODEL = dataclasses.replace(TINY, num_layers=16)
INPUTS = list(dict.fromkeys(linear_inputs(MODEL, 0).values()))


class Recorded(Statistics):
    """Statistics of which each input is its own name, and which know what was read."""

    def __init__(self):
        self.reads = []

    def layer(self, index):
        return LayerFile(index, self.reads)

    def sensitivities(self, index):
        return {}, {}


class LayerFile(dict):
    """The moments of a layer."""

    def __init__(self, index, reads):
        self.index, self.reads = index, reads

    def __getitem__(self, source):
        self.reads.append((self.index, source))
        return source


def one_after_another():
    return [(index, source) for index in range(16) for source in INPUTS]


def eight_at_once():
    """The last four of eight layers are two inputs behind the others."""
    order = [
        (start, place + (2 if index >= 4 else 0), index, place)
        for start in (0, 8)
        for index in range(8)
        for place in range(len(INPUTS))
    ]
    return [(start + index, INPUTS[place]) for start, _, index, place in sorted(order)]


@pytest.mark.parametrize(
    ("platform", "depth", "order"), [("cpu", 3, one_after_another()), ("gpu", 24, eight_at_once())]
)
def test_no_input_is_read_twice_by_eight_groups(platform, depth, order):
    """On a CPU their layers are at work one after another, elsewhere together."""
    statistics, held = Recorded(), []
    device = SimpleNamespace(platform=platform, process_index=0)
    groups = DeviceGroups(owners=(0,) * 8, local=((device,),) * 8)
    with statistics_ahead(statistics, MODEL, recipe("svsk-r16"), groups) as ahead:
        for item in order:
            assert ahead.take(item).moment == item[1]
            held.append(len(ahead._reading))
    assert sorted(statistics.reads) == sorted(one_after_another())
    assert max(held) == depth
