"""The config: one schema for the YAML file, the Python object and a request's body.

``search.config_file`` reads it from YAML.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from hawq.cost import FLOAT_BITS, average_bits, compression, mib
from hawq.curvature import EstimatorName, StopRule
from hawq.finetune import Recipe
from hawq.space import Space
from search.searchers import SEARCHERS

__all__ = ["Budget", "RecipeConfig", "SearchConfig", "TaskConfig", "TrialsConfig", "suggestion"]

Bits = Annotated[int, Field(ge=1, le=8)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RecipeConfig(_Section):
    """How to train: SGD with Nesterov momentum, a warm-up, then a cosine to zero."""

    epochs: Positive = Field(10, description="Passes over the training split.")
    batch_size: Positive = Field(128, description="Examples a step.")
    lr: float = Field(0.02, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps with a rising rate.")
    scale_lr: float = Field(
        1.0, ge=0, description="Rate of quantization scales, as multiple of lr."
    )
    freeze_batch_norm: Share = Field(
        0.6, description="Share of the epochs after which batch-norm statistics stay fixed."
    )
    examples_per_epoch: Positive | None = Field(None, description="null: the whole split.")
    precision: Literal["fp32", "bf16"] = "fp32"

    def recipe(self) -> Recipe:
        """Return the same as the training loop takes it."""
        return Recipe(**self.model_dump())


class TaskConfig(_Section):
    """The network, its data and its splits."""

    data: Literal["digits", "cifar10"] | None = Field(None, description="A built-in image set.")
    root: str | None = Field(None, description="Folder of the image set's files.")
    network: str = Field(
        "resnet20",
        pattern=r"^resnet\d+$",
        description="resnet8, resnet14, resnet20, resnet32, resnet44, resnet56 (for small images).",
    )
    factory: str | None = Field(
        None, description="package.module:callable that returns your own Task, instead of data."
    )
    arguments: dict[str, JsonValue] = Field({}, description="Keyword arguments of the factory.")
    checkpoint: str | None = Field(None, description="safetensors or torch file of weights.")
    pretrain: RecipeConfig | None = Field(
        None, description="Train the network first, where there is no checkpoint."
    )
    search_size: Positive = Field(5000, description="Training images held out to rank candidates.")
    search_indices: str | None = Field(
        None, description="JSON list of training images to rank on that the checkpoint never saw."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TaskConfig":
        if (self.data is None) == (self.factory is None):
            raise ValueError("give either data (digits, cifar10) or factory (package.module:name)")
        if self.data is not None and (self.checkpoint is None) == (self.pretrain is None):
            raise ValueError("give either checkpoint (a file of weights) or pretrain (a recipe)")
        depth = int(self.network.removeprefix("resnet"))
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"network must be resnet8, resnet14, resnet20 … (6n+2), got {depth}")
        return self


class CurvatureConfig(_Section):
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


class WeightsConfig(_Section):
    """What each layer's weight may receive."""

    bits: Annotated[list[Bits], Field(min_length=1)] = Field([1, 2, 3, 4, 5, 6, 7, 8])
    pin: dict[str, Bits] = Field({}, description="Layer name or glob to fixed bits.")


class ActivationsConfig(_Section):
    """Every quantized layer's input."""

    bits: Bits | None = Field(4, description="null leaves activations in floating point.")
    input_bits: Bits = Field(8, description="Where the input is the network's own.")


class Budget(_Section):
    """The size of all weights together; exactly one key."""

    weight_mib: float | None = Field(None, gt=0, description="MiB (2^20 bytes).")
    compression: float | None = Field(None, gt=0, description="Times smaller than 32-bit floats.")
    average_bits: float | None = Field(None, gt=0, description="Bits a weight.")

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give exactly one of weight_mib, compression, average_bits")
        return self

    @property
    def label(self) -> str:
        """The budget in words."""
        if self.weight_mib is not None:
            return f"{self.weight_mib:g} MiB"
        if self.compression is not None:
            return f"{self.compression:g}×"
        return f"{self.average_bits:g} bits"

    def with_size(self, space: Space, bits: int) -> str:
        """Say in this budget's own unit what ``bits`` would be."""
        if self.weight_mib is not None:
            return f"{mib(bits):.4g} MiB"
        if self.compression is not None:
            return f"{compression(space, bits):.4g}×"
        return f"{average_bits(space, bits):.4g} bits"

    def limit_bits(self, space: Space) -> int:
        """Convert to whole bits for a space."""
        if self.weight_mib is not None:
            return int(self.weight_mib * (8 << 20))
        if self.compression is not None:
            return int(FLOAT_BITS * space.num_elements / self.compression)
        assert self.average_bits is not None
        return int(self.average_bits * space.num_elements)


class TrialsConfig(_Section):
    """Fine-tuning in parallel under Ray Tune."""

    cpus: float = Field(1, gt=0, description="CPUs (and threads) a trial.")
    gpus: float = Field(0, ge=0, description="GPUs a trial.")
    max_concurrent: Positive | None = Field(None, description="null: as many as fit.")
    max_failures: int = Field(3, ge=0, description="Restarts of a trial whose worker died.")
    asha: bool = Field(False, description="Stop poor trials early; they are then not comparable.")


class WorkersConfig(_Section):
    """Curvature in parallel on Ray workers."""

    count: Positive | None = Field(None, description="null: one for each CPU of the cluster.")
    cpus: float = Field(1, gt=0, description="CPUs (and threads) a worker.")
    gpus: float = Field(0, ge=0, description="GPUs a worker.")


class RayConfig(_Section):
    """The cluster."""

    address: str | None = Field(None, description="null starts Ray on this machine.")
    dashboard: bool = Field(True, description="Start the dashboard with a local Ray.")


class SearchConfig(_Section):
    """A search: the task, what may be chosen, within which budgets, by which methods."""

    seed: int = Field(0, ge=0)
    task: TaskConfig
    curvature: CurvatureConfig = CurvatureConfig()
    weights: WeightsConfig = WeightsConfig()
    activations: ActivationsConfig = ActivationsConfig()
    budgets: Annotated[list[Budget], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)] = list(SEARCHERS)
    finetune: RecipeConfig = RecipeConfig()
    trials: TrialsConfig = TrialsConfig()
    workers: WorkersConfig = WorkersConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _known_methods(self) -> "SearchConfig":
        for method in self.methods:
            if method not in SEARCHERS:
                raise ValueError(
                    f"methods: {method!r} is not known{suggestion(method, SEARCHERS)}; "
                    f"known are {', '.join(SEARCHERS)}"
                )
        return self


def suggestion(key: str, known: Mapping[str, object]) -> str:
    """Name the known key that is nearest to a mistaken one, or all of them."""
    near = difflib.get_close_matches(key, known, 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
