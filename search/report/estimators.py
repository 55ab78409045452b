"""What the estimators are called in words."""

from hawq.curvature import EstimatorName

__all__ = ["ESTIMATORS"]

ESTIMATORS: dict[EstimatorName, str] = {
    "exact_gauss_newton": "Gauss–Newton, exact",
    "mixed_gauss_newton": "Gauss–Newton, with probes of each example’s lesser directions",
    "gauss_newton": "Gauss–Newton",
    "corrected_gauss_newton": "Gauss–Newton, with probes of what the Hessian has besides",
    "hutchinson": "Hutchinson",
    "finite_difference": "Differences of gradients",
    "fisher": "Empirical Fisher",
}
