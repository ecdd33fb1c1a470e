"""Runs on disk to one table: the arithmetic, the order, the marks."""

import csv
import io
import subprocess
import sys

import pytest

from unlearning.errors import UserError
from unlearning.reporting.grouping import BY
from unlearning.reporting.table import check, table

E, F = "efficacy/acc_e", "fidelity/fid"


def measured(value, protocol="argmax", **more):
    return {E: value, f"{E}/protocol": protocol, f"{E}/better": "lower", f"base/{E}": 100.0} | more


@pytest.fixture
def runs(finished, tmp_path):
    for seed, value in enumerate((4.0, 6.0, 11.0)):
        finished(f"runs/deep/er/esd{seed}", measured(value), seed=seed, method="esd_x")
    for seed, value in enumerate((20.0, 22.0)):
        finished(f"runs/ac{seed}", measured(value, **{F: 7.5}), seed=seed, method="ac")
    finished("runs/none", measured(1.0), method="none")
    return tmp_path / "runs"


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "the source is a table too"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def note(text: str, mark: str) -> str:
    """The footnote of a mark."""
    [found] = [line[2:] for line in text.splitlines() if line.startswith(mark)]
    return found


def test_mean_and_standard_error_over_seeds_the_unedited_first(runs):
    head, *body = cells(table(runs, [E]))
    assert head == ["model", "dataset", "concept", "method", "n", f"{E} ↓¹"]
    assert [row[3:] for row in body] == [
        ["none", "1", "1.0"],  # no error of a single seed, and no prize for not being erased
        ["ac", "2", "21.0 ± 1.0"],
        ["esd_x", "3", "**7.0 ± 2.1**"],  # sd = sqrt(13), se = sqrt(13 / 3)
    ]


def test_csv_keeps_every_digit(runs):
    read = list(csv.DictReader(io.StringIO(table(runs, [E, F], format="csv"))))
    esd = next(row for row in read if row["method"] == "esd_x")
    assert float(esd[E]) == 7.0 and float(esd[f"{E}/se"]) == pytest.approx((13 / 3) ** 0.5)
    assert (esd["n"], esd[f"{E}/protocol"], esd[F]) == ("3", "argmax", "")


def test_the_best_value_is_chosen_among_rows_that_differ_only_in_the_method(finished, runs):
    finished("runs/dog", measured(50.0), concept="dog")
    assert "**50.0**" not in table(runs, [E])
    finished("runs/dog2", measured(60.0), concept="dog", method="ac")
    text = table(runs, [E])
    assert "**50.0**" in text and "**7.0 ± 2.1**" in text


def test_another_protocol_is_marked_and_does_not_compete(finished, runs):
    finished("runs/uce", measured(0.0, "threshold 0.5"), method="uce")
    text = table(runs, [E])
    assert [row[5] for row in cells(text)[1:]] == ["1.0", "21.0 ± 1.0", "**7.0 ± 2.1**", "0.0†"]
    assert "¹ argmax" in text and note(text, "†").startswith(E)
    assert all(words in note(text, "†") for words in ("uce", "threshold 0.5"))


def test_attack_settings_separate_runs_but_the_presence_of_an_attack_does_not(finished, tmp_path):
    for seed, steps in enumerate((None, 10, 10)):
        chosen, attack = ({"attack": ["cce"]}, {"cce": {"steps": steps}}) if steps else ({"attack": []}, {})
        finished(f"runs/{seed}", measured(2.0), seed=seed, chosen=chosen, config={"attack": attack})
    _, row = cells(table(tmp_path / "runs", [E], by=["method"]))
    assert row[:2] == ["esd_x", "3"]
    finished("runs/3", measured(2.0), seed=3, chosen={"attack": ["cce"]}, config={"attack": {"cce": {"steps": 99}}})
    assert cells(table(tmp_path / "runs", [E], by=["method"]))[0][1] == "attack.cce.steps§"


def test_requests_one_after_the_other_are_rows_that_compete(finished, runs):
    for seed in (0, 1):
        first = finished(f"first/{seed}", method="uce", seed=seed)
        finished(f"runs/after{seed}", measured(2.0), method="ac", seed=seed, config={"after": f"{first}/erasure"})
    head, *body = cells(table(runs, [E], by=["method"]))
    assert head[1] == "after§" and ["ac", "cat by uce", "2", "**2.0 ± 0.0**"] in body


def test_the_second_best_is_marked_where_it_is_not_the_last(finished, runs):
    assert "<u>" not in table(runs, [E]), "of two rivals the loser is no second best"
    finished("runs/uce", measured(50.0), method="uce")
    text = table(runs, [E])
    assert "**7.0 ± 2.1**" in text and "<u>21.0 ± 1.0</u>" in text and "<u>50.0" not in text
    finished("runs/mace", measured(7.0), method="mace")
    assert "**7.0**" in table(runs, [E]) and "<u>" not in table(runs, [E]), "two are best: the next is the third"


def test_equal_values_are_not_marked_best(finished, tmp_path):
    for method in ("ac", "esd_x", "uce"):
        finished(f"equal/{method}", measured(0.0), method=method)
    text = table(tmp_path / "equal", [E])
    assert "**" not in text and "<u>" not in text
    finished("equal/mace", measured(5.0), method="mace")
    assert table(tmp_path / "equal", [E]).count("**0.00**") == 3


def test_the_unedited_model_neither_wins_nor_comes_second(finished, runs):
    finished("runs/uce", measured(50.0), method="uce")
    row = next(row for row in cells(table(runs, [E])) if row[3] == "none")
    assert row[-1] == "1.0"
    rates = cells(table(runs, [E], by=["method", "sampler.steps"]))
    assert [row[-1] for row in rates[1:]] == ["1.0", "<u>21.0 ± 1.0</u>", "**7.0 ± 2.1**", "50.0"]


def test_values_of_different_protocols_are_not_averaged_and_the_row_is_marked(finished, tmp_path):
    for seed, (value, protocol) in enumerate([(9.0, "softmax"), (5.0, "argmax"), (7.0, "argmax")]):
        finished(f"mixed/{seed}", measured(value, protocol), seed=seed)
    text = table(tmp_path / "mixed", [E])
    assert cells(text)[1][-1] == "6.00 ± 1.00 (n=2)†" and "softmax | argmax" in note(text, "†")


def test_runs_record_the_direction_of_each_metric(finished, tmp_path):
    for method, value in (("a", 1.0), ("b", 2.0)):
        finished(f"own/{method}", {"efficacy/own": value, "efficacy/own/better": "higher"}, method=method)
    head, *body = cells(table(tmp_path / "own"))
    assert head[-1] == "efficacy/own ↑" and [row[-1] for row in body] == ["1.00", "**2.00**"]


def test_success_rates_of_attacks_are_metrics_like_any_other(finished, tmp_path):
    for method, value in (("uce", 80.0), ("esd_x", 20.0)):
        name = "robustness/asr_cce"
        finished(f"attacked/{method}", {name: value, f"{name}/better": "lower", f"base/{name}": 99.0}, method=method)
    head, *body = cells(table(tmp_path / "attacked"))
    assert head[-1] == "robustness/asr_cce ↓" and {row[3]: row[-1] for row in body}["esd_x"] == "**20.0**"


def test_a_metric_that_some_seeds_lack(finished, runs):
    finished("runs/ac2", measured(24.0, **{F: None}), method="ac", seed=2)
    row = next(row for row in cells(table(runs, [F])) if row[3] == "ac")
    assert row[4:] == ["3", "7.50 ± 0.00 (n=2)"]


def test_runs_of_the_same_images_are_one_run_whatever_they_measured(finished, tmp_path):
    """The same method and seed once without and once with an attack; and a method that was not attacked."""
    cce, said = "robustness/asr_cce", {f"{E}/protocol": "one"}
    for method in ("uce", "esd_x"):
        finished(f"both/{method}", {E: 5.0, **said}, method=method)
    finished("both/attacked", {E: 5.0, cce: 80.0, **said}, method="uce", chosen={"attack": "cce"})
    body = cells(table(tmp_path / "both"))[1:]
    assert {row[3]: row[4] for row in body} == {"uce": "1", "esd_x": "1"} and "‡" not in str(body)
    only = cells(table(tmp_path / "both", ["robustness/*"]))[1:]
    assert [row[3:] for row in only] == [["uce", "1", "80.0"]]

    finished("both/otherwise", {E: 9.0, f"{E}/protocol": "another"}, method="uce", chosen={"evaluator": "other"})
    assert {row[3]: row[4] for row in cells(table(tmp_path / "both"))[1:]}["uce"] == "2‡"


def test_runs_that_share_a_seed_are_distinguished_by_a_setting(finished, runs):
    finished("runs/slow", measured(5.0), method="ac", seed=0, config={"method": {"lamb": 2}})
    text = table(runs, [E])
    assert "3‡" in text and "--by" in text
    body = cells(table(runs, [E], by=("method", "method.lamb")))[1:]
    assert [" ".join(row[:3]) for row in body] == ["none – 1", "ac 2 1", "ac – 2", "esd_x – 3"]


# --- conditions -------------------------------------------------------------------------------------------------------


def test_runs_of_other_steps_are_not_averaged(finished, runs):
    finished("runs/fast", measured(60.0), method="ac", seed=2, steps=20)
    head, *body = cells(table(runs, [E]))
    assert head[3:] == ["method", "sampler.steps§", "n", f"{E} ↓¹"]
    assert [row[3:] for row in body] == [
        ["none", "50", "1", "1.0"],
        ["ac", "20", "1", "60.0"],
        ["ac", "50", "2", "21.0 ± 1.0"],
        ["esd_x", "50", "3", "**7.0 ± 2.1**"],
    ]
    assert "sampler.steps" in note(table(runs, [E]), "§")
    assert "§" not in table(runs, [E], by=["method", "sampler.steps"]), "it was asked for"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sampler.guidance_scale", {"sampler": {"steps": 50, "guidance_scale": 1.0}}),
        ("dataset.images_per_prompt", {"dataset": {"images_per_prompt": 2}}),
        ("model.dtype", {"model": {"dtype": "float16"}}),
    ],
)
def test_methods_under_other_conditions_do_not_compete(finished, tmp_path, name, config):
    usual = {
        "sampler": {"steps": 50, "guidance_scale": 7.5},
        "dataset": {"images_per_prompt": 10},
        "model": {"dtype": "float32"},
    }
    for method, value in (("ac", 3.0), ("esd_x", 4.0)):
        finished(f"runs/{method}", measured(value), method=method, config=usual)
    finished("runs/uce", measured(0.0), method="uce", config=usual | config)
    for by in (["concept", "method"], ["method"]):
        head, *body = cells(table(tmp_path / "runs", [E], by=by))
        assert f"{name}§" in head
        assert {row[by.index("method")]: row[-1] for row in body} == {"ac": "**3.00**", "esd_x": "4.00", "uce": "0.00"}


def test_settings_without_influence_on_images_do_not_separate_runs(finished, runs):
    config = {"sampler": {"steps": 50, "batch_size": 4, "schedule": "paper"}, "model": {"device": "cuda"}}
    finished("runs/other", measured(24.0), method="ac", seed=2, config=config)
    finished("runs/more", measured(22.0), method="ac", seed=3, config={"sampler": {"steps": 50, "batch_size": 8}})
    head, *body = cells(table(runs, [E]))
    assert "§" not in "".join(head) and ["ac", "4"] in [row[3:5] for row in body]


def test_the_fewest_distinguishing_settings_are_shown(finished, runs):
    slow = {"sampler": {"steps": 200, "guidance_scale": 1.0, "schedule": "paper"}}
    finished("runs/other", measured(24.0), method="ac", seed=2, model="sd14", config=slow)
    assert cells(table(runs, [E], by=["method"]))[0][:3] == ["method", "model§", "n"]


def test_runs_of_other_datasets_are_not_averaged(finished, runs):
    finished("runs/painter", measured(60.0), method="ac", seed=2, concept="Van Gogh", dataset="prompt")
    head, *body = cells(table(runs, [E], by=["method"]))
    assert head[:2] == ["method", "dataset§"]
    assert [row[:4] for row in body if row[0] == "ac"] == [
        ["ac", "emoji_objects", "2", "21.0 ± 1.0"],
        ["ac", "prompt", "1", "60.0"],
    ]


@pytest.mark.parametrize("by", [["concept", "method"], ["method"]])
@pytest.mark.parametrize("name", ["path", "count", "subset", "template", "others", "seeds"])
def test_dataset_settings_separate_runs_of_one_concept(finished, tmp_path, name, by):
    for method, value in (("ac", 3.0), ("esd_x", 4.0)):
        finished(f"runs/{method}", measured(value), method=method, config={"dataset": {name: "usual"}})
    for method, value in (("ac", 9.0), ("uce", 0.0)):
        finished(f"runs/other/{method}", measured(value), method=method, seed=1, config={"dataset": {name: "other"}})
    head, *body = cells(table(tmp_path / "runs", [E], by=by))
    assert head[len(by)] == f"dataset.{name}§"
    found = {(row[len(by) - 1], row[len(by)]): row[-1] for row in body}
    assert found == {
        **{("ac", "usual"): "**3.00**", ("esd_x", "usual"): "4.00"},
        **{("ac", "other"): "9.00", ("uce", "other"): "**0.00**"},
    }


@pytest.mark.parametrize("by", [BY, ["method"]])
def test_settings_derived_from_the_concept_do_not_separate_runs(finished, tmp_path, by):
    for concept, other in (("Monet", "Van Gogh"), ("Van Gogh", "Monet")):
        dataset = {"concept": concept, "template": f"a {concept} by {{}}", "others": [other], "path": f"{concept}.csv"}
        for method in ("ac", "esd_x"):
            for seed in (0, 1):
                config = {"dataset": dataset, "method": {"prompt": f"by {concept}"}}
                place = f"runs/{concept}/{method}/{seed}"
                finished(place, measured(5.0), concept=concept, method=method, seed=seed, config=config)
    head, *body = cells(table(tmp_path / "runs", [E], by=by))
    assert head[:-2] == [*by] and [row[-2] for row in body] == (["4", "4"] if by == ["method"] else ["2"] * 4)


# --- a method's settings ----------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(finished, tmp_path):
    """Runs of ESD-X with two settings and different seeds, and of another method."""
    for seed, (eta, value) in enumerate([(1, 8.0), (1, 10.0), (2, 2.0), (2, 4.0)]):
        finished(f"runs/{seed}", measured(value), seed=seed, config={"method": {"eta": eta, "iterations": 100}})
    finished("runs/ac", measured(5.0), method="ac", config={"method": {"iterations": 30}})
    return tmp_path / "runs"


@pytest.mark.parametrize("by", [["concept", "method"], ["method"]])
def test_runs_of_one_method_with_other_settings_are_not_averaged_and_compete(sweep, by):
    text = table(sweep, [E], by=by)
    head, *body = cells(text)
    assert head[len(by) :] == ["method.eta§", "n", f"{E} ↓¹"]
    assert [row[len(by) - 1 :] for row in body] == [
        ["ac", "–", "1", "<u>5.00</u>"],
        ["esd_x", "1", "2", "9.00 ± 1.00"],
        ["esd_x", "2", "2", "**3.00 ± 1.00**"],
    ]
    assert "method.eta" in note(text, "§")
    assert "§" not in table(sweep, [E], by=["method", "method.eta"]), "it was asked for"


def test_settings_that_differ_between_models_or_methods_alone_add_nothing(finished, sweep):
    for i, model in enumerate(("emoji_unet", "emoji_sd3")):
        config = {"method": {"iterations": 100 * (1 + i), "band": [i, 2]}}
        finished(f"models/runs/{model}", measured(5.0), model=model, config=config)
    assert cells(table(sweep.parent / "models", [E], by=["method"]))[0][:3] == ["method", "model§", "n"]
    assert cells(table(sweep.parent / "models", [E]))[0][:-2] == [*BY]


def test_method_settings_including_null_separate_its_runs(finished, tmp_path):
    for seed, name in enumerate(("uniform", "nearest")):
        config = {"method": {"replacement": {"_target_": f"codes.{name}", "sweeps": seed}}}
        finished(f"chosen/{name}", seed=seed, config=config, chosen={"replacement@method.replacement": name})
    head, *body = cells(table(tmp_path / "chosen", [E], by=["method"]))
    assert head[1:3] == ["replacement@method.replacement§", "n"] and [row[1] for row in body] == ["nearest", "uniform"]
    for seed, scheduler in enumerate((None, {"_target_": "torch.LinearLR", "factor": 0.5})):
        finished(f"null/{seed}", seed=seed, config={"method": {"scheduler": scheduler}})
    head, *body = cells(table(tmp_path / "null", [E], by=["method"]))
    assert head[1:3] == ["method.scheduler._target_§", "n"] and [row[1] for row in body] == ["–", "torch.LinearLR"]


def test_training_settings_separate_runs_but_display_settings_do_not(finished, tmp_path):
    for seed, precision in enumerate(("32-true", "32-true", "16-mixed")):
        trainer = {"precision": precision, "enable_progress_bar": bool(seed), "callbacks": [{"folder": seed}]}
        finished(f"runs/{seed}", seed=seed, config={"trainer": trainer})
    head, *body = cells(table(tmp_path / "runs", [E], by=["method"]))
    assert head[1:3] == ["trainer.precision§", "n"]
    assert [row[1:3] for row in body] == [["16-mixed", "1"], ["32-true", "2"]]


# --- several concepts -------------------------------------------------------------------------------------------------

FID = "clean-fid on a judge 1234abcd; images: retain 90 to {count} real ({concept}0)"


def with_fid(value, concept, count=1000):
    protocol = {f"{F}/protocol": FID.format(count=count, concept=concept), f"{F}/better": "lower"}
    return measured(value, **{F: value}, **protocol)


@pytest.fixture
def concepts(finished, tmp_path):
    """Runs of three concepts and three methods; each concept has its own real images for the FID."""
    for concept in ("cat", "key", "ship"):
        for method, value in (("ac", 5.0), ("esd_x", 6.0), ("uce", 7.0)):
            finished(f"runs/{concept}/{method}", with_fid(value, concept), concept=concept, method=method)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("by", "found"), [(["concept", "method"], ["**5.00**", "<u>6.00</u>", "7.00"] * 3), (["method"], None)]
)
def test_a_protocol_by_concept_is_usual_for_each_concept(concepts, by, found):
    text = table(concepts, [F], by=by)
    expected = found or ["**5.00 ± 0.00**", "<u>6.00 ± 0.00</u>", "7.00 ± 0.00"]
    assert [row[-1] for row in cells(text)[1:]] == expected
    shared = "¹ clean-fid on a judge 1234abcd; images: retain 90 to 1000 real (…)"
    assert text.partition("\n\n")[2].strip() == f"{shared}. Of cat: cat0; of key: key0; of ship: ship0", "one note"


@pytest.mark.parametrize("by", [["concept", "method"], ["method"]])
def test_an_unusual_protocol_is_marked_against_those_of_its_concept(finished, concepts, by):
    for concept in ("cat", "key", "ship"):
        finished(f"runs/{concept}/sld", with_fid(0.0, concept, count=500), concept=concept, method="sld")
    text = table(concepts, [F], by=by)
    found = [row[-1] for row in cells(text)[1:]]
    assert {cell[:4] for cell in found if "†" in cell} == {"0.00"} and sum("**" in cell for cell in found) == len(
        found
    ) / 4
    assert note(text, "†").endswith("retain 90 to 500 real (…). Of cat: cat0; of key: key0; of ship: ship0")
    assert ("cat, sld; key, sld; ship, sld: " if len(by) > 1 else "of sld: ") in note(text, "†")


def test_one_concept_with_another_protocol_marks_the_mean(finished, concepts):
    finished("runs/cat/sld", with_fid(0.0, "cat"), concept="cat", method="sld")
    finished("runs/key/sld", with_fid(0.0, "key", count=500), concept="key", method="sld")
    finished("runs/ship/sld", with_fid(0.0, "ship"), concept="ship", method="sld")
    text = table(concepts, [F], by=["method"])
    assert "0.00 ± 0.00†" in text and FID.format(count=500, concept="key") in note(text, "†")


def test_footnotes_stay_few(finished, tmp_path):
    for concept in map("c{}".format, range(12)):
        for method, count in (("ac", 1000), ("esd_x", 1000), ("sld", 500), ("uce", 250)):
            finished(f"runs/{concept}/{method}", with_fid(5.0, concept, count), concept=concept, method=method)
    notes = [line for line in table(tmp_path / "runs", [F]).splitlines() if line and line[0] != "|"]
    assert [note[0] for note in notes] == ["¹", "†"] and "and 18 more" in notes[1]


def test_protocols_of_another_kind_are_shown_in_full(finished, concepts):
    for method in ("ac", "esd_x"):
        finished(f"runs/sd14/{method}", measured(5.0, "softmax of CLIP"), model="sd14", method=method)
    text = table(concepts, [E])
    assert "¹ of emoji_unet: argmax | of sd14: softmax of CLIP" in text and "†" not in text


@pytest.mark.parametrize("gone", [["key"], ["cat", "ship"]])
def test_a_mean_over_other_concepts_is_marked_and_does_not_compete(concepts, gone):
    for concept in gone:
        (concepts / concept / "ac" / "metrics.json").unlink()
    text = table(concepts, [E, F], by=["method"])
    _, ac, esd_x, uce = cells(text)
    assert ac[:2] == ["ac", f"{3 - len(gone)}‖"] and not {"*", "u"} & {*"".join(ac[2:])}
    assert esd_x[1:] == ["3", "**6.00 ± 0.00**", "**6.00 ± 0.00**"] and uce[1] == "3"
    assert f"ac without {', '.join(gone)}" in note(text, "‖")
    assert "‖" not in table(concepts, [E, F], by=["concept", "method"])


def test_a_metric_that_some_concepts_lack_does_not_compete(finished, concepts):
    (concepts / "key" / "ac" / "metrics.json").unlink()
    finished("runs/again/ac", measured(5.0), concept="key", method="ac")
    text = table(concepts, [E, F], by=["method"])
    assert cells(text)[1] == ["ac", "3", "**5.00 ± 0.00**", "5.00 ± 0.00 (n=2)‖"]
    assert f"{F} of ac without key" in text


# --- what it answers --------------------------------------------------------------------------------------------------


def test_the_commits_are_shown_for_the_same_rows(finished, runs):
    finished("runs/fast", measured(60.0), method="ac", seed=2, steps=20)
    named = [[row[:5] for row in cells(text)[1:]] for text in (table(runs, [E]), check(runs)[0])]
    assert named[0] == named[1]


def test_mistakes_are_explained(runs, tmp_path):
    with pytest.raises(UserError, match=f"no/such.*{E}"):
        table(runs, ["no/such"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="evaluate"):
        table(tmp_path / "empty")


@pytest.mark.parametrize("tell", [table, check])
def test_an_unknown_setting_gets_the_nearest_as_suggestion(runs, tell):
    for by, nearest in ((["methd"], "method"), (["method", "sampler.step"], r"sampler\.steps")):
        with pytest.raises(UserError, match=f"{by[-1]} .*mean .?{nearest}"):
            tell(runs, by=by)


def test_from_the_command_line(runs):
    command = [sys.executable, "-m", "unlearning.reporting.table", str(runs), "--metrics"]
    done = subprocess.run([*command, "efficacy/*", "--by", "method"], capture_output=True, text=True, check=True)
    assert done.stdout == table(runs, [E], ["method"])
    wrong = subprocess.run([*command, "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "nothing" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("format", ["markdown", "latex", "html"])
def test_every_format_names_every_protocol(finished, runs, format):
    finished("runs/uce", measured(0.0, "threshold 0.5"), method="uce")
    text = table(runs, [E, F], format=format)
    assert all(protocol in text for protocol in ("argmax", "threshold 0.5")) and "21.0" in text


def test_errors_of_the_command_need_no_heavy_import():
    code = (
        "import sys; sys.argv = ['unlearn-table', '--help']\n"
        "from unlearning.reporting.table import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'hydra', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "--published" in done.stdout


# --- a paper's numbers ------------------------------------------------------------------------------------------------


@pytest.fixture
def paper(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(
        "method,concept,metric,value,source,model,protocol\n"
        f"esd_x,cat,{E},12.51,a paper,emoji_unet,argmax\nesd_x,average,{E},26.93,a paper,emoji_unet,argmax\n"
        f"sld,cat,{E},1,a paper,,\n"
    )
    return path


def test_published_numbers_stand_beside_ours_with_the_difference(runs, paper):
    found = {row[3]: row[-1] for row in cells(table(runs, [E], published=paper))[1:]}
    assert found["esd_x"] == "**7.0 ± 2.1** (12.5, -5.5)" and found["ac"] == "21.0 ± 1.0"
    averaged = {row[0]: row[-1] for row in cells(table(runs, [E], by=["method"], published=paper))[1:]}
    assert averaged["esd_x"] == "**7.0 ± 2.1** (26.9, -19.9)", "without concepts, the paper's average"
    [esd] = [
        r
        for r in csv.DictReader(io.StringIO(table(runs, [E], format="csv", published=paper)))
        if r["method"] == "esd_x"
    ]
    assert float(esd[f"{E}/published"]) == 12.51 and float(esd[f"{E}/delta"]) == pytest.approx(-5.51)
    assert esd[f"{E}/unlike"] == "" and "¶" not in table(runs, [E], published=paper)


def test_an_average_over_other_concepts_is_marked(finished, runs, paper):
    finished("runs/dog", measured(5.0), concept="dog")
    text = table(runs, [E], by=["method"], published=paper)
    assert "over cat, measured over cat, dog" in note(text, "¶")
    assert "¶" not in table(runs, [E], published=paper), "concept by concept there is nothing to say"


def test_the_source_of_published_numbers_is_named(runs, paper):
    assert "a paper" in table(runs, [E], published=paper)
    paper.write_text("method,concept,metric,value,source\nsld,cat,fidelity/fid,1,a paper\n")
    assert "a paper" not in table(runs, [E], published=paper), "of these rows it has none"


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ("sd14,argmax", "sd14, measured on emoji_unet"),
        (",argmax", "the model"),
        ("emoji_unet,", "without a protocol"),
        ("emoji_unet,arg; softmax", "another protocol (arg; softmax)"),
    ],
)
def test_a_number_of_another_model_or_protocol_is_marked(runs, paper, stated, reason):
    paper.write_text(f"method,concept,metric,value,source,model,protocol\nesd_x,cat,{E},12.51,a paper,{stated}\n")
    text = table(runs, [E], published=paper)
    assert "**7.0 ± 2.1** (12.5, -5.5)¶" in text and reason in note(text, "¶")
    assert reason in table(runs, [E], format="csv", published=paper)


def test_a_file_without_model_and_protocol_marks_all_its_numbers(runs, paper):
    paper.write_text(f"method,concept,metric,value,source\nesd_x,cat,{E},1,a paper\nac,cat,{E},2,a paper\n")
    text = table(runs, [E], published=paper)
    assert text.count("¶") == 3, "two numbers and one note"
    assert all(reason in note(text, "¶") for reason in ("the model", "without a protocol"))


def test_published_numbers_that_do_not_compare_are_named(runs, paper):
    lines = [f"esd_x,cat,{E},1,a paper,emoji_unet,argmax", f"ac,cat,{E},2,a paper,sd14,argmax"]
    paper.write_text("\n".join(["method,concept,metric,value,source,model,protocol", *lines, ""]))
    text = table(runs, [E], published=paper)
    assert f"{E} of emoji_unet, emoji_objects, cat, ac: " in note(text, "¶") and "esd_x" not in note(text, "¶")
