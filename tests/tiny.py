"""A tiny random model and tokenizer: every kind of layer, milliseconds to build."""

from __future__ import annotations

import numpy as np
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

from longllava.api import LongLLaVA
from longllava.config import BackboneConfig, BridgeConfig, EncoderConfig, ModelConfig, PromptConfig
from longllava.inputs.tokenizer import Tokenizer
from longllava.model import Model

SPECIALS = ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<img>", "</img>")
WORDS = ("▁what", "▁is", "▁this", "▁a", "▁red", "▁heart", "▁red▁heart", "▁the", "▁of", "?", "▁", "\n", "s",
         *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!|<>/[]()'-")  # fmt: skip


def tiny_config(n_experts: int = 1, **changes: object) -> ModelConfig:
    """Width 32, five layers, attention at 1 and 4; with experts, layers 1 and 3 have them, and
    attention its two extras. 16 tokens an image, pooled to 4."""
    values: dict = {
        "name": "tiny",
        "encoder": EncoderConfig(
            image_size=16, patch_size=4, width=16, n_layers=2, n_heads=2, mlp_width=32, select_layer=-1
        ),
        "bridge": BridgeConfig(tokens_per_image=4, hidden=32),
        "backbone": BackboneConfig(
            vocab_size=len(vocabulary()), width=32, n_layers=5, attention_every=3, attention_at=1, n_heads=4,
            n_kv_heads=2, head_dim=8, mlp_width=48, n_experts=n_experts,
            qk_norm=n_experts > 1, log_length_scale=n_experts > 1, state_size=4, dt_rank=4,
            init_std=0.2,
        ),
        "prompt": PromptConfig(),
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def vocabulary() -> list[str]:
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(WORDS)]
    return [*pieces, "<unk>"]


def tiny_tokenizer(prompt: PromptConfig | None = None) -> Tokenizer:
    """Unigram with byte fallback over whole words, letters and bytes; no splitting at spaces."""
    pieces = vocabulary()
    first_word = len(SPECIALS) + 256
    scores = [0.0 if i < len(SPECIALS) else -20.0 if i < first_word else -1.0 for i in range(len(pieces))]
    backend = tokenizers.Tokenizer(
        models.Unigram(list(zip(pieces, scores)), unk_id=len(pieces) - 1, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    # not decoders.Metaspace: it drops every "▁" of the first piece, also the inner one of "▁red▁heart"
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(list(SPECIALS))
    return Tokenizer(backend.to_str(), prompt or PromptConfig())


def tiny_model(n_experts: int = 1, seed: int = 0, **changes: object) -> LongLLaVA:
    """Random weights; the answers are noise, but always the same noise."""
    torch.manual_seed(seed)
    model = Model(tiny_config(n_experts, **changes))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    model.initialise_(seed)
    with torch.no_grad():  # answers in words and letters: bytes are never the likeliest
        model.backbone.lm_head.weight[len(SPECIALS) : len(SPECIALS) + 256] = 0
    return LongLLaVA(model, tiny_tokenizer())


def tiny_pictures(n: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(n)]
