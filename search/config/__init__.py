"""The config: one schema for the YAML file, the Python object and a request's body.

A module is a section; ``search.config_file`` reads the whole from YAML.
"""

from search.config.budget import Budget
from search.config.recipe import RecipeConfig
from search.config.search import SearchConfig
from search.config.searches import ComparisonConfig, SearchesConfig
from search.config.section import suggestion
from search.config.space import ActivationsConfig, ChannelsConfig, WeightsConfig
from search.config.study import Choices, Interval, StudyConfig
from search.config.task import DetectorConfig, TaskConfig
from search.config.work import (
    CalibrationConfig,
    CurvatureConfig,
    RayConfig,
    TrialsConfig,
    WorkersConfig,
)

__all__ = [
    "ActivationsConfig",
    "Budget",
    "CalibrationConfig",
    "ChannelsConfig",
    "Choices",
    "ComparisonConfig",
    "CurvatureConfig",
    "DetectorConfig",
    "Interval",
    "RayConfig",
    "RecipeConfig",
    "SearchConfig",
    "SearchesConfig",
    "StudyConfig",
    "TaskConfig",
    "TrialsConfig",
    "WeightsConfig",
    "WorkersConfig",
    "suggestion",
]
