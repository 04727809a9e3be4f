"""One process at a time in a run's folder, and what a full disk looks like when a library reports it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtr_deploy.errors import UsageError


@contextmanager
def run_lock(file: Path) -> Iterator[None]:
    """Hold `file` for this process. Raises `UsageError` if another live process holds it.

    The kernel's lock on the open file is what counts: it ends with the process, whatever ends it, so a file left by a
    dead process is no obstacle. The process id in it is for the message, and for one case: a child that a killed
    build left behind can still hold the kernel's lock; then the dead id says that the lock is stale and a fresh file
    takes its place.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(file)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # The file goes before the lock does: the next process makes a new one, or sees that its file is gone and
        # tries again.
        if _is_file_of(handle, file):
            file.unlink()
        os.close(handle)


def _take(file: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            if not holder.isdigit() or _alive(int(holder)):
                who = f"process {holder}" if holder else "another process"
                raise UsageError(f"{file.parent}: {who} is working on this run; wait for it or stop it") from None
            file.unlink(missing_ok=True)
            continue
        if _is_file_of(handle, file):
            return handle
        os.close(handle)  # it was removed between opening and locking


def _is_file_of(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is a full disk or quota, also as safetensors, SQLite or ONNX say it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error).lower()
        if "no space left on device" in text or "disk is full" in text or "storagefull" in text:
            return True
        error = error.__cause__ or error.__context__
    return False
