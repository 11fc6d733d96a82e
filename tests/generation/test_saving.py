"""A saved session goes on as if it had never stopped; a wrong or torn file is one sentence."""

import json
import os
import sys

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longllava.errors import CheckpointError, InputError
from longllava.generation import saving
from longllava.generation.saving import fingerprint
from tests.generation.test_session import assert_same_state
from tests.tiny import tiny_model, tiny_pictures

MODEL = tiny_model()
SHORT = {"max_new_tokens": 8}


@pytest.fixture
def saved(tmp_path):
    album = MODEL.session(images=tiny_pictures(4))
    album.append(images=tiny_pictures(2), text="<image> a <image> red")
    return album, album.save(tmp_path / "folder" / "album.session")


def rewrite(path, change):
    """Change a session file's metadata and tensors by hand, and leave it without checksums, as files once were."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["session"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    del about["checksum"], about["checksums"]
    change(about, tensors)
    save_file(tensors, path, metadata={"session": json.dumps(about)})


def test_loaded_is_the_same_session(saved):
    album, path = saved
    loaded = MODEL.load_session(path)
    assert_same_state(album.state, loaded.state, 0)
    assert (loaded.n_tokens, loaded.n_images) == (album.n_tokens, album.n_images)
    assert [piece.text for piece in loaded.waiting] == [piece.text for piece in album.waiting] == ["</img>", " red"]
    assert loaded.ask("heart?", **SHORT) == album.ask("heart?", **SHORT)
    for session in (loaded, album):
        session.append(images=tiny_pictures(1))
    assert_same_state(album.state, loaded.state, 1e-6)
    again = MODEL.load_session(loaded.save(path))  # over the file it came from
    assert again.ask("heart?", **SHORT) == album.ask("heart?", **SHORT)


def test_what_is_appended_while_it_is_saved_is_in_the_file_or_not(tmp_path, monkeypatch):
    album = MODEL.session(images=tiny_pictures(4))

    def slow(model):
        monkeypatch.undo()
        album.append(images=tiny_pictures(2))  # as another thread may
        return fingerprint(model)

    monkeypatch.setattr(saving, "fingerprint", slow)
    loaded = MODEL.load_session(album.save(tmp_path / "a"))
    assert loaded.n_images == 4 and album.n_images == 6
    assert_same_state(loaded.state, MODEL.session(images=tiny_pictures(4)).state)


def test_a_file_may_be_named_from_ones_home(tmp_path, monkeypatch):
    """As model folders are, and not in a folder called ~ where one stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert MODEL.session(text="a").save("~/album.session") == tmp_path / "home/album.session"
    assert MODEL.load_session("~/album.session").n_tokens == 0 and not (tmp_path / "~").exists()


def test_an_empty_session_saves_too(tmp_path):
    loaded = MODEL.load_session(MODEL.session().save(tmp_path / "a"))
    assert loaded.n_tokens == 0 and loaded.ask("a", **SHORT) == MODEL.generate("a", **SHORT)


def test_only_the_file_is_left(saved):
    assert [path.name for path in saved[1].parent.iterdir()] == ["album.session"]


def test_a_save_that_cannot_be_made_names_the_file(saved, monkeypatch):
    album, path = saved
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="folder: it is a folder; name a file"):
        album.save(path.parent)
    for below in ("below", "far/below"):
        with pytest.raises(InputError, match="album.session: it is a file; name a folder"):
            album.save(path / below)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"album.session: cannot be written: .*No space left"):
        album.save(path)
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == ["album.session"]


def test_names_that_no_file_can_have(saved):
    album, path = saved
    too_long = path.with_name("a" * 300)
    with pytest.raises(CheckpointError, match="aaa: cannot be written: File name too long"):
        album.save(too_long)
    for name in (path / "a.session", too_long):
        with pytest.raises(CheckpointError, match=f"{name.name}: no such session file"):
            MODEL.load_session(name)
    assert [one.name for one in path.parent.iterdir()] == ["album.session"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file was open just then
def test_an_interrupted_save_leaves_nothing(saved, monkeypatch):
    """Ctrl-C at each line that runs while there is a temporary file."""
    monkeypatch.setattr(saving, "fingerprint", lambda model: "")  # its lines are many, and all before
    album, path = saved
    before = album.save(path).read_bytes()
    lines = 0

    def interrupt(frame, event, argument):
        nonlocal lines
        if event == "line" and len(os.listdir(path.parent)) > 1:
            if lines == at:
                raise KeyboardInterrupt  # which ends the tracing
            lines += 1
        return interrupt

    for at in range(1000):
        lines = 0
        sys.settrace(interrupt)
        try:
            album.save(path)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert os.listdir(path.parent) == ["album.session"] and path.read_bytes() == before, f"line {at}"
        if lines < at:
            break
    assert at > 5


def test_another_models_session_is_refused(saved):
    with pytest.raises(CheckpointError, match="made by another model"):
        tiny_model(seed=1).load_session(saved[1])
    half = tiny_model()
    half.model.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match="another dtype"):
        half.load_session(saved[1])
    more = tiny_model()
    more.tokens_per_image = 16
    with pytest.raises(CheckpointError, match="made with tokens_per_image=None, this model has 16"):
        more.load_session(saved[1])
    more.tokens_per_image = 4  # the model's own number, which None asks for
    assert more.load_session(saved[1]).n_images == saved[0].n_images


def test_fingerprints_see_one_changed_weight():
    model = tiny_model().model
    before = fingerprint(model)
    assert fingerprint(tiny_model().model) == before
    with torch.no_grad():
        model.backbone.final_norm.weight[0] += 1e-3
    assert fingerprint(model) != before


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.99])
def test_torn_files(saved, keep):
    data = saved[1].read_bytes()
    saved[1].write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"album\.session: (cannot be read|not a session)"):
        MODEL.load_session(saved[1])


def drop_a_tensor(about, tensors):
    del tensors["0.scan"]


def widen_keys(about, tensors):
    tensors["1.0.keys"] = tensors["1.0.keys"][..., :4].contiguous()


def lose_tokens(about, tensors):
    for name in ("1.0.keys", "1.0.values"):
        tensors[name] = tensors[name][:, 1:].contiguous()


def poison(about, tensors):
    tensors["0.scan"][0, 0, 0] = torch.nan


def add_a_tensor(about, tensors):
    tensors["99.conv"] = torch.zeros(1)


def lose_the_count(about, tensors):
    del about["n_tokens"]


def half_a_token(about, tensors):
    about["n_tokens"] = float(about["n_tokens"])


def images_in_words(about, tensors):
    about["n_images"] = "four"


def wrong_piece(about, tensors):
    about["waiting"] = [["image", 0]]


def wrong_text(about, tensors):
    about["waiting"] = [["plain", 3]]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (drop_a_tensor, r"0\.scan"),
        (widen_keys, "layer 1"),
        (lose_tokens, "layer 1 holds"),
        (poison, "not finite"),
        (add_a_tensor, r"unexpected tensors 99\.conv"),
        (lose_the_count, "n_tokens"),
        (half_a_token, r"n_tokens: got \d+\.0, expected a whole number"),
        (images_in_words, "n_images: got 'four', expected a whole number"),
        (wrong_piece, "waiting text is int"),
        (wrong_text, "waiting text is int"),
    ],
)
def test_tampered_files(saved, change, fault):
    rewrite(saved[1], change)
    with pytest.raises(CheckpointError, match=rf"album\.session: damaged session file: .*{fault}"):
        MODEL.load_session(saved[1])


def test_a_flipped_bit_is_found_and_its_tensor_named(saved):
    path = saved[1]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name in header.keys() - {"__metadata__"}:
        first, end = header[name]["data_offsets"]
        for place in (first, (first + end) // 2, end - 1):
            flipped = bytearray(data)
            flipped[start + place] ^= 1
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=rf"album\.session: damaged .* bytes of tensor {name} differ"):
                MODEL.load_session(path)
    for was, now in ((b'\\"n_images\\": 6', b'\\"n_images\\": 7'), (b" red", b" rad")):
        assert was in data
        path.write_bytes(data.replace(was, now))
        with pytest.raises(CheckpointError, match=r"album\.session: cannot be read: its metadata differ"):
            MODEL.load_session(path)
    path.write_bytes(data)
    assert MODEL.load_session(path).n_images == 6


def test_files_without_checksums_load_as_they_did(saved):
    album, path = saved
    rewrite(path, lambda about, tensors: None)
    assert_same_state(album.state, MODEL.load_session(path).state, 0)


def test_other_files_are_not_sessions(tmp_path):
    with pytest.raises(CheckpointError, match="no such session file"):
        MODEL.load_session(tmp_path / "none")
    save_file({"a": torch.zeros(1)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="not a session file"):
        MODEL.load_session(tmp_path / "a")


def test_a_loaded_session_reads_on_as_it_did(tmp_path):
    album = MODEL.session(images=tiny_pictures(1), tiles="2x3", max_frames=5)
    path = album.save(tmp_path / "album")
    loaded, other = MODEL.load_session(path), MODEL.load_session(path, tiles=None)
    for session in (album, loaded, other):
        session.append(images=tiny_pictures(1))
    assert (album.n_images, loaded.n_images, other.n_images) == (14, 14, 8)
    assert_same_state(album.state, loaded.state, 1e-6)
    assert loaded.reader.options.max_frames == other.reader.options.max_frames == 5


@pytest.mark.parametrize("reading", [None, {"tiles": "many"}, {"max_frames": 0}, 3, ["fps"]])
def test_how_a_damaged_or_older_file_says_it_was_read(saved, reading):
    rewrite(saved[1], lambda about, tensors: about.pop("reading") if reading is None else about.update(reading=reading))
    if reading is None:
        assert MODEL.load_session(saved[1], tiles="fit").reader.options.tiles == "fit"
        return
    with pytest.raises(CheckpointError, match=r"album\.session: damaged session file: "):
        MODEL.load_session(saved[1])
