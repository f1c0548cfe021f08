"""A small Hugging Face Hub on 127.0.0.1: as much of its HTTP as huggingface_hub uses to push and to fetch a model.

Repositories are branches of commits, each a dictionary of files; large files go through the Git LFS batch API and are
kept by their sha256. Faults are injected by method and path. Xet storage is not here: clients are told to do without.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
LARGE = re.compile(r"\.(safetensors|onnx|onnx_data|png)$")


@dataclass
class Fault:
    """What happens to requests of a method whose path matches: a status, `drop` (no answer) or `corrupt` (a byte)."""

    method: str
    path: str
    action: int | str
    times: int = 10**6


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    large: set[str] = field(default_factory=set)  # paths

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((self.branches.get(branch), sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class Hub:
    """The state of the server, for tests to look at and to change."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def environment(self, home) -> dict[str, str]:
        """What a process needs to take this server for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def publish(self, name: str, folder, branch: str = "main") -> str:
        """Put a local folder on the server, past all HTTP."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        made = self.repositories.setdefault(name, Repository(private=False))
        made.large |= {path for path in files if LARGE.search(path)}
        return made.commit(branch, files)

    def hit(self, method: str, path: str) -> int | str | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault.action
        return None


@contextmanager
def running():
    """A Hub that listens while the context is open."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self._do("GET")

    def do_HEAD(self) -> None:
        self._do("HEAD")

    def do_POST(self) -> None:
        self._do("POST")

    def do_PUT(self) -> None:
        self._do("PUT")

    def _do(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((method, path))
        self.fault = self.state.hit(method, path)
        if self.fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(self.fault, int):
            self._answer(self.fault, {"error": "injected"})
            return
        for verb, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in verb:
                handle(self, body, *found.groups())
                return
        self._answer(404, {"error": f"no route {method} {path}"})

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, content: object = None, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _is_known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid credentials in Authorization header"})
        return False

    def _repository(self, name: str) -> Repository | None:
        found = self.state.repositories.get(name)
        if found is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def whoami(self, body: bytes) -> None:
        if self._is_known():
            self._answer(200, {"type": "user", "name": "user", "orgs": []})

    def create(self, body: bytes) -> None:
        if not self._is_known():
            return
        said = json.loads(body)
        name = f"{said['organization'] or 'user'}/{said['name']}"
        exists = name in self.state.repositories
        if not exists:
            made = Repository(said.get("visibility") == "private" or bool(said.get("private")))
            made.commit("main", {".gitattributes": b""})
            self.state.repositories[name] = made
        self._answer(409 if exists else 200, {"url": f"{self.state.url}/{name}"})

    def validate(self, body: bytes) -> None:
        self._answer(200, {"warnings": [], "errors": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repository = self._is_known() and self._repository(name)
        if not repository:
            return
        held = repository.files(revision)
        if held is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        files = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            mode = "lfs" if LARGE.search(path) else "regular"
            known = {}
            if path in held:
                content = held[path]
                known = {"oid": hashlib.sha256(content).hexdigest() if mode == "lfs" else git_name(content)}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self._answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if not self._is_known():
            return
        objects = []
        for entry in json.loads(body)["objects"]:
            oid, actions = entry["oid"], {}
            if oid not in self.state.blobs:
                links = {"upload": f"/lfs/{oid}", "verify": f"/lfs/{oid}/verify"}
                actions = {"actions": {kind: {"href": self.state.url + link} for kind, link in links.items()}}
            objects.append({**entry, **actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if self.fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "sha256 does not match"})
            return
        self.state.blobs[oid] = body
        self._answer(200, {})

    def verify(self, body: bytes, oid: str) -> None:
        said = json.loads(body)
        held = self.state.blobs.get(oid)
        self._answer(200 if held is not None and len(held) == said["size"] else 404, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._is_known() and self._repository(name)
        if not repository:
            return
        files = dict(repository.files(revision) or {})
        for line in body.splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif said["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
                repository.large.add(value["path"])
        oid = repository.commit(revision, files)
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.state.url}/{name}/commit/{oid}"})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._is_known() and self._repository(name)
        if not repository:
            return
        exists = branch in repository.branches
        repository.branches.setdefault(branch, repository.branches["main"])
        self._answer(409 if exists else 200, {})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        revision = revision or "main"
        files = repository.files(revision)
        if files is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        oid = repository.branches.get(revision, revision)
        self._answer(200, {"id": name, "sha": oid, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        entries = []
        for path, content in (repository.files(revision) or {}).items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_name(content)}
            if path in repository.large:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._answer(200, entries)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        content = (repository.files(revision) or {}).get(path)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        large = path in repository.large
        tag = hashlib.sha256(content).hexdigest() if large else git_name(content)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": repository.branches.get(revision, revision)}
        if large:
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        if self.fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._answer(200, content, headers)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("POST",), rf"/api/models/{NAME}/preupload/(.+)", _Handler.preupload),
    (("POST",), rf"/api/models/{NAME}/commit/(.+)", _Handler.commit),
    (("POST",), rf"/api/models/{NAME}/branch/(.+)", _Handler.branch),
    (("GET",), rf"/api/models/{NAME}/tree/([^/]+).*", _Handler.tree),
    (("GET",), rf"/api/models/{NAME}/revision/(.+)", _Handler.info),
    (("GET",), rf"/api/models/{NAME}", _Handler.info),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/lfs/([0-9a-f]{64})", _Handler.put),
    (("POST",), r"/lfs/([0-9a-f]{64})/verify", _Handler.verify),
    (("GET", "HEAD"), rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
