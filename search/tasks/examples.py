"""Examples as a user has them: whole splits, or batches of them; gathered, and a part held out."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from search.errors import InputError

__all__ = ["SPLITS", "Batches", "Rows", "gathered", "picked"]

# Inputs, shape (N, …), and targets, N rows.
Rows = tuple[Tensor, Any]
# Of each split, all of it, or batches of it, such as a DataLoader.
Batches = Mapping[str, Rows | Iterable[Rows]]

SPLITS = ("train", "search", "test")
_HELD_OUT = 10


def gathered(batches: Batches, search_size: int | None, seed: int) -> tuple[dict[str, Rows], bool]:
    """Gather every split, and draw the search split where there is none.

    Args:
        batches: As ``given`` takes them.
        search_size: Training examples held out; None for one in ten.
        seed: Of the draw.

    Returns:
        The splits, and whether the search split is a part of the training split.

    Raises:
        InputError: If something is not what it must be.
    """
    known = _named(batches)
    splits = {split: _rows(known[split], split) for split in SPLITS if split in known}
    if "search" in splits:
        return splits, False
    return splits | _held_out(splits["train"], search_size, seed), True


def picked(rows: Rows, indices: Tensor) -> Rows:
    """Return rows by index, shape (N,)."""
    found: Rows = tree_map_only(Tensor, lambda leaf: leaf[indices], rows)
    return found


def _named(batches: Batches) -> Batches:
    if not isinstance(batches, Mapping) or not {"train", "test"} <= batches.keys() <= set(SPLITS):
        got = ", ".join(map(str, batches)) if isinstance(batches, Mapping) else type(batches)
        raise InputError(
            f"batches: must map 'train' and 'test', and 'search' where there is one, got {got}"
        )
    return batches


def _rows(examples: Rows | Iterable[Rows], split: str) -> Rows:
    """Gather one pair of inputs and targets; batches may be several."""
    where = f"batches[{split!r}]"
    whole = (
        isinstance(examples, tuple)
        and len(examples) == 2
        and (isinstance(examples[0], Tensor) or not isinstance(examples[1], tuple | list))
    )
    pairs: list[Any] = [examples] if whole else list(examples)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(
                f"{where}: must be inputs and targets, or batches of them, "
                f"got {type(pair).__name__}"
            )
        if not isinstance(pair[0], Tensor):
            raise InputError(
                f"{where}: inputs must be one tensor, got {type(pair[0]).__name__}: put them into "
                "one, and wrap the network in a module that takes it apart"
            )
    if not pairs:
        raise InputError(f"{where}: must hold examples, got none")
    columns = [tree_flatten(tuple(pair)) for pair in pairs]
    leaves = [
        [leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf) for leaf in values]
        for values, _ in columns
    ]
    try:
        together = [torch.cat(parts) for parts in zip(*leaves, strict=True)]
    except (RuntimeError, ValueError) as error:
        shapes = sorted({tuple(pair[0].shape[1:]) for pair in pairs})
        raise InputError(
            f"{where}: examples must have one shape, got {', '.join(map(str, shapes[:4]))} "
            f"({str(error).splitlines()[0]})"
        ) from error
    if len({len(leaf) for leaf in together}) != 1 or not len(together[0]):
        raise InputError(
            f"{where}: inputs and targets must have one row an example, "
            f"got {', '.join(str(len(leaf)) for leaf in together)}"
        )
    rows: Rows = tree_unflatten(together, columns[0][1])
    return rows


def _held_out(train: Rows, search_size: int | None, seed: int) -> dict[str, Rows]:
    """Draw the search split from the training split."""
    total = len(train[0])
    size = total // _HELD_OUT if search_size is None else search_size
    if not 0 < size < total:
        raise InputError(f"search_size: must be within 1..{total - 1}, got {size}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    parts = {"search": order[:size].sort().values, "train": order[size:].sort().values}
    return {split: picked(train, part) for split, part in parts.items()}
