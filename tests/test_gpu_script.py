"""The table of experiments/gpu: every row runs and is stored, and both sides compute the same result."""

import json
import math
from functools import partial

import pytest
import torch

from experiments.fullsize.__main__ import DEPTHS
from experiments.gpu import architectures, table
from experiments.gpu.bench import Bench, Row, Sides
from experiments.speed import published
from tests import tiny
from unlearning.codes.frequency import count_codes
from unlearning.concepts import Concept, UnlearningTask
from unlearning.methods.esd import ESD
from unlearning.methods.uce import UCE
from unlearning.training.batches import seed_of
from unlearning.training.student import Weights

DENOISERS = {
    "SD1.4": architectures.unet_sd14,
    "SDXL": architectures.unet_sdxl,
    "SD3-medium": architectures.transformer_sd3,
    "FLUX.1-dev": architectures.transformer_flux,
}
MILLIONS = {"SD1.4": 859.5, "SDXL": 2567.5, "SD3-medium": 2028.3, "FLUX.1-dev": 11901.4}  # published, of the denoisers


def model(family: str = "sd1"):
    return tiny.FAMILIES[family](tiny.pipeline(family), name="tiny", fingerprint="", device=torch.device("cpu"))


def run(folder, *arguments: str) -> tuple[int, dict[str, dict]]:
    """How many rows failed, and the rows on disk."""
    failed = table.main(["--tiny", "--device", "cpu", "--out", str(folder), *arguments])
    files = [*folder.glob("*.json")]
    return failed, json.loads(files[0].read_text())["rows"] if files else {}


def test_every_row_runs_on_tiny_models(tmp_path, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: None)  # between rows, whose memory is not compared here
    failed, rows = run(tmp_path)
    assert not failed and list(rows) == [row.name for row in table.ROWS]
    for row in rows.values():
        numbers = [row[k] for k in ("ours_s", "published_s", "ratio", "ours_bytes", "published_bytes")]
        assert all(math.isfinite(x) and x > 0 for x in numbers) and row["n"] >= 2 and row["ratio_se"] >= 0
    assert any(row["utilisation"] for row in rows.values())
    text = next(tmp_path.glob("*.md")).read_text()
    assert all(name in text for name in rows)


@pytest.fixture
def three_rows(monkeypatch):
    """Rows that take no time, of which the second fails; and how often each was measured."""
    measured = {"first": 0, "second": 0, "third": 0}

    def sides(name: str, _: Bench) -> Sides:
        measured[name] += 1
        if name == "second" and measured[name] == 1:
            raise RuntimeError("no memory")
        return Sides(lambda: lambda: 1.0, lambda: lambda: 2.0)

    monkeypatch.setattr(table, "ROWS", [Row(n, "unit", 30, partial(sides, n)) for n in measured])
    return measured


def test_a_row_that_fails_is_recorded_and_tried_again_by_the_next_run(three_rows, tmp_path):
    failed, rows = run(tmp_path)
    assert failed == 1 and "no memory" in rows["second"]["error"] and rows["third"]["ratio"] == 2
    failed, rows = run(tmp_path)
    assert not failed and rows["second"]["ratio"] == 2
    assert three_rows == {"first": 1, "second": 2, "third": 1}


def test_a_row_that_does_not_fit_into_the_time_is_left_to_the_next_run(three_rows, tmp_path, capsys):
    assert run(tmp_path, "--minutes", "0.4") == (0, {})
    assert "3 rows" in capsys.readouterr().out
    assert run(tmp_path, "--only", "third")[1].keys() == {"third"}


@pytest.mark.parametrize("name", MILLIONS)
def test_the_architectures_are_the_published_ones(name):
    with torch.device("meta"):
        parameters = DENOISERS[name]().parameters()
    assert sum(p.numel() for p in parameters) / 1e6 == pytest.approx(MILLIONS[name], rel=1e-3)
    made = architectures.diffusion(name, device="meta", **dict.fromkeys(DEPTHS.get(name, ()), 1))
    assert made.latent_shape[1:] == ((64, 64) if name == "SD1.4" else (128, 128))
    x, t = torch.empty(1, *made.latent_shape, device="meta"), torch.tensor([500], device="meta")
    assert made.predict(x, t, made.encode_prompts(["a photo of the cat"])).shape == x.shape


def test_the_published_loop_trains_the_weights_that_ours_does(tmp_path):
    task, lr, settings = UnlearningTask((Concept("cat"),)), 1e-2, {"steps": 3, "guidance_scale": 3.0}
    ours, bench = model(), Bench("cpu", tiny=True)
    method = ESD(
        student=Weights("attn2"), optimizer=partial(torch.optim.Adam, lr=lr), trainer=bench.trainer, iterations=3,
        **settings,
    )  # fmt: skip
    torch.manual_seed(7)
    patch = method.fit(ours, task)
    loop = published.ESD(ours, task.prompt("cat"), trained=published.weights("attn2"), lr=lr, **settings)
    list(loop.iterate([seed_of(7, 0, k, 0) for k in range(3)]))
    theirs = dict(loop.student.named_parameters())
    before = ours.named_parameters()
    assert patch.weights.keys() == {f"unet.{n}" for n, p in theirs.items() if p.requires_grad}
    for name, weight in patch.weights.items():
        torch.testing.assert_close(weight, theirs[name.removeprefix("unet.")], atol=lr / 50, rtol=0)
        assert (weight - before[name]).abs().max() > lr / 2


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_the_published_closed_form_gives_the_weights_that_ours_does(family):
    made = model(family)
    task = UnlearningTask((Concept("cat", anchor="sky"), Concept("a dog", anchor="sea")))
    theirs = published.uce(made, ["cat", "a dog"], ["sky", "sea"], [""])
    before = made.named_parameters()
    for (name, ours), weight in zip(UCE().fit(made, task).weights.items(), theirs, strict=True):
        assert (ours - weight).norm() < 0.01 * (ours - before[name]).norm(), "theirs is solved in float32"


def test_the_published_count_of_codes_is_ours():
    bench = Bench("cpu", tiny=True)
    images = bench.images(4, 64)
    vqgan = bench.vqgan()
    counted = count_codes(vqgan, bench.task(forget_images=images[:2], retain_images=images[2:]), bench.trainer)
    theirs = published.count_codes(vqgan, images)
    assert counted.codes.sum(0).tolist() == [theirs[k] for k in range(len(vqgan.codebook))]
