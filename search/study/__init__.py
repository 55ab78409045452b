"""A study of the recipe: Optuna looks for good hyper-parameters before candidates are compared.

Every trial of a study is a fine-tuning like any other, a pure function of its parameters and the
seed. Which parameters are tried is up to the sampler, which sees the trials that have ended: one
after the other (``trials.max_concurrent: 1``) a study is reproducible, bit for bit, also when it is
killed and goes on; several at once end in an order of their own, and a repeated study may try
others. Early stopping compares with what this process has seen, so a study with ``asha`` that was
killed may stop others, too.
"""

from search.study.searcher import RecipeSearch, storage_url
from search.study.space import distributions, middle
from search.study.trying import StudySpecs, with_parameters

__all__ = [
    "RecipeSearch",
    "StudySpecs",
    "distributions",
    "middle",
    "storage_url",
    "with_parameters",
]
