"""Loggers write metrics and images to their files, and never stop a run."""

import csv
import json
import logging
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unlearning.store.images import write_image
from unlearning.store.manifest import ManifestRow
from unlearning.tracking import loggers

PICTURE = np.full((8, 8, 3), 200, np.uint8)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An environment without credentials and settings of W&B."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_SILENT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch undoes what `wandb` sets
        monkeypatch.delenv(name)


def build(folder, *labels):
    targets = {
        "csv": "pytorch_lightning.loggers.CSVLogger",
        "tensorboard": "unlearning.tracking.loggers.TensorBoard",
        "wandb": "unlearning.tracking.loggers.wandb",
    }
    return loggers.build({label: {"_target_": targets[label], "save_dir": str(folder)} for label in labels})


def records(path):
    """The records that are written so far in a .wandb file, a LevelDB log with its own header."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # the rest is not yet written by wandb's own process
            return
        parts = (parts if kind in (3, 4) else b"") + data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def whole(folder):
    """The records of the only W&B run below `folder`, by kind. Waits until the file is complete."""
    [path] = folder.rglob("*.wandb")
    for _ in range(600):
        kinds = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            kinds.setdefault(kind, []).append(getattr(record, kind))
        if "exit" in kinds:
            return kinds
        time.sleep(0.1)
    raise TimeoutError(f"{path} has no end after a minute")


def items(records):
    return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for record in records for i in record}


def history(folder):
    """The scalars of the only W&B run below `folder`."""
    return items(record.item for record in whole(folder)["history"])


def test_logged_metrics_and_images_can_be_read_back(offline, tmp_path, capfd):
    built = build(tmp_path / "logs", "csv", "wandb")
    built[1].log_metrics({"loss": 0.5}, step=3)
    loggers.log(
        built, {"efficacy/accuracy": 0.25}, {"erase/cat": [PICTURE, Image.fromarray(PICTURE // 2)]}, {"seed": 7}
    )
    loggers.close(built)

    [table] = tmp_path.rglob("metrics.csv")
    assert list(csv.DictReader(table.open()))[-1]["efficacy/accuracy"] == "0.25"
    seen = history(tmp_path)
    assert (seen["efficacy/accuracy"], seen["loss"], seen["trainer/global_step"]) == (0.25, 0.5, 3)
    pictures = tmp_path.rglob("files/media/images/**/*.png")
    assert sorted(np.array(Image.open(picture)).mean() for picture in pictures) == [100, 200]
    assert len(list(tmp_path.rglob("*.table.json"))) == 1
    assert not (tmp_path / "home").exists(), "W&B wrote outside the folder of the run"
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def pairs(tmp_path):
    """Two pairs of images, before and after, for each of two prompts."""

    def rows(which, shade):
        made = [
            ManifestRow(tmp_path / "store" / which / f"{i}.png", prompt, role, {}, 4_000_000_000 + i)
            for i, (prompt, role) in enumerate([("a cat", "erase")] * 2 + [("a dog", "retain")] * 2)
        ]
        for row in made:
            write_image(row.path, PICTURE // shade)
        return made

    return list(zip(rows("base", 1), rows("erased", 2), strict=True))


def test_a_dashboard_gets_groups_tags_settings_and_image_pairs(offline, tmp_path, pairs):
    options = {"group": "table1", "job_type": "uce", "tags": ["sd14", "cat"], "config": {"method": "uce"}}
    built = loggers.build(
        {"wandb": {"_target_": "unlearning.tracking.loggers.wandb", "save_dir": str(tmp_path / "logs"), **options}}
    )
    metrics = {"efficacy/acc_e": 5.0, "efficacy/acc_e/protocol": "argmax"}
    settings = {"method": {"lamb": 0.5, "templates": ["{}", "a {}"]}, "seed": 7, "dataset": {"rows": [*range(900)]}}
    loggers.log(built, metrics, config=settings, pairs=pairs)
    loggers.close(built)

    kept = whole(tmp_path)
    [run] = kept["run"]
    assert (run.run_group, run.job_type, list(run.tags)) == ("table1", "uce", ["sd14", "cat"])
    config = items(record.update for record in (run.config, *kept["config"]))
    expected = {"method": "uce", "method.lamb": 0.5, "method.templates": "{}+a {}", "seed": 7}
    assert config.items() >= (expected | {"dataset.rows": "900 entries"}).items()
    assert items(record.update for record in kept["summary"]).items() >= metrics.items()
    [artifact] = [a for a in kept["artifact"] if a.name.endswith("-pictures")]
    files = {content.path: Path(content.local_path) for content in artifact.manifest.contents}
    table = json.loads(files["pictures.table.json"].read_text())
    assert table["columns"] == ["prompt", "role", "seed", "base", "erased"]
    assert [row[:3] for row in table["data"]] == [["a cat", "erase", 4_000_000_000], ["a dog", "retain", 4_000_000_002]]
    shades = [[np.array(Image.open(files[cell["path"]])).mean() for cell in row[3:]] for row in table["data"]]
    assert shades == [[200, 100], [200, 100]], "before and after, side by side"


def test_a_dashboard_gets_the_images_and_the_rates_of_each_attack(offline, tmp_path, pairs):
    rates = {"robustness/asr_cce": 80.0, "robustness/asr_before_cce": 0.0, "robustness/asr_new_noisy_cce": 10.0}
    attacked = {"cce": [after for _, after in pairs], "noisy_cce": [pairs[0][0]]}
    built = build(tmp_path / "logs", "wandb")
    loggers.log(built, {**rates, "efficacy/acc_e": 5.0}, attacked=attacked)
    loggers.close(built)

    [artifact] = [a for a in whole(tmp_path)["artifact"] if a.name.endswith("-attacks")]
    [table] = [Path(c.local_path) for c in artifact.manifest.contents if c.path == "attacks.table.json"]
    assert json.loads(table.read_text())["data"] == [
        ["cce", "asr", 80.0], ["cce", "asr_before", 0.0], ["noisy_cce", "asr_new", 10.0]
    ]  # fmt: skip
    shades = [np.array(Image.open(path)).mean() for path in (tmp_path / "logs").rglob("media/images/attacked/*.png")]
    assert sorted(shades) == [100, 200], "W&B keeps equal images once"


def test_the_command_line_sets_group_job_type_and_tags(offline, unlearn):
    folder = unlearn("logger=wandb", "concept=Van Gogh", "dataset=prompt", "seed=3")
    kept = whole(folder)
    [run] = kept["run"]
    assert (run.run_group, run.job_type) == ("emoji_unet/prompt/Van-Gogh", "none")
    assert run.display_name == "Van-Gogh-none-seed3" and {"emoji_unet", "prompt", "Van-Gogh"} < set(run.tags)
    config = items(record.update for record in (run.config, *kept["config"]))
    assert config.items() >= {"method": "none", "concept": "Van Gogh", "sampler": "ddim", "sampler.steps": 2}.items()
    assert set(json.loads((folder / "metrics.json").read_text())) <= set(items(r.update for r in kept["summary"]))
    assert [a.name.split("-")[-1] for a in kept["artifact"]] == ["metrics", "pictures"]


def test_missing_images_are_left_out(tmp_path, pairs, caplog):
    pairs[0][0].path.unlink()
    assert [row[:2] for row in loggers._sides(pairs)] == [["a dog", "retain"]]
    loggers.log(build(tmp_path, "csv"), {"value": 1}, pairs=pairs)
    assert not caplog.text


def test_tensorboard_has_metrics_and_images(tmp_path, pairs):
    pytest.importorskip("tensorboard", reason="pip install 'concept-unlearning[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    built = build(tmp_path, "tensorboard")
    loggers.log(built, {"efficacy/acc_e": 5.0, "efficacy/acc_e/protocol": "argmax"}, config={"seed": 7}, pairs=pairs)
    loggers.close(built)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("efficacy/acc_e")[0].value == 5.0
    assert {"base/0", "base/1", "erased/0", "erased/1"} == set(events.Tags()["images"])


def test_without_tensorboard_the_warning_says_what_to_install(tmp_path, caplog, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr("pytorch_lightning.loggers.TensorBoardLogger.__init__", missing)
    assert build(tmp_path, "tensorboard") == []
    assert "concept-unlearning[tensorboard]" in caplog.text


def test_two_runs_of_one_process_do_not_mix(offline, tmp_path):
    built = [build(tmp_path / name, "wandb") for name in ("first", "second")]  # the first is never closed
    for value, run in enumerate(built):
        loggers.log(run, {"value": value})
    for run in built:
        loggers.close(run)
    assert [history(tmp_path / name)["value"] for name in ("first", "second")] == [0, 1]


def test_an_unreachable_server_is_tried_once_in_a_process(offline, tmp_path, monkeypatch, caplog):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # a closed port
    init, modes = wandb.init, []
    monkeypatch.setattr(wandb, "init", lambda **kwargs: (modes.append(kwargs["mode"]), init(**kwargs))[1])
    for name in ("first", "second"):
        target = {"_target_": "unlearning.tracking.loggers.wandb", "save_dir": str(tmp_path / name)}
        built = loggers.build({"wandb": {**target, "settings": {"init_timeout": 1}}})
        loggers.log(built, {"value": 1}, {"cat": [PICTURE]}, {"seed": 1})
        loggers.close(built)
    assert modes == ["online", "offline", "offline"]
    [message] = [record.getMessage() for record in caplog.records if record.name == "unlearning.tracking.loggers"]
    assert "offline" in message
    for name in ("first", "second"):
        [kept] = (tmp_path / name).rglob("offline-run-*")
        assert history(kept)["value"] == 1


def test_float_images_are_refused(tmp_path):
    with pytest.raises(TypeError, match="uint8"):
        loggers.log(build(tmp_path, "csv"), {}, {"cat": [PICTURE / 255]})


def test_a_logger_that_cannot_be_built_is_left_out(tmp_path, caplog):
    good = {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": str(tmp_path)}
    assert [built.label for built in loggers.build({"bad": {"_target_": "no.such.Logger"}, "good": good})] == ["good"]
    assert "bad" in caplog.text
    assert loggers.build(None) == loggers.build({}) == []


def test_a_broken_logger_warns_once_and_the_run_resumes(tmp_path, caplog):
    import torch
    from pytorch_lightning import LightningModule, Trainer

    class Broken:
        name = version = "broken"
        save_dir = log_dir = str(tmp_path)

        def log_metrics(self, *_):
            raise OSError("disk full")

        log_hyperparams = log_image = save = finalize = finish = log_metrics

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch):
            self.log("loss", self.weight)
            return self.weight

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    broken = loggers.Forgiving("broken", Broken())
    trainer = Trainer(logger=[broken], max_steps=3, log_every_n_steps=1, accelerator="cpu", enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.fit(Model(), torch.utils.data.DataLoader(range(3)))
        loggers.log([broken], {"value": 1}, {"cat": [PICTURE]}, {"seed": 1})
        loggers.close([broken])
    assert trainer.global_step == 3
    assert sum("log metrics" in line for line in caplog.messages) == 1
