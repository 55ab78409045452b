"""From a config to a task: a built-in one, or the user's own factory."""

import json
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hawq.attention import joint_attention
from hawq.task import Task
from search.config import DetectorConfig, TaskConfig
from search.errors import InputError
from search.tasks.classification import ClassificationTask
from search.tasks.examples import Batches
from search.tasks.factories import (
    FactoryNetwork,
    Network,
    called,
    checked_network,
    imported,
    outputs_of,
)
from search.tasks.given import Given, Loss, Made, given, given_task
from search.tasks.imagenet import imagenet_task
from search.tasks.portable import packed
from search.tasks.rewritten import FoldedTask, ProjectedTask, folding
from search.tasks.zoo import Preprocessing, ZooNetwork

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
    task = _plain_task(config, seed)
    if joint_attention(task.model()):
        task = ProjectedTask(task)
    return _folded(task) if config.fold_batch_norm else task


def _folded(plain: Task) -> Task:
    task = FoldedTask(plain)
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
    if config.batches is not None:
        return given_task(_made(config, config.batches, seed))
    if config.data == "imagenet":
        return _imagenet(config, seed)
    if config.data is not None:
        network = _network(config)
        task = ClassificationTask(
            data=config.data,
            root=config.root,
            network=config.network if network is None else network,
            search_size=config.search_size,
            search_indices=config.search_indices,
            split_seed=seed,
            # Trained weights have seen all training images unless a split is named that they
            # have not.
            search_seen=config.pretrain is None and config.search_indices is None,
        )
        if network is not None:
            _refuse_misfit(network, task.inputs(task.batch("train", torch.arange(2))), seed)
        return task
    assert config.factory is not None
    factory = imported(config.factory, "task.factory")
    try:
        task = factory(**config.arguments)
    except TypeError as error:
        raise InputError(
            f"task.arguments: {config.factory} must accept {sorted(config.arguments)} ({error})"
        ) from error
    except InputError:
        raise
    except Exception as error:  # it is the user's: anything may happen in it
        raise InputError(
            f"task.factory: {config.factory} must not fail, got {type(error).__name__}: {error}"
        ) from error
    if not isinstance(task, Task):
        missing = [name for name in dir(Task) if name[0] != "_" and not hasattr(task, name)]
        raise InputError(
            f"task.factory: {config.factory} must return a Task, got {type(task).__name__} "
            f"without {', '.join(missing)}"
        )
    _refuse_broken(task, f"task.factory: {config.factory}")
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


def _network(config: TaskConfig) -> Network | None:
    """Return what builds the user's network or a published one; None for a built-in one."""
    if config.model is not None:
        return FactoryNetwork.of(config.model, config.arguments)
    if config.is_published:
        arguments = json.dumps(config.arguments, sort_keys=True)
        return ZooNetwork(config.network, config.pretrained, arguments)
    return None


def _imagenet(config: TaskConfig, seed: int) -> Task:
    network = _network(config)
    assert network is not None
    assert config.root is not None
    assert config.cache is not None
    plain = network.preprocessing() if isinstance(network, ZooNetwork) else Preprocessing()
    preprocessing = plain.at(config.resolution)
    black = torch.zeros(2, 3, preprocessing.size, preprocessing.size)
    return imagenet_task(
        network,
        preprocessing,
        root=config.root,
        cache=config.cache,
        num_outputs=_refuse_misfit(network, black, seed),
        search_size=config.search_size,
        train_size=config.train_size,
        test_size=config.test_size,
        seed=seed,
        search_seen=config.pretrain is None,
    )


def _made(config: TaskConfig, batches: str, seed: int) -> Made:
    """Import the user's functions here; they travel to where they cannot be imported."""
    assert config.model is not None
    network = FactoryNetwork.of(config.model, config.arguments)
    loss, metric = (
        None if path is None else imported(path, f"task.{key}")
        for key, path in (("loss", config.loss), ("metric", config.metric))
    )
    maker = partial(
        _given,
        network,
        partial(called, imported(batches, "task.batches"), {}, f"task.batches: {batches}"),
        loss,
        metric,
        search_size=config.search_size,
        trained=config.pretrain is None,
        seed=seed,
    )
    return Made(packed(maker, "task"))


def _given(
    network: Network,
    batches: Callable[[], Batches],
    loss: Loss | None,
    metric: Loss | None,
    *,
    search_size: int,
    trained: bool,
    seed: int,
) -> Given:
    return given(
        network.build(seed),
        batches(),
        loss,
        metric,
        search_size=search_size,
        trained=trained,
        seed=seed,
    )


def _refuse_broken(task: Task, where: str) -> None:
    """Run an example through a task of the user's, for what fails here fails on every worker.

    Raises:
        InputError: If a part of it fails, or returns what it must not.
    """
    model = checked_network(called(task.model, {}, f"{where}: model"), f"{where}: model")
    batch = called(lambda: task.batch("train", torch.arange(1)), {}, f"{where}: batch")
    inputs = called(lambda: task.inputs(batch), {}, f"{where}: inputs")
    if not isinstance(inputs, Tensor):
        raise InputError(
            f"{where}: inputs must return one tensor, got {type(inputs).__name__}: pack its parts "
            "into one, and wrap the network in a module that takes them apart"
        )
    outputs_of(model, inputs, f"{where}: the network")
    with torch.no_grad():
        for name, measure in (("losses", task.losses), ("scores", task.scores)):
            values = called(lambda m=measure: m(model, batch), {}, f"{where}: {name}")
            if not isinstance(values, Tensor) or values.ndim == 0 or len(values) != 1:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise InputError(
                    f"{where}: {name} must return one value an example, shape (1,) for one, "
                    f"got {got}; hawq.testing.check_task tells what else is wrong"
                )


def _refuse_misfit(network: Network, images: Tensor, seed: int) -> int:
    """Run a network on two images; return how many classes it tells apart.

    Raises:
        InputError: If it does not take them, or returns no classes.
    """
    outputs = outputs_of(network.build(seed), images)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(images):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(
            f"the network must return classes, shape ({len(images)}, C), got {got}: give batches, "
            "loss and metric, or wrap it in a module that picks them"
        )
    return outputs.shape[1]
