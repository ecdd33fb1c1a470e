"""Loggers write what they are given where they should, and never fail a run."""

import csv
import json
import logging
import struct
import time

import numpy as np
import pytest
from PIL import Image

from unlearning import loggers

PICTURE = np.full((8, 8, 3), 200, np.uint8)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A home without credentials, and nothing of W&B's in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_SILENT"):
        monkeypatch.setenv(name, "")  # so that what `wandb` sets is taken back
        monkeypatch.delenv(name)


def build(folder, *labels):
    targets = {"csv": "pytorch_lightning.loggers.CSVLogger", "wandb": "unlearning.loggers.wandb"}
    return loggers.build({label: {"_target_": targets[label], "save_dir": str(folder)} for label in labels})


def records(path):
    """The records of a .wandb file, which is a LevelDB log with a header of its own."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts = (parts if kind in (3, 4) else b"") + data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def history(folder):
    """The scalars of the only W&B run under `folder`, once its file is whole: W&B ends it a moment after the run."""
    [path] = folder.rglob("*.wandb")
    for _ in range(100):
        if any(record.WhichOneof("record_type") == "exit" for record in records(path)):
            break
        time.sleep(0.1)
    rows = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for row in rows for item in row}


def test_what_is_logged_can_be_read_back(offline, tmp_path, capfd):
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
    assert not (tmp_path / "home").exists(), "W&B wrote outside the run's folder"
    assert capfd.readouterr() == ("", "")


def test_two_runs_of_one_process_do_not_mix(offline, tmp_path):
    built = [build(tmp_path / name, "wandb") for name in ("first", "second")]  # the first is never closed
    for value, run in enumerate(built):
        loggers.log(run, {"value": value})
    for run in built:
        loggers.close(run)
    assert [history(tmp_path / name)["value"] for name in ("first", "second")] == [0, 1]


def test_pictures_of_floats_are_refused(tmp_path):
    with pytest.raises(TypeError, match="uint8"):
        loggers.log(build(tmp_path, "csv"), {}, {"cat": [PICTURE / 255]})


def test_a_logger_that_cannot_be_built_is_left_out(tmp_path, caplog):
    good = {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": str(tmp_path)}
    assert [built.label for built in loggers.build({"bad": {"_target_": "no.such.Logger"}, "good": good})] == ["good"]
    assert "Logger bad is left out" in caplog.text
    assert loggers.build(None) == loggers.build({}) == []


def test_a_broken_logger_warns_once_and_the_run_goes_on(tmp_path, caplog):
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
    assert caplog.text.count("Logger broken cannot log metrics: disk full") == 1
