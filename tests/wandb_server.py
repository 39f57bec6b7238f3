"""A stand-in for W&B's server on this machine: it speaks the calls that `wandb agent` and a run of it make.

It hands out the trials of one sweep, keeps what each run sends, and stops or restarts trials on request. The values of
a trial are drawn from the sweep's own parameters: in order for a grid, at random for random and Bayes sweeps, which is
also how a Bayes search begins.
"""

import gzip
import itertools
import json
import math
import random
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY, PROJECT, SWEEP = "tester", "lit-align", "sweep1"
VIEWER = {"id": "dXNlcg==", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
STORED = {"id": "YXJ0aWZhY3Q=", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "YXJ0aWZhY3Q="}}}
ENVIRONMENT = {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", "WANDB_ENTITY": ENTITY, "WANDB_PROJECT": PROJECT}


@dataclass
class Trial:
    """A run of the sweep, as the server knows it."""

    id: str
    args: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)  # one for each start that ended by itself
    starts: int = 0

    def values(self, metric: str) -> list[float]:
        return [row[metric] for row in self.history if metric in row]


class Server:
    """W&B's server, with one sweep.

    Args:
        sweep: The sweep's YAML, read.
        trials: How many runs it asks for.
    """

    def __init__(self, sweep: dict[str, Any], trials: int):
        self.sweep = sweep
        self.trials: list[Trial] = [Trial(f"trial{i}", args) for i, args in enumerate(_draws(sweep, trials))]
        self.commands: list[dict[str, Any]] = [self.command("run", trial) for trial in self.trials]
        self.calls: list[str] = []
        self.unknown: list[str] = []
        self._http = _Quiet(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def command(self, kind: str, trial: Trial) -> dict[str, Any]:
        """A command to the agent: run, resume or stop."""
        return {"type": kind, "run_id": trial.id, "program": self.sweep["program"], "args": trial.args}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    # --- what is asked ---

    def on_heartbeat(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        """Commands in answer to an agent's heartbeat: the next one, if no trial runs."""
        if running:
            return []
        return [self.commands.pop(0) if self.commands else {"type": "exit"}]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        operation = (re.search(r"(?:query|mutation)\s+(\w+)", query) or ["", ""])[1]
        self.calls.append(operation)
        answers: dict[str, Any] = {
            "Viewer": lambda v: {"viewer": VIEWER},
            "SweepWithRuns": self._sweep,
            "CreateAgent": lambda v: {"createAgent": {"agent": {"id": "agent1"}}},
            "Heartbeat": self._heartbeat,
            "UpsertBucket": self._upsert,
            "RunResumeStatus": self._resume_status,
            "CreateRunFiles": self._files,
            "ArtifactType": lambda v: {"project": {"artifact": None}},
            "ServerFeaturesQuery": lambda v: {"serverInfo": {"features": []}},
            "CreateArtifact": lambda v: {"createArtifact": {"artifact": STORED}},
            "OrganizationCoreWeaveOrganizationID": lambda v: {
                "entity": {"organization": {"coreWeaveOrganizationId": ""}}
            },
        }
        if operation not in answers:
            self.unknown.append(query)
            return {}
        return answers[operation](variables)

    def trial(self, name: str) -> Trial:
        return next(trial for trial in self.trials if trial.id == name)

    def _sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = {"id": "c3dlZXA=", "name": SWEEP, "state": "RUNNING", "config": yaml.safe_dump(self.sweep)}
        return {"project": {"sweep": known | {"runs": {"edges": []}}}}

    def _heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        commands = self.on_heartbeat(json.loads(variables["runState"]))
        return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        trial = self.trial(variables["name"])
        if variables.get("config"):
            trial.config.update(json.loads(variables["config"]))
        return {"upsertBucket": {"bucket": self._bucket(trial), "inserted": not trial.starts}}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        trial = self.trial(variables["name"])
        trial.starts += 1
        bucket = self._bucket(trial) if trial.starts > 1 else None
        return {
            "model": {"id": "cHJvamVjdA==", "name": PROJECT, "entity": {"id": "ZW50", "name": ENTITY}, "bucket": bucket}
        }

    def _files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _bucket(self, trial: Trial) -> dict[str, Any]:
        tail = json.dumps([json.dumps(row) for row in trial.history[-1:]])
        return {
            "id": trial.id, "name": trial.id, "displayName": trial.id, "description": "", "sweepName": SWEEP,
            "project": {"id": "cHJvamVjdA==", "name": PROJECT, "entity": {"id": "ZW50", "name": ENTITY}},
            "config": json.dumps(trial.config), "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(trial.summary), "historyLineCount": len(trial.history),
            "logLineCount": 0, "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]", "tags": [],
        }  # fmt: skip

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """What a run sends while it runs: rows of its history, its summary, its end."""
        trial = self.trial(run)
        for name, chunk in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                rows = [json.loads(line) for line in chunk["content"]]
                trial.history[chunk["offset"] : chunk["offset"] + len(rows)] = rows
            elif name == "wandb-summary.json":
                trial.summary = json.loads(chunk["content"][-1])
        if body.get("complete"):
            trial.exit_codes.append(body["exitcode"])


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a process that ends leaves its connections open."""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> Any:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            try:
                return json.loads(body or b"{}")
            except ValueError:  # an uploaded file
                return {}

        def do_POST(self) -> None:
            body = self._body()
            if self.path.endswith("/graphql"):
                self._reply({"data": server.answer(body["query"], body.get("variables") or {})})
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], body)
                self._reply({})
            else:
                server.unknown.append(self.path)
                self._reply({})

        def do_PUT(self) -> None:
            self._body()
            self._reply({})

        def do_GET(self) -> None:
            server.unknown.append(self.path)
            self._reply({})

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


# --- values of the trials ---


def _draws(sweep: dict[str, Any], trials: int) -> list[dict[str, Any]]:
    parameters = sweep["parameters"]
    if sweep["method"] == "grid":
        grid = itertools.product(*(given.get("values", [given.get("value")]) for given in parameters.values()))
        chosen = [dict(zip(parameters, values, strict=True)) for values in itertools.islice(grid, trials)]
    else:
        generator = random.Random(0)
        chosen = [{name: _draw(given, generator) for name, given in parameters.items()} for _ in range(trials)]
    return [{name: {"value": value} for name, value in values.items()} for values in chosen]


def _draw(given: dict[str, Any], generator: random.Random) -> Any:
    if "value" in given:
        return given["value"]
    if "values" in given:
        return generator.choice(given["values"])
    if given["distribution"] == "log_uniform_values":
        return math.exp(generator.uniform(math.log(given["min"]), math.log(given["max"])))
    return generator.uniform(given["min"], given["max"])
