"""Put a finished curriculum into shipping form: bf16, the frozen encoder stored once.

    python -m longllava.train.ship runs/nano longllava/assets

writes assets/<model>-foundation (encoder and language model before they are joined; its bridge is fresh) and
assets/<model> (bridge and language model after the last finished stage, which training.json there names; its
config names the foundation for the encoder).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from longllava.checkpoints import load_model, save_model
from longllava.checkpoints.load import CONFIG
from longllava.config import ModelConfig
from longllava.errors import LongLLaVAError, TrainingError
from longllava.files import write_json
from longllava.inputs.tokenizer import Tokenizer
from longllava.model import Model
from longllava.settings import load
from longllava.train.parts import load_part_
from longllava.train.record import RECORD

FOUNDATIONS = {"encoder": "foundation-vision", "backbone": "foundation-text"}
STAGES = ("stage3", "stage2", "stage1")  # the latest that is finished is shipped


def ship(runs: str | Path, assets: str | Path) -> list[Path]:
    """Write both folders. runs: the folder of the stages (runs/nano). Raises: TrainingError, CheckpointError."""
    runs, assets = Path(runs), Path(assets)
    finished = [runs / stage / "model" for stage in STAGES if (runs / stage / "model" / RECORD).is_file()]
    if not finished:
        raise TrainingError(f"{runs}: no finished stage there ({', '.join(reversed(STAGES))}); run make stage1 first")
    last = finished[0]
    final = load_model(last)
    config = load(ModelConfig, last / CONFIG)
    if config.encoder is None or config.encoder.weights is None:
        raise TrainingError(f"{last / CONFIG}: encoder.weights must name the foundation that holds the encoder")
    tokenizer = Tokenizer.from_folder(last, config.prompt)

    foundation = Model(config)
    foundation.initialise_()
    for part, stage in FOUNDATIONS.items():
        folder = runs / stage if part == "encoder" else runs / stage / "model"
        load_part_(foundation, folder, part)
    first = save_model(foundation, tokenizer, assets / config.encoder.weights, dtype=torch.bfloat16)
    write_json(first / RECORD, {"stage": "foundation", "parts": FOUNDATIONS})

    second = save_model(final, tokenizer, assets / config.name, dtype=torch.bfloat16, include_encoder=False)
    write_json(second / RECORD, json.loads((last / RECORD).read_text("utf-8")))
    return [first, second]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m longllava.train.ship RUNS ASSETS, for example runs/nano longllava/assets")
    try:
        for written in ship(sys.argv[1], sys.argv[2]):
            print(written)
    except (LongLLaVAError, OSError) as error:
        sys.exit(f"longllava ship: {error}")
