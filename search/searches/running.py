"""One search after another, or as many at once as there are CPUs."""

import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import ray
import torch

from hawq.allocation import Allocation, by_owner
from search.evaluate import Evaluation
from search.folder import write_atomically
from search.machine import machine, machine_line
from search.searched import ScoredAllocation, SearchRecord
from search.searchers import SEARCHERS, Effort, Problem
from search.searchers.climbing import ClimbingSearcher
from search.searchers.processes import ProcessSearcher
from search.searches.evaluator import Retried
from search.searches.log import EvaluationLog

__all__ = ["SearchFailedError", "SearchSpec", "read_record", "run_search", "run_searches"]

_POLL_SECONDS = 1.0
# Of a search whose runners do the work.
_DRIVER_CPUS = 0.1


class SearchFailedError(RuntimeError):
    """A search cannot go on; what it scored is kept."""


@dataclass(frozen=True, slots=True)
class SearchSpec:
    """A search, and where it is kept.

    Attributes:
        method: Its name.
        budget: The label of the budget.
        seed: Of everything random.
        evaluations: Distinct allocations that it may score.
        folder: ``evaluations.jsonl``, ``record.json``, ``failures.jsonl`` and an agent's state.
        inputs: Hash of everything that it depends on.
    """

    method: str
    budget: str
    seed: int
    evaluations: int
    folder: Path
    inputs: str

    @property
    def log(self) -> Path:
        """The file of its evaluations."""
        return self.folder / "evaluations.jsonl"

    @property
    def record(self) -> Path:
        """The file of its result."""
        return self.folder / "record.json"

    @property
    def num_done(self) -> int:
        """Evaluations on disk."""
        if not self.log.exists():
            return self.evaluations if self.record.exists() else 0
        with self.log.open("rb") as file:
            return max(0, sum(1 for _ in file) - 1)


def read_record(spec: SearchSpec) -> SearchRecord | None:
    """Return a search's result; None where it has none, or one of other inputs."""
    if not spec.record.exists():
        return None
    kept = SearchRecord.model_validate_json(spec.record.read_text(encoding="utf-8"))
    return kept if kept.inputs == spec.inputs else None


def run_search(spec: SearchSpec, problem: Problem) -> SearchRecord:
    """Search, or go on where the folder stands. Needs no cluster without runners, but for RLlib.

    Args:
        spec: The search.
        problem: What is searched.

    Raises:
        EvaluationFailedError: If a score fails here and elsewhere.
        ValueError: If there is nothing to choose.
    """
    kept = read_record(spec)
    if kept is not None:
        return kept
    log = EvaluationLog(spec.log, spec.inputs, problem.tables.space)
    if not log.found:  # an agent that knows another search's allocations is another agent
        (spec.folder / "agent").unlink(missing_ok=True)
    failures = spec.folder / "failures.jsonl"
    effort = replace(problem.effort, checkpoint=spec.folder / "agent")
    evaluate = Retried(problem.evaluate, failures, cpus=effort.cpus, gpus=effort.gpus)
    problem = replace(problem, evaluate=evaluate, effort=effort)
    if len(log.found) < spec.evaluations:
        _go_on(spec, problem, log)
    record = _record(spec, problem, log, _reasons(failures))
    write_atomically(spec.record, record.model_dump_json())
    (spec.folder / "agent").unlink(missing_ok=True)
    return record


def _go_on(spec: SearchSpec, problem: Problem, log: EvaluationLog) -> None:
    """Search until the evaluations are spent, or the method has nothing more to say."""
    known = {found.digest for found in log.found}
    spent = log.found[-1].seconds if log.found else 0.0
    began = time.process_time()
    with closing(_searched(SEARCHERS[spec.method].search, problem, spec)) as evaluations:
        for evaluation in evaluations:
            own = time.process_time() - began
            began += own
            # Agents go on, samplers begin again and find what they scored: nothing is paid twice.
            if evaluation.allocation.digest in known:
                continue
            known.add(evaluation.allocation.digest)
            # A score is charged what it cost when it was computed, whoever computed it.
            here = evaluation.spent if _is_alone(spec, problem.effort) else 0.0
            spent += own - here + evaluation.seconds
            log.add(_scored(problem, evaluation, spent), evaluation)
            if len(log.found) >= spec.evaluations:
                return


def _searched(
    search: Callable[..., Iterable[Evaluation]], problem: Problem, spec: SearchSpec
) -> Generator[Evaluation]:
    """Make something that can be closed of whatever a searcher returns."""
    # Methods with the same seed must not begin with the same allocations.
    own = np.random.SeedSequence([spec.seed, crc32(spec.method.encode())]).generate_state(1)[0]
    yield from search(problem, evaluations=spec.evaluations, seed=int(own) >> 2)


def _scored(problem: Problem, evaluation: Evaluation, seconds: float) -> ScoredAllocation:
    tables, allocation = problem.tables, evaluation.allocation
    costs = {name: cost.of(tables.space, allocation) for name, cost in tables.costs.items()}
    return ScoredAllocation(
        digest=allocation.digest,
        score=evaluation.score,
        seconds=seconds,
        weight_bits=costs["weight_bits"],
        activation_bits=costs.get("activation_bits"),
        sensitivity=tables.omega(allocation),
    )


def _record(
    spec: SearchSpec, problem: Problem, log: EvaluationLog, failures: list[str]
) -> SearchRecord:
    best = max(range(len(log.found)), key=lambda i: log.found[i].score)
    allocation: Allocation = log.allocation(best)
    short = len(log.found) < spec.evaluations
    return SearchRecord(
        method=spec.method,
        budget=spec.budget,
        seed=spec.seed,
        evaluations=log.found,
        num_starts=_num_starts(spec, problem, log),
        episodes=log.episodes,
        cpu_seconds=log.found[-1].seconds,
        machine=machine_line(machine()),
        failures=failures,
        reason="it proposed nothing new any more" if short else "",
        bits={
            owner: b if isinstance(b, int) else list(b)
            for owner, b in by_owner(
                dict(zip(allocation.names, allocation.bits, strict=True))
            ).items()
        },
        fidelity=log.fidelity,
        inputs=spec.inputs,
    )


def _num_starts(spec: SearchSpec, problem: Problem, log: EvaluationLog) -> int:
    """Count the first evaluations that are of what the method begins with."""
    given = {found.digest for found in _searcher(spec.method).beginnings(problem)}
    return sum(1 for _ in takewhile(lambda found: found.digest in given, log.found))


def _reasons(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [f"{told['digest']}: {told['reason']}" for told in map(json.loads, lines)]


def run_searches(
    specs: Sequence[SearchSpec],
    problems: Mapping[tuple[str, bool], Problem],
    *,
    effort: Effort,
    progress: Callable[[int, int], None] = lambda *_: None,
    finished: Callable[[SearchRecord], None] = lambda _: None,
) -> list[SearchRecord]:
    """Run searches on the cluster, as many at once as fit.

    Args:
        specs: The searches.
        problems: By the label of the budget and whether channels are searched.
        effort: What scores for a search, and what that takes; as the problems have it.
        progress: Told how many evaluations are done, of how many.
        finished: Given each record as it comes.

    Returns:
        In the order of ``specs``.

    Raises:
        SearchFailedError: If a method cannot choose in its problem, before anything is scored; or
            if a search cannot go on, such as for a score that fails for good: the others are
            stopped.
    """
    _check(specs, problems)
    shared = {key: ray.put(problem) for key, problem in problems.items()}
    total = sum(spec.evaluations for spec in specs)
    waiting = list(enumerate(specs))
    pending: dict[Any, int] = {}
    records: dict[int, SearchRecord] = {}
    try:
        while waiting or pending:
            while waiting and _fits([specs[i] for i in pending.values()], waiting[0][1], effort):
                i, spec = waiting.pop(0)
                alone = _is_alone(spec, effort)
                remote = _run_search.options(
                    name=f"search:{spec.method}",
                    num_cpus=effort.cpus if alone else _DRIVER_CPUS,
                    num_gpus=effort.gpus if alone else 0,
                )
                problem = shared[spec.budget, SEARCHERS[spec.method].by_channel]
                pending[remote.remote(spec, problem, effort.cpus)] = i
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_SECONDS)
            for reference in ready:
                i = pending.pop(reference)
                records[i] = _result(specs[i], reference)
                finished(records[i])
            progress(sum(spec.num_done for spec in specs), total)
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
    return [records[i] for i in range(len(specs))]


def _check(specs: Sequence[SearchSpec], problems: Mapping[tuple[str, bool], Problem]) -> None:
    """Refuse what no search of a method could begin with, before anything is scored."""
    for method, budget in dict.fromkeys((spec.method, spec.budget) for spec in specs):
        try:
            _searcher(method).beginnings(problems[budget, SEARCHERS[method].by_channel])
        except ValueError as error:
            raise SearchFailedError(f"{method} at {budget}: {error}") from error


def _searcher(method: str) -> ProcessSearcher | ClimbingSearcher:
    searcher = SEARCHERS[method]
    assert isinstance(searcher, ProcessSearcher | ClimbingSearcher), "the others score nothing"
    return searcher


def _is_alone(spec: SearchSpec, effort: Effort) -> bool:
    """Whether a search scores in its own process: a climber's next step needs its last score."""
    return not effort.runners or isinstance(SEARCHERS[spec.method], ClimbingSearcher)


def _fits(running: Sequence[SearchSpec], more: SearchSpec, effort: Effort) -> bool:
    """Whether the cluster holds another search with all of its runners.

    Ray would start it as soon as the driver fits: searches that hold a part of their runners each
    would wait for one another for ever.
    """
    if not running:
        return True
    have: dict[str, float] = ray.cluster_resources()
    searches = [*running, more]
    processes = sum(1 if _is_alone(spec, effort) else effort.runners for spec in searches)
    drivers = sum(not _is_alone(spec, effort) for spec in searches)
    return processes * effort.cpus + drivers * _DRIVER_CPUS <= have.get(
        "CPU", 0.0
    ) and processes * effort.gpus <= have.get("GPU", 0.0)


def _result(spec: SearchSpec, reference: Any) -> SearchRecord:
    try:
        return SearchRecord.model_validate(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        reason = str(getattr(error, "cause", error)).strip().splitlines()[0]
        told = f"{spec.method} at {spec.budget}, seed {spec.seed}: {reason}"
        raise SearchFailedError(told) from error


@ray.remote(max_retries=3)
def _run_search(spec: SearchSpec, problem: Problem, cpus: float) -> dict[str, object]:
    torch.set_num_threads(max(1, int(cpus)))
    return run_search(spec, problem).model_dump()
