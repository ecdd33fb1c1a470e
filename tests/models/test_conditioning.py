"""The schedule of a conditioning: which rows apply at which sampling step."""

from dataclasses import replace

import torch

from unlearning.models.conditioning import Conditioning


def constant(value: float, rows: int = 2) -> Conditioning:
    return Conditioning(torch.full((rows, 3, 4), value), {"pooled": torch.full((rows, 5), value)})


def held(c: Conditioning, step: int) -> list[float]:
    """The value of each row at a step; the extra tensors follow the states."""
    now = c.at(step)
    assert torch.equal(now.embeds[:, 0, 0], now.extra["pooled"][:, 0])
    return now.embeds[:, 0, 0].tolist()


def test_each_row_holds_for_its_own_steps():
    c = replace(constant(1.0), steps=torch.tensor([0, 2]), later=constant(0.0))
    assert [held(c, step) for step in range(4)] == [[0, 1], [0, 1], [0, 0], [0, 0]]
    assert held(c[1:], 1) == [1] and held(c[1:], 2) == [0]


def test_a_later_conditioning_may_have_its_own_schedule():
    inner = replace(constant(1.0), steps=torch.tensor([3, 1]), later=constant(0.0))
    outer = replace(constant(2.0), steps=torch.tensor([1, 2]), later=inner)
    assert [held(outer, step) for step in range(4)] == [[2, 2], [1, 2], [1, 0], [0, 0]]
