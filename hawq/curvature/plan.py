"""What a trace estimation is to do: the groups, the examples, the estimator, when to stop."""

from dataclasses import dataclass
from typing import Literal

from hawq.curvature.estimate import Population
from hawq.curvature.sites import Granularity, Site, Subject, group_names

__all__ = ["EstimatorName", "StopRule", "TracePlan"]

EstimatorName = Literal[
    "exact_gauss_newton",
    "mixed_gauss_newton",
    "gauss_newton",
    "corrected_gauss_newton",
    "hutchinson",
    "finite_difference",
    "fisher",
]
StopRule = Literal["error", "shares", "order", "count"]

# Those that see the examples one by one, and those of them without probes.
_BY_EXAMPLE = ("exact_gauss_newton", "mixed_gauss_newton", "fisher")
_EXACT = ("exact_gauss_newton", "fisher")


@dataclass(frozen=True, slots=True)
class TracePlan:
    """What to estimate, on which examples, how, and when to stop.

    Attributes:
        layers: Names of the layers whose weights, or inputs, are traced.
        estimator: ``"exact_gauss_newton"`` and ``"fisher"`` (the empirical one) need no probes, and
            the numbers of them do not matter; ``"mixed_gauss_newton"``; ``"gauss_newton"``, by
            random signs; ``"corrected_gauss_newton"``, with Hutchinson's probes of what the Hessian
            has besides; ``"hutchinson"``; ``"finite_difference"``.
        split: Split of the task that the examples come from.
        examples: Indices into it.
        batch_size: Examples a unit.
        probes_per_unit: Probes a unit; they share one forward pass. At least 2.
        rtol: Stop when every group's probe error is at most ``rtol`` of its trace, judged from
            at least ten degrees of freedom (batches × (probes − 1)) …
        max_probes: … or when each example has seen this many probes.
        seed: Seed of all probes.
        sites: The tensors; empty for the layers' weights.
        subject: ``"weights"`` or ``"activations"``.
        granularity: ``"channel"`` also traces each channel of every site.
        weights: Of the examples, where they were drawn by importance; empty where all count alike.
        population: Where they were drawn from.
        floor: Directions of an example's loss whose energy, times its weight, is at most this are
            left out, by the estimators that see examples one by one.
        leading: Directions that ``"mixed_gauss_newton"`` takes one by one.
        atol: Added to the tolerance, as a share of Σ|trace|.
        stop: ``"error"`` as above; ``"shares"``: every share of Σ|trace| is known to ``rtol``;
            ``"order"``: the order of the average traces is beyond doubt; ``"count"``: never early.

    Raises:
        ValueError: If a number is too small for an error to be estimated.
    """

    layers: tuple[str, ...]
    estimator: EstimatorName
    split: str
    examples: tuple[int, ...]
    batch_size: int
    probes_per_unit: int
    rtol: float
    max_probes: int
    seed: int
    sites: tuple[Site, ...] = ()
    subject: Subject = "weights"
    granularity: Granularity = "layer"
    weights: tuple[float, ...] = ()
    population: Population | None = None
    floor: float = 0.0
    leading: int = 0
    atol: float = 0.0
    stop: StopRule = "error"

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.examples):
            raise ValueError(
                "weights must be one an example, "
                f"got {len(self.weights)} for {len(self.examples)} examples"
            )
        if self.weights and self.population is None:
            raise ValueError("weights must come with the population that they were drawn from")
        if not self.sites and (self.subject, self.granularity) != ("weights", "layer"):
            raise ValueError("sites must be given for activations, and for channels")
        if self.probes_per_unit < 2 or self.max_probes < self.probes_per_unit:
            raise ValueError(
                "probes_per_unit must be at least 2 and max_probes not less, "
                f"got {self.probes_per_unit} and {self.max_probes}"
            )
        least = 1 if self.sees_examples else 2
        if self.num_batches < least or len(self.examples) < 2:
            raise ValueError(
                f"examples must fill at least {least} batches, and be 2 at least, "
                f"got {len(self.examples)} examples and batches of {self.batch_size}"
            )

    @property
    def sees_examples(self) -> bool:
        """Whether the estimator finds each example's own traces."""
        return self.estimator in _BY_EXAMPLE

    @property
    def is_exact(self) -> bool:
        """Whether the estimator has no probes."""
        return self.estimator in _EXACT

    @property
    def num_batches(self) -> int:
        """Batches that the examples make; the last may be smaller."""
        return -(-len(self.examples) // self.batch_size)

    @property
    def num_units(self) -> int:
        """Units if nothing stops early."""
        if self.is_exact:
            return self.num_batches
        return self.num_batches * (self.max_probes // self.probes_per_unit)

    @property
    def names(self) -> tuple[str, ...]:
        """The groups' names: the sites, then all channels if they are asked for."""
        return group_names(self.sites, self.granularity) if self.sites else self.layers

    @property
    def num_sites(self) -> int:
        """Tensors traced; the first groups."""
        return len(self.sites) or len(self.layers)

    @property
    def elements(self) -> tuple[int, ...]:
        """Elements of each group, shape (G,); needs ``sites``."""
        sizes = [site.num_elements for site in self.sites]
        if self.granularity == "channel":
            for site in self.sites:
                sizes += [site.num_elements // site.num_channels] * site.num_channels
        return tuple(sizes)
