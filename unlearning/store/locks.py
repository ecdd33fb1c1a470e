"""File locks: which of several processes generates an image, and which one works in a run's folder.

The locks are those of the operating system (filelock): they end with the process that holds them, even if it is
killed. A lock file on disk does not mean that a process holds the lock. If the file system has no locks, or is
read-only, a warning is given once, and the run continues without locks.
"""

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout, lock_descriptor

from unlearning.errors import UserError
from unlearning.store.manifest import ManifestRow, missing
from unlearning.store.ranks import first_rank

RUN_LOCK = ".lock"  # in a run's folder
CLAIM = ".claim"  # suffix of the lock file next to an image that is being generated
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EROFS, errno.EACCES, errno.EPERM}
log = logging.getLogger(__name__)


@contextmanager
def claimed(rows: Sequence[ManifestRow], wait: bool = False) -> Iterator[list[ManifestRow]]:
    """Yields the rows that this process is to generate: their images are missing, and no other process generates them.

    Other processes leave these rows alone until the context ends.

    Args:
        rows: Rows of a manifest.
        wait: If True, waits for the rows that other processes generate. If False, leaves those rows out.
    """
    with ExitStack() as stack:
        claims = set()
        for path in sorted(row.path for row in missing(rows)):  # in one order, to avoid deadlocks
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                stack.enter_context(_claim(path, wait))
                claims.add(path)
        yield missing(row for row in rows if row.path in claims)  # another process may have just written some


@contextmanager
def _claim(path: Path, wait: bool) -> Iterator[None]:
    """Holds the lock of one image. Raises Timeout if another process holds it and `wait` is False."""
    lock = FileLock(path.with_name(f".{path.name}{CLAIM}"), fallback_to_soft=False)
    _acquire(lock, wait)
    try:
        yield
    finally:
        # Before the release, so that the file of a lock that another process takes next is never removed.
        # Windows does not remove an open file; there filelock removes it itself.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a run's folder. The processes of one distributed run share it: its first process holds it.

    Args:
        folder: The run's folder; created if it does not exist.
        wait: If True, waits until another run in this folder has ended.

    Raises:
        UserError: If another run is at work in the folder and `wait` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not first_rank():
        yield
        return
    lock = FileLock(folder / RUN_LOCK, poll_interval=0.5, fallback_to_soft=False)
    try:
        _acquire(lock, wait=False)
    except Timeout:
        if not wait:
            raise UserError(f"Another run is at work in {folder}. Wait until it ends, or change a setting.") from None
        log.info("Another run is at work in %s: waiting for it.", folder)
        _acquire(lock, wait=True)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, wait: bool) -> None:
    """Takes the lock, unless there are no locks where its file is, of which it warns once.

    Raises Timeout if another process holds it and `wait` is False.
    """
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks(str(error.strerror))


@cache
def _warn_of_no_locks(why: str) -> None:
    log.warning("Files cannot be locked (%s): start no two runs that share a folder or images at the same time.", why)


def in_use(folder: Path) -> bool:
    """Whether a run holds the lock of its folder. Creates no file, and needs no permission to write."""
    try:
        with (folder / RUN_LOCK).open() as file:
            return not lock_descriptor(file.fileno(), blocking=False)  # closing the file releases it
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks(str(error.strerror))
        return False
