"""Quantisation of rows as Triton kernels do it, by the rule of quantized.py. R rows, K numbers of a block.

Kernels that use this are launched without fusion of multiply and add: it would round once where the rule rounds twice.
"""

import triton
import triton.language as tl


@triton.jit
def magnitude_bits(x_RK):
    """|x| as bits: integers of the same order, with NaN above infinity, so that a maximum loses neither."""
    return x_RK.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales(bits_R):
    """(scale, factor, seen) of rows from the largest magnitude's bits; values are factor times x where seen, else 0."""
    absmax_R = bits_R.to(tl.float32, bitcast=True)
    finite_R = bits_R < 0x7F800000
    seen_R = finite_R & (bits_R >= 0x0D800000)  # 2^-100
    divisor_R = tl.where(seen_R, absmax_R, 127.0)
    scale_R = tl.where(finite_R, tl.div_rn(divisor_R, 127.0), float("nan"))
    return scale_R, tl.div_rn(127.0, divisor_R), seen_R


@triton.jit
def to_int8(x_RK, factor_R, seen_R, CLAMPED: tl.constexpr = True):
    """To the nearest, ties to even, within -127 .. 127: 1.5 * 2^23 more leaves the integer in the lowest bits.
    CLAMPED may be False where factor_R is of the largest magnitude of these very numbers: none is above 127.00002."""
    scaled_RK = x_RK.to(tl.float32) * factor_R[:, None]
    if CLAMPED:
        scaled_RK = tl.minimum(tl.maximum(scaled_RK, -127.0), 127.0)
    bits_RK = (scaled_RK + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(seen_R[:, None], bits_RK, 0).to(tl.int8)
