"""A comparison from a run's folder: of what is there, whole or in part."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

from safetensors.numpy import load_file

from search.artefacts import CandidatesArtefact, CurvatureArtefact, ModelArtefact, TestArtefact
from search.comparison.document import ComparisonDocument, Finalist, FinalistDifference
from search.comparison.statistics import finalist_difference
from search.comparison.verdict import verdict
from search.config_file import load_config
from search.folder import RunFolder, write_atomically
from search.machine import machine, versions
from search.results.setting import placeless
from search.searched import AgreementArtefact, SearchRecord
from search.stages.test import SCORES_FILE

__all__ = ["compared", "record_paths", "restore_searches"]

_BOOTSTRAP_SEED = 0


def compared(run: Path, name: str) -> ComparisonDocument:
    """Gather what a run's searches and finalists have come to so far.

    Args:
        run: Its folder, at least with the curvature.
        name: For titles.

    Raises:
        InputError: If the curvature is missing.
    """
    folder, config = RunFolder(run), load_config(run / "config.yaml")
    model, _ = folder.load("model", ModelArtefact)
    searches = [
        SearchRecord.model_validate_json(path.read_text(encoding="utf-8"))
        for path in record_paths(run)
    ]
    agreement = None
    if folder.artefact("agreement").exists():
        agreement, _ = folder.load("agreement", AgreementArtefact)
    finalists, differences = _finalists(folder)
    found = ComparisonDocument(
        name=name,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        versions=versions(),
        config=placeless(config.model_dump(mode="json")),
        score_name=model.score_name,
        fidelity=searches[0].fidelity if searches else "none",
        num_examples=agreement.num_examples
        if agreement
        else config.searches.examples or model.search_size,
        unquantized=agreement.unquantized if agreement else model.search_score,
        search_seen=model.search_seen,
        curvature_core_seconds=folder.load("curvature", CurvatureArtefact)[1].cpu_seconds,
        searches=searches,
        hessian=agreement.hessian if agreement else [],
        agreement=agreement.points if agreement else [],
        finalists=finalists,
        differences=differences,
    )
    return found.model_copy(update={"verdict": verdict(found)})


def record_paths(run: Path) -> list[Path]:
    """Return the files of a run's finished searches, by method, budget and seed."""

    def order(path: Path) -> tuple[str, int, int]:
        method, budget, seed = path.parent.name.rsplit("-", 2)
        return method, int(budget), int(seed)

    return sorted((run / "searches").glob("*/record.json"), key=order)


def restore_searches(run: Path, kept: Sequence[SearchRecord], budgets: Sequence[str]) -> int:
    """Put finished searches where a run finds them; one of other inputs is searched again there.

    Args:
        run: Its folder.
        kept: The searches.
        budgets: Labels of the budgets, in the config's order.

    Returns:
        How many were put there.
    """
    restored = 0
    for record in kept:
        if record.budget not in budgets:
            continue
        index = budgets.index(record.budget)
        path = run / "searches" / f"{record.method}-{index}-{record.seed}" / "record.json"
        if not path.exists():
            write_atomically(path, record.model_dump_json())
            restored += 1
    return restored


def _finalists(folder: RunFolder) -> tuple[list[Finalist], list[FinalistDifference]]:
    if not folder.artefact("test").exists():
        return [], []
    test, _ = folder.load("test", TestArtefact)
    candidates = folder.load("candidates", CandidatesArtefact)[0].candidates
    tested = [candidate for candidate in candidates if candidate.key in test.scores]
    scores = load_file(folder.path / SCORES_FILE)
    finalists = [
        Finalist(
            method=candidate.method,
            budget=candidate.budget,
            digest=candidate.digest,
            search_seed=candidate.search_seed,
            score=test.scores[candidate.key].score,
            standard_error=test.scores[candidate.key].standard_error,
            by_seed=test.scores[candidate.key].seed_scores,
        )
        for candidate in tested
    ]
    differences = []
    for first, second in combinations(tested, 2):
        seeds = [test.scores[candidate.key].seeds for candidate in (first, second)]
        shared = [seed for seed in seeds[0] if seed in seeds[1]]
        if first.budget != second.budget or not shared:
            continue
        left, right = (
            scores[candidate.key][[own.index(seed) for seed in shared]]
            for candidate, own in zip((first, second), seeds, strict=True)
        )
        found = finalist_difference(left, right, _BOOTSTRAP_SEED)
        differences.append(
            FinalistDifference(
                budget=first.budget,
                first=first.method,
                second=second.method,
                difference=found.value,
                low=found.low,
                high=found.high,
                num_seeds=len(shared),
            )
        )
    return finalists, differences
