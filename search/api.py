"""A whole search from Python: a network, its examples, a loss, a score, and what it may cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from search.artefacts import Summary
from search.config import SearchConfig
from search.config_file import mistakes
from search.errors import InputError
from search.events import Listener
from search.pipeline import run as run_search
from search.tasks.examples import Batches
from search.tasks.given import Augment, Loss, given, store

__all__ = ["run"]


def run(
    model: nn.Module | Callable[[], nn.Module],
    batches: Batches,
    loss: Loss | None = None,
    metric: Loss | None = None,
    *,
    budgets: Sequence[Mapping[str, float]],
    out: Path | str = "runs/search",
    augment: Augment | None = None,
    search_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    force: bool = False,
    listeners: Iterable[Listener] = (),
) -> Summary:
    """Search any network, and fine-tune the best candidates.

    Network and examples are kept in the run's folder, where workers and later commands (``hawq
    allocate``, ``hawq export``) find them. Code that workers could not import travels with them.

    Args:
        model: The network with its weights, or a function that builds it; its forward takes one
            tensor.
        batches: For ``"train"``, ``"test"`` and, where there is one that the network was not
            trained on, ``"search"``: inputs, shape (N, …), and targets, N rows; or batches of such
            pairs, such as a DataLoader.
        loss: Takes outputs and targets, returns one value an example, or a loss of torch's; None
            for cross-entropy.
        metric: Likewise, higher is better; None for the accuracy of classes.
        budgets: What the weights or activations may cost: ``{"average_bits": 3}``.
        out: The run's folder; finished stages in it are skipped.
        augment: Takes a training batch's inputs and a generator, returns the same shape.
        search_size: Training examples held out as the search split where none is given; None for
            one in ten.
        settings: Other sections of the config, as in YAML: ``{"finetune": {"epochs": 3}}``;
            ``{"task": {"pretrain": {…}}}`` trains the network first.
        seed: Of everything that is drawn.
        force: Run again the stages that changed settings invalidate.
        listeners: Called with every event.

    Returns:
        The whole run as data; ``summary.json`` and ``report.html`` are in the folder.

    Raises:
        InputError: If something that was given is wrong.
    """
    sections = dict(settings or {})
    task = dict(sections.pop("task", {}))
    found = given(
        model,
        batches,
        loss,
        metric,
        augment=augment,
        search_size=search_size,
        trained="pretrain" not in task,
        seed=seed,
    )
    folder = store(found, Path(out).resolve() / "given")
    task |= {"factory": "search.tasks.given:stored", "arguments": {"folder": str(folder)}}
    raw = {"seed": seed, "task": task, "budgets": [dict(budget) for budget in budgets], **sections}
    try:
        config = SearchConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError("\n".join(mistakes(error, SearchConfig))) from error
    return run_search(config, Path(out), name=Path(out).name, force=force, listeners=listeners)
