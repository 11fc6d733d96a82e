"""What runs a step: plain torch (also DDP, under torchrun or accelerate launch), or DeepSpeed's ZeRO (train/zero.py).

The loop knows an engine's few verbs only. Every one of them is called by all processes, in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longllava.errors import TrainingError
from longllava.train.config import TrainConfig, engine_named
from longllava.train.forward import Forward
from longllava.train.optimizer import build_optimizer, set_learning_rate
from longllava.train.state import TrainingState, apply, gather, trained_tensors

Parameters = list[tuple[str, nn.Parameter]]
# that processes wait for the first one, which reads and writes checkpoints (636 GB of 53 billion parameters, and their
# checksums) and models. By default it is 10 minutes on GPUs; a process that ends is noticed by its launcher at once
PATIENCE = datetime.timedelta(hours=6)


class Plain:
    """Every process holds the whole model and optimizer; rows of a step are shared, gradients added by DDP."""

    evenly = False  # DDP does without modules that one process does not run

    def __init__(self, config: TrainConfig, dtype: torch.dtype):
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
            from accelerate.utils import GradientAccumulationPlugin
        except Exception as error:
            raise TrainingError(f"training needs accelerate ({error}); pip install 'longllava[train]'") from None
        self.config, self.dtype = config, dtype
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        self.accelerator = Accelerator(
            # accelerate joins processes on CPUs only where it is told that these are meant
            cpu=config.device == "cpu" or (wanted > 1 and not torch.accelerator.is_available()),
            mixed_precision="no",  # autocast is ours: a process has accelerate's state once, and may train two stages
            # so is rows_at_once: by ACCELERATE_GRADIENT_ACCUMULATION_STEPS each gradient would be divided once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True),  # text has no pictures
                             InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if self.world != wanted:
            raise TrainingError(f"{wanted} processes were launched, accelerate joined {self.world} of them on"
                                f" {self.device}; set device: cpu, or launch one")  # fmt: skip

    def prepare(self, forward: Forward, parameters: Parameters, state: TrainingState | None) -> None:
        """Take the model over: on its device, with an optimizer, as `state` says if there is one."""
        self.model, self.parts = forward.model, self.config.train_only
        self.model.to(self.device)
        self.parameters = [parameter for _, parameter in parameters]
        self.plain_optimizer = build_optimizer(parameters, self.config.optimizer)
        if state is not None:
            for tensors in (state.tensors, state.optimizer):
                tensors |= sent(tensors, self.device, self.rank, self.world)
            apply(state, self.model, self.parts, self.plain_optimizer)
        self.forward, self.optimizer = self.accelerator.prepare(forward, self.plain_optimizer)

    def run(self, inputs: tuple[Any, ...], scale: float, last: bool) -> dict[str, Tensor]:
        """Forward and backward of one batch. Returns what was measured.

        inputs: of Forward. scale: of the loss. last: whether it is the step's last.
        """
        together = contextlib.nullcontext() if last else self.accelerator.no_sync(self.forward)
        low = self.dtype != torch.float32
        with together:
            with torch.autocast(self.device.type, self.dtype, enabled=low):
                loss, measured = self.forward(*inputs)
            # DDP averages over processes: `world` makes a sum of that
            self.accelerator.backward(scaled(loss, self.world * scale))
        return measured

    def step(self, rate: float) -> float:
        """Clip and update, unless the gradient's norm is not finite. Returns the norm before clipping."""
        set_learning_rate(self.plain_optimizer, rate)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.optimizer.clip))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self, facts: dict[str, Any], **where: Any) -> TrainingState:
        """All that a run needs to go on; whole on the first process."""
        return gather(self.model, self.parts, self.plain_optimizer, facts, **where)

    def whole(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """Within it the parameter is whole on every process."""
        return contextlib.nullcontext()

    def trained(self) -> dict[str, Tensor]:
        """The weights of the parts that train, whole and in fp32 on the first process."""
        return trained_tensors(self.model, self.parts)

    def gather(self, values: list[Any]) -> list[Any]:
        """Lists of all processes, one after the other."""
        return gathered(values, self.world)

    def share(self, read: Callable[[], TrainingState | None]) -> TrainingState | None:
        """The state that `read` returns on the first process, on all; its tensors stay on the first."""
        return shared_state(read, self.rank, self.world)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def scaled(loss: Tensor, scale: float) -> Tensor:
    """A loss that is not finite has a gradient that is not either, whatever made it: the step is then not taken."""
    return loss * torch.where(loss.detach().isfinite(), scale, torch.nan)


def gathered(values: list[Any], world: int) -> list[Any]:
    if world == 1:
        return values
    lists: list[Any] = [None] * world
    torch.distributed.all_gather_object(lists, values)
    return [value for own in lists for value in own]


def shared(make: Callable[[], Any], rank: int, world: int) -> Any:
    """An error of the first process is raised on all: none is left waiting."""
    found: list[Any] = [None, None]
    if rank == 0:
        try:
            found[0] = make()
        except (TrainingError, OSError) as error:
            found[1] = error
    if world > 1:
        torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def shared_state(read: Callable[[], TrainingState | None], rank: int, world: int) -> TrainingState | None:
    """Without its tensors: pickled, those of 9 billion parameters are 108 GB, and NCCL would have them on each GPU."""
    whole: list[TrainingState | None] = []

    def without_tensors() -> TrainingState | None:
        whole.append(read())
        return whole[0] and dataclasses.replace(whole[0], tensors={}, optimizer={})

    found = shared(without_tensors, rank, world)
    return whole[0] if whole else found


def sent(tensors: dict[str, Tensor], device: torch.device, rank: int, world: int) -> dict[str, Tensor]:
    """The first process's tensors on all, in host memory, one at a time through the device."""
    if world == 1:
        return tensors
    result = {}
    sizes = shared(lambda: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, rank, world)
    for name, (shape, dtype) in sizes.items():
        tensor = tensors[name].to(device) if rank == 0 else torch.empty(shape, dtype=dtype, device=device)
        torch.distributed.broadcast(tensor, 0)
        result[name] = tensor.cpu()
    return result


def open_engine(config: TrainConfig, dtype: torch.dtype) -> Any:
    name = engine_named(config)
    if name == "torch":
        return Plain(config, dtype)
    from longllava.train.zero import Zero

    return Zero(config, dtype, stage=int(name.removeprefix("zero")))
