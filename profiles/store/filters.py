"""The filter language of `attnplan query`: text to a tree, with errors that point at the place.

    filter     = conjunction { "or" conjunction }
    conjunction = negation { "and" negation }
    negation   = { "not" } ( "(" filter ")" | condition )
    condition  = operand ( "=" | "==" | "!=" | "<>" | "<" | "<=" | ">" | ">=" ) operand
               | column "is" [ "not" ] "null"
               | column [ "not" ] "in" "(" literal { "," literal } ")"
               | column [ "not" ] "like" string
    operand    = column | literal
    literal    = number | 'text' | "text" | true | false

Words are case-insensitive, a quote inside a text is doubled, and `like` knows % and _ and ignores
case. As in SQL, a comparison with a missing value is neither true nor false.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

NUMBER, TEXT, TRUTH = "a number", "a text", "true or false"
"""What a column holds."""

_LONGEST = 1000  # tokens
_DEEPEST = 50  # parentheses within parentheses
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
  | (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
  | (?P<word>[A-Za-z_]\w*)
  | (?P<sign><=|>=|==|!=|<>|[=<>(),])
    )""",
    re.VERBOSE,
)
_COMPARISONS = {
    "=": "=",
    "==": "=",
    "!=": "!=",
    "<>": "!=",
    "<": "<",
    "<=": "<=",
    ">": ">",
    ">=": ">=",
}
_KEYWORDS = ("and", "or", "not", "in", "is", "like", "null", "true", "false")

Literal = float | str | bool


@dataclass(frozen=True)
class Column:
    name: str


@dataclass(frozen=True)
class Compare:
    """`operator` is one of = != < <= > >=."""

    left: Column | Literal
    operator: str
    right: Column | Literal


@dataclass(frozen=True)
class IsNull:
    column: Column


@dataclass(frozen=True)
class In:
    column: Column
    values: tuple[Literal, ...]


@dataclass(frozen=True)
class Like:
    column: Column
    pattern: str


@dataclass(frozen=True)
class Not:
    part: Filter


@dataclass(frozen=True)
class And:
    parts: tuple[Filter, ...]


@dataclass(frozen=True)
class Or:
    parts: tuple[Filter, ...]


Filter = Compare | IsNull | In | Like | Not | And | Or


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int

    @property
    def keyword(self) -> str:
        return self.text.lower() if self.kind == "word" else self.text

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else repr(self.text)


def parse_filter(text: str, columns: Mapping[str, str], view: str = "this view") -> Filter:
    """The tree of a filter.

    Args:
        columns: name to NUMBER, TEXT or TRUTH.
        view: what the columns belong to, for messages.

    Raises:
        ValueError: the text is no filter on these columns; names the token and its position, which
            counts from 1.
    """
    return _Parser(text, columns, view).parse()


def unknown_column(name: str, columns: Mapping[str, str], view: str) -> str:
    """The message for a column that is not there, with the closest one that is."""
    close = difflib.get_close_matches(name.lower(), columns, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown column {name!r}; {hint}columns of {view}: {', '.join(columns)}"


class _Parser:
    def __init__(self, text: str, columns: Mapping[str, str], view: str) -> None:
        self.columns, self.view = columns, view
        self.tokens = _tokens(text)
        self.next = 0
        self.depth = 0

    def parse(self) -> Filter:
        found = self.disjunction()
        if self.token.kind != "end":
            raise self.error("want 'and', 'or' or the end")
        return found

    def disjunction(self) -> Filter:
        parts = [self.conjunction()]
        while self.take("or"):
            parts.append(self.conjunction())
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def conjunction(self) -> Filter:
        parts = [self.negation()]
        while self.take("and"):
            parts.append(self.negation())
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def negation(self) -> Filter:
        negated = False
        while self.take("not"):
            negated = not negated
        if self.token.keyword == "(":
            self.depth += 1
            if self.depth > _DEEPEST:
                raise self.error(f"at most {_DEEPEST} parentheses within each other")
            self.take("(")
            found = self.disjunction()
            self.want(")")
            self.depth -= 1
        else:
            found = self.condition()
        return Not(found) if negated else found

    def condition(self) -> Filter:
        start = self.token
        left = self.operand()
        sign = self.token
        if sign.text in _COMPARISONS:
            self.next += 1
            at = self.token
            right = self.operand()
            self.same_kind(left, right, at)
            return Compare(left, _COMPARISONS[sign.text], right)
        if not isinstance(left, Column):
            raise self.error(f"want a comparison after {start}")
        if self.take("is"):
            negated = self.take("not")
            self.want("null")
            return Not(IsNull(left)) if negated else IsNull(left)
        negated = self.take("not")
        if self.take("in"):
            found: Filter = In(left, self.values(left))
        elif self.take("like"):
            found = Like(left, self.pattern(left))
        elif negated:
            raise self.error("want 'in' or 'like'")
        else:
            raise self.error("want a comparison, such as > or =, or 'in', 'like' or 'is null'")
        return Not(found) if negated else found

    def values(self, column: Column) -> tuple[Literal, ...]:
        self.want("(")
        values: list[Literal] = []
        while not values or self.take(","):
            at = self.token
            value = self.operand()
            if isinstance(value, Column):
                raise self.error("want a number or a quoted text", at)
            self.same_kind(column, value, at)
            values.append(value)
        self.want(")")
        return tuple(values)

    def pattern(self, column: Column) -> str:
        if self.columns[column.name] != TEXT:
            raise self.error(f"'like' needs a text, {column.name} is {self.columns[column.name]}")
        if self.token.kind != "text":
            raise self.error("want a quoted pattern, such as '%H100%'")
        pattern = self.operand()
        assert isinstance(pattern, str)
        return pattern

    def operand(self) -> Column | Literal:
        token = self.token
        self.next += 1
        if token.kind == "number":
            return float(token.text)
        if token.kind == "text":
            quote = token.text[0]
            return token.text[1:-1].replace(quote * 2, quote)
        if token.keyword in ("true", "false"):
            return token.keyword == "true"
        if token.kind == "word" and token.text in self.columns:
            return Column(token.text)
        if token.kind == "word" and token.keyword not in _KEYWORDS:
            raise self.error(unknown_column(token.text, self.columns, self.view), token)
        raise self.error("want a column, a number or a quoted text", token)

    def same_kind(self, left: Column | Literal, right: Column | Literal, at: _Token) -> None:
        kinds = [self.kind(side) for side in (left, right)]
        if kinds[0] != kinds[1]:
            name = left.name if isinstance(left, Column) else repr(left)
            raise self.error(f"{name} is {kinds[0]}, this is {kinds[1]}", at)

    def kind(self, side: Column | Literal) -> str:
        if isinstance(side, Column):
            return self.columns[side.name]
        return TRUTH if isinstance(side, bool) else TEXT if isinstance(side, str) else NUMBER

    @property
    def token(self) -> _Token:
        return self.tokens[self.next]

    def take(self, keyword: str) -> bool:
        found = self.token.keyword == keyword
        self.next += found
        return found

    def want(self, keyword: str) -> None:
        if not self.take(keyword):
            raise self.error(f"want {keyword!r}")

    def error(self, reason: str, token: _Token | None = None) -> ValueError:
        token = token or self.token
        return ValueError(f"filter: at {token} (position {token.at + 1}): {reason}")


def _tokens(text: str) -> list[_Token]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"filter: not UTF-8 at position {error.start + 1}") from None
    found = []
    at = 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            start = at + len(text[at:]) - len(text[at:].lstrip())
            bad = text[start]
            reason = "this quote is not closed" if bad in "'\"" else "not part of a filter"
            raise ValueError(f"filter: at {bad!r} (position {start + 1}): {reason}")
        kind = str(match.lastgroup)
        found.append(_Token(kind, match[kind], match.start(kind)))
        if "\0" in match[kind]:
            raise ValueError(f"filter: a zero byte in the text at position {match.start(kind) + 1}")
        at = match.end()
    if not found:
        raise ValueError("filter: it is empty; write, for example, sink_mass > 0.5")
    if len(found) > _LONGEST:
        raise ValueError(f"filter: {len(found)} words and signs, at most {_LONGEST} are read")
    return [*found, _Token("end", "", end)]
