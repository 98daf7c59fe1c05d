"""A stricter Triton interpreter, whose bfloat16 is right.

`install()` changes Triton's own interpreter (3.6 to 3.9), which

- multiplies the bit patterns of bfloat16 numbers and truncates casts to them: here they are
  computed in float32 and rounded to nearest even;
- multiplies float32 exactly where a GPU would use tf32, which `tl.dot` does unless told otherwise;
- reads and writes whatever a pointer happens to name: see `interpreter_memory`;
- runs programs in order, so that one which needs an earlier one is never found: here shuffled;
- takes dots and grids that a GPU refuses;
- hands out loop counters as Python integers (`.to` fails), and in 3.6 cannot take loaded loop
  bounds from numpy 2.4.

`TRITON_INTERPRET=1` must be set before triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from tests import interpreter_memory as memory
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
CUDA_GRID = (2**31 - 1, 65535, 65535)


def install(seed: int = 0) -> None:
    """Replace the interpreter's rules; `seed` shuffles the order of programs."""
    if hasattr(Builder, "attnplan_seed"):
        return
    Builder.attnplan_seed = seed
    _compute_in_bfloat16()
    _count_like_the_compiler()
    _launch_like_a_gpu()
    memory.install(_wrap)


def widen(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16 to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 to bit patterns of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 with the 10 bits of mantissa that tensor cores read."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _wrap(owner: type, name: str, rule: Callable[..., Any]) -> None:
    """Let `rule(original, self, *args)` answer for `owner.name`."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return rule(original, self, *args, **kwargs)

    setattr(owner, name, method)


def _is_bfloat16(x: Any) -> bool:
    return (
        isinstance(x, Handle)
        and not isinstance(x.dtype, tl.pointer_type)
        and x.dtype.scalar == tl.bfloat16
    )


def _as_float32(x: Any) -> Any:
    return Handle(widen(x.data), tl.float32) if _is_bfloat16(x) else x


def _compute_in_bfloat16() -> None:
    def cast(original: Any, self: Any, source: Any, target: Any, *rest: Any) -> Any:
        scalar = target.scalar
        if scalar == tl.bfloat16 and not _is_bfloat16(source):
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        if _is_bfloat16(source) and scalar != tl.bfloat16:
            return Handle(widen(source.data).astype(interpreter._get_np_dtype(scalar)), scalar)
        return original(self, source, target, *rest)

    def elementwise(original: Any, self: Any, *args: Any) -> Any:
        if not any(map(_is_bfloat16, args)):
            return original(self, *args)
        result = original(self, *map(_as_float32, args))
        is_comparison = result.data.dtype == np.bool_
        return result if is_comparison else Handle(narrow(result.data), tl.bfloat16)

    def dot(original: Any, self: Any, a: Any, b: Any, sum: Any, precision: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.float32 and str(precision).endswith("TF32"):
            a, b = (Handle(round_to_tf32(x.data), tl.float32) for x in (a, b))
        return original(self, _as_float32(a), _as_float32(b), sum, precision, *rest)

    def reduction(original: Any, self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(x, tl.core.tensor) and _is_bfloat16(x.handle)):
            return original(self, x, *args, **kwargs)
        wide = tl.core.tensor(_as_float32(x.handle), tl.block_type(tl.float32, list(x.shape)))
        result = original(self, wide, *args, **kwargs)
        if isinstance(result, list | tuple):
            return type(result)(map(_as_bfloat16, result))
        return _as_bfloat16(result)

    _wrap(Builder, "cast_impl", cast)
    _wrap(Builder, "create_fp_to_fp", cast)
    for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt"):
        _wrap(Builder, name, elementwise)
    _wrap(Builder, "create_dot", dot)
    _wrap(interpreter.ReduceOps, "sum", reduction)
    _wrap(interpreter.ReduceOps, "min_max", reduction)
    _wrap(interpreter.ScanOps, "cumsum", reduction)


def _as_bfloat16(x: Any) -> Any:
    if x.dtype != tl.float32:
        return x
    scalar = tl.bfloat16
    type_ = tl.block_type(scalar, list(x.shape)) if x.type.is_block() else scalar
    return tl.core.tensor(Handle(narrow(x.handle.data), scalar), type_)


def _count_like_the_compiler() -> None:
    patch_tensor, patch_core = interpreter._patch_lang_tensor, interpreter._patch_lang_core

    def integer(x: Any) -> int:
        x = x.value if isinstance(x, tl.constexpr) else x
        return int(x.handle.data.item()) if isinstance(x, tl.core.tensor) else int(x)

    def counted(first: Any, last: Any = None, step: Any = 1, **_: Any) -> Iterator[Any]:
        start, end = (0, first) if last is None else (first, last)
        for i in range(integer(start), integer(end), integer(step)):
            yield tl.core.tensor(Handle(np.array([i], dtype=np.int32), tl.int32), tl.int32)

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patched_core(language: Any, scope: Any) -> None:
        patch_core(language, scope)
        scope.set_attr(language, "range", counted)

    interpreter._patch_lang_tensor = patched_tensor
    interpreter._patch_lang_core = patched_core


def _launch_like_a_gpu() -> None:
    shortest = {"min_dot_size": lambda a, b: (1, 1, 32 if a.scalar.primitive_bitwidth == 8 else 16)}
    interpreter.interpreter_builder.codegen_fns.update(shortest)

    def set_grid(original: Any, self: Any, *grid: int) -> None:
        limits = zip(grid, CUDA_GRID, strict=True)
        assert all(0 < size <= limit for size, limit in limits), f"no GPU takes the grid {grid}"
        original(self, *grid)
        self.order = np.random.default_rng(self.attnplan_seed).permutation(np.prod(grid))

    def set_program(original: Any, self: Any, *index: int) -> None:
        program = int(self.order[np.ravel_multi_index(index, self.grid_dim)])
        memory.ACCESSES.program = program
        original(self, *(int(i) for i in np.unravel_index(program, self.grid_dim)))

    _wrap(Builder, "set_grid_dim", set_grid)
    _wrap(Builder, "set_grid_idx", set_program)
