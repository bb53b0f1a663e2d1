"""Which prompt prefixes are in the KV cache: a tree of pages of tokens.

A node is the 64 tokens of one page after the pages of its parent. A child is found by the hash of its tokens and
confirmed by comparing them, so a path from the root is a chain of content hashes, and yet never another prompt
that only hashes alike. A node names the page of each cache group that holds its keys and values, if one does.

Positions 0 .. 64n-1 need not be computed when the first n nodes have every page that later rows read: all n of
a group without a window, of a windowed one those its window still reaches back to from position 64n, and the first
where the group keeps sinks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.limits import PAGE_TOKENS

NONE = -1  # no page


@dataclass(eq=False)
class Node:
    """`pages[g]`: the page of cache group g that holds these tokens' keys and values, or NONE."""

    parent: Node | None
    tokens: bytes
    pages: list[int]
    children: dict[bytes, Node] = field(default_factory=dict)

    def child(self, tokens: bytes) -> Node:
        """The node after this one, made if it is new."""
        found = self.children.get(tokens)
        if found is None:
            found = self.children[tokens] = Node(self, tokens, [NONE] * len(self.pages))
        return found

    def forget(self, group: int) -> None:
        """One page is gone; so are nodes that lead to none."""
        self.pages[group] = NONE
        node = self
        while node.parent and not node.children and all(page == NONE for page in node.pages):
            if node.parent.children.get(node.tokens) is node:
                del node.parent.children[node.tokens]
            node = node.parent

    def path(self, keys: Sequence[bytes]) -> list[Node]:
        """The nodes of the longest known beginning of `keys`."""
        nodes, node = [], self
        for key in keys:
            found = node.children.get(key)
            if found is None:
                break
            nodes.append(found)
            node = found
        return nodes


def page_key(tokens: Sequence[int]) -> bytes:
    """The tokens of one page, as `Node.tokens`."""
    assert len(tokens) == PAGE_TOKENS, len(tokens)
    return array("i", tokens).tobytes()


def common_pages(a: Sequence[bytes], b: Sequence[bytes]) -> int:
    """How many first pages are the same."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
