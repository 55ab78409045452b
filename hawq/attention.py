"""Attention whose projections are linear layers, which can be traced, quantized and packed.

``nn.MultiheadAttention`` multiplies with one joint matrix that no layer owns, and reads its output
projection's weight without a call. Here the projections of queries, keys and values are layers of
their own, as they are in most other libraries: each has its widths, its inputs are tensors with a
reader, and curvature comes apart by example. The function and the number of parameters are the
same.
"""

import math
from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["ProjectedAttention", "joint_attention", "project_attention", "project_state"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class ProjectedAttention(nn.Module):
    """What ``nn.MultiheadAttention`` computes (Vaswani et al., 2017), through four linear layers.

    They are ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Attributes:
        embed_dim: Width of the queries and of the output.
        num_heads: Heads, each of ``embed_dim / num_heads``.
        dropout: Share of the attention weights that training leaves out.
        batch_first: Whether a batch of sequences has shape (N, L, E) and not (L, N, E).
    """

    # Where torch's transformer layers look whether they may take their weights as they are.
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        own = dict(attention.named_parameters(recurse=False))
        for name in _PROJECTIONS:
            weight = _part(own, name, "weight")
            assert weight is not None
            self.add_module(name, _layer(weight, _part(own, name, "bias")))
        self.out_proj = _layer(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see ``nn.MultiheadAttention.forward``.

        Returns:
            The output, shape of the queries, and the weights, shape (N, L, S), or
            (N, heads, L, S) where they are not averaged, or None.

        Raises:
            ValueError: If ``is_causal``, a hint about the mask, comes without one.
        """
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal, got none")
        q, k, v = (
            self._heads(self.get_submodule(name)(x))
            for name, x in zip(_PROJECTIONS, (query, key, value), strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        mixed = mixed.transpose(1, 2).flatten(2)  # (N, L, E)
        if query.ndim == 2:
            mixed = mixed.squeeze(0)
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        output: Tensor = self.out_proj(mixed)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if query.ndim == 2 else weights
        return output, weights

    def _heads(self, x: Tensor) -> Tensor:
        """Split what a projection returned, as the inputs lie, into (N, heads, length, width)."""
        if x.ndim == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        split: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return split.transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Return what is added to the scores, broadcast over (N, heads, L, S)."""
        if attn_mask is not None:
            attn_mask = _added(attn_mask, q)
            if attn_mask.ndim == 3:  # one for each head of each sequence
                attn_mask = attn_mask.unflatten(0, (len(q), self.num_heads))
        if padding is None:
            return attn_mask
        padding = _added(padding, q).view(len(q), 1, 1, -1)
        return padding if attn_mask is None else attn_mask + padding


@torch.enable_grad()  # without, a part of a weight does not know whether the weight is trained
def project_attention(model: nn.Module) -> nn.Module:
    """Replace every ``nn.MultiheadAttention`` inside a network, in place, and return the network.

    Its weights are then found under ``q_proj``, ``k_proj`` and ``v_proj``. Left as they are: a
    class derived from it, one with a bias or zeros among the keys, one with hooks or made weights,
    one that shares its joint weight with another module.
    """
    found = joint_attention(model)
    made = {id(attention): ProjectedAttention(attention) for attention in found.values()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in made:
                parent.add_module(name, made[id(child)])
        if made and isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # they are for torch's own attention
    return model


def joint_attention(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Find the modules, by name, that ``project_attention`` replaces."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and type(module) is nn.MultiheadAttention
        and _is_plain(module)
        and all(owners[id(p)] == 1 for p in module.parameters(recurse=False))
    }


def project_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the joint weights of a state among the projections of a network.

    Args:
        model: A network after ``project_attention``, or any other.
        state: Of the network before; what is split already is left as it is.
    """
    split = dict(state)
    for name, module in model.named_modules():
        if not isinstance(module, ProjectedAttention):
            continue
        joint = ("in_proj_weight", "in_proj_bias", *(f"{p}_weight" for p in _PROJECTIONS))
        own = {key: split.pop(f"{name}.{key}") for key in joint if f"{name}.{key}" in split}
        for projection in _PROJECTIONS:
            for kind in ("weight", "bias"):
                part = _part(own, projection, kind)
                if part is not None:
                    split[f"{name}.{projection}.{kind}"] = part
    return split


def _part(parameters: Mapping[str, Tensor], projection: str, kind: str) -> Tensor | None:
    """Return a projection's share of a state with torch's own names."""
    joint = parameters.get(f"in_proj_{kind}")
    if joint is None:
        return parameters.get(f"{projection}_{kind}")
    return joint.chunk(3)[_PROJECTIONS.index(projection)]


def _layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    num_outputs, num_inputs = weight.shape
    layer = nn.Linear(num_inputs, num_outputs, bias is not None, device="meta")
    layer.weight = _own(weight)
    if bias is not None:
        layer.bias = _own(bias)
    return layer


def _own(part: Tensor) -> nn.Parameter:
    """Return a parameter as it is, for others may share it, and a part of one as one of its own."""
    if isinstance(part, nn.Parameter):
        return part
    return nn.Parameter(part.detach().clone(), part.requires_grad)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Turn a mask of what is left out into what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    changed = any(
        parametrize.is_parametrized(part) or part._forward_hooks or part._forward_pre_hooks
        for part in attention.modules()
    )
    return attention.bias_k is None and not attention.add_zero_attn and not changed
