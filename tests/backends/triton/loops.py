"""Loops of a disassembled kernel, and how often instructions occur in them.

The basic blocks, their successors, their dominators, and the natural loop of every branch back to a dominator. Text
order is not enough: waits are moved to the end of a kernel and jump back into the middle of a loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """How one assembly language writes labels, instructions, jumps and ends.

    Attributes:
        label: a line that starts a block, with the label's name.
        instruction: a line holding one, with its text.
        target: every label an instruction names.
        jump: never reaches the next line.
    """

    label: re.Pattern[str]
    instruction: re.Pattern[str]
    target: re.Pattern[str]
    jump: re.Pattern[str]


SASS = Dialect(
    label=re.compile(r"^(\.L_x_\w+|\$?[\w.$]+):"),
    instruction=re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(\S.*?)\s*;"),
    target=re.compile(r"`\((\.L_x_\w+)\)"),
    # with a predicate in front, as an operand, or where threads differ (DIV) the next line may follow
    jump=re.compile(r"^(BRA|BRX|JMP|EXIT|RET)\b(?!\.DIV|.*(\bU?P\d|!U?P))"),
)
AMDGCN = Dialect(
    label=re.compile(r"^(\.LBB\w+|\w+):"),
    instruction=re.compile(r"^\s+([a-z]\w+_\w+(?:\s.*?)?)\s*(?:;.*)?$"),
    target=re.compile(r"(\.LBB\w+)"),
    jump=re.compile(r"^(s_branch|s_endpgm|s_setpc_b64)\b"),
)


@dataclass
class Block:
    instructions: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    after: set[int] = field(default_factory=set)


def blocks(text: str, dialect: Dialect) -> list[Block]:
    """The basic blocks in the order of the text, the entry first."""
    graph = [Block()]
    for line in text.splitlines():
        if label := dialect.label.match(line):
            if graph[-1].instructions:
                graph.append(Block())
            graph[-1].labels.append(label[1])
        elif instruction := dialect.instruction.match(line):
            graph[-1].instructions.append(instruction[1])
            if dialect.target.search(line) or dialect.jump.match(instruction[1]):
                graph.append(Block())
    where = {label: i for i, block in enumerate(graph) for label in block.labels}
    for i, block in enumerate(graph):
        last = block.instructions[-1] if block.instructions else ""
        block.after = {where[name] for name in dialect.target.findall(last) if name in where}
        if i + 1 < len(graph) and not dialect.jump.match(last):
            block.after.add(i + 1)
    return graph


def _dominators(graph: list[Block]) -> list[int]:
    """For each block the set of its dominators, as bits; all bits where the entry does not lead."""
    before: list[list[int]] = [[] for _ in graph]
    for i, block in enumerate(graph):
        for j in block.after:
            before[j].append(i)
    everything = (1 << len(graph)) - 1
    dominators = [1] + [everything] * (len(graph) - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(graph)):
            common = everything
            for j in before[i]:
                common &= dominators[j]
            changed |= dominators[i] != common | 1 << i
            dominators[i] = common | 1 << i
    return dominators


def loops(graph: list[Block]) -> list[frozenset[int]]:
    """The natural loops, as sets of blocks; those of one header are one loop."""
    dominators = _dominators(graph)
    before: list[list[int]] = [[] for _ in graph]
    for i, block in enumerate(graph):
        for j in block.after:
            before[j].append(i)
    members_of: dict[int, set[int]] = {}
    reachable = (1 << len(graph)) - 1
    for i, block in enumerate(graph):
        for header in block.after:
            if dominators[i] == reachable or not dominators[i] >> header & 1:
                continue
            members, stack = members_of.setdefault(header, {header}), [i]
            while stack:
                j = stack.pop()
                if j not in members:
                    members.add(j)
                    stack.extend(before[j])
    return [frozenset(members) for members in members_of.values()]


def hot(graph: list[Block], holds: Callable[[str], bool]) -> Iterator[str]:
    """Instructions of the innermost loops that hold a wanted instruction; of every loop where none does."""
    every = loops(graph)
    holding = [
        loop for loop in every if any(holds(text) for block in loop for text in graph[block].instructions)
    ]
    innermost = [loop for loop in holding if not any(other < loop for other in holding)] or every
    for i in sorted(frozenset().union(*innermost)):
        yield from graph[i].instructions
