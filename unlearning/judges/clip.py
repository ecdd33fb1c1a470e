"""CLIP models (Radford et al., ICML 2021) from the Hugging Face Hub or from a folder."""

# B batch, D embedding width.
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from unlearning.errors import UserError
from unlearning.models.folders import load_complete
from unlearning.store.files import file_digest


class TensorCLIP(CLIPModel):
    """A CLIP whose features are tensors (B, D), as torchmetrics expects; transformers 5 wraps them in an output."""

    def get_image_features(self, *args, **kwargs) -> Tensor:
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args, **kwargs) -> Tensor:
        return super().get_text_features(*args, **kwargs).pooler_output


def load_clip(model: str | Path, setting: str) -> tuple[TensorCLIP, CLIPProcessor, str]:
    """Loads a CLIP by its name on the Hugging Face Hub or by its folder.

    Args:
        model: The name or the folder.
        setting: The config key that holds `model`, for the error message.

    Returns:
        The model, its processor, and a name that identifies its weights.

    Raises:
        UserError: If there is no CLIP at `model`, or it lacks weights.
    """
    try:
        clip = load_complete(TensorCLIP, model, dtype=torch.float32).eval()
        processor = CLIPProcessor.from_pretrained(model)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"No CLIP could be loaded from {model}: {error}\nSet `{setting}` to a folder that "
            "CLIPModel.save_pretrained wrote, or to a name on the Hugging Face Hub (openai/clip-vit-base-patch32, ...) "
            "that is in the local cache or can be downloaded. Those of the embedded models are "
            "`${paths.weights}/judge/clip`, which judges, and `${paths.weights}/clip`, which chooses words; "
            "`python experiments/openmoji/train_clip.py` makes them."
        ) from error
    if (folder := Path(model)).is_dir():
        weights = min([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
        return clip, processor, f"{folder.name} {file_digest(weights)[:12]}"
    return clip, processor, f"{model} {(clip.config._commit_hash or '')[:12]}".rstrip()
