"""Fast-starting processes: the libraries are imported in advance, but not this package.

They end without running `atexit` handlers, and wait for their own worker processes.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMAND_LINE = "import runpy; runpy.run_module('unlearning', run_name='__main__', alter_sys=True)"
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.libraries"])  # by the first process that is started


class Started:
    """A process that runs Python code.

    Args:
        code: What it runs.
        arguments: Its sys.argv[1:].
        cwd: Its working directory.
        environment: Variables that it has besides those of this process.

    Attributes:
        pid: Its number.
    """

    def __init__(
        self,
        code: str,
        arguments: Sequence[object] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self._folder = tempfile.TemporaryDirectory()
        self._stdout, self._stderr = names = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        known = {**os.environ, **(environment or {})}
        self._process = _server.Process(target=_run, args=(code, [*map(str, arguments)], cwd, known, *names))
        self._process.start()
        weakref.finalize(self, self._process.kill)  # with the test that has started it, whatever became of it
        self.pid: int = self._process.pid

    def wait(self, timeout: float = 240) -> int:
        """Its exit status; minus the signal that ended it.

        Raises:
            TimeoutError: If it does not end in so many seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} seconds: {self.stderr[-3000:]}")
        return self._process.exitcode

    def send_signal(self, which: int) -> None:
        os.kill(self.pid, which)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()


def run(code: str, arguments: Sequence[object] = (), **where) -> str:
    """What the code prints, in a process of its own. Raises AssertionError if it fails."""
    process = Started(code, arguments, **where)
    assert process.wait() == 0, process.stderr[-3000:]
    return process.stdout


def _run(code: str, arguments: list[str], cwd: Path | None, environment: dict[str, str], *streams: Path) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd or ".")
    multiprocessing.process._parent_process = None  # it is nobody's worker
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
