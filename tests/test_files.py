"""Writing that fails says which file, and leaves nothing of it; what cannot be shown does not end a command."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from longllava import cli
from longllava.errors import InputError
from longllava.files import whole_folder, writable_folder, write_atomic, write_text
from tests.tiny import tiny_model


def full(file) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: write_atomic(path, full))
    assert end.value.code == f"longllava: {path}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: write_text(tmp_path / "file/a.txt", "a"))
    assert end.value.code == f"longllava: {tmp_path}/file: it is a file; name a folder to write into"
    with pytest.raises(InputError, match="/file: it is a file"), whole_folder(tmp_path / "file/a/b"):
        pass


def test_a_folder_that_cannot_be_written_into_is_refused_before_it_is_needed(tmp_path: Path, monkeypatch) -> None:
    assert writable_folder(tmp_path / "a/b").is_dir() and list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"/file: it is a file; name a folder to write into$"):
        writable_folder(tmp_path / "file")
    with pytest.raises(InputError, match=r"/file: it is a file; name a folder to write into$"):
        writable_folder(tmp_path / "file/a/b")

    def closed(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", closed)  # root may write wherever it likes
    with pytest.raises(InputError, match=r"/a: cannot be written into: Permission denied$"):
        writable_folder(tmp_path / "a")


def test_a_link_to_nothing_is_named_not_the_folder_it_lies_in(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("link", "link/below"):
        with pytest.raises(InputError, match=r"/link: it is a file; name a folder to write into$"):
            tiny_model().save_pretrained(tmp_path / name)


@pytest.fixture
def closed_to_others() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_files_are_closed_to_others_where_the_umask_says_so(tmp_path: Path, closed_to_others: None) -> None:
    model = tiny_model()
    written = [write_text(tmp_path / "text", "a"), model.session().save(tmp_path / "session")]
    written += model.save_pretrained(tmp_path / "model").iterdir()
    assert {f"{path.stat().st_mode & 0o777:o}" for path in written} == {"600"}


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a/b"
    with whole_folder(target) as staged:
        (staged / "images").mkdir()
        (staged / "images/0.png").write_bytes(b"0")
        assert not target.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "images", "0.png"]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode  # whoever may read others may read it


def test_into_a_folder_that_is_there_files_come_beside_the_others_and_json_last(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "images").mkdir()
    for name in ("images/0.png", "images/9.png", "notes"):
        (tmp_path / name).write_text("old")
    moved = []
    monkeypatch.setattr(
        os, "replace", lambda source, target, real=os.replace: (moved.append(target), real(source, target))
    )
    with whole_folder(tmp_path) as staged:
        (staged / "images").mkdir()
        for name in ("a.json", "images/0.png", "images/1.png", "sheet.png"):
            (staged / name).write_text("new")
        assert (tmp_path / "images/0.png").read_text() == "old"
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a.json": "new", "images/0.png": "new", "images/1.png": "new", "images/9.png": "old",
                     "notes": "old", "sheet.png": "new"}  # fmt: skip
    assert moved[-1] == tmp_path / "a.json" and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_cannot_be_finished_is_not_begun(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "a/b"
    if there:
        target.mkdir(parents=True)
        (target / "notes").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="No space") as raised, whole_folder(target) as staged:
        (staged / "1").write_bytes(b"1")
        write_atomic(staged / "2", full)
    assert raised.value.filename == str(target / "2")
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as staged:
        (staged / "1").write_bytes(b"1")
        raise KeyboardInterrupt
    assert sorted(tmp_path.rglob("*")) == before


KILLED = """
import os, sys
from longllava.files import whole_folder
with whole_folder(sys.argv[1]) as staged:
    (staged / "big").touch()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name != "posix", reason="a folder has no lock here")
@pytest.mark.parametrize("name", [".", "new"])
def test_what_a_killed_process_had_begun_goes_and_what_another_writes_stays(tmp_path: Path, name: str) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], cwd=Path(__file__).parents[1])
    assert killed.returncode == -9 and [path.name[:9] for path in tmp_path.iterdir()] == [".writing-"]
    with whole_folder(tmp_path / name) as staged, whole_folder(tmp_path / name) as other:
        (staged / "1").touch()
        (other / "2").touch()
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["1", "2"]
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_another_process_made_meanwhile(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a") as staged:
        (staged / "1").write_text("ours")
        (tmp_path / "a").mkdir()
        (tmp_path / "a/1").write_text("theirs")
    assert (tmp_path / "a/1").read_text() == "ours" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_in_a_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"/file: it is a file; name a folder to write into$"),
        whole_folder(tmp_path / "file"),
    ):
        raise AssertionError


def test_text_with_a_name_of_another_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stage.yaml'?: .*own.udcff.* is not Unicode text; rename"):
        write_text(tmp_path / "stage.yaml", "output: own\udcff/run")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_lacks_letters_gets_their_numbers() -> None:
    code = r"from longllava.cli import run; run(lambda: print('b\xe4r \udcff'))"
    for encoding, shown in (("ascii", "b\\xe4r \\udcff\n"), ("utf-8", "bär \\udcff\n")):
        environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert (done.returncode, done.stdout.decode()) == (0, shown)


def test_our_warnings_are_one_line_without_a_place() -> None:
    here = str(Path(cli.__file__).parent / "talk.py")
    assert cli.one_line("give a video", UserWarning, here, 1) == "longllava: warning: give a video\n"
    others = warnings.formatwarning("old", UserWarning, "/usr/lib/other.py", 7, "x")
    assert cli.one_line("old", UserWarning, "/usr/lib/other.py", 7, "x") == others
