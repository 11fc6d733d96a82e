"""V-NIAH: right and wrong are told apart, resuming changes nothing, and the files are LongVA's."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from longllava.data.worlds.pictures import parse_reference
from longllava.data.worlds.questions import BY_THING, value
from longllava.data.worlds.words import name_of
from longllava.errors import LongLLaVAError
from longllava.evals import vniah, vniah_report
from longllava.evals.journal import Journal
from longllava.evals.vniah_task import Settings, digest, draw_haystack, draw_needles

SMALL = Settings(images=(5, 12), depths=(0.0, 0.5, 1.0), n_needles=4)


class Seer:
    """A model that sees exactly what it is given: answers are looked up; `wrong` says otherwise."""

    def __init__(self, wrong: bool = False, stop_after: int | None = None):
        self.wrong, self.stop_after = wrong, stop_after
        self.prompts: list[tuple[str, ...]] = []
        self.encoded: list[str] = []
        self.n_read = 0

    def encode(self, images):
        self.encoded += images
        return [f"seen {image}" for image in images]

    def session(self):
        return SeersAlbum(self, ())


class SeersAlbum:
    def __init__(self, seer: Seer, images: tuple[str, ...]):
        self.seer, self.images = seer, images

    @property
    def n_tokens(self) -> int:
        return 10 * len(self.images)

    def append(self, images):
        assert all(image.startswith("seen world:") for image in images)
        self.images += tuple(image.removeprefix("seen ") for image in images)
        self.seer.n_read += len(images)

    def fork(self):
        return SeersAlbum(self.seer, self.images)

    def find(self, question: str) -> str:
        for kind in ("number", "colour"):
            before, after = BY_THING[kind][0].split("{}")
            if question.startswith(before):
                name = question.removeprefix(before).removesuffix(after)
                found = [spec for spec in map(parse_reference, self.images) if name_of(spec.thing) == name]
                assert len(found) == 1, f"{name} stands {len(found)} times"
                return value(found[0], kind)
        raise AssertionError(question)

    def score(self, question, answer):
        return SimpleNamespace(exact=(self.find(question) == answer) != self.seer.wrong)

    def ask(self, question, *, max_new_tokens):
        self.seer.prompts.append(self.images)
        if self.seer.stop_after is not None and len(self.seer.prompts) > self.seer.stop_after:
            raise KeyboardInterrupt
        return "nothing" if self.seer.wrong else f" {self.find(question).upper()}\n"


def journal(folder: Path, settings: Settings = SMALL, **model) -> Journal:
    return Journal(folder / "cells.jsonl", vniah.journal_settings(settings, digest(settings), **model))


def untimed(cells: list[vniah.Cell]) -> list[vniah.Cell]:
    return [replace(cell, seconds=0, shared_seconds=0, peak_memory=0) for cell in cells]


@pytest.mark.parametrize("wrong", [False, True])
def test_who_sees_is_right_and_who_does_not_is_wrong(tmp_path: Path, wrong: bool) -> None:
    cells = vniah.run(Seer(wrong), SMALL, journal(tmp_path))
    assert len(cells) == 2 * 3 * 4
    assert {cell.teacher_forced for cell in cells} == {not wrong}
    assert {cell.generated for cell in cells} == {not wrong}
    assert {row["Score"] for row in vniah_report.accuracies(cells)} == {float(not wrong)}
    assert {cell.kind for cell in cells if cell.depth == 0.5} == {"number", "colour"}
    assert all(cell.tokens == 10 * (cell.images + 1) and cell.peak_memory > 1e6 for cell in cells)


def test_forced_and_generated_are_told_apart(tmp_path: Path) -> None:
    class GoesOn(SeersAlbum):
        def ask(self, question, *, max_new_tokens):
            return f"{self.find(question)} and more"

        def fork(self):
            return GoesOn(self.seer, self.images)

    seer = Seer()
    seer.session = lambda: GoesOn(seer, ())
    cells = vniah.run(seer, SMALL, journal(tmp_path))
    assert {(cell.teacher_forced, cell.generated) for cell in cells} == {(True, False)}


def test_prompts_are_the_haystack_with_the_needle_at_its_depth(tmp_path: Path) -> None:
    seer = Seer()
    vniah.run(seer, SMALL, journal(tmp_path))
    hay, needles = draw_haystack(SMALL, 12), [needle.picture for needle in draw_needles(SMALL)]
    expected = [
        (*hay[:index], needle, *hay[index:n]) for n in (5, 12) for index in (0, n // 2, n) for needle in needles
    ]
    assert seer.prompts == expected
    assert sorted(seer.encoded) == sorted(hay + needles)  # each picture once
    walked = 5 + 12  # each haystack once, up to its last depth
    assert seer.n_read == walked + sum(4 * (n - index + 1) for n in (5, 12) for index in (0, n // 2, n))


def test_the_bar_ends_full(tmp_path: Path) -> None:
    moves: list[int] = []
    left = vniah.work_left(SMALL, journal(tmp_path))
    vniah.run(Seer(), SMALL, journal(tmp_path), move=moves.append)
    assert sum(moves) == left > 0
    assert vniah.work_left(SMALL, journal(tmp_path)) == 0


@pytest.mark.parametrize("stop_after", [0, 1, 7, 20])
def test_stopped_and_started_again_is_as_in_one_go(tmp_path: Path, stop_after: int) -> None:
    whole = vniah.run(Seer(), SMALL, journal(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        vniah.run(Seer(stop_after=stop_after), SMALL, journal(tmp_path))
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"images": 5, "dep')  # the machine stopped while it was writing
    seer, moves = Seer(), []
    left = vniah.work_left(SMALL, journal(tmp_path))
    cells = vniah.run(seer, SMALL, journal(tmp_path), move=moves.append)
    assert len(seer.prompts) == len(whole) - stop_after
    assert sum(moves) == left
    assert untimed(cells) == untimed(whole)
    assert vniah.run(broken(), SMALL, journal(tmp_path)) == cells  # nothing left to ask


def broken() -> Seer:
    seer = Seer()
    seer.session = seer.encode = None
    return seer


def test_more_sizes_and_depths_keep_what_is_finished(tmp_path: Path) -> None:
    vniah.run(Seer(), SMALL, journal(tmp_path))
    more = replace(SMALL, images=(12, 20), depths=(0.5, 0.75))
    again = journal(tmp_path, more)
    assert not again.news
    seer = Seer()
    cells = vniah.run(seer, more, again)
    keys = [(cell.images, cell.depth) for cell in cells[::4]]
    assert keys == [(12, 0.5), (12, 0.75), (20, 0.5), (20, 0.75)]
    assert len(seer.prompts) == 12


@pytest.mark.parametrize(
    ("change", "model", "word"),
    [
        ({"seed": 1}, "a", "seed was 0, is 1"),
        ({"n_needles": 3}, "a", "n_needles was 4, is 3"),
        ({"styles": ("noto",)}, "a", "styles was ['noto', 'fluent'], is ['noto']"),
        ({}, "b", "weights was 'a', is 'b'"),
    ],
)
def test_another_setting_starts_anew_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, model: str, word: str
) -> None:
    vniah.run(Seer(), SMALL, journal(tmp_path, weights="a"))
    before = (tmp_path / "cells.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "rewrite", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            journal(tmp_path, replace(SMALL, **change), weights=model)
    assert (tmp_path / "cells.jsonl").read_bytes() == before
    (tmp_path / "cells.previous.jsonl").unlink()
    again = journal(tmp_path, replace(SMALL, **change), weights=model)
    assert again.records == []
    assert again.news.startswith("starting anew: ")
    assert word in again.news
    assert (tmp_path / "cells.previous.jsonl").read_bytes() == before
    vniah.run(Seer(), replace(SMALL, **change), again)
    assert "kept in" in journal(tmp_path, weights="a").news  # the first settings again: neither is lost
    assert len((tmp_path / "cells.previous2.jsonl").read_text().splitlines()) == len(again.records) + 1
    assert (tmp_path / "cells.previous.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("hello\n", "line 1 is no record; move the file away"),
        ("[" * 100_000 + "\n", "line 1 is no record; move the file away"),
        ('{"images": 5}\n{"images": 5}\n', "line 1 is no table of settings; move the file away"),
        ('{"settings": 3}\n{"images": 5}\n', "line 1 is no table of settings; move the file away"),
        (None, "holds what is no prompt of V-NIAH; move it away"),
    ],
)
def test_a_journal_that_is_none_is_named(tmp_path: Path, text: str | None, sentence: str) -> None:
    file = tmp_path / "cells.jsonl"
    if text is None:
        journal(tmp_path).append({"images": 5})
    else:
        file.write_text(text)
    before = file.read_bytes()
    with pytest.raises(LongLLaVAError, match=f"cells.jsonl: {sentence}"):
        vniah.finished(journal(tmp_path))
    assert file.read_bytes() == before


def test_files_have_longvas_format(tmp_path: Path) -> None:
    cells = vniah.run(Seer(), SMALL, journal(tmp_path))
    cells[0] = replace(cells[0], teacher_forced=False)
    cells[-4:] = [replace(cell, teacher_forced=False) for cell in cells[-4:]]
    picture = vniah_report.write_report(cells, tmp_path / "out", vniah_report.title_of(cells, "seer"))
    rows = json.loads((tmp_path / "out/all_accuracies.json").read_text())
    assert rows[0] == {"Num. Frame": 5, "Frame Depth": 0.0, "Score": 0.75}
    assert [(row["Num. Frame"], row["Frame Depth"]) for row in rows] == [
        (n, depth) for n in (5, 12) for depth in (0.0, 50.0, 100.0)
    ]
    table = list(csv.DictReader((tmp_path / "out/cells.csv").read_text().splitlines()))
    assert len(table) == len(cells)
    assert table[0].keys() >= {"images", "depth", "needle", "seconds", "tokens", "peak_memory"}
    assert [table[0]["teacher_forced"], table[0]["generated"], table[1]["teacher_forced"]] == ["0", "1", "1"]
    with Image.open(picture) as image:
        colours = {tuple(colour[:3]) for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert picture.name == "heatmap.png"
    assert (0x9A, 0xD5, 0xB3) in colours  # 1: LongVA's green
    assert (0xF0, 0x49, 0x6E) in colours  # 0: its red


def test_rows_of_the_heat_map_are_told_apart() -> None:
    assert vniah_report.depth_labels([0, 1 / 3, 1]) == ["0 %", "33 %", "100 %"]
    assert vniah_report.depth_labels([0, 0.001, 0.004, 1]) == ["0.0 %", "0.1 %", "0.4 %", "100.0 %"]


def test_a_name_in_the_title_is_no_formula(tmp_path: Path) -> None:
    cells = vniah.run(Seer(), SMALL, journal(tmp_path))
    vniah_report.draw_heatmap(cells, vniah_report.title_of(cells, r"a$\frac$"), io.BytesIO())


def test_summary_adds_up(tmp_path: Path) -> None:
    cells = [replace(cell, seconds=2.0, shared_seconds=4 * cell.depth, peak_memory=int(cell.depth * 8))
             for cell in vniah.run(Seer(), SMALL, journal(tmp_path))]  # fmt: skip
    cells[0] = replace(cells[0], generated=False)
    first, second = vniah_report.summarise(cells)
    assert (first.images, first.n_cells, first.teacher_forced) == (5, 12, 1.0)
    assert first.generated == pytest.approx(11 / 12)
    assert first.by_kind == {"number": 5 / 6, "colour": 1.0}
    assert (first.seconds, first.seconds_per_cell, first.peak_memory) == (28.0, 2.0, 8)
    assert (second.images, second.tokens, second.generated) == (12, 130, 1.0)
