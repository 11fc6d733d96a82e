"""A linear layer of floats for a handful of rows: decoding, where reading the weights takes all the time."""

from __future__ import annotations

from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.dispatch import Backend, choose
from longllava.ops.few_rows import reference, triton

# best first; the last is the judge
BACKENDS = tuple(
    Backend(name, module.run, module.why_not) for name, module in (("triton", triton), ("reference", reference))
)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = x weight^T + bias.

    Shapes:  x (..., K); weight (N, K); bias (N).
    dtypes:  fp32, bf16 or fp16, all the same. Sums are fp32, in an order that the shapes alone decide.
    Returns: (..., N) in x's dtype.
    Gradients go to all tensors (by the reference, torch's own product, which also serves many rows).
    """
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise LongLLaVAError(
            f"few_rows_linear: x must be (..., K) and weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LongLLaVAError(f"few_rows_linear: bias must be ({len(weight)},), got {tuple(bias.shape)}")
    args = (x, weight, bias)
    return choose("few_rows_linear", BACKENDS, *args, forced=backend).run(*args)
