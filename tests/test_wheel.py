"""The package installed from a wheel and used in another folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[1]
INSTALLED = """
import runpy, sys

del sys.argv[0]
sys.path.insert(0, sys.argv.pop(0))
import unlearning

assert unlearning.__file__.startswith(sys.path[0]), "not the checkout"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package installed from its wheel, without files of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (wheel,) = folder.glob("concept_unlearning-*.whl")
    install = ["install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return folder / "site"


def test_the_wheel_has_every_file_that_the_package_reads(installed):
    for folder in ("unlearning", "conf"):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in tracked.stdout.splitlines():
            place = name if folder == "unlearning" else f"unlearning/{name}"
            assert (installed / place).is_file(), name


def test_it_runs_from_any_folder(installed, tmp_path, sd1):
    few = ["sampler.steps=1", "dataset=prompt", "dataset.images_per_prompt=1", "logger=none", "evaluator=[]"]
    command = [installed / "bin" / "unlearn", "concept=cat", "method=uce", f"model.path={sd1}", *few]
    processes.run(INSTALLED, [installed, *command], cwd=tmp_path)
    (run,) = tmp_path.glob("outputs/runs/emoji_unet/prompt/cat/uce/*")
    assert "unlearning.erasures" in (run / "erasure" / "erasure.json").read_text()
    assert (run / "images" / "erased.csv").exists() and (run / "report.html").exists()
