"""Does a single code matter? A linear classifier of code grids, and how its output changes when codes change.

After the probe of the LCR study: Embedding(K, 32), flattened, dropout, one linear layer; binary cross-entropy, Adam.
"""

# B batch, K codes, D width of the embedding, P = h w cells.
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_f1_score


class Probe(pl.LightningModule):
    """p(the concept is in the image | its codes). Defaults are the study's.

    Args:
        K: Size of the codebook.
        places: Cells of a grid.
        width: Of the embedding.
        dropout, lr, weight_decay: Of the training.
        pos_weight: Weight of an image of the concept in the loss: the number of other images for one of it.
    """

    def __init__(
        self, K: int, places: int, *, width: int = 32, dropout: float = 0.2, lr: float = 1e-4,
        weight_decay: float = 2.5e-5, pos_weight: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.embedding, self.dropout, self.linear = nn.Embedding(K, width), dropout, nn.Linear(places * width, 1)
        self.lr, self.weight_decay, self.pos_weight = lr, weight_decay, torch.tensor(pos_weight)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits (B,) of grids (B, h, w)."""
        x = F.dropout(self.embedding(codes.flatten(1)).flatten(1), self.dropout, self.training)
        return self.linear(x)[:, 0]

    def _loss(self, batch: Sequence[Tensor]) -> Tensor:
        codes, labels = batch
        return F.binary_cross_entropy_with_logits(self(codes), labels, pos_weight=self.pos_weight.to(labels))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr, weight_decay=self.weight_decay)

    @property
    def weights(self) -> Tensor:
        """(P, D): the weights of the linear layer, by cell."""
        return self.linear.weight.view(-1, self.embedding.embedding_dim)


@dataclass(frozen=True)
class TrainedProbe:
    """A trained probe, its test set and its test metrics.

    Attributes:
        codes, labels: The test set: grids (B, h, w), and 1 for the concept or 0 (B,).
    """

    probe: Probe
    codes: Tensor
    labels: Tensor
    accuracy: float
    f1: float
    auc: float


def train_probe(
    forget: Tensor,
    retain: Tensor,
    K: int,
    trainer: Callable[..., pl.Trainer],
    *,
    epochs: int = 20,
    seed: int = 42,
    **settings,
) -> TrainedProbe:
    """Trains a probe on 70 % of the grids (B, h, w), with early stopping on 15 %, and tests it on 15 %.

    Args:
        forget, retain: Grids of images with and without the concept.
        trainer: Makes a Trainer from max_epochs and callbacks.
        settings: Arguments of `Probe`.
    """
    pl.seed_everything(seed, verbose=False)
    codes = torch.cat([forget, retain]).cpu()
    labels = torch.cat([torch.ones(len(forget)), torch.zeros(len(retain))])
    data = TensorDataset(codes, labels)
    parts = random_split(data, [0.7, 0.15, 0.15], Generator().manual_seed(seed))
    probe = Probe(K, codes[0].numel(), pos_weight=len(retain) / len(forget), **settings)
    patience = EarlyStopping("val/loss", patience=5)
    trainer(max_epochs=epochs, callbacks=[patience]).fit(
        probe, DataLoader(parts[0], 64, shuffle=True), DataLoader(parts[1], 256)
    )
    probe.eval().cpu()
    codes, labels = data[parts[2].indices]
    with torch.no_grad():
        p, truth = probe(codes).sigmoid(), labels.long()
    metrics = (binary_accuracy(p, truth), binary_f1_score(p, truth), binary_auroc(p, truth))
    return TrainedProbe(probe, codes, labels, *(metric.item() for metric in metrics))


@torch.no_grad()
def contributions(probe: Probe, codes: Tensor, token: int = 0) -> Tensor:
    """(B, K): how much the logit of each grid falls if all cells with a code get the code `token`.

    The probe is linear in its embeddings, so one pass gives all codes: the sum over cells of w_i · (e_k - e_token).
    """
    falls = torch.zeros(len(codes), probe.embedding.num_embeddings)
    return falls.scatter_add_(1, codes.flatten(1), _cell_contributions(probe, codes, token))


def _cell_contributions(probe: Probe, codes: Tensor, token: int) -> Tensor:
    """(B, P): w_i · (e_code - e_token) of each cell."""
    e = probe.embedding.weight
    return ((e[codes.flatten(1)] - e[token]) * probe.weights).sum(-1)


@torch.no_grad()
def influence(probe: Probe, codes: Tensor, token: int = 0) -> Tensor:
    """(K,): the mean |Δp| over grids if all cells with a code get the code `token`."""
    logits = probe(codes)
    changed = logits[:, None] - contributions(probe, codes, token)
    return (changed.sigmoid() - logits.sigmoid()[:, None]).abs().mean(0)


@torch.no_grad()
def greedy_combination(probe: Probe, codes: Tensor, size: int, token: int = 0) -> tuple[list[int], list[float]]:
    """The codes of the largest joint influence, chosen greedily, and the mean |Δp| of the first 1, 2, ... of them."""
    logits, falls = probe(codes), contributions(probe, codes, token)
    p, fallen = logits.sigmoid(), torch.zeros_like(logits)
    chosen: list[int] = []
    effects: list[float] = []
    for _ in range(size):
        effect = ((logits - fallen)[:, None] - falls).sigmoid().sub(p[:, None]).abs().mean(0)
        effect[chosen] = -1
        best = int(effect.argmax())
        chosen.append(best)
        effects.append(effect[best].item())
        fallen = fallen + falls[:, best]
    return chosen, effects


@torch.no_grad()
def greedy_flips(probe: Probe, grid: Tensor, edits: int) -> tuple[Tensor, list[float]]:
    """Changes `edits` cells of a grid (h, w), one at a time, each so that p rises most.

    Returns:
        The changed grid, and p before and after each change.
    """
    changed, path = grid.clone().flatten(), [probe(grid[None]).sigmoid().item()]
    gain = probe.weights @ probe.embedding.weight.T  # (P, K): the contribution of a code to the logit, by cell
    free = torch.ones(len(changed), dtype=torch.bool)  # a cell is changed once
    for _ in range(edits):
        rise = gain - gain.gather(1, changed[:, None])
        rise[~free] = -torch.inf
        place, code = divmod(int(rise.argmax()), rise.shape[1])
        changed[place], free[place] = code, False
        path.append(probe(changed.view(1, *grid.shape)).sigmoid().item())
    return changed.view(grid.shape), path
