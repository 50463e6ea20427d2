"""Damaged input of every kind is read, or refused with an error that names the file: never another exception,
a hang, or memory out of proportion. `make fuzz` tries 1,000 mutations of each kind."""

import faulthandler
import gc
import os
import resource
import sys
import zlib

import numpy as np
import pytest
from targets import TARGETS

from svsk_jax.cli import USER_ERROR, explain

MUTATIONS = int(os.environ.get("SVSK_FUZZ", "40"))
HANG_SECONDS = 120
"""The process ends with a traceback when one mutation takes longer."""
SPARE_BYTES = 2 << 30
"""Address space that a mutation may take beyond what the process has: the inputs are below 1 MB."""
COLLECT_EVERY = 10
"""Mutations."""


def rng_of(kind: str, index: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(kind.encode()), index])


def address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


@pytest.fixture
def little_memory():
    """Allocations beyond SPARE_BYTES fail."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + SPARE_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def garbage_between_mutations():
    """Cyclic garbage is collected between mutations and at no other time.

    What orbax leaves behind of a failed restore reports an error as it goes, and pytest parses source to show
    it. Where that happens while source is being parsed, CPython 3.11 ends in `SystemError: AST constructor
    recursion depth mismatch`.
    """
    gc.collect()
    # What is there already need not be looked through again each time.
    gc.freeze()
    gc.disable()
    yield
    gc.collect()
    gc.enable()
    gc.unfreeze()


def verdict(read, folder) -> str | None:
    """What is wrong with how `read` takes the folder; None where nothing is."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
    try:
        read(folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of Rust libraries are no Exception
        status, message = explain(error)
        if status != USER_ERROR:
            return f"{type(error).__name__}: {message}"
        if str(folder) not in message:
            return f"names no file: {type(error).__name__}: {message}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("kind", TARGETS)
def test_damaged_input_is_read_or_refused_by_name(kind, tmp_path, little_memory, garbage_between_mutations):
    target = TARGETS[kind]
    if kind == "torch":
        pytest.importorskip("torch")
    target.build(tmp_path)
    assert verdict(target.read, tmp_path) is None
    wrong = []
    for index in range(MUTATIONS):
        rng = rng_of(kind, index)
        matches = sorted(
            path for path in tmp_path.glob(target.files[index % len(target.files)]) if path.is_file()
        )
        file = matches[int(rng.integers(len(matches)))]
        whole = file.read_bytes()
        file.write_bytes(target.damage(rng, whole))
        found = verdict(target.read, tmp_path)
        if found is not None:
            wrong.append(f"{kind} {index} ({file.name}): {found}")
        file.write_bytes(whole)
        if index % COLLECT_EVERY == 0:
            gc.collect()
    assert not wrong, f"{len(wrong)} of {MUTATIONS}:\n" + "\n".join(wrong[:20])
