"""The service: searches that others submit, watch, cancel and resume, on a cluster that may die.

    record.py     a search's folder in the store, and what is written there
    store.py      all of them, with an index
    tokens.py     who may ask
    policy.py     what a submitted config may name
    driver.py     one attempt: the pipeline, with a heartbeat
    reconcile.py  (record, observation) → action, a pure function
    supervisor.py observes and acts, again and again
    processes.py  attempts as processes beside the service; ray_jobs.py: as jobs of a cluster
    doors.py      what the interface reaches, and who may
    app.py        the REST interface; guard.py, problems.py, streams.py are parts of it
    pages/        the same for people, in a browser

The truth is the store, files that are written atomically. Whatever dies, what is left is read
from there.
"""
