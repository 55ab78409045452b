"""How much work each stage is, and where it is done."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from hawq.curvature import EstimatorName, StopRule
from search.config.section import Positive, Section

__all__ = ["CalibrationConfig", "CurvatureConfig", "RayConfig", "TrialsConfig", "WorkersConfig"]


class CurvatureConfig(Section):
    """Hessian traces: on how many examples, to what error."""

    estimator: Literal["auto"] | EstimatorName = Field(
        "auto",
        description="auto: Gauss-Newton, in the cheapest way, where it is the Hessian, else "
        "hutchinson; or gauss_newton (in the cheapest way), exact_gauss_newton, "
        "mixed_gauss_newton, hutchinson, finite_difference, fisher (the empirical one).",
    )
    examples: Positive = Field(512, description="Training examples.")
    pool: Positive | None = Field(
        16384, description="Draw them by importance from so many; null: uniformly."
    )
    batch_size: Positive = Field(32, description="Examples a unit of work.")
    memory_gib: float | None = Field(
        None, gt=0, description="A worker's memory: what fits of a unit is taken at once."
    )
    probes_per_unit: int = Field(4, ge=2, description="Probes a unit; they share a forward pass.")
    rtol: float = Field(
        0.05, gt=0, description="Stop when every group's probe error is at most this share of it."
    )
    atol: float = Field(0.0, ge=0, description="Added to that, as a share of the sum of all.")
    stop: StopRule = Field(
        "error",
        description="error: as above; shares: every share of the sum is known to rtol; order: the "
        "order of the average traces is beyond doubt; count: max_probes.",
    )
    max_probes: int = Field(200, ge=2, description="Probes an example at most.")

    @model_validator(mode="after")
    def _measurable(self) -> "CurvatureConfig":
        if self.examples <= self.batch_size:
            raise ValueError(
                "examples must be more than batch_size, for errors need two batches, "
                f"got {self.examples} and {self.batch_size}"
            )
        if self.max_probes < self.probes_per_unit:
            raise ValueError(
                "max_probes must be at least probes_per_unit, "
                f"got {self.max_probes} and {self.probes_per_unit}"
            )
        return self


class CalibrationConfig(Section):
    """How far Ω can be trusted: predicted against measured loss, and allocations' stability."""

    examples: int = Field(512, ge=2, description="Training images to measure losses on.")
    choices: Positive = Field(
        120,
        description="Single choices (one group at some bits) to measure, spread over the space, at "
        "most; and at most as many again that candidates are made of.",
    )
    draws: int = Field(100, ge=2, description="Draws of the traces within their errors.")
    interactions: int = Field(
        12, ge=0, description="Measure pairs of groups where there are at most so many groups."
    )


class TrialsConfig(Section):
    """Fine-tuning in parallel under Ray Tune."""

    cpus: float = Field(1, gt=0, description="CPUs (and threads) a trial.")
    gpus: float = Field(0, ge=0, description="GPUs a trial.")
    workers: Positive = Field(
        1, description="Processes that train a trial together, each with the CPUs and GPUs above."
    )
    max_concurrent: Positive | None = Field(None, description="null: as many as fit.")
    max_failures: int = Field(3, ge=0, description="Restarts of a trial whose worker died.")
    asha: bool = Field(False, description="Stop poor trials early; they are then not comparable.")
    mlflow: str | None = Field(
        None,
        description="Tracking URI of MLflow (sqlite:////path/mlflow.db, http://host:5000), to keep "
        "every trial's course there as well.",
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None,
        description="Seeds of the fine-tuning: every candidate is trained once with each; null: "
        "the seed above.",
    )

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds is not None and len(set(seeds)) < len(seeds):
            raise ValueError(f"must be different whole numbers, got {seeds}")
        return seeds


class WorkersConfig(Section):
    """Curvature in parallel on Ray workers."""

    count: Positive | None = Field(None, description="null: one for each CPU of the cluster.")
    cpus: float = Field(1, gt=0, description="CPUs (and threads) a worker.")
    gpus: float = Field(0, ge=0, description="GPUs a worker.")


class RayConfig(Section):
    """The cluster."""

    address: str | None = Field(None, description="null starts Ray on this machine.")
    dashboard: bool = Field(True, description="Start the dashboard with a local Ray.")
