"""What each stage of a run leaves behind, as data: the JSON files of a run's folder.

Every artefact can be read without this program. Lists over layers follow the order of ``space``,
tables have one row a layer and one column a bit-width of ``widths``. Sizes are exact bits.
``hawq schema summary`` prints the JSON Schema of ``summary.json``, which holds all of them.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from hawq.curvature import EstimatorName
from search.searched import AgreementArtefact, SearchesArtefact

__all__ = [
    "Agreement",
    "BlockEigenvalue",
    "BudgetLimit",
    "BudgetStability",
    "CalibrationArtefact",
    "Candidate",
    "CandidateIncrease",
    "CandidatesArtefact",
    "CostSources",
    "CurvatureArtefact",
    "Difference",
    "Draw",
    "EpochRecord",
    "FrontPoints",
    "GroupIncrease",
    "GroupTables",
    "Interactions",
    "LayerLatency",
    "ModelArtefact",
    "OperationEntry",
    "Score",
    "SeededTrial",
    "StageCost",
    "StudyArtefact",
    "StudyTrial",
    "Summary",
    "TablesArtefact",
    "TestArtefact",
    "TraceArtefact",
    "Trial",
    "TrialsArtefact",
]


Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Artefact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _short_hash(data: object) -> str:
    text = json.dumps(data, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


class ModelArtefact(_Artefact):
    """The network to be quantized; its weights are in ``model.safetensors``."""

    weights_sha256: str
    num_parameters: int
    num_quantizable: int = Field(description="Weights that can be quantized.")
    source: Literal["checkpoint", "trained", "factory"]
    train_size: int
    search_size: int
    search_seen: bool = Field(
        description="Whether the network was trained on the search split: if so, its scores there "
        "rank candidates but do not measure drops."
    )
    score_name: str
    search_score: float = Field(description="Unquantized, on the search split, in [0, 1].")


class TraceArtefact(_Artefact):
    """Hessian traces of some tensors, with both of their standard errors."""

    estimator: EstimatorName
    reason: str = Field(description="Why this estimator.")
    layers: list[str] = Field(description="Names of the layers, or of the activation tensors.")
    num_elements: list[int]
    trace: list[float] = Field(description="Of the mean loss's Hessian block.")
    probe_error: list[float] = Field(description="Standard error over the random probes.")
    data_error: list[float] = Field(description="Standard error over the choice of examples.")
    share_error: list[float] = Field(
        description="Standard error of trace / Σ trace, over probes and examples: what an "
        "allocation depends on."
    )
    channel_trace: list[list[float]] | None = Field(
        None, description="Of each tensor's channels, where they were asked for."
    )
    channel_error: list[list[float]] | None = Field(
        None, description="Their standard errors, over probes and examples."
    )
    num_probes: int = Field(description="On every example; 0 for the exact estimator.")
    num_examples: int
    pool_size: int | None = Field(
        description="Examples that these were drawn from by importance; null: drawn uniformly."
    )
    rtol: float
    converged: bool = Field(description="Whether every probe error is at most rtol of its trace.")
    num_negative: int = Field(description="Negative traces; they count as zero in Ω.")


class CurvatureArtefact(TraceArtefact):
    """Hessian traces of every layer's weight and, where they are searched, of activations."""

    activations: TraceArtefact | None = None
    blocks: list["BlockEigenvalue"] | None = Field(
        None, description="The top eigenvalues of blocks of layers, where a method goes by them."
    )


class BlockEigenvalue(_Artefact):
    """The top eigenvalue of one block of layers."""

    block: str
    layers: list[str]
    n: int = Field(description="Weights.")
    eigenvalue: float = Field(description="Of largest modulus, with its sign.")
    residual: float = Field(description="‖Hv − λv‖: an eigenvalue lies within it.")
    data_error: float = Field(description="Standard error over the choice of examples.")
    iterations: int
    converged: bool


class GroupTables(_Artefact):
    """Sensitivity Ω of every group at every bit-width, and what it came from."""

    space: list[dict[str, Any]] = Field(description="The groups: name, elements, MACs, menu, tie.")
    space_fingerprint: str
    widths: list[int]
    sensitivity: list[list[NotNegative | None]] = Field(description="Ω; null where not allowed.")
    squared_error: list[list[float]] = Field(
        description="‖Q(W) − W‖², and of activations the mean over examples of ‖Q(a) − a‖²."
    )
    trace: list[float]
    trace_error: list[float] = Field(description="Standard error over probes and examples.")
    num_scales: list[Count] = Field(description="Scales that a quantized group stores.")


class OperationEntry(_Artefact):
    """One call of a layer."""

    weight: str = Field(description="Group of the weight.")
    activation: str | int = Field(description="Group of what it reads, or its bits where fixed.")
    macs: Count = Field(description="Multiply-accumulates for one example.")


class LayerLatency(_Artefact):
    """One layer's time at one precision."""

    layer: str
    weight_bits: int
    activation_bits: int | None = Field(description="null: whatever they are.")
    ns: Count


class CostSources(_Artefact):
    """All that the costs of an allocation are made of, besides the groups' elements."""

    operations: list[OperationEntry] = Field(description="None where activations are not quantized")
    alive: list[list[str]] = Field(
        description="Activation groups in memory together, call by call."
    )
    latency_ns: list[LayerLatency] | None = Field(None, description="From the latency table.")
    float_weights: dict[str, Count] = Field(
        {}, description="Weights that cannot be quantized and are stored in 32 bits, by name."
    )
    scale_bits: Count = Field(16, description="Of a stored scale, with its zero point if any.")


class TablesArtefact(GroupTables, CostSources):
    """The tables of all layers and activation tensors, and of their channels."""

    channels: GroupTables | None = Field(None, description="Where a method needs them.")
    blocks: list[BlockEigenvalue] | None = Field(
        None, description="Top eigenvalues of blocks of layers, where a method goes by them."
    )


class BudgetLimit(_Artefact):
    """A budget of the config, converted to whole units."""

    label: str
    limits: dict[str, int] = Field(description="By cost: weight_bits, activation_bits, bops, …")

    @property
    def weight_bits(self) -> int | None:
        """The size that all weights may have, where it is limited."""
        return self.limits.get("weight_bits")


class FrontPoints(_Artefact):
    """The points that one method can offer, and their Ω.

    It falls with the size, but for methods that go by something else.
    """

    method: str
    of: Literal["weights", "activations"] = "weights"
    bits: list[int] = Field(description="Of all weights, or of one example's activations.")
    sensitivity: list[float]
    is_hull: bool = Field(
        False, description="Whether these are only points of the lower convex hull, thinned."
    )


class Draw(_Artefact):
    """Another choice of a random method under the same budget."""

    digest: str
    bits: dict[str, int]
    costs: dict[str, int]
    sensitivity: float


class Candidate(_Artefact):
    """What one method chose under one budget."""

    method: str
    budget: str = Field(description="The label of the budget.")
    granularity: Literal["layer", "channel"] = "layer"
    digest: str = Field(description="Of the allocation: equal choices are trained once.")
    bits: dict[str, int] = Field(description="Group name to bits, in the space's order.")
    costs: dict[str, int] = Field(
        description="By name: weight_bits (weights alone, as the papers count), stored_bits (with "
        "scales and channels' widths), activation_bits, peak_activation_bits, bops, latency_ns."
    )
    average_bits: float = Field(description="Bits a weight.")
    compression: float = Field(description="Times smaller than 32-bit floats, weights alone.")
    activation_average_bits: float | None = Field(description="null: activations are not searched.")
    activation_compression: float | None
    sensitivity: float = Field(description="Ω of the whole allocation.")
    activation_sensitivity: float | None = Field(
        None, description="The activations' part of it; null: they are not searched."
    )
    bound: float | None = Field(
        description="No allocation within the budget has a smaller Ω; null: not proved."
    )
    evaluations: int = Field(description="Allocations that the method scored to find this one.")
    search_seed: int | None = Field(
        None, description="Of the search that found it, the best of several; null: no search."
    )
    seconds: float
    order: list[list[str]] = Field(
        [],
        description="Layers in the order in which fine-tuning quantizes their weights, block by "
        "block; empty: all from the start.",
    )
    draws: list[Draw] = Field(
        [], description="The further choices of a random method, of which the above is the first."
    )

    @property
    def digests(self) -> tuple[str, ...]:
        """Of what is trained, draw by draw: of the allocation and of the order where it has one."""
        order = f"-{_short_hash(self.order)}" if self.order else ""
        return tuple(
            f"{digest}{order}" for digest in [self.digest, *(d.digest for d in self.draws)]
        )

    @property
    def key(self) -> str:
        """What scores go by: equal keys are trained and tested once."""
        first, *others = self.digests
        return f"{first}+{_short_hash(others)}" if others else first

    def trainings(self, seeds: Sequence[int]) -> list[tuple[str, int]]:
        """Return the digest and the seed of every fine-tuning, in the order of the seeds.

        One choice is trained with every seed; of several draws, number d with seed number d alone,
        counted around.
        """
        if len(self.digests) == 1:
            return [(self.digests[0], seed) for seed in seeds]
        return [(digest, seeds[d % len(seeds)]) for d, digest in enumerate(self.digests)]

    @property
    def weight_bits(self) -> int:
        """Size of all weights, as the papers count it."""
        return self.costs["weight_bits"]

    @property
    def weight_sensitivity(self) -> float:
        """The weights' part of Ω."""
        return self.sensitivity - (self.activation_sensitivity or 0.0)


class CandidatesArtefact(_Artefact):
    """The fronts, and the candidates that will be fine-tuned."""

    budgets: list[BudgetLimit]
    fronts: list[FrontPoints]
    candidates: list[Candidate]


class GroupIncrease(_Artefact):
    """What it costs the loss to quantize one group and nothing else, before any training."""

    group: str
    bits: int
    predicted: float = Field(description="Ω/2.")
    increase: float = Field(description="Mean quantized minus unquantized loss, same images.")
    standard_error: float = Field(description="Of it, over the images, paired.")
    is_spread: bool = Field(
        description="Whether it is one of those spread evenly over the space, which agreement is "
        "measured on; the others are single choices of candidates."
    )


class Agreement(_Artefact):
    """How well predicted and measured increases of single choices agree."""

    num_choices: int
    correlation: float | None = Field(
        description="Spearman's rank correlation; null: fewer than three different choices."
    )
    correlation_error: float | None = Field(description="Its standard error over the images.")
    ratio: float | None = Field(
        description="Measured over predicted in the median; null: nothing is predicted."
    )
    ratio_error: float | None = Field(description="Its standard error over the images.")


class CandidateIncrease(_Artefact):
    """What it costs the loss to quantize all that a candidate chose, before any training."""

    digest: str
    predicted: float = Field(description="Ω/2 of the whole allocation.")
    increase: float = Field(description="Mean quantized minus unquantized loss, same images.")
    standard_error: float = Field(description="Of it, over the images, paired.")
    sum_of_singles: float | None = Field(
        description="Of its groups' own increases; null: not all of them were measured."
    )
    sum_error: float | None = Field(description="Its standard error over the images.")


class Interactions(_Artefact):
    """How far the increases of two groups together are from the sum of their own."""

    groups: list[str]
    bits: list[int]
    increase: list[float] = Field(description="Of each group by itself.")
    standard_error: list[float]
    interaction: list[list[float]] = Field(
        description="ΔL(i,j) − ΔL(i) − ΔL(j), symmetric; zero on the diagonal."
    )
    interaction_error: list[list[float]] = Field(
        description="Its standard error over the images, paired."
    )
    relative: list[list[float | None]] = Field(
        description="Over ΔL(i) + ΔL(j); null on the diagonal, and where that sum is not above two "
        "standard errors."
    )


class BudgetStability(_Artefact):
    """What becomes of a budget's allocation when traces are drawn within their errors."""

    budget: str
    method: str
    digest: str = Field(description="Of the allocation for the traces as estimated.")
    kept: float = Field(description="Share of the groups whose bits stay, mean over the draws.")
    kept_error: float = Field(description="Its standard error over the draws.")
    groups: list[str]
    chosen_bits: list[int]
    least_bits: list[int] = Field(description="Fewest in a draw, group by group.")
    median_bits: list[int]
    most_bits: list[int]
    regret: float | None = Field(
        description="Ω of a draw's allocation over the chosen one's, minus 1, with the traces as "
        "estimated; mean over the draws. null: the chosen one's Ω is zero."
    )
    regret_error: float | None = Field(description="Its standard error over the draws.")
    regret_95: float | None = Field(description="The 95 % quantile over the draws.")


class CalibrationArtefact(_Artefact):
    """How far Ω can be trusted: against the measured loss, and against its own errors."""

    num_examples: int = Field(description="Training images that losses are measured on.")
    loss: float = Field(description="Unquantized, their mean.")
    standard_error: float
    choices: list[GroupIncrease]
    all_choices: Agreement
    clear_choices: Agreement = Field(
        description="Of those with a measured increase above two standard errors."
    )
    candidates: list[CandidateIncrease] = Field(description="Each distinct allocation once.")
    num_overflows: int = Field(description="Choices and candidates left out: loss not finite.")
    interactions: Interactions | None = Field(
        description="At the bits of the first budget's exact candidate, or else of its first; "
        "null: too many groups, or an overflow."
    )
    num_draws: int = Field(description="Of the traces.")
    stability: list[BudgetStability]


class EpochRecord(_Artefact):
    """One epoch of a trial; epoch 0 is before any training."""

    epoch: int
    loss: float | None
    search_score: float
    seconds: float


class Trial(_Artefact):
    """The fine-tuning of one allocation."""

    digest: str
    folder: str = Field(description="Below ``trials/``.")
    status: Literal["finished", "stopped", "failed"]
    reason: str = Field(description="Why it stopped early or failed; empty otherwise.")
    epochs: list[EpochRecord]
    seconds: float
    cpu_seconds: float
    zeroed: list[str] = Field(
        [], description="Layers whose quantized weight is zero everywhere at the end."
    )

    @property
    def search_score(self) -> float | None:
        """The last epoch's score on the search split."""
        return self.epochs[-1].search_score if self.epochs else None


class SeededTrial(Trial):
    """The same, with the seed of the fine-tuning."""

    seed: int


class StudyTrial(Trial):
    """The fine-tuning of a candidate with the parameters that a study chose."""

    number: int = Field(description="In Optuna's study, from 0; folders are below ``study/``.")
    parameters: dict[str, str | int | float] = Field(
        description="Keys of finetune, range of the quantizers, candidate by its digest."
    )
    stored_bits: int | None = Field(description="Of the weights; null: not an objective.")


class StudyArtefact(_Artefact):
    """What was tried to find a recipe; Optuna's own study is ``study/optuna.db``."""

    sampler: Literal["tpe", "nsga2"]
    digest: str | None = Field(description="Of the candidate; null: it was chosen, too.")
    method: str | None = Field(description="Whose candidate; null: likewise.")
    epochs: int = Field(description="Of a trial.")
    trials: list[StudyTrial]
    chosen: int = Field(description="Number of the trial whose parameters all candidates get.")
    reason: str = Field(description="Why that one.")
    front: list[int] = Field(
        description="Numbers of the trials that no other beats in score and size, smallest first; "
        "of nsga2."
    )

    @property
    def parameters(self) -> dict[str, str | int | float]:
        """The chosen ones."""
        return next(trial.parameters for trial in self.trials if trial.number == self.chosen)


class TrialsArtefact(_Artefact):
    """Every trial; their weights are in ``trials/FOLDER/model.safetensors``."""

    trials: list[SeededTrial]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in the order of the config."""
        return tuple(dict.fromkeys(trial.seed for trial in self.trials))

    def of(self, candidate: Candidate) -> list[SeededTrial]:
        """Return the trials of a candidate, in the order of the seeds."""
        found = {(trial.digest, trial.seed): trial for trial in self.trials}
        return [found[t] for t in candidate.trainings(self.seeds) if t in found]


class Score(_Artefact):
    """A score on the test split, in [0, 1], the mean over all trainings of a candidate.

    Standard errors hold the choice of examples and, of several trainings, the spread between them;
    ``search.replicates`` has the formula.
    """

    score: float
    standard_error: float
    drop: float = Field(description="Unquantized minus this, on the same examples.")
    drop_standard_error: float = Field(description="Of the paired difference.")
    seeds: list[int] = Field(
        [], description="Of the trainings that it is the mean of; empty: nothing was trained."
    )
    seed_scores: list[float] = Field([], description="Of each of them.")
    digests: list[str] = Field([], description="Of what each of them trained.")
    seeds_error: float | None = Field(
        None, description="The trainings' part of the errors; null: one training has none."
    )


class Difference(_Artefact):
    """Two candidates on the same test examples and the same seeds, with the paired error."""

    first: str = Field(description="The candidate's key.")
    second: str
    difference: float = Field(description="Score of the first minus score of the second.")
    standard_error: float
    num_seeds: int = Field(1, description="That both were trained with.")
    seeds_error: float | None = Field(
        None, description="The trainings' part of the error; null: one pair has none."
    )


class TestArtefact(_Artefact):
    """Scores on the test split, which nothing before has read."""

    __test__: ClassVar[bool] = False  # no test case, whatever its name makes pytest think

    num_examples: int
    unquantized: Score
    scores: dict[str, Score] = Field(
        description="By the candidate's key: the allocation's digest, and what tells orders and "
        "draws apart."
    )
    differences: list[Difference] = Field(
        description="Of every two scored candidates that have a seed in common, once."
    )

    def paired(self, first: str, second: str) -> tuple[float, float]:
        """Return the difference of two candidates' scores and its standard error.

        Raises:
            KeyError: If the two have no seed in common, or one has no score.
        """
        for pair in self.differences:
            if (pair.first, pair.second) == (first, second):
                return pair.difference, pair.standard_error
            if (pair.second, pair.first) == (first, second):
                return -pair.difference, pair.standard_error
        raise KeyError(f"no paired difference of {first} and {second}")


class StageCost(_Artefact):
    """What a stage cost when it last ran."""

    stage: str
    seconds: float
    cpu_seconds: float = Field(description="Of the driver and of the workers together.")


class Summary(_Artefact):
    """A whole run: what each method found, what it cost to find, how sure we are."""

    schema_version: Literal[1] = 1
    name: str
    seed: int
    finished: str = Field(description="UTC, ISO 8601.")
    machine: dict[str, str]
    versions: dict[str, str]
    config: dict[str, Any] = Field(description="As resolved, with every default.")
    model: ModelArtefact
    curvature: CurvatureArtefact
    tables: TablesArtefact
    searches: SearchesArtefact | None = Field(None, description="null: no method scores.")
    candidates: CandidatesArtefact
    agreement: AgreementArtefact | None = Field(None, description="null: no comparison.")
    calibration: CalibrationArtefact | None = Field(
        None, description="null: a run of an earlier version."
    )
    study: StudyArtefact | None = Field(None, description="null: the recipe is the config's.")
    trials: TrialsArtefact
    test: TestArtefact
    stages: list[StageCost]
