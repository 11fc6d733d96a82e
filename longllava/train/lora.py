"""LoRA by peft: parts of a model that learn through adapters alone, beside what is trained whole (the bridge).

    train_only: [bridge, backbone]
    lora: {rank: 16, alpha: 32, parts: [backbone]}      # parts: backbone, encoder, or both

Every linear layer of the parts gets an adapter but the output head and the routers of experts (targets names some of
them instead). The stage's model is a folder of peft, which `longllava merge` makes into a whole model.
Source: Hu et al. 2021 (arXiv:2106.09685); all linear layers, as LongLLaVA's train.py takes them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE, MARK, PREFIX, fingerprints
from longllava.config import ModelConfig
from longllava.errors import ConfigError, TrainingError
from longllava.files import write_atomic, write_json
from longllava.settings import positive

if TYPE_CHECKING:
    from torch import Tensor

    from longllava.inputs.tokenizer import Tokenizer
    from longllava.model import Model

PARTS = ("encoder", "backbone")
# the head's weight is read, not called; a router decides between experts, and its choices are not smooth
LEFT_OUT = ("lm_head", "router")
NAMED = ".default"  # peft's name of an adapter, in the names of its parameters


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """rank: of the adapters. alpha: their weight is alpha / rank. dropout: of their inputs. parts: that have them.

    targets: last words of the names of layers ("q_proj"); empty: every linear layer.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    parts: list[str] = field(default_factory=lambda: ["backbone"])
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        positive(self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout: got {self.dropout}, a share from 0 to below 1")
        for part in self.parts:
            if part not in PARTS:
                raise ConfigError(f"lora.parts: got {part!r}, allowed: {', '.join(PARTS)}; the bridge is trained whole")
        if not self.parts:
            raise ConfigError(f"lora.parts: the list is empty; name some of {', '.join(PARTS)}")


def base_of(init_from: Mapping[str, str], folders: Mapping[str, Path], config: ModelConfig) -> str:
    """The one model that adapters are trained on, as a user names it. Raises: TrainingError for parts of several."""
    parts = [part for part in ("encoder", "bridge", "backbone") if getattr(config, part) is not None]
    named = {init_from.get(part) or init_from.get("all") or str(folders.get(part)) for part in parts}
    if len(named) > 1 or not all(part in folders for part in parts):
        raise TrainingError(
            "lora: adapters belong to one model; start all parts from it (start_from: {all: ...}), got"
            f" {', '.join(f'{part} from {folder}' for part, folder in folders.items()) or 'fresh ones'}"
        )
    (base,) = named
    return base


def layers_of(model: Model, config: LoraConfig) -> list[str]:
    """Names of the layers that get adapters. Raises: ConfigError for a target that no layer is called, and for a part
    without any, all of which would learn whole."""
    from torch import nn

    names = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in config.parts and name.split(".")[-1] not in LEFT_OUT
    ]  # fmt: skip
    known = sorted({name.split(".")[-1] for name in names})
    for target in config.targets:
        if target not in known:
            raise ConfigError(f"lora.targets: no layer is called {target!r}; have {', '.join(known)}")
    chosen = [name for name in names if not config.targets or name.split(".")[-1] in config.targets]
    for part in config.parts if config.targets else ():
        if not any(name.startswith(f"{part}.") for name in chosen):
            own = sorted({name.split(".")[-1] for name in names if name.startswith(f"{part}.")})
            raise ConfigError(f"lora.targets: none is a layer of the {part}, which would learn whole; name some of"
                              f" {', '.join(own)}, or take it out of lora.parts")  # fmt: skip
    return chosen


def add_adapters_(model: Model, config: LoraConfig, seed: int) -> None:
    """Put fresh adapters into a model, in place; what it answers is as before until they learn.

    Raises: TrainingError without peft.
    """
    import torch

    try:
        import peft
    except Exception as error:  # it may be there, and lack something itself
        raise TrainingError(f"lora needs peft ({error}); pip install 'longllava[train]'") from None
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft_config(layers_of(model, config), config), model)
    model.train(model.training)  # peft's layers come in training mode


def peft_config(names: list[str], config: LoraConfig, **more: Any) -> Any:
    import peft

    return peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names,
                           bias="none", **more)  # fmt: skip


def learned_names(names: Iterable[str]) -> set[str]:
    """Of a part's names those of what a run changes: the adapters, where it has some, else all."""
    names = set(names)
    return {name for name in names if MARK in f".{name}"} or names


def save_adapter(
    model: Model, tokenizer: Tokenizer, trained: Mapping[str, Tensor], config: LoraConfig, base: str, folder: Path
) -> Path:
    """Write what was trained as a folder of peft: adapters, and the parts that learned whole.

    model: with the adapters in it, the rest in floats as it was read, which merging compares with what it reads; where
    training held that in 8 bits or in pieces, it was read again. base: the model it was trained on, as a user names it.
    config.json and the tokenizer stand beside it, so that the folder can be given wherever a model's can.
    """
    from safetensors.torch import save

    tensors = {}
    marks = fingerprints(model, [name for name in trained if MARK not in name])
    for name, tensor in trained.items():
        tensors[PREFIX + name.replace(NAMED, "")] = tensor.detach().to("cpu").contiguous()
    names = sorted({name.partition(MARK)[0] for name in trained if MARK in name})
    whole = sorted({name.split(".")[0] for name in trained if MARK not in name})
    saved = peft_config(names, config, base_model_name_or_path=base, modules_to_save=whole or None, inference_mode=True)
    write_atomic(folder / ADAPTER_WEIGHTS, lambda file: file.write(save(tensors, metadata={"format": "pt"})))
    tokenizer.save(folder)
    write_json(folder / "config.json", dataclasses.asdict(model.config))
    write_json(folder / BASE, {"base": base, "fingerprints": marks})
    write_json(folder / ADAPTER_CONFIG, json.loads(json.dumps(saved.to_dict(), default=plain)))
    return folder


def plain(value: Any) -> Any:
    """What peft's settings hold beyond JSON."""
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))
