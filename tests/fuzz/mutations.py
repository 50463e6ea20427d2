"""Seeded damage to files: to bytes, to JSON values, and to containers that hold JSON."""

import copy
import json
import struct
from typing import Any

import numpy as np

INTEGERS = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    3,
    2.5,
    -1e30,
    float("nan"),
    float("inf"),
    10**30,
    *(number for number in INTEGERS if number > 2**16),
    "",
    "x",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a\x00b",
    "\ud800",
    "\x1b[2J",
    "n" * 5000,
    [],
    {},
    [[]],
    [0, -1, 2**60],
    {"x": {"y": []}},
)
DEEP = b"[" * 200_000


def damaged_bytes(rng: np.random.Generator, data: bytes, within: int | None = None) -> bytes:
    """One to four changes, at offsets below `within`: bits, bytes, integers, spans; or a cut."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        size = min(len(out), within or len(out))
        if size == 0:
            break
        at, span = int(rng.integers(size)), int(rng.integers(1, 17))
        kind = rng.integers(8)
        if kind <= 1:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            out[at : at + span] = rng.bytes(span)
        elif kind == 3:
            width = int(rng.choice([4, 8]))
            number = INTEGERS[int(rng.integers(len(INTEGERS)))] & (1 << 8 * width) - 1
            out[at : at + width] = number.to_bytes(width, "little")
        elif kind == 4:
            del out[at : at + span]
        elif kind == 5:
            out[at:at] = out[at : at + span]
        elif kind == 6:
            out[at:at] = rng.bytes(span)
        else:
            del out[at:]
    return bytes(out)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(value, key), *_places(inner)]
    return found


def damaged_json(rng: np.random.Generator, value: Any) -> Any:
    """One to three changes: a value replaced, removed, wrapped, renamed, repeated or made larger."""
    root = [copy.deepcopy(value)]
    for _ in range(int(rng.integers(1, 4))):
        # As likely near the top as deep within: long lists would take nearly every change otherwise.
        places = _places(root)
        near = [place for place in places if len(_places(place[0][place[1]])) > 3 or len(places) < 50]
        places = near if near and rng.random() < 0.3 else places
        container, key = places[int(rng.integers(len(places)))]
        kind = rng.integers(10)
        old = container[key]
        if kind <= 4 or container is root:
            container[key] = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
        elif kind == 5:
            del container[key]
        elif kind == 6:
            container[key] = [old]
        elif kind == 7 and isinstance(container, dict):
            container[str(VALUES[int(rng.integers(len(VALUES)))])] = container.pop(key)
        elif kind == 7:
            container.append(copy.deepcopy(old))
        elif kind == 8 and isinstance(old, int | float):
            container[key] = old * int(rng.choice([-1, 2, 1000, 2**32]))
        else:
            container[key] = str(old) if not isinstance(old, str) else 1
    return root[0]


def damaged_json_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """JSON text, changed in its values (mostly), in its bytes, or nested too deep to parse."""
    draw = rng.random()
    if draw < 0.03:
        return DEEP
    if draw < 0.2:
        return damaged_bytes(rng, data)
    return json.dumps(damaged_json(rng, json.loads(data))).encode()


def damaged_safetensors(rng: np.random.Generator, data: bytes) -> bytes:
    """The header changed in its values, with its length put right, or the bytes of length and header."""
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.3:
        return damaged_bytes(rng, data, within=8 + length)
    header = damaged_json_bytes(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
