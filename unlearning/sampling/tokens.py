"""Prompts as the tokens of one text encoder, for attacks that search over them."""

# B prompts, K free tokens, V tokens of the encoder, D their width, L tokens and W width of its states.
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.models.diffusion import DiffusionModel, Embedded
from unlearning.sampling.inversion import Placeholder

AT_ONCE = 2**15  # tokens that the encoder reads in one call


@dataclass(frozen=True)
class FreeTokens:
    """Prompts of K tokens, all of them free, as the encoder reads them whose states begin the model's conditioning.

    Args:
        model: Of any family that reads text.
        encoder: The encoder's name. What the model's others make of the prompts is not looked at.
        place: A prompt of K words that stand for the tokens.
        embeds: The embedding of each token, (V, D).
        texts: What each writes (`DiffusionModel.token_table`).
        usable: The ids of those that write something, (U,).
    """

    model: DiffusionModel
    encoder: str
    place: Placeholder
    embeds: Tensor
    texts: Sequence[str]
    usable: Tensor

    @classmethod
    def of(cls, model: DiffusionModel, count: int) -> "FreeTokens":
        """Prompts of `count` tokens. Raises UserError if they are more than the encoder reads, or it reads no text."""
        place = Placeholder.in_prompts(model, [" ".join(["{}"] * count)])
        encoder = next(iter(model.text_states(model.encode_prompts([""]))))
        embeds, texts = model.token_table(encoder)
        usable = torch.tensor([i for i, text in enumerate(texts) if text.strip()], device=embeds.device)
        return cls(model, encoder, place, embeds, texts, usable)

    def embedded(self, v: Tensor) -> Embedded:
        """Prompts of token embeddings v, (B, K, D)."""
        return self.place.filled({self.encoder: v}, [0] * len(v))

    def states(self, v: Tensor) -> Tensor:
        """The encoder's states, (B, L, W) float32, of prompts of token embeddings v, (B, K, D)."""
        return self.model.text_states(self.model.encode(self.embedded(v)))[self.encoder].float()

    @property
    def end(self) -> int:
        """The place of the end of the text in the states."""
        last = int(self.model.last_token(self.place.text.prompts, self.encoder))
        return min(last + 1, self.length - 1)

    @property
    def length(self) -> int:
        """Tokens that the encoder reads, padding included."""
        return self.place.text.embeds[self.encoder].shape[1]

    @torch.no_grad()
    def scores(self, ids: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A score of each prompt, (B,), of token ids (B, K): `score` takes states of some and which of the B they are.

        The encoder reads a limited number at once.
        """
        rows = torch.arange(len(ids), device=ids.device).split(max(1, AT_ONCE // self.length))
        return torch.cat([score(self.states(self.embeds[ids[some]]), some) for some in rows])

    def text(self, ids: Tensor) -> str:
        """What K tokens write."""
        return "".join(self.texts[i] for i in ids.tolist()).strip()

    def is_read_back(self, ids: Tensor) -> bool:
        """Whether the encoder's tokenizer makes the same K tokens of the text that they write."""
        return self.model.token_ids([self.text(ids)], self.encoder) == [ids.tolist()]
