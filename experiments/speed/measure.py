"""Speed and memory of our code against the published way: python -m experiments.speed.measure [--quick]

Both sides of a comparison alternate in one process (A B A B ...), so that other load affects both. Times are medians
over turns; a ratio is the median of the ratios of each turn. Writes results.json and the tables of README.md; --quick
and --only only print, unless --write is given.
"""

import argparse
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate

from experiments.speed import published
from experiments.speed.subject import EXACT, Watch, config, fit
from unlearning.data.openmoji import CIFAR10
from unlearning.judges.emoji import EmojiJudge
from unlearning.sampling.sampler import Sampler
from unlearning.store.manifest import image_seed
from unlearning.training.batches import seed_of

HERE = Path(__file__).parent
WEIGHTS = HERE.parents[1] / "unlearning" / "weights"
BEGIN, END = "<!-- tables: written by measure.py -->", "<!-- end of the tables -->"
NAMES = ("generation", "judge", "esd", "erasure", "memory", "startup", "images", "demo")


class Bench:
    """Shared by all measurements: the options of the command line, and the models, each loaded once."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.quick, self.device = options, options.quick, options.device
        self._models: dict = {}

    def config(self, *overrides: str):
        """The config of the command line, with a new output folder."""
        own = [f"model.path={self.options.model}", f"model.device={self.device}", f"concept={self.options.concept}"]
        own += [
            f"trainer.accelerator={torch.device(self.device).type}",
            "method=esd_x",
            *overrides,
            *self.options.override,
        ]
        return config(Path(tempfile.mkdtemp(prefix="speed-")), *own)

    def model(self, dtype: str = "float32"):
        if dtype not in self._models:
            self._models[dtype] = instantiate(self.config(f"model.dtype={dtype}").model)
        return self._models[dtype]

    def turns(self, sides: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
        """Seconds of each side in each of `count` turns, after one turn as a warm-up."""
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(count + 1):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                self.synchronize()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        return seconds

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def ratio(a: list[float], b: list[float]) -> float:
    """The median of a / b over turns."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def wanted(images_per_prompt: int, words=CIFAR10) -> tuple[list[str], list[int], list[str]]:
    """Prompts, seeds and labels."""
    rows = [(f"a photo of the {word}", i, word) for i in range(images_per_prompt) for word in words]
    return [text for text, _, _ in rows], [image_seed(0, text, i) for text, i, _ in rows], [w for _, _, w in rows]


def share(judge: EmojiJudge, images: torch.Tensor, right: list[str]) -> float:
    """The judge's accuracy in percent on images (B, 3, H, W) in [0, 1]."""
    names, probabilities = judge((images * 255).round().byte().permute(0, 2, 3, 1).cpu(), "object")
    return 100 * statistics.mean(names[i] == r for i, r in zip(probabilities.argmax(1).tolist(), right, strict=True))


def sample(sampler: Sampler, model, prompts: list[str], seeds: list[int]) -> torch.Tensor:
    calls = [slice(i, i + sampler.batch_size) for i in range(0, len(prompts), sampler.batch_size)]
    return torch.cat([sampler(model, prompts[i], seeds[i]) for i in calls])


def generation(bench: Bench) -> list[dict]:
    """N images: one call of our sampler, against diffusers' pipeline with the same batch and with one image a call."""
    count, steps = (4, 10) if bench.quick else (16, 50)
    model, half = bench.model(), bench.model("bfloat16")
    prompts, seeds, _ = (rows[:count] for rows in wanted(2))
    sampler, noise, pictures = Sampler(steps=steps, batch_size=count), model.noise(seeds), {}
    pipes = {"float32": published.pipeline(model), "bfloat16": published.pipeline(half)}

    def keep(name: str, draw: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return lambda: pictures.update({name: draw()})

    settings = {"num_inference_steps": steps, "guidance_scale": 7.5}

    def theirs(dtype: str, batch: int) -> Callable[[], torch.Tensor]:
        return lambda: published.draw(pipes[dtype], prompts, batch, latents=noise, **settings)

    draws = {
        "ours": lambda: sampler(model, prompts, seeds),
        "diffusers, same batch": theirs("float32", count),
        "diffusers, one a call": theirs("float32", 1),
        "ours, bf16": lambda: sampler(half, prompts, seeds),
        "diffusers, same batch, bf16": theirs("bfloat16", count),
    }
    sides = {name: keep(name, draw) for name, draw in draws.items()}
    seconds = bench.turns(sides, 1 if bench.quick else 3)
    rows = []
    for ours, theirs, target in (
        ("ours", "diffusers, same batch", "≥ 1.0"),
        ("ours", "diffusers, one a call", "≥ 1.8"),
        ("ours, bf16", "diffusers, one a call", "≥ 3"),
        ("ours, bf16", "diffusers, same batch, bf16", ""),
    ):
        difference = (pictures[ours] - pictures[theirs]).abs().max().item()
        rows.append({
            "comparison": f"{ours} : {theirs}", "pictures": count, "steps": steps,
            "ours (s)": statistics.median(seconds[ours]), "theirs (s)": statistics.median(seconds[theirs]),
            "times faster": ratio(seconds[theirs], seconds[ours]), "target": target,
            "largest difference": difference,
        })  # fmt: skip
    return rows


def judged(bench: Bench) -> list[dict]:
    """Accuracy on images of the ten CIFAR-10 objects, fp32 and bf16, from the same seeds."""
    prompts, seeds, right = wanted(1 if bench.quick else 10)
    sampler, judge = Sampler(steps=10 if bench.quick else 50), EmojiJudge(bench.options.judge)
    accuracy = {
        d: share(judge, sample(sampler, bench.model(d), prompts, seeds), right) for d in ("float32", "bfloat16")
    }
    error = statistics.mean((a * (100 - a) / len(right)) ** 0.5 for a in accuracy.values())
    return [{"dtype": d, "pictures": len(right), "accuracy (%)": a, "± binomial": error} for d, a in accuracy.items()]


def esd(bench: Bench) -> list[dict]:
    """An iteration of ESD-x with the papers' trajectories: ours (with Lightning, checkpoints and CSV) : published."""
    iterations, turns = (4, 2) if bench.quick else (16, 5)
    model = bench.model()
    seconds, worst = {"ours": [], "published": []}, 0.0
    for turn in range(turns):
        cfg, watch = bench.config(*EXACT, f"method.iterations={iterations}"), Watch()
        torch.manual_seed(turn)
        fit(cfg, model, watch)
        plain, times, losses = plain_esd(cfg, model), [], []
        for loss in plain.iterate([seed_of(turn, 0, k, 0) for k in range(iterations)]):
            losses.append(loss)
            times.append(time.perf_counter())
        for name, ends in (("ours", watch.times), ("published", times)):  # the first iteration is the warm-up
            seconds[name].append((ends[-1] - ends[0]) / (iterations - 1))
        worst = max(worst, *(abs(a - b) / b for a, b in zip(watch.losses, losses, strict=True)))
    if worst > 1e-3:
        raise AssertionError(f"ours and the published loop differ: a loss by {worst:.1e} of itself")
    return [{
        "iterations": turns * iterations, "ours (s)": statistics.median(seconds["ours"]),
        "published (s)": statistics.median(seconds["published"]),
        "times faster": ratio(seconds["published"], seconds["ours"]), "target": "≥ 1.0",
        "largest relative difference of a loss": worst,
    }]  # fmt: skip


def plain_esd(cfg, model) -> published.ESD:
    trajectory = {"steps": cfg.method.steps, "guidance_scale": cfg.method.guidance_scale}
    prompt = instantiate(cfg.dataset).prompt(cfg.concept)
    trained = published.weights(cfg.method.student.parameters)
    return published.ESD(model, prompt, trained=trained, lr=cfg.method.optimizer.lr, **trajectory)


class Erased(pl.Callback):
    """Every `every` iterations, generates images of the erased concept for the judge; this time does not count.

    Stops the fit once two evaluations in a row are at most 10 %: `seconds` and `step` are the first one's.
    """

    def __init__(self, every: int, score: Callable[[object], float]):
        self.every, self.score = every, score
        self.curve: list[tuple[int, float, float]] = []  # step, seconds, Acc_e in percent
        self.spent = 0.0

    def on_train_start(self, trainer, module):
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step % self.every:
            return
        self.spent += time.perf_counter() - self.start
        with torch.random.fork_rng(), torch.no_grad():
            self.curve.append((trainer.global_step, self.spent, self.score(module.student)))
        trainer.should_stop = len(self.curve) > 1 and max(acc for *_, acc in self.curve[-2:]) <= 10
        self.start = time.perf_counter()

    def reached(self) -> tuple[int, float] | None:
        """The first step, and its seconds, from which on Acc_e is at most 10 %."""
        below = [(step, seconds) for i, (step, seconds, _) in enumerate(self.curve)
                 if all(acc <= 10 for *_, acc in self.curve[i:])]  # fmt: skip
        return below[0] if below else None


FITS = {  # the papers' trajectories; the same with reuse; and the batch that the embedded world's settings take
    "exact": EXACT,
    "reuse": ("method.trajectory=reuse", "method.batch_size=1"),
    "reuse, batched": ("method.trajectory=reuse",),
}


def erasure(bench: Bench) -> list[dict]:
    """Training time until at most 10 % of 40 images show the concept: trajectory=exact against trajectory=reuse."""
    model, judge = bench.model(), EmojiJudge(bench.options.judge)
    prompts, seeds, right = wanted(4 if bench.quick else 40, [bench.options.concept])
    sampler = Sampler(steps=5 if bench.quick else 25, batch_size=20)
    runs: dict[str, list[Erased]] = {name: [] for name in FITS}
    for seed in range(1 if bench.quick else 3):
        for name, overrides in FITS.items():
            cfg = bench.config(*overrides, f"method.iterations={16 if bench.quick else 400}")
            pl.seed_everything(seed, verbose=False)
            runs[name].append(Erased(8, lambda m: share(judge, sample(sampler, m, prompts, seeds), right)))
            fit(cfg, model, runs[name][-1])
            print(name, seed, runs[name][-1].curve, flush=True)
    rows = []
    for name, watches in runs.items():
        done = [reached for w in watches if (reached := w.reached())]
        seconds = [s for _, s in done]
        slow = [w.reached()[1] for w in runs["exact"]] if all(w.reached() for w in runs["exact"]) else []
        rows.append({
            "lr": cfg.method.optimizer.lr, "trajectory": name, "seeds": len(watches),
            "points an iteration": bench.config(*FITS[name]).method.batch_size,
            "s / iteration": statistics.median(w.curve[-1][1] / w.curve[-1][0] for w in watches if w.curve),
            "reached by": f"{len(done)} of {len(watches)}", "iterations": mean_and_error([step for step, _ in done]),
            "seconds": mean_and_error(seconds),
            "times faster": statistics.mean(slow) / statistics.mean(seconds) if slow and seconds else None,
            "target": "≥ 8" if name == "reuse" else "", "curves": [w.curve for w in watches],
        })  # fmt: skip
    return rows


def mean_and_error(values: list[float]) -> str:
    if not values:
        return "–"
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.1f} ± {error:.1f}"


def memory(bench: Bench) -> list[dict]:
    """Peak memory of two iterations of ESD-x, each side in a process of its own (memory.py)."""
    rows = []
    for size, label in (("model", Path(bench.options.model).name), ("sd14", "SD1.4's size, random")):
        if size == "sd14" and bench.quick:
            continue
        sides = {}
        for side in ("ours", "published"):
            command = [sys.executable, "-m", "experiments.speed.memory", side, size, bench.options.model, bench.device]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parents[1])
            sides[side] = json.loads(done.stdout.strip().splitlines()[-1])
        for what, target in (("peak", "≤ 0.7"), ("growth", ""), ("exact", "≤ 0.7")):
            ours, theirs = sides["ours"][what] / 2**20, sides["published"][what] / 2**20
            rows.append({
                "model": label, "what": WHAT[what], "baseline (MiB)": sides["ours"]["baseline"] / 2**20,
                "ours (MiB)": ours, "published (MiB)": theirs, "ours / published": ours / theirs, "target": target,
            })  # fmt: skip
    return rows


WHAT = {
    "peak": "peak of the process",
    "growth": "peak less the baseline (imports, model loaded)",
    "exact": "weights, gradients, optimizer, counted",
}


def startup(bench: Bench) -> list[dict]:
    """The command line in a process of its own: --help until its answer, a fit until its only step is saved."""
    folder = Path(tempfile.mkdtemp(prefix="speed-"))
    fit = ["concept=cat", "method=esd_x", "method.iterations=1", "stages=[fit]", f"model.path={bench.options.model}"]
    rows = []
    for label, target, arguments in (("unlearn --help", 2, ["--help"]), (f"unlearn {' '.join(fit[1:4])}", 15, fit)):
        times = []
        for turn in range(1 if bench.quick else 3):
            runs = folder / str(turn)
            own = [] if arguments == ["--help"] else [*bench.options.override, f"paths.runs={runs}"]
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "unlearning", *arguments, *own], cwd=HERE.parents[1],
                env={**os.environ, "WANDB_MODE": "offline"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            while process.poll() is None and not any(runs.rglob("erasure")):
                time.sleep(0.02)
            times.append(time.perf_counter() - start)
            if process.wait():
                raise RuntimeError(f"{label} failed: exit code {process.returncode}")
        rows.append({"command": label, "seconds": statistics.median(times), "target": f"≤ {target}"})
    return rows


def run(bench: Bench, folder: Path, *settings: str) -> None:
    """`unlearn settings` in a process of its own, whose images and results go below `folder`."""
    own = [f"paths.store={folder / 'store'}", f"hydra.run.dir={folder / 'run'}", f"model.path={bench.options.model}"]
    subprocess.run(
        [sys.executable, "-m", "unlearning", *settings, *own, *bench.options.override], cwd=HERE.parents[1],
        env={**os.environ, "WANDB_MODE": "offline"}, check=True, capture_output=True,
    )  # fmt: skip


def images(bench: Bench) -> list[dict]:
    """Peak memory of runs that generate and evaluate few images and many: it does not grow with their number."""
    rows = []
    for each in (1, 2) if bench.quick else (8, 77):  # of each of 13 prompts
        folder = Path(tempfile.mkdtemp(prefix="speed-"))
        run(bench, folder, "concept=cat", "method=none", "sampler.steps=1", f"dataset.images_per_prompt={each}",
            "evaluator=[accuracy,fid,clip_score]", "stages=[fit,generate,evaluate]", "logger=csv")  # fmt: skip
        drawn = sum(1 for _ in (folder / "store" / "images").rglob("*.png"))
        spent = json.loads((folder / "run" / "cost.json").read_text())["generate base"]
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        rows.append({
            "images": drawn, "generation (s)": spent["seconds"], "its peak (MiB)": spent["peak_memory"] / 2**20,
            "peak of this run and those above (MiB)": largest / 2**20,
        })  # fmt: skip
    return rows


def demo(bench: Bench) -> list[dict]:
    """The command of `make demo`, after the installation, in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="speed-"))
    few = ["dataset.images_per_prompt=1"] if bench.quick else []
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run(bench, folder, "concept=cat", "method=uce", "sampler.steps=20", *few)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    stages = {name: spent["seconds"] for name, spent in json.loads((folder / "run" / "cost.json").read_text()).items()}
    stages["imports, loading, evaluation, report"] = seconds - sum(stages.values())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows = [{"stage": name, "seconds": spent, "share (%)": 100 * spent / seconds} for name, spent in stages.items()]
    rows.append({"stage": "all", "seconds": seconds, "share (%)": 100.0, "CPU seconds": cpu, "target (s)": "≤ 150"})
    return rows


MEASURES = dict(zip(NAMES, (generation, judged, esd, erasure, memory, startup, images, demo), strict=True))


def machine(device: str) -> str:
    info = Path("/proc/cpuinfo")
    models = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    name = models[0] if models else platform.processor()
    card = f", {torch.cuda.get_device_name()}" if device != "cpu" else ""
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{card}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    )


def render(results: dict) -> str:
    """Markdown: a table for each measurement, below the first line of its docstring."""

    def cell(value) -> str:
        if value is None:
            return "–"
        if isinstance(value, float):
            return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        return str(value)

    parts = [f"Machine: {results['machine']}."]
    for name, rows in results["tables"].items():
        text = MEASURES[name].__doc__.splitlines()[0]
        columns = [c for c in dict.fromkeys(c for row in rows for c in row) if c != "curves"]
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows]
        parts.append(f"**{name}.** {text}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("override", nargs="*", help="settings, as for unlearn: method.optimizer.lr=1e-4")
    parser.add_argument("--quick", action="store_true", help="takes a minute, to see that everything works")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--write", action="store_true", help="always write results.json and README.md")
    parser.add_argument("--model", default=str(WEIGHTS / "emoji_unet"))
    parser.add_argument("--judge", default=str(WEIGHTS / "judge" / "classifier"))
    parser.add_argument("--concept", default="cat")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for noisy in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(noisy).setLevel("ERROR")
    diffusers.utils.logging.disable_progress_bar()
    bench, file = Bench(options), HERE / "results.json"
    whole = not options.quick and tuple(options.only) == NAMES
    old = json.loads(file.read_text())["tables"] if file.exists() and not whole else {}
    tables = {}
    for name in options.only:
        start = time.perf_counter()
        tables[name] = MEASURES[name](bench)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    results = {"machine": machine(bench.device), "tables": tables}
    print(render(results))
    if whole or options.write:
        merged = {name: {**old, **tables}[name] for name in NAMES if name in {**old, **tables}}
        results["tables"] = merged
        file.write_text(json.dumps(results, indent=1) + "\n")
        readme = HERE / "README.md"
        before, after = readme.read_text().split(BEGIN)[0], readme.read_text().split(END)[1]
        readme.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
