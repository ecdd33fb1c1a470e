"""UnlearnCanvas (Zhang et al., NeurIPS 2024): fifty styles by twenty objects; some of either are erased.

It needs a Stable Diffusion 1.5 that was fine-tuned on the dataset: no other model knows the styles by these names. The
paper samples with 100 steps at guidance scale 9. UA, IRA and CRA use the benchmark's two classifiers
(judge=unlearncanvas).
"""

from collections.abc import Sequence

from unlearning.concepts import ERASE, RETAIN, Concept, Kind, Prompt, UnlearningTask, concept_names
from unlearning.config.values import Count, Seed, StyledTemplate
from unlearning.data.objects import known
from unlearning.errors import UserError

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
    concept: str | Sequence[str],
    *,
    seeds: Sequence[Seed] = (188, 288, 588, 688, 888),
    template: StyledTemplate = "A {object} image in {style} style.",
    images_per_prompt: Count = 1,
) -> UnlearningTask:
    """Erases one or several styles, or one or several objects. The evaluation prompts every object in every style.

    The first of a prompt's labels is of the erased kind, which UA and IRA measure. CRA measures the other one.

    Args:
        concept: Names of styles or of objects. A blank may replace "_".
        seeds: The seeds of each prompt.
        template: The prompt for an `{object}` in a `{style}`.
        images_per_prompt: For each of the seeds. The first image has the seed, the next one the seed plus one, ...

    Raises:
        UserError: For a name that is neither a style nor an object, or for both kinds at once.
    """
    kind_of: dict[str, Kind] = {**{name: "style" for name in STYLES}, **{name: "object" for name in OBJECTS}}
    names = (name.replace(" ", "_") for name in concept_names(concept))
    erased = [known(name, list(kind_of), "style or object of UnlearnCanvas") for name in names]
    kind, *mixed = dict.fromkeys(kind_of[name] for name in erased)
    if mixed:
        raise UserError(f"UnlearnCanvas erases styles or objects, not both at once: concept=[{','.join(erased)}].")

    def named(name: str) -> str:
        return f"{name.replace('_', ' ')} style" if kind == "style" else name

    def prompt(style: str, thing: str, seed: int) -> Prompt:
        labels = {"style": style, "object": thing} if kind == "style" else {"object": thing, "style": style}
        text = template.format(object=thing, style=style.replace("_", " "))
        role, of = (ERASE, named(labels[kind])) if labels[kind] in erased else (RETAIN, "")
        return Prompt(text, role, labels, seed=seed, concept=of)

    return UnlearningTask(
        erase=tuple(Concept(named(name)) for name in erased),
        retain=tuple(Concept(named(name)) for name in kind_of if kind_of[name] == kind and name not in erased),
        kind=kind,
        template="An image in {}." if kind == "style" else "A {} image.",
        prompts=tuple(prompt(style, thing, seed) for style in STYLES for thing in OBJECTS for seed in seeds),
        images_per_prompt=images_per_prompt,
    )
