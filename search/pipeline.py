"""The search from end to end: a list of stages, each skipped when its artefact is there.

    model → curvature → tables → (searches) → candidates → (agreement) → calibration → (study)
          → trials → test → report

Read ``STAGES`` and ``run``, then any file of ``search/stages/`` alone.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel

from hawq.allocation import Allocation
from hawq.cost import Cost
from hawq.curvature import NonFiniteTraceError
from hawq.finetune import DivergedError, Recipe
from hawq.space import Space
from hawq.task import Task
from search.artefacts import (
    CalibrationArtefact,
    CandidatesArtefact,
    CurvatureArtefact,
    ModelArtefact,
    StageCost,
    StudyArtefact,
    Summary,
    TablesArtefact,
    TestArtefact,
    TrialsArtefact,
)
from search.cluster import connected, refuse_unreachable
from search.comparison.file import write_comparison
from search.comparison.making import compared
from search.config import Budget, SearchConfig
from search.errors import InputError
from search.events import EventLog, Listener
from search.fit import refuse_impossible
from search.folder import RunFolder, write_atomically
from search.machine import machine, versions
from search.report import write_report
from search.report.comparison_page import write_comparison_page
from search.searched import AgreementArtefact, SearchesArtefact
from search.searches import SearchFailedError
from search.spaces import reads_of, space_of
from search.stages import (
    agreement,
    calibration,
    candidates,
    curvature,
    model,
    searches,
    study,
    tables,
    test,
    trials,
)
from search.stages.search import Search
from search.tables import network_costs
from search.tasks.build import build_task
from search.tasks.checkpoint import load_weights
from search.tasks.rewritten import FoldedTask, folding
from search.telemetry import Telemetry
from search.trials.tracking import refuse_untrackable

__all__ = [
    "AGREEMENT",
    "SEARCHES",
    "STAGES",
    "STUDY",
    "Stage",
    "prepared",
    "run",
    "stages_of",
    "trained",
]


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: Of the stage and its artefact.
        artefact: What it makes.
        inputs: What the artefact depends on, as plain data; under ``"config"`` what the user set.
        make: Makes the artefact.
        uses_ray: Whether making it needs a cluster.
    """

    name: str
    artefact: type[BaseModel]
    inputs: Callable[[Search], dict[str, Any]]
    make: Callable[[Search], BaseModel]
    uses_ray: bool = False


STAGES = (
    Stage("model", ModelArtefact, model.inputs, model.make, uses_ray=True),
    Stage("curvature", CurvatureArtefact, curvature.inputs, curvature.make, uses_ray=True),
    Stage("tables", TablesArtefact, tables.inputs, tables.make),
    Stage("candidates", CandidatesArtefact, candidates.inputs, candidates.make),
    Stage("calibration", CalibrationArtefact, calibration.inputs, calibration.make, uses_ray=True),
    Stage("trials", TrialsArtefact, trials.inputs, trials.make, uses_ray=True),
    Stage("test", TestArtefact, test.inputs, test.make, uses_ray=True),
)
# Before the candidates, where a method scores what it tries.
SEARCHES = Stage("searches", SearchesArtefact, searches.inputs, searches.make, uses_ray=True)
# After them, where searches are compared.
AGREEMENT = Stage("agreement", AgreementArtefact, agreement.inputs, agreement.make, uses_ray=True)
# Before the trials, where the config asks for it.
STUDY = Stage("study", StudyArtefact, study.inputs, study.make, uses_ray=True)


def stages_of(config: SearchConfig) -> tuple[Stage, ...]:
    """Return the stages of a search, in order."""
    asked = {
        "candidates": (
            (SEARCHES,) if config.searching else (),
            (AGREEMENT,) if config.comparison else (),
        ),
        "trials": ((STUDY,) if config.study else (), ()),
    }
    found: list[Stage] = []
    for stage in STAGES:
        before, after = asked.get(stage.name, ((), ()))
        found += [*before, stage, *after]
    return tuple(found)


def run(
    config: SearchConfig,
    out: Path,
    *,
    name: str = "search",
    attempt: int = 1,
    force: bool = False,
    listeners: Iterable[Listener] = (),
) -> Summary:
    """Run a search, or the rest of one; Ray's metrics tell of it, too.

    Args:
        config: What to search.
        out: The run's folder; finished stages in it are skipped.
        name: For the report's title, and of its metrics.
        attempt: Number of those at this search, for its metrics.
        force: Run again the stages that a changed config invalidates, instead of refusing.
        listeners: Called with every event.

    Returns:
        The whole run as data; ``summary.json`` and ``report.html`` are in the folder.

    Raises:
        InputError: If something that was given is wrong; nothing is half-written then.
    """
    told: list[Listener] = [*listeners, Telemetry(name, attempt)]
    with _under_way(config, out, stages_of(config), force, told) as (search, cluster):
        _refuse_recipe(search.task, config.finetune.recipe(), "finetune")
        for remark in search.task.remarks() if hasattr(search.task, "remarks") else ():
            search.events.emit("run", "warning", remark)
        kept = folding(search.task).kept if isinstance(search.task, FoldedTask) else {}
        for norm, reason in kept.items():
            search.events.emit("run", "warning", f"batch-norm {norm} is not folded: {reason}")
        resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_atomically(out / "config.yaml", resolved)
        for stage in stages_of(config):
            _finish(search, stage, cluster)
        return _report(search, name)


@contextmanager
def trained(
    config: SearchConfig, out: Path, *, listeners: Iterable[Listener] = ()
) -> Iterator[Search]:
    """Have the network of a search, trained if need be, and a cluster, but nothing more.

    Args:
        config: What to search.
        out: The run's folder, where a trained network is found or left.
        listeners: Called with every event.

    Raises:
        InputError: If something that was given is wrong.
    """
    with _under_way(config, out, STAGES[:1], False, listeners) as (search, cluster):
        _finish(search, STAGES[0], cluster)
        cluster()
        yield search


@contextmanager
def _under_way(
    config: SearchConfig,
    out: Path,
    stages: Sequence[Stage],
    force: bool,
    listeners: Iterable[Listener],
) -> Iterator[tuple[Search, Callable[[], None]]]:
    """Lock the folder; yield the search and what connects to the cluster, once."""
    folder = RunFolder(out)
    search = prepared(config, folder, EventLog(out / "events.jsonl", listeners))
    if not force:
        _refuse_changes(search, stages)
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        stack.enter_context(folder.locked())

        @cache
        def cluster() -> None:
            where = connected(
                config.ray.address, dashboard=config.ray.dashboard, about={"job_name": out.name}
            )
            search.events.emit("run", "note", stack.enter_context(where))

        yield search, cluster


def _finish(search: Search, stage: Stage, cluster: Callable[[], None]) -> None:
    """Make a stage, unless it is there."""
    inputs = stage.inputs(search)
    if search.folder.inputs(stage.name) == inputs:
        search.events.emit(stage.name, "skipped", "already there")
        return
    if stage.uses_ray:
        cluster()
    _make(search, stage, inputs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread here: the same bits on any machine, and workers keep their cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prepared(config: SearchConfig, folder: RunFolder, events: EventLog) -> Search:
    """Build what the stages need, and find mistakes before anything is written.

    Args:
        config: What to search.
        folder: Of the run; nothing is written there.
        events: Of the run.

    Raises:
        InputError: If something that was given is wrong.
    """
    refuse_unreachable(config.ray.address)
    refuse_untrackable(config.trials.mlflow)
    task = build_task(config.task, config.seed)
    network = task.model()
    checkpoint = None
    if config.task.checkpoint is not None:
        load_weights(network, Path(config.task.checkpoint))
        checkpoint = network.state_dict()
    reads = reads_of(config, task, network)
    space = space_of(config, reads, by_channel=False)
    channels = space_of(config, reads, by_channel=True) if config.by_channel else None
    if task.size("train") <= config.curvature.batch_size:
        raise InputError(
            "curvature.batch_size: must be less than the training examples, "
            f"got {config.curvature.batch_size} and {task.size('train')}"
        )
    if config.task.pretrain is not None:
        _refuse_recipe(task, config.task.pretrain.recipe(), "task.pretrain")
    search = Search(config, task, reads, space, channels, checkpoint, folder, events)
    costs = network_costs(space, tables.sources(search), [0] * len(space))
    for index, budget in enumerate(config.budgets):
        _refuse_infeasible(space, {cost.name: cost for cost in costs}, budget, f"budgets.{index}")
    return search


def _refuse_recipe(task: Task, recipe: Recipe, path: str) -> None:
    """Refuse a training that the task does not allow."""
    try:
        refuse_impossible(recipe, task, task.model())
    except ValueError as error:
        raise InputError(f"{path}.{error}") from error


def _refuse_infeasible(space: Space, costs: Mapping[str, Cost], budget: Budget, path: str) -> None:
    """Refuse a limit that no allocation is within, or that every one is."""
    ends = (Allocation.least(space), Allocation.most(space))
    for name, limit in budget.limits(space).items():
        if name not in costs:
            raise InputError(f"{path}: {name} is not known where no activation is quantized")
        least, most = (costs[name].of(space, end) for end in ends)
        # A latency table of one's own may favour more bits: then only a search can tell.
        if least <= limit <= most or name == "latency_ns":
            continue
        within = " … ".join(budget.in_own_unit(space, name, cost) for cost in (least, most))
        raise InputError(
            f"{path}: must be within {within} (all at their least … at their most bits), "
            f"got {budget.in_own_unit(space, name, limit)}"
        )


def _refuse_changes(search: Search, stages: Sequence[Stage]) -> None:
    """Refuse a config that would throw finished work away."""
    for stage in stages:
        if not search.folder.artefact(stage.name).exists():
            continue  # an older version's run lacks a stage, but has later ones
        try:
            inputs = stage.inputs(search)
        except InputError:  # an earlier artefact is missing: the stage will run again anyway
            return
        changes = search.folder.changes(stage.name, inputs["config"])
        if changes:
            raise InputError(
                f"{search.folder.path}: stage {stage.name!r} was made with another config: "
                f"{'; '.join(changes)}. Give another --out, or --force to run it and what "
                "follows again"
            )


def _make(search: Search, stage: Stage, inputs: dict[str, Any]) -> None:
    search.events.emit(stage.name, "started")
    started, cpu_started = time.monotonic(), time.process_time()
    search.worker_cpu_seconds = 0.0
    try:
        result = stage.make(search)
    except (NonFiniteTraceError, DivergedError, SearchFailedError, InputError) as error:
        # A worker's exception carries its remote traceback; its cause carries the sentence.
        reason = str(getattr(error, "cause", error))
        search.events.emit(stage.name, "failed", reason)
        raise InputError(f"stage {stage.name!r}: {reason}") from error
    cost = StageCost(
        stage=stage.name,
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu_started + search.worker_cpu_seconds,
    )
    search.folder.save(stage.name, inputs, result, cost)
    search.events.emit(stage.name, "finished", f"{cost.seconds:.1f} s")


def _report(search: Search, name: str) -> Summary:
    """Write the summary and the page that shows it."""
    folder = search.folder
    asked = stages_of(search.config)
    loaded = {stage.name: folder.load(stage.name, stage.artefact) for stage in asked}
    summary = Summary.model_validate(
        {
            "name": name,
            "seed": search.config.seed,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "config": search.config.model_dump(mode="json"),
            **{stage: result.model_dump(mode="json") for stage, (result, _) in loaded.items()},
            "stages": [cost.model_dump() for _, cost in loaded.values()],
        }
    )
    path = folder.path / "summary.json"
    if path.exists():  # a run that only finds everything there did not finish again
        old = json.loads(path.read_text(encoding="utf-8"))
        if old == summary.model_dump(mode="json") | {"finished": old.get("finished")}:
            summary = Summary.model_validate(old)
    write_atomically(path, summary.model_dump_json(indent=1))
    report = write_report(folder.path, summary)
    search.events.emit("report", "finished", str(report))
    if search.config.comparison:
        found = compared(folder.path, name)
        write_comparison(folder.path / "comparison.json", found)
        page = write_comparison_page(folder.path, found)
        search.events.emit("report", "finished", str(page))
    return summary
