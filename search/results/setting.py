"""What of a config decides what is compared: rows of results with the same of it stand together."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from search.config import SearchConfig
from search.config.section import Section

__all__ = ["placeless", "shared"]

# What rows of one comparison may differ in.
_FREE = {"budgets", "methods", "uniform_draws", "searches", "comparison", "calibration", "study"}
_FREE |= {"workers", "ray"}
_TRIALS = {"asha", "workers"}
# Where files are, on one machine: their contents have hashes.
_PLACES = {"root", "checkpoint", "cache"}


def shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what rows of one comparison must have in common, of a config's sections.

    Keys that the config has gained since it was written are in it with their defaults, with which a
    run does what it did before there was the key.
    """
    full = placeless(_filled(config, SearchConfig))
    found = {key: value for key, value in full.items() if key not in _FREE}
    found["trials"] = {key: value for key, value in full["trials"].items() if key in _TRIALS}
    return found


def placeless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the places of files, which are one machine's."""
    task = {key: value for key, value in config["task"].items() if key not in _PLACES}
    if task.get("detector"):
        task["detector"] = {k: v for k, v in task["detector"].items() if k not in _PLACES}
    return {**config, "task": task}


def _filled(found: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    filled = dict(found)
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None and isinstance(filled.get(name), dict):
            filled[name] = _filled(filled[name], inner)
        elif name not in filled and not field.is_required():
            default = field.get_default(call_default_factory=True)
            is_model = isinstance(default, BaseModel)
            filled[name] = default.model_dump(mode="json") if is_model else default
    return filled


def _section_in(annotation: Any) -> type[Section] | None:
    """Find the section among the alternatives of a field."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None
