"""The key of a fit: equal if the settings lead to the same result, different otherwise."""

import numpy as np
import pytest
import torch

from unlearning.attacks.recall import ImageToImage
from unlearning.sampling.sampler import Sampler
from unlearning.training.checkpoints import key_of


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(5000), torch.arange(5000.0)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        (np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8)),
        (Sampler(steps=2), Sampler(steps=3)),
        (Sampler(steps=4), ImageToImage(steps=4, start=1)),
        ({"cat"}, {"dog"}),
    ],
)
def test_settings_that_decide_a_result_are_in_the_key(one, other):
    assert key_of(one) != key_of(other)


def test_settings_that_decide_no_result_are_not_in_the_key():
    assert (
        key_of(Sampler(steps=2, batch_size=4))
        == key_of(Sampler(steps=2))
        == key_of(Sampler(steps=2, batch_size="auto"))
    )
    assert key_of({"cat", "dog", "ship"}) == key_of({"ship", "dog", "cat"})
    assert key_of(torch.arange(4).view(2, 2).T) == key_of(torch.arange(4).view(2, 2).T.contiguous())
