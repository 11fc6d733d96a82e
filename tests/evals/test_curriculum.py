"""The curriculum's evaluation: what counts as right, on which questions, and what must hold between stages."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

from longllava.checkpoints import save_model
from longllava.data.worlds.pictures import combinations, parse_reference
from longllava.data.worlds.render import COLOUR_NAMES, PLACES
from longllava.data.worlds.words import COUNTS, name_of
from longllava.errors import ConfigError, InputError
from longllava.evals.curriculum import Outcome, judge, measure
from longllava.evals.curriculum_report import Column, as_json, checks, draw_plot, table_of
from longllava.evals.curriculum_task import STAGES, TASKS, draw_samples, kind_of, tasks_named, telling_words
from tests.tiny_world import world_model

BY_NAME = {task.name: task for task in TASKS}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny():
    return world_model()


# --- what is asked


def test_questions_are_of_pictures_that_training_never_sees() -> None:
    for task in TASKS:
        for reference in {ref for sample in draw_samples(task, 20) for ref in sample.images}:
            if reference.startswith("world:grid:"):
                continue
            spec = parse_reference(reference)
            whole = spec.digit is not None and spec.colour is not None
            assert spec.seed % 2 == 1 and not spec.restyle
            assert (spec.digit, spec.colour) in combinations(spec.thing, "test", whole)
            assert (spec.digit, spec.colour) not in combinations(spec.thing, "train", whole)


def test_samples_follow_from_the_seed_and_fill_up_the_questions() -> None:
    for task in TASKS:
        samples = draw_samples(task, 30, seed=1)
        n_asked = [len(sample.turns) // 2 for sample in samples]
        assert sum(n_asked) - n_asked[-1] < 30 * task.share <= sum(n_asked)
        assert samples == draw_samples(task, 30, seed=1) != draw_samples(task, 30, seed=2)
        n_images = {len(sample.images) for sample in samples}
        if task.world == "needle":
            assert n_images == {int(task.name.partition("@")[2])}


def test_every_question_has_a_kind_where_kinds_are_told_apart() -> None:
    kinds = {name: set() for name in ("single", "same", "needle@16", "subimage", "caption", "count")}
    for name, found in kinds.items():
        for sample in draw_samples(BY_NAME[name], 150):
            found |= {kind_of(BY_NAME[name], turn.text) for turn in sample.turns[::2]}
    needles = {"number", "colour", "place", "copies", "thing by number", "thing by colour"}
    assert kinds["single"] == {"thing", "number", "colour", "copies", "place", "kind", "yes or no", "describe"}
    assert kinds["same"] == {"thing", "number", "colour"}
    assert kinds["needle@16"] == kinds["subimage"] == needles
    assert kinds["caption"] == kinds["count"] == {"other"}


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ConfigError, match="^no task 'needles'; have recall, .*needle@64"):
        tasks_named(["caption", "needles"])


# --- what counts as right


class Oracle:
    """Knows the next token, except before those in `missed`: there it says another one."""

    def __init__(self, model, missed: set[int]):
        self.model, self.missed = model, missed
        self.backbone = self
        self.embed_tokens = model.backbone.embed_tokens

    def __call__(self, x_BLD, ctx):
        return x_BLD, None

    def embed(self, ids_BL, spans, images_NMD):
        return ids_BL.roll(-1, dims=1)[..., None].float()

    def image_tokens(self, features, tokens):
        return features

    def logits(self, hidden_PD):
        following_P = hidden_PD[:, 0].long()
        wrong_P = torch.isin(following_P, torch.tensor(sorted(self.missed) or [-1]))
        logits_PV = F.one_hot(torch.where(wrong_P, 5, following_P), 1920).float()
        logits_PV[:, 1919] = 9.0  # a row that the tokenizer has no word for
        return logits_PV


def judged(tiny, name: str, missed: set[int] = frozenset(), n: int = 60) -> tuple[Outcome, list]:
    model, processor = tiny
    samples = draw_samples(BY_NAME[name], n)

    class NoPictures:
        def get(self, references):
            return torch.zeros(len(references), 4, 16)

    return judge(Oracle(model, missed), processor, BY_NAME[name], samples, NoPictures()), samples


@pytest.mark.parametrize("name", ["facts", "caption", "single", "needle@4", "recall"])
def test_an_answer_is_right_when_each_of_its_tokens_is(tiny, name: str) -> None:
    outcome, samples = judged(tiny, name)
    assert outcome.n == outcome.n_right == sum(len(sample.turns) // 2 for sample in samples)
    tokenizer = tiny[1].tokenizer
    (missed,) = tokenizer.encode("blue")
    outcome, samples = judged(tiny, name, {missed})
    answers = [[turn.text for turn in sample.turns[1::2]] for sample in samples]
    right = [[missed not in tokenizer.encode(answer) for answer in said] for said in answers]
    assert outcome.n_right == sum(map(sum, right)) and outcome.n == sum(map(len, right))
    assert name == "facts" or 0 < outcome.n_right < outcome.n
    assert list(outcome.first_right) == [each[0] for each in right]
    kinds: dict[str, list[bool]] = {}
    for sample, each in zip(samples, right):
        for turn, is_right in zip(sample.turns[::2], each):
            kinds.setdefault(kind_of(BY_NAME[name], turn.text), []).append(is_right)
    assert outcome.kinds == {kind: (sum(each), len(each)) for kind, each in kinds.items()}


def test_by_word_each_telling_word_counts_for_itself(tiny) -> None:
    outcome, samples = judged(tiny, "words", {*tiny[1].tokenizer.encode("blue"), tiny[1].tokenizer.eos_id}, n=120)
    specs = [parse_reference(sample.images[0]) for sample in samples]
    colours = [COLOUR_NAMES[spec.colour] for spec in specs if spec.colour is not None]
    expected = {
        "thing": (120, 120),
        "number": 2 * (sum(spec.digit is not None for spec in specs),),
        "colour": (len(colours) - colours.count("blue"), len(colours)),
        "copies": 2 * (sum(spec.count > 1 for spec in specs),),
        "place": 2 * (sum(spec.count == 1 and PLACES[spec.place] != "middle" for spec in specs),),
    }
    assert outcome.kinds == expected and 0 < colours.count("blue") < len(colours)
    for sample in samples:
        said = {kind: sample.turns[1].text[start:end] for kind, start, end in telling_words(sample)}
        spec = parse_reference(sample.images[0])
        assert said["thing"] == name_of(spec.thing)
        assert said.get("colour") == (None if spec.colour is None else COLOUR_NAMES[spec.colour])
        assert said.get("copies", "one") == COUNTS[spec.count]
        assert said.get("number") == (None if spec.digit is None else str(spec.digit))
        assert said.get("place", "middle") == (PLACES[spec.place] if spec.count == 1 else "middle")


def test_an_answer_that_does_not_end_is_not_right(tiny) -> None:
    outcome, _ = judged(tiny, "facts", {tiny[1].tokenizer.eos_id})
    assert outcome.n_right == 0


def test_pictures_reach_the_answers(tiny) -> None:
    """The features of all pictures asked about, each once, and the same answers when they come from the cache."""
    model, processor = world_model(1)
    task = replace(BY_NAME["single"], share=1.0)
    (outcome,) = measure(model, processor, [task], n_questions=12)
    again, blind = measure(model, processor, [task], n_questions=12), world_model(1)[0]
    assert (again[0].n_right, again[0].kinds) == (outcome.n_right, outcome.kinds)
    seen = []
    blind.image_tokens = lambda features, tokens=None: seen.append(features) or model.image_tokens(features, tokens)
    measure(blind, processor, [task], n_questions=12)
    samples = draw_samples(task, 12)
    assert sum(map(len, seen)) == len({ref for sample in samples for ref in sample.images}) == outcome.n_pictures
    assert all(features.shape[1:] == (4, 16) and features.float().std() > 0 for features in seen)


def test_a_model_of_text_is_asked_about_text_only(tiny) -> None:
    from longllava.model import Model

    model = Model(replace(tiny[0].config, encoder=None, bridge=None))
    model.initialise_(0)
    processor = type(tiny[1])(model.config, tiny[1].tokenizer)
    (outcome,) = measure(model, processor, [BY_NAME["facts"]], n_questions=4)
    assert outcome.n >= 4 and outcome.n_pictures == 0
    with pytest.raises(InputError, match="reads text only"):
        measure(model, processor, [BY_NAME["caption"]], n_questions=4)


# --- what must hold between stages


def column(stage: str, shares: dict[str, float]) -> Column:
    outcomes = {name: Outcome(name, 1000, round(1000 * share), {"other": (round(1000 * share), 1000)}, 9, 9, 9, 1.0, ())
                for name, share in shares.items()}  # fmt: skip
    return Column(stage, stage, f"runs/{stage}", outcomes, 3.0)


def stages(**last: float) -> list[Column]:
    shares = dict.fromkeys(BY_NAME, 0.1) | {"recall": 0.9, "facts": 0.9}
    columns = [column("foundation", shares)]
    for stage in STAGES[1:]:
        shares = shares | {task.name: 0.9 for task in TASKS if task.stage == stage}
        columns.append(column(stage, shares | (last if stage == "stage3" else {})))
    return columns


def test_each_stage_must_beat_the_one_before_on_what_it_teaches() -> None:
    results = checks(stages())
    assert all(check.passed for check in results) and len(results) == 2 + 1 + 8 + 1
    failed = [check.text for check in checks(stages(order=0.1, count=0.05)) if not check.passed]
    assert [text.split(":")[0] for text in failed] == ["stage3 beats stage2 on order", "stage3 beats stage2 on count"]


def test_stage_3_may_lose_two_points_on_single_pictures() -> None:
    assert all(check.passed for check in checks(stages(single=0.88)))
    (failed,) = [check.text for check in checks(stages(single=0.879)) if not check.passed]
    assert failed == "stage 3 loses at most 2 points on single-image questions: 90.0 % -> 87.9 %"


def test_the_shipped_pair_is_compared_on_all_that_lies_between() -> None:
    first, *_, last = stages()
    results = checks([last, first])  # in any order
    assert len(results) == 2 + 1 + 8 and all(check.passed and "beats foundation" in check.text for check in results)
    assert checks([last]) == []


def test_the_report_can_be_read_back_and_the_plot_is_a_picture() -> None:
    columns = stages()
    result = json.loads(json.dumps(as_json(columns, seed=7)))
    assert result["seed"] == 7 and [model["label"] for model in result["models"]] == list(STAGES)
    assert result["models"][1]["tasks"]["caption"] == {
        "accuracy": 0.9, "questions": 1000, "right": 900, "samples": 9, "tokens": 9, "pictures": 9, "seconds": 1.0,
        "kinds": {"other": {"right": 900, "questions": 1000}},
    }  # fmt: skip
    assert len(result["checks"]) == 12
    file = io.BytesIO()
    draw_plot(columns, file)
    assert Image.open(file).size[0] > 1000
    assert table_of(columns).row_count == len(TASKS) + 2  # and the kinds of words and of single-image questions


def test_the_legend_names_each_model(monkeypatch) -> None:
    drawn, names = [], ["nano", "_nano", r"a$\frac$"]  # neither hidden nor a formula
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure) or figure.canvas.draw())
    draw_plot([column(name, {"caption": 0.5}) for name in names], None)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == names


def test_the_benchmark_compares_folders(tmp_path) -> None:
    root = Path(__file__).resolve().parents[2]
    for number, stage in enumerate(("stage2", "stage3")):
        model, processor = world_model(number)
        folder = save_model(model, processor.tokenizer, tmp_path / stage)
        (folder / "training.json").write_text(json.dumps({"stage": stage}))
    command = [sys.executable, str(root / "benchmarks" / "curriculum.py"), "--folders", str(tmp_path / "stage2"),
               str(tmp_path / "stage3"), "--tasks", "facts,single,order", "--questions", "4", "--generated", "1",
               "--output", str(tmp_path / "out"), "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # noise does not beat noise on every task
    assert "stage 3 loses at most 2 points" in done.stdout and "Traceback" not in done.stderr
    assert "stage3, asked through generate" in done.stdout
    result = json.loads((tmp_path / "out" / "curriculum-cpu.json").read_text())
    assert [model["stage"] for model in result["models"]] == ["stage2", "stage3"]
    assert result["models"][1]["generated"]["order"]["n"] == 1 and result["torch"] == torch.__version__
    with Image.open(tmp_path / "out" / "curriculum-cpu.png") as picture:
        assert picture.size[0] > 500


def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch) -> None:
    from longllava.cli.curriculum import curriculum

    def loaded(*_, **__):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("longllava.api.LongLLaVA.from_pretrained", loaded)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: it is a file; name a folder"):
        curriculum(tasks="facts", output=str(tmp_path / "file"))


def test_the_command_line_measures_one_model(tmp_path, capsys) -> None:
    from longllava.cli.curriculum import curriculum

    model, processor = world_model()
    folder = save_model(model, processor.tokenizer, tmp_path / "tiny")
    curriculum(model=str(folder), questions=4, tasks="facts,order", seed=0, device="cpu", dtype=None,
               output=str(tmp_path / "out"))  # fmt: skip
    printed = capsys.readouterr().out
    assert "order" in printed and "taught by" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curriculum.json", "curriculum.png"}
