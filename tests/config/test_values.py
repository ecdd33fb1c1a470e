"""Every number in conf/ has a range, and a number outside its range is reported before any object is built."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from tests.test_conf import targets
from unlearning.__main__ import CONF
from unlearning.config.signatures import parameters
from unlearning.config.validation import hint_of

WITHOUT_RANGE = {  # arguments of other libraries' classes that no file of conf/ has
    "Trainer": "Lightning checks them when it is built",
    "CSVLogger": "the version is a name, and how often lines are written changes no result",
    "TQDMProgressBar": "places of progress bars on a terminal",
    "LinearLR": "last_epoch: PyTorch's own, which a checkpoint restores",
    "get_cosine_with_hard_restarts_schedule_with_warmup": "last_epoch: as above",
}


def classes() -> list[Callable]:
    """Everything that a file of conf/ builds."""
    nodes = (OmegaConf.to_container(OmegaConf.load(file)) for file in sorted(CONF.rglob("*.yaml")))
    paths = {target for node in nodes for _, target in targets(node)}
    return [get_object(path) for path in sorted(paths) if not path.startswith("hydra_plugins.")]


def bare_numbers(hint: Any) -> Iterator[type]:
    """The numbers in a type hint that have no range."""
    if hint in (int, float):
        yield hint
    elif get_origin(hint) not in (Annotated, Literal):
        for inner in get_args(hint):
            yield from bare_numbers(inner)


def test_every_number_of_every_class_has_a_range():
    bare = {
        f"{target.__name__}.{name}"
        for target in classes()
        for name, parameter in parameters(target)[0].items()
        if target.__name__ not in WITHOUT_RANGE and any(bare_numbers(hint_of(target, parameter)))
    }
    assert not bare


def test_numbers_without_a_range_belong_to_another_library():
    kinds = {target.__name__: target for target in classes()}
    assert WITHOUT_RANGE.keys() <= kinds.keys()
    assert not any(kinds[name].__module__.startswith("unlearning.") for name in WITHOUT_RANGE)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampler.steps=0", "from 1 to 1000"),
        ("sampler.steps=1001", "from 1 to 1000"),
        ("sampler.guidance_scale=inf", "finite"),
        ("seed=-1", "from 0 to"),
        ("seed=null", "null"),
        ("method.optimizer.lr=nan", "greater than 0"),
        ("trainer.accumulate_grad_batches=0", "at least 1"),
        ("stages=[fit,drawing]", "'drawing'"),
        ("dataset.template=a photo", "{}"),
        ("dataset.template='a {'", "{}"),
    ],
)
def test_a_value_out_of_range_is_one_line_with_the_range(error_of, override, words):
    message = error_of("dataset=prompt", "method=esd_x", override.replace("trainer", "+trainer")).strip()
    assert len(message.splitlines()) == 1
    assert message.startswith(f"`{override.partition('=')[0]}") and words in message


def test_a_weight_of_zero_that_a_closed_form_divides_by_is_out_of_range(error_of):
    assert "`method.lamb`" in error_of("method=uce", "method.lamb=0")
