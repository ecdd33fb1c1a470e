"""Digests of content, and files that are written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path
from uuid import uuid4


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits that stand for the content of `parts` (anything JSON can hold)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Sixteen hexadecimal digits that stand for the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_atomically(path: Path, content: bytes | str) -> None:
    """All of the file or none of it, whatever happens on the way."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")  # a pid may be another's on another machine
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a machine that loses power keeps the name without the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
