"""What a run knows of itself: the record in a model's folder, the machine, the library's commit."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.checkpoints.folders import RECORD
from longllava.checkpoints.int8 import sha256
from longllava.choices import checked_device
from longllava.data.worlds.sheets import STYLES
from longllava.errors import TrainingError
from longllava.version import __version__

if TYPE_CHECKING:
    from longllava.config import ModelConfig
    from longllava.data.recipes import Recipe
    from longllava.train.config import TrainConfig

# what may differ between a run and its going on: nothing, or the rounding alone
FREE = ("output", "preset", "save_every", "log_every", "report_to", "evaluate", "eval_questions", "device", "threads",
        "recipe", "feature_cache", "engine", "offload", "gradient_checkpointing", "offload_activations")  # fmt: skip


def read_record(folder: Path) -> dict[str, Any]:
    """How the model in `folder` came to be; empty where nothing readable says so."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def stage_of(folder: Path, part: str) -> str | None:
    """The stage that a part of the model in `folder` comes from; None where nothing says so."""
    record = read_record(folder)
    return record.get("parts", {}).get(part, record.get("stage"))


def check_stage(folder: Path, part: str, wanted: str, stage: str) -> None:
    """A folder's record names its stage, and where it was put together from several, that of each part.

    A folder that holds one part only (<part>.safetensors) is named after its stage.
    """
    if (folder / f"{part}.safetensors").is_file() and folder.name == wanted:
        return
    if not read_record(folder):
        raise TrainingError(f"{folder}: no {RECORD} that says which stage it is of; {stage} needs {wanted}")
    found = stage_of(folder, part)
    if found != wanted:
        raise TrainingError(f"{stage} starts its {part} from {wanted}; {folder} is of {found}")


def resume_facts(config: TrainConfig, recipe: Recipe, model: ModelConfig) -> dict[str, Any]:
    """What a run must keep to be the same run. Of the recipe, what decides samples and their order; files may move.

    Not the number of processes: they share a step's rows and add their gradients, so that only rounding differs. Nor
    of threads, which launchers set (torchrun to 1).
    """
    facts = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    facts["samples"] = [
        {"source": row.name, "weight": row.weight, "n_samples": source.n_samples, "task": row.task, "split": row.split,
         "seed": row.seed, "settings": row.settings}
        for row, source in zip(recipe.config.sources, recipe.sources, strict=True)
    ]  # fmt: skip
    facts["pictures"] = dataclasses.asdict(recipe.config.pictures)
    if any(row.kind == "world" for row in recipe.config.sources):  # pictures of which are drawn from sheets
        own = [style for style in recipe.config.pictures.styles if style not in STYLES]
        facts["sheets"] = {style: sha256(Path(style))[:12] for style in own}
    # apart from `samples`, which older checkpoints hold without these
    facts["reading"] = [
        {"media": dataclasses.asdict(row.media), "columns": row.columns, "question": row.question, "marks": row.marks}
        for row in recipe.config.sources
    ]
    facts["streaming"] = [row.streaming for row in recipe.config.sources]  # samples come in another order then
    facts["duplicates"] = [row.duplicates for row in recipe.config.sources]  # count is drawn after
    facts["versions"] = [{"subset": row.subset, "revision": row.revision} for row in recipe.config.sources]
    facts["architecture"] = architecture(model)
    return json.loads(json.dumps(facts))  # tuples become lists, as they come back from a checkpoint


def architecture(model: ModelConfig) -> dict[str, Any]:
    """What a model is, whatever its file is called and wherever its encoder is kept."""
    found = dataclasses.asdict(model)
    if found["encoder"] is not None:
        del found["encoder"]["weights"]
    return {part: found[part] for part in ("encoder", "bridge", "backbone", "fusion", "prompt")}


def environment(device: Any = None) -> dict[str, Any]:
    """device: what the work ran on, by default a GPU if there is one. Raises: InputError for one that is not there."""
    import torch

    target = checked_device(device)
    return {
        "longllava": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}", "processor": processor(),
        "device": torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "commit": commit(), "command": command(), "packages": packages(),
    }  # fmt: skip


def packages() -> dict[str, str]:
    """Versions of what a run's numbers may depend on."""
    found = {}
    for name in ("accelerate", "deepspeed", "numpy", "peft", "pillow", "safetensors", "tokenizers", "transformers",
                 "triton"):  # fmt: skip
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def command() -> str:
    """What was typed, without the folders of the machine it was typed on."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.name == "__main__.py":  # python -m longllava, python -m longllava.train, or another's
        parts = path.parent.parts
        first = len(parts) - 1 - (parts[::-1].index("longllava") if "longllava" in parts else 0)
        name = "-m " + ".".join(parts[first:])
    else:
        name = path.name
    return " ".join((name, *arguments))


def commit() -> str | None:
    """The library's commit, with "+" when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    try:
        name = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + "+" * bool(changed.stdout.strip())


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
