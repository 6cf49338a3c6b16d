"""A Hub on loopback that serves local folders as repositories, with the few routes that downloads need."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextmanager
def serve_hub(repositories: dict[str, dict[str, Path]]):
    """Serves `{"org/name": {revision: folder}}`; yields the URL for `HF_ENDPOINT` and the list of requested paths.

    A revision is known by its name and by a commit, the hash of repository and name.
    """
    asked = []
    Handler = type("Handler", (HubHandler,), {"repositories": repositories, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    """Answers for `repositories`, and appends each path to `asked`; subclasses have both."""

    repositories: dict[str, dict[str, Path]]
    asked: list[str]

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool):
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        for name, revisions in self.repositories.items():
            for revision, folder in revisions.items():
                commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
                for alias in (revision, commit):
                    if path.startswith(f"/{name}/resolve/{alias}/"):
                        return self.send_file(folder / path.split(f"/resolve/{alias}/")[1], commit, with_body)
                    if path == f"/api/models/{name}/tree/{alias}":
                        return self.send_json(list_files(folder), commit)
                    is_default = path == f"/api/models/{name}" and revision == "main"
                    if is_default or path == f"/api/models/{name}/revision/{alias}":
                        files = [{"rfilename": item["path"]} for item in list_files(folder)]
                        return self.send_json({"id": name, "sha": commit, "siblings": files}, commit)
        is_known = any(name in path for name in self.repositories)
        self.send_error_code("EntryNotFound" if is_known else "RepoNotFound")

    def send_file(self, file: Path, commit: str, with_body: bool):
        if not file.is_file():
            return self.send_error_code("EntryNotFound")
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def send_json(self, value, commit: str):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def send_error_code(self, code: str):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def list_files(folder: Path) -> list[dict]:
    """Files of a folder as the Hub's tree route lists them."""
    return [
        {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "0" * 40}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
