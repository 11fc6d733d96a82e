"""Where a run's numbers go beside log.jsonl: TensorBoard, wandb, trackio, by name. None needs an account."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longllava.errors import TrainingError


class Board:
    """TensorBoard. Steps after `step` (of a run that was cut off) are told to be void."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:
            raise not_imported("tensorboard", error) from None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Service:
    """wandb or trackio, which are called alike. Files stay in the run's folder until someone sends them."""

    def __init__(self, name: str, folder: Path, run: str, settings: dict[str, Any]):
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        try:
            self.module = importlib.import_module(name)
        except Exception as error:
            raise not_imported(name, error) from None
        places = {"dir": str(folder)} if name == "wandb" else {}
        self.module.init(project="longllava", name=run, config=settings, **places)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.module.log(numbers, step=step)

    def close(self) -> None:
        self.module.finish()


def not_imported(name: str, error: Exception) -> TrainingError:
    """What is installed may lack something itself, or be built for other versions of that."""
    return TrainingError(f"report_to: {name} cannot be imported ({error}); pip install {name}, or leave it out")


def open_trackers(names: Sequence[str], folder: Path, step: int, run: str, settings: dict[str, Any]) -> list[Any]:
    """Where tensorboard is not installed it is left out in silence: it is the default. Raises: TrainingError."""
    trackers: list[Any] = []
    for name in names:
        if name != "tensorboard":
            trackers.append(Service(name, folder, run, settings))
        elif importlib.util.find_spec("tensorboard") is not None:
            trackers.append(Board(folder, step))
    return trackers
