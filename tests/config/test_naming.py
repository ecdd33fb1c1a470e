"""Names of runs with one or several concepts, and names of dashboard groups."""

import pytest
from omegaconf import OmegaConf

from unlearning.config.naming import dashboard_group, folder_name, joined, register_resolvers, slug


@pytest.mark.parametrize(
    ("concept", "name", "text"),
    [
        ("cat", "cat", "cat"),
        ("Van Gogh", "Van-Gogh", "Van Gogh"),
        (["cat", "Van Gogh"], "cat+Van-Gogh", "cat+Van Gogh"),
        (1984, "1984", "1984"),
        ("///", "unnamed", "///"),
        ("a" * 100, "a" * 60, "a" * 100),
    ],
)
def test_concepts_as_file_names_and_as_text(concept, name, text):
    assert (slug(concept), joined(concept)) == (name, text)


def test_a_folder_name_is_that_of_the_resolved_relative_path(tmp_path, monkeypatch):
    (tmp_path / "mugs" / "red").mkdir(parents=True)
    (tmp_path / "linked").symlink_to("mugs")
    monkeypatch.chdir(tmp_path / "mugs" / "red")
    assert [folder_name(path) for path in ("..", ".", "../red/", "../..")] == ["mugs", "red", "red", tmp_path.name]
    assert folder_name(str(tmp_path / "linked")) == "linked", "the name that the user gave"
    assert folder_name(None) == ""


def test_the_resolvers_take_a_list_of_a_config():
    register_resolvers()
    cfg = OmegaConf.create(
        {"concept": ["cat", "Van Gogh"], "title": "${joined:${concept}}", "name": "${slug:${concept}}"}
    )
    assert (cfg.title, cfg.name) == ("cat+Van Gogh", "cat+Van-Gogh")


def test_a_dashboard_groups_runs_by_concept_where_hydra_does_not_run():
    assert dashboard_group(["cat", "dog"]) == "cat+dog"
