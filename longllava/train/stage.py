"""A stage from its YAML to its model folder: what it starts from, the run, and the record of it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.checkpoints import find_folder, save_model, shipped_models
from longllava.checkpoints.load import read_entries
from longllava.config import ModelConfig
from longllava.data.recipes import Recipe
from longllava.errors import TrainingError
from longllava.files import write_json
from longllava.inputs.processor import Processor
from longllava.inputs.tokenizer import Tokenizer
from longllava.settings import load, read_mapping
from longllava.shipped import shipped
from longllava.train.config import PARTS, TrainConfig, load_stage
from longllava.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from longllava.model import Model

RECORD = "training.json"
# what may differ between a run and its going on
FREE = ("output", "save_every", "log_every", "evaluate", "eval_samples", "device", "feature_cache")


def main(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Train the stage that the YAML at `path` describes; started again, a run goes on where it stopped.

    overrides: "key=value", "phases.0.steps=20", "preset=smoke" (also from the environment: PRESET=smoke).
    SIGTERM and SIGINT end the run after the current step, saved, with 128 + the signal's number.
    Raises: LongLLaVAError of some kind.
    """
    overrides = list(overrides)
    if os.environ.get("PRESET") and not any(item.startswith("preset=") for item in overrides):
        overrides.insert(0, f"preset={os.environ['PRESET']}")
    if "stage" not in read_mapping(path):
        from longllava.train import vision

        vision.main(str(path), *overrides)
        return
    from longllava.train.loop import Stopped

    try:
        run_stage(load_stage(path, overrides))
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None


def run_stage(config: TrainConfig) -> Path:
    """Train one stage and write runs/<model>/<stage>/model. Returns that folder."""
    from longllava.train.loop import train

    model_config = model_config_of(config)
    folder = output_folder(config, model_config)
    final = folder / "model"
    if (final / RECORD).is_file():
        print(f"{config.stage} is finished; its model is in {final}. Delete {folder} to train it again.")
        return final
    folders = start_folders(config, model_config)
    processor = Processor(model_config, load_tokenizer(model_config, folders))
    model = build_start(config, model_config, folders)
    recipe = Recipe.load(config.recipe if Path(config.recipe).is_file() else shipped("data_recipes", config.recipe))
    facts = resume_facts(config)
    write_json(
        folder / "config.json",
        {"train": dataclasses.asdict(config), "model": dataclasses.asdict(model_config)},
    )
    write_json(folder / "environment.json", environment())
    started = time.monotonic()
    train(config, model, processor, recipe, folder, facts)
    save_model(model, processor.tokenizer, final)
    record = {
        "stage": config.stage,
        "model": model_config.name,
        "steps": config.total_steps(),
        "started_from": {part: str(path) for part, path in folders.items()},
        "start_from": config.start_from,
        "trained": config.train_only,
        "recipe": config.recipe,
        "seed": config.seed,
        "aids": dataclasses.asdict(config.aids),
        "seconds_of_last_process": round(time.monotonic() - started, 1),
        **environment(),
    }
    write_json(final / RECORD, record)
    print(f"{config.stage}: the model is in {final}")
    return final


def model_config_of(config: TrainConfig) -> ModelConfig:
    """The model a stage trains, without encoder and bridge for a stage of text."""
    source = config.model
    path = Path(source) if source.endswith((".yaml", ".json")) else shipped("configs", f"models/{source}")
    model_config = load(ModelConfig, path)
    if config.text_only:
        model_config = dataclasses.replace(model_config, encoder=None, bridge=None, n_parameters=None)
    return model_config


def output_folder(config: TrainConfig, model_config: ModelConfig) -> Path:
    return Path(config.output) if config.output else Path("runs") / model_config.name / config.stage


def start_folders(config: TrainConfig, model_config: ModelConfig) -> dict[str, Path]:
    """Part -> folder it starts from. Raises: TrainingError when a folder is of another stage."""
    folders = {}
    for part in PARTS:
        stage = config.start_from.get(part) or config.start_from.get("all")
        if stage is None:
            continue
        named = config.init_from.get(part) or config.init_from.get("all")
        runs = Path(config.output).parent if config.output else Path("runs") / model_config.name
        own = runs / stage / "model"
        if not own.is_dir() and (runs / stage / f"{part}.safetensors").is_file():
            own = runs / stage  # a foundation that is one part, not a model
        foundation = f"{model_config.name}-foundation"
        if named is not None:
            folder = find_folder(named)
        elif own.is_dir():
            folder = own
        elif foundation in shipped_models():
            folder = find_folder(foundation)
        else:
            raise TrainingError(f"{config.stage} starts from {stage}, and {own} is not there; train {stage} first")
        check_stage(folder, part, stage, config.stage)
        folders[part] = folder
    return folders


def check_stage(folder: Path, part: str, wanted: str, stage: str) -> None:
    """A folder's record names its stage, and where it was put together from several, that of each part.

    A folder that holds one part only (<part>.safetensors) is named after its stage.
    """
    if (folder / f"{part}.safetensors").is_file() and folder.name == wanted:
        return
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        raise TrainingError(f"{folder}: no {RECORD} that says which stage it is of; {stage} needs {wanted}") from None
    found = record.get("parts", {}).get(part, record.get("stage"))
    if found != wanted:
        raise TrainingError(f"{stage} starts its {part} from {wanted}; {folder} is of {found}")


def load_tokenizer(model_config: ModelConfig, folders: dict[str, Path]) -> Tokenizer:
    """The tokenizer of the folder that the language model comes from, else the one shipped for the model."""
    folder = folders.get("backbone")
    if folder is None or not (folder / "tokenizer.json").is_file():
        from longllava.checkpoints.load import ASSETS

        folder = ASSETS / model_config.name
    tokenizer = Tokenizer.from_folder(folder, model_config.prompt)
    if tokenizer.vocab_size > model_config.backbone.vocab_size:
        raise TrainingError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} pieces, backbone.vocab_size is"
            f" {model_config.backbone.vocab_size}; raise it"
        )
    return tokenizer


def build_start(config: TrainConfig, model_config: ModelConfig, folders: dict[str, Path]) -> Model:
    """The model as the stage begins: parts from their folders in fp32, the others fresh from the seed."""
    from longllava.model import Model
    from longllava.nn.priors import retrieval_prior_

    model = Model(model_config)
    model.initialise_(config.seed)
    if config.aids.retrieval_prior:
        retrieval_prior_(model.backbone, config.seed)
    for part, folder in folders.items():
        tensors = read_part(folder, part)
        missing, unexpected = getattr(model, part).load_state_dict(tensors, strict=False)
        # batch norm's count of batches is no weight, and a file of weights may lack it
        wrong = [*unexpected, *(name for name in missing if not name.endswith("num_batches_tracked"))]
        if wrong:
            raise TrainingError(f"{folder}: its {part} is of another model; they differ in {', '.join(wrong[:8])}")
    return model


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part, in fp32, without the part's name."""
    from safetensors.torch import load_file

    own = folder / f"{part}.safetensors"
    files = [own] if own.is_file() else sorted({entry.file for entry in read_entries(folder).values()})
    tensors = {}
    for file in files:
        for key, tensor in load_file(file).items():
            if key.startswith(f"{part}."):
                tensors[key[len(part) + 1 :]] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def resume_facts(config: TrainConfig) -> dict[str, Any]:
    """What a run must keep to be the same run."""
    import torch

    facts = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    facts["threads"] = config.threads or torch.get_num_threads()
    facts["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    return json.loads(json.dumps(facts))  # tuples become lists, as they come back from a checkpoint


def environment() -> dict[str, Any]:
    import torch

    return {
        "longllava": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(), "commit": commit(), "command": " ".join(sys.argv),
    }  # fmt: skip


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
