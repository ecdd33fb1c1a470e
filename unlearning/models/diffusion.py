"""The base class of all denoising models: maps between prompts, latents, predictions and images."""

# B batch, C latent channels, H W latent height and width, L tokens, D text width.
import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler, ModelMixin, SchedulerMixin
from torch import Tensor, nn
from torch.func import functional_call

from unlearning.errors import UserError
from unlearning.models.algebra import DiffusionAlgebra
from unlearning.models.conditioning import Conditioning
from unlearning.models.embeddings import Embedded, Text, recorded, replaced
from unlearning.models.guidance import Guidance
from unlearning.models.layers import on_grid, outputs_of
from unlearning.models.side_modules import SideModuleHost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACES = 2**16  # latent pixels in one call of the denoiser: four images of 1024 by 1024
TextEdit = Callable[["DiffusionModel", Text, Conditioning], Conditioning]


class DiffusionModel(DiffusionAlgebra, SideModuleHost):
    """A text-to-image latent diffusion model.

    Attributes:
        denoiser: The part that generates: diffusers' "unet" or "transformer".
        solver: A diffusers scheduler class that goes from noise to image.
        guidance: How predictions are combined at each sampling step; None for classifier-free guidance.
        text_edits: Edits of the conditioning of every prompt, in this order.
    """

    denoiser: ModelMixin
    solver: type = DDIMScheduler
    guidance: "Guidance[DiffusionModel] | None" = None
    text_edits: tuple[TextEdit, ...] = ()
    weights: Mapping[str, Tensor] | None = None  # of a snapshot: values by full name, in place of the model's own
    latent_size: tuple[int, int] | None = None  # of a view: (H, W) of its latents, in place of what it was trained at

    @property
    def middle(self) -> str:
        """The dotted name of the denoiser's layer at mid depth."""
        if hasattr(self.denoiser, "mid_block"):
            return "mid_block"
        return f"transformer_blocks.{len(self.denoiser.transformer_blocks) // 2}"

    @property
    def patch(self) -> int:
        """The side in latent pixels of one token of a transformer; 1 for a UNet."""
        return self.denoiser.config.get("patch_size") or 1

    @property
    def text_encoders(self) -> dict[str, "PreTrainedModel"]:
        """The parts that read text."""
        return {name: part for name, part in self.parts.items() if name.startswith("text_encoder")}

    # Prompts.

    def encode_prompts(self, prompts: Text) -> Conditioning:
        """The conditioning of each prompt, without gradients; "" is the null prompt of classifier-free guidance."""
        with torch.no_grad():
            return self.encode(prompts)

    def encode(self, text: Text, edits: Sequence[TextEdit] | None = None) -> Conditioning:
        """The conditioning of each prompt, differentiable in the text encoders' weights and in token embeddings.

        Args:
            text: Prompts, or the token embeddings to take in place of theirs.
            edits: Edits of the result; by default the model's own `text_edits`.
        """
        if not len(text):
            return self.encode([""], edits)[:0]
        prompts = list(text.prompts if isinstance(text, Embedded) else text)
        given = replaced(self.text_encoders, text.embeds) if isinstance(text, Embedded) else nullcontext()
        with given, self._side_gains({}):
            c = replace(self._within_weights(lambda: self._encode(prompts)), prompts=tuple(prompts))
        for edit in self.text_edits if edits is None else edits:
            c = edit(self, text, c)
        return c

    def embed(self, text: Text) -> Embedded:
        """The token embeddings of each prompt. Raises UserError for a model that reads no text."""
        if isinstance(text, Embedded):
            return text
        if not self.text_encoders:
            raise UserError(f"{self.name} is conditioned on classes: it has no token embeddings.")
        with recorded(self.text_encoders) as seen, torch.no_grad():
            self._encode(list(text))
        return Embedded(tuple(text), {name: torch.cat(parts) for name, parts in seen.items()})

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """The family's own `encode`, of at least one prompt."""

    @abstractmethod
    def vocabulary(self) -> list[str]:
        """The whole words that the tokenizer knows, of three letters or more."""

    @abstractmethod
    def text_states(self, c: Conditioning) -> dict[str, Tensor]:
        """The states in `c.embeds` by the text encoder that they come from, (B, L, D of that encoder): views of it.

        Encoders that give a pooled output only are not among them; a model that reads no text has none.
        """

    # The three below take the name of one of these encoders; positions are then in its states. By default it is the
    # one whose states begin `Conditioning.embeds`.

    @abstractmethod
    def token_table(self, encoder: str | None = None) -> tuple[Tensor, list[str]]:
        """The encoder's token embeddings (V, D), and the text of each with its spaces: of several, the texts joined.

        The text is "" for special tokens, for those that are no text by themselves, and for rows that no token has.

        Raises:
            UserError: For a model that reads no text.
        """

    @abstractmethod
    def token_ids(self, prompts: Sequence[str], encoder: str | None = None) -> list[list[int]]:
        """The ids of each prompt's own word pieces that the encoder reads, without special tokens."""

    @abstractmethod
    def last_token(self, prompts: Sequence[str], encoder: str | None = None) -> Tensor:
        """The position (B,) of each prompt's last word piece in `Conditioning.embeds`."""

    def word_pieces(self, prompts: Sequence[str], encoder: str | None = None) -> list[range]:
        """The positions of each prompt's own word pieces in `Conditioning.embeds`; empty for the null prompt."""
        lasts = self.last_token(prompts, encoder).tolist()
        counts = [len(ids) for ids in self.token_ids(prompts, encoder)]
        return [range(max(0, last + 1 - count), last + 1) for last, count in zip(lasts, counts, strict=True)]

    def pieces_of(self, name: str, prompts: Sequence[str]) -> list[range]:
        """The positions of a name's word pieces within each prompt; all of its own where it holds other tokens."""
        own, *ids = self.token_ids([name, *prompts])
        ranges = []
        for pieces, row in zip(self.word_pieces(prompts), ids, strict=True):
            places = (pieces.start + i for i in range(len(row) - len(own) + 1) if row[i : i + len(own)] == own)
            first = next(places, None)
            ranges.append(pieces if first is None else range(first, first + len(own)))
        return ranges

    # Images.

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, 8H, 8W or so) in [0, 1] to scaled latents (B, C, H, W)."""

    @abstractmethod
    def decode(self, x_0: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) to images in [0, 1]."""

    @property
    @abstractmethod
    def _scale(self) -> int:
        """The side of an image over the side of its latent."""

    # The denoiser.

    @abstractmethod
    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        """The linear maps, by full name, through which the prompt enters the denoiser."""

    def pooled_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        """The linear maps, by full name, whose first inputs are the prompt's pooled embedding, if there are any."""
        return iter(())

    def predict(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The denoiser's raw output (eps, v or flow), (B, C, H, W) float32; t is () or (B,) on the schedule's scale."""
        arguments, keywords = self._denoiser_inputs(x_t.to(self.dtype), t, c)
        with self.precision(), self._side_gains(c.gains, t):
            if self.weights is None:
                output = self.denoiser(*arguments, **keywords)
            else:
                prefix = f"{self.component}."
                own = {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}
                output = functional_call(self.denoiser, own, arguments, keywords)
        return self._unpacked(output.sample, x_t.shape).float()

    def features(self, x_t: Tensor, t: Tensor, c: Conditioning, layer: str | None = None) -> Tensor:
        """The output of a layer of the denoiser at every place of the image, (B, D, h, w) float32.

        Args:
            layer: Its dotted name within the denoiser; by default the layer at mid depth.

        Raises:
            UserError: If there is no such layer, or it has no output for every place.
        """
        name = layer or self.middle
        try:
            module = self.denoiser.get_submodule(name)
        except AttributeError:
            raise UserError(f"The denoiser has no layer {name!r}; the one at mid depth is {self.middle!r}.") from None
        with outputs_of(module) as outputs:
            self.predict(x_t, t, c)
        height, width = (side // self.patch for side in x_t.shape[-2:])
        return on_grid(outputs[-1] if outputs else (), height, width, c.embeds.shape[1], name).float()

    @abstractmethod
    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        """The denoiser's positional and keyword arguments."""

    def _unpacked(self, output: Tensor, shape: torch.Size) -> Tensor:
        """The denoiser's output in the latents' shape (B, C, H, W)."""
        return output[:, : shape[1]]  # some predict their variance below

    def set_timesteps(self, scheduler: SchedulerMixin, steps: int) -> None:
        """Sets the timesteps at which a diffusers scheduler goes from noise to one of this model's images."""
        scheduler.set_timesteps(steps, device=self.device)

    # Views: models that share all weights with this one, with one difference.

    def snapshot(self, names: Iterable[str]) -> "DiffusionModel":
        """This model with the current values of the named weights: a frozen teacher that shares all other weights."""
        parameters = self.named_parameters()
        view = copy.copy(self)
        view.weights = {**(self.weights or {}), **{n: parameters[n].detach().clone() for n in names}}
        return view

    def at_size(self, height: int | None, width: int | None) -> "DiffusionModel":
        """This model, for images of another size.

        Args:
            height, width: In pixels; each is rounded to the nearest that the model can draw. None is the model's own.

        Raises:
            UserError: If the model cannot draw images of this size.
        """
        if height is None and width is None:
            return self
        _, *own = self.latent_shape
        H, W = (
            here if side is None else max(1, round(side / (self._scale * self.patch))) * self.patch
            for side, here in zip((height, width), own, strict=True)
        )
        view = copy.copy(self)
        view.latent_size = H, W
        return view

    @contextmanager
    def without_checkpointing(self) -> Iterator[None]:
        """Switches gradient checkpointing off.

        What a view of the model or a conditioning sets for a forward pass (a snapshot's weights, the gains of side
        modules) does not hold when a layer is computed again in the backward pass.
        """
        on = self.denoiser.is_gradient_checkpointing
        if on:
            self.denoiser.disable_gradient_checkpointing()
        try:
            yield
        finally:
            if on:
                self.denoiser.enable_gradient_checkpointing()

    def _within_weights(self, call: Callable[[], Conditioning]) -> Conditioning:
        """The result of `call()`, during which the text encoders have the weights of a snapshot."""
        encoders = self.text_encoders
        own = {n: w for n, w in (self.weights or {}).items() if n.partition(".")[0] in encoders}
        return functional_call(_Caller(encoders), own, (call,)) if own else call()


class _Caller(nn.Module):
    """Calls any function; `functional_call` on it replaces the modules' parameters meanwhile."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, call: Callable[[], Conditioning]) -> Conditioning:
        return call()


def at_once(latents: Tensor, most: int) -> int:
    """The maximum number of latents (N, C, H, W) in one call of the denoiser: fewer if they are larger."""
    return max(1, min(most, PLACES // (latents.shape[-2] * latents.shape[-1])))
