"""Reads erased weights that other code has saved, as erasures.

Supported, in .safetensors or in a pickle that contains only tensors (.pt, .pth, .ckpt, .bin):

- state dicts of a part of the model, whole or in part: ESD's and UCE's UNets, AdvUnlearn's text encoders, Concept
  Ablation's {"unet": {...}}; by diffusers' names, or by those of `ldm`, of cross-attention or of a whole checkpoint;
  new values or differences;
- LoRAs by the names of kohya (SPM), of diffusers, old and new, and of PEFT, through diffusers' own converters;
- lora.pth of UnGuide's repository;
- folders that `Erasure.save` wrote.
"""

import json
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers.utils.state_dict_utils import PEFT_STATE_DICT_MAPPINGS, UNET_TO_DIFFUSERS, convert_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from unlearning.erasures.base import SETTINGS, Erasure
from unlearning.erasures.module_edit import Adapter
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError, did_you_mean
from unlearning.models.base import Model
from unlearning.models.ldm import converted, diffusers_name, is_whole, read_adapter
from unlearning.models.stable_diffusion import StableDiffusion

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
WRAPPERS = ("state_dict", "model_state_dict")  # keys under which trainers keep the tensors, beside what else they save
BESIDE_LAYERS = re.compile(r"(?:\.|_)lora[._]|^lora_")  # in the names of a LoRA's tensors
A, B = ".lora_A.weight", ".lora_B.weight"
UNGUIDE = 8.0  # the factor that UnGuide's authors apply their lora.pth with
SMALL = 0.1  # of a weight's norm: no erasure makes all weights so small


def read(path: Path, model: Model, scale: float | None = None, difference: bool = False) -> Erasure:
    """The erasure in a file or a folder.

    Args:
        path: The file, or the folder of a saved erasure.
        model: The model to which it is applied; names and shapes are compared with its own.
        scale: Factor of a LoRA's update, beside what the file says; None is UNGUIDE for UnGuide's, which says nothing,
            and 1 for all others.
        difference: Whether a state dict holds what is to be added to the model's weights.

    Raises:
        UserError: If there is nothing at `path`, it cannot be read, it holds a name or a shape that the model does not
            have or a value that is not finite, it changes nothing, or its weights look like differences.
    """
    if (path / SETTINGS).exists():
        return _ours(path, model)
    if not path.is_file():
        raise UserError(f"There is no file {path}, and no folder with an {SETTINGS}: method.path=/the/erased/weights.")
    state = _tensors(path)
    if broken := next((name for name, value in state.items() if not value.isfinite().all()), None):
        raise UserError(f"{path} holds values that are not finite, in {broken}.")
    if all(re.search(r"\.lora\.[AB]$", name) for name in state):
        return _checked(read_adapter(path, UNGUIDE if scale is None else scale), model, path)
    if any(map(BESIDE_LAYERS.search, state)):
        return _checked(_lora(state, model, _configs(path), 1.0 if scale is None else scale, path), model, path)
    return _patch(state, model, path, difference)


def _ours(folder: Path, model: Model) -> Erasure:
    if Erasure.base_of(folder) != model.fingerprint:
        raise UserError(f"The erasure in {folder} was made from another model than {model.name}.")
    return Erasure.load(folder)


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name; of nested mappings, by the names on the way: "unet.conv_in.weight"."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, and reading it could run code. Save its state dict alone, best as "
            ".safetensors."
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        kinds = ", ".join((".safetensors", *PICKLED))
        raise UserError(f"{path} cannot be read as weights ({kinds}): {error}") from error
    if isinstance(saved, Mapping):
        saved = next((saved[name] for name in WRAPPERS if name in saved), saved)
    tensors = dict(_leaves(saved)) if isinstance(saved, Mapping) else {}
    if strange := next((name for name, value in tensors.items() if not torch.is_tensor(value)), None):
        raise UserError(f"{path} holds {strange!r}, which is no tensor of a model.")
    if not tensors:
        raise UserError(f"{path} holds no tensors by name.")
    return tensors


def _leaves(saved: Mapping, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in saved.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# --- weights ----------------------------------------------------------------------------------------------------------


def _patch(state: Mapping[str, Tensor], model: Model, path: Path, difference: bool) -> WeightPatch:
    parameters = model.named_parameters()
    buffers = {f"{part}.{name}" for part, module in model.parts.items() for name, _ in module.named_buffers()}
    there = parameters.keys() | buffers
    state = {_diffusers(name): value for name, value in _converted(state, model, path).items()}
    # The part whose names these are, unless they begin with a part's.
    parts = ["", *(f"{part}." for part in (model.component, *(p for p in model.parts if p != model.component)))]
    prefix = max(parts, key=lambda part: sum(_own(part + name, there) in there for name in state))
    named = {_own(prefix + name, there): value for name, value in state.items()}
    named = {name: value for name, value in named.items() if name not in buffers}
    if unknown := [name for name in named if name not in parameters]:
        raise UserError(
            f"{path} is not for this model: {model.name} has no weight {unknown[0]!r} ({len(unknown)} of {len(named)} "
            f"names are unknown).{did_you_mean(unknown[0], parameters)}"
        )
    _check_shapes({name: (tuple(value.shape), tuple(parameters[name].shape)) for name, value in named.items()}, path)
    if difference:
        named = {name: parameters[name].detach().float() + value.float() for name, value in named.items()}
    elif all(value.norm() < SMALL * parameters[name].norm() for name, value in named.items()):
        raise UserError(
            f"All weights in {path} are smaller than a tenth of the model's: they look like differences, which "
            "method.difference=true adds to the model's weights."
        )
    changed = {n: v for n, v in named.items() if not torch.equal(v.to(parameters[n]), parameters[n])}
    if not changed:
        raise UserError(f"{path} holds the weights that {model.name} has: nothing is erased in it.")
    return WeightPatch(changed)


def _converted(state: Mapping[str, Tensor], model: Model, path: Path) -> Mapping[str, Tensor]:
    """A whole UNet or checkpoint of ldm by diffusers' names; any other state dict as it is."""
    if not is_whole(state):
        return state
    if not isinstance(model, StableDiffusion) or model.component != "unet":
        raise UserError(f"{path} holds a UNet, which {model.name} does not have.")
    try:
        return converted(state, model.pipeline.unet, model.vae)
    except ValueError as error:
        raise UserError(f"{path} is not for this model: {error}.") from error


def _diffusers(name: str) -> str:
    """diffusers' name of a weight of ldm's UNet or text encoder; any other name as it is."""
    if re.match(r"(model\.)?diffusion_model\.", name):
        module, _, which = name.rpartition(".")
        with suppress(ValueError):
            return f"unet.{diffusers_name(module)}.{which}"
    return re.sub(r"^cond_stage_model\.transformer\.", "text_encoder.", name)


def _own(name: str, there: Container[str]) -> str:
    """A name as the model has it: transformers' text encoders had `text_model.` in their names once."""
    return next((n for n in (name, name.replace("text_model.", "", 1)) if n in there), name)


def _check_shapes(shapes: Mapping[str, tuple[tuple, tuple]], path: Path) -> None:
    if wrong := {name: both for name, both in shapes.items() if both[0] != both[1]}:
        name, (theirs, own) = next(iter(wrong.items()))
        raise UserError(
            f"{path} is not for this model: its {name} is {theirs}, the model's {own} ({len(wrong)} of {len(shapes)} "
            "shapes differ)."
        )


# --- LoRA -------------------------------------------------------------------------------------------------------------


def _configs(path: Path) -> dict[str, Any]:
    """By part, or by "" for all parts: PEFT's settings, which PEFT writes beside a file, and diffusers into it.

    Raises:
        UserError: If they cannot be read, or layers differ in alpha.
    """
    beside = path.with_name("adapter_config.json")
    configs: dict[str, Any] = {}
    try:
        if beside.exists():
            configs[""] = dict(json.loads(beside.read_text()))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                saved = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            for name, value in saved.items():
                part, _, setting = name.rpartition(".")
                configs.setdefault(part, {})[setting] = value
        for config in configs.values():
            _ratio(config, rank=1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        place = beside if beside.exists() else path
        raise UserError(f"{place} does not say the LoRA's alpha as PEFT does: {error!r}.") from error
    if any(config.get("alpha_pattern") for config in configs.values()):
        raise UserError(f"{path} is a LoRA whose layers differ in alpha (alpha_pattern), which is not supported.")
    return configs


def _ratio(config: Mapping, rank: int) -> float:
    """PEFT's factor of an update of this rank."""
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


def _lora(
    state: Mapping[str, Tensor], model: Model, configs: Mapping[str, Mapping], scale: float, path: Path
) -> dict[str, Tensor]:
    """A LoRA by the names of `Adapter`, with alpha / r in B."""
    if not isinstance(model, StableDiffusion) or not hasattr(model.pipeline, "lora_state_dict"):
        raise UserError(f"{path} is a LoRA, which diffusers does not load into models of the kind of {model.name}.")
    state = {re.sub(r"\.lora_([AB])\.\w+\.weight$", r".lora_\1.weight", name): value for name, value in state.items()}
    config = {"unet_config": model.denoiser.config} if model.component == "unet" else {}
    try:
        converted, alphas = model.pipeline.lora_state_dict(dict(state), **config)[:2]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} is a LoRA that diffusers cannot convert: {error}") from error
    of_layer = {_layer(name, model): value for name, value in (alphas or {}).items()}
    of_layer |= {_layer(name, model): float(value) for name, value in converted.items() if name.endswith(".alpha")}
    weights: dict[str, Tensor] = {}
    for name, value in converted.items():
        if name.endswith(".alpha"):
            continue
        full = _peft(name, model)
        layer = full.removesuffix(B)
        if full.endswith(B):
            rank = value.shape[1]
            config = configs.get(layer.partition(".")[0], configs.get(""))
            ratio = _ratio(config, rank) if config else 1.0
            value = value.float() * scale * (of_layer[layer] / rank if layer in of_layer else ratio)
        weights[full] = value.float()
    return weights


def _layer(alpha: str, model: Model) -> str:
    """The layer that an alpha belongs to: diffusers names it by the layer, or by the layer's A."""
    return _peft(alpha.removesuffix(".alpha"), model).removesuffix(A)


def _peft(name: str, model: Model) -> str:
    """The full name of a LoRA's tensor as PEFT has it, from any of diffusers' names."""
    name = name.removeprefix("base_model.model.").replace(".processor.", ".")
    name = name if name.partition(".")[0] in model.parts else f"{model.component}.{name}"
    mappings = [UNET_TO_DIFFUSERS] if name.startswith(model.component) else PEFT_STATE_DICT_MAPPINGS.values()
    mapping = {old: new for own in mappings for old, new in own.items()}
    mapping |= {".lora_linear_layer.up": ".lora_B", ".lora_linear_layer.down": ".lora_A"}
    [name] = convert_state_dict({name: None}, mapping)
    layer, dot, which = name.partition(".lora_")
    return f"{_own(layer, model.named_modules())}{dot}{which}"


def _checked(weights: Mapping[str, Tensor], model: Model, path: Path) -> Adapter:
    """The adapter. Raises UserError if a name is not of a layer's A or B, or a shape does not go with its layer."""
    modules: dict[str, nn.Module] = model.named_modules()
    layers = Counter(name.removesuffix(A).removesuffix(B) for name in weights)
    for name in weights:
        layer = name.removesuffix(A).removesuffix(B)
        if layer == name or layer not in modules or layers[layer] != 2:
            hint = did_you_mean(layer, modules) if layer not in modules else ""
            raise UserError(f"{path} is not a LoRA for this model: {name!r} is not of A or B beside a layer.{hint}")
    shapes = {}
    for layer in layers:
        down, up, weight = (
            weights[layer + A].shape,
            weights[layer + B].shape,
            modules[layer].get_parameter("weight").shape,
        )
        shapes[layer] = ((up[0], *down[1:]), tuple(weight))
    _check_shapes(shapes, path)
    return Adapter(weights)
