"""Which device each weight of a model goes to, and whether it fits there, before any is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from longllava.checkpoints.stored import Stored
from longllava.errors import CheckpointError, ConfigError
from longllava.plan.memory import free_bytes, sized
from longllava.plan.need import prompt_need
from longllava.plan.split import LAYERS, Placement, placed, split

if TYPE_CHECKING:
    import torch

    from longllava.model import Model

AUTO = "auto"
# what a recurrence of ten thousand steps is sensitive to stays in fp32, whatever the model's dtype; and int8's scales
FP32_NAMES = ("A_log_EN", "D_E", "dt_bias_E", "log_length_H", "scale_N", "scale_XN")
WORK_TOKENS = 8192  # what is read at a time, whose workspace every device has to hold


def stored_dtype(key: str, stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    import torch

    if asked is not None and not (isinstance(asked, torch.dtype) and asked.is_floating_point):
        raise ConfigError(f"dtype: got {asked!r}, expected floats such as torch.bfloat16; int8 is longllava.quant's")
    if not stored.is_floating_point:
        return stored
    return torch.float32 if key.rsplit(".", 1)[-1] in FP32_NAMES else (asked or stored)


def most_stored(tensors: Iterable[Stored]) -> torch.dtype | None:
    """The dtype that most of a folder's floats are stored in; None where there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] += math.prod(tensor.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def weight_bytes(model: Model, dtype: torch.dtype | None) -> dict[str, int]:
    """Of each parameter of a model that may lie on the meta device, as it will be stored."""
    return {
        key: tensor.numel() * stored_dtype(key, tensor.dtype, dtype).itemsize
        for key, tensor in model.state_dict().items()
    }


def layer_bytes(model: Model, dtype: torch.dtype | None) -> tuple[list[int], int]:
    """Of each layer of the backbone, and of all the rest."""
    layers, rest = [0] * model.config.backbone.n_layers, 0
    for key, size in weight_bytes(model, dtype).items():
        if key.startswith(LAYERS):
            layers[int(key[len(LAYERS) :].partition(".")[0])] += size
        else:
            rest += size
    return layers, rest


def auto_placement(model: Model, dtype: torch.dtype | None, free: Mapping[str, int]) -> Placement:
    """Over the fewest of the devices that hold it. Raises: InputError when they do not."""
    layers, rest = layer_bytes(model, dtype)
    need = prompt_need(model.config, WORK_TOKENS, value_bytes=dtype.itemsize if dtype else 4, chunk_tokens=WORK_TOKENS)
    return split(layers, rest, need.workspace, free)


def placement_of(device_map: str | Mapping[str, Any], model: Model, dtype: torch.dtype | None) -> Placement:
    """Of "auto", or of a table of names and devices. Raises: ConfigError, InputError."""
    import torch

    if isinstance(device_map, Mapping):
        for key, name in device_map.items():
            try:
                torch.device(name)
            except (RuntimeError, TypeError):
                raise ConfigError(f"device_map: {key!r}: got {name!r}, allowed: cpu, cuda, cuda:1 ...") from None
        return placed(device_map, model.config.backbone.n_layers)
    if device_map != AUTO:
        raise ConfigError(f"device_map: got {device_map!r}, allowed: {AUTO!r} or a table such as {{'': 'cuda:0'}}")
    free = {name: free_bytes(name) for name in (f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    if not free:  # nothing to choose: what device="cpu" holds is held
        return placed({"": "cpu"}, model.config.backbone.n_layers)
    return auto_placement(model, dtype, {name: n for name, n in free.items() if n is not None})


def check_room(model: Model, dtype: torch.dtype | None, placement: Placement) -> None:
    """Raises: CheckpointError naming a device that has less memory free than the weights for it take."""
    need = dict.fromkeys(placement.devices(), 0)
    for key, size in weight_bytes(model, dtype).items():
        need[placement.device_of(key)] += size
    for device, size in need.items():
        free = free_bytes(device)
        if free is not None and size > free:
            raise CheckpointError(
                f"the weights take {sized(size)} of memory on {device}, {sized(free)} are free; load them with"
                " int8=True, a smaller dtype, or device_map='auto' where there are several GPUs"
            )
