"""Records of LLaVA's JSON: both layouts are one sample; what cannot be used says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.data.llava_json import Unusable, sample_of_record
from longllava.data.samples import Evidence, Sample, Turn
from tests.data.records import GOOD

TURNS = (Turn("user", "<image>\nWhat is this?"), Turn("assistant", "a cat"))


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
    none = dict.fromkeys(("text", "image", "path", "image_url"))  # as parts come out of a table
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
        *({"id": 7, "messages": [{"role": "user", "content": [{**none, **part} for part in parts]}, messages[1]]}
          for parts in (in_parts, by_url)),
    ):  # fmt: skip
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
        ({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}],
          "evidence": [{"turn": 0, "start": 0, "end": 4, "image": 0}]}, "evidence does not fit"),
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


def test_evidence_is_read(root: Path) -> None:
    record = {**GOOD, "evidence": [{"turn": 0, "start": 8, "end": 12, "image": 0}]}
    assert sample_of_record(record, "line", root).evidence == (Evidence(0, 8, 12, 0),)
    record = {**GOOD, "evidence": [{"turn": 0, "start": 8, "end": 12, "key": [1, 0, 5]}]}
    assert sample_of_record(record, "line", root).evidence == (Evidence(0, 8, 12, None, (1, 0, 5)),)


@pytest.mark.parametrize("own", ["see page 3", ["page 3", "page 4"], [{"page": 3}], {"page": 3}, 7, [], [None]])
def test_a_column_of_ones_own_called_evidence_leaves_no_record_out(root: Path, own) -> None:
    assert sample_of_record({**GOOD, "evidence": own}, "line", root) == sample_of_record(GOOD, "line", root)
