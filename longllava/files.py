"""Files and folders are written whole or not at all: temporary name, flush, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from longllava.errors import InputError

UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
IS_A_FILE = "{}: it is a file; name a folder to write into"
WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EBADF)  # file systems without; NFS of a folder's


def expanded(path: str | Path) -> Path:
    """~ becomes the home folder, where there is one: Path's own raises without, and for users that are not known.

    Raises: InputError for what is no name, and for an empty one: to Path it would be the folder one stands in.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise InputError(f"got {path!r:.80}, expected the name of a file or folder")
    return Path(os.path.expanduser(path))


def write_atomic(path: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Call `write(file)` on a temporary neighbour of `path`, then rename it into place.

    A crash at any moment leaves the old file or the new one, never a part. The parent folder is made.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = unfinished(path)
    try:
        with naming(path), open(temporary, "xb") as file:  # not mkstemp's, which are closed to others
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return path


def make_folder(folder: Path) -> None:
    """With its parents, unless it is there. Raises: InputError where it, or one of them, is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (folder, *folder.parents) if os.path.lexists(path))  # a link to nothing is there
        raise InputError(IS_A_FILE.format(file)) from None


def unfinished(path: Path) -> Path:
    """A name for a file until it is whole, known before the file is there."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_unfinished(folder: Path) -> None:
    """What was begun under such names and never became whole, in a folder that this process alone writes into."""
    for path in folder.glob(".*.tmp"):
        if UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A failed write (a full disk) names the file: the system does so only where one is opened."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> Path:
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:  # a name that the system gave us in another encoding
        part = text[max(0, error.start - 20) : error.end + 20]
        raise InputError(f"{str(path)!a}: {part!a} in it is not Unicode text; rename that file or folder") from None
    return write_atomic(path, lambda file: file.write(content))


def write_json(path: str | Path, value: Any) -> Path:
    return write_text(path, json_text(value))


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once the block has ended; if it fails, nothing is left.

    A new folder appears by one rename. In one that is there, files replace those of their names one by one, last JSON,
    which names the others; the rest stays, and a failure among these renames leaves some done.
    Raises: InputError where a file has its name.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(IS_A_FILE.format(folder))
    beside = folder if folder.is_dir() else folder.parent
    with made_folder(beside), staged_in(beside, ".writing-") as temporary:
        staged = temporary / "whole"
        staged.mkdir()  # with the usual mode: what is around it is closed to others
        with naming_as(folder, staged):
            yield staged
            for path in staged.rglob("*"):
                if path.is_file():
                    sync(path)
        with alone_in(beside):
            put_in_place(staged, folder)
    sync(beside)


@contextlib.contextmanager
def staged_in(folder: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder below `folder`, held by this process; those of its prefix whose processes were killed go."""
    with contextlib.ExitStack() as stack:
        with alone_in(folder):
            for left in folder.glob(f"{prefix}*"):
                if abandoned(left):  # as large as what was to be written
                    shutil.rmtree(left, ignore_errors=True)
            staged = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=folder)))
            stack.enter_context(alone_in(staged))
        yield staged


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """A folder, made with its parents where they are missing; if the block fails, what was made and is empty goes."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # someone else has written into it
                path.rmdir()
        raise


def put_in_place(staged: Path, folder: Path) -> None:
    try:
        os.rename(staged, folder)
        return
    except OSError:
        if not folder.is_dir():  # else it was there, or another process has made it meanwhile
            raise
    files = [path for path in staged.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.suffix == ".json"):
        target = folder / path.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    for place in {folder / path.parent.relative_to(staged) for path in files}:
        sync(place)


@contextlib.contextmanager
def naming_as(folder: Path, staged: Path) -> Iterator[None]:
    """What fails in `staged`, which is gone then, is told of `folder`."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, (str, os.PathLike)):
            error.filename = os.fspath(error.filename).replace(str(staged), str(folder))
        raise


def writable_folder(path: str | Path) -> Path:
    """Make a folder, and try it: what takes minutes to be measured should not find it closed then.

    Raises: InputError naming it.
    """
    path = Path(path)
    try:
        make_folder(path)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written into: {error.strerror or error}") from None
    return path


@contextlib.contextmanager
def where_there_are_locks() -> Iterator[None]:
    """Around `import fcntl` and a lock of it: goes on where there are none (Windows, some network file systems)."""
    try:
        yield
    except ImportError:
        pass
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Of those that put files into a folder, and have locks, one at a time: else theirs would be mixed."""
    if os.name != "posix":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with where_there_are_locks():
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def abandoned(folder: Path) -> bool:
    """Whether the process that was `alone_in` it is gone. Where there are no locks nobody can tell: False."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def sync(path: Path) -> None:
    """To the disk: what a file holds, or which names a folder has, which makes a rename durable (POSIX only)."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
