"""Large arrays are given back to the system when they are freed."""

import ctypes

import numpy as np
import pytest

from svsk_jax.pipeline.allocator import LARGE, TUNABLES, VARIABLE, give_back_freed_arrays


class MallocInfo(ctypes.Structure):
    """struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")] + [
        ("others", ctypes.c_size_t * 5)
    ]


def blocks_of_their_own() -> int:
    """How many blocks of memory lie outside malloc's heaps."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    return mallinfo().hblks


@pytest.fixture
def glibc():
    """Skips where the C library is another."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("not glibc")


def test_large_arrays_lie_outside_heaps(glibc, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(TUNABLES, raising=False)
    # Freeing one makes glibc cut smaller ones out of heaps, unless it was told otherwise.
    freed = np.ones(24 * LARGE, np.uint8)
    del freed
    assert give_back_freed_arrays()
    before = blocks_of_their_own()
    kept = [np.empty(20 * LARGE, np.uint8) for _ in range(5)]
    # Other threads of the process may have some too.
    most = blocks_of_their_own()
    assert most >= before + 5
    del kept
    assert blocks_of_their_own() <= most - 5


@pytest.mark.parametrize(
    ("variable", "value"), [(VARIABLE, "4194304"), (TUNABLES, "glibc.malloc.mmap_threshold=4194304")]
)
def test_what_the_user_set_is_left_alone(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert not give_back_freed_arrays()


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not give_back_freed_arrays()
