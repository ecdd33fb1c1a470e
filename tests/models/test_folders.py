"""Model folders in the layouts that users have."""

import json
import shutil
import subprocess

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from tests import tiny
from unlearning.__main__ import CONF
from unlearning.errors import UserError
from unlearning.models.folders import MODELS
from unlearning.models.pixart import PixArt
from unlearning.models.stable_diffusion import StableDiffusion


@pytest.fixture
def folder(sd1, tmp_path):
    return shutil.copytree(sd1, tmp_path / "model")


def loaded(path, kind=StableDiffusion):
    return kind.load(str(path), device="cpu")


def test_a_folder_with_weights_of_a_variant_only_is_read(sd1, tmp_path):
    tiny.pipeline("sd1").save_pretrained(tmp_path / "fp16", variant="fp16")
    assert not list((tmp_path / "fp16" / "unet").glob("*model.safetensors"))
    ours, theirs = loaded(tmp_path / "fp16").named_parameters(), loaded(sd1).named_parameters()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_weights_without_a_variant_come_first(sd1, folder):
    for file in folder.rglob("*.safetensors"):
        file.with_suffix(".fp16.safetensors").write_bytes(b"not read")
    assert torch.equal(loaded(folder).layer("unet.conv_in").weight, loaded(sd1).layer("unet.conv_in").weight)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path):
    tiny.pipeline("sd1").save_pretrained(tmp_path / "it's a model", safe_serialization=False)
    with pytest.raises(UserError) as error:
        loaded(tmp_path / "it's a model")
    command = str(error.value).partition("convert them once: ")[2].splitlines()[0]
    code = subprocess.run(["bash", "-c", f"printf %s {command.removeprefix('python -c ')}"], capture_output=True).stdout
    exec(code.decode())
    loaded(tmp_path / "it's a model-diffusers")


def test_pickled_weights_of_an_unused_part_are_ignored(sd1, folder):
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"not read")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert torch.equal(loaded(folder).layer("unet.conv_in").weight, loaded(sd1).layer("unet.conv_in").weight)
    (folder / "safety_checker").rename(folder / "image_encoder")
    with pytest.raises(UserError, match="its image_encoder holds pickled weights only"):
        loaded(folder)


def test_a_single_file_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"(?s)from_single_file.*model-diffusers.*config="):
        loaded(tmp_path / "model.safetensors")


def test_an_empty_path_is_not_the_working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"model\.path is empty"):
        loaded("")


def test_a_folder_of_another_family_is_named(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(UserError, match=rf"model=sdxl model\.path={folder}"):
        loaded(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model=sd15"):
        loaded(folder, PixArt)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json is broken"):
        loaded(folder)


def test_every_family_is_one_of_the_configuration():
    for pipeline, name in MODELS.items():
        target = OmegaConf.load(CONF / "model" / f"{name}.yaml")["_target_"]
        own = get_object(target).__self__.pipeline_class.__name__
        assert MODELS[own] == name and (own == pipeline or name == "pixart")


def test_a_tokenizer_that_states_no_length_takes_the_text_encoders(sd1, folder):
    config = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["model_max_length"]
    config.write_text(json.dumps(settings))
    ours, theirs = (loaded(path).encode_prompts(["a cat"]).embeds for path in (folder, sd1))
    assert torch.equal(ours, theirs)


def test_a_path_may_begin_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert loaded("~/model").name == str(folder)
