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
        """From now on `command` (the first words, or a list of them) answers so; later rules win."""
        if recording is not None:
            stdout, stderr, status = recording.stdout, recording.stderr, recording.status
        words = command.split() if isinstance(command, str) else command
        self.rules.insert(0, {"match": words, "stdout": stdout, "stderr": stderr, "status": status, "stays": stays, "reads": reads})
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
# Recordings
###############################################################################

VERSION_TOLD = Recording(
    "nerdctl 2.3.5: version --format {{json .}}",
    stdout='{"Client":{"Version":"v2.3.5","GitCommit":"<unknown>","GoVersion":"go1.26.8","Os":"linux","Arch":"amd64","Components":'
    '[{"Name":"buildctl","Version":"v0.34.2"}]},"Server":{"Components":[{"Name":"containerd","Version":"v2.3.1","Details":{'
    '"GitCommit":""}},{"Name":"runc","Version":"1.1.5+ds1","Details":{"GitCommit":"1.1.5+ds1-1+deb12u1"}}]}}\n')

INFO = Recording(
    "nerdctl 2.3.5: info --format {{json .}}",
    stdout='{"ID":"16f7ae04-a9a5-49b1-9999-0f05f4c7cfab","Driver":"overlayfs","Plugins":{"Log":["fluentd","journald","json-file","'
    'none","syslog"],"Storage":["erofs","native","overlayfs"]},"MemoryLimit":true,"SwapLimit":true,"CpuCfsPeriod":true,"Cpu'
    'CfsQuota":true,"CPUShares":true,"CPUSet":true,"CPURealtime":false,"PidsLimit":true,"IPv4Forwarding":true,"BridgeNfIpta'
    'bles":true,"BridgeNfIp6tables":true,"OomKillDisable":true,"SystemTime":"2026-11-24T03:57:08.16214039Z","LoggingDriver"'
    ':"json-file","CgroupDriver":"cgroupfs","CgroupVersion":"1","KernelVersion":"6.18.44-fc-v657","OperatingSystem":"Debian'
    ' GNU/Linux 12 (bookworm)","OSType":"linux","Architecture":"x86_64","NCPU":2,"MemTotal":25276510208,"Name":"vm","Server'
    'Version":"v2.3.1","SecurityOptions":["name=seccomp,profile=builtin"],"Warnings":null}\n')

IMAGES = Recording(
    "nerdctl 2.3.5: images --no-trunc --format {{json .}}",
    stdout='{"CreatedAt":"2026-11-24 03:57:08 +0000 UTC","CreatedSince":"Less than a second ago","Digest":"sha256:4cfb279d3e24cb56'
    'dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","ID":"sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e'
    '9443a4892","Repository":"tst","Tag":"a","Name":"docker.io/library/tst:a","Size":"2.019MB","BlobSize":"2.131MB","Platfo'
    'rm":"linux/amd64"}\n'
    '{"CreatedAt":"2026-11-24 03:57:08 +0000 UTC","CreatedSince":"Less than a second ago","Digest":"sha256:4cfb279d3e24cb56'
    'dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","ID":"sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e'
    '9443a4892","Repository":"localhost:5000/bb","Tag":"1","Name":"localhost:5000/bb:1","Size":"2.019MB","BlobSize":"2.131M'
    'B","Platform":"linux/amd64"}\n'
    '{"CreatedAt":"2026-11-24 03:57:08 +0000 UTC","CreatedSince":"Less than a second ago","Digest":"sha256:630252620cdac430'
    '432d5bf81f677cd92820a3477798c594e18056c7f0cee570","ID":"sha256:630252620cdac430432d5bf81f677cd92820a3477798c594e18056c'
    '7f0cee570","Repository":"import","Tag":"<none>","Name":"import@sha256:630252620cdac430432d5bf81f677cd92820a3477798c594'
    'e18056c7f0cee570","Size":"2.019MB","BlobSize":"2.131MB","Platform":"linux/amd64"}\n')

IMAGE_INSPECT = Recording(
    "nerdctl 2.3.5: image inspect --mode=native --format {{json .}} -- localhost:5000/bb:1",
    stdout='{"Image":{"Name":"docker.io/library/tst:a","Labels":null,"Target":{"mediaType":"application/vnd.docker.distribution.ma'
    'nifest.v2+json","digest":"sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","size":422,"annotat'
    'ions":{"io.containerd.image.name":"localhost:5000/bb:1","org.opencontainers.image.ref.name":"1"}},"CreatedAt":"2026-11'
    '-24T03:57:07.854140555Z","UpdatedAt":"2026-11-24T03:57:07.854140555Z"},"ManifestDesc":{"mediaType":"application/vnd.do'
    'cker.distribution.manifest.v2+json","digest":"sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892"'
    ',"size":422,"annotations":{"io.containerd.image.name":"localhost:5000/bb:1","org.opencontainers.image.ref.name":"1"}},'
    '"Manifest":{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{"mediaType"'
    ':"application/vnd.docker.container.image.v1+json","digest":"sha256:4e848621cfa6a3a51a22d2d9a7f5a1ecb7f5a0b203f3a0eb45e'
    'fdb3c050758bf","size":333},"layers":[{"mediaType":"application/vnd.docker.image.rootfs.diff.tar","digest":"sha256:79df'
    '1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17","size":2129920}]},"ImageConfigDesc":{"mediaType":"applic'
    'ation/vnd.docker.container.image.v1+json","digest":"sha256:4e848621cfa6a3a51a22d2d9a7f5a1ecb7f5a0b203f3a0eb45efdb3c050'
    '758bf","size":333},"ImageConfig":{"created":"2023-11-14T22:13:20Z","architecture":"amd64","os":"linux","config":{"Env"'
    ':["PATH=/bin"],"Cmd":["sh"],"Labels":{"base":"busybox"}},"rootfs":{"type":"layers","diff_ids":["sha256:79df1f41608a3f3'
    '8b48a83fe14064950d9924360817997b533735fd9961ebb17"]},"history":[{"created":"2023-11-14T22:13:20Z","created_by":"busybo'
    'x-static"}]},"size":2019328}\n'
    '{"Image":{"Name":"localhost:5000/bb:1","Labels":null,"Target":{"mediaType":"application/vnd.docker.distribution.manife'
    'st.v2+json","digest":"sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","size":422,"annotations'
    '":{"io.containerd.image.name":"localhost:5000/bb:1","org.opencontainers.image.ref.name":"1"}},"CreatedAt":"2026-11-24T'
    '03:57:07.709369204Z","UpdatedAt":"2026-11-24T03:57:07.710306532Z"},"ManifestDesc":{"mediaType":"application/vnd.docker'
    '.distribution.manifest.v2+json","digest":"sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","si'
    'ze":422,"annotations":{"io.containerd.image.name":"localhost:5000/bb:1","org.opencontainers.image.ref.name":"1"}},"Man'
    'ifest":{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{"mediaType":"ap'
    'plication/vnd.docker.container.image.v1+json","digest":"sha256:4e848621cfa6a3a51a22d2d9a7f5a1ecb7f5a0b203f3a0eb45efdb3'
    'c050758bf","size":333},"layers":[{"mediaType":"application/vnd.docker.image.rootfs.diff.tar","digest":"sha256:79df1f41'
    '608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17","size":2129920}]},"ImageConfigDesc":{"mediaType":"applicatio'
    'n/vnd.docker.container.image.v1+json","digest":"sha256:4e848621cfa6a3a51a22d2d9a7f5a1ecb7f5a0b203f3a0eb45efdb3c050758b'
    'f","size":333},"ImageConfig":{"created":"2023-11-14T22:13:20Z","architecture":"amd64","os":"linux","config":{"Env":["P'
    'ATH=/bin"],"Cmd":["sh"],"Labels":{"base":"busybox"}},"rootfs":{"type":"layers","diff_ids":["sha256:79df1f41608a3f38b48'
    'a83fe14064950d9924360817997b533735fd9961ebb17"]},"history":[{"created":"2023-11-14T22:13:20Z","created_by":"busybox-st'
    'atic"}]},"size":2019328}\n')

HISTORY = Recording(
    "nerdctl 2.3.5: history --no-trunc --format {{json .}} -- localhost:5000/bb:1",
    stdout='{"Snapshot":"sha256:79df1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17","CreatedAt":"2023-11-14T22:13:20'
    'Z","CreatedSince":"3 years ago","CreatedBy":"busybox-static","Size":"2.019MB","Comment":""}\n')

BUILT_INSPECT = Recording(
    "nerdctl 2.3.5: image inspect --mode=native --format {{json .}} -- tstb:1",
    stdout='{"Image":{"Name":"docker.io/library/tstb:1","Labels":null,"Target":{"mediaType":"application/vnd.oci.image.manifest.v1'
    '+json","digest":"sha256:03629cdd4aca368024af9b57d287491be2cdd77fa4b5da2e0699270741565f2c","size":663,"annotations":{"c'
    'onfig.digest":"sha256:659a051287f7e22b876370a1f1b9886c3f69258e075aa2f0a64a07ee2aba8b20"}},"CreatedAt":"2026-11-24T03:5'
    '8:31.102758547Z","UpdatedAt":"2026-11-24T03:58:31.102758547Z"},"ManifestDesc":{"mediaType":"application/vnd.oci.image.'
    'manifest.v1+json","digest":"sha256:03629cdd4aca368024af9b57d287491be2cdd77fa4b5da2e0699270741565f2c","size":663,"annot'
    'ations":{"config.digest":"sha256:659a051287f7e22b876370a1f1b9886c3f69258e075aa2f0a64a07ee2aba8b20"}},"Manifest":{"sche'
    'maVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image'
    '.config.v1+json","digest":"sha256:659a051287f7e22b876370a1f1b9886c3f69258e075aa2f0a64a07ee2aba8b20","size":836},"layer'
    's":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:79df1f41608a3f38b48a83fe14064950d9924360817'
    '997b533735fd9961ebb17","size":2129920},{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:9d3'
    '3d9416d79e2a7a7dee5b740bb3a5f12e721d3d04ae2f859736a316e3687f2","size":153}]},"ImageConfigDesc":{"mediaType":"applicati'
    'on/vnd.oci.image.config.v1+json","digest":"sha256:659a051287f7e22b876370a1f1b9886c3f69258e075aa2f0a64a07ee2aba8b20","s'
    'ize":836},"ImageConfig":{"created":"2026-11-24T03:58:31.029388483Z","architecture":"amd64","os":"linux","config":{"Env'
    '":["PATH=/bin","A=1"],"Cmd":["sh"],"Labels":{"base":"busybox"},"ArgsEscaped":true},"rootfs":{"type":"layers","diff_ids'
    '":["sha256:79df1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17","sha256:b69dca9587b1258049ee9ad5283084d3b'
    '98d377e77daabb188533dbf132c59a5"]},"history":[{"created":"2023-11-14T22:13:20Z","created_by":"busybox-static"},{"creat'
    'ed":"2026-11-24T03:58:31.029388483Z","created_by":"ENV A=1","comment":"buildkit.dockerfile.v0","empty_layer":true},{"c'
    'reated":"2026-11-24T03:58:31.029388483Z","created_by":"RUN /bin/sh -c echo hi; echo > /x # buildkit","comment":"buildk'
    'it.dockerfile.v0"},{"created":"2026-11-24T03:58:31.029388483Z","created_by":"CMD [\\"sh\\"]","comment":"buildkit.dockerf'
    'ile.v0","empty_layer":true}]},"size":2039808}\n')

BUILT_HISTORY = Recording(
    "nerdctl 2.3.5: history --no-trunc --format {{json .}} -- tstb:1",
    stdout='{"Snapshot":"<missing>","CreatedAt":"2026-11-24T03:58:31Z","CreatedSince":"Less than a second ago","CreatedBy":"CMD [\\'
    '"sh\\"]","Size":"0B","Comment":"buildkit.dockerfile.v0"}\n'
    '{"Snapshot":"sha256:61b443fd8c7361eae7ca84e73bbc5a8f02f74a30de2c5843893d17196a6e1d61","CreatedAt":"2026-11-24T03:58:31'
    'Z","CreatedSince":"Less than a second ago","CreatedBy":"RUN /bin/sh -c echo hi; echo > /x # buildkit","Size":"20.48kB"'
    ',"Comment":"buildkit.dockerfile.v0"}\n'
    '{"Snapshot":"<missing>","CreatedAt":"2026-11-24T03:58:31Z","CreatedSince":"Less than a second ago","CreatedBy":"ENV A='
    '1","Size":"0B","Comment":"buildkit.dockerfile.v0"}\n'
    '{"Snapshot":"sha256:79df1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17","CreatedAt":"2023-11-14T22:13:20'
    'Z","CreatedSince":"3 years ago","CreatedBy":"busybox-static","Size":"2.019MB","Comment":""}\n')

LOAD = Recording(
    "nerdctl 2.3.5: load --all-platforms <base.tar",
    stdout='import@sha256:630252620cdac430432d5bf81f677cd92820a3477798c594e18056c7f0cee570\tsaved\t\n'
    'application/vnd.oci.image.index.v1+json sha256:630252620cdac430432d5bf81f677cd92820a3477798c594e18056c7f0cee570\n'
    'Importing\telapsed: 0.2 s\ttotal:   0.0 B\t(0.0 B/s)\t\n'
    'import@sha256:630252620cdac430432d5bf81f677cd92820a3477798c594e18056c7f0cee570\tsaved\t\n'
    'localhost:5000/bb:1\tsaved\t\n'
    'application/vnd.oci.image.index.v1+json sha256:630252620cdac430432d5bf81f677cd92820a3477798c594e18056c7f0cee570\n'
    'application/vnd.docker.distribution.manifest.v2+json sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e944'
    '3a4892\n'
    'Importing\telapsed: 0.2 s\ttotal:   0.0 B\t(0.0 B/s)\t\n'
    'import@sha256:630252620cdac430432d5bf81f677cd92820a3477798c594e18056c7f0cee570\tsaved\t\n'
    'localhost:5000/bb:1\tsaved\t\n'
    'application/vnd.oci.image.index.v1+json sha256:630252620cdac430432d5bf81f677cd92820a3477798c594e18056c7f0cee570\n'
    'application/vnd.docker.distribution.manifest.v2+json sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e944'
    '3a4892\n'
    'Importing\telapsed: 0.2 s\ttotal:   0.0 B\t(0.0 B/s)\t\n'
    'Loaded image: import@sha256:630252620cdac430432d5bf81f677cd92820a3477798c594e18056c7f0cee570\n'
    'Loaded image: localhost:5000/bb:1\n'
    'Loaded image: localhost:5000/bb:1\n')

PULL = Recording(
    "nerdctl 2.3.5: pull -- localhost:5000/tst/rec:1",
    stdout='localhost:5000/tst/rec:1\tfetching image content\t\n'
    'application/vnd.docker.distribution.manifest.v2+json sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e944'
    '3a4892\n'
    'Pulling from OCI Registry (localhost:5000/tst/rec:1)\telapsed: 0.0 s\ttotal:   0.0 B\t(0.0 B/s)\t\n'
    'localhost:5000/tst/rec:1\tfetching image content\t\n'
    '└──manifest-sha256:4cfb279d3e24cb56dbe0b\twaiting    \t|\x1b[32m\x1b[0m--------------------------------------|\t\n'
    'application/vnd.docker.distribution.manifest.v2+json sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e944'
    '3a4892\n'
    'Pulling from OCI Registry (localhost:5000/tst/rec:1)\telapsed: 0.0 s\ttotal:   0.0 B\t(0.0 B/s)\t\n'
    'localhost:5000/tst/rec:1\tfetching image content\t\n'
    '└──manifest-sha256:4cfb279d3e24cb56dbe0b\twaiting    \t|\x1b[32m\x1b[0m--------------------------------------|\t\n'
    '   └──config-sha256:4e848621cfa6a3a51a22\twaiting    \t|\x1b[32m\x1b[0m--------------------------------------|\t\n'
    'application/vnd.docker.distribution.manifest.v2+json sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e944'
    '3a4892\n'
    'Pulling from OCI Registry (localhost:5000/tst/rec:1)\telapsed: 0.0 s\ttotal:   0.0 B\t(0.0 B/s)\t\n'
    'localhost:5000/tst/rec:1\tsaved\t\n'
    '└──manifest-sha256:4cfb279d3e24cb56dbe0b\twaiting    \t|\x1b[32m\x1b[0m--------------------------------------|\t\n'
    '   └──config-sha256:4e848621cfa6a3a51a22\twaiting    \t|\x1b[32m\x1b[0m--------------------------------------|\t\n'
    'application/vnd.docker.distribution.manifest.v2+json sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e944'
    '3a4892\n'
    'Pulling from OCI Registry (localhost:5000/tst/rec:1)\telapsed: 0.0 s\ttotal:   0.0 B\t(0.0 B/s)\t\n'
    'localhost:5000/tst/rec:1\tsaved\t\n'
    '└──manifest-sha256:4cfb279d3e24cb56dbe0b\tcomplete   \t|\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m|\t\n'
    '   └──config-sha256:4e848621cfa6a3a51a22\twaiting    \t|\x1b[32m\x1b[0m--------------------------------------|\t\n'
    'application/vnd.docker.distribution.manifest.v2+json sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e944'
    '3a4892\n'
    'Completed pull from OCI Registry (localhost:5000/tst/rec:1)\telapsed: 0.0 s\ttotal:  422.0 \t(34.5 KiB/s)\t\n'
    'localhost:5000/tst/rec:1\tsaved\t\n'
    '└──manifest-sha256:4cfb279d3e24cb56dbe0b\tcomplete   \t|\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m|\t\n'
    '   └──config-sha256:4e848621cfa6a3a51a22\tcomplete   \t|\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m|\t\n'
    'application/vnd.docker.distribution.manifest.v2+json sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e944'
    '3a4892\n'
    'Completed pull from OCI Registry (localhost:5000/tst/rec:1)\telapsed: 0.0 s\ttotal:  755.0 \t(61.7 KiB/s)\t\n')

PUSH = Recording(
    "nerdctl 2.3.5: push -- localhost:5000/tst/rec:1",
    stdout='manifest-sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892: done           |\x1b[32m+++++++++++++++'
    '+++++++++++++++++++++++\x1b[0m| \n'
    'layer-sha256:79df1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17:    done           |\x1b[32m+++++++++++++++'
    '+++++++++++++++++++++++\x1b[0m| \n'
    'config-sha256:4e848621cfa6a3a51a22d2d9a7f5a1ecb7f5a0b203f3a0eb45efdb3c050758bf:   done           |\x1b[32m+++++++++++++++'
    '+++++++++++++++++++++++\x1b[0m| \n'
    'elapsed: 0.1 s                                                                    total:  2.0 Mi (20.3 MiB/s)         '
    '                             \n',
    stderr='time="2026-11-24T03:58:29Z" level=info msg="pushing as a reduced-platform image (application/vnd.docker.distribution.m'
    'anifest.v2+json, sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892)"\n')

IMPORT = Recording(
    "nerdctl 2.3.5: import --message=m -- - tst:imp <a.tar",
    stdout='docker.io/library/tst:imp\n',
    stderr='docker.io/library/tst:imp@sha256:c5bca91b4ceed07968cef1cdaee93d79c220389c75914aff813fd1fa8fdbfd43\tsaved\t\n'
    'application/vnd.oci.image.index.v1+json sha256:c5bca91b4ceed07968cef1cdaee93d79c220389c75914aff813fd1fa8fdbfd43\n'
    'Importing\telapsed: 0.0 s\ttotal:   0.0 B\t(0.0 B/s)\t\n'
    'docker.io/library/tst:imp@sha256:c5bca91b4ceed07968cef1cdaee93d79c220389c75914aff813fd1fa8fdbfd43\tsaved\t\n'
    'docker.io/library/tst:imp\tsaved\t\n'
    'application/vnd.oci.image.index.v1+json sha256:c5bca91b4ceed07968cef1cdaee93d79c220389c75914aff813fd1fa8fdbfd43\n'
    'application/vnd.docker.distribution.manifest.v2+json sha256:7813bd1ee69e829148f84444f08cb473d3e01e39f64f35429888f04308'
    '7911d2\n'
    'Importing\telapsed: 0.0 s\ttotal:   0.0 B\t(0.0 B/s)\t\n')

BUILD = Recording(
    "nerdctl 2.3.5: build --progress=plain --tag=docker.io/library/tstb:1 -- FOLDER",
    stderr='#1 [internal] load build definition from Dockerfile\n'
    '#1 transferring dockerfile: 104B done\n'
    '#1 DONE 0.0s\n'
    '\n'
    '#2 [internal] load metadata for localhost:5000/bb:1\n'
    '#2 DONE 0.0s\n'
    '\n'
    '#3 [internal] load .dockerignore\n'
    '#3 transferring context: 2B done\n'
    '#3 DONE 0.0s\n'
    '\n'
    '#4 [1/2] FROM localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892\n'
    '#4 resolve localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892 0.0s done\n'
    '#4 DONE 0.0s\n'
    '\n'
    '#4 [1/2] FROM localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892\n'
    '#4 extracting sha256:79df1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17 0.0s done\n'
    '#4 DONE 0.1s\n'
    '\n'
    '#5 [2/2] RUN echo hi; echo > /x\n'
    '#5 0.123 hi\n'
    '#5 DONE 0.3s\n'
    '\n'
    '#6 exporting to image\n'
    '#6 exporting layers 0.0s done\n'
    '#6 exporting manifest sha256:03629cdd4aca368024af9b57d287491be2cdd77fa4b5da2e0699270741565f2c done\n'
    '#6 exporting config sha256:659a051287f7e22b876370a1f1b9886c3f69258e075aa2f0a64a07ee2aba8b20 done\n'
    '#6 naming to docker.io/library/tstb:1 done\n'
    '#6 unpacking to docker.io/library/tstb:1 0.0s done\n'
    '#6 DONE 0.1s\n')

BUILD_FAILED = Recording(
    "nerdctl 2.3.5: build of a Dockerfile with RUN exit 7",
    stderr='#1 [internal] load build definition from Dockerfile\n'
    '#1 transferring dockerfile: 73B done\n'
    '#1 DONE 0.0s\n'
    '\n'
    '#2 [internal] load metadata for localhost:5000/bb:1\n'
    '#2 DONE 0.0s\n'
    '\n'
    '#3 [internal] load .dockerignore\n'
    '#3 transferring context: 2B done\n'
    '#3 DONE 0.0s\n'
    '\n'
    '#4 [1/2] FROM localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892\n'
    '#4 resolve localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892 0.0s done\n'
    '#4 CACHED\n'
    '\n'
    '#5 [2/2] RUN exit 7\n'
    '#5 ERROR: process "/bin/sh -c exit 7" did not complete successfully: exit code: 7\n'
    '------\n'
    ' > [2/2] RUN exit 7:\n'
    '------\n'
    'Dockerfile:2\n'
    '--------------------\n'
    '   1 |     FROM localhost:5000/bb:1\n'
    '   2 | >>> RUN exit 7\n'
    '   3 |     \n'
    '--------------------\n'
    'error: failed to solve: process "/bin/sh -c exit 7" did not complete successfully: exit code: 7\n',
    status=1)

BUILD_UNPARSED = Recording(
    "nerdctl 2.3.5: build of a Dockerfile with FOO exit 7",
    stderr='#1 [internal] load build definition from Dockerfile\n'
    '#1 transferring dockerfile: 73B done\n'
    '#1 DONE 0.0s\n'
    'Dockerfile:2\n'
    '--------------------\n'
    '   1 |     FROM localhost:5000/bb:1\n'
    '   2 | >>> FOO exit 7\n'
    '   3 |     \n'
    '--------------------\n'
    'error: failed to solve: dockerfile parse error on line 2: unknown instruction: FOO (did you mean FROM?)\n',
    status=1)

PS = Recording(
    "nerdctl 2.3.5: ps -a --no-trunc --format CONTAINER_ROW, the string of labels and some of nerdctl's own cut",
    stdout='[{"Command":"\\"sleep 1000\\"","CreatedAt":"2026-11-24T03:57:10.961607537Z","ID":"00268aa8ed4c7515d2a22ad63e9f39da043f9c'
    'f64ec3b5a35cf673758e21b883","Image":"localhost:5000/bb:1","Platform":"linux/amd64","Names":"tstpaused","Ports":"","Sta'
    'tus":"Paused","Runtime":"io.containerd.runc.v2","Size":"","Labels":""},{"base":"busybox","containerd.io/restart.explic'
    'itly-stopped":"false","io.containerd.image.config.stop-signal":"SIGTERM","nerdctl/auto-remove":"false","nerdctl/hostna'
    'me":"00268aa8ed4c","nerdctl/ipc":"{\\"mode\\":\\"private\\"}","nerdctl/log-config":"{\\"driver\\":\\"json-file\\",\\"address\\":'
    '\\"/run/containerd/containerd.sock\\"}","nerdctl/name":"tstpaused","nerdctl/namespace":"tstrec","nerdctl/networks":"[\\"n'
    'one\\"]","nerdctl/state-dir":"/var/lib/nerdctl/1935db59/containers/tstrec/00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b'
    '5a35cf673758e21b883"}]\n'
    '[{"Command":"\\"sh\\"","CreatedAt":"2026-11-24T03:57:10.764528161Z","ID":"533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc'
    '1e7a4134ee8c9a9540","Image":"localhost:5000/bb:1","Platform":"linux/amd64","Names":"tstnew","Ports":"","Status":"Creat'
    'ed","Runtime":"io.containerd.runc.v2","Size":"","Labels":""},{"base":"busybox","io.containerd.image.config.stop-signal'
    '":"SIGTERM","nerdctl/auto-remove":"false","nerdctl/hostname":"533190b4ba1f","nerdctl/ipc":"{\\"mode\\":\\"private\\"}","ne'
    'rdctl/log-config":"{\\"driver\\":\\"json-file\\",\\"address\\":\\"/run/containerd/containerd.sock\\"}","nerdctl/name":"tstnew"'
    ',"nerdctl/namespace":"tstrec","nerdctl/networks":"[\\"none\\"]","nerdctl/state-dir":"/var/lib/nerdctl/1935db59/container'
    's/tstrec/533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc1e7a4134ee8c9a9540"}]\n'
    '[{"Command":"\\"sh -c exit 3\\"","CreatedAt":"2026-11-24T03:57:10.426873533Z","ID":"c92a69e7018b7d7df77c38c10739ae9f599e'
    '5d603ac168e6f7543ae0ac1c18a3","Image":"localhost:5000/bb:1","Platform":"linux/amd64","Names":"tstdone","Ports":"","Sta'
    'tus":"Exited (3) Less than a second ago","Runtime":"io.containerd.runc.v2","Size":"","Labels":""},{"base":"busybox","c'
    'ontainerd.io/restart.explicitly-stopped":"false","io.containerd.image.config.stop-signal":"SIGTERM","nerdctl/auto-remo'
    've":"false","nerdctl/hostname":"c92a69e7018b","nerdctl/ipc":"{\\"mode\\":\\"private\\"}","nerdctl/log-config":"{\\"driver\\"'
    ':\\"json-file\\",\\"address\\":\\"/run/containerd/containerd.sock\\"}","nerdctl/name":"tstdone","nerdctl/namespace":"tstrec"'
    ',"nerdctl/networks":"[\\"none\\"]","nerdctl/state-dir":"/var/lib/nerdctl/1935db59/containers/tstrec/c92a69e7018b7d7df77c'
    '38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3"}]\n'
    '[{"Command":"\\"sleep 1000\\"","CreatedAt":"2026-11-24T03:57:09.762902396Z","ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2'
    'acb39c61be740b59cf1ace498b","Image":"localhost:5000/bb:1","Platform":"linux/amd64","Names":"tstweb","Ports":"0.0.0.0:1'
    '8080->80/tcp","Status":"Up","Runtime":"io.containerd.runc.v2","Size":"","Labels":""},{"a":"b,c","base":"busybox","cont'
    'ainerd.io/restart.explicitly-stopped":"false","containerd.io/restart.policy":"always","containerd.io/restart.status":"'
    'running","io.containerd.image.config.stop-signal":"SIGTERM","nerdctl/auto-remove":"false","nerdctl/hostname":"da8682ce'
    'eebe","nerdctl/ipc":"{\\"mode\\":\\"private\\"}","nerdctl/log-config":"{\\"driver\\":\\"json-file\\",\\"address\\":\\"/run/contai'
    'nerd/containerd.sock\\"}","nerdctl/mounts.0":"{\\"Type\\":\\"volume\\",\\"Name\\":\\"tstvol\\",\\"Source\\":\\"/var/lib/nerdctl/19'
    '35db59/volumes/tstrec/tstvol/_data\\",\\"Destination\\":\\"/data\\",\\"Driver\\":\\"local\\",\\"Mode\\":\\"\\",\\"RW\\":true,\\"Propag'
    'ation\\":\\"\\"}","nerdctl/mounts.1":"{\\"Type\\":\\"bind\\",\\"Source\\":\\"/tmp\\",\\"Destination\\":\\"/host\\",\\"Mode\\":\\"ro\\",\\"'
    'RW\\":false,\\"Propagation\\":\\"\\"}","nerdctl/name":"tstweb","nerdctl/namespace":"tstrec","nerdctl/networks":"[\\"tstnet\\"'
    ']","nerdctl/state-dir":"/var/lib/nerdctl/1935db59/containers/tstrec/da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be74'
    '0b59cf1ace498b"}]\n')

PS_SIZE = Recording(
    'nerdctl 2.3.5: ps -a --no-trunc --size --format {"ID":{{json .ID}},"Size":{{json .Size}}}',
    stdout='{"ID":"00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883","Size":"20.0 KiB (virtual 1.9 MiB)"}\n'
    '{"ID":"533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc1e7a4134ee8c9a9540","Size":"4.0 KiB (virtual 1.9 MiB)"}\n'
    '{"ID":"c92a69e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3","Size":"20.0 KiB (virtual 1.9 MiB)"}\n'
    '{"ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b","Size":"28.0 KiB (virtual 2.0 MiB)"}\n')

INSPECT_WEB = Recording(
    "nerdctl 2.3.5: container inspect --mode=native --format INSPECT_FORMAT -- tstweb, capabilities and usual mounts cut",
    stdout='{"ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b","Labels":{},"Image":"localhost:5000/bb:1","Cr'
    'eatedAt":"2026-11-24T03:57:09.762902396Z","Snapshotter":"overlayfs","Runtime":"io.containerd.runc.v2","Task":{"Pid":32'
    '149,"Status":{"Status":"running","ExitStatus":0,"ExitTime":"0001-01-01T00:00:00Z"},"NetNS":{"PrimaryInterface":2,"Inte'
    'rfaces":[{"Index":1,"MTU":65536,"Name":"lo","HardwareAddr":"","Flags":["up","loopback","running"],"Addrs":["127.0.0.1/'
    '8","::1/128"]},{"Index":2,"MTU":1500,"Name":"eth0","HardwareAddr":"36:70:31:72:11:0b","Flags":["up","broadcast","multi'
    'cast","running"],"Addrs":["10.77.0.2/24","fe80::3470:31ff:fe72:110b/64"]}],"PortMappings":[{"HostPort":18080,"Containe'
    'rPort":80,"Protocol":"tcp","HostIP":"0.0.0.0"}]}},"Spec":{"process":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"ar'
    'gs":["sleep","1000"],"env":["PATH=/bin","X=1","HOSTNAME=da8682ceeebe"],"cwd":"/"},"root":{"path":"rootfs"},"hostname":'
    '"da8682ceeebe","mounts":[{"destination":"/data","type":"none","source":"/var/lib/nerdctl/1935db59/volumes/tstrec/tstvo'
    'l/_data","options":["rbind"]},{"destination":"/host","type":"none","source":"/tmp","options":["ro","rprivate","rbind"]'
    '},{"destination":"/etc/hosts","type":"bind","source":"/var/lib/nerdctl/1935db59/etchosts/tstrec/da8682ceeebe247ed0c1fe'
    '3251e8c813f2a5a2acb39c61be740b59cf1ace498b/hosts","options":["bind","rprivate"]},{"destination":"/etc/hostname","type"'
    ':"bind","source":"/var/lib/nerdctl/1935db59/containers/tstrec/da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf'
    '1ace498b/hostname","options":["bind","rprivate"]}],"resources":{"memory":{},"cpu":{"realtimeRuntime":0,"realtimePeriod'
    '":0}},"namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network"}],"sysctl":{"net.i'
    'pv4.ip_unprivileged_port_start":"0"},"cgroupsPath":"/tstrec/da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1a'
    'ce498b","maskedPaths":["/proc/acpi"],"readonlyPaths":["/proc/bus"],"devices":null,"domainname":""}}\n')

INSPECT_DONE = Recording(
    "nerdctl 2.3.5: container inspect --mode=native --format INSPECT_FORMAT -- tstdone, capabilities and usual mounts cut",
    stdout='{"ID":"c92a69e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3","Labels":{},"Image":"localhost:5000/bb:1","Cr'
    'eatedAt":"2026-11-24T03:57:10.426873533Z","Snapshotter":"overlayfs","Runtime":"io.containerd.runc.v2","Task":{"Status"'
    ':{"Status":"stopped","ExitStatus":3,"ExitTime":"2026-11-24T03:57:10.624517029Z"}},"Spec":{"process":{"user":{"uid":0,"'
    'gid":0,"additionalGids":[0]},"args":["sh","-c","exit 3"],"env":["PATH=/bin","HOSTNAME=c92a69e7018b"],"cwd":"/"},"root"'
    ':{"path":"rootfs"},"hostname":"c92a69e7018b","mounts":[{"destination":"/etc/hosts","type":"bind","source":"/var/lib/ne'
    'rdctl/1935db59/etchosts/tstrec/c92a69e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3/hosts","options":["bin'
    'd","rprivate"]},{"destination":"/etc/hostname","type":"bind","source":"/var/lib/nerdctl/1935db59/containers/tstrec/c92'
    'a69e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3/hostname","options":["bind","rprivate"]}],"resources":{"'
    'memory":{},"cpu":{"realtimeRuntime":0,"realtimePeriod":0}},"namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"uts"},'
    '{"type":"mount"},{"type":"network"}],"sysctl":{"net.ipv4.ip_unprivileged_port_start":"0"},"cgroupsPath":"/tstrec/c92a6'
    '9e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3","maskedPaths":["/proc/acpi"],"readonlyPaths":["/proc/bus"'
    '],"devices":null,"domainname":""}}\n')

INSPECT_NEW = Recording(
    "nerdctl 2.3.5: container inspect --mode=native --format INSPECT_FORMAT -- tstnew, capabilities and usual mounts cut",
    stdout='{"ID":"533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc1e7a4134ee8c9a9540","Labels":{},"Image":"localhost:5000/bb:1","Cr'
    'eatedAt":"2026-11-24T03:57:10.764528161Z","Snapshotter":"overlayfs","Runtime":"io.containerd.runc.v2","Task":null,"Spe'
    'c":{"process":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"args":["sh"],"env":["PATH=/bin","HOSTNAME=533190b4ba1f"]'
    ',"cwd":"/"},"root":{"path":"rootfs"},"hostname":"533190b4ba1f","mounts":[{"destination":"/etc/hosts","type":"bind","so'
    'urce":"/var/lib/nerdctl/1935db59/etchosts/tstrec/533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc1e7a4134ee8c9a9540/host'
    's","options":["bind","rprivate"]},{"destination":"/etc/hostname","type":"bind","source":"/var/lib/nerdctl/1935db59/con'
    'tainers/tstrec/533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc1e7a4134ee8c9a9540/hostname","options":["bind","rprivate"'
    ']}],"resources":{"memory":{},"cpu":{"realtimeRuntime":0,"realtimePeriod":0}},"namespaces":[{"type":"pid"},{"type":"ipc'
    '"},{"type":"uts"},{"type":"mount"},{"type":"network"}],"sysctl":{"net.ipv4.ip_unprivileged_port_start":"0"},"cgroupsPa'
    'th":"/tstrec/533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc1e7a4134ee8c9a9540","maskedPaths":["/proc/acpi"],"readonlyP'
    'aths":["/proc/bus"],"devices":null,"domainname":""}}\n')

INSPECT_PAUSED = Recording(
    "nerdctl 2.3.5: container inspect --mode=native --format INSPECT_FORMAT -- tstpaused, capabilities and usual mounts cut",
    stdout='{"ID":"00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883","Labels":{},"Image":"localhost:5000/bb:1","Cr'
    'eatedAt":"2026-11-24T03:57:10.961607537Z","Snapshotter":"overlayfs","Runtime":"io.containerd.runc.v2","Task":{"Pid":32'
    '448,"Status":{"Status":"paused","ExitStatus":0,"ExitTime":"0001-01-01T00:00:00Z"},"NetNS":{"Interfaces":[{"Index":1,"M'
    'TU":65536,"Name":"lo","HardwareAddr":"","Flags":["up","loopback","running"],"Addrs":["127.0.0.1/8","::1/128"]}],"PortM'
    'appings":null}},"Spec":{"process":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"args":["sleep","1000"],"env":["PATH='
    '/bin","HOSTNAME=00268aa8ed4c"],"cwd":"/"},"root":{"path":"rootfs"},"hostname":"00268aa8ed4c","mounts":[{"destination":'
    '"/etc/hosts","type":"bind","source":"/var/lib/nerdctl/1935db59/etchosts/tstrec/00268aa8ed4c7515d2a22ad63e9f39da043f9cf'
    '64ec3b5a35cf673758e21b883/hosts","options":["bind","rprivate"]},{"destination":"/etc/hostname","type":"bind","source":'
    '"/var/lib/nerdctl/1935db59/containers/tstrec/00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883/hostname'
    '","options":["bind","rprivate"]}],"resources":{"memory":{},"cpu":{"realtimeRuntime":0,"realtimePeriod":0}},"namespaces'
    '":[{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network"}],"sysctl":{"net.ipv4.ip_unprivileg'
    'ed_port_start":"0"},"cgroupsPath":"/tstrec/00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883","maskedPa'
    'ths":["/proc/acpi"],"readonlyPaths":["/proc/bus"],"devices":null,"domainname":""}}\n')

NETWORK_LS = Recording(
    "nerdctl 2.3.5: network ls --format {{json .}}",
    stdout='{"ID":"17f29b073143","Name":"bridge","Labels":"nerdctl/default-network=true"}\n'
    '{"ID":"6cbb982de144","Name":"tstnet","Labels":""}\n'
    '{"ID":"","Name":"host","Labels":""}\n'
    '{"ID":"","Name":"none","Labels":""}\n')

NETWORK_INSPECT = Recording(
    "nerdctl 2.3.5: network inspect --mode=native --format {{json .}} -- bridge tstnet, without its containers",
    stdout='{"CNI":{"cniVersion":"1.0.0","name":"bridge","nerdctlID":"17f29b073143d8cd97b5bbe492bdeffec1c5fee55cc1fe2112c8b9335f8b'
    '6121","nerdctlLabels":{"nerdctl/default-network":"true"},"plugins":[{"type":"bridge","bridge":"nerdctl0","isGateway":t'
    'rue,"ipMasq":true,"hairpinMode":true,"ipam":{"ranges":[[{"gateway":"10.4.0.1","subnet":"10.4.0.0/24"}]],"routes":[{"ds'
    't":"0.0.0.0/0"}],"type":"host-local"}},{"type":"portmap","capabilities":{"portMappings":true}},{"type":"firewall","ing'
    'ressPolicy":"same-bridge"},{"type":"tuning"}]},"NerdctlID":"17f29b073143d8cd97b5bbe492bdeffec1c5fee55cc1fe2112c8b9335f'
    '8b6121","NerdctlLabels":{"nerdctl/default-network":"true"},"File":"/etc/cni/net.d/nerdctl-bridge.conflist"}\n'
    '{"CNI":{"cniVersion":"1.0.0","name":"tstnet","nerdctlID":"6cbb982de14435e0565b06c4b6e90e672db1541e321fc75065985811f6a2'
    'd6b5","plugins":[{"type":"bridge","bridge":"br-6cbb982de144","isGateway":true,"ipMasq":true,"hairpinMode":true,"ipam":'
    '{"ranges":[[{"gateway":"10.77.0.1","subnet":"10.77.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}],"type":"host-local"}},{"t'
    'ype":"portmap","capabilities":{"portMappings":true}},{"type":"firewall","ingressPolicy":"same-bridge"},{"type":"tuning'
    '"}]},"NerdctlID":"6cbb982de14435e0565b06c4b6e90e672db1541e321fc75065985811f6a2d6b5","File":"/etc/cni/net.d/tstrec/nerd'
    'ctl-tstnet.conflist"}\n')

VOLUME_LS = Recording(
    "nerdctl 2.3.5: volume ls --format {{json .}}",
    stdout='{"Driver":"local","Labels":"","Mountpoint":"/var/lib/nerdctl/1935db59/volumes/tstrec/tstvol/_data","Name":"tstvol","Sc'
    'ope":"local","Size":""}\n')

VOLUME_LS_SIZE = Recording(
    "nerdctl 2.3.5: volume ls --size --format {{json .}}",
    stdout='{"Driver":"local","Labels":"","Mountpoint":"/var/lib/nerdctl/1935db59/volumes/tstrec/tstvol/_data","Name":"tstvol","Sc'
    'ope":"local","Size":"0.0 B"}\n')

VOLUME_INSPECT = Recording(
    "nerdctl 2.3.5: volume inspect --format {{json .}} -- tstvol",
    stdout='{"Name":"tstvol","Mountpoint":"/var/lib/nerdctl/1935db59/volumes/tstrec/tstvol/_data"}\n')

BUILDCTL_DU = Recording(
    "buildctl 0.34.2: du --format {{json .}}, two records of it",
    stdout='[{"id":"6h8cxtpdvnxbc5qre92rtl14j","mutable":true,"inUse":false,"size":4096,"createdAt":"2026-11-24T04:12:33.91188652Z'
    '","lastUsedAt":"2026-11-24T04:12:40.13518958Z","usageCount":2,"parents":null,"description":"local source for context",'
    '"recordType":"source.local","shared":false},{"id":"cllji6nk7zd47uq9n1xxaehum","mutable":true,"inUse":false,"size":4096'
    ',"createdAt":"2026-11-24T03:58:30.678063622Z","lastUsedAt":"2026-11-24T04:11:13.564980997Z","usageCount":5,"parents":n'
    'ull,"description":"local source for context","recordType":"source.local","shared":false}]\n')

EVENTS = Recording(
    "nerdctl 2.3.5: events --format {{json .}}, those of one container, a pause and an image",
    stdout='{"Timestamp":"2026-11-24T03:57:09.763976006Z","ID":"","Namespace":"tstrec","Topic":"/containers/create","Status":"unkn'
    'own","Event":"{\\"id\\":\\"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b\\",\\"image\\":\\"localhost:5000/'
    'bb:1\\",\\"runtime\\":{\\"name\\":\\"io.containerd.runc.v2\\",\\"options\\":{\\"type_url\\":\\"containerd.runc.v1.Options\\"}}}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:10.289789671Z","ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b",'
    '"Namespace":"tstrec","Topic":"/tasks/create","Status":"unknown","Event":"{\\"container_id\\":\\"da8682ceeebe247ed0c1fe325'
    '1e8c813f2a5a2acb39c61be740b59cf1ace498b\\",\\"bundle\\":\\"/run/containerd/io.containerd.runtime.v2.task/tstrec/da8682ceee'
    'be247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b\\",\\"rootfs\\":[{\\"type\\":\\"overlay\\",\\"source\\":\\"overlay\\",\\"op'
    'tions\\":[\\"workdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/10/work\\",\\"upperdir=/var/lib/'
    'containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/10/fs\\",\\"lowerdir=/var/lib/containerd/io.containerd.snaps'
    'hotter.v1.overlayfs/snapshots/8/fs\\",\\"index=off\\"]}],\\"io\\":{\\"stdout\\":\\"binary:///usr/local/bin/nerdctl?_NERDCTL_IN'
    'TERNAL_LOGGING=%2Fvar%2Flib%2Fnerdctl%2F1935db59\\",\\"stderr\\":\\"binary:///usr/local/bin/nerdctl?_NERDCTL_INTERNAL_LOGG'
    'ING=%2Fvar%2Flib%2Fnerdctl%2F1935db59\\"},\\"pid\\":32149}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:10.301423543Z","ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b",'
    '"Namespace":"tstrec","Topic":"/tasks/start","Status":"start","Event":"{\\"container_id\\":\\"da8682ceeebe247ed0c1fe3251e8'
    'c813f2a5a2acb39c61be740b59cf1ace498b\\",\\"pid\\":32149}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:10.304711682Z","ID":"","Namespace":"tstrec","Topic":"/containers/update","Status":"unkn'
    'own","Event":"{\\"id\\": \\"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b\\", \\"image\\": \\"localhost:50'
    '00/bb:1\\", \\"labels\\": {}, \\"snapshot_key\\": \\"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b\\"}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:11.166434294Z","ID":"00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883",'
    '"Namespace":"tstrec","Topic":"/tasks/paused","Status":"unknown","Event":"{\\"container_id\\":\\"00268aa8ed4c7515d2a22ad63'
    'e9f39da043f9cf64ec3b5a35cf673758e21b883\\"}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:11.213842263Z","ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b",'
    '"Namespace":"tstrec","Topic":"/tasks/exec-added","Status":"unknown","Event":"{\\"container_id\\":\\"da8682ceeebe247ed0c1f'
    'e3251e8c813f2a5a2acb39c61be740b59cf1ace498b\\",\\"exec_id\\":\\"exec-a0a5e6c9bc170cf66d18ab74c34a60aad57c6a05bd2159005422e'
    '6b9c2d09761\\"}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:11.277624303Z","ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b",'
    '"Namespace":"tstrec","Topic":"/tasks/exec-started","Status":"start","Event":"{\\"container_id\\":\\"da8682ceeebe247ed0c1f'
    'e3251e8c813f2a5a2acb39c61be740b59cf1ace498b\\",\\"exec_id\\":\\"exec-a0a5e6c9bc170cf66d18ab74c34a60aad57c6a05bd2159005422e'
    '6b9c2d09761\\",\\"pid\\":32504}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:11.278105746Z","ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b",'
    '"Namespace":"tstrec","Topic":"/tasks/exit","Status":"unknown","Event":"{\\"container_id\\":\\"da8682ceeebe247ed0c1fe3251e'
    '8c813f2a5a2acb39c61be740b59cf1ace498b\\",\\"id\\":\\"exec-a0a5e6c9bc170cf66d18ab74c34a60aad57c6a05bd2159005422e6b9c2d09761'
    '\\",\\"pid\\":32504,\\"exited_at\\":{\\"seconds\\":1795492631,\\"nanos\\":277473850}}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:12.407883596Z","ID":"","Namespace":"tstrec","Topic":"/images/create","Status":"unknown"'
    ',"Event":"{\\"name\\":\\"docker.io/library/tstc:1\\"}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:12.423921631Z","ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b",'
    '"Namespace":"tstrec","Topic":"/tasks/resumed","Status":"unknown","Event":"{\\"container_id\\":\\"da8682ceeebe247ed0c1fe32'
    '51e8c813f2a5a2acb39c61be740b59cf1ace498b\\"}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:15.302946233Z","ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b",'
    '"Namespace":"tstrec","Topic":"/tasks/exit","Status":"unknown","Event":"{\\"container_id\\":\\"da8682ceeebe247ed0c1fe3251e'
    '8c813f2a5a2acb39c61be740b59cf1ace498b\\",\\"id\\":\\"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b\\",\\"'
    'pid\\":32149,\\"exit_status\\":137,\\"exited_at\\":{\\"seconds\\":1795492635,\\"nanos\\":302908157}}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T03:57:15.643126561Z","ID":"","Namespace":"tstrec","Topic":"/containers/delete","Status":"unkn'
    'own","Event":"{\\"id\\":\\"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b\\"}"}\n'
    '\n')

V21_LOAD = Recording(
    "nerdctl 2.1.6: load <base.tar",
    stdout='unpacking localhost:5000/bb:1 (sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892)...\n'
    'Loaded image: localhost:5000/bb:1\n')

V21_IMAGES = Recording(
    "nerdctl 2.1.6: images --no-trunc --format {{json .}}",
    stdout='{"CreatedAt":"2026-11-24 04:20:00 +0000 UTC","CreatedSince":"Less than a second ago","Digest":"sha256:4cfb279d3e24cb56'
    'dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","ID":"sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e'
    '9443a4892","Repository":"localhost:5000/bb","Tag":"1","Name":"localhost:5000/bb:1","Size":"2.019MB","BlobSize":"2.131M'
    'B","Platform":"linux/amd64"}\n')

V21_PS = Recording(
    "nerdctl 2.1.6: ps -a --no-trunc --format CONTAINER_ROW, the string of labels and some of nerdctl's own cut",
    stdout='[{"Command":"\\"sleep 1000\\"","CreatedAt":"2026-11-24T04:20:00.155953112Z","ID":"1560750b4495ec07f4cdfdb18c2572423f7264'
    '5ec6af0dc34013f87cb87d0468","Image":"localhost:5000/bb:1","Platform":"linux/amd64","Names":"tstold","Ports":"","Status'
    '":"Up","Runtime":"io.containerd.runc.v2","Size":"","Labels":""},{"a":"b,c","base":"busybox","io.containerd.image.confi'
    'g.stop-signal":"SIGTERM","nerdctl/auto-remove":"false","nerdctl/hostname":"1560750b4495","nerdctl/ipc":"{\\"mode\\":\\"pr'
    'ivate\\"}","nerdctl/log-config":"{\\"driver\\":\\"json-file\\",\\"address\\":\\"/run/containerd/containerd.sock\\"}","nerdctl/m'
    'ounts":"[{\\"Type\\":\\"bind\\",\\"Source\\":\\"/tmp\\",\\"Destination\\":\\"/host\\",\\"Mode\\":\\"ro\\",\\"RW\\":false,\\"Propagation\\"'
    ':\\"\\"}]","nerdctl/name":"tstold","nerdctl/namespace":"tstold","nerdctl/networks":"[\\"none\\"]","nerdctl/platform":"linu'
    'x/amd64","nerdctl/state-dir":"/var/lib/nerdctl/1935db59/containers/tstold/1560750b4495ec07f4cdfdb18c2572423f72645ec6af'
    '0dc34013f87cb87d0468"}]\n')

V21_EVENTS = Recording(
    "nerdctl 2.1.6: events --format {{json .}}, the ends of an exec and of its container",
    stdout='{"Timestamp":"2026-11-24T04:20:02.163244158Z","ID":"1560750b4495ec07f4cdfdb18c2572423f72645ec6af0dc34013f87cb87d0468",'
    '"Namespace":"tstold","Topic":"/tasks/exit","Status":"unknown","Event":"{\\"container_id\\":\\"1560750b4495ec07f4cdfdb18c2'
    '572423f72645ec6af0dc34013f87cb87d0468\\",\\"id\\":\\"exec-3aeece7a55de889c8232773827dba002f45d1c97c909671d6098c3f7d93fc33e'
    '\\",\\"pid\\":29037,\\"exited_at\\":{\\"seconds\\":1795494002,\\"nanos\\":162234092}}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T04:20:02.214752813Z","ID":"1560750b4495ec07f4cdfdb18c2572423f72645ec6af0dc34013f87cb87d0468",'
    '"Namespace":"tstold","Topic":"/tasks/exit","Status":"unknown","Event":"{\\"container_id\\":\\"1560750b4495ec07f4cdfdb18c2'
    '572423f72645ec6af0dc34013f87cb87d0468\\",\\"id\\":\\"1560750b4495ec07f4cdfdb18c2572423f72645ec6af0dc34013f87cb87d0468\\",\\"'
    'pid\\":28641,\\"exit_status\\":137,\\"exited_at\\":{\\"seconds\\":1795494002,\\"nanos\\":214574919}}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T04:20:02.31424266Z","ID":"1560750b4495ec07f4cdfdb18c2572423f72645ec6af0dc34013f87cb87d0468","'
    'Namespace":"tstold","Topic":"/tasks/delete","Status":"unknown","Event":"{\\"container_id\\":\\"1560750b4495ec07f4cdfdb18c'
    '2572423f72645ec6af0dc34013f87cb87d0468\\",\\"pid\\":28641,\\"exit_status\\":137,\\"exited_at\\":{\\"seconds\\":1795494002,\\"nan'
    'os\\":214574919}}"}\n')

V17_LOAD = Recording(
    "nerdctl 1.7.7: load <base.tar",
    stdout='unpacking localhost:5000/bb:1 (sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892)...\n'
    'Loaded image: localhost:5000/bb:1\n')

V17_IMAGES = Recording(
    "nerdctl 1.7.7: images --no-trunc --format {{json .}}",
    stdout='{"CreatedAt":"2026-11-24 04:19:55 +0000 UTC","CreatedSince":"Less than a second ago","Digest":"sha256:4cfb279d3e24cb56'
    'dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","ID":"sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e'
    '9443a4892","Repository":"localhost:5000/bb","Tag":"1","Name":"localhost:5000/bb:1","Size":"1.9 MiB","BlobSize":"2.0 Mi'
    'B","Platform":"linux/amd64"}\n')

V17_PS = Recording(
    "nerdctl 1.7.7: ps -a --no-trunc --format CONTAINER_ROW",
    stderr='time="2026-11-24T04:19:55Z" level=fatal msg="template: :1:19: executing \\"\\" at <.LabelsMap>: can\'t evaluate field Lab'
    'elsMap in type *container.ListItem"\n',
    status=1)

V17_LABELS = Recording(
    "nerdctl 1.7.7: container inspect --mode=native --format [{{json .ID}},{{json .Labels}}] -- ID",
    stdout='["d11a5a9ab3b177a10c87ee11917f0ddff3edf682c57230b7cb67281b428b43e1",{"a":"b,c","io.containerd.image.config.stop-signal'
    '":"SIGTERM","nerdctl/extraHosts":"null","nerdctl/log-uri":"binary:///tmp/w/tst/nerdctl-v1.7.7?_NERDCTL_INTERNAL_LOGGIN'
    'G=%2Fvar%2Flib%2Fnerdctl%2F1935db59","nerdctl/mounts":"[{\\"Type\\":\\"bind\\",\\"Source\\":\\"/tmp\\",\\"Destination\\":\\"/host'
    '\\",\\"Mode\\":\\"ro\\",\\"RW\\":false,\\"Propagation\\":\\"\\"}]","nerdctl/name":"tstold","nerdctl/namespace":"tstold","nerdctl/'
    'networks":"[\\"none\\"]","nerdctl/platform":"linux/amd64","nerdctl/state-dir":"/var/lib/nerdctl/1935db59/containers/tsto'
    'ld/d11a5a9ab3b177a10c87ee11917f0ddff3edf682c57230b7cb67281b428b43e1"}]\n')

V17_HISTORY = Recording(
    "nerdctl 1.7.7: history --no-trunc --format {{json .}} -- localhost:5000/bb:1",
    stdout='{"Snapshot":"sha256:79df1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17","CreatedSince":"3 years ago","Cr'
    'eatedBy":"busybox-static","Size":"1.9 MiB","Comment":""}\n')

V17_EVENTS = Recording(
    "nerdctl 1.7.7: events --format {{json .}}, the ends of an exec and of its container",
    stdout='{"Timestamp":"2026-11-24T04:19:57.479770853Z","ID":"d11a5a9ab3b177a10c87ee11917f0ddff3edf682c57230b7cb67281b428b43e1",'
    '"Namespace":"tstold","Topic":"/tasks/exit","Status":"unknown","Event":"{\\"container_id\\":\\"d11a5a9ab3b177a10c87ee11917'
    'f0ddff3edf682c57230b7cb67281b428b43e1\\",\\"id\\":\\"exec-a6e3174f6ccfc1925cd34cbab8d1413a34bb944d24beddbbdff679d629d05ca1'
    '\\",\\"pid\\":28215,\\"exited_at\\":{\\"seconds\\":1795493997,\\"nanos\\":479085214}}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T04:19:57.524413171Z","ID":"d11a5a9ab3b177a10c87ee11917f0ddff3edf682c57230b7cb67281b428b43e1",'
    '"Namespace":"tstold","Topic":"/tasks/exit","Status":"unknown","Event":"{\\"container_id\\":\\"d11a5a9ab3b177a10c87ee11917'
    'f0ddff3edf682c57230b7cb67281b428b43e1\\",\\"id\\":\\"d11a5a9ab3b177a10c87ee11917f0ddff3edf682c57230b7cb67281b428b43e1\\",\\"'
    'pid\\":28020,\\"exit_status\\":137,\\"exited_at\\":{\\"seconds\\":1795493997,\\"nanos\\":524383757}}"}\n'
    '\n'
    '{"Timestamp":"2026-11-24T04:19:57.853314663Z","ID":"d11a5a9ab3b177a10c87ee11917f0ddff3edf682c57230b7cb67281b428b43e1",'
    '"Namespace":"tstold","Topic":"/tasks/delete","Status":"unknown","Event":"{\\"container_id\\":\\"d11a5a9ab3b177a10c87ee119'
    '17f0ddff3edf682c57230b7cb67281b428b43e1\\",\\"pid\\":28020,\\"exit_status\\":137,\\"exited_at\\":{\\"seconds\\":1795493997,\\"na'
    'nos\\":524383757}}"}\n')


def fatal(message):
    """The line that nerdctl ends with."""
    return 'time="2026-11-24T03:57:12Z" level=fatal msg="' + message.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"\n'


def level(name, message):
    """A line that nerdctl writes before that."""
    return fatal(message).replace("level=fatal", "level=" + name)


# Command of nerdctl 2.3.5 (where no other version is named) -> what it wrote to stderr, and the status and words that has to become.
ID = "da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b"
FAILURES = [
    ("ps", fatal('cannot access containerd socket "/nosuch/c.sock": no such file or directory'), 503,
     "containerd is not running at /nosuch/c.sock: start it (systemctl start containerd), or say where it is with --address"),
    ("ps", fatal('connection error: desc = "transport: Error while dialing: dial unix /run/containerd/containerd.sock: connect: connection refused"'),
     503, "containerd does not answer: see systemctl status containerd"),
    ("ps", fatal('connection error: desc = "transport: Error while dialing: dial unix /tmp/dead.sock: connect: connection refused"'), 503,
     "containerd does not answer at /tmp/dead.sock: see systemctl status containerd"),
    ("ps", fatal("rootless containerd not running? (hint: use `containerd-rootless-setuptool.sh install` to start rootless containerd): "
                 "stat /run/user/1/containerd-rootless: no such file or directory"), 503,
     "rootless containerd is not running: containerd-rootless-setuptool.sh install sets it up"),
    ("run x (over ctr)", fatal("nerdctl is not installed, and containerd's ctr cannot do what `nerdctl run` does: install nerdctl for running "
                               "containers, networks and volumes"), 501, "nerdctl is not installed"),
    ("build .", level("error", "`buildctl` needs to be installed and `buildkitd` needs to be running, see https://github.com/moby/buildkit") +
     fatal("no buildkit host is available, tried 2 candidates: failed to ping to host unix:///run/buildkit-default/buildkitd.sock: exit "
           "status 1\nfailed to ping to host unix:///run/buildkit/buildkitd.sock: exit status 1"), 503,
     "buildkitd does not answer: start it with a containerd worker, or say where it is with --buildkit-host"),
    ("build . (no buildctl)", fatal('no buildkit host is available, tried 1 candidates: failed to ping to host unix:///run/buildkit/'
                                    'buildkitd.sock: exec: "buildctl": executable file not found in $PATH'), 503,
     "buildkitd does not answer: start it with a containerd worker, or say where it is with --buildkit-host"),
    ("exec tstweb nosuchprog", fatal('OCI runtime exec failed: exec failed: unable to start container process: exec: "nosuchprog": '
                                     'executable file not found in $PATH'), 400,
     'OCI runtime exec failed: exec failed: unable to start container process: exec: "nosuchprog": executable file not found in $PATH'),
    ("run bb /etc/passwd", fatal('failed to create shim task: OCI runtime create failed: runc create failed: unable to start container '
                                 'process: exec: "/etc/passwd": permission denied'), 400, 'exec: "/etc/passwd": permission denied'),
    ("start nosuch", fatal("1 errors:\nno such container: nosuch"), 404, "No such container: nosuch"),
    ("logs nosuch", fatal("no such container nosuch"), 404, "No such container: nosuch"),
    ("create --pull never nosuch:1", fatal('image not available: "nosuch:1"'), 404, "No such image: nosuch:1"),
    ("rmi nosuch", fatal("1 errors:\nno such image: nosuch"), 404, "No such image: nosuch"),
    ("tag nosuch x", fatal('image "docker.io/library/nosuch:latest": not found'), 404, "No such image: docker.io/library/nosuch:latest"),
    ("inspect nosuch", fatal("1 errors: [no such object nosuch]"), 404, "No such object: nosuch"),
    ("push localhost:5998/a/b:1", fatal("push access denied, repository does not exist or may require authorization: authorization failed: "
                                        "no basic auth credentials"), 401, "push access denied, repository does not exist or may require"),
    ("pull localhost:5998/a/b:2", fatal("failed to resolve image: pull access denied, repository does not exist or may require authorization: "
                                        "authorization failed: no basic auth credentials"), 401, "pull access denied"),
    ("pull (1.7.7, ghcr.io)", fatal('failed to resolve reference "ghcr.io/x/y:1": pull access denied, repository does not exist or may require '
                                    "authorization: server message: insufficient_scope"), 404, "pull access denied"),
    ("pull localhost:5000/nosuch:1", fatal("failed to resolve image: localhost:5000/nosuch:1: not found"), 404, "localhost:5000/nosuch:1: not found"),
    ("network rm nosuch", level("error", "no network found matching: nosuch") + fatal("no network could be removed"), 404, "network nosuch not found"),
    ("volume rm tstv2", level("warning", 'volume "tstv2" is in use (failed precondition)') + fatal("some volumes could not be removed"), 409,
     "remove tstv2: volume is in use"),
    ("volume inspect nosuch", level("warning", 'volume-store error\nnot found\n"nosuch/volume.json" does not exist') +
     fatal("some volumes could not be inspected"), 404, "get nosuch: no such volume"),
    ("volume rm nosuch", level("warning", 'volume "nosuch": not found') + fatal("some volumes could not be removed"), 404,
     "get nosuch: no such volume"),
    ("create --name tstweb bb", fatal(f'name-store error\nname "tstweb" is already used by ID "{ID}"'), 409,
     f'Conflict. The container name "/tstweb" is already in use by container "{ID}". You have to remove (or rename) that container to be '
     "able to reuse that name."),
    ("network create tstnet", fatal("network with name tstnet already exists"), 409, "network with name tstnet already exists"),
    ("rm tstweb", fatal(f"1 errors:\ncontainer {ID} is in running status. unpause/stop container first or force removal"), 409,
     "cannot remove container: container is running: stop the container before removing or force remove"),
    ("rmi bb", fatal(f"1 errors:\nconflict: unable to delete localhost:5000/bb:1 (cannot be forced) - image is being used by running container {ID}"),
     409, f"conflict: unable to delete localhost:5000/bb:1 (cannot be forced) - image is being used by running container {ID}"),
    ("exec tstdone true", fatal("cannot exec in a stopped state"), 409, "cannot exec in a stopped state"),
    ("unpause tstweb", fatal(f"1 errors:\ncontainer {ID} is not paused"), 409, f"container {ID} is not paused"),
    ("pause tstpaused", fatal(f"1 errors:\ncontainer {ID} is already paused"), 409, f"container {ID} is already paused"),
    ("kill tstdone", fatal(f"1 errors:\ncannot kill container {ID}: container is not running"), 409, "container is not running"),
    ("run -p 18080:80 bb", fatal("failed to load networking flags: bind for :18080 failed: port is already allocated"), 500,
     "Bind for 18080 failed: port is already allocated"),
    ("cp tstweb:/nosuch -", fatal("unable to copy: source does not exist"), 404, "source does not exist"),
    ("stop 0", fatal("1 errors:\nmultiple IDs found with provided prefix: 0"), 400, "multiple IDs found with provided prefix: 0"),
    ("ps --filter bad=1", fatal("invalid filter 'bad=1'"), 400, "invalid filter 'bad=1'"),
    ("volume create -x", fatal("unknown shorthand flag: 'x' in -x"), 400, "unknown shorthand flag"),
    ("volume create -- 'a b'", fatal('volume-store error\nidentifier "a b" must match pattern "[a-zA-Z0-9][a-zA-Z0-9_.-]": invalid argument'), 400,
     'identifier "a b" must match pattern'),
    ("load <big.tar", fatal("write /var/lib/containerd/x: no space left on device"), 500, "no space left on device"),
    ("load <garbage", fatal("unexpected EOF"), 500, "unexpected EOF"),
    ("anything, without a word", "", 500, "nerdctl failed without a word"),
    ("start -a, ended by 3", fatal("1 errors:\n"), 500, "1 errors:"),
]


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

    def test_no_name_is_given_twice(self):
        names = []
        for node in ast.parse(SOURCE).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.append(node.name)
            elif isinstance(node, ast.Assign):
                names += [each.id for each in node.targets if isinstance(each, ast.Name)]
        assert sorted(names) == sorted(set(names))

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


###############################################################################
# nerdctl process
###############################################################################


class TestErrors:
    @pytest.mark.parametrize("command, stderr, status, words", FAILURES, ids=[each[0] for each in FAILURES])
    def test_failure(self, command, stderr, status, words):
        error = nerdctld.nerdctl_error(stderr)
        assert error.status == status
        assert words in str(error)
        assert not re.match(r"\d+ errors", str(error)) or words == "1 errors:"

    def test_each_line_of_the_table_has_a_case(self):
        hit = set()
        for _, stderr, _, _ in FAILURES:
            message = nerdctld.nerdctl_message(stderr)
            whole = "\n".join(nerdctld.parse_logrus(line)[1] for line in stderr.splitlines())
            found = [number for text in (message, whole) for number, (pattern, _, _) in enumerate(nerdctld.NERDCTL_ERRORS) if pattern.search(text)]
            hit.update(found[:1])
        missed = [nerdctld.NERDCTL_ERRORS[number][0].pattern for number in range(len(nerdctld.NERDCTL_ERRORS)) if number not in hit]
        assert missed == []

    def test_warnings_are_no_errors(self, engine, scripted):
        scripted.on("ps", stdout="", stderr=level("warning", "permission denied: unknown"))
        assert engine.nerdctl.run("ps").status == 0

    def test_terminal_form(self):
        assert nerdctld.parse_logrus("FATA[0000] exec failed with exit code 3") == ("fatal", "exec failed with exit code 3")

    def test_error_field(self):
        assert nerdctld.parse_logrus('time="x" level=error msg="a" error="b \\"c\\""') == ("error", 'a: b "c"')

    def test_304_has_no_body(self):
        response = nerdctld.error_response(nerdctld.NotModified())
        assert (response.status, response.body) == (304, None)


class TestNerdctlProcess:
    def test_argv(self, scripted):
        nerdctl = nerdctld.Nerdctl(["lima", "nerdctl"], "k8s.io", "/run/c.sock", "native")
        assert nerdctl.argv(["ps"]) == ["lima", "nerdctl", "--namespace=k8s.io", "--address=/run/c.sock", "--snapshotter=native", "ps"]
        assert not nerdctl.local

    @pytest.mark.parametrize("word", ["a\0b", "x" * 200000])
    def test_words_no_process_can_be_given(self, engine, word):
        with pytest.raises(nerdctld.BadParameter):
            engine.nerdctl.run("ps", "--", word)

    def test_no_shell(self, engine, scripted):
        scripted.on("ps")
        engine.nerdctl.run("ps", "--", "$(touch x); `y` | z\n'\"")
        assert scripted.argv("ps") == ["ps", "--", "$(touch x); `y` | z\n'\""]

    def test_descriptors_and_variables_of_ours_are_not_inherited(self, tmp_path):
        program = tmp_path / "nerdctl"
        program.write_text("#!/bin/sh\nls /proc/self/fd; env\n")
        program.chmod(0o755)
        os.environ["LISTEN_FDS"] = "1"
        try:
            nerdctl = nerdctld.Nerdctl([str(program)])
        finally:
            del os.environ["LISTEN_FDS"]
        held = os.open("/dev/null", os.O_RDONLY)
        text = nerdctl.run("ps").stdout.decode()
        os.close(held)
        # 3 is ls's own.
        assert [line for line in text.splitlines() if line.isdigit()] == ["0", "1", "2", "3"]
        assert "LISTEN_FDS" not in text

    def test_timeout_ends_the_group(self, tmp_path):
        program = tmp_path / "nerdctl"
        program.write_text("#!/bin/sh\nsleep 600 & echo $!\nwait\n")
        program.chmod(0o755)
        nerdctl = nerdctld.Nerdctl([str(program)])
        before = time.monotonic()
        with pytest.raises(nerdctld.Unavailable, match="did not end within"):
            nerdctl.run("ps", timeout=0.3)
        assert time.monotonic() - before < 3
        assert not nerdctl.processes

    def test_what_ignores_the_term_signal_is_killed(self, tmp_path):
        program = tmp_path / "nerdctl"
        program.write_text("#!/bin/sh\ntrap '' TERM\necho ready\nwhile :; do sleep 0.1; done\n")
        program.chmod(0o755)
        nerdctl = nerdctld.Nerdctl([str(program)])
        with nerdctl.start("events") as process:
            assert process.read() == b"ready\n"
            pid = process.popen.pid
        assert not os.path.exists(f"/proc/{pid}")

    def test_places_are_given_back(self, engine, scripted):
        for _ in range(20):
            with pytest.raises(nerdctld.ApiError):
                engine.nerdctl.run("nothing")
        assert engine.nerdctl.places._value == engine.nerdctl.places._initial_value

    def test_too_many(self, engine):
        for _ in range(engine.nerdctl.places._initial_value):
            engine.nerdctl.places.acquire()
        with pytest.raises(nerdctld.Unavailable, match="too many"):
            engine.nerdctl.run("ps", timeout=0.05)

    def test_input(self, engine, scripted):
        scripted.on("login", reads=True)
        engine.nerdctl.run("login", data=b"secret")
        assert scripted.calls("login")[0]["text"] == "secret"

    def test_output_that_is_not_json(self, engine, scripted):
        scripted.on("ps", stdout="hello\n")
        with pytest.raises(nerdctld.ApiError, match="printed what is not JSON: 'hello'"):
            engine.nerdctl.rows("ps")

    @pytest.mark.parametrize("kind", ["missing", "folder", "no permission", "no program"])
    def test_program_that_cannot_be_run(self, tmp_path, kind):
        path = tmp_path / "nerdctl"
        if kind == "folder":
            path.mkdir()
        elif kind != "missing":
            path.write_text("#!/nosuch/interpreter\n")
            path.chmod(0o755 if kind == "no program" else 0o644)
        with pytest.raises(nerdctld.Unavailable) as caught:
            nerdctld.Nerdctl([str(path)]).run("ps")
        assert "--nerdctl" in str(caught.value) and str(path) in str(caught.value)

    def test_end_all(self, engine, scripted):
        scripted.on("logs", stays=600)
        processes = [engine.nerdctl.start("logs") for _ in range(3)]
        began = time.monotonic()
        engine.nerdctl.end_all()
        assert time.monotonic() - began < 2
        for each in processes:
            assert each.wait(2) is not None
            each.close()

    def test_last_64_kib_of_stderr(self, engine, scripted):
        scripted.on("ps", stderr="x" * 200000 + "\n" + fatal("no such container: a"), status=1)
        with pytest.raises(nerdctld.NotFound):
            engine.nerdctl.run("ps")

    def test_workspace(self, engine):
        with engine.workspace.docker_config({"a": {"auth": "x"}}) as environment:
            folder = environment["DOCKER_CONFIG"]
            assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
            assert stat.S_IMODE(os.stat(folder + "/config.json").st_mode) == 0o600
        assert not os.path.exists(folder)

    def test_sweep_removes_what_a_killed_daemon_left(self, tmp_path, monkeypatch):
        monkeypatch.setattr(nerdctld.tempfile, "tempdir", str(tmp_path))
        (tmp_path / "nerdctld-999999999-abc").mkdir()
        (tmp_path / f"nerdctld-{os.getpid()}-abc").mkdir()
        (tmp_path / "nerdctld-mine").mkdir()
        nerdctld.Workspace().sweep()
        assert sorted(os.listdir(tmp_path)) == sorted([f"nerdctld-{os.getpid()}-abc", "nerdctld-mine"])

    def test_folders_that_may_not_be_written_are_removed_too(self, tmp_path):
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "c").write_text("x")
        os.chmod(tmp_path / "a" / "b", 0o500)
        nerdctld.remove_tree(str(tmp_path / "a"))
        assert not os.path.exists(tmp_path / "a")


###############################################################################
# Conversions
###############################################################################


class TestConversions:
    @pytest.mark.parametrize("text, value", [
        ("2023-11-14T22:13:20Z", 1700000000 * 10**9), ("2026-11-24 03:57:08 +0000 UTC", 1795492628 * 10**9),
        ("2023-11-14T23:13:20.5+01:00", 1700000000 * 10**9 + 5 * 10**8), ("2023-11-14T22:13:20.123456789Z", 1700000000123456789),
        ("0001-01-01T00:00:00Z", -62135596800 * 10**9), ("2023-13-01T00:00:00Z", None), ("x", None), ("", None), ("2023-11-14T25:00:00Z", None)])
    def test_nanoseconds(self, text, value):
        assert nerdctld.nanoseconds_of(text) == value

    @pytest.mark.parametrize("value", [0, 1700000000123456789, 1700000000500000000])
    def test_times_there_and_back(self, value):
        assert nerdctld.nanoseconds_of(nerdctld.rfc3339(value)) == value

    def test_zero_time(self):
        assert nerdctld.rfc3339(None) == "0001-01-01T00:00:00Z"

    @pytest.mark.parametrize("text, size", [("2.019MB", 2019000), ("1.9 MiB", 1992294), ("20.0 KiB", 20480), ("0.0 B", 0), ("808B", 808), ("0B", 0),
                                            ("2.0 Mi", 2097152), ("8.192kB", 8192), ("", 0), ("x", 0), ("1.2.3MB", 0), ("512", 512)])
    def test_sizes(self, text, size):
        assert nerdctld.size_bytes(text) == size

    @pytest.mark.parametrize("seconds, words", [
        (0.4, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (60, "About a minute"), (3599, "59 minutes"), (3600, "About an hour"),
        (7200, "2 hours"), (47 * 3600, "47 hours"), (48 * 3600, "2 days"), (14 * 86400, "2 weeks"), (60 * 86400, "2 months"), (730 * 86400, "2 years")])
    def test_durations(self, seconds, words):
        assert nerdctld.human_duration(seconds) == words

    def test_labels(self):
        labels = {"a": "b=c,d", "e": ""}
        for wanted, value in ((["a"], True), (["a=b=c,d"], True), (["a=b"], False), (["a", "x"], False), (["e="], True), ([], True)):
            assert nerdctld.match_labels(labels, wanted) is value

    def test_names_are_regular_expressions(self):
        assert nerdctld.match_any("web-1", ["^web"]) and nerdctld.match_any("a[b", ["a["]) and not nerdctld.match_any("web", ["^b"])

    @pytest.mark.parametrize("value, kind", [(1, str), ("x", int), (True, int), ([], dict), ({}, list), (1, bool)])
    def test_types(self, value, kind):
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.typed(value, kind, "x")

    def test_half_a_surrogate_pair(self):
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.parse_json(b'{"a":"\\ud800"}')
        assert nerdctld.parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"


###############################################################################
# Events
###############################################################################


def event_line(topic, namespace="default", **payload):
    """A line of `nerdctl events`, of the form of those in EVENTS."""
    return json.dumps({"Timestamp": "2026-11-24T03:57:09.763976006Z", "ID": "", "Namespace": namespace, "Topic": topic, "Status": "unknown",
                       "Event": json.dumps(payload)}) + "\n\n"


class TestEvents:
    def test_recorded_lines(self):
        events = [each for each in (nerdctld.parse_event(line, "tstrec") for line in EVENTS.stdout.splitlines()) if each]
        assert [each.topic for each in events if each.container == ID][:4] == ["/containers/create", "/tasks/create", "/tasks/start", "/containers/update"]
        assert all(each.time > 1795492600 * 10**9 for each in events)

    def test_other_namespaces_are_not_ours(self):
        assert [nerdctld.parse_event(line, "default") for line in EVENTS.stdout.splitlines() if line] == [None] * EVENTS.stdout.count("\n\n")

    @pytest.mark.parametrize("line", ["", "garbage", "[]", "1", '{"Namespace":"default"}', '{"Namespace":"default","Topic":"/x","Event":"{"}'])
    def test_garbage(self, line):
        assert nerdctld.parse_event(line, "default") is None

    @pytest.mark.parametrize("recording", [V21_EVENTS, V17_EVENTS], ids=["2.1.6", "1.7.7"])
    def test_the_end_of_an_exec_is_not_the_end_of_its_container(self, engine, recording):
        told = []
        with engine.journal.subscribe() as (_, new):
            for line in recording.stdout.splitlines():
                event = nerdctld.parse_event(line, "tstold")
                if event:
                    engine.on_event(event)
            while not new.empty():
                told.append(new.get())
        assert [(each["Action"], each["Actor"]["Attributes"]["exitCode"]) for each in told] == [("die", "137")]

    def test_translation(self, engine, scripted):
        scripted.on("ps", PS)
        with engine.journal.subscribe() as (_, new):
            for line in EVENTS.stdout.splitlines():
                event = nerdctld.parse_event(line, "tstrec")
                if event and event.container in (ID, ""):
                    engine.on_event(event)
            told = []
            while not new.empty():
                told.append(new.get())
        actions = [(each["Type"], each["Action"]) for each in told]
        assert ("container", "create") in actions and ("container", "start") in actions and actions[-1] == ("container", "destroy")
        assert ("image", "tag") in actions or ("image", "untag") in actions
        die = next(each for each in told if each["Action"] == "die")
        assert die["Actor"] == {"ID": ID, "Attributes": {"a": "b,c", "base": "busybox", "image": "localhost:5000/bb:1", "name": "tstweb",
                                                         "exitCode": "137", "execDuration": "5"}}
        assert die["time"] == die["timeNano"] // 10**9

    def test_journal_keeps_256(self):
        journal = nerdctld.Journal()
        for number in range(300):
            journal.emit("image", "tag", str(number), {})
        with journal.subscribe() as (kept, _):
            assert [each["Actor"]["ID"] for each in kept] == [str(number) for number in range(44, 300)]
        assert journal.queues == []

    def test_feed_stops_when_nobody_needs_it(self, engine, scripted):
        engine.feed.LINGER = 0.0
        with engine.feed.needed():
            assert until(lambda: engine.feed.process)
        assert until(lambda: engine.feed.thread is None)
        assert not engine.nerdctl.processes

    def test_feed_starts_again_after_a_break(self, engine, scripted):
        engine.feed.SETTLE = 0.0
        told = []
        engine.feed.listeners.append(told.append)
        scripted.on("events", stdout=event_line("/images/create", name="a"), status=1, stderr=fatal("unexpected EOF"))
        with engine.feed.needed():
            assert until(lambda: sum(each is not None for each in told) >= 2)
        assert told.count(None) >= 3

    def test_listener_that_raises_does_not_end_the_feed(self, engine, capsys):
        told = []
        engine.feed.listeners[:0] = [lambda event: 1 / 0]
        engine.feed.listeners.append(told.append)
        engine.feed._tell(None)
        assert told == [None] and "ZeroDivisionError" in capsys.readouterr().err

    def emit(self, engine):
        for number in range(3):
            engine.journal.emit("container", "start", f"c{number}", {"name": f"n{number}", "image": "localhost:5000/bb:1", "x": "y"},
                                (1700000000 + number) * 10**9)
        engine.journal.emit("container", "exec_create: sh", "c0", {"name": "n0"}, 1700000005 * 10**9)
        engine.journal.emit("image", "tag", "sha256:1", {"name": "localhost:5000/bb:2"}, 1700000006 * 10**9)

    def events(self, engine, query, version=""):
        return ask(engine, "GET", f"{version}/events?since=1&until=1700000100{query}").lines

    @pytest.mark.parametrize("filters, count", [
        ({}, 5), ({"type": ["container"]}, 4), ({"type": ["image", "container"]}, 5), ({"event": ["start"]}, 3), ({"event": ["exec_create"]}, 1),
        ({"container": ["n1"]}, 1), ({"container": ["c0", "c1"]}, 3), ({"image": ["localhost:5000/bb"]}, 4), ({"image": ["localhost:5000/bb:1"]}, 3),
        ({"image": ["localhost"]}, 0), ({"label": ["x=y"]}, 3), ({"label": ["x"], "container": ["n2"]}, 1), ({"scope": ["swarm"]}, 0),
        ({"network": ["a"]}, 0), ({"scope": ["local"]}, 5)])
    def test_filters(self, engine, filters, count):
        self.emit(engine)
        assert len(self.events(engine, "&filters=" + urllib.parse.quote(json.dumps(filters)))) == count

    def test_since_and_until(self, engine):
        self.emit(engine)
        assert len(ask(engine, "GET", "/events?since=1700000001&until=1700000002").lines) == 2
        assert ask(engine, "GET", "/events?until=1700000002").lines == []
        assert ask(engine, "GET", "/events?since=2&until=1").status == 400

    def test_shapes(self, engine):
        self.emit(engine)
        old, new = self.events(engine, "", "/v1.51")[0], self.events(engine, "", "/v1.52")[0]
        assert (old["status"], old["id"], old["from"]) == ("start", "c0", "localhost:5000/bb:1")
        assert sorted(new) == ["Action", "Actor", "Type", "scope", "time", "timeNano"]

    def test_media_types(self, engine):
        for version, accept, media_type in (("/v1.51", "", "application/json"), ("", "", "application/jsonl"),
                                            ("", "application/x-ndjson", "application/x-ndjson"), ("", "application/json-seq", "application/json-seq")):
            response = nerdctld.system_events(engine, nerdctld.Request(
                "GET", "/events", nerdctld.split_version(version + "/events")[0], {"until": ["1"]}, {"Accept": accept}))
            assert response.media_type == media_type
            response.body.close()

    def test_sequence(self, engine):
        self.emit(engine)
        body = ask(engine, "GET", "/events?since=1&until=1700000100", headers={"Accept": "application/json-seq"}).body
        assert body.count(b"\x1e{") == 5

    def test_live_stream(self, daemon, scripted):
        scripted.on("tag")
        scripted.on("images", IMAGES)
        scripted.on("image inspect", IMAGE_INSPECT)
        sock = daemon.connect()
        sock.sendall(b"GET /v1.44/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in sock.recv(65536)
        daemon.ask("POST", "/images/localhost:5000/bb:1/tag?repo=x&tag=y")
        event = json.loads(sock.recv(65536).split(b"\r\n")[1])
        assert (event["Type"], event["Action"], event["Actor"]["Attributes"]["name"]) == ("image", "tag", "x:y")
        sock.close()


###############################################################################
# Snapshot
###############################################################################


def furnish(scripted):
    """Everything that was recorded, for all reads."""
    scripted.on("version", VERSION_TOLD)
    scripted.on("info", INFO)
    scripted.on("images", IMAGES)
    scripted.on("image inspect", IMAGE_INSPECT)
    scripted.on("history", HISTORY)
    scripted.on("ps", PS)
    scripted.on("ps -a --no-trunc --size", PS_SIZE)
    for recording in (INSPECT_WEB, INSPECT_DONE, INSPECT_NEW, INSPECT_PAUSED):
        identity = json.loads(recording.stdout)["ID"]
        scripted.on(["container", "inspect", "--mode=native", "--format", nerdctld.INSPECT_FORMAT, "--", identity], recording)
    scripted.on("network ls", NETWORK_LS)
    scripted.on("network inspect", NETWORK_INSPECT)
    scripted.on("volume ls", VOLUME_LS)
    scripted.on("volume ls --size", VOLUME_LS_SIZE)
    scripted.on("volume inspect", VOLUME_INSPECT)
    return scripted


@pytest.fixture
def furnished(scripted, engine):
    """An engine over everything that was recorded."""
    furnish(scripted)
    return engine


BB = "sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892"
BB_CONFIG = "sha256:4e848621cfa6a3a51a22d2d9a7f5a1ecb7f5a0b203f3a0eb45efdb3c050758bf"


class TestSnapshot:
    def settle(self, engine):
        engine.feed.SETTLE = 0.0
        assert engine.feed.wait_live()
        # The feed drops everything once more when it has settled.
        time.sleep(0.3)

    def test_reads_are_answered_from_it(self, furnished, scripted):
        self.settle(furnished)
        for _ in range(5):
            assert ask(furnished, "GET", "/containers/json?all=1").status == 200
            assert ask(furnished, "GET", "/images/json").status == 200
        assert len(scripted.calls("ps")) == len(scripted.calls("images")) == 1

    def test_nothing_is_kept_while_the_feed_is_not_live(self, furnished, scripted):
        furnished.feed.SETTLE = 600
        for _ in range(3):
            ask(furnished, "GET", "/containers/json?all=1")
        assert len(scripted.calls("ps")) == 3

    def test_own_writes_are_read(self, furnished, scripted):
        self.settle(furnished)
        ask(furnished, "GET", "/images/json")
        scripted.on("tag")
        scripted.on("images", stdout=IMAGES.stdout + IMAGES.stdout.splitlines()[0].replace("docker.io/library/tst:a", "docker.io/library/new:b"))
        assert ask(furnished, "POST", "/images/localhost:5000/bb:1/tag?repo=new&tag=b").status == 201
        assert "new:b" in ask(furnished, "GET", "/images/json").json[0]["RepoTags"]

    def test_event_drops(self, furnished, scripted):
        self.settle(furnished)
        ask(furnished, "GET", "/containers/json?all=1")
        ask(furnished, "GET", "/images/json")
        furnished.feed._tell(nerdctld.parse_event(event_line("/tasks/exec-started", container_id=ID, exec_id="e"), "default"))
        furnished.feed._tell(nerdctld.parse_event(event_line("/tasks/exit", container_id=ID, id="e"), "default"))
        ask(furnished, "GET", "/containers/json?all=1")
        assert len(scripted.calls("ps")) == 1
        furnished.feed._tell(nerdctld.parse_event(event_line("/tasks/exit", container_id=ID, id=ID), "default"))
        furnished.feed._tell(nerdctld.parse_event(event_line("/images/delete", name="x"), "default"))
        ask(furnished, "GET", "/containers/json?all=1")
        ask(furnished, "GET", "/images/json")
        assert scripted.argv("ps")[:5] == ["ps", "-a", "--no-trunc", "--filter", "id=" + ID]
        assert (len(scripted.calls("ps")), len(scripted.calls("images"))) == (2, 2)

    def test_break_of_the_feed_drops_everything(self, furnished, scripted):
        self.settle(furnished)
        ask(furnished, "GET", "/containers/json?all=1")
        furnished.feed.process.kill()
        assert until(lambda: not furnished.feed.live)
        ask(furnished, "GET", "/containers/json?all=1")
        assert len(scripted.calls("ps")) == 2

    def test_a_failed_read_is_not_kept(self, furnished, scripted):
        self.settle(furnished)
        scripted.on("ps", stderr=fatal("unexpected EOF"), status=1)
        assert ask(furnished, "GET", "/containers/json").status == 500
        scripted.on("ps", PS)
        assert ask(furnished, "GET", "/containers/json").status == 200

    def test_a_drop_during_a_read_wins(self):
        cached = nerdctld.Cached(lambda: cached.drop() or 1, lambda: True)
        assert cached.get() == 1 and not cached.fresh()

    def test_those_who_wait_share_one_read(self):
        reads, gate = [], threading.Event()
        cached = nerdctld.Cached(lambda: reads.append(gate.wait(5)) or 1, lambda: True)
        threads = [threading.Thread(target=cached.get) for _ in range(8)]
        for each in threads:
            each.start()
        time.sleep(0.1)
        gate.set()
        for each in threads:
            each.join(5)
        assert len(reads) == 1

    @pytest.mark.parametrize("name", [ID, ID[:12], "d", "tstweb", "/tstweb"])
    def test_container_by(self, furnished, name):
        assert furnished.snapshot.container(name).id == ID

    @pytest.mark.parametrize("name, kind, words", [("nosuch", nerdctld.NotFound, "No such container: nosuch"), ("/", nerdctld.BadParameter, "empty"),
                                                   ("-x", nerdctld.NotFound, "No such container: -x"), ("tstwe", nerdctld.NotFound, "tstwe")])
    def test_no_container_by(self, furnished, name, kind, words):
        with pytest.raises(kind, match=words):
            furnished.snapshot.container(name)

    def test_a_name_comes_before_the_beginning_of_an_id(self, furnished, scripted):
        scripted.on("ps", stdout=PS.stdout.replace("tstdone", "da8682"))
        assert furnished.snapshot.container("da8682").real.startswith("c92a69")

    def test_ambiguous_container(self, furnished, scripted):
        scripted.on("ps", stdout=PS.stdout.replace("c92a69", "da8683"))
        with pytest.raises(nerdctld.BadParameter, match="multiple IDs found with provided prefix: da868"):
            furnished.snapshot.container("da868")

    @pytest.mark.parametrize("name", ["localhost:5000/bb:1", "tst:a", "library/tst:a", "docker.io/library/tst:a", BB, BB[7:], BB[7:19], BB[:15],
                                      "tst@" + BB, "localhost:5000/bb@" + BB, BB_CONFIG, BB_CONFIG[7:19]])
    def test_image_by(self, furnished, name):
        assert furnished.snapshot.image(name).id == BB

    @pytest.mark.parametrize("name", ["tst", "bb:1", "4cfb279d3e25", "other@" + BB, "TST:a", "-f", "a b"])
    def test_no_image_by(self, furnished, name):
        with pytest.raises(nerdctld.NotFound, match="No such image"):
            furnished.snapshot.image(name)

    def test_ambiguous_image(self, furnished, scripted):
        scripted.on("images", stdout=IMAGES.stdout.replace("630252620c", "4cfb279d3f"))
        with pytest.raises(nerdctld.BadParameter, match="ambiguous"):
            furnished.snapshot.image("4cfb279d3")

    @pytest.mark.parametrize("text, name", [
        ("busybox", "docker.io/library/busybox:latest"), ("a/b", "docker.io/a/b:latest"), ("localhost/a", "localhost/a:latest"),
        ("x.io:5000/a/b:1", "x.io:5000/a/b:1"), ("index.docker.io/x", "docker.io/library/x:latest"), ("a@" + BB, "docker.io/library/a@" + BB),
        ("a:1@" + BB, "docker.io/library/a:1@" + BB), ("[::1]:5000/a", "[::1]:5000/a:latest")])
    def test_references(self, text, name):
        assert nerdctld.parse_reference(text).name == name

    @pytest.mark.parametrize("text", ["", "-x", "--all", "A", "a:", "a:b c", "a@sha256:1", "a//b", "/a", "a/", "a:" + "x" * 129, "http://a/b", "a" * 300,
                                      "a\nb", "a:1:2", "é"])
    def test_no_references(self, text):
        with pytest.raises(nerdctld.BadParameter, match="invalid reference format"):
            nerdctld.parse_reference(text)

    def test_containers_of_1_7(self, engine, scripted):
        rows = json.loads(V17_LABELS.stdout)
        listing = ["ps", "-a", "--no-trunc", "--format"]
        scripted.on([*listing, "{{json .}}"], stdout=json.dumps({"ID": rows[0], "Names": "tstold", "Image": BASE, "Status": "Up"}) + "\n")
        scripted.on([*listing, nerdctld.CONTAINER_ROW], V17_PS)
        scripted.on("container inspect", V17_LABELS)
        assert engine.snapshot.container("tstold").visible_labels == {"a": "b,c"}
        assert engine.snapshot.containers.unlabelled
        calls = len(scripted.calls("ps"))
        engine.snapshot.container("tstold")
        assert len(scripted.calls("ps")) == calls + 1
        assert nerdctld.parse_mounts(rows[1])[0]["Source"] == "/tmp"

    def test_containers_of_2_1(self, engine, scripted):
        scripted.on("ps", V21_PS)
        container = engine.snapshot.container("tstold")
        assert container.visible_labels == {"a": "b,c", "base": "busybox"}
        assert nerdctld.parse_mounts(container.labels)[0]["Destination"] == "/host"

    @pytest.mark.parametrize("recording, size", [(V21_IMAGES, 2019000), (V17_IMAGES, 1992294)], ids=["2.1.6", "1.7.7"])
    def test_images_of_older_ones(self, recording, size):
        images = nerdctld.parse_images(nerdctld.parse_rows(recording.stdout.encode()))
        assert [(each.name, each.id, each.size) for each in images] == [(BASE, BB, size)]


if __name__ == "__main__":
    sys.exit(bench(sys.argv[1:]) if "--bench" in sys.argv else pytest.main(["-q", __file__, *sys.argv[1:]]))
