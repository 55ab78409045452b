"""From a config to a task: a built-in one, or the user's own factory."""

import importlib
import json
from collections.abc import Callable
from typing import Any

from hawq.task import Task
from search.config import DetectorConfig, TaskConfig
from search.errors import InputError
from search.tasks.classification import ClassificationTask
from search.tasks.folded import folded, folding

__all__ = ["build_task"]


def build_task(config: TaskConfig, seed: int) -> Task:
    """Make the task that a config describes.

    Args:
        config: The config's section.
        seed: Draws the search split.

    Raises:
        InputError: If the factory cannot be imported, or does not make a task, or its network has
            no batch-norm that could be folded.
    """
    plain = _plain_task(config, seed)
    if not config.fold_batch_norm:
        return plain
    task = folded(plain)
    found = folding(task)
    if not found.layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in found.kept.items())
        raise InputError(
            "task.fold_batch_norm: must be false for a network without a batch-norm that can be "
            f"folded, got true ({why or 'it has none'})"
        )
    return task


def _plain_task(config: TaskConfig, seed: int) -> Task:
    if config.detector is not None:
        return _detection_task(config, config.detector, seed)
    if config.data is not None:
        return ClassificationTask(
            data=config.data,
            root=config.root,
            network=config.network,
            search_size=config.search_size,
            search_indices=config.search_indices,
            split_seed=seed,
            # A checkpoint has seen all training images unless a split is named that it has not.
            search_seen=config.checkpoint is not None and config.search_indices is None,
        )
    assert config.factory is not None
    factory = _factory(config.factory)
    try:
        task = factory(**config.arguments)
    except TypeError as error:
        raise InputError(
            f"task.arguments: {config.factory} must accept {sorted(config.arguments)} ({error})"
        ) from error
    if not isinstance(task, Task):
        missing = [name for name in dir(Task) if name[0] != "_" and not hasattr(task, name)]
        raise InputError(
            f"task.factory: {config.factory} must return a Task, got {type(task).__name__} "
            f"without {', '.join(missing)}"
        )
    return task


def _detection_task(config: TaskConfig, detector: DetectorConfig, seed: int) -> Task:
    from search.tasks.detection import DetectionTask  # noqa: PLC0415  of the detection extra

    return DetectionTask(
        config=detector.config,
        root=detector.root,
        options=json.dumps(detector.options, sort_keys=True),
        search_size=config.search_size,
        split_seed=seed,
        from_checkpoint=config.checkpoint is not None,
        beta=detector.smooth_l1_beta,
    )


def _factory(path: str) -> Callable[..., Any]:
    module, separator, name = path.partition(":")
    if not separator:
        raise InputError(f"task.factory: must be package.module:callable, got {path!r}")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"task.factory: {path!r} must be importable ({error})") from error
    if not callable(factory):
        raise InputError(f"task.factory: {path!r} must be callable, got {type(factory).__name__}")
    return factory
