"""What a step eats: planned rows as batches, and the features of their pictures."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from longllava.data.ahead import LOOKS
from longllava.data.features import BATCH, FeatureCache, encode_references, encoder_cache
from longllava.data.images import open_picture
from longllava.data.packing import Batch, Cursor, Item, Misfit, Plan, build_batch, plan_window
from longllava.data.recipes import Recipe
from longllava.data.samples import Sample
from longllava.errors import ConfigError
from longllava.inputs.processor import Processor
from longllava.model import Model
from longllava.train.config import TrainConfig


def uneven_rows(config: TrainConfig, world: int) -> str:
    """Why `world` processes cannot share the rows of a step, and what to do; empty where they can."""
    uneven = {f"phases.{n}.rows": phase.rows for n, phase in enumerate(config.phases) if phase.rows % world}
    if not uneven:
        return ""
    name, rows = next(iter(uneven.items()))
    settings = " ".join(f"{name}={-(-rows // world) * world}" for name, rows in uneven.items())
    return f"{name}: {rows} rows do not divide among {world} processes; set {settings}, or start fewer processes"


class Unwanted(Exception):
    """The run ends: what is being made for it need not be."""


class Feed:
    """Plans windows of steps ahead, in a thread, and hands out this process's batches of a step.

    begin, first_step: where the newest window began; a run that goes on starts there.
    """

    def __init__(self, config: TrainConfig, recipe: Recipe, processor: Processor, rank: int = 0, world: int = 1):
        self.config, self.processor = config, processor
        self.recipes = [self.of_phase(number, recipe) for number in range(len(config.phases))]
        self.rank, self.world = rank, world
        self.first_step, self.begin = 0, Cursor()
        self.misfits: list[Misfit] = []

    def of_phase(self, number: int, recipe: Recipe) -> Recipe:
        """Made before the first step, or a later phase's mistake would be told hours later. Raises: ConfigError."""
        try:
            return recipe.with_tasks(self.config.phases[number].tasks)
        except ConfigError as error:
            raise ConfigError(f"phases.{number}.tasks: {error}") from None

    def plan(self, first_step: int, begin: Cursor, unwanted: Callable[[], Any] = bool) -> Plan:
        """The plan of the window that begins at a step: a pure function of (recipe, seed, step, cursor).

        Raises: Unwanted, as soon as it is.
        """
        number, inside = self.config.phase_at(first_step)
        phase, seed = self.config.phases[number], self.config.seed
        starts = (*begin.starts, *[0] * (number - len(begin.starts)))  # older checkpoints have none, and counted so
        if number and not inside:
            starts = (*starts[:-1], begin.next)
        recipe = self.recipes[0]
        for later, first in zip(self.recipes[1:], starts):
            recipe = later.after(recipe, seed, first)
        held = (sample for sample in begin.held if recipe.counts[recipe.at(seed, sample)[0]])  # a phase leaves some out

        def draw(sample: int) -> tuple[Sample, str]:
            if unwanted():
                raise Unwanted
            return recipe.sample(seed, sample)

        return plan_window(
            draw,
            self.processor,
            Cursor(begin.next, tuple(held), starts),
            seed=seed,
            n_steps=min(self.config.window, phase.steps - inside),
            n_rows=phase.rows,
            row_length=phase.row_length,
            tokens_per_image=phase.tokens_per_image,
            expect=lambda sample: recipe.expect(seed, sample),
        )

    def windows(self, stopped: Callable[[], Any] = bool) -> Iterator[tuple[int, Plan]]:
        """(first step, plan) of each window; the next is planned while one is used.

        stopped: asked before each sample of a plan, which takes minutes where rows hold many pictures; where it is true
        no window may come.
        """
        total, ended = self.config.total_steps(), threading.Event()

        def unwanted() -> bool:
            return ended.is_set() or bool(stopped())

        with contextlib.ExitStack() as at_end:  # last first, whatever ends it
            at_end.callback(lambda: LOOKS.forget(list(LOOKS.pending)))  # Python would wait for what is looked at ahead
            thread = at_end.enter_context(ThreadPoolExecutor(1))
            at_end.callback(ended.set)  # this does not wait for the plan that is being made
            at_end.enter_context(contextlib.suppress(Unwanted))
            step, begin = self.first_step, self.begin
            pending = thread.submit(self.plan, step, begin, unwanted)
            while step < total:
                self.first_step, self.begin = step, begin
                plan = pending.result()
                self.misfits += plan.misfits
                begin = plan.end
                following = step + len(plan.steps)
                if following < total:
                    pending = thread.submit(self.plan, following, begin, unwanted)
                yield step, plan
                step = following

    def batches(self, rows: Sequence[Sequence[Item]], row_length: int, rows_at_once: int) -> list[Batch]:
        """This process's share of a step's rows, `rows_at_once` in a batch (0 = all)."""
        mine = rows[self.rank :: self.world]
        size = rows_at_once or len(mine)
        pad_id = self.processor.tokenizer.pad_id
        return [build_batch(mine[at : at + size], row_length, pad_id) for at in range(0, len(mine), size)]


class Pictures:
    """Features of a batch's pictures: cached while the encoder is frozen, else made as they are needed."""

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        processor: Processor,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.model, self.processor, self.device, self.dtype = model, processor, device, dtype
        self.trains = "encoder" in config.train_only
        self.cache: FeatureCache | None = None
        bridge, encoder = model.config.bridge, model.config.encoder
        if bridge is None or encoder is None:
            return
        self.tokens = encoder.grid() ** 2
        if bridge.pool == "2d":  # a mean of means: each phase pools the rest of the way, 9 and 4 tokens from 36
            counts = [phase.tokens_per_image or bridge.tokens_per_image for phase in config.phases]
            self.tokens = math.lcm(*map(math.isqrt, counts)) ** 2
        if config.feature_cache and not self.trains:
            self.cache = encoder_cache(model, processor, tokens=self.tokens, device=device, dtype=dtype)

    def prepare(
        self, references: Sequence[str], say: Callable[[str], None], stopped: Callable[[], Any] = bool
    ) -> None:
        """Fill the cache for a window, or until it is `stopped`: a step fills what it lacks."""
        if self.cache is None or not (wanted := len(self.cache.missing(references))):
            return
        from tqdm import tqdm

        def show(done: int, of: int) -> None:
            bar.update(done - bar.n)
            if stopped():
                raise Unwanted

        bar = tqdm(total=wanted, desc="features", unit="picture", leave=False, disable=None)
        with contextlib.suppress(Unwanted), bar:
            self.cache.fill(references, show)
            say(f"encoded {wanted} new pictures; {self.cache.n_records} are in {self.cache.folder}")

    def of(self, references: Sequence[str]) -> Tensor | None:
        """(N, M, C) features; uint8 (N, 3, S, S) pixels while the encoder trains; None without pictures."""
        if not references:
            return None
        if self.cache is not None:
            while self.cache.fill(references):  # what was written anew, also while it was encoded, is another picture
                pass
            return self.cache.get(references).to(self.device)
        if self.trains:
            pixels_N3SS = self.processor.pixels([open_picture(reference) for reference in references])
            return pixels_N3SS.to(self.device)
        pieces = [  # a row of 40,960 tokens may show 280 pictures, whose activations would be most of the memory
            encode_references(references[at : at + BATCH], self.model, self.processor, tokens=self.tokens,
                              device=self.device, dtype=self.dtype)
            for at in range(0, len(references), BATCH)
        ]  # fmt: skip
        return torch.cat(pieces)
