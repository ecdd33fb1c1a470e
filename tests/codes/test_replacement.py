"""What each replacement puts where, and that it touches nothing else."""

import pytest
import torch

from unlearning.codes.replacement import Blocks, Constant, Counted, Nearest, Neighbours, Uniform
from unlearning.errors import UserError

K, SAFE, EXPLICIT = 8, torch.tensor([0, 1, 2, 3]), torch.tensor([6, 7])
CODES = torch.randint(4, 8, (6, 6), generator=torch.Generator().manual_seed(0))
WHERE = torch.zeros(6, 6, dtype=torch.bool)
WHERE[1:5, 2:5] = True
CODEBOOK = torch.tensor([[0.0], [1], [2], [3], [10], [11], [0.9], [2.2]])


def known() -> Counted:
    """Stripes are safe: 0 beside 1 beside 0, and each code below itself; 2 and 3 hardly occur."""
    across, down = torch.zeros(K, K), torch.zeros(K, K)
    across[0, 1] = across[1, 0] = 100
    down[0, 0] = down[1, 1] = 100
    codes = torch.tensor([100, 100, 1, 1, 5, 5, 5, 5])
    blocks = torch.stack([torch.full((3, 3), 0), torch.arange(9).view(3, 3) % 4])
    return Counted(EXPLICIT, SAFE, codes, across.to_sparse(), down.to_sparse(), blocks)


def filled(replacement, where=WHERE, seed=0, codes=CODES):
    return replacement.prepared(known(), CODEBOOK)(codes, where, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("replacement", [Constant(2), Uniform(), Nearest(), Blocks(), Neighbours()])
def test_nothing_outside_changes_and_chance_is_the_seeds(replacement):
    before = CODES.clone()
    after = filled(replacement)
    assert torch.equal(after[~WHERE], CODES[~WHERE]) and torch.equal(CODES, before)
    assert torch.equal(after, filled(replacement)), "the same seed, the same codes"
    assert torch.equal(filled(replacement, torch.zeros_like(WHERE)), CODES)
    if isinstance(replacement, Uniform | Blocks):
        assert not torch.equal(after, filled(replacement, seed=1))
    if not isinstance(replacement, Nearest):
        assert torch.isin(after[WHERE], SAFE).all()


def test_constant_and_its_error():
    assert (filled(Constant(3))[WHERE] == 3).all()
    with pytest.raises(UserError, match="There is no code 8"):
        filled(Constant(8))


def test_uniform_draws_every_safe_code_alike():
    drawn = torch.cat([filled(Uniform(), seed=s)[WHERE] for s in range(300)])
    shares = torch.bincount(drawn, minlength=K)[SAFE] / len(drawn)
    assert (shares - 0.25).abs().max() < 0.03


def test_nearest_moves_codes_of_e_alone_to_their_neighbour_in_the_codebook():
    after = filled(Nearest(), torch.ones_like(WHERE))
    assert torch.equal(after[CODES == 6], torch.ones_like(after[CODES == 6])), "0.9 lies nearest 1"
    assert (after[CODES == 7] == 2).all(), "2.2 nearest 2"
    assert torch.equal(after[CODES < 6], CODES[CODES < 6]), "a code that is not of E stays"


def test_blocks_stay_whole():
    after = filled(Blocks(), torch.ones_like(WHERE))
    tiles = after.unfold(0, 3, 3).unfold(1, 3, 3).reshape(-1, 3, 3)
    assert all(any(torch.equal(tile, block) for block in known().blocks) for tile in tiles)


def test_neighbours_go_on_with_what_surrounds_the_place():
    """In a picture of stripes a hole is filled with those stripes, in the same phase."""
    stripes = (torch.arange(12) % 2).repeat(12, 1)
    hole = torch.zeros(12, 12, dtype=torch.bool)
    hole[3:9, 3:9] = True
    broken = stripes.masked_fill(hole, 7)
    right = torch.stack([filled(Neighbours(), hole, s, broken)[hole] == stripes[hole] for s in range(10)])
    assert right.double().mean() > 0.95
    assert torch.isin(filled(Neighbours(), torch.ones_like(hole), 0, broken), SAFE).all(), "with nothing to go on, too"


def test_neighbours_draws_from_the_chain_it_states():
    """Of one place with a left neighbour alone, p(c | n) ∝ p(c) p(n right of which c...) by hand."""
    codes = torch.tensor([[0, 5]])
    where = torch.tensor([[False, True]])
    data = known()
    p = (data.codes + 1e-3) / (data.codes + 1e-3).sum()
    joint = data.across.to_dense().T[SAFE] + p  # joint[c, n]: n left of c
    expected = p[SAFE] * (joint / joint.sum(1, keepdim=True))[:, 0]
    expected /= expected.sum()
    fill = Neighbours(sweeps=0).prepared(data, CODEBOOK)
    drawn = torch.stack([fill(codes, where, torch.Generator().manual_seed(s))[0, 1] for s in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)
