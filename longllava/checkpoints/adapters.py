"""LoRA adapters as peft keeps them, read and put into a model's weights; peft is not needed for that.

A folder of peft: adapter_config.json and adapter_model.safetensors, in which the adapter of the module M is
base_model.model.M.lora_A.weight (r, in) and base_model.model.M.lora_B.weight (out, r), and modules that were trained
whole (modules_to_save, here the bridge) stand under base_model.model.NAME. A weight becomes W + scale * B A, with
scale = alpha / r (Hu et al. 2021, arXiv:2106.09685).

Shapes fit every training of one model. Beside our own adapters base.json therefore holds fingerprints of the weights
they were trained on; peft's own folders have none, and are not asked for them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.checkpoints.folders import RECORD, listed
from longllava.checkpoints.stored import unreadable
from longllava.errors import CheckpointError
from longllava.files import expanded, write_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longllava.model import Model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
PREFIX = "base_model.model."
MARK = ".lora_"
WRAPPED = ".base_layer"  # peft's name of a layer inside its adapter
LARGEST = sys.float_info.max
SAMPLE = 64  # values of each parameter that a fingerprint sees
# what peft's LoRA can do beyond W + scale * B A
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none", "rank_pattern": {},
         "alpha_pattern": {}, "alora_invocation_tokens": None, "layer_replication": None}  # fmt: skip
# beginnings that take from W what the adapters begin with: they belong to another W than the base's
TAKEN_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """pairs: module -> (A, B). whole: parameter -> its value. base: the model it was trained on, as it was named.

    marks: fingerprints of that model; empty where none were written.
    """

    scale: float
    base: str
    pairs: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor]
    marks: dict[str, str] = field(default_factory=dict)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def read_adapter(folder: str | Path) -> Adapter:
    """Raises: CheckpointError naming the file and what it holds."""
    folder = Path(folder)
    config = read_adapter_config(folder)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: r is {rank!r:.40} and lora_alpha {alpha!r:.40}, expected numbers"
        )
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    tensors = read_weights(folder)
    if narrow := [name for name, x in tensors.items() if x.is_floating_point() and x.itemsize == 1]:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: floats of 8 bits in {listed(narrow)}; store 16 or more")
    if damaged := [name for name, x in tensors.items() if not x.is_floating_point() or not bool(x.isfinite().all())]:
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS}: NaN, infinite or whole numbers in {listed(damaged)}; it is damaged"
        )
    alone = []
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        other = tensors.pop(f"{module}.lora_B.weight", None)
        if other is None or not other.ndim == tensors[name].ndim == 2 or other.shape[1] != tensors[name].shape[0]:
            alone.append(module)
        else:
            pairs[module.removeprefix(PREFIX)] = (tensors.pop(name), other)
    alone += [name for name in tensors if MARK in name]
    if alone:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: adapters without a fitting other half: {listed(alone)}")
    if others := [module for module, (a, _) in pairs.items() if len(a) != rank]:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: adapters of another rank than r, {rank}: {listed(others)}")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    base = str(config.get("base_model_name_or_path") or "")
    whole = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return Adapter(scale, base, pairs, whole, read_marks(folder))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG} in it; give the folder `model` of a LoRA stage's output")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: peft_type is {found!r}; LORA alone is read")
    for name, plain in PLAIN.items():
        if config.get(name, plain) not in (plain, None):
            raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {name} is {config[name]!r}; merge it with peft itself")
    if str(begun := config.get("init_lora_weights")).lower().startswith(TAKEN_FROM_BASE):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: init_lora_weights is {begun!r}, which changes the base too; merge it with peft"
            " itself"
        )
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a folder of peft holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    try:
        return load_file(path)
    except unreadable() as error:
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def read_marks(folder: Path) -> dict[str, str]:
    path = folder / BASE
    if not path.is_file():
        return {}
    try:
        marks = json.loads(path.read_text("utf-8"))["fingerprints"]
        return {str(dtype): str(mark) for dtype, mark in marks.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {' '.join(str(error).split())}; delete it, and the adapter merges unchecked"
        ) from None


def fingerprints(model: Model, left_out: Collection[str] = ()) -> dict[str, str]:
    """Dtype -> SHA-256 over names, shapes and SAMPLE values of each parameter, as that dtype rounds them.

    left_out: parameters that an adapter brings whole, of which the base's do not matter. Adapters in the model are
    passed over. A sample is enough: training changes nearly all values of whatever it trains, and every parameter is
    sampled, not the adapted ones alone: two models may share an encoder and differ in the rest. Training reads weights
    in fp32, merging as they are stored or in a dtype of the caller's: of one model, one of the roundings is the same.
    """
    import torch

    samples = {}
    for name, parameter in model.named_parameters():
        if MARK not in name and (plain := name.replace(WRAPPED, "")) not in left_out:
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].to("cpu")
            samples[f"{plain} {tuple(parameter.shape)}"] = sample
    marks = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        digest = hashlib.sha256()
        for name, sample in sorted(samples.items()):
            digest.update(name.encode() + sample.to(dtype).float().numpy().tobytes())
        marks[str(dtype).removeprefix("torch.")] = digest.hexdigest()
    return marks


def merge_(model: Model, adapter: Adapter, where: str | Path, source: str | Path) -> None:
    """Put an adapter into a model's weights, in fp32 and rounded once; nothing is changed where it does not fit.

    where, source: folders of the adapter and of the model. Raises: CheckpointError naming what the model does not
    have, or both folders where the adapter was trained on other weights; or a weight that its dtype cannot hold, and
    then the model is of no use any more.
    """
    import torch

    from longllava.quant import all_finite, float_places

    parameters = dict(model.named_parameters())
    wanted: dict[str, tuple[int, ...]] = {
        f"{module}.weight": (b.shape[0], a.shape[1]) for module, (a, b) in adapter.pairs.items()
    }
    wanted |= {name: tuple(tensor.shape) for name, tensor in adapter.whole.items()}
    wrong = [name for name, shape in wanted.items()
             if name not in parameters or tuple(parameters[name].shape) != tuple(shape)]  # fmt: skip
    if held := float_places(model).keys() & wrong:
        raise CheckpointError(
            f"{where}: adapters go into weights of floats, and {source} has {listed(sorted(held))} in int8; merge with"
            " the floats, then quantise"
        )
    if wrong:
        raise CheckpointError(
            f"{where}: the adapter is of another model: {listed(wrong)}; it was trained on {adapter.base!r}"
        )
    known = adapter.marks and not any(parameter.is_meta for parameter in parameters.values())
    if known and not fingerprints(model, adapter.whole).items() & adapter.marks.items():
        raise CheckpointError(
            f"{where}: the adapter was trained on other weights than those of {source}, on {adapter.base!r} as it was"
            f" then; take that model, or delete {Path(where) / BASE} to have these put together all the same"
        )
    with torch.no_grad():
        for module, (a, b) in adapter.pairs.items():
            weight = parameters[f"{module}.weight"]
            weight.copy_(weight.float() + adapter.scale * (b.float() @ a.float()).to(weight.device))
        for name, tensor in adapter.whole.items():
            parameters[name].copy_(tensor)
    if beyond := [name for name in wanted if not (parameters[name].is_meta or all_finite(parameters[name]))]:
        raise CheckpointError(
            f"{where}: merged, {listed(beyond)} has values beyond what {parameters[beyond[0]].dtype} holds; merge in"
            " torch.bfloat16 or torch.float32"
        )


def load_adapted(folder: Path, *, int8: Any = None, **where: Any) -> Model:
    """The model that an adapter was trained on, which may be an adapter's folder too, with it in the weights.

    where: as load_model takes it.
    """
    from longllava.checkpoints.load import load_model

    if int8 is not None:
        raise CheckpointError(f"{folder}: adapters go into weights of floats; merge first, then load with int8")
    adapter = read_adapter(folder)
    if not adapter.base:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path names no model; merge it by hand")
    check_ends(folder)
    model = load_model(adapter.base, **where)
    merge_(model, adapter, folder, adapter.base)
    return model


def check_ends(folder: Path) -> None:
    """Raises: CheckpointError where the bases of adapters lead back to one of them, and to no model."""
    from longllava.checkpoints.folders import find_folder

    seen: list[Path] = []
    while is_adapter(folder):
        if (real := folder.resolve()) in seen:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path leads back to this folder;"
                                  " name the model there that it was trained on")  # fmt: skip
        seen.append(real)
        base = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
        if not base:
            return  # told when it is read
        folder = find_folder(base)


def merge(base: str | Path, folder: str | Path, target: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write the model that `base` and an adapter of it make together. dtype: stored; None: as the base's.

    Raises: CheckpointError, before anything is written, where they do not belong together.
    """
    from longllava.checkpoints.folders import find_folder
    from longllava.checkpoints.load import load_model
    from longllava.checkpoints.save import save_model
    from longllava.inputs.tokenizer import Tokenizer

    folder, target = expanded(folder), expanded(target)
    adapter = read_adapter(folder)
    source = find_folder(base)
    if target.resolve() in (source.resolve(), folder.resolve()):
        raise CheckpointError(f"{target}: would be written over what it is made of; name another folder")
    model = load_model(source, dtype=dtype)
    merge_(model, adapter, folder, source)
    written = save_model(model, Tokenizer.from_folder(source, model.config.prompt), target)
    if (folder / RECORD).is_file():
        write_text(written / RECORD, (folder / RECORD).read_text("utf-8"))
    return written
