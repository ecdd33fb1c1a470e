"""Tokens for attacks that search: a vocabulary, prompts with free tokens, and prompts of free tokens only."""

# B prompts, k or K free tokens, V tokens of a vocabulary, D their width, L tokens and W width of an encoder's states.
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Embedded, Text
from unlearning.sampling.inversion import Placeholder

AT_ONCE = 2**15  # tokens that the encoder reads in one call


class Vocabulary:
    """The tokens of a model's first text encoder, and of all other encoders with the same tokens.

    Attributes:
        tables: The token embeddings (V, D), by encoder.
        texts: The text of each token; "" for one that cannot be typed.
        typed: Which tokens can be typed, (V,) bool.
    """

    def __init__(self, model: DiffusionModel):
        first, self.texts = model.token_table()
        own = {part: model.token_table(part) for part in model.text_encoders}
        self.tables = {part: table for part, (table, texts) in own.items() if texts == self.texts}
        self.typed = torch.tensor([bool(text.strip()) for text in self.texts], device=first.device)

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of the tokens."""
        return "".join(self.texts[i] for i in ids).strip()

    def embedded(self, tokens: Tensor) -> dict[str, Tensor]:
        """The embeddings (B, k, D) by encoder, of ids (B, k) or of mixtures of tokens (B, k, V)."""
        if not tokens.is_floating_point():
            return {part: table[tokens] for part, table in self.tables.items()}
        return {part: tokens.to(table.dtype) @ table for part, table in self.tables.items()}

    def filled(self, place: Placeholder, plain: Embedded, v: Mapping[str, Tensor], rows: Sequence[int]) -> Embedded:
        """The prompts with the embeddings v at the places of a placeholder.

        Args:
            place: All prompts with their placeholders.
            plain: All prompts without placeholders, for encoders with another vocabulary.
            v: The embeddings by encoder, (B, k, D); (1, N, D) for N placeholders of all B prompts, in their order.
            rows: The indices of B of the prompts.
        """
        text, rows = place.filled(v, rows), list(rows)
        others = {part: e[rows] for part, e in plain.embeds.items() if part not in self.tables}
        return Embedded(text.prompts, {**text.embeds, **others})

    @staticmethod
    def text(model: DiffusionModel, prompts: Sequence[str], given: Sequence[Mapping[str, Tensor]]) -> Text:
        """Prompts, some of them with token embeddings of their own ("embeds.text_encoder", ...)."""
        if not any(given):
            return prompts
        own = model.embed(prompts)
        return Embedded(own.prompts, {
            part: torch.stack([tensors.get(f"embeds.{part}", e[i]).to(e) for i, tensors in enumerate(given)])
            for part, e in own.embeds.items()
        })  # fmt: skip


@dataclass(frozen=True)
class FreeTokens:
    """Prompts of K free tokens, for the text encoder whose states come first in the conditioning.

    Args:
        model: A model of any family with text encoders.
        encoder: The encoder's name. The model's other encoders are ignored.
        place: A prompt of K placeholders.
        embeds: The embedding of each token, (V, D).
        texts: The text of each token (`DiffusionModel.token_table`).
        usable: The ids of the tokens with text, (U,).
    """

    model: DiffusionModel
    encoder: str
    place: Placeholder
    embeds: Tensor
    texts: Sequence[str]
    usable: Tensor

    @classmethod
    def of(cls, model: DiffusionModel, count: int) -> "FreeTokens":
        """Prompts of `count` tokens. Raises UserError if the encoder reads fewer, or the model reads no text."""
        place = Placeholder.in_prompts(model, [" ".join(["{}"] * count)])
        encoder, vocabulary = next(iter(model.text_states(model.encode_prompts([""])))), Vocabulary(model)
        usable = vocabulary.typed.nonzero()[:, 0]
        return cls(model, encoder, place, vocabulary.tables[encoder], vocabulary.texts, usable)

    def embedded(self, v: Tensor) -> Embedded:
        """Prompts of token embeddings v, (B, K, D)."""
        return self.place.filled({self.encoder: v}, [0] * len(v))

    def states(self, v: Tensor) -> Tensor:
        """The encoder's states, (B, L, W) float32, of prompts of token embeddings v, (B, K, D)."""
        return self.model.text_states(self.model.encode(self.embedded(v)))[self.encoder].float()

    @property
    def end(self) -> int:
        """The position of the end of the text in the states."""
        last = int(self.model.last_token(self.place.text.prompts, self.encoder))
        return min(last + 1, self.length - 1)

    @property
    def length(self) -> int:
        """The number of tokens that the encoder reads, padding included."""
        return self.place.text.embeds[self.encoder].shape[1]

    @torch.no_grad()
    def scores(self, ids: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The score (B,) of each prompt of token ids (B, K). The encoder reads a limited number of prompts at once.

        Args:
            score: Maps the states of some prompts, and their indices, to their scores.
        """
        rows = torch.arange(len(ids), device=ids.device).split(max(1, AT_ONCE // self.length))
        return torch.cat([score(self.states(self.embeds[ids[some]]), some) for some in rows])

    def text(self, ids: Tensor) -> str:
        """The text of K tokens."""
        return "".join(self.texts[i] for i in ids.tolist()).strip()

    def is_read_back(self, ids: Tensor) -> bool:
        """Whether the encoder's tokenizer turns the text of K tokens back into the same tokens."""
        return self.model.token_ids([self.text(ids)], self.encoder) == [ids.tolist()]
