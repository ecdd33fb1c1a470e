"""Model folders: what is checked before and after they are read, and digests of what they hold."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn
from transformers import CLIPPreTrainedModel, PreTrainedTokenizerBase

from unlearning.errors import UserError
from unlearning.store.files import digest

MODELS = {  # model= by the name of the pipeline
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "PixArtSigmaPipeline": "pixart",
    "PixArtAlphaPipeline": "pixart",
    "DiffusionPipeline": "pixart",  # which takes either
    "SanaPipeline": "sana",
    "DiTPipeline": "dit",
}
VARIANT = re.compile(r"model(?:-\d+-of-\d+)?\.([a-z]\w*)(?:-\d+-of-\d+)?\.safetensors$")


def check(path: str, pipeline_class: type[DiffusionPipeline], options: Mapping[str, Any]) -> None:
    """Raises UserError for what can be seen to fail before anything is loaded.

    Args:
        options: Options of the loading; a part that they set to None is not loaded.
    """
    if not path.strip():
        raise UserError("model.path is empty: give a folder that diffusers saved, or a repository's name on the hub.")
    folder = Path(path)
    if folder.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(
            f"{path} is a pickled checkpoint, and loading one can run whatever code it holds. Convert it once to a "
            "diffusers folder (diffusers' scripts/convert_original_stable_diffusion_to_diffusers.py, with "
            "--to_safetensors) and give that folder with model.path=..."
        )
    if folder.suffix == ".safetensors" and folder.is_file():
        raise UserError(
            f"{path} is a single file: configurations and tokenizers are not in it, and diffusers takes them from the "
            f"hub. Convert it once: {_conversion(pipeline_class, 'from_single_file', folder)}\nand give that folder "
            "with model.path=... Without network add config='/a/folder' to from_single_file's arguments, of a model of "
            "the same kind."
        )
    if not folder.is_dir() and (folder.is_absolute() or path.startswith(".") or path.count("/") != 1):
        raise UserError(f"There is no model folder at {path}. Set model.path to a folder that diffusers saved.")
    if not folder.is_dir():
        return  # a repository of the hub
    if not (folder / "model_index.json").exists():
        raise UserError(f"{path} holds no model_index.json: it is not a folder that diffusers saved a pipeline to.")
    there = _pipeline_of(folder)
    if there in MODELS and MODELS[there] != MODELS.get(pipeline_class.__name__):
        raise UserError(f"{path} holds a {there}: model={MODELS[there]} model.path={shlex.quote(path)}")
    left_out = {name for name, value in options.items() if value is None}
    for part in (p for p in sorted(folder.iterdir()) if p.is_dir() and p.name not in left_out):
        if list(part.glob("*.bin")) and not list(part.glob("*.safetensors")):
            raise UserError(
                f"No model could be loaded from {path!r}: its {part.name} holds pickled weights only, and loading them "
                "can run whatever code they hold. If you trust them, convert them once: "
                f"{_conversion(pipeline_class, 'from_pretrained', folder)}\nand give that folder with model.path=..."
            )


def _pipeline_of(folder: Path) -> str:
    """The name of the pipeline that a folder's model_index.json states; "" without one."""
    try:
        return json.loads((folder / "model_index.json").read_text()).get("_class_name", "")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'model_index.json'} is broken: {error}. Copy the folder again.") from error


def _conversion(pipeline_class: type[DiffusionPipeline], load: str, source: Path) -> str:
    """The command that saves a pipeline as a folder of safetensors."""
    name, target = pipeline_class.__name__, source.with_name(f"{source.stem}-diffusers")
    code = f"from diffusers import {name}; {name}.{load}({str(source)!r}).save_pretrained({str(target)!r})"
    return f"python -c {shlex.quote(code)}"


def variant(folder: Path) -> str | None:
    """The variant of the weights in a part's folder, "fp16" say; None if it has weights without a variant."""
    names = [path.name for path in folder.glob("*.safetensors")]
    found = [VARIANT.search(name) for name in names]
    return next((match[1] for match in found if match), None) if all(found) else None


def limit_lengths(pipeline: DiffusionPipeline) -> None:
    """Gives CLIP's tokenizers that state no largest length that of their text encoders."""
    for name, tokens in pipeline.components.items():
        encoder = pipeline.components.get(name.replace("tokenizer", "text_encoder"))
        if isinstance(tokens, PreTrainedTokenizerBase) and isinstance(encoder, CLIPPreTrainedModel):
            positions = encoder.config.max_position_embeddings
            tokens.model_max_length = min(tokens.model_max_length, positions)


def load_complete(kind: Any, path: str | Path, **options: Any) -> Any:
    """A network, with the weights that `save_pretrained` wrote: `kind.from_pretrained(path, **options)`.

    diffusers and transformers fill in weights that the files lack at random, and only log it.

    Args:
        kind: A class of diffusers or transformers.
        options: Its `from_pretrained`'s.

    Raises:
        UserError: If the files lack a weight of the network.
    """
    network, report = kind.from_pretrained(path, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{path} has no weight {missing[0]}"
            + (f", nor {len(missing) - 1} others" if len(missing) > 1 else "")
            + f" of {kind.__name__}. Copy or download the model again."
        )
    return network


def check_complete(network: nn.Module, folder: Path) -> None:
    """Raises UserError if the folder that a network was loaded from lacks one of its weights."""
    files = list(folder.glob("*.safetensors"))
    if len(files) == 1:
        with safe_open(files[0], framework="pt") as weights:
            if network.state_dict().keys() <= set(weights.keys()):
                return
    # Weights in several files, or renamed while they are loaded, may be complete too. "meta" takes no memory.
    load_complete(type(network), folder, device_map="meta", use_safetensors=True, variant=variant(folder))


def fingerprint(folder: Path) -> str:
    """A digest of a file, or of all weights and configs below a folder: their names, and every byte of them."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt") and p.is_file())
    files = [folder] if folder.is_file() else files
    states = [(p, p.stat()) for p in files]
    return digest([(str(p.relative_to(folder)), _content(p.resolve(), s.st_size, s.st_mtime_ns)) for p, s in states])


@cache  # one process reads gigabytes once, however many runs it makes
def _content(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
