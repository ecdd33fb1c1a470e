"""The result of an attack: prompts, tensors or starting latents that make the erased model show the concept.

A row of a manifest may name a safetensors file. Its tensors replace those of the row's prompt and seed:

    embeds.text_encoder    token embeddings of a text encoder, (L, D)
    own.text_encoder       where the model's own embeddings of the prompt stay, (L,); nowhere by default
    states                 the text encoder's states, (L, D)
    latents                the start of the trajectory, (C, H, W)

Any other tensor is for the attack's own sampler (`Attack.sampler`).
"""

# B batch, L tokens, D width of a text encoder, C H W latent shape.
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor

from unlearning.concepts import ATTACK, Box, Region
from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Embedded, Text
from unlearning.store.files import file_digest, read_state, write_atomically
from unlearning.store.manifest import ManifestRow, image_path

NAME, SHARED = "comeback.json", "shared.safetensors"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class AttackedPrompt:
    """The result for one prompt, or for one image.

    Args:
        target: The evaluation's prompt.
        prompt: The prompt that replaces it.
        seed: The seed of the image; None for all images of the prompt.
        tensors: By name, see above.
        record: Details as JSON: step of the first success, losses, scores, ...
        judged: The part of the image that is evaluated; None for the whole image.
    """

    target: str
    prompt: str
    seed: int | None = None
    tensors: Tensors = field(default_factory=dict)
    record: Mapping[str, object] = field(default_factory=dict)
    judged: Box | None = None


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack.

    Args:
        prompts: One for each prompt, or for each image.
        record: Settings and statistics of the attack as JSON: iterations, images, ...
        shared: Tensors that all rows get in addition to their own.
    """

    prompts: tuple[AttackedPrompt, ...]
    record: Mapping[str, object] = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes comeback.json, and a file of tensors for each row that has any. A failure leaves no files.

        Raises:
            UserError: If a value is not finite: a failed attack is no evidence of robustness.
        """
        partial = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
        try:
            partial.mkdir(parents=True)
            mark = _save_shared(self.shared, partial / SHARED)
            rows = [_saved(one, mark, partial / f"{i}.safetensors") for i, one in enumerate(self.prompts)]
            write_atomically(partial / NAME, _finite_json({"rows": rows, "record": dict(self.record)}))
            if not exists(folder):
                shutil.rmtree(folder, ignore_errors=True)  # written by a version with another format
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _finite_json(saved: Mapping) -> str:
    try:
        return json.dumps(saved, indent=2, allow_nan=False)
    except ValueError as error:
        raise UserError("A loss or a score is not finite: the attack has failed.") from error


def _save_shared(tensors: Tensors, path: Path) -> Tensors:
    """Saves the shared tensors. Returns a tensor that identifies them, which each row's file includes."""
    if not tensors:
        return {}
    _save(tensors, path, "the attack")
    return {"shared": torch.tensor(float(int(file_digest(path)[:6], 16)))}  # 24 bits, which a float holds


def _saved(one: AttackedPrompt, mark: Tensors, path: Path) -> dict:
    """A row of comeback.json. Writes the row's tensors, if it has any."""
    tensors = {**one.tensors, **mark}
    if tensors:
        _save(tensors, path, f"the attack on {one.target!r}")
    row = {"target": one.target, "prompt": one.prompt, "file": path.name if tensors else None}
    more = {"seed": one.seed, "record": dict(one.record) or None, "judged": one.judged}
    return row | {name: value for name, value in more.items() if value is not None}


def _save(tensors: Tensors, path: Path, source: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} of {source} has values that are not finite: the attack has failed.")
    write_atomically(path, serialised({k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}))


def exists(folder: Path) -> bool:
    """Whether the folder holds the result of a finished attack, with every file that its rows name."""
    return _rows(folder) is not None


def read_record(folder: Path) -> dict:
    """`AttackResult.record`, with the rows under "rows"; {} without a finished attack."""
    saved = read_state(folder / NAME, lambda saved: {**saved["record"], "rows": saved["rows"]})
    return saved or {}


def _rows(folder: Path) -> dict[tuple[str, int | None], dict] | None:
    """The rows of a finished attack by target and seed; None without one, or if a file of tensors cannot be read."""

    def rows(saved: Mapping) -> dict[tuple[str, int | None], dict]:
        for name in {row["file"] for row in saved["rows"]} - {None}:
            _check(folder / name)
        return {(row["target"], row.get("seed")): row for row in saved["rows"]}

    return read_state(folder / NAME, rows)


def _check(path: Path) -> None:
    """Raises ValueError if a file of tensors, or the one that it shares with others, is missing or incomplete."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
        if "shared" in names:
            with safe_open(path.with_name(SHARED), "pt"):
                pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def attacked(folder: Path, rows: Sequence[ManifestRow]) -> list[ManifestRow]:
    """The manifest rows of an attack: the rows of its targets, with the attack's prompts and tensors.

    Seeds, guidance scales and bases stay, so that an image can be compared with the one before the attack.

    Raises:
        UserError: If the folder holds no finished attack.
    """
    if (results := _rows(folder)) is None:
        raise UserError(f"There is no finished attack in {folder}: run the attack stage first.")
    pairs = [(row, results.get((row.prompt, row.seed)) or results.get((row.prompt, None))) for row in rows]
    return [_attacked(folder, row, result) for row, result in pairs if result]


def _attacked(folder: Path, row: ManifestRow, result: Mapping) -> ManifestRow:
    file = folder / result["file"] if result["file"] else None
    size = row.height, row.width
    path = image_path(row.path.parent, result["prompt"], row.seed, row.guidance_scale, file, size)
    judged = (Region(tuple(result["judged"]), ATTACK, row.labels),) if "judged" in result else ()
    return replace(row, path=path, prompt=result["prompt"], role=ATTACK, comeback=file, regions=judged)


@dataclass(frozen=True)
class Restored:
    """The inputs of a batch of images.

    Args:
        text: B prompts, or their token embeddings.
        noise: The start of each trajectory, (B, C, H, W).
        given: All tensors of each row's file; empty if no row has one.
    """

    text: Text
    noise: Tensor
    given: Sequence[Tensors] = ()

    def encoded(self, model: DiffusionModel) -> Conditioning:
        """The conditioning. States from a file replace those of the prompt."""
        c = model.encode_prompts(self.text)
        if any("states" in tensors for tensors in self.given):
            c = replace(c, embeds=c.embeds.clone())
            for i, tensors in enumerate(self.given):
                if "states" in tensors:
                    c.embeds[i] = _fitting(f"states for {self._prompt(i)!r}", tensors["states"], c.embeds[i])
        return c

    def _prompt(self, i: int) -> str:
        return (self.text.prompts if isinstance(self.text, Embedded) else self.text)[i]


def restored(
    model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], files: Sequence[Path | None]
) -> Restored:
    """The text and the noise of a batch. Tensors from the rows' files replace the prompts' and seeds' own.

    Raises:
        UserError: If a file cannot be read, or belongs to another model.
    """
    given = [_read(path) if path else {} for path in files]
    noise, text = model.noise(seeds), prompts
    for i, (path, tensors) in enumerate(zip(files, given, strict=True)):
        for name, tensor in tensors.items():
            if name == "latents":
                noise[i] = _fitting(path, tensor, noise[i])
            elif name.startswith("embeds."):
                text = text if isinstance(text, Embedded) else _copy(model.embed(text))
                part = name.removeprefix("embeds.")
                if part not in text.embeds:
                    raise UserError(f"{path} holds embeddings for {part!r}, which {model.name} does not have.")
                text.embeds[part][i] = _embeddings(path, tensors, part, text.embeds[part][i])
    return Restored(text, noise, given)


def _embeddings(path: object, tensors: Tensors, part: str, own: Tensor) -> Tensor:
    """The token embeddings (L, D) of a file, and the model's own where the file says so."""
    given = _fitting(path, tensors[f"embeds.{part}"], own)
    stays = tensors.get(f"own.{part}", torch.zeros(len(own))).to(own.device).bool()
    return torch.where(stays[:, None], own, given)


def _copy(text: Embedded) -> Embedded:
    return Embedded(text.prompts, {part: e.clone() for part, e in text.embeds.items()})


def _fitting(source: object, tensor: Tensor, own: Tensor) -> Tensor:
    if tensor.shape != own.shape:
        raise UserError(f"{source} is for another model: its shape is {tuple(tensor.shape)}, not {tuple(own.shape)}.")
    return tensor.to(own)


def stacked(given: Sequence[Tensors], name: str, like: Tensor) -> Tensor:
    """One tensor of every row of a batch, (B, ...), on the device and in the dtype of `like`."""
    return torch.stack([tensors[name] for tensors in given]).to(like)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
        return {**load_file(path.with_name(SHARED)), **tensors} if "shared" in tensors else tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}. Delete its folder: the attack then runs again.") from error
