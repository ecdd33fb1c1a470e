"""Whole runs of a tiny model: their files, and the work that a second run skips."""

import csv
import json
import shutil

import nudenet
import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.run.small import (
    FIT,
    SMALL,
    TRAIN,
    at_call,
    ctrl_c,
    files,
    image_evaluations,
    partial,
)
from unlearning.erasures.base import Erasure
from unlearning.evaluators.fid import FID
from unlearning.evaluators.nudenet import NudeNet
from unlearning.evaluators.suppression import suppression
from unlearning.methods.esd import ESD
from unlearning.store.manifest import load_images, read_manifest
from unlearning.store.metrics import flat, records

# --- a run from its first stage to its last ---------------------------------------------------------------------------


def test_a_run_writes_the_documented_files_and_repeats_no_work(unlearn, tmp_path, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=3", "evaluator=nudenet", "logger=csv"]
    run = unlearn(*command)
    assert evaluations() == 3 * FIT + 2 * image_evaluations(3)

    left = {p for p in files(run) if not p.startswith("logs/")}
    assert left - {"__main__.log"} == {
        *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides", "resolved")),
        *(f"erasure/{name}" for name in ("README.md", "erasure.json", "weights.safetensors")),
        *("images/base.csv", "images/erased.csv", "metrics.json", "cost.json", "report.html", "teaser.png", ".lock"),
        *("details/nudenet-of-base.jsonl", "details/nudenet-of-erased.jsonl"),
        *("provenance.json", ".finished", *([".fit"] if (run / ".fit").exists() else [])),
    }
    assert not partial(tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"efficacy/nudenet_total", "base/efficacy/nudenet_total", "efficacy/nudenet_total/protocol"} <= set(metrics)
    assert metrics["cost/denoiser_evaluations"] == 3 * FIT and metrics["cost/artefact_bytes"] > 10_000
    cost = json.loads((run / "cost.json").read_text())
    assert {k: v["denoiser_evaluations"] for k, v in cost.items()} == {
        "fit": 3 * FIT, "generate base": image_evaluations(3), "generate erased": image_evaluations(3)
    }  # fmt: skip
    base, erased = (read_manifest(run / "images" / f"{name}.csv") for name in ("base", "erased"))
    assert [(r.prompt, r.seed, r.role) for r in base] == [(r.prompt, r.seed, r.role) for r in erased]
    assert len({r.path for r in base + erased}) == 2 * 3 == len(list((tmp_path / "store").rglob("*.png")))
    assert load_images(base).shape == (3, 16, 16, 3) and (load_images(base) != load_images(erased)).any()
    [log] = run.glob("logs/csv/*/metrics.csv")
    losses = [float(row["train/loss"]) for row in csv.DictReader(log.open()) if row.get("train/loss")]
    assert len(losses) == 3 and np.isfinite(losses).all()

    before, shared = files(run), files(tmp_path / "store")
    unlearn(*command)
    assert evaluations() == 0, "nothing is fitted or drawn again"
    assert files(tmp_path / "store") == shared, "nothing of the store is written again"
    after = files(run)
    assert {p: after[p] for p in before if p.startswith("erasure/")} == {
        p: t for p, t in before.items() if p.startswith("erasure/")
    }
    assert json.loads((run / "metrics.json").read_text()).keys() == metrics.keys()


def test_runs_share_the_base_models_images_and_their_measures(unlearn, evaluations):
    none = unlearn(*SMALL, "evaluator=nudenet", run="none")
    assert evaluations() == image_evaluations(3), "a model that nothing was erased from is the base model"
    base, erased = (read_manifest(none / "images" / f"{name}.csv") for name in ("base", "erased"))
    assert base == erased and base[0].base is None
    negative = unlearn(*SMALL, "method=negative_prompt", "stages=[fit,generate]", run="negative")
    assert evaluations() == image_evaluations(3), "only the erased model's are drawn"
    assert load_images(read_manifest(negative / "images" / "base.csv")).any()
    assert read_manifest(negative / "images" / "base.csv") == read_manifest(none / "images" / "base.csv")
    unlearn("dataset=prompt", "concept=dog", "dataset.others=[cat,sea]", "stages=[fit,generate]", run="dog")
    assert evaluations() == image_evaluations(1), "of dog's three prompts, cat's run had all but the sea"


def test_runs_that_differ_only_in_their_measurements_share_an_erasure(unlearn, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=1", "stages=[fit]"]
    first = unlearn(*command)
    assert evaluations() == FIT
    others = ["dataset.images_per_prompt=2", "dataset.others=[ship]", "sampler.steps=5", "evaluator=nudenet"]
    second = unlearn(*command, *others, run="second")
    assert evaluations() == 0, "the same erasure, of which other things will be measured"
    for file in ("weights.safetensors", "erasure.json"):
        assert (second / "erasure" / file).read_bytes() == (first / "erasure" / file).read_bytes()
    costs = [json.loads((run / "cost.json").read_text())["fit"] for run in (first, second)]
    assert costs[0] == costs[1]
    unlearn(*command, *others)
    assert evaluations() == 0, "in the same folder too"

    for run in (first, second):
        damaged = run / "erasure" / "weights.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-4])
    unlearn(*command, run="third")
    assert evaluations() == FIT
    unlearn(*command, "seed=1", run="another seed")
    assert evaluations() == FIT


def test_other_settings_have_other_images(unlearn, tmp_path, evaluations):
    few = ["dataset=prompt", "dataset.others=[dog]", "stages=[fit,generate]"]
    one = unlearn(*few, "sampler.batch_size=2")
    evaluations()
    for setting in ("seed=1", "sampler.guidance_scale=5", "model.dtype=bfloat16", "trainer.precision=bf16-mixed"):
        unlearn(*few, setting, run=setting.partition("=")[0])
        assert evaluations() > 0, setting
    unlearn(*few, "sampler.batch_size=1", run="alone")
    assert evaluations() == 0, "a batch's size changes no picture"
    again = unlearn(*few, "sampler.batch_size=1", f"paths.store={tmp_path}/another", run="again")
    a, b = (load_images(read_manifest(run / "images" / "base.csv")) for run in (one, again))
    assert np.abs(a.astype(int) - b).max() <= 1 and len(np.unique(a[:, 0, 0, 0])) > 1


def test_stages_can_be_run_one_by_one(unlearn, evaluations):
    run = unlearn(*SMALL, *TRAIN, "method.iterations=1", "stages=[fit]")
    assert evaluations() == FIT and not (run / "images").exists()
    unlearn(*SMALL, *TRAIN, "method.iterations=1", "stages=[generate]")
    assert evaluations() == 2 * image_evaluations(3) and not (run / "metrics.json").exists()
    unlearn(*SMALL, *TRAIN, "method.iterations=1", "stages=[report,evaluate]")  # their order is the stages' own
    assert evaluations() == 0 and (run / "report.html").exists()


@pytest.mark.parametrize(
    ("stages", "answer"),
    [
        ("[evaluate]", "run the generate stage first"),
        ("[generate]", "run the fit stage first"),
        ("[report]", "run the evaluate stage"),
    ],
)
def test_a_stage_names_the_missing_earlier_stage(error_of, stages, answer):
    assert answer in error_of(*SMALL, f"stages={stages}")


def test_an_evaluation_survives_a_new_report_and_notices_a_new_protocol(unlearn, monkeypatch):
    updates = []
    update = NudeNet.update
    monkeypatch.setattr(NudeNet, "update", lambda self, *a: (updates.append(1), update(self, *a)))
    command = [*SMALL, "method=none", "evaluator=nudenet"]
    unlearn(*command)
    assert len(updates) == 1, "base and unedited are the same pictures"
    unlearn(*command)
    assert len(updates) == 1
    unlearn(*command, "evaluator.nudenet.threshold=0.5")
    assert len(updates) == 2


def test_detector_failures_are_not_cached(unlearn, error_of, tmp_path, monkeypatch):
    command = [*SMALL, "method=negative_prompt", "evaluator=nudenet", "dataset.images_per_prompt=2"]
    detect, calls = nudenet.NudeDetector.detect, []
    monkeypatch.setattr(nudenet.NudeDetector, "detect", lambda self, image: (calls.append(1), detect(self, image))[1])
    with monkeypatch.context() as patch:
        at_call(patch, nudenet.NudeDetector, "detect", 1, lambda: 1 / 0)
        assert "measurements that failed: 1" in error_of(*command)
    run, total = tmp_path / "run", "base/efficacy/nudenet_total"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["cost/unmeasured"] == metrics["base/efficacy/nudenet_failed"] == 1
    assert metrics[f"{total}/protocol"].endswith("failed on: 1 of 2") and not (run / ".finished").exists()
    assert len(list((tmp_path / "store" / "evaluations").glob("*.json"))) == 1, "the erased model's, which is whole"
    calls.clear()
    unlearn(*command)
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(calls) == 2 and "cost/unmeasured" not in metrics and (run / ".finished").exists()
    assert metrics[f"{total}/protocol"] == metrics["efficacy/nudenet_total/protocol"], "these compare"


def test_an_evaluator_without_input_reports_its_requirements(error_of, tmp_path, capsys):
    """And one that was chosen on the command line makes the run end with an error."""
    assert "measured nothing: 2" in error_of(*SMALL, "evaluator=[accuracy,fid,clip_score]")
    said = capsys.readouterr().out
    assert said.count("measured nothing") == 2
    assert "accuracy measured nothing: it needs a dataset" in said
    assert "fid measured nothing: it needs" in said and "evaluator.fid.real=/a/folder" in said
    (tmp_path / "coco.csv").write_text("prompt,evaluation_seed\na dog,1\n")
    captions = ["dataset=coco30k", f"dataset.path={tmp_path}/coco.csv", "dataset.count=1"]
    assert "measured nothing: 1" in error_of(*captions, "evaluator=[clip_score,nudenet]", run="captions")
    assert capsys.readouterr().out.count("nudenet measured nothing") == 1


def test_images_are_compared_with_those_of_the_oracle(unlearn, error_of, tmp_path, evaluations):
    torch.manual_seed(7)
    tiny.sd1().save_pretrained(tmp_path / "never")
    compared = [*SMALL, "evaluator=fid_oracle", f"evaluator.fid_oracle.oracle.path={tmp_path / 'never'}"]
    run = unlearn(*compared, "method=oracle", f"method.path={tmp_path / 'never'}", run="never")
    assert evaluations() == 2 * image_evaluations(3), "the erased model's images are the oracle's"
    numbers = json.loads((run / "metrics.json").read_text())
    assert numbers["retention/fid_oracle"] == pytest.approx(0, abs=1e-3)
    assert numbers["base/retention/fid_oracle"] > 1
    erased = read_manifest(run / "images" / "erased.csv")
    assert [row.oracle for row in erased] == [row.path for row in erased]
    assert "the model that never knew" in (run / "report.html").read_text()

    unlearn(*compared, *TRAIN, "method.iterations=3", run="esd")
    assert evaluations() == 3 * FIT + image_evaluations(3), "nothing is drawn again but what is erased"
    missing = [*compared[:-1], f"evaluator.fid_oracle.oracle.path={tmp_path / 'nowhere'}"]
    assert "train_unet.py --without" in error_of(*missing, *TRAIN, run="missing")
    assert evaluations() == 0 and not (tmp_path / "missing" / "erasure").exists()


def test_images_are_compared_with_those_of_the_prompts_without_the_word(unlearn, error_of, evaluations):
    measured = "evaluator=[fid_word_removed,lpips_word_removed]"
    run = unlearn(*SMALL, measured, "method=prompt_filter", "dataset.images_per_prompt=2", run="filter")
    assert evaluations() == 2 * image_evaluations(6), "the reference is what the filter makes of the model"
    numbers = json.loads((run / "metrics.json").read_text())
    assert numbers["retention/fid_word_removed"] == pytest.approx(0, abs=1e-3)
    assert numbers["efficacy/lpips_word_removed"] == 0 < numbers["base/efficacy/lpips_word_removed"]
    assert numbers["retention/lpips_word_removed"] == 0 == numbers["base/retention/lpips_word_removed"]
    both = [*SMALL, "method=none", "evaluator=[fid_oracle,fid_word_removed]"]
    assert "fid_oracle and fid_word_removed" in error_of(*both, run="both") and evaluations() == 0


def test_a_shortened_manifest_is_refused_before_anything_is_measured(unlearn, error_of):
    command = ["dataset=prompt", "dataset.others=[dog]", "dataset.images_per_prompt=2", "method=negative_prompt",
               "evaluator=nudenet", "attack=[paraphrase]"]  # fmt: skip
    run, again = unlearn(*command), [*command, "evaluator.nudenet.threshold=0.5"]
    before = (run / "metrics.json").read_bytes()
    base, erased, attacked = (run / "images" / f"{name}.csv" for name in ("base", "erased", "attacked-paraphrase"))
    whole = {manifest: manifest.read_text() for manifest in (base, erased, attacked)}
    asked = "4 asked for"
    for short, answer in (([attacked], f"{attacked.name} lists 1 images of the 2"), ([base], asked), ([erased], asked),
                          ([base, erased], asked)):  # fmt: skip
        for manifest, text in whole.items():
            manifest.write_text("".join(text.splitlines(keepends=True)[: -1 if manifest in short else None]))
        assert answer in error_of(*again, "stages=[evaluate]")
        assert (run / "metrics.json").read_bytes() == before
    attacked.write_text(attacked.read_text().splitlines(keepends=True)[0])
    unlearn(*again)
    assert (run / "metrics.json").read_bytes() != before, "the generate stage has mended them"
    assert [len(read_manifest(manifest)) for manifest in whole] == [4, 4, 2]
    (run / "attacks" / "paraphrase.json").unlink()  # a record that was not copied is no reason to refuse images
    unlearn(*again, "evaluator.nudenet.threshold=0.4", "stages=[evaluate]")


def test_an_attack_that_leaves_prompts_out_is_measured_on_the_others(unlearn):
    attack = ["attack=[unlearndiffatk/nudity]", "attack.unlearndiffatk.iterations=1", "attack.unlearndiffatk.times=1"]
    asked = ["dataset=prompt", "concept=[cat,a very long name of it]", "method=negative_prompt", "evaluator=nudenet"]
    run = unlearn(*asked, *attack, "attack.unlearndiffatk.longest=20")
    record = json.loads((run / "attacks" / "unlearndiffatk.json").read_text())
    assert (len(record["rows"]), record["targets"]) == (1, 2)
    assert len(read_manifest(run / "images" / "attacked-unlearndiffatk.csv")) == 1
    assert "robustness/nudenet_rate_unlearndiffatk" in json.loads((run / "metrics.json").read_text())


class Colours:
    """A feature extractor: the mean colour."""

    name = "mean colour"

    def __init__(self, path: str):
        pass

    def __call__(self, images):
        return images.float().mean((1, 2))


def test_a_users_image_folder_is_erased_and_measured(unlearn, tmp_path, monkeypatch, evaluations):
    (tmp_path / "mugs").mkdir()
    for i in range(12):
        Image.new("RGB", (9, 9), (20 * i, 9 * i, i * i)).save(tmp_path / "mugs" / f"{i:02}.png")
    (tmp_path / "mugs" / "zz.png").write_bytes(b"no picture")
    fid = ["evaluator=fid", "judge.features._target_=tests.run.test_stages.Colours", "evaluator.fid.count=7"]
    command = [
        "dataset=folder",
        "concept=mug",
        f"forget={tmp_path}/mugs",
        "dataset.size=16",
        *fid,
        "dataset.images_per_prompt=4",
    ]
    with pytest.warns(UserWarning, match=r"1 of 13 images .*zz\.png"):
        run = unlearn(*command, "method=negative_prompt")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["fidelity/fid_e"] > 0 and "fidelity/fid" not in metrics, "there are no pictures to retain"
    evaluations()
    updates = []
    monkeypatch.setattr(FID, "update", lambda self, *a: updates.append(a))
    unlearn(*command, "method=negative_prompt", "sampler.batch_size=3")
    assert evaluations() == 0 and not updates, "nothing is measured again"


# --- nothing stale ----------------------------------------------------------------------------------------------------


def test_a_model_that_changed_on_disk_is_fitted_and_sampled_again(unlearn, error_of, model, monkeypatch, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=3", f"model.path={model}"]
    run = unlearn(*command)
    first = evaluations()
    old = Erasure.load(run / "erasure"), load_images(read_manifest(run / "images" / "erased.csv"))
    tiny.pipeline("sd1", seed=1).save_pretrained(model)
    assert "made from another model" in error_of(*command, "stages=[generate]")
    with monkeypatch.context() as patch:
        at_call(patch, shutil, "rmtree", 1, denied)
        with pytest.raises(SystemExit):
            unlearn(*command)
    assert evaluations() == 0, "an erasure of another model is not applied, and has to be deleted first"
    unlearn(*command)
    assert evaluations() == first
    new = Erasure.load(run / "erasure"), load_images(read_manifest(run / "images" / "erased.csv"))
    assert old[0].digest != new[0].digest and (old[1] != new[1]).any()
    assert json.loads((run / "metrics.json").read_text())["cost/denoiser_evaluations"] == 3 * FIT, "the new fit's"


def denied() -> None:
    raise PermissionError("the folder cannot be deleted")


def test_an_interrupted_fit_does_not_go_on_with_another_model(unlearn, error_of, model, monkeypatch, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=5", f"model.path={model}", "stages=[fit]"]
    with monkeypatch.context() as patch:
        at_call(patch, ESD, "loss", 4, ctrl_c)
        error_of(*command)
    evaluations()
    tiny.pipeline("sd1", seed=1).save_pretrained(model)
    unlearn(*command)
    assert evaluations() == 5 * FIT


def test_changed_settings_in_the_same_folder_are_fitted_again(unlearn):
    """One setting after the other is changed."""
    command = [*SMALL, *TRAIN, "method.iterations=1", "stages=[fit]"]
    digests = [Erasure.load(unlearn(*command) / "erasure").digest]
    for change in ("method.eta=3", "concept=bird", "seed=1", "dataset.template='the {}'",
                   "trainer.precision=bf16-mixed", "+trainer.gradient_clip_val=1e-6"):  # fmt: skip
        command += [change]
        digests.append(Erasure.load(unlearn(*command) / "erasure").digest)
        assert digests[-1] != digests[-2], change
    digests.append(Erasure.load(unlearn(*SMALL, "method=uce", "stages=[fit]") / "erasure").digest)
    assert len({*digests}) == len(digests)


# --- numbers of the whole run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"efficacy/acc_e": 5.0, "base/efficacy/acc_e": 50.0}, 90.0),
        ({"efficacy/nudenet_rate": 3.0, "base/efficacy/nudenet_rate": 4.0, "efficacy/acc_e": 0.0}, 25.0),
        ({"efficacy/acc_e": 5.0, "base/efficacy/acc_e": 0.0}, None),
        ({}, None),
    ],
)
def test_suppression_is_relative_to_the_base_model(metrics, expected):
    assert flat(suppression(records(metrics))).get("efficacy/suppression") == expected


def test_a_suppression_is_of_the_protocols_that_it_was_measured_by():
    shown = {"efficacy/acc_e": 5.0, "base/efficacy/acc_e": 50.0}
    by = {"efficacy/acc_e/protocol": "argmax", "base/efficacy/acc_e/protocol": "argmax"}
    assert flat(suppression(records(shown | by)))["efficacy/suppression/protocol"] == "of efficacy/acc_e: argmax"
    other = flat(suppression(records(shown | by | {"base/efficacy/acc_e/protocol": "softmax"})))
    assert other["efficacy/suppression/protocol"] == "of efficacy/acc_e: argmax | softmax"


def test_too_many_sampling_steps_end_the_run_before_training(error_of, tmp_path):
    assert "1000 steps" in error_of("method=esd_x", "method.iterations=1", "dataset=prompt", "sampler.steps=1000")
    assert not (tmp_path / "run" / "erasure").exists()
