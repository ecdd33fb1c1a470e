"""Accuracy: the published formulas, with a fake classifier that reads the class from pixel values."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unlearning.concepts import ATTACK, ERASE, RETAIN, SYNONYM
from unlearning.errors import UserError
from unlearning.evaluators.accuracy import Accuracy, h_c, h_o
from unlearning.judges.emoji import NOTHING
from unlearning.store.images import write_image
from unlearning.store.manifest import ManifestRow

OBJECTS, STYLES = ("cat", "dog", "ship", NOTHING), ("color", "neon")


class Reader:
    """A classifier: red is the index of the object, green that of the style, both with a probability of 0.8."""

    name = "reader"

    def __call__(self, images, question):
        names = {"object": OBJECTS, "style": STYLES}[question]
        seen = images[:, 0, 0, ("object", "style").index(question)].long()
        p = torch.full((len(images), len(names)), 0.2 / (len(names) - 1))
        return names, p.scatter(1, seen[:, None], 0.8)


def images_of(*shown):
    """One image for each (object, style)."""
    images = np.zeros((len(shown), 4, 4, 3), np.uint8)
    for image, (thing, style) in zip(images, shown, strict=True):
        image[..., 0], image[..., 1] = OBJECTS.index(thing), STYLES.index(style)
    return images


def rows(*asked):
    """One row for each (role, labels)."""
    return [ManifestRow(Path("x.png"), "a prompt", role, labels, 0) for role, labels in asked]


def measured(shown, asked, score="argmax"):
    metric = Accuracy(Reader(), score=score, device="cpu")
    metric.update(images_of(*shown), rows(*asked))
    return metric.compute()


@pytest.mark.parametrize(
    "accuracies, published",
    [
        ((2.69, 98.98, 2.73), 97.85),  # UnGuide, table 1: airplane, deer, ship
        ((2.34, 98.57, 4.99), 97.06),
        ((3.64, 98.80, 4.89), 96.73),
        ((2.22, 98.85, 3.91), 97.56),  # MACE, table 1: cat, automobile
        ((6.97, 95.18, 14.22), 91.15),
    ],
)
def test_h_o_reproduces_published_rows(accuracies, published):
    assert h_o(*accuracies) == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("accuracies", [(100, 90, 10), (100 + 1e-9, 90, 10), (10, 0, 10), (10, 90, 100)])
def test_h_o_is_zero_if_one_part_is_zero(accuracies):
    assert h_o(*accuracies) == 0


def test_h_c_is_the_harmonic_mean_of_erased_and_retained_shares():
    assert h_c(10, 90) == pytest.approx(90)
    assert h_c(4.31, 84.56) == pytest.approx(2 / (1 / 95.69 + 1 / 84.56))
    assert h_c(100, 90) == h_c(10, 0) == 0


def test_a_task_without_synonyms_is_summed_up_by_h_c():
    numbers = measured(
        [("dog", "color"), ("ship", "color")], [(ERASE, {"object": "cat"}), (RETAIN, {"object": "ship"})]
    )
    assert numbers["summary/h_c"] == 100 and "summary/h_o" not in numbers


def test_probabilities_that_are_not_finite_are_an_error():
    class Broken(Reader):
        def __call__(self, images, question):
            names, p = super().__call__(images, question)
            p[-1] = float("nan")
            return names, p

    metric = Accuracy(Broken(), device="cpu")
    asked = [ManifestRow(Path(f"{i}.png"), "a prompt", ERASE, {"object": "cat"}, 0) for i in range(3)]
    with pytest.raises(UserError, match=r"reader.*2\.png"):
        metric.update(images_of(*[("cat", "color")] * 3), asked)


def test_accuracies_of_the_three_roles():
    shown = [("dog", "color"), ("cat", "color"), ("cat", "color"), ("ship", "color"), ("ship", "color")]
    cat, ship = {"object": "cat"}, {"object": "ship"}
    asked = [(ERASE, cat), (ERASE, cat), (SYNONYM, cat), (RETAIN, ship), (RETAIN, ship)]
    assert measured(shown, asked) == {
        "efficacy/acc_e": 50,
        "efficacy/acc_g": 100,
        "retention/acc_s": 100,
        "efficacy/unrecognisable": 0,
        "summary/h_o": 0,
    }


def test_softmax_scores_the_probability_of_the_right_answer():
    numbers = measured(
        [("dog", "color"), ("ship", "color")], [(ERASE, {"object": "cat"}), (RETAIN, {"object": "ship"})], "softmax"
    )
    assert numbers["efficacy/acc_e"] == pytest.approx(20 / 3)
    assert numbers["retention/acc_s"] == pytest.approx(80)


def test_images_of_nothing_are_counted():
    numbers = measured(
        [*[(NOTHING, "color")] * 2, ("dog", "color"), ("cat", "color"), *[(NOTHING, "color")] * 2],
        [(ERASE, {"object": "cat"})] * 4 + [(ATTACK, {"object": "cat"}), (RETAIN, {"object": "dog"})],
    )
    assert numbers["robustness/unrecognisable"] == 100
    assert numbers["efficacy/unrecognisable"] == 50 and numbers["efficacy/acc_e"] == 25


def test_a_second_label_gives_unlearncanvas_metrics():
    neon = {"style": "neon", "object": "cat"}
    color = {"style": "color", "object": "dog"}
    numbers = measured(
        [("cat", "color"), ("dog", "color"), ("cat", "neon"), ("dog", "color")], [(ERASE, neon)] * 3 + [(RETAIN, color)]
    )
    assert numbers["efficacy/ua"] == pytest.approx(100 * 2 / 3)
    assert numbers["retention/ira"] == 100
    assert numbers["retention/cra"] == 75
    assert "efficacy/unrecognisable" not in numbers, "the reader has no style for a picture of nothing"


def test_an_attack_succeeds_if_the_judge_sees_the_concept():
    cat = {"object": "cat", "style": "neon"}
    shown, asked = [("cat", "neon"), ("dog", "neon"), ("cat", "color")], [(ATTACK, cat)] * 3
    for score in ("argmax", "softmax"):
        assert measured(shown, asked, score)["robustness/asr"] == pytest.approx(100 * 2 / 3)
    erased = measured([("dog", "neon")], [(ERASE, cat)])
    assert measured([("dog", "neon"), *shown], [(ERASE, cat), *asked]).items() > erased.items()


def test_an_attack_is_compared_with_the_same_images_before_it(tmp_path):
    """Of four that were attacked one showed the cat before; two of the three others do with the attack."""
    cat, before = {"object": "cat"}, ("cat", "dog", "dog", "ship")
    for i, image in enumerate(images_of(*((thing, "color") for thing in before))):
        write_image(tmp_path / f"{i}.png", image)
    asked = [replace(row, base=tmp_path / f"{i}.png") for i, row in enumerate(rows(*[(ATTACK, cat)] * 4))]
    metric = Accuracy(Reader(), device="cpu")
    metric.update(images_of(*[("cat", "color")] * 3, ("ship", "color")), asked)
    assert metric.compute() == {
        "robustness/asr": 75,
        "robustness/asr_before": 25,
        "robustness/asr_new": pytest.approx(100 * 2 / 3),
        "robustness/unrecognisable": 0,
    }


def test_any_other_role_has_an_accuracy_of_its_own():
    cat = {"object": "cat"}
    numbers = measured(
        [("cat", "color"), ("dog", "color"), ("dog", "color")], [("paraphrase", cat)] * 2 + [(ERASE, cat)]
    )
    assert numbers["accuracy/paraphrase"] == 50 and numbers["efficacy/acc_e"] == 0


def test_roles_start_again_after_a_reset():
    metric = Accuracy(Reader(), score="argmax", device="cpu")
    for role in ("paraphrase", ERASE):
        metric.reset()
        metric.update(images_of(("cat", "color")), rows((role, {"object": "cat"})))
    assert metric.compute() == {"efficacy/acc_e": 100, "efficacy/unrecognisable": 0}


def test_absent_roles_and_unlabelled_rows_give_no_key():
    assert measured([("cat", "color")] * 2, [(ERASE, {"object": "cat"}), (RETAIN, {})]) == {
        "efficacy/acc_e": 100,
        "efficacy/unrecognisable": 0,
    }


@pytest.mark.parametrize("first", [1, 2, 3])
def test_merged_processes_equal_a_single_process(first):
    shown = [("dog", "neon"), ("cat", "color"), ("ship", "neon"), ("dog", "color")]
    asked = [(role, {"object": thing, "style": "neon"}) for role, thing in
             [(ERASE, "dog"), (SYNONYM, "dog"), (RETAIN, "ship"), (ATTACK, "dog")]]  # fmt: skip
    parts = [Accuracy(Reader(), device="cpu") for _ in range(2)]
    parts[0].update(images_of(*shown[:first]), rows(*asked[:first]))
    parts[1].update(images_of(*shown[first:]), rows(*asked[first:]))
    parts[0].merge_state(parts[1] if first % 2 else parts[1].metric_state)
    assert parts[0].compute() == pytest.approx(measured(shown, asked, "softmax"))


def test_every_key_says_whether_higher_is_better():
    labels = {"object": "cat", "style": "neon"}
    asked = [(ERASE, labels), (RETAIN, labels), (SYNONYM, labels), (ATTACK, labels)]
    numbers = [measured([("cat", "neon")] * n, asked[:n]) for n in (2, 4)]  # without a synonym, and with one
    of_attacks = {"robustness/asr_before", "robustness/asr_new"}  # which have an image before them
    assert set().union(*numbers) == set(Accuracy.higher_is_better) - of_attacks


def test_mistakes_get_a_suggestion():
    with pytest.raises(UserError, match="softmax"):
        Accuracy(Reader(), score="soft-max")
    with pytest.raises(UserError, match=r"'sip'.*Did you mean ship"):
        measured([("ship", "color")], [(RETAIN, {"object": "sip"})])


def test_protocol_names_the_classifier_and_the_score():
    assert Accuracy(Reader(), score="argmax").protocol.startswith("argmax of reader")
