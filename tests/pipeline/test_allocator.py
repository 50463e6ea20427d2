"""Large arrays are given back to the system when they are freed."""

import ctypes
import subprocess
import sys
from pathlib import Path

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


def counts_of_large_arrays() -> tuple[int, int, int]:
    """Blocks outside the heaps before, with and after five large arrays."""
    # Freeing one makes glibc cut smaller ones out of heaps, unless it was told otherwise.
    freed = np.ones(24 * LARGE, np.uint8)
    del freed
    assert give_back_freed_arrays()
    before = blocks_of_their_own()
    kept = [np.empty(20 * LARGE, np.uint8) for _ in range(5)]
    most = blocks_of_their_own()
    del kept
    return before, most, blocks_of_their_own()


def test_large_arrays_lie_outside_heaps(monkeypatch):
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("not glibc")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(TUNABLES, raising=False)
    # In a process of its own: what others freed before leaves gaps in heaps that a large array may fit.
    code = f"import {__name__} as tests; print(*tests.counts_of_large_arrays())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    before, most, after = map(int, done.stdout.split())
    assert most >= before + 5
    assert after <= most - 5


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
