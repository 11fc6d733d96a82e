"""Videos as frames, pictures as tiles, laid out as when a model is asked; and media that cannot be opened."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longllava.data import frames, tally
from longllava.data.images import open_picture
from longllava.data.packing import Cursor, encode_sample, plan_window
from longllava.data.recipes import Recipe, record_source
from longllava.data.records import Unusable
from longllava.data.source_config import SourceConfig
from longllava.errors import ConfigError, DataError
from longllava.inputs.video import read_frames
from longllava.settings import build
from tests.data.llava_source import LlavaSource
from tests.data.records import asked, write
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(path: Path, width: int = 20, height: int = 12, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def film(path: Path, seconds: int = 6) -> Path:
    """A GIF of one frame a second, each of its own grey."""
    frames = [Image.new("RGB", (32, 24), (40 * n, 40 * n, 40 * n)) for n in range(seconds)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000)
    return path


def source(folder: Path, records: list[dict], **keys):
    write(folder, records)
    row = {"name": "s", "kind": "llava", "licence": "CC0", "origin": "x", "path": "data.json", **keys}
    return record_source(build(SourceConfig, row, "recipe"), folder)


# --- videos


@pytest.mark.parametrize("text", ["<video>What happens?", "<image>What happens?"])
def test_a_video_is_its_frames_taken_once(tmp_path: Path, cache: Path, monkeypatch, text: str) -> None:
    film(tmp_path / "a.gif")
    got = source(tmp_path, [asked(text, video="a.gif")], media={"fps": 0.5, "side": 16})
    sample = got.sample(0)
    assert [medium.n_images for medium in sample.media] == [3] == [len(sample.images)]
    frames = [open_picture(reference) for reference in sample.images]
    assert [frame.size for frame in frames] == [(16, 12)] * 3
    assert [round(np.asarray(frame).mean() / 40) for frame in frames] == [0, 2, 4]
    monkeypatch.setattr("longllava.data.frames.read_frames", None)  # not taken again
    assert got.sample(0) == sample and len(list((cache / "frames").iterdir())) == 1


def test_frames_are_at_most_so_many_and_a_folder_needs_no_cache(tmp_path: Path, cache: Path) -> None:
    for number in range(10):
        picture(tmp_path / "film" / f"frame{number}.png", seed=number)
    got = source(tmp_path, [asked("<video>Well?", video="film")], media={"max_frames": 4})
    assert [Path(one).name for one in got.sample(0).images] == ["frame0.png", "frame2.png", "frame5.png", "frame7.png"]
    assert not cache.exists()


def test_videos_in_a_tar(tmp_path: Path) -> None:
    film(tmp_path / "a.gif")
    with tarfile.open(tmp_path / "v.tar", "w") as tar:
        for name, data in (("0.mov", (tmp_path / "a.gif").read_bytes()), ("0.txt", b"six greys")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    got = source(tmp_path, [], path="v.tar", columns={"answer": "txt"}, question="What happens?", marks="first")
    sample = got.sample(0)
    assert len(sample.images) == 6 and sample.turns[0].text == "<image>What happens?"


def test_marks_say_which_is_a_video(tmp_path: Path) -> None:
    film(tmp_path / "a.gif", 2)
    picture(tmp_path / "b.png")
    got = source(tmp_path, [asked("<image> and <video>?", image="b.png", video="a.gif"),
                            asked("<video> and <image>?", image="b.png", video="a.gif")])  # fmt: skip
    first, second = got.sample(0), got.sample(1)
    assert first.images == (str(tmp_path / "b.png"), *second.images[:2]) and second.images[2] == first.images[0]
    assert [m.video for m in first.media] == [False, True] and first.turns[0].text == "<image> and <image>?"
    for text, media, message in (
        ("<video><video>?", {"video": "a.gif"}, "marks and videos differ: 2 <video> marks, 1 videos"),
        ("<image><image><video>?", {"video": "a.gif", "image": "b.png"}, "2 <image> marks, 1 images"),
        ("<video>?", {"video": "none.mp4"}, "missing video"),
        ("<video>?", {"video": "../a.gif"}, "leaves its folder"),
        ("<video>?", {}, "0 <image> marks|answer|."),
    ):
        with pytest.raises(DataError, match=message):
            source(tmp_path, [asked(text, **media), {"conversations": []}])


def test_videochat_records(tmp_path: Path) -> None:
    film(tmp_path / "a.gif", 2)
    record = {"video": "a.gif", "QA": [{"i": "Watch.", "q": "What opens?", "a": "the door"},
                                       {"i": "", "q": "When?", "a": "late"}]}  # fmt: skip
    got = source(tmp_path, [record], columns={"conversations": "QA"}, marks="first")
    assert [turn.text for turn in got.sample(0).turns] == ["<image>Watch.\nWhat opens?", "the door", "When?", "late"]


# --- tiles


def test_tiles_are_the_pictures_parts(tmp_path: Path) -> None:
    picture(tmp_path / "big.png", 25, 15)
    sample = source(tmp_path, [asked("<image>\nWhat?", image="big.png")], media={"tiles": "fit", "side": 10}).sample(0)
    (medium,) = sample.media
    assert (medium.rows, medium.columns, len(sample.images)) == (2, 3, 7)
    whole = np.full((20, 30, 3), 255, np.uint8)
    whole[2:17, 2:27] = np.asarray(Image.open(tmp_path / "big.png"))
    for number, reference in enumerate(sample.images[1:]):
        row, column = divmod(number, 3)
        expected = whole[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10]
        assert np.array_equal(np.asarray(open_picture(reference)), expected)


def test_more_tiles_than_allowed_are_a_smaller_picture(tmp_path: Path) -> None:
    picture(tmp_path / "big.png", 100, 40)
    media = {"tiles": "fit", "side": 10, "max_tiles": 12}
    sample = source(tmp_path, [asked("<image>\nWhat?", image="big.png")], media=media).sample(0)
    assert (sample.media[0].rows, sample.media[0].columns) == (2, 5)
    assert open_picture(sample.images[1]).size == (10, 10)
    with pytest.raises(ConfigError, match="tiles: got '2by3'"):
        source(tmp_path, [], media={"tiles": "2by3"})


# --- the layout


@pytest.mark.parametrize("published", [False, True])
def test_training_sees_what_a_question_is_laid_out_as(tmp_path: Path, published: bool) -> None:
    from longllava.config import PUBLISHED_PROMPT

    talker = tiny_model(**({"prompt": PUBLISHED_PROMPT} if published else {}))
    film(tmp_path / "a.gif", 3)
    picture(tmp_path / "big.png", 25, 15)
    record = [asked("what is this", image="big.png"), asked("what is this", video="a.gif")]
    tiled = source(tmp_path, record[:1], marks="first", media={"tiles": "fit", "side": 16}).sample(0)
    shot = source(tmp_path, record[1:], marks="first", media={"side": 16}).sample(0)
    for sample, media in ((tiled, {"images": [str(tmp_path / "big.png")], "tiles": "fit"}),
                          (shot, {"video": str(tmp_path / "a.gif")})):  # fmt: skip
        item = encode_sample(sample, talker.processor, None)
        options = {"tiles": media.pop("tiles")} if "tiles" in media else {}
        session = talker.fresh(**options)
        pieces, sources = talker.pieces("what is this", media.get("images"), media.get("video"), session)
        asked_ids = session.encode(pieces)
        n = len(asked_ids.ids)
        assert item.ids[:n] == asked_ids.ids and len(sources) == len(item.images)
        assert [(s.start, s.length) for s in item.spans] == [(s.start, s.length) for s in asked_ids.spans]
        assert item.trainable[:n] == [False] * n and all(item.trainable[n:])


def test_evidence_follows_its_picture(tmp_path: Path) -> None:
    film(tmp_path / "a.gif", 3)
    for name in ("b.png", "c.png"):
        picture(tmp_path / name)
    record = asked("<video><image><image>?", video="a.gif", image=["b.png", "c.png"])
    record["evidence"] = [{"turn": 0, "start": 21, "end": 22, "image": 1}]
    (found,) = source(tmp_path, [record]).sample(0).evidence
    assert found.image == 4


# --- what cannot be opened


def spoiled(folder: Path, n: int, bad: set[int], kind: str = "torn") -> list[dict]:
    whole = picture(folder / "good.jpg", 64, 64).read_bytes()
    (folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    names = [f"{kind}.jpg" if i in bad else "good.jpg" for i in range(n)]
    return [{"id": str(i), **asked("<image>\nWhat?", image=name)} for i, name in enumerate(names)]


def test_a_broken_picture_is_left_out_and_listed(tmp_path: Path) -> None:
    records = spoiled(tmp_path, 300, {7})
    write(tmp_path, records)
    (tmp_path / "r.yaml").write_text(
        "name: r\nsources:\n  - {name: s, kind: llava, licence: CC0, origin: x, path: data.json}\n"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    processor = tiny_model().processor
    plan = plan_window(lambda n: recipe.sample(0, n), processor, Cursor(), seed=0, n_steps=9, n_rows=8, row_length=600)
    (misfit,) = set(plan.misfits)
    assert misfit.source == "s" and misfit.id.startswith(f"{tmp_path}/data.json:") and "broken image" in misfit.why
    items = [item for rows in plan.steps for row in rows for item in row]
    assert "7" not in {item.id for item in items} and len({item.id for item in items}) == 299
    assert recipe.write_rejected(tmp_path / "quarantine.txt") == 1
    assert "torn.jpg" in (tmp_path / "quarantine.txt").read_text()
    again = plan_window(lambda n: Recipe.load(tmp_path / "r.yaml").sample(0, n), processor, Cursor(), seed=0, n_steps=2,
                        n_rows=8, row_length=600)  # fmt: skip
    once = plan_window(lambda n: recipe.sample(0, n), processor, Cursor(), seed=0, n_steps=2, n_rows=8, row_length=600)
    assert again == once  # what is left out follows from the files alone


@pytest.mark.parametrize(
    ("n", "bad", "stops_after"),
    [
        (1000, set(range(0, 900, 100)), None),  # 0.9 %
        (1000, set(range(0, 1000, 90)), 1000),  # 1.2 %
        (2000, set(range(0, 2000, 2)), 1000),  # every second one
        (3000, set(range(1000, 1030)), 1010),  # good ones, then a run of bad ones
        (60, {5}, 60),  # a small source is judged when all of it was seen
        (60, {59}, 60),
    ],
)
def test_more_than_one_in_a_hundred_broken_pictures_stop(tmp_path: Path, monkeypatch, n, bad, stops_after) -> None:
    monkeypatch.setattr("longllava.data.ahead.check_picture", refuse_torn)
    got = LlavaSource("s", write(tmp_path, spoiled(tmp_path, n, bad)))
    seen = 0
    message = "records cannot be used, more than 1.0%: broken image"
    try:
        for index in range(n):
            seen += 1
            try:
                got.sample(index)
            except Unusable as error:
                assert error.kind == "broken image"
    except DataError as error:
        assert message in str(error) and "data.json:" in str(error)
        assert stops_after is not None and abs(seen - stops_after) <= 11, seen
    else:
        assert stops_after is None and len(got.rejected) == len(bad)


def refuse_torn(reference: str) -> None:
    from longllava.errors import InputError

    if "torn" in reference:
        raise InputError("torn")


def test_frames_that_another_process_has_made_meanwhile_are_taken(tmp_path: Path, cache: Path, monkeypatch) -> None:
    video = film(tmp_path / "a.gif")
    options = {"fps": 1.0, "max_frames": 4, "side": 16, "cache": cache}
    others: list[list[str]] = []

    def slow(*args, **kwargs):
        monkeypatch.setattr(frames, "read_frames", read_frames)
        others.append(frames.frames_of(str(video), **options))
        (Path(others[0][0]).parent / ".writing-x").mkdir()  # and a third one is at it
        return read_frames(*args, **kwargs)

    monkeypatch.setattr(frames, "read_frames", slow)
    monkeypatch.setattr(frames, "whole_folder", once(frames.whole_folder))
    assert frames.frames_of(str(video), **options) == others[0] and len(others[0]) == 3


def once(function):
    """It, and an error the second time."""
    left = [function]
    return lambda *args: left.pop()(*args)


def test_a_broken_video_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(film(tmp_path / "b.gif").read_bytes()[:200])
    (tmp_path / "c").mkdir()
    (tmp_path / "c/0.jpg").write_bytes(b"no frame")
    got = source(tmp_path, [asked("<video>?", video=name) for name in ("a.gif", "b.gif", "c")], max_bad=0.7)
    for index, told in ((0, "broken video: .*a.gif"), (2, "broken image: .*c/0.jpg")):
        with pytest.raises(Unusable, match=told):
            got.sample(index)
    assert len(got.sample(1).images) == 6 and [item.kind for item in got.rejected] == ["broken video", "broken image"]


def test_samples_that_are_all_too_long_end_in_an_error(tmp_path: Path) -> None:
    got = LlavaSource("s", write(tmp_path, [asked("x" * 500) for _ in range(5)]))
    with pytest.raises(DataError, match="1000 samples in a row cannot be used; .* tokens, a row holds 64"):
        plan_window(lambda n: (got.sample(n % 5), "s"), tiny_model().processor, Cursor(), seed=0, n_steps=1, n_rows=1,
                    row_length=64)  # fmt: skip


def test_constants_of_the_rule() -> None:
    assert (tally.MAX_BAD, tally.CHECK_AFTER) == (0.01, 1000)


def test_frames_are_what_the_library_reads(tmp_path: Path) -> None:
    film(tmp_path / "a.gif")
    frames = read_frames(tmp_path / "a.gif", fps=1.0, side=16)
    sample = source(tmp_path, [asked("<video>?", video="a.gif")], media={"side": 16}).sample(0)
    for reference, frame in zip(sample.images, frames, strict=True):
        assert np.abs(np.asarray(open_picture(reference)).astype(int) - np.asarray(frame)).max() <= 2
