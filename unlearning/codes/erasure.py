"""Latent codes replaced between a VQ-GAN's encoder and its decoder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from unlearning.codes.replacement import Counted, Replacement
from unlearning.detectors.base import Detector, cells, found
from unlearning.erasures.base import Erasure, as_json, from_json
from unlearning.sampling.reconstruction import FAILED


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
    def _applied(self, model) -> Iterator[None]:
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
            yield
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
        return {name: part and as_json(part) for name, part in parts.items()}

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
        kinds = {"replacement": Replacement, "detector": Detector}
        made = {name: settings[name] and from_json(settings[name], kind) for name, kind in kinds.items()}
        return cls(Counted(**known), **made)
