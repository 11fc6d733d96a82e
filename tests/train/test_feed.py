"""What a step eats is a function of (recipe, seed, step): processes share it out, and lose or repeat nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from longllava.checkpoints import find_folder
from longllava.config import ModelConfig
from longllava.data.recipes import Recipe
from longllava.inputs.processor import Processor
from longllava.inputs.tokenizer import Tokenizer
from longllava.settings import load
from longllava.shipped import shipped
from longllava.train.config import TrainConfig, load_stage
from longllava.train.feed import Feed

PHASES = ({"steps": 3, "rows": 4, "row_length": 512}, {"steps": 2, "rows": 6, "row_length": 256})
FEW = {"needle": {"n_images": [2, 4], "n_questions": [1, 2]}}


@pytest.fixture(scope="module")
def stage() -> TrainConfig:
    config = load_stage(shipped("configs", "train/nano/stage3.yaml"))
    phases = tuple(dataclasses.replace(config.phases[0], tasks=FEW, **phase) for phase in PHASES)
    return dataclasses.replace(config, phases=phases, average_phases=(), window=2)


def rows_of(stage: TrainConfig, rank: int, world: int) -> Iterator[list[list[int]]]:
    """Of each step the ids of this process's rows, whose pictures alone are prepared."""
    config = load(ModelConfig, shipped("configs", "models/nano.yaml"))
    processor = Processor(config, Tokenizer.from_folder(find_folder("nano"), config.prompt))
    feed = Feed(stage, Recipe.load(shipped("data_recipes", "nano/stage3")), processor, rank, world)
    for _, plan in feed.windows():
        shown = set()
        for step in plan.steps:
            batches = feed.batches(step, plan.row_length, 1)
            shown.update(reference for batch in batches for reference in batch.refs)
            yield [row for batch in batches for row in batch.ids_BL.tolist()]
        assert shown == set(plan.references(rank, world))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_rows_of_one_in_its_order(stage: TrainConfig, world: int) -> None:
    alone = list(rows_of(stage, 0, 1))
    shares = [list(rows_of(stage, rank, world)) for rank in range(world)]
    assert [len(rows) for rows in alone] == [4, 4, 4, 6, 6]
    for step, rows in enumerate(alone):
        for number, row in enumerate(rows):
            assert shares[number % world][step][number // world] == row, (step, number)
        assert sum(len(share[step]) for share in shares) == len(rows)
    assert len({tuple(row) for rows in alone for row in rows}) == 24  # no row comes twice
