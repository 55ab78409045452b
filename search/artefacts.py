"""What each stage of a run leaves behind, as data: the JSON files of a run's folder.

Every artefact can be read without this program. Lists over layers follow the order of ``space``,
tables have one row a layer and one column a bit-width of ``widths``. Sizes are exact bits.
``hawq schema summary`` prints the JSON Schema of ``summary.json``, which holds all of them.
"""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from hawq.curvature import EstimatorName

__all__ = [
    "BlockEigenvalue",
    "BudgetLimit",
    "Candidate",
    "CandidatesArtefact",
    "CurvatureArtefact",
    "Difference",
    "EigenvalueDocument",
    "EpochRecord",
    "FrontPoints",
    "LossSurface",
    "ModelArtefact",
    "Score",
    "StageCost",
    "Summary",
    "TablesArtefact",
    "TestArtefact",
    "TraceDocument",
    "TraceGroup",
    "Trial",
    "TrialsArtefact",
]


class _Artefact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelArtefact(_Artefact):
    """The network to be quantized; its weights are in ``model.safetensors``."""

    weights_sha256: str
    num_parameters: int
    num_quantizable: int = Field(description="Weights of convolutions and linear layers.")
    source: Literal["checkpoint", "trained", "factory"]
    train_size: int
    search_size: int
    search_seen: bool = Field(
        description="Whether the network was trained on the search split: if so, its scores there "
        "rank candidates but do not measure drops."
    )
    score_name: str
    search_score: float = Field(description="Unquantized, on the search split, in [0, 1].")


class CurvatureArtefact(_Artefact):
    """Hessian traces of every layer's weight, with both of their standard errors."""

    estimator: EstimatorName
    reason: str = Field(description="Why this estimator.")
    layers: list[str]
    num_elements: list[int]
    trace: list[float] = Field(description="Of the mean loss's Hessian block.")
    probe_error: list[float] = Field(description="Standard error over the random probes.")
    data_error: list[float] = Field(description="Standard error over the choice of examples.")
    share_error: list[float] = Field(
        description="Standard error of trace / Σ trace, over probes and examples: what an "
        "allocation depends on."
    )
    num_probes: int = Field(description="On every example; 0 for the exact estimator.")
    num_examples: int
    pool_size: int | None = Field(
        description="Examples that these were drawn from by importance; null: drawn uniformly."
    )
    rtol: float
    converged: bool = Field(description="Whether every probe error is at most rtol of its trace.")
    num_negative: int = Field(description="Negative traces; they count as zero in Ω.")


class TraceGroup(_Artefact):
    """The curvature of one layer, activation tensor, or channel of it."""

    group: str
    n: int = Field(description="Weights, or activations of one example.")
    trace: float = Field(description="Of the mean loss's Hessian block.")
    probe_error: float = Field(description="Standard error over the random probes.")
    data_error: float = Field(description="Standard error over the choice of examples.")
    share: float = Field(description="Of the sum over all sites.")
    share_error: float = Field(description="Its standard error over probes and examples.")


class TraceDocument(_Artefact):
    """What ``hawq trace`` found: the sites first, then their channels where they were asked for."""

    schema_version: Literal[1] = 1
    name: str
    subject: Literal["weights", "activations"]
    granularity: Literal["layer", "channel"]
    estimator: EstimatorName
    reason: str
    seed: int
    num_sites: int
    num_probes: int = Field(description="On every example; 0 for an exact estimator.")
    num_examples: int
    pool_size: int = Field(description="Examples that these were drawn from.")
    population_size: int = Field(description="Examples that the pool was drawn from.")
    rtol: float
    converged: bool = Field(description="Whether every group met the tolerance.")
    num_negative: int = Field(description="Negative traces; they count as zero in Ω.")
    workers: int
    seconds: float = Field(description="Workers' start, look at the pool, and probes.")
    cpu_seconds: float
    finished: str = Field(description="UTC, ISO 8601.")
    machine: dict[str, str]
    versions: dict[str, str]
    groups: list[TraceGroup]


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


class LossSurface(_Artefact):
    """The loss along a block's two top eigenvectors."""

    block: str
    eigenvalues: list[float]
    offsets: list[float] = Field(description="Along each, of unit eigenvectors.")
    losses: list[list[float]] = Field(description="Rows along the first eigenvector.")


class EigenvalueDocument(_Artefact):
    """What ``hawq trace --estimator eigenvalue`` found, block by block."""

    schema_version: Literal[1] = 1
    name: str
    seed: int
    num_examples: int
    pool_size: int
    population_size: int
    rtol: float
    workers: int
    seconds: float
    cpu_seconds: float
    finished: str = Field(description="UTC, ISO 8601.")
    machine: dict[str, str]
    versions: dict[str, str]
    blocks: list[BlockEigenvalue]
    surfaces: list[LossSurface] = Field(description="Of the blocks of largest and smallest λ.")


class TablesArtefact(_Artefact):
    """Sensitivity Ω and size of every layer at every bit-width."""

    space: list[dict[str, Any]] = Field(description="The groups: name, elements, MACs, menu, tie.")
    space_fingerprint: str
    widths: list[int]
    sensitivity: list[list[float | None]] = Field(description="Ω; null where not allowed.")
    squared_error: list[list[float]] = Field(description="‖Q(W) − W‖².")
    weight_bits: list[list[int]]


class BudgetLimit(_Artefact):
    """A budget of the config, converted to bits."""

    label: str
    limit_bits: int


class FrontPoints(_Artefact):
    """The undominated points that one method can offer."""

    method: str
    weight_bits: list[int]
    sensitivity: list[float]


class Candidate(_Artefact):
    """What one method chose under one budget."""

    method: str
    budget: str = Field(description="The label of the budget.")
    digest: str = Field(description="Of the allocation: equal choices are trained once.")
    bits: dict[str, int] = Field(description="Group name to bits, in the space's order.")
    weight_bits: int
    average_bits: float
    compression: float
    sensitivity: float = Field(description="Ω of the whole allocation.")
    evaluations: int = Field(description="Allocations that the method scored to find this one.")
    seconds: float


class CandidatesArtefact(_Artefact):
    """The fronts, and the candidates that will be fine-tuned."""

    budgets: list[BudgetLimit]
    fronts: list[FrontPoints]
    candidates: list[Candidate]


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

    @property
    def search_score(self) -> float | None:
        """The last epoch's score on the search split."""
        return self.epochs[-1].search_score if self.epochs else None


class TrialsArtefact(_Artefact):
    """Every trial; their weights are in ``trials/FOLDER/model.safetensors``."""

    trials: list[Trial]


class Score(_Artefact):
    """A score on the test split, in [0, 1], with standard errors over its examples."""

    score: float
    standard_error: float
    drop: float = Field(description="Unquantized minus this, on the same examples.")
    drop_standard_error: float = Field(description="Of the paired difference.")


class Difference(_Artefact):
    """Two candidates on the same test examples; the error is that of the paired difference."""

    first: str = Field(description="Digest.")
    second: str
    difference: float = Field(description="Score of the first minus score of the second.")
    standard_error: float


class TestArtefact(_Artefact):
    """Scores on the test split, which nothing before has read."""

    __test__: ClassVar[bool] = False  # no test case, whatever its name makes pytest think

    num_examples: int
    unquantized: Score
    scores: dict[str, Score] = Field(description="By the allocation's digest.")
    differences: list[Difference] = Field(description="Of every two scored candidates, once.")

    def paired(self, first: str, second: str) -> tuple[float, float]:
        """Return the difference of two candidates' scores and its standard error."""
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
    candidates: CandidatesArtefact
    trials: TrialsArtefact
    test: TestArtefact
    stages: list[StageCost]
