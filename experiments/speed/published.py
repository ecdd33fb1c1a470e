"""The other side of every comparison: what the published scripts do, as plain code on diffusers, from the formulas.

Training keeps a frozen and a trained copy of the denoiser, as ESD's script does (github.com/rohitgandikota/erasing). In
each iteration it follows one partial trajectory with the trained copy, and evaluates the frozen copy once for each
prediction that the loss needs. Here only what is trained has gradients and the prompts are encoded once, both in favour
of this side.
"""

# B batch, C H W latent shape, L tokens, D text width, J anchors.
import copy
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from unlearning.models.diffusion import Conditioning, DiffusionModel
from unlearning.models.vqgan import VQGAN

Trained = Callable[[nn.Module], list[nn.Parameter]]  # chooses, or adds, what is trained of a copy of the denoiser

# Generation.


def pipeline(model: DiffusionModel) -> StableDiffusionPipeline:
    """diffusers' pipeline with the model's weights and DDIM."""
    pipe = StableDiffusionPipeline(**{**model.pipeline.components, "scheduler": None}, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_config(model.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts: Sequence[str], batch: int, *, latents: Tensor | None = None, **settings) -> Tensor:
    """Images (N, 3, height, width) in [0, 1], `batch` in a call; `settings` are the pipeline's."""
    images = []
    for i in range(0, len(prompts), batch):
        start = {} if latents is None else {"latents": latents[i : i + batch].to(pipe.dtype)}
        images.append(pipe(prompts[i : i + batch], output_type="pt", **start, **settings).images.float())
    return torch.cat(images)


# Training.


def weights(pattern: str) -> Trained:
    """The weights whose names match."""

    def choose(student: nn.Module) -> list[nn.Parameter]:
        chosen = [p for n, p in student.named_parameters() if re.search(pattern, n)]
        for p in chosen:
            p.requires_grad_(True)
        return chosen

    return choose


def low_rank(pattern: str, rank: int) -> Trained:
    """peft's LoRA beside the linear maps and convolutions whose names match."""

    def add(student: nn.Module) -> list[nn.Parameter]:
        layers = {n for n, m in student.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        chosen = [n for n in layers if re.search(pattern, n)]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen), student)
        return [p for n, p in student.named_parameters() if "lora_" in n]

    return add


class Loop(ABC):
    """Two copies of a denoiser: `teacher` is the model's own, frozen; a part of `student`, a deep copy, is trained."""

    def __init__(self, model: DiffusionModel, trained: Trained, lr: float):
        self.model, self.teacher = model, model.denoiser
        self.student: nn.Module = copy.deepcopy(model.denoiser)
        self.optimizer = torch.optim.Adam(trained(self.student), lr=lr)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        arguments, keywords = self.model._denoiser_inputs(x_t.to(self.model.dtype), t, c)  # the family's own
        return self.model._unpacked(denoiser(*arguments, **keywords).sample, x_t.shape).float()

    @abstractmethod
    def loss(self) -> Tensor:
        """The objective of one iteration."""

    def iterate(self, seeds: Sequence[int]) -> Iterator[float]:
        """Runs an iteration for each seed and yields its loss."""
        for seed in seeds:
            torch.manual_seed(seed)
            loss = self.loss()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()


class ESD(Loop):
    """ESD (arXiv:2303.07345, eq. 6), and UnGuide's LoRA (arXiv:2508.05755), whose anchor is not the null prompt."""

    def __init__(
        self,
        model: DiffusionModel,
        concept: str,
        *,
        trained: Trained,
        lr: float,
        steps: int,
        guidance_scale: float,
        anchor: str = "",
        eta: float = 1.0,
    ):
        super().__init__(model, trained, lr)
        self.null, self.anchor, self.c = (model.encode_prompts([text]) for text in ("", anchor, concept))
        self.steps, self.guidance_scale, self.eta = steps, guidance_scale, eta

    @torch.no_grad()
    def point(self) -> tuple[Tensor, Tensor]:
        """x_t (1, C, H, W) and t (), at a random step of a guided trajectory of the student."""
        scheduler = self.model.solver.from_config(self.model.scheduler.config)
        self.model.set_timesteps(scheduler, self.steps)
        x = torch.randn(1, *self.model.latent_shape).to(self.model.device)
        stop = int(torch.randint(self.steps, ()))
        both = Conditioning.cat([self.null, self.c])
        for t in scheduler.timesteps[:stop]:
            eps_0, eps_c = self.predict(self.student, torch.cat([x, x]), t, both).chunk(2)
            x = scheduler.step(eps_0 + self.guidance_scale * (eps_c - eps_0), t, x).prev_sample
        return x, scheduler.timesteps[stop]

    def loss(self) -> Tensor:
        return self.erasing(*self.point())

    def erasing(self, x_t: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            anchor = self.predict(self.teacher, x_t, t, self.anchor)
            eps_c = self.predict(self.teacher, x_t, t, self.c)
        return F.mse_loss(self.predict(self.student, x_t, t, self.c), anchor - self.eta * (eps_c - anchor))


class SPM(ESD):
    """SPM (arXiv:2312.16145): ESD's loss, and latent anchoring at random directions around the concept."""

    def __init__(self, *args, lamb: float = 1000.0, anchor_count: int = 4, **settings):
        super().__init__(*args, **settings)
        self.lamb, self.anchor_count = lamb, anchor_count

    def loss(self) -> Tensor:
        x_t, t = self.point()
        e = self.c.embeds.expand(self.anchor_count, -1, -1)
        directions = torch.randn_like(e)
        a = Conditioning(directions * (e.norm(dim=(1, 2)) / directions.norm(dim=(1, 2)))[:, None, None])
        x_a = x_t.expand(self.anchor_count, -1, -1, -1)
        with torch.no_grad():
            target = self.predict(self.teacher, x_a, t, a)
        return self.erasing(x_t, t) + self.lamb * F.mse_loss(self.predict(self.student, x_a, t, a), target)


class Scrubber(Loop):
    """The second phase of the Teacher-Student Scrubber as written down: a call for each prediction, raw targets."""

    def __init__(self, model: DiffusionModel, forget: Tensor, retain: Tensor, M: Tensor, **settings):
        super().__init__(model, **settings)
        self.forget, self.retain, self.M, self.null = forget, retain, M, model.encode_prompts([""])

    def loss(self) -> Tensor:
        z_t, z_blind_t, t = self._noised(
            self.forget, (1 - self.M) * self.forget + self.M * torch.randn_like(self.forget)
        )
        z_r_t, _, t_r = self._noised(self.retain, self.retain)
        null = self.null.expand(len(self.forget))
        with torch.no_grad():
            T, T_blind = (self.predict(self.teacher, z, t, null) for z in (z_t, z_blind_t))
            T_r = self.predict(self.teacher, z_r_t, t_r, null)
        S, S_r = self.predict(self.student, z_t, t, null), self.predict(self.student, z_r_t, t_r, null)
        L_f, L_b = (self.M * (S - T_blind)).square().mean(), ((1 - self.M) * (S - T)).square().mean()
        return L_f + L_b + 20 * F.mse_loss(S_r, T_r)

    def _noised(self, *latents: Tensor) -> tuple[Tensor, ...]:
        """Latents (B, C, H, W) with the same noise at the same random timesteps t (B,), and t."""
        t, eps = self.model.timesteps(torch.rand(len(latents[0]))), torch.randn_like(latents[0])
        return *(self.model.add_noise(z_0, eps, t) for z_0 in latents), t


# The other methods and attacks.


Pairs = Sequence[tuple[Tensor, Tensor, float]]  # states (N, D), states that they become, and a weight


def edited(W: Tensor, pairs: Pairs, lamb: float) -> Tensor:
    """UCE's solution (arXiv:2308.14761, eq. 7) for one map W (O, D): a sum over pairs, and an inverse."""
    W, eye = W.float(), torch.eye(W.shape[1], device=W.device)
    numerator, denominator = lamb * W, lamb * eye
    for x, y, scale in pairs:
        numerator = numerator + scale * (W @ y.T) @ x
        denominator = denominator + scale * x.T @ x
    return numerator @ torch.inverse(denominator)


@torch.no_grad()
def uce(
    model: DiffusionModel, concepts: Sequence[str], anchors: Sequence[str], preserved: Sequence[str]
) -> list[Tensor]:
    """UCE: each map is solved by itself, a prompt in each call of the text encoder.

    The states of a second encoder (the T5 of Stable Diffusion 3) follow those of the first, and are paired apart.
    """
    end = next(iter(model.text_states(model.encode_prompts([""])).values())).shape[1]  # of the first encoder's

    def states(text: str, first: int, end: int | None = None) -> Tensor:
        return model.encode_prompts([text]).embeds[0, first:end].float()

    c, c_star = ([states(text, int(model.last_token([text])), end) for text in texts] for texts in (concepts, anchors))
    pairs = [(x[: len(y)], y[: len(x)], 1.0) for x, y in zip(c, c_star, strict=True)]
    pairs += [(states(old, end), states(new, end), 1.0) for old, new in zip(concepts, anchors, strict=True)]
    pairs += [(x, x, max(0.1, 1 / len(preserved))) for x in (states(text, 0) for text in preserved)]
    maps = [layer.weight for _, layer in model.text_projections()]
    return [edited(W, pairs, 0.5).to(W.dtype) for W in maps]


@torch.no_grad()
def rece(
    model: DiffusionModel,
    concepts: Sequence[str],
    anchors: Sequence[str],
    preserved: Sequence[str],
    *,
    repetitions: int = 3,
    scale: float = 0.1,
) -> list[Tensor]:
    """RECE (arXiv:2407.12383, eq. 7 and 9): after UCE, the states that bring a concept back are found from sums over
    all maps, and erased from each map."""
    before = [layer.weight.float() for _, layer in model.text_projections()]
    maps = [W.float() for W in uce(model, concepts, anchors, preserved)]
    eye = torch.eye(before[0].shape[1], device=before[0].device)
    for _ in range(repetitions):
        pairs: list[tuple[Tensor, Tensor, float]] = []
        for concept, anchor in zip(concepts, anchors, strict=True):
            c, c_star = (model.encode_prompts([text]).embeds[0].float() for text in (concept, anchor))
            gram = sum(W.T @ W for W in maps)
            mixed = sum(W.T @ V for W, V in zip(maps, before, strict=True))
            back = (torch.inverse(0.1 * eye + gram) @ mixed @ c.T).T
            pairs.append((back, c_star, 1.0))
        pairs += [(x, x, scale) for x in (model.encode_prompts([text]).embeds[0].float() for text in preserved)]
        maps = [edited(W, pairs, scale) for W in maps]
    return maps


def textual_inversion(
    model: DiffusionModel, latents: Tensor, prompt: str, *, lr: float, iterations: int, batch: int, accumulate: int
) -> None:
    """CCE's inner loop (arXiv:2308.01508) as diffusers' example of textual inversion: the whole table of token
    embeddings has gradients and optimizer states, and all rows but the new word's are written back after each step."""
    table = model.parts["text_encoder"].get_input_embeddings().weight
    before, word = table.detach().clone(), model.token_ids(["x"])[0][0]
    others = torch.arange(len(table), device=table.device) != word
    optimizer = torch.optim.AdamW([table.requires_grad_(True)], lr=lr)
    try:
        for _ in range(iterations):
            for _ in range(accumulate):
                z_0 = latents[torch.randint(len(latents), (batch,), device=latents.device)]
                t, eps = model.timesteps(torch.rand(batch)), torch.randn_like(z_0)
                c = model.encode([prompt] * batch)
                F.mse_loss(model.predict(model.add_noise(z_0, eps, t), t, c), eps).div(accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                table[others] = before[others]
    finally:
        with torch.no_grad():
            table.copy_(before)
        table.requires_grad_(False)
        table.grad = None


@torch.no_grad()
def count_codes(model: VQGAN, images: Sequence[np.ndarray]) -> Counter[int]:
    """How often each code occurs in images (H, W, 3) uint8: an image in each call, counted in Python."""
    counts: Counter[int] = Counter()
    for image in images:
        z = model.vq.quant_conv(model.vq.encoder(2 * as_batch(image).to(model.device) - 1))
        codes = model.logits(z).argmax(1) if model.logits else model.vq.quantize(z)[2][2]
        counts.update(codes.flatten().tolist())
    return counts


def as_batch(image: np.ndarray) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255
