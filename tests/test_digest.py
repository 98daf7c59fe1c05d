"""A timing is of the code that runs now, or it is not: per method, whatever the comments say."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnplan.kernels import cache_catalog, catalog, digest
from attnplan.kernels.digest import decode_digest, files_of, layer_digest

NEAR, FAR = catalog.NEAR, catalog.FAR


def names(device: str, *methods: type) -> set[str]:
    modules = (digest.LAYER, *(method.__module__ for method in methods))
    return {path.name for path in files_of(device, modules)}


def own(method: type) -> str:
    return method.__module__.rpartition(".")[2] + ".py"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_method_counts_its_own_file_and_those_of_no_other(device: str) -> None:
    rests_on = {"loki": {"window.py"}, "lsh": {"window.py"}, "two_stage": {"window.py", "loki.py"}}
    found = {cls: names(device, cls) for cls in (*NEAR.values(), *FAR.values())}
    for cls, files in found.items():
        others = {own(other) for other in found if other is not cls}
        assert own(cls) in files and files & others == rests_on.get(cls.name, set()), cls
    assert len({layer_digest(device, [cls]) for cls in found}) == len(found)


def test_a_family_counts_for_its_methods_alone() -> None:
    family = own(NEAR["quest"].__mro__[1])
    assert family in names("cpu", NEAR["quest"])
    clustered = own(FAR["centroid_t"].__mro__[1])
    assert clustered in names("cpu", FAR["multipole"])
    assert clustered not in names("cpu", FAR["nystrom"]) | names("cpu", NEAR["window"])


def test_the_engine_is_that_of_the_device() -> None:
    on_cpu, on_gpu = (files_of(d, [FAR["centroid_t"].__module__]) for d in ("cpu", "cuda"))
    assert any(path.suffix == ".cpp" for path in on_cpu)
    assert not any("import triton" in path.read_text() for path in on_cpu)
    assert any("import triton" in path.read_text() for path in on_gpu)
    assert not any(path.suffix == ".cpp" for path in on_gpu)
    assert layer_digest("cpu") != layer_digest("cuda")


def test_heads_of_two_methods_count_both() -> None:
    both = layer_digest("cpu", [NEAR["window"], NEAR["quest"]])
    assert both == layer_digest("cpu", [NEAR["quest"], NEAR["window"]])
    assert both not in {layer_digest("cpu", [NEAR[n]]) for n in ("window", "quest")}


def test_decoding_has_digests_of_its_own() -> None:
    kinds = cache_catalog.KEEPERS.values()
    found = {decode_digest(device, [kind]) for device in ("cpu", "cuda") for kind in kinds}
    assert len(found) == 2 * len(kinds) and layer_digest("cpu") not in found


def test_only_code_counts(tmp_path: Path) -> None:
    plain = tmp_path / "plain.py"
    plain.write_text("x = 1\n\n\ndef f(y):\n    return '# no comment', x\n")
    told = tmp_path / "told.py"
    told.write_text(
        '"""What it is for,\n\nand why."""\nx = 1  # one\n"""Of all."""\n# more\n\n\n'
        "def f(y):\n    '''Answers.'''\n    return '# no comment', x\n"
    )
    other = tmp_path / "other.py"
    other.write_text(plain.read_text().replace("1", "2"))
    assert digest._code(plain) == digest._code(told) != digest._code(other)
    assert "# no comment" in digest._code(told)


def test_imports_for_types_do_not_count() -> None:
    text = "from typing import TYPE_CHECKING\n"
    text += "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    from c import d\n"
    assert set(digest._imported(digest.ast.parse(text))) == {
        *("typing", "typing.TYPE_CHECKING", "b", "c", "c.d")
    }


def test_lines_name_their_methods() -> None:
    line = "3 x window(window=128, sinks=4) + linear(chunk=256) | 6 x dense()"
    assert catalog.methods_in(line) == {NEAR["window"], NEAR["dense"], FAR["linear"]}
    assert catalog.methods_in("9 x forgotten(top=3)") is None
