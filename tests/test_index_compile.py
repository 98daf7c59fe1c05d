"""Kernels of feature maps and indices compile for GPUs that are not here, without spills."""

from __future__ import annotations

import pytest
from tests.test_triton_compile import REGISTERS, SHARED_BYTES, compiled

KERNELS = {
    80: [
        "80:bf16:64:chunks:128",
        "80:bf16:128:read:128",
        "80:fp32:64:squares:128",
        "80:fp32:64:nearest:64",
        "80:bf16:128:merge:0",
        "80:bf16:64:centroid_t:256",
        "80:bf16:128:multipole:128",
        "80:bf16:64:choose:64",
    ],
    90: [
        "90:bf16:64:squares:128",
        "90:bf16:64:chunks:128",
        "90:bf16:64:read:128",
        "90:fp16:128:chunks:128",
        "90:bf16:128:read:128",
        "90:fp32:64:read:128",
        "90:bf16:64:prefix:128",
        "90:fp32:64:nearest:16",
        "90:fp32:64:hash:64",
        "90:bf16:64:nearest:64",
        "90:bf16:64:centroid_t:64",
        "90:fp16:64:centroid_t:256",
        "90:bf16:80:centroid_t:256",
        "90:bf16:128:centroid_t:256",
        "90:bf16:64:multipole:128",
        "90:bf16:64:merge:0",
        "90:fp16:256:merge:0",
        "90:bf16:64:means:16",
        "90:fp16:128:means:0",
        "90:bf16:64:choose:2048",
    ],
    100: [
        "100:bf16:128:centroid_t:256",
        "100:bf16:64:chunks:128",
        "100:bf16:64:read:128",
        "100:fp32:128:nearest:64",
    ],
}
PRODUCTS = {"80": "hmma", "90": "hgmma", "100": "utcmma"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    return compiled("aot_index.py", KERNELS, tmp_path_factory.mktemp("triton-index"))


@pytest.mark.parametrize("name", [name for names in KERNELS.values() for name in names])
def test_compiled_code_uses_the_hardware(reports: dict[str, dict[str, int]], name: str) -> None:
    (arch, dtype, _, kernel, _), report = name.split(":"), reports[name]
    assert report["spills"] == 0
    assert 2 * report["shared_bytes"] <= SHARED_BYTES[int(arch)]
    programs = REGISTERS // (report["registers"] * 32 * report["warps"])
    assert programs * report["warps"] >= 8, "warps hide each other's latency"
    if kernel == "prefix":
        assert report["vector_copies"] > 0, "states are copied ahead, 16 bytes at a time"
    elif kernel in ("merge", "means"):
        assert report["wide_loads"] > 0, "rows are read 16 bytes at a time"
    elif dtype != "fp32" and kernel != "choose":
        assert report[PRODUCTS[arch]] > 0
