"""Images that the model itself generates, cached in the image store: training data of methods and attacks."""

# N images, H W height and width.
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unlearning.config.values import Seed
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.sampler import Sampler
from unlearning.store.files import digest
from unlearning.store.images import write_image
from unlearning.store.manifest import ManifestRow, image_path, image_seed, load_images, missing


class Generated:
    """Generates images for prompts, or reads them from the store if they were generated before.

    Args:
        store: The image store.
        sampler: Generates the images.
        seed: The seed of the images; no evaluation uses it.
    """

    def __init__(self, store: str, sampler: Sampler, seed: Seed = 1_000_003):
        self._store, self.sampler, self.seed = store, sampler, seed  # private: no key of a result has it

    def __call__(self, model: DiffusionModel, prompts: Sequence[str], count: int) -> list[np.ndarray]:
        """`count` images (H, W, 3) uint8 of the prompts in turn, by the model with the erasures that are applied."""
        # The sampler's protocol names all that an image depends on, besides the model as it is now.
        folder = Path(self._store) / "images" / digest("generated", model.state, self.sampler.protocol)
        rows = [self._row(folder, prompts[i % len(prompts)], i) for i in range(count)]
        todo, size = missing(rows), self.sampler.batch_size
        for batch in tqdm([todo[i : i + size] for i in range(0, len(todo), size)], "images to learn from", leave=False):
            images, _ = self.sampler.draw(model, batch)
            for image, row in zip((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy(), batch, strict=True):
                write_image(row.path, image)
        return [load_images([row])[0] for row in rows]

    def _row(self, folder: Path, prompt: str, i: int) -> ManifestRow:
        seed = image_seed(self.seed, prompt, i)
        return ManifestRow(image_path(folder, prompt, seed), prompt, "generated", {}, seed)
