"""Compares the ranking of methods in finished runs with published leaderboards."""

import pytest

from experiments.behaviour import agreement

METRIC = "efficacy/acc_e"
PUBLISHED = agreement.published(agreement.BOARDS[0], METRIC)  # of each method, over MACE's and UnGuide's objects
METHODS = sorted(PUBLISHED, key=PUBLISHED.__getitem__)


@pytest.fixture
def line(finished, tmp_path, capsys):
    """line({method: accuracy}, ...) -> the cells of METRIC's line, for runs with these numbers."""

    def make(*numbers, model="emoji_unet"):
        for seed, of_seed in enumerate(numbers):
            for method, value in of_seed.items():
                finished(f"runs/{method}{seed}", {METRIC: value}, method=method, seed=seed, model=model)
        agreement.main(tmp_path / "runs", "emoji_unet")
        lines = (row for row in capsys.readouterr().out.splitlines() if agreement.BOARDS[0].name in row)
        return [cell.strip() for cell in next(row for row in lines if METRIC in row).strip("|").split("|")]

    return make


def test_methods_in_the_published_order_agree_wholly_whatever_their_numbers(line):
    *_, count, rho, interval, farthest = line({method: 2.0**i for i, method in enumerate(METHODS)})
    assert (count, rho, interval, farthest) == (str(len(METHODS)), "1.00", "1.00 to 1.00", "")


def test_methods_in_the_opposite_order_disagree_and_the_farthest_are_named(line):
    *_, rho, _, farthest = line({method: -float(i) for i, method in enumerate(METHODS)})
    assert rho == "-1.00" and METHODS[0] in farthest and METHODS[-1] in farthest


def test_a_methods_number_is_its_mean_over_seeds(line):
    first = {method: float(i) for i, method in enumerate(METHODS)}
    second = {method: 100.0 - 3 * i for i, method in enumerate(METHODS)}  # which decides the order of the means
    assert line(first, second)[4] == "-1.00"


def test_fewer_than_four_methods_give_no_correlation(line):
    numbers = {method: float(i) for i, method in enumerate(METHODS[:3])}
    *_, count, rho, interval, _ = line(numbers | {"a_method_of_no_board": 1.0})
    assert (count, rho, interval) == ("3", "", "")
