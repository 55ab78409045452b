"""Configs in files: read, overridden, filled in, and refused in words that help.

Unknown keys are refused with the nearest known one. Strings may name environment variables:
``${HAWQ_DATA}``, or ``${HAWQ_DATA:-fallback}``.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from search.config import SearchConfig, suggestion
from search.errors import InputError
from search.searchers import SEARCHERS

__all__ = ["load_config", "mistakes", "template"]


def load_config(path: Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read a YAML file and apply overrides.

    Args:
        path: The file.
        overrides: ``"curvature.rtol=0.02"``, each value in YAML.

    Raises:
        InputError: If the file cannot be read or a value is wrong, one line for each mistake.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: the config must be readable ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: must be YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: must be a mapping of sections, got {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    try:
        return SearchConfig.model_validate(_expanded(raw, str(path)))
    except ValidationError as error:
        raise InputError(
            "\n".join(f"{path}: {line}" for line in mistakes(error, SearchConfig))
        ) from error


def template() -> str:
    """Return a config for a first search of one's own, every key with its comment."""
    plain = [n for n in SEARCHERS if not n.startswith("warm-") and not n.endswith("-layers")]
    head = (
        "# A search for mixed-precision bits. Run it with: hawq run THIS_FILE\n"
        "# Commented keys show their defaults.\n\n"
        "seed: 0\n\n"
        "task:\n"
        "  data: digits  # digits, cifar10\n"
        "  network: resnet14\n"
        "  search_size: 287\n"
        "  pretrain:\n"
        "    epochs: 15\n"
        "    batch_size: 32\n"
        "    lr: 0.1\n\n"
        "budgets:  # each with one limit or several: weight_mib, compression, average_bits, …\n"
        "  - average_bits: 3\n"
        "  - compression: 16\n\n"
        f"methods: [uniform, hawq-v2, exact]  # of {', '.join(plain)}\n"
        "# agents and samplers also with -layers, or warm- before\n"
    )
    sections = []
    for name in (
        "task",
        "curvature",
        "weights",
        "activations",
        "channels",
        "searches",
        "comparison",
        "calibration",
        "finetune",
        "study",
        "trials",
        "workers",
        "ray",
    ):
        annotation = SearchConfig.model_fields[name].annotation
        model = next((one for one in get_args(annotation) if one is not NoneType), annotation)
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        sections.append("\n" + "\n".join(_section(name, model, "# ")) + "\n")
    return head + "".join(sections)


def _section(name: str, model: type[BaseModel], indent: str) -> Iterator[str]:
    """Yield the lines that show a section's keys, with their defaults, as comments."""
    yield f"{indent}{name}:  # {(model.__doc__ or '').splitlines()[0]}"
    for key, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from _section(key, type(default), indent + "  ")
            continue
        plain = TypeAdapter(Any).dump_python(default, mode="json")
        shown = yaml.safe_dump(plain, default_flow_style=True, width=math.inf).splitlines()[0]
        note = f"  # {field.description}" if field.description else ""
        yield f"{indent}  {key}: {shown}{note}"


def _override(raw: dict[str, Any], text: str) -> None:
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise InputError(f"--set must be KEY=VALUE, such as curvature.rtol=0.02, got {text!r}")
    keys = path.split(".")
    place: Any = raw
    for key in keys[:-1]:
        if isinstance(place, list) and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        elif isinstance(place, dict):
            place = place.setdefault(key, {})
        else:
            raise InputError(f"--set {text}: {key!r} must be inside a section, got {place!r}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {text}: the value must be YAML, got {value!r}") from error
    last = keys[-1]
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise InputError(f"--set {text}: {last!r} must be inside a section, got {place!r}")


def _expanded(value: Any, where: str) -> Any:
    """Replace ${NAME} and ${NAME:-fallback} in every string."""
    if isinstance(value, dict):
        return {key: _expanded(inner, f"{where}: {key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner, where) for inner in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, fallback = match["name"], match["fallback"]
        found = os.environ.get(name, fallback)
        if found is None:
            raise InputError(f"{where}: environment variable {name} must be set, got nothing")
        return found

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<fallback>[^}]*))?\}", variable, value)


def mistakes(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Turn pydantic's errors into one line each: path, value, remedy.

    Args:
        error: What a model said.
        model: The model.
    """
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            *parents, key = problem["loc"]
            known = _keys_at(model, parents)
            lines.append(f"{path}: unknown key{suggestion(str(key), known)}")
        elif problem["type"] == "missing":
            lines.append(f"{path}: must be given, got nothing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            plain = isinstance(problem["input"], str | int | float | bool | None)
            given = f", got {problem['input']!r}" if plain else ""
            lines.append(f"{path}: {message}{given}" if path else message)
    return lines


def _keys_at(model: type[BaseModel], path: Sequence[str | int]) -> Mapping[str, object]:
    """Return the keys that the schema knows at a path."""
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = _model_in(field.annotation) if field is not None else None
        if inner is None:
            return {}
        model = inner
    return model.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None
