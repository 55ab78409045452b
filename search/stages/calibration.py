"""Stage 5: how far Ω can be trusted, against the measured loss and against its own errors."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawq.allocate.stability import stability
from hawq.allocation import Allocation
from hawq.finetune.untrained import untrained_losses
from hawq.quantizers import Schemes
from hawq.task import Task
from search.artefacts import (
    Agreement,
    BudgetLimit,
    BudgetStability,
    CalibrationArtefact,
    Candidate,
    CandidateIncrease,
    CandidatesArtefact,
    GroupIncrease,
    TablesArtefact,
)
from search.calibration import (
    Bits,
    Gained,
    agreement,
    interactions,
    is_clear,
    key_of,
    mean_and_error,
    spread,
)
from search.folder import content_hash
from search.searchers import SEARCHERS, Problem
from search.stages.search import Search
from search.tables import Tables
from search.trials import calibration_inputs

__all__ = ["inputs", "make"]

# Allocations a unit of work: fixed, so that any number of workers gives the same bits.
_CHUNK = 16


def inputs(search: Search) -> dict[str, Any]:
    """How much is measured, the tables, and the candidates."""
    config = search.config
    return {
        "config": {"seed": config.seed, "calibration": config.calibration.model_dump()},
        "model": search.model.weights_sha256,
        "tables": content_hash(search.tables.model_dump(mode="json")),
        "candidates": [[c.method, c.budget, c.digest] for c in search.candidates],
        "limits": [budget.limits for budget in _budgets(search)],
    }


def make(search: Search) -> CalibrationArtefact:
    """Measure single choices, candidates and pairs; draw the traces again."""
    tables, config = Tables.of(search.tables), search.config.calibration
    distinct = list({c.digest: c for c in search.candidates}.values())
    singles = spread(tables.space, config.choices)
    more = _missing_singles(distinct, singles, config.choices)
    chosen = _paired_bits(search, tables)
    wanted = [dict([choice]) for choice in sorted([*singles, *more], key=_order(tables))]
    wanted += [dict(pair) for size in (1, 2) for pair in combinations(chosen.items(), size)]
    wanted += [c.bits for c in distinct]
    drawn = _draw_again(search)
    losses, gained = _measure(search, wanted)
    choices = [
        _single(tables, choice, gained[frozenset([choice])], choice in singles)
        for choice in sorted([*singles, *more], key=_order(tables))
        if frozenset([choice]) in gained
    ]
    even = [c for c in choices if c.is_spread]
    loss, error = mean_and_error(losses)
    increases = [_candidate(c, gained) for c in distinct if key_of(c.bits) in gained]
    return CalibrationArtefact(
        num_examples=len(losses),
        loss=loss,
        standard_error=error,
        choices=choices,
        all_choices=_agreement(even, gained, search.config.seed),
        clear_choices=_agreement(
            [c for c in even if is_clear(c.increase, c.standard_error)], gained, search.config.seed
        ),
        candidates=increases,
        num_overflows=len(singles) + len(more) + len(distinct) - len(choices) - len(increases),
        interactions=interactions(chosen, gained),
        num_draws=config.draws,
        stability=_collect(search, drawn),
    )


def _budgets(search: Search) -> list[BudgetLimit]:
    return search.folder.load("candidates", CandidatesArtefact)[0].budgets


def _order(tables: Tables) -> Callable[[tuple[str, int]], tuple[int, int]]:
    """Sort choices as the space is: a chunk of weights alone needs no samples of activations."""
    places = {name: i for i, name in enumerate(tables.space.names)}
    return lambda choice: (places[choice[0]], choice[1])


def _missing_singles(
    candidates: Sequence[Candidate], have: Sequence[tuple[str, int]], most: int
) -> list[tuple[str, int]]:
    """Return what the sums of layers' candidates lack, one after the other while it is not much."""
    found: dict[tuple[str, int], None] = {}
    for candidate in candidates:
        lacking = [c for c in candidate.bits.items() if c not in have and c not in found]
        if candidate.granularity == "layer" and len(found) + len(lacking) <= most:
            found |= dict.fromkeys(lacking)
    return list(found)


def _paired_bits(search: Search, tables: Tables) -> dict[str, int]:
    """Return the allocation of which pairs are measured; empty where there are too many groups."""
    if len(tables.space) > search.config.calibration.interactions:
        return {}
    first = _budgets(search)[0].label
    of_layers = [c for c in search.candidates if c.granularity == "layer" and c.budget == first]
    ranked = sorted(of_layers, key=lambda c: c.method != "exact")
    return next((candidate.bits for candidate in ranked), {})


def _measure(search: Search, wanted: Sequence[Bits]) -> tuple[NDArray[np.float64], Gained]:
    """Return the unquantized losses, shape (N,), and what every quantization adds to them."""
    trials = search.config.trials
    distinct = list({key_of(bits): bits for bits in [{}, *wanted]}.values())
    size = search.task.size("train")
    generator = torch.Generator().manual_seed(search.config.seed)
    indices = torch.randperm(size, generator=generator)[: search.config.calibration.examples]
    remote = _losses.options(name="calibration:losses", num_cpus=trials.cpus, num_gpus=trials.gpus)
    state = ray.put(search.weights)
    pending = [
        remote.remote(
            search.task, state, chunk, indices, trials.cpus, trials.gpus > 0, search.config.schemes
        )
        for chunk in _chunks(distinct)
    ]
    for done in range(1, len(pending) + 1):
        ray.wait(pending, num_returns=done)
        search.progress("calibration", min(done * _CHUNK, len(distinct)), len(distinct), "choices")
    rows = []
    for losses, cpu_seconds in ray.get(pending):
        search.worker_cpu_seconds += cpu_seconds
        rows += list(losses)
    added = {key_of(bits): row - rows[0] for bits, row in zip(distinct, rows, strict=True)}
    return rows[0], {key: values for key, values in added.items() if np.isfinite(values).all()}


def _chunks(of: Sequence[Bits]) -> Iterator[list[Bits]]:
    rest = iter(of)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


@ray.remote(max_retries=3)
def _losses(
    task: Task,
    state: dict[str, Tensor],
    allocations: Sequence[Bits],
    indices: Tensor,
    cpus: float,
    gpu: bool,
    schemes: Schemes,
) -> tuple[Any, float]:
    torch.set_num_threads(max(1, int(cpus)))
    started = time.process_time()
    device = "cuda" if gpu else "cpu"
    model = task.model()
    model.load_state_dict(state)
    model.to(device)
    losses = untrained_losses(
        model, task, allocations, indices, lambda: calibration_inputs(task, device), schemes
    )
    return losses.numpy(), time.process_time() - started


def _single(
    tables: Tables, choice: tuple[str, int], gained: NDArray[np.float64], is_spread: bool
) -> GroupIncrease:
    name, bits = choice
    space = tables.space
    omega = tables.sensitivity[space.names.index(name), space.widths.index(bits)]
    increase, error = mean_and_error(gained)
    return GroupIncrease(
        group=name,
        bits=bits,
        predicted=float(omega) / 2,
        increase=increase,
        standard_error=error,
        is_spread=is_spread,
    )


def _agreement(choices: Sequence[GroupIncrease], gained: Gained, seed: int) -> Agreement:
    rows = [gained[frozenset([(c.group, c.bits)])] for c in choices]
    num_images = len(next(iter(gained.values())))
    predicted = np.array([c.predicted for c in choices])
    return agreement(predicted, np.array(rows).reshape(len(rows), num_images), seed)


def _candidate(candidate: Candidate, gained: Gained) -> CandidateIncrease:
    increase, error = mean_and_error(gained[key_of(candidate.bits)])
    singles = [gained.get(frozenset([choice])) for choice in candidate.bits.items()]
    measured = [single for single in singles if single is not None]
    together = None
    if len(measured) == len(singles):
        together = mean_and_error(np.sum(measured, 0))
    return CandidateIncrease(
        digest=candidate.digest,
        predicted=candidate.sensitivity / 2,
        increase=increase,
        standard_error=error,
        sum_of_singles=together and together[0],
        sum_error=together and together[1],
    )


def _draw_again(search: Search) -> list[Any]:
    """Let workers draw the traces again and solve, a budget each."""
    config = search.config
    method = "exact" if "exact" in config.methods else "hawq-v2"
    remote = _stability.options(name="calibration:stability", num_cpus=config.trials.cpus)
    return [
        remote.remote(search.tables, budget, method, config.calibration.draws, config.seed)
        for budget in _budgets(search)
    ]


def _collect(search: Search, pending: list[Any]) -> list[BudgetStability]:
    for done in range(1, len(pending) + 1):
        ray.wait(pending, num_returns=done)
        search.progress("calibration", done, len(pending), "budgets")
    found = ray.get(pending)
    search.worker_cpu_seconds += sum(cpu_seconds for _, cpu_seconds in found)
    return [stable for stable, _ in found]


@ray.remote(max_retries=3)
def _stability(
    artefact: TablesArtefact, budget: BudgetLimit, method: str, draws: int, seed: int
) -> tuple[BudgetStability, float]:
    started = time.process_time()
    tables = Tables.of(artefact)

    def solve(sensitivity: NDArray[np.float64], traces: NDArray[np.float64]) -> Allocation:
        drawn = replace(tables, sensitivity=sensitivity, traces=traces)
        problem = Problem(drawn, drawn.budgets(budget.limits), drawn.proxy)
        found = SEARCHERS[method].search(problem, evaluations=1, seed=seed)
        return max(found, key=lambda e: e.score).allocation

    found = stability(
        tables.space,
        tables.traces,
        tables.trace_errors,
        np.array(artefact.squared_error),
        solve,
        draws=draws,
        seed=seed,
    )
    stable = BudgetStability(
        budget=budget.label,
        method=method,
        digest=found.chosen.digest,
        kept=found.kept,
        kept_error=found.kept_error,
        groups=list(tables.space.names),
        chosen_bits=list(found.chosen.bits),
        least_bits=found.least.tolist(),
        median_bits=found.median.tolist(),
        most_bits=found.most.tolist(),
        regret=found.regret,
        regret_error=found.regret_error,
        regret_95=found.regret_95,
    )
    return stable, time.process_time() - started
