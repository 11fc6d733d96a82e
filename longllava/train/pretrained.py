"""Parts that start from weights of no stage of ours: a published language model, a vision tower, a whole model.

    start_from: {encoder: pretrained, backbone: pretrained}
    init_from: {backbone: ai21labs/AI21-Jamba-Reasoning-3B}     # a folder or a name; the encoder's is in its config

Any layout that checkpoints/ reads will do; which stage it is of is not asked, only whether it fits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longllava.checkpoints import find_folder
from longllava.checkpoints.load import load_weights_
from longllava.config import ModelConfig
from longllava.errors import TrainingError

if TYPE_CHECKING:
    from longllava.model import Model

PRETRAINED = "pretrained"


def pretrained_folder(part: str, named: str | None, model_config: ModelConfig, stage: str) -> Path:
    if named is None and part == "encoder" and model_config.encoder is not None:
        named = model_config.encoder.weights
    if named is None:
        raise TrainingError(f"{stage} starts its {part} from pretrained weights; say whose: init_from.{part}=FOLDER")
    return find_folder(named)


def load_pretrained_(model: Model, folder: Path, part: str) -> None:
    """Read one part in fp32. Raises: CheckpointError listing what does not fit."""
    import torch

    load_weights_(model, folder, parts=(f"{part}.",), dtype=torch.float32)
