"""Compares UCE's edited weights with those of the authors' two scripts, on one model and one concept.

See README.md for how to get the scripts. Only their functions `edit_model` and `UCE` are run.
"""

import argparse
import ast
import copy
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unlearning.data.objects import emoji_objects
from unlearning.methods.uce import TEMPLATES, UCE
from unlearning.models.stable_diffusion import StableDiffusion

AS_IN_2025 = {"positions": "last", "preserve_null": False, "preserve_scale": 1.0}


class _KeepsPrecision(ast.NodeTransformer):
    """Replaces `x.float()` by `x`, so that a script also inverts in float64."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr == "float" else node


def function(script: Path, name: str, dtype: torch.dtype) -> Callable:
    """One function of a script, without running the rest of the script."""
    tree = ast.parse(script.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    tree = tree if dtype == torch.float32 else ast.fix_missing_locations(_KeepsPrecision().visit(tree))
    names = {"torch": torch, "copy": copy, "ast": ast, "time": time, "os": os, "save_file": save_file}
    names |= {"device": "cpu", "torch_dtype": dtype}
    exec(compile(tree, str(script), "exec"), names)
    return names[name]


def edited_2023(edit_model: Callable, pipeline, erase: list[str], anchors: list[str], retain: list[str]) -> dict:
    """The weights that `edit_model` leaves, at what its command line passes by default; the pipeline is edited."""
    kept = ["", *retain]
    scales = {"lamb": 0.5, "erase_scale": 1, "preserve_scale": max(0.1, 1 / len(kept))}
    edit_model(pipeline, erase, anchors, kept, technique="replace", **scales)
    return dict(pipeline.unet.named_parameters())


def edited_2025(uce: Callable, pipeline, erase: list[str], anchors: list[str], retain: list[str]) -> dict:
    """The weights that `UCE` saves, at the defaults of its command line."""
    with tempfile.TemporaryDirectory() as folder:
        uce(pipeline, erase, anchors, retain, 1, 1, 0.5, folder, "edited")
        return load_file(f"{folder}/edited.safetensors")


def relative_difference(base: Mapping[str, Tensor], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """|| ours - theirs || / || ours - base ||, over all edited weights."""
    edit = torch.cat([(w.double() - base[name]).flatten() for name, w in ours.items()])
    difference = torch.cat([(w.double() - theirs[name.removeprefix("unet.")]).flatten() for name, w in ours.items()])
    return (difference.norm() / edit.norm()).item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script_2023", type=Path)
    parser.add_argument("script_2025", type=Path)
    parser.add_argument("--model", default="unlearning/weights/emoji_unet")
    parser.add_argument("--concept", default="cat")
    args = parser.parse_args()
    model, task = StableDiffusion.load(args.model, device="cpu"), emoji_objects(args.concept)
    retain = [concept.name for concept in task.retain]
    one, six = (
        [[template.format(word) for template in templates] for word in (args.concept, task.erase[0].anchor)]
        for templates in (["{}"], TEMPLATES["objects"])
    )
    cases = {
        "2023": ({}, args.script_2023, "edit_model", edited_2023, one),
        "2025": (AS_IN_2025, args.script_2025, "UCE", edited_2025, one),
        "2025, six prompts": (AS_IN_2025 | {"templates": "objects"}, args.script_2025, "UCE", edited_2025, six),
    }
    base = {name: p.double() for name, p in model.named_parameters().items()}
    for case, (settings, script, name, edited, (erase, anchors)) in cases.items():
        ours = UCE(**settings).fit(model, task).weights
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            pipeline = copy.deepcopy(model.pipeline).to(dtype)
            theirs = edited(function(script, name, dtype), pipeline, erase, anchors, retain)
            torch.set_default_dtype(torch.float32)
            print(f"{case}, {dtype}: {relative_difference(base, ours, theirs):.1e}")


if __name__ == "__main__":
    main()
