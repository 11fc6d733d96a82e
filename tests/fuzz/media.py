"""Pictures, videos, tiles, folders of frames and addresses: one number, one hostile input."""

import functools
import os
import random

import numpy as np

from longllava.inputs import address
from longllava.inputs.image import open_image, upright_size
from longllava.inputs.media import MediaOptions, MediaReader
from longllava.inputs.video import read_frames
from tests.fuzz.material import VALUES, cut, file_of, files, mutated, outcome, picture


@functools.cache
def sound_picture(data):
    return np.asarray(outcome(lambda: open_image(data)))


@functools.cache
def sound_frames(data):
    """(N, H, W, 3), of the first one's size."""
    frames = outcome(lambda: read_frames(data, fps=8))
    return np.stack([np.asarray(frame).astype(np.int16) for frame in frames if frame.size == frames[0].size])


def judge_picture(number):
    """A cut file is an error, or all of its picture was there; a PNG's checksums find every other fault."""
    draw = random.Random(number)
    data = draw.choice(files("pictures"))
    torn = draw.random() < 0.3
    broken = cut(data, draw) if torn else mutated(data, draw)
    image = outcome(lambda: open_image(broken, wanted_side=draw.choice((None, 8))))
    outcome(lambda: upright_size(broken))
    assert image is None or (image.mode == "RGB" and 0 < image.width * image.height < 90e6)
    if image is not None and (torn or (data[:4] == b"\x89PNG" and broken[:4] == data[:4])):
        sound = sound_picture(data)
        assert np.array_equal(np.asarray(image.resize(sound.shape[1::-1])), sound)
    return image is not None


def judge_video(number):
    """A cut or mended file shows frames of the sound one, or none. Files of VP9 have no checks to find flipped bits."""
    draw = random.Random(number)
    data = draw.choice(files("videos") + files("pages"))
    torn = draw.random() < 0.3
    broken = cut(data, draw) if torn else mutated(data, draw)
    fps = draw.choice((8, 1, 0.2))
    frames = outcome(lambda: read_frames(broken, fps=fps, max_frames=draw.choice((1, 7, 100)), side=64))
    if frames is not None and torn:
        whole = sound_frames(data)
        for frame in frames:
            if frame.size == whole.shape[2:0:-1]:
                assert np.abs(whole - np.asarray(frame)).mean(axis=(1, 2, 3)).min() < 3
    return frames is not None


def judge_tiles(number):
    """Every tile is whole, and together they hold the picture."""
    draw = random.Random(number)
    tiles = draw.choice((draw.choice(VALUES), f"{draw.randrange(40)}x{draw.randrange(40)}", "fit"))
    size = draw.choice((1, 2, 17, 40, 90)), draw.choice((1, 3, 40, 64))
    data = file_of(picture(*size), draw.choice(("PNG", "BMP", "TIFF")))
    data = cut(data, draw) if draw.random() < 0.2 else data
    side = draw.choice((1, 2, 16))
    options = outcome(lambda: MediaOptions(tiles=tiles))
    if options is None:
        return False
    split = outcome(lambda: MediaReader(options, side).image(data))
    if split is None or split is data:
        return split is not None
    sources = split.sources()
    assert len(sources) == 1 + split.rows * split.columns
    chosen = [1, len(sources) // 2, len(sources) - 1]
    made = [outcome(lambda place=place: open_image(sources[place])) for place in chosen]
    assert all(tile is None or tile.size == (side, side) for tile in made)
    return None not in made


def judge_folder(number, folder):
    """Frames are files that were there; those that are no pictures say so by name."""
    draw = random.Random(number)
    folder = folder / str(number)
    folder.mkdir()
    for _ in range(draw.randrange(5)):
        name = "".join(
            draw.choices(["1", "10", "٣", "²", "a", " ", ".", "é", "\n", "-", "\u202e"], k=draw.randrange(1, 6))
        )
        path = folder / (name.strip(".") + draw.choice((".png", ".JPG", ".gif", ".txt", "", ".jpeg")))
        data = draw.choice(files("pictures"))
        what = draw.randrange(6)
        if path.exists() or path.is_symlink():
            continue
        if what == 0:
            path.mkdir()
        elif what == 1:
            path.symlink_to(draw.choice(("/dev/zero", "..", "nothing", path.name)))
        elif what == 2:
            os.mkfifo(path)
        else:
            path.write_bytes(data if what > 3 else mutated(data, draw))
    frames = outcome(lambda: read_frames(folder, max_frames=draw.choice((1, 3, 100))))
    for frame in frames or ():
        assert frame.parent == folder and frame.is_file()
        outcome(lambda frame=frame: open_image(frame))
    return frames is not None


def judge_address(number):
    """No address that was not allowed is connected to."""
    draw = random.Random(number)
    parts = ["http", "https", "ftp", "file", ":", "/", "//", "@", "[", "]", "::1", "127.0.0.1", "a.example", "..", "é",
             "b.example", "a" * 64, "%00", "%2e", "\\", "#", "?", ":80", ":99999", "\uff11", "\u2100", "\ud800", " ",
             "\n", "xn--", "0x7f.1"]  # fmt: skip
    text = draw.choice(("http://", "https://", "", "://", "https://a.example", "http://a.example/")) + "".join(
        draw.choices(parts, k=draw.randrange(1, 6))
    )
    hosts = draw.choice(([], ["*"], ["a.example"], ["127.0.0.1"]))
    before = len(CONNECTED)
    assert outcome(lambda: address.download(text, hosts)) is None
    return len(CONNECTED) > before


CONNECTED: list[str] = []  # hosts


def connect_to_nothing(host, port, numbers, secure, deadline):
    assert numbers == ["93.184.216.34"] or host == "127.0.0.1", f"it connected to {host}"
    CONNECTED.append(host)
    raise OSError("nothing there")


def without_a_network(monkeypatch):
    """a.example is public, other names are inside, and nobody answers."""
    public, inside = [(0, 0, 0, "", ("93.184.216.34", 0))], [(0, 0, 0, "", ("10.0.0.1", 0))]
    monkeypatch.setattr(
        address.socket, "getaddrinfo",
        lambda host, *a, **b: (host.encode("idna"), public if host == "a.example" else inside)[1],
    )  # fmt: skip
    monkeypatch.setattr(address, "connect", connect_to_nothing)
