"""MLflow, for those who keep their experiments there: Ray's own callback, by one key of the config.

Every trial is a run of the experiment ``hawq-trials`` or ``hawq-study`` with its recipe, digest and
seed as parameters and the metrics that Tune is told of each epoch.
"""

import importlib.util

from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback

from search.errors import InputError

__all__ = ["mlflow_callbacks", "refuse_untrackable"]


def refuse_untrackable(uri: str | None) -> None:
    """Refuse a tracking URI where MLflow is not installed.

    Raises:
        InputError: If so.
    """
    if uri is not None and importlib.util.find_spec("mlflow") is None:
        raise InputError(
            f"trials.mlflow: mlflow must be installed to track at {uri}, got none: "
            "pip install 'hawq-search[tracking]', or leave the key out"
        )


def mlflow_callbacks(uri: str | None, name: str) -> list[tune.Callback]:
    """Return the callback that tells MLflow; none where nothing is tracked.

    Raises:
        InputError: If MLflow is not installed.
    """
    if uri is None:
        return []
    refuse_untrackable(uri)
    return [MLflowLoggerCallback(tracking_uri=uri, experiment_name=f"hawq-{name}")]
