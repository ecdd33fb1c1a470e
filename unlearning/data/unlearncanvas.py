"""UnlearnCanvas (Zhang et al., NeurIPS 2024): fifty styles by twenty objects, one of either erased.

For a Stable Diffusion 1.5 that was fine-tuned on the data set, since no other knows its styles by these names; the
paper samples 100 steps at guidance 9. UA, IRA and CRA are by the benchmark's two classifiers (judge=unlearncanvas).
"""

from collections.abc import Sequence

from unlearning.concepts import ERASE, RETAIN, Concept, Prompt, UnlearningTask
from unlearning.data.objects import known

STYLES = (
    *("Abstractionism", "Artist_Sketch", "Blossom_Season", "Bricks", "Byzantine", "Cartoon", "Cold_Warm"),
    *("Color_Fantasy", "Comic_Etch", "Crayon", "Cubism", "Dadaism", "Dapple", "Defoliation", "Early_Autumn"),
    *("Expressionism", "Fauvism", "French", "Glowing_Sunset", "Gorgeous_Love", "Greenfield", "Impressionism"),
    *("Ink_Art", "Joy", "Liquid_Dreams", "Magic_Cube", "Meta_Physics", "Meteor_Shower", "Monet", "Mosaic"),
    *("Neon_Lines", "On_Fire", "Pastel", "Pencil_Drawing", "Picasso", "Pop_Art", "Red_Blue_Ink", "Rust", "Sketch"),
    *("Sponge_Dabbed", "Structuralism", "Superstring", "Surrealism", "Ukiyoe", "Van_Gogh", "Vibrant_Flow"),
    *("Warm_Love", "Warm_Smear", "Watercolor", "Winter"),
)
OBJECTS = (
    *("Architectures", "Bears", "Birds", "Butterfly", "Cats", "Dogs", "Fishes", "Flame", "Flowers", "Frogs"),
    *("Horses", "Human", "Jellyfish", "Rabbits", "Sandwiches", "Sea", "Statues", "Towers", "Trees", "Waterfalls"),
)


def unlearncanvas(
    concept: str,
    *,
    seeds: Sequence[int] = (188, 288, 588, 688, 888),
    template: str = "A {object} image in {style} style.",
    images_per_prompt: int = 1,
) -> UnlearningTask:
    """Erases a style or an object, and asks for every object in every style.

    The first of a prompt's labels is of the kind that is erased: what UA and IRA ask about. CRA asks about the other.

    Args:
        seeds: Those that each prompt is drawn with.
        images_per_prompt: With each of the seeds: the first with it, the next with that and one, and so on.
    """
    known(concept := concept.replace(" ", "_"), (*STYLES, *OBJECTS), "style or object of UnlearnCanvas")
    erased = "style" if concept in STYLES else "object"

    def prompt(style: str, thing: str, seed: int) -> Prompt:
        labels = {"style": style, "object": thing} if erased == "style" else {"object": thing, "style": style}
        text = template.format(object=thing, style=style.replace("_", " "))
        return Prompt(text, ERASE if labels[erased] == concept else RETAIN, labels, seed=seed)

    def named(name: str) -> Concept:
        return Concept(f"{name.replace('_', ' ')} style" if erased == "style" else name)

    return UnlearningTask(
        erase=(named(concept),),
        retain=tuple(named(name) for name in (STYLES if erased == "style" else OBJECTS) if name != concept),
        template="An image in {}." if erased == "style" else "A {} image.",
        prompts=tuple(prompt(style, thing, seed) for style in STYLES for thing in OBJECTS for seed in seeds),
        images_per_prompt=images_per_prompt,
    )
