"""A concept in free text, for any model: whatever the text encoder understands can be erased."""

from collections.abc import Sequence

from unlearning.concepts import ERASE, RETAIN, SYNONYM, Concept, Prompt, UnlearningTask


def task(
    concept: str,
    *,
    synonyms: Sequence[str] = (),
    anchor: str = "",
    retain: Sequence[str] = (),
    others: Sequence[str] = (),
    template: str = "a photo of the {}",
    images_per_prompt: int = 10,
) -> UnlearningTask:
    """Erases `concept`; shows it, its synonyms and `others`. Methods hold on to `retain`."""
    words = [(concept, ERASE), *((s, SYNONYM) for s in synonyms), *((o, RETAIN) for o in others)]
    return UnlearningTask(
        erase=(Concept(concept, tuple(synonyms), anchor),),
        retain=tuple(Concept(r) for r in retain),
        template=template,
        prompts=tuple(Prompt(template.format(word), role) for word, role in words),
        images_per_prompt=images_per_prompt,
    )
