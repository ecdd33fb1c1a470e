"""What each replacement fills in, and that it changes nothing outside the mask."""

import pytest
import torch

from unlearning.codes.replacement import Blocks, CodeStatistics, Constant, Nearest, Neighbours, Uniform
from unlearning.errors import UserError

K, SAFE, EXPLICIT = 8, torch.tensor([0, 1, 2, 3]), torch.tensor([6, 7])
CODES = torch.randint(4, 8, (6, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(6, 6, dtype=torch.bool)
MASK[1:5, 2:5] = True
CODEBOOK = torch.tensor([[0.0], [1], [2], [3], [10], [11], [0.9], [2.2]])


def statistics() -> CodeStatistics:
    """Safe codes form stripes: 0 next to 1 next to 0, each code below itself; 2 and 3 rarely occur."""
    across, down = torch.zeros(K, K), torch.zeros(K, K)
    across[0, 1] = across[1, 0] = 100
    down[0, 0] = down[1, 1] = 100
    codes = torch.tensor([100, 100, 1, 1, 5, 5, 5, 5])
    blocks = torch.stack([torch.full((3, 3), 0), torch.arange(9).view(3, 3) % 4])
    return CodeStatistics(EXPLICIT, SAFE, codes, across.to_sparse(), down.to_sparse(), blocks)


def filled(replacement, mask=MASK, seed=0, codes=CODES):
    return replacement.rule(statistics(), CODEBOOK)(codes, mask, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("replacement", [Constant(2), Uniform(), Nearest(), Blocks(), Neighbours()])
def test_codes_outside_the_mask_stay_and_a_seed_gives_the_same_codes(replacement):
    before = CODES.clone()
    after = filled(replacement)
    assert torch.equal(after[~MASK], CODES[~MASK]) and torch.equal(CODES, before)
    assert torch.equal(after, filled(replacement)), "the same seed, the same codes"
    assert torch.equal(filled(replacement, torch.zeros_like(MASK)), CODES)
    if isinstance(replacement, Uniform | Blocks):
        assert not torch.equal(after, filled(replacement, seed=1))
    if not isinstance(replacement, Nearest):
        assert torch.isin(after[MASK], SAFE).all()


def test_constant_and_its_error():
    assert (filled(Constant(3))[MASK] == 3).all()
    with pytest.raises(UserError, match="8"):
        filled(Constant(8))


def test_uniform_draws_safe_codes_with_equal_probability():
    drawn = torch.cat([filled(Uniform(), seed=s)[MASK] for s in range(300)])
    shares = torch.bincount(drawn, minlength=K)[SAFE] / len(drawn)
    assert (shares - 0.25).abs().max() < 0.03


def test_nearest_replaces_codes_of_e_only_by_the_nearest_in_the_codebook():
    after = filled(Nearest(), torch.ones_like(MASK))
    assert torch.equal(after[CODES == 6], torch.ones_like(after[CODES == 6])), "0.9 is nearest to 1"
    assert (after[CODES == 7] == 2).all(), "2.2 is nearest to 2"
    assert torch.equal(after[CODES < 6], CODES[CODES < 6]), "codes outside E stay"


def test_blocks_are_not_cut():
    after = filled(Blocks(), torch.ones_like(MASK))
    tiles = after.unfold(0, 3, 3).unfold(1, 3, 3).reshape(-1, 3, 3)
    assert all(any(torch.equal(tile, block) for block in statistics().blocks) for tile in tiles)


def test_neighbours_continue_the_pattern_around_the_mask():
    """A hole in stripes is filled with the same stripes, in the same phase."""
    stripes = (torch.arange(12) % 2).repeat(12, 1)
    hole = torch.zeros(12, 12, dtype=torch.bool)
    hole[3:9, 3:9] = True
    broken = stripes.masked_fill(hole, 7)
    right = torch.stack([filled(Neighbours(), hole, s, broken)[hole] == stripes[hole] for s in range(10)])
    assert right.double().mean() > 0.95
    assert torch.isin(filled(Neighbours(), torch.ones_like(hole), 0, broken), SAFE).all(), "also if no cell is known"


def test_neighbours_draws_from_the_distribution_in_its_docstring():
    """For one cell with only a left neighbour n: p(c | n) ∝ p(c) p(n is left of c | c), computed by hand."""
    codes = torch.tensor([[0, 5]])
    mask = torch.tensor([[False, True]])
    data = statistics()
    p = (data.codes + 1e-3) / (data.codes + 1e-3).sum()
    joint = data.across.to_dense().T[SAFE] + p  # joint[c, n]: n left of c
    expected = p[SAFE] * (joint / joint.sum(1, keepdim=True))[:, 0]
    expected /= expected.sum()
    fill = Neighbours(sweeps=0).rule(data, CODEBOOK)
    drawn = torch.stack([fill(codes, mask, torch.Generator().manual_seed(s))[0, 1] for s in range(1000)])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.04)
