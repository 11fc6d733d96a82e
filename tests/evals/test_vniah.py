"""V-NIAH: right and wrong are told apart, needles are alone in their haystacks, resuming changes nothing, and
a shared prefix gives what a fresh prompt gives."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from longllava.cli import evaluate
from longllava.data.worlds.pictures import combinations, parse_reference
from longllava.data.worlds.questions import BY_THING, value
from longllava.data.worlds.words import name_of
from longllava.errors import LongLLaVAError
from longllava.evals import vniah, vniah_report
from longllava.evals.journal import Journal
from longllava.evals.vniah_options import depths_of, settings_of
from longllava.evals.vniah_task import Settings, digest, draw_haystack, draw_needles, position

ROOT = Path(__file__).parents[2]
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
        assert question.startswith("\n")
        for kind in ("number", "colour"):
            before, after = BY_THING[kind][0].split("{}")
            if question[1:].startswith(before):
                name = question[1:].removeprefix(before).removesuffix(after)
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
    assert Seer.encode and vniah.run(broken(), SMALL, journal(tmp_path)) == cells  # nothing left to ask


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
def test_another_setting_starts_anew_and_says_so(tmp_path: Path, change: dict, model: str, word: str) -> None:
    vniah.run(Seer(), SMALL, journal(tmp_path, weights="a"))
    before = (tmp_path / "cells.jsonl").read_bytes()
    again = journal(tmp_path, replace(SMALL, **change), weights=model)
    assert again.records == []
    assert again.news.startswith("starting anew: ")
    assert word in again.news
    assert (tmp_path / "cells.previous.jsonl").read_bytes() == before


def test_a_journal_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_text("hello\n")
    with pytest.raises(LongLLaVAError, match=r"cells.jsonl: line 1 is no record; move the file away"):
        journal(tmp_path)


def test_needles_are_alone_and_unseen(tmp_path: Path) -> None:
    settings = Settings(images=(1000,), n_needles=60)
    needles = [parse_reference(needle.picture) for needle in draw_needles(settings)]
    hay = [parse_reference(picture) for picture in draw_haystack(settings, 1000)]
    assert len({spec.thing for spec in needles}) == 60
    assert not {spec.thing for spec in needles} & {spec.thing for spec in hay}
    for spec in (*needles, *hay):
        assert (spec.digit, spec.colour) in combinations(spec.thing, "test", True)
        assert (spec.digit, spec.colour) not in combinations(spec.thing, "train", True)
        assert spec.seed % 2 == 1  # test renderings; training's are even
        assert spec.count == 1
    # one distribution: digits, colours, styles of the needles are the haystack's
    assert len({spec.digit for spec in needles}) == 10
    assert {spec.style for spec in needles} == {"noto", "fluent"} == {spec.style for spec in hay}


def test_the_seed_draws_and_sizes_share_their_beginning() -> None:
    settings = Settings(images=(100,))
    assert draw_haystack(settings, 30) == draw_haystack(settings, 100)[:30]
    assert draw_needles(settings) == draw_needles(replace(settings, images=(7,)))
    other = replace(settings, seed=1)
    assert not {n.name for n in draw_needles(settings)[:5]} == {n.name for n in draw_needles(other)[:5]}
    assert draw_haystack(settings, 30) != draw_haystack(other, 30)


def test_positions_are_longvas() -> None:
    assert [position(depth, 1000) for depth in (0, 0.3, 0.55, 1)] == [0, 300, 550, 1000]
    assert [position(depth, 7) for depth in (0, 0.5, 0.99, 1)] == [0, 3, 6, 7]
    assert position(0.29, 100) == 29  # int() alone would say 28


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


@pytest.fixture
def folder_of_pictures(tmp_path: Path) -> Path:
    for i in range(12):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(tmp_path / f"frame{i}.png")
    return tmp_path


def test_a_folder_is_a_haystack(folder_of_pictures: Path) -> None:
    settings = replace(SMALL, haystack=str(folder_of_pictures))
    assert [path.name for path in draw_haystack(settings, 11)] == [f"frame{i}.png" for i in range(11)]
    before = digest(settings)
    Image.new("RGB", (30, 20)).save(folder_of_pictures / "frame3.png")
    assert digest(settings) != before
    with pytest.raises(LongLLaVAError, match=r"12 pictures, 13 are needed; ask for fewer with --images"):
        draw_haystack(settings, 13)


def test_a_film_is_a_haystack_at_one_frame_a_second(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), (i * 20, 0, 0)) for i in range(12)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:], duration=500)
    settings = replace(SMALL, haystack=str(tmp_path / "film.gif"))
    reds = [image.getpixel((0, 0))[0] for image in draw_haystack(settings, 4)]
    assert reds == [0, 40, 80, 120]
    with pytest.raises(LongLLaVAError, match="6 frames at 1 per second, 7 are needed"):
        draw_haystack(settings, 7)


@pytest.mark.parametrize(
    ("text", "depths"),
    [("3", (0, 0.5, 1)), ("11", tuple(i / 10 for i in range(11))), ("0.25,0.75", (0.25, 0.75)), ("1", (1,)),
     ("0", (0,)), ("0.5", (0.5,)), ("1,0", (0, 1))],
)  # fmt: skip
def test_depths(text: str, depths: tuple[float, ...]) -> None:
    assert depths_of(text) == depths


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": ["many"]}, "--images: got 'many', expected a whole number"),
        ({"images": ["10,"]}, "--images: got '10,', expected values separated by commas"),
        ({"images": ["0"]}, r"images: got \[0\], expected numbers from 1"),
        ({"depths": "0.5,1.5"}, "--depths: got '0.5,1.5', expected a count above 1, or numbers from 0"),
        ({"depths": "nan"}, "--depths: got 'nan'"),
        ({"depths": "9999999"}, "at most 1001"),
        ({"needles": "0"}, "needles: got 0, allowed: 1 to"),
        ({"needles": "700"}, "needles: got 700, allowed: 1 to"),
        ({"style": "cubist"}, "drawing style 'cubist': no sheet at cubist"),
    ],
)
def test_bad_options_are_one_sentence(change: dict, sentence: str) -> None:
    good = {"images": ["10,20"], "depths": "3", "needles": "2", "seed": "0", "style": "noto"}
    good["haystack"] = None
    assert settings_of(**good).images == (10, 20)
    with pytest.raises(LongLLaVAError, match=sentence) as error:
        settings_of(**{**good, **change})
    assert "\n" not in str(error.value)


def test_faults_that_files_have_are_one_sentence_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for change, sentence in [
        ({"haystack": "nowhere"}, "haystack nowhere: no such folder or video"),
        ({"model": str(tmp_path / "none")}, str(tmp_path / "none")),
    ]:
        with pytest.raises(LongLLaVAError, match=sentence) as error:
            evaluate.vniah(["10"], output=str(out), **change)
        assert "\n" not in str(error.value)
    assert not out.exists()


def test_the_script_says_what_is_wrong() -> None:
    line = [sys.executable, ROOT / "benchmarks/vniah.py", "--depths", "deep"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("vniah: --depths: got 'deep', expected a count above 1, or numbers from 0 to 1")
    assert len(done.stderr.splitlines()) == 1


def test_bare_python_is_told_what_to_run() -> None:
    line = [sys.executable, "-S", ROOT / "benchmarks/vniah.py"]
    done = subprocess.run(line, capture_output=True, text=True, env={})
    assert done.returncode == 1
    assert "make setup" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def tiny():
    from longllava.api import LongLLaVA
    from longllava.model import Model
    from tests.tiny import tiny_config, tiny_tokenizer

    model = Model(tiny_config())
    model.initialise_()
    return LongLLaVA(model, tiny_tokenizer())


class Recording:
    """A session that notes the log-probabilities of what it scores."""

    def __init__(self, session, scores: list):
        self.session, self.scores = session, scores

    def fork(self):
        return Recording(self.session.fork(), self.scores)

    def score(self, question, answer):
        self.scores.append(self.session.score(question, answer).log_probabilities)
        return self.session.score(question, answer)

    def __getattr__(self, name):
        return getattr(self.session, name)


def test_a_shared_prefix_is_a_fresh_prompt(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vniah, "MAX_NEW_TOKENS", 3)
    settings = Settings(images=(9,), depths=(0.0, 0.3, 0.7, 1.0), n_needles=2)
    shared: list = []
    judged = SimpleNamespace(encode=tiny.encode, session=lambda: Recording(tiny.session(), shared))
    cells = vniah.run(judged, settings, journal(tmp_path, settings))
    hay, needles = draw_haystack(settings, 9), draw_needles(settings)
    for cell, scores in zip(cells, shared, strict=True):
        index, needle = position(cell.depth, 9), needles[cell.needle]
        images, question = [*hay[:index], needle.picture, *hay[index:]], f"\n{needle.question}"
        fresh = tiny.score(question, needle.answer, images=images)
        assert scores == pytest.approx(fresh.log_probabilities, abs=1e-4)
        assert cell.teacher_forced == fresh.exact
        assert cell.said == tiny.generate(question, images=images, max_new_tokens=3)
        # bos, "<|User|>\n", and ten pictures of 4 tokens and 2 tags, the last of which waits for the question
        assert cell.tokens == 1 + len(tiny.tokenizer.encode("<|User|>\n")) + 10 * (4 + 2) - 1


def test_what_is_encoded_once_stands_for_the_picture(tiny) -> None:
    pictures = draw_haystack(SMALL, 5)
    features = tiny.encode(pictures)
    assert [tuple(feature.shape) for feature in features] == [(4, 16)] * 5
    mixed = [features[0], pictures[1], features[2], features[3], pictures[4]]
    expected = tiny.score("what", "heart", images=pictures).log_probabilities
    for images in (features, mixed):
        assert tiny.score("what", "heart", images=images).log_probabilities == pytest.approx(expected, abs=1e-5)
    swapped = tiny.score("what", "heart", images=[*features[1:], features[0]]).log_probabilities
    assert swapped != pytest.approx(expected, abs=1e-5)
    with pytest.raises(LongLLaVAError, match=r"image 2: got a tensor of torch.float32 \(3, 16\), expected floats"):
        tiny.score("what", "heart", images=[pictures[0], features[0][:3]])


def test_the_command_line_from_start_to_picture(tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny.save_pretrained(tmp_path / "tiny")
    out = tmp_path / "out"
    options = {"model": str(tmp_path / "tiny"), "depths": "2", "needles": 2, "output": str(out)}
    evaluate.vniah(["3,6"], **options)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(out / "heatmap.png")
    assert printed.err == ""
    assert sum(" images, depth " in line for line in printed.out.splitlines()) == 8
    assert {path.name for path in out.iterdir()} == {
        "all_accuracies.json", "cells.csv", "cells.jsonl", "heatmap.png"
    }  # fmt: skip
    before = (out / "cells.csv").read_bytes()
    evaluate.vniah(["3,6"], **options)
    again = capsys.readouterr().out
    assert again.startswith(f"8 finished prompts in {out / 'cells.jsonl'}; going on from there")
    assert " images, depth " not in again
    assert (out / "cells.csv").read_bytes() == before
