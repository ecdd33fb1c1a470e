"""Side effects of an erasure: what is near the concept, beside it, or means it without its name.

Accuracy gives each role a number of its own:

    accuracy/neighbour      objects most similar to the concept in look or meaning, which should stay, beside Acc_s's
    accuracy/composition    the other object in "a photo of the cat and the dog", which should stay
    accuracy/implicit       descriptions of the concept, which should be erased too (IGMU, arXiv:2506.02761)
    accuracy/language       its name in other languages, likewise (HUB, arXiv:2410.05664)

beside Acc_e, Acc_g and Acc_s. The unedited model's numbers stand beside them: a description that no model understands
says nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from unlearning.concepts import Prompt, UnlearningTask
from unlearning.config.values import Count, Natural, Template
from unlearning.data.objects import emoji_objects
from unlearning.data.openmoji import CIFAR10
from unlearning.data.words import neighbours, paraphrases

NEIGHBOUR, COMPOSITION, IMPLICIT, LANGUAGE = "neighbour", "composition", "implicit", "language"


def emoji_side_effects(
    concept: str | Sequence[str],
    *,
    template: Template = "a photo of the {}",
    images_per_prompt: Count = 10,
    pictures: Natural = 64,
    beside: Count = 3,
) -> UnlearningTask:
    """The task of `emoji_objects`, with prompts for side effects besides.

    A method may not retain by name what is measured: neighbours and the other objects of compositions are left out.

    Args:
        concept: One name or several.
        template: How a name becomes a prompt.
        images_per_prompt: Images generated for each prompt.
        pictures: Forget images, spread over the erased objects, and as many retain images.
        beside: Compositions of each concept: with its neighbours, then with other objects.

    Raises:
        UserError: For a name that is not one of the objects.
    """
    task = emoji_objects(concept, template=template, images_per_prompt=images_per_prompt, pictures=pictures)
    erased = [concept.name for concept in task.erase]
    asked = {prompt.text.casefold() for prompt in task.prompts}
    more = {p.text.casefold(): p for name in erased for p in _prompts(name, erased, template, beside)}
    prompts = tuple(prompt for text, prompt in more.items() if text not in asked)  # some languages share a name
    measured = {prompt.labels["object"] for prompt in prompts}
    retain = tuple(concept for concept in task.retain if concept.name not in measured)
    return replace(task, prompts=(*task.prompts, *prompts), retain=retain)


def _prompts(name: str, erased: Sequence[str], template: str, beside: int) -> Iterator[Prompt]:
    """The prompts for side effects of erasing an object."""
    near = [other for other in neighbours()[name] if other not in erased]
    for other in near:
        yield Prompt(template.format(other), NEIGHBOUR, {"object": other})
    others = [*near, *(other for other in CIFAR10 if other not in (*erased, *near))]
    for other in others[:beside]:
        yield Prompt(template.format(f"{name} and the {other}"), COMPOSITION, {"object": other}, concept=name)
    known = paraphrases().get(name, {})
    texts = {IMPLICIT: known.get("descriptions", ()), LANGUAGE: dict(known.get("languages", {})).values()}
    for role, words in texts.items():
        for word in words:
            yield Prompt(template.format(word), role, {"object": name}, concept=name)
