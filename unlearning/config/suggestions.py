"""What a mistyped command line was probably meant to say: Hydra's exceptions as one helpful sentence."""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    ValidationError,
)
from yaml import YAMLError

NO_GROUP = re.compile(r"Could not override '([^'@]+)'\. No match in the defaults list")
SWEEPS = ("launcher/joblib", "launcher/submitit_slurm", "launcher/submitit_local", "sweeper/optuna")
EXTRAS = {f"hydra/{name}": "sweeps" for name in SWEEPS} | {"hydra/launcher/ray": "ray"}  # Hydra's plugins


def explain(error: Exception, conf: Path, argv: Sequence[str] = ()) -> str:
    """One sentence or two for somebody at a terminal.

    Args:
        error: What Hydra or OmegaConf raised.
        conf: The folder of the configuration: one folder a group, one file a choice.
        argv: The command line.
    """
    for cause in causes(error):
        match cause:
            case MissingConfigException(missing_cfg_file=str()):
                return no_such_choice(cause, conf, argv)
            case OverrideParseException():
                return cannot_read(cause.override, conf, argv)
            case MissingMandatoryValue(full_key=str(key)):
                return f"`{key}` has no value. Give it one: `{key}=...`."
            case ConfigKeyError(full_key=str()) | ConfigAttributeError(full_key=str()):
                return no_such_setting(cause, conf)
            case InterpolationKeyError(full_key=str(key)):
                return no_such_reference(cause, key)
            case ConfigCompositionException() if (group := NO_GROUP.search(str(cause))) and group[1] not in groups(
                conf
            ):
                return f"There is no group `{group[1]}` to choose from.{did_you_mean(group[1], groups(conf))}"
            case ValidationError(full_key=str(key), msg=str(reason)):
                return f"`{key}`: {reason.splitlines()[0]}."
            case YAMLError():
                return f"A file of settings is not written as YAML is:\n{cause}"
    lines = re.split(r"\n\s*\n|\nConfig search path|\nSee https?:", str(error).strip())[0].splitlines()
    return "\n".join(lines[:5]) or type(error).__name__


def no_such_choice(error: MissingConfigException, conf: Path, argv: Sequence[str]) -> str:
    group, _, name = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
    known = sorted({*choices(conf, group), *(option for option in error.options or () if option[0] != "_")})
    text = f"There is no {group or 'config'} `{name}`.{did_you_mean(name, known)}"
    if known:
        text += f" {(group or 'config').rpartition('/')[2].capitalize()}s: {', '.join(known)}."
    if extra := EXTRAS.get(error.missing_cfg_file):
        text += f" It comes with an extra: pip install 'unlearning[{extra}]'."
    asked_by = re.match(r"In '(.+?)'", str(error))
    if asked_by and not any(name in argument for argument in argv):
        text += f" (`{asked_by[1]}` asks for it.)"
    return text


def no_such_reference(error: InterpolationKeyError, key: str) -> str:
    name = re.search(r"'(.+)' not found", str(error))[1]
    names = [setting for setting in leaves(plain(error.parent_node._get_root())) if setting != key]
    return f"`{key}` refers to `{name}`, which is no setting.{did_you_mean(name, names)}"


def no_such_setting(error: ConfigKeyError | ConfigAttributeError, conf: Path) -> str:
    path, _, key = error.full_key.rpartition(".")
    root = plain(error.parent_node._get_root())
    known = sorted(name for name in plain(error.parent_node) if not name.startswith("_"))
    possible = choices(conf, path)
    if path and key in possible and set(known) <= set(possible):
        return f"The {path} `{key}` is not part of this run. Choose it too: `{path}=[{','.join([*known, key])}]`."
    text = f"{path} has no setting `{key}`." if path else f"There is no setting `{key}`."
    elsewhere = [name for name in leaves(root) if name.endswith(f".{key}")] if not path else []
    known = [name for name in known if path or name != "hydra"]
    hint = did_you_mean(key, known, elsewhere)
    return text + (hint or (f" Settings: {', '.join(known)}." if known else ""))


def cannot_read(override: str, conf: Path, argv: Sequence[str]) -> str:
    """Most often a value with spaces in it that the shell took apart, or a choice without its group."""
    words = list(argv)
    start = words.index(override) if override in words else len(words)
    if "=" not in override:
        homes = [f"{group}={override}" for group in groups(conf) if override in choices(conf, group)]
        if homes:
            return f"`{override}` is not of the form setting=value.{did_you_mean(override, (), homes)}"
        while start > 0 and "=" not in words[start]:
            start -= 1
    end = start + 1
    while end < len(words) and "=" not in words[end] and not words[end].startswith("-"):
        end += 1
    whole = " ".join(words[start:end])
    if end - start > 1 and "=" in whole:
        setting, _, value = whole.partition("=")
        whole = f"{setting}=[{value}]" if "," in value else whole
        return f"Cannot read `{override}`. Did you mean {whole!r}, with the quotes?"
    return (
        f"Cannot read `{override}`: an override has the form setting=value. A value with brackets, commas or spaces "
        "needs quotes around the whole: 'setting=[a, b]'."
    )


def did_you_mean(word: str, known: Iterable[str], exact: Sequence[str] = ()) -> str:
    near = list(exact[:3]) or get_close_matches(word.lower(), list(known), n=1)
    return f" Did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def groups(conf: Path) -> list[str]:
    return sorted(folder.name for folder in conf.glob("[!_.]*") if folder.is_dir())


def choices(conf: Path, group: str) -> list[str]:
    return sorted(file.stem for file in (conf / group).glob("[!_.]*.yaml"))


def plain(node: object) -> dict:
    """The settings of a node as they are written; nothing is resolved."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
        return {}
    return OmegaConf.to_container(node, resolve=False)


def leaves(settings: dict, path: str = "") -> Iterator[str]:
    """The dotted names of all settings but Hydra's own."""
    for key, value in settings.items():
        if f"{path}{key}" != "hydra":
            yield f"{path}{key}"
            yield from leaves(value, f"{path}{key}.") if isinstance(value, dict) else ()
