"""Stage 3: Ω and size of every layer at every width."""

from typing import Any

import numpy as np
from torch import Tensor

from hawq.cost import weight_bits
from hawq.quantizers import squared_errors
from hawq.sensitivity import omega
from hawq.space import quantizable_layers
from search.artefacts import TablesArtefact
from search.folder import content_hash
from search.stages.search import Search

__all__ = ["inputs", "make"]


def inputs(search: Search) -> dict[str, Any]:
    """What may be chosen, and the traces."""
    return {
        "config": {"weights": search.config.weights.model_dump(mode="json")},
        "model": search.model.weights_sha256,
        "curvature": content_hash(search.curvature.model_dump(mode="json")),
    }


def make(search: Search) -> TablesArtefact:
    """Price every layer at every width, with the quantizer that the trials use."""
    space, model = search.space, search.task.model()
    model.load_state_dict(search.weights)
    layers = quantizable_layers(model)
    errors = []
    for name in search.layers:
        weight = layers[name].weight
        assert isinstance(weight, Tensor)
        errors.append(squared_errors(weight, space.widths).numpy())
    table = omega(space, np.array(search.curvature.trace), np.stack(errors))
    return TablesArtefact(
        space=space.to_json(),
        space_fingerprint=space.fingerprint,
        widths=list(space.widths),
        sensitivity=[[v if np.isfinite(v) else None for v in row] for row in table.tolist()],
        squared_error=np.stack(errors).tolist(),
        weight_bits=weight_bits(space).tolist(),
    )
