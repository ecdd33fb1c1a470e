"""How many contexts words_solve needs: python -m experiments.scrubber.contexts

Two styles and two objects that no table reports, seed 100, with the words that the search finds for them. A line for
each setting has the percentage of twenty images that are in the style or show the object, and the drift: the mean
absolute difference of thirty retained images to the unedited model's, divided by that between two seeds.
"""

from pathlib import Path
from tempfile import mkdtemp

import torch
from hydra.utils import instantiate
from torch import Tensor

from tests.composed import config
from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.captioning import with_article
from unlearning.data.openmoji import CIFAR10, STYLES
from unlearning.erasures.base import Erasure
from unlearning.methods.found_words import FoundWords
from unlearning.methods.uce import UCE
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.sampler import Sampler

WORDS = {"blueprint": ["blueprint"], "outline": ["outline"], "rabbit": ["rabbit", "bunny", "hare"], "clock": ["clock"]}
CONTEXTS = ((0, 0), (10, 1), (20, 3))  # of found words, of retained words
SEED, OTHER_SEED = 100, 5000


def generated(model: DiffusionModel, prompts: list[str], seed: int = SEED) -> Tensor:
    images = Sampler(steps=20, batch_size=20)(model, prompts, range(seed, seed + len(prompts)))
    return (255 * images).round().byte().permute(0, 2, 3, 1)


def styled(style: str) -> list[str]:
    return [with_article(f"a {name} image in {style} style") for name in CIFAR10]


def erased_prompts(concept: str) -> list[str]:
    return 2 * styled(concept) if concept in STYLES else 20 * [f"a photo of the {concept}"]


def retained_prompts(concept: str) -> list[str]:
    if concept not in STYLES:
        templates = ("a photo of the {}", "a picture of a {}", "{}")
        return [template.format(name) for name in CIFAR10 for template in templates]
    others = [style for style in STYLES if style != concept]
    return [styled(others[(2 * i + j) % len(others)])[i] for i in range(len(CIFAR10)) for j in range(3)]


def erasure(model: DiffusionModel, words: list[str], found: int, retained: int) -> Erasure:
    method = FoundWords(prototypes=None, erase=UCE(preserve_scale=0.1), contexts=found, retained_contexts=retained)
    method.search_words = lambda *_: (words, [word for word in model.vocabulary() if word not in words])
    return method.fit(model, UnlearningTask(erase=(Concept("unknown"),), prompts=()))


@torch.no_grad()
def main() -> None:
    cfg = config(Path(mkdtemp()), "concept=cat")
    model, judge = instantiate(cfg.model), instantiate(cfg.judge.classifier)
    for concept, words in WORDS.items():
        retained = retained_prompts(concept)
        base, other = (generated(model, retained, seed).float() for seed in (SEED, OTHER_SEED))
        for contexts in CONTEXTS:
            with erasure(model, words, *contexts).applied_to(model):
                images, kept = generated(model, erased_prompts(concept)), generated(model, retained).float()
            names, probabilities = judge(images, "style" if concept in STYLES else "object")
            left = sum(names[i] == concept for i in probabilities.argmax(1).tolist()) / len(images)
            drift = float((kept - base).abs().mean() / (other - base).abs().mean())
            print(f"{concept}, contexts {contexts}: {left:.0%}, drift {drift:.2f}", flush=True)


if __name__ == "__main__":
    main()
