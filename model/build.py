"""From the config's `model` and `attention` groups to a Decoder."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from functools import partial

from model.decoder import Decoder


def build_decoder(model: Mapping, attention: Mapping, vocab_size: int) -> Decoder:
    """A freshly initialised decoder; `model` and `attention` are the config groups, with _target_.

    Raises ValueError with one sentence for an unknown key, a missing one, or sizes that do not fit.
    """
    layer = partial(_target(attention, "attention"), **_arguments(attention, "attention"))
    decoder = _target(model, "model")
    return decoder(vocab_size, layer, **_arguments(model, "model", ("vocab_size", "attention")))


def with_defaults(group: Mapping, where: str) -> dict:
    """A config group with every key that its class reads, defaults included."""
    parameters = inspect.signature(_target(group, where)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()} | dict(group)


def _target(group: Mapping, where: str):
    """The class behind _target_; only this package's own, since configs come with checkpoints."""
    path = group.get("_target_", "")
    module, _, name = path.rpartition(".")
    if not module.startswith("model."):
        raise ValueError(f"{where}._target_={path!r} must name a class of the package `model`.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ValueError(f"{where}._target_={path}: there is no such class.") from None


def _arguments(group: Mapping, where: str, given: tuple[str, ...] = ("dim",)) -> dict:
    """The group's keys, checked against the constructor's parameters."""
    parameters = inspect.signature(_target(group, where)).parameters.values()
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in given]
    known = [p.name for p in named]
    arguments = {key: value for key, value in group.items() if key != "_target_"}
    for key in arguments:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            others = f"known: {', '.join(known)}." if known else "there are none."
            hint = f"did you mean {where}.{close[0]}?" if close else others
            raise ValueError(f"{where}.{key} is not a key of {group['_target_']}; {hint}")
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ValueError(f"{where}.{missing[0]} is missing; {group['_target_']} needs it.")
    return arguments
