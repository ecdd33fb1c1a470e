"""FID against its closed form, against clean-fid's own number, and clean-fid's Inception on a network of ours."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.fid import fid_from_feats, get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torch import nn

from unlearning.concepts import ERASE, RETAIN, SYNONYM, Concept, UnlearningTask, UserError
from unlearning.evaluators.fid import FID, Inception
from unlearning.images import Row


class Means:
    """Each quadrant's mean colour: twelve features of a picture."""

    name = "means of quadrants"

    def __call__(self, images):
        return nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), images.shape[1] // 2).flatten(1)


def noise(count, seed, high=200):
    return np.random.default_rng(seed).integers(0, high, (count, 8, 8, 3), dtype=np.uint8)


def task(**references):
    """References by role; asked for more than there are, they give all."""
    return UnlearningTask((Concept("cat"),), references={r: lambda n, x=x: x[:n] for r, x in references.items()})


def rows(*roles):
    return [Row(Path("x.png"), "a prompt", role, {}, 0) for role in roles]


def distances(real, generated, role=RETAIN, batch=7):
    metric = FID(Means(), device="cpu")
    metric.prepare(task(**{role: real}))
    for i in range(0, len(generated), batch):
        part = generated[i : i + batch]
        metric.update(part, rows(*[role] * len(part)))
    return metric.compute()


def test_a_set_is_at_no_distance_from_itself():
    assert distances(noise(40, 0), noise(40, 0))["fidelity/fid"] == pytest.approx(0, abs=1e-3)


def test_a_shift_costs_its_square():
    real = noise(40, 0)
    assert distances(real, real + np.uint8(3))["fidelity/fid"] == pytest.approx(12 * 3**2, abs=1e-3)


def test_a_scaling_of_deviations_costs_their_variance():
    real = noise(60, 0, high=100)
    features = Means()(torch.as_tensor(real)).double().numpy()
    expected = np.sum(features.mean(0) ** 2) + np.trace(np.cov(features, rowvar=False))  # of C and 4C: Tr C
    assert distances(real, 2 * real)["fidelity/fid"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_number_is_clean_fids():
    real, generated = noise(150, 0), noise(33, 1, high=255)
    features = [Means()(torch.as_tensor(x)).numpy() for x in (generated, real)]
    assert distances(real, generated)["fidelity/fid"] == pytest.approx(fid_from_feats(*features), rel=1e-5)


def test_each_role_is_held_against_its_own_references():
    metric = FID(Means(), count=20, device="cpu")
    metric.prepare(task(retain=noise(50, 0), erase=noise(50, 0) + np.uint8(50)))
    images = noise(20, 0)
    metric.update(np.repeat(images, 3, 0), rows(*[RETAIN, ERASE, SYNONYM] * 20))
    numbers = metric.compute()
    assert numbers["fidelity/fid"] == pytest.approx(0, abs=1e-3)
    assert numbers["fidelity/fid_e"] == pytest.approx(12 * 50**2, rel=1e-6)
    pictures = r"on means of quadrants; pictures: retain 20 to 20 real \((\w{8})\), erase 20 to 20 real \((\w{8})\)"
    named = re.search(pictures, metric.protocol)
    assert named and named[1] != named[2], "real pictures are told by their content"
    assert set(numbers) == set(FID.higher_is_better)


def test_fewer_than_two_pictures_have_no_distance():
    assert distances(noise(5, 0), noise(1, 1)) == {}
    assert distances(noise(1, 0), noise(5, 1)) == {}
    metric = FID(Means(), device="cpu")
    metric.prepare(task())
    metric.update(noise(5, 0), rows(*[RETAIN] * 5))
    assert metric.compute() == {}


def test_processes_that_saw_a_part_each_agree_with_one_that_saw_all():
    real, generated = noise(30, 0), noise(30, 1)
    parts = [FID(Means(), device="cpu") for _ in range(2)]
    for part, images in zip(parts, (generated[:4], generated[4:]), strict=True):
        part.prepare(task(retain=real))
        part.update(images, rows(*[RETAIN] * len(images)))
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == pytest.approx(distances(real, generated))


def test_references_outlive_a_reset():
    metric = FID(Means(), device="cpu")
    metric.prepare(task(retain=noise(30, 0)))
    metric.update(noise(30, 1), rows(*[RETAIN] * 30))
    first = metric.compute()
    metric.reset()
    metric.update(noise(30, 1), rows(*[RETAIN] * 30))
    assert metric.compute() == first


def test_unknown_role_is_refused():
    with pytest.raises(UserError, match="retain"):
        FID(Means(), roles=["retian"])


class FakeInception(nn.Module):
    """A network of the shape clean-fid expects of its file: pictures (B, 3, 299, 299) to 2048 features in `layers`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.AdaptiveAvgPool2d(16), nn.Flatten())

    def forward(self, x):
        return self.layers(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit")
def test_inception_runs_as_in_clean_fid(tmp_path):
    torch.manual_seed(0)
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i}.png")
    network = InceptionV3W(str(tmp_path), download=False)
    expected = get_folder_features(
        str(tmp_path / "pictures"), network, num_workers=0, device=torch.device("cpu"), verbose=False
    )
    for path in (tmp_path, tmp_path / "inception-2015-12-05.pt"):
        features = Inception(path)(torch.as_tensor(images))
        assert features.shape == (2, 2048)
        assert np.allclose(features, expected, atol=1e-5)
    assert "clean" in Inception(tmp_path).name


def test_absent_inception_says_which_file_from_where(tmp_path):
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt.*https://.*judge\.features\.path"):
        Inception(tmp_path)
