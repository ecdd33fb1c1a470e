"""The quality of the embedded generators: python experiments/openmoji/measure.py [overrides ...]

The judge's accuracy on 20 images for each prompt, with the config's sampler (DDIM, 50 steps, guidance 7.5 for
emoji_unet): the ten CIFAR-10 classes, all objects, their synonyms, and the styles. Also the judge's accuracy and the
autoencoder's PSNR on held-out drawings, and sizes on disk. Images are stored, so that an interrupted measurement
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
from unlearning.data.captioning import with_article
from unlearning.data.openmoji import CIFAR10, OBJECTS, STYLES
from unlearning.judges.emoji import EmojiJudge
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.generation import generate
from unlearning.sampling.sampler import Sampler
from unlearning.store.files import digest
from unlearning.store.manifest import load_images, manifest


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
    }


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
            names, probabilities = judge(torch.from_numpy(load_images(batch)), question)
            for row, best in zip(batch, probabilities.argmax(1).tolist(), strict=True):
                right.setdefault(row.labels[question], []).append(names[best] == row.labels[question])
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
    numbers = {
        "judge, objects": 100 * (torch.cat(named) == objects).float().mean().item(),
        "judge, styles": 100 * (torch.cat(styled) == styles)[styles != IGNORED].float().mean().item(),
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
