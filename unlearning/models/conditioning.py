"""The conditioning of a denoiser."""

# B batch, L tokens, D text width.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of the denoiser, one row for each image of a batch.

    Args:
        embeds: The text encoder's states, (B, L, D).
        extra: A family's other tensors, (B, ...): the "pooled" embedding of SDXL, SD3 and Flux, SDXL's size and crop.
        prompts: The texts of the B rows; "" for a row that comes from no text.
        gains: By the name of a set of side modules, how much of it each row gets, (B,); 1 where it is not named.
        steps: For how many sampling steps each row holds, (B,); None for all of them.
        later: The rows that hold after these steps.
    """

    embeds: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Tensor | None = None
    later: "Conditioning | None" = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows) -> "Conditioning":
        chosen = torch.arange(len(self))[rows.cpu() if torch.is_tensor(rows) else rows].tolist() if self.prompts else ()
        return Conditioning(
            self.embeds[rows],
            {k: v[rows] for k, v in self.extra.items()},
            tuple(self.prompts[i] for i in chosen),
            {k: v[rows] for k, v in self.gains.items()},
            None if self.steps is None else self.steps[rows],
            None if self.later is None else self.later[rows],
        )

    def expand(self, batch: int) -> "Conditioning":
        """One row, `batch` times."""
        return self[torch.zeros(batch, dtype=torch.long, device=self.embeds.device)]

    def with_gains(self, gains: Mapping[str, Tensor]) -> "Conditioning":
        """This conditioning with these gains, in addition to those of other sets of side modules."""
        return replace(self, gains={**self.gains, **gains})

    def at(self, step: int | Tensor) -> "Conditioning":
        """The conditioning at a sampling step, counted from 0: one step for all rows, or one for each row, (B,)."""
        if self.steps is None or self.later is None:
            return self
        over, after = self.steps <= step, self.later.at(step)

        def choose(now: Tensor, later: Tensor) -> Tensor:
            return torch.where(over.reshape(-1, *[1] * (now.ndim - 1)), later, now)

        extra = {k: choose(v, after.extra[k]) for k, v in self.extra.items()}
        return Conditioning(choose(self.embeds, after.embeds), extra, self.prompts, self.gains)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """The rows of all parts; schedules (`steps`) are not joined: take `at(step)` first."""
        ones = {name: g for part in parts for name, g in part.gains.items()}
        return Conditioning(
            torch.cat([p.embeds for p in parts]),
            {k: torch.cat([p.extra[k] for p in parts]) for k in parts[0].extra},
            tuple(text for p in parts for text in p.prompts or ("",) * len(p)),
            {k: torch.cat([p.gains.get(k, ones[k].new_ones(len(p))) for p in parts]) for k in ones},
        )
