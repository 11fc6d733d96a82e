"""The encoder's passes in Triton: each element is read once and written once."""

import triton
import triton.language as tl


@triton.jit
def add_layer_norm(
    x, delta, weight, bias, y, total, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """One program a row of WIDTH elements, PADDED to a power of two."""
    c_C = tl.arange(0, PADDED)
    inside_C = c_C < WIDTH
    at_C = tl.program_id(0).to(tl.int64) * WIDTH + c_C
    sum_C = tl.load(x + at_C, mask=inside_C, other=0).to(tl.float32)
    sum_C += tl.load(delta + at_C, mask=inside_C, other=0).to(tl.float32)
    rounded_C = sum_C.to(total.dtype.element_ty)
    tl.store(total + at_C, rounded_C, mask=inside_C)
    sum_C = rounded_C.to(tl.float32)
    centred_C = tl.where(inside_C, sum_C - tl.sum(sum_C, 0) / WIDTH, 0.0)
    scale = tl.rsqrt(tl.sum(centred_C * centred_C, 0) / WIDTH + eps)
    weight_C = tl.load(weight + c_C, mask=inside_C, other=0).to(tl.float32)
    bias_C = tl.load(bias + c_C, mask=inside_C, other=0).to(tl.float32)
    y_C = centred_C * scale * weight_C + bias_C
    tl.store(y + at_C, y_C.to(y.dtype.element_ty), mask=inside_C)


@triton.jit
def quick_gelu(x, n, BLOCK: tl.constexpr):
    """x sigmoid(1.702 x), in place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    value = value / (1.0 + tl.exp2(-2.4554669595930156 * value))  # 1.702 / log(2)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)
