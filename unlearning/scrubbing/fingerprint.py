"""What a concept looks like to the frozen teacher, found in pictures without a label.

Feature vectors of the forget images are clustered on the sphere; a cluster that the retain images share is background
and is dropped; what is left, the prototypes, is where the concept is. Once words for the concept are known, those
prototypes are dropped too at whose places the words change nothing.
"""

# B batch, D feature width, h w feature grid, H W latent height and width, V vectors, K prototypes.
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.diffusion import Conditioning, DiffusionModel, at_once

AT_ONCE = 16  # pictures in a call of the teacher
MOST = 200_000  # vectors kept of all pictures: memory does not grow with their number


@dataclass(frozen=True)
class Fingerprint:
    """
    Args:
        prototypes: (K, D), of unit length.
        shared: (J, D), the clusters that were dropped because the retain images share them, purest first.
        centre: (D,), what is taken off every feature first: features have a large common mean.
        tau, alpha: M = sigmoid(alpha (S - tau)).
        layer: Where in the denoiser the features are taken; None for the middle.
    """

    prototypes: Tensor
    shared: Tensor
    centre: Tensor
    tau: float
    alpha: float
    layer: str | None = None

    def similarities(self, teacher: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """<f_u, p_k>, (B, K, h, w); S(u) is their maximum over k  (eqs. 5 and 6)."""
        f = F.normalize(teacher.features(x_t, t, c, self.layer) - self.centre[:, None, None], dim=1)
        return torch.einsum("bdhw,kd->bkhw", f, self.prototypes)

    def mask(self, S: Tensor, size: tuple[int, int]) -> Tensor:
        """M = sigmoid(alpha (S - tau)), (B, 1, H, W), of S (B, h, w)  (eq. 7)."""
        S = F.interpolate(S[:, None], size, mode="bilinear", align_corners=False)
        return torch.sigmoid(self.alpha * (S - self.tau))


class Fingerprinting:
    """How a fingerprint is taken.

    Args:
        K: Clusters; fewer prototypes are left where some are dropped.
        tau: A number, or "calibrated": the `quantile` of how similar the retain images' vectors are to the prototypes.
            Those are of single draws and a mask's similarities means over draws, which vary less: of the retain
            images' places fewer than 1 - `quantile` come above tau.
        alpha: How sharply the mask rises about tau.
        layer: The denoiser's layer whose features are looked at; None for the one at mid depth.
        band: Timesteps, of the schedule's thousand, at which features carry meaning.
        draws: Noises (and timesteps) over which a picture's similarity is averaged.
        vectors: Kept of a picture, at most.
        centred: Takes the retain images' mean off every feature.
        purity: Drops a cluster unless of the vectors near its prototype (nearer than half of its members) this share
            is the forget images', were there as many of the retain images; the purest is kept if none is so pure, as
            long as two thirds are. 0 keeps every cluster.
        confirmed: Whether `confirm` drops any.
        seed: Of the clustering.

    Raises:
        UserError: For a setting out of range, by name.
    """

    def __init__(
        self,
        K: int = 5,
        tau: float | str = 0.6,
        alpha: float = 15.0,
        layer: str | None = None,
        band: tuple[int, int] = (300, 700),
        draws: int = 4,
        vectors: int = 2000,
        centred: bool = True,
        purity: float = 0.95,
        confirmed: bool = True,
        quantile: float = 0.9,
        seed: int = 42,
    ):
        if isinstance(tau, str) and tau != "calibrated":
            raise UserError(f"tau is a number or 'calibrated', not {tau!r}.")
        for name, value in {"K": K, "draws": draws, "vectors": vectors}.items():
            if value < 1:
                raise UserError(f"method.fingerprint.{name} has to be 1 or more, and is {value}.")
        if len(band) != 2 or not 0 <= band[0] < band[1] <= 1000:
            raise UserError(
                f"method.fingerprint.band has to be two timesteps, the lower first, from 0 to 1000, and is {[*band]}."
            )
        if not 0 <= quantile <= 1:
            raise UserError(f"method.fingerprint.quantile has to be from 0 to 1, and is {quantile}.")
        self.K, self.tau, self.alpha, self.layer, self.band, self.draws = K, tau, alpha, layer, tuple(band), draws
        self.vectors, self.centred, self.purity, self.confirmed = vectors, centred, purity, confirmed
        self.quantile, self.seed = quantile, seed

    def __call__(self, teacher: DiffusionModel, forget: Tensor, retain: Tensor) -> Fingerprint:
        """Of forget and retain latents (N, C, H, W).

        Raises UserError where there are too few of them, or nothing sets them apart.
        """
        needs = {"tau=calibrated": self.tau == "calibrated", "centred": self.centred, "purity": self.purity > 0}
        if not len(retain) and any(needs.values()):
            raise UserError(
                f"The fingerprint's {', '.join(k for k, v in needs.items() if v)} compare with images that do not show "
                "the concept: give some (retain=/a/folder), or set method.fingerprint.tau=0.6, "
                "method.fingerprint.centred=false and method.fingerprint.purity=0."
            )
        f = self._vectors(teacher, forget)
        r = self._vectors(teacher, retain) if len(retain) else f[:0]
        centre = r.mean(0) if self.centred else torch.zeros_like(f[0])
        f, r = (_directions(vectors, centre) for vectors in (f, r))
        if len(f) < self.K:
            raise UserError(
                f"{self.K} prototypes cannot be made of {len(f)} feature vectors: lower method.fingerprint.K."
            )
        clusters = self._clusters(f)
        prototypes, shared = self._chosen(clusters, f, r) if self.purity else (clusters, clusters[:0])
        tau, place = self._tau(prototypes, r), teacher.device
        return Fingerprint(prototypes.to(place), shared.to(place), centre.to(place), tau, self.alpha, self.layer)

    @torch.no_grad()
    def confirm(
        self, taken: Fingerprint, teacher: DiffusionModel, forget: Tensor, retain: Tensor, c: Conditioning
    ) -> Fingerprint:
        """The prototypes at whose places c, prompts that name the concept, changes the teacher's mind.

        Attention tells every place what the picture is of, so that the paper beside a banana can be as much the
        banana's own as the banana is. But it is not where the prompt matters (DiffEdit: Couairon et al., 2022,
        https://arxiv.org/abs/2210.11427, step 1): a prototype is kept if in the places nearest to it the prediction
        changes by more than in the mean place of the same pictures. Where all of them are such paper, the concept is in
        a cluster that the retain images share: the purest one whose places c changes.
        """
        if not self.confirmed:
            return taken
        clusters = torch.cat([taken.prototypes, taken.shared])
        S = self.similarities(replace(taken, prototypes=clusters), teacher, forget)
        change = F.interpolate(self._change(teacher, forget, c), S.shape[-2:], mode="area")
        nearest, count = S.argmax(1).flatten(), len(clusters)
        moved = change.new_zeros(count).index_add(0, nearest, change.flatten()) > nearest.bincount(minlength=count)
        if not moved.any():
            return taken
        own = moved[: len(taken.prototypes)]
        taken = replace(taken, prototypes=taken.prototypes[own] if own.any() else clusters[moved][:1])
        if self.tau != "calibrated":
            return taken
        r = _directions(self._vectors(teacher, retain), taken.centre.cpu())
        return replace(taken, tau=self._tau(taken.prototypes.cpu(), r))

    def _change(self, teacher: DiffusionModel, latents: Tensor, c: Conditioning) -> Tensor:
        """How far the x_0 that the teacher implies moves when told c, of the mean over the picture, (N, 1, H, W)."""
        parts = []
        for z_0 in latents.split(at_once(latents, AT_ONCE)):
            moved = torch.zeros_like(z_0[:, :1])
            for x_t, t, null in self._views(teacher, z_0):
                told = c[torch.randint(len(c), (len(z_0),), device=z_0.device)]
                x_0, x_0_null = (teacher.to_x0(teacher.predict(x_t, t, said), x_t, t) for said in (told, null))
                moved += (x_0 - x_0_null).square().mean(1, keepdim=True)
            parts.append(moved / moved.mean((2, 3), keepdim=True).clamp(min=1e-12))
        return torch.cat(parts)

    def _tau(self, prototypes: Tensor, r: Tensor) -> float:
        return float(_quantile((r @ prototypes.T).amax(1), self.quantile) if self.tau == "calibrated" else self.tau)

    @torch.no_grad()
    def similarities(self, fingerprint: Fingerprint, teacher: DiffusionModel, latents: Tensor) -> Tensor:
        """(N, K, h, w), of latents (N, C, H, W): at timesteps of the band, averaged over draws of the noise."""
        parts = [
            torch.stack([fingerprint.similarities(teacher, *seen) for seen in self._views(teacher, z_0)]).mean(0)
            for z_0 in latents.split(at_once(latents, AT_ONCE))
        ]
        return torch.cat(parts)

    def _views(self, teacher: DiffusionModel, z_0: Tensor) -> Iterator[tuple[Tensor, Tensor, Conditioning]]:
        """The pictures (B, C, H, W) under the noise of every draw, as the teacher is shown them."""
        c = teacher.encode_prompts([""]).expand(len(z_0))
        for _ in range(self.draws):
            t = torch.randint(*self.band, (len(z_0),), device=z_0.device)
            yield teacher.add_noise(z_0, torch.randn_like(z_0), t), t, c

    @torch.no_grad()
    def _vectors(self, teacher: DiffusionModel, latents: Tensor) -> Tensor:
        """Feature vectors (V, D) on the CPU, as many of each picture, chosen at random."""
        parts, each = [], min(self.vectors, MOST // max(1, len(latents)))
        for z_0 in latents.split(at_once(latents, AT_ONCE)):
            seen = [teacher.features(*view, self.layer).flatten(2).cpu() for view in self._views(teacher, z_0)]
            for vectors in torch.cat(seen, 2).transpose(1, 2):  # (places, D) of one picture
                parts.append(vectors[torch.randperm(len(vectors))[:each]])
        return torch.cat(parts)

    def _clusters(self, f: Tensor) -> Tensor:
        """Prototypes (K, D) of unit vectors f (V, D): spherical k-means  (eq. 4)."""
        means = MiniBatchKMeans(self.K, batch_size=8192, random_state=self.seed, n_init="auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct vectors than clusters: the empty ones are dropped below
            means.fit(f.numpy())
        centres = torch.from_numpy(means.cluster_centers_).float()
        return F.normalize(centres[centres.norm(dim=1) > 0], dim=1)

    def _chosen(self, prototypes: Tensor, f: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The prototypes whose clusters the retain images do not share, and those whose they do; purest first."""
        own, theirs = f @ prototypes.T, r @ prototypes.T  # (V, K)
        member = F.one_hot(own.argmax(1), len(prototypes)).bool()
        radius = torch.stack(
            [own[member[:, k], k].median() if member[:, k].any() else own[0, k] for k in range(own.shape[1])]
        )
        near, as_near = ((radius <= S).double().mean(0) for S in (own, theirs))
        share = near / (near + as_near).clamp(min=1e-9)
        if share.max() < min(2 / 3, self.purity):
            raise UserError(
                "Nothing sets the forget images apart from the retain images: no cluster of their features is the "
                "forget images' own. Give retain images that do not show the concept, more clusters "
                "(method.fingerprint.K), another layer (method.fingerprint.layer), or method.fingerprint.purity=0."
            )
        order = share.argsort(descending=True)
        own = share[order] >= min(self.purity, share.max().item())
        return prototypes[order][own], prototypes[order][~own]


def _directions(vectors: Tensor, centre: Tensor) -> Tensor:
    """Of vectors (V, D) as seen from the centre (D,)."""
    return F.normalize(vectors - centre, dim=1)


def _quantile(values: Tensor, q: float) -> Tensor:
    """torch.quantile, of any number of values (V,)."""
    return values.kthvalue(max(1, round(q * len(values)))).values
