"""Digests of content, and files that are written completely or not at all."""

import hashlib
import json
import os
from pathlib import Path
from uuid import uuid4

DIGITS = 16  # hexadecimal digits of a digest


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits that identify `parts`, which may be anything that JSON can represent."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:DIGITS]


def file_digest(path: Path) -> str:
    """Sixteen hexadecimal digits that identify the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file under a temporary name and renames it. If writing fails, `path` is as before."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")  # unique across machines, as a process id is not
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure may keep the name but not the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
