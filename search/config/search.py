"""The whole config."""

from typing import Annotated

from pydantic import Field, model_validator

from hawq.quantizers import Schemes
from search.config.budget import JOINT_LIMITS, SUM_LIMITS, Budget
from search.config.recipe import RecipeConfig
from search.config.searches import ComparisonConfig, SearchesConfig
from search.config.section import Positive, Section, suggestion
from search.config.space import ActivationsConfig, ChannelsConfig, WeightsConfig
from search.config.study import StudyConfig
from search.config.task import TaskConfig
from search.config.work import (
    CalibrationConfig,
    CurvatureConfig,
    RayConfig,
    TrialsConfig,
    WorkersConfig,
)
from search.searchers import SEARCHERS

__all__ = ["SearchConfig"]


class SearchConfig(Section):
    """A search: the task, what may be chosen, within which budgets, by which methods."""

    seed: int = Field(0, ge=0)
    task: TaskConfig
    curvature: CurvatureConfig = CurvatureConfig()
    weights: WeightsConfig = WeightsConfig()
    activations: ActivationsConfig = ActivationsConfig()
    channels: ChannelsConfig = ChannelsConfig()
    latency: str | None = Field(None, description="Latency table; make one with hawq profile.")
    budgets: Annotated[list[Budget], Field(min_length=1)]
    methods: list[str] = Field(["uniform", "hawq-v2", "exact"], min_length=1)
    uniform_draws: Positive = Field(
        1,
        description="Random orders of uniform at a fractional number of bits. Of several, number d "
        "is trained with seed number d of trials.seeds alone, counted around.",
    )
    searches: SearchesConfig = SearchesConfig()
    comparison: ComparisonConfig | None = Field(
        None, description="null: one search of each method, and no comparison of searches."
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
                f"does: give one of {', '.join(JOINT_LIMITS)}, or search twice"
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
                odd = [key for key in budget.given if key not in SUM_LIMITS]
                if odd:
                    raise ValueError(
                        f"budgets.{index}: {odd[0]} is no sum of the weights or the activations "
                        f"alone: leave {method} out of methods, or limit {', '.join(SUM_LIMITS)}"
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
            odd = [key for key in budget.given if key not in SUM_LIMITS]
            if odd:
                raise ValueError(
                    f"budgets.{index}: {odd[0]} does not add up over channels: leave channel out "
                    f"of methods, or limit {', '.join(SUM_LIMITS)}"
                )
        return self

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """The seeds that every candidate is fine-tuned with."""
        return tuple(self.trials.seeds or [self.seed])

    @property
    def schemes(self) -> Schemes:
        """How weights and activations are quantized, for Ω and for training alike."""
        return Schemes(self.weights.quantizer.scheme(), self.activations.quantizer.scheme())

    @property
    def by_channel(self) -> bool:
        """Whether some method gives channels bits of their own."""
        return any(SEARCHERS[method].by_channel for method in self.methods)

    @property
    def searching(self) -> list[str]:
        """The methods that score what they try."""
        return [method for method in self.methods if SEARCHERS[method].needs_scores]

    @property
    def search_seeds(self) -> tuple[int, ...]:
        """The seeds of the searches of each of them."""
        return tuple(
            range(self.seed, self.seed + (self.comparison.seeds if self.comparison else 1))
        )

    @property
    def by_block(self) -> bool:
        """Whether some method goes by the top eigenvalues of blocks."""
        return any(SEARCHERS[method].needs_blocks for method in self.methods)

    @property
    def searches_activations(self) -> bool:
        """Whether activations are chosen with the weights."""
        return any(budget.limits_activations for budget in self.budgets)
