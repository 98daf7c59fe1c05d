"""attnplan: for every head of a pretrained transformer, the cheapest attention it can live with.

    import attnplan

    model = attnplan.load("smollm2-135m", plan="plan.yaml")   # load a model and apply a plan
    attnplan.patch(model, plan)                               # or apply it to a loaded model
    attnplan.unpatch(model)                                   # the model as it was
    attnplan.patched_stats(model)                             # what ran, and why it ran dense

Importing this package imports neither torch nor transformers; the names above do, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnplan.plan.plan import Plan
    from attnplan.runtime.encoder import patch_encoder, unpatch_encoder
    from attnplan.runtime.patch import applied, load, patch, patched_stats, unpatch

__all__ = [
    "Plan",
    "applied",
    "load",
    "patch",
    "patch_encoder",
    "patched_stats",
    "unpatch",
    "unpatch_encoder",
]
_ROOMS = {
    "Plan": "attnplan.plan.plan",
    "patch_encoder": "attnplan.runtime.encoder",
    "unpatch_encoder": "attnplan.runtime.encoder",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'attnplan' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ROOMS.get(name, "attnplan.runtime.patch")), name)
