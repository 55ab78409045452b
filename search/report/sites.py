"""A trace document by site: the tensors that were traced, and the channels of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from search.traced import TraceDocument, TraceGroup

__all__ = ["Sites", "sites_of"]


@dataclass(frozen=True, slots=True)
class Sites:
    """What was traced, in the network's order.

    Attributes:
        groups: The sites.
        channels: Those of each site, as many lists as sites; empty lists where none were traced.
        noun: What a site is: a layer, or an activation tensor.
        element: What the curvature is taken in: weights, or activations.
    """

    groups: Sequence[TraceGroup]
    channels: Sequence[Sequence[TraceGroup]]
    noun: str
    element: str

    @property
    def unit(self) -> str:
        """Of an average trace."""
        return f"loss / {self.element}²"

    @property
    def all_channels(self) -> list[TraceGroup]:
        """The channels of all sites, one after the other."""
        return [channel for site in self.channels for channel in site]

    @property
    def layers(self) -> list[str]:
        """The sites' names."""
        return [group.group for group in self.groups]

    @property
    def num_elements(self) -> list[int]:
        """Weights, or activations of one example, of each site."""
        return [group.n for group in self.groups]

    @property
    def trace(self) -> list[float]:
        """Of each site."""
        return [group.trace for group in self.groups]

    @property
    def probe_error(self) -> list[float]:
        """Standard error over the random probes, of each site."""
        return [group.probe_error for group in self.groups]

    @property
    def data_error(self) -> list[float]:
        """Standard error over the choice of examples, of each site."""
        return [group.data_error for group in self.groups]


def sites_of(found: TraceDocument) -> Sites:
    """Sort a document's groups; channel c of a site is called ``SITE[c]``."""
    sites, others = found.groups[: found.num_sites], found.groups[found.num_sites :]
    channels: dict[str, list[TraceGroup]] = {site.group: [] for site in sites}
    for channel in others:
        channels[channel.group.rpartition("[")[0]].append(channel)
    is_weights = found.subject == "weights"
    return Sites(
        sites,
        list(channels.values()),
        "layer" if is_weights else "tensor",
        "weight" if is_weights else "activation",
    )
