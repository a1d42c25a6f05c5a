# SPDX-License-Identifier: Apache-2.0
"""Tests of nerdctld.py, in the order of its sections.

Hermetic tests run anywhere: a scripted nerdctl replays what the real one printed (each Recording says which version and
command it is of). Live tests, in the classes called Live…, run where nerdctl and containerd answer; otherwise they skip
with one line. `python3 test_nerdctld.py --bench` prints ratios instead.
"""

import ast
import base64
import contextlib
import http.client
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse

import pytest

import nerdctld

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = (HERE / "nerdctld.py").read_text()
SHARED = HERE.parent / "shared"
BASE = "localhost:5000/bb:1"


###############################################################################
# A scripted nerdctl
###############################################################################


class Recording:
    """What a real program printed: `of` is its version and command line."""

    def __init__(self, of, stdout="", stderr="", status=0):
        self.of, self.stdout, self.stderr, self.status = of, stdout, stderr, status


SCRIPT = '''#!%s -SE
import json, os, sys, time
folder = os.path.dirname(os.path.abspath(__file__))
words = [each for each in sys.argv[1:] if not each.startswith(("--namespace=", "--address=", "--snapshotter="))]
rules = json.load(open(os.path.join(folder, "rules.json")))
rule = next((each for each in rules if words[:len(each["match"])] == each["match"]), None)
call = {"argv": words, "stdin": 0, "auth": None}
config = os.environ.get("DOCKER_CONFIG")
if config and os.path.exists(os.path.join(config, "config.json")):
    call["auth"] = json.load(open(os.path.join(config, "config.json")))
    call["mode"] = os.stat(os.path.join(config, "config.json")).st_mode & 0o777
if rule and rule.get("reads"):
    data = sys.stdin.buffer.read()
    call["stdin"], call["text"] = len(data), data[:200].decode(errors="replace")
with open(os.path.join(folder, "calls.jsonl"), "a") as file:
    file.write(json.dumps(call) + chr(10))
if rule is None:
    sys.stderr.write('time="2026-11-24T00:00:00Z" level=fatal msg="not in the script: ' + " ".join(words) + '"' + chr(10))
    sys.exit(1)
sys.stdout.write(rule["stdout"])
sys.stdout.flush()
sys.stderr.write(rule["stderr"])
sys.stderr.flush()
if rule.get("stays"):
    time.sleep(rule["stays"])
sys.exit(rule["status"])
'''


class Scripted:
    """A nerdctl that answers from recordings and notes its calls."""

    def __init__(self, folder):
        self.folder = folder
        self.program = folder / "nerdctl"
        self.program.write_text(SCRIPT % sys.executable)
        self.program.chmod(0o755)
        self.rules = []
        self.on("events", stays=600)

    def on(self, command, recording=None, stdout="", stderr="", status=0, stays=0, reads=False):
        """From now on `command` (the first words) answers so; later rules win."""
        if recording is not None:
            stdout, stderr, status = recording.stdout, recording.stderr, recording.status
        self.rules.insert(0, {"match": command.split(), "stdout": stdout, "stderr": stderr, "status": status, "stays": stays, "reads": reads})
        temporary = self.folder / "rules.new"
        temporary.write_text(json.dumps(self.rules))
        temporary.rename(self.folder / "rules.json")

    def calls(self, command=""):
        """The calls so far that begin with these words, but for the resident events."""
        wanted = command.split()
        try:
            lines = (self.folder / "calls.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        calls = [json.loads(line) for line in lines]
        return [each for each in calls if each["argv"][:len(wanted)] == wanted and each["argv"][:1] != ["events"]]

    def argv(self, command=""):
        """The words of the last such call."""
        return self.calls(command)[-1]["argv"]


class Answer:
    """A response as a client would see it; `json` is its JSON, `lines` the JSON values of a progress stream."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def lines(self):
        return [json.loads(line) for line in self.body.split(b"\n") if line.strip()]

    @property
    def message(self):
        return self.json["message"]


class BlockBody(io.BytesIO):
    """A request body in memory with the interface of the server's."""

    def blocks(self, size=1 << 18):
        return iter(lambda: self.read(size), b"")


def ask(engine, method, target, body=b"", headers=None):
    """Send one request through the dispatcher, without a socket."""
    path, _, query = target.partition("?")
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    fields = http.client.HTTPMessage()
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        fields[name] = value
    try:
        version, path = nerdctld.split_version(urllib.parse.unquote(path))
        request = nerdctld.Request(method, path, version, urllib.parse.parse_qs(query, keep_blank_values=True), fields, BlockBody(body))
        response = nerdctld.dispatch(engine, request)
    except nerdctld.ApiError as error:
        response = nerdctld.error_response(error)
    data = response.body or b""
    if isinstance(data, nerdctld.Stream):
        try:
            data = b"".join(data.chunks)
        except nerdctld.ApiError as error:
            response = nerdctld.error_response(error)
            data = response.body
    return Answer(response.status, response.headers, data)


@pytest.fixture
def scripted(tmp_path):
    """A scripted nerdctl with nothing in it."""
    folder = tmp_path / "scripted"
    folder.mkdir()
    return Scripted(folder)


@pytest.fixture
def engine(scripted):
    """An engine over the scripted nerdctl."""
    found = nerdctld.Engine(nerdctld.Nerdctl([str(scripted.program)]))
    yield found
    found.close()


class Daemon:
    """nerdctld.py as a process of its own."""

    def __init__(self, folder, *options, environment=None, command=None):
        self.socket = str(folder / "nd.sock")
        self.log = folder / "nd.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command or [sys.executable, str(HERE / "nerdctld.py"), "-H", "unix://" + self.socket, *options],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(environment or {})})
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.connect().close()
                return
            time.sleep(0.02)
        raise AssertionError("the daemon did not start: " + self.log.read_text())

    def connect(self):
        """A new connection to it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(30)
        sock.connect(self.socket)
        return sock

    def ask(self, method, path, body=None, headers=None):
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = self.connect()
        with contextlib.closing(connection):
            if body is not None and not isinstance(body, (bytes, str)):
                body, headers = json.dumps(body), {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def children(self):
        """Command lines of its child processes."""
        found = []
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for pid in (task / "children").read_text().split():
                    found.append(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def end(self):
        """Ask it to end; its status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(5)


@pytest.fixture
def daemon(tmp_path, scripted):
    """The daemon over the scripted nerdctl."""
    found = Daemon(tmp_path, "--nerdctl", str(scripted.program))
    yield found
    found.end()


def until(condition, seconds=10.0):
    """Wait for a condition; its value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > deadline:
            return value
        time.sleep(0.02)


###############################################################################
# The shape of the file
###############################################################################


class TestShape:
    def test_stdlib_only(self):
        names = set()
        for node in ast.walk(ast.parse(SOURCE)):
            if isinstance(node, ast.Import):
                names.update(each.name.partition(".")[0] for each in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
        assert names <= set(getattr(sys, "stdlib_module_names", names))

    def test_parses_as_python_3_9(self):
        ast.parse(SOURCE, feature_version=(3, 9))

    def test_functions_are_short_and_documented(self):
        for node in ast.walk(ast.parse(SOURCE)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                length = node.end_lineno - node.lineno + 1
                if isinstance(node, ast.FunctionDef):
                    assert length <= 60, f"{node.name} is {length} lines long"
        for node in ast.parse(SOURCE).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.get_docstring(node), f"{node.name} has no docstring"

    def test_sections_are_those_of_the_docstring(self):
        banners = re.findall(r"^#{79}\n# (.+)\n#{79}$", SOURCE, re.M)
        listed = re.search(r"stands above it:\n\n(.*?)\n\n", nerdctld.__doc__, re.S).group(1)
        assert banners == [each.strip() for each in re.split(r"\s*·\s*", " ".join(listed.split())) if each.strip()]

    def test_each_route_matches_its_own_sample_only(self):
        for each in nerdctld.ROUTES:
            sample = re.sub(r"\{\w+\}", "abc", each.path)
            handler, _ = nerdctld.find_route(each.method, sample)
            assert handler is each.handler, f"{each.method} {each.path} is answered by {handler.__name__}"

    def test_readme_lists_every_route(self):
        text = (HERE / "README.md").read_text()
        table = set(re.findall(r"^\| `(GET|HEAD|POST|PUT|DELETE) (\S+)` \|", text, re.M))
        assert table == {(each.method, each.path) for each in nerdctld.ROUTES}

    def test_every_file_says_its_license(self):
        for name in ("nerdctld.py", "test_nerdctld.py", "nerdctl.service", "nerdctl.socket", "nerdctl", "README.md", ".ci/run", ".ci/stack"):
            assert "SPDX-License-Identifier: Apache-2.0" in (HERE / name).read_text()[:200], name


###############################################################################
# Requests, responses
###############################################################################


class TestRequests:
    @pytest.mark.parametrize("text, value", [("1", True), ("True", True), ("true", True), ("0", False), ("False", False), ("", False),
                                             ("no", False), ("none", False), ("yes", True)])
    def test_flag(self, text, value):
        assert nerdctld.Request("GET", "/", query={"a": [text]}).flag("a") is value

    def test_flag_absent(self):
        assert nerdctld.Request("GET", "/").flag("a", True) is True

    @pytest.mark.parametrize("text", ["x", "1.5", "0x10", "1" * 40])
    def test_integer_refuses(self, text):
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.Request("GET", "/", query={"a": [text]}).integer("a")

    def test_timestamp(self):
        for text in ("1700000000", "1700000000.000000000", "2023-11-14T22:13:20Z", "2023-11-14T23:13:20+01:00"):
            assert nerdctld.Request("GET", "/", query={"since": [text]}).timestamp("since") == 1700000000
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.Request("GET", "/", query={"since": ["yesterday"]}).timestamp("since")

    @pytest.mark.parametrize("text", ['{"label":{"a=b":true,"c":false}}', '{"label":["a=b"]}'])
    def test_filters_of_both_forms(self, text):
        assert nerdctld.Request("GET", "/", query={"filters": [text]}).filters("label") == {"label": ["a=b"]}

    @pytest.mark.parametrize("text", ["[", "[1]", '{"label":1}', '{"label":[1]}', '{"other":["a"]}', "[" * 100000])
    def test_filters_refuse(self, text):
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.Request("GET", "/", query={"filters": [text]}).filters("label")

    def test_no_filters(self):
        assert nerdctld.Request("GET", "/", query={"filters": [""]}).filters("label") == {}

    def test_body_is_bounded(self):
        with pytest.raises(nerdctld.TooLarge):
            nerdctld.read_limited(io.BytesIO(b"x" * 100), 99)


class TestRoutes:
    def test_version_too_new(self):
        with pytest.raises(nerdctld.BadParameter, match=r"client version 1.57 is too new. Maximum supported API version is 1.56"):
            nerdctld.split_version("/v1.57/info")

    def test_version_too_old(self):
        with pytest.raises(nerdctld.BadParameter, match=r"client version 1.12 is too old. Minimum supported API version is 1.24, please"):
            nerdctld.split_version("/v1.12/info")

    def test_version_is_taken_off(self):
        assert nerdctld.split_version("/v1.44/info") == ((1, 44), "/info")
        assert nerdctld.split_version("/info") == (nerdctld.API_NEWEST, "/info")

    @pytest.mark.parametrize("method, path", [("GET", "/nothing"), ("PUT", "/info"), ("GET", "/"), ("GET", "/images")])
    def test_unknown(self, engine, method, path):
        answer = ask(engine, method, path)
        assert (answer.status, answer.json) == (404, {"message": "page not found"})

    @pytest.mark.parametrize("name", ["localhost:5000/a/b:1", "busybox", "a/b@sha256:" + "0" * 64])
    def test_image_names_in_the_path(self, name):
        handler, arguments = nerdctld.find_route("GET", f"/images/{name}/json")
        assert (handler, arguments) == (nerdctld.image_inspect, {"name": name})


if __name__ == "__main__":
    sys.exit(bench(sys.argv[1:]) if "--bench" in sys.argv else pytest.main(["-q", __file__, *sys.argv[1:]]))
