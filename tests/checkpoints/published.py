"""Small random models of transformers, saved by transformers, in the layouts that are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

JAMBA = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts_per_tok": 2,
    "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "initializer_range": 0.3}  # fmt: skip


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def saved(model, folder: Path):
    """The model in eval mode, every parameter drawn anew (norms and biases begin as ones and zeros), and saved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith(".D"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def jamba(folder: Path, n_experts: int = 4, **changes):
    from transformers import JambaConfig, JambaForCausalLM

    quiet()
    torch.manual_seed(1)
    config = JambaConfig(**{**JAMBA, "num_experts": n_experts, **changes}, attn_implementation="eager")
    return saved(JambaForCausalLM(config), folder)


def clip_tower(folder: Path, **changes):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    quiet()
    torch.manual_seed(2)
    return saved(CLIPVisionModel(CLIPVisionConfig(**{**CLIP, **changes})), folder)


def siglip_tower(folder: Path, **changes):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    quiet()
    torch.manual_seed(2)
    return saved(SiglipVisionModel(SiglipVisionConfig(**{**CLIP, "layer_norm_eps": 1e-6, **changes})), folder)


def llava(folder: Path, n_experts: int = 4, tower: str = "clip"):
    from transformers import (
        CLIPVisionConfig,
        JambaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    quiet()
    torch.manual_seed(4)
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower](**CLIP)
    config = LlavaConfig(
        vision_config=vision, text_config=JambaConfig(**JAMBA, num_experts=n_experts), image_token_index=59,
        vision_feature_select_strategy="default" if tower == "clip" else "full", attn_implementation="eager",
    )  # fmt: skip
    return saved(LlavaForConditionalGeneration(config), folder)


def longllava(folder: Path, n_experts: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The original's layout, put together by hand from the facts about it: names of its module code, its config.

    Returns what was written. The tower lies beside, as CLIP folders do, and in the checkpoint too.
    """
    stock = llava(folder / "stock", n_experts)
    tensors = {}
    for name, tensor in load_file(folder / "stock/model.safetensors").items():
        name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "model.")
        name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        name = name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("b_layernorm", "B_layernorm").replace("c_layernorm", "C_layernorm")
        name = name.replace("pre_ff_layernorm", "pre_moe_layernorm").replace("feed_forward.router", "moe.router")
        name = name.replace("feed_forward.experts", "moe.experts").replace("feed_forward.", "moe.experts.0.")
        tensors[name] = tensor.to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stock.model.vision_tower.save_pretrained(folder / "tower")
    config = {
        "architectures": ["LlavaJambaForCausalLM"], "model_type": "llava_jamba", **JAMBA, "num_experts": n_experts,
        "hidden_act": "silu", "mamba_inner_layernorms": True, "mamba_conv_bias": True, "mamba_proj_bias": False,
        "mamba_d_conv": 4, "mamba_expand": 2, "rms_norm_eps": 1e-6, "sliding_window": None, "n_ctx": 262144,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower", "resamplePooling": "2d", "mm_use_im_start_end": False, "tune_mm_mlp_adapter": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return tensors
