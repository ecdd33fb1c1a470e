"""LPIPS against torchmetrics with an AlexNet of random weights, and with the judge of the embedded models."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torchmetrics.functional.image.lpips import _LPIPS

from tests.composed import config
from unlearning.concepts import ERASE, RETAIN, SYNONYM
from unlearning.data import openmoji
from unlearning.errors import UserError
from unlearning.evaluators.lpips import LPIPS, distance
from unlearning.judges.alexnet import AlexNet
from unlearning.store.manifest import ManifestRow


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return _LPIPS(net="alex", pnet_rand=True)


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    """A file like torchvision's, with the weights that are used."""
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    state = {re.sub(r"^slice\d", "features", name): value for name, value in theirs.net.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(1)}, path)
    return path


@pytest.fixture
def pair(tmp_path):
    """pair(role, image, base) -> an image (1, H, W, 3) and its row, with a base image on disk."""

    def make(role, image, base):
        path = None
        if base is not None:
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
            Image.fromarray(base).save(path)
        return image[None], [ManifestRow(tmp_path / "x.png", "a prompt", role, {}, 0, base=path)]

    return make


def noise(seed, size=72):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_the_number_is_torchmetrics(theirs, weights, pair):
    metric = LPIPS(AlexNet(weights), device="cpu")
    given = [(noise(0), noise(1)), (noise(2), noise(2) // 2), (noise(3), noise(3))]
    for image, base in given:
        metric.update(*pair(RETAIN, image, base))
    a, b = (torch.tensor(np.stack(x)).permute(0, 3, 1, 2) / 255 for x in zip(*given, strict=True))
    with torch.no_grad():
        expected = theirs(a, b, normalize=True).flatten()
    assert expected[:2].min() > 1e-4 and expected[2] == 0
    assert metric.compute() == {"fidelity/lpips": pytest.approx(expected.mean().item(), rel=1e-4)}


class Colours:
    """A network with one layer, the image itself."""

    name = "colours"
    weights = (torch.tensor([1.0, 0.0, 0.5]),)

    def __call__(self, images):
        return [images.permute(0, 3, 1, 2).float()]


def test_the_formula():
    red, blue = (torch.zeros(1, 3, 2, 2) for _ in range(2))
    red[:, 0], blue[:, 2] = 9, 4
    half = torch.cat([red[..., :1], blue[..., :1]], -1)
    assert distance([red], [blue], Colours.weights).item() == pytest.approx(1.5)
    assert distance([red], [half], Colours.weights).item() == pytest.approx(0.75)
    assert distance([red], [3 * red], Colours.weights).item() == pytest.approx(0)
    assert distance([0 * red], [0 * red], Colours.weights).item() == 0


def test_roles_are_separate_and_rows_without_a_base_are_skipped(pair):
    metric = LPIPS(Colours(), device="cpu")
    red, blue = (np.full((4, 4, 3), colour, np.uint8) for colour in ([9, 0, 0], [0, 0, 9]))
    for role, base in ((RETAIN, red), (RETAIN, blue), (ERASE, blue), (SYNONYM, blue), (RETAIN, None), (ERASE, None)):
        metric.update(*pair(role, red, base))
    assert metric.compute() == {"fidelity/lpips": pytest.approx(0.75), "efficacy/lpips_e": pytest.approx(1.5)}
    assert set(metric.compute()) == set(LPIPS.higher_is_better)
    metric.reset()
    metric.update(*pair(ERASE, red, None))
    assert metric.compute() == {}


def test_merged_parts_equal_the_whole(pair):
    metrics = [LPIPS(Colours(), device="cpu") for _ in range(3)]
    for i, metric in enumerate(metrics[:2]):
        for whole in (metric, metrics[2]):
            whole.update(*pair(RETAIN, noise(i, 4), noise(i + 5, 4)))
    metrics[0].merge_state(metrics[1])
    assert metrics[0].compute() == pytest.approx(metrics[2].compute())


def test_for_the_judge_another_object_is_farther_than_another_drawing_of_it(tmp_path, pair):
    metric = instantiate(config(tmp_path, "evaluator=lpips").evaluator.lpips)

    def far(a, b):
        metric.reset()
        metric.update(*pair(RETAIN, a, b))
        return metric.compute()["fidelity/lpips"]

    rngs = [np.random.default_rng(i) for i in range(12)]
    cats, ships = (
        [openmoji.picture(n, "color", rng).image for rng in rngs[i::2]] for i, n in enumerate(("cat", "ship"))
    )
    same = np.mean([far(a, b) for x in (cats, ships) for a, b in pairwise(x)])
    other = np.mean([far(a, b) for a, b in zip(cats, ships, strict=True)])
    assert far(cats[0], cats[0]) == 0 < same < 0.9 * other
    assert metric.protocol.startswith("LPIPS of emoji judge")


def test_missing_or_foreign_weights_name_the_file_to_get(tmp_path):
    with pytest.raises(
        UserError, match=r"download\.pytorch\.org/models/alexnet-owt-7be5be79\.pth.*judge\.layers\.path"
    ):
        AlexNet(tmp_path / "none.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        AlexNet(tmp_path / "other.pth")


def test_a_run_is_measured_against_its_own_base(unlearn, error_of, tmp_path):
    measured = ["dataset=prompt", "dataset.others=[dog]", "evaluator=lpips", "stages=[fit,generate,evaluate]"]
    run = unlearn(*measured, "method=negative_prompt")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["fidelity/lpips"] > 0 and metrics["efficacy/lpips_e"] > 0
    assert not any(key.startswith("base/") for key in metrics)
    assert "measured nothing: 1" in error_of(*measured, "method=none", run="none")
    untouched = json.loads((tmp_path / "none" / "metrics.json").read_text())
    assert not any("lpips" in key for key in untouched), "nothing was erased, so there is no distance"
