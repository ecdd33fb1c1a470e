"""Measures the parts of UnGuide: python experiments/unguide/measure.py [overrides ...]

- trajectories: time of a fit and H_o, with trajectory=exact and trajectory=reuse, both with one point an iteration;
- analysis: calls of the denoiser for D(p) of every prompt, in batches and one by one;
- branches: time of a guided step, with both models' predictions in one call of the denoiser and in two;
- closeness: distance of the images of unrelated prompts to the base model's, for the adapter alone and for UnGuidance.

The sides of a comparison alternate in one process. Writes the tables of README.md, except with --only, which prints.
"""

import argparse
import logging
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from unlearning.__main__ import CONF
from unlearning.concepts import ERASE, RETAIN, ROLES, SYNONYM
from unlearning.evaluators.accuracy import h_o
from unlearning.sampling.guidance import classifier_free
from unlearning.sampling.sampler import Sampler
from unlearning.sampling.unguidance import blended
from unlearning.store.manifest import image_seed

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: written by measure.py -->", "<!-- end of the tables -->"
SAMPLER, IMAGES = Sampler(steps=25, batch_size=20), 8  # images of each prompt


class Bench:
    def __init__(self, concept: str, overrides: list[str]):
        self.concept, self.overrides = concept, overrides
        cfg = self.config()
        self.model, self.task, self.judge = instantiate(cfg.model), instantiate(cfg.dataset), instantiate(cfg.judge)
        self.erasures = {}

    def config(self, *more: str):
        folder = tempfile.mkdtemp(prefix="unguide-")
        quiet = ["logger=none", "trainer.callbacks=[]", "+trainer.enable_checkpointing=false", "+trainer.logger=false"]
        own = [f"paths.output_dir={folder}", "title=unguide", "method=unguide", f"concept={self.concept}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(
                "config", overrides=[*quiet, "trainer.enable_progress_bar=false", *own, *self.overrides, *more]
            )

    def fit(self, seed: int, *more: str):
        """The erasure, and the seconds of training without the calibration of the threshold."""
        cfg, watch = self.config(*more), pl.callbacks.Timer()
        pl.seed_everything(seed, verbose=False)
        method = instantiate(cfg.method, trainer=partial(instantiate(cfg.trainer), callbacks=[watch]))
        return method.fit(self.model, self.task), watch.time_elapsed("train")

    def erasure(self):
        """The erasure of the first seed, with the settings of the config."""
        if 0 not in self.erasures:
            self.erasures[0], _ = self.fit(0)
        return self.erasures[0]

    def drawn(self, role: str) -> tuple[torch.Tensor, list[str]]:
        """Images of the prompts of a role, and their labels."""
        rows = [(p.text, i, p.labels["object"]) for p in self.task.prompts if p.role == role for i in range(IMAGES)]
        parts = [rows[i : i + SAMPLER.batch_size] for i in range(0, len(rows), SAMPLER.batch_size)]
        images = [
            SAMPLER(self.model, [t for t, *_ in part], [image_seed(0, t, i) for t, i, _ in part]) for part in parts
        ]
        return torch.cat(images), [label for *_, label in rows]

    def accuracy(self, images: torch.Tensor, right: list[str]) -> float:
        names, probabilities = self.judge.classifier((images * 255).round().byte().permute(0, 2, 3, 1), "object")
        answers = [names[i] for i in probabilities.argmax(1).tolist()]
        return 100 * statistics.mean(a == b for a, b in zip(answers, right, strict=True))


def mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def trajectories(bench: Bench) -> list[dict]:
    """A fit with fresh and with reused trajectories: equal settings, one point an iteration, in alternation."""
    seconds: dict[str, list[float]] = {"exact": [], "reuse": []}
    scores: dict[str, list[float]] = {"exact": [], "reuse": []}
    for seed in range(3):
        for kind in seconds:
            erasure, spent = bench.fit(seed, f"method.trajectory={kind}", "method.batch_size=1")
            with erasure.applied_to(bench.model):
                score = h_o(*(bench.accuracy(*bench.drawn(role)) for role in (ERASE, RETAIN, SYNONYM)))
            seconds[kind].append(spent)
            scores[kind].append(score)
    faster = statistics.mean(seconds["exact"]) / statistics.mean(seconds["reuse"])
    return [
        {"trajectory": kind, "seeds": 3, "training (s)": mean(seconds[kind]), "H_o": mean(scores[kind]),
         "times faster": f"{faster:.1f}" if kind == "reuse" else "", "target": "≥ 8" if kind == "reuse" else ""}
        for kind in seconds
    ]  # fmt: skip


def analysis(bench: Bench) -> list[dict]:
    """D of every prompt of the task and of "", ten repeats."""
    prompts, model, calls = ["", *(p.text for p in bench.task.prompts)], bench.model, []
    rows = []
    with bench.erasure().applied_to(model):
        rule, adapter = model.guidance, model.guidance.adapter
        hook = model.denoiser.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))

        def counted(label: str, ask) -> torch.Tensor:
            calls.clear()
            start = time.perf_counter()
            D = ask()
            spent = time.perf_counter() - start
            rows.append({"": label, "calls": len(calls), "latents": sum(calls), "seconds": f"{spent:.1f}"})
            return D

        def one(prompt: str, repeat: int) -> float:
            alone = replace(rule, repeats=1, seed=rule.seed + repeat)
            alone.summands(model, adapter, model.encode_prompts([""]), 7.5)  # the repository computes D("") every time
            return float(alone.summands(model, adapter, model.encode_prompts([prompt]), 7.5))

        ours = counted("batched", lambda: rule.summands(model, adapter, model.encode_prompts(prompts), 7.5).mean(1))
        one_by_one = lambda: torch.tensor([statistics.mean(one(p, r) for r in range(rule.repeats)) for p in prompts])  # noqa: E731
        theirs = counted("one by one", one_by_one)
        hook.remove()
    worst = ((ours - theirs).abs() / theirs).max().item()
    rows[0] |= {"share of the calls": f"{rows[0]['calls'] / rows[1]['calls']:.3f}", "target": "≤ 0.2",
                "largest relative difference": f"{worst:.1e}"}  # fmt: skip
    return [rows[0], {**dict.fromkeys(rows[0], ""), **rows[1]}]


def in_two_calls(model, adapter: str, w: torch.Tensor, x_t, t, c, null, scale: float) -> torch.Tensor:
    """A step of UnGuidance in two calls of the denoiser, with and without the adapter."""
    base = classifier_free(model.without(adapter), x_t, t, c, null, scale)
    unlearned = classifier_free(model, x_t, t, c, null, scale)
    w = w.reshape(-1, 1, 1, 1)
    return w * base + (1 - w) * unlearned


def branches(bench: Bench) -> list[dict]:
    """Time of a step, median of 15 turns."""
    model, t, rows = bench.model, torch.tensor(500), []
    with bench.erasure().applied_to(model), torch.no_grad():
        adapter = model.guidance.adapter
        for batch in (1, 16):
            x_t, w = model.noise(range(batch)), torch.tensor([-1.0, 2.0] * batch)[:batch]
            c = model.encode_prompts(["a photo of the dog"]).expand(batch)
            null = model.encode_prompts([""])
            sides = {
                "one mixed batch": lambda: blended(model, adapter, w, x_t, t, c, null, 7.5),  # noqa: B023
                "two calls": lambda: in_two_calls(model, adapter, w, x_t, t, c, null, 7.5),  # noqa: B023
                "classifier-free guidance": lambda: classifier_free(model, x_t, t, c, null, 7.5),  # noqa: B023
            }
            torch.testing.assert_close(sides["two calls"](), sides["one mixed batch"](), atol=1e-2, rtol=1e-2)
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(15):
                for name, side in sides.items():
                    start = time.perf_counter()
                    side()
                    seconds[name].append(time.perf_counter() - start)
            rows.append(
                {"batch": batch, **{f"{n} (ms)": f"{1000 * statistics.median(s):.0f}" for n, s in seconds.items()}}
            )
    return rows


def closeness(bench: Bench) -> list[dict]:
    """Mean distance of a pixel's colour, of 255, over the images of the retained prompts, and accuracies."""
    base, _ = bench.drawn(RETAIN)
    rows, erasure = [], bench.erasure()
    for label, w in {
        "the adapter alone": (0.0, 0.0),
        "UnGuidance": (erasure.guidance.w_1, erasure.guidance.w_2),
    }.items():
        with replace(erasure, guidance=replace(erasure.guidance, w_1=w[0], w_2=w[1])).applied_to(bench.model):
            drawn = {role: bench.drawn(role) for role in ROLES}
        distance = 255 * (drawn[RETAIN][0] - base).abs().mean()
        row = {"": label, "w_1, w_2": f"{w[0]:g}, {w[1]:g}", "pixel distance": f"{distance:.2f}"}
        names = zip(("Acc_e", "Acc_g", "Acc_s"), drawn.values(), strict=True)
        rows.append(row | {name: f"{bench.accuracy(*images):.1f}" for name, images in names})
    return rows


MEASURES = {measure.__name__: measure for measure in (trajectories, analysis, branches, closeness)}


def render(tables: dict[str, list[dict]]) -> str:
    parts = []
    for name, rows in tables.items():
        lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        lines += ["| " + " | ".join(str(row[c]) for c in rows[0]) + " |" for row in rows]
        parts.append(f"**{name}.** {MEASURES[name].__doc__}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("override", nargs="*", help="settings, as for unlearn: sampler.steps=20")
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel("ERROR")
    bench, tables = Bench(options.concept, options.override), {}
    for name in options.only:
        tables[name] = MEASURES[name](bench)
        print(render({name: tables[name]}), flush=True)
    if options.only == list(MEASURES):
        readme = HERE / "README.md"
        before, after = readme.read_text().split(BEGIN)[0], readme.read_text().split(END)[1]
        readme.write_text(f"{before}{BEGIN}\n{render(tables)}\n{END}{after}")


if __name__ == "__main__":
    main()
