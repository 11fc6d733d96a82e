"""Checkpoints of training: what trains, the optimizer, the step. A run that goes on from one is the same run.

A checkpoint is a folder step-00001200 with model.safetensors (the parts that train), optimizer.safetensors
and state.json. It is written under a temporary name, flushed, and renamed: there are whole ones only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longllava.data.packing import Cursor
from longllava.errors import TrainingError
from longllava.files import sync_folder, write_atomic

NAME = re.compile(r"step-(\d{8})")
KEPT = 2


@dataclass
class TrainingState:
    """After `step` finished steps, in the window that began at `first_step` with the cursor `begin`.

    tensors: of the parts that train, by name. optimizer: "<slot>/<parameter>" -> tensor. facts: JSON.
    """

    step: int
    first_step: int
    begin: Cursor
    tensors: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


def gather(
    model: nn.Module, parts: list[str], optimizer: torch.optim.Optimizer, facts: dict[str, Any],
    *, step: int, first_step: int, begin: Cursor,
) -> TrainingState:  # fmt: skip
    """The state of a run. Buffers of the parts (batch norm's means) belong to it."""
    tensors = {f"{part}.{name}": tensor for part in parts
               for name, tensor in getattr(model, part).state_dict().items()}  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slots = {f"{slot}/{names[id(parameter)]}": value for parameter, values in optimizer.state.items()
             for slot, value in values.items()}  # fmt: skip
    slots["random"] = torch.get_rng_state()
    return TrainingState(step, first_step, begin, tensors, slots, facts)


def apply(state: TrainingState, model: nn.Module, parts: list[str], optimizer: torch.optim.Optimizer) -> None:
    """Put a state back in place. Raises: TrainingError when names or shapes differ."""
    for part in parts:
        prefix = part + "."
        mine = {key[len(prefix) :]: value for key, value in state.tensors.items() if key.startswith(prefix)}
        try:
            getattr(model, part).load_state_dict(mine)
        except RuntimeError as error:
            raise TrainingError(
                f"checkpoint of step {state.step} is of another model: {' '.join(str(error).split())}"
            ) from None
    parameters = dict(model.named_parameters())
    slots = dict(state.optimizer)
    torch.set_rng_state(slots.pop("random"))
    for key, value in slots.items():
        slot, _, name = key.partition("/")
        if name not in parameters:
            raise TrainingError(f"checkpoint of step {state.step} has {slot} of {name!r}, which does not train")
        parameter = parameters[name]
        # fused AdamW keeps its count of steps as an fp32 scalar beside the parameter
        optimizer.state[parameter][slot] = value.to(parameter.device)


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write a checkpoint below `folder`; keep the last two."""
    from safetensors.torch import save_file

    target = folder / f"step-{state.step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, tensors in (("model", state.tensors), ("optimizer", state.optimizer)):
        plain = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
        save_file(untied(plain), temporary / f"{name}.safetensors")
        flush(temporary / f"{name}.safetensors")
    record = {"step": state.step, "first_step": state.first_step, "next": state.begin.next,
              "held": state.begin.held, "facts": state.facts}  # fmt: skip
    (temporary / "state.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    flush(temporary / "state.json")
    sync_folder(temporary)
    if target.exists():  # the same step again, after a resume: it holds the same bytes
        shutil.rmtree(target)
    os.replace(temporary, target)
    sync_folder(folder)
    for old in checkpoint_folders(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def keep_weights(folder: Path, model: nn.Module, parts: list[str], phase: int) -> None:
    """Write the weights of the parts as they are after a phase, for `average_weights_`."""
    from safetensors.torch import save

    tensors = {f"{part}.{name}": tensor.detach().to("cpu", copy=True).contiguous() for part in parts
               for name, tensor in getattr(model, part).state_dict().items()}  # fmt: skip
    write_atomic(folder / f"phase-{phase}.safetensors", lambda file: file.write(save(tensors)))


@torch.no_grad()
def average_weights_(folder: Path, model: nn.Module, parts: list[str], phases: list[int]) -> None:
    """Set the parts to the mean of what was kept after the phases (arXiv 2203.05482)."""
    from safetensors.torch import load_file

    kept = [load_file(folder / f"phase-{phase}.safetensors") for phase in phases]
    for part in parts:
        for name, tensor in getattr(model, part).state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.stack([one[f"{part}.{name}"] for one in kept]).mean(0))


def untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses two names of one storage (tied embeddings): the second gets a copy."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        result[key] = value.clone() if value.data_ptr() in seen and value.numel() else value
        seen.add(value.data_ptr())
    return result


def flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def checkpoint_folders(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def latest_state(folder: Path) -> TrainingState | None:
    """The newest checkpoint below `folder`, or None. Raises: TrainingError when it cannot be read."""
    folders = checkpoint_folders(folder)
    for path in folder.glob(".step-*.tmp") if folder.is_dir() else ():  # of a run that was killed while writing
        shutil.rmtree(path, ignore_errors=True)
    if not folders:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folders[-1]
    try:
        record = json.loads((path / "state.json").read_text("utf-8"))
        return TrainingState(
            record["step"], record["first_step"], Cursor(record["next"], tuple(record["held"])),
            load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), record["facts"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: cannot be read: {' '.join(str(error).split())}; delete it to go on from the one before"
        ) from None


def compare(saved: dict[str, Any], now: dict[str, Any], n_phases: int) -> None:
    """Whether a run that was begun with the facts `saved` may go on with `now`.

    Phases after the first n_phases have not begun and may change. Raises: TrainingError naming what differs.
    """
    pairs = {key: (saved.get(key), now.get(key)) for key in sorted({*saved, *now})}
    if "phases" in pairs:
        then, at = (phases and phases[:n_phases] for phases in pairs["phases"])
        pairs["phases"] = then, at
    different = [f"{key}: {then!r} then, {at!r} now" for key, (then, at) in pairs.items() if then != at]
    if different:
        raise TrainingError(
            f"this run was begun with other settings ({'; '.join(different)}); use those, or another output"
        )
