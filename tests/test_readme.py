"""The README agrees with the repository: code, tables, links and commands."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from experiments.readme import with_tables
from tests import tiny
from unlearning.__main__ import CONF
from unlearning.models.stable_diffusion import StableDiffusion

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", ["unlearning/methods/uce.py", "conf/method/uce.yaml"])
def test_the_shown_method_equals_its_files(path):
    assert (ROOT / path).read_text().strip() in README


def test_its_tables_are_those_of_the_configuration():
    assert with_tables(README) == README, "python experiments/readme.py writes them anew"


def test_every_image_and_page_it_links_to_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_command_it_shows_composes():
    lines = [line.split("#")[0] for line in README.splitlines() if line.startswith("unlearn ")]
    assert lines
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for line in lines:
            words = [w for w in shlex.split(line)[1:] if w != "-m"]
            first = [
                w.partition("=")[0] + "=" + w.partition("=")[2].split(",")[0] if "[" not in w else w for w in words
            ]
            compose("config", overrides=first)


def test_the_python_example_runs(tmp_path, monkeypatch):
    """On a tiny pipeline, in few steps."""
    section = README.partition("## From Python")[2]
    code, sampling = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert 10 <= len(code.splitlines()) <= 14
    short = code.replace('"iterations": 100', '"iterations": 1, "steps": 2').replace(
        'the cat")', 'the cat", num_inference_steps=2)'
    )
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda path: tiny.pipeline("sd1"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(short, names)
    monkeypatch.undo()
    assert (tmp_path / "erased.png").exists() and (tmp_path / "cat" / "erasure.json").exists()
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "erased").unet.state_dict()
    before, now = tiny.pipeline("sd1").unet.state_dict(), names["pipe"].unet.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in again.items())
    assert any("attn2" in name and not torch.equal(value, before[name]) for name, value in now.items())
    exec(sampling, names)
    assert names["images"].shape == (1, 3, tiny.SIDE, tiny.SIDE)


def test_it_names_the_methods_that_weights_cannot_hold():
    files = [OmegaConf.load(path) for path in (CONF / "method").glob("*.yaml")]
    classes = {get_class(cfg["_target_"]) for cfg in files if "_target_" in cfg}
    acting = {c for c in classes if not c.writable and issubclass(StableDiffusion, c.works_on)}
    named = re.search(r"act while images are generated \((.*?)\)", README, re.DOTALL)[1]
    assert {*re.findall(r"`(\w+)`", named)} == {c.__module__.rpartition(".")[2] for c in acting}


def test_the_first_screen_is_an_image_and_the_command_that_made_it():
    first = README.splitlines()[:10]
    assert any(line.startswith("![") for line in first)
    assert "make demo" in first
