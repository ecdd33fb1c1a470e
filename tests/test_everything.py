"""make everything: its commands, and the handling of failures. The commands are replaced by fakes."""

import shutil
import subprocess

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object

from unlearning.__main__ import CONF


@pytest.fixture
def make(tmp_path):
    """make(unlearn=1) -> (exit code, the commands given) where `unlearn` ends with 1, and the others with 0."""
    if not shutil.which("make"):
        pytest.skip("there is no make")
    (tmp_path / "pyproject.toml").touch()
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)

    def call(**ends: int) -> tuple[int, list[list[str]]]:
        for name in ("unlearn", "unlearn-table", "unlearn-report"):
            said = f'#!/bin/sh\nprintf "%s\\n" {name} "$@" "" >> said\nexit {ends.get(name.replace("-", "_"), 0)}\n'
            (binaries / name).write_text(said)
            (binaries / name).chmod(0o755)
        (tmp_path / ".venv" / ".installed").touch()
        done = subprocess.run(["make", "-f", CONF.parent / "Makefile", "everything"], cwd=tmp_path, capture_output=True)
        return done.returncode, [command.split("\n") for command in (tmp_path / "said").read_text().split("\n\n")[:-1]]

    return call


@pytest.mark.parametrize("ends", [{}, {"unlearn": 1}, {"unlearn_table": 1}, {"unlearn": 1, "unlearn_report": 1}])
def test_table_and_page_are_made_whatever_failed_and_the_failure_is_returned(make, ends):
    code, commands = make(**ends)
    assert [name for name, *_ in commands] == ["unlearn", "unlearn", "unlearn-table", "unlearn-report"]
    assert (code != 0) == bool(ends)


def test_every_method_that_erases_objects_is_there_on_three_of_them_and_two_seeds(make):
    methods = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in [overrides for name, _, *overrides in make()[1] if name == "unlearn"]:
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            chosen = [o for o in parser.parse_overrides(overrides) if not o.is_hydra_override()]
            fixed = [o.input_line for o in chosen if not o.is_sweep_override() and o.key_or_group != "hydra/launcher"]
            config = compose("config", [*fixed, "concept=key", "seed=1"], return_hydra_config=True)
            model, params = get_object(config.model._target_).__self__, config.hydra.sweeper.params
            swept = [*parser.parse_overrides([f"{key}={value}" for key, value in params.items()]), *chosen]
            values = {o.get_key_element(): list(o.sweep_string_iterator()) for o in swept if o.is_sweep_override()}
            assert values["concept"] == ["cat", "ship", "key"] and values["seed"] == ["0", "1"]
            for method in values["method"]:
                kind = get_object(compose(f"method/{method}").method._target_)
                assert issubclass(model, kind.works_on), f"{method} on {model.__name__}"
            methods += values["method"]
    there = {path.stem for path in (CONF / "method").glob("*.yaml")}
    elsewhere = {"lcr_nudity", "weights", "oracle", "eraseanything"}  # people, a file, another model; a flow
    assert there - {*methods} == elsewhere
