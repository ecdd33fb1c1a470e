"""Loops resume where a process was interrupted."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unlearning.store import loops
from unlearning.store.loops import kept_in, resumed


@pytest.fixture(autouse=True)
def always_written(monkeypatch):
    monkeypatch.setattr(loops, "EVERY", 0)


def trained(folder, steps: int = 6, stop: int | None = None) -> SimpleNamespace:
    """A parameter that random losses move, and a list; `stop` interrupts that step."""
    torch.manual_seed(0)
    v = nn.Parameter(torch.randn(3))
    now = SimpleNamespace(v=v, optimizer=torch.optim.Adam([v], lr=0.1), noise=torch.zeros(3), seen=[])
    with kept_in(folder):
        for i in resumed(range(steps), "training", now):
            now.noise = torch.randn(3)
            now.optimizer.zero_grad()
            (v - now.noise).square().sum().backward()
            if i == stop:
                raise KeyboardInterrupt
            now.optimizer.step()
            now.seen.append(i)
    return now


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_an_interrupted_loop_ends_as_one_that_was_not(tmp_path, stop):
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop=stop)
    again = trained(tmp_path / "cut")
    assert torch.equal(again.v, whole.v) and torch.equal(again.noise, whole.noise)
    assert again.seen == whole.seen == list(range(6))
    assert not list(tmp_path.iterdir()), "nothing is left of loops that have ended"


def test_every_loop_of_a_block_has_a_state_of_its_own(tmp_path):
    drawn: list[list[float]] = []

    def block(stop: bool) -> list[float]:
        torch.manual_seed(0)
        parts = []
        with kept_in(tmp_path / "kept"):
            for part in range(3):
                now = SimpleNamespace(values=[])
                for i in resumed(range(2), "drawing", now):
                    if stop and (part, i) == (1, 1):
                        raise KeyboardInterrupt
                    now.values.append(torch.rand(()).item())
                    drawn.append([part, i])
                parts += now.values
        return parts

    whole = block(False)
    drawn.clear()
    with pytest.raises(KeyboardInterrupt):
        block(True)
    assert block(False) == whole
    assert drawn == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]], "no step twice"


def test_a_damaged_state_is_set_aside_and_the_loop_begins_again(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop=3)
    [path] = (tmp_path / "cut").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    again = trained(tmp_path / "cut")
    assert again.seen == list(range(6)) and "damaged" in caplog.text


def test_outside_of_a_block_no_state_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "_write", lambda *_: pytest.fail("written"))
    now = SimpleNamespace(seen=[])
    assert list(resumed("abc", "reading", now)) == ["a", "b", "c"]
