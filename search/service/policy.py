"""What a submitted config may name: no file and no code that the operator has not allowed.

Every string of a config that is not one of a few listed words is looked at, so that a key that is
new to the config is refused until it is judged here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from search.config import SearchConfig
from search.service.demand import demands

__all__ = ["Policy", "PolicyError", "free_strings"]

# Words that name layers, methods and networks; they reach no file and no import.
_HARMLESS = (
    "methods.*",
    "study.candidate",
    "study.space.*",
    "weights.keep.*",
    "weights.tie.*",
    "activations.keep.*",
    "activations.tie.*",
)
_PATHS = (
    "latency",
    "task.cache",
    "task.checkpoint",
    "task.detector.root",
    "task.root",
    "task.search_indices",
)
_CALLABLES = ("task.factory", "task.model", "task.batches", "task.loss", "task.metric")
# Without a step up.
_PACKAGED = re.compile(r"mmdet::\w[\w-]*(/\w[\w.-]*)*\.py")
_ARGUMENTS = ("task.arguments.*",)


class PolicyError(ValueError):
    """A config names what it may not.

    Attributes:
        field: Dotted path of the key.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Policy:
    """What a submitted config may name.

    Attributes:
        paths: Folders whose files may be read.
        modules: Python modules and packages whose callables may be named.
        libraries: Of published networks, which may fetch weights: ``timm``, ``mmdet``, ….
        detectors: Folders whose mmdetection configs may be run, for they are Python.
        cpus: That a single piece of its work may take; None: no matter.
        gpus: The same.
    """

    paths: tuple[Path, ...] = ()
    modules: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    detectors: tuple[Path, ...] = ()
    cpus: float | None = None
    gpus: float | None = None

    def refuse(self, config: SearchConfig) -> None:
        """Refuse a config that names anything else.

        Raises:
            PolicyError: If so; the first such key.
        """
        self._refuse_size(config)
        if config.ray.address is not None:
            raise PolicyError(
                "ray.address", "must be left out, for the service chooses the cluster"
            )
        # What allowed code is called with is between it and the operator.
        calls = config.task.factory is not None or config.task.model is not None
        allowed = _HARMLESS + (_ARGUMENTS if calls else ())
        for field, text in free_strings(config):
            if not _matches(field, allowed):
                self._refuse_string(field, text)

    def _refuse_size(self, config: SearchConfig) -> None:
        for section, cpus, gpus in demands(config):
            for unit, need, most in (("cpus", cpus, self.cpus), ("gpus", gpus, self.gpus)):
                if most is not None and need > most:
                    raise PolicyError(
                        f"{section}.{unit}", f"must be at most {most:g} in all, got {need:g}"
                    )

    def _refuse_string(self, field: str, text: str) -> None:
        if field in _PATHS:
            _refuse_outside(field, text, self.paths)
        elif field in _CALLABLES:
            self._refuse_module(field, text.partition(":")[0])
        elif field == "task.network":
            if ":" in text:  # ours are described by their depth
                self._refuse_library(field, text.partition(":")[0])
        elif field == "task.detector.config":
            if _PACKAGED.fullmatch(text):
                self._refuse_library(field, "mmdet")
            else:
                _refuse_outside(field, text, self.detectors)
        else:
            raise PolicyError(field, "must be left out of a search that is submitted")

    def _refuse_library(self, field: str, library: str) -> None:
        if library not in self.libraries:
            known = ", ".join(self.libraries) or "none"
            raise PolicyError(
                field, f"must be of a library that the service allows ({known}), got {library!r}"
            )

    def _refuse_module(self, field: str, module: str) -> None:
        if not any(module == one or module.startswith(f"{one}.") for one in self.modules):
            known = ", ".join(self.modules) or "none"
            raise PolicyError(
                field, f"must be of a module that the service allows ({known}), got {module!r}"
            )


def _refuse_outside(field: str, text: str, folders: Sequence[Path]) -> None:
    path = Path(text)
    try:
        # A link out of an allowed folder, or a step up from it, leads elsewhere.
        real = path.resolve()
    except (OSError, ValueError, RuntimeError):
        real = None
    within = real and any(real.is_relative_to(folder.resolve()) for folder in folders)
    if not path.is_absolute() or not within:
        known = ", ".join(map(str, folders)) or "none"
        raise PolicyError(
            field, f"must be a path within what the service allows ({known}), got {text!r}"
        )


def free_strings(config: BaseModel) -> Iterator[tuple[str, str]]:
    """Yield every string that a config's schema does not choose from a list, with its path."""
    for name, field in type(config).model_fields.items():
        yield from _free_strings(name, getattr(config, name), field.annotation)


def _free_strings(path: str, value: object, annotation: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, BaseModel):
        for inner, text in free_strings(value):
            yield f"{path}.{inner}", text
    elif isinstance(value, str):
        if _is_free(annotation):
            yield path, value
    elif isinstance(value, Mapping):
        for key, inner_value in value.items():
            yield from _free_strings(f"{path}.{key}", inner_value, annotation)
    elif isinstance(value, Sequence):
        for index, inner_value in enumerate(value):
            yield from _free_strings(f"{path}.{index}", inner_value, annotation)


def _is_free(annotation: Any) -> bool:
    """Tell whether an annotation lets any string through."""
    if get_origin(annotation) is Literal:
        return False
    inner = get_args(annotation)
    return any(map(_is_free, inner)) if inner else annotation in {str, Any}


def _matches(field: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(field, pattern) for pattern in patterns)
