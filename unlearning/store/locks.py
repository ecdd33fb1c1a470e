"""Who draws a picture that several processes want: one of them, while the others go on to the next.

A claim is a lock on a single byte of a file beside the pictures, at a place that the picture's name stands for. It ends
with the process that holds it, however that ends; nothing is ever left behind to clear away.
"""

import fcntl
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from unlearning.errors import UserError
from unlearning.store.images import Row, missing

CLAIMS = ".claims"
log = logging.getLogger(__name__)


@contextmanager
def claimed(rows: Sequence[Row], wait: bool = False) -> Iterator[list[Row]]:
    """Those of the rows that are this process's to draw: their pictures are not there, and nobody else is drawing them.

    No other process draws them before the context ends. A process makes one claim at a time: closing a file ends all of
    a process's locks on it.

    Args:
        wait: Until others are done with theirs, instead of leaving those to them.
    """
    with ExitStack() as stack:
        files, mine = {}, set()
        # In one order, lest two wait for each other.
        for path in sorted((row.path for row in missing(rows)), key=_place):
            if path.parent not in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                files[path.parent] = stack.enter_context((path.parent / CLAIMS).open("ab"))
            try:
                how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(files[path.parent], how, 1, _place(path))
                mine.add(path)
            except (BlockingIOError, PermissionError):  # POSIX allows either
                continue
        yield missing(row for row in rows if row.path in mine)  # another process may have drawn some meanwhile


def _place(path: Path) -> int:
    return int(hashlib.sha256(path.name.encode()).hexdigest()[:15], 16)


@contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Holds the folder's lock, which the ranks of one run share.

    If another run does, it is waited for, or else UserError is raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if rank_zero_only.rank != 0:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"Another run is at work in {folder}. Wait for it, or change a setting.") from None
            log.info("Another run is at work in %s: waiting for it.", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
