"""The head of a language model: what turns final hidden states into logits, found by running it.

The states that a model's output embedding reads are kept on their way, by a hook, so that nothing
has to be known about what stands before it (a body that is not `base_model`, a projection, a
scaling). Logits are made from such states by the model's own forward: the modules that it calls
before the head give what they gave once, on a few tokens, and the head reads the states that are
asked about; whatever comes after the head (scaling, soft-capping) is done as always.

Each model is held to this once: states played back give the model's own logits, and others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

PROVED = 4
"""Tokens on which a head is found and proved."""


@dataclass(frozen=True)
class OutputHead:
    """The head of one model.

    Attributes:
        name: qualified name of the module that reads the final hidden states.
        place: the module, dtype and device that it was proved with.
        tokens: int64 [1, at most PROVED], what the model read then.
        played: name to outputs, call by call, of the modules that were called before the head.
    """

    name: str
    place: tuple[Any, ...]
    tokens: Tensor
    played: dict[str, list[Any]]

    def logits(self, model: Any, states: Tensor) -> Tensor:
        """The model's logits [1, n, vocabulary] of what its head reads, [1, n, width]."""

        def exchange(module: Any, args: Any) -> Any:
            return (states, *args[1:])

        with ExitStack() as stack:
            for name, outputs in self.played.items():
                module = model.get_submodule(name)
                stack.enter_context(replaced_forward(module, _playing(module.forward, outputs)))
            head = model.get_submodule(self.name)
            stack.callback(head.register_forward_pre_hook(exchange).remove)
            made: Tensor = model(input_ids=self.tokens, use_cache=False).logits
        return made


@dataclass
class Body:
    """What a model computed on one text, up to its head.

    Attributes:
        last_hidden_state: [1, tokens, width], what the head read.
        cache: what holds the keys and values; None where none was asked for.
        head: of the model.
    """

    last_hidden_state: Tensor
    cache: Any
    head: OutputHead


def output_head(model: Any, tokens: Tensor) -> OutputHead:
    """The head of a model, found and proved at the first call.

    Args:
        model: a causal language model.
        tokens: int64 [tokens], any text of the model's; the first few are used.

    Raises:
        ValueError: it is none, its logits are not finite, or its head cannot be told apart.
    """
    known = _HEADS.get(model)
    if known is None or known.place != _place(model):
        known = _HEADS[model] = _proved(model, tokens)
    return known


def run_body(model: Any, tokens: Tensor, *, cache: Any = None, cache_name: str = "") -> Body:
    """Run a text through a model and keep what its head reads; logits are those of one position.

    Args:
        model: a causal language model.
        tokens: int64 [tokens] on any device.
        cache: to be filled; None for no cache.
        cache_name: of the parameter of `model.forward` that takes it.

    Raises:
        ValueError: as `output_head`.
    """
    head = output_head(model, tokens)
    read: list[Tensor] = []

    def take(module: Any, args: Any) -> Any:
        read.append(args[0])
        return (args[0][:, -1:], *args[1:])

    options = {"use_cache": False} if cache is None else {"use_cache": True, cache_name: cache}
    handle = model.get_submodule(head.name).register_forward_pre_hook(take)
    try:
        model(input_ids=tokens[None].to(input_device(model)), **options)
    finally:
        handle.remove()
    if len(read) != 1 or read[0].shape[:2] != (1, len(tokens)):
        raise ValueError(_strange(model, f"{head.name} does not read every position once"))
    return Body(read[0], cache, head)


def input_device(model: Any) -> torch.device:
    """Where tokens go: to the embedding, or to the model where that is no single module."""
    try:
        device: torch.device = model.get_input_embeddings().weight.device
    except (AttributeError, NotImplementedError):
        device = model.device
    return device


def overflowing(model: Any) -> str:
    """Why nothing can be measured against a model whose own probabilities are not numbers."""
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{type(model).__name__} in {dtype} gives probabilities that are not finite as it is: "
        "nothing can be measured against them; use another dtype"
    )


@contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` of one module inside the `with` block."""
    own = module.__dict__.get("forward")
    try:
        module.forward = forward
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


_HEADS: WeakKeyDictionary[Any, OutputHead] = WeakKeyDictionary()


@dataclass
class _Call:
    """One call of a module in a forward pass; `within` counts the calls that it lies in."""

    name: str
    within: tuple[int, ...]
    read: Any
    output: Any = None


@torch.no_grad()
def _proved(model: Any, tokens: Tensor) -> OutputHead:
    ids = tokens[None, :PROVED].to(input_device(model))
    with _watched(model) as calls:
        output = model(input_ids=ids, use_cache=False)
    own = getattr(output, "logits", None)
    if not isinstance(own, Tensor) or own.shape[:2] != ids.shape:
        raise ValueError(
            f"measuring predictions needs a causal language model, got {type(model).__name__}"
        )
    if bool(own.isnan().any() | own.isposinf().any()):
        raise ValueError(overflowing(model))
    number = _head_call(model, calls, own)
    call = calls[number]
    if not isinstance(call.read, Tensor) or call.read.shape[:2] != ids.shape:
        raise ValueError(_strange(model, f"{call.name} does not read every position once"))
    played: dict[str, list[Any]] = {}
    for before, one in enumerate(calls[:number]):
        if before not in call.within and set(one.within) <= set(call.within):
            played.setdefault(one.name, []).append(one.output)
    head = OutputHead(call.name, _place(model), ids, played)
    _prove(model, head, call.read, own)
    return head


def _head_call(model: Any, calls: list[_Call], own: Tensor) -> int:
    """Which call is the head's: that of the output embedding, or the last that gives logits."""
    embedding = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding]
    found = [number for number, call in enumerate(calls) if call.name in names]
    if not found:
        found = [
            number
            for number, call in enumerate(calls)
            if isinstance(call.output, Tensor) and call.output.shape == own.shape
        ][-1:]
    if len(found) != 1:
        raise ValueError(_strange(model, f"{len(found)} modules look like its output embedding"))
    return found[0]


def _prove(model: Any, head: OutputHead, states: Tensor, own: Tensor) -> None:
    """Raises ValueError unless states give the model's own logits, and other states others."""
    try:
        again, other = (head.logits(model, x) for x in (states.flip(1), -states))
    except Exception as error:
        raise ValueError(_strange(model, f"{head.name} cannot be run alone ({error})")) from error
    finite = own.flip(1).masked_fill(own.flip(1).isneginf(), 0)
    close = torch.finfo(own.dtype).eps ** 0.5 * float(finite.abs().max())
    again = again.masked_fill(own.flip(1).isneginf(), 0)
    if again.shape != own.shape or not float((again - finite).abs().max()) <= close:
        raise ValueError(_strange(model, f"what {head.name} reads does not give its logits"))
    if torch.equal(other, own):
        raise ValueError(_strange(model, "its logits do not depend on its hidden states"))


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[_Call]]:
    """The calls of all modules, in the order in which they begin."""
    calls: list[_Call] = []
    running: list[int] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if module is model:
                continue

            def begin(module: Any, args: Any, name: str = name) -> None:
                calls.append(_Call(name, tuple(running), args[0] if args else None))
                running.append(len(calls) - 1)

            def end(module: Any, args: Any, output: Any) -> None:
                calls[running.pop()].output = output

            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end).remove)
        yield calls


def _playing(forward: Callable[..., Any], outputs: list[Any]) -> Callable[..., Any]:
    left = iter(outputs)

    def play(*args: Any, **kwargs: Any) -> Any:
        for output in left:
            return output
        return forward(*args, **kwargs)

    return play


def _place(model: Any) -> tuple[Any, ...]:
    return id(model.get_output_embeddings()), model.dtype, input_device(model)


def _strange(model: Any, why: str) -> str:
    return f"attnplan cannot compare predictions of {type(model).__name__}: {why}"
