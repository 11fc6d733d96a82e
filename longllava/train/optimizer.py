"""AdamW over the parts that train, and what may decay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from longllava.errors import TrainingError
from longllava.train.config import OptimizerConfig
from longllava.train.lora import learned_names

NOT_DECAYED = ("A_log_EN",)  # two-dimensional, but a rate, not a weight (Mamba's `_no_weight_decay`)


def select_parts(model: nn.Module, parts: Iterable[str], frozen: Iterable[str] = ()) -> list[tuple[str, nn.Parameter]]:
    """Let only these parts train; the others are frozen, in eval mode. Returns what trains, by name.

    frozen: modules or parameters inside those parts that do not ("backbone.embed_tokens"). Of a part with adapters
    (train/lora.py) these alone train.
    Raises: TrainingError for names that the model does not have, or where nothing is left to train.
    """
    wanted = set(parts)
    model.train()
    for name, part in model.named_children():
        if name not in wanted:
            part.eval()
        for parameter in part.parameters():
            parameter.requires_grad_(name in wanted)
        if name in wanted:
            freeze_beside_adapters_(part)
    missing = wanted - {name for name, _ in model.named_children()}
    if missing:
        raise TrainingError(f"train_only: the model has no part {', '.join(sorted(missing))}")
    for prefix in frozen:
        inside = [parameter for name, parameter in model.named_parameters() if f"{name}.".startswith(f"{prefix}.")]
        if not inside:
            raise TrainingError(f"frozen: the model has no {prefix!r}")
        for parameter in inside:
            parameter.requires_grad_(False)
    learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not learned:
        raise TrainingError(f"frozen: nothing is left that learns of train_only, {', '.join(sorted(wanted))}")
    return learned


def freeze_beside_adapters_(part: nn.Module) -> None:
    """Where a part has adapters, all else of it is as if it did not train; batch norm's means too."""
    names = [name for name, _ in part.named_parameters()]
    if len(adapters := learned_names(names)) == len(names):
        return
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(name in adapters)
    for module in part.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def build_optimizer(parameters: list[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """fused: one pass over each tensor, also on a CPU (torch >= 2.4)."""
    decayed = [p for name, p in parameters if p.ndim >= 2 and not name.endswith(NOT_DECAYED)]
    kept = [p for name, p in parameters if p.ndim < 2 or name.endswith(NOT_DECAYED)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
