"""A small Hugging Face Hub on loopback: what the real clients call to publish a model repository and to load it again.

    with Hub({"a token": "write"}) as hub:
        subprocess.run(..., env={"HF_ENDPOINT": hub.url, "HF_TOKEN": "a token", "HF_HUB_DISABLE_XET": "1", ...})
        hub.repos["org/name"].files()

It keeps to what the Hub does in the cases that matter here: every commit is all or nothing and has an id that follows from its
content, private repositories hide from those who may not read them, tokens that only read can't write, large files go through LFS.
Requests it does not know are answered with 404 and stand in `unknown`.
"""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclasses.dataclass(frozen=True)
class File:
    content: bytes
    is_large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's hash of what it stores: of a large file, a pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.is_large else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def entry(self, path: str) -> dict:
        large = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}} if self.is_large else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid} | large


class Repo:
    """Its main branch, and the tags on it."""

    def __init__(self, is_private: bool = False):
        self.is_private = is_private
        self.commits: dict[str, dict[str, File]] = {}
        self.tags: dict[str, str] = {}
        self.main = self.commit(None, {".gitattributes": File(b"*.safetensors filter=lfs\n")})

    def commit(self, parent: str | None, files: dict[str, File]) -> str:
        content = [parent, sorted((path, file.oid) for path, file in files.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = ({"main": self.main} | self.tags).get(revision, revision)
        return oid if oid in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commits[self.resolve(revision)].items()}


class Hub:
    """A server with repositories; `tokens` tells what each token may do, "read" or "write"."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        # What goes wrong next: part of a path, and the status of a refusal, a function to call before, or "answer lost", where the
        # connection breaks when all is done.
        self.fault: tuple[str, int | str | Callable] | None = None
        self.swapped: dict[str, bytes] = {}  # path of a file -> what is served in its place
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class Answer(Exception):
    """Ends the handling of a request."""

    def __init__(self, status: int, code: str | None = None, message: str | None = None, **headers: str):
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} | headers
        self.content = json.dumps({"error": message or code}).encode()


def to_nobody() -> Answer:
    return Answer(401, None, "Invalid username or password.")


ID = r"(?P<id>[^/]+/[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", "create_repo"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{ID}", "model_info"),
    ("GET", rf"/api/models/{ID}/refs", "refs"),
    ("GET", rf"/api/models/{ID}/revision/(?P<revision>[^/]+)", "model_info"),
    ("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "large_batch"),
    ("PUT", r"/large/(?P<oid>\w+)", "large_upload"),
    ("POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{ID}/tag/(?P<revision>[^/]+)", "tag"),
    ("HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = None
        if self.hub.fault and self.hub.fault[0] in path:
            (_, fault), self.hub.fault = self.hub.fault, None
        try:
            if callable(fault):
                fault()
            if isinstance(fault, int):
                raise Answer(fault, None, "Not now")
            headers, content = self._route(path)
            status = 200
        except Answer as answer:
            status, headers, content = answer.status, answer.headers, answer.content
        if fault == "answer lost":
            self.close_connection = True
            return self.connection.close()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _route(self, path: str) -> tuple[dict, bytes]:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                answer = getattr(self, name)(**{key: value and unquote(value) for key, value in match.groupdict().items()})
                if isinstance(answer, tuple):
                    return answer
                return {"Content-Type": "application/json"}, json.dumps(answer).encode()
        self.hub.unknown.append((self.command, path))
        raise Answer(404, None, "Not here")

    # Who may do what

    def _right(self) -> str | None:
        """What the token of the request may do; None without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Answer(401, None, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _check_writer(self) -> None:
        right = self._right()
        if right is None:
            raise to_nobody()
        if right != "write":
            raise Answer(403, None, "You don't have the rights to write here")

    def _commit_of(self, id: str, revision: str) -> tuple[Repo, str]:
        right, repo = self._right(), self.hub.repos.get(id)
        if repo is None or (repo.is_private and right is None):
            raise Answer(404, "RepoNotFound", "Repository not found") if right else to_nobody()
        oid = repo.resolve(revision)
        if oid is None:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, oid

    # Publishing

    def create_repo(self) -> dict:
        self._check_writer()
        wanted = json.loads(self.body)
        id = f"{wanted['organization']}/{wanted['name']}"
        if id in self.hub.repos:
            raise Answer(409, None, "You already created this model repo")
        self.hub.repos[id] = Repo()
        return {"url": f"{self.hub.url}/{id}"}

    def validate_yaml(self) -> dict:
        return {"errors": [], "warnings": []}

    def preupload(self, id: str, revision: str) -> dict:
        repo, oid = self._commit_of(id, revision)
        self._check_writer()
        there = repo.commits[oid]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": there[file["path"]].oid if file["path"] in there else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return {"files": files}

    def large_batch(self, id: str) -> dict:
        self._check_writer()
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.large:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def large_upload(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, None, "The content is not what was announced")
        self.hub.large[oid] = self.body
        return {}

    def commit(self, id: str, revision: str) -> dict:
        repo, head = self._commit_of(id, revision)
        self._check_writer()
        header, *lines = (json.loads(line) for line in self.body.splitlines())
        if revision != "main":
            raise Answer(404, "RevisionNotFound", f"{revision} is no branch")
        if header["value"].get("parentCommit") not in (None, head):
            raise Answer(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.large:
                files[value["path"]] = File(self.hub.large[value["oid"]], is_large=True)
            elif line["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Answer(400, None, f"Can't do {line['key']} of {value['path']}")
        repo.main = repo.commit(head, files)
        return {"success": True, "commitOid": repo.main, "commitUrl": f"{self.hub.url}/{id}/commit/{repo.main}", "hookOutput": ""}

    def tag(self, id: str, revision: str) -> dict:
        repo, oid = self._commit_of(id, revision)
        self._check_writer()
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            raise Answer(409, None, f"Tag {name} exists")
        repo.tags[name] = oid
        return {}

    # Reading

    def model_info(self, id: str, revision: str = "main") -> dict:
        repo, oid = self._commit_of(id, revision)
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        return {"id": id, "modelId": id, "sha": oid, "private": repo.is_private, "tags": [], "siblings": siblings}

    def refs(self, id: str) -> dict:
        repo, _ = self._commit_of(id, "main")
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid} for name, oid in repo.tags.items()]
        return {"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.main}], "tags": tags, "converts": []}

    def tree(self, id: str, revision: str, path: str | None = None) -> list[dict]:
        repo, oid = self._commit_of(id, revision)
        entries = [file.entry(name) for name, file in repo.commits[oid].items() if path is None or name.startswith(f"{path}/")]
        if not entries:
            raise Answer(404, "EntryNotFound", f"{path} does not exist")
        return entries

    def resolve(self, id: str, revision: str, path: str) -> tuple[dict, bytes]:
        repo, oid = self._commit_of(id, revision)
        file = repo.commits[oid].get(path)
        if file is None:
            raise Answer(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": oid})
        file = File(self.hub.swapped.get(path, file.content), file.is_large)
        return {"X-Repo-Commit": oid, "ETag": f'"{file.sha256 if file.is_large else file.oid}"'}, file.content
