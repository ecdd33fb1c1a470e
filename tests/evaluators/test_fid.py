"""FID against its closed form and against clean-fid; clean-fid's Inception with a fake network."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.fid import fid_from_feats, get_folder_features, kernel_distance
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torch import nn

from unlearning.concepts import ERASE, RETAIN, SYNONYM, Concept, UnlearningTask
from unlearning.data.references import of_folder
from unlearning.errors import UserError
from unlearning.evaluators.fid import FID, main
from unlearning.evaluators.kid import KID
from unlearning.judges.inception import Inception
from unlearning.store.manifest import ManifestRow


class Means:
    """The mean colour of each quadrant: twelve features."""

    name = "means of quadrants"

    def __call__(self, images):
        return nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), images.shape[1] // 2).flatten(1)


def noise(count, seed, high=200):
    return np.random.default_rng(seed).integers(0, high, (count, 8, 8, 3), dtype=np.uint8)


def task(**references):
    """A task with these references by role."""
    return UnlearningTask((Concept("cat"),), references={r: lambda n, x=x: x[:n] for r, x in references.items()})


def rows(*roles):
    return [ManifestRow(Path("x.png"), "a prompt", role, {}, 0) for role in roles]


def distances(real, generated, role=RETAIN, batch=7):
    metric = FID(Means(), device="cpu")
    metric.prepare(task(**{role: real}))
    for i in range(0, len(generated), batch):
        part = generated[i : i + batch]
        metric.update(part, rows(*[role] * len(part)))
    return metric.compute()


def test_the_distance_of_a_set_to_itself_is_zero():
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


def test_each_role_is_measured_against_its_own_references():
    metric = FID(Means(), count=20, device="cpu")
    metric.prepare(task(retain=noise(50, 0), erase=noise(50, 0) + np.uint8(50)))
    images = noise(20, 0)
    metric.update(np.repeat(images, 3, 0), rows(*[RETAIN, ERASE, SYNONYM] * 20))
    numbers = metric.compute()
    assert numbers["fidelity/fid"] == pytest.approx(0, abs=1e-3)
    assert numbers["fidelity/fid_e"] == pytest.approx(12 * 50**2, rel=1e-6)
    pictures = r"on means of quadrants; images: retain 20 to 20 real \((\w{8})\), erase 20 to 20 real \((\w{8})\)"
    named = re.search(pictures, metric.protocol)
    assert named and named[1] != named[2], "the name of real images depends on their content"
    assert set(numbers) == set(FID.higher_is_better)


def test_fewer_than_two_images_have_no_distance():
    assert distances(noise(5, 0), noise(1, 1)) == {}
    assert distances(noise(1, 0), noise(5, 1)) == {}
    metric = FID(Means(), device="cpu")
    metric.prepare(task())
    metric.update(noise(5, 0), rows(*[RETAIN] * 5))
    assert metric.compute() == {}


def test_merged_parts_equal_the_whole():
    real, generated = noise(30, 0), noise(30, 1)
    parts = [FID(Means(), device="cpu") for _ in range(2)]
    for part, images in zip(parts, (generated[:4], generated[4:]), strict=True):
        part.prepare(task(retain=real))
        part.update(images, rows(*[RETAIN] * len(images)))
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == pytest.approx(distances(real, generated))


def test_a_reset_keeps_the_references():
    metric = FID(Means(), device="cpu")
    metric.prepare(task(retain=noise(30, 0)))
    metric.update(noise(30, 1), rows(*[RETAIN] * 30))
    first = metric.compute()
    metric.reset()
    metric.update(noise(30, 1), rows(*[RETAIN] * 30))
    assert metric.compute() == first


@pytest.fixture
def folder(tmp_path):
    """Real images of two sizes, some in a subfolder."""
    (tmp_path / "real" / "more").mkdir(parents=True)
    for i, image in enumerate(noise(30, 0)):
        image = np.kron(image, np.ones((2, 2, 1), np.uint8)) if i % 3 == 0 else image
        Image.fromarray(image).save(tmp_path / "real" / ("more" if i % 2 else "") / f"{i}.png")
    return tmp_path / "real"


def against(real, metric=FID, **settings):
    evaluator = metric(Means(), real=real, device="cpu", **settings)
    evaluator.prepare(task(retain=noise(9, 5), erase=noise(9, 6)))
    evaluator.update(noise(25, 1), rows(*[RETAIN] * 25))
    return evaluator, evaluator.compute()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_number_for_a_folder_of_real_images_is_clean_fids(folder):
    metric, numbers = against(folder)
    real = [np.asarray(Image.open(path)) for path in folder.rglob("*.png")]
    real = np.concatenate([Means()(torch.tensor(image[None])).numpy() for image in real])
    expected = fid_from_feats(real, Means()(torch.as_tensor(noise(25, 1))).numpy())
    assert numbers == {"fidelity/fid": pytest.approx(expected, rel=1e-5)}
    named = re.search(r"retain 25 to 30 real of real \((\w{8})\), erase 0 to 9 real", metric.protocol)
    Image.fromarray(noise(1, 9)[0]).save(folder / "0.png")
    assert named and named[1] not in against(folder)[0].protocol, "the name depends on the content"


def test_statistics_replace_their_images(folder, tmp_path):
    real = np.concatenate([Means()(torch.tensor(np.asarray(Image.open(p))[None])) for p in folder.rglob("*.png")])
    np.savez(tmp_path / "coco.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    metric, numbers = against(tmp_path / "coco.npz")
    assert numbers == pytest.approx(against(folder)[1], rel=1e-4)
    assert re.search(r"retain 25 to coco\.npz \(\w{8}\) by an extractor that it does not name, erase", metric.protocol)


def test_unusable_references_are_errors(tmp_path):
    with pytest.raises(UserError, match="absent"):
        FID(Means(), real=tmp_path / "absent", device="cpu")
    with pytest.raises(UserError, match="absent"):
        KID(Means(), real=tmp_path / "absent", device="cpu")
    with pytest.raises(UserError, match="holds no images"):
        against(tmp_path)
    (tmp_path / "0.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"0\.png cannot be read"):
        against(tmp_path)
    np.savez(tmp_path / "of_3.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"3 features.* 12"):
        FID(Means(), real=tmp_path / "of_3.npz", device="cpu")
    np.savez(tmp_path / "of_another.npz", mu=np.zeros(12), sigma=np.eye(12), extractor="inception")
    with pytest.raises(UserError, match="of inception, but the run uses means of quadrants"):
        FID(Means(), real=tmp_path / "of_another.npz", device="cpu")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    (tmp_path / "broken.npz").write_bytes(b"none")
    for name in ("other.npz", "broken.npz"):
        with pytest.raises(UserError, match=name):
            FID(Means(), real=tmp_path / name, device="cpu")  # before anything is generated
    FID(Means(), real=tmp_path / "broken.npz", roles=[ERASE], device="cpu")  # which does not need it


def test_kid_is_clean_fids_and_the_same_each_time(folder):
    metric, numbers = against(folder, KID, subsets=20, subset_size=15)
    real = np.concatenate([Means()(torch.as_tensor(batch)).double() for batch in of_folder(folder).batches()])
    state = np.random.get_state()[1].copy()
    assert against(folder, KID, subsets=20, subset_size=15)[1] == numbers
    assert (np.random.get_state()[1] == state).all(), "numpy's global generator is restored"
    np.random.seed(0)
    expected = kernel_distance(real, Means()(torch.as_tensor(noise(25, 1))).double().numpy(), 20, 15)
    assert numbers == {"fidelity/kid": expected}
    assert re.search(r"20 subsets of at most 15; retained images to 30 real of real \(\w{8}\)", metric.protocol)
    np.random.set_state(np.random.RandomState().get_state())


def test_kid_of_merged_parts_and_without_references():
    parts = [KID(Means(), device="cpu", subsets=5) for _ in range(2)]
    for part, images in zip(parts, (noise(4, 1), noise(6, 2)), strict=True):
        part.prepare(task(retain=noise(20, 0)))
        part.update(images, rows(*[RETAIN] * (len(images) - 1), ERASE))
    parts[0].merge_state(parts[1])
    assert len(torch.cat(list(parts[0].generated))) == 8 and "fidelity/kid" in parts[0].compute()
    alone = KID(Means(), device="cpu")
    alone.prepare(task())
    alone.update(noise(4, 1), rows(*[RETAIN] * 4))
    assert alone.compute() == {}


def test_a_nan_distance_stays_nan(monkeypatch):
    monkeypatch.setattr("unlearning.evaluators.fid.frechet_distance", lambda *_: float("nan"))
    assert np.isnan(distances(noise(5, 0), noise(5, 1))["fidelity/fid"])


def test_an_unknown_role_is_refused():
    with pytest.raises(UserError, match="retain"):
        FID(Means(), roles=["retian"])


class FakeInception(nn.Module):
    """A network as clean-fid expects it in its file: images (B, 3, 299, 299) to 2048 features in `layers`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.AdaptiveAvgPool2d(16), nn.Flatten())

    def forward(self, x, return_features: bool = False):
        return self.layers(nn.functional.interpolate((x - 128) / 128, size=(299, 299), mode="bilinear"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_inception_runs_as_in_clean_fid(tmp_path, mode):
    torch.manual_seed(0)
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    network = InceptionV3W(str(tmp_path), download=False, resize_inside=mode == "legacy_tensorflow")
    expected = get_folder_features(
        str(tmp_path / "images"), network, num_workers=0, device=torch.device("cpu"), verbose=False, mode=mode
    )
    for path in (tmp_path, tmp_path / "inception-2015-12-05.pt"):
        features = Inception(path, mode)(torch.as_tensor(images))
        assert features.shape == (2, 2048)
        assert np.allclose(features, expected, atol=1e-5)
    assert mode in Inception(tmp_path, mode).name


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_command_writes_statistics_that_an_fid_reads(tmp_path, folder, monkeypatch):
    torch.manual_seed(0)
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    words = [folder, tmp_path / "real.npz", "--inception", tmp_path, "--mode", "legacy_tensorflow"]
    monkeypatch.setattr(sys, "argv", ["fid", *map(str, words)])
    main()
    features = Inception(tmp_path, "legacy_tensorflow")
    real = torch.cat([features(torch.as_tensor(batch)) for batch in of_folder(folder).batches()]).double()
    written = np.load(tmp_path / "real.npz")
    assert np.allclose(written["mu"], real.mean(0)) and np.allclose(written["sigma"], np.cov(real, rowvar=False))
    metric = FID(features, roles=[RETAIN], real=tmp_path / "real.npz")
    metric.prepare(task())
    assert re.search(r"retain 0 to real\.npz \(\w{8}\)$", metric.protocol)
    with pytest.raises(UserError, match=r"mode legacy_tensorflow.*mode clean"):
        FID(Inception(tmp_path), roles=[RETAIN], real=tmp_path / "real.npz").prepare(task())
    monkeypatch.setattr(sys, "argv", ["fid", str(tmp_path / "absent"), "x.npz", "--inception", str(tmp_path)])
    with pytest.raises(SystemExit, match="absent"):
        main()


def test_an_unknown_mode_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="legacy_tensorflow"):
        Inception(tmp_path, "legacy_pytorch")


def test_a_missing_inception_names_the_file_its_source_and_the_setting(tmp_path):
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt.*https://.*judge\.features\.path"):
        Inception(tmp_path)


def test_a_damaged_inception_names_the_file_and_its_source(tmp_path):
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"PK half of it")
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt is damaged.*https://") as error:
        Inception(tmp_path)
    assert "\n" not in str(error.value)
