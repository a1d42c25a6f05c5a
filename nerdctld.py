#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""nerdctld: the Docker Engine API on a unix socket, carried out by nerdctl.

The way of a request, in one direction only:

    socket -> request -> route -> handler -> argv -> nerdctl -> parser -> Docker JSON -> response

Sections, each using only what stands above it:

    Errors · Requests, responses · Routes · nerdctl process · Conversions · Events · Snapshot · Engine ·
    System · Images · Build · Containers · Container create · Streams · Archive · Networks · Volumes ·
    Swarm and plugins · BuildKit · HTTP server · Sockets · ctr · Command line

To add an endpoint:
    1. write `<op>_args()`, `parse_<thing>()` and `docker_<thing>()` as pure functions in the section of its resource;
    2. write the handler `<resource>_<op>(engine, request, ...)` below them: validate, run, shape, return;
    3. put `@route(METHOD, PATH)` on it; raise an ApiError for what goes wrong, never write to the socket;
    4. add its line to the table in README.md and a case to the class of that section in test_nerdctld.py.
"""

import argparse
import base64
import binascii
import calendar
import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import getopt
import hashlib
import http.client
import http.server
import io
import itertools
import json
import os
import pty
import queue
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import urllib.parse
import zlib
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

VERSION = "0.1.0"
API_NEWEST = (1, 56)
API_OLDEST = (1, 24)
JSON_LIMIT = 16 << 20
BLOCK = 1 << 18


def log(message: str) -> None:
    """Write one line to stderr; line breaks in the message are made visible so that one event stays one line."""
    try:
        sys.stderr.write("nerdctld: " + message.replace("\r", "\\r").replace("\n", "\\n") + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


###############################################################################
# Errors
###############################################################################


class ApiError(Exception):
    """What a client is told went wrong: `status` and a message. Raised anywhere, answered in one place."""

    status = 500


class NotModified(ApiError):
    """304: the object is already in the state asked for."""

    status = 304


class BadParameter(ApiError):
    """400: the request cannot be right, whatever the state of things."""

    status = 400


class Unauthorized(ApiError):
    """401: the registry refused the credentials."""

    status = 401


class Forbidden(ApiError):
    """403: allowed to nobody, such as removing a pre-defined network."""

    status = 403


class NotFound(ApiError):
    """404: no such object."""

    status = 404


class Conflict(ApiError):
    """409: the object's state or name stands against it."""

    status = 409


class TooLarge(ApiError):
    """413: the body is longer than this API ever needs."""

    status = 413


class NotImplementedHere(ApiError):
    """501: nerdctl has no way to do it."""

    status = 501


class Unavailable(ApiError):
    """503: nerdctl, containerd or buildkitd is missing or down; the message says which and what to do."""

    status = 503


class ClientGone(Exception):
    """The client left in the middle; nobody is there to be told."""


###############################################################################
# Requests, responses
###############################################################################


class Client:
    """The far end of a request, as a handler may see it: whether it is still there."""

    def when_gone(self, callback: Callable[[], None]):
        """Context in which `callback` is called, from another thread, once the client has left. A client that cannot
        be watched is taken to stay."""
        return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Request:
    """One request. `version` is a pair such as (1, 44); `query` maps each name to its list of values; `body` has
    `read(n)` and `readinto(view)`; `headers` compares names without case."""

    method: str
    path: str
    version: Tuple[int, int] = API_NEWEST
    query: Dict[str, List[str]] = dataclasses.field(default_factory=dict)
    headers: Any = dataclasses.field(default_factory=dict)
    body: Any = dataclasses.field(default_factory=io.BytesIO)
    client: Client = dataclasses.field(default_factory=Client)

    def value(self, name: str, default: str = "") -> str:
        """First value of a query parameter."""
        return self.query.get(name, [default])[0]

    def values(self, name: str) -> List[str]:
        """All values of a repeated query parameter, in order."""
        return self.query.get(name, [])

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean as Docker reads it: everything is true but nothing, 0, no, false and none."""
        if name not in self.query:
            return default
        return self.value(name).strip().lower() not in ("", "0", "no", "false", "none")

    def integer(self, name: str, default: int = 0) -> int:
        """A decimal number; 400 for anything else."""
        text = self.value(name).strip()
        if not text:
            return default
        if not re.fullmatch(r"[+-]?\d{1,18}", text):
            raise BadParameter(f"invalid value for {name}: {text!r} is not a number")
        return int(text)

    def timestamp(self, name: str) -> Optional[float]:
        """Seconds since 1970 from `1700000000`, `1700000000.5` or RFC 3339; None when absent; 400 otherwise."""
        text = self.value(name).strip()
        if not text:
            return None
        if re.fullmatch(r"-?\d{1,15}(\.\d{1,18})?", text):
            return float(text)
        seconds = seconds_of(text)
        if seconds is None:
            raise BadParameter(f"invalid value for {name}: {text!r} is not a timestamp")
        return seconds

    def json(self, required: bool = False) -> Dict[str, Any]:
        """The body as a JSON object, {} when there is none and it may be absent; 400 with dockerd's words otherwise."""
        data = read_limited(self.body, JSON_LIMIT)
        if not data.strip():
            if required:
                raise BadParameter("invalid JSON: got EOF while reading request body")
            return {}
        kind = (self.headers.get("Content-Type") or "application/json").partition(";")[0].strip().lower()
        if required and kind != "application/json":
            raise BadParameter(f"unsupported Content-Type header ({kind}): must be 'application/json'")
        value = parse_json(data)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise BadParameter("invalid JSON: expected an object")
        return value

    def filters(self, *allowed: str) -> Dict[str, List[str]]:
        """The `filters` parameter, of either form clients send ({"a":{"b":true}} and {"a":["b"]}), as name -> values.
        400 for bad JSON and, where `allowed` names the filters of the endpoint, for any other name."""
        text = self.value("filters").strip()
        if not text:
            return {}
        value = parse_json(text.encode("utf-8", "surrogateescape"))
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise BadParameter("invalid filter: expected an object")
        result: Dict[str, List[str]] = {}
        for name, wanted in value.items():
            if isinstance(wanted, dict):
                wanted = [key for key, on in wanted.items() if on]
            if not isinstance(wanted, list) or not all(isinstance(each, str) for each in wanted):
                raise BadParameter(f"invalid filter {name!r}: expected a list of strings")
            if allowed and name not in allowed:
                raise BadParameter(f"invalid filter '{name}'")
            result[name] = wanted
        return result


def parse_json(data: bytes) -> Any:
    """A JSON value; 400 for what is none, has something behind it, or nests without end."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadParameter(f"invalid JSON: {str(error).splitlines()[0][:200]}") from None


def read_limited(body: Any, limit: int) -> bytes:
    """The whole of a body that has to be small; 413 beyond `limit` bytes."""
    parts, size = [], 0
    while True:
        part = body.read(65536)
        if not part:
            return b"".join(parts)
        size += len(part)
        if size > limit:
            raise TooLarge(f"request body is larger than {limit >> 20} MiB")
        parts.append(part)


class Stream:
    """A body that is made while it is sent.

    `chunks` yields bytes; a generator is closed in any case, so its own `finally` does the cleaning up, and while it
    waits for something else than the client it stands in `request.client.when_gone()`. A `primed` stream yields its
    first chunk before the headers go out: an ApiError raised until then is an ordinary error response, later it can only
    break the stream off."""

    def __init__(self, chunks: Iterable[bytes], primed: bool = False):
        self.chunks = iter(chunks)
        self.primed = primed

    def close(self) -> None:
        """End the generator, whether it was begun or not."""
        close = getattr(self.chunks, "close", None)
        if close:
            close()


class Hijack:
    """A body that takes the connection over: `serve(connection)` is called after the 101 (or, where the client asked
    for no upgrade, the 200), and the connection ends with it. `protocol` is what the Upgrade header answers."""

    def __init__(self, serve: Callable[["Connection"], None], protocol: str = "tcp"):
        self.serve = serve
        self.protocol = protocol


class Connection:
    """A hijacked connection: the socket and the bytes that were read before it was taken over."""

    def __init__(self, sock: socket.socket, early: bytes = b""):
        self.sock = sock
        self.early = early

    def recv(self, size: int = 65536) -> bytes:
        """Up to `size` bytes, b"" at the client's end of file (it may still listen)."""
        if self.early:
            data, self.early = self.early[:size], self.early[size:]
            return data
        try:
            return self.sock.recv(size)
        except OSError:
            return b""

    def send(self, *parts: bytes) -> None:
        """Send all parts in order; ClientGone when nobody is there any more."""
        try:
            sent = self.sock.sendmsg(parts)
            total = sum(map(len, parts))
            if sent < total:
                self.sock.sendall(memoryview(b"".join(parts))[sent:])
        except OSError:
            raise ClientGone() from None


class Response:
    """Status, body and headers. A dict or list is sent as JSON, bytes as they are, a Stream chunked, a Hijack takes
    the connection; None has no body."""

    def __init__(self, status: int = 200, body: Any = None, media_type: str = "", headers: Optional[Dict[str, str]] = None):
        self.status = status
        self.body = body
        self.headers = dict(headers or {})
        self.media_type = media_type
        if isinstance(body, (dict, list)):
            self.body = json_bytes(body) + b"\n"
            self.media_type = media_type or "application/json"


def json_bytes(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


###############################################################################
# Routes
###############################################################################


class Route(NamedTuple):
    """A line of the route table; `sample` is a path of it, for README and tests."""

    method: str
    pattern: Any
    handler: Callable[..., Response]
    path: str


ROUTES: List[Route] = []
PLACEHOLDERS = {
    # An image name may have slashes, ports, tags and digests.
    "image": r"(?P<name>.+)",
    "name": r"(?P<name>[^/]+)",
    "id": r"(?P<name>[^/]+)",
}


def route(method: str, path: str):
    """Put the function below into the route table. `{image}`, `{name}` and `{id}` in the path become its argument
    `name`; the API version in front is taken off centrally."""
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda found: PLACEHOLDERS[found.group(1)], path))

    def register(handler):
        ROUTES.append(Route(method, pattern, handler, path))
        return handler

    return register


def split_version(path: str) -> Tuple[Tuple[int, int], str]:
    """('/v1.44/info') -> ((1, 44), '/info'); a path without version is of the newest. 400 with dockerd's words for a
    version out of range."""
    found = re.match(r"/v(\d{1,4})\.(\d{1,4})(?=/)", path)
    if not found:
        return API_NEWEST, path
    version = (int(found.group(1)), int(found.group(2)))
    newest, oldest = ("%d.%d" % API_NEWEST), ("%d.%d" % API_OLDEST)
    asked = "%d.%d" % version
    if version > API_NEWEST:
        raise BadParameter(f"client version {asked} is too new. Maximum supported API version is {newest}")
    if version < API_OLDEST:
        raise BadParameter(
            f"client version {asked} is too old. Minimum supported API version is {oldest}, "
            "please upgrade your client to a newer version"
        )
    return version, path[found.end():]


def find_route(method: str, path: str) -> Tuple[Callable[..., Response], Dict[str, str]]:
    """The handler for a path and its arguments; 404 as dockerd says it, for a method that is not served too."""
    for each in ROUTES:
        if each.method == method:
            found = each.pattern.fullmatch(path)
            if found:
                return each.handler, found.groupdict()
    raise NotFound("page not found")


def dispatch(engine: "Engine", request: Request) -> Response:
    """Answer a request. ApiErrors become error responses here and nowhere else."""
    try:
        handler, arguments = find_route(request.method, request.path)
        return handler(engine, request, **arguments)
    except ApiError as error:
        return error_response(error)


def error_response(error: ApiError) -> Response:
    """{"message": ...} with the status of the error; a 304 has no body."""
    if error.status == 304:
        return Response(304)
    return Response(error.status, {"message": str(error)})


###############################################################################
# nerdctl process
###############################################################################

# What nerdctl says -> what a client is told. The first pattern that is found in the last lines of stderr decides;
# `{0}` is its first group. Words that clients match on are dockerd's. Each line was seen from a real nerdctl.
NERDCTL_ERRORS: List[Tuple[Any, type, str]] = [
    (re.compile(pattern, re.S), kind, words)
    for pattern, kind, words in (
        (r"cannot access containerd socket \"?([^\"\s:]+)", Unavailable,
         "containerd is not running at {0}: start it (systemctl start containerd), or say where it is with --address"),
        (r"(?:connection error|failed to dial|connection refused|error reading server preface).*?(containerd\.sock)", Unavailable,
         "containerd does not answer: see systemctl status containerd"),
        (r"nerdctl is not installed, and", NotImplementedHere, ""),
        (r"rootless containerd not running", Unavailable,
         "rootless containerd is not running: containerd-rootless-setuptool.sh install sets it up"),
        (r"(?:no buildkit host is available|failed to ping to host|buildctl.* executable file not found|"
         r"could not connect to buildkit|listing workers)", Unavailable,
         "buildkitd does not answer: start it with a containerd worker, or say where it is with --buildkit-host"),
        (r"executable file not found in \$PATH", BadParameter, ""),
        (r"permission denied: unknown", BadParameter, ""),
        (r"(?:no such container:? |no container found for: |no running task found for container |container not found: )"
         r"\"?([^\s\"]+)", NotFound, "No such container: {0}"),
        (r"image not available: \"?([^\"\s]+)", NotFound, "No such image: {0}"),
        (r"no such image:? \"?([^\s\"]+)", NotFound, "No such image: {0}"),
        (r"image \"([^\"]+)\": not found", NotFound, "No such image: {0}"),
        (r"no such object:? (\S+)", NotFound, "No such object: {0}"),
        (r"unauthorized|no basic auth credentials|authorization failed|401 Unauthorized", Unauthorized, ""),
        (r"(?:access denied|insufficient_scope|403 Forbidden)", NotFound, ""),
        (r"failed to resolve (?:image|reference)[^\n]*not found", NotFound, ""),
        (r"no network found matching: (\S+)", NotFound, "network {0} not found"),
        (r"volume \"?([^\"\s/]+)\"? is in use", Conflict, "remove {0}: volume is in use"),
        (r"\"([^\"/]+)/volume.json\" does not exist", NotFound, "get {0}: no such volume"),
        (r"volume \"([^\"]+)\": not found", NotFound, "get {0}: no such volume"),
        (r"name \"([^\"]+)\" is already used by ID \"([^\"]*)\"", Conflict,
         'Conflict. The container name "/{0}" is already in use by container "{1}". You have to remove (or rename) that '
         "container to be able to reuse that name."),
        (r"network with name (\S+) already exists", Conflict, "network with name {0} already exists"),
        (r"is in (\w+) status\. unpause/stop container first", Conflict,
         "cannot remove container: container is {0}: stop the container before removing or force remove"),
        (r"conflict: (unable to delete [^\n]*)", Conflict, "conflict: {0}"),
        (r"cannot exec in a (?:stopped|paused)|is not (?:paused|running)|already paused", Conflict, ""),
        (r"bind for :?(\S+) failed: port is already allocated", ApiError, "Bind for {0} failed: port is already allocated"),
        (r"source does not exist|no such file or directory: unknown", NotFound, ""),
        (r"multiple IDs found with provided prefix", BadParameter, ""),
        (r"identifier \"[^\"]*\" must match pattern|invalid filter|invalid reference format|unknown (?:shorthand )?flag", BadParameter, ""),
        (r"no space left on device", ApiError, ""),
    )
]
LOGRUS = re.compile(r'^time="[^"]*" level=(\w+) msg=(?:"((?:[^"\\]|\\.)*)"|(\S+))(?: error="((?:[^"\\]|\\.)*)")?')
LOGRUS_TTY = re.compile(r"^(FATA|ERRO|WARN|INFO|DEBU)\[\d+\] (.*)")
GO_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
SHORT_CALL = 120.0


def parse_logrus(line: str) -> Tuple[str, str]:
    """A line of nerdctl's stderr as (level, message); ("", line) for what is not logrus."""
    found = LOGRUS.match(line)
    if found:
        level, quoted, plain, error = found.groups()
        message = plain if quoted is None else quoted
        if error:
            message = f"{message}: {error}"
        return level, re.sub(r"\\(.)", lambda each: GO_ESCAPES.get(each.group(1), each.group(0)), message)
    found = LOGRUS_TTY.match(line)
    if found:
        return {"FATA": "fatal", "ERRO": "error", "WARN": "warning"}.get(found.group(1), "info"), found.group(2)
    return "", line


def nerdctl_message(stderr: str) -> str:
    """What went wrong, from everything nerdctl wrote on stderr: the fatal line, or the error and warning lines before
    a fatal line that only counts them, or the last line there is."""
    lines = [parse_logrus(line) for line in stderr.splitlines() if line.strip()]
    fatal = [message for level, message in lines if level == "fatal"]
    if fatal and not re.match(r"^(\d+ errors?:?|.*\d+ errors?:)\s*$", fatal[-1].strip()):
        return fatal[-1].strip()
    for wanted in (("error",), ("",), ("warning",)):
        told = [message.strip() for level, message in lines if level in wanted]
        if told:
            return "; ".join(told[-3:])
    return (fatal[-1].strip() if fatal else "") or "nerdctl failed without a word"


def nerdctl_error(stderr: str) -> ApiError:
    """The ApiError for what nerdctl wrote on stderr before it ended with a status other than 0."""
    message = nerdctl_message(stderr)
    for text in (message, stderr[-4096:]):
        for pattern, kind, words in NERDCTL_ERRORS:
            found = pattern.search(text)
            if found:
                return kind(words.format(*found.groups()) if words else message)
    return ApiError(message)


class Output(NamedTuple):
    """What a finished nerdctl left: `status` is the exit status, `stdout` bytes, `stderr` text."""

    status: int
    stdout: bytes
    stderr: str


class Process:
    """A running nerdctl, the leader of a process group of its own. Used as a context: at its end the group is gone and
    reaped, whatever happened. stderr goes to memory that no reader is needed for, unless it was asked for as a pipe."""

    def __init__(self, runner: "Nerdctl", argv: List[str], environment: Dict[str, str], stdin: Any, stdout: Any, stderr: Any,
                 client: Client):
        self.runner = runner
        self.argv = argv
        self.began = time.monotonic()
        self.messages = None
        if stderr is None:
            self.messages = stderr = os.memfd_create("stderr")
        try:
            self.popen = subprocess.Popen(
                argv, stdin=stdin, stdout=stdout, stderr=stderr, env=environment, bufsize=0, start_new_session=True
            )
        except OSError as error:
            if self.messages is not None:
                os.close(self.messages)
            raise runner.missing(error) from None
        self.stdin = self.popen.stdin
        self.stdout = self.popen.stdout
        self.stderr = self.popen.stderr
        runner.processes.add(self)
        self.watch = client.when_gone(self.kill)
        self.watch.__enter__()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, data: Any) -> bool:
        """Write all of `data` to stdin; False when the process no longer reads."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.stdin.fileno(), view):]
        except (OSError, ValueError):
            return False
        return True

    def close_stdin(self) -> None:
        """Tell the process that its input has ended."""
        if self.stdin:
            with contextlib.suppress(OSError):
                self.stdin.close()

    def read(self, size: int = BLOCK) -> bytes:
        """Up to `size` bytes of stdout as soon as there are any; b"" at its end."""
        return os.read(self.stdout.fileno(), size)

    def lines(self, source: Any = None) -> Iterator[str]:
        """The lines of stdout, or of another of its pipes, as they come and without line ends."""
        rest, descriptor = b"", (source or self.stdout).fileno()
        while True:
            data = os.read(descriptor, 65536)
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
        if rest:
            yield rest.decode(errors="replace")

    def wait(self, timeout: Optional[float] = None) -> Optional[int]:
        """The exit status, negative for a signal; None when it still runs after `timeout` seconds."""
        if timeout is not None and self.popen.returncode is None:
            try:
                # Popen.wait(timeout) sleeps in growing steps; a pidfd tells at once.
                descriptor = os.pidfd_open(self.popen.pid)
            except OSError:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self.popen.wait(timeout)
                return None
            try:
                if not poll_readable(descriptor, timeout):
                    return None
            finally:
                os.close(descriptor)
        return self.popen.wait()

    def error_text(self) -> str:
        """Everything written to stderr so far, at most its last 64 KiB."""
        if self.messages is None:
            return ""
        size = os.fstat(self.messages).st_size
        return os.pread(self.messages, 65536, max(0, size - 65536)).decode(errors="replace")

    def check(self) -> None:
        """Wait for the end; raise the ApiError for a status other than 0."""
        if self.wait():
            raise nerdctl_error(self.error_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the whole group, if it is still there."""
        if self.popen.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self.popen.pid, number)

    def close(self) -> None:
        """End what still runs, reap it, close every descriptor."""
        self.watch.__exit__(None, None, None)
        if self.popen.returncode is None and self.popen.poll() is None:
            self.kill(signal.SIGTERM)
            if self.wait(2.0) is None:
                self.kill()
                self.popen.wait()
        for each in (self.stdin, self.stdout, self.stderr):
            if each:
                with contextlib.suppress(OSError):
                    each.close()
        if self.messages is not None:
            self.runner.tell(self)
            os.close(self.messages)
            self.messages = None
        self.runner.processes.discard(self)


def poll_readable(descriptor: int, timeout: Optional[float]) -> bool:
    """Whether a descriptor becomes readable (or ends) within `timeout` seconds. No limit on its number, unlike select."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(None if timeout is None else max(0, int(timeout * 1000))))


class Nerdctl:
    """Runs nerdctl: the only place that starts a process. `command` is the argv in front ("nerdctl", or "lima nerdctl"
    as two words). Short calls wait in a queue for one of a few places; streams have places of their own."""

    def __init__(self, command: List[str], namespace: str = "", address: str = "", snapshotter: str = "",
                 buildkit_host: str = "", debug: bool = False):
        self.command = list(command)
        self.namespace = namespace or "default"
        self.address = address
        self.debug = debug
        # Whether nerdctl's files are files of this machine.
        self.local = len(self.command) == 1 or self.command[0] == sys.executable
        self.options = [f"--namespace={self.namespace}"]
        if address:
            self.options.append(f"--address={address}")
        if snapshotter:
            self.options.append(f"--snapshotter={snapshotter}")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("LISTEN_", "NOTIFY_SOCKET"))}
        if buildkit_host:
            self.environment["BUILDKIT_HOST"] = buildkit_host
        self.places = threading.BoundedSemaphore(max(4, 2 * (os.cpu_count() or 1)))
        self.processes: set = set()

    def missing(self, error: OSError) -> ApiError:
        """The ApiError for a nerdctl that could not be started."""
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
            return Unavailable(
                f"{self.command[0]} cannot be run ({error.strerror}): install nerdctl on PATH, or say where it is with --nerdctl"
            )
        return Unavailable(f"cannot start {self.command[0]}: {error.strerror}")

    def argv(self, arguments: Iterable[str]) -> List[str]:
        """The whole command line; 400 for a word no process can be given."""
        words = [*self.command, *self.options, *arguments]
        for word in words:
            if "\0" in word:
                raise BadParameter("invalid value: it has a NUL byte")
        return words

    def tell(self, process: Process) -> None:
        """Under --debug, log the command with its time."""
        if self.debug:
            took = (time.monotonic() - process.began) * 1000
            log(f"{shlex.join(process.argv)} -> {process.popen.returncode} in {took:.0f} ms")

    def start(self, *arguments: str, stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.PIPE, stderr: Any = None,
              environment: Optional[Dict[str, str]] = None, client: Client = Client()) -> Process:
        """A running process for a stream. stderr None keeps it in memory for check(). It is killed when `client`
        leaves."""
        merged = {**self.environment, **environment} if environment else self.environment
        return Process(self, self.argv(arguments), merged, stdin, stdout, stderr, client)

    def output(self, *arguments: str, data: bytes = b"", timeout: float = SHORT_CALL,
               environment: Optional[Dict[str, str]] = None) -> Output:
        """Run to the end, whatever its status. 503 when no place becomes free or it does not end within `timeout`."""
        if not self.places.acquire(timeout=timeout):
            raise Unavailable("too many nerdctl processes are running")
        try:
            return self._output(arguments, data, timeout, environment)
        finally:
            self.places.release()

    def _output(self, arguments, data, timeout, environment) -> Output:
        stdin: Any = subprocess.DEVNULL
        if data:
            stdin = os.memfd_create("stdin")
            os.write(stdin, data)
            os.lseek(stdin, 0, os.SEEK_SET)
        try:
            process = self.start(*arguments, stdin=stdin, environment=environment)
        finally:
            if data:
                os.close(stdin)
        deadline = time.monotonic() + timeout
        parts = []
        with process:
            while poll_readable(process.stdout.fileno(), deadline - time.monotonic()):
                part = process.read()
                if not part:
                    break
                parts.append(part)
            status = process.wait(max(0.0, deadline - time.monotonic()))
            if status is None:
                raise Unavailable(f"nerdctl {arguments[0]} did not end within {timeout:.0f} seconds")
            return Output(status, b"".join(parts), process.error_text())

    def run(self, *arguments: str, data: bytes = b"", timeout: float = SHORT_CALL,
            environment: Optional[Dict[str, str]] = None) -> Output:
        """Run to the end; the ApiError of the table above for a status other than 0."""
        output = self.output(*arguments, data=data, timeout=timeout, environment=environment)
        if output.status:
            raise nerdctl_error(output.stderr)
        return output

    def rows(self, *arguments: str, timeout: float = SHORT_CALL) -> List[Any]:
        """The JSON values that a command with a `{{json …}}` format prints, one a line."""
        return parse_rows(self.run(*arguments, timeout=timeout).stdout)

    def buildkit_addresses(self) -> List[str]:
        """Where nerdctl looks for buildkitd, in its order."""
        if self.environment.get("BUILDKIT_HOST"):
            return [self.environment["BUILDKIT_HOST"]]
        base = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
        return [f"unix://{base}/{name}/buildkitd.sock" for name in (f"buildkit-{self.namespace}", "buildkit-default", "buildkit")]

    def buildctl(self, *arguments: str, timeout: float = SHORT_CALL) -> Output:
        """Run BuildKit's own client, which nerdctl needs for builds anyway, for what nerdctl has no command for."""
        address = next((each for each in self.buildkit_addresses()
                        if not each.startswith("unix://") or os.path.exists(each[len("unix://"):])), self.buildkit_addresses()[-1])
        other = Nerdctl(["buildctl", f"--addr={address}"])
        other.options, other.places, other.processes, other.debug = [], self.places, self.processes, self.debug
        return other.output(*arguments, timeout=timeout)

    def end_all(self) -> None:
        """End every process that is still running."""
        for process in list(self.processes):
            process.kill(signal.SIGTERM)
        deadline = time.monotonic() + 2.0
        for process in list(self.processes):
            if process.wait(max(0.0, deadline - time.monotonic())) is None:
                process.kill()


def parse_rows(data: bytes) -> List[Any]:
    """One JSON value a line; 500 for anything else, since it means a nerdctl that this file does not know."""
    rows = []
    for line in data.splitlines():
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise ApiError(f"nerdctl printed what is not JSON: {line[:80].decode(errors='replace')!r}") from None
    return rows


class Workspace:
    """Where temporary files live: one private folder, named after the process, made when first needed. What a killed
    daemon left behind is removed at the start of the next."""

    PREFIX = "nerdctld-"

    def __init__(self) -> None:
        self.path = ""
        self.lock = threading.Lock()

    def folder(self) -> str:
        """The folder of this process."""
        with self.lock:
            if not self.path:
                self.path = tempfile.mkdtemp(prefix=f"{self.PREFIX}{os.getpid()}-")
            return self.path

    @contextlib.contextmanager
    def temporary(self, kind: str) -> Iterator[str]:
        """A new folder, 0700, that is gone at the end."""
        path = tempfile.mkdtemp(prefix=kind + "-", dir=self.folder())
        try:
            yield path
        finally:
            remove_tree(path)

    @contextlib.contextmanager
    def docker_config(self, auths: Dict[str, Dict[str, str]]) -> Iterator[Dict[str, str]]:
        """The environment of one nerdctl call with these credentials, in a config.json that only it is shown."""
        with self.temporary("auth") as path:
            descriptor = os.open(os.path.join(path, "config.json"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(json_bytes({"auths": auths}))
            yield {"DOCKER_CONFIG": path}

    def sweep(self) -> None:
        """Remove the folders of processes of this user that no longer run."""
        root = tempfile.gettempdir()
        for name in os.listdir(root):
            found = re.fullmatch(re.escape(self.PREFIX) + r"(\d+)-\w+", name)
            if found and not os.path.exists(f"/proc/{found.group(1)}"):
                path = os.path.join(root, name)
                with contextlib.suppress(OSError):
                    if os.lstat(path).st_uid == os.getuid():
                        remove_tree(path)

    def remove(self) -> None:
        """Remove the folder of this process."""
        if self.path:
            remove_tree(self.path)


def remove_tree(path: str) -> None:
    """Remove a folder with everything in it, also where a build context has folders that may not be written."""
    def make_writable(function, name, _):
        with contextlib.suppress(OSError):
            os.chmod(os.path.dirname(name), 0o700)
            os.chmod(name, 0o700)
            function(name)

    # Python 3.12 has another name for it.
    shutil.rmtree(path, **{"onexc" if sys.version_info >= (3, 12) else "onerror": make_writable})


###############################################################################
# Conversions
###############################################################################

ZERO_TIME = "0001-01-01T00:00:00Z"
TIMESTAMP = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9})\d*)?)?\s*(Z|UTC|[+-]\d\d:?\d\d)?(?: [A-Z]{1,5})?")
SIZE_UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}


def nanoseconds_of(text: str) -> Optional[int]:
    """Nanoseconds since 1970 of RFC 3339 or Go's `2026-11-23 19:00:00.1 +0000 UTC`; None for what is neither."""
    found = TIMESTAMP.fullmatch(text.strip())
    if not found:
        return None
    year, month, day, hour, minute, second = (int(each or 0) for each in found.groups()[:6])
    if not (1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60 and second < 61 and year):
        return None
    seconds = calendar.timegm((year, month, day, hour, minute, second))
    zone = found.group(8)
    if zone and zone[0] in "+-":
        offset = int(zone[1:3]) * 3600 + int(zone[-2:]) * 60
        seconds += offset if zone[0] == "-" else -offset
    return seconds * 10**9 + int((found.group(7) or "0").ljust(9, "0"))


def seconds_of(text: str) -> Optional[float]:
    """Seconds since 1970 of a timestamp as nanoseconds_of() reads it."""
    nanoseconds = nanoseconds_of(text)
    return None if nanoseconds is None else nanoseconds / 1e9


def rfc3339(nanoseconds: Optional[int]) -> str:
    """`2026-11-23T19:00:00.123456789Z`, the zero time for None."""
    if nanoseconds is None:
        return ZERO_TIME
    seconds, rest = divmod(nanoseconds, 10**9)
    fraction = f".{rest:09d}".rstrip("0") if rest else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


def size_bytes(text: str) -> int:
    """Bytes of `12.5MB`, `1.2 GiB`, `512`; 0 for what is no size."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?i?)b?\s*", text.lower())
    if not found:
        return 0
    try:
        return int(float(found.group(1)) * SIZE_UNITS[found.group(2)])
    except (ValueError, KeyError):
        return 0


def human_duration(seconds: float) -> str:
    """A duration as `docker ps` words it: `About a minute`, `5 hours`."""
    whole = int(seconds)
    if whole < 1:
        return "Less than a second"
    if whole == 1:
        return "1 second"
    if whole < 60:
        return f"{whole} seconds"
    minutes = whole // 60
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = int(seconds / 3600 + 0.5)
    if hours == 1:
        return "About an hour"
    for limit, unit, name in ((48, 1, "hours"), (24 * 7 * 2, 24, "days"), (24 * 30 * 2, 24 * 7, "weeks"), (24 * 365 * 2, 24 * 30, "months")):
        if hours < limit:
            return f"{hours // unit} {name}"
    return f"{hours // 24 // 365} years"


def match_labels(labels: Dict[str, str], wanted: Iterable[str]) -> bool:
    """Whether labels satisfy every `key` and `key=value` of a label filter."""
    for each in wanted:
        key, equals, value = each.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


def match_any(value: str, wanted: Iterable[str]) -> bool:
    """Whether a name satisfies a name filter, which Docker reads as regular expressions found anywhere in it."""
    for each in wanted:
        try:
            if re.search(each, value):
                return True
        except re.error:
            if each in value:
                return True
    return False


def typed(value: Any, kind: type, what: str) -> Any:
    """`value` if it is of the JSON type asked for, an empty one for null; 400 otherwise."""
    if value is None:
        return kind()
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {dict: "an object", list: "an array", str: "a string", int: "a number", bool: "a boolean"}
        raise BadParameter(f"invalid JSON: {what} must be {names[kind]}")
    return value


def string_list(value: Any, what: str) -> List[str]:
    """A JSON array of strings, [] for null; a lone string is taken as a list of one, as Docker does; 400 otherwise."""
    if isinstance(value, str):
        return [value]
    return [typed(each, str, what) for each in typed(value, list, what)]


def string_map(value: Any, what: str) -> Dict[str, str]:
    """A JSON object of strings, {} for null; 400 otherwise."""
    return {key: typed(each, str, what) for key, each in typed(value, dict, what).items()}


###############################################################################
# Events
###############################################################################


class ContainerdEvent(NamedTuple):
    """One event of containerd in our namespace; `time` in nanoseconds since 1970, `payload` the event's own fields."""

    topic: str
    time: int
    payload: Dict[str, Any]

    @property
    def container(self) -> str:
        """The id of the container it is about, "" for none."""
        if self.topic.startswith("/containers/"):
            return self.payload.get("id") or ""
        return self.payload.get("container_id") or ""


def parse_event(line: str, namespace: str) -> Optional[ContainerdEvent]:
    """A line of `nerdctl events --format {{json .}}`; None for an empty line and for other namespaces."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
        if row.get("Namespace") != namespace:
            return None
        payload = json.loads(row.get("Event") or "{}") or {}
        return ContainerdEvent(row["Topic"], nanoseconds_of(row.get("Timestamp") or "") or time.time_ns(), payload)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


class EventFeed:
    """The one resident `nerdctl events`: running while somebody needs it, and for a while after the last read.

    Listeners are called in its thread, in order, with each ContainerdEvent, and with None when the feed begins or
    breaks, which means that anything may have happened."""

    # nerdctl says nothing when it has subscribed. It needs 30 ms on an idle machine; until this many seconds have
    # passed, nothing is believed to be covered by the feed.
    SETTLE = 0.5
    LINGER = 60.0

    def __init__(self, nerdctl: Nerdctl):
        self.nerdctl = nerdctl
        self.lock = threading.Lock()
        self.listeners: List[Callable[[Optional[ContainerdEvent]], None]] = []
        self.needs = 0
        self.until = 0.0
        self.thread: Optional[threading.Thread] = None
        self.process: Optional[Process] = None
        self.live_from = float("inf")
        self.closed = False

    @property
    def live(self) -> bool:
        """Whether every change since now would be told."""
        return time.monotonic() >= self.live_from

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """Context in which the feed runs."""
        with self.lock:
            self.needs += 1
        try:
            self.keep()
            yield
        finally:
            with self.lock:
                self.needs -= 1
                self.until = time.monotonic() + self.LINGER

    def keep(self) -> None:
        """Start the feed, or keep it for a while."""
        self.until = time.monotonic() + self.LINGER
        if self.thread is None:
            with self.lock:
                if self.thread is None and not self.closed:
                    self.thread = threading.Thread(target=self._run, name="events", daemon=True)
                    self.thread.start()

    def wait_live(self, timeout: float = 5.0) -> bool:
        """Wait until the feed covers what happens from now on; whether it does."""
        self.keep()
        deadline = time.monotonic() + timeout
        while not self.live and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.live

    def wanted(self) -> bool:
        """Whether somebody needs the feed or read not long ago."""
        return not self.closed and (self.needs > 0 or time.monotonic() < self.until)

    def close(self) -> None:
        """End the feed for good."""
        self.closed = True
        if self.process:
            self.process.kill(signal.SIGTERM)

    def _run(self) -> None:
        pause = 0.2
        while True:
            began = time.monotonic()
            try:
                self._follow()
            except ApiError as error:
                if self.nerdctl.debug:
                    log(f"events: {error}")
            except OSError as error:
                log(f"events: {error}")
            self.live_from = float("inf")
            self._tell(None)
            pause = 0.2 if time.monotonic() - began > 10 else min(5.0, pause * 2)
            with self.lock:
                if not self.wanted():
                    self.thread = None
                    return
            time.sleep(pause)

    def _follow(self) -> None:
        """Run nerdctl events once, to its end or until nobody wants it."""
        with self.nerdctl.start("events", "--format", "{{json .}}") as process:
            self.process = process
            try:
                self._tell(None)
                self.live_from = time.monotonic() + self.SETTLE
                rest = b""
                settled = False
                while self.wanted():
                    if not settled and self.live:
                        # What happened while nerdctl subscribed was perhaps not told.
                        settled = True
                        self._tell(None)
                    if not poll_readable(process.stdout.fileno(), 1.0 if settled else 0.1):
                        continue
                    data = process.read(65536)
                    if not data:
                        process.check()
                        return
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        event = parse_event(line.decode(errors="replace"), self.nerdctl.namespace)
                        if event:
                            self._tell(event)
            finally:
                self.process = None

    def _tell(self, event: Optional[ContainerdEvent]) -> None:
        for listener in list(self.listeners):
            try:
                listener(event)
            except Exception:
                log(traceback.format_exc())


class Journal:
    """Docker's events: the last of them, and everyone who listens. dockerd keeps 256."""

    KEPT = 256

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.history: collections.deque = collections.deque(maxlen=self.KEPT)
        self.queues: List[queue.Queue] = []

    def emit(self, kind: str, action: str, identity: str, attributes: Dict[str, str], when: Optional[int] = None) -> None:
        """Tell an event: `kind` is container, image, network, volume, builder or daemon; `when` nanoseconds since 1970."""
        when = when or time.time_ns()
        event = {
            "Type": kind, "Action": action, "Actor": {"ID": identity, "Attributes": dict(attributes)},
            "scope": "local", "time": when // 10**9, "timeNano": when,
        }
        with self.lock:
            self.history.append(event)
            for each in self.queues:
                each.put(event)

    @contextlib.contextmanager
    def subscribe(self) -> Iterator[Tuple[List[dict], queue.Queue]]:
        """What is kept, oldest first, and a queue of everything after it. None in the queue means the end."""
        mine: queue.Queue = queue.Queue()
        with self.lock:
            self.queues.append(mine)
            kept = list(self.history)
        try:
            yield kept, mine
        finally:
            with self.lock:
                self.queues.remove(mine)

    def close(self) -> None:
        """Tell everyone the end."""
        with self.lock:
            for each in self.queues:
                each.put(None)


###############################################################################
# Snapshot
###############################################################################

# Labels of ours on a container: never shown to clients. The id that clients know a container by, where that is not
# containerd's (a container that was made anew); the create request, in parts of less than 4096 bytes.
LABEL_ID = "nerdctld/id"
LABEL_REQUEST = "nerdctld/request"
HIDDEN_LABELS = ("nerdctl/", "nerdctld/", "containerd.io/restart.", "io.containerd.image.config.")


class Cached:
    """A value read from nerdctl, kept while `trusted()` and nobody has called drop(). One reader at a time; those who
    came before it began share what it reads."""

    def __init__(self, read: Callable[[], Any], trusted: Callable[[], bool], stamp: Callable[[], Any] = lambda: None):
        self.read = read
        self.trusted = trusted
        self.stamp = stamp
        self.lock = threading.Lock()
        self.value: Any = None
        self.valid = False
        self.began = 0.0
        self.stamped: Any = None

    def drop(self) -> None:
        """What is kept is no longer so. Called after a change, also while a read is under way."""
        self.valid = False

    def fresh(self) -> bool:
        """Whether what is kept may be given out."""
        return self.valid and self.trusted() and self.stamped == self.stamp()

    def get(self, asked: Optional[float] = None) -> Any:
        """The value as it is now, or as it was after `asked` (time.monotonic, default now)."""
        if self.fresh():
            return self.value
        asked = asked or time.monotonic()
        with self.lock:
            if self.fresh() or (self.valid and self.began > asked):
                return self.value
            # Before the read: a drop() during it must win.
            self.began = time.monotonic()
            self.stamped = self.stamp()
            self.valid = True
            try:
                self.value = self.read()
            except BaseException:
                self.valid = False
                raise
            return self.value


class Container:
    """A container as `nerdctl ps` tells it. `id` is what clients know it by, `real` what nerdctl is given; `created` in
    nanoseconds since 1970; `labels` all of them, nerdctl's own too."""

    __slots__ = ("id", "real", "name", "image", "command", "created", "status", "ports", "runtime", "platform", "labels", "memo", "read_at")

    def __init__(self, row: Dict[str, Any], labels: Dict[str, str]):
        self.real = row["ID"]
        self.labels = labels or {}
        self.id = self.labels.get(LABEL_ID) or self.real
        self.name = row.get("Names") or self.labels.get("nerdctl/name") or ""
        self.image = row.get("Image") or ""
        self.command = row.get("Command") or ""
        self.created = nanoseconds_of(row.get("CreatedAt") or "") or 0
        self.status = row.get("Status") or ""
        self.ports = row.get("Ports") or ""
        self.runtime = row.get("Runtime") or ""
        self.platform = row.get("Platform") or ""
        self.read_at = time.time()
        # What handlers worked out from this row; gone with it.
        self.memo: Dict[str, Any] = {}

    @property
    def running(self) -> bool:
        """Whether it has a task that runs or is paused."""
        return self.status.startswith(("Up", "Paused", "Pausing"))

    @property
    def state(self) -> str:
        """created, running, paused, restarting, exited or dead."""
        word = self.status.split(" ")[0].lower()
        return {"up": "running", "pausing": "paused", "unknown": "dead", "stopped": "exited"}.get(word, word or "created")

    @property
    def visible_labels(self) -> Dict[str, str]:
        """The labels a client set."""
        return {key: value for key, value in self.labels.items() if not key.startswith(HIDDEN_LABELS)}

    @property
    def folder(self) -> str:
        """Where nerdctl keeps what belongs to it (log, hosts, lifecycle), "" when unknown."""
        return self.labels.get("nerdctl/state-dir") or ""


CONTAINER_ROW = "[{{json .}},{{json .LabelsMap}}]"


def parse_containers(rows: List[Any]) -> Dict[str, Container]:
    """Rows of `ps --no-trunc --format CONTAINER_ROW` as real id -> Container, newest first."""
    return {row["ID"]: Container(row, labels) for row, labels in rows if row.get("ID")}


class ContainerTable:
    """All containers by real id. Containers that events or writes named are read anew one by one, or all together when
    that is cheaper."""

    FEW = 1

    def __init__(self, nerdctl: Nerdctl, feed: EventFeed):
        self.nerdctl = nerdctl
        self.feed = feed
        self.changed: set = set()
        self.whole = Cached(self._read_all, lambda: feed.live)
        self.lock = threading.Lock()

    def drop(self, real: str = "") -> None:
        """One container is no longer as it was, or any may be."""
        if real:
            self.changed.add(real)
        else:
            self.whole.drop()

    def get(self) -> Dict[str, Container]:
        """All containers as they are now, by real id, newest first."""
        self.feed.keep()
        if not self.changed and self.whole.fresh():
            return self.whole.value
        asked = time.monotonic()
        with self.lock:
            if len(self.changed) > self.FEW:
                self.whole.drop()
            table = self.whole.get(asked)
            while self.changed:
                real = self.changed.pop()
                try:
                    table = self._read_one(table, real)
                except BaseException:
                    self.whole.drop()
                    raise
                self.whole.value = table
            return table

    def _read_all(self) -> Dict[str, Container]:
        self.changed.clear()
        return parse_containers(self.nerdctl.rows("ps", "-a", "--no-trunc", "--format", CONTAINER_ROW))

    def _read_one(self, table: Dict[str, Container], real: str) -> Dict[str, Container]:
        rows = self.nerdctl.rows("ps", "-a", "--no-trunc", "--filter", "id=" + real, "--format", CONTAINER_ROW)
        found = parse_containers(rows).get(real)
        result = dict(table)
        if found is None:
            result.pop(real, None)
        elif real in result:
            result[real] = found
        else:
            result = dict(sorted({**result, real: found}.items(), key=lambda item: -item[1].created))
        return result


class Image(NamedTuple):
    """One name of an image as `nerdctl images` tells it: `name` in full, with registry and tag or digest, as
    containerd has it; `id` the digest of its target, which is the id clients see."""

    name: str
    id: str
    created: int
    size: int
    platform: str


def modified(*paths: str) -> Tuple:
    """A stamp of files and folders, the same as long as nobody has written to them; None in it for a missing one."""
    stamps = []
    for path in paths:
        try:
            status = os.stat(path)
            stamps.append((status.st_mtime_ns, status.st_ino, status.st_size))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


INSPECT_FORMAT = (
    '{"ID":{{json .ID}},"Labels":{{json .Labels}},"Image":{{json .Image}},"CreatedAt":{{json .CreatedAt}},'
    '"Snapshotter":{{json .Snapshotter}},"Runtime":{{json .Runtime.Name}},"Task":{{json .Process}},'
    '"Spec":{{with .Spec}}{"process":{{json .Process}},"root":{{json .Root}},"hostname":{{json .Hostname}},'
    '"mounts":{{json .Mounts}},{{with .Linux}}"resources":{{json .Resources}},"namespaces":{{json .Namespaces}},'
    '"sysctl":{{json .Sysctl}},"cgroupsPath":{{json .CgroupsPath}},"maskedPaths":{{json .MaskedPaths}},'
    '"readonlyPaths":{{json .ReadonlyPaths}},"devices":{{json .Devices}},{{end}}"domainname":{{json .Domainname}}}'
    "{{else}}null{{end}}}"
)


def familiar(name: str) -> str:
    """`docker.io/library/busybox:1` as people write it: `busybox:1`."""
    for prefix in ("docker.io/library/", "docker.io/"):
        if name.startswith(prefix):
            return name[len(prefix):]
    return name


class Reference(NamedTuple):
    """An image reference taken apart: `repository` in full (`docker.io/library/busybox`), `tag` and `digest` or ""."""

    repository: str
    tag: str
    digest: str

    @property
    def name(self) -> str:
        """The whole reference, as containerd names images."""
        return self.repository + (":" + self.tag if self.tag else "") + ("@" + self.digest if self.digest else "")


REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
DOMAIN = re.compile(r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])(?:\.[a-zA-Z0-9-]+)*(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?")
TAG = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
DIGEST = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}")


def parse_reference(text: str, default_tag: str = "latest") -> Reference:
    """`busybox`, `host:5000/a/b:1`, `x@sha256:…` in full, with `default_tag` where there is neither tag nor digest.
    400 for what is no reference, so also for everything that begins with a dash."""
    rest, _, digest = text.partition("@")
    tag = ""
    head, colon, tail = rest.rpartition(":")
    if colon and "/" not in tail:
        rest, tag = head, tail
        if not TAG.fullmatch(tag):
            raise BadParameter("invalid reference format")
    if digest and not DIGEST.fullmatch(digest):
        raise BadParameter("invalid reference format")
    domain, slash, path = rest.partition("/")
    if not slash or not ("." in domain or ":" in domain or domain == "localhost" or domain.lower() != domain):
        domain, path = "docker.io", rest
    if domain == "index.docker.io":
        domain = "docker.io"
    if domain == "docker.io" and "/" not in path:
        path = "library/" + path
    if not DOMAIN.fullmatch(domain) or not REPOSITORY.fullmatch(path) or len(domain) + len(path) > 254:
        if path.lower() != path and REPOSITORY.fullmatch(path.lower()):
            raise BadParameter(f"invalid reference format: repository name ({path}) must be lowercase")
        raise BadParameter("invalid reference format")
    return Reference(f"{domain}/{path}", tag or ("" if digest else default_tag), digest)


def parse_images(rows: List[Any]) -> List[Image]:
    """Rows of `images --no-trunc --format {{json .}}`: one Image a name (nerdctl prints one a platform)."""
    found: Dict[str, Image] = {}
    for row in rows:
        name = row.get("Name") or f"{row.get('Repository')}:{row.get('Tag')}"
        if name == ":":
            # What nerdctl leaves of an image that was removed by force under a running container.
            continue
        found.setdefault(name, Image(
            name, row.get("Digest") or row.get("ID") or "", (nanoseconds_of(row.get("CreatedAt") or "") or 0) // 10**9,
            size_bytes(row.get("Size") or ""), row.get("Platform") or ""))
    return list(found.values())


# Names that stand for none: of nerdctl's load, of BuildKit, of Kubernetes (`sha256:…`, the digest of the configuration), and
# our own for imports and commits without one. containerd keeps no image without a name.
WORKING_NAME = "nerdctld.invalid/"
NAMELESS = (WORKING_NAME, "import/", "moby-dangling/", "sha256:", "sha256/")


class ImageGroup:
    """All names of one image. `id` is the digest of its target (an index or a manifest), as in dockerd's containerd
    store; `detail` what `image inspect --mode=native` tells of it, {} where its content is not at hand."""

    __slots__ = ("id", "names", "detail")

    def __init__(self, identity: str):
        self.id = identity
        self.names: List[str] = []
        self.detail: Dict[str, Any] = {}

    @property
    def repo_tags(self) -> List[str]:
        """Names with a tag, as people write them."""
        return [familiar(name) for name in self.names
                if "@" not in name and ":" in name.rpartition("/")[2] and not name.startswith(NAMELESS)]

    @property
    def repo_digests(self) -> List[str]:
        """One `repository@digest` for each repository it has a name in."""
        found = {}
        for name in self.names:
            repository = name.partition("@")[0]
            head, colon, tail = repository.rpartition(":")
            repository = head if colon and "/" not in tail else repository
            if not (repository + "/").startswith(NAMELESS):
                found[f"{familiar(repository)}@{self.id}"] = None
        return list(found)

    @property
    def config(self) -> Dict[str, Any]:
        """The image's configuration file, {} when unknown."""
        return self.detail.get("ImageConfig") or {}

    @property
    def labels(self) -> Dict[str, str]:
        """The labels of the image."""
        return (self.config.get("config") or {}).get("Labels") or {}

    @property
    def digests(self) -> List[str]:
        """Every digest the image answers to: of its target, its manifest and its configuration."""
        told = [(self.detail.get(key) or {}).get("digest") for key in ("ManifestDesc", "ImageConfigDesc")]
        return [self.id, *(each for each in told if each)]


def made_up_id(name: str) -> str:
    """A stable id for what nerdctl gives none: host, none, and networks of other CNI users."""
    return hashlib.sha256(f"nerdctld network {name}".encode()).hexdigest()


def parse_network(row: Dict[str, Any]) -> Dict[str, Any]:
    """A row of `network inspect --mode=native` as Docker shows a network, without its members."""
    native = row.get("CNI") or {}
    name, plugin = native.get("name") or "", (native.get("plugins") or [{}])[0]
    driver = {"host": "host", "none": "null"}.get(name) or plugin.get("type") or "bridge"
    labels = row.get("NerdctlLabels") or native.get("nerdctlLabels") or {}
    config = []
    for each in itertools.chain.from_iterable((plugin.get("ipam") or {}).get("ranges") or []):
        entry = {"Subnet": each.get("subnet") or "", "Gateway": each.get("gateway") or "", "IPRange": labels.get("nerdctld/ip-range") or ""}
        config.append({key: value for key, value in entry.items() if value and (key != "IPRange" or ":" not in entry["Subnet"])})
    options = {}
    with contextlib.suppress(ValueError):
        options = json.loads(labels.get("nerdctld/options") or "{}")
    if name == "bridge":
        options = {"com.docker.network.bridge.default_bridge": "true", "com.docker.network.bridge.name": plugin.get("bridge") or "nerdctl0"}
    return {
        "Name": name, "Id": row.get("NerdctlID") or made_up_id(name), "Created": file_time(row.get("File") or ""), "Scope": "local",
        "Driver": driver, "EnableIPv4": True, "EnableIPv6": any(":" in each.get("Subnet", "") for each in config),
        "IPAM": {"Driver": "default", "Options": None if name in ("bridge", "host", "none") else {}, "Config": config or None},
        "Internal": driver == "bridge" and plugin.get("isGateway") is False, "Attachable": False, "Ingress": False,
        "ConfigFrom": {"Network": ""}, "ConfigOnly": False, "Options": options,
        "Labels": {key: value for key, value in labels.items() if not key.startswith(HIDDEN_LABELS)},
    }


def parse_volume(row: Dict[str, Any]) -> Dict[str, Any]:
    """A row of `volume inspect` as Docker shows a volume."""
    labels, options = row.get("Labels") or {}, None
    with contextlib.suppress(ValueError):
        options = json.loads(labels.get("nerdctld/options") or "null")
    mountpoint = row.get("Mountpoint") or ""
    return {
        "CreatedAt": row.get("CreatedAt") or file_time(os.path.join(os.path.dirname(mountpoint), "volume.json")), "Driver": "local",
        "Labels": {key: value for key, value in labels.items() if not key.startswith(HIDDEN_LABELS)} or None, "Mountpoint": mountpoint,
        "Name": row.get("Name") or "", "Options": options, "Scope": "local",
    }


def file_time(path: str) -> str:
    """When a file was last written, to the second: nerdctl notes no time of making for networks and volumes. The zero
    time for a file that cannot be seen from here."""
    try:
        return rfc3339(int(os.stat(path).st_mtime) * 10**9)
    except OSError:
        return ZERO_TIME


def cni_folder() -> str:
    """Where nerdctl keeps networks, for the user this daemon runs as."""
    if os.geteuid() == 0:
        return "/etc/cni/net.d"
    return os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "cni/net.d")


def data_root() -> str:
    """Where nerdctl keeps its data, for the user this daemon runs as."""
    if os.geteuid() == 0:
        return "/var/lib/nerdctl"
    return os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "nerdctl")


class Snapshot:
    """What reads are answered from: filled from nerdctl when asked, dropped by events and by our own writes. Nothing is
    kept while the event feed is not live."""

    AGE = 5.0

    def __init__(self, nerdctl: Nerdctl, feed: EventFeed):
        self.nerdctl = nerdctl
        self.feed = feed
        self.containers = ContainerTable(nerdctl, feed)
        self.names = Cached(self._read_images, lambda: feed.live)
        self.groups = Cached(self._group_images, lambda: feed.live and self.names.fresh())
        self.details: Dict[str, Dict[str, Any]] = {}
        self.version = Cached(self._read_version, self._recent)
        self.info = Cached(self._read_info, self._recent)
        self.aged = 0.0
        self.networks = Cached(self._read_networks, lambda: True, self._network_stamp)
        self.volumes = Cached(self._read_volumes, lambda: True, self._volume_stamp)

    def _network_stamp(self) -> Any:
        """Changes whenever nerdctl beside us changes a network; never the same twice where that cannot be seen."""
        folder = cni_folder()
        stamp = modified(folder, os.path.join(folder, self.nerdctl.namespace))
        return stamp if stamp[0] and self.nerdctl.local else object()

    def _volume_stamp(self) -> Any:
        """The same for volumes. nerdctl's folder has the hash of containerd's address in its name."""
        address = self.nerdctl.address.replace("unix://", "", 1) or "/run/containerd/containerd.sock"
        store = hashlib.sha256(os.path.realpath(address).encode()).hexdigest()[:8]
        stamp = modified(os.path.join(data_root(), store, "volumes", self.nerdctl.namespace))
        return stamp if stamp[0] and self.nerdctl.local else object()

    def _read_networks(self) -> Dict[str, Dict[str, Any]]:
        """Docker-shaped networks by name; bridge, host and none are always among them."""
        names = [row["Name"] for row in self.nerdctl.rows("network", "ls", "--format", "{{json .}}") if row.get("Name")]
        found: Dict[str, Dict[str, Any]] = {}
        if names:
            output = self.nerdctl.run("network", "inspect", "--mode=native", "--format", "{{json .}}", "--", *names)
            found = {each["Name"]: each for each in map(parse_network, parse_rows(output.stdout))}
        for name in ("bridge", "host", "none"):
            found.setdefault(name, parse_network({"CNI": {"name": name}}))
        return {name: found[name] for name in sorted(found)}

    def _read_volumes(self) -> Dict[str, Dict[str, Any]]:
        """Docker-shaped volumes by name."""
        names = [row["Name"] for row in self.nerdctl.rows("volume", "ls", "--format", "{{json .}}") if row.get("Name")]
        if not names:
            return {}
        output = self.nerdctl.run("volume", "inspect", "--format", "{{json .}}", "--", *names)
        return {each["Name"]: each for each in map(parse_volume, parse_rows(output.stdout))}

    # What sends no event is believed for a short time.
    def _recent(self) -> bool:
        return time.monotonic() - self.aged < self.AGE

    def _read_version(self) -> Dict[str, Any]:
        self.aged = time.monotonic()
        rows = self.nerdctl.rows("version", "--format", "{{json .}}", timeout=10)
        return rows[0] if rows else {}

    def _read_info(self) -> Dict[str, Any]:
        self.aged = time.monotonic()
        rows = self.nerdctl.rows("info", "--format", "{{json .}}", timeout=20)
        return rows[0] if rows else {}

    def _read_images(self) -> List[Image]:
        return parse_images(self.nerdctl.rows("images", "--no-trunc", "--format", "{{json .}}"))

    def _group_images(self) -> Dict[str, ImageGroup]:
        groups: Dict[str, ImageGroup] = {}
        for image in self.names.get():
            groups.setdefault(image.id, ImageGroup(image.id)).names.append(image.name)
        self._read_details([group for identity, group in groups.items() if identity not in self.details])
        self.details = {identity: self.details[identity] for identity in groups if identity in self.details}
        for identity, group in groups.items():
            group.detail = self.details.get(identity, {})
        return groups

    def _read_details(self, groups: List[ImageGroup]) -> None:
        """What is behind a digest never changes, so it is read once."""
        for start in range(0, len(groups), 50):
            part = groups[start:start + 50]
            found = self._inspect_images([group.names[0] for group in part])
            missing = [group for group in part if group.id not in found]
            if missing and len(part) > 1:
                for group in missing:
                    found.update(self._inspect_images(group.names[:1]))
            self.details.update(found)

    def _inspect_images(self, names: List[str]) -> Dict[str, Dict[str, Any]]:
        output = self.nerdctl.output("image", "inspect", "--mode=native", "--format", "{{json .}}", "--", *names)
        found: Dict[str, Dict[str, Any]] = {}
        for line in output.stdout.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                found[entry["Image"]["Target"]["digest"]] = entry
        return found

    def on_event(self, event: Optional[ContainerdEvent]) -> None:
        """Drop what an event of containerd makes untrue; everything when the feed begins or breaks."""
        if event is None:
            self.containers.drop()
            self.names.drop()
        elif event.topic.startswith("/images/"):
            self.names.drop()
        elif event.container and not event.topic.startswith("/tasks/exec-"):
            if event.topic != "/tasks/exit" or event.payload.get("id") in (None, "", event.container):
                self.containers.drop(event.container)

    def image_groups(self) -> Dict[str, ImageGroup]:
        """All images by id."""
        self.feed.keep()
        return self.groups.get()

    def image(self, name: str) -> ImageGroup:
        """The image of a name, a digest, an id or the beginning of one; 404 with dockerd's words."""
        groups = self.image_groups()
        with contextlib.suppress(BadParameter):
            wanted = parse_reference(name)
            for group in groups.values():
                if wanted.name in group.names:
                    return group
                if wanted.digest and wanted.digest in group.digests and any(
                        each.startswith((wanted.repository + ":", wanted.repository + "@")) for each in group.names):
                    return group
        prefix = name.partition(":")[2] if name.startswith("sha256:") else name
        if re.fullmatch(r"[0-9a-f]{1,64}", prefix):
            found = [group for group in groups.values() if any(each.startswith("sha256:" + prefix) for each in group.digests)]
            exact = [group for group in found if group.id.startswith("sha256:" + prefix)] or found
            if len(exact) == 1:
                return exact[0]
            if exact:
                raise BadParameter(f"ambiguous image ID prefix: {name}")
        raise NotFound(f"No such image: {with_tag(name)}")

    def container(self, name: str) -> Container:
        """The container of an id, a name, `/name` or the beginning of an id; 404 and 400 with dockerd's words."""
        wanted = name.lstrip("/")
        if not wanted:
            raise BadParameter("invalid container name or ID: value is empty")
        prefixed = []
        for each in self.containers.get().values():
            if wanted in (each.id, each.name, each.real):
                return each
            if each.id.startswith(wanted):
                prefixed.append(each)
        if len(prefixed) == 1:
            return prefixed[0]
        if prefixed:
            raise BadParameter(f"multiple IDs found with provided prefix: {wanted}")
        raise NotFound(f"No such container: {wanted}")

    def detail(self, container: Container) -> Dict[str, Any]:
        """The native inspect of a container, shaped by INSPECT_FORMAT."""
        if "detail" not in container.memo:
            rows = self.nerdctl.rows("container", "inspect", "--mode=native", "--format", INSPECT_FORMAT, "--", container.real)
            if not rows:
                raise NotFound(f"No such container: {container.id}")
            container.memo["detail"] = rows[0]
        return container.memo["detail"]


def with_tag(name: str) -> str:
    """A name as dockerd repeats it when there is no such image: with its tag, ids as they are."""
    try:
        reference = parse_reference(name)
    except BadParameter:
        return name
    if re.fullmatch(r"(sha256:)?[0-9a-f]{12,64}", name):
        return name
    return familiar(reference.name)


###############################################################################
# Engine
###############################################################################


class Engine:
    """What handlers share: nerdctl, the event feed, Docker's events and the snapshot."""

    def __init__(self, nerdctl: Nerdctl):
        self.nerdctl = nerdctl
        self.workspace = Workspace()
        self.feed = EventFeed(nerdctl)
        self.journal = Journal()
        self.snapshot = Snapshot(nerdctl, self.feed)
        self.started = time.time()
        self.quiet: collections.Counter = collections.Counter()
        self.known: Dict[str, Tuple[str, Dict[str, str]]] = {}
        self.begun: Dict[str, int] = {}
        self.feed.listeners.append(self.snapshot.on_event)
        self.feed.listeners.append(self.on_event)

    def busy(self) -> bool:
        """Whether something depends on the daemon although no request is running."""
        return self.feed.needs > 0

    def close(self) -> None:
        """End everything that was started and remove every temporary file."""
        self.journal.close()
        self.feed.close()
        self.nerdctl.end_all()
        self.workspace.remove()

    @contextlib.contextmanager
    def changing_images(self) -> Iterator[None]:
        """Context of our own change to images: what containerd says meanwhile is told by the handler in Docker's words,
        and the snapshot of images is dropped at its end."""
        self.quiet["images"] += 1
        try:
            yield
        finally:
            self.snapshot.names.drop()
            # The events of the change itself come a little later.
            timer = threading.Timer(0.3, lambda: self.quiet.subtract(["images"]))
            timer.daemon = True
            timer.start()

    @contextlib.contextmanager
    def changing(self, container: Container) -> Iterator[None]:
        """Context of our own change to a container: whoever reads after it sees it."""
        try:
            yield
        finally:
            self.snapshot.containers.drop(container.real)

    def actor(self, container: Container, **more: str) -> Tuple[str, Dict[str, str]]:
        """Id and attributes of a container in an event: its labels, image and name."""
        return container.id, {**container.visible_labels, "image": container.image, "name": container.name, **more}

    def tell(self, container: Container, action: str, **more: str) -> None:
        """Emit an event of a container."""
        self.journal.emit("container", action, *self.actor(container, **more))

    def on_event(self, event: Optional[ContainerdEvent]) -> None:
        """Tell Docker's event for one of containerd. Only while somebody listens or a container needs it are containers
        looked up, since that costs a process."""
        if event is None:
            return
        if event.topic.startswith("/images/"):
            if self.quiet["images"] <= 0:
                self._image_event(event)
        elif event.container:
            self._container_event(event)

    def _image_event(self, event: ContainerdEvent) -> None:
        name = event.payload.get("name") or ""
        action = {"/images/create": "tag", "/images/delete": "untag"}.get(event.topic)
        if action and name:
            self.journal.emit("image", action, familiar(name), {"name": familiar(name)}, event.time)

    def _container_event(self, event: ContainerdEvent) -> None:
        action = {
            "/containers/create": "create", "/tasks/start": "start", "/tasks/exit": "die", "/tasks/paused": "pause",
            "/tasks/resumed": "unpause", "/tasks/oom": "oom", "/containers/delete": "destroy",
        }.get(event.topic)
        if action is None or (action == "die" and event.payload.get("id") not in (None, "", event.container)):
            return
        identity, attributes = self._actor_of(event.container, gone=action == "destroy")
        if action == "start":
            self.begun[event.container] = event.time
        elif action == "die":
            began = self.begun.pop(event.container, event.time)
            attributes = {**attributes, "exitCode": str(event.payload.get("exit_status") or 0),
                          "execDuration": str(max(0, event.time - began) // 10**9)}
        elif action == "destroy":
            self.known.pop(event.container, None)
        self.journal.emit("container", action, identity, attributes, event.time)

    def _actor_of(self, real: str, gone: bool) -> Tuple[str, Dict[str, str]]:
        """Id and attributes of a container that an event names, as they were last known where it is gone."""
        if not self.journal.queues:
            return self.known.get(real, (real, {}))
        if not gone:
            with contextlib.suppress(ApiError):
                container = self.snapshot.containers.get().get(real)
                if container:
                    self.known[real] = self.actor(container)
        return self.known.get(real, (real, {}))


###############################################################################
# System
###############################################################################


@route("GET", "/_ping")
def system_ping(engine: Engine, request: Request) -> Response:
    """200 with `OK` and the headers that clients negotiate by; needs nothing to run."""
    return Response(200, b"OK", "text/plain; charset=utf-8", {
        "Cache-Control": "no-cache, no-store, must-revalidate", "Pragma": "no-cache",
        "Builder-Version": "2", "Swarm": "inactive",
    })


@route("HEAD", "/_ping")
def system_ping_head(engine: Engine, request: Request) -> Response:
    """The headers of `_ping`, Content-Length 0 as dockerd sends it."""
    response = system_ping(engine, request)
    response.body = b""
    return response


def docker_version(told: Dict[str, Any], problem: str, version: Tuple[int, int]) -> Dict[str, Any]:
    """Docker's version from nerdctl's; `problem` says why nothing was told."""
    machine = os.uname()
    architecture = GO_ARCHITECTURES.get(machine.machine, machine.machine)
    client, server = told.get("Client") or {}, told.get("Server") or {}
    details = {
        "ApiVersion": "%d.%d" % API_NEWEST, "MinAPIVersion": "%d.%d" % API_OLDEST, "Os": "linux", "Arch": architecture,
        "KernelVersion": machine.release, "Experimental": "false", "GitCommit": "", "GoVersion": client.get("GoVersion") or "",
        "BuildTime": "",
    }
    components = [{"Name": "Engine", "Version": VERSION, "Details": details}]
    if client.get("Version"):
        components.append({"Name": "nerdctl", "Version": client["Version"], "Details": {"GitCommit": client.get("GitCommit") or ""}})
    for each in (server.get("Components") or []) + (client.get("Components") or []):
        components.append({
            "Name": each.get("Name") or "", "Version": each.get("Version") or "",
            "Details": {"GitCommit": "", **(each.get("Details") or {})},
        })
    answer = {
        "Platform": {"Name": f"nerdctld {VERSION}" + (f" ({problem})" if problem else "")}, "Components": components,
        "Version": VERSION, "ApiVersion": "%d.%d" % API_NEWEST, "MinAPIVersion": "%d.%d" % API_OLDEST, "GitCommit": "",
        "GoVersion": client.get("GoVersion") or "", "Os": "linux", "Arch": architecture, "KernelVersion": machine.release,
        "BuildTime": "",
    }
    return answer


GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


@route("GET", "/version")
def system_version(engine: Engine, request: Request) -> Response:
    """Versions of this daemon, nerdctl, containerd, runc and buildctl; answers also where they are missing or down."""
    told, problem = {}, ""
    try:
        told = engine.snapshot.version.get()
    except ApiError as error:
        problem = str(error)
    return Response(200, docker_version(told, problem, request.version))


def count_states(containers: Iterable[Container]) -> Dict[str, int]:
    """Numbers of containers, in all and by state, under the names `info` has for them."""
    states = [each.state for each in containers]
    running, paused = states.count("running") + states.count("restarting"), states.count("paused")
    return {"Containers": len(states), "ContainersRunning": running, "ContainersPaused": paused,
            "ContainersStopped": len(states) - running - paused}


def docker_info(told: Dict[str, Any], nerdctl_version: str) -> Dict[str, Any]:
    """Docker's info from nerdctl's, without what is counted or of this process."""
    info = {
        "Driver": "overlayfs", "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
        "Plugins": {}, "MemoryLimit": False, "SwapLimit": False, "CpuCfsPeriod": False, "CpuCfsQuota": False, "CPUShares": False,
        "CPUSet": False, "PidsLimit": False, "IPv4Forwarding": False, "OomKillDisable": False, "LoggingDriver": "json-file",
        "CgroupDriver": "", "CgroupVersion": "", "KernelVersion": os.uname().release, "OperatingSystem": "", "OSVersion": "",
        "OSType": "linux", "Architecture": os.uname().machine, "NCPU": os.cpu_count() or 1, "MemTotal": 0, "Name": os.uname().nodename,
        "ID": "", "SecurityOptions": [], "Warnings": [],
    }
    info.update({key: value for key, value in told.items() if value is not None})
    logs = (info["Plugins"] or {}).get("Log") or []
    info["Plugins"] = {"Volume": ["local"], "Network": ["bridge", "host", "ipvlan", "macvlan", "null"], "Authorization": None, "Log": logs}
    for extra in ("BridgeNfIptables", "BridgeNfIp6tables", "CPURealtime"):
        info.pop(extra, None)
    with contextlib.suppress(OSError):
        with open("/etc/os-release", encoding="utf-8") as file:
            found = re.search(r'^VERSION_ID="?([^"\n]*)', file.read(), re.M)
            info["OSVersion"] = found.group(1) if found else ""
    runtime = {"path": "runc"}
    info.update({
        "NFd": 0, "NGoroutines": 0, "GenericResources": None, "ExperimentalBuild": False, "Labels": [],
        "HttpProxy": "", "HttpsProxy": "", "NoProxy": "", "IndexServerAddress": "https://index.docker.io/v1/",
        "RegistryConfig": {
            "AllowNondistributableArtifactsCIDRs": None, "AllowNondistributableArtifactsHostnames": None,
            "InsecureRegistryCIDRs": ["127.0.0.0/8", "::1/128"],
            "IndexConfigs": {"docker.io": {"Name": "docker.io", "Mirrors": [], "Secure": True, "Official": True}}, "Mirrors": [],
        },
        "ServerVersion": VERSION, "Runtimes": {"io.containerd.runc.v2": runtime, "runc": runtime}, "DefaultRuntime": "io.containerd.runc.v2",
        "Swarm": {"NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive", "ControlAvailable": False, "Error": "", "RemoteManagers": None},
        "LiveRestoreEnabled": True, "Isolation": "", "InitBinary": "tini", "ContainerdCommit": {"ID": told.get("ServerVersion") or ""},
        "RuncCommit": {"ID": ""}, "InitCommit": {"ID": ""}, "CDISpecDirs": [], "ProductLicense": "",
        "Containerd": {"Address": "", "Namespaces": {"Containers": "default", "Plugins": "default"}},
    })
    info["Labels"] = [f"nerdctl={nerdctl_version}"] if nerdctl_version else []
    return info


@route("GET", "/info")
def system_info(engine: Engine, request: Request) -> Response:
    """The state of the engine as nerdctl tells it, with the numbers of containers and images; 503 without containerd."""
    info = docker_info(engine.snapshot.info.get(), (engine.snapshot.version.get().get("Client") or {}).get("Version") or "")
    info.update(count_states(engine.snapshot.containers.get().values()))
    server = engine.snapshot.version.get().get("Server") or {}
    for each in server.get("Components") or []:
        if each.get("Name") == "runc":
            info["RuncCommit"] = {"ID": each.get("Version") or ""}
    engine.feed.keep()
    info.update({
        "Images": len(engine.snapshot.image_groups()), "SystemTime": rfc3339(time.time_ns()), "Debug": engine.nerdctl.debug,
        "NFd": len(os.listdir("/proc/self/fd")), "NGoroutines": threading.active_count(), "NEventsListener": len(engine.journal.queues),
        "DockerRootDir": data_root(), "HttpProxy": os.environ.get("HTTP_PROXY", ""), "HttpsProxy": os.environ.get("HTTPS_PROXY", ""),
        "NoProxy": os.environ.get("NO_PROXY", ""),
    })
    info["Containerd"]["Address"] = engine.nerdctl.address or "/run/containerd/containerd.sock"
    info["Containerd"]["Namespaces"]["Containers"] = engine.nerdctl.namespace
    return Response(200, info)


INDEX_SERVER = "https://index.docker.io/v1/"


def decode_auth(text: str) -> Dict[str, str]:
    """The credentials of an X-Registry-Auth header (base64url of JSON); {} for none. 400 for anything else."""
    if not text:
        return {}
    try:
        value = json.loads(base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4)))
    except (ValueError, binascii.Error):
        raise BadParameter("invalid X-Registry-Auth header: it is not base64url of JSON") from None
    return string_map({key: each for key, each in typed(value, dict, "X-Registry-Auth").items() if isinstance(each, str)}, "X-Registry-Auth")


def registry_auths(credentials: Dict[str, str], registry: str) -> Dict[str, Dict[str, str]]:
    """The `auths` of a Docker config for one registry; {} where there are no credentials."""
    entry: Dict[str, str] = {}
    if credentials.get("identitytoken"):
        entry = {"identitytoken": credentials["identitytoken"], "auth": base64.b64encode(b"00000000-0000-0000-0000-000000000000:").decode()}
    elif credentials.get("username"):
        pair = f"{credentials['username']}:{credentials.get('password', '')}"
        entry = {"auth": base64.b64encode(pair.encode()).decode()}
    elif credentials.get("auth"):
        entry = {"auth": credentials["auth"]}
    if not entry:
        return {}
    host = "docker.io" if registry in ("docker.io", "index.docker.io", "registry-1.docker.io") else registry
    return {INDEX_SERVER if host == "docker.io" else host: entry}


@contextlib.contextmanager
def credentials_for(engine: Engine, request: Request, registry: str) -> Iterator[Optional[Dict[str, str]]]:
    """The environment for one nerdctl call with the credentials of the request's X-Registry-Auth, None without any.
    They are in a private folder while the call runs, and nowhere else."""
    auths = registry_auths(decode_auth(request.headers.get("X-Registry-Auth") or ""), registry)
    if not auths:
        yield None
        return
    with engine.workspace.docker_config(auths) as environment:
        yield environment


@route("POST", "/auth")
def system_auth(engine: Engine, request: Request) -> Response:
    """Check credentials against the registry: 200 when it takes them, 401 when it refuses, 500 when it does not answer."""
    body = request.json(required=True)
    address = typed(body.get("serveraddress"), str, "serveraddress") or INDEX_SERVER
    user, password = typed(body.get("username"), str, "username"), typed(body.get("password"), str, "password")
    if not user:
        raise BadParameter("username is required")
    host = re.sub(r"^https?://", "", address).rstrip("/")
    host = "docker.io" if host.startswith("index.docker.io") else host.partition("/")[0]
    if not DOMAIN.fullmatch(host):
        raise BadParameter(f"invalid registry address {address!r}")
    with engine.workspace.docker_config({}) as environment:
        output = engine.nerdctl.output("login", "--username", user, "--password-stdin", "--", host,
                                       data=password.encode(), timeout=60, environment=environment)
    if output.status:
        error = nerdctl_error(output.stderr)
        if isinstance(error, Unavailable):
            raise error
        if re.search(r"401|[Uu]nauthorized|incorrect username|authentication (?:is )?required|denied", output.stderr):
            raise Unauthorized(f"Get \"https://{host}/v2/\": unauthorized: incorrect username or password")
        raise ApiError(str(error))
    return Response(200, {"IdentityToken": "", "Status": "Login Succeeded"})


def match_event(event: Dict[str, Any], filters: Dict[str, List[str]]) -> bool:
    """Whether an event passes the filters of `/events`; those of one name are alternatives, but labels must all match."""
    attributes = event["Actor"]["Attributes"]
    kind, identity, name = event["Type"], event["Actor"]["ID"], attributes.get("name", "")
    for key, wanted in filters.items():
        if key == "label":
            if not match_labels(attributes, wanted):
                return False
        elif key in ("event", "action"):
            if not any(event["Action"] == each or event["Action"].startswith(each + ":") for each in wanted):
                return False
        elif key == "type":
            if kind not in wanted:
                return False
        elif key == "scope":
            if event["scope"] not in wanted:
                return False
        elif key == "image":
            told = [identity, name] if kind == "image" else [attributes.get("image", "")]
            if not any(each == text or text.partition(":")[0] == each for each in wanted for text in told):
                return False
        elif kind != key or not any(each in (identity, name) or identity.startswith(each) for each in wanted):
            return False
    return True


def docker_event(event: Dict[str, Any], version: Tuple[int, int]) -> Dict[str, Any]:
    """An event as clients of an API version get it: before 1.52 with the fields that Docker has deprecated."""
    if version >= (1, 52):
        return event
    old = dict(event)
    if event["Type"] in ("container", "image"):
        old.update({"id": event["Actor"]["ID"], "status": event["Action"]})
        if event["Actor"]["Attributes"].get("image"):
            old["from"] = event["Actor"]["Attributes"]["image"]
    return dict(sorted(old.items()))


EVENT_FILTERS = ("config", "container", "daemon", "event", "action", "image", "label", "network", "node", "plugin", "scope", "secret",
                 "service", "type", "volume")


@route("GET", "/events")
def system_events(engine: Engine, request: Request) -> Response:
    """A stream of events: the kept ones since `since`, then new ones until `until` or until the client leaves."""
    filters = request.filters(*EVENT_FILTERS)
    since, until = request.timestamp("since"), request.timestamp("until")
    if since is not None and until is not None and until < since:
        raise BadParameter("`since` time cannot be after `until` time")
    sequence = "application/json-seq" in (request.headers.get("Accept") or "")
    if request.version < (1, 52):
        media_type = "application/json"
    elif sequence:
        media_type = "application/json-seq"
    else:
        media_type = "application/x-ndjson" if "x-ndjson" in (request.headers.get("Accept") or "") else "application/jsonl"
    lead = b"\x1e" if media_type == "application/json-seq" else b""

    def chunks() -> Iterator[bytes]:
        with engine.journal.subscribe() as (kept, new), engine.feed.needed(), request.client.when_gone(lambda: new.put(None)):
            for event in kept if since is not None else ():
                when = event["timeNano"] / 1e9
                if when >= since and (until is None or when <= until) and match_event(event, filters):
                    yield lead + json_bytes(docker_event(event, request.version)) + b"\n"
            if until is None or until > time.time():
                # The head of the response says that nothing from now on is missed.
                engine.feed.wait_live(2.0)
            yield b""
            while True:
                try:
                    event = new.get(timeout=None if until is None else max(0.0, until - time.time()))
                except queue.Empty:
                    return
                if event is None:
                    return
                if match_event(event, filters):
                    yield lead + json_bytes(docker_event(event, request.version)) + b"\n"

    return Response(200, Stream(chunks(), primed=True), media_type)


###############################################################################
# Images
###############################################################################


def seconds_or_zero(text: str) -> int:
    """Whole seconds since 1970 of a timestamp, 0 where there is none."""
    return (nanoseconds_of(text or "") or 0) // 10**9


def docker_descriptor(group: ImageGroup) -> Dict[str, Any]:
    """The OCI descriptor of an image's target."""
    target = ((group.detail.get("Image") or {}).get("Target")) or {}
    found = {"mediaType": target.get("mediaType") or "application/vnd.oci.image.manifest.v1+json", "digest": group.id,
             "size": target.get("size") or 0}
    return found


def content_size(group: ImageGroup) -> int:
    """Bytes of an image's compressed layers, configuration and manifest."""
    manifest = group.detail.get("Manifest") or {}
    return sum(each.get("size") or 0 for each in [*(manifest.get("layers") or []), manifest.get("config") or {}, group.detail.get("ManifestDesc") or {}])


def image_size(group: ImageGroup) -> int:
    """Bytes an image takes, unpacked and compressed, as dockerd's containerd store counts them."""
    return (group.detail.get("size") or 0) + content_size(group)


def docker_platform(group: ImageGroup) -> Dict[str, str]:
    """The platform an image was made for."""
    config = group.config
    found = {"architecture": config.get("architecture") or "", "os": config.get("os") or ""}
    if config.get("variant"):
        found["variant"] = config["variant"]
    return found


def docker_manifests(group: ImageGroup, containers: List[str]) -> List[Dict[str, Any]]:
    """The `Manifests` of an image: the one whose content is here, with its sizes and the containers made of it."""
    manifest = group.detail.get("ManifestDesc") or {}
    if not manifest:
        return []
    descriptor = {"mediaType": manifest.get("mediaType") or "", "digest": manifest.get("digest") or "", "size": manifest.get("size") or 0}
    unpacked, content = group.detail.get("size") or 0, content_size(group)
    return [{
        "ID": descriptor["digest"], "Descriptor": descriptor, "Available": True, "Kind": "image",
        "Size": {"Content": content, "Total": content + unpacked},
        "ImageData": {"Platform": docker_platform(group), "Containers": containers, "Size": {"Unpacked": unpacked}},
    }]


def docker_image_row(group: ImageGroup, version: Tuple[int, int], containers: int = -1, shared: int = -1) -> Dict[str, Any]:
    """An image as `/images/json` lists it; -1 for what was not asked for."""
    tags, digests = group.repo_tags, group.repo_digests
    if version < (1, 43) and not tags:
        tags, digests = ["<none>:<none>"], digests or ["<none>@<none>"]
    row = {
        "Containers": containers, "Created": seconds_or_zero(group.config.get("created") or ""), "Id": group.id,
        "Labels": group.labels, "ParentId": "", "RepoDigests": digests, "RepoTags": tags,
        "SharedSize": shared, "Size": image_size(group),
    }
    if version < (1, 44):
        row["VirtualSize"] = row["Size"]
    if version >= (1, 48):
        row["Descriptor"] = docker_descriptor(group)
    return row


def match_reference(group: ImageGroup, patterns: List[str]) -> bool:
    """Whether one of an image's names fits a pattern of the `reference` filter: with or without tag or digest, `*` not
    across slashes."""
    for pattern in patterns:
        glob = re.compile("".join({"*": "[^/]*", "?": "[^/]"}.get(each, re.escape(each)) for each in pattern))
        for name in [*group.repo_tags, *group.repo_digests]:
            bare = name.partition("@")[0]
            head, colon, tail = bare.rpartition(":")
            bare = head if colon and "/" not in tail else bare
            if any(glob.fullmatch(each) for each in (name, bare, "docker.io/" + name, "docker.io/library/" + bare)):
                return True
    return False


def until_limit(values: List[str]) -> Optional[float]:
    """The moment that an `until` filter names, as seconds since 1970: a timestamp or a duration before now."""
    if not values:
        return None
    if len(values) > 1:
        raise BadParameter("more than one until filter specified")
    text = values[0]
    if re.fullmatch(r"\d{1,15}(\.\d{1,9})?", text):
        return float(text)
    if re.fullmatch(r"(\d{1,9}(\.\d{1,9})?(h|ms|m|s))+", text):
        units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
        return time.time() - sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)(h|ms|m|s)", text))
    found = seconds_of(text + "T00:00:00" if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else text)
    if found is None:
        raise BadParameter(f"invalid until filter: {text!r}")
    return found


def flag_filter(filters: Dict[str, List[str]], name: str, default: Optional[bool] = None) -> Optional[bool]:
    """A filter that is a boolean; 400 with dockerd's words for anything else."""
    values = filters.get(name) or []
    if not values:
        return default
    words = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
    told = {words.get(each.lower()) for each in values}
    if None in told or len(told) > 1:
        raise BadParameter(f"invalid filter '{name}={json_bytes(values).decode()}'")
    return told.pop()


def filter_images(engine: Engine, groups: Iterable[ImageGroup], filters: Dict[str, List[str]]) -> List[ImageGroup]:
    """The images that pass the filters of list and prune."""
    dangling = flag_filter(filters, "dangling")
    before = [seconds_or_zero(engine.snapshot.image(each).config.get("created") or "") for each in filters.get("before") or []]
    since = [seconds_or_zero(engine.snapshot.image(each).config.get("created") or "") for each in filters.get("since") or []]
    until = until_limit(filters.get("until") or [])
    found = []
    for group in groups:
        labels = group.labels
        created = seconds_or_zero(group.config.get("created") or "")
        if (dangling is not None and dangling != (not group.repo_tags)
                or not match_labels(labels, filters.get("label") or [])
                or any(match_labels(labels, [each]) for each in filters.get("label!") or [])
                or (filters.get("reference") and not match_reference(group, filters["reference"]))
                or any(created >= each for each in before) or any(created <= each for each in since)
                or (until is not None and created > until)):
            continue
        found.append(group)
    return found


def shared_sizes(groups: Iterable[ImageGroup]) -> Dict[str, int]:
    """Image id -> bytes of the layers it has in common with another one (compressed, as the registry counts them)."""
    uses: collections.Counter = collections.Counter()
    layers = {group.id: {each["digest"]: each.get("size") or 0 for each in (group.detail.get("Manifest") or {}).get("layers") or []}
              for group in groups}
    for each in layers.values():
        uses.update(each.keys())
    return {identity: sum(size for digest, size in each.items() if uses[digest] > 1) for identity, each in layers.items()}


def image_users(engine: Engine) -> Dict[str, List[str]]:
    """Image id -> ids of the containers made of it."""
    by_name = {name: group.id for group in engine.snapshot.image_groups().values() for name in group.names}
    found: Dict[str, List[str]] = {}
    for container in engine.snapshot.containers.get().values():
        identity = by_name.get(container.image)
        if identity:
            found.setdefault(identity, []).append(container.id)
    return found


IMAGE_FILTERS = ("dangling", "label", "label!", "before", "since", "until", "reference")


@route("GET", "/images/json")
def image_list(engine: Engine, request: Request) -> Response:
    """Images, newest first. Filters before, since, until, dangling, label, reference; `shared-size`, `manifests`."""
    filters = request.filters(*IMAGE_FILTERS)
    if request.version < (1, 41) and request.value("filter"):
        filters["reference"] = [request.value("filter")]
    groups = filter_images(engine, engine.snapshot.image_groups().values(), filters)
    shared = shared_sizes(groups) if request.flag("shared-size") else {}
    users = image_users(engine) if request.flag("manifests") or request.flag("shared-size") else {}
    rows = []
    for group in groups:
        row = docker_image_row(group, request.version, len(users.get(group.id, [])) if users else -1, shared.get(group.id, -1))
        if request.flag("manifests") and request.version >= (1, 47):
            row["Manifests"] = docker_manifests(group, users.get(group.id, []))
        rows.append(row)
    return Response(200, sorted(rows, key=lambda row: -row["Created"]))


def docker_image_config(config: Dict[str, Any], version: Tuple[int, int]) -> Dict[str, Any]:
    """The `Config` of an image with the fields every client expects."""
    found = {
        "User": config.get("User") or "", "Env": config.get("Env"), "Cmd": config.get("Cmd"), "Volumes": config.get("Volumes"),
        "WorkingDir": config.get("WorkingDir") or "", "Entrypoint": config.get("Entrypoint"), "OnBuild": config.get("OnBuild"),
        "Labels": config.get("Labels"),
    }
    for key in ("ExposedPorts", "Healthcheck", "StopSignal", "Shell", "ArgsEscaped"):
        if config.get(key):
            found[key] = config[key]
    if version < (1, 50):
        found.update({"Hostname": "", "Domainname": "", "AttachStdin": False, "AttachStdout": False, "AttachStderr": False,
                      "Tty": False, "OpenStdin": False, "StdinOnce": False, "Image": ""})
    return found


def docker_image(group: ImageGroup, version: Tuple[int, int]) -> Dict[str, Any]:
    """An image as `/images/{name}/json` shows it."""
    config = group.config
    history = config.get("history") or []
    updated = (group.detail.get("Image") or {}).get("UpdatedAt") or ZERO_TIME
    size = image_size(group)
    image = {
        "Id": group.id, "RepoTags": group.repo_tags, "RepoDigests": group.repo_digests, "Parent": "",
        "Comment": next((each.get("comment") or "" for each in reversed(history)), ""),
        "Created": config.get("created") or ZERO_TIME, "DockerVersion": "", "Author": config.get("author") or "",
        "Config": docker_image_config(config.get("config") or {}, version), "Architecture": config.get("architecture") or "",
        "Os": config.get("os") or "", "Size": size,
        "GraphDriver": {"Data": None, "Name": "overlayfs"},
        "RootFS": {"Type": "layers", "Layers": (config.get("rootfs") or {}).get("diff_ids") or []},
        "Metadata": {"LastTagTime": updated},
    }
    if config.get("variant"):
        image["Variant"] = config["variant"]
    if version < (1, 44):
        image.update({"VirtualSize": size, "Container": "", "ContainerConfig": image["Config"]})
    if version >= (1, 48):
        image["Descriptor"] = docker_descriptor(group)
    return image


def check_platform(group: ImageGroup, text: str) -> None:
    """404 unless the image is here for the platform of a `platform` parameter (JSON, or os/architecture)."""
    if not text:
        return
    if text.startswith("{"):
        wanted = typed(parse_json(text.encode()), dict, "platform")
        system, architecture, variant = (wanted.get(key) or "" for key in ("os", "architecture", "variant"))
    else:
        system, architecture, variant = (text.split("/") + ["", ""])[:3]
    have = docker_platform(group)
    if (system or "linux") != have["os"] or architecture != have["architecture"] or (variant and variant != have.get("variant", variant)):
        name = (group.repo_tags or [group.id])[0]
        asked = "/".join(each for each in (system or "linux", architecture, variant) if each)
        raise NotFound(f"image with reference {name} was found but does not provide the specified platform ({asked})")


@route("GET", "/images/{image}/json")
def image_inspect(engine: Engine, request: Request, name: str) -> Response:
    """One image; 404 when there is none of that name, id or platform."""
    group = engine.snapshot.image(name)
    check_platform(group, request.value("platform"))
    image = docker_image(group, request.version)
    if request.flag("manifests") and request.version >= (1, 48):
        image["Manifests"] = docker_manifests(group, image_users(engine).get(group.id, []))
    return Response(200, image)


def docker_history(group: ImageGroup, sizes: List[int]) -> List[Dict[str, Any]]:
    """The layers of an image, newest first; `sizes` of those that are not empty, newest first too."""
    rows = []
    left = list(sizes)
    for each in reversed(group.config.get("history") or []):
        rows.append({
            "Comment": each.get("comment") or "", "Created": seconds_or_zero(each.get("created") or ""), "CreatedBy": each.get("created_by") or "",
            "Id": "<missing>", "Size": 0 if each.get("empty_layer") or not left else left.pop(0), "Tags": None,
        })
    if rows:
        rows[0].update({"Id": group.id, "Tags": group.repo_tags or None})
    return rows


@route("GET", "/images/{image}/history")
def image_history(engine: Engine, request: Request, name: str) -> Response:
    """How an image was made, a row a step; sizes as unpacked."""
    group = engine.snapshot.image(name)
    check_platform(group, request.value("platform"))
    rows = engine.nerdctl.rows("history", "--no-trunc", "--format", "{{json .}}", "--", group.names[0])
    # nerdctl gives a size to each step; those of steps with a layer are in the order of the history.
    steps = list(reversed(group.config.get("history") or []))
    sizes = [size_bytes(row.get("Size") or "") for row, step in zip(rows, steps) if not step.get("empty_layer")]
    return Response(200, docker_history(group, sizes))


PROGRESS_LINE = re.compile(
    r"(?P<kind>manifest|config|layer|index|attestation)-(?P<digest>sha256:[0-9a-f]+):?\s+(?P<state>[a-z ]+?)\s*"
    r"(?:\|.*\|\s*(?:(?P<current>[\d.]+ ?[KMGT]?i?B)/(?P<total>[\d.]+ ?[KMGT]?i?B))?\s*)?$")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
PULL_WORDS = {"waiting": "Waiting", "downloading": "Downloading", "extracting": "Extracting", "resolving": "Waiting", "resolved": "Waiting",
              "complete": "Pull complete", "done": "Pull complete", "already exists": "Already exists", "exists": "Already exists"}
PUSH_WORDS = {"waiting": "Waiting", "uploading": "Pushing", "done": "Pushed", "complete": "Pushed", "already exists": "Layer already exists",
              "exists": "Layer already exists"}


class ProgressTable:
    """nerdctl's redrawn table of layers as Docker's progress messages: one a layer whenever it has changed."""

    def __init__(self, words: Dict[str, str]):
        self.words = words
        self.told: Dict[str, Tuple] = {}
        self.done: set = set()

    def messages(self, line: str) -> List[Dict[str, Any]]:
        """The messages that a line of output makes due, [] for most."""
        found = PROGRESS_LINE.search(ANSI.sub("", line).rstrip())
        if not found or found.group("kind") not in ("layer", "config"):
            return []
        identity = found.group("digest")[7:19]
        current, total = size_bytes(found.group("current") or ""), size_bytes(found.group("total") or "")
        word = self.words.get(found.group("state").strip(), "")
        state = (word, current, total)
        if not word or identity in self.done or self.told.get(identity) == state or (found.group("kind") == "config"):
            return []
        messages = []
        if identity not in self.told and self.words is PULL_WORDS and word != "Already exists":
            messages.append({"status": "Pulling fs layer", "progressDetail": {}, "id": identity})
        self.told[identity] = state
        if word in ("Pull complete", "Pushed", "Already exists", "Layer already exists"):
            self.done.add(identity)
            if word == "Pull complete":
                messages.append({"status": "Download complete", "progressDetail": {"hidecounts": True}, "id": identity})
            messages.append({"status": word, "progressDetail": {}, "id": identity})
        elif total:
            messages.append({"status": word, "progressDetail": {"current": current, "total": total}, "id": identity,
                             "progress": progress_bar(current, total)})
        return messages

    def finish(self) -> List[Dict[str, Any]]:
        """The messages that complete every layer begun: nerdctl's last redraw may come before its last change."""
        last = "Pushed" if self.words is PUSH_WORDS else "Pull complete"
        return [{"status": last, "progressDetail": {}, "id": identity} for identity in self.told if identity not in self.done]


def progress_bar(current: int, total: int) -> str:
    """`[====>   ]  1.5MB/3MB`, as clients older than API 1.48 print it."""
    filled = min(50, current * 50 // total) if total else 0
    return f"[{'=' * filled}{'>' if filled < 50 else ''}{' ' * (49 - filled)}]  {decimal_size(current):>8}/{decimal_size(total)}"


def decimal_size(size: float) -> str:
    """`12.5MB`: four digits at most, in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g}{unit}"
        size /= 1000
    return f"{size:.4g}TB"


def message_line(message: Dict[str, Any]) -> bytes:
    """One message of a progress stream, as dockerd separates them."""
    return json_bytes(message) + b"\r\n"


def error_line(text: str) -> bytes:
    """The last message of a progress stream that failed."""
    return message_line({"errorDetail": {"message": text}, "error": text})


def follow_progress(process: Process, table: ProgressTable) -> Iterator[bytes]:
    """The progress messages of a running pull or push, until nerdctl has closed its stdout."""
    for line in process.lines():
        for message in table.messages(line):
            yield message_line(message)


def run_progress(engine: Engine, request: Request, arguments: List[str], environment: Optional[Dict[str, str]],
                 table: ProgressTable, begin: Dict[str, Any]) -> Iterator[bytes]:
    """The messages of a pull or push: `begin` first, once nerdctl has begun to move something (an error until then is an
    ordinary error response), then the layers. Raises the ApiError when nerdctl fails."""
    with engine.nerdctl.start(*arguments, environment=environment, client=request.client) as process:
        begun = False
        for data in follow_progress(process, table):
            if not begun:
                begun = True
                yield message_line(begin)
            yield data
        process.check()
        if not begun:
            yield message_line(begin)
        for message in table.finish():
            yield message_line(message)


def pull_args(reference: Reference, platform: str) -> List[str]:
    """argv of a pull."""
    arguments = ["pull"]
    if platform:
        if not re.fullmatch(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.]+){0,2}", platform):
            raise BadParameter(f"invalid platform {platform!r}")
        # nerdctl unpacks only what fits the machine unless told so.
        arguments += [f"--platform={platform}", "--unpack=false" if not fits_machine(platform) else "--unpack=auto"]
    return [*arguments, "--", reference.name]


def fits_machine(platform: str) -> bool:
    """Whether a platform is that of this machine."""
    words = platform.split("/")
    machine = GO_ARCHITECTURES.get(os.uname().machine, os.uname().machine)
    return words[0] == "linux" and (len(words) == 1 or words[1] in (machine, os.uname().machine))


def registry_path(reference: Reference) -> str:
    """The repository without its registry: `bb` of `localhost:5000/bb`, `library/busybox`."""
    return reference.repository.partition("/")[2]


def pull_image(engine: Engine, request: Request, reference: Reference, platform: str,
               environment: Optional[Dict[str, str]]) -> Iterator[bytes]:
    """Pull one reference; yields Docker's messages."""
    before = {name: group.id for group in engine.snapshot.image_groups().values() for name in group.names}.get(reference.name)
    begin = {"status": f"Pulling from {registry_path(reference)}", "id": reference.tag or reference.digest}
    with engine.changing_images():
        yield from run_progress(engine, request, pull_args(reference, platform), environment, ProgressTable(PULL_WORDS), begin)
    group = engine.snapshot.image(reference.name)
    name = familiar(reference.name)
    yield message_line({"status": f"Digest: {group.id}"})
    word = "Image is up to date" if before == group.id else "Downloaded newer image"
    yield message_line({"status": f"Status: {word} for {name}"})
    engine.journal.emit("image", "pull", name, {**group.labels, "name": name})


class Registry:
    """The few questions that nerdctl does not put to a registry: the tags of a repository, and the descriptor of a
    reference. Plain http for this machine only, as nerdctl does; token and basic authentication."""

    TYPES = ", ".join((
        "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"))
    LIMIT = 8 << 20

    def __init__(self, reference: Reference, credentials: Dict[str, str]):
        host, _, self.path = reference.repository.partition("/")
        self.host = "registry-1.docker.io" if host == "docker.io" else host
        self.credentials = credentials
        self.authorization = ""

    def ask(self, path: str) -> Tuple[Dict[str, str], bytes]:
        """GET below the repository: headers (names in lower case) and body. 401, 404 and 500 as ApiErrors."""
        url = f"/v2/{self.path}/{path}"
        status, headers, body = self._send(self.host, url, self.authorization)
        if status == 401 and not self.authorization:
            self.authorization = self._authorize(headers.get("www-authenticate") or "")
            status, headers, body = self._send(self.host, url, self.authorization)
        if status in (401, 403):
            raise Unauthorized(f"unauthorized: authentication required for {self.host}/{self.path}")
        if status == 404:
            raise NotFound(f"{self.host}/{self.path}/{path.rpartition('/')[2]}: not found")
        if status != 200:
            raise ApiError(f"{self.host} answered {status}")
        return headers, body

    def _basic(self) -> str:
        pair = f"{self.credentials.get('username', '')}:{self.credentials.get('password', '')}"
        return "Basic " + base64.b64encode(pair.encode()).decode() if self.credentials.get("username") else ""

    def _authorize(self, challenge: str) -> str:
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() != "bearer":
            return self._basic()
        fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        realm = urllib.parse.urlsplit(fields.get("realm", ""))
        if realm.scheme not in ("http", "https") or not realm.netloc:
            return ""
        query = urllib.parse.urlencode({"service": fields.get("service", ""), "scope": f"repository:{self.path}:pull"})
        status, _, body = self._send(realm.netloc, f"{realm.path}?{query}", self._basic(), plain=realm.scheme == "http")
        if status != 200:
            return ""
        told = parse_json(body)
        return f"Bearer {told.get('token') or told.get('access_token') or ''}" if isinstance(told, dict) else ""

    def _send(self, host: str, path: str, authorization: str, plain: Optional[bool] = None) -> Tuple[int, Dict[str, str], bytes]:
        name = host.rpartition(":")[0] or host
        if plain is None:
            plain = name in ("localhost", "127.0.0.1", "[::1]")
        kind = http.client.HTTPConnection if plain else http.client.HTTPSConnection
        connection = kind(host, timeout=30)
        try:
            headers = {"Accept": self.TYPES, "User-Agent": f"nerdctld/{VERSION}"}
            if authorization:
                headers["Authorization"] = authorization
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            body = response.read(self.LIMIT)
            return response.status, {key.lower(): value for key, value in response.getheaders()}, body
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(f"cannot ask {host}: {error}") from None
        finally:
            connection.close()


def registry_of(request: Request, reference: Reference) -> Registry:
    """The registry of a reference, with the request's credentials."""
    return Registry(reference, decode_auth(request.headers.get("X-Registry-Auth") or ""))


@route("GET", "/distribution/{image}/json")
def image_distribution(engine: Engine, request: Request, name: str) -> Response:
    """What the registry has under a name: its descriptor and platforms; 401 and 404 as the registry says."""
    reference = parse_reference(name)
    registry = registry_of(request, reference)
    headers, body = registry.ask(f"manifests/{reference.digest or reference.tag}")
    manifest = typed(parse_json(body), dict, "manifest")
    media_type = manifest.get("mediaType") or headers.get("content-type") or ""
    digest = headers.get("docker-content-digest") or "sha256:" + hashlib.sha256(body).hexdigest()
    if "manifests" in manifest:
        platforms = [each.get("platform") or {} for each in manifest["manifests"]]
        platforms = [each for each in platforms if each.get("os") not in (None, "unknown")]
    else:
        _, config = registry.ask(f"blobs/{(manifest.get('config') or {}).get('digest')}")
        told = typed(parse_json(config), dict, "config")
        platforms = [{key: told[key] for key in ("architecture", "os", "variant") if told.get(key)}]
    return Response(200, {"Descriptor": {"mediaType": media_type, "digest": digest, "size": len(body)}, "Platforms": platforms})


@route("POST", "/images/create")
def image_create(engine: Engine, request: Request) -> Response:
    """Pull (`fromImage`, all tags where there is none) or import (`fromSrc`, with `changes`), as a progress stream."""
    read_limited(request.body, JSON_LIMIT) if request.value("fromImage") else None
    if request.value("fromSrc"):
        return image_import(engine, request)
    name, tag = request.value("fromImage"), request.value("tag")
    if not name:
        raise BadParameter("invalid reference format")
    reference = parse_reference(name, "")
    if tag:
        reference = parse_reference(f"{reference.repository}@{tag}" if ":" in tag else f"{reference.repository}:{tag}")
    platform = request.value("platform")
    if platform:
        pull_args(reference, platform)

    def chunks() -> Iterator[bytes]:
        references = [reference]
        if not reference.tag and not reference.digest:
            _, body = registry_of(request, reference).ask("tags/list")
            tags = typed(parse_json(body), dict, "tags").get("tags") or []
            references = [reference._replace(tag=each) for each in sorted(tags) if isinstance(each, str) and TAG.fullmatch(each)]
        begun = False
        with credentials_for(engine, request, reference.repository.partition("/")[0]) as environment:
            for each in references:
                try:
                    for data in pull_image(engine, request, each, platform, environment):
                        begun = True
                        yield data
                except ApiError as error:
                    if not begun:
                        raise
                    yield error_line(str(error))
                    return

    return Response(200, Stream(chunks(), primed=True), "application/json")


def feed_process(process: Process, request: Request) -> None:
    """Stream the request's body into the process until the body or the process has ended. What breaks the body off kills
    the process before it can take the part for the whole."""
    for block in request.body.blocks():
        if not process.write(block):
            break
    process.close_stdin()


def remove_extra_names(engine: Engine, before: Iterable[str]) -> None:
    """Take away the names with digests that nerdctl's load and import leave beside the ones asked for."""
    known = set(before)
    names = [image.name for image in engine.snapshot.names.get()]
    extra = [name for name in names if name not in known and "@sha256:" in name]
    if extra and len([name for name in names if name not in known]) > len(extra):
        engine.nerdctl.output("rmi", "--", *extra)
        engine.snapshot.names.drop()


def parse_loaded(text: str) -> List[str]:
    """The names that `nerdctl load` says it loaded, each once."""
    found = dict.fromkeys(re.findall(r"^Loaded image: (\S+)", text, re.M))
    return list(found)


@route("POST", "/images/load")
def image_load(engine: Engine, request: Request) -> Response:
    """Load an archive; a stream with `Loaded image: …` for each name in it, and with the bytes read unless `quiet`."""
    platform = request.value("platform")
    arguments = ["load", *([f"--platform={platform_words(platform)}"] if platform else ["--all-platforms"])]

    def chunks() -> Iterator[bytes]:
        before = [image.name for image in engine.snapshot.names.get()]
        with engine.changing_images():
            with engine.nerdctl.start(*arguments, stdin=subprocess.PIPE, client=request.client) as process:
                taken, told = 0, time.monotonic()
                for block in request.body.blocks():
                    if not process.write(block):
                        break
                    taken += len(block)
                    if not request.flag("quiet") and time.monotonic() - told > 0.5:
                        told = time.monotonic()
                        yield message_line({"status": "Loading layer", "id": "archive", "progressDetail": {"current": taken, "total": taken},
                                            "progress": decimal_size(taken)})
                process.close_stdin()
                text = b"".join(iter(process.read, b"")).decode(errors="replace")
                process.check()
        with engine.changing_images():
            remove_extra_names(engine, before)
        names = {name: group for group in engine.snapshot.image_groups().values() for name in group.names}
        loaded = parse_loaded(text)
        for each in [name for name in loaded if "@sha256:" not in name] or loaded:
            group = names.get(each) or names.get(each.partition(" ")[0])
            if "@sha256:" in each:
                yield message_line({"stream": f"Loaded image ID: {group.id if group else each.partition('@')[2]}\n"})
            else:
                yield message_line({"stream": f"Loaded image: {familiar(each)}\n"})
            engine.journal.emit("image", "load", group.id if group else each, {"name": familiar(each)})

    return Response(200, Stream(as_error_detail(chunks(), BadParameter), primed=True), "application/json")


def as_error_detail(chunks: Iterator[bytes], *_: type) -> Iterator[bytes]:
    """A progress stream whose error, once it has begun, is its last message."""
    begun = False
    try:
        for chunk in chunks:
            begun = True
            yield chunk
    except ApiError as error:
        if not begun:
            raise
        yield error_line(str(error))
    finally:
        chunks.close()


def platform_words(text: str) -> str:
    """`linux/arm64` from a `platform` parameter, which is JSON or already so; 400 otherwise."""
    if text.startswith("{"):
        told = typed(parse_json(text.encode()), dict, "platform")
        text = "/".join(typed(told.get(key), str, key) for key in ("os", "architecture", "variant") if told.get(key))
    if not re.fullmatch(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.]+){0,2}", text):
        raise BadParameter(f"invalid platform {text!r}")
    return text


def change_lines(values: List[str]) -> List[str]:
    """The Dockerfile instructions of a `changes` parameter; 400 for one that may not be there."""
    lines = [line.strip() for value in values for line in value.split("\n") if line.strip()]
    for line in lines:
        word = line.split(None, 1)[0].upper()
        if word not in ("CMD", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "LABEL", "MAINTAINER", "ONBUILD", "STOPSIGNAL", "USER",
                        "VOLUME", "WORKDIR", "SHELL"):
            raise BadParameter(f"{word} is not a valid change command")
    return lines


def apply_changes(engine: Engine, source: str, target: str, lines: List[str]) -> None:
    """Make `target` of the image `source` with Dockerfile instructions. nerdctl's import and commit take none of them (or
    only two), so BuildKit does it; 503 where there is none."""
    with engine.workspace.temporary("changes") as folder:
        with open(os.path.join(folder, "Dockerfile"), "w", encoding="utf-8") as file:
            file.write("\n".join([f"FROM {source}", *lines]) + "\n")
        engine.nerdctl.run("build", "--progress=plain", "--provenance=false", f"--tag={target}", "--", folder, timeout=600)


def image_import(engine: Engine, request: Request) -> Response:
    """Import a tar of a root file system (the body, or a URL) as an image; its id as the one message."""
    source, repository, tag = request.value("fromSrc"), request.value("repo"), request.value("tag")
    target = parse_reference(f"{repository}:{tag}" if tag and repository else repository) if repository else None
    if target and target.digest:
        raise BadParameter("cannot import digest reference")
    if source != "-" and not re.match(r"https?://", source):
        source = "http://" + source
    lines = change_lines(request.values("changes"))
    arguments = ["import", f"--message={request.value('message')}"]
    if request.value("platform"):
        arguments.append(f"--platform={platform_words(request.value('platform'))}")

    def chunks() -> Iterator[bytes]:
        before = [image.name for image in engine.snapshot.names.get()]
        working = target.name if target and not lines else f"{WORKING_NAME}import:{os.urandom(8).hex()}"
        with engine.changing_images():
            with engine.nerdctl.start(*arguments, "--", source, working, stdin=subprocess.PIPE, client=request.client) as process:
                if source == "-":
                    blocks = request.body.blocks()
                    first = next(blocks, None)
                    if first is None:
                        process.kill()
                        raise BadParameter("invalid archive: it is empty")
                    process.write(first)
                    for block in blocks:
                        if not process.write(block):
                            break
                process.close_stdin()
                for _ in iter(process.read, b""):
                    pass
                process.check()
            remove_extra_names(engine, before)
            if lines:
                try:
                    apply_changes(engine, working, target.name if target else working, lines)
                finally:
                    if target:
                        engine.nerdctl.output("rmi", "--force", "--", working)
        group = engine.snapshot.image((target.name if target else working))
        engine.journal.emit("image", "import", group.id, {"name": familiar(target.name) if target else group.id})
        yield message_line({"status": group.id})

    return Response(200, Stream(as_error_detail(chunks()), primed=True), "application/json")


def expand_names(engine: Engine, name: str) -> List[str]:
    """containerd's names for an image named in a save or push: a repository without tag stands for all of its tags."""
    with contextlib.suppress(BadParameter):
        reference = parse_reference(name, "")
        if not reference.tag and not reference.digest and not re.fullmatch(r"(sha256:)?[0-9a-f]{12,64}", name):
            found = [each for group in engine.snapshot.image_groups().values() for each in group.names
                     if each.startswith(reference.repository + ":") and "@" not in each]
            if found:
                return found
        full = parse_reference(name).name
        if any(full in group.names for group in engine.snapshot.image_groups().values()):
            return [full]
    return engine.snapshot.image(name).names[:1]


def save_images(engine: Engine, request: Request, names: List[str]) -> Response:
    """Stream the archive of images, all looked up before the first byte."""
    if not names:
        raise BadParameter("no images given")
    platform = request.value("platform")
    wanted = list(dict.fromkeys(each for name in names for each in expand_names(engine, name)))
    if platform:
        for name in names:
            check_platform(engine.snapshot.image(name), platform)
    arguments = ["save", *([f"--platform={platform_words(platform)}"] if platform else []), "--", *wanted]

    def chunks() -> Iterator[bytes]:
        with engine.nerdctl.start(*arguments, client=request.client) as process:
            widen_pipe(process.stdout)
            yield from iter(process.read, b"")
            process.check()
        for name in names:
            group = engine.snapshot.image(name)
            engine.journal.emit("image", "save", group.id, {"name": name})

    return Response(200, Stream(chunks(), primed=True), "application/x-tar")


def widen_pipe(file: Any) -> None:
    """Let a pipe hold a MiB, so that the two processes at its ends change places less often."""
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(file.fileno(), 1031, 1 << 20)  # F_SETPIPE_SZ; fcntl has the name from Python 3.10 on.


@route("GET", "/images/get")
def image_save_many(engine: Engine, request: Request) -> Response:
    """The archive of the images in `names`."""
    return save_images(engine, request, [name for value in request.values("names") for name in value.split(",") if name])


@route("GET", "/images/search")
def image_search(engine: Engine, request: Request) -> Response:
    """Search the registry, as nerdctl does it."""
    term, limit = request.value("term"), request.integer("limit")
    if not term:
        raise BadParameter("term is required")
    if not 0 <= limit <= 100:
        raise BadParameter(f"limit {limit} is outside the range of [1, 100]")
    filters = request.filters("is-automated", "is-official", "stars")
    arguments = ["search", "--no-trunc", "--format={{json .}}", *([f"--limit={limit}"] if limit else [])]
    for name, values in filters.items():
        arguments += [f"--filter={name}={value}" for value in values]
    rows = engine.nerdctl.rows(*arguments, "--", term, timeout=60)
    return Response(200, [{
        "name": row.get("Name") or "", "description": row.get("Description") or "", "star_count": int(row.get("StarCount") or row.get("Stars") or 0),
        "is_official": str(row.get("IsOfficial") or row.get("Official") or "").lower() in ("true", "[ok]"), "is_automated": False,
    } for row in rows])


def delete_conflict(group: ImageGroup, name: str, users: List[Container], by_name: bool, force: bool) -> None:
    """409 with dockerd's words where an image may not be removed."""
    short = group.id[7:19]
    if not by_name and len(group.repo_tags) > 1 and not force:
        raise Conflict(f"conflict: unable to delete {short} (must be forced) - image is referenced in multiple repositories")
    if by_name and len(group.names) > 1:
        return
    for container in users:
        if container.running and (force or not by_name):
            raise Conflict(f"conflict: unable to delete {short} (cannot be forced) - image is being used by running container {container.id[:12]}")
        if not force:
            if by_name:
                raise Conflict(f'conflict: unable to remove repository reference "{name}" (must force) - container {container.id[:12]} '
                               f"is using its referenced image {short}")
            raise Conflict(f"conflict: unable to delete {short} (must be forced) - image is being used by stopped container {container.id[:12]}")


def remove_image(engine: Engine, group: ImageGroup, names: List[str], force: bool) -> List[Dict[str, str]]:
    """Remove names of an image, with one nerdctl; what was untagged and, with the last name, deleted."""
    with engine.changing_images():
        engine.nerdctl.run("rmi", *(["--force"] if force else []), "--", *names)
    left = engine.snapshot.image_groups().get(group.id)
    told = [{"Untagged": familiar(name)} for name in names if not name.startswith(("moby-dangling@", "import@", WORKING_NAME))]
    for name in names:
        engine.journal.emit("image", "untag", group.id, {"name": familiar(name)})
    if left is None or not left.names:
        told.append({"Deleted": group.id})
        engine.journal.emit("image", "delete", group.id, {"name": group.id})
    return told


@route("DELETE", "/images/{image}")
def image_delete(engine: Engine, request: Request, name: str) -> Response:
    """Remove a name of an image, or by its id all of them; 409 while a container needs it."""
    group, force = engine.snapshot.image(name), request.flag("force")
    full = ""
    with contextlib.suppress(BadParameter):
        full = parse_reference(name).name
    by_name = full in group.names
    names = [full] if by_name else list(group.names)
    users = [each for each in engine.snapshot.containers.get().values() if each.image in group.names]
    delete_conflict(group, name, [each for each in users if not by_name or each.image == full or len(group.names) == 1], by_name, force)
    return Response(200, remove_image(engine, group, names, force or bool(users)))


@route("POST", "/images/prune")
def image_prune(engine: Engine, request: Request) -> Response:
    """Remove images that no container uses: those without a name unless dangling=false. Filters until, label, label!."""
    filters = request.filters("dangling", "until", "label", "label!")
    if flag_filter(filters, "dangling", True) is False:
        filters.pop("dangling")
    else:
        filters["dangling"] = ["true"]
    users = image_users(engine)
    deleted, reclaimed = [], 0
    for group in filter_images(engine, list(engine.snapshot.image_groups().values()), filters):
        if group.id not in users:
            with contextlib.suppress(ApiError):
                told = remove_image(engine, group, list(group.names), False)
                deleted += told
                reclaimed += image_size(group) if any("Deleted" in each for each in told) else 0
    engine.journal.emit("image", "prune", "", {"reclaimed": str(reclaimed)})
    return Response(200, {"ImagesDeleted": deleted or None, "SpaceReclaimed": reclaimed})


@route("POST", "/images/{image}/tag")
def image_tag(engine: Engine, request: Request, name: str) -> Response:
    """Give an image another name; 201, also when it has it already."""
    group = engine.snapshot.image(name)
    repository, tag = request.value("repo"), request.value("tag")
    target = parse_reference(f"{repository}:{tag}" if tag else repository)
    if target.digest:
        raise BadParameter("refusing to create a tag with a digest reference")
    with engine.changing_images():
        engine.nerdctl.run("tag", "--", group.names[0], target.name)
    engine.journal.emit("image", "tag", group.id, {"name": familiar(target.name)})
    return Response(201)


@route("POST", "/images/{image}/push")
def image_push(engine: Engine, request: Request, name: str) -> Response:
    """Push one tag, or all tags of a repository, as a progress stream with the digest in `aux`; 404 for no such image."""
    tag = request.value("tag")
    reference = parse_reference(name, "")
    if tag:
        reference = parse_reference(f"{reference.repository}:{tag}")
    names = [reference.name] if reference.tag else None
    groups = {each: group for group in engine.snapshot.image_groups().values() for each in group.names}
    if names is None:
        names = sorted(each for each in groups if each.startswith(reference.repository + ":") and "@" not in each)
    if not names or names[0] not in groups:
        raise NotFound(f"An image does not exist locally with the tag: {familiar(reference.repository)}")
    platform = request.value("platform")
    options = [f"--platform={platform_words(platform)}"] if platform else []

    def chunks() -> Iterator[bytes]:
        begin = {"status": f"The push refers to repository [{reference.repository}]"}
        yield message_line(begin)
        with credentials_for(engine, request, reference.repository.partition("/")[0]) as environment:
            for each in names:
                with engine.nerdctl.start("push", *options, "--", each, environment=environment, client=request.client) as process:
                    table = ProgressTable(PUSH_WORDS)
                    yield from follow_progress(process, table)
                    process.check()
                    for message in table.finish():
                        yield message_line(message)
                    pushed = re.findall(r"reduced-platform image \(([^,]+), (sha256:[0-9a-f]{64})\)", process.error_text())
                group, short = groups[each], each.rpartition(":")[2]
                digest = pushed[-1][1] if pushed else group.id
                size = docker_descriptor(group)["size"] if digest == group.id else (group.detail.get("ManifestDesc") or {}).get("size") or 0
                yield message_line({"status": f"{short}: digest: {digest} size: {size}"})
                yield message_line({"progressDetail": {}, "aux": {"Tag": short, "Digest": digest, "Size": size}})
                engine.journal.emit("image", "push", familiar(each), {"name": familiar(each)})

    return Response(200, Stream(as_error_detail(chunks())), "application/json")


@route("GET", "/images/{image}/get")
def image_save(engine: Engine, request: Request, name: str) -> Response:
    """The archive of one image."""
    return save_images(engine, request, [name])


@route("POST", "/commit")
def image_commit(engine: Engine, request: Request) -> Response:
    """Make an image of a container; 201 with its id. Changes beyond CMD and ENTRYPOINT need BuildKit."""
    container = engine.snapshot.container(request.value("container"))
    config = request.json()
    repository, tag = request.value("repo"), request.value("tag")
    target = parse_reference(f"{repository}:{tag}" if tag and repository else repository).name if repository else ""
    lines = change_lines(request.values("changes")) + config_changes(config)
    if container.state == "created":
        raise NotImplementedHere("nerdctl can only commit a container that was started once")
    own = [line for line in lines if re.match(r"(CMD|ENTRYPOINT)\s*\[", line, re.I)]
    working = target or f"{WORKING_NAME}commit:{os.urandom(8).hex()}"
    arguments = [f"--message={request.value('comment')}", f"--author={request.value('author')}",
                 f"--pause={'true' if request.flag('pause', True) else 'false'}"]
    with engine.changing_images():
        if len(own) == len(lines):
            engine.nerdctl.run("commit", *arguments, *(f"--change={line}" for line in lines), "--", container.real, working, timeout=600)
        else:
            before = f"{WORKING_NAME}commit:{os.urandom(8).hex()}"
            engine.nerdctl.run("commit", *arguments, "--", container.real, before, timeout=600)
            try:
                apply_changes(engine, before, working, lines)
            finally:
                engine.nerdctl.output("rmi", "--force", "--", before)
    group = engine.snapshot.image(working)
    engine.tell(container, "commit", comment=request.value("comment"), imageID=group.id, imageRef=familiar(target))
    return Response(201, {"Id": group.id})


def config_changes(config: Dict[str, Any]) -> List[str]:
    """The Dockerfile instructions for the fields of a container config in the body of a commit."""
    lines = []
    for key, word in (("Cmd", "CMD"), ("Entrypoint", "ENTRYPOINT")):
        if config.get(key):
            lines.append(f"{word} {json.dumps(string_list(config[key], key))}")
    lines += [f"ENV {each.partition('=')[0]}={json.dumps(each.partition('=')[2])}" for each in string_list(config.get("Env"), "Env")]
    lines += [f"LABEL {json.dumps(key)}={json.dumps(value)}" for key, value in string_map(config.get("Labels"), "Labels").items()]
    lines += [f"EXPOSE {each}" for each in typed(config.get("ExposedPorts"), dict, "ExposedPorts")]
    lines += [f"VOLUME {json.dumps([each])}" for each in typed(config.get("Volumes"), dict, "Volumes")]
    for key, word in (("User", "USER"), ("WorkingDir", "WORKDIR"), ("StopSignal", "STOPSIGNAL")):
        if config.get(key):
            lines.append(f"{word} {typed(config[key], str, key)}")
    if any("\n" in line or "\r" in line for line in lines):
        raise BadParameter("invalid config: it has a line break")
    return lines


@route("GET", "/images/{image}/attestations")
def image_attestations(engine: Engine, request: Request, name: str) -> Response:
    """Attestations of an image: nerdctl keeps the content of none, so there are none to show."""
    engine.snapshot.image(name)
    return Response(200, [])


###############################################################################
# Build
###############################################################################


class BodyFile(io.RawIOBase):
    """A request body as a raw file, for tarfile."""

    def __init__(self, body: Any):
        super().__init__()
        self.body = body

    def readable(self) -> bool:
        return True

    def readinto(self, view: Any) -> int:
        return self.body.readinto(memoryview(view))


def unpack_context(body: Any, root: str) -> None:
    """Unpack the tar of a build context (plain, gzip, bzip2, xz) below `root`, and nothing anywhere else: no entry is
    written through a link. 400 for what is no tar, or names a place outside; 500 when the disk is full."""
    # Not at the top: only builds need it, and it costs memory.
    import tarfile

    try:
        with tarfile.open(fileobj=io.BufferedReader(BodyFile(body), 1 << 20), mode="r|*", bufsize=1 << 20) as archive:
            for member in archive:
                unpack_member(archive, member, root)
    except tarfile.TarError as error:
        raise BadParameter(f"invalid build context: {error}") from None
    except (EOFError, UnicodeError, ValueError, zlib.error) as error:
        raise BadParameter(f"invalid build context: {error}") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ApiError("no space left on device while unpacking the build context (TMPDIR says where)") from None
        raise BadParameter(f"invalid build context: {error.strerror or error}") from None


def inside(root: str, name: str) -> str:
    """The place of an archive's entry below `root`; 400 when it is outside, or below a link."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise BadParameter(f"invalid build context: {name!r} is outside of it")
    path = root
    for part in parts[:-1]:
        path = os.path.join(path, part)
        try:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise BadParameter(f"invalid build context: {name!r} is below what is no folder")
        except FileNotFoundError:
            os.mkdir(path, 0o755)
    return os.path.join(path, parts[-1]) if parts else root


def unpack_member(archive: Any, member: Any, root: str) -> None:
    """Unpack one entry. Owners are left out: BuildKit takes every file of a context as root's."""
    path = inside(root, member.name)
    if member.isdir():
        if os.path.islink(path) or (os.path.lexists(path) and not os.path.isdir(path)):
            os.unlink(path)
        if not os.path.isdir(path):
            os.mkdir(path)
        # Folders must stay writable for what comes below them and for the cleaning up.
        os.chmod(path, (member.mode & 0o7777) | 0o700)
        return
    if path == root:
        raise BadParameter("invalid build context: an entry stands for the whole of it")
    if os.path.lexists(path):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    if member.issym():
        os.symlink(member.linkname, path)
    elif member.islnk():
        source = inside(root, member.linkname)
        if not os.path.lexists(source) or os.path.isdir(source):
            raise BadParameter(f"invalid build context: {member.name!r} is a link to what is not there")
        os.link(source, path, follow_symlinks=False)
    elif member.isreg():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(archive.extractfile(member), file, 1 << 20)
            os.fchmod(file.fileno(), member.mode & 0o7777)
        os.utime(path, (member.mtime, member.mtime))
    elif member.isfifo():
        os.mkfifo(path, member.mode & 0o777)
    else:
        raise BadParameter(f"invalid build context: {member.name!r} is a device")


def json_parameter(request: Request, name: str, kind: type) -> Any:
    """A query parameter that is JSON, an empty value of `kind` when absent; 400 otherwise."""
    text = request.value(name)
    return typed(parse_json(text.encode("utf-8", "surrogateescape")), kind, name) if text else kind()


def build_args(request: Request) -> Tuple[List[str], List[str]]:
    """argv of `nerdctl build` but for context, Dockerfile and tags, and warnings about what nerdctl cannot express. 400
    for bad values, 501 for what would make another image than asked for."""
    arguments = ["build", "--progress=plain"]
    warnings = []
    for key, value in json_parameter(request, "buildargs", dict).items():
        # Without a value it is the client's own environment that is meant, and that is not here.
        if value is not None:
            arguments.append(f"--build-arg={key}={typed(value, str, 'buildargs')}")
    for key, value in string_map(json_parameter(request, "labels", dict), "labels").items():
        arguments.append(f"--label={key}={value}")
    arguments += [f"--cache-from={each}" for each in string_list(json_parameter(request, "cachefrom", list), "cachefrom")]
    arguments += [f"--add-host={each}" for value in request.values("extrahosts") for each in value.split(",") if each]
    for name, flag in (("nocache", "--no-cache"), ("pull", "--pull")):
        if request.flag(name):
            arguments.append(flag)
    if request.value("target"):
        arguments.append(f"--target={request.value('target')}")
    if request.value("platform"):
        arguments.append(f"--platform={platform_words(request.value('platform'))}")
    mode = request.value("networkmode")
    if mode in ("host", "none"):
        arguments.append(f"--network={mode}")
        if mode == "host":
            arguments.append("--allow=network.host")
    elif mode not in ("", "default", "bridge"):
        raise NotImplementedHere(f"nerdctl cannot build in the network {mode!r}: only default, host and none")
    if request.flag("squash"):
        raise NotImplementedHere("nerdctl cannot squash an image")
    if request.value("outputs") not in ("", "[]", "null"):
        raise NotImplementedHere("outputs are for BuildKit builds: use docker buildx")
    for name in ("memory", "memswap", "cpushares", "cpusetcpus", "cpuperiod", "cpuquota", "shmsize", "ulimits", "cgroupparent"):
        if request.value(name) not in ("", "0", "[]", "null"):
            warnings.append(f"[Warning] {name} is not carried out: nerdctl cannot limit a build")
    return arguments, warnings


def registry_config(request: Request) -> Dict[str, Dict[str, str]]:
    """The `auths` of an X-Registry-Config header: registry -> credentials."""
    text = request.headers.get("X-Registry-Config") or ""
    if not text:
        return {}
    try:
        value = json.loads(base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4)))
    except (ValueError, binascii.Error):
        raise BadParameter("invalid X-Registry-Config header: it is not base64url of JSON") from None
    entries = typed(value, dict, "X-Registry-Config")
    auths: Dict[str, Dict[str, str]] = {}
    for registry, entry in typed(entries.get("auths", entries), dict, "X-Registry-Config").items():
        host = re.sub(r"^https?://", "", registry).partition("/")[0]
        auths.update(registry_auths({key: each for key, each in typed(entry, dict, registry).items() if isinstance(each, str)}, host))
    return auths


FAILED_STEP = re.compile(r'process "(?P<command>.*)" did not complete successfully: exit code: (?P<code>\d+)')


def build_failure(lines: Iterable[str]) -> Dict[str, Any]:
    """The last message of a failed build, from the last lines of its progress."""
    lines = list(lines)
    for line in reversed(lines):
        found = FAILED_STEP.search(line)
        if found:
            text = f"The command '{found.group('command')}' returned a non-zero code: {found.group('code')}"
            return {"errorDetail": {"code": int(found.group("code")), "message": text}, "error": text}
    told = [line for line in lines if re.match(r"(error|ERROR):? ", line)]
    text = re.sub(r"^(error|ERROR):? ", "", told[-1]) if told else str(nerdctl_error("\n".join(lines)))
    return {"errorDetail": {"message": text}, "error": text}


REMOTE_LIMIT = 1 << 20


def build_context(request: Request, folder: str) -> None:
    """Fill `folder` with the context of a build: the body unpacked, or what `remote` names (a tar, or a Dockerfile)."""
    remote = request.value("remote")
    if not remote or remote == "client-session":
        unpack_context(request.body, folder)
        return
    if re.match(r"git://|git@|ssh://|github\.com/|https?://\S+\.git(#\S*)?$", remote):
        raise NotImplementedHere("nerdctl cannot build from a git repository: clone it, or use docker buildx")
    if not re.fullmatch(r"https?://\S+", remote):
        raise BadParameter(f"unable to prepare context: {remote!r} is not a URL")
    import urllib.request

    try:
        with urllib.request.urlopen(remote, timeout=60) as answer:
            source = io.BufferedReader(answer, 1 << 20) if not isinstance(answer, io.BufferedIOBase) else answer
            if (answer.headers.get("Content-Type") or "").startswith("text/plain"):
                data = source.read(REMOTE_LIMIT + 1)
                if len(data) > REMOTE_LIMIT:
                    raise BadParameter("unable to prepare context: the Dockerfile is larger than 1 MiB")
                with open(inside(folder, request.value("dockerfile") or "Dockerfile"), "wb") as file:
                    file.write(data)
            else:
                unpack_context(source, folder)
    except (OSError, http.client.HTTPException) as error:
        raise BadParameter(f"unable to prepare context: cannot download {remote}: {error}") from None


def dockerfile_args(request: Request, folder: str) -> List[str]:
    """The flag for the Dockerfile; 400 when it is not in the context."""
    name = request.value("dockerfile") or "Dockerfile"
    path = os.path.realpath(os.path.join(folder, name.lstrip("/")))
    if not path.startswith(os.path.realpath(folder) + "/"):
        raise BadParameter(f"Forbidden path outside the build context: {name}")
    if not os.path.isfile(path):
        raise BadParameter(f"Cannot locate specified Dockerfile: {name}")
    return [f"--file={path}"]


@route("POST", "/build")
def image_build(engine: Engine, request: Request) -> Response:
    """Build an image from a tar or a URL: progress as a stream, the id in `aux`, a failure as its last message."""
    if request.value("version") == "2":
        raise NotImplementedHere("a BuildKit build comes over /session and /grpc: use the buildx plugin")
    arguments, warnings = build_args(request)
    auths = registry_config(request)
    tags = [parse_reference(each) for each in request.values("t") if each]
    if any(each.digest for each in tags):
        raise BadParameter("refusing to create a tag with a digest reference")
    names = [each.name for each in tags] or [f"{WORKING_NAME}build:{os.urandom(8).hex()}"]
    quiet = request.flag("q")

    def chunks() -> Iterator[bytes]:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(engine.workspace.temporary("build"))
            environment = stack.enter_context(engine.workspace.docker_config(auths)) if auths else None
            build_context(request, folder)
            words = [*arguments, *dockerfile_args(request, folder), *(f"--tag={name}" for name in names), "--", folder]
            for each in warnings:
                yield message_line({"stream": each + "\n"})
            stack.enter_context(engine.changing_images())
            last: collections.deque = collections.deque(maxlen=200)
            with engine.nerdctl.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, environment=environment,
                                      client=request.client) as process:
                for line in process.lines(process.stderr):
                    last.append(line)
                    if not quiet and parse_logrus(line)[0] == "":
                        yield message_line({"stream": line + "\n"})
                if process.wait():
                    raise_unavailable(last)
                    yield message_line(build_failure(last))
                    return
        group = engine.snapshot.image(names[0])
        for name in names if tags else ():
            engine.journal.emit("image", "tag", group.id, {"name": familiar(name)})
        if quiet:
            yield message_line({"stream": group.id + "\n"})
            return
        yield message_line({"aux": {"ID": group.id}})
        yield message_line({"stream": f"Successfully built {group.id[7:19]}\n"})
        for name in names if tags else ():
            yield message_line({"stream": f"Successfully tagged {familiar(name)}\n"})

    return Response(200, Stream(as_error_detail(chunks()), primed=True), "application/json")


def raise_unavailable(lines: Iterable[str]) -> None:
    """503 when a build failed because there is no buildkitd, which is not the build's fault."""
    error = nerdctl_error("\n".join(lines))
    if isinstance(error, Unavailable):
        raise error


def docker_cache(record: Dict[str, Any]) -> Dict[str, Any]:
    """A record of BuildKit's cache as Docker shows it."""
    return {
        "ID": record.get("id") or "", "Parents": record.get("parents") or None, "Type": record.get("recordType") or record.get("type") or "regular",
        "Description": record.get("description") or "", "InUse": bool(record.get("inUse")), "Shared": bool(record.get("shared")),
        "Size": record.get("size") or 0, "CreatedAt": record.get("createdAt") or ZERO_TIME, "LastUsedAt": record.get("lastUsedAt"),
        "UsageCount": record.get("usageCount") or 0,
    }


def build_cache(engine: Engine) -> List[Dict[str, Any]]:
    """The records of BuildKit's cache; none where no buildkitd answers."""
    output = engine.nerdctl.buildctl("du", "--format", "{{json .}}")
    if output.status:
        return []
    found = []
    for row in parse_rows(output.stdout):
        found += [docker_cache(each) for each in (row if isinstance(row, list) else [row])]
    return found


PRUNE_FILTERS = ("description", "id", "inuse", "label", "parent", "private", "shared", "type", "until", "unused-for")


@route("POST", "/build/prune")
def build_prune(engine: Engine, request: Request) -> Response:
    """Remove build cache, by BuildKit's own filters and `until`; 503 where no buildkitd answers."""
    filters = request.filters(*PRUNE_FILTERS)
    arguments = ["prune", "--format", "{{json .}}", *(["--all"] if request.flag("all") else [])]
    for key, values in filters.items():
        for value in values:
            if key in ("until", "unused-for"):
                arguments.append(f"--keep-duration={max(0, int(time.time() - (until_limit([value]) or 0)))}s")
            else:
                arguments.append(f"--filter={key}=={value}" if key not in ("inuse", "private", "shared") else f"--filter={key}")
    for name in ("keep-storage", "reserved-space"):
        if request.integer(name):
            arguments.append(f"--keep-storage={request.integer(name) / 1e6:g}")
    output = engine.nerdctl.buildctl(*arguments, timeout=600)
    if output.status:
        raise nerdctl_error(output.stderr) if "dial" not in output.stderr else Unavailable(
            "buildkitd does not answer: start it with a containerd worker, or say where it is with --buildkit-host")
    rows = [each for row in parse_rows(output.stdout) for each in (row if isinstance(row, list) else [row])]
    engine.journal.emit("builder", "prune", "", {"reclaimed": str(sum(row.get("size") or 0 for row in rows))})
    return Response(200, {"CachesDeleted": [row.get("id") for row in rows] or None, "SpaceReclaimed": sum(row.get("size") or 0 for row in rows)})


###############################################################################
# Containers
###############################################################################

AGO = re.compile(r"(?:about )?(an?|less than a|\d+) (second|minute|hour|day|week|month|year)s?", re.I)
UNIT_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800, "month": 2592000, "year": 31536000}
PORT_RANGE = re.compile(r"(?:(?P<ip>.*):)?(?P<host>\d+)(?:-(?P<host_end>\d+))?->(?P<port>\d+)(?:-(?P<end>\d+))?/(?P<kind>\w+)")
REQUEST_PART = 3900


def parse_ports(text: str) -> List[Dict[str, Any]]:
    """The `Ports` of nerdctl's ps (`0.0.0.0:8000-8001->80-81/tcp, …`) as Docker's list."""
    ports = []
    for part in text.split(","):
        found = PORT_RANGE.fullmatch(part.strip())
        if found:
            first, host = int(found.group("port")), int(found.group("host"))
            for offset in range(int(found.group("end") or first) - first + 1):
                ports.append({"IP": (found.group("ip") or "0.0.0.0").strip("[]"), "PrivatePort": first + offset,
                              "PublicPort": host + offset, "Type": found.group("kind")})
    return ports


def parse_ago(text: str) -> Optional[int]:
    """Seconds of nerdctl's `5 minutes ago`; None where there is none."""
    found = AGO.search(text)
    if not found:
        return None
    number = found.group(1).lower()
    return (int(number) if number.isdigit() else 0 if number.startswith("less") else 1) * UNIT_SECONDS[found.group(2).lower()]


def parse_status(text: str) -> Dict[str, Any]:
    """nerdctl's status in parts: `code` (None while it never ended), `health` ("" for none), `ago` in seconds."""
    code = re.match(r"\w+ \((\d+)\)", text)
    health = re.search(r"\((?:health: )?(starting|healthy|unhealthy)\)", text)
    return {"code": int(code.group(1)) if code else None, "health": health.group(1) if health else "", "ago": parse_ago(text)}


def lifecycle(container: Container) -> Dict[str, Any]:
    """What nerdctl noted of the container's start, {} where its folder is not readable from here."""
    if "lifecycle" not in container.memo:
        container.memo["lifecycle"] = {}
        if container.folder:
            with contextlib.suppress(OSError, ValueError):
                with open(os.path.join(container.folder, "lifecycle.json"), "rb") as file:
                    container.memo["lifecycle"] = json.load(file)
    return container.memo["lifecycle"]


def started_at(container: Container) -> Optional[int]:
    """When it was last started, in nanoseconds since 1970; None when never or not known."""
    told = nanoseconds_of(str(lifecycle(container).get("started_at") or ""))
    return told if told and told > 0 else None


def status_text(container: Container, now: float) -> str:
    """The status as `docker ps` words it: `Up 5 minutes (healthy)`, `Exited (0) 2 hours ago`, `Created`."""
    told = parse_status(container.status)
    state = container.state
    if state in ("running", "paused"):
        began = started_at(container) or container.created
        text = "Up " + human_duration(max(0.0, now - began / 1e9))
        if state == "paused":
            return text + " (Paused)"
        if told["health"]:
            text += f" (health: {told['health']})" if told["health"] == "starting" else f" ({told['health']})"
        return text
    if told["code"] is not None:
        ended = container.memo.setdefault("ended", container.read_at - (told["ago"] or 0))
        word = "Restarting" if state == "restarting" else "Exited"
        return f"{word} ({told['code']}) {human_duration(max(0.0, now - ended))} ago"
    return "Created" if state == "created" else container.status


def parse_mounts(labels: Dict[str, str]) -> List[Dict[str, Any]]:
    """The mounts that nerdctl noted in labels, of 2.3 (one a label) and before (one list), as Docker's MountPoints."""
    found: List[Dict[str, Any]] = []
    with contextlib.suppress(ValueError):
        if labels.get("nerdctl/mounts"):
            found = json.loads(labels["nerdctl/mounts"]) or []
        for number in itertools.count():
            if f"nerdctl/mounts.{number}" not in labels:
                break
            found.append(json.loads(labels[f"nerdctl/mounts.{number}"]))
    mounts = []
    for each in found:
        mount = {"Type": each.get("Type") or "bind"}
        if each.get("Name"):
            mount["Name"] = each["Name"]
        mount.update({"Source": each.get("Source") or "", "Destination": each.get("Destination") or ""})
        if mount["Type"] == "volume":
            mount["Driver"] = each.get("Driver") or "local"
        mount.update({"Mode": each.get("Mode") or "", "RW": bool(each.get("RW", True)), "Propagation": each.get("Propagation") or ""})
        mounts.append(mount)
    return mounts


def network_names(container: Container) -> List[str]:
    """The names of the networks a container was given, in the order of its interfaces."""
    with contextlib.suppress(ValueError):
        names = json.loads(container.labels.get("nerdctl/networks") or "[]")
        if isinstance(names, list):
            return [str(each) for each in names]
    return []


def network_mode(container: Container) -> str:
    """Docker's NetworkMode: the name of the first network, host, none or container:ID."""
    names = network_names(container)
    return names[0] if names else "bridge"


def request_labels(body: Dict[str, Any]) -> Dict[str, str]:
    """The create request as labels that fit nerdctl's 4096 bytes each."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True)
    parts = [text[start:start + REQUEST_PART] for start in range(0, len(text), REQUEST_PART)]
    return {f"{LABEL_REQUEST}.{number}": part for number, part in enumerate(parts)}


def stored_request(container: Container) -> Dict[str, Any]:
    """The create request that a container was made with, {} for one that others made."""
    if "request" not in container.memo:
        parts = []
        for number in itertools.count():
            part = container.labels.get(f"{LABEL_REQUEST}.{number}")
            if part is None:
                break
            parts.append(part)
        try:
            found = json.loads("".join(parts)) if parts else {}
        except ValueError:
            found = {}
        container.memo["request"] = found if isinstance(found, dict) else {}
    return container.memo["request"]


def endpoint(container: Container, network: Dict[str, Any], address: Dict[str, Any], asked: Dict[str, Any]) -> Dict[str, Any]:
    """One entry of NetworkSettings.Networks. `network` is the snapshot's, `address` of its interface, `asked` the
    request's EndpointSettings."""
    running = bool(address)
    identity = network.get("Id") or ""
    config = next((each for each in (network.get("IPAM") or {}).get("Config") or [] if ":" not in (each.get("Subnet") or ":")), {})
    return {
        "IPAMConfig": asked.get("IPAMConfig"), "Links": asked.get("Links"), "Aliases": asked.get("Aliases"), "DriverOpts": asked.get("DriverOpts"),
        "GwPriority": 0, "NetworkID": identity,
        "EndpointID": hashlib.sha256(f"{container.id}/{identity}".encode()).hexdigest() if running else "",
        "Gateway": config.get("Gateway") or "" if running else "", "IPAddress": address.get("ip") or "", "MacAddress": address.get("mac") or "",
        "IPPrefixLen": address.get("prefix") or 0, "IPv6Gateway": "", "GlobalIPv6Address": address.get("ip6") or "",
        "GlobalIPv6PrefixLen": address.get("prefix6") or 0, "DNSNames": None,
    }


def parse_addresses(task: Optional[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The addresses of a task's interfaces (native inspect) but the loopback, in order: ip, prefix, ip6, prefix6, mac."""
    found = []
    for interface in ((task or {}).get("NetNS") or {}).get("Interfaces") or []:
        if interface.get("Name") == "lo" or "loopback" in (interface.get("Flags") or []) or not re.match(r"eth\d", interface.get("Name") or ""):
            continue
        entry: Dict[str, Any] = {"mac": interface.get("HardwareAddr") or ""}
        for text in interface.get("Addrs") or []:
            address, _, prefix = text.partition("/")
            if ":" not in address:
                entry.update({"ip": address, "prefix": int(prefix or 0)})
            elif not address.lower().startswith("fe80"):
                entry.update({"ip6": address, "prefix6": int(prefix or 0)})
        found.append(entry)
    return found


def docker_networks(container: Container, networks: Dict[str, Dict[str, Any]], addresses: List[Dict[str, Any]]) -> Dict[str, Any]:
    """NetworkSettings.Networks: the container's networks by name, with the addresses of its interfaces in turn."""
    asked = typed(stored_request(container).get("NetworkingConfig"), dict, "NetworkingConfig").get("EndpointsConfig") or {}
    found = {}
    for number, name in enumerate(each for each in network_names(container) if not each.startswith("container:")):
        network = networks.get(name) or {}
        address = addresses[number] if number < len(addresses) else {}
        wanted = asked.get(name) or asked.get(network.get("Id")) or (asked.get("default") if name == "bridge" else None) or {}
        found[network.get("Name") or name] = endpoint(container, network, address, wanted)
    return found


def docker_container_row(container: Container, image_id: str, networks: Dict[str, Any], now: float, version: Tuple[int, int]) -> Dict[str, Any]:
    """A container as `/containers/json` lists it."""
    try:
        command = json.loads(container.command) if container.command.startswith('"') else container.command
    except ValueError:
        command = container.command.strip('"')
    row = {
        "Id": container.id, "Names": ["/" + container.name], "Image": shown_image(container), "ImageID": image_id, "Command": command,
        "Created": container.created // 10**9, "Ports": parse_ports(container.ports), "Labels": container.visible_labels,
        "State": container.state, "Status": status_text(container, now),
        "HostConfig": {"NetworkMode": network_mode(container)}, "NetworkSettings": {"Networks": networks},
        "Mounts": parse_mounts(container.labels),
    }
    if version >= (1, 52):
        health = parse_status(container.status)["health"]
        row["Health"] = {"Status": health or "none", "FailingStreak": 0}
    return row


def shown_image(container: Container) -> str:
    """The image as the client named it, else as people write it."""
    return stored_request(container).get("Image") or familiar(container.image)


CONTAINER_FILTERS = ("ancestor", "before", "expose", "exited", "health", "id", "isolation", "is-task", "label", "name", "network", "publish",
                     "since", "status", "volume")
STATES = ("created", "running", "paused", "restarting", "removing", "exited", "dead")


def check_container_filters(filters: Dict[str, List[str]]) -> None:
    """400 with dockerd's words for a filter value that cannot be."""
    for each in filters.get("status") or []:
        if each not in STATES:
            raise BadParameter(f"invalid value for state ({each}): must be one of {', '.join(STATES)}")
    for each in filters.get("exited") or []:
        if not re.fullmatch(r"-?\d+", each):
            raise BadParameter(f"invalid filter 'exited={each}'")
    for each in filters.get("health") or []:
        if each not in ("none", "starting", "healthy", "unhealthy"):
            raise BadParameter(f"invalid value for health ({each}): must be one of none, starting, healthy, unhealthy")


def match_port(ports: List[Dict[str, Any]], key: str, wanted: List[str]) -> bool:
    """Whether a publish or expose filter (`80`, `80/tcp`, `80-90`) names one of the ports."""
    for text in wanted:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?(?:/(\w+))?", text)
        if not found:
            raise BadParameter(f"invalid filter: {text!r} is not a port")
        low, high = int(found.group(1)), int(found.group(2) or found.group(1))
        if any(low <= port.get(key, -1) <= high and port["Type"] == (found.group(3) or "tcp") for port in ports):
            return True
    return False


def match_container(engine: Engine, container: Container, filters: Dict[str, List[str]], images: Dict[str, str]) -> bool:
    """Whether a container passes the filters of the list, but for before and since."""
    told = parse_status(container.status)
    networks = network_names(container)
    checks: Dict[str, Callable[[List[str]], bool]] = {
        "id": lambda wanted: any(container.id.startswith(each) for each in wanted),
        "name": lambda wanted: match_any(container.name, wanted) or match_any("/" + container.name, wanted),
        "label": lambda wanted: match_labels(container.visible_labels, wanted),
        "status": lambda wanted: container.state in wanted,
        "exited": lambda wanted: container.state == "exited" and str(told["code"]) in wanted,
        "health": lambda wanted: (told["health"] or "none") in wanted,
        "network": lambda wanted: any(each in networks or any(
            (engine.snapshot.networks.get().get(name) or {}).get("Id", "").startswith(each) for name in networks) for each in wanted),
        "volume": lambda wanted: any(each in (mount.get("Name"), mount["Destination"], mount["Source"])
                                     for each in wanted for mount in parse_mounts(container.labels)),
        "publish": lambda wanted: match_port(parse_ports(container.ports), "PublicPort", wanted),
        "expose": lambda wanted: match_port(parse_ports(container.ports), "PrivatePort", wanted),
        "ancestor": lambda wanted: any(container.image in ancestor_names(engine, each) for each in wanted),
        "isolation": lambda wanted: True,
        "is-task": lambda wanted: "false" in [each.lower() for each in wanted] or "0" in wanted,
    }
    return all(checks[key](wanted) for key, wanted in filters.items() if key in checks and wanted)


def ancestor_names(engine: Engine, name: str) -> List[str]:
    """All names of the image of an ancestor filter, [] when there is no such image."""
    try:
        return engine.snapshot.image(name).names
    except ApiError:
        return []


def list_containers(engine: Engine, filters: Dict[str, List[str]], everything: bool, limit: int) -> List[Container]:
    """The containers of a list request, newest first."""
    check_container_filters(filters)
    table = list(engine.snapshot.containers.get().values())
    table.sort(key=lambda each: -each.created)
    for key, later in (("before", False), ("since", True)):
        for name in filters.get(key) or []:
            moment = engine.snapshot.container(name).created
            table = [each for each in table if (each.created > moment if later else each.created < moment)]
    if limit > 0 or filters.get("status") or filters.get("exited") or filters.get("before") or filters.get("since"):
        everything = True
    found = [each for each in table if (everything or each.running or each.state == "restarting") and match_container(engine, each, filters, {})]
    return found[:limit] if limit > 0 else found


def container_sizes(engine: Engine, container: Optional[Container] = None) -> Dict[str, Tuple[int, int]]:
    """Real id -> bytes written and bytes in all, of one container or of all; read anew, since no event tells of them."""
    arguments = ["ps", "-a", "--no-trunc", "--size", *([f"--filter=id={container.real}"] if container else [])]
    found = {}
    for row in engine.nerdctl.rows(*arguments, "--format", '{"ID":{{json .ID}},"Size":{{json .Size}}}'):
        written, _, whole = (row.get("Size") or "").partition(" (virtual ")
        found[row["ID"]] = (size_bytes(written), size_bytes(whole.rstrip(")")))
    return found


@route("GET", "/containers/json")
def container_list(engine: Engine, request: Request) -> Response:
    """Containers, newest first: the running ones, or `all`; `limit`, `size`, and all of the API's filters."""
    filters = request.filters(*CONTAINER_FILTERS)
    limit = request.integer("limit", -1)
    found = list_containers(engine, filters, request.flag("all"), limit)
    sizes = container_sizes(engine) if request.flag("size") else {}
    images = {image.name: image.id for image in engine.snapshot.names.get()} if found else {}
    networks = engine.snapshot.networks.get() if found else {}
    rows, now = [], time.time()
    for container in found:
        addresses = parse_addresses(container.memo["detail"].get("Task")) if "detail" in container.memo else []
        row = docker_container_row(container, images.get(container.image, ""), docker_networks(container, networks, addresses), now, request.version)
        if container.real in sizes:
            row["SizeRw"], row["SizeRootFs"] = sizes[container.real]
        rows.append(row)
    return Response(200, rows)


HOST_CONFIG: Dict[str, Any] = {
    "AutoRemove": False, "Binds": None, "BlkioDeviceReadBps": None, "BlkioDeviceReadIOps": None, "BlkioDeviceWriteBps": None,
    "BlkioDeviceWriteIOps": None, "BlkioWeight": 0, "BlkioWeightDevice": [], "CapAdd": None, "CapDrop": None, "Cgroup": "",
    "CgroupParent": "", "CgroupnsMode": "private", "ConsoleSize": [0, 0], "ContainerIDFile": "", "CpuCount": 0, "CpuPercent": 0, "CpuPeriod": 0,
    "CpuQuota": 0, "CpuRealtimePeriod": 0, "CpuRealtimeRuntime": 0, "CpuShares": 0, "CpusetCpus": "", "CpusetMems": "",
    "DeviceCgroupRules": None, "DeviceRequests": None, "Devices": [], "Dns": [], "DnsOptions": [], "DnsSearch": [], "ExtraHosts": None,
    "GroupAdd": None, "IOMaximumBandwidth": 0, "IOMaximumIOps": 0, "IpcMode": "private", "Isolation": "", "Links": None,
    "LogConfig": {"Config": {}, "Type": "json-file"}, "MaskedPaths": [], "Memory": 0, "MemoryReservation": 0, "MemorySwap": 0,
    "MemorySwappiness": None, "NanoCpus": 0, "NetworkMode": "bridge", "OomKillDisable": False, "OomScoreAdj": 0, "PidMode": "",
    "PidsLimit": None, "PortBindings": {}, "Privileged": False, "PublishAllPorts": False, "ReadonlyPaths": [], "ReadonlyRootfs": False,
    "RestartPolicy": {"MaximumRetryCount": 0, "Name": "no"}, "Runtime": "io.containerd.runc.v2", "SecurityOpt": None, "ShmSize": 67108864,
    "UTSMode": "", "Ulimits": [], "UsernsMode": "", "VolumeDriver": "", "VolumesFrom": None,
}


def restart_policy(labels: Dict[str, str]) -> Dict[str, Any]:
    """Docker's RestartPolicy from containerd's label."""
    name, _, count = (labels.get("containerd.io/restart.policy") or "no").partition(":")
    return {"Name": name, "MaximumRetryCount": int(count) if count.isdigit() else 0}


def port_bindings(container: Container) -> Dict[str, Any]:
    """Docker's port map of what is published."""
    found: Dict[str, Any] = {}
    for port in parse_ports(container.ports):
        found.setdefault(f"{port['PrivatePort']}/{port['Type']}", []).append({"HostIp": port["IP"], "HostPort": str(port["PublicPort"])})
    return found


def docker_host_config(container: Container, spec: Dict[str, Any]) -> Dict[str, Any]:
    """HostConfig: what the OCI spec and nerdctl's labels tell, under what the client asked for."""
    labels, resources = container.labels, spec.get("resources") or {}
    memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
    found = dict(HOST_CONFIG)
    log = {}
    with contextlib.suppress(ValueError):
        log = json.loads(labels.get("nerdctl/log-config") or "{}")
    ipc = {}
    with contextlib.suppress(ValueError):
        ipc = json.loads(labels.get("nerdctl/ipc") or "{}")
    found.update({
        "AutoRemove": labels.get("nerdctl/auto-remove") == "true", "CpuPeriod": cpu.get("period") or 0, "CpuQuota": cpu.get("quota") or 0,
        "CpuShares": cpu.get("shares") or 0, "CpusetCpus": cpu.get("cpus") or "", "CpusetMems": cpu.get("mems") or "",
        "IpcMode": ipc.get("mode") or "private", "LogConfig": {"Type": log.get("driver") or "json-file", "Config": log.get("opts") or {}},
        "MaskedPaths": spec.get("maskedPaths") or [], "ReadonlyPaths": spec.get("readonlyPaths") or [],
        "Memory": memory.get("limit") or 0, "MemoryReservation": memory.get("reservation") or 0, "MemorySwap": memory.get("swap") or 0,
        "NetworkMode": network_mode(container), "OomScoreAdj": (spec.get("process") or {}).get("oomScoreAdj") or 0,
        "PidsLimit": (resources.get("pids") or {}).get("limit") or None, "PortBindings": port_bindings(container),
        "Privileged": labels.get("nerdctl/privileged") == "true", "ReadonlyRootfs": bool((spec.get("root") or {}).get("readonly")),
        "RestartPolicy": restart_policy(labels), "Runtime": container.runtime or found["Runtime"],
        "Binds": [f"{mount['Source']}:{mount['Destination']}" + ("" if mount["RW"] else ":ro")
                  for mount in parse_mounts(labels) if mount["Type"] == "bind"] or None,
        "CgroupnsMode": "private" if any(each.get("type") == "cgroup" for each in spec.get("namespaces") or []) else "host",
    })
    asked = typed(stored_request(container).get("HostConfig"), dict, "HostConfig")
    for key, value in asked.items():
        if key == "RestartPolicy" and isinstance(value, dict):
            # `docker update` changes it later, and the label follows.
            continue
        if value not in (None, "", 0, [], {}) or key not in found:
            found[key] = value
    if found["NetworkMode"] == "default":
        found["NetworkMode"] = network_mode(container)
    return found


def docker_config(container: Container, spec: Dict[str, Any], image: Dict[str, Any]) -> Dict[str, Any]:
    """Config: what the client asked for with the image's defaults under it, or what the OCI spec tells."""
    asked, process = stored_request(container), spec.get("process") or {}
    arguments = process.get("args") or []
    entrypoint = image.get("Entrypoint") or None
    command = arguments
    if entrypoint and arguments[:len(entrypoint)] == entrypoint:
        command = arguments[len(entrypoint):]
    else:
        entrypoint = None
    if asked:
        entrypoint = asked["Entrypoint"] if asked.get("Entrypoint") is not None else image.get("Entrypoint")
        command = asked.get("Cmd") or (None if asked.get("Entrypoint") is not None else image.get("Cmd"))
    found = {
        "Hostname": container.labels.get("nerdctl/hostname") or spec.get("hostname") or "", "Domainname": container.labels.get("nerdctl/domainname") or "",
        "User": container.labels.get("nerdctl/user") or image.get("User") or "", "AttachStdin": bool(asked.get("AttachStdin")),
        "AttachStdout": bool(asked.get("AttachStdout", not asked)), "AttachStderr": bool(asked.get("AttachStderr", not asked)),
        "Tty": bool(asked.get("Tty", process.get("terminal", False))), "OpenStdin": bool(asked.get("OpenStdin", False)),
        "StdinOnce": bool(asked.get("StdinOnce", False)),
        "Env": [each for each in process.get("env") or [] if not each.startswith("HOSTNAME=")] or None,
        "Cmd": command, "Image": shown_image(container), "Volumes": asked.get("Volumes") or image.get("Volumes"),
        "WorkingDir": asked.get("WorkingDir") or process.get("cwd") or "", "Entrypoint": entrypoint,
        "OnBuild": None, "Labels": container.visible_labels,
    }
    ports = {**{key: {} for key in port_bindings(container)}, **(image.get("ExposedPorts") or {}), **(asked.get("ExposedPorts") or {})}
    if ports:
        found["ExposedPorts"] = ports
    for key in ("Healthcheck", "StopSignal", "StopTimeout", "Shell", "MacAddress", "NetworkDisabled"):
        if asked.get(key) or image.get(key):
            found[key] = asked.get(key) or image.get(key)
    return found


def docker_state(container: Container, detail: Dict[str, Any], health: Optional[Dict[str, Any]]) -> Dict[str, Any]:
    """State, with times of RFC 3339. nerdctl's own `Restarting` is true for whatever has a restart policy, so it is not
    used."""
    task = detail.get("Task") or {}
    status = task.get("Status") or {}
    state = {"running": "running", "paused": "paused", "pausing": "paused", "stopped": "exited", "created": "created"}.get(
        status.get("Status") or "", container.state)
    if container.state == "restarting":
        state = "restarting"
    ended = nanoseconds_of(status.get("ExitTime") or "")
    began = started_at(container)
    if not task and began:
        # The task went with a restart of the machine; containerd remembers no more.
        state = "exited"
    found = {
        "Status": state, "Running": state in ("running", "paused", "restarting"), "Paused": state == "paused", "Restarting": state == "restarting",
        "OOMKilled": bool(container.memo.get("oom")), "Dead": False, "Pid": task.get("Pid") or 0 if state in ("running", "paused") else 0,
        "ExitCode": status.get("ExitStatus") or 0 if state in ("exited", "restarting") else 0, "Error": container.labels.get("nerdctl/error") or "",
        "StartedAt": rfc3339(began), "FinishedAt": rfc3339(ended if ended and ended > 0 else None),
    }
    if health:
        found["Health"] = health
    return found


def docker_container(container: Container, detail: Dict[str, Any], networks: Dict[str, Dict[str, Any]], image: Optional[ImageGroup],
                     health: Optional[Dict[str, Any]], version: Tuple[int, int]) -> Dict[str, Any]:
    """A container as `/containers/{id}/json` shows it."""
    spec = detail.get("Spec") or {}
    image_config = (image.config.get("config") or {}) if image else {}
    config, arguments = docker_config(container, spec, image_config), (spec.get("process") or {}).get("args") or [""]
    attached = docker_networks(container, networks, parse_addresses(detail.get("Task")))
    first = next(iter(attached.values()), {})
    hosts = next((each["source"] for each in spec.get("mounts") or [] if each.get("destination") == "/etc/hosts"), "")
    ports: Dict[str, Any] = {key: None for key in config.get("ExposedPorts") or {}}
    ports.update(port_bindings(container) if container.running else {})
    settings = {
        "SandboxID": hashlib.sha256(container.id.encode()).hexdigest() if container.running else "", "SandboxKey": "", "Ports": ports, "Networks": attached,
    }
    if version < (1, 52):
        settings.update({"Bridge": "", "HairpinMode": False, "LinkLocalIPv6Address": "", "LinkLocalIPv6PrefixLen": 0,
                         "SecondaryIPAddresses": None, "SecondaryIPv6Addresses": None})
        for key, empty in (("EndpointID", ""), ("Gateway", ""), ("GlobalIPv6Address", ""), ("GlobalIPv6PrefixLen", 0), ("IPAddress", ""),
                           ("IPPrefixLen", 0), ("IPv6Gateway", ""), ("MacAddress", "")):
            settings[key] = first.get(key, empty)
    found = {
        "Id": container.id, "Created": rfc3339(container.created), "Path": arguments[0], "Args": arguments[1:],
        "State": docker_state(container, detail, health), "Image": image.id if image else "",
        "ResolvConfPath": os.path.join(container.folder, "resolv.conf") if container.folder else "",
        "HostnamePath": os.path.join(container.folder, "hostname") if container.folder else "", "HostsPath": hosts,
        "LogPath": log_path(container), "Name": "/" + container.name, "RestartCount": int(container.labels.get("containerd.io/restart.count") or 0),
        "Driver": detail.get("Snapshotter") or "overlayfs", "Platform": "linux", "MountLabel": "", "ProcessLabel": "",
        "AppArmorProfile": (spec.get("process") or {}).get("apparmorProfile") or "", "ExecIDs": None,
        "HostConfig": docker_host_config(container, spec), "GraphDriver": {"Data": None, "Name": detail.get("Snapshotter") or "overlayfs"},
        "Mounts": parse_mounts(container.labels), "Config": config, "NetworkSettings": settings,
    }
    if version >= (1, 48) and image:
        found["ImageManifestDescriptor"] = {**docker_descriptor(image), "platform": docker_platform(image)}
    return found


def log_path(container: Container) -> str:
    """The json-file log of a container, "" where its log driver is another one."""
    driver = "json-file"
    with contextlib.suppress(ValueError):
        driver = json.loads(container.labels.get("nerdctl/log-config") or "{}").get("driver") or driver
    if driver != "json-file" or not container.folder:
        return ""
    return os.path.join(container.folder, container.real + "-json.log")


def container_health(engine: Engine, container: Container) -> Optional[Dict[str, Any]]:
    """State.Health of a container with a health check, None without."""
    if not container.labels.get("nerdctl/healthcheck"):
        return None
    if "health" not in container.memo:
        rows = engine.nerdctl.rows("container", "inspect", "--format", "{{json .State}}", "--", container.real)
        health = (rows[0] if rows else {}).get("Health") or {}
        container.memo["health"] = {"Status": health.get("Status") or "starting", "FailingStreak": health.get("FailingStreak") or 0,
                                    "Log": health.get("Log") or []}
    return container.memo["health"]


def image_of(engine: Engine, container: Container) -> Optional[ImageGroup]:
    """The image of a container, None when it is there no more."""
    for group in engine.snapshot.image_groups().values():
        if container.image in group.names:
            return group
    return None


@route("GET", "/containers/{id}/json")
def container_inspect(engine: Engine, request: Request, name: str) -> Response:
    """One container in full; with `size` also the bytes it takes. 404 when there is none."""
    container = engine.snapshot.container(name)
    detail = engine.snapshot.detail(container)
    told = docker_container(container, detail, engine.snapshot.networks.get(), image_of(engine, container),
                            container_health(engine, container), request.version)
    if request.flag("size"):
        told["SizeRw"], told["SizeRootFs"] = container_sizes(engine, container).get(container.real, (0, 0))
    return Response(200, told)


###############################################################################
# Networks
###############################################################################


NETWORK_FILTERS = ("dangling", "driver", "id", "label", "name", "scope", "type", "partial-match")


def match_network(network: Dict[str, Any], used: set, filters: Dict[str, List[str]]) -> bool:
    """Whether a network passes the filters of the list."""
    predefined = network["Name"] in ("bridge", "host", "none")
    dangling = flag_filter(filters, "dangling")
    if dangling is not None and dangling != (not predefined and network["Name"] not in used):
        return False
    kinds = filters.get("type") or []
    if kinds and not set(kinds) <= {"custom", "builtin"}:
        raise BadParameter(f"invalid filter: 'type'='{kinds[0]}'")
    return ((not filters.get("driver") or network["Driver"] in filters["driver"])
            and (not filters.get("id") or any(network["Id"].startswith(each) for each in filters["id"]))
            and (not filters.get("name") or any(each in network["Name"] for each in filters["name"]))
            and (not filters.get("scope") or network["Scope"] in filters["scope"])
            and (not kinds or ("builtin" if predefined else "custom") in kinds)
            and match_labels(network["Labels"], filters.get("label") or []))


@route("GET", "/networks")
def network_list(engine: Engine, request: Request) -> Response:
    """Networks; bridge, host and none are always there."""
    filters = request.filters(*NETWORK_FILTERS)
    used = {name for each in engine.snapshot.containers.get().values() for name in network_names(each)} if "dangling" in filters else set()
    return Response(200, [each for each in engine.snapshot.networks.get().values() if match_network(each, used, filters)])


def find_network(engine: Engine, name: str) -> Dict[str, Any]:
    """The network of a name, an id or the beginning of one; 404 and 400 with dockerd's words."""
    networks = list(engine.snapshot.networks.get().values())
    for key in ("Name", "Id"):
        for each in networks:
            if each[key] == name:
                return each
    found = [each for each in networks if each["Id"].startswith(name)]
    if len(found) > 1:
        raise BadParameter(f"network {name} is ambiguous ({len(found)} matches found based on ID prefix)")
    if not found:
        raise NotFound(f"network {name} not found")
    return found[0]


@route("GET", "/networks/{id}")
def network_inspect(engine: Engine, request: Request, name: str) -> Response:
    """One network with the running containers in it."""
    network = dict(find_network(engine, name))
    if request.value("scope") not in ("", "local"):
        raise NotFound(f"network {name} not found")
    members = {}
    for container in engine.snapshot.containers.get().values():
        if container.running and network["Name"] in network_names(container):
            detail = engine.snapshot.detail(container)
            told = docker_networks(container, engine.snapshot.networks.get(), parse_addresses(detail.get("Task"))).get(network["Name"]) or {}
            members[container.id] = {
                "Name": container.name, "EndpointID": told.get("EndpointID") or "", "MacAddress": told.get("MacAddress") or "",
                "IPv4Address": f"{told['IPAddress']}/{told['IPPrefixLen']}" if told.get("IPAddress") else "",
                "IPv6Address": f"{told['GlobalIPv6Address']}/{told['GlobalIPv6PrefixLen']}" if told.get("GlobalIPv6Address") else "",
            }
    return Response(200, {**network, "Containers": members})


###############################################################################
# Volumes
###############################################################################


def volume_users(engine: Engine) -> collections.Counter:
    """Volume name -> number of containers that mount it."""
    return collections.Counter(mount["Name"] for container in engine.snapshot.containers.get().values()
                               for mount in parse_mounts(container.labels) if mount.get("Name"))


VOLUME_FILTERS = ("dangling", "driver", "label", "name")


@route("GET", "/volumes")
def volume_list(engine: Engine, request: Request) -> Response:
    """Volumes, by the filters dangling, driver, label and name."""
    filters = request.filters(*VOLUME_FILTERS)
    dangling = flag_filter(filters, "dangling")
    users = volume_users(engine) if dangling is not None else {}
    found = [
        volume for volume in engine.snapshot.volumes.get().values()
        if (dangling is None or dangling == (volume["Name"] not in users))
        and (not filters.get("driver") or volume["Driver"] in filters["driver"])
        and (not filters.get("name") or any(each in volume["Name"] for each in filters["name"]))
        and match_labels(volume["Labels"] or {}, filters.get("label") or [])
    ]
    return Response(200, {"Volumes": found, "Warnings": None})


def find_volume(engine: Engine, name: str) -> Dict[str, Any]:
    """The volume of a name; 404 with dockerd's words."""
    volume = engine.snapshot.volumes.get().get(name)
    if volume is None:
        raise NotFound(f"get {name}: no such volume")
    return volume


@route("GET", "/volumes/{name}")
def volume_inspect(engine: Engine, request: Request, name: str) -> Response:
    """One volume."""
    return Response(200, find_volume(engine, name))


def volume_sizes(engine: Engine) -> Dict[str, int]:
    """Volume name -> bytes in it."""
    rows = engine.nerdctl.rows("volume", "ls", "--size", "--format", "{{json .}}")
    return {row["Name"]: size_bytes(row.get("Size") or "") for row in rows}


def docker_usage(items: List[Dict[str, Any]], active: int, total: int, reclaimable: int) -> Dict[str, Any]:
    """One of the summaries that API 1.52 added to `/system/df`."""
    return {"ActiveCount": active, "TotalCount": len(items), "TotalSize": total, "Reclaimable": reclaimable, "Items": items}


@route("GET", "/system/df")
def system_df(engine: Engine, request: Request) -> Response:
    """What images, containers, volumes and build cache take; `type` restricts it. Sizes are read anew, no event tells of
    them."""
    kinds = [each for each in request.values("type") if each]
    for each in kinds:
        if each not in ("container", "image", "volume", "build-cache"):
            raise BadParameter(f"unknown object type: {each}")
    everything, answer = not kinds, {}
    groups = list(engine.snapshot.image_groups().values())
    if everything or "image" in kinds:
        users, shared = image_users(engine), shared_sizes(groups)
        answer["LayersSize"] = sum({each["digest"]: each.get("size") or 0 for group in groups
                                    for each in (group.detail.get("Manifest") or {}).get("layers") or []}.values()) + sum(
            group.detail.get("size") or 0 for group in groups)
        answer["Images"] = [docker_image_row(group, request.version, len(users.get(group.id, [])), shared.get(group.id, 0)) for group in groups]
    if everything or "container" in kinds:
        answer["Containers"] = disk_usage_containers(engine, request)
    if everything or "volume" in kinds:
        users, sizes = volume_users(engine), volume_sizes(engine)
        answer["Volumes"] = [{**volume, "UsageData": {"Size": sizes.get(name, 0), "RefCount": users.get(name, 0)}}
                             for name, volume in engine.snapshot.volumes.get().items()]
    if everything or "build-cache" in kinds:
        answer["BuildCache"] = build_cache(engine)
    if request.version >= (1, 52):
        answer.update(usage_summaries(answer))
    return Response(200, answer)


def disk_usage_containers(engine: Engine, request: Request) -> List[Dict[str, Any]]:
    """Every container as the list shows it, with its sizes."""
    sizes, rows = container_sizes(engine), []
    images = {image.name: image.id for image in engine.snapshot.names.get()}
    for container in engine.snapshot.containers.get().values():
        row = docker_container_row(container, images.get(container.image, ""), docker_networks(container, engine.snapshot.networks.get(), []),
                                   time.time(), request.version)
        row["SizeRw"], row["SizeRootFs"] = sizes.get(container.real, (0, 0))
        rows.append(row)
    return rows


def usage_summaries(answer: Dict[str, Any]) -> Dict[str, Any]:
    """The summaries of an answer's lists, as API 1.52 has them."""
    found = {}
    if "Images" in answer:
        rows = answer["Images"]
        found["ImageUsage"] = docker_usage(rows, sum(row["Containers"] > 0 for row in rows), answer["LayersSize"],
                                           sum(row["Size"] for row in rows if not row["Containers"]))
    if "Containers" in answer:
        rows = answer["Containers"]
        found["ContainerUsage"] = docker_usage(rows, sum(row["State"] in ("running", "paused") for row in rows), sum(row["SizeRw"] for row in rows),
                                               sum(row["SizeRw"] for row in rows if row["State"] not in ("running", "paused")))
    if "Volumes" in answer:
        rows = answer["Volumes"]
        found["VolumeUsage"] = docker_usage(rows, sum(row["UsageData"]["RefCount"] > 0 for row in rows),
                                            sum(row["UsageData"]["Size"] for row in rows),
                                            sum(row["UsageData"]["Size"] for row in rows if not row["UsageData"]["RefCount"]))
    if "BuildCache" in answer:
        rows = answer["BuildCache"]
        found["BuildCacheUsage"] = docker_usage(rows, sum(row["InUse"] for row in rows), sum(row["Size"] for row in rows),
                                                sum(row["Size"] for row in rows if not row["InUse"]))
    return found


###############################################################################
# Swarm and plugins
###############################################################################

NO_SWARM = ('This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.')


def swarm_refused(engine: Engine, request: Request, name: str = "") -> Response:
    """503 with the words of a dockerd that is in no swarm."""
    raise Unavailable(NO_SWARM)


for _method, _path in (
    ("GET", "/swarm"), ("POST", "/swarm/update"), ("GET", "/swarm/unlockkey"), ("POST", "/swarm/unlock"),
    ("GET", "/nodes"), ("GET", "/nodes/{id}"), ("DELETE", "/nodes/{id}"), ("POST", "/nodes/{id}/update"),
    ("GET", "/services"), ("POST", "/services/create"), ("GET", "/services/{id}"), ("DELETE", "/services/{id}"),
    ("POST", "/services/{id}/update"), ("GET", "/services/{id}/logs"), ("GET", "/tasks"), ("GET", "/tasks/{id}"), ("GET", "/tasks/{id}/logs"),
    ("GET", "/secrets"), ("POST", "/secrets/create"), ("GET", "/secrets/{id}"), ("DELETE", "/secrets/{id}"), ("POST", "/secrets/{id}/update"),
    ("GET", "/configs"), ("POST", "/configs/create"), ("GET", "/configs/{id}"), ("DELETE", "/configs/{id}"), ("POST", "/configs/{id}/update"),
):
    route(_method, _path)(swarm_refused)


@route("POST", "/swarm/leave")
def swarm_leave(engine: Engine, request: Request) -> Response:
    """503: there is none to leave."""
    raise Unavailable("This node is not part of a swarm")


@route("POST", "/swarm/init")
def swarm_init(engine: Engine, request: Request) -> Response:
    """501: containerd has no swarm."""
    raise NotImplementedHere("swarm mode is not available: nerdctl has none")


@route("POST", "/swarm/join")
def swarm_join(engine: Engine, request: Request) -> Response:
    """501: containerd has no swarm."""
    raise NotImplementedHere("swarm mode is not available: nerdctl has none")


@route("GET", "/plugins")
def plugin_list(engine: Engine, request: Request) -> Response:
    """No plugins."""
    request.filters("capability", "enabled")
    return Response(200, [])


@route("GET", "/plugins/{image}/json")
def plugin_inspect(engine: Engine, request: Request, name: str) -> Response:
    """404 as for any plugin that is not installed."""
    raise NotFound(f'plugin "{name}" not found')


@route("DELETE", "/plugins/{image}")
def plugin_delete(engine: Engine, request: Request, name: str) -> Response:
    """404 as for any plugin that is not installed."""
    raise NotFound(f'plugin "{name}" not found')


def plugin_refused(engine: Engine, request: Request, name: str = "") -> Response:
    """501: nerdctl has no Docker plugins."""
    raise NotImplementedHere("Docker plugins are not available: nerdctl has none")


for _method, _path in (("GET", "/plugins/privileges"), ("POST", "/plugins/pull"), ("POST", "/plugins/create"), ("POST", "/plugins/{image}/enable"),
                       ("POST", "/plugins/{image}/disable"), ("POST", "/plugins/{image}/upgrade"), ("POST", "/plugins/{image}/push"),
                       ("POST", "/plugins/{image}/set")):
    route(_method, _path)(plugin_refused)


###############################################################################
# HTTP server
###############################################################################


class Body:
    """The body of a request, read as it comes: Content-Length or chunked. Nothing is held beyond the caller's buffer.
    The 100 that a client waits for is sent with the first read. ClientGone when it breaks off."""

    def __init__(self, handler: "RequestHandler", length: Optional[int], chunked: bool, expects: bool):
        self.handler = handler
        self.left = length or 0
        self.chunked = chunked
        self.expects = expects
        self.ended = not chunked and not length

    def readinto(self, view: memoryview) -> int:
        """Fill a part of `view`; 0 at the end of the body."""
        if self.ended or not len(view):
            return 0
        if self.expects:
            self.expects = False
            self.handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            if self.chunked and not self.left:
                self.left = self._chunk_size()
                if not self.left:
                    self._trailers()
                    return 0
            got = self.handler.rfile.readinto1(view[: self.left])
            if not got:
                raise ClientGone()
            self.left -= got
            if not self.left:
                if not self.chunked:
                    self.ended = True
                elif self._line() != b"":
                    raise BadParameter("malformed chunked encoding")
        except OSError:
            self._broken()
            raise ClientGone() from None
        except (BadParameter, ClientGone):
            self._broken()
            raise
        return got

    def read(self, size: int = BLOCK) -> bytes:
        """Up to `size` bytes, b"" at the end."""
        buffer = bytearray(max(0, min(size, BLOCK)))
        return bytes(memoryview(buffer)[: self.readinto(memoryview(buffer))])

    def blocks(self, size: int = BLOCK) -> Iterator[memoryview]:
        """The body in views of one buffer, each to be used up before the next."""
        buffer = memoryview(bytearray(size))
        while True:
            got = self.readinto(buffer)
            if not got:
                return
            yield buffer[:got]

    def drain(self, limit: int, seconds: float) -> bool:
        """Read and drop what is left, within bounds; whether the end was reached."""
        if self.expects and not self.ended:
            return False
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ClientGone, ApiError, OSError):
            self.handler.connection.settimeout(seconds)
            for block in self.blocks() if not self.ended else ():
                limit -= len(block)
                if limit < 0 or time.monotonic() > deadline:
                    break
        with contextlib.suppress(OSError):
            self.handler.connection.settimeout(None)
        return self.ended

    def _broken(self) -> None:
        self.ended = True
        self.handler.close_connection = True

    def _line(self) -> bytes:
        line = self.handler.rfile.readline(4097)
        if not line.endswith(b"\n"):
            if len(line) > 4096:
                raise BadParameter("malformed chunked encoding")
            raise ClientGone()
        return line.rstrip(b"\r\n")

    def _chunk_size(self) -> int:
        text = self._line().partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", text):
            raise BadParameter("malformed chunked encoding")
        return int(text, 16)

    def _trailers(self) -> None:
        for _ in range(100):
            if not self._line():
                self.ended = True
                return
        raise BadParameter("malformed chunked encoding")


class Hangups:
    """One thread that waits for clients to leave, for the streams that are busy waiting for something else."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.watched: Dict[int, List[Callable[[], None]]] = {}
        self.poller: Any = None

    @contextlib.contextmanager
    def watch(self, sock: socket.socket, callback: Callable[[], None], half: bool = True) -> Iterator[None]:
        """Context in which `callback` is called once when the client closes (with `half`, also when it only stops
        sending, which for anything but a hijacked connection means that it has left)."""
        descriptor = sock.fileno()
        with self.lock:
            if self.poller is None:
                self.poller = select.epoll()
                threading.Thread(target=self._run, name="hangups", daemon=True).start()
            callbacks = self.watched.setdefault(descriptor, [])
            callbacks.append(callback)
            if len(callbacks) == 1:
                self.poller.register(descriptor, select.EPOLLONESHOT | (select.EPOLLRDHUP if half else 0))
        try:
            yield
        finally:
            with self.lock:
                with contextlib.suppress(ValueError):
                    callbacks.remove(callback)
                if not callbacks and self.watched.pop(descriptor, None) is not None:
                    with contextlib.suppress(OSError, ValueError):
                        self.poller.unregister(descriptor)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self.poller.poll():
                # Called under the lock: after watch() has ended no callback runs.
                with self.lock:
                    for callback in list(self.watched.get(descriptor, ())):
                        with contextlib.suppress(Exception):
                            callback()


class SocketClient(Client):
    """The client at the other end of a connection."""

    def __init__(self, handler: "RequestHandler"):
        self.handler = handler

    def when_gone(self, callback: Callable[[], None]):
        return self.handler.server.hangups.watch(self.handler.connection, callback)


class RequestHandler(http.server.BaseHTTPRequestHandler):
    """One connection. Every method of every request goes through serve()."""

    protocol_version = "HTTP/1.1"
    rbufsize = 65536
    # dockerd gives a client five minutes for the head of a request.
    timeout = 300

    def address_string(self) -> str:
        return "unix"

    def version_string(self) -> str:
        return f"nerdctld/{VERSION} (linux)"

    def log_message(self, *_) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        # http.server looks for do_<METHOD>: all of them are one.
        if name.startswith("do_"):
            return self.serve
        raise AttributeError(name)

    def handle_expect_100(self) -> bool:
        self.expects = True
        return True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ClientGone, socket.timeout):
            self.close_connection = True

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """An error that http.server found in the head of a request."""
        self.close_connection = True
        self.requestline = getattr(self, "requestline", "")
        self.request_version = "HTTP/1.1"
        status = 400 if code in (501, 505) else code
        self.send_whole(error_response(type("HeadError", (ApiError,), {"status": status})(message or "malformed request")))

    def serve(self) -> None:
        """Read one request, dispatch it, send the response."""
        began = time.monotonic()
        self.connection.settimeout(None)
        server = self.server
        body = None
        with server.working():
            try:
                body = self.make_body()
                response = dispatch(server.engine, self.make_request(body))
            except ApiError as error:
                response = error_response(error)
            except ClientGone:
                self.close_connection = True
                return
            except Exception:
                # Whatever it was, the daemon lives on; the trace goes to the log and not to the client.
                log(traceback.format_exc())
                response = error_response(ApiError("internal error: see the log of nerdctld"))
            status = self.respond(response, body)
        if server.engine.nerdctl.debug:
            log(f"{self.command} {self.path.partition('?')[0]} -> {status} in {(time.monotonic() - began) * 1000:.1f} ms")
        if not self.close_connection:
            self.connection.settimeout(self.timeout)

    def make_body(self) -> Body:
        """The body as the headers announce it; 400 for framing that could be read in two ways."""
        lengths = self.headers.get_all("Content-Length") or []
        codings = [each.strip().lower() for each in self.headers.get_all("Transfer-Encoding") or []]
        expects, self.expects = getattr(self, "expects", False), False
        if codings:
            if codings != ["chunked"] or lengths:
                self.close_connection = True
                raise BadParameter("unsupported transfer encoding")
            return Body(self, None, True, expects)
        if len(set(lengths)) > 1 or (lengths and not re.fullmatch(r"\d{1,18}", lengths[0].strip())):
            self.close_connection = True
            raise BadParameter("bad Content-Length")
        return Body(self, int(lengths[0]) if lengths else None, False, expects)

    def make_request(self, body: Body) -> Request:
        """The request as handlers see it; 400 for a path or query that is not text."""
        if self.request_version == "HTTP/0.9":
            self.close_connection = True
            raise BadParameter("malformed HTTP request")
        target = self.path
        if not target.startswith("/"):
            # Absolute form, as proxies send it.
            target = re.sub(r"^[a-z]+://[^/]*", "", target, flags=re.I) or "/"
        raw_path, _, raw_query = target.partition("?")
        try:
            path = urllib.parse.unquote(raw_path, errors="strict")
            query = urllib.parse.parse_qs(raw_query, keep_blank_values=True, errors="strict", max_num_fields=1000)
        except (UnicodeDecodeError, ValueError):
            raise BadParameter("malformed URL") from None
        if re.search(r"[\x00-\x1f\x7f]", path):
            raise BadParameter("malformed URL: it has control characters")
        version, path = split_version(path)
        return Request(self.command, re.sub("//+", "/", path), version, query, self.headers, body, SocketClient(self))

    def respond(self, response: Response, body: Optional[Body]) -> int:
        """Send a response of any kind; returns its status, which for a primed stream is known only here."""
        self.leave(body, response)
        if isinstance(response.body, Stream):
            return self.send_stream(response, body)
        if isinstance(response.body, Hijack):
            return self.send_hijack(response)
        self.send_whole(response)
        self.linger(body)
        return response.status

    def leave(self, body: Optional[Body], response: Response) -> None:
        """Take what the handler left unread off the connection, so that it is not taken for the next request."""
        if body is not None and not body.ended and not isinstance(response.body, (Stream, Hijack)):
            if not body.drain(1 << 18, 0.2):
                self.close_connection = True

    def linger(self, body: Optional[Body]) -> None:
        """After an answer that came before the end of a body, let the client read it: a close now would reset it."""
        if body is not None and not body.ended:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
            body.expects = False
            body.drain(1 << 26, 2.0)

    def head(self, response: Response, *extra: Tuple[str, str]) -> bytes:
        """Status line and headers."""
        lines = [f"HTTP/1.1 {response.status} {http.client.responses.get(response.status, 'Unknown')}"]
        headers = {
            "Api-Version": "%d.%d" % API_NEWEST,
            "Docker-Experimental": "false",
            "Ostype": "linux",
            "Server": self.version_string(),
            "Date": self.date_time_string(),
        }
        if response.media_type:
            headers["Content-Type"] = response.media_type
        headers.update(response.headers)
        if self.close_connection:
            headers["Connection"] = "close"
        lines += [f"{name}: {value}" for name, value in [*headers.items(), *extra]]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def send_whole(self, response: Response) -> None:
        """A response whose body is at hand."""
        body = response.body or b""
        if response.status in (204, 304):
            head, body = self.head(response), b""
        else:
            head = self.head(response, *([] if "Content-Length" in response.headers else [("Content-Length", str(len(body)))]))
        with contextlib.suppress(OSError):
            if self.command == "HEAD" or not body:
                self.wfile.write(head)
            elif len(body) < 65536:
                self.wfile.write(head + body)
            else:
                self.wfile.write(head)
                self.wfile.write(body)
            return
        self.close_connection = True

    def send_stream(self, response: Response, body: Optional[Body]) -> int:
        """A body made while it is sent, chunked (HTTP/1.0: until the end of the connection)."""
        stream = response.body
        first = []
        try:
            if stream.primed:
                first = [next(stream.chunks, b"")]
            chunked = self.request_version != "HTTP/1.0"
            self.close_connection |= not chunked
            self.wfile.write(self.head(response, *([("Transfer-Encoding", "chunked")] if chunked else [])))
            for chunk in itertools.chain(first, stream.chunks):
                if chunk:
                    self.send_chunk(chunk, chunked)
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
        except ApiError as error:
            if stream.primed and not first:
                stream.close()
                return self.respond(error_response(error), body)
            # Too late for a status: the missing end of the chunks tells the client.
            self.close_connection = True
        except (ClientGone, OSError):
            self.close_connection = True
        except Exception:
            log(traceback.format_exc())
            self.close_connection = True
        finally:
            stream.close()
        if body is not None and not body.ended and not body.drain(1 << 18, 0.2):
            self.close_connection = True
        return response.status

    def send_chunk(self, chunk: bytes, chunked: bool) -> None:
        """One chunk in as few system calls as its size allows."""
        if not chunked:
            self.wfile.write(chunk)
        elif len(chunk) < 65536:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        else:
            Connection(self.connection).send(b"%x\r\n" % len(chunk), chunk, b"\r\n")

    def send_hijack(self, response: Response) -> int:
        """Hand the connection over, as dockerd does it: 101 where an upgrade was asked for, else 200 until the end."""
        self.close_connection = True
        self.connection.setblocking(False)
        early = self.rfile.peek()
        self.connection.setblocking(True)
        upgraded = "upgrade" in (self.headers.get("Connection") or "").lower() and self.headers.get("Upgrade")
        lines = ["HTTP/1.1 101 UPGRADED" if upgraded else "HTTP/1.1 200 OK"]
        if response.media_type:
            lines.append(f"Content-Type: {response.media_type if upgraded else 'application/vnd.docker.raw-stream'}")
        if upgraded:
            lines += ["Connection: Upgrade", f"Upgrade: {response.body.protocol}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        try:
            self.wfile.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
            response.body.serve(Connection(self.connection, early[: len(early)]))
        except (ClientGone, OSError):
            pass
        except Exception:
            log(traceback.format_exc())
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        return 101 if upgraded else 200


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A thread a connection, on a socket that is already listening."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, engine: "Engine", listener: socket.socket):
        super().__init__("", RequestHandler, bind_and_activate=False)
        # The constructor makes a socket even so.
        self.socket.close()
        self.socket = listener
        self.server_address = listener.getsockname()
        self.engine = engine
        self.hangups = Hangups()
        self.lock = threading.Lock()
        self.active = 0
        self.last_used = time.monotonic()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Counts a request while it runs, for the end and for --idle-timeout."""
        with self.lock:
            self.active += 1
            self.last_used = time.monotonic()
        try:
            yield
        finally:
            with self.lock:
                self.active -= 1
                self.last_used = time.monotonic()

    def idle_seconds(self) -> float:
        """How long nothing has been asked of the daemon and nothing depends on it."""
        with self.lock:
            if self.active or self.engine.busy():
                self.last_used = time.monotonic()
            return time.monotonic() - self.last_used

    def get_request(self):
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                # Without a pause the loop would spin until a descriptor becomes free.
                log(f"cannot accept a connection: {error.strerror}")
                time.sleep(0.1)
            raise

    def process_request(self, request, client_address) -> None:
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:
            log(f"cannot serve a connection: {error}")
            self.shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, ClientGone, socket.timeout)):
            log(traceback.format_exc())


###############################################################################
# Sockets
###############################################################################


class StartError(Exception):
    """The daemon cannot start; the message says why."""


def inherited_socket() -> Optional[socket.socket]:
    """The listening socket that systemd handed over, None when it did not. StartError for anything but exactly one
    unix stream socket. The variables are taken out of the environment, so that no child believes them."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count or pid != str(os.getpid()):
        return None
    if count != "1":
        raise StartError(f"LISTEN_FDS is {count}: exactly one socket is expected (nerdctl.socket has one ListenStream)")
    os.set_inheritable(3, False)
    try:
        listener = socket.socket(fileno=3)
    except OSError as error:
        raise StartError(f"file descriptor 3 is not a socket: {error.strerror}") from None
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM:
        raise StartError("file descriptor 3 is not a unix stream socket")
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise StartError("file descriptor 3 is not listening")
    listener.setblocking(True)
    return listener


def own_socket(path: str) -> socket.socket:
    """A listening socket at `path`, 0660 from its first moment. StartError when somebody answers there already or the
    place cannot be used; a stale socket is replaced."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise StartError(f"cannot listen on {path}: {folder} is not a folder")
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise StartError(f"cannot listen on {path}: it is in the way and not a socket")
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with probe:
            probe.settimeout(5)
            try:
                probe.connect(path)
                raise StartError(f"cannot listen on {path}: another daemon is listening there")
            except (ConnectionRefusedError, FileNotFoundError):
                pass
            except OSError as error:
                raise StartError(f"cannot listen on {path}: {error.strerror or 'another daemon is listening there'}") from None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Made under another name and moved into place: nobody can connect before the mode is right, and of two daemons that
    # start at once one is left.
    temporary = f"{path}.{os.getpid()}"
    before = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        listener.bind(temporary)
        os.chmod(temporary, 0o660)
        listener.listen(1024)
        os.rename(temporary, path)
    except OSError as error:
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise StartError(f"cannot listen on {path}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    return listener


def default_socket_path() -> str:
    """/var/run/nerdctl.sock for root, $XDG_RUNTIME_DIR/nerdctl.sock for anybody else."""
    if os.geteuid() == 0:
        return "/var/run/nerdctl.sock"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}", "nerdctl.sock")


def socket_path(address: str) -> str:
    """The path in `unix:///run/x.sock` (or a bare path); StartError for another kind of address."""
    if address.startswith("unix://"):
        address = address[len("unix://"):]
    if not address.startswith("/"):
        raise StartError(f"cannot listen on {address!r}: only unix:///PATH is served (use ssh for another host)")
    return address


def notify_systemd(message: str, address: str) -> None:
    """Tell systemd, where it asked for it, that the daemon is READY or STOPPING."""
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(message.encode())


def dial_stdio(path: str) -> int:
    """Join standard input and output to the socket, with half-closes passed on: the far end of `docker -H ssh://`.
    Returns the exit status."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        log(f"cannot connect to {path}: {error.strerror}")
        return 1

    def inwards() -> None:
        with contextlib.suppress(OSError):
            while True:
                data = os.read(0, 65536)
                if not data:
                    break
                sock.sendall(data)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    threading.Thread(target=inwards, daemon=True).start()
    with contextlib.suppress(OSError):
        while True:
            data = sock.recv(65536)
            if not data:
                break
            view = memoryview(data)
            while view:
                view = view[os.write(1, view):]
    return 0


###############################################################################
# ctr
###############################################################################

# Where nerdctl is not installed, this file stands in for it: `nerdctld.py nerdctl COMMAND …` takes the commands, flags and
# formats that the sections above use, has containerd's own ctr do the work, and prints what nerdctl would print. ctr promises
# no stable output: names, digests, JSON and the few columns below are all that is read of it, alike from 1.6 to 2.3.
NO_NERDCTL = "nerdctl is not installed"
UNKNOWN_CTR = "this ctr is not known: "
CTR_WORDS = [(re.compile(pattern), words) for pattern, words in (
    (r"^failed to resolve reference \"[^\"]*\": ", "failed to resolve image: "),
    (r"^container \"([^\"]+)\" in namespace \S+: not found$", r"no such container: \1"),
    (r"^(?:cannot access socket|failed to dial) \"?([^\s\":]+)\"?: ", r'cannot access containerd socket "\1": '),
)]
Flags = Dict[str, List[str]]


def parse_ctr_error(stderr: str) -> str:
    """What ctr says went wrong, in nerdctl's words."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["ctr failed without a word"]
    message = re.sub(r"^ctr: ", "", next((line for line in lines if line.startswith("ctr: ")), lines[-1]))
    for pattern, words in CTR_WORDS:
        message = pattern.sub(words, message)
    return message


def parse_ctr_table(text: str, head: str, row: str) -> List[Tuple[str, ...]]:
    """The groups of `row` in each line of a table whose first columns are `head`; 500 for anything else."""
    first, *lines = [line for line in text.splitlines() if line.strip()] or [""]
    for line in lines if first.split()[:3] == head.split() else [first]:
        if first.split()[:3] != head.split() or not re.match(row, line):
            raise ApiError(f"{UNKNOWN_CTR}it prints {line[:80]!r} for {head!r}")
    return [re.match(row, line).groups() for line in lines]


class Ctr:
    """Runs ctr. `command` is the argv in front ("ctr", or "k3s ctr" as two words). What it starts stays in this process's
    group, so that who ends the one ends the other. What goes wrong is an ApiError in nerdctl's words."""

    def __init__(self, command: List[str], namespace: str, address: str, snapshotter: str):
        self.namespace, self.snapshotter = namespace, [f"--snapshotter={snapshotter}"] if snapshotter else []
        self.path = address.replace("unix://", "", 1) or ("" if "k3s" in command[0] else "/run/containerd/containerd.sock")
        self.command = [*command, *([f"--address={self.path}"] if self.path else []), f"--namespace={namespace}"]

    def start(self, *words: str, stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.PIPE) -> subprocess.Popen:
        """A running ctr, its stderr piped."""
        if self.path and not os.path.exists(self.path):
            # ctr 1.6 would look for it for ten seconds.
            raise ApiError(f'cannot access containerd socket "{self.path}": no such file or directory')
        return subprocess.Popen([*self.command, *words], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)

    def finish(self, process: subprocess.Popen) -> str:
        """What is left of a ctr's stdout, at its end."""
        output, errors = process.communicate()
        if process.returncode:
            raise ApiError(parse_ctr_error(errors.decode(errors="replace")))
        return (output or b"").decode()

    def run(self, *words: str, **pipes: Any) -> str:
        """The stdout of a ctr that succeeded."""
        return self.finish(self.start(*words, **pipes))

    def local(self, *words: str) -> List[str]:
        """A command with --local where this ctr has that: the transfer service, which it uses otherwise, does not say what
        it loads, and its progress is mixed into what is saved."""
        return [*words, "--local"] if "--local" in self.run(*words, "--help") else list(words)

    def each(self, commands: Iterable[List[str]]) -> Iterator[str]:
        """The stdout of each command, a few of which run at a time; "" where its object is not there."""
        waiting = list(commands)
        for start in range(0, len(waiting), 4):
            for process in [self.start(*words) for words in waiting[start:start + 4]]:
                try:
                    yield self.finish(process)
                except ApiError as error:
                    if not re.search(r"not found$|^no such container", str(error)):
                        raise
                    yield ""

    def targets(self) -> Dict[str, Tuple[str, str]]:
        """All images: name -> digest and media type."""
        rows = parse_ctr_table(self.run("images", "ls"), "REF TYPE DIGEST", r"(\S+)\s+(\S+)\s+(\w+:[0-9a-f]{32,})\s")
        return {name: (digest, kind) for name, kind, digest in rows}

    def tasks(self) -> Dict[str, Tuple[int, str]]:
        """Container id -> process id and status (RUNNING, PAUSED, STOPPED …) of those that have a task."""
        rows = parse_ctr_table(self.run("tasks", "ls"), "TASK PID STATUS", r"(\S+)\s+(\d+)\s+([A-Z]+)\s*$")
        return {identity: (int(pid), status) for identity, pid, status in rows}

    def blobs(self, digests: Iterable[str]) -> Dict[str, Tuple[int, Any]]:
        """Digest -> size and value of JSON in the content store; those that are not there are left out."""
        wanted = list(dict.fromkeys(digests))
        found = {digest: text.encode() for digest, text in zip(wanted, self.each(["content", "get", each] for each in wanted)) if text}
        if any(digest != "sha256:" + hashlib.sha256(data).hexdigest() for digest, data in found.items()):
            raise ApiError(UNKNOWN_CTR + "the content it prints is not what its digest says")
        return {digest: (len(data), json.loads(data)) for digest, data in found.items()}

    def usage(self, tips: Iterable[str]) -> Dict[str, Tuple[int, int]]:
        """Snapshot key -> its own bytes and all with those below it, for the keys in `tips` that there are and what is below."""
        words, row = ["snapshots", *self.snapshotter], r"(\S+)\s+(?:(\S+)\s+)?(?:Active|Committed|View)\s*$"
        parents, wanted = dict(parse_ctr_table(self.run(*words, "ls"), "KEY PARENT KIND", row)), {}
        for key in tips:
            while key in parents and key not in wanted:
                wanted[key], key = parents[key], parents[key]
        told = self.run(*words, "usage", "-b", "--", *wanted) if wanted else "KEY SIZE INODES"
        own = {key: int(size) for key, size in parse_ctr_table(told, "KEY SIZE INODES", r"(\S+)\s+(\d+)\s+\d+\s*$")}
        total = lambda key: own.get(key, 0) + total(parents[key]) if key in parents else 0
        return {key: (size, total(key)) for key, size in own.items()}

    def transfer(self, verb: str, reference: str, *words: str) -> None:
        """Pull or push, the progress going to our stdout, with the credentials of $DOCKER_CONFIG. The password goes in by a
        pseudo-terminal, since everybody could read it on a command line."""
        flags = ["--hosts-dir=/etc/containerd/certs.d"] if os.path.isdir("/etc/containerd/certs.d") else []
        (user, password), ours, theirs = docker_login(reference.partition("/")[0]), -1, subprocess.DEVNULL
        if user:
            ours, theirs = pty.openpty()
            mode = termios.tcgetattr(theirs)
            mode[0] = mode[3] = 0
            termios.tcsetattr(theirs, termios.TCSANOW, mode)
            os.write(ours, password.encode() + b"\n")
            flags.append(f"--user={user}")
        self.run(*self.local("images", verb), *flags, *words, stdin=theirs, stdout=None)


def docker_login(host: str) -> Tuple[str, str]:
    """User and password for a registry in Docker's config.json, ("", "") without; 501 for a token."""
    path = os.path.join(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"), "config.json")
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        for key, entry in (json.load(file).get("auths") or {}).items():
            if re.sub(r"^https?://(index\.(?=docker\.io))?", "", key).partition("/")[0] == host:
                if entry.get("identitytoken"):
                    raise NotImplementedHere(f"{NO_NERDCTL}, and ctr cannot be given the identity token for {host}")
                user, _, password = base64.b64decode(entry.get("auth") or "").decode().partition(":")
                return user, password
    return "", ""


# Command -> the flags it takes (with a value: `name=`) and the formats it knows; the method of CtrCommands is called like it.
# Networks and volumes are nerdctl's own, so that without it there are none, and no methods for them.
CTR_COMMANDS: Dict[str, Tuple[str, ...]] = {
    "version": ("", "{{json .}}"), "info": ("", "{{json .}}"), "events": ("", "{{json .}}"),
    "network ls": ("", "{{json .}}"), "volume ls": ("size", "{{json .}}"),
    "images": ("no-trunc", "{{json .}}"), "image inspect": ("mode=", "{{json .}}"), "history": ("no-trunc", "{{json .}}"),
    "tag": ("",), "rmi": ("force",), "pull": ("platform= unpack=",), "push": ("platform=",), "save": ("platform=",),
    "load": ("platform= all-platforms",), "login": ("username= password-stdin",),
    "ps": ("no-trunc size filter=", CONTAINER_ROW, '{"ID":{{json .ID}},"Size":{{json .Size}}}'), "container inspect": ("mode=", INSPECT_FORMAT),
    "build": ("progress= build-arg= label= cache-from= add-host= no-cache pull target= platform= network= allow= provenance= file= tag=",),
}


def parse_flags(words: List[str], known: List[str]) -> Tuple[Flags, List[str]]:
    """The flags that stand in front, and the words behind them or behind `--`; 400 for a flag that is not `known`."""
    flags: Flags = {}
    try:
        pairs, rest = getopt.getopt(words, "a", known)
    except getopt.GetoptError as error:
        raise BadParameter(f"unknown flag: --{error.opt}") from None
    for name, value in pairs:
        flags.setdefault(name.lstrip("-"), []).append(value)
    return flags, rest


def ctr_main(argv: List[str]) -> int:
    """`nerdctld.py nerdctl …`: the exit status. A failure is a line on stderr as nerdctl writes it."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        options, words = parse_flags(argv, ["namespace=", "address=", "snapshotter=", "ctr="])
        command, namespace, address, snapshotter = (options.get(key, [""])[-1] for key in ("ctr", "namespace", "address", "snapshotter"))
        name = next((each for each in (" ".join(words[:2]), *words[:1]) if each in CTR_COMMANDS), "")
        if not name:
            raise NotImplementedHere(f"{NO_NERDCTL}, and containerd's ctr cannot do what `nerdctl {' '.join(words[:1])}` does: install nerdctl "
                                     "for running containers, networks and volumes")
        known, *formats = CTR_COMMANDS[name]
        flags, rest = parse_flags(words[len(name.split()):], [*known.split(), *(["format="] if formats else [])])
        if formats and flags.get("format", [""])[-1] not in formats:
            raise NotImplementedHere(f"{NO_NERDCTL}, and what stands in for it does not know this --format of {name}")
        ctr = CtrCommands(shlex.split(command) or find_ctr() or ["ctr"], namespace or "default", address, snapshotter)
        for row in getattr(ctr, name.replace(" ", "_"), lambda *_: ())(flags, rest) or ():
            print(row if isinstance(row, str) else json_bytes(row).decode(), flush=True)
        return 0
    except (ApiError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        message = str(error) if isinstance(error, (ApiError, OSError)) else UNKNOWN_CTR + repr(error)
        if isinstance(error, FileNotFoundError):
            message = f'exec: "{error.filename}": executable file not found in $PATH'
        print(f'time="{rfc3339(time.time_ns())}" level=fatal msg={json.dumps(message, ensure_ascii=False)}', file=sys.stderr)
        return 1


def find_ctr() -> List[str]:
    """argv of the ctr on PATH, or of k3s's; [] where there is none."""
    return next((words for words in (["ctr"], ["k3s", "ctr"]) if shutil.which(words[0])), [])


def nerdctl_command() -> List[str]:
    """argv of nerdctl; where it is not on PATH but ctr is, of what stands in for it, with a warning in the log."""
    if shutil.which("nerdctl") or not find_ctr():
        return ["nerdctl"]
    log(f"warning: {NO_NERDCTL}: images, listings and builds go by {' '.join(find_ctr())}, everything else is answered with 501")
    import importlib.util
    import marshal

    # Each call is a new Python, and compiling this file would be half of its time: it is done once, into memory.
    compiled = os.memfd_create("nerdctld.pyc")
    with open(__file__, "rb") as file:
        os.write(compiled, importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(compile(file.read(), __file__, "exec")))
    return [sys.executable, "-IS", f"/proc/{os.getpid()}/fd/{compiled}", "nerdctl"]


def whole_manifests(ctr: Ctr, index: Dict[str, Any]) -> List[Tuple[str, Dict[str, Any], Dict[str, Any]]]:
    """Platform, descriptor and manifest of those in an index that are all here: this machine's first, attestations last."""
    present, whole = set(ctr.run("content", "ls", "-q").split()), []
    read = ctr.blobs(each["digest"] for each in index["manifests"] if each["digest"] in present)
    for each in index["manifests"]:
        manifest = read.get(each["digest"], (0, {}))[1]
        if manifest and all(part["digest"] in present for part in [manifest["config"], *manifest["layers"]]):
            platform = map((each.get("platform") or {}).get, ("os", "architecture", "variant"))
            whole.append(("/".join(filter(None, platform)), each, manifest))
    return sorted(whole, key=lambda found: (found[0] == "unknown/unknown", not fits_machine(found[0])))


def chain_ids(config: Dict[str, Any]) -> List[str]:
    """The keys of an image's snapshots, from the lowest layer up."""
    link = lambda below, layer: "sha256:" + hashlib.sha256(f"{below} {layer}".encode()).hexdigest()
    return list(itertools.accumulate(config["rootfs"]["diff_ids"], link))


def native_images(ctr: Ctr, names: List[str]) -> Tuple[List[Dict[str, Any]], Dict[str, Tuple[int, int]]]:
    """Images as nerdctl's native inspect has them, but for those not all here (404 when none is), and their snapshots' bytes."""
    images, found = ctr.targets(), []
    read = ctr.blobs(images[name][0] for name in names if name in images)
    for name in names:
        digest, kind = images.get(name, ("", ""))
        size, manifest = read.get(digest, (0, {}))
        described = {"mediaType": kind, "digest": digest, "size": size}
        entry = {"Image": {"Name": name, "Target": described}}
        if "manifests" in manifest:
            described, manifest = next((each[1:] for each in whole_manifests(ctr, manifest)), ({}, {}))
        if manifest:
            found.append({**entry, "ManifestDesc": described, "Manifest": manifest, "ImageConfigDesc": manifest["config"]})
    configs = ctr.blobs(each["ImageConfigDesc"]["digest"] for each in found)
    found = [{**each, "ImageConfig": configs[each["ImageConfigDesc"]["digest"]][1]} for each in found if each["ImageConfigDesc"]["digest"] in configs]
    if not found:
        raise NotFound(f"no such image: {names[0]}")
    sizes = ctr.usage(key for each in found for key in chain_ids(each["ImageConfig"])[-1:])
    return [{**each, "size": sizes.get((chain_ids(each["ImageConfig"]) or [""])[-1], (0, 0))[1]} for each in found], sizes


class CtrCommands(Ctr):
    """nerdctl's commands, a method each, which returns what is printed: JSON values or text, a line each."""

    def version(self, flags: Flags, words: List[str]) -> Any:
        """Versions of ctr and containerd; in the place of nerdctl's that there is none."""
        own, server = (dict(re.findall(r"^ *(\w+): *(\S*)$", part, re.M)) for part in self.run("version").partition("Server:")[::2])
        return [{"Client": {"Version": f"{NO_NERDCTL}: ctr {own['Version']}", "Components": [{"Name": "ctr", "Version": own["Version"]}]},
                 "Server": {"Components": [{"Name": "containerd", "Version": server["Version"], "Details": {
                     "GitCommit": server.get("Revision") or "", "UUID": server.get("UUID") or ""}}]}}]

    def info(self, flags: Flags, words: List[str]) -> Any:
        """What is known of the machine and of containerd, with a warning that nerdctl is not there. Limits are told as there:
        nothing is run, and clients would warn of each."""
        server, unified = self.version({}, [])[0]["Server"]["Components"][0], os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        return [{
            **dict.fromkeys("MemoryLimit SwapLimit CpuCfsPeriod CpuCfsQuota CPUShares CPUSet PidsLimit IPv4Forwarding OomKillDisable".split(), True),
            "ID": server["Details"]["UUID"], "Driver": "".join(self.snapshotter)[14:] or "overlayfs",
            "CgroupDriver": "systemd" if unified and os.path.isdir("/run/systemd/system") else "cgroupfs", "CgroupVersion": "2" if unified else "1",
            "ServerVersion": server["Version"], "MemTotal": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "Warnings": [f"WARNING: {NO_NERDCTL}: over containerd's ctr there are images, listings and builds only"],
        }]

    def events(self, flags: Flags, words: List[str]) -> Any:
        """containerd's events as they come, an empty line after each as nerdctl has it."""
        process = self.start("events")
        for line in process.stdout:
            found = re.match(r"([\d-]+) ([\d:.]+) \+0000 UTC (\S+) (/\S+) ?(.*)", line.decode(errors="replace"))
            if not found:
                process.kill()
                raise ApiError(f"{UNKNOWN_CTR}it tells the event {line[:80]!r}")
            day, hour, namespace, topic, payload = found.groups()
            yield {"Timestamp": f"{day}T{hour}Z", "Namespace": namespace, "Topic": topic, "Event": payload}
            yield ""
        self.finish(process)

    def images(self, flags: Flags, words: List[str]) -> Any:
        """The names of images with their digests; what nerdctl says besides is read by image inspect."""
        return [{"Name": name, "Digest": digest, "ID": digest} for name, (digest, _) in self.targets().items()]

    def image_inspect(self, flags: Flags, words: List[str]) -> Any:
        """Images with manifest, configuration and unpacked size."""
        return native_images(self, words)[0]

    def history(self, flags: Flags, words: List[str]) -> Any:
        """The steps an image was made in, newest first, with their unpacked sizes."""
        (image, *_), sizes = native_images(self, words)
        keys, rows = iter(chain_ids(image["ImageConfig"])), []
        for step in image["ImageConfig"].get("history") or []:
            size, _ = (0, 0) if step.get("empty_layer") else sizes.get(next(keys, ""), (0, 0))
            rows.insert(0, {"CreatedBy": step.get("created_by") or "", "Size": f"{size}B"})
        return rows

    def tag(self, flags: Flags, words: List[str]) -> Any:
        """Give an image another name, which may be another image's until then."""
        if words[0] != words[1]:
            self.run(*self.local("images", "tag"), "--force", "--", *words)

    def rmi(self, flags: Flags, words: List[str]) -> Any:
        """Remove names, and what nothing else needs any more."""
        for name in set(words) - set(self.targets()):
            raise NotFound(f"no such image: {name}")
        self.run("images", "rm", "--sync", "--", *words)

    def pull(self, flags: Flags, words: List[str]) -> Any:
        """Pull one image. ctr unpacks it for any platform, so --unpack makes no difference."""
        self.transfer("pull", words[0], *(f"--platform={each}" for each in flags.get("platform", [])), *self.snapshotter, "--", words[0])

    def push(self, flags: Flags, words: List[str]) -> Any:
        """Push one image; of an index that is only partly here, or with --platform, the manifest that is."""
        digest, options, wanted = self.targets().get(words[0], ("", ""))[0], [], flags.get("platform", [""])[-1]
        if not digest:
            raise NotFound(f'image "{words[0]}": not found')
        index = self.blobs([digest])[digest][1]
        whole = whole_manifests(self, index) if "manifests" in index else []
        if whole and (wanted or len(whole) < len(index["manifests"])):
            chosen = next(each[1] for each in whole if each[0].startswith(wanted))
            options = [f"--manifest={chosen['digest']}", f"--manifest-type={chosen['mediaType']}"]
            print(f"pushing as a reduced-platform image ({chosen['mediaType']}, {chosen['digest']})", file=sys.stderr)
        self.transfer("push", words[0], *options, "--", words[0])

    def load(self, flags: Flags, words: List[str], stdin: Any = None) -> Any:
        """Load an archive from standard input. One without a name becomes import@DIGEST, as with nerdctl."""
        options = [*([f"--platform={each}" for each in flags.get("platform", [])] or ["--all-platforms"]), *self.snapshotter]
        told = self.run(*self.local("images", "import"), "--digests", "--skip-digest-for-named", *options, "--", "-", stdin=stdin)
        loaded, images = re.findall(r"^unpacking (\S+) \((\S+)\)", told, re.M), self.targets()
        if not loaded or any(images.get(name, ("",))[0] != digest for name, digest in loaded):
            raise ApiError(f"{UNKNOWN_CTR}it says of what it loaded {told[:80]!r}")
        for name, digest in loaded:
            if name.endswith("@" + digest):
                self.tag({}, [name, "import@" + digest])
                self.rmi({}, [name])
            yield "Loaded image: " + ("import@" + digest if name.endswith("@" + digest) else name)

    def save(self, flags: Flags, words: List[str]) -> Any:
        """Write the archive of images to standard output."""
        self.run(*self.local("images", "export"), *(f"--platform={each}" for each in flags.get("platform", [])), "--", "-", *words, stdout=None)

    def login(self, flags: Flags, words: List[str]) -> Any:
        """Ask the registry whether it takes the credentials. Nothing is kept: clients send theirs with each request."""
        registry = Registry(Reference(words[0] + "/login", "", ""), {"username": flags["username"][-1], "password": sys.stdin.read()})
        status, headers, _ = registry._send(registry.host, "/v2/", "")
        if status == 401:
            status = registry._send(registry.host, "/v2/", registry._authorize(headers.get("www-authenticate") or ""))[0]
        if status != 200:
            raise ApiError(f"{registry.host} answered {status}" + (" Unauthorized" if status == 401 else ""))

    def container_inspect(self, flags: Flags, words: List[str]) -> Any:
        """One container as INSPECT_FORMAT has it. ctr tells no exit codes: 255 is containerd's own for one that is not known."""
        told, (pid, status) = json.loads(self.run("containers", "info", "--", words[0])), self.tasks().get(words[0], (0, ""))
        spec = told.get("Spec") and {**told["Spec"], **(told["Spec"].get("linux") or {})}
        task = {"Pid": pid, "Status": {"Status": status.lower(), "ExitStatus": 255 if status == "STOPPED" else 0}} if status else None
        return [{**told, "Runtime": told["Runtime"]["Name"], "Task": task, "Spec": spec}]

    def ps(self, flags: Flags, words: List[str]) -> Any:
        """Containers as CONTAINER_ROW has them, or their sizes; all, or that of the filter `id=`."""
        wanted = [each.partition("id=")[2] for each in flags.get("filter", [])] or self.run("containers", "ls", "-q").split()
        found = [json.loads(text) for text in self.each(["containers", "info", "--", each] for each in wanted) if text]
        if "size" in flags:
            sizes = self.usage(each["SnapshotKey"] for each in found)
            return [{"ID": each["ID"], "Size": "%dB (virtual %dB)" % sizes.get(each["SnapshotKey"], (0, 0))} for each in found]
        tasks, rows = self.tasks(), []
        for each in sorted(found, key=lambda each: -(nanoseconds_of(each["CreatedAt"]) or 0)):
            labels, status = each.get("Labels") or {}, tasks.get(each["ID"], (0, "CREATED"))[1]
            pod = [labels.get("io.kubernetes." + key) for key in ("pod.namespace", "pod.name", "container.name")]
            rows.append([{
                "ID": each["ID"], "Image": each["Image"], "CreatedAt": each["CreatedAt"], "Runtime": each["Runtime"]["Name"],
                "Names": labels.get("nerdctl/name") or ("k8s://" + "/".join(filter(None, pod)) if pod[0] else ""),
                "Command": json.dumps(" ".join((each.get("Spec") or {}).get("process", {}).get("args") or [])),
                "Status": {"RUNNING": "Up", "STOPPED": "Exited"}.get(status, status.capitalize()),
            }, labels])
        return rows

    def build(self, flags: Flags, words: List[str]) -> Any:
        """Build by buildctl and load what comes of it: so it does not matter which worker and namespace buildkitd has."""
        addresses, file = Nerdctl(["buildctl"], self.namespace).buildkit_addresses(), flags.get("file", [words[0] + "/Dockerfile"])[-1]
        address = next((each for each in addresses if os.path.exists(each.replace("unix://", "", 1))), addresses[-1])
        options = [f"--local=context={words[0]}", f"--local=dockerfile={os.path.dirname(file)}", f"--opt=filename={os.path.basename(file)}"]
        for key, form in (("build-arg", "--opt=build-arg:"), ("label", "--opt=label:"), ("cache-from", "--import-cache=type=registry,ref="),
                          ("target", "--opt=target="), ("platform", "--opt=platform="), ("network", "--opt=force-network-mode="), ("allow", "--allow="),
                          ("no-cache", "--no-cache"), ("pull", "--opt=image-resolve-mode=pull")):
            options += [form + value for value in flags.get(key, [])]
        if "add-host" in flags:
            options.append("--opt=add-hosts=" + ",".join(each.replace(":", "=", 1) for each in flags["add-host"]))
        options.append(f'--output=type=docker,"name={",".join(flags["tag"])}",dest=-')
        command = ["buildctl", "--addr=" + address, "build", "--progress=plain", "--frontend=dockerfile.v0", *options]
        building = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        try:
            return list(self.load({}, [], building.stdout))
        except ApiError as error:
            raise ApiError("exit status 1" if building.wait() else str(error)) from None


###############################################################################
# Command line
###############################################################################


def parse_args(argv: List[str]) -> argparse.Namespace:
    """The options; ends with status 2 and usage for what cannot be understood."""
    environment = os.environ.get
    parser = argparse.ArgumentParser(
        prog="nerdctld", description="Docker Engine API on a unix socket, carried out by nerdctl.",
        epilog="dial-stdio joins standard input and output to the socket, for docker -H ssh://.")
    parser.add_argument("command", nargs="?", choices=["dial-stdio"], help=argparse.SUPPRESS)
    parser.add_argument("-H", "--addr", metavar="unix://PATH", default="",
                        help=f"socket to listen on (default: the one systemd hands over, else {default_socket_path()})")
    parser.add_argument("--nerdctl", metavar="COMMAND", default=environment("NERDCTL") or "",
                        help='nerdctl to run, such as "lima nerdctl" (default: $NERDCTL, nerdctl, or where that is missing containerd\'s ctr)')
    parser.add_argument("--namespace", default=environment("CONTAINERD_NAMESPACE") or "default", help="containerd namespace")
    parser.add_argument("--address", default=environment("CONTAINERD_ADDRESS") or "", help="containerd's socket")
    parser.add_argument("--snapshotter", default=environment("CONTAINERD_SNAPSHOTTER") or "", help="containerd snapshotter")
    parser.add_argument("--buildkit-host", default=environment("BUILDKIT_HOST") or "", help="buildkitd's address")
    parser.add_argument("--idle-timeout", metavar="SECONDS", type=float, default=0.0,
                        help="end after so long without use, when started by a socket unit")
    parser.add_argument("--debug", action="store_true", help="log each request and each nerdctl command with its time")
    parser.add_argument("--version", action="version", version=f"nerdctld {VERSION}")
    options = parser.parse_args(argv)
    if options.nerdctl and not shlex.split(options.nerdctl):
        parser.error("--nerdctl: no command")
    if not re.fullmatch(r"[A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*", options.namespace):
        parser.error(f"--namespace: {options.namespace!r} is not a containerd namespace")
    return options


def listen(address: str) -> Tuple[socket.socket, str]:
    """The listening socket and, where it is our own and so ours to remove, its path."""
    listener = inherited_socket()
    if listener:
        return listener, ""
    path = socket_path(address) if address else default_socket_path()
    return own_socket(path), path


def serve_until_told(server: Server, idle_timeout: float) -> None:
    """Serve until SIGTERM, SIGINT or, with a timeout, until idle for so long; then let running requests end, for a
    bounded time."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    while not told.wait(min(1.0, idle_timeout / 4) if idle_timeout else None):
        if server.idle_seconds() >= idle_timeout:
            log(f"idle for {idle_timeout:g} seconds: ending")
            break
    server.shutdown()


def main(argv: Optional[List[str]] = None) -> int:
    """Run the daemon; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["nerdctl"]:
        return ctr_main(argv[1:])
    options = parse_args(argv)
    notify = os.environ.pop("NOTIFY_SOCKET", "")
    try:
        if options.command == "dial-stdio":
            return dial_stdio(socket_path(options.addr) if options.addr else default_socket_path())
        listener, path = listen(options.addr)
    except StartError as error:
        log(str(error))
        return 1
    nerdctl = Nerdctl(shlex.split(options.nerdctl) or nerdctl_command(), options.namespace, options.address, options.snapshotter,
                      options.buildkit_host, options.debug)
    engine = Engine(nerdctl)
    engine.workspace.sweep()
    server = Server(engine, listener)
    inode = os.lstat(path).st_ino if path else 0
    notify_systemd("READY=1", notify)
    log(f"listening on {path or 'the socket of systemd'}, namespace {nerdctl.namespace}")
    serve_until_told(server, 0.0 if path else options.idle_timeout)
    notify_systemd("STOPPING=1", notify)
    if path:
        with contextlib.suppress(OSError):
            if os.lstat(path).st_ino == inode:
                os.unlink(path)
    deadline = time.monotonic() + 10.0
    while server.active and time.monotonic() < deadline:
        time.sleep(0.02)
    engine.close()
    listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
