"""What every denoising model is, whatever its family: a few maps between prompts, latents, predictions and pictures."""

# B batch, C latent channels, H W latent height and width, L tokens, D text width.
import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

from unlearning.errors import UserError
from unlearning.models.base import Model
from unlearning.sampling.guidance import ClassifierFree, Guidance

PLACES = 2**16  # of latents in a call of the denoiser: four pictures of 1024 by 1024 pixels


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about each picture of a batch: tensors by name, (B, ...) each."""

    embeds: Tensor  # (B, L, D)
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # SDXL's pooled text and micro-conditioning

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows) -> "Conditioning":
        return Conditioning(self.embeds[rows], {k: v[rows] for k, v in self.extra.items()})

    def expand(self, batch: int) -> "Conditioning":
        """One row, `batch` times."""
        return self[torch.zeros(batch, dtype=torch.long, device=self.embeds.device)]

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        extra = {k: torch.cat([p.extra[k] for p in parts]) for k in parts[0].extra}
        return Conditioning(torch.cat([p.embeds for p in parts]), extra)


class DiffusionModel(Model):
    """A text-to-image latent diffusion model.

    Attributes:
        denoiser: The network that erasure edits.
        component: What diffusers' pipeline calls it: "unet" or "transformer".
        scheduler: The noise schedule it was trained with.
        solver: A class of diffusers that walks it from noise to picture.
        guidance: How predictions are combined at each sampling step.
        latent_shape: (C, H, W) of one picture.
    """

    denoiser: nn.Module
    component: str
    scheduler: object
    solver: type = DDIMScheduler
    guidance: Guidance = ClassifierFree()
    latent_shape: tuple[int, int, int]
    weights: Mapping[str, Tensor] | None = None  # of a snapshot: values that stand in for the denoiser's own
    adapted: bool = True  # whether an adapter beside the denoiser's weights, if there is one, is heard

    @property
    def network(self) -> nn.Module:
        return self.denoiser

    @property
    def middle(self) -> str:
        """The dotted name of the denoiser's layer at mid depth."""
        if hasattr(self.denoiser, "mid_block"):
            return "mid_block"
        return f"transformer_blocks.{len(self.denoiser.transformer_blocks) // 2}"

    @property
    def patch(self) -> int:
        """The side in latent pixels of what a transformer sees as one token; 1 for a UNet."""
        return self.denoiser.config.get("patch_size") or 1

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What the denoiser is told for each prompt; "" is the null prompt of classifier-free guidance."""

    @abstractmethod
    def vocabulary(self) -> list[str]:
        """The whole words that the tokenizer knows, of three letters or more."""

    @abstractmethod
    def last_token(self, prompts: Sequence[str]) -> Tensor:
        """The position (B,) of each prompt's last word piece, before the end-of-text token."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, 8H, 8W or so) in [0, 1] to scaled latents (B, C, H, W)."""

    @abstractmethod
    def decode(self, x_0: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) to pictures in [0, 1]."""

    @abstractmethod
    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        """The maps, by their denoiser parameter's prefix, through which the prompt enters the denoiser."""

    def predict(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The denoiser's raw output (eps, v or flow), (B, C, H, W) float32; t is () or (B,) on the schedule's scale."""
        arguments, keywords = self._denoiser_inputs(x_t.to(self.dtype), t, c)
        with self.precision(), nullcontext() if self.adapted else _adapter_off(self.denoiser):
            if self.weights is None:
                output = self.denoiser(*arguments, **keywords)
            else:
                output = functional_call(self.denoiser, dict(self.weights), arguments, keywords)
        return self._unpacked(output.sample, x_t.shape).float()

    def features(self, x_t: Tensor, t: Tensor, c: Conditioning, layer: str | None = None) -> Tensor:
        """What a layer of the denoiser puts out at every place of the picture, (B, D, h, w) float32.

        Args:
            layer: Its dotted name within the denoiser; by default the layer at mid depth.

        Raises:
            UserError: Where there is no such layer, or it has no output for every place.
        """
        name, outputs = layer or self.middle, []
        try:
            module = self.denoiser.get_submodule(name)
        except AttributeError:
            raise UserError(f"The denoiser has no layer {name!r}; the one at mid depth is {self.middle!r}.") from None
        hook = module.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            with _heard():
                self.predict(x_t, t, c)
        finally:
            hook.remove()
        height, width = (side // self.patch for side in x_t.shape[-2:])
        return _on_grid(outputs[-1] if outputs else (), height, width, c.embeds.shape[1], name).float()

    @abstractmethod
    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        """The denoiser's positional and keyword arguments."""

    def _unpacked(self, output: Tensor, shape: torch.Size) -> Tensor:
        """The denoiser's output in the latents' shape (B, C, H, W)."""
        return output[:, : shape[1]]  # some predict their variance below

    def set_timesteps(self, scheduler: object, steps: int) -> None:
        """Sets the timesteps at which a scheduler of diffusers walks from noise to one of this model's pictures."""
        scheduler.set_timesteps(steps, device=self.device)

    def snapshot(self, names: Sequence[str]) -> "DiffusionModel":
        """This model with today's values of the named weights, sharing all others: a frozen teacher without a copy."""
        parameters = dict(self.denoiser.named_parameters())
        view = copy.copy(self)
        view.weights = {n: parameters[n].detach().clone() for n in names}
        return view

    def without_adapter(self) -> "DiffusionModel":
        """This model with its adapter off, sharing every weight: the base model of an adapted one."""
        view = copy.copy(self)
        view.adapted = False
        return view

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents (B, C, H, W), each from its own seed: no batch size or device changes a picture."""
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
        """The picture that a prediction implies: of eps (x_t - sigma eps) / alpha, of v alpha x_t - sigma v.

        Of a flow, whose prediction is eps - x_0, it is x_t - sigma (eps - x_0).
        """
        alpha, sigma = self._alpha_sigma(t)
        if self.prediction_type == "flow":
            return x_t - sigma * prediction
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * prediction
        return (x_t - sigma * prediction) / alpha

    def to_prediction(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction that implies the picture x_0: `to_x0`'s inverse."""
        alpha, sigma = self._alpha_sigma(t)
        if self.prediction_type == "v_prediction":
            return (alpha * x_t - x_0) / sigma
        return (x_t - (x_0 if self.prediction_type == "flow" else alpha * x_0)) / sigma

    def x0_gain(self, t: Tensor) -> Tensor:
        """How many times an error of the prediction is the error of the picture it implies, (B, 1, 1, 1)."""
        alpha, sigma = self._alpha_sigma(t)
        return sigma / alpha if self.prediction_type == "epsilon" else sigma

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t² / sigma_t², (B, 1, 1, 1)."""
        alpha, sigma = self._alpha_sigma(t)
        return (alpha / sigma).square()

    def timesteps(self, share: Tensor) -> Tensor:
        """Those at `share` (B,) in [0, 1) of the schedule: whole ones, except of a flow, whose time is continuous."""
        t = share.to(self.device) * self.scheduler.config.num_train_timesteps
        return t.clamp(min=1) if self.prediction_type == "flow" else t.long()

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies: (x_t - alpha x_0) / sigma."""
        alpha, sigma = self._alpha_sigma(t)
        return (x_t - alpha * self.to_x0(prediction, x_t, t)) / sigma


def at_once(latents: Tensor, most: int) -> int:
    """How many of the latents (N, C, H, W) a call of the denoiser is for, at most: fewer, the larger they are."""
    return max(1, min(most, PLACES // (latents.shape[-2] * latents.shape[-1])))


def _on_grid(output: Tensor | tuple, height: int, width: int, text: int, layer: str) -> Tensor:
    """A layer's output (B, D, h, w): a UNet's at its scale, of a transformer's tokens those that are the picture's.

    Blocks of joint attention put out the text's tokens and then the picture's, or one sequence of both.
    """
    parts = [p for p in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(p)]
    places = height * width
    for part in reversed(parts):
        if part.ndim == 4 and _scaled_down(*part.shape[-2:], height, width):
            return part
        if part.ndim == 3 and part.shape[1] in (places, text + places):
            return part[:, -places:].transpose(1, 2).unflatten(2, (height, width))
    shapes = " and ".join(str(tuple(p.shape)) for p in parts) or "nothing"
    raise UserError(f"Layer {layer!r} puts out {shapes}, which is no {height} by {width} grid.")


def _scaled_down(h: int, w: int, height: int, width: int) -> bool:
    """Whether h by w is a grid of height by width at a smaller scale or the same; attention's heads are none."""
    return h <= height and w <= width and round(height / h) == round(width / w)


@contextmanager
def adapter_for(denoiser: nn.Module, rows: Sequence[bool]) -> Iterator[None]:
    """Within it the adapter is heard by some rows of a batch alone: `rows`, over and over until the batch is full.

    peft's mixed-adapter batches: one call of the denoiser for both the base model and the adapted one.
    """

    def tell(layer: LoraLayer, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        names = [layer.active_adapters[0] if heard else "__base__" for heard in rows]
        return arguments, {**keywords, "adapter_names": names * (len(arguments[0]) // len(rows))}

    layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
    hooks = [layer.register_forward_pre_hook(tell, with_kwargs=True) for layer in layers]
    try:
        with _heard():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _heard() -> AbstractContextManager:
    """Within it the denoiser's hooks are called, though it be compiled: what was compiled without them passes by."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _adapter_off(denoiser: nn.Module) -> Iterator[None]:
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()
