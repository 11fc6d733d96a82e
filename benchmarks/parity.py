"""Our models against transformers' on the same random weights, in the published layouts: one line a comparison.

    python benchmarks/parity.py
    python benchmarks/parity.py --save benchmarks/results/parity-cpu.json

Every model is small and random, saved by transformers and loaded from that folder by this library, in fp32 on the
CPU. A line gives the largest difference (of logits, features or routed outputs) and whether 12 greedily decoded
tokens are the same. Exit code 1 when a difference is above 1e-4 or a token differs.
"""

from __future__ import annotations

import _environment  # noqa: F401

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _options import check_target
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longllava import cli
from longllava.checkpoints import load_model, load_weights_
from longllava.checkpoints.towers import tower_config
from longllava.config import BackboneConfig, BridgeConfig, ModelConfig
from longllava.files import write_json
from longllava.model import Model
from longllava.nn import Context
from longllava.train.record import environment
from tests.checkpoints import published

BOUND = 1e-4
N_NEW = 12
IMAGE = 59  # the id of an image slot in published.llava


@dataclass(frozen=True)
class Line:
    """tokens_equal: None where nothing is decoded."""

    what: str
    against: str
    error: float
    tokens_equal: bool | None = None

    def holds(self) -> bool:
        return self.error <= BOUND and self.tokens_equal is not False


def greedy(model: Model, x_BLD: Tensor, seq_idx_BL: Tensor) -> Tensor:
    """N_NEW tokens a row, from embedded and left-padded prompts, one at a time through the state."""
    batch, length = seq_idx_BL.shape
    state = model.backbone.empty_state(batch, length + N_NEW, "cpu", torch.float32)
    hidden_BLD, state = model(x_BLD, Context(seq_idx_BL), state)
    ids_BN = model.logits(hidden_BLD[:, -1]).argmax(-1, keepdim=True)
    one = torch.zeros(batch, 1, dtype=torch.int32)
    for step in range(N_NEW - 1):
        hidden_BLD, state = model(model.embed(ids_BN[:, -1:]), Context(one, start=length + step), state)
        ids_BN = torch.cat([ids_BN, model.logits(hidden_BLD[:, -1]).argmax(-1, keepdim=True)], dim=1)
    return ids_BN


def compare(ours: Model, theirs: Any, ids: Tensor, mask: Tensor, x_BLD: Tensor, **inputs: Tensor) -> tuple[float, bool]:
    """Largest difference of all logits at real tokens, and whether greedy decoding agrees."""
    seq_idx = (mask - 1).int()
    expected = theirs(ids, attention_mask=mask, use_cache=False, **inputs).logits
    hidden_BLD, _ = ours(x_BLD, Context(seq_idx))
    error = (ours.logits(hidden_BLD) - expected)[mask == 1].abs().max().item()
    theirs.generation_config.eos_token_id = None
    tokens = theirs.generate(ids, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0, **inputs)
    return error, torch.equal(greedy(ours, x_BLD, seq_idx), tokens[:, ids.shape[1] :])


def jamba(folder: Path, n_experts: int) -> Line:
    """Two prompts of 17 and 11 tokens, the shorter padded on its left."""
    theirs, ours = published.jamba(folder, n_experts), load_model(folder)
    ids, mask = torch.randint(3, 60, (2, 17)), torch.ones(2, 17, dtype=torch.long)
    mask[1, :6] = 0
    error, equal = compare(ours, theirs, ids, mask, ours.embed(ids))
    kind = "dense" if n_experts == 1 else f"{n_experts} experts"
    return Line(f"backbone, {kind}, padded, cached", "JambaForCausalLM", error, equal)


def routing(folder: Path) -> Line:
    """The mixture alone, where its weights matter most: a sharp router, outputs of many sizes."""
    theirs, ours = published.jamba(folder, 4), load_model(folder)
    x_BLD = 4 * torch.randn(3, 50, 32)
    expected = theirs.model.layers[1].feed_forward(x_BLD)
    expected = expected[0] if isinstance(expected, tuple) else expected
    return Line("routing: softmax over all, top 2", "JambaSparseMoeBlock",
                (ours.backbone.layers[1].ffn(x_BLD) - expected).abs().max().item())  # fmt: skip


def tower(folder: Path, family: str) -> Line:
    theirs = {"clip": published.clip_tower, "siglip": published.siglip_tower}[family](folder)
    encoder = tower_config(str(folder), select_layer=-2)
    backbone = BackboneConfig(vocab_size=8, width=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, dt_rank=2)
    ours = Model(ModelConfig(encoder=encoder, bridge=BridgeConfig(tokens_per_image=4), backbone=backbone))
    load_weights_(ours, folder / "model.safetensors", parts=("encoder.",))
    pixels = torch.randn(5, 3, encoder.image_size, encoder.image_size)
    features = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    features = features[:, 1:] if encoder.class_token else features
    error = (ours.encode(pixels) - features).abs().max().item()
    return Line("vision tower, select_layer -2", type(theirs).__name__, error)


def llava(folder: Path, n_experts: int, family: str) -> Line:
    """Two prompts: two pictures among words; one picture, padded on the left."""
    theirs, ours = published.llava(folder, n_experts, family), load_model(folder)
    ids = torch.randint(3, 58, (2, 44))
    ids[0, 2:18] = ids[0, 20:36] = ids[1, 21:37] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    pixels = torch.randn(3, 3, 16, 16)
    spans = torch.tensor([[0, 2, 16, 0], [0, 20, 16, 1], [1, 21, 16, 2]])
    x_BLD = ours.embed(ids, spans, ours.image_tokens(ours.encode(pixels)))
    error, equal = compare(ours, theirs, ids, mask, x_BLD, pixel_values=pixels)
    kind = "dense" if n_experts == 1 else f"{n_experts} experts"
    what = f"whole model, {family}, {kind}, 3 images, padded, cached"
    return Line(what, "LlavaForConditionalGeneration", error, equal)


CASES: tuple[Callable[[Path], Line], ...] = (
    lambda folder: jamba(folder, 1),
    lambda folder: jamba(folder, 4),
    routing,
    lambda folder: tower(folder, "clip"),
    lambda folder: tower(folder, "siglip"),
    lambda folder: llava(folder, 1, "clip"),
    lambda folder: llava(folder, 4, "clip"),
    lambda folder: llava(folder, 4, "siglip"),
)


def run(case: Callable[[Path], Line]) -> Line:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        return case(Path(folder))


def table(lines: list[Line]) -> str:
    words = {None: "", True: "equal", False: "DIFFER"}
    rows = [("what", "against", "largest error", "tokens", "")]
    rows += [(line.what, line.against, f"{line.error:.1e}", words[line.tokens_equal], "" if line.holds() else "FAILS")
             for line in lines]  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", type=Path, help="write the table into this JSON file")
    options = parser.parse_args(arguments)
    check_target(options.save)
    lines = [run(case) for case in CASES]
    print(table(lines))
    if options.save:
        rows = [{**asdict(line), "error": float(f"{line.error:.2g}"), "holds": line.holds()} for line in lines]
        write_json(options.save, {"bound": BOUND, "lines": rows, "environment": environment("cpu")})
    sys.exit(not all(line.holds() for line in lines))


if __name__ == "__main__":
    cli.run(main, "parity")
