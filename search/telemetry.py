"""What a search does, as metrics that Ray offers to Prometheus (``ray_hawq_…``)."""

from search.events import Event

__all__ = ["Telemetry"]


class Telemetry:
    """A listener that turns events into metrics.

    Args:
        search: Label of all of them.
    """

    def __init__(self, search: str) -> None:
        self._search = search

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
