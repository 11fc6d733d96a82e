"""One stage of training, read from top to bottom. Every batch is a pure function of (recipe, seed, step).

The engine (train/engines.py) says how many processes share it, and how: plain torch, DDP or ZeRO, without other code.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from longllava.checkpoints.adapters import fingerprints
from longllava.data.packing import Batch, Misfit, Plan
from longllava.data.recipes import Recipe
from longllava.errors import InputError, TrainingError
from longllava.files import write_json, write_text
from longllava.heap import give_back
from longllava.inputs.processor import Processor
from longllava.model import Model
from longllava.nn.recompute import Recomputing
from longllava.train.checkpoints import latest_state, save_state
from longllava.train.config import TrainConfig, learning_rate
from longllava.train.engines import open_engine
from longllava.train.feed import Feed, Pictures, uneven_rows
from longllava.train.forward import Forward
from longllava.train.log import Meter, TrainingLog
from longllava.train.memory import estimate
from longllava.train.optimizer import select_parts
from longllava.train.record import FREE, environment
from longllava.train.speed import Cost, peak_operations
from longllava.train.state import average_weights, compare, frozen_marks, keep_weights

QUARANTINE, LEFT_OUT = "quarantine.txt", "left-out.tsv"
NOT_FINITE_IN_A_ROW = 10  # a run that diverged must end in an error, not run on without learning


class Stopped(Exception):
    """SIGTERM or SIGINT came, and the run is saved. code: what the process ends with, 128 + the signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.code = 128 + number


def train(
    config: TrainConfig,
    model: Model,
    processor: Processor,
    recipe: Recipe,
    folder: Path,
    facts: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """Run a stage to its end, from the newest checkpoint in `folder`/checkpoints or from the start.

    model: as the stage begins. facts: kept in every checkpoint; a run goes on only with the same ones.
    settings: stage and model as resolved, kept in the folder, where those of a run that may not go on are not written.
    Returns the weights of the parts that trained, on the first process.
    Raises: TrainingError; Stopped after SIGTERM or SIGINT, when all is saved.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = compute_dtype(config)
    engine = open_engine(config, dtype)
    chief = engine.rank == 0
    if uneven := uneven_rows(config, engine.world):
        raise TrainingError(uneven)
    for number, phase in enumerate(config.phases):
        if phase.tokens_per_image is not None and model.bridge is not None:
            try:  # else every sample with a picture would be left out, one by one
                processor.tokens_per_image(phase.tokens_per_image)
            except InputError as error:
                raise TrainingError(f"phases.{number}.{error}") from None
    if config.device not in ("auto", engine.device.type):
        raise TrainingError(f"device: got {config.device!r}, but this run is on {engine.device.type}; set device: auto")

    parameters = select_parts(model, config.train_only, config.frozen)
    for part in model.children():
        if isinstance(part, Recomputing):
            part.gradient_checkpointing = config.gradient_checkpointing
            part.offload_activations = config.offload_activations
    checkpoints = folder / "checkpoints"
    # the first process's: others may hold sizes alone
    marks = engine.gather([fingerprints(model, {name for name, _ in parameters})["float32"][:12]])
    facts = {**facts, "frozen_weights": marks[0]}
    state = engine.share(lambda: latest_state(checkpoints))
    if state is not None:  # before its weights are read: those of another rank or part do not fit
        kept = {name: fact for name, fact in state.facts.items() if name not in FREE}  # older runs kept more
        compare(kept, facts, state.step)
    if chief:  # the others may not be able to write there
        write_json(folder / "config.json", settings)
        write_json(folder / "environment.json", environment(engine.device))
        if state is None:  # lists of a run that left no checkpoint, or whose checkpoints were deleted
            for name in (QUARANTINE, LEFT_OUT):
                (folder / name).unlink(missing_ok=True)
        # a run that goes on does not open again what was found broken before
        recipe.write_rejected(folder / QUARANTINE, add=state is not None)
    engine.prepare(Forward(model, config.aids, evenly=engine.evenly), parameters, state)
    frozen = frozen_marks(model, engine.whole)
    feed = Feed(config, recipe, processor, engine.rank, engine.world)
    step, total, missed = 0, config.total_steps(), 0
    if state is not None:
        step, feed.first_step, feed.begin = state.step, state.first_step, state.begin
        state = None  # of a large model hundreds of gigabytes of the first process's memory
    pictures = Pictures(config, model, processor, engine.device, dtype)

    with (
        TrainingLog(folder, step=step, total_steps=total, label=config.stage, active=chief,
                    report_to=config.report_to, settings=facts) as log,
        Signals() as signals,
    ):
        peak, source = peak_operations(engine.device, dtype)
        meter, cost = Meter(peak * engine.world), Cost(config, model.config)
        need = estimate(config, model.config, engine.world, dtype.itemsize)
        log.say(f"{config.stage}: estimated memory of a process {need}; mfu is of {peak:.3g} operations/s, {source}")
        if step:
            log.say(f"{config.stage}: goes on after step {step}")
        saved = recorded = step

        def record() -> None:
            nonlocal recorded
            if step != recorded:
                phase = config.phase_at(step - 1)[0]
                log.write(step, {**meter.take(engine.gather), "norm": norm, "rate": rate, "phase": phase})
                give_back()
            recorded = step

        def save() -> None:
            nonlocal saved
            record()  # what was measured is in no checkpoint: a run that goes on would leave it out of the next one
            state = engine.state(facts, step=step, first_step=feed.first_step, begin=feed.begin)
            if chief:
                save_state(checkpoints, state)
                list_left_out(folder / LEFT_OUT, feed.misfits)
                recipe.write_rejected(folder / QUARANTINE, add=True)
            saved = step

        def end_if(stop: int) -> None:
            """A process was told to end by the signal `stop`, if it is not 0: all end, before the same step."""
            if not stop:
                return
            if step != saved:
                save()
            log.say(f"{config.stage}: {f'saved after step {step}' if step else 'ended before the first step'};"
                    " start it again to go on")  # fmt: skip
            engine.wait()  # a launcher ends the others when one has ended
            raise Stopped(stop)

        for start, plan in feed.windows(lambda: signals.number):
            end_if(max(engine.gather([signals.number])))  # also where no window comes, below
            same_plan(engine, config.stage, start, plan)
            if plan.misfits:
                log.say(f"{config.stage}: left out before step {start + len(plan.steps)}, listed in {LEFT_OUT}: "
                        f"{plan.told()}")  # fmt: skip
            pictures.prepare(plan.references(engine.rank, engine.world), log.say, lambda: signals.number)
            meter.resume()
            for rows in plan.steps[step - start :]:
                number, inside = config.phase_at(step)
                phase = config.phases[number]
                torch.manual_seed(step_seed(config.seed, step, engine.rank))
                batches = feed.batches(rows, plan.row_length, phase.rows_at_once)
                # all divide by the same number, and all end before the same step
                counts = engine.gather([(sum(batch.n_labels for batch in batches), signals.number)])
                end_if(max(number for _, number in counts))
                n_labels = sum(labels for labels, _ in counts)
                bad = []
                for index, batch in enumerate(batches):
                    inputs = (batch.to(engine.device), pictures.of(batch.refs),
                              phase.tokens_per_image, phase.alignment_only)  # fmt: skip
                    measured = engine.run(inputs, scale=1 / max(1, n_labels), last=index == len(batches) - 1)
                    bad += [] if math.isfinite(measured["loss"]) else batch.sample_ids
                    meter.add(measured, batch.n_tokens, batch.n_labels, cost.of(batch, phase))
                rate = learning_rate(phase, inside)
                norm = engine.step(rate)
                step += 1
                missed = 0 if math.isfinite(norm) else missed + 1
                if missed:
                    told = not_finite(engine, step, bad, batches)
                    log.say(told)
                    if missed == NOT_FINITE_IN_A_ROW:
                        raise TrainingError(f"{config.stage}: {missed} steps in a row; {told}")
                log.step(step)
                ends = inside + 1 == phase.steps  # a record is of one phase: losses of two are not of one kind
                if step % config.log_every == 0 or ends:
                    record()
                if ends and number in config.average_phases:
                    tensors = engine.trained()
                    if chief:
                        keep_weights(folder / "averaged", tensors, number)
                if step % config.save_every == 0 or step == total:
                    save()
        end_if(max(engine.gather([signals.number])))
    for name, expected in frozen_marks(model, engine.whole).items():
        if frozen[name] != expected:
            raise TrainingError(f"{name} changed although it was frozen; this is an error of the library")
    tensors = engine.trained()
    if chief and config.average_phases:
        tensors = average_weights(folder / "averaged", tensors, config.average_phases)
    engine.wait()
    return tensors


def same_plan(engine: Any, stage: str, start: int, plan: Plan) -> None:
    """Every process plans by itself. Raises: TrainingError where one, which could not read a file, planned other rows:
    of these some would be trained on twice, others never."""
    plans = engine.gather([(plan.mark(), plan.told())])
    if len({mark for mark, _ in plans}) > 1:
        told = "; ".join(f"process {rank} left out {text or 'nothing'}" for rank, (_, text) in enumerate(plans))
        raise TrainingError(f"{stage}: processes planned different rows from step {start + 1} on; {told}; all of them"
                            " must find the same files")  # fmt: skip


def list_left_out(path: Path, misfits: Sequence[Misfit]) -> None:
    """Add to a file, which a run that goes on finds there, what is not in it."""
    told = path.read_text("utf-8").splitlines() if path.is_file() else []
    found = ["\t".join(" ".join(text.split()) for text in (one.source, one.id, one.why)) for one in misfits]
    if lines := dict.fromkeys([*told, *found]):
        write_text(path, "".join(f"{line}\n" for line in lines))


def step_seed(seed: int, step: int, rank: int) -> int:
    """What draws in a step (dropout) draws the same when the step is taken again.

    torch's generator on a CPU reads the low 32 bits alone: they differ between steps and processes of a run, and, by
    where it begins, between runs.
    """
    return (random.Random(f"steps {seed}").getrandbits(62) + (step << 12) + rank) % (1 << 62)


def not_finite(engine: Any, step: int, bad: list[str], batches: list[Batch]) -> str:
    """Which samples it was, of all processes: those whose loss is not finite, else all of the step."""
    names = engine.gather(bad) or engine.gather([name for batch in batches for name in batch.sample_ids])
    return f"step {step}: the gradient is not finite, nothing is updated; samples: {', '.join(sorted(set(names)))}"


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """What "auto" means here."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if config.device != "cpu" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class Signals:
    """Notes SIGTERM and SIGINT while a step runs; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.restore()

    def __enter__(self) -> Signals:
        self.before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread: signals are not ours
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.note)
        return self

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __exit__(self, *error: object) -> None:
        self.restore()
