"""What a stage reads of a model: its sizes, and one part of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longllava.checkpoints import find_folder
from longllava.checkpoints.adapters import is_adapter
from longllava.checkpoints.load import read_entries
from longllava.checkpoints.published import read_config
from longllava.config import Int8Config, ModelConfig
from longllava.errors import TrainingError
from longllava.quant.layers import NEVER
from longllava.settings import load
from longllava.shipped import shipped, shipped_names

if TYPE_CHECKING:
    from torch import Tensor

    from longllava.model import Model

# inputs stay floats, for their gradients: rotating them would gain nothing
FROZEN_INT8 = Int8Config(parts=("backbone",), rotated=(), dynamic_from=NEVER)


def named_config(source: str) -> ModelConfig:
    """The sizes that "nano" (a shipped config), a YAML or JSON, or a model folder names. Raises: ConfigError."""
    if Path(source).is_dir() and f"models/{source}" not in shipped_names("configs"):
        return read_config(find_folder(source))
    return load(ModelConfig, source if source.endswith((".yaml", ".json")) else shipped("configs", f"models/{source}"))


def load_part_(model: Model, folder: Path, part: str) -> None:
    """Read one part into a model. Raises: TrainingError where `folder` holds that of another model."""
    tensors, module = read_part(folder, part), getattr(model, part)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    # batch norm's count of batches is no weight, and a file of weights may lack it
    missing = [name for name in shapes.keys() - tensors.keys() if not name.endswith("num_batches_tracked")]
    wrong = missing + [name for name, tensor in tensors.items() if tensor.shape != shapes.get(name)]
    if wrong:
        listed = ", ".join(sorted(wrong)[:8])
        raise TrainingError(f"{folder}: its {part} is of another model; they differ in {listed}")
    module.load_state_dict(tensors, strict=False)


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part, in fp32, without the part's name.

    Raises: TrainingError for a folder of adapters, and for a file that is torn or not there; CheckpointError.
    """
    if is_adapter(folder):
        raise TrainingError(f"{folder}: holds adapters; make a whole model of them first, with longllava merge")
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no such folder, and the {part} is read from there")
    own = folder / f"{part}.safetensors"
    files = [own] if own.is_file() else sorted({entry.file for entry in read_entries(folder).values()})
    tensors = {}
    for file in files:
        for key, tensor in read_tensors(file).items():
            if key.startswith(f"{part}."):
                tensors[key[len(part) + 1 :]] = tensor.float() if tensor.is_floating_point() else tensor
    if not tensors and part == "encoder" and (folder / "config.json").is_file():
        encoder = read_config(folder).encoder
        if encoder is not None and encoder.weights is not None:  # a frozen encoder is stored once
            return read_part(find_folder(encoder.weights), part)
    return tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Raises: TrainingError naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
