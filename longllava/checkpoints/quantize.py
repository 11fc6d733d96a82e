"""A model folder of floats, of any layout, into one of int8 weights in our own."""

from __future__ import annotations

from pathlib import Path

from longllava.checkpoints.convert import open_source, write_layout
from longllava.checkpoints.load import load_model
from longllava.checkpoints.placing import most_stored
from longllava.checkpoints.save import NATIVE, output
from longllava.checkpoints.write import SHARD_BYTES
from longllava.config import Int8Config
from longllava.errors import CheckpointError
from longllava.files import expanded


def quantize_folder(
    source: str | Path,
    target: str | Path,
    config: Int8Config | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the int8 form of a folder; what stays in floats keeps its stored dtype.

    In memory: the int8 model and twice its largest tensor. What from_pretrained makes of the result is, bit for bit,
    what it makes of the source with int8=config. Raises: CheckpointError, ConfigError.
    """
    floats = open_source(source)
    if floats.model.config.int8 is not None:
        raise CheckpointError(f"{floats.folder}: its weights are int8 already; quantise the floats they came from")
    if expanded(target).resolve() == floats.folder.resolve():
        raise CheckpointError(f"{target}: source and target are one folder; give another to write into")
    import torch

    from longllava.quant import float_places

    half = most_stored(floats.places.stored.values()) == torch.float16  # which no int8 model is loaded in
    model = load_model(floats.folder, int8=config or Int8Config(), dtype=torch.float32 if half else None)
    if not float_places(model):  # it would say int8 and hold none
        raise CheckpointError(f"{floats.folder}: keep and parts leave no layer to become int8; keep fewer")
    outputs = {
        key: output(tensor, floats.dtype(key, None) if key in floats.places.sources else tensor.dtype)
        for key, tensor in model.state_dict().items()
    }
    return write_layout(floats, model.config, outputs, target, NATIVE, shard_bytes)
