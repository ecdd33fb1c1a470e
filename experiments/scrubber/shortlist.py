"""Words found with a CLIP's shortlist and without: python -m experiments.scrubber.shortlist [CONCEPT ...] [--ranks]

For each concept: the words, evaluations of the denoiser and seconds of both searches, on the same images and with the
same seed. With --ranks no denoiser is asked: the places of the concept's own words in the CLIP's order of the
vocabulary. Its own words are its name and synonyms, as far as the tokenizer knows them whole.
"""

import argparse
import time
from pathlib import Path
from tempfile import mkdtemp

import pytorch_lightning as pl
from hydra.utils import instantiate

import unlearning
from tests.composed import config
from unlearning.scrubbing.words import similarities
from unlearning.tracking import cost

CLIP = str(Path(unlearning.__file__).parent / "weights" / "clip")


def ranks(concept: str) -> dict[str, int]:
    """The places of the concept's words, from 1."""
    cfg = config(Path(mkdtemp()), f"concept={concept}")
    model, task = instantiate(cfg.model), instantiate(cfg.dataset)
    vocabulary, [own] = model.vocabulary(), task.erase
    order = similarities(CLIP, task.forget_images, vocabulary).argsort(descending=True).tolist()
    places = {vocabulary[i]: place for place, i in enumerate(order, 1)}
    return {word: places[word] for word in own.words if word in places}


def search(concept: str, *overrides: str) -> str:
    """A line about a search."""
    folder = Path(mkdtemp())
    cfg = config(folder, f"concept={concept}", "method=words_solve", *overrides)
    model, task, method = instantiate(cfg.model), instantiate(cfg.dataset), instantiate(cfg.method)
    pl.seed_everything(0, verbose=False)
    start = time.perf_counter()
    with cost.measured(folder / "cost.json", "search", model):
        words, _ = method.search_words(model, task)
    evaluations = (folder / "cost.json").read_text()
    return f"{', '.join(words)}; {time.perf_counter() - start:.0f} s; {evaluations}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("concepts", nargs="*", default=["cat", "ship", "key"])
    parser.add_argument("--ranks", action="store_true")
    options = parser.parse_args()
    for concept in options.concepts:
        if options.ranks:
            print(concept, ranks(concept), flush=True)
            continue
        for name, overrides in (("without", ["method.clip=null"]), ("with", [f"method.clip={CLIP}"])):
            print(concept, name, search(concept, *overrides), flush=True)


if __name__ == "__main__":
    main()
