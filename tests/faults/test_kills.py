"""A few kills of a short run; `make faults` makes 50 of a whole one."""

import itertools
import random

from kill_and_resume import SHORT, Faults, random_moments


def test_killed_runs_end_in_the_same_bytes(tmp_path):
    faults = Faults(work=tmp_path, flags=SHORT)
    faults.undisturbed()
    found = faults.disturb("run", itertools.islice(random_moments(random.Random(4), 0.05), 2))
    assert found
