"""The state of training: what trains, the optimizer, the step. A run that goes on from one is the same run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longllava.data.features import fingerprint
from longllava.data.packing import Cursor
from longllava.errors import TrainingError
from longllava.files import write_atomic
from longllava.train.lora import learned_names


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
    """The state of a run."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slots = {f"{slot}/{names[id(parameter)]}": value for parameter, values in optimizer.state.items()
             for slot, value in values.items()}  # fmt: skip
    return TrainingState(step, first_step, begin, trained_tensors(model, parts), slots, facts)


def apply_weights(state: TrainingState, model: nn.Module, parts: list[str]) -> None:
    """Put the weights back in place. Raises: TrainingError when names or shapes differ."""
    for part in parts:
        prefix = part + "."
        mine = {key[len(prefix) :]: value for key, value in state.tensors.items() if key.startswith(prefix)}
        module = getattr(model, part)
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        wrong = sorted(name for name, tensor in mine.items() if tensor.shape != shapes.get(name, tensor.shape))
        if wrong:
            name = wrong[0]
            raise of_another_model(state, f"{len(wrong)} tensors of its {part} have other shapes, the first, {name},"
                                          f" {tuple(mine[name].shape)}, not {tuple(shapes[name])}")  # fmt: skip
        missing, unexpected = module.load_state_dict(mine, strict=False)
        missing = sorted(learned_names(shapes) & set(missing))
        if missing or unexpected:
            raise of_another_model(state, f"of its {part}, it lacks {missing[:8]} and has {unexpected[:8]} beyond")


def of_another_model(state: TrainingState, why: str) -> TrainingError:
    return TrainingError(f"checkpoint of step {state.step} is of another model: {why}")


def apply(state: TrainingState, model: nn.Module, parts: list[str], optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimizer back in place. Raises: TrainingError when names or shapes differ."""
    apply_weights(state, model, parts)
    parameters = dict(model.named_parameters())
    for key, value in state.optimizer.items():
        slot, _, name = key.partition("/")
        if not name:
            continue  # torch's random state, which older versions kept; steps seed it now
        if name not in parameters:
            raise TrainingError(f"checkpoint of step {state.step} has {slot} of {name!r}, which does not train")
        parameter = parameters[name]
        # fused AdamW keeps its count of steps as an fp32 scalar beside the parameter
        optimizer.state[parameter][slot] = value.to(parameter.device)


def trained_tensors(model: nn.Module, parts: list[str]) -> dict[str, Tensor]:
    """The weights of the parts that train, by their names in the model; buffers (batch norm's means) too.

    Of a part with adapters these alone.
    """
    tensors: dict[str, Tensor] = {}
    for part in parts:
        state = getattr(model, part).state_dict()
        kept = learned_names(state)
        tensors |= {f"{part}.{name}": state[name] for name in state if name in kept}
    return tensors


def keep_weights(folder: Path, tensors: dict[str, Tensor], phase: int) -> None:
    """Write the weights as they are after a phase, for `average_weights`."""
    from safetensors.torch import save

    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_atomic(folder / f"phase-{phase}.safetensors", lambda file: file.write(save(plain)))


def average_weights(folder: Path, tensors: dict[str, Tensor], phases: list[int]) -> dict[str, Tensor]:
    """The mean of what was kept after the phases (arXiv 2203.05482), under the names of `tensors`.

    Raises: TrainingError naming a file that is gone or spoiled.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kept = []
    for path in (folder / f"phase-{phase}.safetensors" for phase in phases):
        try:
            kept.append(load_file(path))
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{path}: cannot be read: {' '.join(str(error).split())}; the mean of the phases needs"
                                f" it: delete {folder.parent} and train again") from None  # fmt: skip
    return {name: torch.stack([one[name] for one in kept]).mean(0) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()}  # fmt: skip


def frozen_marks(model: nn.Module, whole: Callable[[nn.Parameter], AbstractContextManager[Any]]) -> dict[str, str]:
    """A fingerprint of what does not train, by part. whole: within it a parameter that processes share is whole."""
    return {part: fingerprint(frozen_tensors(module, whole)) for part, module in model.named_children()}


def frozen_tensors(
    part: nn.Module, whole: Callable[[nn.Parameter], AbstractContextManager[Any]]
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in part.named_parameters():
        if not parameter.requires_grad:
            with whole(parameter):
                yield name, parameter
    if not part.training:  # batch norm's means move while a part trains
        yield from part.named_buffers()


def differences(key: str, then: Any, now: Any) -> list[str]:
    """Each setting that differs, by its own name: phases.0.rows. A model's that `then` does not know came later."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        then, now = dict(enumerate(then)), dict(enumerate(now))
    described = key.startswith("architecture.")  # what a class describes; elsewhere names are data: start_from.bridge
    if isinstance(then, dict) and isinstance(now, dict) and (
        then.keys() == now.keys() or described and then.keys() < now.keys()
    ):
        return [line for name in then for line in differences(f"{key}.{name}", then[name], now[name])]
    return [] if then == now else [f"{key}: {then!r} then, {now!r} now"]


def compare(saved: dict[str, Any], now: dict[str, Any], step: int) -> None:
    """Whether a run that was begun with the facts `saved` and took `step` steps may go on with `now`.

    Phases that have not begun may change; settings that `saved` does not know came later.
    Raises: TrainingError naming what differs.
    """
    pairs = {key: (saved[key], now.get(key)) for key in sorted(saved)}
    if "phases" in pairs:
        then, at = pairs["phases"]
        firsts = itertools.accumulate((phase["steps"] for phase in then[:-1]), initial=0)
        n_begun = sum(first < step for first in firsts)
        pairs["phases"] = then[:n_begun], at and at[:n_begun]
    different = [line for key, (then, at) in pairs.items() for line in differences(key, then, at)]
    if different:
        raise TrainingError(
            f"this run was begun with other settings ({'; '.join(different)}); use those, or another output"
        )
