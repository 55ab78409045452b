"""What ``hawq trace`` leaves behind, as data."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hawq.curvature import EstimatorName
from search.artefacts import BlockEigenvalue

__all__ = ["EigenvalueDocument", "LossSurface", "TraceDocument", "TraceGroup"]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TraceGroup(_Document):
    """The curvature of one layer, activation tensor, or channel of it."""

    group: str
    n: int = Field(description="Weights, or activations of one example.")
    trace: float = Field(description="Of the mean loss's Hessian block.")
    probe_error: float = Field(description="Standard error over the random probes.")
    data_error: float = Field(description="Standard error over the choice of examples.")
    share: float = Field(description="Of the sum over all sites.")
    share_error: float = Field(description="Its standard error over probes and examples.")


class TraceDocument(_Document):
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


class LossSurface(_Document):
    """The loss along a block's two top eigenvectors."""

    block: str
    eigenvalues: list[float]
    offsets: list[float] = Field(description="Along each, of unit eigenvectors.")
    losses: list[list[float]] = Field(description="Rows along the first eigenvector.")


class EigenvalueDocument(_Document):
    """What ``hawq trace --estimator eigenvalue`` found, block by block."""

    schema_version: Literal[1] = 1
    name: str
    weights_sha256: str = Field(description="Of the network, as a run's model has it.")
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
