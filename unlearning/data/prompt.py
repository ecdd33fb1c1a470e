"""Concepts in free text, for any text-to-image model."""

from collections.abc import Iterator, Mapping, Sequence

from unlearning.concepts import ERASE, RETAIN, SYNONYM, Concept, Prompt, UnlearningTask, as_name, concept_names
from unlearning.config.quoting import typed
from unlearning.config.values import Count, Template
from unlearning.errors import UserError, did_you_mean


def concepts(
    concept: str | Sequence[str],
    synonyms: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    anchor: str | Mapping[str, str] = "",
) -> tuple[Concept, ...]:
    """The erased concepts of a dataset whose concepts are free text.

    Args:
        concept: One name or several.
        synonyms: Other words for the concept. For several concepts, a list by name: {cat: [kitty], dog: [hound]}.
        anchor: What to generate in place of the concepts: one text for all, or a text by name: {cat: sea, dog: sky}.

    Raises:
        UserError: If there is no name, if `synonyms` is one list for several concepts, or if `synonyms` or `anchor` has
            a name that is not erased.
    """
    names = concept_names(concept)
    if not isinstance(synonyms, Mapping):
        if len(names) > 1 and synonyms:
            raise UserError(
                "dataset.synonyms must say which concept each word stands for, because several are erased: type "
                + typed("dataset.synonyms", {names[0]: list(synonyms)})
            )
        synonyms = {names[0]: synonyms or ()}
    if not isinstance(anchor, Mapping):
        anchor = dict.fromkeys(names, anchor)
    for setting, by_name in (("synonyms", synonyms), ("anchor", anchor)):
        if unknown := [name for name in map(str, by_name) if name not in names]:
            hint = did_you_mean(unknown[0], names) or f" Erased: {', '.join(names)}."
            raise UserError(f"dataset.{setting} names {unknown[0]!r}, which is not erased.{hint}")
    words = {str(name): tuple(map(as_name, given)) for name, given in synonyms.items()}
    anchors = {str(name): str(given or "") for name, given in anchor.items()}
    return tuple(Concept(name, words.get(name, ()), anchors.get(name, "")) for name in names)


def kept(names: Sequence[str], erase: Sequence[Concept]) -> list[str]:
    """Those of `names` that are neither an erased concept nor a synonym of one."""
    erased = {word for concept in erase for word in concept.words}
    return [name for name in map(as_name, names) if name not in erased]


def prompts_of(erase: Sequence[Concept], template: str) -> Iterator[Prompt]:
    """A prompt for each erased concept, followed by one for each of its synonyms. They have no labels."""
    for concept in erase:
        for word, role in ((concept.name, ERASE), *((synonym, SYNONYM) for synonym in concept.synonyms)):
            yield Prompt(template.format(word), role, concept=concept.name)


def task(
    concept: str | Sequence[str],
    *,
    synonyms: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    anchor: str | Mapping[str, str] = "",
    retain: Sequence[str] = (),
    others: Sequence[str] = (),
    template: Template = "a photo of the {}",
    images_per_prompt: Count = 10,
) -> UnlearningTask:
    """Erases one or several concepts. The evaluation prompts them, their synonyms, and `others`.

    Args:
        concept, synonyms, anchor: See `concepts`.
        retain: Concepts that a method may use to retain the rest. Erased ones are left out.
        others: Concepts that the evaluation expects to be retained. Erased ones are left out.
        template: How a name becomes a prompt.
        images_per_prompt: Images generated for each prompt.
    """
    erase = concepts(concept, synonyms, anchor)
    retained = (Prompt(template.format(name), RETAIN) for name in kept(others, erase))
    return UnlearningTask(
        erase=erase,
        retain=tuple(Concept(name) for name in kept(retain, erase)),
        template=template,
        prompts=(*prompts_of(erase, template), *retained),
        images_per_prompt=images_per_prompt,
    )
