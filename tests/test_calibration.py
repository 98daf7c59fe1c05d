"""Calibration text is reproducible, of mixed kinds, and never seen again in the holdout part."""

import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from attnplan.profiles.text.builtin_text import KINDS, documents
from attnplan.profiles.text.calibration import TokenSet, load_sequences


class Words:
    """One token per word or sign; ids from the text alone."""

    def __init__(self, bos: int | None = None, adds_bos: bool = True) -> None:
        self.bos_token_id = bos
        self.adds_bos = adds_bos
        self.characters = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.characters += len(text)
        ids = [2 + zlib.crc32(w.encode()) % 50_000 for w in re.findall(r"\w+|[^\w\s]", text)]
        start = [self.bos_token_id] if self.bos_token_id is not None and self.adds_bos else []
        return {"input_ids": (start if add_special_tokens else []) + ids}


@pytest.fixture
def article(tmp_path: Path) -> Path:
    path = tmp_path / "article.txt"
    path.write_text("\n\n".join(" ".join(f"w{p}x{w}" for w in range(50)) for p in range(40)))
    return path


def builtin(
    context: int = 256, sequences: int = 4, split: str = "calibration", offset: int = 0
) -> TokenSet:
    return load_sequences(
        Words(), "builtin", context=context, sequences=sequences, split=split, offset=offset
    )


def phrases(texts: tuple[str, ...]) -> set[tuple[str, ...]]:
    found = set()
    for text in texts:
        words = text.split()
        found |= {tuple(words[i : i + 12]) for i in range(len(words) - 11)}
    return found


def test_parts_of_the_builtin_text_share_no_document_and_hardly_a_phrase() -> None:
    calibration, holdout = documents("calibration"), documents("holdout")
    seen = set().union(*(phrases(texts) for texts in calibration.values()))
    for kind in KINDS:
        assert not set(calibration[kind]) & set(holdout[kind])
        new = phrases(holdout[kind])
        assert len(new & seen) < 0.02 * len(new)
        sizes = [sum(map(len, part[kind])) for part in (calibration, holdout)]
        assert max(sizes) < 1.5 * min(sizes)
        assert len(documents("all")[kind]) == len(calibration[kind]) + len(holdout[kind])


@pytest.mark.parametrize("split", ["calibration", "holdout"])
def test_builtin_text_is_enough_for_eight_sequences_of_8192(split: str) -> None:
    found = builtin(context=8192, sequences=8, split=split)
    assert found.tokens.shape == (8, 8192)
    assert found.tokens.dtype == torch.int64
    assert found.kinds == ("prose", "reference", "code") * 2 + ("prose", "reference")
    assert (found.name, found.split) == ("builtin", split)


def test_each_builtin_sequence_is_of_one_kind() -> None:
    found = builtin(context=512, sequences=6)
    for row, kind in zip(found.tokens.tolist(), found.kinds, strict=True):
        ids = [i for text in documents("calibration")[kind] for i in Words()(text)["input_ids"]]
        assert " ".join(map(str, row)) in " ".join(map(str, ids))


def test_more_sequences_begin_with_the_fewer_and_an_offset_goes_on_after_them() -> None:
    many, few = builtin(sequences=7), builtin(sequences=3)
    assert torch.equal(many.tokens[:3], few.tokens)
    rest = builtin(sequences=4, offset=3 * 256)
    assert torch.equal(many.tokens[3:], rest.tokens)
    assert many.kinds[3:] == rest.kinds
    odd = builtin(sequences=3, offset=3 * 256 + 1)  # whole sequences, rounded up
    assert torch.equal(many.tokens[4:], odd.tokens)
    assert odd.kinds == ("reference", "code", "prose")


def test_the_digest_is_that_of_the_tokens() -> None:
    assert builtin().digest == builtin().digest
    others = [builtin(sequences=3), builtin(context=128, sequences=8), builtin(split="holdout")]
    assert len({builtin().digest, *(other.digest for other in others)}) == 4
    identity = builtin().identity
    assert (identity.digest, identity.tokens) == (builtin().digest, 4 * 256)


def test_the_digest_does_not_depend_on_the_process() -> None:
    code = (
        "from attnplan.profiles.text.builtin_text import documents as d; import hashlib;"
        "print(hashlib.sha256(repr(d('all')).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_a_file_is_cut_in_two_parts_between_paragraphs(article: Path) -> None:
    def tokens(split: str, sequences: int, offset: int = 0) -> TokenSet:
        return load_sequences(
            Words(), article, context=50, sequences=sequences, split=split, offset=offset
        )

    whole = tokens("all", 40)
    first, last = tokens("calibration", 29), tokens("holdout", 11)
    assert torch.equal(torch.cat([first.tokens, last.tokens]), whole.tokens)
    assert torch.equal(tokens("all", 2, offset=75).tokens.flatten(), whole.tokens.flatten()[75:175])
    assert whole.kinds == ("text",) * 40
    assert whole.name == "article.txt"


def test_a_file_without_lines_is_cut_between_words(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("word " * 100_000)
    for split, share in (("calibration", 70_000), ("holdout", 30_000)):
        count = share - 1_000
        found = load_sequences(Words(), path, context=count, sequences=1, split=split)
        assert found.tokens.unique().numel() == 1


def test_only_as_much_text_as_needed_is_tokenised(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("some words in a line\n" * 200_000)
    tokenizer = Words()
    load_sequences(tokenizer, path, context=100, sequences=2, split="all")
    assert tokenizer.characters < 70_000


def test_every_sequence_starts_as_the_tokenizer_would_start_it(article: Path) -> None:
    def load(tokenizer: Words) -> torch.Tensor:
        return load_sequences(tokenizer, article, context=50, sequences=3, split="all").tokens

    plain, marked = load(Words()), load(Words(bos=1))
    assert marked[:, 0].tolist() == [1, 1, 1]
    assert torch.equal(marked[:, 1:].flatten(), plain.flatten()[: 3 * 49])
    assert torch.equal(load(Words(bos=1, adds_bos=False)), plain)


def test_line_ends_and_a_byte_order_mark_do_not_matter(article: Path, tmp_path: Path) -> None:
    other = tmp_path / "windows.txt"
    other.write_bytes(b"\xef\xbb\xbf" + article.read_bytes().replace(b"\n", b"\r\n"))
    found = [
        load_sequences(Words(), path, context=50, sequences=3, split="holdout").digest
        for path in (article, other)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n\n ", "the file is empty"),
        (b"\xff\xfe\x00text", "not UTF-8 text: invalid start byte at byte 0"),
        (b"GGUF\0\0", "it has a zero byte at character 4"),
        (b"three small words", "3 tokens, but 1 x 64 are wanted; .* longer text"),
    ],
)
def test_a_file_that_is_no_calibration_text_gets_one_sentence(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_sequences(Words(), path, context=64, sequences=1, split="all")
    assert "data.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.txt", tmp_path):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: cannot be read"):
            load_sequences(Words(), path, context=64, sequences=1, split="all")


def test_too_short_a_text_says_what_would_do(article: Path) -> None:
    with pytest.raises(ValueError, match=r"2000 tokens, but 5 x 600 are wanted; a context of at "):
        load_sequences(Words(), article, context=600, sequences=5, split="all")
    load_sequences(Words(), article, context=400, sequences=5, split="all")
    with pytest.raises(ValueError, match="or 3 x 600"):
        load_sequences(Words(), article, context=600, sequences=5, split="all")
    with pytest.raises(ValueError, match="500 after the 1500 that are skipped"):
        load_sequences(Words(), article, context=600, sequences=1, split="all", offset=1500)
    with pytest.raises(ValueError, match="builtin, part calibration, prose"):
        builtin(context=200_000, sequences=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 1}, "context must be at least 2 tokens, got 1"),
        ({"sequences": 0}, "sequences must be at least 1, got 0"),
        ({"offset": -1}, "offset must not be negative, got -1"),
        ({"split": "test"}, "unknown split 'test'; known: calibration, holdout, all"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        builtin(**change)  # type: ignore[arg-type]
