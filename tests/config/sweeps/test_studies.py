"""Optuna studies: objectives, search spaces, storing and resuming."""

import math

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.config.sweeps.commands import metrics
from tests.run.small import at_call, ctrl_c
from unlearning.config.studies import distribution, objective
from unlearning.errors import UserError
from unlearning.methods.uce import UCE

# --- objectives -------------------------------------------------------------------------------------------------------


def test_an_objective_is_the_measured_metric():
    measured = {"efficacy/acc_e": 5.0, "retention/acc_s": 90.0, "efficacy/acc_e/protocol": "argmax", "cost/x": math.nan}
    assert objective(None, measured) is None and objective("efficacy/acc_e", measured) == 5.0
    assert objective(["retention/acc_s", "efficacy/acc_e"], measured) == [90.0, 5.0]
    with pytest.raises(UserError, match=r"ace_e.* Did you mean efficacy/acc_e"):
        objective(["efficacy/ace_e"], measured)
    with pytest.raises(UserError, match="nan"):
        objective("cost/x", measured)


def test_a_mistyped_objective_is_reported_before_a_model_is_loaded(error_of, loads):
    message = error_of("evaluator=accuracy", "objective=[efficacy/acc_e,retention/ac_s]")
    assert "'retention/ac_s'" in message and "Did you mean retention/acc_s" in message and loads() == 0


# --- search spaces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "kind", "expected"),
    [
        ("x=interval(0.1,1)", "FloatDistribution", {"low": 0.1, "high": 1.0, "log": False, "step": None}),
        ("x=int(interval(1,8))", "IntDistribution", {"low": 1, "high": 8, "log": False, "step": 1}),
        ("x=tag(log, interval(1e-5,1e-3))", "FloatDistribution", {"low": 1e-5, "high": 1e-3, "log": True}),
        ("x=int(tag(log, interval(1,64)))", "IntDistribution", {"low": 1, "high": 64, "log": True}),
        ("x=range(2,9,3)", "IntDistribution", {"low": 2, "high": 8, "step": 3}),
        ("x=range(0,1,0.25)", "FloatDistribution", {"low": 0.0, "high": 0.75, "step": 0.25}),
        ("x=choice(a,b)", "CategoricalDistribution", {"choices": ("a", "b")}),
        ("x=1,2", "CategoricalDistribution", {"choices": ("1", "2")}),
        ("x=[a,b],[c]", "CategoricalDistribution", {"choices": ("[a,b]", "[c]")}),
    ],
)
def test_an_override_is_a_distribution(override, kind, expected):
    pytest.importorskip("optuna")
    drawn = distribution(OverridesParser.create().parse_override(override))
    assert type(drawn).__name__ == kind
    assert {name: getattr(drawn, name) for name in expected} == expected


# --- studies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """stored() -> {study's name: its trials}, of all studies in the folder of runs."""
    optuna = pytest.importorskip("optuna")

    def read() -> dict[str, list]:
        place = f"sqlite:///{tmp_path}/runs/studies.db"
        names = optuna.get_all_study_names(place)
        return {name: optuna.load_study(study_name=name, storage=place).trials for name in names}

    return read


@pytest.fixture
def study(sweep, stored):
    """study() -> the trials of the stored study, after the command that searches for UCE's lamb has ended."""

    def call(trials: int) -> list:
        search = ["hydra/sweeper=study", "method=uce", "method.lamb=interval(0.1,1)", "evaluator=clip_score"]
        search += ["stages=[fit,generate,evaluate]"]
        search += ["objective=[efficacy/clip_score_e,fidelity/clip_score]"]
        sweep(*search, "hydra.sweeper.direction=[minimize,maximize]", f"hydra.sweeper.n_trials={trials}")
        [trials_of_it] = stored().values()
        return trials_of_it

    return call


def test_a_study_that_was_interrupted_resumes_to_its_number_of_trials(study, stored, tmp_path, monkeypatch):
    """Of four trials the first fails, and the third is interrupted."""

    def states() -> list[str]:
        [trials] = stored().values()
        return [trial.state.name for trial in trials]

    with monkeypatch.context() as patch:
        at_call(patch, UCE, "fit", 1, lambda: 1 / 0)
        with pytest.raises(SystemExit, match=r"1 job failed(.|\n)*division by zero"):
            study(trials=1)
    assert states() == ["FAIL"]
    with monkeypatch.context() as patch:
        at_call(patch, UCE, "fit", 2, ctrl_c)
        with pytest.raises(SystemExit, match="Interrupted"):
            study(trials=3)
    assert states() == ["FAIL", "COMPLETE", "RUNNING"]
    trials = study(trials=3)
    assert states() == ["FAIL", "COMPLETE", "RUNNING", "COMPLETE"]
    assert trials[3].params == trials[2].params, "the interrupted trial runs first"
    assert [len(trial.values or ()) for trial in trials] == [0, 2, 0, 2]
    assert len(study(trials=3)) == 4, "and does not run again"
    assert len(metrics(tmp_path / "runs")) == 1 and len(list(tmp_path.rglob("metrics.json"))) == 2


def test_a_study_launches_as_many_trials_at_once_as_it_has_jobs(sweep, stored, batches):
    sweep("hydra/sweeper=study", "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=2", "objective=efficacy/acc_e",
          "seed=range(0,9)", "method=uce,none", "concept=cat")  # fmt: skip
    assert [len(jobs) for jobs in batches] == [2, 2, 1]
    [(name, trials)] = stored().items()
    assert name.startswith("esd_x of cat on emoji_unet ")
    assert [trial.value for trial in trials] == [trial.params["seed"] for trial in trials]
    assert {job["method"] for jobs in batches for job in jobs} <= {"uce", "none"}
    assert all(job["concept"] == "cat" for jobs in batches for job in jobs)


def test_another_search_space_is_another_study(sweep, stored, batches):
    def counts(*overrides: str, lamb: str = "interval(0.1,1)", objective: str = "efficacy/acc_e") -> list[int]:
        search = ["method=uce", f"method.lamb={lamb}", f"objective={objective}"]
        sweep("hydra/sweeper=study", "hydra.sweeper.n_trials=1", *search, *overrides)
        return sorted(map(len, stored().values()))

    assert counts() == [1]
    assert counts("logger=csv", "model.gradient_checkpointing=true", "hydra.sweeper.n_trials=2") == [2]
    assert counts(objective="retention/acc_s") == [1, 2]
    assert counts(lamb="interval(0.1,2)") == [1, 1, 2]
    assert counts("seed=1") == [1, 1, 1, 2]


def test_settings_of_a_file_are_searched_too_and_the_command_line_replaces_them(sweep, stored, batches):
    sweep("experiment=tune", "method=esd_x", "hydra.sweeper.n_trials=1", "method.eta=2.0", "objective=efficacy/acc_e",
          "hydra.sweeper.direction=minimize")  # fmt: skip
    [[job]] = batches
    assert job["method.eta"] == "2.0" and 1e-5 <= float(job["method.optimizer.lr"]) <= 1e-3
