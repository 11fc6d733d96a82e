"""Data sets by `datasets`, downloaded or streamed: the same records, and a stream that goes on where it was."""

from __future__ import annotations

import contextlib
import json
import sys
import weakref
from pathlib import Path

import pytest

from longllava.data import stream as stream_module
from longllava.data.embedded import parquet_file
from longllava.data.images import open_picture
from longllava.data.packing import Cursor
from longllava.data.recipes import Recipe, record_source
from longllava.data.records import Unusable
from longllava.data.source_config import SourceConfig
from longllava.errors import ConfigError, DataError
from tests.data.records import asked
from tests.data.test_stores import png, record

pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

N_SHARDS, PER_SHARD = 4, 15


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    folder = tmp_path_factory.mktemp("set")
    text = datasets.Value("string")
    turns = [{"from": text, "value": text}]
    features = datasets.Features({"id": text, "image": datasets.Image(), "conversations": turns})
    for shard in range(N_SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        rows = [{**record(1), "id": str(n), "image": {"bytes": png(n), "path": None}} for n in numbers]
        table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
        pq.write_table(table, folder / f"train-{shard:05d}.parquet", row_group_size=4)
    return folder


def row(folder: Path, **keys) -> SourceConfig:
    return SourceConfig(**{"name": "s", "kind": "llava", "licence": "CC0", "origin": "here", "format": "datasets",
                           "path": str(folder), **keys})  # fmt: skip


def streamed(folder: Path, monkeypatch: pytest.MonkeyPatch, **keys):
    monkeypatch.setattr(stream_module, "WINDOW", 8)
    return record_source(row(folder, streaming=True, count=50, **keys), folder)


def test_a_downloaded_set_has_its_records_and_pictures(folder: Path) -> None:
    source = record_source(row(folder), folder)
    assert source.n_samples == N_SHARDS * PER_SHARD
    sample = source.sample(37)
    assert sample.id == "37" and open_picture(sample.images[0]).getpixel((0, 0)) == (37, 100, 200)


def test_a_stream_gives_every_record_once_and_the_same_ones_again(folder: Path, monkeypatch) -> None:
    source = streamed(folder, monkeypatch, seed=2)
    ids = [source.sample(i).id for i in range(50)]
    assert len(set(ids)) == 50
    shards = [int(name) // PER_SHARD for name in ids]
    assert shards == sorted(shards, key=shards.index) and shards[0] != 0  # whole shards, in the seed's order
    again = streamed(folder, monkeypatch, seed=2)
    assert [again.sample(i).id for i in (49, 3, 20, 48)] == [ids[i] for i in (49, 3, 20, 48)]
    assert open_picture(source.sample(7).images[0]).getpixel((0, 0)) == (int(ids[7]), 100, 200)
    other = streamed(folder, monkeypatch, seed=5)
    assert [other.sample(i).id for i in range(50)] != ids


def test_a_stream_goes_on_from_its_notes(folder: Path, monkeypatch) -> None:
    ids = [streamed(folder, monkeypatch).sample(i).id for i in range(41)]  # notes up to window 5
    first = streamed(folder, monkeypatch)
    for i in range(41):
        first.sample(i)
    read = []
    real = stream_module.Stream.read

    def counting(self, cursor=None):
        for item in real(self, cursor):
            read.append(item[0]["id"])
            yield item

    monkeypatch.setattr(stream_module.Stream, "read", counting)
    second = streamed(folder, monkeypatch)
    assert second.sample(40).id == ids[40] and len(read) <= 8  # its own window, and nothing before
    read.clear()
    first.notes.write_text("torn")
    third = streamed(folder, monkeypatch)
    assert third.sample(40).id == ids[40] and len(read) > 40
    assert json.loads(third.notes.read_text()).keys() >= {"1", "5"}


def test_notes_are_of_one_folder_as_it_is(tmp_path: Path, monkeypatch) -> None:
    """Two projects may share a cache, and name their folders alike."""
    def write(project: str, *sizes: int) -> None:
        monkeypatch.chdir(tmp_path / project)
        for shard, size in enumerate(sizes):
            lines = [{**asked("What?"), "id": f"{project} {shard} {n}"} for n in range(size)]
            Path("data", f"{shard}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def ids() -> list[str]:
        sources = streamed(Path("data"), monkeypatch), streamed(Path("data"), monkeypatch)
        return [source.sample(index).id for source in sources for index in (8, 16, 49)]

    for project in ("one", "two"):
        (tmp_path / project / "data").mkdir(parents=True)
    write("one", 10, 50)
    assert ids() == ["one 0 8", "one 1 6", "one 1 39"] * 2
    write("two", 50, 10)
    assert ids() == ["two 0 8", "two 0 16", "two 0 49"] * 2
    write("two", 20, 40)
    assert ids() == ["two 0 8", "two 0 16", "two 1 29"] * 2


def test_pictures_of_a_stream_are_in_memory_one_by_one(folder: Path, monkeypatch) -> None:
    class Watched(dict):
        __hash__ = object.__hash__  # type: ignore[assignment]

    alive = weakref.WeakSet[Watched]()
    most = 0
    real = stream_module.Stream.read

    def watched(self, cursor=None):
        nonlocal most
        for one, following in real(self, cursor):
            one["image"] = Watched(one["image"])
            alive.add(one["image"])
            most = max(most, len(alive))
            yield one, following

    monkeypatch.setattr(stream_module.Stream, "read", watched)
    assert streamed(folder, monkeypatch).sample(20).images and most <= 2


def test_a_recipe_shuffles_a_stream_inside_its_windows(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stream_module, "WINDOW", 8)
    (tmp_path / "r.yaml").write_text(
        f"name: r\nsources:\n  - {{name: s, kind: llava, licence: CC0, origin: here, format: datasets, path: {folder},"
        " streaming: true, count: 50}\n"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    places = [recipe.at(1, n)[1] for n in range(100)]
    assert sorted(places[:50]) == sorted(places[50:]) == list(range(50)) and places[:50] != places[50:]
    windows = [place // 8 for place in places[:50]]
    assert windows == sorted(windows) and places[:8] != sorted(places[:8])
    assert recipe.sample(1, 30) == Recipe.load(tmp_path / "r.yaml").sample(1, 30)
    assert Cursor() == Cursor(0, ())


def test_what_a_stream_cannot_give(folder: Path, tmp_path: Path, monkeypatch) -> None:
    source = streamed(folder, monkeypatch)
    short = record_source(row(folder, streaming=True, count=100), folder)
    with pytest.raises(DataError, match="count is 100, but the stream ends after 60 records"):
        short.sample(60)
    monkeypatch.setattr(stream_module, "sample_of_record", broken)
    with pytest.raises(Unusable) as raised:
        source.sample(3)
    assert raised.value.where.endswith(":4") and str(source.rejected[0]).endswith(":4: no conversations")
    with pytest.raises(DataError, match="cannot be loaded"):
        record_source(row(folder, path=str(tmp_path / "none"), streaming=True, count=5), folder)
    with pytest.raises(ConfigError, match="streaming needs a count"):
        row(folder, streaming=True)
    with pytest.raises(ConfigError, match="duplicates: drop needs all ids beforehand"):
        row(folder, streaming=True, count=5, duplicates="drop")
    with pytest.raises(ConfigError, match="subset goes with format: datasets"):
        SourceConfig(name="s", kind="llava", licence="x", origin="x", path="a.json", subset="b")


def test_a_stream_of_few_records_is_judged_when_all_were_seen(folder: Path, monkeypatch) -> None:
    usable = stream_module.sample_of_record
    monkeypatch.setattr(stream_module, "sample_of_record", lambda record, *more: (
        broken() if record["id"] in ("7", "31") else usable(record, *more)))  # fmt: skip
    for allowed in (0.01, 0.04):
        source = streamed(folder, monkeypatch, max_bad=allowed)
        for index in range(49):
            with contextlib.suppress(Unusable):
                source.sample(index)
        if allowed == 0.04:
            source.sample(49)
            continue
        with pytest.raises(DataError, match=r"2 of 50 records cannot be used, more than 1.0%: no conversations \(2\)"):
            source.sample(49)


def broken(*arguments):
    raise Unusable("no conversations")


@pytest.mark.parametrize("raised", ["ImportError", "ValueError"])  # where numpy is another than it was built for
@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_a_package_that_fails_to_import_says_why(
    folder: Path, tmp_path: Path, monkeypatch, package: str, raised: str
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {raised}('libssl.so.3: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package)
    keys = {"datasets": {}, "pyarrow": {"format": "parquet", "path": "train-00000.parquet"}}[package]
    parquet_file.cache_clear()
    with pytest.raises(DataError, match=r"needs .*\(libssl.so.3: cannot open\); pip install"):
        record_source(row(folder, **keys), folder)
