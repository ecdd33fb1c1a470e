"""What the first phase found is read back as it was, and is not searched for again."""

from dataclasses import replace
from pathlib import Path

import torch

import unlearning
from tests.run.small import at_call, ctrl_c, partial
from unlearning.methods.scrubber import Scrubber
from unlearning.scrubbing.conditioning import told
from unlearning.scrubbing.fingerprint import Fingerprint, Fingerprinting
from unlearning.scrubbing.found import Found

EMBEDDED = Path(unlearning.__file__).parent / "weights" / "emoji_unet"


def test_it_is_read_as_it_was_written_in_every_family(any_model, tmp_path):
    said = told("null", any_model, None, *torch.randn(2, 1, *any_model.latent_shape), torch.ones(1, 1, 2, 2))
    fingerprint = Fingerprint(*torch.randn(3, 2, 4).unbind(), tau=0.3, alpha=15.0, layer="middle")
    whole = Found(fingerprint, replace(said, words=("cat", "kitty")), *torch.randn(2, 3, 4, 8, 8).unbind())
    whole.save(tmp_path / "checkpoints" / "found.pt")
    read = Found.load(tmp_path / "checkpoints" / "found.pt", any_model.device)
    assert torch.equal(read.M, whole.M) and torch.equal(read.eta, whole.eta) and read.told.words == ("cat", "kitty")
    assert torch.equal(read.fingerprint.prototypes, fingerprint.prototypes)
    assert (read.fingerprint.tau, read.fingerprint.alpha, read.fingerprint.layer) == (0.3, 15.0, "middle")
    null = any_model.encode_prompts([""])
    for rows in (read.told.null, read.told.forget, read.told.retain):
        assert torch.equal(rows.embeds, null.embeds) and rows.extra.keys() == null.extra.keys()


def test_an_interrupted_fit_does_not_search_again(unlearn, told, tmp_path, monkeypatch):
    command = [
        "method=scrubber", "concept=cat", f"model.path={EMBEDDED}", "method.conditioning=null", "dataset.pictures=6",
        "method.fingerprint.K=4", "method.fingerprint.purity=0", "method.iterations=1", "method.batch_size=2",
        "stages=[fit]",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        at_call(patch, Scrubber, "loss", 1, ctrl_c)
        assert "Interrupted" in told(*command)
    assert (tmp_path / "run" / "checkpoints" / "first_phase.pt").exists() and not partial(tmp_path)
    with monkeypatch.context() as patch:
        at_call(patch, Fingerprinting, "__call__", 1, lambda: 1 / 0)
        run = unlearn(*command)
    assert (run / "erasure").exists() and len(list((run / "figures").iterdir())) == 5
    assert not (run / "checkpoints").exists()
