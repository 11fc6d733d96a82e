"""Loading takes the model's memory and little more, whatever layout it lies in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longllava.checkpoints import save_model
from longllava.config import BackboneConfig, BridgeConfig, EncoderConfig, ModelConfig
from longllava.model import Model
from tests.tiny import tiny_tokenizer

# peak resident memory of one load above what was resident before it; everything is imported and used once before
MEASURE = """
import json, sys, torch
from longllava.checkpoints import load_model
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
small, large, dtype = sys.argv[1:]
load_model(small, dtype=getattr(torch, dtype))
before = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
model = load_model(large, dtype=getattr(torch, dtype))
peak = status("VmHWM:") - before
sizes = [tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()]
print(json.dumps({"peak": peak, "model": sum(sizes), "largest": max(sizes)}))
"""


def model_of(width: int, vocab_size: int) -> Model:
    encoder = EncoderConfig(image_size=16, patch_size=4, width=width, n_layers=4, n_heads=4, mlp_width=4 * width,
                            weights="openai/clip-vit-large-patch14-336")  # fmt: skip
    backbone = BackboneConfig(vocab_size=vocab_size, width=width, n_layers=6, attention_every=3, attention_at=1,
                              n_heads=4, n_kv_heads=2, head_dim=width // 4, mlp_width=2 * width, n_experts=4,
                              dt_rank=16)  # fmt: skip
    bridge = BridgeConfig(tokens_per_image=16, pool="none", hidden=width)  # stock Llava does not pool
    model = Model(ModelConfig(encoder=encoder, bridge=bridge, backbone=backbone))
    model.initialise_()
    return model


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("scheme", "dtype"), [("llava", "bfloat16"), ("native", "float32")])
def test_peak_memory_is_the_model_and_two_of_its_largest_tensors(tmp_path, scheme, dtype):
    """About 150 MB in bfloat16, in one file: mapped whole, or read into a second copy, it would be twice that."""
    for name, size in (("small", (32, 64)), ("large", (512, 24_000))):
        save_model(model_of(*size), tiny_tokenizer(), tmp_path / name, scheme=scheme, dtype=torch.bfloat16)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] > 100e6 and found["largest"] > 20e6
    # the heap's own slack, and modules of a model of this size: 8 MB
    assert found["peak"] <= found["model"] + 2 * found["largest"] + 8e6, found
