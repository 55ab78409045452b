"""mmdetection's configs and networks, as they are wanted here: nothing is fetched, nothing printed.

A config is mmengine's own, of mmdetection 3.x: a path, or ``mmdet::retinanet/NAME.py`` for one that
comes with the package.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from search.errors import InputError
from search.tasks.mmcv_ops import serve_mmcv_ops

__all__ = ["build_detector", "detector_config"]

_SHIPPED = "mmdet::"
# What a config of mmdetection 3.x has for each split's data.
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def detector_config(path: str, options: Mapping[str, Any]) -> Any:
    """Read a config of mmdetection 3.x.

    Args:
        path: Of the file; ``mmdet::`` for one that comes with mmdetection.
        options: Dotted keys to values that replace the file's.

    Returns:
        An ``mmengine.Config``; take a copy before changing it.

    Raises:
        InputError: If it cannot be read, or is not a detector's of mmdetection 3.x.
    """
    return _read(path, json.dumps(options, sort_keys=True))


@lru_cache(maxsize=4)
def _read(path: str, options: str) -> Any:
    serve_mmcv_ops()
    with _quiet():
        import_module("mmdet.utils").register_all_modules(init_default_scope=True)
    mmengine = import_module("mmengine")
    file = _shipped(path) if path.startswith(_SHIPPED) else Path(path)
    if not file.is_file():
        raise InputError(
            f"task.detector.config: {path} must be a file, or {_SHIPPED}FOLDER/NAME.py"
        )
    try:
        config = mmengine.Config.fromfile(str(file))
        config.merge_from_dict(_fitted(json.loads(options), config.to_dict()))
    except (OSError, SyntaxError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise InputError(f"task.detector.config: {path} must be readable ({error})") from error
    if "data" in config and "train_dataloader" not in config:
        raise InputError(
            f"task.detector.config: {path} must be of mmdetection 3.x, got data = dict(…) of 2.x: "
            "see mmdetection's guide to migrating configs"
        )
    missing = [key for key in ("model", *_LOADERS) if key not in config]
    if missing:
        raise InputError(f"task.detector.config: {path} must have {', '.join(missing)}")
    return config


def _fitted(value: Any, present: Any) -> Any:
    """Make tuples of lists of numbers: most sizes and scales must be tuples, and YAML has none.

    What takes the place of a list stays one: a pyramid's channels must be.
    """
    if isinstance(value, dict):
        return {key: _fitted(inner, _at(present, key)) for key, inner in value.items()}
    if isinstance(value, list):
        inner = [_fitted(v, None) for v in value]
        is_sized = not isinstance(present, list) and all(isinstance(v, int | float) for v in inner)
        return tuple(inner) if is_sized else inner
    return value


def _at(config: Any, key: str) -> Any:
    """Return what stands under a dotted key; None if nothing does."""
    for part in key.split("."):
        if isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, dict):
            config = config.get(part)
        else:
            return None
    return config


def _shipped(path: str) -> Path:
    mmdet = import_module("mmdet")
    folder = Path(str(mmdet.__file__)).parent / ".mim" / "configs"
    return folder / path.removeprefix(_SHIPPED)


def build_detector(config: Any, seed: int) -> nn.Module:
    """Build a config's network with seeded random weights, in eval mode.

    Called with images alone, shape (N, C, H, W), it returns what its heads say of them.

    Args:
        config: From ``detector_config``.
        seed: Of the weights.

    Raises:
        InputError: If mmdetection cannot build it.
    """
    registry = import_module("mmdet.registry")
    described = config.model.copy()
    _without_downloads(described)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: nn.Module = registry.MODELS.build(described)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise InputError(
                f"task.detector.config: model must be one to build ({error})"
            ) from error
        model.init_weights()  # type: ignore[operator]
    dense_head = import_module("mmdet.models.dense_heads.base_dense_head").BaseDenseHead
    for head in model.modules():
        # mmdetection 3.3 asks every head for its loss before it finds boxes, and SSD's has none
        # (github.com/open-mmlab/mmdetection/issues/11780).
        if isinstance(head, dense_head) and not hasattr(head, "loss_cls"):
            head.register_module("loss_cls", None)
    plain: Any = type(model)
    model.__class__ = _callable(plain)
    return model.eval()


@cache
def _callable(of: Any) -> Any:
    """Extend a detector's class: two-stage ones want to know the images' sizes, too."""

    class Callable(of):  # type: ignore[misc]
        def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> object:
            if data_samples is None:
                data_samples = _samples(inputs)
            return super().forward(inputs, data_samples, mode)

    Callable.__name__ = of.__name__
    return Callable


def _samples(images: Tensor) -> list[Any]:
    """Describe images that fill their canvas."""
    height, width = images.shape[-2:]
    size = {"img_shape": (height, width), "batch_input_shape": (height, width)}
    sample = import_module("mmdet.structures").DetDataSample
    return [sample(metainfo=size | {"scale_factor": (1.0, 1.0)}) for _ in images]


def _without_downloads(described: Any) -> None:
    """Leave out weights of other networks, in place: a checkpoint has its own."""
    if isinstance(described, dict):
        init = described.get("init_cfg")
        if isinstance(init, dict) and init.get("type") == "Pretrained":
            described["init_cfg"] = None
        for value in described.values():
            _without_downloads(value)
    elif isinstance(described, list | tuple):
        for value in described:
            _without_downloads(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mmengine from telling about every layer that it initializes."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
