"""What an allocation may cost, in the units that people use."""

from dataclasses import dataclass

from pydantic import Field, model_validator

from hawq.cost import FLOAT_BITS, num_elements
from hawq.space import Space
from search.config.section import Section

__all__ = ["JOINT_LIMITS", "SUM_LIMITS", "Budget"]


class Budget(Section):
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
# Keys for whose sake activations are searched; keys that are sums of weights or activations alone.
JOINT_LIMITS = [key for key, limit in _LIMITS.items() if limit.is_joint]
SUM_LIMITS = [k for k, limit in _LIMITS.items() if limit.cost in {"weight_bits", "activation_bits"}]
