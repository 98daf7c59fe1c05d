"""What a kernel in Triton's interpreter may touch: the tensors it was given, and never as a race.

A pointer remembers the tensor it was made from. Every load and store is checked against that
tensor's storage, and against a shadow of it that says which program read and wrote each byte.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Span = tuple[int, int]
"""Addresses of a storage: first byte, one past the last."""

NOBODY, MANY, ATOMIC = -1, -2, -3
POINTER_OPERATIONS = ("addptr", "splat", "broadcast", "expand_dims", "reshape", "trans", "bitcast")


REACHABLE: list[Any] = []
"""Tensors that kernels find by addresses in a table, beside those that they are given."""


class KernelMemoryError(AssertionError):
    """A kernel touched what it must not."""


class Accesses:
    """The storages of the running launch, and who touched them."""

    def __init__(self) -> None:
        self.begin([], "")

    def begin(self, tensors: list[Any], kernel: str) -> None:
        storages = (tensor.untyped_storage() for tensor in [*tensors, *REACHABLE])
        spans = {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes()}
        self.spans = sorted(spans)
        self.writer: dict[Span, np.ndarray] = {}
        self.reader: dict[Span, np.ndarray] = {}
        self.kernel, self.program = kernel, NOBODY

    def find(self, address: int) -> Span | None:
        position = bisect_right(self.spans, (address, 2**64)) - 1
        if position >= 0 and address < self.spans[position][1]:
            return self.spans[position]
        return None

    def check(self, pointer: Any, mask: np.ndarray | None, kind: str) -> None:
        """Raise KernelMemoryError unless the tensor is large enough and the access is no race."""
        size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        touched = np.asarray(pointer.data).ravel()
        if mask is not None:
            touched = touched[np.broadcast_to(mask, pointer.data.shape).ravel().astype(bool)]
        if touched.size == 0:
            return
        span = pointer.attr.get("span") or self.find(int(touched[0]))
        first, last = int(touched.min()), int(touched.max())
        if span is None or first < span[0] or last + size > span[1]:
            where = (
                "no tensor"
                if span is None
                else (
                    f"elements {(first - span[0]) // size} to {(last - span[0]) // size} of "
                    f"{(span[1] - span[0]) // size}"
                )
            )
            self._fail(f"out-of-bounds {kind}: {where}")
        self._check_race(span, (touched - np.uint64(span[0])).astype(np.int64), kind)

    def _check_race(self, span: Span, offset: np.ndarray, kind: str) -> None:
        for shadow in (self.writer, self.reader):
            if span not in shadow:
                shadow[span] = np.full(span[1] - span[0], NOBODY, np.int32)
        writer, reader = self.writer[span], self.reader[span]
        others_wrote = (writer[offset] != NOBODY) & (writer[offset] != self.program)
        others_read = (reader[offset] != NOBODY) & (reader[offset] != self.program)
        if kind == "load":
            race = others_wrote
            reader[offset] = np.where(others_read, MANY, self.program)
        elif kind == "atomic":
            race = others_wrote & (writer[offset] != ATOMIC)
            writer[offset] = ATOMIC
        else:
            race = others_wrote | others_read
            if np.unique(offset).size != offset.size:
                self._fail("one store writes an element twice")
            writer[offset] = self.program
        if race.any():
            self._fail(f"race between programs ({kind})")

    def _fail(self, what: str) -> None:
        raise KernelMemoryError(f"{what} (kernel {self.kernel}, program {self.program})")


ACCESSES = Accesses()


def install(wrap: Callable[..., None]) -> None:
    """Check every access of every kernel from now on."""
    _watch_launches(wrap)
    _follow_pointers(wrap)

    def load(original: Any, self: Any, pointers: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        ACCESSES.check(pointers, mask.data, "load")
        return original(self, pointers, mask, *rest, **kwargs)

    def store(
        original: Any, self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        ACCESSES.check(pointers, mask.data, "store")
        return original(self, pointers, value, mask, *rest, **kwargs)

    def atomic(
        original: Any, self: Any, operation: Any, pointer: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        ACCESSES.check(pointer, mask.data, "atomic")
        return original(self, operation, pointer, value, mask, *rest)

    wrap(interpreter.InterpreterBuilder, "create_masked_load", load)
    wrap(interpreter.InterpreterBuilder, "create_masked_store", store)
    wrap(interpreter.InterpreterBuilder, "create_atomic_rmw", atomic)


def _watch_launches(wrap: Callable[..., None]) -> None:
    depth = 0
    patch_language = interpreter._patch_lang

    def begin(original: Any, self: Any, *args: Any) -> Any:
        on_host = original(self, *args)
        given = [*on_host[0], *on_host[1].values()]
        ACCESSES.begin([tensor for x in given for tensor in _tensors(x)], self.fn.__name__)
        return on_host

    def launch(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        patched.clear()
        try:
            return original(self, *args, **kwargs)
        finally:
            depth -= 1

    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        """A kernel calls others many times: the language is patched on the first call only."""
        languages = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
        if depth and languages <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages)
        return patch_language(function)

    wrap(interpreter.GridExecutor, "_init_args_hst", begin)
    wrap(interpreter.GridExecutor, "__call__", launch)
    interpreter._patch_lang = patch_once


def _tensors(x: Any) -> Iterator[Any]:
    if hasattr(x, "untyped_storage"):
        yield x
    elif isinstance(x, tuple | list):
        for item in x:
            yield from _tensors(item)
    elif hasattr(x, "base"):
        yield from _tensors(x.base)


def _follow_pointers(wrap: Callable[..., None]) -> None:
    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        result = convert(argument)
        if hasattr(argument, "data_ptr") and isinstance(result, tl.tensor):
            result.handle.attr["span"] = ACCESSES.find(argument.data_ptr())
        return result

    def follow(original: Any, self: Any, *args: Any) -> Any:
        result = original(self, *args)
        for x in args:
            if isinstance(x, interpreter.TensorHandle) and x.attr.get("span"):
                result.attr["span"] = x.attr["span"]
                break
        return result

    interpreter._implicit_cvt = converted
    for name in POINTER_OPERATIONS:
        wrap(interpreter.InterpreterBuilder, f"create_{name}", follow)
