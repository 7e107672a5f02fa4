"""Parses a YAML file into a dataclass; every field must be known, unique and of its declared type.

    protocol = built(Protocol, read_yaml("mine.yaml", "protocol"), "mine.yaml")

A field's type is its annotation: int, float, bool, str, Path, Literal, tuple[X, ...] or [X, X], another dataclass,
and any of these or None. A whole number is accepted for a float; otherwise types must match.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from stepdistill.errors import InputError

T = TypeVar("T")
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text, a path"}
POWER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")  # a number that YAML 1.1 would read as text


def read_yaml(file: Path, what: str) -> Any:
    """Returns the content of a YAML file.

    Raises:
        InputError: it cannot be read; see parse_yaml.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{what}: got {file} ({error.strerror}); allowed: a YAML file; check the path") from error
    return parse_yaml(content, what, str(file))


def parse_yaml(content: bytes, what: str, got: str) -> Any:
    """Returns the value of a YAML text.

    Args:
        what, got: the flag and its value, for error messages.

    Raises:
        InputError: it is not YAML in UTF-8, or repeats a name, of which YAML would keep the last.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]} stands there twice")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", POWER, list("-+0123456789"))
    try:
        return yaml.load(content.decode("utf-8"), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # invalid dates and numbers are ValueErrors
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or next(iter(str(error).splitlines()), "") or type(error).__name__
        line = f" in line {mark.line + 1}" if mark else ""
        raise InputError(
            f"{what}: got {got}, which is no YAML ({problem}{line}); allowed: names and values in UTF-8, each name "
            "once; fix it"
        ) from error


def built(kind: type[T], parsed: Any, where: str, base: T | None = None) -> T:
    """Builds a dataclass from the content of a YAML file.

    Args:
        parsed: what read_yaml returned. where: location, for error messages.
        base: values of the fields that are not set; by default the defaults.

    Raises:
        InputError: a field is unknown, missing or of another type, or the dataclass rejects its value.
    """
    known = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(parsed, dict):
        names = ", ".join(known)
        raise InputError(f"{where}: got {_shown(parsed)}; allowed: fields with values, of {names}; write them")
    if unknown := [name for name in parsed if name not in known]:
        near = difflib.get_close_matches(str(unknown[0]), known, 1)
        fix = f"did you mean {near[0]}?" if near else "leave it out"
        raise InputError(f"{where}: got the field {_shown(unknown[0])}; allowed: {', '.join(known)}; {fix}")
    empty = dataclasses.MISSING
    needed = [name for name, field in known.items() if field.default is empty and field.default_factory is empty]
    if missing := [name for name in needed if name not in parsed and base is None]:
        raise InputError(f"{where}: got no {missing[0]!r}; allowed: {', '.join(needed)} and others; add it")
    kinds = typing.get_type_hints(kind)
    values = {name: _value(kinds[name], value, where, name) for name, value in parsed.items()}
    try:
        return kind(**values) if base is None else dataclasses.replace(base, **values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _value(kind: Any, value: Any, where: str, name: str) -> Any:
    """Returns the value if its type matches; converts a mapping to its dataclass, a list to a tuple, int to float."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in options:
        return None
    (kind,) = (option for option in options if option is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return _choice(typing.get_args(kind), value, where, name)
    if dataclasses.is_dataclass(kind):
        return built(kind, value, f"{where}, {name}")
    if typing.get_origin(kind) is tuple:
        part, *more = typing.get_args(kind)
        count = None if more == [...] else 1 + len(more)
        if not isinstance(value, list) or count not in (None, len(value)):
            of = f" of {count}" if count else ""
            raise InputError(f"{where}: got {name}: {_shown(value)}; allowed: a list{of}; write it as [a, b]")
        return tuple(_value(part, each, where, f"{name}[{i}]") for i, each in enumerate(value))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        none = " or none" if types.NoneType in options else ""
        fix = f"did you mean {value!r} in quotes?" if kind is str and type(value) in (int, float, bool) else "fix it"
        raise InputError(f"{where}: got {name}: {_shown(value)}; allowed: {WORDS[kind]}{none}; {fix}")
    return value


def _choice(options: tuple, value: Any, where: str, name: str) -> Any:
    if value is False and "no" in options:  # YAML reads a bare no as false
        value = "no"
    if value not in options or type(value) is bool:
        allowed = ", ".join(map(str, options))
        raise InputError(f"{where}: got {name}: {_shown(value)}; allowed: {allowed}; take one of them")
    return value


def _shown(value: Any) -> str:
    """Formats a value as one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
