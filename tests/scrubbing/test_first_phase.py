"""The cached first phase is restored exactly, and an interrupted fit does not search again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.run.small import at_call, ctrl_c, partial
from unlearning.methods.scrubber import Scrubber
from unlearning.scrubbing.conditioning import conditioning_rows
from unlearning.scrubbing.first_phase import FirstPhase
from unlearning.scrubbing.prototypes import Prototypes, PrototypeSearch


@pytest.mark.parametrize("any_pipeline", ["sd1", "sdxl", "sd3", "sana", "dit"], indirect=True)
def test_it_is_read_as_it_was_written(any_model, tmp_path):
    rows = conditioning_rows(
        "null", any_model, None, *torch.randn(2, 1, *any_model.latent_shape), torch.ones(1, 1, 2, 2)
    )
    prototypes = Prototypes(*torch.randn(3, 2, 4).unbind(), tau=0.3, alpha=15.0, layer="middle")
    rows = replace(rows, words=("cat", "kitty"), others=("dog",))
    written = FirstPhase(prototypes, rows, *torch.randn(2, 3, 4, 8, 8).unbind())
    written.save(tmp_path / "checkpoints" / "a.pt")
    read = FirstPhase.load(tmp_path / "checkpoints" / "a.pt", any_model.device)
    assert torch.equal(read.M, written.M) and torch.equal(read.eta, written.eta)
    assert (read.rows.words, read.rows.others) == (("cat", "kitty"), ("dog",))
    assert torch.equal(read.prototypes.directions, prototypes.directions)
    assert (read.prototypes.tau, read.prototypes.alpha, read.prototypes.layer) == (0.3, 15.0, "middle")
    null = any_model.encode_prompts([""])
    for c in (read.rows.null, read.rows.forget, read.rows.retain):
        assert torch.equal(c.embeds, null.embeds) and c.extra.keys() == null.extra.keys()


COMMAND = [
    "method=scrubber", "method.conditioning=null", "method.prototypes.K=4", "method.prototypes.purity=0",
    "method.iterations=1", "method.batch_size=2", "dataset=folder", "dataset.size=16", "stages=[fit]",
]  # fmt: skip


@pytest.fixture
def command(tmp_path):
    """A short fit on random images."""
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)):
        folder = tmp_path / ("cats", "others")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [*COMMAND, f"forget={tmp_path}/cats", f"retain={tmp_path}/others"]


def test_an_interrupted_fit_does_not_search_again_unless_its_file_is_damaged(
    unlearn, error_of, command, tmp_path, monkeypatch, capsys
):
    searches, search = [], PrototypeSearch.__call__
    monkeypatch.setattr(PrototypeSearch, "__call__", lambda *a, **k: searches.append(1) or search(*a, **k))

    def interrupted() -> Path:
        with monkeypatch.context() as patch:
            at_call(patch, Scrubber, "loss", 1, ctrl_c)
            assert "Interrupted" in error_of(*command)
        [file] = (tmp_path / "run" / "checkpoints").glob("*/first_phase.pt")
        return file

    file = interrupted()
    assert len(searches) == 1 and not partial(tmp_path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    interrupted()
    assert len(searches) == 2 and f"{file} is damaged" in capsys.readouterr().out
    run = unlearn(*command)
    assert len(searches) == 2 and (run / "erasure").exists() and len(list((run / "figures").iterdir())) == 5
    assert not (run / "checkpoints").exists()
