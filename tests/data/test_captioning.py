"""Captions of the embedded models' data describe the image with words of the tokenizer's vocabulary."""

from functools import cache
from itertools import pairwise

import pytest

from unlearning.data import openmoji
from unlearning.data.captioning import (
    ABOVE,
    BESIDE,
    COLOURS,
    TEMPLATES,
    UNSEEN,
    Content,
    caption,
    colour_name,
    vocabulary,
    with_article,
)
from unlearning.data.openmoji import OBJECTS


@cache
def captioned() -> list[tuple[Content, str]]:
    contents = [Content.of(openmoji.sample("train", 9, i, scenes=0.5)) for i in range(150)]
    return [(c, caption(c, openmoji.rng_of("train", 8, i))) for i, c in enumerate(contents * 20)]


def words(text: str) -> list[str]:
    return text.replace(",", " ,").replace(".", " .").split()


def test_captions_name_every_object_and_the_style():
    for content, text in captioned():
        assert all(any(w in text for w in (name, *OBJECTS[name].synonyms)) for name in content.objects), text
        assert content.style == "color" or content.style in text, text
        named = [colour for colour in COLOURS if f"{colour} background" in text]
        assert named in ([], [content.background]), text


def test_nearly_all_words_are_in_the_vocabulary_and_every_word_of_it_occurs():
    spoken = {word for _, text in captioned() for word in words(text)}
    missing = set(vocabulary()) - spoken
    assert missing <= {"white", "gray", "black", "orange"} | {
        w for o in OBJECTS.values() for s in o.synonyms for w in s.split()
    }
    foreign = [text for _, text in captioned() if not set(words(text)) <= set(vocabulary())]
    assert 0.02 < len(foreign) / len(captioned()) < 0.25, "some have a word that does not exist"


def test_captions_vary():
    content = captioned()[0][0]
    assert len({caption(content, openmoji.rng_of("train", 7, i)) for i in range(300)}) > 200


@pytest.mark.parametrize("phrases", [BESIDE, ABOVE])
def test_positions_are_those_of_the_image(phrases):
    """Of two objects, "a X left of a Y" puts X at the smaller x; the other order is never said."""
    places = ((0.2, 0.5), (0.8, 0.5)) if phrases is BESIDE else ((0.5, 0.2), (0.5, 0.8))
    said = set()
    for order in ((0, 1), (1, 0)):
        content = Content(tuple(("cat", "dog")[i] for i in order), "color", tuple(places[i] for i in order), "white")
        for i in range(800):
            text = caption(content, openmoji.rng_of("train", 6, i))
            first = min(text.find(w) for w in ("cat", *OBJECTS["cat"].synonyms) if w in text)
            other = min(text.find(w) for w in ("dog", *OBJECTS["dog"].synonyms) if w in text)
            for word in (" left of ", " right of ", " above ", " below ", " over ", " under "):
                if word in text:
                    said.add(word)
                    assert (first < other) == (word in (" left of ", " above ", " over ")), text
    assert said == ({" left of ", " right of "} if phrases is BESIDE else {" above ", " below ", " over ", " under "})


def test_the_wordings_of_the_evaluation_occur_and_the_unseen_ones_do_not():
    texts = {text for _, text in captioned()}
    frames = {text.replace(name, "{}") for c, text in captioned() for name in c.objects if len(c.objects) == 1}
    assert {"a photo of the {}", "a photo of a {}"} <= frames and len(frames & {*TEMPLATES}) >= 5
    assert any(" image in " in text and text.endswith(" style") for text in texts)
    for unseen in UNSEEN:
        assert set(words(unseen)) - {"{}"} - set(vocabulary()), unseen
        assert not any(part in text for text in texts for part in [max(unseen.split("{}"), key=len).strip()])


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 255, 255), "white"), ((10, 12, 9), "black"), ((255, 210, 215), "pink"), ((120, 120, 122), "gray"),
        ((255, 250, 200), "yellow"), ((210, 250, 210), "green"), ((20, 60, 150), "blue"), ((230, 210, 255), "purple"),
        ((255, 225, 190), "orange"),
    ],
)  # fmt: skip
def test_colours_have_names(rgb, name):
    assert colour_name(rgb) == name and name in COLOURS


def test_articles_are_right():
    spoken = [words(text.replace(",", "")) for _, text in captioned()]
    pairs = {pair for said in spoken for pair in pairwise(said) if pair[0] in ("a", "an")}
    assert {after for article, after in pairs if article == "an"} >= {"apple", "elephant", "octopus"}
    assert not {p for p in pairs if (p[0] == "an") != (p[1][0] in "aeiou" and not p[1].startswith("uk"))}
    assert with_article("a photo of a apple and an cat") == "a photo of an apple and a cat"
    assert with_article("an ukulele") == "a ukulele"
