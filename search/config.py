"""The config: one schema for the YAML file, the Python object and a request's body.

``search.config_file`` reads it from YAML.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from hawq.cost import FLOAT_BITS, num_elements
from hawq.curvature import EstimatorName, StopRule
from hawq.finetune import Recipe
from hawq.quantizers import RangeMethod, Scheme
from hawq.space import Kind, Space
from search.searchers import SEARCHERS

__all__ = [
    "Budget",
    "Choices",
    "Interval",
    "RecipeConfig",
    "SearchConfig",
    "StudyConfig",
    "TaskConfig",
    "TrialsConfig",
    "suggestion",
]

Bits = Annotated[int, Field(ge=1, le=8)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RecipeConfig(_Section):
    """How to train: SGD with Nesterov momentum, a warm-up, then a falling rate."""

    epochs: Positive = Field(10, description="Passes over the training split.")
    batch_size: Positive = Field(128, description="Examples a step.")
    lr: float = Field(0.02, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps with a rising rate.")
    schedule: Literal["cosine", "step"] = Field(
        "cosine", description="After the warm-up: cosine to zero, or step."
    )
    milestones: tuple[Share, ...] = Field(
        (0.5, 0.75), description="Of step: shares of the steps after which the rate falls."
    )
    step_factor: float = Field(
        0.1, gt=0, le=1, description="Of step: the rate is multiplied by it."
    )
    scale_lr: float = Field(
        1.0, ge=0, description="Rate of quantization scales, as multiple of lr."
    )
    freeze_batch_norm: Share = Field(
        0.6, description="Share of the epochs after which batch-norm statistics stay fixed."
    )
    reestimate_batch_norm: int = Field(
        0,
        ge=0,
        description="Training batches, without augmentation, on which batch-norm statistics are "
        "estimated again at the end; 0: not at all.",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a running average of the weights, which is what is scored and kept; "
        "null: the last weights.",
    )
    distillation: Share = Field(
        0.0, description="Weight of imitating the unquantized network's outputs, in the loss."
    )
    temperature: float = Field(4.0, gt=0, description="Of both networks' outputs in distillation.")
    activations_first: float = Field(
        0.0, ge=0, lt=1, description="Share of the training with activations quantized alone."
    )
    staging: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Share of the training within which blocks of layers are quantized one after "
        "the other, for the methods that do so.",
    )
    examples_per_epoch: Positive | None = Field(None, description="null: the whole split.")
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _consistent(self) -> "RecipeConfig":
        self.recipe()
        return self

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
    fold_batch_norm: bool = Field(
        False, description="Fold every batch-norm that follows a layer into it, before the search."
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
        if self.pretrain is not None and self.pretrain.distillation:
            raise ValueError(
                "pretrain.distillation must be 0, for there is no network to learn from yet, "
                f"got {self.pretrain.distillation:g}"
            )
        if self.pretrain is not None and self.fold_batch_norm:
            raise ValueError(
                "fold_batch_norm needs trained weights, for a network trains with its batch-norm, "
                "got pretrain: train first, then search again from checkpoint: "
                "RUN/model.safetensors"
            )
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


class _Rules(_Section):
    """What single layers, or tensors, may receive; names are globs."""

    keep: list[str] = Field(
        [], description="Names or globs of what stays in floating point; first, last."
    )
    pin: dict[str, Bits] = Field({}, description="Name or glob to fixed bits.")
    menus: dict[str, Annotated[list[Bits], Field(min_length=1)]] = Field(
        {}, description="Name or glob to the bit-widths it may receive, instead of bits."
    )
    min_bits: dict[str, Bits] = Field(
        {}, description="Name or glob to its least bits; first and last mean those layers."
    )
    tie: list[Annotated[list[str], Field(min_length=1)]] = Field(
        [], description="Lists of names or globs: what a list matches shares its bits."
    )

    def apply(self, space: Space, kind: Kind) -> Space:
        """Restrict a space.

        Raises:
            ValueError: If a glob matches nothing, or the rules contradict each other.
        """
        space = space.restricted(self.menus, kind).at_least(self.min_bits, kind)
        return space.pinned(self.pin, kind).tied(self.tie, kind)


class _QuantizerConfig(_Section):
    range: RangeMethod = Field(
        "mse",
        description="Where scales begin, and what Ω sees: mse (least squared error), minmax, or "
        "percentile (of the magnitudes).",
    )
    percentile: float = Field(99.9, gt=50, le=100)
    symmetric: bool = Field(True, description="false: a zero point shifts the codes.")

    @model_validator(mode="after")
    def _makes_sense(self) -> "_QuantizerConfig":
        self.scheme()
        return self

    def scheme(self) -> Scheme:
        """Return the same as the quantizers take it."""
        return Scheme(**self.model_dump())


class WeightQuantizerConfig(_QuantizerConfig):
    """How weights become codes."""

    learning: Literal["lsq", "dorefa", "fixed"] = Field(
        "lsq", description="Learned scales; tanh as DoReFa; or scales that stay as they began."
    )
    per: Literal["channel", "tensor"] = Field("channel", description="What has a scale.")


class ActivationQuantizerConfig(_QuantizerConfig):
    """How activations become codes."""

    learning: Literal["lsq", "pact", "dorefa", "fixed"] = Field(
        "lsq", description="Learned scales; learned clipping; clipped at 1; or as they began."
    )
    per: Literal["tensor", "channel"] = Field("tensor", description="What has a scale.")


class WeightsConfig(_Rules):
    """What each layer's weight, or each of its output channels, may receive."""

    quantizer: WeightQuantizerConfig = WeightQuantizerConfig()

    bits: Annotated[list[Annotated[int, Field(ge=0, le=8)]], Field(min_length=1)] = Field(
        [1, 2, 3, 4, 5, 6, 7, 8],
        description="0, a pruned channel, is for the method channel alone.",
    )
    tie_sums: bool = Field(
        False, description="Layers whose outputs are added to each other share their bits."
    )


class ActivationsConfig(_Rules):
    """What each quantized layer reads: a tensor that several read is one."""

    quantizer: ActivationQuantizerConfig = ActivationQuantizerConfig()

    bits: Bits | None = Field(
        4, description="Of all, where no budget limits activations; null: floating point."
    )
    input_bits: Bits = Field(8, description="Of the network's own input.")
    menu: Annotated[list[Bits], Field(min_length=1)] = Field(
        [2, 3, 4, 5, 6, 7, 8],
        description="What each may receive, where a budget limits activations.",
    )


class ChannelsConfig(_Section):
    """What the method channel's allocations must follow."""

    max_widths: Positive | None = Field(None, description="Different widths a layer may use.")
    multiple: Positive = Field(
        1, description="Channels of one width come in multiples of this: 8, 16, 32."
    )


class Budget(_Section):
    """What an allocation may cost: any of these together, sizes once each."""

    weight_mib: float | None = Field(None, gt=0, description="All weights, in MiB (2^20 bytes).")
    compression: float | None = Field(
        None, gt=0, description="Weights: times smaller than 32-bit floats."
    )
    average_bits: float | None = Field(None, gt=0, description="Bits a weight.")
    activation_mib: float | None = Field(
        None, gt=0, description="All activations of one example, in MiB."
    )
    activation_compression: float | None = Field(
        None, gt=0, description="Activations: times smaller than 32-bit floats."
    )
    activation_average_bits: float | None = Field(None, gt=0, description="Bits an activation.")
    peak_activation_mib: float | None = Field(
        None, gt=0, description="Activations of one example in memory at once, in MiB."
    )
    gbops: float | None = Field(
        None, gt=0, description="10^9 bit operations an example: MACs x weight x activation bits."
    )
    latency_ms: float | None = Field(
        None, gt=0, description="Milliseconds an example, by the table under latency."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Budget":
        given = list(self.given)
        if not given:
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        for cost in ("weight_bits", "activation_bits"):
            same = [key for key, limit in _LIMITS.items() if limit.cost == cost]
            found = [key for key in same if key in given]
            if len(found) > 1:
                raise ValueError(f"give one of {', '.join(same)}, got {' and '.join(found)}")
        return self

    @property
    def given(self) -> dict[str, float]:
        """The keys that are given, with their values."""
        return self.model_dump(exclude_none=True)

    @property
    def limits_activations(self) -> bool:
        """Whether activations are chosen, too, for it."""
        return any(_LIMITS[key].is_joint for key in self.given)

    @property
    def label(self) -> str:
        """The budget in words."""
        return ", ".join(_LIMITS[key].words(value) for key, value in self.given.items())

    def limits(self, space: Space) -> dict[str, int]:
        """Convert to whole units, by the names of costs.

        Args:
            space: Of layers or of channels, with activations where they are limited.
        """
        found = {_LIMITS[key].cost: _LIMITS[key].limit(v, space) for key, v in self.given.items()}
        # 2.44 × 10⁵ is a hair below 244,000: a budget of a whole number of bits is that number.
        return {name: int(limit * (1 + 1e-12)) for name, limit in found.items()}

    def in_own_unit(self, space: Space, name: str, cost: int) -> str:
        """Say in this budget's own unit what a cost would be."""
        limit = next(limit for key in self.given if (limit := _LIMITS[key]).cost == name)
        return f"{limit.value(cost, space):.4g}{limit.unit}"


@dataclass(frozen=True, slots=True)
class _Limit:
    """How a key of a budget limits a cost.

    Attributes:
        cost: Its name.
        unit: Of the key's values, as it follows a number.
        factor: Units of the cost in one of the key; None where a value is of each element.
        is_ratio: Whether values are 32-bit floats over the cost.
    """

    cost: str
    unit: str
    factor: float | None = None
    is_ratio: bool = False

    @property
    def is_joint(self) -> bool:
        """Whether activations are searched for its sake."""
        return self.cost not in {"weight_bits", "latency_ns"}

    def words(self, value: float) -> str:
        """Say a value."""
        return f"{_BEFORE.get(self.cost, '')}{value:g}{self.unit}"

    def limit(self, value: float, space: Space) -> float:
        """Return the limit of the cost."""
        if self.factor is not None:
            return value * self.factor
        elements = self._elements(space)
        return FLOAT_BITS * elements / value if self.is_ratio else value * elements

    def value(self, cost: int, space: Space) -> float:
        """Return the key's value that would limit the cost to this much."""
        if self.factor is not None:
            return cost / self.factor
        elements = self._elements(space)
        return FLOAT_BITS * elements / cost if self.is_ratio else cost / elements

    def _elements(self, space: Space) -> int:
        return num_elements(space, "weights" if self.cost == "weight_bits" else "activations")


_MIB = 8 << 20
_BEFORE = {"activation_bits": "activations ", "peak_activation_bits": "activations' peak "}
_LIMITS = {
    "weight_mib": _Limit("weight_bits", " MiB", _MIB),
    "compression": _Limit("weight_bits", "×", is_ratio=True),
    "average_bits": _Limit("weight_bits", " bits"),
    "activation_mib": _Limit("activation_bits", " MiB", _MIB),
    "activation_compression": _Limit("activation_bits", "×", is_ratio=True),
    "activation_average_bits": _Limit("activation_bits", " bits"),
    "peak_activation_mib": _Limit("peak_activation_bits", " MiB", _MIB),
    "gbops": _Limit("bops", " GBOPs", 1e9),
    "latency_ms": _Limit("latency_ns", " ms", 1e6),
}
_JOINT = [key for key, limit in _LIMITS.items() if limit.is_joint]
_SEPARABLE = [k for k, limit in _LIMITS.items() if limit.cost in {"weight_bits", "activation_bits"}]


class CalibrationConfig(_Section):
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


class TrialsConfig(_Section):
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


class Interval(_Section):
    """What a number may be in a study."""

    low: float
    high: float
    log: bool = Field(False, description="Whether ratios count, not differences.")

    @model_validator(mode="after")
    def _consistent(self) -> "Interval":
        if self.low >= self.high:
            raise ValueError(f"low must be less than high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 with log, got {self.low:g}")
        return self


Choices = Annotated[list[str | int | float], Field(min_length=1)]

# What a study may choose by name alone (``lr:`` and nothing more), and its interval then.
_INTERVALS: dict[str, Interval | Choices] = {
    "lr": Interval(low=0.002, high=0.2, log=True),
    "weight_decay": Interval(low=1e-6, high=1e-3, log=True),
    "distillation": Interval(low=0, high=0.9),
    "temperature": Interval(low=1, high=8, log=True),
    "momentum": Interval(low=0.8, high=0.98),
    "warmup": Interval(low=0, high=0.3),
    "scale_lr": Interval(low=0.1, high=10, log=True),
    "freeze_batch_norm": Interval(low=0, high=1),
    "ema": Interval(low=0.9, high=0.999),
    "range": list(get_args(RangeMethod)),
}
# These make trials longer or shorter; a study has keys of its own for them.
_LENGTHS = {"epochs", "examples_per_epoch"}


class StudyConfig(_Section):
    """Look for a good recipe, on the search split, before candidates are compared under it."""

    trials: Positive = Field(20, description="Fine-tunings of the study.")
    sampler: Literal["tpe", "nsga2"] = Field(
        "tpe",
        description="tpe: the best score of one candidate; nsga2: score against stored size, the "
        "candidate is chosen, too.",
    )
    space: Annotated[dict[str, Interval | Choices], Field(min_length=1)] = Field(
        {name: _INTERVALS[name] for name in ("lr", "weight_decay", "range")},
        description="Key of finetune, or range (of the quantizers), to {low, high, log}, a list "
        "of values, or nothing for the usual interval.",
    )
    epochs: Positive | None = Field(None, description="Of a trial; null: as in finetune.")
    examples_per_epoch: Positive | None = Field(None, description="Of a trial; null: likewise.")
    asha: bool = Field(False, description="Stop poor trials early; not with nsga2.")
    candidate: str | None = Field(
        None,
        description="Method whose candidate, at the first budget, is trained; null: the first "
        "method, the reference, so that no other one is favored.",
    )

    @field_validator("space", mode="before")
    @classmethod
    def _usual(cls, space: object) -> object:
        if not isinstance(space, dict):
            return space
        for name, allowed in space.items():
            if allowed is None and name not in _INTERVALS:
                raise ValueError(
                    f"{name} must have {{low, high}} or a list of values, got nothing: known by "
                    f"name alone are {', '.join(_INTERVALS)}"
                )
        return {n: _INTERVALS[n] if allowed is None else allowed for n, allowed in space.items()}

    @model_validator(mode="after")
    def _one_stops(self) -> "StudyConfig":
        if self.asha and self.sampler == "nsga2":
            raise ValueError("asha must be false with nsga2, which needs whole trials, got true")
        return self

    def shortened(self, recipe: RecipeConfig) -> RecipeConfig:
        """Return a recipe with the study's own lengths."""
        own = {"epochs": self.epochs, "examples_per_epoch": self.examples_per_epoch}
        given = {name: value for name, value in own.items() if value is not None}
        return RecipeConfig(**recipe.model_dump() | given)

    def refuse_unknown(self, recipe: RecipeConfig) -> None:
        """Refuse parameters and values that a recipe cannot have.

        Raises:
            ValueError: If so.
        """
        base = self.shortened(recipe).model_dump()
        known = {"range": None} | {name: None for name in base if name not in _LENGTHS}
        for name, allowed in self.space.items():
            if name not in known:
                raise ValueError(f"space.{name} is not known{suggestion(name, known)}")
            if isinstance(allowed, Interval):
                for end in (allowed.low, allowed.high):
                    self._refuse_value(name, end, True, base)
            else:
                for value in allowed:
                    self._refuse_value(name, value, False, base)

    def _refuse_value(
        self, name: str, value: str | float, is_interval: bool, base: dict[str, Any]
    ) -> None:
        methods = get_args(RangeMethod)
        if name == "range":
            if is_interval or value not in methods:
                raise ValueError(f"space.range must list some of {', '.join(methods)}, got {value}")
            return
        if isinstance(RecipeConfig.model_fields[name].default, int):
            if not isinstance(value, float | int) or value != int(value):
                raise ValueError(f"space.{name} must be whole numbers, got {value}")
            value = int(value)
        elif is_interval and isinstance(base[name], str | tuple):
            raise ValueError(f"space.{name} must be a list of values, got an interval")
        try:
            RecipeConfig(**base | {name: value})
        except ValidationError as error:
            told = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(
                f"space.{name} must hold possible values, got {value}: {told}"
            ) from error


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
    channels: ChannelsConfig = ChannelsConfig()
    latency: str | None = Field(None, description="Latency table; make one with hawq profile.")
    budgets: Annotated[list[Budget], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)] = ["uniform", "hawq-v2", "exact"]
    uniform_draws: Positive = Field(
        1,
        description="Random orders of uniform at a fractional number of bits. Of several, number d "
        "is trained with seed number d of trials.seeds alone, counted around.",
    )
    calibration: CalibrationConfig = CalibrationConfig()
    finetune: RecipeConfig = RecipeConfig()
    study: StudyConfig | None = Field(None, description="null: finetune as it is.")
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

    @model_validator(mode="after")
    def _study_that_can_be_run(self) -> "SearchConfig":
        for recipe in (self.finetune, self.study and self.study.shortened(self.finetune)):
            if recipe and recipe.batch_size % self.trials.workers:
                raise ValueError(
                    f"finetune.batch_size: must be a multiple of trials.workers "
                    f"({self.trials.workers}), got {recipe.batch_size}"
                )
        if self.study is None:
            return self
        try:
            self.study.refuse_unknown(self.finetune)
        except ValueError as error:
            raise ValueError(f"study.{error}") from error
        if self.trials.workers > 1 and "batch_size" in self.study.space:
            raise ValueError(
                "study.space.batch_size: must not be chosen with trials.workers above 1, which "
                f"share a batch evenly, got {self.trials.workers}"
            )
        if self.study.candidate is not None and self.study.candidate not in self.methods:
            raise ValueError(
                f"study.candidate: must be one of methods ({', '.join(self.methods)}), "
                f"got {self.study.candidate}"
            )
        return self

    @model_validator(mode="after")
    def _budgets_that_can_be_met(self) -> "SearchConfig":
        joint = [budget.limits_activations for budget in self.budgets]
        if any(joint) and not all(joint):
            raise ValueError(
                f"budgets.{joint.index(False)}: must limit activations too, since another budget "
                f"does: give one of {', '.join(_JOINT)}, or search twice"
            )
        labels = [budget.label for budget in self.budgets]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise ValueError(f"budgets.{index}: must differ from the others, got {label} again")
        for index, budget in enumerate(self.budgets):
            if budget.latency_ms is not None and self.latency is None:
                raise ValueError(
                    f"budgets.{index}: latency_ms needs a latency table, got none under latency: "
                    "make one with hawq profile"
                )
        if not any(self.weights.bits):
            raise ValueError(f"weights.bits: must hold a width above 0, got {self.weights.bits}")
        if 0 in self.weights.bits and not self.by_channel:
            raise ValueError(
                "weights.bits: 0 is for channels, and no method gives them bits: add channel to "
                "methods, or leave 0 out"
            )
        self._sums_within()
        self._blocks_of_weights()
        return self._channels_within()

    def _sums_within(self) -> None:
        for method in self.methods:
            if not SEARCHERS[method].needs_sums or SEARCHERS[method].by_channel:
                continue
            for index, budget in enumerate(self.budgets):
                odd = [key for key in budget.given if key not in _SEPARABLE]
                if odd:
                    raise ValueError(
                        f"budgets.{index}: {odd[0]} is no sum of the weights or the activations "
                        f"alone: leave {method} out of methods, or limit {', '.join(_SEPARABLE)}"
                    )

    def _blocks_of_weights(self) -> None:
        of_blocks = [method for method in self.methods if SEARCHERS[method].needs_blocks]
        if of_blocks and self.searches_activations:
            raise ValueError(
                f"methods: {of_blocks[0]} orders blocks of weights alone, and budgets limit "
                "activations, too: leave it out, or give activations.bits and limit weights"
            )

    def _channels_within(self) -> "SearchConfig":
        for index, budget in enumerate(self.budgets if self.by_channel else ()):
            odd = [key for key in budget.given if key not in _SEPARABLE]
            if odd:
                raise ValueError(
                    f"budgets.{index}: {odd[0]} does not add up over channels: leave channel out "
                    f"of methods, or limit {', '.join(_SEPARABLE)}"
                )
        return self

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """The seeds that every candidate is fine-tuned with."""
        return tuple(self.trials.seeds or [self.seed])

    @property
    def by_channel(self) -> bool:
        """Whether some method gives channels bits of their own."""
        return any(SEARCHERS[method].by_channel for method in self.methods)

    @property
    def by_block(self) -> bool:
        """Whether some method goes by the top eigenvalues of blocks."""
        return any(SEARCHERS[method].needs_blocks for method in self.methods)

    @property
    def searches_activations(self) -> bool:
        """Whether activations are chosen with the weights."""
        return any(budget.limits_activations for budget in self.budgets)


def suggestion(key: str, known: Mapping[str, object]) -> str:
    """Name the known key that is nearest to a mistaken one, or all of them."""
    near = difflib.get_close_matches(key, known, 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
