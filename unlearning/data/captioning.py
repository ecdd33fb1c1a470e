"""Captions of the embedded world's images, with which its CLIPs and generators are trained.

A caption names every object of an image by its name or by a synonym, and may say the style, the colour of the
background, and where the objects are. Half of the captions follow the field's templates; the others are put together
from many openings, nouns and endings, some with a word that does not exist, so that a generator also understands what
it has never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from numpy.random import Generator

from unlearning.data.openmoji import OBJECTS, STYLES, Picture

TEMPLATES = (
    "a photo of the {}",
    "a photo of a {}",
    "an image of a {}",
    "a picture of the {}",
    "a drawing of a {}",
    "a {}",
    "the {}",
)
# Held out: measurements of unseen wordings use these, and no caption does.
UNSEEN = (
    "look, there is a {} here",
    "the {} of my friend",
    "could someone draw a {} please",
    "yesterday we saw a {}",
    "what a lovely {}",
)
OPENINGS = (
    "this is {}",
    "here is {}",
    "here you see {}",
    "I see {}",
    "you can see {}",
    "it shows {}",
    "this shows {}",
    "we found {}",
    "they have {}",
    "he has {}",
    "she likes {}",
    "an icon of {}",
    "an emoji of {}",
    "a sketch of {}",
    "a painting of {}",
    "a simple picture of {}",
    "a good photo of {}",
    "a small drawing of {}",
    "an illustration of {}",
    "art of {}",
    "{}",
)
NOUNS = ("a {}", "the {}", "{}", "one {}", "my {}", "her {}", "his {}", "that {}", "our {}", "some {}", "another {}")
ADJECTIVES = ("nice", "cute", "typical", "beautiful", "ordinary", "great", "funny", "favourite", "new", "old", "simple")
ENDINGS = ("for you", "for the children", "in the middle", "on its own", "as an icon", "to look at", "from a book")
FILLERS = ("yes", "well", "oh", "see", "now", "so", "and then")
STYLED = ("{} in {style} style", "{} , {style} style", "{} as {style} art", "{style} style {}")
GROUNDS = ("{} on a {colour} background", "{} against a {colour} background", "{} , {colour} background")
LISTS = (
    "{0} and {1}",
    "{0} with {1}",
    "{0} next to {1}",
    "{0} beside {1}",
    "both {0} and {1}",
    "{0} together with {1}",
)
BESIDE = ("{0} left of {1}", "{0} to the left of {1}", "{1} right of {0}", "on the left {0} , on the right {1}")
ABOVE = ("{0} above {1}", "{0} over {1}", "{1} below {0}", "{1} under {0}", "at the top {0} , at the bottom {1}")
COLOURS = ("white", "black", "pink", "orange", "yellow", "green", "blue", "purple", "gray")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Content:
    """The facts about an image that a caption may state.

    Args:
        objects: Names of objects.
        style: Name of a style.
        places: The centre (x, y) of each object, as fractions of the side.
        background: The name of the background's colour.
    """

    objects: tuple[str, ...]
    style: str
    places: tuple[tuple[float, float], ...]
    background: str

    @classmethod
    def of(cls, picture: Picture) -> "Content":
        """The content of a rendered image."""
        side = picture.image.shape[0]
        boxes = picture.boxes
        places = tuple(((left + right) / 2 / side, (top + bottom) / 2 / side) for left, top, right, bottom in boxes)
        corners = sorted(map(tuple, picture.image[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()), key=sum)
        return cls(picture.objects, picture.style, places, colour_name(corners[2]))


def colour_name(rgb: Sequence[int]) -> str:
    """The name in COLOURS of a colour of 0 to 255."""
    red, green, blue = (value / 255 for value in rgb)
    high, low = max(red, green, blue), min(red, green, blue)
    if high < 0.25:
        return "black"
    if high - low < 0.03:
        return "white" if high > 0.8 else "gray"
    hue = {
        red: (green - blue) / (high - low) % 6,
        green: (blue - red) / (high - low) + 2,
        blue: (red - green) / (high - low) + 4,
    }[high] * 60
    bounds = ((15, "pink"), (45, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (325, "purple"))
    return next((name for bound, name in bounds if hue < bound), "pink")


def with_article(phrase: str) -> str:
    """Corrects the articles in a phrase: "a apple" becomes "an apple"."""
    words = phrase.split()
    for i, (word, after) in enumerate(pairwise(words)):
        if word in ("a", "an"):
            words[i] = "an" if after[0] in "aeiou" and not after.startswith("uk") else "a"
    return " ".join(words)


def word_for(name: str, rng: Generator) -> str:
    """The object's name with probability 1/2, else one of its synonyms."""
    return name if rng.random() < 0.5 else str(rng.choice(OBJECTS[name].synonyms))


def caption(content: Content, rng: Generator) -> str:
    """A random caption. It mostly omits "color", which is the default style."""
    order = [int(i) for i in rng.permutation(len(content.objects))]
    words = [word_for(content.objects[i], rng) for i in order]
    if len(words) == 1 and rng.random() < 0.5:
        text = _one_of(TEMPLATES, rng).format(words[0])
    else:
        nouns = [_noun(word, rng) for word in words]
        text = nouns[0] if len(nouns) == 1 else _several(nouns, [content.places[i] for i in order], rng)
        text = _one_of(OPENINGS, rng).format(text) if rng.random() < 0.6 else text
    if rng.random() < 0.1:
        text = f"{text} {_one_of(ENDINGS, rng)}"
    if rng.random() < 0.2:
        text = _one_of(GROUNDS, rng).format(text, colour=content.background)
    if content.style != "color" or rng.random() < 0.2:
        text = _styled(text, content.style, rng)
    if rng.random() < 0.08:
        text = f"{_one_of(FILLERS, rng)} , {text}"
    text = with_article(text).replace(" ,", ",")
    return f"{text}." if rng.random() < 0.08 else text


def _one_of(options: Sequence[str], rng: Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _noun(word: str, rng: Generator) -> str:
    """A noun phrase, mostly "a cat". One in thirteen has a word that does not exist."""
    chance = rng.random()
    if chance < 0.08:
        unknown = "".join(rng.choice(list(LETTERS), rng.integers(3, 9)))
        word = f"{unknown} {word}"
    elif chance < 0.2:
        word = f"{_one_of(ADJECTIVES, rng)} {word}"
    return ("a {}" if rng.random() < 0.6 else _one_of(NOUNS, rng)).format(word)


def _several(nouns: list[str], places: Sequence[tuple[float, float]], rng: Generator) -> str:
    """Two nouns, with their places in two of five; three in a list."""
    if len(nouns) > 2:
        return " , ".join(nouns[:-1]) + f" and {nouns[-1]}"
    if rng.random() < 0.6:
        return _one_of(LISTS, rng).format(*nouns)
    across, down = (abs(places[0][axis] - places[1][axis]) for axis in (0, 1))
    axis, said = (0, BESIDE) if across >= down else (1, ABOVE)
    first, second = sorted(range(2), key=lambda i: places[i][axis])
    return _one_of(said, rng).format(nouns[first], nouns[second])


def _styled(text: str, style: str, rng: Generator) -> str:
    """With the style; half of the time in the words of the evaluation, "a cat image in neon style"."""
    if rng.random() < 0.5:
        plain = text.startswith("a ") and " of " not in text and "," not in text and " and " not in text
        return f"{text} image in {style} style" if plain and rng.random() < 0.5 else f"{text} in {style} style"
    return _one_of(STYLED, rng).format(text, style=style)


def vocabulary() -> list[str]:
    """All words that occur in captions, sorted, but for those that do not exist."""
    frames = [*TEMPLATES, *OPENINGS, *NOUNS, *STYLED, *GROUNDS, *LISTS, *BESIDE, *ABOVE, "{} image in {} style", ", ."]
    plain = [
        *ADJECTIVES,
        *ENDINGS,
        *FILLERS,
        *COLOURS,
        *STYLES,
        *OBJECTS,
        *(s for o in OBJECTS.values() for s in o.synonyms),
    ]
    words = (w for phrase in (*frames, *plain) for w in phrase.split() if "{" not in w)
    return sorted(set(words) | {"a", "an"})
