"""Textual inversion: a conditioning with which a model denoises given images best.

    min_v E_{z_0, eps, t} || eps - eps_theta(z_t, t, c(v)) ||^2        (Gal et al., 2023, arXiv:2208.01618, eq. 2)

v are token embeddings of a placeholder in prompts.
"""

# B batch, N images, C H W latent shape, P prompts, L tokens of an encoder, D its width.
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Embedded
from unlearning.store.loops import resumed

PLACEHOLDER, OTHERS = "x", "zywvutsrqponmlkjihgfedcba"  # words of one letter


def invert(
    model: DiffusionModel,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    iterations: int,
    accumulate: int = 1,
) -> list[float]:
    """Minimises a loss with respect to the parameters only: no weight of the model gets a gradient.

    Args:
        loss: Draws a batch and returns its loss, (). Called with gradients enabled.
        optimizer: Makes the optimizer from a list of parameters.
        iterations: Number of optimizer steps.
        accumulate: Number of batches in each step.

    Returns:
        The mean loss of each iteration.

    Raises:
        UserError: If a loss is not finite.
    """
    parameters = list(parameters)
    steps = optimizer(parameters)
    state = SimpleNamespace(v=nn.ParameterList(parameters), optimizer=steps, losses=[])
    with model.without_checkpointing(), torch.enable_grad():
        for i in resumed(range(iterations), "inverting", state):
            steps.zero_grad()
            total = 0.0
            for _ in range(accumulate):
                value = loss() / accumulate
                value.backward(inputs=parameters)
                total += value.item()
            if not torch.tensor(total).isfinite():
                raise UserError(f"The loss of the inversion is {total} at iteration {i}: lower its learning rate.")
            steps.step()
            state.losses.append(total)
    return state.losses


@dataclass(frozen=True)
class Placeholder:
    """Prompts with a placeholder, whose token embeddings can be replaced.

    Args:
        text: The P prompts, with the placeholder's own token embeddings.
        places: Where the placeholder is, (P, L) bool, by text encoder.
    """

    text: Embedded
    places: Mapping[str, Tensor]

    @classmethod
    def in_prompts(cls, model: DiffusionModel, prompts: Sequence[str]) -> "Placeholder":
        """The placeholder stands where the prompts have "{}".

        The placeholder is a word of one letter. Prompts with two different letters differ at its token only. This gives
        its places for every text encoder, whatever its tokenizer.

        Raises:
            UserError: For a model that reads no text, or a prompt in which an encoder has no token of the placeholder.
        """
        text = _with_letter(model, prompts, PLACEHOLDER)
        counts = torch.tensor([prompt.count("{}") for prompt in prompts], device=model.device)
        places: dict[str, Tensor] = {}
        for letter in OTHERS:
            other = _with_letter(model, prompts, letter)
            for part, embeds in text.embeds.items():
                differ = (embeds != other.embeds[part]).any(-1)
                if differ.sum(1).equal(counts):  # else a tokenizer has fewer pieces for one of the letters
                    places.setdefault(part, differ)
            if len(places) == len(text.embeds):
                return cls(text, places)
        lacking = ", ".join(sorted(text.embeds.keys() - places.keys()))
        raise UserError(f"There is no place for a new word in one of the prompts of {lacking}: a prompt is too long.")

    def filled(self, v: Mapping[str, Tensor], rows: Sequence[int] | None = None) -> Embedded:
        """The prompts, or some of them, with the vectors v at the placeholder's places.

        Args:
            v: The vectors by text encoder: (D,), or (B, n, D) for n places in each prompt, in their order. An encoder
                without vectors keeps the placeholder's own embeddings.
            rows: The indices of B prompts; by default all.
        """
        rows = list(range(len(self.text)) if rows is None else rows)
        embeds = {
            part: _scattered(e[rows], self.places[part][rows], v[part]) if part in v else e[rows]
            for part, e in self.text.embeds.items()
        }
        return Embedded(tuple(self.text.prompts[i] for i in rows), embeds)


def _scattered(e: Tensor, places: Tensor, v: Tensor) -> Tensor:
    """e (B, L, D) with v, (D,) or (B, n, D), at its places (B, L)."""
    if v.ndim == 1:
        return torch.where(places[..., None], v.to(e.dtype), e)
    return e.masked_scatter(places[..., None], v.to(e.dtype))


def _with_letter(model: DiffusionModel, prompts: Sequence[str], letter: str) -> Embedded:
    return model.embed([prompt.replace("{}", letter) for prompt in prompts])


def first_piece(model: DiffusionModel, word: str) -> dict[str, Tensor]:
    """The token embedding of a word's first word piece, (D,) by text encoder."""
    other = next(letter for letter in (PLACEHOLDER, *OTHERS) if letter != word[:1].lower())
    rows = model.embed([word, other]).embeds
    return {part: e[0, int((e[0] != e[1]).any(-1).int().argmax())].clone() for part, e in rows.items()}
