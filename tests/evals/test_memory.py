"""What a process gives back of its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from longllava.evals.memory import _malloc_trim

# blocks of 64 KB, below what glibc maps one by one; every hundredth stays
HOLES = """
import resource

import torch
from longllava.evals.memory import give_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

blocks = [torch.ones(2**14) for _ in range(6400)]
blocks = blocks[::100]
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(_malloc_trim() is None, reason="not glibc")
def test_holes_between_blocks_in_use_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 300  # MB, of 400
