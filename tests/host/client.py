"""Talk to a running ComfyUI: build a graph, run it over HTTP, hear what it says over its websocket.

    g = Graph()
    model = g.add("PixArtLoader", model_name="pixart_starter.safetensors")
    g.add("ProbeModelInfo", model=model[0])
    result = host.run(g)
    result.text("ProbeModelInfo")
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from prompt import Graph, Node, NodeError, Preview, Result, RunFailedError
from websockets.sync.client import connect

__all__ = ["Graph", "Host", "Job", "Node", "NodeError", "Preview", "Result", "RunFailedError"]

PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4


class Job:
    """A prompt that was accepted; `wait` returns its Result. One websocket each, so messages of
    different prompts never mix."""

    def __init__(self, host: Host, result: Result, socket: Any) -> None:
        self.host, self.result, self._socket = host, result, socket
        self._done = False

    def wait(self, timeout: float = 300) -> Result:
        """Reads messages until the host is done with the prompt; raises TimeoutError."""
        self._listen(time.monotonic() + timeout, until=lambda: self._done)
        self._socket.close()
        self._read_history()
        return self.result

    def wait_for(self, condition: Any, timeout: float = 60) -> Result:
        """Reads messages until `condition(result)` is true or the prompt is done."""
        self._listen(time.monotonic() + timeout,
                     until=lambda: self._done or condition(self.result))
        return self.result

    def _listen(self, deadline: float, until: Any) -> None:
        while not until():
            try:
                message = self._socket.recv(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                self.host.interrupt()
                raise TimeoutError(f"no end of prompt {self.result.prompt_id}; last messages: "
                                   f"{self.result.events[-3:]}") from None
            if isinstance(message, str):
                self._on_json(json.loads(message))
            else:
                self._on_binary(message)

    def _on_json(self, message: dict) -> None:
        kind, data = message["type"], message.get("data") or {}
        if data.get("prompt_id", self.result.prompt_id) != self.result.prompt_id:
            return
        self.result.events.append((kind, data))
        if kind == "executing":
            if data.get("node") is None:
                self._done = True
            else:
                self.result.executed.append(data["node"])
        elif kind == "progress":
            self.result.progress.append((str(data.get("node")), data["value"], data["max"]))

    def _on_binary(self, message: bytes) -> None:
        (kind,), body = struct.unpack(">I", message[:4]), message[4:]
        if kind == PREVIEW:
            self.result.previews.append(Preview("", _picture(body[4:])))
        elif kind in (TEXT, PREVIEW_WITH_METADATA):
            (length,) = struct.unpack(">I", body[:4])
            head, rest = body[4 : 4 + length], body[4 + length :]
            if kind == TEXT:
                self.result.progress_text.append((head.decode(), rest.decode()))
            else:
                self.result.previews.append(Preview(json.loads(head)["node_id"], _picture(rest)))

    def _read_history(self) -> None:
        result = self.result
        entry = self.host.get(f"/history/{result.prompt_id}")[result.prompt_id]
        result.outputs = entry["outputs"]
        result.status = entry["status"]["status_str"]
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_cached":
                result.cached = [n for n in data["nodes"] if n in result.prompt]
            elif kind == "execution_error":
                result.error = NodeError("execution", data["node_id"], data["node_type"],
                                         data["exception_type"], data["exception_message"].strip(),
                                         "".join(data["traceback"]))
            elif kind == "execution_interrupted":
                result.status = "interrupted"
                result.error = NodeError("interrupted", data["node_id"], data["node_type"],
                                         "interrupted", "the prompt was interrupted")


class Host:
    """A running ComfyUI at `url` whose files lie under `base` (its --base-directory)."""

    def __init__(self, url: str, base: Path, version: str = "") -> None:
        self.url, self.base, self.version = url.rstrip("/"), Path(base), version
        self.input_dir, self.output_dir = self.base / "input", self.base / "output"
        self.models_dir = self.base / "models"

    def request(self, path: str, body: Any = None, timeout: float = 60) -> tuple[int, bytes]:
        """Status and body of GET `path`, or of POST with `body` as JSON; HTTP errors included."""
        data = None if body is None else json.dumps(body).encode()
        return self._send(path, data, "application/json", timeout)

    def get(self, path: str, timeout: float = 60) -> Any:
        """The JSON answer of GET `path`; raises RuntimeError for any status but 200."""
        status, body = self.request(path, timeout=timeout)
        if status != 200:
            raise RuntimeError(f"GET {path} answered {status}: {body[:500]!r}")
        return json.loads(body)

    def _send(self, path: str, data: bytes | None, kind: str, timeout: float) -> tuple[int, bytes]:
        headers = {"Content-Type": kind} if data is not None else {}
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with _OPENER.open(request, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def alive(self) -> bool:
        try:
            return self.request("/system_stats", timeout=5)[0] == 200
        except OSError:
            return False

    def system_stats(self) -> dict:
        return self.get("/system_stats")

    def object_info(self, class_type: str | None = None) -> dict:
        """Definitions of all nodes, or of `class_type` alone; KeyError if the host lacks it."""
        if class_type is None:
            return self.get("/object_info")
        return self.get(f"/object_info/{urllib.parse.quote(class_type)}")[class_type]

    def queue(self) -> dict:
        """{"queue_running": [...], "queue_pending": [...]}"""
        return self.get("/queue")

    def clear_queue(self) -> None:
        self.request("/queue", {"clear": True})

    def interrupt(self) -> None:
        self.request("/interrupt", {})

    def free(self, unload_models: bool = True, free_memory: bool = True) -> None:
        """Asks the host to unload models and drop its node cache; it does so on its own thread,
        so look (ProbeMemory) with some patience."""
        self.request("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def submit(self, graph: Graph | Mapping[str, dict],
               extra: Mapping[str, Any] | None = None) -> Job:
        """Queues a prompt without waiting; raises RunFailedError when the host refuses it.

        `extra` is the prompt's extra_data, such as {"preview_method": "taesd"}.
        """
        prompt = dict(graph.prompt if isinstance(graph, Graph) else graph)
        result, client = Result(prompt), uuid.uuid4().hex
        socket = connect(f"ws{self.url[4:]}/ws?clientId={client}", max_size=None, max_queue=None,
                         proxy=None, open_timeout=30)
        try:
            flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            socket.send(json.dumps(flags))
            while json.loads(socket.recv(timeout=30))["type"] != "feature_flags":
                pass
            status, body = self.request("/prompt", {"prompt": prompt, "client_id": client,
                                                    "extra_data": dict(extra or {})})
            answer = json.loads(body)
        except BaseException:
            socket.close()
            raise
        result.node_errors = answer.get("node_errors") or {}
        if status != 200:
            socket.close()
            result.error = _validation_error(answer)
            raise RunFailedError(result)
        result.prompt_id = answer["prompt_id"]
        return Job(self, result, socket)

    def run(self, graph: Graph | Mapping[str, dict], timeout: float = 300,
            ok: bool = True, extra: Mapping[str, Any] | None = None) -> Result:
        """Runs a prompt to its end.

        With ok=True raises RunFailedError unless it succeeds. With ok=False the prompt must fail:
        the Result has `error`, and AssertionError is raised if it succeeded.
        """
        start = time.monotonic()
        try:
            result = self.submit(graph, extra).wait(timeout)
        except RunFailedError as refused:
            result = refused.result
        result.seconds = time.monotonic() - start
        if ok and result.status != "success":
            raise RunFailedError(result)
        if not ok and result.status == "success":
            raise AssertionError(f"the prompt was expected to fail, but it gave {result.outputs}")
        return result

    def picture(self, image: Mapping[str, str]) -> Image.Image:
        """Fetches one entry of Result.images through /view."""
        query = urllib.parse.urlencode({k: image[k] for k in ("filename", "subfolder", "type")})
        status, body = self.request(f"/view?{query}")
        if status != 200:
            raise RuntimeError(f"/view?{query} answered {status}")
        return _picture(body)

    def upload(self, picture: Image.Image, name: str) -> str:
        """Uploads a picture as PNG into the input folder; returns the name for LoadImage."""
        png, mark = io.BytesIO(), uuid.uuid4().hex
        picture.save(png, "PNG")
        disposition = f'form-data; name="image"; filename="{name}"'
        head = (f"--{mark}\r\nContent-Disposition: {disposition}\r\n"
                "Content-Type: image/png\r\n\r\n")
        tail = (f'\r\n--{mark}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\n'
                f"true\r\n--{mark}--\r\n")
        status, body = self._send("/upload/image", head.encode() + png.getvalue() + tail.encode(),
                                  f"multipart/form-data; boundary={mark}", 60)
        if status != 200:
            raise RuntimeError(f"/upload/image answered {status}: {body[:500]!r}")
        return json.loads(body)["name"]

    def add_model(self, folder: str, source: Path, name: str | None = None) -> str:
        """Links a weight file into models/`folder`; returns the name that loaders list it under."""
        target = self.models_dir / folder / (name or Path(source).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() or target.exists():
            target.unlink()
        try:
            os.symlink(Path(source).resolve(), target)
        except OSError:  # a Windows account without the right to make links
            shutil.copyfile(source, target)
        return target.relative_to(self.models_dir / folder).as_posix()

    def write_tensors(self, name: str, tensors: Mapping[str, Any]) -> str:
        """Writes {name: tensor} as safetensors into the input folder, for the probe nodes."""
        from safetensors.torch import save_file

        path = self.input_dir / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        return path.name

    def read_tensors(self, name: str) -> dict[str, Any]:
        """The tensors that a probe node saved under `name` in the output folder."""
        from safetensors.torch import load_file

        return load_file(self.output_dir / f"{name}.safetensors")


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


def _picture(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def _validation_error(answer: dict) -> NodeError:
    """The first node error of a refused prompt, else the error of the prompt as a whole."""
    for node, entry in (answer.get("node_errors") or {}).items():
        for error in entry["errors"]:
            message = f"{error['message']}: {error['details']}"
            return NodeError("validation", node, entry["class_type"], error["type"], message)
    error = answer["error"]
    return NodeError("validation", "", "", error["type"], f"{error['message']}: {error['details']}")
