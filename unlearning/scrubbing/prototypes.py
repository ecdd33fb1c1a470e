"""Prototypes of a concept: directions in the frozen teacher's features, learned from images without labels.

Spherical k-means clusters the feature vectors of the forget images. Clusters that the retain images share are
background and are removed. The centres of the other clusters are the prototypes: an image shows the concept where its
features are similar to a prototype. When words for the concept are known, `confirm` removes a prototype if these
words do not change the teacher's prediction at its places.
"""

# B batch, N images, D feature width, h w feature grid, H W latent height and width, V vectors, K prototypes.
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from unlearning.config.values import Count, Finite, Positive, Seed, Share, Timestep
from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel, at_once

PER_CALL = 16  # images in one call of the teacher
MAX_VECTORS = 200_000  # of all images together: a limit on memory


@dataclass(frozen=True)
class Prototypes:
    """The prototypes, and the mask that is computed from them.

    Args:
        directions: The prototypes, (K, D), of unit length.
        background: The centres of the removed clusters, which the retain images share, (J, D), the purest first.
        centre: (D,), subtracted from every feature vector, because features have a large common mean.
        tau, alpha: M = sigmoid(alpha (S - tau)).
        layer: The denoiser's layer whose outputs are the features; None for the layer at mid depth.
        interpolated: Whether S is interpolated from the grid of features to the latent; else M is repeated.
    """

    directions: Tensor
    background: Tensor
    centre: Tensor
    tau: float
    alpha: float
    layer: str | None = None
    interpolated: bool = True

    def similarities(self, teacher: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """<f_u, p_k>, (B, K, h, w); S(u) is the maximum over k  (eqs. 5 and 6)."""
        f = F.normalize(teacher.features(x_t, t, c, self.layer) - self.centre[:, None, None], dim=1)
        return torch.einsum("bdhw,kd->bkhw", f, self.directions)

    def mask(self, S: Tensor, size: Sequence[int]) -> Tensor:
        """M = sigmoid(alpha (S - tau)), (B, 1, H, W), from S (B, h, w)  (eq. 7)."""
        if self.interpolated:
            S = F.interpolate(S[:, None], list(size), mode="bilinear", align_corners=False)
            return torch.sigmoid(self.alpha * (S - self.tau))
        return F.interpolate(torch.sigmoid(self.alpha * (S[:, None] - self.tau)), list(size), mode="nearest")


class PrototypeSearch:
    """The search for prototypes.

    Args:
        K: Number of clusters. There are fewer prototypes if clusters are removed.
        tau: A number, or "calibrated": the `quantile` of the similarities between the retain images' vectors and the
            prototypes. These similarities are those of single draws. A mask averages over draws, so it varies less, and
            fewer than 1 - `quantile` of the places in retain images are above tau.
        alpha: Steepness of the mask at tau.
        layer: The denoiser's layer whose outputs are the features; None for the layer at mid depth.
        band: The range of timesteps, of 1000, at which features are computed.
        draws: Number of noises and timesteps over which an image's similarities are averaged.
        vectors: Maximum number of feature vectors from one image.
        centred: Whether the mean of the retain images' vectors is subtracted from all vectors.
        purity: Minimum share of forget vectors among the vectors near a prototype, for equal numbers of forget and
            retain vectors. Near means nearer than the median member of the cluster. If no cluster reaches the minimum,
            the purest cluster is kept if its share is at least 2/3. 0 keeps every cluster.
        confirmed: Whether `confirm` removes prototypes.
        interpolated: See `Prototypes`.
        spherical: Whether k-means clusters feature vectors of unit length; else raw ones.
        quantile: See `tau`.
        seed: The seed of the clustering.

    Raises:
        UserError: For a setting out of range.
    """

    def __init__(
        self,
        K: Count = 5,
        tau: Finite | str = 0.6,
        alpha: Positive = 15.0,
        layer: str | None = None,
        band: tuple[Timestep, Timestep] = (300, 700),
        draws: Count = 4,
        vectors: Count = 2000,
        centred: bool = True,
        purity: Share = 0.95,
        confirmed: bool = True,
        interpolated: bool = True,
        spherical: bool = True,
        quantile: Share = 0.9,
        seed: Seed = 42,
    ):
        if isinstance(tau, str) and tau != "calibrated":
            raise UserError(f"method.prototypes.tau must be a number or 'calibrated', not {tau!r}.")
        if not band[0] < band[1]:
            raise UserError(f"method.prototypes.band must be two timesteps, the lower first, not {[*band]}.")
        self.K, self.tau, self.alpha, self.layer, self.band, self.draws = K, tau, alpha, layer, tuple(band), draws
        self.vectors, self.centred, self.purity, self.confirmed = vectors, centred, purity, confirmed
        self.interpolated, self.spherical, self.quantile, self.seed = interpolated, spherical, quantile, seed

    def __call__(self, teacher: DiffusionModel, forget: Tensor, retain: Tensor) -> Prototypes:
        """The prototypes of forget and retain latents, (N, C, H, W).

        Raises:
            UserError: If there are too few images, or no cluster belongs to the forget images only.
        """
        needs = {"tau=calibrated": self.tau == "calibrated", "centred": self.centred, "purity": self.purity > 0}
        if not len(retain) and any(needs.values()):
            raise UserError(
                f"There are no retain images, but these settings of method.prototypes need them: "
                f"{', '.join(k for k, v in needs.items() if v)}. Give images without the concept (retain=/a/folder), "
                "or set method.prototypes.tau=0.6, method.prototypes.centred=false and method.prototypes.purity=0."
            )
        f = self._vectors(teacher, forget)
        r = self._vectors(teacher, retain) if len(retain) else f[:0]
        centre = r.mean(0) if self.centred else torch.zeros_like(f[0])
        if len(f) < self.K:
            raise UserError(f"{self.K} clusters cannot be made of {len(f)} feature vectors. Lower method.prototypes.K.")
        raw = f - centre
        f, r = (_directions(vectors, centre) for vectors in (f, r))
        clusters = self._clusters(f if self.spherical else raw)
        directions, background = self._split(clusters, f, r) if self.purity else (clusters, clusters[:0])
        tau, device = self._tau(directions, r), teacher.device
        directions, background, centre = (part.to(device) for part in (directions, background, centre))
        return Prototypes(directions, background, centre, tau, self.alpha, self.layer, self.interpolated)

    @torch.no_grad()
    def confirm(
        self, prototypes: Prototypes, teacher: DiffusionModel, forget: Tensor, retain: Tensor, c: Conditioning
    ) -> Prototypes:
        """Keeps the prototypes of places where prompts c, which name the concept, change the teacher's prediction.

        Attention mixes the features of all places of an image: the paper beside a banana can look as specific to
        bananas as the banana itself. But the prompt does not change the prediction there (DiffEdit: Couairon et al.,
        2022, https://arxiv.org/abs/2210.11427, step 1). A prototype is kept if the prediction at its nearest places
        changes more than the mean over the images. If no prototype remains, the result is the purest of the
        clusters of places where c changes the prediction.
        """
        if not self.confirmed:
            return prototypes
        clusters = torch.cat([prototypes.directions, prototypes.background])
        S = self.similarities(replace(prototypes, directions=clusters), teacher, forget)
        change = F.interpolate(self._change(teacher, forget, c), S.shape[-2:], mode="area")
        nearest, count = S.argmax(1).flatten(), len(clusters)
        moved = change.new_zeros(count).index_add(0, nearest, change.flatten()) > nearest.bincount(minlength=count)
        if not moved.any():
            return prototypes
        own = moved[: len(prototypes.directions)]
        directions = prototypes.directions[own] if own.any() else clusters[moved][:1]
        prototypes = replace(prototypes, directions=directions)
        if self.tau != "calibrated":
            return prototypes
        r = _directions(self._vectors(teacher, retain), prototypes.centre.cpu())
        return replace(prototypes, tau=self._tau(directions.cpu(), r))

    def _change(self, teacher: DiffusionModel, latents: Tensor, c: Conditioning) -> Tensor:
        """The change of the teacher's x_0 by c at each place, relative to the image's mean, (N, 1, H, W)."""
        parts = []
        for z_0 in latents.split(at_once(latents, PER_CALL)):
            moved = torch.zeros_like(z_0[:, :1])
            for x_t, t, null in self._noised(teacher, z_0):
                some = c[torch.randint(len(c), (len(z_0),), device=z_0.device)]
                x_0, x_0_null = (teacher.to_x0(teacher.predict(x_t, t, rows), x_t, t) for rows in (some, null))
                moved += (x_0 - x_0_null).square().mean(1, keepdim=True)
            parts.append(moved / moved.mean((2, 3), keepdim=True).clamp(min=1e-12))
        return torch.cat(parts)

    def _tau(self, directions: Tensor, r: Tensor) -> float:
        return float(_quantile((r @ directions.T).amax(1), self.quantile) if self.tau == "calibrated" else self.tau)

    @torch.no_grad()
    def similarities(self, prototypes: Prototypes, teacher: DiffusionModel, latents: Tensor) -> Tensor:
        """(N, K, h, w) of latents (N, C, H, W), averaged over draws of timestep and noise."""
        parts = [
            torch.stack([prototypes.similarities(teacher, *inputs) for inputs in self._noised(teacher, z_0)]).mean(0)
            for z_0 in latents.split(at_once(latents, PER_CALL))
        ]
        return torch.cat(parts)

    def mask(self, prototypes: Prototypes, teacher: DiffusionModel, latents: Tensor) -> Tensor:
        """M (N, 1, H, W) of latents (N, C, H, W), at timesteps of the band."""
        S = self.similarities(prototypes, teacher, latents).amax(1)
        return prototypes.mask(S, latents.shape[-2:])

    def _noised(self, teacher: DiffusionModel, z_0: Tensor) -> Iterator[tuple[Tensor, Tensor, Conditioning]]:
        """The teacher's inputs (z_t, t, c) for latents (B, C, H, W), once for every draw; c is the null prompt."""
        c = teacher.encode_prompts([""]).expand(len(z_0))
        for _ in range(self.draws):
            t = torch.randint(self.band[0], self.band[1], (len(z_0),), device=z_0.device)
            yield teacher.add_noise(z_0, torch.randn_like(z_0), t), t, c

    @torch.no_grad()
    def _vectors(self, teacher: DiffusionModel, latents: Tensor) -> Tensor:
        """Feature vectors (V, D) on the CPU: the same number from every image, at random places."""
        parts, each = [], min(self.vectors, MAX_VECTORS // max(1, len(latents)))
        for z_0 in latents.split(at_once(latents, PER_CALL)):
            features = [teacher.features(*x, self.layer).flatten(2).cpu() for x in self._noised(teacher, z_0)]
            for vectors in torch.cat(features, 2).transpose(1, 2):  # (places, D) of one image
                parts.append(vectors[torch.randperm(len(vectors))[:each]])
        return torch.cat(parts)

    def _clusters(self, f: Tensor) -> Tensor:
        """Cluster centres (K, D), of unit length, of vectors f (V, D), by k-means  (eq. 4)."""
        means = MiniBatchKMeans(self.K, batch_size=8192, random_state=self.seed, n_init="auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about empty clusters, which are removed below
            means.fit(f.numpy())
        centres = torch.from_numpy(means.cluster_centers_).float()
        return F.normalize(centres[centres.norm(dim=1) > 0], dim=1)

    def _split(self, clusters: Tensor, f: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The clusters of forget vectors f only, and those that retain vectors r share; both with the purest first."""
        S_f, S_r = f @ clusters.T, r @ clusters.T  # (V, K)
        member = F.one_hot(S_f.argmax(1), len(clusters)).bool()
        radius = torch.stack(
            [S_f[member[:, k], k].median() if member[:, k].any() else S_f[0, k] for k in range(len(clusters))]
        )
        near_f, near_r = ((radius <= S).double().mean(0) for S in (S_f, S_r))
        purity = near_f / (near_f + near_r).clamp(min=1e-9)
        if purity.max() < min(2 / 3, self.purity):
            raise UserError(
                "Nothing distinguishes the forget images from the retain images: they share all clusters of features. "
                "Give retain images without the concept, more clusters (method.prototypes.K), another layer "
                "(method.prototypes.layer), or set method.prototypes.purity=0."
            )
        order = purity.argsort(descending=True)
        own = purity[order] >= min(self.purity, purity.max().item())
        return clusters[order][own], clusters[order][~own]


def _directions(vectors: Tensor, centre: Tensor) -> Tensor:
    """Unit vectors from the centre (D,) to the vectors (V, D)."""
    return F.normalize(vectors - centre, dim=1)


def _quantile(values: Tensor, q: float) -> Tensor:
    """torch.quantile for any number of values (V,); its own limit is 16 million."""
    return values.kthvalue(max(1, round(q * len(values)))).values
