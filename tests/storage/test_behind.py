"""Tasks behind the one that submits them."""

import threading

import pytest

from svsk_jax.storage.behind import Behind


def test_so_many_tasks_run_at_once_and_no_more():
    """Each task ends once the next has begun: with one at a time they would wait for ever."""
    begun = [threading.Event() for _ in range(5)]
    running, most = [], []

    def task(number):
        running.append(number)
        most.append(len(running))
        begun[number].set()
        assert number + 1 == len(begun) or begun[number + 1].wait(10)
        running.remove(number)

    with Behind(2) as behind:
        for number in range(5):
            behind.submit(task, number)
        behind.finish()
        assert not running
    assert len(most) == 5
    assert max(most) == 2


def test_an_error_is_raised_by_a_later_submit_or_at_the_end():
    def fail(what):
        raise OSError(what)

    def run(*tasks):
        with Behind(2) as behind:
            for task in tasks:
                behind.submit(*task)

    done = []
    with pytest.raises(OSError, match="first"):
        run((fail, "first"), (done.append, 1), (done.append, 2))
    assert done == [1]
    with pytest.raises(OSError, match="last"):
        run((done.append, 3), (fail, "last"))
    assert done == [1, 3]
