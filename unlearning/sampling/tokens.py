"""The tokens that attacks search: a vocabulary, prompts with free tokens in them, and prompts of nothing else."""

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
    """The tokens of a model's first text encoder, and of all others that have the same.

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
        return "".join(self.texts[i] for i in ids).strip()

    def embedded(self, tokens: Tensor) -> dict[str, Tensor]:
        """The embeddings (B, k, D) by encoder, of ids (B, k) or of mixtures of tokens (B, k, V)."""
        if not tokens.is_floating_point():
            return {part: table[tokens] for part, table in self.tables.items()}
        return {part: tokens.to(table.dtype) @ table for part, table in self.tables.items()}

    def filled(self, place: Placeholder, plain: Embedded, v: Mapping[str, Tensor], rows: Sequence[int]) -> Embedded:
        """The prompts with the embeddings v at the places of a placeholder.

        Args:
            place: All prompts with k placeholders each.
            plain: All prompts without, which an encoder of another vocabulary reads.
            rows: Which B of the prompts.
        """
        text, rows = place.filled(v, rows), list(rows)
        others = {part: e[rows] for part, e in plain.embeds.items() if part not in self.tables}
        return Embedded(text.prompts, {**text.embeds, **others})

    @staticmethod
    def text(model: DiffusionModel, prompts: Sequence[str], given: Sequence[Mapping[str, Tensor]]) -> Text:
        """Prompts with the token embeddings that some of them are given ("embeds.text_encoder", ...)."""
        if not any(given):
            return prompts
        own = model.embed(prompts)
        return Embedded(own.prompts, {
            part: torch.stack([tensors.get(f"embeds.{part}", e[i]).to(e) for i, tensors in enumerate(given)])
            for part, e in own.embeds.items()
        })  # fmt: skip


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
