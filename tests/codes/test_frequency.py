"""Counts of codes against counts by hand, in batches and over processes; the choice of E and S."""

import pickle

import numpy as np
import pytest
import torch
from torchmetrics.utilities import dim_zero_cat

from unlearning.codes.frequency import FORGET, RETAIN, CodeCounts, Frequencies, Selection
from unlearning.errors import UserError

K = 6
GRIDS = torch.tensor([[[0, 0, 1], [2, 0, 1]], [[3, 3, 3], [3, 1, 3]], [[0, 5, 5], [0, 5, 5]]])


def counted(*updates, **settings) -> Frequencies:
    return counted_by(CodeCounts(K, **settings), *updates)


def counted_by(counts: CodeCounts, *updates) -> Frequencies:
    for codes, which, *mask in updates:
        counts.update(codes, which, *mask)
    return Frequencies(**counts.compute())


def test_codes_images_and_pairs_are_counted_as_by_hand():
    frequencies = counted((GRIDS, FORGET), (GRIDS[:1], RETAIN), pairs=True)
    assert frequencies.codes[FORGET].tolist() == [5, 3, 1, 5, 0, 4]
    assert frequencies.codes[RETAIN].tolist() == [3, 2, 1, 0, 0, 0]
    assert frequencies.images == [3, 1]
    across, down = (p.to_dense() for p in frequencies.pairs)
    assert across.nonzero().tolist() == [[0, 0], [0, 1], [2, 0]] and across[0, 1] == 2
    assert {(a, b): int(down[a, b]) for a, b in down.nonzero().tolist()} == {(0, 0): 1, (0, 2): 1, (1, 1): 1}
    assert frequencies.top_pairs == [2, 2], "3 right of 3, and 1 right of 0"


def test_only_cells_inside_the_mask_count():
    mask = torch.zeros_like(GRIDS, dtype=torch.bool)
    mask[0, 0, :2] = True
    frequencies = counted((GRIDS, FORGET, mask), pairs=True)
    assert frequencies.codes[FORGET].tolist() == [2, 0, 0, 0, 0, 0]
    assert frequencies.images[FORGET] == 1, "an image without a counted cell is not counted"
    assert frequencies.top_pairs[FORGET] == 1


def test_counts_do_not_depend_on_batches_or_processes():
    whole = counted((GRIDS, FORGET), (GRIDS, RETAIN), pairs=True, blocks=4)
    parts = [CodeCounts(K, pairs=True, blocks=4) for _ in range(2)]
    for i, grid in enumerate(GRIDS):
        for which in (FORGET, RETAIN):
            parts[i % 2].update(grid[None], which)
    parts[0].merge_state(pickle.loads(pickle.dumps(parts[1])))
    again = Frequencies(**parts[0].compute())
    assert torch.equal(again.codes, whole.codes) and again.images == whole.images
    assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(again.pairs, whole.pairs, strict=True))
    torch.testing.assert_close(again.units, whole.units)


def test_processes_merge_their_blocks():
    """As torchmetrics gathers the states of two processes that have counted the same."""
    one, two = CodeCounts(K, blocks=7), CodeCounts(K, blocks=7)
    two.dist_sync_fn, two.distributed_available_fn = lambda state, group: [state, state], lambda: True
    grid = torch.randint(K, (1, 4, 4))
    own, both = (counted_by(counts, (grid, RETAIN)) for counts in (one, two))
    assert torch.equal(both.codes, 2 * own.codes)
    assert len(own.blocks) == 4 and len(both.blocks) == 7
    assert {tuple(b) for b in both.blocks.flatten(1).tolist()} == {tuple(b) for b in own.blocks.flatten(1).tolist()}


def test_memory_does_not_grow_with_the_number_of_images():
    counts = CodeCounts(K, pairs=True, blocks=10)
    sizes = []
    for _ in range(3):
        for _ in range(20):
            counts.update(torch.randint(K, (8, 5, 5)), RETAIN)
        sizes.append(sum(dim_zero_cat(getattr(counts, name)).numel() for name in counts._defaults))
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_sample_of_blocks_is_uniform():
    """The blocks come from early and from late grids alike; each of the 400 grids has a code of its own."""
    torch.manual_seed(0)
    counts = CodeCounts(400, blocks=2000)
    for first in range(0, 400, 50):
        grids = torch.arange(first, first + 50)[:, None, None].expand(50, 8, 8)
        counts.update(grids, RETAIN)
    kept = Frequencies(**counts.compute()).blocks
    assert kept.shape == (2000, 3, 3) and (kept == kept[:, :1, :1]).all(), "blocks stay whole"
    halves = (kept[:, 0, 0] < 200).double().mean()
    assert abs(halves - 0.5) < 0.05


def test_statistics_are_those_of_the_definition():
    frequencies = counted((GRIDS, FORGET), pairs=True)
    statistics = frequencies.statistics(FORGET)
    p = np.array([5, 3, 1, 5, 4]) / 18
    assert statistics["unique"] == 5 and statistics["codes"] == 18 and statistics["images"] == 3
    assert statistics["entropy, bits"] == pytest.approx(-(p * np.log2(p)).sum())
    assert statistics["entropy, % of the maximum"] == pytest.approx(100 * -(p * np.log2(p)).sum() / np.log2(K))
    assert statistics["most frequent, %"] == pytest.approx(100 * 5 / 18)
    h = np.array([np.bincount(g.flatten(), minlength=K) for g in GRIDS], float)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    mean = np.mean([h[i] @ h[j] for i in range(3) for j in range(3) if i != j])
    assert statistics["cosine of two images' histograms"] == pytest.approx(mean)


def test_ratio_and_log_odds():
    frequencies = counted((GRIDS, FORGET), (GRIDS[:1], RETAIN))
    ratio = frequencies.ratio()
    assert ratio[0] == pytest.approx(5 / 3) and ratio[3] == pytest.approx(5e8, rel=1e-6) and ratio[4] == 1
    odds = frequencies.log_odds()
    assert odds[0] == pytest.approx(np.log(5.5 / 21) - np.log(3.5 / 9))
    more = counted((GRIDS, FORGET), *[(GRIDS[:1], RETAIN)] * 1000).log_odds()
    assert abs(more[1] - np.log((3 / 18) / (2 / 6))) < 0.2, "the sizes of the sets do not matter"


def test_selection_of_e_and_s():
    frequencies = counted((GRIDS, FORGET), (GRIDS[:1].repeat(10, 1, 1), RETAIN))
    explicit, safe = Selection(top=2, min_freq=10)(frequencies)
    assert explicit.tolist() == [3, 5] and safe.tolist() == [0, 1, 2]
    explicit, safe = Selection(top=None, threshold=1e6, min_freq=15)(frequencies)
    assert explicit.tolist() == [3, 5] and safe.tolist() == [0, 1]
    explicit, safe = Selection(score="log_odds", top=5, min_freq=1)(frequencies)
    assert not set(explicit.tolist()) & set(safe.tolist())


@pytest.mark.parametrize("settings, key", [
    ({"top": None, "threshold": 1e12}, "method.selection.threshold"),
    ({"min_freq": 10_000}, "method.selection.min_freq"),
    ({"top": 6}, "method.selection.top"),
    ({"score": "odds"}, "log_odds"),
    ({"top": None}, "method.selection.top"),
])  # fmt: skip
def test_an_empty_e_or_s_names_the_setting_to_change(settings, key):
    with pytest.raises(UserError, match=key):
        Selection(**{"min_freq": 1, **settings})(counted((GRIDS, FORGET), (GRIDS, RETAIN)))
