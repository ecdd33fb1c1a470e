"""Prompts as token embeddings, and text encoders that are given these in place of tokens."""

# B prompts, L tokens, D width of a text encoder.
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Encoders = Mapping[str, "PreTrainedModel"]  # by name: "text_encoder", "text_encoder_2", ...


@dataclass(frozen=True)
class Embedded:
    """Prompts as the token embeddings that the text encoders read.

    Args:
        prompts: The B texts.
        embeds: By text encoder ("text_encoder", "text_encoder_2", ...), (B, L, D of that encoder).
    """

    prompts: tuple[str, ...]
    embeds: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> "Embedded":
        return Embedded(self.prompts[rows], {part: e[rows] for part, e in self.embeds.items()})


Text = Sequence[str] | Embedded


@contextmanager
def recorded(encoders: Encoders) -> Iterator[dict[str, list[Tensor]]]:
    """Records the token embeddings that each text encoder reads within the context, without gradients."""
    seen: dict[str, list[Tensor]] = {name: [] for name in encoders}

    def keep(name: str) -> Callable:
        return lambda _, __, output: seen[name].append(output.detach())

    with ExitStack() as stack:
        for name, table in lookup_tables(encoders):
            stack.callback(table.register_forward_hook(keep(name)).remove)
        yield seen


@contextmanager
def replaced(encoders: Encoders, embeds: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the text encoders read these token embeddings, row by row, in place of their tokens'.

    Args:
        embeds: By text encoder, as `Embedded.embeds`. An encoder that is not named reads its tokens.
    """
    place = dict.fromkeys(embeds, 0)

    def give(name: str) -> Callable:
        def hook(_, __, output: Tensor) -> Tensor:
            rows = embeds[name][place[name] : place[name] + len(output)]
            place[name] += len(output)
            return rows.to(output.dtype)

        return hook

    with ExitStack() as stack:
        for name, table in lookup_tables(encoders):
            if name in embeds:
                stack.callback(table.register_forward_hook(give(name)).remove)
        yield


def lookup_tables(encoders: Encoders) -> Iterator[tuple[str, nn.Embedding]]:
    """The layer of every text encoder that looks up token embeddings; encoders may hold it twice, tied."""
    for name, encoder in encoders.items():
        weight = encoder.get_input_embeddings().weight
        tables = {id(m): m for m in encoder.modules() if isinstance(m, nn.Embedding) and m.weight is weight}
        yield from ((name, table) for table in tables.values())
