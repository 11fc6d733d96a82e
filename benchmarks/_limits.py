"""What a GPU can do at all, measured, and the least time that a prompt can take with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def settle(device: Any) -> None:
    """Wait for all that a GPU was given."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: Any, times: int) -> float:
    """The best of three rounds of `times` calls, per call."""
    call()
    best = float("inf")
    for _ in range(3):
        settle(device)
        started = time.perf_counter()
        for _ in range(times):
            call()
        settle(device)
        best = min(best, (time.perf_counter() - started) / times)
    return best


def ceilings(device: Any, size: int = 8192, n_bytes: int = 2**30) -> dict[str, float]:
    """bf16 and int8 products of size^3 in operations a second, and a copy in bytes a second, reads and writes."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    found = {"bf16_operations": 2 * size**3 / seconds_of(lambda: a @ b.T, device, 10)}
    a8, b8 = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in "ab")
    found["int8_operations_torch"] = 2 * size**3 / seconds_of(lambda: torch._int_mm(a8, b8.T), device, 10)
    source = torch.empty(n_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found["copied_bytes"] = 2 * n_bytes / seconds_of(lambda: target.copy_(source), device, 10)
    return found


def prompt_limit(config: Any, n_tokens: int, n_images: int, found: dict[str, float], int8: bool) -> dict[str, float]:
    """Seconds that the arithmetic of a prompt takes at the measured rates, part by part; int8 products at twice bf16's.

    Products of the weights that a token meets, causal attention, the encoder's layers (longllava.plan), and the scan's
    exponentials at one special function in eight clocks a scheduler (NVIDIA's H100: 16 a clock of 132 processors at
    1.755 GHz).
    """
    from longllava.plan import operations

    backbone, rate = config.backbone, found["bf16_operations"]
    needed = operations(config, n_tokens, n_images)
    exponentials = backbone.mixers().count("mamba") * backbone.d_inner() * n_tokens * (backbone.state_size + 4)
    parts = {
        "products": needed.products / (2 * rate if int8 else rate),
        "attention": needed.attention / rate,
        "vision": (needed.encoder + needed.bridge) / rate,
        "scan": exponentials / (16 * 132 * 1.755e9),
    }
    return {**parts, "total": sum(parts.values())}


def decode_limit(config: Any, model: Any, n_tokens: int, found: dict[str, float]) -> float:
    """Tokens a second at batch 1 if each weight and each key and value is read once, as fast as a copy moves bytes."""
    backbone = config.backbone
    weights = sum(x.nbytes for name, x in model.backbone.state_dict().items() if not name.startswith("embed_tokens"))
    if backbone.n_experts > 1:  # of the experts, those that a token meets
        experts = sum(x.nbytes for name, x in model.backbone.state_dict().items() if ".experts." in name)
        weights -= experts * (1 - backbone.n_experts_per_token / backbone.n_experts)
    kept = 4 * backbone.mixers().count("attention") * backbone.n_kv_heads * backbone.head_dim * n_tokens
    return found["copied_bytes"] / (weights + kept)
