"""Recipes: shares, plans that follow from seed and number alone, and errors that name file and key."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from longllava.data.recipes import Recipe, block_counts
from longllava.data.samples import problem
from longllava.errors import ConfigError, DataError
from longllava.shipped import shipped

RECORD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
WORLD = "kind: world, licence: CC0, origin: here"


def write(folder: Path, *sources: str, head: str = "name: r") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"{head}\nsources:\n" + "".join(f"  - {{{source}}}\n" for source in sources))
    return path


def two_sources(folder: Path) -> Path:
    (folder / "hello.jsonl").write_text(
        "".join(json.dumps({**RECORD, "id": str(i)}) + "\n" for i in range(7))
    )
    return write(
        folder,
        f"name: single, task: single, weight: 3, {WORLD}",
        "name: hello, kind: llava, path: hello.jsonl, weight: 1, licence: CC0, origin: here",
    )


@pytest.mark.parametrize("stage", ["foundation-text", "stage1", "stage2", "stage3"])
def test_shipped_recipes_give_samples_of_training_pictures(stage: str) -> None:
    recipe = Recipe.load(shipped("data_recipes", f"nano/{stage}"))
    names = set()
    for number in range(120):
        sample, name = recipe.sample(1, number)
        names.add(name)
        assert problem(sample) is None and "/train/" in sample.id
        assert bool(sample.images) == (name not in ("tags-caption", "tags-recall", "facts", "text"))
    assert names == {row.name for row in recipe.config.sources}
    assert all(row.licence and row.origin and row.split == "train" for row in recipe.config.sources)


def test_the_plan_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    path = two_sources(tmp_path)
    plan = [(source.name, index) for source, index in Recipe.load(path).draw(5, 2500)]
    again = Recipe.load(path)
    assert [(source.name, index) for source, index in again.draw(5, 100, first=2400)] == plan[2400:]
    assert [again.sample(5, n) for n in (2499, 7)] == [
        ({s.name: s for s in again.sources}[plan[n][0]].sample(plan[n][1]), plan[n][0]) for n in (2499, 7)
    ]
    other = [(source.name, index) for source, index in Recipe.load(path).draw(6, 2500)]
    assert other != plan and not {i for n, i in plan if n == "single"} & {
        i for n, i in other if n == "single"
    }


def test_shares_and_epochs(tmp_path: Path) -> None:
    plan = [(source.name, index) for source, index in Recipe.load(two_sources(tmp_path)).draw(0, 2000)]
    assert Counter(name for name, _ in plan[:1000]) == {"single": 750, "hello": 250}
    worlds = [index for name, index in plan if name == "single"]
    assert len(set(worlds)) == 1500  # a world without end repeats nothing
    hellos = [index for name, index in plan if name == "hello"]
    epochs = [hellos[i : i + 7] for i in range(0, 497, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) > 60


def test_shares_follow_the_counts_where_there_are_no_weights(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"name: a, task: facts, count: 30, {WORLD}", f"name: b, task: text, count: 10, {WORLD}"
    )
    plan = [(source.name, index) for source, index in Recipe.load(path).draw(0, 1000)]
    assert Counter(name for name, _ in plan) == {"a": 750, "b": 250}
    assert {index for name, index in plan if name == "a"} == set(range(30))


def test_block_counts() -> None:
    assert block_counts([1.0]) == [1000]
    assert block_counts([1 / 3, 1 / 3, 1 / 3]) == [334, 333, 333]
    assert block_counts([0.99999, 0.00001]) == [999, 1]
    assert block_counts([0.5, 0.4996, 0.0002, 0.0002]) == [499, 499, 1, 1]
    assert all(sum(block_counts([1 / n] * n)) == 1000 for n in range(1, 60))


def test_tasks_take_other_settings_for_a_phase(tmp_path: Path) -> None:
    recipe = Recipe.load(shipped("data_recipes", "nano/stage3"))
    later = recipe.with_tasks({"needle": {"n_images": [64, 256], "weight": 800}})
    assert later.counts[0] > 900 > 400 > recipe.counts[0]
    samples = [later.sample(0, n)[0] for n in range(20)]
    sizes = [len(sample.images) for sample in samples if sample.id.startswith("needle/")]
    assert len(sizes) > 12 and min(sizes) >= 64 and max(sizes) <= 256
    last = Recipe.load(shipped("data_recipes", "nano/stage3"), {"needle": {"n_images": [1000, 1000]}})
    assert len(last.sources[0].sample(0).images) == 1000
    without = recipe.with_tasks({"needle": {"weight": 0}})
    assert without.counts[0] == 0 and sum(without.counts) == 1000
    assert not any(without.sample(0, n)[0].id.startswith("needle") for n in range(50))
    with pytest.raises(ConfigError, match="recipe 'nano-stage3': no source 'needel'; have needle, same"):
        recipe.with_tasks({"needel": {}})
    with pytest.raises(ConfigError, match="task needle: unknown key 'n_imgs'; did you mean 'n_images'"):
        recipe.with_tasks({"needle": {"n_imgs": [1, 2]}})


def test_files_are_not_read_again_for_another_phase(tmp_path: Path) -> None:
    recipe = Recipe.load(two_sources(tmp_path))
    (tmp_path / "hello.jsonl").unlink()
    assert recipe.with_tasks({"single": {"n_questions": [9, 9]}}).sources[1] is recipe.sources[1]


GOOD = f"name: a, task: single, weight: 1, {WORLD}"


@pytest.mark.parametrize(
    ("source", "head", "message"),
    [
        (GOOD.replace("weight", "wieght"), "name: r", "unknown key 'wieght'; did you mean 'weight'"),
        (GOOD.replace("weight: 1", "weight: a"), "name: r", "weight: expected float, got 'a'"),
        (GOOD.replace("weight: 1", "weight: -1"), "name: r", "source 'a': weight is -1.0, must be 0 or"),
        (GOOD.replace("weight: 1", "weight: 0"), "name: r", "sources: every weight is 0"),
        (GOOD + ", count: 0", "name: r", "source 'a': count is 0, must be above 0"),
        (GOOD.replace("weight: 1, ", ""), "name: r", "source 'a': give a weight or a count"),
        (GOOD.replace("kind: world", "kind: parquet"), "name: r", "kind: got 'parquet', allowed: world"),
        (GOOD.replace("task: single, ", ""), "name: r", "source 'a': task is missing; kind 'world' needs it"),
        (GOOD + ", path: x", "name: r", "source 'a': path does not go with kind 'world'"),
        (GOOD.replace("task: single", "task: singel"), "name: r", "source 'a': task: got 'singel', allowed"),
        (GOOD + ", settings: {n: 1}", "name: r", "task single: unknown key 'n'"),
        (GOOD + ", split: dev", "name: r", "split: got 'dev', allowed: train, test"),
        (GOOD.replace(", licence: CC0", ""), "name: r", "licence"),
        (GOOD, "name: r\nsource: x", "unknown key 'source'; did you mean 'sources'"),
        (GOOD, "name: r\npictures: {per_think: 3}", "pictures: unknown key 'per_think'; did you"),
        (GOOD + "}\n  - {" + GOOD, "name: r", "sources: two are named 'a'"),
        (GOOD + "}\n  - {" + GOOD.replace("weight", "count").replace("name: a", "name: b"), "name: r",
         "sources: 'b' has no weight, others have one"),
        ("}\n  - {".join(GOOD.replace("name: a", f"name: a{n}") for n in range(1001)), "name: r",
         "sources: 1,001 have a share, at most 1,000 can"),
        ("name: a, kind: llava, path: none.json, weight: 1, licence: CC0, origin: x", "name: r",
         "none.json: no such file"),
        ("name: a, kind: llava, path: x, task: single, weight: 1, licence: CC0, origin: x", "name: r",
         "source 'a': task does not go with kind 'llava'"),
        (GOOD + "}}", "name: r", "cannot be read"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence_naming_file_and_key(
    tmp_path: Path, source: str, head: str, message: str
) -> None:
    path = write(tmp_path, source, head=head)
    with pytest.raises((ConfigError, DataError)) as raised:
        Recipe.load(path)
    text = str(raised.value)
    assert message in text and "\n" not in text and ("recipe" in text), text


def test_no_sources_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\nsources: []\n")
    with pytest.raises(ConfigError, match="r.yaml: sources: the list is empty"):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="none.yaml: no such file"):
        Recipe.load(tmp_path / "none.yaml")


def test_left_out_records_are_written_down(tmp_path: Path) -> None:
    path = two_sources(tmp_path)
    assert Recipe.load(path).write_rejected(tmp_path / "out/rejected.txt") == 0
    assert not (tmp_path / "out/rejected.txt").exists()
    with (tmp_path / "hello.jsonl").open("a") as file:
        file.write("".join(json.dumps(RECORD) + "\n" for _ in range(200)) + "{\n")
    assert Recipe.load(path).write_rejected(tmp_path / "out/rejected.txt") == 1
    assert (
        (tmp_path / "out/rejected.txt").read_text().startswith(f"{tmp_path}/hello.jsonl:208: malformed JSON")
    )
