"""Networks that a function of the user's makes: ``package.module:callable`` in a config."""

import difflib
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from search.errors import InputError
from search.tasks.portable import packed, unpacked

__all__ = [
    "FactoryNetwork",
    "Network",
    "called",
    "checked_network",
    "imported",
    "outputs_of",
    "source_of",
]


class Network(Protocol):
    """What builds the same network anywhere."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes with the network's structure and its first weights."""
        ...

    def build(self, seed: int) -> nn.Module:
        """Build it, float32, on the CPU, in eval mode; ``seed`` draws what is drawn."""
        ...


@dataclass(frozen=True, slots=True)
class FactoryNetwork:
    """A network that a function makes.

    Attributes:
        factory: The function, as ``packed`` has it.
        name: What it is called in messages.
        arguments: Its keyword arguments, as JSON.
        source: Its text, which the fingerprint is of.
    """

    factory: bytes
    name: str
    arguments: str
    source: str

    @property
    def fingerprint(self) -> str:
        """Hash of the function's text and its arguments."""
        text = json.dumps([self.name, self.arguments, self.source])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def build(self, seed: int) -> nn.Module:
        """Call the function.

        Raises:
            InputError: If it fails, or returns no network that takes one tensor.
        """
        factory = unpacked(self.factory)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = called(factory, json.loads(self.arguments), f"task.model: {self.name}")
        return checked_network(made, f"task.model: {self.name}")

    @staticmethod
    def of(path: str, arguments: Mapping[str, Any]) -> "FactoryNetwork":
        """Find the function that ``package.module:callable`` means.

        Raises:
            InputError: If there is none.
        """
        factory = imported(path, "task.model")
        return FactoryNetwork(
            packed(factory, f"task.model: {path}"),
            path,
            json.dumps(arguments, sort_keys=True),
            source_of(factory),
        )


def imported(path: str, key: str) -> Callable[..., Any]:
    """Import ``package.module:callable``; modules beside the config's user are found, too.

    Args:
        path: Where the function is.
        key: Of the config, for messages.

    Raises:
        InputError: If there is no such function.
    """
    module, separator, name = path.partition(":")
    if not separator:
        raise InputError(f"{key}: must be package.module:callable, got {path!r}")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        here = "" if str(Path.cwd()) in sys.path else "; is it on PYTHONPATH?"
        raise InputError(f"{key}: {path!r} must be importable ({error}{here})") from error
    if not hasattr(found, name):
        near = difflib.get_close_matches(name, dir(found), 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{key}: {path!r} must be importable ({module} has no {name!r}{hint})")
    factory: Callable[..., Any] = getattr(found, name)
    if not callable(factory):
        raise InputError(f"{key}: {path!r} must be callable, got {type(factory).__name__}")
    return factory


def called(factory: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """Call a function of the user's.

    Args:
        factory: The function.
        arguments: Its keyword arguments.
        where: The config's key and the function's name.

    Raises:
        InputError: If it fails, whatever the reason.
    """
    try:
        return factory(**arguments)
    except InputError:
        raise
    except Exception as error:  # it is the user's: anything may happen in it
        given = f"({', '.join(f'{key}=…' for key in arguments)})" if arguments else ""
        raise InputError(
            f"{where}{given}: must not fail, got {type(error).__name__}: {error}"
        ) from error


def checked_network(made: object, where: str) -> nn.Module:
    """Refuse what is no network of one input.

    Returns:
        The network, float32, on the CPU, in eval mode.

    Raises:
        InputError: If it is none.
    """
    if not isinstance(made, nn.Module):
        raise InputError(f"{where}: must be or return an nn.Module, got {type(made).__name__}")
    try:
        inspect.signature(made.forward).bind(torch.zeros(0))
    except TypeError as error:
        names = ", ".join(inspect.signature(made.forward).parameters) or "none"
        raise InputError(
            f"{where}: forward must take one tensor, got {names}: wrap the network in a module "
            "whose forward takes one and hands on its parts; a task of your own (task.factory) "
            "packs them into one, and says how to get the loss"
        ) from error
    return made.float().cpu().eval()


def outputs_of(model: nn.Module, inputs: Tensor, where: str = "the network") -> Any:
    """Run a network of the user's once, without gradients.

    Args:
        model: The network.
        inputs: One tensor.
        where: What it is called in messages.

    Raises:
        InputError: If it fails, whatever the reason.
    """
    shape = tuple(inputs.shape)
    try:
        with torch.no_grad():
            return called(lambda: model(inputs), {}, f"{where}, given one tensor of shape {shape}")
    except InputError as error:
        if not isinstance(error.__cause__, TypeError | IndexError | AttributeError):
            raise
        # As of a forward that takes a dict: a tensor has neither its keys nor its methods.
        raise InputError(
            f"{error}: if it takes a dict or a list, wrap it in a module whose forward takes one "
            "tensor and hands on its parts"
        ) from error


def source_of(thing: object) -> str:
    """Return the text of a function or a class, or its name where there is none."""
    try:
        return inspect.getsource(thing)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing)}"
