"""DeepSpeed's ZeRO as an engine: processes share the optimizer's state (1), gradients (2), weights (3).

Rajbhandari et al. 2020 (arXiv:1910.02054). Weights of matrix products are bf16 where the run's dtype is, over fp32
masters that ZeRO keeps; checkpoints hold the masters whole, so that any engine and number of processes goes on from
them. A frozen encoder stays outside: each process encodes its own pictures, or has none.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longllava.errors import TrainingError
from longllava.model import Model
from longllava.train.config import TrainConfig
from longllava.train.engines import PATIENCE, Parameters, gathered, scaled, shared, shared_state
from longllava.train.forward import Forward
from longllava.train.lora import learned_names
from longllava.train.optimizer import build_optimizer, set_learning_rate
from longllava.train.state import TrainingState, apply_weights

SLOTS = ("exp_avg", "exp_avg_sq")  # of AdamW, beside its count of steps
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}


class Zero:
    evenly = True

    def __init__(self, config: TrainConfig, dtype: torch.dtype, stage: int):
        self.config, self.dtype, self.stage = config, dtype, stage
        on_cpu = config.device == "cpu" or not torch.cuda.is_available()
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
        try:
            import deepspeed
        except Exception as error:
            raise TrainingError(f"engine zero{stage} needs deepspeed ({error}); pip install 'longllava[deepspeed]'"
                                ", or set engine: torch") from None  # fmt: skip
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # torch 2.13 renamed two collectives; DeepSpeed 0.19 calls them by their old names, thousands of times
        warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
        self.deepspeed = deepspeed
        if on_cpu:  # gloo does; DeepSpeed's own way between processes would be compiled here, for minutes
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        else:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        deepspeed.init_distributed("gloo" if on_cpu else "nccl", auto_mpi_discovery=False, verbose=False,
                                   timeout=PATIENCE)  # fmt: skip
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        zero: dict[str, Any] = {"stage": self.stage, "overlap_comm": self.device.type == "cuda"}
        if self.config.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.config.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,  # the loop says where a step ends
            "gradient_clipping": self.config.optimizer.clip, "zero_optimization": zero,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's own fused AdamW needs no compiler on the training machine
        }  # fmt: skip

    def prepare(self, forward: Forward, parameters: Parameters, state: TrainingState | None) -> None:
        self.model, self.parts = forward.model, self.config.train_only
        if state is not None and self.rank == 0:
            apply_weights(state, self.model, self.parts)
        masters = {name: parameter.data for name, parameter in parameters}  # fp32, of the first process
        encoder = self.model.encoder
        if encoder is not None and "encoder" not in self.parts:
            forward.model = without_encoder(self.model)
            for tensor in encoder.parameters():
                tensor.data = tensor.data.to(self.device)
                torch.distributed.broadcast(tensor.data, 0)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.device)
            torch.distributed.broadcast(buffer.data, 0)
        optimizer = build_optimizer(parameters, self.config.optimizer)
        if self.stage == 3:
            self.share_weights_(forward)
        self.engine, self.optimizer, *_ = self.deepspeed.initialize(
            model=forward, optimizer=optimizer, config=self.settings()
        )
        self.parameters = parameters
        self.make_slots()
        slots = {} if state is None else state.optimizer
        for name, parameter in parameters:
            self.put(parameter, None, masters[name])
            if state is not None:
                for slot in SLOTS:
                    self.put(parameter, slot, slots.get(f"{slot}/{name}"))
        if state is not None:
            self.set_count(shared(lambda: float(next(iter(counts(slots)), 0.0)), self.rank, self.world))

    def share_weights_(self, forward: Forward) -> None:
        """Weight by weight, from host memory. DeepSpeed's `initialize` would first put all of them on each GPU: 106 GB
        of 53 billion in bf16."""
        for parameter in forward.parameters():
            if not parameter.is_floating_point():
                continue
            if self.rank == 0:
                parameter.data = parameter.data.to(self.dtype)
            else:  # the first process's come into it; until then it is not written to, and takes no room
                parameter.data = torch.empty_like(parameter.data, dtype=self.dtype)
        self.deepspeed.zero.Init(module=forward, config_dict_or_path=self.settings(), dtype=self.dtype)

    def make_slots(self) -> None:
        """AdamW makes them at its first step; a checkpoint is read before that."""
        base = self.optimizer.optimizer
        for flat in self.flat_masters():
            base.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device),
                                **{slot: torch.zeros_like(flat) for slot in SLOTS}}  # fmt: skip
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def flat_masters(self) -> list[Tensor]:
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def set_count(self, count: float) -> None:
        for flat in self.flat_masters():
            self.optimizer.optimizer.state[flat]["step"].fill_(count)

    def put(self, parameter: nn.Parameter, slot: str | None, value: Tensor | None) -> None:
        """Set this process's share of a master (slot None) or of an optimizer's slot from the first process's value."""
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape, dtype=torch.float32, device=self.device)
        if self.rank == 0:
            assert value is not None, slot
            whole.copy_(value)
        torch.distributed.broadcast(whole, 0)
        if self.stage < 3:
            if slot is None:
                safe_set_full_fp32_param(parameter, whole)
            else:
                safe_set_full_optimizer_state(parameter, whole, slot)
            return
        n = safe_get_local_fp32_param(parameter).numel()
        padded = nn.functional.pad(whole.flatten(), (0, n * self.world - whole.numel()))
        mine = padded[n * self.rank : n * (self.rank + 1)]
        if slot is None:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, slot)

    def run(self, inputs: tuple[Any, ...], scale: float, last: bool) -> dict[str, Tensor]:
        self.engine.set_gradient_accumulation_boundary(last)
        loss, measured = self.engine(*inputs)
        self.engine.backward(scaled(loss, self.world * scale))
        return measured

    def step(self, rate: float) -> float:
        """As Plain's: DeepSpeed too leaves everything as it was when the norm is not finite."""
        set_learning_rate(self.optimizer.optimizer, rate)
        self.engine.step()
        return float("nan") if self.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def state(self, facts: dict[str, Any], **where: Any) -> TrainingState:
        slots = {}
        for name, parameter in self.parameters:
            for slot in SLOTS:
                slots[f"{slot}/{name}"] = self.whole_master(parameter, slot)
            slots[f"step/{name}"] = self.count()
        return TrainingState(tensors=self.trained(), optimizer=slots, facts=facts, **where)

    def trained(self) -> dict[str, Tensor]:
        """Every process takes part; the first one holds the result."""
        masters = {name: (parameter, None) for name, parameter in self.parameters}
        tensors = {}
        for part in self.parts:
            state = getattr(self.model, part).state_dict(keep_vars=True, prefix=f"{part}.")
            kept = learned_names(state)
            for name, tensor in ((name, state[name]) for name in state if name in kept):
                if name in masters:
                    tensors[name] = self.whole_master(*masters[name])
                else:
                    with self.whole(tensor):
                        tensors[name] = tensor.detach().to("cpu", copy=True)
        return tensors

    def whole_master(self, parameter: nn.Parameter, slot: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensor = safe_get_full_fp32_param(parameter) if slot is None else safe_get_full_optimizer_state(parameter, slot)
        return tensor.detach().to("cpu", copy=True) if self.rank == 0 else tensor.new_empty(0)

    def count(self) -> Tensor:
        return self.optimizer.optimizer.state[self.flat_masters()[0]]["step"].detach().to("cpu", copy=True)

    def whole(self, parameter: Tensor) -> contextlib.AbstractContextManager[Any]:
        if self.stage < 3 or not hasattr(parameter, "ds_id"):
            return contextlib.nullcontext()
        return self.deepspeed.zero.GatheredParameters([parameter])

    def gather(self, values: list[Any]) -> list[Any]:
        return gathered(values, self.world)

    def share(self, read: Callable[[], TrainingState | None]) -> TrainingState | None:
        return shared_state(read, self.rank, self.world)

    def wait(self) -> None:
        torch.distributed.barrier()


def without_encoder(model: Model) -> Model:
    """The same modules in a model that has no encoder."""
    inside = copy.copy(model)
    inside._modules = {**model._modules, "encoder": None}
    return inside


def counts(slots: dict[str, Tensor]) -> Iterator[Tensor]:
    """The numbers of steps that AdamW keeps of each parameter; they are one number."""
    return (value for name, value in slots.items() if name.startswith("step/"))
