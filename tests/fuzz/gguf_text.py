"""A GGUF file from any metadata, however wrong their types are; gguf's own writer would refuse most."""

import struct
from typing import Any

import numpy as np

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = 4, 6, 7, 8, 9, 10, 11, 12


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        if 0 <= value < 2**32:
            return UINT32, struct.pack("<I", value)
        return INT64, (value & (1 << 64) - 1).to_bytes(8, "little")
    if isinstance(value, float):
        return FLOAT64, struct.pack("<d", value)
    if isinstance(value, list):
        items = [_typed(item) for item in value]
        kinds = {kind for kind, _ in items}
        if len(kinds) > 1:
            items = [(STRING, _text(str(item))) for item in value]
        kind = items[0][0] if items else UINT32
        return ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)
    return STRING, _text(value if isinstance(value, str) else repr(value))


def encode_gguf(metadata: dict[str, Any], entries: list[dict[str, Any]], body: bytes) -> bytes:
    """Version 3. `entries`: name, shape (rows first), type and offset of each tensor."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata))
    for key, value in metadata.items():
        kind, data = _typed(value)
        out += _text(key) + struct.pack("<I", kind) + data
    for entry in entries:
        shape = [int(n) & (1 << 64) - 1 for n in entry["shape"]][::-1]
        out += _text(str(entry["name"])) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", int(entry["type"]) & 0xFFFFFFFF, int(entry["offset"]) & (1 << 64) - 1)
    return out + bytes(-len(out) % 32) + body


def laid_out(tensors: dict[str, np.ndarray]) -> tuple[list[dict[str, Any]], bytes]:
    """Entries and body of f32 tensors."""
    entries, body = [], b""
    for name, value in tensors.items():
        entries.append({"name": name, "shape": list(value.shape), "type": 0, "offset": len(body)})
        body += value.astype("<f4").tobytes()
        body += bytes(-len(body) % 32)
    return entries, body
