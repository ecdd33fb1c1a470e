"""Where in a prompt the concept sits: python experiments/behaviour/where.py [model=emoji_unet ...]

Of "a photo of the X", the text states of some positions are replaced by those of "a photo of the Y", or of the empty
prompt; the judge says whether X or Y is drawn. The first asks what decides where two parts of a prompt disagree: in
Stable Diffusion the end of the text, with which it also pads (Yi et al., 2024, arXiv:2405.15330). The second asks what
is needed: a model with a frozen text encoder draws X without the padding, too (Padding Tone, Toker et al., NAACL 2025,
arXiv:2501.06751).
"""

import argparse

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from unlearning.__main__ import CONF
from unlearning.attacks.witness import pixels
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.attack_result import Restored
from unlearning.sampling.sampler import Sampler

PAIRS = (
    ("cat", "ship"),
    ("apple", "clock"),
    ("dog", "house"),
    ("rabbit", "umbrella"),
    ("truck", "flower"),
    ("bird", "key"),
)
POSITIONS = {  # given the position of the prompt's word, which the end of the text follows, and the number of all
    "the word": lambda word, length: [word],
    "the end of the text": lambda word, length: [word + 1],
    "the word and the end": lambda word, length: [word, word + 1],
    "the padding": lambda word, length: [*range(word + 2, length)],
    "the end and the padding": lambda word, length: [*range(word + 1, length)],
    "all from the word on": lambda word, length: [*range(word, length)],
    "the words before the end": lambda word, length: [*range(1, word + 1)],
}
DONORS = ("a photo of the {}", "")


@torch.inference_mode()
def drawn(
    model: DiffusionModel, sampler: Sampler, judge, name: str, donor: str, pair: tuple[str, str], images: int
) -> list[str]:
    """What is drawn: "X", "Y" or "neither", for each of the images."""
    prompt, other = f"a photo of the {pair[0]}", donor.format(pair[1])
    states, donated = model.encode_prompts([prompt, other]).embeds
    word, last = model.last_token([prompt, other]).tolist()
    mixed = states.clone()
    for position in POSITIONS[name](word, len(states)):
        # The end of the text stands at its own position in each prompt
        mixed[position] = donated[last + 1 if position == word + 1 else position]
    batch = Restored([prompt] * images, model.noise(range(images)), [{"states": mixed}] * images)
    names, probabilities = judge(pixels(sampler.sample(model, batch)[0]), "object")
    return [{pair[0]: "X", pair[1]: "Y"}.get(names[i], "neither") for i in probabilities.argmax(1).tolist()]


def main(overrides: list[str], images: int) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    model, sampler, judge = instantiate(cfg.model), instantiate(cfg.sampler), instantiate(cfg.judge.classifier)
    print("| replaced | by those of | draws X | draws Y | neither | N |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for donor in DONORS:
        for name in POSITIONS:
            kinds = [one for pair in PAIRS for one in drawn(model, sampler, judge, name, donor, pair, images)]
            shares = (f"{100 * kinds.count(kind) / len(kinds):.0f} %" for kind in ("X", "Y", "neither"))
            source = f'"{donor.format("Y")}"'
            print(f"| {name} | {source} | " + " | ".join(shares) + f" | {len(kinds)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("override", nargs="*", help="settings, as for unlearn: model.path=/a/folder sampler.steps=20")
    parser.add_argument("--images", type=int, default=4, help="of each pair")
    options = parser.parse_args()
    main(options.override, options.images)
