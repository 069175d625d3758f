"""ComfyUI's web page as a user drives it: menu, template browser, Run button, help panel.

The page's own graph (`window.app`) is read where a canvas has nothing to point at.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PACK_NAME = "ComfyUI-PixArt-Delta"
PATIENCE = 60_000  # ms; a page on a busy machine
HOSTS_TEMPLATES = re.compile(r"/templates/index[^/]*\.json")
FALLBACKS = re.compile(r"/docs/\w+/\w+\.md|/userdata|/user\.css")  # 404 is an answer there

# what is on the canvas; positions without the title bar
_READ_GRAPH = """() => window.app.graph._nodes.map(node => ({
    id: String(node.id), type: node.type, title: node.title,
    known: node.type in window.LiteGraph.registered_node_types,
    marked: Boolean(node.has_errors),
    box: [...node.pos, ...node.size],
    pictures: (node.imgs ?? []).map(image => [image.src, image.naturalWidth]),
    choices: (node.widgets ?? []).filter(widget => Array.isArray(widget.options?.values))
        .map(widget => [widget.name, widget.value, widget.options.values]),
}))"""

# the pictures that nodes show and what the server says, in the order in which they come
_WATCH = """() => {
    const seen = window.seenByTest = [];
    const api = window.app.api;
    for (const kind of ["executing", "execution_success", "execution_error"])
        api.addEventListener(kind, event => seen.push([kind, event.detail]));
    const shown = new Set();
    const look = () => {
        if (window.seenByTest !== seen) return;
        for (const node of window.app.graph._nodes)
            for (const image of node.imgs ?? [])
                if (image.naturalWidth && !shown.has(image.src)) {
                    shown.add(image.src);
                    seen.push(["shown", [node.type, image.src]]);
                }
        setTimeout(look, 10);
    };
    look();
}"""


class ComfyPage:
    """A browser tab with ComfyUI in it. `errors` are the errors in its console."""

    def __init__(self, tab: Any, artefacts: Path) -> None:
        self.tab, self.artefacts = tab, artefacts
        self.errors: list[str] = []
        tab.set_default_timeout(PATIENCE)
        # the host's own templates, hundreds of cards that take ten seconds to draw, are left out
        tab.route(HOSTS_TEMPLATES, lambda route: route.fulfill(json=[]))
        tab.on("console", self._on_console)
        tab.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack or ''}"))

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def load(self, url: str) -> None:
        """Goes to the page and waits until it is ready for a user."""
        self.tab.goto(url)
        self._menu().wait_for()
        self.tab.wait_for_function("window.app?.extensionManager?.workflow?.activeWorkflow")
        self.settle()

    def _menu(self) -> Any:
        return self.tab.locator(".comfy-menu-button-wrapper, .comfyui-logo-wrapper").first

    def browse_templates(self) -> Any:
        """Opens the template browser at this pack, unless it is open; the dialog's Locator."""
        dialog = self.tab.get_by_role("dialog")
        if not dialog.is_visible():
            self._menu().click()
            self.tab.get_by_role("menuitem", name="Browse Templates").click()
        dialog.get_by_text(PACK_NAME, exact=True).first.click()
        self.card("").first.wait_for()
        return dialog

    def card(self, template: str) -> Any:
        """A template in the template browser; "" for all of them."""
        if not template:
            return self.tab.locator("[data-testid^='template-workflow-']")
        return self.tab.get_by_test_id(f"template-workflow-{template}")

    def thumbnail_width(self, template: str) -> int:
        """The width of a template's thumbnail in pixels. The page loads those in view only."""
        return self.tab.wait_for_function("""id => {
            const card = document.querySelector(`[data-testid="${id}"]`);
            card.scrollIntoView({block: "center"});
            return card.querySelector("img")?.naturalWidth;
        }""", arg=f"template-workflow-{template}", polling=100).json_value()

    def open_template(self, name: str) -> None:
        """Opens a template as a user does, and waits until its graph is there."""
        dialog = self.browse_templates()
        self.tab.evaluate(
            "window.leftByTest = window.app.extensionManager.workflow.activeWorkflow?.path")
        self.card(name).click()
        dialog.wait_for(state="detached")
        self.tab.wait_for_function("""name => {
            const {path, filename} = window.app.extensionManager.workflow.activeWorkflow;
            return path !== window.leftByTest && filename.startsWith(name);
        }""", arg=name)  # "name (2)" when it is open already
        self.settle()

    def settle(self) -> None:
        """Waits until the canvas was drawn again."""
        self.tab.evaluate("""async () => {
            window.app.canvas.setDirty(true, true);
            for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
        }""")

    def nodes(self) -> list[dict]:
        """Every node on the canvas: id, type, title, known, marked, box (x, y, width, height),
        pictures (address, width), choices (widget, value, what can be chosen)."""
        return self.tab.evaluate(_READ_GRAPH)

    def text_shows(self) -> bool:
        """Whether the canvas draws text; the page leaves it out where it would be too small."""
        return not self.tab.evaluate("window.app.canvas.low_quality")

    def unseen_of_the_note(self) -> list[int]:
        """Looked at in full size: by how many pixels each box of the note's text scrolls."""
        return self.tab.evaluate("""async () => {
            const {graph, canvas} = window.app;
            const frame = () => new Promise(requestAnimationFrame);
            const [note, ...others] = graph._nodes.filter(node => node.type === "MarkdownNote");
            if (!note || others.length) return [];
            canvas.ds.scale = 1;
            canvas.centerOnNode(note);
            canvas.setDirty(true, true);
            for (let i = 0; i < 5; i++) await frame();
            return [...document.querySelectorAll(".comfy-markdown, .tiptap")]
                .filter(e => e.offsetParent && e.clientHeight)
                .map(e => e.scrollHeight - e.clientHeight);
        }""")

    def prompt(self) -> dict[str, dict]:
        """What Run would send to the server."""
        return self.tab.evaluate("async () => (await window.app.graphToPrompt()).output")

    def run(self) -> list[list]:
        """Presses Run and waits for the end: what was seen, in order, as [kind, detail].

        "executing" (id of a node, None at the end), "shown" ([type of a node, address of the
        picture that it shows]), "execution_success" or "execution_error".
        """
        self.tab.evaluate(_WATCH)
        self.tab.get_by_role("button", name="Run", exact=True).first.click()
        self.tab.wait_for_function(
            "window.seenByTest.some(([kind]) => kind.startsWith('execution_'))",
            timeout=3 * PATIENCE)
        return self.seen()

    def seen(self) -> list[list]:
        return self.tab.evaluate("window.seenByTest")

    def wait_for_picture(self, node_type: str) -> None:
        """Waits until a node of this type shows a picture of the server's output or temp folder."""
        self.tab.wait_for_function(
            """type => window.app.graph._nodes.some(node => node.type === type
                && node.imgs?.some(i => i.naturalWidth && i.src.includes("/view?")))""",
            arg=node_type)
        self.settle()

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        """Sets a widget of every node of this type."""
        self.tab.evaluate("""([type, name, value]) => window.app.graph._nodes
            .filter(node => node.type === type)
            .forEach(node => node.widgets.find(w => w.name === name).value = value)""",
            [node_type, name, value])

    def add_node(self, node_type: str) -> dict[str, Any]:
        """Puts a new node alone on the canvas and selects it: its widgets' values by name."""
        values = self.tab.evaluate("""type => {
            const {graph, canvas} = window.app;
            for (const old of [...graph._nodes]) graph.remove(old);
            const node = window.LiteGraph.createNode(type);
            graph.add(node);
            canvas.deselectAll();
            canvas.centerOnNode(node);
            canvas.selectNode(node);
            return Object.fromEntries((node.widgets ?? []).map(w => [w.name, w.value]));
        }""", node_type)
        self.settle()
        return values

    def help_of(self, node_type: str) -> Any:
        """Adds a new node and presses its info button; the help text's Locator."""
        self.add_node(node_type)
        self.tab.get_by_test_id("info-button").click()
        return self.tab.locator(".markdown-content, .node-help-content").first

    def complaints(self) -> list[str]:
        """Texts of dialogs, error toasts and error overlays on the page."""
        places = self.tab.locator("[role=dialog], .p-toast-message-error, "
                                  "[data-testid='error-overlay']")
        return [place.inner_text() for place in places.all() if place.is_visible()]

    def our_errors(self) -> list[str]:
        """Errors in the console that speak of this pack or its nodes."""
        return [error for error in self.errors
                if re.search("pixart", error, re.I) and not FALLBACKS.search(error)]

    def screenshot(self, name: str) -> Path:
        path = self.artefacts / (re.sub(r"[^\w -]", "_", name) + ".png")
        self.tab.screenshot(path=path)
        return path
