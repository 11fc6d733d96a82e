"""Hostile inputs by the thousand: an answer or one LongLLaVAError within five seconds, and never a picture made up.

A kind's inputs are numbered; an input that failed is made again by `judge(number)`. Ordinary runs try a few of each,
`make fuzz N=100000` any number.
"""

import io
import json
import os
import random
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from longllava.errors import LongLLaVAError
from longllava.inputs import address
from longllava.inputs.image import open_image, upright_size
from longllava.inputs.media import MediaOptions, MediaReader
from longllava.inputs.video import read_frames
from tests.tiny import tiny_model

FEW, MANY = 60, int(os.environ.get("LONGLLAVA_FUZZ", "2000"))
SECONDS = 5.0
MODEL = tiny_model()


def picture(width=40, height=30):
    """Smooth, so that broken parts stand out."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [40 + 4 * x, 60 + 5 * y, 230 - 2 * x - 2 * y]
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


def file_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture_files():
    image, exif = picture(), Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    alpha = image.copy()
    alpha.putalpha(image.getchannel(0))
    pages = {"save_all": True, "append_images": [picture().rotate(90 * i, expand=True) for i in (1, 2, 3)]}
    return [
        file_of(image, "JPEG", quality=90, exif=exif), file_of(image, "JPEG", progressive=True),
        file_of(image.convert("CMYK"), "JPEG"), file_of(image.convert("L"), "JPEG", restart_marker_rows=1),
        file_of(image, "PNG"), file_of(alpha.convert("P"), "PNG", transparency=3), file_of(deep, "PNG"),
        file_of(alpha, "PNG", exif=exif), file_of(image.convert("1"), "PNG"), file_of(image, "PNG", **pages),
        file_of(image, "GIF"), file_of(image, "GIF", duration=90, loop=0, **pages), file_of(image, "BMP"),
        file_of(image, "WEBP"), file_of(alpha, "WEBP", lossless=True),
        file_of(image, "WEBP", save_all=True, append_images=[picture().rotate(180)]),
        file_of(image, "TIFF", exif=exif), file_of(image, "TIFF", compression="tiff_lzw", **pages),
        file_of(image, "TIFF", compression="jpeg"), file_of(deep, "TIFF"),
        file_of(image.convert("1"), "TIFF", compression="group4"),
    ]  # fmt: skip


def video_file(kind, codec, n=40):
    av = pytest.importorskip("av")
    file, base = io.BytesIO(), picture(160, 60)
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.gop_size = 64, 48, 8
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(n):
            container.mux(stream.encode(av.VideoFrame.from_image(base.crop((i, i // 4, i + 64, i // 4 + 48)))))
        container.mux(stream.encode())
    return file.getvalue()


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def mutated(data, draw):
    """A file with one to four faults."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data))
        fault = draw.randrange(7)
        if fault <= 1:
            data[at] ^= 1 << draw.randrange(8)
        elif fault == 2:
            data[at] = draw.choice((0, 1, 127, 128, 255))
        elif fault == 3:
            data[at : at + draw.randrange(1, 40)] = draw.randbytes(draw.randrange(40))
        elif fault == 4:  # a number of a header
            data[at : at + 4] = draw.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000, 89_478_486)).to_bytes(
                4, draw.choice(("big", "little"))
            )
        elif fault == 5:
            data[at:at] = data[at : at + draw.randrange(1, 200)]
        else:
            data[at : at + draw.randrange(1, 400)] = bytes(draw.randrange(400))
        data = data or bytearray(b"\0")
    return bytes(data)


def outcome(call):
    """What a call gives, None for one LongLLaVAError of one line; warnings are no matter here."""
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except LongLLaVAError as error:
        assert len(str(error)) > 8 and "\n" not in str(error) and " at 0x" not in str(error), error
        return None
    finally:
        assert time.monotonic() - started < SECONDS


def judge_picture(number):
    """A cut file is an error, or all of its picture was there; a PNG's checksums find every other fault."""
    draw = random.Random(number)
    data = draw.choice(FILES["pictures"])
    sound = np.asarray(outcome(lambda: open_image(data)))
    torn = draw.random() < 0.3
    broken = cut(data, draw) if torn else mutated(data, draw)
    image = outcome(lambda: open_image(broken, wanted_side=draw.choice((None, 8))))
    outcome(lambda: upright_size(broken))
    assert image is None or (image.mode == "RGB" and 0 < image.width * image.height < 90e6)
    if image is not None and (torn or (data[:4] == b"\x89PNG" and broken[:4] == data[:4])):
        assert np.array_equal(np.asarray(image.resize(sound.shape[1::-1])), sound)
    return image is not None


def judge_video(number):
    """A cut or mended file shows frames of the sound one, or none. Files of VP9 have no checks to find flipped bits."""
    draw = random.Random(number)
    data = draw.choice(FILES["videos"] + FILES["pages"])
    sound = outcome(lambda: read_frames(data, fps=8))
    torn = draw.random() < 0.3
    broken = cut(data, draw) if torn else mutated(data, draw)
    fps = draw.choice((8, 1, 0.2))
    frames = outcome(lambda: read_frames(broken, fps=fps, max_frames=draw.choice((1, 7, 100)), side=64))
    if frames is not None and torn:
        whole = np.stack([np.asarray(frame).astype(np.int16) for frame in sound if frame.size == sound[0].size])
        for frame in frames:
            if frame.size == sound[0].size:
                assert np.abs(whole - np.asarray(frame)).mean(axis=(1, 2, 3)).min() < 3
    return frames is not None


WORDS = ["<image>", "<imag", "e>", "</img>", "<img>", "<|endoftext|>", "<|startoftext|>", "<|User|>", "<vid>", "<t>",
         "a", "?", " what is", "\n", "\0", "\ud800", "\u202e", "é", "\u0301", "\U0001f642", "{{", "%s", "\\", "'",
         "{% raw %}"]  # fmt: skip
VALUES = [None, True, 0, -1, 7, 0.5, 2.5, 1e308, float("nan"), "", "a", "fit", "2x3", "0x1", "1x99999", "\u0661x\u0662",
          [], ["*"], [None], {}, b"", "http://a"]  # fmt: skip


def judge_prompt(number):
    """Strings, parts and messages, with pictures or without."""
    draw = random.Random(number)

    def text():
        return "".join(draw.choices(WORDS, k=draw.randrange(8)))

    def part():
        kinds = ("text", "image", "video", "audio", None)
        keys = ("text", "image", "path", "video", "url")
        sources = (text(), None, picture(), "none.png", 7)
        return draw.choice(
            ({"type": "text", "text": text()}, {"type": "image", "image": picture()},
             {"type": draw.choice(kinds), draw.choice(keys): draw.choice(sources)}, text(), None)
        )  # fmt: skip

    def message():
        content = draw.choice((text(), [part() for _ in range(draw.randrange(4))], None, 7))
        return draw.choice(
            ({"role": draw.choice(("user", "assistant")), "content": content}, {"role": "user", "content": text()},
             {"role": text()}, text(), None)
        )  # fmt: skip

    prompt = draw.choice((text(), text(), [message() for _ in range(draw.randrange(1, 4))], draw.choice(VALUES)))
    images = draw.choice((None, picture(), [picture()] * draw.randrange(4), draw.choice(VALUES)))
    options = {draw.choice(("tiles", "fps", "max_frames", "allow_hosts", "video")): draw.choice(VALUES)}
    options = options if draw.random() < 0.3 else {}
    answer = outcome(lambda: MODEL.generate(prompt, images, max_new_tokens=2, **options))
    assert answer is None or isinstance(answer, str)
    return answer is not None


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
        data = draw.choice(FILES["pictures"])
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
FILES = {"pictures": picture_files()}
FILES["pages"] = [data for data in FILES["pictures"] if data[:3] in (b"GIF", b"RIF", b"II*", b"\x89PN")][:6]
KINDS = {"picture": judge_picture, "video": judge_video, "prompt": judge_prompt, "tiles": judge_tiles,
         "folder": judge_folder, "address": judge_address}  # fmt: skip


def try_all(kind, numbers, tmp_path, monkeypatch):
    """Counts what was taken; both outcomes must occur, or nothing was tried."""
    extra = ()
    if kind == "video" and "videos" not in FILES:
        pytest.importorskip("av")
        FILES["videos"] = [video_file("mp4", "mpeg4"), video_file("matroska", "mpeg4"), video_file("avi", "mjpeg")]
        try:
            FILES["videos"] += [video_file("mp4", "libx264"), video_file("webm", "libvpx-vp9")]
        except ValueError:  # a PyAV without these encoders
            pass
    if kind == "folder":
        extra = (tmp_path,)
    if kind == "address":
        public, inside = [(0, 0, 0, "", ("93.184.216.34", 0))], [(0, 0, 0, "", ("10.0.0.1", 0))]
        monkeypatch.setattr(
            address.socket, "getaddrinfo",
            lambda host, *a, **b: (host.encode("idna"), public if host == "a.example" else inside)[1],
        )  # fmt: skip
        monkeypatch.setattr(address, "connect", connect_to_nothing)
    n_taken = 0
    for number in numbers:
        try:
            n_taken += KINDS[kind](number, *extra)
        except Exception as error:
            raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
    print(json.dumps({"kind": kind, "inputs": len(numbers), "taken": n_taken}))
    assert 0 < n_taken < len(numbers)


def connect_to_nothing(host, port, numbers, secure, deadline):
    assert numbers == ["93.184.216.34"] or host == "127.0.0.1", f"it connected to {host}"
    CONNECTED.append(host)
    raise OSError("nothing there")


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_hostile_inputs(kind, tmp_path, monkeypatch):
    try_all(kind, range(FEW), tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_hostile_inputs(kind, tmp_path, monkeypatch):
    try_all(kind, range(MANY), tmp_path, monkeypatch)
