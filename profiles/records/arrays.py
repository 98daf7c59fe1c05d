"""numpy arrays as compact bytes and back, without pickle."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def pack(array: Array) -> bytes:
    """One array as compressed .npy bytes."""
    return zlib.compress(_npy(array), level=1)


def unpack(data: bytes) -> Array:
    """The array that `pack` packed."""
    array: Array = np.load(io.BytesIO(zlib.decompress(data)), allow_pickle=False)
    return array


def pack_all(arrays: Mapping[str, Array]) -> bytes:
    """Named arrays as the bytes of a compressed .npz file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in sorted(arrays):
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy"),
                _npy(arrays[name]),
                compresslevel=1,
                compress_type=zipfile.ZIP_DEFLATED,
            )
    return out.getvalue()


def unpack_all(data: bytes) -> dict[str, Array]:
    """The arrays that `pack_all` packed."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def narrow(array: Array, dtype: type[np.floating[Any]]) -> Array:
    """`array` in a smaller float type.

    Raises:
        ValueError: a value does not fit, or is not finite.
    """
    with np.errstate(over="ignore"):
        out: Array = np.asarray(array).astype(dtype)
    if not np.isfinite(out).all():
        raise ValueError(f"array of shape {out.shape} has values that are not finite {out.dtype}")
    return out


def _npy(array: Array) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(array), allow_pickle=False)
    return out.getvalue()
