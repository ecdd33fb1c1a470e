"""The datasets: evaluation prompts, training data for methods, and errors for wrong settings."""

import logging
import os
import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image

from tests.composed import config
from unlearning.concepts import ERASE, RETAIN, SYNONYM, Concept, UnlearningTask
from unlearning.data import openmoji
from unlearning.data.artists import artists
from unlearning.data.folder import folder, read
from unlearning.data.imagenette import imagenette
from unlearning.data.objects import cifar10_objects, emoji_objects
from unlearning.data.openmoji import CIFAR10, OBJECTS, STYLES
from unlearning.data.prompt import task as prompt
from unlearning.data.styles import styles
from unlearning.data.unlearncanvas import unlearncanvas
from unlearning.errors import UserError
from unlearning.store.manifest import read_manifest


def roles(task: UnlearningTask) -> Counter:
    return Counter(p.role for p in task.prompts)


# --- objects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concept", ["cat", "apple"])
def test_emoji_objects_evaluate_the_object_its_synonyms_and_the_other_cifar10_classes(concept):
    task = emoji_objects(concept)
    thing = OBJECTS[concept]
    assert task.erase == (Concept(concept, thing.synonyms, thing.anchor),) and task.name == concept
    asked = {p.text: (p.role, p.labels) for p in task.prompts}
    assert asked.pop(f"a photo of the {concept}") == (ERASE, {"object": concept})
    for synonym in thing.synonyms:
        assert asked.pop(f"a photo of the {synonym}") == (SYNONYM, {"object": concept})
    others = [name for name in CIFAR10 if name != concept]
    assert asked == {f"a photo of the {name}": (RETAIN, {"object": name}) for name in others}


@pytest.mark.parametrize("concept", ["cat", "apple", "sky"])
def test_retained_concepts_are_never_evaluated(concept):
    task = emoji_objects(concept)
    retained = {c.name for c in task.retain}
    assert len(retained) >= 30 and concept not in retained
    assert not retained & {p.labels["object"] for p in task.prompts}
    texts = {p.text for p in task.prompts}
    assert not texts & {task.prompt(word) for c in task.retain for word in (c.name, *c.synonyms)}


@pytest.mark.parametrize(
    "task", [emoji_objects("cat", pictures=8), styles("neon", pictures=8)], ids=["object", "style"]
)
def test_training_images_show_the_concept_and_no_evaluated_object(task):
    forget, retain = task.forget_images, task.retain_images
    assert len(forget) == len(retain) == 8 and forget[0].shape == (64, 64, 3) and forget[0].dtype == np.uint8
    assert len({image.tobytes() for image in (*forget, *retain)}) == 16, "no picture twice"
    drawn = [*forget.pictures, *retain.pictures]
    if task.name == "cat":
        assert all(p.objects[0] == "cat" for p in forget.pictures)
        assert not any("cat" in p.objects for p in retain.pictures)
    else:
        assert {p.style for p in forget.pictures} == {"neon"} and "neon" not in {p.style for p in retain.pictures}
    asked = set(CIFAR10) - {"cat"}
    assert not asked & {name for p in drawn for name in p.objects}
    assert [len(p.objects) > 1 for p in forget.pictures] == [False, True] * 4, "every other one is a scene"


def test_references_are_real_drawings_of_the_evaluations_split():
    task = emoji_objects("cat")
    assert set(task.references) == {ERASE, RETAIN}
    [first, second] = task.references[ERASE](2)
    assert (first == openmoji.picture("cat", "color", openmoji.rng_of("eval", 0, 0)).image).all()
    assert (second == openmoji.picture("cat", "color", openmoji.rng_of("eval", 0, 1)).image).all()
    others = [name for name in CIFAR10 if name != "cat"]
    for i, image in enumerate(task.references[RETAIN](9)):
        assert (image == openmoji.picture(others[i], "color", openmoji.rng_of("eval", 0, i)).image).all()
    assert len(task.references[RETAIN](20)) == 20


def test_a_template_reaches_every_prompt():
    task = emoji_objects("cat", template="a drawing of a {}", images_per_prompt=3)
    assert task.prompt("dog") == "a drawing of a dog" and task.prompt("") == "" and task.images_per_prompt == 3
    assert all(p.text.startswith("a drawing of a ") for p in task.prompts)


@pytest.mark.parametrize("concept", CIFAR10)
def test_cifar10_has_maces_counts(concept):
    task = cifar10_objects(concept)
    assert roles(task) == {ERASE: 1, SYNONYM: 3, RETAIN: 9}
    assert len(task.prompts) * task.images_per_prompt == (1 + 3 + 9) * 200
    assert task.retain == (), "nothing is held on to by name"
    assert {p.labels["object"] for p in task.prompts} == set(CIFAR10)


@pytest.mark.parametrize(
    ("make", "name", "near"),
    [
        (emoji_objects, "kat", "cat"),
        (emoji_objects, "kity", "cat"),  # a synonym leads to its object
        (emoji_objects, "elefant", "elephant"),
        (cifar10_objects, "aeroplane", "airplane"),
        (styles, "neonn", "neon"),
    ],
)
def test_an_unknown_name_gets_the_nearest_name_as_suggestion(make, name, near):
    with pytest.raises(UserError) as caught:
        make(name)
    message = str(caught.value)
    assert repr(name) in message and near in message.split("Did you mean")[1].split("?")[0]
    assert "dataset=prompt" in message, "any text can be erased all the same"


def test_a_name_without_a_near_match_lists_all_names():
    with pytest.raises(UserError) as caught:
        styles("zzzz")
    assert all(style in str(caught.value) for style in STYLES)
    with pytest.raises(UserError, match="'apple'"):  # an embedded object that is not one of CIFAR-10's classes
        cifar10_objects("apple")


# --- styles -----------------------------------------------------------------------------------------------------------


def test_emoji_styles_evaluate_every_object_in_every_style():
    task = styles("neon")
    assert len(task.prompts) == len(STYLES) * len(CIFAR10)
    assert {(p.labels["style"], p.labels["object"]) for p in task.prompts} == {(s, o) for s in STYLES for o in CIFAR10}
    assert all((p.role == ERASE) == (p.labels["style"] == "neon") for p in task.prompts)
    assert {next(iter(p.labels)) for p in task.prompts} == {"style"}, "the erasure is about the style"
    assert "an airplane image in neon style" in {p.text for p in task.prompts}
    assert "a cat image in pixel art style" in {p.text for p in task.prompts}


def test_a_style_is_erased_by_its_own_prompt():
    task = styles("neon")
    assert task.prompt(task.erase[0].name) == "an image in neon style"
    assert {c.name for c in task.retain} == {f"{s} style" for s in STYLES if s != "neon"}
    assert task.erase[0].anchor in {c.name for c in task.retain}
    erased, kept = task.references[ERASE](2), task.references[RETAIN](2)
    assert (erased[1] == openmoji.picture("automobile", "neon", openmoji.rng_of("eval", 0, 1)).image).all()
    assert (kept[1] == openmoji.picture("automobile", "color", openmoji.rng_of("eval", 0, 1)).image).all()


# --- free text --------------------------------------------------------------------------------------------------------


def test_any_text_can_be_erased():
    task = prompt(
        "Van Gogh", synonyms=["Vincent"], anchor="art", retain=["Monet"], others=["Degas"], template="a painting by {}"
    )
    assert task.erase == (Concept("Van Gogh", ("Vincent",), "art"),) and task.retain == (Concept("Monet"),)
    assert [(p.text, p.role, p.labels) for p in task.prompts] == [
        ("a painting by Van Gogh", ERASE, {}),
        ("a painting by Vincent", SYNONYM, {}),
        ("a painting by Degas", RETAIN, {}),
    ]


@pytest.mark.parametrize("concept", [(), "", [], ["cat", ""], None])
def test_a_task_without_a_concept_is_refused(concept):
    with pytest.raises(UserError, match="concept="):
        prompt(concept) if concept != () else UnlearningTask(erase=())


# --- several concepts -------------------------------------------------------------------------------------------------

SEVERAL = [
    (emoji_objects, ["cat", "apple"], {"pictures": 8}),
    (cifar10_objects, ["ship", "dog"], {}),
    (styles, ["neon", "pixel art"], {"pictures": 8}),
    (imagenette, ["church", "French horn"], {}),
    (unlearncanvas, ["Van Gogh", "Monet"], {"seeds": [188]}),
    (unlearncanvas, ["Cats", "Dogs"], {"seeds": [188]}),
    (artists, ["Van Gogh", "Monet"], {"others": ["Monet", "Degas"]}),
    (prompt, ["Van Gogh", 1984], {"others": [1984, "Degas"], "retain": ["Van Gogh", "Degas"]}),
]


@pytest.mark.parametrize(("make", "concepts", "settings"), SEVERAL)
def test_several_concepts_are_erased_and_none_of_them_is_retained(make, concepts, settings):
    both, each = make(concepts, **settings), [make(concept, **settings) for concept in concepts]
    names = [concept.name for concept in both.erase]
    assert names == [task.erase[0].name for task in each] and both.name == "+".join(names)
    assert [c.synonyms for c in both.erase] == [task.erase[0].synonyms for task in each]
    for name, task in zip(names, each, strict=True):
        own = [p for p in both.prompts if p.concept == name]
        assert own == [p for p in task.prompts if p.concept == name], "the same prompts as if it were the only one"
        assert {p.role for p in own} <= {ERASE, SYNONYM} and ERASE in {p.role for p in own}
    retained = [p for p in both.prompts if p.role == RETAIN]
    assert retained == [p for p in each[0].prompts if p.role == RETAIN and p in each[1].prompts] != []
    assert not {concept.name for concept in both.retain} & set(names)
    assert len({p.text for p in both.prompts}) == len({(p.text, p.role) for p in both.prompts})


def test_a_concept_given_twice_is_erased_once():
    assert emoji_objects(["cat", "cat"]).name == "cat" and emoji_objects(["cat"]).erase == emoji_objects("cat").erase


def test_forget_images_and_references_show_each_of_several_objects():
    task = emoji_objects(["cat", "dog"], pictures=8)
    drawn = task.forget_images.pictures
    assert Counter((p.objects[0], len(p.objects) > 1) for p in drawn) == {
        (name, scene): 2 for name in ("cat", "dog") for scene in (False, True)
    }
    assert not any({"cat", "dog"} & set(p.objects[1:]) for p in drawn)
    assert not any({"cat", "dog"} & set(p.objects) for p in task.retain_images.pictures)
    one, other = (emoji_objects(name).references[ERASE](2) for name in ("cat", "dog"))
    both = task.references[ERASE](2)
    assert (both[0] == one[0]).all() and (both[1] == other[1]).all()


def test_forget_images_and_references_are_in_each_of_several_styles():
    task = styles(["neon", "outline"], pictures=12)
    assert {p.style for p in task.forget_images.pictures} == {"neon", "outline"}
    assert not {"neon", "outline"} & {p.style for p in task.retain_images.pictures}
    one, other = (styles(style).references[ERASE](1)[0] for style in ("neon", "outline"))
    first, second = task.references[ERASE](2)
    assert (first == one).all() and (second != other).any() and len(task.references[ERASE](30)) == 30


def test_erasing_every_concept_leaves_none_to_retain():
    task = emoji_objects(list(CIFAR10))
    assert RETAIN not in task.references and RETAIN not in roles(task) and len(task.retain) == 40
    task = styles(list(STYLES))
    assert task.retain == () and len(task.retain_images) == 0 and set(task.references) == {ERASE}
    assert {concept.anchor for concept in task.erase} == {""}


def test_an_anchor_is_never_erased_itself():
    assert [c.anchor for c in emoji_objects(["cat", "forest"]).erase] == ["", "sky"]
    assert styles("color").erase[0].anchor == "outline style"


def test_anchors_and_synonyms_are_given_by_concept():
    task = prompt(["cat", "dog"], anchor={"dog": "sky"}, synonyms={"cat": ["kitty"]})
    assert task.erase == (Concept("cat", ("kitty",)), Concept("dog", (), "sky"))
    assert [(p.text, p.concept) for p in task.prompts if p.role == SYNONYM] == [("a photo of the kitty", "cat")]
    assert [c.anchor for c in prompt(["cat", "dog"], anchor="sky").erase] == ["sky", "sky"]
    with pytest.raises(UserError, match=r"dataset\.synonyms=\{cat: \[kitty\]\}"):
        prompt(["cat", "dog"], synonyms=["kitty"])
    with pytest.raises(UserError, match=r"dataset\.anchor.*'dgo'.*dog\?"):
        prompt(["cat", "dog"], anchor={"dgo": "sky"})


def test_styles_and_objects_of_unlearncanvas_are_not_erased_together():
    with pytest.raises(UserError, match="Van_Gogh,Cats"):
        unlearncanvas(["Van Gogh", "Cats"])


def test_several_concepts_by_the_command_line(unlearn):
    settings = ["dataset.anchor={cat: sea, dog: sky}", "dataset.synonyms={cat: [kitty]}", "dataset.others=[dog,sky]"]
    run = unlearn("dataset=prompt", "concept=[cat,dog]", *settings, "method=uce", "evaluator=clip_score")
    rows = read_manifest(run / "images" / "erased.csv")
    assert [(row.prompt.split()[-1], row.role, row.concept) for row in rows] == [
        ("cat", ERASE, "cat"),
        ("kitty", SYNONYM, "cat"),
        ("dog", ERASE, "dog"),
        ("sky", RETAIN, ""),
    ]
    assert (run / "report.html").exists()


def test_a_concept_alone_is_a_task_for_every_stage(unlearn):
    """A task without retained concepts and anchor."""
    run = unlearn("dataset=prompt", "concept=1984", "method=uce", "evaluator=clip_score")
    [row] = read_manifest(run / "images" / "erased.csv")
    assert (row.prompt, row.role, row.concept) == ("a photo of the 1984", ERASE, "1984")
    assert (run / "report.html").exists()


# --- a folder of pictures ---------------------------------------------------------------------------------------------


@pytest.fixture
def mugs(tmp_path):
    """Ten images of one grey each: 10, 20, ... 100; wide, tall, in subfolders and in several formats."""
    for i in range(10):
        place = tmp_path / "mugs" / ("more" if i % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        size = (12, 8) if i % 3 else (8, 20)
        Image.new("RGB" if i % 2 else "L", size, (10 * i + 10,) * 3 if i % 2 else 10 * i + 10).save(
            place / f"{i}.{('png', 'bmp', 'PNG', 'webp')[i % 4]}", **({"lossless": True} if i % 4 == 3 else {})
        )
    return tmp_path / "mugs"


def greys(pictures) -> set[int]:
    assert all(p.shape == (16, 16, 3) and p.dtype == np.uint8 and (p == p[0, 0, 0]).all() for p in pictures)
    return {int(p[0, 0, 0]) for p in pictures}


def test_every_fifth_image_is_set_apart(mugs, tmp_path):
    (tmp_path / "others").mkdir()
    for path in (p for p in mugs.rglob("*") if p.is_file()):
        Image.open(path).convert("RGB").point(lambda value: value + 100).save(tmp_path / "others" / f"{path.stem}.png")
    task = folder("mug", str(mugs), str(tmp_path / "others"), size=16, others=["cup"])
    taught, apart = greys(task.forget_images), greys(task.references[ERASE](100))
    assert len(task.forget_images) == 8 and len(apart) == 2
    assert taught | apart == set(range(10, 101, 10)) and not taught & apart
    kept, measured = greys(task.retain_images), greys(task.references[RETAIN](1))
    assert kept | greys(task.references[RETAIN](100)) == set(range(110, 201, 10))
    assert len(kept) == 8 and len(measured) == 1 and not kept & measured
    assert task.name == "mug" and [p.text for p in task.prompts] == ["a photo of the mug", "a photo of the cup"]


def test_retain_images_have_the_captions_that_stand_beside_them(mugs, tmp_path):
    (others := tmp_path / "others").mkdir()
    for i in range(1, 11):
        Image.new("RGB", (16, 16), (20 * i,) * 3).save(others / f"{i}.png")
    assert folder("mug", str(mugs), str(others), size=16).retain_captions is None
    for i in range(1, 11):
        (others / f"{i}.txt").write_text(f"a grey\n of {20 * i} ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of text files
        task = folder("mug", str(mugs), str(others), size=16)
    assert task.retain_captions() == [f"a grey of {image[0, 0, 0]}" for image in task.retain_images]
    (others / "1.txt").unlink()
    with pytest.raises(UserError, match="no caption"):
        folder("mug", str(mugs), str(others), size=16)


def test_a_folder_may_show_several_concepts(mugs):
    task = folder(["mug", "jug"], str(mugs), size=16, synonyms={"jug": ["ewer"]}, others=["jug", "sky"])
    assert task.name == "mug+jug" and len(task.forget_images) == 8
    assert [(p.text.split()[-1], p.concept) for p in task.prompts] == [
        ("mug", "mug"),
        ("jug", "jug"),
        ("ewer", "jug"),
        ("sky", ""),
    ]


def test_retained_images_are_optional(mugs):
    task = folder("mug", str(mugs), size=16)
    assert len(task.retain_images) == 0 and len(task.references[RETAIN](3)) == 0


def test_images_are_cut_square_not_squeezed(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    [picture] = folder("mug", str(tmp_path), size=10).forget_images
    assert (picture == 255).all()


def test_broken_images_are_named_and_left_out(mugs):
    whole = (mugs / "0.png").read_bytes()
    (mugs / "corrupt.png").write_bytes(b"not an image")
    (mugs / "truncated.png").write_bytes(whole[: len(whole) * 2 // 3])
    (mugs / "empty.jpg").touch()
    Image.new("RGB", (1, 1)).save(mugs / "dot.png")
    path = mugs / "broken.avif"  # its decoder raises a RuntimeError
    Image.new("RGB", (32, 32), "red").save(path)
    path.write_bytes(path.read_bytes().replace(b"av01", b"av99"))
    with pytest.warns(UserWarning) as caught:
        task = folder("mug", str(mugs), size=16)
    [message] = [str(w.message) for w in caught]
    assert message.startswith("5 of 15") and "1 by 1" in message
    names = ("corrupt.png", "truncated.png", "empty.jpg", "dot.png", "broken.avif")
    assert all(str(mugs / name) in message for name in names)
    assert len(task.forget_images) + len(task.references[ERASE](100)) == 10


@pytest.mark.parametrize(
    ("mode", "colour", "suffix"),
    [
        ("CMYK", (0, 255, 255, 0), "jpg"),
        ("CMYK", (0, 255, 255, 0), "tif"),
        ("P", 1, "png"),
        ("P", 1, "gif"),
        ("RGBA", (255, 0, 0, 255), "png"),
        ("LA", (76, 255), "png"),
        ("I;16", 76 * 256, "png"),
    ],
)
def test_images_of_any_colour_model_are_read(tmp_path, mode, colour, suffix):
    image = Image.new(mode, (16, 16), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / f"it.{suffix}")
    [picture] = folder("mug", str(tmp_path), size=8).forget_images
    wanted = (76, 76, 76) if mode in ("LA", "I;16") else (254, 0, 0)
    assert np.abs(picture.astype(int) - wanted).max() <= 2


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    [picture] = folder("mug", str(tmp_path), size=8).forget_images
    assert (picture == 255).all()


def test_images_are_read_lazily(mugs, monkeypatch):
    task, read = folder("mug", str(mugs), size=16), []
    load = type(task.forget_images).load
    monkeypatch.setattr(type(task.forget_images), "load", lambda self, path: read.append(path) or load(self, path))
    some = task.forget_images[2:4]
    assert not read and len(some) == 2
    assert greys(list(some)) <= set(range(10, 101, 10)) and len(read) == 2


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "avif"])
def test_an_image_cut_anywhere_is_left_out(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    for i, part in enumerate(np.linspace(0, 0.9 * len(whole), 12).astype(int)):
        (tmp_path / f"cut{i}.{suffix}").write_bytes(whole[:part])
    with pytest.warns(UserWarning, match=r"cannot be read"):
        task = folder("mug", str(tmp_path), size=8)
    assert len(task.forget_images) == 1


def test_an_image_with_broken_exif_keeps_its_orientation(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png", exif=b"Exif\0\0garbagegarbage")
    (picture,) = folder("mug", str(tmp_path), size=16).forget_images
    assert (picture == (255, 0, 0)).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    left_half = Image.fromarray(np.where(np.arange(16) < 8, 255, 0).astype(np.uint8)[None].repeat(16, 0))
    left_half.save(tmp_path / "held.png", exif=exif)
    (picture,) = folder("mug", str(tmp_path), size=16).forget_images
    assert (picture[:6] == 255).all() and (picture[10:] == 0).all()


def test_skipped_files_are_counted_by_suffix(mugs):
    for name in ("notes.txt", "more.txt", "a.heic", "readme", ".DS_Store"):
        (mugs / name).write_text("no picture")
    with pytest.warns(UserWarning) as caught:
        assert len(folder("mug", str(mugs), size=16).forget_images) == 8
    [message] = [str(w.message) for w in caught]
    assert str(mugs) in message and "2 .txt, 1 .heic, 1 without a suffix" in message


def test_a_non_image_file_is_named(mugs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (mugs / "linked").symlink_to(tmp_path / "elsewhere")
    (mugs / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(mugs / "pipe.png")
    (mugs / "same.png").symlink_to(mugs / "0.png")
    with pytest.warns(UserWarning, match="3 of 14 images") as caught:
        assert len(read(mugs, 16)) == 11, "a link to a picture is a picture"
    assert all(name in str(caught[0].message) for name in ("linked", "gone.png", "pipe.png"))


def test_whole_images_are_read_without_a_warning(mugs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder("mug", str(mugs), size=16)


def test_images_to_clean_that_cannot_be_read_are_reported(mugs, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "whole.png")
    (tmp_path / "in" / "corrupt.png").write_bytes(b"no picture at all")
    with pytest.warns(UserWarning, match="cannot be read"):
        task = folder("mug", str(mugs), input=str(tmp_path / "in"), size=16)
    [skipped] = task.skipped
    assert "corrupt.png" in skipped and [i.name for i in task.inputs] == ["whole.png"]


def test_without_a_name_prompts_use_the_folder_name(tmp_path, mugs, caplog):
    caplog.set_level(logging.INFO)
    cfg = config(tmp_path, "dataset=folder", f"forget={mugs}/")
    assert cfg.concept == "mugs", "tables and the run's folder take it from here"
    task = instantiate(cfg.dataset)
    assert task.name == "mugs" and [p.text for p in task.prompts] == ["a photo of the mugs"]
    [said] = caplog.messages
    assert "'mugs'" in said and "concept=" in said
    caplog.clear()
    assert instantiate(config(tmp_path, "dataset=folder", f"forget={mugs}", "concept=mug").dataset).name == "mug"
    assert not caplog.messages


def test_a_folders_words_may_not_be_empty(tmp_path, mugs):
    with pytest.raises(InstantiationException, match="dataset=folder needs concept="):
        instantiate(config(tmp_path, "dataset=folder", f"forget={mugs}", "concept=''").dataset)


def test_forget_and_retain_folders_must_differ(mugs, tmp_path):
    within, copies = mugs / "more", tmp_path / "copies"
    shutil.copytree(within, copies)
    (copies / "1.bmp").rename(copies / "another-name.bmp")
    Image.new("RGB", (16, 16)).save(copies / "black.png")
    for forget, retain, says in [
        (mugs, mugs, rf"10 of the 10 retain .* \({mugs}/0\.png\)"),
        (mugs, within, rf"5 of the 5 retain .* \({mugs}/more/1\.bmp\)"),
        (within, mugs, rf"5 of the 10 retain .* \({mugs}/more/1\.bmp\)"),
        (mugs, copies, rf"5 of the 6 retain .* \({copies}/3\.webp and {mugs}/more/3\.webp\)"),
    ]:
        with pytest.raises(UserError, match=says):
            folder("mug", str(forget), str(retain), size=16)


def test_a_folder_without_an_image_is_refused(tmp_path, mugs):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image") as caught:
        folder("mug", str(tmp_path / "empty"))
    assert str(tmp_path / "empty") in str(caught.value)
    with pytest.raises(UserError, match=f"no folder {tmp_path}/gone"):
        folder("mug", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone"):
        folder("mug", str(mugs), str(tmp_path / "gone"))


@pytest.mark.parametrize(("concept", "where", "what"), [("", "here", "concept="), ("mug", "", "forget=")])
def test_a_folder_dataset_needs_a_name_and_a_path(concept, where, what):
    with pytest.raises(UserError, match=what):
        folder(concept, where)
