"""The package installed from a wheel and used in another folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package installed from its wheel, without files of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (wheel,) = folder.glob("concept_unlearning-*.whl")
    install = ["install", "-q", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return folder / "site"


def unlearn(installed: Path, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [str(installed / "bin" / "unlearn"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_wheel_has_every_file_that_the_package_reads(installed):
    for folder in ("unlearning", "conf"):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in tracked.stdout.splitlines():
            place = name if folder == "unlearning" else f"unlearning/{name}"
            assert (installed / place).is_file(), name


def test_it_runs_from_any_folder(installed, tmp_path, sd1):
    assert "method: " in unlearn(installed, tmp_path, "--help")
    few = ["sampler.steps=2", "dataset.images_per_prompt=1", "logger=none", "evaluator=[]", "model.autocast=null"]
    unlearn(installed, tmp_path, "concept=cat", "method=uce", f"model.path={sd1}", "sampler.batch_size=4", *few)
    (run,) = tmp_path.glob("outputs/runs/emoji_unet/emoji_objects/cat/uce/*")
    assert "unlearning.erasures" in (run / "erasure" / "erasure.json").read_text()
    assert (run / "images" / "erased.csv").exists() and (run / "report.html").exists()
