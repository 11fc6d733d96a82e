"""How an op's backend is judged: its outputs and gradients, and the reference's, against the reference in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., tuple[Tensor, Tensor]]


def outputs_and_gradients(
    run: Run,
    names: Sequence[str],
    args: Sequence[Any],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """y, state, and the gradient of every float argument, for fixed random gradients of y and state.

    dtype: what the arguments are converted to first; None leaves them as they are, strides included.
    """
    leaves = {}
    for name, x in zip(names, args):
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.detach() if dtype is None else x.detach().to(dtype)
            leaves[name] = x.requires_grad_()
    y, state = run(*(leaves.get(name, x) for name, x in zip(names, args)))
    random = torch.Generator().manual_seed(1)
    wanted = [torch.randn(x.shape, generator=random).to(x) for x in (y, state)]
    found = {"y": y.detach(), "state": state.detach()}
    if y.requires_grad or state.requires_grad:
        pairs = [(x, g) for x, g in zip((y, state), wanted) if x.requires_grad]
        grads = torch.autograd.grad(
            [x for x, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
        )
        for (name, leaf), grad in zip(leaves.items(), grads):
            found[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def error(got: Tensor, truth: Tensor) -> float:
    """Relative to the truth's norm; NaN and a wrong shape count as infinite."""
    if got.shape != truth.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-9))


def assert_matches(run: Run, reference: Run, names: Sequence[str], args: Sequence[Any], slack: float) -> None:
    """No output or gradient of `run` may be more than twice as wrong as the reference in the same dtype, plus slack."""
    truth = outputs_and_gradients(reference, names, args, torch.float64)
    floor = outputs_and_gradients(reference, names, args)
    got = outputs_and_gradients(run, names, args)
    assert set(got) >= set(truth)
    for name in truth:
        assert got[name].dtype == floor[name].dtype, name
        bound = 2 * error(floor[name], truth[name]) + slack
        assert error(got[name], truth[name]) <= bound, f"{name}: {error(got[name], truth[name]):.1e} > {bound:.1e}"


def split_equals_whole(
    run: Run,
    names: Sequence[str],
    args: Sequence[Any],
    cuts: Sequence[int],
    slack: float,
) -> None:
    """The call cut at `cuts`, state handed on, gives what the uncut call gives."""
    along_time = ("u", "delta", "B", "C", "z", "x", "seq_idx")
    y, state = run(*args)
    length = y.shape[1]
    now = args[names.index("state")]
    pieces = []
    edges = [0, *sorted(cut % (length + 1) for cut in cuts), length]
    for start, end in zip(edges, edges[1:]):
        part = [
            now if name == "state" else x[:, start:end] if name in along_time and x is not None else x
            for name, x in zip(names, args)
        ]
        piece, now = run(*part)
        pieces.append(piece)
    assert error(torch.cat(pieces, 1), y) <= slack
    assert error(now, state) <= slack


def poison_empty(monkeypatch: Any) -> None:
    """Fresh memory holds NaN: an output that a kernel forgets to write is seen."""
    honest = Tensor.new_empty

    def new_empty(*args: Any, **options: Any) -> Tensor:
        made = honest(*args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
