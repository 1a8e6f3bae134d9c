"""What hangs together: items that share a key, also through others."""

from collections.abc import Hashable, Iterable, Sequence


def connected(keys: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """`keys`: of each item. -> the connected components, each as the places of its items in their order."""
    parent: dict[tuple[str, Hashable], tuple[str, Hashable]] = {}

    def root(node: tuple[str, Hashable]) -> tuple[str, Hashable]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for at, own in enumerate(keys):
        for key in own:
            parent[root(("key", key))] = root(("item", at))
    found: dict[tuple[str, Hashable], list[int]] = {}
    for at in range(len(keys)):
        found.setdefault(root(("item", at)), []).append(at)
    return list(found.values())
