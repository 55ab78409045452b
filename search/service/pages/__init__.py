"""The pages of the service, rendered here; a little script keeps them up to date.

    routes.py      what is shown at which address, and the forms' targets
    visitors.py    who asks, by a cookie, and whether a form is of these pages
    rendering.py   templates to answers
    stages.py      how far each stage is, how fast, and for how long still
    panels.py      the figures of one search: from what its run's folder holds by now
    live_traces.py, live_searches.py, live_trials.py  those that only a run under way has
    heat_map.py    the bits of every layer
    side_by_side.py  several searches: a table and a figure

A page loads nothing from anywhere else, and needs no script but for its figures.
"""

from search.service.pages.routes import router

__all__ = ["router"]
