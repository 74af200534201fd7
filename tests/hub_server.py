"""A stand-in for the Hub: the part of its HTTP API that `huggingface_hub` needs to publish and load a model.

    with HubServer() as hub:
        environment = os.environ | hub.environment(tmp_path)  # for a process of its own
        ...
        assert hub.files("owner/model") == {...}

It listens on two ports of the loopback interface, the API's and the storage's, holds everything in memory, and refuses
what the Hub refuses: writing without a token or with one that may only read (401, 403), what is not there (404, with
the error code that the client looks at), creating what is there (409), content that is not what its hash says (400), a
commit of something never uploaded (400), and a commit on top of another parent than was named (412). Large files take
the LFS way: a batch request, an upload to a signed address, a verification, a pointer in the commit; and on the way
back a redirect to a signed address.

`calls` is a log of every request, each with the files that a reader of the default branch sees right after it.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


# What the Hub's default .gitattributes sends through LFS, as far as it matters here.
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.npz", "*.parquet")


@dataclass(frozen=True)
class Token:
    """Who a token belongs to, and whether it may write."""

    user: str
    write: bool = True


@dataclass(frozen=True)
class File:
    """A file of a commit. `oid` is git's SHA-1 of a regular file, and the content's SHA-256 of a large one."""

    content: bytes
    oid: str
    large: bool = False


@dataclass
class Repo:
    """Commits by hash, each a dictionary from paths to files, and the names of some of them."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request or hash names."""
        for names in (self.branches, self.tags, self.pull_requests):
            if revision in names:
                return names[revision]
        return revision if revision in self.commits else None

    def commit(self, files: dict[str, File], parent: str | None) -> str:
        summary = json.dumps([parent, len(self.commits), sorted((path, file.oid) for path, file in files.items())])
        sha = hashlib.sha1(summary.encode()).hexdigest()
        self.commits[sha], self.parents[sha] = files, parent
        return sha


@dataclass(frozen=True)
class Call:
    """A request, its answer's status, and what a reader of `main` of every repository sees after it."""

    method: str
    path: str
    status: int
    user: str | None
    visible: dict[str, frozenset[str]]


class Refusal(Exception):
    """An answer other than success: a status, and the headers by which the client tells the reasons apart."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None, **headers: str):
        super().__init__(message)
        self.status, self.body = status, body or {"error": message}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class HubServer:
    """See the module. `tokens` maps a token to its [`Token`]."""

    def __init__(self, tokens: dict[str, Token] | None = None):
        self.tokens = tokens or {
            "hf_owner": Token("owner"),
            "hf_reader": Token("owner", write=False),
            "hf_stranger": Token("stranger"),
        }
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.calls: list[Call] = []
        self.lock = threading.RLock()
        self._secret = secrets.token_bytes(16)
        # Large files are elsewhere than the API, as with the Hub: the client sends its token to no other host,
        # and takes the file's hash from the redirect. (Some versions go by the host's name, without the port.)
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, storage)) for storage in (False, True)]
        api, storage = (server.server_port for server in self._servers)
        self.endpoint, self.storage = f"http://127.0.0.1:{api}", f"http://localhost:{storage}"

    def __enter__(self) -> "HubServer":
        self._threads = [threading.Thread(target=server.serve_forever, args=[0.05]) for server in self._servers]
        for server, thread in zip(self._servers, self._threads):
            server.daemon_threads = True
            thread.start()
        return self

    def __exit__(self, *exception) -> None:
        for server, thread in zip(self._servers, self._threads):
            server.shutdown()
            thread.join()
            server.server_close()

    def environment(self, home: str | Path, token: str | None = "hf_owner") -> dict[str, str]:
        """Variables of a process that takes this for the Hub, with a cache of its own in `home`."""
        own = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, to servers that are not here
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return own | {"HF_TOKEN": token or ""}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path, as a reader who may see the repository gets them."""
        repo = self.repos[repo_id]
        return {path: file.content for path, file in repo.commits[repo.resolve(revision)].items()}

    # ---------------------------------------------------------------------------------------------------- who may what

    def user_of(self, authorization: str | None) -> Token | None:
        if not authorization:
            return None
        token = self.tokens.get(authorization.removeprefix("Bearer "))
        if token is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def readable(self, repo_id: str, user: Token | None) -> Repo:
        """The repository, for one who may know of it: a private one looks to others as if it were not there."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or user.user != repo_id.split("/")[0])):
            # as the Hub does: nobody learns without a token whether there is a private repository of that name
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id: str, user: Token | None) -> Repo:
        if user is None:
            raise Refusal(401, "Repository not found", "RepoNotFound")
        repo = self.readable(repo_id, user)
        self._check_may_write(repo_id.split("/")[0], user)
        return repo

    def _check_may_write(self, namespace: str, user: Token) -> None:
        if user.user != namespace or not user.write:
            raise Refusal(403, f"Forbidden: you don't have write access to {namespace!r} with this token.")

    def commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def signed(self, action: str, oid: str) -> str:
        """An address that works without a token, for those who were given it."""
        return f"{self.storage}/large-files/{action}/{oid}?signature={self._signature(action, oid)}"

    def check_signature(self, action: str, oid: str, signature: str) -> None:
        if not hmac.compare_digest(self._signature(action, oid), signature):
            raise Refusal(403, "SignatureDoesNotMatch")

    def _signature(self, action: str, oid: str) -> str:
        return hmac.new(self._secret, f"{action}/{oid}".encode(), "sha256").hexdigest()

    # -------------------------------------------------------------------------------------------------------- writing

    def create(self, user, body) -> dict:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        namespace = body.get("organization") or user.user
        self._check_may_write(namespace, user)
        repo_id = f"{namespace}/{body['name']}"
        url = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo", body={"error": "exists", **url})
        repo = self.repos[repo_id] = Repo(private=body.get("visibility") == "private" or body.get("private") is True)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repo.branches["main"] = repo.commit({".gitattributes": _regular(attributes.encode())}, None)
        return url

    def preupload(self, repo: Repo, revision: str, body) -> dict:
        files = repo.commits[self.commit_of(repo, revision)]
        answers = []
        for file in body["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            large = any(fnmatch(path, pattern) for pattern in LFS_PATTERNS) or b"\0" in sample
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": files[path].oid} if path in files else {}))
        return {"files": answers}

    def lfs_batch(self, repo_id: str, body) -> dict:
        objects = []
        for entry in body["objects"]:
            if entry["oid"] in self.verified:
                objects.append(entry)  # no actions: it is there
                continue
            actions = {
                "upload": {"href": self.signed("upload", entry["oid"])},
                "verify": {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/objects/verify"},
            }
            objects.append({**entry, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str, content: bytes) -> dict:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "BadDigest: the content is not what its hash says")
        self.large_files[oid] = content
        return {}

    def lfs_verify(self, body) -> dict:
        if len(self.large_files.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, "The object was not uploaded")
        self.verified.add(body["oid"])
        return {}

    def commit(self, repo_id: str, repo: Repo, revision: str, content: bytes, create_pr: bool) -> dict:
        header, *operations = [json.loads(line) for line in content.splitlines() if line.strip()]
        if header["key"] != "header" or not header["value"].get("summary"):
            raise Refusal(400, "A commit begins with a header that has a summary")
        head = self.commit_of(repo, revision)
        if header["value"].get("parentCommit") not in (None, head):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                files[path] = _regular(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.verified:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = File(self.large_files[value["oid"]], value["oid"], large=True)
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            elif key == "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
            else:
                raise Refusal(400, f"Unknown operation {key!r}")
        sha = repo.commit(files, head)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{sha}"}
        if create_pr:
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = sha
            return answer | {"pullRequestUrl": f"{self.endpoint}/{repo_id}/discussions/{number}"}
        if revision not in repo.branches:
            raise Refusal(400, f"Only branches can be committed to, not {revision}")
        repo.branches[revision] = sha
        return answer

    def name(self, names: dict[str, str], name: str, sha: str) -> dict:
        if name in names:
            raise Refusal(409, f"Reference already exists: {name}")
        names[name] = sha
        return {}

    def validate_card(self, body) -> dict:
        """What the Hub says of a README.md: the metadata must be YAML, and of the types it knows."""
        errors, warnings = [], []
        block = re.match(r"\A---\r?\n(.*?)\r?\n---(\r?\n|\Z)", body["content"], re.S)
        if block is None:
            warnings.append("empty or missing yaml metadata in repo card")
        else:
            try:
                metadata = yaml.safe_load(block.group(1))
                if not isinstance(metadata, dict):
                    errors.append("the metadata must be a mapping")
                else:
                    errors += _metadata_errors(metadata)
            except yaml.YAMLError as error:
                errors.append(f"not YAML: {error}")
        answer = {
            "errors": [{"message": message} for message in errors],
            "warnings": [{"message": message} for message in warnings],
        }
        if errors:
            raise Refusal(400, "Invalid metadata", body=answer)
        return answer

    # -------------------------------------------------------------------------------------------------------- reading

    def info(self, repo_id: str, repo: Repo, revision: str) -> dict:
        sha = self.commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        return {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private,
                "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    def tree(self, repo: Repo, revision: str, folder: str = "") -> list[dict]:
        """All files below a folder. The client asks recursively; folders themselves are left out."""
        files = repo.commits[self.commit_of(repo, revision)]
        return [_entry(path, file) for path, file in sorted(files.items()) if path.startswith(folder)]

    def refs(self, repo: Repo) -> dict:
        def listed(names, kind):
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

        return {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}


def _regular(content: bytes) -> File:
    return File(content, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _entry(path: str, file: File) -> dict:
    entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
    if file.large:
        entry |= {"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}}
        entry["oid"] = hashlib.sha1(file.oid.encode()).hexdigest()  # of the pointer, which is what git holds
    return entry


def _metadata_errors(metadata: dict) -> list[str]:
    texts = ("library_name", "pipeline_tag", "license", "license_name")
    lists = ("tags", "datasets", "metrics", "language", "base_model")
    errors = [f'"{name}" must be a string' for name in texts if not isinstance(metadata.get(name, ""), str)]
    for name in lists:
        value = metadata.get(name, [])
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            errors.append(f'"{name}" must be a string or a list of strings')
    if not re.fullmatch(r"[a-z0-9.\-]*", str(metadata.get("license", ""))):
        errors.append('"license" must be one of the known identifiers')
    return errors


def _handler(hub: HubServer, storage: bool) -> type[BaseHTTPRequestHandler]:
    """The class that answers one request with what `hub` says, to its API or to its storage."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def handle_any(self) -> None:
            content = self.read_body()
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            user = None
            with hub.lock:
                try:
                    user = hub.user_of(self.headers.get("Authorization"))
                    status, headers, body = self.answer(url.path, query, content, user)
                except Refusal as refusal:
                    status, headers, body = refusal.status, refusal.headers, json.dumps(refusal.body).encode()
                seen = {repo_id: frozenset(hub.files(repo_id)) for repo_id in hub.repos}
                hub.calls.append(Call(self.command, unquote(url.path), status, user and user.user, seen))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def answer(self, path: str, query: dict, content: bytes, user: Token | None) -> tuple[int, dict, bytes]:
            def matches(method: str, pattern: str) -> re.Match | None:
                if self.command != method or storage != pattern.startswith("/large-files/"):
                    return None
                return re.fullmatch(pattern, path)

            def as_json(body) -> tuple[int, dict, bytes]:
                return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()

            def given() -> dict:
                return json.loads(content)

            model = r"/api/models/([^/]+/[^/]+)"
            if matches("GET", "/api/whoami-v2"):
                if user is None:
                    raise Refusal(401, "Invalid username or password.")
                return as_json({"type": "user", "name": user.user, "orgs": [], "auth": {"type": "access_token"}})
            if matches("POST", "/api/repos/create"):
                return as_json(hub.create(user, given()))
            if matches("POST", "/api/validate-yaml"):
                return as_json(hub.validate_card(given()))
            if m := matches("POST", f"{model}/preupload/(.+)"):
                return as_json(hub.preupload(hub.writable(m[1], user), unquote(m[2]), given()))
            if m := matches("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"):
                hub.writable(m[1], user)
                return as_json(hub.lfs_batch(m[1], given()))
            if m := matches("PUT", r"/large-files/upload/(\w+)"):
                hub.check_signature("upload", m[1], query.get("signature", ""))
                return as_json(hub.lfs_upload(m[1], content))
            if m := matches("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify"):
                hub.writable(m[1], user)
                return as_json(hub.lfs_verify(given()))
            if m := matches("POST", f"{model}/commit/(.+)"):
                repo = hub.writable(m[1], user)
                return as_json(hub.commit(m[1], repo, unquote(m[2]), content, query.get("create_pr") == "1"))
            if m := matches("POST", f"{model}/branch/(.+)"):
                repo = hub.writable(m[1], user)
                sha = hub.commit_of(repo, given().get("startingPoint", "main"))
                return as_json(hub.name(repo.branches, unquote(m[2]), sha))
            if m := matches("POST", f"{model}/tag/(.+)"):
                repo = hub.writable(m[1], user)
                return as_json(hub.name(repo.tags, given()["tag"], hub.commit_of(repo, unquote(m[2]))))
            if m := matches("GET", f"{model}/refs"):
                return as_json(hub.refs(hub.readable(m[1], user)))
            if m := matches("GET", f"{model}/tree/([^/]+)/?(.*)"):
                return as_json(hub.tree(hub.readable(m[1], user), unquote(m[2]), unquote(m[3])))
            if m := matches("GET", f"{model}(?:/revision/(.+))?"):
                return as_json(hub.info(m[1], hub.readable(m[1], user), unquote(m[2] or "main")))
            if m := (matches("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
                     or matches("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")):  # fmt: skip
                return self.resolved(hub.readable(m[1], user), unquote(m[2]), unquote(m[3]))
            if m := (
                matches("HEAD", r"/large-files/download/(\w+)") or matches("GET", r"/large-files/download/(\w+)")
            ):
                hub.check_signature("download", m[1], query.get("signature", ""))
                return self.ranged(hub.large_files[m[1]], {"ETag": f'"{m[1]}"'})
            raise Refusal(404, f"Sorry, we can't find the page: {self.command} {path}")

        def resolved(self, repo: Repo, revision: str, path: str) -> tuple[int, dict, bytes]:
            """A file, or where a large one is; in any case the commit that the revision stands for."""
            sha = hub.commit_of(repo, revision)
            headers = {"X-Repo-Commit": sha}
            file = repo.commits[sha].get(path)
            if file is None:
                raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
            if not file.large:
                return self.ranged(file.content, headers | {"ETag": f'"{file.oid}"'})
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
            return 302, headers | {"Location": hub.signed("download", file.oid)}, b""

        def ranged(self, content: bytes, headers: dict) -> tuple[int, dict, bytes]:
            headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
            m = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if m is None:
                return 200, headers | {"Content-Length": str(len(content))}, content
            first, last = int(m[1]), min(int(m[2] or len(content)), len(content) - 1)
            part = content[first : last + 1]
            headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}", "Content-Length": str(len(part))}
            return 206, headers, part

    return Handler
