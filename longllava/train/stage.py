"""A stage from its YAML to its model folder: what it starts from, the run, and the record of it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longllava.checkpoints import find_folder, load_model, save_model, shipped_models
from longllava.checkpoints.write import check_place
from longllava.config import ModelConfig
from longllava.data.recipes import Recipe
from longllava.errors import ConfigError, TrainingError
from longllava.files import remove_unfinished, write_json
from longllava.inputs.processor import Processor
from longllava.inputs.tokenizer import Tokenizer
from longllava.quant import quantize_
from longllava.shipped import shipped
from longllava.train.config import PARTS, TrainConfig, engine_named, load_stage
from longllava.train.lock import run_lock
from longllava.train.lora import add_adapters_, base_of, save_adapter
from longllava.train.parts import FROZEN_INT8, load_part_, named_config
from longllava.train.pretrained import PRETRAINED, load_pretrained_, pretrained_folder
from longllava.train.record import RECORD, check_stage, environment, resume_facts, stage_of
from longllava.train.vision_config import is_vision

if TYPE_CHECKING:
    from longllava.evals.curriculum_task import Task
    from longllava.model import Model

EVALUATION = "evaluation.json"


def main(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Train the stage that the YAML at `path` describes; started again, a run goes on where it stopped.

    overrides: "key=value", "phases.0.steps=20", "preset=smoke" (also from the environment: PRESET=smoke).
    SIGTERM and SIGINT end the run after the current step, saved, with 128 + the signal's number.
    Raises: LongLLaVAError of some kind.
    """
    overrides = with_environment(overrides)
    if is_vision(path):
        from longllava.train import vision

        if is_chief():  # it learns in one process; `make foundation NPROC=8` starts as many as the text's
            vision.main(str(path), *overrides)
        return
    from longllava.train.loop import Stopped

    try:
        run_stage(load_stage(path, overrides))
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None


def with_environment(overrides: Sequence[str]) -> list[str]:
    """PRESET=smoke is preset=smoke, unless another one is named."""
    preset = os.environ.get("PRESET")
    named = not preset or any(item.startswith("preset=") for item in overrides)
    return list(overrides) if named else [f"preset={preset}", *overrides]


def run_stage(config: TrainConfig) -> Path:
    """Train one stage, write runs/<model>/<stage>/model, and say what it can do. Returns that folder."""
    from longllava.evals.curriculum_task import tasks_named

    tasks = tasks_named(config.evaluate)  # a misspelt one is told now, not after the last step

    model_config = model_config_of(config)
    if model_config.encoder is None:
        check_text(config, tasks)
    folder = output_folder(config, model_config)
    final = folder / "model"
    if (final / RECORD).is_file():
        print(f"{config.stage} is finished; its model is in {final}. Delete {folder} to train it again.")
        if tasks and is_chief() and not (folder / EVALUATION).is_file():  # it was stopped while it was measured
            model = load_model(final)
            tokenizer = Tokenizer.from_folder(final, model.config.prompt)
            evaluate(config, tasks, model, Processor(model.config, tokenizer), folder)
        return final
    with run_lock(folder, is_chief()):
        return run_locked(config, tasks, model_config, folder)


def check_text(config: TrainConfig, tasks: Sequence[Task]) -> None:
    """Raises: ConfigError where a stage of text wants pictures."""
    from longllava.evals.curriculum_task import draw_samples

    for task in tasks:
        if draw_samples(task, 1)[0].images:
            raise ConfigError(f"evaluate: {task.name!r} asks about pictures, and this stage's model reads text only")
    for number, phase in enumerate(config.phases):
        if phase.alignment_only:
            raise ConfigError(f"phases.{number}.alignment_only: without pictures nothing would be learned")


def run_locked(config: TrainConfig, tasks: Sequence[Task], model_config: ModelConfig, folder: Path) -> Path:
    from longllava.train.loop import train

    final = folder / "model"
    if config.lora is None:
        check_place(final)
    if is_chief():  # what was being written when a run was killed: as large as the parts that train
        for place in (folder, folder / "averaged", final):
            remove_unfinished(place)
    folders = start_folders(config, model_config)
    base = base_of(config.init_from, folders, model_config) if config.lora else ""
    processor = Processor(model_config, load_tokenizer(model_config, folders))
    if engine_named(config) == "zero3" and not is_chief() and config.frozen_dtype == "float32":
        model = empty_model(config, model_config)
    else:
        model = build_start(config, model_config, folders, processor.tokenizer)
    if config.frozen_dtype == "int8":
        quantize_(model, FROZEN_INT8)
    recipe = Recipe.load(config.recipe if Path(config.recipe).is_file() else shipped("data_recipes", config.recipe))
    facts = resume_facts(config, recipe, model_config)
    settings = {"train": dataclasses.asdict(config), "model": dataclasses.asdict(model_config)}
    started = time.monotonic()
    trained = train(config, model, processor, recipe, folder, facts, settings)
    if not is_chief():
        return final
    if engine_named(config) != "torch" or config.frozen_dtype == "int8":  # ZeRO keeps the weights in pieces
        model = build_start(config, model_config, folders, processor.tokenizer)
    model.load_state_dict(trained, strict=False)
    (folder / EVALUATION).unlink(missing_ok=True)  # of the model that this one replaces
    if config.lora is not None:
        save_adapter(model, processor.tokenizer, trained, config.lora, base, final)
    else:
        save_model(model, processor.tokenizer, final)
    record = {
        "stage": config.stage,
        "model": model_config.name,
        "steps": config.total_steps(),
        "started_from": {part: str(path) for part, path in folders.items()},
        "start_from": config.start_from,
        "trained": config.train_only,
        "frozen": config.frozen,
        **({"lora": dataclasses.asdict(config.lora), "base": base} if config.lora else {}),
        "recipe": config.recipe,
        "seed": config.seed,
        "aids": dataclasses.asdict(config.aids),
        "seconds_of_last_process": round(time.monotonic() - started, 1),
        **environment(None if config.device == "auto" else config.device),
    }
    write_json(final / RECORD, record)
    print(f"{config.stage}: the model is in {final}")
    if tasks:
        evaluate(config, tasks, model, processor, folder)
    return final


def evaluate(config: TrainConfig, tasks: Sequence[Task], model: Model, processor: Processor, folder: Path) -> None:
    """What the stage taught, on held-out pictures: printed, and kept in evaluation.json."""
    from longllava.evals.curriculum import measure
    from longllava.evals.curriculum_report import Column, as_json, print_report
    from longllava.train.loop import compute_dtype

    started = time.monotonic()
    outcomes = measure(model, processor, tasks, n_questions=config.eval_questions, dtype=compute_dtype(config),
                       tokens_per_image=config.phases[-1].tokens_per_image)  # fmt: skip
    seconds = round(time.monotonic() - started, 1)
    column = Column(config.stage, None, str(folder / "model"), {one.task: one for one in outcomes}, seconds)
    print_report([column])
    write_json(folder / EVALUATION, as_json([column], seed=0, questions_per_task=config.eval_questions))


def model_config_of(config: TrainConfig) -> ModelConfig:
    """The model a stage trains, without encoder and bridge for a stage of text."""
    model_config = dataclasses.replace(named_config(config.model), int8=None)  # what a stage writes are floats
    if config.text_only:
        model_config = dataclasses.replace(model_config, encoder=None, bridge=None, n_parameters=None)
    return model_config


def output_folder(config: TrainConfig, model_config: ModelConfig) -> Path:
    return Path(config.output) if config.output else runs_folder(config, model_config) / config.stage


def runs_folder(config: TrainConfig, model_config: ModelConfig) -> Path:
    """Where a model's stages lie; those of a preset apart, or a trial would pass for the real stage."""
    if config.output:
        return Path(config.output).parent
    return Path("runs") / "-".join(filter(None, (model_config.name, config.preset)))


def own_folder(config: TrainConfig, model_config: ModelConfig, stage: str, part: str) -> Path:
    """An earlier stage's folder; a preset's stages may start from the real ones."""
    places = [runs_folder(config, model_config)]
    if config.preset and not config.output:
        places.append(Path("runs") / model_config.name)
    for runs in places:
        if (runs / stage / "model").is_dir():
            return runs / stage / "model"
        if (runs / stage / f"{part}.safetensors").is_file():
            return runs / stage  # a foundation that is one part, not a model
    return places[0] / stage / "model"


def start_folders(config: TrainConfig, model_config: ModelConfig) -> dict[str, Path]:
    """Part -> folder it starts from. Raises: TrainingError when a folder is of another stage."""
    folders = {}
    for part in PARTS:
        stage = config.start_from.get(part) or config.start_from.get("all")
        if stage is None or getattr(model_config, part) is None:  # "all" of a stage of text is its language model
            continue
        named = config.init_from.get(part) or config.init_from.get("all")
        if stage == PRETRAINED:
            folders[part] = pretrained_folder(part, named, model_config, config.stage)
            continue
        own = own_folder(config, model_config, stage, part)
        foundation = f"{model_config.name}-foundation"
        if named is not None:
            folder = find_folder(named)
        elif own.is_dir():
            folder = own
        elif foundation in shipped_models() and stage_of(find_folder(foundation), part) == stage:
            folder = find_folder(foundation)
        else:
            raise TrainingError(f"{config.stage} starts from {stage}, and {own} is not there; train {stage} first")
        check_stage(folder, part, stage, config.stage)
        folders[part] = folder
    return folders


def load_tokenizer(model_config: ModelConfig, folders: dict[str, Path]) -> Tokenizer:
    """The tokenizer of the folder that the language model comes from, else the one shipped for the model."""
    folder = folders.get("backbone")
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        from longllava.checkpoints.load import ASSETS

        folder = ASSETS / model_config.name
    tokenizer = Tokenizer.from_folder(folder, model_config.prompt)
    if tokenizer.vocab_size > model_config.backbone.vocab_size:
        raise TrainingError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} pieces, backbone.vocab_size is"
            f" {model_config.backbone.vocab_size}; raise it"
        )
    return tokenizer


def build_start(
    config: TrainConfig, model_config: ModelConfig, folders: dict[str, Path], tokenizer: Tokenizer
) -> Model:
    """The model as the stage begins: parts from their folders in fp32, the others fresh from the seed."""
    import torch

    from longllava.model import Model
    from longllava.nn.priors import retrieval_prior_
    from longllava.train.names import name_codes_

    torch.manual_seed(config.seed)  # an encoder is as torch makes it
    model = Model(model_config)
    model.initialise_(config.seed)
    if config.aids.retrieval_prior:
        retrieval_prior_(model.backbone, config.seed)
    if config.aids.name_codes:
        codes = runs_folder(config, model_config) / config.aids.name_codes
        embeddings_VD = model.backbone.embed_tokens.weight
        name_codes_(embeddings_VD, tokenizer, codes, config.seed)
        if model.backbone.lm_head is not None:
            model.backbone.lm_head.weight.data.copy_(embeddings_VD)
    for part, folder in folders.items():
        if PRETRAINED in (config.start_from.get(part), config.start_from.get("all")):
            load_pretrained_(model, folder, part)
        else:
            load_part_(model, folder, part)
    if config.lora is not None:
        add_adapters_(model, config.lora, config.seed)
    return model


def empty_model(config: TrainConfig, model_config: ModelConfig) -> Model:
    """Of sizes alone: memory that is not written to takes no room. The first process's weights are sent into it."""
    import torch

    from longllava.model import Model

    with torch.device("meta"):
        model = Model(model_config)
    model = model.to_empty(device="cpu")
    if config.lora is not None:
        add_adapters_(model, config.lora, config.seed)
    return model


def is_chief() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
