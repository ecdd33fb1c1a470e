"""Inputs of attacks in tests: two images of a concept, and the tools to run an attack on a tiny model."""

from pathlib import Path

import torch

from unlearning.concepts import ERASE, Concept, Prompt, UnlearningTask
from unlearning.erasures.composed import composed
from unlearning.sampling.attack_result import AttackResult
from unlearning.store.manifest import manifest

PROMPTS = (Prompt("a photo of the q", ERASE, {"object": "cat"}), Prompt("a q", ERASE, {"object": "cat"}))
TASK = UnlearningTask(erase=(Concept("q"),), prompts=PROMPTS)


def rows(task: UnlearningTask = TASK):
    return [row for row in manifest(Path("images"), task, 0) if row.role == ERASE]


def found_by(attack, model, erasure=None, task: UnlearningTask = TASK, targets=None, seed: int = 0):
    """The result of an attack on a model, or on what an erasure makes of it."""
    torch.manual_seed(seed)
    targets = targets or rows(task)
    observed = attack.observe(model, task, targets)
    if isinstance(observed, AttackResult):
        return observed
    with composed(*([erasure] if erasure else [])).applied_to(model):
        return attack.find(model, task, targets, observed)
