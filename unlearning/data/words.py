"""Static lists of words about concepts: paraphrases and neighbours."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

import yaml

from unlearning import data


@cache
def paraphrases() -> Mapping[str, Mapping]:
    """Other ways to say a concept, by its name in lower case: synonyms, hypernyms, languages, descriptions."""
    return yaml.safe_load(files(data).joinpath("paraphrases.yaml").read_text())


@cache
def neighbours() -> Mapping[str, Sequence[str]]:
    """The objects of the embedded world that look or mean most like each, nearest first."""
    return yaml.safe_load(files(data).joinpath("neighbours.yaml").read_text())
