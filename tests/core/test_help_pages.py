"""Every node has a help page, and the page speaks of each of the node's inputs and outputs.

The nodes are read as source, not imported: they need a host, their pages do not.
"""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = REPOSITORY / "web" / "docs"


def _called(node):
    """The dotted name of what a call calls: "io.Int.Input", "schema"; "" for anything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _keyword(call, name):
    return next((k.value for k in call.keywords if k.arg == name), None)


def _input_name(call):
    """The name in io.X.Input("name", ...), io.X.Output(display_name="name") or advanced(...)."""
    kind = _called(call)
    if kind == "advanced":
        return call.args[1].value
    if kind.endswith(".Output"):
        return _keyword(call, "display_name").value
    if kind.endswith(".Input") and call.args:
        return call.args[0].value
    return None


def read_nodes(source):
    """{node id: names of its inputs and outputs} of a module of nodes."""
    tree = ast.parse(source)
    # helpers such as _steps() that give one input to several nodes
    shared = {f"{function.name}": name for function in tree.body
              if isinstance(function, ast.FunctionDef) for call in ast.walk(function)
              if isinstance(call, ast.Call) and (name := _input_name(call))}
    nodes = {}
    for call in ast.walk(tree):
        if _called(call) == "schema":
            names = [_input_name(part) or shared.get(_called(part)) for part in ast.walk(call)
                     if isinstance(part, ast.Call)]
            nodes[_keyword(call, "node_id").value] = [name for name in names if name]
    return nodes


NODES = {node: names for path in sorted((REPOSITORY / "nodes").glob("*.py"))
         for node, names in read_nodes(path.read_text(encoding="utf-8")).items()}


def test_the_reader_finds_the_nodes_the_pack_lists():
    """Were the schemas written in a way this test cannot read, the others would check nothing."""
    listed = re.search(r"NODES[^=]*= \[(.*?)\]",
                       (REPOSITORY / "nodes" / "__init__.py").read_text(encoding="utf-8"), re.S)
    assert sorted(NODES) == sorted(re.findall(r"\w+", listed.group(1)))
    assert all(len(names) >= 2 for names in NODES.values())
    assert {"steps", "strength", "grid", "sampler", "sigmas"} == set(NODES["PixArtLCMSchedule"])


@pytest.mark.parametrize("node", sorted(NODES))
def test_every_input_and_output_is_in_the_tables(node):
    page = (PAGES / f"{node}.md").read_text(encoding="utf-8")
    rows = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    missing = [name for name in NODES[node] if f"`{name}`" not in rows]
    assert not missing, f"{node}.md has no table row for {missing}"


@pytest.mark.parametrize("node", sorted(NODES))
def test_a_page_has_the_usual_parts(node):
    page = (PAGES / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith("# PixArt ")
    headings = re.findall(r"^## (\w+)", page, re.M)
    assert [h.removesuffix("s") for h in headings] == ["Input", "Output", "When", "Example",
                                                       "Pitfall"]


def test_no_page_is_left_of_a_node_that_is_gone():
    assert {path.stem for path in PAGES.glob("*.md")} == set(NODES)
