"""transformers' Jamba and CLIP with random weights in our models' shapes, for timings in the same process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _limits import settle

PEER_ANSWER = 32  # tokens


def jamba_config(backbone: Any, kernels: bool) -> Any:
    from transformers import JambaConfig

    from longllava.checkpoints.published import BACKBONE

    fields = {theirs: getattr(backbone, ours) for theirs, ours in BACKBONE.items()}
    fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attn_implementation": "sdpa"}
    return JambaConfig(**fields, use_mamba_kernels=kernels)


def has_kernels() -> bool:
    """Whether mamba-ssm and causal-conv1d can be imported; without them Jamba's torch path runs."""
    try:
        import causal_conv1d  # noqa: F401
        import mamba_ssm  # noqa: F401
    except ImportError:
        return False
    return True


def jamba_times(backbone: Any, lengths: list[int], device: Any, late: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """For each length a row: seconds to the first token, whole prompt at once, and tokens a second after it."""
    from transformers import JambaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it says at every layer which kernels are missing
    kernels = device.type == "cuda" and has_kernels()
    if device.type == "cuda" and not kernels:
        yield {"not_measured": "mamba-ssm and causal-conv1d cannot be imported"}
        return
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = JambaForCausalLM(jamba_config(backbone, kernels)).eval()
    finally:
        torch.set_default_dtype(usual)
    for length in (64, *lengths):
        if late():
            return
        ids_1L = torch.randint(3, backbone.vocab_size, (1, length), device=device)
        try:
            with torch.inference_mode():
                settle(device)
                started = time.perf_counter()
                out = model(ids_1L, use_cache=True, logits_to_keep=1)
                token_11 = out.logits[:, -1:].argmax(-1)
                token_11.item()
                first = time.perf_counter() - started
                for number in range(PEER_ANSWER):
                    place_11 = torch.tensor([[length + number]], device=device)
                    out = model(token_11, past_key_values=out.past_key_values, use_cache=True, position_ids=place_11)
                    token_11 = out.logits[:, -1:].argmax(-1)
                    token_11.item()
                rate = PEER_ANSWER / (time.perf_counter() - started - first)
        except torch.OutOfMemoryError:
            yield {"prompt_tokens": length, "not_measured": "out of memory: it reads a prompt in one piece"}
            continue
        finally:
            out = None
        if length != 64:  # the first one warms up
            yield {"prompt_tokens": length, "seconds": first, "decoded_tokens_per_second": rate, "kernels": kernels}


def vision_times(encoder: Any, pixels: list[Any], n_images: int, device: Any) -> dict[str, Any]:
    """Pictures through transformers' CLIP in bf16 with sdpa, 32 at a time, all hidden states kept as LLaVA asks."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=encoder.width, intermediate_size=encoder.mlp_width, num_hidden_layers=encoder.n_layers,
        num_attention_heads=encoder.n_heads, image_size=encoder.image_size, patch_size=encoder.patch_size,
        hidden_act="quick_gelu", attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        model = CLIPVisionModel(config).to(torch.bfloat16).eval()

    def read(count: int) -> float:
        settle(device)
        started = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, count, 32):
                some = torch.stack([pixels[i % len(pixels)] for i in range(first, min(first + 32, count))])
                model(some.to(torch.bfloat16) / 255, output_hidden_states=True).hidden_states[-2].mean().item()
        return time.perf_counter() - started

    read(32)
    return {"seconds": read(n_images)}
