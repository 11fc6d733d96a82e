"""What a stage is: a YAML file. Which parts train, on which recipe, from which stage, in which phases."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longllava.errors import ConfigError
from longllava.settings import at_most, convert, divides, not_negative, one_of, positive, read_mapping, set_override
from longllava.settings import build as build_config
from longllava.train.lora import LoraConfig

PARTS = ("encoder", "bridge", "backbone")
MAX_THREADS = 1024  # where the system has no more, OpenMP ends the process in a crash


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """Steps with the same shape of batch.

    row_length: tokens of a packed row; rows: packed rows a step, over all processes; rows_at_once: rows in
    one forward (fewer than `rows` = gradient accumulation; 0 = all of this process's). learning_rate: after
    `warmup` steps, kept for the first `hold` of the phase, then to final_learning_rate by `decay`.
    alignment_only: the loss is the alignment aid alone, and the language model does not run: hundreds of
    pictures for the time of one.
    tasks: settings of the recipe's tasks for this phase (numbers of images, of questions).
    """

    steps: int
    row_length: int
    rows: int = 1
    rows_at_once: int = 0
    tokens_per_image: int | None = None
    learning_rate: float = 1e-3
    final_learning_rate: float | None = None
    warmup: int = 0
    hold: float = 0.0
    decay: str = "linear"
    alignment_only: bool = False
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive(self, "steps", "row_length", "rows", "learning_rate")
        not_negative(self, "rows_at_once", "final_learning_rate", "warmup")
        one_of(self, "decay", ("linear", "cosine"))
        if self.rows_at_once:
            divides(self, "rows_at_once", "rows")
        if not 0 <= self.hold <= 1:
            raise ConfigError(f"hold: got {self.hold}, a share of the phase from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. No weight decay on vectors (norms, biases) and on Mamba's A_log and D."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "eps", "clip")  # clipped to 0, a gradient is none
        not_negative(self, "weight_decay")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, must be from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class AidsConfig:
    """Losses beyond the next token. All off by default; a model card names those that were on.

    grounding_weight: of attention supervision, -log of the mass that the question's name token puts on its
    evidence.
    alignment_weight: of drawing image tokens to the word embeddings of their caption (train/alignment.py).
    retrieval_prior: a fresh backbone's attention starts by looking up equal content and copying it
    (longllava.nn.priors).
    router_weight: of the experts' load balance (Jamba's router_aux_loss_coef is 0.001).
    name_codes: the vision foundation's stage; a fresh backbone's embeddings of the world's names start as the
    codes that this encoder was trained to tell them by (longllava.train.names).
    """

    grounding_weight: float = 0.0
    alignment_weight: float = 0.0
    router_weight: float = 0.0
    retrieval_prior: bool = False
    name_codes: str | None = None

    def __post_init__(self) -> None:
        not_negative(self, "grounding_weight", "alignment_weight", "router_weight")


ENGINES = ("auto", "torch", "zero1", "zero2", "zero3")
OFFLOADS = ("none", "optimizer", "all")
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage.

    stage: its name. model: a shipped model config ("nano"), a YAML or a model folder. start_from: part ->
    name of the stage it comes from ("all" for every part); parts not named start fresh. init_from: part ->
    folder where that stage's model lies; default runs/<model>/<stage>/model, or beside `output` where that is given,
    else the shipped "<model>-foundation". frozen: modules inside the parts that train which do not
    ("backbone.embed_tokens"). recipe: a data recipe, shipped or a path. text_only: without encoder and bridge.
    dtype: of matrix products, over fp32 weights; "auto" is bfloat16 where the device multiplies it in hardware (on
    a CPU without that it is 50 times slower than fp32). threads: of torch on a CPU (0 = as torch decides); bits
    depend on their number. average_phases: numbers of phases (from 0) after which the weights are kept; the
    stage's model is their mean (none: the weights after the last step). window: steps planned together. evaluate:
    tasks of the curriculum that are measured after the last step, with eval_questions each. preset: which one was
    laid over the file; its stages lie in runs/<model>-<preset>.

    lora: parts that learn through adapters alone (train/lora.py). frozen_dtype: "int8" holds a frozen language model in
    8 bits, through which the bridge's gradients go; the stage's model has it as it was.

    report_to: where numbers go beside log.jsonl: tensorboard, trackio, wandb (offline unless WANDB_MODE is set).

    engine: "torch" (one process, or DDP), or DeepSpeed's ZeRO: "zero1" shares the optimizer's state among the
    processes, "zero2" also gradients, "zero3" also weights. "auto": what `accelerate launch` was told, else torch.
    offload: what ZeRO keeps in host memory, "optimizer" (its state) or "all" (weights too, zero3 only).
    gradient_checkpointing: a layer's activations are made again in the backward pass, and only its input is kept, in an
    encoder that trains too; offload_activations: in host memory.
    """

    stage: str
    model: str
    recipe: str
    phases: list[PhaseConfig]
    train_only: list[str]
    frozen: list[str] = field(default_factory=list)
    start_from: dict[str, str] = field(default_factory=dict)
    init_from: dict[str, str] = field(default_factory=dict)
    output: str | None = None
    seed: int = 1
    text_only: bool = False
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    aids: AidsConfig = field(default_factory=AidsConfig)
    average_phases: list[int] = field(default_factory=list)
    lora: LoraConfig | None = None
    frozen_dtype: str = "float32"
    engine: str = "auto"
    offload: str = "none"
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    feature_cache: bool = True
    window: int = 64
    save_every: int = 200
    log_every: int = 10
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    evaluate: list[str] = field(default_factory=list)
    eval_questions: int = 200
    preset: str = ""

    def __post_init__(self) -> None:
        positive(self, "window", "save_every", "log_every", "eval_questions")
        not_negative(self, "threads")
        at_most(self, threads=MAX_THREADS)
        if abs(self.seed) >= 1 << 63:
            raise ConfigError(f"seed: got {self.seed}, must be smaller than 2^63")
        one_of(self, "dtype", ("auto", "bfloat16", "float32"))
        one_of(self, "frozen_dtype", ("float32", "int8"))
        if self.frozen_dtype == "int8" and "backbone" in self.train_only:
            raise ConfigError("frozen_dtype: int8 is for a frozen language model; take backbone out of train_only")
        if self.lora is not None:
            for part in self.lora.parts:
                if part not in self.train_only:
                    raise ConfigError(f"lora.parts: {part!r} is not in train_only, where all that learns is named")
            if self.average_phases:
                raise ConfigError("average_phases: a mean of adapters is not the mean of what they do; leave it out")
        for name in self.report_to:
            if name not in TRACKERS:
                raise ConfigError(f"report_to: got {name!r}, allowed: {', '.join(TRACKERS)}")
        one_of(self, "engine", ENGINES)
        one_of(self, "offload", OFFLOADS)
        if self.offload == "all" and self.engine != "zero3":
            raise ConfigError("offload: 'all' needs engine zero3, which shares the weights; use 'optimizer'")
        if self.offload != "none" and self.engine in ("auto", "torch"):
            raise ConfigError(f"offload: {self.offload!r} needs engine zero1, zero2 or zero3; got {self.engine!r}")
        if self.offload_activations and not self.gradient_checkpointing:
            raise ConfigError("offload_activations: needs gradient_checkpointing; it moves what that keeps")
        if not self.phases:
            raise ConfigError("phases: the list is empty; a stage has at least one")
        for number in self.average_phases:
            if not 0 <= number < len(self.phases):
                raise ConfigError(f"average_phases: got {number}, phases are numbered 0 to {len(self.phases) - 1}")
        for name in self.train_only:
            if name not in PARTS:
                raise ConfigError(f"train_only: got {name!r}, allowed: {', '.join(PARTS)}")
        if not self.train_only:
            raise ConfigError(f"train_only: the list is empty; name some of {', '.join(PARTS)}")
        for key, names in (("start_from", self.start_from), ("init_from", self.init_from)):
            for name in names:
                if name not in (*PARTS, "all"):
                    raise ConfigError(f"{key}: got part {name!r}, allowed: {', '.join((*PARTS, 'all'))}")
        for name in self.init_from:
            if name not in self.start_from:
                raise ConfigError(f"init_from: part {name!r} is not in start_from; say which stage it must be")

    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[int, int]:
        """(number of the phase, step inside it) of a step counted from 0 over all phases."""
        inside = step
        for number, phase in enumerate(self.phases):
            if inside < phase.steps:
                return number, inside
            inside -= phase.steps
        raise ConfigError(f"step {step} lies after the last phase")


def engine_named(config: TrainConfig) -> str:
    """"auto" is what `accelerate launch --use_deepspeed --zero_stage N` asks for, else plain torch."""
    if config.engine != "auto":
        return config.engine
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "torch"


def load_stage(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The stage that the YAML at `path` describes, with overrides as in `read_stage`. Raises: ConfigError."""
    data = read_stage(path, overrides)
    beside = Path(path).parent / str(data.get("recipe", ""))
    if beside.is_file():  # a recipe may be named as it lies beside its stage
        data["recipe"] = str(beside)
    return build_config(TrainConfig, data, str(path))


def read_stage(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a stage's YAML; "preset=NAME" lays a preset of the file over it, then key=value overrides.

    A key may name a list's item by number: phases.0.steps=20. Raises: ConfigError.
    """
    data = read_mapping(path)
    if "sources" in data:
        raise ConfigError(f"{path}: this is a data recipe, which a stage names under recipe; train the stage's YAML")
    presets = convert(dict[str, dict[str, Any]], data.pop("presets", {}), f"{path}: presets")
    plain = []
    for override in overrides:
        key, _, name = override.partition("=")
        if key != "preset":
            plain.append(override)
        elif not name:
            continue
        elif name not in presets:
            raise ConfigError(f"{path}: no preset {name!r}; have {', '.join(presets) or 'none'}")
        else:
            data = overlaid(data, presets[name]) | {"preset": name}
    for override in plain:
        override_item(data, override)
    return data


def overlaid(data: dict, changes: dict) -> dict:
    """`changes` over `data`: mappings are merged, everything else (lists too) is replaced."""
    merged = dict(data)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlaid(merged[key], value) if both else value
    return merged


def override_item(data: dict, override: str) -> None:
    parts = override.partition("=")[0].strip().split(".")
    if len(parts) < 3 or not parts[1].isdigit():
        set_override(data, override)
        return
    items = data.get(parts[0])
    if not isinstance(items, list) or int(parts[1]) >= len(items) or not isinstance(items[int(parts[1])], dict):
        raise ConfigError(f"override {override!r}: {parts[0]} has no item {parts[1]} with keys")
    items[int(parts[1])] = dict(items[int(parts[1])])
    set_override(items[int(parts[1])], ".".join(parts[2:]) + override[len(".".join(parts)) :])


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Rate of step `step` (from 0) of a phase."""
    import math

    peak = phase.learning_rate
    if step < phase.warmup:
        return peak * (step + 1) / phase.warmup
    final = peak if phase.final_learning_rate is None else phase.final_learning_rate
    kept = max(phase.warmup, round(phase.hold * phase.steps))
    if step < kept:
        return peak
    share = (step - kept + 1) / max(1, phase.steps - kept)
    if phase.decay == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return peak + (final - peak) * share
