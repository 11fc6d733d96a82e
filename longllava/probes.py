"""Installed is not working: each optional package is tried once, by a small real use in a process of its own.

A process of its own because a broken binary may end it, print pages, or leave torch patched.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from longllava.shipped import PACKAGE

SECONDS = 120  # a cold first import of deepspeed or mamba-ssm took up to a minute on a slow disk

VIDEO = """
import av, io, numpy
file = io.BytesIO()
with av.open(file, "w", format="mp4") as out:
    stream = out.add_stream("mpeg4", rate=1)
    stream.width = stream.height = 32
    frame = av.VideoFrame.from_ndarray(numpy.zeros((32, 32, 3), "uint8"), format="rgb24")
    out.mux(stream.encode(frame)); out.mux(stream.encode(None))
file.seek(0)
with av.open(file) as back:
    assert sum(1 for _ in back.decode(video=0)) == 1
"""

SCAN = """
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
x = torch.ones(1, 8, 1, device="cuda")
selective_scan_fn(x, x, -torch.ones(8, 4, device="cuda"), torch.ones(1, 4, 1, device="cuda"),
                  torch.ones(1, 4, 1, device="cuda"))
"""

CONV = """
import torch
from causal_conv1d import causal_conv1d_fn
causal_conv1d_fn(torch.ones(1, 8, 1, device="cuda"), torch.ones(8, 4, device="cuda"))
"""

NMS = "import torch, torchvision; torchvision.ops.nms(torch.tensor([[0., 0., 1., 1.]]), torch.ones(1), 0.5)"


@dataclass(frozen=True)
class Probe:
    """package: as pip names it; module: as Python does; serves: what it is for; use: code that must run;
    mend: the pip line that brings it; wanted: False for what need not be there, but must work if it is."""

    package: str
    module: str
    serves: str
    use: str
    mend: str
    wanted: bool = True


@dataclass(frozen=True)
class Verdict:
    """state: works, missing or broken; why: the last line of what went wrong."""

    probe: Probe
    state: str
    why: str = ""


def extra(name: str) -> str:
    return f"pip install 'longllava[{name}]'"


PROBES = (
    Probe("accelerate", "accelerate", "training", "from accelerate import Accelerator; Accelerator(cpu=True)",
          extra("train")),
    Probe("datasets", "datasets", "training data in parquet and on the hub",
          "import datasets; assert datasets.Dataset.from_dict({'a': [1]})[0] == {'a': 1}", extra("train")),
    Probe("peft", "peft", "LoRA", "import peft; peft.LoraConfig", extra("train")),
    Probe("tensorboard", "tensorboard", "training logs", "from torch.utils.tensorboard import SummaryWriter",
          extra("train")),
    Probe("deepspeed", "deepspeed", "ZeRO training", "import deepspeed", extra("deepspeed")),
    Probe("av", "av", "video", VIDEO, extra("video")),
    Probe("open_clip_torch", "open_clip", "OpenCLIP encoders", "import open_clip; open_clip.list_models()",
          extra("openclip")),
    Probe("triton", "triton", "kernels on a GPU", "import triton, triton.language", extra("cuda")),
    Probe("mamba-ssm", "mamba_ssm", "the scan of its authors", SCAN, extra("cuda") + " --no-build-isolation"),
    Probe("causal-conv1d", "causal_conv1d", "the convolution of its authors", CONV,
          extra("cuda") + " --no-build-isolation"),
    Probe("torchvision", "torchvision", "not needed; a mismatched one breaks others", NMS,
          "pip install --force-reinstall torchvision, from the same index as torch", wanted=False),
)  # fmt: skip


def try_probe(probe: Probe) -> Verdict:
    if importlib.util.find_spec(probe.module) is None:
        return Verdict(probe, "missing")
    try:
        command = [sys.executable, "-c", probe.use]
        # Python finds modules in the folder it is started in first, and files there may have the names of packages
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS,
                              cwd=PACKAGE.parent)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Verdict(probe, "broken", f"no answer within {SECONDS} s")
    if done.returncode == 0:
        return Verdict(probe, "works")
    last = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
    return Verdict(probe, "broken", last[0].strip())


def try_all(probes: Iterable[Probe] = PROBES) -> list[Verdict]:
    """One verdict a probe, in their order, up to four at a time; none for what is neither there nor wanted."""
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(try_probe, probes))
    return [verdict for verdict in verdicts if verdict.probe.wanted or verdict.state != "missing"]
