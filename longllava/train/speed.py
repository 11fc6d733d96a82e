"""Operations that a batch needs, and how many a second a device could do: their ratio is the MFU.

Chowdhery et al. 2022 (arXiv:2204.02311, appendix B): what is computed again for gradient checkpointing does not count.
"""

from __future__ import annotations

import time

import torch

from longllava.config import ModelConfig
from longllava.data.packing import Batch
from longllava.plan.operations import encoder_operations, layer_weights, scan_operations
from longllava.train.config import PhaseConfig, TrainConfig
from longllava.train.memory import adapters_of

# dense bf16 products, of the makers' data sheets
DATA_SHEETS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}


class Cost:
    """Floating point operations of a batch, forward and backward."""

    def __init__(self, config: TrainConfig, model: ModelConfig):
        backbone, lora = model.backbone, config.lora
        whole = set(config.train_only) - set(lora.parts if lora else ())
        n_attention = backbone.mixers().count("attention")
        # backward: once for the inputs, once for the weights, where they learn
        self.times = 3 if "backbone" in whole else 2
        self.token = self.times * 2 * sum(layer_weights(backbone, layer) for layer in range(backbone.n_layers))
        self.token += 3 * (backbone.n_layers - n_attention) * scan_operations(backbone)
        if lora is not None and "backbone" in lora.parts:
            chosen = backbone.n_experts_per_token / backbone.n_experts  # of a mixture
            self.token += 3 * 2 * adapters_of(model, lora, chosen, "backbone")
        self.pair = 3 * 4 * n_attention * backbone.n_heads * backbone.head_dim
        self.label = self.times * 2 * backbone.vocab_size * backbone.width
        self.picture = self.picture_token = self.n_tokens = 0
        if model.encoder is not None and model.bridge is not None:
            per_token = model.bridge.hidden * (model.encoder.width + backbone.width)
            self.picture_token = (3 if "bridge" in config.train_only else 2) * 2 * per_token
            self.n_tokens = model.bridge.tokens_per_image
            if not config.feature_cache or "encoder" in config.train_only:
                times = 3 if "encoder" in whole else 2 if "encoder" in config.train_only else 1
                self.picture = times * encoder_operations(model.encoder)

    def of(self, batch: Batch, phase: PhaseConfig) -> int:
        pictures = len(batch.refs) * (self.picture + (phase.tokens_per_image or self.n_tokens) * self.picture_token)
        if phase.alignment_only:  # the language model does not run
            return pictures
        real_BL = batch.seq_idx_BL >= 0
        n_pairs = int((batch.positions_BL[real_BL] + 1).sum())
        return (batch.n_tokens * self.token + n_pairs * self.pair + batch.n_labels * self.label
                + pictures)  # fmt: skip


def peak_operations(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(operations a second, where the number is from): a data sheet's, or what large products reach here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in DATA_SHEETS.items():
            if all(word in name for word in known.split()):
                return peak, f"data sheet of {known}"
    side = 4096 if device.type == "cuda" else 768
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds), f"products of {side} x {side} here, {str(dtype).removeprefix('torch.')}"
