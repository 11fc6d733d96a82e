"""Which backend gets a call whose tensors hold more than a kernel sees: tangents, and what torch.func wraps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.attention import attention
from longllava.ops.causal_conv1d import causal_conv1d
from longllava.ops.conv3x3 import conv3x3
from longllava.ops.fused import rms_norm, swiglu
from longllava.ops.int8_linear import int8_linear, quantize_weight, rotate_rows
from longllava.ops.pixel_conv import pixel_conv
from longllava.ops.selective_scan import selective_scan

# torch's own, when it first differentiates forward
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

RANDOM = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=RANDOM)


U, KEYS, STEM, WEIGHT = randn(2, 5, 32), randn(2, 5, 2, 8), randn(1, 32, 8, 8), randn(32, 32, 3, 3)
TABLES = (U.abs(), -randn(32, 4).abs(), randn(2, 5, 4), randn(2, 5, 4), randn(32))
MEAN = torch.ones(3)
PIXELS = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
INT8 = quantize_weight(randn(8, 32))

# a function of one tensor, and that tensor; all of them have a kernel on the CPU
OPS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "selective_scan": (lambda u: selective_scan(u, *TABLES, u)[0], U),
    "causal_conv1d": (lambda weight: causal_conv1d(U, weight, activation="silu")[0], randn(32, 4)),
    "attention": (lambda k: attention(torch.cat([KEYS, KEYS], 2), k, k), KEYS),
    "rms_norm": (lambda x: rms_norm(x, U[0, 0], 1e-5, U)[0], U),
    "swiglu": (swiglu, U),
    "rotate_rows": (rotate_rows, U),
    "conv3x3": (lambda x: conv3x3(x, WEIGHT, WEIGHT[0, :, 0, 0]), STEM),
    "pixel_conv": (lambda w: pixel_conv(PIXELS, MEAN, 90 + MEAN, w, w[:, 0, 0, 0]), WEIGHT[:, :3]),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_gives_what_backward_gives(name, gradients) -> None:
    """A kernel on its own had left the tangent out: a derivative of None, which counts as 0."""
    run, x = OPS[name]
    leaf, tangent = x.clone().requires_grad_(), randn(*x.shape)
    y = run(leaf)
    weights = randn(*y.shape)
    (grad,) = torch.autograd.grad(y, leaf, weights)
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        found = forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent
    assert found is not None
    torch.testing.assert_close((found * weights).sum(), (grad * tangent).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", OPS)
def test_torch_func_transforms_every_op(name) -> None:
    run, x = OPS[name]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf).square().mean(), leaf)
    found = torch.func.grad(lambda x: run(x).square().mean())(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    several = torch.func.vmap(run)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(several, torch.stack([run(x), run(2 * x)]), rtol=1e-3, atol=1e-3)


def test_a_forced_kernel_says_that_it_sees_no_tangents() -> None:
    with forward_ad.dual_level(), pytest.raises(BackendError, match="cpu: torch.func and forward-mode differentiation"):
        rms_norm(forward_ad.make_dual(U, U), U[0, 0], 1e-5, backend="cpu")


def test_int8_products_refuse_derivatives_they_do_not_have() -> None:
    """Of its rows' scales alone plain torch would find one, which is not what backward gives."""
    with pytest.raises(LongLLaVAError, match="find no derivative"):
        torch.func.jvp(lambda x: int8_linear(x, *INT8), (U,), (U,))
    with pytest.raises(LongLLaVAError, match="find no derivative"):
        torch.func.grad(lambda x: int8_linear(x, *INT8).sum())(U)
    with forward_ad.dual_level():  # nothing to differentiate
        assert torch.equal(int8_linear(U, *INT8), int8_linear(U, *INT8, backend="reference"))


@pytest.mark.parametrize(("scan", "attends"), [("blocked", "sdpa"), ("reference", "reference")])
def test_autocast_leaves_plain_torchs_products_in_fp32(scan, attends) -> None:
    """As it leaves the kernels': sums over the scan's states, scores and sums of int8 products are fp32."""
    rows = torch.cat([U.flatten(0, 1)] * 7)  # 70, too many for the kernel of mode weight_only

    def made() -> list[Tensor]:
        y, state = selective_scan(U, *TABLES, backend=scan)
        attended = attention(KEYS, KEYS, KEYS, return_lse=True, backend=attends)
        return [y, state, *attended, int8_linear(rows, *INT8, mode="weight_only")]

    expected = made()
    with torch.autocast("cpu", torch.bfloat16):
        found = made()
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, expected, strict=True))
