"""A picture that two processes want is drawn by one of them, whatever becomes of it."""

import os
import signal
from pathlib import Path

import numpy as np

from unlearning.store.images import Row, save
from unlearning.store.locks import claimed

PICTURE = np.zeros((4, 4, 3), np.uint8)


def rows(folder: Path, count: int) -> list[Row]:
    return [Row(folder / f"{i}.png", "a cat", "erase", {}, i) for i in range(count)]


class Other:
    """Another process, which claims rows and draws them when told to."""

    def __init__(self, wanted: list[Row]):
        (started, self._started), (self._told, told) = os.pipe(), os.pipe()
        self.told = told
        if (pid := os.fork()) == 0:
            with claimed(wanted) as mine:
                os.write(self._started, b"x")
                os.read(self._told, 1)
                for row in mine:
                    save(PICTURE, row)
            os._exit(0)
        self.pid = pid
        os.read(started, 1)

    def draws(self) -> None:
        os.write(self.told, b"x")

    def dies(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_what_another_process_draws_is_left_to_it(tmp_path):
    wanted = rows(tmp_path / "not" / "yet", 4)
    other = Other(wanted[1:3])
    with claimed(wanted) as mine:
        assert mine == [wanted[0], wanted[3]]
    other.draws()
    with claimed(wanted, wait=True) as mine:
        assert mine == [wanted[0], wanted[3]], "it has been waited for, and the rest is still nobody's"
    os.waitpid(other.pid, 0)
    save(PICTURE, wanted[0])
    with claimed(wanted) as mine:
        assert mine == [wanted[3]]


def test_a_process_that_dies_leaves_nothing_claimed(tmp_path):
    wanted = rows(tmp_path, 3)
    other = Other(wanted)
    with claimed(wanted) as mine:
        assert mine == []
    other.dies()
    with claimed(wanted) as mine:
        assert mine == wanted
