"""What the README shows is what the repository holds."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.readme import with_tables
from unlearning.__main__ import CONF

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", ["unlearning/methods/uce.py", "conf/method/uce.yaml"])
def test_the_method_it_shows_is_the_one_there_is(path):
    assert (ROOT / path).read_text().strip() in README


def test_its_tables_are_those_of_the_configuration():
    assert with_tables(README) == README, "python experiments/readme.py writes them anew"


def test_every_picture_and_page_it_links_to_exists():
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


def test_the_first_screen_is_a_picture_and_the_command_that_made_it():
    first = README.splitlines()[:10]
    assert any(line.startswith("![") for line in first)
    assert "make demo" in first
