"""The jobs of a process share models and data that are slow to load."""

import weakref

from tests.run.small import at_call
from unlearning.config import instances
from unlearning.methods.uce import UCE


def test_jobs_share_the_model_and_write_the_same_files_as_single_runs(sweep, unlearn, tmp_path, loads):
    train = ["method.iterations=2", "method.steps=2", "method.batch_size=1", "method.trajectory=exact"]
    sweep("method=esd_x", "seed=0,1", *train, "stages=[fit]")
    sweep("method=uce", "seed=1", "stages=[fit]")
    assert loads() == 1
    for method, settings in {"esd_x": train, "uce": []}.items():
        instances.clear()
        alone = unlearn("dataset=prompt", f"method={method}", *settings, "seed=1", "stages=[fit]", run=method)
        [together] = (tmp_path / "runs").rglob(f"{method}/seed1*/erasure/weights.safetensors")
        assert together.read_bytes() == (alone / "erasure" / "weights.safetensors").read_bytes()


def test_memory_never_holds_two_models(monkeypatch):
    class Network:
        def __init__(self):
            self.itself = self  # as networks do

    first = weakref.ref(instances.reuse("model", {"path": "one"}, Network))
    assert instances.reuse("model", {"path": "one"}, lambda: 1 / 0) is first()

    def second():
        assert first() is None
        return Network()

    instances.reuse("model", {"path": "two"}, second)
    assert instances.reuse("other", {}, dict) == {}
    instances.clear()
    assert instances.reuse("model", {"path": "two"}, lambda: "anew") == "anew"


def test_a_failed_job_shares_nothing(sweep, error_of, monkeypatch, loads):
    at_call(monkeypatch, UCE, "fit", 1, lambda: 1 / 0)
    error_of("method=uce", "seed=0,1", "stages=[fit]")
    assert loads() == 2
