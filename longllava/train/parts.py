"""What a stage reads of a model: its sizes, and one part of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longllava.checkpoints import find_folder
from longllava.checkpoints.adapters import is_adapter
from longllava.checkpoints.load import read_entries
from longllava.checkpoints.published import read_config
from longllava.config import ModelConfig
from longllava.errors import TrainingError
from longllava.settings import load
from longllava.shipped import shipped, shipped_names

if TYPE_CHECKING:
    from torch import Tensor


def named_config(source: str) -> ModelConfig:
    """The sizes that "nano" (a shipped config), a YAML or JSON, or a model folder names. Raises: ConfigError."""
    if Path(source).is_dir() and f"models/{source}" not in shipped_names("configs"):
        return read_config(find_folder(source))
    return load(ModelConfig, source if source.endswith((".yaml", ".json")) else shipped("configs", f"models/{source}"))


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part, in fp32, without the part's name. Raises: TrainingError for a folder of adapters."""
    from safetensors.torch import load_file

    if is_adapter(folder):
        raise TrainingError(f"{folder}: holds adapters; make a whole model of them first, with longllava merge")
    own = folder / f"{part}.safetensors"
    files = [own] if own.is_file() else sorted({entry.file for entry in read_entries(folder).values()})
    tensors = {}
    for file in files:
        for key, tensor in load_file(file).items():
            if key.startswith(f"{part}."):
                tensors[key[len(part) + 1 :]] = tensor.float() if tensor.is_floating_point() else tensor
    if not tensors and part == "encoder" and (folder / "config.json").is_file():
        encoder = read_config(folder).encoder
        if encoder is not None and encoder.weights is not None:  # a frozen encoder is stored once
            return read_part(find_folder(encoder.weights), part)
    return tensors
