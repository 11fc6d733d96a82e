"""Which frames are taken, and what is said of files that have none."""

import io

import numpy as np
import pytest
from PIL import Image, ImageSequence

from longllava.errors import InputError
from longllava.inputs import video
from longllava.inputs.colour import rgb
from longllava.inputs.video import leading_frames, read_frames
from tests.inputs.films import grey, levels, write_video
from tests.inputs.pictures import animated_png


@pytest.fixture
def gif(tmp_path):
    """Four frames, half a second each: 0, 60, 120, 180."""
    path = tmp_path / "a.gif"
    frames = [grey(60 * i) for i in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    return path


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(1, [0, 120]), (2, [0, 60, 120, 180]), (4, [0, 0, 60, 60, 120, 120, 180, 180]), (0.1, [0])],
)
def test_gif_frames_at_fps(gif, fps, expected):
    assert levels(read_frames(gif, fps=fps)) == expected


def test_too_many_frames_are_thinned_evenly(gif):
    assert levels(read_frames(gif, fps=2, max_frames=3)) == [0, 120]
    assert levels(read_frames(gif, fps=2, max_frames=1)) == [0]
    frames = [grey(30 * i) for i in range(8)]
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=500)
    assert levels(read_frames(gif, fps=2, max_frames=3)) == [0, 120]
    assert levels(read_frames(gif, fps=2, max_frames=5)) == [0, 60, 120, 180]


def test_frames_are_no_larger_than_asked(gif):
    assert read_frames(gif, side=16)[0].size == (16, 16)


def test_a_folder_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        grey(number).save(tmp_path / f"f{number}.png")
    (tmp_path / "notes.txt").write_text("x")
    assert [path.name for path in read_frames(tmp_path)] == ["f1.png", "f2.png", "f10.png"]
    assert [path.name for path in read_frames(tmp_path, max_frames=2)] == ["f1.png", "f2.png"]


def test_names_that_paths_can_have(tmp_path):
    """A superscript is a digit to str.isdigit, but not to int."""
    grey(1).save(tmp_path / "\u00b21.png")
    grey(2).save(tmp_path / "\u0663.png")
    assert len(read_frames(tmp_path)) == 2
    for name in ("a" * 5000, "a\0b", "\ud800"):
        with pytest.raises(InputError, match="no such video"):
            read_frames(name)


def test_finding_a_frame_takes_no_longer_than_allowed(tmp_path, gif, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [20 * i for i in range(12)])
    monkeypatch.setattr(video, "FIRST_SECONDS", -1.0)
    for file in (path, gif):
        with pytest.raises(InputError, match="0 frames were found in 0 seconds of decoding, at most 10 a frame"):
            read_frames(file)


def test_a_frame_that_stands_for_ages_is_made_once(tmp_path, monkeypatch):
    """A hostile timestamp: without a bound, one frame would be converted for every second of 300 years."""
    made, end = [], 1e10
    sampler = video.Sampler(1.0, 64, None)
    assert len(sampler.take(iter([(end, lambda: made.append(1) or grey(7))]))) <= 64
    assert len(made) == 1


def test_animated_png(tmp_path):
    frames = [grey(60 * i) for i in range(4)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=500)
    assert levels(read_frames(tmp_path / "a.png")) == [0, 120]


@pytest.mark.parametrize(
    ("bits", "colour", "rows", "key", "expected"),
    [
        (2, 0, (b"\x1b", b"\x05"), (1,), [[0, 255, 170, 255], [0, 0, 255, 255]]),
        (4, 0, (b"\x12", b"\x11"), (1,), [[255, 34], [255, 255]]),
        (16, 2, (bytes(range(12)), bytes(12)), (0x0001, 0x0203, 0x0405), [[255, 8], [0, 0]]),
    ],
)
def test_the_transparent_colour_of_an_animated_png_is_white_in_all_frames(bits, colour, rows, key, expected):
    data = animated_png(bits, colour, rows, key)
    assert [np.asarray(frame)[0, :, 1].tolist() for frame in read_frames(data)] == expected
    with Image.open(io.BytesIO(data)) as opened:  # each frame by itself, as the caller goes through them
        found = [np.asarray(rgb(page))[0, :, 1].tolist() for page in ImageSequence.Iterator(opened)]
    assert found == expected


def test_a_png_whose_first_picture_is_no_frame():
    """The APNG specification: without an fcTL chunk before it, it is for programs that show no animation."""
    data = animated_png(8, 0, (b"\x10", b"\x20", b"\x30"), default_first=True)
    assert levels(read_frames(data)) == [0x20, 0x30]


def test_an_empty_name_is_not_the_folder_one_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey(0).save("a.png")
    assert len(read_frames(".")) == 1
    with pytest.raises(InputError, match="^video: the name is empty; give a file or a folder"):
        read_frames("")


def test_bad_videos_get_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no such video"):
        read_frames(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="holds no pictures"):
        read_frames(tmp_path)
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"a\.gif: broken picture: its header is torn"):
        read_frames(tmp_path / "a.gif")
    for name, value in (("fps", 0), ("fps", 1e-300), ("fps", float("nan")), ("max_frames", 0)):
        with pytest.raises(InputError, match=name):
            read_frames(tmp_path, **{name: value})


def test_leading_frames_leave_the_rest_unread(tmp_path, gif):
    path = write_video(tmp_path / "a.mkv", [20 * (i % 12) for i in range(120)])
    torn = tmp_path / "b.mkv"
    torn.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert levels(leading_frames(torn, 5)) == levels(read_frames(path))[:5]
    assert levels(leading_frames(gif, 2, fps=2)) == [0, 60]
    assert levels(leading_frames(gif, 9, fps=2)) == [0, 60, 120, 180]


def test_bytes_are_the_file(tmp_path, gif):
    path = write_video(tmp_path / "a.avi", [20 * i for i in range(12)])
    for file in (path, gif):
        assert levels(read_frames(file.read_bytes())) == levels(read_frames(file))
        with file.open("rb") as opened:
            assert levels(read_frames(opened)) == levels(read_frames(file)) == levels(read_frames(opened))


@pytest.mark.parametrize(("kind", "expected"), [("tiff", [0, 60, 120, 180]), ("webp", [0, 120])])
def test_pages(tmp_path, kind, expected):
    """All pages of a TIFF; a WebP by its durations, as a GIF."""
    frames = [grey(60 * i) for i in range(4)]
    options = {"duration": 500, "lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert levels(read_frames(tmp_path / f"a.{kind}")) == expected
    assert levels(read_frames(tmp_path / f"a.{kind}", fps=2, max_frames=2)) == [0, 120]


def test_no_page_is_taken_twice():
    file, pages = io.BytesIO(), [Image.new("L", (1, 1)) for _ in range(500)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    assert len(read_frames(file.getvalue(), fps=0.0007)) == 500
