"""A prompt in ComfyUI's API format, and all that a run of it leaves behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Node:
    """A node of a Graph. `node[i]` is its i-th output; the node itself stands for output 0."""

    id: str
    class_type: str

    def __getitem__(self, index: int) -> list:
        return [self.id, index]


class Graph:
    """A prompt in ComfyUI's API format, built node by node."""

    def __init__(self) -> None:
        self.prompt: dict[str, dict] = {}

    def add(self, class_type: str, /, **inputs: Any) -> Node:
        """Adds a node; a value may be a constant, a `node[i]` link or a Node (its output 0)."""
        node = Node(str(len(self.prompt) + 1), class_type)
        values = {k: v[0] if isinstance(v, Node) else v for k, v in inputs.items()}
        self.prompt[node.id] = {"class_type": class_type, "inputs": values}
        return node


@dataclass(frozen=True)
class NodeError:
    """Why a prompt failed. `kind` is "validation" (refused before it ran), "execution" or
    "interrupted"; `type` is the exception's class or the host's name for the validation error."""

    kind: str
    node: str
    node_type: str
    type: str
    message: str
    traceback: str = ""

    def __str__(self) -> str:
        where = f" in node {self.node} ({self.node_type})" if self.node else ""
        lines = [line for line in self.traceback.splitlines() if line.strip(" ^~")]
        return "\n".join([f"{self.kind}{where}: {self.type}: {self.message}", *lines[-12:]])


@dataclass(frozen=True)
class Preview:
    """A preview frame; `node` is "" where the host does not say whose it is."""

    node: str
    image: Image.Image


@dataclass
class Result:
    """All that one prompt left behind; `node` arguments take a Node, an id or a class name."""

    prompt: dict[str, dict]
    prompt_id: str = ""
    status: str = "invalid"  # or "success", "error", "interrupted"
    outputs: dict[str, dict] = field(default_factory=dict)  # node id -> its ui dict
    executed: list[str] = field(default_factory=list)  # node ids in the order they started
    cached: list[str] = field(default_factory=list)
    error: NodeError | None = None
    node_errors: dict[str, dict] = field(default_factory=dict)  # validation errors as the host sent
    progress: list[tuple[str, float, float]] = field(default_factory=list)  # node, value, max
    previews: list[Preview] = field(default_factory=list)
    progress_text: list[tuple[str, str]] = field(default_factory=list)  # node, text
    events: list[tuple[str, dict]] = field(default_factory=list)  # every JSON message
    seconds: float = 0.0

    def node_id(self, node: Node | str) -> str:
        if isinstance(node, Node):
            return node.id
        if node in self.prompt:
            return node
        found = [i for i, spec in self.prompt.items() if spec["class_type"] == node]
        if len(found) != 1:
            raise KeyError(f"{node!r} is {len(found)} nodes of this graph, one was expected")
        return found[0]

    def ui(self, node: Node | str) -> dict:
        """The ui dict of an output node, {} if it gave none."""
        return self.outputs.get(self.node_id(node), {})

    def text(self, node: Node | str) -> str:
        """The text that an output node shows."""
        return "".join(self.ui(node).get("text", ()))

    def json(self, node: Node | str) -> Any:
        """The JSON that a probe node reports."""
        return json.loads(self.text(node))

    def images(self, node: Node | str) -> list[dict]:
        """The saved or previewed pictures of a node, for Host.picture."""
        return list(self.ui(node).get("images", ()))

    def ran(self, node: Node | str) -> bool:
        return self.node_id(node) in self.executed

    def was_cached(self, node: Node | str) -> bool:
        return self.node_id(node) in self.cached


class RunFailedError(AssertionError):
    """A prompt that should have run did not; `result` has the details."""

    def __init__(self, result: Result) -> None:
        super().__init__(str(result.error))
        self.result = result
