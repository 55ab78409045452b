"""The trials of a study: a candidate's fine-tuning with other hyper-parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hawq.quantizers import Schemes
from search.config import RecipeConfig
from search.folder import content_hash
from search.study.space import CANDIDATE
from search.trials import TrialSpec

__all__ = ["NUMBER", "RANGE", "StudySpecs", "with_parameters"]

# What the searcher adds to the parameters.
NUMBER = "number"
# The parameter that is not of the recipe but of the quantizers.
RANGE = "range"


def with_parameters(
    recipe: RecipeConfig, schemes: Schemes, parameters: Mapping[str, Any]
) -> tuple[RecipeConfig, Schemes]:
    """Return a recipe and quantizers with some parameters of a study in place of their own."""
    own = {name: parameters[name] for name in parameters if name in RecipeConfig.model_fields}
    if RANGE in parameters:
        schemes = Schemes(
            weights=replace(schemes.weights, range=parameters[RANGE]),
            activations=replace(schemes.activations, range=parameters[RANGE]),
        )
    return RecipeConfig(**recipe.model_dump() | own), schemes


@dataclass(frozen=True, slots=True)
class StudySpecs:
    """Makes the trials of a study.

    Attributes:
        templates: By an allocation's digest its trial; the first where none is chosen.
        recipe: Where parameters take the place of their own.
        schemes: Likewise.
        root: Their folders are in it.
    """

    templates: Mapping[str, TrialSpec]
    recipe: RecipeConfig
    schemes: Schemes
    root: Path

    def __call__(self, config: Mapping[str, Any]) -> TrialSpec:
        """Return the trial of some parameters, with its number under ``number``."""
        parameters = {name: config[name] for name in config if name != NUMBER}
        digest = parameters.get(CANDIDATE, next(iter(self.templates)))
        template = self.templates[digest]
        recipe, schemes = with_parameters(self.recipe, self.schemes, parameters)
        # Equal parameters have folders of their own: two that train at once must not share one.
        key = content_hash([template.folder.name, recipe.model_dump(mode="json"), parameters])
        return replace(
            template,
            recipe=recipe.recipe(),
            schemes=schemes,
            folder=self.root / f"{config[NUMBER]:03}-{digest}-{key[:8]}",
        )
