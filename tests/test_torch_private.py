"""One module of the package reaches private parts of torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "aajr_kernels"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
#: where they may stand; the second overrides private methods of its base classes, the third imports nothing of ours
OWNERS = ("torch_private.py", "integrations/distributed/styles.py", "testing/oracle.py")
#: attributes of other things than torch's modules by which torch is reached all the same
MARKS = ("_dynamo", "_functorch", "_inductor", "_torchdynamo", "_disabled_torch_")


def _private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted name, of everything that is imported from torch."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    names[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").split(".")[0] == "torch"
        ):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _root(node: ast.AST) -> str:
    """The name that a chain of attributes starts with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_names(source: str) -> Iterator[str]:
    """Private names of torch in a source: in imports, attributes, and attributes by string."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (n.name for n in node.names if n.name.startswith("torch.") and _private(n.name))
        if isinstance(node, ast.Attribute) and node.attr.startswith(MARKS):
            yield node.attr
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(MARKS):
            yield node.value
        if isinstance(node, ast.Constant) and re.fullmatch(r"torch(\.\w+)+", str(node.value)):
            yield from [str(node.value)] if _private(str(node.value)) else []
        if isinstance(node, ast.Attribute) and _private(node.attr) and _root(node) in aliases:
            yield ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            owner, name = node.args[0], node.args[1]
            if _root(owner) in aliases and isinstance(name, ast.Constant) and _private(str(name.value)):
                yield f"{ast.unparse(owner)}.{name.value}"
    yield from (name for name in aliases.values() if _private(name))


@pytest.mark.parametrize("module", [m for m in MODULES if m not in OWNERS])
def test_no_other_module_reaches_private_parts_of_torch(module: str) -> None:
    names = sorted(set(private_names((PACKAGE / module).read_text())))
    assert not names, f"{module} names {', '.join(names)}: give it a place in torch_private.py"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nimport torch._functorch.utils",
        "import torch.utils._pytree as pytree",
        "from torch.utils import _pytree",
        "from torch._higher_order_ops import flex",
        "import torch\ntorch._C._nn",
        "import torch\nx = lambda: torch._dynamo.config",
        "import torch\ngetattr(torch, '_grouped_mm', None)",
        "from torch import nn\nnn.modules._functions",
        "def f(g):\n    g._dynamo_marked_constant = True",
        "name = 'torch.distributed.tensor._api._FromTorchTensor'",
    ],
)
def test_the_reader_sees_private_names(source: str) -> None:
    assert list(private_names(source))


def test_the_reader_leaves_public_names() -> None:
    source = (
        "import torch\nfrom torch import nn\ntorch.__version__, nn.Module.__call__, getattr(torch, 'add')"
    )
    assert not list(private_names(source))
