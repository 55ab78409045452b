"""What layers, tensors and channels may receive, and how they are quantized."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hawq.quantizers import RangeMethod, Scheme
from hawq.space import Kind, Space
from search.config.section import Bits, Positive, Section

__all__ = ["ActivationsConfig", "ChannelsConfig", "WeightsConfig"]


class _Rules(Section):
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


class _QuantizerConfig(Section):
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


class ChannelsConfig(Section):
    """What the method channel's allocations must follow."""

    max_widths: Positive | None = Field(None, description="Different widths a layer may use.")
    multiple: Positive = Field(
        1, description="Channels of one width come in multiples of this: 8, 16, 32."
    )
