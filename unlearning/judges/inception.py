"""The Inception network whose features FID and KID compare (Heusel et al., NeurIPS 2017), as clean-fid runs it."""

# B batch, F features.
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from cleanfid.downloads_helper import inception_url
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torch import Tensor

from unlearning.errors import UserError, unknown
from unlearning.store.files import file_digest

MODES = ("clean", "legacy_tensorflow")


class Inception:
    """Maps images to 2048 features.

    Args:
        path: clean-fid's file inception-2015-12-05.pt, or its folder; by default the folder that clean-fid uses.
        mode: clean-fid's name for how images are resized to 299 pixels: "clean" uses PIL's antialiased bicubic filter,
            "legacy_tensorflow" resizes inside the network, as FIDs before clean-fid did. "legacy_pytorch" is not
            offered: it needs other weights, which clean-fid can only download.

    Raises:
        UserError: For an unknown mode, or if the file is missing or damaged. Nothing is downloaded.
    """

    def __init__(self, path: str | Path | None = None, mode: str = "clean"):
        if mode not in MODES:
            raise unknown("mode of clean-fid", mode, MODES)
        file = Path(inception_url).name
        path = Path(path or "/tmp")  # clean-fid's default, which it hard-codes
        folder = path.parent if path.name == file else path
        if not (folder / file).is_file():
            raise UserError(
                f"No {file} in {folder}. Download it from {inception_url} (96 MB) and set `judge.features.path` to its "
                "folder, or use the features of the embedded models' judge: `judge=emoji`."
            )
        try:
            self.network = InceptionV3W(str(folder), download=False, resize_inside=mode == "legacy_tensorflow").eval()
        except RuntimeError as error:  # of TorchScript, for a file that was not copied whole
            raise UserError(
                f"{folder / file} is damaged ({next(iter(str(error).splitlines()), '')}). Download it again from "
                f"{inception_url}."
            ) from error
        self.resize = build_resizer(mode)
        self.name = f"Inception {file_digest(folder / file)[:12]}, mode {mode}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, F) of images (B, H, W, 3) uint8, on the images' device."""
        images = torch.as_tensor(images)
        with ThreadPoolExecutor() as pool:  # Pillow's filters let other threads work
            resized = torch.from_numpy(np.stack(list(pool.map(self.resize, images.cpu().numpy()))))
        return self.network.to(images.device)(resized.permute(0, 3, 1, 2).float().to(images.device))
