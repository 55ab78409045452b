"""What a study may choose, as Optuna takes it."""

from collections.abc import Sequence

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from search.config import Choices, Interval, RecipeConfig, StudyConfig

__all__ = ["CANDIDATE", "distributions", "middle"]

# The parameter that names an allocation, where the study chooses that, too.
CANDIDATE = "candidate"


def distributions(
    study: StudyConfig, candidates: Sequence[str] = ()
) -> dict[str, BaseDistribution]:
    """Return what may be chosen, by name.

    Args:
        study: Its space.
        candidates: Digests, where the allocation is chosen, too.
    """
    found = {name: _distribution(name, allowed) for name, allowed in study.space.items()}
    if candidates:
        found[CANDIDATE] = CategoricalDistribution(list(candidates))
    return found


def middle(
    study: StudyConfig, recipe: RecipeConfig, range_method: str, candidates: Sequence[str] = ()
) -> dict[str, str | float | int] | None:
    """Return the parameters of the recipe as it is, to be tried first; None if it is not allowed.

    Args:
        study: Its space.
        recipe: As configured.
        range_method: Of the quantizers, as configured.
        candidates: Digests, where the allocation is chosen, too.
    """
    base = recipe.model_dump() | {"range": range_method}
    own = {name: base[name] for name in study.space}
    if not all(_allows(study.space[name], value) for name, value in own.items()):
        return None
    return own | ({CANDIDATE: candidates[0]} if candidates else {})


def _allows(allowed: Interval | Choices, value: object) -> bool:
    if isinstance(allowed, Interval):
        return isinstance(value, float | int) and allowed.low <= value <= allowed.high
    return value in allowed


def _distribution(name: str, allowed: Interval | Choices) -> BaseDistribution:
    if not isinstance(allowed, Interval):
        return CategoricalDistribution(list(allowed))
    if isinstance(RecipeConfig.model_fields[name].default, int):
        return IntDistribution(int(allowed.low), int(allowed.high), log=allowed.log)
    return FloatDistribution(allowed.low, allowed.high, log=allowed.log)
