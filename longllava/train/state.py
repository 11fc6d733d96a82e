"""The state of training: what trains, the optimizer, the step. A run that goes on from one is the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longllava.data.packing import Cursor
from longllava.errors import TrainingError
from longllava.files import write_atomic


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
