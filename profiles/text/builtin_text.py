"""The built-in calibration text: what every Python ships, in three kinds and two parts.

Heads behave differently on repetitive text, on running prose and on code, so a single kind
misleads. The kinds are `prose` (paragraphs of docstrings), `reference` (`pydoc_data.topics`, the
language reference) and `code` (sources of the standard library). A document is one topic or one
source file; prose and code come from different files.

The parts `calibration` and `holdout` share no document, and no paragraph either: a paragraph that
several documents repeat stays in the first one only. The text is fixed for a version of Python;
the digest of the tokens tells versions apart.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

KINDS = ("prose", "reference", "code")

# Present in every Python 3.11 to 3.13, also where distributions split the standard library.
_PROSE = """
_pydecimal _pyio _threading_local abc argparse ast asyncio/base_events asyncio/locks
asyncio/protocols asyncio/queues asyncio/streams asyncio/tasks asyncio/transports base64 bdb
cmd code codecs concurrent/futures/_base configparser contextlib copy csv ctypes/util datetime
difflib dis doctest email/_header_value_parser email/_policybase email/charset email/header
email/headerregistry email/message email/policy enum fileinput fnmatch fractions ftplib functools
getpass gettext glob gzip http/client http/cookiejar http/cookies http/server imaplib
importlib/_bootstrap importlib/_bootstrap_external importlib/abc inspect ipaddress linecache
logging/__init__ logging/config logging/handlers lzma mailbox mimetypes multiprocessing/managers
netrc optparse os pdb pickle pickletools pkgutil platform plistlib poplib pprint pydoc random
re/__init__ sched secrets shelve shutil site smtplib socket socketserver ssl statistics string
subprocess tarfile tempfile textwrap threading timeit trace traceback typing unittest/case
unittest/mock urllib/parse urllib/request urllib/robotparser uuid warnings wave weakref
webbrowser wsgiref/handlers xml/dom/minidom xml/etree/ElementTree xml/sax/handler xml/sax/saxutils
xml/sax/xmlreader xmlrpc/client xmlrpc/server zipapp
""".split()

_CODE = """
_collections_abc _markupbase _strptime _weakrefset asyncio/events asyncio/futures
asyncio/selector_events asyncio/subprocess bisect bz2 calendar cProfile collections/__init__
colorsys compileall concurrent/futures/process concurrent/futures/thread copyreg dataclasses
dbm/dumb email/contentmanager email/feedparser email/generator email/quoprimime filecmp graphlib
hashlib heapq hmac html/parser json/decoder json/encoder json/scanner modulefinder
multiprocessing/connection multiprocessing/context multiprocessing/heap multiprocessing/pool
multiprocessing/queues ntpath numbers operator posixpath profile pstats py_compile pyclbr queue
reprlib rlcompleter runpy selectors shlex signal stringprep symtable tabnanny token tokenize
tracemalloc types unittest/loader unittest/main unittest/runner unittest/suite wsgiref/simple_server
wsgiref/util xml/etree/ElementPath xml/sax/expatreader
""".split()

_SHORTEST = 200
"""Characters of a document: what repeats others leaves little behind."""
_PHRASE = 12
"""Words in a row that two parts hardly share by chance; half as many, if they are a paragraph."""


def documents(split: str) -> dict[str, tuple[str, ...]]:
    """The texts of one part, kind to documents in a fixed order.

    Args:
        split: 'calibration', 'holdout' or 'all'.

    Raises:
        ValueError: the sources of the standard library are not on this machine.
    """
    wanted = ("calibration", "holdout") if split == "all" else (split,)
    return {
        kind: tuple(text for part, text in parts if part in wanted)
        for kind, parts in _documents().items()
    }


@cache
def _documents() -> dict[str, list[tuple[str, str]]]:
    """(part, text) of every document by kind, halved by size in the order of the names' hashes."""
    seen: set[int] = set()  # hashes of phrases; two alike by chance cost nothing
    out: dict[str, list[tuple[str, str]]] = {}
    for kind in KINDS:
        found = [(name, _without_repeats(text, seen)) for name, text in _sources(kind)]
        found.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
        sizes = {"calibration": 0, "holdout": 0}
        out[kind] = []
        for _, text in found:
            part = "calibration" if sizes["calibration"] <= sizes["holdout"] else "holdout"
            sizes[part] += len(text)
            if len(text) >= _SHORTEST:
                out[kind].append((part, text))
    return out


def _sources(kind: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every document of a kind, sorted by name."""
    if kind == "reference":
        from pydoc_data.topics import topics

        yield from sorted(topics.items())
        return
    library = Path(os.__file__).parent
    for name in sorted(_PROSE if kind == "prose" else _CODE):
        path = library / f"{name}.py"
        try:
            source = path.read_text(encoding="utf-8")
        except OSError:
            raise ValueError(
                f"the builtin text is the source of Python's standard library, but {path} cannot "
                "be read; pass a text file with --data"
            ) from None
        yield name, source if kind == "code" else "\n\n".join(_prose(source))


def _prose(source: str) -> Iterator[str]:
    """The paragraphs of running text in the docstrings of a file, unwrapped."""
    for docstring in _docstrings(ast.parse(source)):
        for block in re.split(r"\n\s*\n", docstring):
            paragraph = " ".join(block.split())
            plain = sum(c.isalpha() or c.isspace() for c in paragraph)
            if (
                len(paragraph) >= 100
                and plain >= 0.88 * len(paragraph)
                and paragraph[0].isupper()
                and paragraph[-1] in ".:!?)"
                and ">>>" not in paragraph
            ):
                yield paragraph


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, class or function and of what is defined in it, in order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for statement in getattr(node, "body", ()):
        yield from _docstrings(statement)


def _without_repeats(text: str, seen: set[int]) -> str:
    """`text` without the paragraphs that repeat phrases in `seen`; adds its own to `seen`."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        words = re.findall(r"\w+", paragraph)
        starts = range(max(len(words) - _PHRASE, 0) + 1) if len(words) >= _PHRASE // 2 else ()
        phrases = {hash(tuple(words[i : i + _PHRASE])) for i in starts}
        if len(phrases & seen) > 0.2 * len(phrases):
            continue
        seen |= phrases
        if paragraph.strip():
            kept.append(paragraph.rstrip())
    return "\n\n".join(kept)
