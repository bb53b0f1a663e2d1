"""Synchronisation of a compiled kernel, read from its PTX: what no interpreter of the source can see.

Every path through the code is followed, with what may have happened on it. The rules:

    release   a counter is added to with release at gpu scope (a relaxed add tells nothing about the data)
    stores    a CTA barrier lies between the last store to global memory and a release
    acquire   after polling a counter, an acquire is passed before data is read
    loads     a CTA barrier lies between an acquire and the next load of data
    pipeline  no asynchronous copy of data that others write is in flight where the kernel waits for them
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

RULES = {
    "release": "a counter is added to without release at gpu scope",
    "stores": "release without a CTA barrier after the store at line {}",
    "acquire": "data is read after the poll at line {} without an acquire",
    "loads": "data is read after the acquire at line {} without a CTA barrier",
    "pipeline": "wait while the asynchronous copy of line {} is in flight",
}
BARRIER = re.compile(r"(bar|barrier\.cta|barrier)\.sync\b")
RELEASE = re.compile(r"(atom|red|st)\.(?=[\w.]*\bgpu\b)[\w.]*\b(release|acq_rel)\b")
ADD = re.compile(r"(atom|red)\.[\w.]*\badd\b")
POLL = re.compile(r"ld\.(relaxed|volatile)\b|ld\.global\.gpu\.relaxed\b")
ACQUIRE = re.compile(r"(ld|atom)\.[\w.]*(acquire|acq_rel)\b|fence\.(acquire|acq_rel)\.gpu\b")
STORE = re.compile(r"st\.(weak\.)?global\b|(atom|red)\.global\.gpu\.relaxed\b")
LOAD = re.compile(r"ld\.global(?!\.gpu)\b|cp\.async\.c[ag]\b")
# Of Triton's pipeliner, which writes sizes in hexadecimal. Those of the weight stream (stream.py.j2) are constants'
# and are meant to be in flight over a wait.
COPY = re.compile(r"cp\.async\.c[ag]\b.*, 0x")
LANDED = re.compile(r"cp\.async\.wait_(all|group\s+0\b)")
BRANCH = re.compile(r"(@!?%?\w+\s+)?bra(?:\.uni)?\s+([\w$]+)")
TABLE = re.compile(r"brx\.idx[\w.]*\s+%\w+\s*,\s*([\w$]+)")
IGNORED = (".loc", ".file", ".version", ".target", ".address_size")
LABEL = re.compile(r"([\w$]+)\s*:(?!:)")


@dataclass(frozen=True)
class Fault:
    """A broken rule at a line of the PTX."""

    rule: str
    line: int
    text: str
    since: int

    def __str__(self) -> str:
        return f"line {self.line}: {RULES[self.rule].format(self.since)}: `{self.text}`"


@dataclass
class Statement:
    """One PTX instruction; `after` are the indices of those that may follow."""

    line: int
    text: str
    after: tuple[int, ...] = ()


# What may have happened on the way to a statement: kind of event -> line of its first occurrence.
State = dict[str, int]


def lint(ptx: str) -> list[Fault]:
    """Faults of the kernel in a PTX text, in order of lines; none: every path keeps every rule."""
    statements = parse(ptx)
    states: dict[int, State] = {0: {}}
    work, found = [0], dict[tuple[str, int], Fault]()
    while work:
        index = work.pop()
        statement = statements[index]
        after, faults = _step(statement, states[index])
        found |= {(f.rule, f.line): f for f in faults}
        for following in statement.after:
            known = states.get(following)
            if known is None or after.keys() - known.keys():
                states[following] = {**after, **(known or {})}
                work.append(following)
    return sorted(found.values(), key=lambda f: f.line)


def _step(statement: Statement, state: State) -> tuple[State, list[Fault]]:
    """What holds after a statement, and the rules it breaks."""
    text, line, after = statement.text, statement.line, dict(state)

    def broken(*rules: tuple[str, str]) -> list[Fault]:
        return [Fault(rule, line, text, state[event]) for rule, event in rules if event in state]

    if BARRIER.search(text):
        for event in ("stored", "acquired"):
            after.pop(event, None)
        return after, []
    if LANDED.search(text):
        after.pop("copying", None)
        return after, []
    if RELEASE.search(text):
        return after, broken(("stores", "stored"))
    if ADD.search(text) and ".global" in text:
        return after, [Fault("release", line, text, line)]
    if ACQUIRE.search(text):
        after.pop("polled", None)
        return after | {"acquired": line}, broken(("pipeline", "copying"))
    if POLL.search(text):
        return after | {"polled": line}, broken(("pipeline", "copying"))
    if STORE.search(text):
        return after | {"stored": line}, []
    faults = broken(("acquire", "polled"), ("loads", "acquired")) if LOAD.search(text) else []
    return (after | {"copying": line} if COPY.search(text) else after), faults


def parse(ptx: str) -> list[Statement]:
    """Statements of the kernels' code with their successors; labels are scoped by braces, as PTX scopes them."""
    statements: list[Statement] = []
    scopes: list[dict[str, int]] = [{}]
    jumps: list[tuple[int, str, list[dict[str, int]]]] = []
    tables: dict[str, list[str]] = {}
    table = ""
    for line, text in _pieces(ptx):
        if text == "{":
            scopes = [*scopes, {}]
        elif text == "}":
            scopes = scopes[:-1] or [{}]
        elif label := LABEL.fullmatch(text):
            scopes[-1][label[1]] = len(statements)
            table = label[1]
        elif text.startswith(".branchtargets"):
            tables[table] = re.findall(r"[\w$]+", text.removeprefix(".branchtargets"))
        elif not text.startswith("."):
            target = TABLE.search(text) or BRANCH.search(text)
            if target:
                jumps.append((len(statements), target[target.re.groups], scopes))
            statements.append(Statement(line, text))
    _link(statements, jumps, tables)
    return statements


def _link(
    statements: list[Statement], jumps: list[tuple[int, str, list[dict[str, int]]]], tables: dict[str, list[str]]
) -> None:
    for index, statement in enumerate(statements):
        ends = re.match(r"(ret|exit|trap|bra|brx)\b", statement.text)
        statement.after = () if ends or index + 1 == len(statements) else (index + 1,)
    for index, name, scopes in jumps:
        for label in tables.get(name, [name]):
            place = next((scope[label] for scope in reversed(scopes) if label in scope), None)
            if place is not None and place < len(statements):
                statements[index].after += (place,)


def _pieces(ptx: str) -> Iterator[tuple[int, str]]:
    """(line, piece): braces of blocks, `label:`, directives and instructions, without comments."""
    pending = ""
    for number, line in enumerate(ptx.splitlines(), 1):
        code = line.partition("//")[0].strip()
        if code.startswith(".section"):
            return  # debug sections follow the code
        if code in ("{", "}"):
            pending = ""  # the head of a kernel
            yield number, code
        elif code and not code.startswith(IGNORED):
            *whole, rest = f"{pending} {code}".split(";")
            for piece in whole:
                yield from ((number, p) for p in _unwrapped(piece.strip()))
            *opened, pending = list(_unwrapped(rest.strip())) or [""]
            if pending in ("{", "}") or LABEL.fullmatch(pending):
                opened, pending = [*opened, pending], ""
            yield from ((number, p) for p in opened)


def _unwrapped(piece: str) -> Iterator[str]:
    """Braces and labels before an instruction, then the instruction; operands in braces never come first."""
    while found := re.match(r"[{}]|[\w$]+\s*:(?!:)", piece):
        yield found[0]
        piece = piece[found.end() :].strip()
    if piece:
        yield piece
