"""Code of the user's that travels: by value where another machine could not import it.

What lies in the standard library or is installed goes by name, as pickle has it. A script, a
notebook or a folder of modules is nowhere on a worker, so its functions and classes go themselves.
"""

import pickle
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ray import cloudpickle

from search.errors import InputError

__all__ = ["packed", "unpacked"]

# Ours, which every worker has, also where they are installed from a checkout.
_OURS = {"hawq", "envs", "search"}
_STANDARD = Path(sysconfig.get_path("stdlib")).resolve()
_INSTALLED = {"site-packages", "dist-packages"}


def packed(thing: object, what: str) -> bytes:
    """Pickle a thing with the user's own code in it.

    Args:
        thing: A network, a function, or a collection of them.
        what: Its name in a message.

    Raises:
        InputError: If it holds something that cannot be pickled, such as an open file.
    """
    with _by_value():
        try:
            content: bytes = cloudpickle.dumps(thing)
        except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{what}: must be picklable to travel, got {error}") from error
    return content


def unpacked(content: bytes) -> Any:
    """Read what ``packed`` returned; this runs the user's code."""
    return pickle.loads(content)


@contextmanager
def _by_value() -> Iterator[None]:
    """Let cloudpickle take the user's modules by value."""
    before = cloudpickle.list_registry_pickle_by_value()
    # By name, for a script is there twice: as __main__, and as multiprocessing calls it.
    found = {m.__name__: m for m in list(sys.modules.values()) if _is_own(m)}
    own = [module for name, module in found.items() if name not in before]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def _is_own(module: object) -> bool:
    """Whether a module is the user's: it has a file, which is not where packages are installed."""
    if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] in _OURS:
        return False
    file = module.__dict__.get("__file__")  # not getattr: lazy modules import themselves then
    if not isinstance(file, str) or sys.modules.get(module.__name__) is not module:
        return False
    path = Path(file).resolve()
    return not (_INSTALLED & set(path.parts) or path.is_relative_to(_STANDARD))
