"""What a sweep over attention kernels measures: one row for each question.

A row never fails: what went wrong is its text. Only numbers that are wrong make it `wrong`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from attnplan.costs.decode import measure_decoding, measure_host, spell
from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.bench.measure import Timing, measure_call, measure_layer
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.kernels.contracts.compressor import Compressor
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.profiles.capture.capture import LayerCapture

MIXED_DENSITY = 0.25
"""Of the approximations in mixed layers and in checks of numbers."""
CHECKED_LENGTH = 1024
"""Tokens at which numbers are checked: the reference holds all pairs."""
DECODING_LAYERS = 8
HOST_LAYERS = 16
FITTED = 4096
"""Tokens that methods are fitted to."""


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    Attributes:
        part: which question: errors, dense, layers, mixed, crossover or decode.
        name: approximation of all heads, or what else was measured.
        length, head_dim, heads, kv_heads, dtype: of the call.
        target: density that was asked for.
        density: multiply-adds of the layer over those of dense attention, selection included.
        median_ms, q25_ms, q75_ms, warm_ms, host_us, repeats, dense_ms, dense_backend: see `Timing`.
        dense_tflops: 1e12 operations per second of the dense baseline; a multiply-add is two.
        eta: dense_ms * density / median_ms; 1 where time falls as work does.
        relative_error: |output - exact| / |exact|, exact in float64; `allowed` is its limit.
        more: what only this kind of row has.
        error: why the row has no numbers, or what is wrong with them.
        wrong: the kernel's output is not what the reference defines.
    """

    part: str
    name: str
    length: int
    head_dim: int
    heads: int
    kv_heads: int
    dtype: str
    target: float | None = None
    density: float | None = None
    median_ms: float | None = None
    q25_ms: float | None = None
    q75_ms: float | None = None
    warm_ms: float | None = None
    host_us: float | None = None
    repeats: int | None = None
    dense_ms: float | None = None
    dense_backend: str | None = None
    dense_tflops: float | None = None
    eta: float | None = None
    relative_error: float | None = None
    allowed: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    wrong: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """What was asked: rows with equal keys answer the same question."""
        shape = (self.length, self.head_dim, self.heads, self.kv_heads, self.dtype)
        return (self.part, self.name, *shape, self.target)

    def timed(self, timing: Timing, density: float, shape: AttentionShape) -> Row:
        """The row with what was measured."""
        operations = 2 * shape.dense_macs * shape.heads * shape.batch
        return replace(
            self,
            density=density,
            median_ms=timing.median_ms,
            q25_ms=timing.q25_ms,
            q75_ms=timing.q75_ms,
            warm_ms=timing.warm_ms,
            host_us=timing.host_us,
            repeats=timing.repeats,
            dense_ms=timing.dense_ms,
            dense_backend=timing.dense_backend,
            dense_tflops=operations / timing.dense_ms / 1e9,
            eta=efficiency(timing.dense_ms, density, timing.median_ms),
        )


def efficiency(dense_ms: float, density: float, ms: float) -> float:
    """Speed-up over the best dense kernel times density: 1 where time falls as work does."""
    return dense_ms * density / ms


def parse(line: str) -> Approximation:
    """The approximation that `catalog.key` spells so.

    Raises:
        ValueError: it is no such line, or names what nobody knows.
    """
    parts = [part.strip() for part in line.split(" + ")]
    spelled = {}
    for name, part in zip(("near", "far"), parts, strict=False):
        match = re.fullmatch(rf"(\w+)\(((?:{_KNOB}(?:,\s*{_KNOB})*)?)\)", part)
        if match is None or len(parts) > 2:
            raise ValueError(
                f"a method is spelled as window(window=128, sinks=4), or two with ' + ' between "
                f"them, got {line!r}"
            )
        knobs = {name: int(value) for name, value in re.findall(r"(\w+)=(-?\d+)", match[2])}
        spelled[name] = {"name": match[1], **knobs}
    return catalog.from_dict(spelled)


_KNOB = r"\w+=-?\d+"


def at_density(pattern: str, shape: AttentionShape, target: float) -> Approximation:
    """The approximation whose density is nearest to `target`.

    Args:
        pattern: as `parse` takes it, with '?' for the knob to set; more of it must mean more work.
        shape: of the call.
        target: in (0, 1].

    Raises:
        ValueError: the pattern is no such pattern.
    """
    if pattern.count("?") != 1:
        raise ValueError(f"a pattern needs one knob '?', as window(window=?), got {pattern!r}")

    def of(knob: int) -> Approximation:
        return parse(pattern.replace("?", str(knob)))

    low, high = 1, shape.keys
    while low < high:
        middle = (low + high) // 2
        if of(middle).density(shape) < target:
            low = middle + 1
        else:
            high = middle
    near = [of(knob) for knob in (low - 1, low) if knob > 0]
    return min(near, key=lambda a: abs(a.density(shape) - target))


def pairs(shape: AttentionShape) -> list[Approximation]:
    """The first pair of a window and a far field of every kind worth trying."""
    found: dict[str, Approximation] = {}
    for a in catalog.choices(shape):
        if a.far is not None and a.near.name == "window":
            found.setdefault(a.far.name, a)
    return list(found.values())


def with_fitted(inputs: Inputs, kinds: Sequence[Approximation]) -> Inputs:
    """The call with what some methods fit to its own first queries and keys."""
    if not any(catalog.fitted_names(inputs.query.shape[3], type(p)) for a in kinds for p in _of(a)):
        return inputs
    query, key = (t[:, :, :FITTED].to("cpu", torch.float64) for t in (inputs.query, inputs.key))
    moments = Moments(*(part for rows in (query, key) for part in (rows.mean((0, 2)), _gram(rows))))
    data: dict[str, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        data |= kind.fit(moments)
    return replace(inputs, fitted={name: t.to(inputs.query.device) for name, t in data.items()})


def _of(approximation: Approximation) -> list[Selector | Compressor]:
    return [approximation.near, *([] if approximation.far is None else [approximation.far])]


def _gram(rows: Tensor) -> Tensor:
    """Mean of x x^T by head."""
    return torch.einsum("bhid,bhie->hde", rows, rows) / (rows.shape[0] * rows.shape[2])


class Source:
    """Queries, keys and values of any size: of real text where a file is given, else random.

    Args:
        device: where they go.
        path: safetensors with `N.query`, `N.key` and `N.value`, each [heads, tokens, head_dim].
    """

    def __init__(self, device: torch.device, path: Path | None = None) -> None:
        self.device = device
        self.path = path
        self._stored = {} if path is None else load_file(path)
        self._last: tuple[object, Inputs] | None = None

    @property
    def kind(self) -> str:
        """What the numbers are."""
        return "random normal" if self.path is None else f"real text, {self.path.name}"

    def inputs(
        self, length: int, head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype
    ) -> Inputs:
        """One layer's call; the last one is kept."""
        asked = (length, head_dim, heads, kv_heads, dtype)
        if self._last is None or self._last[0] != asked:
            self._last = None
            make = self._random if self.path is None else self._tiled
            query, key, value = (
                make(name, count, length, head_dim, dtype)
                for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
            )
            self._last = asked, Inputs.of_layer(query, key, value, scale=head_dim**-0.5)
        return self._last[1]

    def _random(
        self, name: str, count: int, length: int, head_dim: int, dtype: torch.dtype
    ) -> Tensor:
        seed = ("query", "key", "value").index(name)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(
            1, count, length, head_dim, generator=generator, device=self.device, dtype=dtype
        )

    def _tiled(
        self, name: str, count: int, length: int, head_dim: int, dtype: torch.dtype
    ) -> Tensor:
        """Stored heads repeated until there are enough, side by side until they are wide enough.

        A text is repeated to longer ones. What such a head attends to is like text; it is no head
        of a larger model.
        """
        found = [t for key, t in sorted(self._stored.items()) if key.endswith(f".{name}")]
        rows = torch.cat(found).to(self.device, dtype)
        wide = -(-head_dim // rows.shape[2])
        index = torch.arange(count * wide, device=self.device) % rows.shape[0]
        place = torch.arange(length, device=self.device) % rows.shape[1]
        made = rows[index][:, place].unflatten(0, (count, wide)).transpose(1, 2).flatten(2)
        return made[None, ..., :head_dim].contiguous()


def dense_row(row: Row, inputs: Inputs, *, force: bool, repeats: int, flex: bool) -> Row:
    """A layer of dense heads: as models run it, or by the kernel."""
    layer = (catalog.DENSE,) * row.heads
    timing = measure_layer(inputs, layer, repeats=repeats, force=force, flex=flex)
    return row.timed(timing, 1.0, inputs.shape)


def layer_row(
    row: Row, inputs: Inputs, approximation: Approximation, *, repeats: int, flex: bool
) -> Row:
    """A layer whose heads are all alike."""
    inputs = with_fitted(inputs, [approximation])
    timing = measure_layer(inputs, (approximation,) * row.heads, repeats=repeats, flex=flex)
    return replace(
        row.timed(timing, approximation.density(inputs.shape), inputs.shape),
        more={"approximation": catalog.key(approximation)},
    )


def mixed_row(
    row: Row, inputs: Inputs, kinds: Sequence[Approximation], *, repeats: int, flex: bool
) -> Row:
    """A layer of equal shares of several kinds: in one launch, kind by kind, and head by head.

    `balanced_ms` is the mean time of whole layers of each kind: what one launch takes where heads
    of different kinds fill the device as evenly as heads of one kind do.
    """
    if row.heads % len(kinds):
        raise ValueError(f"{row.heads} heads cannot be shared equally by {len(kinds)} kinds")
    share = row.heads // len(kinds)
    inputs = with_fitted(inputs, kinds)
    layer = tuple(kind for kind in kinds for _ in range(share))
    timing = measure_layer(inputs, layer, repeats=repeats, force=True, flex=flex)
    parts: dict[str, float] = {}
    whole: dict[str, float] = {}
    for number, kind in enumerate(kinds):
        alike = (kind,) * row.heads
        alone_ms = measure_layer(inputs, alike, repeats=repeats, force=True, flex=flex).median_ms
        whole[catalog.key(kind)] = alone_ms
        run = calls(inputs, layer, [range(number * share, (number + 1) * share)])
        parts[catalog.key(kind)] = measure_call(run, inputs, repeats=repeats, flex=flex).median_ms
    alone = calls(inputs, layer, [[head] for head in range(row.heads)])
    each = measure_call(alone, inputs, repeats=repeats, flex=flex)
    density = sum(kind.density(inputs.shape) for kind in kinds) / len(kinds)
    return replace(
        row.timed(timing, density, inputs.shape),
        more={
            "parts_ms": parts,
            "whole_ms": whole,
            "balanced_ms": sum(whole.values()) / len(kinds),
            "sum_of_parts_ms": sum(parts.values()),
            "head_by_head_ms": each.median_ms,
            "head_by_head_host_us": each.host_us,
        },
    )


def calls(
    inputs: Inputs, layer: Sequence[Approximation], groups: Sequence[Sequence[int]]
) -> Callable[[], None]:
    """A launch for each group of heads of a layer, over copies of what they read.

    Raises:
        ValueError: the heads of a group read their kv heads unequally often.
    """
    prepared = []
    for heads in groups:
        read = [inputs.kv_head[head] for head in heads]
        used = sorted(set(read))
        if read != [kv for kv in used for _ in range(len(read) // len(used))]:
            raise ValueError(f"heads {list(heads)} read kv heads {read}, which are no whole groups")
        kernel = LayerKernel(tuple(layer[head] for head in heads), inputs.fitted)
        kernel.is_dense = False
        tensors = inputs.query[:, list(heads)], inputs.key[:, used], inputs.value[:, used]
        prepared.append((kernel, tensors))

    def run() -> None:
        for kernel, tensors in prepared:
            kernel(*tensors, scale=inputs.scale)

    return run


def crossover_row(
    row: Row,
    steps: Iterator[tuple[int, Inputs, Approximation]],
    *,
    repeats: int,
    flex: bool,
    enough: Callable[[], bool],
) -> Row:
    """The shortest of some lengths at which an approximation beats dense attention.

    Args:
        row: to fill in.
        steps: lengths that grow, each with a call of it and the approximation.
        repeats, flex: see `measure_layer`.
        enough: says that no more lengths should be tried.
    """
    tried: list[dict[str, Any]] = []
    for length, inputs, approximation in steps:
        timing = measure_layer(inputs, (approximation,) * row.heads, repeats=repeats, flex=flex)
        row = row.timed(timing, approximation.density(inputs.shape), inputs.shape)
        times = {"length": length, "ms": timing.median_ms, "dense_ms": timing.dense_ms}
        tried.append({**times, "approximation": catalog.key(approximation)})
        if timing.median_ms < timing.dense_ms:
            return replace(row, more={"crossover": length, "tried": tried})
        if enough():
            late = f"no time for more than {length} tokens"
            return replace(row, more={"crossover": None, "tried": tried}, error=late)
    return replace(row, more={"crossover": None, "tried": tried})


def error_row(row: Row, inputs: Inputs, layer: Sequence[Approximation]) -> Row:
    """The kernel's error against the reference in float64, over the same keys."""
    inputs = with_fitted(inputs, layer)
    kernel = LayerKernel(tuple(layer), inputs.fitted)
    kernel.is_dense = False
    found = kernel(inputs.query, inputs.key, inputs.value, scale=inputs.scale).double().cpu()
    exact = defined(kernel, inputs, torch.float64).double()
    error = float((found - exact).norm() / exact.norm())
    allowed = allowed_error(inputs.query.dtype, any(kind.far for kind in layer))
    largest = float((found - exact).abs().max() / exact.abs().max())
    kinds = dict.fromkeys(layer)
    wrong = not error <= allowed  # also where it is not a number
    return replace(
        row,
        density=sum(kind.density(inputs.shape) for kind in layer) / len(layer),
        relative_error=error if math.isfinite(error) else None,
        allowed=allowed,
        more={
            "approximation": " | ".join(catalog.key(kind) for kind in kinds),
            "largest_error": largest if math.isfinite(largest) else None,
        },
        error=f"wrong: relative error {error:.2e}, allowed {allowed:.2e}" if wrong else None,
        wrong=wrong,
    )


def allowed_error(dtype: torch.dtype, far: bool) -> float:
    """The largest relative error of a right kernel.

    Kernels of 16 bits round weights and outputs, which comes to 0.2 units of rounding; others
    compute in float32, where sums come to 1 to 5 units. A product that is rounded to fewer bits
    than it should is beyond it.

    Args:
        dtype: of the inputs.
        far: with far fields, where keys that are as near to two centres may go to either.
    """
    if dtype.itemsize == 2:
        return max(0.6 * torch.finfo(dtype).eps, 2e-2 * far)
    return max(64 * torch.finfo(torch.float32).eps, 1e-4 * far)


def defined(kernel: LayerKernel, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """What the reference engine gives on the CPU in some precision.

    Without far fields, which keys are read is decided by the inputs as they are, where they are:
    another precision may choose others where scores are close.
    """
    tensors = [t.to("cpu", dtype) for t in (inputs.query, inputs.key, inputs.value)]
    fitted = {name: t.cpu() for name, t in inputs.fitted.items()}
    moved = Inputs.of_layer(*tensors, scale=inputs.scale, fitted=fitted)
    chooses = moved if any(a.far for a in kernel.assignment) else inputs
    blocks = torch.arange(inputs.blocks, device=chooses.query.device)
    tiles, slots = kernel.tiles(chooses, blocks)
    tiles = replace(
        tiles,
        offsets=tiles.offsets.cpu(),
        tiles=tiles.tiles.cpu(),
        gather=tiles.gather.cpu(),
        masks=tiles.masks.cpu(),
    )
    output, log_mass = reference_prefill.attend(
        *tensors, scale=inputs.scale, kv_head=inputs.kv_head, tiles=tiles, slots=slots
    )
    part = kernel.part(chooses, blocks)
    return output if part is None else part.merge(output, log_mass)[0]


def unfitted_keepers(context: int, head_dim: int) -> list[Keeper]:
    """Keepers worth trying that need no fitted data."""
    return [
        k
        for k in cache_catalog.choices(context)
        if not cache_catalog.fitted_names(head_dim, type(k))
    ]


def decode_row(row: Row, inputs: Inputs, keeper: Keeper, steps: int) -> Row:
    """A generated token after a text of so many, beside transformers' cache with SDPA."""
    tensors = inputs.query, inputs.key, inputs.value
    layer = LayerCapture(0, "", *tensors, torch.empty(0), inputs.scale)
    timing = measure_decoding([layer] * DECODING_LAYERS, (keeper,) * row.kv_heads, {}, steps=steps)
    return replace(
        row,
        median_ms=timing.median_ms,
        q25_ms=timing.q25_ms,
        q75_ms=timing.q75_ms,
        repeats=timing.steps,
        dense_ms=timing.dense_median_ms,
        dense_backend="DynamicCache, sdpa",
        more={
            "kept": spell((keeper,) * row.kv_heads),
            "mean_ms": timing.mean_ms,
            "dense_mean_ms": timing.dense_mean_ms,
            "share": timing.share,
            "layers": timing.layers,
        },
    )


def host_row(row: Row, inputs: Inputs, layer: Sequence[Keeper], steps: int) -> Row:
    """What the host does for a generated token and a layer, beside DynamicCache and SDPA."""
    tensors = inputs.query, inputs.key, inputs.value
    capture = LayerCapture(0, "", *tensors, torch.empty(0), inputs.scale)
    timing = measure_host([capture] * HOST_LAYERS, layer, steps=steps)
    return replace(row, host_us=timing.median_us, repeats=steps, more=asdict(timing))
