"""What a page carries inside, so that one file is all of it: its template, and pictures as data URIs."""

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image


def render(template: str, **told: object) -> str:
    """A template of this folder; what it is told is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unlearning", "reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**told)


def data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def thumbnail(path: Path, side: int, kind: str = "png", **options: object) -> str | None:
    """The picture as a data URI of at most `side` pixels a side; None where there is no picture that can be read."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except OSError:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return data_uri(encoded(image, kind, **options), kind)
