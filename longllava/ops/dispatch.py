"""Which backend runs a call: the first of an op's list that does not object, or the one that was asked for. Calls that
a backend is `first_for` it gets before those that the list has before it.

A backend answers `why_not(*args)` from metadata only (device, dtype, shape, what is installed): None when it
can run the call, else one sentence. A forced backend runs or raises; it never falls back.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from longllava.errors import BackendError

PLAIN_TORCH_ONLY = "torch.func and forward-mode differentiation go through plain torch alone"


@dataclass(frozen=True)
class Backend:
    """One way to compute an op. All its functions take the same positional arguments.

    run_: as `run` without gradients, but the new state is written over the old one, and y alone is returned. Backends
    that have none compute a new state, which is then copied.
    run_quantized: as `run` without gradients, y as int8 rows. For backends that have none y is quantised afterwards.
    first_for: whether it is the quickest for a call, told from metadata, wherever it stands in the list.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    run_: Callable[..., Any] | None = None
    run_quantized: Callable[..., Any] | None = None
    first_for: Callable[..., bool] | None = None

    def __str__(self) -> str:
        return self.name


def choose(op: str, backends: Sequence[Backend], *args: Any, forced: str | None = None) -> Backend:
    """First backend able to run `args`, those that are first for them before the others. `forced`, or the variable
    LONGLLAVA_<OP>, names the only candidate. Where tensors may be `transformed`, the last alone can run: the judge, in
    plain torch.

    Raises BackendError when the name is unknown or no candidate can run the call, with every reason.
    """
    forced = forced or os.environ.get(f"LONGLLAVA_{op.upper()}") or None
    reasons = {}
    sooner: list[Backend] = []
    later: list[Backend] = []
    for backend in backends:
        (sooner if backend.first_for is not None and backend.first_for(*args) else later).append(backend)
    plain_torch_only = transformed()
    for backend in sooner + later:
        if forced is None or backend.name == forced:
            hidden = plain_torch_only and backend is not backends[-1]
            reason = PLAIN_TORCH_ONLY if hidden else backend.why_not(*args)
            if reason is None:
                return backend
            reasons[backend.name] = reason
    if not reasons:
        names = ", ".join(backend.name for backend in backends)
        raise BackendError(f"{op}: no backend {forced!r}; allowed are {names}")
    listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    raise BackendError(f"{op}: no backend can run this call:\n{listed}")


def transformed() -> bool:
    """Whether tensors may hold what kernels, which are given addresses, do not see: tangents, or torch.func's wraps."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` of a plain torch form, whose first argument is a tensor: autocast, which changes no kernel, would make its
    fp32 products in 16 bits."""

    @functools.wraps(run)
    def run_in_own_dtypes(x: torch.Tensor, *args: Any) -> Any:
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return run(x, *args)
        with torch.autocast(kind, enabled=False):
            return run(x, *args)

    return run_in_own_dtypes


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile calls `function` instead of tracing it, and takes its answer for constant.

    What torch.compiler.assume_constant_result does, which imports all of torch._dynamo: at every start of a program
    two seconds and 190 MB.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def report(backends: Sequence[Backend], *args: Any) -> dict[str, str | None]:
    """Every backend's answer to one call: None where it can run, else why not. For `longllava doctor`."""
    return {backend.name: backend.why_not(*args) for backend in backends}
