"""The estimate of a step's memory against what is allocated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from longllava.config import BackboneConfig, BridgeConfig, EncoderConfig, ModelConfig
from longllava.data.packing import Batch
from longllava.encoders.vit import VisionBlock, VisionTransformer
from longllava.model import Model
from longllava.nn import Block, Context
from longllava.quant import quantize_
from longllava.settings import load
from longllava.train.config import TrainConfig
from longllava.train.forward import Forward
from longllava.train.lora import add_adapters_
from longllava.train.memory import encoder_bytes, estimate, layer_bytes
from longllava.train.optimizer import build_optimizer, select_parts
from longllava.train.parts import FROZEN_INT8
from tests.kernels import needs_kernels
from tests.live_bytes import LiveBytes

# LongLLaVA-9B's proportions, a 64th as wide
SMALL = BackboneConfig(vocab_size=512, width=64, n_heads=4, n_kv_heads=1, head_dim=16, mlp_width=224, dt_rank=4)
KINDS = {"mamba": (SMALL, 0), "attention": (SMALL, 4), "experts": (dataclasses.replace(SMALL, n_experts=16), 1)}


def measured(
    config: BackboneConfig, layer: int, dtype: torch.dtype, autocast: bool, learns: bool, n_tokens: int
) -> tuple[int, int]:
    """(kept by autograd, at most beside it) of a layer's forward and backward."""
    torch.manual_seed(0)
    block = Block(config, layer).train()
    block.mixer.initialise_()
    block.to(torch.float32 if autocast else dtype).requires_grad_(learns)
    x_BLD = torch.randn(1, n_tokens, config.width).to(torch.float32 if autocast else dtype).requires_grad_()
    gradient = torch.ones_like(x_BLD)
    context = Context(torch.zeros(1, n_tokens, dtype=torch.int32))
    with LiveBytes() as live:
        with torch.autocast("cpu", dtype, enabled=autocast):
            y_BLD, state = block(x_BLD, context, None)
        saved = live.now
        y_BLD.backward(gradient.clone())
    return saved, live.peak - saved


@needs_kernels  # what plain torch keeps is another matter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "autocast"],
)  # fmt: skip
@pytest.mark.parametrize("learns", [True, False])
def test_a_layer(kind: str, dtype: torch.dtype, autocast: bool, learns: bool) -> None:
    config, layer = KINDS[kind]
    few, many = (measured(config, layer, dtype, autocast, learns, n_tokens) for n_tokens in (512, 1024))
    saved, beside = (b - a for a, b in zip(few, many))  # without what does not grow with tokens
    expected = layer_bytes(config, layer, 512, dtype.itemsize, 4 if autocast else dtype.itemsize, learns)
    assert expected.saved == pytest.approx(saved, rel=0.05)
    assert sum(expected) == pytest.approx(saved + beside, rel=0.05)


ENCODER = EncoderConfig(image_size=48, patch_size=8, width=32, n_layers=1, n_heads=2, mlp_width=64, select_layer=-1)


def packed_row(n_tokens: int, tokens_per_image: int) -> tuple[Batch, torch.Tensor]:
    """Samples of 512 tokens, pictures but for their last 64 tokens, half of which are learned; and features."""
    at, number = torch.arange(n_tokens), 0
    spans = []
    for start in range(0, n_tokens, 512):
        for place in range(start, start + 512 - 64 - tokens_per_image + 1, tokens_per_image):
            spans.append((0, place, tokens_per_image, number))
            number += 1
    labels_BL = torch.where(at % 512 >= 480, 7, -100)[None]
    batch = Batch(
        torch.full((1, n_tokens), 5), labels_BL, (at // 512).int()[None], (at % 512)[None], torch.tensor(spans),
        [str(i) for i in range(number)], torch.zeros(0, 4, dtype=torch.int64), n_tokens, int((labels_BL >= 0).sum()),
        ["sample"] * (n_tokens // 512), ["source"] * (n_tokens // 512),
    )  # fmt: skip
    return batch, torch.randn(number, tokens_per_image, ENCODER.width)


@needs_kernels  # what plain torch keeps is another matter
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_packed_step(checkpointing: bool) -> None:
    backbone = dataclasses.replace(SMALL, n_layers=12)
    config = ModelConfig(encoder=ENCODER, bridge=BridgeConfig(tokens_per_image=36, hidden=64), backbone=backbone)
    stage = load(TrainConfig, {
        "stage": "stage3", "model": "", "recipe": "", "phases": [{"steps": 1, "row_length": 2048}],
        "train_only": ["bridge", "backbone"], "gradient_checkpointing": checkpointing,
    })  # fmt: skip
    with LiveBytes() as live:
        model = Model(config)
        model.initialise_()
        model.backbone.gradient_checkpointing = checkpointing
        optimizer = build_optimizer(select_parts(model, stage.train_only), stage.optimizer)
        batch, features = packed_row(2048, 36)
        forward = Forward(model, stage.aids)
        for _ in range(2):  # the second step has the optimizer's state beside it
            forward(batch, features, None)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert estimate(stage, config, 1, 4).total() == pytest.approx(live.peak, rel=0.1)


@needs_kernels
@pytest.mark.parametrize("frozen_dtype", ["float32", "int8"])
def test_a_frozen_language_model(frozen_dtype: str) -> None:
    wide = dataclasses.replace(SMALL, n_layers=8, width=512, mlp_width=4096, n_heads=8, head_dim=64, dt_rank=16)
    config = ModelConfig(encoder=ENCODER, bridge=BridgeConfig(tokens_per_image=36, hidden=64), backbone=wide)
    stage = load(TrainConfig, {
        "stage": "stage1", "model": "", "recipe": "", "phases": [{"steps": 1, "row_length": 512}],
        "train_only": ["bridge"], "gradient_checkpointing": True, "frozen_dtype": frozen_dtype,
    })  # fmt: skip
    with LiveBytes() as live:
        model = Model(config)
        model.initialise_()
        if frozen_dtype == "int8":
            quantize_(model, FROZEN_INT8)
        model.backbone.gradient_checkpointing = True
        optimizer = build_optimizer(select_parts(model, stage.train_only), stage.optimizer)
        batch, features = packed_row(512, 36)
        forward, live.peak = Forward(model, stage.aids), live.now  # without what making int8 of floats took
        for _ in range(2):
            forward(batch, features, None)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    need = estimate(stage, config, 1, 4)
    assert need.total() == pytest.approx(live.peak, rel=0.1)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.backbone.buffers()))
    assert need.weights == pytest.approx(held, rel=1e-3)
    assert model.encoder is not None
    shared = estimate(dataclasses.replace(stage, engine="zero3"), config, 4, 4)
    int8 = sum(tensor.nbytes for tensor in model.backbone.buffers())  # whole on each process
    learned = sum(tensor.nbytes for part in (model.bridge, model.backbone) for tensor in part.parameters())
    encoder = sum(tensor.nbytes for tensor in model.encoder.parameters())
    assert shared.weights == pytest.approx(learned // 4 + encoder + int8, rel=1e-3)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a GPU's attention keeps: q, k, v and y."""

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v, y := torch.softmax(q @ k.mT, -1) @ v)
            return y

        @staticmethod
        def backward(ctx, gradient):
            return gradient, gradient, gradient

    return Flash.apply(q, k, v)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_an_encoder_that_trains(checkpointing: bool, stem: bool, activation: str, monkeypatch) -> None:
    monkeypatch.setattr(VisionBlock, "attention", staticmethod(flash))
    stems: dict[str, Any] = {"stem_widths": (16, 32), "stem_strides": (4, 2), "stem_blocks": (1, 1)}
    config = EncoderConfig(image_size=64, patch_size=8, width=64, n_layers=6, n_heads=4, mlp_width=256,
                           activation=activation, select_layer=-1, **(stems if stem else {}))  # fmt: skip
    stage = load(TrainConfig, {
        "stage": "stage3", "model": "", "recipe": "", "phases": [{"steps": 1, "row_length": 64}],
        "train_only": ["encoder"], "gradient_checkpointing": checkpointing,
    })  # fmt: skip
    encoder = VisionTransformer(config).train()
    encoder.gradient_checkpointing = checkpointing

    def run(n_pictures: int) -> tuple[int, int]:
        pixels = torch.zeros(n_pictures, 3, 64, 64, dtype=torch.uint8)
        encoder.zero_grad(set_to_none=True)
        with LiveBytes() as live:
            live.count(pixels.untyped_storage())
            features_NTC = encoder(pixels)
            kept = live.now
            features_NTC.backward(torch.ones_like(features_NTC))
        return kept, live.peak - kept

    few, many = run(8), run(16)
    kept, beside = (b - a for a, b in zip(few, many))
    expected = encoder_bytes(config, 8, 4, 4, stage)
    assert expected.saved == pytest.approx(kept, rel=0.1)
    assert sum(expected) == pytest.approx(kept + beside, rel=0.1)


@pytest.mark.parametrize("parts", [["backbone"], ["backbone", "encoder"]])
def test_adapters_alone_learn_in_their_parts(parts: list[str]) -> None:
    pytest.importorskip("peft")
    config = ModelConfig(encoder=ENCODER, bridge=BridgeConfig(tokens_per_image=36, hidden=64), backbone=SMALL)
    stage = load(TrainConfig, {
        "stage": "stage3", "model": "", "recipe": "", "phases": [{"steps": 1, "row_length": 64}],
        "train_only": ["bridge", *parts], "lora": {"rank": 3, "parts": parts},
    })  # fmt: skip
    model = Model(config)
    assert stage.lora is not None
    add_adapters_(model, stage.lora, 0)
    learned = sum(parameter.nbytes for _, parameter in select_parts(model, stage.train_only))
    held = estimate(stage, config, 1, 4)
    assert (held.gradients, held.optimizer) == (learned, 2 * learned)
    assert held.weights == sum(parameter.nbytes for parameter in model.parameters())
