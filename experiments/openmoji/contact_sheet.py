"""A sheet of emoji_unet's images, objects × styles: python experiments/openmoji/contact_sheet.py [--out sheet.png]"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unlearning.data.captioning import with_article
from unlearning.data.openmoji import SIZE, STYLES
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler

HERE = Path(__file__).parent
OBJECTS = ("cat", "dog", "horse", "frog", "bird", "automobile", "ship", "airplane", "flower", "mushroom", "pizza",
           "house", "castle", "guitar", "rocket", "robot")  # fmt: skip
LABEL = 24  # pixels above each column


def main(model: Path, out: Path, seed: int) -> None:
    pipeline, draw = StableDiffusion.load(str(model)), Sampler()
    prompts = [with_article(f"a {o} image in {s} style") for s in STYLES for o in OBJECTS]
    pictures = []
    for i in range(0, len(prompts), 16):
        images = draw(pipeline, prompts[i : i + 16], range(seed + i, seed + i + len(prompts[i : i + 16])))
        pictures += list((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    grid = np.stack(pictures).reshape(len(STYLES), len(OBJECTS), SIZE, SIZE, 3).swapaxes(1, 2)
    rows = Image.fromarray(grid.reshape(len(STYLES) * SIZE, len(OBJECTS) * SIZE, 3))
    sheet = Image.new("RGB", (rows.width, rows.height + LABEL), "white")
    sheet.paste(rows, (0, LABEL))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, name in enumerate(OBJECTS):
        pen.text((SIZE * (i + 0.5), LABEL / 2), name, fill="black", font=font, anchor="mm")
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE.parents[1] / "unlearning" / "weights" / "emoji_unet")
    parser.add_argument("--out", type=Path, default=HERE / "contact_sheet.png")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
