"""Published networks by name: ``pytorchcv:resnet50``, ``timm:NAME``, ``torchvision:NAME``.

The papers took theirs from pytorchcv. Each library says itself how its networks want their images.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from search.errors import InputError
from search.tasks.factories import called, checked_network

__all__ = ["LIBRARIES", "Preprocessing", "ZooNetwork"]

Interpolation = Literal["bilinear", "bicubic", "nearest"]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What becomes of a photograph before a network sees it.

    Attributes:
        size: Height and width of the network's input, in pixels.
        resize: Shorter side before the center of ``size`` is cut out.
        interpolation: Of the resizing.
        mean: Of the channels in [0, 1], subtracted.
        std: By which they are divided then.
    """

    size: int = 224
    resize: int = 256
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = _MEAN
    std: tuple[float, float, float] = _STD

    def at(self, size: int | None) -> "Preprocessing":
        """Return the same for another resolution, the cut in proportion; None changes nothing."""
        if size is None:
            return self
        resize = round(self.resize * size / self.size)
        return Preprocessing(size, resize, self.interpolation, self.mean, self.std)


@dataclass(frozen=True, slots=True)
class ZooNetwork:
    """A network that a library knows by name.

    Attributes:
        name: ``LIBRARY:NAME``.
        pretrained: Whether the library loads its weights, over the network if need be.
        arguments: Of the library's function, as JSON: ``{"num_classes": 10}``.
    """

    name: str
    pretrained: bool = False
    arguments: str = "{}"

    @property
    def fingerprint(self) -> str:
        """Hash of the name, the arguments and the library's version."""
        version = getattr(self._found()[1], "__version__", "")
        text = json.dumps([asdict(self), version])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def build(self, seed: int) -> nn.Module:
        """Build it.

        Raises:
            InputError: If the library is not installed, does not know the name or the arguments, or
                cannot load the weights.
        """
        library, module, short = self._found()
        where = f"task.network: {self.name}{', pretrained' if self.pretrained else ''}"
        key = self.name.partition(":")[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                made = called(
                    lambda **given: library.make(module, short, self.pretrained, given),
                    json.loads(self.arguments),
                    where,
                )
            except InputError as error:
                if not self.pretrained:
                    raise
                raise InputError(
                    f"{error}: without weights from {key}, give a file of them as "
                    "task.checkpoint, and task.pretrained: false"
                ) from error
        return checked_network(made, f"task.network: {self.name}")

    def preprocessing(self) -> Preprocessing:
        """Tell how its images are prepared, as its library says.

        Raises:
            InputError: If the library is not installed, or does not know the name.
        """
        library, module, short = self._found()
        return library.preprocessing(module, short)

    def _found(self) -> tuple["Library", Any, str]:
        """Return the library, its module, and the name that it has for the network."""
        key, _, short = self.name.partition(":")
        library = LIBRARIES[key]
        module = library.module()
        known = library.names(module)
        if short not in known:
            near = difflib.get_close_matches(short, known, 3, 0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {len(known)} others"
            raise InputError(f"task.network: {key} must know the network, got {short!r}: {hint}")
        return library, module, short


@dataclass(frozen=True, slots=True)
class Library:
    """How one library is asked.

    Attributes:
        package: Its name.
        names: Lists the networks of a module.
        make: Makes one of a name, trained or not, with arguments.
        preprocessing: Tells how the images of one are prepared.
    """

    package: str
    names: Callable[[Any], list[str]]
    make: Callable[[Any, str, bool, Mapping[str, Any]], Any]
    preprocessing: Callable[[Any, str], Preprocessing]

    def module(self) -> Any:
        """Import it.

        Raises:
            InputError: If it is not installed.
        """
        try:
            return importlib.import_module(self.package)
        except ImportError as error:
            raise InputError(
                f"task.network: {self.package.partition('.')[0]} must be installed ({error}): "
                "pip install 'hawq-search[zoo]'"
            ) from error


def _pytorchcv_names(module: Any) -> list[str]:
    return list(module._models)


def _pytorchcv_make(module: Any, name: str, pretrained: bool, given: Mapping[str, Any]) -> Any:
    return module.get_model(name, pretrained=pretrained, **given)


def _pytorchcv_preprocessing(module: Any, name: str) -> Preprocessing:
    store = importlib.import_module("pytorchcv.models.common.model_store")
    rows = store.load_csv(store.get_model_metainfos_file_path())
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    found = table.get(name)
    if found is None or found["img_size"] == "NA":
        size = inspect.signature(_class_of(module, name)).parameters["in_size"].default[0]
        return Preprocessing(size, math.ceil(size / 0.875))
    size = int(found["img_size"])
    return Preprocessing(size, math.ceil(size / float(found["img_scale"])))


def _class_of(module: Any, name: str) -> Any:
    """Return the class of a network whose table has no size: its module's namesake of nn.Module."""
    source = importlib.import_module(module._models[name].__module__)
    kinds = [
        c for _, c in inspect.getmembers(source, inspect.isclass) if c.__module__ == source.__name__
    ]
    return next(c for c in kinds if "in_size" in inspect.signature(c).parameters)


def _timm_names(module: Any) -> list[str]:
    names: list[str] = module.list_models()
    return names


def _timm_make(module: Any, name: str, pretrained: bool, given: Mapping[str, Any]) -> Any:
    return module.create_model(name, pretrained=pretrained, **given)


def _timm_preprocessing(module: Any, name: str) -> Preprocessing:
    config = module.data.resolve_data_config(module.get_pretrained_cfg(name).to_dict())
    size = config["input_size"][1]
    return Preprocessing(
        size,
        math.floor(size / config["crop_pct"]),
        config["interpolation"],
        tuple(config["mean"]),
        tuple(config["std"]),
    )


_AUXILIARY = {"inception_v3": ("AuxLogits",), "googlenet": ("aux1", "aux2")}


def _torchvision_names(module: Any) -> list[str]:
    names: list[str] = module.list_models(module=module)
    return names


def _torchvision_make(module: Any, name: str, pretrained: bool, given: Mapping[str, Any]) -> Any:
    heads = _AUXILIARY.get(name, ())
    if not pretrained:
        # Without init_weights these two warn; they are slow draws of a truncated normal.
        plain = {"init_weights": True, "aux_logits": False} if heads else {}
        return module.get_model(name, weights=None, **(plain | dict(given)))
    made = module.get_model(name, weights="DEFAULT", **given)
    # Published with their weights, as heads for training from scratch: outputs were several then.
    for head in heads:
        made.aux_logits = False
        setattr(made, head, None)
    return made


def _torchvision_preprocessing(module: Any, name: str) -> Preprocessing:
    preset = module.get_model_weights(name).DEFAULT.transforms()
    return Preprocessing(
        preset.crop_size[0],
        preset.resize_size[0],
        preset.interpolation.value,
        tuple(preset.mean),
        tuple(preset.std),
    )


LIBRARIES = {
    "pytorchcv": Library(
        "pytorchcv.model_provider", _pytorchcv_names, _pytorchcv_make, _pytorchcv_preprocessing
    ),
    "timm": Library("timm", _timm_names, _timm_make, _timm_preprocessing),
    "torchvision": Library(
        "torchvision.models", _torchvision_names, _torchvision_make, _torchvision_preprocessing
    ),
}
