"""attnplan: for every head of a pretrained transformer, the cheapest attention it can live with.

    import attnplan

    model = attnplan.load("smollm2-135m", plan="plan.yaml")   # load a model and apply a plan
    attnplan.patch(model, plan)                               # or apply it to a loaded model
    attnplan.unpatch(model)                                   # the model as it was

Importing this package imports neither torch nor transformers; the names above do, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnplan.patch import load, patch, unpatch
    from attnplan.plan import Plan

__all__ = ["Plan", "load", "patch", "unpatch"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("attnplan")
    if name not in __all__:
        raise AttributeError(f"module 'attnplan' has no attribute {name!r}")
    from importlib import import_module

    module = import_module("attnplan.plan" if name == "Plan" else "attnplan.patch")
    # `attnplan.patch` is a module and a function: the module can be called (see there).
    return module if name == "patch" else getattr(module, name)
