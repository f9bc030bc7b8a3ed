"""Config groups as small dataclasses, so that a key that nothing reads is an error.

>>> from_config(TokenizerConfig, {"vocab_sise": 4096}, "tokenizer")
ValueError: tokenizer.vocab_sise: unknown key; did you mean tokenizer.vocab_size?
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

TASKS = ("passkey", "needle", "recall", "variables", "copy")  # of data.synthetic
ROOT = Path(__file__).resolve().parents[1]  # the repository
Config = TypeVar("Config")
NAMES = {
    NoneType: "null",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a group of keys",
}


@dataclass(frozen=True)
class ValidationConfig:
    """Exactly one of the two is set."""

    path: str | None = None
    fraction: float | None = None

    def __post_init__(self):
        if (self.path is None) == (self.fraction is None):
            raise ValueError(
                "data.validation: set exactly one of path (a file, folder or glob of its own) and "
                "fraction (the share of documents to hold out); null stands for not set"
            )
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"data.validation.fraction: {self.fraction} isn't between 0 and 1")


@dataclass(frozen=True)
class HubConfig:
    """A dataset on the Hugging Face hub, or a folder that holds a copy of one, for `datasets`."""

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True


@dataclass(frozen=True)
class TextConfig:
    """Text of the user's own (path) or of the hub; where both are set, path is the copy to read."""

    name: str
    validation: ValidationConfig
    path: str | None = None
    hub: HubConfig | None = None
    text_field: str = "text"
    unwrap: bool = False
    drop_near_duplicates: bool = False
    max_tokens: int | None = None


@dataclass(frozen=True)
class ShardsConfig:
    """Tokens that are there already: a folder that data/prepare.py made."""

    name: str
    shards: str


@dataclass(frozen=True)
class SyntheticConfig:
    """Tasks made while training, hidden in the text of another source of the mixture."""

    name: str
    tasks: list
    haystack: str | None = None


@dataclass(frozen=True)
class MixtureConfig:
    """Several sources, each with its share of the training tokens."""

    name: str
    sources: dict
    weights: dict


SourceConfig = TextConfig | ShardsConfig | SyntheticConfig


def data_config(mapping: Mapping, where: str = "data") -> MixtureConfig | SourceConfig:
    """The data group as the dataclass of its kind: the one whose key it has.

    Raises:
        ValueError: as from_config does; or the sources of a mixture don't fit together.
    """
    if OmegaConf.is_config(mapping):
        mapping = OmegaConf.to_container(mapping, resolve=True)
    kinds = {"sources": MixtureConfig, "shards": ShardsConfig, "tasks": SyntheticConfig}
    kind = next((kinds[key] for key in kinds if key in mapping), TextConfig)
    config = from_config(kind, mapping, where)
    if kind is TextConfig and config.path is None and config.hub is None:
        raise ValueError(f"{where}.path: null is nothing to read; set it to a file, folder or glob")
    if kind is SyntheticConfig:
        for task in config.tasks:
            if task not in TASKS:
                raise ValueError(
                    f"{where}.tasks: there is no task {task!r}, only {', '.join(TASKS)}"
                )
    if kind is not MixtureConfig:
        return config
    sources = {
        name: data_config(source, f"{where}.sources.{name}")
        for name, source in config.sources.items()
    }
    texts = [name for name, source in sources.items() if isinstance(source, TextConfig)]
    if not texts:
        raise ValueError(f"{where}.sources: at least one of them must be text")
    for name, source in sources.items():
        if isinstance(source, MixtureConfig):
            raise ValueError(f"{where}.sources.{name}: is a mixture; name its sources themselves")
        if isinstance(source, SyntheticConfig):
            haystack = texts[0] if source.haystack is None else source.haystack
            if haystack not in texts:
                raise ValueError(
                    f"{where}.sources.{name}.haystack: {haystack!r} is no source of text here; "
                    f"these are: {', '.join(texts)}"
                )
            sources[name] = replace(source, haystack=haystack)
    check_weights(config.weights, list(sources))
    return replace(config, sources=sources)


def check_weights(weights: Mapping[str, float], names: list[str]) -> None:
    """Raises ValueError for weights that are no shares of these sources."""
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(
                f"data.weights.{name}: there is no such source, only {', '.join(names)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise ValueError(f"data.weights.{name}: {weight!r} isn't a number from 0 up")
    if not any(weights.values()):
        raise ValueError(f"data.weights: every source has weight 0; give one to {names[0]}, say")


@dataclass(frozen=True)
class TokenizerConfig:
    """path, or hub with its revision, names one that exists, and vocab_size then does not count."""

    vocab_size: int | None = None
    path: str | None = None
    hub: str | None = None
    revision: str | None = None

    def __post_init__(self):
        named = (self.path, self.hub).count(None)
        if named == 0 or (named == 2 and self.vocab_size is None):
            raise ValueError(
                "tokenizer: set exactly one of vocab_size (train one on the data), path (load a "
                "tokenizer.json) and hub (one by name)"
            )
        if named == 1:  # a recipe may bring the size of one that it would train
            object.__setattr__(self, "vocab_size", None)


def from_config(cls: type[Config], mapping: Mapping, where: str = "") -> Config:
    """Builds the dataclass `cls` from a config group.

    Args:
        cls: a dataclass; its fields may be plain types, `X | None`, Literal or dataclasses.
        mapping: a dict or a DictConfig (resolved here).
        where: the group's name, for messages: "data", "data.validation"; "": keys of no group.

    Raises:
        ValueError: an unknown key, a missing key or a value of the wrong type, in one sentence.
    """
    if OmegaConf.is_config(mapping):
        mapping = OmegaConf.to_container(mapping, resolve=True)
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where}: {mapping!r} isn't a group of keys")
    group = f"{where}." if where else ""
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}
    for key in mapping:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {group}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{group}{key}: unknown key; {hint}")
    values = {}
    for name, field in known.items():
        required = field.default is MISSING and field.default_factory is MISSING
        value = mapping.get(name, "???" if required else field.default)
        if value == "???":  # how a config file says "yours to set"
            raise ValueError(f"{group}{name}: missing; set it, as in {group}{name}=…")
        if name in mapping:
            values[name] = _typed(value, hints[name], f"{group}{name}")
    return cls(**values)


def check_root(mapping: Mapping) -> None:
    """Raises ValueError for a key beside the groups and settings that conf/config.yaml lists."""
    table = OmegaConf.load(ROOT / "conf" / "config.yaml")
    groups = [key for entry in table.defaults if entry != "_self_" for key in entry]
    known = [
        key for key in (*groups, *table) if " " not in key and key not in ("defaults", "hydra")
    ]
    for key in mapping:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"{key}: unknown key; {hint}")


def _typed(value: Any, hint: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in options:
        return None
    for option in options:
        if is_dataclass(option):
            return from_config(option, value, where)
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        plain = get_origin(option) or option
        if isinstance(plain, type) and isinstance(value, plain):
            if isinstance(value, bool) <= (plain is bool):  # True is an int to Python, not to us
                return value
    choices = []
    for option in options:
        choices += get_args(option) if get_origin(option) is Literal else [option]
    given = "null" if value is None else repr(value)
    listed = isinstance(value, str | int | float) and any(get_origin(o) is list for o in options)
    hint = f"; a list is written [{value}]" if listed else ""
    raise ValueError(f"{where}: {given} isn't {' or '.join(map(_spell, choices))}{hint}")


def _spell(choice: Any) -> str:
    choice = get_origin(choice) or choice
    if isinstance(choice, type):
        return NAMES.get(choice, choice.__name__)
    return repr(choice)


def resolve_path(path: str) -> Path:
    """Expands ~; a relative path starts at the repository root, wherever the command was typed."""
    return ROOT / Path(path).expanduser()


def command_line(arguments: list[str]) -> list[str]:
    """Command line overrides as Hydra should see them.

    Paths are quoted: Hydra's grammar takes no bare ~, brackets or commas, which they are free to
    hold, and the shell leaves the ~ of `data.path=~/books` alone. A key may be one that does not
    exist: our own check then says what was meant, in one sentence.
    """

    def translated(argument: str) -> str:
        match = re.fullmatch(r"(\+{0,2})([\w.]+)=(.*)", argument, re.DOTALL)
        if not match:
            return argument
        sign, key, value = match.groups()
        if (
            re.search(r"(^|\.)(\w*path|output_dir|init_from|checkpoint|run|haystack|prompt)$", key)
            and value != "null"
        ):
            if value[:1] not in "'\"":
                # Hydra unescapes backslashes only where they stand before a quote.
                value = re.sub(r"\\+(?='|\Z)", lambda run: 2 * run[0], value)
                value = "'" + value.replace("'", r"\'") + "'"
        is_group = (ROOT / "conf" / key).is_dir()  # their options are Hydra's to find
        if not is_group and not key.startswith("hydra."):
            sign = "++"
        return f"{sign}{key}={value}"

    return [translated(argument) for argument in arguments]
