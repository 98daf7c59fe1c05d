"""What `save_pretrained` of a patched model does: the plan goes beside the weights."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from attnplan.models.load import resized, weights_digest
from attnplan.plan.plan import Plan

PLAN_FILE = "attnplan.yaml"
"""The plan of a model, in its folder or repository."""
NAMED_PLAN = "attnplan_plan"
"""Entry of a configuration: where the plan is; others ignore it."""

_LOG = logging.getLogger(__name__)


def save_pretrained(
    model: Any,
    plan: Plan | None,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *args: Any,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """`model.save_pretrained` of a patched model; takes what that takes.

    The configuration that is saved names the plan, and no attention implementation, so that the
    folder loads without attnplan too. A plan that is not of the saved weights stays behind, with a
    warning.
    """
    save = type(model).save_pretrained
    refusal = _refusal(model, plan, push_to_hub)
    if plan is None or refusal is not None:
        save(model, save_directory, is_main_process, *args, push_to_hub=push_to_hub, **options)
        told = f"attnplan: saved without a plan in {save_directory}: {refusal}"
        warnings.warn(told, stacklevel=2)
        return
    config = vars(model.config)
    before = config.get(NAMED_PLAN)
    config[NAMED_PLAN] = PLAN_FILE
    try:
        save(model, save_directory, is_main_process, *args, **options)
    finally:
        config.pop(NAMED_PLAN) if before is None else config.update({NAMED_PLAN: before})
    if is_main_process:
        plan.save(Path(save_directory) / PLAN_FILE)
        _LOG.warning(
            'the plan is saved as %s; without attn_implementation="attnplan" it is not loaded',
            Path(save_directory) / PLAN_FILE,
        )


def _refusal(model: Any, plan: Plan | None, push_to_hub: bool) -> str | None:
    """Why no plan goes with the weights."""
    if plan is None:
        return "the model runs a mere assignment; save a Plan with its `save`"
    if getattr(model, "_hf_peft_config_loaded", False):
        return "adapters alone are saved, and the plan is for the weights below them"
    if weights_digest(model) != plan.model.weights or resized(model, plan.model.magnitudes):
        return "its weights are no longer those that the plan was made for; search again"
    if push_to_hub:
        return "transformers uploads its own files only; use model.push_to_hub"
    return None
