"""Locks: one process generates each image, and one run uses a folder, even if a process is killed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from unlearning.errors import UserError
from unlearning.store import locks
from unlearning.store.images import write_image
from unlearning.store.locks import alone_in, claimed, in_use
from unlearning.store.manifest import ManifestRow

IMAGE = np.zeros((4, 4, 3), np.uint8)


def rows(folder: Path, count: int) -> list[ManifestRow]:
    return [ManifestRow(folder / f"{i}.png", "a cat", "erase", {}, i) for i in range(count)]


class Other:
    """Another process, which claims rows and generates them on `generate`."""

    def __init__(self, wanted: list[ManifestRow]):
        (started, self._started), (self._wait, self._go) = os.pipe(), os.pipe()
        if (pid := os.fork()) == 0:
            with claimed(wanted) as mine:
                os.write(self._started, b"x")
                os.read(self._wait, 1)
                for row in mine:
                    write_image(row.path, IMAGE)
            os._exit(0)
        self.pid = pid
        os.read(started, 1)

    def generate(self) -> None:
        os.write(self._go, b"x")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_rows_locked_by_another_process_are_skipped(tmp_path):
    wanted = rows(tmp_path / "not" / "yet", 4)
    other = Other(wanted[1:3])
    with claimed(wanted) as mine:
        assert mine == [wanted[0], wanted[3]]
    other.generate()
    with claimed(wanted, wait=True) as mine:
        assert mine == [wanted[0], wanted[3]], "the other two have been generated meanwhile"
        assert len(hidden(wanted[0].path.parent)) <= 4
    os.waitpid(other.pid, 0)
    write_image(wanted[0].path, IMAGE)
    with claimed(wanted) as mine:
        assert mine == [wanted[3]]
    assert hidden(wanted[0].path.parent) == [], "no lock file is left"


def test_a_killed_process_releases_its_locks(tmp_path):
    wanted = rows(tmp_path, 3)
    other = Other(wanted)
    with claimed(wanted) as mine:
        assert mine == []
    other.kill()
    with claimed(wanted) as mine:
        assert mine == wanted
    assert hidden(tmp_path) == []


def test_many_processes_generate_each_image_once(tmp_path):
    """Each writes the image only if it is not there, and fails if it is."""
    wanted = rows(tmp_path, 12)
    children = []
    for _ in range(4):
        if (pid := os.fork()) == 0:
            made = 0
            for row in wanted * 2:
                with claimed([row], wait=True) as mine:
                    for each in mine:
                        with each.path.open("xb") as file:
                            file.write(b"image")
                        made += 1
            os._exit(made)
        children.append(pid)
    assert sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children) == 12
    assert hidden(tmp_path) == []


def test_a_folder_belongs_to_one_run(tmp_path):
    run = tmp_path / "run"
    assert not in_use(run)
    with alone_in(run):
        assert in_use(run) and in_use(run)
        with pytest.raises(UserError, match=str(run)), alone_in(run):
            pass
    assert not in_use(run)
    with pytest.raises(KeyError), alone_in(run):
        raise KeyError
    assert not in_use(run)


def test_a_run_waits_for_another(tmp_path):
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        with alone_in(tmp_path):
            entered.set()
            release.wait(20)

    other = threading.Thread(target=hold)
    other.start()
    assert entered.wait(20)
    threading.Timer(0.3, release.set).start()
    with alone_in(tmp_path, wait=True):
        assert release.is_set()
    other.join()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_once_and_worked_on(tmp_path, monkeypatch, caplog, number):
    locks._warn_of_no_locks.cache_clear()

    def flock(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    wanted = rows(tmp_path / "images", 2)
    for _ in range(2):
        with alone_in(tmp_path), claimed(wanted) as mine:
            assert mine == wanted
    assert not in_use(tmp_path) and hidden(tmp_path / "images") == []
    [said] = caplog.messages
    assert os.strerror(number) in said


def test_the_locks_need_no_unix():
    """As on Windows, which has no fcntl."""
    program = "import sys; sys.modules['fcntl'] = None; import unlearning.store.locks, unlearning.store.pruning"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
