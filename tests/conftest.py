"""Settings of all tests: one torch thread for each process, no network, no dashboards. Set before heavy imports."""

import gc
import os
import signal
import sys
from functools import cache
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

import omegaconf.base
import pytest
import yaml

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore: tests send it

# The parent class of OmegaConf's loader: libyaml, where there is one, reads configs ten times as fast. And each
# interpolation is parsed once.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
omegaconf.base.parse = cache(omegaconf.base.parse)

os.fsync = lambda _: None  # tests need not survive a power failure

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux", "pixart", "sana", "dit")


def pytest_collection_finish():
    """Freezes the objects of libraries and test modules: later garbage collections scan only the objects of tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny():
    """The module of tiny models. Its imports take ten seconds, so pytest's main process does not import it."""
    from tests import tiny

    assert tuple(tiny.FAMILIES) == FAMILIES
    return tiny


@pytest.fixture(scope="session", params=FAMILIES)
def any_pipeline(request, tiny, tmp_path_factory):
    """(family, folder) of a tiny random pipeline of every family, saved as diffusers saves."""
    return request.param, tiny.save(request.param, tmp_path_factory.mktemp("models"))


@pytest.fixture
def any_model(any_pipeline, tiny):
    """A fresh load of the model of `any_pipeline`."""
    family, folder = any_pipeline
    return tiny.FAMILIES[family].load(str(folder), device="cpu")


@pytest.fixture(scope="session")
def sd1(tiny, tmp_path_factory):
    """The folder of a tiny random Stable Diffusion 1.x."""
    return tiny.save("sd1", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def sd3(tiny, tmp_path_factory):
    """The folder of a tiny random Stable Diffusion 3."""
    return tiny.save("sd3", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def vqgan(tiny, tmp_path_factory):
    """The folder of a tiny random VQ-GAN."""
    folder = tmp_path_factory.mktemp("models") / "vqgan"
    tiny.vqgan().save_pretrained(folder)
    return folder


@pytest.fixture
def unlearn(sd1, vqgan, tmp_path, monkeypatch):
    """unlearn(*overrides) -> the run's folder: the command line in this process, on a tiny model and in few steps.

    SystemExit carries the message to the user. Runs of one test share a store; `run` names the run's folder.
    unlearn.arguments(*overrides) returns the arguments of the command line.
    """
    from unlearning.config import instances

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: None)  # it takes a tenth of a second; here it may wait
        instances.clear()  # what an earlier test has loaded
    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores the signal once it was sent
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # restored afterwards: `main` sets it
    # Hydra composes the config a first time to read hydra.mode from it, which only the command line sets here.
    monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *_, **__: None)

    def arguments(*overrides: str, run: str = "run") -> list[str]:
        said = dict(o.split("=", 1) for o in overrides if "=" in o)
        model, few = sd1, ["sampler.batch_size=4", "sampler.steps=2"]
        if said.get("model") == "emoji_vqgan":
            model, few, said = vqgan, few[:1], {"dataset": "emoji_scenes", **said}
        scenes = said.get("dataset") == "emoji_scenes"
        few += ["dataset.images=4", "dataset.pictures=12"] if scenes else ["dataset.images_per_prompt=1"]
        places = [f"model.path={model}", f"paths.store={tmp_path}/store", f"hydra.run.dir={tmp_path}/{run}"]
        quick = ["model.autocast=null", "logger=none", "evaluator=[]", "method=none", "trainer.accelerator=cpu"]
        defaults = [*few, *places, *quick]
        named = {o.split("=")[0] for o in overrides}
        asked = [*(o for o in defaults if o.split("=")[0] not in named), *overrides]
        return sorted(asked, key=lambda o: not o.startswith("-"))  # argparse wants -m first

    def call(*overrides: str, run: str = "run") -> Path:
        from unlearning.__main__ import main

        monkeypatch.setattr(sys, "argv", ["unlearn", *arguments(*overrides, run=run)])
        try:
            main()
        finally:
            signal.signal(signal.SIGINT, handler)
        return tmp_path / run

    call.arguments = arguments
    return call


@pytest.fixture
def error_of(unlearn):
    """error_of(*overrides) -> the message of `unlearn overrides`, a command that fails."""

    def call(*overrides: str, run: str = "run") -> str:
        with pytest.raises(SystemExit) as caught:
            unlearn(*overrides, run=run)
        assert isinstance(caught.value.code, str), "a message, which makes the exit code 1"
        return caught.value.code

    return call


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process is left alone with one at the end."""
    longest = (
        "test_contract", "test_stages", "test_accidents", "test_command_line", "models/test_stable_diffusion",
        "test_conf", "test_gpu_script", "test_launchers", "test_failures", "test_embedded_world", "test_scrubber",
        "test_api", "sweeps/", "test_distributed",
    )  # fmt: skip
    items.sort(key=lambda item: next((i for i, name in enumerate(longest) if name in item.nodeid), len(longest)))
