"""Turns Hydra's and OmegaConf's exceptions into one helpful sentence: what is wrong, and what was probably meant."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    ValidationError,
)
from yaml import YAMLError

from unlearning.config.containers import as_written
from unlearning.config.quoting import for_shell, typed, unprintable
from unlearning.errors import did_you_mean, suggest

AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.+)'")
NO_GROUP = re.compile(r"Could not override '([^'@]+)'\. No match in the defaults list")
EXTRAS = {f"hydra/launcher/{name}": "sweeps" for name in ("joblib", "submitit_slurm", "submitit_local")}
EXTRAS |= {"hydra/launcher/ray": "ray"}  # Hydra's plugins, by the extra of this package that installs them


def explain(error: Exception, conf: Path, argv: Sequence[str] = ()) -> str:
    """An error message for the terminal, of one or two sentences.

    Args:
        error: The error that Hydra or OmegaConf raised.
        conf: The folder of the configuration: one folder a group, one file a choice.
        argv: The command line.
    """
    for cause in causes(error):
        match cause:
            case MissingConfigException(missing_cfg_file=str()):
                return _no_such_choice(cause, conf, argv)
            case ConfigCompositionException() if ambiguous := AMBIGUOUS.search(str(cause)):
                return _several(ambiguous[1])
            case OverrideParseException():
                return _unreadable(cause.override, conf, argv)
            case MissingMandatoryValue(full_key=str(key)):
                return f"`{key}` has no value. Give it one: `{key}=...`."
            case ConfigKeyError(full_key=str()) | ConfigAttributeError(full_key=str()):
                return _no_such_key(cause, conf)
            case InterpolationKeyError(full_key=str(key)):
                return _no_such_reference(cause, key)
            case ConfigCompositionException() if (group := NO_GROUP.search(str(cause))) and group[1] not in groups(
                conf
            ):
                return f"There is no group `{group[1]}` to choose from.{did_you_mean(group[1], groups(conf))}"
            case ValidationError(full_key=str(key), msg=str(reason)):
                return f"`{key}`: {reason.splitlines()[0]}."
            case YAMLError():
                return f"A configuration file is not valid YAML:\n{cause}"
    lines = re.split(r"\n\s*\n|\nConfig search path|\nSee https?:", str(error).strip())[0].splitlines()
    return "\n".join(lines[:5]) or type(error).__name__


def no_such_setting(path: str, name: str, existing: Iterable[str]) -> str:
    """The message for a setting `name` that does not exist in `path` ("" at the top), where the `existing` ones do."""
    text = f"{path} has no setting `{name}`." if path else f"There is no setting `{name}`."
    existing = sorted(existing)
    return text + (did_you_mean(name, existing) or (f" Settings: {', '.join(existing)}." if existing else ""))


def not_chosen(group: str, name: str, chosen: Iterable[str]) -> str:
    """The message for a setting of an evaluator, an attack or a logger that the run does not have."""
    return f"The {group} `{name}` is not part of this run. Choose it too: `{group}=[{','.join([*chosen, name])}]`."


def _no_such_choice(error: MissingConfigException, conf: Path, argv: Sequence[str]) -> str:
    file = error.missing_cfg_file or ""
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    existing = sorted({*choices(conf, group), *(option for option in error.options or () if option[0] != "_")})
    text = f"There is no {group or 'config'} `{name}`.{did_you_mean(name, existing)}"
    if existing:
        text += f" {(group or 'config').rpartition('/')[2].capitalize()}s: {', '.join(existing)}."
    if extra := EXTRAS.get(file):
        text += f" Install it with pip install 'concept-unlearning[{extra}]'."
    refers = re.match(r"In '(.+?)'", str(error))
    if refers and not any(name in argument for argument in argv):
        text += f" (`{refers[1]}` refers to it.)"
    return text


def _no_such_reference(error: InterpolationKeyError, key: str) -> str:
    missing = re.search(r"'(.+)' not found", str(error))
    name = missing[1] if missing else ""
    names = [setting for setting in leaves(_settings(_root(error))) if setting != key]
    return f"`{key}` refers to `{name}`, which is no setting.{did_you_mean(name, names)}"


def _no_such_key(error: ConfigKeyError | ConfigAttributeError, conf: Path) -> str:
    path, _, key = (error.full_key or "").rpartition(".")
    existing = sorted(name for name in _settings(error.parent_node) if not name.startswith("_"))
    possible = choices(conf, path)
    if path and key in possible and set(existing) <= set(possible):
        return not_chosen(path, key, existing)
    if path:
        return no_such_setting(path, key, existing)
    deeper = [name for name in leaves(_settings(_root(error))) if name.endswith(f".{key}")]
    if deeper:
        return f"There is no setting `{key}`.{suggest(deeper[:3])}"
    return no_such_setting("", key, [name for name in existing if name != "hydra"])


def _unreadable(override: str, conf: Path, argv: Sequence[str]) -> str:
    """The message for an override that Hydra cannot parse.

    Most often the shell has split a value with spaces, or the name of the group is missing before a choice.
    """
    if bad := unprintable(override):
        return f"Cannot read {override!a}: it holds the character {bad!a}."
    words = list(argv)
    start = words.index(override) if override in words else len(words)
    if "=" not in override:
        choices_of_it = [f"{group}={override}" for group in groups(conf) if override in choices(conf, group)]
        if choices_of_it:
            return f"`{override}` is not of the form setting=value.{suggest(choices_of_it[:3])}"
        while start > 0 and "=" not in words[start]:
            start -= 1
    end = start + 1
    while end < len(words) and "=" not in words[end] and not words[end].startswith("-"):
        end += 1
    setting, equals, value = " ".join(words[start:end]).partition("=")
    if equals and value[:1] not in [*"[{'\""]:
        several = end - start > 1 and "," in value
        line = typed(setting, [part.strip() for part in value.split(",") if part.strip()] if several else value)
        return f"Cannot read `{override}`. For this text, type {line}"
    if not equals:
        return (
            f"Cannot read `{override}`: an override has the form setting=value. Put quotes around the whole where its "
            "value has brackets, commas or spaces: 'setting=[a, b]'."
        )
    if _is_override(whole := f"{setting}={value}"):  # which the shell took apart
        return f"Cannot read `{override}`. Quotes keep its words together: type {for_shell(whole)}"
    return (
        f"Cannot read `{override}`: a bracket or a quote is not closed, or something follows it. For this text, type "
        f"{typed(setting, value)}"
    )


def _is_override(word: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_overrides([word]))
    except HydraException:
        return False


def _several(override: str) -> str:
    """Hydra takes commas for the values of a sweep."""
    setting, _, value = override.partition("=")
    parts = [part.strip() for part in value.split(",") if part.strip()]
    lines = [
        f"`{override}` has commas. For {len(parts)} values, type {typed(setting, parts)}",
        f"For one text with commas, type {typed(setting, value)}",
        "For one run with each of the values, type -m before it.",
    ]
    return "\n".join(lines)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def groups(conf: Path) -> list[str]:
    """The names of the groups of a configuration: its folders."""
    return sorted(folder.name for folder in conf.glob("[!_.]*") if folder.is_dir())


def choices(conf: Path, group: str) -> list[str]:
    """The names that can be chosen of a group: its files, those in subfolders as "folder/file"."""
    files = (file.relative_to(conf / group) for file in (conf / group).rglob("[!_.]*.yaml"))
    return sorted(file.with_suffix("").as_posix() for file in files)


def _settings(node: object) -> dict:
    """The settings of a node, nothing resolved; none where the node is no mapping."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
        return {}
    return as_written(node)


def leaves(settings: dict, path: str = "") -> Iterator[str]:
    """The dotted names of all settings except Hydra's own."""
    for key, value in settings.items():
        if f"{path}{key}" != "hydra":
            yield f"{path}{key}"
            yield from leaves(value, f"{path}{key}.") if isinstance(value, dict) else ()


def _root(error: ConfigKeyError | ConfigAttributeError | InterpolationKeyError) -> object:
    return error.parent_node._get_root()
