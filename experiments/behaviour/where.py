"""Where in a prompt the concept sits: python experiments/behaviour/where.py [model=emoji_unet ...]

Of "a photo of the X", the text states of some positions are replaced by those of "a photo of the Y"; the judge says
whether X or Y is drawn. Stable Diffusion, whose text encoder was frozen, hardly uses the padding; models whose encoder
was trained with the denoiser put the meaning there (Padding Tone, Toker et al., NAACL 2025, arXiv:2501.06751).
"""

import argparse

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from unlearning.__main__ import CONF
from unlearning.attacks.witness import pixels
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.comeback import Restored
from unlearning.sampling.sampler import Sampler

PAIRS = (
    ("cat", "ship"),
    ("apple", "clock"),
    ("dog", "house"),
    ("rabbit", "umbrella"),
    ("truck", "flower"),
    ("bird", "key"),
)
POSITIONS = ("word", "end of text", "word and end of text", "padding", "end of text and padding", "all after the word")


def places(name: str, word: int, length: int) -> list[int]:
    """The positions of a part of the prompt whose word is at `word`; the end of the text follows it."""
    return {
        "word": [word],
        "end of text": [word + 1],
        "word and end of text": [word, word + 1],
        "padding": list(range(word + 2, length)),
        "end of text and padding": list(range(word + 1, length)),
        "all after the word": list(range(word, length)),
    }[name]


@torch.inference_mode()
def decided(model: DiffusionModel, sampler: Sampler, judge, name: str, pair: tuple[str, str], images: int) -> list[str]:
    """What is drawn: "first", "second" or "other", for each of the images."""
    prompts = [f"a photo of the {object_}" for object_ in pair]
    first, second = model.encode_prompts(prompts).embeds
    word, same = model.last_token(prompts).tolist()
    if word != same:
        raise ValueError(f"{pair} have different numbers of tokens")
    mixed, where = first.clone(), places(name, word, len(first))
    mixed[where] = second[where]
    batch = Restored([prompts[0]] * images, model.noise(range(images)), [{"states": mixed}] * images)
    names, probabilities = judge(pixels(sampler.sample(model, batch)[0]), "object")
    drawn = [names[i] for i in probabilities.argmax(1).tolist()]
    return [{pair[0]: "first", pair[1]: "second"}.get(one, "other") for one in drawn]


def main(overrides: list[str], images: int) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    model, sampler, judge = instantiate(cfg.model), instantiate(cfg.sampler), instantiate(cfg.judge.classifier)
    print("| states of Y at | draws X | draws Y | neither | N |\n| --- | ---: | ---: | ---: | ---: |")
    for name in POSITIONS:
        drawn = [one for pair in PAIRS for one in decided(model, sampler, judge, name, pair, images)]
        shares = (100 * drawn.count(kind) / len(drawn) for kind in ("first", "second", "other"))
        print(f"| {name} | " + " | ".join(f"{share:.0f} %" for share in shares) + f" | {len(drawn)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("override", nargs="*", help="settings, as for unlearn: model.path=/a/folder sampler.steps=20")
    parser.add_argument("--images", type=int, default=4, help="of each pair")
    options = parser.parse_args()
    main(options.override, options.images)
