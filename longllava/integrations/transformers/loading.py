"""Arguments of transformers' from_pretrained as this library understands them, and a folder's way to generate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from longllava import api
from longllava.checkpoints import find_folder
from longllava.checkpoints.placing import FP32_NAMES
from longllava.errors import InputError
from longllava.inputs.tokenizer import Tokenizer
from longllava.integrations.transformers.configuration import LongLLaVAConfig
from longllava.model import Model

# how a name of the hub is downloaded
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# given by the Auto classes and pipelines themselves, or of no effect here: a folder is always read as safetensors,
# straight to its place, and its code is never run
WITHOUT_EFFECT = {
    *HUB, "_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "code_revision", "low_cpu_mem_usage",
    "proxies", "trust_remote_code", "use_safetensors", "weights_only",
}  # fmt: skip
ATTENTION = (None, "eager", "sdpa")  # our attention chooses its backend itself


def folder_of(name: Any, arguments: dict[str, Any]) -> Path:
    """A model's folder. Raises: InputError for arguments that ask for what is not done here."""
    if arguments.pop("attn_implementation", None) not in ATTENTION:
        raise InputError("attn_implementation: attention chooses its backend itself; LONGLLAVA_ATTENTION forces one")
    asked = [key for key, value in arguments.items() if key not in WITHOUT_EFFECT and value not in (None, False, "")]
    if asked:
        raise InputError(f"from_pretrained: {', '.join(asked)} cannot be used with this model; leave it out")
    return find_folder(name, **hub_arguments(arguments))


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: arguments[key] for key in HUB if arguments.get(key) is not None}


def checked_dtype(dtype: Any) -> torch.dtype | None:
    return None if dtype in (None, "auto") else api.checked_dtype(dtype, None)


def as_one_dtype_(model: Model) -> None:
    """Weights that were stored in several dtypes, as the one that most of them have; torch multiplies no two."""
    weights = [tensor for key, tensor in model.state_dict(keep_vars=True).items()
               if tensor.is_floating_point() and not key.endswith(FP32_NAMES)]  # fmt: skip
    sizes: Counter[torch.dtype] = Counter()
    for tensor in weights:
        sizes[tensor.dtype] += tensor.numel()
    dtype = sizes.most_common(1)[0][0]
    for tensor in weights:
        tensor.data = tensor.data.to(dtype)


def checked_device_map(device_map: Any) -> torch.device:
    """One device. None: the CPU; "auto": a GPU if there is one."""
    if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, dict):
        raise InputError(f"device_map: got {len(device_map)} places, allowed: one device for the whole model")
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    return api.checked_device(None if device_map == "auto" else device_map or "cpu")


def generation_of(folder: Path, config: LongLLaVAConfig, defaults: GenerationConfig) -> GenerationConfig:
    """The folder's generation_config.json, and ids that its tokenizer does not know: they are never generated."""
    found = defaults
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder)
        if defaults.eos_token_id is not None:
            found.eos_token_id, found.pad_token_id = defaults.eos_token_id, defaults.pad_token_id
    if config.eos_token_id is not None and found.suppress_tokens is None:
        known = Tokenizer.from_folder(folder, config.model_config().prompt).vocab_size
        found.suppress_tokens = list(range(known, config.vocab_size)) or None
    return found
