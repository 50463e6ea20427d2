"""JSON that others wrote: read without trust, and made into dataclasses field by field."""

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
MAX_FLOAT = sys.float_info.max
SHOWN = 60
"""Characters of a wrong value that a message repeats."""
MAX_DEPTH = 200
"""Lists and objects within one another that JSON may have; what is read here has fewer than ten."""
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{\]}]', re.DOTALL)
"""A string need not end: what follows it is then of no matter, as the text is not JSON."""
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, whose every failure is a ValueError: also bytes that are not UTF-8, and lists nested more
    than `MAX_DEPTH` deep."""
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    _check_depth(text)
    return json.loads(text)


def _check_depth(text: str) -> None:
    """ValueError before the parser would go too deep: how deep that is depends on who calls it."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        depth += _STEPS.get(found[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"its lists are nested more than {MAX_DEPTH} deep")


def read_json_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: names the file and ends in `advice`; it cannot be read, is not JSON, or no object.
    """
    try:
        data = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {advice}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found {shown(data)}; {advice}")
    return data


def shown(value: Any) -> str:
    """A wrong value as a message shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def from_json(kind: type[T], data: Any, name: str) -> T:
    """A dataclass from a JSON object, each field checked against its annotation before it is constructed.

    Annotations may be bool, int, float (an int serves; finite), str, Literal, tuples, unions, dataclasses and
    None. Lists become tuples. Fields with a default may be absent.

    Args:
        kind: the dataclass.
        data: from `json.loads`.
        name: of the data, which heads error messages.

    Raises:
        ValueError: a field that is missing, unknown or of another type, by its path; or what `kind` raises.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{name}: expected an object, found {shown(data)}")
    hints = typing.get_type_hints(kind)
    fields: dict[str, dataclasses.Field] = {
        field.name: field for field in dataclasses.fields(typing.cast(Any, kind))
    }
    unknown = [str(key) for key in data if key not in fields]
    missing = [
        key
        for key, field in fields.items()
        if key not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    for title, keys in (("unknown", unknown), ("missing", missing)):
        if keys:
            raise ValueError(f"{name}: {title} {shown(', '.join(keys))}; a newer svsk-jax may know more")
    return kind(**{key: checked(value, hints[key], f"{name}.{key}") for key, value in data.items()})


def checked(value: Any, annotation: Any, name: str) -> Any:
    """The value as the annotation has it; ValueError, headed by `name`, where it is something else."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return value if isinstance(value, annotation) else from_json(annotation, value, name)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        [other] = [each for each in arguments if each is not types.NoneType]
        return checked(value, other, name)
    if origin is Literal:
        if not any(type(value) is type(each) and value == each for each in arguments):
            raise ValueError(f"{name}: expected {', '.join(map(repr, arguments))}, found {shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}: expected a list, found {shown(value)}")
        if arguments[-1] is Ellipsis and _are_all(arguments[0], value):
            return tuple(value)
        each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(each) != len(value):
            raise ValueError(f"{name}: expected {len(each)} values, found {shown(value)}")
        return tuple(
            checked(item, kind, f"{name}[{index}]")
            for index, (item, kind) in enumerate(zip(value, each, strict=True))
        )
    return _scalar(value, annotation, name)


def _are_all(kind: Any, values: Any) -> bool:
    """Whether all are of this scalar type, told in one pass: vocabularies are long."""
    return set(map(type, values)) == {kind} and (kind is not float or all(map(math.isfinite, values)))


def _scalar(value: Any, kind: Any, name: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    # Beyond f64's range an integer has no float.
    if (
        kind is float
        and (isinstance(value, float) or (whole and abs(value) < MAX_FLOAT))
        and math.isfinite(value)
    ):
        return float(value)
    if (kind is int and whole) or (kind in (bool, str) and isinstance(value, kind)):
        return value
    wanted = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}[kind]
    raise ValueError(f"{name}: expected {wanted}, found {shown(value)}")
