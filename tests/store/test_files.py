"""Files: a digest identifies content, and an interrupted write leaves no partial file."""

import errno
from pathlib import Path

import numpy as np
import pytest

from unlearning.store.files import digest, read_state, set_aside, write_atomically
from unlearning.store.images import write_image


def test_a_digest_is_of_content_alone():
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest(["ab", "c"]), digest()}) == 5
    assert len(digest()) == 16


def fail_midway(monkeypatch, step: str) -> None:
    """A full disk: a write stops after half of the file, or the file cannot be renamed."""
    write_bytes = Path.write_bytes

    def full(self, *arguments):
        if step == "write_bytes":
            write_bytes(self, arguments[0][: len(arguments[0]) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, step, full)


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_write_that_fails_leaves_no_half_file(tmp_path, monkeypatch, step):
    (tmp_path / "numbers.json").write_text("[1, 2]")
    with monkeypatch.context() as patch:
        fail_midway(patch, step)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / "numbers.json", "[3, 4, 5]")
        with pytest.raises(OSError, match="No space left"):
            write_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert (tmp_path / "numbers.json").read_text() == "[1, 2]", "what was there stays"
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"], "nothing half-written is left"
    write_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    assert (tmp_path / "a.png").exists()


def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    def interrupted(self, content):
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "numbers.json", "[]")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"other": 1}', b'{"number": "many"}', b"\xff\xfe"])
def test_a_damaged_state_file_is_named_and_set_aside(tmp_path, caplog, content):
    path = tmp_path / "state.json"

    def read() -> int | None:
        return read_state(path, lambda state: int(state["number"]))

    assert read() is None, "there is none"
    path.write_text('{"number": 3}')
    assert read() == 3 and not caplog.messages
    path.write_bytes(content)
    assert read() is None and not path.exists()
    [said] = caplog.messages
    assert str(path) in said and "state.json.damaged" in said
    assert (tmp_path / "state.json.damaged").read_bytes() == content


def test_a_folder_is_set_aside_once_more(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "erasure").mkdir()
        (tmp_path / "erasure" / "weights").write_text(content)
        set_aside(tmp_path / "erasure", "it is broken")
    assert [p.name for p in tmp_path.iterdir()] == ["erasure.damaged"]
    assert (tmp_path / "erasure.damaged" / "weights").read_text() == "second"


def test_a_damaged_file_that_cannot_be_moved_is_not_used(tmp_path, monkeypatch, caplog):
    (tmp_path / "state.json").write_text("{")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EROFS, "read-only")))
    assert read_state(tmp_path / "state.json", dict) is None and "state.json" in caplog.text
