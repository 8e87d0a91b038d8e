"""An MLflow tracking server as small as can be: the REST calls of a run, kept by MLflow's own file store.

The real server needs packages that the project does without. Faults can be switched on: refuse every call with an
error, or take it and never answer.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

__all__ = ["TrackingServer", "running"]

API = "/api/2.0/mlflow/"


class TrackingServer:
    """What is recorded, and how the server behaves."""

    def __init__(self, folder: Path) -> None:
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow.store.tracking.file_store import FileStore

        self.store = FileStore(str(folder), folder.as_uri())
        self.broken = False
        self.silent = False
        self.calls: list[str] = []
        self.uri = ""
        self.closed = threading.Event()

    def answer(self, call: str, body: dict[str, Any]) -> dict[str, Any]:
        """Do what a call asks for."""
        from mlflow.entities import ExperimentTag, Metric, Param, RunStatus, RunTag
        from mlflow.protos.service_pb2 import GetExperimentByName, GetRun
        from mlflow.utils.proto_json_utils import message_to_json

        store = self.store

        def told(run: Any) -> dict[str, Any]:
            return json.loads(message_to_json(GetRun.Response(run=run.to_proto())))

        match call:
            case "experiments/get-by-name":
                found = store.get_experiment_by_name(body["experiment_name"])
                if found is None:
                    raise LookupError
                return json.loads(message_to_json(GetExperimentByName.Response(experiment=found.to_proto())))
            case "experiments/create":
                tags = [ExperimentTag(**tag) for tag in body.get("tags", [])]
                return {"experiment_id": store.create_experiment(body["name"], None, tags)}
            case "runs/search":
                runs = store.search_runs(body["experiment_ids"], body.get("filter", ""), 1, body["max_results"])
                return {"runs": [told(run)["run"] for run in runs]}
            case "runs/create":
                tags = [RunTag(**tag) for tag in body.get("tags", [])]
                start = int(body.get("start_time", 0))
                return told(store.create_run(body["experiment_id"], "", start, tags, body.get("run_name")))
            case "runs/get":
                return told(store.get_run(body["run_id"]))
            case "runs/update":
                ended = int(body["end_time"]) if "end_time" in body else None
                status = RunStatus.from_string(body["status"])
                store.update_run_info(body["run_id"], status, ended, body.get("run_name"))
                return told(store.get_run(body["run_id"]))
            case "runs/log-batch":
                metrics = [
                    Metric(item["key"], float(item["value"]), int(item["timestamp"]), int(item.get("step", 0)))
                    for item in body.get("metrics", [])
                ]
                store.log_batch(body["run_id"], metrics, [Param(**item) for item in body.get("params", [])], [])
                return {}
        raise LookupError


@contextmanager
def running(folder: Path) -> Iterator[TrackingServer]:
    """Serve on a free port."""
    state = TrackingServer(folder)
    from mlflow.exceptions import MlflowException

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlparse(self.path)
            self.reply(address.path, {name: values[0] for name, values in parse_qs(address.query).items()})

        def do_POST(self) -> None:
            self.reply(urlparse(self.path).path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, path: str, body: dict[str, Any]) -> None:
            state.calls.append(path)
            if state.silent:
                state.closed.wait(60)
                return
            status, found = 200, {}
            try:
                if state.broken:
                    status, found = 503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "out of order"}
                else:
                    found = state.answer(path.removeprefix(API), body)
            except MlflowException as error:
                status, found = error.get_http_status_code(), json.loads(error.serialize_as_json())
            except LookupError:
                status, found = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": path}
            payload = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *arguments: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.uri = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.closed.set()
        server.shutdown()
        server.server_close()
