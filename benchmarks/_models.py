"""A model to time: trained where there is one, else random weights in a config's true shape, which says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any


def open_model(
    name: str, device: str | None = None, dtype: str | None = None, tokens: int | None = None, int8: bool = False
) -> Any:
    """LongLLaVA of a shipped model or folder, or of a config of configs/models with random weights.

    Random models read with nano's tokenizer: theirs comes with their weights, and token counts are reported.
    tokens: image tokens per picture, None for the model's own. Raises: LongLLaVAError for a name that is neither.
    """
    from longllava import LongLLaVA
    from longllava.checkpoints.folders import shipped_models

    if name in shipped_models() or Path(name).is_dir():
        return LongLLaVA.from_pretrained(name, device=device, dtype=dtype, tokens_per_image=tokens, int8=int8)
    from longllava.api import checked_device, checked_dtype
    from longllava.checkpoints import find_folder
    from longllava.config import ModelConfig
    from longllava.inputs.tokenizer import Tokenizer
    from longllava.settings import load
    from longllava.shipped import shipped

    config = load(ModelConfig, shipped("configs", f"models/{name}.yaml"))
    target = checked_device(device)
    build = random_int8_model if int8 else random_model
    model = build(config, target, checked_dtype(dtype, target))
    return LongLLaVA(model, Tokenizer.from_folder(find_folder("nano"), config.prompt), tokens_per_image=tokens)


def made_in(dtype: Any, device: Any, make: Callable[[], Any]) -> Any:
    """What `make` makes, there and in `dtype` from the first: cast later, fp32 weights would be its peak memory."""
    import torch

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(usual)


def random_model(config: Any, device: Any, dtype: Any) -> Any:
    """Fresh weights, made on the device in `dtype`; what a recurrence is sensitive to stays fp32."""
    from longllava.checkpoints.load import FP32_NAMES
    from longllava.model import Model

    model = made_in(dtype, device, lambda: Model(config))
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in FP32_NAMES:
            parameter.data = parameter.data.float()
    model.initialise_()
    return model.to(device).eval()  # buffers that are made on the CPU whatever the default


def random_int8_model(config: Any, device: Any, dtype: Any) -> Any:
    """Fresh int8 weights, never floats: a model of 53 billion weights is made where only its int8 form fits."""
    import torch
    from torch import nn

    from longllava.checkpoints.load import FP32_NAMES
    from longllava.config import Int8Config
    from longllava.quant import build_model

    torch.manual_seed(0)
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config, int8=Int8Config().chosen()))
    kept = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.copy_(kept[name])
        elif buffer.dtype == torch.int8:
            buffer.random_(-127, 128)
        else:  # scales: what makes evenly spread whole numbers as wide as the layer's floats would be
            buffer.fill_(config.backbone.init_std / 73.3)
    for name, parameter in model.named_parameters():
        fp32 = name.rsplit(".", 1)[-1] in FP32_NAMES
        parameter.data = parameter.data.to(torch.float32 if fp32 else dtype)
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=config.backbone.init_std)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))
    for block in model.backbone.blocks():
        block.mixer.initialise_()
    return model.eval()


def is_random(name: str) -> bool:
    from longllava.checkpoints.folders import shipped_models

    return name not in shipped_models() and not Path(name).is_dir()


def key_value_bytes(model: Any) -> int:
    """What the attention layers keep of one token."""
    config, weight = model.model.config.backbone, model.model.backbone.embed_tokens.weight
    return 2 * config.mixers().count("attention") * config.n_kv_heads * config.head_dim * weight.element_size()
