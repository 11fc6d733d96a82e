"""Write a model as a folder. Every file is written beside its place and renamed: old or new, never a part."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from longllava.checkpoints.load import CONFIG, INDEX, WEIGHTS, stored_dtype
from longllava.errors import CheckpointError
from longllava.files import sync_folder, write_json
from longllava.inputs.tokenizer import Tokenizer
from longllava.settings import save

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longllava.model import Model

SHARD_BYTES = 5_000_000_000


def save_model(
    model: Model,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    include_encoder: bool = True,
    parts: tuple[str, ...] = (),
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write config.json, tokenizer.json and the weights into `folder` (made if need be).

    dtype: stored dtype, None as they are; SSM parameters (A_log, D, dt bias) are always fp32.
    include_encoder=False leaves out encoder.*; config.encoder.weights must then name where it is.
    parts: only parameters with these prefixes ("encoder.", "backbone."): not a whole model.
    Files are complete under temporary names before the first is renamed. Raises: CheckpointError.
    """
    folder = Path(folder)
    if not include_encoder and model.config.encoder is not None and not model.config.encoder.weights:
        raise CheckpointError("config.encoder.weights names no model: save the encoder too")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file of that name exists; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if (include_encoder or not key.startswith("encoder.")) and (not parts or key.startswith(parts))
    }
    shards = split(state, dtype, shard_bytes)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        staged = Path(temporary)
        names = shard_names(len(shards))
        for name, keys in zip(names, shards):
            write_tensors({key: state[key] for key in keys}, dtype, staged / name)
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
            write_json(staged / INDEX, {"metadata": {}, "weight_map": weight_map})
        tokenizer.save(staged)
        save(model.config, staged / CONFIG)
        for path in sorted(staged.iterdir(), key=lambda path: path.suffix == ".json"):
            os.replace(path, folder / path.name)
        remove_stale(folder, names)
    sync_folder(folder)
    return folder


def split(state: dict[str, Tensor], dtype: torch.dtype | None, shard_bytes: int) -> list[list[str]]:
    """Keys of each shard, in order, each shard at most shard_bytes (or one tensor)."""
    shards: list[list[str]] = [[]]
    used = 0
    for key, tensor in state.items():
        size = tensor.numel() * stored_dtype(key, tensor.dtype, dtype).itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    return shards


def shard_names(n: int) -> list[str]:
    return [WEIGHTS] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def write_tensors(tensors: dict[str, Tensor], dtype: torch.dtype | None, path: Path) -> None:
    from safetensors.torch import save_file

    ready = {key: tensor.detach().to("cpu", stored_dtype(key, tensor.dtype, dtype)).contiguous()
             for key, tensor in tensors.items()}  # fmt: skip
    save_file(ready, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def remove_stale(folder: Path, names: list[str]) -> None:
    """Weights of an earlier save in another number of shards would be read instead of the new ones."""
    if len(names) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    for path in (*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS):
        if path.name not in names:
            path.unlink(missing_ok=True)
