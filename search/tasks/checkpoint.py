"""Weights in and out of files: safetensors, or torch files without code in them."""

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from hawq.attention import project_state
from hawq.finetune.folding import fold_state
from search.errors import InputError
from search.folder import write_atomically

__all__ = ["load_weights", "read_state", "save_state", "state_sha256"]


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint into a network.

    A ``module.`` before every name (data-parallel training) is dropped, and a torch file may hold
    the weights under ``state_dict`` or ``model``. A folded network takes those of the unfolded one,
    one with projected attention those of the joint one.

    Raises:
        InputError: If the file cannot be read, or names or shapes do not match.
    """
    state = _folded(model, project_state(model, read_state(path)))
    expected = model.state_dict()
    # Old checkpoints lack this counter of batch-norm, which evaluation never reads.
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - state.keys() - optional)
    unknown = sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    complaints = [
        f"{what} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unknown", unknown), ("shapes:", shapes))
        if names
    ]
    if complaints:
        raise InputError(
            f"task.checkpoint: {path} must fit {type(model).__name__}, got "
            f"{'; '.join(complaints)}: check task.network"
        )
    model.load_state_dict(state, strict=False)


def _folded(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return fold_state(model, state)
    except (KeyError, RuntimeError):  # of another network: the caller says in what way
        return state


def read_state(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a safetensors or torch file.

    Raises:
        InputError: If the file is missing or holds anything else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"task.checkpoint: {path} must be a file of weights ({error.strerror})"
        ) from error
    if path.suffix == ".safetensors":
        try:
            return load(content)
        except SafetensorError as error:
            raise InputError(f"task.checkpoint: {path} must be safetensors ({error})") from error
    # A zip archive, or a pickle of the time before 2020; torch's reader trips over anything else.
    if not content.startswith((b"PK", b"\x80")):
        raise InputError(f"task.checkpoint: {path} must be safetensors or a torch file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = str(error).strip().splitlines()[0]
        if code is not None:
            reason = f"it holds {code[1]}, which is code and is not run: save model.state_dict()"
        elif "weights_only" in reason:  # torch's own advice is to run what it holds
            reason = "it may hold code, which is not run: save model.state_dict()"
        raise InputError(
            f"task.checkpoint: {path} must be a torch file of tensors alone ({reason})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"task.checkpoint: {path} must hold named tensors, got {type(state)}")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, atomically; what several names share is written for each.

    A tensor that several layers read has one quantizer, and the layers a name for it each.
    """
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in stored else tensor
        stored.add(storage)
    write_atomically(path, save(tensors))


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash named tensors: names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
