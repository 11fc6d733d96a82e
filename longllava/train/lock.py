"""One run in a folder at a time: two would write over each other's checkpoints, log or finished answers."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from longllava.errors import TrainingError
from longllava.files import make_folder, where_there_are_locks

LOCK = "lock"


@contextlib.contextmanager
def run_lock(folder: Path, active: bool = True) -> Iterator[None]:
    """Hold `folder` while the block runs; the system lets go of it when the process ends, however it ends.

    active: False on all but the first process of a run. A folder that the block wrote nothing into is not left behind.
    Where there are no such locks (Windows, some network file systems) the run goes on without.
    Raises: TrainingError naming the process that holds it; InputError where a file has the folder's name.
    """
    if not active:
        yield
        return
    make_folder(folder)
    path = folder / LOCK
    with path.open("a+", encoding="utf-8") as file:  # the holder's words stay until the lock is ours
        take(file, path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps files that are open
                if os.listdir(folder) == [LOCK]:
                    path.unlink()
                    folder.rmdir()


def take(file: TextIO, path: Path) -> None:
    try:
        with where_there_are_locks():
            import fcntl

            # lockf, not flock: a lock of flock's is inherited by processes that are forked (loaders of data), and
            # outlives a killed run until the last of them has noticed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        file.seek(0)
        holder = file.read() or "another process"
        raise TrainingError(
            f"{path.parent}: {holder} works in this folder and holds {path};"
            " wait for its end, stop it, or give this run another output folder"
        ) from None
