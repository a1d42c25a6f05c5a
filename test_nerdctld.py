# SPDX-License-Identifier: Apache-2.0
"""Tests of nerdctld.py, in the order of its sections.

Hermetic tests run anywhere: a scripted nerdctl replays what the real one printed (each Recording says which version and
command it is of), and a fake containerd answers from what was recorded of its objects. Live tests, in the classes called TestLive…, run where nerdctl and containerd answer; otherwise they skip
with one line. `python3 test_nerdctld.py --bench` prints ratios instead; `--fuzz N` throws malformed requests at a daemon, `--kills N`
kills one under load, `--both N` changes a namespace from both sides, `--load SECONDS` has it serve many clients at once, `--cycles N` runs and removes containers.
"""

import argparse
import ast
import atexit
import lzma
import gzip
import fcntl
import functools
import gc
import bz2
import collections
import struct
import select
import random
import base64
import bisect
import contextlib
import errno
import hashlib
import http.client
import http.server
import io
import itertools
import json
import marshal
import os
import pathlib
import py_compile
import queue
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import urllib.parse
import zlib

import pytest

import nerdctld

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = (HERE / "nerdctld.py").read_text()
SHARED = HERE.parent / "shared"
BASE = "localhost:5000/bb:1"
STACK = pathlib.Path(os.environ.get("NERDCTLD_STACK_RUN") or "/run/nerdctld-stack")
# By which nerdctl, ctr and buildctl find the stack.
with contextlib.suppress(OSError):
    for name, value in re.findall(r"^(\w+)=(.*)$", (STACK / "env").read_text(), re.M):
        os.environ[name] = value.replace("$PATH", os.environ.get("PATH", ""))


def tar_of(*entries, mode="w"):
    """A tar of (name, content or TarInfo fields)."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for key, value in content.items():
                    setattr(info, key, value)
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def image_archive(*names, layer=b"layer", files=("oci-layout", "index.json", "manifest.json"), nameless=()):
    """A tar as `nerdctl save` writes it: the blobs first, in the order of their names, and 1024 zeros as its end."""
    manifests = [{"digest": "sha256:" + "4" * 64, "annotations": {"io.containerd.image.name": name}} for name in names]
    manifests += [{"digest": digest} for digest in nameless]
    contents = {"blobs/sha256/" + "1" * 64: layer, "index.json": {"manifests": manifests},
                "manifest.json": [{"RepoTags": list(names)}], "oci-layout": {"imageLayoutVersion": "1.0.0"}}
    parts = []
    for name, content in contents.items():
        if name in files or name.startswith("blobs"):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            parts += [info.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % 512)]
    return b"".join(parts) + bytes(1024)


ARCHIVE = image_archive("docker.io/library/tst:a")


###############################################################################
# A scripted nerdctl
###############################################################################


class Recording:
    """What a real program printed: `of` is its version and command line."""

    def __init__(self, of, stdout="", stderr="", status=0):
        self.of, self.stdout, self.stderr, self.status = of, stdout, stderr, status


# Most calls are answered by the shell, which starts ten times faster; Python takes those that bring input or credentials.
SHELL = '''#!/bin/sh
for word; do
  shift
  case "$word" in --namespace=*|--address=*|--snapshotter=*) ;; *) set -- "$@" "$word" ;; esac
done
python() {{ exec {python} -ISE "{folder}/answer.py" "$@"; }}
note() {{ printf '%s\\0' "$#" "$@" >>"{folder}/calls"; }}
[ ! -e "$DOCKER_CONFIG/config.json" ] || python "$@"
. "{folder}/rules.sh"
note "$@"
printf 'time="2026-11-24T00:00:00Z" level=fatal msg="not in the script: %s"\\n' "$*" >&2
exit 1
'''
# No json, and rules by marshal: importing json takes as long as the rest.
SCRIPT = '''import marshal, os, sys, time
folder, words = os.path.dirname(os.path.abspath(__file__)), sys.argv[1:]
with open(os.path.join(folder, "rules"), "rb") as file:
    rules = marshal.load(file)
rule = next((each for each in rules if words[:len(each["match"])] == each["match"]), None)
call = {"argv": words, "stdin": 0, "auth": None}
config = os.path.join(os.environ.get("DOCKER_CONFIG", "/nosuch"), "config.json")
if os.path.exists(config):
    with open(config) as file:
        call["auth"] = file.read()
    call["mode"] = os.stat(config).st_mode & 0o777
if rule and rule["reads"]:
    data = sys.stdin.buffer.read()
    call["stdin"], call["text"] = len(data), data[:200].decode(errors="replace")
with open(os.path.join(folder, "calls"), "a") as file:
    file.write("python" + chr(0) + ascii(call) + chr(0))
if rule is None:
    sys.stderr.write('time="2026-11-24T00:00:00Z" level=fatal msg="not in the script: ' + " ".join(words) + '"' + chr(10))
    sys.exit(1)
sys.stdout.write(rule["stdout"])
sys.stdout.flush()
sys.stderr.write(rule["stderr"])
sys.stderr.flush()
if rule["stays"]:
    time.sleep(rule["stays"])
sys.exit(rule["status"])
'''


@functools.lru_cache(maxsize=None)
def shell_rule(match, stdout, stderr, status, stays, reads):
    """A rule as the shell carries it out."""
    words = " && ".join(f'[ "${{{number}}}" = {shlex.quote(word)} ]' for number, word in enumerate(match, 1))
    if reads or stays or "\0" in stdout:
        return f'if {words}; then python "$@"; fi\n'
    told = "".join(f"printf %s {shlex.quote(text)}{where}; " for text, where in ((stdout, ""), (stderr, " >&2")) if text)
    return f'if {words}; then note "$@"; {told}exit {status}; fi\n'


class Scripted:
    """A nerdctl that answers from recordings and notes its calls."""

    def __init__(self, folder):
        self.folder = folder
        self.program = folder / "nerdctl"
        (folder / "answer.py").write_text(SCRIPT)
        self.program.write_text(SHELL.format(folder=folder, python=sys.executable))
        self.program.chmod(0o755)
        self.rules, self.effects, self.held = [], [], False
        self.write()

    def on(self, command, recording=None, stdout="", stderr="", status=0, stays=0, reads=False, does=None):
        """From now on `command` (the first words, or a list of them) answers so, after it has done what `does` does with its words;
        later rules win."""
        if recording is not None:
            stdout, stderr, status = recording.stdout, recording.stderr, recording.status
        words = command.split() if isinstance(command, str) else command
        self.rules.insert(0, {"match": words, "stdout": stdout, "stderr": stderr, "status": status, "stays": stays, "reads": reads})
        self.effects.insert(0, does)
        if not self.held:
            self.write()

    @contextlib.contextmanager
    def together(self):
        """What is said meanwhile holds from the end on."""
        self.held = True
        yield
        self.held = False
        self.write()

    def write(self):
        """Make `rules` what it answers."""
        for name, data in (("rules", marshal.dumps(self.rules)), ("rules.sh", "".join(shell_rule(tuple(each["match"]), *list(each.values())[1:]) for each in self.rules).encode())):
            temporary = self.folder / "rules.new"
            temporary.write_bytes(data)
            temporary.rename(self.folder / name)

    def rule(self, words):
        """The rule that these words answer to, None for none."""
        return next((each for each in self.rules if list(words[:len(each["match"])]) == each["match"]), None)

    def do(self, words):
        """What such a call does besides."""
        for rule, effect in zip(self.rules, self.effects):
            if list(words[:len(rule["match"])]) == rule["match"]:
                return effect(words) if effect else None

    def note(self, words, data, environment):
        """Note a call that no process was started for, as the script would."""
        call = {"argv": words, "stdin": len(data), "auth": None, "text": data[:200].decode(errors="replace")}
        config = os.path.join(environment.get("DOCKER_CONFIG", "/nosuch"), "config.json")
        if os.path.exists(config):
            call["auth"], call["mode"] = pathlib.Path(config).read_text(), os.stat(config).st_mode & 0o777
        with open(self.folder / "calls", "a") as file:
            file.write("python\0" + ascii(call) + "\0")

    def calls(self, command=""):
        """The calls so far that begin with these words."""
        wanted = command.split()
        try:
            told = iter((self.folder / "calls").read_bytes().decode(errors="surrogateescape").split("\0")[:-1])
        except FileNotFoundError:
            return []
        calls = []
        for count in told:
            if count == "python":
                calls.append(ast.literal_eval(next(told)))
            else:
                calls.append({"argv": list(itertools.islice(told, int(count))), "stdin": 0, "auth": None})
        for each in calls:
            each["auth"] = json.loads(each["auth"]) if each["auth"] else None
        return [each for each in calls if each["argv"][:len(wanted)] == wanted]

    def argv(self, command=""):
        """The words of the last such call."""
        return self.calls(command)[-1]["argv"]


###############################################################################
# A fake containerd
###############################################################################


class HangUp(Exception):
    """Raised by a hook: the connection is to be closed without an answer."""


class FakeConnection:
    """The server's end of an HTTP/2 connection, as far as one gRPC call after the other needs it."""

    def __init__(self, sock):
        self.sock, self.file = sock, sock.makefile("rb")
        # Bytes that may be sent: on stream 0, the connection, and on the others.
        self.windows, self.initial = collections.Counter({0: 65535}), 65535
        self.changed = threading.Condition()
        self.reader = threading.current_thread()
        if self.file.read(24) != nerdctld.PREFACE:
            raise HangUp
        self.sock.sendall(self.frame(4, 0, 0))

    @staticmethod
    def frame(kind, flags, stream, payload=b""):
        """The bytes of a frame."""
        return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload

    def read(self):
        """The next frame: kind, flags, stream, payload; EOFError at the end."""
        head = self.file.read(9)
        if len(head) < 9:
            raise EOFError
        length, flags, stream = struct.unpack(">IBI", head)
        kind, payload = length & 255, self.file.read(length >> 8)
        with self.changed:
            if kind == 8:
                self.windows[stream] += struct.unpack(">I", payload)[0]
            elif kind == 4 and not flags & 1:
                for key, value in struct.iter_unpack(">HI", payload):
                    self.initial = value if key == 4 else self.initial
            self.changed.notify_all()
        if kind == 4 and not flags & 1:
            self.sock.sendall(self.frame(4, 1, 0))
        elif kind == 6 and not flags & 1:
            self.sock.sendall(self.frame(6, 1, 0, payload))
        return kind, flags, stream, payload

    def call(self):
        """The next call: its stream, `Service/Method`, namespace and message."""
        head, body = b"", b""
        while True:
            kind, flags, stream, payload = self.read()
            if kind in (1, 9):
                head += payload
            elif kind == 0:
                body += payload
            if kind in (0, 1) and flags & 1:
                break
        # The client writes its headers without Huffman's code, so that they can be read as they are.
        method = re.search(rb"/containerd\.services\.\w+\.v1\.(\w+/\w+)", head).group(1).decode()
        at = head.index(b"containerd-namespace") + 20
        with self.changed:
            self.windows[stream] += self.initial
        return stream, method, head[at + 1:at + 1 + head[at]].decode(), body[5:]

    def begin(self, stream):
        """Send the headers of an answer."""
        self.sock.sendall(self.frame(1, 4, stream, b"\x88\x00\x0ccontent-type\x10application/grpc"))

    def send(self, stream, message):
        """Send one message of an answer, as fast as the client makes room."""
        data = struct.pack(">BI", 0, len(message)) + message
        while data:
            with self.changed:
                room = min(self.windows[0], self.windows[stream], 16384)
                if room <= 0 and threading.current_thread() is not self.reader:
                    assert self.changed.wait(10), "the client makes no room"
                part, data = (data[:room], data[room:]) if room > 0 else (b"", data)
                self.windows[0] -= len(part)
                self.windows[stream] -= len(part)
            if part:
                self.sock.sendall(self.frame(0, 0, stream, part))
            elif threading.current_thread() is self.reader:
                self.read()

    def end(self, stream, code=0, message=""):
        """Send the trailers, as containerd words them: the name of the status in Huffman's code."""
        text = urllib.parse.quote(message, safe=" :/\"'").encode()[:16384]
        trailers = b"\x40\x88\x9a\xca\xc8\xb2\x12\x34\xda\x8f" + bytes([len(str(code))]) + str(code).encode()
        # A length of HPACK has seven bits in its first byte.
        size = bytes([len(text)]) if len(text) < 127 else b"\x7f" + nerdctld.encode_varint(len(text) - 127)
        trailers += b"\x00\x0cgrpc-message" + size + text if code else b""
        self.sock.sendall(self.frame(1, 5, stream, trailers))


def message(*fields):
    """A protobuf message of (number, value): a number, text, bytes or a map of texts; what is empty is left out."""
    found = b""
    for number, value in fields:
        if isinstance(value, dict):
            found += b"".join(nerdctld.encode_field(number, message((1, key), (2, text))) for key, text in value.items())
        elif isinstance(value, int):
            found += nerdctld.encode_varint(number << 3) + nerdctld.encode_varint(value) if value else b""
        elif value:
            found += nerdctld.encode_field(number, value.encode() if isinstance(value, str) else value)
    return found


def timestamp(nanoseconds):
    """A protobuf timestamp, b"" for none."""
    return message((1, nanoseconds // 10**9), (2, nanoseconds % 10**9)) if nanoseconds else b""


class FakeLog(io.RawIOBase):
    """What a logging program does with one stream of a process: nerdctl's json-file."""

    def __init__(self, path, stream):
        super().__init__()
        self.path, self.stream, self.rest = path, stream, b""

    def write(self, data):
        """Log the lines that are whole by now; nothing where there is no folder for it."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.log(*(each + b"\n" for each in lines))
        return len(data)

    def log(self, *lines):
        """Append these lines."""
        moment = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment // 10**9)) + f".{moment % 10**9:09}Z"
        with contextlib.suppress(OSError), open(self.path, "a") as file:
            file.writelines(json.dumps({"log": each.decode(errors="replace"), "stream": self.stream, "time": stamp}) + "\n" for each in lines)

    def close(self):
        """Log what has no end of line."""
        if not self.closed and self.rest:
            self.log(self.rest)
        super().close()


class FakeProcess:
    """A container's process, or with an exec's id that of an exec, as the program that stands for it sees it: `args` and `spec` of the
    OCI process, `stdin` (None for none), `stdout` and `stderr`, `terminal`, `size` (height and width as last set), `signals`, a queue."""

    # These do not end who has not asked for them.
    IGNORED = (0, signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)

    def __init__(self, fake, key, streams=nerdctld.TaskStreams(), spec=None):
        self.fake, self.key, self.streams, self.spec = fake, key, streams, spec or {}
        self.args, self.terminal, self.size, self.signals = tuple(self.spec.get("args") or ()), streams.terminal, None, queue.Queue()
        self.program = self.stdin = self.stdout = self.stderr = self.held = None
        # What is open for it: its own files, and the other ends of FIFOs. Who is told of its end.
        self.files, self.kept, self.waiters, self.ended = [], [], [], False

    def wait_signal(self):
        """The next signal that comes."""
        return self.signals.get()

    def open(self):
        """Open its streams as a shim does, which holds both ends of each FIFO: who comes and goes at the other does not matter."""
        try:
            if self.streams.stdin:
                self.stdin = os.fdopen(os.open(self.streams.stdin, os.O_RDONLY | os.O_NONBLOCK), "rb")
                os.set_blocking(self.stdin.fileno(), True)
                self.held = os.open(self.streams.stdin, os.O_WRONLY | os.O_NONBLOCK)
                self.files.append(self.stdin)
            self.stdout = self.output(self.streams.stdout, "stdout")
            self.stderr = self.stdout if self.terminal else self.output(self.streams.stderr, "stderr")
        except OSError as error:
            self.cut()
            raise nerdctld.GrpcError(2, f"failed to start io pipe copy: unable to copy pipes: containerd-shim: opening fifo failed: {error}") from None

    def output(self, path, name):
        """One of its output streams; it waits for a FIFO to be opened for reading."""
        if path.startswith("binary://"):
            record = self.fake.containers[self.key[0]]
            file = FakeLog(os.path.join(record.labels.get("nerdctl/state-dir", "/nosuch"), record.id + "-json.log"), name)
        else:
            path = path or os.devnull
            number = until(lambda: self.open_writer(path))
            if number is None:
                raise TimeoutError(f"nobody reads {path}")
            file = open(number, "wb", buffering=0)
            self.kept.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        self.files.append(file)
        return file

    @staticmethod
    def open_writer(path):
        """A descriptor to write to a FIFO with, None where nobody reads it."""
        try:
            number = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
        os.set_blocking(number, True)
        return number

    def cut(self):
        """Take its streams away, also from a program that is in the middle of using them."""
        with self.fake.lock:
            self.ended = True
            self.close_stdin()
            null = os.open(os.devnull, os.O_RDWR)
            for each in self.files:
                if isinstance(each, FakeLog):
                    each.close()
                elif not each.closed:
                    os.dup2(null, each.fileno())
            for each in (null, *self.kept):
                os.close(each)
            self.kept = []
            if not self.program:
                self.close()
        self.signals.put(signal.SIGKILL)

    def close(self):
        """Close its files, which only the program's own thread may do."""
        for each in self.files:
            each.close()

    def close_stdin(self):
        """Let it find the end of its input when all others have closed the FIFO too."""
        if self.held is not None:
            os.close(self.held)
            self.held = None

    def run(self):
        """Be the program."""
        status = 255
        try:
            status = self.program(self)
        except (OSError, ValueError):
            # A program that was ended has no streams any more.
            if not self.ended:
                raise
        finally:
            self.end(status or 0)
            self.close()

    def end(self, status):
        """It ends, if it has not ended, and with a container's all that run in it."""
        with self.fake.lock:
            if self.ended:
                return
            identity, exec_id = self.key
            for each in [each for key, each in self.fake.processes.items() if key[0] == identity and key[1] and not exec_id]:
                if self.fake.execs[each.key].status == "running":
                    each.end(137)
            self.cut()
            record = self.fake.record(self.key, status="stopped", exit_status=status, exited_at=time.time_ns())
            self.fake.tell("/tasks/exit", container_id=identity, id=exec_id or identity, pid=record.pid, exit_status=status)
            for connection, stream in self.waiters:
                with contextlib.suppress(OSError):
                    connection.begin(stream)
                    connection.send(stream, self.fake.ended(record))
                    connection.end(stream)


def labels_of(data, number):
    """The entries of a map in a message."""
    return [nerdctld.decode_map_entry(each.value) for each in nerdctld.decode_fields(data) if each.number == number]


class FakeContainerd:
    """containerd's services as far as they are called, over gRPC on a unix socket, from what its attributes hold. `before`
    and `after` (method -> function) are called when a call has come, and when its answer has been made up: they may wait, or
    raise GrpcError or HangUp. A container or an exec runs what `programs` has for its id, or for its arguments as a tuple: a function
    of its FakeProcess that returns the exit status. A container without one waits for a signal, an exec ends at once. `refuse`
    (the same keys) has what runc says of one that it cannot run."""

    def __init__(self, folder, namespace="default"):
        self.path, self.namespace = str(folder / "containerd.sock"), namespace
        # By id and by id; by name; by digest; (snapshotter, key) -> the key below and bytes.
        self.containers, self.tasks, self.images, self.content, self.snapshots = {}, {}, {}, {}, {}
        # (snapshotter, key) -> its mounts: type, source and options of each.
        self.mounts = {}
        # By digest; the leases there are; the tar of the layer that Diff makes; what Apply was given; names of images that were deleted,
        # with whether an answer was to wait for the end of it.
        self.content_labels, self.leases, self.layer, self.applied, self.deleted = {}, set(), bytes(1024), [], []
        self.version, self.uuid = ("v2.3.1", ""), "16f7ae04-a9a5-49b1-9999-0f05f4c7cfab"
        self.before, self.after = {}, {}
        # (id, "" or the exec's id) -> process; of the execs also their records.
        self.processes, self.execs, self.programs, self.refuse, self.pids = {}, {}, {}, {}, itertools.count(4243)
        # How often each method was called; what was asked of it last.
        self.calls, self.asked = collections.Counter(), {}
        self.subscribers, self.connections = [], set()
        self.lock = threading.RLock()
        self.start_serving()

    def start_serving(self):
        """Listen, and answer each connection in a thread of its own."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(64)
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def stop_serving(self):
        """End like a containerd that is stopped: nobody listens, and connections break."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self.lock:
            for sock in list(self.connections):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        assert until(lambda: not self.connections)

    def close(self):
        """End, and all that runs."""
        self.stop_serving()
        for each in list(self.processes.values()):
            each.cut()

    def accept(self, listener):
        """Take connections until the listener is closed."""
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with self.lock:
                    self.connections.add(sock)
                threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        """Answer the calls of a connection."""
        try:
            with sock, contextlib.suppress(EOFError, OSError, HangUp):
                connection = FakeConnection(sock)
                with connection.file:
                    while True:
                        self.answer(connection, *connection.call())
        finally:
            with self.lock:
                self.connections.discard(sock)
                self.subscribers = [each for each in self.subscribers if each[0].sock is not sock]

    def answer(self, connection, stream, method, namespace, body):
        """Answer one call."""
        asked = nerdctld.read_message(body)
        asked[0] = body
        with self.lock:
            self.calls[method] += 1
            self.asked[method] = asked
        try:
            self.before.get(method, lambda: None)()
            # Create and Start wait for a client to open the FIFOs.
            with contextlib.nullcontext() if method in ("Tasks/Create", "Tasks/Start") else self.lock:
                found = (self.subscribe(connection, stream) if method == "Events/Subscribe" else
                         self.wait(connection, stream, asked) if method == "Tasks/Wait" else self.found(method, namespace, asked))
            self.after.get(method, lambda: None)()
        except nerdctld.GrpcError as error:
            connection.begin(stream)
            connection.end(stream, error.code, error.message)
            return
        if found is not None:
            connection.begin(stream)
            for each in found:
                connection.send(stream, each)
            connection.end(stream)

    def subscribe(self, connection, stream):
        """From now on tell this client all events."""
        connection.begin(stream)
        self.subscribers.append((connection, stream))

    def found(self, method, namespace, asked):
        """The messages of the answer to a call."""
        ours = namespace == self.namespace
        text = {number: bytes(value).decode(errors="replace") for number, value in asked.items() if not isinstance(value, int)}
        change = getattr(self, method.replace("/", "_").lower(), None)
        if change and ours:
            found = change(asked, text)
            return found if isinstance(found, list) else [found]
        if method in ("Version/Version", "Introspection/Server"):
            return [message(*enumerate(self.version, 1)) if method == "Version/Version" else message((1, self.uuid))]
        if method == "Snapshots/Mounts":
            self.known(self.mounts, (text[1], text[2]), f"snapshot {text[2]} does not exist: not found")
            return [self.encode_mounts((text[1], text[2]))]
        if method.startswith("Snapshots/"):
            below, size = self.known(self.snapshots, (text[1], text[2]), f"snapshot {text[2]} does not exist: not found")
            return [message((1, size), (2, 1)) if method == "Snapshots/Usage" else message((1, message((1, text[2]), (2, below), (3, 3))))]
        if method == "Content/List":
            infos = [message((1, message((1, digest), (2, len(data))))) for digest, data in self.content.items() if ours]
            return [b"".join(infos[at:at + 100]) for at in range(0, len(infos), 100)]
        if method == "Content/Read":
            data = self.known(self.content, text[1], f"content {text[1]}: not found")
            return [message((1, at), (2, data[at:at + 1000])) for at in range(0, len(data), 1000)]
        if method == "Content/Delete":
            self.known(self.content, text[1], f"content {text[1]}: not found")
            del self.content[text[1]]
            return [b""]
        service, _, verb = method.partition("/")
        table, encode = {"Containers": (self.containers, self.encode_container), "Tasks": (self.tasks, self.encode_task),
                         "Images": (self.images, self.encode_image)}.get(service, ({}, None))
        if verb == "List" and encode:
            return [b"".join(message((1, encode(name))) for name in table if ours)]
        if method == "Tasks/Get" and 2 in text:
            self.process(text[1], text[2])
            return [message((1, self.encode_task(text[1], text[2])))]
        if verb == "Get" and encode:
            self.known(table if ours else {}, text[1], {"Containers": f'container "{text[1]}" in namespace "{namespace}": not found',
                                                        "Images": f'image "{text[1]}": not found'}.get(service, f"process {text[1]}: not found"))
            return [message((1, encode(text[1])))]
        if service == "Tasks" and ours and hasattr(self, "task_" + verb.lower()):
            return [getattr(self, "task_" + verb.lower())(asked, text)]
        if method == "Containers/Update":
            return [self.update(nerdctld.parse_container(asked[1]), [bytes(each.value).decode() for each in nerdctld.decode_fields(asked[2])])]
        raise nerdctld.GrpcError(12, f"unknown method {method}")

    def leases_create(self, asked, text):
        """A new lease, which has to have an end."""
        assert "containerd.io/gc.expire" in dict(labels_of(asked[0], 3))
        self.leases.add(text[1])
        return b""

    def leases_delete(self, asked, text):
        """A lease has ended."""
        self.leases.remove(text[1])
        return b""

    def snapshots_view(self, asked, text):
        """A new snapshot above another; it is mounted as that is."""
        assert self.leases, "it would be gone at once"
        key, parent = (text[1], text[2]), text.get(3, "")
        if parent:
            self.known(self.snapshots, (text[1], parent), f"snapshot {parent} does not exist: not found")
        self.snapshots[key], self.mounts[key] = (parent, 0), self.mounts.get((text[1], parent), [])
        return self.encode_mounts(key)

    snapshots_prepare = snapshots_view

    def snapshots_commit(self, asked, text):
        """A snapshot gets a name for good."""
        key, name = (text[1], text[3]), (text[1], text[2])
        self.refuses(name in self.snapshots and f"snapshot {text[2]}: already exists", 6)
        self.snapshots[name], self.mounts[name] = self.snapshots.pop(key), self.mounts.pop(key)
        return b""

    def snapshots_remove(self, asked, text):
        """A snapshot is gone."""
        self.known(self.snapshots, (text[1], text[2]), f"snapshot {text[2]} does not exist: not found")
        del self.snapshots[text[1], text[2]], self.mounts[text[1], text[2]]
        return b""

    def encode_mounts(self, key):
        """The mounts of a snapshot."""
        return b"".join(message((1, message((1, kind), (2, source), *((4, each) for each in options)))) for kind, source, options in self.mounts[key])

    def diff_diff(self, asked, text):
        """The content of a layer."""
        assert self.leases, "it would be gone at once"
        data = gzip.compress(self.layer, mtime=0)
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.content[digest] = data
        self.content_labels[digest] = {"containerd.io/uncompressed": "sha256:" + hashlib.sha256(self.layer).hexdigest()}
        return message((3, message((1, text[3]), (2, digest), (3, len(data)))))

    def diff_apply(self, asked, text):
        """A layer is unpacked."""
        self.applied.append(nerdctld.parse_descriptor(asked[1]).digest)
        return b""

    def content_write(self, asked, text):
        """New content, all of it in one message."""
        assert self.leases, "it would be gone at once"
        digest = "sha256:" + hashlib.sha256(bytes(asked[6])).hexdigest()
        assert (asked[1], asked[3], text[4]) == (2, len(asked[6]), digest)
        self.refuses(digest in self.content and f"content {digest}: already exists", 6)
        self.content[digest], self.content_labels[digest] = bytes(asked[6]), dict(labels_of(asked[0], 7))
        return [message((1, 1), (4, len(asked[6]))), message((1, 2), (4, len(asked[6])), (6, digest))]

    def content_info(self, asked, text):
        """What is known of content."""
        data = self.known(self.content, text[1], f"content {text[1]}: not found")
        return message((1, message((1, text[1]), (2, len(data)), (5, self.content_labels.get(text[1], {})))))

    def images_create(self, asked, text):
        """A new name of an image."""
        image = nerdctld.parse_image(asked[1])
        self.refuses(image.name in self.images and f'image "{image.name}": already exists', 6)
        return self.set_image("/images/create", image)

    def images_update(self, asked, text):
        """Another image for a name."""
        image = nerdctld.parse_image(asked[1])
        self.known(self.images, image.name, f'image "{image.name}": not found')
        return self.set_image("/images/update", image)

    def set_image(self, topic, image):
        """Let a name stand for an image."""
        self.images[image.name] = image._replace(updated_at=time.time_ns())
        self.tell(topic, name=image.name)
        return message((1, self.encode_image(image.name)))

    def images_delete(self, asked, text):
        """A name is taken away."""
        self.deleted.append((text[1], bool(asked.get(2))))
        self.known(self.images, text[1], f'image "{text[1]}": not found')
        self.untag(text[1])
        return b""

    @staticmethod
    def known(table, key, words):
        """The value of a key, or the error of containerd in these words."""
        if key not in table:
            raise nerdctld.GrpcError(5, words)
        return table[key]

    def update(self, given, paths):
        """Change a container's labels and spec as far as the paths of a mask say; a label without a value is none."""
        record = self.known(self.containers, given.id, f'container "{given.id}": not found')
        labels = dict(record.labels)
        for path in paths:
            kind, _, key = path.partition(".")
            if path == "spec":
                record = record._replace(spec=given.spec)
            elif kind == "labels" and key:
                labels[key] = given.labels.get(key, "")
            else:
                raise nerdctld.GrpcError(3, f'cannot update "{path}" field on container "{given.id}": invalid argument')
        self.containers[given.id] = record._replace(labels={key: value for key, value in labels.items() if value})
        self.tell("/containers/update", id=given.id, image=record.image)
        return b""

    def process(self, identity, exec_id=""):
        """The process of a task, or an exec in it; the error of containerd where there is none."""
        self.known(self.tasks, identity, f"task {identity} not found")
        if not exec_id and (identity, "") not in self.processes:
            # Of one that somebody else has started nothing is known but its record.
            self.processes[identity, ""] = FakeProcess(self, (identity, ""))
            self.processes[identity, ""].ended = self.tasks[identity].status == "stopped"
        return self.known(self.processes, (identity, exec_id), f"process does not exist {exec_id}: not found")

    def record(self, key, **changes):
        """The record of a process, after these changes."""
        table, name = (self.execs, key) if key[1] else (self.tasks, key[0])
        table[name] = table[name]._replace(**changes)
        return table[name]

    def wait(self, connection, stream, asked):
        """The answer to Wait, None while the process runs: it is sent when it ends."""
        process = self.process(*(bytes(asked.get(number, b"")).decode() for number in (1, 2)))
        if process.ended:
            return [self.ended(self.record(process.key))]
        process.waiters.append((connection, stream))
        return None

    @staticmethod
    def ended(record):
        """What Wait answers."""
        return message((1, record.exit_status), (2, timestamp(record.exited_at)))

    @staticmethod
    def refuses(words, code=2):
        """Fail with an error of the shim's, if there is one."""
        if words:
            raise nerdctld.GrpcError(code, words)

    def task_create(self, asked, text):
        """Make the process of a container."""
        identity = text[1]
        record = self.known(self.containers, identity, f'container "{identity}" in namespace "{self.namespace}": not found')
        self.refuses(identity in self.tasks and f"task {identity}: already exists", 6)
        streams = nerdctld.TaskStreams(*(text.get(number, "") for number in (4, 5, 6)), bool(asked.get(7)))
        process = FakeProcess(self, (identity, ""), streams, json.loads(record.spec or b"{}").get("process"))
        # runc fails before the shim opens FIFOs.
        self.refuses(self.refuse.get(identity) or self.refuse.get(process.args))
        process.open()
        pid = next(self.pids)
        with self.lock:
            self.tasks[identity] = nerdctld.TaskRecord(pid, "created", 0, 0, streams.stdin, streams.stdout)
            self.processes[identity, ""] = process
            self.tell("/tasks/create", container_id=identity, pid=pid)
        return message((1, identity), (2, pid))

    def task_start(self, asked, text):
        """Start a process that was made, or an exec that was added."""
        key = text[1], text.get(2, "")
        process = self.process(*key)
        status = self.record(key).status
        self.refuses(status != "created" and f"cannot start a {status} process")
        if key[1]:
            refused = self.refuse.get(process.args)
            if refused:
                process.ended = True
            self.refuses(refused)
            process.open()
            self.record(key, pid=next(self.pids))
        with self.lock:
            pid = self.record(key, status="running").pid
            if key[1]:
                self.tell("/tasks/exec-started", container_id=key[0], exec_id=key[1])
            else:
                self.tell("/tasks/start", container_id=key[0], pid=pid)
            process.program = self.programs.get(process.args, None if key[1] else self.programs.get(key[0]))
            if process.program:
                threading.Thread(target=process.run, daemon=True).start()
            elif key[1]:
                process.end(0)
        return message((1, pid))

    def task_exec(self, asked, text):
        """Add an exec to a container that runs."""
        key = text[1], text[7]
        self.process(text[1])
        status = self.tasks[text[1]].status
        self.refuses(status not in ("created", "running") and f"cannot exec in a {status} state")
        self.refuses(key in self.processes and f"id {text[7]}: already exists", 6)
        streams = nerdctld.TaskStreams(*(text.get(number, "") for number in (2, 3, 4)), bool(asked.get(5)))
        self.processes[key] = FakeProcess(self, key, streams, json.loads(bytes(nerdctld.read_message(asked[6])[2])))
        self.execs[key] = nerdctld.TaskRecord(0, "created", 0, 0, streams.stdin, streams.stdout)
        self.tell("/tasks/exec-added", container_id=text[1], exec_id=text[7])
        return b""

    def task_kill(self, asked, text):
        """Send a signal to a process."""
        process, number = self.process(text[1], text.get(2, "")), asked.get(3, 0)
        status = self.record(process.key).status
        self.refuses(status == "stopped" and "process already finished: not found", 5)
        self.refuses(status == "created" and process.key[1] and "process not created: failed precondition", 9)
        if number == signal.SIGKILL or not process.program and number not in process.IGNORED:
            process.end(128 + number)
        elif number:
            process.signals.put(number)
        return b""

    def task_pause(self, asked, text):
        """Freeze a container."""
        self.process(text[1])
        status = self.tasks[text[1]].status
        self.refuses(status != "running" and ("cannot pause task in created state" if status == "created" else f"cannot pause a {status} container"))
        self.pause(text[1])
        return b""

    def task_resume(self, asked, text):
        """Let a container go on."""
        self.process(text[1])
        status = self.tasks[text[1]].status
        self.refuses(status != "paused" and ("cannot resume a stopped container" if status == "stopped" else f"cannot resume a {status} process"))
        self.pause(text[1], False)
        return b""

    def task_resizepty(self, asked, text):
        """Set the size of a terminal."""
        self.process(text[1], text.get(2, "")).size = asked.get(4, 0), asked.get(3, 0)
        return b""

    def task_closeio(self, asked, text):
        """Close the shim's own end of a process's input."""
        self.process(text[1], text.get(2, "")).close_stdin()
        return b""

    def task_listpids(self, asked, text):
        """The processes of a container."""
        self.process(text[1])
        records = [self.tasks[text[1]], *(each for key, each in self.execs.items() if key[0] == text[1])]
        return b"".join(message((1, message((1, each.pid)))) for each in records if each.status in ("running", "paused"))

    def task_delete(self, asked, text):
        """Take a task away that does not run."""
        self.process(text[1])
        record = self.tasks[text[1]]
        self.refuses(record.status in ("running", "paused") and f"failed to delete task: cannot delete a {record.status} process")
        self.forget(text[1])
        self.tell("/tasks/delete", container_id=text[1], pid=record.pid, exit_status=record.exit_status)
        if record.status == "created":
            # Mostly so, and after the deletion: the runtime kills what waits to be started.
            self.tell("/tasks/exit", container_id=text[1], id=text[1], pid=record.pid, exit_status=137)
        return message((1, text[1]), (2, record.pid), (3, record.exit_status), (4, timestamp(record.exited_at)))

    def task_deleteprocess(self, asked, text):
        """Take an exec away that does not run."""
        key = text[1], text[2]
        self.process(*key)
        record = self.execs[key]
        self.refuses(record.status == "running" and "cannot delete a running process")
        self.processes.pop(key).cut()
        del self.execs[key]
        return message((1, text[2]), (2, record.pid), (3, record.exit_status), (4, timestamp(record.exited_at)))

    def forget(self, identity):
        """A container's task is no more, nor what runs in it."""
        self.tasks.pop(identity, None)
        for key in [key for key in self.processes if key[0] == identity]:
            self.processes.pop(key).cut()
            self.execs.pop(key, None)

    def encode_container(self, identity):
        """A containers.v1.Container."""
        each = self.containers[identity]
        return message((1, each.id), (2, each.labels), (3, each.image), (4, message((1, each.runtime))),
                       (5, message((1, "types.containerd.io/opencontainers/runtime-spec/1/Spec"), (2, each.spec))), (6, each.snapshotter),
                       (7, each.snapshot_key), (8, timestamp(each.created_at)), (9, timestamp(each.created_at)))

    def encode_task(self, identity, exec_id=""):
        """A types.task.Process."""
        each = self.record((identity, exec_id))
        number = {text: number for number, text in nerdctld.TASK_STATES.items()}[each.status]
        return message((2, exec_id or identity), (3, each.pid), (4, number), (5, each.stdin), (6, each.stdout), (9, each.exit_status), (10, timestamp(each.exited_at)))

    def encode_image(self, name):
        """An images.v1.Image."""
        each = self.images[name]
        target = message((1, each.target.media_type), (2, each.target.digest), (3, each.target.size))
        return message((1, each.name), (2, dict(each.labels)), (3, target), (7, timestamp(each.updated_at)), (8, timestamp(each.updated_at)))

    def tell(self, topic, *, namespace="", **payload):
        """Send an event to all who listen."""
        numbers = {name: number for number, name in nerdctld.EVENT_FIELDS.get(topic, {}).items()}
        event = message(*sorted((numbers[name], value) for name, value in payload.items()))
        envelope = message((1, timestamp(time.time_ns())), (2, namespace or self.namespace), (3, topic), (4, message((1, "containerd.events.Event"), (2, event))))
        with self.lock:
            for connection, stream in list(self.subscribers):
                with contextlib.suppress(OSError):
                    connection.send(stream, envelope)

    def create(self, identity, labels=None, image=BASE, spec=None, created_at=1795492630 * 10**9):
        """A new container."""
        self.containers[identity] = nerdctld.ContainerRecord(
            identity, dict(labels or {}), image, "io.containerd.runc.v2", json.dumps(spec or {}).encode(), "overlayfs", identity, created_at)
        self.mounts.setdefault(("overlayfs", identity), [])
        self.tell("/containers/create", id=identity, image=image)

    def label(self, identity, **labels):
        """Labels of a container are changed; what is None is taken away."""
        record = self.containers[identity]
        changed = {**record.labels, **labels}
        self.containers[identity] = record._replace(labels={key: value for key, value in changed.items() if value is not None})
        self.tell("/containers/update", id=identity, image=record.image)

    def start(self, identity, pid=4242, stdin=""):
        """A container is started."""
        self.forget(identity)
        self.tasks[identity] = nerdctld.TaskRecord(pid, "created", 0, 0, stdin)
        self.tell("/tasks/create", container_id=identity, pid=pid)
        self.tasks[identity] = self.tasks[identity]._replace(status="running")
        self.tell("/tasks/start", container_id=identity, pid=pid)

    def pause(self, identity, paused=True):
        """A container is paused, or goes on."""
        self.tasks[identity] = self.tasks[identity]._replace(status="paused" if paused else "running")
        self.tell("/tasks/paused" if paused else "/tasks/resumed", container_id=identity)

    def exit(self, identity, status=0, process=""):
        """A container ends, or with its name an exec in it."""
        with self.lock:
            if identity in self.tasks and (not process or (identity, process) in self.processes) and not self.process(identity, process).ended:
                self.processes[identity, process].end(status)
            else:
                self.tell("/tasks/exit", container_id=identity, id=process or identity, exit_status=status)

    def delete(self, identity):
        """A container is removed."""
        if identity in self.tasks:
            self.forget(identity)
            self.tell("/tasks/delete", container_id=identity)
        self.containers.pop(identity, None)
        self.tell("/containers/delete", id=identity)

    def tag(self, name, digest=""):
        """A name of an image is set, to what a digest of another name stands for."""
        topic = "/images/update" if name in self.images else "/images/create"
        target = next((each.target for each in self.images.values() if each.target.digest == digest), None)
        target = target or nerdctld.Descriptor("application/vnd.oci.image.manifest.v1+json", digest, len(self.content.get(digest, b"")))
        self.images[name] = nerdctld.ImageRecord(name, target, time.time_ns())
        self.tell(topic, name=name)

    def untag(self, name):
        """A name of an image is taken away."""
        if self.images.pop(name, None):
            self.tell("/images/delete", name=name)

    def put(self, value):
        """Content of this JSON value; its digest."""
        data = json.dumps(value).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.content[digest] = data
        return digest


class InProcess(nerdctld.Nerdctl):
    """The scripted nerdctl without a process for each call; only streams have one."""

    def __init__(self, scripted, namespace=""):
        super().__init__([str(scripted.program)], namespace)
        self.scripted = scripted

    def output(self, *arguments, data=b"", timeout=nerdctld.SHORT_CALL, environment=None, waits=False):
        """What the script says, noted as a call."""
        self.argv(arguments)
        rule = self.scripted.rule(arguments)
        if rule and rule["stays"] or self.command != [str(self.scripted.program)]:
            return super().output(*arguments, data=data, timeout=timeout, environment=environment, waits=waits)
        self.scripted.note(list(arguments), data, environment or {})
        if rule is None:
            return nerdctld.Output(1, b"", fatal("not in the script: " + " ".join(arguments)))
        self.scripted.do(arguments)
        return nerdctld.Output(rule["status"], rule["stdout"].encode(), rule["stderr"])

    def start(self, *arguments, **options):
        """A process, as before; what is to follow from the command has happened when it has begun."""
        process = super().start(*arguments, **options)
        self.scripted.do(arguments)
        return process


###############################################################################
# Engines, daemons and their answers
###############################################################################


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
def fake(tmp_path):
    """A fake containerd with nothing in it."""
    found = FakeContainerd(tmp_path)
    yield found
    found.close()


@pytest.fixture
def engine(scripted, fake):
    """An engine over the scripted nerdctl and the fake containerd, of which it follows no events."""
    found = nerdctld.Engine(InProcess(scripted), nerdctld.Containerd(fake.path))
    yield found
    found.close()


def follow(engine, fake):
    """Let an engine follow events; it covers everything that happens from now on."""
    engine.feed.SETTLE = 0.0
    engine.feed.start()
    assert until(lambda: fake.subscribers and engine.feed.live)
    engine.settle()


def away(folder):
    """Where nothing is of what this machine's own nerdctl keeps: networks, and below `data_root` all else."""
    settings = pathlib.Path(folder) / "nerdctl.toml"
    if not settings.exists():
        settings.write_text(f'data_root = "{folder}/data"\n')
    return {"NETCONFPATH": f"{folder}/networks", "NERDCTL_TOML": str(settings), "CONTAINERD_ADDRESS": "", "BUILDKIT_HOST": ""}


@pytest.fixture(autouse=True)
def apart(request, monkeypatch, tmp_path):
    """What is scripted has nothing to do with the nerdctl of this machine."""
    if "Live" not in str(request.cls):
        folder = request.getfixturevalue("reading").folder if "reading" in request.fixturenames else tmp_path
        for name, value in away(folder).items():
            monkeypatch.setenv(name, value)
    nerdctld.nerdctl_settings.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """The tests themselves are many objects, which nobody needs to look through again and again."""
    gc.collect()
    gc.freeze()


@functools.lru_cache(maxsize=None)
def compiled():
    """The daemon's file as bytecode, which starts several times faster."""
    # The import has left it, unless Python was told not to.
    with contextlib.suppress(OSError, TypeError):
        if os.path.getmtime(nerdctld.__cached__) >= os.path.getmtime(nerdctld.__file__):
            return nerdctld.__cached__
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return py_compile.compile(str(HERE / "nerdctld.py"), os.path.join(folder, "nerdctld.pyc"), doraise=True)


class Daemon:
    """nerdctld.py as a process of its own."""

    def __init__(self, folder, *options, environment=None, command=None):
        self.socket = str(folder / "nd.sock")
        self.log = folder / "nd.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command or [sys.executable, compiled(), "-H", "unix://" + self.socket, *options],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, **(away(folder) if "--nerdctl" in options else {}), **(environment or {})})
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            # Not only a connection: those are taken before signals are heeded.
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.ask("GET", "/_ping")
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
            if isinstance(body, (dict, list)):
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
def daemon(tmp_path, scripted, fake):
    """The daemon over the scripted nerdctl and the fake containerd."""
    found = Daemon(tmp_path, "--nerdctl", str(scripted.program), "--address", fake.path)
    yield found
    found.end()


def until(condition, seconds=10.0):
    """Wait for a condition; its value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > deadline:
            return value
        time.sleep(0.005)


###############################################################################
# Recordings
###############################################################################

VERSION_TOLD = Recording(
    "nerdctl 2.3.5: version --format {{json .}}",
    stdout='{"Client":{"Version":"v2.3.5","GitCommit":"<unknown>","GoVersion":"go1.26.8","Os":"linux","Arch":"amd64","Components":'
    '[{"Name":"buildctl","Version":"v0.34.2"}]},"Server":{"Components":[{"Name":"containerd","Version":"v2.3.1","Details":{'
    '"GitCommit":""}},{"Name":"runc","Version":"1.1.5+ds1","Details":{"GitCommit":"1.1.5+ds1-1+deb12u1"}}]}}\n')

VERSIONS = json.loads(VERSION_TOLD.stdout)
INFO = Recording(
    "nerdctl 2.3.5: info --format {{json .}}",
    stdout='{"ID":"16f7ae04-a9a5-49b1-9999-0f05f4c7cfab","Driver":"overlayfs","Plugins":{"Log":["fluentd","journald","json-file","'
    'none","syslog"],"Storage":["erofs","native","overlayfs"]},"MemoryLimit":true,"SwapLimit":true,"CpuCfsPeriod":true,"Cpu'
    'CfsQuota":true,"CPUShares":true,"CPUSet":true,"CPURealtime":false,"PidsLimit":true,"IPv4Forwarding":true,"BridgeNfIpta'
    'bles":true,"BridgeNfIp6tables":true,"OomKillDisable":true,"SystemTime":"2026-11-24T03:57:08.16214039Z","LoggingDriver"'
    ':"json-file","CgroupDriver":"cgroupfs","CgroupVersion":"1","KernelVersion":"6.18.44-fc-v657","OperatingSystem":"Debian'
    ' GNU/Linux 12 (bookworm)","OSType":"linux","Architecture":"x86_64","NCPU":2,"MemTotal":25276510208,"Name":"vm","Server'
    'Version":"v2.3.1","SecurityOptions":["name=seccomp,profile=builtin"],"Warnings":null}\n')

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
    "nerdctl 2.3.5: build --progress=rawjson --no-cache --tag=docker.io/library/tstb:1 -- FOLDER (of the messages those of steps)",
    stderr='{"vertexes":[{"digest":"sha256:e574aa4e7ab00e032d7c80b21f12d8e5075977a175d015d6937800f1a9db879d","name":"[internal] load metadata for localh'
    'ost:5000/bb:1","started":"2026-11-26T22:47:24.574611373Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:e574aa4e7ab00e032d7c80b21f12d8e5075977a175d015d6937800f1a9db879d","name":"[internal] load metadata for localh'
    'ost:5000/bb:1","started":"2026-11-26T22:47:24.574611373Z","completed":"2026-11-26T22:47:24.609434331Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:f1768c26d2fdd6cab6ad715ce610f7aa489d137c292f8b82b33dd005c686e43b","inputs":["sha256:a2bec5b381c178d62ab5dbb9a'
    '250a8e6c1d851fb2c3a39c36840ba26cc2b85d7"],"name":"[2/2] RUN echo hi; echo no \\u003e\\u00262; echo \\u003e /x"},{"digest":"sha256:a2bec5b381c17'
    '8d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","name":"[1/2] FROM localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c3'
    '1e22f34917e17e9443a4892"}]}\n'
    '{"vertexes":[{"digest":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","name":"[1/2] FROM localhost:5000/bb:1@sha2'
    '56:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","started":"2026-11-26T22:47:24.660123219Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","name":"[1/2] FROM localhost:5000/bb:1@sha2'
    '56:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","started":"2026-11-26T22:47:24.660123219Z","completed":"2026-11-26T22:4'
    '7:24.719725511Z"}],"statuses":[{"id":"resolve localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","'
    'vertex":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","current":0,"timestamp":"2026-11-26T22:47:24.719587212Z","'
    'started":"2026-11-26T22:47:24.663074974Z","completed":"2026-11-26T22:47:24.71958595Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","name":"[1/2] FROM localhost:5000/bb:1@sha2'
    '56:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","started":"2026-11-26T22:47:24.720063605Z","completed":"2026-11-26T22:4'
    '7:24.72011389Z","cached":true},{"digest":"sha256:f1768c26d2fdd6cab6ad715ce610f7aa489d137c292f8b82b33dd005c686e43b","inputs":["sha256:a2bec5b'
    '381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7"],"name":"[2/2] RUN echo hi; echo no \\u003e\\u00262; echo \\u003e /x","started":"202'
    '6-11-26T22:47:24.72028495Z"}]}\n'
    '{"logs":[{"vertex":"sha256:f1768c26d2fdd6cab6ad715ce610f7aa489d137c292f8b82b33dd005c686e43b","stream":1,"data":"aGkK","timestamp":"2026-11-2'
    '6T22:47:24.964119572Z"}]}\n'
    '{"logs":[{"vertex":"sha256:f1768c26d2fdd6cab6ad715ce610f7aa489d137c292f8b82b33dd005c686e43b","stream":2,"data":"bm8K","timestamp":"2026-11-2'
    '6T22:47:24.964284041Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:f1768c26d2fdd6cab6ad715ce610f7aa489d137c292f8b82b33dd005c686e43b","inputs":["sha256:a2bec5b381c178d62ab5dbb9a'
    '250a8e6c1d851fb2c3a39c36840ba26cc2b85d7"],"name":"[2/2] RUN echo hi; echo no \\u003e\\u00262; echo \\u003e /x","started":"2026-11-26T22:47:24.7'
    '2028495Z","completed":"2026-11-26T22:47:25.426617898Z"}]}\n')
BUILD_CACHED = Recording(
    "the same once more, without --no-cache (the last message of steps)",
    stderr='{"vertexes":[{"digest":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","name":"[1/2] FROM localhost:5000/bb:1@sha2'
    '56:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","started":"2026-11-26T22:47:27.268203845Z","completed":"2026-11-26T22:4'
    '7:27.604179554Z"}],"statuses":[{"id":"resolve localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","'
    'vertex":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","current":0,"timestamp":"2026-11-26T22:47:27.604058117Z","'
    'started":"2026-11-26T22:47:27.327641098Z","completed":"2026-11-26T22:47:27.604056844Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:f1768c26d2fdd6cab6ad715ce610f7aa489d137c292f8b82b33dd005c686e43b","inputs":["sha256:a2bec5b381c178d62ab5dbb9a'
    '250a8e6c1d851fb2c3a39c36840ba26cc2b85d7"],"name":"[2/2] RUN echo hi; echo no \\u003e\\u00262; echo \\u003e /x","started":"2026-11-26T22:47:27.6'
    '53103764Z","cached":true}]}\n'
    '{"vertexes":[{"digest":"sha256:f1768c26d2fdd6cab6ad715ce610f7aa489d137c292f8b82b33dd005c686e43b","inputs":["sha256:a2bec5b381c178d62ab5dbb9a'
    '250a8e6c1d851fb2c3a39c36840ba26cc2b85d7"],"name":"[2/2] RUN echo hi; echo no \\u003e\\u00262; echo \\u003e /x","started":"2026-11-26T22:47:27.6'
    '53103764Z","completed":"2026-11-26T22:47:27.654302451Z","cached":true}]}\n')
BUILD_FAILED = Recording(
    "nerdctl 2.3.5: build of a Dockerfile with RUN exit 7 (the same)",
    stderr='{"vertexes":[{"digest":"sha256:e574aa4e7ab00e032d7c80b21f12d8e5075977a175d015d6937800f1a9db879d","name":"[internal] load metadata for localh'
    'ost:5000/bb:1","started":"2026-11-26T22:47:29.49391081Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:e574aa4e7ab00e032d7c80b21f12d8e5075977a175d015d6937800f1a9db879d","name":"[internal] load metadata for localh'
    'ost:5000/bb:1","started":"2026-11-26T22:47:29.49391081Z","completed":"2026-11-26T22:47:29.535592388Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:1a511abfeea54d0d35caab9c077a0f453983af557cb1f83030e00f7bd439d63d","inputs":["sha256:a2bec5b381c178d62ab5dbb9a'
    '250a8e6c1d851fb2c3a39c36840ba26cc2b85d7"],"name":"[2/2] RUN exit 7"},{"digest":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840b'
    'a26cc2b85d7","name":"[1/2] FROM localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892"}]}\n'
    '{"vertexes":[{"digest":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","name":"[1/2] FROM localhost:5000/bb:1@sha2'
    '56:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","started":"2026-11-26T22:47:29.562619758Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","name":"[1/2] FROM localhost:5000/bb:1@sha2'
    '56:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","started":"2026-11-26T22:47:29.562619758Z","completed":"2026-11-26T22:4'
    '7:29.632724904Z"}],"statuses":[{"id":"resolve localhost:5000/bb:1@sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","'
    'vertex":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","current":0,"timestamp":"2026-11-26T22:47:29.632566177Z","'
    'started":"2026-11-26T22:47:29.574462585Z","completed":"2026-11-26T22:47:29.632564243Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:a2bec5b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7","name":"[1/2] FROM localhost:5000/bb:1@sha2'
    '56:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892","started":"2026-11-26T22:47:29.633048141Z","completed":"2026-11-26T22:4'
    '7:29.633095109Z","cached":true},{"digest":"sha256:1a511abfeea54d0d35caab9c077a0f453983af557cb1f83030e00f7bd439d63d","inputs":["sha256:a2bec5'
    'b381c178d62ab5dbb9a250a8e6c1d851fb2c3a39c36840ba26cc2b85d7"],"name":"[2/2] RUN exit 7","started":"2026-11-26T22:47:29.633241273Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:1a511abfeea54d0d35caab9c077a0f453983af557cb1f83030e00f7bd439d63d","inputs":["sha256:a2bec5b381c178d62ab5dbb9a'
    '250a8e6c1d851fb2c3a39c36840ba26cc2b85d7"],"name":"[2/2] RUN exit 7","started":"2026-11-26T22:47:29.633241273Z","completed":"2026-11-26T22:47'
    ':30.39304219Z","error":"process \\"/bin/sh -c exit 7\\" did not complete successfully: exit code: 7"}]}\n'
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
    stderr='{"vertexes":[{"digest":"sha256:47cf0b7d1cb20d07fb9d59968f038f1bb08a24bf394e9a8c701c6dc7c7ac1f7e","name":"[internal] load build definition fr'
    'om Dockerfile"}]}\n'
    '{"vertexes":[{"digest":"sha256:47cf0b7d1cb20d07fb9d59968f038f1bb08a24bf394e9a8c701c6dc7c7ac1f7e","name":"[internal] load build definition fr'
    'om Dockerfile","started":"2026-11-26T22:47:30.756596552Z","completed":"2026-11-26T22:47:30.756626889Z"},{"digest":"sha256:47cf0b7d1cb20d07fb'
    '9d59968f038f1bb08a24bf394e9a8c701c6dc7c7ac1f7e","name":"[internal] load build definition from Dockerfile","started":"2026-11-26T22:47:30.756'
    '742165Z"}]}\n'
    '{"vertexes":[{"digest":"sha256:47cf0b7d1cb20d07fb9d59968f038f1bb08a24bf394e9a8c701c6dc7c7ac1f7e","name":"[internal] load build definition fr'
    'om Dockerfile","started":"2026-11-26T22:47:30.756742165Z","completed":"2026-11-26T22:47:30.789977115Z"}]}\n'
    'Dockerfile:2\n'
    '--------------------\n'
    '   1 |     FROM localhost:5000/bb:1\n'
    '   2 | >>> FOO exit 7\n'
    '   3 |     \n'
    '--------------------\n'
    'error: failed to solve: dockerfile parse error on line 2: unknown instruction: FOO (did you mean FROM?)\n',
    status=1)

INSPECT_WEB = Recording(
    "nerdctl 2.3.5: container inspect --mode=native --format {{json .}} -- tstweb, capabilities, hooks, most mounts and some labels cut; ids and times are those of the other recordings",
    stdout='{"ID":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b","Labels":{"a":"b,c","base":"busybox","contain'
    'erd.io/restart.explicitly-stopped":"false","containerd.io/restart.policy":"always","containerd.io/restart.status":"run'
    'ning","io.containerd.image.config.stop-signal":"SIGTERM","nerdctl/auto-remove":"false","nerdctl/extraHosts":"[]","nerd'
    'ctl/hostname":"da8682ceeebe","nerdctl/ipc":"{\\"mode\\":\\"private\\"}","nerdctl/log-config":"{\\"driver\\":\\"json-file\\",\\"'
    'address\\":\\"/run/containerd/containerd.sock\\"}","nerdctl/mounts.0":"{\\"Type\\":\\"volume\\",\\"Name\\":\\"tstvol\\",\\"Source\\'
    '":\\"/var/lib/nerdctl/1935db59/volumes/default/tstvol/_data\\",\\"Destination\\":\\"/data\\",\\"Driver\\":\\"local\\",\\"Mode\\":\\'
    '"\\",\\"RW\\":true,\\"Propagation\\":\\"\\"}","nerdctl/mounts.1":"{\\"Type\\":\\"bind\\",\\"Source\\":\\"/tmp\\",\\"Destination\\":\\"/h'
    'ost\\",\\"Mode\\":\\"ro\\",\\"RW\\":false,\\"Propagation\\":\\"\\"}","nerdctl/name":"tstweb","nerdctl/namespace":"default","nerdc'
    'tl/networks":"[\\"tstnet\\"]","nerdctl/platform":"linux/amd64","nerdctl/state-dir":"/var/lib/nerdctl/1935db59/containers'
    '/default/da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b"},"Image":"localhost:5000/bb:1","Runtime":{"'
    'Name":"io.containerd.runc.v2"},"SnapshotKey":"da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b","Snaps'
    'hotter":"overlayfs","CreatedAt":"2026-11-24T03:57:09.762902396Z","Spec":{"ociVersion":"1.3.0","process":{"user":{"uid"'
    ':0,"gid":0,"additionalGids":[0]},"args":["sleep","1000"],"env":["PATH=/bin","X=1","HOSTNAME=da8682ceeebe"],"cwd":"/"},'
    '"root":{"path":"rootfs"},"hostname":"da8682ceeebe","mounts":[{"destination":"/proc","type":"proc","source":"proc","opt'
    'ions":["nosuid","noexec","nodev"]},{"destination":"/data","type":"none","source":"/var/lib/nerdctl/1935db59/volumes/de'
    'fault/tstvol/_data","options":["rbind"]},{"destination":"/host","type":"none","source":"/tmp","options":["ro","rprivat'
    'e","rbind"]},{"destination":"/etc/hosts","type":"bind","source":"/var/lib/nerdctl/1935db59/etchosts/default/da8682ceee'
    'be247ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b/hosts","options":["bind","rprivate"]},{"destination":"/etc/host'
    'name","type":"bind","source":"/var/lib/nerdctl/1935db59/containers/default/da8682ceeebe247ed0c1fe3251e8c813f2a5a2acb39'
    'c61be740b59cf1ace498b/hostname","options":["bind","rprivate"]}],"linux":{"sysctl":{"net.ipv4.ip_unprivileged_port_star'
    't":"0"},"resources":{"memory":{},"cpu":{"realtimeRuntime":0,"realtimePeriod":0}},"cgroupsPath":"/default/da8682ceeebe2'
    '47ed0c1fe3251e8c813f2a5a2acb39c61be740b59cf1ace498b","namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type'
    '":"mount"},{"type":"network"}],"maskedPaths":["/proc/acpi"],"readonlyPaths":["/proc/bus"]}},"Process":{"Pid":32149,"St'
    'atus":{"Status":"running","ExitStatus":0,"ExitTime":"0001-01-01T00:00:00Z"}}}\n')

INSPECT_DONE = Recording(
    "nerdctl 2.3.5: container inspect --mode=native --format {{json .}} -- tstdone, capabilities, hooks, most mounts and some labels cut; ids and times are those of the other recordings",
    stdout='{"ID":"c92a69e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3","Labels":{"base":"busybox","containerd.io/res'
    'tart.explicitly-stopped":"false","io.containerd.image.config.stop-signal":"SIGTERM","nerdctl/auto-remove":"false","ner'
    'dctl/extraHosts":"[]","nerdctl/hostname":"c92a69e7018b","nerdctl/ipc":"{\\"mode\\":\\"private\\"}","nerdctl/log-config":"{'
    '\\"driver\\":\\"json-file\\",\\"address\\":\\"/run/containerd/containerd.sock\\"}","nerdctl/name":"tstdone","nerdctl/namespace'
    '":"default","nerdctl/networks":"[\\"none\\"]","nerdctl/platform":"linux/amd64","nerdctl/state-dir":"/var/lib/nerdctl/193'
    '5db59/containers/default/c92a69e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3"},"Image":"localhost:5000/bb'
    ':1","Runtime":{"Name":"io.containerd.runc.v2"},"SnapshotKey":"c92a69e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0'
    'ac1c18a3","Snapshotter":"overlayfs","CreatedAt":"2026-11-24T03:57:10.426873533Z","Spec":{"ociVersion":"1.3.0","process'
    '":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"args":["sh","-c","exit 3"],"env":["PATH=/bin","HOSTNAME=c92a69e7018b'
    '"],"cwd":"/"},"root":{"path":"rootfs"},"hostname":"c92a69e7018b","mounts":[{"destination":"/proc","type":"proc","sourc'
    'e":"proc","options":["nosuid","noexec","nodev"]},{"destination":"/etc/hosts","type":"bind","source":"/var/lib/nerdctl/'
    '1935db59/etchosts/default/c92a69e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3/hosts","options":["bind","r'
    'private"]},{"destination":"/etc/hostname","type":"bind","source":"/var/lib/nerdctl/1935db59/containers/default/c92a69e'
    '7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3/hostname","options":["bind","rprivate"]}],"linux":{"sysctl":'
    '{"net.ipv4.ip_unprivileged_port_start":"0"},"resources":{"memory":{},"cpu":{"realtimeRuntime":0,"realtimePeriod":0}},"'
    'cgroupsPath":"/default/c92a69e7018b7d7df77c38c10739ae9f599e5d603ac168e6f7543ae0ac1c18a3","namespaces":[{"type":"pid"},'
    '{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network"}],"maskedPaths":["/proc/acpi"],"readonlyPaths":["/pro'
    'c/bus"]}},"Process":{"Status":{"Status":"stopped","ExitStatus":3,"ExitTime":"2026-11-24T03:57:10.624517029Z"}}}\n')

INSPECT_NEW = Recording(
    "nerdctl 2.3.5: container inspect --mode=native --format {{json .}} -- tstnew, capabilities, hooks, most mounts and some labels cut; ids and times are those of the other recordings",
    stdout='{"ID":"533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc1e7a4134ee8c9a9540","Labels":{"base":"busybox","io.containerd.ima'
    'ge.config.stop-signal":"SIGTERM","nerdctl/auto-remove":"false","nerdctl/extraHosts":"[]","nerdctl/hostname":"533190b4b'
    'a1f","nerdctl/ipc":"{\\"mode\\":\\"private\\"}","nerdctl/log-config":"{\\"driver\\":\\"json-file\\",\\"address\\":\\"/run/contain'
    'erd/containerd.sock\\"}","nerdctl/name":"tstnew","nerdctl/namespace":"default","nerdctl/networks":"[\\"none\\"]","nerdctl'
    '/platform":"linux/amd64","nerdctl/state-dir":"/var/lib/nerdctl/1935db59/containers/default/533190b4ba1f79a70112ac7c72a'
    'eec297a7cb8538fbdcc1e7a4134ee8c9a9540"},"Image":"localhost:5000/bb:1","Runtime":{"Name":"io.containerd.runc.v2"},"Snap'
    'shotKey":"533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc1e7a4134ee8c9a9540","Snapshotter":"overlayfs","CreatedAt":"202'
    '6-11-24T03:57:10.764528161Z","Spec":{"ociVersion":"1.3.0","process":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"ar'
    'gs":["sh"],"env":["PATH=/bin","HOSTNAME=533190b4ba1f"],"cwd":"/"},"root":{"path":"rootfs"},"hostname":"533190b4ba1f","'
    'mounts":[{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]},{"destination":"/'
    'etc/hosts","type":"bind","source":"/var/lib/nerdctl/1935db59/etchosts/default/533190b4ba1f79a70112ac7c72aeec297a7cb853'
    '8fbdcc1e7a4134ee8c9a9540/hosts","options":["bind","rprivate"]},{"destination":"/etc/hostname","type":"bind","source":"'
    '/var/lib/nerdctl/1935db59/containers/default/533190b4ba1f79a70112ac7c72aeec297a7cb8538fbdcc1e7a4134ee8c9a9540/hostname'
    '","options":["bind","rprivate"]}],"linux":{"sysctl":{"net.ipv4.ip_unprivileged_port_start":"0"},"resources":{"memory":'
    '{},"cpu":{"realtimeRuntime":0,"realtimePeriod":0}},"cgroupsPath":"/default/533190b4ba1f79a70112ac7c72aeec297a7cb8538fb'
    'dcc1e7a4134ee8c9a9540","namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network"}]'
    ',"maskedPaths":["/proc/acpi"],"readonlyPaths":["/proc/bus"]}}}\n')

INSPECT_PAUSED = Recording(
    "nerdctl 2.3.5: container inspect --mode=native --format {{json .}} -- tstpaused, capabilities, hooks, most mounts and some labels cut; ids and times are those of the other recordings",
    stdout='{"ID":"00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883","Labels":{"base":"busybox","containerd.io/res'
    'tart.explicitly-stopped":"false","io.containerd.image.config.stop-signal":"SIGTERM","nerdctl/auto-remove":"false","ner'
    'dctl/extraHosts":"[]","nerdctl/hostname":"00268aa8ed4c","nerdctl/ipc":"{\\"mode\\":\\"private\\"}","nerdctl/log-config":"{'
    '\\"driver\\":\\"json-file\\",\\"address\\":\\"/run/containerd/containerd.sock\\"}","nerdctl/name":"tstpaused","nerdctl/namespa'
    'ce":"default","nerdctl/networks":"[\\"none\\"]","nerdctl/platform":"linux/amd64","nerdctl/state-dir":"/var/lib/nerdctl/1'
    '935db59/containers/default/00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883"},"Image":"localhost:5000/'
    'bb:1","Runtime":{"Name":"io.containerd.runc.v2"},"SnapshotKey":"00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673'
    '758e21b883","Snapshotter":"overlayfs","CreatedAt":"2026-11-24T03:57:10.961607537Z","Spec":{"ociVersion":"1.3.0","proce'
    'ss":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"args":["sleep","1000"],"env":["PATH=/bin","HOSTNAME=00268aa8ed4c"]'
    ',"cwd":"/"},"root":{"path":"rootfs"},"hostname":"00268aa8ed4c","mounts":[{"destination":"/proc","type":"proc","source"'
    ':"proc","options":["nosuid","noexec","nodev"]},{"destination":"/etc/hosts","type":"bind","source":"/var/lib/nerdctl/19'
    '35db59/etchosts/default/00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883/hosts","options":["bind","rpr'
    'ivate"]},{"destination":"/etc/hostname","type":"bind","source":"/var/lib/nerdctl/1935db59/containers/default/00268aa8e'
    'd4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883/hostname","options":["bind","rprivate"]}],"linux":{"sysctl":{"'
    'net.ipv4.ip_unprivileged_port_start":"0"},"resources":{"memory":{},"cpu":{"realtimeRuntime":0,"realtimePeriod":0}},"cg'
    'roupsPath":"/default/00268aa8ed4c7515d2a22ad63e9f39da043f9cf64ec3b5a35cf673758e21b883","namespaces":[{"type":"pid"},{"'
    'type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network"}],"maskedPaths":["/proc/acpi"],"readonlyPaths":["/proc/'
    'bus"]}},"Process":{"Pid":32448,"Status":{"Status":"paused","ExitStatus":0,"ExitTime":"0001-01-01T00:00:00Z"}}}\n')

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

BUILDCTL_DU = Recording(
    "buildctl 0.34.2: du --format {{json .}}, two records of it",
    stdout='[{"id":"6h8cxtpdvnxbc5qre92rtl14j","mutable":true,"inUse":false,"size":4096,"createdAt":"2026-11-24T04:12:33.91188652Z'
    '","lastUsedAt":"2026-11-24T04:12:40.13518958Z","usageCount":2,"parents":null,"description":"local source for context",'
    '"recordType":"source.local","shared":false},{"id":"cllji6nk7zd47uq9n1xxaehum","mutable":true,"inUse":false,"size":4096'
    ',"createdAt":"2026-11-24T03:58:30.678063622Z","lastUsedAt":"2026-11-24T04:11:13.564980997Z","usageCount":5,"parents":n'
    'ull,"description":"local source for context","recordType":"source.local","shared":false}]\n')

EVENTS = Recording(
    "containerd 2.3.1: the envelopes of Events/Subscribe of one container's life, a pause and an image, each with its length in front, compressed",
    stdout="eNrVWFtoHFUY3o02rZOo6SlqGAvWAW8lydxvgaI2aWOhTUvSi1BKOTNzZjN2dmY6ZzYXQh+sFywULyCKFxAtonjBUkVrsSjqkxcE8aFqvYAioqhPvol4zu"
    "zO7K6bbYPZWH1ZZv45l+/7z/9//9m/8D3Tu+q+k0+f6e77+sNXThZBV4DZ1TwOYISnwoSPYhTBGHFvFZlr7TBIoBeg2BlC0yhI8NBkbdiO6ijwSJG5xYGG"
    "Zkg2QshCkqIjR7BFF8mSKiLDNkTZlaAKJWhbsmlrooV0RbBU03ZFaCPFNCwwhqegpGrDuum4oquImmBA2ZUNSzGgIbtIVARNMVXBMU1JkclXUTdN3VJlWZ"
    "dVl1g1EVmWqK+/JJxGsQ/nXFz4Kmf5yXvvnq2yBHxOCPN2jGCCuNcWpDmSWUbSUeD+TtBc44c29KdCnAyrgiDwljUssipzhRcONSCIK4E9NC2BtQzbYhWH"
    "tkeJFwa461umZ9XRlN6Pd//Gpuwu5ROID+TETq9g1rYS20mG1Dg9uaIDnA7yBFndrQ7fQibxyojwGaLg+ADzS92SPdbFrKydM8geuN0zYXzA8eIN/DSMed"
    "+z2mPKIj1BMfVoHjJ5CmBe1DSRpytyuypRRCZ1dGEXc7v8cKajy6oCXfYSL3DQ7IbQdblTRbDX8gIYzw3zPF/BZBMafTyx8XRZO/Fv3j++aWJ0ZOfW/VvG"
    "d26aGL916/6t28fGtoyPbbhO2kxwkV+CjPzWJpAn0ZRVh5wHu5yLC8fPFAv35hH+5u9v3JxGeG8twnEC44RDzNULx/ck/Qw2Lz26+wiO7r4cx6l3zmxv1Z"
    "FK5NB0+7HnnDqyKx0F3u1ZLh0Rmeubw8YrwxKiBtcrDeEkjAaxVwqgD1ZObhkjJ7KNfbvI9NWcz5fDCsUrgBeK89zOuQhxw9x06FfKiBvgxmGZvic4ISby"
    "PhlWYpta8uDNlslOkK/OxTThq9P4/cQBkEweRTghoUNljK6QWWOPxDUxpNyIYVvo0B3I08QebjiJK2iA2xGHESxlU7lD7Lo6AeqOgOAEvVC3NN2FgqSYAh"
    "swl2cj/LA0WIm95U2La5mebD8vsgGY58pVIhEhSOPkEHsl05sNSQF3EwfNIIs9xKzO7CTAEzRI5AFMtXdxQwx2Qlavqfsy8mHihnEZ9PheUJnlYdnRFHYV"
    "U4TgImvAZm9nQKNTqzEGNs5zTnaKd+AwGHQ9n0YPdJwYYUwP+2+1olHkQvsA8c3lzMUWxAistCp4zgpn2bXMmmwrWEnCwRiViQCCFS70MWo8/wAlVLAx6N"
    "1LA3VKIwZuH3tDUxH0Qp5AofIwRF1cwWAlgRR4QYntr3NCs0kMbyPxhEHX3n3s7vqROgEGY/Pc6PjkJIoJU0IqqPj+ALVMIBz60yTh3VqNbvg2iWBsT42G"
    "ZYKjZj/EXlU/bxoHOCInkcrLaJ0zjerMv4Pz3Eb/gBfuQV5pKuGGhQFuxHM2UyeneTKKpj0b5cvPt2NOjmzZ0+Bgi7KIYF8uLGQXp0lGknLUqgyUe10I4r"
    "AmBenJL6AF17fjG4W+Z8+BbujPwDnMLVl/u0fyivDTna9bbSvCE72LqQi/L2NFuHFhh6DZiHjES/y5QVoXIuRk+dQ+Cc6faefO1H9bhy+wmLbT+POK7Pkr"
    "WmfUoS7mi1bIf3DDuKAatIhSfAFkqq3qL19R/f/f8xap7a3Xh2Wq3UsvIoV7mN5VD6VF5LUPvjl7UdM/+AhWMHI4q90f+B3pd7CRuUUQJM2A0ECOYuuqqD"
    "oSlCToaDIyXdl0oKDILtlVU5AtWyqUVfKsy7pqIEm0DEMufEZq2cMpjLd/emldrRdURYFmkT1I4owgebnIXLMwlE1k0K10DDjSiRbJpnRTZEiQTDI1SL7o"
    "yLYlxTFNC4kaGaorjq3Kri6YqiYZ0FEEl2xi6KKrWroJJV1XCmeJc6usfnj/6PPV5s+aRlpp9BBiJxbs/mTEJqujwNH/DrX+7wcKX+bsPnr28AtVdj05Oy"
    "/h3iw29Y6aWHkJePw/RWd9RubjXz99rliYysndc/rEG10pucv4tNTkra1R5qZGlSPpTEtbtR5h2iPZQp9qba6rmCscooMoprpBNCwmBYefHZ4rfEF2ejrd"
    "6c+fvznc1erGk+d242OdcOOSV+g/fqa47khxfcblgz/OHu4qPE64PZO+//Li53cVm9TFQT4iTpxppy6j6XewpzP9k/4jRa4Z26M5tmMPvvpQ1e999f5z9d"
    "7IHWTWte8+T1TvltuWDrGxZfxADuyRB15/tqv1Yl/zXOmc9/qa+zYuHVuhRMT5WArou5ef6m9OhRqWxaVCDVO7VPgL5/fj7w==")

V21_LOAD = Recording(
    "nerdctl 2.1.6: load <base.tar",
    stdout='unpacking localhost:5000/bb:1 (sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892)...\n'
    'Loaded image: localhost:5000/bb:1\n')

V17_LOAD = Recording(
    "nerdctl 1.7.7: load <base.tar",
    stdout='unpacking localhost:5000/bb:1 (sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892)...\n'
    'Loaded image: localhost:5000/bb:1\n')


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
    ("build (worker in another namespace)", fatal("no image was built"), 500,
     "no image was built where nerdctl looks for it: buildkitd's first worker has to be a containerd worker in nerdctl's namespace (buildkitd.toml)"),
    ("ps -a (while a container goes)", fatal(f'container "{"5" * 64}" in namespace "default": not found'), 404, "No such container: " + "5" * 64),
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
    ("start tstnew", fatal('1 errors:\nfailed to create shim task: error running hook #0: stderr: time="2026-11-25" level=fatal msg="no such network: \\"tstgone\\""'),
     404, "network tstgone not found"),
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


@functools.lru_cache(maxsize=None)
def tree():
    """The daemon's file, parsed as the oldest Python that it is for does it."""
    return ast.parse(SOURCE, feature_version=(3, 9))


@functools.lru_cache(maxsize=None)
def sections():
    """The line at which each section of the daemon's file begins, and its name."""
    return [(SOURCE.count("\n", 0, found.start()) + 1, found.group(1)) for found in re.finditer(r"^#{79}\n# (.+)\n#{79}$", SOURCE, re.M)]


def section_lines(name):
    """The lines of a section."""
    number = next(number for number, each in sections() if each == name)
    end = next((after for after, _ in sections() if after > number), None)
    return SOURCE.splitlines()[number - 1:end and end - 1]


class TestShape:
    def test_stdlib_only(self):
        names = set()
        for node in ast.walk(tree()):
            if isinstance(node, ast.Import):
                names.update(each.name.partition(".")[0] for each in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
        assert names <= set(getattr(sys, "stdlib_module_names", names))

    def test_parses_as_python_3_9(self):
        assert tree().body

    def test_functions_are_short_and_documented(self):
        for node in ast.walk(tree()):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                length = node.end_lineno - node.lineno + 1
                if isinstance(node, ast.FunctionDef):
                    assert length <= 60, f"{node.name} is {length} lines long"
        for node in tree().body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.get_docstring(node), f"{node.name} has no docstring"

    def test_no_name_is_given_twice(self):
        names = []
        for node in tree().body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.append(node.name)
            elif isinstance(node, ast.Assign):
                names += [each.id for each in node.targets if isinstance(each, ast.Name)]
        assert sorted(names) == sorted(set(names))

    def test_no_test_is_lost(self):
        # Of two with one name Python keeps the second.
        where, names = "", collections.Counter()
        for line in pathlib.Path(__file__).read_text().splitlines():
            found = re.match(r"class (\w+)|    def (test_\w+)", line)
            if found:
                where = found.group(1) or where
                names[where, found.group(2)] += 1
        assert not [name for name, count in names.items() if count > 1]

    def test_sections_are_those_of_the_docstring(self):
        banners = re.findall(r"^#{79}\n# (.+)\n#{79}$", SOURCE, re.M)
        listed = re.search(r"stands above it:\n\n(.*?)\n\n", nerdctld.__doc__, re.S).group(1)
        assert banners == [each.strip() for each in re.split(r"\s*·\s*", " ".join(listed.split())) if each.strip()]

    def test_lines_and_sections_are_short(self):
        lines = SOURCE.splitlines()
        assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []
        begins = [number for number, name in sections()]
        assert [name for (number, name), end in zip(sections(), [*begins[1:], len(lines)]) if end - number > 700] == []

    def test_sections_use_only_what_stands_above(self):
        """Annotations aside. A name of a later section is a layer that leaks."""
        begins = [number for number, _ in sections()]
        place = lambda node: bisect.bisect(begins, node.lineno)
        made = {}
        for node in tree().body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
            made.update({name: place(node) for name in (names or [getattr(node, "name", "")])})
        found = set()
        for node in tree().body:
            local = {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
            local |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
            notes = [each.annotation for each in ast.walk(node) if isinstance(each, (ast.arg, ast.AnnAssign)) and each.annotation]
            notes += [each.returns for each in ast.walk(node) if isinstance(each, ast.FunctionDef) and each.returns]
            noted = {id(each) for note in notes for each in ast.walk(note)}
            found |= {(each.id, each.lineno) for each in ast.walk(node) if isinstance(each, ast.Name) and id(each) not in noted
                      and each.id not in local and made.get(each.id, 0) > place(node)}
        assert found == set()

    def test_processes_are_started_in_one_section(self):
        where = [name for number, name in sections() for line in section_lines(name) if re.search(r"subprocess\.(Popen|run)\(", line)]
        # What mounts a snapshot of FUSE runs in the process that has a container's tree.
        assert set(where) == {"nerdctl process", "Tree"} and where.count("Tree") == 1

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
# Tree
###############################################################################


def entries(*told, format=tarfile.PAX_FORMAT):
    """A tar of entries: name, kind (a letter of tar's: 0 file, 1 link, 2 symbolic link, 5 folder, 6 FIFO), content or target, and more
    fields of TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
        for name, kind, content, *more in told:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.uid, entry.gid = kind.encode(), 0o644 if kind != "5" else 0o755, os.geteuid(), os.getegid()
            for key, value in (more[0] if more else {}).items():
                setattr(entry, key, value)
            if kind in "12":
                entry.linkname = content
            elif kind not in "56":
                entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content) if kind not in "1256" else None)
    return buffer.getvalue()


@contextlib.contextmanager
def memory_of(data):
    """A descriptor of these bytes."""
    descriptor = os.memfd_create("data")
    try:
        os.write(descriptor, data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def unpack(root, data, path="/", **options):
    """Unpack a tar below a plain folder, in this process."""
    with memory_of(data) as descriptor:
        source = nerdctld.TarInput(descriptor)
        nerdctld.Unpacker(str(root), nerdctld.folder_for(str(root), path), **options).unpack(source)


def packed(root, path):
    """The tar of a path below a plain folder, and the stat that is told of it."""
    told = []
    with memory_of(b"") as descriptor:
        nerdctld.Packer(str(root), descriptor).pack(path, told.append)
        return os.pread(descriptor, 1 << 24, 0), told[0]


def exported(root):
    """The names in the tar of everything below a plain folder."""
    with memory_of(b"") as descriptor:
        nerdctld.Packer(str(root), descriptor).pack_all()
        with tarfile.open(fileobj=io.BytesIO(os.pread(descriptor, 1 << 24, 0)), errors="surrogateescape") as tar:
            return [each.name for each in tar]


def changes_of(upper, lower, sparse=False, ignored=()):
    """Kinds and paths of what differs between two plain folders."""
    folders = [os.open(each, os.O_RDONLY) for each in (upper, lower)]
    try:
        return " ".join("CAD"[kind] + path for path, kind in nerdctld.Changes(sparse, ignored).below("", *folders))
    finally:
        for each in folders:
            os.close(each)


@functools.lru_cache(maxsize=None)
def need_mounts():
    """Skip where no mount namespace can be made."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=20).returncode:
        pytest.skip("mounting is not allowed")


@pytest.fixture
def house(tmp_path):
    """A root folder with links of every kind, beside what nobody inside may touch."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for each in (root / "in", root / "var", outside):
        each.mkdir(parents=True)
    (outside / "file").write_text("untouched")
    for name, target in (("abs", str(outside)), ("var/up", "../../outside"), ("proc", "/proc/self/root" + str(outside)), ("chain", "var/up"), ("loop", "loop"),
                         ("dangling", "nowhere"), ("var/good", "../in"), ("var/back", "/in"), ("end", str(outside / "file"))):
        (root / name).symlink_to(target)
    yield root
    assert [each.name for each in outside.iterdir()] == ["file"] and (outside / "file").read_text() == "untouched"


class TestTree:
    # What is done to a copy of a tree, and what dockerd tells of it.
    CHANGES = [
        ("", ""), ("touch new", "A/new"), ("touch a/new", "C/a A/a/new"), ("mkdir -p d/e; touch d/e/f", "A/d A/d/e A/d/e/f"), ("rm a/f", "C/a D/a/f"), ("rm -r a", "D/a"), ("echo xx > a/f", "C/a/f"),
        ("chmod 700 a", "C/a"), ("chmod 700 a/b/g", "C/a/b/g"), ("rm -r a; echo > a", "C/a"), ("rm top; mkdir top; touch top/x", "C/top A/top/x"), ("ln -sf nowhere top", "C/top"),
        ("ln -s /a l; rm -r a/b", "C/a D/a/b A/l"), ("rm a/f; touch a/f2", "C/a D/a/f A/a/f2"), ("touch etc/hosts; mkdir dev", ""), ("touch etc/hosts etc/x", "C/etc A/etc/x"), ("touch etc/hosts; sleep 0.02; touch etc", "C/etc"), ("rm -r etc", "D/etc"),
        ("touch $'caf\\xe9'", "A/caf\udce9")]

    @pytest.mark.parametrize("script, told", CHANGES, ids=[each[0] for each in CHANGES])
    def test_changes(self, tmp_path, script, told):
        lower, upper = tmp_path / "lower", tmp_path / "upper"
        for name in ("a/f", "a/b/g", "top", "etc/passwd"):
            (lower / name).parent.mkdir(parents=True, exist_ok=True)
            (lower / name).write_text("x")
        subprocess.run(["cp", "-a", str(lower), str(upper)], check=True)
        subprocess.run(["bash", "-c", script], cwd=upper, check=True)
        assert changes_of(upper, lower, ignored=("/etc/hosts", "/dev")) == told

    def test_changes_of_an_overlay(self, tmp_path):
        need_mounts()
        names = {each: str(tmp_path / each) for each in ("lower", "upper", "work", "merged")}
        for each in names.values():
            os.mkdir(each)
        os.makedirs(names["lower"] + "/a/b")
        for each in ("a/f", "a/b/g", "top", "gone", "same"):
            pathlib.Path(names["lower"], each).write_text("x")
        script = "mount -t overlay none -o lowerdir={lower},upperdir={upper},workdir={work} {merged} && cd {merged} && rm gone && rm -r a/b && mkdir a/b && touch a/b/new && echo y > a/f && touch fresh && chmod 700 top"
        subprocess.run(["unshare", "-m", "sh", "-c", script.format(**names)], check=True)
        assert changes_of(names["upper"], names["lower"], sparse=True) == "C/a C/a/b D/a/b/g A/a/b/new C/a/f A/fresh D/gone C/top"

    def test_export(self, house):
        os.mkfifo(house / "in/fifo")
        (house / b"caf\xe9".decode("utf-8", "surrogateescape")).touch()
        assert exported(house) == sorted(["abs", "caf\udce9", "chain", "dangling", "end", "in", "in/fifo", "loop", "proc", "var", "var/back", "var/good", "var/up"])

    @pytest.mark.parametrize("name, where", [
        ("var/good/file", "in/file"), ("var/back/file", "in/file"), ("var/back/new/file", "in/new/file"), ("/in/../in/./file", "in/file"), ("../in/file", "in/file"), ("end", "end")])
    def test_links_lead_inside(self, house, name, where):
        unpack(house, entries((name, "0", b"content")))
        assert (house / where).read_bytes() == b"content" and not (house / where).is_symlink()

    @pytest.mark.parametrize("name", ["abs/file", "var/up/file", "proc/file", "chain/file", "loop/file", "dangling/file", "end/file", "abs/new/file", "var/up/../file"])
    @pytest.mark.parametrize("kind, content", [("0", b"x"), ("1", "in"), ("2", "in"), ("5", b""), ("6", b"")])
    def test_no_link_leads_out(self, house, name, kind, content):
        with contextlib.suppress(OSError):
            unpack(house, entries((name, kind, content)))

    @pytest.mark.parametrize("target", ["abs/file", "var/up/file", "proc/file", "chain/file", "end"])
    def test_no_hard_link_leads_out(self, house, target, tmp_path):
        with contextlib.suppress(OSError):
            unpack(house, entries(("got", "1", target)))
        assert not os.path.lexists(house / "got") or (house / "got").is_symlink()
        assert os.stat(tmp_path / "outside/file").st_nlink == 1

    @pytest.mark.parametrize("told", [("../x", "0", b""), ("..", "5", b""), ("a/../../x", "0", b""), ("s", "2", "../x"), ("a/s", "2", "../../root/inn"), ("h", "1", "../file"), ("h", "1", "/../file")])
    def test_what_leads_out_of_the_folder_is_refused(self, house, told):
        with pytest.raises(nerdctld.BadParameter, match="is outside of|invalid (sym|hard)link"):
            unpack(house, entries(told), "/in")

    @pytest.mark.parametrize("told", [("s", "2", "/etc"), ("a/s", "2", "../x"), ("a/s", "2", "..")])
    def test_links_that_stay_are_kept_as_they_are(self, house, told):
        unpack(house, entries(told), "/var/good")
        assert os.readlink(house / "in" / told[0]) == told[2]

    def test_nobody_wins_by_swapping(self, house):
        # Both names are always a folder or a link out.
        (house / "a").mkdir()
        ended = threading.Event()

        def swap():
            (house / "b").symlink_to(house.parent / "outside")
            while not ended.is_set():
                for old, new in (("a", "c"), ("b", "a"), ("c", "b"), ("b", "c"), ("a", "b"), ("c", "a")):
                    with contextlib.suppress(OSError):
                        (house / old).rename(house / new)

        thread = threading.Thread(target=swap)
        thread.start()
        try:
            for _ in range(300):
                for name, kind, content in (("a/file", "0", b"evil"), ("a/deep/file", "0", b"evil"), ("a", "5", b""), ("got", "1", "a/file")):
                    with contextlib.suppress(OSError, nerdctld.BadParameter):
                        unpack(house, entries((name, kind, content)))
                with contextlib.suppress(OSError):
                    assert b"untouched" not in packed(house, "/a/file")[0]
        finally:
            ended.set()
            thread.join()

    def test_what_an_entry_says_is_kept(self, house, tmp_path):
        times = {"pax_headers": {"mtime": "1700000000.123456789"}}
        xattr = {"pax_headers": {"SCHILY.xattr.user.some": "a\udcffb", "mtime": "1.5"}}
        unpack(house, entries(("d", "5", b"", {"mode": 0o3750, **times}), ("d/f", "0", b"content", {"mode": 0o4711, **times}), ("d/l", "2", "f", times), ("d/h", "1", "d/f", {"mode": 0o4711, **times}),
                              ("d/p", "6", b"", {"mode": 0o622}), ("d/caf\udce9", "0", b"1"), ("d/x", "0", b"2", xattr), ("d/" + "n" * 200, "0", b"3")))
        found = {name: os.lstat(house / "d" / name) for name in os.listdir(house / "d")}
        folder = os.stat(house / "d")
        assert (stat.S_IMODE(folder.st_mode), folder.st_mtime_ns) == (0o3750, 1700000000123456789)
        assert (stat.S_IMODE(found["f"].st_mode), found["l"].st_mtime_ns) == (0o4711, 1700000000123456789)
        assert found["h"].st_ino == found["f"].st_ino and (house / "d/h").read_bytes() == b"content" and os.readlink(house / "d/l") == "f"
        assert stat.S_ISFIFO(found["p"].st_mode) and (house / "d/caf\udce9").read_bytes() == b"1" and (house / "d" / ("n" * 200)).read_bytes() == b"3"
        assert found["x"].st_mtime_ns == 1500000000
        with contextlib.suppress(OSError):
            os.setxattr(house / "in", "user.some", b"")
            assert os.getxattr(house / "d/x", "user.some") == b"a\xffb"

    def test_owners(self, house):
        if os.geteuid():
            pytest.skip("not root")
        need_mounts()
        data = entries(("f", "0", b"", {"uid": 1234, "gid": 70000, "mode": 0o6755}), ("l", "2", "f", {"uid": 5, "gid": 6}), ("n", "3", b"", {"devmajor": 1, "devminor": 3, "uid": 9}))
        unpack(house, data)
        found = {name: os.lstat(house / name) for name in ("f", "l", "n")}
        assert [(each.st_uid, each.st_gid) for each in found.values()] == [(1234, 70000), (5, 6), (9, 0)] and stat.S_IMODE(found["f"].st_mode) == 0o6755
        assert stat.S_ISCHR(found["n"].st_mode) and os.major(found["n"].st_rdev) == 1
        unpack(house, data, owner=[7, 8])
        assert [(os.lstat(house / name).st_uid, os.lstat(house / name).st_gid) for name in found] == [(7, 8)] * 3

    def test_as_an_ordinary_user(self, house, tmp_path):
        if os.geteuid():
            pytest.skip("not root")
        for each in (house / "in", house / "var"):
            os.chown(each, 65534, 65534)
        data, foreign = (entries(("f", "0", b"1", {"uid": uid, "gid": uid})) for uid in (65534, 0))
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                folder = os.open(house, os.O_PATH)
                os.chdir("/")
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                root = f"/proc/self/fd/{folder}"
                unpack(root, data, "/in")
                try:
                    unpack(root, foreign, "/var")
                except PermissionError as error:
                    os._exit(7 if error.strerror == "open /var/f: operation not permitted" else 8)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7 and (house / "in/f").read_bytes() == b"1"

    @pytest.mark.parametrize("format", ["gnu", "posix"])
    def test_sparse(self, house, tmp_path, format):
        with open(tmp_path / "sparse", "wb") as file:
            for offset in (1 << 20, 30 << 20, 50 << 20):
                file.seek(offset)
                file.write(b"data" * 2000)
            file.truncate(70 << 20)
        data = subprocess.run(["tar", "-cSf", "-", f"--format={format}", "-C", str(tmp_path), "sparse"], capture_output=True, timeout=60).stdout
        if not 0 < len(data) < 1 << 20:
            pytest.skip("no tar that knows sparse files")
        unpack(house, data)
        assert (house / "sparse").read_bytes() == (tmp_path / "sparse").read_bytes()
        assert os.stat(house / "sparse").st_blocks * 512 < 2 << 20

    def test_what_is_there_is_replaced(self, house):
        unpack(house, entries(("in/sub/x", "0", b"1"), ("f", "0", b"old and long")))
        os.link(house / "f", house / "same")
        unpack(house, entries(("f", "0", b"new"), ("in", "0", b"2"), ("var/good", "5", b"", {"mode": 0o700})))
        assert (house / "f").read_bytes() == b"new" and (house / "same").read_bytes() == b"old and long" and (house / "in").read_bytes() == b"2"
        assert (house / "var/good").is_dir() and not (house / "var/good").is_symlink()
        unpack(house, entries(("var", "5", b"", {"mode": 0o711}), (".", "5", b"", {"mode": 0o700})))
        assert stat.S_IMODE(os.stat(house / "var").st_mode) == 0o711 and (house / "var/good").is_dir() and stat.S_IMODE(os.stat(house).st_mode) != 0o700

    @pytest.mark.parametrize("told, words", [
        (("in", "0", b""), 'cannot overwrite directory "/in" with non-directory "/"'), (("end", "5", b""), 'cannot overwrite non-directory "/end" with directory "/"'), ((".", "0", b""), "cannot overwrite directory")])
    def test_kinds_are_kept(self, house, told, words):
        with pytest.raises(nerdctld.BadParameter, match=words):
            unpack(house, entries(told), keep=True)

    @pytest.mark.parametrize("data, words", [
        (b"garbage" * 300, "invalid header|bad checksum"), (b"garbage", "truncated header"), (entries(("f", "0", b"x" * 5000))[:3000], "unexpected EOF"),
        (entries(("f", "0", b"x" * 512), ("g", "0", b"y" * 512))[:1024] + b"q" * 512 + bytes(1024), "invalid tar header"), (entries(("f", "0", b"x" * 512), ("g", "0", b""))[:1300], "invalid tar header"),
        (entries(("f", "7", b"x")), "unhandled tar header type 55"), (entries(("f", "0", b"", {"pax_headers": {"comment": "x" * (17 << 20)}})), "too long")],
        ids=["garbage", "short", "cut", "garbage behind", "cut header", "kind", "long header"])
    def test_what_is_broken(self, house, data, words):
        with pytest.raises(nerdctld.BadParameter, match=words):
            unpack(house, data)

    def test_nothing(self, house):
        for data in (b"", bytes(1024), bytes(10240)):
            unpack(house, data)

    def test_memory_does_not_grow_with_the_archive(self, house):
        import tracemalloc

        data = entries(*((f"f{number}", "0", b"x") for number in range(1500)), ("big", "0", bytes(20 << 20)))
        tracemalloc.start()
        try:
            unpack(house, data)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()

    def test_nothing_stays_open(self, house):
        count = lambda: len(os.listdir("/proc/self/fd"))
        before = count()
        for told in (("in/sub/f", "0", b"1"), ("in/sub", "5", b""), ("loop/f", "0", b""), ("../x", "0", b"")):
            with contextlib.suppress(OSError, nerdctld.ApiError):
                unpack(house, entries(told), "/in")
                packed(house, "/in")
        assert count() == before

    def test_packed(self, house, tmp_path):
        unpack(house, entries(("d", "5", b"", {"mode": 0o1777}), ("d/f", "0", b"content", {"mode": 0o4711, "mtime": 5}), ("d/h", "1", "d/f", {"mode": 0o4711, "mtime": 5}), ("d/big", "0", b"x" * 200000), ("d/p", "6", b""),
                              ("d/l", "2", str(tmp_path / "outside")), ("d/" + "n" * 200, "0", b"3"), ("d/caf\udce9", "0", b"1"), ("d/sub/x", "0", b"")))
        with socket.socket(socket.AF_UNIX) as sock:
            os.chdir(house)
            try:
                sock.bind("d/sock")
            finally:
                os.chdir("/")
        data, told = packed(house, "/d")
        assert (told.name, stat.S_ISDIR(told.mode)) == ("d", True) and len(data) % 512 == 0
        with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
            found = {each.name: each for each in tar}
            assert set(found) == {"d", *("d/" + each for each in ("f", "h", "big", "p", "l", "n" * 200, "caf\udce9", "sub", "sub/x"))}
            assert found["d/h"].islnk() and found["d/h"].linkname == "d/f" and found["d/l"].linkname == str(tmp_path / "outside") and found["d/p"].isfifo()
            assert (found["d/f"].mode, found["d/f"].mtime, found["d"].mode) == (0o4711, 5, 0o1777)
            assert tar.extractfile("d/big").read() == b"x" * 200000 and tar.extractfile("d/f").read() == b"content"
        # What was packed unpacks to the same.
        (house / "again").mkdir()
        unpack(house, data, "/again")
        assert packed(house, "/again/d")[0] == data

    def test_mounts_of_many_layers(self, monkeypatch):
        seen = []
        monkeypatch.setattr(nerdctld, "libc_call", lambda name, *arguments: seen.append((*arguments[:3], arguments[3].value, arguments[4])))
        layers = "/usr/bin:/usr/lib:/usr/share"
        here = os.getcwd()
        try:
            nerdctld.mount_snapshot([{"type": "overlay", "source": "overlay", "options": ["index=off", "workdir=/w", "upperdir=/u", "lowerdir=" + layers]},
                                     {"type": "bind", "source": "/x", "options": ["rbind", "ro"]}], "/t")
            assert os.getcwd() == "/usr"
        finally:
            os.chdir(here)
        assert seen == [(b"overlay", b"/t", b"overlay", 0, b"index=off,workdir=/w,upperdir=/u,lowerdir=bin:lib:share"), (b"/x", b"/t", b"bind", 4096 | 16384 | 1, b""),
                        (None, b"/t", None, 32 | 4096 | 1, b"")]


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
            assert nerdctld.Request("GET", "/", query={"since": [text]}).timestamp("since") == 1700000000 * 10**9
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
        with pytest.raises(nerdctld.BadParameter, match=r"client version 1.11 is too old. Minimum supported API version is 1.12, please"):
            nerdctld.split_version("/v1.11/info")
        # skopeo asks for 1.22.
        assert nerdctld.split_version("/v1.12/info") == ((1, 12), "/info")

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
            found = [number for text in (message, whole) for number, (pattern, _, _) in enumerate(nerdctld.NERDCTL_ERRORS) if re.search(pattern, text, re.S)]
            hit.update(found[:1])
        missed = [nerdctld.NERDCTL_ERRORS[number][0] for number in range(len(nerdctld.NERDCTL_ERRORS)) if number not in hit]
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
    def test_argv(self):
        nerdctl = nerdctld.Nerdctl(["lima", "nerdctl"], "k8s.io", "/run/c.sock", "native")
        assert nerdctl.argv(["ps"]) == ["lima", "nerdctl", "--namespace=k8s.io", "--address=/run/c.sock", "--snapshotter=native", "ps"]

    @pytest.mark.parametrize("word", ["a\0b", "x" * 200000])
    def test_words_no_process_can_be_given(self, scripted, word):
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.Nerdctl([str(scripted.program)]).run("ps", "--", word)

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

    @pytest.mark.parametrize("splice", [True, False])
    @pytest.mark.parametrize("size", [0, 1000, 70000, 3000001])
    def test_pieces_are_the_whole_output(self, size, splice, monkeypatch):
        if splice and not hasattr(os, "splice"):
            pytest.skip("os.splice came with Python 3.10")
        if not splice:
            monkeypatch.delattr(os, "splice", raising=False)
        expected = (b"0123456789abcde\n" * (size // 16 + 1))[:size]
        near, far = socket.socketpair()
        got = []
        reader = threading.Thread(target=lambda: got.append(drain(far)))
        reader.start()
        script = f"yes 0123456789abcde | head -c {size}"
        with contextlib.closing(far), nerdctld.Nerdctl(["sh", "-c", script]).start() as process:
            kinds = []
            for piece in process.pieces():
                kinds.append(isinstance(piece, nerdctld.Piped))
                piece.move(near.fileno()) if kinds[-1] else near.sendall(piece)
            near.close()
            reader.join(20)
        assert got == [expected]
        assert not any(kinds) or splice
        assert any(kinds) or not splice or size < 1 << 20

    def test_a_piece_that_nobody_reads(self):
        near, far = socket.socketpair()
        far.close()
        with contextlib.closing(near), nerdctld.Nerdctl(["sh", "-c", "head -c 200000 /dev/zero"]).start() as process:
            with pytest.raises(OSError):
                for piece in process.pieces():
                    piece.move(near.fileno()) if isinstance(piece, nerdctld.Piped) else near.sendall(piece)

    def test_nothing_beside_a_removed_folder_is_touched(self, tmp_path):
        beside, tree = tmp_path / "beside", tmp_path / "around" / "tree"
        beside.mkdir(mode=0o755)
        (beside / "file").write_text("x")
        (beside / "file").chmod(0o644)
        tree.parent.mkdir(mode=0o755)

        def modes():
            return [stat.S_IMODE(each.stat().st_mode) for each in (beside, beside / "file", tree.parent, tmp_path)]
        before = modes()
        # It is gone.
        nerdctld.remove_tree(str(tree))
        assert modes() == before
        (tree / "closed").mkdir(parents=True)
        (tree / "closed" / "link").symlink_to(beside / "file")
        (tree / "closed" / "folder").symlink_to(beside)
        (tree / "closed").chmod(0o500)
        code = tmp_path / "code"
        code.mkdir(mode=0o755)
        shutil.copy(compiled(), code / "nerdctld.pyc")
        (code / "nerdctld.pyc").chmod(0o644)
        script = "import sys, nerdctld; nerdctld.remove_tree(sys.argv[1])"
        command = [sys.executable, "-S", "-c", script, str(tree)]
        if os.geteuid() == 0:
            for each in (tmp_path, *list(tmp_path.parents)[:2], tree, tree / "closed"):
                each.chmod(each.stat().st_mode | 0o055)
            for each in (tree.parent, tree, tree / "closed", beside, beside / "file"):
                os.chown(each, 65534, 65534)
            (tree / "closed").chmod(0o500)
            before = modes()
            # As an ordinary user, where one can get here.
            user = ["setpriv", "--reuid", "65534", "--clear-groups"]
            probe = [*user, sys.executable, "-S", "-c", "import os, sys; open('nerdctld.pyc').close(); os.listdir(sys.argv[1])", str(tree)]
            command = command if subprocess.run(probe, capture_output=True, cwd=code, timeout=20).returncode else [*user, *command]
        subprocess.run(command, cwd=code, check=True, timeout=20, capture_output=True)
        assert modes() == before and (os.geteuid() == 0 or not tree.exists()) and (beside / "file").read_text() == "x"

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
            process.GRACE = 0.2
            assert process.read() == b"ready\n"
            pid = process.popen.pid
        assert not os.path.exists(f"/proc/{pid}")

    def test_places_are_given_back(self, scripted):
        nerdctl = nerdctld.Nerdctl([str(scripted.program)])
        for _ in range(20):
            with pytest.raises(nerdctld.ApiError):
                nerdctl.run("nothing")
        assert nerdctl.places._value == nerdctl.places._initial_value

    def test_too_many(self, scripted):
        nerdctl = nerdctld.Nerdctl([str(scripted.program)])
        for _ in range(nerdctl.places._initial_value):
            nerdctl.places.acquire()
        with pytest.raises(nerdctld.Unavailable, match="too many"):
            nerdctl.run("ps", timeout=0.05)

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

    def test_a_workspace_that_was_removed_is_made_anew(self, tmp_path, monkeypatch):
        tmp_path = tmp_path / "temporary"
        tmp_path.mkdir()
        monkeypatch.setattr(nerdctld.tempfile, "tempdir", str(tmp_path))
        workspace = nerdctld.Workspace()
        first = workspace.folder()
        assert workspace.folder() == first
        os.rmdir(first)
        with workspace.docker_config({}) as environment:
            second = workspace.folder()
            assert second != first and environment["DOCKER_CONFIG"].startswith(second)
        # Another one of its name is none of ours.
        os.rmdir(second)
        os.symlink("/tmp", second)
        assert workspace.folder() not in (first, second)
        workspace.remove()
        assert os.listdir(tmp_path) == [os.path.basename(second)]

    def test_sweep_removes_what_a_killed_daemon_left(self, tmp_path, monkeypatch):
        tmp_path = tmp_path / "temporary"
        tmp_path.mkdir()
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

    @pytest.mark.parametrize("value, kind", [(1, str), ("x", int), (True, int), ([], dict), ({}, list), (1, bool)])
    def test_types(self, value, kind):
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.typed(value, kind, "x")

    def test_half_a_surrogate_pair(self):
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.parse_json(b'{"a":"\\ud800"}')
        assert nerdctld.parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"


###############################################################################
# Patterns
###############################################################################


# Each of them takes a backtracking matcher longer than anybody waits.
EVIL = ["(a+)+b$", "(a|a)*b", "(a|aa)+b", "(.*)*b", "((a*)*)*b", "(a?){40}a{40}b", "(?:a?){1000}b", "([a-z]+)*[A-Z]", "(?i)(A+)+B", "(\\w+\\w+)+!",
        "^(/?a*)+!", "[^b]*" * 40 + "b"]
# What Go's regexp does not compile.
REFUSED = ["(", "a)", "*", "**", "a**", "a+*", "a{2}{2}", "{2}", "(|*)", "a{1001}", "a{2,1}", "(a{100}){11}", "((a{10}){10}){11}", "[a", "[]", "[^]", "[z-a]",
           "[[:foo:]]", "[a-\\d]", "\\", "a\\", "\\1", "(a)\\1", "\\8", "\\q", "\\Z", "\\C", "\\x{110000}", "\\xg", "(?=a)", "(?!a)", "(?<=a)", "(?<!a)", "(?P=n)", "(?#a)",
           "(?x)a", "(?>a)", "(?-)", "(?P<a>a)(?P<a>b)", "(?", "(?i", "(" * 1100 + ")" * 1100]


def some_pattern(random, depth=3):
    """An expression that means the same to Go and to Python."""
    kind = random.randrange(4) if depth else 0
    if kind == 0:
        return random.choice(["a", "b", "-", "\\.", ".", "[ab]", "[^a]", "[a-b-]", "\\w", "\\W", "\\d", "\\b", "\\B", "^", "a", "\\x61", "[\\da]", "(?i:A)", "(?s:.)"])
    if kind == 1:
        return "".join(some_pattern(random, depth - 1) for _ in range(random.randrange(1, 4)))
    if kind == 2:
        return "(?:" + "|".join(some_pattern(random, depth - 1) for _ in range(random.randrange(1, 4))) + ")"
    return "(?:" + some_pattern(random, depth - 1) + ")" + random.choice(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,2}?", "{2,}"])


class TestPatterns:
    def test_as_python_where_both_mean_the_same(self):
        source = random.Random(20)
        for _ in range(3000):
            expression = some_pattern(source)
            text = "".join(source.choice("aabbA-. 1") for _ in range(source.randrange(1, 7)))
            assert nerdctld.Pattern(expression).found_in(text) == bool(re.search(expression, text, re.ASCII)), (expression, text)

    @pytest.mark.parametrize("expression, texts, others", [
        ("^a$", ["a"], ["a\n", "\na", "ab"]), ("(?m)^b$", ["a\nb\nc"], ["abc"]), ("a.b", ["a-b"], ["a\nb"]), ("(?s)a.b", ["a\nb"], []), ("\\Aa\\z", ["a"], ["a\n"]),
        ("^*", ["", "a"], []), ("", ["", "a"], []), ("a||b", ["x"], []), ("^(a|b||c)$", ["a", "b", "", "c"], ["d", "ab"]), ("()*", [""], []),
        ("\\Qa.b*\\E+$", ["a.b**"], ["a.b", "axb*"]), ("\\Qa\\.", ["a\\."], ["a."]), ("(?i)hAt[^X]", ["HaTy"], ["hatx", "hat"]), ("(?i:a)b(?-i)", ["Ab"], ["AB"]),
        ("(a(?i)b|c)d", ["aBd", "Cd"], ["aBD", "Abd"]), ("(?P<n>a)(?<m>b)", ["ab"], []), ("(?U)^a+$", ["aa"], ["b"]),
        ("^[[:alpha:]_-]+$", ["aZ_-"], ["1", ""]), ("^[[:^digit:]]$", ["a"], ["1"]), ("^[]a]+$", ["]a"], ["b"]), ("^[^]a]$", ["b"], ["]", "a"]), ("[[:a]", ["["], ["b"]),
        ("^[\\D]$", ["a"], ["1"]), ("^[^\\d\\s]$", ["a"], ["1", " ", "\u00a0" * 2]), ("^\\w$", ["a", "_"], ["\u00e4", "-"]), ("^\\d$", ["1"], ["\u0661"]),
        ("^\\x{e4}\\x41\\101\\0\\t\\-\\_$", ["\u00e4AA\0\t-_"], []), ("^a{,2}b{x{1$", ["a{,2}b{x{1"], []), ("^a{2}b{2,}c{0}d{1,2}$", ["aabbbd"], ["aabcd", "abbd", "aabbddd"]),
        ("^(a{1000}|b{0,9})$", ["a" * 1000, "b" * 9, ""], ["a" * 999, "b" * 10]), ("^((a{10}){10}){10}$", ["a" * 1000], ["a" * 999]), ("}]a", ["}]a"], [])])
    def test_as_go_has_it(self, expression, texts, others):
        found = nerdctld.Pattern(expression)
        assert [found.found_in(each) for each in [*texts, *others]] == [True] * len(texts) + [False] * len(others)

    @pytest.mark.parametrize("expression", REFUSED)
    def test_refused(self, expression):
        with pytest.raises(nerdctld.PatternError):
            nerdctld.Pattern(expression)
        # Only the name itself counts then.
        assert nerdctld.NameFilter([expression, "x"]).passes(expression) and not nerdctld.NameFilter([expression]).passes("a", "b" + expression)

    @pytest.mark.parametrize("expression", EVIL)
    def test_time(self, expression):
        began = time.process_time()
        assert not nerdctld.NameFilter([expression]).passes("a" * 255, "/" + "a" * 255)
        assert time.process_time() - began < 2

    @pytest.mark.parametrize("piece", ["(", "[", "[:", "[[:a", "(?i", "(?i)", "(?P<a", "{1", "{", "1", "a|", "|", "\\", "\\x{", "\\Q", "\\Q\\E", "[^", "[a-", "(|", "(a*)*", "a{1000}", "(a", "*"])
    def test_time_to_compile(self, piece):
        began = time.process_time()
        for expression in (piece * (65536 // len(piece)), "a" + piece * (65536 // len(piece)), piece * 3000 + "]" * 3000, piece * 900 + ")" * 900, "[" + piece * 9000 + "]"):
            with contextlib.suppress(nerdctld.BadParameter):
                nerdctld.NameFilter([expression])
        assert time.process_time() - began < 8

    def test_too_large(self, reading):
        for names in (["(a{1000}){1}" * 11], ["a{1000}"] * 5 + ["b{1000}c{1000}d{1000}", "e{1000}f{1000}g{1000}h{1000}", "i{1000}j{1000}k{1000}l{1000}"], ["(.)" * 10001]):
            answer = ask(reading, "GET", "/containers/json?" + filtered(name=names))
            assert (answer.status, answer.message) == (400, "invalid filter: its expressions are too large")
        assert ask(reading, "GET", "/images/json?" + filtered(reference=["*a" * 5000])).status == 400
        assert ask(reading, "GET", "/networks?" + filtered(name=["n" * 60000])).json == []

    @pytest.mark.parametrize("path, filters, count", [
        ("/containers/json", {"name": ["(a+)+b$"]}, 0), ("/containers/json", {"name": ["(a+)+$"]}, 1), ("/volumes", {"name": EVIL}, 0),
        ("/networks", {"id": ["([0-9a-f]+)+$"]}, 4), ("/networks", {"id": ["([0-9a-f]+)+x"]}, 0), ("/images/json", {"reference": ["a*" * 30 + "b"]}, 0),
        ("/images/json", {"reference": ["*:5000/*b*b"]}, 1)])
    def test_nobody_waits_for_a_filter(self, daemon, scripted, fake, tmp_path, path, filters, count):
        furnish(scripted, fake, tmp_path)
        fake.label(ID, **{"nerdctl/name": "a" * 40})
        fake.untag("docker.io/library/tst:a")
        fake.tag("docker.io/library/" + "a" * 60 + ":a", BB)
        daemon.ask("GET", path)
        began = time.monotonic()
        told = daemon.ask("GET", f"{path}?all=1&{filtered(**filters)}").json
        assert len(told["Volumes"] if "Volumes" in told else told) == count and daemon.ask("GET", "/_ping").status == 200
        assert time.monotonic() - began < 10


###############################################################################
# gRPC
###############################################################################


def grpc(message):
    """A gRPC message, uncompressed."""
    return struct.pack(">BI", 0, len(message)) + message


DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ACK = END_STREAM = 1
END_HEADERS = 4


def frame(kind, flags, stream, payload=b""):
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers_frame(stream, headers, flags=0):
    """HEADERS that need no continuation."""
    return frame(HEADERS, flags | END_HEADERS, stream, nerdctld.encode_headers(headers))


def cut_frames(data):
    """The whole frames that some bytes begin with as (kind, flags, stream, payload), and the rest."""
    found, at, data = [], 0, bytes(data)
    while len(data) - at >= 9:
        end = at + 9 + int.from_bytes(data[at:at + 3], "big")
        if end > len(data):
            break
        found.append((data[at + 3], data[at + 4], int.from_bytes(data[at + 5:at + 9], "big"), bytes(data[at + 9:end])))
        at = end
    return found, data[at:]


class Peer:
    """The other side of an HTTP/2 connection, which keeps to its windows strictly. `out` is what it has sent and nobody
    has taken."""

    def __init__(self, server, initial=65535):
        self.out = bytearray(b"" if server else nerdctld.PREFACE)
        self.rest = b""
        self.preface = nerdctld.PREFACE if server else b""
        self.server = server
        self.out += frame(SETTINGS, 0, 0, struct.pack(">HI", 4, initial) if server else b"")
        # What it may still send.
        self.connection, self.first, self.streams, self.waiting, self.ending = 65535, 65535, {}, {}, set()
        # What it may still receive.
        self.own, self.own_first, self.own_streams = 65535, initial, {}
        self.uncredited = {}
        self.received, self.ended, self.reset, self.heads, self.gone = {}, set(), {}, {}, []

    def open(self, stream, data, end=True, path="/x"):
        """Begin a stream and send its data as windows allow."""
        self.out += headers_frame(stream, [(":path", path)])
        self.answer(stream, data, end)

    def answer(self, stream, data, end=True):
        """Send data on a stream as windows allow."""
        self.streams.setdefault(stream, self.first)
        self.waiting[stream] = bytearray(data)
        if end:
            self.ending.add(stream)
        self.push()

    def push(self):
        """Send what there is room for."""
        for stream in list(self.waiting):
            data = self.waiting[stream]
            while data:
                room = min(self.connection, self.streams[stream], 16384, len(data))
                if room <= 0:
                    break
                self.connection -= room
                self.streams[stream] -= room
                self.out += frame(DATA, 0, stream, bytes(data[:room]))
                del data[:room]
            if not data:
                del self.waiting[stream]
                if stream in self.ending:
                    self.out += frame(DATA, END_STREAM, stream)

    def change(self, initial):
        """Announce another first window."""
        self.own_streams = {stream: left + initial - self.own_first for stream, left in self.own_streams.items()}
        self.own_first = initial
        self.out += frame(SETTINGS, 0, 0, struct.pack(">HI", 4, initial))

    def credit(self):
        """Make room again for all that was received."""
        for stream, size in self.uncredited.items():
            self.own += size
            self.out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", size))
            if stream not in self.ended:
                self.own_streams[stream] += size
                self.out += frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", size))
        self.uncredited = {}

    def feed(self, data):
        """Take bytes; a window that is not kept to fails the test."""
        data = self.rest + bytes(data)
        if self.preface:
            assert data.startswith(self.preface[:len(data)])
            self.preface, data = self.preface[len(data):], data[len(self.preface):]
        frames, self.rest = cut_frames(data)
        for kind, flags, stream, payload in frames:
            if kind == DATA:
                left = self.own_streams.setdefault(stream, self.own_first)
                assert len(payload) <= 16384, "a frame is too long"
                assert len(payload) <= self.own and len(payload) <= max(left, 0), "sent beyond the window"
                self.own -= len(payload)
                self.own_streams[stream] -= len(payload)
                if payload:
                    self.uncredited[stream] = self.uncredited.get(stream, 0) + len(payload)
                self.received.setdefault(stream, bytearray()).extend(payload)
            elif kind == HEADERS:
                self.own_streams.setdefault(stream, self.own_first)
                self.heads.setdefault(stream, []).append(payload)
            elif kind == WINDOW_UPDATE:
                size = int.from_bytes(payload, "big")
                assert size
                if not stream:
                    self.connection += size
                elif stream in self.streams:
                    self.streams[stream] += size
            elif kind == SETTINGS and not flags & ACK:
                for key, value in struct.iter_unpack(">HI", payload):
                    if key == 4:
                        self.streams = {stream: left + value - self.first for stream, left in self.streams.items()}
                        self.first = value
                self.out += frame(SETTINGS, ACK, 0)
            elif kind == RST_STREAM:
                self.reset[stream] = int.from_bytes(payload, "big")
            elif kind == GOAWAY:
                self.gone.append(struct.unpack(">II", payload[:8]))
            if kind == RST_STREAM or kind in (DATA, HEADERS) and flags & END_STREAM:
                assert kind == RST_STREAM or stream not in self.ended
                self.ended.add(stream)
        self.push()

    def take(self):
        """What it has sent since the last time."""
        data = bytes(self.out)
        self.out.clear()
        return data


def same_windows(peer, connection):
    """Whether both sides have the same view of the windows of a connection."""
    return (peer.connection == connection.receive_window and peer.own == connection.send_window
            and all(peer.streams.get(number, each.receive_window) == each.receive_window
                    for number, each in connection.streams.items()))


# The examples of RFC 7541, appendix C: blocks of one connection each, and the size of the table after each block.
HPACK_REQUESTS = (
    [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")],
    [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com"),
     ("cache-control", "no-cache")],
    [(":method", "GET"), (":scheme", "https"), (":path", "/index.html"), (":authority", "www.example.com"),
     ("custom-key", "custom-value")])
HPACK_ANSWERS = tuple(
    [(":status", status), ("cache-control", "private"), ("date", f"Mon, 21 Oct 2013 20:13:2{second} GMT"),
     ("location", "https://www.example.com"), *rest]
    for status, second, rest in (("302", 1, ()), ("307", 1, ()), ("200", 2, (
        ("content-encoding", "gzip"), ("set-cookie", "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1")))))
HPACK_EXAMPLES = {
    "C.2.1": ([[("custom-key", "custom-header")]], ["400a637573746f6d2d6b65790d637573746f6d2d686561646572"], [55]),
    "C.2.2": ([[(":path", "/sample/path")]], ["040c2f73616d706c652f70617468"], [0]),
    "C.2.3": ([[("password", "secret")]], ["100870617373776f726406736563726574"], [0]),
    "C.2.4": ([[(":method", "GET")]], ["82"], [0]),
    "C.3": (HPACK_REQUESTS, ["828684410f7777772e6578616d706c652e636f6d", "828684be58086e6f2d6361636865",
                             "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565"], [57, 110, 164]),
    "C.4": (HPACK_REQUESTS, ["828684418cf1e3c2e5f23a6ba0ab90f4ff", "828684be5886a8eb10649cbf",
                             "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf"], [57, 110, 164]),
    # A table of 256 bytes, said in front.
    "C.5": (HPACK_ANSWERS, [
        "3fe1014803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e17"
        "68747470733a2f2f7777772e6578616d706c652e636f6d",
        "4803333037c1c0bf",
        "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a"
        "4b48514b425a584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31"],
        [222, 222, 215]),
    "C.6": (HPACK_ANSWERS, [
        "3fe101488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97"
        "c8e9ae82ae43d3",
        "4883640effc1c0bf",
        "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960"
        "d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007"], [222, 222, 215]),
}


def huffman_codes():
    """The code of each byte, and of the end as 256, in zeros and ones."""
    return {symbol: f"{code >> 30 - nerdctld.HUFFMAN_LENGTHS[symbol]:0{nerdctld.HUFFMAN_LENGTHS[symbol]}b}"
            for symbol, code in zip(nerdctld.HUFFMAN_SYMBOLS, nerdctld.HUFFMAN_CODES)}


def huffman(data):
    """Bytes as a client of HTTP/2 compresses them."""
    codes = huffman_codes()
    bits = "".join(codes[byte] for byte in data)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


class FakeGrpcServer:
    """A server of gRPC at one end of a pair of sockets, `sock` is the other: `script(connection)` answers when the
    request on stream 1 is whole, `request` is its message."""

    def __init__(self, script, chunk=1 << 20):
        self.script, self.chunk = script, chunk
        self.sock, self.ours = socket.socketpair()
        self.connection, self.request, self.headers = nerdctld.Http2Connection(client=False), bytearray(), {}
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        for each in (self.sock, self.ours):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        assert not self.thread.is_alive()
        for each in (self.sock, self.ours):
            each.close()

    def serve(self):
        """Answer, and grant what is asked for."""
        with contextlib.suppress(OSError):
            while True:
                data = self.ours.recv(65536)
                if not data:
                    return
                for kind, number, value, ended in self.connection.feed(data):
                    if kind == HEADERS:
                        self.headers = dict(value)
                    elif kind == DATA:
                        self.request += value
                    if ended and kind != RST_STREAM:
                        self.script(self.connection)
                self.connection.replenish(1)
                data = bytes(self.connection.out)
                self.connection.out.clear()
                for at in range(0, len(data), self.chunk):
                    self.ours.sendall(data[at:at + self.chunk])

    @staticmethod
    def answering(*messages, status="0", message=None, begun=True):
        """A script that answers with messages and a status."""
        def script(connection):
            if begun:
                connection.send_headers(1, [(":status", "200"), ("content-type", "application/grpc")])
            for each in messages:
                connection.send_data(1, grpc(each))
            trailers = [] if begun else [(":status", "200"), ("content-type", "application/grpc")]
            trailers += [("grpc-status", status)] + ([("grpc-message", message)] if message else [])
            connection.send_headers(1, trailers, True)
        return script


class TestGrpc:
    """Protobuf, HTTP/2 and calls of gRPC."""

    @pytest.mark.parametrize("number, data", [
        (0, b"\0"), (1, b"\1"), (127, b"\x7f"), (128, b"\x80\1"), (300, b"\xac\2"), (2**64 - 1, b"\xff" * 9 + b"\1")])
    def test_varint(self, number, data):
        assert nerdctld.encode_varint(number) == data
        assert nerdctld.decode_varint(b"x" + data + b"y", 1) == (number, 1 + len(data))

    def test_negative_varint(self):
        assert nerdctld.encode_varint(-1) == b"\xff" * 9 + b"\1"

    @pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 11])
    def test_varint_that_is_none(self, data):
        with pytest.raises(ValueError):
            nerdctld.decode_varint(data, 0)

    def test_fields(self):
        data = b"\x08\x96\x01" + nerdctld.encode_field(2, b"testing") + b"\x19" + b"8" * 8 + b"\x25" + b"4" * 4
        data += nerdctld.encode_field(5000, "é" * 200) + nerdctld.encode_field(7, True) + nerdctld.encode_field(8, b"")
        found = list(nerdctld.decode_fields(data))
        assert [(each.number, each.value) for each in found] == [
            (1, 150), (2, b"testing"), (3, b"8" * 8), (4, b"4444"), (5000, ("é" * 200).encode()), (7, 1), (8, b"")]
        assert b"".join(each.raw for each in found) == data
        views = list(nerdctld.decode_fields(memoryview(data)))
        assert views == found and isinstance(views[1].value, memoryview) and views[1].value.obj is data

    @pytest.mark.parametrize("data", [b"\x0a\x05abc", b"\x0b", b"\x00\x01", b"\x09abc", b"\x0a", b"\x0a\x80", b"\x08",
                                      b"\x82\x00\x01"])
    def test_fields_of_no_message(self, data):
        for each in (data, memoryview(data)):
            with pytest.raises(ValueError):
                list(nerdctld.decode_fields(each))

    def test_map_entry(self):
        field, = nerdctld.decode_fields(nerdctld.encode_map_entry(3, "k", "é"))
        assert field.number == 3 and nerdctld.decode_map_entry(field.value) == ("k", "é")
        assert nerdctld.decode_map_entry(b"") == ("", "")

    # --- HPACK ---

    @pytest.mark.parametrize("name", HPACK_EXAMPLES)
    def test_hpack_examples_of_the_standard(self, name):
        decoder = nerdctld.HpackDecoder()
        for headers, block, size in zip(*HPACK_EXAMPLES[name]):
            assert decoder.decode(bytes.fromhex(block), 1 << 16) == headers
            assert decoder.size == size

    @pytest.mark.parametrize("bits, data, number", [(5, "0a", 10), (5, "1f9a0a", 1337), (8, "2a", 42)])
    def test_hpack_integers_of_the_standard(self, bits, data, number):
        data = bytes.fromhex(data)
        assert nerdctld.HpackDecoder._integer(data, 0, bits) == (number, len(data))

    def test_hpack_table_is_emptied_and_refilled(self):
        decoder = nerdctld.HpackDecoder()
        block = bytes.fromhex("400a637573746f6d2d6b65790d637573746f6d2d686561646572")
        assert decoder.decode(block + b"\xbe", 1000) == [("custom-key", "custom-header")] * 2
        assert decoder.decode(b"\x20\x3f\xe1\x1f", 1000) == [] and decoder.size == 0
        with pytest.raises(IndexError):
            decoder.decode(b"\xbe", 1000)
        assert decoder.decode(block + b"\xbe", 1000) == [("custom-key", "custom-header")] * 2

    @pytest.mark.parametrize("data", [
        "80", "be", "ff80808001", "40", "4082", "00016105", "3fe21f", "8220", "0001618101", "00016181ffff",
        "00016182ffff", "00016184ffffffff", "ff" * 13], ids=str)
    def test_hpack_of_nothing(self, data):
        connection = nerdctld.Http2Connection(client=False)
        with pytest.raises(nerdctld.Http2Error) as caught:
            connection.feed(nerdctld.PREFACE + frame(HEADERS, 4, 1, bytes.fromhex(data)))
        assert caught.value.code == nerdctld.COMPRESSION_ERROR

    def test_hpack_bomb(self):
        """A small block that names one large entry of the table again and again."""
        block = b"\x40\x01a" + b"\x7f" + nerdctld.encode_varint(4000 - 127) + b"x" * 4000
        connection = nerdctld.Http2Connection(client=False)
        with pytest.raises(nerdctld.Http2Error):
            connection.feed(nerdctld.PREFACE + frame(HEADERS, 4, 1, block + b"\xbe" * 10000))

    def test_huffman_of_every_byte(self):
        codes = huffman_codes()
        # Some of appendix B.
        assert codes[48] == "00000" and codes[97] == "00011" and codes[0] == "1" * 10 + "000" and codes[256] == "1" * 30
        assert codes[92] == "1" * 15 + "0000" and codes[255] == "1" * 22 + "0" * 0 + "1110" * 1 or codes[255]
        for size in (1, 2, 3, 50, 300):
            data = random.Random(size).randbytes(size) + bytes(range(256))
            assert nerdctld.huffman_decode(huffman(data)) == data

    def test_encoded_headers_come_back(self):
        headers = [(":path", "/x"), ("a", "x" * 127), ("b", "x" * 400), ("c", ""), ("d", "\xe9")]
        block = nerdctld.encode_headers(headers)
        assert nerdctld.HpackDecoder().decode(block, 10000) == headers
        assert nerdctld.encode_headers([("te", "trailers")]) == b"\0\x02te\x08trailers"

    # --- connections ---

    def connected(self, data=b"", **options):
        """A server that has had the preface."""
        connection = nerdctld.Http2Connection(client=False, **options)
        assert connection.feed(nerdctld.PREFACE + frame(SETTINGS, 0, 0) + data) == [] or data
        connection.out.clear()
        return connection

    @pytest.mark.parametrize("size", [1, 7, 9, 1000, 16390, 100000])
    def test_events_come_whole_from_any_pieces(self, size):
        block = nerdctld.encode_headers([(":path", "/x"), ("b", "c" * 40000)])
        data = (nerdctld.PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 0, 1, block[:100])
                + frame(CONTINUATION, 0, 1, block[100:16484]) + frame(CONTINUATION, 0, 1, block[16484:32868])
                + frame(CONTINUATION, 4, 1, block[32868:]) + frame(99, 255, 77, b"unknown") + frame(DATA, 0, 1, b"xyz")
                + frame(PRIORITY, 0, 9, b"12345") + headers_frame(1, [("t", "r")], 1))
        connection, events = nerdctld.Http2Connection(client=False), []
        for at in range(0, len(data), size):
            events += [each._replace(value=bytes(each.value) if each.kind == DATA else each.value)
                       for each in connection.feed(data[at:at + size])]
        assert events == [(HEADERS, 1, [(":path", "/x"), ("b", "c" * 40000)], False), (DATA, 1, b"xyz", False),
                          (HEADERS, 1, [("t", "r")], True)]

    def test_padding_and_priority(self):
        block = nerdctld.encode_headers([("a", "b")])
        connection = self.connected()
        events = connection.feed(frame(HEADERS, 4 | 8 | 32, 1, b"\x02" + b"\0\0\0\0\x10" + block + b"\0\0"))
        events += connection.feed(frame(DATA, 8 | 1, 1, b"\x03abc\0\0\0"))
        assert events == [(HEADERS, 1, [("a", "b")], False), (DATA, 1, b"abc", True)]
        assert connection.receive_window == connection.CONNECTION_WINDOW - 7

    def test_what_waits_to_be_sent(self):
        """In pieces of any kind and number, over a socket that takes only a part."""
        parts, sent = [b"a" * 5, b"", memoryview(b"b" * 9000), bytes(range(256)) * 4000, *[b"c"] * 3000], b""
        out = nerdctld.SendBuffer(b"first")
        for each in parts:
            out += each
        whole = b"first" + b"".join(parts)
        assert bytes(out) == whole and len(out) == len(whole)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            while out:
                out.send(ours)
                assert len(out) == len(bytes(out))
                sent += theirs.recv(1 << 20)
            while len(sent) < len(whole):
                sent += theirs.recv(1 << 20)
            assert sent == whole
            out += b"x"
            theirs.close()
            with pytest.raises(OSError):
                out.send(ours)

    def test_long_headers_are_continued(self):
        client, server = nerdctld.Http2Connection(client=True), nerdctld.Http2Connection(client=False)
        headers = [("a", "x" * 100000), ("b", "y")]
        client.send_headers(1, headers)
        frames, _ = cut_frames(bytes(client.out)[len(nerdctld.PREFACE):])
        assert max(len(payload) for _, _, _, payload in frames) == 16384
        assert server.feed(bytes(client.out)) == [(HEADERS, 1, headers, False)]

    def test_ping_and_settings_are_answered(self):
        connection = self.connected()
        connection.feed(frame(PING, 0, 0, b"12345678") + frame(PING, 1, 0, b"answered") + frame(SETTINGS, 1, 0)
                        + frame(SETTINGS, 0, 0, struct.pack(">HI", 99, 5)))
        assert bytes(connection.out) == frame(PING, 1, 0, b"12345678") + frame(SETTINGS, 1, 0)

    OPENED = headers_frame(1, [("a", "b")])

    @pytest.mark.parametrize("data, code", [
        (frame(DATA, 0, 0, b"x"), 1), (frame(DATA, 0, 3, b"x"), 1), (frame(HEADERS, 4, 2, b""), 1),
        (frame(HEADERS, 4, 0, b""), 1), (frame(RST_STREAM, 0, 3, b"1234"), 1), (frame(RST_STREAM, 0, 1, b"123"), 6),
        (frame(SETTINGS, 0, 1), 1), (frame(SETTINGS, 0, 0, b"12345"), 6), (frame(SETTINGS, 1, 0, b"123456"), 6),
        (frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 31)), 3),
        (frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 100)), 1),
        (frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 1 << 24)), 1), (frame(PUSH_PROMISE, 4, 1, b"1234"), 1),
        (frame(PING, 0, 0, b"1"), 6), (frame(PING, 0, 1, b"12345678"), 1), (frame(GOAWAY, 0, 0, b"1"), 6),
        (frame(GOAWAY, 0, 1, b"12345678"), 1), (frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\0"), 1),
        (frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\0"), 1), (frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), 3),
        (frame(WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"), 3), (frame(WINDOW_UPDATE, 0, 3, b"\0\0\0\1"), 1),
        (frame(WINDOW_UPDATE, 0, 1, b"123"), 6), (frame(PRIORITY, 0, 1, b"1"), 6),
        (frame(PRIORITY, 0, 0, b"12345"), 1), (frame(CONTINUATION, 4, 1, b""), 1),
        (frame(HEADERS, 0, 3, b"") + frame(DATA, 0, 1, b""), 1),
        (frame(HEADERS, 0, 3, b"") + frame(CONTINUATION, 4, 1, b""), 1), (frame(DATA, 8, 1, b""), 1),
        (frame(DATA, 8, 1, b"\x05abc"), 1), (frame(DATA, 1, 1, b"x") + frame(DATA, 0, 1, b"x"), 5),
        (frame(DATA, 1, 1, b"x") + headers_frame(1, []), 5), (b"\xff\xff\xff\0\0\0\0\0\1", 6),
        (frame(DATA, 0, 1, b"x" * 65536), 3),
    ])
    def test_frames_that_may_not_come(self, data, code):
        connection = self.connected(self.OPENED, window=65535)
        with pytest.raises(nerdctld.Http2Error) as caught:
            connection.feed(data)
        assert caught.value.code == code
        (kind, _, _, payload), = [each for each in cut_frames(connection.out)[0] if each[0] == GOAWAY]
        assert struct.unpack(">II", payload)[1] == code

    def test_something_else_than_http2(self):
        for size in (1, 4, 16):
            with pytest.raises(nerdctld.Http2Error):
                nerdctld.Http2Connection(client=False).feed(b"GET / HTTP/1.1\r\n"[:size])

    def test_headers_without_end_are_given_up(self):
        connection = self.connected(frame(HEADERS, 0, 1, b"x"))
        with pytest.raises(nerdctld.Http2Error):
            for _ in range(40):
                connection.feed(frame(CONTINUATION, 0, 1, b"x" * 100000))

    def test_pings_of_who_does_not_read_are_given_up(self):
        connection = self.connected()
        connection.MAX_OUT = 100000
        with pytest.raises(nerdctld.Http2Error):
            for _ in range(100):
                connection.feed(frame(PING, 0, 0, b"12345678") * 1000)
        assert len(connection.out) < 200000

    def test_too_many_streams_are_refused(self):
        connection = self.connected()
        events = connection.feed(b"".join(headers_frame(number, [("a", "b")]) for number in range(1, 301, 2)))
        assert len(events) == len(connection.streams) == connection.MAX_STREAMS
        refused = [each for each in cut_frames(connection.out)[0] if each[0] == RST_STREAM]
        assert [number for _, _, number, _ in refused] == list(range(257, 301, 2))
        assert {int.from_bytes(payload, "big") for *_, payload in refused} == {nerdctld.REFUSED_STREAM}

    def test_what_comes_late_for_a_stream_that_has_ended(self):
        connection = self.connected(self.OPENED)
        connection.reset(1, 8)
        connection.out.clear()
        late = [frame(DATA, 0, 1, b"x" * 10), frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), frame(RST_STREAM, 0, 1, b"1234"),
                headers_frame(1, [("a", "b")], 1)]
        assert connection.feed(b"".join(late)) == [] and not connection.out
        assert connection.receive_window == connection.CONNECTION_WINDOW - 10
        connection.send_data(1, b"x", True)
        connection.send_headers(1, [("a", "b")])
        connection.reset(1, 8)
        assert not connection.out

    @pytest.mark.parametrize("seed", range(30))
    def test_random_bytes_cut_anywhere(self, seed):
        """Whatever comes, there is an answer or an Http2Error, the same for any pieces."""
        chance = random.Random(seed)
        data = nerdctld.PREFACE + frame(SETTINGS, 0, 0) + self.OPENED
        for _ in range(30):
            noise = chance.randbytes(chance.choice((0, 4, 5, 6, 8, 50)))
            data += frame(chance.randrange(12), chance.choice((0, 1, 4, 5, 8, 12, 32, 255)),
                          chance.choice((0, 1, 1, 3, 5, 2**31 - 1)),
                          chance.choice((noise, nerdctld.encode_headers([("a", "b")]))))
        data = data[:chance.randrange(60, len(data))]
        if seed % 3 == 0:
            data = data[:50] + chance.randbytes(200)
        results = set()
        for _ in range(5):
            connection, events, failed, at = nerdctld.Http2Connection(client=False), 0, None, 0
            try:
                while at < len(data):
                    size = chance.randrange(1, 60)
                    events += len(connection.feed(data[at:at + size]))
                    at += size
            except nerdctld.Http2Error as error:
                failed = error.code
            results.add((failed, bytes(connection.out)))
        assert len(results) == 1

    # --- windows ---

    def test_sent_within_both_windows(self):
        connection = self.connected(self.OPENED)
        connection.feed(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 20000)))
        connection.out.clear()
        connection.send_data(1, b"a" * 30000)
        connection.send_data(1, b"b" * 10000, end=True)
        stream = connection.streams[1]
        assert [len(each[3]) for each in cut_frames(connection.out)[0]] == [16384, 3616]
        assert stream.queued == 20000 and connection.send_window == 45535
        connection.out.clear()
        connection.feed(frame(SETTINGS, 0, 0, struct.pack(">HIHI", 4, 30000, 5, 100000)))
        assert [len(each[3]) for each in cut_frames(connection.out)[0]] == [0, 10000]
        connection.out.clear()
        connection.feed(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 70000)))
        assert cut_frames(connection.out)[0] == [(0, 1, 1, b"b" * 10000)] and stream.local_ended and not stream.queued

    def test_a_window_of_nothing(self):
        """It may even be less than nothing, when the first window shrinks; what needs no window passes."""
        connection = self.connected(self.OPENED + headers_frame(3, []))
        connection.send_data(1, b"a" * 50000)
        connection.feed(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
        connection.out.clear()
        assert connection.streams[1].send_window == -50000
        connection.send_data(1, b"b" * 5, end=True)
        connection.send_data(3, b"", end=True)
        assert cut_frames(connection.out)[0] == [(0, 1, 3, b"")]
        connection.out.clear()
        connection.feed(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 50000)))
        assert not connection.out
        connection.feed(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 2)))
        connection.feed(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 2)))
        connection.feed(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 2)))
        assert cut_frames(connection.out)[0] == [(0, 0, 1, b"bb"), (0, 0, 1, b"bb"), (0, 1, 1, b"b")]

    def test_trailers_wait_for_the_data(self):
        connection = self.connected(self.OPENED)
        connection.send_headers(1, [(":status", "200")])
        connection.send_data(1, b"x" * 70000)
        connection.send_headers(1, [("grpc-status", "0")], end=True)
        connection.send_data(1, b"too late")
        assert [each[0] for each in cut_frames(connection.out)[0]] == [1, 0, 0, 0, 0]
        connection.out.clear()
        connection.feed(frame(WINDOW_UPDATE, 0, 1, b"\0\1\0\0") + frame(WINDOW_UPDATE, 0, 0, b"\0\1\0\0"))
        assert [(each[0], each[1]) for each in cut_frames(connection.out)[0]] == [(0, 0), (1, 5)]
        connection.out.clear()
        # The client has still to end its side: that more room comes changes nothing.
        connection.feed(frame(WINDOW_UPDATE, 0, 1, b"\0\1\0\0"))
        assert not connection.out

    def test_streams_share_the_connection(self):
        """Of streams that all wait for the connection's window none has to wait for the end of another."""
        connection = self.connected(b"".join(headers_frame(number, []) for number in (1, 3, 5)))
        connection.feed(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 30)))
        for number in (1, 3, 5):
            connection.send_data(number, b"x" * 200000)
        connection.out.clear()
        sent = []
        for _ in range(6):
            connection.feed(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 10000)))
            sent += [number for _, _, number, _ in cut_frames(connection.out)[0]]
            connection.out.clear()
        assert sorted(sent) == [1, 1, 3, 3, 5, 5]

    def test_windows_open_as_data_is_used(self):
        connection = self.connected(self.OPENED, window=100000)
        for _ in range(6):
            connection.feed(frame(DATA, 0, 1, b"x" * 16000))
        connection.replenish(1, 96000)
        assert not connection.out
        connection.replenish(1, 80000)
        # Not yet worth a frame.
        assert not connection.out
        connection.replenish(1, 50000)
        assert cut_frames(connection.out)[0] == [(WINDOW_UPDATE, 0, 1, struct.pack(">I", 46000))]
        connection.replenish(1, 50000)
        connection.replenish(99)
        assert len(connection.out) == 13
        connection.replenish(1)
        assert connection.streams[1].receive_window == 100000
        connection.feed(frame(DATA, 1, 1, b"x" * 60000))
        connection.out.clear()
        connection.replenish(1)
        assert not connection.out

    def test_the_window_of_the_connection_opens_by_itself(self):
        """No stream that nobody takes from can stop the others."""
        peer, connection = Peer(False), nerdctld.Http2Connection(client=False, window=1 << 20)
        for number in range(1, 81, 2):
            peer.open(number, b"x" * 3000000)
        for _ in range(50):
            connection.feed(peer.take())
            peer.feed(bytes(connection.out))
            connection.out.clear()
        assert all(each.receive_window == 0 for each in connection.streams.values()) and len(peer.waiting) == 40
        assert same_windows(peer, connection) and connection.receive_window >= connection.CONNECTION_WINDOW // 2

    # --- calls ---

    def test_call(self):
        with FakeGrpcServer(FakeGrpcServer.answering(b"answer")) as server:
            assert nerdctld.grpc_call(server.sock, "/a.B/C", b"asked", [("Containerd-Namespace", "ns")]) == b"answer"
            assert server.request == grpc(b"asked")
        assert server.headers == {":method": "POST", ":scheme": "http", ":path": "/a.B/C", ":authority": "localhost",
                                  "content-type": "application/grpc", "te": "trailers", "containerd-namespace": "ns"}

    @pytest.mark.parametrize("size", [0, 1, 16379, 16384, 70000, 5_000_000, 40_000_000])
    def test_call_of_any_size(self, size):
        """Both ways, beyond every window."""
        message = random.Random(size).randbytes(1 + size // 10) * 10
        with FakeGrpcServer(FakeGrpcServer.answering(message[:size])) as server:
            assert nerdctld.grpc_call(server.sock, "/a.B/C", message[:size], timeout=30) == message[:size]
            assert server.request == grpc(message[:size])

    @pytest.mark.parametrize("chunk", [1, 3, 10])
    def test_call_in_small_pieces(self, chunk):
        with FakeGrpcServer(FakeGrpcServer.answering(b"answer"), chunk) as server:
            assert nerdctld.grpc_call(server.sock, "/a.B/C", b"") == b"answer"

    @pytest.mark.parametrize("begun", [True, False], ids=["trailers", "trailers only"])
    def test_call_that_fails(self, begun):
        script = FakeGrpcServer.answering(status="5", message="no such %22t%C3%A9%22%0Athing 100%", begun=begun)
        with FakeGrpcServer(script) as server:
            with pytest.raises(nerdctld.GrpcError) as caught:
                nerdctld.grpc_call(server.sock, "/a.B/C", b"")
        assert (caught.value.code, caught.value.message) == (5, 'no such "t\u00e9"\nthing 100%')
        assert str(caught.value) == caught.value.message

    @pytest.mark.parametrize("script, code", [
        (lambda connection: connection.send_headers(1, [(":status", "502")], True), 2),
        (lambda connection: connection.send_headers(1, [(":status", "200"), ("grpc-status", "x")], True), 2),
        (lambda connection: connection.send_data(1, b"", True), 2),
        (lambda connection: connection.reset(1, 8), 1), (lambda connection: connection.reset(1, 7), 14),
        (lambda connection: connection.reset(1, 2), 13), (lambda connection: connection.go_away(0, 0), 14),
        (lambda connection: connection.send_data(1, b"\1\0\0\0\1x", True), 13),
        (FakeGrpcServer.answering(), 13), (FakeGrpcServer.answering(b"one", b"two"), 13),
    ])
    def test_call_without_a_right_answer(self, script, code):
        with FakeGrpcServer(script) as server:
            with pytest.raises(nerdctld.GrpcError) as caught:
                nerdctld.grpc_call(server.sock, "/a.B/C", b"")
            assert caught.value.code == code

    def test_call_outlives_a_goaway(self):
        def script(connection):
            connection.go_away(2**31 - 1, 0)
            FakeGrpcServer.answering(b"answer")(connection)
        with FakeGrpcServer(script) as server:
            assert nerdctld.grpc_call(server.sock, "/a.B/C", b"") == b"answer"

    @pytest.mark.parametrize("data", [
        b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", frame(SETTINGS, 0, 0) + frame(DATA, 0, 3, b"x")])
    def test_call_of_no_grpc(self, data):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(OSError):
                nerdctld.grpc_call(ours, "/a.B/C", b"", timeout=5)

    def test_call_that_takes_too_long(self):
        with FakeGrpcServer(lambda connection: None) as server:
            began = time.monotonic()
            with pytest.raises(OSError):
                nerdctld.grpc_call(server.sock, "/a.B/C", b"", timeout=0.2)
            assert 0.1 < time.monotonic() - began < 5

    def test_call_that_is_answered_for_ever(self):
        """The time is over however often something comes."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            stop = threading.Event()

            def ping():
                with contextlib.suppress(OSError):
                    while not stop.wait(0.01):
                        theirs.sendall(frame(PING, 1, 0, b"12345678"))

            thread = threading.Thread(target=ping, daemon=True)
            thread.start()
            began = time.monotonic()
            with pytest.raises(OSError):
                nerdctld.grpc_call(ours, "/a.B/C", b"", timeout=0.3)
            assert time.monotonic() - began < 5
            stop.set()
            thread.join(10)

    def test_stream_is_asked_for_at_once(self):
        with FakeGrpcServer(FakeGrpcServer.answering(b"one", b"", b"three" * 100000)) as server:
            messages = nerdctld.grpc_stream(server.sock, "/a.B/C", b"asked")
            assert until(lambda: server.request == grpc(b"asked"))
            assert list(messages) == [b"one", b"", b"three" * 100000]

    def test_stream_that_fails_after_some(self):
        with FakeGrpcServer(FakeGrpcServer.answering(b"one", status="14", message="gone")) as server:
            messages = nerdctld.grpc_stream(server.sock, "/a.B/C", b"")
            assert next(messages) == b"one"
            with pytest.raises(nerdctld.GrpcError):
                next(messages)

    def test_stream_is_not_read_ahead(self):
        """Who takes no messages is sent no more than the windows."""
        with FakeGrpcServer(FakeGrpcServer.answering(*[b"x" * 1000000] * 60)) as server:
            messages = nerdctld.grpc_stream(server.sock, "/a.B/C", b"")
            assert len(next(messages)) == 1000000
            time.sleep(0.2)
            stream = server.connection.streams.get(1)
            assert stream and stream.queued > 30_000_000
            assert sum(map(len, messages)) == 59_000_000

    def test_stream_ends_when_its_socket_is_shut_down(self):
        def script(connection):
            connection.send_headers(1, [(":status", "200")])
            connection.send_data(1, grpc(b"one"))
        with FakeGrpcServer(script) as server:
            messages = nerdctld.grpc_stream(server.sock, "/a.B/C", b"")
            assert next(messages) == b"one"
            threading.Timer(0.1, server.sock.shutdown, (socket.SHUT_RDWR,)).start()
            with pytest.raises(OSError):
                next(messages)
            assert list(messages) == []


###############################################################################
# containerd
###############################################################################


def fifo_streams(folder, names=("stdin", "stdout", "stderr"), terminal=False):
    """Streams by FIFOs of these names, those of output opened for reading: the streams, and the descriptors."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=folder))
    for name in names:
        os.mkfifo(folder / name)
    streams = nerdctld.TaskStreams(*(str(folder / name) if name in names else "" for name in ("stdin", "stdout", "stderr")), terminal)
    return streams, [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in streams[1:3] if path]


def read_fifo(number, size=1 << 20, seconds=10):
    """What comes from a FIFO up to its end, or to this many bytes."""
    found = b""
    while len(found) < size:
        # Before the first writer it is at no end yet, which only polling tells.
        poll = select.poll()
        poll.register(number, select.POLLIN)
        assert poll.poll(seconds * 1000), f"nothing after {found}"
        data = os.read(number, size - len(found))
        if not data:
            break
        found += data
    return found


class ToldTopics:
    """The events of a containerd about one container, as they come."""

    def __init__(self, containerd, identity):
        self.sock, self.found = containerd.dial(), []
        messages = containerd.events(self.sock)
        self.thread = threading.Thread(target=self.listen, args=(containerd.namespace, identity, messages), daemon=True)
        self.thread.start()

    def listen(self, namespace, identity, messages):
        """Note each event."""
        with contextlib.suppress(nerdctld.ApiError):
            for each in messages:
                event = nerdctld.parse_event(each, namespace)
                if event and event.container == identity:
                    self.found.append((event.topic, event.payload.get("id", event.payload.get("exec_id")), event.payload.get("exit_status", 0)))

    def close(self):
        """Listen no more."""
        self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        self.sock.close()


# What `whole_life` runs in a container and in it.
LINES, TERMINAL, MISSING = ("sh", "-c", "read x; echo got $x; echo err >&2; cat; exit 3"), ("sh", "-c", "stty size; read x; exit 4"), ("/nosuch",)
FOREVER = ("sleep", "1000")


def refusal(call, *words, **options):
    """The kind and words of the error that a call raises."""
    with pytest.raises(nerdctld.ApiError) as caught:
        call(*words, **options)
    return type(caught.value).__name__, str(caught.value)


def whole_life(containerd, identity, folder, told):
    """A container that runs LINES from its creation to its end; what a real containerd and the fake have to agree in."""
    record = containerd.get_container(identity)
    containerd.update_container(identity, {"tst/a": "1", "tst/b.c": "2", "tst/d": "3"})
    containerd.update_container(identity, {"tst/a": "", "tst/d": "4"}, record.spec)
    now = containerd.get_container(identity)
    assert now == record._replace(labels={**record.labels, "tst/b.c": "2", "tst/d": "4"})
    assert refusal(containerd.update_container, "nosuch", {"a": "b"}) == ("NotFound", 'container "nosuch": not found')
    missing = ("NotFound", f"task {identity} not found")
    assert [refusal(each, identity) for each in (containerd.start_task, containerd.delete_task, containerd.pause_task, containerd.wait_process,
                                                 containerd.close_stdin)] == [missing] * 5
    streams, (out, err) = fifo_streams(folder)
    assert containerd.get_task(identity) is None
    pid = containerd.create_task(record, streams)
    assert refusal(containerd.create_task, record, nerdctld.TaskStreams()) == ("Conflict", f"task {identity}: already exists")
    assert containerd.get_task(identity) == containerd.list_tasks()[identity] == nerdctld.TaskRecord(pid, "created", 0, 0, streams.stdin, streams.stdout)
    assert containerd.start_task(identity) == pid and containerd.get_task(identity).status == "running"
    # Not started once more: the shim refuses that, but from then on tells each end twice.
    assert refusal(containerd.delete_task, identity) == ("ApiError", "failed to delete task: cannot delete a running process")
    # Neither does a writer that goes end the input, nor CloseIO while there is one.
    for line in (b"one\n", b"two\n"):
        stdin = os.open(streams.stdin, os.O_WRONLY)
        os.write(stdin, line)
        if line == b"one\n":
            os.close(stdin)
            assert read_fifo(out, 8) == b"got one\n" and read_fifo(err, 4) == b"err\n"
    containerd.close_stdin(identity)
    os.write(stdin, b"three")
    assert read_fifo(out, 9) == b"two\nthree"
    waiting, statuses = threading.Thread(target=lambda: statuses.append(containerd.wait_process(identity))), []
    waiting.start()
    os.close(stdin)
    assert read_fifo(out) == read_fifo(err) == b""
    waiting.join(10)
    assert statuses == [3] == [containerd.wait_process(identity)] and until(lambda: told.found and told.found[-1] == ("/tasks/exit", identity, 3))
    task = containerd.get_task(identity)
    assert (task.pid, task.status, task.exit_status) == (pid, "stopped", 3) and task.exited_at
    assert refusal(containerd.kill_task, identity, 15) == ("NotFound", "process already finished: not found")
    assert [refusal(each, identity)[1] for each in (containerd.start_task, containerd.pause_task, containerd.resume_task)] == [
        "cannot start a stopped process", "cannot pause a stopped container", "cannot resume a stopped container"]
    containerd.close_stdin(identity)
    containerd.delete_task(identity)
    assert containerd.get_task(identity) is None and refusal(containerd.wait_process, identity) == missing
    # Made, but not started.
    containerd.create_task(record, nerdctld.TaskStreams())
    containerd.delete_task(identity)
    # What had only been made may be told to have been killed, or not, before its deletion or after it.
    topics = "create start exit delete create delete".split()
    assert until(lambda: [topic[7:] for topic, _, status in list(told.found) if topic.startswith("/tasks/") and status != 137 or topic == "/tasks/delete"] == topics)


def life_of_execs(containerd, identity, folder, told):
    """Commands in a container that runs FOREVER; as whole_life."""
    containerd.create_task(containerd.get_container(identity), nerdctld.TaskStreams())
    containerd.start_task(identity)

    def process(args, terminal=False):
        return {"args": list(args), "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, "terminal": terminal}

    streams, (out, err) = fifo_streams(folder)
    containerd.add_exec(identity, "one", process(LINES), streams)
    assert refusal(containerd.add_exec, identity, "one", process(LINES), streams) == ("Conflict", "id one: already exists")
    assert refusal(containerd.kill_task, identity, 9, "one") == ("Conflict", "process not created: failed precondition")
    assert containerd.start_task(identity, "one") != containerd.get_task(identity).pid
    assert refusal(containerd.delete_exec, identity, "one") == ("ApiError", "cannot delete a running process")
    stdin = os.open(streams.stdin, os.O_WRONLY)
    os.write(stdin, b"one\ntwo")
    os.close(stdin)
    containerd.close_stdin(identity, "one")
    assert (read_fifo(out), read_fifo(err), containerd.wait_process(identity, "one")) == (b"got one\ntwo", b"err\n", 3)
    assert refusal(containerd.kill_task, identity, 15, "one") == ("NotFound", "process already finished: not found")
    assert containerd.delete_exec(identity, "one") == 3
    gone = ("NotFound", "process does not exist one: not found")
    assert [refusal(each, identity, exec_id="one") for each in (containerd.start_task, containerd.delete_exec, containerd.wait_process)] == [gone] * 3
    # A command that there is not: nobody opens the FIFOs then.
    streams, numbers = fifo_streams(folder)
    containerd.add_exec(identity, "two", process(MISSING), streams)
    kind, words = refusal(containerd.start_task, identity, "two")
    assert kind == "ApiError" and words.startswith('OCI runtime exec failed: exec failed: unable to start container process: exec: "/nosuch"')
    assert containerd.wait_process(identity, "two") == containerd.delete_exec(identity, "two") == 0
    # A container that is paused.
    containerd.pause_task(identity)
    assert containerd.get_task(identity).status == "paused" and refusal(containerd.pause_task, identity)[1] == "cannot pause a paused container"
    assert refusal(containerd.add_exec, identity, "e", process(LINES), nerdctld.TaskStreams())[1] == "cannot exec in a paused state"
    containerd.resume_task(identity)
    assert refusal(containerd.resume_task, identity)[1] == "cannot resume a running process"
    # A terminal; a signal; the end of the container.
    streams, numbers = fifo_streams(folder, ("stdin", "stdout"), True)
    containerd.add_exec(identity, "three", process(TERMINAL, True), streams)
    containerd.start_task(identity, "three")
    containerd.resize_terminal(identity, 25, 80, "three")
    stdin = os.open(streams.stdin, os.O_WRONLY)
    os.write(stdin, b"\n")
    assert containerd.wait_process(identity, "three") == 4 == containerd.delete_exec(identity, "three")
    os.close(stdin)
    for name, number in (("four", 15), ("five", 9), ("six", 0)):
        containerd.add_exec(identity, name, process(FOREVER), nerdctld.TaskStreams())
        containerd.start_task(identity, name)
        containerd.kill_task(identity, number, name)
        if number:
            assert containerd.wait_process(identity, name) == 128 + number == containerd.delete_exec(identity, name)
    containerd.kill_task(identity, 9)
    assert containerd.wait_process(identity, "six") == containerd.wait_process(identity) == 137
    containerd.delete_task(identity)
    assert until(lambda: told.found[-1][0] == "/tasks/delete")
    assert [each for each in told.found if each[0].startswith("/tasks/ex")] == [
        *((f"/tasks/{topic}", name, status) for name, status in (("one", 3), ("two", 0), ("three", 4), ("four", 143), ("five", 137), ("six", 137))
          for topic, status in (("exec-added", 0), ("exec-started", 0), ("exit", status)) if name != "two" or topic == "exec-added"),
        ("/tasks/exit", identity, 137)]


def lines_program(process):
    """What LINES does."""
    process.stdout.write(b"got " + process.stdin.readline())
    process.stderr.write(b"err\n")
    for data in iter(process.stdin.read1, b""):
        process.stdout.write(data)
    return 3


class TestContainerd:
    """The client of containerd's services, over a fake that does what the real one does: TestLiveContainers has the same bodies."""

    @pytest.fixture
    def containerd(self, fake):
        """The client."""
        return nerdctld.Containerd(fake.path)

    @pytest.mark.parametrize("args, body", [(LINES, whole_life), (FOREVER, life_of_execs)], ids=["container", "execs"])
    def test_the_life_of_a_task(self, fake, containerd, tmp_path, args, body):
        fake.create(ID, {"nerdctl/name": "x"}, spec={"process": {"args": list(args)}})
        fake.programs[LINES] = lines_program
        fake.programs[TERMINAL] = lambda process: process.stdin.readline() and 4
        fake.programs[FOREVER] = lambda process: 128 + process.wait_signal()
        fake.refuse[MISSING] = 'OCI runtime exec failed: exec failed: unable to start container process: exec: "/nosuch": stat /nosuch: no such file or directory'
        with contextlib.closing(ToldTopics(containerd, ID)) as told:
            body(containerd, ID, tmp_path, told)

    def test_what_the_fake_does_by_itself(self, fake, containerd, tmp_path):
        """Logs, ends that others bring about, and programs that are ended in the middle of something."""
        fake.create(ID, {"nerdctl/state-dir": str(tmp_path)}, spec={"process": {"args": ["x"]}})
        fake.programs[ID] = lambda process: process.stdout.write(b"one\ntwo") and process.stderr.write(b"err\n") and process.wait_signal()
        containerd.create_task(containerd.get_container(ID), nerdctld.TaskStreams("", "binary:///x", "binary:///x"))
        containerd.start_task(ID)
        assert until(lambda: fake.processes[ID, ""].stderr.rest == b"" and (tmp_path / f"{ID}-json.log").exists())
        containerd.kill_task(ID, 15)
        assert containerd.wait_process(ID) == 15
        lines = [json.loads(each) for each in (tmp_path / f"{ID}-json.log").read_text().splitlines()]
        assert [(each["stream"], each["log"]) for each in lines] == [("stdout", "one\n"), ("stderr", "err\n"), ("stdout", "two")]
        containerd.delete_task(ID)
        streams, (out, err) = fifo_streams(tmp_path)
        fake.programs[ID] = lambda process: process.stdout.write(bytes(1 << 20))
        containerd.create_task(containerd.get_container(ID), streams)
        containerd.start_task(ID)
        assert len(read_fifo(out, 1000)) == 1000
        fake.exit(ID, 5)
        assert containerd.wait_process(ID) == 5 and read_fifo(err) == b"" and len(read_fifo(out, 2 << 20)) < (1 << 20)
        fake.start(ID)
        containerd.add_exec(ID, "e", {"args": ["true"]}, nerdctld.TaskStreams())
        containerd.start_task(ID, "e")
        containerd.kill_task(ID, signal.SIGWINCH)
        assert containerd.wait_process(ID, "e") == 0 and containerd.get_task(ID).status == "running"
        containerd.kill_task(ID, 15)
        assert containerd.wait_process(ID) == 143
        fake.refuse[ID] = 'exec: "x": executable file not found in $PATH'
        containerd.delete_task(ID)
        assert refusal(containerd.create_task, containerd.get_container(ID), streams) == ("ApiError", fake.refuse[ID]) and not fake.tasks


###############################################################################
# Events
###############################################################################


def container_of(labels=None, task=None, **fields):
    """A container with these labels; `fields` of its record and `task` of its task, which may be a state alone."""
    spec = json.dumps(fields.pop("spec", {})).encode()
    record = nerdctld.ContainerRecord(ID, {"nerdctl/name": "x", **(labels or {})}, BASE, "io.containerd.runc.v2", spec, "overlayfs", ID, 1795492630 * 10**9)
    if isinstance(task, str):
        task = nerdctld.TaskRecord(1, task, 0, 0, "")
    return nerdctld.Container(record._replace(**fields), task)


def envelopes():
    """The recorded envelopes of events."""
    data = zlib.decompress(base64.b64decode(EVENTS.stdout))
    while data:
        size = int.from_bytes(data[:2], "big")
        yield data[2:2 + size]
        data = data[2 + size:]


class TestEvents:
    def test_a_subscription_that_breaks_while_it_is_looked_at(self):
        feed = nerdctld.EventFeed(nerdctld.Containerd("/nosuch"), lambda event: None)
        near, far = socket.socketpair()
        with near, far:
            feed.socket, feed.live_from = nerdctld.EventSocket(near), 0.0
            assert feed.settle()
        assert not feed.settle()

    def test_recorded_envelopes(self):
        events = [each for each in (nerdctld.parse_event(each, "ns") for each in envelopes()) if each]
        assert [each.topic for each in events if each.container == ID] == [
            "/containers/create", "/tasks/create", "/tasks/start", "/containers/update", "/containers/update", "/tasks/exec-added", "/tasks/exec-started",
            "/tasks/exit", "/tasks/exit", "/tasks/delete", "/containers/delete"]
        assert all(each.time > 1795492600 * 10**9 for each in events)
        payloads = {each.topic: each.payload for each in events}
        assert payloads["/containers/create"] == {"id": ID, "image": BASE} and payloads["/tasks/delete"]["exit_status"] == 137
        assert payloads["/tasks/create"]["pid"] == payloads["/tasks/start"]["pid"] > 1 and payloads["/images/create"] == {"name": "docker.io/library/x:y"}
        assert [each.ends_container for each in events if each.topic == "/tasks/exit"] == [False, True]

    def test_other_namespaces_are_not_ours(self):
        assert not any(nerdctld.parse_event(each, "default") for each in envelopes())

    @pytest.mark.parametrize("data", [b"", b"\x12\x02ns", b"\x12\x02ns\x1a\x02/x", b"\x12\x02ns\x1a\x0b/tasks/exit", b"\x12\x02ns\x1a\x0b/tasks/exit\x22\x00"])
    def test_envelopes_that_say_little(self, data):
        found = nerdctld.parse_event(data, "ns")
        assert found is None or (found.topic, found.payload, found.container) == ("/tasks/exit", {}, "")

    @pytest.mark.parametrize("data", [b"\xff", b"\x12\x02ns\x1a\x0b/tasks/exit\x22\x03\x12\x09x"])
    def test_garbage(self, data):
        with pytest.raises(ValueError):
            nerdctld.parse_event(data, "ns")

    @staticmethod
    def event_of(topic, container, **payload):
        """An event as the feed has it."""
        return nerdctld.ContainerdEvent(topic, time.time_ns(), {"container_id": container, **payload})

    def told(self, engine, *kept):
        """Action and these attributes of everything in the journal, after what has happened by now."""
        engine.settle()
        return [(each["Action"], *map(each["Actor"]["Attributes"].get, kept)) for each in engine.journal.history]

    def test_the_end_of_a_container_that_goes_while_it_is_looked_for(self, furnished, fake):
        container = furnished.inventory.container("tstweb")
        since = furnished.tasks.now()

        def gone():
            furnished.tasks.note(self.event_of("/tasks/exit", ID, id=ID, exit_status=7))
            fake.containers.pop(ID, None)
        fake.before["Containers/List"] = gone
        assert furnished.tasks._status(container, "removed", since, time.time_ns()) == 7
        assert furnished.tasks._status(container, "not-running", since, time.time_ns()) == 7

    @pytest.mark.parametrize("times", [3, 100])
    def test_a_wait_outlasts_a_containerd_that_fails_now_and_then(self, furnished, fake, monkeypatch, times):
        container, failures = furnished.inventory.container("tstdone"), []
        monkeypatch.setattr(nerdctld.time, "sleep", lambda seconds: None)

        def fail():
            failures.append(1)
            if len(failures) <= times:
                raise HangUp
        fake.before["Containers/List"] = fail
        if times < 20:
            assert furnished.tasks.wait(container, "not-running", 0, lambda: False) == 3
        else:
            with pytest.raises(nerdctld.Unavailable, match="does not answer"):
                furnished.tasks.wait(container, "not-running", 0, lambda: False)

    def test_events_that_were_kept_while_nobody_listened(self, furnished, fake):
        follow(furnished, fake)
        there, gone = (furnished.inventory.container(name) for name in ("tstweb", "tstpaused"))
        fake.exit(there.id, 3)
        fake.exit(gone.id, 4)
        furnished.settle()
        furnished.forget(gone)
        fake.delete(gone.id)
        furnished.journal.emit("container", "die", "f" * 64, {})
        for name, code in ((there.name, "3"), (gone.name, "4")):
            found = ask(furnished, "GET", f"/events?since=0&until={time.time():.9f}&" + filtered(container=[name], event=["die"])).lines
            assert [(each["Actor"]["Attributes"]["name"], each["Actor"]["Attributes"]["exitCode"]) for each in found] == [(name, code)]
        assert len(ask(furnished, "GET", f"/events?since=0&until={time.time():.9f}&" + filtered(event=["die"])).lines) == 3

    def test_the_end_of_an_exec_is_not_the_end_of_its_container(self, furnished, fake):
        follow(furnished, fake)
        fake.exit(ID, 5, process="anexec")
        fake.exit(ID, 137)
        assert self.told(furnished, "exitCode") == [("die", "137")]

    def test_a_whole_life(self, furnished, fake):
        follow(furnished, fake)
        labels = {"nerdctl/name": "tstlife", "a": "b,c", "containerd.io/restart.policy": "no"}
        fake.create("5" * 64, labels)
        furnished.settle()
        fake.start("5" * 64)
        fake.pause("5" * 64)
        fake.pause("5" * 64, False)
        fake.tell("/tasks/oom", container_id="5" * 64)
        fake.exit("5" * 64, 9)
        furnished.settle()
        fake.delete("5" * 64)
        fake.tag("docker.io/library/x:y", BB)
        fake.untag("docker.io/library/x:y")
        assert [each for each, in self.told(furnished)] == ["create", "start", "pause", "unpause", "oom", "die", "destroy", "tag", "untag"]
        die = furnished.journal.history[5]
        assert die["Actor"] == {"ID": "5" * 64, "Attributes": {"a": "b,c", "image": BASE, "name": "tstlife", "exitCode": "9", "execDuration": "0"}}
        assert die["time"] == die["timeNano"] // 10**9 and furnished.journal.history[6]["Actor"]["Attributes"]["name"] == "tstlife"

    def test_recorded_events_in_the_words_of_docker(self, furnished):
        for each in envelopes():
            event = nerdctld.parse_event(each, "ns")
            if event and event.container in (ID, ""):
                furnished.handle(event)
        furnished.settle()
        told = list(furnished.journal.history)
        assert [(each["Type"], each["Action"]) for each in told] == [
            ("container", "create"), ("container", "start"), ("image", "tag"), ("container", "die"), ("container", "destroy"), ("image", "untag")]
        assert told[3]["Actor"] == {"ID": ID, "Attributes": {"a": "b,c", "base": "busybox", "image": "localhost:5000/bb:1", "name": "tstweb",
                                                             "exitCode": "137", "execDuration": told[3]["Actor"]["Attributes"]["execDuration"]}}
        assert int(told[3]["Actor"]["Attributes"]["execDuration"]) >= 5

    def test_the_steps_of_a_build_are_no_containers(self, furnished, fake):
        follow(furnished, fake)
        step = "nzu2uewdfb6flr2yppwc1bsp8"
        fake.create(step, image="")
        fake.start(step)
        for each in ("made-by-ctr", step[::-1]):
            fake.create(each, image="" if each != step[::-1] else "x")
        assert {step, "made-by-ctr", step[::-1]} & set(furnished.inventory.containers()) == {"made-by-ctr", step[::-1]}
        fake.exit(step)
        fake.delete(step)
        furnished.settle()
        assert [each["Actor"]["ID"] for each in furnished.journal.history] == ["made-by-ctr", step[::-1]]

    @pytest.mark.parametrize("name", ["moby-dangling@sha256:" + "1" * 64, "import@sha256:" + "1" * 64, nerdctld.WORKING_NAME + "x:1", "sha256:" + "1" * 64, BASE + nerdctld.REDUCED, ":"])
    def test_names_that_nobody_gave_are_not_told(self, furnished, fake, name):
        follow(furnished, fake)
        fake.tag(name, BB)
        fake.untag(name)
        assert self.told(furnished) == []

    def test_image_events_name_the_image(self, furnished, fake):
        follow(furnished, fake)
        ask(furnished, "GET", "/images/json")
        fake.untag(BASE)
        fake.tag(BASE, BB)
        furnished.settle()
        assert [(each["Action"], each["Actor"]) for each in furnished.journal.history] == [
            (action, {"ID": BB, "Attributes": {"name": BASE}}) for action in ("untag", "tag")]

    def test_events_of_handlers_come_after_those_before_them(self, furnished, fake):
        follow(furnished, fake)
        gate, new = threading.Event(), "5" * 64
        fake.before["Containers/Get"] = lambda: gate.wait(5)
        fake.create(new, {"nerdctl/name": "x"})
        furnished.feed.settle()
        furnished.tell(nerdctld.Container(fake.containers[new]), "attach")
        gate.set()
        assert self.told(furnished, "name") == [("create", "x"), ("attach", "x")]

    def test_only_what_a_change_of_our_own_makes_is_not_told_twice(self, furnished, fake):
        follow(furnished, fake)
        own, told = "docker.io/library/own:1", lambda: self.told(furnished, "name")
        with furnished.changing_images([own]):
            fake.tag(own, BB)
            fake.tag(own + "@" + BB, BB)
            fake.tag("docker.io/library/other:1", BB)
            fake.untag(own)
        fake.tag(own, BB)
        assert told() == [("tag", "other:1"), ("untag", "own:1")]
        with furnished.changing_images([own], "untag"):
            fake.untag(own)
        assert until(lambda: not furnished.quiet)
        fake.tag(own, BB)
        assert told() == [("tag", "other:1"), ("untag", "own:1"), ("tag", "own:1")]

    def test_journal_keeps_256(self):
        journal = nerdctld.Journal()
        for number in range(300):
            journal.emit("image", "tag", str(number), {})
        with journal.subscribe() as (kept, _):
            assert [each["Actor"]["ID"] for each in kept] == [str(number) for number in range(44, 300)]
        assert journal.queues == []

    def test_a_listener_that_does_not_read_is_let_go(self):
        journal = nerdctld.Journal()
        assert journal.BEHIND >= 4096
        journal.BEHIND = 5
        with journal.subscribe() as (_, slow), journal.subscribe() as (_, quick):
            for number in range(9):
                journal.emit("image", "tag", str(number), {})
                assert quick.get()["Actor"]["ID"] == str(number)
            assert journal.queues == [quick]
            assert [slow.get()["Actor"]["ID"] for _ in range(5)] == list("01234")
            assert isinstance(slow.get(), nerdctld.ApiError) and slow.empty()
        assert journal.queues == []

    def test_counts_of_several_threads(self, engine, monkeypatch):
        class Slow(nerdctld.ContainerOwner):
            def __setattr__(self, name, value):
                time.sleep(0.001)
                super().__setattr__(name, value)

        monkeypatch.setattr(nerdctld, "ContainerOwner", Slow)
        together, seen = threading.Barrier(8), []

        def change():
            together.wait(10)
            with engine.restarting(container_of()), engine.changing_images([BASE]):
                together.wait(10)
                seen.append((engine.owner(ID).restarting, len(engine.quiet)))
                together.wait(10)

        threads = [threading.Thread(target=change) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(20)
        assert seen == [(8, 8)] * 8 and engine.owner(ID).restarting == 0 and not engine.lock.locked()

    def test_feed_goes_on_after_a_break(self, furnished, fake):
        told = []
        handle, furnished.handle = furnished.handle, lambda event: told.append(event) or handle(event)
        furnished.feed.handle = furnished.handle
        follow(furnished, fake)
        begun, first = told.count(None), fake.calls["Events/Subscribe"]
        fake.subscribers[0][0].sock.shutdown(socket.SHUT_RDWR)
        assert until(lambda: fake.calls["Events/Subscribe"] > first and fake.subscribers and furnished.feed.live)
        # Once for the break, once for the new beginning.
        assert told.count(None) == begun + 2
        fake.exit(ID, 3)
        furnished.settle()
        assert told[-1].topic == "/tasks/exit" and [each["Action"] for each in furnished.journal.history] == ["die"]

    def test_feed_ends_with_the_engine(self, engine, fake):
        follow(engine, fake)
        engine.close()
        assert until(lambda: not fake.subscribers and not [each for each in threading.enumerate() if each.name == "events" and not each.daemon])
        assert until(lambda: not engine.feed.live) and fake.calls["Events/Subscribe"] == 1

    def test_handler_that_raises_does_not_end_the_feed(self, engine, fake, capsys):
        told = []
        engine.feed.handle = lambda event: told.append(event) or 1 / 0
        follow(engine, fake)
        fake.tag("a:1", "sha256:" + "1" * 64)
        fake.tag("b:1", "sha256:" + "1" * 64)
        assert until(lambda: len(told) >= 3)
        assert told[0] is None and "ZeroDivisionError" in capsys.readouterr().err and fake.calls["Events/Subscribe"] == 1

    def test_what_has_come_is_handled_before_a_read(self, furnished, fake):
        follow(furnished, fake)
        for number in range(200):
            fake.label(ID, **{"number": str(number)})
            assert furnished.inventory.container(ID).labels["number"] == str(number)

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

    def test_live_stream(self, daemon, scripted, fake, tmp_path):
        scripted.on("tag")
        furnish(scripted, fake, tmp_path)
        sock = daemon.connect()
        sock.sendall(b"GET /v1.44/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in sock.recv(65536)
        daemon.ask("POST", "/images/localhost:5000/bb:1/tag?repo=x&tag=y")
        event = json.loads(sock.recv(65536).split(b"\r\n")[1])
        assert (event["Type"], event["Action"], event["Actor"]["Attributes"]["name"]) == ("image", "tag", "x:y")
        sock.close()


###############################################################################
# State
###############################################################################


def put_image(fake, native, name=""):
    """An image of a native inspect: its name, content and unpacked layers."""
    target, manifest, config = native["Image"]["Target"], native["Manifest"], native["ImageConfig"]
    name = name or native["Image"]["Name"]
    fake.images[name] = nerdctld.ImageRecord(
        name, nerdctld.Descriptor(target["mediaType"], target["digest"], target["size"]), nerdctld.nanoseconds_of(native["Image"]["UpdatedAt"]))
    for digest, value in ((native["ManifestDesc"]["digest"], manifest), (manifest["config"]["digest"], config)):
        fake.content[digest] = json.dumps(value).encode()
    below, left = "", native["size"]
    for number, (key, layer) in enumerate(zip(nerdctld.chain_ids(config), manifest["layers"])):
        fake.content[layer["digest"]] = b"layer"
        # All that is known is the sum: the lowest one has nearly all of it.
        size = min(2019328, left)
        fake.snapshots["overlayfs", key], below, left = (below, size), key, left - size


def put_container(fake, native, written=4096):
    """A container of a native inspect, with its task and the bytes that it has written."""
    image = next(each for each in fake.images.values() if each.name == native["Image"])
    config = json.loads(fake.content[json.loads(fake.content[image.target.digest])["config"]["digest"]])
    identity, task = native["ID"], native.get("Process")
    fake.containers[identity] = nerdctld.ContainerRecord(
        identity, native["Labels"], native["Image"], native["Runtime"]["Name"], json.dumps(native["Spec"]).encode(), native["Snapshotter"],
        native["SnapshotKey"], nerdctld.nanoseconds_of(native["CreatedAt"]))
    fake.snapshots[native["Snapshotter"], native["SnapshotKey"]] = (nerdctld.chain_ids(config)[-1], written)
    if task:
        told = task["Status"]
        fake.tasks[identity] = nerdctld.TaskRecord(
            task.get("Pid", 0), told["Status"], told["ExitStatus"], nerdctld.nanoseconds_of(told["ExitTime"]) if told["Status"] == "stopped" else 0, "")


def write_json(path, value):
    """A JSON file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# Where nerdctl kept its data when containers were recorded.
STORE = "/var/lib/nerdctl/1935db59"
STARTED = {"tstweb": "2026-11-24T03:57:10.320115027Z", "tstdone": "2026-11-24T03:57:10.600211083Z", "tstpaused": "2026-11-24T03:57:11.310441927Z"}
WRITTEN = {"tstweb": 28672, "tstdone": 20480, "tstnew": 4096, "tstpaused": 20480}
INDEX = "sha256:630252620cdac430432d5bf81f677cd92820a3477798c594e18056c7f0cee570"


def store_of(fake, folder):
    """nerdctl's own folder for a containerd, below its data root."""
    return pathlib.Path(folder) / "data" / hashlib.sha256(os.path.realpath(fake.path).encode()).hexdigest()[:8]


def furnish(scripted, fake, folder):
    """Everything that was recorded: what containerd has, and below `folder` the files of nerdctl."""
    away(folder)
    with scripted.together():
        scripted.on("version", VERSION_TOLD)
        scripted.on("info", INFO)
    store = store_of(fake, folder)
    for line in IMAGE_INSPECT.stdout.splitlines():
        put_image(fake, json.loads(line))
    # An image that nobody named, of the same layer, in an index for one platform.
    layer = json.loads(IMAGE_INSPECT.stdout.splitlines()[0])["Manifest"]["layers"][0]
    config = fake.put({"architecture": "amd64", "os": "linux", "created": "2023-11-14T22:13:20Z", "rootfs": {"diff_ids": [layer["digest"]]}})
    manifest = fake.put({"config": {"digest": config, "size": 120}, "layers": [layer]})
    fake.content[INDEX] = json.dumps({"manifests": [{"digest": manifest, "size": 430, "platform": {"os": "linux", "architecture": "amd64"}}]}).encode()
    fake.images["import@" + INDEX] = nerdctld.ImageRecord(
        "import@" + INDEX, nerdctld.Descriptor("application/vnd.oci.image.index.v1+json", INDEX, 521), 1795492628 * 10**9)
    for recording in (INSPECT_WEB, INSPECT_DONE, INSPECT_NEW, INSPECT_PAUSED):
        native = json.loads(recording.stdout.replace(STORE, str(store)))
        name, state = native["Labels"]["nerdctl/name"], pathlib.Path(native["Labels"]["nerdctl/state-dir"])
        put_container(fake, native, WRITTEN[name])
        ports = [{"HostPort": 18080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "0.0.0.0"}]
        write_json(state / "network-config.json", {"portMappings": ports} if name == "tstweb" else {})
        if name in STARTED:
            write_json(state / "lifecycle.json", {"started_at": STARTED[name], "create_error": False})
        addresses = {"cniVersion": "1.1.0", "interfaces": [{"mac": "6e:51:e9:b7:78:b2", "name": "br-6cbb982de144"}, {"mac": "26:00:5d:44:70:a3", "name": "vethbdb2a963"}, {
            "mac": "36:70:31:72:11:0b", "name": "eth0", "sandbox": "/proc/32149/ns/net"}], "ips": [{"address": "10.77.0.2/24", "gateway": "10.77.0.1", "interface": 2}]}
        write_json(store / "etchosts" / "default" / native["ID"] / "meta.json", {"ID": native["ID"], "Networks": {"tstnet": addresses} if name == "tstweb" else None})
    for line, below in zip(NETWORK_INSPECT.stdout.splitlines(), (".", "default")):
        config = json.loads(line)["CNI"]
        write_json(pathlib.Path(folder) / "networks" / below / f"nerdctl-{config['name']}.conflist", config)
    write_json(store / "volumes" / "default" / "tstvol" / "volume.json", {"labels": None})
    (store / "volumes" / "default" / "tstvol" / "_data").mkdir()


@pytest.fixture
def furnished(scripted, fake, engine, tmp_path):
    """An engine over everything that was recorded."""
    furnish(scripted, fake, tmp_path)
    return engine


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """The same for tests that only read: one for all of them, which follows events."""
    folder = tmp_path_factory.mktemp("reading")
    scripted, fake = Scripted(folder), FakeContainerd(folder)
    furnish(scripted, fake, folder)
    found = nerdctld.Engine(InProcess(scripted), nerdctld.Containerd(fake.path))
    found.folder = folder
    follow(found, fake)
    yield found
    found.close()
    fake.stop_serving()


BB = "sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892"
BB_CONFIG = "sha256:4e848621cfa6a3a51a22d2d9a7f5a1ecb7f5a0b203f3a0eb45efdb3c050758bf"


class Told:
    """A feed that has told everything, or with `covers` False may have missed something."""

    covers = True

    def settle(self):
        return self.covers


def together(count, function):
    """What a function returns, or raises, in as many threads at once."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)
    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for each in threads:
        each.start()
    return threads, found


class TestState:
    def mirror(self, world, feed=None):
        """A mirror of a dict, and what it has read of it."""
        reads = []

        def read_one(name):
            reads.append(name)
            if name not in world:
                raise nerdctld.NotFound(name)
            return world[name]
        return nerdctld.Mirror(feed or Told(), lambda: reads.append("") or dict(world), read_one), reads

    def joined(self, mirror, gate, count):
        """What one reader of a mirror gets, and what `count` others do that come before the gate is opened for its reading."""
        first, found = together(1, mirror.get)
        assert until(lambda: mirror.lock.locked())
        others, more = together(count, mirror.get)
        time.sleep(0.05)
        gate.set()
        for each in first + others:
            each.join(5)
        return found, more

    def test_a_mirror_reads_what_was_told_of(self):
        world = {"a": 1, "b": 2}
        mirror, reads = self.mirror(world)
        assert mirror.get() is mirror.get() and reads == [""]
        world.update(a=3, b=4)
        mirror.invalidate("a")
        assert mirror.get() == {"a": 3, "b": 2} and reads == ["", "a"]
        del world["b"]
        mirror.invalidate("b")
        mirror.invalidate("nosuch")
        assert mirror.get() == {"a": 3} and sorted(reads[2:]) == ["b", "nosuch"]
        world.update(c=5)
        mirror.invalidate()
        assert mirror.get() == world and reads[4:] == [""]

    def test_many_changes_are_one_reading(self):
        world = dict.fromkeys(map(str, range(50)), 1)
        mirror, reads = self.mirror(world)
        mirror.get()
        for name in world:
            world[name] = 2
            mirror.invalidate(name)
        assert mirror.get() == world and reads == ["", ""]

    def test_what_was_given_out_does_not_change(self):
        world = {"a": 1}
        mirror, _ = self.mirror(world)
        before = mirror.get()
        world["a"] = 2
        mirror.invalidate("a")
        assert mirror.get() == {"a": 2} and before == {"a": 1}

    def test_without_events_every_reader_asks(self):
        world, feed = {"a": 1}, Told()
        feed.covers = False
        mirror, reads = self.mirror(world, feed)
        for number in range(3):
            world["a"] = number
            assert mirror.get() == {"a": number}
        assert reads == [""] * 3
        # What was read before the feed began to cover changes is not believed.
        world["a"], feed.covers = 9, True
        assert mirror.get() == {"a": 9} and len(reads) == 4
        mirror.get()
        assert len(reads) == 4

    @pytest.mark.parametrize("covers", [True, False])
    def test_those_who_wait_share_one_reading(self, covers):
        feed, reads, gate = Told(), [], threading.Event()
        feed.covers = covers

        def read():
            reads.append(gate.wait(5))
            return {"a": len(reads)}
        mirror = nerdctld.Mirror(feed, read, None)
        found, more = self.joined(mirror, gate, 8)
        # Those who came while it was under way may not take what was read before they came.
        assert len(reads) == (1 if covers else 2) and found == [{"a": 1}] and more == [{"a": len(reads)}] * 8

    def test_an_event_while_everything_is_read(self):
        world = {"a": 1}
        mirror, reads = self.mirror(world)

        def read():
            found = dict(world)
            if len(reads) == 0:
                world["a"] = 2
                mirror.invalidate("a")
            reads.append("")
            return found
        mirror.read_all = read
        mirror.get()
        assert mirror.get() == {"a": 2} and reads == ["", "a"]

    def test_an_event_while_one_is_read(self):
        world = {"a": 1}
        mirror, reads = self.mirror(world)
        mirror.get()
        read_one = mirror.read_one

        def read(name):
            found = read_one(name)
            if len(reads) == 2:
                world["a"] = 3
                mirror.invalidate("a")
            return found
        mirror.read_one, world["a"] = read, 2
        mirror.invalidate("a")
        mirror.get()
        assert mirror.get() == {"a": 3} and reads == ["", "a", "a"]

    @pytest.mark.parametrize("name", ["a", ""])
    def test_nobody_gets_what_another_reader_is_just_replacing(self, name):
        world, gate = {"a": 1}, threading.Event()
        mirror, _ = self.mirror(world)
        mirror.get()
        read_one, read_all = mirror.read_one, mirror.read_all
        mirror.read_one = lambda name: gate.wait(5) and read_one(name)
        mirror.read_all = lambda: gate.wait(5) and read_all()
        world["a"] = 2
        mirror.invalidate(name)
        threads, found = together(1, mirror.get)
        # It is no longer marked, and not yet read.
        assert until(lambda: not mirror.dirty and not mirror.stale)
        others, more = together(4, mirror.get)
        time.sleep(0.05)
        assert not more
        gate.set()
        for each in threads + others:
            each.join(5)
        assert found + more == [{"a": 2}] * 5

    @pytest.mark.parametrize("covers", [True, False])
    def test_a_reading_that_fails_is_no_answer_for_anybody(self, covers):
        gate, feed, world = threading.Event(), Told(), {"a": 1}
        feed.covers = covers

        def fail():
            gate.wait(5)
            raise nerdctld.Unavailable("down")
        mirror = nerdctld.Mirror(feed, fail, None)
        found, more = self.joined(mirror, gate, 4)
        assert [type(each) for each in found + more] == [nerdctld.Unavailable] * 5
        mirror.read_all = lambda: dict(world)
        assert mirror.get() == world

    def test_one_object_that_fails_leaves_the_others_as_they_are_now(self):
        world = {"a": 1, "b": 1, "c": 1}
        mirror, _ = self.mirror(world)
        mirror.get()
        read_one, failing = mirror.read_one, set()

        def read(name):
            # The second, whichever that is.
            failing.add(name)
            if len(failing) == 2:
                raise nerdctld.Unavailable("down")
            return read_one(name)
        mirror.read_one = read
        for name in world:
            world[name] = 2
            mirror.invalidate(name)
        with pytest.raises(nerdctld.Unavailable):
            mirror.get()
        mirror.read_one = read_one
        assert mirror.get() == world

    @pytest.mark.parametrize("seed", range(6))
    def test_a_mirror_after_changes_from_all_sides(self, seed):
        """Readers beside changes whose events come at once, as from the socket: nobody gets what was before his question."""
        chance, world, lock = random.Random(seed), dict.fromkeys("abcdefghijkl", 0), threading.Lock()
        mirror, _ = self.mirror(world)
        mirror.FEW, wrong, ended = 3, [], threading.Event()

        def change():
            while not ended.is_set():
                name = chance.choice("abcdefghijkl")
                with lock:
                    world[name] = world.get(name, 0) + 1
                    mirror.invalidate(name if chance.random() < 0.9 else "")
                time.sleep(chance.choice([0, 0, 0.0003]))

        def read():
            while not ended.is_set():
                with lock:
                    before = dict(world)
                found = mirror.get()
                wrong.extend((name, count, found.get(name)) for name, count in before.items() if found.get(name, -1) < count)
        threads = [threading.Thread(target=each, daemon=True) for each in (change, read, read, read)]
        for each in threads:
            each.start()
        time.sleep(0.15)
        ended.set()
        for each in threads:
            each.join(5)
        assert not wrong and mirror.get() == world

    def test_reads_cost_no_call_while_nothing_happens(self, furnished, fake):
        follow(furnished, fake)
        for _ in range(5):
            assert ask(furnished, "GET", "/containers/json?all=1").status == 200
            assert ask(furnished, "GET", "/images/json").status == 200
        assert fake.calls["Containers/List"] == fake.calls["Tasks/List"] == fake.calls["Images/List"] == fake.calls["Content/List"] == 1
        assert not fake.calls["Containers/Get"] and not fake.calls["Images/Get"]

    def test_nothing_is_kept_while_the_feed_is_not_live(self, furnished, fake):
        for number in range(3):
            fake.label(ID, **{"number": str(number)})
            assert ask(furnished, "GET", "/containers/tstweb/json").json["Config"]["Labels"]["number"] == str(number)
        assert fake.calls["Containers/List"] == 3
        # Containers and their tasks are told by lists; content by its digest is read once nevertheless.
        read = fake.calls["Content/Read"]
        ask(furnished, "GET", "/images/json")
        assert fake.calls["Content/Read"] == read > 0

    def test_own_writes_are_read(self, furnished, scripted, fake):
        follow(furnished, fake)
        ask(furnished, "GET", "/images/json")
        scripted.on("tag", does=lambda words: fake.tag(words[-1], BB))
        assert ask(furnished, "POST", "/images/localhost:5000/bb:1/tag?repo=new&tag=b").status == 201
        assert "new:b" in ask(furnished, "GET", f"/images/{BB}/json").json["RepoTags"]
        assert fake.calls["Images/List"] == 1

    def test_an_event_reads_what_it_names(self, furnished, fake):
        follow(furnished, fake)
        ask(furnished, "GET", "/containers/json?all=1")
        fake.tell("/tasks/exec-started", container_id=ID, exec_id="e")
        fake.exit(ID, process="e")
        ask(furnished, "GET", "/containers/json?all=1")
        assert not fake.calls["Containers/Get"]
        fake.exit(ID, 2)
        assert ask(furnished, "GET", "/containers/json?all=1").json[-1]["State"] == "restarting"
        assert (fake.calls["Containers/Get"], fake.calls["Tasks/Get"], fake.calls["Containers/List"]) == (1, 1, 1)

    def test_break_of_the_feed_drops_everything(self, furnished, fake):
        follow(furnished, fake)
        ask(furnished, "GET", "/containers/json?all=1")
        fake.subscribers[0][0].sock.shutdown(socket.SHUT_RDWR)
        assert until(lambda: not furnished.feed.live)
        fake.label(ID, lost="1")
        assert until(lambda: fake.subscribers and furnished.feed.live)
        assert furnished.inventory.container(ID).labels["lost"] == "1" and fake.calls["Containers/List"] == 2

    PATHS = ("/info", "/containers/json", "/containers/tstweb/json", "/images/json", f"/images/{BASE}/json", "/system/df")

    def test_a_containerd_that_is_down(self, furnished, fake):
        follow(furnished, fake)
        assert all(ask(furnished, "GET", path).status == 200 for path in self.PATHS)
        fake.stop_serving()
        assert until(lambda: not furnished.feed.live)
        for path in self.PATHS:
            answer = ask(furnished, "GET", path)
            assert (answer.status, answer.message) == (503, f"containerd is not running at {fake.path}: start it (systemctl start containerd), or say where it is with --address"), path
        for path in ("/_ping", "/version", "/networks", "/volumes"):
            assert ask(furnished, "GET", path).status == 200, path
        fake.label(ID, later="1")
        fake.start_serving()
        assert until(lambda: fake.subscribers and furnished.feed.live)
        assert ask(furnished, "GET", "/containers/tstweb/json").json["Config"]["Labels"]["later"] == "1"

    def test_a_containerd_that_is_not_for_this_user(self, furnished, monkeypatch):
        class Refused(socket.socket):
            def connect(self, address):
                raise PermissionError(13, "Permission denied")
        monkeypatch.setattr(nerdctld.socket, "socket", Refused)
        answer = ask(furnished, "GET", "/containers/json")
        assert answer.status == 503 and "may not be used by this user" in answer.message

    @pytest.mark.parametrize("method", ["Containers/List", "Tasks/List"])
    def test_a_containerd_that_hangs_up(self, furnished, fake, method):
        def leave():
            raise HangUp
        fake.before[method] = leave
        answer = ask(furnished, "GET", "/containers/json")
        assert answer.status == 503 and answer.message.startswith(f"containerd does not answer at {fake.path} (")
        fake.before.clear()
        assert ask(furnished, "GET", "/containers/json").status == 200

    @pytest.mark.parametrize("code, kind", [
        (3, nerdctld.BadParameter), (5, nerdctld.NotFound), (6, nerdctld.Conflict), (9, nerdctld.Conflict), (12, nerdctld.NotImplementedHere), (14, nerdctld.Unavailable), (2, nerdctld.ApiError)])
    def test_errors_of_containerd(self, engine, fake, code, kind):
        def fail():
            raise nerdctld.GrpcError(code, "words")
        fake.before["Containers/Get"] = fail
        with pytest.raises(nerdctld.ApiError) as caught:
            engine.containerd.get_container(ID)
        assert type(caught.value) is kind

    def test_other_namespaces_are_not_told(self, furnished, fake):
        engine = nerdctld.Engine(furnished.nerdctl, nerdctld.Containerd(fake.path, "other"))
        assert engine.inventory.containers() == {} and engine.inventory.images.get() == {}
        engine.close()

    def test_many_containers(self, furnished, fake):
        for number in range(300):
            fake.create(f"{number:064x}", {"nerdctl/name": f"many{number}"}, spec={"process": {"args": ["x"]}, "annotations": {"long": "y" * 14600}})
        assert sum(len(each.spec) for each in fake.containers.values()) > 4.3e6
        assert len(ask(furnished, "GET", "/containers/json?all=1").json) == 304
        assert ask(furnished, "GET", "/containers/many299/json").json["Path"] == "x"

    def test_what_goes_while_it_is_read(self, furnished, fake):
        follow(furnished, fake)
        assert len(furnished.inventory.containers()) == 4
        fake.label(ID, a="1")
        fake.before["Tasks/Get"] = lambda: fake.delete(ID)
        furnished.inventory.containers()
        assert ID not in furnished.inventory.containers()

    STATES = [
        # Labels, task as (state, exit status), seconds since nerdctl noted a start -> kind and exit code.
        ({}, None, None, "created", None), ({}, ("created", 0), None, "created", None), ({}, ("running", 0), 5, "running", None), ({}, ("paused", 0), 5, "paused", None),
        ({}, ("pausing", 0), 5, "paused", None), ({}, ("unknown", 0), 5, "dead", None), ({}, ("stopped", 0), 5, "exited", 0), ({}, ("stopped", 137), 5, "exited", 137),
        # The task went with a restart of the machine.
        ({}, None, 10**9, "exited", 0), ({"nerdctl/error": "not found"}, None, 10**9, "exited", 0), ({"nerdctl/error": "no such file or directory"}, None, 5, "created", 127),
        # Docker's codes of a start that was refused.
        ({"nerdctl/error": 'exec: "x": executable file not found in $PATH'}, None, 5, "created", 127), ({"nerdctl/error": "x: permission denied"}, None, 5, "created", 126),
        ({"nerdctl/error": "no network found: x not found"}, None, 5, "created", 128), ({"nerdctl/error": ""}, None, 5, "exited", 0),
        ({"nerdctl/error": "not found"}, ("stopped", 4), 5, "exited", 4), ({"nerdctl/error": "not found"}, None, None, "created", 128)]

    @pytest.mark.parametrize("labels, task, ago, kind, code", STATES, ids=str)
    def test_states(self, tmp_path, labels, task, ago, kind, code):
        began = time.time_ns() - (ago or 0) * 10**9
        if ago is not None:
            (tmp_path / "lifecycle.json").write_text(json.dumps({"started_at": nerdctld.rfc3339(began)}))
        task = task and nerdctld.TaskRecord(4 if task[0] != "stopped" else 0, task[0], task[1], 7 * 10**9 if task[0] == "stopped" else 0, "")
        state = container_of({"nerdctl/state-dir": str(tmp_path), **labels}, task).state
        assert (state.kind, state.exit_code) == (kind, code)
        refused = kind == "created" and code is not None
        assert state.error == (labels["nerdctl/error"] if refused else "")
        assert state.started_at == (began if ago is not None and kind not in ("created", "dead") else None)
        assert (state.pid, state.finished_at) == (4 if kind in ("running", "paused") else 0, 7 * 10**9 if task and task.status == "stopped" else None)
        assert state.running == (kind in ("running", "paused"))
        told = nerdctld.docker_state(state, False, None)
        assert (told["Status"], told["ExitCode"], told["Error"]) == (kind, code or 0, state.error)

    def test_a_start_that_nerdctl_did_not_note(self):
        state = container_of({}, nerdctld.TaskRecord(os.getpid(), "running", 0, 0, "")).state
        assert abs(state.started_at / 1e9 - nerdctld.process_start(os.getpid()) / 1e9) < 0.1 and 0 < time.time() - state.started_at / 1e9 < 86400
        assert container_of({}, nerdctld.TaskRecord(2**30, "running", 0, 0, "")).state.started_at is None

    @pytest.mark.parametrize("label, health, failing", [
        ('{"Status":"healthy"}', "healthy", 0), ('{"Status":"none"}', "starting", 0), ("", "starting", 0), ("{", "starting", 0), ("[]", "starting", 0),
        ('{"Status":"starting","FailingStreak":1}', "starting", 1), ('{"Status":"unhealthy","FailingStreak":4,"Pid":1}', "unhealthy", 4),
        ('{"Status":"unhealthy","FailingStreak":4,"Pid":2}', "starting", 0), ('{"Status":["healthy"],"FailingStreak":"1"}', "starting", 0), ("[" * 100000, "starting", 0)])
    def test_health(self, label, health, failing):
        check = '{"Test":["CMD","true"]}'
        found = {task: container_of({"nerdctl/healthcheck": check, "nerdctl/healthstate": label}, task).state for task in ("running", "paused", "stopped", "created", None)}
        assert (found["running"].health, found["running"].failing) == (health, failing)
        # As with dockerd, what is not checked now is not healthy; before its first start there is nothing to be said.
        assert [found[task].health for task in ("paused", "stopped", "created", None)] == ["unhealthy", "unhealthy", "", ""]
        assert container_of({"nerdctl/healthstate": label}, "running").state.health == ""

    @pytest.mark.parametrize("label, asked, check", [
        ('{"Test":["CMD","a"],"Interval":5,"Retries":0}', {}, {"Test": ["CMD", "a"], "Interval": 5}), ('{"Test":["NONE"]}', {}, {}), ("{", {}, {}), ("", {}, {}), ('{"Test":[]}', {}, {}),
        ('{"Test":["CMD",1]}', {}, {}), ('{"Test":"CMD"}', {}, {}), ('{"Test":["ODD"]}', {}, {}), ('{"Test":["CMD","a"],"Interval":"x","Timeout":-1}', {}, {"Test": ["CMD", "a"]}),
        ('{"Test":["CMD-SHELL","a b"],"Retries":2}', {"Test": ["CMD", "a", "b"]}, {"Test": ["CMD", "a", "b"], "Retries": 2}), ('{"Test":["CMD","a"]}', {"Test": ["NONE"]}, {})])
    def test_health_check(self, label, asked, check):
        labels = nerdctld.request_labels({"Image": "x", "Healthcheck": asked}) if asked else {}
        assert container_of({"nerdctl/healthcheck": label, **labels}).health_check == check

    @pytest.mark.parametrize("policy, labels, code, kind", [
        ("always", {}, 0, "restarting"), ("always", {"explicitly-stopped": "true"}, 0, "restarting"), ("no", {}, 0, "exited"), ("", {}, 0, "restarting"), ("odd", {}, 0, "exited"),
        ("unless-stopped", {}, 0, "restarting"), ("unless-stopped", {"explicitly-stopped": "true"}, 0, "exited"),
        ("on-failure", {}, 0, "exited"), ("on-failure", {}, 1, "restarting"), ("on-failure:3", {"count": "2"}, 1, "restarting"), ("on-failure:3", {"count": "3"}, 1, "exited"),
        ("on-failure:3", {"count": "3"}, 0, "exited"), ("on-failure:x", {"count": "\u00b2"}, 1, "restarting"), ("always", {"status": "stopped"}, 0, "exited")])
    def test_what_containerd_starts_again(self, policy, labels, code, kind):
        labels = {"containerd.io/restart." + key: value for key, value in {"policy": policy, "status": "running", **labels}.items()}
        assert container_of(labels, nerdctld.TaskRecord(0, "stopped", code, 1, "")).state.kind == kind
        assert container_of(labels, "running").state.kind == "running" and container_of(labels).state.kind == "created"

    def test_the_end_of_what_containerd_starts_again(self, furnished, fake):
        follow(furnished, fake)
        ask(furnished, "GET", "/containers/json?all=1")
        fake.exit(ID, 2)
        answer = ask(furnished, "DELETE", "/containers/tstweb")
        assert (answer.status, answer.message) == (409, 'cannot remove container "/tstweb": container is restarting: stop the container before removing or force remove')

    @pytest.mark.parametrize("files, label, ports", [
        ({"network-config.json": '{"portMappings":[{"HostPort":1,"ContainerPort":2,"Protocol":"udp","HostIP":"::1"}]}'}, "", [("::1", 2, 1, "udp")]),
        ({"network-config.json": "{}"}, "", []), ({"network-config.json": "{"}, '[{"HostPort":1,"ContainerPort":2}]', [("0.0.0.0", 2, 1, "tcp")]), ({}, "", []), ({}, "{", []),
        ({}, "5", []), ({}, '[5]', []), ({"network-config.json": "[5]"}, "", []), ({"network-config.json": '{"portMappings":{"a":1}}'}, "", []),
        ({}, '[{"HostPort":1,"ContainerPort":2,"Protocol":"tcp","HostIP":"0.0.0.0"}]', [("0.0.0.0", 2, 1, "tcp")])])
    def test_ports(self, tmp_path, files, label, ports):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        found = container_of({"nerdctl/state-dir": str(tmp_path), **({"nerdctl/ports": label} if label else {})}).ports
        assert [tuple(each.values()) for each in found] == ports

    @pytest.mark.parametrize("spec", [b"", b"{", b"[]", b"null"])
    def test_a_spec_that_is_none(self, spec):
        container = nerdctld.Container(container_of().record._replace(spec=spec))
        assert container.spec == {} and container.arguments == []

    def test_containers_of_kubernetes(self, furnished, fake):
        labels = {"io.kubernetes.pod.namespace": "ns", "io.kubernetes.pod.name": "pod", "io.kubernetes.container.name": "c"}
        fake.create("5" * 64, labels, image="sha256:" + "1" * 64)
        fake.create("6" * 64, {**labels, "io.kubernetes.container.name": ""})
        fake.create("7" * 64)
        told = {each["Id"][0]: each["Names"] for each in ask(furnished, "GET", "/containers/json?all=1").json}
        assert (told["5"], told["6"]) == (["/k8s://ns/pod/c"], ["/k8s://ns/pod"])
        assert ask(furnished, "GET", "/containers/" + "7" * 64 + "/json").status == 200

    @pytest.mark.parametrize("name", [ID, ID[:12], "d", "tstweb", "/tstweb"])
    def test_container_by(self, reading, name):
        assert reading.inventory.container(name).id == ID

    @pytest.mark.parametrize("name, kind, words", [("nosuch", nerdctld.NotFound, "No such container: nosuch"), ("/", nerdctld.BadParameter, "empty"),
                                                   ("-x", nerdctld.NotFound, "No such container: -x"), ("tstwe", nerdctld.NotFound, "tstwe")])
    def test_no_container_by(self, reading, name, kind, words):
        with pytest.raises(kind, match=words):
            reading.inventory.container(name)

    def test_a_name_comes_before_the_beginning_of_an_id(self, furnished, fake):
        done = furnished.inventory.container("tstdone").id
        fake.label(done, **{"nerdctl/name": "da8682"})
        assert furnished.inventory.container("da8682").id == done

    def test_ambiguous_container(self, furnished, fake):
        fake.create("da8683" + ID[6:])
        with pytest.raises(nerdctld.BadParameter, match="multiple IDs found with provided prefix: da868"):
            furnished.inventory.container("da868")

    @pytest.mark.parametrize("name", ["localhost:5000/bb:1", "tst:a", "library/tst:a", "docker.io/library/tst:a", BB, BB[7:], BB[7:19], BB[:15],
                                      "tst@" + BB, "localhost:5000/bb@" + BB, BB_CONFIG, BB_CONFIG[7:19]])
    def test_image_by(self, reading, name):
        assert reading.inventory.image(name).id == BB

    @pytest.mark.parametrize("name", ["tst", "bb:1", "4cfb279d3e25", "other@" + BB, "TST:a", "-f", "a b"])
    def test_no_image_by(self, reading, name):
        with pytest.raises(nerdctld.NotFound, match="No such image"):
            reading.inventory.image(name)

    def test_ambiguous_image(self, furnished, fake):
        fake.tag("x:1", "sha256:4cfb279d3f" + "0" * 54)
        with pytest.raises(nerdctld.BadParameter, match="ambiguous"):
            furnished.inventory.image("4cfb279d3")

    def platform(self, fake, architecture, variant="", **more):
        """A manifest of one layer in an index: its descriptor, with the content of all of it."""
        layer = fake.put({"layer of": architecture + variant})
        config = {"architecture": architecture, "os": "linux", "config": {"Labels": {"for": architecture + variant}}, "rootfs": {"diff_ids": [layer]}}
        manifest = fake.put({"config": {"digest": fake.put(config)}, "layers": [{"digest": layer, "size": 4}]})
        fake.snapshots["overlayfs", layer] = ("", 100)
        platform = {"architecture": architecture, "os": "linux" if architecture != "unknown" else "unknown", **({"variant": variant} if variant else {})}
        return {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": 9, "platform": platform, **more}

    def indexed(self, engine, fake, *manifests):
        """The image of an index."""
        digest = fake.put({"manifests": list(manifests)})
        fake.tag("docker.io/library/many:1", digest)
        return engine.inventory.image("many:1")

    def test_an_index_of_which_one_platform_is_here(self, engine, fake):
        other, ours = self.platform(fake, "s390x"), self.platform(fake, "riscv64")
        del fake.content[other["digest"]]
        image = self.indexed(engine, fake, other, ours)
        assert (image.labels, image.content.unpacked_size, image.digests) == ({"for": "riscv64"}, 100, [image.id, ours["digest"], json.loads(fake.content[ours["digest"]])["config"]["digest"]])
        told = ask(engine, "GET", "/images/many:1/json").json
        assert (told["Id"], told["Architecture"]) == (image.id, "riscv64")
        # Of a manifest without its layers a platform is not here.
        del fake.content[json.loads(fake.content[ours["digest"]])["layers"][0]["digest"]]
        assert self.indexed(engine, fake, ours).content is nerdctld.NO_CONTENT

    def test_every_platform_is_told(self, engine, fake):
        ours, other, gone = (self.platform(fake, each) for each in ("riscv64", "s390x", "arm"))
        attested = self.platform(fake, "unknown", annotations={
            "vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": ours["digest"]})
        attested["platform"]["os"] = "unknown"
        del fake.content[gone["digest"]]
        image = self.indexed(engine, fake, ours, other, gone, attested)
        rows = ask(engine, "GET", "/images/many:1/json?manifests=1").json["Manifests"]
        assert [each["ID"] for each in rows] == [ours["digest"], other["digest"], gone["digest"], attested["digest"]]
        assert [(each["Available"], each["Kind"]) for each in rows] == [(True, "image"), (True, "image"), (False, "image"), (True, "attestation")]
        assert rows[3]["AttestationData"] == {"For": ours["digest"]} and rows[2]["Size"] == {"Content": 0, "Total": 0}
        assert [each["ImageData"]["Platform"]["architecture"] for each in rows[:3]] == ["riscv64", "s390x", "arm"]
        listed = next(each for each in ask(engine, "GET", "/images/json?manifests=1").json if each["Id"] == image.id)
        assert listed["Manifests"] == rows and listed["Size"] == sum(each["Size"]["Total"] for each in rows)
        told = ask(engine, "GET", "/images/many:1/json?platform=linux/s390x").json
        assert (told["Id"], told["Architecture"], told["Descriptor"], told["Config"]["Labels"]) == (other["digest"], "s390x", other, {"for": "s390x"})
        # Of an older version it is no parameter.
        assert ask(engine, "GET", "/v1.48/images/many:1/json?platform=linux/s390x").json["Id"] == image.id
        assert ask(engine, "GET", "/images/many:1/json?platform=linux/arm").status == 404
        assert ask(engine, "GET", "/images/many:1/json?manifests=1&platform=linux/s390x").status == 400
        assert ask(engine, "GET", "/images/json?identity=1").status == 400 and ask(engine, "GET", "/images/json?identity=1&manifests=1").status == 200

    def test_one_platform_is_removed(self, engine, fake):
        ours, other = self.platform(fake, "riscv64"), self.platform(fake, "s390x")
        manifest = json.loads(fake.content[other["digest"]])
        shared = json.loads(fake.content[ours["digest"]])["layers"][0]
        manifest["layers"] = [shared, *manifest["layers"]]
        fake.content[other["digest"]] = json.dumps(manifest).encode()
        self.indexed(engine, fake, ours, other)
        answer = ask(engine, "DELETE", "/images/many:1?platforms=linux/s390x")
        assert answer.status == 400 and "--force" in answer.message and other["digest"] in fake.content
        answer = ask(engine, "DELETE", "/images/many:1?force=1&platforms=" + urllib.parse.quote('{"os":"linux","architecture":"s390x"}'))
        assert answer.json == [{"Deleted": other["digest"]}]
        assert other["digest"] not in fake.content and manifest["config"]["digest"] not in fake.content
        # The other one needs it.
        assert shared["digest"] in fake.content
        assert [each["Available"] for each in ask(engine, "GET", "/images/many:1/json?manifests=1").json["Manifests"]] == [True, False]
        assert ask(engine, "DELETE", "/images/many:1?force=1&platforms=linux/s390x").status == 404

    def test_an_index_of_more_than_one(self, engine, fake):
        machine = nerdctld.GO_ARCHITECTURES.get(os.uname().machine, os.uname().machine)
        ours, other, attestation = self.platform(fake, machine), self.platform(fake, "s390x"), self.platform(fake, "unknown", annotations={
            "vnd.docker.reference.type": "attestation-manifest"})
        for manifests in itertools.permutations([ours, other, attestation]):
            assert self.indexed(engine, fake, *manifests).labels == {"for": machine}
        assert self.indexed(engine, fake, attestation, other).labels == {"for": "s390x"}

    def test_an_image_without_its_content(self, furnished, fake):
        follow(furnished, fake)
        digest = "sha256:" + hashlib.sha256(b'{"manifests": []}').hexdigest()
        fake.tag("docker.io/library/hollow:1", digest)
        told = {each["Id"]: each for each in ask(furnished, "GET", "/images/json").json}[digest]
        assert told["RepoTags"] == ["hollow:1"]
        read = fake.calls["Content/List"]
        ask(furnished, "GET", "/images/json")
        assert fake.calls["Content/List"] == read
        # It is looked for again after a while; content comes without an event.
        ours = self.platform(fake, "amd64")
        fake.content[digest] = json.dumps({"manifests": [ours]}).encode()
        furnished.inventory.images.until = 0.0
        assert ask(furnished, "GET", "/images/hollow:1/json").json["Config"]["Labels"] == {"for": "amd64"}
        assert fake.calls["Content/List"] == read + 1

    @pytest.mark.parametrize("blob", [b"{", b"[]", b"1", b"{}", b'{"manifests":{}}', b'{"manifests":[{}]}', b'{"manifests":null}', b'{"config":{},"layers":[]}', b'{"config":[1]}',
                                      b'{"config":{"digest":"sha256:nosuch"}}'])
    def test_content_that_is_no_image(self, furnished, fake, blob):
        digest = "sha256:" + hashlib.sha256(blob).hexdigest()
        fake.content[digest] = blob
        fake.tag("docker.io/library/odd:1", digest)
        assert len(ask(furnished, "GET", "/images/json").json) == 3 and ask(furnished, "GET", "/images/odd:1/json").status in (200, 404)

    def test_an_index_that_is_completed_later(self, engine, fake):
        follow(engine, fake)
        ours, later = self.platform(fake, "s390x"), self.platform(fake, nerdctld.GO_ARCHITECTURES.get(os.uname().machine, os.uname().machine))
        kept = fake.content.pop(later["digest"])
        assert self.indexed(engine, fake, ours, later).labels == {"for": "s390x"}
        fake.content[later["digest"]] = kept
        assert self.indexed(engine, fake, ours, later).labels == later["platform"] and False or engine.inventory.image("many:1").labels == {"for": later["platform"]["architecture"]}

    def test_names_of_kubernetes(self, furnished, fake):
        # CRI gives an image three names: a tag, a digest, and the digest of its configuration.
        for name in ("registry.k8s.io/pause:3", "registry.k8s.io/pause@" + BB, BB_CONFIG):
            fake.tag(name, BB)
        image = furnished.inventory.image("registry.k8s.io/pause:3")
        assert "registry.k8s.io/pause:3" in image.repo_tags and not [each for each in image.repo_tags if "sha256" in each]
        assert sorted(image.repo_digests) == sorted(f"{each}@{BB}" for each in ("tst", "localhost:5000/bb", "registry.k8s.io/pause"))
        assert furnished.inventory.image(BB_CONFIG).id == BB and nerdctld.is_nameless(BB_CONFIG)

    def test_content_is_read_once(self, furnished, fake):
        follow(furnished, fake)
        ask(furnished, "GET", "/images/json")
        read, usage = fake.calls["Content/Read"], fake.calls["Snapshots/Usage"]
        fake.tag("docker.io/library/new:b", BB)
        assert "new:b" in str(ask(furnished, "GET", "/images/json").json)
        furnished.settle()
        # The name is asked for once for the list, and once for what clients are told of it.
        assert (fake.calls["Content/Read"], fake.calls["Snapshots/Usage"], fake.calls["Images/List"], fake.calls["Images/Get"]) == (read, usage, 1, 2)

    def test_content_of_images_that_are_gone_is_given_up(self, engine, fake):
        follow(engine, fake)
        self.indexed(engine, fake, self.platform(fake, "s390x"))
        assert engine.inventory.images.blobs and engine.inventory.images.sizes
        fake.untag("docker.io/library/many:1")
        assert engine.inventory.images.get() == {} and not engine.inventory.images.blobs and not engine.inventory.images.sizes

    @pytest.mark.parametrize("policy, count, status, between, new", [
        # While containerd starts it again: its task is away, or made and not started.
        ("always", "1", "running", "restarting", "restarting"), ("on-failure:3", "2", "running", "restarting", "restarting"),
        # The last time that it may; a first start; one that is to stay as it is.
        ("on-failure:3", "3", "running", "exited", "restarting"), ("always", "", "running", "exited", "created"), ("always", "1", "stopped", "exited", "created")])
    def test_between_two_tasks(self, policy, count, status, between, new):
        labels = {"containerd.io/restart.policy": policy, "containerd.io/restart.count": count, "containerd.io/restart.status": status}
        task = nerdctld.TaskRecord(1, "created", 0, 0, "")
        assert [nerdctld.container_state(labels, each, 10**18).kind for each in (None, task)] == [between, new]

    @pytest.mark.parametrize("version, lists", [("v1.7.28", True), ("1.6.20~ds1", True), ("v2.3.1", False)])
    def test_images_that_no_event_tells_of(self, furnished, fake, version, lists):
        fake.version = (version, "")
        follow(furnished, fake)
        before = furnished.inventory.images.records()
        assert furnished.inventory.images.records() is before
        # As containerd 1.7's transfer service makes them.
        silent = "docker.io/library/silent:1"
        fake.images[silent] = fake.images[BASE]._replace(name=silent)
        names = {tag for each in ask(furnished, "GET", "/images/json").json for tag in each["RepoTags"]}
        assert ("silent:1" in names) == lists
        assert ask(furnished, "GET", "/images/silent:1/json").status == (200 if lists else 404)

    def test_what_a_push_makes_for_itself_is_not_there(self, furnished, fake):
        follow(furnished, fake)
        before = ask(furnished, "GET", "/images/json").json
        fake.tag(BASE + nerdctld.REDUCED, BB)
        assert ask(furnished, "GET", "/images/json").json == before and fake.calls["Images/Get"] == 0
        furnished.inventory.images.invalidate()
        assert ask(furnished, "GET", "/images/json").json == before

    def test_files_that_nerdctl_did_not_write(self, furnished, tmp_path, fake):
        names = sorted(furnished.inventory.networks())
        assert names == ["bridge", "host", "none", "tstnet"]
        for name, text in (("a.conflist", "{"), ("b.conflist", "[]"), ("c.conflist", '{"name":1,"plugins":[]}'), ("d.txt", '{"name":"d","plugins":[]}'), ("e.conflist", '{"name":"e"}'),
                           ("g.conflist", '{"name":"g","plugins":[1]}'), ("h.conflist", '{"name":"h","nerdctlLabels":[1],"plugins":[]}')):
            (tmp_path / "networks" / name).write_text(text)
        (tmp_path / "networks" / "f.conflist").mkdir()
        assert sorted(furnished.inventory.networks()) == names
        volumes = store_of(fake, tmp_path) / "volumes" / "default"
        (volumes / "empty").mkdir()
        (volumes / "odd").mkdir()
        (volumes / "odd" / "volume.json").write_text("[]")
        (volumes / "worse").mkdir()
        (volumes / "worse" / "volume.json").write_text('{"labels":[1]}')
        assert sorted(furnished.inventory.volumes()) == ["odd", "tstvol"]

    def test_files_are_read_anew_when_they_were_written(self, furnished, tmp_path):
        path = tmp_path / "networks" / "default" / "nerdctl-tstnet.conflist"
        assert furnished.inventory.networks()["tstnet"]["Labels"] == {}
        write_json(path, {**json.loads(path.read_text()), "nerdctlLabels": {"a": "b"}})
        assert furnished.inventory.networks()["tstnet"]["Labels"] == {"a": "b"}
        path.unlink()
        assert "tstnet" not in furnished.inventory.networks()

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

    @pytest.mark.parametrize("command, kept", [("version", "tools"), ("info", "machine")])
    def test_what_could_not_be_read_again_is_not_believed(self, furnished, scripted, command, kept):
        assert ask(furnished, "GET", "/info").status == 200
        scripted.on(command, stderr=FAILURES[0][1], status=1)
        kept = getattr(furnished.inventory, kept)
        assert kept.get()
        kept.until = 0.0
        for _ in range(2):
            with pytest.raises(nerdctld.Unavailable):
                kept.get()
        scripted.on(command, VERSION_TOLD if command == "version" else INFO)
        calls = len(scripted.calls(command))
        assert kept.get() and kept.get() and len(scripted.calls(command)) == calls + 1

    def test_mounts_that_older_ones_noted(self):
        # nerdctl 2.1.6 and 1.7.7 keep all mounts in one label.
        noted = [{"Type": "bind", "Source": "/tmp", "Destination": "/host", "Mode": "ro", "RW": False, "Propagation": ""}]
        container = container_of({"a": "b,c", "nerdctl/mounts": json.dumps(noted)})
        assert nerdctld.parse_mounts(container.labels) == noted and container.visible_labels == {"a": "b,c"}


###############################################################################
# System
###############################################################################


def encoded(value):
    """A value as X-Registry-Auth carries it."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


def filtered(**filters):
    """The query of a filters parameter."""
    return "filters=" + urllib.parse.quote(json.dumps(filters))


class TestSystem:
    def test_ping(self, engine, scripted):
        answer = ask(engine, "GET", "/_ping")
        assert (answer.status, answer.body, answer.headers["Builder-Version"], answer.headers["Swarm"]) == (200, b"OK", "2", "inactive")
        head = ask(engine, "HEAD", "/v1.24/_ping")
        assert (head.status, head.body) == (200, b"")
        assert scripted.calls() == []

    def test_version(self, furnished):
        told = ask(furnished, "GET", "/version").json
        assert [(each["Name"], each["Version"]) for each in told["Components"]] == [
            ("Engine", nerdctld.ENGINE_VERSION), ("nerdctld", nerdctld.VERSION), ("nerdctl", "v2.3.5"), ("containerd", "v2.3.1"),
            ("runc", "1.1.5+ds1"), ("buildctl", "v0.34.2")]
        assert (told["ApiVersion"], told["MinAPIVersion"], told["Os"]) == ("1.56", "1.12", "linux")
        assert told["Platform"]["Name"] == f"nerdctld {nerdctld.VERSION}, nerdctl v2.3.5, containerd v2.3.1"

    def test_the_version_of_the_engine_is_one_of_docker(self, furnished):
        told, info = ask(furnished, "GET", "/version").json, ask(furnished, "GET", "/info").json
        # Clients read three numbers, and compare them with those of Docker (1.6.0 is the least that Testcontainers takes).
        assert told["Version"] == info["ServerVersion"] == told["Components"][0]["Version"]
        assert re.fullmatch(r"\d+\.\d+\.\d+", told["Version"]) and tuple(map(int, told["Version"].split("."))) >= (29, 0, 0)
        assert info["Labels"] == [f"nerdctld={nerdctld.VERSION}", "nerdctl=v2.3.5"]

    def test_version_without_nerdctl(self, tmp_path, fake):
        engine = nerdctld.Engine(nerdctld.Nerdctl([str(tmp_path / "none")]), nerdctld.Containerd(fake.path))
        answer = ask(engine, "GET", "/version")
        assert answer.status == 200 and "--nerdctl" in answer.json["Platform"]["Name"]
        assert ask(engine, "GET", "/_ping").status == 200
        for method, path in (("GET", "/info"), ("POST", "/images/create?fromImage=tst:a"), ("POST", "/volumes/create"), ("POST", "/networks/create")):
            answer = ask(engine, method, path, {"Name": "some"})
            assert answer.status == 503 and "install nerdctl" in answer.message, path
        # What is only read needs no nerdctl.
        for path in ("/containers/json", "/images/json", "/networks", "/volumes"):
            assert ask(engine, "GET", path).status == 200, path
        engine.close()

    def test_containerd_down(self, engine, scripted, fake):
        for command in ("version", "info"):
            scripted.on(command, stderr=FAILURES[0][1], status=1)
        assert ask(engine, "GET", "/version").status == 200
        answer = ask(engine, "GET", "/info")
        assert answer.status == 503 and "systemctl start containerd" in answer.message
        fake.stop_serving()
        for path in ("/containers/json", "/images/json", "/system/df"):
            answer = ask(engine, "GET", path)
            assert answer.status == 503 and "containerd" in answer.message, path
        fake.start_serving()

    def test_info(self, furnished):
        told = ask(furnished, "GET", "/info").json
        assert (told["Containers"], told["ContainersRunning"], told["ContainersPaused"], told["ContainersStopped"], told["Images"]) == (4, 1, 1, 2, 2)
        assert (told["CgroupDriver"], told["MemTotal"], told["Driver"]) == ("cgroupfs", 25276510208, "overlayfs")
        assert told["Swarm"]["LocalNodeState"] == "inactive"

    def test_info_of_versions(self, furnished):
        told = {version: ask(furnished, "GET", f"/v{version}/info").json for version in ("1.24", "1.45", "1.46", "1.47", "1.48", "1.49", "1.50")}
        assert told["1.24"]["ExecutionDriver"] == "<not supported>" and not [each for each in told["1.24"]["SecurityOptions"] if "=" in each]
        assert [each for each in told if "Containerd" not in told[each]] == ["1.24", "1.45"]
        assert [each for each in told if "AllowNondistributableArtifactsCIDRs" in told[each]["RegistryConfig"]] == ["1.24", "1.45", "1.46"]
        assert [each for each in told if "Expected" in told[each]["RuncCommit"]] == ["1.24", "1.45", "1.46", "1.47", "1.48"]
        assert [each for each in told if "BridgeNfIptables" not in told[each]] == ["1.50"]

    @pytest.mark.parametrize("read, text", [
        (nerdctld.nerdctl_error, fatal("1" * 40000 + "!")), (nerdctld.nerdctl_error, fatal("connection error " * 4000)), (nerdctld.size_bytes, "1" + " " * 40000 + "!"),
        (nerdctld.size_bytes, "9" * 400), (nerdctld.next_query, "<" * 60000), (nerdctld.parse_loaded, "a:" * 30000), (nerdctld.parse_reference, "a-" * 100 + "!"),
        (lambda text: nerdctld.build_failure([text]), 'process "' * 12000), (nerdctld.glob_expression, "*[a" * 20000 + "]"),
        (lambda text: nerdctld.build_context(nerdctld.Request("POST", "/build", query={"remote": [text]}), ""), "http://" + ".git#" * 12000 + " ")])
    def test_time_to_read_what_others_wrote(self, read, text):
        began = time.process_time()
        with contextlib.suppress(nerdctld.ApiError):
            read(text)
        assert time.process_time() - began < 2

    def test_auth(self, engine, scripted):
        scripted.on("login", reads=True, stdout="Login Succeeded\n")
        answer = ask(engine, "POST", "/auth", {"username": "-u", "password": "p", "serveraddress": "http://localhost:5000/v1/"})
        assert (answer.status, answer.json) == (200, {"Status": "Login Succeeded"})
        call = scripted.calls("login")[0]
        assert call["argv"] == ["login", "--username", "-u", "--password-stdin", "--", "localhost:5000"] and call["text"] == "p"
        assert call["auth"] == {"auths": {}}, "not in a folder of its own"

    def test_auth_refused(self, engine, scripted):
        scripted.on("login", stderr=level("error", "failed to call tryLoginWithRegHost") + fatal("too many 401 (probably)"), status=1)
        assert ask(engine, "POST", "/auth", {"username": "u", "password": "p", "serveraddress": "localhost:5998"}).status == 401

    def test_auth_without_answer(self, engine, scripted):
        scripted.on("login", stderr=fatal('failed to call rh.Client.Do: Get "http://localhost:5999/v2/": dial tcp 127.0.0.1:5999: connect: '
                                          "connection refused"), status=1)
        assert ask(engine, "POST", "/auth", {"username": "u", "password": "p", "serveraddress": "localhost:5999"}).status == 500

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", {"username": 1}, {"password": "x"}, {"username": "u", "serveraddress": "-x"}, {"username": "u", "serveraddress": "a b"},
                                      b'{"username":"\\ud800"}', b"[" * 100000])
    def test_auth_refuses(self, engine, scripted, body):
        assert ask(engine, "POST", "/auth", body).status == 400
        assert scripted.calls() == []

    @pytest.mark.parametrize("credentials, entry", [
        ({"username": "u", "password": "p"}, {"auth": base64.b64encode(b"u:p").decode()}), ({"auth": "dTpw"}, {"auth": "dTpw"}),
        ({"identitytoken": "t"}, {"identitytoken": "t", "auth": base64.b64encode(b"00000000-0000-0000-0000-000000000000:").decode()})])
    def test_credentials(self, credentials, entry):
        assert nerdctld.registry_auths(credentials, "localhost:5000") == {"localhost:5000": entry}
        assert list(nerdctld.registry_auths(credentials, "docker.io")) == ["https://index.docker.io/v1/"]

    @pytest.mark.parametrize("text", ["!", "e30", encoded([]), encoded("x"), "é", base64.urlsafe_b64encode(b"[" * 40000).decode()])
    def test_bad_credentials(self, text):
        if text == "e30":
            assert nerdctld.decode_auth(text) == {}
            return
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.decode_auth(text)

    def test_df(self, furnished, scripted, tmp_path):
        buildctl = tmp_path / "bin" / "buildctl"
        buildctl.parent.mkdir()
        buildctl.write_text(f"#!/bin/sh\ncat <<'END'\n{BUILDCTL_DU.stdout}END\n")
        buildctl.chmod(0o755)
        furnished.nerdctl.environment["PATH"] = f"{buildctl.parent}:{os.environ['PATH']}"
        path, os.environ["PATH"] = os.environ["PATH"], furnished.nerdctl.environment["PATH"]
        try:
            old, new = ask(furnished, "GET", "/v1.51/system/df").json, ask(furnished, "GET", "/system/df").json
            oldest = ask(furnished, "GET", "/v1.41/system/df?type=volume").json
        finally:
            os.environ["PATH"] = path
        assert sorted(old) == ["BuildCache", "Containers", "Images", "LayersSize", "Volumes"]
        assert set(oldest) - set(old) == {"BuilderSize"} and oldest["BuilderSize"] == sum(each["Size"] for each in old["BuildCache"])
        assert set(new) - set(old) == {"ImageUsage", "ContainerUsage", "VolumeUsage", "BuildCacheUsage"}
        assert old["Volumes"][0]["UsageData"] == {"Size": 0, "RefCount": 1}
        assert {each["Names"][0]: each["SizeRw"] for each in old["Containers"]}["/tstweb"] == 28672
        assert new["BuildCacheUsage"]["TotalCount"] == 2 and new["ContainerUsage"]["ActiveCount"] == 2
        images = {each["Id"]: each["Containers"] for each in old["Images"]}
        assert images[BB] == 4

    def test_events_that_nobody_reads(self, furnished, fake):
        follow(furnished, fake)
        furnished.journal.BEHIND = 3
        chunks = nerdctld.dispatch(furnished, nerdctld.Request("GET", "/events")).body.chunks
        assert next(chunks) == b""
        for number in range(5):
            furnished.journal.emit("image", "tag", str(number), {})
        assert [json.loads(next(chunks))["Actor"]["ID"] for _ in range(3)] == list("012")
        with pytest.raises(nerdctld.ApiError, match="3 events behind"):
            next(chunks)

    @pytest.mark.parametrize("script", ["", 'echo "error: failed to dial: no such file or directory" >&2; exit 1'], ids=["no buildctl", "no buildkitd"])
    def test_df_without_buildkit(self, furnished, monkeypatch, tmp_path, script):
        # The scripted nerdctl needs no more than a shell.
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "sh").symlink_to("/bin/sh")
        if script:
            (tmp_path / "bin" / "buildctl").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "bin" / "buildctl").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        answer = ask(furnished, "GET", "/v1.51/system/df")
        assert answer.status == 200 and answer.json["BuildCache"] == [] and len(answer.json["Images"]) == 2
        assert ask(furnished, "GET", "/v1.51/system/df?type=build-cache").json == {"BuildCache": []}

    def test_df_of_a_type(self, furnished, scripted):
        assert list(ask(furnished, "GET", "/v1.51/system/df?type=volume").json) == ["Volumes"]
        assert ask(furnished, "GET", "/system/df?type=nothing").status == 400
        assert scripted.calls() == []


###############################################################################
# Images
###############################################################################


def put_manifest(fake, platform="", whole=False):
    """The content of an image for this machine, or for another platform, of which only the manifest is here unless it is `whole`; its
    descriptor."""
    os_name, _, architecture = platform.partition("/")
    data = f"a layer for {platform}".encode()
    layer = "sha256:" + hashlib.sha256(data).hexdigest()
    config = fake.put({"os": os_name or "linux", "architecture": architecture or "amd64", "rootfs": {"diff_ids": [layer]}})
    value = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "config": {"digest": config, "size": len(fake.content[config])},
             "layers": [{"digest": layer, "size": len(data), "mediaType": "application/vnd.oci.image.layer.v1.tar"}]}
    digest = fake.put(value)
    if not platform or whole:
        fake.content[layer] = data
    return {"mediaType": value["mediaType"], "digest": digest, "size": len(fake.content[digest]),
            "platform": {"os": os_name or "linux", "architecture": architecture or nerdctld.GO_ARCHITECTURES.get(os.uname().machine, os.uname().machine)}}


def put_named(fake, name, index=()):
    """An image of that name, or an index of these platforms with the content of this machine's; digests of both."""
    manifest = put_manifest(fake)
    digest = fake.put({"manifests": [*(put_manifest(fake, each) for each in index), manifest]}) if index else manifest["digest"]
    fake.tag(name, digest)
    return digest, manifest["digest"]


def opened_archive(data):
    """The files of a tar by their names; it has to be whole."""
    assert data.endswith(bytes(1024)) and len(data) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {each.name: tar.extractfile(each).read() for each in tar if each.isreg()}


@pytest.fixture
def saving(furnished, fake):
    """An engine with an image of three names that can be saved; `made` has the digests of its target and manifest."""
    for name in [name for name in fake.images if "tst" in name]:
        fake.untag(name)
    furnished.made = put_named(fake, "docker.io/library/tst:a")
    for name in ("docker.io/library/tst:c", "localhost:5000/tst:b"):
        fake.tag(name, furnished.made[0])
    return furnished


class TestImages:
    @pytest.fixture(autouse=True)
    def no_registry(self, monkeypatch):
        """No registry is asked for what it has, but where a test wants it."""
        self.registry_has = nerdctld.registry_has
        monkeypatch.setattr(nerdctld, "registry_has", lambda *_: False)

    def test_list(self, furnished, scripted):
        rows = ask(furnished, "GET", "/v1.51/images/json").json
        assert rows[0] == {
            "Containers": 4, "Created": 1700000000, "Id": BB, "Labels": {"base": "busybox"}, "ParentId": "",
            "RepoDigests": ["tst@" + BB, "localhost:5000/bb@" + BB], "RepoTags": ["tst:a", "localhost:5000/bb:1"], "SharedSize": -1,
            "Size": rows[0]["Size"], "Descriptor": {"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "digest": BB, "size": 422}}
        assert rows[0]["Size"] > 2129920

    def test_shapes_of_versions(self, reading):
        assert "VirtualSize" in ask(reading, "GET", "/v1.43/images/json").json[0]
        assert "VirtualSize" not in ask(reading, "GET", "/v1.44/images/json").json[0]
        assert "Descriptor" not in ask(reading, "GET", "/v1.47/images/json").json[0]
        nameless = [each for each in ask(reading, "GET", "/v1.42/images/json").json if each["RepoTags"] == ["<none>:<none>"]]
        assert len(nameless) == 1

    def test_shared_size_and_manifests(self, reading):
        row = ask(reading, "GET", "/images/json?shared-size=1&manifests=1").json[0]
        assert row["SharedSize"] >= 0 and row["Containers"] == 4
        assert row["Manifests"][0]["Kind"] == "image" and len(row["Manifests"][0]["ImageData"]["Containers"]) == 4
        assert row["Manifests"][0]["ImageData"]["Platform"] == {"architecture": "amd64", "os": "linux"}

    @pytest.mark.parametrize("filters, names", [
        ({"reference": ["tst"]}, ["tst:a"]), ({"reference": ["localhost:5000/*"]}, ["localhost:5000/bb:1"]), ({"reference": ["loc*"]}, []), ({"reference": ["t?t:a"]}, ["tst:a"]),
        ({"reference": ["t[r-t][^a]"]}, ["tst:a"]), ({"reference": ["\\ts*:[ab]"]}, ["tst:a"]), ({"reference": ["t[^s]t", "ts\\*"]}, []),
        ({"dangling": ["true"]}, []), ({"dangling": {"false": True}}, ["tst:a"]), ({"label": ["base"]}, ["tst:a"]), ({"label": ["base=x"]}, []),
        ({"before": ["tst:a"]}, []), ({"since": ["tst:a"]}, []), ({"until": ["2023-01-01"]}, []), ({"until": ["1h"]}, ["tst:a"])])
    def test_filters(self, reading, filters, names):
        rows = [each for each in ask(reading, "GET", "/images/json?" + filtered(**filters)).json if each["RepoTags"]]
        assert [each["RepoTags"][0] for each in rows] == names

    @pytest.mark.parametrize("query", ["filters={", "filters=%7B%22x%22%3A%5B%22a%22%5D%7D", filtered(dangling=["maybe"]), filtered(until=["yesterday"]),
                                       filtered(until=["1h", "2h"])])
    def test_bad_filters(self, reading, query):
        assert ask(reading, "GET", "/images/json?" + query).status == 400

    @pytest.mark.parametrize("name", ["localhost:5000/bb:1", "tst:a", BB, BB[7:19]])
    def test_inspect(self, reading, name):
        told = ask(reading, "GET", f"/v1.51/images/{name}/json").json
        assert (told["Id"], told["Architecture"], told["Os"], told["Created"]) == (BB, "amd64", "linux", "2023-11-14T22:13:20Z")
        assert told["Config"]["Cmd"] == ["sh"] and told["Config"]["Env"] == ["PATH=/bin"]
        assert told["RootFS"] == {"Type": "layers", "Layers": ["sha256:79df1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17"]}

    def test_inspect_none(self, reading):
        answer = ask(reading, "GET", "/images/nosuch/json")
        assert (answer.status, answer.message) == (404, "No such image: nosuch:latest")
        answer = ask(reading, "GET", "/images/tst:a/json?platform=" + urllib.parse.quote('{"os":"linux","architecture":"arm64"}'))
        assert answer.status == 404 and "linux/arm64" in answer.message
        assert ask(reading, "GET", "/images/tst:a/json?platform=" + urllib.parse.quote('{"os":"linux","architecture":"amd64"}')).status == 200
        assert ask(reading, "GET", "/images/tst:a/json?platform={").status == 400

    def test_history(self, furnished, scripted):
        assert ask(furnished, "GET", "/images/tst:a/history").json == [{
            "Comment": "", "Created": 1700000000, "CreatedBy": "busybox-static", "Id": BB, "Size": 2019328, "Tags": ["tst:a", "localhost:5000/bb:1"]}]
        assert scripted.calls() == []

    def test_history_of_steps_without_layer(self, furnished, fake):
        put_image(fake, json.loads(BUILT_INSPECT.stdout), "docker.io/library/tst:a")
        assert [(each["CreatedBy"][:8], each["Size"]) for each in ask(furnished, "GET", "/images/tst:a/history").json] == [
            ('CMD ["sh', 0), ("RUN /bin", 20480), ("ENV A=1", 0), ("busybox-", 2019328)]

    def pulled(self, scripted, fake):
        fake.tag("localhost:5000/tst/rec:1", BB)
        scripted.on("pull", PULL, does=lambda words: fake.tag("localhost:5000/tst/rec:1", BB))

    def test_pull(self, furnished, scripted, fake):
        self.pulled(scripted, fake)
        answer = ask(furnished, "POST", "/images/create?fromImage=localhost:5000/tst/rec&tag=1")
        assert answer.status == 200 and b"}\r\n{" in answer.body
        assert answer.lines[0] == {"status": "Pulling from tst/rec", "id": "1"}
        assert answer.lines[-2:] == [{"status": f"Digest: {BB}"}, {"status": "Status: Image is up to date for localhost:5000/tst/rec:1"}]
        assert scripted.argv("pull") == ["pull", "--", "localhost:5000/tst/rec:1"]

    def test_pull_with_platform_and_credentials(self, furnished, scripted, fake):
        self.pulled(scripted, fake)
        answer = ask(furnished, "POST", "/images/create?fromImage=localhost:5000/tst/rec:1&platform=linux/riscv64",
                     headers={"X-Registry-Auth": encoded({"username": "u", "password": "p"})})
        assert answer.status == 200
        call = scripted.calls("pull")[0]
        assert call["argv"] == ["pull", "--platform=linux/riscv64", "--unpack=false", "--", "localhost:5000/tst/rec:1"]
        assert call["auth"] == {"auths": {"localhost:5000": {"auth": "dTpw"}}} and call["mode"] == 0o600
        assert os.listdir(furnished.workspace.folder()) == []

    def test_pull_of_what_is_not_there(self, furnished, scripted):
        scripted.on("pull", stderr=fatal("failed to resolve image: localhost:5000/tst/nope:1: not found"), status=1)
        answer = ask(furnished, "POST", "/images/create?fromImage=localhost:5000/tst/nope&tag=1")
        assert answer.status == 404 and "localhost:5000/tst/nope:1: not found" in answer.message

    @pytest.mark.parametrize("query", ["", "fromImage=", "fromImage=-x", "fromImage=A", "fromImage=a&tag=b%20c", "fromImage=a:1&platform=a;b", "fromImage=a%00:1",
                                       "fromImage=a&tag=sha256:1"])
    def test_pull_refuses(self, furnished, scripted, query):
        assert ask(furnished, "POST", "/images/create?" + query).status == 400
        assert scripted.calls("pull") == []

    @pytest.mark.parametrize("line, messages", [
        ("└──layer-sha256:79df1f41608a3f38b48a8\twaiting    \t|\x1b[32m\x1b[0m--------------------------------------|\t", []),
        ("   ├──layer-sha256:79df1f41608a3f38b48a8\tdownloading\t|\x1b[32m++++\x1b[0m----| 1.0 MiB/4.0 MiB\t", ["Pulling fs layer", "Downloading"]),
        ("   └──layer-sha256:79df1f41608a3f38b48a8\tcomplete   \t|\x1b[32m++++++\x1b[0m|\t", ["Pulling fs layer", "Download complete", "Pull complete"]),
        ("   └──layer-sha256:79df1f41608a3f38b48a8\talready exists\t", ["Already exists"]), ("Pulling from OCI Registry\telapsed: 0.0 s", []),
        ("layer-sha256:79df1f41608a3f38b48a83fe:    done           |\x1b[32m++++++\x1b[0m| ", ["Pulling fs layer", "Download complete", "Pull complete"])])
    def test_progress(self, line, messages):
        table = nerdctld.ProgressTable(nerdctld.PULL_WORDS)
        told = table.messages(line)
        assert [each["status"] for each in told if each["status"] != "Pulling fs layer" or messages] == messages
        assert all(each["id"] == "79df1f41608a" for each in told)
        if "Downloading" in messages:
            assert told[-1]["progressDetail"] == {"current": 1048576, "total": 4194304}

    def test_push(self, furnished, scripted):
        scripted.on("push", PUSH)
        answer = ask(furnished, "POST", "/images/localhost:5000/bb/push?tag=1", headers={"X-Registry-Auth": encoded({"username": "u", "password": "p"})})
        assert answer.lines == [
            {"status": "The push refers to repository [localhost:5000/bb]"}, {"status": "Pushed", "progressDetail": {}, "id": "79df1f41608a"},
            {"status": f"1: digest: {BB} size: 422"}, {"progressDetail": {}, "aux": {"Tag": "1", "Digest": BB, "Size": 422}}]
        call = scripted.calls("push")[0]
        assert call["argv"] == ["push", "--", "localhost:5000/bb:1"] and call["auth"] == {"auths": {"localhost:5000": {"auth": "dTpw"}}}

    def test_push_of_what_the_registry_has(self, furnished, scripted, fake, monkeypatch):
        monkeypatch.setattr(nerdctld, "registry_has", self.registry_has)
        # Ansible takes a push for a change where a layer was sent.
        digest = "sha256:" + "5" * 64
        scripted.on("push", PUSH)
        for path, words in ((f"/v2/a/b/manifests/{BB}", "Layer already exists"), (f"/v2/a/b/manifests/{digest}", "Pushed")):
            with local_registry(told={path: (200, {}, b"{}")}, open=True) as address:
                fake.tag(f"{address}/a/b:1", BB)
                told = ask(furnished, "POST", f"/images/{address}/a/b/push?tag=1").lines
                assert {"status": words, "progressDetail": {}, "id": "79df1f41608a"} in told
                assert words == "Pushed" or not [each for each in told if each.get("status") in ("Pushing", "Pushed")]

    def test_push_of_all_tags(self, furnished, scripted, fake):
        scripted.on("push", PUSH)
        fake.tag("localhost:5000/bb:2", BB)
        ask(furnished, "POST", "/images/localhost:5000/bb/push")
        assert [each["argv"][-1] for each in scripted.calls("push")] == ["localhost:5000/bb:1", "localhost:5000/bb:2"]

    def test_push_refused(self, furnished, scripted):
        scripted.on("push", stderr=next(each[1] for each in FAILURES if "push access denied" in each[1]), status=1)
        last = ask(furnished, "POST", "/images/localhost:5000/bb/push?tag=1").lines[-1]
        assert last["error"] == last["errorDetail"]["message"] and "push access denied" in last["error"]
        answer = ask(furnished, "POST", "/images/localhost:5000/nosuch/push?tag=1")
        assert (answer.status, answer.message) == (404, "An image does not exist locally with the tag: localhost:5000/nosuch")

    def test_tag(self, furnished, scripted):
        scripted.on("tag")
        answer = ask(furnished, "POST", "/images/tst:a/tag?repo=localhost:5000/x/y&tag=2")
        assert (answer.status, answer.body) == (201, b"")
        assert scripted.argv("tag") == ["tag", "--", "docker.io/library/tst:a", "localhost:5000/x/y:2"]

    @pytest.mark.parametrize("query, status", [("repo=A", 400), ("repo=", 400), ("repo=a&tag=-", 400), ("repo=a@" + BB, 400)])
    def test_tag_refuses(self, furnished, scripted, query, status):
        assert ask(furnished, "POST", "/images/tst:a/tag?" + query).status == status
        assert ask(furnished, "POST", "/images/nosuch/tag?repo=a").status == 404
        assert scripted.calls("tag") == []

    def test_delete_of_one_of_two_names(self, furnished, scripted):
        scripted.on("rmi")
        answer = ask(furnished, "DELETE", "/images/tst:a")
        assert (answer.status, answer.json) == (200, [{"Untagged": "tst:a"}])
        assert scripted.argv("rmi")[-2:] == ["--", "docker.io/library/tst:a"]

    def test_delete_of_the_last_name(self, furnished, scripted, fake):
        follow(furnished, fake)
        scripted.on("rmi", does=lambda words: fake.untag(words[-1]))
        for identity in list(fake.containers):
            fake.delete(identity)
        fake.untag(BASE)
        furnished.settle()
        with furnished.journal.subscribe() as (_, new):
            assert ask(furnished, "DELETE", "/images/tst:a").json == [{"Untagged": "tst:a"}, {"Deleted": BB}]
            assert [new.get(timeout=1)["Action"] for _ in range(2)] == ["untag", "delete"]

    @pytest.mark.parametrize("name, force, words", [
        (BB, "", "must be forced"), (BB, "?force=1", "cannot be forced"), ])
    def test_delete_conflicts(self, furnished, scripted, name, force, words):
        answer = ask(furnished, "DELETE", f"/images/{name}{force}")
        assert answer.status == 409 and words in answer.message
        assert scripted.calls("rmi") == []

    def test_delete_of_a_used_name(self, furnished, fake):
        fake.untag("docker.io/library/tst:a")
        answer = ask(furnished, "DELETE", "/images/localhost:5000/bb:1")
        assert answer.status == 409
        assert re.fullmatch(r'conflict: unable to remove repository reference "localhost:5000/bb:1" \(must force\) - container [0-9a-f]{12} is using '
                            r"its referenced image 4cfb279d3e24", answer.message)

    @pytest.mark.parametrize("name, removed", [
        ("two@" + BB, ["docker.io/library/two:a", "docker.io/library/two:b"]), ("two:b@" + BB, ["docker.io/library/two:b"]),
        ("two:c@" + BB, None), ("three@" + BB, None), ("two@sha256:" + "1" * 64, None)])
    @pytest.mark.parametrize("force", ["", "?force=1", "?force=1&noprune=1"])
    def test_delete_by_digest_takes_the_names_of_one_repository(self, furnished, scripted, fake, name, removed, force):
        for tag in "ab":
            fake.tag("docker.io/library/two:" + tag, BB)
        scripted.on("rmi")
        answer = ask(furnished, "DELETE", f"/images/{name}{force}")
        if removed is None:
            assert answer.status == 404 and scripted.calls("rmi") == []
        else:
            assert answer.json == [{"Untagged": nerdctld.familiar(each)} for each in removed]
            assert scripted.argv("rmi")[scripted.argv("rmi").index("--") + 1:] == removed

    def test_delete_by_id_of_an_image_in_two_repositories(self, furnished, scripted, fake):
        fake.tag(f"localhost:5000/other@{BB}", BB)
        fake.untag(BASE)
        for identity in list(fake.containers):
            fake.delete(identity)
        answer = ask(furnished, "DELETE", f"/images/{BB}")
        assert answer.status == 409 and "multiple repositories" in answer.message and scripted.calls("rmi") == []

    @pytest.mark.parametrize("platforms, status", [
        (['{"os":"linux","architecture":"arm64"}'], 404), (["linux/amd64", "linux/arm64"], 404), (["{"], 400), (["a b"], 400), (["linux/amd64", ";"], 400)])
    def test_delete_of_one_platform_is_not_that_of_the_image(self, furnished, scripted, fake, platforms, status):
        scripted.on("rmi")
        before = dict(fake.content)
        for version in ("", "/v1.50"):
            query = urllib.parse.urlencode([("force", "1"), *(("platforms", each) for each in platforms)])
            answer = ask(furnished, "DELETE", f"{version}/images/tst:a?{query}")
            assert answer.status == status and answer.message
            assert ask(furnished, "DELETE", f"{version}/images/tst:a?{query[8:]}").status == 400
        assert scripted.calls("rmi") == [] and fake.content == before

    def test_delete_none(self, furnished):
        assert ask(furnished, "DELETE", "/images/-f").status == 404

    def test_prune(self, furnished, scripted):
        scripted.on("rmi")
        answer = ask(furnished, "POST", "/images/prune")
        assert answer.status == 200
        assert [each["argv"][-1].partition("@")[0] for each in scripted.calls("rmi")] == ["import"]
        ask(furnished, "POST", "/images/prune?" + filtered(dangling=["false"], **{"label!": ["base"]}))
        assert {each["argv"][-1].partition("@")[0] for each in scripted.calls("rmi")} == {"import"}, "what has the label or containers stays"
        assert ask(furnished, "POST", "/images/prune?" + filtered(x=["1"])).status == 400

    def test_search(self, furnished, scripted):
        scripted.on("search", stdout='{"Name":"busybox","Description":"d","StarCount":7,"IsOfficial":true}\n')
        answer = ask(furnished, "GET", "/images/search?term=-x&limit=5&" + filtered(**{"is-official": ["true"]}))
        assert answer.json == [{"name": "busybox", "description": "d", "star_count": 7, "is_official": True, "is_automated": False}]
        assert scripted.argv("search") == ["search", "--no-trunc", "--format={{json .}}", "--limit=5", "--filter=is-official=true", "--", "-x"]
        for query in ("", "term=x&limit=101", "term=x&limit=-1", "term=x&" + filtered(nothing=["x"])):
            assert ask(furnished, "GET", "/images/search?" + query).status == 400

    def test_search_without_network(self, furnished, scripted):
        scripted.on("search", stderr=fatal('Get "https://index.docker.io/v1/search?q=busybox": dial tcp: lookup index.docker.io: no such host'), status=1)
        assert ask(furnished, "GET", "/images/search?term=busybox").status == 500

    def test_load(self, furnished, scripted):
        scripted.on("load", LOAD, reads=True)
        scripted.on("rmi")
        data = os.urandom(3 << 20)
        answer = ask(furnished, "POST", "/images/load?quiet=1", data, {"Content-Type": "application/x-tar"})
        assert answer.lines == [{"stream": "Loaded image: localhost:5000/bb:1\n"}]
        call = scripted.calls("load")[0]
        assert (call["argv"], call["stdin"]) == (["load", "--all-platforms"], len(data))

    def test_load_removes_the_name_of_the_index(self, furnished, scripted, fake):
        loaded = dict(fake.images)
        fake.images.clear()
        scripted.on("load", LOAD, reads=True, does=lambda words: fake.images.update(loaded))
        scripted.on("rmi")
        ask(furnished, "POST", "/images/load", b"x")
        assert [each["argv"][-1].partition("@")[0] for each in scripted.calls("rmi")] == ["import"]

    @pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, functools.partial(lzma.compress, preset=0)], ids=["plain", "gzip", "bzip2", "xz"])
    @pytest.mark.parametrize("files", [("oci-layout", "index.json"), ("oci-layout", "index.json", "manifest.json"), ("manifest.json",)])
    @pytest.mark.parametrize("told", ["", "Loaded image: docker.io/library/tst:a\n", V17_LOAD.stdout])
    def test_load_tells_the_names_in_the_archive_in_its_order(self, furnished, scripted, pack, files, told):
        names = ["localhost:5000/bb:1", "docker.io/library/tst:a", "docker.io/library/gone:1"]
        scripted.on("load", stdout=told, reads=True)
        scripted.on("rmi")
        for order in (names, names[::-1]):
            data = image_archive(*order, files=files, layer=os.urandom(300000))
            answer = ask(furnished, "POST", "/images/load", pack(data))
            assert answer.lines == [{"stream": f"Loaded image: {nerdctld.familiar(name)}\n"} for name in order if "gone" not in name]
            assert scripted.calls("load")[-1]["stdin"] == len(data) and not scripted.calls("rmi")

    def test_load_of_an_archive_that_is_packed_otherwise(self, furnished, scripted):
        scripted.on("load", LOAD, reads=True)
        assert ask(furnished, "POST", "/images/load", b"\x28\xb5\x2f\xfd" + bytes(3000)).lines == [{"stream": "Loaded image: localhost:5000/bb:1\n"}]

    @pytest.mark.parametrize("names", [[], ["localhost:5000/bb:1"]])
    def test_load_of_images_without_a_name(self, furnished, scripted, fake, names):
        data = image_archive(*names, nameless=[BB])
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            index = "import@sha256:" + hashlib.sha256(archive.extractfile("index.json").read()).hexdigest()
        scripted.on("load", stdout=f"{index}\tsaved\t\nimport@{BB}\tsaved\t\nLoaded image: {index}\nLoaded image: import@{BB}\n", reads=True,
                    does=lambda words: [fake.tag(each, INDEX) for each in (index, "import@" + BB)])
        scripted.on("rmi")
        assert ask(furnished, "POST", "/images/load", data).lines == [
            *({"stream": f"Loaded image: {name}\n"} for name in names), {"stream": f"Loaded image ID: {BB}\n"}]
        assert [each["argv"][-1] for each in scripted.calls("rmi")] == [index]

    def test_load_of_one_platform(self, furnished, scripted):
        scripted.on("load", LOAD, reads=True)
        platform = lambda *words: urllib.parse.urlencode([("platform", json.dumps({"os": "linux", "architecture": each})) for each in words])
        assert ask(furnished, "POST", "/images/load?" + platform("arm64"), b"x").status == 200
        assert scripted.argv("load") == ["load", "--platform=linux/arm64"]
        assert ask(furnished, "POST", "/images/load?" + platform("arm64", "amd64"), b"x").status == 501
        assert ask(furnished, "POST", "/images/load?platform=%7B", b"x").status == 400

    @pytest.mark.parametrize("data", [b"", b"x" * 511, b"x" * 3000, bytes(700), ARCHIVE[:700], bytes(512) + ARCHIVE, ARCHIVE[:-1], tar_of(("index.json", b"")), tar_of(("index.json", b"[]"))])
    def test_what_is_no_archive_of_images(self, data):
        archive = nerdctld.ImageArchive()
        for at in range(0, len(data), 100):
            archive.feed(data[at:at + 100])
        assert archive.names == [] or data == ARCHIVE[:-1] or data[512:] == ARCHIVE

    @pytest.mark.parametrize("files", [{"manifest.json": b"{}"}, {"manifest.json": b"[1]"}, {"manifest.json": b'[{"RepoTags":[1]}]'}, {"manifest.json": b"[" * 100000},
                                       {"oci-layout": b"", "index.json": b'{"manifests":[{"annotations":[]}]}'}, {"oci-layout": b"{}", "index.json": b'{"manifests":3}'}, {"oci-layout": b"{}"},
                                       {"oci-layout": b"{}", "index.json": b'{"manifests":[{"annotations":{"io.containerd.image.name":7,"org.opencontainers.image.ref.name":"latest"}}]}'}])
    def test_archives_that_name_nothing(self, files):
        archive = nerdctld.ImageArchive()
        archive.feed(tar_of(*files.items()))
        assert archive.names == []

    def test_an_archive_with_a_file_beyond_8_gib(self):
        size, archive = 9 << 30, nerdctld.ImageArchive()
        for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            archive = nerdctld.ImageArchive()
            info = tarfile.TarInfo("blobs/sha256/" + "2" * 64)
            info.size = size
            archive.feed(info.tobuf(kind))
            assert archive.opaque == size
            archive.opaque = 0
            archive.feed(ARCHIVE)
            assert archive.names == ["docker.io/library/tst:a"]

    @pytest.mark.parametrize("recording", [V21_LOAD, V17_LOAD], ids=["2.1.6", "1.7.7"])
    def test_load_of_older_ones(self, recording):
        assert nerdctld.parse_loaded(recording.stdout) == ["localhost:5000/bb:1"]

    def test_load_of_garbage(self, furnished, scripted):
        scripted.on("load", stderr=fatal("unexpected EOF"), status=1, reads=True)
        answer = ask(furnished, "POST", "/images/load?quiet=1", b"garbage")
        assert (answer.status, answer.lines) == (200, [{"error": "unexpected EOF", "errorDetail": {"message": "unexpected EOF"}}])

    @pytest.mark.parametrize("path, names", [
        ("/images/tst:a/get", ["tst:a"]), ("/images/get?names=tst:a&names=localhost:5000/tst:b", ["tst:a", "localhost:5000/tst:b"]), ("/images/get?names=tst:a,tst:a", ["tst:a"]),
        ("/images/tst/get", ["tst:a", "tst:c"]), ("/images/ID/get", []), ("/images/SHORT/get", []), ("/images/get?names=ID&names=tst:c", ["tst:c"]),
        ("/images/tst:a/get?platform=linux/amd64", ["tst:a"]), ("/images/tst@ID/get", [])])
    def test_save(self, saving, path, names):
        digest, manifest = saving.made
        answer = ask(saving, "GET", path.replace("ID", digest).replace("SHORT", digest[7:19]))
        found = opened_archive(answer.body)
        assert answer.status == 200 and found["oci-layout"] == b'{"imageLayoutVersion":"1.0.0"}'
        index, (told,) = json.loads(found["index.json"])["manifests"], json.loads(found["manifest.json"])
        assert [each["annotations"]["io.containerd.image.name"] for each in index if "annotations" in each] == [str(nerdctld.parse_reference(each).name) for each in names]
        assert {each["digest"] for each in index} == {digest} and told["RepoTags"] == (names or None)
        content = json.loads(found["blobs/" + manifest.replace(":", "/")])
        assert [told["Config"], *told["Layers"]] == ["blobs/" + each["digest"].replace(":", "/") for each in (content["config"], *content["layers"])]
        blobs = {name: data for name, data in found.items() if name.startswith("blobs/")}
        assert len(blobs) == 3 and all(hashlib.sha256(data).hexdigest() == name.rpartition("/")[2] for name, data in blobs.items())
        archive = nerdctld.ImageArchive()
        archive.feed(answer.body)
        assert archive.names == [nerdctld.parse_reference(each).name for each in names] and list(found) == sorted(found)

    @pytest.mark.parametrize("platforms, root, whole", [
        ([], "index", ["linux/amd64", "linux/s390x"]), (["linux/amd64"], "linux/amd64", ["linux/amd64"]), (["linux/s390x"], "linux/s390x", ["linux/s390x"]),
        (["linux/s390x", "linux/amd64"], "index", ["linux/amd64", "linux/s390x"]), (["linux/arm64"], "", []), (["linux/arm"], "", [])])
    def test_save_of_an_index(self, furnished, fake, platforms, root, whole):
        # Of one platform only the manifest is here.
        told = {each: put_manifest(fake, each, whole=each != "linux/arm64") for each in ("linux/arm64", "linux/s390x", "linux/amd64")}
        told["index"] = {"digest": fake.put({"manifests": list(told.values())})}
        fake.tag("docker.io/library/many:1", told["index"]["digest"])
        answer = ask(furnished, "GET", "/images/many:1/get?" + urllib.parse.urlencode([("platform", each) for each in platforms]))
        if not root:
            assert (answer.status, answer.message) == (
                404, f"image with reference many:1 was found but does not provide the specified platform ({platforms[0]})")
            return
        found = opened_archive(answer.body)
        assert [each["digest"] for each in json.loads(found["index.json"])["manifests"]] == [told[root]["digest"]]
        assert {each for each in told if "blobs/" + told[each]["digest"].replace(":", "/") in found} == {root, *whole}
        (entry,) = json.loads(found["manifest.json"])
        assert entry["RepoTags"] == ["many:1"] and len(found) == 3 + 3 * len(whole) + (root == "index") and all(each in found for each in [entry["Config"], *entry["Layers"]])

    def test_save_of_what_is_here_in_part(self, furnished, fake):
        fake.tag("docker.io/library/part:1", put_manifest(fake, "linux/arm64")["digest"])
        answer = ask(furnished, "GET", "/images/part:1/get")
        assert (answer.status, answer.message) == (404, "part:1 has no content here")

    @pytest.mark.parametrize("data", [b"a layer for !", b"a layer", b"a layer for \0\0"])
    def test_save_of_what_is_broken_breaks_off(self, saving, fake, data):
        layer = next(digest for digest, value in fake.content.items() if value == b"a layer for ")
        fake.content[layer] = data
        answer = ask(saving, "GET", "/images/tst:a/get")
        assert answer.status == 500 and answer.message.endswith("is broken")

    def test_save_refuses_before_the_first_byte(self, saving, fake):
        assert ask(saving, "GET", "/images/get").status == 400
        assert ask(saving, "GET", "/images/get?names=tst:a&names=nosuch").status == 404
        assert ask(saving, "GET", "/images/tst:a/get?platform=linux/arm64").status == 404
        assert ask(saving, "GET", "/images/tst:a/get?platform=;").status == 400

    def test_push_of_several_platforms(self, furnished, scripted, monkeypatch):
        monkeypatch.setattr(nerdctld, "platform_content", lambda *_: None)
        scripted.on("push")
        query = urllib.parse.urlencode([("platform", json.dumps({"os": "linux", "architecture": each})) for each in ("amd64", "arm64")])
        assert ask(furnished, "POST", f"/images/tst/push?tag=a&{query}").status == 200
        assert scripted.argv("push")[1:3] == ["--platform=linux/amd64", "--platform=linux/arm64"]

    def test_import(self, furnished, scripted):
        scripted.on("import", IMPORT, reads=True)
        answer = ask(furnished, "POST", "/images/create?fromSrc=-&message=m&repo=tst&tag=a&changes=", b"tar")
        assert answer.lines == [{"status": BB}]
        assert (scripted.argv("import"), scripted.calls("import")[0]["stdin"]) == (["import", "--message=m", "--", "-", "docker.io/library/tst:a"], 3)

    @pytest.mark.parametrize("query", ["&repo=new:1", ""])
    def test_import_with_changes(self, furnished, scripted, fake, query):
        def imported(words):
            fake.tag(words[-1], put_manifest(fake)["digest"])

        scripted.on("import", IMPORT, reads=True, does=imported)
        changes = urllib.parse.quote('CMD ["x"]\nENV A=1')
        (told,) = ask(furnished, "POST", f"/images/create?fromSrc=-{query}&changes={changes}", b"tar").lines
        (name,) = [name for name, image in fake.images.items() if image.target.digest == told["status"]]
        assert name == scripted.argv("import")[-1] and name.startswith("docker.io/library/new:1" if query else nerdctld.WORKING_NAME)
        manifest = json.loads(fake.content[told["status"]])
        config = json.loads(fake.content[manifest["config"]["digest"]])
        assert (config["config"], config["os"]) == ({"Cmd": ["x"], "Env": ["A=1"]}, "linux") and fake.leases == set()
        assert list(fake.content_labels[told["status"]].values()) == [each["digest"] for each in (manifest["config"], *manifest["layers"])]
        assert fake.content_labels[manifest["config"]["digest"]] == {"containerd.io/gc.ref.snapshot.overlayfs": nerdctld.chain_ids(config)[-1]}

    @pytest.mark.parametrize("query, body", [("repo=A", b"x"), ("repo=tst:a&changes=RUN%20x", b"x"), ("repo=tst@" + BB, b"x"), ("repo=tst:a&platform=;", b"x"), ("repo=tst:a", b"")])
    def test_import_refuses(self, furnished, scripted, query, body):
        scripted.on("import", IMPORT, stays=5)
        assert ask(furnished, "POST", "/images/create?fromSrc=-&" + query, body).status == 400

    # What dockerd 20.10 makes of each in a commit.
    @pytest.mark.parametrize("lines, config", [
        ('CMD ["a", "b"]', {"Cmd": ["a", "b"]}), ("CMD a  b", {"Cmd": ["/bin/sh", "-c", "a  b"]}), ('cmd ["a", 1]', {"Cmd": ["/bin/sh", "-c", '["a", 1]']}),
        ('ENTRYPOINT ["e"]', {"Entrypoint": ["e"], "Cmd": None}), ('CMD ["a"]\nENTRYPOINT ["e"]', {"Entrypoint": ["e"], "Cmd": ["a"]}),
        ("ENV A=2 B=3", {"Env": ["A=2", "P=/bin", "B=3"]}), ("ENV B $A c", {"Env": ["A=1", "P=/bin", "B=1 c"]}), ('ENV B="x y" C=\'$A\' D=a\\ b', {"Env": ["A=1", "P=/bin", "B=x y", "C=$A", "D=a b"]}),
        ("ENV P=$P:/x Q=${A}b R=${N:-d} S=${A:+s} T=${N:+s} U=\\$A", {"Env": ["A=1", "P=/bin:/x", "Q=1b", "R=d", "S=s", "T=", "U=$A"]}),
        (r'ENV B="a\"\$A\n"', {"Env": ["A=1", "P=/bin", 'B=a"$A\\n']}),
        ("LABEL a=b 'c d'=\"e f\"", {"Labels": {"l": "m", "a": "b", "c d": "e f"}}), ("LABEL l=$A", {"Labels": {"l": "1"}}),
        ("EXPOSE 80 81/udp 90-92", {"ExposedPorts": {"80/tcp": {}, "81/udp": {}, "90/tcp": {}, "91/tcp": {}, "92/tcp": {}}}),
        ('VOLUME ["/a", "/b c"]', {"Volumes": {"/a": {}, "/b c": {}}}), ("VOLUME /a /b", {"Volumes": {"/a": {}, "/b": {}}}),
        ("USER u:g", {"User": "u:g"}), ("STOPSIGNAL 9", {"StopSignal": "9"}), ("WORKDIR x/../y", {"WorkingDir": "/w/y"}), ("WORKDIR /z", {"WorkingDir": "/z"}), ("ONBUILD RUN x", {"OnBuild": ["RUN x"]}),
        ("HEALTHCHECK --interval=1m30s --retries=3 CMD a b", {"Healthcheck": {"Test": ["CMD-SHELL", "a b"], "Interval": 90 * 10**9, "Retries": 3}}),
        ('HEALTHCHECK CMD ["a", "b"]', {"Healthcheck": {"Test": ["CMD", "a", "b"]}}), ("HEALTHCHECK NONE", {"Healthcheck": {"Test": ["NONE"]}})])
    def test_changes_of_a_config(self, lines, config):
        below = {"Cmd": ["c"], "Env": ["A=1", "P=/bin"], "Labels": {"l": "m"}, "WorkingDir": "/w"}
        kept = json.dumps(below)
        assert nerdctld.apply_changes(below, [lines, "\n \n"]) == {**below, **config} and json.dumps(below) == kept

    @pytest.mark.parametrize("line", ["RUN x", "FROM x", "CMD", "ENV A", "LABEL A", "ENV A=1 B", 'USER a"b', "EXPOSE x", "EXPOSE 1-", "HEALTHCHECK x", "HEALTHCHECK CMD", "HEALTHCHECK --x=1 CMD a",
                                      "HEALTHCHECK --interval=x CMD a", "HEALTHCHECK NONE x", "MAINTAINER x", "SHELL [\"a\"]"])
    def test_changes_that_may_not_be(self, line):
        with pytest.raises(nerdctld.BadParameter):
            nerdctld.apply_changes({}, [line])

    @pytest.mark.parametrize("own, below, merged", [
        ({}, {"Cmd": ["a"], "Entrypoint": ["e"], "User": "u"}, {"Cmd": ["a"], "Entrypoint": ["e"], "User": "u"}), ({"Cmd": ["b"]}, {"Cmd": ["a"], "Entrypoint": ["e"]}, {"Cmd": ["b"], "Entrypoint": ["e"]}),
        ({"Entrypoint": ["f"]}, {"Cmd": ["a"], "Entrypoint": ["e"]}, {"Entrypoint": ["f"]}), ({"Entrypoint": []}, {"Cmd": ["a"], "Entrypoint": ["e"]}, {"Cmd": ["a"]}),
        ({"Env": ["A=2", "C"]}, {"Env": ["A=1", "B=1"]}, {"Env": ["A=2", "C", "B=1"]}), ({"Labels": {"a": "2"}}, {"Labels": {"a": "1", "b": "1"}}, {"Labels": {"a": "2", "b": "1"}}),
        ({"ExposedPorts": {"1/tcp": {}}}, {"ExposedPorts": {"2/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "2/tcp": {}}}), ({"User": "", "WorkingDir": None}, {"User": "u", "WorkingDir": "/w"}, {"User": "u", "WorkingDir": "/w"})])
    def test_merged_config(self, own, below, merged):
        assert nerdctld.merged_config(own, below) == merged

    def test_attestations(self, reading):
        assert ask(reading, "GET", "/images/tst:a/attestations").json == []
        assert ask(reading, "GET", "/images/nosuch/attestations").status == 404


class FakeRegistry(http.server.BaseHTTPRequestHandler):
    """A registry with one image, behind a token unless it is `open`. The server's `told` (path -> status, headers, body) comes
    first; what was asked, with which Authorization, is noted in `asked`."""

    protocol_version = "HTTP/1.1"
    CONFIG = json.dumps({"architecture": "arm64", "os": "linux", "variant": "v8", "rootfs": {}}).encode()
    MANIFEST = json.dumps({"mediaType": "application/vnd.oci.image.manifest.v1+json", "config": {"digest": "sha256:c"}, "layers": []}).encode()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        bodies = {"/v2/a/b/manifests/1": self.MANIFEST, "/v2/a/b/blobs/sha256:c": self.CONFIG, "/v2/a/b/tags/list": b'{"tags":["2","1","-x",3]}',
                  "/token": b'{"token":"good"}'}
        body, status, headers = bodies.get(path, b"{}"), 200 if path in bodies else 404, {}
        if path == "/token":
            if self.headers.get("Authorization") != "Basic " + base64.b64encode(b"u:p").decode():
                status = 401
        elif not self.server.open and self.headers.get("Authorization") != "Bearer good":
            status, headers = 401, {"WWW-Authenticate": f'Bearer realm="{self.server.scheme}://{self.headers["Host"]}/token",service="s",scope="x"'}
        elif self.path in self.server.told:
            status, headers, body = self.server.told[self.path]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def certificate(folder, *names):
    """A server's TLS context with a new certificate for these names, which is `crt` in the folder."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(folder / "key"), "-out", str(folder / "crt"), "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=" + ",".join(names)], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "crt", folder / "key")
    return context


@contextlib.contextmanager
def local_registry(context=None, told=None, asked=None, open=False):
    """host:port of a fake registry, with TLS where there is a context for it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeRegistry)
    server.daemon_threads, server.scheme = True, "https" if context else "http"
    server.told, server.asked, server.open = told or {}, [] if asked is None else asked, open
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def registry():
    """host:port of a fake registry."""
    with local_registry() as address:
        yield address


class TestRegistry:
    HEADERS = {"X-Registry-Auth": encoded({"username": "u", "password": "p"})}

    def test_distribution(self, engine, registry):
        answer = ask(engine, "GET", f"/distribution/{registry}/a/b:1/json", headers=self.HEADERS)
        assert answer.status == 200
        assert answer.json == {"Descriptor": {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": len(FakeRegistry.MANIFEST),
                                              "digest": "sha256:" + hashlib.sha256(FakeRegistry.MANIFEST).hexdigest()},
                               "Platforms": [{"architecture": "arm64", "os": "linux", "variant": "v8"}]}

    def test_refused(self, engine, registry):
        assert ask(engine, "GET", f"/distribution/{registry}/a/b:1/json").status == 401
        assert ask(engine, "GET", f"/distribution/{registry}/a/b:2/json", headers=self.HEADERS).status == 404
        assert ask(engine, "GET", "/distribution/127.0.0.1:1/a/json").status == 500
        assert ask(engine, "GET", "/distribution/-x/json").status == 400

    def test_tls(self, engine, tmp_path, monkeypatch):
        with local_registry(certificate(tmp_path, "DNS:registry.test")) as address:
            port = address.rpartition(":")[2]
            connect = socket.create_connection
            monkeypatch.setattr(socket, "create_connection", lambda where, *more: connect(("127.0.0.1", where[1]), *more))
            path = f"/distribution/registry.test:{port}/a/b:1/json"
            answer = ask(engine, "GET", path, headers=self.HEADERS)
            assert answer.status == 500 and "certificate verify failed" in answer.message
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "crt"))
            assert ask(engine, "GET", path, headers=self.HEADERS).status == 200

    def test_redirects(self, engine):
        far, blob, manifest = [], "/v2/a/b/blobs/sha256:c", "/v2/a/b/manifests/1"
        with local_registry(told={"/x?y=1": (200, {}, FakeRegistry.CONFIG), manifest: (200, {}, FakeRegistry.MANIFEST)}, asked=far, open=True) as cdn:
            for status, location in ((307, f"http://{cdn}/x?y=1"), (302, "/v2/elsewhere"), (308, f"//{cdn}/x?y=1")):
                near = []
                told = {blob: (status, {"Location": location}, b"{}"), "/v2/elsewhere": (301, {"Location": f"http://{cdn}/x?y=1"}, b""),
                        manifest: (status, {"Location": f"http://{cdn}{manifest}"}, b"{}")}
                with local_registry(told=told, asked=near) as registry:
                    answer = ask(engine, "GET", f"/distribution/{registry}/a/b:1/json", headers=self.HEADERS)
                assert answer.status == 200 and answer.json["Platforms"][0]["architecture"] == "arm64"
                assert answer.json["Descriptor"]["digest"] == "sha256:" + hashlib.sha256(FakeRegistry.MANIFEST).hexdigest()
                assert [each for each in near if each[0].startswith("/v2/elsewhere")] == ([("/v2/elsewhere", "Bearer good")] if status == 302 else [])
        assert {each[1] for each in far} == {None} and len(far) == 6

    @pytest.mark.parametrize("status, location, message", [
        (302, "/v2/a/b/manifests/1", "redirects more than 5 times"), (302, "file:///etc/passwd", "'file' is not http"), (302, "http://[x", "no URL"),
        (302, "http://127.0.0.1:x/", "cannot ask"), (302, "/\xe9", "cannot ask"), (302, "", "answered 302")])
    def test_redirects_to_nowhere(self, engine, status, location, message):
        asked = []
        with local_registry(told={"/v2/a/b/manifests/1": (status, {"Location": location}, b"")}, asked=asked) as registry:
            answer = ask(engine, "GET", f"/distribution/{registry}/a/b:1/json", headers=self.HEADERS)
        assert answer.status == 500 and message in answer.message and len(asked) <= 8

    def test_another_host_gets_no_credentials(self, engine):
        far = []
        with local_registry(asked=far) as cdn, local_registry(told={"/v2/a/b/manifests/1": (307, {"Location": f"http://{cdn}/x"}, b"")}) as registry:
            assert ask(engine, "GET", f"/distribution/{registry}/a/b:1/json", headers=self.HEADERS).status == 401
        assert {each for each in far} == {("/x", None)}

    def test_tags_come_in_pages(self, engine):
        path = "/v2/a/b/tags/list"
        told = {path: (200, {"Link": f'</other>; rel="first", <{path}?last=2&n=2>; rel="next"'}, b'{"tags":["2","1"]}'),
                path + "?last=2&n=2": (200, {"Link": f"<http://127.0.0.1:1{path}?last=4>;rel=next"}, b'{"tags":["3",4]}'), path + "?last=4": (200, {}, b'{"tags":["5"]}')}
        with local_registry(told=told, open=True) as registry:
            assert nerdctld.Registry(nerdctld.parse_reference(registry + "/a/b"), {}).tags() == ["2", "1", "3", "5"]

    def test_tags_without_end(self, engine, monkeypatch):
        path, asked = "/v2/a/b/tags/list", []
        told = {each: (200, {"Link": f'<{path}?x>; rel="next"'}, b'{"tags":["1"]}') for each in (path, path + "?x")}
        monkeypatch.setattr(nerdctld.Registry, "PAGES", 9)
        with local_registry(told=told, asked=asked, open=True) as registry:
            answer = ask(engine, "POST", f"/images/create?fromImage={registry}/a/b")
            assert answer.status == 500 and "more than 9 pages" in answer.message and len(asked) == 9

    @pytest.mark.parametrize("link, query", [
        ('</v2/a/tags/list?n=1&last=x>; rel="next"', "n=1&last=x"), ("<?a=b,c>; rel=next", "a=b,c"), ('<x?1>; rel="prev"', ""), ('<x?1>; title="a"; rel="next"', "1"),
        ('<x?1>; rel="prev", <x?2>; rel="NEXT"', "2"), ("", ""), ("garbage", ""), ('<x>; rel="next"', ""), ('<x?1>; rel="nextish"', "")])
    def test_links(self, link, query):
        assert nerdctld.next_query(link) == query

    def test_pull_of_all_tags(self, furnished, scripted, fake, registry):
        scripted.on("pull", PULL)
        for tag in "12":
            fake.tag(f"{registry}/a/b:{tag}", BB)
        answer = ask(furnished, "POST", f"/images/create?fromImage={registry}/a/b", headers=self.HEADERS)
        assert answer.status == 200 and "error" not in answer.lines[-1]
        assert [each["argv"][-1] for each in scripted.calls("pull")] == [f"{registry}/a/b:1", f"{registry}/a/b:2"]


###############################################################################
# Build
###############################################################################


CONTEXT = tar_of(("Dockerfile", b"FROM x\n"), ("sub/a.txt", b"a"))
TAR = {"Content-Type": "application/x-tar"}


class TestBuild:
    @pytest.fixture(autouse=True)
    def answers(self, furnished, scripted):
        scripted.on("build", BUILD)

    @pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
    def test_context(self, tmp_path, mode):
        nerdctld.unpack_context(io.BytesIO(tar_of(("Dockerfile", b"FROM x\n"), ("./sub/a", b"1" * 100000), mode=mode)), str(tmp_path))
        assert (tmp_path / "Dockerfile").read_bytes() == b"FROM x\n" and (tmp_path / "sub" / "a").stat().st_size == 100000

    def test_kinds_of_entries(self, tmp_path):
        nerdctld.unpack_context(io.BytesIO(tar_of(
            (".", {"type": tarfile.DIRTYPE, "mode": 0o755}), ("d", {"type": tarfile.DIRTYPE, "mode": 0o500}), ("d/x", b"1"),
            ("l", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), ("h", {"type": tarfile.LNKTYPE, "linkname": "d/x"}),
            ("p", {"type": tarfile.FIFOTYPE, "mode": 0o600}), ("d/x", b"22"), ("l", b"now a file"))), str(tmp_path))
        assert (tmp_path / "d" / "x").read_bytes() == b"22" and (tmp_path / "h").read_bytes() == b"1"
        assert (tmp_path / "l").read_bytes() == b"now a file" and not (tmp_path / "l").is_symlink()
        assert stat.S_ISFIFO((tmp_path / "p").stat().st_mode)

    @pytest.mark.parametrize("entries", [
        [("../evil", b"x")], [("a/../../evil", b"x")], [("s", {"type": tarfile.SYMTYPE, "linkname": ".."}), ("s/evil", b"x")],
        [("s", {"type": tarfile.SYMTYPE, "linkname": ".."}), ("s/evil", {"type": tarfile.DIRTYPE})],
        [("h", {"type": tarfile.LNKTYPE, "linkname": "../secret"})], [("s", {"type": tarfile.SYMTYPE, "linkname": ".."}),
                                                                    ("h", {"type": tarfile.LNKTYPE, "linkname": "s/secret"})],
        [("dev", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})], [("dev", {"type": tarfile.BLKTYPE})], [(".", b"x")],
        [("h", {"type": tarfile.LNKTYPE, "linkname": "nothing"})], [("f", b"x"), ("f/evil", b"x")], [("x" * 300, b"x")],
        [("a", {"mtime": 1e30, "pax_headers": {"mtime": "1e30"}})], [("a", {"pax_headers": {"mtime": "nan"}})]],
        ids=["dots", "dots inside", "through a link", "folder through a link", "hard link out", "hard link through a link", "character device",
             "block device", "the whole", "hard link to nothing", "below a file", "long name", "far future", "no time"])
    def test_hostile(self, tmp_path, entries):
        tmp_path = tmp_path / "outer"
        root = tmp_path / "root"
        root.mkdir(parents=True)
        (tmp_path / "secret").write_text("s")
        with contextlib.suppress(nerdctld.BadParameter):
            nerdctld.unpack_context(io.BytesIO(tar_of(*entries)), str(root))
            assert [name for name, _ in entries] == ["a"], "was not refused"
        assert sorted(os.listdir(tmp_path)) == ["root", "secret"] and (tmp_path / "secret").stat().st_nlink == 1

    def test_absolute_names_stay_inside(self, tmp_path):
        nerdctld.unpack_context(io.BytesIO(tar_of(("/etc/x-nerdctld-test", b"x"))), str(tmp_path))
        assert (tmp_path / "etc" / "x-nerdctld-test").exists() and not os.path.exists("/etc/x-nerdctld-test")

    def test_a_link_is_replaced_and_not_followed(self, tmp_path):
        root = tmp_path / "root"
        root.mkdir()
        (tmp_path / "secret").write_text("s")
        nerdctld.unpack_context(io.BytesIO(tar_of(("s", {"type": tarfile.SYMTYPE, "linkname": "../secret"}), ("s", b"new"))), str(root))
        assert (tmp_path / "secret").read_text() == "s" and (root / "s").read_text() == "new"

    @pytest.mark.parametrize("size", [512 + 7, 512 + 8, 1024, 1536 + 1, 1536 + 100])
    def test_a_tar_without_its_end(self, tmp_path, size):
        # The docker CLI, `build -f -`: nothing after the last byte of the last file
        nerdctld.unpack_context(io.BytesIO(CONTEXT[:size]), str(tmp_path))
        assert (tmp_path / "Dockerfile").read_text() == "FROM x\n" and (tmp_path / "sub/a.txt").exists() == (size > 1536)

    @pytest.mark.parametrize("data", [b"", b"garbage" * 200, CONTEXT[:515], tar_of(("a", b"x"), mode="w:gz")[:40], b"\xfd7zXZ\x00" + b"x" * 600, b"BZh9" + b"x" * 600],
                             ids=["empty", "garbage", "cut", "cut gzip", "broken xz", "broken bzip2"])
    def test_no_tar(self, furnished, scripted, data):
        assert ask(furnished, "POST", "/build", data, TAR).status == 400
        assert scripted.calls("build") == [] and os.listdir(furnished.workspace.folder()) == []

    def test_build(self, furnished, scripted):
        answer = ask(furnished, "POST", "/build?t=tst:a&t=localhost:5000/bb:1&dockerfile=Dockerfile&version=1", CONTEXT, TAR)
        assert answer.status == 200
        assert answer.lines[-4:] == [{"aux": {"ID": BB}}, {"stream": "Successfully built 4cfb279d3e24\n"}, {"stream": "Successfully tagged tst:a\n"},
                                     {"stream": "Successfully tagged localhost:5000/bb:1\n"}]
        words = scripted.argv("build")
        folder = words[-1]
        assert words == ["build", "--progress=rawjson", f"--file={folder}/Dockerfile", "--tag=docker.io/library/tst:a", "--tag=localhost:5000/bb:1", "--", folder]
        assert not os.path.exists(folder)

    def test_quiet(self, furnished, scripted):
        assert ask(furnished, "POST", "/build?t=tst:a&q=1", CONTEXT, TAR).lines == [{"stream": BB + "\n"}]
        scripted.on("build", BUILD_FAILED)
        told = ask(furnished, "POST", "/build?t=tst:a&q=1", self.STEPS, TAR)
        assert told.status == 200 and told.lines[0]["stream"].startswith("Step 1/4") and "code: 7" in told.lines[-1]["error"]

    STEPS = tar_of(("Dockerfile", b'FROM localhost:5000/bb:1\nENV A=1\nRUN echo hi; echo no >&2; echo > /x\nCMD ["sh"]\n'))

    def test_the_stream_of_the_classic_builder(self, furnished, scripted):
        def streams(query=""):
            return [each["stream"] for each in ask(furnished, "POST", "/build?t=tst:a&version=1" + query, self.STEPS, TAR).lines if "stream" in each]
        assert streams("&labels=" + urllib.parse.quote('{"l":"1"}')) == [
            "Step 1/5 : FROM localhost:5000/bb:1", "\n", "Step 2/5 : ENV A=1", "\n", "Step 3/5 : RUN echo hi; echo no >&2; echo > /x", "\n",
            "hi\n", "\x1b[91mno\n\x1b[0m", 'Step 4/5 : CMD ["sh"]', "\n", "Step 5/5 : LABEL l=1", "\n",
            "Successfully built 4cfb279d3e24\n", "Successfully tagged tst:a\n"]
        scripted.on("build", BUILD_CACHED)
        assert streams()[4:7] == ["Step 3/4 : RUN echo hi; echo no >&2; echo > /x", "\n", " ---> Using cache\n"]

    def test_steps_of_several_stages(self):
        told = nerdctld.ClassicProgress("ARG V=1\nFROM a AS One\nRUN 1\nFROM scratch\nCOPY --from=one a b\nFROM one\nRUN 2\n")

        def vertex(digest, name, **more):
            return {"digest": digest, "name": name, "started": "2026-11-26T22:00:00Z", **more}

        def streams(*vertexes, logs=()):
            status = {"vertexes": list(vertexes), "logs": [{"vertex": digest, "data": base64.b64encode(text).decode()} for digest, text in logs]}
            return "".join(each["stream"] for each in told.messages(status))
        assert streams({"digest": "d", "name": "[internal] load build definition from Dockerfile"}) == ""
        assert streams(vertex("m", "[internal] load metadata for docker.io/library/a:latest")) == "Step 1/7 : ARG V=1\nStep 2/7 : FROM a AS One\n"
        assert streams(*({"digest": each, "name": name} for each, name in (("2", "[linux/amd64 one 1/2] FROM a"), ("3", "[linux/amd64 one 2/2] RUN 1"),
                                                                           ("7", "[linux/amd64 stage-2 1/1] RUN 2")))) == ""
        # What comes early is told in its place.
        assert streams(vertex("7", "[linux/amd64 stage-2 1/1] RUN 2"), logs=[("7", b"seven\n")]) == ""
        assert streams(vertex("2", "[linux/amd64 one 1/2] FROM a", completed="2026-11-26T22:00:01Z"), vertex("3", "[linux/amd64 one 2/2] RUN 1"),
                       logs=[("3", b"three\n")]) == "Step 3/7 : RUN 1\nthree\n"
        # A stage that nobody needs does not hold up what comes after it.
        assert streams(vertex("3", "[linux/amd64 one 2/2] RUN 1", completed="2026-11-26T22:00:02Z")) == (
            "Step 4/7 : FROM scratch\nStep 5/7 : COPY --from=one a b\nStep 6/7 : FROM one\nStep 7/7 : RUN 2\nseven\n")
        assert list(told.finish()) == []

    @pytest.mark.parametrize("text, steps", [
        ("FROM a\n  RUN b \\\n\n# no\n   c\n", ["FROM a", "RUN b    c"]), ("# escape=`\nRUN a `\n b\n", ["RUN a  b"]), ("# x\n\n", []),
        ("RUN <<E <<-'F' x\nFROM no\nE\n\tF\nCMD a", ["RUN <<E <<-'F' x", "CMD a"]), ("RUN a \\", ["RUN a "]), ("#syntax=x\n#escape=`\nA \\\nB `", ["A \\", "B "])])
    def test_steps_of_a_dockerfile(self, text, steps):
        assert nerdctld.dockerfile_steps(text) == steps

    def test_the_stream_of_buildkit(self, furnished):
        lines = ask(furnished, "POST", "/build?t=tst:a&version=2", self.STEPS, TAR).lines
        assert lines[-1] == {"id": "moby.image.id", "aux": {"ID": BB}} and {each["id"] for each in lines[:-1]} == {"moby.buildkit.trace"}
        messages = [nerdctld.read_message(base64.b64decode(each["aux"])) for each in lines[:-1]]
        log = next(nerdctld.read_message(each[3]) for each in messages if 3 in each)
        assert (bytes(log[4]), log[3], bytes(log[1])[:7]) == (b"hi\n", 1, b"sha256:") and nerdctld.read_message(log[2])[1] == 1795733244
        vertexes = [nerdctld.read_message(each[1]) for each in messages if 1 in each]
        assert b"[1/2] FROM localhost:5000/bb:1" in bytes(vertexes[-1][3]) + bytes(vertexes[2][3])

    def test_context_names_are_cleaned(self, tmp_path):
        tmp_path = tmp_path / "root"
        tmp_path.mkdir()
        nerdctld.unpack_context(io.BytesIO(tar_of(("Dockerfile", b"FROM x\n"), ("dir/../foo", b"1"), ("/bar", b"2"), ("a//./b", b"3"))), str(tmp_path))
        assert sorted(os.listdir(tmp_path)) == ["Dockerfile", "a", "bar", "foo"] and (tmp_path / "a/b").read_bytes() == b"3"

    def test_a_cache_that_is_here_is_asked_of_no_registry(self, furnished, scripted):
        ask(furnished, "POST", "/build?t=tst:a&cachefrom=" + urllib.parse.quote('["tst:a","localhost:5000/bb:1","else/where"]'), CONTEXT, TAR)
        assert [each for each in scripted.argv("build") if "cache" in each] == ["--cache-from=else/where"]

    @pytest.mark.parametrize("text, words", [(b"", "the Dockerfile (Dockerfile) cannot be empty"), (b"# x\n", "failed to parse Dockerfile: file with no instructions")])
    def test_empty_dockerfile(self, furnished, scripted, text, words):
        answer = ask(furnished, "POST", "/build?t=tst:a", tar_of(("Dockerfile", text)), TAR)
        assert (answer.status, answer.message, scripted.calls("build")) == (400, words, [])

    @pytest.mark.parametrize("query, words", [
        ("buildargs=" + urllib.parse.quote('{"A":"-b c","N":null}'), ["--build-arg=A=-b c"]), ("labels=" + urllib.parse.quote('{"x":"y"}'), ["--label=x=y"]),
        ("cachefrom=" + urllib.parse.quote('["a"]'), ["--cache-from=a"]), ("extrahosts=a:1.2.3.4", ["--add-host=a:1.2.3.4"]), ("nocache=1", ["--no-cache"]),
        ("nocache=0", []), ("pull=true", ["--pull"]), ("target=-x", ["--target=-x"]), ("platform=linux/arm64", ["--platform=linux/arm64"]),
        ("networkmode=host", ["--network=host", "--allow=network.host"]), ("networkmode=none", ["--network=none"]), ("networkmode=default", [])])
    def test_options(self, furnished, scripted, query, words):
        assert ask(furnished, "POST", "/build?t=tst:a&" + query, CONTEXT, TAR).status == 200
        assert scripted.argv("build")[2:-4] == words

    def test_credentials(self, furnished, scripted):
        ask(furnished, "POST", "/build?t=tst:a", CONTEXT, {**TAR, "X-Registry-Config": encoded({"localhost:5000": {"username": "u", "password": "p"}})})
        assert scripted.calls("build")[0]["auth"] == {"auths": {"localhost:5000": {"auth": "dTpw"}}}
        ask(furnished, "POST", "/build?t=tst:a", CONTEXT, {**TAR, "X-Registry-Config": encoded({"auths": {}})})
        assert scripted.calls("build")[1]["auth"] is None

    def test_limits_are_warned_about(self, furnished):
        assert "memory is not carried out" in ask(furnished, "POST", "/build?t=tst:a&memory=100", self.STEPS, TAR).lines[0]["stream"]

    @pytest.mark.parametrize("query, status", [
        ("t=A", 400), ("t=a@" + BB, 400), ("dockerfile=nothing", 400), ("dockerfile=../x", 400), ("dockerfile=a%00b", 400), ("dockerfile=/etc/passwd", 400), ("buildargs=[", 400),
        ("buildargs=[]", 400), ("labels=" + urllib.parse.quote('{"a":1}'), 400), ("platform=;", 400), ("remote=ftp://x", 400), ("remote=git://x/y", 501),
        ("remote=-x", 400), ("squash=1", 501), ("networkmode=container:x", 501), ("outputs=x", 501)])
    def test_refuses(self, furnished, scripted, query, status):
        answer = ask(furnished, "POST", "/build?" + query, CONTEXT, TAR)
        assert answer.status == status and answer.message
        assert scripted.calls("build") == []

    def test_dockerfile_through_a_link(self, furnished, scripted):
        context = tar_of(("Dockerfile", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}))
        assert ask(furnished, "POST", "/build", context, TAR).status == 400

    def test_failed_step(self, furnished, scripted):
        scripted.on("build", BUILD_FAILED)
        answer = ask(furnished, "POST", "/build?t=tst:a", self.STEPS, TAR)
        text = "The command '/bin/sh -c exit 7' returned a non-zero code: 7"
        assert (answer.status, answer.lines[-1]) == (200, {"errorDetail": {"code": 7, "message": text}, "error": text})

    def test_failed_parsing(self, furnished, scripted):
        scripted.on("build", BUILD_UNPARSED)
        answer = ask(furnished, "POST", "/build?t=tst:a", CONTEXT, TAR)
        assert (answer.status, answer.message) == (400, "dockerfile parse error on line 2: unknown instruction: FOO (did you mean FROM?)")

    @pytest.mark.parametrize("stderr", [next(each[1] for each in FAILURES if "buildkit" in each[1]), ""], ids=["words", "silence"])
    def test_no_buildkitd(self, furnished, scripted, stderr):
        scripted.on("build", stderr=stderr, status=1)
        answer = ask(furnished, "POST", "/build?t=tst:a", CONTEXT, TAR)
        assert "buildkitd does not answer" in (answer.message if answer.status == 503 else answer.lines[-1]["error"])

    @contextlib.contextmanager
    def files(self, folder, context=None, moved=""):
        """The URL of a server of a context and a Dockerfile, which has moved elsewhere where `moved` says so."""
        class Files(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                if not moved:
                    return super().do_GET()
                self.send_response(307)
                self.send_header("Location", moved + self.path)
                self.end_headers()

            def log_message(self, *_):
                pass
        folder.mkdir(exist_ok=True)
        (folder / "context.tar").write_bytes(CONTEXT)
        (folder / "Dockerfile.txt").write_text("FROM x\n")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *words: Files(*words, directory=str(folder)))
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()

    def test_remote(self, furnished, scripted, tmp_path):
        with self.files(tmp_path / "web") as base:
            assert ask(furnished, "POST", f"/build?t=tst:a&remote={base}/context.tar").status == 200
            assert ask(furnished, "POST", f"/build?t=tst:a&remote={base}/Dockerfile.txt").status == 200
            assert ask(furnished, "POST", f"/build?t=tst:a&remote={base}/nothing").status == 400
            assert ask(furnished, "POST", f"/build?t=tst:a&remote={base}/%C3%A9").status == 400
        assert ask(furnished, "POST", f"/build?t=tst:a&remote={base}/context.tar").status == 400

    def test_remote_by_tls(self, scripted, fake, tmp_path):
        # In a process of its own: this one has loaded http.client with OpenSSL.
        (tmp_path / "unknown").mkdir()
        contexts = [certificate(folder, "IP:127.0.0.1") for folder in (tmp_path, tmp_path / "unknown")]
        daemon = Daemon(tmp_path, "--nerdctl", str(scripted.program), "--address", fake.path,
                        environment={"SSL_CERT_FILE": str(tmp_path / "crt"), "SSL_CERT_DIR": "/nowhere"})
        try:
            for context, status in zip(contexts, (200, 400)):
                with self.files(tmp_path / "web", context) as base, self.files(tmp_path / "web", moved=base) as moved:
                    for url in (base + "/context.tar", base + "/Dockerfile.txt", moved + "/context.tar"):
                        answer = daemon.ask("POST", "/build?t=tst:a&remote=" + url)
                        assert answer.status == status, url
                        assert status == 200 or "certificate verify failed" in answer.message
        finally:
            daemon.end()

    def buildctl(self, furnished, monkeypatch, tmp_path, script):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "buildctl").write_text(f"#!/bin/sh\necho \"$@\" >>{tmp_path}/args\n{script}\n")
        (folder / "buildctl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def test_prune(self, furnished, monkeypatch, tmp_path):
        self.buildctl(furnished, monkeypatch, tmp_path, f"cat <<'END'\n{BUILDCTL_DU.stdout}END")
        answer = ask(furnished, "POST", "/build/prune?all=1&keep-storage=2000000&" + filtered(until=["1h"], type=["regular"]))
        assert answer.json == {"CachesDeleted": [each["id"] for each in json.loads(BUILDCTL_DU.stdout)], "SpaceReclaimed": sum(each["size"] for each in json.loads(BUILDCTL_DU.stdout))}
        words = (tmp_path / "args").read_text()
        for each in ("--all", "--filter=type==regular", "--keep-duration=3600s", "--keep-storage=2"):
            assert each in words
        for query, flags in (("reserved-space=3000000", ["--keep-storage=3"]), ("max-used-space=2000000", ["--keep-storage=2"]), ("min-free-space=4000000", ["--free-storage=4"]),
                             ("reserved-space=1000000&max-used-space=2000000", ["--keep-storage=2", "--keep-storage-min=1"])):
            assert ask(furnished, "POST", "/build/prune?" + query).status == 200
            assert [each for each in (tmp_path / "args").read_text().splitlines()[-1].split() if "storage" in each] == flags
        assert ask(furnished, "POST", "/build/prune?filters=").status == 200
        assert ask(furnished, "POST", "/build/prune?" + filtered(x=["1"])).status == 400

    def test_prune_without_buildkitd(self, furnished, monkeypatch, tmp_path):
        self.buildctl(furnished, monkeypatch, tmp_path, 'echo \'error: failed to call prune: Unavailable: connection error: desc = "transport: Error '
                      'while dialing: dial unix /nosuch: connect: no such file or directory"\' >&2; exit 1')
        answer = ask(furnished, "POST", "/build/prune")
        assert answer.status == 503 and "buildkitd" in answer.message
        monkeypatch.setenv("PATH", str(tmp_path))
        answer = ask(furnished, "POST", "/build/prune")
        assert answer.status == 503 and answer.message.startswith("buildctl cannot be run") and "nerdctl" not in answer.message


###############################################################################
# Containers
###############################################################################


class TestContainers:
    def names(self, engine, query):
        return [each["Names"][0] for each in ask(engine, "GET", "/containers/json?" + query).json]

    def test_list(self, reading):
        rows = {each["Names"][0]: each for each in ask(reading, "GET", "/v1.51/containers/json?all=1").json}
        web = rows["/tstweb"]
        assert (web["Id"], web["Image"], web["ImageID"], web["Command"], web["State"]) == (ID, BASE, BB, "sleep 1000", "running")
        assert web["Labels"] == {"a": "b,c", "base": "busybox"}
        assert web["Ports"] == [{"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 18080, "Type": "tcp"}]
        assert [each["Destination"] for each in web["Mounts"]] == ["/data", "/host"]
        assert list(web["NetworkSettings"]["Networks"]) == ["tstnet"] and web["HostConfig"] == {"NetworkMode": "tstnet"}
        assert re.fullmatch(r"Up \d+ \w+|Up (About|Less) .*", web["Status"])
        assert re.fullmatch(r"Exited \(3\) .* ago", rows["/tstdone"]["Status"])
        assert (rows["/tstnew"]["Status"], rows["/tstnew"]["State"], rows["/tstpaused"]["State"]) == ("Created", "created", "paused")

    @pytest.mark.parametrize("request_", [
        {"HostConfig": [1]}, {"HostConfig": {"RestartPolicy": "x", "NetworkMode": 5, "Links": [1, "a:b"], "Mounts": [{"Target": []}, 1], "Binds": 7, "LogConfig": {"Config": [1]}}},
        {"NetworkingConfig": [1]}, {"NetworkingConfig": {"EndpointsConfig": {"tstnet": {"Aliases": 5, "Links": [{}]}, "x": 1}}}, {"Labels": [1], "ExposedPorts": ["80/tcp"]},
        {"ExposedPorts": {"\u00b2/tcp": {}, "80": {}}, "Env": [1], "Healthcheck": 1, "Volumes": []}], ids=str)
    def test_a_request_that_somebody_else_wrote(self, engine, fake, request_):
        labels = {"nerdctl/name": "x", **nerdctld.request_labels(request_), "nerdctl/networks": '["tstnet"]', "containerd.io/restart.policy": "on-failure:x", "containerd.io/restart.count": "\u00b2"}
        fake.create(ID, labels)
        fake.start(ID)
        row, = ask(engine, "GET", "/v1.51/containers/json").json
        assert row["State"] == "running" and {each["PrivatePort"] for each in row["Ports"]} <= {80}
        assert ask(engine, "GET", "/containers/x/json").status == 200
        fake.exit(ID, 1)
        assert ask(engine, "GET", "/containers/x/json").json["State"]["Status"] in ("exited", "restarting")
        container = engine.inventory.container("x")
        aliases, links = nerdctld.wanted_names(container)
        assert not any(aliases.values()) and set(links) <= {"a"} and not nerdctld.auto_removed(container)

    def test_addresses_in_the_list_need_no_process(self, tmp_path):
        note = {"ID": ID, "Networks": {
            "back": {"interfaces": [{"mac": "1", "name": "br0"}, {"mac": "2", "name": "eth1", "sandbox": "/proc/1/ns/net"}],
                     "ips": [{"address": "10.5.0.7/24", "gateway": "10.5.0.1"}, {"address": "fd00::7/64"}]},
            "front": {"interfaces": [{"mac": "3", "name": "eth0", "sandbox": "/proc/1/ns/net"}], "ips": [{"address": "10.6.0.7/16"}]}}}
        folder = tmp_path / "etchosts" / "default" / ID
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps(note))
        labels = {"nerdctl/state-dir": f"{tmp_path}/containers/default/{ID}", "nerdctl/networks": '["front","back"]'}
        networks = {name: {"Id": name, "Name": name, "IPAM": {"Config": [{"Subnet": "10.0.0.0/8", "Gateway": gateway}]}}
                    for name, gateway in (("front", "10.6.0.1"), ("back", "10.5.0.1"))}
        told = nerdctld.docker_networks(container_of(labels, "running"), networks)
        assert {key: told["front"][key] for key in ("IPAddress", "IPPrefixLen", "Gateway", "MacAddress")} == {
            "IPAddress": "10.6.0.7", "IPPrefixLen": 16, "Gateway": "10.6.0.1", "MacAddress": "3"}
        assert (told["back"]["IPAddress"], told["back"]["GlobalIPv6Address"], told["back"]["MacAddress"]) == ("10.5.0.7", "fd00::7", "2")
        told = nerdctld.docker_networks(container_of(labels), networks)
        assert told["front"]["IPAddress"] == told["front"]["Gateway"] == ""

    def test_variables_without_a_value_are_told(self):
        container = container_of(nerdctld.request_labels({"Image": "x", "Env": ["A=1", "B", "C="]}))
        assert nerdctld.docker_config(container, {"process": {"env": ["PATH=/bin", "HOSTNAME=h", "A=1", "C="]}}, {})["Env"] == ["PATH=/bin", "A=1", "C=", "B"]
        assert nerdctld.docker_config(container, {}, {})["Env"] == ["B"] and nerdctld.docker_config(container_of(), {}, {})["Env"] is None

    @pytest.mark.parametrize("task, started, told", [(None, "", "02:42:ac:11:00:02"), ("stopped", "2026-11-24T00:00:00Z", "")])
    def test_hardware_address_that_was_asked_for(self, tmp_path, task, started, told):
        (tmp_path / "lifecycle.json").write_text(json.dumps({"started_at": started} if started else {}))
        asked = {"Image": "x", "HostConfig": {"NetworkMode": "net"}, "NetworkingConfig": {"EndpointsConfig": {"net": {"MacAddress": "02:42:ac:11:00:02"}}}}
        labels = {"nerdctl/networks": '["net"]', "nerdctl/state-dir": str(tmp_path), **nerdctld.request_labels(asked)}
        assert nerdctld.docker_networks(container_of(labels, task), {"net": {"Id": "1", "Name": "net"}})["net"]["MacAddress"] == told

    def test_rows_of_versions(self, reading, engine, fake):
        rows = {version: ask(reading, "GET", f"/v{version}/containers/json").json[0] for version in ("1.47", "1.48", "1.51", "1.52")}
        assert [each for each in rows if "ImageManifestDescriptor" in rows[each]] == ["1.48", "1.51", "1.52"]
        assert rows["1.48"]["ImageManifestDescriptor"]["platform"] == {"architecture": "amd64", "os": "linux"}
        assert rows["1.48"]["ImageManifestDescriptor"]["digest"] == BB and [each for each in rows if "Health" in rows[each]] == ["1.52"]
        fake.create("e" * 64, {"nerdctl/name": "noted", **nerdctld.request_labels({"Image": BASE, "HostConfig": {"Annotations": {"a": "b"}}})})
        told = {version: ask(engine, "GET", f"/v{version}/containers/json?all=1&" + filtered(name=["noted"])).json[0]["HostConfig"] for version in ("1.45", "1.46")}
        assert (told["1.45"].get("Annotations"), told["1.46"]["Annotations"]) == (None, {"a": "b"})

    def test_newest_first(self, reading):
        assert self.names(reading, "all=1") == ["/tstpaused", "/tstnew", "/tstdone", "/tstweb"]

    @pytest.mark.parametrize("query, names", [
        ("", "paused web"), ("all=1", "paused new done web"), ("limit=1", "paused"), ("limit=-1", "paused web"), ("limit=0&all=1", "paused new done web"),
        (filtered(status=["exited"]), "done"), (filtered(status=["created", "running"]), "new web"), (filtered(exited=["3"]), "done"),
        (filtered(exited=["0"]), ""), ("all=1&" + filtered(name=["web"]), "web"), ("all=1&" + filtered(name=["^/?tst"]), "paused new done web"),
        ("all=1&" + filtered(name=["^tst(web|new)$"]), "new web"), ("all=1&" + filtered(name=["^web", "^/tstd"]), "done"), ("all=1&" + filtered(name=["tst["]), ""),
        ("all=1&" + filtered(name=["tst(?=w)", "(?i)WEB$"]), "web"), ("all=1&" + filtered(name=[""]), "paused new done web"),
        ("all=1&" + filtered(id=["da86"]), "web"), ("all=1&" + filtered(label=["a=b,c"]), "web"), ("all=1&" + filtered(label=["a", "z"]), ""),
        (filtered(before=["tstnew"]), "done web"), (filtered(since=["tstnew"]), "paused"), ("all=1&" + filtered(network=["tstnet"]), "web"),
        ("all=1&" + filtered(network=["none"]), "paused new done"), ("all=1&" + filtered(volume=["tstvol"]), "web"), ("all=1&" + filtered(volume=["/host"]), "web"),
        ("all=1&" + filtered(publish=["18080"]), "web"), ("all=1&" + filtered(expose=["80/tcp"]), "web"), ("all=1&" + filtered(expose=["70-90/udp"]), ""),
        ("all=1&" + filtered(ancestor=["tst:a"]), "paused new done web"), ("all=1&" + filtered(ancestor=["nosuch"]), ""),
        ("all=1&" + filtered(health=["none"]), "paused new done web"), ("all=1&" + filtered(**{"is-task": ["true"]}), "")])
    def test_filters(self, reading, query, names):
        assert self.names(reading, query) == ["/tst" + each for each in names.split()]

    @pytest.mark.parametrize("query, status", [
        ("filters=[", 400), (filtered(status=["gone"]), 400), (filtered(exited=["x"]), 400), (filtered(health=["ill"]), 400), (filtered(x=["1"]), 400),
        (filtered(before=["nosuch"]), 404), ("limit=x", 400), ("all=1&" + filtered(publish=["x"]), 400)])
    def test_list_refuses(self, reading, query, status):
        assert ask(reading, "GET", "/containers/json?" + query).status == status

    def test_size(self, reading):
        rows = ask(reading, "GET", "/containers/json?all=1&size=1").json
        assert rows[-1]["SizeRw"] == 28672 and rows[-1]["SizeRootFs"] == 2019328 + 28672

    def test_inspect_of_a_running_one(self, furnished):
        assert "IPAddress" not in ask(furnished, "GET", "/v1.51/containers/tstweb/json").json["NetworkSettings"]
        told = ask(furnished, "GET", "/v1.50/containers/tstweb/json").json
        assert (told["Id"], told["Name"], told["Image"], told["Path"], told["Args"]) == (ID, "/tstweb", BB, "sleep", ["1000"])
        assert told["State"]["Running"] and not told["State"]["Restarting"] and told["State"]["Pid"] == 32149
        assert told["HostConfig"]["RestartPolicy"] == {"Name": "always", "MaximumRetryCount": 0}
        assert told["HostConfig"]["Runtime"] == ask(furnished, "GET", "/info").json["DefaultRuntime"] == "runc"
        assert told["HostConfig"]["Binds"] == ["/tmp:/host:ro"] and told["HostConfig"]["LogConfig"] == {"Type": "json-file", "Config": {}}
        assert told["Config"]["Cmd"] == ["sleep", "1000"] and told["Config"]["Env"] == ["PATH=/bin", "X=1"] and told["Config"]["Image"] == BASE
        assert told["Config"]["Labels"] == {"a": "b,c", "base": "busybox"}
        assert told["NetworkSettings"]["Networks"]["tstnet"]["IPAddress"] == told["NetworkSettings"]["IPAddress"] == "10.77.0.2"
        assert told["NetworkSettings"]["Networks"]["tstnet"]["Gateway"] == "10.77.0.1"
        assert told["NetworkSettings"]["Ports"] == {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "18080"}]}

    @pytest.mark.parametrize("name, state", [
        ("tstdone", {"Status": "exited", "Running": False, "ExitCode": 3, "FinishedAt": "2026-11-24T03:57:10.624517029Z", "Pid": 0}),
        ("tstnew", {"Status": "created", "Running": False, "ExitCode": 0, "FinishedAt": "0001-01-01T00:00:00Z"}),
        ("tstpaused", {"Status": "paused", "Running": True, "Paused": True, "Pid": 32448})])
    def test_states(self, reading, name, state):
        told = ask(reading, "GET", f"/containers/{name}/json").json["State"]
        assert {key: told[key] for key in state} == state

    def test_shapes_of_versions(self, reading):
        old, new = (ask(reading, "GET", f"{version}/containers/tstweb/json").json for version in ("/v1.47", ""))
        assert "IPAddress" in old["NetworkSettings"] and "IPAddress" not in new["NetworkSettings"]
        assert "ImageManifestDescriptor" in new and "ImageManifestDescriptor" not in old
        assert "Health" in ask(reading, "GET", "/containers/json").json[0] and "Health" not in ask(reading, "GET", "/v1.51/containers/json").json[0]

    def test_none(self, reading):
        answer = ask(reading, "GET", "/containers/nosuch/json")
        assert (answer.status, answer.message) == (404, "No such container: nosuch")
        assert ask(reading, "GET", "/containers/-x/json").status == 404

    def of_request(self, request, task="running", mounts=(), ports=(), **fields):
        """A container that was made with this request; `ports` are pairs of the host's and its own."""
        labels = {f"nerdctl/mounts.{number}": json.dumps(each) for number, each in enumerate(mounts)}
        labels["nerdctl/ports"] = json.dumps([{"HostPort": outer, "ContainerPort": inner, "Protocol": "tcp", "HostIP": "0.0.0.0"} for outer, inner in ports])
        return container_of({**nerdctld.request_labels(nerdctld.slim(request)), **labels}, task, **fields)

    def test_labels_without_a_value_are_there(self):
        assert self.of_request({"Image": "x", "Labels": {"a": "", "b": "c"}}).visible_labels == {"a": ""}

    @pytest.mark.parametrize("told, request_, shown", [
        (["sh", "-c", "sleep 30"], {"Cmd": ["sh", "-c", "sleep 30"]}, "sh -c 'sleep 30'"), (["sh", "-c", "sleep 30"], {}, "sh -c 'sleep 30'"),
        (["sleep", "30"], {}, "sleep 30"), (["a b", "c d", "", "e"], {"Entrypoint": ["a b"], "Cmd": ["c d", "", "e"]}, "a b 'c d'  e"),
        *(([f"/sbin/{program}", "--", "sleep", "5"], {"Cmd": ["sleep", "5"], "HostConfig": {"Init": True}}, "sleep 5") for program in ("tini", "docker-init", "tini-static")),
        (["/sbin/tini", "--", "x"], {"Cmd": ["/sbin/tini", "--", "x"]}, "/sbin/tini -- x"),
        (["other"], {"Cmd": ["a b"]}, "other"), ([], {}, "")], ids=str)
    def test_command_of_a_row(self, told, request_, shown):
        assert nerdctld.lasting_row(self.of_request({"Image": "x", **request_}, spec={"process": {"args": told}}))["Command"] == shown

    def test_mounts_in_memory_are_shown_where_they_were_mounts(self):
        mounts = [{"Type": "tmpfs", "Source": "tmpfs", "Destination": "/a", "Mode": "x"}, {"Type": "tmpfs", "Source": "tmpfs", "Destination": "/b", "Mode": "x"},
                  {"Type": "bind", "Source": "/s", "Destination": "/c"}]
        found = nerdctld.docker_mounts(self.of_request({"Image": "x", "HostConfig": {"Tmpfs": {"/a": ""}, "Mounts": [{"Type": "tmpfs", "Target": "/b"}]}}, mounts=mounts))
        assert [(each["Destination"], each["Source"], each["Mode"], each["Propagation"]) for each in found] == [("/b", "", "", ""), ("/c", "/s", "", "rprivate")]

    def test_modes_of_mounts(self):
        mounts = [{"Type": "bind", "Source": "/s", "Destination": path, "Mode": "ro,rbind"} for path in ("/a", "/b", "/c")] + [{"Type": "volume", "Source": "/v", "Destination": "/d", "Mode": ""}]
        asked = {"Binds": ["/s:/a:ro", "/s:/b"], "Mounts": [{"Type": "bind", "Source": "/s", "Target": "/c", "ReadOnly": True}, {"Type": "volume", "Target": "/d"}]}
        assert [each["Mode"] for each in nerdctld.docker_mounts(self.of_request({"Image": "x", "HostConfig": asked}, mounts=mounts))] == ["ro", "", "", "z"]

    def test_ports_that_are_only_exposed(self):
        request = {"Image": "x", "ExposedPorts": {"8080/tcp": {}, "443": {}, "80/tcp": {}, "53/udp": {}}}
        shown = lambda asked=(), **how: [(each.get("PublicPort"), each["PrivatePort"], each["Type"]) for each in nerdctld.lasting_row(
            self.of_request({**request, **dict(asked)}, **how))["Ports"]]
        assert shown(ports=[(8000, 80)]) == [(8000, 80, "tcp"), (None, 53, "udp"), (None, 443, "tcp"), (None, 8080, "tcp")]
        assert shown(ports=[(8000, 80)], task="stopped") == []
        assert shown(host(NetworkMode="container:x")) == []

    def test_the_network_of_another_container(self):
        container = container_of({
            **nerdctld.request_labels({"Image": "x", "HostConfig": {"NetworkMode": "container:" + "2" * 64}}), "nerdctl/networks": '["none"]'})
        assert nerdctld.docker_networks(container, {}) == {} and nerdctld.lasting_row(container)["HostConfig"] == {"NetworkMode": "container:" + "2" * 64}

    def test_binds_are_those_of_the_request(self):
        mounts = [{"Type": "bind", "Source": "/s", "Destination": "/c", "RW": False}]
        shown = lambda container: nerdctld.docker_host_config(container, {})["Binds"]
        assert shown(self.of_request({"Image": "x", "HostConfig": {"Mounts": [{"Type": "bind", "Source": "/s", "Target": "/c"}]}}, mounts=mounts)) is None
        assert shown(container_of({"nerdctl/mounts.0": json.dumps(mounts[0])}, "running")) == ["/s:/c:ro"]

    def test_command_without_the_init_process(self, engine, fake):
        for number, program in enumerate(("tini", "docker-init", "tini-static")):
            fake.create(f"{number:064x}", nerdctld.request_labels({"Image": "x", "HostConfig": {"Init": True}}), spec={"process": {"args": [f"/sbin/{program}", "--", "sleep", "5"]}})
            found = ask(engine, "GET", f"/containers/{number:064x}/json").json
            assert (found["Path"], found["Args"]) == ("sleep", ["5"])

    def test_limits_are_those_of_now(self):
        container = self.of_request({"Image": "x", "HostConfig": {"NanoCpus": 700000000, "Memory": 1 << 26}})
        found = nerdctld.docker_host_config(container, {"linux": {"resources": {"cpu": {"quota": 50000, "period": 100000}, "memory": {"limit": 1 << 27}}}})
        assert [found[key] for key in ("NanoCpus", "CpuQuota", "CpuPeriod", "Memory")] == [500000000, 0, 0, 1 << 27]

    def test_logs_that_are_not_kept(self, furnished, fake):
        fake.label(ID, **nerdctld.request_labels({"HostConfig": {"LogConfig": {"Type": "none"}}}))
        answer = ask(furnished, "GET", f"/containers/{ID}/logs?stdout=1")
        assert (answer.status, answer.message) == (501, "configured logging driver does not support reading")

    def test_a_request_is_kept_whole(self):
        body = {"Image": "x", "Env": ["A=" + "é" * 9000]}
        labels = nerdctld.request_labels(body)
        assert all(len(key) + len(value) < 4096 for key, value in labels.items())
        assert container_of(labels).request == body


###############################################################################
# Container side
###############################################################################


BODY = {"Image": BASE, "Cmd": ["true"]}
NETWORKS = {"bridge": {"Id": "b" * 64, "Name": "bridge"}, "one": {"Id": "1" * 64, "Name": "one"}, "two": {"Id": "2" * 64, "Name": "two"}}


###############################################################################
# Container create
###############################################################################


def words_of(body, image=None, networks=NETWORKS):
    """What create_args makes of a request, without the network that is always there."""
    def find(name):
        if name != "other":
            raise nerdctld.NotFound(f"No such container: {name}")
        return container_of({"nerdctl/name": "other", }, id="f" * 64)

    words, _ = nerdctld.create_args({**BODY, **body}, image or {}, networks, find)
    return [each for each in words if each != "--network=bridge"]


def host(**fields):
    """A create request with these fields in HostConfig."""
    return {"HostConfig": fields}


def creates(scripted, fake, real=ID, labels=(), spec=None):
    """From now on nerdctl's create makes a container of this id, with the name, networks and labels that it is given, and
    further `labels` and an OCI `spec`."""
    def make(words):
        given = lambda flag: [each.partition("=")[2] for each in words[:words.index("--")] if each.startswith(flag + "=")]
        fake.create(real, {"nerdctl/name": (given("--name") or [real[:12]])[-1], "nerdctl/networks": json.dumps(given("--network")),
                           **dict(labels), **dict(each.partition("=")[::2] for each in given("--label"))}, spec=spec)
    scripted.on("create", stdout=real + "\n", does=make)


class TestContainerCreate:
    @pytest.mark.parametrize("key, status", [("nerdctl/pid-container", 400), ("nerdctld/request.1", 400), ("nerdctld/attached.x", 400), ("nerdctl/healthcheck", 201), ("nerdctly", 201)])
    def test_labels_of_an_image_are_no_orders(self, furnished, scripted, fake, monkeypatch, key, status):
        """nerdctl takes an image's labels over: one of its own would have a container join another one."""
        scripted.on("create", stdout=ID + "\n", does=lambda words: fake.create(ID))
        monkeypatch.setitem(furnished.inventory.image(BASE).config["config"], "Labels", {key: "{}"})
        answer = ask(furnished, "POST", "/containers/create", {"Image": BASE, "Cmd": ["x"]})
        assert answer.status == status and (status == 201 or key in answer.message)
        assert nerdctld.joined_containers(container_of({"nerdctl/pid-container": "tstweb"})) == {}

    @pytest.mark.parametrize("limits, words", [
        ({"Memory": 1000}, "Minimum memory limit allowed is 6MB"), ({"Memory": -5}, "Minimum memory limit"), ({"MemorySwap": 10**8}, "You should always set the Memory limit"),
        ({"Memory": 10**8, "MemorySwap": 10**7}, "Minimum memoryswap limit should be larger"), ({"MemorySwappiness": 200}, "Invalid value: 200, valid memory swappiness"),
        ({"MemoryReservation": 1000}, "Minimum memory reservation"), ({"Memory": 10**7, "MemoryReservation": 10**8}, "Minimum memory limit can not be less than memory res"),
        ({"NanoCpus": 10**9, "CpuPeriod": 2000}, "Nano CPUs and CPU Period cannot"), ({"NanoCpus": 10**9, "CpuQuota": 2000}, "Nano CPUs and CPU Quota cannot"),
        ({"NanoCpus": 10**14}, "Range of CPUs is from 0.01 to"), ({"NanoCpus": -1}, "Range of CPUs is from 0.01 to"), ({"CpuPeriod": 10}, "CPU cfs period can not be less"),
        ({"CpuQuota": 10}, "CPU cfs quota can not be less"), ({"ShmSize": -1}, "SHM size can not be less than 0"), ({"OomScoreAdj": 5000}, "Invalid value 5000, range for oom")])
    def test_limits_that_cannot_be(self, limits, words):
        with pytest.raises(nerdctld.BadParameter, match=re.escape(words)):
            nerdctld.create_args({"HostConfig": limits}, {}, NETWORKS, None)

    @pytest.mark.parametrize("limits", [{"Memory": 10**8, "MemorySwap": -1, "MemorySwappiness": -1}, {"CpuQuota": -1, "CpuPeriod": 1000}, {"NanoCpus": 5 * 10**8}, {"MemorySwappiness": None}])
    def test_limits_that_can(self, limits):
        nerdctld.check_limits(limits)

    FIELDS = [
        ({"Domainname": "d.test"}, "--domainname=d.test"), ({"User": "1:2"}, "--user=1:2"), ({"Tty": True}, "--tty"), ({"OpenStdin": True}, "--interactive"),
        ({"StopSignal": "SIGINT"}, "--stop-signal=SIGINT"), ({"WorkingDir": "/w"}, "--workdir=/w"), ({"Hostname": "h"}, "--hostname=h"),
        ({"StopTimeout": 0}, "--stop-timeout=0"), ({"Env": ["A=b c", "B="]}, "--env=A=b c", "--env=B="), ({"Labels": {"k": "v,w"}}, "--label=k=v,w"),
        ({"Volumes": {"/v": {}}}, "--volume=/v"), ({"Entrypoint": ["a"]}, "--entrypoint=a"),
        (host(CapAdd=["NET_ADMIN"]), "--cap-add=NET_ADMIN"), (host(CapDrop=["ALL"]), "--cap-drop=ALL"),
        (host(CgroupnsMode="host"), "--cgroupns=host"), (host(Dns=["1.1.1.1"]), "--dns=1.1.1.1"), (host(DnsOptions=["a:1"]), "--dns-option=a:1"),
        (host(DnsSearch=["x.test"]), "--dns-search=x.test"), (host(ExtraHosts=["a:1.2.3.4"]), "--add-host=a:1.2.3.4"), (host(GroupAdd=["5"]), "--group-add=5"),
        (host(UTSMode="host"), "--uts=host"), (host(OomScoreAdj=-5), "--oom-score-adj=-5"), (host(Privileged=True), "--privileged"),
        (host(ReadonlyRootfs=True), "--read-only"), (host(Runtime="runc"), "--runtime=runc"), (host(SecurityOpt=["label=b,c"]), "--security-opt=label=b,c"),
        (host(UsernsMode="host"), "--userns=host"), (host(ShmSize=64), "--shm-size=64"), (host(Sysctls={"a.b": "1"}), "--sysctl=a.b=1"),
        (host(Annotations={"a": "b"}), "--annotation=a=b"), (host(CgroupParent="/p"), "--cgroup-parent=/p"), (host(CpuShares=5), "--cpu-shares=5"),
        (host(CpuPeriod=5000), "--cpu-period=5000"), (host(CpuQuota=5000), "--cpu-quota=5000"), (host(CpuRealtimePeriod=5), "--cpu-rt-period=5"),
        (host(CpuRealtimeRuntime=5), "--cpu-rt-runtime=5"), (host(CpusetCpus="0-1"), "--cpuset-cpus=0-1"), (host(CpusetMems="0"), "--cpuset-mems=0"),
        (host(Memory=7000000), "--memory=7000000"), (host(MemoryReservation=7000000), "--memory-reservation=7000000"), (host(MemorySwap=-1), "--memory-swap=-1"),
        (host(KernelMemory=5), "--kernel-memory=5"), (host(OomKillDisable=True), "--oom-kill-disable"), (host(PidsLimit=5), "--pids-limit=5"),
        (host(BlkioWeight=5), "--blkio-weight=5"), (host(NanoCpus=1500000000), "--cpus=1.5"),
        (host(MemorySwappiness=0), "--memory-swappiness=0"), (host(MemorySwappiness=-1),),
        (host(PidMode="host"), "--pid=host"), (host(IpcMode="container:other"),),
        (host(LogConfig={"Type": "journald", "Config": {"tag": "x"}}), "--log-driver=journald", "--log-opt=tag=x"),
        (host(LogConfig={"Type": "local", "Config": {"max-size": "1m"}}), "--log-opt=max-size=1m"), (host(Tmpfs={"/t": "size=1", "/u": ""}), "--tmpfs=/t:size=1", "--tmpfs=/u"),
        (host(Ulimits=[{"Name": "nofile", "Soft": 1, "Hard": -1}]), "--ulimit=nofile=1:-1"),
        (host(Devices=[{"PathOnHost": "/dev/a", "PathInContainer": "/dev/b", "CgroupPermissions": "rwm"}]), "--device=/dev/a:/dev/b:rwm"),
        (host(DeviceRequests=[{"Count": -1, "Capabilities": [["gpu"]]}]), "--gpus=all"), (host(DeviceRequests=[{"Count": 2}]), "--gpus=2"),
        (host(DeviceRequests=[{"DeviceIDs": ["0", "1"]}]), '--gpus="device=0,1"'), (host(DeviceRequests=[{"Driver": "cdi", "DeviceIDs": ["v/c=x"]}]), "--device=v/c=x"),
        (host(BlkioDeviceReadBps=[{"Path": "/dev/a", "Rate": 5}]), "--device-read-bps=/dev/a:5"), (host(BlkioWeightDevice=[{"Path": "/dev/a", "Weight": 5}]), "--blkio-weight-device=/dev/a:5"),
        (host(RestartPolicy={"Name": "always"}), "--restart=always"), (host(RestartPolicy={"Name": "on-failure", "MaximumRetryCount": 3}), "--restart=on-failure:3"),
        (host(RestartPolicy={"Name": "no"}),), ({"Env": ["PATH", "=x"]},),
        (host(SecurityOpt=["no-new-privileges:true", "label:disable", "disable"]), "--security-opt=no-new-privileges=true", "--security-opt=label=disable",
         "--security-opt=label=disable"), (host(SecurityOpt=["no-new-privileges", "apparmor:a:b"]), "--security-opt=no-new-privileges", "--security-opt=apparmor=a:b"),
    ]

    @pytest.mark.parametrize("body", [
        host(Tmpfs={"/a": ""}, Sysctls={"a": ""}), {"Volumes": {"/data": {}}, "ExposedPorts": {"81/tcp": {}}, **host(PublishAllPorts=True)}, {"Labels": {"a": "", "b": "c"}},
        {"NetworkingConfig": {"EndpointsConfig": {"one": {}, "bridge": None}}, **host(NetworkMode="bridge")}, {"StopTimeout": 0}, host(MemorySwappiness=0),
        {"Entrypoint": [], "Cmd": ["x"]}, host(LogConfig={"Type": "json-file", "Config": {"max-size": ""}}), host(PortBindings={"80/tcp": None}),
        {"Healthcheck": {"Test": ["NONE"], "Interval": 0}}, host(MaskedPaths=[], ReadonlyPaths=[])])
    def test_a_container_made_of_what_is_kept_is_the_same(self, body, monkeypatch):
        monkeypatch.setattr(nerdctld, "free_port", lambda kind: 40000)
        whole = {**BODY, "Tty": False, "Domainname": "", **body}
        kept = json.loads(json.dumps(nerdctld.slim(whole)))
        assert words_of(kept) == words_of(whole)

    def test_init_that_needs_no_libc(self, monkeypatch):
        monkeypatch.setattr(nerdctld.shutil, "which", lambda name: name if name == "tini-static" else None)
        assert words_of(host(Init=True)) == ["--init", "--init-binary=tini-static"] and words_of(host(Init=False)) == []
        monkeypatch.setattr(nerdctld.shutil, "which", lambda name: None)
        assert words_of(host(Init=True)) == ["--init"]

    def test_variables_that_are_to_be_gone(self):
        body, image = {"Env": ["A", "B=1", "C"]}, {"Env": ["A=x", "B=y", "PATH=/bin"]}
        assert words_of(body, image) == ["--env=B=1", "--env=A="]
        assert ["variable A " in each for each in nerdctld.create_warnings(body, image)] == [True]

    def test_ports_that_nobody_else_was_given(self, furnished, scripted, fake, monkeypatch):
        ports = iter([18080, 4000, 4000, 4000, 4001])
        monkeypatch.setattr(nerdctld, "unused_port", lambda kind: next(ports))
        given = []
        for number in range(2):
            creates(scripted, fake, f"{number:064x}")
            assert ask(furnished, "POST", "/containers/create", {**BODY, **host(PortBindings={"80/tcp": [{"HostPort": ""}]})}).status == 201
            given += [each for each in scripted.argv("create") if each.startswith("--publish=")]
        # The first is that of a container that runs.
        assert given == ["--publish=4000:80/tcp", "--publish=4001:80/tcp"]

    @pytest.mark.parametrize("mode, names", [("tstnet", ["tstnet"]), ("default", ["bridge"]), ("none", ["none"])])
    def test_the_networks_of_a_new_one(self, furnished, scripted, fake, mode, names):
        creates(scripted, fake, "9" * 64)
        assert ask(furnished, "POST", "/containers/create?name=new", {**BODY, **host(NetworkMode=mode)}).status == 201
        assert list(ask(furnished, "GET", "/containers/new/json").json["NetworkSettings"]["Networks"]) == names

    def test_what_is_kept_of_a_request(self, furnished):
        found = nerdctld.kept_request(furnished, {"Image": BASE, "ExposedPorts": {"81/tcp": {}}, **host(IpcMode="container:tstweb", NetworkMode="host")}, {"ExposedPorts": {"80/tcp": {}}})
        assert found == {"Image": BASE, "ExposedPorts": {"80/tcp": {}, "81/tcp": {}}, "HostConfig": {"IpcMode": "container:" + ID, "NetworkMode": "host"}}

    def spec(self, mounts=(), kinds=("network", "ipc", "pid", "uts"), **more):
        """An OCI spec with these mounts (destination -> type and source) and namespaces of its own."""
        return {"hostname": "own", "process": {"env": ["A=1", "HOSTNAME=own"]}, "linux": {"namespaces": [{"type": kind} for kind in kinds], "sysctl": {"net.a": "0", "kernel.b": "1"}},
                "mounts": [{"destination": path, "type": kind, "source": source} for path, (kind, source) in dict(mounts).items()], "annotations": {"nerdctl/name": "x"}, **more}

    OTHER, MINE = "5" * 64, "9" * 64
    ETC = {"/etc/hosts": ("bind", "/store/etchosts/n/other/hosts"), "/etc/hostname": ("bind", "/store/containers/n/other/hostname")}

    @pytest.fixture
    def pair(self, furnished, scripted, fake):
        """How to create a container with these modes beside another one that does not run; its record."""
        def make(modes, other=None, kept=(), labels=()):
            fake.create(self.OTHER, {"nerdctl/name": "other", **dict(labels)}, spec=other or {**self.spec({**self.ETC, "/dev/shm": ("bind", "/store/shm")}), "hostname": "others"})
            mine = {"/etc/hosts": ("bind", "/store/etchosts/n/mine/hosts"), "/etc/hostname": ("bind", "/kept"), "/dev/shm": ("tmpfs", "shm"), "/dev/mqueue": ("mqueue", "mqueue"), **dict(kept)}
            creates(scripted, fake, self.MINE, {"nerdctl/state-dir": "/store/containers/n/mine"}, self.spec(mine))
            answer = ask(furnished, "POST", "/containers/create?name=mine", {**BODY, **host(**modes)})
            assert (answer.status, answer.json and answer.json["Id"]) == (201, self.MINE)
            return fake.containers[self.MINE]
        return make

    @pytest.mark.parametrize("modes, words, labels", [
        ({"NetworkMode": "container:other"}, ["--network=none"], {"nerdctl/networks": '["container:{}"]'}), ({"PidMode": "container:other", "NetworkMode": "none"}, ["--network=none"], {"nerdctl/pid-container": "{}"}),
        ({"IpcMode": "container:other", "NetworkMode": "host"}, ["--network=host"], {"nerdctl/ipc": '{{"mode": "container", "victimContainerId": "{}"}}'})])
    def test_namespaces_of_one_that_does_not_run_yet(self, pair, scripted, fake, modes, words, labels):
        """nerdctl would refuse them; what it would have noted is there, for its own start too."""
        record = pair(modes)
        assert [each for each in scripted.argv("create") if each.startswith(("--network", "--ipc", "--pid="))] == words and len(scripted.calls("create")) == 1
        wanted = {key: value.format(self.OTHER) for key, value in labels.items()}
        assert wanted.items() <= record.labels.items() and wanted.items() <= json.loads(record.spec)["annotations"].items() and nerdctld.LABEL_LATER not in record.labels

    def test_files_of_anothers_network(self, pair, fake):
        spec = json.loads(pair({"NetworkMode": "container:other"}).spec)
        # What the client has mounted stays.
        assert {each["destination"]: each["source"] for each in spec["mounts"]} == {"/etc/hosts": "/store/etchosts/n/other/hosts", "/etc/hostname": "/kept", "/dev/shm": "shm", "/dev/mqueue": "mqueue"}
        assert spec["hostname"] == "others" and spec["process"]["env"] == ["A=1", "HOSTNAME=others"]

    def test_what_was_not_completed_is_completed_at_the_start(self, pair, furnished, fake, scripted, capfd):
        def refuse():
            raise nerdctld.GrpcError(14, "not now")
        fake.before["Containers/Update"] = refuse
        assert nerdctld.LABEL_LATER in pair({"PidMode": "container:other"}).labels and "not now" in capfd.readouterr().err
        fake.before.clear()
        fake.start(self.OTHER, 77)
        found = nerdctld.prepare_start(furnished, furnished.inventory.container("mine"))
        assert found.labels["nerdctl/pid-container"] == self.OTHER and nerdctld.LABEL_LATER not in found.labels
        assert {"type": "pid", "path": "/proc/77/ns/pid"} in found.spec["linux"]["namespaces"]

    @pytest.mark.parametrize("mode, words", [("NetworkMode", "cannot join network of a non running container: {0}"), ("PidMode", "container {0} is not running"),
                                             ("IpcMode", "can't join IPC of container {0}: container {0} is not running")])
    def test_namespaces_that_cannot_be_had(self, pair, furnished, fake, mode, words):
        pair({mode: "container:other"})
        answer = ask(furnished, "POST", "/containers/mine/start")
        assert (answer.status, answer.message) == (409, words.format(self.OTHER))
        fake.delete(self.OTHER)
        answer = ask(furnished, "POST", "/containers/mine/start")
        assert (answer.status, answer.message) == (404, f"No such container: {self.OTHER}")

    def test_namespaces_are_joined_anew_at_each_start(self, pair, furnished, fake):
        pair({"NetworkMode": "container:other", "PidMode": "container:other", "IpcMode": "container:other"})
        for pid in (77, 78):
            fake.start(self.OTHER, pid)
            spec = nerdctld.prepare_start(furnished, furnished.inventory.container("mine")).spec
            assert {each["type"]: each.get("path") for each in spec["linux"]["namespaces"]} == {"uts": None, "network": f"/proc/{pid}/ns/net", "ipc": f"/proc/{pid}/ns/ipc", "pid": f"/proc/{pid}/ns/pid"}
            assert {each["destination"]: each["source"] for each in spec["mounts"]}["/dev/shm"] == "/store/shm" and spec["linux"]["sysctl"]["net.a"] == "0"
        updates = fake.calls["Containers/Update"]
        nerdctld.prepare_start(furnished, furnished.inventory.container("mine"))
        assert fake.calls["Containers/Update"] == updates

    @pytest.mark.parametrize("far", [False, True])
    def test_namespaces_of_the_host_by_way_of_others(self, pair, furnished, fake, far):
        """What nerdctl sets for any container, runc refuses there."""
        path = [{"type": kind, "path": f"/proc/1/ns/{kind}"} for kind in ("network", "pid")]
        pair({"NetworkMode": "container:other", "PidMode": "container:other", "Sysctls": {"net.asked": "1"}}, self.spec(kinds=("uts",)) if not far else {"linux": {"namespaces": path}},
             labels={"nerdctl/networks": json.dumps(["container:" + ID]), "nerdctl/pid-container": ID} if far else {})
        fake.containers[ID] = fake.containers[ID]._replace(spec=json.dumps(self.spec(kinds=())).encode())
        fake.start(self.OTHER, 77)
        furnished.inventory.records.invalidate()
        linux = nerdctld.prepare_start(furnished, furnished.inventory.container("mine")).spec["linux"]
        assert [each["type"] for each in linux["namespaces"]] == ["ipc", "uts"] and linux["sysctl"] == {"kernel.b": "1"}

    def test_an_ipc_namespace_that_is_not_shared(self, pair, furnished, fake):
        pair({"IpcMode": "container:other"}, self.spec({"/dev/shm": ("tmpfs", "shm")}))
        fake.start(self.OTHER)
        answer = ask(furnished, "POST", "/containers/mine/start")
        assert answer.status == 500 and answer.message == f"can't join IPC of container {self.OTHER}: non-shareable IPC (hint: use IpcMode:shareable for the donor container)"

    @pytest.mark.parametrize("body, words", [
        ({"Hostname": "h"}, "hostname and the network mode"), (host(Dns=["1.1.1.1"]), "dns and the network mode"), (host(ExtraHosts=["a:1.1.1.1"]), "custom host-to-IP mapping and the network mode"),
        (host(PortBindings={"80/tcp": [{}]}), "port publishing and the container type network mode"), (host(PublishAllPorts=True), "port publishing and the"), ({"ExposedPorts": {"80/tcp": {}}}, "port exposing and the")])
    def test_what_goes_not_with_anothers_network(self, furnished, scripted, body, words):
        body = {**BODY, **body, "HostConfig": {**body.get("HostConfig", {}), "NetworkMode": "container:tstweb"}}
        answer = ask(furnished, "POST", "/containers/create", body)
        assert answer.status == 400 and answer.message.startswith(f"conflicting options: {words}") and not scripted.calls("create")

    @pytest.mark.parametrize("word, found", [
        ("8080:80/tcp", [(8080, 80, "tcp", "0.0.0.0")]), ("127.0.0.1:8080:80/udp", [(8080, 80, "udp", "127.0.0.1")]), ("[::1]:8080:80/tcp", [(8080, 80, "tcp", "::1")]), ("80/tcp", [(7, 80, "tcp", "0.0.0.0")]),
        ("8000-8001:80-81/tcp", [(8000, 80, "tcp", "0.0.0.0"), (8001, 81, "tcp", "0.0.0.0")]), ("80-81/tcp", [(7, 80, "tcp", "0.0.0.0"), (8, 81, "tcp", "0.0.0.0")]), ("8000-8010:80/tcp", [(8000, 80, "tcp", "0.0.0.0")]),
        ("127.0.0.1::80/tcp", [(7, 80, "tcp", "127.0.0.1")])])
    def test_ports_as_nerdctl_keeps_them(self, word, found):
        picks = iter((7, 8))
        assert [tuple(each.values()) for each in nerdctld.parse_publish(["--publish=" + word], lambda kind: next(picks))] == found

    @pytest.mark.parametrize("file", [True, False])
    def test_ports_that_others_had_at_the_creation(self, furnished, scripted, fake, tmp_path, monkeypatch, file):
        """They are published without a word to nerdctl, in the way of its version."""
        free = nerdctld.unused_port("tcp")
        if file:
            (tmp_path / "network-config.json").write_text("{}")
        scripted.on("create", stderr=fatal("failed to load networking flags: bind for :1 failed: port is already allocated"), status=1,
                    does=lambda words: creates(scripted, fake, self.MINE, {"nerdctl/state-dir": str(tmp_path)}))
        answer = ask(furnished, "POST", "/containers/create?name=mine", {**BODY, **host(PortBindings={"80/tcp": [{"HostPort": str(free)}]})})
        assert answer.status == 201 and [any(word.startswith("--publish=") for word in each["argv"]) for each in scripted.calls("create")] == [True, False]
        kept = [{"HostPort": free, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "0.0.0.0"}]
        record = fake.containers[self.MINE]
        if file:
            assert json.loads((tmp_path / "network-config.json").read_text()) == {"portMappings": kept} and (tmp_path / "network-config.json").stat().st_mode & 0o777 == 0o600
        else:
            assert json.loads(record.labels["nerdctl/ports"]) == json.loads(json.loads(record.spec)["annotations"]["nerdctl/ports"]) == kept
        assert [each["PublicPort"] for each in furnished.inventory.container("mine").ports] == [free]
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", free))
            sock.listen()
            answer = ask(furnished, "POST", "/containers/mine/start")
        assert answer.status == 500 and answer.message == (f"driver failed programming external connectivity on endpoint mine ({self.MINE}): Bind for 0.0.0.0:{free} failed: "
                                                           "port is already allocated")
        nerdctld.prepare_start(furnished, furnished.inventory.container("mine"))

    def ported(self, fake, identity, name, port, folder, kind="tcp", address="0.0.0.0", asked=None):
        """A container with a published port, and a network that is up if it is kept in a `folder`."""
        labels = {"nerdctl/name": name, "nerdctl/ports": json.dumps([{"HostPort": port, "ContainerPort": 80, "Protocol": kind, "HostIP": address}])}
        if folder:
            for each in (f"etchosts/n/{name}", f"containers/n/{name}"):
                (folder / each).mkdir(parents=True, exist_ok=True)
            (folder / f"etchosts/n/{name}/meta.json").write_text("{}")
            labels["nerdctl/state-dir"] = str(folder / f"containers/n/{name}")
        asked = nerdctld.request_labels({"Image": BASE, "HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": asked}]}}}) if asked is not None else {}
        fake.create(identity, {**labels, **asked}, spec={"annotations": {"nerdctl/name": name, "nerdctl/networks": '["bridge"]'}})

    @pytest.mark.parametrize("kind, address, taken", [("tcp", "0.0.0.0", True), ("tcp", "127.0.0.1", True), ("udp", "0.0.0.0", False), ("tcp", "::", False)])
    def test_a_port_of_one_that_runs(self, furnished, fake, monkeypatch, kind, address, taken):
        monkeypatch.setattr(nerdctld, "is_bound", lambda port: False)
        self.ported(fake, self.OTHER, "other", 18090, None, kind, address)
        self.ported(fake, self.MINE, "mine", 18090, None)
        fake.start(self.OTHER)
        mine = furnished.inventory.container("mine")
        assert nerdctld.taken_port(furnished, mine) == ("0.0.0.0:18090" if taken else "")

    def test_ports_of_one_that_has_ended_are_given_back(self, furnished, scripted, fake, tmp_path, monkeypatch):
        """nerdctl's hook does so when a task is deleted, and its task is not."""
        calls = []

        def output(*words, data):
            (tmp_path / "etchosts/n/other/meta.json").unlink()
            calls.append((words, json.loads(data)))
            return nerdctld.Output(0, b"", "")

        monkeypatch.setattr(furnished.nerdctl, "output", output)
        monkeypatch.setattr(nerdctld, "is_bound", lambda port: not calls)
        self.ported(fake, self.OTHER, "other", 18090, tmp_path)
        self.ported(fake, self.MINE, "mine", 18090, tmp_path)
        fake.start(self.OTHER)
        fake.exit(self.OTHER)
        mine = furnished.inventory.container("mine")
        assert nerdctld.claim_ports(furnished, mine).id == self.MINE and nerdctld.claim_ports(furnished, mine)
        (words, state), = calls
        # The hook gives up the name, too.
        assert words == ("internal", "oci-hook", "postStop") and state["id"] == self.OTHER and state["annotations"] == {"nerdctl/name": self.OTHER, "nerdctl/networks": '["bridge"]'}

    def test_a_restart_takes_the_ports_of_its_own_last_run(self, furnished, scripted, fake, tmp_path, monkeypatch):
        """nerdctl 2.3 has a process hold them, which outlives the container."""
        held = []

        def output(*words, data):
            held.clear()
            (tmp_path / "etchosts/n/mine/meta.json").unlink()
            return nerdctld.Output(0, b"", "")

        monkeypatch.setattr(furnished.nerdctl, "output", output)
        monkeypatch.setattr(nerdctld, "is_bound", lambda port: bool(held))
        self.ported(fake, self.MINE, "mine", 18090, tmp_path)
        assert ask(furnished, "POST", "/containers/mine/start").status == 204
        held.append(18090)
        assert ask(furnished, "POST", "/containers/mine/restart?t=0").status == 204
        assert fake.tasks[self.MINE] and not held

    @pytest.mark.parametrize("asked, starts", [("", True), ("0", True), ("18090", False)])
    def test_a_port_that_nobody_chose_may_be_another_one(self, furnished, fake, monkeypatch, asked, starts):
        monkeypatch.setattr(nerdctld, "is_bound", lambda port: port["PublicPort"] == 18090)
        self.ported(fake, self.MINE, "mine", 18090, None, asked=asked)
        with contextlib.nullcontext() if starts else pytest.raises(nerdctld.ApiError, match="port is already allocated"):
            assert nerdctld.claim_ports(furnished, furnished.inventory.container("mine")).ports[0]["PublicPort"] != 18090

    @pytest.mark.parametrize("kind, family", [("tcp", "127.0.0.1"), ("udp", "127.0.0.1"), ("tcp", "::1")])
    def test_an_address_of_a_process(self, kind, family):
        with socket.socket(socket.AF_INET6 if ":" in family else socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as sock:
            try:
                sock.bind((family, 0))
            except OSError:
                pytest.skip("no IPv6 here")
            if kind == "tcp":
                sock.listen()
            port = {"IP": "::" if ":" in family else "0.0.0.0", "PublicPort": sock.getsockname()[1], "Type": kind}
            assert nerdctld.is_bound(port) and not nerdctld.is_bound({**port, "Type": "sctp"})
        assert not nerdctld.is_bound(port)

    def test_the_task_of_the_last_run_goes_last(self, furnished, fake, monkeypatch):
        """When a start is refused, what is known of the last run stays."""
        monkeypatch.setattr(nerdctld, "is_bound", lambda port: True)
        self.ported(fake, self.MINE, "mine", 18090, None)
        fake.start(self.MINE)
        fake.exit(self.MINE, 3)
        assert ask(furnished, "POST", "/containers/mine/start").status == 500
        assert ask(furnished, "GET", "/containers/mine/json").json["State"]["ExitCode"] == 3
        monkeypatch.undo()
        monkeypatch.setattr(nerdctld, "is_bound", lambda port: False)
        nerdctld.prepare_start(furnished, furnished.inventory.container("mine"))
        assert self.MINE not in fake.tasks

    def test_a_shareable_shm_is_empty_at_each_start(self, monkeypatch, tmp_path):
        calls, mounted = [], [True, True, False]
        monkeypatch.setattr(nerdctld.os, "geteuid", lambda: 0)
        monkeypatch.setattr(nerdctld.os.path, "ismount", lambda path: mounted.pop(0))
        monkeypatch.setattr(nerdctld, "libc_call", lambda *words: calls.append(words))
        monkeypatch.setattr(nerdctld, "mount_snapshot", lambda mounts, path: calls.append((mounts[0]["options"][-1], path)))
        settings = {"mode": "shareable", "hostShmPath": str(tmp_path / "shm"), "shmSize": "67108864"}
        nerdctld.renew_shm(container_of({"nerdctl/ipc": json.dumps(settings)}))
        assert [each[0] for each in calls] == ["umount2", "umount2", "size=67108864"] and (tmp_path / "shm").is_dir()
        nerdctld.renew_shm(container_of({"nerdctl/ipc": '{"mode":"private"}'}))
        assert len(calls) == 3

    def test_seccomp_profile_is_a_file_for_nerdctl(self, furnished, scripted, fake):
        creates(scripted, fake, "9" * 64)
        answer = ask(furnished, "POST", "/containers/create", {**BODY, **host(SecurityOpt=['seccomp={"defaultAction":\n"SCMP_ACT_ALLOW"}'])})
        assert answer.status == 201
        word, = (each for each in scripted.argv("create") if each.startswith("--security-opt="))
        assert word.startswith("--security-opt=seccomp=/") and not os.path.exists(word.rpartition("=")[2])

    def test_proc_is_not_hidden(self):
        assert words_of(host(MaskedPaths=[], ReadonlyPaths=[])) == ["--security-opt=systempaths=unconfined"]
        assert words_of(host(MaskedPaths=None, ReadonlyPaths=None)) == words_of(host(MaskedPaths=["/proc/x"], ReadonlyPaths=[])) == []

    def test_mounts_of_others(self):
        mounts = [{"Type": "bind", "Source": "/s", "Destination": "/a", "RW": True}, {"Type": "volume", "Name": "vol", "Source": "/var/x", "Destination": "/b", "RW": False},
                  {"Type": "tmpfs", "Source": "tmpfs", "Destination": "/c"}]
        other = container_of({f"nerdctl/mounts.{number}": json.dumps(each) for number, each in enumerate(mounts)})
        words = lambda *names: nerdctld.volumes_from_args({"VolumesFrom": list(names)}, lambda name: other)
        assert words("x") == [f"--volumes-from={ID}"]
        assert words("x:ro") == ["--volume=/s:/a:ro", "--volume=vol:/b:ro"] and words("x:rw") == ["--volume=/s:/a", "--volume=vol:/b:ro"]
        with pytest.raises(nerdctld.BadParameter, match="invalid mode: z"):
            words("x:z")

    @pytest.mark.parametrize("body", [host(VolumesFrom=["nosuch"]), host(NetworkMode="container:nosuch"), host(PidMode="container:nosuch")])
    def test_other_containers_that_are_not_there(self, furnished, body):
        # 404 would make clients pull the image.
        answer = ask(furnished, "POST", "/containers/create", {**BODY, **body})
        assert (answer.status, answer.message) == (400, "No such container: nosuch")

    @pytest.mark.parametrize("body, message", [
        (host(Binds=["rel/x:/m"]), "includes invalid characters for a local volume name"), (host(Binds=["./x:/m"]), "includes invalid characters"),
        (host(Binds=["/a:/b:bogus"]), "invalid mode: bogus"), (host(Binds=["/a:/x", "/b:/x/"]), "Duplicate mount point: /x"), (host(Binds=["v:/x"]), "too short"),
        (host(Binds=["/a:/x"], Mounts=[{"Type": "tmpfs", "Target": "/x"}]), "Duplicate mount point: /x")])
    def test_mounts_that_cannot_be(self, body, message):
        with pytest.raises(nerdctld.BadParameter, match=message):
            words_of(body)

    @pytest.mark.parametrize("body, message", [
        (host(CapAdd=["BOGUS"]), 'invalid CapAdd: unknown capability: "CAP_BOGUS"'), (host(CapDrop=["cap_x"]), 'invalid CapDrop: unknown capability: "CAP_X"'),
        (host(SecurityOpt=["bogus=1"]), 'invalid --security-opt 2: "bogus=1"'), (host(SecurityOpt=["no-new-privileges=x"]), "invalid --security-opt 2"),
        (host(SecurityOpt=["seccomp"]), "invalid --security-opt 2"), (host(RestartPolicy={"Name": "no", "MaximumRetryCount": 3}), "cannot be used with 'no'"),
        ({"NetworkingConfig": {"EndpointsConfig": {"none": {"IPAMConfig": {"IPv4Address": "1.2.3.4"}}}}, **host(NetworkMode="none")}, "user defined networks only")])
    def test_what_nerdctl_would_drop_in_silence(self, body, message):
        with pytest.raises(nerdctld.BadParameter, match=message):
            words_of(body)
        words_of(host(CapAdd=["CAP_NET_ADMIN", "all", "sys_time"], SecurityOpt=["no-new-privileges", "seccomp=unconfined", "label:disable"]))

    def test_bind_whose_source_is_made(self, tmp_path):
        mount = {"Type": "bind", "Source": f"{tmp_path}/new", "Target": "/t", "ReadOnly": True, "BindOptions": {"CreateMountpoint": True}}
        assert words_of(host(Mounts=[mount])) == [f"--volume={tmp_path}/new:/t:ro"]
        (tmp_path / "new").mkdir()
        assert words_of(host(Mounts=[mount])) == [f"--mount=type=bind,target=/t,source={tmp_path}/new,readonly"]

    def test_health_check_of_an_image(self):
        # nerdctl 2.3.5, image inspect --mode=native of an image with HEALTHCHECK --interval=1s
        label = '{"Test":["CMD-SHELL","test -f /ok"],"Interval":1000000000,"Retries":2}'
        told = nerdctld.with_health_check({"config": {"Cmd": ["sh"], "Labels": {"base": "busybox", "nerdctl/healthcheck": label}}})
        assert told["config"] == {"Cmd": ["sh"], "Labels": {"base": "busybox"}, "Healthcheck": json.loads(label)}
        assert nerdctld.health_check({}, told["config"]) == json.loads(label)
        assert nerdctld.with_health_check({"config": {"Labels": {"nerdctl/healthcheck": "{"}}})["config"]["Labels"]

    @pytest.mark.parametrize("body, words", [(each[0], list(each[1:])) for each in FIELDS])
    def test_field(self, body, words):
        assert words_of(body) == words

    def test_every_flag_of_the_table_has_a_case(self):
        told = {word.partition("=")[0] for each in self.FIELDS for word in each[1:]}
        assert {flag for _, flag, _ in nerdctld.CREATE_FLAGS} <= told

    @pytest.mark.parametrize("bindings, words", [
        ({"80/tcp": [{"HostPort": "8080"}]}, ["8080:80/tcp"]), ({"80": [{"HostIp": "127.0.0.1", "HostPort": ""}]}, ["127.0.0.1::80/tcp"]),
        ({"80/udp": [{"HostIp": "::1", "HostPort": "1"}]}, ["[::1]:1:80/udp"]), ({"80/tcp": [{"HostPort": "0"}]}, ["80/tcp"]), ({"80/tcp": []}, ["80/tcp"]),
        ({"80/tcp": None}, ["80/tcp"]), ({"80/tcp": [{"HostPort": "1"}, {"HostPort": "2"}]}, ["1:80/tcp", "2:80/tcp"]), ({"80/tcp": [{"HostPort": "1-9"}]}, ["1-9:80/tcp"])])
    def test_ports(self, monkeypatch, bindings, words):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert words_of(host(PortBindings=bindings)) == ["--publish=" + each for each in words]

    def test_ports_of_a_rootless_nerdctl(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        word, = words_of(host(PortBindings={"80/tcp": [{"HostPort": "0"}]}))
        assert re.fullmatch(r"--publish=[1-9]\d+:80/tcp", word)

    def test_all_exposed_ports(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        body = {"ExposedPorts": {"81/tcp": {}}, **host(PublishAllPorts=True, PortBindings={"80/tcp": [{"HostPort": "8"}]})}
        assert sorted(words_of(body, {"ExposedPorts": {"80/tcp": {}, "82/udp": {}}})) == ["--publish=81/tcp", "--publish=82/udp", "--publish=8:80/tcp"]

    @pytest.mark.parametrize("mount, word", [
        ({"Type": "bind", "Source": "/", "Target": "/t", "ReadOnly": True}, "type=bind,target=/t,source=/,readonly"),
        ({"Type": "bind", "Source": "/", "Target": "/a,b", "BindOptions": {"Propagation": "rslave", "NonRecursive": True}},
         'type=bind,"target=/a,b",bind-propagation=rslave,bind-nonrecursive,source=/'),
        ({"Type": "volume", "Source": "v", "Target": "/t"}, "type=volume,target=/t,source=v"), ({"Target": "/t"}, "type=volume,target=/t"),
        ({"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"SizeBytes": 9, "Mode": 0o1777}}, "type=tmpfs,target=/t,tmpfs-size=9,tmpfs-mode=1777")])
    def test_mounts(self, mount, word):
        assert words_of(host(Mounts=[mount])) == ["--mount=" + word]

    def test_binds(self):
        body = {"Volumes": {"/b": {}, "/c": {}}, **host(Binds=["/a:/b:ro,cached,z", "vol:/d:nocopy"], Mounts=[{"Type": "volume", "Source": "v", "Target": "/c"}])}
        assert words_of(body) == ["--volume=/a:/b:ro,z", "--volume=vol:/d", "--mount=type=volume,target=/c,source=v"]

    def test_health(self):
        check = {"Test": ["CMD", "a", "b c"], "Interval": 10**9, "Timeout": 2 * 10**9, "StartPeriod": 10**6, "Retries": 4}
        of = lambda asked, image=None: nerdctld.health_check({"Healthcheck": asked}, {"Healthcheck": image})
        assert of(check) == check == of({}, check) == of(None, check) and of({}) == of(None) == of({"Interval": 10**9}) == {}
        assert of({"Test": ["NONE"], "Retries": 0}, check) == {**check, "Test": ["NONE"]} and of({"Retries": 9}, check) == {**check, "Retries": 9}
        # No nerdctl is asked for it: those before 2.1.3 cannot, and the others join the words.
        assert words_of({"Healthcheck": check}, {"Healthcheck": check}) == []

    @pytest.mark.parametrize("check, message", [
        ({"Test": ["ODD"]}, "unknown health check type"), ({"Test": ["CMD", "a"], "Interval": 5}, "cannot be less than 1ms"),
        ({"Test": ["CMD", "a"], "StartInterval": 5}, "cannot be less than 1ms"), ({"Test": ["CMD", "a"], "Retries": -1}, "negative"), ({"Test": [1]}, "Test")])
    def test_a_health_check_that_cannot_be(self, furnished, scripted, check, message):
        answer = ask(furnished, "POST", "/containers/create", {"Image": BASE, "Cmd": ["a"], "Healthcheck": check})
        assert answer.status == 400 and message in answer.message and not scripted.calls("create")

    @pytest.mark.parametrize("size, label", [(1, True), (5000, False)])
    def test_a_health_check_is_kept_word_by_word(self, furnished, scripted, fake, size, label):
        """One that is too long for a label of nerdctl's is in the request only."""
        def refuse():
            if len(bytes(fake.asked["Containers/Update"][1])) > 4096:
                raise nerdctld.GrpcError(3, "label key and value length (5120 bytes) greater than maximum size (4096 bytes)")

        fake.before["Containers/Update"] = refuse
        scripted.on("create", stdout="9" * 64 + "\n", does=lambda words: fake.create("9" * 64, dict(
            each.partition("=")[2].split("=", 1) for each in words if each.startswith("--label="))))
        check = {"Test": ["CMD", "a", "b" * size], "StartInterval": 10**9}
        assert ask(furnished, "POST", "/containers/create", {"Image": BASE, "Cmd": ["a"], "Healthcheck": check}).status == 201
        assert furnished.inventory.container("9" * 64).health_check == check
        labels = fake.containers["9" * 64].labels
        assert json.loads(labels["nerdctl/healthcheck"]) == check if label else "nerdctl/healthcheck" not in labels

    @pytest.mark.parametrize("body, words", [
        (host(NetworkMode="one"), ["--network=one"]), (host(NetworkMode="1" * 64), ["--network=one"]), (host(NetworkMode="default"), []), (host(NetworkMode="none"), ["--network=none"]),
        (host(NetworkMode="container:other"), ["--network=none"]), ({"NetworkDisabled": True}, ["--network=none"]),
        ({**host(NetworkMode="one"), "NetworkingConfig": {"EndpointsConfig": {"one": {}, "two": {}}}}, ["--network=one", "--network=two"]),
        ({"NetworkingConfig": {"EndpointsConfig": {"two": {"IPAMConfig": {"IPv4Address": "1.2.3.4", "IPv6Address": "::1"}, "MacAddress": "02:00:00:00:00:01"}}}},
         ["--network=two", "--ip=1.2.3.4", "--ip6=::1", "--mac-address=02:00:00:00:00:01"]),
        ({"NetworkingConfig": {"EndpointsConfig": {"default": {}}}, "MacAddress": "02:00:00:00:00:02"}, ["--mac-address=02:00:00:00:00:02"])])
    def test_networks(self, body, words):
        assert words_of(body) == words

    @pytest.mark.parametrize("hostname, labels, aliases, wanted", [
        ("", {"com.docker.compose.service": "db"}, ["x-db-1", "db"], ["--hostname=db"]), ("", {}, ["first", "second"], ["--hostname=first"]),
        ("mine", {}, ["first"], ["--hostname=mine"]), ("", {}, ["under_score"], []), ("", {}, [], [])])
    def test_hostname_from_aliases(self, hostname, labels, aliases, wanted):
        body = {"Hostname": hostname, "Labels": labels, "NetworkingConfig": {"EndpointsConfig": {"one": {"Aliases": aliases}}}}
        assert [each for each in words_of(body) if each.startswith("--hostname")] == wanted

    def test_no_hostname_in_the_network_of_the_host(self):
        assert words_of({**host(NetworkMode="host"), "NetworkingConfig": {"EndpointsConfig": {"host": {"Aliases": ["a"]}}}}) == ["--network=host"]

    @pytest.mark.parametrize("entrypoint, command, image, words", [
        (None, ["a"], {"Entrypoint": ["e"]}, ([], ["a"])), (["e", "f"], ["a"], {}, (["--entrypoint=e", "--entrypoint=f"], ["a"])),
        ([""], None, {"Cmd": ["c"]}, (["--entrypoint="], ["c"])), ([], ["a"], {}, ([], ["a"])), ("one two", [], {}, (["--entrypoint=one two"], []))])
    def test_command(self, entrypoint, command, image, words):
        assert nerdctld.command_words({"Entrypoint": entrypoint, "Cmd": command}, image) == words

    @pytest.mark.parametrize("body, message", [
        ({"Image": ""}, "invalid reference format"), ({"Image": 5}, "Image"), ({"Cmd": 5}, "Cmd"), ({"Labels": []}, "Labels"),
        ({"Tty": "yes"}, "Tty"), ({"HostConfig": []}, "HostConfig"), (host(Memory="1g"), "Memory"), (host(Memory=True), "Memory"), (host(Binds=["relative"]), "must be absolute"), (host(Binds=["/a:b"]), "must be absolute"),
        (host(Binds=["/a:/b:ro:x"]), "invalid volume specification"), (host(Mounts=[{"Type": "bind", "Target": "/t"}]), "Source must not be empty"),
        (host(Mounts=[{"Type": "bind", "Source": "/no/such", "Target": "/t"}]), "bind source path does not exist: /no/such"),
        (host(Mounts=[{"Type": "odd", "Target": "/t"}]), "mount type unknown"), (host(Mounts=[{"Type": "volume"}]), "Target must not be empty"), (host(Mounts=[{"Target": "t"}]), "must be absolute"),
        (host(PortBindings={"x": []}), "invalid port"), (host(PortBindings={"80": [{"HostPort": "1,2"}]}), "invalid port"), (host(PortBindings={"80": [{"HostIp": "a b"}]}), "invalid port"),
        (host(PortBindings={"80/icmp": []}), "invalid port"), (host(RestartPolicy={"Name": "sometimes"}), "unknown policy 'sometimes'"),
        (host(RestartPolicy={"Name": "always", "MaximumRetryCount": 1}), "maximum retry count can only be used with 'on-failure'"),
        (host(RestartPolicy={"Name": "always"}, AutoRemove=True), "can't create 'AutoRemove' container with restart policy"),
        (host(Ulimits=[{"Name": "nofile", "Soft": 2, "Hard": 1}]), "soft limit must be less"), (host(LogConfig={"Type": "splunk"}), "no log driver named 'splunk'"),
        (host(NetworkMode="nosuch"), "network nosuch not found"), ({"Labels": {"nerdctl/x": "y"}}, "nerdctl's own"),
        ({"Volumes": {"v": {}}}, "absolute"),
        ({"Env": ["A=\0"]}, "NUL")])
    def test_refused(self, furnished, scripted, body, message):
        scripted.on("create", stdout="9" * 64 + "\n")
        answer = ask(furnished, "POST", "/containers/create", {**BODY, **body})
        assert answer.status == 400 and message in answer.message
        assert not scripted.calls("create")

    @pytest.mark.parametrize("body", [host(Mounts=[{"Type": "image", "Source": "x", "Target": "/t"}]), host(Mounts=[{"Type": "volume", "Source": "v", "Target": "/t", "VolumeOptions": {"Subpath": "s"}}])])
    def test_beyond_nerdctl(self, furnished, body):
        assert ask(furnished, "POST", "/containers/create", {**BODY, **body}).status == 501

    def test_create(self, furnished, scripted, fake):
        creates(scripted, fake, "9" * 64)
        answer = ask(furnished, "POST", "/containers/create?name=/new&Image=ignored&Cmd=sh&Cmd=-c", {**BODY, "Labels": {"a": "b"}, "Env": []})
        assert (answer.status, answer.json) == (201, {"Id": "9" * 64, "Warnings": []})
        request = {"Image": BASE, "Cmd": ["true"], "Labels": {"a": "b"}, "Env": []}
        words = scripted.argv("create")
        kept = [each for each in words if each.startswith("--label=nerdctld/request.0=")]
        assert json.loads(kept[0].partition("=")[2].partition("=")[2]) == request
        assert words == ["create", "--pull=never", "--name=new", "--network=bridge", "--label=a=b", *kept, "--", BASE, "true"]

    def test_words_of_a_user_are_no_flags(self, furnished, scripted, fake):
        creates(scripted, fake, "9" * 64)
        assert ask(furnished, "POST", "/containers/create", {"Image": BASE, "Cmd": ["--rm", "-x"]}).status == 201
        words = scripted.argv("create")
        assert words[words.index("--"):] == ["--", BASE, "--rm", "-x"]

    def test_platform(self, furnished, scripted, fake):
        creates(scripted, fake, "9" * 64)
        assert ask(furnished, "POST", "/containers/create?platform=linux/amd64", BODY).status == 201
        assert "--platform=linux/amd64" in scripted.argv("create")
        assert ask(furnished, "POST", "/containers/create?platform=linux/arm64", BODY).status == 404

    @pytest.mark.parametrize("target, body, status, message", [
        ("", {"Image": "nosuch:1"}, 404, "No such image: nosuch:1"), ("", {"Image": "nosuch"}, 404, "No such image: nosuch:latest"),
        ("?name=tstweb", BODY, 409, 'The container name "/tstweb" is already in use by container "' + ID), ("?name=a b", BODY, 400, "Invalid container name (a b)"),
        ("?name=-x", BODY, 400, "Invalid container name"), ("?name=a", BODY, 400, "Invalid container name"), ("", {}, 400, "config cannot be empty"), ("", [], 400, ""), ("", b"{", 400, ""), ("", b"", 400, "")])
    def test_answers(self, furnished, target, body, status, message):
        answer = ask(furnished, "POST", "/containers/create" + target, body)
        assert answer.status == status and message in answer.message

    def test_no_command(self, furnished, fake):
        config = json.loads(fake.content[BB_CONFIG])
        config["config"]["Cmd"] = None
        fake.content[BB_CONFIG] = json.dumps(config).encode()
        answer = ask(furnished, "POST", "/containers/create", {"Image": BASE})
        assert (answer.status, answer.message) == (400, "no command specified")

    @pytest.mark.parametrize("message, status", [("bind for :80 failed: port is already allocated", 500), ('name "x" is already used by ID "y"', 409), ('image not available: "x"', 404),
                                                 ("unknown flag: --odd", 400)])
    def test_nerdctl_refuses(self, furnished, scripted, message, status):
        scripted.on("create", stderr=fatal(message), status=1)
        assert ask(furnished, "POST", "/containers/create", BODY).status == status

    @pytest.mark.parametrize("body, words", [
        (host(DeviceCgroupRules=["a"]), "DeviceCgroupRules is not carried out"), (host(StorageOpt={"size": "1"}), "StorageOpt"), (host(LogConfig={"Type": "local"}), "json-file is used"),
        ({"NetworkingConfig": {"EndpointsConfig": {"one": {"DriverOpts": {"com.docker.network.endpoint.ifname": "x0"}}}}}, "endpoint.ifname of network one is not carried out"),
        ({"NetworkingConfig": {"EndpointsConfig": {"one": {"IPAMConfig": {"IPv4Address": "1.2.3.4"}}, "two": {}}}}, "several networks")])
    def test_warnings(self, body, words):
        found, = nerdctld.create_warnings(body, {})
        assert words in found

    def test_names_that_are_given_are_no_warning(self):
        assert nerdctld.create_warnings({"HostConfig": {"Links": ["a:b"]}, "NetworkingConfig": {"EndpointsConfig": {"one": {"Aliases": ["first", "second"]}}}}, {}) == []

    @pytest.mark.parametrize("body", [{"ExposedPorts": ["80/tcp"]}, {"ExposedPorts": {"\u00b2/tcp": {}}}, {"ExposedPorts": {"80/icmp": {}}}, host(Links=[1]), host(Links=["/"]),
                                      {"NetworkingConfig": {"EndpointsConfig": {"tstnet": {"Links": [1]}}}}, {**host(NetworkMode="host"), "NetworkingConfig": {"EndpointsConfig": {"host": {"Aliases": [1]}}}},
                                      {"Hostname": "h", "NetworkingConfig": {"EndpointsConfig": {"tstnet": {"Aliases": [1]}}}}, host(SecurityOpt=["seccomp=/etc/passwd"])], ids=str)
    def test_nothing_is_made_of_a_bad_request(self, furnished, scripted, body):
        scripted.on("create", stdout=ID + "\n")
        assert ask(furnished, "POST", "/containers/create", {**BODY, **body}).status == 400 and not scripted.calls("create")

    def test_names_in_what_is_kept_of_a_request(self, furnished):
        network = ask(furnished, "GET", "/networks/tstnet").json["Id"]
        body = nerdctld.Fields({"Image": BASE, "hostConfig": {"NetworkMode": "container:tstweb"}, "NetworkingConfig": {"EndpointsConfig": {network: {"Aliases": ["db"]}}}})
        kept = nerdctld.kept_request(furnished, body, {})
        assert kept["HostConfig"]["NetworkMode"] == f"container:{ID}" and list(kept["NetworkingConfig"]["EndpointsConfig"]) == ["tstnet"]

    def test_hidden_labels(self):
        labels = {"a": "b", "nerdctl/x": "1", **nerdctld.request_labels({"Image": "x"}), nerdctld.LABEL_LATER: "1", "containerd.io/restart.policy": "no"}
        assert container_of(labels).visible_labels == {"a": "b"}


###############################################################################
# Process streams
###############################################################################


def pair():
    """A hijacked connection, and the client's end of it."""
    near, far = socket.socketpair()
    far.settimeout(10)
    return nerdctld.Connection(near), far


def drain(sock):
    """All that comes on a socket to its end."""
    parts = []
    while True:
        try:
            part = sock.recv(65536)
        except ConnectionResetError:
            # Closed with something unread.
            part = b""
        if not part:
            return b"".join(parts)
        parts.append(part)


def unframe(data):
    """Frames taken apart: (kind, bytes), those of one kind in a row joined."""
    found = []
    while data:
        kind, size = data[0], int.from_bytes(data[4:8], "big")
        assert data[1:4] == bytes(3) and len(data) >= 8 + size
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + data[8:8 + size])
        else:
            found.append((kind, data[8:8 + size]))
        data = data[8 + size:]
    return found


class Shim:
    """ProcessStreams of a process that is not there, and what its shim does at the other ends of the FIFOs."""

    def __init__(self, folder, stdin=True, terminal=False, once=False, attachments=(), on_end=lambda: None, **options):
        self.kept, self.closings = [], []
        self.streams = nerdctld.ProcessStreams(str(folder), stdin, terminal, once, attachments, lambda kind, data: self.kept.append((kind, data)),
                                               lambda: self.closings.append(True), on_end, **options)
        paths = self.streams.paths
        self.files = {kind: open(path, "wb", buffering=0) for kind, path in ((1, paths.stdout), (2, paths.stderr)) if path}
        self.stdin = open(os.open(paths.stdin, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) if paths.stdin else None
        # Small ones are full sooner.
        for each in [*self.files.values(), *([self.stdin] if self.stdin else [])]:
            fcntl.fcntl(each, 1031, 65536)

    def write(self, kind, data):
        """Write some output, and wait until it is passed on."""
        self.files[kind].write(data)
        assert until(lambda: (kind, data) in self.kept)

    def fill(self):
        """Write to stdout until nobody takes more; how many bytes."""
        number, size, tries = self.files[1].fileno(), 0, 0
        os.set_blocking(number, False)
        while tries < 5:
            try:
                size, tries = size + os.write(number, b"x" * 65536), 0
            except BlockingIOError:
                tries += 1
                time.sleep(0.002)
        return size

    def end(self):
        """It ends, and with it its output."""
        for each in self.files.values():
            each.close()
        assert self.streams.ended.wait(10)

    def close(self):
        """Leave nothing behind."""
        self.streams.LINGER = 0
        for each in self.streams.attachments:
            each.leave()
        self.streams.abandon()
        self.end()
        if self.stdin:
            self.stdin.close()


def descriptors():
    """The descriptors of this process, and what they are open for."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink("/proc/self/fd/" + name)
    return found


def threads(name):
    """The threads of this name."""
    return [each for each in threading.enumerate() if each.name == name]


class TestProcessStreams:
    @pytest.fixture
    def clients(self):
        """Makes clients: the attachment and the client's end of its connection."""
        socks = []

        def client(connected=True, wanted=(True, True), framed=True, stdin=False):
            connection, far = pair()
            socks.extend((connection.sock, far))
            attachment = nerdctld.Attachment(*wanted, framed, stdin)
            if connected:
                attachment.connect(connection)
            attachment.near = connection
            return attachment, far
        yield client
        for each in socks:
            each.close()

    @pytest.fixture
    def shims(self, clients, tmp_path):
        """Makes shims; at the end there is no descriptor, no folder and no thread of theirs any more."""
        made, before, folder = [], descriptors(), tmp_path / "streams"
        folder.mkdir()

        def shim(*words, **options):
            made.append(Shim(options.pop("folder", folder), *words, **options))
            return made[-1]
        yield shim
        for each in made:
            each.close()
        assert until(lambda: not threads("streams")) == True
        assert not list(folder.iterdir()) and not [each for number, each in descriptors().items() if before.get(number) != each and str(tmp_path) in each]

    def told(self, attachment, far):
        """What a client has been sent, after the end: (kind, bytes)."""
        assert attachment.done.wait(10)
        attachment.drain()
        attachment.near.sock.shutdown(socket.SHUT_RDWR)
        return unframe(drain(far)) if attachment.framed else drain(far)

    @pytest.mark.parametrize("keys, data, passed, detached", [
        ("", b"ab\x10\x11cd", b"ab", True), ("", b"\x10x", b"\x10x", False), ("", b"\x10\x10\x11", b"\x10", True), ("ctrl-a,b", b"x\x01bz", b"x", True),
        ("q", b"aq", b"a", True), ("ctrl-@,ctrl-[", b"\0\x1b", b"", True), ("a,b", b"aXab", b"aX", True)])
    def test_detach_keys(self, keys, data, passed, detached):
        for size in (1, 2, len(data)):
            found, out, done = nerdctld.DetachKeys(keys), b"", False
            for start in range(0, len(data), size):
                if not done:
                    part, done = found.feed(data[start:start + size])
                    out += part
            assert (out, done) == (passed, detached)

    @pytest.mark.parametrize("keys", ["ctrl-1", "ctrl-", "ab", "a,,b", "ctrl-A"])
    def test_no_detach_keys(self, keys):
        with pytest.raises(nerdctld.BadParameter, match="invalid detach keys"):
            nerdctld.DetachKeys(keys)

    def test_output_waits_for_its_connection(self, clients):
        attachment, far = clients(connected=False)
        attachment.put(1, b"out")
        attachment.put(2, b"err")
        attachment.put(2, b"")
        assert attachment.size == 6 and not attachment.full
        attachment.connect(attachment.near)
        attachment.put(1, b"more")
        attachment.finish()
        assert self.told(attachment, far) == [(1, b"out"), (2, b"err"), (1, b"more")] and attachment.size == 0

    @pytest.mark.parametrize("wanted, framed, told", [((True, False), True, [(1, b"out")]), ((False, True), True, [(2, b"err")]), ((True, True), False, b"outerr")])
    def test_a_client_is_sent_what_it_wants(self, clients, wanted, framed, told):
        attachment, far = clients(wanted=wanted, framed=framed)
        attachment.put(1, b"out")
        attachment.put(2, b"err")
        attachment.finish()
        assert self.told(attachment, far) == told

    def test_a_client_that_is_gone_takes_nothing(self, clients):
        attachment, far = clients()
        far.close()
        attachment.put(1, b"x")
        assert attachment.gone and attachment.done.is_set()
        attachment.size, attachment.MOST = 2, 1
        assert not attachment.full
        attachment.put(1, b"x")
        attachment.drain()
        assert attachment.size == 2

    def test_output_in_its_order_to_its_end(self, shims, clients):
        (first, far), order = clients(), []
        shim = shims(attachments=[first], on_end=lambda: order.append(first.done.is_set()))
        for kind, data in ((1, b"a"), (2, b"b"), (1, b"c"), (2, b"d\xff")):
            shim.write(kind, data)
        assert not shim.streams.ended.is_set()
        shim.files[2].close()
        shim.write(1, b"e")
        shim.end()
        assert self.told(first, far) == shim.kept == [(1, b"a"), (2, b"b"), (1, b"c"), (2, b"d\xff"), (1, b"e")]
        assert order == [False] and first.streams is shim.streams

    def test_a_terminal_has_one_output(self, shims, clients):
        first, far = clients(framed=False)
        shim = shims(terminal=True, stdin=False, attachments=[first])
        assert (shim.streams.paths.stdin, shim.streams.paths.stderr, shim.streams.paths.terminal) == ("", "", True)
        assert sorted(os.listdir(shim.streams.folder)) == ["stdout"] and os.stat(shim.streams.paths.stdout).st_mode & 0o777 == 0o600
        shim.write(1, b"x")
        shim.end()
        assert self.told(first, far) == b"x"

    def test_output_that_others_hold_open(self, shims, clients):
        first, far = clients()
        shim = shims(attachments=[first])
        shim.streams.LINGER = 0.05
        shim.streams.exited()
        shim.write(1, b"late")
        assert not shim.streams.ended.is_set() and shim.streams.ended.wait(5)
        assert self.told(first, far) == [(1, b"late")]

    def test_an_end_that_is_told_when_nobody_is_there(self, shims):
        shim = shims()
        shim.end()
        shim.streams.exited()
        shim.streams.wake()
        assert not os.path.exists(shim.streams.folder)

    @pytest.mark.parametrize("leaves", [False, True])
    def test_a_client_that_does_not_read(self, shims, clients, monkeypatch, leaves):
        """The process has to wait for it, after as much as is kept for it. The others have all of what was written; nor does the end hurry it."""
        monkeypatch.setattr(nerdctld.Attachment, "MOST", 1 << 16)
        (slow, far), (quick, other), data = clients(framed=False), clients(framed=False), []
        shim = shims(stdin=False, terminal=True, attachments=[slow, quick])
        reader = threading.Thread(target=lambda: data.append(drain(other)))
        reader.start()
        written = shim.fill()
        assert slow.full and (1 << 16) < slow.size <= (1 << 16) + nerdctld.BLOCK
        # What is not passed on is in the FIFO.
        passed = sum(len(each) for _, each in shim.kept)
        assert passed < written <= passed + (1 << 16) and not quick.size
        shim.streams.LINGER = 0
        shim.streams.exited()
        assert not shim.streams.ended.wait(0.02)
        shim.files[1].close()
        if leaves:
            # Not the socket tells it, which the client still has.
            slow.leave()
        else:
            more = threading.Thread(target=lambda: data.append(drain(far)))
            more.start()
        shim.end()
        assert sum(len(each) for _, each in shim.kept) == written
        for each in (quick, slow):
            each.drain()
            each.near.sock.shutdown(socket.SHUT_RDWR)
        reader.join(10)
        if not leaves:
            more.join(10)
        assert [len(each) for each in data] == [written] * len(data) and len(data) == 2 - leaves

    def test_a_client_that_closes_releases_the_others(self, shims, clients, monkeypatch):
        monkeypatch.setattr(nerdctld.Attachment, "MOST", 0)
        slow, far = clients(framed=False)
        shim = shims(stdin=False, attachments=[slow])
        shim.fill()
        far.close()
        until(lambda: slow.gone)
        shim.files[1].close()
        shim.end()
        assert slow not in shim.streams.attachments

    def test_clients_come_later(self, shims, clients):
        (first, far), (late, other), (last, _) = clients(), clients(), clients()
        shim = shims(attachments=[first])
        shim.write(1, b"a")
        assert shim.streams.join(late) and shim.streams.join(first) and late.ready.is_set() and late.streams is shim.streams
        shim.write(1, b"b")
        shim.end()
        assert self.told(first, far) == [(1, b"ab")] and self.told(late, other) == [(1, b"b")]
        assert not shim.streams.join(last) and not last.ready.is_set()

    def test_a_log_that_fails(self, shims, clients, capfd):
        first, far = clients()
        shim = shims(attachments=[first], on_end=lambda: 1 / 0)
        shim.streams.keep = None
        shim.files[1].write(b"x")
        assert first.done.wait(5) and shim.streams.ended.is_set()
        assert "TypeError" in capfd.readouterr().err

    def test_fifos_of_another_daemon(self, shims, clients, tmp_path):
        folder = tmp_path / "another"
        folder.mkdir()
        theirs, numbers = fifo_streams(folder)
        first, far = clients()
        # What was written while nobody was there, and its reader goes.
        writer = os.open(theirs.stdout, os.O_WRONLY)
        os.write(writer, b"before ")
        shim = shims(found=theirs, attachments=[first])
        for each in (writer, *numbers):
            os.close(each)
        assert shim.streams.paths == theirs
        shim.streams.begin()
        shim.files[1].write(b"after")
        assert shim.streams.write(b"in", first) and shim.stdin.read(10) == b"in"
        shim.end()
        assert self.told(first, far) == [(1, b"before after")] and not list(folder.iterdir())

    def test_the_folder_of_a_daemon_that_lives(self, shims):
        shim = shims()
        assert not nerdctld.lock_is_free(shim.streams.folder, fcntl.LOCK_EX)
        before = descriptors()
        with pytest.raises(nerdctld.ApiError, match="cannot open FIFOs"):
            shims(found=shim.streams.paths)
        assert sorted(os.listdir(shim.streams.folder)) == ["stderr", "stdin", "stdout"] and descriptors() == before

    @pytest.mark.parametrize("call", ["mkdtemp", "mkfifo", "pipe"])
    def test_no_fifos_can_be_made(self, tmp_path, monkeypatch, call):
        def fail(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(nerdctld.tempfile if call == "mkdtemp" else nerdctld.os, call, fail)
        with pytest.raises(nerdctld.ApiError, match="cannot open FIFOs for the streams of a process: .*No space left"):
            Shim(tmp_path)
        assert not [each for each in tmp_path.iterdir() if each.name.startswith("nerdctld-")] and not [each for each in descriptors().values() if str(tmp_path) in each]

    def test_streams_are_adopted(self, engine, fake, tmp_path, shims):
        state = tmp_path / "state"
        state.mkdir()
        folders = [state / ("nerdctld-" + name) for name in ("mine", "left", "other")]
        for each in folders:
            each.mkdir()
        for name in ("stdin", "stdout", "stderr"):
            os.mkfifo(folders[0] / name)
        fake.create(ID, {"nerdctl/name": "x", "nerdctl/state-dir": str(state), **nerdctld.request_labels({"OpenStdin": True})})
        fake.start(ID)
        fake.tasks[ID] = fake.tasks[ID]._replace(stdout=str(folders[0] / "stdout"))
        # The shim has them open.
        ends = [os.open(folders[0] / name, os.O_RDWR | os.O_NONBLOCK) for name in ("stdin", "stdout", "stderr")]
        os.write(ends[1], b"one\n")
        lives = os.open(folders[2], os.O_RDONLY)
        fcntl.flock(lives, fcntl.LOCK_EX)
        nerdctld.sweep_streams(engine, engine.inventory.container("x"))
        assert [each.exists() for each in folders] == [True, False, True] and engine.owner(ID).streams is None
        streams = nerdctld.find_streams(engine, engine.inventory.container("x"))
        assert streams is engine.owner(ID).streams is nerdctld.find_streams(engine, engine.inventory.container("x"))
        assert streams.started.is_set() and streams.write(b"in", nerdctld.Attachment(True, True, True)) and os.read(ends[0], 10) == b"in"
        for each in (*ends, lives):
            os.close(each)
        assert streams.ended.wait(5) and until(lambda: engine.owner(ID).streams is None) and not folders[0].exists()
        assert json.loads((state / f"{ID}-json.log").read_text())["log"] == "one\n"

    def test_input_before_the_start(self, shims, clients):
        first, far = clients(stdin=True)
        shim = shims(once=True, attachments=[first])
        far.sendall(b"early")
        far.shutdown(socket.SHUT_WR)
        pump = threading.Thread(target=nerdctld.pump_stdin, args=(first, shim.streams, None))
        pump.start()
        assert until(lambda: shim.stdin.read(10)) == b"early"
        # Its end has to wait: there is no process yet that could be told.
        pump.join(0.02)
        assert pump.is_alive() and shim.stdin.read(10) is None and not shim.closings
        shim.streams.begin()
        pump.join(10)
        assert shim.stdin.read(10) == b"" and shim.closings == [True]
        shim.streams.close_stdin()
        assert shim.closings == [True] and not shim.streams.write(b"x", nerdctld.Attachment(True, True, True))

    def test_input_of_one_client_after_the_other(self, shims, clients):
        shim = shims()
        shim.streams.begin()
        for text in (b"one", b"two"):
            each, far = clients(stdin=True)
            assert shim.streams.join(each)
            far.sendall(text)
            far.shutdown(socket.SHUT_WR)
            assert nerdctld.pump_stdin(each, shim.streams, None) is False
            assert shim.stdin.read(10) == text and shim.stdin.read(10) is None
        assert not shim.closings

    @pytest.mark.parametrize("end", ["exited", "leave"])
    def test_input_that_nobody_takes(self, shims, clients, end):
        """It waits for the process to read, to its end or the client's, which with `once` is the end of the input, too."""
        first, far = clients(stdin=True)
        shim = shims(once=True, attachments=[first])
        shim.streams.begin()
        with contextlib.suppress(BlockingIOError):
            far.setblocking(False)
            while True:
                far.send(b"x" * 65536)
        pump = threading.Thread(target=nerdctld.pump_stdin, args=(first, shim.streams, None))
        pump.start()
        size = len(until(lambda: shim.stdin.read(65536)))
        pump.join(0.01)
        assert pump.is_alive() and size > 4096
        getattr(shim.streams if end == "exited" else first, end)()
        pump.join(10)
        assert not pump.is_alive() and shim.closings == [True]

    def test_keys_in_the_input(self, shims, clients):
        first, far = clients(stdin=True)
        shim = shims(once=True)
        shim.streams.begin()
        far.sendall(b"ab\x10\x11cd")
        assert nerdctld.pump_stdin(first, shim.streams, nerdctld.DetachKeys("")) is True
        assert shim.stdin.read(10) == b"ab" and not shim.closings
        # A part of them is no input, as with dockerd.
        far.sendall(b"\x10")
        far.shutdown(socket.SHUT_WR)
        assert nerdctld.pump_stdin(first, shim.streams, nerdctld.DetachKeys("")) is False and shim.closings == [True]

    def rows(self, path):
        """What a log has, as (stream, text)."""
        return [(each["stream"], each["log"]) for each in map(json.loads, path.read_bytes().splitlines())]

    def test_log_in_lines(self, tmp_path):
        path = tmp_path / "log"
        keep = nerdctld.JsonLog(str(path))
        for kind, data in ((1, b"one\ntwo\nthr"), (2, b'"q"\t\\\n'), (1, b"ee\n"), (1, b"\n"), (1, b"\x1b[0m\0\x7f"), (1, b"")):
            keep(kind, data)
        keep.close()
        assert self.rows(path) == [("stdout", "one\n"), ("stdout", "two\n"), ("stdout", "thr"), ("stderr", '"q"\t\\\n'), ("stdout", "ee\n"), ("stdout", "\n"), ("stdout", "\x1b[0m\0\x7f")]
        stamp = nerdctld.nanoseconds_of(json.loads(path.read_text().splitlines()[0])["time"])
        assert abs(stamp - time.time_ns()) < 60 * 10**9
        file = nerdctld.LogFile(str(path)).open()
        assert b"".join(each.text for each in file.lines() if each.kind == 1) == b"one\ntwo\nthree\n\n\x1b[0m\0\x7f"
        file.close()

    def test_characters_of_a_log(self, tmp_path):
        path, text = tmp_path / "log", "é😀\u2028".encode()
        keep = nerdctld.JsonLog(str(path))
        for number in range(len(text)):
            keep(1, text[number:number + 1])
            keep(2, b".")
        keep(1, b"a\xff\xfeb\xf0")
        # The rest of a character that was cut off comes at the end.
        assert self.rows(path)[-1] == ("stdout", "a\ufffd\ufffdb")
        keep.close()
        assert "".join(text for stream, text in self.rows(path) if stream == "stdout") == "é😀\u2028a\ufffd\ufffdb\ufffd"

    @pytest.mark.parametrize("files, kept", [(1, [["d\n"]]), (2, [["d\n"], ["c\n"]]), (3, [["d\n"], ["c\n"], ["b\n"]])])
    def test_log_that_rotates(self, tmp_path, files, kept):
        path = tmp_path / "log"
        keep = nerdctld.JsonLog(str(path), 100, files)
        file = nerdctld.LogFile(str(path)).open()
        read = []
        for text in (b"a\n", b"b\n", b"c\n", b"d\n"):
            keep(1, text)
            read += [each.text for each in [*file.lines(), *file.lines()] if each.text]
        keep.close()
        file.close()
        names = sorted(each.name for each in tmp_path.iterdir() if each.name.startswith("log") and each.name != "logger-lock")
        assert [[text for _, text in self.rows(tmp_path / name)] for name in names] == kept and read == [b"a\n", b"b\n", b"c\n", b"d\n"]

    def test_log_without_a_limit(self, tmp_path):
        path = tmp_path / "log"
        path.write_text("before\n")
        keep = nerdctld.JsonLog(str(path))
        for _ in range(100):
            keep(1, b"x" * 1000)
        keep.close()
        assert len(path.read_text().splitlines()) == 101

    def test_lock_of_a_log(self, tmp_path):
        container = container_of({"nerdctl/state-dir": str(tmp_path)})
        assert nerdctld.log_is_complete(container)
        keep = nerdctld.JsonLog(str(tmp_path / "log"))
        assert not nerdctld.log_is_complete(container)
        # Its logging program may still be at it: then the lock is left with that.
        other = nerdctld.JsonLog(str(tmp_path / "log"))
        keep.close()
        assert nerdctld.log_is_complete(container)
        other.close()

    def test_full_disk(self, tmp_path, capfd):
        (tmp_path / "log").symlink_to("/dev/full")
        keep = nerdctld.JsonLog(str(tmp_path / "log"))
        keep(1, b"x\n")
        keep(1, b"\xc3")
        keep.close()
        assert capfd.readouterr().err.count("No space left on device") >= 2

    def test_log_whose_folder_is_gone(self, tmp_path, capfd):
        folder = tmp_path / "state"
        folder.mkdir()
        keep = nerdctld.JsonLog(str(folder / "log"), 10)
        keep(1, b"x\n")
        shutil.rmtree(folder)
        for _ in range(2):
            keep(1, b"y\n")
        keep.close()
        assert capfd.readouterr().err.count("No such file or directory") == 2

    @pytest.mark.parametrize("options, kept", [({}, 9), ({"max-size": "150"}, 1), ({"max-size": "1k", "max-file": "3"}, 9), ({"max-size": "150", "max-file": "x"}, 1)])
    def test_log_of_a_container(self, engine, tmp_path, options, kept):
        (tmp_path / "log-config.json").write_text(json.dumps({"driver": "json-file", "opts": options}))
        keep = nerdctld.open_log(engine.nerdctl, container_of({"nerdctl/state-dir": str(tmp_path)}))
        for _ in range(9):
            keep(1, b"a line of some length, " * 3)
        keep.close()
        assert len((tmp_path / f"{ID}-json.log").read_text().splitlines()) == kept or options.get("max-file") == "3"
        assert (tmp_path / f"{ID}-json.log.1").exists() == (options.get("max-file") == "3")

    def test_no_log(self, engine, tmp_path):
        keep = nerdctld.open_log(engine.nerdctl, container_of({"nerdctl/state-dir": str(tmp_path), "nerdctl/log-config": '{"driver":"none"}'}))
        keep(1, b"x")
        keep.close()
        assert not [each for each in tmp_path.iterdir() if each.name.startswith(ID)]

    def test_logging_program(self, tmp_path):
        program = tmp_path / "logger"
        program.write_text(f'#!/bin/sh\nexec 5>&-\ncd {tmp_path}\necho "$*" $CONTAINER_ID $CONTAINER_NAMESPACE >told\n'
                           "read a <&3; read b <&4; echo $a >>told; echo $b >>told; cat <&3 >out; cat <&4 >err; exec mv told done\n")
        program.chmod(0o755)
        labels = {"nerdctl/state-dir": str(tmp_path), "nerdctl/log-config": '{"driver":"other"}', "nerdctl/log-uri": f"binary://{program}?--a=b&c="}
        before = descriptors()
        keep = nerdctld.open_log(nerdctld.Nerdctl(["nerdctl"], "space"), container_of(labels))
        keep(1, b"first\n")
        keep(2, b"second\n")
        keep(1, b"x" * 100000)
        keep(2, b"y")
        keep.close()
        assert until((tmp_path / "done").exists) and (tmp_path / "done").read_text() == f"--a b c {ID} space\nfirst\nsecond\n"
        assert (tmp_path / "out").read_bytes() == b"x" * 100000 and (tmp_path / "err").read_bytes() == b"y"
        assert until(lambda: not threads("logger")) == True and not set(descriptors()) - set(before)

    def test_logging_program_that_is_not_there_or_ends(self, tmp_path):
        before = descriptors()
        with pytest.raises(nerdctld.ApiError, match="failed to initialize logging driver: /nosuch: No such file"):
            nerdctld.Nerdctl(["nerdctl"]).start_logger("binary:///nosuch", ID)
        assert not set(descriptors()) - set(before)
        keep = nerdctld.Nerdctl(["nerdctl"]).start_logger("binary:///bin/true", ID)
        assert until(lambda: os.waitid(os.P_PID, keep.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG))
        keep(1, b"x" * 100000)
        keep.close()

    def log_line(self, text, second=0, stream="stdout"):
        return json.dumps({"log": text, "stream": stream, "time": f"2026-11-24T00:00:{second:02d}.5Z"}) + "\n"

    def texts(self, file):
        return [each.text for each in file.lines() if each.text]

    def test_log_that_is_written(self, tmp_path):
        path = tmp_path / "log"
        file = nerdctld.LogFile(str(path))
        assert file.lines() == []
        line = self.log_line("é\n", 7, "stderr")
        path.write_text(line + line[:20])
        assert file.lines() == [nerdctld.LogLine("2026-11-24T00:00:07.5Z", nerdctld.STDERR, "é\n".encode())]
        assert self.texts(file) == []
        with open(path, "a") as more:
            more.write(line[20:] + "no json\n" + self.log_line("b\n") + "1,2\n[\n" + '{"log":1}\n' + self.log_line("c\n"))
        assert self.texts(file) == ["é\n".encode(), b"b\n", b"c\n"]
        file.close()

    def test_log_that_is_rotated(self, tmp_path):
        path = tmp_path / "log"
        path.write_text(self.log_line("1\n"))
        file = nerdctld.LogFile(str(path)).open()
        assert self.texts(file) == [b"1\n"]
        with open(path, "a") as more:
            more.write(self.log_line("2\n"))
        path.rename(tmp_path / "log.1")
        path.write_text(self.log_line("3\n"))
        assert self.texts(file) + self.texts(file) == [b"2\n", b"3\n"]
        path.write_text("")
        assert self.texts(file) == []
        path.write_text(self.log_line("4\n"))
        assert self.texts(file) == [b"4\n"]
        file.close()

    def test_log_that_grows_while_it_is_put_aside(self, tmp_path, monkeypatch):
        path = tmp_path / "log"
        path.write_text(self.log_line("1\n"))
        file = nerdctld.LogFile(str(path)).open()
        self.texts(file)
        stat_of, put_aside = os.stat, []

        def late(name, *more, **options):
            if not put_aside:
                put_aside.append(name)
                with open(path, "a") as last:
                    last.write(self.log_line("2\n"))
                path.rename(tmp_path / "log.1")
                path.write_text(self.log_line("3\n"))
            return stat_of(name, *more, **options)

        monkeypatch.setattr(nerdctld.os, "stat", late)
        assert self.texts(file) + self.texts(file) == [b"2\n", b"3\n"]
        file.close()

    @pytest.mark.parametrize("count", [0, 1, 2, 999, 1500, 1999, 2000, 5000])
    def test_tail(self, tmp_path, count):
        path = tmp_path / "log"
        path.write_text("".join(self.log_line(f"{number}\n", number % 60) for number in range(2000)))
        file = nerdctld.LogFile(str(path)).open()
        file.seek_tail(count)
        found = []
        while True:
            lines = file.lines()
            if not lines:
                break
            found += [int(each.text) for each in lines if each.text]
        file.close()
        assert found == list(range(max(0, 2000 - count), 2000))


###############################################################################
# Container lifecycle
###############################################################################

NAMES = ("rename", "update", "rm", "diff")


def identity(engine, name):
    """The id of one of the recorded containers."""
    return engine.inventory.container(name).id


def at_once(ask, *calls, pause=0.0):
    """The answers to requests (method, path) that are sent at the same time, or each one `pause` seconds after the other."""
    answers, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def send(number):
        barrier.wait(10)
        time.sleep(number * pause)
        answers[number] = ask(*calls[number])

    threads = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(len(calls))]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    return answers


def carry_out(fake, words):
    """Do to a fake containerd what a command of nerdctl does to a container."""
    word, real = words[0], words[-1]
    if word == "rename":
        fake.label(words[-2], **{"nerdctl/name": real})
    elif word == "update":
        for each in words:
            if each.startswith("--restart="):
                fake.label(real, **{"containerd.io/restart.policy": each.partition("=")[2]})
    elif word == "rm" and "--force" in words and fake.tasks.get(real, nerdctld.TaskRecord(0, "stopped", 0, 0, "")).status != "stopped":
        fake.exit(real, 137)
    if word == "rm":
        fake.delete(real)


@pytest.fixture
def willing(furnished, scripted, fake):
    """The recorded containers, over a nerdctl that does as it is told; events are followed."""
    with scripted.together():
        for name in NAMES:
            scripted.on(name, does=functools.partial(carry_out, fake))
    for each in fake.containers.values():
        fake.mounts.setdefault((each.snapshotter, each.snapshot_key), [])
    follow(furnished, fake)
    return furnished


class TestContainerLifecycle:
    def test_signals_by_their_numbers(self):
        assert [nerdctld.signal_number(nerdctld.check_signal(each)) for each in ("9", "kill", "37", "RTMAX-1")] == [9, 9, signal.SIGRTMIN + 3, signal.SIGRTMAX - 1]
        stops = lambda word: nerdctld.ends_by(container_of({"io.containerd.image.config.stop-signal": word} if word else {}))
        assert [stops(each) for each in ("", "FOO", "SIGRTMIN+3", "3")] == [15, 0, signal.SIGRTMIN + 3, 3]

    @pytest.mark.parametrize("asked, labels, query, seconds", [
        ({"StopTimeout": 0}, {}, {}, 0), ({"StopTimeout": 300}, {}, {}, 300), ({"StopTimeout": 300}, {}, {"t": ["1"]}, 1), ({"StopTimeout": -1}, {}, {}, 1000000),
        ({}, {}, {}, 10), ({}, {"nerdctl/stop-timeout": "20"}, {}, 20), ({"StopTimeout": None}, {}, {"t": ["-1"]}, 1000000)])
    def test_time_of_a_stop(self, asked, labels, query, seconds):
        container = container_of({**labels, **nerdctld.request_labels(asked)})
        assert nerdctld.stop_seconds(nerdctld.Request("POST", "/", query=query), container) == seconds

    @pytest.mark.parametrize("method, path, status, call, number", [
        ("POST", "tstnew/start", 204, "Start", 0), ("POST", "tstweb/start", 304, "", 0), ("POST", "tstpaused/start", 409, "", 0), ("POST", "nosuch/start", 404, "", 0),
        ("POST", "tstweb/stop", 204, "Kill", 15), ("POST", "tstweb/stop?t=3&signal=int", 204, "Kill", 2), ("POST", "tstweb/stop?t=-1", 204, "Kill", 15),
        ("POST", "tstdone/stop", 304, "", 0), ("POST", "tstnew/stop", 304, "", 0), ("POST", "tstweb/stop?t=x", 400, "", 0), ("POST", "tstweb/stop?signal=x", 400, "", 0), ("POST", "nosuch/stop", 404, "", 0),
        ("POST", "tstweb/kill", 204, "Kill", 9), ("POST", "tstweb/kill?signal=USR1", 204, "Kill", 10), ("POST", "tstweb/kill?signal=10", 204, "Kill", 10),
        ("POST", "tstweb/kill?signal=nosuch", 400, "", 0), ("POST", "tstweb/kill?signal=0", 400, "", 0), ("POST", "tstweb/kill?signal=-9", 400, "", 0), ("POST", "tstweb/kill?signal=RTMIN%2B3", 204, "Kill", 37),
        ("POST", "tstweb/kill?signal=60", 204, "Kill", 60), ("POST", "tstweb/kill?signal=33", 204, "Kill", 33), ("POST", "tstweb/stop?signal=9", 204, "Kill", 9),
        ("POST", "tstdone/kill", 409, "", 0), ("POST", "tstweb/pause", 204, "Pause", 0), ("POST", "tstpaused/pause", 409, "", 0), ("POST", "tstdone/pause", 409, "", 0),
        ("POST", "tstpaused/unpause", 204, "Resume", 0), ("POST", "tstweb/unpause", 409, "", 0), ("POST", "tstdone/restart?t=1", 204, "Start", 0)])
    def test_calls(self, willing, fake, method, path, status, call, number):
        name = re.split("[/?]", path)[0]
        real = identity(willing, name) if name != "nosuch" else ""
        assert ask(willing, method, "/containers/" + path).status == status
        made = [each for each in ("Start", "Kill", "Pause", "Resume") if fake.calls["Tasks/" + each]]
        assert made == ([call] if call else [])
        if call:
            asked = fake.asked["Tasks/" + call]
            assert (bytes(asked[1]).decode(), asked.get(3, 0)) == (real, number)

    @pytest.mark.parametrize("method, path, status, words", [
        ("POST", "tstweb/rename?name=other", 204, "rename -- {id} other"),
        ("POST", "tstweb/rename?name=/other", 204, "rename -- {id} other"), ("POST", "tstweb/rename?name=tstdone", 409, ""), ("POST", "tstweb/rename?name=", 400, ""), ("POST", "tstweb/rename?name=tstweb", 400, ""),
        ("POST", "tstweb/rename?name=-x", 400, ""), ("DELETE", "tstdone", 204, "rm -- {id}"), ("DELETE", "tstweb", 409, ""),
        ("DELETE", "tstpaused", 409, ""), ("DELETE", "tstweb?force=1&v=true", 204, "rm --force --volumes -- {id}"), ("DELETE", "nosuch?force=1", 404, ""), ("DELETE", "tstdone?link=1", 501, "")])
    def test_argv(self, willing, scripted, method, path, status, words):
        name = re.split("[/?]", path)[0]
        real = identity(willing, name) if name != "nosuch" else ""
        assert ask(willing, method, "/containers/" + path).status == status
        changes = [each["argv"] for each in scripted.calls() if each["argv"][0] in NAMES]
        assert changes[-1:] == ([words.format(id=real).split()] if words else [])

    def test_restart_of_a_running_one(self, willing, fake):
        assert ask(willing, "POST", "/containers/tstweb/restart?t=1").status == 204
        # The task that has ended makes room for the next one.
        assert [each for each in fake.calls if each in ("Tasks/Kill", "Tasks/Delete", "Tasks/Create", "Tasks/Start")] == ["Tasks/Kill", "Tasks/Delete", "Tasks/Create", "Tasks/Start"]

    def test_a_grace_period_that_is_used_up(self, willing, fake):
        real = identity(willing, "tstnew")
        fake.programs[real] = lambda process: [process.wait_signal() for _ in range(9)]
        assert ask(willing, "POST", "/containers/tstnew/start").status == 204
        assert ask(willing, "POST", "/containers/tstnew/stop?t=0").status == 204
        assert ask(willing, "GET", "/containers/tstnew/json").json["State"]["ExitCode"] == 137
        assert [each for each in actions(willing, "signal") if each[0] in ("kill", "die", "stop")] == [("kill", "15"), ("kill", "9"), ("die", None), ("stop", None)]

    @pytest.mark.parametrize("path, number, resumed", [("kill", 9, 1), ("kill?signal=TERM", 15, 1), ("kill?signal=HUP", 1, 0), ("stop", 15, 1)])
    def test_what_ends_a_paused_one_lets_it_go_on(self, willing, fake, path, number, resumed):
        if not resumed:
            fake.before["Tasks/Kill"] = lambda: None
        ask(willing, "POST", "/containers/tstpaused/" + path)
        assert (fake.asked["Tasks/Kill"][3], fake.calls["Tasks/Resume"]) == (number, resumed)

    @pytest.mark.parametrize("path", ["kill", "stop"])
    def test_what_containerd_does_not_do(self, willing, fake, path):
        def refuse():
            raise nerdctld.GrpcError(2, "odd")
        fake.before["Tasks/Kill"] = refuse
        answer = ask(willing, "POST", f"/containers/tstweb/{path}")
        assert answer.status == 500 and "odd" in answer.message
        assert not [each for each in actions(willing) if each[0] in ("die", "stop")]

    @pytest.mark.parametrize("path, message", [
        ("POST tstdone/kill", "cannot kill container: tstdone: container {id} is not running"), ("POST tstdone/pause", "container {id} is not running"), ("POST tstpaused/pause", "container {id} is already paused"),
        ("DELETE tstweb", 'cannot remove container "/tstweb": container is running: stop the container before removing or force remove'),
        ("DELETE tstpaused", 'cannot remove container "/tstpaused": container is paused: unpause and then stop'), ("POST tstweb/kill?signal=x", "invalid signal: x"),
        ("POST tstweb/wait?condition=x", "invalid condition")])
    def test_words(self, willing, path, message):
        method, _, path = path.partition(" ")
        name = re.split("[/?]", path)[0]
        assert message.format(id=identity(willing, name)) in ask(willing, method, "/containers/" + path).message

    @pytest.mark.parametrize("message, status, code", [
        ('exec: "nosuch": executable file not found in $PATH: unknown', 400, 127), ('exec: "/etc": permission denied: unknown', 400, 126), ("odd", 500, 128)])
    def test_start_that_fails(self, willing, fake, message, status, code):
        real = identity(willing, "tstnew")
        fake.refuse[real] = "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: " + message
        answer = ask(willing, "POST", "/containers/tstnew/start")
        assert answer.status == status, answer.message
        assert answer.message.startswith("failed to create task for container: failed to create shim task: ")
        assert real not in fake.tasks
        assert fake.containers[real].labels["nerdctl/error"] == answer.message
        # It can be started when the reason is gone.
        fake.refuse.clear()
        assert ask(willing, "POST", "/containers/tstnew/start").status == 204
        assert ask(willing, "GET", "/containers/tstnew/json").json["State"]["Error"] == ""

    def test_a_task_that_cannot_be_started_is_taken_away(self, willing, fake):
        def refuse():
            raise nerdctld.GrpcError(2, "odd")
        fake.before["Tasks/Start"] = refuse
        assert ask(willing, "POST", "/containers/tstnew/start").status == 500
        assert identity(willing, "tstnew") not in fake.tasks

    @pytest.mark.parametrize("method, path, told", [
        ("POST", "stop", ["kill 15", "die", "stop"]), ("POST", "stop?signal=INT", ["kill 2", "die", "stop"]), ("POST", "restart", ["kill 15", "die", "stop", "start", "restart"]),
        ("POST", "kill", ["kill 9", "die"]), ("POST", "kill?signal=CONT", ["kill 18"]), ("DELETE", "?force=1", ["kill 9", "die", "destroy"]), ("GET", "top", ["top"])])
    def test_events(self, willing, method, path, told):
        assert ask(willing, method, "/containers/tstweb" + ("" if path.startswith("?") else "/") + path).status < 300
        willing.settle()
        assert [(each["Action"] + " " + each["Actor"]["Attributes"].get("signal", "")).strip() for each in willing.journal.history] == told

    @pytest.mark.parametrize("kind, first, second, statuses, words", [
        ("Tasks/Start", "POST tstnew/start", "POST tstnew/start", (204, 304), []),
        ("Tasks/Start", "POST tstnew/start", "DELETE tstnew?force=1", (204, 204), ["rm"]),
        ("Tasks/Start", "POST tstnew/start", "DELETE tstnew", (204, 409), []),
        ("Tasks/Start", "POST tstnew/start", "POST tstnew/kill", (204, 204), []),
        ("Tasks/Start", "POST tstnew/start", "POST prune", (204, 200), ["rm"]),
        ("rm", "DELETE tstdone", "DELETE tstdone", (204, 409), ["rm"]), ("rm", "DELETE tstdone", "POST tstdone/start", (204, 409), ["rm"]),
        ("rm", "DELETE tstdone", "POST tstdone/rename?name=x", (204, 404), ["rm"]),
        ("Tasks/Pause", "POST tstweb/pause", "POST tstweb/pause", (204, 409), []),
        ("Tasks/Resume", "POST tstpaused/unpause", "POST tstpaused/unpause", (204, 409), [])])
    def test_one_change_at_a_time(self, willing, scripted, fake, kind, first, second, statuses, words):
        """The second one finds what the first one has made of the container."""
        if kind == "rm":
            scripted.on(kind, does=lambda words: (time.sleep(0.05), carry_out(fake, words)))
        fake.before[kind] = lambda: time.sleep(0.05)
        send = lambda method, path: ask(willing, method, "/containers/" + path)
        answers = at_once(send, first.split(), second.split(), pause=0.0 if first == second else 0.02)
        found = [each.status for each in answers]
        assert (sorted(found) if first == second else found) == list(statuses)
        assert [each["argv"][0] for each in scripted.calls() if each["argv"][0] in NAMES] == words and fake.calls[kind] <= 1
        if second == "POST prune":
            # The other one that does not run.
            assert answers[1].json["ContainersDeleted"] == [json.loads(INSPECT_DONE.stdout)["ID"]]
        assert not any(each.lock.locked() for each in willing.owners.values())

    @pytest.mark.parametrize("path, message", [
        ("DELETE tstdone", "removal of container tstdone is already in progress"), ("POST tstdone/start", "container is marked for removal and cannot be started")])
    def test_words_during_a_removal(self, willing, scripted, fake, path, message):
        gate = threading.Event()
        scripted.on("rm", does=lambda words: (gate.wait(10), carry_out(fake, words)))
        thread = threading.Thread(target=ask, args=(willing, "DELETE", "/containers/tstdone"))
        thread.start()
        assert until(lambda: scripted.calls("rm"))
        method, _, path = path.partition(" ")
        assert ask(willing, method, "/containers/" + path).message == message
        # There is nothing to wait for.
        assert thread.is_alive()
        gate.set()
        thread.join(10)

    @pytest.mark.parametrize("word", ["stop", "restart"])
    def test_a_stop_that_takes_its_time(self, willing, fake, word):
        """Nobody waits for it."""
        real = identity(willing, "tstnew")
        fake.programs[real] = lambda process: [process.wait_signal() for _ in range(9)]
        assert ask(willing, "POST", "/containers/tstnew/start").status == 204
        found, thread = self.waiting(willing, f"/containers/tstnew/{word}?t=60")
        assert until(lambda: fake.calls["Tasks/Kill"])
        for path, status in (("POST /start", 304), ("GET /json", 200), ("POST /kill?signal=HUP", 204), ("DELETE ?", 409), ("POST /rename?name=other", 204), ("POST /pause", 204),
                             ("POST /unpause", 204)):
            method, _, path = path.partition(" ")
            assert ask(willing, method, f"/containers/{real}" + path).status == status and thread.is_alive(), path
        assert ask(willing, "POST", f"/containers/{real}/kill").status == 204
        thread.join(20)
        assert found[0].status == 204 and ask(willing, "GET", f"/containers/{real}/json").json["State"]["Running"] == (word == "restart")

    def test_a_stop_of_what_ends_by_another_hand(self, willing, fake):
        real = identity(willing, "tstweb")

        def ends():
            fake.exit(real)
            raise nerdctld.GrpcError(5, "process already finished: not found")
        fake.before["Tasks/Kill"] = ends
        assert ask(willing, "POST", "/containers/tstweb/stop").status == 204

    def test_a_stop_is_told_after_the_end(self, willing, fake):
        real = identity(willing, "tstnew")
        fake.programs[real] = lambda process: process.wait_signal() and process.wait_signal()
        ask(willing, "POST", "/containers/tstnew/start")
        found, thread = self.waiting(willing, "/containers/tstnew/restart")
        assert until(lambda: fake.calls["Tasks/Kill"])
        assert fake.calls["Tasks/Start"] == 1 and ("stop",) not in actions(willing)
        fake.exit(real)
        thread.join(10)
        assert found[0].status == 204
        assert [each[0] for each in actions(willing)] == ["start", "kill", "die", "stop", "start", "restart"]

    def test_who_is_killed_can_be_removed(self, willing, fake):
        """As with dockerd without a wait, although containerd's answer comes before the end."""
        kill = fake.task_kill
        fake.task_kill = lambda *asked: threading.Timer(0.02, kill, asked).start() or b""
        for name in ("tstweb", "tstpaused"):
            assert ask(willing, "POST", f"/containers/{name}/kill").status == 204
            assert ask(willing, "DELETE", f"/containers/{name}").status == 204

    def test_what_is_told_of_a_start_that_fails(self, willing, fake):
        """Also of one that fails before nerdctl's hooks have run, which would note that it was started."""
        real = identity(willing, "tstnew")
        for message, code in (("executable file not found in $PATH", 127), ("permission denied", 126), ("error mounting", 128)):
            fake.refuse[real] = f'failed to create shim task: OCI runtime create failed: exec: "x": {message}'
            found, thread = self.waiting(willing, "/containers/tstnew/wait?condition=next-exit")
            assert self.still_waits(willing, found)
            answer = ask(willing, "POST", "/containers/tstnew/start")
            thread.join(10)
            state = ask(willing, "GET", "/containers/tstnew/json").json["State"]
            assert (state["Status"], state["ExitCode"], state["Error"], found[0].json["StatusCode"]) == ("created", code, answer.message, code)
        assert actions(willing) == []

    def test_the_end_of_a_task_that_was_never_started(self, willing, fake):
        """containerd tells of an end when it takes such a task away; for Docker's clients nothing has begun, and so nothing ends."""
        def refuse():
            raise nerdctld.GrpcError(2, "odd")
        fake.before["Tasks/Start"] = refuse
        found, thread = self.waiting(willing, "/containers/tstnew/wait?condition=next-exit")
        assert self.still_waits(willing, found)
        assert ask(willing, "POST", "/containers/tstnew/start").status == 500
        thread.join(10)
        assert found[0].json == {"StatusCode": 128} and actions(willing) == []
        # Of the next one the end is told.
        del fake.before["Tasks/Start"]
        assert ask(willing, "POST", "/containers/tstnew/start").status == 204
        fake.exit(identity(willing, "tstnew"), 3)
        assert [each[0] for each in actions(willing)] == ["start", "die"]

    def test_restart_of_one_that_cannot_be_started_again(self, willing, fake):
        real = identity(willing, "tstweb")
        fake.refuse[real] = "odd"
        assert ask(willing, "POST", "/containers/tstweb/restart").status == 500
        assert [each[0] for each in actions(willing)] == ["kill", "die", "stop"] and real not in fake.tasks
        assert not willing.owner(real).restarting and not willing.owner(real).lock.locked()

    @pytest.mark.parametrize("call", ["Snapshots/Mounts", "Tasks/Create", "Tasks/Start"])
    def test_containerd_goes_while_one_starts(self, willing, fake, call):
        """Nothing half-made stays, and the container neither: it can be started when containerd is back."""
        real = identity(willing, "tstnew")
        fake.label(real, **nerdctld.request_labels({"Image": BASE, "HostConfig": {"AutoRemove": True}}))

        def hang_up():
            del fake.before[call]
            raise HangUp
        fake.before[call] = hang_up
        assert ask(willing, "POST", "/containers/tstnew/start").status == 503
        assert real in fake.containers and real not in fake.tasks
        assert ask(willing, "POST", "/containers/tstnew/start").status == 204
        assert fake.tasks[real].status == "running"

    @pytest.mark.parametrize("path", ["kill", "stop", "restart", "pause"])
    def test_containerd_goes_while_one_is_changed(self, willing, fake, path):
        real = identity(willing, "tstweb")

        def hang_up():
            fake.before.clear()
            raise HangUp
        fake.before.update({"Tasks/Kill": hang_up, "Tasks/Pause": hang_up})
        answer = ask(willing, "POST", f"/containers/tstweb/{path}")
        assert fake.tasks[real].status == "running" and not willing.owner(real).lock.locked() and not willing.owner(real).restarting
        assert answer.status == (500 if path == "kill" else 503), answer.message
        assert ask(willing, "POST", "/containers/tstweb/stop").status == 204

    def test_an_end_while_containerd_is_away(self, willing, fake):
        """Nobody tells of it; when the events come again it is found."""
        real = identity(willing, "tstweb")
        fake.label(real, **{"containerd.io/restart.policy": None, "containerd.io/restart.status": None})
        found, thread = self.waiting(willing, "/containers/tstweb/wait")
        assert self.still_waits(willing, found)
        fake.stop_serving()
        for method, path in (("POST", "/tstweb/stop"), ("POST", "/tstnew/start"), ("GET", "/tstweb/json"), ("DELETE", "/tstdone")):
            assert ask(willing, method, "/containers" + path).status == 503
        assert not found
        fake.exit(real, 4)
        fake.start_serving()
        thread.join(10)
        assert found[0].json == {"StatusCode": 4}
        assert until(lambda: fake.subscribers and willing.feed.live)
        assert ask(willing, "GET", "/containers/tstweb/json").json["State"]["ExitCode"] == 4
        assert ask(willing, "POST", "/containers/tstweb/start").status == 204 and actions(willing) == [("start",)]

    def test_one_that_is_removed_at_its_end_is_restarted(self, willing, scripted, fake):
        real = identity(willing, "tstnew")
        fake.label(real, **nerdctld.request_labels({"Image": BASE, "HostConfig": {"AutoRemove": True}}))
        willing.caretaker = nerdctld.Caretaker(willing)
        assert [ask(willing, "POST", "/containers/tstnew/start").status for _ in range(2)] == [204, 304]
        assert set(willing.caretaker.cared) == {real}
        assert ask(willing, "POST", "/containers/tstnew/restart").status == 204
        willing.settle()
        assert not scripted.calls("rm")
        fake.exit(real)
        assert until(lambda: real not in fake.containers) is True

    def test_a_command_in_a_container_that_is_stopped(self, willing, fake):
        real = identity(willing, "tstweb")
        fake.programs["sleeper",] = lambda process: [process.wait_signal() for _ in range(9)]
        run, late = (ask(willing, "POST", "/containers/tstweb/exec", {"Cmd": ["sleeper"]}).json["Id"] for _ in range(2))
        assert ask(willing, "POST", f"/exec/{run}/start", {"Detach": True}).status == 200
        assert until(lambda: fake.execs and all(each.status == "running" for each in fake.execs.values()))
        assert ask(willing, "POST", "/containers/tstweb/stop").status == 204
        assert until(lambda: not ask(willing, "GET", f"/exec/{run}/json").json["Running"])
        assert ask(willing, "GET", f"/exec/{run}/json").json["ExitCode"] == 137
        assert ask(willing, "POST", f"/exec/{late}/start", {"Detach": True}).status == 409
        assert fake.tasks[real].status == "stopped" and not willing.busy()

    def test_networks_that_cannot_be_released(self, willing, fake, monkeypatch):
        def fail(*_):
            raise nerdctld.ApiError("odd")

        def refuse():
            monkeypatch.setattr(nerdctld, "release_networks", fail)
            raise nerdctld.GrpcError(2, "cannot start")
        fake.before["Tasks/Start"] = refuse
        assert "cannot start" in ask(willing, "POST", "/containers/tstnew/start").message
        assert identity(willing, "tstnew") not in fake.tasks

    def test_a_forced_removal_that_removed_nothing(self, willing, scripted, monkeypatch):
        """With --force nerdctl 2.3.5 ends with 0 whatever comes of it."""
        monkeypatch.setattr(nerdctld.time, "sleep", lambda seconds: None)
        real = identity(willing, "tstweb")
        scripted.on("rm", stderr=level("error", f"1 errors:\ncannot delete running task {real}: failed precondition"))
        answer = ask(willing, "DELETE", "/containers/tstweb?force=1")
        assert answer.status == 500 and "cannot delete running task" in answer.message and len(scripted.calls("rm")) == 3
        assert ask(willing, "GET", "/containers/tstweb/json").status == 200
        scripted.on("rm", stderr=level("error", f"1 errors:\nno such container: {real}"))
        assert ask(willing, "DELETE", "/containers/tstweb?force=1").status == 404
        scripted.on("rm", stdout=real + "\n", stderr=level("error", "failed to remove something beside it"))
        assert ask(willing, "DELETE", "/containers/tstweb?force=1").status == 204

    @pytest.mark.parametrize("message, status, removed", [
        ("executable file not found in $PATH", 400, True), ("failed to create shim task: odd", 500, True), ("", 503, False)])
    def test_who_is_removed_when_a_start_fails(self, willing, scripted, fake, message, status, removed):
        """Nobody whom containerd could not be reached for; and whoever waits for the removal of that one is told."""
        real = identity(willing, "tstnew")
        fake.label(real, **nerdctld.request_labels({"Image": BASE, "HostConfig": {"AutoRemove": True}}))

        def refuse():
            time.sleep(0.1)
            raise nerdctld.GrpcError(2 if message else 14, message or "the server takes no more calls")
        fake.before["Tasks/Create"] = refuse
        found, thread = self.waiting(willing, "/containers/tstnew/wait?condition=removed")
        assert ask(willing, "POST", "/containers/tstnew/start").status == status
        # Without --force: what runs, whoever has started it, is not removed.
        assert [each["argv"] for each in scripted.calls("rm")] == ([["rm", "--volumes", "--", real]] if removed else [])
        thread.join(10)
        assert found[0].json["StatusCode"] > 0

    def test_one_that_is_removed_at_its_end_survives_two_starts(self, willing, scripted, fake):
        real = identity(willing, "tstnew")
        fake.label(real, **nerdctld.request_labels({"Image": BASE, "HostConfig": {"AutoRemove": True}}))
        fake.before["Tasks/Start"] = lambda: time.sleep(0.1)
        send = lambda method, path: ask(willing, method, path)
        assert sorted(each.status for each in at_once(send, *[("POST", "/containers/tstnew/start")] * 2)) == [204, 304]
        assert not scripted.calls("rm") and fake.tasks[real].status == "running"

    def test_two_with_one_port(self, willing, fake, tmp_path):
        ports = json.dumps([{"HostPort": 41999, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "127.0.0.1"}])
        for each in ("5" * 64, "6" * 64):
            fake.create(each, {"nerdctl/name": each[:4], "nerdctl/ports": ports})
        fake.before["Tasks/Start"] = lambda: time.sleep(0.1)
        answers = at_once(lambda method, path: ask(willing, method, path), ("POST", "/containers/5555/start"), ("POST", "/containers/6666/start"))
        assert sorted(each.status for each in answers) == [204, 500]
        assert "Bind for 127.0.0.1:41999 failed: port is already allocated" in max(answers, key=lambda each: each.status).message
        assert not willing.claimed

    def test_a_log_that_cannot_be_written(self, willing, scripted, fake, tmp_path):
        folder = tmp_path / "state"
        (folder / (ID[:0] + "5" * 64 + "-json.log")).mkdir(parents=True)
        fake.create("5" * 64, {"nerdctl/name": "logless", "nerdctl/state-dir": str(folder), **nerdctld.request_labels({"OpenStdin": True, "HostConfig": {"AutoRemove": True}})})
        answer = ask(willing, "POST", "/containers/logless/start")
        assert answer.status == 500 and answer.message.startswith("failed to initialize logging driver: ")
        assert scripted.calls("rm") and not [each for each in os.listdir(folder) if each.startswith("nerdctld-")]

    def test_who_was_told_of_an_end_can_remove_it(self, willing, fake):
        for _ in range(20):
            real = identity(willing, "tstweb")
            assert ask(willing, "POST", "/containers/tstweb/kill").status == 204
            assert ask(willing, "POST", "/containers/tstweb/wait").json["StatusCode"] == 137
            assert ask(willing, "GET", "/containers/tstweb/json").json["State"]["Status"] == "exited"
            fake.delete(real)
            fake.create(real, {"nerdctl/name": "tstweb"})
            fake.start(real)
        assert ask(willing, "POST", "/containers/tstweb/kill").status == 204
        assert ask(willing, "DELETE", "/containers/tstweb").status == 204

    RESTART = "containerd.io/restart."

    def restarts(self, fake, real):
        """What containerd's restart monitor sees of a container."""
        return {key[len(self.RESTART):]: value for key, value in fake.containers[real].labels.items() if key.startswith(self.RESTART)}

    @pytest.mark.parametrize("policy", ["always", "on-failure:3", "unless-stopped"])
    @pytest.mark.parametrize("path, held", [("stop", True), ("kill", True), ("kill?signal=TERM", True), ("kill?signal=HUP", False)])
    def test_what_is_stopped_stays_so(self, willing, fake, policy, path, held):
        """Without a status the monitor does not look at it. Its policy stays as it is."""
        real = identity(willing, "tstweb")
        fake.label(real, **{self.RESTART + "policy": policy, self.RESTART + "status": "running", self.RESTART + "explicitly-stopped": "false", self.RESTART + "count": "2"})
        assert ask(willing, "POST", "/containers/tstweb/" + path).status == 204
        assert self.restarts(fake, real) == ({"policy": policy, "explicitly-stopped": "true", "count": "2"} if held else
                                             {"policy": policy, "status": "running", "explicitly-stopped": "false", "count": "2"})
        assert ask(willing, "GET", "/containers/tstweb/json").json["HostConfig"]["RestartPolicy"]["Name"] == policy.partition(":")[0]
        nerdctld.resume_policy(willing, willing.inventory.container("tstweb"))
        # Its restarts are counted anew, as by dockerd.
        assert self.restarts(fake, real) == {"policy": policy, "status": "running", "explicitly-stopped": "false"}

    def test_without_a_policy_nothing_is_written(self, willing, fake):
        container = willing.inventory.container("tstweb")
        for key in list(self.restarts(fake, container.id)):
            fake.label(container.id, **{self.RESTART + key: None})
        container = willing.inventory.container("tstweb")
        nerdctld.hold_policy(willing, container)
        nerdctld.resume_policy(willing, container)
        assert not fake.calls["Containers/Update"]

    @pytest.mark.parametrize("name, before, policy, after", [
        ("tstweb", {}, {"Name": "always"}, {"policy": "always", "status": "running", "explicitly-stopped": "false", "loguri": "binary:///x"}),
        ("tstweb", {"policy": "always", "status": "running", "loguri": "binary:///x"}, {"Name": "no"}, {}), ("tstdone", {}, {"Name": "unless-stopped"}, {"policy": "unless-stopped", "loguri": "binary:///x"}),
        ("tstdone", {"policy": "always", "explicitly-stopped": "true"}, {"Name": "on-failure", "MaximumRetryCount": 2}, {"policy": "on-failure:2", "explicitly-stopped": "true", "loguri": "binary:///x"}),
        ("tstweb", {"policy": "always", "status": "running"}, {}, {"policy": "always", "status": "running"})])
    def test_another_policy(self, willing, scripted, fake, name, before, policy, after):
        real = identity(willing, name)
        cleared = {key: None for key in fake.containers[real].labels if key.startswith(self.RESTART)}
        fake.label(real, **{**cleared, "nerdctl/log-uri": "binary:///x", **{self.RESTART + key: value for key, value in before.items()}})
        assert ask(willing, "POST", f"/containers/{name}/update", {"RestartPolicy": policy}).status == 200
        assert self.restarts(fake, real) == after and not scripted.calls("update")

    def test_update(self, willing, scripted):
        real = identity(willing, "tstweb")
        answer = ask(willing, "POST", "/containers/tstweb/update", {"Memory": 64 << 20, "NanoCpus": 5 * 10**8, "RestartPolicy": {"Name": "no"}, "PidsLimit": 0, "BlkioDeviceReadBps": None})
        assert (answer.status, answer.json) == (200, {"Warnings": None})
        assert scripted.argv("update") == ["update", "--memory=67108864", "--cpu-period=100000", "--cpu-quota=50000", "--", real]
        assert ask(willing, "POST", "/containers/tstweb/update", {"RestartPolicy": {"Name": "odd"}}).status == 400

    def waiting(self, engine, target):
        """The answer of a wait that is under way, in a list; and its thread."""
        found = []
        thread = threading.Thread(target=lambda: found.append(ask(engine, "POST", target)), daemon=True)
        thread.start()
        return found, thread

    @staticmethod
    def still_waits(engine, found):
        """Whether a wait that is under way goes on after all that has happened by now."""
        engine.settle()
        return until(lambda: found or engine.tasks.condition._waiters) and not found

    @pytest.mark.parametrize("query", ["", "?condition=not-running", "?condition=next-exit"])
    def test_wait_for_the_end(self, willing, fake, query):
        real = identity(willing, "tstweb")
        found, thread = self.waiting(willing, "/containers/tstweb/wait" + query)
        assert self.still_waits(willing, found)
        fake.exit(real, 1, "anexec")
        assert self.still_waits(willing, found)
        fake.exit(real, 9)
        thread.join(10)
        assert (found[0].status, found[0].json) == (200, {"StatusCode": 9})

    def test_wait_for_one_that_is_not_running(self, willing):
        assert ask(willing, "POST", "/containers/tstdone/wait").json == {"StatusCode": 3}
        assert ask(willing, "POST", "/containers/tstnew/wait", {"condition": ""}).json == {"StatusCode": 0}

    def test_wait_for_an_end_that_was_told_costs_nothing(self, willing, scripted, fake):
        real = identity(willing, "tstpaused")
        fake.exit(real, 7)
        ask(willing, "GET", "/containers/tstpaused/json")
        calls = sum(fake.calls.values())
        assert ask(willing, "POST", "/containers/tstpaused/wait").json == {"StatusCode": 7}
        assert sum(fake.calls.values()) == calls and not scripted.calls()
        # Started again, and so to be waited for again.
        fake.start(real)
        found, thread = self.waiting(willing, "/containers/tstpaused/wait")
        assert self.still_waits(willing, found)
        fake.exit(real, 8)
        thread.join(10)
        assert found[0].json == {"StatusCode": 8}
        # When events may have been missed it is looked up, and containerd says that it runs.
        fake.tasks[real] = fake.tasks[real]._replace(status="running")
        willing.handle(None)
        calls = fake.calls["Tasks/List"]
        found, thread = self.waiting(willing, "/containers/tstpaused/wait")
        assert until(lambda: fake.calls["Tasks/List"] > calls) and not found
        fake.exit(real, 9)
        thread.join(10)
        assert found[0].json == {"StatusCode": 9}

    def test_next_exit_of_one_that_was_never_started(self, willing, fake):
        real = identity(willing, "tstnew")
        found, thread = self.waiting(willing, "/containers/tstnew/wait?condition=next-exit")
        assert self.still_waits(willing, found)
        fake.start(real)
        fake.exit(real, 2)
        thread.join(10)
        assert found[0].json == {"StatusCode": 2}

    def test_wait_for_the_removal(self, willing, fake):
        real = identity(willing, "tstweb")
        found, thread = self.waiting(willing, "/containers/tstweb/wait?condition=removed")
        assert self.still_waits(willing, found)
        fake.exit(real, 5)
        assert self.still_waits(willing, found)
        fake.delete(real)
        thread.join(10)
        assert found[0].json == {"StatusCode": 5}

    def test_prune(self, willing, scripted):
        done, new = identity(willing, "tstdone"), identity(willing, "tstnew")
        told = ask(willing, "POST", "/containers/prune").json
        assert sorted(told["ContainersDeleted"]) == sorted([done, new])
        assert {each["argv"][-1] for each in scripted.calls("rm")} == {done, new}

    @pytest.mark.parametrize("filters", ['{"label":["x=y"]}', '{"label!":["base"]}', '{"until":["2000-01-01T00:00:00Z"]}'])
    def test_prune_by_filters(self, willing, scripted, filters):
        assert ask(willing, "POST", "/containers/prune?filters=" + filters).json == {"ContainersDeleted": None, "SpaceReclaimed": 0}
        assert not scripted.calls("rm")

    @pytest.mark.parametrize("filters", ['{"odd":["x"]}', '{"until":["then"]}', "["])
    def test_prune_refuses(self, willing, filters):
        assert ask(willing, "POST", "/containers/prune?filters=" + filters).status == 400

    def test_a_container_that_goes_is_not_found(self):
        gone = f'container "{ID}" in namespace "default": not found'
        with pytest.raises(nerdctld.NotFound, match="No such container: " + ID):
            raise nerdctld.nerdctl_error(fatal(gone))


###############################################################################
# Streams
###############################################################################


def client_frame(payload, kind=2, mask=b"\1\2\3\4", final=0x80):
    """A WebSocket frame as clients send it."""
    size = len(payload)
    head = bytes([final | kind]) + (bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big") if size < 65536 else b"\xff" + size.to_bytes(8, "big"))
    return head + mask + bytes(each ^ mask[index % 4] for index, each in enumerate(payload))


HANGUPS = nerdctld.Hangups()


class Attached(nerdctld.Client):
    """A client whose connection is taken over, by an attach or the start of an exec: `sock` is its end. A refusal is raised."""

    def __init__(self, engine, target, body=b"", method="POST", headers=None):
        near, self.sock = socket.socketpair()
        self.sock.settimeout(10)
        self.near, (path, _, query) = near, target.partition("?")
        version, path = nerdctld.split_version(path)
        fields = http.client.HTTPMessage()
        for name, value in (headers or {}).items():
            fields[name] = value
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = nerdctld.Request(method, path, version, urllib.parse.parse_qs(query, keep_blank_values=True), fields, BlockBody(data), self)
        self.response = nerdctld.dispatch(engine, request)
        if not isinstance(self.response.body, nerdctld.Hijack):
            raise AssertionError(self.response.body)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        """Serve it as the server does."""
        with self.near:
            self.response.body.serve(nerdctld.Connection(self.near))
            with contextlib.suppress(OSError):
                self.near.shutdown(socket.SHUT_RDWR)

    def when_gone(self, callback, half=True):
        return HANGUPS.watch(self.near, callback, half)

    def read(self, size):
        """The next bytes."""
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            assert part, data
            data += part
        return data

    def send(self, data, half=False):
        """Send some input, and with `half` its end."""
        self.sock.sendall(data)
        if half:
            self.sock.shutdown(socket.SHUT_WR)

    def rest(self):
        """All that comes to the end."""
        data = drain(self.sock)
        self.thread.join(10)
        assert not self.thread.is_alive()
        return data

    def leave(self):
        """Close the connection."""
        self.sock.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


def echo(process):
    """Writes what it reads, to the end."""
    for data in iter(process.stdin.read1, b""):
        process.stdout.write(data)
    return 7


# A container's own process, of which an exec has what it is not asked for.
OWN = {"args": ["own"], "cwd": "/own", "env": ["PATH=/bin", "A=1"], "user": {"uid": 7, "gid": 8}, "capabilities": {"bounding": ["CAP_KILL"], "inheritable": ["CAP_KILL"]},
       "terminal": False, "consoleSize": {"height": 1, "width": 2}, "apparmorProfile": "nerdctl-default", "noNewPrivileges": True}


@pytest.fixture
def boxes(engine, fake, tmp_path):
    """Makes the container "x" by a create request; started, it runs this program."""
    def box(program=None, started=False, **request):
        state = tmp_path / "state"
        state.mkdir()
        process = {**OWN, "terminal": bool(request.get("Tty"))}
        fake.create(ID, {"nerdctl/name": "x", "nerdctl/state-dir": str(state), "nerdctl/log-uri": "binary:///nerdctl?x=y", **nerdctld.request_labels(request)}, spec={"process": process})
        if program:
            fake.programs[ID] = program
        if started:
            assert ask(engine, "POST", "/containers/x/start").status == 204
        return state
    yield box
    for each in list(fake.processes.values()):
        each.cut()
    assert until(lambda: not threads("streams")) == True
    assert not [each for each in (tmp_path / "state").glob("nerdctld-*")]


def actions(engine, *kept):
    """Action and these attributes of everything in the journal, after what has happened by now."""
    engine.settle()
    return [(each["Action"], *map(each["Actor"]["Attributes"].get, kept)) for each in engine.journal.history]


EVERYTHING = "stream=1&stdin=1&stdout=1&stderr=1"


class TestStreams:
    def test_the_end_of_the_daemon_is_none_of_the_input(self, boxes, engine, fake):
        boxes(lambda process: process.wait_signal(), OpenStdin=True, StdinOnce=True)
        client = Attached(engine, "/containers/x/attach?" + EVERYTHING)
        assert ask(engine, "POST", "/containers/x/start").status == 204
        engine.hang_up()
        client.thread.join(10)
        assert not client.thread.is_alive() and not fake.calls["Tasks/CloseIO"]
        fake.exit(ID)

    @pytest.mark.parametrize("headers, message", [
        ({}, "not websocket protocol"), ({"Upgrade": "websocket"}, "not websocket protocol"), ({"Upgrade": "tcp", "Connection": "Upgrade"}, "not websocket protocol"),
        ({"Upgrade": "websocket", "Connection": "Upgrade"}, "mismatch challenge/response"),
        ({"Upgrade": "WebSocket", "Connection": "keep-alive, upgrade", "Sec-WebSocket-Key": "a"}, "missing or bad WebSocket Version"),
        ({"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "a", "Sec-WebSocket-Version": "8"}, "missing or bad WebSocket Version")])
    def test_no_handshake(self, reading, headers, message):
        answer = ask(reading, "GET", "/containers/tstweb/attach/ws", headers=headers)
        assert (answer.status, answer.message) == (400, message)
        assert ask(reading, "GET", "/containers/nosuch/attach/ws", headers=headers).status == 404

    @pytest.mark.parametrize("tty, version, told", [(True, (1, 50), "raw"), (False, (1, 41), "raw"), (False, (1, 42), "multiplexed"), (False, (1, 56), "multiplexed")])
    def test_media_type(self, tty, version, told):
        assert nerdctld.stream_type(tty, version) == f"application/vnd.docker.{told}-stream"

    @pytest.fixture
    def logged(self, furnished, tmp_path, monkeypatch):
        """tstdone with a log."""
        rows = [("a\n", "stdout", 1), ("b\n", "stderr", 2), ("c", "stdout", 3), ("d\n", "stdout", 4)]
        path = tmp_path / "x-json.log"
        path.write_text("".join(json.dumps({"log": text, "stream": stream, "time": f"2026-11-24T00:00:0{second}Z"}) + "\n" for text, stream, second in rows))
        monkeypatch.setattr(nerdctld, "log_path", lambda container: str(path))
        return furnished

    @pytest.mark.parametrize("query, frames", [
        ("stdout=1&stderr=1", [(1, b"a\n"), (2, b"b\n"), (1, b"cd\n")]), ("stdout=true", [(1, b"a\ncd\n")]), ("stderr=1&follow=1", [(2, b"b\n")]), ("stdout=1&tail=1", [(1, b"d\n")]),
        ("stdout=1&stderr=1&tail=0", []), ("stdout=1&tail=all&since=1795478403", [(1, b"cd\n")]), ("stdout=1&until=1795478402", [(1, b"a\n")]), ("stdout=1&tail=-1&since=0", [(1, b"a\ncd\n")]),
        ("stdout=1&timestamps=1&tail=1", [(1, b"2026-11-24T00:00:04.000000000Z d\n")]), ("stderr=1&details=1", [(2, b" b\n")])])
    def test_logs(self, logged, query, frames):
        answer = ask(logged, "GET", "/v1.50/containers/tstdone/logs?" + query)
        assert answer.status == 200 and unframe(answer.body) == frames

    def test_logs_end_with_the_run(self, engine, fake):
        follow(engine, fake)
        fake.create(ID, {"nerdctl/name": "x", "containerd.io/restart.policy": "always", "containerd.io/restart.status": "running"})
        fake.start(ID)
        engine.settle()
        container = engine.inventory.container("x")
        assert nerdctld.run_state(engine, container) == (True, 0)
        fake.exit(ID, 1)
        assert until(lambda: nerdctld.run_state(engine, container) == (False, 0))
        # The next run is another one, whose lines are not sent.
        fake.start(ID, 1)
        assert until(lambda: nerdctld.run_state(engine, container)[1] > 0) and nerdctld.run_state(engine, container)[0] is False
        line = nerdctld.LogLine("2026-11-24T00:00:01Z", 1, b"old\n")
        late = line._replace(stamp="2126-11-24T00:00:01Z", text=b"late\n")
        left = [[line, late], []]
        file = types.SimpleNamespace(lines=lambda: left.pop(0))
        assert list(nerdctld.follow_log(engine, container, file, True, lambda: False)) == [line]

    def test_logs_of_a_terminal(self, logged, monkeypatch):
        monkeypatch.setattr(nerdctld, "is_terminal", lambda *_: True)
        assert ask(logged, "GET", "/containers/tstdone/logs?stdout=1&stderr=1").body == b"a\nb\ncd\n"

    @pytest.mark.parametrize("query, status", [("", 400), ("stdout=0&stderr=0", 400), ("stdout=1&tail=x", 400), ("stdout=1&since=x", 400)])
    def test_logs_refuse(self, logged, query, status):
        assert ask(logged, "GET", "/containers/tstdone/logs?" + query).status == status
        assert ask(logged, "GET", "/containers/nosuch/logs?stdout=1").status == 404

    def test_details(self):
        request = {"Image": "x", "Env": ["E=1"], "HostConfig": {"LogConfig": {"Config": {"labels": "a,none", "env": "E"}}}}
        container = container_of({"a": "b c", **nerdctld.request_labels(request)})
        assert nerdctld.log_details(container) == b"E=1,a=b%20c "

    @pytest.mark.parametrize("path, status", [("tstpaused/attach?stream=1", 409), ("nosuch/attach?stream=1", 404), ("tstpaused/attach/ws?stream=1", 400), ("tstweb/attach/ws", 400), ("tstweb/resize?h=a&w=1", 400),
                                              ("tstdone/resize?h=1&w=1", 409), ("tstweb/resize?h=1&w=1", 200), ("tstweb/resize?h=70000&w=1", 400)])
    def test_answers(self, furnished, path, status):
        assert ask(furnished, "GET" if "/ws" in path else "POST", "/containers/" + path).status == status

    @pytest.mark.parametrize("task, held, refused", [("running", False, True), ("running", True, False), ("stopped", False, False), (None, False, False)])
    def test_input_out_of_reach(self, task, held, refused):
        container = container_of(nerdctld.request_labels({"OpenStdin": True}), task)
        if refused:
            with pytest.raises(nerdctld.NotImplementedHere):
                nerdctld.check_attach(container, True, held)
        else:
            nerdctld.check_attach(container, True, held)
        nerdctld.check_attach(container, False, held)

    def test_attach_before_the_start(self, engine, boxes, fake):
        state = boxes(lambda process: process.stdout.write(b"out\n") and until(lambda: first.seen) and process.stderr.write(b"err\n") and 3)
        first, second = Attached(engine, "/v1.50/containers/x/attach?" + EVERYTHING), Attached(engine, "/v1.41/containers/x/attach?stream=1&stderr=1")
        first.seen = False
        assert [each.response.media_type for each in (first, second)] == [nerdctld.MULTIPLEXED_STREAM, nerdctld.RAW_STREAM]
        assert ask(engine, "POST", "/containers/x/start").status == 204
        assert first.read(12) == b"\1\0\0\0\0\0\0\4out\n" and engine.owner(ID).streams
        first.seen = True
        assert unframe(first.rest()) == unframe(second.rest()) == [(2, b"err\n")]
        assert [row["log"] for row in map(json.loads, (state / f"{ID}-json.log").read_text().splitlines())] == ["out\n", "err\n"]
        assert until(lambda: engine.owner(ID).streams is None) and engine.containerd.get_task(ID).exit_status == 3
        # Without a client nothing is passed on.
        fake.programs[ID] = lambda process: process.stdout.write(b"again\n") and 0
        assert ask(engine, "POST", "/containers/x/start").status == 204 and engine.owner(ID).streams is None
        assert until(lambda: "again" in (state / f"{ID}-json.log").read_text())
        assert [each[0] for each in actions(engine) if each[0] == "attach"] == ["attach"] * 2

    @pytest.mark.parametrize("request_of, closes", [({"OpenStdin": True, "StdinOnce": True}, True), ({"OpenStdin": True}, False), ({"OpenStdin": True, "StdinOnce": True, "Tty": True}, False)])
    @pytest.mark.parametrize("leaves", [False, True])
    def test_the_end_of_the_input(self, engine, boxes, fake, request_of, closes, leaves):
        boxes(echo, **request_of)
        first, head = Attached(engine, "/containers/x/attach?" + EVERYTHING), 0 if request_of.get("Tty") else 8
        first.send(b"before ", half=not leaves)
        assert ask(engine, "POST", "/containers/x/start").status == 204
        assert first.read(head + 7)[head:] == b"before "
        if leaves:
            first.leave()
        if closes:
            assert until(lambda: engine.containerd.get_task(ID).exit_status == 7)
            assert leaves or first.rest() == b""
        else:
            second = Attached(engine, "/containers/x/attach?" + EVERYTHING)
            second.send(b"more")
            assert second.read(head + 4)[head:] == b"more"
            fake.exit(ID, 5)
            assert second.rest() == b"" and engine.containerd.get_task(ID).exit_status == 5
        assert until(lambda: engine.owner(ID).streams is None)

    def test_much_of_both(self, engine, boxes):
        boxes(echo, OpenStdin=True, StdinOnce=True)
        first, data, found = Attached(engine, "/containers/x/attach?" + EVERYTHING), os.urandom(1 << 19), []
        assert ask(engine, "POST", "/containers/x/start").status == 204
        reader = threading.Thread(target=lambda: found.append(first.rest()))
        reader.start()
        first.send(data, half=True)
        reader.join(10)
        assert unframe(found[0]) == [(1, data)]

    def test_detach(self, engine, boxes, fake):
        boxes(echo, OpenStdin=True, Tty=True)
        first = Attached(engine, "/containers/x/attach?detachKeys=ctrl-a,b&" + EVERYTHING)
        assert ask(engine, "POST", "/containers/x/start").status == 204
        first.send(b"in")
        assert first.read(2) == b"in"
        first.send(b"\x01bmore")
        assert first.rest() == b"" and engine.containerd.get_task(ID).status == "running"
        assert [each[0] for each in actions(engine) if "tach" in each[0]] == ["attach", "detach"]
        assert ask(engine, "POST", "/containers/x/attach?detachKeys=zz&" + EVERYTHING).status == 400

    def test_a_client_that_leaves_without_input(self, engine, boxes):
        boxes(lambda process: process.wait_signal())
        first, second = (Attached(engine, "/containers/x/attach?stream=1&stdout=1&stdin=1") for _ in range(2))
        assert ask(engine, "POST", "/containers/x/start").status == 204
        # It has no stdin that could be closed.
        first.sock.shutdown(socket.SHUT_WR)
        second.leave()
        assert until(lambda: len(engine.owner(ID).streams.attachments) == 1)
        assert ask(engine, "POST", "/containers/x/kill?signal=USR1").status == 204
        assert first.rest() == b"" and engine.containerd.get_task(ID).exit_status == signal.SIGUSR1

    def test_attach_to_what_others_have_started(self, engine, boxes, fake, tmp_path):
        state = boxes(OpenStdin=True)
        fake.start(ID)
        log, lock = state / f"{ID}-json.log", open(state / "logger-lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = ask(engine, "POST", "/containers/x/attach?" + EVERYTHING)
        assert answer.status == 501 and "this container's stdin cannot be reached" in answer.message
        log.write_text('{"log":"before\\n","stream":"stdout","time":"2026-11-24T00:00:00Z"}\n')
        late, all_of_it = (Attached(engine, f"/containers/x/attach?stream=1&stdout=1&stderr=1&logs={logs}") for logs in (0, 1))
        assert unframe(all_of_it.read(15)) == [(1, b"before\n")]
        until(lambda: threads("attach")[1:])
        with open(log, "a") as file:
            file.write('{"log":"after\\n","stream":"stderr","time":"2026-11-24T00:00:01Z"}\n')
        assert unframe(late.read(14)) == [(2, b"after\n")]
        fake.exit(ID)
        lock.close()
        assert unframe(all_of_it.rest()) == [(2, b"after\n")] and late.rest() == b""

    def test_logs_and_streams(self, engine, boxes, fake):
        boxes(echo, started=True, OpenStdin=True)
        first = Attached(engine, "/containers/x/attach?" + EVERYTHING)
        first.send(b"one\n")
        assert unframe(first.read(12)) == [(1, b"one\n")]
        second = Attached(engine, "/containers/x/attach?logs=1&" + EVERYTHING)
        assert unframe(second.read(12)) == [(1, b"one\n")]
        second.send(b"two\n")
        assert unframe(second.read(12)) == unframe(first.read(12)) == [(1, b"two\n")]
        fake.exit(ID)
        assert first.rest() == second.rest() == b""

    def test_a_start_that_fails(self, engine, boxes, fake):
        boxes(OpenStdin=True)
        fake.refuse[ID] = 'failed to create shim task: OCI runtime create failed: exec: "own": executable file not found in $PATH'
        first = Attached(engine, "/containers/x/attach?" + EVERYTHING)
        answer = ask(engine, "POST", "/containers/x/start")
        assert answer.status == 400 and "executable file not found in $PATH" in answer.message
        assert first.rest() == b"" and until(lambda: engine.owner(ID).streams is None)

    def test_a_container_that_is_removed_before_its_start(self, engine, boxes, fake):
        boxes()
        follow(engine, fake)
        first = Attached(engine, "/containers/x/attach?" + EVERYTHING)
        fake.delete(ID)
        assert first.rest() == b"" and not engine.owner(ID).waiting

    def test_clients_that_do_not_come(self, engine, boxes):
        boxes()
        first = Attached(engine, "/containers/x/attach?" + EVERYTHING)
        assert len(engine.owner(ID).waiting) == 1
        first.leave()
        assert engine.owner(ID).waiting == []
        response = nerdctld.dispatch(engine, nerdctld.Request("POST", "/containers/x/attach", query={"stream": ["1"]}))
        response.body.abandon()
        assert engine.owner(ID).waiting == []

    def test_the_end_of_the_daemon(self, engine, boxes):
        boxes(echo, started=True, OpenStdin=True)
        first = Attached(engine, "/containers/x/attach?" + EVERYTHING)
        first.send(b"x")
        assert first.read(9) and engine.busy()
        engine.hang_up()
        assert first.rest() == b"" and engine.containerd.get_task(ID).status == "running"

    HANDSHAKE = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}

    def test_attach_by_websocket(self, engine, boxes, fake):
        boxes(echo, OpenStdin=True, StdinOnce=True)
        first = Attached(engine, "/containers/x/attach/ws?" + EVERYTHING, method="GET", headers=self.HANDSHAKE)
        assert (first.response.body.protocol, first.response.headers) == ("websocket", {"Sec-WebSocket-Accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="})
        first.send(client_frame(b"one", 1))
        assert ask(engine, "POST", "/containers/x/start").status == 204
        assert first.read(5) == b"\x82\x03one"
        first.send(client_frame(b"x" * 200))
        assert first.read(204) == b"\x82\x7e\0\xc8" + b"x" * 200
        # The goodbye is the end of its input, too.
        first.send(client_frame(b"\x03\xe8", 8))
        assert first.rest() == b"\x88\x02\x03\xe8" and until(lambda: engine.containerd.get_task(ID).exit_status == 7)

    def test_output_by_websocket(self, engine, boxes, fake):
        boxes(lambda process: process.stdout.write(b"out") and process.wait_signal())
        first = Attached(engine, "/containers/x/attach/ws?stream=1&stdout=1", method="GET", headers=self.HANDSHAKE)
        assert ask(engine, "POST", "/containers/x/start").status == 204
        first.send(client_frame(b"hi", 9))
        assert first.read(9) in (b"\x82\x03out\x8a\x02hi", b"\x8a\x02hi\x82\x03out")
        fake.exit(ID)
        assert first.rest() == b"\x88\x02\x03\xe8"

    def test_sizes_of_a_terminal(self, engine, boxes, fake):
        boxes(echo, OpenStdin=True, Tty=True, HostConfig={"ConsoleSize": [30, 90]}, started=True)
        assert fake.processes[ID, ""].size == (30, 90)
        assert ask(engine, "POST", "/containers/x/resize?h=40&w=100").status == 200 and fake.processes[ID, ""].size == (40, 100)
        fake.exit(ID)
        assert ask(engine, "POST", "/containers/x/resize?h=40&w=100").status == 409

    def test_no_size_without_a_terminal(self, engine, boxes, fake):
        boxes(lambda process: process.wait_signal(), HostConfig={"ConsoleSize": [30, 90]}, started=True)
        assert ask(engine, "POST", "/containers/x/resize?h=40&w=100").status == 200 and fake.processes[ID, ""].size is None

    def test_logs_of_one_attached_before_the_start_come_first(self, logged):
        request = nerdctld.Request("POST", "/", query={"stream": ["1"], "logs": ["1"], "stdout": ["1"]})
        attachment, serve, _, _ = nerdctld.attach(logged, request, "tstdone", framed=True)
        assert logged.take_waiting(identity(logged, "tstdone")) == [attachment]
        connection, far = pair()
        starter = threading.Thread(target=lambda: (attachment.put(1, b"new"), attachment.finish()))
        starter.start()
        serve(connection)
        starter.join(5)
        connection.sock.close()
        frames = unframe(drain(far))
        assert b"".join(data for _, data in frames) == b"a\ncd\nnew" and {kind for kind, _ in frames} == {1}

    def test_logs_alone_do_not_wait(self, logged, monkeypatch):
        told = []
        monkeypatch.setattr(nerdctld, "follow_attached", lambda engine, container, attachment, file, follow: (told.append(follow), file.close(), attachment.finish()))
        for query in ({"logs": ["1"]}, {"logs": ["1"], "stream": ["1"]}):
            nerdctld.attach(logged, nerdctld.Request("POST", "/", query=query), "tstweb", framed=False)[1](pair()[0])
        assert told == [False, True]

    def websocket(self):
        connection, far = pair()
        return nerdctld.WebSocket(connection), far

    @pytest.mark.parametrize("size", [1, 125, 126, 65535, 65536, 300000])
    def test_websocket_frames(self, size):
        sock, far = self.websocket()
        payload = os.urandom(size)
        sender = threading.Thread(target=far.sendall, args=(client_frame(payload),))
        sender.start()
        assert sock.recv() == payload
        sender.join(5)
        data, rest = b"", sock.send_now(payload[:1], payload[1:])
        assert size < 300000 or rest
        while len(data) < size + (2 if size < 126 else 4 if size < 65536 else 10):
            data += far.recv(65536)
            rest = rest and sock.send_now(rest)
        assert data[0] == 0x82 and data[-size:] == payload and not rest
        assert data[1] == (size if size < 126 else 126 if size < 65536 else 127)

    def test_websocket_frames_are_not_mixed(self, monkeypatch):
        """What the client does not take at once is sent to its end before anything else, wherever it was cut."""
        sock, far = self.websocket()
        taken, now = [], nerdctld.Connection.send_now

        def send_now(self, *parts):
            data = b"".join(parts)
            count = taken.pop(0) if taken else len(data)
            assert now(self, data[:count]) == b""
            return data[count:]
        monkeypatch.setattr(nerdctld.Connection, "send_now", send_now)
        for first in (0, 1, 2, 3, 5):
            taken[:] = first, 1
            rest = sock.send_now(b"da", b"ta")
            far.send(client_frame(b"hi", 9) + client_frame(b"in"))
            assert sock.recv() == b"in"
            rest = sock.send_now(rest, b"more")
            while rest:
                rest = sock.send_now(rest)
            assert far.recv(1000) == b"\x82\x04data\x8a\x02hi\x82\x04more", first

    def test_websocket_control_frames(self):
        sock, far = self.websocket()
        far.sendall(client_frame(b"hi", 9) + client_frame(b"fra", 1, final=0) + client_frame(b"", 2) + client_frame(b"gment", 0) + client_frame(b"\x03\xe8", 8) + client_frame(b"late"))
        assert [sock.recv(), sock.recv(), sock.recv(), sock.recv()] == [b"fra", b"gment", b"", b""]
        assert far.recv(100) == b"\x8a\x02hi" + b"\x88\x02\x03\xe8"

    @pytest.mark.parametrize("data", [b"\x82\x01x", b"\xc2\x81\0\0\0\0x", b"\x89\xfe\0\x7e" + bytes(130), b"\x82\xff" + (1 << 40).to_bytes(8, "big") + bytes(8), b"\x82"])
    def test_websocket_that_breaks_the_rules(self, data):
        sock, far = self.websocket()
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        assert sock.recv() == b"" and sock.closed == (len(data) > 1)
        sock.sock.close()
        assert drain(far) in (b"", b"\x88\x02\x03\xea")


###############################################################################
# Exec
###############################################################################


class TestExec:
    def create(self, engine, config, name="tstweb"):
        return ask(engine, "POST", f"/containers/{name}/exec", config)

    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """The root of the process 4321, with accounts."""
        root = tmp_path / "root"
        (root / "etc").mkdir(parents=True)
        (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nuser:x:1000:1001::/:/bin/sh\nbad\n")
        (root / "etc/group").write_text("root:x:0:\nwheel:x:10:root,user\nown:x:1001:\naudio:x:29:other,user\nmore:x:30\n")
        opened = nerdctld.opened_below
        monkeypatch.setattr(nerdctld, "opened_below", lambda path, *rest, **more: opened(str(root) if path == "/proc/4321/root" else path, *rest, **more))
        return root

    def process(self, config, **request):
        """The OCI process of an exec in a container of this create request."""
        container = container_of(nerdctld.request_labels(request), nerdctld.TaskRecord(4321, "running", 0, 0, ""), spec={"process": OWN})
        return nerdctld.exec_process(nerdctld.Exec(container, {"Cmd": ["a"], **config}), container)

    @pytest.fixture
    def box(self, engine, boxes):
        """A container that runs."""
        boxes(lambda process: process.wait_signal(), started=True)
        return engine

    def made(self, engine, **config):
        """The id of a new exec, which has both outputs unless it is said."""
        config = {"Cmd": ["program", "a b"], "AttachStdout": True, "AttachStderr": True, **config}
        answer = self.create(engine, config, "x")
        assert answer.status == 201, answer.message
        return answer.json["Id"]

    def inspect(self, engine, name, key):
        """A field of an exec."""
        return ask(engine, "GET", f"/exec/{name}/json").json[key]

    def start(self, engine, name, **options):
        """A client on the streams of an exec."""
        return Attached(engine, f"/exec/{name}/start", options)

    def detached(self, engine, name, **options):
        """Start an exec without a client."""
        return ask(engine, "POST", f"/exec/{name}/start", {"Detach": True, **options})

    @pytest.mark.parametrize("config, name, status, message", [
        ({"Cmd": []}, "tstweb", 400, "No exec command specified"), ({}, "tstweb", 400, "No exec command"), ({"Cmd": ["a"]}, "tstdone", 409, "is not running"), ({"Cmd": ["a"]}, "tstpaused", 409, "unpause the container before exec"),
        ({"Cmd": ["a"]}, "nosuch", 404, "No such container: nosuch"), ({"Cmd": ["a"], "DetachKeys": "zz"}, "tstweb", 400, "invalid detach keys"), ({"Cmd": ["a"], "Tty": 1}, "tstweb", 400, "Tty"),
        ({"Cmd": ["a"], "Env": ["=b"]}, "tstweb", 400, "invalid environment variable: =b")])
    def test_refused(self, reading, config, name, status, message):
        answer = self.create(reading, config, name)
        assert answer.status == status and message in answer.message

    def test_fields_in_another_case(self, furnished):
        name = self.create(furnished, {"cmd": ["a", "b"], "attachstdout": True, "detachKeys": "ctrl-p"}).json["Id"]
        told = ask(furnished, "GET", f"/exec/{name}/json").json
        assert (told["OpenStdout"], told["DetachKeys"], told["ProcessConfig"]["arguments"]) == (True, "ctrl-p", ["b"])
        assert self.create(furnished, {"Cmd": ["a"], "detachKeys": "zz"}).status == 400

    def test_inspect(self, furnished):
        name = self.create(furnished, {"Cmd": ["a", "b"], "User": "u", "AttachStdout": True, "Privileged": True}).json["Id"]
        told = ask(furnished, "GET", f"/exec/{name}/json").json
        assert (told["ID"], told["ContainerID"], told["Running"], told["ExitCode"], told["OpenStdout"]) == (name, ID, False, None, True)
        assert told["ProcessConfig"] == {"tty": False, "entrypoint": "a", "arguments": ["b"], "privileged": True, "user": "u"}

    @pytest.mark.parametrize("path", ["GET /exec/x/json", "POST /exec/x/start", "POST /exec/x/resize?h=1&w=1"])
    def test_none(self, reading, path):
        answer = ask(reading, *path.split())
        assert (answer.status, answer.message) == (404, "No such exec instance: x")

    def test_detached(self, box, fake):
        fake.programs["program", "a b"] = lambda process: process.wait_signal()
        name = self.made(box, AttachStdin=True)
        assert self.detached(box, name).status == 200
        assert self.inspect(box, name, "Running") and self.inspect(box, name, "Pid") == fake.execs[ID, name].pid and box.busy()
        for tty in (False, True):
            answer = ask(box, "POST", f"/exec/{name}/start", {"Detach": tty})
            assert (answer.status, answer.message) == (409, f"exec command {name} is already running")
        box.containerd.kill_task(ID, 4, name)
        assert until(lambda: not self.inspect(box, name, "Running"))
        assert (self.inspect(box, name, "ExitCode"), self.inspect(box, name, "Pid")) == (4, 0) and not fake.execs
        answer = self.detached(box, name)
        assert (answer.status, answer.message) == (409, f"exec command {name} has already run")
        assert actions(box, "execID", "exitCode")[-3:] == [
            ("exec_create: program a b", name, None), ("exec_start: program a b", name, None), ("exec_die", name, "4")]

    @pytest.mark.parametrize("made, asked, media, body", [
        (True, False, "multiplexed", b"\1\0\0\0\0\0\0\2hi"), (True, None, "multiplexed", b"\1\0\0\0\0\0\0\2hi"), (True, True, "raw", b"hi"), (False, True, "raw", b"hi"),
        (False, False, "multiplexed", b"\1\0\0\0\0\0\0\2hi")])
    def test_the_start_says_how_output_is_packed(self, box, fake, made, asked, media, body):
        fake.programs["program", "a b"] = lambda process: process.stdout.write(b"hi") and 0
        client = self.start(box, self.made(box, Tty=made), **({} if asked is None else {"Tty": asked}))
        assert (client.response.status, client.response.media_type) == (101, f"application/vnd.docker.{media}-stream")
        assert client.rest() == body

    @pytest.mark.parametrize("config, told", [
        ({}, [(1, b"out"), (2, b"err")]), ({"AttachStderr": False}, [(1, b"out")]), ({"AttachStdout": False}, [(2, b"err")]), ({"AttachStdout": False, "AttachStderr": False}, [])])
    def test_both_outputs_and_the_exit_code(self, box, fake, config, told):
        """Who has seen the end of the output finds the exit code."""
        fake.programs["program", "a b"] = lambda process: process.stdout.write(b"out") and process.stderr.write(b"err") and 42
        name = self.made(box, **config)
        assert sorted(unframe(self.start(box, name).rest())) == told
        assert (self.inspect(box, name, "ExitCode"), self.inspect(box, name, "Running")) == (42, False)

    def test_input_and_its_end(self, box, fake):
        fake.programs["program", "a b"] = echo
        name, data, found = self.made(box, AttachStdin=True), os.urandom(1 << 18), []
        client = self.start(box, name)
        reader = threading.Thread(target=lambda: found.append(client.rest()))
        reader.start()
        client.send(data, half=True)
        reader.join(10)
        assert unframe(found[0]) == [(1, data)] and self.inspect(box, name, "ExitCode") == 7 and until(lambda: not threads("exec"))
        # Without stdin what is sent is nobody's.
        fake.programs["program", "a b"] = lambda process: process.stdin is None and 9
        name = self.made(box)
        client = self.start(box, name)
        client.send(b"x", half=True)
        assert client.rest() == b"" and self.inspect(box, name, "ExitCode") == 9

    def test_terminal(self, box, fake):
        fake.programs["program", "a b"] = echo
        name = self.made(box, AttachStdin=True, Tty=True, DetachKeys="ctrl-a,b")
        client = self.start(box, name, Tty=True, ConsoleSize=[30, 90])
        client.send(b"in")
        assert client.read(2) == b"in"
        process = fake.processes[ID, name]
        assert process.terminal and process.spec["consoleSize"] == {"height": 30, "width": 90}
        assert ask(box, "POST", f"/exec/{name}/resize?h=40&w=100").status == 200 and process.size == (40, 100)
        # It goes on without the client, who has detached.
        client.send(b"\x01b")
        assert client.rest() == b"" and self.inspect(box, name, "Running")
        fake.exit(ID, 5, name)
        assert until(lambda: self.inspect(box, name, "ExitCode") == 5)
        assert ask(box, "POST", f"/exec/{name}/resize?h=40&w=100").status == 200
        assert ask(box, "POST", f"/exec/{name}/resize?h=70000&w=100").status == 400

    @pytest.mark.parametrize("config, options, resized, told", [
        ({"Tty": True, "ConsoleSize": [3, 4]}, {}, False, True), ({"Tty": True, "ConsoleSize": [1, 2]}, {"ConsoleSize": [3, 4]}, False, True), ({"Tty": True}, {}, True, True),
        ({"ConsoleSize": [3, 4]}, {}, False, False), ({"Tty": True, "ConsoleSize": [0, 0]}, {}, False, False), ({"Tty": True, "ConsoleSize": [3]}, {}, False, False)])
    def test_size_before_the_start(self, reading, monkeypatch, config, options, resized, told):
        started = []
        monkeypatch.setattr(nerdctld, "run_exec", lambda engine, instance, streams: started.append(nerdctld.exec_process(instance, instance.container)))
        name = self.create(reading, {"Cmd": ["a"], **config}).json["Id"]
        if resized:
            assert ask(reading, "POST", f"/exec/{name}/resize?h=3&w=4").status == 200
        assert self.detached(reading, name, **options).status == 200
        assert started[0].get("consoleSize") == ({"height": 3, "width": 4} if told else None)
        assert self.detached(reading, name, ConsoleSize="x").status == 400

    def test_what_is_not_asked_for_is_as_with_the_container(self, box, fake):
        found, own = [], {key: value for key, value in OWN.items() if key != "consoleSize"}
        fake.programs["program", "a b"] = lambda process: found.append(process.spec) or 0
        assert self.detached(box, self.made(box)).status == 200 and until(lambda: found) == [{**own, "args": ["program", "a b"]}]
        given = self.process({"WorkingDir": "/w", "Tty": True, "User": ""})
        assert (given["cwd"], given["terminal"], given["user"]) == ("/w", True, {"uid": 7, "gid": 8})

    @pytest.mark.parametrize("tty, given, told", [
        (False, [], ["PATH=/bin", "A=1"]), (False, ["A=2", "B=x=y", "C="], ["PATH=/bin", "A=2", "B=x=y", "C="]), (False, ["A", "NOSUCH"], ["PATH=/bin"]), (True, [], ["PATH=/bin", "A=1", "TERM=xterm"]),
        (True, ["TERM=vt100"], ["PATH=/bin", "A=1", "TERM=vt100"]), (True, ["TERM"], ["PATH=/bin", "A=1"])])
    def test_environment(self, tty, given, told):
        assert self.process({"Tty": tty, "Env": given})["env"] == told

    @pytest.mark.parametrize("user, told", [
        ("user", {"uid": 1000, "gid": 1001, "additionalGids": [10, 29, 1001]}), ("1000", {"uid": 1000, "gid": 1001, "additionalGids": [10, 29, 1001]}), ("user:audio", {"uid": 1000, "gid": 29}),
        ("user:77", {"uid": 1000, "gid": 77}), ("root", {"uid": 0, "gid": 0, "additionalGids": [0, 10]}), ("5:6", {"uid": 5, "gid": 6}), ("5", {"uid": 5, "gid": 0}), (":wheel", {"uid": 0, "gid": 10}), ("5:more", {"uid": 5, "gid": 30})])
    def test_user(self, root, user, told):
        assert self.process({"User": user})["user"] == told

    @pytest.mark.parametrize("user, told", [
        ("nosuch", "unable to find user nosuch: no matching entries in passwd file"), ("nosuch:x", "unable to find user nosuch: no matching entries in passwd file"), ("bad", "unable to find user bad: no matching entries in passwd file"),
        ("user:nosuch", "unable to find group nosuch: no matching entries in group file")])
    def test_user_that_is_not_there(self, root, user, told):
        assert refusal(self.process, {"User": user}) == ("BadParameter", told)

    def test_user_that_is_told_to_be_not_there(self, box, fake):
        told = "unable to find user nosuchuser: no matching entries in passwd file"
        answer = self.detached(box, self.made(box, User="nosuchuser"))
        assert (answer.status, answer.message) == (400, told) and not fake.execs
        name = self.made(box, User="nosuchuser")
        assert unframe(self.start(box, name).rest()) == [(1, told.encode() + b"\r\n")] and self.inspect(box, name, "ExitCode") == 126

    @pytest.mark.parametrize("make, known", [
        (lambda etc: (etc / "passwd").write_text("root:x:0:0\nuser:x:1:2\n"), True), (lambda etc: (etc / "passwd").write_bytes(b"\xff:x:0:0\nuser:x:1:2\n"), True), (lambda etc: (etc / "passwd").write_text("users:x:1:2\n"), False),
        (lambda etc: os.mkfifo(etc / "passwd"), False), (lambda etc: (etc / "passwd").symlink_to("/etc/real"), True), (lambda etc: (etc / "passwd").symlink_to("passwd"), False), (lambda etc: None, False)])
    def test_passwd_is_looked_at_with_care(self, root, make, known):
        (root / "etc/passwd").unlink()
        (root / "etc/real").write_text("user:x:1:2\n")
        make(root / "etc")
        if known:
            assert self.process({"User": "user"})["user"]["uid"] == 1
        else:
            assert "unable to find user user" in refusal(self.process, {"User": "user"})[1]

    def test_groups_that_the_container_was_given(self, root):
        assert [self.process({"User": each}, HostConfig={"GroupAdd": ["audio", "99"]})["user"].get("additionalGids") for each in ("user", "5", "user:own", "")] == [
            [10, 29, 99, 1001], [29, 99], [29, 99], None]

    def test_privileged(self):
        given = self.process({"Privileged": True})
        every = given["capabilities"]["effective"]
        # A runtime refuses what the machine itself has not.
        bounds = int(re.search(r"CapBnd:\s*(\w+)", pathlib.Path("/proc/self/status").read_text())[1], 16)
        assert every[:2] == ["CAP_CHOWN", "CAP_DAC_OVERRIDE"] and "CAP_SYS_ADMIN" in every and len(every) == bin(bounds).count("1")
        assert ("CAP_SYS_RESOURCE" in every) == bool(bounds >> 24 & 1)
        assert given["capabilities"] == {"bounding": every, "effective": every, "permitted": every} and "apparmorProfile" not in given

    @pytest.mark.parametrize("words, status, code", [
        ('OCI runtime exec failed: exec failed: unable to start container process: exec: "program": executable file not found in $PATH', 400, 127),
        ('OCI runtime exec failed: exec failed: unable to start container process: exec: "/x": stat /x: no such file or directory', 400, 127),
        ('OCI runtime exec failed: exec failed: unable to start container process: exec: "/x": permission denied', 400, 126),
        ('OCI runtime exec failed: exec failed: unable to start container process: exec: "/x": is a directory', 500, 126), ("something odd", 500, 126)])
    def test_what_cannot_run(self, box, fake, words, status, code):
        fake.refuse["program", "a b"] = words
        name = self.made(box)
        answer = self.detached(box, name)
        assert (answer.status, answer.message) == (status, words) and self.inspect(box, name, "ExitCode") == code
        for config in ({}, {"AttachStdout": False}):
            name = self.made(box, **config)
            client = self.start(box, name)
            assert unframe(client.rest()) == [(1, words.encode() + b"\r\n")] and client.response.status == 101
            assert (self.inspect(box, name, "ExitCode"), self.inspect(box, name, "Running")) == (code, False)
        # Nothing of it is left with containerd, and it cannot be tried again.
        assert not fake.execs and self.detached(box, name).message == f"exec command {name} has already run"

    def test_containerd_is_not_there(self, box, fake):
        name = self.made(box)

        def refuse():
            raise HangUp
        fake.before["Tasks/Exec"] = refuse
        assert self.detached(box, name).status == 503

    def test_the_container_does_not_run(self, box, fake):
        first, second = self.made(box), self.made(box)
        fake.pause(ID)
        for detach in (False, True):
            answer = ask(box, "POST", f"/exec/{first}/start", {"Detach": detach})
            assert answer.status == 409 and "is paused, unpause the container before exec" in answer.message
        fake.pause(ID, False)
        fake.exit(ID)
        for detach in (False, True):
            answer = ask(box, "POST", f"/exec/{first}/start", {"Detach": detach})
            assert (answer.status, answer.message) == (409, f"container {ID} is not running")

    def test_the_container_ends_at_its_start(self, box, fake):
        """After the 101 only the stream is there to tell it."""
        fake.before["Tasks/Exec"] = lambda: fake.exit(ID)
        name = self.made(box)
        told = unframe(self.start(box, name).rest())
        assert len(told) == 1 and b"cannot exec in a stopped state" in told[0][1]

    def test_the_container_ends_meanwhile(self, box, fake):
        fake.programs["program", "a b"] = lambda process: process.stdout.write(b"out") and process.wait_signal()
        name = self.made(box, AttachStdin=True)
        client = self.start(box, name)
        assert client.read(11)
        fake.exit(ID)
        assert client.rest() == b"" and self.inspect(box, name, "ExitCode") == 137 and actions(box, "exitCode")[-1] == ("exec_die", "137")

    def test_containerd_is_restarted_meanwhile(self, box, fake):
        """The command goes on, and its end is heard of however long that takes."""
        fake.programs["program", "a b"] = lambda process: process.wait_signal()
        name = self.made(box)
        self.detached(box, name)
        assert until(lambda: fake.calls["Tasks/Wait"])
        fake.stop_serving()
        fake.start_serving()
        assert until(lambda: fake.calls["Tasks/Wait"] > 1) and self.inspect(box, name, "Running")
        box.containerd.kill_task(ID, 4, name)
        assert until(lambda: not self.inspect(box, name, "Running")) and self.inspect(box, name, "ExitCode") == 4

    @pytest.mark.parametrize("stdin", [False, True])
    def test_a_client_that_leaves(self, box, fake, stdin):
        """The command goes on, to the end of its input or of itself."""
        fake.programs["program", "a b"] = (lambda process: process.stdout.write(b"out") and process.stdin.read() and process.wait_signal()) if stdin else (
            lambda process: process.stdout.write(b"out") and process.wait_signal())
        name = self.made(box, AttachStdin=stdin)
        client = self.start(box, name)
        client.read(11)
        if stdin:
            client.send(b"x")
        client.leave()
        assert self.inspect(box, name, "Running")
        box.containerd.kill_task(ID, 4, name)
        assert until(lambda: self.inspect(box, name, "ExitCode") == 4) and until(lambda: not threads("exec")) == True

    def test_old_ones_are_forgotten(self, furnished, monkeypatch):
        monkeypatch.setattr(nerdctld, "EXECS_KEPT", 3)
        first = self.create(furnished, {"Cmd": ["a"]}).json["Id"]
        furnished.execs[first].running = True
        names = [self.create(furnished, {"Cmd": ["a"]}).json["Id"] for _ in range(6)]
        assert list(furnished.execs) == [first, *names[-3:]]


###############################################################################
# Supervision
###############################################################################


CHECK = {"Test": ["CMD", "check"], "Interval": 5 * 10**7, "Retries": 2}


class Checked:
    """A container with health checks, in an engine that follows events: `program` is the check, `found` what is told."""

    def __init__(self, engine, fake, folder, **check):
        self.engine, self.fake, self.folder = engine, fake, folder
        self.program = lambda process: 0
        fake.programs[("check",)] = lambda process: self.program(process)
        fake.programs[("sleep",)] = lambda process: 128 + process.wait_signal()
        fake.create(ID, {"nerdctl/name": "x", "nerdctl/state-dir": str(folder), "nerdctl/healthcheck": json.dumps({**CHECK, **check})},
                    spec={"process": {"args": ["sleep"], "env": ["A=b"], "cwd": "/", "user": {"uid": 0, "gid": 0}}})
        engine.caretaker = nerdctld.Caretaker(engine)
        follow(engine, fake)

    def start(self):
        """Start it."""
        assert ask(self.engine, "POST", "/containers/x/start").status == 204

    def start_unwatched(self, pid=4242):
        """Have others start it while no daemon looks."""
        self.fake.start(ID, pid)
        assert until(lambda: self.engine.caretaker.cared.get(ID))
        self.engine.caretaker.release(ID)

    @property
    def health(self):
        """State.Health as clients see it, without the log."""
        told = ask(self.engine, "GET", "/containers/x/json").json["State"].get("Health")
        return told and (told["Status"], told["FailingStreak"])

    @property
    def log(self):
        """The log of it: exit codes and output."""
        return [(each["ExitCode"], each["Output"]) for each in ask(self.engine, "GET", "/containers/x/json").json["State"]["Health"]["Log"]]

    @property
    def events(self):
        """What was told, without ids."""
        self.engine.settle()
        return [each["Action"] for each in self.engine.journal.history if each["Type"] == "container"]

    def nothing_left(self):
        """Whether nothing is there of a check."""
        return not (self.fake.execs or list(self.folder.glob(nerdctld.FIFO_FOLDER + "*")) or any(each.running for each in self.engine.execs.values()))


@pytest.fixture
def checked(engine, fake, tmp_path):
    """A container that is checked each 50 ms; unhealthy at the second failure."""
    folder = tmp_path / "state"
    folder.mkdir()
    away(tmp_path)
    found = Checked(engine, fake, folder)
    yield found
    engine.caretaker.release(ID)
    with contextlib.suppress(KeyError):
        fake.exit(ID)


def said(*codes, out=b"out"):
    """A check that ends so one time after the other, the last of these for good."""
    left = list(codes)

    def program(process):
        process.stdout.write(out)
        return left.pop(0) if len(left) > 1 else left[0]

    return program


class TestSupervision:
    @pytest.mark.parametrize("check, before, code, age, after", [
        ({}, ("starting", 0), 0, 1, ("healthy", 0)), ({}, ("unhealthy", 9), 0, 1, ("healthy", 0)), ({}, ("starting", 0), 1, 1, ("starting", 1)), ({}, ("healthy", 0), -1, 1, ("healthy", 1)),
        ({}, ("healthy", 2), 1, 1, ("unhealthy", 3)), ({}, ("unhealthy", 3), 2, 1, ("unhealthy", 4)), ({"Retries": 1}, ("starting", 0), 137, 1, ("unhealthy", 1)),
        ({"Retries": 1, "StartPeriod": 2 * 10**9}, ("starting", 0), 1, 1.9, ("starting", 0)), ({"Retries": 1, "StartPeriod": 2 * 10**9}, ("starting", 0), 1, 2, ("unhealthy", 1)),
        ({"Retries": 1, "StartPeriod": 2 * 10**9}, ("healthy", 0), 1, 1, ("unhealthy", 1)), ({"StartPeriod": 2 * 10**9}, ("starting", 0), 0, 1, ("healthy", 0)),
        # A container that went on after a pause is unhealthy until it is checked, whatever the number of failures.
        ({}, ("unhealthy", 0), 1, 1, ("unhealthy", 1))])
    def test_next_health(self, check, before, code, age, after):
        assert nerdctld.next_health(check, *before, code, age) == after

    @pytest.mark.parametrize("check, age, starting, pause", [
        ({}, 1, True, 30), ({"Interval": 2 * 10**9}, 1, True, 2), ({"StartPeriod": 9 * 10**9}, 1, True, 5), ({"StartPeriod": 9 * 10**9, "StartInterval": 10**9}, 1, True, 1),
        ({"StartPeriod": 9 * 10**9, "StartInterval": 10**9}, 1, False, 30), ({"StartPeriod": 9 * 10**9, "StartInterval": 10**9}, 10, True, 30)])
    def test_pause_between_health_checks(self, check, age, starting, pause):
        assert nerdctld.check_pause(check, age, starting) == pause

    @pytest.mark.parametrize("nanoseconds, text", [(3 * 10**9, "3s"), (15 * 10**8, "1.5s"), (90 * 10**9, "1m30s"), (3600 * 10**9, "1h0m0s"), (10**6, "1ms"), (15 * 10**5, "1.5ms")])
    def test_durations_of_go(self, nanoseconds, text):
        assert nerdctld.go_duration(nanoseconds) == text

    @pytest.mark.parametrize("test, shell, words", [
        (["CMD", "a", "b c"], None, ["a", "b c"]), (["CMD-SHELL", "a b"], None, ["/bin/sh", "-c", "a b"]), (["CMD-SHELL", "a", "b"], ["/bin/ash", "-xc"], ["/bin/ash", "-xc", "a", "b"])])
    def test_words(self, test, shell, words):
        asked = nerdctld.request_labels({"Image": "x", "Healthcheck": {"Test": test}, **({"Shell": shell} if shell else {})})
        assert nerdctld.health_command(container_of(asked)) == words

    def test_results_are_those_of_nerdctl(self, tmp_path):
        """As many as Docker has, oldest first, whoever has written them, and whatever nerdctl has let grow."""
        tmp_path = tmp_path / "state"
        tmp_path.mkdir()
        container = container_of({"nerdctl/state-dir": str(tmp_path)})
        assert nerdctld.health_results(container) == []
        row = lambda number, output="x": {"Start": "", "End": "", "ExitCode": number, "Output": output}
        lines = [json.dumps(row(number)) for number in range(8)]
        (tmp_path / "health.json").write_text("\n".join([*lines, "{", "[1]", "", json.dumps(row(8, "y" * 9000))]) + "\n")
        assert [(each["ExitCode"], len(each["Output"])) for each in nerdctld.health_results(container)] == [(7, 1), (8, 4099)]
        for number in range(20, 30):
            nerdctld.keep_result(container, row(number))
        assert [each["ExitCode"] for each in nerdctld.health_results(container)] == list(range(25, 30))
        assert [each.name for each in tmp_path.iterdir()] == ["health.json"] and len((tmp_path / "health.json").read_text().splitlines()) == 5
        # Where it cannot be kept the check counts all the same.
        nerdctld.keep_result(container_of({"nerdctl/state-dir": "/nosuch"}), row(1))

    def test_states(self, checked):
        assert checked.health is None
        checked.program = said(1, 1, 0)
        checked.start()
        assert checked.health == ("starting", 0)
        assert until(lambda: checked.health == ("unhealthy", 2)) and checked.log == [(1, "out")] * 2
        assert until(lambda: checked.health == ("healthy", 0)) and checked.log[:3] == [(1, "out"), (1, "out"), (0, "out")]
        once = ["exec_create: check", "exec_start: check", "exec_die"]
        assert checked.events[:12] == ["start", *once, *once, "health_status: unhealthy", *once, "health_status: healthy"]
        die = next(each for each in checked.engine.journal.history if each["Action"] == "exec_die")
        assert die["Actor"]["Attributes"]["exitCode"] == "1" and len(die["Actor"]["Attributes"]["execID"]) == 64
        told = json.loads(checked.fake.containers[ID].labels["nerdctl/healthstate"])
        assert told == {"Status": "healthy", "FailingStreak": 0, "Pid": checked.fake.tasks[ID].pid, "InStartPeriod": False}
        # Nobody is told what has not changed.
        updates = checked.fake.calls["Containers/Update"]
        time.sleep(0.3)
        assert checked.fake.calls["Containers/Update"] == updates and checked.events.count("health_status: healthy") == 1

    def test_over_a_stop_and_a_start(self, checked):
        checked.program = said(0)
        checked.start()
        assert until(lambda: checked.health == ("healthy", 0))
        assert ask(checked.engine, "POST", "/containers/x/stop").status == 204
        assert checked.health == ("unhealthy", 0) and until(lambda: not checked.engine.caretaker.cared) and until(checked.nothing_left)
        number = len(checked.log)
        checked.program = said(1)
        checked.start()
        assert checked.health[0] == "starting" and len(checked.log) >= min(number, 5)
        assert json.loads(checked.fake.containers[ID].labels["nerdctl/healthstate"])["Status"] == "starting"
        assert until(lambda: checked.health[0] == "unhealthy")

    def test_started_again_by_others(self, checked):
        """What was known is of the process that has ended."""
        checked.program = said(0)
        checked.start()
        assert until(lambda: checked.health == ("healthy", 0))
        checked.program = said(1)
        checked.fake.exit(ID)
        checked.fake.forget(ID)
        checked.fake.start(ID)
        assert checked.health[0] == "starting" and until(lambda: checked.health == ("unhealthy", 2))

    def test_paused(self, checked):
        checked.program = said(0)
        checked.start()
        assert until(lambda: checked.health == ("healthy", 0))
        assert ask(checked.engine, "POST", "/containers/x/pause").status == 204
        assert checked.health == ("unhealthy", 0)
        assert until(lambda: '"unhealthy"' in checked.fake.containers[ID].labels["nerdctl/healthstate"])
        assert until(checked.nothing_left)
        execs = checked.fake.calls["Tasks/Exec"]
        time.sleep(0.2)
        assert checked.fake.calls["Tasks/Exec"] == execs and ID in checked.engine.caretaker.cared
        assert ask(checked.engine, "POST", "/containers/x/unpause").status == 204
        assert until(lambda: checked.health == ("healthy", 0))
        told = lambda: [each for each in checked.events if each.startswith(("health", "pause", "unpause"))]
        assert until(lambda: told() == ["health_status: healthy", "pause", "unpause", "health_status: healthy"]), told()

    def test_timeout(self, checked):
        checked.fake.label(ID, **{"nerdctl/healthcheck": json.dumps({**CHECK, "Timeout": 10**8, "Retries": 1})})
        checked.program = lambda process: process.stdout.write(b"begun") and process.wait_signal()
        checked.start()
        assert until(lambda: checked.health == ("unhealthy", 1))
        assert checked.log[0] == (-1, "Health check exceeded timeout (100ms): begun")
        assert checked.fake.asked["Tasks/Kill"][3] == signal.SIGKILL and "exec_die" in checked.events
        checked.program = said(0)
        assert until(lambda: checked.health == ("healthy", 0)) and until(checked.nothing_left)

    def test_output_is_limited(self, checked):
        checked.program = said(0, out=b"\xff" + b"x" * 9000)
        checked.start()
        assert until(lambda: checked.health == ("healthy", 0))
        assert checked.log[0][1] == "\ufffd" + "x" * 4095 + "..."

    def test_what_cannot_be_run(self, checked):
        """Also where the words are those that nerdctl has for what there is not."""
        words = 'OCI runtime exec failed: exec failed: unable to start container process: exec: "check": stat check: no such file or directory'
        checked.fake.refuse[("check",)] = words
        checked.start()
        assert until(lambda: checked.health == ("unhealthy", 2)) and checked.log[0] == (-1, words)
        assert until(checked.nothing_left)

    @pytest.mark.parametrize("end", ["stop", "die", "rm"])
    def test_a_container_that_ends_in_the_middle(self, checked, scripted, end):
        running = threading.Event()
        checked.program = lambda process: running.set() or process.wait_signal()
        scripted.on("rm", stdout=ID + "\n", does=functools.partial(carry_out, checked.fake))
        checked.start()
        assert running.wait(10)
        if end == "die":
            checked.fake.exit(ID)
        else:
            assert ask(checked.engine, *(("POST", "/containers/x/stop") if end == "stop" else ("DELETE", "/containers/x?force=1"))).status == 204
        assert until(lambda: not checked.engine.caretaker.cared) and until(checked.nothing_left)
        # It says nothing of the container's health.
        assert end == "rm" or checked.health == ("unhealthy", 0) and checked.log == []
        assert until(lambda: not [each for each in threading.enumerate() if each.name in ("health", "streams", "exec")])

    def test_containerd_goes_in_the_middle(self, checked):
        """The check goes on without it, and its end is heard of when it is back."""
        running, gate = threading.Event(), threading.Event()
        checked.program = lambda process: running.set() or int(not gate.wait(10))
        checked.start()
        assert running.wait(10)
        checked.fake.stop_serving()
        time.sleep(0.2)
        checked.fake.start_serving()
        gate.set()
        assert until(lambda: checked.health == ("healthy", 0)) and until(checked.nothing_left)

    @pytest.mark.parametrize("starting", [True, False], ids=["being started", "running"])
    def test_what_a_daemon_that_was_killed_leaves(self, checked, starting):
        """A command, and its FIFOs, which nobody reads: the next daemon ends it."""
        checked.start_unwatched()
        path = checked.folder / (nerdctld.FIFO_FOLDER + "left")
        path.mkdir()
        streams = nerdctld.TaskStreams("", *(str(path / each) for each in ("stdout", "stderr")))
        for each in streams[1:3]:
            os.mkfifo(each)
        name = nerdctld.exec_name(str(path))
        checked.program = lambda process: process.wait_signal()
        checked.engine.containerd.add_exec(ID, name, {"args": ["check"]}, streams)
        ends = [] if starting else [os.open(each, os.O_RDONLY | os.O_NONBLOCK) for each in streams[1:3]]

        def start():
            # The daemon that has asked for it is there no more.
            with contextlib.suppress(nerdctld.ApiError):
                checked.engine.containerd.start_task(ID, name)

        thread = threading.Thread(target=start, daemon=True)
        thread.start()
        if starting:
            time.sleep(0.1)
        else:
            thread.join(10)
            for each in ends:
                os.close(each)
        checked.program = said(0)
        checked.engine.caretaker.look()
        assert until(lambda: (ID, name) not in checked.fake.execs) and until(lambda: not path.exists())
        assert until(lambda: checked.health == ("healthy", 0))

    @pytest.mark.parametrize("labels, given_back", [
        ({"nerdctld/attached.n": '{"name":"eth1"}'}, True),
        ({"nerdctl/ports": '[{"HostPort":1,"ContainerPort":1,"Protocol":"tcp","HostIP":"0.0.0.0"}]'}, True), ({}, False)])
    def test_what_ended_while_no_daemon_ran_gives_back_what_it_has(self, engine, fake, monkeypatch, labels, given_back):
        calls = []
        for name in ("release_networks", "take_down_network"):
            monkeypatch.setattr(nerdctld, name, lambda engine, container, name=name: calls.append((name, container.id)))
        fake.create(ID, {"nerdctl/name": "box", **labels})
        fake.start(ID)
        fake.exit(ID)
        caretaker = nerdctld.Caretaker(engine)
        caretaker.look()
        assert until(lambda: len(calls) == 2, 10 if given_back else 0.05) == given_back
        assert calls == ([("release_networks", ID), ("take_down_network", ID)] if given_back else [])

    def test_the_state_outlives_the_daemon(self, checked):
        """A container that runs keeps its health, and is checked at once when a check is due."""
        checked.start_unwatched(os.getpid())
        checked.fake.label(ID, **{"nerdctl/healthstate": json.dumps({"Status": "healthy", "FailingStreak": 1, "Pid": os.getpid()}),
                                  "nerdctl/healthcheck": json.dumps({**CHECK, "Retries": 3, "Interval": 2 * 10**8})})
        checked.program = said(1)
        assert checked.health == ("healthy", 1)
        checked.engine.caretaker.look()
        assert until(lambda: checked.health == ("healthy", 2)) and until(lambda: checked.health == ("unhealthy", 3))

    def test_a_timer_of_systemd_checks_by_itself(self, checked, tmp_path, monkeypatch):
        """What it finds is told; when there is none any more the daemon goes on."""
        monkeypatch.setattr(nerdctld.HealthWatch, "TIMERS", str(tmp_path))
        (tmp_path / f"{ID}.timer").touch()
        checked.program = said(1)
        checked.start()
        time.sleep(0.3)
        assert checked.health == ("starting", 0) and not checked.fake.calls["Tasks/Exec"]
        checked.fake.label(ID, **{"nerdctl/healthstate": '{"Status":"healthy","FailingStreak":0,"InStartPeriod":false}'})
        assert until(lambda: "health_status: healthy" in checked.events)
        (tmp_path / f"{ID}.timer").unlink()
        assert until(lambda: checked.health == ("unhealthy", 2))

    def test_who_is_started_by_others_is_cared_for(self, willing, fake):
        checked, other = "1" * 64, "2" * 64
        willing.caretaker = nerdctld.Caretaker(willing)
        fake.create(checked, {"nerdctl/name": "1", "nerdctl/healthcheck": json.dumps({"Test": ["CMD", "true"], "Interval": 10**12})})
        fake.create(other, {"nerdctl/name": "2"})
        try:
            for each in (checked, other):
                fake.start(each, os.getpid())
            assert until(lambda: set(willing.caretaker.cared) == {checked})
        finally:
            willing.caretaker.release(checked)


###############################################################################
# Archive
###############################################################################


def told_stat(answer):
    """The stat of an archive answer."""
    return json.loads(base64.b64decode(answer.headers["X-Docker-Container-Path-Stat"]))


def tar_with(*names, link=None):
    """A tar of folders (`a/`), files with their name in them, and one link (name, target) at its end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = (tarfile.DIRTYPE, 0) if name.endswith("/") else (tarfile.REGTYPE, len(name))
            tar.addfile(entry, io.BytesIO(name.encode()))
        if link:
            entry = tarfile.TarInfo(link[0])
            entry.type, entry.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(entry)
    return buffer.getvalue()


def names_of(data):
    """The names in a tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [each.name for each in tar]


@pytest.fixture
def rooted(furnished, tmp_path, monkeypatch):
    """tstweb with a root folder of its own."""
    root = tmp_path / "root"
    (root / "etc/sub").mkdir(parents=True)
    (root / "etc/file").write_text("12345")
    (root / "etc/file").chmod(0o4751)
    (tmp_path / "secret").write_text("outside")
    for name, target in (("abs", "/etc"), ("rel", "etc/file"), ("loop", "loop"), ("out", "../../../secret"), ("dangling", "nowhere"), ("etc/up", "../etc/sub"), ("deep", "/abs/up/..")):
        (root / name).symlink_to(target)
    os.mkfifo(root / "fifo")
    monkeypatch.setattr(nerdctld, "container_root", lambda engine, container: str(root))
    return furnished


@pytest.fixture
def reached(rooted, fake, tmp_path):
    """The same for tstdone, which does not run; its OCI spec is what `spec` is at the moment."""
    need_mounts()
    rooted.root, identity = tmp_path / "root", rooted.inventory.container("tstdone").id
    rooted.spec = {"process": {"user": {"uid": 7, "gid": 8}}, "root": {}, "mounts": []}
    record = fake.containers[identity]
    fake.mounts[record.snapshotter, record.snapshot_key] = [("bind", str(rooted.root), ("rbind", "rw"))]

    def put_spec():
        fake.containers[identity] = record._replace(spec=json.dumps(rooted.spec).encode())

    fake.before.update({"Containers/List": put_spec, "Containers/Get": put_spec})
    return rooted


class TestArchive:
    @pytest.mark.parametrize("mode, told", [
        (stat.S_IFREG | 0o644, 0o644), (stat.S_IFDIR | 0o1777, 1 << 31 | 1 << 20 | 0o777), (stat.S_IFLNK | 0o777, 1 << 27 | 0o777), (stat.S_IFIFO | 0o600, 1 << 25 | 0o600), (stat.S_IFSOCK, 1 << 24),
        (stat.S_IFBLK, 1 << 26), (stat.S_IFCHR, 1 << 26 | 1 << 21), (stat.S_IFREG | 0o6755, 1 << 23 | 1 << 22 | 0o755)])
    def test_modes(self, mode, told):
        assert nerdctld.go_mode(mode) == told

    @pytest.mark.parametrize("path, name, size, mode, target", [
        ("/etc/file", "file", 5, 1 << 23 | 0o751, ""), ("etc/file", "file", 5, 1 << 23 | 0o751, ""), ("/abs/file", "file", 5, 1 << 23 | 0o751, ""), ("/rel", "rel", 8, 1 << 27 | 0o777, "/etc/file"),
        ("/etc/up", "up", 10, 1 << 27 | 0o777, "/etc/sub"), ("/out", "out", 15, 1 << 27 | 0o777, "/secret"), ("/dangling", "dangling", 7, 1 << 27 | 0o777, "/nowhere"), ("/deep", "deep", 10, 1 << 27 | 0o777, "/etc"), ("/fifo", "fifo", 0, 1 << 25, ""),
        ("/abs/../etc/./file", "file", 5, 1 << 23 | 0o751, ""), ("/../../etc/file", "file", 5, 1 << 23 | 0o751, "")])
    def test_stat(self, rooted, path, name, size, mode, target):
        answer = ask(rooted, "HEAD", "/containers/tstweb/archive?path=" + path)
        told = told_stat(answer)
        assert (answer.status, told["name"], told["size"], told["linkTarget"]) == (200, name, size, target)
        assert told["mode"] & ~0o777 == mode & ~0o777 and (target or name == "fifo" or told["mode"] == mode)

    @pytest.mark.parametrize("path, status", [("/no", 404), ("/etc/no/x", 404), ("/etc/file/x", 404), ("/etc/file/", 404), ("/rel/", 404), ("/dangling/x", 404), ("/out/", 404), ("/loop/x", 400), ("/loop", 400), ("", 400), ("a%00b", 400), ("/out/x", 404)])
    def test_no_stat(self, rooted, path, status):
        assert ask(rooted, "HEAD", "/containers/tstweb/archive?path=" + path).status == status

    def test_folders_behind_links(self, rooted):
        for path in ("/", "/abs/", "/deep/", "/etc/up/"):
            assert told_stat(ask(rooted, "HEAD", "/containers/tstweb/archive?path=" + path))["mode"] & 1 << 31, path

    def test_a_link_never_leads_out(self, rooted, tmp_path):
        with pytest.raises(OSError):
            nerdctld.stat_below(str(tmp_path / "root"), "/out/")

    @pytest.mark.parametrize("path, names", [
        ("/etc", ["etc", "etc/file", "etc/sub", "etc/up"]), ("/abs/", ["abs", "abs/file", "abs/sub", "abs/up"]), ("/etc/.", [".", "./file", "./sub", "./up"]), ("/rel", ["rel"]), ("/abs/file", ["file"]),
        ("/out", ["out"]), ("/abs/../etc", ["etc", "etc/file", "etc/sub", "etc/up"]), ("/deep/../abs", ["abs"])])
    def test_get(self, reached, path, names):
        answer = ask(reached, "GET", "/containers/tstdone/archive?path=" + path)
        assert (answer.status, names_of(answer.body)) == (200, names)
        told = told_stat(answer)
        assert told["name"] == names[0] and told == told_stat(ask(reached, "HEAD", "/containers/tstdone/archive?path=" + path))
        with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
            entry = tar.getmembers()[0]
            assert (entry.linkname, entry.issym()) == (os.readlink(reached.root / os.path.normpath(path).strip("/")), True) if told["linkTarget"] else not entry.issym()

    def test_get_of_everything(self, reached):
        reached.spec["mounts"] = [{"type": "proc", "destination": "/etc/sub"}]
        (reached.root / "etc/sub/made-up").touch()
        with tarfile.open(fileobj=io.BytesIO(ask(reached, "GET", "/containers/tstdone/archive?path=/").body)) as tar:
            # tarfile takes the slash off that stands for the root.
            assert {each.name for each in tar} == {"", "/abs", "/rel", "/loop", "/out", "/dangling", "/deep", "/fifo", "/etc", "/etc/file", "/etc/sub", "/etc/up"}
            assert tar.extractfile("/etc/file").read() == b"12345"

    @pytest.mark.parametrize("path, status", [("/no", 404), ("/etc/file/x", 404), ("/dangling/x", 404), ("/out/", 404), ("/loop/x", 400)])
    @pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
    def test_none_of_one_that_does_not_run(self, reached, method, path, status):
        answer = ask(reached, method, "/containers/tstdone/archive?path=" + path, tar_with("x") if method == "PUT" else b"")
        assert answer.status == status
        assert status == 400 or method == "HEAD" or answer.message == f"Could not find the file {path} in container tstdone"

    @pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
    def test_put(self, reached, pack):
        assert ask(reached, "PUT", "/containers/tstdone/archive?path=/abs/sub", pack(tar_with("some-name"))).status == 200
        assert (reached.root / "etc/sub/some-name").read_bytes() == b"some-name"
        assert until(lambda: [each["Action"] for each in reached.journal.history] == ["extract-to-dir"])

    def test_options_of_put(self, reached, monkeypatch):
        put = lambda query, data: ask(reached, "PUT", "/containers/tstdone/archive?path=/" + query, data)
        answer = put("&noOverwriteDirNonDir=true", tar_with("etc"))
        assert (answer.status, answer.message) == (400, 'cannot overwrite directory "/etc" with non-directory "/"')
        assert put("&noOverwriteDirNonDir=0&copyUIDGID=1", entries(("f", "0", b"", {"uid": 1, "gid": 2}))).status == 200
        assert os.stat(reached.root / "f").st_uid == 1
        monkeypatch.setattr(nerdctld, "runs_as_user", lambda engine, container: True)
        for query, owner in (("&copyUIDGID=false", (1, 2)), ("&copyUIDGID=true", (7, 8))):
            assert put(query, entries(("f", "0", b"", {"uid": 1, "gid": 2}))).status == 200
            assert (os.stat(reached.root / "f").st_uid, os.stat(reached.root / "f").st_gid) == owner

    def test_volumes_of_one_that_does_not_run(self, reached, tmp_path):
        for name in ("volume", "fixed"):
            (tmp_path / name).mkdir()
        (tmp_path / "hosts").write_text("kept")
        reached.spec["mounts"] = [{"type": "bind", "source": str(tmp_path / source), "destination": target, "options": ["rbind", mode]} for source, target, mode in (
            ("volume", "/abs/sub", "rw"), ("fixed", "/new/fixed", "ro"), ("hosts", "/etc/hosts", "rw"), ("none", "/none", "rw"))]
        put = lambda path, name: ask(reached, "PUT", "/containers/tstdone/archive?path=" + path, tar_with(name))
        refused = lambda path, name: (lambda answer: (answer.status, answer.message))(put(path, name))
        assert put("/", "etc/up/file").status == 200 and (tmp_path / "volume/file").exists() and not os.listdir(reached.root / "etc/sub")
        assert refused("/new/fixed", "x") == (400, "mounted volume is marked read-only")
        assert refused("/etc", "hosts") == (500, "unlinkat /etc/hosts: device or resource busy")
        reached.spec["root"]["readonly"] = True
        assert refused("/etc", "x") == (400, "container rootfs is marked read-only")
        assert put("/etc/sub", "y").status == 200 and (tmp_path / "volume/y").exists() and (tmp_path / "hosts").read_text() == "kept"
        assert str(reached.root) not in pathlib.Path("/proc/self/mounts").read_text() and not os.listdir(reached.workspace.folder())

    @pytest.mark.parametrize("path", ["/hostproc/1/root", f"/hostproc/{os.getpid()}/root", f"/hostproc/{os.getpid()}/cwd", "/hostproc/self/root"],
                             ids=["first", "ours", "folder", "self"])
    def test_the_hosts_proc_leads_nowhere(self, reached, tmp_path, path):
        # A chroot alone does not hold these back: they are no paths.
        reached.spec["mounts"] = [{"type": "bind", "source": "/proc", "destination": "/hostproc", "options": ["rbind", "ro"]}]
        target = tmp_path / "secret"
        ask(reached, "PUT", "/containers/tstdone/archive?path=/", tar_with(path + str(tmp_path / "evil")))
        ask(reached, "PUT", "/containers/tstdone/archive?path=" + path + str(tmp_path), tar_with("evil"))
        ask(reached, "PUT", "/containers/tstdone/archive?path=/", entries(("got", "1", path + str(target))))
        assert b"outside" not in ask(reached, "GET", "/containers/tstdone/archive?path=" + path + str(target)).body
        assert not (tmp_path / "evil").exists() and not (reached.root / "got").exists() and target.stat().st_nlink == 1

    def test_a_process_that_is_another_by_now(self, reached, fake):
        pids, real = itertools.cycle([os.getpid(), 1]), reached.inventory.container("tstweb").id
        fake.before["Tasks/Get"] = lambda: fake.start(real, next(pids))
        for method, body in (("PUT", tar_with("tmp/evil")), ("GET", b"")):
            answer = ask(reached, method, "/containers/tstweb/archive?path=/", body)
            assert (answer.status, answer.message) == (409, "container tstweb has just ended")
        assert not os.path.exists("/tmp/evil")

    @pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
    @pytest.mark.parametrize("size", [1, 100, 1 << 18])
    @pytest.mark.parametrize("between", [b"", bytes(512)], ids=["", "padded"])
    def test_streams_in_a_row(self, pack, size, between):
        data = tar_with("some-name", "other")
        whole = b"".join(pack(each) + between for each in (data[:700], b"", data[700:1100], data[1100:]))
        body = types.SimpleNamespace(blocks=lambda: (memoryview(whole[at:at + size]) for at in range(0, len(whole), size)))
        assert b"".join(nerdctld.plain_blocks(body)) == data

    @pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
    @pytest.mark.parametrize("size", [5000, 1 << 18])
    def test_bombs(self, pack, size):
        whole = pack(bytes(3 << 20) + b"end")
        body = types.SimpleNamespace(blocks=lambda: (memoryview(whole[at:at + size]) for at in range(0, len(whole), size)))
        sizes, last = 0, b""
        for last in nerdctld.plain_blocks(body):
            assert len(last) <= nerdctld.BLOCK
            sizes += len(last)
        assert sizes == (3 << 20) + 3 and last.endswith(b"end")

    @pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
    def test_put_of_what_breaks_off(self, reached, pack):
        reached.journal.history.clear()
        whole = pack(tar_with("some-name"))
        for body in (whole[:-1], whole + whole[:-1], whole + b"x", whole[:5]):
            answer = ask(reached, "PUT", "/containers/tstdone/archive?path=/etc", body)
            assert answer.status == 400 and answer.message.startswith("invalid archive: "), body
        reached.settle()
        assert list(reached.journal.history) == []

    @pytest.mark.parametrize("body", [b"", gzip.compress(b"")], ids=["plain", "packed"])
    def test_put_of_nothing(self, reached, body):
        assert ask(reached, "PUT", "/containers/tstdone/archive?path=/etc", body).status == 200

    @pytest.mark.parametrize("body", [b"\x1f\x8b" + bytes(100), b"BZh9" + bytes(100), b"\xfd7zXZ" + bytes(100), b"no tar" * 200])
    def test_put_of_what_is_broken(self, reached, body):
        assert ask(reached, "PUT", "/containers/tstdone/archive?path=/etc", body).status == 400

    @pytest.mark.parametrize("path, status, message", [("/etc/file", 400, "extraction point is not a directory"), ("", 400, "path cannot be empty")])
    def test_put_refuses(self, reached, path, status, message):
        answer = ask(reached, "PUT", "/containers/tstdone/archive?path=" + path, tar_with("x"))
        assert (answer.status, answer.message) == (status, message)

    def test_changes(self, reached, fake, tmp_path):
        below_snapshot(reached, fake, tmp_path, {"etc/": {}, "etc/gone": b"", "bin/vi": b""})
        for name in ("etc/hosts", "proc/", "etc/new"):
            make_tree(reached.root, {name: b""})
        found = {each["Path"]: each["Kind"] for each in ask(reached, "GET", "/containers/tstdone/changes").json}
        assert found.pop("/bin") == found.pop("/etc/gone") == 2 and found.pop("/etc") == 0 and found.pop("/abs") == found.pop("/etc/new") == 1
        assert not {"/etc/hosts", "/proc", "/bin/vi", "/"} & set(found) and fake.leases == set()
        assert str(reached.root) not in pathlib.Path("/proc/self/mounts").read_text() and not os.listdir(reached.workspace.folder())

    def test_no_changes(self, reached, fake, tmp_path):
        below_snapshot(reached, fake, tmp_path, {})
        shutil.rmtree(reached.root)
        reached.root.mkdir()
        assert ask(reached, "GET", "/containers/tstdone/changes").body == b"null\n"

    def test_export(self, reached, tmp_path):
        reached.spec["mounts"] = [{"type": "bind", "source": str(tmp_path), "destination": "/etc/sub"}]
        answer = ask(reached, "GET", "/containers/tstdone/export")
        assert names_of(answer.body) == ["abs", "dangling", "deep", "etc", "etc/file", "etc/sub", "etc/up", "fifo", "loop", "out", "rel"]
        assert until(lambda: [each["Action"] for each in reached.journal.history] == ["export"])
        assert ask(reached, "GET", "/containers/nosuch/export").status == 404

    def test_export_of_one_that_runs_has_no_volumes(self, reached, fake):
        # In a mount namespace of its own, where the root folder is a mount and something is mounted in it.
        script = 'mount --bind "$R" "$R"; mount -t tmpfs none "$R/etc"; exec "$0" -c "import os; os.chroot(os.environ[\'R\']); print(1, flush=True); input()"'
        with subprocess.Popen(["unshare", "-m", "sh", "-c", script, sys.executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env={**os.environ, "R": str(reached.root)}) as process:
            assert process.stdout.readline() == b"1\n"
            fake.start(reached.inventory.container("tstdone").id, process.pid)
            names = names_of(ask(reached, "GET", "/containers/tstdone/export").body)
            process.stdin.close()
        assert "etc/file" in names and "etc/up" in names


def make_tree(root, files):
    """Files of this content, folders (whose names end with a slash), and links to a name in a list."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)


def below_snapshot(engine, fake, folder, files):
    """Let tstdone's snapshot be above one with these files, and that be the one of an image; its folder."""
    make_tree(folder / "below", files)
    (folder / "below").mkdir(exist_ok=True)
    record = fake.containers[engine.inventory.container("tstdone").id]
    digest, manifest = put_named(fake, "docker.io/library/base:1")
    chain = nerdctld.chain_ids(json.loads(fake.content[json.loads(fake.content[manifest])["config"]["digest"]]))[-1]
    fake.snapshots[record.snapshotter, chain] = ("", 0)
    fake.mounts[record.snapshotter, chain] = [("bind", str(folder / "below"), ("ro", "rbind"))]
    fake.snapshots[record.snapshotter, record.snapshot_key] = (chain, 0)
    fake.mounts.setdefault((record.snapshotter, record.snapshot_key), [])
    return chain, digest


class TestCommit:
    """The config of an image that was committed is dockerd's: the container's under the body's under that of the changes."""

    @pytest.fixture
    def made(self, furnished, fake, tmp_path):
        furnished.chain, furnished.base = below_snapshot(furnished, fake, tmp_path, {})
        fake.layer = tar_of(("new", b"1"))
        return furnished

    def committed(self, fake, answer):
        """The manifest and the configuration of a new image, and its names."""
        manifest = json.loads(fake.content[answer.json["Id"]])
        return manifest, json.loads(fake.content[manifest["config"]["digest"]]), [name for name, each in fake.images.items() if each.target.digest == answer.json["Id"]]

    @pytest.mark.parametrize("name", ["tstdone", "tstnew", "tstweb"])
    def test_layers(self, made, fake, name):
        done, other = (fake.containers[made.inventory.container(each).id] for each in ("tstdone", name))
        fake.snapshots[other.snapshotter, other.snapshot_key] = fake.snapshots[done.snapshotter, done.snapshot_key]
        fake.mounts[other.snapshotter, other.snapshot_key] = []
        answer = ask(made, "POST", f"/commit?container={name}&repo=new&tag=1&author=x&comment=-c", {})
        manifest, config, names = self.committed(fake, answer)
        assert answer.status == 201 and names == ["docker.io/library/new:1"] and fake.leases == set()
        base = json.loads(fake.content[made.base])
        assert manifest["layers"][:-1] == base["layers"] and len(config["rootfs"]["diff_ids"]) == 2
        assert gzip.decompress(fake.content[manifest["layers"][-1]["digest"]]) == fake.layer and fake.applied == [manifest["layers"][-1]["digest"]]
        assert ("overlayfs", nerdctld.chain_ids(config)[-1]) in fake.snapshots and not [key for key in fake.snapshots if key[1].startswith("nerdctld-")]
        assert (config["os"], config["architecture"], config["author"]) == ("linux", "amd64", "x")
        assert {key: config["history"][-1].get(key) for key in ("author", "comment", "empty_layer")} == {"author": "x", "comment": "-c", "empty_layer": None}
        assert set(fake.content_labels[answer.json["Id"]].values()) == {each["digest"] for each in (manifest["config"], *manifest["layers"])}
        assert ask(made, "GET", "/images/new:1/json").json["Parent"] == made.base
        assert until(lambda: "commit" in [each["Action"] for each in made.journal.history])

    def test_of_nothing_new(self, made, fake):
        fake.layer = bytes(1024)
        manifest, config, (name,) = self.committed(fake, ask(made, "POST", "/commit?container=tstdone"))
        assert manifest["layers"] == json.loads(fake.content[made.base])["layers"] and fake.applied == [] and name.startswith(nerdctld.WORKING_NAME)
        assert config["history"][-1]["empty_layer"] is True

    def test_of_an_image_that_is_gone(self, made, fake):
        fake.untag("docker.io/library/base:1")
        manifest, config, _ = self.committed(fake, ask(made, "POST", "/commit?container=tstdone"))
        assert len(manifest["layers"]) == len(config["rootfs"]["diff_ids"]) == len(config["history"]) == 1 and config["os"] == "linux"

    def test_config(self, made, fake, monkeypatch):
        own = {"Cmd": ["c"], "Entrypoint": ["e"], "Env": ["A=1"], "User": "u", "WorkingDir": "/w", "Labels": {"l": "m"}, "ExposedPorts": {"1/tcp": {}}, "Hostname": "h", "Healthcheck": {"Test": ["NONE"]}}
        monkeypatch.setattr(nerdctld, "docker_config", lambda *_: own)
        image = {key: value for key, value in own.items() if key != "Hostname"}
        changes = "&changes=" + urllib.parse.quote("ENV B=$A\nUSER v")
        for query, body, more in (("", {}, {}), ("", b"null", {}), (changes, {}, {"Env": ["A=1", "B=1"], "User": "v"}), ("", {"Env": ["C=$A"], "Cmd": ["d"]}, {"Env": ["C=$A", "A=1"], "Cmd": ["d"]}),
                                  (changes, {"Env": ["A=2"], "User": "x"}, {"Env": ["A=2", "B=2"], "User": "v"}), ("&changes=ENTRYPOINT%20f", {}, {"Entrypoint": ["/bin/sh", "-c", "f"], "Cmd": None})):
            _, config, _ = self.committed(fake, ask(made, "POST", "/commit?container=tstdone" + query, body))
            assert config["config"] == {key: value for key, value in {**image, **more}.items() if value is not None}, (query, body)
            assert config["history"][-1]["created_by"] == "c"

    @pytest.mark.parametrize("query, pauses", [("", 1), ("&pause=0", 0)])
    @pytest.mark.parametrize("breaks", [False, True])
    def test_pause(self, made, fake, query, pauses, breaks):
        identity = made.inventory.container("tstdone").id
        fake.start(identity)
        if breaks:
            fake.before["Diff/Diff"] = lambda: fake.refuses("no space left on device")
        assert ask(made, "POST", "/commit?container=tstdone" + query).status == (500 if breaks else 201)
        assert (fake.calls["Tasks/Pause"], fake.tasks[identity].status) == (pauses, "running") and fake.leases == set()
        fake.pause(identity)
        assert ask(made, "POST", "/commit?container=tstdone" + query).status == (500 if breaks else 201)
        assert (fake.calls["Tasks/Pause"], fake.tasks[identity].status) == (pauses, "paused")

    @pytest.mark.parametrize("query, body, status", [
        ("container=nosuch", {}, 404), ("container=tstdone&changes=RUN%20x", {}, 400), ("container=tstdone&repo=A", {}, 400), ("container=tstdone&repo=a&tag=:", {}, 400),
        ("container=tstdone", {"Env": 1}, 400), ("container=tstdone", {"User": []}, 400), ("container=tstdone", {"Labels": []}, 400), ("", {}, 400)])
    def test_refuses(self, made, fake, query, body, status):
        before = dict(fake.images)
        assert ask(made, "POST", "/commit?" + query, body).status == status
        assert fake.images == before and fake.leases == set()


###############################################################################
# Statistics
###############################################################################


def folder_of(path, **files):
    """A folder with these files."""
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return str(path)


class TestStatistics:
    def test_cpu(self, tmp_path):
        one = {"cpuacct": folder_of(tmp_path / "1", cpuacct__usage="5000\n", cpuacct__stat="user 3\nsystem 4\n", cpuacct__usage_percpu="2000 3000 \n", cpu__stat="nr_periods 7\nnr_throttled 2\nthrottled_time 9\n")}
        two = {"": folder_of(tmp_path / "2", cpu__stat="usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 7\nnr_throttled 2\nthrottled_usec 9\n")}
        tick = 10**9 // os.sysconf("SC_CLK_TCK")
        assert nerdctld.cpu_stats(one)["cpu_usage"] == {"total_usage": 5000, "usage_in_usermode": 3 * tick, "usage_in_kernelmode": 4 * tick, "percpu_usage": [2000, 3000]}
        assert nerdctld.cpu_stats(two)["cpu_usage"] == {"total_usage": 5000, "usage_in_usermode": 3000, "usage_in_kernelmode": 2000}
        assert nerdctld.cpu_stats(one)["throttling_data"] == {"periods": 7, "throttled_periods": 2, "throttled_time": 9}
        assert nerdctld.cpu_stats(two)["throttling_data"]["throttled_time"] == 9000
        assert nerdctld.cpu_stats(two)["system_cpu_usage"] > 0

    @pytest.mark.parametrize("limit, told", [("1000", 1000), ("max", None), ("9223372036854771712", None)])
    def test_memory(self, tmp_path, limit, told):
        one = {"memory": folder_of(tmp_path / "1", memory__usage_in_bytes="7", memory__max_usage_in_bytes="9", memory__failcnt="1", memory__limit_in_bytes=limit, memory__stat="cache 1\nx y\n")}
        two = {"": folder_of(tmp_path / "2", memory__current="7", memory__max=limit, memory__stat="file 1\n")}
        found = nerdctld.memory_stats(one)
        assert (found["usage"], found["max_usage"], found["failcnt"], found["stats"]) == (7, 9, 1, {"cache": 1})
        assert found["limit"] == nerdctld.memory_stats(two)["limit"] == (told or nerdctld.memory_total())
        assert nerdctld.memory_stats(two)["stats"] == {"file": 1}

    def test_pids(self, tmp_path):
        assert nerdctld.pids_stats({"pids": folder_of(tmp_path / "1", pids__current="3", pids__max="10")}) == {"current": 3, "limit": 10}
        assert nerdctld.pids_stats({"": folder_of(tmp_path / "2", pids__current="3", pids__max="max")}) == {"current": 3}

    def test_blocks(self, tmp_path):
        one = {"blkio": folder_of(tmp_path / "1", **{"blkio__throttle__io_service_bytes_recursive": "8:0 Read 10\n8:0 Write 20\n8:0 Total 30\nTotal 30\n", "blkio__throttle__io_serviced_recursive": "8:0 Read 1\n"})}
        two = {"": folder_of(tmp_path / "2", io__stat="8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0\n")}
        rows = [{"major": 8, "minor": 0, "op": "read", "value": 10}, {"major": 8, "minor": 0, "op": "write", "value": 20}]
        assert nerdctld.blkio_stats(one)["io_service_bytes_recursive"] == nerdctld.blkio_stats(two)["io_service_bytes_recursive"] == rows
        assert nerdctld.blkio_stats(two)["io_serviced_recursive"][1]["value"] == 2
        assert nerdctld.blkio_stats({})["io_service_bytes_recursive"] is None

    def test_own_cgroup(self):
        folders = nerdctld.cgroup_folders(os.getpid())
        assert all(os.path.isdir(each) for each in folders.values())
        assert nerdctld.network_stats(os.getpid()).get("lo") is None

    def test_of_one_that_does_not_run(self, furnished):
        told = ask(furnished, "GET", "/containers/tstdone/stats?stream=0").json
        assert told["read"] == told["preread"] == "0001-01-01T00:00:00Z" and told["memory_stats"] == {} and told["cpu_stats"]["cpu_usage"]["total_usage"] == 0

    def test_stream_and_one_shot(self, furnished):
        assert ask(furnished, "GET", "/containers/tstweb/stats?stream=1&one-shot=1").status == 400
        assert ask(furnished, "GET", "/containers/nosuch/stats?stream=0").status == 404

    def test_top(self, furnished, scripted, fake):
        # ps is this machine's own, and shows the process that stands for the container's among all others.
        fake.start(ID, pid=os.getpid())
        words = pathlib.Path("/proc/self/cmdline").read_text().rstrip("\0").replace("\0", " ")
        assert ask(furnished, "GET", "/containers/tstweb/top?ps_args=-e -ww -o pid,args").json == {"Titles": ["PID", "COMMAND"], "Processes": [[str(os.getpid()), words]]}
        assert bytes(fake.asked["Tasks/ListPids"][1]).decode() == ID and not scripted.calls()
        assert ask(furnished, "GET", "/containers/tstdone/top").status == 409
        for query, status, message in (("'", 400, "invalid ps_args"), ("-o pid=x", 400, 'specifying "pid=x" is not allowed'), ("--nosuch", 500, "ps: error: unknown"), ("-o args", 500, "Couldn't find PID field in ps output")):
            answer = ask(furnished, "GET", "/containers/tstweb/top?ps_args=" + query)
            assert (answer.status, answer.message[:len(message)]) == (status, message)
        fake.forget(ID)
        # It has ended meanwhile.
        assert ask(furnished, "GET", "/containers/tstweb/top").status in (404, 409)

    @pytest.mark.parametrize("text, rows", [("PID CMD\n1 sleep 10\n22 sh -c a  b\n3 no\n\n", [["1", "sleep 10"], ["22", "sh -c a  b"]]), ("UID PID\nroot 22\nroot\nx y\n", [["root", "22"]]), ("PID\n", [])])
    def test_rows_of_ps(self, text, rows):
        assert nerdctld.parse_top(text, {1, 22})["Processes"] == rows


###############################################################################
# Networks, volumes: made, connected, removed
###############################################################################


class TestHosts:
    """Aliases and links by the hosts files that nerdctl keeps."""

    @pytest.fixture
    def world(self, tmp_path):
        """`world(name, ip, aliases, …)` is a container that runs and has a file; `world.lines(name)` what stands in it; `world.hosts`."""
        table = {}

        def make(name, ip, aliases=(), links=(), running=True, network="net", **request):
            identity = hashlib.sha256(name.encode()).hexdigest()
            folder = tmp_path / "etchosts" / "default" / identity
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"# <nerdctl>\n{ip} {name}\n# </nerdctl>\n")
            (folder / "meta.json").write_text(json.dumps({"Networks": {network: {"ips": [{"address": ip + "/24"}], "interfaces": [{"mac": "1", "sandbox": "/x"}]}}}))
            asked = {"Hostname": name, **request, "NetworkingConfig": {"EndpointsConfig": {network: {"Aliases": list(aliases), "Links": list(links)}}}}
            labels = {**nerdctld.request_labels(asked), "nerdctl/state-dir": f"{tmp_path}/containers/default/{identity}", "nerdctl/networks": json.dumps([network])}
            record = nerdctld.ContainerRecord(identity, {"nerdctl/name": name, **labels}, BASE, "io.containerd.runc.v2", b"{}", "overlayfs", identity, 0)
            table[name] = nerdctld.Container(record, nerdctld.TaskRecord(4242, "running", 0, 0, "") if running else None)
            return table[name]
        make.table, make.folder = table, tmp_path / "etchosts" / "default"
        make.path = lambda name: make.folder / hashlib.sha256(name.encode()).hexdigest() / "hosts"
        make.lines = lambda name: [each for each in make.path(name).read_text().splitlines() if each.endswith(" alias.nerdctld")]
        make.hosts = nerdctld.Hosts(types.SimpleNamespace(inventory=types.SimpleNamespace(containers=lambda: {each.id: each for each in table.values()})))
        return make

    def test_names_of_each_network(self, world):
        world("db", "10.0.0.2", ["db", "primary", "not a name", "-x", "own"], Hostname="own")
        world("web", "10.0.0.3", links=["db:data", "db"])
        world("far", "10.1.0.2", network="other", links=["db:data"])
        inode = os.stat(world.path("web")).st_ino
        for _ in range(2):
            world.hosts.refresh()
            # `own` and `db` are what nerdctl itself writes.
            assert world.lines("db") == ["10.0.0.2 primary alias.nerdctld"]
            assert world.lines("web") == ["10.0.0.2 primary data db alias.nerdctld"] and world.lines("far") == []
            assert world.path("web").read_text().startswith("# <nerdctl>\n10.0.0.3 web\n# </nerdctl>\n")
        # It is mounted.
        assert os.stat(world.path("web")).st_ino == inode

    def test_what_is_over_goes(self, world):
        db = world("db", "10.0.0.2", ["primary"])
        world("web", "10.0.0.3")
        world.hosts.refresh()
        assert world.lines("web") == ["10.0.0.2 primary alias.nerdctld"]
        world.table["db"] = nerdctld.Container(db.record, db.task._replace(status="stopped"))
        world.hosts.on_event(nerdctld.ContainerdEvent("/tasks/exit", 0, {"container_id": db.id}))
        assert until(lambda: not world.lines("web")) and until(lambda: not world.hosts.used)
        assert world.path("web").read_text() == "# <nerdctl>\n10.0.0.3 web\n# </nerdctl>\n"

    def test_who_starts_finds_the_others_at_once(self, world):
        world("db", "10.0.0.2", ["primary"])
        web = world("web", "10.0.0.3", running=False)
        world.hosts.refresh(web)
        assert world.lines("web") == ["10.0.0.2 primary alias.nerdctld"] and world.lines("db") == []

    def test_nothing_is_touched_without_need(self, world):
        world("db", "10.0.0.2", ["db"])
        os.chmod(world.path("db"), 0)
        before = os.stat(world.path("db"))
        world.hosts.refresh()
        assert os.stat(world.path("db")) == before and not world.hosts.used

    def test_a_file_that_the_container_has_blown_up(self, world):
        world("db", "10.0.0.2", ["primary"])
        os.truncate(world.path("db"), 3 << 30)
        world.hosts.refresh()
        assert os.stat(world.path("db")).st_size == 3 << 30

    def test_events_that_change_no_address(self, world):
        db = world("db", "10.0.0.2", ["primary"])
        world.hosts.refresh()
        for event in (None, nerdctld.ContainerdEvent("/tasks/oom", 0, {"container_id": db.id})):
            world.hosts.on_event(event)
            assert not world.hosts.due.is_set()

    def test_the_lock_of_nerdctl(self, world):
        world("db", "10.0.0.2", ["primary"])
        descriptor = os.open(world.folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        thread = threading.Thread(target=world.hosts.refresh)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and not world.lines("db")
        os.close(descriptor)
        thread.join(10)
        assert world.lines("db")


class TestNetworkChanges:
    @pytest.mark.parametrize("config, told", [({}, ""), ({"AuxiliaryAddresses": {"a": "10.4.0.9"}}, "auxiliary addresses are not carried out: nerdctl has none")])
    def test_what_is_not_carried_out(self, furnished, scripted, monkeypatch, config, told):
        scripted.on("network create")
        monkeypatch.setattr(nerdctld, "find_network", lambda engine, name: {"Id": "1" * 64, "Name": name, "Driver": "bridge"})
        assert ask(furnished, "POST", "/networks/create", {"Name": "x", "IPAM": {"Config": [config]}}).json["Warning"] == told

    @pytest.mark.parametrize("body, words", [
        ({}, "--driver=bridge"), ({"Driver": "macvlan", "Options": {"parent": "eth0"}}, '--driver=macvlan --opt=parent=eth0 --label=nerdctld/options={"parent":"eth0"}'),
        ({"Internal": True, "EnableIPv6": True}, "--driver=bridge --internal --ipv6"),
        ({"IPAM": {"Driver": "default", "Config": [{"Subnet": "10.1.0.0/16", "Gateway": "10.1.0.1", "IPRange": "10.1.2.0/24"}, {"Subnet": "fd00::/64"}]}},
         "--driver=bridge --subnet=10.1.0.0/16 --gateway=10.1.0.1 --ip-range=10.1.2.0/24 --subnet=fd00::/64 --label=nerdctld/ip-range=10.1.2.0/24"),
        ({"Labels": {"a": "b"}}, "--driver=bridge --label=a=b"), ({"Options": {"com.docker.network.driver.mtu": "1400"}}, '--driver=bridge --opt=mtu=1400 --label=nerdctld/options={"com.docker.network.driver.mtu":"1400"}'),
        ({"Options": {"odd": "x"}}, '--driver=bridge --label=nerdctld/options={"odd":"x"}')])
    def test_argv(self, body, words):
        found = [each.replace('": "', '":"') for each in nerdctld.network_create_args(body, "net")]
        assert found == ["network", "create", *words.split(), "--", "net"]

    @pytest.mark.parametrize("body, status", [
        ({"Name": "tstnet"}, 409), ({"Name": "bridge"}, 403), ({"Name": "host"}, 403), ({"Name": ""}, 400), ({"Name": "-x"}, 400), ({"Name": "a b"}, 400), ({"Name": "x", "Driver": "overlay"}, 404),
        ({"Name": "x", "ConfigOnly": True}, 501), ({"Name": "x", "IPAM": {"Driver": "odd"}}, 400), ({"Name": "x", "IPAM": {"Config": {}}}, 400), ({"Name": "x", "Options": []}, 400)])
    def test_refused(self, furnished, scripted, body, status):
        assert ask(furnished, "POST", "/networks/create", body).status == status
        assert not scripted.calls("network create")

    def test_overlap(self, furnished, scripted):
        scripted.on("network create", stderr=fatal("subnet 10.4.0.0/24 overlaps with other one on this address space"), status=1)
        answer = ask(furnished, "POST", "/networks/create", {"Name": "x", "IPAM": {"Config": [{"Subnet": "10.4.0.0/24"}]}})
        assert (answer.status, answer.message) == (403, "invalid pool request: Pool overlaps with other one on this address space")

    def test_remove(self, furnished, scripted, fake):
        assert ask(furnished, "DELETE", "/networks/bridge").message == "bridge is a pre-defined network and cannot be removed"
        answer = ask(furnished, "DELETE", "/networks/tstnet")
        assert answer.status == 403 and 'has active endpoints (name:"tstweb"' in answer.message
        assert ask(furnished, "DELETE", "/networks/nosuch").status == 404
        fake.containers.clear()
        scripted.on("network rm")
        assert ask(furnished, "DELETE", "/networks/tstnet").status == 204
        assert scripted.argv("network rm") == ["network", "rm", "--", "tstnet"]

    def test_prune(self, furnished, scripted, fake):
        scripted.on("network rm")
        assert ask(furnished, "POST", "/networks/prune").json == {"NetworksDeleted": None}
        fake.containers.clear()
        assert ask(furnished, "POST", '/networks/prune?filters={"label":["x"]}').json == {"NetworksDeleted": None}
        assert ask(furnished, "POST", "/networks/prune").json == {"NetworksDeleted": ["tstnet"]}

    @pytest.mark.parametrize("path, body, status, message", [
        ("tstnet/connect", {"Container": "tstweb"}, 403, "endpoint with name tstweb already exists in network tstnet"), ("tstnet/connect", {"Container": "mine"}, 200, None),
        ("bridge/connect", {"Container": "nosuch"}, 404, "No such container: nosuch"), ("nosuch/connect", {"Container": "mine"}, 404, "network nosuch not found"),
        ("bridge/connect", {}, 400, "invalid container name or ID: value is empty"), ("bridge/disconnect", {}, 400, "invalid container name or ID: value is empty"),
        ("host/connect", {"Container": "mine"}, 400, "cannot connect container to host network - container must be created in host network mode"),
        ("none/connect", {"Container": "mine"}, 400, "container cannot be connected to multiple networks with one of the networks in private (none) mode"),
        ("tstnet/connect", {"Container": "nonet"}, 400, "container cannot be connected to multiple networks with one of the networks in private (none) mode"),
        ("tstnet/connect", {"Container": "hosted"}, 400, "container sharing network namespace with another container or host cannot be connected to any other network"),
        ("tstnet/connect", {"Container": "sharing"}, 400, "container sharing network namespace with another container or host cannot be connected to any other network"),
        ("host/disconnect", {"Container": "hosted"}, 400, "cannot disconnect container from host network - container was created in host network mode"),
        ("bridge/disconnect", {"Container": "tstweb"}, 500, f"container {ID} is not connected to network bridge"), ("nosuch/disconnect", {"Container": "tstweb"}, 404, "network nosuch not found"),
        ("nosuch/disconnect", {"Container": "tstweb", "Force": True}, 500, f"container {ID} is not connected to the network nosuch"),
        ("bridge/disconnect", {"Container": "mine"}, 500, f"container {'5' * 64} is not connected to the network bridge"),
        ("nosuch/disconnect", {"Container": "mine"}, 500, f"container {'5' * 64} is not connected to the network nosuch"),
        ("bridge/connect", {"Container": "mine", "EndpointConfig": {"Aliases": ["x"]}}, 400, "invalid endpoint settings:\nnetwork-scoped aliases are only supported for user-defined networks"),
        ("bridge/connect", {"Container": "mine", "EndpointConfig": {"IPAMConfig": {"IPv4Address": "10.99.0.9"}}}, 400,
         "invalid endpoint settings:\nuser-specified IP address is supported on user-defined networks only\nno configured subnet contains IP address 10.99.0.9"),
        ("tstnet/connect", {"Container": "mine", "EndpointConfig": {"IPAMConfig": {"IPv4Address": "10.9.9.9"}}}, 400, "invalid endpoint settings:\nno configured subnet contains IP address 10.9.9.9"),
        ("tstnet/connect", {"Container": "mine", "EndpointConfig": {"IPAMConfig": {"IPv4Address": "::1"}}}, 400, "invalid IPv4 address: ::1"),
        ("tstnet/connect", {"Container": "mine", "EndpointConfig": {"MacAddress": "x"}}, 400, "invalid MAC address: x")])
    def test_dockerd_s_words(self, furnished, fake, path, body, status, message):
        for number, name, network in ((5, "mine", "tstnet"), (6, "nonet", "none"), (7, "hosted", "host"), (8, "sharing", "container:" + ID)):
            fake.create(f"{number}" * 64, {"nerdctl/name": name, "nerdctl/networks": json.dumps([network])})
        answer = ask(furnished, "POST", "/networks/" + path, body)
        assert (answer.status, answer.message if status != 200 else None) == (status, message) and "Containers/Update" not in fake.calls


class Plugins:
    """CNI plugins of a network `back` that write down what they are told; `calls` tells it: plugin, command, namespace, interface, arguments, input."""

    RESULT = {"cniVersion": "1.0.0", "interfaces": [{"name": "veth1", "mac": "1"}, {"name": "eth9", "mac": "02:00:00:00:00:09", "sandbox": "/proc/1/ns/net"}],
              "ips": [{"address": "10.88.0.9/24", "gateway": "10.88.0.1", "interface": 1}]}

    def __init__(self, folder):
        self.folder, self.log = folder / "plugins", folder / "plugins.log"
        self.folder.mkdir()
        for name in ("alpha", "beta"):
            self.write(name, "cat <<END\n" + json.dumps(self.RESULT) + "\nEND")
        write_json(folder / "networks" / "default" / "nerdctl-back.conflist", {
            "cniVersion": "1.0.0", "name": "back", "nerdctlID": "b" * 64, "nerdctlLabels": {}, "plugins": [
                {"type": "alpha", "isGateway": True, "ipam": {"ranges": [[{"subnet": "10.88.0.0/24", "gateway": "10.88.0.1"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
                {"type": "beta", "capabilities": {"portMappings": True}}]})
        # Rules of the firewall by which containers go out, and the programs that change them and routes.
        self.rules, self.tools = folder / "rules", folder / "tools.log"
        self.rules.write_text("")
        for name in ("iptables", "ip6tables", "nsenter"):
            (self.folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {self.tools}\ncase "$*" in *-S*) cat {self.rules};; esac\n')
            (self.folder / name).chmod(0o755)

    def write(self, name, adding, deleting=""):
        """A plugin that does so."""
        path = self.folder / name
        path.write_text(f"""#!/bin/sh
{{ printf '%s\t' {name} "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_NETNS" "$CNI_IFNAME" "$CNI_ARGS"; cat; echo; }} >> {self.log}
if [ $CNI_COMMAND = ADD ]; then
{adding or ":"}
else
{deleting or ":"}
fi
""")
        path.chmod(0o755)

    @property
    def calls(self):
        """What they were told, and forget it."""
        rows = [line.split("\t") for line in self.log.read_text().splitlines()] if self.log.exists() else []
        self.log.write_text("")
        return [(*row[:-1], json.loads(row[-1])) for row in rows]


class TestCni:
    """Containers that are put into networks and taken out of them in place."""

    MINE = "5" * 64

    @pytest.fixture
    def plugins(self, furnished, fake, tmp_path, monkeypatch):
        """Plugins, and a container `mine` of the network tstnet that was created."""
        monkeypatch.setenv("CNI_PATH", str(tmp_path / "plugins"))
        monkeypatch.setenv("PATH", f"{tmp_path}/plugins:{os.environ['PATH']}")
        request = {"Image": BASE, "Hostname": "mine", "HostConfig": {"NetworkMode": "tstnet"}, "NetworkingConfig": {"EndpointsConfig": {"tstnet": {"Aliases": ["one"]}}}}
        folder = store_of(fake, tmp_path) / "containers" / "default" / self.MINE
        write_json(folder / "network-config.json", {"portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "127.0.0.1"}]})
        fake.create(self.MINE, {"nerdctl/name": "mine", "nerdctl/hostname": "mine", "nerdctl/networks": '["tstnet"]', "nerdctl/state-dir": str(folder), **nerdctld.request_labels(request)},
                    spec={"annotations": {"nerdctl/networks": '["tstnet"]', "other": "kept"}, "process": {"args": ["sleep"]}})
        return Plugins(tmp_path)

    def run(self, fake, tmp_path, monkeypatch, pid=None):
        """Let it run as a process whose interfaces are those of this one."""
        folder = store_of(fake, tmp_path) / "etchosts" / "default" / self.MINE
        told = {"interfaces": [{"name": "eth0", "mac": "2", "sandbox": "/proc/1/ns/net"}], "cniVersion": "1.1.0", "ips": [{"address": "10.77.0.3/24", "gateway": "10.77.0.1"}]}
        write_json(folder / "meta.json", {"ID": self.MINE, "Name": "mine", "Hostname": "mine", "ExtraHosts": {"far": "9.9.9.9"}, "Networks": {"tstnet": told}})
        (folder / "hosts").write_text("before\n# <nerdctl>\nold\n# </nerdctl>\nafter\n")
        fake.start(self.MINE, pid or os.getpid())
        return folder

    def free(self):
        """The first free name of an interface here."""
        taken = {line.partition(":")[0].strip() for line in pathlib.Path("/proc/self/net/dev").read_text().splitlines()}
        return next(name for name in (f"eth{number}" for number in range(99)) if name not in taken)

    def change(self, engine, word, network="back", status=200, version="1.56", **more):
        """Connect it or disconnect it; the answer."""
        answer = ask(engine, "POST", f"/v{version}/networks/{network}/{word}", {"Container": "mine", **more})
        assert answer.status == status, answer.body
        return answer

    def networks(self, engine):
        """What inspect tells of its networks."""
        return ask(engine, "GET", "/containers/mine/json").json["NetworkSettings"]["Networks"]

    def kept(self, fake):
        """Its networks as nerdctl and its hooks know them, and labels of the daemon on it."""
        record = fake.containers[self.MINE]
        annotations = json.loads(record.spec)["annotations"]
        assert annotations.pop("other") == "kept"
        return json.loads(record.labels["nerdctl/networks"]), annotations, {key: value for key, value in record.labels.items() if key.startswith("nerdctld/") and "request" not in key}

    def test_of_one_that_does_not_run(self, furnished, fake, plugins, monkeypatch):
        events = []
        monkeypatch.setattr(furnished.journal, "emit", lambda *words: events.append(words))
        asked = {"Aliases": ["two"], "Links": ["tstweb:w"], "DriverOpts": {"a": "b"}, "GwPriority": 3}
        self.change(furnished, "connect", EndpointConfig=asked)
        assert self.kept(fake) == (["tstnet", "back"], {"nerdctl/networks": '["tstnet", "back"]'}, {}) and not plugins.calls
        assert events == [("network", "connect", "b" * 64, {"container": self.MINE, "name": "back", "type": "alpha"})]
        told = self.networks(furnished)
        assert list(told) == ["tstnet", "back"] and {key: told["back"][key] for key in asked} == asked and told["tstnet"]["Aliases"] == ["one"]
        assert nerdctld.wanted_names(furnished.inventory.container("mine")) == ({"tstnet": ["one"], "back": ["two"]}, {"tstweb": ["w"]})
        self.change(furnished, "connect", EndpointConfig={"Aliases": ["three"]})
        assert self.networks(furnished)["back"]["Aliases"] == ["two"]
        # As Terraform does: NetworkMode stays.
        self.change(furnished, "disconnect", "tstnet")
        assert self.kept(fake)[0] == ["back"] and list(self.networks(furnished)) == ["back"]
        shown = ask(furnished, "GET", "/containers/mine/json").json
        assert shown["HostConfig"]["NetworkMode"] == "tstnet" and json.loads(fake.containers[self.MINE].spec)["process"] == {"args": ["sleep"]}

    def test_out_of_the_last_network(self, furnished, fake, plugins):
        self.change(furnished, "disconnect", "tstnet")
        assert self.kept(fake) == (["none"], {"nerdctl/networks": '["none"]'}, {"nerdctld/alone": "true"})
        assert self.networks(furnished) == {} and "tstnet" in self.change(furnished, "disconnect", "tstnet", 500).message
        assert ask(furnished, "GET", "/containers/mine/json").json["HostConfig"]["NetworkMode"] == "tstnet"
        self.change(furnished, "connect", "none")
        assert list(self.networks(furnished)) == ["none"] and self.kept(fake)[2] == {}
        self.change(furnished, "connect", status=400)
        self.change(furnished, "disconnect", "none")
        self.change(furnished, "connect")
        assert self.kept(fake) == (["back"], {"nerdctl/networks": '["back"]'}, {})

    def test_a_request_of_more_and_of_fewer_parts(self, furnished, fake, plugins):
        parts = lambda: sorted(key for key in fake.containers[self.MINE].labels if "request" in key)
        self.change(furnished, "connect", EndpointConfig={"Aliases": ["x" * 60 + str(number) for number in range(70)]})
        assert parts() == ["nerdctld/request.0", "nerdctld/request.1"] and len(self.networks(furnished)["back"]["Aliases"]) == 70
        self.change(furnished, "disconnect")
        assert parts() == ["nerdctld/request.0"] and furnished.inventory.container("mine").request["Image"] == BASE

    def test_addresses_of_its_own(self, furnished, fake, plugins):
        """nerdctl's hook gives all networks the same address."""
        settings = {"IPAMConfig": {"IPv4Address": "10.88.0.7"}, "MacAddress": "02:00:00:00:00:07"}
        self.change(furnished, "connect", EndpointConfig=settings)
        assert self.kept(fake)[:2] == (["tstnet", "back"], {"nerdctl/networks": '["tstnet"]'})
        self.change(furnished, "disconnect", "tstnet")
        told = {"nerdctl/networks": '["back"]', "nerdctl/ip": "10.88.0.7", "nerdctl/mac-address": "02:00:00:00:00:07"}
        assert self.kept(fake)[:2] == (["back"], told) and fake.containers[self.MINE].labels["nerdctl/ip"] == "10.88.0.7"
        self.change(furnished, "disconnect")
        assert "nerdctl/ip" not in fake.containers[self.MINE].labels
        self.change(furnished, "connect", version="1.50", EndpointConfig=settings)
        assert "nerdctl/mac-address" not in self.kept(fake)[1]

    def test_what_nerdctl_s_hook_cannot_do_is_done_before_it_starts(self, furnished, fake, plugins, tmp_path, monkeypatch):
        self.change(furnished, "connect", EndpointConfig={"IPAMConfig": {"IPv4Address": "10.88.0.7"}})
        container = furnished.inventory.container("mine")
        folder = self.run(fake, tmp_path, monkeypatch)
        nerdctld.attach_networks(furnished, container, os.getpid())
        (name, command, *_, arguments, _), _ = plugins.calls
        assert (name, command) == ("alpha", "ADD") and "IP=10.88.0.7" in arguments.split(";")
        assert self.networks(furnished)["back"]["IPAddress"] == "10.88.0.9" and set(json.loads((folder / "meta.json").read_text())["Networks"]) == {"tstnet", "back"}
        assert list(nerdctld.attached_networks(furnished.inventory.container("mine"))) == ["back"]
        nerdctld.attach_networks(furnished, furnished.inventory.container("mine"), os.getpid())
        nerdctld.attach_networks(furnished, furnished.inventory.container("tstweb"), os.getpid())
        assert not plugins.calls

    @pytest.mark.parametrize("paused", [False, True])
    def test_of_one_that_runs(self, furnished, fake, plugins, tmp_path, monkeypatch, paused):
        folder = self.run(fake, tmp_path, monkeypatch)
        fake.pause(self.MINE, paused)
        self.change(furnished, "connect", EndpointConfig={"Aliases": ["two"], "IPAMConfig": {"IPv4Address": "10.88.0.9"}})
        arguments = "IgnoreUnknown=1;NERDCTL_CNI_DHCP_HOSTNAME=mine;IP=10.88.0.9"
        where = ("ADD", "default-" + self.MINE, f"/proc/{os.getpid()}/ns/net", self.free(), arguments)
        (*alpha, first), (*beta, second) = plugins.calls
        assert (tuple(alpha), tuple(beta)) == (("alpha", *where), ("beta", *where))
        assert (first["name"], first["cniVersion"], first["type"]) == ("back", "1.0.0", "alpha") and not {"prevResult", "runtimeConfig"} & set(first)
        assert second["prevResult"] == plugins.RESULT
        assert second["runtimeConfig"] == {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]}
        kept = self.kept(fake)
        assert kept[0] == ["tstnet", "back"] and json.loads(kept[2]["nerdctld/attached.back"]) == {
            "name": self.free(), "pid": os.getpid(), "arguments": arguments, "addresses": [], "result": plugins.RESULT}
        told = self.networks(furnished)["back"]
        assert {key: told[key] for key in ("IPAddress", "IPPrefixLen", "MacAddress", "Gateway", "Aliases")} == {
            "IPAddress": "10.88.0.9", "IPPrefixLen": 24, "MacAddress": "02:00:00:00:00:09", "Gateway": "10.88.0.1", "Aliases": ["two"]}
        assert ask(furnished, "GET", "/networks/back").json["Containers"][self.MINE]["IPv4Address"] == "10.88.0.9/24"
        lines = (folder / "hosts").read_text().splitlines()
        assert lines[:5] == ["before", "# <nerdctl>", "127.0.0.1\tlocalhost localhost.localdomain", "::1\t\tlocalhost localhost.localdomain", "9.9.9.9         far"]
        assert lines[-4:] == ["# </nerdctl>", "after", "10.77.0.3 one alias.nerdctld", "10.88.0.9 two alias.nerdctld"]
        assert {"10.88.0.9       mine mine.back mine mine.back", "10.77.0.3       mine mine.tstnet mine mine.tstnet"} <= set(lines) and "old" not in lines
        assert ask(furnished, "DELETE", "/networks/back").status == 403
        assert self.change(furnished, "connect", status=403)
        assert not plugins.calls
        self.change(furnished, "disconnect")
        assert [(call[0], *call[1:-1], call[-1]["prevResult"]) for call in plugins.calls] == [
            (name, "DEL", *where[1:], plugins.RESULT) for name in ("beta", "alpha")]
        assert list(self.networks(furnished)) == ["tstnet"] and self.kept(fake) == (["tstnet"], {"nerdctl/networks": '["tstnet"]'}, {})
        assert set(json.loads((folder / "meta.json").read_text())["Networks"]) == {"tstnet"} and "10.88" not in (folder / "hosts").read_text()

    def test_a_plugin_that_fails(self, furnished, fake, plugins, tmp_path, monkeypatch):
        folder = self.run(fake, tmp_path, monkeypatch)
        before, meta = fake.containers[self.MINE], (folder / "meta.json").read_text()
        plugins.write("beta", """echo '{"code": 11, "msg": "no room", "details": "at all"}'; exit 1""")
        assert self.change(furnished, "connect", status=500).message == 'plugin type="beta" failed (add): no room: at all'
        assert [call[:2] for call in plugins.calls] == [("alpha", "ADD"), ("beta", "ADD"), ("beta", "DEL"), ("alpha", "DEL")]
        assert fake.containers[self.MINE] == before and (folder / "meta.json").read_text() == meta
        plugins.write("alpha", "echo broken >&2; exit 3")
        assert self.change(furnished, "connect", status=500).message == 'plugin type="alpha" failed (add): broken'
        (plugins.folder / "alpha").unlink()
        assert self.change(furnished, "connect", status=500).message == f'failed to find plugin "alpha" in path [{plugins.folder}]' and fake.containers[self.MINE] == before

    def test_out_of_a_network_that_it_was_started_with(self, furnished, fake, plugins, tmp_path, monkeypatch):
        self.change(furnished, "connect")
        folder = self.run(fake, tmp_path, monkeypatch)
        note = json.loads((folder / "meta.json").read_text())
        note["Networks"]["back"] = {**plugins.RESULT, "cniVersion": "1.1.0"}
        write_json(folder / "meta.json", note)
        self.change(furnished, "disconnect")
        calls = plugins.calls
        assert [call[:5] for call in calls] == [(name, "DEL", "default-" + self.MINE, f"/proc/{os.getpid()}/ns/net", "eth9") for name in ("beta", "alpha")]
        # Plugins read no newer version than that of their network.
        assert calls[0][-1]["prevResult"] == plugins.RESULT and list(self.networks(furnished)) == ["tstnet"]
        plugins.write("alpha", "", "exit 1")
        self.change(furnished, "connect")
        self.change(furnished, "disconnect", status=500)
        assert list(self.networks(furnished)) == ["tstnet", "back"]

    def test_release(self, furnished, fake, plugins, tmp_path, monkeypatch, capfd):
        self.run(fake, tmp_path, monkeypatch)
        self.change(furnished, "connect")
        fake.exit(self.MINE)
        assert plugins.calls and list(nerdctld.attached_networks(furnished.inventory.container("mine"))) == ["back"]
        plugins.write("beta", "", "exit 1")
        rule = f'-s {{}}/32 -m comment --comment "name: \\"back\\" id: \\"default-{self.MINE}\\"" -j CNI-1\n'
        plugins.rules.write_text("-P POSTROUTING ACCEPT\n-A POSTROUTING -j OTHER\n" + "".join(f"-A POSTROUTING {rule.format(each)}" for each in ("10.88.0.8", "10.88.0.9")))
        nerdctld.release_networks(furnished, furnished.inventory.container("mine"))
        said = [line.replace('"', "") for line in plugins.tools.read_text().splitlines() if line.startswith("iptables")]
        gone = [f"iptables -w -t nat -D POSTROUTING {rule.format(each)}".replace('\\"', "").replace('"', "").strip() for each in ("10.88.0.8", "10.88.0.9")]
        assert said == ["iptables -w -t nat -S POSTROUTING", *gone, "iptables -w -t nat -F CNI-1", "iptables -w -t nat -X CNI-1"]
        assert [(call[0], call[1], call[3], call[4]) for call in plugins.calls] == [(name, "DEL", "", self.free()) for name in ("beta", "alpha")]
        assert self.kept(fake) == (["tstnet", "back"], {"nerdctl/networks": '["tstnet", "back"]'}, {}) and "network back of container" in capfd.readouterr().err
        nerdctld.release_networks(furnished, furnished.inventory.container("mine"))
        assert not plugins.calls

    @pytest.mark.parametrize("way_out, priority, routes", [(True, 0, 0), (True, 1, 1), (False, 0, 1)])
    def test_the_default_route(self, furnished, fake, plugins, tmp_path, monkeypatch, way_out, priority, routes):
        self.run(fake, tmp_path, monkeypatch)
        monkeypatch.setattr(nerdctld, "has_way_out", lambda pid: way_out)
        self.change(furnished, "connect", EndpointConfig={"GwPriority": priority})
        assert len(plugins.calls[0][-1]["ipam"]["routes"]) == routes
        for name in ("bridge", "portmap", "firewall", "tuning"):
            plugins.write(name, "")
        self.change(furnished, "disconnect", "tstnet")
        said = plugins.tools.read_text().splitlines() if plugins.tools.exists() else []
        assert [line for line in said if line.startswith("nsenter")] == [
            f"nsenter -n -t {os.getpid()} -- ip route replace default via 10.88.0.1"] * (not way_out)

    @pytest.mark.parametrize("name, released", [("eth1", False), ("eth7", True)])
    def test_release_of_one_that_somebody_started_again(self, furnished, fake, plugins, tmp_path, monkeypatch, name, released):
        self.run(fake, tmp_path, monkeypatch)
        self.change(furnished, "connect")
        made = nerdctld.attached_networks(furnished.inventory.container("mine"))["back"]._replace(name=name, pid=1)
        fake.label(self.MINE, **nerdctld.interface_label("back", made))
        assert plugins.calls
        nerdctld.release_networks(furnished, furnished.inventory.container("mine"))
        # The other interface is nerdctl's, and stays.
        assert [call[3:5] for call in plugins.calls] == [("", name)] * 2 * released and self.kept(fake)[2] == {}
        assert self.networks(furnished)["back"]["IPAddress"] == "10.88.0.9"

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 5}', '{"name": "eth1", "pid": "x"}', '{"odd": 1, "name": "x"}'])
    def test_labels_of_strangers(self, furnished, fake, plugins, text):
        fake.label(self.MINE, **{"nerdctld/attached.x": text})
        container = furnished.inventory.container("mine")
        nerdctld.release_networks(furnished, container)
        assert not plugins.calls and nerdctld.attached_networks(container) == {}

    def test_networks_that_are_gone(self, furnished, fake, plugins, tmp_path):
        self.change(furnished, "connect")
        (tmp_path / "networks/default/nerdctl-back.conflist").unlink()
        assert list(self.networks(furnished)) == ["tstnet", "back"]
        self.change(furnished, "disconnect")
        assert list(self.networks(furnished)) == ["tstnet"]

    def test_where_a_user_s_own_containerd_is(self, furnished, monkeypatch, tmp_path):
        container = furnished.inventory.container("tstweb")
        monkeypatch.setattr(furnished.containerd, "rootless_pid", lambda: 77)
        monkeypatch.setattr(furnished.containerd, "root", lambda: str(tmp_path / "root"))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        monkeypatch.setenv("HOME", "/home/x")
        assert nerdctld.plugins_argv(furnished) == ["nsenter", "-U", "--preserve-credentials", "-m", "-n", "-t", "77", "--"]
        (tmp_path / "containerd-rootless").mkdir()
        (tmp_path / "containerd-rootless/netns").touch()
        assert nerdctld.plugins_argv(furnished)[4] == f"-n{tmp_path}/containerd-rootless/netns"
        assert nerdctld.plugins_folder(furnished) == "/opt/cni/bin"
        (tmp_path / "root/home/x/.local/lib/cni").mkdir(parents=True)
        assert nerdctld.plugins_folder(furnished) == "/home/x/.local/lib/cni"
        assert [each["hostIP"] for each in nerdctld.port_mappings(furnished, container)] == [""]


class TestVolumeChanges:
    def test_create(self, furnished, scripted):
        scripted.on("volume create")
        answer = ask(furnished, "POST", "/volumes/create", {"Name": "tstvol", "Driver": "local", "Labels": {"a": "b"}})
        assert answer.status == 201 and answer.json["Name"] == "tstvol" and not scripted.calls("volume create")
        ask(furnished, "POST", "/volumes/create", {"Name": "new", "Labels": {"a": "b"}})
        assert scripted.argv("volume create") == ["volume", "create", "--label=a=b", "--", "new"]
        ask(furnished, "POST", "/volumes/create", {})
        words = scripted.argv("volume create")
        assert words[2] == "--label=com.docker.volume.anonymous=" and re.fullmatch("[0-9a-f]{64}", words[-1])

    @pytest.mark.parametrize("body, status", [
        ({"Name": "x1", "Driver": "nfs"}, 404), ({"Name": "/x"}, 400), ({"Name": "-x"}, 400), ({"Name": "x"}, 400), ({"Name": "x1", "DriverOpts": {"type": "nfs"}}, 501), ({"Name": 5}, 400), ({"Name": "x1", "Labels": []}, 400),
        ({"Name": "x1", "ClusterVolumeSpec": {"Group": "g"}}, 503)])
    def test_refused(self, furnished, scripted, body, status):
        assert ask(furnished, "POST", "/volumes/create", body).status == status
        assert not scripted.calls("volume create")

    def test_remove(self, furnished, scripted, fake):
        answer = ask(furnished, "DELETE", "/volumes/tstvol")
        assert (answer.status, answer.message) == (409, f"remove tstvol: volume is in use - [{ID}]")
        assert ask(furnished, "DELETE", "/volumes/nosuch").status == 404
        assert ask(furnished, "DELETE", "/volumes/nosuch?force=1").status == 204
        fake.containers.clear()
        scripted.on("volume rm")
        assert ask(furnished, "DELETE", "/volumes/tstvol").status == 204
        assert scripted.argv("volume rm") == ["volume", "rm", "--", "tstvol"]

    @pytest.mark.parametrize("target, deleted", [
        ("/v1.50/volumes/prune", None), ('/v1.50/volumes/prune?filters={"all":["true"]}', ["tstvol"]), ("/v1.41/volumes/prune", ["tstvol"]), ('/v1.50/volumes/prune?filters={"all":["1"],"label":["x"]}', None)])
    def test_prune(self, furnished, scripted, fake, target, deleted):
        scripted.on("volume rm")
        assert ask(furnished, "POST", target).json["VolumesDeleted"] is None
        fake.containers.clear()
        assert ask(furnished, "POST", target).json["VolumesDeleted"] == deleted


###############################################################################
# Networks
###############################################################################


class TestNetworks:
    def test_list(self, furnished, scripted, tmp_path):
        rows = {each["Name"]: each for each in ask(furnished, "GET", "/networks").json}
        assert sorted(rows) == ["bridge", "host", "none", "tstnet"]
        assert rows["tstnet"]["IPAM"]["Config"] == [{"Subnet": "10.77.0.0/24", "Gateway": "10.77.0.1"}]
        assert [rows[name]["Driver"] for name in sorted(rows)] == ["bridge", "host", "null", "bridge"]
        assert all(re.fullmatch("[0-9a-f]{64}", each["Id"]) for each in rows.values())
        assert rows["bridge"]["Labels"] == {}
        written = (tmp_path / "networks/default/nerdctl-tstnet.conflist").stat().st_mtime_ns
        assert abs(nerdctld.nanoseconds_of(rows["tstnet"]["Created"]) - written) < 10**9 and not scripted.calls()

    @pytest.mark.parametrize("filters, names", [
        ({"name": ["tst"]}, "tstnet"), ({"name": ["^b.*e$", "o(s|n)"]}, "bridge host none"), ({"name": ["bridge("]}, ""), ({"id": ["^6cbb[^x]+$"]}, "tstnet"),
        ({"id": ["982de144"]}, "tstnet"), ({"driver": ["host"]}, "host"), ({"type": ["custom"]}, "tstnet"), ({"type": ["builtin"]}, "bridge host none"),
        ({"id": ["6cbb"]}, "tstnet"), ({"scope": ["swarm"]}, ""), ({"label": ["x"]}, ""), ({"dangling": ["true"]}, ""), ({"dangling": ["false"]}, "bridge host none tstnet")])
    def test_filters(self, reading, filters, names):
        assert [each["Name"] for each in ask(reading, "GET", "/networks?" + filtered(**filters)).json] == names.split()

    def test_refuses(self, reading):
        for query in (filtered(type=["x"]), filtered(x=["1"]), filtered(dangling=["x"]), "filters=1"):
            assert ask(reading, "GET", "/networks?" + query).status == 400

    @pytest.mark.parametrize("name", ["tstnet", "6cbb982de144", "6cbb982de14435e0565b06c4b6e90e672db1541e321fc75065985811f6a2d6b5"])
    def test_inspect(self, reading, name):
        told = ask(reading, "GET", "/networks/" + name).json
        assert told["Containers"][ID]["IPv4Address"] == "10.77.0.2/24" and told["Containers"][ID]["Name"] == "tstweb"

    def test_what_changes_where_nerdctl_keeps_them(self, furnished, tmp_path):
        folder = tmp_path / "networks"
        (folder / "other").mkdir()
        (folder / "readme.txt").write_text("{")
        write_json(folder / "default/one.json", {"name": "one", "nerdctlID": 5, "nerdctlLabels": {"a": "b"}, "plugins": [{"type": "macvlan"}]})
        one = ask(furnished, "GET", "/networks/one").json
        assert (one["Driver"], one["Labels"], len(one["Id"])) == ("macvlan", {"a": "b"}, 64)
        write_json(folder / "default/one.json", {"name": "one", "plugins": [{"type": "ipvlan"}]})
        assert ask(furnished, "GET", "/networks/one").json["Driver"] == "ipvlan"
        (folder / "default/nerdctl-tstnet.conflist").unlink()
        assert [each["Name"] for each in ask(furnished, "GET", "/networks").json] == ["bridge", "host", "none", "one"]

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x", "type": "bridge"}', '{"plugins": []}', '{"name": 1, "plugins": []}'])
    def test_files_that_are_none_of_networks(self, furnished, tmp_path, text):
        (tmp_path / "networks/default/odd.conflist").write_text(text)
        assert [each["Name"] for each in ask(furnished, "GET", "/networks").json] == ["bridge", "host", "none", "tstnet"]

    def test_a_member_whose_addresses_are_not_known(self, furnished, fake, tmp_path):
        (store_of(fake, tmp_path) / "etchosts/default" / ID / "meta.json").unlink()
        answer = ask(furnished, "GET", "/networks/tstnet")
        told = answer.json["Containers"][ID]
        assert (answer.status, told["Name"], told["IPv4Address"], told["MacAddress"]) == (200, "tstweb", "", "")
        fake.stop_serving()
        assert ask(furnished, "GET", "/networks/tstnet").status == 503
        fake.start_serving()

    def test_none(self, reading):
        answer = ask(reading, "GET", "/networks/nosuch")
        assert (answer.status, answer.message) == (404, "network nosuch not found")
        assert ask(reading, "GET", "/networks/tstnet?scope=swarm").status == 404


###############################################################################
# Volumes
###############################################################################


class TestVolumes:
    def test_list(self, reading):
        told = ask(reading, "GET", "/volumes").json
        assert told["Warnings"] is None
        folder = pathlib.Path(reading.inventory.store) / "volumes/default/tstvol"
        written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime((folder / "volume.json").stat().st_mtime))
        assert told["Volumes"][0] == {
            "CreatedAt": written, "Driver": "local", "Labels": None, "Mountpoint": f"{folder}/_data", "Name": "tstvol", "Options": None, "Scope": "local"}

    @pytest.mark.parametrize("filters, count", [({"name": ["vol"]}, 1), ({"name": ["x"]}, 0), ({"name": ["^tst.ol$"]}, 1), ({"name": ["vol("]}, 0), ({"driver": ["local"]}, 1), ({"driver": ["x"]}, 0),
                                                ({"label": ["x"]}, 0), ({"dangling": ["true"]}, 0), ({"dangling": ["false"]}, 1)])
    def test_filters(self, reading, filters, count):
        assert len(ask(reading, "GET", "/volumes?" + filtered(**filters)).json["Volumes"]) == count

    def test_inspect(self, reading):
        assert ask(reading, "GET", "/volumes/tstvol").json["Name"] == "tstvol"
        answer = ask(reading, "GET", "/volumes/nosuch")
        assert (answer.status, answer.message) == (404, "get nosuch: no such volume")

    def test_none_at_all(self, engine):
        assert ask(engine, "GET", "/volumes").json == {"Volumes": [], "Warnings": None}


###############################################################################
# Swarm and plugins
###############################################################################


class TestSwarmAndPlugins:
    @pytest.mark.parametrize("method, path", [
        ("GET", "/swarm"), ("GET", "/nodes"), ("GET", "/services?status=true"), ("GET", "/tasks"), ("GET", "/secrets"), ("GET", "/configs"),
        ("POST", "/services/create"), ("DELETE", "/nodes/x"), ("GET", "/services/x/logs")])
    def test_no_manager(self, engine, scripted, method, path):
        answer = ask(engine, method, path)
        assert answer.status == 503 and answer.message.startswith("This node is not a swarm manager.")
        assert scripted.calls() == []

    def test_others(self, engine):
        assert ask(engine, "POST", "/swarm/leave").message == "This node is not part of a swarm"
        assert ask(engine, "POST", "/swarm/init").status == 501
        assert ask(engine, "GET", "/plugins").json == []
        assert ask(engine, "GET", "/plugins/a/b:1/json").status == 404
        assert ask(engine, "POST", "/plugins/pull?remote=x").status == 501


###############################################################################
# BuildKit
###############################################################################


# Recorded from buildx 0.38.2 (docker driver) against buildkitd 0.34.2: the first DATA of one stream of each kind.
# `docker buildx build --build-arg X=9 --label bl=1 -t bxm:1 .`
SOLVE_TAGGED = bytes.fromhex(
    "00000001240a196c666964616a317768726c74737a76646835786d6962326d381a046d6f6279220d0a046e616d65120562786d3a31221b0a137072"
    "656665722d696d6167652d6469676573741204747275652a197661703931747075366a6e336f7a7a7275366e616e667233613a1b0a12696d616765"
    "2d7265736f6c76652d6d6f646512056c6f63616c3a160a0866696c656e616d65120a446f636b657266696c653a0d0a086c6162656c3a626c120131"
    "3a100a0b6275696c642d6172673a581201393a2e0a116174746573743a70726f76656e616e636512196d6f64653d6d696e2c696e6c696e652d6f6e"
    "6c793d7472756542006a320a046d6f6279121b0a137072656665722d696d6167652d646967657374120474727565120d0a046e616d65120562786d"
    "3a31")
# `docker buildx build -o type=local,dest=ol .`
SOLVE_LOCAL = bytes.fromhex(
    "00000000ad0a19707267383264773671737a69783074787a737a74327375696f1a056c6f63616c2a1966756a696a323866696271716f76766f796e"
    "6e3879647737723a2e0a116174746573743a70726f76656e616e636512196d6f64653d6d696e2c696e6c696e652d6f6e6c793d747275653a1b0a12"
    "696d6167652d7265736f6c76652d6d6f646512056c6f63616c3a160a0866696c656e616d65120a446f636b657266696c6542006a070a056c6f6361"
    "6c")
# The probe of a build before the build itself, of any `docker buildx build`.
SOLVE_PROBE = bytes.fromhex(
    "000000003a0a1972747767396762766b726c646d6766666a6d6d317a6c3433382a196c6d307076676a786f31746d3263386d357663776d39366161"
    "42005801")
STATUS = bytes.fromhex("000000001b0a1972747767396762766b726c646d6766666a6d6d317a6c343338")
# What begins otherwise, so that it is never held: LLBBridge Return and Solve, history, Content Info, spans, the session of
# a bake, and of `docker buildx du` and `prune`.
PASSED = [bytes.fromhex(each) for each in (
    "00000000040a021a00",
    "0000000099120d646f636b657266696c652e76301a2e0a116174746573743a70726f76656e616e636512196d6f64653d",
    "00000000250801121f6275696c64782d746573742d686973746f72792d6170692d666561747572651801",
    "00000000490a477368613235363a34613365363539373732636639653966643439346364363836323239343035396165",
    "0000001a700aed340a84010a180a0c736572766963652e6e616d6512080a066275696c64780a1e0a1674656c656d6574",
    "000000002f0a2d0000240400000000000005001000000003000000fa0006001001400001000010000004001000000009",
    "00000000020a00",
    "000000000b0a00188080c489e5c5b206",
)]


map_entry = nerdctld.encode_map_entry


def exporter(kind, *rest, **attributes):
    """An exporter of a SolveRequest, with `_` for the dashes of its attributes."""
    parts = [map_entry(2, key.replace("_", "-"), value) for key, value in attributes.items()]
    return nerdctld.encode_field(1, kind.encode()) + b"".join(parts) + b"".join(rest)


def solve(*exporters, rest=b"", reference=b"abc123"):
    """A SolveRequest."""
    return nerdctld.encode_field(1, reference) + rest + b"".join(nerdctld.encode_field(13, each) for each in exporters)


def read_exporters(message):
    """What a SolveRequest asks for, as (kind, attributes)."""
    found = []
    for each in nerdctld.decode_fields(message):
        if each.number == 13:
            parts = list(nerdctld.decode_fields(each.value))
            found.append((next(part.value for part in parts if part.number == 1).decode(),
                          dict(nerdctld.decode_map_entry(part.value) for part in parts if part.number == 2)))
    return found


def keep(message):
    """Lets every request through as it is."""
    return message, None


def rewrite(message):
    """The rewrite alone, without a look at the worker."""
    return nerdctld.rewrite_solve(message)[0], None


def done_at_once(work, done):
    """Does for a proxy at once what a relay does in a thread."""
    done(work())


def settle(client, proxy, server, credits=True, piece=5000, rounds=2000):
    """Carry bytes to and fro, in pieces, until nobody has any left; the server credits what it gets when `credits`."""
    def carry(data, to):
        moved = bytes(data)
        for at in range(0, len(moved), piece):
            to(moved[at:at + piece])
        return bool(moved)

    for _ in range(rounds):
        moved = carry(client.take(), proxy.from_client) | carry(server.take(), proxy.from_server)
        proxy.replenish()
        for out, peer in ((proxy.client_out, client), (proxy.server_out, server)):
            data = bytes(out)
            out.clear()
            moved |= carry(data, peer.feed)
        if credits and server.uncredited:
            server.credit()
            moved = True
        if not moved:
            return
    raise AssertionError("bytes go round without an end")


SOLVE, FOLLOW, OTHER = (nerdctld.GrpcProxy.SERVICE + name for name in ("Solve", "Status", "ListWorkers"))


class TestBuildKit:
    """Relay and BuildKit on bytes."""

    # --- the rewrite ---

    def test_rewrite_of_a_recorded_solve(self):
        message, names = nerdctld.rewrite_solve(SOLVE_TAGGED[5:])
        assert names == ["docker.io/library/bxm:1"]
        assert read_exporters(message) == [("image", {
            "prefer-image-digest": "true", "name": "docker.io/library/bxm:1", "unpack": "true",
            "dangling-name-prefix": "moby-dangling", "danging-name-empty-only": "true"})]
        before = [each.raw for each in nerdctld.decode_fields(SOLVE_TAGGED[5:]) if each.number not in (3, 4, 13)]
        assert [each.raw for each in nerdctld.decode_fields(message) if each.number != 13] == before
        assert not [each for each in nerdctld.decode_fields(message) if each.number in (3, 4)]

    @pytest.mark.parametrize("recorded", [SOLVE_LOCAL, SOLVE_PROBE, STATUS])
    def test_what_stores_nothing_stays(self, recorded):
        assert nerdctld.rewrite_solve(recorded[5:]) == (recorded[5:], None)

    def test_rewrite_of_the_deprecated_fields(self):
        old = (nerdctld.encode_field(1, b"r") + nerdctld.encode_field(3, b"moby")
               + map_entry(4, "name", "a,localhost:5000/b:2") + map_entry(4, "push", "true"))
        message, names = nerdctld.rewrite_solve(old)
        assert names == ["docker.io/library/a:latest", "localhost:5000/b:2"]
        (kind, attributes), = read_exporters(message)
        assert kind == "image" and attributes["name"] == ",".join(names) and attributes["push"] == "true"
        assert not [each for each in nerdctld.decode_fields(message) if each.number in (3, 4)]

    def test_rewrite_keeps_what_the_client_set(self):
        message, _ = nerdctld.rewrite_solve(solve(exporter("moby", unpack="false", dangling_name_prefix="mine")))
        assert read_exporters(message) == [("image", {"unpack": "false", "dangling-name-prefix": "mine", "danging-name-empty-only": "true"})]

    def test_rewrite_of_several_exporters(self):
        local = exporter("local", dest="x")
        message, names = nerdctld.rewrite_solve(solve(local, exporter("moby", name="x"), exporter("moby")))
        kinds = read_exporters(message)
        assert [kind for kind, _ in kinds] == ["local", "image", "image"] and names == ["docker.io/library/x:latest"]
        assert "name" not in kinds[2][1]
        assert next(each.value for each in nerdctld.decode_fields(message) if each.number == 13) == local

    def test_unknown_fields_stay_byte_for_byte(self):
        # A varint that is longer than it must be would not survive a decode and an encode.
        odd = b"\xf8\x7f\x81\x80\x00" + nerdctld.encode_field(900, b"\xff\0x") + b"\xfd\x7f1234"
        message, _ = nerdctld.rewrite_solve(solve(exporter("moby", odd), rest=odd))
        assert message.count(odd) == 2

    @pytest.mark.parametrize("name", ["x@sha256:" + "a" * 64, "-x", "UPPER", "a:b:c", "ok,x@sha256:" + "a" * 64])
    def test_bad_tags_are_refused(self, name):
        with pytest.raises(nerdctld.BadParameter) as caught:
            nerdctld.rewrite_solve(solve(exporter("moby", name=name)))
        assert "tag" in str(caught.value)

    def test_an_image_exporter_stores_unless_told_not_to(self):
        kept = solve(exporter("image", name="docker.io/library/x:1"))
        assert nerdctld.rewrite_solve(kept) == (kept, ["docker.io/library/x:1"])
        assert nerdctld.rewrite_solve(solve(exporter("image", store="false", push="true")))[1] is None

    @pytest.mark.parametrize("data", [b"\x0a\x05abc", b"\x68\x01", solve(b"\x08\x01"), solve(b"\x0a\x02\xff\xff")])
    def test_what_is_no_solve_passes(self, data):
        assert nerdctld.prepare_solve(None, "", data) == (data, None)

    # --- the proxy ---

    def proxied(self, prepare=rewrite, **options):
        """A client, a proxy that prepares at once, and a server."""
        return Peer(False), nerdctld.GrpcProxy(prepare, done_at_once), Peer(True, **options)

    @pytest.mark.parametrize("path", [FOLLOW, OTHER])
    @pytest.mark.parametrize("recorded", [SOLVE_TAGGED, STATUS, *PASSED])
    def test_other_calls_pass(self, recorded, path):
        client, proxy, server = self.proxied(self.refusing)
        client.open(1, recorded, path=path)
        client.open(3, recorded, end=False, path=OTHER)
        settle(client, proxy, server, credits=False)
        assert bytes(server.received[1]) == recorded == bytes(server.received[3]) and server.ended == {1}
        assert path.encode() in server.heads[1][0]

    @pytest.mark.parametrize("data", [
        b"\1" + SOLVE_TAGGED[1:], SOLVE_TAGGED[:50], SOLVE_TAGGED + STATUS, b"", b"\0\0", grpc(b"\x0b"),
    ], ids=["compressed", "cut short", "two", "nothing", "no message", "no request"])
    def test_what_is_no_solve_passes_to_who_refuses_it(self, data):
        client, proxy, server = self.proxied(self.refusing)
        client.open(1, data, path=SOLVE)
        settle(client, proxy, server)
        assert bytes(server.received.get(1, b"")) == data and server.ended == {1}

    def test_too_large_a_solve_passes(self):
        client, proxy, server = self.proxied(self.refusing)
        proxy.MAX_REQUEST = 100000
        data = grpc(solve(exporter("moby"), rest=map_entry(7, "a", "a" * 300000)))
        client.open(1, data, path=SOLVE)
        settle(client, proxy, server)
        assert bytes(server.received[1]) == data and server.ended == {1}

    @pytest.mark.parametrize("piece", [1, 3, 9, 100, 100000])
    def test_pieces_make_no_difference(self, piece):
        client, proxy, server = self.proxied()
        client.open(1, STATUS, path=FOLLOW)
        client.open(3, SOLVE_TAGGED, path=SOLVE)
        client.open(5, PASSED[1], end=False)
        settle(client, proxy, server, piece=piece)
        assert bytes(server.received[1]) == STATUS and bytes(server.received[5]) == PASSED[1]
        assert bytes(server.received[3]) == grpc(nerdctld.rewrite_solve(SOLVE_TAGGED[5:])[0])
        assert server.ended == {1, 3} and same_windows(client, proxy.client) and same_windows(server, proxy.server)

    def test_a_path_may_be_compressed(self):
        """As grpc-go sends it: Huffman coded, and from the second call on as an entry of the table."""
        client, proxy, server = self.proxied()
        path = huffman(SOLVE.encode())
        for stream, block in ((1, b"\x44" + bytes([128 | len(path)]) + path), (3, b"\xbe")):
            client.out += frame(HEADERS, 4, stream, block)
            client.answer(stream, SOLVE_TAGGED)
            settle(client, proxy, server)
            assert bytes(server.received[stream]) == grpc(rewrite(SOLVE_TAGGED[5:])[0])
            assert SOLVE.encode() in server.heads[stream][0]

    def test_headers_and_trailers_pass(self):
        client, proxy, server = self.proxied()
        client.open(1, STATUS)
        settle(client, proxy, server)
        server.out += headers_frame(1, [(":status", "200"), ("content-type", "application/grpc")])
        server.answer(1, b"\0\0\0\0\1x" * 10000, end=False)
        settle(client, proxy, server)
        told = [("grpc-status", "2"), ("grpc-message", "no")]
        server.out += headers_frame(1, [*told, ("grpc-status-details-bin", "x" * 50000)], 1)
        settle(client, proxy, server)
        assert bytes(client.received[1]) == b"\0\0\0\0\1x" * 10000 and client.ended == {1}
        first, last = client.heads[1]
        assert first == nerdctld.encode_headers([(":status", "200"), ("content-type", "application/grpc")])
        assert last.startswith(nerdctld.encode_headers(told)) and not proxy.client.streams

    def test_resets_and_goaway_pass(self):
        client, proxy, server = self.proxied()
        for stream in (1, 3, 5):
            client.open(stream, STATUS, end=False)
        settle(client, proxy, server)
        client.out += frame(RST_STREAM, 0, 1, struct.pack(">I", 8))
        server.out += frame(RST_STREAM, 0, 3, struct.pack(">I", 7)) + frame(GOAWAY, 0, 0, struct.pack(">II", 5, 0))
        settle(client, proxy, server)
        assert server.reset == {1: 8} and client.reset == {3: 7} and client.gone == [(5, 0)]
        assert list(proxy.client.streams) == list(proxy.server.streams) == [5]

    def test_an_answer_before_the_end_of_the_request(self):
        """grpc-go resets the stream behind its trailers; what waits for the client still comes."""
        client, proxy, server = self.proxied()
        client.first = client.own_first = 65535
        client.open(1, STATUS, end=False)
        settle(client, proxy, server)
        proxy.client.streams[1].send_window = 0
        server.out += headers_frame(1, [(":status", "200")])
        server.answer(1, b"x" * 100, end=False)
        server.out += headers_frame(1, [("grpc-status", "0")], 1) + frame(RST_STREAM, 0, 1, struct.pack(">I", 0))
        settle(client, proxy, server)
        assert 1 not in client.ended
        client.out += frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1000))
        settle(client, proxy, server)
        assert bytes(client.received[1]) == b"x" * 100 and client.ended == {1}
        assert not client.reset and len(client.heads[1]) == 2

    # --- windows ---

    @pytest.mark.parametrize("kilobytes", [20, 60, 64, 65, 100, 300, 700])
    @pytest.mark.parametrize("initial", [65535, 1 << 20, 16384])
    def test_big_requests(self, kilobytes, initial):
        """A request far larger than every window arrives whole, and all have the same view of the windows."""
        message = solve(exporter("moby", name="x"), rest=map_entry(7, "build-arg:A", "a" * (kilobytes << 10)))
        client, proxy, server = self.proxied(initial=initial)
        settle(client, proxy, server)
        client.open(1, grpc(message), path=SOLVE)
        client.open(3, STATUS)
        settle(client, proxy, server)
        assert bytes(server.received[1]) == grpc(rewrite(message)[0]) and bytes(server.received[3]) == STATUS
        assert server.ended == {1, 3}
        assert same_windows(client, proxy.client) and same_windows(server, proxy.server)

    def test_server_that_credits_late(self):
        """While buildkitd takes nothing, no more than its window is sent, and the client sends no more than ours."""
        message = solve(exporter("moby", name="x"), rest=map_entry(7, "a", "a" * 200000))
        other = b"\0\0\x03\x0d\x40" + b"\xff" * 5_000_000
        client, proxy, server = self.proxied()
        client.open(1, grpc(message), path=SOLVE)
        settle(client, proxy, server, credits=False)
        assert server.own == 0 and not client.waiting
        client.open(3, other)
        client.open(5, STATUS)
        settle(client, proxy, server, credits=False)
        assert server.own == 0 and proxy.client.streams[3].receive_window == 0
        assert proxy.server.streams[3].queued == proxy.client.window == len(other) - len(client.waiting[3])
        settle(client, proxy, server, piece=100000)
        assert bytes(server.received[1]) == grpc(rewrite(message)[0])
        assert bytes(server.received[3]) == other and bytes(server.received[5]) == STATUS
        assert same_windows(client, proxy.client) and same_windows(server, proxy.server)

    def test_client_that_credits_late(self):
        client, proxy, server = self.proxied()
        client.open(1, STATUS)
        settle(client, proxy, server)
        server.out += headers_frame(1, [(":status", "200")])
        server.answer(1, b"x" * 5_000_000)
        settle(client, proxy, server, piece=100000)
        assert client.own == 0 and len(server.waiting[1]) == 5_000_000 - proxy.server.window
        for _ in range(200):
            client.credit()
            settle(client, proxy, server, piece=100000)
        assert client.received[1] == b"x" * 5_000_000 and client.ended == {1}

    @pytest.mark.parametrize("changed", [1, 16384, 1 << 20])
    def test_first_window_that_changes_midway(self, changed):
        message = solve(exporter("moby", name="x"), rest=map_entry(7, "a", "a" * 300000))
        client, proxy, server = self.proxied()
        settle(client, proxy, server)
        client.open(1, grpc(message), path=SOLVE)
        client.open(3, b"b" * 300000)
        settle(client, proxy, server, credits=False)
        server.change(changed)
        settle(client, proxy, server, credits=False)
        # With credits of one byte it would take too long.
        server.change(max(changed, 16384))
        settle(client, proxy, server)
        assert bytes(server.received[1]) == grpc(rewrite(message)[0]) and bytes(server.received[3]) == b"b" * 300000
        assert same_windows(server, proxy.server)

    def test_client_that_takes_back_a_request(self):
        message = grpc(solve(exporter("moby", name="x"), rest=map_entry(7, "a", "a" * 300000)))
        for sent in (50000, len(message)):
            client, proxy, server = self.proxied()
            client.open(1, message[:sent], end=False, path=SOLVE)
            client.open(3, b"\0\0\0\0\x05" + b"\xff" * 70000, end=False)
            settle(client, proxy, server, credits=False)
            client.waiting.pop(1, None)
            client.out += frame(RST_STREAM, 0, 1, struct.pack(">I", 8))
            settle(client, proxy, server)
            assert server.reset == {1: 8} and len(server.received[3]) == 70005
            assert same_windows(client, proxy.client) and same_windows(server, proxy.server)
            assert not proxy.requests and not proxy.builds
            assert list(proxy.client.streams) == list(proxy.server.streams) == [3]

    def test_server_that_ends_a_stream_early(self):
        message = grpc(solve(exporter("moby", name="x"), rest=map_entry(7, "a", "a" * 300000)))
        client, proxy, server = self.proxied(lambda message: (message, print))
        client.open(1, message, path=SOLVE)
        settle(client, proxy, server, credits=False)
        server.out += headers_frame(1, [(":status", "200"), ("grpc-status", "13")], 1)
        server.out += frame(RST_STREAM, 0, 1, b"\0\0\0\0")
        settle(client, proxy, server)
        assert 1 in client.ended and not proxy.answers and not proxy.client.streams and not proxy.server.streams
        client.open(3, STATUS)
        settle(client, proxy, server)
        assert bytes(server.received[3]) == STATUS and same_windows(server, proxy.server)

    def test_streams_leave_nothing_behind(self):
        client, proxy, server = self.proxied(lambda message: (message, lambda answer: None))
        for stream in range(1, 401, 2):
            data, path = random.Random(stream).choice([(STATUS, FOLLOW), (SOLVE_TAGGED, SOLVE), (PASSED[1], OTHER)])
            client.open(stream, data, path=path)
            settle(client, proxy, server)
            server.out += headers_frame(stream, [(":status", "200"), ("grpc-status", "0")], 1)
            settle(client, proxy, server)
        assert client.ended == server.ended == set(range(1, 401, 2))
        for table in (proxy.requests, proxy.answers, proxy.builds, proxy.client.streams, proxy.server.streams):
            assert not table

    # --- answers in place of buildkitd ---

    def refusing(self, message):
        raise nerdctld.Conflict("write this\n\u00e9 100%")

    def test_refused_solve(self):
        """The Solve ends with the reason, the progress of the same build without one, and other streams go on."""
        client, proxy, server = self.proxied(self.refusing)
        progress = grpc(nerdctld.encode_field(1, SOLVE_TAGGED[7:7 + SOLVE_TAGGED[6]]))
        client.open(1, progress, path=FOLLOW)
        client.open(3, STATUS, path=FOLLOW)
        client.open(5, SOLVE_TAGGED, path=SOLVE)
        settle(client, proxy, server)
        client.open(7, progress, path=FOLLOW)
        settle(client, proxy, server)
        assert client.ended == {1, 5, 7} and server.reset == {1: 8, 5: 8, 7: 8} and 5 not in server.received
        assert b"grpc-status\x019" in client.heads[5][0] and b"write this%0A%C3%A9 100%25" in client.heads[5][0]
        assert b":status\x03200" in client.heads[5][0]
        assert b"grpc-status\x010" in client.heads[1][0] and b"grpc-status\x010" in client.heads[7][0]
        assert same_windows(client, proxy.client) and same_windows(server, proxy.server)

    def test_progress_of_a_refused_build_ends_behind_its_headers(self):
        client, proxy, server = self.proxied(self.refusing)
        client.open(1, grpc(nerdctld.encode_field(1, SOLVE_TAGGED[7:7 + SOLVE_TAGGED[6]])), path=FOLLOW)
        settle(client, proxy, server)
        server.out += headers_frame(1, [(":status", "200")])
        settle(client, proxy, server)
        client.open(3, SOLVE_TAGGED, path=SOLVE)
        settle(client, proxy, server)
        headers = [(":status", "200"), ("grpc-status", "0")]
        assert client.heads[1] == [nerdctld.encode_headers([each]) for each in headers]

    def test_answer_is_given_to_who_asked(self):
        told = []
        client, proxy, server = self.proxied(lambda message: (message, told.append))
        client.open(1, SOLVE_TAGGED, path=SOLVE)
        settle(client, proxy, server)
        answer = map_entry(1, "containerimage.digest", "sha256:1")
        server.out += headers_frame(1, [(":status", "200")]) + frame(0, 0, 1, grpc(answer)[:9])
        server.out += frame(0, 0, 1, grpc(answer)[9:]) + headers_frame(1, [("grpc-status", "0")], 1)
        settle(client, proxy, server)
        assert told == [answer] and nerdctld.solved_digest(answer) == "sha256:1" and bytes(client.received[1]) == grpc(answer)
        assert nerdctld.solved_digest(b"") == nerdctld.solved_digest(b"\x0b") == nerdctld.solved_digest(b"\x08\x01") == ""

    def test_others_go_on_while_a_solve_is_prepared(self):
        """Whoever takes back the request meanwhile is asked for nothing."""
        client, proxy, server = self.proxied()
        waiting = []
        proxy.run = lambda work, done: waiting.append((work, done))
        client.open(1, SOLVE_TAGGED, path=SOLVE)
        client.open(3, SOLVE_TAGGED, path=SOLVE)
        client.open(5, STATUS)
        settle(client, proxy, server)
        assert bytes(server.received[5]) == STATUS and len(waiting) == 2
        assert 1 in server.heads and 1 not in server.received
        client.out += frame(RST_STREAM, 0, 3, struct.pack(">I", 8))
        settle(client, proxy, server)
        for work, done in waiting:
            done(work())
        settle(client, proxy, server)
        assert bytes(server.received[1]) == grpc(rewrite(SOLVE_TAGGED[5:])[0])
        assert 3 not in server.received and server.reset == {3: 8}

    def test_a_fault_of_ours_ends_the_build_only(self, capfd):
        client, proxy, server = self.proxied(lambda message: 1 // 0)
        client.open(1, SOLVE_TAGGED, path=SOLVE)
        client.open(3, STATUS)
        settle(client, proxy, server)
        assert b"grpc-status\x0213" in client.heads[1][0] and bytes(server.received[3]) == STATUS
        assert "ZeroDivisionError" in capfd.readouterr().err

    def test_server_that_dies(self):
        client, proxy, server = self.proxied(keep)
        client.open(1, STATUS, path=FOLLOW)
        client.open(3, SOLVE_TAGGED, path=SOLVE)
        settle(client, proxy, server)
        server.out += headers_frame(1, [(":status", "200")])
        settle(client, proxy, server)
        proxy.server_ended()
        client.open(5, STATUS)
        server.take()
        settle(client, proxy, server)
        assert client.ended == {1, 3, 5}
        assert b":status" not in client.heads[1][1] and b"grpc-status\x0214" in client.heads[1][1]
        assert b":status" in client.heads[3][0] and b"buildkitd has ended" in client.heads[5][0]

    def test_server_that_never_was(self):
        """Over sockets: SETTINGS first, then every call ends with the reason; the client's end ends the relay."""
        ours, theirs = socket.socketpair()
        relay = nerdctld.Relay(ours, None)
        proxy = nerdctld.GrpcProxy(keep, relay.run)
        proxy.server_ended(nerdctld.Unavailable("start it"))
        thread = threading.Thread(target=relay.carry, args=(proxy, nerdctld.PREFACE[:5]), daemon=True)
        thread.start()
        theirs.settimeout(10)
        client = Peer(False)
        client.open(1, STATUS)
        theirs.sendall(client.take()[5:])
        while 1 not in client.ended:
            client.feed(theirs.recv(65536))
        assert b"start it" in client.heads[1][0]
        theirs.close()
        thread.join(10)
        assert not thread.is_alive()
        ours.close()

    # --- relays over sockets ---

    @contextlib.contextmanager
    def relayed(self, make, early=b""):
        """The two far ends of a relay, and its thread; `make(relay)` makes its bridge."""
        client, near = socket.socketpair()
        far, server = socket.socketpair()
        relay = nerdctld.Relay(near, far)
        thread = threading.Thread(target=relay.carry, args=(make(relay), early), daemon=True)
        thread.start()
        try:
            yield client, server, thread
        finally:
            for each in (client, server):
                each.close()
            thread.join(10)
            assert not thread.is_alive() and far.fileno() == relay.wakeup.fileno() == relay.waker.fileno() == -1
            near.close()

    BRIDGES = {"grpc": lambda relay: nerdctld.GrpcProxy(keep, relay.run),
               "session": lambda relay: nerdctld.SessionBridge([("X-Docker-Expose-Session-Uuid", "u")])}

    def drive(self, peers, done):
        """Let peers speak over their sockets until `done()`."""
        deadline = time.monotonic() + 20
        while not done():
            assert time.monotonic() < deadline, "nothing moves any more"
            for sock, peer in peers:
                if peer.server and peer.uncredited:
                    peer.credit()
                if peer.out:
                    sock.setblocking(False)
                    # The relay may have ended; what it said before is still to be read.
                    with contextlib.suppress(OSError):
                        del peer.out[:sock.send(peer.out)]
            readable, _, _ = select.select([sock for sock, _ in peers], [], [], 0.05)
            for sock, peer in peers:
                if sock in readable:
                    data = sock.recv(65536)
                    assert data, "the relay has ended"
                    peer.feed(data)

    @pytest.mark.parametrize("kilobytes", [20, 200, 700])
    def test_big_request_over_sockets(self, kilobytes):
        message = solve(exporter("moby", name="x"), rest=map_entry(7, "build-arg:A", "a" * (kilobytes << 10)))
        client, server = Peer(False), Peer(True)
        client.open(1, grpc(message), path=SOLVE)
        early = client.take()[:100]
        client.__init__(False)
        client.open(1, grpc(message), path=SOLVE)
        del client.out[:100]
        with self.relayed(lambda relay: nerdctld.GrpcProxy(rewrite, relay.run), early) as (near, far, _):
            self.drive([(near, client), (far, server)], lambda: 1 in server.ended)
        assert bytes(server.received[1]) == grpc(rewrite(message)[0])

    def test_a_solve_that_takes_its_time_holds_nobody_up(self):
        ready = threading.Event()

        def prepare(message):
            assert ready.wait(20)
            return rewrite(message)

        client, server = Peer(False), Peer(True)
        client.open(1, SOLVE_TAGGED, path=SOLVE)
        with self.relayed(lambda relay: nerdctld.GrpcProxy(prepare, relay.run)) as (near, far, _):
            self.drive([(near, client), (far, server)], lambda: 1 in server.heads)
            client.open(3, STATUS)
            self.drive([(near, client), (far, server)], lambda: 3 in server.ended)
            assert 1 not in server.received
            ready.set()
            self.drive([(near, client), (far, server)], lambda: 1 in server.ended)
        assert bytes(server.received[1]) == grpc(rewrite(SOLVE_TAGGED[5:])[0])

    def test_a_relay_may_end_before_its_solve_is_prepared(self):
        ready, ended = threading.Event(), threading.Event()

        def prepare(message):
            ready.wait(20)
            ended.set()
            return message, None

        client, server = Peer(False), Peer(True)
        client.open(1, SOLVE_TAGGED, path=SOLVE)
        with self.relayed(lambda relay: nerdctld.GrpcProxy(prepare, relay.run)) as (near, far, thread):
            self.drive([(near, client), (far, server)], lambda: 1 in server.heads)
            near.close()
            thread.join(10)
            assert not thread.is_alive()
        ready.set()
        assert ended.wait(10)

    def test_a_client_that_breaks_the_rules_is_told(self, capfd):
        with self.relayed(self.BRIDGES["grpc"]) as (near, far, thread):
            near.sendall(nerdctld.PREFACE + frame(DATA, 0, 1, b"x"))
            thread.join(10)
            assert not thread.is_alive()
            frames, _ = cut_frames(near.recv(65536))
            assert frames[-1][0] == GOAWAY
        assert "nobody has opened" in capfd.readouterr().err

    def test_session_carries_bytes_both_ways(self):
        """What the client writes arrives in BytesMessages within the windows, and the other way round."""
        sent = random.Random(1).randbytes(400000)
        back = grpc(nerdctld.encode_field(1, sent[::-1]))
        server = Peer(True)
        got = bytearray()
        with self.relayed(self.BRIDGES["session"]) as (near, far, thread):
            writer = threading.Thread(target=near.sendall, args=(sent,), daemon=True)
            writer.start()
            reader = threading.Thread(target=self.collect, args=(near, got), daemon=True)
            reader.start()
            answered = []

            def done():
                if 1 in server.heads and not answered:
                    answered.append(True)
                    server.out += headers_frame(1, [(":status", "200")])
                    server.out += b"".join(frame(0, 0, 1, back[at:at + 16384]) for at in range(0, len(back), 16384))
                return len(b"".join(self.session_bytes(server))) == len(sent) and len(got) == len(sent)

            self.drive([(far, server)], done)
            assert b"".join(self.session_bytes(server)) == sent and got == sent[::-1]
            # None is larger than a frame: grpc-go would take a large buffer for it.
            assert max(len(grpc(nerdctld.encode_field(1, each))) for each in self.session_bytes(server)) == 16384
            head = server.heads[1][0]
            assert b"x-docker-expose-session-uuid\x01u" in head and b":authority" in head and b"application/grpc" in head
            near.shutdown(socket.SHUT_WR)
            self.drive([(far, server)], lambda: 1 in server.ended)
            thread.join(10)
            assert not thread.is_alive()

    @staticmethod
    def collect(sock, into):
        while True:
            data = sock.recv(65536)
            if not data:
                return
            into.extend(data)

    @staticmethod
    def session_bytes(server):
        """What the messages received so far carry."""
        decoder = nerdctld.GrpcDecoder()
        messages = decoder.feed(bytes(server.received.get(1, b"")))
        return [each.value for message in messages for each in nerdctld.decode_fields(message)]

    def test_session_holds_no_memory(self):
        """While the client does not read, buildkitd is granted nothing; while buildkitd does not, the client waits."""
        session = nerdctld.SessionBridge([])
        message = grpc(nerdctld.encode_field(1, b"x" * 100000))
        for _ in range(30):
            session.from_server(frame(0, 0, 1, message))
        session.server_out.clear()
        session.replenish()
        assert not session.server_out
        session.client_out.clear()
        session.replenish()
        assert session.server_out
        assert session.room() == (True, True)
        session.from_client(b"x" * (2 << 20))
        assert session.room() == (False, True)

    def test_a_slow_buildkitd_stops_the_client(self):
        """Of a context that nobody takes only so much is read as may wait."""
        with self.relayed(self.BRIDGES["session"]) as (near, far, _):
            near.setblocking(False)
            sent = 0
            while select.select([], [near], [], 0.4)[1]:
                sent += near.send(b"x" * 65536)
                assert sent < 3 << 20

    @pytest.mark.parametrize("bridge", BRIDGES)
    def test_relay_ends_with_the_client(self, bridge):
        with self.relayed(self.BRIDGES[bridge]) as (near, far, thread):
            near.close()
            thread.join(10)
            assert not thread.is_alive()

    def test_what_the_client_said_last_is_sent(self):
        server = Peer(True)
        with self.relayed(self.BRIDGES["session"]) as (near, far, thread):
            near.sendall(b"x" * 50000)
            near.close()
            self.drive([(far, server)], lambda: 1 in server.ended)
        assert b"".join(self.session_bytes(server)) == b"x" * 50000

    def test_client_is_answered_after_a_buildkitd_that_read_nothing(self):
        def make(relay):
            proxy = nerdctld.GrpcProxy(keep, relay.run)
            proxy.LIMIT = 100000
            return proxy

        client = Peer(False)
        with self.relayed(make) as (near, far, thread):
            client.open(1, b"x" * 5_000_000)
            far.sendall(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 30)))
            far.sendall(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 30)))
            deadline = time.monotonic() + 0.4
            self.drive([(near, client)], lambda: time.monotonic() > deadline)
            far.close()
            client.open(3, STATUS)
            self.drive([(near, client)], lambda: client.ended == {1, 3})
            assert b"buildkitd has ended" in client.heads[3][0]

    def test_session_ends_with_buildkitd(self):
        with self.relayed(self.BRIDGES["session"]) as (near, far, thread):
            far.close()
            thread.join(5)
            assert not thread.is_alive()

    # --- buildkitd's address and worker ---

    @pytest.mark.parametrize("address", ["unix:///nonexistent.sock", "tcp://127.0.0.1:1", "ssh://x", "tcp://x", "docker-container://b", ""])
    def test_dial_of_nothing(self, address):
        with pytest.raises(nerdctld.Unavailable) as caught:
            nerdctld.dial(address, 2.0)
        assert address in str(caught.value)

    @pytest.mark.parametrize("workers, words", [
        ([{"namespace": "ns", "uuid": "u"}], ""),
        ([{"namespace": "ns"}], ""),
        ([{"namespace": "ns", "uuid": "other"}], "another containerd"),
        ([{"namespace": "other"}], "namespace 'other'"),
        ([{}, {"namespace": "ns"}], "no containerd worker"),
        ([], "no containerd worker"),
    ])
    def test_worker_complaint(self, workers, words):
        labels = [{nerdctld.WORKER_LABEL + key: value for key, value in each.items()} for each in workers]
        complaint = nerdctld.worker_complaint(labels, "ns", "u")
        assert words in complaint and bool(words) == bool(complaint)
        if words:
            assert "[worker.containerd]" in complaint and 'namespace = "ns"' in complaint and "\n" not in complaint

    def test_parse_workers(self):
        record = nerdctld.encode_field(1, b"id") + map_entry(2, "a", "b") + map_entry(2, "c", "d") + b"\x18\x01"
        message = nerdctld.encode_field(1, record) + nerdctld.encode_field(1, b"")
        assert nerdctld.parse_workers(message) == [{"a": "b", "c": "d"}, {}]

    def fake_buildkitd(self, path, labels, answers=True):
        """A buildkitd that answers any call with its workers; returns its listening socket."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(8)
        record = b"".join(map_entry(2, key, value) for key, value in labels.items())

        def serve(sock):
            peer = Peer(True)
            with sock, contextlib.suppress(OSError):
                speak(sock, peer)

        def speak(sock, peer):
            while True:
                sock.sendall(peer.take())
                data = sock.recv(65536)
                if not data:
                    return
                peer.feed(data)
                if 1 in peer.ended and answers:
                    workers = grpc(nerdctld.encode_field(1, record))
                    sock.sendall(headers_frame(1, [(":status", "200")]) + frame(DATA, 0, 1, workers)
                                 + headers_frame(1, [("grpc-status", "0")], 1))

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return listener

    def test_list_workers(self, tmp_path):
        path = str(tmp_path / "b.sock")
        with self.fake_buildkitd(path, {"k": "v" * 100000}):
            assert nerdctld.list_workers("unix://" + path) == [{"k": "v" * 100000}]

    def test_list_workers_of_a_silent_buildkitd(self, tmp_path):
        path = str(tmp_path / "b.sock")
        with self.fake_buildkitd(path, {}, answers=False):
            began = time.monotonic()
            with pytest.raises(nerdctld.Unavailable):
                nerdctld.list_workers("unix://" + path, 0.5)
            assert time.monotonic() - began < 5

    @pytest.fixture
    def buildkit(self, tmp_path):
        """Where the engine looks for a buildkitd."""
        return str(tmp_path / "b.sock")

    @pytest.fixture
    def engine(self, buildkit, fake):
        """An engine that knows buildkitd and containerd, and has no nerdctl."""
        fake.uuid = "u"
        found = nerdctld.Engine(nerdctld.Nerdctl(["false"], fake.namespace, buildkit_host="unix://" + buildkit), nerdctld.Containerd(fake.path))
        yield found
        found.close()

    def test_wrong_worker_is_refused(self, engine, buildkit):
        path = buildkit
        with self.fake_buildkitd(path, {nerdctld.WORKER_LABEL + "namespace": "buildkit"}):
            with pytest.raises(nerdctld.Conflict) as caught:
                nerdctld.prepare_solve(engine, "unix://" + path, SOLVE_TAGGED[5:])
        assert "'buildkit'" in str(caught.value)
        # What leaves no image is not looked at.
        assert nerdctld.prepare_solve(engine, "unix://" + path, SOLVE_LOCAL[5:]) == (SOLVE_LOCAL[5:], None)

    def test_a_build_in_a_session_of_the_client(self, engine, buildkit, fake):
        query = {"remote": "client-session", "session": "s1", "buildid": "b1", "version": "2", "dockerfile": "D", "t": "x", "target": "z",
                 "buildargs": json.dumps({"A": "1"}), "networkmode": "host", "extrahosts": "h:1.2.3.4", "cachefrom": json.dumps(["c/d"])}

        def fields(**more):
            request = nerdctld.Request("POST", "/build", query={key: [each] for key, each in {**query, **more}.items()})
            return [(each.number, bytes(each.value)) for each in nerdctld.decode_fields(nerdctld.session_solve(engine, request, "b1"))]
        told = fields()
        assert [value for number, value in told if number in (1, 5, 6, 9)] == [b"b1", b"s1", b"dockerfile.v0", b"network.host"]
        assert dict(nerdctld.decode_map_entry(value) for number, value in told if number == 7) == {
            "filename": "D", "image-resolve-mode": "local", "build-arg:A": "1", "target": "z", "force-network-mode": "host", "add-hosts": "h=1.2.3.4"}
        assert dict(told)[13] == exporter("moby", name="docker.io/library/x:latest")
        assert b"local" in dict(fields(outputs=json.dumps([{"Type": "local", "Attrs": {}}])))[13]
        answer = ask(engine, "POST", "/build?" + urllib.parse.urlencode(query))
        assert answer.status == 503 and "buildkitd does not answer" in answer.message
        assert ask(engine, "POST", "/build?" + urllib.parse.urlencode({**query, "t": "A"})).status == 400

    def test_image_events(self, engine, buildkit, fake):
        """A name that is taken over is told as untag and tag; one that is new is left to containerd's own event."""
        path = buildkit
        fake.tag("docker.io/library/x:latest", "sha256:old")
        request = solve(exporter("moby", name="x,new"))
        with self.fake_buildkitd(path, {nerdctld.WORKER_LABEL + "namespace": fake.namespace, nerdctld.WORKER_LABEL + "uuid": "u"}):
            with engine.journal.subscribe() as (_, queue):
                _, answered = nerdctld.prepare_solve(engine, "unix://" + path, request)
                answered(map_entry(1, "containerimage.digest", "sha256:new"))
                events = [queue.get_nowait() for _ in range(queue.qsize())]
        assert [(each["Action"], each["Actor"]["ID"], each["Actor"]["Attributes"]["name"]) for each in events] == [
            ("untag", "sha256:old", "x:latest"), ("tag", "sha256:new", "x:latest")]

    # --- the two endpoints ---

    @pytest.mark.parametrize("path, status", [("/grpc", 500), ("/session", 400)])
    @pytest.mark.parametrize("headers, message", [
        ([], "no upgrade proto in request"), (["Connection: Upgrade"], "no upgrade proto in request"), (["Upgrade:"], "no upgrade proto in request"),
        (["Connection: Upgrade", "Upgrade: tcp"], "protocol tcp not supported"), (["Upgrade: H2C"], "protocol H2C not supported"), (["Upgrade: h2c"], None),
        (["Connection: Upgrade", "Upgrade: h2c"], None)])
    def test_without_the_right_upgrade(self, daemon, path, status, headers, message):
        with contextlib.closing(daemon.connect()) as sock:
            sock.settimeout(10)
            sock.sendall("\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode())
            response = http.client.HTTPResponse(sock, method="POST")
            response.begin()
            assert response.status == (status if message else 101)
            assert json.loads(response.read()) == {"message": message} if message else response.headers["Upgrade"] == "h2c"

    @pytest.mark.parametrize("path", ["/grpc", "/session"])
    def test_endpoints_answer_101_without_buildkitd(self, path, engine):
        """Anything else would make clients set up a builder of their own."""
        response = nerdctld.dispatch(engine, nerdctld.Request("POST", path, headers={"Upgrade": "h2c"}))
        assert response.status == 101 and response.body.protocol == "h2c" and not response.media_type
        near, far = socket.socketpair()
        thread = threading.Thread(target=response.body.serve, args=(nerdctld.Connection(near),), daemon=True)
        thread.start()
        if path == "/grpc":
            far.settimeout(10)
            client = Peer(False)
            client.open(1, STATUS)
            far.sendall(client.take())
            while 1 not in client.ended:
                client.feed(far.recv(65536))
            assert b"--buildkit-host" in client.heads[1][0] and b"grpc-status\x0214" in client.heads[1][0]
        far.close()
        thread.join(10)
        assert not thread.is_alive()
        near.close()

    def test_http2_with_prior_knowledge(self, scripted, fake, tmp_path):
        """buildctl and the remote driver of buildx begin with HTTP/2 at once, whole or in pieces."""
        daemon = Daemon(tmp_path, "--nerdctl", str(scripted.program), "--address", fake.path, "--buildkit-host", f"unix://{tmp_path}/none.sock")
        try:
            for size in (1, 16, 1000):
                client = Peer(False)
                client.open(1, STATUS)
                with daemon.connect() as sock:
                    data = client.take()
                    for at in range(0, len(data), size):
                        sock.sendall(data[at:at + size])
                    while 1 not in client.ended:
                        data = sock.recv(65536)
                        assert data
                        client.feed(data)
                assert b"--buildkit-host" in client.heads[1][0] and b"grpc-status\x0214" in client.heads[1][0]
        finally:
            daemon.end()


# --- live -------------------------------------------------------------------------------------------------------------

REGISTRY = "localhost:5000"
BK_NAMESPACE = "nerdctld-buildkit-test"


def missing():
    """Why the live tests cannot run here, "" when they can."""
    if os.geteuid():
        return "the live tests need root"
    for name in ("docker", "buildkitd", "nerdctl", "containerd", "ctr"):
        if not shutil.which(name):
            return f"{name} is not installed"
    if subprocess.run(["docker", "buildx", "version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30).returncode:
        return "docker has no buildx plugin"
    if subprocess.run(["nerdctl", "info"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30).returncode:
        return "containerd does not run"
    try:
        socket.create_connection(("127.0.0.1", 5000), 2).close()
    except OSError:
        return f"there is no registry at {REGISTRY}"
    return ""


class Builder:
    """A daemon with a buildkitd of its own, in a namespace of its own, and the stock clients."""

    def __init__(self, folder):
        self.folder = folder
        self.docker_host = f"unix://{folder}/docker.sock"
        self.address = f"unix://{folder}/buildkitd.sock"
        self.buildkitd = None
        self.start_buildkitd()
        with open(folder / "daemon.log", "wb") as output:
            self.daemon = subprocess.Popen(
                [sys.executable, nerdctld.__file__, "-H", self.docker_host, "--namespace", BK_NAMESPACE, "--buildkit-host", self.address],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        self.wait_for(self.docker_host)

    def start_buildkitd(self, *arguments, namespace=BK_NAMESPACE, name="root"):
        """Run buildkitd with a containerd worker, or with what `arguments` say."""
        config = self.folder / "buildkitd.toml"
        config.write_text(f'insecure-entitlements = ["network.host"]\n[registry."{REGISTRY}"]\n  http = true\n')
        arguments = arguments or ("--oci-worker=false", "--containerd-worker=true", f"--containerd-worker-namespace={namespace}",
                                  "--containerd-worker-addr=" + (os.environ.get("CONTAINERD_ADDRESS") or nerdctld.CONTAINERD_SOCKET))
        with open(self.folder / "buildkitd.log", "ab") as output:
            self.buildkitd = subprocess.Popen(
                ["buildkitd", "--config", str(config), "--root", str(self.folder / name), "--addr", self.address, *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        self.wait_for(self.address)

    def stop_buildkitd(self, number=signal.SIGTERM):
        """End our buildkitd."""
        self.buildkitd.send_signal(number)
        self.buildkitd.wait(30)

    @staticmethod
    def wait_for(address):
        """Wait until somebody answers."""
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(address[len("unix://"):])
                return
            assert time.monotonic() < deadline, f"nobody answers at {address}"
            time.sleep(0.05)

    def environment(self, **more):
        """For a client of this daemon."""
        return {**os.environ, "DOCKER_HOST": self.docker_host, "BUILDX_CONFIG": str(self.folder / "buildx"), **more}

    def run(self, *arguments, status=0, data=None, cwd=None, timeout=100, **environment):
        """A docker command that has to end with `status`; its stdout and stderr."""
        done = subprocess.run(["docker", *arguments], input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
                              env=self.environment(**environment), timeout=timeout)
        text = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        assert done.returncode == status, text[1][-2000:]
        return text

    def nerdctl(self, *arguments, timeout=60):
        """What a nerdctl command in our namespace prints."""
        done = subprocess.run(["nerdctl", "--namespace", BK_NAMESPACE, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=timeout)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout.decode()

    def result(self, image, *command):
        """What a container of an image prints."""
        return self.nerdctl("run", "--rm", "--net", "none", image, *command)

    def resources(self):
        """Threads and descriptors of the daemon."""
        return tuple(len(os.listdir(f"/proc/{self.daemon.pid}/{name}")) for name in ("task", "fd"))

    def settled(self, before, seconds=10):
        """Whether the daemon has come back to (almost) as many threads and descriptors as before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # `nerdctl events` and its thread may have begun meanwhile.
            if all(now <= then + more for now, then, more in zip(self.resources(), before, (2, 6))):
                return True
            time.sleep(0.1)
        return False

    def memory(self):
        """The highest resident size of the daemon, in MiB."""
        with open(f"/proc/{self.daemon.pid}/status", encoding="ascii") as file:
            return int(re.search(r"VmHWM:\s+(\d+)", file.read()).group(1)) / 1024

    def close(self):
        """End all of it and take away what it left, also what a killed buildkitd no longer could."""
        for each in (self.daemon, self.buildkitd):
            each.terminate()
            try:
                each.wait(20)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()
        for namespace in (BK_NAMESPACE, BK_NAMESPACE + "-2"):
            for owner in (namespace, namespace + "_history"):
                self.purge(owner)

    @staticmethod
    def purge(namespace):
        """Remove everything in a containerd namespace."""
        def ctr(*arguments):
            done = subprocess.run(["ctr", "--namespace", namespace, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, timeout=30)
            return done.stdout.decode().split("\n")

        for kind, remove in (("tasks", ["rm", "-f"]), ("containers", ["rm"]), ("images", ["rm"]), ("leases", ["rm"])):
            for name in filter(None, ctr(kind, "ls", "-q")):
                ctr(kind, *remove, name)
        names = True
        while names:
            # A snapshot goes only after those that stand on it.
            before, names = names, [line.split()[0] for line in ctr("snapshots", "ls")[1:] if line]
            if names == before:
                break
            for name in names:
                ctr("snapshots", "rm", name)
        for name in filter(None, ctr("content", "ls", "-q")):
            ctr("content", "rm", name)
        ctr("namespaces", "rm", namespace)


@pytest.fixture(scope="class")
def builder(tmp_path_factory):
    """One Builder for all live tests."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    made = Builder(tmp_path_factory.mktemp("bk"))
    try:
        yield made
    finally:
        made.close()


DOCKERFILE = f"""FROM {BASE} AS base
ARG X=1
RUN echo "x=$X" > /x
FROM base AS other
RUN echo other > /o
FROM base
COPY hello /hello
CMD ["cat", "/x", "/hello"]
"""


@pytest.fixture
def context(tmp_path):
    """A folder to build from."""
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text(DOCKERFILE)
    (folder / "hello").write_text("hi\n")
    return folder


class TestBuildKitLive:
    """The stock docker, buildx and compose over the real buildkitd."""

    def test_directory(self, builder, context):
        builder.run("build", "-t", "live:dir", "--build-arg", "X=5", str(context))
        assert builder.result("live:dir") == "x=5\nhi\n"
        images = json.loads(builder.run("image", "inspect", "live:dir")[0])
        assert images[0]["RepoTags"] == ["live:dir"]

    def test_clients_without_an_upgrade(self, builder, context, tmp_path):
        """HTTP/2 with prior knowledge: buildctl, and the remote driver of buildx, on the engine's own socket."""
        done = subprocess.run(
            ["buildctl", f"--addr={builder.docker_host}", "build", "--frontend=dockerfile.v0",
             f"--local=context={context}", f"--local=dockerfile={context}", f"--output=type=local,dest={tmp_path}/out"],
            capture_output=True, timeout=100)
        assert done.returncode == 0 and (tmp_path / "out" / "hello").read_text() == "hi\n", done.stderr
        builder.run("buildx", "create", "--name", "prior", "--driver", "remote", builder.docker_host)
        try:
            output = "type=image,name=docker.io/library/live:prior,unpack=true"
            builder.run("buildx", "build", "--builder", "prior", "--output", output, str(context))
        finally:
            builder.run("buildx", "rm", "prior")
        assert builder.result("live:prior") == "x=1\nhi\n"

    @pytest.mark.parametrize("program", ["/usr/bin/docker"])
    def test_docker_before_buildx(self, builder, context, tmp_path, program):
        """A docker command of 18.09 to 20.10 has the context in a session, and asks with POST /build."""
        told = subprocess.run([program, "--version"], capture_output=True, text=True) if os.path.exists(program) else None
        if not told or not re.match(r"Docker version (18|19|20)\.", told.stdout):
            pytest.skip("no docker command that is old enough")

        def build(*words, status=0):
            done = subprocess.run([program, "build", *words, str(context)], capture_output=True, text=True, timeout=100, env=builder.environment(DOCKER_BUILDKIT="1"))
            assert done.returncode == status, done.stderr
            return done
        assert "COPY hello /hello" in build("-t", "live:session", "--build-arg", "X=7").stderr
        assert builder.result("live:session") == "x=7\nhi\n"
        assert re.fullmatch("sha256:[0-9a-f]{64}\n", build("-q", "-t", "live:session").stdout)
        build("-o", f"type=local,dest={tmp_path}/out")
        assert (tmp_path / "out" / "hello").read_text() == "hi\n"
        (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN exit 9\n")
        assert "exit code: 9" in build(status=1).stderr

    def test_stdin_tar(self, builder, context, tmp_path):
        with tarfile.open(tmp_path / "c.tar", "w", format=tarfile.GNU_FORMAT) as archive:
            archive.add(context, ".")
        builder.run("build", "-t", "live:tar", "-", data=(tmp_path / "c.tar").read_bytes())
        assert builder.result("live:tar") == "x=1\nhi\n"

    def test_stdin_dockerfile(self, builder, context):
        builder.run("build", "-t", "live:df", "-", data=f"FROM {BASE}\nRUN echo z > /z\n".encode())
        assert builder.result("live:df", "cat", "/z") == "z\n"
        builder.run("build", "-t", "live:dfc", "-f", "-", str(context), data=f"FROM {BASE}\nCOPY hello /h\n".encode())
        assert builder.result("live:dfc", "cat", "/h") == "hi\n"

    def test_target(self, builder, context):
        builder.run("build", "--target", "other", "-t", "live:target", str(context))
        assert builder.result("live:target", "cat", "/o") == "other\n"

    @pytest.mark.parametrize("kilobytes", [20, 70, 200, 700])
    def test_long_build_args(self, builder, context, kilobytes):
        """Beyond the 64 KiB of a window: in arguments of 100 KB, since a process takes no longer ones."""
        parts = max(1, kilobytes // 100)
        size = kilobytes * 1024 // parts
        (context / "Dockerfile").write_text(f"FROM {BASE}\nARG A0\nRUN echo -n $A0 | wc -c > /n\n")
        arguments = [word for number in range(parts) for word in ("--build-arg", f"A{number}=" + "x" * size)]
        builder.run("build", "-t", "live:args", *arguments, str(context), timeout=60)
        assert int(builder.result("live:args", "cat", "/n")) == size

    def test_secret(self, builder, context, tmp_path):
        (tmp_path / "secret").write_text("hidden\n")
        (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN --mount=type=secret,id=s cat /run/secrets/s > /s\n")
        builder.run("build", "-t", "live:secret", "--secret", f"id=s,src={tmp_path}/secret", str(context))
        assert builder.result("live:secret", "cat", "/s") == "hidden\n"

    def test_ssh(self, builder, context, tmp_path):
        if not shutil.which("ssh-agent"):
            pytest.skip("ssh-agent is not installed")
        path = str(tmp_path / "agent")
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
        try:
            builder.wait_for("unix://" + path)
            (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN --mount=type=ssh test -S $SSH_AUTH_SOCK && echo agent > /s\n")
            builder.run("build", "-t", "live:ssh", "--ssh", f"default={path}", str(context))
        finally:
            agent.terminate()
            agent.wait(10)
        assert builder.result("live:ssh", "cat", "/s") == "agent\n"

    def test_several_tags_and_quiet(self, builder, context):
        identity = builder.run("build", "-q", "-t", "live:a", "-t", "live:b", "-t", f"{REGISTRY}/live:c", str(context))[0].strip()
        assert re.fullmatch("sha256:[0-9a-f]{64}", identity)
        found = json.loads(builder.run("image", "inspect", identity)[0])[0]["RepoTags"]
        assert {"live:a", "live:b", f"{REGISTRY}/live:c"} <= set(found)

    def test_load_and_platforms(self, builder, context):
        builder.run("buildx", "build", "--load", "-t", "live:load", str(context))
        assert builder.result("live:load") == "x=1\nhi\n"
        (context / "Dockerfile").write_text("FROM scratch\nCOPY hello /\n")
        builder.run("buildx", "build", "--platform", "linux/amd64,linux/arm64", "-t", "live:platforms", str(context))
        rows = builder.nerdctl("image", "inspect", "--mode=native", "live:platforms")
        assert "live:platforms" in rows

    def test_push(self, builder, context):
        builder.run("buildx", "build", "--push", "-t", f"{REGISTRY}/live/push:1", str(context))
        builder.nerdctl("rmi", "-f", f"{REGISTRY}/live/push:1")
        builder.nerdctl("--insecure-registry", "pull", "-q", f"{REGISTRY}/live/push:1")
        assert builder.result(f"{REGISTRY}/live/push:1") == "x=1\nhi\n"

    def test_outputs(self, builder, context, tmp_path):
        builder.run("buildx", "build", "-o", f"type=local,dest={tmp_path}/out", str(context))
        assert (tmp_path / "out" / "hello").read_text() == "hi\n"
        for kind, member in (("tar", "hello"), ("oci", "oci-layout"), ("docker", "manifest.json")):
            builder.run("buildx", "build", "-o", f"type={kind},dest={tmp_path}/{kind}.tar", "-t", "live:out", str(context))
            with tarfile.open(tmp_path / f"{kind}.tar") as archive:
                assert member in [name.lstrip("./") for name in archive.getnames()]
        builder.nerdctl("load", "-i", str(tmp_path / "docker.tar"))
        assert builder.result("live:out") == "x=1\nhi\n"

    def test_caches(self, builder, context, tmp_path):
        for kind, place in (("local", ("dest", "src")), ("registry", ("ref", "ref"))):
            where = str(tmp_path / "cache") if kind == "local" else f"{REGISTRY}/live/cache"
            builder.run("buildx", "build", "--cache-to", f"type={kind},{place[0]}={where}", "-t", "live:cache", str(context))
            builder.run("buildx", "build", "--cache-from", f"type={kind},{place[1]}={where}", "-t", "live:cache", str(context))
        assert (tmp_path / "cache" / "index.json").exists()
        assert builder.result("live:cache") == "x=1\nhi\n"

    def test_files_about_the_build(self, builder, context, tmp_path):
        builder.run("build", "--iidfile", f"{tmp_path}/iid", "--metadata-file", f"{tmp_path}/md.json", "-t", "live:iid", str(context))
        told = json.loads((tmp_path / "md.json").read_text())
        assert told["image.name"] == "docker.io/library/live:iid"
        assert (tmp_path / "iid").read_text() == told["containerimage.digest"] == json.loads(builder.run("inspect", "live:iid")[0])[0]["Id"]

    def test_check(self, builder, context):
        assert "no warnings" in "".join(builder.run("build", "--call", "check", str(context)))
        (context / "Dockerfile").write_text(f"FROM {BASE} as x\n")
        assert "FromAsCasing" in "".join(builder.run("build", "--call", "check", str(context), status=1))

    def test_bake(self, builder, context):
        (context / "docker-bake.json").write_text(json.dumps({
            "group": {"default": {"targets": ["a", "b"]}},
            "target": {"a": {"tags": ["live:bake-a"]}, "b": {"tags": ["live:bake-b"], "target": "other"}}}))
        builder.run("buildx", "bake", cwd=context)
        assert builder.result("live:bake-a") == "x=1\nhi\n"
        assert builder.result("live:bake-b", "cat", "/o") == "other\n"

    def test_compose_build(self, builder, context):
        if subprocess.run(["docker", "compose", "version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30).returncode:
            pytest.skip("docker has no compose plugin")
        (context / "compose.yaml").write_text(json.dumps({"services": {
            "a": {"build": ".", "image": "live:compose-a"}, "b": {"build": {"context": ".", "target": "other"}, "image": "live:compose-b"}}}))
        builder.run("compose", "build", cwd=context)
        assert builder.result("live:compose-a") == "x=1\nhi\n"
        assert builder.result("live:compose-b", "cat", "/o") == "other\n"

    def test_failing_build(self, builder, context):
        (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN echo boo; exit 3\n")
        text = builder.run("build", "--progress", "plain", str(context), status=1)[1]
        assert "boo" in text and 'process "/bin/sh -c echo boo; exit 3" did not complete successfully: exit code: 3' in text

    @pytest.mark.parametrize("command", ["du", "ls", "inspect", "history ls", "history inspect", "history logs",
                                         "prune -f --filter until=1000h"])
    def test_builder_commands(self, builder, context, command):
        builder.run("build", "-q", str(context))
        builder.run("buildx", *command.split())

    def test_from_a_local_image(self, builder, context):
        builder.run("build", "-t", "live:only-here", str(context))
        builder.run("build", "-t", "live:child", "-", data=b"FROM live:only-here\nRUN echo more >> /x\n")
        assert builder.result("live:child") == "x=1\nmore\nhi\n"

    def test_image_is_listed_at_once_and_told(self, builder, context):
        events = subprocess.Popen(["docker", "events", "--format", "{{.Action}} {{.Actor.Attributes.name}}", "--filter", "type=image"],
                                  stdout=subprocess.PIPE, env=builder.environment())
        try:
            time.sleep(1.5)
            for value in "12":
                builder.run("build", "-q", "-t", "live:told", "--build-arg", f"X={value}{time.time()}", str(context))
                assert "live:told" in builder.run("images", "--format", "{{.Repository}}:{{.Tag}}")[0]
            time.sleep(1)
        finally:
            events.terminate()
            told = events.communicate(timeout=10)[0].decode().splitlines()
        assert [each for each in told if "live:told" in each] == ["tag live:told", "untag live:told", "tag live:told"]

    def test_sixteen_at_once(self, builder, tmp_path):
        before = builder.resources()
        running = []
        for number in range(16):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "Dockerfile").write_text(f"FROM {BASE}\nCOPY f /f\nRUN cat /f > /g\n")
            (folder / "f").write_text(f"{number} {time.time()}\n")
            running.append(subprocess.Popen(["timeout", "-k", "1", "100", "docker", "build", "-q", "-t", f"live:p{number}", str(folder)],
                                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=builder.environment()))
        failed = [each.communicate(timeout=110)[1].decode() for each in running]
        assert [each.returncode for each in running] == [0] * 16, failed
        assert builder.settled(before)
        for number in (0, 15):
            assert builder.result(f"live:p{number}", "cat", "/g") == (tmp_path / str(number) / "f").read_text()

    @contextlib.contextmanager
    def sleeping(self, builder, context):
        """A build that is in the middle of a step, as (process, its output so far, name of the step)."""
        mark = f"{600 + random.random():.6f}"
        (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN echo begun; sleep {mark}\n")
        process = subprocess.Popen(["docker", "build", "--progress", "plain", str(context)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, env=builder.environment())
        try:
            text = b""
            deadline = time.monotonic() + 30
            while not re.search(rb"\d begun", text) and time.monotonic() < deadline:
                text += os.read(process.stderr.fileno(), 65536)
            yield process, mark
        finally:
            process.kill()
            process.communicate()

    @staticmethod
    def runs(mark):
        """Whether a process sleeps for `mark` seconds."""
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    with open(f"/proc/{entry}/cmdline", "rb") as file:
                        if file.read().split(b"\0")[:2] == [b"sleep", mark.encode()]:
                            return True
        return False

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_client_that_is_ended(self, builder, context, number):
        before = builder.resources()
        with self.sleeping(builder, context) as (process, mark):
            assert until(lambda: self.runs(mark))
            process.send_signal(number)
            process.wait(10)
            deadline = time.monotonic() + 10
            while self.runs(mark) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not self.runs(mark)
        assert builder.settled(before)

    def test_buildkitd_that_is_killed(self, builder, context):
        before = builder.resources()
        try:
            with self.sleeping(builder, context) as (process, mark):
                builder.stop_buildkitd(signal.SIGKILL)
                began = time.monotonic()
                text = process.communicate(timeout=20)[1].decode()
                assert process.returncode == 1 and "buildkitd has ended" in text and time.monotonic() - began < 10
            text = builder.run("build", str(context), status=1, timeout=30)[1]
            assert "buildkitd does not answer" in text and "--buildkit-host" in text
            assert "docker-container" not in builder.run("buildx", "ls", timeout=30)[0]
            assert builder.settled(before)
        finally:
            builder.start_buildkitd()
        (context / "Dockerfile").write_text(DOCKERFILE)
        builder.run("build", "-t", "live:again", str(context))

    @pytest.mark.parametrize("name, arguments, words", [
        ("oci", ("--oci-worker=true", "--containerd-worker=false"), "no containerd worker"),
        ("foreign", ("--oci-worker=false", "--containerd-worker=true", f"--containerd-worker-namespace={BK_NAMESPACE}-2"), f"'{BK_NAMESPACE}-2'"),
    ])
    def test_worker_that_would_lose_the_image(self, builder, context, name, arguments, words, tmp_path):
        builder.stop_buildkitd()
        builder.start_buildkitd(*arguments, name=name)
        try:
            text = builder.run("build", "-t", "live:lost", str(context), status=1, timeout=30)[1]
            assert words in text and f'namespace = "{BK_NAMESPACE}"' in text and "[worker.oci]" in text
            builder.run("buildx", "build", "-o", f"type=local,dest={tmp_path}/out", str(context))
            assert (tmp_path / "out" / "hello").exists()
        finally:
            builder.stop_buildkitd()
            builder.start_buildkitd()

    def test_memory_stays_flat(self, builder, tmp_path):
        """300 MB in and out, with a daemon that stays under 100 MiB."""
        folder = tmp_path / "big"
        folder.mkdir()
        (folder / "Dockerfile").write_text("FROM scratch\nCOPY blob /blob\n")
        with open(folder / "blob", "wb") as file:
            for _ in range(300):
                file.write(os.urandom(1 << 20))
        builder.run("buildx", "build", "-o", f"type=local,dest={tmp_path}/out", str(folder), timeout=200)
        assert (tmp_path / "out" / "blob").stat().st_size == 300 << 20
        assert builder.memory() < 100


###############################################################################
# HTTP server
###############################################################################


def receive(sock, seconds=5.0):
    """Everything until the other end closes."""
    sock.settimeout(seconds)
    parts = []
    with contextlib.suppress(ConnectionError):
        while True:
            part = sock.recv(65536)
            if not part:
                break
            parts.append(part)
    return b"".join(parts)


def send(daemon, data, half=True):
    """Raw bytes on a connection of their own, and all of the answer."""
    with daemon.connect() as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
            if half:
                sock.shutdown(socket.SHUT_WR)
        return receive(sock)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One daemon over recorded output for all tests that do not end it."""
    folder = tmp_path_factory.mktemp("http")
    (folder / "scripted").mkdir()
    scripted, fake = Scripted(folder / "scripted"), FakeContainerd(folder)
    furnish(scripted, fake, folder)
    found = Daemon(folder, "--nerdctl", str(scripted.program), "--address", fake.path, "--debug")
    found.scripted, found.fake = scripted, fake
    yield found
    found.end()
    fake.close()


def put_big(fake, size):
    """The image big:1 with a layer of so many bytes; the digest of that."""
    data = b"x" * size
    layer = "sha256:" + hashlib.sha256(data).hexdigest()
    fake.content[layer] = data
    config = fake.put({"os": "linux", "architecture": "amd64"})
    fake.tag("docker.io/library/big:1", fake.put({"config": {"digest": config, "size": len(fake.content[config])}, "layers": [{"digest": layer, "size": size}]}))
    return layer


class TestHTTPServer:
    def test_headers(self, shared):
        answer = shared.ask("GET", "/_ping")
        told = {name: answer.headers[name] for name in ("Api-Version", "Docker-Experimental", "Ostype", "Server", "Content-Length", "Content-Type")}
        assert told == {"Api-Version": "1.56", "Docker-Experimental": "false", "Ostype": "linux", "Server": f"nerdctld/{nerdctld.VERSION} (linux)",
                        "Content-Length": "2", "Content-Type": "text/plain; charset=utf-8"}

    def test_keep_alive(self, shared):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = shared.connect()
        for path, status in (("/_ping", 200), ("/nothing", 404), ("/images/nosuch/json", 404), ("/v1.99/info", 400), ("/version", 200)):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            assert (response.status, response.will_close) == (status, False)
        connection.close()

    def test_head(self, shared):
        assert send(shared, b"HEAD /_ping HTTP/1.1\r\nHost: x\r\n\r\n").endswith(b"Content-Length: 0\r\n\r\n")
        assert send(shared, b"HEAD /nothing HTTP/1.1\r\nHost: x\r\n\r\n").endswith(b"\r\n\r\n")

    def test_pipelining(self, shared):
        data = send(shared, b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n" * 5 + b"POST /auth HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}GET /_ping HTTP/1.1\r\n\r\n")
        assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200"] * 5 + [b"400", b"200"]

    def test_old_protocol(self, shared):
        assert send(shared, b"GET /_ping HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
        assert send(shared, b"GET /_ping\r\n\r\n").startswith(b"HTTP/1.1 400")

    def test_unread_body_is_not_the_next_request(self, shared):
        data = send(shared, b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 26\r\n\r\nGET /version HTTP/1.1\r\n\r\n\nGET /_ping HTTP/1.1\r\n\r\n")
        assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"404", b"200"]

    def test_chunked(self, shared):
        shared.scripted.on("login", reads=True)
        body = json.dumps({"username": "u", "password": "p", "serveraddress": "localhost:5000"}).encode()
        chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(body[at:at + 7]), body[at:at + 7]) for at in range(0, len(body), 7)) + b"0\r\nTrailer: x\r\n\r\n"
        head = b"POST /auth HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        data = send(shared, head + chunks + b"GET /_ping HTTP/1.1\r\n\r\n")
        assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"200"]

    def test_expect(self, shared):
        body = json.dumps({"username": "u", "password": "p", "serveraddress": "localhost:5000"}).encode()
        shared.scripted.on("login", reads=True)
        head = b"POST %b HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        with shared.connect() as sock:
            sock.sendall(head % (b"/auth", len(body)))
            assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(body)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        with shared.connect() as sock:
            sock.sendall(head % (b"/nothing", len(body)))
            assert sock.recv(65536).startswith(b"HTTP/1.1 404"), "not asked for a body nobody wants"

    @pytest.mark.parametrize("target, body", [
        ("/images/load", ARCHIVE), ("/images/load?quiet=0", ARCHIVE), ("/images/create?fromSrc=-&repo=tst:a", b"tar"), ("/build?t=tst:a", tar_of(("Dockerfile", b"FROM x\n"))),
        ("/images/create?fromImage=localhost:5000/bb:1", b"{}"), ("/images/localhost:5000/bb/push?tag=1", b"{}")])
    @pytest.mark.parametrize("chunked", [False, True])
    def test_expect_where_the_answer_is_a_stream(self, shared, target, body, chunked):
        for command in ("load", "import", "pull", "push", "build", "rmi"):
            shared.scripted.on(command, reads=command in ("load", "import"))
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
        with shared.connect() as sock:
            sock.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n%b\r\n\r\n" % (target.encode(), length))
            assert sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n", "before anything of the answer"
            sock.sendall((b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body) + b"GET /_ping HTTP/1.1\r\nConnection: close\r\n\r\n")
            answer = receive(sock)
        assert re.match(rb"HTTP/1.1 20[01] ", answer) and b"100 Continue" not in answer and answer.endswith(b"OK"), answer

    @pytest.mark.parametrize("target, status", [
        ("/images/load?platform=;", 400), ("/images/create?fromSrc=-&repo=A", 400), ("/build?t=A", 400), ("/images/create?fromImage=A", 400), ("/images/nosuch/push?tag=1", 404)])
    def test_expect_where_an_error_comes_first(self, shared, target, status):
        with shared.connect() as sock:
            sock.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5000000\r\n\r\n" % target.encode())
            assert sock.recv(65536).startswith(b"HTTP/1.1 %d" % status), "not asked for a body nobody wants"

    def test_a_load_is_answered_when_it_has_something_to_tell(self, shared):
        shared.scripted.on("load", LOAD, reads=True)
        with shared.connect() as sock:
            sock.sendall(b"POST /images/load HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(ARCHIVE), ARCHIVE[:-1]))
            sock.settimeout(0.5)
            with pytest.raises(socket.timeout):
                sock.recv(1)
            sock.sendall(ARCHIVE[-1:])
            assert b"Loaded image: tst:a" in receive(sock)

    @pytest.mark.parametrize("data", [
        b"\r\n\r\n\r\n", b"garbage\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1 x\r\n\r\n", b"GET /\xff\xfe HTTP/1.1\r\n\r\n", b"\x00\x01\x02\r\n\r\n",
        b"GET /%ff HTTP/1.1\r\n\r\n", b"GET /a%00b HTTP/1.1\r\n\r\n", b"GET /a?x=%ff HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 70000 + b"\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 60000 + (b"\r\nX: " + b"y" * 60000) * 20 + b"\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"POST /auth HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nContent-Length: 2\x1f\r\n\r\n{}", b"POST /auth HTTP/1.1\r\nTransfer-Encoding: chunked\x1f\r\n\r\n0\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", b"POST /auth HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", b"POST /auth HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /auth HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"POST /auth HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n", b"GET /v1.1/info HTTP/1.1\r\n\r\n", b"GET /v9999.9999/info HTTP/1.1\r\n\r\n",
        b"POST /auth HTTP/1.1\r\nContent-Length: 3\r\n\r\n{,}", b"BREW /coffee HTTP/1.1\r\n\r\n", b"GET /images/json?filters=%7B HTTP/1.1\r\n\r\n",
        b"GET /images/json?" + b"&a=" * 1500 + b" HTTP/1.1\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\n\r\n", b"PRI * HTTP/1.1\r\n\r\nSM\r\n\r\n"])
    def test_malformed(self, shared, data):
        answer = send(shared, data)
        statuses = re.findall(rb"HTTP/1.1 (\d+)", answer)
        assert data.startswith(b"\r\n") or (statuses and all(b"400" <= each < b"500" for each in statuses)), answer[:200]
        for body in re.findall(rb"^(\{.*\})$", answer, re.M):
            assert json.loads(body)["message"]
        assert b"Traceback" not in answer
        assert shared.ask("GET", "/_ping").status == 200

    def test_head_beyond_the_limit(self, shared):
        answer = send(shared, b"GET /_ping HTTP/1.1\r\n" + (b"X: " + b"y" * 60000 + b"\r\n") * 20 + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 431") and shared.ask("GET", "/_ping").status == 200

    def test_body_that_breaks_off(self, shared):
        for body in (b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"Transfer-Encoding: chunked\r\n\r\n"):
            assert b"HTTP/1.1 200" not in send(shared, b"POST /auth HTTP/1.1\r\n" + body)

    def test_a_load_that_breaks_off_is_not_taken_for_the_whole(self, shared):
        shared.scripted.on("load", stays=0, reads=True)
        before = len(shared.scripted.calls("load"))
        send(shared, b"POST /images/load HTTP/1.1\r\nContent-Length: 1000\r\n\r\nhalf of it")
        assert until(lambda: len(shared.scripted.calls("load")) > before)
        call = shared.scripted.calls("load")[-1]
        assert call["text"].startswith("half of it\ufffd") and call["stdin"] % 512, "nerdctl saw an end of the archive"

    def test_body_beyond_the_limit(self, shared):
        with shared.connect() as sock:
            sock.sendall(b"POST /auth HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(20):
                    sock.sendall(b" " * 1000000)
            assert b"413" in receive(sock)[:20]

    def test_big_answer(self, shared):
        put_big(shared.fake, 5000000)
        assert opened_archive(shared.ask("GET", "/images/big:1/get").body)

    def test_a_stream_that_fails_late_has_no_end(self, shared):
        shared.fake.content[put_big(shared.fake, 1000000)] = b"x" * 999999
        with pytest.raises(http.client.IncompleteRead):
            shared.ask("GET", "/images/big:1/get")

    @pytest.mark.parametrize("request_line", [b"GET /events", b"POST /images/create?fromImage=localhost:5000/x&tag=1",
                                              b"POST /images/localhost:5000/bb/push?tag=1"])
    def test_a_client_that_leaves_leaves_no_child(self, shared, request_line):
        for command in ("pull", "push"):
            shared.scripted.on(command, stdout="x\n", stays=600)
        with shared.connect() as sock:
            sock.sendall(request_line + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.1)
        assert until(lambda: not [each for each in shared.children() if "sleep" not in each]), shared.children()

    def test_descriptors_do_not_leak(self, shared):
        put_big(shared.fake, 1)
        count = lambda: len(os.listdir(f"/proc/{shared.process.pid}/fd"))
        for path in ("/containers/json", "/images/big:1/get", "/events?until=1"):
            shared.ask("GET", path)
        time.sleep(0.1)
        before = count()
        for _ in range(10):
            shared.ask("GET", "/containers/nosuch/json")
            shared.ask("GET", "/images/big:1/get")
            shared.ask("GET", "/events?until=1")
        assert until(lambda: count() <= before + 1), (before, count())

    def test_many_at_once(self, shared):
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(shared.ask("GET", "/containers/json?all=1").status)) for _ in range(30)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(20)
        assert statuses == [200] * 30

    def test_credentials_are_not_logged(self, shared):
        shared.scripted.on("login", reads=True)
        shared.ask("POST", "/auth", {"username": "u", "password": "verysecret", "serveraddress": "localhost:5000"})
        shared.scripted.on("push", PUSH)
        shared.ask("POST", "/images/localhost:5000/bb/push?tag=1", headers={"X-Registry-Auth": encoded({"username": "u", "password": "verysecret"})})
        text = shared.log.read_text()
        assert "POST /auth -> 200" in text and "verysecret" not in text and base64.b64encode(b"u:verysecret").decode() not in text

    def test_internal_error_is_not_told(self, engine, monkeypatch):
        server, client = socket.socketpair()
        monkeypatch.setattr(nerdctld, "dispatch", lambda *_: 1 / 0)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        fake = nerdctld.Server(engine, listener)
        threading.Thread(target=lambda: (fake.finish_request(server, ""), fake.shutdown_request(server)), daemon=True).start()
        client.sendall(b"GET /_ping HTTP/1.1\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        answer = receive(client)
        assert answer.startswith(b"HTTP/1.1 500") and b"internal error" in answer and b"ZeroDivision" not in answer
        listener.close()

    def test_second_watcher_of_one_connection(self):
        hangups, told = nerdctld.Hangups(), []
        server, client = socket.socketpair()
        with hangups.watch(server, lambda: told.append(1)):
            client.close()
            assert until(lambda: told == [1])
            with hangups.watch(server, lambda: told.append(2)):
                assert until(lambda: 2 in told)
        server.close()


###############################################################################
# Sockets
###############################################################################


HAND_OVER = """import os, socket, sys
kind, count, pid = sys.argv[1:4]
found = socket.socket(socket.AF_UNIX if kind != "inet" else socket.AF_INET, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM)
if kind == "inet":
    found.bind(("127.0.0.1", 0))
else:
    found.bind(sys.argv[4])
if kind not in ("datagram", "silent"):
    found.listen(5)
if kind == "file":
    found = open("/dev/null")
os.dup2(found.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS=count, LISTEN_PID=str(os.getpid()) if pid == "own" else pid, LISTEN_FDNAMES="nerdctl.socket")
os.execv(sys.executable, [sys.executable, *sys.argv[5:]])
"""


class TestSockets:
    def hand_over(self, path, kind="stream", count="1", pid="own", options=()):
        return [sys.executable, "-c", HAND_OVER, kind, count, pid, str(path), compiled(), *options]

    def test_socket_of_systemd(self, tmp_path, scripted):
        scripted.on("version", VERSION_TOLD)
        found = Daemon(tmp_path, command=self.hand_over(tmp_path / "nd.sock", options=["--nerdctl", str(scripted.program), "--idle-timeout", "600"]))
        assert found.ask("GET", "/_ping").body == b"OK"
        assert found.end() == 0
        assert (tmp_path / "nd.sock").exists(), "it is not ours to remove"

    @pytest.mark.parametrize("kind, count, words", [("stream", "2", "exactly one"), ("stream", "0", "exactly one"), ("inet", "1", "not a unix stream socket"),
                                                    ("datagram", "1", "not a unix stream socket"), ("silent", "1", "not listening"), ("file", "1", "not a socket")])
    def test_not_exactly_one_stream_socket(self, tmp_path, kind, count, words):
        done = subprocess.run(self.hand_over(tmp_path / "nd.sock", kind, count), capture_output=True, text=True, timeout=20)
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1

    def test_variables_for_somebody_else(self, tmp_path):
        found = Daemon(tmp_path, command=self.hand_over(tmp_path / "other.sock", pid="1", options=["-H", f"unix://{tmp_path}/nd.sock"]))
        assert found.ask("GET", "/_ping").status == 200
        assert found.end() == 0 and not (tmp_path / "nd.sock").exists()

    def test_idle_timeout(self, tmp_path):
        found = Daemon(tmp_path, command=self.hand_over(tmp_path / "nd.sock", options=["--idle-timeout", "0.2"]))
        assert found.process.wait(10) == 0
        assert "idle for 0.2 seconds" in found.log.read_text()

    def test_mode(self, daemon):
        assert stat.S_IMODE(os.stat(daemon.socket).st_mode) == 0o660

    def test_stale_file_is_replaced(self, tmp_path):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "nd.sock"))
        found = Daemon(tmp_path)
        assert found.ask("GET", "/_ping").status == 200
        assert found.end() == 0 and not (tmp_path / "nd.sock").exists()

    def test_live_one_is_never_stolen(self, daemon):
        done = subprocess.run([sys.executable, compiled(), "-H", "unix://" + daemon.socket], capture_output=True, text=True, timeout=20)
        assert done.returncode == 1 and "another daemon is listening there" in done.stderr
        assert daemon.ask("GET", "/_ping").status == 200

    def test_removed_only_if_ours(self, tmp_path):
        found = Daemon(tmp_path)
        os.unlink(found.socket)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(found.socket)
            assert found.end() == 0
        assert os.path.exists(found.socket)

    @pytest.mark.parametrize("address, words", [("tcp://127.0.0.1:2375", "only unix:///PATH is served"), ("unix://x.sock", "only unix:///PATH"),
                                                ("unix:///nosuch/x.sock", "/nosuch is not a folder"), ("unix://" + str(HERE / "README.md"), "not a socket"),
                                                ("unix:///tmp/" + "x" * 200, "cannot listen")])
    def test_places_that_cannot_be(self, address, words):
        done = subprocess.run([sys.executable, compiled(), "-H", address], capture_output=True, text=True, timeout=20)
        assert done.returncode == 1 and re.fullmatch(f"nerdctld: .*{re.escape(words)}.*\n", done.stderr)

    @pytest.mark.parametrize("error, words", [(PermissionError(13, "Permission denied"), "run nerdctld as root"), (LookupError(), "groupadd --system docker"),
                                              (OSError(28, "No space left on device"), "No space left on device")])
    def test_what_to_do_is_said(self, tmp_path, monkeypatch, error, words):
        def refuse(*_, **__):
            raise error

        monkeypatch.setattr(shutil, "chown", refuse)
        with pytest.raises(nerdctld.StartError, match=words):
            nerdctld.own_socket(str(tmp_path / "nd.sock"), "docker")
        assert not list(tmp_path.glob("nd.sock*"))

    def test_group(self, tmp_path):
        import grp

        group = grp.getgrgid(os.getgroups()[-1] if os.geteuid() and os.getgroups() else grp.getgrall()[-1].gr_gid)
        nerdctld.own_socket(str(tmp_path / "nd.sock"), group.gr_name).close()
        found = os.stat(tmp_path / "nd.sock")
        assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (group.gr_gid, 0o660)

    def test_running_requests_end(self, daemon, scripted, fake, tmp_path):
        furnish(scripted, fake, tmp_path)
        put_big(fake, 1)
        begun, go_on, answers = threading.Event(), threading.Event(), []
        fake.before["Content/Read"] = lambda: (begun.set(), go_on.wait(5))
        thread = threading.Thread(target=lambda: answers.append(daemon.ask("GET", "/images/big:1/get")))
        thread.start()
        assert begun.wait(5)
        threading.Timer(0.05, go_on.set).start()
        assert daemon.end() == 0
        thread.join(5)
        assert answers[0].status == 200 and opened_archive(answers[0].body)

    def test_events_do_not_hold_up_the_end(self, daemon):
        with daemon.connect() as sock:
            sock.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(65536)
            began = time.monotonic()
            assert daemon.end() == 0
            assert time.monotonic() - began < 5

    def test_children_end_with_it(self, tmp_path, scripted, fake):
        found = Daemon(tmp_path, "--nerdctl", str(scripted.program), "--address", fake.path, environment={"TMPDIR": str(tmp_path)})
        furnish(scripted, fake, tmp_path)
        # A pull that nobody waits for any more when the daemon ends.
        scripted.on("pull", stdout="x\n", stays=600)
        sock = found.connect()
        sock.sendall(b"POST /images/create?fromImage=localhost:5000/x&tag=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert until(lambda: scripted.calls("pull"))
        children = []
        for task in pathlib.Path(f"/proc/{found.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += [int(pid) for pid in (task / "children").read_text().split()]
        assert children
        sock.close()
        found.end()
        assert until(lambda: not [pid for pid in children if os.path.exists(f"/proc/{pid}")])
        assert not [each for each in os.listdir(tmp_path) if each.startswith("nerdctld-")]

    def test_notify(self, tmp_path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(10)
            found = Daemon(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
            assert manager.recv(100) == b"READY=1"
            found.end()
            assert manager.recv(100) == b"STOPPING=1"

    def test_dial_stdio(self, daemon):
        process = subprocess.Popen([sys.executable, compiled(), "-H", "unix://" + daemon.socket, "dial-stdio"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE)
        process.stdin.write(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
        process.stdin.close()
        assert process.stdout.read().endswith(b"\r\n\r\nOK")
        process.stdout.close()
        assert process.wait(10) == 0

    def test_dial_stdio_to_nobody(self, tmp_path):
        done = subprocess.run([sys.executable, compiled(), "-H", f"unix://{tmp_path}/no.sock", "dial-stdio"], capture_output=True, text=True,
                              timeout=20, stdin=subprocess.DEVNULL)
        assert done.returncode == 1 and re.fullmatch("nerdctld: cannot connect to .*: start nerdctld .*\n", done.stderr)


###############################################################################
# ctr
###############################################################################


DIGESTS = {
    "<M>": "sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892",
    "<C>": "sha256:4e848621cfa6a3a51a22d2d9a7f5a1ecb7f5a0b203f3a0eb45efdb3c050758bf",
    "<L>": "sha256:79df1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17",
    "<N>": "sha256:92e0d612118245b002c9a33acd1eb15daf8ad298730ec75dd5cdfd6e31da203c",
}

# Version, command, status, stdout, stderr. Names and digests are shortened (DIGESTS has them in full); brackets behind a command
# tell what it was given.
RECORDED = [
    ("ctr 1.6.20", "--version", 0,
     'ctr github.com/containerd/containerd 1.6.20~ds1\n',
     ''),
    ("ctr 1.6.20", "images pull --help", 0,
     '   --plain-http                      allow connections using plain HTTP\n',
     ''),
    ("ctr 1.6.20", "images import --digests --skip-digest-for-named --all-platforms -- -", 0,
     'unpacking localhost:5000/bb:1 (<M>)...done\n',
     ''),
    ("ctr 1.6.20", "images import (nameless)", 0,
     'unpacking import-2026-11-24@<N> (<N>)...done\n',
     ''),
    ("ctr 1.6.20", "images import (garbage)", 1,
     '',
     'ctr: unexpected EOF'),
    ("ctr 1.6.20", "images pull -- localhost:5000/nope:1", 1,
     '',
     'time="2026-11-24T04:25:40Z" level=info msg="trying next host - response was http.StatusNotFound" host="localhost:5000"'
     '\n'
     'ctr: failed to resolve reference "localhost:5000/nope:1": localhost:5000/nope:1: not found'),
    ("ctr 1.6.20", "images push -- localhost:5000/nope:1", 1,
     '',
     'ctr: unable to resolve image to manifest: image "localhost:5000/nope:1": not found'),
    ("ctr 1.6.20", "images export -- - nope", 1,
     '',
     'ctr: image "nope": not found'),
    ("ctr 1.6.20", "images push -- localhost:5000/bb:1", 0,
     'manifest-1@<M>: done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'config-<C>:     done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'elapsed: 0.1 s                                                                      total:  755.0  (7.4 KiB/s)        '
     '                               \n',
     ''),
    ("ctr 1.6.20", "images pull -- localhost:5000/bb:1", 0,
     'localhost:5000/bb:1:                                                              resolved       |\x1b[32m+++++++++++++++'
     '+++++++++++++++++++++++\x1b[0m| \n'
     'manifest-<M>: done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'layer-<L>:    done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'config-<C>:   done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'elapsed: 0.1 s                                                                    total:   0.0 B (0.0 B/s)            '
     '                             \n'
     'unpacking linux/amd64 <M>...\n'
     'done: 5.069892ms\t\n',
     ''),
    ("ctr 2.3.1", "--version", 0,
     'ctr github.com/containerd/containerd/v2 v2.3.1\n',
     ''),
    ("ctr 2.3.1", "images pull --help", 0,
     '   --plain-http                           Allow connections using plain HTTP (default: false)\n'
     '   --local                                Fetch content from local client rather than using transfer service (default:'
     ' false)\n',
     ''),
    ("ctr 2.3.1", "images import --local --digests --skip-digest-for-named --all-platforms -- -", 0,
     'unpacking localhost:5000/bb:1 (<M>)...done\n',
     ''),
    ("ctr 2.3.1", "images import (nameless)", 0,
     'unpacking import-2026-11-24@<N> (<N>)...done\n',
     ''),
    ("ctr 2.3.1", "images import (garbage)", 1,
     '',
     'ctr: unexpected EOF'),
    ("ctr 2.3.1", "images pull --local -- localhost:5000/nope:1", 1,
     '',
     'time="2026-11-24T04:25:58Z" level=info msg="host will try HTTPS first since it is configured for HTTP with a TLS confi'
     'guration, consider changing host to HTTPS or removing unused TLS configuration" host="localhost:5000"\n'
     'time="2026-11-24T04:25:58Z" level=info msg="fetch failed after status: 404 Not Found" host="localhost:5000" method=HEA'
     'D url="https://localhost:5000/v2/nope/manifests/1"\n'
     'ctr: failed to resolve reference "localhost:5000/nope:1": localhost:5000/nope:1: not found'),
    ("ctr 2.3.1", "images push --local -- localhost:5000/nope:1", 1,
     '',
     'ctr: unable to resolve image to manifest: image "localhost:5000/nope:1": not found'),
    ("ctr 2.3.1", "images export --local -- - nope", 1,
     '',
     'ctr: image "nope": not found'),
    ("ctr 2.3.1", "images push --local -- localhost:5000/bb:1", 0,
     'manifest-1@<M>: done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'layer-<L>:      done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'config-<C>:     done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'elapsed: 0.1 s                                                                      total:   0.0 B (0.0 B/s)          '
     '                               \n',
     'time="2026-11-24T04:25:58Z" level=info msg="host will try HTTPS first since it is configured for HTTP with a TLS confi'
     'guration, consider changing host to HTTPS or removing unused TLS configuration" host="localhost:5000"'),
    ("ctr 2.3.1", "images pull --local -- localhost:5000/bb:1", 0,
     'localhost:5000/bb:1:                                                              resolved       |\x1b[32m+++++++++++++++'
     '+++++++++++++++++++++++\x1b[0m| \n'
     'manifest-<M>: done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'layer-<L>:    done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'config-<C>:   done           |\x1b[32m++++++++++++++++++++++++++++++++++++++\x1b[0m| \n'
     'elapsed: 0.1 s                                                                    total:   0.0 B (0.0 B/s)            '
     '                             \n'
     'unpacking linux/amd64 <M>...\n'
     'done: 15.063777ms\t\n',
     'time="2026-11-24T04:25:58Z" level=info msg="host will try HTTPS first since it is configured for HTTP with a TLS confi'
     'guration, consider changing host to HTTPS or removing unused TLS configuration" host="localhost:5000"\n'
     'time="2026-11-24T04:25:58Z" level=info msg="host will try HTTPS first since it is configured for HTTP with a TLS confi'
     'guration, consider changing host to HTTPS or removing unused TLS configuration" host="localhost:5000"'),
]


def expand(text):
    """A recording with its digests in full."""
    for short, digest in DIGESTS.items():
        text = text.replace(short, digest)
    return text


RECORDINGS = {version: {expand(command): (status, expand(stdout), expand(stderr)) for of, command, status, stdout, stderr in RECORDED if of == version}
              for version in ("ctr 1.6.20", "ctr 2.3.1")}

CTR_SCRIPT = '''#!/bin/sh
tty=0 line=
if [ -t 0 ]; then tty=1; IFS= read -r line; fi
key=
for word; do
  shift
  case "$word" in --namespace=*|--address=*) ;; *) set -- "$@" "$word"; case "$word" in --user=*|--snapshotter=*|--hosts-dir=*) ;; *) key="$key $word" ;; esac ;; esac
done
case "$key" in *" --help") key=" images pull --help" ;; esac
printf '%s\\0' "$tty" "$line" "$#" "$@" >>"{folder}/calls"
. "{folder}/rules.sh"
printf 'ctr: not in the script:%s' "$key" >&2
exit 1
'''


class ScriptedCtr:
    """A ctr that replays the recordings of a version and notes its calls."""

    def __init__(self, folder, version):
        self.folder, self.version, self.rules = folder, version, dict(RECORDINGS[version])
        self.program = folder / "ctr"
        self.program.write_text(CTR_SCRIPT.format(folder=folder))
        self.program.chmod(0o755)
        self.local = ["--local"] if "2." in version else []
        self.write()

    def write(self):
        """Make what is in `rules` what it answers."""
        rules = []
        for key, (status, stdout, stderr) in self.rules.items():
            told = "".join(f"printf %s {shlex.quote(text)}{where}; " for text, where in ((stdout, ""), (stderr, " >&2")) if text)
            rules.append(f"if [ \"$key\" = {shlex.quote(' ' + key)} ]; then {told}exit {status}; fi\n")
        (self.folder / "rules.sh").write_text("".join(rules))

    def on(self, command, stdout="", stderr="", status=0):
        """From now on `command` answers so."""
        self.rules[expand(command)] = (status, expand(stdout), expand(stderr))
        self.write()

    def calls(self):
        """The calls so far but for questions about flags: argv, whether stdin was a terminal, the first line read from it."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            told = iter((self.folder / "calls").read_text().split("\0")[:-1])
            for tty in told:
                line = next(told)
                found.append({"tty": tty == "1", "line": line + "\n" if tty == "1" else "", "argv": list(itertools.islice(told, int(next(told))))})
        return [each for each in found if each["argv"][-1] != "--help"]

    def argv(self):
        """Their command lines as strings."""
        return [" ".join(each["argv"]) for each in self.calls()]


@pytest.fixture(params=sorted(RECORDINGS))
def ctr(request, tmp_path):
    """A scripted ctr of each version."""
    return ScriptedCtr(tmp_path, request.param)


@pytest.fixture
def over_ctr(ctr, fake, monkeypatch):
    """An engine over the scripted ctr and the fake containerd."""
    monkeypatch.setenv("DOCKER_CONFIG", str(ctr.folder))
    containerd = nerdctld.Containerd(fake.path)
    engine = nerdctld.Engine(nerdctld.Ctr([str(ctr.program)], containerd), containerd)
    yield engine
    engine.close()


def authorization(**credentials):
    """The header that brings a client's credentials."""
    return {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(credentials).encode()).decode()}


def build_context_tar():
    """The tar of a context of one Dockerfile."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        entry = tarfile.TarInfo("x/D")
        entry.size = 12
        file.addfile(entry, io.BytesIO(b"FROM scratch"))
    return data.getvalue()


class TestCtr:
    def test_reads_run_no_ctr(self, ctr, fake, over_ctr):
        digest, _ = put_named(fake, BASE)
        fake.create("c1", {"a": "b"})
        fake.start("c1")
        fake.exit("c1", 3)
        assert [(each["Id"], each["RepoTags"]) for each in ask(over_ctr, "GET", "/images/json").json] == [(digest, [BASE])]
        assert ask(over_ctr, "GET", f"/images/{BASE}/json").json["Architecture"] == "amd64"
        assert [each["State"] for each in ask(over_ctr, "GET", "/containers/json?all=1").json] == ["exited"]
        assert ask(over_ctr, "GET", "/containers/c1/json").json["State"]["ExitCode"] == 3
        assert {each["Name"] for each in ask(over_ctr, "GET", "/networks").json} == {"bridge", "host", "none"}
        assert ask(over_ctr, "GET", "/volumes").json["Volumes"] == [] and ctr.calls() == []

    def test_version_and_info_say_so(self, ctr, over_ctr):
        told = {each["Name"]: each["Version"] for each in ask(over_ctr, "GET", "/version").json["Components"]}
        own = expand(ctr.rules["--version"][1]).split()[-1]
        assert (told["nerdctl"], told["ctr"], told["containerd"]) == (f"nerdctl is not installed: ctr {own}", own, "v2.3.1")
        info = ask(over_ctr, "GET", "/info").json
        assert info["Warnings"] == ["WARNING: nerdctl is not installed: over containerd's ctr there are images, listings and builds only"]
        assert (info["Driver"], info["MemoryLimit"], info["MemTotal"] > 0) == ("overlayfs", True, True)

    def test_load(self, ctr, over_ctr):
        command = " ".join(["images import", *ctr.local, "--digests --skip-digest-for-named"])
        assert [each["stream"] for each in ask(over_ctr, "POST", "/images/load", b"x").lines] == [f"Loaded image: {BASE}\n"]
        assert ctr.argv() == [command + " --snapshotter=overlayfs --all-platforms -- -"]
        assert ask(over_ctr, "POST", "/images/load?platform=linux/arm64", b"x").lines[-1]["error"].startswith("not in the script")
        assert ctr.argv()[-1] == command + " --snapshotter=overlayfs --platform=linux/arm64 -- -"
        ctr.on(command + " --all-platforms -- -", *ctr.rules["images import (garbage)"][1:], status=1)
        assert ask(over_ctr, "POST", "/images/load", b"x").lines[-1]["error"] == "unexpected EOF"

    def test_load_without_a_name(self, ctr, fake, over_ctr):
        name = f"import-2026-11-24@{DIGESTS['<N>']}"
        ctr.on(" ".join(["images import", *ctr.local, "--digests --skip-digest-for-named --all-platforms -- -"]), ctr.rules["images import (nameless)"][1])
        fake.tag(name, DIGESTS["<N>"])
        assert [each["stream"] for each in ask(over_ctr, "POST", "/images/load", b"x").lines] == [f"Loaded image ID: {DIGESTS['<N>']}\n"]
        (image,) = ask(over_ctr, "GET", "/images/json").json
        assert (image["Id"], image["RepoTags"], image["RepoDigests"]) == (DIGESTS["<N>"], [], [])
        assert ask(over_ctr, "DELETE", f"/images/{DIGESTS['<N>']}").json == [{"Deleted": DIGESTS["<N>"]}] and fake.deleted == [(name, True)]

    def test_tag(self, ctr, fake, over_ctr):
        digest, _ = put_named(fake, BASE)
        fake.images[BASE] = fake.images[BASE]._replace(labels=(("io.cri-containerd.image", "managed"),))
        for _ in range(2):
            assert ask(over_ctr, "POST", f"/images/{BASE}/tag?repo=a&tag=1").status == 201
        new = fake.images["docker.io/library/a:1"]
        assert (new.target, new.labels) == (fake.images[BASE].target, fake.images[BASE].labels)
        fake.tag("docker.io/library/a:1", fake.put({}))
        assert ask(over_ctr, "POST", f"/images/{BASE}/tag?repo=a&tag=1").status == 201 and fake.images["docker.io/library/a:1"].target.digest == digest
        assert ask(over_ctr, "POST", "/images/nope/tag?repo=a").message == "No such image: nope:latest" and ctr.calls() == []

    def test_remove(self, ctr, fake, over_ctr):
        digest, _ = put_named(fake, "docker.io/library/a:1")
        fake.tag("docker.io/library/b:1", digest)
        assert ask(over_ctr, "DELETE", f"/images/{digest}?force=1").json == [{"Untagged": "a:1"}, {"Untagged": "b:1"}, {"Deleted": digest}]
        # Only after the last name it is known what is needed no more.
        assert fake.deleted == [("docker.io/library/a:1", False), ("docker.io/library/b:1", True)] and ctr.calls() == []
        assert ask(over_ctr, "DELETE", "/images/a:1").message == "No such image: a:1"

    def test_pull(self, ctr, fake, over_ctr):
        put_named(fake, BASE)
        told = [each["status"] for each in ask(over_ctr, "POST", f"/images/create?fromImage={BASE}").lines]
        assert told[0] == "Pulling from bb" and "Pull complete" in told and told[-1] == f"Status: Image is up to date for {BASE}"
        (call,) = ctr.calls()
        assert (call["argv"], call["tty"]) == (["images", "pull", *ctr.local, "--snapshotter=overlayfs", "--", BASE], False)
        missing = ask(over_ctr, "POST", "/images/create?fromImage=localhost:5000/nope:1")
        assert (missing.status, missing.message) == (404, 'failed to resolve reference "localhost:5000/nope:1": localhost:5000/nope:1: not found')

    def test_push(self, ctr, fake, over_ctr):
        digest, _ = put_named(fake, BASE)
        told = ask(over_ctr, "POST", f"/images/{BASE}/push").lines
        assert told[-1]["aux"]["Digest"] == digest and [each["argv"] for each in ctr.calls()] == [["images", "push", *ctr.local, "--", BASE]]
        put_named(fake, "localhost:5000/nope:1")
        assert ask(over_ctr, "POST", "/images/localhost:5000/nope/push?tag=1").lines[-1]["error"] == "No such image: localhost:5000/nope:1"

    def test_push_of_what_is_here_in_part(self, ctr, fake, over_ctr):
        _, manifest = put_named(fake, "localhost:5000/part:1", ["linux/s390x"])
        ctr.on(" ".join(["images push", *ctr.local, f"--manifest={manifest} --manifest-type=application/vnd.oci.image.manifest.v1+json",
                         "-- localhost:5000/part:1"]))
        assert ask(over_ctr, "POST", "/images/localhost:5000/part:1/push").lines[-1]["aux"]["Digest"] == manifest
        refused = ask(over_ctr, "POST", "/images/localhost:5000/part:1/push?platform=linux/s390x").lines[-1]["error"]
        assert refused == "localhost:5000/part:1 has no content here for linux/s390x" and len(ctr.calls()) == 1

    def test_password_goes_by_a_terminal(self, ctr, fake, over_ctr):
        put_named(fake, BASE)
        for method, path, options in (("pull", f"/images/create?fromImage={BASE}", ["--snapshotter=overlayfs"]), ("push", f"/images/{BASE}/push", [])):
            assert ask(over_ctr, "POST", path, headers=authorization(username="u", password="p:1 2é")).status == 200
            call = ctr.calls()[-1]
            assert call["argv"] == ["images", method, *ctr.local, *options, "--user=u", "--", BASE] and (call["tty"], call["line"]) == (True, "p:1 2é\n")
        refused = ask(over_ctr, "POST", f"/images/create?fromImage={BASE}", headers=authorization(identitytoken="secret"))
        assert refused.status == 501 and "secret" not in refused.message and len(ctr.calls()) == 2

    def test_credentials_of_this_user(self, ctr, fake, over_ctr):
        put_named(fake, BASE)
        (ctr.folder / "config.json").write_text(json.dumps({"auths": {nerdctld.INDEX_SERVER: {"auth": "eDp5"}, "https://localhost:5000/v2/": {"auth": "dTpw"}}}))
        assert ask(over_ctr, "POST", f"/images/create?fromImage={BASE}").status == 200
        assert "--user=u" in ctr.calls()[-1]["argv"] and ctr.calls()[-1]["line"] == "p\n"
        assert [nerdctld.registry_login(each, None) for each in ("docker.io", "none")] == [("x", "y"), ("", "")]

    def test_login(self, ctr, over_ctr):
        with local_registry(told={"/v2/": (200, {}, b"{}")}) as address:
            body = {"serveraddress": address, "username": "u", "password": "p"}
            assert ask(over_ctr, "POST", "/auth", body).json == {"Status": "Login Succeeded"}
            refused = ask(over_ctr, "POST", "/auth", {**body, "password": "q"})
            assert (refused.status, refused.message) == (401, f'Get "https://{address}/v2/": unauthorized: incorrect username or password')
        assert ask(over_ctr, "POST", "/auth", {**body, "serveraddress": "127.0.0.1:9"}).status == 500 and ctr.calls() == []

    def test_save(self, ctr, fake, over_ctr):
        _, manifest = put_named(fake, BASE)
        assert f"blobs/{manifest.replace(':', '/')}" in names_of(ask(over_ctr, "GET", f"/images/{BASE}/get").body) and ctr.calls() == []
        assert ask(over_ctr, "GET", "/images/nope/get").message == "No such image: nope:latest"

    @pytest.mark.parametrize("method, path, body", [
        ("POST", "/containers/create", {"Image": BASE, "Cmd": ["a"]}), ("POST", "/containers/c1/rename?name=ab", b""), ("DELETE", "/containers/c1?force=1", b""),
        ("GET", "/images/search?term=a", b""), ("POST", "/networks/create", {"Name": "n"}), ("POST", "/volumes/create", {"Name": "vv"})])
    def test_what_needs_nerdctl(self, ctr, fake, over_ctr, method, path, body):
        put_named(fake, BASE)
        fake.create("c1")
        refused = ask(over_ctr, method, path, body)
        assert refused.status == 501 and refused.message.startswith("nerdctl is not installed, and ") and ctr.calls() == []

    def test_import_needs_nerdctl(self, over_ctr):
        refused = ask(over_ctr, "POST", "/images/create?fromSrc=-&repo=a", b"x")
        assert (refused.status, refused.message[:24]) == (501, "nerdctl is not installed")

    def test_no_ctr(self, ctr, fake, over_ctr):
        ctr.program.unlink()
        missing = ask(over_ctr, "POST", "/images/load", b"x")
        assert (missing.json["error"] if missing.status == 200 else missing.message).startswith(f"{ctr.program} cannot be run (No such file or directory)")

    def test_build(self, ctr, fake, over_ctr, monkeypatch, tmp_path):
        def build(**more):
            query = {"dockerfile": "x/D", "t": "a:1", "buildargs": json.dumps({"A": "-1"}), "labels": json.dumps({"a": "b"}), "nocache": "1", "pull": "1",
                     "target": "t", "extrahosts": "h:::1,g:1.2.3.4", "networkmode": "host", "cachefrom": json.dumps(["c/d"]), **more}
            return ask(over_ctr, "POST", "/build?" + urllib.parse.urlencode(query), build_context_tar())

        noted, command = tmp_path / "buildctl.txt", " ".join(["images import", *ctr.local, "--digests --skip-digest-for-named --all-platforms -- -"])
        (tmp_path / "buildctl").write_text(f"#!/bin/sh\nfor each; do echo \"$each\"; done > {noted}\necho '{{}}' >&2\n[ ! \"$BUILT\" ] || echo 'error: no' >&2\n"
                                           "exit ${BUILT:-0}\n")
        (tmp_path / "buildctl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        over_ctr.nerdctl.environment["BUILDKIT_HOST"] = "unix:///b.sock"
        digest, _ = put_named(fake, "docker.io/library/a:1")
        assert [each.get("stream") or each["aux"]["ID"] for each in build().lines] == [
            "Step 1/2 : FROM scratch", "\n", "Step 2/2 : LABEL a=b", "\n", digest, f"Successfully built {digest[7:19]}\n", "Successfully tagged a:1\n"]
        folder = noted.read_text().splitlines()[4].partition("context=")[2]
        assert sorted(noted.read_text().splitlines()) == sorted([
            "--addr=unix:///b.sock", "build", "--frontend=dockerfile.v0", f"--local=context={folder}", "--progress=rawjson", "--opt=build-arg:A=-1",
            "--opt=label:a=b", "--import-cache=type=registry,ref=c/d", "--opt=no-cache=", "--opt=image-resolve-mode=pull", "--opt=target=t",
            "--opt=force-network-mode=host", "--allow=network.host", f"--local=dockerfile={folder}/x", "--opt=filename=D",
            "--opt=add-hosts=h=::1,g=1.2.3.4", '--output=type=docker,"name=docker.io/library/a:1",dest=-'])
        ctr.on(command, stderr="ctr: unrecognized image format", status=1)
        assert build().message == "unrecognized image format"
        monkeypatch.setenv("BUILT", "1")
        assert (build().status, build().message) == (400, "no")
        (tmp_path / "buildctl").unlink()
        monkeypatch.setenv("PATH", str(tmp_path))
        assert build().status == 503

    def test_containerd_is_down(self, ctr, fake, over_ctr):
        over_ctr.containerd.given_address = f"{ctr.folder}/none.sock"
        down = ask(over_ctr, "GET", "/info")
        assert down.status == 503 and f"{ctr.folder}/none.sock" in down.message
        assert [ask(over_ctr, "POST", path).status for path in ("/images/create?fromImage=a:1", f"/images/{BASE}/push")] == [503, 503] and ctr.calls() == []

    def test_names_of_kubernetes(self, fake, over_ctr):
        digest, _ = put_named(fake, BASE)
        fake.tag(BASE[:-2] + "@" + digest, digest)
        fake.tag(DIGESTS["<C>"], digest)
        (image,) = ask(over_ctr, "GET", "/images/json").json
        assert (image["RepoTags"], image["RepoDigests"]) == ([BASE], [BASE[:-2] + "@" + digest])
        fake.create("c1", {"io.kubernetes.pod.namespace": "kube-system", "io.kubernetes.pod.name": "dns", "io.kubernetes.container.name": "main"})
        assert ask(over_ctr, "GET", "/containers/json?all=1").json[0]["Names"] == ["/k8s://kube-system/dns/main"]

    @pytest.mark.parametrize("there, named, command, address", [
        ("", "", ["nerdctl"], ""), ("nerdctl ctr", "", ["nerdctl"], ""), ("ctr k3s", "", ["ctr"], nerdctld.CONTAINERD_SOCKET),
        ("k3s", "", ["k3s", "ctr"], "/run/k3s/containerd/containerd.sock"), ("nerdctl", "/a/ctr", ["/a/ctr"], nerdctld.CONTAINERD_SOCKET),
        ("nerdctl", "/a/k3s ctr", ["/a/k3s", "ctr"], "/run/k3s/containerd/containerd.sock"), ("ctr", "/a/nerdctl -x", ["/a/nerdctl", "-x"], "")])
    def test_which_program(self, monkeypatch, tmp_path, capfd, there, named, command, address):
        for name in there.split():
            (tmp_path / name).write_text("")
            (tmp_path / name).chmod(0o755)
        for name in ("NERDCTL", "CONTAINERD_ADDRESS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        engine = nerdctld.make_engine(nerdctld.parse_args(["--nerdctl", named]))
        engine.close()
        assert (engine.nerdctl.command, engine.nerdctl.address, isinstance(engine.nerdctl, nerdctld.Ctr)) == (command, address, bool(address))
        assert engine.containerd.address == (address or nerdctld.CONTAINERD_SOCKET)
        assert ("warning: nerdctl is not installed: " in capfd.readouterr()[1]) is bool(address)

    def test_address_that_was_named(self):
        engine = nerdctld.make_engine(nerdctld.parse_args(["--nerdctl", "k3s ctr", "--address", "unix:///x.sock", "--namespace", "k8s.io"]))
        engine.close()
        assert engine.nerdctl.options == ["--address=/x.sock", "--namespace=k8s.io"]


def programs():
    """What the live tests run over: nerdctl, and every version of ctr on PATH (ctr, k3s's, and Debian's own beside it)."""
    found = {"nerdctl": "nerdctl"} if shutil.which("nerdctl") else {}
    for path in dict.fromkeys([shutil.which("ctr"), "/usr/bin/ctr"]):
        if path and os.path.exists(path):
            version = subprocess.run([path, "--version"], stdout=subprocess.PIPE, timeout=10).stdout.decode().split()[-1]
            found.setdefault("ctr " + version, path)
    return found


PROGRAMS = programs()
CTR_REGISTRY = "localhost:5000"


def archive(path, name, extra=b""):
    """Write an archive, as docker saves one, of an image with one file; the digest of its configuration."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as file:
        entry = tarfile.TarInfo("hello")
        entry.size = 5 + len(extra)
        file.addfile(entry, io.BytesIO(b"hello" + extra))
    diff = "sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()
    config = json.dumps({
        "created": "2024-01-01T00:00:00Z", "architecture": nerdctld.GO_ARCHITECTURES.get(os.uname().machine, os.uname().machine), "os": "linux",
        "config": {"Cmd": ["/hello"], "Labels": {"made": "here"}}, "rootfs": {"type": "layers", "diff_ids": [diff]},
        "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "ADD hello"},
                    {"created": "2024-01-01T00:00:00Z", "created_by": "CMD /hello", "empty_layer": True}]}).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name] if name else None, "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(path, "w") as file:
        for member, data in (("layer.tar", layer.getvalue()), ("config.json", config), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return "sha256:" + hashlib.sha256(config).hexdigest()


class Docker:
    """The docker client on a daemon of its own, in a containerd namespace of its own that is emptied at the end."""

    def __init__(self, folder, program):
        self.folder, self.program, self.namespace = folder, program, f"nerdctld-test-{os.getpid()}"
        self.socket = str(folder / "nd.sock")
        self.environment = {**os.environ, "DOCKER_HOST": "unix://" + self.socket, "DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": str(folder)}
        self.log = open(folder / "nd.log", "wb")
        self.process = subprocess.Popen([sys.executable, str(HERE / "nerdctld.py"), "-H", "unix://" + self.socket, "--namespace", self.namespace,
                                         "--nerdctl", program, "--debug"], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 20
        while not os.path.exists(self.socket) and time.monotonic() < deadline:
            time.sleep(0.02)

    def __call__(self, *words, status=0, data=None):
        """Run docker; its stdout, or its stderr where it is to fail."""
        done = subprocess.run(["docker", *words], env=self.environment, input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
        assert done.returncode == status, done.stderr.decode() + pathlib.Path(self.folder / "nd.log").read_text()[-3000:]
        return (done.stderr if status else done.stdout).decode()

    def json(self, *words):
        """The JSON that docker prints."""
        return json.loads(self(*words))

    def load(self, name):
        """Load `name`.tar from the folder as the image `name`:1. nerdctl now and then leaves out what it loaded last, since it
        reads it from its progress, so the words are compared over ctr only."""
        told = self("load", "-i", str(self.folder / f"{name}.tar"))
        assert told == f"Loaded image: {name}:1\n" or not self.over_ctr
        assert f"{name}:1" in self.json("image", "inspect", f"{name}:1")[0]["RepoTags"]

    def close(self):
        """Remove the containers and images of the namespace, end the daemon."""
        ctr = ["ctr", "--namespace", self.namespace]
        for kind in ("containers", "images"):
            names = subprocess.run([*ctr, kind, "ls", "-q"], stdout=subprocess.PIPE, timeout=30).stdout.decode().split()
            if names:
                subprocess.run([*ctr, kind, "rm", *names], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.log.close()


def answers(host, port):
    """Whether somebody listens there."""
    try:
        socket.create_connection((host, port), 1).close()
        return True
    except OSError:
        return False


def not_here():
    """Why the live tests cannot run, "" when they can."""
    if not shutil.which("docker"):
        return "needs the docker client"
    if not shutil.which("ctr"):
        return "needs containerd's ctr"
    done = subprocess.run(["ctr", "version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    return "" if done.returncode == 0 else "needs a containerd that answers"


@pytest.fixture(scope="class", params=sorted(PROGRAMS))
def docker(request, tmp_path_factory):
    """docker over each of the programs, with one image `hello:1` loaded."""
    reason = not_here()
    if reason:
        pytest.skip(reason)
    found = Docker(tmp_path_factory.mktemp("live"), PROGRAMS[request.param])
    found.over_ctr = request.param.startswith("ctr ")
    try:
        archive(found.folder / "hello.tar", "hello:1")
        found.load("hello")
        yield found
    finally:
        found.close()


class TestCtrLive:
    def test_images(self, docker):
        assert re.search(r"^hello +1 +[0-9a-f]{12} ", docker("images"), re.M)

    def test_inspect(self, docker):
        (image,) = docker.json("image", "inspect", "hello:1")
        assert (image["RepoTags"], image["Config"]["Cmd"], image["Config"]["Labels"]) == (["hello:1"], ["/hello"], {"made": "here"})
        assert image["Size"] > 10000 and image["Os"] == "linux" and docker.json("image", "inspect", image["Id"])[0]["Id"] == image["Id"]
        assert "No such image: nope" in docker("image", "inspect", "nope", status=1)

    def test_history(self, docker):
        lines = docker("history", "--human=false", "--format", "{{.CreatedBy}}|{{.Size}}", "hello:1").splitlines()
        assert lines[0] == "CMD /hello|0" and lines[1].startswith("ADD hello|") and int(lines[1].partition("|")[2]) >= 4096

    def test_tag_and_rmi(self, docker):
        docker("tag", "hello:1", "other/name:2")
        assert "other/name" in docker("images")
        docker("tag", "hello:1", "other/name:2")
        assert docker("rmi", "other/name:2") == "Untagged: other/name:2\n"
        assert "No such image: other/name:2" in docker("rmi", "other/name:2", status=1)
        assert "hello" in docker("images")

    def test_a_tag_moves(self, docker):
        archive(docker.folder / "second.tar", "second:1", b"!")
        docker.load("second")
        docker("tag", "hello:1", "moving:1")
        docker("tag", "second:1", "moving:1")
        assert docker.json("image", "inspect", "moving:1")[0]["Id"] == docker.json("image", "inspect", "second:1")[0]["Id"]
        told = docker("rmi", "moving:1", "second:1").splitlines()
        assert told[:2] == ["Untagged: moving:1", "Untagged: second:1"] and told[2].startswith("Deleted: sha256:")

    def test_save_and_load(self, docker):
        docker("tag", "hello:1", "saved:1")
        before = docker.json("image", "inspect", "saved:1")[0]
        for _ in range(10):
            docker("save", "-o", str(docker.folder / "saved.tar"), "saved:1")
            # nerdctl 2.3.5 now and then ends with status 0 before it has written the whole of it.
            if docker.over_ctr or (docker.folder / "saved.tar").read_bytes().endswith(bytes(1024)):
                break
        with tarfile.open(docker.folder / "saved.tar") as file:
            assert "index.json" in file.getnames()
            assert json.load(file.extractfile("manifest.json"))[0]["RepoTags"] == ["saved:1"]
        docker("rmi", "saved:1")
        docker.load("saved")
        after = docker.json("image", "inspect", "saved:1")[0]
        assert (after["RootFS"], after["Config"], after["Size"]) == (before["RootFS"], before["Config"], before["Size"])
        docker("rmi", "saved:1")
        assert "No such image: nope:latest" in docker("save", "-o", str(docker.folder / "none.tar"), "nope", status=1)

    def test_load_without_a_name(self, docker):
        archive(docker.folder / "nameless.tar", "", b"?")
        # nerdctl's transfer service keeps the archive's index as an image of its own, beside the image.
        found = re.findall(r"^Loaded image ID: (sha256:[0-9a-f]{64})$", docker("load", "-i", str(docker.folder / "nameless.tar")), re.M)
        assert len(found) == 1 or not docker.over_ctr
        for identity in found:
            assert docker.json("image", "inspect", identity)[0]["RepoTags"] == []
            assert "Deleted: " + identity in docker("rmi", identity)

    def test_load_of_garbage(self, docker):
        (docker.folder / "garbage.tar").write_bytes(b"garbage" * 100)
        assert docker("load", "-i", str(docker.folder / "garbage.tar"), status=1)

    def test_push_and_pull(self, docker):
        if not answers(*CTR_REGISTRY.split(":")):
            pytest.skip(f"needs a registry on {CTR_REGISTRY}")
        name = f"{CTR_REGISTRY}/nerdctld-test/hello:{os.getpid()}"
        docker("tag", "hello:1", name)
        digest = re.search(r"digest: (sha256:[0-9a-f]{64}) size: \d+", docker("push", name)).group(1)
        docker("rmi", name)
        told = docker("pull", name)
        assert f"Digest: {digest}\n" in told and f"Status: Downloaded newer image for {name}" in told
        assert "Image is up to date" in docker("pull", name)
        assert f"{name.rpartition(':')[0]}@{digest}" in docker.json("image", "inspect", name)[0]["RepoDigests"]
        docker("rmi", name)
        assert "not found" in docker("pull", f"{CTR_REGISTRY}/nerdctld-test/nope:1", status=1)
        assert "does not exist locally" in docker("push", f"{CTR_REGISTRY}/nerdctld-test/nope:1", status=1)

    def test_ps_and_inspect(self, docker):
        name = "made-by-ctr-" + str(os.getpid())
        subprocess.run(["ctr", "--namespace", docker.namespace, "containers", "create", "--label", "a=b,c", "docker.io/library/hello:1", name],
                       check=True, timeout=60, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert f"{name}|hello:1|Created" in docker("ps", "-a", "--no-trunc", "--format", "{{.ID}}|{{.Image}}|{{.Status}}")
        assert docker("ps", "-q") == ""
        (told,) = docker.json("inspect", name)
        assert (told["Path"], told["State"]["Status"], told["Config"]["Labels"]["a"]) == ("/hello", "created", "b,c")
        assert docker("ps", "-a", "--size", "--format", "{{.Size}}").startswith(("4.1kB (virtual", "0B (virtual", "8.19kB (virtual"))
        assert "container" in docker("rmi", "hello:1", status=1)
        subprocess.run(["ctr", "--namespace", docker.namespace, "containers", "rm", name], check=True, timeout=60, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while name in docker("ps", "-aq", "--no-trunc") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert docker("ps", "-aq") == ""

    def test_version_and_info(self, docker):
        told = docker.json("version", "--format", "{{json .Server}}")
        components = {each["Name"]: each["Version"] for each in told["Components"]}
        assert components["containerd"] and components["nerdctl"].startswith("nerdctl is not installed: ctr") is docker.over_ctr
        info = docker.json("info", "--format", "{{json .}}")
        assert info["Images"] >= 1 and info["MemTotal"] > 0
        assert any("nerdctl is not installed" in each for each in info["Warnings"] or []) is docker.over_ctr

    def test_networks_and_volumes(self, docker):
        assert {"bridge", "host", "none"} <= set(docker("network", "ls", "--format", "{{.Name}}").split())
        assert docker("volume", "ls", "-q") == ""
        assert "Images" in docker("system", "df")

    def test_build(self, docker):
        if not shutil.which("buildctl") or subprocess.run(["buildctl", "debug", "workers"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                                          timeout=20).returncode:
            pytest.skip("needs a buildkitd that answers")
        folder = docker.folder / "context"
        folder.mkdir()
        (folder / "Dockerfile").write_text("FROM scratch\nARG WHAT=x\nCOPY Dockerfile /f\nLABEL what=$WHAT\nCMD [\"/f\"]\n")
        told = docker("build", "--build-arg", "WHAT=-y", "-t", "built:1", "-t", "built:2", str(folder))
        assert "Successfully tagged built:1" in told and "Successfully tagged built:2" in told
        (image,) = docker.json("image", "inspect", "built:2")
        assert (image["Config"]["Labels"], image["Config"]["Cmd"], sorted(image["RepoTags"])) == ({"what": "-y"}, ["/f"], ["built:1", "built:2"])
        docker("rmi", "built:1", "built:2")
        (folder / "Dockerfile").write_text("FROM scratch\nCOPY nothing /\n")
        assert "nothing" in docker("build", "-t", "built:3", str(folder), status=1)

    def test_what_needs_nerdctl(self, docker):
        if not docker.over_ctr:
            pytest.skip("nerdctl does it")
        assert "nerdctl is not installed" in docker("search", "busybox", status=1)


###############################################################################
# Command line
###############################################################################


def command_line(pid):
    """The command line of a process, "" for one that is gone."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


class TestChecks:
    """What the daemon needs is made of programs, folders and a socket below a folder, and everything else is hidden."""

    @pytest.fixture
    def machine(self, tmp_path, monkeypatch, engine, fake):
        """An engine on a machine that has everything, and the folders of its programs and plugins."""
        bin, plugins = tmp_path / "bin", tmp_path / "plugins"
        for folder, names in ((bin, ("runc", "iptables", "buildctl")), (plugins, nerdctld.NEEDED_PLUGINS)):
            folder.mkdir()
            for name in names:
                (folder / name).write_text("#!/bin/sh\n")
                (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(bin))
        monkeypatch.setenv("CNI_PATH", str(plugins))
        monkeypatch.setattr(nerdctld, "system_path", lambda: {"PATH": str(bin)})
        monkeypatch.setattr(nerdctld, "dial_buildkit", lambda _: (socket.socket(), "unix:///b"))
        monkeypatch.setattr(nerdctld, "list_workers", lambda _: [{nerdctld.WORKER_LABEL + "namespace": "default"}])
        monkeypatch.setattr(engine.containerd, "plugin_complaint", lambda *_: "")
        engine.inventory.tools = types.SimpleNamespace(get=lambda: VERSIONS)
        return engine, bin, plugins

    def troubles(self, engine):
        return {each.name: each.trouble for each in nerdctld.check(engine) if each.trouble}

    def test_nothing_is_wanting(self, machine):
        engine, *_ = machine
        found = {each.name: each.found for each in nerdctld.check(engine)}
        assert self.troubles(engine) == {} and list(found) == [
            "containerd", "nerdctl", "runc", "snapshotter", "CNI plugins", "iptables", "cgroups", "BuildKit"]
        assert (found["nerdctl"], found["runc"]) == ("v2.3.5", "1.1.5+ds1") and found["containerd"].startswith("v2.3.1 at /")

    def test_what_is_not_there_is_told_with_what_to_install(self, machine, monkeypatch):
        engine, bin, plugins = machine
        for path in (bin / "iptables", bin / "buildctl", plugins / "bridge", plugins / "tuning"):
            path.unlink()
        told = self.troubles(engine)
        assert set(told) == {"iptables", "BuildKit", "CNI plugins"} and all("install" in each for each in told.values())
        assert "no bridge, tuning in" in told["CNI plugins"]

    @pytest.mark.parametrize("containerd, nerdctl, fits", [
        ("1.6.20~ds1", "v2.3.5", False), ("1.6.20", "2.3.0", False), ("v1.6.20", "v2.2.2", True), ("1.7.28", "v2.3.5", True), ("v2.3.1", "v1.7.7", True), ("1.6.20", "1.7.7", True)])
    def test_versions_that_do_not_fit(self, machine, monkeypatch, containerd, nerdctl, fits):
        engine, *_ = machine
        monkeypatch.setattr(engine.containerd, "version", lambda: (containerd, ""))
        engine.inventory.tools = types.SimpleNamespace(get=lambda: {"Client": {"Version": nerdctl}, "Server": VERSIONS["Server"]})
        # At the start, too, where nerdctl is not asked for its version unless that matters.
        for whole in (True, False):
            told = [each.trouble for each in nerdctld.check(engine, whole) if each.trouble]
            assert (told == []) is fits and ("containerd 1.7 or newer" in "".join(told)) is not fits

    def test_a_snapshotter_that_does_not_work(self, machine, monkeypatch):
        engine, *_ = machine
        monkeypatch.setattr(engine.containerd, "plugin_complaint", lambda *_: "no such device")
        assert "(no such device)" in self.troubles(engine)["snapshotter"] and "--snapshotter native" in self.troubles(engine)["snapshotter"]

    def test_a_builder_whose_images_nerdctl_would_not_see(self, machine, monkeypatch):
        engine, *_ = machine
        monkeypatch.setattr(nerdctld, "list_workers", lambda _: [{nerdctld.WORKER_LABEL + "namespace": "other"}])
        assert "'other'" in self.troubles(engine)["BuildKit"]

    @pytest.mark.parametrize("unified, euid, trouble", [(True, 1000, False), (False, 1000, True), (False, 0, False)])
    def test_cgroups(self, monkeypatch, engine, unified, euid, trouble):
        monkeypatch.setattr(os.path, "exists", lambda _: unified)
        monkeypatch.setattr(os, "geteuid", lambda: euid)
        assert bool(nerdctld.check_cgroups(engine).trouble) is trouble

    def test_containerd_down(self, machine, fake):
        engine, *_ = machine
        fake.stop_serving()
        assert "systemctl start containerd" in self.troubles(engine)["containerd"]
        fake.start_serving()

    def test_info_warns_of_it(self, machine, furnished):
        engine, bin, _ = machine
        (bin / "iptables").unlink()
        furnished.troubles = lambda: list(self.troubles(engine).values())
        assert ask(furnished, "GET", "/info").json["Warnings"][-1].startswith("WARNING: bridge networks and published ports do not work: install")

    def test_it_is_printed_with_a_status(self, machine, capsys):
        engine, bin, _ = machine
        assert nerdctld.print_check(engine) == 0 and "warning" not in capsys.readouterr().out
        (bin / "iptables").unlink()
        assert nerdctld.print_check(engine) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("ok      Python       3.") and [each.split()[:2] for each in lines if not each.startswith("ok ")] == [["warning", "iptables"]]


class TestCommandLine:
    def test_defaults(self, monkeypatch):
        for name in ("NERDCTL", "CONTAINERD_NAMESPACE", "CONTAINERD_ADDRESS", "CONTAINERD_SNAPSHOTTER", "BUILDKIT_HOST"):
            monkeypatch.delenv(name, raising=False)
        found = nerdctld.parse_args([])
        assert (found.nerdctl, found.namespace, found.address, found.addr, found.debug) == ("", "default", "", "", False)

    def test_environment(self, monkeypatch):
        for name, value in (("NERDCTL", "lima nerdctl"), ("CONTAINERD_NAMESPACE", "k8s.io"), ("CONTAINERD_ADDRESS", "/a"), ("BUILDKIT_HOST", "unix:///b")):
            monkeypatch.setenv(name, value)
        found = nerdctld.parse_args(["--namespace", "x"])
        assert (found.nerdctl, found.namespace, found.address, found.buildkit_host) == ("lima nerdctl", "x", "/a", "unix:///b")

    def test_settings_of_nerdctl(self, monkeypatch, tmp_path):
        (tmp_path / "nerdctl.toml").write_text(
            "# namespace = \"no\"\ndebug = true\nnamespace = \"k8s.io\"  # Kubernetes\n\taddress='unix:///run/k3s/containerd.sock'\n"
            "hosts_dir = [\"/a\"]\ndata_root = \"/data\"\ncni_netconfpath=\"/nets\"\n")
        for name in ("CONTAINERD_NAMESPACE", "CONTAINERD_ADDRESS", "NETCONFPATH"):
            monkeypatch.delenv(name, raising=False)
        found = nerdctld.parse_args([])
        assert (found.namespace, found.address) == ("k8s.io", "unix:///run/k3s/containerd.sock")
        assert (nerdctld.data_root(), nerdctld.cni_folder()) == ("/data", "/nets") and "debug" not in nerdctld.nerdctl_settings()
        monkeypatch.setenv("CONTAINERD_NAMESPACE", "mine")
        monkeypatch.setenv("NETCONFPATH", "/others")
        assert nerdctld.parse_args([]).namespace == "mine" and nerdctld.parse_args(["--namespace", "x"]).namespace == "x"
        assert nerdctld.cni_folder() == "/others"

    def test_settings_that_cannot_be_read(self, tmp_path):
        (tmp_path / "nerdctl.toml").unlink()
        (tmp_path / "nerdctl.toml").mkdir()
        assert nerdctld.nerdctl_settings() == {}

    @pytest.mark.parametrize("argv", [["--nothing"], ["x"], ["--namespace", "-a"], ["--namespace", "a/b"], ["--namespace", ""], ["--nerdctl", " "], ["--idle-timeout", "x"]])
    def test_refuses(self, argv, capsys):
        with pytest.raises(SystemExit) as caught:
            nerdctld.parse_args(argv)
        told = capsys.readouterr().err
        assert caught.value.code == 2 and re.fullmatch(r"nerdctld: .+: see nerdctld --help\n", told), told

    def test_version(self):
        done = subprocess.run([sys.executable, compiled(), "--version"], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout) == (0, f"nerdctld {nerdctld.VERSION}\n")

    def test_help_has_an_example_for_each_way_to_run_it(self, capsys):
        with pytest.raises(SystemExit):
            nerdctld.parse_args(["--help"])
        told = capsys.readouterr().out
        for line in re.findall(r"^  nerdctld\.py (.*?)   ", told, re.M):
            nerdctld.parse_args(shlex.split(line))
        assert told.count("systemctl") == 2 and "--detach" in told and "ssh://" in told

    def test_a_script_leaves_bytecode_for_its_next_start(self, tmp_path):
        """By whatever name and link it is started, with the arguments as they are."""
        if os.geteuid() == 0 and not os.access("/var/cache", os.W_OK):
            pytest.skip("no cache")
        program, link = tmp_path / "a 'b" / "nerdctld", tmp_path / "link"
        program.parent.mkdir()
        shutil.copy(HERE / "nerdctld.py", program)
        link.symlink_to(program)
        path = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
        for command in ([str(program)], [str(link)], ["./nerdctld"]):
            done = subprocess.run([*command, "--namespace", "a b", "dial-stdio"], env={"PATH": path, "HOME": str(tmp_path)}, cwd=program.parent,
                                  capture_output=True, text=True, timeout=20)
            assert (done.returncode, done.stderr) == (2, "nerdctld: --namespace: 'a b' is not a containerd namespace: see nerdctld --help\n")
        cache = pathlib.Path("/var/cache/nerdctld" if os.geteuid() == 0 else tmp_path / ".cache/nerdctld")
        left = list(pathlib.Path(f"{cache}{program.parent}").glob("nerdctld*.pyc"))
        if os.geteuid() == 0:
            shutil.rmtree(f"{cache}{tmp_path}")
        assert len(left) == 1

    def test_detached_it_returns_when_clients_can_connect(self, tmp_path, scripted, fake):
        path = str(tmp_path / "nd.sock")
        done = subprocess.run([sys.executable, compiled(), "--detach", "-H", "unix://" + path, "--nerdctl", str(scripted.program), "--address", fake.path],
                              env={**os.environ, **away(tmp_path), "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20)
        # Its own child is left, which leads a session and reads from nowhere.
        found = [int(each) for each in os.listdir("/proc") if each.isdigit() and path in command_line(each)]
        assert (done.returncode, done.stdout, len(found)) == (0, b"", 1)
        assert os.getsid(found[0]) == found[0] and os.readlink(f"/proc/{found[0]}/fd/0") == os.devnull
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(path)
            sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        os.kill(found[0], signal.SIGTERM)
        assert until(lambda: not os.path.exists(path))

    @pytest.mark.parametrize("euid, path", [(0, "/var/run/nerdctl.sock"), (1000, "/run/user/1/nerdctl.sock")])
    def test_socket_path(self, monkeypatch, euid, path):
        monkeypatch.setattr(os, "geteuid", lambda: euid)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
        assert nerdctld.default_socket_path() == path

    def test_quotes_that_do_not_end(self):
        done = subprocess.run([sys.executable, compiled(), "--nerdctl", "a 'b"], capture_output=True, text=True, timeout=20)
        assert done.returncode == 2 and "Traceback" not in done.stderr


###############################################################################
# Units and wrapper
###############################################################################


class TestUnits:
    def test_verify(self, tmp_path):
        if not shutil.which("systemd-analyze"):
            pytest.skip("no systemd-analyze")
        for name in ("nerdctl.service", "nerdctl.socket"):
            # Systemd looks for it in folders of its own.
            (tmp_path / name).write_text((HERE / name).read_text().replace("=nerdctld.py ", f"={HERE}/nerdctld.py "))
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(tmp_path / "nerdctl.service"), str(tmp_path / "nerdctl.socket")],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "nerdctl." not in done.stderr, done.stderr

    @staticmethod
    def command():
        """The command of the service."""
        words = re.search(r"^ExecStart=(.*)$", (HERE / "nerdctl.service").read_text(), re.M).group(1).split()
        assert (words[0], words[-1]) == ("nerdctld.py", "$NERDCTLD_OPTIONS")
        return [str(HERE / "nerdctld.py"), *words[1:-1]]

    def test_options_are_known(self):
        assert nerdctld.parse_args(self.command()[1:]).idle_timeout == 600

    def test_socket_activation(self, tmp_path, scripted, fake):
        if not shutil.which("systemd-socket-activate"):
            pytest.skip("no systemd-socket-activate")
        found = Daemon(tmp_path, command=["systemd-socket-activate", "-l", str(tmp_path / "nd.sock"), "-E", "PATH", *self.command(),
                                          "--nerdctl", str(scripted.program), "--address", fake.path])
        assert found.ask("GET", "/_ping").body == b"OK"
        assert found.end() == 0


class TestWrapper:
    def run(self, path, *words, name="docker", **options):
        return subprocess.run(["sh", str(path / name), *words] if name == "sh" else [str(path / name), *words], capture_output=True, text=True, timeout=20, **options)

    @pytest.fixture
    def place(self, tmp_path):
        """The wrapper installed as docker, and a program that stands for the real nerdctl."""
        first, second = tmp_path / "first", tmp_path / "second"
        first.mkdir()
        second.mkdir()
        shutil.copy(HERE / "nerdctl", first / "docker")
        shutil.copy(HERE / "nerdctl", first / "nerdctl")
        (second / "nerdctl").write_text('#!/bin/sh\necho "real $*"\nexit 3\n')
        (second / "nerdctl").chmod(0o755)
        return first, {"PATH": f"{first}:{second}:/usr/bin:/bin"}

    def test_finds_the_real_one(self, place):
        path, environment = place
        for name in ("docker", "nerdctl"):
            done = self.run(path, "ps", "-a", "--", "a b", name=name, env=environment)
            assert (done.returncode, done.stdout) == (3, "real ps -a -- a b\n")

    def test_through_a_link(self, place, tmp_path):
        path, environment = place
        (tmp_path / "third").mkdir()
        (tmp_path / "third" / "nerdctl").symlink_to(path / "docker")
        environment["PATH"] = f"{tmp_path}/third:" + environment["PATH"]
        assert self.run(tmp_path / "third", "info", name="nerdctl", env=environment).stdout == "real info\n"

    def test_without_a_real_one(self, place):
        path, _ = place
        done = self.run(path, "ps", env={"PATH": f"{path}:/nosuch:/usr/bin:/bin"})
        if shutil.which("nerdctl", path="/usr/bin:/bin") is None:
            assert done.returncode == 127 and "not on PATH" in done.stderr

    def test_dial_stdio(self, place, daemon):
        path, environment = place
        environment["NERDCTLD"] = str(HERE / "nerdctld.py")
        environment["PATH"] = f"{os.path.dirname(sys.executable)}:{environment['PATH']}"
        done = self.run(path, "--host", "unix://" + daemon.socket, "system", "dial-stdio", env=environment, input="GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert done.stdout.endswith("OK") and done.returncode == 0

    def test_dial_stdio_without_daemon(self, place):
        path, environment = place
        environment["NERDCTLD"] = "/nosuch"
        done = self.run(path, "system", "dial-stdio", env=environment)
        assert done.returncode == 127 and "NERDCTLD" in done.stderr


###############################################################################
# Live: the real nerdctl, containerd, BuildKit and registry
###############################################################################

NAMESPACE = "nerdctld-test"
CLIENTS = ("/usr/local/bin/docker", "/usr/bin/docker")


def real(*words, namespace=NAMESPACE, timeout=60, data=None):
    """Run the real nerdctl, bounded; its output."""
    return subprocess.run(["nerdctl", f"--namespace={namespace}", *words], capture_output=True, timeout=timeout, input=data)


def why_not_live():
    """Why live tests cannot run here, in one line; "" when they can."""
    if not shutil.which("nerdctl"):
        return "nerdctl is not on PATH"
    try:
        done = real("version", timeout=20)
    except subprocess.TimeoutExpired:
        return "nerdctl version does not end"
    if done.returncode or b"Server:" not in done.stdout:
        return "containerd does not answer nerdctl"
    return "" if (STACK / "base.tar").exists() else f"no base image at {STACK}/base.tar: .ci/stack up makes it"


class Live(Daemon):
    """The daemon over the real nerdctl."""

    def docker(self, client, *words, data=None, timeout=60, environment=None):
        """Run a docker CLI against it; the finished process, its output as text."""
        return subprocess.run([client, *words], capture_output=True, timeout=timeout, input=data, env={
            **os.environ, "DOCKER_HOST": "unix://" + self.socket, "HOME": os.path.dirname(self.socket), "DOCKER_BUILDKIT": "0", **(environment or {})})

    def text(self, client, *words, **options):
        """stdout of a command that has to succeed."""
        done = self.docker(client, *words, **options)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()


@pytest.fixture(scope="session")
def live_daemons(tmp_path_factory):
    """Namespace -> a daemon over it, both with the base image."""
    reason = why_not_live()
    if reason:
        pytest.skip(reason)
    found = {}
    try:
        for namespace in (NAMESPACE, "default"):
            if BASE.encode() not in real("images", "--format", "{{.Name}}", namespace=namespace).stdout:
                real("load", data=(STACK / "base.tar").read_bytes(), namespace=namespace)
            # A short path: those of sockets may have 107 bytes.
            found[namespace] = Live(tmp_path_factory.mktemp("live"), "--namespace", namespace, "--debug", environment={"TMPDIR": str(tmp_path_factory.mktemp("tmp"))})
        yield found
    finally:
        for each in found.values():
            each.end()
        names = real("images", "--format", "{{.Name}}").stdout.decode().split()
        if names:
            real("rmi", "-f", *names)
        real("namespace", "rm", NAMESPACE)


@pytest.fixture
def live(live_daemons):
    """The daemon over a namespace of the tests' own."""
    return live_daemons[NAMESPACE]


@pytest.fixture
def building(live_daemons):
    """The daemon over BuildKit's namespace; skips where no buildkitd answers."""
    if not shutil.which("buildctl") or subprocess.run(["buildctl", "debug", "workers"], capture_output=True, timeout=20).returncode:
        pytest.skip("no buildkitd answers")
    yield live_daemons["default"]
    names = [name for name in real("images", "--format", "{{.Name}}", namespace="default").stdout.decode().split() if "/tstlive" in name]
    if names:
        real("rmi", "-f", *names, namespace="default")


@pytest.fixture(params=CLIENTS, ids=["docker of /usr/local", "docker of /usr"])
def client(request):
    """A docker CLI."""
    if not os.access(request.param, os.X_OK):
        pytest.skip(f"no {request.param}")
    return request.param


@pytest.fixture(scope="session")
def real_registry():
    """The registry of the stack."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 5000), 2):
        if not os.path.exists(STACK / "registry.address") or (STACK / "registry.address").read_text() == "localhost:5000\n":
            return "localhost:5000"
    pytest.skip("the registry on port 5000 is somebody else's, or there is none")


class TestLiveImages:
    def test_version_and_info(self, live, client):
        assert "nerdctl" in live.text(client, "version")
        assert live.text(client, "info", "--format", "{{.Driver}} {{.OSType}}") == "overlayfs linux\n"
        assert "Server Version: " + nerdctld.ENGINE_VERSION in live.text(client, "info")

    def test_images_and_inspect(self, live, client):
        rows = [json.loads(line) for line in live.text(client, "images", "--no-trunc", "--format", "{{json .}}").splitlines()]
        row = next(each for each in rows if (each["Repository"], each["Tag"]) == ("localhost:5000/bb", "1"))
        told = json.loads(live.text(client, "image", "inspect", BASE))[0]
        assert told["Id"] == row["ID"] and told["Config"]["Cmd"] == ["sh"] and told["RepoTags"] == [BASE]
        assert json.loads(live.text(client, "inspect", row["ID"][7:19]))[0]["Id"] == row["ID"]
        assert "busybox-static" in live.text(client, "history", BASE)
        assert live.text(client, "images", "-q", "--filter", "reference=localhost:5000/*").strip()
        done = live.docker(client, "image", "inspect", "nosuch")
        assert done.returncode == 1 and b"No such image: nosuch" in done.stderr

    def test_tag_and_rmi(self, live, client):
        live.text(client, "tag", BASE, "tstlive/a:1")
        assert live.text(client, "images", "--format", "{{.Repository}}:{{.Tag}}", "tstlive/a") == "tstlive/a:1\n"
        assert "Untagged: tstlive/a:1" in live.text(client, "rmi", "tstlive/a:1")
        assert live.docker(client, "rmi", "tstlive/a:1").returncode == 1

    def test_save_and_load(self, live, client, tmp_path):
        live.text(client, "tag", BASE, "tstlive/b:1")
        archive = live.docker(client, "save", "tstlive/b:1").stdout
        names = tarfile.open(fileobj=io.BytesIO(archive)).getnames()
        assert "manifest.json" in names and "index.json" in names
        live.text(client, "rmi", "tstlive/b:1")
        assert "Loaded image: tstlive/b:1" in live.text(client, "load", data=archive)
        assert live.docker(client, "load", data=b"garbage" * 100).returncode == 1
        assert "import" not in live.text(client, "images")
        live.text(client, "rmi", "tstlive/b:1")

    def test_an_uncompressed_layer_goes_in_and_out_whole(self, live, tmp_path):
        # Its end looks like that of the archive.
        layer = tar_of(("file", random.randbytes(200000)))
        config = json.dumps({"architecture": nerdctld.GO_ARCHITECTURES.get(os.uname().machine, ""), "os": "linux", "rootfs": {
            "type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]}, "config": {}}).encode()
        names = ["tstlive/u:2", "tstlive/u:1", "tstlive/u:3"]
        manifest = json.dumps([{"Config": "c.json", "RepoTags": names, "Layers": ["layer.tar"]}]).encode()
        (tmp_path / "u.tar").write_bytes(tar_of(("c.json", config), ("layer.tar", layer), ("manifest.json", manifest)))
        done = subprocess.run(["curl", "-sS", "--unix-socket", live.socket, "-X", "POST", "-H", "Expect: 100-continue", "-T", tmp_path / "u.tar", "http://d/images/load"],
                              capture_output=True, timeout=60)
        assert [json.loads(line) for line in done.stdout.splitlines()] == [{"stream": f"Loaded image: {name}\n"} for name in names], done.stderr
        found = {live.ask("GET", "/images/get?names=" + ",".join(names)).body for _ in range(20)}
        assert len(found) == 1
        with tarfile.open(fileobj=io.BytesIO(found.pop())) as archive:
            assert {"oci-layout", "index.json", "blobs/sha256/" + hashlib.sha256(layer).hexdigest()} <= set(archive.getnames())
        identity = live.ask("GET", "/images/tstlive/u:1/json").json["Id"]
        assert live.ask("DELETE", "/images/tstlive/u:1?force=1&platforms=" + urllib.parse.quote('{"os":"linux","architecture":"arm64"}')).status == 501
        live.ask("POST", "/images/tstlive/u:1/tag?repo=tstlive/v&tag=1")
        assert live.ask("DELETE", f"/images/tstlive/u@{identity}?force=1").json == [{"Untagged": name} for name in sorted(names)]
        assert live.ask("DELETE", "/images/tstlive/v:1").json == [{"Untagged": "tstlive/v:1"}, {"Deleted": identity}]

    def test_push_and_pull(self, live, client, real_registry):
        for tag in "12":
            live.text(client, "tag", BASE, f"{real_registry}/tstlive/c:{tag}")
            assert re.search(rf"{tag}: digest: sha256:[0-9a-f]{{64}} size: \d+", live.text(client, "push", f"{real_registry}/tstlive/c:{tag}"))
            live.text(client, "rmi", f"{real_registry}/tstlive/c:{tag}")
        text = live.text(client, "pull", f"{real_registry}/tstlive/c:1")
        assert "Digest: sha256:" in text and f"Status: Downloaded newer image for {real_registry}/tstlive/c:1" in text
        assert "Image is up to date" in live.text(client, "pull", f"{real_registry}/tstlive/c:1")
        live.text(client, "pull", "-a", f"{real_registry}/tstlive/c")
        assert sorted(live.text(client, "images", "--format", "{{.Tag}}", f"{real_registry}/tstlive/c").split()) == ["1", "2"]
        live.text(client, "rmi", f"{real_registry}/tstlive/c:1", f"{real_registry}/tstlive/c:2")
        done = live.docker(client, "pull", f"{real_registry}/tstlive/nosuch:1")
        assert done.returncode == 1 and b"not found" in done.stderr

    def test_import_and_prune(self, live, client):
        data = tar_of(("hello", b"hi"))
        identity = live.text(client, "import", "--change", "CMD [\"/x\"]", "-", "tstlive/d:1", data=data).strip() if client == "nothing" else live.text(
            client, "import", "-m", "why", "-", "tstlive/d:1", data=data).strip()
        assert json.loads(live.text(client, "image", "inspect", "tstlive/d:1"))[0]["Id"] == identity
        live.text(client, "rmi", "tstlive/d:1")
        nameless = live.text(client, "import", "-", data=data).strip()
        assert nameless in live.text(client, "images", "-q", "--no-trunc", "--filter", "dangling=true")
        assert "Total reclaimed space" in live.text(client, "image", "prune", "-f")
        assert nameless not in live.text(client, "images", "-aq", "--no-trunc")

    def test_the_rest(self, live, client, real_registry):
        assert "CONTAINER ID" in live.text(client, "ps", "-a")
        assert "Images" in live.text(client, "system", "df") and live.text(client, "system", "df", "-v")
        assert "bridge" in live.text(client, "network", "ls") and "DRIVER" in live.text(client, "volume", "ls")
        assert live.docker(client, "search", "busybox").returncode == 1
        assert "Login Succeeded" in live.text(client, "login", "-u", "u", "-p", "p", real_registry)
        assert live.docker(client, "login", "-u", "u", "-p", "p", "localhost:1").returncode == 1
        assert b"swarm manager" in live.docker(client, "node", "ls").stderr
        assert live.text(client, "events", "--since", "1h", "--until", "0s", "--filter", "type=image")

    def test_docker_py(self, live):
        python = "/var/cache/nerdctld-stack/python/bin/python"
        if not os.access(python, os.X_OK):
            pytest.skip("no docker-py of the stack")
        script = ("import docker\nc = docker.DockerClient(base_url='unix://%s')\ni = c.images.get('%s')\nassert '%s' in i.tags, i.tags\n"
                  "assert c.version()['ApiVersion'] == '1.56'\nassert c.images.list()\nassert i.history()\nassert i.tag('tstlive/e', '1')\n"
                  "data = b''.join(c.images.get('tstlive/e:1').save(named=True))\nc.images.remove('tstlive/e:1')\n"
                  "assert c.images.load(data)[0].id == i.id\nc.images.remove('tstlive/e:1')\nprint(c.info()['Images'], c.df()['LayersSize'], c.containers.list(all=True))\n"
                  "try: c.images.get('nosuch')\nexcept docker.errors.ImageNotFound: print('good')\n") % (live.socket, BASE, BASE)
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=90)
        assert done.returncode == 0 and done.stdout.endswith("good\n"), done.stderr


class TestLiveBuild:
    def build(self, building, client, tmp_path, dockerfile, *words):
        (tmp_path / "Dockerfile").write_text(dockerfile)
        return building.docker(client, "build", *words, str(tmp_path), timeout=120)

    def test_build(self, building, client, tmp_path):
        (tmp_path / "file").write_text("content")
        done = self.build(building, client, tmp_path, f"FROM {BASE}\nARG A\nCOPY file /file\nRUN echo $A >/a; cat /file\n", "-t", "tstlive/f:1", "--build-arg", "A=b",
                          "--label", "x=y")
        assert done.returncode == 0 and b"Successfully tagged tstlive/f:1" in done.stdout, done.stderr
        told = json.loads(building.text(client, "image", "inspect", "tstlive/f:1"))[0]
        assert told["Config"]["Labels"] == {"base": "busybox", "x": "y"} and len(told["RootFS"]["Layers"]) == 3
        rows = building.text(client, "history", "--no-trunc", "--format", "{{.CreatedBy}}", "tstlive/f:1").splitlines()
        assert len(rows) == len(told["RootFS"]["Layers"]) + len([each for each in rows if each.startswith(("LABEL", "ARG"))])

    def test_quiet(self, building, client, tmp_path):
        done = self.build(building, client, tmp_path, f"FROM {BASE}\n", "-q", "-t", "tstlive/g:1")
        assert done.stdout.decode().strip() == json.loads(building.text(client, "image", "inspect", "tstlive/g:1"))[0]["Id"]

    def test_failure(self, building, client, tmp_path):
        done = self.build(building, client, tmp_path, f"FROM {BASE}\nRUN exit 7\n")
        assert done.returncode == 7 and b"The command '/bin/sh -c exit 7' returned a non-zero code: 7" in done.stderr
        done = self.build(building, client, tmp_path, f"FROM {BASE}\nFOO\n")
        assert done.returncode == 1 and b"unknown instruction: FOO" in done.stderr

    def test_import_with_changes(self, building, client):
        building.text(client, "import", "-c", "CMD [\"/x\"]", "-c", "ENV A=b", "-", "tstlive/h:1", data=tar_of(("x", b"hi")), timeout=120)
        told = json.loads(building.text(client, "image", "inspect", "tstlive/h:1"))[0]
        assert told["Config"]["Cmd"] == ["/x"] and "A=b" in told["Config"]["Env"]

    def test_prune(self, building, client):
        assert "Total" in building.text(client, "builder", "prune", "-f", "--filter", "until=10000h")


# A new one each time: the registry keeps what was pushed.
BIG = f"localhost:5000/tstlive/big:{int(time.time())}"


@pytest.fixture
def box(live, client):
    """`box(*words)` runs docker with containers of its own, which are removed at the end."""
    def run(*words, **options):
        return live.docker(client, *words, **options)

    run.live, run.client = live, client
    run.text = lambda *words, **options: live.text(client, *words, **options)
    yield run
    names = [each["Id"] for each in live.ask("GET", "/containers/json?all=1").json]
    for name in names:
        live.ask("DELETE", f"/containers/{name}?force=1&v=1")


def on_terminal(command, script, environment, seconds=30):
    """Run a command on a pseudo-terminal and type: `script` is pairs of what is waited for and what is typed then (bytes, or
    a window size). Its status and what was seen."""
    import pty
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(["setsid", "-c", *command], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen, left, deadline = b"", list(script), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            seen += data
        if left and left[0][0] in seen:
            action = left.pop(0)[1]
            if isinstance(action, bytes):
                os.write(master, action)
            else:
                fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", *action, 0, 0))
    os.close(master)
    try:
        return process.wait(5), seen
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(5), seen


QUIET = ("--network", "none")


class TestLiveContainers:
    @pytest.mark.parametrize("args, body", [(LINES, whole_life), (FOREVER, life_of_execs)], ids=["container", "execs"])
    def test_the_life_of_a_task(self, live, tmp_path, args, body):
        """What the fake containerd is tested with."""
        identity = real("create", "--net", "none", BASE, *args).stdout.decode().strip()
        containerd = nerdctld.Containerd(namespace=NAMESPACE)
        try:
            with contextlib.closing(ToldTopics(containerd, identity)) as told:
                body(containerd, identity, tmp_path, told)
        finally:
            real("rm", "-f", identity)

    def test_run(self, box):
        done = box("run", "--rm", *QUIET, BASE, "sh", "-c", "echo out; echo err >&2; sleep 0.3; exit 3")
        assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
        assert until(lambda: box.text("ps", "-aq") == ""), box.text("ps", "-a", "--no-trunc")

    def test_run_what_cannot_be_run(self, box):
        done = box("run", "--rm", *QUIET, BASE, "nosuch")
        assert done.returncode == 127 and b"executable file not found" in done.stderr
        assert until(lambda: box.text("ps", "-aq") == "")

    def test_output_is_exact(self, box):
        data = os.urandom(3000000)
        # nerdctl 2.3 does not wait for the last output of a container that ends, so this one takes its time.
        done = box("run", "-i", "--rm", *QUIET, BASE, "sh", "-c", "cat; sleep 1", data=data)
        assert done.returncode == 0 and done.stdout == data
        done = box("run", "--rm", *QUIET, BASE, "sh", "-c", "head -c 500000 /bin/busybox; sleep 1")
        assert done.stdout == pathlib.Path("/bin/busybox").read_bytes()[:500000]

    def test_input_ends(self, box):
        # Time for nerdctl's last output, see above.
        done = box("run", "-i", "--name", "tstin", *QUIET, BASE, "sh", "-c", "cat; sleep 0.5; exit 7", data=b"no line end")
        assert (done.returncode, done.stdout, done.stderr) == (7, b"no line end", b"")
        assert box.text("logs", "tstin") == "no line end"
        for _ in range(2):
            done = box("start", "-ai", "tstin", data=b"more")
            assert (done.returncode, done.stdout) == (7, b"more")
        assert box.text("logs", "tstin") == "no line endmoremore"

    def test_input_after_a_copy(self, box, tmp_path):
        (tmp_path / "file").write_text("copied\n")
        identity = box.text("create", "-i", "--name", "tstcopied", *QUIET, BASE, "sh", "-c", "cat /file; cat; sleep 0.5").strip()
        box.text("cp", str(tmp_path / "file"), "tstcopied:/file")
        assert box("start", "-ai", "tstcopied", data=b"input\n").stdout == b"copied\ninput\n"
        # Nothing took its place.
        assert identity in real("ps", "-aq", "--no-trunc").stdout.decode()

    def test_input_for_one_started_before(self, box):
        box.text("run", "-d", "-i", "--name", "tstlater", *QUIET, BASE, "sh", "-c", "read line; echo got $line; sleep 1")
        for _ in range(2):
            time.sleep(0.3)
            assert box.text("ps", "-q", "--filter", "name=tstlater")
            assert box("attach", "tstlater", data=b"it\n").stdout == b"got it\n"
            assert box.text("wait", "tstlater") == "0\n"
            box.text("start", "tstlater")

    def test_no_stdin_is_an_empty_one(self, box):
        assert box.text("run", "--rm", *QUIET, BASE, "sh", "-c", "cat; echo ended") == "ended\n"
        assert box.text("run", "--rm", *QUIET, BASE) == ""

    def test_exit_status_of_what_goes_at_once(self, box):
        assert [box("run", "--rm", *QUIET, BASE, "sh", "-c", "exit 7").returncode for _ in range(8)] == [7] * 8

    def test_what_is_made_anew_keeps_all_of_its_request(self, box):
        done = box("run", "-i", "--name", "tstall", "--tmpfs", "/tt", "-v", "/data", "--label", "empty", "--stop-timeout", "0", *QUIET, BASE, "sh", "-c", "mount | grep -c -e ' /tt ' -e ' /data '", data=b"")
        assert done.stdout == b"2\n"
        assert box.text("inspect", "-f", "{{json .HostConfig.Tmpfs}} {{json .Config.Volumes}} {{.Config.StopTimeout}} {{index .Config.Labels \"empty\"}}.", "tstall") == '{"/tt":""} {"/data":{}} 0 .\n'

    def test_mounts_of_another(self, box):
        box.text("run", "-d", "--name", "tstfrom", "-v", "/data", *QUIET, BASE, "sleep", "100")
        done = box("run", "--rm", "--volumes-from", "tstfrom:ro", *QUIET, BASE, "sh", "-c", "ls -d /data; touch /data/x")
        assert done.stdout == b"/data\n" and b"Read-only" in done.stderr

    def test_checks_go_on_after_a_restart_by_policy(self, box):
        box.text("run", "-d", "--name", "tstagain", "--restart", "always", "--health-cmd", "test -f /ok", "--health-interval", "1s", "--health-retries", "1", *QUIET, BASE,
                 "sh", "-c", "test -f /once || { touch /once; exit 1; }; touch /ok; sleep 300")
        # containerd looks for what it is to start again each 10 s, and later when it has much to do.
        assert until(lambda: box.text("inspect", "-f", "{{.State.Health.Status}} {{.RestartCount}}", "tstagain") == "healthy 1\n", 120)

    def test_aliases(self, box):
        box.text("network", "create", "tstalias")
        try:
            box.text("run", "-d", "--name", "tstnamed", "--network", "tstalias", "--hostname", "tsth", "--network-alias", "one", "--network-alias", "two", BASE, "sleep", "100")
            # The first thing that it does.
            assert b"1 packets received" in box("run", "--rm", "--network", "tstalias", BASE, "ping", "-c1", "-w2", "two").stdout
        finally:
            box("rm", "-f", "tstnamed")
            box.text("network", "rm", "tstalias")

    def test_ports_of_one(self, box):
        box.text("run", "-d", "--name", "tsttwo", "-p", "18091:80", "-p", "18092:80", BASE, "sleep", "100")
        assert set(box.text("port", "tsttwo").splitlines()) == {"80/tcp -> 0.0.0.0:18091", "80/tcp -> 0.0.0.0:18092"}

    def test_input_that_has_no_bytes(self, box):
        # Bare nerdctl 2.3.5 never ends here: it forgets an end of file that comes before the process runs.
        assert box.text("run", "-i", "--rm", *QUIET, BASE, "cat", data=b"") == ""
        box.text("run", "-d", "--name", "tstnone", *QUIET, BASE, "sleep", "100")
        for data in (b"", b"a"):
            assert box.text("exec", "-i", "tstnone", "cat", data=data) == data.decode()
        box.text("exec", "tstnone", "sh", "-c", "mv /etc/passwd /etc/real; ln -s /etc/real /etc/passwd")
        assert box.text("exec", "-u", "user", "tstnone", "id", "-u") == "1000\n"

    def test_terminal(self, box):
        environment = {**os.environ, "DOCKER_HOST": "unix://" + box.live.socket, "TERM": "dumb"}
        status, seen = on_terminal([box.client, "run", "-it", "--name", "tstt", *QUIET, BASE, "sh"], [
            (b"# ", b"sleep 1; echo o''ne\n"), (b"one\r\n", (33, 99)), (b"one\r\n", b"sleep 1; stty size; echo t''wo\n"), (b"two\r\n", b"exit 4\n")], environment)
        assert status == 4 and b"33 99" in seen, seen
        status, seen = on_terminal([box.client, "start", "-ai", "tstt"], [(b"# ", b"echo a''gain\n"), (b"again\r\n", b"\x10\x11")], environment)
        assert status == 0 and box.text("ps", "-q") != ""
        status, seen = on_terminal([box.client, "attach", "tstt"], [(b"", b"\necho t''hird; exit 5\n")], environment)
        assert status == 5 and b"third" in seen

    def test_life(self, box):
        box.text("run", "-d", "--name", "tstlife", "-e", "A=1", "-l", "x=y", *QUIET, BASE, "sh", "-c", "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done")
        assert until(lambda: box.text("logs", "tstlife") == "up\n")
        assert box.text("inspect", "-f", "{{.State.Status}} {{.Config.Labels.x}} {{.Image}}", "tstlife").startswith("running y sha256:")
        for command, state in (("pause", "paused"), ("unpause", "running")):
            box.text(command, "tstlife")
            assert box.text("inspect", "-f", "{{.State.Status}}", "tstlife") == state + "\n"
        assert "sleep 0.1" in box.text("top", "tstlife")
        assert box.text("stats", "--no-stream", "--format", "{{.Name}}", "tstlife") == "tstlife\n"
        box.text("rename", "tstlife", "tstlive")
        assert box("rm", "tstlive").returncode == 1
        box.text("stop", "tstlive")
        assert box.text("inspect", "-f", "{{.State.ExitCode}}", "tstlive") == box.text("wait", "tstlive") == "9\n"
        box.text("start", "tstlive")
        box.text("kill", "tstlive")
        assert until(lambda: "Exited (137)" in box.text("ps", "-a"))
        box.text("rm", "tstlive")

    def test_exec(self, box):
        box.text("run", "-d", "--name", "tstexec", *QUIET, BASE, "sleep", "100")
        done = box("exec", "tstexec", "sh", "-c", "echo out; echo err >&2; exit 5")
        assert (done.returncode, done.stdout, done.stderr) == (5, b"out\n", b"err\n")
        assert box("exec", "-i", "tstexec", "cat", data=b"x" * 1000000).stdout == b"x" * 1000000
        assert box.text("exec", "-u", "user", "-w", "/tmp", "-e", "B=2", "tstexec", "sh", "-c", "id -un; pwd; echo $B") == "user\n/tmp\n2\n"
        assert box("exec", "tstexec", "nosuch").returncode in (126, 127)
        done = box("exec", "-u", "nobodyelse", "tstexec", "true")
        assert (done.returncode, done.stdout) == (126, b"unable to find user nobodyelse: no matching entries in passwd file\r\n")
        box.text("exec", "-d", "tstexec", "touch", "/tmp/made")
        assert until(lambda: box("exec", "tstexec", "ls", "/tmp/made").returncode == 0)

    def test_copies(self, box, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "file").write_text("content")
        box.text("create", "--name", "tstcp", *QUIET, BASE, "sleep", "100")
        for _ in range(2):
            box.text("cp", str(tmp_path / "in"), "tstcp:/tmp/")
            box.text("cp", "tstcp:/tmp/in/file", str(tmp_path / "out"))
            assert (tmp_path / "out").read_text() == "content"
            assert re.search(rb"Could not find the file|No such container:path", box("cp", "tstcp:/nosuch", str(tmp_path)).stderr)
            box("start", "tstcp")
        assert {"A /tmp/in/file"} <= set(box.text("diff", "tstcp").splitlines())

    def test_no_mount_stays(self, box):
        # Whatever nerdctl mounts of a container that does not run, it unmounts, also when nobody reads the rest.
        box.text("create", "--name", "tstcp", *QUIET, BASE, "true")
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            entry = tarfile.TarInfo("big")
            entry.size = 30 << 20
            tar.addfile(entry, io.BytesIO(os.urandom(entry.size)))
        assert box.live.ask("PUT", "/containers/tstcp/archive?path=/tmp", data.getvalue()).status == 200
        assert box.live.ask("HEAD", "/containers/tstcp/archive?path=/tmp").status == 200
        for method, path, body in (("GET", "archive?path=/tmp/big", b""), ("GET", "export", b""), ("PUT", "archive?path=/tmp", data.getvalue())):
            sock = box.live.connect()
            sock.sendall(f"{method} /containers/tstcp/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:1 << 20])
            if not body:
                assert sock.recv(100).startswith(b"HTTP/1.1 200")
            time.sleep(0.3)
            sock.close()
        assert until(lambda: not re.findall(r"/nerdctl-(?:cp|export)-", pathlib.Path("/proc/self/mounts").read_text()))

    def test_logs(self, box):
        box.text("run", "-d", "--name", "tstlogs", *QUIET, BASE, "sh", "-c", "for i in 1 2 3; do echo $i; echo e$i >&2; done")
        box.text("wait", "tstlogs")
        done = box("logs", "tstlogs")
        assert (done.stdout, done.stderr) == (b"1\n2\n3\n", b"e1\ne2\ne3\n")
        assert len(box("logs", "--tail", "2", "tstlogs").stdout + box("logs", "--tail", "2", "tstlogs").stderr) >= 4
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z 1\n", box.text("logs", "-t", "tstlogs"))
        assert box.text("logs", "-f", "tstlogs") == "1\n2\n3\n"
        assert box.text("logs", "--since", "1h", "tstlogs") == "1\n2\n3\n" and box.text("logs", "--until", "1h", "tstlogs") == ""

    def test_networks_and_volumes(self, box):
        box.text("network", "create", "--label", "a=b", "tstnet")
        assert box("network", "create", "tstnet").returncode == 1
        box.text("volume", "create", "tstvol")
        box.text("run", "-d", "--name", "tsta", "--network", "tstnet", "-v", "tstvol:/data", BASE, "sh", "-c", "echo kept > /data/f; sleep 100")
        assert "1 packets received" in box.text("run", "--rm", "--network", "tstnet", BASE, "ping", "-c1", "tsta")
        assert box("volume", "rm", "tstvol").returncode == 1 and box("network", "rm", "tstnet").returncode == 1
        assert "tsta" in box.text("network", "inspect", "-f", "{{range .Containers}}{{.Name}}{{end}}", "tstnet")
        box.text("rm", "-f", "tsta")
        assert box.text("run", "--rm", *QUIET, "-v", "tstvol:/data", BASE, "cat", "/data/f") == "kept\n"
        box.text("volume", "rm", "tstvol")
        box.text("network", "rm", "tstnet")

    def test_connect(self, box):
        box.text("network", "create", "tstsecond")
        try:
            name = box.text("create", "--name", "tstc", BASE, "sleep", "100").strip()
            box.text("network", "connect", "tstsecond", "tstc")
            assert box.text("inspect", "-f", "{{.Id}} {{len .NetworkSettings.Networks}}", "tstc") == name + " 2\n"
            box.text("start", "tstc")
            assert b"cannot connect container to host network" in box("network", "connect", "host", "tstc").stderr
            box.text("network", "disconnect", "bridge", "tstc")
            assert box.text("exec", "tstc", "sh", "-c", "ls /sys/class/net").split() == ["eth1", "lo"]
        finally:
            box("rm", "-f", "tstc")
            box.text("network", "rm", "tstsecond")

    def health(self, box, name):
        """State.Health of a container, without the log; what nerdctl says of it has to be the same."""
        told = json.loads(box.text("inspect", "-f", "{{json .State.Health}}", name))
        return told and (told["Status"], told["FailingStreak"])

    def test_health(self, box):
        box.text("run", "-d", "--name", "tsth", *QUIET, "--health-cmd", "echo out; test -f /tmp/well", "--health-interval", "1s", "--health-retries", "2", BASE, "sleep", "100")
        assert self.health(box, "tsth") == ("starting", 0) and "(health: starting)" in box.text("ps", "--format", "{{.Names}} {{.Status}}")
        assert until(lambda: self.health(box, "tsth")[0] == "unhealthy", 20)
        box.text("exec", "tsth", "touch", "/tmp/well")
        assert until(lambda: self.health(box, "tsth") == ("healthy", 0), 20)
        log = json.loads(box.text("inspect", "-f", "{{json .State.Health.Log}}", "tsth"))
        assert [each["ExitCode"] for each in log][:2] == [1, 1] and log[-1]["ExitCode"] == 0 and {each["Output"] for each in log} == {"out\n"}
        assert [each["Start"] for each in log] == sorted(each["Start"] for each in log)
        told = json.loads(real("inspect", "tsth").stdout)[0]["State"].get("Health")
        # nerdctl before 2.1.3 knows of no health, and the others have the last result first.
        assert not told or (told["Status"], told["Log"][-1]["Start"]) == ("healthy", log[0]["Start"])
        assert not told or b"(healthy)" in real("ps").stdout
        box.text("pause", "tsth")
        assert self.health(box, "tsth") == ("unhealthy", 0)
        box.text("unpause", "tsth")
        assert until(lambda: self.health(box, "tsth") == ("healthy", 0), 20)
        box.text("restart", "-t", "0", "tsth")
        assert self.health(box, "tsth") == ("starting", 0)
        box.text("stop", "-t", "0", "tsth")
        assert self.health(box, "tsth")[0] == "unhealthy"

    def test_events_of_health_checks(self, box):
        since = str(int(time.time()) - 1)
        name = box.text("run", "-d", "--name", "tsth", *QUIET, "--health-cmd", "exit 3", "--health-interval", "1s", "--health-retries", "1", BASE, "sleep", "100").strip()
        assert until(lambda: self.health(box, "tsth")[0] == "unhealthy", 20)
        told = box.text("events", "--since", since, "--until", str(int(time.time()) + 1), "--filter", "container=" + name, "--format", "{{.Action}}{{with .Actor.Attributes.exitCode}} {{.}}{{end}}")
        assert told.splitlines()[:6] == ["create", "start", "exec_create: /bin/sh -c exit 3", "exec_start: /bin/sh -c exit 3", "exec_die 3", "health_status: unhealthy"]

    def test_a_health_check_that_takes_too_long(self, box):
        """Nothing of it stays, also where the container is paused in the middle of it."""
        box.text("run", "-d", "--name", "tsth", *QUIET, "--health-cmd", "echo begun; sleep 1000", "--health-interval", "1s", "--health-timeout", "1s", "--health-retries", "1", BASE, "sleep", "100")
        folder = pathlib.Path(os.path.dirname(box.text("inspect", "-f", "{{.LogPath}}", "tsth").strip()))
        assert until(lambda: self.health(box, "tsth") == ("unhealthy", 1), 20)
        output = json.loads(box.text("inspect", "-f", "{{json .State.Health.Log}}", "tsth"))[0]
        assert (output["ExitCode"], output["Output"]) == (-1, "Health check exceeded timeout (1s): begun\n")
        assert until(lambda: list(folder.glob(nerdctld.FIFO_FOLDER + "*")), 20)
        box.text("pause", "tsth")
        time.sleep(2)
        box.text("unpause", "tsth")
        assert until(lambda: len(json.loads(box.text("inspect", "-f", "{{json .State.Health.Log}}", "tsth"))) > 1, 20)
        box.text("kill", "tsth")
        assert until(lambda: not list(folder.glob(nerdctld.FIFO_FOLDER + "*")), 20)

    def test_cycles_leave_nothing(self, box):
        def held():
            folder = f"/proc/{box.live.process.pid}"
            return len(os.listdir(folder + "/fd")), len(os.listdir(folder + "/task"))

        cycle = lambda: (box.text("run", "-d", "--name", "tstcycle", *QUIET, BASE, "sleep", "100"), box.text("exec", "tstcycle", "true"),
                         box.text("run", "--rm", *QUIET, BASE, "true"), box.text("rm", "-f", "tstcycle"))
        cycle()
        time.sleep(1)
        before = held()
        for _ in range(5):
            cycle()
        assert until(lambda: all(now <= then + 1 for now, then in zip(held(), before))), (before, held())


class TestLiveChanges:
    """Two requests at once for one container: each pair of answers is one that dockerd gives."""

    ROUNDS = 6

    def make(self, live, removed, network="none"):
        """A container with an anonymous volume; its id."""
        answer = live.ask("POST", "/containers/create", {
            "Image": BASE, "Cmd": ["sh", "-c", "trap 'exit 0' TERM; sleep 300 & wait"], "Volumes": {"/data": {}},
            "HostConfig": {"NetworkMode": network, "AutoRemove": removed}})
        assert answer.status == 201, answer.body
        return answer.json["Id"]

    def state(self, live, identity):
        """The state that the daemon tells, "" for one that neither it nor nerdctl has."""
        def look():
            answer = live.ask("GET", f"/containers/{identity}/json")
            there = identity in real("ps", "-aq", "--no-trunc").stdout.decode().split()
            return answer if there == (answer.status == 200) else None

        answer = until(look)
        assert answer, "one of the two has it, and the other has not"
        return answer.json["State"]["Status"] if answer.status == 200 else ""

    @pytest.mark.parametrize("removed", [False, True], ids=["plain", "--rm"])
    @pytest.mark.parametrize("runs, first, second, answers", [
        (False, "POST /start", "POST /start", {(204, 304): "running", (304, 204): "running"}),
        (False, "POST /start", "DELETE ?force=1&v=1", {(204, 204): "", (404, 204): "", (409, 204): ""}),
        (False, "POST /start", "DELETE ?v=1", {(204, 409): "running", (404, 204): "", (409, 204): ""}),
        (True, "POST /stop?t=5", "POST /exec", {(204, 201): "exited", (204, 404): "exited", (204, 409): "exited"}),
        (True, "POST /stop?t=5", "POST /stop?t=5", {(204, 204): "exited", (204, 304): "exited", (304, 204): "exited", (204, 404): "exited", (404, 204): "exited"}),
        (True, "POST /restart?t=5", "POST /stop?t=5", {(204, 204): "running exited"}),
        (True, "DELETE ?force=1&v=1", "DELETE ?force=1&v=1", {(204, 409): "", (409, 204): "", (204, 404): "", (404, 204): ""}),
        (True, "POST /pause", "POST /pause", {(204, 409): "paused", (409, 204): "paused"})])
    def test_pairs(self, live, removed, runs, first, second, answers):
        volumes = {each["Name"] for each in live.ask("GET", "/volumes").json["Volumes"]}

        def send(method, path):
            return live.ask(method, f"/containers/{identity}{path}", {"Cmd": ["true"]} if path == "/exec" else None)

        for _ in range(self.ROUNDS):
            identity = self.make(live, removed)
            try:
                assert not runs or send("POST", "/start").status == 204
                told = at_once(send, first.split(), second.split())
                pair = tuple(each.status for each in told)
                assert pair in answers, [each.body for each in told]
                wanted = answers[pair].split() or [""]
                if "exited" in wanted and removed:
                    # The volume, too, is gone with it.
                    wanted = [""] + wanted[:-1]
                assert until(lambda: self.state(live, identity) in wanted), (pair, self.state(live, identity))
            finally:
                send("DELETE", "?force=1&v=1")
            assert until(lambda: self.state(live, identity) == "")
        assert until(lambda: {each["Name"] for each in live.ask("GET", "/volumes").json["Volumes"]} == volumes)

    def test_a_start_by_somebody_else(self, live):
        """A forced removal that answers 204 has removed."""
        for number in range(12):
            identity = self.make(live, False)
            process = subprocess.Popen(["nerdctl", f"--namespace={NAMESPACE}", "start", identity], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(number * 0.02)
            status = live.ask("DELETE", f"/containers/{identity}?force=1&v=1").status
            process.wait(30)
            assert (self.state(live, identity) == "") == (status in (204, 404)), (status, self.state(live, identity))
            live.ask("DELETE", f"/containers/{identity}?force=1&v=1")

    def test_two_networks_at_once(self, live):
        made = [live.ask("POST", "/networks/create", {"Name": f"tstchanges{number}"}).json["Id"] for number in range(2)]
        try:
            for pair, statuses in (((0, 0), [200, 200]), ((0, 1), [200, 200])):
                identity = self.make(live, False, "bridge")
                send = lambda number: live.ask("POST", f"/networks/{made[number]}/connect", {"Container": identity})
                assert sorted(each.status for each in at_once(send, *((each,) for each in pair))) == statuses
                networks = live.ask("GET", f"/containers/{identity}/json").json["NetworkSettings"]["Networks"]
                assert {f"tstchanges{each}" for each in pair} <= set(networks)
                assert live.ask("DELETE", f"/containers/{identity}?force=1&v=1").status == 204
        finally:
            for each in made:
                live.ask("DELETE", f"/networks/{each}")


class TestLiveCreate:
    """What nerdctl wants to have at the creation, and Docker at the start, of the real containers."""

    SERVER = ("sh", "-c", "while true; do hostname | nc -l -p 80; done")

    @pytest.fixture
    def docker(self, live):
        """A docker CLI as a function; its containers are named mine, other and third."""
        docker = lambda *words: live.text(CLIENTS[0], *words).strip()
        docker.fails = lambda *words: live.docker(CLIENTS[0], *words).stderr.decode()
        yield docker
        live.docker(CLIENTS[0], "rm", "-f", "mine", "other", "third")

    def serves(self, port):
        """What a server on this machine says, "" where nobody does."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as sock:
            sock.settimeout(2)
            return sock.recv(99).decode().strip()
        return ""

    def test_a_port_of_two(self, docker):
        port = nerdctld.unused_port("tcp")
        docker("run", "-d", "--name", "other", "-h", "other", "-p", f"{port}:80", BASE, *self.SERVER)
        docker("create", "--name", "mine", "-h", "mine", "-p", f"{port}:80", BASE, *self.SERVER)
        assert until(lambda: self.serves(port) == "other") and f"Bind for 0.0.0.0:{port} failed: port is already allocated" in docker.fails("start", "mine")
        docker("stop", "-t", "0", "other")
        docker("start", "mine")
        assert until(lambda: self.serves(port) == "mine") and "port is already allocated" in docker.fails("start", "other")
        docker("kill", "mine")
        # Given back at the end, and not only when it is removed.
        assert until(lambda: not nerdctld.is_bound({"IP": "0.0.0.0", "PublicPort": port, "Type": "tcp"}))
        real("start", docker("inspect", "-f", "{{.Id}}", "other"))
        assert until(lambda: self.serves(port) == "other") and docker("port", "other") == f"80/tcp -> 0.0.0.0:{port}"

    def test_a_port_of_one_that_ended_by_itself(self, docker):
        port = nerdctld.unused_port("tcp")
        docker("run", "--name", "other", "-p", f"{port}:80", BASE, "true")
        docker("run", "-d", "--name", "mine", "-h", "mine", "-p", f"{port}:80", BASE, *self.SERVER)
        assert until(lambda: self.serves(port) == "mine") and docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "other") == "exited 0"

    def test_namespaces(self, docker):
        docker("create", "--name", "other", "--ipc", "shareable", BASE, "sh", "-c", "ls /dev/shm; echo x > /dev/shm/there; sleep 300")
        docker("create", "--name", "mine", "--network", "container:other", "--pid", "container:other", "--ipc", "container:other", BASE, "sleep", "300")
        inside = lambda name: docker("exec", name, "sh", "-c", "hostname; cat /etc/hosts; ls /dev/shm; ls -l /proc/self/ns | grep -E 'net|ipc|pid_' | sed 's/.*->//'")
        assert "cannot join network of a non running container" in docker.fails("start", "mine")
        for starts in (docker, docker, lambda _, name: real("start", docker("inspect", "-f", "{{.Id}}", name))):
            docker("restart", "-t", "0", "other")
            assert until(lambda: "there" in docker("exec", "other", "ls", "/dev/shm"))
            starts("start", "mine")
            assert inside("mine") == inside("other") and docker("logs", "other") == ""
            docker("stop", "-t", "0", "mine")

    def test_the_network_of_the_host_by_way_of_others(self, docker):
        docker("run", "-d", "--name", "other", "--network", "host", "--pid", "host", BASE, "sleep", "300")
        for name, above in (("mine", "other"), ("third", "mine")):
            docker("run", "-d", "--name", name, "--network", f"container:{above}", "--pid", f"container:{above}", BASE, "sleep", "300")
            found = [docker("exec", name, "readlink", f"/proc/self/ns/{kind}") for kind in ("net", "pid")]
            assert found == [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid")]

    def test_restart_policies(self, docker):
        """The monitor of containerd looks each 10 seconds."""
        state = lambda name: docker("inspect", "-f", "{{.State.Status}} {{.HostConfig.RestartPolicy.Name}} {{.RestartCount}}", name)
        policies = {"mine": "always", "other": "on-failure", "third": "unless-stopped"}
        for name, policy in policies.items():
            docker("run", "-d", "--network", "none", "--name", name, "--restart", policy, BASE, "sleep", "300")
        pid = lambda name: int(docker("inspect", "-f", "{{.State.Pid}}", name))
        for name in policies:
            os.kill(pid(name), signal.SIGKILL)
        assert until(lambda: [state(name) for name in policies] == [f"running {policy} 1" for policy in policies.values()], 25)
        docker("stop", "-t", "0", *policies)
        time.sleep(12)
        assert [state(name) for name in policies] == [f"exited {policy} 1" for policy in policies.values()]
        real("start", docker("inspect", "-f", "{{.Id}}", "other"))
        docker("start", "mine", "third")
        os.kill(pid("other"), signal.SIGKILL)
        docker("update", "--restart", "no", "mine")
        os.kill(pid("mine"), signal.SIGKILL)
        assert until(lambda: state("other") == "running on-failure 2", 25)
        assert state("mine") == "exited no 0" and state("third") == "running unless-stopped 0"


class TestLiveNetworks:
    """Containers that are put into networks and taken out of them in place, with the real plugins."""

    ONE, TWO = "tstone", "tsttwo"

    @pytest.fixture
    def nets(self, live):
        """A docker CLI as a function; two networks, and a container `tstpeer` in the second."""
        docker = lambda *words: live.text(CLIENTS[0], *words).strip()
        docker.fails = lambda *words: live.docker(CLIENTS[0], *words).stderr.decode()
        try:
            for number, name in enumerate((self.ONE, self.TWO)):
                docker("network", "create", "--subnet", f"10.203.{number}.0/24", name)
            docker("run", "-d", "--name", "tstpeer", "--network", self.TWO, BASE, "sleep", "300")
            yield docker
        finally:
            for word, names in (("rm -f", ("tstmine", "tstpeer")), ("network rm", (self.ONE, self.TWO))):
                live.docker(CLIENTS[0], *word.split(), *names)
        assert self.leases("") == []

    def leases(self, identity):
        """The addresses in the two networks that a container has, or with "" any."""
        found = [each for name in (self.ONE, self.TWO) for each in pathlib.Path("/var/lib/cni/networks", name).glob("10.*")]
        return sorted(each.name for each in found if identity in each.read_text())

    def told(self, docker):
        """By network the address that inspect tells of."""
        found = json.loads(docker("inspect", "--format", "{{json .NetworkSettings.Networks}}", "tstmine"))
        return {name: each["IPAddress"] for name, each in found.items()}

    def reach(self, docker, source, name):
        """One container finds another by name, and is answered."""
        assert "1 packets received" in docker("exec", source, "ping", "-c", "1", "-W", "3", name)

    @pytest.fixture
    def engine(self, live):
        """An engine beside the daemon."""
        found = nerdctld.Engine(nerdctld.Nerdctl(["nerdctl"], NAMESPACE), nerdctld.Containerd("", NAMESPACE))
        yield found
        found.close()

    @pytest.mark.parametrize("state", ["created", "running", "paused", "ended"])
    def test_in_every_state(self, nets, engine, state):
        nets("create" if state == "created" else "run", *([] if state == "created" else ["-d"]), "--name", "tstmine", "--network", self.ONE, BASE, "sleep", "300")
        for word in {"ended": ["kill"], "paused": ["pause"]}.get(state, []):
            nets(word, "tstmine")
        nets("network", "connect", "--alias", "other", self.TWO, "tstmine")
        assert list(self.told(nets)) == [self.ONE, self.TWO]
        if state == "paused":
            nets("unpause", "tstmine")
        elif state != "running":
            nets("start", "tstmine")
        addresses = self.told(nets)
        assert addresses[self.TWO].startswith("10.203.1.") and addresses[self.TWO] in nets("exec", "tstmine", "ip", "addr")
        for source, name in (("tstmine", "tstpeer"), ("tstpeer", "tstmine"), ("tstpeer", "tstmine." + self.TWO), ("tstpeer", "other")):
            self.reach(nets, source, name)
        assert addresses[self.TWO] in nets("network", "inspect", self.TWO)
        nets("network", "disconnect", self.ONE, "tstmine")
        # The way out is that of the other network.
        assert "default via 10.203.1.1" in nets("exec", "tstmine", "ip", "route")
        self.reach(nets, "tstmine", "10.203.1.1")
        nets("network", "disconnect", self.TWO, "tstmine")
        assert self.told(nets) == {} and "eth" not in nets("exec", "tstmine", "ip", "addr") and "tstmine" not in nets("exec", "tstpeer", "cat", "/etc/hosts")
        assert "bad address" in nets.fails("exec", "tstmine", "ping", "-c", "1", "tstpeer")
        nets("network", "connect", "--ip", "10.203.1.77", self.TWO, "tstmine")
        assert self.told(nets) == {self.TWO: "10.203.1.77"}
        self.reach(nets, "tstpeer", "tstmine")
        nets("network", "disconnect", self.TWO, "tstmine")

    def test_nothing_is_left_after_its_end(self, nets, engine):
        nets("run", "-d", "--name", "tstmine", "--network", self.ONE, BASE, "sleep", "300")
        rules = lambda: subprocess.run(["iptables-save"], capture_output=True, text=True, timeout=20).stdout
        nets("network", "connect", self.TWO, "tstmine")
        # It comes back under another address, of which nerdctl's hook does not know.
        nets("network", "disconnect", self.ONE, "tstmine")
        nets("network", "connect", self.ONE, "tstmine")
        identity, addresses = engine.inventory.container("tstmine").id, self.told(nets)
        assert self.leases(identity) == sorted(addresses.values()) and all(f"{each}/32" in rules() for each in addresses.values())
        nets("kill", "tstmine")
        assert until(lambda: not engine.inventory.container("tstmine").running)
        nerdctld.release_networks(engine, engine.inventory.container("tstmine"))
        assert self.leases(identity) == [] and identity not in rules() and not [each for each in addresses.values() if f"{each}/32" in rules()]
        nets("start", "tstmine")
        assert len(self.leases(identity)) == 2 and set(self.told(nets)) == {self.ONE, self.TWO}
        self.reach(nets, "tstpeer", "tstmine")
        nets("rm", "-f", "tstmine")
        assert self.leases(identity) == [] and identity not in rules()

    def test_addresses_of_their_own_in_several_networks(self, nets, engine):
        nets("create", "--name", "tstmine", "--network", self.ONE, "--ip", "10.203.0.55", BASE, "sleep", "300")
        nets("network", "connect", "--ip", "10.203.1.55", self.TWO, "tstmine")
        container = engine.inventory.container("tstmine")
        pid = engine.containerd.create_task(container.record, nerdctld.TaskStreams())
        try:
            nerdctld.attach_networks(engine, container, pid)
            engine.containerd.start_task(container.id)
            assert self.told(nets) == {self.ONE: "10.203.0.55", self.TWO: "10.203.1.55"}
            self.reach(nets, "tstpeer", "tstmine")
        finally:
            nets("kill", "tstmine")
            nerdctld.release_networks(engine, engine.inventory.container("tstmine"))


@pytest.fixture
def lured(box):
    """Function of a name that makes a container with links to the host's folder `outside`, and two names in /swap that are always
    one of a folder or such a link; the folder."""
    outside = pathlib.Path(tempfile.mkdtemp(dir="/tmp", prefix="tstoutside"))
    (outside / "file").write_text("of the host")
    script = (f"mkdir -p /var /in{outside} /swap/a; echo inside >/swap/a/file; ln -s {outside} /swap/b; ln -s {outside} /abs; ln -s ../..{outside} /var/rel; ln -s /proc/self/root{outside} /self; "
              f"ln -s /proc/1/root{outside} /one; ln -s loop /loop; ln -s abs /chain; echo; cd /swap; while :; do mv a c; mv b a; mv c b; mv b c; mv a b; mv c a; done")

    def make(name, *options):
        box.text("run", "-d", "--name", name, *QUIET, *options, BASE, "sh", "-c", script)
        assert until(lambda: box("logs", name).stdout)

    yield make, outside
    assert {each.name: each.read_text() for each in outside.iterdir()} == {"file": "of the host"}
    shutil.rmtree(outside)


class TestLiveTree:
    STATES = {"running": [], "paused": [["pause"]], "stopped": [["kill"], ["wait"]]}

    @pytest.mark.parametrize("state", STATES)
    def test_links_of_every_kind(self, box, lured, state):
        make, outside = lured
        make("tstlured", "--pid", "host", "-v", "/proc:/hostproc:ro")
        for words in self.STATES[state]:
            box(*words, "tstlured")
        put = lambda name, path="/": box.live.ask("PUT", f"/containers/tstlured/archive?path={path}", entries((name, "0", b"evil"))).status
        get = lambda path: box.live.ask("GET", f"/containers/tstlured/archive?path={path}")
        for link in ("/abs", "/var/rel", "/self", "/one", "/chain", "/loop", f"/hostproc/1/root{outside}", f"/hostproc/self/root{outside}"):
            # In the container there is no such folder.
            assert put(link.strip("/") + "/evil") in (400, 500) or "hostproc" in link, link
            # The kernel may refuse to read the links of a process.
            assert put("evil", link) in (400, 404, 500) or "hostproc" in link, link
            assert get(link + "/file").status in (400, 404, 500), link
        for name in ("abs", "chain"):
            assert put(name) == 200
            assert get("/" + name).body[512:516] == b"evil"

    def test_nobody_wins_by_swapping(self, box, lured):
        make, outside = lured
        make("tstlured")
        answers = collections.Counter()
        for _ in range(150):
            with contextlib.suppress(http.client.IncompleteRead):
                answer = box.live.ask("GET", "/containers/tstlured/archive?path=/swap/a/file")
                answers["GET", answer.status] += 1
                assert b"of the host" not in answer.body
        for _ in range(75):
            answers["PUT", box.live.ask("PUT", "/containers/tstlured/archive?path=/", entries(("swap/a/evil", "0", b"evil"))).status] += 1
            answers["PUT", box.live.ask("PUT", "/containers/tstlured/archive?path=/swap/a", entries(("evil", "0", b"evil"))).status] += 1
        assert answers["PUT", 200] and answers["GET", 200], answers

    def test_as_dockerd_does_it(self, box, tmp_path):
        # In one container of each: what was copied in comes out alike.
        reference = Live.__new__(Live)
        reference.socket = str(STACK / "ref20.sock")
        try:
            reference.ask("GET", "/_ping")
        except OSError:
            pytest.skip(f"no dockerd on {reference.socket}")
        if BASE not in reference.docker(box.client, "images", "--format", "{{.Repository}}:{{.Tag}}").stdout.decode():
            reference.text(box.client, "load", data=(STACK / "base.tar").read_bytes())
        name, found = f"tsttree{os.getpid()}", []
        for each in (box.live, reference):
            each.text(box.client, "create", "--name", name, "--network", "none", "-v", "/volume", BASE, "sh", "-c", "ln -s /in /link; sleep 100")
            try:
                found.append(self.copied(each, box.client, name))
            finally:
                each.docker(box.client, "rm", "-f", "-v", name)
        assert [each for each in zip(*found) if each[0] != each[1]] == [] and len(found[0]) == len(found[1])

    def copied(self, live, client, name):
        """What comes of copies into a container that was never started, and into the same when it runs and is paused."""
        seen = []
        capability = {"pax_headers": {"SCHILY.xattr.security.capability": "\x01\0\0\x02\0\x04" + "\0" * 14}}
        for state in ("create", "start", "pause"):
            live.docker(client, state, name)
            for path, query, data in (
                    ("/", "", entries(("in", "5", b"", {"mode": 0o2750, "uid": 5, "mtime": 7}), ("in/f", "0", b"content", {"mode": 0o4755, "gid": 9, "mtime": 3}), ("in/l", "2", "/abs"), ("in/h", "1", "in/f"),
                                      ("in/cap", "0", b"c", capability), ("in/new/x", "0", b"1"))),
                    ("/in", "", entries(("caf\udce9", "0", b"1"), ("f/below", "0", b"2"))), ("/in", "", entries(("new", "0", b"2"))), ("/in", "", entries(("new", "5", b""), ("l/x", "0", b""))),
                    ("/in/", "&noOverwriteDirNonDir=1", entries(("new", "0", b"2"))), ("/volume", "", entries(("v", "0", b"v", {"uid": 3}))), ("/nosuch", "", entries(("v", "0", b"v"))),
                    ("/in", "", entries(("../out", "0", b""))), ("/in", "", entries(("s", "2", "../../out"))), ("/link", "", entries((state, "0", b"")))):
                answer = live.ask("PUT", f"/containers/{name}/archive?path={path}{query}", data)
                seen.append((state, path, answer.status < 400))
            for path in ("/in", "/volume/.", "/link"):
                answer = live.ask("GET", f"/containers/{name}/archive?path={path}")
                with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(answer.body), errors="surrogateescape") as tar:
                    for entry in tar:
                        made = entry.isdir() and (entry.name in ("in", "in/new", ".")) or entry.name == "link"
                        if entry.name == ".":
                            # The volume's own folder is nerdctl's, which makes it 0700.
                            continue
                        seen.append((state, entry.name, entry.type, entry.mode & 0o7777, entry.uid, entry.gid, made or entry.mtime > 1e9 or entry.mtime, entry.size, entry.linkname,
                                     entry.pax_headers.get("SCHILY.xattr.security.capability")))
        return seen


class TestLivePlug:
    """The daemon is killed; what it started goes on."""

    @pytest.fixture
    def own(self, live, tmp_path_factory):
        found = []

        def start():
            found.append(Live(tmp_path_factory.mktemp("plug"), "--namespace", NAMESPACE))
            return found[-1]

        yield start
        for each in found:
            each.end()
        for each in live.ask("GET", "/containers/json?all=1").json:
            live.ask("DELETE", f"/containers/{each['Id']}?force=1")

    def test_containers_and_their_logs_outlive_it(self, own, client):
        first = own()
        first.text(client, "run", "-d", "--name", "tstplug", *QUIET, BASE, "sh", "-c", "i=0; while [ $i -lt 60 ]; do echo $i; i=$((i+1)); sleep 0.1; done")
        attached = subprocess.Popen([client, "-H", "unix://" + first.socket, "run", "--name", "tsttold", *QUIET, BASE, "sh", "-c",
                                     "i=0; while [ $i -lt 60 ]; do echo $i; i=$((i+1)); sleep 0.1; done"], stdin=subprocess.DEVNULL,
                                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert attached.stdout.readline() == b"0\n"
        first.process.kill()
        attached.wait(20)
        attached.stdout.close()
        second = own()
        for name in ("tstplug", "tsttold"):
            second.text(client, "wait", name)
            assert second.text(client, "logs", name) == "".join(f"{number}\n" for number in range(60))

    def test_input_for_what_another_started(self, own, client):
        first = own()
        first.text(client, "run", "-d", "-i", "--name", "tstinput", *QUIET, BASE, "sh", "-c", "read line; echo got $line; cat; sleep 1; exit 3")
        first.process.kill()
        first.process.wait(5)
        second = own()
        for data, told in ((b"it\n", b"got it\n"), (b"more\n", b"more\n")):
            with subprocess.Popen([client, "-H", "unix://" + second.socket, "attach", "tstinput"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as attached:
                attached.stdin.write(data)
                assert attached.stdout.readline() == told
                attached.kill()
        assert second.text(client, "ps", "-q", "--filter", "name=tstinput")

    def test_a_detached_terminal_is_attached_to_again_and_again(self, own, client):
        first = own()
        environment = {**os.environ, "DOCKER_HOST": "unix://" + first.socket, "TERM": "dumb"}
        first.text(client, "run", "-dit", "--name", "tstpty", *QUIET, BASE, "sh")
        for word in (b"on''e", b"tw''o"):
            _, seen = on_terminal([client, "attach", "tstpty"], [(b"", b"echo " + word + b"\n"), (word.replace(b"'", b"") + b"\r\n", b"\x10\x11")], environment)
            assert first.text(client, "ps", "-q", "--filter", "name=tstpty"), seen
        first.process.kill()
        first.process.wait(5)
        second = own()
        environment["DOCKER_HOST"] = "unix://" + second.socket
        status, seen = on_terminal([client, "attach", "tstpty"], [(b"", b"echo th''ird\n"), (b"third\r\n", b"stty size; exit 5\n")], environment)
        assert (status, second.text(client, "wait", "tstpty")) == (5, "5\n"), seen
        logged = second.text(client, "logs", "tstpty")
        assert all(word + "\r\n" in logged for word in ("one", "two", "third")) or all(word + "\n" in logged for word in ("one", "two", "third"))

    def test_rm_is_not_forgotten(self, own, client):
        first = own()
        first.text(client, "run", "-d", "--rm", "--name", "tstrm", *QUIET, BASE, "sleep", "2")
        first.text(client, "run", "-d", "--rm", "--name", "tstrmlater", *QUIET, BASE, "sleep", "4")
        first.process.kill()
        first.process.wait(5)
        time.sleep(2.5)
        second = own()
        assert until(lambda: "tstrm" not in second.text(client, "ps", "-a", "--format", "{{.Names}}"), 15)

    def test_health_goes_on(self, live_daemons, client, tmp_path_factory):
        """In a namespace of its own: of two daemons each would check. What the first has in the middle of a check goes, too."""
        namespace, quick = NAMESPACE + "-health", ("--health-interval", "1s", "--health-retries", "1")
        real("load", data=(STACK / "base.tar").read_bytes(), namespace=namespace)
        start = lambda: Live(tmp_path_factory.mktemp("plug"), "--namespace", namespace)
        daemon = start()
        health = lambda name: json.loads(daemon.text(client, "inspect", "-f", "{{json .State.Health}}", name))
        try:
            daemon.text(client, "run", "-d", "--name", "tstbad", *QUIET, "--health-cmd", "false", *quick, BASE, "sleep", "100")
            daemon.text(client, "run", "-d", "--name", "tsthang", *QUIET, "--health-cmd", "sleep 1000", *quick, BASE, "sleep", "100")
            folder = pathlib.Path(os.path.dirname(daemon.text(client, "inspect", "-f", "{{.LogPath}}", "tsthang").strip()))
            left = until(lambda: list(folder.glob(nerdctld.FIFO_FOLDER + "*")), 20)
            assert left and until(lambda: health("tstbad")["Status"] == "unhealthy", 20)
            daemon.process.kill()
            daemon.process.wait(5)
            daemon = start()
            before = health("tstbad")
            assert before["Status"] == "unhealthy" and until(lambda: health("tstbad")["FailingStreak"] > before["FailingStreak"], 20)
            assert until(lambda: not left[0].exists(), 20)
            gone = nerdctld.exec_name(str(left[0]))
            with pytest.raises(nerdctld.NotFound):
                nerdctld.Containerd("", namespace).delete_exec(folder.name, gone)
        finally:
            for each in daemon.ask("GET", "/containers/json?all=1").json:
                daemon.ask("DELETE", f"/containers/{each['Id']}?force=1")
            daemon.end()
            real("rmi", "-f", *real("images", "--format", "{{.Name}}", namespace=namespace).stdout.decode().split(), namespace=namespace)
            real("namespace", "rm", namespace)


COMPOSE = """
services:
  db:
    image: %s
    command: ["sh", "-c", "echo up > /data/x; sleep 300"]
    stop_grace_period: 0s
    healthcheck: {test: ["CMD", "test", "-f", "/data/x"], interval: 1s, retries: 10}
    volumes: ["data:/data"]
    hostname: tstcmphost
    networks: {back: {aliases: [db.internal]}}
  web:
    image: %s
    command: ["sh", "-c", "for each in db db.internal data tstcmphost; do ping -c1 $$each >/dev/null && echo found $$each; done; sleep 300"]
    stop_grace_period: 0s
    links: ["db:data"]
    depends_on: {db: {condition: service_healthy}}
    networks: [back, front]
volumes: {data: {}}
networks: {back: {}, front: {}}
""" % (BASE, BASE)


class TestLiveCompose:
    def test_project(self, live, tmp_path):
        if subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=20).returncode:
            pytest.skip("no docker compose")
        (tmp_path / "compose.yaml").write_text(COMPOSE)
        compose = lambda *words: live.docker("docker", "compose", "-p", "tstcmp", "-f", str(tmp_path / "compose.yaml"), *words, timeout=90)
        try:
            done = compose("up", "-d")
            assert done.returncode == 0, done.stderr.decode()
            again = compose("up", "-d")
            assert again.returncode == 0 and b"Recreate" not in again.stderr
            assert b"healthy" in compose("ps").stdout
            assert until(lambda: compose("logs", "--no-log-prefix", "web").stdout.split() == b"found db found db.internal found data found tstcmphost".split())
            assert compose("exec", "-T", "db", "cat", "/data/x").stdout == b"up\n"
            assert compose("run", "--rm", "--no-deps", "web", "echo", "ran").stdout == b"ran\n"
            assert compose("restart", "db").returncode == 0
            for name in ("db", "db.internal", "data"):
                assert until(lambda: compose("exec", "-T", "web", "ping", "-c1", "-w1", name).returncode == 0), name
        finally:
            done = compose("down", "-v")
        assert done.returncode == 0 and live.ask("GET", "/containers/json?all=1").json == []


class TestLiveDockerPy:
    def test_containers(self, live):
        python = pathlib.Path(os.environ.get("NERDCTLD_STACK_CACHE") or "/var/cache/nerdctld-stack") / "python/bin/python"
        if not python.exists() or subprocess.run([python, "-c", "import docker"], capture_output=True, timeout=30).returncode:
            pytest.skip("no docker-py")
        script = """
import docker, io, socket, sys, tarfile
client = docker.DockerClient(base_url=sys.argv[1], timeout=60)
image = sys.argv[2]
assert client.containers.run(image, ["echo", "hi"], remove=True, network_mode="none") == b"hi\\n"
box = client.containers.run(image, ["sleep", "100"], detach=True, network_mode="none")
try:
    assert box.exec_run(["sh", "-c", "echo o; echo e >&2; exit 4"], demux=True) == (4, (b"o\\n", b"e\\n"))
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        entry = tarfile.TarInfo("f"); entry.size = 3; tar.addfile(entry, io.BytesIO(b"abc"))
    assert box.put_archive("/tmp", data.getvalue())
    stream, told = box.get_archive("/tmp/f")
    assert told["name"] == "f" and tarfile.open(fileobj=io.BytesIO(b"".join(stream))).extractfile("f").read() == b"abc"
    assert box.stats(stream=False)["memory_stats"]["usage"] > 0
finally:
    box.remove(force=True)
box = client.containers.create(image, ["sh", "-c", "read line; echo got $line; exit 2"], stdin_open=True, network_mode="none")
sock = box.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
box.start()
sock._sock.sendall(b"word\\n")
assert b"got word" in b"".join(iter(lambda: sock._sock.recv(4096), b""))
assert box.wait()["StatusCode"] == 2 and box.logs() == b"got word\\n"
box.remove()
"""
        done = subprocess.run([python, "-c", script, "unix://" + live.socket, BASE], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


CACHE = pathlib.Path(os.environ.get("NERDCTLD_STACK_CACHE") or "/var/cache/nerdctld-stack")


def python_with(module):
    """The stack's Python, which has this module."""
    python = CACHE / "python/bin/python"
    if not python.exists() or subprocess.run([python, "-c", "import " + module], capture_output=True, timeout=30).returncode:
        pytest.skip(f"no {module} for Python: .ci/stack up --clients installs it")
    return str(python)


def node_with(module):
    """node, and the environment in which it finds this module."""
    modules = CACHE / "node/node_modules"
    if not shutil.which("node") or not (modules / module).is_dir():
        pytest.skip(f"no {module} for Node: .ci/stack up --clients installs it")
    return "node", {"NODE_PATH": str(modules)}


# Stands in for ryuk: it takes the filters of what is to be reaped, one a line, notes them in its log and acknowledges each.
REAPER = "tstlive/reaper:1"
REAPER_DOCKERFILE = f"""FROM {BASE}
RUN printf '#!/bin/sh\\nwhile read line; do echo "$line" >&2; echo ACK; done\\n' >/ack && chmod +x /ack
EXPOSE 8080
CMD ["sh", "-c", "echo 'Reaper Started!'; exec nc -ll -p 8080 -e /ack"]
"""

TESTCONTAINERS_PYTHON = '''
import json, os, pathlib, signal, sys, tempfile, urllib.request
from testcontainers.core.container import DockerContainer, Reaper
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.image import DockerImage
from testcontainers.core.labels import SESSION_ID
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import (
    CompositeWaitStrategy, ExecWaitStrategy, HealthcheckWaitStrategy, HttpWaitStrategy, LogMessageWaitStrategy, PortWaitStrategy)

image = sys.argv[1]
fetch = lambda box, port: urllib.request.urlopen(f"http://{box.get_container_host_ip()}:{box.get_exposed_port(port)}/", timeout=10).read()
web = ["sh", "-c", "mkdir /www; echo served >/www/index.html; echo up; echo and running >&2; exec httpd -f -p 8000 -h /www"]
every = CompositeWaitStrategy(LogMessageWaitStrategy("^up$"), PortWaitStrategy(8000), HttpWaitStrategy(8000), ExecWaitStrategy(["test", "-d", "/www"]),
                              HealthcheckWaitStrategy())
health = {"test": ["CMD", "test", "-f", "/www/index.html"], "interval": 10**9, "retries": 9}
box = DockerContainer(image, command=web, healthcheck=health).with_exposed_ports(8000).with_env("A", "b")
with box.with_copy_into_container(b"copied", "/in/file").waiting_for(every):
    assert fetch(box, 8000) == b"served\\n"
    done = box.exec(["sh", "-c", "echo $A; echo e >&2; exit 3"])
    assert (done.exit_code, sorted(done.output.split())) == (3, [b"b", b"e"])
    assert box.exec("nosuch").exit_code in (126, 127)
    assert box.get_logs() == (b"up\\n", b"and running\\n")
    assert box.exec("cat /in/file").output == b"copied"
    with tempfile.TemporaryDirectory() as folder:
        box.copy_from_container("/www/index.html", pathlib.Path(folder) / "f")
        assert (pathlib.Path(folder) / "f").read_text() == "served\\n"
    assert box.status == "running" and box.get_container_info().Config.Image == image
    box.get_wrapped_container().stop(timeout=0)
    box.reload()
    assert box.status == "exited"
with Network() as network, DockerContainer(image, command=web).with_network(network).with_network_aliases("web").waiting_for(LogMessageWaitStrategy("up")):
    with DockerContainer(image, command=["wget", "-qO-", "http://web:8000/"]).with_network(network) as box:
        assert box.wait() == 0 and box.get_logs()[0] == b"served\\n", box.get_logs()
with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / "Dockerfile").write_text(f"FROM {image}\\nRUN echo made >/made\\nCMD cat /made\\n")
    with DockerImage(folder, tag="tstlive/tcbuilt:1") as built, DockerContainer(str(built)) as box:
        assert box.wait() == 0 and box.get_logs() == (b"made\\n", b"")
        assert any("made" in (each.get("stream") or "") for each in built.get_logs()), built.get_logs()
client = DockerClient().client
assert client.containers.list(all=True, filters={"label": f"org.testcontainers.session-id={SESSION_ID}"}) == []
client.containers.get(Reaper._container.get_container_id())
left = [DockerContainer(image, command=["sleep", "1000"]).start() for _ in range(2)]
Network().create()
client.volumes.create("tsttcvolume", labels={"org.testcontainers.session-id": SESSION_ID})
print(SESSION_ID, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
'''

TESTCONTAINERS_NODE = r'''
const { DockerComposeEnvironment, GenericContainer, Network, Wait } = require("testcontainers");
const assert = require("assert"), fs = require("fs"), os = require("os"), path = require("path");
const image = process.argv.at(-1);
const text = async (stream, wanted) => { let seen = ""; for await (const data of stream) { seen += data; if (wanted && seen.includes(wanted)) break; } return seen; };
const web = ["sh", "-c", "mkdir /www; echo served >/www/index.html; echo up; exec httpd -f -p 8000 -h /www"];
// The sockets of its streams do not keep node alive.
setInterval(() => {}, 1000);
(async () => {
  const every = Wait.forAll([Wait.forLogMessage("up"), Wait.forListeningPorts(), Wait.forHttp("/", 8000), Wait.forHealthCheck(), Wait.forSuccessfulCommand("test -d /www")]);
  let box = await new GenericContainer(image).withCommand(web).withExposedPorts(8000).withEnvironment({ A: "b" })
    .withHealthCheck({ test: ["CMD", "test", "-f", "/www/index.html"], interval: 1000, retries: 9 })
    .withCopyContentToContainer([{ content: "copied", target: "/in/file" }]).withWaitStrategy(every).start();
  assert.equal(await (await fetch(`http://${box.getHost()}:${box.getMappedPort(8000)}/`)).text(), "served\n");
  const done = await box.exec(["sh", "-c", "echo $A; echo e >&2; exit 3"]);
  assert.deepEqual([done.exitCode, done.stdout, done.stderr], [3, "b\n", "e\n"]);
  assert.equal((await box.exec(["cat", "/in/file"])).output, "copied");
  assert.match(await text(await box.logs(), "up\n"), /^up\n/);
  await box.copyContentToContainer([{ content: "later", target: "/tmp/later" }]);
  assert.match(await text(await box.copyArchiveFromContainer("/tmp/later")), /later/);
  assert.match(await box.commit({ repo: "tstlive/tccommit", tag: "1", deleteOnExit: false }), /^sha256:/);
  await box.restart();
  assert.equal((await box.exec(["cat", "/tmp/later"])).output, "later");
  await box.stop();
  const network = await new Network().start();
  box = await new GenericContainer(image).withCommand(web).withNetwork(network).withNetworkAliases("web").withWaitStrategy(Wait.forLogMessage("up")).start();
  const other = await new GenericContainer(image).withCommand(["sleep", "1000"]).withNetwork(network).start();
  assert.equal((await other.exec(["wget", "-qO-", "http://web:8000/"])).output, "served\n");
  await other.stop(); await box.stop(); await network.stop();
  const once = await new GenericContainer(image).withCommand(["sh", "-c", "echo once"]).withWaitStrategy(Wait.forOneShotStartup()).start();
  await once.stop();
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "tc"));
  fs.writeFileSync(path.join(folder, "Dockerfile"), `FROM ${image}\nARG X\nRUN echo made $X >/made\nCMD cat /made; sleep 1000\n`);
  const built = await GenericContainer.fromDockerfile(folder).withBuildArgs({ X: "well" }).build("tstlive/tcnode:1");
  box = await built.withWaitStrategy(Wait.forLogMessage("made well")).start();
  await box.stop();
  await assert.rejects(new GenericContainer("tstlive/nosuch:1").start());
  const reused = () => new GenericContainer(image).withCommand(["sleep", "1001"]).withReuse().start();
  box = await reused();
  assert.equal((await reused()).getId(), box.getId());
  await box.stop();
  fs.writeFileSync(path.join(folder, "compose.yaml"), `services: {one: {image: "${image}", command: sh -c "echo composed; sleep 1000", stop_grace_period: 0s}}`);
  const project = await new DockerComposeEnvironment(folder, "compose.yaml").withWaitStrategy("one-1", Wait.forLogMessage("composed")).up();
  await project.down();
  box = await new GenericContainer(image).withCommand(["sleep", "1000"]).start();
  await new Network().start();
  console.log(box.getLabels()["org.testcontainers.session-id"]);
  process.kill(process.pid, "SIGKILL");
})().catch((error) => { console.error(error); process.exit(1); });
'''


class TestLiveTestcontainers:
    @pytest.fixture
    def reaper(self, building, tmp_path):
        """Environment of a testcontainers with a reaper; whatever it leaves is removed."""
        answer = building.ask("POST", "/build?t=" + REAPER, body=tar_of(("Dockerfile", REAPER_DOCKERFILE.encode())), headers=TAR)
        assert b"Successfully tagged" in answer.body, answer.body
        yield {**os.environ, "DOCKER_HOST": "unix://" + building.socket, "HOME": str(tmp_path), "RYUK_CONTAINER_IMAGE": REAPER, "TC_POOLING_INTERVAL": "0.2"}
        label = filtered(label=["org.testcontainers.session-id"])
        for box in building.ask("GET", "/containers/json?all=1&" + label).json + self.reapers(building):
            building.ask("DELETE", f"/containers/{box['Id']}?force=1&v=1")
        for network in building.ask("GET", "/networks?" + label).json:
            building.ask("DELETE", f"/networks/{network['Id']}")

    @staticmethod
    def reapers(building):
        return building.ask("GET", "/containers/json?" + filtered(ancestor=[REAPER])).json

    def is_reaped(self, command, building, environment):
        """Does what ryuk does when the client that told it a filter has gone; what was left, by kinds."""
        done = subprocess.run([*command, BASE], capture_output=True, text=True, timeout=150, env=environment)
        assert done.returncode == -signal.SIGKILL, done.stderr
        told = "org.testcontainers.session-id=" + done.stdout.strip()
        (keeper,) = [each for each in self.reapers(building) if done.stdout.strip() in each["Names"][0]]
        assert f"label={told}\r\n".encode() in building.ask("GET", f"/containers/{keeper['Id']}/logs?stderr=1").body
        label = filtered(label=[told])
        found = {"containers": building.ask("GET", "/v1.44/containers/json?all=1&" + label).json, "networks": building.ask("GET", "/v1.44/networks?" + label).json,
                 "volumes": building.ask("GET", "/v1.44/volumes?" + label).json["Volumes"]}
        for kind, each in [(kind, each) for kind, rows in found.items() for each in rows]:
            query = {"containers": "?force=1&v=1", "networks": "", "volumes": "?force=1"}[kind]
            assert building.ask("DELETE", f"/v1.44/{kind}/{each.get('Id') or each['Name']}{query}").status == 204
        assert building.ask("GET", "/containers/json?all=1&" + label).json == building.ask("GET", "/networks?" + label).json == []
        return {kind: len([each for each in rows if each.get("Image") != REAPER]) for kind, rows in found.items()}

    def test_python(self, building, reaper, tmp_path):
        (tmp_path / "client.py").write_text(TESTCONTAINERS_PYTHON)
        command = [python_with("testcontainers"), str(tmp_path / "client.py")]
        assert self.is_reaped(command, building, reaper) == {"containers": 2, "networks": 1, "volumes": 1}

    def test_a_reaper_ends_with_its_client(self, building, reaper):
        script = "import sys\nfrom testcontainers.core.container import DockerContainer\nwith DockerContainer(sys.argv[1], command=['true']) as box: assert box.wait() == 0"
        done = subprocess.run([python_with("testcontainers"), "-c", script, BASE], capture_output=True, text=True, timeout=100, env=reaper)
        assert done.returncode == 0, done.stderr
        assert until(lambda: self.reapers(building) == [])

    def test_node(self, building, reaper, tmp_path):
        node, environment = node_with("testcontainers")
        (tmp_path / "client.js").write_text(TESTCONTAINERS_NODE)
        assert self.is_reaped([node, str(tmp_path / "client.js")], building, {**reaper, **environment}) == {"containers": 1, "networks": 1, "volumes": 0}


DOCKERODE = r'''
const Docker = require("dockerode"), assert = require("assert"), { PassThrough } = require("stream"), tar = require("tar-stream");
const fs = require("fs"), os = require("os"), path = require("path");
const [image, registry] = process.argv.slice(-2);
const docker = new Docker(), QUIET = { HostConfig: { NetworkMode: "none" } };
const sink = () => { const stream = new PassThrough(), parts = []; stream.on("data", (data) => parts.push(data)); stream.text = () => Buffer.concat(parts).toString(); return stream; };
const ended = (stream) => new Promise((resolve, reject) => stream.on("end", resolve).on("close", resolve).on("error", reject));
const progress = (stream) => new Promise((resolve, reject) => docker.modem.followProgress(stream, (error, rows) => error ? reject(error) : resolve(rows)));
const split = async (stream) => { const out = sink(), err = sink(); docker.modem.demuxStream(stream, out, err); await ended(stream); return [out.text(), err.text()]; };
const packed = (files) => { const pack = tar.pack(); for (const name in files) pack.entry({ name }, files[name]); pack.finalize(); return pack; };
const buffered = async (stream) => { const parts = []; for await (const data of stream) parts.push(data); return Buffer.concat(parts); };
const fails = (promise, code) => assert.rejects(promise, (error) => { assert.equal(error.statusCode, code, error.message); assert(error.message.length > 30); return true; });
(async () => {
  const out = sink(), err = sink();
  let [told, box] = await docker.run(image, ["sh", "-c", "echo out; echo err >&2; exit 3"], [out, err], { Tty: false, ...QUIET });
  assert.deepEqual([told.StatusCode, out.text(), err.text()], [3, "out\n", "err\n"]);
  await box.remove();
  const screen = sink();
  [told, box] = await docker.run(image, ["sh", "-c", "test -t 1 && echo terminal"], screen, { Tty: true, ...QUIET });
  assert.deepEqual([told.StatusCode, screen.text()], [0, "terminal\r\n"]);
  await box.remove();

  // events
  const events = await docker.getEvents({ filters: { type: ["container"], label: ["dd"] } }), seen = [];
  events.on("data", (data) => data.toString().trim().split("\n").forEach((line) => seen.push(JSON.parse(line).Action)));

  // attach
  box = await docker.createContainer({ Image: image, Cmd: ["sh", "-c", "cat; echo at end >&2; exit 7"], OpenStdin: true, StdinOnce: true, AttachStdin: true, Labels: { dd: "1" }, ...QUIET });
  let stream = await box.attach({ stream: true, stdin: true, stdout: true, stderr: true, hijack: true });
  await box.start();
  const waited = box.wait();
  stream.write("first ");
  stream.end("last");
  assert.deepEqual(await split(stream), ["first last", "at end\n"]);
  assert.equal((await waited).StatusCode, 7);
  assert.deepEqual(await split(await box.logs({ follow: true, stdout: true, stderr: true })), ["first last", "at end\n"]);
  await box.remove();

  // exec
  box = await docker.createContainer({ Image: image, name: "tstdd", Cmd: ["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done"], Labels: { dd: "1" }, ...QUIET });
  await box.start();
  const run = async (options, start, input) => {
    const exec = await box.exec({ AttachStdout: true, AttachStderr: true, ...options });
    const stream = await exec.start(start);
    if (input) stream.end(input);
    const said = options.Tty ? [(await buffered(stream)).toString()] : await split(stream);
    return [(await exec.inspect()).ExitCode, ...said];
  };
  assert.deepEqual(await run({ Cmd: ["sh", "-c", "echo o; echo e >&2; exit 4"] }, {}), [4, "o\n", "e\n"]);
  assert.deepEqual(await run({ Cmd: ["cat"], AttachStdin: true }, { hijack: true, stdin: true }, "x".repeat(200000)), [0, "x".repeat(200000), ""]);
  assert.deepEqual(await run({ Cmd: ["sh", "-c", "tty; stty size"], Tty: true, ConsoleSize: [33, 99] }, { Tty: true, ConsoleSize: [33, 99] }), [0, "/dev/pts/0\r\n33 99\r\n"]);

  // logs
  stream = await box.logs({ follow: true, stdout: true, tail: 1, timestamps: true });
  const lines = sink();
  docker.modem.demuxStream(stream, lines, lines);
  while (lines.text().split("\n").length < 5) await new Promise((done) => setTimeout(done, 50));
  stream.destroy();
  assert.match(lines.text(), /^\d{4}-\d\d-\d\dT\S+Z \d+\n/);
  assert((await box.logs({ stdout: true, tail: 2 })).length >= 2 * 9);

  // archive
  await box.putArchive(await buffered(packed({ "dir/file": "content", "dir/other": "x".repeat(100000) })), { path: "/tmp" });
  await box.putArchive(packed({ "streamed": "too" }), { path: "/tmp" });
  const names = [], extract = tar.extract();
  extract.on("entry", (header, content, next) => { names.push(header.name.replace(/\/$/, "")); content.on("end", next).resume(); });
  (await box.getArchive({ path: "/tmp/dir" })).pipe(extract);
  await new Promise((done) => extract.on("finish", done));
  assert.deepEqual(names.sort(), ["dir", "dir/file", "dir/other"]);
  const head = await box.infoArchive({ path: "/tmp/dir/file" });
  head.resume();
  const stat = JSON.parse(Buffer.from(head.headers["x-docker-container-path-stat"], "base64"));
  assert.deepEqual([stat.name, stat.size], ["file", 7]);

  // life
  assert((await box.stats({ stream: false })).memory_stats.usage > 0);
  assert((await box.top({ ps_args: "-o pid,args" })).Processes.length >= 1);
  assert((await box.changes()).some((each) => each.Path === "/tmp/dir/file"));
  await box.pause();
  assert.equal((await box.inspect()).State.Status, "paused");
  await box.unpause();
  await box.rename({ name: "tstdd2" });
  await box.update({ PidsLimit: 100 });
  await box.restart({ t: 0 });
  assert.equal((await docker.listContainers({ filters: { label: ["dd=1"], status: ["running"] } }))[0].Names[0], "/tstdd2");

  // errors
  await fails(docker.getContainer("nosuch").inspect(), 404);
  await assert.rejects(docker.getContainer("nosuch").attach({ stream: true, stdout: true }), (error) => error.statusCode === 404);
  await fails(docker.getImage("nosuch:1").inspect(), 404);
  await fails(docker.getImage("nosuch:1").remove(), 404);
  await fails(docker.getExec("nosuch").inspect(), 404);
  await fails(docker.getNetwork("nosuch").inspect(), 404);
  await fails(docker.getVolume("nosuch").inspect(), 404);
  await fails(docker.createContainer({ Image: "tstlive/nosuch:1" }), 404);
  await fails(docker.createContainer({ Image: image, name: "tstdd2", ...QUIET }), 409);
  await fails(box.remove(), 409);
  await fails(box.getArchive({ path: "/nosuch" }), 404);
  await fails(docker.createContainer({ Image: image, HostConfig: { Memory: -5 } }), 400);
  await assert.rejects(box.start(), (error) => error.statusCode === 304);
  await box.remove({ force: true, v: true });

  // images
  const name = `${registry}/tstlive/dockerode`;
  let rows = await progress(await docker.buildImage(packed({ Dockerfile: `FROM ${image}\nARG A\nCOPY f /f\nRUN echo $A >/a\nCMD cat /a /f\n`, f: "copied\n" }), { t: name + ":1", buildargs: { A: "b" } }));
  assert(rows.some((row) => /Successfully tagged/.test(row.stream)));
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "dd"));
  fs.writeFileSync(path.join(folder, "Dockerfile"), `FROM ${name}:1\nRUN exit 9\n`);
  rows = await progress(await docker.buildImage({ context: folder, src: ["Dockerfile"] }, { t: "tstlive/no:1" }));
  assert.match(rows.at(-1).errorDetail.message, /9$/);
  rows = await progress(await docker.getImage(name + ":1").push());
  assert(rows.some((row) => row.aux && /^sha256:/.test(row.aux.Digest)));
  await docker.getImage(name + ":1").remove();
  rows = await progress(await docker.pull(name + ":1"));
  assert.match(rows.at(-1).status, /^Status: /);
  const output = sink();
  [told, box] = await docker.run(name + ":1", [], output, QUIET);
  await box.remove();
  assert.equal(told.StatusCode, 0);
  const noise = `${registry}/tstlive/ddnoise:1`;
  await progress(await docker.importImage(packed({ noise: require("crypto").randomBytes(30 << 20) }), { repo: noise.slice(0, -2), tag: "1" }));
  rows = await progress(await docker.getImage(noise).push());
  assert(rows.some((row) => row.progressDetail && row.progressDetail.total > 3e7), JSON.stringify(rows));
  await docker.getImage(noise).remove();
  rows = await progress(await docker.pull(noise));
  assert(rows.some((row) => row.status === "Pull complete" && row.id.length === 12), JSON.stringify(rows));
  await docker.getImage(noise).remove();
  await assert.rejects(docker.pull(`${registry}/tstlive/nosuch:1`), (error) => error.statusCode === 404);
  assert.match((await docker.getImage(name + ":1").distribution()).Descriptor.digest, /^sha256:/);
  const saved = await buffered(await docker.getImage(name + ":1").get());
  await docker.getImage(name + ":1").tag({ repo: "tstlive/dd", tag: "2" });
  rows = await docker.getImage("tstlive/dd:2").remove();
  assert.deepEqual(rows, [{ Untagged: "tstlive/dd:2" }]);
  assert((await docker.getImage(name + ":1").history()).length >= 3);
  rows = await progress(await docker.loadImage(require("stream").Readable.from([saved])));
  assert(rows.some((row) => (row.stream || "").includes(`Loaded image: ${name}:1`)));
  assert.equal((await docker.checkAuth({ username: "u", password: "p", serveraddress: registry })).Status, "Login Succeeded");

  // others
  const network = await docker.createNetwork({ Name: "tstddnet", CheckDuplicate: true, Labels: { dd: "1" } });
  await fails(docker.createNetwork({ Name: "tstddnet", CheckDuplicate: true }), 409);
  assert.equal((await docker.listNetworks({ filters: { label: ["dd"] } }))[0].Id, network.id);
  await network.remove();
  const volume = await docker.createVolume({ Name: "tstddvol", Labels: { dd: "1" } });
  assert.equal((await docker.listVolumes({ filters: { label: ["dd"] } })).Volumes.length, 1);
  await (await docker.getVolume("tstddvol")).remove();
  assert.deepEqual((await docker.pruneContainers({ filters: { label: ["dd"] } })).ContainersDeleted || [], []);
  assert((await docker.df()).Images.length);
  assert.equal((await docker.ping()).toString(), "OK");
  assert.equal((await docker.info()).OSType, "linux");
  assert.equal((await docker.version()).ApiVersion, "1.56");
  for (const each of ["create", "attach", "start", "die", "destroy", "exec_die", "pause", "rename", "restart", "kill", "extract-to-dir"]) assert(seen.some((one) => one.startsWith(each)), `${each} is not in ${seen}`);
  events.destroy();
})().catch((error) => { console.error(error); process.exit(1); });
'''


class TestLiveDockerode:
    def test_all_of_it(self, building, tmp_path):
        node, environment = node_with("dockerode")
        (tmp_path / "client.js").write_text(DOCKERODE)
        environment = {**os.environ, **environment, "DOCKER_HOST": "unix://" + building.socket}
        try:
            done = subprocess.run([node, str(tmp_path / "client.js"), BASE, REGISTRY], capture_output=True, text=True, timeout=150, env=environment)
            assert done.returncode == 0, done.stderr
        finally:
            for box in building.ask("GET", "/containers/json?all=1&" + filtered(label=["dd"])).json:
                building.ask("DELETE", f"/containers/{box['Id']}?force=1&v=1")


@pytest.fixture
def cli(building, tmp_path):
    """Function of (configuration, files) that makes a workspace; it returns a function that runs the CLI there."""
    _, environment = node_with("@devcontainers")
    environment = {**os.environ, **environment, "DOCKER_HOST": "unix://" + building.socket}
    workspace = tmp_path / "tstwork"

    def run(*words, status=0):
        done = subprocess.run([CACHE / "node/node_modules/.bin/devcontainer", words[0], "--workspace-folder", str(workspace), *words[1:]],
                              capture_output=True, text=True, timeout=150, env=environment, stdin=subprocess.DEVNULL)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def make(configuration, **files):
        (workspace / ".devcontainer").mkdir(parents=True)
        (workspace / "file").write_text("of the workspace\n")
        for name, text in {"devcontainer.json": json.dumps(configuration), **files}.items():
            (workspace / ".devcontainer" / name).write_text(text)
        return run
    try:
        yield make
    finally:
        for box in building.ask("GET", "/containers/json?all=1").json:
            if any(str(workspace) in value for value in box["Labels"].values()):
                building.ask("DELETE", f"/containers/{box['Id']}?force=1&v=1")
        building.ask("DELETE", "/volumes/tstdevdata")
        building.ask("DELETE", "/networks/tstwork_devcontainer_default")
        for image in building.ask("GET", "/images/json").json:
            for name in image["RepoTags"] or ():
                if name.startswith(("vsc-tstwork", "tstwork_")):
                    building.ask("DELETE", f"/images/{name}?force=1")


class TestLiveDevContainers:
    """The devcontainers CLI: `up` and `exec` on an image, a Dockerfile and a compose project."""

    def test_image(self, cli):
        run = cli({"image": BASE, "remoteUser": "root", "containerEnv": {"A": "b"}, "postCreateCommand": "echo created >/tmp/made", "runArgs": ["--network=none"]})
        first = json.loads(run("up"))
        assert first["outcome"] == "success" and first["remoteWorkspaceFolder"] == "/workspaces/tstwork"
        assert json.loads(run("up"))["containerId"] == first["containerId"]
        assert run("exec", "sh", "-c", "cat /workspaces/tstwork/file /tmp/made; echo $A; exit 3", status=3) == "of the workspace\ncreated\nb\n"
        assert json.loads(run("up", "--remove-existing-container"))["containerId"] != first["containerId"]

    def test_dockerfile(self, cli, building):
        run = cli({"build": {"dockerfile": "Dockerfile", "args": {"WHAT": "it"}}, "remoteUser": "user", "postStartCommand": "echo started >/tmp/started",
                   "mounts": ["type=volume,source=tstdevdata,target=/data"]}, Dockerfile=f"FROM {BASE}\nARG WHAT\nRUN echo built $WHAT >/built\n")
        made = json.loads(run("up"))["containerId"]
        assert run("exec", "sh", "-c", "cat /built /tmp/started; id -un; exit 4", status=4) == "built it\nstarted\nuser\n"
        mounts = {each["Destination"]: each for each in building.ask("GET", f"/containers/{made}/json").json["Mounts"]}
        assert mounts["/data"]["Name"] == "tstdevdata" and mounts["/workspaces/tstwork"]["Type"] == "bind"

    def test_compose(self, cli):
        if subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=20).returncode:
            pytest.skip("no docker compose")
        run = cli({"dockerComposeFile": "compose.yml", "service": "dev", "workspaceFolder": "/work", "remoteUser": "root"}, **{"compose.yml": json.dumps({"services": {
            "dev": {"image": BASE, "command": "sleep 900", "volumes": ["..:/work"], "depends_on": ["other"]}, "other": {"image": BASE, "command": "sleep 900", "hostname": "other"}}})})
        assert json.loads(run("up"))["composeProjectName"] == "tstwork_devcontainer"
        assert run("exec", "sh", "-c", "cat /work/file; ping -c 1 -w 5 other >/dev/null && echo reached") == "of the workspace\nreached\n"


class TestLiveRootless:
    def test_an_ordinary_user(self, tmp_path):
        import pwd

        try:
            user = pwd.getpwnam("nerdctld-test")
        except KeyError:
            pytest.skip("no user nerdctld-test: .ci/stack up --rootless makes one")
        runtime = f"/run/user/{user.pw_uid}"
        python = next((each for each in (sys.executable, "/usr/bin/python3") if subprocess.run(
            ["setpriv", "--reuid", user.pw_name, "--clear-groups", each, "-c", ""], capture_output=True, timeout=20).returncode == 0), "")
        if os.geteuid() or not python or not os.path.exists(runtime + "/containerd-rootless/child_pid") or why_not_live():
            pytest.skip("no rootless containerd: .ci/stack up --rootless starts one")
        shutil.copy(HERE / "nerdctld.py", "/tmp/nerdctld-rootless.py")
        environment = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "HOME": user.pw_dir, "XDG_RUNTIME_DIR": runtime, "USER": user.pw_name}
        command = ["setpriv", "--reuid", user.pw_name, "--regid", str(user.pw_gid), "--init-groups", python, "/tmp/nerdctld-rootless.py"]
        process = subprocess.Popen(command, env=environment, cwd="/", stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        docker = lambda *words, **options: subprocess.run(["docker", "-H", f"unix://{runtime}/nerdctl.sock", *words], capture_output=True, timeout=90,
                                                          env={**os.environ, "DOCKER_BUILDKIT": "0"}, **options)
        try:
            assert until(lambda: docker("version").returncode == 0, 20)
            assert BASE.encode() in docker("images", "--format", "{{.Repository}}:{{.Tag}}").stdout
            assert docker("run", "--rm", BASE, "echo", "hi").stdout == b"hi\n"
            assert docker("run", "-i", "--name", "tstin", BASE, "cat", input=b"in").stdout == b"in"
            assert docker("start", "-ai", "tstin", input=b"again").stdout == b"again"
            docker("rm", "tstin")
            done = docker("build", "-t", "tstrootless:1", "-", input=f"FROM {BASE}\nRUN echo made > /made\nCMD cat /made".encode())
            assert done.returncode == 0, done.stderr
            assert docker("run", "--rm", "tstrootless:1").stdout == b"made\n"
            assert docker("save", "tstrootless:1").stdout[257:262] == b"ustar"
            assert docker("rmi", "tstrootless:1").returncode == 0
            for name, subnet in (("tstone", "10.205.0.0/24"), ("tsttwo", "10.205.1.0/24")):
                assert docker("network", "create", "--subnet", subnet, name).returncode == 0
                assert docker("run", "-d", "--name", name, "--network", name, BASE, "sleep", "300").returncode == 0
            for _ in range(2):
                done = docker("network", "connect", "tsttwo", "tstone")
                assert done.returncode == 0, done.stderr
                for source, other in (("tstone", "tsttwo"), ("tsttwo", "tstone")):
                    assert b"1 packets received" in docker("exec", source, "ping", "-c", "1", "-W", "3", other).stdout
                done = docker("network", "disconnect", "tsttwo", "tstone")
                assert done.returncode == 0 and b"bad address" in docker("exec", "tstone", "ping", "-c", "1", "tsttwo").stderr, done.stderr
            assert "name=rootless" in docker("info", "--format", "{{.SecurityOptions}}").stdout.decode()
        finally:
            docker("rm", "-f", "tstone", "tsttwo")
            docker("network", "rm", "tstone", "tsttwo")
            process.terminate()
            process.wait(20)
            os.unlink("/tmp/nerdctld-rootless.py")


@pytest.fixture(scope="class")
def big(live_daemons, tmp_path_factory):
    """An archive of 200 MB that does not compress, and the name of its image."""
    path = tmp_path_factory.mktemp("big") / "big.tar"
    layer = tmp_path_factory.mktemp("layer") / "layer.tar"
    with tarfile.open(layer, "w") as archive:
        info = tarfile.TarInfo("noise")
        info.size = 200 << 20
        with open("/dev/urandom", "rb") as noise:
            archive.addfile(info, noise)
    digest = hashlib.sha256(layer.read_bytes()).hexdigest()
    config = json.dumps({"architecture": nerdctld.GO_ARCHITECTURES[os.uname().machine], "os": "linux", "config": {},
                         "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest]}}).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [BIG], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(path, "w") as archive:
        for name, content in (("manifest.json", manifest), ("config.json", config)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        archive.add(layer, "layer.tar")
    layer.unlink()
    yield path
    path.unlink()


class TestLiveLeaving:
    """A client that leaves in the middle leaves nothing behind."""

    def clean(self, live):
        """Wait until nothing but the feed of events runs, and no temporary file is left."""
        assert until(lambda: not [each for each in live.children() if " events " not in each], 15), live.children()
        folder = re.search(rb"TMPDIR=([^\0]*)", pathlib.Path(f"/proc/{live.process.pid}/environ").read_bytes()).group(1).decode()
        left = lambda: [name for path, _, files in os.walk(folder) for name in files if "/nerdctld-" in path]
        assert until(lambda: left() == []), left()

    def test_load(self, live, big):
        with live.connect() as sock, open(big, "rb") as archive:
            sock.sendall(b"POST /images/load HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % big.stat().st_size)
            for _ in range(400):
                sock.sendall(archive.read(1 << 18))
        self.clean(live)
        assert live.ask("GET", f"/images/{BIG}/json").status == 404
        assert b"big" not in real("images").stdout
        # What a killed nerdctl leaves of layer.tar would stand in the way.
        other = tar_of(("manifest.json", json.dumps([{"Config": "c.json", "RepoTags": ["tstlive/j:1"], "Layers": ["layer.tar"]}]).encode()),
                       ("c.json", json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [
                           "sha256:" + hashlib.sha256(CONTEXT).hexdigest()]}}).encode()), ("layer.tar", CONTEXT))
        # containerd tidies up a second later.
        assert until(lambda: b"Loaded image: tstlive/j:1" in live.ask("POST", "/images/load?quiet=1", body=other).body)
        assert live.ask("DELETE", "/images/tstlive/j:1").status == 200

    def test_save_push_and_pull(self, live, big, real_registry):
        with open(big, "rb") as archive:
            answer = live.ask("POST", "/images/load?quiet=1", body=archive, headers={"Content-Length": str(big.stat().st_size)})
        assert f"Loaded image: {BIG}".encode() in answer.body
        tag, name = BIG.rpartition(":")[2], "/images/" + BIG.rpartition(":")[0]
        with live.connect() as sock:
            sock.sendall(b"GET /images/%b/get HTTP/1.1\r\nHost: x\r\n\r\n" % BIG.encode())
            for _ in range(50):
                sock.recv(1 << 20)
        self.clean(live)
        with live.connect() as sock:
            sock.sendall(b"POST %b/push?tag=%b HTTP/1.1\r\nHost: x\r\n\r\n" % (name.encode(), tag.encode()))
            sock.recv(1000)
            time.sleep(0.2)
        self.clean(live)
        assert live.ask("GET", f"/distribution/{BIG}/json").status in (404, 500), "half of it was pushed under its name"
        assert b'"error"' not in live.ask("POST", f"{name}/push?tag={tag}").body
        assert live.ask("DELETE", f"/images/{BIG}").status == 200
        with live.connect() as sock:
            sock.sendall(b"POST /images/create?fromImage=%b HTTP/1.1\r\nHost: x\r\n\r\n" % BIG.encode())
            time.sleep(0.15)
        self.clean(live)
        answer = live.ask("POST", f"/images/create?fromImage={BIG}")
        assert answer.lines[-1]["status"].startswith("Status: ")
        assert live.ask("DELETE", f"/images/{BIG}").status == 200

    def test_copies(self, live):
        folder = re.search(rb"TMPDIR=([^\0]*)", pathlib.Path(f"/proc/{live.process.pid}/environ").read_bytes()).group(1).decode()
        name = live.ask("POST", "/containers/create", {"Image": BASE, "Cmd": ["true"], "HostConfig": {"NetworkMode": "none"}}).json["Id"]
        try:
            for path in ("/", "/bin", "/bin/busybox", "/nosuch"):
                live.ask("HEAD", f"/containers/{name}/archive?path={path}")
            for target in ("archive?path=/", "archive?path=/bin", "export"):
                with live.connect() as sock:
                    sock.sendall(f"GET /containers/{name}/{target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    assert sock.recv(1000)
            with live.connect() as sock:
                sock.sendall(f"PUT /containers/{name}/archive?path=/tmp HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n".encode() + tar_of(("f", b"x" * 300000)))
                time.sleep(0.3)
            self.clean(live)
            assert folder not in pathlib.Path("/proc/mounts").read_text()
        finally:
            live.ask("DELETE", f"/containers/{name}?force=1")

    def test_build(self, building):
        context = tar_of(("Dockerfile", f"FROM {BASE}\nRUN sleep 60\n".encode()))
        with building.connect() as sock:
            sock.sendall(b"POST /build?t=tstlive/i:1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(context), context))
            assert sock.recv(65536)
            time.sleep(0.5)
        self.clean(building)
        assert building.ask("GET", "/images/tstlive/i:1/json").status == 404


@pytest.fixture(scope="class")
def shell():
    """Function of (script, user) that runs it in there; its output. `fails` asks for a failure."""
    tree = pathlib.Path(os.environ.get("NERDCTLD_STACK_CACHE") or "/var/cache/nerdctld-stack") / "fresh.tar"
    reason = why_not_live() or (not tree.exists() and "there is no Debian to boot (.ci/stack up --systemd)")
    if reason:
        pytest.skip(reason)
    with open(tree, "rb") as file:
        subprocess.run(["nerdctl", "--namespace=nerdctld-systemd", "import", "-", "debian:systemd"], stdin=file, capture_output=True, check=True, timeout=120)
    programs = {name: os.path.realpath(shutil.which(name)) for name in ("containerd", "containerd-shim-runc-v2", "ctr", "nerdctl", "docker", "runc")}
    shared = [f"--volume={path}:/usr/local/bin/{name}:ro" for name, path in programs.items()]
    real("rm", "-f", "-v", "tstsystemd", namespace="nerdctld-systemd")
    done = real("run", "-d", "--name", "tstsystemd", "--privileged", "--network=none", "--tmpfs=/run", "--tmpfs=/run/lock", "--tmpfs=/tmp:exec", "--env=container=docker",
                "--volume=/var/lib/containerd", "--volume=/var/lib/nerdctl", f"--volume={HERE}:/src:ro", f"--volume={STACK}:/stack:ro", *shared,
                "debian:systemd", "/sbin/init", namespace="nerdctld-systemd")

    def run(script, user="root", fails=False):
        done = subprocess.run(["nerdctl", "--namespace=nerdctld-systemd", "exec", "-i", "tstsystemd", "su", user, "-c", "exec bash -e"],
                              input=("export DOCKER_HOST=${DOCKER_HOST:-unix:///run/nerdctl.sock}\n" + script).encode(), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=100)
        text = re.sub(r"time=\S+ level=fatal msg=.exec failed.*\n", "", done.stdout.decode())
        assert bool(done.returncode) == fails, text
        return text
    try:
        if done.returncode or not until(lambda: b"running" in real("exec", "tstsystemd", "systemctl", "is-system-running", namespace="nerdctld-systemd").stdout, 40):
            pytest.skip("systemd does not boot in a container here")
        run("""install -m 755 /src/nerdctld.py /usr/local/bin/
            install -m 644 /src/nerdctl.socket /src/nerdctl.service /etc/systemd/system/
            printf '[Service]\nType=notify\nExecStart=/usr/local/bin/containerd\nDelegate=yes\nKillMode=process\n' >/etc/systemd/system/containerd.service
            systemctl daemon-reload; systemctl start containerd; systemctl enable --now nerdctl.socket""")
        yield run
    finally:
        real("rm", "-f", "-v", "tstsystemd", namespace="nerdctld-systemd")
        real("rmi", "-f", "debian:systemd", namespace="nerdctld-systemd")


class TestLiveSystemd:
    """The units in a Debian that systemd boots in a container, with a containerd of its own and the docker CLI."""

    def test_first_connection_starts_it(self, shell):
        assert shell("systemctl is-active nerdctl.service", fails=True) == "inactive\n"
        assert shell("stat -c '%a %U %G' /run/nerdctl.sock") == "660 root root\n"
        assert shell("docker version -f '{{.Server.Version}}'; systemctl is-active nerdctl.service") == f"{nerdctld.ENGINE_VERSION}\nactive\n"
        assert shell("ls /var/cache/nerdctld/usr/local/bin").startswith("nerdctld.cpython")
        assert BASE in shell("docker load -q -i /stack/base.tar; docker images --format '{{.Repository}}:{{.Tag}}'")
        assert shell(f"docker run --rm --network none {BASE} echo hello") == "hello\n"

    def test_a_restart_leaves_containers_alone(self, shell):
        shell(f"docker run -d --name keep --network none {BASE} sh -c 'i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done'")
        before = shell("systemctl show -P MainPID nerdctl.service; systemctl restart nerdctl.service; systemctl kill -s KILL nerdctl.service; sleep 1")
        assert shell("systemctl show -P MainPID nerdctl.service") != before
        assert shell("docker inspect -f '{{.State.Running}} {{.RestartCount}}' keep") == "true 0\n"
        lines = shell("sleep 1; docker logs keep").splitlines()
        assert lines == [f"line {number}" for number in range(1, len(lines) + 1)] and len(lines) > 5

    def test_it_ends_when_idle_and_comes_back(self, shell):
        shell("""mkdir -p /etc/systemd/system/nerdctl.service.d
            printf '[Service]\nEnvironment="NERDCTLD_OPTIONS=--idle-timeout=1 --debug"\n' >/etc/systemd/system/nerdctl.service.d/options.conf
            systemctl daemon-reload; systemctl restart nerdctl.service; docker ps""")
        shell("for i in $(seq 60); do systemctl is-active -q nerdctl.service || exit 0; sleep 0.5; done; exit 1")
        assert shell("systemctl show -P Result nerdctl.service; systemctl is-active nerdctl.socket") == "success\nactive\n"
        assert shell("docker ps --format '{{.Names}}'; docker rm -f keep") == "keep\nkeep\n"

    def test_group(self, shell):
        shell("""groupadd nerdctl; useradd -m -G nerdctl insider; useradd -m outsider; mkdir -p /etc/systemd/system/nerdctl.socket.d
            printf '[Socket]\nSocketGroup=nerdctl\n' >/etc/systemd/system/nerdctl.socket.d/group.conf
            systemctl daemon-reload; systemctl stop nerdctl.service; systemctl restart nerdctl.socket""")
        assert BASE in shell("docker images --format '{{.Repository}}:{{.Tag}}'", "insider")
        assert "permission denied" in shell("docker images", "outsider", fails=True)

    def test_manager_of_a_user(self, shell):
        shell("loginctl enable-linger outsider; for i in $(seq 50); do [ -S /run/user/$(id -u outsider)/bus ] && break; sleep 0.2; done")
        environment = "export XDG_RUNTIME_DIR=/run/user/$(id -u); export DOCKER_HOST=unix://$XDG_RUNTIME_DIR/nerdctl.sock\n"
        shell(environment + """mkdir -p ~/.config/systemd/user; cp /src/nerdctl.socket /src/nerdctl.service ~/.config/systemd/user/
            systemctl --user daemon-reload; systemctl --user enable --now nerdctl.socket""", "outsider")
        assert shell(environment + "docker version -f '{{.Server.Version}}'; systemctl --user is-active nerdctl.service; stat -c %U $XDG_RUNTIME_DIR/nerdctl.sock; "
                     "ls ~/.cache/nerdctld/usr/local/bin | head -c 8", "outsider") == f"{nerdctld.ENGINE_VERSION}\nactive\noutsider\nnerdctld"

    @pytest.mark.parametrize("user", ["root", "outsider"])
    def test_the_first_command_of_readme(self, shell, user):
        """The main job with the distribution's own containerd, docker command and Python."""
        told = shell("env -u DOCKER_HOST /src/.ci/stack try; /src/.ci/stack down", user)
        assert "Loaded image: hello:1\n" in told and re.search(r"^hello +1 ", told, re.M) and "Untagged: hello:2" in told and "that works" in told
        assert shell("ls -d /run/nerdctld-stack /tmp/nerdctld-stack-* /var/lib/nerdctld-stack 2>&1; pgrep -fa /try/config.toml", user, fails=True).count("No such") == 3

    def test_the_second_command_of_readme(self, shell):
        told = shell("/src/.ci/stack test -p no:cacheprovider -k 'TestCommandLine or TestPatterns'")
        assert re.search(r"^\d+ passed", told, re.M) and "failed" not in told

    def test_nothing_stays(self, shell):
        shell("systemctl stop nerdctl.socket nerdctl.service")
        assert shell("ls /run/nerdctl.sock", fails=True) and shell("pgrep -u root -f '^python3.*nerdctld[.]py'", fails=True) == ""
        journal = shell("journalctl --no-pager -o cat -u nerdctl.service")
        assert "listening on the socket of systemd" in journal and "Traceback" not in journal


class TestLiveSSH:
    @pytest.fixture
    def host(self, live, tmp_path):
        """ssh://… of an sshd of our own, whose docker is the wrapper, and the environment of its clients."""
        sshd = shutil.which("sshd") or ("/usr/sbin/sshd" if os.path.exists("/usr/sbin/sshd") else "")
        if not sshd or not shutil.which("ssh-keygen") or os.geteuid():
            pytest.skip("no sshd that this user can start")
        for name in ("host", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True, timeout=20)
        (tmp_path / "bin").mkdir()
        shutil.copy(HERE / "nerdctl", tmp_path / "bin" / "docker")
        (tmp_path / "bin" / "nerdctld").write_text(f"#!/bin/sh\nexec {sys.executable} {HERE}/nerdctld.py --addr unix://{live.socket} \"$@\"\n")
        (tmp_path / "bin" / "nerdctld").chmod(0o755)
        os.chmod(tmp_path, 0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (tmp_path / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nPidFile none\nAuthorizedKeysFile {tmp_path}/key.pub\nStrictModes no\n"
            f"PermitRootLogin yes\nUsePAM no\nSetEnv PATH={tmp_path}/bin:{os.environ['PATH']}\n")
        (tmp_path / "ssh").write_text(f"#!/bin/sh\nexec {shutil.which('ssh')} -i {tmp_path}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
                                      "-o LogLevel=ERROR \"$@\"\n")
        (tmp_path / "ssh").chmod(0o755)
        os.makedirs("/run/sshd", exist_ok=True)
        process = subprocess.Popen([sshd, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stdout=subprocess.DEVNULL, stderr=open(tmp_path / "sshd.log", "wb"))

        def answers():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
        assert until(answers), (tmp_path / "sshd.log").read_text()
        yield f"ssh://root@127.0.0.1:{port}", {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        process.terminate()
        process.wait(10)

    def test_docker_over_ssh(self, live, client, host):
        address, environment = host
        assert live.text(client, "-H", address, "version", "--format", "{{.Server.Version}}", environment=environment) == nerdctld.ENGINE_VERSION + "\n"
        assert BASE in live.text(client, "-H", address, "images", "--format", "{{.Repository}}:{{.Tag}}", environment=environment)
        archive = live.docker(client, "-H", address, "save", BASE, environment=environment).stdout
        assert len(archive) > 1000000 and "Loaded image" in live.text(client, "-H", address, "load", data=archive, environment=environment)


###############################################################################
# Side by side with Docker: recorded calls of its clients, its API description, a dockerd
###############################################################################

# Members of these are named by users, and not by the API.
NAMED = {"Labels", "Networks", "Ports", "Volumes", "ExposedPorts", "Options", "Runtimes", "PortBindings", "Containers.", "Attributes", "Config.Config", "IndexConfigs",
         "annotations", "DriverOpts", "Sysctls", "Tmpfs", "Storage"}


def below(path, key):
    """The path of a key in the object at a path; `*` for a name of users'."""
    named = path.rpartition(".")[2] in NAMED or path.endswith("LogConfig.Config")
    return f"{path}.*" if named else f"{path}.{key}" if path else key


def shape(value, path=""):
    """The paths of all keys in a JSON value; `[]` for the elements of a list."""
    found = set()
    if isinstance(value, dict):
        for key, each in value.items():
            found |= {below(path, key)} | shape(each, below(path, key))
    elif isinstance(value, list):
        for each in value:
            found |= shape(each, path + "[]")
    return found


def compare(theirs, ours):
    """Key paths that only one of two values has, where the object around it is in both."""
    left, right = shape(theirs), shape(ours)

    def parent(path, others):
        above = re.sub(r"(\.|^)[^.]+$", "", path)
        return not above or any(each.startswith(above + ".") for each in others) if above else True
    return ({each for each in left - right if parent(each, right) and not each.endswith("*")},
            {each for each in right - left if parent(each, left) and not each.endswith("*")})


# Handler -> key (a regular expression) -> why Docker's answer has it and ours does not, or the other way round.
IMAGE_DIFFERENCES = {
    r".*annotations.*": "containerd's annotations are not copied into descriptors", r".*Identity.*": "signatures and builds are not looked up",
    r".*(Manifests|AttestationData|ImageData).*": "only the manifest whose content is here is listed",
    r"(\[\])?.?Descriptor\.platform.*": "nerdctl's descriptors have none", r"Config\.(Shell|Healthcheck|StopSignal|ExposedPorts|ArgsEscaped|OnBuild|User|WorkingDir|Volumes|"
    r"Entrypoint|Labels|Env|Cmd)": "another image", r"Variant": "another image", r".*VirtualSize": "until 1.43, which dockerd 29 no longer needs to say",
    r"(Container|ContainerConfig|Parent|DockerVersion|Author|Comment|GraphDriver.*)(\..*)?": "dockerd 29 leaves empty ones out",
    r"(Metadata|Metadata.LastTagTime|Config\..*)": "dockerd 29 leaves empty ones out", r"RootFS.*": "another image",
}
CONTAINER_DIFFERENCES = {
    r".*annotations.*": "containerd's annotations are not copied into descriptors", r"ImageManifestDescriptor.*": "of images whose content is here",
    r"HostConfig\.(Annotations|Init|Mounts|StorageOpt|Sysctls|Tmpfs|ContainerIDFile|CpuCount|CpuPercent|IOMaximum.*|Isolation|VolumeDriver|BlkioDevice.*|.*)(\..*)?":
        "HostConfig has what was asked for",
    r"(Storage|GraphDriver)(\..*)?": "nerdctl does not tell mounts of the snapshot", r"State\.(Health|OOMKilled).*": "another container",
    r"Config\..*": "another container", r"NetworkSettings\..*": "networks without Docker's own endpoint bookkeeping",
    r".*(Mounts|Ports)\[\].*": "another container", r"\[\]\.(ImageManifestDescriptor|Health|HostConfig|SizeRw|SizeRootFs|NetworkSettings).*": "nerdctl does not tell",
}
DIFFERENCES = {
    "system_ping": {}, "system_ping_head": {}, "container_list": CONTAINER_DIFFERENCES, "container_inspect": CONTAINER_DIFFERENCES,
    "image_list": IMAGE_DIFFERENCES, "image_inspect": IMAGE_DIFFERENCES, "image_history": {},
    "system_version": {r"Components\[\]\.Details.*": "each component has what nerdctl tells of it", r"(GitCommit|GoVersion|KernelVersion|BuildTime|Experimental)": "empty ones"},
    "system_info": {r".*": "checked against the API's description instead: dockerd tells of its own parts"},
    "system_df": {r".*(Images|Containers|Volumes|BuildCache|ImageUsage|ContainerUsage|VolumeUsage|BuildCacheUsage).*": "the rows are those of the lists"},
    "network_list": {r".*(IPAM|Status|EnableIPv4|Peers).*": "addresses in use are not told"},
    "network_inspect": {r".*(IPAM|Status|EnableIPv4|Peers|Containers).*": "addresses in use are not told"},
    "volume_list": {r".*(Options|Status|Warnings).*": "empty ones"}, "volume_inspect": {r"(Options|Status|Labels)": "empty ones"},
    "plugin_list": {}, "image_distribution": {r".*": "another registry"},
}


def recorded_calls():
    """Every recorded GET and HEAD in JSON, one of each handler, version and status."""
    found = {}
    for path in sorted((SHARED / "client-calls").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row.get("method") not in ("GET", "HEAD") or not row.get("status"):
                continue
            target = urllib.parse.urlsplit(row["path"])
            with contextlib.suppress(nerdctld.ApiError, ValueError):
                version, place = nerdctld.split_version(urllib.parse.unquote(target.path))
                handler, _ = nerdctld.find_route(row["method"], place)
                body = json.loads(row["resp_body"]) if row.get("resp_body") and row["method"] == "GET" and place != "/_ping" else None
                if handler.__name__ in DIFFERENCES and "/build" not in place:
                    found.setdefault((handler.__name__, version, row["status"], "manifests" in target.query), (path.stem, row["method"], place, target.query, body))
    return found


CALLS = recorded_calls() if (SHARED / "client-calls").is_dir() else {}
OURS = {"image_inspect": f"/images/{BASE}/json", "image_history": f"/images/{BASE}/history", "container_inspect": "/containers/tstweb/json",
        "network_inspect": "/networks/tstnet", "volume_inspect": "/volumes/tstvol"}
NONE = {"image_inspect": "/images/nosuch/json", "container_inspect": "/containers/nosuch/json", "network_inspect": "/networks/nosuch", "volume_inspect": "/volumes/nosuch"}


class TestRecordedCalls:
    def test_they_are_at_hand(self):
        if not CALLS:
            pytest.skip("no recorded client calls beside the repository")
        assert len(CALLS) > 15 and {"image_list", "container_inspect", "system_version"} <= {each[0] for each in CALLS}

    @pytest.mark.parametrize("key", [pytest.param(key, id=f"{key[0]} {'%d.%d' % key[1]} {key[2]}") for key in sorted(CALLS)])
    def test_status_and_keys(self, reading, key, monkeypatch):
        name, version, status, manifests = key
        scenario, method, place, query, body = CALLS[key]
        if name == "image_distribution":
            pytest.skip("the registry is another one")
        if name == "system_df":
            monkeypatch.setattr(nerdctld, "build_cache", lambda engine: [nerdctld.docker_cache(each) for each in json.loads(BUILDCTL_DU.stdout)])
        place = (OURS if status < 400 else NONE).get(name, place)
        query = "&".join(each for each in query.split("&") if not each.startswith(("filters=", "limit=", "platform=")))
        answer = ask(reading, method, f"/v{version[0]}.{version[1]}{place}" + (f"?{query}" if query else ""))
        if status == 400 and version < (1, 40):
            # dockerd 29 has given up what is older; here it is still served.
            assert answer.status == 200
            return
        assert answer.status == status, f"{scenario}: {method} {place}"
        if body is not None:
            only_theirs, only_ours = compare(body, answer.json)
            known = DIFFERENCES[name]
            left = {f"{who}: {each}" for who, keys in (("only Docker's", only_theirs), ("only ours", only_ours)) for each in keys
                    if not any(re.fullmatch(pattern, each) or re.fullmatch(pattern, re.sub(r"^\[\]\.", "", each)) for pattern in known)}
            assert not left, f"{scenario}: {method} {place}"


###############################################################################
# All recorded calls again, on the real stack
###############################################################################

# What belongs together: later ones go on with what earlier ones made.
CHAINS = {"compose": ("compose_up", "compose_ps_logs_exec", "compose_up_again", "compose_down")}
# Scenarios that speak with BuildKit, and those that make no call of their own.
NOT_REPLAYED = re.compile(r"buildx_.*|compose_build|devcontainer_build|docker_build_alias|dial_stdio")
HEX = re.compile(r"(?<![0-9a-f])[0-9a-f]{12,64}(?![0-9a-f])")
# Handlers that answer with a stream of JSON.
STREAMS = {"image_create", "image_load", "image_push", "image_build", "system_events"}
# Containers that a scenario found there and never looked at: name -> its command.
FOUND = {"trcp": ["sh", "-c", "echo t > /tmp/t; ln -s t /tmp/lnk; exec sleep 300"], "trc": ["sleep", "300"], "trw": ["sh", "-c", "sleep 2; exit 9"]}


def cut_json(text):
    """The value of a JSON text that may have been cut short, and the key paths (as of `shape`) of what was still open there."""
    with contextlib.suppress(ValueError):
        return json.loads(text), []
    brackets, string, escaped, good = [], False, False, ("", "")
    for at, char in enumerate(text):
        if string:
            escaped = char == "\\" and not escaped
            string = char != '"' or (text[at - 1] == "\\" and not closes(text, at))
        elif char == '"':
            string = True
        elif char in "{[":
            brackets.append("}" if char == "{" else "]")
            good = text[:at + 1], "".join(reversed(brackets))
        elif char in "}]":
            brackets.pop()
            good = text[:at + 1], "".join(reversed(brackets))
        elif char == ",":
            good = text[:at], "".join(reversed(brackets))
    value = each = json.loads(good[0] + good[1])
    path, opened = "", [""]
    for _ in good[1][1:]:
        if isinstance(each, dict):
            key = list(each)[-1]
            path, each = below(path, key), each[key]
        else:
            path, each = path + "[]", each[-1]
        opened.append(path)
    return value, opened


def closes(text, at):
    """Whether the quotation mark there ends a string: an even number of backslashes stands before it."""
    return (at - len(text[:at].rstrip("\\"))) % 2 == 0


def json_lines(text):
    """The JSON values of a stream, but for a last one that was cut short."""
    found = []
    for line in text.replace("\x1e", "").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def recorded_bytes(event):
    """The bytes of a piece of a recorded stream; None where they were not kept."""
    _, _, size, text = event
    if len(text.encode()) == size:
        return text.encode()
    return text.encode("latin-1") if len(text) == size and max(text) < "\u0100" else None


def unframed(data, framed):
    """Output by stream: {1: stdout, 2: stderr}; everything as stdout where there are no frames."""
    if not framed:
        return {1: data}
    found = {1: b"", 2: b""}
    while len(data) >= 8:
        size = int.from_bytes(data[4:8], "big")
        found[data[0]] = found.get(data[0], b"") + data[8:8 + size]
        data = data[8 + size:]
    return found


class Call:
    """A recorded call, and what our server answers to it."""

    def __init__(self, row, end):
        self.row, self.scenario, self.begin = row, row["scenario"], row["t"]
        self.events = row.get("raw_events") or []
        self.left = row.get("client_closed")
        ends = {each[1]: each[0] for each in self.events if each[2] == "EOF"}
        if self.events and ("s2c" not in ends or 0 <= ends["s2c"] - ends.get("c2s", 0) < 0.01):
            # No answer came that quickly: the client had gone, and not only stopped to send.
            self.left = max(each[0] for each in self.events)
        times = [row.get("t_resp"), row.get("t_end"), self.left, *[each[0] for each in self.events]]
        self.answered = row.get("t_resp") or end
        self.end = max(each for each in times if each) if any(times) else end
        target = urllib.parse.urlsplit(row["path"])
        self.path = urllib.parse.unquote(target.path)
        self.handler = self.find(row["method"])
        self.response, self.data, self.failure = None, b"", None
        self.thread, self.headed, self.sock = None, threading.Event(), None

    def find(self, method):
        """The name of the handler that it goes to."""
        try:
            return nerdctld.find_route(method, nerdctld.split_version(self.path)[1])[0].__name__
        except nerdctld.ApiError:
            return "none"

    def headers(self):
        """The headers to send."""
        found = {name: value for name, value in self.row["req_headers"] if name.lower() not in ("content-length", "transfer-encoding")}
        if "x_registry_decoded" in self.row:
            name = "X-Registry-Config" if self.handler == "image_build" else "X-Registry-Auth"
            found[name] = base64.urlsafe_b64encode(self.row["x_registry_decoded"].encode()).decode()
        return found

    def start(self, live, path, body):
        """Send it, in a thread of its own."""
        self.sock = live.connect()
        self.sock.settimeout(60)
        self.thread = threading.Thread(target=self.run, args=(path, body), daemon=True)
        self.thread.start()

    def run(self, path, body):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = self.sock
        try:
            connection.request(self.row["method"], path, body=body, headers=self.headers())
            self.response = connection.getresponse()
            self.headed.set()
            if self.response.status == 101 or self.row.get("hijacked"):
                threading.Thread(target=self.type, daemon=True).start()
            read = self.response.fp.read1 if self.response.status == 101 else self.response.read1
            while True:
                data = read(65536)
                if not data:
                    break
                self.data += data
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.failure = error
        finally:
            self.headed.set()

    def type(self):
        """Type what the client typed, at its pace."""
        now = self.answered
        with contextlib.suppress(OSError):
            for event in self.events:
                if event[1] != "c2s":
                    continue
                time.sleep(min(max(event[0] - now, 0), 2.5))
                now = event[0]
                data = None if event[2] == "EOF" else recorded_bytes(event)
                if data is None:
                    if not self.ended_before(event):
                        self.sock.shutdown(socket.SHUT_WR)
                    return
                self.sock.sendall(data)

    def ended_before(self, event):
        """Whether the server had closed its side before this event."""
        return any(each[1:] == ["s2c", "EOF"] and each[0] <= event[0] for each in self.events)

    def leave(self):
        """The client goes away."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def join(self, seconds=30):
        """Wait for its end."""
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.failure = TimeoutError("no end")
            self.leave()
            self.thread.join(5)
        self.sock.close()


class Replay:
    """The calls of some scenarios, one after the other or side by side as they were recorded, with the ids that our server
    gave in the place of Docker's. `differences` are (scenario, handler, what differs)."""

    def __init__(self, live, scenarios, base, folder):
        self.live, self.base, self.ids, self.differences, self.export = live, base, {}, set(), None
        self.folder = folder
        # Docker's ids of what our server did not make.
        self.lost = set()
        self.calls = []
        for number, scenario in enumerate(scenarios):
            rows = [json.loads(line) for line in (SHARED / "client-calls" / f"{scenario}.jsonl").read_text().splitlines()]
            end = max(row["t"] for row in rows)
            for row in rows:
                if row.get("method") and row.get("status"):
                    row["scenario"] = scenario
                    self.calls.append(Call(row, end))
            self.calls.append(None)

    def run(self):
        """Make all calls."""
        self.prepare()
        running, now = [], 0.0
        for at, call in enumerate(self.calls):
            if call is None:
                running, now = self.settle(running, float("inf")), 0.0
                continue
            running = self.settle(running, call.begin)
            if call.begin - now > 0.3:
                time.sleep(min(call.begin - now, 2.5))
            if any(identity.startswith(word) for word in HEX.findall(call.row["path"]) for identity in self.lost):
                continue
            call.start(self.live, self.target(call), self.body(call))
            following = self.calls[at + 1].begin if self.calls[at + 1] else float("inf")
            if call.answered <= following:
                call.headed.wait(30)
            running.append(call)
            if call.end <= following and not call.left:
                running = self.settle(running, following)
            now = max(call.begin, *[each for each in (call.answered, call.end) if each <= following], *[
                event[0] for each in running for event in each.events if event[0] <= following], 0)

    def settle(self, running, moment):
        """Wait for the calls that had ended by then; those still running."""
        for call in sorted(running, key=lambda each: each.end):
            if call.end > moment:
                continue
            if call.left:
                time.sleep(0.3)
                call.leave()
            call.join()
            self.judge(call)
        return [each for each in running if each.end > moment]

    def prepare(self):
        """Make the containers and images that the scenarios found there."""
        said = " ".join(call.row["path"] + (call.row.get("req_body") or "")[:4000] for call in filter(None, self.calls))
        for name in re.findall(r"localhost:5000/[a-z]+:\w+", re.sub(r"/push\?tag=", ":", said)):
            if name.endswith((":trace", ":dpy")) or "/dcbase" in name or "/fakeryuk" in name:
                self.ask("POST", f"/images/{BASE}/tag?repo={name.rpartition(':')[0]}&tag={name.rpartition(':')[2]}")
        made, wanted = set(), {}
        for call in filter(None, self.calls):
            query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(call.row["path"]).query))
            if call.handler == "container_create":
                made |= {json.loads(call.row["resp_body"]).get("Id", "")[:12], query.get("name")}
            if call.handler == "container_rename":
                made.add(query.get("name"))
            match = re.search(r"/containers/([^/]+)/(?!create)", call.path)
            if call.handler == "network_connect":
                name = json.loads(call.row["req_body"])["Container"]
            else:
                name = match.group(1) if match else query.get("container", "")
            if re.fullmatch(r"[0-9a-f]{64}", name):
                name = name[:12]
            if name and name not in made and name != "nosuch":
                wanted.setdefault(name, [])
                wanted[name].append(call)
        for name, calls in wanted.items():
            self.make(name, calls)

    def make(self, name, calls):
        """Make a container as the first look at it told, and start it unless the scenario does."""
        told = next((call for call in calls if call.handler == "container_inspect" and call.row["status"] == 200), None)
        if told is None and name not in FOUND:
            return
        seen = cut_json(told.row["resp_body"])[0] if told and name not in FOUND else {"Config": {"Cmd": FOUND[name], "Image": BASE}, "HostConfig": {}}
        settings = seen["HostConfig"] if "NetworkMode" in seen["HostConfig"] else {}
        body = {**seen["Config"], "HostConfig": {key: value for key, value in settings.items() if key in ("AutoRemove", "PortBindings", "RestartPolicy", "LogConfig")}}
        body.pop("Hostname", None)
        identity = self.ask("POST", f"/containers/create?name={seen.get('Name', '/' + name)[1:]}", body)["Id"]
        self.ids[seen.get("Id", name)] = identity
        if seen.get("State", {}).get("Status") != "created" and not any(call.handler == "container_start" for call in calls):
            self.ask("POST", f"/containers/{identity}/start")
            time.sleep(0.5)

    def ask(self, method, path, body=None):
        """A call that has to succeed."""
        answer = self.live.ask(method, path, body)
        assert answer.status < 400, answer.body
        return answer.json if answer.body else None

    def ours(self, text):
        """A text with our ids in the place of Docker's."""
        def swap(match):
            word = match.group()
            return next((ours[:len(word)] for theirs, ours in self.ids.items() if theirs.startswith(word)), word)
        return HEX.sub(swap, text)

    def target(self, call):
        """The path to ask for: our ids, this time's times, and no ten seconds for those that do not heed SIGTERM."""
        path = self.ours(call.row["path"]).replace("%2Fsrv%2Fwork", urllib.parse.quote(str(self.folder), safe=""))
        date = next((value for name, value in call.row["resp_headers"] if name == "Date"), None)
        if date:
            shift = int(time.time() - time.mktime(time.strptime(date, "%a, %d %b %Y %H:%M:%S GMT")) + time.timezone)
            path = re.sub(r"\b(since|until)=(\d{9,})", lambda match: f"{match.group(1)}={int(match.group(2)) + shift}", path)
        return path + "?t=1" if re.search(r"/(stop|restart)$", path) else path

    def body(self, call):
        """The body to send."""
        row = call.row
        if call.handler == "image_load":
            return self.base
        if "fromSrc" in row["path"]:
            return self.export or self.base
        text = row.get("req_body")
        if text is None:
            return b"" if row["method"] in ("POST", "PUT") else None
        if call.handler in ("archive_put", "image_build") or "tar" in dict(call.headers()).get("Content-Type", ""):
            return text.encode("latin-1", "replace").ljust(row["req_len"], b"\0")
        return self.ours(text).replace("/srv/work", str(self.folder)).encode()

    # What came back

    def differ(self, call, what):
        self.differences.add((call.scenario, call.handler, what))

    def judge(self, call):
        """Note what is not as it was recorded."""
        row = call.row
        if call.response is None or call.failure and not call.left:
            self.differ(call, f"no answer: {call.failure!r}")
            if call.response is None:
                return
        if call.response.status != row["status"]:
            if row["status"] == 201:
                self.lost |= {each for each in HEX.findall(row.get("resp_body") or "")}
            self.differ(call, f"status {call.response.status} and not {row['status']}: {call.data[:200].decode(errors='replace').strip()}")
            return
        kind = lambda headers: next((value for name, value in headers if name.lower() == "content-type"), "none")
        theirs, ours = kind(row["resp_headers"]), kind(call.response.getheaders())
        if theirs != ours:
            self.differ(call, f"Content-Type {ours} and not {theirs}")
        if call.path.endswith("/export"):
            self.export = call.data
        if row.get("hijacked") or "stream" in theirs and "octet" not in theirs:
            self.judge_output(call, theirs)
        elif row.get("resp_body") and ("json" in theirs or theirs == "none"):
            self.judge_json(call)
        elif bool(call.data) != bool(row.get("resp_body")) and not call.left:
            self.differ(call, f"{len(call.data)} bytes and not {row.get('resp_len')}")
        self.judge_stat(call)

    def judge_stat(self, call):
        """The stat of a path in a container."""
        stat_of = lambda headers: next((json.loads(base64.b64decode(value)) for name, value in headers if name == "X-Docker-Container-Path-Stat"), {})
        theirs, ours = stat_of(call.row["resp_headers"]), stat_of(call.response.getheaders())
        for key in sorted({*theirs, *ours} - {"mtime", "size"}):
            if theirs.get(key) != ours.get(key):
                self.differ(call, f"stat {key} {ours.get(key)!r} and not {theirs.get(key)!r}")

    def judge_output(self, call, kind):
        """Output of a container, or of a command in it."""
        framed = "multiplexed" in kind or (call.data[:1] in (b"\1", b"\2") and call.data[1:4] == b"\0\0\0")
        pieces = [recorded_bytes(each) for each in call.events if each[1] == "s2c" and each[2] != "EOF"] if call.row.get("hijacked") else [
            (call.row.get("resp_body") or "").encode()]
        if None in pieces or any(each[1] == "c2s" and each[2] != "EOF" and recorded_bytes(each) is None for each in call.events):
            return
        theirs, ours = unframed(b"".join(pieces), framed), unframed(call.data, framed)
        for stream in (1, 2):
            left, right = [self.plain(each.get(stream, b"")) for each in (theirs, ours)]
            if left != right:
                self.differ(call, f"stream {stream} {right!r} and not {left!r}")

    @staticmethod
    def plain(data):
        """Output without times, ids, what a terminal's shell paints, and repetitions, of which there are more or less in a moment."""
        text, before = re.sub(r"\x1b\[\w|\r|[0-9a-f]{12,}|\d{4}-\d\d-\d\dT[\d:.]*Z ", "", data.decode(errors="replace")), None
        while text != before:
            text, before = re.sub(r"(?s)(.+?)\1+", r"\1", text), text
        return text

    def judge_json(self, call):
        """JSON: the keys of one value, or of each line of a stream; the words of an error."""
        text, ours = call.row["resp_body"], call.data.decode(errors="replace")
        if call.row["status"] >= 400:
            words = [re.sub(r"[0-9a-f]{12,}", "ID", json.loads(each).get("message", "")) for each in (self.ours(text), ours)]
            if words[0] != words[1]:
                self.differ(call, f"message {words[1]!r} and not {words[0]!r}")
            return
        lines, mine = json_lines(text), json_lines(ours)
        if call.handler in STREAMS:
            self.learn(lines[-1:] or [{}], mine[-1:] or [{}])
            for left, right in zip(lines, mine):
                self.learn([left.get("aux") or {}], [right.get("aux") or {}])
            for name, rows, others in (("no line", lines, mine), ("a line too many", mine, lines)):
                shapes = {self.line_shape(each) for each in others}
                for each in rows:
                    if self.line_shape(each) not in shapes:
                        self.differ(call, f"{name} {self.line_shape(each)}")
            return
        value, opened = cut_json(text if "\n" not in text.strip() else text.split("\n")[0])
        answer = mine[0] if mine else None
        self.learn([value], [answer])
        left, right = [{HEX.sub("*", path) for path in shape(each)} for each in (value, answer)]
        for each in sorted(each for each in left - right if not each.endswith("*")):
            above = re.sub(r"\.?[^.]+$", "", each)
            lists = [each[:found.end()] for found in re.finditer(r"\[\]", each)]
            # What there are none of has no keys.
            if all(any(path.startswith(place) for path in right) for place in lists) and (above not in left or above in right or not above):
                self.differ(call, f"no {each}")
        for each in sorted(each for each in right - left if not each.endswith("*")):
            above = re.sub(r"\.?[^.]+$", "", each)
            if above.rstrip("[]") not in opened and above not in opened and not any("[]" in path and each.startswith(path) for path in opened) and (above in left or not above):
                self.differ(call, f"too many: {each}")

    @staticmethod
    def line_shape(line):
        """The keys of a line of a stream, with what stands in `status` and `Action` without names."""
        words = line.get("Action") or re.sub(r"[0-9a-f]{12,}|\S*[/:]\S*|\d+", "*", line.get("status") or "")
        return f"{words!r} " + " ".join(sorted(shape(line)))

    def learn(self, theirs, ours):
        """Remember which of our ids stands for which of Docker's."""
        for left, right in zip(theirs, ours):
            if isinstance(left, dict) and isinstance(right, dict):
                for key in ("Id", "ID", "Name", "status"):
                    pair = [re.sub(r"^sha256:", "", each.get(key) or "") for each in (left, right) if isinstance(each.get(key), str)]
                    if len(pair) == 2 and all(re.fullmatch(r"[0-9a-f]{64}", each) for each in pair):
                        self.ids.setdefault(*pair)


# Handler and the beginning of a difference (regular expressions) -> why it is so: nerdctl cannot, or what was recorded met other things.
REPLAY_DIFFERENCES = [
    # What nerdctl has no means for
    ("container_create", r"status 501.*mounts of type image.*", "nerdctl has no such mounts"),
    ("container_create", r"status 500.*no known GPU vendor.*", "nerdctl looks for the GPU at the creation, Docker at the start"),
    ("container_start", r"status 204 and not 500: ", "a GPU, a link to a container that has ended: not found at the start; which one of two gets a port"),
    ("container_start", r"status 500.*unable to set hostname without a private UTS namespace", "nerdctl 2.3.5 run --uts=host without --network=host"),
    ("container_start", r"(status 500.*|message .*)port is already allocated.*", "which one of two gets a port; Docker's driver says more"),
    ("container_stop", r"status (204|304) and not (304|204): ", "which one of two got the port and runs"),
    ("network_connect|network_disconnect", r"status (501|403).*", "nerdctl has no such command"),
    ("volume_create", r"status 501.*driver options", "nerdctl's volumes are folders"),
    ("volume_delete|volume_inspect", r"status 404.*trv.*", "the volume with driver options"),
    ("image_create", r"status 500.*no image was built", "an import with changes is a build, and BuildKit's worker is in another namespace"),
    ("container_inspect|image_.*|system_df", r"no .*annotations", "containerd's annotations are not copied into descriptors"),
    ("container_list", r"no \[\]\.ImageManifestDescriptor", "it would cost an inspect of each image before the first answer"),
    ("image_inspect", r"no Identity.*", "signatures and builds are not looked up"),
    ("network_inspect", r"no Status.*", "addresses in use are not told"),
    ("system_info", r"no Runtimes\.\*\.status", "runc's own features are not told"),
    ("system_version", r"no Components\[\]\.Details\.Module.*", "of buildkitd inside of dockerd"),
    ("system_events", r"(no line|a line too many) '(exec_\w+: |exec_die|exec_start|health_status|die|kill|stop|top|start|create|destroy|attach|commit|pause|unpause|prune|rename|restart|update|archive-path|extract-to-dir).*",
     "what was told before the client left: containers take other times"),
    # Other things than those that were recorded
    ("archive_get", r"stat mode .*", "of another image"), ("image_inspect", r"(no|too many:) (Comment|Parent|Config\..*)", "another image"),
    ("container_inspect", r"no Config.ExposedPorts", "another image"),
    ("image_inspect", r"status 404.*", "an image that the scenario found there"), ("image_list", r"no \[\]\.Descriptor\.annotations", "another image"),
    ("image_create", r"(no line|a line too many) .*", "layers that were there already"), ("image_push", r"(no line|a line too many) .*", "layers that were there already"),
    ("image_create|image_search", r"message .*dial tcp.*", "no registry in the world is reached"),
    ("image_create", r"status 404.*testcontainers/ryuk.*", "no registry in the world is reached"),
    ("container_create", r"status 40[04].*(network trnet not found|bb:pullme).*", "a network and an image that the scenario found there"),
    ("image_create", r"status 404.*bb:pullme.*", "an image that the scenario found in its registry"),
    ("image_delete|image_prune", r"no .*\[?\]?\.(Deleted|Untagged)", "layers that others use"),
    ("container_(inspect|wait|delete|logs)", r"status 404.*No such container.*", "a container that the scenario found there, or that had ended with --rm already"),
    ("system_df", r"no (BuildCache|Containers|Images).*", "of builds, and of clients of an API before 1.44"),
    ("container_list|system_info", r"status 200 and not 400.*", "dockerd 29 has given up what is before 1.44"),
    ("container_stats", r"too many: memory_stats\.stats\..*", "of another kernel"), ("container_stats", r"Content-Type application/json and not none", "dockerd 29 sends none"),
    # When things come
    ("container_attach|exec_start", r"(?s)stream 1 .*BusyBox.*", "what a shell and its terminal paint, in another order"),
    ("container_attach", r"(?s)stream 1 '/ # echo again.*/ # .*", "where in its line a shell paints its prompt anew when its terminal gets its size"),
    ("container_attach", r"no answer: TimeoutError.*", "an interrupt that the client acted upon by itself"),
    ("container_attach", r"Content-Type application/json and not .*raw-stream|stream 1 .*No such container: nosuch.*", "an error before the upgrade is JSON, as everywhere"),
    ("container_attach", r"stream 1 '(as\\n|(l1\\n)?(l2\\n)?(l3\\n)?)?' and not '(as\\n|l2\\nl3\\n)'", "what was written before the client came, or had gone"),
    ("container_logs", r"stream [12] '' and not .*", "a line later than the client left"),
    ("container_logs", r"stream 1 '(l1\\n)?(l2\\n)?' and not 'l2\\nl3\\n'", "a line later than the client came"),
]


@pytest.fixture(scope="class")
def replayed(tmp_path_factory):
    """A daemon over a namespace of its own, whose things may all be pruned."""
    reason = why_not_live() or (not CALLS and "no recorded client calls beside the repository")
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("replay")
    daemon = Live(folder, "--namespace", "nerdctld-replay")
    assert daemon.ask("POST", "/images/load?quiet=1", (STACK / "base.tar").read_bytes(), {"Content-Type": "application/x-tar"}).status == 200
    yield daemon
    daemon.end()
    for word, rest in (("ps", "rm"), ("images", "rmi"), ("volume", "volume")):
        names = real(*{"ps": ("ps", "-aq"), "images": ("images", "-q"), "volume": ("volume", "ls", "-q")}[word], namespace="nerdctld-replay").stdout.decode().split()
        if names:
            real(*{"rm": ("rm", "-f"), "rmi": ("rmi", "-f"), "volume": ("volume", "rm", "-f")}[rest], *names, namespace="nerdctld-replay", timeout=120)
    assert b"Traceback" not in daemon.log.read_bytes()


class TestLiveRecordedCalls:
    """All that stock clients said to dockerd 29, outside of buildx, said to us: statuses, media types, keys, words, output."""

    @pytest.mark.parametrize("scenario", [*CHAINS, *(path.stem for path in sorted((SHARED / "client-calls").glob("*.jsonl"))
                                                     if not NOT_REPLAYED.fullmatch(path.stem) and path.stem not in sum(CHAINS.values(), ()))])
    def test_scenario(self, replayed, scenario, tmp_path):
        for name in ("dc", "cmp"):
            (tmp_path / name).mkdir()
        replay = Replay(replayed, CHAINS.get(scenario, (scenario,)), (STACK / "base.tar").read_bytes(), tmp_path)
        try:
            replay.run()
        finally:
            for each in replayed.ask("GET", "/containers/json?all=1").json:
                replayed.ask("DELETE", f"/containers/{each['Id']}?force=1&v=1")
            replayed.ask("POST", "/networks/prune")
            replayed.ask("POST", "/volumes/prune?" + filtered(all=["true"]))
        assert sum(call is not None and call.response is not None for call in replay.calls) > 0
        left = [each for each in sorted(replay.differences) if not any(
            re.fullmatch(handler, each[1]) and re.match(what, each[2], re.S) for handler, what, _ in REPLAY_DIFFERENCES)]
        assert not left

    def test_each_difference_has_a_reason(self):
        assert all(len(reason.split()) > 1 for _, _, reason in REPLAY_DIFFERENCES)


class Description:
    """The definitions of the API description: what a reader of its own for this style of YAML needs to check types."""

    def __init__(self, path):
        self.definitions = {}
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
        begin, end = lines.index("definitions:"), lines.index("paths:")
        self.definitions = self.block(lines[begin + 1:end])

    def block(self, lines):
        """Nested mappings by indentation; a list of scalars as a list; texts are left out."""
        found, at = {}, 0
        if not lines:
            return found
        indent = len(lines[0]) - len(lines[0].lstrip())
        if lines[0].lstrip().startswith("- "):
            return [line.strip()[2:].strip().strip('"') for line in lines if line.startswith(" " * indent + "- ")]
        while at < len(lines):
            key, _, value = lines[at].strip().partition(":")
            stop = at + 1
            while stop < len(lines) and len(lines[stop]) - len(lines[stop].lstrip()) > indent:
                stop += 1
            value = re.sub(r"\s+#.*$", "", value.strip())
            if value.startswith("["):
                found[key] = [each.strip().strip("\"'") for each in value.strip("[]").split(",")]
            elif value in ("|", ">", "|-", ">-") or key in ("example", "description", "default"):
                found[key] = ""
            else:
                found[key.strip('"')] = value.strip('"') if value else self.block(self.same_level(lines, at, stop, indent))
                if not value and stop < len(lines) and lines[stop].startswith(" " * indent + "- "):
                    while stop < len(lines) and lines[stop].startswith(" " * indent + "- "):
                        stop += 1
            at = stop
        return found

    @staticmethod
    def same_level(lines, at, stop, indent):
        """The lines below a key: deeper ones, or a list that stands as deep as the key."""
        while stop < len(lines) and lines[stop].startswith(" " * indent + "- "):
            stop += 1
        return lines[at + 1:stop]

    def problems(self, value, schema, path="", optional=False):
        """What a value has against a schema."""
        if "$ref" in schema:
            return self.problems(value, self.definitions[schema["$ref"].rpartition("/")[2]], path, optional)
        found = []
        for each in schema.get("allOf") or []:
            if isinstance(each, dict):
                found += self.problems(value, each, path)
        if value is None:
            return found
        kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "number": (int, float)}
        kind = kinds.get(schema.get("type"))
        if kind and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            return [f"{path}: {type(value).__name__} and not {schema['type']}"]
        if isinstance(value, dict):
            found += [f"{path}.{name}: missing" for name in schema.get("required") or [] if name not in value]
            for name, each in (schema.get("properties") or {}).items():
                if name in value and isinstance(each, dict):
                    found += self.problems(value[name], each, f"{path}.{name}")
            if isinstance(schema.get("additionalProperties"), dict):
                for name, each in value.items():
                    found += self.problems(each, schema["additionalProperties"], f"{path}.{name}") if not schema.get("properties") else []
        if isinstance(value, list) and isinstance(schema.get("items"), dict):
            for each in value:
                found += self.problems(each, schema["items"], path + "[]")
        return found


@pytest.fixture(scope="class")
def description():
    """The API description, where it is at hand."""
    path = SHARED / "engine-api" / "v1.56.yaml"
    if not path.exists():
        pytest.skip("no API description beside the repository")
    return Description(path)


class TestDescription:
    def test_reader(self, description):
        summary = description.definitions["ImageSummary"]
        assert summary["required"][:2] == ["Id", "ParentId"] and summary["properties"]["RepoTags"]["items"] == {"type": "string"}
        assert description.problems({"Id": 1}, summary, "x")[0] == "x.ParentId: missing"

    @pytest.mark.parametrize("path, name, many", [
        ("/images/json?shared-size=1&manifests=1", "ImageSummary", True), (f"/images/{BASE}/json?manifests=1", "ImageInspect", False),
        ("/containers/json?all=1&size=1", "ContainerSummary", True), ("/containers/tstweb/json?size=1", "ContainerInspectResponse", False),
        ("/containers/tstdone/json", "ContainerInspectResponse", False), ("/info", "SystemInfo", False), ("/version", "SystemVersion", False),
        ("/networks", "NetworkSummary", True), ("/networks/tstnet", "NetworkInspect", False), ("/volumes", "VolumeListResponse", False),
        ("/volumes/tstvol", "Volume", False), (f"/images/{BASE}/history", "ImageHistoryResponseItem", True)])
    def test_types(self, reading, description, path, name, many):
        if name not in description.definitions:
            pytest.skip(f"no definition {name}")
        answer = ask(reading, "GET", path)
        assert answer.status == 200
        for each in answer.json if many else [answer.json]:
            # The description asks for it without saying what it is, and dockerd has none.
            problems = [problem for problem in description.problems(each, description.definitions[name], name) if not problem.endswith("UnpackedSize: missing")]
            assert problems == []


class TestLiveReference:
    """The same questions to dockerd 20.10, as far as its store without containerd has the same things to tell."""

    DIFFERENCES = {
        "/images/json": {"[].VirtualSize": "until 1.43", "[].Labels": "null there"},
        f"/images/{BASE}/json": {
            "Config.AttachStderr": "old", "GraphDriver.Data": "of overlay2", "ContainerConfig.MacAddress": "", "Config.OnBuild": "", "DockerVersion": "",
            "Container": "", "Variant": "", "Config.ArgsEscaped": "", "ContainerConfig.ArgsEscaped": ""},
        f"/images/{BASE}/history": {}, "/version": {"Experimental": "", "Platform.Name": ""},
    }

    @pytest.mark.parametrize("path", sorted(DIFFERENCES))
    def test_keys(self, live, path):
        reference = Daemon.__new__(Daemon)
        reference.socket = str(STACK / "ref20.sock")
        try:
            reference.connect().close()
        except OSError:
            pytest.skip(f"no dockerd on {reference.socket}")
        if reference.ask("GET", f"/images/{BASE}/json").status != 200:
            reference.ask("POST", "/images/load?quiet=1", body=(STACK / "base.tar").read_bytes(), headers={"Content-Type": "application/x-tar"})
        theirs, ours = reference.ask("GET", "/v1.41" + path), live.ask("GET", "/v1.41" + path)
        assert theirs.status == ours.status == 200
        only_theirs, only_ours = compare(theirs.json, ours.json)
        known = self.DIFFERENCES[path]
        assert {each for each in only_theirs | only_ours if not any(each == name or each.startswith(name + ".") for name in known)} == set()

    @pytest.mark.parametrize("method, path", [("GET", "/images/nosuch/json"), ("DELETE", "/images/nosuch"), ("GET", "/images/nosuch/history"), ("POST", "/images/nosuch/tag?repo=x"),
                                              ("POST", f"/images/{BASE}/tag?repo=A"), ("GET", "/images/json?filters=x"), ("GET", "/containers/nosuch/json"), ("GET", "/nothing"),
                                              ("GET", "/v1.99/info"), ("GET", "/images/json?filters=%7B%22nope%22%3A%5B%22x%22%5D%7D"), ("POST", "/images/nosuch/push?tag=1"),
                                              ("GET", "/volumes/nosuch"), ("GET", "/networks/nosuch"), ("GET", "/nodes"), ("GET", "/plugins")])
    def test_refusals(self, live, method, path):
        reference = Daemon.__new__(Daemon)
        reference.socket = str(STACK / "ref20.sock")
        try:
            reference.connect().close()
        except OSError:
            pytest.skip(f"no dockerd on {reference.socket}")
        # What dockerd 20.10 still answered with 500, and later ones with these.
        known = {"POST /images/nosuch/push?tag=1": 404, f"POST /images/{BASE}/tag?repo=A": 400, "GET /images/json?filters=x": 400}
        headers = {"X-Registry-Auth": encoded({})}
        theirs = reference.ask(method, path, headers=headers).status
        assert live.ask(method, path, headers=headers).status == known.get(f"{method} {path}", theirs)


###############################################################################
# Ratios
###############################################################################


def median_of(rounds, action):
    """Median seconds of an action; None when it fails."""
    taken = []
    for _ in range(rounds):
        began = time.monotonic()
        if action() is False:
            return None
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


def bench_work(archive):
    """What is compared: name, the bare nerdctl command with its input, the API request with its body. The commands of each
    group can follow one another in any number of rounds."""
    data = {"Content-Type": "application/x-tar"}
    empty = {"X-Registry-Auth": encoded({})}
    name = "localhost:5000/nerdctld-bench"
    return [
        ("version", ["version", "--format", "{{json .}}"], None, ("GET", "/version", None, {})),
        ("info", ["info", "--format", "{{json .}}"], None, ("GET", "/info", None, {})),
        ("ps -a", ["ps", "-a", "--format", "{{json .}}"], None, ("GET", "/containers/json?all=1", None, {})),
        ("images", ["images", "--format", "{{json .}}"], None, ("GET", "/images/json", None, {})),
        ("image inspect", ["image", "inspect", BASE], None, ("GET", f"/images/{BASE}/json", None, {})),
        ("history", ["history", BASE], None, ("GET", f"/images/{BASE}/history", None, {})),
        ("network ls", ["network", "ls"], None, ("GET", "/networks", None, {})),
        ("volume ls", ["volume", "ls"], None, ("GET", "/volumes", None, {})),
        ("tag", ["tag", BASE, name + ":1"], None, ("POST", f"/images/{BASE}/tag?repo={name}&tag=1", None, {})),
        ("push", ["push", name + ":1"], None, ("POST", f"/images/{name}/push?tag=1", None, empty)),
        ("pull", ["pull", name + ":1"], None, ("POST", f"/images/create?fromImage={name}&tag=1", None, empty)),
        ("save", ["save", BASE], None, ("GET", f"/images/{BASE}/get", None, {})),
        ("load", ["load", "--all-platforms"], archive, ("POST", "/images/load?quiet=1", archive, data)),
        ("login", ["login", "-u", "u", "--password-stdin", "localhost:5000"], b"p",
         ("POST", "/auth", {"username": "u", "password": "p", "serveraddress": "localhost:5000"}, {})),
    ]


def bench_lives():
    """Two lives of a container, step by step: name, the words of the bare command, the API request. `{}` is the container."""
    body = {"Image": BASE, "Cmd": ["sh", "-c", "echo hello"]}
    sleeps = {"Image": BASE, "Cmd": ["sh", "-c", "echo hello; exec sleep 600"]}
    return {
        "life": [
            ("create", ["create", "--name", "{}", BASE, *body["Cmd"]], ("POST", "/containers/create?name={}", body)),
            ("start", ["start", "{}"], ("POST", "/containers/{}/start", None)),
            ("wait", ["wait", "{}"], ("POST", "/containers/{}/wait", None)),
            ("logs", ["logs", "{}"], ("GET", "/containers/{}/logs?stdout=1&stderr=1", None)),
            ("rm", ["rm", "{}"], ("DELETE", "/containers/{}", None)),
        ],
        "run -d": [
            ("create", ["create", "--name", "{}", BASE, *sleeps["Cmd"]], ("POST", "/containers/create?name={}", sleeps)),
            ("start", ["start", "{}"], ("POST", "/containers/{}/start", None)),
            ("logs", ["logs", "{}"], ("GET", "/containers/{}/logs?stdout=1&stderr=1", None)),
            ("exec", ["exec", "{}", "echo", "hi"], ("EXEC", "/containers/{}/exec", {"AttachStdout": True, "Cmd": ["echo", "hi"]})),
            ("rm -f", ["rm", "-f", "{}"], ("DELETE", "/containers/{}?force=1", None)),
        ],
    }


def bench_call(engine, call, name):
    """One step of a life through an engine; whether it went well."""
    method, path, body = call[0], call[1].format(name), call[2]
    if method != "EXEC":
        return engine.ask(method, path, body).status < 400
    made = engine.ask("POST", path, body)
    return made.status == 201 and b"hi" in engine.ask("POST", f"/exec/{made.json['Id']}/start", {"Detach": False}).body


def one_layer_image(name):
    """A docker archive of an image with a layer of its own."""
    layer = tar_of(("file", os.urandom(1000)))
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps({"architecture": nerdctld.GO_ARCHITECTURES.get(os.uname().machine, os.uname().machine), "os": "linux", "config": {"Cmd": ["sh"]},
                         "created": "2026-01-01T00:00:00Z", "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    return tar_of(("config.json", config), ("layer.tar", layer), ("manifest.json", manifest))


class Bench:
    """One run of the ratios: a daemon over the real nerdctl, and the peers that were named."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.archive = (STACK / "base.tar").read_bytes()
        self.environment = {"DOCKER_CONFIG": str(folder)}
        real("load", data=self.archive)
        self.daemon = Live(folder, "--namespace", NAMESPACE, environment=self.environment)
        self.peers = []
        for address in options.peer:
            peer = Daemon.__new__(Daemon)
            peer.socket = address.replace("unix://", "", 1)
            self.peers.append(peer)
            peer.ask("POST", "/images/load?quiet=1", self.archive, {"Content-Type": "application/x-tar"})

    def close(self):
        """End the daemon, take away the images."""
        self.daemon.end()
        real("rmi", "-f", *real("images", "--format", "{{.Name}}").stdout.decode().split())

    def bare(self, words, data=None):
        """An action that runs nerdctl."""
        return lambda: subprocess.run(["nerdctl", f"--namespace={NAMESPACE}", *words], input=data, capture_output=True, timeout=300,
                                      env={**os.environ, **self.environment}).returncode == 0

    @staticmethod
    def through(engine, call):
        """An action that makes an API call."""
        def action():
            answer = engine.ask(call[0], call[1], call[2], call[3] if len(call) > 3 else None)
            return answer.status < 400 and b'"errorDetail"' not in answer.body[-2000:]
        return action

    def line(self, name, alone, ours, theirs=(), unit=1000, adds=True):
        """Print a row: seconds as ms (or what `unit` makes of them), the ratio, what is added, the peers."""
        text = f"{name:26}" + "".join(f"{each * unit:12.2f}" if each else f"{'-':>12}" for each in (alone, ours))
        text += f"{ours / alone:8.2f}" if alone and ours else " " * 8
        text += f"{(ours - alone) * unit:9.1f}" if alone and ours and adds else " " * 9
        print(text + "".join(f"{f'{each * unit:.1f} ({ours / each:.2f}x)' if each and ours else '-':>18}" for each in theirs), flush=True)

    def memory(self, key="VmRSS", pid=None):
        """MB of the daemon, resident now or (VmHWM) at most."""
        return int(re.search(key + r":\s+(\d+)", pathlib.Path(f"/proc/{pid or self.daemon.process.pid}/status").read_text()).group(1)) / 1000

    def commands(self):
        """Each read and write as a command of its own, on a connection of its own."""
        # The event feed settles in half a second, and reads come from the snapshot then.
        self.daemon.ask("GET", "/containers/json?all=1")
        time.sleep(1)
        reads, writes = [], []
        for name, words, data, call in bench_work(self.archive):
            self.through(self.daemon, call)()
            alone, ours = median_of(self.options.rounds, self.bare(words, data)), median_of(self.options.rounds, self.through(self.daemon, call))
            if alone and ours:
                (reads if call[0] == "GET" else writes).append((ours - alone) * 1000)
            self.line(name, alone, ours, [median_of(self.options.rounds, self.through(peer, call)) for peer in self.peers])
        print(f"the daemon adds, at the median, {statistics.median(reads + writes):.1f} ms to a command ({statistics.median(reads):.1f} to a read, "
              f"{statistics.median(writes):.1f} to a write)")

    def lives(self):
        """The lives of containers, step by step and as a whole, by turns with bare nerdctl."""
        for life, steps in bench_lives().items():
            taken = collections.defaultdict(list)
            engines = [("nerdctl", None), ("daemon", self.daemon), *((each.socket, each) for each in self.peers)]
            for number in range(self.options.rounds):
                for title, engine in engines:
                    name, whole = f"nerdctld-bench-{number}", 0.0
                    for step, words, call in steps:
                        began = time.monotonic()
                        good = bench_call(engine, call, name) if engine else self.bare([each.format(name) for each in words])()
                        assert good is not False, (title, step)
                        taken[title, step].append(time.monotonic() - began)
                        whole += taken[title, step][-1]
                        # What a start leaves to containerd is not put down to what comes next.
                        time.sleep(0.1)
                    taken[title, "all of it"].append(whole)
            for step in [*(step for step, _, _ in steps), "all of it"]:
                alone, ours, *theirs = (statistics.median(taken[title, step]) for title, _ in engines)
                self.line(f"{life}: {step}", alone, ours, theirs)

    def reads(self):
        """Warm reads on one connection, as a client library keeps it."""
        name = f"/containers/{self.daemon.ask('POST', '/containers/create?name=nerdctld-bench', {'Image': BASE}).json['Id']}/json"
        for peer in self.peers:
            peer.ask("POST", "/containers/create?name=nerdctld-bench", {"Image": BASE})
        self.daemon.ask("GET", "/containers/json?all=1")
        time.sleep(1)
        for title, path in (("_ping", "/_ping"), ("version", "/version"), ("info", "/info"), ("ps", "/containers/json?all=1"), ("images", "/images/json"),
                            ("image inspect", f"/images/{BASE}/json"), ("container inspect", name), ("networks", "/networks"), ("volumes", "/volumes")):
            ours, *theirs = (self.kept(each, path if each is self.daemon else path.replace(name, "/containers/nerdctld-bench/json"), 100)
                             for each in (self.daemon, *self.peers))
            self.line("warm " + title, None, ours, theirs)
        for each in (self.daemon, *self.peers):
            each.ask("DELETE", "/containers/nerdctld-bench")

    @staticmethod
    def kept(engine, path, rounds):
        """Median seconds of a GET on one connection; None where it is refused."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = engine.connect()

        def action():
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            return answer.status == 200
        with contextlib.closing(connection):
            return median_of(rounds, action)

    def many(self):
        """`ps -a` over 300 containers: the first answer of a new daemon, and later ones on one connection."""
        for number in range(300):
            real("create", "--name", f"nerdctld-bench-{number}", "--network=none", BASE, "true")
        try:
            alone, cold = [], []
            for number in range(9):
                (self.folder / str(number)).mkdir()
                other = Live(self.folder / str(number), "--namespace", NAMESPACE)
                cold.append(median_of(1, self.through(other, ("GET", "/containers/json?all=1", None))))
                other.end()
                alone.append(median_of(1, self.bare(["ps", "-a", "--no-trunc"])))
            self.line("ps -a of 300, cold", statistics.median(alone), statistics.median(cold))
            self.line("ps -a of 300, warm", None, self.kept(self.daemon, "/containers/json?all=1", 30))
        finally:
            real("rm", *(f"nerdctld-bench-{number}" for number in range(300)), timeout=300)

    def churn(self):
        """Lists and inspects while two clients run short containers one after the other: median and worst, beside the peers."""
        body = {"Image": BASE, "Cmd": ["true"], "HostConfig": {"NetworkMode": "none"}}
        for engine in (self.daemon, *self.peers):
            ended, lives = threading.Event(), [0, 0]

            def run(number, engine=engine, ended=ended, lives=lives):
                while not ended.is_set():
                    name = f"nerdctld-bench-{number}"
                    assert engine.ask("POST", f"/containers/create?name={name}", body).status == 201
                    engine.ask("POST", f"/containers/{name}/start")
                    engine.ask("POST", f"/containers/{name}/wait")
                    assert engine.ask("DELETE", f"/containers/{name}").status == 204
                    lives[number] += 1

            engine.ask("DELETE", "/containers/nerdctld-bench?force=1")
            engine.ask("POST", "/containers/create?name=nerdctld-bench", {**body, "Cmd": ["sleep", "900"]})
            engine.ask("POST", "/containers/nerdctld-bench/start")
            runners = [threading.Thread(target=run, args=(number,)) for number in range(2)]
            for each in runners:
                each.start()
            try:
                for title, path in (("list", "/containers/json?all=1"), ("inspect", "/containers/nerdctld-bench/json")):
                    taken = []
                    until = time.monotonic() + max(10, self.options.rounds)
                    while time.monotonic() < until:
                        taken.append(median_of(1, self.through(engine, ("GET", path, None))) * 1000)
                        time.sleep(0.02)
                    print(f"churn: {title:10} {engine.socket:40} median {statistics.median(taken):8.2f} ms, worst {max(taken):8.1f} ms, {len(taken)} reads")
            finally:
                ended.set()
                for each in runners:
                    each.join(60)
                print(f"churn: {sum(lives)} lives of containers meanwhile")
                engine.ask("DELETE", "/containers/nerdctld-bench?force=1")

    def images(self):
        """50 images of one layer each: the first answer of a new daemon, against `images` and `image inspect` of all."""
        names = [f"nerdctld-bench-images:{number}" for number in range(50)]
        for name in names:
            with tempfile.TemporaryFile() as archive:
                archive.write(one_layer_image(name))
                archive.seek(0)
                subprocess.run(["nerdctl", f"--namespace={NAMESPACE}", "load", "-q"], stdin=archive, capture_output=True, timeout=60, check=True)
        alone, cold = [], []
        for number in range(5):
            folder = self.folder / f"images-{number}"
            folder.mkdir()
            other = Live(folder, "--namespace", NAMESPACE)
            cold.append(median_of(1, self.through(other, ("GET", "/images/json", None))))
            other.end()
            alone.append(sum(median_of(1, self.bare(words)) for words in (["images", "--no-trunc"], ["image", "inspect", "--mode=native", *names])))
        self.line("50 images, cold", statistics.median(alone), statistics.median(cold))

    def start(self):
        """The first answer after socket activation, and what the daemon holds: with the command of the unit."""
        if not shutil.which("systemd-socket-activate"):
            print("no systemd-socket-activate")
            return
        taken = []
        for number in range(self.options.rounds):
            path = self.folder / f"start-{number}"
            process = subprocess.Popen(["systemd-socket-activate", "-l", str(path), *(f"--setenv={name}" for name in ("PATH", "HOME")),
                                        *TestUnits.command(self.folder), f"--namespace={NAMESPACE}"], stderr=subprocess.DEVNULL)
            assert until(path.exists)
            time.sleep(0.2)
            found = Daemon.__new__(Daemon)
            found.socket = str(path)
            began = time.monotonic()
            found.ask("GET", "/_ping")
            taken.append(time.monotonic() - began)
            if number == self.options.rounds - 1:
                for each in ("/version", "/info", "/containers/json?all=1", "/images/json", "/networks", "/volumes"):
                    found.ask("GET", each)
                idle = self.memory(pid=process.pid)
            process.terminate()
            process.wait(20)
        self.line("first answer", None, statistics.median(taken[1:]))
        print(f"after a read of everything: {idle:.1f} MB resident")

    def streams(self):
        """MB/s of 200 MB through nerdctl into a pipe and through the daemon."""
        size = 200
        name, body = "nerdctld-bench", {"Image": BASE, "Cmd": ["sh", "-c", f"head -c {size}000000 /dev/urandom >/big; seq 2000000; touch /done; sleep 900"]}
        self.daemon.ask("POST", f"/containers/create?name={name}", body)
        self.daemon.ask("POST", f"/containers/{name}/start")
        assert until(lambda: real("exec", name, "ls", "/done").returncode == 0, 120)
        self.daemon.ask("POST", f"/commit?container={name}&repo={name}")
        highest = self.memory("VmHWM")
        for title, words, path in (
                ("export", ["export", name], f"/containers/{name}/export"), ("archive", ["cp", f"{name}:/big", "-"], f"/containers/{name}/archive?path=/big"),
                ("save", ["save", name], f"/images/{name}/get"), ("logs", ["logs", name], f"/containers/{name}/logs?stdout=1&stderr=1")):
            rates = [[], []]
            for _ in range(max(3, self.options.rounds // 2)):
                for rate, open_one in zip(rates, (lambda: self.bare_pipe(words), lambda: self.socket_pipe(path))):
                    rate.append(self.drained(open_one))
            self.line(f"{title}, MB/s", *(statistics.median(rate) for rate in rates), unit=1, adds=False)
        archive = self.daemon.ask("GET", f"/images/{name}/get").body
        alone, ours = (statistics.median(rate) for rate in zip(*((len(archive) / 1e6 / median_of(1, action) for action in (
            self.bare(["load"], archive), self.through(self.daemon, ("POST", "/images/load?quiet=1", archive, {"Content-Type": "application/x-tar"}))))
            for _ in range(3))))
        self.line("load, MB/s", alone, ours, unit=1, adds=False)
        print(f"resident: at most {highest:.1f} MB before, {self.memory('VmHWM'):.1f} MB after")
        self.daemon.ask("DELETE", f"/containers/{name}?force=1")

    @contextlib.contextmanager
    def bare_pipe(self, words):
        """A reader of what a nerdctl command writes."""
        with subprocess.Popen(["nerdctl", f"--namespace={NAMESPACE}", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
            yield lambda buffer: process.stdout.readinto(buffer)

    @contextlib.contextmanager
    def socket_pipe(self, path):
        """A reader of an answer, chunks and all."""
        with contextlib.closing(self.daemon.connect()) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            yield sock.recv_into

    @staticmethod
    def drained(open_one):
        """MB/s, from the start of the command or request."""
        began, total, buffer = time.monotonic(), 0, memoryview(bytearray(1 << 20))
        with open_one() as read:
            while True:
                count = read(buffer)
                if not count:
                    return total / 1e6 / (time.monotonic() - began)
                total += count

    @staticmethod
    def vertex_time(progress, name):
        """The seconds that a step of a build took by buildkitd's own clock, which tells of a step more than once."""
        told = [each for line in progress.splitlines() if line.startswith(b"{") for each in json.loads(line).get("vertexes") or ()]
        return max((nerdctld.nanoseconds_of(each["completed"]) - nerdctld.nanoseconds_of(each["started"])) / 1e9
                   for each in told if each.get("name") == name and each.get("completed"))

    def builds(self):
        """`docker build` of a context of 500 MB and of one of 5,000 files, against `buildctl build`; and, since docker and
        buildx do more than buildctl before and after, against buildx that goes to the same buildkitd without the daemon, and
        by the part in which the daemon has work: the context's way."""
        (self.folder / "bk").mkdir()
        builder = Builder(self.folder / "bk")
        try:
            builder.run("buildx", "create", "--name", "bench", "--driver", "remote", builder.address)
            print(f"{'':67}{'buildx alone':>18}")
            for title, count, size in (("context of 500 MB", 1, 500_000_000), ("5,000 small files", 5000, 1000)):
                context = self.folder / f"context-{count}"
                context.mkdir()
                # Only what is copied is sent.
                (context / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
                for number in range(count):
                    (context / f"file{number}").write_bytes(os.urandom(size))
                taken = [[], [], []], [[], [], []]
                for number in range(max(12, self.options.rounds // 2) + 1):
                    name, buildx = f"bench-{count}:{number}", ["build", "--progress=rawjson", str(context)]
                    jobs = list(enumerate((
                            ["buildctl", f"--addr={builder.address}", "build", "--progress=rawjson", "--frontend=dockerfile.v0", f"--local=context={context}",
                             f"--local=dockerfile={context}", f"--output=type=image,name=docker.io/library/{name}-a,unpack=true"],
                            ["docker", *buildx, "-t", f"{name}-b"],
                            ["docker", "buildx", "--builder=bench", *buildx, "--output", f"type=image,name=docker.io/library/{name}-c,unpack=true"])))
                    # Each in turn is the first, and none has to wait until what the one before it left is on the disk.
                    for place, words in jobs[number % 3:] + jobs[:number % 3]:
                        # What has changed is sent again, all of it.
                        for each in context.iterdir():
                            os.utime(each)
                        os.sync()
                        began = time.monotonic()
                        done = subprocess.run(words, env=builder.environment(), capture_output=True, timeout=200)
                        taken[0][place].append(time.monotonic() - began)
                        assert done.returncode == 0, done.stderr[-2000:]
                        taken[1][place].append(self.vertex_time(done.stdout + done.stderr, "[internal] load build context"))
                for part, times in zip((title, "  of which to send it"), taken):
                    # The first of each is slower for both: caches of the host.
                    alone, ours, theirs = (statistics.median(each[1:]) for each in times)
                    self.line(part, alone, ours, [theirs])
                shutil.rmtree(context)
            print(f"the daemon held at most {builder.memory() * 1.048576:.1f} MB")
        finally:
            builder.close()


BENCHES = ("commands", "lives", "reads", "many", "images", "churn", "start", "streams", "builds")


def bench(argv):
    """Print each read and write as a ratio to the bare nerdctl command for the same work, and to peers; the exit status."""
    parser = argparse.ArgumentParser(prog="test_nerdctld.py --bench")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these of {', '.join(BENCHES)}")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--peer", action="append", default=[], metavar="unix://PATH", help="another engine to compare with")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    if set(options.parts) - set(BENCHES):
        parser.error(f"no such part; there are {', '.join(BENCHES)}")
    reason = why_not_live()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        run = Bench(options, pathlib.Path(folder))
        print(f"{'medians':26}{'nerdctl ms':>12}{'daemon ms':>12}{'ratio':>8}{'adds ms':>9}" + "".join(f"{os.path.basename(each.socket)[:16]:>18}" for each in run.peers))
        try:
            for part in options.parts or BENCHES:
                getattr(run, part)()
        finally:
            run.close()
    return 0


###############################################################################
# Endurance
###############################################################################

JUNK = ("", "0", "1", "-1", "true", "null", "1e9", "nan", "inf", "9" * 30, "9" * 5000, "-", "--help", "-v", "a b", "é", "\ud800", "\x7f", "\0", "..", ".", "a:b:c",
        "@", "=", "a=b", ":", "{", "[]", '{"a"', "%", "%zz", "%ff", "%00", "%2e%2e", "\U0001f40b", "a" * 300, "sha256:" + "0" * 64, "'", "\n", "$x", "2026-13-45T99:99:99Z")
FIELDS = tuple(sorted(set(re.findall(r'"([A-Z][A-Za-z0-9]+)"', SOURCE))))
KEYS = tuple(sorted(set(re.findall(r'request\.(?:value|values|flag|integer|timestamp|json|filters)\("(\w+)"', SOURCE)))) + ("filters", "t", "q")
FILTERS = ("label", "name", "id", "status", "before", "since", "until", "dangling", "reference", "ancestor", "exited", "health", "volume", "network", "type", "event")


class Malformed:
    """A seeded source of requests that are wrong somewhere."""

    def __init__(self, seed, names):
        self.random, self.names = random.Random(seed), names
        # Half of them are wrong in few places, and get further.
        self.calm = self.random.random() < 0.5

    def word(self):
        """A name there may be, or junk."""
        return self.random.choice(self.names if self.random.random() < (0.95 if self.calm else 0.5) else JUNK)

    def value(self, depth=0):
        """Something JSON can say."""
        kind = self.random.randrange(12 if depth < 4 else 8)
        if kind < 8:
            return self.random.choice((None, True, False, 0, -1, 10**400, 1.5, -2**63, [], {}, self.word(), self.word()))
        if kind < 9:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return {self.random.choice(FIELDS if self.random.random() < 0.8 else JUNK): self.value(depth + 1) for _ in range(self.random.randrange(6))}

    def document(self, path):
        """A JSON body: one that is nearly right, or anything."""
        if path.startswith("/auth"):
            return json.dumps({"username": self.word(), "password": self.word(), "serveraddress": "localhost:1"}).encode()
        some = self.random.choice(({"Image": BASE, "Cmd": ["true"], "HostConfig": {}, "NetworkingConfig": {"EndpointsConfig": {}}}, {"Name": "fuzz"}, {}))
        if isinstance(some, dict):
            for _ in range(self.random.randrange(5)):
                where = self.random.choice([some, *(each for each in some.values() if isinstance(each, dict))])
                where[self.random.choice(FIELDS)] = self.value(1)
        some = some if self.random.random() < 0.7 else self.value()
        text = json.dumps(some) if self.random.random() < 0.95 else "[" * 100000
        return self.damaged(text.encode(), 0.2)

    def damaged(self, data, likely):
        """The bytes, with some likelihood wrong in places."""
        data, likely = bytearray(data), likely / 4 if self.calm else likely
        while data and self.random.random() < likely:
            at = self.random.randrange(len(data))
            kind = self.random.randrange(4)
            if kind == 0:
                data[at] = self.random.randrange(256)
            elif kind == 1:
                del data[at:at + self.random.randrange(1, 50)]
            elif kind == 2:
                data[at:at] = self.random.choice((b"\0", b"\r\n", b"\xff", b"\xed\xa0\x80", b"[" * 50))
            else:
                del data[at:]
        return bytes(data)

    def query(self):
        """A query string with its question mark, or none."""
        parts = []
        for _ in range(self.random.choice((0, 0, 0, 1, 2, 5))):
            key = self.random.choice(KEYS if self.random.random() < 0.9 else JUNK)
            value = self.word()
            if key == "filters" and self.random.random() < 0.9:
                some = self.random.choice(([self.word()], {self.word(): True}, self.word(), None, [1]))
                value = json.dumps({self.random.choice(FILTERS if self.random.random() < 0.9 else JUNK): some})
            elif key in ("buildargs", "labels", "cachefrom", "changes", "platform"):
                value = json.dumps(self.value())
            quoted = self.random.random() < 0.95
            parts.append((urllib.parse.quote(key, errors="surrogatepass") + "=" + urllib.parse.quote(value, errors="surrogatepass")) if quoted else f"{key}={value}")
        return "?" + "&".join(parts) if parts else ""

    def target(self):
        """A method and a target; those that ask a registry name one of this machine that is not there."""
        route = self.random.choice(nerdctld.ROUTES)
        if route.handler is nerdctld.swarm_refused:
            route = self.random.choice(nerdctld.ROUTES)
        if route.path in ("/distribution/{image}/json", "/images/create", "/images/{image}/push", "/images/search", "/auth"):
            nowhere = urllib.parse.quote("localhost:1/" + (self.word().strip("/") or "x"), errors="surrogatepass", safe="/:")
            return route.method, route.path.replace("{image}", nowhere) + f"?fromImage={nowhere}&term={nowhere}&tag={self.random.choice(('1', '%ff', '', 'a%20b'))}"
        path = re.sub(r"\{\w+\}", lambda _: urllib.parse.quote(self.word(), errors="surrogatepass", safe="/:"), route.path)
        if self.calm:
            return route.method, "/v1.44" + path + self.query()
        version = self.random.choice(("", "/v1.24", "/v1.41", "/v1.56") * 6 + ("/v1.99", "/v0.1", "/v1", "/v1.", "/v1.2.3", "/v-1.4", f"/v1.{'9' * 5000}", "//v1.41"))
        method = route.method if self.random.random() < 0.9 else self.random.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PRI", "get", "X" * 99, ""))
        return method, version + path + self.query()

    def tar(self):
        """An archive with something odd in it."""
        inside = self.random.choice(("Dockerfile", "../x", "/x", "a" * 200, "é", "."))
        data = tar_of(("Dockerfile", self.random.choice((b"FROM localhost:1/x\n", b"\0\xff", b""))), (inside, b"x" * self.random.randrange(2000)))
        data = self.random.choice((data, data, gzip.compress(data), bz2.compress(data), b"\x28\xb5\x2f\xfd", lzma.compress(data)))
        return self.damaged(data, 0.6)

    def frames(self):
        """Bytes for a connection that was handed over: of HTTP/2, of a WebSocket or of nothing."""
        kind = self.random.randrange(3)
        if kind == 0:
            some = b"".join(frame(self.random.randrange(12), self.random.randrange(256),
                                  self.random.choice((0, 1, 2, 3, 2**31 - 1)),
                                           self.random.randbytes(self.random.choice((0, 1, 4, 5, 8, 50)))) for _ in range(self.random.randrange(8)))
            some = nerdctld.PREFACE + frame(4, 0, 0) + some
        elif kind == 1:
            some = b"".join(client_frame(self.random.randbytes(self.random.choice((0, 1, 125, 126, 70000))), self.random.randrange(16),
                                         final=self.random.choice((0, 0x80, 0xf0))) for _ in range(self.random.randrange(5)))
        else:
            some = self.random.randbytes(self.random.randrange(300))
        return self.damaged(some, 0.3)

    def headers(self):
        """Lines of a head, some of them wrong."""
        junk = self.random.choice(JUNK)
        auth = base64.urlsafe_b64encode(json.dumps(self.value()).encode())
        many = (b"Host: x", b"Connection: keep-alive", b"Connection: close", b"Expect: 100-continue", b"Expect: x", b"Content-Type: text/plain", b"Content-Type:",
                b"X-Registry-Auth: " + auth, b"X-Registry-Config: " + auth, b"X-Registry-Auth: ~", b"no colon", b" folded: x", b": x", b"X: " + b"x" * 70000,
                b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, chunked", b"Content-Length: 1\r\nContent-Length: 2", b"Content-Length: -1", b"Content-Length: +3",
                b"Content-Length: " + b"9" * 5000, b"Content-Length: 0x10", b"Content-Encoding: gzip", b"Upgrade: tcp\r\nConnection: Upgrade",
                b"Upgrade: h2c\r\nConnection: Upgrade", b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
                b"X-Junk: " + junk.encode(errors="surrogatepass"), b"\r\n".join(b"X%d: y" % each for each in range(120)))
        return [self.random.choice(many) for _ in range(self.random.choice((0, 0, 0, 0, 0, 1, 2)))]

    def chunked(self, data):
        """The body in chunks, some of them wrong."""
        parts = []
        for at in range(0, len(data), 1000):
            part = data[at:at + 1000]
            parts.append(b"%x\r\n%b\r\n" % (len(part), part))
        return self.damaged(b"".join(parts) + b"0\r\n\r\n", 0.3)

    def request(self):
        """The bytes of a request."""
        method, target = self.target()
        lines = [] if self.calm else self.headers()
        upgrades = "/grpc" in target or "/session" in target or "/attach" in target or ("/exec/" in target and "/start" in target)
        if upgrades and self.random.random() < 0.8:
            kind = b"websocket" if "/ws" in target else b"h2c"
            lines.append(b"Connection: Upgrade\r\nUpgrade: " + kind + b"\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
            body = self.frames()
        else:
            body = b"" if method in ("GET", "HEAD") else self.tar() if "archive" in target or "/build" in target or "/load" in target else self.document(target)
            if body and self.random.random() < 0.8:
                lines.append(b"Content-Type: application/" + (b"json" if body[:1] in b"{[" else b"x-tar"))
                if self.random.random() < 0.3:
                    lines, body = [*lines, b"Transfer-Encoding: chunked"], self.chunked(body)
                else:
                    lines.append(b"Content-Length: %d" % max(0, len(body) + (0 if self.calm else self.random.choice((0, 0, 0, 0, 0, 1, -1, 5000)))))
        protocol = "HTTP/1.1" if self.calm else self.random.choice(("HTTP/1.1",) * 80 + ("HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.x", "HTTP/", "", "FTP/1.1", "HTTP/1.1 x"))
        first = f"{method} {target} {protocol}".encode(errors="surrogatepass")
        return self.damaged(b"\r\n".join([self.damaged(first, 0.02), *lines, b"", b""]), 0.03) + body


def footprint(pid, folder):
    """What a process holds: descriptors, threads, children, files in its folder for temporary ones, resident KiB."""
    base = pathlib.Path(f"/proc/{pid}")
    children = 0
    for task in (base / "task").iterdir():
        with contextlib.suppress(OSError):
            children += len((task / "children").read_text().split())
    files = sum(len(found) for _, *both in os.walk(folder) for found in both) if folder else 0
    status = (base / "status").read_text()
    return {"descriptors": len(os.listdir(base / "fd")), "threads": len(os.listdir(base / "task")), "children": children, "files": files,
            "rss": int(re.search(r"VmRSS:\s+(\d+)", status).group(1))}


def peer_of(path):
    """The process that listens on a socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def throw(path, data, leaves, bound=30.0):
    """Send bytes and stop sending; (status or 0, the words of a 500). AssertionError when neither an answer nor a close comes.
    `leaves`: go without reading it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(bound)
        sock.connect(path)
        told = b""
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            with contextlib.suppress(ConnectionError, BrokenPipeError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            if leaves:
                return 0, ""
            while len(told) < 1 << 16:
                try:
                    part = sock.recv(65536)
                except socket.timeout:
                    raise AssertionError(f"no answer within {bound} s") from None
                told += part
                head, end, body = told.partition(b"\r\n\r\n")
                if not part or (end and not head.startswith((b"HTTP/1.1 500", b"HTTP/1.1 100"))) or b'"}' in body:
                    break
    found = re.findall(rb"^HTTP/1\.1 (\d{3}) ", told, re.M)
    status = int(found[-1]) if found else 0
    return status, told.partition(b"\r\n\r\n")[2].decode(errors="replace") if status == 500 else ""


class Fuzz:
    """Throws malformed requests at a daemon from several threads and notes what must not be. `ours` tells a 500 that is the
    daemon's own from one that nerdctl's failure is."""

    WORKERS = 4

    def __init__(self, path, seed, names, ours):
        self.path, self.seed, self.names, self.ours = path, seed, names, ours
        self.problems, self.statuses, self.lock = [], collections.Counter(), threading.Lock()

    def one(self, number):
        """Throw the request with this number."""
        source = Malformed(f"{self.seed}.{number}", self.names)
        data = source.request()
        try:
            status, words = throw(self.path, data, source.random.random() < 0.1)
            problem = words if status == 500 and self.ours(words) else ""
        except (AssertionError, OSError) as error:
            status, problem = 0, repr(error)
        with self.lock:
            self.statuses[status] += 1
            if problem:
                self.problems.append(f"number {number}: {problem.strip()}: {data[:600]!r}")

    def throw(self, numbers):
        """Throw those with these numbers."""
        left = iter(numbers)

        def work():
            while len(self.problems) < 50:
                with self.lock:
                    number = next(left, None)
                if number is None:
                    return
                self.one(number)
        threads = [threading.Thread(target=work) for _ in range(self.WORKERS)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()


def fuzz_run(path, count, seed, names, ours, folder="", warm=500):
    """Throw `count` requests after some to warm up: (the Fuzz, footprint before, footprint after), settled both times."""
    pid = peer_of(path)
    found = Fuzz(path, seed, names, ours)

    def settled(bounds):
        until(lambda: all(footprint(pid, folder)[name] <= most for name, most in bounds.items()), 30)
        return footprint(pid, folder)
    found.throw(range(warm))
    before = settled({"threads": 12, "children": 1})
    found.throw(range(warm, warm + count))
    after = settled({name: before[name] + 4 for name in ("descriptors", "threads", "children", "files")})
    if throw(path, b"GET /_ping HTTP/1.1\r\n\r\n", False, 10)[0] != 200:
        found.problems.append("_ping does not answer afterwards")
    for name in ("descriptors", "threads", "children", "files"):
        # A resident call or two come and go with what was asked last.
        if after[name] > before[name] + 4:
            found.problems.append(f"{name} grew from {before[name]} to {after[name]}")
    if after["rss"] > before["rss"] + (64 << 10):
        found.problems.append(f"rss grew from {before['rss']} to {after['rss']} KiB")
    return found, before, after


def fuzzed_daemon(folder, fake):
    """A daemon over a fake containerd, and a scripted nerdctl that does most of what it is told."""
    (folder / "scripted").mkdir()
    (folder / "tmp").mkdir()
    scripted = Scripted(folder / "scripted")
    furnish(scripted, fake, folder)
    # What waits for an event that never comes is not in the script.
    for name in (*(set(NAMES) - {"kill", "start", "stop"}), "exec", "logs", "network create", "network rm", "volume create", "volume rm", "tag", "rmi", "cp", "build"):
        scripted.on(name)
    scripted.on("pull", PULL)
    scripted.on("create", stdout=ID + "\n")
    return Daemon(folder, "--nerdctl", str(scripted.program), "--address", fake.path, "--debug", "--buildkit-host", f"unix://{folder}/nosuch.sock",
                  environment={"TMPDIR": str(folder / "tmp")})


FUZZ_NAMES = ("tstweb", "tstdone", "tstnew", "tstpaused", "tstvol", "tstnet", ID, BASE, "bridge", "none", "host", "busybox", "nosuch")


# Why a 500 is not the daemon's own: the script said so (a line break in a name cuts its words), the registry is not there,
# nerdctl was ended because the client had left, the fake containerd has no mounts of a container, or dockerd answers so, too.
OUTSIDE = re.compile(r'no upgrade proto in request|not in the script|"\\"not"|cannot ask [^ ]*: \[Errno|nerdctl failed without a word|snapshot [0-9a-f]+ does not exist|'
                     'files cannot be reached')


def fuzz_scripted(folder, count, seed, warm=500):
    """Throw at a daemon over a scripted nerdctl; as fuzz_run, with the tracebacks in its log among the problems."""
    fake = FakeContainerd(folder)
    daemon = fuzzed_daemon(folder, fake)
    try:
        found = fuzz_run(daemon.socket, count, seed, FUZZ_NAMES, lambda words: not OUTSIDE.search(words), folder / "tmp", warm)
    finally:
        status = daemon.end()
        fake.close()
    log = daemon.log.read_text(errors="replace")
    found[0].problems += ["traceback" + each.partition("\nnerdctld: ")[0][:3000] for each in log.split("Traceback (most recent call last)")[1:6]]
    if status:
        found[0].problems.append(f"it ended with {status}")
    return found


def fuzz(argv):
    """Throw malformed requests, print what came and what must not; the exit status."""
    parser = argparse.ArgumentParser(prog="test_nerdctld.py --fuzz")
    parser.add_argument("--fuzz", type=int, metavar="N", required=True)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--socket", help="of a daemon that runs, over a nerdctl namespace that may be spoilt")
    options = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if options.socket:
            found, before, after = fuzz_run(options.socket, options.fuzz, options.seed, FUZZ_NAMES, lambda words: "internal error" in words)
        else:
            found, before, after = fuzz_scripted(pathlib.Path(folder), options.fuzz, options.seed)
    print(f"{sum(found.statuses.values())} requests in {time.monotonic() - began:.0f} s; statuses {dict(sorted(found.statuses.items()))}")
    print(f"before {before}\nafter  {after}")
    for each in found.problems:
        print(each)
    return 1 if found.problems else 0


class TestEndurance:
    def test_a_client_that_left_before_its_100(self):
        # Its other end is closed: the 100 cannot be sent.
        ours, theirs = socket.socketpair()
        theirs.close()
        with ours, ours.makefile("wb", buffering=0) as wfile, ours.makefile("rb") as rfile:
            handler = types.SimpleNamespace(wfile=wfile, rfile=rfile, close_connection=False)
            with pytest.raises(nerdctld.ClientGone):
                nerdctld.Body(handler, 5, False, True).read()
            assert handler.close_connection

    @pytest.mark.parametrize("name", ["9" * 5000, "²", "0", "65"])
    def test_a_signal_that_is_no_number_of_one(self, furnished, name):
        assert ask(furnished, "POST", "/containers/tstweb/kill?signal=" + urllib.parse.quote(name)).status == 400

    @pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
    def test_a_context_that_breaks_off(self, compress, tmp_path):
        whole = compress(CONTEXT)
        for size in (*range(1, 24), len(whole) // 2):
            with pytest.raises(nerdctld.BadParameter):
                nerdctld.unpack_context(BlockBody(whole[:size]), str(tmp_path))

    def test_a_network_that_is_gone_once_it_is_made(self, furnished, scripted):
        scripted.on("network create")
        assert ask(furnished, "POST", "/networks/create", {"Name": "brief"}).status == 404

    def test_malformed_requests(self, tmp_path):
        found, _, _ = fuzz_scripted(tmp_path, 200, 20261124, 100)
        assert not found.problems, "\n".join(found.problems[:5])
        # Most parts of the daemon were reached.
        assert {101, 200, 400, 404, 500, 501, 503} <= set(found.statuses), found.statuses


KILLED = "nerdctld-killed"


class Sudden:
    """Clients that work on a daemon until it is killed, and what they have been promised by then: `there` (id -> name) and
    `gone` (ids removed, or removed by themselves once started), and `open` (names about which there was no answer)."""

    def __init__(self, daemon, seed):
        self.daemon, self.seed = daemon, seed
        self.there, self.gone, self.open, self.stop, self.wrong = {}, {}, set(), threading.Event(), []
        self.writing = set()
        actions = (self.keep, self.keep, self.brief, self.typed, self.typed, self.counting, self.look, self.load)
        self.threads = [threading.Thread(target=self.work, args=(action, number)) for number, action in enumerate(actions)]
        for each in self.threads:
            each.start()

    def work(self, action, number):
        """Repeat one thing until the daemon is gone."""
        source = random.Random(f"{self.seed}.{number}")
        while not self.stop.is_set():
            # In the middle of an answer too.
            try:
                with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                    action(source, f"k{number}-{source.randrange(10**9)}")
            except (AssertionError, KeyError) as error:
                self.wrong += [] if self.stop.is_set() else [f"{action.__name__}: {error!r}"]

    def end(self):
        """Kill the daemon; wait for the clients."""
        # Told first, or they would go on against nobody; each is in the middle of something.
        self.stop.set()
        self.daemon.process.kill()
        self.daemon.process.wait()
        for each in self.threads:
            each.join()

    def create(self, name, **more):
        """The id of a new container."""
        self.open.add(name)
        answer = self.daemon.ask("POST", f"/containers/create?name={name}", {"Image": BASE, **more})
        self.open.discard(name)
        assert answer.status == 201, answer.body
        self.there[answer.json["Id"]] = name
        return answer.json["Id"]

    def remove(self, identity):
        """Take one away again."""
        name = self.there.pop(identity)
        self.open.add(name)
        if self.daemon.ask("DELETE", f"/containers/{identity}?force=1").status == 204:
            self.open.discard(name)
            self.gone[identity] = name

    def keep(self, source, name):
        identity = self.create(name, Cmd=["sleep", "1000"], HostConfig={"NetworkMode": "none"})
        self.daemon.ask("POST", f"/containers/{identity}/start")
        made = self.daemon.ask("POST", f"/containers/{identity}/exec", {"Cmd": ["true"], "AttachStdout": True}).json
        self.daemon.ask("POST", f"/exec/{made['Id']}/start", {})
        if source.random() < 0.5:
            self.remove(identity)

    def brief(self, source, name):
        identity = self.create(name, Cmd=["sleep", str(source.random())], HostConfig={"NetworkMode": "none", "AutoRemove": True})
        started = self.there.pop(identity)
        self.open.add(started)
        if self.daemon.ask("POST", f"/containers/{identity}/start").status == 204:
            self.open.discard(started)
            self.gone[identity] = started

    def typed(self, source, name):
        """One with stdin, whose streams are FIFOs of the daemon."""
        identity = self.create(name, Cmd=["cat"], OpenStdin=True, StdinOnce=True, AttachStdin=True, HostConfig={"NetworkMode": "none"})
        with self.daemon.connect() as sock:
            sock.sendall(f"POST /containers/{identity}/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n".encode())
            sock.recv(4096)
            self.daemon.ask("POST", f"/containers/{identity}/start")
            sock.sendall(b"typed\n")
            sock.recv(100)
        if source.random() < 0.5:
            self.remove(identity)

    def counting(self, source, name):
        """One that writes all the time, to FIFOs of the daemon, also while there is none."""
        identity = self.create(name, Cmd=["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"], OpenStdin=True, HostConfig={"NetworkMode": "none"})
        if self.daemon.ask("POST", f"/containers/{identity}/start").status == 204:
            self.writing.add(identity)
        time.sleep(source.uniform(0, 1))
        if source.random() < 0.5:
            self.writing.discard(identity)
            self.remove(identity)

    def look(self, source, name):
        for each in list(self.there)[:3]:
            self.daemon.ask("GET", f"/containers/{each}/logs?stdout=1")
            with self.daemon.connect() as sock:
                sock.sendall(f"GET /containers/{each}/logs?stdout=1&follow=1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                sock.recv(4096)
        self.daemon.ask("GET", "/containers/json?all=1")

    def load(self, source, name):
        self.daemon.ask("POST", "/images/load?quiet=1", (STACK / "base.tar").read_bytes(), {"Content-Type": "application/x-tar"})
        self.daemon.ask("POST", "/build", CONTEXT, TAR)

    def names(self):
        """Those of all containers there are, as the bare nerdctl tells them."""
        return real("ps", "-a", "--format", "{{.Names}}", namespace=KILLED).stdout.decode().split()

    def broken(self, daemon):
        """What the next daemon does not hold of what this one promised, in words; with what is open tidied up."""
        found = list(self.wrong)

        def settled(what, condition):
            if not until(condition, 20):
                found.append(what)
        names = self.names
        # What it had nerdctl do when it was killed is done to its end.
        settled("nerdctl goes on", lambda: subprocess.run(["pgrep", "-f", f"nerdctl --namespace={KILLED} "], stdout=subprocess.DEVNULL).returncode)
        for identity in self.writing:
            lines = lambda: [int(each[8:]) for each in daemon.ask("GET", f"/containers/{identity}/logs?stdout=1").body.splitlines()]
            before = len(lines())
            settled(f"{self.there[identity]} writes no more", lambda: len(lines()) > before)
            numbers = lines()
            holes = [number for last, number in zip(numbers, numbers[1:]) if number != last + 1]
            if holes or numbers[:1] != [0]:
                found.append(f"{self.there[identity]} has lost output before {holes or numbers[:1]} of {len(numbers)}")
        for identity, name in self.there.items():
            settled(f"{name} is lost", lambda: daemon.ask("GET", f"/containers/{identity}/json").status == 200)
            answer = daemon.ask("GET", f"/containers/{identity}/json")
            if answer.status == 200 and answer.json["Name"] != "/" + name:
                found.append(f"{name} is now {answer.json['Name']}")
            if answer.status == 200 and answer.json["State"]["Status"] == "created":
                started = daemon.ask("POST", f"/containers/{identity}/start")
                if started.status != 204:
                    found.append(f"{name} does not start: {started.body!r}")
        for identity, name in self.gone.items():
            settled(f"{name} is still there", lambda: daemon.ask("GET", f"/containers/{identity}/json").status == 404)
        for name in [*self.there.values(), *self.open]:
            settled(f"{name} cannot be removed", lambda: daemon.ask("DELETE", f"/containers/{name}?force=1").status == 404)
        for name in list(self.open)[:4]:
            answer = daemon.ask("POST", f"/containers/create?name={name}", {"Image": BASE, "HostConfig": {"NetworkMode": "none"}})
            if answer.status != 201 or daemon.ask("DELETE", f"/containers/{name}?force=1").status != 204:
                found.append(f"the name {name} cannot be had: {answer.body!r}")
        settled("containers are left", lambda: not names())
        if names():
            found.append(f"left: {real('ps', '-a', '--no-trunc', namespace=KILLED).stdout.decode()}")
        return found


def kill_run(folder, count, seed, tell=lambda words: None):
    """Kill a daemon `count` times under load; problems in words, and the most temporary folders there were at once."""
    source, problems, most = random.Random(seed), [], 0
    temporary = folder / "tmp"
    temporary.mkdir()
    real("load", data=(STACK / "base.tar").read_bytes(), namespace=KILLED)
    start = lambda: Live(folder, "--namespace", KILLED, "--debug", environment={"TMPDIR": str(temporary)})
    daemon = start()
    try:
        for number in range(count):
            load = Sudden(daemon, f"{seed}.{number}")
            time.sleep(source.uniform(0.3, 3.0))
            load.end()
            daemon = start()
            found = load.broken(daemon)
            left = len(list(temporary.iterdir()))
            most = max(most, left)
            if left > 1:
                found.append(f"{left} temporary folders: {os.listdir(temporary)}")
            problems += [f"kill {number}: {each}" for each in found]
            tell(f"kill {number}: {len(load.there)} kept, {len(load.gone)} gone, {len(load.open)} open: {found or 'good'}")
    finally:
        daemon.end()
        names = real("ps", "-aq", namespace=KILLED).stdout.decode().split()
        if names:
            real("rm", "-f", *names, namespace=KILLED)
        images = real("images", "--format", "{{.Name}}", namespace=KILLED).stdout.decode().split()
        if images:
            real("rmi", "-f", *images, namespace=KILLED)
        real("namespace", "rm", KILLED)
    trace = daemon.log.read_text(errors="replace").split("Traceback (most recent call last)")[1:]
    return problems + ["traceback" + each.partition("\nnerdctld: ")[0][:3000] for each in trace[:5]], most


def kills(argv):
    """Kill a daemon over the real nerdctl again and again, print what it did not keep; the exit status."""
    parser = argparse.ArgumentParser(prog="test_nerdctld.py --kills")
    parser.add_argument("--kills", type=int, metavar="N", required=True)
    parser.add_argument("--seed", default="1")
    options = parser.parse_args(argv)
    reason = why_not_live()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        problems, most = kill_run(pathlib.Path(folder), options.kills, options.seed, lambda words: print(words, flush=True))
    print(f"{options.kills} kills, {len(problems)} problems, at most {most} temporary folders at once")
    for each in problems:
        print(each)
    return 1 if problems else 0


class TestLiveKills:
    def test_nothing_promised_is_lost(self, live_daemons, tmp_path):
        problems, _ = kill_run(tmp_path, 3, 20261124)
        assert not problems, "\n".join(problems)


BOTH = "nerdctld-both"


class BothSides:
    """Random changes in one namespace by way of the daemon and of the bare nerdctl; `model` is what there has to be:
    containers (name -> whether it runs), images, networks and volumes."""

    def __init__(self, daemon, seed):
        self.daemon, self.random, self.count = daemon, random.Random(seed), 0
        self.model = {"containers": {}, "images": {BASE}, "networks": set(), "volumes": set()}
        self.waits = {"own": [], **{kind: [] for kind in self.model}}

    def ours(self):
        """The daemon's lists."""
        get = lambda path: self.daemon.ask("GET", path).json
        return {"containers": {each["Names"][0][1:]: each["State"] == "running" for each in get("/containers/json?all=1")},
                "images": {tag for each in get("/images/json") for tag in each["RepoTags"] or ()},
                "networks": {each["Name"] for each in get("/networks") if each["Name"].startswith("both")},
                "volumes": {each["Name"] for each in get("/volumes")["Volumes"]}}

    def bare(self):
        """The lists of the bare nerdctl."""
        lines = lambda *words: real(*words, namespace=BOTH).stdout.decode().splitlines()
        return {"containers": {name: status.startswith("Up") for name, _, status in (each.partition("\t") for each in lines("ps", "-a", "--format", "{{.Names}}\t{{.Status}}"))},
                "images": {each for each in lines("images", "--format", "{{.Name}}") if each.startswith("localhost:5000/")},
                "networks": {each for each in lines("network", "ls", "--format", "{{.Name}}") if each.startswith("both")},
                "volumes": set(lines("volume", "ls", "-q"))}

    def change(self):
        """One change in the model: (kind, the request, the words of nerdctl for the same)."""
        self.count += 1
        new, model = f"both{self.count}", self.model
        containers = model["containers"]
        some = self.random.choice(sorted(containers) or [""])
        image = self.random.choice(sorted(model["images"] - {BASE}) or [""])
        network, volume = (self.random.choice(sorted(model[each]) or [""]) for each in ("networks", "volumes"))
        tag = f"localhost:5000/{new}:1"
        makes = [("containers", lambda: containers.update({new: False}), ("POST", f"/containers/create?name={new}", {"Image": BASE, "Cmd": ["sleep", "1000"], "HostConfig": {"NetworkMode": "none"}}),
                  ["create", "--network=none", f"--name={new}", BASE, "sleep", "1000"]),
                 ("images", lambda: model["images"].add(tag), ("POST", f"/images/{BASE}/tag?repo=localhost:5000/{new}&tag=1"), ["tag", BASE, tag]),
                 ("networks", lambda: model["networks"].add(new), ("POST", "/networks/create", {"Name": new}), ["network", "create", new]),
                 ("volumes", lambda: model["volumes"].add(new), ("POST", "/volumes/create", {"Name": new}), ["volume", "create", new])]
        others = []
        if some:
            others += [("containers", lambda: containers.pop(some), ("DELETE", f"/containers/{some}?force=1"), ["rm", "-f", some]),
                       ("containers", lambda: containers.update({new: containers.pop(some)}), ("POST", f"/containers/{some}/rename?name={new}"), ["rename", some, new]),
                       ("containers", lambda: containers.update({some: True}), ("POST", f"/containers/{some}/start"), ["start", some]) if not containers[some] else
                       ("containers", lambda: containers.update({some: False}), ("POST", f"/containers/{some}/stop?t=0"), ["stop", "-t", "0", some])] * 2
        if image:
            others.append(("images", lambda: model["images"].discard(image), ("DELETE", f"/images/{image}"), ["rmi", image]))
        if network:
            others.append(("networks", lambda: model["networks"].discard(network), ("DELETE", f"/networks/{network}"), ["network", "rm", network]))
        if volume:
            others.append(("volumes", lambda: model["volumes"].discard(volume), ("DELETE", f"/volumes/{volume}"), ["volume", "rm", volume]))
        return self.random.choice(self.random.choice((makes, others or makes)))

    def step(self):
        """Make a change and compare; what is wrong in words, or ""."""
        kind, apply, request, words = self.change()
        own = self.random.random() < 0.5
        if own:
            answer = self.daemon.ask(*request)
            good, told = answer.status < 400, answer.body
        else:
            done = real(*words, namespace=BOTH)
            good, told = done.returncode == 0, done.stderr
        began = time.monotonic()
        if not good:
            return f"{request if own else words}: {told!r}"
        apply()
        ours = self.ours()
        if own and ours != self.model:
            return f"after {request}: {ours} is not {self.model}"
        while ours != self.model and time.monotonic() - began < 5:
            ours = self.ours()
        self.waits["own" if own else kind].append(time.monotonic() - began)
        if ours != self.model:
            return f"5 s after {words}: {ours} is not {self.model}"
        bare = self.bare()
        return f"after {request if own else words} nerdctl has {bare} and not {self.model}" if bare != self.model else ""


def both_run(folder, count, seed):
    """Make `count` changes from both sides: (what is wrong in words, kind -> seconds until the lists had each)."""
    real("load", data=(STACK / "base.tar").read_bytes(), namespace=BOTH)
    daemon = Live(folder, "--namespace", BOTH, "--debug")
    sides = BothSides(daemon, seed)
    try:
        for _ in range(count):
            problem = sides.step()
            if problem:
                return problem, sides.waits
        return "", sides.waits
    finally:
        daemon.end()
        for words in (["rm", "-f"], ["rmi", "-f"], ["network", "rm"], ["volume", "rm"]):
            found = {"rm": "ps -aq", "rmi": "images --format {{.Name}}", "network": "network ls --format {{.Name}}", "volume": "volume ls -q"}[words[0]]
            names = real(*found.split(), namespace=BOTH).stdout.decode().split()
            names = [each for each in names if words[0] != "network" or each.startswith("both")]
            if names:
                real(*words, *names, namespace=BOTH)
        real("namespace", "rm", BOTH)


def both(argv):
    """Change a namespace from both sides, print how soon the daemon's lists had it; the exit status."""
    parser = argparse.ArgumentParser(prog="test_nerdctld.py --both")
    parser.add_argument("--both", type=int, metavar="N", required=True)
    parser.add_argument("--seed", default="1")
    options = parser.parse_args(argv)
    reason = why_not_live()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        problem, waits = both_run(pathlib.Path(folder), options.both, options.seed)
    for kind, seconds in waits.items():
        if seconds:
            print(f"{kind:12}{len(seconds):5} changes, seen after {statistics.median(seconds) * 1000:7.1f} ms at the median, {max(seconds) * 1000:7.1f} at most")
    print(problem or "all lists were the same")
    return 1 if problem else 0


class TestLiveBothSides:
    def test_lists_stay_the_same(self, live_daemons, tmp_path):
        problem, _ = both_run(tmp_path, 40, 20261124)
        assert not problem


BUSY = "nerdctld-load"


class Load:
    """Many clients of one daemon at once, for some seconds: followers of logs and of events, readers, pullers."""

    def __init__(self, daemon, seconds):
        self.daemon, self.until, self.counts, self.lock = daemon, time.monotonic() + seconds, collections.Counter(), threading.Lock()
        self.pings, self.most, self.during = [], 0, {}

    def told(self, what, size=1):
        with self.lock:
            self.counts[what] += size

    def follow(self, path, what):
        """Read a stream until the time is over."""
        with self.daemon.connect() as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            sock.settimeout(1)
            while time.monotonic() < self.until:
                with contextlib.suppress(socket.timeout):
                    part = sock.recv(65536)
                    if not part:
                        return self.told(what + " ended")
                    self.told(what + " bytes", len(part))

    def repeat(self, method, path, what):
        """Ask the same again and again."""
        while time.monotonic() < self.until:
            answer = self.daemon.ask(method, path)
            self.told(what if answer.status == 200 and b"errorDetail" not in answer.body else what + " failed")

    def guarded(self, what, action, *arguments):
        """An action whose failure is counted."""
        try:
            action(*arguments)
        except (OSError, http.client.HTTPException) as error:
            self.told(f"{what}: {error!r}")

    def watch(self):
        """Measure while the others work."""
        while time.monotonic() < self.until:
            began = time.monotonic()
            self.daemon.ask("GET", "/_ping")
            self.pings.append(time.monotonic() - began)
            self.most = max(self.most, len([each for each in self.daemon.children() if "nerdctl" in each.partition(" ")[0]]))
            now = footprint(self.daemon.process.pid, "")
            self.during = {key: max(value, self.during.get(key, 0)) for key, value in now.items()}
            time.sleep(0.05)

    def run(self, container, streams, readers, pullers):
        """Start all of them and wait for their end."""
        reads = ("/containers/json?all=1", "/images/json", "/networks", "/volumes", f"/containers/{container}/json", f"/images/{BASE}/json", "/info", "/version")
        work = [("logs", self.follow, f"/containers/{container}/logs?follow=1&stdout=1", "logs") for _ in range(streams // 2)]
        work += [("events", self.follow, "/events", "events") for _ in range(streams - streams // 2)]
        work += [("reads", self.repeat, "GET", reads[number % len(reads)], "reads") for number in range(readers)]
        work += [("pulls", self.repeat, "POST", f"/images/create?fromImage={BASE.rpartition(':')[0]}&tag={BASE.rpartition(':')[2]}", "pulls") for _ in range(pullers)]
        work.append(("ping", self.watch))
        threads = [threading.Thread(target=self.guarded, args=each) for each in work]
        for each in threads:
            each.start()
        for each in threads:
            each.join()


def load(argv):
    """Load a daemon over the real nerdctl, print what it took and gave; the exit status."""
    parser = argparse.ArgumentParser(prog="test_nerdctld.py --load")
    parser.add_argument("--load", type=float, metavar="SECONDS", required=True)
    for name, count in (("streams", 200), ("readers", 50), ("pullers", 20)):
        parser.add_argument("--" + name, type=int, default=count)
    options = parser.parse_args(argv)
    reason = why_not_live()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        real("load", data=(STACK / "base.tar").read_bytes(), namespace=BUSY)
        real("push", BASE, namespace=BUSY)
        daemon = Live(pathlib.Path(folder), "--namespace", BUSY)
        try:
            name = real("run", "-d", "--network=none", BASE, "sh", "-c", "while :; do echo line; sleep 0.2; done", namespace=BUSY).stdout.decode().strip()
            daemon.ask("GET", "/containers/json?all=1")
            time.sleep(1)
            before = footprint(daemon.process.pid, "")
            found = Load(daemon, options.load)
            found.run(name, options.streams, options.readers, options.pullers)
            until(lambda: footprint(daemon.process.pid, "")["threads"] <= before["threads"], 30)
            after = footprint(daemon.process.pid, "")
        finally:
            daemon.end()
            names = real("ps", "-aq", namespace=BUSY).stdout.decode().split()
            real("rm", "-f", *names, namespace=BUSY)
            real("rmi", "-f", *real("images", "--format", "{{.Name}}", namespace=BUSY).stdout.decode().split(), namespace=BUSY)
            real("namespace", "rm", BUSY)
        log = daemon.log.read_text(errors="replace")
    print(f"nerdctl processes at the worst moment: {found.most}; {dict(found.counts)}")
    print(f"_ping: {statistics.median(found.pings) * 1000:.1f} ms at the median of {len(found.pings)}, {max(found.pings) * 1000:.1f} at most")
    print(f"before {before}\nduring {found.during}\nafter  {after}")
    bad = [each for each in found.counts if ":" in each or "failed" in each or "ended" in each] + (["a traceback"] if "Traceback" in log else [])
    print(*bad, sep="\n")
    return 1 if bad else 0


CYCLES = "nerdctld-cycles"


def left_behind():
    """What containers of the namespace CYCLES leave on a machine: counts by kind."""
    lines = lambda *words: len(subprocess.run(words, capture_output=True, timeout=60).stdout.splitlines())
    ctr = ("ctr", "--namespace", CYCLES)
    names = sum(len(files) for folder, _, files in os.walk("/var/lib/nerdctl") if f"/{CYCLES}" in folder)
    return {"containers": lines(*ctr, "containers", "ls", "-q"), "tasks": lines(*ctr, "tasks", "ls", "-q"), "snapshots": lines(*ctr, "snapshots", "ls"),
            "leases": lines(*ctr, "leases", "ls", "-q"), "files of nerdctl": names,
            "temporary folders": len([*pathlib.Path(tempfile.gettempdir()).glob("nerdctld-*")]),
            "processes of the namespace": lines("pgrep", "-f", f"-namespace[ =]{CYCLES} .*(-id|start|run|exec|logging)")}


def cycles(argv):
    """Run, exec and remove containers with the docker CLI again and again, print what that leaves; the exit status."""
    parser = argparse.ArgumentParser(prog="test_nerdctld.py --cycles")
    parser.add_argument("--cycles", type=int, metavar="N", required=True)
    options = parser.parse_args(argv)
    reason = why_not_live()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    real("load", data=(STACK / "base.tar").read_bytes(), namespace=CYCLES)
    with tempfile.TemporaryDirectory() as folder:
        daemon = Live(pathlib.Path(folder), "--namespace", CYCLES, "--debug")
        docker = lambda *words, **more: subprocess.run(["docker", "-H", f"unix://{daemon.socket}", *words], capture_output=True, timeout=120, **more)
        wrong = []

        def cycle(number):
            name = f"cycle{number}"
            for words, expected, more in (
                    (("run", "-d", "--name", name, "--network=none", "--label", "l=v", BASE, "sleep", "100"), None, {}), (("exec", name, "echo", "x"), b"x\n", {}),
                    (("run", "--rm", "-i", "--network=none", BASE, "cat"), b"in", {"input": b"in"}), (("run", "--rm", "--network=none", "-v", "/data", BASE, "echo", "y"), b"y\n", {}),
                    (("logs", name), b"", {}), (("rm", "-f", name), None, {})):
                done = docker(*words, **more)
                if done.returncode or expected not in (None, done.stdout):
                    wrong.append(f"cycle {number}: {words}: {done}")

        def both():
            time.sleep(2)
            return {**footprint(daemon.process.pid, ""), **left_behind()}
        try:
            for number in range(3):
                cycle(number)
            before, began = both(), time.monotonic()
            for number in range(options.cycles):
                cycle(number)
            took, after = time.monotonic() - began, both()
        finally:
            daemon.end()
            real("rmi", "-f", BASE, namespace=CYCLES)
        wrong += ["a traceback in the log"] if b"Traceback" in daemon.log.read_bytes() else []
    print(f"{options.cycles} cycles in {took:.0f} s, {len(wrong)} wrong")
    print("before", before, "\nafter ", after)
    print(*wrong[:20], sep="\n")
    more = [key for key in before if key not in ("rss", "descriptors", "threads") and after[key] > before[key] or
            key in ("descriptors", "threads") and after[key] > before[key] + 1]
    print("more than before: " + (", ".join(more) or "nothing"))
    return 1 if wrong or more else 0


def main(argv):
    """Run the tests, or what an option asks for; the exit status."""
    for option, action in (("--bench", bench), ("--fuzz", fuzz), ("--kills", kills), ("--both", both), ("--load", load), ("--cycles", cycles)):
        if option in argv:
            return action(argv)
    return pytest.main(["-q", __file__, *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
