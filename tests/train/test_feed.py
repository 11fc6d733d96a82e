"""What a step eats is a function of (recipe, seed, step): processes share it out, and lose or repeat nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from longllava.bridges.pool import pool_features
from longllava.checkpoints import find_folder
from longllava.config import ModelConfig
from longllava.data import ahead
from longllava.data.features import encode_references
from longllava.data.recipes import Recipe
from longllava.data.worlds.pictures import PicturePool
from longllava.errors import InputError
from longllava.inputs.processor import Processor
from longllava.inputs.tokenizer import Tokenizer
from longllava.model import Model
from longllava.settings import load
from longllava.shipped import shipped
from longllava.train.config import TrainConfig, load_stage
from longllava.train.feed import Feed, Pictures, uneven_rows
from tests.tiny_world import world_model

PHASES = ({"steps": 3, "rows": 4, "row_length": 512}, {"steps": 2, "rows": 6, "row_length": 256})
FEW = {"needle": {"n_images": [2, 4], "n_questions": [1, 2]}}


@pytest.fixture(scope="module")
def stage() -> TrainConfig:
    config = load_stage(shipped("configs", "train/nano/stage3.yaml"))
    phases = tuple(dataclasses.replace(config.phases[0], tasks=FEW, **phase) for phase in PHASES)
    return dataclasses.replace(config, phases=phases, average_phases=(), window=2)


def nano() -> Processor:
    config = load(ModelConfig, shipped("configs", "models/nano.yaml"))
    return Processor(config, Tokenizer.from_folder(find_folder("nano"), config.prompt))


def rows_of(stage: TrainConfig, rank: int, world: int) -> Iterator[list[list[int]]]:
    """Of each step the ids of this process's rows, whose pictures alone are prepared."""
    feed = Feed(stage, Recipe.load(shipped("data_recipes", "nano/stage3")), nano(), rank, world)
    for _, plan in feed.windows():
        shown = set()
        for step in plan.steps:
            batches = feed.batches(step, plan.row_length, 1)
            shown.update(reference for batch in batches for reference in batch.refs)
            yield [row for batch in batches for row in batch.ids_BL.tolist()]
        assert shown == set(plan.references(rank, world))


def test_rows_that_processes_cannot_share_are_told_with_what_to_set(stage: TrainConfig) -> None:
    assert uneven_rows(stage, 1) == uneven_rows(stage, 2) == ""
    assert uneven_rows(stage, 4) == (
        "phases.1.rows: 6 rows do not divide among 4 processes; set phases.1.rows=8, or start fewer processes")
    assert "; set phases.0.rows=5 phases.1.rows=10, or" in uneven_rows(stage, 5)


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


def test_other_shares_in_a_phase_repeat_and_skip_no_sample(stage: TrainConfig, tmp_path: Path) -> None:
    sizes, rows = {"a": 300, "b": 500}, []
    for name, size in sizes.items():
        records = [{"id": f"{name}{n}", "question": "red " * (n * 7 % 90), "answer": "yes"} for n in range(size)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        rows.append({"name": name, "kind": "llava", "path": f"{name}.json", "weight": 1, "licence": "x", "origin": "x",
                     "columns": {"question": "question", "answer": "answer"}})  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"name": "own", "sources": rows}))
    shares = ({}, {"a": {"weight": 9}}, {"b": {"weight": 5}}, {"a": {"weight": 0}}, {})
    phases = tuple(dataclasses.replace(stage.phases[0], tasks=tasks, steps=steps, rows=4, row_length=128)
                   for tasks, steps in zip(shares, (20, 40, 30, 11, 60)))  # fmt: skip
    recipe, processor = Recipe.load(tmp_path / "own.yaml"), nano()
    config = dataclasses.replace(stage, phases=phases, window=8)
    feed = Feed(config, recipe, processor)
    used: dict[str, list[str]] = {"a": [], "b": []}
    for step, plan in feed.windows():
        items = [item for rows in plan.steps for row in rows for item in row]
        for item in items:
            used[item.source].append(item.id)
        number = config.phase_at(step)[0]
        assert {item.source for item in items} == ({"b"} if number == 3 else {"a", "b"})
        begin = feed.begin
        assert Feed(config, recipe, processor).plan(step, begin).mark() == plan.mark()  # a run that goes on
        end = plan.end
    waiting = feed.plan(step, begin).end.held
    assert end.starts and waiting
    for name, size in sizes.items():
        counts = Counter(used[name])
        assert len(used[name]) > 1.5 * size and len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1 + bool(waiting), counts


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("counts", [(9, 4), (16, 36), (36, 4, 9), (1,)])
def test_every_phase_pools_its_tokens_of_what_is_kept(
    stage: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], cached: bool
) -> None:
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path))
    torch.manual_seed(0)
    processor = nano()
    model = Model(processor.config).eval()  # 12 x 12 tokens of a picture
    phases = [dataclasses.replace(stage.phases[0], tokens_per_image=n) for n in counts]
    kept = dataclasses.replace(stage, phases=phases, feature_cache=cached)
    pictures = Pictures(kept, model, processor, torch.device("cpu"), torch.float32)
    references = [PicturePool("train").reference(index) for index in range(3)]
    pictures.prepare(references, print)
    kept_NMC = pictures.of(references)
    assert kept_NMC is not None
    for n in counts:
        whole_NMC = encode_references(references, model, processor, tokens=n)
        torch.testing.assert_close(pool_features(kept_NMC.float(), n, "2d"), whole_NMC, rtol=0.02, atol=0.02)


def test_a_picture_that_changes_inside_its_window_is_read_as_it_is(stage: TrainConfig, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    model, processor = world_model()
    pictures = Pictures(stage, model, processor, torch.device("cpu"), torch.float32)
    path = tmp_path / "a.png"
    found = []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(path)
        if colour == "red":
            pictures.prepare([str(path)], print)
        os.utime(path, (1, len(found)))
        found.append(pictures.of([str(path)]))
    assert not torch.equal(*found)
    path.unlink()
    with pytest.raises(InputError, match="a.png: no such file"):
        pictures.of([str(path)])


def test_what_is_looked_at_ahead_goes_with_the_run(stage: TrainConfig, tmp_path: Path, monkeypatch) -> None:
    """Python waits for it: a process that had been told to end, and had saved, looked at 1,300 pictures first."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record = {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    names = [f"{n}.png" for n in range(100)]
    for name in names:
        os.link(tmp_path / "a.png", tmp_path / name)
    (tmp_path / "own.json").write_text(json.dumps([{**record, "id": name, "image": name} for name in names]))
    source = {"name": "own", "kind": "llava", "path": "own.json", "licence": "x", "origin": "x"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"name": "own", "sources": [source]}))
    monkeypatch.setattr(ahead, "n_threads", lambda: 2)
    phase = dataclasses.replace(stage.phases[0], tasks={}, steps=9, rows=1, row_length=64)
    windows = Feed(dataclasses.replace(stage, phases=(phase,)), Recipe.load(tmp_path / "own.yaml"), nano()).windows()
    next(windows)
    assert ahead.LOOKS.pending
    windows.close()
    assert not ahead.LOOKS.pending
