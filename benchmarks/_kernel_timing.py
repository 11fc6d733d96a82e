"""How calls are timed, and how they are known to be right before that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _kernel_ops import BACKWARD, STEP, Call

from longllava.ops.dispatch import Backend

ROUNDS = 7  # interleaved: a slow moment of the machine hits every backend
ROUND_SECONDS = 0.05  # short calls are repeated within a round
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the output's norm; bf16 rounds to 4e-3
JUDGED_CHANNELS = 64  # of a long scan or convolution on a GPU: its channels do not know each other
LAYERS = 28  # Mamba layers of LongLLaVA-9B: a graph of one token's calls, each with a state of its own


def grad_of(y: torch.Tensor) -> torch.Tensor:
    """The same gradient of y for every backend."""
    random = torch.Generator(y.device).manual_seed(1)
    return torch.randn(y.shape, generator=random, device=y.device).to(y.dtype)


def wanting_gradients(args: Sequence[Any]) -> list[Any]:
    """The same numbers as leaves. Of these, not of plain tensors, a backend says that it has no backward."""
    return [x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def prepare(backend: Backend, args: Sequence[Any], direction: str) -> tuple[Call, list[torch.Tensor | None]]:
    """A call to time, and what shows whether it is right: outputs, or the gradient of each argument, None for some."""
    if direction != BACKWARD:

        def forward() -> Any:
            with torch.no_grad():
                return backend.run(*args)

        return (graph_of_steps(backend, args) if direction == STEP else forward), list(forward())
    args = wanting_gradients(args)
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    y = backend.run(*args)[0]
    grad_y = grad_of(y)

    def differentiate() -> Any:
        return torch.autograd.grad(y, leaves, grad_y, retain_graph=True, allow_unused=True)

    return differentiate, list(differentiate())


def graph_of_steps(backend: Backend, args: Sequence[Any]) -> Call:
    """One token's calls of all layers as a CUDA graph: each has its own state, replaced in place."""
    from longllava.ops.causal_conv1d import causal_conv1d_
    from longllava.ops.selective_scan import selective_scan_

    is_scan = len(args) == 11
    place = 9 if is_scan else 3
    states = [args[place].clone() for _ in range(LAYERS)]

    def steps() -> None:
        for state in states:
            own = (*args[:place], state, *args[place + 1 :])
            (selective_scan_ if is_scan else causal_conv1d_)(*own, backend=backend.name)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        steps()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return graph.replay


def judge_of_some_channels(judge: Callable[..., Any], args: tuple[Any, ...], direction: str) -> Any:
    """A long scan or convolution in fp64 for a few of its channels, which do not know each other.

    Returns what `prepare` shows of them, and how to cut the same from what it shows of all. Gradients of B and C, which
    are sums over channels, are left out (None); benchmarks/kernel_checks.py checks them.
    """
    channels = args[0].shape[2]
    chosen = torch.randperm(channels, generator=torch.Generator().manual_seed(2))[:JUDGED_CHANNELS]
    chosen = chosen.to(args[0].device)

    def cut(x: Any) -> Any:
        axis = next((i for i in reversed(range(x.ndim)) if x.shape[i] == channels), None)
        return None if axis is None else x.index_select(axis, chosen)

    def exact(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        x = x if (part := cut(x)) is None else part
        return x.double().requires_grad_(direction == BACKWARD) if x.is_floating_point() else x

    own = [exact(x) for x in args]
    with torch.set_grad_enabled(direction == BACKWARD):
        out = judge(*own)
    if direction != BACKWARD:
        return list(out), cut
    leaves = [x for x in own if isinstance(x, torch.Tensor) and x.requires_grad]
    grads = torch.autograd.grad(out[0], leaves, cut(grad_of(args[0])).double(), allow_unused=True)
    has_channels = [cut(x) is not None for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return [grad if has else None for grad, has in zip(grads, has_channels, strict=True)], cut


def worst_error(got: Sequence[torch.Tensor | None], truth: Sequence[torch.Tensor | None]) -> float:
    """Of the norm, over what both have; NaN counts as infinite."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, truth, strict=True) if a is not None and b is not None]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]
    return max(error if error == error else float("inf") for error in errors)


def seconds(call: Call, device: str) -> float:
    """Of one call, short ones repeated for ROUND_SECONDS after one to warm up. On a GPU between two events."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        if (first := time.perf_counter() - start) > ROUND_SECONDS:
            return first
        start = time.perf_counter()
        n = 0
        while True:
            call()
            n += 1
            if (now := time.perf_counter() - start) > ROUND_SECONDS:
                return now / n
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    n = max(1, min(200, int(ROUND_SECONDS * 1e3 / max(begin.elapsed_time(end), 1e-3))))
    begin.record()
    for _ in range(n):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / n


def interleaved(calls: dict[str, Call], device: str, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return times


def ceilings() -> dict[str, float]:
    """What this GPU does at best, measured now: bytes copied, bf16 operations and exponentials a second. Of these a
    multiprocessor begins 16 a clock (CUDA C++ programming guide, throughput of native instructions)."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    # the clock by itself: products draw so much power that it falls by a sixth beside them
    clocks = interleaved({"clocks": lambda: torch.cuda._sleep(10_000_000)}, "cuda", rounds=5)["clocks"]
    times = interleaved({"copy": lambda: target.copy_(source), "bf16": lambda: a @ b}, "cuda", rounds=5)
    clock = 10_000_000 / statistics.median(clocks)
    return {
        "copy": 2 * 2**30 / statistics.median(times["copy"]),
        "bf16": 2 * 8192**3 / statistics.median(times["bf16"]),
        "exponentials": 16 * torch.cuda.get_device_properties(0).multi_processor_count * clock,
        "clock": clock,
    }
