"""How often each code of a VQ-GAN occurs in pictures of a concept and in others, in one pass over both."""

# B batch, K codes, h w grid, N blocks kept; sets: forget, then retain.
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from unlearning.concepts import Box
from unlearning.detectors.base import Detector, cells, found
from unlearning.errors import UserError
from unlearning.sampling.reconstruction import FAILED, as_tensor

log = logging.getLogger(__name__)
FORGET, RETAIN = SETS = (0, 1)
BLOCK = 3  # codes a side
TINY = 1e-8  # what the study adds to both counts
JEFFREYS = 0.5  # what the log-odds add


class CodeCounts(Metric):
    """Counts of codes, of pairs of neighbours, and a sample of 3 × 3 blocks. Its size is that of the codebook.

    Args:
        K: Codes.
        pairs: Whether to count pairs, 16 K² bytes.
        blocks: How many blocks of retain pictures to keep (Vitter's reservoir, 1985); 0 for none.
    """

    full_state_update = False

    def __init__(self, K: int, pairs: bool = False, blocks: int = 0):
        super().__init__()
        self.K, self.keep = K, blocks
        self.add_state("codes", torch.zeros(2, K, dtype=torch.long), "sum")
        self.add_state("images", torch.zeros(2, dtype=torch.long), "sum")
        self.add_state("units", torch.zeros(2, K, dtype=torch.float64), "sum")  # sum of unit histograms
        size = K if pairs else 0
        # [set, 0, a, b]: how often b is right of a; [set, 1, a, b]: how often it is below.
        self.add_state("pairs", torch.zeros(2, 2, size, size, dtype=torch.int32), "sum")
        self.add_state("blocks", [], "cat")  # one tensor, or one of each process
        self.add_state("keys", [], "cat")  # a uniform number a block: those with the largest stay

    def update(self, codes: Tensor, which: int, where: Tensor | None = None) -> None:
        """Takes grids (B, h, w) of one set; `where` (B, h, w) bool says which places count, all by default."""
        where = torch.ones_like(codes, dtype=torch.bool) if where is None else where.to(codes.device)
        counts = codes.new_zeros(len(codes), self.K + 1)
        counts.scatter_add_(1, torch.where(where, codes, self.K).flatten(1), torch.ones_like(codes).flatten(1))
        counts = counts[:, : self.K]
        self.codes[which] += counts.sum(0)
        self.images[which] += (counts.sum(1) > 0).sum()
        self.units[which] += F.normalize(counts.double(), dim=1).sum(0)
        if self.pairs.numel():
            for direction, (a, b) in enumerate(_neighbours(codes, where)):
                flat = self.pairs[which, direction].view(-1)
                flat.index_add_(0, a * self.K + b, torch.ones_like(a, dtype=torch.int32))
        if self.keep and which == RETAIN and min(codes.shape[1:]) >= BLOCK:
            self._sample(codes)

    def _sample(self, codes: Tensor) -> None:
        found = codes.unfold(1, BLOCK, 1).unfold(2, BLOCK, 1).reshape(-1, BLOCK, BLOCK).int()
        blocks, keys = self._kept([*self.blocks, found], [*self.keys, torch.rand(len(found), device=found.device)])
        self.blocks, self.keys = [blocks], [keys]

    def _kept(self, blocks: list[Tensor], keys: list[Tensor]) -> tuple[Tensor, Tensor]:
        blocks, keys = dim_zero_cat(blocks), dim_zero_cat(keys)
        chosen = keys.topk(min(self.keep, len(keys))).indices
        return blocks[chosen], keys[chosen]

    def compute(self) -> dict:
        """Arguments of Frequencies."""
        pairs = tuple(p.to_sparse().cpu() for p in self.pairs[RETAIN]) if self.pairs.numel() else ()
        # The most frequent pair in any direction, of each set.
        top = self.pairs.flatten(1).amax(1).tolist() if self.pairs.numel() else None
        none = torch.zeros(0, BLOCK, BLOCK)
        blocks = self._kept(self.blocks, self.keys)[0] if len(self.keys) else none  # each process kept so many
        return {
            "codes": self.codes.cpu(),
            "images": self.images.tolist(),
            "units": self.units.cpu(),
            "pairs": pairs,
            "blocks": blocks.cpu().long(),
            "top_pairs": top,
        }


def _neighbours(codes: Tensor, where: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(left, right) of all pairs in a row, and (upper, lower) of all in a column, whose places both count."""
    for first, second in ((np.s_[..., :-1], np.s_[..., 1:]), (np.s_[..., :-1, :], np.s_[..., 1:, :])):
        both = where[first] & where[second]
        yield codes[first][both], codes[second][both]


@dataclass(frozen=True)
class Frequencies:
    """What a pass counted.

    Attributes:
        codes: (2, K), of forget and of retain pictures.
        images: Pictures of each set of which some place counted.
        units: (2, K), the sums of the pictures' histograms, each of length 1.
        pairs: How often a code stands right of another, and below another, in retain pictures: (K, K) sparse each.
        blocks: (N, 3, 3), some of the retain pictures.
        top_pairs: How often the most frequent pair occurs, in either set; None where pairs were not counted.
    """

    codes: Tensor
    images: Sequence[int]
    units: Tensor
    pairs: tuple[Tensor, ...] = ()
    blocks: Tensor | None = None
    top_pairs: Sequence[int] | None = None

    def ratio(self) -> Tensor:
        """(K,): the study's score, (n_f + 1e-8) / (n_r + 1e-8). A code that no retain picture has scores about 1e8."""
        forget, retain = self.codes.double()
        return (forget + TINY) / (retain + TINY)

    def log_odds(self) -> Tensor:
        """(K,): log p_f - log p_r of shares smoothed by half a count, so that the sets' sizes do not matter."""
        counts = self.codes.double() + JEFFREYS
        forget, retain = (counts / counts.sum(1, keepdim=True)).log()
        return forget - retain

    def statistics(self, which: int) -> dict[str, float]:
        """The study's table: how widely the codes of a set's pictures are spread."""
        counts, n = self.codes[which].double(), self.images[which]
        p = counts / counts.sum().clamp(min=1)
        ordered = p.sort(descending=True).values
        entropy = -(p * p.clamp(min=1e-30).log2()).sum().item()
        # The mean over pairs of pictures of u_i · u_j, of (|sum u|² - n) / (n (n - 1)).
        cosine = (self.units[which].square().sum().item() - n) / (n * (n - 1)) if n > 1 else float("nan")
        return {
            "images": n,
            "codes": int(counts.sum()),
            "unique": int((counts > 0).sum()),
            "unique, % of the codebook": 100 * (counts > 0).double().mean().item(),
            "the most frequent, %": 100 * ordered[0].item(),
            "top 10, %": 100 * ordered[:10].sum().item(),
            "top 50, %": 100 * ordered[:50].sum().item(),
            "entropy, bits": entropy,
            "entropy, % of the most": 100 * entropy / torch.tensor(float(len(p))).log2().item(),
            "cosine of two pictures' histograms": cosine,
            **({"the most frequent pair of neighbours": self.top_pairs[which]} if self.top_pairs else {}),
        }


SCORES = {"ratio": Frequencies.ratio, "log_odds": Frequencies.log_odds}


@dataclass(frozen=True)
class Selection:
    """Which codes are the concept's, E, and which are safe to put in their place, S.

    Args:
        score: "ratio", as published, or "log_odds".
        top: How many codes of the highest score are E, K in the study; None for all above the threshold.
        threshold: What a code of E must score at least; None for no such bound.
        min_freq: How often retain pictures have a safe code at least.

    Raises:
        UserError: For an unknown score; when called, if E or S comes out empty.
    """

    score: str = "ratio"
    top: int | None = 250
    threshold: float | None = None
    min_freq: int = 100

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UserError(f"There is no score {self.score!r}; there are {', '.join(SCORES)}.")
        if self.top is None and self.threshold is None:
            raise UserError("Which codes are the concept's? Set method.selection.top or method.selection.threshold.")

    def __call__(self, found: Frequencies) -> tuple[Tensor, Tensor]:
        """E by falling score, and S: indices of codes."""
        score = SCORES[self.score](found)
        explicit = score.argsort(descending=True, stable=True)[: self.top]
        if self.threshold is not None:
            explicit = explicit[score[explicit] >= self.threshold]
        if not len(explicit):
            raise UserError(
                f"No code scores {self.threshold} or more ({self.score}; the highest is {score.max():.3g}): lower "
                "method.selection.threshold, or choose the first so many by method.selection.top."
            )
        safe = found.codes[RETAIN] >= max(1, self.min_freq)
        safe[explicit] = False
        if not safe.any():
            raise UserError(
                f"No code is safe: none that is not the concept's occurs {self.min_freq} times in the retain pictures "
                f"(the most frequent {int(found.codes[RETAIN].max())} times). Lower method.selection.min_freq or "
                "method.selection.top, or give more retain pictures."
            )
        return explicit, safe.nonzero().flatten()


class Counting(pl.LightningModule):
    """The pass, as a Lightning prediction: a progress bar, and each process its share."""

    def __init__(self, model, counts: CodeCounts, detector: Detector | None):
        super().__init__()
        self.model, self.counts, self.detector = model, counts.to(model.device), detector
        self.frequencies: Frequencies | None = None

    def transfer_batch_to_device(self, batch, device, dataloader_idx: int):
        return batch  # the model knows its own

    def predict_step(self, batch: list[tuple[np.ndarray, Sequence[Box] | None]], batch_idx: int, dataloader_idx: int):
        images, where = np.stack([image for image, _ in batch]), None
        codes = self.model.encode(as_tensor(images))
        if self.detector and dataloader_idx == FORGET:
            told = found(self.detector, images, [boxes for _, boxes in batch])
            for why in (t[FAILED] for t in told if FAILED in t):
                log.warning("a forget picture is not counted: %s", why)
            where = cells([t.get("boxes", ()) for t in told], images.shape[1:3], codes.shape[1:])
        self.counts.update(codes, dataloader_idx, where)

    def on_predict_epoch_end(self) -> None:
        self.frequencies = Frequencies(**self.counts.compute())


class _Pictures(Sequence):
    def __init__(self, images: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]] | None):
        self.images, self.boxes = images, boxes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Sequence[Box] | None]:
        return self.images[i], self.boxes[i] if self.boxes else None


def count(
    model, task, trainer: Callable[..., pl.Trainer], *, batch_size: int = 16, within: Detector | None = None, **kept
) -> Frequencies:
    """One pass over a task's forget and retain images.

    Args:
        within: Of a forget image only the places inside this detector's boxes count.
        kept: What CodeCounts is to keep besides the codes.

    Raises:
        UserError: If the task lacks either kind of image.
    """
    for kind, images in (("forget", task.forget_images), ("retain", task.retain_images)):
        if not len(images):
            raise UserError(f"Codes are counted in forget and in retain images, and there are no {kind} images.")
    if (side := len(task.forget_images[0])) != model.size:
        size = model.size
        log.warning("%s is for pictures of %d pixels, and these have %d: dataset.size=%d", model.name, size, side, size)
    boxes = task.forget_boxes() if within and task.forget_boxes else None
    sets = (_Pictures(task.forget_images, boxes), _Pictures(task.retain_images, None))
    loaders = [DataLoader(pictures, batch_size, collate_fn=list) for pictures in sets]
    counting = Counting(model, CodeCounts(len(model.codebook), **kept), within)
    start = time.perf_counter()
    trainer().predict(counting, loaders, return_predictions=False)
    rate = sum(map(len, sets)) / (time.perf_counter() - start)
    log.info("counted the codes of %d pictures, %.0f a second", sum(map(len, sets)), rate)
    return counting.frequencies
