"""Keywords that methods pass on: which there are, and wrong ones told by the method that was called, where Python would
name what they were passed to."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict


class Settings(TypedDict, total=False):
    """How answers are drawn; see Sampling."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str] | None


class Reading(TypedDict, total=False):
    """How a prompt is read; see MediaOptions. chunk_tokens: tokens prefilled at a time, None for the
    device's own number."""

    fps: float
    max_frames: int
    tiles: str | None
    allow_hosts: Sequence[str]
    chunk_tokens: int | None


class Options(Settings, Reading, total=False):
    """All of it."""


def check_keywords(method: Callable[..., Any], given: Iterable[str], passed_on: type) -> None:
    """given: keywords beside the method's own. passed_on: the TypedDict of those that are allowed.

    Raises: TypeError, as Python does for any keyword it does not know, naming the method, the nearest and the allowed.
    """
    for name in given:
        if name in passed_on.__annotations__:
            continue
        parameters = inspect.signature(method).parameters.values()
        own = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        allowed = [*own, *(other for other in passed_on.__annotations__ if other not in own)]
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; it has no such keyword."
        raise TypeError(
            f"{method.__qualname__}() got an unexpected keyword argument {name!r}{hint} Allowed: {', '.join(allowed)}"
        )
