"""The field's sets of prompts: Imagenette, COCO's captions, UnlearnCanvas, artists."""

from collections import Counter

import pytest
from hydra.utils import instantiate

from tests.composed import config
from unlearning.concepts import ERASE, RETAIN
from unlearning.data.artists import TEMPLATES, artists
from unlearning.data.captions import captions
from unlearning.data.imagenette import imagenette
from unlearning.data.unlearncanvas import OBJECTS, STYLES, unlearncanvas
from unlearning.errors import UserError
from unlearning.store.manifest import manifest, read_manifest


@pytest.fixture
def listed(tmp_path):
    """listed(text) -> the path of a file that holds it."""

    def write(text: str):
        (tmp_path / "list.csv").write_text(text, encoding="utf-8")
        return tmp_path / "list.csv"

    return write


def composed(tmp_path, *overrides):
    return instantiate(config(tmp_path, *overrides).dataset)


# --- Imagenette -------------------------------------------------------------------------------------------------------


def test_imagenette_has_five_hundred_prompts_for_each_of_ten_classes(tmp_path):
    task = composed(tmp_path, "dataset=imagenette", "concept=English springer")
    assert task.images_per_prompt == 500 and len(task.prompts) == 10 and not task.retain
    [erased] = [p for p in task.prompts if p.role == ERASE]
    assert erased.text == "an image of a English springer" and erased.labels == {"object": "English springer"}
    assert {p.role for p in task.prompts if p is not erased} == {RETAIN}
    rows = manifest(tmp_path, task, 0)
    assert len(rows) == len({row.path for row in rows}) == 5000
    with pytest.raises(UserError, match="Did you mean French horn"):
        imagenette("french horn")


# --- COCO -------------------------------------------------------------------------------------------------------------

COCO = "case_number,source,prompt,evaluation_seed,coco_id\n"


def coco(count):
    return COCO + "".join(f"{i},coco,caption {i},{i + 7},{i}\n" for i in range(count))


def test_captions_bring_their_seeds_and_may_span_lines(listed):
    text = COCO + '0,coco,"A man\nrides a ""horse"", slowly",11,9\n1,coco,A dog ,12.0,8\n2,coco,,13,7\n3,coco,x,-1,6\n'
    task = captions("cat", listed(text))
    assert [(p.text, p.role, p.seed) for p in task.prompts] == [
        ('A man\nrides a "horse", slowly', RETAIN, 11),
        ("A dog", RETAIN, 12),
    ]
    assert "line 5: the prompt is missing" in task.skipped[0] and "evaluation_seed is -1" in task.skipped[1]


def test_a_subset_is_chosen_by_its_seed_and_keeps_the_order(listed):
    path = listed(coco(50))
    chosen = [[p.seed for p in captions("cat", path, count=20, subset=s).prompts] for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 20
    assert chosen[0] == sorted(chosen[0])
    assert captions(["cat", "dog"], path).name == "cat+dog"
    assert len(captions("cat", path).prompts) == len(captions("cat", path, count=50).prompts) == 50
    with pytest.raises(UserError, match=r"50 .*dataset\.count=51"):
        captions("cat", path, count=51)


def test_the_coco_error_names_the_source_and_the_missing_column(tmp_path, listed):
    for name in ("coco30k", "coco10k"):
        with pytest.raises(Exception, match=r"dataset\.path=.*prompt.*coco_30k\.csv"):
            composed(tmp_path, f"dataset={name}")
    with pytest.raises(Exception, match="no column 'prompt'"):
        composed(tmp_path, "dataset=coco30k", f"dataset.path={listed('words,seed')}")
    settings = ["dataset=coco10k", f"dataset.path={listed(coco(12))}"]
    with pytest.raises(Exception, match=r"12 .*dataset\.count=10000"):
        composed(tmp_path, *settings)
    assert len(composed(tmp_path, *settings, "dataset.count=12").prompts) == 12


def test_a_run_about_captions_alone_is_measured_and_reported(unlearn, listed):
    run = unlearn("dataset=coco30k", f"dataset.path={listed(coco(3))}", "dataset.count=2", "evaluator=clip_score")
    assert [row.prompt.split()[0] for row in read_manifest(run / "images" / "erased.csv")] == ["caption"] * 2
    assert "fidelity/clip_score" in (run / "metrics.json").read_text() and (run / "report.html").exists()


# --- UnlearnCanvas ----------------------------------------------------------------------------------------------------


def test_unlearncanvas_is_fifty_styles_by_twenty_objects_by_five_seeds(tmp_path):
    task = composed(tmp_path, "dataset=unlearncanvas", "concept=Van Gogh")
    assert len(set(STYLES)) == 50 and len(set(OBJECTS)) == 20 and len(task.prompts) == 5000
    assert Counter(p.role for p in task.prompts) == {ERASE: 100, RETAIN: 4900}
    erased = [p for p in task.prompts if p.role == ERASE]
    assert {p.text for p in erased} == {f"A {thing} image in Van Gogh style." for thing in OBJECTS}
    assert {p.seed for p in task.prompts} == {188, 288, 588, 688, 888}
    assert list(erased[0].labels.items()) == [("style", "Van_Gogh"), ("object", "Architectures")]
    assert task.name == "Van Gogh style" and len(task.retain) == 49 and task.prompt("") == ""


def test_unlearncanvas_erases_an_object_too():
    task = unlearncanvas("Cats", seeds=[188])
    assert Counter(p.role for p in task.prompts) == {ERASE: 50, RETAIN: 950}
    assert list(task.prompts[0].labels) == ["object", "style"] and task.name == "Cats" and len(task.retain) == 19
    with pytest.raises(UserError, match="Did you mean Cartoon"):
        unlearncanvas("Cartoons")


# --- artists ----------------------------------------------------------------------------------------------------------

ARTISTS = """,type,artist,prompt,evaluation_seed
0,0,Van Gogh,"A sunflower field, painted by Van Gogh",7
1,0,Van Gogh,Art inspired by Van Gogh,8
2,1,Monet,Art inspired by Monet,7
3,1,,Art inspired by nobody,7
"""


def test_a_list_of_artists_is_kept_but_for_the_one_that_is_erased(tmp_path, listed):
    task = composed(tmp_path, "dataset=artists", f"dataset.path={listed(ARTISTS)}", "concept=Monet")
    assert [(p.role, p.seed) for p in task.prompts] == [(RETAIN, 7), (RETAIN, 8), (ERASE, 7)]
    assert task.name == "Monet" and task.erase[0].anchor == "art" and not task.retain
    assert "line 5: the artist is missing" in task.skipped[0]
    both = composed(tmp_path, "dataset=artists", f"dataset.path={listed(ARTISTS)}", "concept=[Monet,Van Gogh]")
    assert both.name == "Monet+Van Gogh" and {p.role for p in both.prompts} == {ERASE}
    with pytest.raises(UserError, match="Did you mean Monet"):
        artists("Manet", listed(ARTISTS))
    with pytest.raises(UserError, match="no column 'artist'"):
        artists("Monet", listed(COCO))


def test_names_are_put_into_maces_prompts_and_drawn_with_its_seeds(tmp_path):
    task = composed(tmp_path, "dataset=artists", "concept=Van Gogh", "dataset.others=[Monet,Rembrandt]")
    assert Counter(p.role for p in task.prompts) == {ERASE: 25, RETAIN: 50}
    assert {p.text for p in task.prompts if p.role == ERASE} == {t.format("Van Gogh") for t in TEMPLATES}
    assert {p.seed for p in task.prompts} == {1, 2, 3, 4, 5} and task.images_per_prompt == 1


def test_the_artists_error_names_the_missing_setting():
    with pytest.raises(UserError, match=r"dataset\.others=.*dataset\.path=.*artist, prompt"):
        artists("Monet")
