"""The next token from logits: the likeliest, or drawn by temperature, top-k and top-p.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longllava.errors import InputError, LongLLaVAError
from longllava.settings import is_real, whole_number

MAX_SEED = 2**63 - 1
NOT_FINITE = -1  # in the place of a token


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn. temperature 0: the likeliest token; top_k 0, top_p 1: any token.

    seed: same seed, same answer; None draws anew each time. Raises: InputError for unusable values.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()

    def __post_init__(self) -> None:
        check_number(self, "max_new_tokens", int, 1, 1_000_000)
        check_number(self, "temperature", float, 0, 100)
        check_number(self, "top_p", float, 0, 1)
        check_number(self, "top_k", int, 0, MAX_SEED)
        if self.top_p == 0:
            raise InputError("top_p: got 0, must be above 0; for the likeliest token set temperature=0")
        if self.seed is not None:
            check_number(self, "seed", int, 0, MAX_SEED)
        strings = self.stop is None or isinstance(self.stop, (str, list, tuple))
        if not strings or not all(isinstance(text, str) and text for text in self.stop_strings()):
            raise InputError(f"stop: got {self.stop!r}, expected strings that are not empty")

    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def generator(self) -> torch.Generator:
        generator = torch.Generator("cpu")
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def check_number(settings: Sampling, name: str, kind: type, low: float, high: float) -> None:
    """It is kept as Python's own number."""
    value: Any = getattr(settings, name)
    in_kind = whole_number(value) is not None if kind is int else is_real(value)
    if not in_kind or not low <= value <= high:  # NaN is in no range
        expected = "a whole number" if kind is int else "a number"
        raise InputError(f"{name}: got {value!r}, expected {expected} from {low} to {high}")
    object.__setattr__(settings, name, kind(value))


def next_tokens(logits_BV: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """(B, V) logits -> (B,) int64 token ids on the CPU. Each row draws from its own generator.

    Raises: LongLLaVAError when a row's largest logit is NaN or infinite, which a damaged model or an overflow makes.
    """
    uniform_B = None
    if sampling.temperature:
        uniform_B = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    tokens_B = drawn(logits_BV.float().cpu(), sampling, uniform_B)
    check_finite(tokens_B.tolist())
    return tokens_B


def drawn(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None) -> Tensor:
    """(B,) token ids on the logits' device, without waiting for it; NOT_FINITE where the largest logit is not finite.

    uniform_B: a number from 0 to 1 (fp64) for each row, with which it draws; None at temperature 0.
    """
    largest_B1, likeliest_B1 = logits_BV.max(-1, keepdim=True)  # NaN where any is
    finite_B = largest_B1[:, 0].abs() < torch.inf
    if uniform_B is None:
        return torch.where(finite_B, likeliest_B1[:, 0], NOT_FINITE)
    logits_BV = logits_BV.float()
    # the largest becomes 0 first: divided by a tiny temperature, of which fp32 makes 0, it would be infinite
    probabilities_BV = kept(torch.softmax((logits_BV - largest_B1) / max(sampling.temperature, 1e-30), -1), sampling)
    sums_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)  # a token is drawn where they pass the row's number
    tokens_B = torch.searchsorted(sums_BV, uniform_B[:, None] * sums_BV[:, -1:], right=True)[:, 0]
    return torch.where(finite_B, tokens_B.clamp(max=logits_BV.shape[-1] - 1), NOT_FINITE)


def check_finite(tokens: list[int]) -> list[int]:
    """Raises: LongLLaVAError when a token could not be drawn."""
    if NOT_FINITE in tokens:
        raise LongLLaVAError(
            "the model's logits are NaN or infinite; its weights are damaged or its dtype overflows (try float32)"
        )
    return tokens


def kept(probabilities_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities with those outside top-k and top-p set to 0, not rescaled.

    top_p keeps the smallest set of likeliest tokens whose mass reaches top_p, at least one
    (Holtzman et al. 2020, arXiv:1904.09751, section 3.1).
    """
    if not sampling.top_k and sampling.top_p == 1:
        return probabilities_BV
    sorted_BV, order_BV = probabilities_BV.sort(-1, descending=True)
    if sampling.top_k:
        sorted_BV[:, sampling.top_k :] = 0
    if sampling.top_p < 1:  # else rounding would drop the last ones
        mass_before_BV = (sorted_BV.cumsum(-1) - sorted_BV) / sorted_BV.sum(-1, keepdim=True)
        sorted_BV = sorted_BV.masked_fill(mass_before_BV >= sampling.top_p, 0)
    return torch.zeros_like(probabilities_BV).scatter(-1, order_BV, sorted_BV)
