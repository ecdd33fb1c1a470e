"""The probe learns, and its closed forms for changed codes agree with evaluating changed grids."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from unlearning.codes import probe

K = 12
TRAINER = partial(pl.Trainer, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False)  # fmt: skip


@pytest.fixture(scope="module")
def tested() -> probe.TrainedProbe:
    """A probe of grids in which code 3 is more frequent in images of the concept."""
    generator = torch.Generator().manual_seed(0)
    retain = torch.randint(K, (300, 4, 4), generator=generator)
    forget = torch.randint(K, (200, 4, 4), generator=generator)
    forget[torch.rand(forget.shape, generator=generator) < 0.4] = 3
    return probe.train_probe(forget, retain, K, TRAINER, lr=1e-2, width=8, epochs=15)


def test_it_learns(tested):
    assert tested.auc > 0.9 and tested.accuracy > 0.8 and 0 < tested.f1 <= 1
    assert len(tested.codes) == 75


def test_influence_is_the_effect_of_changing_the_codes(tested):
    codes = tested.codes[:10]
    influence = probe.influence(tested.probe, codes, token=1)
    with torch.no_grad():
        p = tested.probe(codes).sigmoid()
        by_hand = [(tested.probe(codes.masked_fill(codes == k, 1)).sigmoid() - p).abs().mean() for k in range(K)]
    torch.testing.assert_close(influence, torch.stack(by_hand), atol=1e-5, rtol=1e-4)
    assert influence.argmax() == 3 and influence[1] == 0


def test_the_greedy_combination_starts_with_the_best_code_and_has_the_effect_it_states(tested):
    codes = tested.codes[:10]
    chosen, effects = probe.greedy_combination(tested.probe, codes, 4)
    single = probe.influence(tested.probe, codes)
    assert chosen[0] == single.argmax() and effects[0] == pytest.approx(single.max().item(), rel=1e-4)
    assert len(set(chosen)) == 4
    with torch.no_grad():
        changed = codes.masked_fill(torch.isin(codes, torch.tensor(chosen)), 0)
        by_hand = (tested.probe(changed).sigmoid() - tested.probe(codes).sigmoid()).abs().mean().item()
    assert effects[-1] == pytest.approx(by_hand, rel=1e-3)


def test_greedy_flips_raise_p_and_change_one_cell_each(tested):
    grid = tested.codes[tested.labels == 0][0]
    after, path = probe.greedy_flips(tested.probe, grid, 5)
    assert path == sorted(path) and path[-1] > path[0]
    assert (after != grid).sum() == 5
    with torch.no_grad():
        every = torch.stack([grid] * (16 * K)).flatten(1)
        every[torch.arange(16 * K), torch.arange(16).repeat_interleave(K)] = torch.arange(K).repeat(16)
        best = tested.probe(every.view(-1, 4, 4)).sigmoid().max().item()
    assert path[1] == pytest.approx(best, rel=1e-4), "the first change is the best of all"
