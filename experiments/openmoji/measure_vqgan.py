"""The quality of emoji_vqgan: python experiments/openmoji/measure_vqgan.py [FOLDER] [--images N]

On held-out scenes of two or three of the fifty objects: how many the judge recognises in the scene and in its
reconstruction, the PSNR, and the share of the codebook that is used.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import unlearning
from unlearning.concepts import RETAIN, Region
from unlearning.data import openmoji
from unlearning.data.openmoji import OBJECTS
from unlearning.data.regions import with_regions
from unlearning.judges.emoji import EmojiJudge
from unlearning.models.vqgan import VQGAN
from unlearning.sampling.reconstruction import as_tensor
from unlearning.store.manifest import ManifestRow

WEIGHTS = Path(unlearning.__file__).parent / "weights"
SEED, BATCH = 3, 16


def scene(i: int) -> openmoji.Picture:
    rng = openmoji.rng_of("eval", SEED, i)
    return openmoji.scene([str(n) for n in rng.choice(list(OBJECTS), rng.integers(2, 4), replace=False)], "color", rng)


def main(folder: Path, images: int) -> None:
    model, judge = VQGAN.load(str(folder)), EmojiJudge(WEIGHTS / "judge" / "classifier")
    right, errors, used = {"scene": [], "reconstruction": []}, [], torch.zeros(len(model.codebook), dtype=torch.bool)
    for first in tqdm(range(0, images, BATCH)):
        scenes = [scene(i) for i in range(first, min(first + BATCH, images))]
        pictures = np.stack([s.image for s in scenes])
        codes = model.encode(as_tensor(pictures))
        used[codes.flatten().cpu()] = True
        again = (model.decode(codes) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        errors += ((pictures / 255.0 - again / 255.0) ** 2).mean((1, 2, 3)).tolist()
        rows = [
            ManifestRow(Path(), "", RETAIN, {}, 0, regions=tuple(
                Region(box, RETAIN, {"object": name}) for name, box in zip(s.objects, s.boxes, strict=True) if any(box)
            )) for s in scenes
        ]  # fmt: skip
        for name, shown in (("scene", pictures), ("reconstruction", again)):
            cut, regions = with_regions(shown, rows)
            names, probabilities = judge(torch.as_tensor(cut), "object")
            seen = [names[i] for i in probabilities.argmax(1)]
            right[name] += [s == r.labels["object"] for s, r in zip(seen, regions, strict=True)]
    before, after = (np.array(found) for found in right.values())
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"objects named rightly in {len(before)} places of {images} scenes: {100 * before.mean():.1f} %")
    print(f"in the reconstruction: {100 * after.mean():.1f} %; of those before: {100 * after[before].mean():.1f} %")
    print(f"PSNR: {-10 * np.log10(errors).mean():.1f} dB")
    print(f"codes used: {100 * used.double().mean():.1f} % of {len(used)}")
    print(f"on disk: {size:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=WEIGHTS / "emoji_vqgan")
    parser.add_argument("--images", type=int, default=1000)
    main(**vars(parser.parse_args()))
