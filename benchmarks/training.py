"""Training speed: a stage by this library's loop, and the same model under transformers' Trainer, in one run.

    python benchmarks/training.py --save benchmarks/results/training-cpu.json

The model is nano without qk_norm and log_length_scale, which transformers' Jamba does not have; encoder frozen, bridge
and language model train in fp32, image features cached, rows of packed samples of nano's stage 3. Trainer gets the
same rows through the same bridge, and JambaForCausalLM with the same weights; it cannot keep packed samples apart, so
first one row, read as a single sample by both, must have the same loss and the same gradients, or nothing is timed.
Steps alternate between short runs of both. tokens/s are of whole steps: forward, backward, clipping, AdamW.

Rows are of 512 tokens, where the stage's own have 2,048 and more: transformers' scan walks the tokens in Python, and
the gradient of each token's slice is a tensor as large as the whole, so that its time grows with the square of the
length (24 tokens/s at 512; at 2,048 one step did not end within six minutes), and ours does not.
"""

import _environment  # noqa: F401

import contextlib
import dataclasses
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _options import check_target
from torch import Tensor, nn

from longllava.cli import run
from longllava.errors import LongLLaVAError

TOLERANCE = 1e-4  # of the loss, and of the gradients' norm
BRIDGE = "bridge.up.weight"


class Spliced(nn.Module):
    """Our embedding, bridge and splice before transformers' language model: what its Trainer trains."""

    def __init__(self, model: Any, language_model: Any):
        super().__init__()
        self.bridge, self.language_model = model.bridge, language_model
        self.ours = [model]  # not a submodule: its own backbone does not train here

    def forward(self, batch: Any = None, pictures: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        (model,) = self.ours
        images_NMD = None if pictures is None else model.image_tokens(pictures, None)
        embed, model.backbone.embed_tokens = model.backbone.embed_tokens, self.language_model.model.embed_tokens
        x_BLD = model.embed(batch.ids_BL, batch.spans, images_NMD)
        model.backbone.embed_tokens = embed
        logits_BLV = self.language_model(inputs_embeds=x_BLD, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BLV.flatten(0, 1).float(), batch.labels_BL.flatten())
        return {"loss": loss}


def prepare(folder: Path, row_length: int, n_rows: int) -> tuple[Any, Any, list[tuple[Any, Tensor | None]], Path]:
    """The stage's YAML, our model in two layouts, and rows with their features."""
    import yaml

    from longllava.checkpoints import find_folder, save_model
    from longllava.checkpoints.convert import convert_layout
    from longllava.config import ModelConfig
    from longllava.data.recipes import Recipe
    from longllava.inputs.processor import Processor
    from longllava.inputs.tokenizer import Tokenizer
    from longllava.model import Model
    from longllava.settings import load, save
    from longllava.shipped import shipped
    from longllava.train.config import load_stage
    from longllava.train.feed import Feed, Pictures

    config = load(ModelConfig, shipped("configs", "models/nano.yaml"))
    backbone = dataclasses.replace(config.backbone, qk_norm=False, log_length_scale=False)
    encoder = dataclasses.replace(config.encoder, weights=None)
    config = dataclasses.replace(config, backbone=backbone, encoder=encoder, n_parameters=None)
    save(config, folder / "nano.json")
    shipped_stage = yaml.safe_load(shipped("configs", "train/nano/stage3.yaml").read_text("utf-8"))
    phase = {**shipped_stage["phases"][0], "steps": n_rows, "row_length": row_length, "tokens_per_image": None}
    stage = {"stage": "stage3", "model": str(folder / "nano.json"), "recipe": "nano/stage3", "seed": 3,
             "train_only": ["bridge", "backbone"], "device": "cpu", "dtype": "float32", "phases": [phase],
             "output": str(folder / "run"), "log_every": 1, "save_every": 10**6}  # fmt: skip
    path = folder / "stage.yaml"
    path.write_text(yaml.safe_dump(stage), "utf-8")
    stage_config = load_stage(path)
    torch.manual_seed(0)
    model = Model(config)
    model.initialise_(0)
    tokenizer = Tokenizer.from_folder(find_folder("nano"), config.prompt)
    convert_layout(save_model(model, tokenizer, folder / "ours"), folder / "theirs", "jamba", text_only=True)
    processor = Processor(config, tokenizer)
    feed = Feed(stage_config, Recipe.load(shipped("data_recipes", "nano/stage3")), processor)
    pictures = Pictures(stage_config, model, processor, torch.device("cpu"), torch.float32)
    rows = []
    for _, plan in feed.windows():
        pictures.prepare(plan.references(), print)
        for step in plan.steps:
            (batch,) = feed.batches(step, plan.row_length, 0)
            rows.append((batch, pictures.of(batch.refs)))
    return stage_config, model, rows, folder / "theirs"


def check_equal(model: Any, spliced: Spliced, batch: Any, pictures: Tensor | None) -> dict[str, float]:
    """Loss and gradients of one row as a single sample, by both. Raises: LongLLaVAError when they differ."""
    from longllava.train.config import AidsConfig
    from longllava.train.loop import Forward

    single = dataclasses.replace(batch, seq_idx_BL=torch.zeros_like(batch.seq_idx_BL))
    found = []
    for module in (Forward(model, AidsConfig()), spliced):
        module.zero_grad()
        out = module(single, pictures, None) if module is not spliced else module(single, pictures)["loss"]
        loss = out[0] / batch.n_labels if module is not spliced else out
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
        found.append((float(loss.detach()), float(norm)))
        module.zero_grad()
    (loss, norm), (their_loss, their_norm) = found
    error = max(abs(loss - their_loss) / loss, abs(norm - their_norm) / norm)
    if not error < TOLERANCE:
        raise LongLLaVAError(f"not the same model: loss {loss} and {their_loss}, gradient {norm} and {their_norm}")
    return {"loss": loss, "their_loss": their_loss, "gradient_norm": norm, "their_gradient_norm": their_norm}


def seconds_of_ours(config: Any, model: Any, rows: list[Any]) -> float:
    """One step by the parts of longllava.train.loop, for each row."""
    from longllava.train.loop import Forward
    from longllava.train.optimizer import build_optimizer, select_parts

    parameters = select_parts(model, config.train_only, config.frozen)
    optimizer, forward = build_optimizer(parameters, config.optimizer), Forward(model, config.aids)
    started = time.perf_counter()
    for batch, pictures in rows:
        loss, _ = forward(batch, pictures, None)
        (loss / batch.n_labels).backward()
        nn.utils.clip_grad_norm_([p for _, p in parameters], config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def seconds_of_trainer(spliced: Spliced, rows: list[Any], folder: Path) -> float:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=1, max_steps=len(rows), use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
        optim="adamw_torch_fused", dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"batch": batch, "pictures": pictures} for batch, pictures in rows]
    trainer = Trainer(spliced, arguments, train_dataset=data, data_collator=lambda items: items[0])
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return time.perf_counter() - started


def training(
    row_length: Annotated[int, typer.Option(min=64, help="Tokens of a packed row, one row a step.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of both, in turns; the medians count.")] = 3,
    save: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Tokens a second of stage 3, by this library and by transformers' Trainer."""
    check_target(save)
    from transformers import JambaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="longllava-training-") as temporary:
        folder = Path(temporary)
        os.environ.setdefault("LONGLLAVA_CACHE", str(folder / "cache"))
        config, model, rows, theirs = prepare(folder, row_length, steps)
        language_model = JambaForCausalLM.from_pretrained(theirs, dtype=torch.float32)
        spliced = Spliced(model, language_model)
        for parameter in model.encoder.parameters():
            parameter.requires_grad_(False)
        equality = check_equal(model, spliced, *rows[0])
        print(f"the same model: {json.dumps(equality)}")
        n_tokens = sum(batch.n_tokens for batch, _ in rows)
        runs: dict[str, list[float]] = {"longllava": [], "transformers Trainer": []}
        seconds_of_ours(config, model, rows[:1])  # buffers and threads
        for _ in range(rounds):
            runs["longllava"].append(seconds_of_ours(config, model, rows))
            runs["transformers Trainer"].append(seconds_of_trainer(spliced, rows, folder))
    rates = {name: n_tokens / statistics.median(seconds) for name, seconds in runs.items()}
    ratio = statistics.median(b / a for a, b in zip(*runs.values(), strict=True))
    for name, rate in rates.items():
        print(f"{name:22} {rate:9,.0f} tokens/s")
    print(f"longllava is {ratio:.1f} times as fast")
    if save is not None:
        from longllava.files import write_json
        from longllava.train.record import environment

        report = {**environment("cpu"), "row_length": row_length, "steps": steps, "tokens_of_a_run": n_tokens,
                  "the_same_model": equality, "seconds": runs, "tokens_per_second": rates, "ratio": ratio}  # fmt: skip
        print(write_json(save, report))


if __name__ == "__main__":
    run(lambda: typer.run(training), "training")
