"""Which frames are taken, and what is said of files that have none."""

import builtins

import numpy as np
import pytest
from PIL import Image

from longllava.errors import InputError
from longllava.inputs.video import read_frames


def grey(value, side=32):
    return Image.new("RGB", (side, side), (value, value, value))


def levels(frames):
    return [round(float(np.asarray(frame).mean())) for frame in frames]


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


def write_video(path, values, rate=4):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 32
        for value in values:
            container.mux(stream.encode(av.VideoFrame.from_image(grey(value))))
        container.mux(stream.encode())


def test_video_file(tmp_path):
    write_video(tmp_path / "a.mp4", [20 * i for i in range(12)])
    assert levels(read_frames(tmp_path / "a.mp4")) == pytest.approx([0, 80, 160], abs=4)
    assert len(read_frames(tmp_path / "a.mp4", fps=4)) == 12


def test_torn_video_is_one_sentence(tmp_path):
    write_video(tmp_path / "a.mkv", [20 * (i % 12) for i in range(60)])
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "b.mkv").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"b\.mkv: torn: frames end at \d+\.\d of 15\.0 seconds"):
        read_frames(tmp_path / "b.mkv")
    (tmp_path / "c.mkv").write_bytes(data[:100])
    with pytest.raises(InputError, match=r"c\.mkv: (broken video|the file has no video)"):
        read_frames(tmp_path / "c.mkv")


def test_without_pyav_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    original = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(InputError, match=r"longllava\[video\]"):
        read_frames(tmp_path / "a.mp4")


def test_bad_videos_get_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no such video"):
        read_frames(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="holds no pictures"):
        read_frames(tmp_path)
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"a\.gif: broken GIF"):
        read_frames(tmp_path / "a.gif")
    for name, value in (("fps", 0), ("fps", float("nan")), ("max_frames", 0)):
        with pytest.raises(InputError, match=name):
            read_frames(tmp_path, **{name: value})
