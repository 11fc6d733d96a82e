"""A tiny model of the picture world, with nano's tokenizer, and stages that train it in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from longllava.checkpoints import save_model
from longllava.checkpoints.load import ASSETS
from longllava.config import BackboneConfig, BridgeConfig, EncoderConfig, ModelConfig
from longllava.data.recipes import Recipe
from longllava.data.samples import Sample
from longllava.files import write_json
from longllava.inputs.processor import Processor
from longllava.inputs.tokenizer import Tokenizer
from longllava.model import Model
from longllava.settings import save
from longllava.shipped import shipped

TOKENIZER = ASSETS / "nano"
NAME = "nano"  # so that stages find nano's tokenizer


def world_config(n_experts: int = 1) -> ModelConfig:
    """Three layers of width 32, attention in the middle, which has experts; 16 tokens a picture, pooled to 4."""
    return ModelConfig(
        name=NAME,
        encoder=EncoderConfig(image_size=32, patch_size=8, width=16, n_layers=1, n_heads=2, mlp_width=32,
                              select_layer=-1),
        bridge=BridgeConfig(tokens_per_image=4, hidden=32),
        backbone=BackboneConfig(vocab_size=1920, width=32, n_layers=3, attention_every=3, attention_at=1, n_heads=2,
                                n_kv_heads=1, head_dim=16, mlp_width=48, state_size=4, dt_rank=4, qk_norm=True,
                                log_length_scale=True, n_experts=n_experts),
    )  # fmt: skip


def world_model(seed: int = 0, n_experts: int = 1) -> tuple[Model, Processor]:
    torch.manual_seed(seed)  # of the encoder, which initialise_ leaves as torch made it
    model = Model(world_config(n_experts))
    model.initialise_(seed)
    return model.eval(), Processor(model.config, Tokenizer.from_folder(TOKENIZER, model.config.prompt))


def world_samples(recipe: str, n: int, seed: int = 5) -> list[Sample]:
    """The first samples of a run of a shipped recipe, with few pictures each."""
    settings = {"needle": {"n_images": [2, 5], "n_questions": [2, 6]}} if recipe == "nano/stage3" else {}
    drawn = Recipe.load(shipped("data_recipes", recipe)).with_tasks(settings)
    return [drawn.sample(seed, number)[0] for number in range(n)]


def write_foundation(runs: Path, seed: int = 0) -> Path:
    """Random foundations below `runs`, as the first stage finds them."""
    model, processor = world_model(seed)
    for stage in ("foundation-vision", "foundation-text"):
        write_json(save_model(model, processor.tokenizer, runs / stage / "model") / "training.json", {"stage": stage})
    return runs


def write_stage(runs: Path, **changes: Any) -> Path:
    """The YAML of a stage that trains the tiny model from `runs`; its output is runs/<stage>."""
    runs.mkdir(parents=True, exist_ok=True)
    save(world_config(), runs / "tiny.json")
    values: dict[str, Any] = {
        "stage": "stage2", "model": str(runs / "tiny.json"), "recipe": "nano/stage2",
        "start_from": {"encoder": "foundation-vision", "backbone": "foundation-text"},
        "train_only": ["bridge", "backbone"], "device": "cpu", "dtype": "float32", "threads": 1, "window": 4,
        "save_every": 3, "log_every": 1,
        "phases": [{"steps": 6, "row_length": 192, "rows": 2, "learning_rate": 1e-2, "warmup": 2}],
    }  # fmt: skip
    values |= changes
    values.setdefault("output", str(runs / values["stage"]))
    path = runs / f"{values['stage']}.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path
