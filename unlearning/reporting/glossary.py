"""The meanings of the metrics' names, for the legend of the pages. The evaluators define how each is computed."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

MEANINGS = {  # by name, or by pattern for names that end with an attack's
    "efficacy/acc_e": "percent of images of the erased concept in which the judge sees it",
    "efficacy/acc_g": "percent of images of the concept's synonyms in which the judge sees the concept",
    "efficacy/ua": "100 − acc_e (UnlearnCanvas)",
    "efficacy/unrecognisable": "percent of images of the erased concept in which the judge sees nothing it knows",
    "efficacy/suppression": "percent of the concept that is gone, of what the unedited model shows",
    "efficacy/clip_score_e": "100 × cosine of image and prompt, for the erased concept",
    "efficacy/lpips_e": "distance to the unedited model's images, for the erased concept",
    "efficacy/fid_oracle": "FID to the images of the model that never knew, for the erased concept",
    "efficacy/fid_word_removed": "FID to the unedited model's images of the prompts without the concept's words",
    "retention/acc_s": "percent of images of the retained concepts in which the judge sees what was asked for",
    "retention/ira": "acc_s (UnlearnCanvas)",
    "retention/cra": "percent of images in which the judge sees the right style of an object, or object of a style",
    "retention/fid_oracle": "FID to the images of the model that never knew, for the retained concepts",
    "retention/fid_word_removed": "FID to the unedited model's images of the same prompts, which do not have the words",
    "fidelity/fid": "Fréchet distance of the retained concepts' images to real ones",
    "fidelity/fid_e": "Fréchet distance of the erased concept's images to real ones",
    "fidelity/kid": "kernel distance of the retained concepts' images to real ones",
    "fidelity/clip_score": "100 × cosine of image and prompt, for the retained concepts",
    "fidelity/lpips": "distance to the unedited model's images, for the retained concepts",
    "robustness/asr_before*": "percent of the attacked images in which the judge sees the concept without the attack",
    "robustness/asr_new*": "percent of the images without the concept in which the attack brings it back",
    "robustness/asr*": "percent of attacked images in which the judge sees the concept",
    "summary/h_o": "harmonic mean of 100 − acc_e, 100 − acc_g and acc_s",
    "summary/h_c": "harmonic mean of 100 − acc_e and acc_s",
    "summary/h_a": "clip_score − clip_score_e",
}


def meaning(metric: str) -> str:
    """The meaning of a metric in one line; "" if this file does not explain it."""
    return next((text for name, text in MEANINGS.items() if fnmatchcase(metric, name)), "")


def legend(metrics: Iterable[str]) -> dict[str, str]:
    """The meanings of those metrics that are explained, by name."""
    return {name: text for name in metrics if (text := meaning(name))}
