"""What an attack found: the prompts, token embeddings or starting latents with which a concept comes back.

Each row of a manifest may name a safetensors file with the token embeddings ("embeds.text_encoder", (L, D)) or the
latents ("latents", (C, H, W)) that take the place of its prompt's and its seed's own.
"""

# B batch, N rows, L tokens, D width of a text encoder, C H W latent shape.
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor

from unlearning.concepts import ATTACK
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel, Embedded, Text
from unlearning.store.files import read_state, write_atomically
from unlearning.store.manifest import ManifestRow, image_path

NAME = "comeback.json"


@dataclass(frozen=True)
class Comeback:
    """
    Args:
        targets: The evaluation's N prompts that were attacked.
        prompts: What is prompted in their place, N texts.
        embeds: Token embeddings by text encoder, (N, L, D); empty if the prompts' own are to be taken.
        latents: What trajectories start from, (N, C, H, W); None if the seeds' own noise is to be taken.
        record: What the attack did, as JSON: iterations, losses, ...
    """

    targets: tuple[str, ...]
    prompts: tuple[str, ...]
    embeds: Mapping[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    record: Mapping[str, object] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes comeback.json, and a file of tensors for each row that has any; all of it or nothing.

        Raises:
            UserError: If a value is not finite: a failed attack is no evidence of robustness.
        """
        partial = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
        try:
            partial.mkdir(parents=True)
            files = [self._save_row(partial / f"{i}.safetensors", i) for i in range(len(self.prompts))]
            rows = zip(self.targets, self.prompts, files, strict=True)
            saved = {"rows": [{"target": t, "prompt": p, "file": f} for t, p, f in rows], "record": dict(self.record)}
            write_atomically(partial / NAME, json.dumps(saved, indent=2))
            if not exists(folder):
                shutil.rmtree(folder, ignore_errors=True)  # of a version that kept it otherwise
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _save_row(self, path: Path, i: int) -> str | None:
        tensors = {f"embeds.{part}": e[i] for part, e in self.embeds.items()}
        tensors |= {} if self.latents is None else {"latents": self.latents[i]}
        if not tensors:
            return None
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"The attack on {self.targets[i]!r} gave {name} that are not finite: it has failed.")
        write_atomically(path, serialised({k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}))
        return path.name


def exists(folder: Path) -> bool:
    """Whether a finished attack is kept in the folder."""
    return _rows(folder) is not None


def _rows(folder: Path) -> dict[str, dict] | None:
    """The rows of a finished attack by their targets; None without one."""
    return read_state(folder / NAME, lambda saved: {row["target"]: row for row in saved["rows"]})


def attacked(folder: Path, rows: Sequence[ManifestRow]) -> list[ManifestRow]:
    """The manifest rows of an attack: of `rows`, those of its targets, with what the attack found in place.

    Seeds and guidance scales stay, so that an image can be compared with the one before the attack.

    Raises:
        UserError: If the folder holds no finished attack.
    """
    if (results := _rows(folder)) is None:
        raise UserError(f"There is no finished attack in {folder}: run the attack stage first.")
    return [_attacked(folder, row, results[row.prompt]) for row in rows if row.prompt in results]


def _attacked(folder: Path, row: ManifestRow, result: Mapping) -> ManifestRow:
    file = folder / result["file"] if result["file"] else None
    path = image_path(row.path.parent, result["prompt"], row.seed, row.guidance_scale, file)
    return replace(row, path=path, prompt=result["prompt"], role=ATTACK, base=None, comeback=file)


def restored(
    model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], files: Sequence[Path | None]
) -> tuple[Text, Tensor]:
    """The text and the noise (B, C, H, W) of a batch, with what the rows' files have in place of their own.

    Raises:
        UserError: If a file cannot be read, or belongs to another model.
    """
    noise, text = model.noise(seeds), prompts
    for i, path in ((i, path) for i, path in enumerate(files) if path):
        for name, tensor in _read(path).items():
            if name == "latents":
                noise[i] = _fitting(path, tensor, noise[i])
            else:
                text = text if isinstance(text, Embedded) else _copy(model.embed(text))
                part = name.removeprefix("embeds.")
                if part not in text.embeds:
                    raise UserError(f"{path} holds embeddings for {part!r}, which {model.name} does not have.")
                text.embeds[part][i] = _fitting(path, tensor, text.embeds[part][i])
    return text, noise


def _copy(text: Embedded) -> Embedded:
    return Embedded(text.prompts, {part: e.clone() for part, e in text.embeds.items()})


def _fitting(path: Path, tensor: Tensor, own: Tensor) -> Tensor:
    if tensor.shape != own.shape:
        raise UserError(f"{path} is not for this model: it has {tuple(tensor.shape)}, the model {tuple(own.shape)}.")
    return tensor.to(own)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}. Delete its folder: the attack then runs again.") from error
