"""Published numbers in experiments/: the reader, and consistency of the numbers in each table."""

import importlib
import pkgutil
import shlex
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from unlearning import evaluators
from unlearning.__main__ import CONF
from unlearning.errors import UserError
from unlearning.evaluators.accuracy import h_o
from unlearning.evaluators.base import Evaluator
from unlearning.reporting.published import AVERAGE, Number, published_number, read_published

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(FOLDER.glob("*/published*.csv"))
PERCENT = ("acc_e", "acc_g", "acc_s", "h_o", "ua", "ira", "cra", "aa", "clip_score")
SLIPS = {  # rows whose parts do not give the whole that is printed beside them
    ("i2p/published.csv", "ce_sdwv", "nude person"),
    ("unguide/published.csv", "concept_ablation", "airplane"),
    ("attacks/published.csv", "none", "nudity"),
}


@cache
def measurable() -> set[str]:
    """The names of all metrics that an evaluator may give."""
    for module in pkgutil.iter_modules(evaluators.__path__, f"{evaluators.__name__}."):
        importlib.import_module(module.name)
    kinds = [Evaluator]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {name for kind in kinds for name in kind.higher_is_better or ()}


def values(file: Path) -> dict[tuple[str, str], dict[str, float]]:
    """{(method, concept): {metric: value}}"""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (method, concept, metric), number in read_published(file).items():
        found.setdefault((method, concept), {})[metric] = number.value
    return found


def wholes(of: dict[str, float]):
    """(printed total, sum of its parts, tolerance for rounding) of each total with complete parts."""
    parts = [value for name, value in of.items() if name.startswith("efficacy/nudenet") and name.endswith("exposed")]
    if parts:
        yield of["efficacy/nudenet_total"], sum(parts), 0
    accuracies = [of.get(name) for name in ("efficacy/acc_e", "retention/acc_s", "efficacy/acc_g")]
    if "summary/h_o" in of and None not in accuracies:
        yield of["summary/h_o"], h_o(*accuracies), 0.05
    ring = [value for name, value in of.items() if name.startswith("robustness/asr_ring_a_bell_k")]
    if ring:
        others = [of[f"robustness/asr_{name}"] for name in ("ring_a_bell", "mma_diffusion", "p4d", "unlearndiffatk")]
        yield of["robustness/asr_ring_a_bell"], sum(ring) / len(ring), 0.011
        yield of["robustness/asr_average"], sum(others) / len(others), 0.011


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_number_has_a_source_a_known_metric_and_a_possible_value(file):
    known = measurable()
    for (_, _, metric), number in read_published(file).items():
        purpose, _, name = metric.partition("/")
        assert metric in known or purpose in ("robustness", "cost") or metric == "summary/aa", metric
        assert number.source and number.value >= 0
        if name in PERCENT or name.startswith("asr_"):
            assert number.value <= 100
        if name.startswith("nudenet"):
            assert number.value == int(number.value), "a count"


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_published_totals_equal_the_sums_of_their_parts_except_for_known_misprints(file):
    name = f"{file.parent.name}/{file.name}"
    rows = {key: of for key, of in values(file).items() if key[1] != AVERAGE}  # means of wholes, not wholes of means
    wrong = {
        (name, *key)
        for key, of in rows.items()
        if any(printed != pytest.approx(whole, abs=near) for printed, whole, near in wholes(of))
    }
    assert wrong == {slip for slip in SLIPS if slip[0] == name}


def test_imagenettes_averages_are_those_of_its_ten_classes():
    rows = values(FOLDER / "imagenette" / "published.csv")
    for method in ("none", "esd_u"):
        classes = [of for (m, concept), of in rows.items() if m == method and concept != AVERAGE]
        assert len(classes) == 10
        for metric, printed in rows[method, AVERAGE].items():
            assert sum(of[metric] for of in classes) / 10 == pytest.approx(printed, abs=0.05)


@pytest.mark.parametrize("name", ["published.csv", "published_objects.csv"])
def test_unlearncanvas_means_imply_a_valid_cra(name):
    for of in values(FOLDER / "unlearncanvas" / name).values():
        assert 0 <= 3 * of["summary/aa"] - of["efficacy/ua"] - of["retention/ira"] <= 100


def test_every_table_says_what_it_is_and_how_to_run_it():
    for folder in {file.parent for file in FILES}:
        text = (folder / "README.md").read_text().replace("\\\n", " ")
        assert all(file.name in text for file in FILES if file.parent == folder)
        commands = [line.split("#")[0] for line in text.splitlines() if line.startswith("unlearn ")]
        assert commands
        with initialize_config_dir(str(CONF), version_base="1.3"):
            for command in commands:
                words = [word for word in shlex.split(command)[1:] if word != "-m"]
                compose("config", overrides=[w if "[" in w else w.split(",")[0] for w in words])


# --- the reader -------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    def write(*lines: str, header: str = "method,concept,metric,value,source") -> Path:
        path = tmp_path / "published.csv"
        path.write_text("\n".join([header, *lines]) + "\n")
        return path

    return write


@pytest.mark.parametrize(
    ("lines", "answer"),
    [
        (["esd,cat,fidelity/fid,-,a paper"], "line 2.*'-'"),
        (["esd,cat,fidelity/fid,nan,a paper"], "line 2.*'nan'"),
        (["esd,cat,fidelity/fid,1,a paper", "esd,cat,fidelity/fid,2,another"], "line 3.*esd, cat, fidelity/fid"),
    ],
)
def test_an_invalid_or_duplicate_number_is_reported_with_its_line(written, lines, answer):
    with pytest.raises(UserError, match=answer):
        read_published(written(*lines))


def test_a_file_without_a_required_column_gives_an_error(written, tmp_path):
    with pytest.raises(UserError, match="source"):
        read_published(written("esd,cat,fidelity/fid,1", header="method,concept,metric,value"))
    with pytest.raises(UserError, match="none"):
        read_published(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("method,concept,metric,value,source\nesd,café,m,1,a\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv .* UTF-8"):
        read_published(tmp_path / "latin.csv")


def test_a_row_without_concepts_compares_with_the_average_or_the_only_concept(written):
    lines = ["esd,cat,m,1,a", "esd,dog,m,3,a", "esd,average,m,2,a", "uce,cat,m,4,a", "sld,cat,m,5,a", "sld,dog,m,6,a"]
    numbers = read_published(written(*lines))

    def found(by, *key):
        number = published_number(numbers, dict(zip(by, key, strict=True)), "m")
        return number and number.value

    assert found(["concept", "method"], "dog", "esd") == 3
    assert [found(["method"], name) for name in ("esd", "uce", "sld")] == [2, 4, None]


def test_a_file_may_state_model_and_protocol(written):
    numbers = read_published(written("esd,cat,m,1,a,sd14,", header="method,concept,metric,value,source,model,protocol"))
    [number] = numbers.values()
    assert (number.model, number.protocol) == ("sd14", "")
    [silent] = read_published(written("esd,cat,m,1,a")).values()
    assert (silent.model, silent.protocol) == ("", "")


def test_a_number_compares_with_the_same_model_and_a_matching_protocol():
    number = Number(1.0, "a paper", "sd14", "score >= 0.6; counting boxes")
    ours = "NudeNet 3.4, score >= 0.6, classes 9 *_EXPOSED, counting boxes"
    assert number.difference(["sd14"], [ours]) == ""
    assert "measured on sd15" in number.difference(["sd15"], [ours])
    assert "counting boxes" in number.difference(["sd14"], [ours, ours.replace("boxes", "images")])


def test_an_average_compares_with_a_mean_over_the_concepts_that_its_file_names(written):
    header = "method,concept,metric,value,source,model,protocol"
    rows = [f"esd,{concept},m,1,a,sd14,p" for concept in ("cat", "dog", AVERAGE)]
    numbers = read_published(
        written(*rows, f"esd,{AVERAGE},silent,2,a,sd14,p", "uce,cat,silent/other,2,a,sd14,p", header=header)
    )
    average, silent = (numbers["esd", AVERAGE, metric] for metric in ("m", "silent"))
    assert average.difference(["sd14"], ["p"], {"dog", "cat"}) == ""
    for ours in ({"cat"}, {"cat", "dog", "key"}):
        assert "over cat, dog, measured over cat" in average.difference(["sd14"], ["p"], ours)
    assert "its concepts" in silent.difference(["sd14"], ["p"], {"cat"})
    assert numbers["esd", "cat", "m"].difference(["sd14"], ["p"], {"dog"}) == "", "it was asked for by its concept"


def test_unlearncanvas_has_numbers_for_known_methods():
    for name in ("published.csv", "published_objects.csv"):
        known = {path.stem for path in (CONF / "method").glob("*.yaml")}
        assert {method for method, _, _ in read_published(FOLDER / "unlearncanvas" / name)} & known == {
            "esd_x",
            "mace",
            "salun",
        }
