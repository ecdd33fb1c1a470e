"""Digests of content, atomic writes, and the handling of damaged files."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

DIGITS = 16  # hexadecimal digits of a digest
ASIDE = ".damaged"  # suffix of a damaged file, which is kept for inspection
T = TypeVar("T")
log = logging.getLogger(__name__)


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits that identify `parts`, which may be anything that JSON can represent."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def file_digest(path: Path) -> str:
    """Sixteen hexadecimal digits that identify the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def write_atomically(path: Path, content: bytes | memoryview | str | Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name and renames it. If writing fails, `path` is as before.

    Args:
        content: What is written, or a function that writes it to an open file, for what is too large for memory.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")  # unique across machines, as a process id is not
    try:
        if callable(content):
            with partial.open("wb") as out:
                _call(content, out)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure may keep the name but not the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _call(write: Callable[[BinaryIO], object], out: BinaryIO) -> None:
    """Calls `write`. torch.save raises RuntimeError where the system refuses to write; here that is the OSError."""
    try:
        write(out)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_state(path: Path, parse: Callable[[Any], T]) -> T | None:
    """The content of a JSON file of this package; None without the file.

    A damaged file is set aside, so that its content is computed again, and None is returned.

    Args:
        parse: Converts the parsed JSON to the result. It raises ValueError, TypeError, KeyError or AttributeError if
            the content is not what it expects.
    """
    try:
        return parse(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # also what is no JSON, and no text
        set_aside(path, str(error) if isinstance(error, ValueError) else repr(error))
        return None


def set_aside(path: Path, why: str) -> None:
    """Renames a damaged file or folder to `path` with the suffix ".damaged", with a warning. It stays if that fails."""
    kept = path.with_name(path.name + ASIDE)
    try:
        if kept.is_dir():
            shutil.rmtree(kept)
        path.replace(kept)
        log.warning("%s is damaged (%s). It is kept as %s, and made again.", path, why, kept.name)
    except OSError:
        log.warning("%s is damaged (%s) and is not used.", path, why)
