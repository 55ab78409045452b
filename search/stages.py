"""The stages of a search: what each depends on, and how it makes its artefact."""

import time
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from hawq.allocation import Allocation
from hawq.cost import average_bits, compression, total, weight_bits
from hawq.curvature import Reducer, TraceEstimate, TracePlan, choose_estimator
from hawq.finetune import evaluate
from hawq.quantizers import squared_errors
from hawq.sensitivity import omega
from hawq.space import Space, quantizable_layers
from hawq.task import Task
from search.artefacts import (
    BudgetLimit,
    Candidate,
    CandidatesArtefact,
    CurvatureArtefact,
    Difference,
    FrontPoints,
    ModelArtefact,
    Score,
    TablesArtefact,
    TestArtefact,
    Trial,
    TrialsArtefact,
)
from search.cluster import num_workers
from search.config import SearchConfig
from search.evaluate import evaluation_key
from search.events import EventLog
from search.fit import fit, read_progress
from search.folder import RunFolder, content_hash
from search.probes import UnitFile, estimate_on_workers
from search.searchers import SEARCHERS, Problem, Tables
from search.tasks.checkpoint import read_state, save_state, state_sha256
from search.trials import TrialSpec, quantized_model, run_trials

__all__ = ["Search"]

_POLL_SECONDS = 0.5


@dataclass(slots=True)
class Search:
    """A search under way: what the stages read, and the CPU time that their workers used.

    Attributes:
        config: As resolved.
        task: Built from it.
        space: What may be chosen.
        checkpoint: Weights from the config's file; None where the network is trained here.
        folder: The run's folder.
        events: What happened.
        worker_cpu_seconds: Of the stage under way.
    """

    config: SearchConfig
    task: Task
    space: Space
    checkpoint: dict[str, Tensor] | None
    folder: RunFolder
    events: EventLog
    worker_cpu_seconds: float = field(default=0.0)

    # model: the weights that are searched, trained here or read from a file

    def model_inputs(self) -> dict[str, Any]:
        """The network, its data and its weights; where the data lies does not matter."""
        task = self.config.task.model_dump(mode="json", exclude={"root", "checkpoint"})
        loaded = None if self.checkpoint is None else state_sha256(self.checkpoint)
        return {
            "config": {"seed": self.config.seed, "task": task, "checkpoint_sha256": loaded},
            "data": self.task.fingerprint,
        }

    def make_model(self) -> ModelArtefact:
        """Train the network where the config says so; score it unquantized."""
        source = "factory" if self.config.task.factory else "checkpoint"
        if self.config.task.pretrain is not None:
            source = "trained"
            state = self._pretrain()
        else:
            state = self.checkpoint or self.task.model().state_dict()
        save_state(self._weights_path, state)
        (scores,) = self._score_all([(state, None)], "search")
        model = self.task.model()
        return ModelArtefact.model_validate(
            {
                "weights_sha256": state_sha256(state),
                "num_parameters": sum(p.numel() for p in model.parameters()),
                "num_quantizable": self.space.num_elements,
                "source": source,
                "train_size": self.task.size("train"),
                "search_size": self.task.size("search"),
                "search_seen": self.task.search_seen,
                "score_name": self.task.score_name,
                "search_score": float(scores.mean()),
            }
        )

    def _pretrain(self) -> dict[str, Tensor]:
        assert self.config.task.pretrain is not None
        recipe, trials = self.config.task.pretrain.recipe(), self.config.trials
        folder = self.folder.path / f"pretrain-{content_hash(self.model_inputs())[:8]}"
        training = _pretrain.options(num_cpus=trials.cpus, num_gpus=trials.gpus).remote(
            self.task, recipe, folder.resolve(), self.config.seed, trials.cpus, bool(trials.gpus)
        )
        while not ray.wait([training], timeout=_POLL_SECONDS)[0]:
            progress = read_progress(folder)
            if progress is not None:
                score = "" if progress.score is None else f"{100 * progress.score:.1f} %"
                self._progress("model", progress.done, progress.total, "epochs", score)
        state, cpu_seconds = ray.get(training)
        self.worker_cpu_seconds += cpu_seconds
        return {name: torch.tensor(value) for name, value in state.items()}

    # curvature: Hessian traces of all layers' weights, on Ray workers

    def curvature_inputs(self) -> dict[str, Any]:
        """The estimation's settings and the weights."""
        return {
            "config": {
                "seed": self.config.seed,
                "curvature": self.config.curvature.model_dump(mode="json"),
            },
            "model": self._model().weights_sha256,
            "layers": self._layers(),
        }

    def make_curvature(self) -> CurvatureArtefact:
        """Choose an estimator, then probe until the error is small enough."""
        settings, state = self.config.curvature, self._state()
        model = self.task.model()
        model.load_state_dict(state)
        if settings.estimator == "auto":
            few = self.task.batch("train", torch.arange(min(4, self.task.size("train"))))
            choice = choose_estimator(self.task, model, self._layers(), few)
            estimator, reason = choice.estimator, choice.reason
        else:
            estimator, reason = settings.estimator, "asked for by the config"
        self.events.emit("curvature", "note", f"{estimator}: {reason}")
        plan = TracePlan(
            layers=tuple(self._layers()),
            estimator=estimator,
            split="train",
            examples=self._curvature_examples(),
            batch_size=settings.batch_size,
            probes_per_unit=settings.probes_per_unit,
            rtol=settings.rtol,
            max_probes=settings.max_probes,
            seed=self.config.seed,
        )
        workers = self.config.workers
        estimate, cpu_seconds = estimate_on_workers(
            self.task,
            state,
            plan,
            units=UnitFile(
                self.folder.path / "curvature.units.jsonl", content_hash(self.curvature_inputs())
            ),
            workers=num_workers(workers.count, workers.cpus, workers.gpus),
            cpus=workers.cpus,
            gpus=workers.gpus,
            on_unit=self._report_units,
        )
        self.worker_cpu_seconds += cpu_seconds
        return _curvature_artefact(self.space, plan, reason, estimate)

    def _curvature_examples(self) -> tuple[int, ...]:
        size = self.task.size("train")
        generator = torch.Generator().manual_seed(self.config.seed)
        order = torch.randperm(size, generator=generator)
        return tuple(order[: self.config.curvature.examples].tolist())

    def _report_units(self, reducer: Reducer) -> None:
        plan, estimate = reducer.plan, reducer.estimate
        done = expected = plan.num_units - len(reducer.missing)
        if estimate is None:
            self._progress("curvature", done, plan.num_units, "units", "")
            return
        relative = estimate.probe_error / np.maximum(np.abs(estimate.trace), 1e-300)
        rounds = estimate.num_probes // plan.probes_per_unit
        if reducer.finished:
            done = expected = rounds * plan.num_batches
        else:
            # Errors fall with the root of the probes: a forecast, not a promise.
            factor = max(1.0, float(relative.max() / plan.rtol) ** 2)
            expected = min(plan.num_units, int(np.ceil(factor * rounds)) * plan.num_batches)
        worst = f"largest probe error {100 * relative.max():.1f} %"
        self._progress("curvature", done, max(done, expected), "units", worst)

    # tables: Ω and size of every layer at every width

    def tables_inputs(self) -> dict[str, Any]:
        """What may be chosen, and the traces."""
        return {
            "config": {"weights": self.config.weights.model_dump(mode="json")},
            "model": self._model().weights_sha256,
            "curvature": self._hash("curvature", CurvatureArtefact),
        }

    def make_tables(self) -> TablesArtefact:
        """Price every layer at every width with the quantizer that the trials use."""
        space = self.space
        model = self.task.model()
        model.load_state_dict(self._state())
        layers = quantizable_layers(model)
        errors = []
        for name in self._layers():
            weight = layers[name].weight
            assert isinstance(weight, Tensor)
            errors.append(squared_errors(weight, space.widths).numpy())
        traces = np.array(self._load("curvature", CurvatureArtefact).trace)
        table = omega(space, traces, np.stack(errors))
        return TablesArtefact(
            space=space.to_json(),
            space_fingerprint=space.fingerprint,
            widths=list(space.widths),
            sensitivity=[[v if np.isfinite(v) else None for v in row] for row in table.tolist()],
            squared_error=np.stack(errors).tolist(),
            weight_bits=weight_bits(space).tolist(),
        )

    # candidates: what each method chooses under each budget

    def candidates_inputs(self) -> dict[str, Any]:
        """Budgets, methods and the tables."""
        dump = self.config.model_dump(mode="json")
        return {
            "config": {key: dump[key] for key in ("seed", "budgets", "methods")},
            "tables": self._hash("tables", TablesArtefact),
        }

    def make_candidates(self) -> CandidatesArtefact:
        """Run every searcher under every budget."""
        tables = self._tables()
        fronts = []
        for method in self.config.methods:
            front = SEARCHERS[method].front(tables)
            if front is not None:
                fronts.append(
                    FrontPoints(
                        method=method,
                        weight_bits=front.cost.tolist(),
                        sensitivity=front.sensitivity.tolist(),
                    )
                )
        limits = [(budget.label, budget.limit_bits(self.space)) for budget in self.config.budgets]
        return CandidatesArtefact(
            budgets=[BudgetLimit(label=label, limit_bits=bits) for label, bits in limits],
            fronts=fronts,
            candidates=[
                self._candidate(method, label, Problem(tables, bits, tables.proxy))
                for label, bits in limits
                for method in self.config.methods
            ],
        )

    def _candidate(self, method: str, budget: str, problem: Problem) -> Candidate:
        started = time.monotonic()
        found = list(SEARCHERS[method].search(problem, evaluations=1, seed=self.config.seed))
        best = max(found, key=lambda evaluation: evaluation.score).allocation
        assert problem.fits(best)
        bits = total(problem.tables.weight_bits, self.space, best)
        return Candidate(
            method=method,
            budget=budget,
            digest=best.digest,
            bits=dict(zip(best.names, best.bits, strict=True)),
            weight_bits=bits,
            average_bits=average_bits(self.space, bits),
            compression=compression(self.space, bits),
            sensitivity=problem.tables.omega(best),
            evaluations=len(found),
            seconds=time.monotonic() - started,
        )

    # trials: every distinct allocation fine-tuned under one recipe, by Tune

    def trials_inputs(self) -> dict[str, Any]:
        """The recipe, the quantizers, early stopping, and the allocations."""
        dump = self.config.model_dump(mode="json")
        return {
            "config": {
                "seed": self.config.seed,
                "finetune": dump["finetune"],
                "activations": dump["activations"],
                "asha": self.config.trials.asha,
            },
            "model": self._model().weights_sha256,
            "allocations": sorted({c.digest for c in self._candidates()}),
        }

    def make_trials(self) -> TrialsArtefact:
        """Fine-tune."""
        specs = self._specs()
        epochs = len(specs) * self.config.finetune.epochs
        trials = run_trials(
            self.task,
            self._state(),
            specs,
            resources=self.config.trials,
            storage=self.folder.path / "tune",
            on_progress=lambda done: self._progress("trials", done, epochs, "epochs", ""),
        )
        for trial in trials:
            if trial.status != "finished":
                self.events.emit(
                    "trials", "warning", f"{trial.digest} {trial.status}: {trial.reason}"
                )
        self.worker_cpu_seconds += sum(trial.cpu_seconds for trial in trials)
        return TrialsArtefact(trials=trials)

    def _specs(self) -> list[TrialSpec]:
        activations, recipe = self.config.activations, self.config.finetune.recipe()
        specs: dict[str, TrialSpec] = {}
        for candidate in self._candidates():
            allocation = Allocation.of(self.space, candidate.bits)
            key = evaluation_key(
                allocation,
                weights_sha256=self._model().weights_sha256,
                split="search",
                quantizer=activations.model_dump(),
                fidelity=self.config.finetune.model_dump() | {"asha": self.config.trials.asha},
                seed=self.config.seed,
            )
            specs[candidate.digest] = TrialSpec(
                digest=candidate.digest,
                layer_bits={name[2:]: bits for name, bits in candidate.bits.items()},
                activation_bits=activations.bits,
                input_bits=activations.input_bits,
                recipe=recipe,
                seed=self.config.seed,
                folder=(self.folder.path / "trials" / key).resolve(),
            )
        return list(specs.values())

    # test: the one look at the test split

    def test_inputs(self) -> dict[str, Any]:
        """The trials."""
        return {"config": {}, "trials": self._hash("trials", TrialsArtefact)}

    def make_test(self) -> TestArtefact:
        """Score the unquantized network and every finished trial on the same test examples."""
        finished = {t.digest for t in self._trials() if t.status == "finished"}
        specs = [spec for spec in self._specs() if spec.digest in finished]
        state = self._state()
        jobs: list[tuple[dict[str, Tensor], TrialSpec | None]] = [(state, None)]
        jobs += [(load_file(spec.folder / "model.safetensors"), spec) for spec in specs]
        scores = self._score_all(jobs, "test")
        names = ["unquantized", *(spec.digest for spec in specs)]
        save_state(
            self.folder.path / "test_scores.safetensors", dict(zip(names, scores, strict=True))
        )
        return TestArtefact(
            num_examples=len(scores[0]),
            unquantized=_score(scores[0], scores[0]),
            scores={
                spec.digest: _score(found, scores[0])
                for spec, found in zip(specs, scores[1:], strict=True)
            },
            differences=[
                _difference(names[i], scores[i], names[j], scores[j])
                for i, j in combinations(range(1, len(names)), 2)
            ],
        )

    # what several stages need

    @property
    def _weights_path(self) -> Path:
        return self.folder.path / "model.safetensors"

    def _layers(self) -> list[str]:
        return [name[2:] for name in self.space.names]

    def _state(self) -> dict[str, Tensor]:
        return read_state(self._weights_path)

    def _load(self, stage: str, kind: type[Any]) -> Any:
        return self.folder.load(stage, kind)[0]

    def _hash(self, stage: str, kind: type[Any]) -> str:
        return content_hash(self._load(stage, kind).model_dump(mode="json"))

    def _model(self) -> ModelArtefact:
        return self.folder.load("model", ModelArtefact)[0]

    def _candidates(self) -> list[Candidate]:
        return self.folder.load("candidates", CandidatesArtefact)[0].candidates

    def _trials(self) -> list[Trial]:
        return self.folder.load("trials", TrialsArtefact)[0].trials

    def _tables(self) -> Tables:
        tables, _ = self.folder.load("tables", TablesArtefact)
        curvature, _ = self.folder.load("curvature", CurvatureArtefact)
        sensitivity = [[np.inf if v is None else v for v in row] for row in tables.sensitivity]
        return Tables(
            self.space,
            np.array(sensitivity),
            np.array(tables.weight_bits, np.int64),
            np.array(curvature.trace),
        )

    def _progress(self, stage: str, done: float, amount: float, unit: str, message: str) -> None:
        self.events.emit(stage, "progress", message, done=done, total=amount, unit=unit)

    def _score_all(
        self, jobs: list[tuple[dict[str, Tensor], TrialSpec | None]], split: str
    ) -> list[Tensor]:
        """Score networks example by example, in parallel; shape (N,) each."""
        trials = self.config.trials
        remote = _score_network.options(num_cpus=trials.cpus, num_gpus=trials.gpus)
        pending = [
            remote.remote(self.task, state, spec, split, trials.cpus, bool(trials.gpus))
            for state, spec in jobs
        ]
        ready: list[ray.ObjectRef[Any]] = []
        while len(ready) < len(pending):
            ready, _ = ray.wait(pending, num_returns=min(len(ready) + 1, len(pending)))
            self._progress("test", len(ready), len(pending), "networks", "")
        scores = []
        for values, cpu_seconds in ray.get(pending):
            self.worker_cpu_seconds += cpu_seconds
            scores.append(torch.tensor(values))
        return scores


@ray.remote(max_retries=3)
def _pretrain(
    task: Task, recipe: Any, folder: Path, seed: int, cpus: float, gpu: bool
) -> tuple[dict[str, Any], float]:
    torch.set_num_threads(max(1, int(cpus)))
    model = task.model().to("cuda" if gpu else "cpu")
    fit(model, task, recipe, folder=folder, seed=seed)
    state = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
    return state, time.process_time()


@ray.remote(max_retries=3)
def _score_network(
    task: Task,
    state: dict[str, Tensor],
    spec: TrialSpec | None,
    split: str,
    cpus: float,
    gpu: bool,
) -> tuple[Any, float]:
    torch.set_num_threads(max(1, int(cpus)))
    started = time.process_time()
    model = task.model()
    if spec is not None:
        model = quantized_model(task, model.state_dict(), spec)
    model.load_state_dict(state)
    model.to("cuda" if gpu else "cpu")
    return evaluate(model, task, split).numpy(), time.process_time() - started


def _score(found: Tensor, reference: Tensor) -> Score:
    lost = reference - found
    root = len(found) ** 0.5
    return Score(
        score=float(found.mean()),
        standard_error=float(found.std() / root),
        drop=float(lost.mean()),
        drop_standard_error=float(lost.std() / root),
    )


def _difference(first: str, a: Tensor, second: str, b: Tensor) -> Difference:
    gained = a - b
    return Difference(
        first=first,
        second=second,
        difference=float(gained.mean()),
        standard_error=float(gained.std() / len(gained) ** 0.5),
    )


def _curvature_artefact(
    space: Space, plan: TracePlan, reason: str, estimate: TraceEstimate
) -> CurvatureArtefact:
    return CurvatureArtefact(
        estimator=plan.estimator,
        reason=reason,
        layers=list(plan.layers),
        num_elements=[group.num_elements for group in space.groups],
        trace=estimate.trace.tolist(),
        probe_error=estimate.probe_error.tolist(),
        data_error=estimate.data_error.tolist(),
        num_probes=estimate.num_probes,
        num_examples=estimate.num_examples,
        rtol=plan.rtol,
        converged=bool(estimate.converged(plan.rtol).all()),
        num_negative=int((estimate.trace < 0).sum()),
    )
