r"""STEREO: Adversarially Robust Concept Erasing (Srivatsan et al., CVPR 2025). https://arxiv.org/abs/2408.16807

Stage 1, "search thoroughly enough": ESD erases the concept. Textual inversion on the erased model learns a word s_1
that brings the concept back. ESD erases s_1 from this model, and so on, for words s_1 ... s_K. Only the words are kept.

Stage 2, "robustly erase once": the name of the concept and all words, n_0 ... n_K, are erased from the unedited model
at once. The target is guided away from them and towards an anchor a, a scene with the concept, so that the scene stays:

    min_theta || eps_theta(x_t, n) - [ eps*_0 - eta mean_i P(eps*_{n_i} - eps*_0) + s P(eps*_a - eps*_0) ] ||^2,

where n is one of the n_i and P multiplies by `parallel` what is parallel to the prediction of its own prompt (adaptive
projected guidance, arXiv:2410.02416).

Defaults are those of the authors' script. Where it computes something else than it says:

- Its parallel is 1, the default, where P changes nothing.
- Its scale 2.0 should mean 1, the default of s and eta here. In fact it means s = 1 and eta = 3: `method.erase.eta=3`.
- Its negative guidance 2.0 in the first stage is ESD's eta = 0, a target of eps*_0: `method.search.eta=0`. The default
  is ESD's own, 1.
- Its train_method=noxattn trains all linear maps and convolutions outside of cross-attention:
  student.parameters='^unet\.(?!.*attn2)(?!.*norm)' of search and of erase. The default is ESD-u's.
- It leaves trajectories after 1 to 48 of 50 steps, and takes t from 19 above the timestep at which x_t lies. Here any
  step may be the last, and t is where x_t lies.

Deviations:
- The model draws the images of the inversion, whose prompts, flips and latents are CCE's (attacks/cce.py). The authors
  give each word a K-th of the images, ours are all for every word.
- The authors' anchors are sentences about each concept, written by a language model. Ours are templates.
- Prompts take turns and anchors are random; the authors shuffle lists in which each occurs equally often.
- Each of several concepts has its own words: the n_i are those of one concept.
"""

# B batch, N images, C H W latent shape, D width of a text encoder.
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.concepts import Concept, UnlearningTask
from unlearning.config.values import Count, Finite, Share, Template
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.methods.base import Method
from unlearning.methods.concept_ablation import TEMPLATES
from unlearning.methods.esd import ESD
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Text
from unlearning.sampling.guidance import branches
from unlearning.sampling.inversion import Placeholder
from unlearning.store.files import digest
from unlearning.training.batches import Prompts

Vectors = Mapping[str, Tensor]  # a word's token embeddings, (D,) by text encoder


class LearnedWord(Protocol):
    """A learned word."""

    @property
    def v(self) -> Vectors:
        """Its token embeddings."""
        ...


class WordLearner(Protocol):
    """Learns a word for a concept, as CCE does (attacks/cce.py)."""

    def latents(self, model: DiffusionModel, task: UnlearningTask) -> Mapping[str, Tensor]:
        """Images of each concept by the model, (N, C, H, W)."""
        ...

    def learned(self, model: DiffusionModel, name: str, latents: Tensor) -> LearnedWord:
        """The word for a concept, learned on the model from these images."""
        ...


@dataclass(frozen=True)
class Words:
    """A text edit: learned words, which occur in prompts like any other word.

    Args:
        v: The words by name.
    """

    v: Mapping[str, Vectors]

    def __call__(self, model: DiffusionModel, text: Text, c: Conditioning) -> Conditioning:
        named = {i: name for i, prompt in enumerate(c.prompts) for name in self.v if name in prompt}
        if not named:
            return c
        others = [edit for edit in model.text_edits if edit is not self]
        rows = [c[i : i + 1] for i in range(len(c))]
        for i, name in named.items():
            place = Placeholder.in_prompts(model, [c.prompts[i].replace(name, "{}")])
            own = model.encode(place.filled(self.v[name]), others)
            rows[i] = replace(own, prompts=(c.prompts[i],))
        return Conditioning.cat(rows)

    @contextmanager
    def known_to(self, model: DiffusionModel) -> Iterator[None]:
        """A context in which the model reads prompts with these words."""
        before = model.text_edits
        try:
            model.text_edits = (*before, self)
            yield
        finally:
            model.text_edits = before


class AtOnce(ESD):
    """The second stage: erases all words of each concept, its synonyms, at once.

    Args:
        anchor_scale: s; eta is ESD's.
        parallel: The factor by which P multiplies the parallel part.
        anchors: Anchor prompts with {} in the place of the concept's name; None for Concept Ablation's 200 of objects.
        esd: ESD's arguments.
    """

    def __init__(
        self,
        *,
        anchor_scale: Finite = 1.0,
        parallel: Share = 1.0,
        anchors: tuple[Template, ...] | None = None,
        template: Template | None = "{}",
        **esd,
    ):
        super().__init__(template=template, **esd)
        self.anchor_scale, self.parallel, self.scenes = anchor_scale, parallel, anchors or TEMPLATES["object"]

    def concepts(self) -> dict[str, Concept]:
        """The concept that each prompt erases."""
        return {self.prompt(word): concept for concept in self.task.erase for word in concept.words}

    def data(self) -> Prompts:
        return Prompts(list(self.concepts()), self.batch_size)

    def erasing(self, x_t: Tensor, t: Tensor, c: Conditioning, teacher: DiffusionModel | None = None) -> Tensor:
        teacher, of = teacher or self.teacher, self.concepts()
        concepts = [of[prompt] for prompt in c.prompts]
        scenes = [self.scenes[i] for i in torch.randint(len(self.scenes), (len(c),)).tolist()]
        anchors = [scene.format(concept.name) for scene, concept in zip(scenes, concepts, strict=True)]
        names = zip(*([self.prompt(word) for word in concept.words] for concept in concepts), strict=True)
        with torch.no_grad():
            given = [teacher.encode_prompts(list(prompts)) for prompts in ([""], anchors, *names)]
            eps_0, eps_a, *eps_n = branches(teacher, x_t, t, *given)
            away = torch.stack([self.P(eps, eps_0) for eps in eps_n]).mean(0)
            target = eps_0 - self.eta * away + self.anchor_scale * self.P(eps_a, eps_0)
        return F.mse_loss(self.student.predict(x_t, t, c), target)

    def P(self, eps: Tensor, eps_0: Tensor) -> Tensor:
        """P(eps - eps_0), (B, C, H, W)."""
        difference, along = (eps - eps_0).flatten(1), F.normalize(eps.flatten(1))
        parallel = (difference * along).sum(1, keepdim=True) * along
        return (difference - (1 - self.parallel) * parallel).view_as(eps)


class STEREO(Method):
    """Searches for words that bring the concept back, then erases all of them.

    Args:
        search: Erases the concept, and then each of the words, in the first stage.
        inversion: Learns the words, from images by the model as it was.
        erase: Erases them all from the model as it was.
        rounds: K.
    """

    def __init__(self, *, search: ESD, inversion: WordLearner, erase: AtOnce, rounds: Count = 4):
        self.search, self.inversion, self.erase, self.rounds = search, inversion, erase, rounds

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        words = self.searched(model, task)
        at_once = tuple(replace(concept, synonyms=tuple(words[concept.name])) for concept in task.erase)
        with Words({name: v for own in words.values() for name, v in own.items()}).known_to(model):
            return self.erase.fit(model, replace(task, erase=at_once))

    def searched(self, model: DiffusionModel, task: UnlearningTask) -> dict[str, dict[str, Vectors]]:
        """The K words of each concept, in the order in which they are found."""
        latents = self.inversion.latents(model, task)
        words: dict[str, dict[str, Vectors]] = {concept.name: {} for concept in task.erase}
        newest: dict[str, Vectors] = {}
        erasure = composed()
        for k in range(1, self.rounds + 1):
            erase = tuple(Concept(name) for name in newest or words)
            with erasure.applied_to(model), Words(newest).known_to(model):
                erasure = composed(erasure, self.search.fit(model, replace(task, erase=erase)))
            newest = {}
            with erasure.applied_to(model):
                for name, own in words.items():
                    v = self.inversion.learned(model, name, latents[name]).v
                    # The name tells one word from another: checkpoints of a training are kept by it.
                    word = f"<{name} {k} {digest({part: e.tolist() for part, e in v.items()})[:8]}>"
                    own[word] = newest[word] = v
        return words
