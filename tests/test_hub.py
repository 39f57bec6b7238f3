"""Uploads to a stand-in of the hub's HTTP API: the real hub cannot be reached from tests."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from lit_align.cli import main
from lit_align.errors import UserError
from lit_align.hub import push


class StandIn:
    """Speaks the calls that create a model and commit small files to it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self._body()
                outer.tokens.add(self.headers.get("Authorization"))
                answer: dict[str, Any] = {"error": "Invalid token"}
                if outer.status == 200:
                    answer = outer.answer(self.path, body)
                text = json.dumps(answer).encode()
                self.send_response(outer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def _body(self) -> bytes:
                if length := self.headers.get("Content-Length"):
                    return self.rfile.read(int(length))
                body = b""
                while size := int(self.rfile.readline(), 16):  # sent in chunks
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/repos/create"):
            self.created = json.loads(body)
            return {"url": f"{self.address}/me/aligned"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if path.endswith("/validate-yaml"):  # of the card
            return {"errors": [], "warnings": []}
        assert "/commit/main" in path
        for line in filter(None, body.decode().splitlines()):
            if (part := json.loads(line))["key"] == "file":
                self.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
        return {"commitUrl": f"{self.address}/me/aligned/commit/1", "commitOid": "1", "success": True}


@pytest.fixture
def hub(monkeypatch):
    hub = StandIn()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    hub.server.shutdown()


def test_an_export_is_uploaded_whole_with_its_card(hub, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "exported"

    def export(source: str, out: str, adapter: bool) -> Path:
        folder.mkdir()
        (folder / "README.md").write_text("the card")
        (folder / "config.json").write_text("{}")
        return folder

    monkeypatch.setattr("lit_align.export.export", export)
    main(["export", "run", f"--out={folder}", "--push-to-hub=me/aligned", "--private"])
    assert hub.files == {"README.md": b"the card", "config.json": b"{}"}
    assert hub.created["name"] == "aligned"
    assert hub.created["organization"] == "me"
    assert hub.created.get("private", hub.created.get("visibility")) in (True, "private")
    assert hub.tokens == {"Bearer hf_secret"}
    written = capsys.readouterr().out
    assert "uploaded" in written
    assert "me/aligned" in written
    assert "hf_secret" not in written


def test_a_refused_token_says_what_to_do(hub, tmp_path):
    hub.status = 401
    with pytest.raises(
        UserError, match=r"--push-to-hub=me/aligned: the hub answers .*401.* run: hf auth login"
    ) as error:
        push(tmp_path, "me/aligned")
    assert "hf_secret" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_one_message(hub, tmp_path):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(UserError, match="the hub cannot be reached"):
        push(tmp_path, "me/aligned")


def test_a_name_that_no_model_can_have_is_refused(hub, tmp_path):
    with pytest.raises(UserError, match=r"--push-to-hub=a/b/c must be USER/NAME or NAME"):
        push(tmp_path, "a/b/c")


def test_private_without_an_upload_has_no_effect(capsys):
    with pytest.raises(SystemExit):
        main(["export", "run", "--out=x", "--private"])
    assert "--private has no effect without --push-to-hub" in " ".join(capsys.readouterr().err.split())
