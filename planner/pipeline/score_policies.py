"""What every keeper costs a kv head, found on captured tensors, and which keepers are worth it.

The past before the last tokens of a text is condensed, the last tokens are fed as they would be
generated, and what changes in the output of a kv head's group is weighed by its gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnplan.kernels import cache_catalog
from attnplan.kernels.contracts.cache_policy import SLACK, Keeper
from attnplan.kernels.kv_cache.layer_cache import LayerStore
from attnplan.kernels.operands.inputs import Fitted
from attnplan.profiles.capture.capture import LayerCapture
from attnplan.quality.continuation import continued


def score_layer(
    layer: LayerCapture,
    candidates: tuple[Keeper, ...],
    fitted: Fitted,
    new: int | None = None,
) -> NDArray[np.float64]:
    """What each keeper adds to the KL of a continuation token, [kv_heads, candidates].

    Args:
        layer: captured with gradients.
        candidates: the first keeps everything.
        fitted: calibrated data of the layer.
        new: tokens at the end that are a continuation; by default as many as in a text.

    Raises:
        ValueError: there is no gradient.
    """
    if layer.gradient is None:
        raise ValueError("keepers are scored by gradients; capture the text with them")
    kv_heads, tokens = layer.key.shape[1:3]
    new = continued(tokens) if new is None else new
    first = tokens - new
    gradient, exact = (t[:, :, first:].float() for t in (layer.gradient, layer.output))
    found = np.zeros((kv_heads, len(candidates)))
    for number, keeper in enumerate(candidates):
        if keeper == cache_catalog.FULL:
            continue
        store = LayerStore((keeper,) * kv_heads, scale=layer.scale, fitted=fitted)
        store.append(layer.key[:, :, :first], layer.value[:, :, :first])
        store.settle(layer.query[:, :, :first])
        parts = []
        for begin in range(first, tokens, SLACK):
            some = slice(begin, min(begin + SLACK, tokens))
            store.append(layer.key[:, :, some], layer.value[:, :, some])
            parts.append(store.attend(layer.query[:, :, some]))
            store.settle(layer.query[:, :, some])
        change = ((torch.cat(parts, 2).float() - exact) * gradient).sum(-1)  # [1, heads, new]
        # half the Fisher cost is the KL divergence, to second order; a group changes together
        cost = 0.5 * change.unflatten(1, (kv_heads, -1)).square().sum(2).mean((0, 2))
        found[:, number] = cost.double().cpu().numpy()
    return found


def candidates_for(
    context: int, limit: float, shares: Any, *, timed: bool = False
) -> tuple[Keeper, ...]:
    """The catalog's choices, and of each keeper the largest that uses the whole limit.

    Args:
        context: tokens.
        limit: share of dense bytes; infinite where memory is not limited.
        shares: from keepers to their shares.
        timed: decoding is limited, so that reading less is worth something by itself.
    """
    found = [k for k in cache_catalog.choices(context) if timed or not k.reads]
    for cls in cache_catalog.KEEPERS.values() if limit < 1 else ():
        sized = (cls.of(rows) for rows in range(int(limit * context), 0, -1))
        fits = (k for k in sized if k is not None and shares(k) <= limit)
        largest = next(fits, None)
        if largest is not None:
            found.append(largest)
    return tuple(dict.fromkeys(found))
