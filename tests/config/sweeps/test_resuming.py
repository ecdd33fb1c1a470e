"""A sweep repeats no work: when the command runs again, after a kill, and beside another sweep."""

import json
import os
import signal
from pathlib import Path

from PIL import Image

from tests.config.sweeps.commands import FEW, in_a_process, numbers
from tests.run.small import files
from unlearning.config import instances
from unlearning.run import Run


def test_a_sweep_started_again_does_only_what_is_missing(sweep, tmp_path, monkeypatch, loads):
    command = ["method=none,uce", "evaluator=clip_score", "stages=[fit,generate,evaluate]"]
    sweep(*command)
    assert loads() == 1
    runs = tmp_path / "runs"
    before, measured = files(runs), numbers(runs)
    gone = next(runs.rglob("uce/seed0*/metrics.json"))
    gone.unlink()
    executed = []
    execute = Run.execute
    monkeypatch.setattr(Run, "execute", lambda self, stages: (executed.append(self.folder), execute(self, stages))[1])
    sweep(*command)
    assert executed == [gone.parent] and numbers(runs) == measured
    changed = {p for p, t in files(runs).items() if before.get(p) != t}
    assert {p for p in changed if not p.endswith((".log", "multirun.yaml"))} == {
        p for p in changed if p.startswith(str(gone.parent.relative_to(runs)))
    } - {str((gone.parent / "__main__.log").relative_to(runs))}
    instances.clear()
    loads()
    sweep(*command)
    assert loads() == 0 and len(executed) == 1


def test_other_evaluators_stages_or_files_are_not_treated_as_finished(unlearn, tmp_path, monkeypatch, sd1):
    executed = []
    execute = Run.execute
    monkeypatch.setattr(Run, "execute", lambda self, stages: (executed.append(1), execute(self, stages))[1])

    def times(*overrides: str) -> int:
        executed.clear()
        unlearn("dataset=prompt", *overrides)
        return len(executed)

    assert [times("stages=[fit]"), times("stages=[fit]")] == [1, 0]
    assert [times(), times("stages=[fit]"), times("stages=[report]")] == [1, 0, 0]
    assert [times("evaluator=nudenet"), times()] == [1, 1]
    assert [times("objective=null", "sampler.batch_size=3"), times("sampler.steps=3")] == [0, 1]
    os.utime(next(sd1.rglob("*.safetensors")))
    assert times("sampler.steps=3") == 1, "a file that a setting names has changed"
    (tmp_path / "run" / "report.html").unlink()
    assert [times("sampler.steps=3"), times("sampler.steps=3")] == [1, 0]


def test_a_killed_and_restarted_sweep_gives_the_same_result(unlearn, tmp_path):
    """Killed while the second of two jobs draws, and again in its report."""

    def command(place: str) -> list[str]:
        return [*FEW, "method=none,uce", "evaluator=clip_score", "sampler.batch_size=1",
                f"paths.runs={tmp_path}/{place}/runs", f"paths.store={tmp_path}/{place}/store"]  # fmt: skip

    def sweep(place: str) -> Path:
        unlearn(*command(place))
        return tmp_path / place

    for room, owner, name, k in (("unlearning.sampling.sampler", "Sampler", "draw", 3),
                                 ("unlearning.run", "Run", "report", 1)):  # fmt: skip
        strike = f"import pytest\nfrom tests.run.small import at_call, killed\nfrom {room} import {owner}\n"
        strike += f"at_call(pytest.MonkeyPatch(), {owner}, {name!r}, {k}, killed)"
        assert in_a_process(unlearn.arguments(*command("killed")), strike).wait() == -signal.SIGKILL
        finished = [p.parent for p in (tmp_path / "killed").rglob(".finished")]
        kept = [*(tmp_path / "killed/store").rglob("*.png"), *(folder / "report.html" for folder in finished)]
        before = [path.stat().st_mtime_ns for path in kept]
        assert len(finished) == 1 and len(kept) >= 3
    again, whole = sweep("killed"), sweep("whole")
    assert numbers(again) == numbers(whole) and len(numbers(again)) == 2
    assert [path.stat().st_mtime_ns for path in kept] == before, "nothing is drawn or run again"


def test_two_sweeps_at_once_share_a_store(unlearn, tmp_path):
    command = [*FEW, "method=none,negative_prompt", "dataset.images_per_prompt=9", "evaluator=clip_score"]
    both = [in_a_process(unlearn.arguments(*command, f"paths.runs={tmp_path}/{place}")) for place in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b") and len(numbers(tmp_path / "a")) == 2
    there = list((tmp_path / "store").rglob("*.png"))
    for picture in there:
        Image.open(picture).verify()
    costs = [json.loads(p.read_text()) for place in "ab" for p in (tmp_path / place).rglob("cost.json")]
    spent = sum(stage["denoiser_evaluations"] for cost in costs for stage in cost.values())
    assert spent == 2 * 2 * len(there) == 2 * 2 * 36, "of two steps, guided: every picture was drawn once"
    assert not list(tmp_path.rglob("*partial*"))
