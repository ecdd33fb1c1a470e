"""One scrubber, solved with several weights of the other words: python experiments/scrubber/solve.py concept=cat seed=0

It trains once, and writes files of weights below outputs/solve/CONCEPT-SEED/: trained.safetensors has the scrubber's
own, and there is one for each s. `unlearn method=weights` measures them:

    unlearn -m experiment=baselines concept=cat seed=0 method=weights method.path=A,B,C

Arguments are overrides of the configuration; --scales are the values of s.
"""

import argparse
import json
import time
from pathlib import Path

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file

from unlearning.__main__ import CONF
from unlearning.config import instances
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.methods.closed_form import projections
from unlearning.methods.scrub_solve import ScrubSolve
from unlearning.methods.scrubber import Scrubber


class Trained:
    """A scrubber that was trained before.

    Args:
        scrubber: The one that was.
        patch: What it has led to.
    """

    def __init__(self, scrubber: Scrubber, patch: WeightPatch):
        self.figures, self.rows, self.patch = scrubber.figures, scrubber.rows, patch
        self.moving, self.conditioning = scrubber.moving, scrubber.conditioning

    def fit(self, *_: object) -> WeightPatch:
        return self.patch


def main(overrides: list[str], scales: list[float], to: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = ["method=scrub_solve", "logger=none", f"paths.output_dir={to}", *overrides]
        cfg = compose("config", overrides=chosen)
    model, task = instantiate(cfg.model), instantiate(cfg.dataset)
    trainers = instances.trainers(OmegaConf.to_container(cfg.method), instantiate(cfg.trainer))
    method: ScrubSolve = instantiate(cfg.method, **trainers)
    pl.seed_everything(cfg.seed, verbose=False)
    start = time.perf_counter()
    patch = method.scrubber.fit(model, task)
    print(f"trained in {time.perf_counter() - start:.0f} s; words: {', '.join(method.scrubber.rows.words)}", flush=True)
    folder = to / f"{cfg.concept}-{cfg.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(patch.weights, folder / "trained.safetensors")
    (folder / "words.json").write_text(json.dumps({"words": method.scrubber.rows.words}))
    given, W = Trained(method.scrubber, patch), {name: m.weight.detach() for name, m in projections(model).items()}
    for s in scales:
        start = time.perf_counter()
        solved = ScrubSolve(scrubber=given, preserve_scale=s, lamb=method.lamb, retained=method.retained)
        weights = solved.fit(model, task).weights
        seconds = time.perf_counter() - start
        kept = sum(float((weights[f"{n}.weight"] - w).square().sum()) for n, w in W.items())
        whole = sum(float((patch.weights[f"{n}.weight"] - w).square().sum()) for n, w in W.items())
        print(f"s = {s:g}: {seconds:.1f} s, {(kept / whole) ** 0.5:.3f} of the trained change", flush=True)
        save_file(weights, folder / f"s{s:g}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.001, 0.01, 0.1, 1.0])
    parser.add_argument("--to", type=Path, default=Path("outputs/solve"))
    main(**vars(parser.parse_args()))
