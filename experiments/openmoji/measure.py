"""The quality of the embedded generators: python experiments/openmoji/measure.py [overrides ...]

The judge's accuracy on 20 images for each prompt, with the config's sampler (DDIM, 50 steps, guidance 7.5 for
emoji_unet): the ten CIFAR-10 classes, all objects, synonyms, styles, wordings that no training had, and scenes
of two objects, which are right if both are where one of the training's layouts has them. Also the judge's accuracy and
the autoencoder's PSNR on held-out drawings, and sizes on disk. Images are stored, so that an interrupted measurement
continues.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rendered import ROOT
from train_judge import IGNORED, labelled

from unlearning.__main__ import CONF
from unlearning.concepts import RETAIN, Concept, Prompt, UnlearningTask
from unlearning.data import openmoji
from unlearning.data.captioning import UNSEEN, with_article
from unlearning.data.openmoji import CIFAR10, LAYOUTS, OBJECTS, STYLES
from unlearning.data.regions import crop
from unlearning.judges.emoji import EmojiJudge
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.sampler import Sampler
from unlearning.stages.generation import generate
from unlearning.store.files import digest
from unlearning.store.manifest import load_images, manifest

SCENES_OF_TWO = "scenes of two"
REACH = 0.22  # half of the side of an object's box, as a fraction of the image's side


def pairs() -> list[tuple[str, str]]:
    """Fifty pairs of different objects."""
    chosen = (np.random.default_rng(i).choice(list(OBJECTS), 2, replace=False) for i in range(50))
    return [(str(a), str(b)) for a, b in chosen]


def prompts() -> dict[str, list[Prompt]]:
    """The prompts of each measurement."""

    def photo(word: str, name: str) -> Prompt:
        return Prompt(f"a photo of the {word}", RETAIN, {"object": name})

    def styled(name: str, style: str) -> Prompt:
        return Prompt(with_article(f"a {name} image in {style} style"), RETAIN, {"style": style, "object": name})

    return {
        "ten classes": [photo(name, name) for name in CIFAR10],
        "all objects": [photo(name, name) for name in OBJECTS],
        "synonyms": [photo(synonym, name) for name, o in OBJECTS.items() for synonym in o.synonyms],
        "styles": [styled(name, style) for style in STYLES for name in CIFAR10],
        "unseen wordings": [Prompt(text.format(name), RETAIN, {"object": name}) for text in UNSEEN for name in CIFAR10],
        SCENES_OF_TWO: [Prompt(with_article(f"a {a} and a {b}"), RETAIN, {"object": f"{a}, {b}"}) for a, b in pairs()],
    }


def both_shown(judge: EmojiJudge, images: np.ndarray, asked: list[tuple[str, ...]]) -> list[bool]:
    """Whether each image shows both objects of its pair, side by side in one of the layouts of the training."""
    side = images.shape[1]
    crops = [
        crop(image, tuple(round(side * v) for v in (x - REACH, y - REACH, x + REACH, y + REACH)))
        for image in images
        for centres, _ in LAYOUTS[2]
        for x, y in centres
    ]
    names, probabilities = judge(torch.from_numpy(np.stack(crops)), "object")
    seen = [names[best] for best in probabilities.argmax(1).tolist()]
    per_image = 2 * len(LAYOUTS[2])
    return [
        any(sorted(seen[k : k + 2]) == sorted(pair) for k in range(i * per_image, (i + 1) * per_image, 2))
        for i, pair in enumerate(asked)
    ]


def accuracies(
    model: DiffusionModel, sampler: Sampler, judge: EmojiJudge, images_per_prompt: int, seed: int
) -> dict[str, float]:
    """The judge's accuracy in percent, by measurement. Prints the labels with the lowest accuracy too."""
    results = {}
    folder = ROOT / "measured" / digest(model.fingerprint, model.numerics, sampler.protocol)
    trainer = partial(pl.Trainer, logger=False, enable_checkpointing=False, devices=1)
    for name, asked in prompts().items():
        task = UnlearningTask((Concept("nothing"),), prompts=tuple(asked), images_per_prompt=images_per_prompt)
        rows = manifest(folder, task, seed)
        generate(model, sampler, rows, trainer)
        question = "style" if name == "styles" else "object"
        right: dict[str, list[bool]] = {}
        for i in range(0, len(rows), 100):
            batch = rows[i : i + 100]
            images, asked_for = load_images(batch), [row.labels[question] for row in batch]
            if name == SCENES_OF_TWO:
                hits = both_shown(judge, images, [tuple(label.split(", ")) for label in asked_for])
            else:
                names, probabilities = judge(torch.from_numpy(images), question)
                best = probabilities.argmax(1).tolist()
                hits = [names[k] == label for k, label in zip(best, asked_for, strict=True)]
            for label, hit in zip(asked_for, hits, strict=True):
                right.setdefault(label, []).append(hit)
        results[name] = 100 * float(np.mean([hit for hits in right.values() for hit in hits]))
        worst = sorted(right, key=lambda label: np.mean(right[label]))[:5]
        print(
            f"{name}: {results[name]:.1f} %   lowest:", {w: round(100 * np.mean(right[w])) for w in worst}, flush=True
        )
    return results


@torch.no_grad()
def psnr(model: DiffusionModel, images: torch.Tensor) -> float:
    """Mean PSNR in dB of images (N, 64, 64, 3) after encoding and decoding."""
    x = images.permute(0, 3, 1, 2).float() / 255
    errors = [(model.decode(model.encode_images(b)).cpu() - b).pow(2).mean((1, 2, 3)) for b in x.split(100)]
    return (-10 * torch.cat(errors).log10()).mean().item()


def megabytes(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def main(overrides: list[str], images_per_prompt: int, seed: int) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    model, sampler, referee = instantiate(cfg.model), instantiate(cfg.sampler), instantiate(cfg.judge.classifier)
    held_out = labelled("eval", 3000, 300)
    pictures, objects, styles = held_out.tensors
    named = [referee(b, "object")[1].argmax(1) for b in pictures.split(100)]
    styled = [referee(b, "style")[1].argmax(1) for b in pictures.split(100)]
    asked = 4 * pairs()
    scenes = [openmoji.scene(pair, "color", openmoji.rng_of("eval", 8, i)).image for i, pair in enumerate(asked)]
    numbers = {
        "judge, objects": 100 * (torch.cat(named) == objects).float().mean().item(),
        "judge, styles": 100 * (torch.cat(styled) == styles)[styles != IGNORED].float().mean().item(),
        "judge, both objects of scenes": 100 * float(np.mean(both_shown(referee, np.stack(scenes), asked))),
        "autoencoder PSNR (dB)": psnr(model, pictures[:500]),
        "generator (MB)": megabytes(Path(cfg.model.path)),
        "judge (MB)": megabytes(Path(cfg.judge.classifier.path).parent),
    }
    print(json.dumps(numbers, indent=2), flush=True)
    numbers |= accuracies(model, sampler, referee, images_per_prompt, seed)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("override", nargs="*", help="settings, as for unlearn: sampler.steps=20")
    parser.add_argument("--images-per-prompt", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.override, options.images_per_prompt, options.seed)
