"""What every denoising model is, whatever its family: maps between prompts, latents, predictions and images."""

# B batch, C latent channels, H W latent height and width, L tokens, D text width.
import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler, ModelMixin, SchedulerMixin
from torch import Tensor, nn
from torch.func import functional_call

from unlearning.errors import UserError
from unlearning.models.base import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unlearning.models.side_modules import SideModules
    from unlearning.sampling.guidance import Guidance

PLACES = 2**16  # latent pixels in one call of the denoiser: four images of 1024 by 1024


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
TextEdit = Callable[["DiffusionModel", Text, "Conditioning"], "Conditioning"]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is conditioned on, one row for each image of a batch.

    Args:
        embeds: The text encoder's states, (B, L, D).
        extra: A family's other tensors, (B, ...): SDXL's pooled text and micro-conditioning.
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
        return replace(self, gains={**self.gains, **gains})

    def at(self, step: int | Tensor) -> "Conditioning":
        """What holds at a sampling step, counted from 0: the same for all rows, or one for each, (B,)."""
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


class DiffusionModel(Model):
    """A text-to-image latent diffusion model.

    Attributes:
        denoiser: The part that generates: diffusers' "unet" or "transformer".
        scheduler: The noise schedule it was trained with.
        solver: A diffusers scheduler class that goes from noise to image.
        guidance: How predictions are combined at each sampling step; None for classifier-free guidance.
        text_edits: What is done to the conditioning of every prompt, in this order.
        side: The sets of side modules that are attached now, by name. Views of the model share it.
    """

    denoiser: ModelMixin
    scheduler: SchedulerMixin
    solver: type = DDIMScheduler
    guidance: "Guidance | None" = None
    text_edits: tuple[TextEdit, ...] = ()
    side: dict[str, "SideModules"]
    weights: Mapping[str, Tensor] | None = None  # of a snapshot: values by full name that replace the model's own
    without_side: frozenset[str] = frozenset()  # of a view: the sets of side modules that it leaves out
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
            edits: What is done to the result; by default the model's own `text_edits`.
        """
        if not len(text):
            return self.encode([""], edits)[:0]
        prompts = list(text.prompts if isinstance(text, Embedded) else text)
        replaced = self._replacing(text.embeds) if isinstance(text, Embedded) else nullcontext()
        with replaced, self._side_gains({}):
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
        seen: dict[str, list[Tensor]] = {name: [] for name in self.text_encoders}

        def keep(name: str) -> Callable:
            return lambda _, __, output: seen[name].append(output.detach())

        with ExitStack() as stack, torch.no_grad():
            for name, table in self._token_tables():
                stack.callback(table.register_forward_hook(keep(name)).remove)
            self._encode(list(text))
        return Embedded(tuple(text), {name: torch.cat(parts) for name, parts in seen.items()})

    @contextmanager
    def _replacing(self, embeds: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it the text encoders read these token embeddings, row by row, and not those of their tokens."""
        place = dict.fromkeys(embeds, 0)

        def give(name: str) -> Callable:
            def hook(_, __, output: Tensor) -> Tensor:
                rows = embeds[name][place[name] : place[name] + len(output)]
                place[name] += len(output)
                return rows.to(output.dtype)

            return hook

        with ExitStack() as stack:
            for name, table in self._token_tables():
                if name in embeds:
                    stack.callback(table.register_forward_hook(give(name)).remove)
            yield

    def _token_tables(self) -> Iterator[tuple[str, nn.Embedding]]:
        """The layer of every text encoder that looks up token embeddings; encoders may hold it twice, tied."""
        for name, encoder in self.text_encoders.items():
            weight = encoder.get_input_embeddings().weight
            tables = {id(m): m for m in encoder.modules() if isinstance(m, nn.Embedding) and m.weight is weight}
            yield from ((name, table) for table in tables.values())

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
        found = []
        for pieces, row in zip(self.word_pieces(prompts), ids, strict=True):
            places = (pieces.start + i for i in range(len(row) - len(own) + 1) if row[i : i + len(own)] == own)
            first = next(places, None)
            found.append(pieces if first is None else range(first, first + len(own)))
        return found

    # Images.

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, 8H, 8W or so) in [0, 1] to scaled latents (B, C, H, W)."""

    @abstractmethod
    def decode(self, x_0: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) to images in [0, 1]."""

    # The denoiser.

    @abstractmethod
    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        """The linear maps, by full name, through which the prompt enters the denoiser."""

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
        return _on_grid(outputs[-1] if outputs else (), height, width, c.embeds.shape[1], name).float()

    @abstractmethod
    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        """The denoiser's positional and keyword arguments."""

    def _unpacked(self, output: Tensor, shape: torch.Size) -> Tensor:
        """The denoiser's output in the latents' shape (B, C, H, W)."""
        return output[:, : shape[1]]  # some predict their variance below

    def set_timesteps(self, scheduler: SchedulerMixin, steps: int) -> None:
        """Sets the timesteps at which a diffusers scheduler goes from noise to one of this model's images."""
        scheduler.set_timesteps(steps, device=self.device)

    # Views: models that share all weights with this one but for what they are named after.

    def snapshot(self, names: Iterable[str]) -> "DiffusionModel":
        """This model with today's values of the named weights: a frozen teacher that shares all others."""
        parameters = self.named_parameters()
        view = copy.copy(self)
        view.weights = {**(self.weights or {}), **{n: parameters[n].detach().clone() for n in names}}
        return view

    def without(self, name: str) -> "DiffusionModel":
        """This model without one set of side modules: the base model of an adapted one."""
        view = copy.copy(self)
        view.without_side = self.without_side | {name}
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
    def _side_gains(self, gains: Mapping[str, Tensor], t: Tensor | None = None) -> Iterator[None]:
        """Within it the output of each set of side modules is scaled by its gain (B,), 0 if a view leaves it out.

        Side modules also get the timesteps t of the rows, () or (B,).
        """
        try:
            for name, side in self.side.items():
                side.gain = torch.zeros(1, device=self.device) if name in self.without_side else gains.get(name)
                side.t = t
            yield
        finally:
            for side in self.side.values():
                side.gain = side.t = None

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
        """`call()`, during which the text encoders have a snapshot's weights."""
        encoders = self.text_encoders
        own = {n: w for n, w in (self.weights or {}).items() if n.partition(".")[0] in encoders}
        return functional_call(_Caller(encoders), own, (call,)) if own else call()

    # The algebra of diffusion.

    @property
    @abstractmethod
    def _scale(self) -> int:
        """The side of an image over the side of its latent."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents of one image."""

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents (B, C, H, W), each from its own seed: no batch size or device changes an image."""
        each = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(each).to(self.device)

    @property
    def prediction_type(self) -> str:
        """ "epsilon", "v_prediction" or "flow": what the denoiser's output means."""
        meaning = self.scheduler.config.get("prediction_type", "flow")
        return "flow" if meaning == "flow_prediction" else meaning

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.reshape(-1, 1, 1, 1).to(self.device)
        if self.prediction_type == "flow":
            sigma = t / self.scheduler.config.num_train_timesteps
            return 1 - sigma, sigma
        alpha_bar = self.scheduler.alphas_cumprod.to(self.device)[t]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps; t is (B,)."""
        alpha, sigma = self._alpha_sigma(t)
        return alpha * x_0 + sigma * eps

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The image that a prediction implies: of eps (x_t - sigma eps) / alpha, of v alpha x_t - sigma v.

        For a flow, which predicts eps - x_0, it is x_t - sigma (eps - x_0).
        """
        alpha, sigma = self._alpha_sigma(t)
        if self.prediction_type == "flow":
            return x_t - sigma * prediction
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * prediction
        return (x_t - sigma * prediction) / alpha

    def to_prediction(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction that implies the image x_0: the inverse of `to_x0`."""
        alpha, sigma = self._alpha_sigma(t)
        if self.prediction_type == "v_prediction":
            return (alpha * x_t - x_0) / sigma
        return (x_t - (x_0 if self.prediction_type == "flow" else alpha * x_0)) / sigma

    def x0_gain(self, t: Tensor) -> Tensor:
        """The error of the implied image over the error of the prediction, (B, 1, 1, 1)."""
        alpha, sigma = self._alpha_sigma(t)
        return sigma / alpha if self.prediction_type == "epsilon" else sigma

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t² / sigma_t², (B, 1, 1, 1)."""
        alpha, sigma = self._alpha_sigma(t)
        return (alpha / sigma).square()

    def timesteps(self, share: Tensor) -> Tensor:
        """The timesteps at `share` (B,) in [0, 1) of the schedule: integers, but real numbers for a flow."""
        t = share.to(self.device) * self.scheduler.config.num_train_timesteps
        return t.clamp(min=1) if self.prediction_type == "flow" else t.long()

    def step_at(self, t: Tensor, steps: int) -> Tensor:
        """The sampling step, from 0, at which a trajectory of `steps` steps is at t; t of any shape."""
        return ((1 - t / self.scheduler.config.num_train_timesteps) * steps).long()

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies: (x_t - alpha x_0) / sigma."""
        alpha, sigma = self._alpha_sigma(t)
        return (x_t - alpha * self.to_x0(prediction, x_t, t)) / sigma


class _Caller(nn.Module):
    """Calls any function; `functional_call` on it replaces the modules' parameters meanwhile."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, call: Callable[[], Conditioning]) -> Conditioning:
        return call()


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list]:
    """The outputs of a layer's calls within the context. Compiled modules run eagerly in it, so that hooks fire."""
    outputs: list = []
    hook = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        with eager():
            yield outputs
    finally:
        hook.remove()


def eager() -> AbstractContextManager:
    """A context in which compiled modules run eagerly, so that forward hooks fire on them."""
    return torch.compiler.set_stance("force_eager")


def at_once(latents: Tensor, most: int) -> int:
    """How many of the latents (N, C, H, W) one call of the denoiser takes, at most: fewer, the larger they are."""
    return max(1, min(most, PLACES // (latents.shape[-2] * latents.shape[-1])))


def _on_grid(output: Tensor | tuple, height: int, width: int, text: int, layer: str) -> Tensor:
    """A layer's output as (B, D, h, w): a UNet's at its own scale, a transformer's image tokens.

    Blocks of joint attention return text tokens and then image tokens, as two tensors or as one sequence.
    """
    parts = [p for p in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(p)]
    places = height * width
    for part in reversed(parts):
        if part.ndim == 4 and _scaled_down(part.shape[-2], part.shape[-1], height, width):
            return part
        if part.ndim == 3 and part.shape[1] in (places, text + places):
            return part[:, -places:].transpose(1, 2).unflatten(2, (height, width))
    shapes = " and ".join(str(tuple(p.shape)) for p in parts) or "nothing"
    raise UserError(f"Layer {layer!r} returns {shapes}, which is not a {height} by {width} grid.")


def _scaled_down(h: int, w: int, height: int, width: int) -> bool:
    """Whether an h by w grid is the height by width grid at the same or a smaller scale. Attention heads are not."""
    return h <= height and w <= width and round(height / h) == round(width / w)
