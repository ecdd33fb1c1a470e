"""Results of attacks: what is saved, and what the attacked model makes of it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.attacks.shots import TASK, found_by, rows
from unlearning.attacks.cce import CCE
from unlearning.attacks.p4d import P4D
from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult, attacked, restored
from unlearning.sampling.sampler import Sampler
from unlearning.stages.attacks import Victim

SAMPLER = Sampler(steps=1, batch_size=2)
ADAM = partial(torch.optim.Adam, lr=0.01)


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["tensors", "row", "record"])
def test_a_result_that_is_not_finite_is_a_failed_attack_and_not_saved(where, value, tmp_path):
    one = AttackedPrompt(
        "a q", "a w", tensors={"image": torch.tensor(value)} if where == "tensors" else {},
        record={"losses": [value]} if where == "row" else {},
    )  # fmt: skip
    result = AttackResult((one,), {"loss": value} if where == "record" else {})
    with pytest.raises(UserError, match="failed"):
        result.save(tmp_path / "kept")
    assert not list(tmp_path.iterdir())


def test_a_search_on_a_broken_model_has_failed(model, tmp_path):
    weights = {f"{name}.weight": torch.full_like(m.weight, torch.nan) for name, m in model.text_projections()}
    attack = P4D(images=SAMPLER, optimizer=ADAM, tokens=2, iterations=2, samples=4, check=1)
    with pytest.raises(UserError, match="failed"):
        found_by(attack, model, WeightPatch(weights)).save(tmp_path / "kept")


@pytest.mark.parametrize("transfer", [False, True])
def test_a_learned_word_stands_among_the_attacked_models_own_words(transfer, model, tmp_path):
    images = Generated(store=tmp_path / "store", sampler=SAMPLER)
    attack = CCE(
        images=images, optimizer=ADAM, count=1, prompts=("a {}",), initial="q", iterations=2, transfer=transfer
    )
    found_by(attack, model).save(tmp_path / "kept")
    own = attacked(tmp_path / "kept", rows())
    name = next(name for name in model.named_parameters() if name.endswith("token_embedding.weight"))

    def embeds() -> torch.Tensor:
        text = restored(model, [row.prompt for row in own], [0, 1], [row.comeback for row in own]).text
        return text.embeds["text_encoder"]

    before = embeds()
    with WeightPatch({name: model.named_parameters()[name] + 1.0}).applied_to(model):
        shift = embeds() - before
    expected = torch.ones_like(shift)
    for i, row in enumerate(own):  # the start of text, a token for each letter, and the word is the last of them
        expected[i, len(row.prompt.replace(" ", ""))] = 0
    torch.testing.assert_close(shift, expected, atol=1e-5, rtol=0)
    assert TASK.erase[0].name not in own[0].prompt.split()


def test_a_kept_result_belongs_to_a_task_with_what_it_retains(model, tmp_path):
    """Classifier guidance learns from images of retained concepts."""
    attack = P4D(images=SAMPLER, optimizer=ADAM)

    def folder(task: UnlearningTask) -> Path:
        return Victim(model, WeightPatch({}), task, rows(), [], 0, tmp_path).folder(attack)

    assert folder(TASK) == folder(replace(TASK)) != folder(replace(TASK, retain=(Concept("w"),)))
