"""V-NIAH's pictures and settings: needles stand alone in their haystacks, and bad options are one sentence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from longllava.cli import evaluate
from longllava.data.worlds.pictures import combinations, parse_reference
from longllava.data.worlds.sheets import FOLDER
from longllava.errors import LongLLaVAError
from longllava.evals.vniah_options import depths_of, settings_of
from longllava.evals.vniah_task import Settings, digest, draw_haystack, draw_needles, position

ROOT = Path(__file__).parents[2]
SMALL = Settings(images=(5, 12), depths=(0.0, 0.5, 1.0), n_needles=4)


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


@pytest.fixture
def folder_of_pictures(tmp_path: Path) -> Path:
    for i in range(12):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(tmp_path / f"frame{i}.png")
    return tmp_path


def test_a_folder_is_a_haystack(folder_of_pictures: Path) -> None:
    settings = replace(SMALL, haystack=str(folder_of_pictures))
    assert [path.name for path in draw_haystack(settings, 11)] == [f"frame{i}.png" for i in range(11)]
    before = digest(settings)
    assert digest(settings) == before
    Image.new("RGB", (30, 20)).save(folder_of_pictures / "frame3.png")
    assert digest(settings) != before
    with pytest.raises(LongLLaVAError, match=r"12 pictures, 13 are needed; ask for fewer with --images"):
        draw_haystack(settings, 13)


@pytest.mark.parametrize("kind", ["folder", "film", "sheet"])
def test_other_pictures_of_the_same_size_are_another_evaluation(tmp_path: Path, kind: str) -> None:
    """Frames without compression all have one: with the names alone, old prompts were taken for those of new frames."""
    file = tmp_path / "frame.bmp"
    if kind == "sheet":
        shutil.copy(FOLDER / "noto.png", file)
        settings = replace(SMALL, styles=(str(file),))
    else:
        Image.new("RGB", (20, 20), "red").save(file)
        settings = replace(SMALL, haystack=str(tmp_path if kind == "folder" else file))
    before, size = digest(settings), file.stat().st_size
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert file.stat().st_size == size and digest(settings) != before


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
