"""A Hub on loopback that serves local folders as repositories, with the few routes that downloads need."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@contextmanager
def serve_hub(repositories: dict[str, dict[str, Path]]):
    """Serves `{"org/name": {revision: folder}}`; yields the URL for `HF_ENDPOINT` and the list of requested paths.

    A name that begins with `datasets/` is that of a data set. A revision is known by its name and by a commit, the hash
    of repository and name.
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

    def do_POST(self):
        self.answer(with_body=True)

    def find_paths(self, folder: Path) -> list[dict]:
        """Those of the paths in the body of a request that are there."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        return [entry for entry in list_tree(folder, folder, True) if entry["path"] in asked]

    def answer(self, with_body: bool):
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        for name, revisions in self.repositories.items():
            for revision, folder in revisions.items():
                commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
                api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
                for alias in (revision, commit):
                    if path.startswith(f"/{name}/resolve/{alias}/"):
                        return self.send_file(folder / path.split(f"/resolve/{alias}/")[1], commit, with_body)
                    if path == f"{api}/paths-info/{alias}":
                        return self.send_json(self.find_paths(folder), commit)
                    if f"{path}/".startswith(f"{api}/tree/{alias}/"):
                        below = folder / path.removeprefix(f"{api}/tree/{alias}").lstrip("/")
                        if not below.is_dir():
                            return self.send_error_code("EntryNotFound")
                        return self.send_json(list_tree(folder, below, "recursive=true" in self.path.lower()), commit)
                    is_default = path == api and revision == "main"
                    if is_default or path == f"{api}/revision/{alias}":
                        listed = [item["path"] for item in list_tree(folder, folder, True) if item["type"] == "file"]
                        files = [{"rfilename": name} for name in listed]
                        return self.send_json({"id": name, "sha": commit, "siblings": files}, commit)
        is_known = any(name in path for name in self.repositories)
        self.send_error_code("EntryNotFound" if is_known else "RepoNotFound")

    def send_file(self, file: Path, commit: str, with_body: bool):
        if not file.is_file():
            return self.send_error_code("EntryNotFound")
        content = file.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            content = content[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"')
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
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error_code(self, code: str):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def list_tree(root: Path, folder: Path, recursive: bool) -> list[dict]:
    """Files and folders in a folder of a repository as the Hub's tree route lists them."""
    return [
        {
            "type": "file" if path.is_file() else "directory",
            "path": str(path.relative_to(root)),
            "size": path.stat().st_size if path.is_file() else 0,
            "oid": hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest(),
        }
        for path in sorted(folder.rglob("*") if recursive else folder.glob("*"))
    ]
