"""Video files: any codec, few frames decoded, none made up, and nothing but the file is opened."""

import builtins

import numpy as np
import pytest

from longllava.errors import InputError
from longllava.inputs import video_file
from longllava.inputs.video import read_frames
from longllava.inputs.video_file import VideoFile, upright
from tests.inputs.films import grey, levels, write_video


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


@pytest.mark.parametrize("name", ["a.mkv", "a.nut", "a.wmv", "a.mp4"])
def test_a_part_of_a_longer_recording(tmp_path, name):
    """Its first frame is shown at a later second; some containers count their durations from 0 all the same."""
    whole, part = (write_video(tmp_path / f"{start}{name}", range(0, 240, 4), start=start) for start in (0, 100))
    for sampling in ({"fps": 1}, {"fps": 4, "max_frames": 10}):
        frames = read_frames(part, **sampling)
        assert levels(frames) == levels(read_frames(whole, **sampling)) and len(frames) >= 10
    if name == "a.mkv":
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
        with pytest.raises(InputError, match=r"100a\.mkv: torn: frames end at \d\.\d of 15\.0 seconds"):
            read_frames(part)


def test_without_pyav_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    original = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(InputError, match=r"needs PyAV \(av\); pip install .longllava\[video\]"):
        read_frames(tmp_path / "a.mp4")


CODECS = {
    "a.mp4": ("libx264", "yuv420p", {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0"}),
    "a.ts": ("libx264", "yuv420p", {"x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0"}),
    "a.mov": ("libx265", "yuv420p", {"x265-params": "bframes=3:keyint=12:min-keyint=12:log-level=none"}),
    "a.webm": ("libvpx-vp9", "yuv420p", {"g": "12"}),
    "a.mkv": ("libsvtav1", "yuv420p", {"g": "12"}),
    "a.avi": ("mjpeg", "yuvj420p", {}),
}


@pytest.mark.parametrize("name", CODECS)
def test_codecs_and_open_groups_of_pictures(tmp_path, name):
    """Decoding that begins at a key frame, before which others are shown, loses nothing and warns of nothing."""
    av = pytest.importorskip("av")
    codec, pixel_format, options = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    values = [(37 * i) % 240 for i in range(160)]
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=4, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = pixel_format
        for value in values:
            container.mux(stream.encode(av.VideoFrame.from_image(grey(value, 64))))
        container.mux(stream.encode())
    every = levels(read_frames(tmp_path / name, fps=4))
    assert every == pytest.approx(values, abs=4)
    for fps, step in ((1, 4), (0.25, 16), (0.04, 100)):
        assert levels(read_frames(tmp_path / name, fps=fps)) == every[::step]


def with_broken_packets(path, target, broken):
    """The same packets; those numbered in `broken` hold noise."""
    import av

    rng = np.random.default_rng(0)
    with av.open(str(path)) as source, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.dts is None:
                continue
            if number in broken:
                noise = av.Packet(rng.bytes(packet.size))
                noise.pts, noise.dts, noise.time_base = packet.pts, packet.dts, packet.time_base
                noise.is_keyframe, packet = packet.is_keyframe, noise
            packet.stream = stream
            container.mux(packet)
    return target


def test_a_few_broken_packets_are_left_out_with_a_warning(tmp_path):
    """400 frames, a key frame each 12; a broken one takes with it what builds on it, and no picture is made up."""
    values = [5 * i % 200 for i in range(400)]
    path = write_video(tmp_path / "a.mkv", values)
    few = with_broken_packets(path, tmp_path / "b.mkv", {115})
    with pytest.warns(
        UserWarning, match=r"5 of 400 decoded frames are broken, at 28\.8 to 29\.8 seconds; they are left"
    ):
        found = levels(read_frames(few, fps=4))
    assert found == pytest.approx([*values[:115], *[values[114]] * 5, *values[120:]], abs=6)
    many = with_broken_packets(path, tmp_path / "c.mkv", set(range(100, 300, 9)))
    with pytest.raises(InputError, match=r"c\.mkv: \d+ of 4\d\d decoded frames are broken, at .* seconds; at most 5%"):
        read_frames(many, fps=4)


def test_frames_without_times_come_one_after_the_other(tmp_path):
    """As in a bare stream of H.264."""
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "a.mkv", [20 * i for i in range(12)], b_frames=0)
    with av.open(str(path)) as container:
        reader = VideoFile(container)
        seconds = [reader.second_of(type("Frame", (), {"time": None})) for _ in range(4)]
    assert seconds == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("n_frames", [3, 12])
def test_a_cover_is_no_film(tmp_path, n_frames):
    """As the first of two streams, one picture, it was all that was read of a film of less than a second."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        cover, film = container.add_stream("mjpeg", rate=1), container.add_stream("mpeg4", rate=4)
        for stream in (cover, film):
            stream.width = stream.height = 32
            stream.pix_fmt = "yuvj420p" if stream is cover else "yuv420p"
        for stream, values in ((cover, [255]), (film, [20 * i for i in range(n_frames)])):
            for value in values:
                container.mux(stream.encode(av.VideoFrame.from_image(grey(value))))
            container.mux(stream.encode())
    found = levels(read_frames(tmp_path / "a.mkv", fps=4))
    assert found == pytest.approx([20 * i for i in range(n_frames)], abs=6)


def test_a_codec_that_cannot_be_decoded(tmp_path):
    path = write_video(tmp_path / "a.mkv", [20 * i for i in range(12)])
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/ASP", b"V_NOBODY/KNOWS/"))
    with pytest.raises(InputError, match=r"a\.mkv: its video is of a codec that PyAV cannot decode"):
        read_frames(path)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize(("gop", "b_frames"), [(1, 0), (12, 0), (12, 2), (600, 0)])
def test_leaving_frames_out_changes_none_that_is_taken(tmp_path, kind, gop, b_frames, monkeypatch):
    """400 frames in 100 seconds, whatever lies between two key frames: as if every frame had been decoded."""
    values = [(37 * i) % 240 for i in range(400)]
    path = write_video(tmp_path / f"a.{kind}", values, gop=gop, b_frames=b_frames)
    every = levels(read_frames(path, fps=4))
    assert len(every) == 400 and every == pytest.approx(values, abs=12)
    n_made = []
    monkeypatch.setattr(video_file, "upright", lambda frame: n_made.append(1) or upright(frame))
    for fps, step in ((1, 4), (0.25, 16), (0.02, 200)):
        n_made.clear()
        assert levels(read_frames(path, fps=fps)) == every[::step]
        assert len(n_made) == len(every[::step])
    assert levels(read_frames(path, fps=4, max_frames=4)) == every[::100]


def test_few_frames_are_decoded_and_none_is_read_twice(tmp_path, monkeypatch):
    """Key frames every 3 s: a frame each 50 s costs a seek and at most 12 decoded frames, not 200."""
    path = write_video(tmp_path / "a.mp4", [i % 250 for i in range(2400)])
    decoded, leaps = [], []
    frames, leap = VideoFile.second_of, VideoFile.leap
    monkeypatch.setattr(VideoFile, "second_of", lambda self, frame: decoded.append(1) or frames(self, frame))
    monkeypatch.setattr(VideoFile, "leap", lambda self, *at: leap(self, *at) and (leaps.append(1) or True))
    assert levels(read_frames(path, fps=0.02)) == pytest.approx([200 * i % 250 for i in range(12)], abs=6)
    assert len(leaps) >= 11 and len(decoded) < 12 * 20
    decoded.clear()
    leaps.clear()
    read_frames(path, fps=0.2)
    assert not leaps and len(decoded) < 120 * 16


def test_a_video_without_key_frames_is_read_through(tmp_path, monkeypatch):
    """A seek that leads backwards is tried once."""
    path = write_video(tmp_path / "a.mp4", [i % 250 for i in range(1200)], gop=100_000)
    leaps, leap = [], VideoFile.leap
    monkeypatch.setattr(VideoFile, "leap", lambda self, *at: leap(self, *at) and (leaps.append(1) or True))
    assert levels(read_frames(path, fps=0.02)) == pytest.approx([0, 200, 150, 100, 50, 0], abs=6)
    assert len(leaps) == 1


def test_at_most_max_frames_and_evenly(tmp_path):
    path = write_video(tmp_path / "a.mp4", [i % 250 for i in range(250)])
    for n in (1, 2, 7, 50, 249):
        frames = levels(read_frames(path, fps=120, max_frames=n))
        assert len(frames) == n
        assert frames == pytest.approx([int(i * 250 / n) for i in range(n)], abs=6)


def test_playlists_open_no_other_file(tmp_path):
    """FFmpeg follows the names inside them, wherever they lead."""
    path = write_video(tmp_path / "a.mp4", [20 * i for i in range(12)])
    texts = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{path}\n#EXT-X-ENDLIST\n",
        "a.ffconcat": f"ffconcat version 1.0\nfile {path.name}\n",
        "b.mp4": f"#EXTM3U\n#EXTINF:3,\n{path}\n#EXT-X-ENDLIST\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=f"{name}: broken video, or of no known format"):
            read_frames(tmp_path / name)
