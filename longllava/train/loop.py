"""One stage of training, read from top to bottom. Every batch is a pure function of (recipe, seed, step).

Runs under `accelerate`: plain torch in one process, DDP or DeepSpeed when launched so, without other code.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from longllava.data.features import fingerprint
from longllava.data.packing import Batch
from longllava.data.recipes import Recipe
from longllava.errors import TrainingError
from longllava.files import write_text
from longllava.inputs.processor import Processor
from longllava.model import Model
from longllava.nn import Context
from longllava.train.alignment import alignment_loss
from longllava.train.checkpoints import latest_state, save_state
from longllava.train.config import AidsConfig, TrainConfig, learning_rate
from longllava.train.feed import Feed, Pictures
from longllava.train.log import Meter, TrainingLog
from longllava.train.loss import answer_loss
from longllava.train.optimizer import build_optimizer, select_parts, set_learning_rate
from longllava.train.state import (
    apply,
    average_weights_,
    compare,
    gather,
    keep_weights,
)


class Stopped(Exception):
    """SIGTERM or SIGINT came, and the run is saved. code: what the process ends with, 128 + the signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.code = 128 + number


class Forward(nn.Module):
    """Model and loss as one module, so that DDP and DeepSpeed see one forward a batch.

    Every batch has a gradient, if one of zeros: a process whose rows are all text would leave the others waiting.
    """

    def __init__(self, model: Model, aids: AidsConfig):
        super().__init__()
        self.model, self.aids = model, aids

    def forward(
        self, batch: Batch, pictures: Tensor | None, tokens_per_image: int | None, alignment_only: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The next-token loss summed over labels, plus the aids; and sums of what was measured.

        alignment_only: the alignment aid alone, without running the backbone.
        """
        model, images_NMD = self.model, None
        if pictures is not None:
            if pictures.dtype == torch.uint8:  # the encoder trains
                assert model.encoder is not None
                pictures = model.encoder(pictures)
            images_NMD = model.image_tokens(pictures, tokens_per_image)
        if alignment_only:
            assert images_NMD is not None, "a phase of alignment is fed with pictures"
            words_VD = model.backbone.embed_tokens.weight
            aligned = alignment_loss(images_NMD, batch.spans, batch.labels_BL, batch.seq_idx_BL, words_VD)
            loss = images_NMD.sum() * 0 if aligned is None else aligned * batch.n_labels
            return self.touched(loss), {"loss": loss.detach()}
        x_BLD = model.embed(batch.ids_BL, batch.spans, images_NMD)
        aided = self.aids.grounding_weight > 0 and len(batch.grounding) > 0
        context = Context(batch.seq_idx_BL, batch.positions_BL, grounding_G4=batch.grounding if aided else None)
        hidden_BLD, _ = model.backbone(x_BLD, context)
        if self.aids.alignment_weight > 0 and images_NMD is not None:
            words_VD = model.backbone.embed_tokens.weight
            aligned = alignment_loss(images_NMD, batch.spans, batch.labels_BL, batch.seq_idx_BL, words_VD)
            if aligned is not None:
                context.report("alignment", aligned)
        answers = answer_loss(model.backbone.logits, hidden_BLD, batch.labels_BL)
        loss = answers.total
        weights = {"grounding": self.aids.grounding_weight, "alignment": self.aids.alignment_weight}
        measured = {"loss": answers.total.detach(), "accuracy": answers.n_right}
        for name, value in context.losses.items():
            # aids are means, the answers' loss is a sum that is divided by its labels later
            measured[name] = value.detach() * batch.n_labels
            if name in weights:
                loss = loss + weights[name] * batch.n_labels * value
        return self.touched(loss), measured

    def touched(self, loss: Tensor) -> Tensor:
        """`loss` with a gradient: of zeros where nothing that trains took part in it."""
        if loss.requires_grad:
            return loss
        return loss + 0 * sum(p.flatten()[0] for p in self.model.parameters() if p.requires_grad)


def train(
    config: TrainConfig,
    model: Model,
    processor: Processor,
    recipe: Recipe,
    folder: Path,
    facts: dict[str, Any],
) -> None:
    """Run a stage to its end, from the newest checkpoint in `folder`/checkpoints or from the start.

    model: as the stage begins. facts: kept in every checkpoint; a run goes on only with the same ones.
    Raises: TrainingError; Stopped after SIGTERM or SIGINT, when all is saved.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import gather_object

    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    dtype = compute_dtype(config)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # text has no pictures
    )
    device, world, chief = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    for number, phase in enumerate(config.phases):
        if phase.rows % world:
            raise TrainingError(f"phases.{number}.rows: {phase.rows} rows do not divide among {world} processes")

    parameters = select_parts(model, config.train_only, config.frozen)
    frozen = {name: fingerprint(part.state_dict().items()) for name, part in model.named_children()
              if name not in config.train_only}  # fmt: skip
    model.to(device)
    model.backbone.gradient_checkpointing = config.gradient_checkpointing
    optimizer = build_optimizer(parameters, config.optimizer)
    checkpoints = folder / "checkpoints"
    step, total = 0, config.total_steps()
    feed = Feed(config, recipe, processor, accelerator.process_index, world)
    if (state := latest_state(checkpoints)) is not None:
        compare(state.facts, facts, config.phase_at(max(state.step, 1) - 1)[0] + 1)
        apply(state, model, config.train_only, optimizer)
        step, feed.first_step, feed.begin = state.step, state.first_step, state.begin
    forward, prepared = accelerator.prepare(Forward(model, config.aids), optimizer)
    pictures = Pictures(config, model, processor, device, dtype)

    with (
        TrainingLog(folder, step=step, total_steps=total, label=config.stage, active=chief) as log,
        Signals() as signals,
    ):
        meter = Meter()
        if step:
            log.say(f"{config.stage}: goes on after step {step}")
        for start, plan in feed.windows():
            pictures.prepare(plan.references(), log.say)
            meter.resume()
            for rows in plan.steps[step - start :]:
                number, inside = config.phase_at(step)
                phase = config.phases[number]
                rate = learning_rate(phase, inside)
                set_learning_rate(optimizer, rate)
                batches = feed.batches(rows, plan.row_length, phase.rows_at_once)
                n_labels, stop = sum(batch.n_labels for batch in batches), signals.number
                if world > 1:  # all divide by the same number, and all stop after the same step
                    counts = accelerator.gather(torch.tensor([[n_labels, stop]], device=device))
                    n_labels, stop = int(counts[:, 0].sum()), int(counts[:, 1].max())
                for index, batch in enumerate(batches):
                    batch = batch.to(device)
                    together = contextlib.nullcontext() if index == len(batches) - 1 else accelerator.no_sync(forward)
                    with together:
                        loss, measured = forward(
                            batch, pictures.of(batch.refs), phase.tokens_per_image, phase.alignment_only
                        )
                        # DDP averages over processes: `world` makes a sum of that
                        accelerator.backward(loss * (world / max(1, n_labels)))
                    meter.add(measured, batch.n_tokens, batch.n_labels)
                norm = accelerator.clip_grad_norm_([p for _, p in parameters], config.optimizer.clip)
                if torch.isfinite(norm):
                    prepared.step()
                else:
                    names = ", ".join(sorted({name for batch in batches for name in batch.sample_ids}))
                    log.say(f"step {step + 1}: the gradient is not finite, nothing is updated; samples: {names}")
                prepared.zero_grad()
                step += 1
                log.step(step)
                if step % config.log_every == 0 or step == total:
                    log.write(step, {**meter.take(gather_object), "norm": float(norm), "rate": rate, "phase": number})
                if chief and inside + 1 == phase.steps and number in config.average_phases:
                    keep_weights(folder / "averaged", model, config.train_only, number)
                if step % config.save_every == 0 or step == total or stop:
                    if chief:
                        state = gather(model, config.train_only, optimizer, facts, step=step,
                                       first_step=feed.first_step, begin=feed.begin)  # fmt: skip
                        save_state(checkpoints, state)
                if stop:
                    log.say(f"{config.stage}: saved after step {step}; start it again to go on")
                    accelerator.wait_for_everyone()  # a launcher ends the others when one has ended
                    raise Stopped(stop)
    if config.average_phases:
        accelerator.wait_for_everyone()
        average_weights_(folder / "averaged", model, config.train_only, config.average_phases)
    for name, expected in frozen.items():
        if fingerprint(getattr(model, name).state_dict().items()) != expected:
            raise TrainingError(f"{name} changed although it was frozen; this is an error of the library")
    if chief and feed.misfits:
        lines = [f"{misfit.source}\t{misfit.id}\t{misfit.why}\n" for misfit in feed.misfits]
        write_text(folder / "left-out.tsv", "".join(lines))


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
