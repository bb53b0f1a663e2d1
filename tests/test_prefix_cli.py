"""Prefix reuse on the command line: what `chat` reads again, and what it says about it."""

from __future__ import annotations

import re

from onelaunch.tests import small


def chat(*options: str) -> list[int]:
    """Reused tokens of each of two turns."""
    lines = f"{'tell me more ' * 8}\nand now?\n/exit\n"
    done = small.command("chat", small.artifact(), "--max-new-tokens", "8", "--json", "--stats", *options, text=lines)
    assert done.returncode == 0, done.stderr
    found = [int(count) for count in re.findall(r'"reused_tokens": (\d+)', done.stdout)]
    notes = [line for line in done.stderr.splitlines() if "prompt" in line and "tokens" in line]
    assert [f"({reused} reused)" in line for reused, line in zip(found, notes, strict=True)] == [n > 0 for n in found]
    return found


def test_a_conversation_is_read_once_unless_switched_off() -> None:
    first, second = chat()
    assert first == 0
    assert second >= 64
    assert second % 64 == 0
    assert chat("--no-prefix-cache") == [0, 0]
