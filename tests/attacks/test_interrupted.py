"""A killed attack resumes where it was interrupted, and gives the same result as an uninterrupted one."""

from functools import partial

import pytest
import torch

from tests.attacks.shots import found_by
from unlearning.attacks.cce import CCE
from unlearning.attacks.classifier_guidance import ClassifierGuidance
from unlearning.attacks.inversion import Inversion
from unlearning.attacks.mma import MMA
from unlearning.attacks.p4d import P4D
from unlearning.attacks.recall import Recall
from unlearning.attacks.ring_a_bell import RingABell
from unlearning.attacks.unlearndiffatk import UnlearnDiffAtk
from unlearning.data.generated import Generated
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.store import loops

SAMPLER = Sampler(steps=1, batch_size=1)
ADAM = partial(torch.optim.Adam, lr=0.01)


def never(images, rows) -> list[float]:
    return [0.0] * len(rows)


never.threshold, never.name = 0.5, "sees nothing"


def attacks(store):
    images = Generated(store=store, sampler=SAMPLER)
    few = {"images": images, "count": 2, "optimizer": ADAM}
    return {
        "cce": CCE(**few, prompts=("a {}",), initial="q", iterations=4, batch_size=2, accumulate=1),
        "classifier_guidance": ClassifierGuidance(**few, epochs=2, batch_size=8, scales=(1.0,)),
        "inversion": Inversion(images=SAMPLER, steps=2),
        "mma": MMA(tokens=3, count=1, iterations=4, candidates=12, top=8, transfer=False),
        "p4d": P4D(images=SAMPLER, optimizer=ADAM, tokens=2, iterations=2, samples=4, check=1),
        "recall": Recall(images=SAMPLER, iterations=1),
        "ring_a_bell": RingABell(tokens=3, population=8, iterations=4),
        "unlearndiffatk": UnlearnDiffAtk(
            images=SAMPLER, witness=never, optimizer=ADAM, tokens=2, times=2, iterations=1
        ),
    }


@pytest.mark.parametrize("name", sorted(attacks(None)))
def test_a_killed_attack_finds_what_it_would_have_found(name, sd1, tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "EVERY", 0)
    model, attack = StableDiffusion.load(str(sd1), device="cpu"), attacks(tmp_path / "store")[name]
    whole, write, writes = found_by(attack, model), loops._write, []

    def killed(path, done, state):
        write(path, done, state)
        writes.append(done)
        if len(writes) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loops, "_write", killed)
    with pytest.raises(KeyboardInterrupt), loops.kept_in(tmp_path / "begun"):
        found_by(attack, model)
    with loops.kept_in(tmp_path / "begun"):
        again = found_by(attack, model)
    assert writes[:2] == [1, 2], "the first step is not done again"
    assert [(one.prompt, one.record) for one in again.prompts] == [(one.prompt, one.record) for one in whole.prompts]
    assert again.shared.keys() == whole.shared.keys()
    for one, other in zip([*again.prompts, again], [*whole.prompts, whole], strict=True):
        a, b = (getattr(own, "tensors", None) or getattr(own, "shared", {}) for own in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
