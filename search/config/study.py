"""The study of recipes: what may be tried."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from hawq.quantizers import RangeMethod
from search.config.recipe import RecipeConfig
from search.config.section import Positive, Section, suggestion

__all__ = ["Choices", "Interval", "StudyConfig"]


class Interval(Section):
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


class StudyConfig(Section):
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
