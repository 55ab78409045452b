"""What a reader must know before believing the numbers."""

from search.artefacts import Summary, TraceArtefact
from search.quantities import count, counted, listed, significant
from search.report.results import Result, results_by_budget
from search.report.trace_caveats import iteration_caveats
from search.traced import EigenvalueDocument

__all__ = ["caveats"]


def caveats(summary: Summary, eigenvalues: EigenvalueDocument | None = None) -> list[str]:
    """Say what a reader must know before believing the numbers; empty if there is nothing."""
    return [
        *_split_caveat(summary),
        *_curvature_caveats(summary.curvature, "layer"),
        *_curvature_caveats(summary.curvature.activations, "activation tensor"),
        *_block_caveats(summary),
        *_eigenvalue_caveats(summary, eigenvalues),
        *_trial_caveats(summary),
        *_size_caveats(summary),
        *_float_caveats(summary),
        *_channel_caveats(summary),
        *_latency_caveats(summary),
    ]


def _split_caveat(summary: Summary) -> list[str]:
    if not summary.model.search_seen:
        return []
    return [
        "The network was trained on the search split. Scores there rank candidates but do not "
        "measure drops; only the test split does."
    ]


def _curvature_caveats(traced: TraceArtefact | None, noun: str) -> list[str]:
    if traced is None:
        return []
    rows = list(
        zip(traced.layers, traced.trace, traced.probe_error, traced.data_error, strict=True)
    )
    found = []
    if not traced.converged:
        loose = [name for name, t, probe, _ in rows if probe > traced.rtol * abs(t)]
        where = f" ({_listed(loose)})" if loose else ""
        found.append(
            f"The traces had not converged after {counted(traced.num_probes, 'probe')}: "
            f"{counted(len(loose), noun)}{where} "
            f"{'has' if len(loose) == 1 else 'have'} a probe error above "
            f"{significant(100 * traced.rtol)} % of the trace. Ω inherits that error."
        )
    if traced.num_negative:
        negative = [name for name, t, _, _ in rows if t < 0]
        found.append(
            f"{traced.num_negative} of {counted(len(rows), 'trace')} "
            f"{'is' if traced.num_negative == 1 else 'are'} negative ({_listed(negative)}) and "
            f"{'counts' if traced.num_negative == 1 else 'count'} as zero in Ω: "
            "the methods see no cost in quantizing there."
        )
    return found


def _block_caveats(summary: Summary) -> list[str]:
    """Say where the eigenvalues that chose bits are not what they should be."""
    blocks = summary.curvature.blocks or []
    found = []
    loose = [block.block for block in blocks if not block.converged]
    if loose:
        found.append(
            f"The power iteration of {counted(len(loose), 'block')} ({_listed(loose)}) had not "
            "converged: HAWQ’s order inherits the residual."
        )
    negative = [block.block for block in blocks if block.eigenvalue < 0]
    if negative:
        found.append(
            f"The top eigenvalue of {counted(len(negative), 'block')} ({_listed(negative)}) is "
            "negative and counts as zero: HAWQ sees no cost in quantizing there."
        )
    return found


def _eigenvalue_caveats(summary: Summary, eigenvalues: EigenvalueDocument | None) -> list[str]:
    if eigenvalues is None:
        return []
    theirs, ours = eigenvalues.weights_sha256, summary.model.weights_sha256
    if theirs != ours:
        return [
            f"The top eigenvalues in the run’s folder are of other weights ({theirs[:12]}) than "
            f"the searched ({ours[:12]}) and are not shown."
        ]
    return iteration_caveats(eigenvalues)


def _trial_caveats(summary: Summary) -> list[str]:
    seen: set[str] = set()
    found = []
    for group in results_by_budget(summary):
        for result in group.results:
            if result.candidate.key in seen:
                continue
            seen.add(result.candidate.key)
            name = f"{' = '.join([result.names, *result.elsewhere])}, {group.budget.label}"
            found += _of_trials(result, name)
        for method in group.without_candidate:
            found.append(f"No candidate: {method}, {group.budget.label}.")
    return found


def _of_trials(result: Result, name: str) -> list[str]:
    """Say which trainings of a candidate did not finish, and what its score is of then."""
    if not result.trials:
        return [f"Not fine-tuned: {name}."]
    odd = [trial for trial in result.trials if trial.status != "finished"]
    if not odd and result.test is None:
        return [f"Not scored on the test split: {name}."]
    left = len(result.trials) - len(odd)
    found = []
    for trial in odd:
        seed = f", seed {trial.seed}" if len(result.trials) > 1 else ""
        rest = f" Its score is of {counted(left, 'other training')}." if left else ""
        reason = trial.reason or "no reason recorded"
        found.append(f"Fine-tuning {trial.status}: {name}{seed}: {reason}{rest}")
    if len(result.candidate.draws):
        found.append(
            f"{name} is the mean of {len(result.candidate.digests)} random choices, each trained "
            "with one seed; its errors hold their spread, and its size and Ω are the first one’s."
        )
    return found


def _size_caveats(summary: Summary) -> list[str]:
    return [
        f"Over budget: {result.candidate.method}, {group.budget.label}: {name} "
        f"{count(result.candidate.costs[name])}, allowed are {count(limit)}."
        for group in results_by_budget(summary)
        for result in group.results
        for name, limit in group.budget.limits.items()
        if result.candidate.costs[name] > limit
    ]


def _float_caveats(summary: Summary) -> list[str]:
    kept = summary.tables.float_weights
    zeroed = [
        f"All zero after fine-tuning, so that what they compute is lost: {', '.join(trial.zeroed)} "
        f"(allocation {trial.digest}, seed {trial.seed})."
        for trial in summary.trials.trials
        if trial.zeroed
    ]
    if not kept:
        return zeroed
    names = ", ".join(f"{name} ({count(number)})" for name, number in kept.items())
    return [
        f"Weights that cannot be quantized stay in floating point: {names}. They are in the stored "
        "size, with 32 bits each, not in the size that a budget limits.",
        *zeroed,
    ]


def _channel_caveats(summary: Summary) -> list[str]:
    candidates = summary.candidates.candidates
    found = dict.fromkeys(c.method for c in candidates if c.granularity == "channel")
    if not found:
        return []
    return [
        f"Allocations of {listed(list(found))} need a runtime that takes a width for every "
        "channel. Few do: elsewhere they are smaller files and no faster. The widths’ own bits are "
        "in the stored size, not in the size that a budget limits."
    ]


def _latency_caveats(summary: Summary) -> list[str]:
    if not any("latency_ns" in c.costs for c in summary.candidates.candidates):
        return []
    path = summary.config.get("latency")
    return [
        f"Latencies are sums of the layers’ in the latency table{f' {path}' if path else ''}: what "
        "runs between layers is not in them, and no candidate itself was timed."
    ]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
