"""Strict settings: YAML or JSON to frozen dataclasses.

An unknown key, a wrong type or a value out of range is a ConfigError that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import numbers
import operator
import re
import reprlib
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from longllava.errors import ConfigError, InputError
from longllava.files import write_json

T = TypeVar("T")
MERGE = "tag:yaml.org,2002:merge"  # what yaml takes << for
# beside their own errors, what json and yaml raise of a value: no such day, too many digits, !!bool x
UNREADABLE = (ValueError, LookupError, AttributeError, RecursionError)


def load(cls: type[T], source: str | Path | dict, overrides: typing.Sequence[str] = ()) -> T:
    """Read `cls` from a YAML or JSON file (or a dict), with `a.b=value` overrides. Raises: ConfigError."""
    label = "settings" if isinstance(source, dict) else str(source)
    data = dict(source) if isinstance(source, dict) else read_mapping(source)
    for override in overrides:
        set_override(data, override)
    return build(cls, data, label)


def read_mapping(path: str | Path) -> dict:
    """A YAML or JSON file whose top level is a mapping. Raises: ConfigError naming file and line."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            data = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
        else:
            data = yaml.load(text, Loader=unique_loader())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return data


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ConfigError(f"the same key stands twice among {', '.join(repr(key) for key, _ in pairs[:12])}")
    return data


def refuse_constant(name: str) -> float:
    raise ConfigError(f"{name} is not a number a setting can have")


def unique_loader() -> type:
    """yaml.SafeLoader that refuses a key given twice and reads 1e-4 as a number (YAML 1.2), not a string."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            """Here a key merged by << does not stand beside the one that is written in its stead."""
            node, seen = super().compose_mapping_node(anchor), set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                name = key.value if key.tag == MERGE else self.construct_object(key)
                if name in seen:
                    raise ConfigError(f"key {name!r} stands twice (line {node.start_mark.line + 1})")
                seen.add(name)
            return node

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    return Loader


def set_override(data: dict, override: str) -> None:
    import yaml

    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r}: write key=value, for example backbone.width=256")
    *parents, last = key.strip().split(".")
    for parent in parents:
        if not isinstance(data.get(parent) or {}, dict):
            raise ConfigError(f"override {override!r}: {parent} is no mapping; give it whole, {parent}=...")
        data[parent] = dict(data.get(parent) or {})
        data = data[parent]
    try:
        data[last] = yaml.load(value, Loader=unique_loader())
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise ConfigError(f"override {override!r}: cannot be read: {' '.join(str(error).split())}") from None


def build(cls: type[T], data: Any, where: str) -> T:
    """`data` as an instance of the dataclass `cls`; every error names `where` and the key."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys of {cls.__name__}, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {shown(key)}{hint}")
        values[key] = convert(hints[key], value, f"{where}: {key}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).replace(f'{cls.__name__}.__init__()', cls.__name__)}") from None


def convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options[:-1]:
            try:
                return convert(option, value, where)
            except ConfigError:
                continue
        return convert(options[-1], value, where)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)  # type: ignore[arg-type]
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {shown(value)}")
        return origin(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, got {shown(value)}")
        return {str(k): convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = float("inf")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {shown(value)}")
    if isinstance(value, int) and value.bit_length() > 128:  # 0x with 5,000 digits cannot even be written as a decimal
        raise ConfigError(f"{where}: a number of {value.bit_length():,} bits is none a setting can have")
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise ConfigError(f"{where}: {value} is not a number a setting can have")
    return value


def shown(value: Any) -> str:
    """For an error, a line of it: a value may be megabytes, and with YAML's anchors far more than its file."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlist, short.maxdict = 2, 80, 80, 4, 4
    try:
        return short.repr(value)
    except ValueError:  # too many digits
        return f"a {type(value).__name__}"


def typed_(config: Any) -> None:
    """Give a dataclass's fields the types that it says, as in a file: lists become tuples. Raises: ConfigError."""
    for name, hint in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, convert(hint, getattr(config, name), name))


def save(config: Any, path: str | Path) -> None:
    """Write a config as JSON, whole or not at all."""
    write_json(path, dataclasses.asdict(config))


def positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name}: got {getattr(config, name)}, must be above 0")


def not_negative(config: Any, *names: str) -> None:
    for name in names:
        if (getattr(config, name) or 0) < 0:
            raise ConfigError(f"{name}: got {getattr(config, name)}, must be 0 or above")


def at_most(config: Any, part: str = "", **limits: int) -> None:
    """Before anything of such a size is made or counted through. part: that the names are of."""
    for name, limit in limits.items():
        if getattr(config, name) > limit:
            where = f"{part}.{name}" if part else name
            raise ConfigError(f"{where}: got {getattr(config, name)}, at most {limit} is allowed")


def divides(config: Any, small: str, large: str) -> None:
    if getattr(config, large) % getattr(config, small):
        raise ConfigError(
            f"{small}: {getattr(config, small)} does not divide {large} {getattr(config, large)}; make it a divisor"
        )


def one_of(config: Any, name: str, allowed: tuple) -> None:
    if getattr(config, name) not in allowed:
        got = shown(getattr(config, name))
        raise ConfigError(f"{name}: got {got}, allowed: {', '.join(map(str, allowed))}")


def check_count(name: str, value: Any) -> int:
    """An argument as Python's own number. Raises: InputError."""
    count = whole_number(value)
    if count is None or count < 1:
        raise InputError(f"{name}: got {value!r}, expected a whole number above 0")
    return count


def whole_number(value: Any) -> int | None:
    """A whole number as Python's own, also NumPy's, which has an end that sums run over; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
