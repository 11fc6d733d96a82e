"""RMSNorm beside the ops that it calls (tests/ops/test_fused.py)."""

import torch

from longllava.nn.norm import RMSNorm


def test_under_autocast_norms_give_what_their_readers_take() -> None:
    """Products bf16, in one tensor for all of them; the scan and attention's logits fp32."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    for feeds_products, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        norm = RMSNorm(8, 1e-6, feeds_products)
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x)
        assert y.dtype == dtype and torch.equal(y, norm(x).to(dtype))
        y.sum().backward()
        assert norm.weight.grad.dtype == x.grad.dtype == torch.float32
