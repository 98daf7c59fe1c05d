"""Run text through a model and keep what every attention layer saw and gave.

An attention function of our own is registered beside transformers' ones. While `capture` runs, the
model is switched to it: it computes what `sdpa` computes and keeps query, key, value and output.
One backward pass then gives the gradient at every output, of the loss

    L = sum over t of -log p(label_t | tokens up to t),    label_t drawn from p itself

With labels drawn from the model's own distribution (not the next token of the text), E[(g . d)^2]
is the Fisher information along a change d of the output: half of it is the KL divergence that the
change causes, to second order.

Neither scores nor logits of a whole text are ever formed. This is the only file of profiles that
imports transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from attnplan.profiles.capture.implementation import implementation
from attnplan.profiles.capture.output_head import (
    Body,
    output_head,
    overflowing,
    replaced_forward,
    run_body,
)

NAME = "attnplan_capture"
CHUNK = 512
"""Positions whose logits are held at once."""
ACTIVATION_BYTES = 4 << 30
"""Above this estimate of the activations of a backward pass, layers are computed twice instead."""
UNPLANNABLE = {
    "softcap": "soft-capped attention scores",
    "s_aux": "learned sink logits",
    "sinks": "learned sink logits",
    "position_bias": "a position bias on the attention scores",
    "indices": "a selection of keys of its own",
    "block_indices": "a selection of keys of its own",
}
"""Options of an attention call that change what it computes, which a plan would not honour."""


@dataclass
class LayerCapture:
    """What one attention layer computed on one text; `layer` counts the calls of a forward pass.

    Attributes:
        layer: index, in the order of the calls.
        name: qualified name of the attention module.
        query: [1, heads, tokens, head_dim], after RoPE.
        key: [1, kv_heads, tokens, head_dim], after RoPE.
        value: [1, kv_heads, tokens, value_dim].
        output: [1, heads, tokens, value_dim], before the output projection.
        scale: factor before the softmax.
        gradient: of the loss at `output`, same shape; None after a forward-only capture.
        projection: float32 [heads], Frobenius norm of the head's block of the output projection
            over sqrt(value_dim), so that a change d of the output moves the residual stream by
            about `projection * |d|`; None where the projection was not found. The sensitivity to
            use without a gradient.
        query_pre_gram: float64 [heads, head_dim, head_dim], sum of q q^T before RoPE; None where
            the model does not expose its queries and keys before RoPE.
        key_pre_gram: float64 [kv_heads, head_dim, head_dim], likewise.
    """

    layer: int
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float
    gradient: Tensor | None = None
    projection: Tensor | None = None
    query_pre_gram: Tensor | None = None
    key_pre_gram: Tensor | None = None


@dataclass(frozen=True)
class SequenceCapture:
    """All attention layers on one text.

    Attributes:
        tokens: int64 [tokens].
        labels: int64 [tokens], drawn from the model after every token; None if forward-only.
        layers: one per attention call, in order.
    """

    tokens: Tensor
    labels: Tensor | None
    layers: tuple[LayerCapture, ...]


def capture(
    model: Any,
    tokens: Tensor,
    *,
    gradients: bool = True,
    seed: int = 0,
    store_dtype: torch.dtype = torch.float32,
    recompute: bool | None = None,
) -> SequenceCapture:
    """Run `tokens` through `model` and keep every attention layer's tensors.

    The model is left as it was: attention implementation, training mode, parameters, hooks.

    Args:
        model: a causal language model of transformers.
        tokens: int64 [tokens] on any device.
        gradients: also run one backward pass. Without, `gradient` is None.
        seed: of the drawn labels; they depend on it and on the probabilities alone.
        store_dtype: of the captured tensors; bfloat16 halves the memory of long texts.
        recompute: compute every layer a second time in the backward pass instead of keeping its
            activations; None decides by size.

    Raises:
        ValueError: no tokens, no causal language model (see `output_head`), logits that are not
            finite, or a model whose attention this cannot capture faithfully (no
            AttentionInterface, not causal, sliding windows shorter than the text, soft-capped
            scores, learned sinks, position biases).
    """
    tokens = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
    if not len(tokens):
        raise ValueError("capture needs at least one token, got none")
    output_head(model, tokens)
    if recompute is None:
        recompute = gradients and _activation_bytes(model, len(tokens)) > ACTIVATION_BYTES
    recorder = _Recorder(store_dtype, {id(m): n for n, m in model.named_modules()})
    with ExitStack() as stack:
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(implementation(model, NAME))
        stack.enter_context(_watched_projections(model))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if gradients:
            stack.enter_context(_gradient_from_embeddings(model))
        if gradients and recompute:
            stack.enter_context(_recomputed_layers(model))
        token = _RECORDER.set(recorder)
        try:
            body = run_body(model, tokens)
        finally:
            _RECORDER.reset(token)
        if not recorder.layers:
            raise ValueError(
                f"{type(model).__name__} does not call AttentionInterface: attnplan needs a model "
                "whose attention implementation can be chosen"
            )
        labels = _backward(model, body, seed) if gradients else None
    return SequenceCapture(tokens, labels, tuple(recorder.layers))


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label per row by inverting the distribution function, int64 [rows].

    Args:
        logits: [rows, vocabulary].
        uniform: float32 [rows] in [0, 1).
    """
    cumulative = logits.detach().float().softmax(-1).cumsum(-1)
    target = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@contextmanager
def logits_of(model: Any, body: Body) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from final hidden states [1, n, width] to the model's logits [1, n, vocabulary].

    It runs the model's own forward with a head that reads those states, so that whatever the model
    does to its logits (scaling, soft-capping) is done.

    Args:
        model: a causal language model.
        body: what `run_body` gave on any text.
    """
    yield functools.partial(body.head.logits, model)


def _backward(model: Any, body: Body, seed: int) -> Tensor:
    """Draw labels, and send the gradient of their loss back through the model."""
    states: Tensor = body.last_hidden_state
    count = states.shape[1]
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    upstream = torch.empty_like(states)
    labels = torch.empty(count, dtype=torch.int64)
    with logits_of(model, body) as logits:
        for first in range(0, count, CHUNK):
            rows = slice(first, min(first + CHUNK, count))
            leaf = states[:, rows].detach().requires_grad_()
            scores = logits(leaf)[0].float()
            if bool(scores.isnan().any() | scores.isposinf().any()):
                raise ValueError(overflowing(model))
            chosen = sample(scores, uniform[rows])
            loss = torch.nn.functional.cross_entropy(scores, chosen, reduction="sum")
            (upstream[:, rows],) = torch.autograd.grad(loss, leaf)
            labels[rows] = chosen.cpu()
    states.backward(upstream)
    return labels


@dataclass
class _Recorder:
    dtype: torch.dtype
    names: dict[int, str]
    layers: list[LayerCapture] = field(default_factory=list)
    pre_rope: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def keep(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype, memory_format=torch.contiguous_format)

    def record(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float
    ) -> None:
        """Keep one call; `output` is [1, tokens, heads, value_dim], as attention functions give."""
        one = LayerCapture(
            layer=len(self.layers),
            name=self.names.get(id(module), type(module).__name__),
            query=self.keep(query),
            key=self.keep(key),
            value=self.keep(value),
            output=self.keep(output.transpose(1, 2)),
            scale=scale,
            projection=_projection(module, query.shape[1], value.shape[3]),
        )
        before_query = self.pre_rope.pop((id(module), "q"), None)
        before_key = self.pre_rope.pop((id(module), "k"), None)
        if before_query is not None and before_key is not None:
            one.query_pre_gram = _pre_rope_gram(before_query, query)
            one.key_pre_gram = _pre_rope_gram(before_key, key)
        if output.requires_grad:

            def receive(gradient: Tensor) -> None:
                one.gradient = self.keep(gradient.transpose(1, 2))

            output.register_hook(receive)
        self.layers.append(one)


_RECORDER: ContextVar[_Recorder | None] = ContextVar("attnplan_recorder", default=None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: sdpa, and a record of the call."""
    recorder = _RECORDER.get()
    if recorder is not None:
        _refuse_unless_causal(module, query, key, attention_mask, kwargs)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    if recorder is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        recorder.record(module, query, key, value, output, scale)
    return output, None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _refuse_unless_causal(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, extra: dict[str, Any]
) -> None:
    who = type(module).__name__
    for name in UNPLANNABLE:
        if extra.get(name) is not None:
            raise ValueError(f"{who} uses {name}, which attnplan cannot profile yet")
    window = extra.get("sliding_window")
    if window is not None and query.shape[2] >= window:
        raise ValueError(
            f"{who} attends to the last {window} tokens only: profile it with at most {window - 1} "
            f"tokens, got {query.shape[2]}"
        )
    causal = extra.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is not None or not causal or query.shape[2] != key.shape[2]:
        raise ValueError(f"{who} is not plain causal self-attention, which attnplan needs")


def _projection(module: Any, heads: int, value_dim: int) -> Tensor | None:
    """Norm of each head's columns of the output projection, if the module has one by that size."""
    for name in ("o_proj", "out_proj", "dense"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is not None and weight.ndim == 2 and weight.shape[1] == heads * value_dim:
            blocks: Tensor = weight.detach().float().view(-1, heads, value_dim)
            return blocks.square().sum((0, 2)).div(value_dim).sqrt()
    return None


def _pre_rope_gram(before: Tensor, after: Tensor) -> Tensor | None:
    """Sum of x x^T over positions for `before`, if it is `after` without its rotation.

    RoPE keeps the norm of every vector (up to one factor, as in YaRN). A tensor that has other
    norms in every reading of its axes is not what RoPE was applied to.

    Args:
        before: output of the module that is thought to be the last before RoPE.
        after: [1, heads, tokens, head_dim].
    """
    _, heads, tokens, head_dim = after.shape
    if before.numel() != after.numel():
        return None
    readings = [before.reshape(1, tokens, heads, head_dim).transpose(1, 2)]
    if before.shape == after.shape:
        readings.append(before)
    for reading in readings:
        ratio = after.detach().float().norm(dim=-1) / reading.float().norm(dim=-1).clamp(min=1e-12)
        if float((ratio - ratio.mean()).abs().max()) <= 0.03 * float(ratio.mean()):
            x = reading[0].float()
            return (x.mT @ x).double()
    return None


@contextmanager
def _watched_projections(model: Any) -> Iterator[None]:
    """Hand the recorder the output of the last module before RoPE, where there is such a module."""
    handles = []
    for module in model.modules():
        for axis in ("q", "k"):
            for name in (f"{axis}_norm", f"{axis}_proj"):
                child = getattr(module, name, None)
                if isinstance(child, torch.nn.Module):
                    hook = functools.partial(_note, (id(module), axis))
                    handles.append(child.register_forward_hook(hook))
                    break
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(place: tuple[int, str], module: Any, args: Any, output: Any) -> None:
    recorder = _RECORDER.get()
    if recorder is not None and isinstance(output, Tensor):
        recorder.pre_rope[place] = output.detach()


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """No dropout, and no gradients of parameters."""
    training = [m for m in model.modules() if m.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _gradient_from_embeddings(model: Any) -> Iterator[None]:
    """Make the embedded tokens the leaf of the backward pass."""

    def leaf(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recomputed_layers(model: Any) -> Iterator[None]:
    """Checkpoint the layers that the model's author made checkpointable, in evaluation mode too."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    with ExitStack() as stack:
        for layer in layers:
            twice = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
            stack.enter_context(replaced_forward(layer, twice))
        yield


def _activation_bytes(model: Any, tokens: int) -> int:
    """A rough count of what a backward pass keeps: twenty hidden states per layer."""
    config = model.config.get_text_config()
    size = next(model.parameters()).element_size()
    return int(20 * tokens * config.hidden_size * config.num_hidden_layers * size)
