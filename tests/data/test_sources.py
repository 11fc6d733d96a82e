"""Files of records: each form is read, lines that cannot be used are listed, too many of them are an error."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.data.packing import Cursor, plan_window
from longllava.data.recipes import Recipe
from longllava.data.stores import paths_of
from longllava.errors import DataError
from longllava.train.loop import list_left_out
from tests.data.llava_source import LlavaSource
from tests.data.records import GOOD, TOLD, asked, numbered, write, write_lines
from tests.data.test_stores import add, png
from tests.tiny import tiny_model


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", "\r\n \r\n"])
@pytest.mark.parametrize("bom", [False, True])
def test_lines_with_and_without_bom_and_carriage_returns(root: Path, newline: str, bom: bool) -> None:
    rows = [*numbered(3), {**GOOD, "id": "é\u2028漢", "image": "sub/é c.png"}]
    source = LlavaSource("data", write_lines(root, rows, newline, bom))
    assert [source.sample(i).id for i in range(source.n_samples)] == ["0", "1", "2", "é\u2028漢"]
    assert source.sample(3).images == (str(root / "sub/é c.png"),) and not source.rejected


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_list_is_read_by_place(root: Path, indent: int | None, bom: bytes) -> None:
    rows = [{**GOOD, "id": "é\u2028"}, {**GOOD, "id": '漢 " } ] ['}, {**GOOD, "image": "b.png"}]
    path = root / "data.json"
    path.write_bytes(bom + json.dumps(rows, indent=indent, ensure_ascii=False).encode())
    source = LlavaSource("data", path)
    assert [source.sample(i).id for i in range(3)] == [row["id"] for row in rows]
    assert source.sample(2).images == (str(root / "b.png"),)


def test_bad_lines_are_listed_with_their_place(root: Path) -> None:
    rows: list = numbered(300)
    rows[4] = '{"id": "4", "conversations": ['
    rows[200] = {**GOOD, "image": "none.png"}
    path = write_lines(root, rows)
    source = LlavaSource("data", path)
    assert source.n_samples == 298 and source.sample(4).id == "5"
    first, second = map(str, source.rejected)
    assert (
        first.startswith(f"{path}:5: malformed JSON: ")
        and second == f"{path}:201: missing image: {root}/none.png"
    )


def test_a_line_that_is_not_utf8_is_one_bad_line(root: Path) -> None:
    path = write_lines(root, numbered(150))
    path.write_bytes(path.read_bytes() + b'\n{"id": "\xff"}\n' + json.dumps({**GOOD, "id": "last"}).encode())
    source = LlavaSource("data", path)
    assert source.n_samples == 151 and str(source.rejected[0]) == f"{path}:151: not UTF-8"


def test_line_numbers_inside_a_list(root: Path) -> None:
    rows = numbered(120)
    rows[1]["image"] = "none.png"
    path = root / "data.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    assert [item.where for item in LlavaSource("data", path).rejected] == [f"{path}:3"]


def test_more_than_one_in_a_hundred_is_an_error(root: Path) -> None:
    rows: list = numbered(100)
    rows[10] = "{"
    assert LlavaSource("data", write_lines(root, rows)).n_samples == 99
    rows[11] = {**GOOD, "image": "none.png"}
    rows[12] = {**GOOD, "image": "gone.png"}
    with pytest.raises(DataError) as raised:
        LlavaSource("data", write_lines(root, rows))
    text = str(raised.value)
    assert (
        "data.jsonl: 3 of 100 records cannot be used, more than 1.0%: missing image (2), malformed JSON (1)"
        in text
    )
    assert f"the first is {root}/data.jsonl:11: malformed JSON" in text and "\n" not in text
    assert LlavaSource("data", write_lines(root, rows), max_bad=0.05).n_samples == 97


def test_a_long_source_is_given_up_early(root: Path) -> None:
    rows: list = numbered(1500)
    rows[3:15] = ["{"] * 12  # 12 of 1,000: seen only once 1,000 are read, at the next bad one
    rows[1100] = rows[1400] = "{"
    with pytest.raises(DataError, match="13 of 1101 records"):
        LlavaSource("data", write_lines(root, rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no records"), ("[]", "holds no records"),
        ("[1, 2", "malformed JSON"), ("[{}", "malformed JSON"),
        ("[] x", "text after the list"), ("[" * 100_000, "malformed JSON"),
        ('[{"a": 1} {"a": 2}]', "(malformed JSON|no conversations)"),
    ],
)  # fmt: skip
def test_files_that_are_no_source(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        LlavaSource("data", path, max_bad=1.0)
    with pytest.raises(DataError, match="no such file"):
        LlavaSource("data", tmp_path / "none.json")


def test_brackets_in_the_name_of_a_file_or_of_its_folder_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "pictures [2024]"
    folder.mkdir()
    for name in ("part-0.json", "part-1.json", "taken[1].json"):
        (folder / name).touch()
    parts = [folder / "part-0.json", folder / "part-1.json"]
    assert paths_of("part-*.json", folder) == paths_of("part-[01].json", folder) == parts
    assert paths_of("taken[1].json", folder) == [folder / "taken[1].json"]
    assert paths_of([str(parts[0]), f"{tmp_path}/pict*/part-1.json"], tmp_path) == parts
    with pytest.raises(DataError, match="no such file"):
        paths_of("part-[2].json", folder)
    if sys.version_info < (3, 13):
        with pytest.raises(DataError, match=r"part-\*\*.json: .*entire path component"):
            paths_of("part-**.json", folder)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "data.json"
    path.write_bytes(pickle.dumps([GOOD]))
    with pytest.raises(DataError, match="not UTF-8|malformed JSON"):
        LlavaSource("data", path)


def test_count_keeps_a_drawn_part(root: Path) -> None:
    path = write_lines(root, numbered(50))
    ids = [
        [LlavaSource("data", path, count=10, seed=seed).sample(i).id for i in range(10)] for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2] and len(set(ids[0])) == 10
    with pytest.raises(DataError, match="count is 51, but .* holds 50 usable records"):
        LlavaSource("data", path, count=51)


def test_a_file_that_changed_since_is_an_error(root: Path) -> None:
    source = LlavaSource("data", write_lines(root, numbered(3)))
    (root / "a.png").unlink()
    with pytest.raises(DataError, match="data.jsonl:2: missing image: .*; it was usable when training began"):
        source.sample(1)


@settings(max_examples=60)
@given(st.data())
def test_a_line_spoiled_in_any_way_spoils_no_other(tmp_path_factory, data) -> None:
    """Bytes changed, put in or cut off in one line: it alone is left out, or is still a record."""
    folder = tmp_path_factory.mktemp("lines")
    lines = [json.dumps({"id": str(i), "conversations": [{"from": "human", "value": f"é {i}?"}, TOLD]}).encode()
             for i in range(110)]  # fmt: skip
    at = data.draw(st.integers(0, 109))
    line = bytearray(lines[at])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(0, len(line) - 1)))
        kind = data.draw(st.sampled_from(["change", "insert", "cut", "duplicate"]))
        byte = data.draw(st.integers(0, 255).filter(lambda value: value not in (10, 13)))
        if kind == "cut":
            del line[place:]
        elif kind == "duplicate":
            line[place:place] = line[place : place + 9]
        else:
            line[place : place + (kind == "change")] = bytes([byte])
    lines[at] = bytes(line)
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = LlavaSource("data", path, duplicates="keep")
    others = {f"é {i}?" for i in range(110) if i != at}
    texts = {source.sample(i).turns[0].text for i in range(source.n_samples or 0)}
    assert others <= texts and len(source.rejected) + len(texts) in (109, 110)
    assert all(item.where == f"{path}:{at + 1}" for item in source.rejected)


def test_fewer_records_than_a_batch_are_read_again_and_again(root: Path) -> None:
    from longllava.data.packing import Cursor, plan_window
    from tests.tiny import tiny_model

    source = LlavaSource("data", write_lines(root, numbered(2)))
    plan = plan_window(lambda n: (source.sample(n % 2), "data"), tiny_model().processor, Cursor(), seed=0, n_steps=2,
                       n_rows=3, row_length=200)  # fmt: skip
    ids = [item.id for rows in plan.steps for row in rows for item in row]
    assert set(ids) == {"0", "1"} and all(len(rows) == 3 and all(rows) for rows in plan.steps)


def test_the_same_id_twice(tmp_path: Path) -> None:
    records = [{"id": str(i % 4), **asked(f"{i}?")} for i in range(6)]
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(records[:4]))
    second.write_text(json.dumps(records[4:]))
    with pytest.raises(DataError, match="b.json:1: the id '0' stands twice in .*a.json; set duplicates: drop"):
        LlavaSource("s", [first, second])
    dropped, kept = (LlavaSource("s", [first, second], duplicates=how) for how in ("drop", "keep"))
    assert (dropped.n_samples, kept.n_samples) == (4, 6)
    assert [dropped.sample(i).turns[0].text for i in range(4)] == ["0?", "1?", "2?", "3?"]
    without = [asked(f"{i}?") for i in range(3)]
    assert LlavaSource("s", write(tmp_path, without)).n_samples == 3  # no ids, no duplicates


def test_names_that_are_no_text_are_listed_all_the_same(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, told in (("å", asked("<image>")), ("ä", asked("<image>")), ("ö", {})):
            add(tar, f"{name}.json", json.dumps(told).encode())
            add(tar, f"{name}.png", b"torn" if name == "ä" else png(1))
    write(tmp_path, [{**asked("What? " * 900), "id": "\ud800"}])
    row = "kind: llava, licence: CC0, origin: x, max_bad: 0.9"
    (tmp_path / "r.yaml").write_text(
        f"name: r\nsources: [{{name: tar, path: set.tar, {row}}}, {{name: lines, path: data.json, {row}}}]\n"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    plan = plan_window(lambda n: recipe.sample(0, n), tiny_model().processor, Cursor(), seed=0, n_steps=1, n_rows=2,
                       row_length=64)  # fmt: skip
    assert recipe.write_rejected(tmp_path / "quarantine.txt") == 2
    assert r"set.tar:\udcf6: no conversations" in (tmp_path / "quarantine.txt").read_text("utf-8")
    for _ in range(2):  # a run that goes on finds them there
        list_left_out(tmp_path / "left-out.tsv", plan.misfits)
        lines = (tmp_path / "left-out.tsv").read_text("utf-8").splitlines()
        assert sorted(line.split("\t")[1].rpartition("/")[2] for line in lines) == [r"\ud800", r"set.tar:\udce4"]


def test_a_nan_is_no_json(tmp_path: Path) -> None:
    good = json.dumps(asked("what?"))
    for number, line in enumerate((good[:-1] + ', "score": NaN}', good[:-1] + ', "score": -Infinity}')):
        (tmp_path / "data.jsonl").write_text("\n".join([good] * 120 + [line]))
        got = LlavaSource("s", tmp_path / "data.jsonl")
        assert "malformed JSON: " + ("NaN", "-Infinity")[number] in str(got.rejected[0]) and got.n_samples == 120


@pytest.mark.parametrize("as_list", [True, False])
def test_a_number_of_thousands_of_digits_is_one_bad_record(tmp_path: Path, as_list: bool) -> None:
    good = json.dumps(asked("what?"))
    records = [good] * 120 + [good[:-1] + f', "score": {"9" * 5000}}}']
    (tmp_path / "data.json").write_text(f"[{','.join(records)}]" if as_list else "\n".join(records))
    got = LlavaSource("s", tmp_path / "data.json")
    assert got.n_samples == 120 and "malformed JSON: Exceeds the limit" in str(got.rejected[0])
