"""Sweeps that learn: objectives, and studies that are kept."""

import math

import pytest

from tests.config.sweeps.commands import metrics
from tests.run.small import at_call, ctrl_c
from unlearning.config.sweeps import objective
from unlearning.errors import UserError
from unlearning.methods.uce import UCE

# --- objectives -------------------------------------------------------------------------------------------------------


def test_an_objective_is_what_was_measured():
    measured = {"efficacy/acc_e": 5.0, "retention/acc_s": 90.0, "efficacy/acc_e/protocol": "argmax", "cost/x": math.nan}
    assert objective(None, measured) is None and objective("efficacy/acc_e", measured) == 5.0
    assert objective(["retention/acc_s", "efficacy/acc_e"], measured) == [90.0, 5.0]
    with pytest.raises(UserError, match="Did you mean efficacy/acc_e"):
        objective(["efficacy/ace_e"], measured)
    with pytest.raises(UserError, match="no sweeper can learn"):
        objective("cost/x", measured)


def test_a_mistyped_objective_is_told_before_a_model_is_loaded(told, loads):
    said = told("evaluator=accuracy", "objective=[efficacy/acc_e,retention/ac_s]")
    assert "'retention/ac_s' is no metric of this run. Did you mean retention/acc_s" in said and loads() == 0


# --- studies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(sweep, tmp_path):
    """study() -> the stored study, after the command that searches for UCE's lamb has ended, or was interrupted."""
    optuna = pytest.importorskip("optuna")

    def call(*overrides: str, trials: int = 4) -> "optuna.Study":
        search = ["hydra/sweeper=study", "method=uce", "method.lamb=interval(0.1,1)", "evaluator=clip_score"]
        search += ["objective=[efficacy/clip_score_e,fidelity/clip_score]"]
        sweep(*search, "hydra.sweeper.direction=[minimize,maximize]", f"hydra.sweeper.n_trials={trials}", *overrides)
        return stored()

    def stored() -> "optuna.Study":
        [summary] = optuna.get_all_study_summaries(f"sqlite:///{tmp_path}/runs/studies.db")
        return optuna.load_study(summary.study_name, f"sqlite:///{tmp_path}/runs/studies.db")

    call.stored = stored
    return call


def test_a_study_that_was_interrupted_goes_on_to_its_number_of_trials(study, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, UCE, "fit", 3, ctrl_c)
        with pytest.raises(SystemExit, match="Interrupted"):
            study()
    interrupted = study.stored().trials
    assert [trial.state.name for trial in interrupted] == ["COMPLETE", "COMPLETE", "RUNNING"]
    trials = study().trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "RUNNING", "COMPLETE", "COMPLETE"]
    assert trials[3].params == interrupted[2].params, "what was interrupted is made first"
    assert all(len(trial.values) == 2 for trial in trials if trial.state.name == "COMPLETE")
    assert len(study().trials) == 5, "and is not made again"
    assert len(metrics(tmp_path / "runs")) == 1 and len(list(tmp_path.rglob("metrics.json"))) == 4


def test_a_search_for_something_else_is_another_study(sweep, tmp_path):
    optuna = pytest.importorskip("optuna")

    def trials(*overrides: str, lamb: str = "interval(0.1,1)", objective: str = "efficacy/clip_score_e") -> list[int]:
        search = ["method=uce", f"method.lamb={lamb}", f"objective={objective}", "evaluator=clip_score"]
        sweep("hydra/sweeper=study", "hydra.sweeper.n_trials=1", *search, *overrides)
        studies = optuna.get_all_study_summaries(f"sqlite:///{tmp_path}/runs/studies.db")
        assert all(study.study_name.startswith("uce of cat on emoji_unet ") for study in studies)
        return sorted(study.n_trials for study in studies)

    assert [trials(), trials("logger=csv")] == [[1], [1]]
    assert trials(objective="fidelity/clip_score") == [1, 1]
    assert trials(lamb="interval(0.1,2)") == [1, 1, 1]
    assert trials("seed=1") == [1, 1, 1, 1]
    assert trials("hydra.sweeper.n_trials=2") == [1, 1, 1, 2]


def test_a_job_that_fails_fails_its_trial(study, tmp_path, monkeypatch):
    at_call(monkeypatch, UCE, "fit", 1, lambda: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        study(trials=2)
    assert "1 job failed" in caught.value.code and "division by zero" in caught.value.code
    assert [(trial.state.name, trial.values is None) for trial in study.stored().trials] == [
        ("FAIL", True), ("COMPLETE", False)
    ]  # fmt: skip
