"""Whose turn it is: places are given to clients so that each has had as many tokens as the others.

Clients form a tree (tenant, key, host, connection), and each level is fair among its members, so that a key with a
thousand connections has no more than a key with one, and a tenant with a thousand keys no more than one with one. Every
node counts the tokens it was given, by its weight; the next place goes to the waiting client with the fewest, and one
that comes anew starts level with the least served of those that are there, so that nobody saves up (the virtual token
counter of Sheng et al., "Fairness in Serving Large Language Models", 2024). One connection never holds the last places:
those are for who comes next, or a newcomer would wait for a whole completion.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
Client = tuple[str, ...]
# A client may hold at most so many times the places that it leaves free, which is three quarters of all if it is alone.
SHARE = 3
# A key that no client has: whoever stands under it has a place only where nobody else can take it.
LAST = "last"


@dataclass
class _Node(Generic[T]):
    """served: tokens given, divided by the weight. waiting, running: items below. items: of a leaf, with the tokens
    they are thought to take."""

    served: float = 0.0
    weight: float = 1.0
    waiting: int = 0
    running: int = 0
    children: "dict[str, _Node[T]]" = field(default_factory=dict)
    items: "OrderedDict[T, int]" = field(default_factory=OrderedDict)

    @property
    def active(self) -> bool:
        return bool(self.waiting or self.running)


class FairQueue(Generic[T]):
    """Items of clients, in order for each. Used on the event loop only."""

    def __init__(self, places: int, weight: Callable[[Client], float] = lambda client: 1.0) -> None:
        """places: items that may run at once. weight: of a client, or of the first parts of some; one of weight 2 is
        given twice the tokens of one of 1."""
        self._places, self._weight = places, weight
        self._root: _Node[T] = _Node()

    @property
    def waiting(self) -> int:
        return self._root.waiting

    @property
    def running(self) -> int:
        return self._root.running

    def push(self, client: Client, item: T, tokens: int) -> None:
        """Let `item` wait for a place. tokens: how many it will probably take."""
        node = self._root
        for depth, name in enumerate(client, 1):
            if name not in node.children:
                # It starts level with the client that was served least among those that are there.
                node.children[name] = _Node(min((child.served for child in node.children.values()), default=0.0))
            node = node.children[name]
            node.weight = self._weight(client[:depth])
        node.items[item] = tokens
        for step in self._path(client):
            step.waiting += 1

    def pop(self) -> tuple[Client, T] | None:
        """The item whose turn it is, which runs from now on; None if there is none or no place for it."""
        free = self._places - self._root.running
        client = self._next(self._root, (), free) if free > 0 else None
        if client is None:
            return None
        *above, leaf = self._path(client)
        item, tokens = leaf.items.popitem(last=False)
        for node in (*above, leaf):
            node.waiting -= 1
            node.running += 1
            node.served += tokens / node.weight
        return client, item

    def remove(self, client: Client, item: T) -> None:
        """`item`, which waits, is not wanted any more."""
        *above, leaf = self._path(client)
        del leaf.items[item]
        for node in (*above, leaf):
            node.waiting -= 1
        self._prune(client)

    def done(self, client: Client, thought: int, taken: int) -> None:
        """An item has run that was thought to take `thought` tokens and took `taken`."""
        for node in self._path(client):
            node.running -= 1
            node.served += (taken - thought) / node.weight
        self._prune(client)

    def _next(self, node: _Node[T], client: Client, free: int) -> Client | None:
        if not node.children:
            return client if node.waiting and node.running < SHARE * free else None
        for name, child in sorted(((name, child) for name, child in node.children.items() if child.waiting),
                                  key=lambda pair: (not client and pair[0] == LAST, pair[1].served)):
            found = self._next(child, (*client, name), free)
            if found is not None:
                return found
        return None

    def _path(self, client: Client) -> Iterator[_Node[T]]:
        node = self._root
        yield node
        for name in client:
            node = node.children[name]
            yield node

    def _prune(self, client: Client) -> None:
        """Clients that have nothing here are forgotten, so that the tree is no larger than what it holds."""
        path = list(self._path(client))
        for above, name, node in reversed(list(zip(path, client, path[1:], strict=False))):
            if not node.active:
                del above.children[name]
