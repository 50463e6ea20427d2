"""A few kills of short runs; `make faults` makes 50 of whole ones."""

import itertools
import random

import pytest
from kill_and_resume import SHORT, Faults, Moment, random_moments


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder for all, so that what one compiles serves the others."""
    return tmp_path_factory.mktemp("faults")


def test_killed_runs_end_in_the_same_bytes(work):
    faults = Faults(work=work, flags=SHORT)
    faults.undisturbed()
    found = faults.disturb("run", itertools.islice(random_moments(random.Random(4), 0.05), 2))
    assert found


def test_a_killed_calibration_ends_in_the_same_bytes(work):
    faults = Faults(work=work, flags=SHORT[2:], verb="calibrate")
    faults.undisturbed()
    # After the text and the first layer.
    found = faults.disturb("run", iter([Moment(steps=2, seconds=0.0)]))
    assert found[0] not in ("nothing", "text")
