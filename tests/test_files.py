"""Writing that fails says which file, and leaves nothing of it; what cannot be shown does not end a command."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from longllava import cli
from longllava.errors import InputError
from longllava.files import writable_folder, write_atomic, write_text


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
    assert end.value.code.startswith(f"longllava: {tmp_path}/file: ") and "Errno" not in end.value.code


def test_a_folder_that_cannot_be_written_into_is_refused_before_it_is_needed(tmp_path: Path, monkeypatch) -> None:
    assert writable_folder(tmp_path / "a/b").is_dir() and list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"/file: it is a file; name a folder to write into$"):
        writable_folder(tmp_path / "file")
    with pytest.raises(InputError, match=r"/file/a: cannot be written into: Not a directory$"):
        writable_folder(tmp_path / "file/a")

    def closed(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", closed)  # root may write wherever it likes
    with pytest.raises(InputError, match=r"/a: cannot be written into: Permission denied$"):
        writable_folder(tmp_path / "a")


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
