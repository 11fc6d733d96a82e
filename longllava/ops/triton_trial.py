"""The smallest kernel: what it takes to run one (a driver, a C compiler for Triton's launcher) is tried with it."""

import torch
import triton
import triton.language as tl


@triton.jit
def fill(x):
    tl.store(x, 1.0)


def run(device: torch.device) -> None:
    x = torch.zeros(1, device=device)
    fill[(1,)](x, num_warps=1, enable_fp_fusion=True)
    if x.item() != 1:
        raise RuntimeError("a kernel ran and wrote nothing")
