"""Files are written whole or not at all: temporary name, flush, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from longllava.errors import InputError

WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)  # what file systems without locks answer


def write_atomic(path: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Call `write(file)` on a temporary neighbour of `path`, then rename it into place.

    A crash at any moment leaves the old file or the new one, never a part. The parent folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes 0600, which would hide shared checkpoints
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return path


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
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def writable_folder(path: str | Path) -> Path:
    """Make a folder, and try it: what takes minutes to be measured should not find it closed then.

    Raises: InputError naming it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except FileExistsError:
        raise InputError(f"{path}: it is a file; name a folder to write into") from None
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


def sync_folder(folder: Path) -> None:
    """Make a rename durable: the folder's own entry is flushed too (POSIX only)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
