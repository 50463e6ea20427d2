"""What is read while something else is worked on."""

import threading
import weakref

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
