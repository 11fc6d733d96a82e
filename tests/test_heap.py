"""What a process keeps of the memory that it freed, and what it gives back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from longllava.heap import TUNABLES, VARIABLES, _of_glibc

pytestmark = pytest.mark.skipif(_of_glibc("malloc_trim") is None, reason="not glibc")

# blocks of 64 KB, below what glibc maps one by one; every hundredth stays
HOLES = """
import resource

import torch
from longllava.heap import give_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

blocks = [torch.ones(2**14) for _ in range(6400)]
blocks = blocks[::100]
before = resident()
give_back()
print(before - resident())
"""

# five blocks of 9 MB, as a layer's activations are: all freed before the next layer's
LAYERS = """
import ctypes, resource

import longllava

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def layers(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(9 << 20))) for _ in range(5)]
        for block in blocks:
            libc.memset(block, 1, ctypes.c_size_t(9 << 20))
        for block in reversed(blocks):
            libc.free(block)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20 / n

layers(3)
print(layers(10))
"""


def run(code: str, **settings: str) -> float:
    own = {key: value for key, value in os.environ.items() if key not in (*VARIABLES, "GLIBC_TUNABLES")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**own, **settings})
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_holes_between_blocks_in_use_are_given_back() -> None:
    assert run(HOLES) > 300  # MB, of 400


def test_freed_blocks_are_used_again() -> None:
    assert run(LAYERS) < 5  # MB a layer that come from the system anew, of 45


@pytest.mark.parametrize("settings", [{VARIABLES[1]: "65536"}, {"GLIBC_TUNABLES": f"glibc.malloc.{TUNABLES[1]}=65536"}])
def test_somebodys_own_thresholds_stay(settings: dict[str, str]) -> None:
    assert run(LAYERS, **settings) > 30
