"""The vision foundation of nano: an encoder whose every token tells what is on the whole picture.

It stands where CLIP stands in the real recipe. Three phases, all on pictures drawn as they are needed:

  crops    the stem alone names the thing on a 56-pixel crop (a third of the cost of a picture), from the
           mean of its tokens; shapes are learned here
  whole    the whole encoder on whole pictures; thing, digit, frame colour, count and place are read from the
           mean of a random few of the pooled tokens, so that every token comes to carry everything

    longllava train nano/foundation-vision

Batch i is a pure function of (seed, phase, i), so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from longllava.bridges.pool import pool_features
from longllava.data.packing import Cursor
from longllava.data.worlds.pictures import draw_spec
from longllava.data.worlds.render import FRAME, SIDE, PictureSpec, render
from longllava.data.worlds.sheets import STYLES, sprites, things
from longllava.errors import TrainingError
from longllava.files import remove_unfinished, write_atomic, write_json
from longllava.train.checkpoints import latest_state, save_state
from longllava.train.lock import run_lock
from longllava.train.log import drop_after
from longllava.train.parts import named_config
from longllava.train.state import apply, apply_weights, compare, gather
from longllava.train.vision_config import VisionTrainConfig, load_vision
from longllava.train.vision_model import VisionFoundation

CROP = 56
LOG_EVERY = 50
PARTS = ["encoder", "readout", "crop_readout", "name_readout"]
PHASES = ("crops", "whole", "names")


class Pictures(Dataset):
    """Batches of drawn pictures with what is on them, by number."""

    def __init__(self, config: VisionTrainConfig, phase: str, split: str, styles: tuple[str, ...], first: int, n: int):
        self.config, self.phase, self.split, self.styles, self.first, self.n = config, phase, split, styles, first, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng = random.Random(f"{self.config.seed}/{self.phase}/{self.split}/{self.first + step}")
        pixels, labels = [], []
        for _ in range(self.config.batch):
            spec = random_spec(rng, self.split, self.styles, self.config.restyle if self.split == "train" else 0.0)
            if self.phase == "crops":
                spec = replace(spec, count=1, place=rng.randrange(4))
            picture = render(spec)
            if self.phase == "crops":
                picture = picture.crop(crop_box(spec, rng))
            pixels.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
            labels.append((spec.thing, none_is(spec.digit), none_is(spec.colour), spec.count - 1,
                           spec.place if spec.count == 1 else -100))  # fmt: skip
        columns = torch.tensor(labels).T
        return torch.stack(pixels), dict(zip(("thing", "digit", "colour", "count", "place"), columns, strict=True))


def none_is(value: int | None) -> int:
    return -100 if value is None else value


def random_spec(rng: random.Random, split: str, styles: tuple[str, ...], restyle: float) -> PictureSpec:
    style = rng.choice(styles)
    thing = rng.randrange(len(things()))
    while sprites(style)[thing] is None:  # a style that draws fewer things (a sheet given by path)
        thing = rng.randrange(len(things()))
    return draw_spec(rng, thing, split, style, plain=False, restyle=restyle)


def crop_box(spec: PictureSpec, rng: random.Random) -> tuple[int, int, int, int]:
    """A 56-pixel window on the corner that holds the thing."""
    slot = spec.place
    x, y = (FRAME - 2 + rng.randint(-3, 5) for _ in range(2))
    left = x if slot % 2 == 0 else SIDE - CROP - x
    top = y if slot < 2 else SIDE - CROP - y
    return left, top, left + CROP, top + CROP


def train(config: VisionTrainConfig) -> None:
    """All phases, from the newest checkpoint in the output folder. Writes encoder.safetensors and results.json."""
    out = Path(config.out)
    if (out / "results.json").is_file():
        print(f"{out} is finished. Delete it to train it again.")
        return
    with run_lock(out):
        run_locked(config, out)


def run_locked(config: VisionTrainConfig, out: Path) -> None:
    remove_unfinished(out)
    torch.manual_seed(config.seed)
    if config.n_threads:
        torch.set_num_threads(config.n_threads)
    model_config = named_config(config.model)
    if model_config.encoder is None:
        raise TrainingError(f"{config.model}: has no encoder to train")
    pool_features(torch.empty(1, model_config.encoder.grid() ** 2, 1), config.pool_tokens, "2d")  # or told after crops
    model = VisionFoundation(model_config.encoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for phase in PHASES:
        run_phase(config, model, phase, out)
    save_encoder(model, out)
    results = {style: evaluate(config, model, style) for style in STYLES}
    write_json(out / "results.json", results)
    for style, accuracy in results.items():
        print(style, {name: round(value, 4) for name, value in accuracy.items()})


def run_phase(config: VisionTrainConfig, model: VisionFoundation, phase: str, out: Path) -> None:
    steps, peak = config.steps(phase), config.learning_rate(phase)
    if phase == "crops":
        parameters = [*model.encoder.patches.parameters(), *model.crop_readout.parameters()]
    else:
        parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    start = resume(config, model, optimizer, phase, steps, out)
    if start >= steps:
        return
    if phase == "whole" and start == 0:  # what the crops taught: the table of names, and what they are read from
        model.readout.norm.load_state_dict(model.crop_readout.norm.state_dict())
        model.readout.heads["thing"].load_state_dict(model.crop_readout.heads["thing"].state_dict())
    if phase == "names" and start == 0:
        model.name_readout.begin_(model.readout.heads["thing"].get_parameter("weight"))
    pictures = Pictures(config, phase, "train", STYLES, start, steps - start)
    loader = DataLoader(pictures, batch_size=None, num_workers=1, prefetch_factor=8)
    bar = tqdm(loader, desc=f"vision: {phase}", initial=start, total=steps, unit="batch", mininterval=5)
    last_save, means = time.time(), dict[str, float]()
    before = sum(config.steps(earlier) for earlier in PHASES[: PHASES.index(phase)])
    drop_after(out / "log.jsonl", before + start)
    for step, (pixels, labels) in enumerate(bar, start):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(peak, step, steps)
        model.train()
        losses, rights = losses_of(config, model, phase, pixels, labels, step)
        loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(loss):
            raise TrainingError(f"vision {phase}: loss is {loss.item()} at step {step}; lower the learning rate")
        optimizer.step()
        for name, value in (("loss", loss.item()), *rights.items()):
            means[name] = value if name not in means else means[name] * 0.98 + value * 0.02
        bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()}, refresh=False)
        if (step + 1) % LOG_EVERY == 0:
            row = {"phase": phase, "step": before + step + 1, "time": round(time.time(), 1)}
            row |= {name: round(value, 4) for name, value in means.items()}
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                print(json.dumps(row), file=log)
        if time.time() - last_save > config.save_seconds or step + 1 == steps:
            facts = {"phase": phase, "step": step + 1, **numbers(config, model)}
            state = gather(model, PARTS, optimizer, facts, step=before + step + 1, first_step=0, begin=Cursor(0, ()))
            save_state(out / "checkpoints", state)
            last_save = time.time()


def resume(config: VisionTrainConfig, model: VisionFoundation, optimizer: torch.optim.Optimizer, phase: str, steps: int,
           out: Path) -> int:  # fmt: skip
    """Steps of this phase that are done. Raises: TrainingError when the run was begun with other numbers."""
    state = latest_state(out / "checkpoints")
    if state is None:
        return 0
    now = numbers(config, model)
    compare({name: fact for name, fact in state.facts.items() if name in now}, now, 0)
    if state.facts["phase"] == phase:
        apply(state, model, PARTS, optimizer)
        return int(state.facts["step"])
    if PHASES.index(state.facts["phase"]) > PHASES.index(phase):
        return steps
    apply_weights(state, model, PARTS)  # of the phase before, with a fresh optimizer
    return 0


def numbers(config: VisionTrainConfig, model: VisionFoundation) -> dict[str, Any]:
    """What a run that goes on must share with its beginning, as it comes back from a checkpoint."""
    free = ("out", "save_seconds", "n_threads", "n_test")
    found = {name: value for name, value in asdict(config).items() if name not in free}
    encoder = {name: value for name, value in asdict(model.config).items() if name != "weights"}
    return json.loads(json.dumps({**found, "encoder": encoder}))


def losses_of(config: VisionTrainConfig, model: VisionFoundation, phase: str, pixels: Tensor, labels: dict, step: int):
    if phase == "crops":
        logits = {"thing": model.crops(pixels)}
    else:
        easy = phase == "whole" and step < config.easy_share * config.whole_steps
        few, many = (max(1, config.pool_tokens // 2), config.pool_tokens) if easy else (1, config.max_tokens_read)
        seed = (config.seed * 1_000_003 + step) % (1 << 64)
        pick = random_means(len(pixels), config.pool_tokens, few, many, seed)
        logits = model.whole(pixels, config.pool_tokens, pick, by_name=phase == "names")
    losses = {name: F.cross_entropy(value, labels[name], ignore_index=-100) for name, value in logits.items()}
    if phase == "names":
        true = F.one_hot(labels["thing"], len(things())).float()
        losses["names"] = F.binary_cross_entropy_with_logits(logits["thing"], true, reduction="sum") / len(true)
    with torch.no_grad():
        rights = {name: accuracy(value, labels[name]) for name, value in logits.items()}
    return losses, rights


def random_means(n: int, n_tokens: int, few: int, many: int, seed: int) -> Tensor:
    """Weights (N, T) that average a random `few` to `many` of T tokens, another choice for each picture."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, n_tokens, generator=generator).argsort(1).argsort(1)
    counts = torch.randint(few, many + 1, (n, 1), generator=generator)
    return (order < counts).float() / counts


def one_cycle(peak: float, step: int, steps: int) -> float:
    """Warm-up over 5 %, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    right, known = n_right(logits, labels)
    return int(right) / max(1, int(known))


def n_right(logits: Tensor, labels: Tensor) -> Tensor:
    """(2,): how many are right, and how many labels are known."""
    known = labels >= 0
    return torch.stack([((logits.argmax(-1) == labels) & known).sum(), known.sum()])


@torch.no_grad()
def evaluate(config: VisionTrainConfig, model: VisionFoundation, style: str) -> dict[str, float]:
    """Accuracy by label on unseen pictures of the test split, read from the mean of all tokens."""
    model.eval()
    counts: dict[str, Tensor] = {}  # right, known: not every picture has a digit
    pictures = Pictures(config, "whole", "test", (style,), 0, max(1, config.n_test // config.batch))
    for pixels, labels in DataLoader(pictures, batch_size=None, num_workers=1):
        mean = torch.full((len(pixels), config.pool_tokens), 1 / config.pool_tokens)
        for name, logits in model.whole(pixels, config.pool_tokens, mean, by_name=config.name_steps > 0).items():
            counts[name] = counts.get(name, 0) + n_right(logits, labels[name])
    return {name: int(right) / max(1, int(known)) for name, (right, known) in counts.items()}


def save_encoder(model: VisionFoundation, out: Path) -> None:
    from safetensors.torch import save

    encoder = {f"encoder.{k}": v for k, v in model.encoder.state_dict().items() if v.is_floating_point()}
    parts = {"encoder": encoder, "readout": model.readout.state_dict(), "name_readout": model.name_readout.state_dict()}
    for part, tensors in parts.items():
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_atomic(out / f"{part}.safetensors", partial(write, content))


def write(content: bytes, file: BinaryIO) -> int:
    return file.write(content)


def main(path: str, *overrides: str) -> None:
    train(load_vision(path, overrides))
