"""The vocabulary that an attack searches: token embeddings by encoder, and their texts."""

# B rows, k tokens, V vocabulary, L tokens of a prompt, D width of an encoder.
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unlearning.models.diffusion import DiffusionModel, Embedded, Text
from unlearning.sampling.inversion import Placeholder


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
