"""Print and parse a Schedule: `parse_schedule(show_schedule(s)) == s`.

The text is the program (as `ir/text.py` prints it) and then the schedule, one task to a line:

    schedule few workers 2 {
      limits rows=8 slots=1 context=64 outputs=1 few_rows=4 kv_dtype=f32
      buffer /x at 0 size 4096 row 256 holds /x, decoder/x1
      section decoder {
        event up target 2
        end up
        worker 0 {
          head up 0+1152
          run up pack.q8 0:live wait ^
          run up y 0:1 signal up prefetch down 0+1152
        }

`first:last[:step]`; `live` means as many tiles as the step turns out to have. Whether an edited schedule is
still right is for `ir/validate` to say.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from lark import Lark, Token, Tree

from .errors import CompileError, Span, UsageError, nearest
from .graph import Program
from .limits import Limits
from .schedule import BUCKETS, LIVE, Buffer, Prefetch, Schedule, Section, Task
from .text import parse_program, parse_tree, show, span_of
from .tuning import CHOICES, Tuning


def show_schedule(schedule: Schedule) -> str:
    """The text of a schedule and its program."""
    limits = " ".join(f"{k}={v}" for k, v in schedule.limits.as_dict().items())
    lines = [f"schedule {schedule.bucket} workers {schedule.workers} {{", f"  limits {limits}"]
    if chosen := [f"{k}={v}" for k, v in schedule.tuning.values if " " not in k]:
        lines.append(f"  choices {' '.join(chosen)}")
    lines += [_show_buffer(b) for b in schedule.buffers]
    for section in schedule.sections:
        lines += _show_section(section)
    return show(schedule.program) + "\n" + "\n".join([*lines, "}", ""])


def _show_buffer(b: Buffer) -> str:
    private = " private" if b.private else ""
    holds = ", ".join(b.values)
    return f"  buffer {b.name} at {b.offset} size {b.size} row {b.row_bytes}{private} holds {holds}"


def _show_section(section: Section) -> list[str]:
    lines = [f"  section {section.name} {{", *(f"    event {n} target {t}" for n, t in section.events)]
    lines.append(f"    end {section.end or 'none'}")
    for w, queue in enumerate(section.queues):
        lines.append(f"    worker {w} {{")
        if section.heads:
            lines.append(f"      head {_show_read(section.heads[w])}")
        lines += [f"      {show_task(task)}" for task in queue]
        lines.append("    }")
    return [*lines, "  }"]


def show_task(task: Task) -> str:
    """One task as a line of the text."""
    tiles = f"{task.first}:{'live' if task.is_drain else task.last}" + (f":{task.step}" if task.step != 1 else "")
    words = [f"run {task.phase} {task.body} {tiles}"]
    if task.waits:
        words.append(f"wait {', '.join(task.waits)}")
    if task.signal:
        words.append(f"signal {task.signal}")
    if task.prefetch:
        words.append(f"prefetch {_show_read(task.prefetch)}")
    return " ".join(words)


def _show_read(read: Prefetch | None) -> str:
    return f"{read.weight} {read.offset}+{read.size}" if read else "none"


def parse_schedule(text: str, file: str = "<text>") -> Schedule:
    """Read back what `show_schedule` printed, or an edited copy. Raises CompileError with the place."""
    found = re.search(r"^schedule\b", text, re.MULTILINE)
    if found is None:
        raise CompileError(
            "expected a program and then `schedule ..`, got no schedule",
            place=file,
            hint="a file that holds only a program is one of an earlier pass",
        )
    program = parse_program(text[: found.start()], file)
    # Blank lines in place of the program keep the line numbers of errors right.
    rest = "\n" * text[: found.start()].count("\n") + text[found.start() :]
    tree = parse_tree(_parser(), rest, file)
    return _Reader(rest, file).schedule(tree, program)


@cache
def _parser() -> Lark:
    return Lark(Path(__file__).with_name("schedule.lark").read_text(), parser="lalr", propagate_positions=True)


def _trees(items: Any, rule: str) -> list[Any]:
    return [t for t in items if isinstance(t, Tree) and t.data == rule]


class _Reader:
    """Turns a parse tree into a Schedule; keeps the text for error places."""

    def __init__(self, text: str, file: str) -> None:
        self.text, self.file = text, file

    def span(self, token: Any) -> Span:
        return span_of(self.text, self.file, token)

    def schedule(self, tree: Tree[Token], program: Program) -> Schedule:
        bucket, workers, limits, choices, *items = tree.children
        self.known(bucket, BUCKETS)
        sections = tuple(self.section(t, int(workers), program) for t in _trees(items, "section"))  # type: ignore[arg-type]
        buffers = tuple(self.buffer(t) for t in _trees(items, "buffer"))
        made, tuning = self.limits(limits), self.choices(choices)
        return Schedule(program, made, str(bucket), int(workers), sections, buffers, tuning)  # type: ignore[arg-type]

    def choices(self, tree: Any) -> Tuning:
        if tree is None:
            return Tuning()
        names, values = tree.children[::2], tree.children[1::2]
        for name in names:
            self.known(name, CHOICES)
        try:
            return Tuning.of({str(n): int(v) for n, v in zip(names, values, strict=True)})
        except UsageError as error:
            raise CompileError(error.reasons, span=self.span(names[0])) from None

    def known(self, token: Any, words: Any) -> None:
        if str(token) not in words:
            raise CompileError(
                f"expected one of {', '.join(words)}, got `{token}`",
                span=self.span(token),
                hint=nearest(str(token), words),
            )

    def limits(self, tree: Any) -> Limits:
        names, values = tree.children[::2], tree.children[1::2]
        fields = Limits().as_dict()
        given: dict[str, Any] = {}
        for name, value in zip(names, values, strict=True):
            self.known(name, fields)
            if isinstance(fields[str(name)], int) != (value.type == "INT"):
                raise CompileError(f"limits: unexpected {name} `{value}`", span=self.span(value))
            given[str(name)] = int(value) if value.type == "INT" else str(value)
        try:
            return Limits(**given)
        except CompileError as error:
            raise error.at(self.span(names[0]) if names else None) from None

    def buffer(self, tree: Any) -> Buffer:
        name, offset, size, row, private, *values = tree.children
        return Buffer(str(name), tuple(map(str, values)), int(row), int(size), int(offset), private is not None)

    def section(self, tree: Any, workers: int, program: Program) -> Section:
        name = tree.children[0]
        self.known(name, [g.name for g in program.graphs])
        events = tuple((str(t.children[0]), int(t.children[1])) for t in _trees(tree.children, "event"))
        end = next(t for t in tree.children[1:] if isinstance(t, Token))
        found = _trees(tree.children, "worker")
        if [int(t.children[0]) for t in found] != list(range(workers)):
            listed = ", ".join(str(t.children[0]) for t in found)
            raise CompileError(
                f"section `{name}`: expected workers 0 to {workers - 1} in order, got {listed or 'none'}",
                span=self.span(name),
            )
        heads = [t.children[1] for t in found]
        if any(heads) and not all(heads):
            raise CompileError(f"section `{name}`: expected a head for every worker or for none", span=self.span(name))
        queues = tuple(tuple(self.task(t) for t in w.children[2:]) for w in found)
        last = "" if end.type == "NONE" else str(end)
        return Section(str(name), events, last, queues, tuple(self.head(h) for h in heads if h))

    def head(self, tree: Any) -> Prefetch | None:
        inner = tree.children[0]
        return None if isinstance(inner, Token) else self.read(inner)

    def read(self, tree: Any) -> Prefetch:
        weight, offset, size = tree.children
        return Prefetch(str(weight), int(offset), int(size))

    def task(self, tree: Any) -> Task:
        phase, body, tiles, waits, signal, prefetch = tree.children
        first, last, step = tiles.children
        end = LIVE if last.type == "LIVE" else int(last)
        return Task(
            str(phase),
            str(body),
            int(first),
            end,
            int(step or 1),
            tuple(map(str, waits.children)) if waits else (),
            str(signal.children[0]) if signal else "",
            self.read(prefetch.children[0]) if prefetch else None,
        )
