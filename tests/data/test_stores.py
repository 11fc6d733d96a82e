"""Records in tables, tars and data sets are the samples that the same records in JSON are, picture for picture."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longllava.data.embedded import in_table, read_embedded
from longllava.data.images import open_picture
from longllava.data.recipes import Recipe, record_source
from longllava.data.records import Columns
from longllava.data.source_config import SourceConfig
from longllava.data.stores import tables
from longllava.data.stores.tables import TableStore
from longllava.errors import ConfigError, DataError, InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

N = 23


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 100, 200)).save(buffer, format="PNG")
    return buffer.getvalue()


def record(number: int) -> dict:
    question = "<image><image>\nWhich is redder?" if number % 3 == 0 else "<image>\nWhat is this?"
    return {"id": str(number), "conversations": [{"from": "human", "value": question},
                                                 {"from": "gpt", "value": f"answer {number}"}]}  # fmt: skip


def pictures(number: int) -> list[int]:
    return [number, number + 100] if number % 3 == 0 else [number]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same N records as JSON, parquet (pictures inside; named), arrow, and two tars."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    for number in {p for n in range(N) for p in pictures(n)}:
        (folder / "pictures" / f"{number}.png").write_bytes(png(number))
    rows = [record(n) for n in range(N)]
    named = [{**row, "image": [f"{p}.png" for p in pictures(n)]} for n, row in enumerate(rows)]
    (folder / "all.json").write_text(json.dumps(named))
    inside = [{**row, "images": [{"bytes": png(p), "path": f"{p}.png"} for p in pictures(n)]}
              for n, row in enumerate(rows)]  # fmt: skip
    table = pa.Table.from_pylist(inside)
    pq.write_table(table.slice(0, 12), folder / "part-0.parquet", row_group_size=5)
    pq.write_table(table.slice(12), folder / "part-1.parquet", row_group_size=5)
    bare = [{"path": f"{p}.png", "bytes": None} for p in (0,)]
    schema = pa.schema([*(table.schema.field(i) for i in range(len(table.schema)))])
    outside = [{**row, "images": [{**bare[0], "path": f"{p}.png"} for p in pictures(n)]} for n, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(outside, schema=schema), folder / "named.parquet")
    with pa.OSFile(str(folder / "all.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=7):
            writer.write_batch(batch)
    shutil.copy(folder / "all.arrow", folder / "LARGE.ARROW")  # as `auto` takes endings
    for part, numbers in enumerate((range(12), range(12, N))):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for n in numbers:
                for index, picture in enumerate(pictures(n)):
                    add(tar, f"set/{n:04d}.{index}.png", png(picture))
                add(tar, f"set/{n:04d}.json", json.dumps(record(n)).encode())
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def source(folder: Path, **keys):
    row = SourceConfig(**{"name": "s", "kind": "llava", "licence": "CC0", "origin": "here", **keys})
    return record_source(row, folder)


FORMS = {
    "parquet": {"path": "part-*.parquet"},
    "a list of files": {"path": ["part-0.parquet", "part-1.parquet"]},
    "parquet with names": {"path": "named.parquet", "image_root": "pictures"},
    "arrow": {"path": "all.arrow"},
    "arrow, written large": {"path": "LARGE.ARROW"},
    "tars": {"path": ["0.tar", "1.tar"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_samples_of_the_json(folder: Path, form: str) -> None:
    expected = source(folder, path="all.json", image_root="pictures")
    got = source(folder, **FORMS[form])
    assert got.n_samples == expected.n_samples == N
    for index in (0, 22, 3, 11, 12, 4, 5, 21):  # not in order
        mine, theirs = got.sample(index), expected.sample(index)
        assert (mine.id, mine.turns) == (theirs.id, theirs.turns)
        for left, right in zip(mine.images, theirs.images, strict=True):
            assert np.array_equal(np.asarray(open_picture(left)), np.asarray(open_picture(right)))
    assert np.asarray(open_picture(got.sample(21).images[1]))[0, 0, 0] == 121


@pytest.mark.parametrize("form", FORMS)
def test_count_and_seed_draw_the_same_records_of_every_form(folder: Path, form: str) -> None:
    expected = source(folder, path="all.json", image_root="pictures", count=9, seed=4)
    got = source(folder, **FORMS[form], count=9, seed=4)
    ids = [[one.sample(i).id for i in range(9)] for one in (expected, got)]
    assert ids[0] == ids[1] != [str(i) for i in range(9)]


def test_pictures_of_a_table_are_not_read_when_it_is_scanned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longllava.data.stores.tables.places", lambda *a: [[] for _ in range(len(a[0]))])
    with pytest.raises(DataError, match="23 of 23 records cannot be used.*marks and images differ"):
        source(folder, path=["part-0.parquet", "part-1.parquet"])


def test_names_differ_and_columns_say_how(folder: Path, tmp_path: Path) -> None:
    rows = [{"key": n, "q.en": "What?", "a.en": f"yes {n}", "a.photo": png(n)} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "vqa.parquet")
    columns = {"id": "key", "question": "q.en", "answer": "a.en", "image": "a.photo"}
    got = source(tmp_path, path="vqa.parquet", columns=columns, marks="first")
    sample = got.sample(2)
    assert [turn.text for turn in sample.turns] == ["<image>\nWhat?", "yes 2"] and sample.id == "2"
    assert open_picture(sample.images[0]).getpixel((0, 0)) == (2, 100, 200)
    captions = source(tmp_path, path="vqa.parquet", columns={"answer": "a.en", "image": "a.photo", "id": "key"},
                      question="<image>\nDescribe this.")  # fmt: skip
    assert captions.sample(1).turns[0].text == "<image>\nDescribe this."
    with pytest.raises(ConfigError, match="columns: got 'questoin', allowed: id, conversations"):
        SourceConfig(name="s", kind="llava", licence="x", origin="x", path="a.json", columns={"questoin": "q"})
    for columns, question, told in (
        ({"answer": "a"}, None, "columns.answer without a question"),
        ({}, "What?", "question without columns.answer would be asked of no record"),
        ({"question": "q"}, None, "columns.question without columns.answer"),
        ({"question": "q", "answer": "a"}, "What?", "question and columns.question both say what is asked"),
    ):
        with pytest.raises(ConfigError, match=told):
            SourceConfig(name="s", kind="llava", licence="x", origin="x", path="a.json", columns=columns,
                         question=question)  # fmt: skip


@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize(
    "kind", [pa.list_, pa.large_list, lambda inner: pa.list_(inner, 2), pa.list_view, pa.large_list_view]
)
def test_lists_in_any_of_arrows_forms(tmp_path: Path, kind, files: bool) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "0.png").write_bytes(png(0))
    inner = pa.string() if files else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cell = ["1.png", "0.png"] if files else [{"bytes": png(number), "path": None} for number in (1, 0)]
    turns = pa.array([record(3)["conversations"]] * 3)
    table = pa.table({"conversations": turns, "images": pa.array([cell] * 3, kind(inner))})
    pq.write_table(table, tmp_path / "lists.parquet")
    sample = source(tmp_path, path="lists.parquet").sample(2)
    assert [open_picture(image).getpixel((0, 0))[0] for image in sample.images] == [1, 0]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_names_of_files_in_any_of_arrows_forms(tmp_path: Path, kind) -> None:
    (tmp_path / "5.png").write_bytes(png(5))
    table = pa.table({"conversations": [record(1)["conversations"]], "image": pa.array(["5.png"], kind)})
    pq.write_table(table, tmp_path / "names.parquet")
    assert source(tmp_path, path="names.parquet").sample(0).images == (str(tmp_path / "5.png"),)


def test_captions_in_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for n in range(3):
            add(tar, f"{n}.png", png(n))
            add(tar, f"{n}.txt", f"caption {n}".encode())
        link = tarfile.TarInfo("9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hosts"
        tar.addfile(link)
    got = source(tmp_path, path="c.tar", columns={"answer": "txt"}, question="What is this?", marks="first")
    assert got.n_samples == 3 and got.sample(2).turns[1].text == "caption 2" and got.sample(2).id == "2"


def test_tars_that_are_torn_or_packed(tmp_path: Path, folder: Path) -> None:
    whole = (folder / "1.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for cut in (end - 1, end // 2, end // 2 + 300, end // 2 + 700, 1024 + 100):
        (tmp_path / "torn.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="torn.tar: no uncompressed tar, or torn: (unexpected end|it lacks)"):
            source(tmp_path, path="torn.tar", max_bad=1.0)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "0.txt", b"x")
    with pytest.raises(DataError, match=r"packed.tar: no uncompressed tar, or torn: .*unpack a .tar.gz"):
        source(tmp_path, path="packed.tar")
    (tmp_path / "bad.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"bad.tar"):
        source(tmp_path, path="bad.tar")
    with tarfile.open(tmp_path / "list.tar", "w") as tar:
        add(tar, "0.json", b"[1]")
        add(tar, "1.json", b'{"a": NaN}')
        add(tar, "2.txt", b"\xff")
    with pytest.raises(DataError) as raised:
        source(tmp_path, path="list.tar")
    text = str(raised.value)
    assert "3 of 3 records" in text and "not a record (1), malformed JSON (1), not UTF-8 (1)" in text


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 but not really")
        with pytest.raises(DataError, match=f"{name}: no (parquet|arrow) file"):
            source(tmp_path, path=name)
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="x.csv: a source's files are all of one kind, of .json, .jsonl"):
        source(tmp_path, path="x.csv")
    with pytest.raises(DataError, match=r"none-\*.parquet: no such file"):
        source(tmp_path, path="none-*.parquet")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_whose_name_is_not_unicode_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / os.fsdecode(b"\xff." + kind.encode())
    path.touch()
    with pytest.raises(DataError, match=r"udcff.*: pyarrow opens no file whose name is not Unicode text; rename"):
        list(TableStore([path], Columns(), False).scan())


def test_a_reference_into_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "short.tar").write_bytes(b"123")
    for reference, message in (
        (f"tar:0+10:{tmp_path}/short.tar", "the tar ends after 3 bytes"),
        (f"tar:0+10:{tmp_path}/none.tar", "cannot be read: No such file"),
        (f"table:0/0/image:{tmp_path}/none.parquet", "none.parquet"),
        ("tar:x", "no reference into a tar or a table"),
    ):
        with pytest.raises(InputError, match=message):
            read_embedded(reference)


def test_an_empty_cell_is_a_broken_picture(tmp_path: Path) -> None:
    rows = [{**record(n), "image": png(n) if n != 1 else None} for n in (1, 2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    got = source(tmp_path, path="t.parquet", max_bad=0.5)
    assert got.n_samples == 1 and "marks and images differ" in got.rejected[0].why  # told apart without reading bytes
    with pytest.raises(InputError, match="the cell is empty"):
        read_embedded(in_table(tmp_path / "t.parquet", 0, 0, "image"))


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_table_that_is_written_anew_is_read_anew(tmp_path: Path, ending: str) -> None:
    """As a notebook does: it trains, draws its data anew and trains again. Records and pictures were the old ones."""
    for n, number in ((2, 1), (5, 7)):
        rows = [{**record(number), "id": f"{number} {row}", "image": png(number)} for row in range(n)]
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, tmp_path / "new.parquet")
        with pa.ipc.new_file(str(tmp_path / "new.arrow"), table.schema) as file:
            file.write_table(table)
        (tmp_path / f"new.{ending}").rename(tmp_path / f"t.{ending}")
        got = source(tmp_path, path=f"t.{ending}")
        assert got.n_samples == n and got.sample(1).id == f"{number} 1"
        assert read_embedded(got.sample(1).images[0]) == png(number)
    os.utime(tmp_path / f"t.{ending}", ns=(0, 0))
    with pytest.raises(DataError, match=r"the table changed: .* written anew; it was usable when training began"):
        got.sample(0)


def test_every_form_in_one_recipe(folder: Path, tmp_path: Path) -> None:
    rows = "".join(f"  - {{name: {n}, kind: llava, licence: CC0, origin: here, weight: 1, {keys}}}\n" for n, keys in (
        ("json", "path: all.json, image_root: pictures"), ("table", "path: 'part-*.parquet'"), ("tar", "path: 0.tar")))
    (tmp_path / "r.yaml").write_text(f"name: r\nroot: {folder}\nsources:\n{rows}")
    recipe = Recipe.load(tmp_path / "r.yaml")
    plan = [recipe.sample(3, n) for n in range(60)]
    assert {name for _, name in plan} == {"json", "table", "tar"}
    assert plan == [Recipe.load(tmp_path / "r.yaml").sample(3, n) for n in range(60)]


def test_the_root_may_be_the_environments(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLLAVA_DATA", str(folder.parent))
    line = "{name: a, kind: llava, licence: CC0, origin: here, path: all.json, image_root: pictures}"
    (tmp_path / "r.yaml").write_text(f"name: r\nroot: $LONGLLAVA_DATA/{folder.name}\nsources:\n  - {line}\n")
    assert Recipe.load(tmp_path / "r.yaml").sources[0].n_samples == N
    monkeypatch.delenv("LONGLLAVA_DATA")
    with pytest.raises(DataError, match=f"data/{folder.name}/all.json: no such file"):
        Recipe.load(tmp_path / "r.yaml")


def test_shuffled_rows_of_tables_are_read_alone_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, size = 40, 200_000
    table = pa.table({"id": [str(row) for row in range(n)], "image": [bytes([row]) * size for row in range(n)]})
    for part in range(8):
        pq.write_table(table, tmp_path / f"{part}.parquet", compression="none", use_dictionary=False)
    store = TableStore([tmp_path / "0.parquet"], Columns(), False)
    (*_, (place, _, last)) = store.scan()
    made: list[int] = []
    values = tables.values
    monkeypatch.setattr(tables, "values", lambda column, media: made.append(len(column)) or values(column, media))
    assert store.read(place) == last and made == [1]
    before = pa.total_allocated_bytes()
    for part in range(8):
        assert read_embedded(in_table(tmp_path / f"{part}.parquet", 7, 0, "image")) == bytes([7]) * size
    assert pa.total_allocated_bytes() - before < 5 * n * size  # row groups of the last four, not of all


def test_two_threads_read_one_table(tmp_path: Path) -> None:
    """As training does: the next steps are planned while the pictures of this one are read."""
    cells = [bytes([n]) * 9 for n in range(200)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "all.parquet", row_group_size=4)
    rows = random.Random(0).sample(range(200), 200) * 8

    def read(numbers: list[int]) -> list[bytes]:
        return [read_embedded(in_table(tmp_path / "all.parquet", n, 0, "image")) for n in numbers]

    with ThreadPoolExecutor(2) as threads:
        for found, numbers in zip(threads.map(read, (rows, rows[::-1])), (rows, rows[::-1]), strict=True):
            assert found == [cells[n] for n in numbers]
