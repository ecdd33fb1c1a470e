"""Who draws a picture that several processes want: one of them, while the others go on to the next.

A claim is a lock on a single byte of a file beside the pictures, at a place that the picture's name stands for. It ends
with the process that holds it, however that ends; nothing is ever left behind to clear away.
"""

import fcntl
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from unlearning.store.images import Row, missing

CLAIMS = ".claims"


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
