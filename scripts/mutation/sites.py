"""Places where one edit makes a fault of a known kind: `Site`, and where they are in Python and in C++ sources."""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Site", "sites_of"]


@dataclass(frozen=True)
class Site:
    """One edit.

    Attributes:
        path: of the source, from the root of the repository.
        line, column: of the edit's first byte, from 1 and from 0.
        kind: of the fault.
        start, end: the bytes that are replaced.
        before, after: what stands there, and what is put there.
        context: the line as it is, and the number of the edit among those of the file that read the same.
    """

    path: str
    line: int
    column: int
    kind: str
    start: int
    end: int
    before: str
    after: str
    context: tuple[str, int]

    @property
    def name(self) -> str:
        """Of the fault by file, kind and text, which edits elsewhere in the file leave as it is."""
        shorten = lambda text: re.sub(r"\s+", " ", text).strip()
        line, number = self.context
        order = f" #{number}" if number > 1 else ""
        return f"{self.path}: {self.kind}{order}: {shorten(self.before)} -> {shorten(self.after)} in: {line}"

    def put(self, root: Path) -> str:
        """The source at `root` with the fault."""
        source = (root / self.path).read_bytes()
        assert source[self.start : self.end].decode() == self.before, f"{self.path} is another one"
        return (source[: self.start] + self.after.encode() + source[self.end :]).decode()

    def function(self, root: Path) -> int:
        """First line of the innermost Python function around the fault, as its code object has it; 0: none."""
        first = 0
        for node in ast.walk(ast.parse((root / self.path).read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
                continue
            body = [node.body] if isinstance(node, ast.Lambda) else node.body
            start, end = (body[0].lineno, body[0].col_offset), (body[-1].end_lineno, body[-1].end_col_offset)
            if start <= (self.line, self.column) < end:  # walks from outside to inside
                decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
                first = min(part.lineno for part in (node, *decorators))
        return first


def sites_of(root: Path, path: str) -> list[Site]:
    """All sites of a source."""
    source = (root / path).read_bytes()
    edits = _python if path.endswith(".py") else _cpp
    seen: Counter[tuple[str, ...]] = Counter()
    sites = []
    for kind, start, end, after in dict.fromkeys(edits(source)):
        before = source[start:end].decode()
        line = source[source.rfind(b"\n", 0, start) + 1 :].split(b"\n", 1)[0].decode().strip()
        seen[kind, before, after, line] += 1
        context = (line, seen[kind, before, after, line])
        place = (source.count(b"\n", 0, start) + 1, start - source.rfind(b"\n", 0, start) - 1)
        sites.append(Site(path, *place, kind, start, end, before, after, context))
    return sites


#: kind, first and last byte, what is put there
_Edit = tuple[str, int, int, str]

# -- Python -----------------------------------------------------------------------------------------------------------

_EDGES = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_EMPTY = {"zeros": "empty", "new_zeros": "new_empty", "zeros_like": "empty_like"}
#: parts of names of functions that put a random state back, write, or add up over processes
_CALLS = {
    "random state": ("restore", "seed", "replay", "manual"),
    "lost row": ("write", "append", "record", "save", "extend"),
    "wrong count": ("all_reduce", "settle"),
    "stale buffer": ("zero_", "fill_", "clear"),
}


def _python(source: bytes) -> Iterator[_Edit]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return (
            starts[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            starts[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def text(node: ast.AST) -> str:
        start, end = span(node)
        return source[start:end].decode()

    for node in _computing(ast.parse(source)):
        for kind, replaced, after in _faults(node, text):
            yield kind, *span(replaced), after


def _computing(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that take part in a computation: no annotations, messages of errors, or text."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _computing(child)


def _faults(node: ast.AST, text: Callable[[ast.AST], str]) -> Iterator[tuple[str, ast.AST, str]]:
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub(), right) if _is_number(left) and _is_number(right):
            yield "dropped term", node, text(left)
        case ast.BinOp(left, ast.Mult() | ast.Div(), right) if _is_number(left) and _is_number(right):
            yield "dropped factor", node, text(left)
        case ast.Compare(left, [operator], [right]) if type(operator) in _EDGES:
            yield "edge", node, f"{text(left)} {_EDGES[type(operator)]} {text(right)}"
        case ast.If(test) if not _is_guard(node):
            yield "branch", test, f"not ({text(test)})"
        case ast.IfExp(test):
            yield "branch", test, f"(not ({text(test)}))"
        case ast.BoolOp(operator, [first, *rest]):
            word = " or " if isinstance(operator, ast.And) else " and "
            yield "branch", node, f"({word.join(f'({text(value)})' for value in (first, *rest))})"
        case ast.AugAssign(target, ast.Add() | ast.Sub(), value):
            yield "overwritten sum", node, f"{text(target)} = {text(value)}"
        case ast.UnaryOp(ast.USub(), operand) if not isinstance(operand, ast.Constant):
            yield "sign", node, text(operand)
        case ast.Call(ast.Attribute(owner, "detach"), [], []):
            yield "graph", node, text(owner)
        case ast.Expr(ast.Call(function)):
            name = text(function).rsplit(".", 1)[-1]
            for kind, parts in _CALLS.items():
                if any(part in name for part in parts):
                    yield kind, node, "pass"
    match node:
        case ast.Call(function, arguments, keywords):
            name = text(function).rsplit(".", 1)[-1]
            if name in _EMPTY and not text(function).startswith("tl."):  # Triton has no memory as it was
                yield "stale buffer", function, text(function)[: -len(name)] + _EMPTY[name]
            for first, second in itertools.pairwise(arguments):
                if "stride" in text(first) and "stride" in text(second):
                    pair = ast.copy_location(ast.Tuple([first, second], ast.Load()), first)
                    pair.end_lineno, pair.end_col_offset = second.end_lineno, second.end_col_offset
                    yield "swapped stride", pair, f"{text(second)}, {text(first)}"
            for argument in arguments:
                if isinstance(argument, ast.UnaryOp) and text(argument) == "-1" and name != "reshape":
                    yield "wrong axis", argument, "-2"
            for keyword in keywords:
                if keyword.arg == "generator":
                    yield "random state", keyword.value, "None"


def _is_number(node: ast.AST) -> bool:
    """Whether an operand may be a number or a tensor: no text, no list."""
    return not any(
        isinstance(part, (ast.JoinedStr, ast.List, ast.Tuple, ast.Dict, ast.ListComp))
        or (isinstance(part, ast.Constant) and isinstance(part.value, str))
        for part in ([node] if not isinstance(node, ast.BinOp) else [node.left, node.right])
    )


def _is_guard(node: ast.If) -> bool:
    """Whether a branch does nothing but raise: removing it takes a message, not a value."""
    return len(node.body) == 1 and isinstance(node.body[0], ast.Raise)


# -- C++ --------------------------------------------------------------------------------------------------------------

_OPERAND = r"[\w.\[\]]+(?:\([^()]*\))?"
_STRIDE = r"[\w.]*(?:stride|stack|rows)\w*"
_CPP: list[tuple[str, str, Callable[[re.Match[str]], str]]] = [
    ("overwritten sum", r"(?<=[\w\])]) \+= ", lambda _: " = "),
    ("sign", r"(?<=[\w\])]) -= ", lambda _: " += "),
    ("sign", r"(?<=[\w\])]) - (?=[\w(])", lambda _: " + "),
    ("dropped term", rf"(?<=[\w\])]) \+ {_OPERAND}", lambda _: ""),
    ("dropped factor", rf"(?<=[\w\])]) [*/] {_OPERAND}", lambda _: ""),
    ("edge", r"(?<=[\w\])]) < (?=[\w(])", lambda _: " <= "),
    ("edge", r"(?<=[\w\])]) <= (?=[\w(])", lambda _: " < "),
    ("edge", r"(?<=[\w\])]) >= (?=[\w(])", lambda _: " > "),
    ("branch", r"\bif \((?=[\w!])", lambda _: "if (!"),
    ("branch", r" && ", lambda _: " || "),
    ("swapped stride", rf"({_STRIDE}), ({_STRIDE})", lambda m: f"{m[2]}, {m[1]}"),
    ("stale buffer", r"std::(?:fill|fill_n|memset)\([^;]*\);", lambda _: ";"),
    ("stale buffer", r" = 0\.0f;", lambda _: " = 1.0f;"),
]


def _cpp(source: bytes) -> Iterator[_Edit]:
    start = 0
    for line in source.splitlines(keepends=True):
        code = line.decode().split("//")[0]
        # declarations, preprocessor and the text of errors hold no arithmetic
        if not re.match(
            r"\s*(#|template|using|static_assert|struct|namespace|\*|throw|[\w:<>]+ \w+(, \w+)*;)", code
        ):
            for kind, pattern, put in _CPP:
                for match in re.finditer(pattern, code):
                    first, last = (len(code[:at].encode()) for at in match.span())
                    yield kind, start + first, start + last, put(match)
        start += len(line)
