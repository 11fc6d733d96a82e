"""What a stage would be, before it is: sizes, steps, memory of a process. Nothing is allocated or read but its YAML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from longllava.errors import ConfigError
from longllava.plan.memory import sized
from longllava.train.config import TrainConfig, engine_named, load_stage
from longllava.train.feed import uneven_rows
from longllava.train.memory import FLOAT, estimate, parameters_of
from longllava.train.stage import model_config_of, with_environment
from longllava.train.vision_config import is_vision

HALF = 2  # bytes of bfloat16


def preview(path: str | Path, overrides: Sequence[str] = (), processes: int | None = None) -> str:
    """For people. processes: how many share the stage; default WORLD_SIZE, or one. Raises: ConfigError."""
    if is_vision(path):
        raise ConfigError(f"{path}: --estimate is for stages; this is the vision foundation, and is not counted")
    config = load_stage(path, with_environment(overrides))
    model_config = model_config_of(config)
    world = processes or int(os.environ.get("WORLD_SIZE", "1"))
    sizes = parameters_of(model_config)
    engine = engine_named(config)
    value_bytes = value_bytes_of(config)
    need = estimate(config, model_config, world, value_bytes)
    host = FLOAT * sum(sizes.values())
    lines = [
        f"{config.stage} of {model_config.name}: {', '.join(f'{part} {n / 1e6:,.1f} M' for part, n in sizes.items())};"
        f" {', '.join(config.train_only)} learn",
        *(f"  {phase.steps:,} steps of {phase.rows} rows of {phase.row_length:,} tokens, rate {phase.learning_rate:g}"
          f" to {phase.final_learning_rate if phase.final_learning_rate is not None else phase.learning_rate:g},"
          f" {phase.warmup} steps of warm-up, {phase.decay}" for phase in config.phases),
        f"  {world} processes of {engine}{f', {config.offload} in host memory' if config.offload != 'none' else ''},"
        f" {'bfloat16' if value_bytes == HALF else 'float32'}"
        f"{', gradient checkpointing' if config.gradient_checkpointing else ''}",
        f"  memory of a process, estimated: {need}",
        f"  host memory of the first process while it reads the weights: {sized(host)}",
    ]  # fmt: skip
    if uneven := uneven_rows(config, world):
        lines.append(f"  {uneven}")
    return "\n".join(lines)


def value_bytes_of(config: TrainConfig) -> int:
    """"auto" is bfloat16 where a GPU is meant to run it, which is not this machine."""
    if config.dtype == "auto":
        return FLOAT if config.device == "cpu" else HALF
    return HALF if config.dtype == "bfloat16" else FLOAT
