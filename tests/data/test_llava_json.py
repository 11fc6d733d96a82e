"""Reading LLaVA's JSON: both layouts, both file forms, and what happens to records that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from longllava.data.llava_json import Unusable, sample_of_record
from longllava.data.samples import Evidence, Sample, Turn
from longllava.data.sources import LlavaSource
from longllava.errors import DataError

ASKED = {"from": "human", "value": "<image>\nWhat is this?"}
TOLD = {"from": "gpt", "value": "a cat"}
GOOD = {"id": "7", "image": "a.png", "conversations": [ASKED, TOLD]}
TURNS = (Turn("user", "<image>\nWhat is this?"), Turn("assistant", "a cat"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "sub/é c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), "red").save(tmp_path / name)
    return tmp_path


def write_lines(root: Path, records: list, newline: str = "\n", bom: bool = False) -> Path:
    lines = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in records]
    data = newline.join(lines).encode("utf-8", "surrogatepass")
    path = root / "data.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + data)
    return path


def numbered(n: int) -> list[dict]:
    return [{**GOOD, "id": str(i)} for i in range(n)]


def test_both_layouts_give_the_same_sample(root: Path) -> None:
    expected = Sample("7", TURNS, (str(root / "a.png"),))
    messages = [
        {"role": "user", "content": "<image>\nWhat is this?"},
        {"role": "assistant", "content": "a cat"},
    ]
    in_parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "\nWhat is this?"}]
    by_url = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "\nWhat is this?"},
    ]
    answer = [{"type": "text", "text": "a cat"}]
    for record in (
        GOOD,
        {**GOOD, "image": ["a.png"]},
        {"id": 7, "messages": messages, "images": ["a.png"]},
        {"id": 7, "messages": messages, "images": [{"path": "a.png"}]},
        {"id": 7, "messages": [{"role": "user", "content": in_parts}, messages[1]]},
        {
            "id": 7,
            "messages": [{"role": "user", "content": by_url}, {"role": "assistant", "content": answer}],
        },
    ):
        assert sample_of_record(record, "line", root) == expected
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert sample_of_record(text, "line", root) == Sample(
        "line", (Turn("user", "Hi"), Turn("assistant", "Hello"))
    )


def conversation(*turns: tuple) -> dict:
    return {**GOOD, "conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "not a record"),
        ({"id": 1}, "no conversations: keys are 'id'"),
        ({**GOOD, "image": None}, "marks and images differ: 1 <image> marks, 0 images"),
        ({**GOOD, "image": ["a.png", "b.png"]}, "1 <image> marks, 2 images"),
        ({**GOOD, "image": "none.png"}, "missing image: .*none.png"),
        ({**GOOD, "image": "sub"}, "missing image"),
        ({**GOOD, "image": "x" * 5000}, "missing image"),
        ({**GOOD, "image": "../a.png"}, "image path leaves its folder"),
        ({**GOOD, "image": "/etc/hosts"}, "image path leaves its folder"),
        ({**GOOD, "image": "a\0.png"}, "image path leaves its folder"),
        ({**GOOD, "image": "https://example.org/a.png"}, "image is a URL"),
        ({**GOOD, "image": "data:image/png;base64,AAAA"}, "image is a URL"),
        ({**GOOD, "image": 5}, "image is no path"),
        ({**GOOD, "image": "world:1.2.3.1.4.5.0@noto"}, "missing image"),
        ({**GOOD, "conversations": "x"}, "conversations is no list"),
        ({**GOOD, "conversations": [{"value": "x"}]}, "missing role: turn 1 has no 'from'"),
        (conversation(("human", "<image>"), ("system", "x")), "unknown role: turn 2 is of 'system'"),
        (conversation(("human", "<image>"), ([], "x")), "unknown role"),
        (conversation(("human", "<image>"), ("gpt", None)), "missing text: turn 2 holds NoneType"),
        (conversation(("human", "<image>"), ("gpt", "")), "turn 2: the answer is empty"),
        (conversation(("human", "<image>")), "the last question has no answer"),
        (conversation(("gpt", "x"), ("human", "<image>")), "turn 1 is the assistant's"),
        (conversation(("human", "<image>\ud800"), ("gpt", "x")), "not Unicode text: turn 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}]},
            "a text part holds",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "unknown part of a message"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}], "image": "b.png"},
         "images named twice"),
        ({**GOOD, "evidence": [{"turn": 0, "start": 8, "end": 99, "image": 0}]}, "evidence does not fit"),
        ({**GOOD, "evidence": [{"turn": 0, "start": 8, "end": 9, "image": 1}]}, "evidence does not fit"),
        ({**GOOD, "evidence": [{"turn": 0, "start": 8, "end": 9}]}, "evidence does not fit"),
        ({**GOOD, "evidence": {"turn": 0}}, "evidence does not fit"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_used(root: Path, record, message: str) -> None:
    with pytest.raises(Unusable, match=message):
        sample_of_record(record, "line", root)


def test_links_out_of_the_folder_are_not_followed(root: Path, tmp_path_factory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.touch()
    (root / "link.png").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    for name, message in (("link.png", "leaves its folder"), ("loop.png", "missing image")):
        with pytest.raises(Unusable, match=message):
            sample_of_record({**GOOD, "image": name}, "line", root)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "<image>", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from("id image conversations messages from role value content type text evidence".split()),
        inner, max_size=5,
    ),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=100)
@given(json_values)
def test_no_record_breaks_the_loader(tmp_path_factory, record) -> None:
    try:
        assert isinstance(sample_of_record(record, "line", Path("/nonexistent")), Sample)
    except Unusable as error:
        assert "\n" not in str(error)


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


def test_evidence_is_read(root: Path) -> None:
    record = {**GOOD, "evidence": [{"turn": 0, "start": 8, "end": 12, "image": 0}]}
    assert sample_of_record(record, "line", root).evidence == (Evidence(0, 8, 12, 0),)
    record = {**GOOD, "evidence": [{"turn": 0, "start": 8, "end": 12, "key": [1, 0, 5]}]}
    assert sample_of_record(record, "line", root).evidence == (Evidence(0, 8, 12, None, (1, 0, 5)),)


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
