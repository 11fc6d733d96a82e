"""Stands for the open_clip package where it is not installed: the calls that this library makes, and golden answers.

NAMES, SETTINGS and PRETRAINED are open_clip_torch 3.3.0's, read from it by

    model = open_clip.create_model("ViT-S-32-alt").visual
    {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)

and compared with it where it is installed (test_towers.py). The transformer is written with torch's own modules from
its paper (Radford et al. 2021, arXiv:2103.00020, section 2.4).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ARCHITECTURE = "ViT-S-32-alt"  # the smallest plain vision transformer of the package
N_LAYERS = 12
NAMES: dict[str, tuple[int, ...]] = {
    "class_embedding": (384,), "positional_embedding": (50, 384), "proj": (384, 256), "conv1.weight": (384, 3, 32, 32),
    "ln_pre.weight": (384,), "ln_pre.bias": (384,), "ln_post.weight": (384,), "ln_post.bias": (384,),
}  # fmt: skip
BLOCK: dict[str, tuple[int, ...]] = {
    "ln_1.weight": (384,), "ln_1.bias": (384,), "attn.in_proj_weight": (1152, 384), "attn.in_proj_bias": (1152,),
    "attn.out_proj.weight": (384, 384), "attn.out_proj.bias": (384,), "ln_2.weight": (384,), "ln_2.bias": (384,),
    "mlp.c_fc.weight": (1536, 384), "mlp.c_fc.bias": (1536,), "mlp.c_proj.weight": (384, 1536),
    "mlp.c_proj.bias": (384,),
}  # fmt: skip
NAMES |= {f"transformer.resblocks.{i}.{name}": shape for i in range(N_LAYERS) for name, shape in BLOCK.items()}
SETTINGS: dict[str, dict] = {
    ARCHITECTURE: {"image_size": 224, "layers": N_LAYERS, "width": 384, "patch_size": 32},
    "ViT-L-14": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "ViT-L-14-336": {"image_size": 336, "layers": 24, "width": 1024, "patch_size": 14},
    "RN50": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None},
    "ViT-SO400M-14-SigLIP-384": {
        "image_size": 384, "timm_model_name": "vit_so400m_patch14_siglip_384", "timm_model_pretrained": False,
        "timm_pool": "map", "timm_proj": "none",
    },
}  # fmt: skip
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PRETRAINED: dict[tuple[str, str], dict] = {
    ("ViT-L-14-336", "openai"): {"mean": OPENAI[0], "std": OPENAI[1], "quick_gelu": True},
    ("ViT-L-14", "laion2b_s32b_b82k"): {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}


def get_model_config(name: str) -> dict | None:
    return {"vision_cfg": dict(SETTINGS[name])} if name in SETTINGS else None


def get_pretrained_cfg(name: str, tag: str) -> dict:
    return PRETRAINED.get((name, tag), {})


def list_pretrained_tags_by_model(name: str) -> list[str]:
    return [tag for model, tag in PRETRAINED if model == name]


def create_model(name: str, pretrained: str | None = None) -> nn.Module:
    model = Clip(SETTINGS[name])
    if pretrained is not None:
        if not Path(pretrained).is_file():
            raise RuntimeError(f"Pretrained value '{pretrained}' is not a known tag or valid file path")
        model.load_state_dict(load_file(pretrained))
    return model


class Clip(nn.Module):
    def __init__(self, settings: dict):
        super().__init__()
        self.visual = Tower(settings)

    def encode_image(self, pixels_NCSS: Tensor) -> Tensor:
        return self.visual(pixels_NCSS)


class Tower(nn.Module):
    def __init__(self, settings: dict):
        super().__init__()
        width, patch = settings["width"], settings["patch_size"]
        n_tokens = (settings["image_size"] // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(n_tokens, width))
        self.proj = nn.Parameter(torch.randn(width, 256))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width) for _ in range(settings["layers"]))

    def forward(self, pixels_NCSS: Tensor) -> Tensor:
        patches_NPW = self.conv1(pixels_NCSS).flatten(2).transpose(1, 2)
        first_N1W = self.class_embedding.expand(len(pixels_NCSS), 1, -1)
        x_NTW = self.ln_pre(torch.cat([first_N1W, patches_NPW], 1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            x_NTW = block(x_NTW)
        return self.ln_post(x_NTW[:, 0]) @ self.proj


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        parts = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential()
        for name, part in parts.items():
            self.mlp.add_module(name, part)

    def forward(self, x_NTW: Tensor) -> Tensor:
        normed_NTW = self.ln_1(x_NTW)
        x_NTW = x_NTW + self.attn(normed_NTW, normed_NTW, normed_NTW, need_weights=False)[0]
        return x_NTW + self.mlp(self.ln_2(x_NTW))


CALLS = (get_model_config, get_pretrained_cfg, list_pretrained_tags_by_model, create_model)
STAND_IN = SimpleNamespace(**{call.__name__: call for call in CALLS})
