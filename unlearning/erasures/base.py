"""What a method leaves behind: a frozen edit that can be applied to a model and undone, saved and loaded."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor

from unlearning.codes.replacement import Counted, Replacement
from unlearning.detectors.base import Detector, cells, found
from unlearning.errors import UserError
from unlearning.sampling.guidance import Guidance, NegativePrompt
from unlearning.sampling.reconstruction import FAILED
from unlearning.sampling.unguidance import UnGuidance  # noqa: F401 (a saved one is found among Guidance's subclasses)
from unlearning.store.files import digest, write_atomically

HEADER = """\
# {title}

{how}

Made by `unlearning` from `{base}`.
"""


class Erasure(ABC):
    """`with erasure.applied_to(model):` the model is the erased one; afterwards it is, to the bit, what it was."""

    @abstractmethod
    def applied_to(self, model) -> AbstractContextManager: ...

    @abstractmethod
    def usage(self, base) -> str:
        """How plain diffusers, without this package, uses the saved erasure with the model `base` (Markdown)."""

    @abstractmethod
    def _settings(self) -> dict:
        """All of it that is not a tensor, as JSON."""

    def _tensors(self) -> Mapping[str, Tensor]:
        return {}

    def save(self, folder: Path, *, base, title: str = "An erased concept") -> None:
        """Writes erasure.json, weights.safetensors where there are any, and a README that says how to use them.

        `base` is the model that was erased from: its name goes into the README, its fingerprint into erasure.json.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self._tensors():
            weights = serialised({k: v.contiguous().cpu() for k, v in self._tensors().items()})
            write_atomically(folder / "weights.safetensors", weights)  # save_file's errors are no OSError
        (folder / "README.md").write_text(HEADER.format(title=title, how=self.usage(base), base=base.name))
        settings = {"kind": type(self).__name__, "base": base.fingerprint, **self._settings()}
        write_atomically(folder / "erasure.json", json.dumps(settings, indent=2))

    @staticmethod
    def load(folder: Path) -> "Erasure":
        """Reads what `save` wrote. Raises UserError where there is no erasure or it is of an unknown kind."""
        if not (folder / "erasure.json").exists():
            raise UserError(f"There is no erasure in {folder}: run the fit stage first.")
        settings = json.loads((folder / "erasure.json").read_text())
        settings.pop("base")
        kinds = {kind.__name__: kind for kind in Erasure.__subclasses__()}
        kind = kinds.get(settings.pop("kind"))
        if kind is None:
            raise UserError(f"{folder}/erasure.json is of no kind that this version knows: {', '.join(kinds)}.")
        weights = folder / "weights.safetensors"
        return kind._restore(settings, load_file(weights) if weights.exists() else {})

    @staticmethod
    def base_of(folder: Path) -> str:
        """The fingerprint of the model that a saved erasure was made for."""
        return json.loads((folder / "erasure.json").read_text())["base"]

    @classmethod
    @abstractmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "Erasure": ...

    @property
    def fingerprint(self) -> str:
        """A digest of its content."""
        tensors = {k: digest(v.shape, v.float().cpu().numpy().tobytes().hex()) for k, v in self._tensors().items()}
        return digest(type(self).__name__, self._settings(), tensors)


@dataclass(frozen=True)
class WeightPatch(Erasure):
    """New values for some weights of the model's network, by parameter name. An empty patch is the unedited model."""

    weights: Mapping[str, Tensor] = field(repr=False)

    @contextmanager
    def applied_to(self, model) -> Iterator:
        parameters = dict(model.network.named_parameters())
        unknown = self.weights.keys() - parameters.keys()
        if unknown:
            raise UserError(f"This erasure is not for this model: it has no weight named {sorted(unknown)[0]}.")
        before = {name: parameters[name].detach().clone() for name in self.weights}
        try:
            write(parameters, self.weights)
            yield model
        finally:
            write(parameters, before)

    def usage(self, base) -> str:
        if not self.weights:
            return "Nothing was erased: this is the unedited model."
        return (
            f"{len(self.weights)} tensors of the denoiser, in place of its own:\n\n"
            "```python\n"
            "from diffusers import DiffusionPipeline\n"
            "from safetensors.torch import load_file\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{base.name}")\n'
            f'pipe.{base.component}.load_state_dict(load_file("weights.safetensors"), strict=False)\n'
            "```"
        )

    def _settings(self) -> dict:
        return {}

    def _tensors(self) -> Mapping[str, Tensor]:
        return self.weights

    @classmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "WeightPatch":
        return cls(tensors)


@dataclass(frozen=True)
class GuidanceEdit(Erasure):
    """Another rule for combining predictions at each sampling step: a frozen dataclass of sampling/."""

    guidance: Guidance

    @contextmanager
    def applied_to(self, model) -> Iterator:
        before = model.guidance
        try:
            model.guidance = self.guidance
            yield model
        finally:
            model.guidance = before

    def usage(self, base) -> str:
        if isinstance(self.guidance, NegativePrompt):
            return f'Pass `negative_prompt="{self.guidance.prompt}"` to the pipeline of `{base.name}` at every call.'
        how = json.dumps(self._settings(), indent=2)
        return f"A sampling rule of unlearning/sampling, with these settings:\n\n```json\n{how}\n```"

    def _settings(self) -> dict:
        return {"guidance": type(self.guidance).__name__, "arguments": asdict(self.guidance)}

    @classmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "GuidanceEdit":
        kinds = {kind.__name__: kind for kind in Guidance.__subclasses__()}
        return cls(kinds[settings["guidance"]](**settings["arguments"]))


@dataclass(frozen=True)
class Adapter(Erasure):
    """A LoRA beside the denoiser's linear maps, W x + B A x, and the guidance that belongs to it, if any does.

    `weights` are A and B under the names that diffusers' load_lora_weights expects: "unet.<module>.lora_A.weight"
    (r, in) and "unet.<module>.lora_B.weight" (out, r), scale included.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    guidance: Guidance | None = None

    @contextmanager
    def applied_to(self, model) -> Iterator:
        modules = {name.removeprefix(f"{model.component}.").rpartition(".lora_")[0] for name in self.weights}
        unknown = modules - {name for name, _ in model.denoiser.named_modules()}
        if unknown:
            raise UserError(f"This adapter is not for this model: it has no layer named {sorted(unknown)[0]}.")
        rule = GuidanceEdit(self.guidance or model.guidance)
        try:
            model.denoiser.load_lora_adapter(dict(self.weights), prefix=model.component)
            model.denoiser.eval()
            with rule.applied_to(model):
                yield model
        finally:
            model.denoiser.unload_lora()

    def usage(self, base) -> str:
        how = (
            f"A LoRA of {len(self.weights) // 2} layers:\n\n"
            "```python\n"
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{base.name}")\n'
            'pipe.load_lora_weights(".", weight_name="weights.safetensors")\n'
            "```"
        )
        return how if self.guidance is None else f"{how}\n\n{GuidanceEdit(self.guidance).usage(base)}"

    def _settings(self) -> dict:
        return GuidanceEdit(self.guidance)._settings() if self.guidance else {}

    def _tensors(self) -> Mapping[str, Tensor]:
        return self.weights

    @classmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "Adapter":
        return cls(tensors, GuidanceEdit._restore(settings, {}).guidance if settings else None)


@dataclass(frozen=True)
class CodebookEdit(Erasure):
    """Other codes in the place of some of a picture's, between a VQ-GAN's encoder and its decoder.

    Args:
        known: What the replacement goes by.
        replacement: What is put there.
        detector: Where; without one, wherever a code of E stands.
    """

    known: Counted = field(repr=False)
    replacement: Replacement
    detector: Detector | None = None

    @contextmanager
    def applied_to(self, model) -> Iterator:
        before, fill = model.edit, self.replacement.prepared(self.known, model.codebook)

        def edit(images: np.ndarray, codes: Tensor, boxes: Sequence, seeds: Sequence[int]) -> tuple[Tensor, list[dict]]:
            """Codes (B, h, w) of pictures (B, H, W, 3) uint8 as they are decoded, and what was replaced where."""
            old = codes.cpu()
            new, decided = old.clone(), found(self.detector, images, boxes)
            where = cells([told.get("boxes", ()) for told in decided], images.shape[1:3], codes.shape[1:])
            where = where if self.detector else torch.isin(old, self.known.explicit)
            for i, seed in enumerate(seeds):
                if FAILED not in decided[i]:
                    new[i] = fill(old[i], where[i], torch.Generator().manual_seed(seed))
                    changed = (new[i] != old[i]).sum()
                    decided[i] |= {"cells": old[i].numel(), "chosen": int(where[i].sum()), "changed": int(changed)}
            return new, decided

        try:
            model.edit = edit
            yield model
        finally:
            model.edit = before

    def usage(self, base) -> str:
        how = json.dumps(self._settings(), indent=2)
        return (
            f"Codes replaced between the encoder and the decoder of `{base.name}`, with these settings:\n\n"
            f"```json\n{how}\n```\n\nTo clean other pictures: `unlearn ... dataset=folder input=/a/folder/of/images`."
        )

    def _settings(self) -> dict:
        parts = {"replacement": self.replacement, "detector": self.detector}
        return {name: part and {"kind": type(part).__name__, **asdict(part)} for name, part in parts.items()}

    def _tensors(self) -> Mapping[str, Tensor]:
        tensors = {f.name: getattr(self.known, f.name) for f in fields(Counted)}
        for name in [n for n, t in tensors.items() if t is not None and t.is_sparse]:
            counts = tensors.pop(name).coalesce()
            tensors |= {f"{name}.indices": counts.indices().int(), f"{name}.values": counts.values()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "CodebookEdit":
        K, known = len(tensors["codes"]), {}
        for name, tensor in tensors.items():
            whole, _, part = name.partition(".")
            if not part:
                known[name] = tensor
            elif part == "indices":
                known[whole] = torch.sparse_coo_tensor(tensor.long(), tensors[f"{whole}.values"], (K, K))
        made = {}
        for name, kinds in (("replacement", Replacement), ("detector", Detector)):
            told = dict(settings[name] or {})
            known_kinds = {kind.__name__: kind for kind in kinds.__subclasses__()}
            made[name] = known_kinds[told.pop("kind")](**told) if told else None
        return cls(Counted(**known), **made)


@torch.no_grad()
def write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Puts `values` into the parameters of those names, in place."""
    for name, value in values.items():
        parameters[name].copy_(value)
