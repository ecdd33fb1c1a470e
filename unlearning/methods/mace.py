"""MACE: Mass Concept Erasure in Diffusion Models (Lu et al., CVPR 2024). https://arxiv.org/abs/2403.06135

Three stages, for many concepts at once, on the maps W to keys and values of the cross-attention of a UNet.

1. Closed-form refinement takes the concepts out of the words around them. In prompts about concept i and the same
prompts about its anchor, e_p and e*_p are the states at the places that both share: all but the concept's own words.

    W_1 = argmin_W' sum_i sum_p || W' e_p - W e*_p ||^2  +  s_p sum_j || W' c_j - W c_j ||^2  +  lamb || W' - W ||_F^2

2. Each concept's own words are erased by a LoRA B_i A_i on W_1, trained on noised images of it. A_l are the attention
probabilities of layer l at the places M of the image that show the concept, for its words and what follows the prompt:

    min sum_l || A_l[M, words] ||_F,        t ~ sigmoid(0.05 (t - 200)) - sigmoid(0.05 (t - 400)).

3. Fusion gives all LoRAs to one map, for all states e of the prompts about each concept:

    W_2 = argmin_W' sum_i sum_e || W' e - (W_1 + B_i A_i) e ||^2
                    + s_p sum_j || W' c_j - W c_j ||^2 + lamb || W' - W_1 ||_F^2

The defaults are the authors' for objects: eight images and thirty prompts a concept, rank 1, lamb = 1000, s_p = 0. For
celebrities they take lr = 1e-4 and a large preserve_scale, for nudity 120 iterations, uniform t, a preserve_scale.

Deviations: the masks M come from the unedited UNet's own cross-attention maps for the concept's words (as Receler's),
where the authors take those of GroundingDINO and SAM, two more networks; as theirs, styles have none. c_j are states of
the task's retained concepts and of the null prompt, where the authors cache MS-COCO's captions and lists of names, and
set lamb to 0. The thirty prompts are ours. What follows the prompt is its end of text and all padding, also where a
tokenizer pads with another token than the end of text. A concept without an anchor gets a generic one. x_0 is the mean
of the autoencoder's latents for pixels in [-1, 1], where the authors sample one for pixels normalised as ImageNet's.

Paper and code (commit 057e7a6): in stage 1 the code multiplies its preserve_scale in twice, in stage 3 once:
`refine_scale` is then the square of `preserve_scale`.
"""

# B batch, N heads (of maps) or images, P places of a layer, L tokens, D text width, S side of a mask.
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from unlearning.concepts import Concept, Kind, UnlearningTask
from unlearning.config.values import Count, Finite, NonNegative, Positive, Template
from unlearning.data.generated import Generated
from unlearning.erasures.module_edit import Adapter
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.methods.base import TrainedMethod
from unlearning.methods.closed_form import closed_form, common_places, edited, projections, states
from unlearning.models.attention import attended, concept_mask, cross_attention, cross_attention_maps
from unlearning.models.diffusion import DiffusionModel
from unlearning.training.forget_retain import ForgetRetain, encoded
from unlearning.training.student import LoRA

MASKED_AT = 0.3  # the share of the schedule at which images are noised for their masks
GENERIC = {"object": "object", "style": "art"}  # anchors
ABOUT = {  # begins of the thirty prompts, and their ends
    "object": (
        ("{}", "a photo of {}", "an image of {}", "a drawing of {}", "a painting of {}", "a close view of {}"),
        ("", " at night", " in the rain", " by a window", " in front of a wall"),
    ),
    "style": (
        ("{}", "a painting by {}", "an artwork by {}", "a picture in the style of {}", "a sketch by {}", "art by {}"),
        ("", " in a museum", " with many details", " in oil on canvas", " of great fame"),
    ),
}


class MACE(TrainedMethod):
    """Closed form, a LoRA for each concept, and their fusion.

    Args:
        generated: Generates the images of the concepts, if the store lacks them.
        kind: "object" or "style"; None for the task's own.
        count: Images of each concept.
        templates: The prompts of a concept, with {} in its place; None for thirty of this file.
        lamb: The weight of the distance to the maps before, in both closed forms.
        preserve_scale: s_p, in both closed forms.
        refine_scale: s_p in the first of them; None for `preserve_scale`.
        focal: Whether t is drawn as above; otherwise uniformly.
        mask_threshold: Threshold of the attention maps, which are scaled to [0, 1].
        max_grad_norm: The norm to which gradients are clipped.
        training: TrainedMethod's arguments; the student is a LoRA, and is trained for each concept.
    """

    trains = LoRA

    def __init__(
        self,
        *,
        generated: Generated,
        kind: Kind | None = None,
        count: Count = 8,
        templates: Sequence[Template] | None = None,
        lamb: Positive = 1000.0,
        preserve_scale: NonNegative = 0.0,
        refine_scale: NonNegative | None = None,
        focal: bool = True,
        mask_threshold: Finite = 0.4,
        max_grad_norm: Positive = 1.0,
        **training,
    ):
        super().__init__(**training)
        self.generated, self.kind, self.count = generated, kind, count
        self.templates = templates
        self.lamb, self.preserve_scale, self.focal = lamb, preserve_scale, focal
        self.refine_scale = preserve_scale if refine_scale is None else refine_scale
        self.mask_threshold, self.max_grad_norm = mask_threshold, max_grad_norm

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> WeightPatch:
        self.check_student()
        cross_attention(model)  # raises, before images are drawn
        self._shown = {concept.name: self.images(model, task, concept) for concept in task.erase}
        try:
            refined = self.refined(model, task)
            with refined.applied_to(model):
                adapters = [self._adapter(model, replace(task, erase=(concept,))) for concept in task.erase]
            return self.fused(model, task, refined, adapters)
        finally:
            del self._shown

    def _adapter(self, model: DiffusionModel, task: UnlearningTask) -> Adapter:
        adapter = super().fit(model, task)
        assert isinstance(adapter, Adapter)  # a LoRA's
        return adapter

    # Stage 1.

    @torch.no_grad()
    def refined(self, model: DiffusionModel, task: UnlearningTask) -> WeightPatch:
        """W_1 of every map."""
        maps = projections(model)
        anchors = [concept.anchor or GENERIC[self.kind or task.kind] for concept in task.erase]
        old = [prompt for concept in task.erase for prompt in self.prompts(task, concept.name)]
        new = [prompt for anchor in anchors for prompt in self.prompts(task, anchor)]
        (e, e_star), c_j = common_places(model, old, new), self._preserved(model, task)
        scale = torch.tensor([1.0] * len(e) + [self.refine_scale] * len(c_j), device=e.device)
        return edited(maps, closed_form(torch.cat([e, c_j]), torch.cat([e_star, c_j]), scale, self.lamb))

    def prompts(self, task: UnlearningTask, name: str) -> list[str]:
        """The prompts of a concept or of its anchor."""
        about = ABOUT[self.kind or task.kind]
        return [template.format(name) for template in self.templates or map("".join, product(*about))]

    def _preserved(self, model: DiffusionModel, task: UnlearningTask) -> Tensor:
        """c_j (n, D)."""
        return torch.cat(states(model, ["", *(task.prompt(concept.name) for concept in task.retain)], "all"))

    # Stage 2.

    @torch.no_grad()
    def images(self, model: DiffusionModel, task: UnlearningTask, concept: Concept) -> tuple[Tensor, Tensor]:
        """Latents (N, C, H, W) of a concept's images, and their masks M (N, 1, S, S)."""
        prompt = task.prompt(concept.name)
        x_0 = encoded(model, self.generated(model, [prompt], self.count))
        if (self.kind or task.kind) == "style":
            return x_0, torch.ones(len(x_0), 1, 1, 1, device=x_0.device)
        t = model.timesteps(torch.full((len(x_0),), MASKED_AT))
        with cross_attention_maps(model) as maps:
            c = model.encode_prompts([prompt]).expand(len(x_0))
            model.predict(model.add_noise(x_0, model.noise(range(len(x_0))), t), t, c)
        words = model.pieces_of(concept.name, [prompt]) * len(x_0)
        return x_0, concept_mask({name: calls[-1] for name, calls in maps.items()}, words, self.mask_threshold)

    def data(self) -> ForgetRetain:
        x_0, M = self._shown[self.task.erase[0].name]
        return ForgetRetain(lambda: ((x_0, M), (x_0[:0], M[:0])), self.batch_size, self.seed)

    def loss(self, batch: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
        x_0, M = batch["forget"]
        name = self.task.erase[0].name
        every = self.prompts(self.task, name)
        prompts = [every[i] for i in torch.randint(len(every), (len(x_0),)).tolist()]
        t = self.timesteps(len(x_0)).to(x_0.device)
        x_t = self.teacher.add_noise(x_0, torch.randn_like(x_0), t)
        with cross_attention_maps(self.student) as maps:
            self.student.predict(x_t, t, self.teacher.encode_prompts(prompts))
        words = torch.zeros(len(x_0), next(iter(maps.values()))[-1].shape[-1], device=x_0.device)
        pieces = self.teacher.word_pieces(prompts)
        for row, own, whole in zip(words, self.teacher.pieces_of(name, prompts), pieces, strict=True):
            row[own.start : own.stop] = row[whole.stop :] = 1
        return torch.stack([attended(calls[-1], M, words) for calls in maps.values()]).sum(0).mean()

    def timesteps(self, count: int) -> Tensor:
        """t (count,)."""
        every = torch.arange(self.teacher.scheduler.config.num_train_timesteps)
        likely = torch.sigmoid(0.05 * (every - 200)) - torch.sigmoid(0.05 * (every - 400))
        return torch.multinomial(likely if self.focal else torch.ones(len(every)), count, replacement=True)

    # Stage 3.

    @torch.no_grad()
    def fused(
        self, model: DiffusionModel, task: UnlearningTask, refined: WeightPatch, adapters: Sequence[Adapter]
    ) -> WeightPatch:
        """W_2 of every map, from W_1 and each concept's LoRA."""
        preserved = self._preserved(model, task).double()
        C_p = self.preserve_scale * preserved.T @ preserved
        total = C_p + self.lamb * torch.eye(len(C_p)).to(C_p)
        before = {n: (m.weight, refined.weights[f"{n}.weight"]) for n, m in projections(model).items()}
        pulls = {name: (W.double() - W_1.double()) @ C_p for name, (W, W_1) in before.items()}
        for concept, adapter in zip(task.erase, adapters, strict=True):
            e = torch.cat(states(model, self.prompts(task, concept.name), "all")).double()
            C = e.T @ e
            total += C
            for name, pull in pulls.items():
                A, B = (adapter.weights[f"{name}.lora_{which}.weight"].double() for which in "AB")
                pull += B @ (A @ C)
        inverse = torch.linalg.inv(total)
        fused = {name: W_1.double() + pulls[name] @ inverse for name, (_, W_1) in before.items()}
        return WeightPatch({f"{name}.weight": W_2.to(before[name][1].dtype) for name, W_2 in fused.items()})
