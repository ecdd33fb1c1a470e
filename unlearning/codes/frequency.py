"""Counts how often each code of a VQ-GAN occurs in images of a concept and in other images, in one pass over both."""

# B batch, K codes, h w grid of codes, N blocks; the two sets of images: forget and retain.
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from unlearning.concepts import Box, UnlearningTask
from unlearning.config.values import Count, Finite, Natural
from unlearning.detectors.base import Detector, detect
from unlearning.detectors.geometry import cells
from unlearning.errors import UserError, unknown
from unlearning.models.vqgan import VQGAN
from unlearning.sampling.reconstruction import FAILED, as_tensor

log = logging.getLogger(__name__)
FORGET, RETAIN = 0, 1  # indices of the two sets
BLOCK = 3  # side of a block, in codes
EPS = 1e-8  # added to both counts of the ratio, as in the study's code
JEFFREYS = 0.5  # added to every count of the log-odds


class CodeCounts(Metric):
    """Counts of codes, of pairs of neighbouring codes, and a random sample of 3 × 3 blocks of codes.

    Its memory depends on the size of the codebook only, not on the number of images.

    Args:
        K: Size of the codebook.
        pairs: Whether to count pairs; this takes 16 K² bytes.
        blocks: How many blocks of the retain images to sample (reservoir sampling; Vitter, 1985).
    """

    full_state_update = False
    blocks: list[Tensor]
    keys: list[Tensor]

    def __init__(self, K: int, pairs: bool = False, blocks: int = 0):
        super().__init__()
        self.K, self.sample_size = K, blocks
        self.add_state("codes", torch.zeros(2, K, dtype=torch.long), "sum")
        self.add_state("images", torch.zeros(2, dtype=torch.long), "sum")
        self.add_state("units", torch.zeros(2, K, dtype=torch.float64), "sum")  # sums of normalised histograms
        size = K if pairs else 0
        # [set, 0, a, b]: how often b is right of a; [set, 1, a, b]: how often b is below a.
        self.add_state("pairs", torch.zeros(2, 2, size, size, dtype=torch.int32), "sum")
        self.add_state("blocks", [], "cat")  # one tensor, or one from each process
        self.add_state("keys", [], "cat")  # a uniform random number for each block; the largest are kept

    def update(self, codes: Tensor, which: int, mask: Tensor | None = None) -> None:
        """Counts the grids (B, h, w) of one set. `mask` (B, h, w) bool says which cells count; by default all."""
        mask = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask.to(codes.device)
        counts = codes.new_zeros(len(codes), self.K + 1)
        counts.scatter_add_(1, torch.where(mask, codes, self.K).flatten(1), torch.ones_like(codes).flatten(1))
        counts = counts[:, : self.K]
        self.codes[which] += counts.sum(0)
        self.images[which] += (counts.sum(1) > 0).sum()
        self.units[which] += F.normalize(counts.double(), dim=1).sum(0)
        if self.pairs.numel():
            for direction, (a, b) in enumerate(_neighbours(codes, mask)):
                flat = self.pairs[which, direction].view(-1)
                flat.index_add_(0, a * self.K + b, torch.ones_like(a, dtype=torch.int32))
        if self.sample_size and which == RETAIN and min(codes.shape[1:]) >= BLOCK:
            self._sample(codes)

    def _sample(self, codes: Tensor) -> None:
        new = codes.unfold(1, BLOCK, 1).unfold(2, BLOCK, 1).reshape(-1, BLOCK, BLOCK).int()
        keys = torch.rand(len(new), device=new.device)
        blocks, keys = self._largest(dim_zero_cat([*self.blocks, new]), dim_zero_cat([*self.keys, keys]))
        self.blocks, self.keys = [blocks], [keys]

    def _largest(self, blocks: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks with the largest keys."""
        chosen = keys.topk(min(self.sample_size, len(keys))).indices
        return blocks[chosen], keys[chosen]

    def compute(self) -> dict:
        """The arguments of `Frequencies`."""
        pairs = tuple(p.to_sparse().cpu() for p in self.pairs[RETAIN]) if self.pairs.numel() else ()
        top = self.pairs.flatten(1).amax(1).tolist() if self.pairs.numel() else None
        none = torch.zeros(0, BLOCK, BLOCK)
        several = len(self.keys) > 0  # every process kept a sample
        blocks = self._largest(dim_zero_cat(self.blocks), dim_zero_cat(self.keys))[0] if several else none
        return {
            "codes": self.codes.cpu(),
            "images": self.images.tolist(),
            "units": self.units.cpu(),
            "pairs": pairs,
            "blocks": blocks.cpu().long(),
            "top_pairs": top,
        }


def _neighbours(codes: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(left, right) of all horizontal pairs, and (upper, lower) of all vertical pairs, inside the mask."""
    for first, second in ((np.s_[..., :-1], np.s_[..., 1:]), (np.s_[..., :-1, :], np.s_[..., 1:, :])):
        both = mask[first] & mask[second]
        yield codes[first][both], codes[second][both]


@dataclass(frozen=True)
class Frequencies:
    """The result of a counting pass.

    Attributes:
        codes: (2, K), how often each code occurs in forget and in retain images.
        images: The numbers of forget and of retain images with at least one counted cell.
        units: (2, K), the sums over images of histograms of length 1.
        pairs: (K, K) sparse each: in retain images, how often a code is right of another, and below another.
        blocks: (N, 3, 3), a sample of the retain images' blocks.
        top_pairs: The count of the most frequent pair in any direction, in each set; None if pairs were not counted.
    """

    codes: Tensor
    images: Sequence[int]
    units: Tensor
    pairs: tuple[Tensor, ...] = ()
    blocks: Tensor = field(default_factory=lambda: torch.zeros(0, BLOCK, BLOCK, dtype=torch.long))
    top_pairs: Sequence[int] | None = None

    def ratio(self) -> Tensor:
        """The study's score (K,): (n_f + 1e-8) / (n_r + 1e-8). It is about 1e8 n_f for codes without retain count."""
        forget, retain = self.codes.double()
        return (forget + EPS) / (retain + EPS)

    def log_odds(self) -> Tensor:
        """(K,): log p_f - log p_r of frequencies smoothed by half a count. The sizes of the sets do not matter."""
        counts = self.codes.double() + JEFFREYS
        forget, retain = (counts / counts.sum(1, keepdim=True)).log()
        return forget - retain

    def statistics(self, which: int) -> dict[str, float]:
        """The study's table: how the codes of a set are spread over the codebook."""
        counts, n = self.codes[which].double(), self.images[which]
        p = counts / counts.sum().clamp(min=1)
        ordered = p.sort(descending=True).values
        entropy = -(p * p.clamp(min=1e-30).log2()).sum().item()
        # The mean of u_i · u_j over pairs of images i ≠ j is (|sum u|² - n) / (n (n - 1)).
        cosine = (self.units[which].square().sum().item() - n) / (n * (n - 1)) if n > 1 else float("nan")
        return {
            "images": n,
            "codes": int(counts.sum()),
            "unique": int((counts > 0).sum()),
            "unique, % of the codebook": 100 * (counts > 0).double().mean().item(),
            "most frequent, %": 100 * ordered[0].item(),
            "top 10, %": 100 * ordered[:10].sum().item(),
            "top 50, %": 100 * ordered[:50].sum().item(),
            "entropy, bits": entropy,
            "entropy, % of the maximum": 100 * entropy / torch.tensor(float(len(p))).log2().item(),
            "cosine of two images' histograms": cosine,
            **({"count of the most frequent pair": self.top_pairs[which]} if self.top_pairs else {}),
        }


SCORES = {"ratio": Frequencies.ratio, "log_odds": Frequencies.log_odds}


@dataclass(frozen=True)
class Selection:
    """Chooses E, the codes of the concept, and S, the safe codes that may replace them.

    Args:
        score: "ratio", as in the study, or "log_odds".
        top: E is at most this many codes, those of the highest score (the study's K); None for no limit.
        threshold: The least score of a code of E; None for no limit.
        min_freq: The least count of a safe code in the retain images.

    Raises:
        UserError: For an unknown score, or if `top` and `threshold` are both None; when called, if E or S is empty.
    """

    score: str = "ratio"
    top: Count | None = 250
    threshold: Finite | None = None
    min_freq: Natural = 100

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)
        if self.top is None and self.threshold is None:
            raise UserError("The codes of the concept are not defined: set method.selection.top or .threshold.")

    def __call__(self, frequencies: Frequencies) -> tuple[Tensor, Tensor]:
        """E by falling score, and S: indices of codes."""
        score = SCORES[self.score](frequencies)
        explicit = score.argsort(descending=True, stable=True)[: self.top]
        if self.threshold is not None:
            explicit = explicit[score[explicit] >= self.threshold]
        if not len(explicit):
            raise UserError(
                f"No code has a score ({self.score}) of {self.threshold} or more; the highest is {score.max():.3g}. "
                "Lower method.selection.threshold, or set method.selection.top."
            )
        safe = frequencies.codes[RETAIN] >= max(1, self.min_freq)
        safe[explicit] = False
        if not safe.any():
            raise UserError(
                f"There is no safe code: outside E, no code occurs {self.min_freq} times in the retain images (the "
                f"most frequent code occurs {int(frequencies.codes[RETAIN].max())} times). Lower "
                "method.selection.min_freq or method.selection.top, or give more retain images."
            )
        return explicit, safe.nonzero().flatten()


class _CountingPass(pl.LightningModule):
    """The pass as a Lightning prediction, which brings a progress bar and distributes the images over processes.

    The results are in `frequencies`.
    """

    def __init__(self, model: VQGAN, counts: CodeCounts, detector: Detector | None):
        super().__init__()
        self.model, self.counts, self.detector = model, counts.to(model.device), detector

    def transfer_batch_to_device(self, batch, device, dataloader_idx: int):
        return batch  # the model moves it

    def predict_step(self, batch: list[tuple[np.ndarray, Sequence[Box] | None]], batch_idx: int, dataloader_idx: int):
        if not batch:
            return
        images, mask = np.stack([image for image, _ in batch]), None
        codes = self.model.encode(as_tensor(images))
        if self.detector and dataloader_idx == FORGET:
            records = detect(self.detector, images, [boxes for _, boxes in batch])
            for record in records:
                if FAILED in record:
                    log.warning("A forget image is not counted: %s", record[FAILED])
            mask = cells([record.get("boxes", ()) for record in records], images.shape[1:3], codes.shape[1:])
        self.counts.update(codes, dataloader_idx, mask)

    def on_predict_epoch_end(self) -> None:
        self.frequencies = Frequencies(**self.counts.compute())


class _ImagesWithBoxes(Dataset):
    """Images, and None after the last: Lightning needs an item for each of its processes."""

    def __init__(self, images: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]] | None, processes: int):
        self.images, self.boxes, self.processes = images, boxes, processes

    def __len__(self) -> int:
        return max(len(self.images), self.processes)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Sequence[Box] | None] | None:
        if i >= len(self.images):
            return None
        return self.images[i], self.boxes[i] if self.boxes else None


def _without_none(items: Sequence) -> list:
    return [item for item in items if item is not None]


def count_codes(
    model: VQGAN,
    task: UnlearningTask,
    trainer: Callable[..., pl.Trainer],
    *,
    batch_size: int = 16,
    within: Detector | None = None,
    pairs: bool = False,
    blocks: int = 0,
) -> Frequencies:
    """Counts the codes of a task's forget and retain images in one pass.

    Args:
        within: Counts only the cells of a forget image inside this detector's boxes; None for all cells.
        pairs, blocks: See `CodeCounts`.

    Raises:
        UserError: If the task has no forget images or no retain images.
    """
    for kind, images in (("forget", task.forget_images), ("retain", task.retain_images)):
        if not len(images):
            raise UserError(f"Counting codes needs forget and retain images, but this dataset has no {kind} images.")
    if (side := len(task.forget_images[0])) != model.size:
        size = model.size
        log.warning("%s expects images of %d pixels, not %d: dataset.size=%d", model.name, size, side, size)
    boxes = task.forget_boxes() if within and task.forget_boxes else None
    own = trainer()
    processes, count = own.num_devices * own.num_nodes, len(task.forget_images) + len(task.retain_images)
    sets = [
        _ImagesWithBoxes(*images, processes) for images in ((task.forget_images, boxes), (task.retain_images, None))
    ]
    loaders = [DataLoader(images, batch_size, collate_fn=_without_none) for images in sets]
    counting = _CountingPass(model, CodeCounts(len(model.codebook), pairs, blocks), within)
    start = time.perf_counter()
    own.predict(counting, loaders, return_predictions=False)
    log.info("counted the codes of %d images, %.0f per second", count, count / (time.perf_counter() - start))
    return counting.frequencies
