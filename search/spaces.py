"""What a config lets a network's layers and tensors receive.

Every command that builds the network of a run reads it through here, so that what the config keeps
in floating point is left out by all of them alike.
"""

import torch
from torch import nn

from hawq.finetune import fixed_activations
from hawq.reads import Reads, network_space, read_network
from hawq.space import Kind, Space
from hawq.task import Task
from search.config import ActivationsConfig, SearchConfig, WeightsConfig
from search.errors import InputError

__all__ = ["fixed_bits", "reads_of", "space_of"]


def reads_of(config: SearchConfig, task: Task, model: nn.Module) -> Reads:
    """Read a network, and leave out what the config keeps in floating point.

    Raises:
        InputError: If the network cannot be run or read, or a glob matches nothing.
    """
    example = task.inputs(task.batch("train", torch.arange(1)))
    try:
        reads = read_network(model, example)
    except ValueError as error:
        raise InputError(f"task: {error}") from error
    except RuntimeError as error:  # torch's own, of shapes that do not fit
        raise InputError(
            f"task: the network must take inputs of shape {tuple(example.shape)}, got {error}"
        ) from error
    for kind, rules in _rules(config):
        try:
            reads = reads.without(rules.keep, kind)
        except ValueError as error:
            raise InputError(f"{kind}.keep: {error}") from error
    return reads


def space_of(config: SearchConfig, reads: Reads, *, by_channel: bool) -> Space:
    """Return what may be chosen: menus, then the rules for weights and for activations.

    Raises:
        InputError: If a rule matches nothing, or rules contradict each other.
    """
    menu = config.activations.menu if config.searches_activations else None
    space = network_space(reads, config.weights.bits, menu, by_channel=by_channel)
    ties = [*config.weights.tie, *(reads.sums if config.weights.tie_sums else ())]
    try:
        weights = config.weights.model_copy(update={"tie": ties})
        space = weights.apply(space, "weights")
    except ValueError as error:
        raise InputError(f"weights: {error}") from error
    if menu is None:
        return space
    try:
        own = {a.name: config.activations.input_bits for a in reads.activations if a.is_input}
        return config.activations.apply(space.pinned(own, "activations"), "activations")
    except ValueError as error:
        raise InputError(f"activations: {error}") from error


def fixed_bits(config: SearchConfig, reads: Reads) -> dict[str, int]:
    """Return the bits of the activations that are not searched, as ``attach`` takes them."""
    if config.searches_activations:
        return {}
    return fixed_activations(reads, config.activations.bits, config.activations.input_bits)


def _rules(config: SearchConfig) -> tuple[tuple[Kind, WeightsConfig | ActivationsConfig], ...]:
    return (("weights", config.weights), ("activations", config.activations))
