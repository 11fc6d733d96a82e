"""Write a model as a folder, in our own layout or a published one: old or new, never a part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.checkpoints.folders import BESIDE, listed
from longllava.checkpoints.int8 import write_manifest
from longllava.checkpoints.load import stored_dtype
from longllava.checkpoints.names import SCHEMES, Source
from longllava.checkpoints.published import published_config, write_config
from longllava.checkpoints.write import SHARD_BYTES, Output, write_folder
from longllava.config import ModelConfig
from longllava.errors import CheckpointError
from longllava.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longllava.model import Model

NATIVE = "native"


def save_model(
    model: Model,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    include_encoder: bool = True,
    parts: tuple[str, ...] = (),
    scheme: str = NATIVE,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write config.json, tokenizer.json and the weights into `folder` (made if need be).

    dtype: stored dtype, None as they are; SSM parameters (A_log, D, dt bias) are always fp32.
    include_encoder=False leaves out encoder.*; config.encoder.weights must then name where it is.
    parts: only parameters with these prefixes ("encoder.", "backbone."): not a whole model.
    scheme: the layout: "native", "longllava" (the original's), "jamba" (transformers', text only) or "llava"
    (transformers' Llava with Jamba). Raises: CheckpointError, ConfigError naming what the layout cannot express.
    """
    if not include_encoder and model.config.encoder is not None and not model.config.encoder.weights:
        raise CheckpointError("config.encoder.weights names no model: save the encoder too")
    state = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if (include_encoder or not key.startswith("encoder.")) and (not parts or key.startswith(parts))
    }
    outputs = {key: output(tensor, stored_dtype(key, tensor.dtype, dtype)) for key, tensor in state.items()}
    # before anything is written: a layout may have no word for a setting, no name for a parameter
    config, named = config_fields(model.config, scheme, outputs), renamed(outputs, scheme)

    def rest(staged: Path) -> None:
        tokenizer.save(staged)
        write_config(staged, config, model.config)
        if model.config.int8 is not None:
            write_manifest(staged)

    return write_folder(folder, named, rest, shard_bytes, BESIDE)


def output(tensor: Tensor, dtype: torch.dtype) -> Output:
    return Output(tuple(tensor.shape), dtype, lambda: tensor)


def config_fields(config: ModelConfig, scheme: str, outputs: Mapping[str, Output]) -> dict[str, Any]:
    """config.json of a layout; a language model without its bridge is described as one that reads text only."""
    if scheme == NATIVE:
        return dataclasses.asdict(config)
    if config.int8 is not None:
        raise CheckpointError(
            f"scheme {scheme}: int8 weights have no names in it; write {NATIVE}, or the model of floats"
        )
    if scheme not in SCHEMES:
        raise CheckpointError(f"scheme {scheme!r}; allowed: {', '.join((NATIVE, *SCHEMES))}")
    if not any(key.startswith("bridge.") for key in outputs):
        config = dataclasses.replace(config, encoder=None, bridge=None)
    return published_config(config, scheme)


def renamed(outputs: Mapping[str, Output], scheme: str) -> dict[str, Output]:
    """Our parameters under the names of a scheme, joined ones taken apart."""
    if scheme == NATIVE:
        return dict(outputs)
    namings = {naming.part: naming for naming in SCHEMES[scheme]}
    theirs: dict[str, Output] = {}
    nameless = []
    for key, one in outputs.items():
        naming = namings.get(key.split(".", 1)[0])
        source = naming.source(key, one.shape) if naming else None
        if source is None:
            nameless.append(key)
        else:
            theirs |= taken_apart(one, source)
    if nameless:
        raise CheckpointError(f"the layout {scheme} has no name for {len(nameless)} parameters: {listed(nameless)}")
    return theirs


def taken_apart(one: Output, source: Source) -> dict[str, Output]:
    n = len(source.names)

    def maker(k: int) -> Callable[[], Tensor]:
        return lambda: one.make().chunk(n)[k].reshape(source.shapes[k])

    return {name: Output(source.shapes[k], one.dtype, maker(k)) for k, name in enumerate(source.names)}
