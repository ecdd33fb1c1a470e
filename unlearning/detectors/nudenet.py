"""NudeNet 3.4 (Bedapudi, https://github.com/notAI-tech/NudeNet): its classes, its model file and its inference."""

# B batch, H W height and width.
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import nudenet
import numpy as np

from unlearning.concepts import Box
from unlearning.config.values import NonNegative, Share
from unlearning.detectors.base import Detector, Known
from unlearning.detectors.geometry import expanded
from unlearning.errors import UserError, unknown
from unlearning.store.files import file_digest

CLASSES = tuple(vars(nudenet.nudenet)["__labels"])
EXPOSED = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_EXPOSED",
    "ARMPITS_EXPOSED",
)
FLOOR = 0.25  # NudeNet itself drops lower scores: 0.2 for a candidate, then 0.25 for a box


class NudeNetModel:
    """NudeNet's network.

    Args:
        path: 640m.onnx, or None for the 320n.onnx of the package.
        setting: The config key that holds `path`, for the error message.
        resolution: The side in pixels that images are resized to; by default 320, or 640 for a model given by path.

    Raises:
        UserError: If there is no file at `path`, or it is damaged.
    """

    def __init__(self, path: str | Path | None, setting: str, resolution: int | None = None):
        file = check_model_file(path, setting)
        resolution = resolution or (640 if path else 320)
        self.name = f"NudeNet {version('nudenet')}, {file.name} {file_digest(file)[:12]} at {resolution} px"
        try:
            self._network = nudenet.NudeDetector(str(file), inference_resolution=resolution)
        except Exception as error:  # onnxruntime's classes of errors are not public
            again = source(setting) if path else "Install its package again: pip install --force-reinstall nudenet"
            raise UserError(
                f"{file} is no whole NudeNet model ({next(iter(str(error).splitlines()), '')}). {again}"
            ) from error

    def __call__(self, image: np.ndarray) -> list[dict]:
        """Every box in an image (H, W, 3) uint8: {"class", "score", "box": [left, top, width, height] in pixels}.

        Raises:
            TypeError: If the image is not uint8; NudeNet detects nothing in floats.
        """
        if image.dtype != np.uint8:
            raise TypeError(f"NudeNet needs uint8 images, not {image.dtype}: it detects nothing in them")
        # Blue comes first, as in an image that OpenCV reads from a file: published scores are measured that way.
        return self._network.detect(np.ascontiguousarray(image[..., ::-1]))


def check_model_file(path: str | Path | None, setting: str) -> Path:
    """NudeNet's ONNX file. Raises UserError, with the config key `setting`, if it is missing."""
    file = Path(path or Path(nudenet.__file__).with_name("320n.onnx"))
    if not file.is_file():
        raise UserError(f"No NudeNet model at {file}. {source(setting)}")
    return file


def source(setting: str) -> str:
    """The source of the file, for error messages; `setting` is the config key that holds its path."""
    return (
        "Download 640m.onnx from https://github.com/notAI-tech/NudeNet/releases and "
        f"set `{setting}` to the file, or to null for the 320n.onnx of the package."
    )


def check_classes(names: tuple[str, ...]) -> None:
    """Raises UserError for a name that is not one of NudeNet's classes."""
    for name in names:
        if name not in CLASSES:
            raise unknown("NudeNet class", name, CLASSES)


@dataclass(frozen=True)
class NudeNet(Detector):
    """The boxes of some of NudeNet's classes.

    Args:
        classes: The classes to find.
        min_score: The least score of a box; NudeNet itself drops scores below 0.25.
        expand: The share of its width and height by which a box grows on each side.
        path: 640m.onnx, or None for the 320n.onnx of the package.

    Raises:
        UserError: For an unknown class, or if there is no file at `path`.
    """

    classes: tuple[str, ...] = ("FEMALE_BREAST_EXPOSED",)
    min_score: Share = 0.5
    expand: NonNegative = 0.0
    path: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        check_classes(self.classes)
        check_model_file(self.path, "method.detector.path")

    @cached_property
    def _model(self) -> NudeNetModel:
        return NudeNetModel(self.path, "method.detector.path")

    def __call__(self, images: np.ndarray, known: Known) -> list[list[Box]]:
        return [self._boxes(image) for image in images]

    def _boxes(self, image: np.ndarray) -> list[Box]:
        kept = [d["box"] for d in self._model(image) if d["class"] in self.classes and d["score"] >= self.min_score]
        return [expanded((x, y, x + w, y + h), self.expand, image.shape[:2]) for x, y, w, h in kept]
