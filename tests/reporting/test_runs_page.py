"""The page of many runs: numbers of the table, images of the runs, and its functions in a real browser."""

import csv
import re
import shutil
from html import unescape
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from tests.reporting.browser import BROWSER, MISSING, Browser
from unlearning.errors import UserError
from unlearning.reporting import runs_page
from unlearning.reporting.comparison import Comparison
from unlearning.reporting.page_images import samples
from unlearning.reporting.plots import HEIGHT, LETTER, LINE, WIDTH, Axis, Plot, Point
from unlearning.reporting.runs import read_runs
from unlearning.reporting.runs_page import main, page
from unlearning.store.manifest import read_manifest

E, R, H = "efficacy/acc_e", "retention/acc_s", "summary/h_o"
NASTY = "a <script>alert('cat')</script> & \"friends\""


def image_groups(concept):
    return [
        (f"a photo of the {concept}", "erase", concept, 3),
        (NASTY, "synonym", concept, 2),
        ("a photo of a lorry", "retain", "truck", 1),
        ("a photo of a bus", "retain", "bus", 1),
        ("a photo of a van", "retain", "van", 1),
    ]


def measured(e, r, protocol="argmax", **more):
    both = {E: e, R: r, H: (100 - e + r) / 2}
    better = {f"{E}/better": "lower", f"{R}/better": "higher", f"{H}/better": "higher"}
    before = {f"base/{E}": 98.0, f"base/{R}": 99.0, f"base/{H}": 50.5}
    costs = {"cost/seconds": 90.0 + e, "cost/denoiser_evaluations": 1360, "cost/artefact_bytes": 2_270_200}
    return both | better | before | {f"{name}/protocol": protocol for name in both} | costs | more


@pytest.fixture(scope="module")
def template(finished_in, tmp_path_factory):
    """Two concepts, three methods, two seeds; esd_x left its losses, and no run is of the unedited model."""
    folder = tmp_path_factory.mktemp("template")
    values = {"esd_x": (4.0, 90.0), "uce": (30.0, 96.0), "ac": (40.0, 85.0)}
    for concept in ("cat", "dog"):
        for method, (e, r) in values.items():
            for seed in (0, 1):
                worse = seed + (concept == "dog")
                run = finished_in(
                    folder, f"{concept}/{method}/{seed}", measured(e + worse, r - 2 * worse), image_groups(concept),
                    concept=concept, method=method, seed=seed,
                )  # fmt: skip
                if method == "esd_x":
                    losses(run)
    return folder


@pytest.fixture
def runs(template, tmp_path):
    """A copy of the template, to be changed."""
    shutil.copytree(template, tmp_path / "runs")
    return tmp_path / "runs"


def losses(run: Path, steps=300):
    log = run / "logs" / "csv" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    with log.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train/loss", E])
        writer.writerows([0, step, 1 / (1 + step), ""] for step in range(steps))
        writer.writerow(["", 0, "", 4.0])


def scopes(text: str) -> dict[str, str]:
    """The HTML of each scope, by concept."""
    parts = re.split(r'<section class="scope(?: all)?" data-concept="([^"]*)"', text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def said(text: str) -> str:
    """HTML as it is read."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>|\s+", " ", text)))


def cells(text: str) -> dict[str, list[str]]:
    """The rows of the first table of numbers, by the name that they have."""
    body = re.search(r'<table class="numbers">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)[1]
    plain = [
        [unescape(re.sub(r"<sup>.*?</sup>|<small>.*?</small>|<[^>]+>", "", cell)).strip() for cell in row]
        for row in (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL) for line in body.split("</tr>")[:-1])
    ]
    return {name: numbers for name, *numbers in plain}


# --- without a browser ------------------------------------------------------------------------------------------------


def test_the_numbers_are_the_tables(runs):
    shown = scopes(page(runs).read_text())
    assert list(shown) == ["", "cat", "dog"]
    for concept, text in shown.items():
        own = [run for run in read_runs(runs) if concept in ("", run.concept)]
        table = Comparison(own, ["method"], [H, E, R]).table
        found = cells(text)
        assert list(found) == ["none", *(line[0].text for line in table.lines)], "the unedited model first"
        for name, *numbers in table.lines:
            assert found[name.text] == [cell.text for cell in numbers]
    assert cells(shown["cat"])["esd_x"][2:] == ["4.5 ± 0.5", "89.0 ± 1.0"]
    assert 'class="best">4.5 ± 0.5' in shown["cat"] and 'class="second">30.5 ± 0.5' in shown["cat"]


def test_the_unedited_model_is_shown_without_a_run_of_its_own(finished, runs):
    assert cells(scopes(page(runs).read_text())["cat"])["none"] == ["2", "50.5 ± 0.0", "98.0 ± 0.0", "99.0 ± 0.0"]
    finished("runs/none", measured(97.0, 99.5), image_groups("cat"), method="none")
    shown = scopes(page(runs).read_text())
    assert cells(shown["cat"])["none"] == ["1", "51.2", "97.0", "99.5"]
    assert cells(shown["dog"])["none"][0] == "2" and cells(shown[""])["none"][0] == "3"


def test_a_mean_over_fewer_concepts_says_so(finished, runs):
    assert "of 2 concepts" not in page(runs).read_text()
    finished("runs/cat/sld", measured(1.0, 99.0), image_groups("cat"), method="sld")
    shown = scopes(page(runs).read_text())
    assert "1 of 2 concepts" in shown[""] and "of 2 concepts" not in shown["cat"]
    assert cells(shown[""])["none"][0] == "4", "the unedited model's are of both"


def test_a_mean_over_fewer_concepts_is_excluded_from_the_answers(finished, runs):
    finished("runs/cat/sld", measured(1.0, 99.0), image_groups("cat"), method="sld")
    shown = scopes(page(runs).read_text())
    assert "forgets most esd_x acc_e" in said(shown[""]) and "forgets most sld acc_e" in said(shown["cat"])
    assert 'class="best">1.0' in shown["cat"] and 'class="best">5.0' in shown[""]
    aside = r'class="point aside"[^>]*aria-label="sld'
    assert re.search(aside, shown[""]) and not re.search(aside, shown["cat"])
    assert "sld without dog" in shown[""] and "without dog" not in shown["cat"]


def test_a_mean_over_protocols_by_concept_competes(finished, tmp_path):
    for concept in ("cat", "dog"):
        for method, value in (("uce", 3.0), ("ac", 4.0)):
            protocol = f"real ({concept}0)"
            metrics = measured(value, 90.0, protocol, **{f"base/{name}/protocol": protocol for name in (E, R, H)})
            finished(f"all/{concept}/{method}", metrics, image_groups(concept), concept=concept, method=method)
    text = scopes(page(tmp_path / "all").read_text())[""]
    assert 'class="best">3.0 ± 0.0' in text and "†" not in text and "real (…). Of cat: cat0; of dog: dog0" in text


def test_methods_under_other_conditions_are_excluded_from_the_answers(finished, runs):
    for concept in ("cat", "dog"):
        finished(
            f"runs/{concept}/fast", measured(0.0, 99.9), image_groups(concept), method="sld", steps=20, concept=concept
        )
    for text in scopes(page(runs).read_text()).values():
        assert "forgets most esd_x acc_e" in said(text) and "before 98.0" in said(text)
        assert re.search(r'class="point aside"[^>]*aria-label="sld, steps 20', text)


def test_the_student_is_shown_for_a_method_and_not_for_the_unedited_model(finished, tmp_path):
    for seed, name in enumerate(("lora", "full")):
        chosen = {"student@method.student": name}
        metrics = measured(5.0 - seed, 80.0)
        finished(f"all/{name}", metrics, image_groups("cat"), method="scrubber", seed=seed, chosen=chosen)
    text = page(tmp_path / "all").read_text()
    assert [*cells(text)] == ["none", "scrubber, student full", "scrubber, student lora"]
    assert cells(text)["none"][0] == "2" and 'class="best">4.0' in text


def test_the_answers_come_first(runs):
    text = said(scopes(page(runs).read_text())["cat"])
    assert "forgets most esd_x acc_e 4.5 ± 0.5, before 98.0 ± 0.0" in text
    assert "harms least of those that forget uce acc_s 95.0 ± 1.0, before 99.0 ± 0.0" in text
    assert "cheapest of those that forget esd_x 1.57 ± 0.01 min" in text


def test_one_file_and_nothing_of_the_runs_is_executed(runs):
    text = page(runs).read_text()
    assert text.count("<script") == 2 and NASTY in unescape(text)
    assert not re.search(r'(src|href)="(?!data:)', text) and "url(" not in text and "@import" not in text
    assert text.count('src="data:image/webp;base64,') > 20


def test_settings_that_differ_besides_the_seed_are_shown(finished, runs):
    for steps in (20, 100):
        finished(f"runs/sweep{steps}", measured(5.0, 80.0), image_groups("cat"), method="sld", steps=steps)
    found = cells(scopes(page(runs).read_text())["cat"])
    assert {"sld, steps 20", "sld, steps 100", "uce"} <= set(found) and found["uce"][0] == "2"


def test_settings_that_decide_no_result_are_not_shown(finished, runs):
    config = {"sampler": {"steps": 50, "batch_size": 4}, "trainer": {"enable_progress_bar": False}}
    finished("runs/cat/quiet", measured(6.0, 90.0), image_groups("cat"), method="uce", seed=2, config=config)
    assert cells(scopes(page(runs).read_text())["cat"])["uce"][0] == "3"


def test_methods_under_other_conditions_are_named_and_do_not_compete(finished, runs):
    finished("runs/cat/fast", measured(0.0, 99.9), image_groups("cat"), method="sld", steps=20)
    text = scopes(page(runs).read_text())["cat"]
    assert {"sld, steps 20", "uce"} <= set(cells(text))
    assert 'best">4.5 ± 0.5' in text and 'best">0.0' not in text


def test_the_same_prompt_and_seed_before_and_after_each_method(runs):
    rows = {(run["method"],): [run] for run in read_runs(runs / "cat") if run["seed"] == 0}
    found = samples(rows, count=5)
    assert [sample.role for sample in found] == ["erase", "erase", "synonym", "retain", "retain"]
    assert [sample.prompt for sample in found[3:]] == ["a photo of a lorry", "a photo of a bus"], "spread over three"
    for key, [run] in rows.items():
        manifest = {row.path: row for row in read_manifest(run.folder / "images" / "erased.csv")}
        for sample in found:
            mine = manifest[sample.after[key].resolve()]
            assert (mine.prompt, mine.role) == (sample.prompt, sample.role)
    assert found[0].before.name == "0-0.png" and found[1].before.name == "0-1.png"
    assert len(samples(rows, count=1)) == 1 and samples(rows, count=0) == []


def test_attacked_images_stand_below_before_and_after(finished, runs):
    for method in ("sld", "mace"):
        attacks = {"cce": f"an attack on {method}"}
        finished(f"runs/cat/{method}", measured(5.0, 99.0), image_groups("cat"), method=method, attacks=attacks)
    text = scopes(page(runs).read_text())["cat"]
    [row] = re.findall(r"<tr><td>(?:(?!</tr>).)*attack on(?:(?!</tr>).)*</tr>", text, re.DOTALL)
    assert "attacked by cce" in text and row.count("<img") == 3 and row.count("not drawn") == 3


def test_each_attack_has_a_bar_for_every_method_and_the_controls_come_first(finished, runs):
    for method, asr in {"none": 90.0, "oracle": 10.0, "receler": 60.0}.items():
        attacked = {f"robustness/asr{kind}_cce": asr for kind in ("", "_before", "_new")}
        finished(f"runs/cat/{method}", measured(4.0, 90.0, **attacked), image_groups("cat"), method=method)
    text = scopes(page(runs).read_text())["cat"]
    [bars] = re.findall(r'<figure class="panel bars">(.*?)</figure>', text, re.S)
    assert re.findall(r'data-method="(\w+)"', bars) == ["none", "oracle", "receler"]
    assert re.findall(r"width: ([\d.]+)%", bars) == ["90.0", "10.0", "60.0"]


def test_a_setting_with_three_values_is_a_curve(finished, runs):
    for steps in (10, 100, 1000):
        config = {"method": {"iterations": steps}}
        finished(f"runs/cat/{steps}", measured(steps / 10, 90.0), image_groups("cat"), method="relearn", config=config)
    text = scopes(page(runs).read_text())["cat"]
    curves = re.findall(r'<figure class="panel course">(.*?)</figure>', text, re.S)
    assert len(curves) == 2, "of what is forgotten, and of what is kept"
    assert 'points="0.0,100.0 50.0,90.9 100.0,0.0 "' in curves[0], "on a logarithmic axis"


def test_a_broken_run_is_named_and_the_page_is_still_written(runs, caplog):
    (runs / "cat" / "uce" / "0" / "metrics.json").write_text("")
    assert cells(scopes(page(runs).read_text())["cat"])["uce"][0] == "1"
    assert "cat/uce/0" in caplog.text


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "path,prompt,role,seed\n,,,\n", "path,prompt,role\nx,y,z\n", "\xff"])
def test_a_damaged_manifest_is_named_and_the_page_is_still_written(runs, caplog, content):
    whole = page(runs).read_text()
    for concept, name in (("cat", "base"), ("dog", "erased")):
        (runs / concept / "ac" / "0" / "images" / f"{name}.csv").write_bytes(content.encode("latin-1"))
    text = page(runs).read_text()
    assert text.count("<img") < whole.count("<img") and cells(scopes(text)["cat"])["ac"][0] == "2"
    assert scopes(text)["cat"].count("<img") == scopes(whole)["cat"].count("<img"), "other runs have the base's too"
    assert "cat/ac/0/images/base.csv" in caplog.text and "dog/ac/0/images/erased.csv" in caplog.text


def test_damaged_losses_are_named_and_the_page_is_still_written(runs, caplog):
    [log] = (runs / "cat" / "esd_x" / "0").glob("logs/csv/*/metrics.csv")
    log.write_bytes(b"step,train/loss\n1,2\n\xff")
    assert cells(scopes(page(runs).read_text())["cat"])["esd_x"][0] == "2"
    assert str(log) in caplog.text


def test_prompts_may_be_long(runs):
    for manifest in runs.rglob("images/*.csv"):
        manifest.write_text(manifest.read_text().replace("a photo of a lorry", "lorry " * 40_000))
    assert "lorry lorry" in page(runs).read_text()


def test_the_page_stays_small(runs, monkeypatch):
    everything = page(runs).read_text().count("<img")
    monkeypatch.setattr(runs_page, "IMAGES", 8)
    assert page(runs).read_text().count("<img") < everything / 2
    monkeypatch.setattr(runs_page, "IMAGES", 3)
    assert "<img" not in page(runs).read_text()


def test_missing_images_and_manifests_are_tolerated(runs):
    (runs / "cat" / "uce" / "0" / "images" / "erased.csv").unlink()
    for row in read_manifest(runs / "cat" / "esd_x" / "0" / "images" / "erased.csv"):
        row.path.unlink()
    text = scopes(page(runs).read_text())["cat"]
    assert "missing</span>" in text and "not drawn</span>" in text


def test_learning_curves_and_runs_without_one(runs):
    text = page(runs).read_text()
    assert text.count("<polyline") == 4 and text.count('<figure class="panel"') == 1
    points = re.search(r'<polyline data-concept="cat" points="([^"]+)"', text)[1].split()
    assert len(points) == 60 and float(points[0].split(",")[1]) == 0 and float(points[-1].split(",")[1]) == 100
    assert "300 steps" in text and "ac, uce: " in text


def test_another_protocol_does_not_compete(finished, runs):
    finished("runs/odd", measured(0.0, 99.9, "softmax"), image_groups("cat"), method="odd")
    text = scopes(page(runs).read_text())["cat"]
    assert re.search(r'class="point aside"[^>]*aria-label="odd', text)
    assert 'best">0.0' not in text and "odd: softmax" in unescape(text)


def test_potentially_explicit_images_are_blurred(finished, runs):
    assert "veiled" not in page(runs).read_text().partition("<main>")[2]
    finished("runs/n", measured(1, 1, **{"efficacy/nudenet_rate": 1.0}), image_groups("cat"), dataset="i2p")
    assert page(runs).read_text().partition("<main>")[2].count("samples veiled") == 1


def test_from_the_command_line(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["unlearn-report", str(runs), "--to", str(tmp_path / "pages" / "mine.html")])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "pages" / "mine.html")
    assert (tmp_path / "pages" / "mine.html").read_text() == page(runs).read_text()
    monkeypatch.setattr("sys.argv", ["unlearn-report", str(tmp_path / "pages")])
    with pytest.raises(SystemExit, match="evaluate"):
        main()


def test_a_single_run_has_a_page_of_its_own(runs):
    with pytest.raises(UserError, match="is a run"):
        page(runs / "cat" / "uce" / "0")


# --- the front --------------------------------------------------------------------------------------------------------


def plot(*values, higher=(False, True)):
    return Plot.of([Point(str(i), "m", *v) for i, v in enumerate(values)], ("x", "y"), higher)


def test_the_pareto_front_has_all_undominated_points():
    found = plot((0, 90), (5, 95), (6, 94), (50, 99), (50, 80))
    assert [point.label for point in found.front] == ["3", "1", "0"], "from the least forgotten to the most"
    assert [p.label for p in plot((0, 90), (5, 95), higher=(True, True)).front] == ["1"]
    assert [p.label for p in plot((1, 1), (1, 1)).front] == ["0", "1"], "equals do not beat each other"


def test_the_front_is_drawn_as_a_staircase_that_only_falls():
    steps = plot((0, 90), (5, 95), (50, 99)).steps
    assert steps[0][0] == 0 and steps[-1][1] == 0
    for (x1, y1), (x2, y2) in pairwise(steps):
        assert (x1 == x2 and y2 <= y1) or (y1 == y2 and x2 >= x1)


def test_names_of_points_that_lie_close_do_not_cover_each_other():
    """Five in the best corner, as of a sweep of good methods."""
    near = {
        "scrubber": (5, 99.1),
        "scrubber_lora": (0, 97.2),
        "unguide": (0, 97.9),
        "esd_x": (0, 98.8),
        "esd_u": (0, 95),
    }
    points = [Point(name, name, *at) for name, at in (near | {"none": (100, 70)}).items()]
    found, boxes = Plot.of(points, ("x", "y"), (False, True)), []
    for point, anchor, dx, dy in found.labels:
        (across, up), width = found.at(point), LETTER * len(point.label)
        left = across / 100 * WIDTH + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, left + width, (1 - up / 100) * HEIGHT + dy))
    assert len(boxes) == 6
    for (left, right, y), (other_left, other_right, other_y) in combinations(boxes, 2):
        assert right <= other_left or other_right <= left or abs(y - other_y) >= LINE


def test_better_is_further_along_an_axis():
    axis = Axis.over("acc_e", [(0.0, 0.0), (100.0, 1.0)], higher_is_better=False)
    assert 0 < axis.at(100.0) < axis.at(0.0) < 100
    assert [text for text, _ in axis.ticks] == ["0", "50", "100"]
    assert Axis.over("same", [(3.0, 0.0)], higher_is_better=True).at(3.0) == 50


# --- in a browser -----------------------------------------------------------------------------------------------------

VISIBLE = "[...document.querySelectorAll('{}')].filter(e => e.getClientRects().length)"
ORDER = VISIBLE.format(".scope:not(.brief) .numbers tbody th") + ".slice(0, 4).map(e => e.dataset.value)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip(MISSING)
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def opened(browser, runs):
    browser.open(page(runs))
    yield browser
    assert browser.complaints == []
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}


def test_in_a_browser_it_sorts_by_click_and_by_key(opened):
    head = f'.scope.all [data-sort="{R}"]'
    sorting = f"document.querySelector('{head}').getAttribute('aria-sort')"
    assert (opened.tell(ORDER), opened.tell(sorting)) == (["none", "ac", "esd_x", "uce"], "none")
    opened.click(f"{head} button")
    assert (opened.tell(ORDER), opened.tell(sorting)) == (["none", "uce", "esd_x", "ac"], "descending")
    assert opened.tell("location.hash") == f"#sort=-{R}"
    opened.click(f"{head} button")
    assert (opened.tell(ORDER), opened.tell(sorting)) == (["none", "ac", "esd_x", "uce"], "ascending")

    opened.tell(f"document.querySelector('.scope.all [data-sort=\"{E}\"] button').focus()")
    opened.press("Enter")
    assert opened.tell("location.hash") == f"#sort={E}" and opened.tell(ORDER) == ["none", "esd_x", "uce", "ac"]
    opened.press(" ")
    assert opened.tell("location.hash") == f"#sort=-{E}" and opened.tell(ORDER) == ["none", "ac", "uce", "esd_x"]
    opened.press("Tab")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert opened.tell("document.activeElement.tagName") == "BUTTON" and opened.tell(outline) == "solid"
    opened.click("[type=reset]")
    assert opened.tell("location.hash") == "" and opened.tell(ORDER) == ["none", "ac", "esd_x", "uce"]


def test_in_a_browser_it_filters_and_the_view_is_a_link(opened):
    opened.click("[name=method][value=esd_x]")
    assert opened.tell("location.hash") == "#method=none,ac,uce"
    shown = VISIBLE.format("[data-method]:not(.name)") + ".map(e => e.dataset.method)"
    assert "esd_x" not in opened.tell(shown) and "uce" in opened.tell(shown)

    opened.tell(f"location.hash = 'concept=dog&method=none,esd_x,uce&sort={R}'")
    opened.tell("new Promise(done => setTimeout(done, 50))")
    assert opened.tell(VISIBLE.format(".scope") + ".map(e => e.dataset.concept)") == ["dog"]
    assert opened.tell(ORDER)[:3] == ["none", "esd_x", "uce"]
    assert opened.tell("document.querySelector('[name=concept]').value") == "dog"
    assert not opened.tell("document.querySelector('[value=ac]').checked")
    opened.tell("location.hash = 'model=another'")
    opened.tell("new Promise(done => setTimeout(done, 50))")
    assert opened.tell(VISIBLE.format(".nothing") + ".length") == 1


def test_in_a_browser_the_front_is_that_of_what_is_shown(opened, runs):
    ends = "['x1', 'y1', 'x2', 'y2'].map(name => parseFloat(line.getAttribute(name)))"
    lines = f"[...document.querySelectorAll('.all .front line')].map(line => {ends})"
    front = re.search(r'<g class="front">(.*?)</g>', scopes((runs / "report.html").read_text())[""], re.DOTALL)[1]
    static = [float(number) for number in re.findall(r'"([\d.]+)%"', front)]
    drawn = opened.tell(lines)
    assert len(drawn) == len(static) / 4 == 4, "of uce and esd_x, who both beat ac"
    assert [number for line in drawn for number in line] == pytest.approx(static)
    opened.click("[name=method][value=uce]")
    assert len(opened.tell(lines)) == 2


def test_in_a_browser_a_point_shows_its_numbers(opened):
    opened.tell("document.querySelector('.all .point[data-method=esd_x]').focus()")
    assert opened.tell(VISIBLE.format(".tip") + ".map(e => e.textContent)")[0].startswith("esd_x\nacc_e ↓ 5 ± 0.41")


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_overflows(opened, width):
    opened.resize(width, 844)
    assert opened.tell("document.documentElement.scrollWidth") == width
    assert opened.tell(VISIBLE.format("img") + ".every(e => e.naturalWidth == 8)")


def test_without_its_script_it_is_a_page(browser, runs):
    browser.open(page(runs), script=False)
    assert browser.tell(VISIBLE.format(".scope .numbers tbody tr") + ".length") == 2 * 3 * 4, "numbers and costs"
    assert browser.tell(VISIBLE.format("img") + ".length") == browser.tell("document.images.length") > 20
    assert browser.tell(VISIBLE.format(".filters") + ".length") == 0
