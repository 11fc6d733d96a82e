"""The feature cache: what it returns is what the encoder made, whatever happened to the process that wrote it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longllava.data.embedded import in_table
from longllava.data.features import FeatureCache, encoder_cache, picture_key
from tests.tiny_world import world_model, world_samples

TOKENS, WIDTH = 3, 5


def value(reference: str) -> torch.Tensor:
    """What the pretended encoder makes of a picture: whole numbers, exact in bfloat16."""
    generator = torch.Generator().manual_seed(sum(reference.encode("utf-8", "surrogateescape")))
    return torch.randint(-99, 99, (TOKENS, WIDTH), generator=generator).float()


def open_cache(folder: Path, calls: list[str] | None = None, fingerprint: str = "one") -> FeatureCache:
    def encode(references) -> torch.Tensor:
        if calls is not None:
            calls.extend(references)
        return torch.stack([value(reference) for reference in references])

    return FeatureCache(encode, fingerprint=fingerprint, tokens=TOKENS, width=WIDTH, folder=folder)


def assert_right(cache: FeatureCache, references: list[str]) -> None:
    torch.testing.assert_close(cache.get(references).float(), torch.stack([value(ref) for ref in references]))


def test_each_picture_is_encoded_once_by_all_who_share_a_cache(tmp_path, monkeypatch) -> None:
    decode, lines, calls = os.fsdecode, list[str](), list[str]()
    monkeypatch.setattr(os, "fsdecode", lambda line: lines.append(line) or decode(line))
    first, second = open_cache(tmp_path, calls), open_cache(tmp_path, calls)
    names = [f"world:{i}" for i in range(150)]
    assert first.fill(names[:100] + names[:3]) == 100
    assert second.fill(names) == 50
    assert calls == names
    assert len(lines) == 100 + 150  # each read each line once, not all of them after every batch
    assert_right(second, names[::-1])
    assert_right(open_cache(tmp_path, calls), names)
    assert open_cache(tmp_path, fingerprint="two").missing(names) == names  # another encoder: another folder
    shuffled = [names[0], *(in_table(tmp_path / "pictures.parquet", row, 0, "image") for row in (12, 3, 7)), "world:x"]
    first.fill(shuffled)  # those of a table in its order, or a row group would be decoded for each
    assert calls[150:] == [shuffled[4], shuffled[2], shuffled[3], shuffled[1]]


def test_pictures_that_another_run_encoded_since(tmp_path) -> None:
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    first.fill(["world:1", "world:2"])
    assert_right(first, ["world:2"])
    second.fill(["world:3"])
    assert first.fill(["world:3"]) == 0  # nothing of its own to write: what it had mapped ends before the new record
    assert_right(first, ["world:3", "world:1"])


@pytest.mark.parametrize("name", ["two\nlines", "c:\\new\\n", "a\\\nb", "next\x85line\u2028", "latin-\udcff"])
def test_any_name_of_a_file_is_one_line(tmp_path, name: str) -> None:
    names = [name, "world:1", name.replace("\n", "\\n") + "x", "world:2"]
    open_cache(tmp_path).fill(names)
    reopened = open_cache(tmp_path)
    assert reopened.missing(names) == [] and reopened.n_records == 4
    assert_right(reopened, names)


def test_keys_differ_where_names_do(tmp_path) -> None:
    assert len({picture_key(name) for name in ("a\nb", "a\\nb", "a\\\nb", "a\\\\nb")}) == 4
    path = tmp_path / "p.png"
    path.write_bytes(b"1")
    before = picture_key(str(path))
    path.write_bytes(b"22")
    assert picture_key(str(path)) != before  # the file has changed


def test_a_picture_that_is_written_anew_while_it_is_encoded(tmp_path) -> None:
    """What was made of the old one stayed in the cache as the new one's."""
    path = tmp_path / "a.png"
    path.write_bytes(b"1")

    def encode(references) -> torch.Tensor:
        if (seen := float(path.read_bytes())) == 1:
            path.write_bytes(b"22")
        return torch.full((1, TOKENS, WIDTH), seen)

    cache = FeatureCache(encode, fingerprint="one", tokens=TOKENS, width=WIDTH, folder=tmp_path)
    assert cache.fill([str(path)]) == 1 and cache.missing([str(path)])
    assert cache.fill([str(path)]) == 1 and cache.get([str(path)]).unique() == 22


@pytest.mark.parametrize("form", ["world:3.1.2.1.4.7.0@{}", "world:grid:2:3.1.2.1.4.7.0@noto|3.1.2.1.4.7.0@{}"])
def test_a_sheet_of_ones_own_counts_as_a_file(tmp_path, monkeypatch, form: str) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sheet.png").write_bytes(folder.encode())
    keys = []
    for folder in ("one", "other"):
        monkeypatch.chdir(tmp_path / folder)
        keys.append(picture_key(form.format("sheet.png")))
    Path("sheet.png").write_bytes(b"drawn anew")
    assert len({*keys, picture_key(form.format("sheet.png"))}) == 3
    assert picture_key(form.format("fluent")) == form.format("fluent")


@pytest.mark.parametrize("tear", ["key", "record", "line without record", "record without line", "all records"])
def test_torn_files_lose_their_end_and_nothing_else(tmp_path, tear: str) -> None:
    names = [f"world:{i}" for i in range(10)]
    cache = open_cache(tmp_path)
    cache.fill(names)
    if tear == "key":
        os.truncate(cache.keys, cache.keys.stat().st_size - 3)
    elif tear == "record":
        os.truncate(cache.data, 7 * cache.record + 11)
    elif tear == "line without record":
        with cache.keys.open("ab") as file:
            file.write(b"world:10\n")
    elif tear == "record without line":
        with cache.data.open("ab") as file:
            file.write(b"\x55" * (cache.record + 3))
    else:
        cache.data.unlink()
    calls: list[str] = []
    reopened = open_cache(tmp_path, calls)
    more = [*names, "world:10", "world:11"]
    reopened.fill(more)
    again = {"key": names[9:], "record": names[7:], "all records": names}.get(tear, [])
    assert calls == [*again, "world:10", "world:11"]
    assert_right(reopened, more)
    assert_right(open_cache(tmp_path), more)


def test_a_full_disk_names_the_cache_and_costs_no_record(tmp_path) -> None:
    resource = pytest.importorskip("resource")
    names = [f"world:{i}" for i in range(200)]
    cache = open_cache(tmp_path)
    cache.fill(names[:3])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * cache.record + 5, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            cache.fill(names)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(cache.data)
    cache.fill(names)
    assert_right(cache, names)
    assert_right(open_cache(tmp_path), names)


CHILD = """
import os, sys, time
from pathlib import Path
from tests.data.test_features import open_cache
cache = open_cache(Path(sys.argv[1]))
encode, cache.encode = cache.encode, lambda references: (time.sleep(0.01), encode(references))[1]
print("ready", flush=True)
for first in range(0, 4000, 20):
    cache.fill([f"world:{i}" for i in range(first, first + 20)])
"""


def test_a_process_killed_in_the_middle_leaves_whole_records(tmp_path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    keys = next(tmp_path.iterdir()) / "keys.txt"
    while keys.stat().st_size < 2000:  # some appends have happened
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    cache = open_cache(tmp_path)
    written = [f"world:{i}" for i in range(4000)]
    written = [name for name in written if not cache.missing([name])]
    assert 100 < len(written) < 4000
    assert_right(cache, written)


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_where_there_are_no_locks_it_goes_on_without(tmp_path, monkeypatch, number: int, goes_on: bool) -> None:
    """As some network file systems answer; any other fault is told."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    if not goes_on:
        with pytest.raises(OSError, match=os.strerror(number)):
            open_cache(tmp_path)
        return
    names = [f"world:{i}" for i in range(5)]
    assert open_cache(tmp_path).fill(names) == 5
    assert_right(open_cache(tmp_path), names)


def test_an_encoders_cache_holds_what_the_model_makes(tmp_path) -> None:
    model, processor = world_model()
    references = sorted({ref for sample in world_samples("nano/stage2", 6) for ref in sample.images})
    cache = encoder_cache(model, processor, tokens=4, folder=tmp_path)
    cache.fill(references)
    with torch.no_grad():
        expected = model.image_tokens(model.encode(processor.pixels(references, opened)))
        torch.testing.assert_close(model.image_tokens(cache.get(references)), expected, rtol=0.02, atol=0.02)
    other, _ = world_model()
    assert encoder_cache(other, processor, tokens=4, folder=tmp_path).missing(references) == []
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1e-3)
    assert encoder_cache(other, processor, tokens=4, folder=tmp_path).missing(references) == references


def opened(reference: str):
    from longllava.data.images import open_reference

    return open_reference(reference)
