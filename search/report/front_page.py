"""The page of ``hawq front``: what each method could offer, before anything is fine-tuned."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor
from typing import get_args

from hawq.space import Kind, Space
from search.artefacts import CandidatesArtefact, FrontPoints
from search.quantities import counted, listed, mib, significant
from search.report.figures import MAX_FRONT_POINTS, fronts, num_hidden
from search.report.palette import looks
from search.report.results import methods
from search.report.template import fill

__all__ = ["render_fronts"]

_NOUNS: dict[Kind, tuple[str, str]] = {
    "weights": ("layer", "weight"),
    "activations": ("activation tensor", "activation"),
}


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the methods reach at whole average bits.

    Attributes:
        heading: Of what.
        methods: Those with a front.
        rows: Average bits, MiB, and each method's least Ω within them.
    """

    heading: str
    methods: tuple[str, ...]
    rows: tuple[tuple[int, str, tuple[str, ...]], ...]


def render_fronts(name: str, found: CandidatesArtefact, space: Space, caveat: str = "") -> str:
    """Write fronts as one HTML page, which loads nothing and depends on the arguments alone.

    Args:
        name: Of the run.
        found: Its fronts; candidates and budgets, where there are any, are marked on them.
        space: What the fronts are of, layer by layer and tensor by tensor.
        caveat: What a reader must know; empty if there is nothing.
    """
    parts = {kind: part for kind in get_args(Kind) if (part := space.part(kind)) is not None}
    figures = {"fronts-figure": fronts(found)}
    if "activations" in parts:
        figures["activation-fronts-figure"] = fronts(found, "activations")
    return fill(
        "front.html",
        figures,
        title=f"{name}: fronts",
        done=_done(parts),
        caveat=caveat,
        looks=looks(methods(found)),
        hulls=[front.method for front in found.fronts if front.is_hull and front.of == "weights"],
        hidden=num_hidden(found),
        is_thinned=any(len(front.bits) > MAX_FRONT_POINTS for front in found.fronts),
        max_front_points=MAX_FRONT_POINTS,
        has_activations="activations" in parts,
        budgets=[budget.label for budget in found.budgets],
        sizes=[_sizes(found, kind, part.num_elements) for kind, part in parts.items()],
    )


def _done(parts: Mapping[Kind, Space]) -> str:
    of = [
        f"{counted(len(part), _NOUNS[kind][0])} ({counted(part.num_elements, _NOUNS[kind][1])}"
        f"{' of one example' if kind == 'activations' else ''})"
        for kind, part in parts.items()
    ]
    return (
        f"How little sensitivity Ω can be had at every size, for {listed(of)}: by the tables "
        "of this run, with nothing fine-tuned and nothing measured anew."
    )


def _sizes(found: CandidatesArtefact, kind: Kind, num_elements: int) -> _Sizes:
    offered = [front for front in found.fronts if front.of == kind]
    ends = [bits / num_elements for front in offered for bits in (front.bits[0], front.bits[-1])]
    return _Sizes(
        "Weights" if kind == "weights" else "Activations of one example",
        tuple(front.method for front in offered),
        tuple(
            (
                bits,
                significant(mib(bits * num_elements)),
                tuple(_least(front, bits * num_elements) for front in offered),
            )
            for bits in range(ceil(min(ends)), floor(max(ends)) + 1)
        ),
    )


def _least(front: FrontPoints, budget: int) -> str:
    fits = bisect_right(front.bits, budget)
    return significant(front.sensitivity[fits - 1]) if fits else "—"
