"""The page of a run and its image strip as the reader sees them; once in a real browser."""

import base64
import io
import json
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from tests.reporting.browser import BROWSER, MISSING, Browser
from unlearning.data.openmoji import LICENCE
from unlearning.errors import UserError
from unlearning.reporting.run_page import IMAGES, THUMBNAIL, report, teaser
from unlearning.store.manifest import read_manifest, write_manifest

NASTY = "a <script>alert('cat')</script> & \"friends\""
PICTURES = [
    ("a photo of the cat", "erase", "cat", 2),
    (NASTY, "erase", "cat", IMAGES + 3),
    ("a photo of the kitty", "synonym", "cat", 1),
    ("a photo of the dog", "retain", "dog", 1),
    ("a photo of a lorry", "retain", "truck", 1),
]
SHOWN = 2 * (2 + IMAGES + 1 + 1 + 1)  # before and after


@pytest.fixture
def run(finished):
    return finished(pictures=PICTURES)


def inlined(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in found]


def test_every_image_is_inside_before_and_after(run):
    page = report(run).read_text()
    pixels = [np.asarray(image).tobytes() for image in inlined(page)]
    assert len(pixels) == SHOWN == len(set(pixels))
    first = [np.asarray(Image.open(read_manifest(run / "images" / f"{n}.csv")[0].path)) for n in ("base", "erased")]
    assert pixels[:2] == [picture.tobytes() for picture in first]
    assert "3 more seeds" in page


def test_nothing_is_fetched_and_nothing_is_executed(run):
    page = report(run).read_text()
    assert "<script" not in page and "<b>raw" not in page
    assert NASTY in unescape(page)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert all(url.startswith('"data:') for url in re.findall(r"url\(([^)]*)", page)) and "@import" not in page


def test_numbers_with_their_protocols(run):
    page = unescape(re.sub(r"\s+", " ", report(run).read_text()))
    assert "<title>cat, erased by esd_x</title>" in page
    for number in ("100.0", ">5.0<", "−95.0", "14.2", "20.6 min"):
        assert number in page, number
    assert "judge v1, argmax over 31 classes" in page and "2,000 pictures & the judge's features" in page
    assert re.search(r'acc_e <span class="soft">↓</span><sup>1</sup>', page), "direction and footnote"
    assert '<td class="better">−95.0</td>' in page


def test_settings_card_and_attribution(run, finished):
    page = report(run).read_text()
    assert "unlearn method=esd_x concept=cat</code>" in page, "the whole run, not the last stages asked for"
    assert "steps: 50" in page and "<em>fine</em>" in page and "license: mit" not in page
    assert LICENCE in page
    assert LICENCE not in report(finished("other", model="sd14")).read_text()
    assert "cat, nothing erased" in report(finished("unedited", method="none")).read_text()


def test_a_legend_explains_the_metrics_there_are(run):
    legend = report(run).read_text().partition('<dl class="notes legend">')[2].partition("</dl>")[0]
    assert "efficacy/acc_e" in legend and "fidelity/fid" in legend and "summary/h_o" not in legend


def test_settings_show_no_machine_paths(finished):
    inside = {"path": "/disk/code/weights/unet", "cache": "/disk/here/cache", "note": "/disk/hereafter"}
    run = finished(config={"extra": inside})
    for name, own in {
        "resolved": {"paths": {"weights": "/disk/code/weights", "output_dir": str(run)}},
        "hydra": {"hydra": {"runtime": {"cwd": "/disk/here"}}},
    }.items():
        path = run / ".hydra" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), own))))
    shown = report(run).read_text().partition("All settings")[2].partition("</details>")[0]
    assert "path: ${paths.weights}/unet" in shown and "cache: cache" in shown
    assert "/disk/code" not in shown and str(run) not in shown
    assert "note: /disk/hereafter" in shown, "another folder, whose name begins the same"


def test_neighbours_are_named_where_the_prompt_does_not(run):
    kept = report(run).read_text().partition('<section id="retain">')[2]
    assert "<h3>truck</h3>" in kept and "<h3>dog</h3>" not in kept


def test_several_erased_concepts_are_distinguished_without_labels(finished):
    prompts = {"a photo of the kitty": "cat", "a photo of the puppy": "dog"}
    run = finished(concept=["cat", "dog"], pictures=[(prompt, "erase", "", 1) for prompt in prompts])
    for name in ("base", "erased"):
        rows = read_manifest(run / "images" / f"{name}.csv")
        rows = [replace(row, labels={}, concept=prompts[row.prompt]) for row in rows]
        write_manifest(run / "images" / f"{name}.csv", rows)
    page = report(run).read_text()
    assert "<h3>cat</h3>" in page and "<h3>dog</h3>" in page and "<title>cat+dog, erased by esd_x</title>" in page


def test_attacked_images_stand_beside_before_and_after(finished):
    prompts = {"cce": "a photo of the cat", "p4d": "xq z ** cat"}  # the second attack has found another prompt
    run = finished(pictures=PICTURES[:1], attacks=prompts)
    page = report(run).read_text().partition('<section id="attack">')[2].partition("</section>")[0]
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert [figure.count("<img") for figure in figures] == [3, 3], "before, after and attacked"
    assert "<h3>cce</h3>" in page and "<h3>p4d</h3>" in page and "xq z ** cat" in page
    assert "attacked by cce" in figures[0]
    teaser(run, run / "teaser.png")


def test_large_images_become_thumbnails(finished):
    page = report(finished(pictures=PICTURES[:1], size=512)).read_text()
    assert {image.size for image in inlined(page)} == {(THUMBNAIL, THUMBNAIL)}


def test_missing_images_are_shown_as_missing(run):
    erased = read_manifest(run / "images" / "erased.csv")
    erased[0].path.unlink()
    erased[1].path.write_bytes(b"half a pict")
    page = report(run).read_text()
    assert page.count('<span class="missing"') == 2 and len(inlined(page)) == SHOWN - 2


@pytest.mark.parametrize(
    ("gone", "stage"),
    [
        ("metrics.json", "evaluate"),
        ("images/base.csv", "generate"),
        ("images/erased.csv", "generate"),
        ("erasure/README.md", "fit"),
    ],
)
def test_a_missing_stage_is_named(run, gone, stage):
    (run / gone).unlink()
    with pytest.raises(UserError, match=f"{gone}.* {stage} stage"):
        report(run)


def test_the_page_is_written_completely_or_not_at_all(run):
    page = report(run)
    old = page.read_text()
    (run / "metrics.json").rename(run / "elsewhere.json")
    with pytest.raises(UserError):
        report(run)
    assert page.read_text() == old

    (run / "elsewhere.json").rename(run / "metrics.json")
    page.unlink()
    page.mkdir()  # nothing can be renamed to it
    with pytest.raises(OSError):
        report(run)
    assert not list(run.rglob("*.partial"))


def test_the_strip_has_two_rows_and_leaves_nothing_behind(run, tmp_path):
    out = tmp_path / "docs" / "teaser.png"
    sizes = []
    for pairs in (3, 6):
        teaser(run, out, pairs)
        strip = Image.open(out).convert("RGB")
        sizes.append(strip.size)
        assert strip.getpixel((0, 0)) == (255, 255, 255) and np.asarray(strip).std() > 20
    assert sizes[0][0] < sizes[1][0] and sizes[0][1] == sizes[1][1]
    assert [p.name for p in out.parent.iterdir()] == ["teaser.png"]


def test_a_missing_image_of_the_strip_is_reported(run, tmp_path):
    read_manifest(run / "images" / "erased.csv")[0].path.unlink()
    with pytest.raises(UserError, match="generate stage"):
        teaser(run, tmp_path / "teaser.png", 4)


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
def test_in_a_browser(run, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(report(run), width=1200, height=1600)
        assert browser.tell("[...document.images].filter(image => image.naturalWidth == 8).length") == SHOWN
        assert browser.tell("document.documentElement.scrollWidth") == 1200
        assert browser.complaints == [] and {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}
        sections = browser.tell("[...document.querySelectorAll('section')].map(section => section.id)")
        assert sections == ["erase", "synonym", "retain", "measured", "settings", "erasure"]


def test_latent_differences_are_drawn_with_their_threshold(run):
    manifest = run / "images" / "erased.csv"
    rows = [
        replace(r, decided={"D": 4.0 - i / 10, "w": -1.0 if i < 3 else 2.0})
        for i, r in enumerate(read_manifest(manifest))
    ]
    write_manifest(manifest, rows)
    erasure = {"parts": [{"settings": {"threshold": 3.33, "empty": 1.25}}]}
    (run / "erasure" / "erasure.json").write_text(json.dumps(erasure))
    page = report(run).read_text()
    assert page.count('class="bar"') == len(PICTURES) and "3.33" in page and "1.25" in page
    written = json.loads((run / "latent_differences.json").read_text())
    assert written["threshold"] == 3.33 and len(written["prompts"]) == len(PICTURES)
    assert written["prompts"][0]["prompt"] == "a photo of the cat"
    assert [p["D"] for p in written["prompts"]] == sorted((p["D"] for p in written["prompts"]), reverse=True)
