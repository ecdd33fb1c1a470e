"""UnlearnCanvas' classifiers of styles and of objects (Zhang et al., NeurIPS 2024).

Both are timm's ViT-L/16 with a new head. torchvision has the same network with other parameter names.
"""

# B batch, N answers, D width.
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import VisionTransformer
from torchvision.transforms.functional import normalize, pil_to_tensor

from unlearning.data.unlearncanvas import OBJECTS, STYLES
from unlearning.errors import UserError, unknown
from unlearning.store.files import file_digest

SEED_IMAGES = "Seed_Images"  # the photographs that were stylised: a class, but not a style to erase
ANSWERS = {"style": tuple(sorted((*STYLES, SEED_IMAGES))), "object": OBJECTS}  # in the order of the outputs
SIDE, HEAD = 224, 64  # image side in pixels; width of an attention head, the same in every ViT
SOURCE = "https://github.com/OPTML-Group/UnlearnCanvas links the style classifier and the object classifier."

NAMES = (  # patterns of timm's names, and torchvision's names for them
    (r"^patch_embed\.proj", "conv_proj"),
    (r"^cls_token", "class_token"),
    (r"^pos_embed", "encoder.pos_embedding"),
    (r"^norm", "encoder.ln"),
    (r"^head", "heads.head"),
    (r"^blocks\.(\d+)", r"encoder.layers.encoder_layer_\1"),
    (r"\.norm([12])", r".ln_\1"),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj", ".self_attention.out_proj"),
    (r"\.mlp\.fc1", ".mlp.0"),
    (r"\.mlp\.fc2", ".mlp.3"),
)


def torchvision_name(name: str) -> str:
    """torchvision's name of a parameter of timm's.

    "blocks.3.attn.qkv.weight" becomes "encoder.layers.encoder_layer_3.self_attention.in_proj_weight".
    """
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def vision_transformer(state: Mapping[str, Tensor]) -> VisionTransformer:
    """torchvision's ViT with the weights of timm's state dict. Sizes are inferred from the tensors.

    Raises:
        KeyError, RuntimeError: If the state dict is not that of a ViT.
    """
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    with torch.device("meta"):
        network = VisionTransformer(
            image_size=SIDE,
            patch_size=patch,
            num_layers=len([name for name in state if name.endswith("attn.qkv.weight")]),
            num_heads=width // HEAD,
            hidden_dim=width,
            mlp_dim=len(state["blocks.0.mlp.fc1.weight"]),
            num_classes=len(state["head.weight"]),
        )
    network.load_state_dict({torchvision_name(name): value for name, value in state.items()}, assign=True)
    return network.eval()


class UnlearnCanvasClassifiers:
    """Answers "style" with one of 51 classes, of which one is photographs, and "object" with one of 20 classes.

    Args:
        style, object: The benchmark's checkpoints, each {"model_state_dict": ...}.

    Raises:
        UserError: If a checkpoint is missing or holds another network.
    """

    def __init__(self, style: str | Path | None, object: str | Path | None):
        self.networks, names = {}, []
        for question, path in (("style", style), ("object", object)):
            setting = f"judge.classifier.{question}"
            if path is None or not Path(path).is_file():
                raise UserError(f"No {question} classifier at {path}. Set `{setting}` to its file. {SOURCE}")
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
                self.networks[question] = vision_transformer(state)
            except Exception as error:  # a damaged or foreign file can fail in any way
                raise UserError(f"{path} is not a classifier of UnlearnCanvas ({error}). {SOURCE}") from error
            outputs = self.networks[question].heads.head.out_features
            if outputs != len(ANSWERS[question]):
                answers = len(ANSWERS[question])
                raise UserError(
                    f"The {question} classifier {path} has {outputs} classes instead of {answers}. Are "
                    "`judge.classifier.style` and `judge.classifier.object` swapped?"
                )
            names.append(f"{question} {file_digest(Path(path))[:12]}")
        self.name = f"UnlearnCanvas ViT ({', '.join(names)})"

    @torch.no_grad()
    def __call__(self, images: Tensor, question: str) -> tuple[tuple[str, ...], Tensor]:
        """The class names, and their probabilities (B, N), for images (B, H, W, 3) uint8, on the images' device.

        Raises:
            UserError: For any question but "style" and "object".
        """
        if question not in ANSWERS:
            raise unknown(f"question for {self.name}:", question, ANSWERS)
        images = torch.as_tensor(images)
        resized = [
            Image.fromarray(np.asarray(image)).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images.cpu()
        ]
        pixels = torch.stack([normalize(pil_to_tensor(image) / 255, [0.5], [0.5]) for image in resized])
        logits = self.networks[question].to(images.device)(pixels.to(images.device))
        return ANSWERS[question], logits.softmax(1)
