"""The erasure of a VQ-GAN: codes are replaced between encoder and decoder."""

# B batch, K codes, h w grid of codes, H W height and width of an image.
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from unlearning.codes.replacement import CodeStatistics, Replacement
from unlearning.detectors.base import Detector, Known, detect
from unlearning.detectors.geometry import cells
from unlearning.erasures.base import Erasure, as_json, from_json, source
from unlearning.models.base import Model
from unlearning.models.vqgan import VQGAN
from unlearning.sampling.reconstruction import FAILED


@dataclass(frozen=True)
class CodebookEdit(Erasure):
    """Replaces codes of an image before it is decoded.

    Args:
        statistics: E, S and the counts that the replacement needs.
        replacement: How the codes are replaced.
        detector: Finds the boxes in which every code is replaced; None replaces the codes of E wherever they occur.
    """

    statistics: CodeStatistics = field(repr=False)
    replacement: Replacement
    detector: Detector | None = None

    @contextmanager
    def _applied(self, model: VQGAN) -> Iterator[None]:
        before, fill = model.edit, self.replacement.rule(self.statistics, model.codebook)

        def edit(images: np.ndarray, codes: Tensor, known: Known, seeds: Sequence[int]) -> tuple[Tensor, list[dict]]:
            """The codes (B, h, w) to decode for images (B, H, W, 3) uint8, and a record of each replacement."""
            old = codes.cpu()
            new, records = old.clone(), detect(self.detector, images, known)
            if self.detector:
                mask = cells([record.get("boxes", ()) for record in records], images.shape[1:3], old.shape[1:])
            else:
                mask = torch.isin(old, self.statistics.explicit)
            for i, seed in enumerate(seeds):
                if FAILED not in records[i]:
                    new[i] = fill(old[i], mask[i], torch.Generator().manual_seed(seed))
                    changed = (new[i] != old[i]).sum()
                    records[i] |= {"cells": old[i].numel(), "chosen": int(mask[i].sum()), "changed": int(changed)}
            return new, records

        try:
            model.edit = edit
            yield
        finally:
            model.edit = before

    def usage(self, base: Model) -> str:
        settings = json.dumps(self._settings(), indent=2)
        return (
            f"Codes are replaced between the encoder and the decoder of `{source(base)}`, with these settings:\n\n"
            f"```json\n{settings}\n```\n\nTo edit other images: `unlearn ... dataset=folder input=/a/folder/of/images`."
        )

    def _settings(self) -> dict:
        parts = {"replacement": self.replacement, "detector": self.detector}
        return {name: part and as_json(part) for name, part in parts.items()}

    def _tensors(self) -> Mapping[str, Tensor]:
        tensors = {f.name: getattr(self.statistics, f.name) for f in fields(CodeStatistics)}
        for name in [n for n, t in tensors.items() if t is not None and t.is_sparse]:
            counts = tensors.pop(name).coalesce()
            tensors |= {f"{name}.indices": counts.indices().int(), f"{name}.values": counts.values()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "CodebookEdit":
        K, statistics = len(tensors["codes"]), {}
        for name, tensor in tensors.items():
            whole, _, part = name.partition(".")
            if not part:
                statistics[name] = tensor
            elif part == "indices":
                values = tensors[f"{whole}.values"]
                statistics[whole] = torch.sparse_coo_tensor(tensor.long(), values, (K, K), check_invariants=True)
        detector = settings["detector"] and from_json(settings["detector"], Detector)
        return cls(CodeStatistics(**statistics), from_json(settings["replacement"], Replacement), detector)
