"""What is read while something else is worked on."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from svsk_jax.parallel.read_ahead import ReadAhead


def test_the_next_item_is_read_before_it_is_taken():
    begun = {item: threading.Event() for item in range(4)}

    def read(item):
        begun[item].set()
        return item * 10

    with ReadAhead(read, range(4)) as ahead:
        assert ahead.take(0) == 0
        assert begun[1].wait(20)
        assert not begun[2].is_set()
        assert ahead.take(1) == 10
        assert ahead.take(3) == 30


def test_an_error_is_that_of_its_item():
    def read(item):
        if item == 1:
            raise ValueError("item 1")
        return item

    with ReadAhead(read, range(3)) as ahead:
        assert ahead.take(0) == 0
        with pytest.raises(ValueError, match="item 1"):
            ahead.take(1)
        assert ahead.take(2) == 2


def test_what_is_left_out_is_let_go_of():
    class Layer:
        pass

    alive = weakref.WeakSet()

    def read(item):
        layer = Layer()
        alive.add(layer)
        return layer

    with ReadAhead(read, range(40)) as ahead:
        for item in range(0, 40, 2):
            ahead.take(item)
        assert len(alive) <= 4


def test_two_takers_that_drift_apart_have_each_item_read_once():
    """Two layers of eight inputs by turns. The first is through when the second is at its third input."""

    class Input:
        pass

    alive, reads, held = weakref.WeakSet(), [], []

    def read(item):
        reads.append(item)
        found = Input()
        alive.add(found)
        return found

    items = [(layer, place) for place in range(8) for layer in range(2)]
    order = [(0, 0), (1, 0), (0, 1), (1, 1), *((0, place) for place in range(2, 8))]
    order += [(1, place) for place in range(2, 8)]
    depth = 12
    with ReadAhead(read, items, depth, threads=3) as ahead:
        for item in order:
            ahead.take(item)
            held.append(len(ahead._reading))
            assert len(alive) <= depth + 1
        assert not ahead._reading
    assert sorted(reads) == sorted(items)
    assert max(held) == depth


def test_no_more_is_held_than_the_depth_however_far_takers_drift():
    """The second begins when the first has left its window."""
    reads = []
    items = [(layer, place) for place in range(20) for layer in range(2)]
    with ReadAhead(lambda item: reads.append(item) or item, items, 6, threads=2) as ahead:
        for item in [(layer, place) for layer in range(2) for place in range(20)]:
            assert ahead.take(item) == item
            assert len(ahead._reading) <= 6
    assert all(reads.count(item) == 1 for item in items if item[0] == 0)


def test_items_are_taken_from_several_threads():
    """Of the first two, each ends only when the other is being read too."""
    both = threading.Barrier(2, timeout=20)
    reads = []

    def read(item):
        reads.append(item)
        if item < 2:
            both.wait()
        return item

    with ReadAhead(read, range(20), 20, threads=2) as ahead, ThreadPoolExecutor(2) as takers:
        halves = [
            takers.submit(lambda start=start: [ahead.take(item) for item in range(start, 20, 2)])
            for start in range(2)
        ]
        assert [half.result() for half in halves] == [list(range(start, 20, 2)) for start in range(2)]
    assert sorted(reads) == list(range(20))
