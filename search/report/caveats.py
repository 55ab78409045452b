"""What a reader must know before believing the numbers."""

from search.artefacts import Summary
from search.report.quantities import count, counted, significant
from search.report.results import results_by_budget

__all__ = ["caveats"]


def caveats(summary: Summary) -> list[str]:
    """Say what a reader must know before believing the numbers; empty if there is nothing."""
    return [
        *_split_caveat(summary),
        *_curvature_caveats(summary),
        *_trial_caveats(summary),
        *_size_caveats(summary),
    ]


def _split_caveat(summary: Summary) -> list[str]:
    if not summary.model.search_seen:
        return []
    return [
        "The network was trained on the search split. Scores there rank candidates but do not "
        "measure drops; only the test split does."
    ]


def _curvature_caveats(summary: Summary) -> list[str]:
    curvature = summary.curvature
    rows = list(
        zip(
            curvature.layers,
            curvature.trace,
            curvature.probe_error,
            curvature.data_error,
            strict=True,
        )
    )
    found = []
    if not curvature.converged:
        loose = [name for name, t, probe, _ in rows if probe > curvature.rtol * abs(t)]
        where = f" ({_listed(loose)})" if loose else ""
        found.append(
            f"The traces had not converged after {counted(curvature.num_probes, 'probe')}: "
            f"{counted(len(loose), 'layer')}{where} "
            f"{'has' if len(loose) == 1 else 'have'} a probe error above "
            f"{significant(100 * curvature.rtol)} % of the trace. Ω inherits that error."
        )
    if curvature.num_negative:
        negative = [name for name, t, _, _ in rows if t < 0]
        found.append(
            f"{curvature.num_negative} of {counted(len(rows), 'trace')} "
            f"{'is' if curvature.num_negative == 1 else 'are'} negative ({_listed(negative)}) and "
            f"{'counts' if curvature.num_negative == 1 else 'count'} as zero in Ω: "
            "the methods see no cost in quantizing there."
        )
    return found


def _trial_caveats(summary: Summary) -> list[str]:
    seen: set[str] = set()
    found = []
    for group in results_by_budget(summary):
        for result in group.results:
            if result.candidate.digest in seen:
                continue
            seen.add(result.candidate.digest)
            name = f"{' = '.join([result.names, *result.elsewhere])}, {group.budget.label}"
            if result.trial is None:
                found.append(f"Not fine-tuned: {name}.")
            elif result.trial.status != "finished":
                reason = result.trial.reason or "no reason recorded"
                found.append(f"Fine-tuning {result.trial.status}: {name}: {reason}")
            elif result.test is None:
                found.append(f"Not scored on the test split: {name}.")
        for method in group.without_candidate:
            found.append(f"No candidate: {method}, {group.budget.label}.")
    return found


def _size_caveats(summary: Summary) -> list[str]:
    return [
        f"Over budget: {result.candidate.method}, {group.budget.label}: "
        f"{count(result.candidate.weight_bits)} bits, allowed are {count(group.budget.limit_bits)}."
        for group in results_by_budget(summary)
        for result in group.results
        if result.candidate.weight_bits > group.budget.limit_bits
    ]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
