#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# To the shell a command, to Python a text: a start takes the bytecode that the one before has left.
''':'
start='
import os, sys
from importlib.machinery import SourceFileLoader
cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
sys.pycache_prefix = os.path.join(cache if os.geteuid() else "/var/cache", "nerdctld")
del sys.argv[0]
__file__ = os.path.realpath(sys.argv[0])
__loader__ = SourceFileLoader(__name__, __file__)
code, sys.pycache_prefix = __loader__.get_code(__name__), None
exec(code)
'
exec python3 -IS -c "$start" "$0" "$@"
'''
__doc__ = """nerdctld: the Docker Engine API on a unix socket, carried out by nerdctl.

The way of a request, in one direction only:

    socket -> request -> route -> handler -> nerdctl (argv -> process) or containerd (message -> call)
        -> parser -> Docker JSON -> response

Sections, each using only what stands above it:

    Errors · Tree · Tree archives · Conversions · Patterns · Requests, responses · Routes · nerdctl process ·
    gRPC · containerd · Events · References · State · Inventory · Hosts files · CNI · Engine · System · Images ·
    Image archives · Registries · Build · Containers · Mounts · Create options · Container create · Process streams ·
    Container lifecycle · Streams · Exec · Supervision · Archive · Statistics · Networks · Volumes ·
    Swarm and plugins · Relay · BuildKit · HTTP server · Sockets · ctr · Checks · Command line

To add an endpoint:
    1. write `<op>_args()`, `parse_<thing>()` and `docker_<thing>()` as pure functions in the section of its resource;
    2. write the handler `<resource>_<op>(engine, request, ...)` below them: validate, run, shape, return;
    3. put `@route(METHOD, PATH)` on it; raise an ApiError for what goes wrong, never write to the socket;
    4. add its line to the table in README.md and a case to the class of that section in test_nerdctld.py.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import stat
import sys
from typing import (
    Any, Callable, ContextManager, Deque, Dict, Iterable, Iterator, List, NamedTuple, NoReturn, Optional, Set, Tuple,
    Type)

# A process in a container's tree ends with the section Tree: what else is imported would take most of its time.
TREE = __name__ == "__main__" and sys.argv[1:2] == ["tree"]
if not TREE:
    import argparse
    import base64
    import bisect
    import calendar
    import codecs
    import collections
    import email.errors
    import functools
    import gc
    import http.client
    import http.server
    import importlib
    import io
    import ipaddress
    import math
    import pty
    import queue
    import select
    import shlex
    import shutil
    import signal
    import socket
    import socketserver
    import struct
    import subprocess
    import tempfile
    import threading
    import time
    import traceback
    import tty
    import urllib.parse
    import zlib
    from hashlib import sha1, sha256

VERSION = "0.1.0"
API_NEWEST = (1, 56)
# The release of Docker with the same newest API. Clients compare the engine's version with the one that they need
# (Testcontainers for Java refuses any below 1.6.0), so it goes up together with API_NEWEST.
ENGINE_VERSION = "29.9.0"
# As dockerd had it until its release 25: some clients ask for a version of their own time (skopeo for 1.22).
API_OLDEST = (1, 12)
JSON_LIMIT = 4 << 20
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

    def __init_subclass__(cls, status: int) -> None:
        cls.status = status


class NotModified(ApiError, status=304):
    """The object is already in the state asked for."""


class BadParameter(ApiError, status=400):
    """The request cannot be right, whatever the state of things."""


class Unauthorized(ApiError, status=401):
    """The registry refused the credentials."""


class Forbidden(ApiError, status=403):
    """Allowed to nobody, such as removing a pre-defined network."""


class NotFound(ApiError, status=404):
    """No such object."""


class Conflict(ApiError, status=409):
    """The object's state or name stands against it."""


class TooLarge(ApiError, status=413):
    """The body is longer than this API ever needs."""


class NotImplementedHere(ApiError, status=501):
    """nerdctl has no way to do it."""


class Unavailable(ApiError, status=503):
    """nerdctl, containerd or buildkitd is missing or down; the message says which and what to do."""


def refuse(*rules: Tuple[Any, str], start: str = "", kind: Type[Exception] = BadParameter) -> None:
    """Raise the error of the first rule (whether it is broken, words), with `start` before its words: 400, if it is not
    of another kind."""
    for broken, words in rules:
        if broken:
            raise kind(start + words)


class ClientGone(Exception):
    """The client left in the middle; nobody is there to be told."""


###############################################################################
# Tree
###############################################################################

# A container's files are reached in one way: by a process of this file (`nerdctld.py tree`) that has the container's
# tree for its root folder, takes one order (JSON, a line on stdin), answers with a line of JSON and goes on with a
# tar on stdin or stdout. The kernel keeps it inside; and since `/proc` of the host, where a container has it, leads
# out of every root folder by its links (`/proc/1/root`), no path is ever left to the kernel either: each step is
# opened by itself, and links are read as text.
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
# Those of mount(8); a bit that one sets, another one clears.
MOUNT_FLAGS = {"ro": MS_RDONLY, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "noatime": 1024,
               "nodiratime": 2048, "relatime": 1 << 21, "strictatime": 1 << 24, "bind": MS_BIND,
               "rbind": MS_BIND | MS_REC, "defaults": 0}
CLEARED_FLAGS = {"rw": MS_RDONLY, "suid": 2, "dev": 4, "exec": 8, "async": 16, "atime": 1024, "diratime": 2048,
                 "norelatime": 1 << 21, "nostrictatime": 1 << 24}
XATTR = "SCHILY.xattr."
# What begins data that is packed with it.
ZSTD = b"\x28\xb5\x2f\xfd"
# Names of the kinds of a tar's entries in errors, as dockerd has them.
MAKING = {b"1": "link", b"2": "symlink", b"3": "mknod", b"4": "mknod", b"5": "mkdir", b"6": "mknod"}
LINKS_FOLLOWED = 40


@contextlib.contextmanager
def opened_below(root: str, path: str, follow: bool = False,
                 barred: Iterable[str] = ()) -> Iterator[Tuple[int, List[str]]]:
    """A path below a root folder as an O_PATH descriptor, with the names on the way to it; a link at its end is
    followed if that is asked for. Links are taken as inside of the root, and each step is opened by itself, so that
    nobody inside can lead it out. FileNotFoundError, with the path that there would have to be, EXDEV for a way through
    one of the `barred` paths, and other OSErrors as lstat has."""
    left = [part for part in path.split("/") if part]
    stack = [os.open(root, os.O_PATH | os.O_DIRECTORY)]
    names: List[str] = []
    links = 0
    try:
        while left:
            part = left.pop(0)
            if part == ".." and names:
                os.close(stack.pop())
                names.pop()
            if part in (".", ".."):
                continue
            try:
                entry = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=stack[-1])
            except FileNotFoundError as error:
                error.filename = os.path.normpath("/".join(["", *names, part, *left]))
                raise
            stack.append(entry)
            names.append(part)
            if barred and "/" + "/".join(names) in barred:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            mode = os.fstat(entry).st_mode
            if stat.S_ISLNK(mode):
                if not (left or follow or path.endswith("/")):
                    break
                target = os.readlink("", dir_fd=entry)
                links += 1
                if links > LINKS_FOLLOWED:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                os.close(stack.pop())
                names.pop()
                if target.startswith("/"):
                    for each in stack[1:]:
                        os.close(each)
                    del stack[1:]
                    names.clear()
                left = [each for each in target.split("/") if each] + left
            elif left and not stat.S_ISDIR(mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if path.endswith("/") and not follow and not stat.S_ISDIR(os.fstat(stack[-1]).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        yield stack[-1], names
    finally:
        for each in stack:
            os.close(each)


@contextlib.contextmanager
def opened(name: str, flags: int, folder: Optional[int] = None) -> Iterator[int]:
    """Context with the descriptor of a file or a folder in an open folder. No link is followed."""
    descriptor = os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class PathStat(NamedTuple):
    """What clients are told of a path in a container: `mode` as POSIX has it, `mtime` in nanoseconds since 1970."""

    name: str
    size: int
    mode: int
    mtime: int
    target: str


def path_error(path: str, error: OSError) -> ApiError:
    """What dockerd answers where a path cannot be reached: 404 where there is none, 500 else."""
    message = f"lstat {path}: {os.strerror(error.errno or 0).lower()}"
    return NotFound(message) if isinstance(error, FileNotFoundError) else ApiError(message)


def stat_below(root: str, path: str, barred: Iterable[str] = ()) -> PathStat:
    """The stat of a path below a root folder, with links taken as inside of it. The target of a link is what it leads
    to in the end, whether that is there or not. OSErrors as opened_below() has."""
    with opened_below(root, path, False, barred) as (descriptor, names):
        found, target = os.fstat(descriptor), ""
    if stat.S_ISLNK(found.st_mode):
        try:
            with opened_below(root, path, True, barred) as (_, leads):
                target = "/" + "/".join(leads)
        except FileNotFoundError as error:
            target = error.filename
    name = names[-1] if target else os.path.basename(path.rstrip("/")) or "/"
    return PathStat(name, found.st_size, found.st_mode, found.st_mtime_ns, target)


def libc_call(name: str, *arguments: Any) -> None:
    """A call of the C library that answers 0; OSError else."""
    import ctypes

    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(source: Optional[str], target: str, kind: Optional[str], flags: int, data: str = "") -> None:
    """mount(2)."""
    import ctypes

    words = (each if each is None else os.fsencode(each) for each in (source, target, kind))
    libc_call("mount", *words, ctypes.c_ulong(flags), os.fsencode(data))


def mount_flags(options: Iterable[str]) -> Tuple[int, List[str]]:
    """The flags of mount(2) for the options of a mount, and those that are none: the file system's own."""
    flags, data = 0, []
    for option in options:
        if option in MOUNT_FLAGS:
            flags |= MOUNT_FLAGS[option]
        elif option in CLEARED_FLAGS:
            flags &= ~CLEARED_FLAGS[option]
        elif option:
            data.append(option)
    return flags, data


def mount_all(mounts: List[Dict[str, Any]], target: str) -> None:
    """Mount what containerd's snapshotter names, or a volume's options, in this process's own mount namespace."""
    for each in mounts:
        kind, source, options = each["type"], each["source"], each["options"]
        prefix, dot, rest = kind.partition(".")
        if dot and prefix in ("fuse", "fuse3"):
            words = itertools.chain.from_iterable(("-o", option) for option in options)
            helper = [f"mount.{prefix}", source, target, *words, "-t", rest]
            import subprocess

            subprocess.run(helper, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
            continue
        flags, data = mount_flags(options)
        for number, option in enumerate(data):
            if option.startswith("lowerdir=") and ":" in option:
                # All options together may have one page: the names of many layers only fit in as relative ones.
                layers = option[len("lowerdir="):].split(":")
                common = os.path.commonpath(layers)
                os.chdir(common)
                data[number] = "lowerdir=" + ":".join(os.path.relpath(layer, common) for layer in layers)
        mount(source, target, kind, flags, ",".join(data))
        if flags & MS_BIND and flags & MS_RDONLY:
            mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def make_below(root: str, path: str, file: bool = False) -> None:
    """Make what is missing of a folder below a root, 0755 and root's as dockerd does; with `file` its last part as an
    empty file."""
    parts = [part for part in path.split("/") if part]
    for count in range(1, len(parts) + 1):
        try:
            with opened_below(root, "/".join(parts[:count]), follow=True):
                pass
        except FileNotFoundError:
            with opened_below(root, "/".join(parts[:count - 1]), follow=True) as (folder, _):
                if file and count == len(parts):
                    os.close(os.open(parts[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder))
                else:
                    os.mkdir(parts[count - 1], 0o755, dir_fd=folder)


def mount_binds(whole: str, root: str, binds: List[Tuple[str, str, bool]]) -> None:
    """Mount what a container's root folder has in it (source, destination, whether read-only), where that is there: the
    sources are paths below `whole`. The working folder is that of the descriptors."""
    for source, destination, read_only in binds:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), \
                opened_below(whole, source, True) as (found, _):
            make_below(root, destination, not stat.S_ISDIR(os.fstat(found).st_mode))
            with opened_below(root, destination, True) as (place, _):
                mount(str(found), str(place), None, MS_BIND | MS_REC)
            if read_only:
                with opened_below(root, destination, True) as (place, _):
                    mount(None, str(place), None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def remove_place(place: str) -> None:
    """Remove an empty folder or a file, if there is one, where nothing is mounted any more."""
    with contextlib.suppress(OSError):
        (os.rmdir if os.path.isdir(place) else os.unlink)(place)


def mount_part(base: str, subpath: str, place: str) -> None:
    """Mount what a path in a folder leads to, a folder or a file, to a place where nothing is mounted. No link leads
    out of the folder: neither one that is there, nor one that takes the place of another meanwhile."""
    base = os.path.realpath(base)
    path = os.path.join(base, subpath)
    real = os.path.realpath(path)
    if not (real + "/").startswith(base.rstrip("/") + "/"):
        raise BadParameter(f"path concatenation escapes the base directory, base: {base}, subpath: {subpath}")
    try:
        with opened_below(base, os.path.relpath(real, base)) as (descriptor, _):
            # A restart of the machine leaves it.
            remove_place(place)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                os.mkdir(place, 0o700)
            else:
                os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            mount(f"/proc/self/fd/{descriptor}", place, None, MS_BIND)
    except FileNotFoundError:
        raise NotFound(f"cannot access path {path}: lstat {path}: no such file or directory") from None
    except OSError as error:
        raise ApiError(f"cannot access path {path}: {(error.strerror or '').lower()}") from None


def mount_place(order: Dict[str, Any]) -> None:
    """Mount at a place what a container needs for its start: file systems (`mounts`), or a part of a folder (`base`,
    `subpath`). With neither, or where it fails, the place is no more."""
    place, failed = order["place"], None
    try:
        os.makedirs(os.path.dirname(place), 0o700, exist_ok=True)
        if order.get("base"):
            mount_part(order["base"], order["subpath"], place)
        elif order.get("mounts"):
            os.makedirs(place, 0o700, exist_ok=True)
            mount_all(order["mounts"], place)
    except OSError as error:
        failed = ApiError((error.strerror or str(error)).lower())
    except ApiError as error:
        failed = error
    if failed or not (order.get("base") or order.get("mounts")):
        with contextlib.suppress(OSError):
            libc_call("umount2", os.fsencode(place), MNT_DETACH)
        if not order.get("keep"):
            remove_place(place)
    if failed:
        raise failed


def enter_tree(order: Dict[str, Any]) -> None:
    """Make a container's tree this process's root folder: its file system, that of its running process or its
    snapshot, and what is mounted in it of `binds`. All of it is mounted for this process alone and gone with it however
    it ends. What is to be exported has none of the binds."""
    descriptors = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
    os.chdir("/")
    if order.get("pid"):
        process = f"/proc/{order['pid']}"
        seen = os.open(process + "/root", os.O_PATH | os.O_DIRECTORY)
        users, mounts = (os.open(process + "/ns/" + each, os.O_RDONLY) for each in ("user", "mnt"))
        if not os.path.samestat(os.fstat(users), os.stat("/proc/self/ns/user")):
            # Its root, to whom its mounts are not locked; it can make no devices.
            order["user_namespace"] = True
            libc_call("setns", users, CLONE_NEWUSER)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        libc_call("setns", mounts, CLONE_NEWNS)
        above = os.open("/", os.O_PATH | os.O_DIRECTORY)
        os.fchdir(seen)
        os.chroot(".")
        os.fchdir(above)
        for each in (seen, users, mounts, above):
            os.close(each)
    libc_call("unshare", CLONE_NEWNS)
    mount("none", ".", None, MS_REC | MS_PRIVATE)
    whole = os.open("/", os.O_PATH | os.O_DIRECTORY)
    if order.get("pid"):
        # Above itself, without what is mounted in it. That is still there, below, so that nothing that the container
        # has mounted can be removed or replaced.
        mount("/", "/", None, MS_BIND)
        folder = "/.."
        if order["read_only"]:
            # Until everything is mounted in it.
            mount(None, folder, None, MS_REMOUNT | MS_BIND)
    else:
        folder = order["folder"]
        mount_all(order["mounts"], folder)
    root = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    os.fchdir(descriptors)
    mount_binds(str(whole), str(root), order["binds"] if order["do"] != "export" else [])
    if order["read_only"]:
        mount(None, str(root), None, MS_REMOUNT | MS_BIND | MS_RDONLY)
    # From here on no import may find a file: it would be the container's.
    sys.path.clear()
    sys.meta_path.clear()
    os.fchdir(root)
    os.chroot(".")
    os.chdir("/")
    for each in (descriptors, whole, root):
        os.close(each)


CHANGED, ADDED, DELETED = 0, 1, 2


def is_opaque(folder: int) -> bool:
    """Whether a folder of an overlay's own layer hides what is below it."""
    for kind in ("trusted", "user"):
        with contextlib.suppress(OSError):
            if os.getxattr(folder, kind + ".overlay.opaque") == b"y":
                return True
    return False


def lstat_or_none(folder: Optional[int], name: str) -> Optional[os.stat_result]:
    """The stat of what is in an open folder by a name, None where nothing is, or no folder."""
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(name, dir_fd=folder) if folder is not None else None
    return None


class Changes:
    """Finds what differs between two trees. `sparse` is one that has only what differs: an overlay's own layer.
    Additions at the paths of `ignored` count for nothing."""

    def __init__(self, sparse: bool, ignored: Iterable[str]):
        self.sparse, self.ignored = sparse, set(ignored)
        # Folders in which something was ignored, and when that was made.
        self.touched: Dict[str, int] = {}

    def below(self, path: str, upper: int, lower: Optional[int]) -> List[Tuple[str, int]]:
        """Path and kind of each change in an open folder, in the order of paths; `lower` is None where there was no
        folder."""
        names, found = set(os.listdir(upper)), []
        if lower is not None and (not self.sparse or is_opaque(upper)):
            names.update(os.listdir(lower))
        for name in sorted(names):
            own, here, there = f"{path}/{name}", lstat_or_none(upper, name), lstat_or_none(lower, name)
            if self.sparse and here and stat.S_ISCHR(here.st_mode) and not here.st_rdev:
                here = None
            if here and not there and own in self.ignored:
                self.touched[path] = max(here.st_mtime_ns, self.touched.get(path, 0))
            elif here:
                inner = self.inside(own, name, (upper, here), (lower, there))
                # What was made in a folder, or taken out of it, changes that, too.
                changed = any(kind != CHANGED and each.rpartition("/")[0] == own for each, kind in inner)
                if not there or changed or self.differ(own, here, there):
                    found.append((own, CHANGED if there else ADDED))
                found += inner
            elif there:
                found.append((own, DELETED))
        return found

    def inside(self, path: str, name: str, *trees: Tuple[Optional[int], Any]) -> List[Tuple[str, int]]:
        """The changes in what is a folder in the upper tree, [] for anything else."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), contextlib.ExitStack() as stack:
            upper, lower = (stack.enter_context(opened(name, os.O_DIRECTORY, folder))
                            if found is not None and stat.S_ISDIR(found.st_mode) else None for folder, found in trees)
            return self.below(path, upper, lower) if upper is not None else []
        return []

    def differ(self, path: str, here: os.stat_result, there: os.stat_result) -> bool:
        """Whether what both trees have at a path is not the same."""
        fields = ["st_mode", "st_uid", "st_gid", "st_mtime_ns"]
        if path in self.touched and here.st_mtime_ns < self.touched[path] + 10**7:
            # It has changed by what was ignored, and not since.
            fields.remove("st_mtime_ns")
        if not (stat.S_ISDIR(here.st_mode) and stat.S_ISDIR(there.st_mode)):
            if self.sparse:
                return True
            fields += ["st_size", "st_rdev"]
        return any(getattr(here, each) != getattr(there, each) for each in fields)


def find_changes(order: Dict[str, Any]) -> List[Tuple[str, int]]:
    """What of a container's snapshot differs from the one below it. Both are mounted for this process alone."""
    libc_call("unshare", CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    flags, folder = os.O_RDONLY | os.O_DIRECTORY, order["folder"]
    # mount_all() may go to another folder.
    mount_all(order["below"], folder)
    lower = os.open(folder, flags)
    own = [option[len("upperdir="):] for each in order["mounts"] if each["type"] == "overlay"
           for option in each["options"] if option.startswith("upperdir=")]
    if not own:
        mount_all(order["mounts"], folder)
    upper = os.open(own[0] if own else folder, flags)
    return Changes(bool(own), order["ignored"]).below("", upper, lower)


###############################################################################
# Tree archives
###############################################################################


def blocks_of(descriptor: int) -> Iterator[memoryview]:
    """What comes on a descriptor, in blocks that hold until the next one."""
    buffer = memoryview(bytearray(1 << 20))
    for size in iter(lambda: os.readv(descriptor, [buffer]), 0):
        yield buffer[:size]


def write_all(descriptor: int, data: Any) -> None:
    """Write all of some bytes to a descriptor that blocks."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


class TarInput:
    """A tar in blocks, as the file that tarfile reads headers from, forward only."""

    # How much tarfile may read for one entry, besides its content: long names, attributes, maps of sparse files.
    HEADER = 16 << 20

    def __init__(self, blocks: Iterator[Any]):
        self.blocks, self.left = blocks, memoryview(b"")
        self.position = self.spent = 0
        self.last = b""

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes, in pieces that hold until the next one; fewer where the input ends."""
        while size > 0:
            if not self.more():
                return
            piece, self.left = self.left[:size], self.left[size:]
            self.position += len(piece)
            size -= len(piece)
            yield piece

    def more(self) -> bool:
        """Whether there is more of it."""
        if not self.left:
            self.left = memoryview(next(self.blocks, b""))
        return bool(self.left)

    def line(self) -> bytes:
        """The line in front of the tar."""
        found = b""
        while self.more():
            head, end, _ = bytes(self.left).partition(b"\n")
            self.left, found = self.left[len(head) + len(end):], found + head
            if end:
                break
        return found

    def read(self, size: int) -> bytes:
        """A part of a header."""
        self.spent += size
        if self.spent > self.HEADER:
            raise BadParameter("invalid archive: a header is too long")
        self.last = b"".join(map(bytes, self.pieces(size)))
        return self.last

    def tell(self) -> int:
        """How far it was read."""
        return self.position

    def seek(self, position: int) -> None:
        """Skip to there."""
        for _ in self.pieces(position - self.position):
            pass

    def copy(self, target: int, size: int) -> None:
        """Write the next `size` bytes to a file; 400 where the archive has fewer."""
        for piece in self.pieces(size):
            size -= len(piece)
            write_all(target, piece)
        if size:
            raise BadParameter("invalid archive: unexpected EOF")


def entry_times(entry: Any) -> Tuple[int, int]:
    """Times of access and change of a tar's entry, in nanoseconds since 1970; 0 for what no file system can have."""
    def exact(name: str, default: int) -> int:
        found = re.fullmatch(r"(\d{1,10})(?:\.(\d{1,9})\d*)?", entry.pax_headers.get(name, ""))
        value = int(found.group(1)) * 10**9 + int((found.group(2) or "0").ljust(9, "0")) if found else default * 10**9
        return value if 0 <= value < 1 << 63 else 0

    changed = exact("mtime", int(entry.mtime))
    return max(changed, exact("atime", 0)), changed


class Unpacker:
    """Unpacks a tar into a folder (`names`, its path in parts) below `root`, by dockerd's rules. `keep` refuses to
    put a folder in the place of what is none and the reverse; `owner`, if any, gets everything; in a user namespace
    devices are left out."""

    def __init__(self, root: str, names: List[str], keep: bool = False, owner: Optional[List[int]] = None,
                 user_namespace: bool = False):
        self.root, self.names, self.keep, self.owner, self.user_namespace = root, names, keep, owner, user_namespace
        self.target = "/" + "/".join(names)
        self.opened: Tuple[str, int] = ("", -1)
        self.folders: List[Tuple[str, Tuple[int, int]]] = []

    def unpack(self, source: TarInput) -> None:
        """Unpack all of it; 400 for what is no tar, breaks off or leads outside, OSError for what the file system
        refuses."""
        import tarfile

        try:
            if source.more():
                if bytes(source.left[:4]) == ZSTD:
                    raise BadParameter("invalid archive: to unpack zstd nerdctld needs Python 3.14")
                self.entries(source)
        except tarfile.TarError as error:
            raise BadParameter(f"invalid archive: {error}") from None
        finally:
            self.close()

    def close(self) -> None:
        """Close the folder that is open."""
        if self.opened[1] >= 0:
            os.close(self.opened[1])
        self.opened = ("", -1)

    def entries(self, source: TarInput) -> None:
        """Unpack every entry; the times of folders last, since what is made in them changes them."""
        import tarfile

        tar = tarfile.TarFile(fileobj=source, mode="r", encoding="utf-8", errors="surrogateescape")
        # Not by next(): that of Python 3.9 reads on where the first block has said that there is nothing.
        entry = next(iter(tar), None)
        while entry:
            tar.members.clear()
            self.entry(entry, source)
            source.seek(tar.offset)
            source.spent = 0
            if not source.more():
                # `docker build -f -` leaves out what fills the last block.
                break
            entry = tar.next()
        else:
            # tarfile takes a header that it cannot read for the end.
            if len(source.last) != tarfile.BLOCKSIZE:
                raise BadParameter("invalid archive: unexpected EOF")
            if any(source.last):
                raise BadParameter("invalid archive: invalid tar header")
        for path, times in self.folders:
            parent, _, name = path.rpartition("/")
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.utime(name, ns=times, dir_fd=self.folder(parent), follow_symlinks=False)

    def place(self, name: str, link: bool = False) -> List[str]:
        """The parts of the path that a name in the archive stands for; 400 when it is outside of the folder."""
        parts: List[str] = []
        for part in name.split("/"):
            if part == ".." and not parts and (link or not name.startswith("/")) and self.names:
                place = os.path.normpath(self.target + "/" + name)
                outside = f'"{name}" is outside of "{self.target}"'
                raise BadParameter(f'invalid hardlink "{place}" -> "{name}"' if link else outside)
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        return self.names + parts

    def folder(self, path: str) -> int:
        """A folder as an O_PATH descriptor, made where it is missing; it holds until the next one is asked for."""
        if self.opened[1] < 0 or self.opened[0] != path:
            self.close()
            for missing in (False, True):
                try:
                    with opened_below(self.root, path, follow=True) as (descriptor, _):
                        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                        self.opened = (path, os.dup(descriptor))
                        break
                except FileNotFoundError:
                    if missing:
                        raise
                    make_below(self.root, path)
        return self.opened[1]

    def entry(self, entry: Any, source: TarInput) -> None:
        """Unpack one entry."""
        parts = self.place(entry.name)
        path = "/" + "/".join(parts)
        if entry.size < 0:
            raise BadParameter("invalid archive: invalid tar header")
        if len(parts) == len(self.names):
            if self.keep and not entry.isdir():
                raise BadParameter(f'cannot overwrite directory "{path}" with non-directory "{self.target}"')
            return
        verb = making = MAKING.get(entry.type, "open")
        if entry.islnk() or entry.issym():
            making += " " + (entry.linkname if entry.issym() else "/" + "/".join(self.place(entry.linkname, link=True)))
        try:
            folder, name = self.folder("/".join(parts[:-1])), parts[-1]
            verb = "unlinkat"
            there = self.clear(folder, name, entry.isdir(), path)
            verb = making
            if entry.isdir():
                if not there:
                    os.mkdir(name, 0o700, dir_fd=folder)
                with opened(name, os.O_DIRECTORY, folder) as descriptor:
                    self.settle(entry, descriptor)
                self.folders.append((path[1:], entry_times(entry)))
            elif entry.isreg() and entry.type != b"7":
                self.make_file(entry, folder, name, source)
            else:
                self.make_other(entry, folder, name, path)
        except OSError as error:
            raise OSError(error.errno, f"{verb} {path}: {(error.strerror or str(error)).lower()}") from None
        except (ValueError, OverflowError) as error:
            raise BadParameter(f"invalid archive: {error}") from None

    def clear(self, folder: int, name: str, is_folder: bool, path: str) -> bool:
        """Remove what stands in the place of an entry, unless both are folders; whether a folder is there."""
        try:
            there = stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode)
        except FileNotFoundError:
            return False
        if self.keep and there != is_folder:
            kinds = ("directory", "non-directory") if there else ("non-directory", "directory")
            raise BadParameter(f'cannot overwrite {kinds[0]} "{path}" with {kinds[1]} "{self.target}"')
        if there and is_folder:
            return True
        remove_entry(folder, name)
        return False

    def settle(self, entry: Any, descriptor: int) -> None:
        """Give an open file or folder the owner, attributes and mode of its entry, in the order in which none undoes
        another."""
        os.fchown(descriptor, *(self.owner or (entry.uid, entry.gid)))
        for key, value in entry.pax_headers.items():
            if key.startswith(XATTR):
                try:
                    words = (each.encode("utf-8", "surrogateescape") for each in (key[len(XATTR):], value))
                    os.setxattr(descriptor, *words)
                except OSError as error:
                    # Not every file system, and not every user, can have each of them.
                    if error.errno not in (errno.ENOTSUP, errno.EPERM):
                        raise
        os.fchmod(descriptor, entry.mode & 0o7777)

    def make_file(self, entry: Any, folder: int, name: str, source: TarInput) -> None:
        """Make a file; what a sparse one leaves out stays a hole, and one that does not come whole is gone."""
        with opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder) as descriptor:
            try:
                for offset, size in [(0, entry.size)] if entry.sparse is None else entry.sparse:
                    os.lseek(descriptor, offset, os.SEEK_SET)
                    source.copy(descriptor, size)
                os.ftruncate(descriptor, entry.size)
                self.settle(entry, descriptor)
                os.utime(descriptor, ns=entry_times(entry))
            except BaseException:
                os.unlink(name, dir_fd=folder)
                raise

    def make_other(self, entry: Any, folder: int, name: str, path: str) -> None:
        """Make a link, a FIFO or a device."""
        kinds = {b"3": stat.S_IFCHR, b"4": stat.S_IFBLK, b"6": stat.S_IFIFO}
        if entry.issym():
            leads = os.path.normpath(os.path.dirname(path) + "/" + entry.linkname) + "/"
            if self.names and not leads.startswith(self.target + "/"):
                raise BadParameter(f'invalid symlink "{path}" -> "{entry.linkname}"')
            os.symlink(entry.linkname, name, dir_fd=folder)
        elif entry.islnk():
            *above, last = self.place(entry.linkname, link=True)
            with opened_below(self.root, "/".join(above), follow=True) as (descriptor, _):
                os.link(last, name, src_dir_fd=descriptor, dst_dir_fd=folder, follow_symlinks=False)
            found = os.lstat(name, dir_fd=folder)
            if stat.S_ISREG(found.st_mode):
                # The chown below would take the set-user-ID bit off the file that has both names.
                with opened(name, os.O_NONBLOCK, folder) as descriptor:
                    # dockerd looks for the file in the root folder only, to give it the entry's mode and times.
                    if self.names:
                        entry.mode = found.st_mode
                    else:
                        os.utime(descriptor, ns=entry_times(entry))
                    self.settle(entry, descriptor)
                return
        elif entry.type in kinds:
            try:
                device = os.makedev(entry.devmajor, entry.devminor)
                os.mknod(name, kinds[entry.type] | entry.mode & 0o7777, device, dir_fd=folder)
            except PermissionError:
                if self.user_namespace:
                    return
                raise
        else:
            raise BadParameter(f"unhandled tar header type {entry.type[0]}")
        os.chown(name, *(self.owner or (entry.uid, entry.gid)), dir_fd=folder, follow_symlinks=False)
        if not entry.islnk():
            os.utime(name, ns=entry_times(entry), dir_fd=folder, follow_symlinks=False)


def remove_entry(folder: int, name: str) -> None:
    """Remove a file, or a folder with all that is in it, from an open folder. No link is followed."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        with opened(name, os.O_DIRECTORY, folder) as descriptor:
            for each in os.listdir(descriptor):
                remove_entry(descriptor, each)
        os.rmdir(name, dir_fd=folder)


# Bits of a POSIX mode -> the kind of a tar's entry.
TAR_KINDS = {stat.S_IFDIR: b"5", stat.S_IFLNK: b"2", stat.S_IFIFO: b"6", stat.S_IFCHR: b"3", stat.S_IFBLK: b"4"}


def tar_header(name: bytes, kind: bytes, link: bytes, numbers: Dict[str, int], records: Dict[str, bytes]) -> bytes:
    """The header of a tar's entry with these numbers (`mode`, `uid`, `gid`, `size`, `mtime`, `major`, `minor`), behind
    one of pax's with these records and what does not fit elsewhere."""
    records = dict(records)
    for key, text in (("path", name), ("linkpath", link)):
        if len(text) > 100 or not text.isascii():
            records[key] = text
    for key, limit in (("uid", 1 << 21), ("gid", 1 << 21), ("size", 1 << 33), ("mtime", 1 << 33)):
        if not 0 <= numbers[key] < limit:
            records[key] = b"%d" % numbers[key]
            numbers = {**numbers, key: 0}
    fields = b"%07o\0%07o\0%07o\0%011o\0%011o\0        %b%bustar\x0000%b%07o\0%07o\0" % (
        numbers["mode"], numbers["uid"], numbers["gid"], numbers["size"], numbers["mtime"], kind,
        link[:100].ljust(100, b"\0"), bytes(64), numbers["major"], numbers["minor"])
    head = (name[:100].ljust(100, b"\0") + fields).ljust(512, b"\0")
    head = b"%b%06o\0 %b" % (head[:148], sum(head), head[156:])
    if not records:
        return head
    text = b""
    for key, value in records.items():
        record = b" %b=%b\n" % (key.encode(), value)
        # It begins with its own length.
        size = len(record) + len(str(len(record)))
        text += b"%d%b" % (len(record) + len(str(size)), record)
    more = tar_header(b"././@PaxHeader", b"x", b"", {**dict.fromkeys(numbers, 0), "size": len(text)}, {})
    return more + text + bytes(-len(text) % 512) + head


class Packer:
    """Writes files below `root` as a tar to a descriptor, by dockerd's rules."""

    def __init__(self, root: str, output: int):
        self.root, self.output = root, output
        self.pending = bytearray()
        # Device and inode -> name of what has several names.
        self.linked: Dict[Tuple[int, int], str] = {}

    def pack(self, path: str, tell: Callable[[PathStat], Any]) -> None:
        """Write the file at a path, or the folder with all that is in it; entries begin with the last part of the
        path. What is there is told first."""
        tell(stat_below(self.root, path))
        with opened_below(self.root, path) as (_, names):
            pass
        last = path.rstrip("/").rpartition("/")[2]
        name = last if last == "." else os.path.basename(os.path.normpath(path)) or "/"
        with opened_below(self.root, "/".join(names[:-1])) as (folder, _):
            self.entry(folder, names[-1] if names else ".", name)
        self.finish()

    def pack_all(self) -> None:
        """Write everything in the root folder, with names that do not begin with a slash."""
        with opened(self.root, os.O_DIRECTORY) as folder:
            self.entries(folder, "")
        self.finish()

    def finish(self) -> None:
        """Write the end of the archive."""
        self.pending += bytes(1024)
        self.flush()

    def flush(self) -> None:
        """Write out what is pending."""
        write_all(self.output, self.pending)
        self.pending = bytearray()

    def entries(self, folder: int, told: str) -> None:
        """Write what is in a folder; `told` is what stands before the names."""
        for each in sorted(os.listdir(folder)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self.entry(folder, each, told + each)

    def entry(self, folder: int, name: str, told: str) -> None:
        """Write one entry, by the name `told`, and what is below it; one that is gone meanwhile is left out, and a
        socket, which no tar can have."""
        found = os.lstat(name, dir_fd=folder)
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            first = self.linked.setdefault((found.st_dev, found.st_ino), told)
            if first != told:
                self.header(found, told, first, kind=b"1")
                return
        if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
            flags = os.O_DIRECTORY if stat.S_ISDIR(found.st_mode) else os.O_NONBLOCK | os.O_NOCTTY
            with opened(name, flags, folder) as descriptor:
                found = os.fstat(descriptor)
                if stat.S_ISDIR(found.st_mode):
                    self.header(found, told)
                    self.entries(descriptor, told.rstrip("/") + "/")
                elif stat.S_ISREG(found.st_mode):
                    self.file(descriptor, found, told)
        elif stat.S_ISLNK(found.st_mode):
            self.header(found, told, os.readlink(name, dir_fd=folder))
        elif not stat.S_ISSOCK(found.st_mode):
            self.header(found, told)

    def header(self, found: os.stat_result, told: str, link: str = "", records: Optional[Dict[str, bytes]] = None,
               kind: bytes = b"") -> None:
        """Write the header of an entry; one of kind 1 is another name of the file `link`."""
        kind = kind or TAR_KINDS.get(stat.S_IFMT(found.st_mode), b"0")
        device = found.st_rdev if kind in (b"3", b"4") else 0
        numbers = {"mode": stat.S_IMODE(found.st_mode), "uid": found.st_uid, "gid": found.st_gid,
                   "size": found.st_size if kind == b"0" else 0, "mtime": int(found.st_mtime),
                   "major": os.major(device), "minor": os.minor(device)}
        name = told if kind != b"5" or told.endswith("/") else told + "/"
        self.pending += tar_header(os.fsencode(name), kind, os.fsencode(link), numbers, records or {})
        if len(self.pending) > 1 << 18:
            self.flush()

    def file(self, descriptor: int, found: os.stat_result, told: str) -> None:
        """Write an open file, as long as it was when its header was written."""
        records = {}
        with contextlib.suppress(OSError):
            if "security.capability" in os.listxattr(descriptor):
                records[XATTR + "security.capability"] = os.getxattr(descriptor, "security.capability")
        self.header(found, told, records=records)
        left = found.st_size
        if left < 1 << 16:
            data = os.read(descriptor, left)
            self.pending += data
            left -= len(data)
        else:
            self.flush()
        while left:
            moved = os.sendfile(self.output, descriptor, None, min(left, 1 << 30)) if not self.pending else 0
            if not moved:
                # It is shorter by now, or a file that the kernel makes up.
                self.pending += bytes(min(left, 1 << 20))
                moved = min(left, 1 << 20)
                self.flush()
            left -= moved
        self.pending += bytes(-found.st_size % 512)


def folder_for(root: str, path: str, volumes: Iterable[str] = ()) -> List[str]:
    """The folder that a path leads to below a root, its own path in parts; 400 where nothing can be unpacked into
    it."""
    with opened_below(root, path, follow=True) as (descriptor, names):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise BadParameter("extraction point is not a directory")
        if os.fstatvfs(descriptor).f_flag & os.ST_RDONLY:
            own = "/".join(["", *names, ""])
            inside = any(own.startswith(os.path.normpath(each).rstrip("/") + "/") for each in volumes)
            raise BadParameter(f"{'mounted volume' if inside else 'container rootfs'} is marked read-only")
        return names


def carry_out(order: Dict[str, Any], source: TarInput) -> None:
    """Enter the tree and do what is ordered: `stat`, `pack`, `unpack` or `export`; tell the `changes` of it; or `mount`
    something outside of it."""
    if order["do"] == "mount":
        mount_place(order)
        return
    import resource
    if order["do"] == "unpack":
        # From the tree on nothing can be imported.
        import tarfile  # noqa: F401

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    sys.setrecursionlimit(10000)
    os.umask(0)
    path, tell = order["path"], lambda value: os.write(1, json.dumps(value).encode() + b"\n")
    try:
        if order["do"] == "changes":
            tell(find_changes(order))
            return
        enter_tree(order)
    except OSError as error:
        raise ApiError(f"the container's files cannot be reached: {error.strerror or error}") from None
    if order["do"] == "unpack":
        names = folder_for("/", path, [destination for _, destination, _ in order["binds"]])
        tell([])
        Unpacker("/", names, order["keep"], order["owner"], order["user_namespace"]).unpack(source)
        # What stands behind its end is nobody's, but was sent.
        source.seek(sys.maxsize)
    elif order["do"] == "pack":
        Packer("/", 1).pack(path, tell)
    elif order["do"] == "export":
        tell([])
        Packer("/", 1).pack_all()
    else:
        tell(stat_below("/", path))


def enlarge_pipe(descriptor: int) -> None:
    """Let a pipe hold a megabyte, so that the two processes at its ends change places less often."""
    with contextlib.suppress(OSError):
        # fcntl has the name F_SETPIPE_SZ from Python 3.10 on.
        fcntl.fcntl(descriptor, 1031, 1 << 20)


def tree_main() -> int:
    """`nerdctld.py tree`: the exit status. A failure is a line of JSON on stderr, its status and its message."""
    enlarge_pipe(0)
    enlarge_pipe(1)
    order: Dict[str, Any] = {}
    try:
        source = TarInput(blocks_of(0))
        order.update(json.loads(source.line()))
        carry_out(order, source)
        return 0
    except ApiError as error:
        status, message = error.status, str(error)
    except OSError as error:
        # That of an entry in the archive says where; any other is about the path that was asked for.
        status, message = 500, error.strerror or str(error)
        if message == os.strerror(error.errno or 0):
            told = path_error(order.get("path", ""), error)
            status, message = told.status, str(told)
    except Exception as error:
        # No traceback: it would read the container's files.
        status, message = 500, repr(error)
    os.write(2, json.dumps({"status": status, "message": message}).encode() + b"\n")
    return 1


if TREE:
    sys.exit(tree_main())


###############################################################################
# Conversions
###############################################################################

ZERO_TIME = "0001-01-01T00:00:00Z"
TIMESTAMP = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9})\d*)?)?"
                       r"\s*(Z|UTC|[+-]\d\d:?\d\d)?(?: [A-Z]{1,5})?")
SIZE_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "ki": 1024, "mi": 1024**2,
              "gi": 1024**3, "ti": 1024**4}


def nanoseconds_of(text: str) -> Optional[int]:
    """Nanoseconds since 1970 of seconds (`1700000000.5`), RFC 3339 or Go's `2026-11-23 19:00:00.1 +0000 UTC`; None for
    what is none of these."""
    seconds_only = re.fullmatch(r"(-?)(\d{1,15})(?:\.(\d{1,9})\d{0,9})?", text.strip())
    if seconds_only:
        sign, whole, fraction = seconds_only.groups()
        return int(sign + whole + (fraction or "").ljust(9, "0"))
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


def seconds_or_zero(text: Optional[str]) -> int:
    """Whole seconds since 1970 of a timestamp, 0 where there is none."""
    return (nanoseconds_of(text or "") or 0) // 10**9


def rfc3339(nanoseconds: Optional[int]) -> str:
    """`2026-11-23T19:00:00.123456789Z`, the zero time for None."""
    if nanoseconds is None:
        return ZERO_TIME
    seconds, rest = divmod(nanoseconds, 10**9)
    fraction = f".{rest:09d}".rstrip("0") if rest else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


def size_bytes(text: str) -> int:
    """Bytes of `12.5MB`, `1.2 GiB`, `512`; 0 for what is no size."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d*)?|\.\d+)\s*(|[kmgt]i?)b?", text.strip().lower())
    return int(float(found[1]) * SIZE_UNITS[found[2]]) if found else 0


# Seconds below which a duration is worded so, in a unit of so many. From an hour on it is rounded to hours.
DURATIONS = (
    (1, 1, "Less than a second"), (2, 1, "1 second"), (60, 1, "{} seconds"), (120, 60, "About a minute"),
    (3600, 60, "{} minutes"), (2 * 3600, 3600, "About an hour"), (48 * 3600, 3600, "{} hours"),
    (14 * 86400, 86400, "{} days"), (60 * 86400, 7 * 86400, "{} weeks"), (730 * 86400, 30 * 86400, "{} months"))


def human_duration(seconds: float) -> str:
    """A duration as `docker ps` words it: `About a minute`, `5 hours`."""
    whole = int(seconds) + (1800 if seconds >= 3600 else 0)
    for limit, unit, words in DURATIONS:
        if whole < limit:
            return words.format(whole // unit)
    return f"{whole // 86400 // 365} years"


def match_labels(labels: Dict[str, str], wanted: Iterable[str]) -> bool:
    """Whether labels satisfy every `key` and `key=value` of a label filter."""
    pairs = (each.partition("=") for each in wanted)
    return all(key in labels and (not equals or labels[key] == value) for key, equals, value in pairs)


def duration_of(text: str) -> Optional[int]:
    """Nanoseconds of a duration as Go writes it (`1m30s`), None for what is none."""
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,9})?(h|ms|m|s))+", text):
        return None
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|ms|m|s)", text)
    return int(sum(float(number) * units[unit] for number, unit in parts) * 10**9)


def until_limit(values: List[str]) -> Optional[int]:
    """The moment that an `until` filter names, in nanoseconds since 1970: a timestamp, a date or a duration before now.
    None without one, 400 for what is none."""
    if not values:
        return None
    if len(values) > 1:
        raise BadParameter("more than one until filter specified")
    text, ago = values[0], duration_of(values[0])
    if ago is not None:
        return time.time_ns() - ago
    found = nanoseconds_of(text + "T00:00:00" if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else text)
    if found is None:
        raise BadParameter(f"invalid until filter: {text!r}")
    return found


def prune_filter(filters: Dict[str, List[str]]) -> Callable[..., bool]:
    """The filters `until`, `label` and `label!` that all prunes have in common: whether an object with these labels,
    made at this time (nanoseconds since 1970), passes. 400 for an `until` that is no time."""
    until, labels, refused = until_limit(filters.get("until") or []), filters.get("label") or [], filters.get("label!")

    def passes(own: Dict[str, str], created: int = 0) -> bool:
        return (match_labels(own, labels) and not any(match_labels(own, [each]) for each in refused or [])
                and (until is None or created <= until))

    return passes


def flag_filter(filters: Dict[str, List[str]], name: str, default: Optional[bool] = None) -> Optional[bool]:
    """A filter that is a boolean; 400 with dockerd's words for anything else."""
    values = filters.get(name) or []
    if not values:
        return default
    words = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
    told = {words.get(each.lower()) for each in values}
    if None in told or len(told) > 1:
        raise BadParameter(f"invalid filter '{name}=[{' '.join(values)}]'")
    return told.pop()


def _value(value: Any, flag: str) -> List[str]:
    """A string or a number as a word of a command line, `FLAG=value`, but for "" and 0."""
    return [f"{flag}={value}"] if value else []


def _switch(value: Any, flag: str) -> List[str]:
    """The flag alone for true."""
    return [flag] if value else []


def _pairs(value: Optional[Dict[str, str]], flag: str) -> List[str]:
    """An object as one `FLAG=key=value` each."""
    return [f"{flag}={key}={each}" for key, each in (value or {}).items()]


def json_bytes(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


def json_of(kind: type, text: Any) -> Any:
    """The JSON value in a text, an empty one of this kind where it is no such value. Anybody can write a label."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text or "null")
        if isinstance(found, kind):
            return found
    return kind()


def read_file(path: str) -> str:
    """A small file, "" when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def read_json_file(path: str) -> Dict[str, Any]:
    """The JSON object in a file, {} where it cannot be read."""
    return json_of(dict, read_file(path))


class Named(NamedTuple):
    """The shape of a JSON object whose keys are the client's own words, such as labels: that of its values."""

    shape: Any


# The shapes of a list of strings of which a lone one may stand for the list, and of a number that is not negative.
WORDS = (str,)
UNSIGNED = (int,)
GO_TYPES = {str: "string", int: "int64", bool: "bool", object: "interface {}"}
JSON_TYPES = {str: "string", int: "number", float: "number", bool: "bool", dict: "object", list: "array"}


def go_type(shape: Any) -> str:
    """The type of a shape as Go's errors have it."""
    if shape is UNSIGNED:
        return "uint"
    if isinstance(shape, list):
        return "[]" + go_type(shape[0])
    if isinstance(shape, Named):
        return "map[string]" + go_type(shape.shape)
    return "struct" if isinstance(shape, dict) else GO_TYPES[shape]


def shaped(value: Any, shape: Any, path: str = "") -> Any:
    """A JSON value as Go decodes it into the type of a shape: `str`, `int`, `bool`, `object` for anything, a list with
    the shape of its elements, WORDS, Named, or the fields of an object with a shape each. Their names are taken without
    regard to case, other fields are dropped, and null is no value. 400 with Go's words for another type."""
    if shape is WORDS:
        value, shape = [value] if isinstance(value, str) else value, [str]
    if shape is UNSIGNED and isinstance(value, int) and value >= 0:
        shape = int
    kind = dict if isinstance(shape, Named) else shape if isinstance(shape, type) else type(shape)
    if shape is object or value is None:
        return value if shape is object else kind()
    if not isinstance(value, kind) or kind is int and (isinstance(value, bool) or value.bit_length() > 63):
        where = f"struct field {path}" if path else "value"
        raise BadParameter(f"invalid JSON: json: cannot unmarshal {JSON_TYPES[type(value)]} into Go {where} of type "
                           + go_type(shape))
    if kind is list:
        return [shaped(each, shape[0], path) for each in value]
    if kind is not dict:
        return value
    if isinstance(shape, Named):
        return {key: shaped(each, shape.shape, path) for key, each in value.items()}
    names = {each.lower(): each for each in shape}
    fields = ((key if key in shape else names.get(key.lower()), each) for key, each in value.items())
    return {key: shaped(each, shape[key], f"{path}.{key}".lstrip(".")) for key, each in fields
            if key and each is not None}


def signal_number(text: str) -> int:
    """The number of a signal, given by name or number; 400 with dockerd's words for anything else."""
    found = re.fullmatch(r"([0-9]{1,9})|(?:SIG)?([A-Z][A-Z0-9]*)(?:(?<=RTMIN|RTMAX)([+-][0-9]{1,2}))?", text.upper())
    number, name, offset = found.groups() if found else ("", "", "")
    if number and 0 < int(number) <= 64:
        return int(number)
    if name and hasattr(signal, "SIG" + name):
        return int(getattr(signal, "SIG" + name)) + int(offset or 0)
    raise BadParameter(f"invalid signal: {text}")


def int_or_zero(text: str) -> int:
    """The number that a text is, 0 for any other text."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


###############################################################################
# Patterns
###############################################################################

# Clients filter by expressions of Go's regexp, which takes a time linear in the text. Python's re goes back over its
# choices instead, and nothing else runs meanwhile: so the ways through an expression are counted before a search. What
# few write and re does not know is left out: classes of Unicode, \Q, flags in the middle of an expression.
ELEMENT = re.compile(r"""
    (?P<repeat>(?P<sign>[*+?]) | \{(?P<low>[0-9]{1,4})(?P<comma>,(?P<high>[0-9]{0,4}))?\})\??
    | (?P<open>\((?:(?!\?) | \?P?<(?P<name>\w+)> | \?[ims]*:)) | (?P<close>\)) | (?P<or>\|) | (?P<end>\$ | \\z)
    | \[(?P<not>\^?)(?P<members>\]?(?:\[:\w+:\] | \\. | [^\]\\])+)\]
    | (?P<escaped>\\(?:[AbBdDsSwWafnrtv] | x[0-9A-Fa-f]{2} | [^0-9A-Za-z])) | (?P<plain>[^\\()\[])""", re.X | re.S)
# Of a class: one of POSIX, what has a backslash, what Python takes for more than itself.
MEMBER = re.compile(r"\[:(\w+):\]|(\\.)|([\[&~|])", re.S)
CLASSES = {
    "alnum": r"0-9A-Za-z", "alpha": r"A-Za-z", "ascii": r"\0-\x7f", "blank": r"\t ", "cntrl": r"\0-\x1f\x7f",
    "digit": r"0-9", "graph": r"!-~", "lower": r"a-z", "print": r" -~", "punct": r"!-/:-@\[-`{-~", "space": r"\t-\r ",
    "upper": r"A-Z", "word": r"0-9A-Z_a-z", "xdigit": r"0-9A-Fa-f",
}
# How many ways there may be through an expression for a text, what Go repeats at most, the characters of an expression.
LARGEST_CHOICE, REPEAT_LIMIT, EXPRESSION_LIMIT = 10**8, 1000, 4096
# The seconds of processor time that all searches of one filter may take together.
SEARCH_SECONDS = 2
# The ways through a piece: a number, and the power of the text's length to multiply it with.
Choice = Tuple[int, int]


class PatternError(ValueError):
    """What Go's regexp does not compile, or is left out here."""


def too_costly() -> BadParameter:
    """The error for an expression that could take too long."""
    return BadParameter("invalid filter: an expression has too many repetitions and alternatives")


def repeated(piece: Choice, least: int, most: Optional[int]) -> Choice:
    """The ways through a piece that is repeated; `most` is None for no limit. 400 for too many."""
    if max(least, most or 0) > REPEAT_LIMIT or least > (least if most is None else most):
        raise PatternError()
    if piece == (1, 0):
        return (1, 1) if most is None else (most - least + 1, 0)
    if most is None or most > 8:
        raise too_costly()
    return piece[0] ** most + most - least, piece[1] * most


def joined(alternatives: List[List[Choice]]) -> Choice:
    """The ways through a group."""
    ways = [(math.prod(count for count, _ in each), sum(power for _, power in each)) for each in alternatives]
    return sum(count for count, _ in ways), max(power for _, power in ways)


def class_members(text: str) -> str:
    """What stands in brackets, for Python's re."""
    def member(found: "re.Match[str]") -> str:
        if found[1] and found[1] not in CLASSES:
            raise PatternError()
        return CLASSES[found[1]] if found[1] else found[2] or "\\" + found[3]

    return MEMBER.sub(member, text)


class Pattern:
    """An expression of Go's regexp, to be found anywhere in a text. PatternError for what Go's regexp refuses; 400 for
    what could take too long."""

    def __init__(self, text: str):
        if len(text) > EXPRESSION_LIMIT:
            raise too_costly()
        flags = re.match(r"(?:\(\?[ims]+\))?", text)[0]
        found, groups, at, kind = flags, [[[]]], len(flags), ""
        while at < len(text):
            element, before = ELEMENT.match(text, at), kind
            if not element:
                raise PatternError()
            at, kind = element.end(), element.lastgroup
            if kind == "repeat":
                if before == "repeat" or not groups[-1][-1]:
                    raise PatternError()
                least = int(element["low"] or element["sign"] == "+")
                most = int(element["high"]) if element["high"] else 1 if element["sign"] == "?" else (
                    None if element["sign"] or element["comma"] else least)
                groups[-1][-1].append(repeated(groups[-1][-1].pop(), least, most))
            elif kind == "open":
                groups.append([[]])
            elif kind == "or":
                groups[-1].append([])
            elif kind == "close":
                if len(groups) == 1:
                    raise PatternError()
                inner = joined(groups.pop())
                groups[-1][-1].append(inner)
            else:
                groups[-1][-1].append((1, 0))
            found += (
                f"(?P<{element['name']}>" if element["name"] else ("$" if "m" in flags else r"\Z") if kind == "end" else
                f"[{element['not']}{class_members(element['members'])}]" if kind == "members" else
                "\\{" if element["plain"] == "{" else element["repeat"] or element[0])
        if len(groups) > 1:
            raise PatternError()
        self.choice = joined(groups[0])
        try:
            self.compiled = re.compile(found, re.ASCII)
        except (re.error, RecursionError, OverflowError):
            raise PatternError() from None

    def found_in(self, text: str) -> bool:
        """Whether it matches a part of a text; 400 where that could take too long."""
        count, power = self.choice
        if count * (len(text) + 1) ** (power + 1) > LARGEST_CHOICE:
            raise too_costly()
        return bool(self.compiled.search(text))


class NameFilter:
    """The values of a filter by name, as dockerd takes them: each is the name itself or an expression that is found in
    it. An expression that does not compile is found nowhere. 400 for one that could take too long."""

    SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")

    def __init__(self, wanted: Iterable[str]):
        self.exact = frozenset(wanted)
        self.parts = [each for each in self.exact if not self.SPECIAL.search(each)]
        self.patterns: List[Pattern] = []
        self.spent = 0.0
        for each in self.exact.difference(self.parts):
            with contextlib.suppress(PatternError):
                self.patterns.append(Pattern(each))

    def passes(self, *names: str) -> bool:
        """Whether one of the names of an object passes; all do where the filter has no values."""
        return not self.exact or any(
            name in self.exact or any(part in name for part in self.parts)
            or any(self.found(each, name) for each in self.patterns) for name in names)

    def found(self, pattern: Pattern, name: str) -> bool:
        """Whether an expression is found in a name; 400 once the searches have taken too long together."""
        if self.spent > SEARCH_SECONDS:
            raise too_costly()
        began = time.thread_time()
        try:
            return pattern.found_in(name)
        finally:
            self.spent += time.thread_time() - began


###############################################################################
# Requests, responses
###############################################################################


class Client:
    """The client's connection; lets a handler be told when the client disconnects."""

    def when_gone(self, callback: Callable[[], Any], half: bool = True):
        """Context in which `callback` is called, from another thread, once the client has left; with `half` also when
        it only stops sending, which is an end for everything but a hijacked connection. A client that cannot be watched
        is taken to stay."""
        return contextlib.nullcontext()


class Request:
    """One request. `version` is a pair such as (1, 44); `query` maps each name to its list of values; `body` has
    `read(n)` and `blocks()`; `headers` compares names without case."""

    def __init__(self, method: str, path: str, version: Tuple[int, int] = API_NEWEST,
                 query: Optional[Dict[str, List[str]]] = None,
                 headers: Any = None, body: Any = None, client: Optional[Client] = None):
        self.method, self.path, self.version = method, path, version
        self.query = {} if query is None else query
        self.headers = {} if headers is None else headers
        self.body = io.BytesIO() if body is None else body
        self.client = client or Client()

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

    def timestamp(self, name: str) -> Optional[int]:
        """Nanoseconds since 1970 from `1700000000`, `1700000000.5` or RFC 3339; None when absent; 400 otherwise."""
        text = self.value(name).strip()
        if not text:
            return None
        found = nanoseconds_of(text)
        if found is None:
            raise BadParameter(f"invalid value for {name}: {text!r} is not a timestamp")
        return found

    def read_body(self) -> bytes:
        """The whole of a body that has to be small; 413 beyond JSON_LIMIT."""
        data = bytearray()
        for part in iter(lambda: self.body.read(65536), b""):
            data += part
            if len(data) > JSON_LIMIT:
                raise TooLarge(f"request body is larger than {JSON_LIMIT >> 20} MiB")
        return bytes(data)

    def json(self, shape: Any) -> Dict[str, Any]:
        """The body as a JSON object of a shape, as with dockerd {} where there is none; 400 with its words for what is
        no such object."""
        data = self.read_body()
        kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
        if kind and kind != "application/json":
            raise BadParameter(f"unsupported Content-Type header ({kind}): must be 'application/json'")
        if data and not kind:
            raise BadParameter("malformed Content-Type header (): mime: no media type")
        if not data.strip():
            if data:
                raise BadParameter("invalid JSON: got EOF while reading request body")
            return {}
        return shaped(parse_json(data), shape)

    def filters(self, *allowed: str) -> Dict[str, List[str]]:
        """The `filters` parameter, of either form clients send ({"a":{"b":true}} and {"a":["b"]}), as name -> values.
        400 for bad JSON and, where `allowed` names the filters of the endpoint, for any other name."""
        text = self.value("filters").strip()
        value = parse_json(text.encode("utf-8", "surrogateescape")) if text else None
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


# What Python's json says of a syntax error -> what Go says of the character.
JSON_ERRORS = (("Expecting value", "looking for beginning of value"), ("Expecting ':'", "after object key"),
               ("Expecting ','", "after object key:value pair"), ("Invalid control", "in string literal"),
               ("Invalid \\", "in string escape code"), ("", "looking for beginning of object key string"))


def json_error(error: Exception) -> str:
    """What Go says of JSON that cannot be read."""
    if not isinstance(error, json.JSONDecodeError):
        return "invalid JSON: " + ("exceeded max depth" if isinstance(error, RecursionError)
                                   else str(error).splitlines()[0][:200])
    rest = error.doc[error.pos:].strip()
    if error.msg == "Extra data":
        return "unexpected content after JSON"
    if error.msg.startswith("Unterminated") or any(each.startswith(rest) for each in ("true", "false", "null")):
        return "invalid JSON: unexpected EOF"
    return f"invalid JSON: invalid character {rest[0]!r} " + next(words for start, words in JSON_ERRORS
                                                                  if error.msg.startswith(start))


def no_constant(text: str) -> Any:
    """NaN and Infinity, which Python's json reads, are no JSON."""
    raise ValueError(f"invalid character {text[0]!r} looking for beginning of value")


def parse_json(data: bytes) -> Any:
    """A JSON value; 400 for what is none, has something behind it, or nests without end."""
    try:
        value = json.loads(data.decode(), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise BadParameter(json_error(error)) from None
    if b"\\ud" in data or b"\\uD" in data:
        # Half of a surrogate pair is no text that could be given to a process.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadParameter("invalid JSON: it has half of a surrogate pair") from None
    return value


def header_json(text: str, shape: Any) -> Dict[str, Any]:
    """The JSON of a shape in a header, as base64url. As with dockerd, one that cannot be read is none."""
    with contextlib.suppress(ValueError, BadParameter):
        return shaped(parse_json(base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))), shape)
    return {}


# What packed data begins with -> the module and the name of what unpacks it; the last one is there from Python 3.14 on.
PACKED = {b"\x1f\x8b": ("zlib", "decompressobj", 31), b"BZh": ("bz2", "BZ2Decompressor"),
          b"\xfd7zXZ": ("lzma", "LZMADecompressor"), ZSTD: ("compression.zstd", "ZstdDecompressor")}


def decompressor(head: bytes) -> Optional[Callable[[], Any]]:
    """What makes decompressors for a body that begins so; None for one that is not packed."""
    for begin, (module, name, *arguments) in PACKED.items():
        if head.startswith(begin):
            with contextlib.suppress(ImportError):
                return functools.partial(getattr(importlib.import_module(module), name), *arguments)
    return None


def inflated(unpack: Any, data: bytes) -> Iterator[bytes]:
    """What a decompressor makes of some data, at most BLOCK bytes at a time."""
    while True:
        plain = unpack.decompress(data, BLOCK)
        if plain:
            yield plain
        # zlib gives back what it has not taken; the others keep it.
        data = getattr(unpack, "unconsumed_tail", b"")
        if unpack.eof or not (data or len(plain) == BLOCK or not getattr(unpack, "needs_input", True)):
            return


def unpacked(blocks: Iterable[Any], begin: Callable[[], Any]) -> Iterator[bytes]:
    """The content of compressed blocks, of one stream or of several in a row, which also zeros may stand between; 400
    for one that breaks off."""
    unpack = begin()
    for block in blocks:
        data = bytes(block)
        while data:
            if unpack.eof:
                data = data.lstrip(b"\0")
                if not data:
                    break
                unpack = begin()
            yield from inflated(unpack, data)
            data = unpack.unused_data
    if not unpack.eof:
        raise BadParameter("invalid archive: its compressed data breaks off")


def plain_blocks(blocks: Iterator[Any]) -> Iterator[Any]:
    """The blocks of a tar, unpacked where it came as gzip, bzip2, xz or, with Python 3.14, zstd; 400 for one that is
    broken."""
    first = b""
    for block in blocks:
        first += bytes(block)
        if len(first) >= 6:
            break
    begin = decompressor(first)
    if not begin:
        yield from itertools.chain([first] if first else [], blocks)
        return
    try:
        yield from unpacked(itertools.chain([first], blocks), begin)
    except Exception as error:
        told = isinstance(error, (OSError, ValueError, EOFError, zlib.error))
        if not told and type(error).__name__ not in ("LZMAError", "ZstdError"):
            raise
        raise BadParameter(f"invalid archive: {error}") from None


class Stream:
    """A body that is made while it is sent.

    `chunks` yields bytes; a generator is closed in any case, so its own `finally` does the cleaning up, and while it
    waits for something else than the client it stands in `request.client.when_gone()`. A `primed` stream yields its
    first chunk before the headers go out: an ApiError raised until then is an ordinary error response, later it can
    only break the stream off."""

    def __init__(self, chunks: Iterable[bytes], primed: bool = False):
        self.chunks, self.primed = iter(chunks), primed

    def close(self) -> None:
        """End the generator, whether it was begun or not."""
        close = getattr(self.chunks, "close", None)
        if close:
            close()


class Connection:
    """A hijacked connection: the socket and the bytes that were read before it was taken over."""

    def __init__(self, sock: socket.socket, early: bytes = b""):
        self.sock, self.early = sock, early

    def recv(self, size: int = 65536) -> bytes:
        """Up to `size` bytes, b"" at the client's end of file (it may still listen)."""
        if self.early:
            data, self.early = self.early[:size], self.early[size:]
            return data
        try:
            return self.sock.recv(size)
        except OSError:
            return b""

    def stop_input(self) -> None:
        """Let a recv() that waits return with the end of file."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

    def send_now(self, *parts: bytes) -> bytes:
        """Send as much of the parts as the client takes now; the rest. ClientGone when nobody is there any more."""
        try:
            # No more than the kernel takes in one call.
            data = parts if len(parts) < 1000 else (b"".join(parts),)
            sent = self.sock.sendmsg(data, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            raise ClientGone() from None
        return b"".join(parts)[sent:] if sent < sum(map(len, parts)) else b""

    def send(self, *parts: bytes) -> None:
        """Send all parts in order; ClientGone when nobody is there any more."""
        try:
            sent = self.sock.sendmsg(parts)
            total = sum(map(len, parts))
            if sent < total:
                self.sock.sendall(memoryview(b"".join(parts))[sent:])
        except OSError:
            raise ClientGone() from None


class Hijack(NamedTuple):
    """A body that takes the connection over: `serve(connection)` is called after the 101 (or, where the client asked
    for no upgrade, the 200), and the connection ends with it; `abandon` instead where the client has left already.
    `protocol` is what the Upgrade header answers."""

    serve: Callable[[Connection], None]
    protocol: str = "tcp"
    abandon: Callable[[], None] = lambda: None


class Response:
    """Status, body and headers. A dict or list is sent as JSON, bytes as they are, a Stream chunked, a Hijack takes
    the connection; None has no body."""

    def __init__(self, status: int = 200, body: Any = None, media_type: str = "",
                 headers: Optional[Dict[str, str]] = None):
        self.status, self.headers = status, dict(headers or {})
        self.body, self.media_type = body, media_type
        if isinstance(body, (dict, list)):
            self.body = json_bytes(body) + b"\n"
            self.media_type = media_type or "application/json"


###############################################################################
# Routes
###############################################################################


class Route(NamedTuple):
    """A line of the route table: the paths that begin with `prefix` and match `pattern`, which is compiled when it is
    first needed. All at once took a tenth of the way to the first answer."""

    method: str
    prefix: str
    pattern: str
    handler: Callable[..., Response]
    path: str


ROUTES: List[Route] = []
PLACEHOLDERS = {
    # An image name may have slashes, ports, tags and digests.
    "image": r"(?P<name>.+)",
    "name": r"(?P<name>[^/]+)",
    # Of which no handler wants to know.
    "any": r"[^/]+",
    # As dockerd has it: a client asks for a container by what may be the name of an image.
    "id": r"(?P<name>.+)",
}


def route(method: str, path: str):
    """Put the function below into the route table. `{image}`, `{name}` and `{id}` in the path become its argument
    `name`; the API version in front is taken off centrally."""
    pattern = re.sub(r"\{(\w+)\}", lambda found: PLACEHOLDERS[found.group(1)], path)

    def register(handler):
        ROUTES.append(Route(method, path.partition("{")[0], pattern, handler, path))
        return handler

    return register


def split_version(path: str) -> Tuple[Tuple[int, int], str]:
    """('/v1.44/info') -> ((1, 44), '/info'); a path without version is of the newest. 400 with dockerd's words for a
    version out of range."""
    found = re.match(r"/v(\d[\d.]{0,9})(?=/)", path)
    if not found:
        return API_NEWEST, path
    version = (*(int(each or 0) for each in found.group(1).split(".")), 0)[:2]
    if version > API_NEWEST:
        raise BadParameter(f"client version {found.group(1)} is too new. Maximum supported API version is "
                           "%d.%d" % API_NEWEST)
    if version < API_OLDEST:
        raise BadParameter(f"client version {found.group(1)} is too old. Minimum supported API version is "
                           "%d.%d, please upgrade your client to a newer version" % API_OLDEST)
    return version, path[found.end():]


def find_route(method: str, path: str) -> Tuple[Callable[..., Response], Dict[str, str]]:
    """The handler for a path and its arguments; 404 as dockerd says it, for a method that is not served too. As there,
    OPTIONS is answered for any path."""
    if method == "OPTIONS":
        return lambda *_: Response(200), {}
    for each in ROUTES:
        if each.method == method and path.startswith(each.prefix):
            found = re.fullmatch(each.pattern, path)
            if found:
                return each.handler, found.groupdict()
    raise NotFound("page not found")


def dispatch(engine: "Engine", request: Request) -> Response:
    """Answer a request: with 204 where the handler returns nothing. ApiErrors become error responses here and nowhere
    else."""
    try:
        handler, arguments = find_route(request.method, request.path)
        return handler(engine, request, **arguments) or Response(204)
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
# `{0}` is the first group found. Words that clients match on are dockerd's. Each line was seen from a real nerdctl.
NERDCTL_ERRORS: List[Tuple[str, type, str]] = [
    (r"cannot access containerd socket \"?([^\"\s:]+)", Unavailable,
     "containerd is not running at {0}: install or start it (systemctl start containerd), or say where it is with "
     "--address"),
    (r"unknown service containerd\.services\.(?:streaming|transfer)\.", NotImplementedHere,
     "this nerdctl needs containerd 1.7 or newer for it: install that, or nerdctl 1.7"),
    (r"(?:connection error|failed to dial|connection refused|error reading server preface).{0,400}?(containerd\.sock)",
     Unavailable,
     "containerd does not answer: see systemctl status containerd"),
    (r"connection error: desc = \"transport: Error while dialing: dial unix (?!\S*buildkit)(\S+): ", Unavailable,
     "containerd does not answer at {0}: see systemctl status containerd"),
    (r"rootless containerd not running", Unavailable,
     "rootless containerd is not running: containerd-rootless-setuptool.sh install sets it up"),
    (r"(?:no buildkit host is available|failed to ping to host|buildctl.* executable file not found|"
     r"could not connect to buildkit|listing workers)", Unavailable,
     "buildkitd does not answer: install or start it with a containerd worker, or say where it is with "
     "--buildkit-host"),
    (r"no image was built", ApiError,
     "no image was built where nerdctl looks for it: buildkitd's first worker has to be a containerd worker in "
     "nerdctl's namespace (buildkitd.toml)"),
    (r"unknown flag: (--\S+)", NotImplementedHere, "this nerdctl has no option {0}: newer ones have"),
    (r"unknown subcommand \"(\w+)\" for", NotImplementedHere, "this nerdctl has no {0}: newer ones have"),
    (r"unsupported restart policy \"([^\"]*)\", supported.*", NotImplementedHere, ""),
    (r"unknown ipc value\..* got: \"([^\"]*)\"", NotImplementedHere, "this nerdctl has no --ipc={0}: newer ones have"),
    (r"executable file not found in \$PATH", BadParameter, ""),
    (r"exec: \"[^\"]*\": (?:permission denied|stat \S+: no such file or directory)|permission denied: unknown",
     BadParameter, ""),
    (r"(?:no such container:? |no container found for: |no running task found for container |container not found: )"
     r"\"?([^\s\"]+)|container \"([0-9a-f]{64})\" in namespace \"[^\"]*\": not found", NotFound,
     "No such container: {0}"),
    (r"image not available: \"?([^\"\s]+)|image \"([^\"]+)\": not found", NotFound, "No such image: {0}"),
    (r"unauthorized|no basic auth credentials|authorization failed|401 Unauthorized", Unauthorized, ""),
    (r"(?:access denied|insufficient_scope|403 Forbidden)", NotFound, ""),
    (r"failed to resolve (?:image|reference):? \"?([^\s\"]+?)\"?:(?: \S+:)? not found", NotFound,
     'failed to resolve reference "{0}": {0}: not found'),
    (r"no network found matching: (\S+)", NotFound, "network {0} not found"),
    (r"no such network: [\\\\\"]*([^\\\\\"\s]+)", NotFound,
     "failed to set up container networking: network {0} not found"),
    (r"requested IP address \S+ is not available in range set", Forbidden,
     "failed to set up container networking: Address already in use"),
    (r"volume \"?([^\"\s/]+)\"? is in use", Conflict, "remove {0}: volume is in use"),
    (r"\"([^\"/]+)/volume.json\" does not exist|volume \"([^\"]+)\": not found", NotFound, "get {0}: no such volume"),
    (r"name \"([^\"]+)\" is already used by ID \"([^\"]*)\"", Conflict,
     'Conflict. The container name "/{0}" is already in use by container "{1}". You have to remove (or rename) that '
     "container to be able to reuse that name."),
    (r"network with name (\S+) already exists", Conflict, "network with name {0} already exists"),
    (r"is in (\w+) status\. unpause/stop container first", Conflict,
     "cannot remove container: container is {0}: stop the container before removing or force remove"),
    (r"cannot exec in a (?:stopped|paused)|is not (?:paused|running)|already paused", Conflict, ""),
    (r'bind", "([^"]*)", "\S*"\): mountpoint "([^"]*)" doesn.t have optional field neither of \[shared:\]', ApiError,
     "path {0} is mounted on {1} but it is not a shared mount"),
    (r'bind", "([^"]*)", "\S*"\): mountpoint "([^"]*)" doesn.t have optional field', ApiError,
     "path {0} is mounted on {1} but it is not a shared or slave mount"),
    (r"bind for :?(\S+) failed: port is already allocated", ApiError, "Bind for {0} failed: port is already allocated"),
    (r"source does not exist|no such file or directory: unknown", NotFound, ""),
    (r"identifier \"[^\"]*\" must match pattern|invalid filter|invalid reference format|unknown (?:shorthand )?flag",
     BadParameter, ""),
    (r"no space left on device", ApiError, ""),
    (r"invalid argument \"|invalid (?:ulimit type|tmpfs option|mode \"|user mode|MAC address|hostPort)|"
     r"mixed network types|failed to set label|is not correctly formatted|failed to parse (?:device|subnet|gateway)|"
     r"no matching subnet for|without subnet|unsupported scheme",
     BadParameter, ""),
]
LOGRUS = re.compile(r'^time="[^"]*" level=(\w+) msg=(?:"((?:[^"\\]|\\.)*)"|(\S+))(?: error="((?:[^"\\]|\\.)*)")?')
GO_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
SHORT_CALL = 120.0


def parse_logrus(line: str) -> Tuple[str, str]:
    """A line of nerdctl's stderr as (level, message); ("", line) for what is not logrus. ctr's last line is fatal."""
    if line.startswith("ctr: "):
        return "fatal", line[len("ctr: "):]
    found = LOGRUS.match(line)
    if found:
        level, quoted, plain, error = found.groups()
        message = plain if quoted is None else quoted
        if error:
            message = f"{message}: {error}"
        return level, re.sub(r"\\(.)", lambda each: GO_ESCAPES.get(each.group(1), each.group(0)), message)
    return "", line


def nerdctl_message(stderr: str) -> str:
    """What went wrong, from everything nerdctl wrote on stderr: the fatal line, or the error and warning lines before
    a fatal line that only counts them, or the last line there is."""
    lines = [parse_logrus(line) for line in stderr.splitlines() if line.strip()]
    fatal = [re.sub(r"^\d+ errors:\n(?=.)", "", message) for level, message in lines if level == "fatal"]
    if fatal and not re.match(r"^(\d+ errors?:?|.*\d errors?:)$", fatal[-1].strip()):
        return re.sub(r"^1 errors:\s*", "", fatal[-1].strip())
    for wanted in ("error", "", "warning"):
        told = [message.strip() for level, message in lines if level == wanted]
        if told:
            return "; ".join(told[-3:])
    return (fatal[-1].strip() if fatal else "") or "nerdctl failed without a word"


def nerdctl_error(stderr: str) -> ApiError:
    """The ApiError for what nerdctl wrote on stderr before it ended with a status other than 0."""
    message = re.sub("^(?=failed to create shim task)", "failed to create task for container: ",
                     nerdctl_message(stderr))
    # Some fatal lines only say that there was an error, and the lines before say which.
    for text in (message, "\n".join(parse_logrus(line)[1] for line in stderr[-4096:].splitlines())):
        for pattern, kind, words in NERDCTL_ERRORS:
            found = re.search(pattern, text, re.S)
            if found:
                return kind(words.format(*(each for each in found.groups() if each is not None)) if words else message)
    return ApiError(message)


class Output(NamedTuple):
    """What a finished nerdctl left: `status` is the exit status, `stdout` bytes, `stderr` text."""

    status: int
    stdout: bytes
    stderr: str


class Process(contextlib.AbstractContextManager):
    """A running nerdctl, the leader of a process group of its own. Used as a context: at its end the group is gone and
    reaped, whatever happened. stderr goes to memory that no reader is needed for, unless it was asked for as a pipe."""

    # How long it may take to end when it is asked to, in seconds.
    GRACE = 2.0

    def __init__(self, runner: "Nerdctl", argv: List[str], client: Client, stderr: Any = None, **how: Any):
        self.runner, self.argv = runner, argv
        self.began = time.monotonic()
        self.messages = None if stderr else os.fdopen(os.memfd_create("stderr"), "rb", 0)
        try:
            self.popen = subprocess.Popen(argv, stderr=stderr or self.messages, bufsize=0, start_new_session=True,
                                          **how)
        except OSError as error:
            if self.messages:
                self.messages.close()
            raise runner.missing(error) from None
        self.stdin, self.stdout, self.stderr = self.popen.stdin, self.popen.stdout, self.popen.stderr
        if self.stdin:
            enlarge_pipe(self.stdin.fileno())
        runner.processes.add(self)
        self.watch = client.when_gone(self.kill)
        self.watch.__enter__()

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, data: Any) -> bool:
        """Write all of `data` to stdin; False when the process no longer reads."""
        with contextlib.suppress(OSError, ValueError):
            write_all(self.stdin.fileno(), data)
            return True
        return False

    def close_stdin(self) -> None:
        """Tell the process that its input has ended."""
        if self.stdin:
            with contextlib.suppress(OSError):
                self.stdin.close()

    def feed(self, archive: Iterable[Any]) -> None:
        """Write an archive to stdin, as far as the process reads, and let the process find its end; where the archive
        breaks off, the process fails."""
        try:
            for _ in itertools.takewhile(self.write, archive):
                pass
        except BaseException:
            self.spoil()
            raise
        self.close_stdin()

    def spoil(self) -> None:
        """End an archive on stdin that broke off so that it cannot be taken for the whole, and let the process fail by
        itself. A nerdctl that is killed leaves what it had begun in containerd for a day, and in the way of the next
        archive with a file of that name; what unpacks removes the file that came half."""
        # No whole number of a tar's blocks.
        self.write(b"\xff" * 100003)
        self.close_stdin()
        self.wait(5.0)

    def read(self, size: int = BLOCK) -> bytes:
        """Up to `size` bytes of stdout as soon as there are any; b"" at its end."""
        return os.read(self.stdout.fileno(), size)

    def lines(self, source: Any = None) -> Iterator[str]:
        """The lines of stdout, or of another of its pipes, as they come and without line ends."""
        with io.BufferedReader(source or self.stdout, 65536) as file:
            for line in file:
                yield line.rstrip(b"\n").decode(errors="replace")

    def wait(self, timeout: Optional[float] = None) -> Optional[int]:
        """The exit status, negative for a signal; None when it still runs after `timeout` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.popen.wait(timeout)
        return None

    def error_text(self) -> str:
        """Everything written to stderr so far, at most its last 64 KiB."""
        if not self.messages or self.messages.closed:
            return ""
        size = os.fstat(self.messages.fileno()).st_size
        return os.pread(self.messages.fileno(), 65536, max(0, size - 65536)).decode(errors="replace")

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
            if self.wait(self.GRACE) is None:
                self.kill()
                self.popen.wait()
        if self in self.runner.processes:
            self.runner.tell(self)
        for each in filter(None, (self.stdin, self.stdout, self.stderr, self.messages)):
            with contextlib.suppress(OSError):
                each.close()
        self.runner.processes.discard(self)


def poll_readable(descriptor: int, timeout: Optional[float]) -> bool:
    """Whether a descriptor becomes readable (or ends) within `timeout` seconds. No limit on its number, unlike
    select."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(None if timeout is None else max(0, int(timeout * 1000))))


def runtime_folder() -> str:
    """The folder of a user's sockets and the like."""
    return os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"


class Nerdctl:
    """Runs nerdctl: the only place that starts a process. `command` is the argv in front, of one word or more. Short
    calls wait in a queue for one of a few places; streams have places of their own."""

    def __init__(self, command: List[str], namespace: str = "", address: str = "", snapshotter: str = "",
                 buildkit_host: str = "", debug: bool = False):
        self.command, self.namespace, self.address = list(command), namespace or "default", address
        self.snapshotter, self.debug = snapshotter or "overlayfs", debug
        given = {"namespace": self.namespace, "address": address, "snapshotter": snapshotter}
        self.options = [f"--{key}={value}" for key, value in given.items() if value]
        self.environment = {key: value for key, value in os.environ.items()
                            if not key.startswith(("LISTEN_", "NOTIFY_SOCKET"))}
        if buildkit_host:
            self.environment["BUILDKIT_HOST"] = buildkit_host
        # Most of a short call is what Go does before main(); with a larger heap it collects no garbage meanwhile, here
        # and in the hooks of a container, which get the environment of its `nerdctl create`.
        self.environment.setdefault("GOGC", "200")
        self.places = threading.BoundedSemaphore(max(4, 2 * (os.cpu_count() or 1)))
        self.processes: set = set()

    def missing(self, error: OSError) -> ApiError:
        """The ApiError for a nerdctl, or another program, that could not be started."""
        if error.errno == errno.E2BIG:
            return BadParameter("invalid value: it is longer than a command line may be")
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
            others = {"buildctl": "install BuildKit's buildctl on PATH, and start a buildkitd", "ps": "install procps"}
            advice = others.get(self.command[0], "install nerdctl on PATH, or say where it is with --nerdctl")
            return Unavailable(f"{self.command[0]} cannot be run ({error.strerror}): {advice}")
        return Unavailable(f"cannot start {self.command[0]}: {error.strerror}")

    def argv(self, arguments: Iterable[str]) -> List[str]:
        """The whole command line; 400 for a word no process can be given."""
        words = [*self.command, *self.options, *arguments]
        if any("\0" in word for word in words):
            raise BadParameter("invalid value: it has a NUL byte")
        return words

    def tell(self, process: Process) -> None:
        """Under --debug, log the command with its time."""
        if self.debug:
            took = (time.monotonic() - process.began) * 1000
            said = process.error_text() if process.popen.returncode > 0 else ""
            reason = " " + nerdctl_message(said) if said else ""
            log(f"{shlex.join(process.argv)} -> {process.popen.returncode} in {took:.0f} ms{reason}")

    def start(self, *arguments: str, stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.PIPE, stderr: Any = None,
              environment: Optional[Dict[str, str]] = None, client: Client = Client(), **how: Any) -> Process:
        """A running process for a stream. stderr None keeps it in memory for check(). It is killed when `client`
        leaves."""
        merged = {**self.environment, **environment} if environment else self.environment
        return Process(self, self.argv(arguments), client, stderr, env=merged, stdin=stdin, stdout=stdout, **how)

    def start_tree(self, before: Iterable[str]) -> Process:
        """This file as a process in a container's tree, `nerdctld.py tree`, with its standard streams as pipes and
        errors in memory; `before` is the argv of a program that starts it."""
        code = own_bytecode()
        argv = [*before, sys.executable, "-IS", f"/proc/self/fd/{code}", "tree"]
        return Process(self, argv, Client(), env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                       pass_fds=(code,))

    def start_logger(self, uri: str, identity: str) -> "LoggingProgram":
        """The logging program that a container's label names, to be given its output here."""
        found = urllib.parse.urlsplit(uri)
        words = [word for each in urllib.parse.parse_qsl(found.query, keep_blank_values=True) for word in each if word]
        environment = {**self.environment, "CONTAINER_ID": identity, "CONTAINER_NAMESPACE": self.namespace}
        try:
            return LoggingProgram([found.path, *words], environment)
        except OSError as error:
            raise ApiError(f"failed to initialize logging driver: {found.path}: {error.strerror}") from None

    def output(self, *arguments: str, data: bytes = b"", timeout: float = SHORT_CALL,
               environment: Optional[Dict[str, str]] = None, keep: Tuple[int, ...] = (),
               meanwhile: Callable[[], Any] = lambda: None) -> Output:
        """Run to the end, whatever its status; `meanwhile` is called once it has started, and it has the descriptors
        `keep` open, too. 503 when no place becomes free or it does not end within `timeout`."""
        if not self.places.acquire(timeout=timeout):
            raise Unavailable("too many nerdctl processes are running")
        try:
            return self._output(arguments, data, timeout, environment, keep, meanwhile)
        finally:
            self.places.release()

    def _output(self, arguments, data, timeout, environment, keep=(), meanwhile=lambda: None) -> Output:
        stdin = subprocess.PIPE if data else subprocess.DEVNULL
        with self.start(*arguments, stdin=stdin, environment=environment, pass_fds=keep) as process:
            meanwhile()
            try:
                stdout, _ = process.popen.communicate(data or None, timeout)
            except subprocess.TimeoutExpired:
                what = f"nerdctl {arguments[0]}" if arguments else self.command[-1]
                raise Unavailable(f"{what} did not end within {timeout:.0f} seconds") from None
            return Output(process.popen.returncode, stdout, process.error_text())

    def run(self, *arguments: str, **how: Any) -> Output:
        """output(); the ApiError of the table above for a status other than 0."""
        output = self.output(*arguments, **how)
        if output.status:
            raise nerdctl_error(output.stderr)
        return output

    def rows(self, *arguments: str, timeout: float = SHORT_CALL) -> List[Any]:
        """The JSON values that a command with a `{{json …}}` format prints, one a line."""
        return parse_rows(self.run(*arguments, timeout=timeout).stdout)

    # What class Ctr does in other ways. A running process that comes back is to be used as a context.

    def version(self) -> Dict[str, Any]:
        """The versions of the programs that do the work, in nerdctl's form."""
        return next(iter(self.rows("version", "--format", "{{json .}}", timeout=10)), {})

    def info(self) -> Dict[str, Any]:
        """What is known of the machine, in nerdctl's form."""
        return next(iter(self.rows("info", "--format", "{{json .}}", timeout=20)), {})

    def login(self, host: str, user: str, password: str, environment: Dict[str, str]) -> None:
        """Have a registry check credentials; 401 where it refuses them."""
        # Not in one of the places: it mostly waits for the registry.
        output = self._output(("login", "--username", user, "--password-stdin", "--", host), password.encode(), 60.0,
                              environment)
        if output.status:
            error = nerdctl_error(output.stderr)
            if isinstance(error, Unavailable):
                raise error
            refused = r"401|[Uu]nauthorized|incorrect username|authentication (?:is )?required|denied"
            raise (Unauthorized if re.search(refused, output.stderr) else ApiError)(str(error))

    def pull(self, name: str, platform: str, unpack: bool, environment: Optional[Dict[str, str]],
             client: Client) -> ContextManager[Process]:
        """A running pull, with its progress on stdout. Only for a platform that is named it matters whether nerdctl is
        to `unpack`: by itself it unpacks what fits the machine."""
        options = [f"--platform={platform}", f"--unpack={'auto' if unpack else 'false'}"] if platform else []
        return self.start("pull", *options, "--", name, environment=environment, client=client)

    def push(self, name: str, group: Any, platforms: List[str], environment: Optional[Dict[str, str]],
             client: Client) -> ContextManager[Process]:
        """A running push of an image by one of its names, with its progress on stdout."""
        options = [f"--platform={each}" for each in platforms]
        return self.start("push", *options, "--", name, environment=environment, client=client)

    def pushed_digest(self, process: Process) -> str:
        """The digest of what a push sent in the place of an image that is here in part, "" when it sent the image."""
        found = re.findall(r"reduced-platform image \([^,]+, (sha256:[0-9a-f]{64})\)", process.error_text())
        return found[-1] if found else ""

    def load(self, platforms: List[str]) -> ContextManager[Process]:
        """A running load of the archive on its stdin, of all platforms where none is named."""
        options = [f"--platform={each}" for each in platforms] or ["--all-platforms"]
        return self.start("load", *options, stdin=subprocess.PIPE)

    def build(self, options: List[str], names: List[str], folder: str, environment: Optional[Dict[str, str]],
              client: Client) -> ContextManager[Process]:
        """A running build of a context with nerdctl's `options` of build; its progress is on stderr."""
        tags = [f"--tag={name}" for name in names]
        return self.start("build", *options, *tags, "--", folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          environment=environment, client=client)

    def buildkit_addresses(self) -> List[str]:
        """Where nerdctl looks for buildkitd, in its order."""
        if self.environment.get("BUILDKIT_HOST"):
            return [self.environment["BUILDKIT_HOST"]]
        base = "/run" if os.geteuid() == 0 else runtime_folder()
        return [f"unix://{base}/{name}/buildkitd.sock" for name in (f"buildkit-{self.namespace}", "buildkit-default",
                                                                    "buildkit")]

    def buildctl(self) -> "Nerdctl":
        """What runs BuildKit's own client, which nerdctl needs for builds anyway."""
        address = next((each for each in self.buildkit_addresses()
                        if not each.startswith("unix://") or os.path.exists(each[len("unix://"):])),
                        self.buildkit_addresses()[-1])
        return self.program("buildctl", f"--addr={address}")

    def program(self, *command: str) -> "Nerdctl":
        """What runs another program in the same way."""
        # Its calls have places of their own: what holds CNI's lock must not wait for a nerdctl that waits for the lock.
        other = Nerdctl(list(command))
        other.options, other.processes, other.debug = [], self.processes, self.debug
        return other

    def end_all(self) -> None:
        """End every process that is still running."""
        ending = list(self.processes)
        for process in ending:
            process.kill(signal.SIGTERM)
        deadline = time.monotonic() + 2.0
        for process in ending:
            if process.wait(max(0.0, deadline - time.monotonic())) is None:
                process.kill()


class LoggingProgram:
    """A logging program as containerd runs it: stdout and stderr of a container are its descriptors 3 and 4, and it
    closes 5 when it is ready. It is called with the number of a stream and its bytes."""

    def __init__(self, argv: List[str], environment: Dict[str, str]):
        pipes = [os.pipe() for _ in range(3)]
        ends, self.inputs = [pipes[0][0], pipes[1][0], pipes[2][1]], {1: pipes[0][1], 2: pipes[1][1]}
        try:
            # Numbers of their own first, so that none of the three is overwritten by another.
            ends += [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in ends]
            actions = [(os.POSIX_SPAWN_DUP2, each, number) for number, each in enumerate(ends[3:], 3)]
            self.pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions, setpgroup=0)
        except OSError:
            for each in self.inputs.values():
                os.close(each)
            raise
        finally:
            for each in (*ends, pipes[2][0]):
                os.close(each)

    def __call__(self, kind: int, data: bytes) -> None:
        """Write some output; nothing when the program has ended."""
        with contextlib.suppress(OSError):
            write_all(self.inputs[kind], data)

    def close(self) -> None:
        """Let it find the end of both, and end."""
        for each in self.inputs.values():
            os.close(each)
        threading.Thread(target=os.waitpid, args=(self.pid, 0), name="logger", daemon=True).start()


@functools.lru_cache(maxsize=None)
def own_bytecode() -> int:
    """A descriptor of this file as bytecode in memory, without what stands below the end of `nerdctld.py tree`:
    compiling it, or reading all of it, would be half of the time of each process that runs it."""
    import importlib.util
    import marshal

    # The one that the lines of shell at the top have run, where they have: else it would be compiled anew, and kept
    # beside the file.
    code = globals().get("code") or __loader__.get_code(__name__)
    end = tree_main.__code__.co_firstlineno
    kept = (None if getattr(each, "co_firstlineno", 0) > end else each for each in code.co_consts)
    compiled = os.memfd_create("nerdctld.pyc")
    os.write(compiled, importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code.replace(co_consts=tuple(kept))))
    return compiled


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


# In front of the names of temporary folders; behind it is the number of the process that they belong to.
TEMPORARY = "nerdctld-"


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[str]:
    """A new folder, 0700, that is gone at the end."""
    path = tempfile.mkdtemp(prefix=f"{TEMPORARY}{os.getpid()}-{kind}-")
    try:
        yield path
    finally:
        remove_tree(path)


@contextlib.contextmanager
def credentials_folder(auths: Dict[str, Dict[str, str]]) -> Iterator[Dict[str, str]]:
    """The environment of one nerdctl call with these credentials, in a config.json that only it is shown."""
    with temporary_folder("auth") as path:
        with open(os.path.join(path, "config.json"), "xb", opener=functools.partial(os.open, mode=0o600)) as file:
            file.write(json_bytes({"auths": auths}))
        yield {"DOCKER_CONFIG": path}


def sweep_temporary(own: bool = False) -> None:
    """Remove the temporary folders of processes of this user that no longer run, and with `own` those of this one."""
    root = tempfile.gettempdir()
    for name in os.listdir(root):
        found, path = re.fullmatch(TEMPORARY + r"(\d+)-[\w-]+", name), os.path.join(root, name)
        if found and (own and int(found[1]) == os.getpid() or not os.path.exists(f"/proc/{found[1]}")):
            with contextlib.suppress(OSError):
                if os.lstat(path).st_uid == os.getuid():
                    remove_tree(path)


def remove_tree(path: str) -> None:
    """Remove a folder with everything in it, also where a build context has folders that may not be written. Nothing
    outside of it is touched, wherever links lead, and it may be gone."""
    def make_writable(function, name, _):
        with contextlib.suppress(OSError):
            for each in (os.path.dirname(name), name):
                if (each + "/").startswith(path + "/") and stat.S_ISDIR(os.lstat(each).st_mode):
                    os.chmod(each, 0o700)
            function(name)

    # Python 3.12 has another name for it.
    shutil.rmtree(path, **{"onexc" if sys.version_info >= (3, 12) else "onerror": make_writable})


###############################################################################
# gRPC
###############################################################################

# As much of protobuf, HTTP/2 (RFC 9113, RFC 7541) and gRPC as BuildKit and containerd ask for.


class ProtoField(NamedTuple):
    """A field of a protobuf message: its number, its value (an int for a varint, else bytes) and its whole encoding."""

    number: int
    value: Any
    raw: Any


def encode_varint(number: int) -> bytes:
    """A number in seven bits a byte, the lowest first; a negative one as 64 bits of two's complement."""
    if 0 <= number < 128:
        return bytes((number,))
    number &= 0xFFFFFFFFFFFFFFFF
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def decode_varint(data: Any, start: int) -> Tuple[int, int]:
    """The number that begins at `start`, and where it ends; ValueError where there is none of up to ten bytes."""
    number = 0
    for shift, byte in zip(range(0, 70, 7), data[start:start + 10]):
        number |= (byte & 127) << shift
        if byte < 128:
            return number, start + shift // 7 + 1
    raise ValueError("not a varint")


def encode_field(number: int, value: Any) -> bytes:
    """A field with an int or bool as varint, or with text, bytes or an encoded message; a list is a repeated field, a
    dict the message with these fields by their numbers or, with text for keys, a map."""
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    if isinstance(value, dict) and not any(isinstance(key, int) for key in value):
        value = [{1: key, 2: each} for key, each in value.items()]
    if isinstance(value, list):
        return b"".join(encode_field(number, each) for each in value)
    if isinstance(value, dict):
        value = encode_message(value)
    data = value.encode() if isinstance(value, str) else value
    return b"".join((encode_varint(number << 3 | 2), encode_varint(len(data)), data))


def encode_message(fields: Dict[int, Any]) -> bytes:
    """A message with these fields by their numbers."""
    return b"".join(itertools.starmap(encode_field, fields.items()))


def decode_fields(data: Any) -> Iterator[ProtoField]:
    """The fields of a message in their order: of bytes they are bytes, of a memoryview they are views, without a copy.
    ValueError for what is no message."""
    at, size = 0, len(data)
    while at < size:
        start, tag = at, data[at]
        at += 1
        if tag > 127:
            tag, at = decode_varint(data, start)
        wire, value = tag & 7, None
        if wire == 2 or not wire:
            if at < size and data[at] < 128:
                length, at = data[at], at + 1
            else:
                length, at = decode_varint(data, at)
            if not wire:
                value, length = length, 0
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("not a protobuf message")
        end = at + length
        if tag < 8 or end > size:
            raise ValueError("not a protobuf message")
        yield ProtoField(tag >> 3, value if not wire else data[at:end], data[start:end])
        at = end


HPACK_STATIC_TABLE = [tuple((entry + "=").split("=")[:2]) for entry in (
    ":authority|:method=GET|:method=POST|:path=/|:path=/index.html|:scheme=http|:scheme=https|:status=200|:status=204|"
    ":status=206|:status=304|:status=400|:status=404|:status=500|accept-charset|accept-encoding=gzip, deflate|"
    "accept-language|accept-ranges|accept|access-control-allow-origin|age|allow|authorization|cache-control|"
    "content-disposition|content-encoding|content-language|content-length|content-location|content-range|content-type|"
    "cookie|date|etag|expect|expires|from|host|if-match|if-modified-since|if-none-match|if-range|if-unmodified-since|"
    "last-modified|link|location|max-forwards|proxy-authenticate|proxy-authorization|range|referer|refresh|retry-after|"
    "server|set-cookie|strict-transport-security|transfer-encoding|user-agent|vary|via|www-authenticate").split("|")]
# The length in bits of the Huffman code of each byte and of the end of the string, as digits of base 36. The code is
# canonical: shorter codes come before longer ones, and those of one length count upwards in the order of their bytes.
HUFFMAN_LENGTHS = [int(digit, 36) for digit in (
    "dnsssssssoussussssssssusssssssss6aacd68baa8b8666555666666678f6cad677777777777777777777"
    "77878djde6f56565666577666567655677777fbedskmkkmmmnmnnnnnonoomnonnnnlmnmnnomlkmmnnlnmmo"
    "lmnnllmlnmnnkmmmnmmnqqkjmnmpqqqrrqopjlqrrqrollqqsrrrkoklmllnmmppooqnqrqqrrrrrsrrrrrqu")]
HUFFMAN_SYMBOLS = sorted(range(257), key=HUFFMAN_LENGTHS.__getitem__)
# The codes in the order of these symbols, each followed by zeros up to the 30 bits of the longest one.
HUFFMAN_CODES = [0, *itertools.accumulate(1 << 30 - HUFFMAN_LENGTHS[symbol] for symbol in HUFFMAN_SYMBOLS[:-1])]


def huffman_decode(data: bytes) -> bytes:
    """A string of a header block that is Huffman coded; ValueError for what is none."""
    decoded, left, bits, number = bytearray(), 8 * len(data), 0, 0
    # Padding is the beginning of the longest code, that of the end, which is all ones.
    for byte in data + b"\xff\xff\xff\xff":
        number, bits = (number << 8 | byte) & 0xFFFFFFFFFF, bits + 8
        while bits >= 30 and left > 0:
            code = number >> bits - 30 & 0x3FFFFFFF
            symbol = HUFFMAN_SYMBOLS[bisect.bisect_right(HUFFMAN_CODES, code) - 1]
            length = HUFFMAN_LENGTHS[symbol]
            if length > left:
                if left > 7 or code >> 30 - left != (1 << left) - 1:
                    raise ValueError("bad padding of a Huffman code")
            elif symbol == 256:
                raise ValueError("a Huffman code goes on after its end")
            else:
                decoded.append(symbol)
            left -= length
            bits -= length
    return bytes(decoded)


class HpackDecoder:
    """Decodes the header blocks of a connection in their order: they refer to a table that earlier ones have filled."""

    CAPACITY = 4096

    def __init__(self) -> None:
        self.table: Deque[Tuple[str, str]] = collections.deque()
        self.size, self.capacity = 0, self.CAPACITY

    def decode(self, block: bytes, limit: int) -> List[Tuple[str, str]]:
        """The headers of a block; ValueError or IndexError for what is none or makes more than `limit` bytes."""
        headers: List[Tuple[str, str]] = []
        at = 0
        while at < len(block):
            kind = block[at]
            if kind & 0xE0 == 0x20:
                self.capacity, at = self._integer(block, at, 5)
                if headers or self.capacity > self.CAPACITY:
                    raise ValueError("bad size of the table of headers")
            else:
                index, at = self._integer(block, at, 7 if kind & 0x80 else 6 if kind & 0x40 else 4)
                header = self._entry(index) if index or kind & 0x80 else ("", "")
                if not kind & 0x80:
                    name, at = (header[0], at) if index else self._string(block, at)
                    value, at = self._string(block, at)
                    header = (name, value)
                headers.append(header)
                size = len(header[0]) + len(header[1]) + 32
                limit -= size
                if limit < 0:
                    raise ValueError("too many headers")
                if kind & 0xC0 == 0x40:
                    self.table.appendleft(header)
                    self.size += size
            while self.size > self.capacity:
                self.size -= sum(map(len, self.table.pop())) + 32
        return headers

    @staticmethod
    def _integer(block: bytes, at: int, bits: int) -> Tuple[int, int]:
        most = (1 << bits) - 1
        number = block[at] & most
        if number < most:
            return number, at + 1
        number, at = decode_varint(block, at + 1)
        return number + most, at

    def _string(self, block: bytes, at: int) -> Tuple[str, int]:
        coded = block[at] & 0x80
        size, at = self._integer(block, at, 7)
        text = block[at:at + size]
        if len(text) < size:
            raise ValueError("a header is cut short")
        return (huffman_decode(text) if coded else text).decode("latin-1"), at + size

    def _entry(self, index: int) -> Tuple[str, str]:
        if not index:
            raise ValueError("a header refers to nothing")
        known = len(HPACK_STATIC_TABLE)
        return HPACK_STATIC_TABLE[index - 1] if index <= known else self.table[index - known - 1]


def encode_headers(headers: Iterable[Tuple[str, str]]) -> bytes:
    """A header block of literals alone, which need no table and no Huffman code."""
    block = bytearray()
    for header in headers:
        block.append(0)
        for text in header:
            data = text.encode("latin-1", "replace")
            block += encode_varint(len(data)) if len(data) < 127 else b"\x7f" + encode_varint(len(data) - 127)
            block += data
    return bytes(block)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 1
END_HEADERS, PADDED, PRIORITIZED = 4, 8, 32
ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = range(2, 7)
PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR = 1, 3, 5, 6
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 7, 8, 9, 11
# Length and kind, flags, stream.
FRAME_HEADER = struct.Struct(">IBI")
FIXED_SIZES = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
LARGEST_WINDOW = (1 << 31) - 1


class Http2Error(ValueError):
    """The peer does not keep to HTTP/2; the connection ends with this error code."""

    def __init__(self, message: str, code: int = PROTOCOL_ERROR):
        super().__init__(message)
        self.code = code


class Http2Event(NamedTuple):
    """What the peer does on a stream: HEADERS with a list of (name, value), DATA with a view of bytes, RST_STREAM with
    an error code; `ended` says that it sends nothing more there. Or GOAWAY with an error code, where `stream` is the
    last one that it serves."""

    kind: int
    stream: int
    value: Any
    ended: bool


class SendBuffer:
    """Bytes that wait to be sent, in the pieces that they came in: a build context is 500 MB, and each copy costs."""

    def __init__(self, first: bytes = b"") -> None:
        self.pieces: Deque[Any] = collections.deque((first,))
        self.size = len(first)

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)

    def __iadd__(self, piece: Any) -> "SendBuffer":
        self.pieces.append(piece)
        self.size += len(piece)
        return self

    def clear(self) -> None:
        """Drop everything."""
        self.pieces.clear()
        self.size = 0

    def send(self, sock: socket.socket) -> None:
        """Send everything, or what goes at once where the socket does not block; OSError when nobody takes it."""
        with contextlib.suppress(BlockingIOError, InterruptedError):
            while self.size:
                # Linux takes 1024 pieces.
                sent = sock.sendmsg(itertools.islice(self.pieces, 1024))
                self.size -= sent
                while sent > 0:
                    piece = self.pieces.popleft()
                    if len(piece) > sent:
                        self.pieces.appendleft(memoryview(piece)[sent:])
                    sent -= len(piece)


class Http2Stream:
    """A stream: its windows in bytes, and what waits until those of the peer have room."""

    def __init__(self, number: int, send_window: int, receive_window: int):
        self.number, self.send_window, self.receive_window = number, send_window, receive_window
        self.queue: Deque[memoryview] = collections.deque()
        self.queued = 0
        self.trailers: Optional[bytes] = None
        # Headers were sent; the end is queued; it was sent; the peer's has come.
        self.answered = self.ending = self.local_ended = self.remote_ended = False


class Http2Connection:
    """One side of an HTTP/2 connection, without I/O: `feed()` takes what was received, `out` holds what is to be sent.

    What is sent on a stream waits in its queue until the windows of the peer have room; how much may wait there is the
    caller's choice. Of our own windows the connection's is opened again as data comes, so that no stream can stop
    another; a stream's is opened by `replenish()` only, so that at most `window` bytes of each wait to be used."""

    CONNECTION_WINDOW = 1 << 24
    MAX_FRAME, MAX_HEADERS, MAX_STREAMS = 1 << 20, 1 << 20, 128
    # Of answers to pings and settings, mostly, that the peer does not read.
    MAX_OUT = 1 << 24

    def __init__(self, client: bool, window: int = 1 << 20):
        self.client, self.window = client, window
        self.streams: Dict[int, Http2Stream] = {}
        self.last_stream = 0
        self.send_window, self.receive_window = 65535, self.CONNECTION_WINDOW
        self.peer_window, self.peer_frame = 65535, 16384
        self._decoder = HpackDecoder()
        self._input, self._preface = b"", b"" if client else PREFACE
        # Stream, flags and beginning of a header block whose continuation has to come.
        self._unfinished: Optional[Tuple[int, int, bytearray]] = None
        first = (ENABLE_PUSH, 0) if client else (MAX_CONCURRENT_STREAMS, self.MAX_STREAMS)
        settings = struct.pack(">HIHIHIHI", *first, INITIAL_WINDOW_SIZE, window, MAX_FRAME_SIZE, self.MAX_FRAME,
                               MAX_HEADER_LIST_SIZE, self.MAX_HEADERS)
        self.out = SendBuffer(PREFACE if client else b"")
        self._write(SETTINGS, 0, 0, settings)
        self._write(WINDOW_UPDATE, 0, 0, struct.pack(">I", self.CONNECTION_WINDOW - 65535))

    def send_headers(self, number: int, headers: Iterable[Tuple[str, str]], end: bool = False) -> None:
        """Send headers, or trailers with `end`, on a stream; a client's open it. Dropped on one that has ended."""
        if self.client and number > self.last_stream:
            self._open(number)
        stream = self.streams.get(number)
        if stream is None or stream.ending:
            return
        stream.answered, stream.ending, stream.trailers = True, end, encode_headers(headers)
        self._send_queue(stream)

    def send_data(self, number: int, data: bytes, end: bool = False) -> None:
        """Send data on a stream as the windows of the peer have room. Dropped on one that has ended."""
        stream = self.streams.get(number)
        if stream is None or stream.ending:
            return
        stream.ending = end
        if data:
            stream.queue.append(memoryview(data))
            stream.queued += len(data)
        self._send_queue(stream)

    def reset(self, number: int, code: int) -> None:
        """End a stream in both directions."""
        if self.streams.pop(number, None):
            self._write(RST_STREAM, 0, number, struct.pack(">I", code))

    def go_away(self, last_stream: int, code: int) -> None:
        """Say that no stream beyond `last_stream` is served."""
        self._write(GOAWAY, 0, 0, struct.pack(">II", last_stream, code))

    def replenish(self, number: int, waiting: int = 0) -> None:
        """Open the window of a stream again, but for `waiting` bytes that are not used up yet; not for a few bytes."""
        stream = self.streams.get(number)
        if stream and not stream.remote_ended:
            size = self.window - waiting - stream.receive_window
            if size >= self.window // 4:
                stream.receive_window += size
                self._write(WINDOW_UPDATE, 0, number, struct.pack(">I", size))

    def feed(self, data: bytes) -> List[Http2Event]:
        """Take what was received; what it says. An Http2Error ends the connection, and `out` tells the peer why."""
        data, at, events = self._input + data if self._input else data, 0, []
        try:
            if len(self.out) > self.MAX_OUT:
                raise Http2Error("the peer does not read what it asks for", ENHANCE_YOUR_CALM)
            if self._preface:
                size = min(len(data), len(PREFACE))
                if data[:size] != PREFACE[:size]:
                    raise Http2Error("the peer does not speak HTTP/2")
                if size == len(PREFACE):
                    self._preface, at = b"", size
            view = memoryview(data)
            while not self._preface and len(data) - at >= 9:
                head, flags, number = FRAME_HEADER.unpack_from(data, at)
                kind, size, number = head & 255, head >> 8, number & LARGEST_WINDOW
                self._check(kind, number, size)
                if len(data) < at + 9 + size:
                    break
                handler = self.HANDLERS.get(kind)
                event = handler(self, flags, number, view[at + 9:at + 9 + size]) if handler else None
                if event:
                    events.append(event)
                at += 9 + size
        except Http2Error as error:
            self.go_away(0 if self.client else self.last_stream, error.code)
            raise
        self._input = data[at:]
        return events

    def _check(self, kind: int, number: int, size: int) -> None:
        """Http2Error for a frame that may not come now."""
        if size > self.MAX_FRAME or FIXED_SIZES.get(kind, size) != size:
            raise Http2Error(f"a frame of kind {kind} has {size} bytes", FRAME_SIZE_ERROR)
        if (kind == CONTINUATION) != bool(self._unfinished):
            raise Http2Error("a header block is interrupted, or a continuation continues nothing")
        if kind == PUSH_PROMISE:
            raise Http2Error("nothing may be pushed")
        if number if kind in (SETTINGS, PING, GOAWAY) else not number and kind < WINDOW_UPDATE:
            raise Http2Error(f"a frame of kind {kind} is of stream {number}")
        if number > self.last_stream and (kind in (DATA, RST_STREAM, WINDOW_UPDATE) or kind == HEADERS and self.client):
            raise Http2Error("a frame is of a stream that nobody has opened")

    def _write(self, kind: int, flags: int, number: int, payload: bytes = b"") -> None:
        self.out += FRAME_HEADER.pack(len(payload) << 8 | kind, flags, number) + payload

    def _open(self, number: int) -> Http2Stream:
        self.last_stream = number
        stream = self.streams[number] = Http2Stream(number, self.peer_window, self.window)
        return stream

    def _end(self, stream: Http2Stream, local: bool) -> None:
        """Note that one side has said all on a stream."""
        stream.local_ended |= local
        stream.remote_ended |= not local
        if stream.local_ended and stream.remote_ended:
            self.streams.pop(stream.number, None)

    def _write_headers(self, stream: Http2Stream, block: bytes) -> None:
        kind, flags = HEADERS, END_STREAM if stream.ending else 0
        while len(block) > self.peer_frame:
            self._write(kind, flags, stream.number, block[:self.peer_frame])
            block, kind, flags = block[self.peer_frame:], CONTINUATION, 0
        self._write(kind, flags | END_HEADERS, stream.number, block)
        if stream.ending:
            self._end(stream, local=True)

    def _send_queue(self, stream: Http2Stream) -> None:
        """Send of a stream what the windows allow."""
        while stream.queue:
            piece = stream.queue[0]
            size = min(len(piece), stream.send_window, self.send_window, self.peer_frame)
            if size <= 0:
                return
            if size == len(piece):
                stream.queue.popleft()
            else:
                piece, stream.queue[0] = piece[:size], piece[size:]
            stream.queued -= size
            stream.send_window -= size
            self.send_window -= size
            last = stream.ending and not stream.queue and stream.trailers is None
            self.out += FRAME_HEADER.pack(size << 8 | DATA, END_STREAM if last else 0, stream.number)
            self.out += piece
            if last:
                self._end(stream, local=True)
        if stream.trailers is not None:
            block, stream.trailers = stream.trailers, None
            self._write_headers(stream, block)
        elif stream.ending and not stream.local_ended:
            self._write(DATA, END_STREAM, stream.number)
            self._end(stream, local=True)

    def _send_queues(self) -> None:
        """Send what the windows allow. Who has sent comes last the next time, as all share the connection's window."""
        for stream in [stream for stream in self.streams.values() if stream.queue]:
            before = stream.queued
            self._send_queue(stream)
            if stream.queued < before and self.streams.pop(stream.number, None):
                self.streams[stream.number] = stream

    @staticmethod
    def _unpadded(flags: int, payload: memoryview) -> memoryview:
        if not flags & PADDED:
            return payload
        if not payload or payload[0] >= len(payload):
            raise Http2Error("a frame is shorter than its padding")
        return payload[1:len(payload) - payload[0]]

    def _on_data(self, flags: int, number: int, payload: memoryview) -> Optional[Http2Event]:
        stream = self.streams.get(number)
        self.receive_window -= len(payload)
        if stream:
            stream.receive_window -= len(payload)
            if stream.remote_ended:
                raise Http2Error("data comes after the end of a stream", STREAM_CLOSED)
        if self.receive_window < 0 or stream and stream.receive_window < 0:
            raise Http2Error("a window is exceeded", FLOW_CONTROL_ERROR)
        if self.receive_window < self.CONNECTION_WINDOW // 2:
            self._write(WINDOW_UPDATE, 0, 0, struct.pack(">I", self.CONNECTION_WINDOW - self.receive_window))
            self.receive_window = self.CONNECTION_WINDOW
        data = self._unpadded(flags, payload)
        return self._event(DATA, flags, stream, data) if stream else None

    def _event(self, kind: int, flags: int, stream: Http2Stream, value: Any) -> Http2Event:
        ended = bool(flags & END_STREAM)
        if ended:
            self._end(stream, local=False)
        return Http2Event(kind, stream.number, value, ended)

    def _on_headers(self, flags: int, number: int, payload: memoryview) -> Optional[Http2Event]:
        block = bytes(self._unpadded(flags, payload)[5 if flags & PRIORITIZED else 0:])
        if not flags & END_HEADERS:
            self._unfinished = number, flags, bytearray(block)
            return None
        try:
            headers = self._decoder.decode(block, self.MAX_HEADERS)
        except (ValueError, IndexError) as error:
            raise Http2Error(f"bad headers: {error}", COMPRESSION_ERROR) from None
        stream = self.streams.get(number)
        if number > self.last_stream:
            if not number % 2:
                raise Http2Error("a client opens streams of odd numbers only")
            stream = self._open(number)
            if len(self.streams) > self.MAX_STREAMS:
                self.reset(number, REFUSED_STREAM)
                return None
        if stream and stream.remote_ended:
            raise Http2Error("headers come after the end of a stream", STREAM_CLOSED)
        return self._event(HEADERS, flags, stream, headers) if stream else None

    def _on_continuation(self, flags: int, number: int, payload: memoryview) -> Optional[Http2Event]:
        owner, first, block = self._unfinished
        block += payload
        if number != owner or len(block) > self.MAX_HEADERS:
            raise Http2Error("a header block is interrupted or has no end")
        if not flags & END_HEADERS:
            return None
        self._unfinished = None
        return self._on_headers(first & END_STREAM | END_HEADERS, number, memoryview(block))

    def _on_reset(self, flags: int, number: int, payload: memoryview) -> Optional[Http2Event]:
        known = self.streams.pop(number, None)
        return Http2Event(RST_STREAM, number, int.from_bytes(payload, "big"), True) if known else None

    def _on_settings(self, flags: int, number: int, payload: memoryview) -> None:
        if len(payload) % 6 or flags & ACK and payload:
            raise Http2Error("bad settings", FRAME_SIZE_ERROR)
        for key, value in struct.iter_unpack(">HI", payload):
            if key == INITIAL_WINDOW_SIZE:
                change, self.peer_window = value - self.peer_window, value
                for stream in self.streams.values():
                    stream.send_window += change
                if max([value, *(stream.send_window for stream in self.streams.values())]) > LARGEST_WINDOW:
                    raise Http2Error("a window is too large", FLOW_CONTROL_ERROR)
            elif key == MAX_FRAME_SIZE:
                self.peer_frame = value
                if not 16384 <= value < 1 << 24:
                    raise Http2Error("bad size of frames")
        if not flags & ACK:
            self._write(SETTINGS, ACK, 0)
            self._send_queues()

    def _on_ping(self, flags: int, number: int, payload: memoryview) -> None:
        if not flags & ACK:
            self._write(PING, ACK, 0, bytes(payload))

    def _on_goaway(self, flags: int, number: int, payload: memoryview) -> Http2Event:
        if len(payload) < 8:
            raise Http2Error("bad goaway", FRAME_SIZE_ERROR)
        last, code = struct.unpack_from(">II", payload)
        return Http2Event(GOAWAY, last & LARGEST_WINDOW, code, False)

    def _on_window_update(self, flags: int, number: int, payload: memoryview) -> None:
        target = self.streams.get(number) if number else self
        if target is None:
            return
        size = int.from_bytes(payload, "big") & LARGEST_WINDOW
        target.send_window += size
        if not size or target.send_window > LARGEST_WINDOW:
            raise Http2Error("bad window update", FLOW_CONTROL_ERROR if size else PROTOCOL_ERROR)
        if number:
            self._send_queue(target)
        else:
            self._send_queues()

    HANDLERS = {DATA: _on_data, HEADERS: _on_headers, CONTINUATION: _on_continuation, RST_STREAM: _on_reset,
                SETTINGS: _on_settings, PING: _on_ping, GOAWAY: _on_goaway, WINDOW_UPDATE: _on_window_update}


GRPC_CODES = {400: 3, 409: 9, 503: 14}


class GrpcError(Exception):
    """A call that has ended with another status than 0: the status and its message."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class GrpcDecoder:
    """Cuts the data of a stream into messages."""

    def __init__(self) -> None:
        self.head = b""
        # The message so far: what it returns in the end is not copied once more.
        self.message, self.missing = io.BytesIO(), 0

    def feed(self, data: Any) -> Iterator[bytes]:
        """The messages that are complete by now; GrpcError for one that is compressed, which nobody has asked for."""
        while len(data):
            if len(self.head) < 5:
                size = 5 - len(self.head)
                self.head, data = self.head + bytes(data[:size]), data[size:]
                if len(self.head) < 5:
                    return
                compressed, self.missing = struct.unpack(">BI", self.head)
                if compressed:
                    raise GrpcError(13, "a message is compressed")
            size = self.message.write(data[:self.missing])
            data, self.missing = data[size:], self.missing - size
            if not self.missing:
                yield self.message.getvalue()
                self.head, self.message = b"", io.BytesIO()


def grpc_message(message: bytes) -> bytes:
    """A message as it stands in a stream, uncompressed."""
    return struct.pack(">BI", 0, len(message)) + message


def grpc_client(method: str, headers: Iterable[Tuple[str, str]], window: int) -> Http2Connection:
    """A connection whose stream 1 is a call of a method, `/package.Service/Method`. grpc-go refuses a call without an
    authority or a content type, or with a name in upper case."""
    connection = Http2Connection(client=True, window=window)
    connection.send_headers(1, [
        (":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "localhost"),
        ("content-type", "application/grpc"), ("te", "trailers"), *((name.lower(), value) for name, value in headers)])
    return connection


def send_grpc_status(connection: Http2Connection, number: int, error: Optional[ApiError]) -> None:
    """End a stream as a server of gRPC, with an error or without."""
    stream = connection.streams.get(number)
    headers = [] if stream and stream.answered else [(":status", "200"), ("content-type", "application/grpc")]
    headers.append(("grpc-status", str(GRPC_CODES.get(error.status, 13)) if error else "0"))
    if error:
        headers.append(("grpc-message", urllib.parse.quote(str(error), safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}")))
    connection.send_headers(number, headers, end=True)


def raise_grpc_status(headers: List[Tuple[str, str]]) -> None:
    """GrpcError for the trailers of a call that has failed."""
    fields = dict(headers)
    status = fields.get("grpc-status", "")
    if not re.fullmatch("[0-9]{1,9}", status):
        raise GrpcError(2, f"an answer without a status of gRPC, with HTTP status {fields.get(':status', 'unknown')}")
    if int(status):
        raise GrpcError(int(status), urllib.parse.unquote(fields.get("grpc-message", ""), errors="replace"))


def set_deadline(sock: socket.socket, deadline: Optional[float]) -> None:
    """Let what is done next with a socket end by this time of the monotonic clock; OSError when it is over."""
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise socket.timeout("timed out")
    sock.settimeout(left)


def grpc_messages(sock: socket.socket, connection: Http2Connection, deadline: Optional[float]) -> Iterator[bytes]:
    """The messages that answer the call on stream 1."""
    decoder = GrpcDecoder()
    while True:
        set_deadline(sock, deadline)
        data = sock.recv(BLOCK)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed in the middle of a call")
        try:
            events = connection.feed(data)
        except Http2Error as error:
            raise ConnectionAbortedError(errno.ECONNABORTED, str(error)) from None
        for kind, number, value, ended in events:
            if kind == DATA:
                yield from decoder.feed(value)
            elif kind == RST_STREAM:
                code = {CANCEL: 1, REFUSED_STREAM: 14}.get(value, 13)
                raise GrpcError(code, f"the call was reset with HTTP/2's error {value}")
            elif kind == GOAWAY and not number:
                raise GrpcError(14, "the server takes no more calls")
            if ended:
                raise_grpc_status(value if kind == HEADERS else [])
                return
        connection.replenish(1)
        connection.out.send(sock)


def grpc_stream(sock: socket.socket, method: str, message: bytes, headers: Iterable[Tuple[str, str]] = (),
                timeout: Optional[float] = None) -> Iterator[bytes]:
    """Call a method that answers with a stream of messages, on a new connection. The request is sent at once. The
    iterator raises GrpcError for a status other than 0, and OSError when the connection breaks, when another thread has
    shut the socket down, or when `timeout` seconds are over."""
    deadline = None if timeout is None else time.monotonic() + timeout
    connection = grpc_client(method, headers, Http2Connection.CONNECTION_WINDOW)
    connection.send_data(1, grpc_message(message), end=True)
    set_deadline(sock, deadline)
    connection.out.send(sock)
    return grpc_messages(sock, connection, deadline)


def grpc_call(sock: socket.socket, method: str, message: bytes, headers: Iterable[Tuple[str, str]] = (),
              timeout: Optional[float] = 10.0) -> bytes:
    """Call a method that answers with one message, on a new connection. GrpcError for a status other than 0, OSError
    when the connection breaks or `timeout` seconds are over."""
    messages = list(grpc_stream(sock, method, message, headers, timeout))
    if len(messages) != 1:
        raise GrpcError(13, f"{method} has answered with {len(messages)} messages")
    return messages[0]


###############################################################################
# containerd
###############################################################################

# Field numbers are those of containerd's API (github.com/containerd/containerd/api), the same from 1.6 on.
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
# For how many seconds containerd waits until a shim says how its task is.
SHIM_TIMEOUT = 2.0
TASK_STATES = {1: "created", 2: "running", 3: "stopped", 4: "paused", 5: "pausing"}
# Topic -> the fields of its event by number; those with a time or a list are not needed.
EVENT_FIELDS: Dict[str, Dict[int, str]] = {
    "/containers/create": {1: "id", 2: "image"}, "/containers/update": {1: "id", 2: "image"},
    "/containers/delete": {1: "id"},
    "/tasks/create": {1: "container_id", 6: "pid"}, "/tasks/start": {1: "container_id", 2: "pid"},
    "/tasks/delete": {1: "container_id", 2: "pid", 3: "exit_status", 5: "id"},
    "/tasks/exit": {1: "container_id", 2: "id", 3: "pid", 4: "exit_status"}, "/tasks/oom": {1: "container_id"},
    "/tasks/exec-added": {1: "container_id", 2: "exec_id"}, "/tasks/exec-started": {1: "container_id", 2: "exec_id"},
    "/tasks/paused": {1: "container_id"}, "/tasks/resumed": {1: "container_id"},
    "/images/create": {1: "name"}, "/images/update": {1: "name"}, "/images/delete": {1: "name"},
}
# What stands before the name of an OCI type where a message has one.
SPEC_URL = "types.containerd.io/opencontainers/runtime-spec/1/"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
# What BuildKit calls the container of a step; nobody else gives such ids.
BUILD_STEP = re.compile(r"[0-9a-z]{25}")


class Descriptor(NamedTuple):
    """What an image's name stands for: the digest of an index or a manifest, its media type and its size in bytes."""

    media_type: str
    digest: str
    size: int

    @property
    def json(self) -> Dict[str, Any]:
        """The same as manifests and clients have it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


class ContainerRecord(NamedTuple):
    """containerd's own record of a container: `spec` is the OCI spec as JSON text, `created_at` nanoseconds since
    1970."""

    id: str
    labels: Dict[str, str]
    image: str
    runtime: str
    spec: bytes
    snapshotter: str
    snapshot_key: str
    created_at: int


class TaskRecord(NamedTuple):
    """containerd's record of a container's task: `status` is one of TASK_STATES, `stdin` and `stdout` paths of FIFOs or
    "" (`stdout` also the URI of a logging program), `exited_at` nanoseconds since 1970, 0 while it runs."""

    pid: int
    status: str
    exit_status: int
    exited_at: int
    stdin: str
    stdout: str = ""


class TaskStreams(NamedTuple):
    """Where a process has its standard streams: paths of FIFOs, "" for none, or as stdout and stderr the URI of a
    logging program. A process with a `terminal` has no stderr of its own."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class ImageRecord(NamedTuple):
    """One name of an image: `name` in full, with registry and tag or digest, what it stands for, and when that was last
    changed, in nanoseconds since 1970."""

    name: str
    target: Descriptor
    updated_at: int = 0
    labels: Tuple[Tuple[str, str], ...] = ()


class ContainerdEvent(NamedTuple):
    """One event of containerd in our namespace; `time` in nanoseconds since 1970, `payload` the fields of
    EVENT_FIELDS."""

    topic: str
    time: int
    payload: Dict[str, Any]

    @property
    def container(self) -> str:
        """The id of the container it is about, "" for none."""
        return str(self.payload.get("id" if self.topic.startswith("/containers/") else "container_id") or "")

    @property
    def ends_container(self) -> bool:
        """Whether it is the end of a container's own process, and not that of an exec in it."""
        return self.topic == "/tasks/exit" and self.payload.get("id") in (None, "", self.container)


def read_message(data: Any) -> Dict[int, Any]:
    """The fields of a message by number, the last of each."""
    return {each.number: each.value for each in decode_fields(data)}


def decode_map_entry(data: Any) -> Tuple[str, str]:
    """Key and value of an entry of a map of strings."""
    size, at = len(data), data[1] + 2 if len(data) > 1 else 0
    if 0 < at < size - 1 and data[0] == 10 and data[at] == 18 and data[at + 1] == size - at - 2 < 128 > data[1]:
        # Nearly all labels are so, and they are most of what a list of containers has.
        return str(data[2:at], "utf-8"), str(data[at + 2:], "utf-8")
    entry = read_message(data)
    return str(entry.get(1, b""), "utf-8"), str(entry.get(2, b""), "utf-8")


def read_text(message: Dict[int, Any], number: int) -> str:
    """A field of text, "" where it is not there."""
    return str(message.get(number) or b"", "utf-8", "replace")


def read_timestamp(data: Any) -> int:
    """A protobuf timestamp as nanoseconds since 1970, 0 for none. Before 1970 is Go's zero time."""
    found = read_message(data or b"")
    seconds = found.get(1, 0)
    return 0 if seconds >> 62 else seconds * 10**9 + found.get(2, 0)


def parse_container(message: Any) -> ContainerRecord:
    """A containers.v1.Container."""
    labels, found = {}, {}
    for each in decode_fields(message):
        if each.number == 2:
            key, value = decode_map_entry(each.value)
            labels[key] = value
        else:
            found[each.number] = each.value
    return ContainerRecord(
        read_text(found, 1), labels, read_text(found, 3), read_text(read_message(found.get(4, b"")), 1),
        bytes(read_message(found.get(5, b"")).get(2, b"")), read_text(found, 6), read_text(found, 7),
        read_timestamp(found.get(8)))


def parse_task(message: Any) -> Tuple[str, TaskRecord]:
    """A types.task.Process: the container's id and its task."""
    found = read_message(message)
    return read_text(found, 2), TaskRecord(
        found.get(3, 0), TASK_STATES.get(found.get(4, 0), "unknown"), found.get(9, 0), read_timestamp(found.get(10)),
        read_text(found, 5), read_text(found, 6))


def parse_descriptor(message: Any) -> Descriptor:
    """A types.Descriptor."""
    found = read_message(message)
    return Descriptor(read_text(found, 1), read_text(found, 2), found.get(3, 0))


def parse_mount(message: Any) -> Dict[str, Any]:
    """A types.Mount: its `type`, `source` and `options`."""
    fields = [(each.number, bytes(each.value).decode("utf-8", "surrogateescape")) for each in decode_fields(message)]
    found, options = dict(fields), [text for number, text in fields if number == 4]
    return {"type": found.get(1, ""), "source": found.get(2, ""), "options": options}


def parse_image(message: Any) -> ImageRecord:
    """An images.v1.Image."""
    found = read_message(message)
    return ImageRecord(read_text(found, 1), parse_descriptor(found.get(3, b"")),
                       read_timestamp(found.get(8)) or read_timestamp(found.get(7)),
                       tuple(decode_map_entry(each.value) for each in decode_fields(message) if each.number == 2))


def numbered(values: Iterable[Any], first: int = 1) -> Dict[int, Any]:
    """Values as fields of a message with numbers from `first` on."""
    return dict(enumerate(values, first))


def parse_event(message: Any, namespace: str) -> Optional[ContainerdEvent]:
    """An envelope of the events service; None for other namespaces, for topics that nobody needs, and for the steps of
    a build that is under way."""
    found = read_message(message)
    topic = read_text(found, 3)
    if read_text(found, 2) != namespace or topic not in EVENT_FIELDS:
        return None
    names, payload = EVENT_FIELDS[topic], {}
    for number, value in read_message(read_message(found.get(4, b"")).get(2, b"")).items():
        if number in names:
            payload[names[number]] = value if isinstance(value, int) else str(value, "utf-8", "replace")
    event = ContainerdEvent(topic, read_timestamp(found.get(1)) or time.time_ns(), payload)
    return None if BUILD_STEP.fullmatch(event.container) and not payload.get("image") else event


def unix_connection(path: str, timeout: Optional[float] = None) -> socket.socket:
    """A connection to a unix socket, of which each step may take `timeout` seconds; OSError where nobody answers."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
        return sock
    except BaseException:
        sock.close()
        raise


class ContainerdClient:
    """Calls containerd over its own socket for one namespace. Every call has a connection of its own, so that calls of
    several threads do not wait for each other. Methods raise NotFound, Conflict or another ApiError for containerd's
    own errors, and Unavailable where it cannot be reached."""

    def __init__(self, address: str = "", namespace: str = "default", lease: str = ""):
        self.namespace, self.given_address = namespace, address.replace("unix://", "", 1)
        # The path of the socket, as containerd's own mount namespace has it.
        self.address = self.given_address or CONTAINERD_SOCKET
        # Of every call.
        self.headers = [("containerd-namespace", namespace), *([("containerd-lease", lease)] if lease else [])]

    def root(self) -> str:
        """What to put in front of containerd's paths: "", or for a user's own (rootless) containerd, which has a mount
        namespace of its own, the root of that as /proc shows it."""
        pid = self.rootless_pid()
        return f"/proc/{pid}/root" if pid else ""

    def rootless_pid(self) -> int:
        """The process whose namespaces a user's own (rootless) containerd has, 0 for any other containerd."""
        if os.geteuid() == 0 or self.given_address:
            return 0
        pid = int_or_zero(read_file(f"{runtime_folder()}/containerd-rootless/child_pid").strip())
        if not pid:
            raise Unavailable("rootless containerd is not running: containerd-rootless-setuptool.sh install sets it up")
        return pid

    def entering(self, *namespaces: str) -> List[str]:
        """argv in front of a program that is to run where a user's own containerd does, also in these `namespaces` of
        nsenter; [] for root's."""
        pid = self.rootless_pid()
        return ["nsenter", "-U", "--preserve-credentials", "-m", *namespaces, "-t", str(pid), "--"] if pid else []

    def dial(self, timeout: float = 5.0) -> socket.socket:
        """A connection to containerd; 503 where nobody answers."""
        try:
            return unix_connection(self.root() + self.address, timeout)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise Unavailable(f"containerd's socket {self.address} may not be used by this user: run nerdctld as "
                                  "root, or set up rootless containerd") from None
            raise Unavailable(f"containerd is not running at {self.address}: install or start it (systemctl start "
                              "containerd), or say where it is with --address") from None

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Context in which errors of gRPC and of the connection become ApiErrors."""
        try:
            yield
        except GrpcError as error:
            kind = {3: BadParameter, 5: NotFound, 6: Conflict, 9: Conflict, 12: NotImplementedHere,
                    14: Unavailable}.get(error.code, ApiError)
            raise kind(str(error)) from None
        except (OSError, ValueError) as error:
            raise Unavailable(f"containerd does not answer at {self.address} ({error}): see systemctl status "
                              "containerd") from None

    def stream(self, method: str, fields: Dict[int, Any], timeout: Optional[float] = None) -> Iterator[bytes]:
        """The messages that answer a call of `Service/Method` below containerd.services with a message of these
        fields; 503 when they have not come within `timeout` seconds."""
        with self.dial() as sock, self.errors():
            yield from grpc_stream(sock, "/containerd.services." + method, encode_message(fields), self.headers,
                                   timeout)

    def call(self, method: str, fields: Dict[int, Any], timeout: Optional[float] = 10.0,
             connection: Optional[socket.socket] = None) -> memoryview:
        """The one message that answers a call, on a connection that it ends."""
        with connection or self.dial() as sock, self.errors():
            return memoryview(grpc_call(sock, "/containerd.services." + method, encode_message(fields), self.headers,
                                        timeout))

    def ask(self, method: str, fields: Dict[int, Any], timeout: Optional[float] = 10.0) -> Dict[int, Any]:
        """The fields of the answer to a call by number."""
        return read_message(self.call(method, fields, timeout))

    def ask_all(self, method: str, fields: Dict[int, Any]) -> List[Any]:
        """The first field of the answer to a call, which is repeated."""
        return [each.value for each in decode_fields(self.call(method, fields)) if each.number == 1]

    def events(self, sock: Any) -> Iterator[bytes]:
        """The envelopes of all events, over a connection that ends with it."""
        with self.errors():
            yield from grpc_stream(sock, "/containerd.services.events.v1.Events/Subscribe", b"", self.headers)


class Containerd(ContainerdClient):
    """containerd's services, a method for each call that is needed."""

    @contextlib.contextmanager
    def leased(self) -> Iterator["Containerd"]:
        """Context with a client by which new content and snapshots stay until its end; from then on only as long as
        something needs them. What a daemon that was killed has left goes after an hour."""
        lease = f"nerdctld-{os.urandom(8).hex()}"
        until = rfc3339(time.time_ns() + 3600 * 10**9)
        self.call("leases.v1.Leases/Create", {1: lease, 3: {"containerd.io/gc.expire": until}})
        try:
            yield Containerd(self.given_address, self.namespace, lease)
        finally:
            with contextlib.suppress(ApiError):
                self.call("leases.v1.Leases/Delete", {1: lease})

    def list_containers(self) -> List[ContainerRecord]:
        """All containers of the namespace."""
        return list(map(parse_container, self.ask_all("containers.v1.Containers/List", {})))

    def get_container(self, identity: str) -> ContainerRecord:
        """One container."""
        return parse_container(self.ask("containers.v1.Containers/Get", {1: identity}).get(1, b""))

    def update_container(self, identity: str, labels: Dict[str, str], spec: Optional[bytes] = None) -> None:
        """Set these labels of a container, of which "" takes one away, and with `spec` its OCI spec as JSON text; what
        is not named stays."""
        changed = {1: identity, 2: labels, 5: [] if spec is None else {1: SPEC_URL + "Spec", 2: spec}}
        paths = ["labels." + key for key in labels] + ([] if spec is None else ["spec"])
        self.call("containers.v1.Containers/Update", {1: changed, 2: {1: paths}})

    def list_tasks(self) -> Dict[str, TaskRecord]:
        """The tasks of the namespace by their containers' ids."""
        return dict(map(parse_task, self.ask_all("tasks.v1.Tasks/List", {})))

    def get_task(self, identity: str) -> Optional[TaskRecord]:
        """The task of a container, None where it has none. A shim that is slow is asked again, since otherwise it stays
        "unknown": containerd 2.3 raises that error, those before it say so themselves."""
        task = TaskRecord(0, "unknown", 0, 0, "")
        for _ in range(3):
            try:
                task = parse_task(self.ask("tasks.v1.Tasks/Get", {1: identity}).get(1, b""))[1]
            except NotFound:
                return None
            except ApiError as error:
                if "deadline exceeded" not in str(error):
                    raise
            if task.status != "unknown":
                break
        return task

    def create_task(self, record: ContainerRecord, streams: TaskStreams) -> int:
        """Have the runtime make a container's process, with its snapshot for root, and not start it yet; its process
        id."""
        mounts = self.snapshot_mounts(record.snapshotter, record.snapshot_key)
        return self.ask("tasks.v1.Tasks/Create", {1: record.id, 3: mounts, **numbered(streams, 4)},
                        SHORT_CALL).get(2, 0)

    def start_task(self, identity: str, exec_id: str = "", timeout: float = SHORT_CALL) -> int:
        """Start a container's process that was made, or a command in it; its process id."""
        return self.ask("tasks.v1.Tasks/Start", {1: identity, 2: exec_id}, timeout).get(1, 0)

    def delete_task(self, identity: str, connection: Optional[socket.socket] = None) -> None:
        """Take a task away that has ended, or was never started. containerd breaks off where the connection ends, and
        leaves the shim."""
        self.call("tasks.v1.Tasks/Delete", {1: identity}, SHORT_CALL, connection)

    def kill_task(self, identity: str, number: int, exec_id: str = "") -> None:
        """Send a signal to a container's process, or to a command in it."""
        self.call("tasks.v1.Tasks/Kill", {1: identity, 2: exec_id, 3: number})

    def list_pids(self, identity: str) -> Set[int]:
        """The process ids of all processes in a container."""
        return {read_message(each).get(1, 0) for each in self.ask_all("tasks.v1.Tasks/ListPids", {1: identity})}

    def update_task(self, identity: str, resources: Dict[str, Any]) -> None:
        """Change limits of a container that runs, named as in an OCI spec; what is not named stays."""
        self.call("tasks.v1.Tasks/Update", {1: identity, 2: {1: SPEC_URL + "LinuxResources", 2: json_bytes(resources)}})

    def pause_task(self, identity: str) -> None:
        """Freeze a container."""
        self.call("tasks.v1.Tasks/Pause", {1: identity})

    def resume_task(self, identity: str) -> None:
        """Let a container that is frozen go on."""
        self.call("tasks.v1.Tasks/Resume", {1: identity})

    def resize_terminal(self, identity: str, height: int, width: int, exec_id: str = "") -> None:
        """Set the size of a process's terminal in characters."""
        self.call("tasks.v1.Tasks/ResizePty", {1: identity, 2: exec_id, 3: width, 4: height})

    def close_stdin(self, identity: str, exec_id: str = "") -> None:
        """Let a process find the end of its standard input when it has read what is in its FIFO."""
        self.call("tasks.v1.Tasks/CloseIO", {1: identity, 2: exec_id, 3: True}, 5.0)

    def add_exec(self, identity: str, exec_id: str, process: Dict[str, Any], streams: TaskStreams) -> None:
        """Prepare a command in a running container, with the `process` of an OCI spec."""
        spec = {1: SPEC_URL + "Process", 2: json.dumps(process)}
        self.call("tasks.v1.Tasks/Exec", {1: identity, **numbered(streams, 2), 6: spec, 7: exec_id}, SHORT_CALL)

    def wait_process(self, identity: str, exec_id: str = "", timeout: Optional[float] = None) -> int:
        """Wait for the end of a process; its exit status."""
        return self.ask("tasks.v1.Tasks/Wait", {1: identity, 2: exec_id}, timeout).get(1, 0)

    def delete_exec(self, identity: str, exec_id: str) -> int:
        """Take a command away that has ended; its exit status."""
        # The shim waits ten seconds for those who hold the streams open.
        return self.ask("tasks.v1.Tasks/DeleteProcess", {1: identity, 2: exec_id}, 30.0).get(3, 0)

    def list_images(self) -> Dict[str, ImageRecord]:
        """All names of images, by name."""
        return {image.name: image for image in sorted(map(parse_image, self.ask_all("images.v1.Images/List", {})))}

    def get_image(self, name: str) -> ImageRecord:
        """One name of an image."""
        return parse_image(self.ask("images.v1.Images/Get", {1: name}).get(1, b""))

    def create_image(self, image: ImageRecord, method: str = "Create") -> None:
        """Give an image a new name; Conflict where there is that name. containerd sets the times."""
        self.call("images.v1.Images/" + method, {1: {1: image.name, 2: dict(image.labels), 3: numbered(image.target)}})

    def set_image(self, image: ImageRecord) -> None:
        """Let a name stand for an image, whatever it stood for."""
        try:
            self.create_image(image)
        except Conflict:
            self.create_image(image, "Update")

    def delete_image(self, name: str, sync: bool = True) -> None:
        """Remove a name; with `sync` also what nothing else needs any more, before the answer comes."""
        self.call("images.v1.Images/Delete", {1: name, 2: sync}, 120.0)

    def delete_images(self, names: List[str]) -> None:
        """Remove names, those that are there, and with the last of them what nothing else needs any more."""
        for name in names:
            with contextlib.suppress(NotFound):
                self.delete_image(name, sync=name == names[-1])

    def list_content(self) -> Set[str]:
        """The digests of all content there is."""
        return {read_text(read_message(info.value), 1) for message in self.stream("content.v1.Content/List", {}, 10.0)
                for info in decode_fields(message) if info.number == 1}

    def content(self, digest: str) -> Iterator[Any]:
        """Content by its digest, in pieces."""
        for message in self.stream("content.v1.Content/Read", {1: digest}):
            yield from (field.value for field in decode_fields(memoryview(message)) if field.number == 2)

    def read_content(self, digest: str) -> bytes:
        """Content by its digest, as far as memory is to hold it: manifests and configurations. 400 for more."""
        data = b""
        for part in self.content(digest):
            data += part
            if len(data) > JSON_LIMIT:
                raise BadParameter(f"content {digest} is larger than {JSON_LIMIT >> 20} MiB")
        return data

    def write_content(self, media_type: str, data: bytes, labels: Dict[str, str]) -> Descriptor:
        """New content, with the labels by which it needs other content and snapshots."""
        found = Descriptor(media_type, "sha256:" + sha256(data).hexdigest(), len(data))
        fields = {1: 2, 2: "nerdctld-" + found.digest, 3: found.size, 4: found.digest, 6: data, 7: labels}
        with contextlib.suppress(Conflict):
            # What was written is told, and then that it is kept.
            list(self.stream("content.v1.Content/Write", fields, 10.0))
        return found

    def delete_content(self, digest: str) -> None:
        """Remove a blob, whatever refers to it."""
        self.call("content.v1.Content/Delete", {1: digest})

    def make_layer(self, below: List[bytes], above: List[bytes]) -> Tuple[Descriptor, str]:
        """A layer of what differs between the mounts of two snapshots, packed by gzip; it and the digest of its
        tar."""
        layer = parse_descriptor(self.ask("diff.v1.Diff/Diff", {
            1: below, 2: above, 3: LAYER_TYPE, 4: f"nerdctld-{os.urandom(8).hex()}"}, None).get(3, b""))
        info = self.ask("content.v1.Content/Info", {1: layer.digest}).get(1, b"")
        labels = dict(decode_map_entry(each.value) for each in decode_fields(info) if each.number == 5)
        return layer, labels["containerd.io/uncompressed"]

    def unpack_layer(self, layer: Descriptor, snapshotter: str, parent: str, name: str) -> None:
        """Make the snapshot `name` of a layer above another snapshot, unless it is there."""
        with self.snapshot("Prepare", snapshotter, parent) as (key, mounts):
            self.call("diff.v1.Diff/Apply", {1: numbered(layer), 2: mounts}, None)
            with contextlib.suppress(Conflict):
                self.call("snapshots.v1.Snapshots/Commit", {1: snapshotter, 2: name, 3: key})

    def view_snapshot(self, snapshotter: str, key: str, parent: str) -> None:
        """Make a snapshot that shows its parent and cannot be written to."""
        self.call("snapshots.v1.Snapshots/View", {1: snapshotter, 2: key, 3: parent})

    def snapshot_usage(self, snapshotter: str, key: str) -> int:
        """Bytes that a snapshot takes without those below it."""
        return self.ask("snapshots.v1.Snapshots/Usage", {1: snapshotter, 2: key}).get(1, 0)

    def snapshot_parent(self, snapshotter: str, key: str) -> str:
        """The key of the snapshot below a snapshot, "" for the lowest."""
        info = self.ask("snapshots.v1.Snapshots/Stat", {1: snapshotter, 2: key}).get(1, b"")
        return read_text(read_message(info), 2)

    def snapshot_mounts(self, snapshotter: str, key: str) -> List[bytes]:
        """How a snapshot is mounted, as containerd's other services take it."""
        return self.ask_all("snapshots.v1.Snapshots/Mounts", {1: snapshotter, 2: key})

    @contextlib.contextmanager
    def snapshot(self, verb: str, snapshotter: str, parent: str) -> Iterator[Tuple[str, List[bytes]]]:
        """Context with a new snapshot above another one, "" for none, that is gone at its end: a "View", or one to be
        written that is to "Prepare"; its key and its mounts. For a client with a lease."""
        key = f"nerdctld-{os.urandom(8).hex()}"
        mounts = self.ask_all("snapshots.v1.Snapshots/" + verb, {1: snapshotter, 2: key, 3: parent})
        try:
            yield key, mounts
        finally:
            # One that was committed has its name instead of the key.
            with contextlib.suppress(ApiError):
                self.call("snapshots.v1.Snapshots/Remove", {1: snapshotter, 2: key})

    def version(self) -> Tuple[str, str]:
        """containerd's version and the revision of its source."""
        found = self.ask("version.v1.Version/Version", {})
        return read_text(found, 1), read_text(found, 2)

    def snapshotter_complaint(self, name: str) -> str:
        """Why one of containerd's snapshotters does not work, "" when it does."""
        wanted = f"type==io.containerd.snapshotter.v1,id=={name}"
        for each in self.ask_all("introspection.v1.Introspection/Plugins", {1: wanted}):
            return read_text(read_message(read_message(each).get(7) or b""), 2)
        return "containerd has none of that name"

    def uuid(self) -> str:
        """The UUID by which this containerd is known."""
        return read_text(self.ask("introspection.v1.Introspection/Server", {}), 1)


###############################################################################
# Events
###############################################################################


class EventSocket:
    """The connection of a subscription. Whoever reads from it holds `lock` from the moment at which bytes were received
    until it comes back for more, that is until everything in them has been handled."""

    def __init__(self, sock: socket.socket):
        self.sock, self.lock = sock, threading.Lock()
        self.settimeout, self.sendmsg = sock.settimeout, sock.sendmsg

    def recv(self, size: int) -> bytes:
        """Received bytes, b"" at the end."""
        self.release()
        poll_readable(self.sock.fileno(), None)
        self.lock.acquire()
        return self.sock.recv(size)

    def release(self) -> None:
        """Everything that was received has been handled."""
        if self.lock.locked():
            self.lock.release()

    def settle(self, timeout: float) -> bool:
        """Wait until everything that has come by now has been handled; whether it has within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while poll_readable(self.sock.fileno(), 0.0):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0002)
        if self.lock.acquire(timeout=timeout):
            self.lock.release()
            return True
        return False


class EventFeed:
    """The subscription to containerd's events, renewed for as long as the daemon lives. `handle` is called in its
    thread with each ContainerdEvent, and with None when the subscription begins or breaks, which means that anything
    may have happened; it must not wait for anything."""

    # containerd says nothing when it has subscribed us. Until this many seconds have passed, nothing is believed to be
    # covered.
    SETTLE = 0.5
    # Half of the first pause before it subscribes again, in seconds.
    RETRY = 0.1

    def __init__(self, containerd: Containerd, handle: Callable[[Optional[ContainerdEvent]], None]):
        self.containerd, self.handle = containerd, handle
        self.socket: Optional[EventSocket] = None
        self.live_from = float("inf")
        self.closed = threading.Event()

    def start(self) -> None:
        """Subscribe, and go on."""
        threading.Thread(target=self._run, name="events", daemon=True).start()

    @property
    def live(self) -> bool:
        """Whether every change since now would be told."""
        return time.monotonic() >= self.live_from

    def settle(self) -> bool:
        """Wait until what containerd has told by now has been handled; False where not everything is told."""
        sock = self.socket
        # Its socket has no number any more when the subscription has just broken.
        with contextlib.suppress(ValueError):
            return self.live and sock is not None and sock.settle(1.0)
        return False

    def wait_live(self, timeout: float = 5.0) -> bool:
        """Wait until the feed covers what happens from now on; whether it does."""
        deadline = time.monotonic() + timeout
        while not self.live and time.monotonic() < deadline and not self.closed.is_set():
            time.sleep(0.02)
        return self.live

    def close(self) -> None:
        """End the feed for good."""
        self.closed.set()
        sock = self.socket
        if sock:
            with contextlib.suppress(OSError):
                sock.sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        pause = self.RETRY
        while not self.closed.is_set():
            began = time.monotonic()
            try:
                self._follow()
            except ApiError as error:
                if time.monotonic() - began > 1.0 and not self.closed.is_set():
                    log(f"events: {error}")
            self.live_from = float("inf")
            self._handle(None)
            pause = self.RETRY if time.monotonic() - began > 10 else min(2.0, pause * 2)
            self.closed.wait(pause)

    def _follow(self) -> None:
        """Subscribe once, until containerd ends."""
        with self.containerd.dial() as connection:
            self.socket = sock = EventSocket(connection)
            try:
                self._handle(None)
                self.live_from = time.monotonic() + self.SETTLE
                for envelope in self.containerd.events(sock):
                    event = parse_event(envelope, self.containerd.namespace)
                    if event:
                        self._handle(event)
            finally:
                self.socket = None
                sock.release()

    def _handle(self, event: Optional[ContainerdEvent]) -> None:
        try:
            self.handle(event)
        except Exception:
            log(traceback.format_exc())


class Journal:
    """Docker's events: the last of them, and everyone who listens. dockerd keeps 256."""

    KEPT = 256
    # A listener that is further behind is let go: its client does not read.
    BEHIND = 8192

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.history: collections.deque = collections.deque(maxlen=self.KEPT)
        self.queues: List[queue.Queue] = []

    def emit(self, kind: str, action: str, identity: str, attributes: Dict[str, str],
             when: Optional[int] = None) -> None:
        """Tell an event: `kind` is container, image, network, volume, builder or daemon; `when` nanoseconds since
        1970."""
        when = when or time.time_ns()
        event = {
            "Type": kind, "Action": action, "Actor": {"ID": identity, "Attributes": dict(attributes)},
            "scope": "local", "time": when // 10**9, "timeNano": when,
        }
        with self.lock:
            self.history.append(event)
            for each in list(self.queues):
                if each.qsize() >= self.BEHIND:
                    self.queues.remove(each)
                    each.put(ApiError(f"the client is {self.BEHIND} events behind"))
                else:
                    each.put(event)

    @contextlib.contextmanager
    def subscribe(self) -> Iterator[Tuple[List[dict], queue.Queue]]:
        """What is kept, oldest first, and a queue of everything after it. None in the queue means the end, an ApiError
        that it has an end here because nobody read it."""
        mine: queue.Queue = queue.Queue()
        with self.lock:
            self.queues.append(mine)
            kept = list(self.history)
        try:
            yield kept, mine
        finally:
            with self.lock, contextlib.suppress(ValueError):
                self.queues.remove(mine)

    def close(self) -> None:
        """Tell everyone the end."""
        with self.lock:
            for each in self.queues:
                each.put(None)


###############################################################################
# References
###############################################################################

# Suffix of the temporary image that `nerdctl push` creates and deletes.
REDUCED = "-tmp-reduced-platform"


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
DOMAIN = re.compile(r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])(?:\.[a-zA-Z0-9-]+)*(?::\d+)?"
                    r"|\[[0-9a-fA-F:]+\](?::\d+)?")
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
    if len(domain) + len(path) > 254:
        raise BadParameter("repository name must not be longer than 255 characters")
    if not DOMAIN.fullmatch(domain) or not REPOSITORY.fullmatch(path):
        if path.lower() != path and REPOSITORY.fullmatch(path.lower()):
            raise BadParameter(f"invalid reference format: repository name ({path}) must be lowercase")
        raise BadParameter("invalid reference format")
    return Reference(f"{domain}/{path}", tag or ("" if digest else default_tag), digest)


# Names that stand for none: of nerdctl's load and of ctr's (`import-2026-11-24@sha256:…`), of BuildKit, of Kubernetes
# (`sha256:…`, the digest of the configuration), and our own for imports and commits without one. containerd keeps no
# image without a name.
WORKING_NAME = "nerdctld.invalid/"
# BuildKit's name, before a digest, for an image without one.
DANGLING = "moby-dangling"
# The beginning of the name that load gives to an image without one: nerdctl's and ctr's.
IMPORTED = re.compile(r"import(-\d{4}-\d\d-\d\d)?@")
NAMELESS = (WORKING_NAME, "import/", DANGLING + "/", "sha256:", "sha256/")


def is_nameless(name: str) -> bool:
    """Whether a name in containerd is none that people would know."""
    return (name == ":" or name.endswith(REDUCED) or IMPORTED.match(name) is not None
            or (name.partition("@")[0] + "/").startswith(NAMELESS) or name.startswith(NAMELESS))


def with_tag(name: str) -> str:
    """A name as dockerd repeats it when there is no such image: with its tag, ids as they are."""
    with contextlib.suppress(BadParameter):
        if not re.fullmatch(r"(sha256:)?[0-9a-f]{12,64}", name):
            return familiar(parse_reference(name).name)
    return name


###############################################################################
# State
###############################################################################

# Labels of ours on a container: never shown to clients. The create request, in parts of less than 4096 bytes.
LABEL_REQUEST = "nerdctld/request"
# Of a container that `nerdctl create` made without its ports, its networks, or the namespaces of others, until it has
# them: "1", or why it cannot be started, for one without the user that it asked for.
LABEL_LATER = "nerdctld/later"
# Of a container that could not be started again: the process id of its last run, which is still told of.
LABEL_REFUSED = "nerdctld/refused"
# It was taken out of its last network, so that it has not even none: for nerdctl that is the same.
LABEL_ALONE = "nerdctld/alone"
# The id of the image that it was made of, whose name may come to stand for another one.
LABEL_IMAGE = "nerdctld/image"
# In front of the name of a network that the daemon attached a running container to, and has to detach it from: nerdctl
# does so for those only that it was started with.
LABEL_ATTACHED = "nerdctld/attached."
HIDDEN_LABELS = ("nerdctl/", "nerdctld/", "containerd.io/restart.", "containerd.io/gc.", "io.containerd.image.config.")

# The shapes of requests, as the API has them.
HEALTH_CHECK = {"Test": [str], "Interval": int, "Timeout": int, "Retries": int, "StartPeriod": int,
                "StartInterval": int}
CONFIG = {
    "Hostname": str, "Domainname": str, "User": str, "AttachStdin": bool, "AttachStdout": bool, "AttachStderr": bool,
    "ExposedPorts": Named({}), "Tty": bool, "OpenStdin": bool, "StdinOnce": bool, "Env": [str], "Cmd": WORDS,
    "Healthcheck": HEALTH_CHECK, "Image": str, "Volumes": Named({}), "WorkingDir": str, "Entrypoint": WORDS,
    "ArgsEscaped": bool, "NetworkDisabled": bool, "MacAddress": str, "OnBuild": [str], "Labels": Named(str),
    "StopSignal": str, "StopTimeout": int, "Shell": WORDS,
}
RATES = [{"Path": str, "Rate": int}]
RESTART_POLICY = {"Name": str, "MaximumRetryCount": int}
RESOURCES = {
    "CpuShares": int, "Memory": int, "NanoCpus": int, "CgroupParent": str, "BlkioWeight": int,
    "BlkioWeightDevice": [{"Path": str, "Weight": int}], "BlkioDeviceReadBps": RATES, "BlkioDeviceWriteBps": RATES,
    "BlkioDeviceReadIOps": RATES, "BlkioDeviceWriteIOps": RATES, "CpuPeriod": int, "CpuQuota": int,
    "CpuRealtimePeriod": int, "CpuRealtimeRuntime": int, "CpusetCpus": str, "CpusetMems": str,
    "Devices": [{"PathOnHost": str, "PathInContainer": str, "CgroupPermissions": str}], "DeviceCgroupRules": [str],
    "DeviceRequests": [{"Driver": str, "Count": int, "DeviceIDs": [str], "Capabilities": [[str]],
                        "Options": Named(str)}],
    "KernelMemory": int, "MemoryReservation": int, "MemorySwap": int, "MemorySwappiness": int, "OomKillDisable": bool,
    "PidsLimit": int, "Ulimits": [{"Name": str, "Hard": int, "Soft": int}], "CpuCount": int, "CpuPercent": int,
    "IOMaximumIOps": int, "IOMaximumBandwidth": int,
}
MOUNT = {
    "Type": str, "Source": str, "Target": str, "ReadOnly": bool, "Consistency": str,
    "BindOptions": {"Propagation": str, "NonRecursive": bool, "CreateMountpoint": bool, "ReadOnlyNonRecursive": bool,
                    "ReadOnlyForceRecursive": bool},
    "VolumeOptions": {"NoCopy": bool, "Labels": Named(str), "Subpath": str,
                      "DriverConfig": {"Name": str, "Options": Named(str)}},
    "ImageOptions": {"Subpath": str}, "TmpfsOptions": {"SizeBytes": int, "Mode": int, "Options": [[str]]},
}
HOST_CONFIG_FIELDS = {
    **RESOURCES, "Binds": [str], "ContainerIDFile": str, "LogConfig": {"Type": str, "Config": Named(str)},
    "NetworkMode": str, "PortBindings": Named([{"HostIp": str, "HostPort": str}]), "RestartPolicy": RESTART_POLICY,
    "AutoRemove": bool, "VolumeDriver": str, "VolumesFrom": [str], "ConsoleSize": [UNSIGNED], "Annotations": Named(str),
    "CapAdd": WORDS, "CapDrop": WORDS, "CgroupnsMode": str, "Dns": [str], "DnsOptions": [str], "DnsSearch": [str],
    "ExtraHosts": [str], "GroupAdd": [str], "IpcMode": str, "Cgroup": str, "Links": [str], "OomScoreAdj": int,
    "PidMode": str, "Privileged": bool, "PublishAllPorts": bool, "ReadonlyRootfs": bool, "SecurityOpt": [str],
    "StorageOpt": Named(str), "Tmpfs": Named(str), "UTSMode": str, "UsernsMode": str, "ShmSize": int,
    "Sysctls": Named(str), "Runtime": str, "Isolation": str, "Mounts": [MOUNT], "MaskedPaths": [str],
    "ReadonlyPaths": [str], "Init": bool,
}
ENDPOINT = {"IPAMConfig": {"IPv4Address": str, "IPv6Address": str, "LinkLocalIPs": [str]}, "Links": [str],
            "Aliases": [str], "MacAddress": str, "DriverOpts": Named(str), "GwPriority": int}
CREATE_REQUEST = {**CONFIG, "HostConfig": HOST_CONFIG_FIELDS, "NetworkingConfig": {"EndpointsConfig": Named(ENDPOINT)}}


class Mirror:
    """Objects of containerd by their names, each kept until an event tells of it. While events are not followed nothing
    is kept. One thread reads at a time (single flight); those who came before it began share what it reads."""

    # From so many changed objects on, all of them are read, which is one call.
    FEW = 8

    def __init__(self, feed: EventFeed, read_all: Callable[[], Dict[str, Any]], read_one: Callable[[str], Any]):
        self.feed, self.read_all, self.read_one = feed, read_all, read_one
        self.lock = threading.Lock()
        self.values: Dict[str, Any] = {}
        self.dirty: set = set()
        # Whether everything is to be read; when the last reading of everything began.
        self.stale = True
        self.began = 0.0
        # Why that reading failed, for those who wait for it.
        self.failure: Optional[BaseException] = None
        # Whether something that is no longer marked is being read.
        self.reading = False

    def invalidate(self, name: str = "") -> None:
        """One object is no longer as it was, or with "" any may be. Called by the event feed, so it never waits."""
        if name:
            self.dirty.add(name)
        else:
            self.stale = True

    def get(self) -> Dict[str, Any]:
        """All objects as they are now; the same dict as before where nothing has changed."""
        asked = time.monotonic()
        settled = self.feed.settle()
        if settled and not self.stale and not self.dirty and not self.reading:
            return self.values
        with self.lock:
            self.reading = True
            try:
                if not settled or self.stale or len(self.dirty) > self.FEW:
                    if self.began <= asked:
                        self._read_all()
                        # Changes since then are not told: it is for those only who have asked by now.
                        self.stale = self.stale or not settled
                    elif self.failure:
                        raise self.failure
                else:
                    self._read_dirty()
                return self.values
            finally:
                self.reading = False

    def _read_all(self) -> None:
        self.began, self.stale, self.failure = time.monotonic(), False, None
        self.dirty.clear()
        try:
            found = self.read_all()
        except BaseException as error:
            self.stale, self.failure = True, error
            raise
        if found != self.values:
            self.values = found

    def _read_dirty(self) -> None:
        values = dict(self.values)
        try:
            for name in list(self.dirty):
                # Before it is read: what an event tells from here on is for the next reading.
                self.dirty.discard(name)
                try:
                    values[name] = self.read_one(name)
                except NotFound:
                    values.pop(name, None)
                except BaseException:
                    self.dirty.add(name)
                    raise
        finally:
            # Those that were read are marked no more, whatever became of the others.
            self.values = values


class State(NamedTuple):
    """What a container is doing. `kind` is Docker's word: created, running, paused, restarting, exited or dead; `pid` 0
    unless it runs; `exit_code` None before its first end; times in nanoseconds since 1970, None where there is none;
    `health` starting, healthy, unhealthy or "" for none, and `failing` how many checks of it have failed one after the
    other; `error` why it could not be started, "" for none."""

    kind: str
    pid: int = 0
    exit_code: Optional[int] = None
    started_at: Optional[int] = None
    finished_at: Optional[int] = None
    health: str = ""
    failing: int = 0
    error: str = ""

    @property
    def running(self) -> bool:
        """Whether it has a process, paused or not."""
        return self.kind in ("running", "paused")


def restarts_again(labels: Dict[str, str], exit_code: int) -> bool:
    """Whether containerd's restart monitor will start a container again that ended with this status."""
    name, _, most = (labels.get("containerd.io/restart.policy") or "always").partition(":")
    count, limit = int_or_zero(labels.get("containerd.io/restart.count") or ""), int_or_zero(most)
    return labels.get("containerd.io/restart.status") == "running" and (
        name == "always" or name == "unless-stopped"
        and labels.get("containerd.io/restart.explicitly-stopped") != "true"
        or name == "on-failure" and exit_code != 0 and (not limit or count < limit))


# What a runtime says of a process that it cannot start -> the exit code that Docker gives it, and what dockerd adds.
# All of it is the client's fault.
REFUSED_STARTS = (
    ("permission denied", 126, ""), ("is a directory", 126, ": permission denied"),
    ("not a directory", 127, ": Are you trying to mount a directory onto a file (or vice-versa)? Check if the "
                             "specified host path exists and is the expected type"),
    ("executable file not found|no such file or directory|failed to run runc create/exec call", 127, ""))


def refused_start(error: str) -> Tuple[int, Optional[str]]:
    """The exit code that Docker gives a container whose start failed with these words, and what dockerd adds to them,
    None where it is not for the client to know better."""
    if re.search("task|shim|exec", error):
        for pattern, code, hint in REFUSED_STARTS:
            if re.search(pattern, error.lower()):
                return code, hint
    return 128, None


def container_state(labels: Dict[str, str], task: Optional[TaskRecord], started_at: Optional[int]) -> State:
    """The state of a container from its labels, its task and when nerdctl noted that it was started."""
    if task is None:
        # nerdctl never takes an error back: only one of this time counts. A start that failed before nerdctl's hooks
        # ran was not noted.
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        error = labels.get("nerdctl/error") or "" if not started_at or started_at / 1e9 > booted else ""
        if error:
            return State("created", exit_code=refused_start(error)[0], error=error)
    if int_or_zero(labels.get("containerd.io/restart.count") or "") and (
            started_at and restarts_again(labels, 1) if task is None else
            task.status == "created" and labels.get("containerd.io/restart.status") == "running"):
        # containerd counts, takes the task that ended away and makes another: it is neither new nor over meanwhile.
        return State("restarting", started_at=started_at)
    if task is None:
        # It went with a restart of the machine, and containerd remembers no more.
        return State("exited", exit_code=0, started_at=started_at) if started_at else State("created")
    if task.status == "stopped":
        kind = "restarting" if restarts_again(labels, task.exit_status) else "exited"
        error = labels.get("nerdctl/error") or "" if labels.get(LABEL_REFUSED) == str(task.pid) else ""
        return State(kind, exit_code=task.exit_status or (refused_start(error)[0] if error else 0),
                     started_at=started_at, finished_at=task.exited_at or None, error=error)
    kind = {"created": "created", "running": "running", "paused": "paused", "pausing": "paused"}.get(task.status,
                                                                                                     "dead")
    if kind not in ("running", "paused"):
        return State(kind)
    return State(kind, task.pid, started_at=started_at or process_start(task.pid))


def container_health(labels: Dict[str, str], state: State) -> Tuple[str, int]:
    """`health` and `failing` of a container with health checks that has been started. nerdctl keeps them in a label;
    `Pid` is ours and tells of which process, since a container may be started again by others."""
    found = json_of(dict, labels.get("nerdctl/healthstate"))
    failing = found.get("FailingStreak")
    failing = failing if isinstance(failing, int) else 0
    if state.kind != "running":
        # As with dockerd, what is not being checked is not healthy.
        return "unhealthy", failing
    if found.get("Pid", state.pid) != state.pid or found.get("Status") not in ("healthy", "unhealthy"):
        return "starting", failing if found.get("Pid", state.pid) == state.pid else 0
    return found["Status"], failing


def process_start(pid: int) -> Optional[int]:
    """When a process was started, in nanoseconds since 1970, to a hundredth of a second; None where it cannot be
    seen."""
    ticks = read_file(f"/proc/{pid}/stat").rpartition(")")[2].split()[19:20]
    booted = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return booted + int(ticks[0]) * 10**9 // os.sysconf("SC_CLK_TCK") if ticks else None


def kubernetes_name(labels: Dict[str, str]) -> str:
    """The name that nerdctl shows for a container of Kubernetes, "" for any other."""
    parts = [labels.get("io.kubernetes." + key) for key in ("pod.namespace", "pod.name", "container.name")]
    return "k8s://" + "/".join(filter(None, parts)) if parts[0] else ""


def parse_mounts(labels: Dict[str, str]) -> List[Dict[str, Any]]:
    """The mounts that nerdctl noted in labels, of 2.3 (one a label) and before (one list), as Docker's MountPoints."""
    # 1.7 notes that none can be written to.
    found = [{**each, "RW": "ro" not in (each.get("Mode") or "").split(",")}
             for each in json_of(list, labels.get("nerdctl/mounts"))]
    numbered = map(labels.get, map("nerdctl/mounts.{}".format, itertools.count()))
    found += [json_of(dict, each) for each in itertools.takewhile(bool, numbered)]
    mounts = ({
        "Type": each.get("Type") or "bind", "Name": each.get("Name") or None, "Source": each.get("Source") or "",
        "Destination": each.get("Destination") or "",
        "Driver": each.get("Driver") or "local" if each.get("Type") == "volume" else None,
        "Mode": each.get("Mode") or "", "RW": bool(each.get("RW", True)), "Propagation": each.get("Propagation") or "",
    } for each in found)
    return [{key: value for key, value in each.items() if value is not None} for each in mounts]


# How Go's encoder writes the beginning of an OCI spec.
SPEC_PROCESS = re.compile(rb'{"ociVersion":"[ -!#-\[\]-~]*","process":')
JSON = json.JSONDecoder()


class Container:
    """A container as containerd and nerdctl's files tell it: `created` in nanoseconds since 1970; `labels` all of them,
    nerdctl's own too."""

    def __init__(self, record: ContainerRecord, task: Optional[TaskRecord] = None):
        self.record, self.task = record, task
        self.id, self.labels = record.id, record.labels
        self.name = self.labels.get("nerdctl/name") or kubernetes_name(self.labels)
        self.image, self.runtime, self.created = record.image, record.runtime, record.created_at
        # What handlers worked out from it; gone with it.
        self.memo: Dict[str, Any] = {}

    @functools.cached_property
    def state(self) -> State:
        """What it is doing, and how it is."""
        started = nanoseconds_of(str(self.read_file("lifecycle.json").get("started_at") or "")) or 0
        state = container_state(self.labels, self.task, started if started > 0 else None)
        if state.kind == "created" or not self.health_check:
            return state
        health, failing = container_health(self.labels, state)
        return state._replace(health=health, failing=failing)

    @functools.cached_property
    def health_check(self) -> Dict[str, Any]:
        """How its health is checked, {} where it is not."""
        check = {**json_of(dict, self.labels.get("nerdctl/healthcheck")), **(self.request.get("Healthcheck") or {})}
        test = check.get("Test")
        if not (isinstance(test, list) and test[:1] in (["CMD"], ["CMD-SHELL"])
                and all(isinstance(each, str) for each in test)):
            return {}
        return {"Test": test, **{key: value for key, value in check.items() if isinstance(value, int) and value > 0}}

    @property
    def running(self) -> bool:
        """Whether it has a process, paused or not."""
        return self.task is not None and self.task.status in ("running", "paused", "pausing")

    @functools.cached_property
    def spec(self) -> Dict[str, Any]:
        """The OCI spec, {} where it is none."""
        return json_of(dict, self.record.spec)

    @property
    def process(self) -> Dict[str, Any]:
        """How its own process is started, as the OCI spec has it; {} where it does not say."""
        begun, found = None if "spec" in self.__dict__ else SPEC_PROCESS.match(self.record.spec), None
        with contextlib.suppress(ValueError):
            # All that a list needs of a spec is at its beginning: to read 300 whole ones takes 50 ms.
            found = (JSON.raw_decode(str(self.record.spec, "utf-8"), begun.end())[0] if begun
                     else self.spec.get("process"))
        return found if isinstance(found, dict) else {}

    @property
    def ports(self) -> List[Dict[str, Any]]:
        """The ports that it publishes, or did while it ran, as Docker's list: none without a network of its own."""
        networks = json_of(list, self.labels.get("nerdctl/networks"))
        return [] if "host" in networks or "none" in networks else self.asked_ports

    @functools.cached_property
    def asked_ports(self) -> List[Dict[str, Any]]:
        """Those of a network of its own. nerdctl keeps them in a file from 2.2 on, and in a label before."""
        found = self.read_file("network-config.json").get("portMappings") or json_of(
            list, self.labels.get("nerdctl/ports"))
        return [{"IP": each.get("HostIP") or "0.0.0.0", "PrivatePort": each.get("ContainerPort") or 0,
                 "PublicPort": each.get("HostPort") or 0, "Type": each.get("Protocol") or "tcp"}
                for each in found if isinstance(each, dict)]

    @functools.cached_property
    def mounts(self) -> List[Dict[str, Any]]:
        """Its mounts as Docker's MountPoints."""
        return parse_mounts(self.labels)

    @property
    def links(self) -> Dict[str, str]:
        """The containers that it is linked to in the default network: their names or ids by its own names for them."""
        if (self.host_config.get("NetworkMode") or "default") not in ("default", "bridge"):
            return {}
        told = (each.strip("/").partition(":") for each in self.host_config.get("Links") or [])
        return {alias or name: name for name, _, alias in told}

    @functools.cached_property
    def request(self) -> Dict[str, Any]:
        """The create request that it was made with, {} for one that others made."""
        parts = map(self.labels.get, map((LABEL_REQUEST + ".{}").format, itertools.count()))
        # Anybody can write a label: one container must not spoil the list of all.
        with contextlib.suppress(BadParameter):
            return shaped(json_of(dict, "".join(itertools.takewhile(bool, parts))), CREATE_REQUEST)
        return {}

    @property
    def host_config(self) -> Dict[str, Any]:
        """The HostConfig of that request."""
        return self.request.get("HostConfig") or {}

    @property
    def visible_labels(self) -> Dict[str, str]:
        """The labels a client set."""
        # containerd drops those without a value.
        empty = {key: value for key, value in (self.request.get("Labels") or {}).items() if value == ""}
        return {**empty, **{key: value for key, value in self.labels.items() if not key.startswith(HIDDEN_LABELS)}}

    @property
    def asked_image(self) -> str:
        """The image as the client named it, else as people write it."""
        return self.request.get("Image") or familiar(self.image)

    @property
    def folder(self) -> str:
        """Where nerdctl keeps what belongs to it (log, hosts, lifecycle), "" when unknown."""
        return self.labels.get("nerdctl/state-dir") or ""

    def read_file(self, name: str) -> Dict[str, Any]:
        """The JSON object in a file of that folder, {} where there is none."""
        return read_json_file(os.path.join(self.folder, name)) if self.folder else {}


###############################################################################
# Inventory
###############################################################################

GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


def fits_machine(platform: str) -> bool:
    """Whether a platform is that of this machine."""
    words = platform.split("/")
    machine = GO_ARCHITECTURES.get(os.uname().machine, os.uname().machine)
    return words[0] == "linux" and (len(words) == 1 or words[1] in (machine, os.uname().machine))


# dockerd's own label of an image for the one that it was committed on.
PARENT_LABEL = "org.mobyproject.image.parent"


class ImageContent(NamedTuple):
    """What is behind an image's target, of one platform: a manifest with its descriptor, the configuration, and the
    bytes that each of its layers takes unpacked, the lowest first, 0 for one that is not unpacked; the bytes of its
    blobs that are here by their digests, and whether these are all. The parts that are not here are empty."""

    descriptor: Dict[str, Any]
    manifest: Dict[str, Any]
    config: Dict[str, Any]
    layer_sizes: Tuple[int, ...]
    blobs: Dict[str, int] = {}
    whole: bool = False

    @property
    def layers(self) -> List[Dict[str, Any]]:
        """The descriptors of its compressed layers."""
        return self.manifest.get("layers") or []

    @property
    def needed(self) -> Set[Optional[str]]:
        """The digests of all that belongs to it."""
        return {each.get("digest") for each in (self.descriptor, self.manifest.get("config") or {}, *self.layers)}

    @property
    def size(self) -> int:
        """Bytes of it that are here."""
        return sum(self.blobs.values())

    @property
    def unpacked_size(self) -> int:
        """Bytes of its unpacked layers."""
        return sum(self.layer_sizes)

    @property
    def platform(self) -> Dict[str, Any]:
        """The platform that it was made for, with "" where it names no architecture or system."""
        fields = ("architecture", "os", "os.version", "variant")
        own = {key: self.config[key] for key in fields if self.config.get(key)}
        return {"architecture": "", "os": "", **(self.descriptor.get("platform") or own)}

    @property
    def attested(self) -> str:
        """The digest of the manifest that this one has attestations of, "" for any other."""
        told = self.descriptor.get("annotations") or {}
        kind, digest = (told.get("vnd.docker.reference." + key) for key in ("type", "digest"))
        return digest if kind == "attestation-manifest" and isinstance(digest, str) else ""


NO_CONTENT = ImageContent({}, {}, {}, ())

# Images come from anywhere: of their JSON nothing is believed that is not of these shapes.
PLATFORM = {"os": str, "architecture": str, "variant": str, "os.version": str, "os.features": [str]}
DESCRIPTOR = {"mediaType": str, "digest": str, "size": int, "platform": PLATFORM, "annotations": Named(str),
              "artifactType": str, "urls": [str]}
MANIFEST = {"mediaType": str, "schemaVersion": int, "config": DESCRIPTOR, "layers": [DESCRIPTOR],
            "manifests": [DESCRIPTOR]}
IMAGE = {**PLATFORM, "created": str, "author": str, "config": CONFIG, "rootfs": {"type": str, "diff_ids": [str]},
         "history": [{"created": str, "created_by": str, "author": str, "comment": str, "empty_layer": bool}]}


def with_health_check(config_file: Dict[str, Any]) -> Dict[str, Any]:
    """An image's configuration with the health check that nerdctl keeps as a label, since OCI has no field for it."""
    config = config_file.get("config") or {}
    if "nerdctl/healthcheck" not in (config.get("Labels") or {}):
        return config_file
    labels = dict(config["Labels"])
    with contextlib.suppress(BadParameter):
        check = shaped(parse_json(labels.pop("nerdctl/healthcheck").encode()), HEALTH_CHECK)
        return {**config_file, "config": {**config, "Healthcheck": check, "Labels": labels}}
    return config_file


class ImageGroup:
    """All names of one image. `id` is the digest of its target (an index or a manifest), as in dockerd's containerd
    store; `parent` that of the image which it was committed on, "" for none; `contents` are what its index names, in
    its order, and `content` the one that runs here, NO_CONTENT where none is at hand."""

    __slots__ = ("id", "target", "names", "updated_at", "parent", "content", "contents")

    def __init__(self, target: Descriptor):
        self.id, self.target = target.digest, target
        self.names: List[str] = []
        self.updated_at, self.parent = 0, ""
        self.content, self.contents = NO_CONTENT, []

    @property
    def name(self) -> str:
        """One of its names, where there is one that people would know such a one: nerdctl takes no other, as `:`."""
        return min(self.names, key=is_nameless)

    @property
    def repo_tags(self) -> List[str]:
        """Names with a tag, as people write them."""
        return [familiar(name) for name in self.names
                if "@" not in name and ":" in name.rpartition("/")[2] and not is_nameless(name)]

    @property
    def repo_digests(self) -> List[str]:
        """One `repository@digest` for each repository it has a name in."""
        found = (re.sub("(:[^:/]*)?(@.*)?$", "", name, count=1) for name in self.names if not is_nameless(name))
        return list(dict.fromkeys(f"{familiar(each)}@{self.id}" for each in found))

    @property
    def whole(self) -> List[ImageContent]:
        """Those of its contents that are here with all that belongs to them: this machine's platform first,
        attestations last."""
        def by_use(content: ImageContent) -> Tuple[bool, bool]:
            platform = platform_text(content.descriptor.get("platform"))
            return platform == "unknown/unknown", not fits_machine(platform)

        return sorted((each for each in self.contents if each.whole), key=by_use)

    @property
    def config(self) -> Dict[str, Any]:
        """The image's configuration file, {} when unknown."""
        return self.content.config

    @property
    def created(self) -> int:
        """When the image was made, in whole seconds since 1970, 0 where it does not say."""
        return seconds_or_zero(self.config.get("created"))

    @property
    def labels(self) -> Dict[str, str]:
        """The labels of the image."""
        return (self.config.get("config") or {}).get("Labels") or {}

    @property
    def digests(self) -> List[str]:
        """Every digest the image answers to: of its target, its manifest and its configuration."""
        found = (self.content.descriptor.get("digest"), (self.content.manifest.get("config") or {}).get("digest"))
        return [self.id, *(each for each in found if each)]


class ImageStore:
    """Images as containerd has them now. What is behind a digest never changes, so it is read once."""

    # For how long content that was not there is not looked for again, in seconds.
    ABSENT = 5.0

    def __init__(self, containerd: Containerd, feed: EventFeed, snapshotter: str):
        self.containerd, self.snapshotter = containerd, snapshotter
        self.names = Mirror(feed, self._read_names, self._read_name)
        # Whether events tell of every image, None where that is not known yet.
        self.told: Optional[bool] = None
        self.lock = threading.Lock()
        self.blobs: Dict[str, Any] = {}
        self._usage = functools.lru_cache(4096)(functools.partial(containerd.snapshot_usage, snapshotter))
        # The names that `groups` were made of, what is known of their content, and until when that may be used.
        self.grouped: Any = None
        self.groups: Dict[str, ImageGroup] = {}
        self.until = 0.0

    def get(self) -> Dict[str, ImageGroup]:
        """All images by id."""
        names = self.records()
        with self.lock:
            if self.grouped is not names or time.monotonic() >= self.until:
                self._group(names)
            return self.groups

    def by_name(self) -> Dict[str, ImageGroup]:
        """The image of each name."""
        return {name: group for group in self.get().values() for name in group.names}

    def records(self) -> Dict[str, ImageRecord]:
        """All images by name; the same dict as before where nothing has changed."""
        if not self._all_are_told():
            self.names.invalidate()
        return self.names.get()

    def remove_content(self, content: ImageContent) -> None:
        """Remove what is here of one platform of an image, but for what other images or platforms need."""
        others = (each.needed for other in self.get().values() for each in other.contents
                  if each.descriptor["digest"] != content.descriptor["digest"])
        for digest in content.needed.difference(*others):
            with contextlib.suppress(NotFound):
                self.containerd.delete_content(digest)
        self.look_again()

    def look_again(self) -> None:
        """Let the next get() see which content is here: no event tells of what was removed."""
        with self.lock:
            self.groups, self.grouped = {}, None

    def invalidate(self, name: str = "") -> None:
        """An image is no longer as it was, or with "" any may be, of another containerd too."""
        self.names.invalidate(name)
        if not name:
            self.told = None

    def _all_are_told(self) -> bool:
        """Whether events tell of every image. In containerd 1.7 the transfer service, by which nerdctl 2.3 pulls, loads
        and tags, makes them without one."""
        if self.told is None:
            self.told = not self.containerd.version()[0].lstrip("v").startswith("1.")
        return self.told

    def _read_names(self) -> Dict[str, ImageRecord]:
        return {name: image for name, image in self.containerd.list_images().items() if not name.endswith(REDUCED)}

    def _read_name(self, name: str) -> ImageRecord:
        if name.endswith(REDUCED):
            raise NotFound(name)
        return self.containerd.get_image(name)

    def _group(self, names: Dict[str, ImageRecord]) -> None:
        groups: Dict[str, ImageGroup] = {}
        for name in sorted(names):
            group = groups.setdefault(names[name].target.digest, ImageGroup(names[name].target))
            group.names.append(name)
            group.updated_at = max(group.updated_at, names[name].updated_at)
            group.parent = group.parent or dict(names[name].labels).get(PARENT_LABEL, "")
        known = self.groups
        # The index of an image may get more of its platforms under the same digest, when its record is written anew.
        wanted = [group for group in groups.values() if group.id not in known or known[group.id].content is NO_CONTENT
                  or known[group.id].updated_at != group.updated_at]
        present = self.containerd.list_content() if wanted else set()
        for identity, group in groups.items():
            if identity in known:
                group.content, group.contents = known[identity].content, known[identity].contents
        for group in wanted:
            group.contents = self._read_contents(group.target, present)
            group.content = next(iter(group.whole), NO_CONTENT)
        # Only what is behind images that there are is kept.
        needed = {digest for group in groups.values() for each in group.contents for digest in each.needed}
        self.blobs = {digest: self.blobs[digest] for digest in self.blobs.keys() & needed.union(groups)}
        hollow = any(group.content is NO_CONTENT for group in groups.values())
        self.groups, self.grouped = groups, names
        self.until = time.monotonic() + self.ABSENT if hollow else float("inf")

    def _blob(self, digest: str, shape: Dict[str, Any]) -> Dict[str, Any]:
        """A manifest or a configuration; 400 where it is none."""
        if digest not in self.blobs:
            self.blobs[digest] = shaped(parse_json(self.containerd.read_content(digest)), shape)
        return self.blobs[digest]

    def _read_contents(self, target: Descriptor, present: set) -> List[ImageContent]:
        if target.digest not in present:
            return []
        found = []
        # What was removed while it was read, or makes no sense, is not told of.
        with contextlib.suppress(NotFound, BadParameter):
            for each in self._blob(target.digest, MANIFEST).get("manifests", [target.json]):
                with contextlib.suppress(NotFound, BadParameter, KeyError):
                    found.append(self._read_content(each, present))
        return found

    def _read_content(self, descriptor: Dict[str, Any], present: set) -> ImageContent:
        manifest = self._blob(descriptor["digest"], MANIFEST) if descriptor["digest"] in present else {}
        parts = [descriptor, *filter(None, [manifest.get("config")]), *(manifest.get("layers") or [])]
        here = [each for each in parts if each["digest"] in present]
        known = len(parts) > 1 and parts[1] in here
        config = with_health_check(self._blob(manifest["config"]["digest"], IMAGE)) if known else {}
        return ImageContent(descriptor, manifest, config, tuple(map(self._layer_size, chain_ids(config))),
                            {each["digest"]: each.get("size") or 0 for each in here},
                            known and len(here) == len(parts))

    def _layer_size(self, key: str) -> int:
        with contextlib.suppress(NotFound):
            return self._usage(key)
        return 0


def chain_ids(config: Dict[str, Any]) -> List[str]:
    """The keys of an image's snapshots by its configuration, from the lowest layer up."""
    link = lambda below, layer: "sha256:" + sha256(f"{below} {layer}".encode()).hexdigest()
    return list(itertools.accumulate((config.get("rootfs") or {}).get("diff_ids") or [], link))


def image_id(container: Container, named: Dict[str, ImageGroup]) -> str:
    """The id of the image that a container was made of; of one that others made, of what its name stands for now, ""
    for nothing."""
    found = named.get(container.image)
    return container.labels.get(LABEL_IMAGE) or (found.id if found else "")


def platform_text(platform: Optional[Dict[str, Any]]) -> str:
    """`linux/arm64/v8` for the platform of a descriptor, "" for none."""
    return "/".join(filter(None, map((platform or {}).get, ("os", "architecture", "variant"))))


# In front of the name that a network with any other name than nerdctl takes has for nerdctl and the CNI plugins.
SPELLED = "nerdctld-"


def cni_name(name: str) -> str:
    """nerdctl's name of a network: the same, or with `_` and two digits for each byte that nerdctl does not take."""
    if re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", name):
        return name
    return SPELLED + re.sub(rb"[^a-zA-Z0-9.-]", lambda found: b"_%02x" % found[0][0],
                            name.encode("utf-8", "surrogateescape")).decode()


def network_name(text: str) -> str:
    """The name of a network, by nerdctl's."""
    name = re.sub("_([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text[len(SPELLED):])
    with contextlib.suppress(UnicodeError):
        name = name.encode("latin-1").decode()
        return name if text.startswith(SPELLED) and cni_name(name) == text else text
    return text


def made_up_id(name: str) -> str:
    """A stable id for what nerdctl gives none: host, none, and networks of other CNI users."""
    return sha256(f"nerdctld network {name}".encode()).hexdigest()


def parse_network(native: Dict[str, Any], written: int) -> Dict[str, Any]:
    """A CNI configuration list that nerdctl wrote as Docker shows a network, without its members. It has no time of
    making but that at which its file was written, in nanoseconds since 1970."""
    name, plugin = network_name(native.get("name") or ""), (native.get("plugins") or [{}])[0]
    driver = {"host": "host", "none": "null"}.get(name) or plugin.get("type") or "bridge"
    labels, identity = native.get("nerdctlLabels") or {}, native.get("nerdctlID")
    config, ipam = [], json_of(dict, labels.get("nerdctld/ipam"))
    spare = ipam.get("AuxiliaryAddresses") or {}
    for each in sorted(itertools.chain.from_iterable((plugin.get("ipam") or {}).get("ranges") or []),
                       key=lambda each: ":" in str(each.get("subnet"))):
        entry = {"Subnet": each.get("subnet") or "", "Gateway": each.get("gateway") or "",
                 "IPRange": labels.get("nerdctld/ip-range") or "",
                 "AuxiliaryAddresses": spare.get(each.get("subnet") or "")}
        config.append({key: value for key, value in entry.items() if value
                       and (key != "IPRange" or ":" not in entry["Subnet"])})
    options = json_of(dict, labels.get("nerdctld/options"))
    if name == "bridge":
        options = {"com.docker.network.bridge.default_bridge": "true",
                   "com.docker.network.bridge.name": plugin.get("bridge") or "nerdctl0"}
    return {
        "Name": name, "Id": identity if isinstance(identity, str) and identity else made_up_id(name),
        "Created": whole_seconds(written), "Scope": "local",
        "Driver": driver, "EnableIPv4": True, "EnableIPv6": any(":" in each.get("Subnet", "") for each in config),
        "IPAM": {"Driver": "default", "Config": config or None,
                 "Options": None if name in ("bridge", "host", "none") else ipam.get("Options", {})},
        "Internal": driver == "bridge" and not plugin.get("isGateway"), "Attachable": False, "Ingress": False,
        "ConfigFrom": {"Network": ""}, "ConfigOnly": False, "Options": options,
        "Labels": {key: value for key, value in labels.items() if not key.startswith(HIDDEN_LABELS)},
    }


ANONYMOUS = "com.docker.volume.anonymous"


def parse_volume(name: str, config: Any, mountpoint: str, written: int) -> Dict[str, Any]:
    """A volume as Docker shows it, from the volume.json that nerdctl wrote, and when. Those that nerdctl made for a
    container carry no label, but a name that nobody would type."""
    labels = (config.get("labels") if isinstance(config, dict) else None) or {}
    if not labels and re.fullmatch(r"[0-9a-f]{64}", name):
        labels = {ANONYMOUS: ""}
    return {
        "CreatedAt": whole_seconds(written), "Driver": "local",
        "Labels": {key: value for key, value in labels.items() if not key.startswith(HIDDEN_LABELS)} or None,
        "Mountpoint": mountpoint,
        "Name": name, "Options": json_of(dict, labels.get("nerdctld/options")) or None, "Scope": "local",
    }


def has_file_system(volume: Dict[str, Any]) -> bool:
    """Whether a volume is to be mounted by its options."""
    options = volume.get("Options") or {}
    return bool(options.get("device") or options.get("type"))


def whole_seconds(nanoseconds: int) -> str:
    """A time to the second, the zero time for 0: nerdctl notes no time of making for networks and volumes."""
    return rfc3339(nanoseconds // 10**9 * 10**9 if nanoseconds else None)


def config_folder(name: str) -> str:
    """A folder of configuration, for the user this daemon runs as."""
    base = "/etc" if os.geteuid() == 0 else os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, name)


@functools.lru_cache(maxsize=None)
def nerdctl_settings() -> Dict[str, str]:
    """The texts that nerdctl's own configuration file sets: address, namespace, data_root, cni_netconfpath and others.
    {} where there is none; one that nerdctl cannot read it complains of itself."""
    text = read_file(os.environ.get("NERDCTL_TOML") or os.path.join(config_folder("nerdctl"), "nerdctl.toml"))
    found = re.findall(r"""^\s*(\w+)\s*=\s*(["'])([^"'\\]*)\2\s*(?:#.*)?$""", text, re.M)
    return {key: value for key, _, value in found}


def cni_folder() -> str:
    """Where nerdctl keeps networks."""
    return os.environ.get("NETCONFPATH") or nerdctl_settings().get("cni_netconfpath") or config_folder("cni/net.d")


def data_root() -> str:
    """Where nerdctl keeps its data, for the user this daemon runs as."""
    base = "/var/lib" if os.geteuid() == 0 else os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return nerdctl_settings().get("data_root") or os.path.join(base, "nerdctl")


def kept(read: Callable[[], Any], seconds: float) -> Callable[[], Any]:
    """A function for a value that was read within so many seconds: for what changes seldom and sends no event."""
    lock, known, until = threading.Lock(), None, 0.0

    def value() -> Any:
        nonlocal known, until
        with lock:
            if time.monotonic() >= until:
                known, until = read(), time.monotonic() + seconds
            return known

    return value


def json_files() -> Callable[[str], Tuple[Any, int]]:
    """A function for the value of a JSON file, which is read anew when the file was written, and for the time of that,
    in nanoseconds since 1970. OSError or ValueError where it has none."""
    known: Dict[str, Tuple[Tuple[int, ...], Any]] = {}

    def value(path: str) -> Tuple[Any, int]:
        found = os.stat(path)
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
        entry = known.get(path)
        if entry is None or entry[0] != stamp:
            with open(path, "rb") as file:
                entry = known[path] = (stamp, json.load(file))
            if len(known) > 4096:
                known.clear()
        return entry[1], found.st_mtime_ns

    return value


class Inventory:
    """What there is: containers and images as containerd tells them, networks and volumes as nerdctl's files do. Each
    answer is what is so when it is asked for."""

    def __init__(self, nerdctl: Nerdctl, containerd: Containerd, feed: EventFeed):
        self.nerdctl, self.containerd = nerdctl, containerd
        self.records = Mirror(feed, self._read_containers, self._read_container)
        self.images = ImageStore(containerd, feed, nerdctl.snapshotter)
        self.read_json = json_files()
        # Tools are replaced seldom, and the machine is what it is.
        self.tools = kept(nerdctl.version, 30.0)
        self.machine = kept(nerdctl.info, 30.0)
        # Containers whose last run ended for want of memory.
        self.out_of_memory: set = set()

    def _read_containers(self) -> Dict[str, Container]:
        records, began = self.containerd.list_containers(), time.monotonic()
        tasks: Dict[str, Optional[TaskRecord]] = {**self.containerd.list_tasks()}
        if time.monotonic() - began >= SHIM_TIMEOUT:
            # Those of shims that did not answer in time are left out, or unknown.
            tasks.update((each.id, self.containerd.get_task(each.id)) for each in records
                         if getattr(tasks.get(each.id), "status", "unknown") == "unknown")
        return {record.id: Container(record, tasks.get(record.id)) for record in records
                if not self._is_build_step(record)}

    def _read_container(self, real: str) -> Container:
        record = self.containerd.get_container(real)
        if self._is_build_step(record):
            raise NotFound(real)
        return Container(record, self.containerd.get_task(real))

    def _is_build_step(self, record: ContainerRecord) -> bool:
        return not record.image and BUILD_STEP.fullmatch(record.id) is not None

    def note(self, event: Optional[ContainerdEvent]) -> None:
        """Heed an event: what it names is read anew when it is next asked for."""
        if event is None:
            self.records.invalidate()
            self.images.invalidate()
        elif event.topic.startswith("/images/"):
            self.images.invalidate(event.payload.get("name") or "")
        elif event.container and not event.topic.startswith("/tasks/exec-") and (event.topic != "/tasks/exit"
                                                                                 or event.ends_container):
            if event.topic == "/tasks/oom":
                self.out_of_memory.add(event.container)
            elif event.topic in ("/tasks/start", "/containers/delete"):
                self.out_of_memory.discard(event.container)
            self.records.invalidate(event.container)

    def containers(self) -> Dict[str, Container]:
        """All containers by id."""
        return self.records.get()

    def container(self, name: str) -> Container:
        """The container of an id, a name, `/name` or the beginning of an id; 404 and 400 with dockerd's words."""
        wanted = name.lstrip("/")
        if not wanted:
            raise BadParameter("invalid container name or ID: value is empty")
        prefixed = []
        for each in self.containers().values():
            if wanted in (each.id, each.name):
                return each
            if each.id.startswith(wanted):
                prefixed.append(each)
            if wanted.startswith(each.name + "/") and wanted[len(each.name) + 1:] in each.links:
                return self.container(each.links[wanted[len(each.name) + 1:]])
        if len(prefixed) == 1:
            return prefixed[0]
        if prefixed:
            raise BadParameter(f"multiple IDs found with provided prefix: {wanted}")
        raise NotFound(f"No such container: {wanted}")

    def image(self, name: str) -> ImageGroup:
        """The image of a name, a digest, an id or the beginning of one; 404 with dockerd's words, 400 for what is no
        reference."""
        groups = self.images.get()
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
            found = [group for group in groups.values() if any(each.startswith("sha256:" + prefix)
                                                               for each in group.digests)]
            exact = [group for group in found if group.id.startswith("sha256:" + prefix)] or found
            if len(exact) == 1:
                return exact[0]
            if exact:
                raise BadParameter(f"ambiguous image ID prefix: {name}")
        parse_reference(name)
        raise NotFound(f"No such image: {with_tag(name)}")

    @property
    def store(self) -> str:
        """nerdctl's own folder for this containerd: the hash of its address is in the name."""
        return os.path.join(data_root(), sha256(os.path.realpath(self.containerd.address).encode()).hexdigest()[:8])

    def networks(self) -> Dict[str, Dict[str, Any]]:
        """Networks as Docker shows them, by name; bridge, host and none are always among them."""
        found = {name: shown for name, (_, shown) in self.network_files().items()}
        for name in ("bridge", "host", "none"):
            found.setdefault(name, parse_network({"name": name}, 0))
        return {name: found[name] for name in sorted(found)}

    def network_files(self) -> Dict[str, Tuple[Dict[str, Any], Dict[str, Any]]]:
        """By name each network's configuration list, and the network as Docker shows it."""
        found = {}
        for folder in (cni_folder(), os.path.join(cni_folder(), self.nerdctl.namespace)):
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                if name.endswith((".conf", ".conflist", ".json")):
                    # Anybody may have written it: one that makes no sense must not spoil the list of all.
                    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
                        config, written = self.read_json(os.path.join(folder, name))
                        if isinstance(config["name"], str) and isinstance(config["plugins"], list):
                            found[network_name(config["name"])] = config, parse_network(config, written)
        return found

    @property
    def places(self) -> str:
        """The folder of what the daemon mounts for containers."""
        return os.path.join(self.store, "nerdctld-mounts", self.nerdctl.namespace)

    def volume_folder(self, name: str) -> str:
        """Where nerdctl has the files of a volume."""
        return os.path.join(self.store, "volumes", self.nerdctl.namespace, name, "_data")

    def volumes(self) -> Dict[str, Dict[str, Any]]:
        """Volumes as Docker shows them, by name. One with a file system of its own is at a place of the daemon's."""
        folder, found = os.path.join(self.store, "volumes", self.nerdctl.namespace), {}
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(folder)):
                with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                    config, written = self.read_json(os.path.join(folder, name, "volume.json"))
                    found[name] = parse_volume(name, config, self.volume_folder(name), written)
                    if has_file_system(found[name]):
                        found[name]["Mountpoint"] = os.path.join(self.places, "volume." + name)
        return found


###############################################################################
# Hosts files
###############################################################################


def network_names(container: Container) -> List[str]:
    """The names of the networks a container was given, in the order of its interfaces."""
    if "network names" not in container.memo:
        names = json_of(list, container.labels.get("nerdctl/networks")) if LABEL_ALONE not in container.labels else ()
        container.memo["network names"] = [network_name(str(each)) for each in names]
    return container.memo["network names"]


def network_mode(container: Container) -> str:
    """Docker's NetworkMode: what was asked for, whatever became of it, or the name of the first network, host or
    none."""
    asked = container.host_config.get("NetworkMode") or "default"
    return asked if asked != "default" else next(iter(network_names(container)), "bridge")


def asked_endpoint(container: Container, name: str) -> Dict[str, Any]:
    """The EndpointSettings that a client gave for a network of a container, {} for none."""
    asked = (container.request.get("NetworkingConfig") or {}).get("EndpointsConfig") or {}
    return asked.get(name) or (asked.get("default") if name == "bridge" else None) or {}


def parse_result(result: Dict[str, Any]) -> Dict[str, Any]:
    """The addresses of a container's interface from the result of CNI's plugins: ip, prefix, ip6, prefix6, mac."""
    inside = (each for each in result.get("interfaces") or [] if each.get("sandbox"))
    found: Dict[str, Any] = {"mac": next(inside, {}).get("mac") or ""}
    for each in result.get("ips") or []:
        address, _, prefix = (each.get("address") or "").partition("/")
        if ":" not in address:
            found.update({"ip": address, "prefix": int(prefix or 0)})
        elif not address.lower().startswith("fe80"):
            found.update({"ip6": address, "prefix6": int(prefix or 0)})
    return found


def hosts_folder(container: Container) -> str:
    """Where nerdctl keeps a container's hosts file and notes its addresses, "" where that is not known."""
    if container.folder.count("/") < 3:
        return ""
    containers, namespace, name = container.folder.rsplit("/", 2)
    return os.path.join(os.path.dirname(containers), "etchosts", namespace, name)


def noted_results(container: Container, starting: bool = False) -> Dict[str, Dict[str, Any]]:
    """By the names of its networks CNI's results of a container that runs or is about to, which nerdctl notes for the
    hosts files of its peers."""
    if starting or "results" not in container.memo:
        folder = hosts_folder(container) if starting or container.running else ""
        noted = read_json_file(os.path.join(folder, "meta.json")).get("Networks") if folder else None
        noted = {network_name(name): each for name, each in (noted or {}).items()}
        container.memo["results"] = {name: noted[name] for name in network_names(container)
                                     if isinstance(noted.get(name), dict)}
    return container.memo["results"]


def noted_addresses(container: Container, starting: bool = False) -> Dict[str, Dict[str, Any]]:
    """parse_result() of each network of a container that runs or is about to."""
    return {name: parse_result(result) for name, result in noted_results(container, starting).items()}


def field_of(body: Dict[str, Any], path: str) -> Any:
    """The value at `HostConfig.Memory`; None when it is not there."""
    for key in path.split("."):
        body = (body or {}).get(key)
    return body


def hostname_args(body: Dict[str, Any]) -> List[str]:
    """Words for the host name: what is asked for or, since nerdctl has no network aliases and its containers find each
    other by host name, the alias that a compose service has for its name. own_files() gives it its own one."""
    name = body.get("Hostname") or ""
    mode = field_of(body, "HostConfig.NetworkMode") or ""
    endpoints = field_of(body, "NetworkingConfig.EndpointsConfig") or {}
    aliases = [each for one in endpoints.values() for each in one.get("Aliases") or []]
    if not name and not mode.startswith(("host", "container:")):
        service = (body.get("Labels") or {}).get("com.docker.compose.service")
        wanted = service if service in aliases else next(iter(aliases), "")
        name = wanted if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62})", wanted or "") else ""
    return [f"--hostname={name}"] if name else []


HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")


def wanted_names(container: Container) -> Tuple[Dict[str, List[str]], Dict[str, List[str]]]:
    """The names by which a container asked to be found in each network and that nerdctl does not give it, and those by
    which it asked to find others: container -> names."""
    if "names" not in container.memo:
        asked, aliases, links = container.request, {}, {}
        known = {container.name, str(asked.get("Hostname") or ""), container.labels.get("nerdctl/hostname")}
        told = list(container.host_config.get("Links") or [])
        for network, one in (field_of(asked, "NetworkingConfig.EndpointsConfig") or {}).items():
            own = [] if asked.get("Hostname") or not hostname_args(asked) else [container.id[:12]]
            aliases[network] = own + [each for each in one.get("Aliases") or [] if HOST_NAME.fullmatch(each)
                                      and each not in known]
            told += one.get("Links") or []
        for each in told:
            other, _, alias = each.strip("/").partition(":")
            if HOST_NAME.fullmatch(alias or other):
                links.setdefault(other, []).append(alias or other)
        container.memo["names"] = aliases, links
    return container.memo["names"]


@contextlib.contextmanager
def locked(path: str, seconds: float = 2.0, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Context that holds the lock of a folder or file, as nerdctl takes it; BlockingIOError when somebody keeps it for
    so long."""
    descriptor, until = os.open(path, os.O_RDONLY), time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


# A container can write to its file, and make it as large as it likes.
LARGEST_HOSTS = 1 << 20


def rewrite_hosts(folder: str, change: Callable[[List[str]], List[str]]) -> None:
    """Change the lines of the hosts file in a folder, if it can be read: in place, since it is mounted into a
    container."""
    with contextlib.suppress(OSError), open(os.path.join(folder, "hosts"), "r+", encoding="utf-8",
                                            errors="surrogateescape") as file:
        if os.fstat(file.fileno()).st_size > LARGEST_HOSTS:
            return
        before = file.read().splitlines()
        after = change(before)
        if after != before:
            file.seek(0)
            file.write("".join(each + "\n" for each in after))
            file.truncate()


def nerdctl_lines(note: Dict[str, Any], notes: List[Dict[str, Any]]) -> List[str]:
    """nerdctl's own part of the hosts file of a container by what it `note`d of it and of all that run."""
    lines = ["# <nerdctl>", "127.0.0.1\tlocalhost localhost.localdomain", "::1\t\tlocalhost localhost.localdomain"]
    lines += [f"{ip:15} {name}" for name, ip in (note.get("ExtraHosts") or {}).items()]
    for other in notes:
        for network in sorted((note.get("Networks") or {}).keys() & (other.get("Networks") or {}).keys()):
            names = [f"{other['Hostname']}.{other['Domainname']}"] if other.get("Domainname") else []
            for name in filter(None, (other.get("Hostname"), other.get("Name"))):
                names += [name] if network == "bridge" else [name, f"{name}.{network}"]
            address = parse_result(other["Networks"][network] or {})
            lines += [f"{address[key]:15} {' '.join(names)}" for key in ("ip", "ip6") if address.get(key)]
    return [*lines, "# </nerdctl>"]


def renote(container: Container, network: str, result: Optional[Dict[str, Any]]) -> None:
    """Note, as nerdctl does when a container starts or ends, CNI's result of a container that was put into a network,
    or None of one that was taken out, and let the hosts files follow."""
    folder = hosts_folder(container)
    if not os.path.isdir(folder):
        return
    with locked(os.path.dirname(folder)):
        path = os.path.join(folder, "meta.json")
        note = read_json_file(path) if os.path.exists(path) or result is None else {
            "ID": container.id, "Name": container.name, "Hostname": container.labels.get("nerdctl/hostname") or ""}
        if not note:
            return
        name = cni_name(network)
        noted = {each: found for each, found in (note.get("Networks") or {}).items() if each != name}
        note["Networks"] = {**noted, name: result} if result else noted
        with open(path + ".nerdctld", "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)
            json.dump(note, file)
        os.replace(file.name, path)
        store = os.path.dirname(folder)
        notes = {each: read_json_file(os.path.join(store, each, "meta.json")) for each in sorted(os.listdir(store))}
        for each in filter(notes.get, notes):
            own = nerdctl_lines(notes[each], list(notes.values()))
            rewrite_hosts(os.path.join(store, each), functools.partial(with_own_part, own))


def with_own_part(own: List[str], lines: List[str]) -> List[str]:
    """The lines of a hosts file with another part of nerdctl's own."""
    if own[0] not in lines or own[-1] not in lines:
        return [*own, *lines]
    return lines[:lines.index(own[0])] + own + lines[lines.index(own[-1]) + 1:]


class Hosts:
    """Network aliases and links, which nerdctl has not: lines in the hosts files that it keeps for containers. What
    stands there outside of its own part it leaves alone, except for comments, so that a name marks the lines that are
    ours."""

    MARK = "alias.nerdctld"

    def __init__(self, engine: "Engine"):
        self.engine, self.lock = engine, threading.Lock()
        self.used = False
        self.due = threading.Event()

    def on_event(self, event: Optional[ContainerdEvent]) -> None:
        """After a start or an end that others have caused, do it again."""
        if self.used and event is not None and event.topic in ("/tasks/start", "/tasks/exit") and not self.due.is_set():
            self.due.set()
            threading.Thread(target=self._again, name="hosts", daemon=True).start()

    def _again(self) -> None:
        # What comes together is done together.
        time.sleep(0.05)
        self.due.clear()
        with contextlib.suppress(ApiError):
            self.refresh()

    def refresh(self, starting: Optional[Container] = None) -> None:
        """Write to the files of running containers, or to that of one whose process is about to start, how it finds
        the others, and itself."""
        running = [each for each in self.engine.inventory.containers().values() if each.running]
        named = [each for each in [*running, *([starting] if starting else [])]
                 if any(map(any, (each.values() for each in wanted_names(each))))]
        if not named and not self.used:
            return
        with self.lock, contextlib.suppress(OSError, ValueError):
            self.used = bool(named)
            places = [(each, noted_addresses(each)) for each in running]
            places += [(starting, noted_addresses(starting, True))] if starting else []
            for store, group in itertools.groupby([starting] if starting else running,
                                                  lambda each: os.path.dirname(hosts_folder(each))):
                with locked(store):
                    for each in group:
                        lines = self._lines(each, places)
                        rewrite_hosts(hosts_folder(each), lambda before: [
                            *(line for line in before if not line.rstrip().endswith(self.MARK)), *lines])

    def _lines(self, container: Container, places: List[Tuple[Container, Dict[str, Dict[str, Any]]]]) -> List[str]:
        mine, links, lines = set(network_names(container)), wanted_names(container)[1], []
        for other, addresses in places:
            linked = [name for key in (other.name, other.id, other.id[:12]) for name in links.get(key, ())]
            for network in mine.intersection(addresses):
                names = wanted_names(other)[0].get("default" if network == "bridge" else network, []) + linked
                ips = [addresses[network].get(key) for key in ("ip", "ip6")] if names else []
                lines += [" ".join([ip, *dict.fromkeys(names), self.MARK]) for ip in ips if ip]
        return sorted(lines)


###############################################################################
# CNI
###############################################################################

# A container gets its networks from nerdctl's OCI hooks when its task is made, and from the daemon while it runs: both
# run the plugins of CNI (github.com/containernetworking/cni, SPEC.md), one after the other.
CNI_FOLDERS = ("/opt/cni/bin", "/usr/local/libexec/cni", "/usr/local/lib/cni", "/usr/libexec/cni", "/usr/lib/cni")


class Interface(NamedTuple):
    """An interface of a container as plugins are told of it, in the network namespace of a process, and what they have
    made: CNI's result."""

    name: str
    pid: int = 0
    arguments: str = ""
    addresses: List[str] = []
    result: Dict[str, Any] = {}


def attached_networks(container: Container) -> Dict[str, Interface]:
    """By the names of networks what the daemon has attached a container to. Anybody can write a label."""
    found = {}
    for key, text in container.labels.items():
        if key.startswith(LABEL_ATTACHED):
            with contextlib.suppress(ValueError, TypeError):
                made = Interface(**json.loads(text))
                if [type(each) for each in made] == [str, int, str, list, dict]:
                    found[key[len(LABEL_ATTACHED):]] = made
    return found


def interface_label(network: str, made: Interface) -> Dict[str, str]:
    """The label that keeps it, without a result that would be too long for containerd."""
    text = json.dumps(made._asdict(), separators=(",", ":"))
    if len(text) > 3800:
        text = json.dumps({**made._asdict(), "result": {}})
    return {LABEL_ATTACHED + network: text}


def plugins_argv(engine: "Engine") -> List[str]:
    """argv in front of a plugin: a user's own containerd has namespaces of its own."""
    apart = os.path.join(runtime_folder(), "containerd-rootless/netns")
    if not os.path.exists(apart):
        return engine.containerd.entering("-n")
    # A network namespace that RootlessKit holds apart is mounted at that path in its mount namespace only.
    entered = engine.containerd.entering()
    return entered and [*entered, "nsenter", f"-n{apart}", "--"]


def system_path() -> Dict[str, str]:
    """The environment of programs that need those of the system's administration, such as iptables."""
    return {"PATH": (os.environ.get("PATH") or "/usr/local/bin:/usr/bin:/bin") + ":/usr/sbin:/sbin"}


def plugins_folder(engine: "Engine") -> str:
    """Where the plugins are."""
    home = ("opt/cni/bin", ".local/libexec/cni", ".local/lib/cni") if engine.containerd.rootless_pid() else ()
    folders = [*(os.path.join(os.path.expanduser("~"), each) for each in home), *CNI_FOLDERS]
    return os.environ.get("CNI_PATH") or nerdctl_settings().get("cni_path") or next(
        (each for each in folders if os.path.isdir(engine.containerd.root() + each)), CNI_FOLDERS[0])


def port_mappings(engine: "Engine", container: Container) -> List[Dict[str, Any]]:
    """The published ports as plugins know them. Those of a user's own containerd are RootlessKit's; within its
    namespaces there is none of the host's addresses."""
    return [{"hostPort": each["PublicPort"], "containerPort": each["PrivatePort"], "protocol": each["Type"],
             "hostIP": "" if engine.containerd.rootless_pid() else each["IP"]} for each in container.asked_ports]


def run_plugin(engine: "Engine", config: Dict[str, Any], environment: Dict[str, str]) -> Dict[str, Any]:
    """The result of one plugin; 403 for an address that is taken, 500 with its own words where it fails otherwise."""
    kind, command = config.get("type") or "", environment["CNI_COMMAND"]
    path = os.path.join(environment["CNI_PATH"], kind)
    if "/" in kind or not os.path.isfile(engine.containerd.root() + path):
        raise ApiError(f'failed to find plugin "{kind}" in path [{environment["CNI_PATH"]}]')
    output = engine.nerdctl.program(*plugins_argv(engine), path).output(data=json_bytes(config),
                                                                        environment=environment)
    told = json_of(dict, output.stdout)
    if output.status:
        words = ": ".join(filter(None, map(told.get, ("msg", "details")))) or output.stderr.strip()[-500:]
        raise nerdctl_error(f'plugin type="{kind}" failed ({command.lower()}): {words}')
    return told


def run_plugins(engine: "Engine", container: Container, network: str, made: Interface, command: str, pid: int,
                dropped: Tuple[str, ...] = ()) -> Tuple[Dict[str, Any], Optional[ApiError]]:
    """Let the plugins of a network ADD an interface to the network namespace of a process as far as none fails, without
    routes to what is `dropped`, or DEL it, in the other order and as far as they can; with pid 0 the namespace is gone.
    The result and the first error."""
    known = engine.inventory.network_files().get(network)
    if known is None:
        raise NotFound(f"network {network} not found")
    found, result, failed = known[0], made.result, None
    version = found.get("cniVersion") or "1.0.0"
    environment = {
        "CNI_COMMAND": command, "CNI_CONTAINERID": f"{engine.nerdctl.namespace}-{container.id}",
        "CNI_NETNS": f"/proc/{pid}/ns/net" if pid else "", "CNI_IFNAME": made.name, "CNI_ARGS": made.arguments,
        "CNI_PATH": plugins_folder(engine), **system_path()}
    given = {"portMappings": port_mappings(engine, container), "ips": made.addresses}
    lock = os.path.join(cni_folder(), ".cni-concurrency.lock")
    with contextlib.suppress(OSError), open(lock, "a", encoding="ascii"):
        pass
    # nerdctl's hooks hold it as well: plugins get into each other's way.
    with locked(lock if os.path.exists(lock) else cni_folder(), 60.0):
        for plugin in found["plugins"] if command == "ADD" else reversed(found["plugins"]):
            able = plugin.get("capabilities") or {}
            # What nerdctl noted has the newest version, which plugins of the network's own do not read.
            more = {"runtimeConfig": {key: value for key, value in given.items() if value and able.get(key)},
                    "prevResult": {**result, "cniVersion": version} if result else None}
            config = {**plugin, "name": found["name"], "cniVersion": version,
                      **{key: value for key, value in more.items() if value}}
            if dropped and (plugin.get("ipam") or {}).get("routes"):
                routes = [each for each in plugin["ipam"]["routes"] if each.get("dst") not in dropped]
                config["ipam"] = {**plugin["ipam"], "routes": routes}
            try:
                told = run_plugin(engine, config, environment)
                result = told or result if command == "ADD" else result
            except ApiError as error:
                failed = failed or error
                if command == "ADD":
                    break
    return result, failed


def attach_network(engine: "Engine", container: Container, network: str, asked: Dict[str, Any],
                   pid: int) -> Dict[str, str]:
    """Give a container whose process is `pid` an interface in a network, with these EndpointSettings; the label that
    has to be kept of it. Nothing is left where a plugin fails."""
    addresses = asked.get("IPAMConfig") or {}
    with open(f"/proc/{pid}/net/dev", encoding="ascii", errors="replace") as file:
        taken = {line.partition(":")[0].strip() for line in file} | {
            each.name for each in attached_networks(container).values() if each.pid == pid}
    arguments = {"IgnoreUnknown": "1", "NERDCTL_CNI_DHCP_HOSTNAME": container.labels.get("nerdctl/hostname"),
                 "IP": addresses.get("IPv4Address"), "MAC": asked.get("MacAddress")}
    made = Interface(next(name for name in map("eth{}".format, itertools.count()) if name not in taken), pid,
                     ";".join(f"{key}={value}" for key, value in arguments.items() if value),
                     [addresses["IPv6Address"]] if addresses.get("IPv6Address") else [])
    # The way out stays that of the networks it has, unless this one comes before them.
    others = (asked_endpoint(container, each).get("GwPriority") or 0 for each in network_names(container))
    stays = has_way_out(pid) and (asked.get("GwPriority") or 0) <= max(others, default=0)
    # A daemon that is killed meanwhile leaves what the next one can detach.
    engine.containerd.update_container(container.id, interface_label(network, made))
    try:
        result, failed = run_plugins(engine, container, network, made, "ADD", pid,
                                     ("0.0.0.0/0", "::/0") if stays else ())
        made = made._replace(result=result)
        if failed:
            raise failed
        renote(container, network, made.result)
    except BaseException:
        with contextlib.suppress(ApiError, OSError):
            run_plugins(engine, container, network, made, "DEL", pid)
        with contextlib.suppress(ApiError):
            engine.containerd.update_container(container.id, {LABEL_ATTACHED + network: ""})
        raise
    return interface_label(network, made)


def stop_masquerading(engine: "Engine", container: Container, network: str, kept: Iterable[str] = ()) -> None:
    """Remove the rules by which a container went out of a network, but for those of the addresses that are `kept`. The
    bridge plugin leaves them where the network namespace is gone, and marks them by a comment."""
    comment = f'name: "{cni_name(network)}" id: "{engine.nerdctl.namespace}-{container.id}"'
    for name in ("iptables", "ip6tables"):
        tool = engine.nerdctl.program(*plugins_argv(engine), name, "-w", "-t", "nat")
        run = functools.partial(tool.run, environment=system_path())
        with contextlib.suppress(ApiError, ValueError):
            rules = [shlex.split(line)[1:] for line in run("-S", "POSTROUTING").stdout.decode().splitlines()]
            rules = [each for each in rules if comment in each]
            over = [each for each in rules if not {word.partition("/")[0] for word in each}.intersection(kept)]
            chains = {each[-1] for each in over} - {each[-1] for each in rules if each not in over}
            for words in [["-D", *each] for each in over] + [[flag, chain] for chain in chains
                                                             for flag in ("-F", "-X")]:
                run(*words)


def detach_network(engine: "Engine", container: Container, network: str) -> Dict[str, str]:
    """Take a running container's interface in a network away, whoever made it; the label that is no longer needed."""
    pid, result = container.task.pid if container.task else 0, noted_results(container).get(network) or {}
    made = attached_networks(container).get(network)
    if made is None or made.pid != pid:
        inside = next((each.get("name") for each in result.get("interfaces") or [] if each.get("sandbox")), "")
        made = Interface(inside or f"eth{network_names(container).index(network)}", pid)
    # nerdctl 1.7 leaves the rule of an earlier run, with which the plugin could not remove its chain.
    addresses = parse_result(result or made.result)
    stop_masquerading(engine, container, network, [addresses[key] for key in ("ip", "ip6") if key in addresses])
    _, failed = run_plugins(engine, container, network, made._replace(result=result or made.result), "DEL", pid)
    if failed:
        raise failed
    # What nerdctl's hook would read at the end of the container: the address may be another one's by then.
    kept = f"{cni_name(network)}-{engine.nerdctl.namespace}-{container.id}-{made.name}"
    with contextlib.suppress(OSError):
        os.unlink(engine.containerd.root() + os.path.join("/var/lib/cni/results", kept))
    renote(container, network, None)
    restore_route(engine, container, pid, network)
    return {LABEL_ATTACHED + network: ""}


def has_way_out(pid: int) -> bool:
    """Whether the network namespace of a process has a default route, or cannot be seen."""
    routes = read_file(f"/proc/{pid}/net/route").splitlines()
    return not routes or any(line.split()[1:2] == ["00000000"] for line in routes)


def restore_route(engine: "Engine", container: Container, pid: int, left: str) -> None:
    """Let a container that lost its default route with a network have that of the next one, where there is a tool to
    set it."""
    networks = engine.inventory.networks()
    for name, result in noted_results(container).items():
        gateways = [each["gateway"] for each in result.get("ips") or [] if "." in (each.get("gateway") or "")]
        if name != left and gateways and not networks.get(name, {"Internal": True})["Internal"]:
            if not has_way_out(pid):
                with contextlib.suppress(ApiError):
                    engine.nerdctl.program(*plugins_argv(engine), "nsenter", "-n", "-t", str(pid), "--", "ip").run(
                        "route", "replace", "default", "via", gateways[0], environment=system_path())
            return


def attach_networks(engine: "Engine", container: Container, pid: int) -> None:
    """Attach a container whose process `pid` has been made, and best not started yet, to those of its networks to which
    neither nerdctl's hook has nor the daemon."""
    told, labels = json_of(list, (container.spec.get("annotations") or {}).get("nerdctl/networks")), {}
    there = [*map(network_name, told),
             *(name for name, each in attached_networks(container).items() if each.pid == pid)]
    for network in network_names(container):
        if there and network not in there:
            labels.update(attach_network(engine, container, network, asked_endpoint(container, network), pid))
    if labels:
        engine.update(container, labels)


def release_networks(engine: "Engine", container: Container) -> None:
    """Give back what a container has of networks that the daemon attached it to: addresses and rules of the firewall.
    To be called after its end, and before its task is taken away: by nerdctl's hook an address becomes free for others,
    whose rules are the same. What fails is logged."""
    made, pid = attached_networks(container), container.task.pid if container.running and container.task else 0
    for network, each in made.items():
        # Started again meanwhile, it may have the same interface from nerdctl's hook, which gave the old one back.
        if not pid or pid == each.pid or each.name not in [f"eth{number}" for number, name in enumerate(
                network_names(container)) if name == network]:
            try:
                _, failed = run_plugins(engine, container, network, each, "DEL", pid if pid == each.pid else 0)
            except (ApiError, OSError) as error:
                failed = error
            if pid != each.pid:
                stop_masquerading(engine, container, network)
            if failed:
                log(f"network {network} of container {container.id}: {failed}")
        if not pid or pid == each.pid:
            with contextlib.suppress(OSError):
                renote(container, network, None)
    if made:
        with contextlib.suppress(NotFound):
            engine.update(container, {LABEL_ATTACHED + network: "" for network in made})


###############################################################################
# Engine
###############################################################################


def note_last(table: Dict[str, Any], key: str, value: Any, most: int = 4096) -> None:
    """Note a value as the last one in a table, of which that goes which was noted before all others."""
    table.pop(key, None)
    table[key] = value
    if len(table) > most:
        table.pop(next(iter(table)))


class Tasks:
    """What events tell of the starts and ends of containers, in the order of a count, for those who wait for them."""

    # How long the event of what nerdctl has done may take, and the end of what was killed; in seconds.
    LATE, DYING = 2.0, 5.0

    def __init__(self, feed: EventFeed, inventory: Inventory):
        self.feed, self.inventory = feed, inventory
        self.condition = threading.Condition()
        self.count = 1
        self.starts: Dict[str, int] = {}
        self.ends: Dict[str, Tuple[int, int]] = {}
        # Containers that are to be removed at their end and whose failed start left them: nobody is to wait for their
        # removal.
        self.spared: Dict[str, int] = {}
        # The count when something may have happened that no event told of.
        self.missed = 0

    def wake(self) -> None:
        """Let everyone look again."""
        with self.condition:
            self.count += 1
            self.condition.notify_all()

    def note(self, event: Optional[ContainerdEvent]) -> None:
        """Note an event of the feed."""
        with self.condition:
            self.count += 1
            if event is None:
                self.missed = self.count
            elif event.topic == "/tasks/start":
                note_last(self.starts, event.container, self.count)
            elif event.ends_container:
                note_last(self.ends, event.container, (self.count, event.payload.get("exit_status") or 0))
            self.condition.notify_all()

    def failed(self, real: str, status: int, spared: bool = False) -> None:
        """A container could not be started, or its end was not told: for those who wait, it ended with this status. One
        that is `spared` stays although it was to be removed at its end: for them, it was removed."""
        with self.condition:
            self.count += 1
            note_last(self.ends, real, (self.count, status))
            if spared:
                note_last(self.spared, real, self.count)
            self.condition.notify_all()

    def started_since(self, real: str, count: int, wait: float = 0.0) -> bool:
        """Whether a container was started after the count stood so, or is within `wait` seconds."""
        with self.condition:
            return bool(self.condition.wait_for(lambda: self.starts.get(real, 0) > count, wait))

    def ended_since(self, identity: str, count: int, wait: float = 0.0) -> bool:
        """Whether a container has ended after the count stood so, or does within `wait` seconds."""
        until = time.monotonic() + wait
        with self.condition:
            while self.ends.get(identity, (0, 0))[0] <= count:
                # Without the feed somebody has to look.
                pause = until - time.monotonic() if self.feed.live else min(0.2, until - time.monotonic())
                if pause <= 0:
                    return False
                if not self.condition.wait(pause) and not self.feed.live:
                    self.inventory.records.invalidate(identity)
                    now = self.inventory.containers().get(identity)
                    if now is None or not now.running:
                        return True
            return True

    def wait(self, container: Container, condition: str, since: int, gone: Callable[[], bool]) -> Optional[int]:
        """Wait as `POST /containers/{id}/wait` says; the exit status, None when there is nobody to be told."""
        began, failures = time.time_ns(), 0
        while not gone():
            seen = self.count
            try:
                status = self._status(container, condition, since, began)
                failures = 0
            except ApiError:
                # Too late for another answer than the status: a containerd that is being restarted is asked again.
                failures += 1
                if failures > 50:
                    raise
                time.sleep(0.1)
                continue
            if status is not None:
                return status
            with self.condition:
                if self.count == seen:
                    # Without the feed somebody has to look.
                    self.condition.wait(30.0 if self.feed.live else 0.2)
        return None

    def _last_end(self, container: Container, condition: str, since: int) -> Optional[Tuple[int, int]]:
        """The end that events have told of and that meets the condition: its place in the count and the exit status."""
        last = self.ends.get(container.id)
        if last and last[0] <= since:
            # It has ended already, and was not started again.
            again = condition != "not-running" or "containerd.io/restart.policy" in container.labels
            last = None if again or last[0] <= max(self.missed, self.starts.get(container.id, 0)) else last
        return last

    def _status(self, container: Container, condition: str, since: int, began: int) -> Optional[int]:
        """The exit status if the condition is met."""
        last = self._last_end(container, condition, since)
        if last and (condition != "removed" or last[0] == self.spared.get(container.id)):
            return last[1]
        now = self.inventory.containers().get(container.id)
        if now is None:
            last = self._last_end(container, condition, since)
            return last[1] if last else 0
        state = now.state
        if condition == "removed" or state.running or state.kind == "restarting":
            return None
        if condition == "not-running" or (state.finished_at or 0) > began:
            return state.exit_code or 0
        return None


class ContainerOwner:
    """What the daemon has of one container: the lock that whoever changes it holds, the streams of its process, if they
    are FIFOs of ours, and the clients that wait for its start. `removing` is set while it is being removed,
    `restarting` counts those who restart it, `unstarted` is the process of the last task that could not be started."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.removing = False
        self.restarting = self.unstarted = 0
        self.streams: Any = None
        self.waiting: List[Any] = []


class Engine:
    """What handlers share: nerdctl, containerd, the events, and what there is."""

    # How long a change of a container waits for those before it, in seconds: each of them has its own limit.
    PATIENCE = 2 * SHORT_CALL

    def __init__(self, nerdctl: Nerdctl, containerd: Containerd):
        self.nerdctl, self.containerd = nerdctl, containerd
        self.feed = EventFeed(containerd, self.handle)
        self.journal = Journal()
        self.inventory = Inventory(nerdctl, containerd, self.feed)
        self.started = time.time()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.tasks = Tasks(self.feed, self.inventory)
        # By the ids of containers, and of execs.
        self.owners: Dict[str, ContainerOwner] = {}
        self.execs: Dict[str, Any] = {}
        # What ends a build that runs, with the id that its client has given to it.
        self.builds: List[Tuple[str, Callable[[], Any]]] = []
        # How many requests need a place that is mounted for containers.
        self.held: collections.Counter = collections.Counter()
        # Ports of containers that are being started, by their ids.
        self.claimed: Dict[str, List[Dict[str, Any]]] = {}
        # Ports of the host that were given to containers lately: what was just created may not be listed yet.
        self.picked: collections.deque = collections.deque(maxlen=256)
        self.supervisor: Any = None
        # What does not work on this machine, a sentence each.
        self.troubles: Callable[[], List[str]] = list
        self.hosts = Hosts(self)
        # Changes of our own to images that are under way: which event each makes of which names.
        self.quiet: Dict[object, Tuple[str, List[str]]] = {}
        # The attributes of containers in events, as last seen, also of those that were removed.
        self.actors: Dict[str, Dict[str, str]] = {}
        self.begun: Dict[str, int] = {}
        # What follows an event and may take its time, one after the other.
        self.later: queue.Queue = queue.Queue()
        threading.Thread(target=self._do_later, name="later", daemon=True).start()

    def handle(self, event: Optional[ContainerdEvent]) -> None:
        """An event of containerd, or None where some may have been missed. Always in this order: what is known is given
        up, auto-removal, health checks and Docker's events are put in line, and who waits looks again."""
        # The event of a name that is gone does not say what the name stood for.
        known = self.inventory.images.names.values.get(event.payload.get("name") or "") if event else None
        self.inventory.note(event)
        owner = self.owners.get(event.container) if event is not None and event.ends_container else None
        if owner and 0 != event.payload.get("pid") == owner.unstarted:
            # Nobody was told of a start.
            return
        self.later.put(functools.partial(self._follow_up, event, known.target.digest if known else ""))
        self.tasks.note(event)
        streams = owner.streams if owner else None
        if streams:
            streams.exited()

    def _do_later(self) -> None:
        while True:
            task = self.later.get()
            if task is None:
                return
            try:
                task()
            except ApiError as error:
                log(str(error))
            except Exception:
                log(traceback.format_exc())

    def settle(self, timeout: float = 2.0) -> None:
        """Wait until everything that has happened by now was told as Docker's events."""
        self.feed.settle()
        done = threading.Event()
        self.later.put(done.set)
        done.wait(timeout)

    def _follow_up(self, event: Optional[ContainerdEvent], image: str) -> None:
        if self.supervisor:
            self.supervisor.on_event(event)
        self.hosts.on_event(event)
        if event is None:
            return
        if event.topic.startswith("/images/"):
            self._image_event(event, image)
        elif event.container:
            self._container_event(event)

    def owner(self, identity: str) -> ContainerOwner:
        """What the daemon has of a container."""
        with self.lock:
            return self.owners.setdefault(identity, ContainerOwner())

    def busy(self) -> bool:
        """Whether something depends on the daemon although no request is running."""
        return (any(each.streams for each in list(self.owners.values()))
                or any(each.running for each in list(self.execs.values()))
                or bool(self.supervisor and self.supervisor.cared))

    def leave_streams(self, identity: str, streams: Any) -> None:
        """The streams of a container's process have ended; those of a later one stay."""
        with self.lock:
            owner = self.owners.get(identity)
            if owner and owner.streams is streams:
                owner.streams = None

    def hang_up(self) -> None:
        """The daemon is about to end: those who only follow something are let go."""
        self.closing.set()
        self.journal.close()
        self.tasks.wake()
        for owner in list(self.owners.values()):
            if owner.streams:
                # It is not the client whose input ends here.
                owner.streams.once = False
            for each in [*owner.waiting, *(owner.streams.attachments if owner.streams else [])]:
                each.leave()

    def close(self) -> None:
        """End everything that was started and remove every temporary file."""
        self.hang_up()
        self.feed.close()
        self.later.put(None)
        self.nerdctl.end_all()
        sweep_temporary(own=True)

    @contextlib.contextmanager
    def changing_images(self, names: List[str], action: str = "tag") -> Iterator[Callable[[], None]]:
        """Context of our own change to images: what containerd says of this `action` on these names is told by the
        handler in Docker's words. An image that loses its last name to another one stays as one without a name, as with
        dockerd. When names were added as they became known, what it yields is called before they are changed."""
        change, kept = object(), {}
        self.quiet[change] = action, names
        if action == "tag":
            kept = self.keep_images(names)
        try:
            yield lambda: kept.update(self.keep_images([name for name in names if name not in kept]))
        finally:
            self.drop_images(kept)
            # The events of the change itself come a little later: whoever reads after it sees it all the same.
            for name in names:
                self.inventory.images.invalidate(name)
            timer = threading.Timer(0.3, self.quiet.pop, (change, None))
            timer.daemon = True
            timer.start()

    def keep_images(self, names: Iterable[str]) -> Dict[str, ImageRecord]:
        """Give images that have no name but these another one, that of none, before somebody else gets theirs."""
        records = self.inventory.images.records()
        targets = collections.Counter(each.target.digest for each in records.values())
        kept = {name: records[name]._replace(name=f"{DANGLING}@{records[name].target.digest}") for name in names
                if name in records and targets[records[name].target.digest] == 1}
        for image in kept.values():
            with contextlib.suppress(ApiError):
                self.containerd.create_image(image)
        return kept

    def drop_images(self, kept: Dict[str, ImageRecord]) -> None:
        """Take the names of none away again where the images still have their own."""
        for name, image in kept.items():
            with contextlib.suppress(ApiError):
                if self.containerd.get_image(name).target.digest == image.target.digest:
                    self.containerd.delete_image(image.name, sync=False)

    @contextlib.contextmanager
    def owning(self, name: str, gone: Optional[ApiError] = None) -> Iterator[Container]:
        """Context in which nobody else changes a container, which is looked up anew when its turn has come; whoever
        reads after it sees what was changed. 404 when there is none. `gone` is raised at once while the one before
        removes it, and when it has done so; without it that is a 404, too. 503 when the turn does not come. Whoever
        waits for a client, or for a container to end, does so outside, since others may want to kill it."""
        identity = self.inventory.container(name).id
        owner = self.owner(identity)
        if gone and owner.removing:
            raise gone
        if not owner.lock.acquire(timeout=self.PATIENCE):
            raise Unavailable(f"container {identity} is being changed, which does not come to an end")
        try:
            try:
                container = self.inventory.container(identity)
            except NotFound:
                raise gone or NotFound(f"No such container: {name.lstrip('/')}") from None
            yield container
        finally:
            self.inventory.records.invalidate(identity)
            owner.removing = False
            owner.lock.release()

    @contextlib.contextmanager
    def changing(self, container: Container) -> Iterator[None]:
        """Context of our own change to a container: whoever reads after it sees it."""
        try:
            yield
        finally:
            self.inventory.records.invalidate(container.id)

    def update(self, container: Container, labels: Dict[str, str], spec: Optional[Dict[str, Any]] = None) -> None:
        """Set labels of a container, of which "" takes one away, and its OCI spec, if there is another: whoever reads
        after it sees it."""
        with self.changing(container):
            self.containerd.update_container(container.id, labels, None if spec is None else json_bytes(spec))

    def add_waiting(self, identity: str, attachment: Any) -> None:
        """A client waits for the start of a container."""
        with self.lock:
            self.owners.setdefault(identity, ContainerOwner()).waiting.append(attachment)

    def leave_waiting(self, identity: str, attachment: Any) -> None:
        """It waits no more."""
        owner = self.owner(identity)
        with self.lock:
            owner.waiting = [each for each in owner.waiting if each is not attachment]

    def take_waiting(self, identity: str) -> List[Any]:
        """Those who wait for the start of a container and are still there, for the one who starts it."""
        owner = self.owner(identity)
        with self.lock:
            waiting, owner.waiting = owner.waiting, []
        return [each for each in waiting if not each.gone]

    @contextlib.contextmanager
    def restarting(self, container: Container) -> Iterator[None]:
        """Context of a restart, in which the end of a container is not the end of it."""
        owner = self.owner(container.id)
        with self.lock:
            owner.restarting += 1
        try:
            yield
        finally:
            with self.lock:
                owner.restarting -= 1

    def forget(self, container: Container) -> None:
        """A container was removed."""
        with self.lock:
            for identity in [each.id for each in self.execs.values() if each.container.id == container.id]:
                self.execs.pop(identity, None)

    def actor(self, container: Container) -> Dict[str, str]:
        """The attributes of a container in an event: its labels, image and name."""
        return {**container.visible_labels, "image": container.asked_image, "name": container.name}

    def tell_image(self, action: str, group: ImageGroup, name: str) -> None:
        """Tell of an image what is not told by an event of containerd's."""
        self.journal.emit("image", action, group.id, {**group.labels, "name": name})

    def tell(self, container: Container, action: str, **more: str) -> None:
        """Tell an event of a container, after those that have happened before."""
        self.later.put(functools.partial(self.journal.emit, "container", action, container.id,
                                         {**self.actor(container), **more}, time.time_ns()))

    def _image_event(self, event: ContainerdEvent, identity: str) -> None:
        action = {"/images/create": "tag", "/images/delete": "untag"}.get(event.topic)
        name = event.payload.get("name") or ""
        # Whether a change of our own makes this event; nerdctl's imports also set `name@digest`.
        own = any(action == made and (name in names or name.partition("@")[0] in names)
                  for made, names in list(self.quiet.values()))
        if action is None or own or is_nameless(name):
            return
        if action == "tag":
            with contextlib.suppress(ApiError):
                identity = self.containerd.get_image(name).target.digest
        self.journal.emit("image", action, identity or familiar(name), {"name": familiar(name)}, event.time)

    def _container_event(self, event: ContainerdEvent) -> None:
        action = {
            "/containers/create": "create", "/tasks/start": "start", "/tasks/exit": "die", "/tasks/paused": "pause",
            "/tasks/resumed": "unpause", "/tasks/oom": "oom", "/containers/delete": "destroy",
        }.get(event.topic)
        if action is None or (action == "die" and not event.ends_container):
            return
        identity, attributes = event.container, self._actor_of(event.container, gone=action == "destroy")
        if action == "start":
            self.begun[identity] = event.time
            self._tell_parts(event, "mount", "connect")
        elif action == "die":
            began = self.begun.pop(identity, event.time)
            attributes = {**attributes, "exitCode": str(event.payload.get("exit_status") or 0),
                          "execDuration": str(max(0, event.time - began) // 10**9)}
        elif action == "destroy":
            self.owners.pop(identity, None)
        self.journal.emit("container", action, identity, attributes, event.time)
        if action == "die":
            self._tell_parts(event, "unmount", "disconnect")

    def _tell_parts(self, event: ContainerdEvent, volume: str, network: str) -> None:
        """Tell the events of a container's volumes and networks that come with its start or its end."""
        with contextlib.suppress(ApiError):
            container = self.inventory.containers().get(event.container)
            for name in network_names(container) if container else ():
                if ":" not in name:
                    found = self.inventory.networks().get(name) or {"Name": name}
                    self.tell_network(container, found, network, event.time)
            for each in container.mounts if container else ():
                if each["Type"] == "volume":
                    told = {"container": container.id, "driver": each["Driver"]}
                    if volume == "mount":
                        told.update({"destination": each["Destination"], "propagation": each["Propagation"],
                                     "read/write": json.dumps(each["RW"])})
                    self.journal.emit("volume", volume, each.get("Name") or "", told, event.time)

    def tell_network(self, container: Container, network: Dict[str, Any], action: str,
                     when: Optional[int] = None) -> None:
        """Tell an event of a network that has to do with a container."""
        self.journal.emit("network", action, network.get("Id") or "", {
            "container": container.id, "name": network["Name"], "type": network.get("Driver") or ""}, when)

    def _actor_of(self, identity: str, gone: bool) -> Dict[str, str]:
        """The attributes of a container that an event names, as they were last known where it is gone."""
        if not gone:
            with contextlib.suppress(ApiError):
                container = self.inventory.containers().get(identity)
                if container:
                    note_last(self.actors, identity, self.actor(container), 4 * Journal.KEPT)
        return self.actors.get(identity, {})


###############################################################################
# System
###############################################################################

NO_SWARM = ('This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to '
            "swarm and try again.")


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


def docker_version(told: Dict[str, Any], problem: str) -> Dict[str, Any]:
    """Docker's version from nerdctl's; `problem` says why nothing was told."""
    machine = os.uname()
    architecture = GO_ARCHITECTURES.get(machine.machine, machine.machine)
    client, server = told.get("Client") or {}, told.get("Server") or {}
    engine = {
        "ApiVersion": "%d.%d" % API_NEWEST, "MinAPIVersion": "%d.%d" % API_OLDEST, "Os": "linux", "Arch": architecture,
        "KernelVersion": machine.release, "GitCommit": "", "GoVersion": client.get("GoVersion") or "", "BuildTime": "",
    }
    components = [{"Name": "Engine", "Version": ENGINE_VERSION, "Details": {**engine, "Experimental": "false"}},
                  {"Name": "nerdctld", "Version": VERSION, "Details": {"GitCommit": ""}}]
    own = {"Name": "nerdctl", "Version": client.get("Version"), "Details": {"GitCommit": client.get("GitCommit") or ""}}
    for each in ([own] if client.get("Version") else []) + (server.get("Components") or []) + (
            client.get("Components") or []):
        components.append({
            "Name": each.get("Name") or "", "Version": each.get("Version") or "",
            "Details": {"GitCommit": "", **(each.get("Details") or {})},
        })
    # What a client shows as the kind of the server: `nerdctld 0.1.0, nerdctl v2.3.5, containerd v2.3.1`. Without a
    # nerdctl its version is a sentence that says so.
    shown = [each for name in ("nerdctld", "nerdctl", "containerd") for each in components if each["Name"] == name]
    platform = ", ".join(("" if " " in each["Version"] else each["Name"] + " ") + each["Version"] for each in shown)
    return {"Platform": {"Name": platform + (f" ({problem})" if problem else "")}, "Components": components,
            "Version": ENGINE_VERSION, **engine}


@route("GET", "/version")
def system_version(engine: Engine, request: Request) -> Response:
    """The version of Docker with the same API, and those of this daemon and of nerdctl, containerd, runc and buildctl,
    as far as they are there."""
    told, problem = {}, ""
    try:
        told = engine.inventory.tools()
    except ApiError as error:
        problem = str(error)
    return Response(200, docker_version(told, problem))


def docker_info(told: Dict[str, Any], nerdctl_version: str) -> Dict[str, Any]:
    """Docker's info from nerdctl's, without what is counted or of this process."""
    info = {
        "Driver": "overlayfs", "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
        "Plugins": {}, "MemoryLimit": False, "SwapLimit": False, "CpuCfsPeriod": False, "CpuCfsQuota": False,
        "CPUShares": False, "CPUSet": False, "PidsLimit": False, "IPv4Forwarding": False, "OomKillDisable": False,
        "LoggingDriver": "json-file", "CgroupDriver": "", "CgroupVersion": "", "KernelVersion": os.uname().release,
        "OperatingSystem": "", "OSVersion": "", "OSType": "linux", "Architecture": os.uname().machine,
        "NCPU": os.cpu_count() or 1, "MemTotal": 0, "Name": os.uname().nodename, "ID": "", "SecurityOptions": [],
        "Warnings": [],
    }
    info.update({key: value for key, value in told.items() if value is not None})
    logs = (info["Plugins"] or {}).get("Log") or []
    info["Plugins"] = {"Volume": ["local"], "Network": ["bridge", "host", "ipvlan", "macvlan", "null"],
                       "Authorization": None, "Log": logs}
    for extra in ("BridgeNfIptables", "BridgeNfIp6tables", "CPURealtime"):
        info.pop(extra, None)
    found = re.search(r'^VERSION_ID="?([^"\n]*)', read_file("/etc/os-release"), re.M)
    info["OSVersion"] = found.group(1) if found else ""
    runtime = {"path": "runc"}
    info.update({
        "GenericResources": None, "ExperimentalBuild": False, "IndexServerAddress": "https://index.docker.io/v1/",
        "RegistryConfig": {
            "InsecureRegistryCIDRs": ["127.0.0.0/8", "::1/128"],
            "IndexConfigs": {"docker.io": {"Name": "docker.io", "Mirrors": [], "Secure": True, "Official": True}},
            "Mirrors": [],
        },
        "ServerVersion": ENGINE_VERSION, "Runtimes": {"io.containerd.runc.v2": runtime, "runc": runtime},
        "DefaultRuntime": "runc",
        "Swarm": {"NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive", "ControlAvailable": False, "Error": "",
                  "RemoteManagers": None},
        "LiveRestoreEnabled": True, "Isolation": "", "InitBinary": "tini",
        "ContainerdCommit": {"ID": told.get("ServerVersion") or ""},
        "RuncCommit": {"ID": ""}, "InitCommit": {"ID": ""}, "CDISpecDirs": [], "ProductLicense": "",
        "Containerd": {"Address": "", "Namespaces": {"Containers": "default", "Plugins": "default"}},
    })
    info["Labels"] = [f"nerdctld={VERSION}", *([f"nerdctl={nerdctl_version}"] if nerdctl_version else [])]
    return info


def info_of_version(info: Dict[str, Any], version: Tuple[int, int]) -> Dict[str, Any]:
    """The info with the fields that dockerd sends clients of an API version."""
    if version < (1, 25):
        options = [re.sub(r"^name=([^,]*).*", r"\1", each) for each in info["SecurityOptions"] or []]
        info.update({"ExecutionDriver": "<not supported>", "SecurityOptions": options})
    if version < (1, 46):
        del info["Containerd"]
    if version < (1, 47):
        info["RegistryConfig"].update({"AllowNondistributableArtifactsCIDRs": None,
                                       "AllowNondistributableArtifactsHostnames": None})
    for key in ("ContainerdCommit", "RuncCommit", "InitCommit") if version < (1, 49) else ():
        info[key]["Expected"] = info[key]["ID"]
    if version < (1, 50):
        info.update({"BridgeNfIptables": False, "BridgeNfIp6tables": False})
    return info


@route("GET", "/info")
def system_info(engine: Engine, request: Request) -> Response:
    """The state of the engine as nerdctl tells it, with the numbers of containers and images; 503 without
    containerd."""
    # 503 where there is no containerd, whatever was known of the machine.
    version, _ = engine.containerd.version()
    machine, tools = engine.inventory.machine(), engine.inventory.tools()
    info = docker_info({**machine, "ServerVersion": version, "ID": engine.containerd.uuid()},
                       (tools.get("Client") or {}).get("Version") or "")
    states = [each.state.kind for each in engine.inventory.containers().values()]
    running, paused = states.count("running") + states.count("restarting"), states.count("paused")
    info.update({"Containers": len(states), "ContainersRunning": running, "ContainersPaused": paused,
                 "ContainersStopped": len(states) - running - paused})
    server = tools.get("Server") or {}
    for each in server.get("Components") or []:
        if each.get("Name") == "runc":
            info["RuncCommit"] = {"ID": each.get("Version") or ""}
    info.update({
        "Images": len(engine.inventory.images.get()), "SystemTime": rfc3339(time.time_ns()),
        "Debug": engine.nerdctl.debug, "NFd": len(os.listdir("/proc/self/fd")),
        "NGoroutines": threading.active_count(), "NEventsListener": len(engine.journal.queues),
        "DockerRootDir": data_root(), "HttpProxy": os.environ.get("HTTP_PROXY", ""),
        "HttpsProxy": os.environ.get("HTTPS_PROXY", ""), "NoProxy": os.environ.get("NO_PROXY", ""),
    })
    known = list(info["Warnings"] or [])
    info["Warnings"] = known + [f"WARNING: {each}" for each in engine.troubles() if f"WARNING: {each}" not in known]
    info["Containerd"]["Address"] = engine.containerd.address
    info["Containerd"]["Namespaces"]["Containers"] = engine.nerdctl.namespace
    return Response(200, info_of_version(info, request.version))


INDEX_SERVER = "https://index.docker.io/v1/"
AUTH = {"username": str, "password": str, "auth": str, "serveraddress": str, "identitytoken": str, "registrytoken": str}


def decode_auth(request: Request) -> Dict[str, str]:
    """The credentials of a request's X-Registry-Auth; {} for none."""
    return header_json(request.headers.get("X-Registry-Auth") or "", AUTH)


def registry_auths(credentials: Dict[str, str], registry: str) -> Dict[str, Dict[str, str]]:
    """The `auths` of a Docker config for one registry; {} where there are no credentials."""
    entry: Dict[str, str] = {}
    if credentials.get("identitytoken"):
        entry = {"identitytoken": credentials["identitytoken"],
                 "auth": base64.b64encode(b"00000000-0000-0000-0000-000000000000:").decode()}
    elif credentials.get("username"):
        pair = f"{credentials['username']}:{credentials.get('password', '')}"
        entry = {"auth": base64.b64encode(pair.encode()).decode()}
    elif credentials.get("auth"):
        entry = {"auth": credentials["auth"]}
    is_hub = registry in ("docker.io", "index.docker.io", "registry-1.docker.io")
    return {INDEX_SERVER if is_hub else registry: entry} if entry else {}


def credentials_for(engine: Engine, request: Request, registry: str) -> ContextManager[Optional[Dict[str, str]]]:
    """Context with the environment for one nerdctl call with the credentials of the request's X-Registry-Auth, None
    without any. They are in a private folder while the call runs, and nowhere else."""
    auths = registry_auths(decode_auth(request), registry)
    return credentials_folder(auths) if auths else contextlib.nullcontext()


@route("POST", "/auth")
def system_auth(engine: Engine, request: Request) -> Response:
    """Check credentials against the registry: 200 when it takes them, 401 when it refuses, 500 when it does not
    answer."""
    body = request.json(AUTH)
    address = body.get("serveraddress") or INDEX_SERVER
    user, password = body.get("username") or "", body.get("password") or ""
    if not user:
        raise BadParameter("username is required")
    host = re.sub(r"^https?://", "", address).rstrip("/")
    host = "docker.io" if host.startswith("index.docker.io") else host.partition("/")[0]
    if not DOMAIN.fullmatch(host):
        raise BadParameter(f"invalid registry address {address!r}")
    with credentials_folder({}) as environment:
        try:
            engine.nerdctl.login(host, user, password, environment)
        except Unauthorized:
            raise Unauthorized(f"Get \"https://{host}/v2/\": unauthorized: incorrect username or password") from None
    return Response(200, {"Status": "Login Succeeded"})


EVENT_FILTERS = ("config", "container", "daemon", "event", "action", "image", "network", "node", "plugin", "scope",
                 "secret", "service", "type", "volume")


def match_event(event: Dict[str, Any], filters: Dict[str, List[str]]) -> bool:
    """Whether an event passes the filters of `/events`; those of one name are alternatives, but labels must all
    match. As with dockerd a filter that nobody knows, or without a value, lets everything pass."""
    kind, identity, attributes = event["Type"], event["Actor"]["ID"], event["Actor"]["Attributes"]
    names = (identity, attributes.get("name", ""))
    images = names if kind == "image" else (attributes.get("image", ""),)
    tests: Dict[str, Callable[[str], Any]] = {
        kind: lambda each: any(name.startswith(each) for name in names),
        "type": lambda each: each == kind, "scope": lambda each: each == event["scope"],
        "image": lambda each: any(re.fullmatch(re.escape(each) + r"(:[^:/]+)?", image) for image in images),
        # `exec_start` is also that of any command.
        **dict.fromkeys(("event", "action"), lambda each: (event["Action"] + ":").startswith(each + ":")),
    }
    return match_labels(attributes, filters.get("label") or []) and all(
        key in tests and any(map(tests[key], wanted)) for key, wanted in filters.items()
        if wanted and key in EVENT_FILTERS)


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


@route("GET", "/events")
def system_events(engine: Engine, request: Request) -> Response:
    """A stream of events: the kept ones where there is a `since` or an `until`, then new ones until `until` or until
    the client leaves. It breaks off when the client does not read it."""
    filters = request.filters()
    since, until = request.timestamp("since"), request.timestamp("until")
    if since is not None and until is not None and until < since:
        raise BadParameter("`since` time cannot be after `until` time")
    accepted = request.headers.get("Accept") or ""
    media_type = "application/json" if request.version < (1, 52) else next(
        (each for each in ("application/json-seq", "application/x-ndjson") if each in accepted), "application/jsonl")
    lead = b"\x1e" if media_type == "application/json-seq" else b""

    def chunks() -> Iterator[bytes]:
        engine.settle()
        with engine.journal.subscribe() as (kept, new), request.client.when_gone(lambda: new.put(None)):
            for event in kept if since is not None or until is not None else ():
                when = event["timeNano"]
                if when >= (since or 0) and (until is None or when <= until) and match_event(event, filters):
                    yield lead + json_bytes(docker_event(event, request.version)) + b"\n"
            if until is None or until > time.time_ns():
                # The head of the response says that nothing from now on is missed.
                engine.feed.wait_live(2.0)
            yield b""
            while True:
                try:
                    event = new.get(timeout=None if until is None else max(0.0, (until - time.time_ns()) / 1e9))
                except queue.Empty:
                    return
                if event is None:
                    return
                if isinstance(event, ApiError):
                    raise event
                if match_event(event, filters):
                    yield lead + json_bytes(docker_event(event, request.version)) + b"\n"

    return Response(200, Stream(chunks(), primed=True), media_type)


###############################################################################
# Images
###############################################################################


def docker_manifest_descriptor(content: ImageContent) -> Dict[str, Any]:
    """The descriptor of a manifest with its platform, as containers have it."""
    return {**content.descriptor, "platform": content.platform}


def container_content(group: ImageGroup, container: Container) -> ImageContent:
    """What a container was made of: that of its platform, else the one that runs here."""
    platform = container.labels.get("nerdctl/platform") or ""
    return next((each for each in group.contents if each.whole and platform_text(each.platform) == platform),
                group.content)


def docker_manifests(group: ImageGroup, users: List[Container]) -> List[Dict[str, Any]]:
    """The `Manifests` of an image, of every platform and with those that have attestations: whether it is here, its
    sizes, and the containers made of it."""
    found = []
    for each in group.contents:
        row = {"ID": each.descriptor["digest"], "Descriptor": each.descriptor, "Available": each.whole,
               "Kind": "image", "Size": {"Content": each.size, "Total": each.size + each.unpacked_size}}
        if each.attested:
            row.update({"Kind": "attestation", "AttestationData": {"For": each.attested}})
        elif platform_text(each.platform) == "unknown/unknown":
            row["Kind"] = "unknown"
        else:
            containers = [user.id for user in users if container_content(group, user) is each]
            row["ImageData"] = {"Platform": each.platform, "Containers": containers or None,
                                "Size": {"Unpacked": each.unpacked_size}}
        found.append(row)
    return found


def docker_image_row(group: ImageGroup, version: Tuple[int, int], containers: int = -1,
                     shared: int = -1) -> Dict[str, Any]:
    """An image as `/images/json` lists it; -1 for what was not asked for."""
    tags, digests = group.repo_tags, group.repo_digests
    if version < (1, 43) and not tags:
        tags, digests = ["<none>:<none>"], digests or ["<none>@<none>"]
    # As dockerd's containerd store counts: unpacked and compressed, of all its platforms.
    size = sum(each.unpacked_size + each.size for each in group.contents)
    row = {
        "Containers": containers, "Created": group.created, "Id": group.id, "Labels": group.labels,
        "ParentId": group.parent, "RepoDigests": digests, "RepoTags": tags, "SharedSize": shared, "Size": size,
    }
    if version < (1, 44):
        row["VirtualSize"] = row["Size"]
    if version >= (1, 48):
        row["Descriptor"] = group.target.json
    return row


# Of a glob: a class in brackets, a character behind a backslash, any other.
GLOB_ELEMENT = re.compile(r"\[(\^?)((?:\\.|[^\]\\])+)\]|\\(.)|([^\[\\])", re.S)


def glob_expression(glob: str) -> str:
    """The expression for a glob of Go's path.Match, whose `*` and `?` stop at slashes; 400 for what is none."""
    found, at = "", 0
    while at < len(glob):
        element = GLOB_ELEMENT.match(glob, at)
        if not element:
            raise BadParameter("syntax error in pattern")
        at = element.end()
        negated, members, escaped, plain = element.groups()
        if members:
            members = re.sub(r"\\(.)|([^-])", lambda each: re.escape(each[1] or each[2]), members, flags=re.S)
            found += f"[{negated}{members}]"
        else:
            found += {"*": "[^/]*", "?": "[^/]"}.get(plain) or re.escape(escaped or plain)
    return found


def reference_pattern(globs: List[str]) -> Optional[Pattern]:
    """The expression for the values of a `reference` filter, None for none; 400 for what is no glob, or could take too
    long."""
    try:
        return Pattern(rf"\A(?:{'|'.join(map(glob_expression, globs))})\z") if globs else None
    except PatternError:
        raise BadParameter("syntax error in pattern") from None


def match_reference(names: List[str], pattern: Pattern) -> List[str]:
    """Those of an image's names that fit a `reference` filter: as people write them or with the registry, with or
    without tag or digest."""
    found = []
    for name in names:
        forms = {name}
        with contextlib.suppress(BadParameter):
            full = parse_reference(name)
            forms.update((familiar(full.repository), full.name, full.repository))
        if any(map(pattern.found_in, forms)):
            found.append(name)
    return found


def filter_images(engine: Engine, groups: Iterable[ImageGroup], filters: Dict[str, List[str]]) -> List[ImageGroup]:
    """The images that pass the filters of list and prune."""
    dangling = flag_filter(filters, "dangling")
    before, since = ([engine.inventory.image(each).created for each in filters.get(key) or []]
                     for key in ("before", "since"))
    common, reference = prune_filter(filters), reference_pattern(filters.get("reference") or [])

    def passes(group: ImageGroup) -> bool:
        return (dangling in (None, not group.repo_tags) and common(group.labels, group.created * 10**9)
                and (not reference or bool(match_reference([*group.repo_tags, *group.repo_digests], reference)))
                and all(group.created < each for each in before) and all(group.created > each for each in since))

    return list(filter(passes, groups))


def image_parts(group: ImageGroup) -> Dict[Tuple[str, str], int]:
    """The bytes of each blob of an image that is here, and of each of its snapshots, of all its platforms."""
    found = {}
    for each in group.contents:
        found.update({("blob", digest): size for digest, size in each.blobs.items()})
        found.update(zip((("snapshot", key) for key in chain_ids(each.config)), each.layer_sizes))
    return found


def shared_sizes(groups: Iterable[ImageGroup]) -> Dict[str, int]:
    """Image id -> bytes of what it has in common with another one."""
    parts = {group.id: image_parts(group) for group in groups}
    uses = collections.Counter(itertools.chain.from_iterable(parts.values()))
    return {identity: sum(size for key, size in each.items() if uses[key] > 1) for identity, each in parts.items()}


def images_size(engine: Engine) -> int:
    """Bytes of all images, each blob and each snapshot once."""
    found = {}
    for group in engine.inventory.images.get().values():
        found.update(image_parts(group))
        found.update({("blob", group.id): group.target.size} if group.contents else {})
    return sum(found.values())


def image_users(engine: Engine) -> Dict[str, List[Container]]:
    """Image id -> the containers made of it."""
    named, found = engine.inventory.images.by_name(), {}
    for container in engine.inventory.containers().values():
        found.setdefault(image_id(container, named), []).append(container)
    return found


IMAGE_FILTERS = ("dangling", "label", "label!", "before", "since", "until", "reference")


@route("GET", "/images/json")
def image_list(engine: Engine, request: Request) -> Response:
    """Images, newest first. Filters before, since, until, dangling, label, reference; `shared-size`, `manifests`."""
    filters = request.filters(*IMAGE_FILTERS)
    manifests = request.flag("manifests") and request.version >= (1, 47)
    if request.flag("identity") and request.version >= (1, 54) and not manifests:
        raise BadParameter("conflicting options: identity requires manifests=1")
    if request.version < (1, 41) and request.value("filter"):
        filters["reference"] = [request.value("filter")]
    groups = filter_images(engine, engine.inventory.images.get().values(), filters)
    shared = shared_sizes(groups) if request.flag("shared-size") else {}
    users = image_users(engine) if manifests or request.version >= (1, 51) else {}
    reference = reference_pattern(filters.get("reference") or [])
    rows = []
    for group in groups:
        row = docker_image_row(group, request.version,
                               len(users.get(group.id, [])) if request.version >= (1, 51) else -1,
                               shared.get(group.id, -1))
        for key in ("RepoTags", "RepoDigests") if reference else ():
            row[key] = match_reference(row[key], reference)
        if manifests:
            row["Manifests"] = docker_manifests(group, users.get(group.id, []))
        rows.append(row)
    return Response(200, sorted(rows, key=lambda row: -row["Created"]))


def docker_image_config(config: Dict[str, Any], version: Tuple[int, int]) -> Dict[str, Any]:
    """The `Config` of an image with the fields every client expects."""
    found = {
        "User": config.get("User") or "", "Env": config.get("Env"), "Cmd": config.get("Cmd"),
        "Volumes": config.get("Volumes"), "WorkingDir": config.get("WorkingDir") or "",
        "Entrypoint": config.get("Entrypoint"), "OnBuild": config.get("OnBuild"), "Labels": config.get("Labels"),
    }
    for key in ("ExposedPorts", "Healthcheck", "StopSignal", "Shell", "ArgsEscaped"):
        if config.get(key):
            found[key] = config[key]
    if version < (1, 50):
        found.update({"Hostname": "", "Domainname": "", "AttachStdin": False, "AttachStdout": False,
                      "AttachStderr": False, "Tty": False, "OpenStdin": False, "StdinOnce": False, "Image": ""})
    return found


def docker_image(group: ImageGroup, version: Tuple[int, int], content: Optional[ImageContent] = None) -> Dict[str, Any]:
    """An image as `/images/{name}/json` shows it: as a whole, or the `content` of one platform."""
    config = (content or group.content).config
    history = config.get("history") or []
    size = (content or group.content).size + (content or group.content).unpacked_size
    image = {
        "Id": content.descriptor["digest"] if content else group.id, "RepoTags": group.repo_tags,
        "RepoDigests": group.repo_digests, "Parent": group.parent,
        "Comment": next((each.get("comment") or "" for each in reversed(history)), ""),
        "Created": config.get("created") or ZERO_TIME, "DockerVersion": "", "Author": config.get("author") or "",
        "Config": docker_image_config(config.get("config") or {}, version),
        "Architecture": config.get("architecture") or "", "Os": config.get("os") or "", "Size": size,
        "GraphDriver": {"Data": None, "Name": "overlayfs"},
        "RootFS": {"Type": "layers", "Layers": (config.get("rootfs") or {}).get("diff_ids") or []},
        "Metadata": {"LastTagTime": rfc3339(group.updated_at or None)},
    }
    if config.get("variant"):
        image["Variant"] = config["variant"]
    if version < (1, 44):
        image["VirtualSize"] = size
    if version < (1, 45):
        image.update({"Container": "", "ContainerConfig": image["Config"]})
    if version >= (1, 48):
        image["Descriptor"] = content.descriptor if content else group.target.json
    if version >= (1, 52):
        # From here on dockerd leaves out what is empty, and the driver where containerd has the images.
        del image["GraphDriver"]
        image["Config"] = {key: value for key, value in image["Config"].items() if value}
        image = {key: value for key, value in image.items() if value
                 or key not in ("Parent", "Comment", "DockerVersion", "Author")}
    return image


SYSTEMS = ("linux", "windows", "darwin", "freebsd", "netbsd", "openbsd", "solaris", "android", "dragonfly", "plan9")


def parse_platform(text: str) -> Dict[str, str]:
    """The platform of a `platform` parameter: JSON or, as for `docker --platform`, `linux`, `arm64` or
    `linux/arm/v7`; 400 otherwise."""
    if text.startswith("{"):
        told = shaped(parse_json(text.encode("utf-8", "surrogateescape")), PLATFORM)
        if not (told.get("os") and told.get("architecture")):
            raise BadParameter("both OS and Architecture must be provided")
        text = platform_text(told)
    parts = text.split("/")
    for each in parts:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", each):
            raise BadParameter(f'"{each}" is an invalid component of "{text}": platform specifier component must match '
                               '"^[A-Za-z0-9_.-]+$": invalid argument')
    if len(parts) > 3:
        raise BadParameter(f'"{text}": cannot parse platform specifier: invalid argument')
    if len(parts) == 1:
        parts = [parts[0], os.uname().machine] if parts[0].lower() in SYSTEMS else ["linux", parts[0]]
    parts[1] = GO_ARCHITECTURES.get(parts[1], parts[1])
    return dict(zip(PLATFORM, parts))


def platform_content(group: ImageGroup, text: str, name: str) -> ImageContent:
    """What is here of an image for the platform of a `platform` parameter, or with "" what runs here; 404 with the
    name that the client used where there is none."""
    if not text:
        return group.content
    wanted = parse_platform(text)
    for each in group.contents:
        if each.whole and all(each.platform.get(key, "" if key != "variant" else value) == value
                              for key, value in wanted.items()):
            return each
    raise NotFound(f"image with reference {name} was found but does not provide the specified platform "
                   f"({platform_text(wanted)})")


@route("GET", "/images/{image}/json")
def image_inspect(engine: Engine, request: Request, name: str) -> Response:
    """One image, or its content of one `platform`; 404 when there is none of that name, id or platform."""
    group = engine.inventory.image(name)
    manifests = request.flag("manifests") and request.version >= (1, 48)
    platform = request.value("platform") if request.version >= (1, 49) else ""
    if manifests and platform:
        raise BadParameter("conflicting options: manifests and platform options cannot both be set")
    image = docker_image(group, request.version, platform_content(group, platform, name) if platform else None)
    if manifests:
        image["Manifests"] = docker_manifests(group, image_users(engine).get(group.id, []))
    return Response(200, image)


def docker_history(group: ImageGroup, content: ImageContent) -> List[Dict[str, Any]]:
    """The layers of an image's content, newest first."""
    rows = []
    left = list(reversed(content.layer_sizes))
    for each in reversed(content.config.get("history") or []):
        rows.append({
            "Comment": each.get("comment") or "", "Created": seconds_or_zero(each.get("created") or ""),
            "CreatedBy": each.get("created_by") or "",
            "Id": "<missing>", "Size": 0 if each.get("empty_layer") or not left else left.pop(0), "Tags": None,
        })
    if rows:
        rows[0].update({"Id": group.id, "Tags": group.repo_tags or None})
    return rows


@route("GET", "/images/{image}/history")
def image_history(engine: Engine, request: Request, name: str) -> Response:
    """How an image was made, a row a step; sizes as unpacked."""
    group = engine.inventory.image(name)
    platform = request.value("platform") if request.version >= (1, 48) else ""
    return Response(200, docker_history(group, platform_content(group, platform, name)))


def check_unused(group: ImageGroup, name: str, users: List[Container], force: bool) -> None:
    """409 with dockerd's words where an image may not be removed: by the last of its names, or with "" as a whole."""
    short, user = group.id[7:19], next(iter(users), None)
    running = next((each for each in users if each.running and not name), None)
    if running:
        raise Conflict(f"conflict: unable to delete {short} (cannot be forced) - image is being used by running "
                       f"container {running.id[:12]}")
    if name and user and not force:
        raise Conflict(f"conflict: unable to delete {name} (must be forced) - container {user.id[:12]} is using its "
                       f"referenced image {short}")
    if user and not force:
        raise Conflict(f"conflict: unable to delete {short} (must be forced) - image is being used by stopped "
                       f"container {user.id[:12]}")


def remove_image(engine: Engine, group: ImageGroup, names: List[str], stays: bool = False) -> List[Dict[str, str]]:
    """Remove names of an image; what was untagged and, with the last name, deleted. One that `stays` is then one
    without a name."""
    if stays:
        engine.keep_images(names)
    with engine.changing_images(names, "untag"):
        engine.containerd.delete_images(names)
    left = engine.inventory.images.get().get(group.id)
    named = [name for name in names if not IMPORTED.match(name) and not name.startswith((DANGLING + "@", WORKING_NAME))]
    told = [{"Untagged": familiar(name)} for name in named]
    for name in names:
        engine.tell_image("untag", group, familiar(name))
    if left is None or not left.names:
        told.append({"Deleted": group.id})
        engine.journal.emit("image", "delete", group.id, {"name": group.id})
    return told


def referenced_names(group: ImageGroup, name: str) -> List[str]:
    """Those of an image's names that a reference stands for: one, or with a digest all of its repository. [] for an
    id."""
    try:
        reference = parse_reference(name)
    except BadParameter:
        return []
    named = reference._replace(digest="").name
    begins = (named + "@",) if reference.tag else (named + ":", named + "@")
    found = [each for each in group.names if each == reference.name]
    if reference.digest and not found:
        found = [each for each in group.names if each == named or each.startswith(begins)]
        if not found:
            raise NotFound(f"No such image: {with_tag(name)}")
    return found


@route("DELETE", "/images/{image}")
def image_delete(engine: Engine, request: Request, name: str) -> Response:
    """Remove a name of an image, with a digest all names of its repository, or by its id all of them; with `platforms`
    and force only the content of those. 409 while a container needs it."""
    group, force = engine.inventory.image(name), request.flag("force")
    platforms = [each for each in request.values("platforms") if each and request.version >= (1, 50)]
    if platforms and not force:
        raise BadParameter("Content will be removed from all images referencing this variant. Use --force to force "
                           "delete.")
    contents = {content.descriptor["digest"]: content
                for content in (platform_content(group, each, name) for each in platforms)}
    for content in contents.values():
        engine.inventory.images.remove_content(content)
    if contents:
        return Response(200, [{"Deleted": digest} for digest in contents])
    names = referenced_names(group, name)
    left = [each for each in group.names if each not in names and not each.startswith(DANGLING + "@")]
    users = image_users(engine).get(group.id, [])
    single = len(names) == 1 and "@" not in name
    if not left or not names:
        check_unused(group, familiar(names[0]) if single else "", users, force)
    if not names and max(len(group.repo_tags), len(group.repo_digests)) > 1 and not force:
        raise Conflict(f"conflict: unable to delete {group.id[7:19]} (must be forced) - image is referenced in "
                       "multiple repositories")
    stays = single and bool(users)
    # With the last name goes that of none.
    return Response(200, remove_image(engine, group, names if left and names or stays else list(group.names), stays))


@route("POST", "/images/prune")
def image_prune(engine: Engine, request: Request) -> Response:
    """Remove images that no container uses: those without a name unless dangling=false. Filters until, label,
    label!."""
    filters = request.filters("dangling", "until", "label", "label!")
    filters["dangling"] = ["true"] if flag_filter(filters, "dangling", True) else []
    engine.inventory.images.look_again()
    users = image_users(engine)
    deleted, before = [], images_size(engine)
    for group in filter_images(engine, list(engine.inventory.images.get().values()), filters):
        if group.id not in users:
            with contextlib.suppress(ApiError):
                deleted += remove_image(engine, group, list(group.names))
    reclaimed = max(before - images_size(engine), 0) if deleted else 0
    engine.journal.emit("image", "prune", "", {"reclaimed": str(reclaimed)})
    return Response(200, {"ImagesDeleted": deleted or None, "SpaceReclaimed": reclaimed})


@route("POST", "/images/{image}/tag")
def image_tag(engine: Engine, request: Request, name: str) -> Response:
    """Give an image another name; 201, also when it has it already."""
    group = engine.inventory.image(name)
    repository, tag = request.value("repo"), request.value("tag")
    target = parse_reference(f"{repository}:{tag}" if tag else repository)
    if target.digest:
        raise BadParameter("refusing to create a tag with a digest reference")
    if familiar(target.repository) == "sha256":
        raise BadParameter("refusing to create an ambiguous tag using digest algorithm as name")
    if re.fullmatch("[0-9a-f]{64}", familiar(target.repository)):
        raise BadParameter(f"invalid repository name ({repository}), cannot specify 64-byte hexadecimal strings")
    with engine.changing_images([target.name]):
        engine.containerd.set_image(engine.containerd.get_image(group.name)._replace(name=target.name))
    engine.tell_image("tag", group, familiar(target.name))
    return Response(201)


@route("GET", "/images/{image}/attestations")
def image_attestations(engine: Engine, request: Request, name: str) -> Response:
    """Attestations of an image: nerdctl keeps the content of none, so there are none to show."""
    engine.inventory.image(name)
    return Response(200, [])


ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


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


def as_error_detail(chunks: Iterator[bytes], begun: bool = False) -> Iterator[bytes]:
    """A progress stream whose error, once it has `begun`, is its last message."""
    try:
        for chunk in chunks:
            begun = True
            yield chunk
    except ApiError as error:
        if not begun:
            raise
        yield message_line({"errorDetail": {"message": str(error)}, "error": str(error)})
    finally:
        chunks.close()


def wanted_platforms(request: Request, limit: int = 0) -> List[str]:
    """Each `platform` of a request, once; 501 for more than `limit` of them (0: as many as there are)."""
    wanted = list(dict.fromkeys(platform_text(parse_platform(each)) for each in request.values("platform") if each))
    if limit and len(wanted) > limit:
        raise NotImplementedHere(f"nerdctl can do this for one platform only, not for {', '.join(wanted)}")
    return wanted


###############################################################################
# Image archives
###############################################################################


def remove_extra_names(engine: Engine, extra: List[str]) -> None:
    """Take away names that nerdctl's load and import leave beside the ones asked for."""
    if extra:
        with engine.changing_images(extra, "untag"), contextlib.suppress(ApiError):
            engine.containerd.delete_images(extra)


def parse_loaded(text: str) -> List[str]:
    """The names that `nerdctl load`, or ctr's import, says it loaded, each once. nerdctl 2.3 sometimes leaves out the
    last of its `Loaded image:` lines (3 of 25 times on a busy machine), but names it in its progress."""
    saved = re.findall(r"^(\S+)[ \t]+saved[ \t]*$", ANSI.sub("", text), re.M)
    told = re.findall(r"^(?:Loaded image:|unpacking) (\S+)", text, re.M)
    return list(dict.fromkeys([*told, *(each for each in saved if ":" in each[1:-1])]))


# Files of an archive of images, and what containerd reads of a JSON file at the most.
ARCHIVE_FILES = ("oci-layout", "index.json", "manifest.json")
ARCHIVE_LIMIT = 20 << 20


def read_archive(source: TarInput, files: Dict[str, bytes]) -> Iterator[None]:
    """Read all of an archive of images, a piece a step, and note these of its `files`, by which it says what is in
    it."""
    # Not at the top: only archives need it, and it costs memory.
    import tarfile

    # What is no tar is for nerdctl to complain of.
    with contextlib.suppress(tarfile.TarError):
        tar = tarfile.TarFile(fileobj=source, mode="r", encoding="utf-8", errors="surrogateescape")
        for entry in iter(tar.next, None):
            tar.members.clear()
            name = os.path.normpath(entry.name)
            if entry.isreg() and name in ARCHIVE_FILES and entry.size <= ARCHIVE_LIMIT:
                files[name] = b"".join(map(bytes, source.pieces(entry.size)))
            for _ in source.pieces(tar.offset - source.position):
                yield
            source.spent = 0
    for _ in source.pieces(sys.maxsize):
        yield


def archive_index(files: Dict[str, bytes]) -> str:
    """The name that nerdctl gives to an archive's index, "" for an archive without one."""
    digest = sha256(files.get("index.json", b"")).hexdigest()
    return f"import@sha256:{digest}" if "oci-layout" in files else ""


def archive_names(files: Dict[str, bytes]) -> List[str]:
    """The names in an archive, in its order, as containerd takes them: the index's where it has one. Tags alone are
    none."""
    found: List[Any] = []
    # Whatever this JSON is not is for nerdctl to complain of.
    with contextlib.suppress(ApiError, AttributeError, KeyError, TypeError):
        if "oci-layout" in files:
            for each in parse_json(files["index.json"])["manifests"]:
                told = each.get("annotations") or {}
                found.append(told.get("io.containerd.image.name") or told.get("org.opencontainers.image.ref.name"))
        else:
            for each in parse_json(files["manifest.json"]):
                found += [parse_reference(name).name for name in each.get("RepoTags") or ()]
    return list(dict.fromkeys(each for each in found if isinstance(each, str) and re.search("[/:@]", each)))


@route("POST", "/images/load")
def image_load(engine: Engine, request: Request) -> Response:
    """Load an archive; a stream with `Loaded image: …` for each name in it, and with the bytes read where `quiet` is
    off."""
    platforms, quiet = wanted_platforms(request, 1), request.flag("quiet", True)

    def chunks() -> Iterator[bytes]:
        before = list(engine.inventory.images.records())
        files, names = {}, []
        with engine.changing_images(names) as named:
            # Not ended when the client leaves: that is seen when the body breaks off, and what has come whole is
            # loaded.
            with engine.nerdctl.load(platforms) as process:
                told = time.monotonic()
                source = TarInput(itertools.takewhile(process.write, plain_blocks(request.body.blocks())))
                try:
                    for _ in read_archive(source, files):
                        if not quiet and time.monotonic() - told > 0.5:
                            told, taken = time.monotonic(), source.position
                            yield message_line({"status": "Loading layer", "id": "archive",
                                                "progressDetail": {"current": taken, "total": taken},
                                                "progress": decimal_size(taken)})
                except BaseException:
                    process.spoil()
                    raise
                names += archive_names(files)
                named()
                process.close_stdin()
                text = b"".join(iter(process.read, b"")).decode(errors="replace")
                process.check()
        loaded = parse_loaded(text)
        groups = {name: group for group in engine.inventory.images.get().values() for name in group.names}
        nameless = [each for each in loaded if IMPORTED.match(each)]
        # The index is an image of containerd too, and the first that nerdctl tells of.
        index = archive_index(files) or "".join([each for each in nameless if each.startswith("import@")][:1])
        remove_extra_names(engine, [index] if index in groups and index not in before else [])
        for name in [each for each in names if each in groups] or [each for each in loaded if each not in nameless]:
            yield message_line({"stream": f"Loaded image: {familiar(name)}\n"})
            if name in groups:
                engine.tell_image("load", groups[name], familiar(name))
        for name in nameless:
            if name != index:
                identity = name.partition("@")[2]
                yield message_line({"stream": f"Loaded image ID: {identity}\n"})
                engine.journal.emit("image", "load", identity, {"name": identity})

    return Response(200, Stream(as_error_detail(chunks(), begun=True), primed=True), "application/json")


# A word of a Dockerfile, and a piece of one: in single quotes, in double quotes, in none.
WORD = re.compile(r"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^\s\\'"])+""", re.S)
PIECE = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|((?:\\.|[^\\'"])+)""", re.S)
VARIABLE = re.compile(r"\\(.)|\$(?:(\w+)|\{(\w+)(?:(:[-+])([^}]*))?\})", re.S)


def expand_word(text: str, variables: Dict[str, str]) -> str:
    """A word of a Dockerfile without its quotes, with the values of variables: `$NAME`, `${NAME}`, `${NAME:-default}`
    and `${NAME:+instead}`; 400 where a quote is not closed."""
    def value(found: Any, quoted: bool) -> str:
        escaped, name, braced, test, word = found.groups()
        if escaped:
            return ("\\" if quoted and escaped not in '"$\\' else "") + escaped
        current = variables.get(name or braced, "")
        return (word if current else "") if test == ":+" else current or word or ""

    if PIECE.sub("", text):
        raise BadParameter(f"invalid change: unexpected end of statement in {text!r}")
    return "".join(single or VARIABLE.sub(lambda found: value(found, bool(double)), double or plain)
                   for single, double, plain in PIECE.findall(text))


def expand_pairs(rest: str, variables: Dict[str, str]) -> Dict[str, str]:
    """`a=b "c"="d e"` or `a b e` of ENV and LABEL; 400 for a name without a value."""
    words = WORD.findall(rest)
    if words and "=" not in words[0]:
        found = {expand_word(words[0], variables): expand_word(rest[len(words[0]):].strip(), variables)}
        if "" not in found.values():
            return found
    if not words or not all("=" in each for each in words):
        raise BadParameter("invalid change: ENV and LABEL must have names and values")
    return dict(expand_word(each, variables).partition("=")[::2] for each in words)


def instruction_words(rest: str, shell: Optional[List[str]]) -> List[str]:
    """The words of CMD and ENTRYPOINT: a JSON array, or else a line for the shell."""
    with contextlib.suppress(ValueError):
        found = json.loads(rest)
        if isinstance(found, list) and all(isinstance(each, str) for each in found):
            return found
    return [*(["/bin/sh", "-c"] if shell is None else shell), rest]


def health_instruction(rest: str) -> Dict[str, Any]:
    """The Healthcheck of a HEALTHCHECK instruction."""
    fields = {"interval": "Interval", "timeout": "Timeout", "start-period": "StartPeriod",
              "start-interval": "StartInterval", "retries": "Retries"}
    options, kind, command = re.fullmatch(r"((?:--\S+\s+)*)(\S+)\s*(.*)", rest, re.S).groups()
    found: Dict[str, Any] = {"Test": [kind.upper()]}
    for option in options.split():
        name, _, value = option[2:].partition("=")
        told = int_or_zero(value) if name == "retries" else duration_of(value)
        if name not in fields or told is None:
            raise BadParameter(f"invalid change: HEALTHCHECK {option}")
        found[fields[name]] = told
    if kind.upper() == "CMD" and command:
        words = instruction_words(command, [])
        found["Test"] = ["CMD-SHELL", command] if words == [command] else ["CMD", *words]
    elif kind.upper() != "NONE" or command:
        raise BadParameter(f"invalid change: unknown type {kind!r} in HEALTHCHECK (try CMD)")
    return found


def open_ports_of(words: Iterable[str]) -> Iterator[str]:
    """`80/tcp` for each port of an EXPOSE, which may have ranges."""
    for word in words:
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?", word, re.I)
        if not found:
            raise BadParameter(f"invalid containerPort: {word}")
        for port in range(int(found.group(1)), int(found.group(2) or found.group(1)) + 1):
            yield f"{port}/{(found.group(3) or 'tcp').lower()}"


def apply_change(config: Dict[str, Any], word: str, rest: str) -> None:
    """Change an image's config as an instruction of a Dockerfile says; 400 for one that may not be there."""
    variables = dict(each.partition("=")[::2] for each in config.get("Env") or [])
    expand = lambda text: expand_word(text, variables)
    if not rest:
        raise BadParameter(f"{word} requires at least one argument")
    if word in ("CMD", "ENTRYPOINT"):
        config[word.capitalize()] = instruction_words(rest, config.get("Shell"))
    elif word == "ENV":
        told = {key: f"{key}={value}" for key, value in expand_pairs(rest, variables).items()}
        config["Env"] = list({**{each.partition("=")[0]: each for each in config.get("Env") or []}, **told}.values())
    elif word == "LABEL":
        config["Labels"] = {**(config.get("Labels") or {}), **expand_pairs(rest, variables)}
    elif word == "EXPOSE":
        ports = open_ports_of(map(expand, WORD.findall(rest)))
        config["ExposedPorts"] = {**(config.get("ExposedPorts") or {}), **{port: {} for port in ports}}
    elif word == "VOLUME":
        listed = instruction_words(rest, []) if rest.startswith("[") else [expand(each) for each in WORD.findall(rest)]
        config["Volumes"] = {**(config.get("Volumes") or {}), **{each: {} for each in listed}}
    elif word in ("USER", "STOPSIGNAL"):
        config["User" if word == "USER" else "StopSignal"] = expand(rest)
    elif word == "WORKDIR":
        config["WorkingDir"] = os.path.normpath(os.path.join("/", config.get("WorkingDir") or "", expand(rest)))
    elif word == "HEALTHCHECK":
        config["Healthcheck"] = health_instruction(rest)
    elif word == "ONBUILD":
        config["OnBuild"] = [*(config.get("OnBuild") or []), rest]
    else:
        raise BadParameter(f"{word} is not a valid change command")


def apply_changes(config: Dict[str, Any], values: List[str]) -> Dict[str, Any]:
    """An image's config after the instructions of a `changes` parameter; 400 for one that may not be there."""
    config, words = dict(config), []
    for line in filter(None, (line.strip() for value in values for line in value.split("\n"))):
        word, _, rest = re.sub(r"\s+", " ", line, count=1).partition(" ")
        words.append(word.upper())
        apply_change(config, words[-1], rest.strip())
        if words[-1] == "ENTRYPOINT" and "CMD" not in words:
            # What was the command would become the arguments of another program.
            config["Cmd"] = None
    return config


def image_config(config: Dict[str, Any]) -> Dict[str, Any]:
    """Those fields of a container's config that an image has."""
    return {key: config[key] for key in (
        "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal",
        "ArgsEscaped", "Healthcheck", "OnBuild", "Shell") if config.get(key) is not None}


def merged_config(own: Dict[str, Any], below: Dict[str, Any]) -> Dict[str, Any]:
    """A config with another one's values where it has none."""
    found = {**below, **{key: value for key, value in own.items() if value}}
    for key in ("ExposedPorts", "Labels", "Volumes", "Healthcheck"):
        if below.get(key) and own.get(key):
            found[key] = {**below[key], **own[key]}
    names = {each.partition("=")[0] for each in own.get("Env") or []}
    found["Env"] = [*(own.get("Env") or []), *(each for each in below.get("Env") or []
                                               if each.partition("=")[0] not in names)]
    if own.get("Entrypoint"):
        found["Cmd"] = own.get("Cmd")
    elif own.get("Entrypoint") is not None:
        found["Entrypoint"] = []
    return {key: value for key, value in found.items() if value}


MANIFEST_TYPE, CONFIG_TYPE = (f"application/vnd.oci.image.{kind}.v1+json" for kind in ("manifest", "config"))


def write_image(containerd: Containerd, snapshotter: str, name: str, config: Dict[str, Any],
                layers: List[Dict[str, Any]], parent: str = "") -> None:
    """Let a name stand for a new image of these layers, which are here and unpacked. The client of containerd is one
    with a lease."""
    chain = chain_ids(config)[-1:]
    snapshot = {f"containerd.io/gc.ref.snapshot.{snapshotter}": each for each in chain}
    found = containerd.write_content(CONFIG_TYPE, json_bytes(config), snapshot)
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": found.json, "layers": layers}
    needed = enumerate([found.json, *layers])
    target = containerd.write_content(MANIFEST_TYPE, json_bytes(manifest), {
        f"containerd.io/gc.ref.content.{number}": each["digest"] for number, each in needed})
    containerd.set_image(ImageRecord(name, target, labels=((PARENT_LABEL, parent),) if parent else ()))


def image_import(engine: Engine, request: Request) -> Response:
    """Import a tar of a root file system (the body, or a URL) as an image; its id as the one message."""
    source, repository, tag = request.value("fromSrc"), request.value("repo"), request.value("tag")
    target = parse_reference(f"{repository}:{tag}" if tag and repository else repository) if repository else None
    if target and target.digest:
        raise BadParameter("cannot import digest reference")
    if source != "-" and not re.match(r"https?://", source):
        source = "http://" + source
    config = apply_changes({}, request.values("changes"))
    # nerdctl before 2.1 has no import.
    arguments = ["import", *([f"--message={request.value('message')}"] if request.value("message") else [])]
    arguments += [f"--platform={each}" for each in wanted_platforms(request, 1)]

    def chunks() -> Iterator[bytes]:
        before = list(engine.inventory.images.records())
        working = target.name if target else f"{WORKING_NAME}import:{os.urandom(8).hex()}"
        with engine.changing_images([working]):
            with engine.nerdctl.start(*arguments, "--", source, working, stdin=subprocess.PIPE,
                                      client=request.client) as process:
                blocks = request.body.blocks() if source == "-" else iter([b""])
                first = next(blocks, None)
                if first is None:
                    process.kill()
                    raise BadParameter("invalid archive: it is empty")
                process.feed(itertools.chain([first], blocks))
                for _ in iter(process.read, b""):
                    pass
                process.check()
            engine.inventory.images.invalidate(working)
            group = engine.inventory.image(working)
            if config:
                with engine.containerd.leased() as containerd:
                    write_image(containerd, engine.nerdctl.snapshotter, working, {**group.config, "config": config},
                                group.content.layers)
        remove_extra_names(engine, [name for name in engine.inventory.images.records()
                                    if name not in before and name.startswith(working + "@sha256:")])
        group = engine.inventory.image(working)
        engine.tell_image("import", group, familiar(target.name) if target else group.id)
        yield message_line({"status": group.id})

    return Response(200, Stream(as_error_detail(chunks()), primed=True), "application/json")


def images_to_save(engine: Engine, name: str) -> List[Tuple[str, ImageGroup]]:
    """The images that a name in a save stands for, with their names in containerd: a repository without tag stands for
    all of its tags, and what was named by its id or digest has no name in the archive."""
    groups = list(engine.inventory.images.get().values())
    with contextlib.suppress(BadParameter):
        reference, full = parse_reference(name, ""), parse_reference(name).name
        found = [(each, group) for group in groups for each in group.names
                 if each.startswith(reference.repository + ":") and "@" not in each]
        if found and reference.name == reference.repository and not re.fullmatch("[0-9a-f]{12,64}", name):
            return found
        found = [each for each in found if each[0] == full]
        if found and not is_nameless(full):
            return found
    return [("", engine.inventory.image(name))]


def blob_path(digest: str) -> str:
    """Where an archive of images has a blob."""
    return "blobs/" + digest.replace(":", "/")


def archive_contents(images: Iterable[Tuple[str, ImageGroup]], platforms: List[str]) -> Tuple[
        Dict[str, int], List[Dict[str, Any]], List[Dict[str, Any]]]:
    """What the archive of images with their names, or "" for none, has: digest -> size of its blobs, the manifests of
    its index.json, and its manifest.json, which older engines load, with one manifest for each image. 404 for an image
    that has nothing here, or nothing for the platforms asked for."""
    blobs, index, manifests, wanted = {}, [], {}, tuple(each + "/" for each in platforms)
    for name, group in images:
        found = [each for each in group.whole if not platforms or (platform_text(
            each.descriptor.get("platform") or each.config) + "/").startswith(wanted)]
        if not found:
            what = familiar(name) or group.id
            raise NotFound(f"image with reference {what} was found but does not provide the specified platform "
                           f"({', '.join(platforms)})" if platforms else f"{what} has no content here")
        root = group.target.json
        if len(platforms) == 1:
            found = found[:1]
            root = {key: found[0].descriptor[key] for key in root}
        blobs[root["digest"]] = root["size"]
        for each in found:
            parts = (each.descriptor, each.manifest["config"], *each.layers)
            blobs.update((part["digest"], part["size"]) for part in parts)
        told = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
        index.append({**root, "annotations": told} if name else root)
        entry = manifests.setdefault(found[0].descriptor["digest"], {
            "Config": blob_path(found[0].manifest["config"]["digest"]), "RepoTags": None,
            "Layers": [blob_path(each["digest"]) for each in found[0].layers]})
        if name:
            entry["RepoTags"] = [*(entry["RepoTags"] or []), familiar(name)]
    return blobs, index, list(manifests.values())


def archive_header(name: str, size: int, mode: int) -> bytes:
    """The header of a file in an archive of images or, with a slash at the end of its name, of a folder."""
    numbers = {**dict.fromkeys(("uid", "gid", "mtime", "major", "minor"), 0), "size": size, "mode": mode}
    return tar_header(name.encode(), b"5" if name.endswith("/") else b"0", b"", numbers, {})


def image_archive(containerd: Containerd, blobs: Dict[str, int], index: List[Dict[str, Any]],
                  manifests: List[Dict[str, Any]]) -> Iterator[Any]:
    """The tar of these contents, as dockerd with containerd's store makes it: an OCI layout. ApiError where a blob is
    not what it was."""
    for name in ("blobs/", "blobs/sha256/"):
        yield archive_header(name, 0, 0o755)
    for digest in sorted(blobs):
        yield archive_header(blob_path(digest), blobs[digest], 0o444)
        left, found = blobs[digest], sha256()
        for piece in containerd.content(digest):
            left -= len(piece)
            found.update(piece)
            yield piece
        if left or "sha256:" + found.hexdigest() != digest:
            raise ApiError(f"content {digest} is broken")
        yield bytes(-blobs[digest] % 512)
    layout = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": index}
    for name, value, mode in (("index.json", layout, 0o644), ("manifest.json", manifests, 0o644),
                              ("oci-layout", {"imageLayoutVersion": "1.0.0"}, 0o444)):
        data = json_bytes(value)
        yield archive_header(name, len(data), mode) + data + bytes(-len(data) % 512)
    yield bytes(1024)


def save_images(engine: Engine, request: Request, names: List[str]) -> Response:
    """Stream the archive of images, all looked up before the first byte."""
    if not names:
        raise BadParameter("no images given")
    found = {(full, group.id): group for name in names for full, group in images_to_save(engine, name)}
    images = [(full, group) for (full, _), group in found.items()]
    contents = archive_contents(images, wanted_platforms(request))

    def chunks() -> Iterator[Any]:
        yield from image_archive(engine.containerd, *contents)
        for full, group in images:
            engine.tell_image("save", group, familiar(full) or group.id)

    return Response(200, Stream(chunks(), primed=True), "application/x-tar")


@route("GET", "/images/get")
def image_save_many(engine: Engine, request: Request) -> Response:
    """The archive of the images in `names`."""
    return save_images(engine, request, [name for value in request.values("names") for name in value.split(",")
                                         if name])


@route("GET", "/images/{image}/get")
def image_save(engine: Engine, request: Request, name: str) -> Response:
    """The archive of one image."""
    return save_images(engine, request, [name])


###############################################################################
# Registries
###############################################################################

PROGRESS_LINE = re.compile(
    r"layer-(?P<digest>sha256:[0-9a-f]+):?\s+(?P<state>[a-z ]+?)\s*"
    r"(?:\|.*\|\s*(?:(?P<current>[\d.]+ ?[KMGT]?i?B)/(?P<total>[\d.]+ ?[KMGT]?i?B))?\s*)?$")
PULL_WORDS = {"waiting": "Waiting", "downloading": "Downloading", "extracting": "Extracting", "resolving": "Waiting",
              "resolved": "Waiting", "complete": "Pull complete", "done": "Pull complete",
              "already exists": "Already exists", "exists": "Already exists"}
PUSH_WORDS = {"waiting": "Waiting", "uploading": "Pushing", "done": "Pushed", "complete": "Pushed",
              "already exists": "Layer already exists", "exists": "Layer already exists"}


class ProgressTable:
    """nerdctl's redrawn table of layers as Docker's progress messages: one a layer whenever it has changed. Where the
    registry is known to have all of them already, that is all that is told of a push."""

    def __init__(self, words: Dict[str, str], pushed: bool = False):
        self.words = {key: "Layer already exists" for key in words if words[key] == "Pushed"} if pushed else words
        self.told: Dict[str, Tuple] = {}
        self.done: set = set()

    def messages(self, line: str) -> List[Dict[str, Any]]:
        """The messages that a line of output makes due, [] for most."""
        found = PROGRESS_LINE.search(ANSI.sub("", line).rstrip())
        if not found:
            return []
        identity = found.group("digest")[7:19]
        current, total = size_bytes(found.group("current") or ""), size_bytes(found.group("total") or "")
        word = self.words.get(found.group("state").strip(), "")
        state = (word, current, total)
        if not word or identity in self.done or self.told.get(identity) == state:
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
        return [{"status": self.words["done"], "progressDetail": {}, "id": identity} for identity in self.told
                if identity not in self.done]


def progress_bar(current: int, total: int) -> str:
    """`[====>   ]  1.5MB/3MB`, as clients older than API 1.48 print it."""
    filled = min(50, current * 50 // total) if total else 0
    bar = "=" * filled + (">" if filled < 50 else "") + " " * (49 - filled)
    return f"[{bar}]  {decimal_size(current):>8}/{decimal_size(total)}"


def follow_progress(process: Process, table: ProgressTable) -> Iterator[bytes]:
    """The progress messages of a running pull or push. Raises the ApiError when it fails."""
    for line in process.lines():
        yield from map(message_line, table.messages(line))
    process.check()
    yield from map(message_line, table.finish())


def pull_image(engine: Engine, request: Request, reference: Reference, platform: str,
               environment: Optional[Dict[str, str]]) -> Iterator[bytes]:
    """Pull one reference; yields Docker's messages."""
    before = engine.inventory.images.by_name().get(reference.name)
    path = reference.repository.partition("/")[2]
    with engine.changing_images([reference.name]), engine.nerdctl.pull(
            reference.name, platform, fits_machine(platform), environment, request.client) as process:
        messages = follow_progress(process, ProgressTable(PULL_WORDS))
        # An error until something moves is an ordinary error response.
        first = list(itertools.islice(messages, 1))
        yield message_line({"status": f"Pulling from {path}", "id": reference.tag or reference.digest})
        yield from itertools.chain(first, messages)
    group = engine.inventory.image(reference.name)
    name = familiar(reference.name)
    yield message_line({"status": f"Digest: {group.id}"})
    word = "Image is up to date" if before and before.id == group.id else "Downloaded newer image"
    yield message_line({"status": f"Status: {word} for {name}"})
    engine.journal.emit("image", "pull", name, {**group.labels, "name": name})


def open_url(url: str, headers: Optional[Dict[str, str]] = None, redirects: bool = True) -> Any:
    """The answer to a GET through the proxies of the environment, of whatever status; without `redirects` they are
    answers too. OSError, ValueError or HTTPException where there is none."""
    # Not at the top: few need it, and it costs memory.
    import urllib.error
    import urllib.request

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        # Before redirect_request, which comes only once the location has been read.
        def http_error_302(self, *_: Any) -> None:
            return None

        http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    handlers = [] if redirects else [NoRedirects]
    if is_loopback(urllib.parse.urlsplit(url).netloc):
        # As with Go, a proxy is never asked for this machine itself.
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        return urllib.request.build_opener(*handlers).open(urllib.request.Request(url, headers=headers or {}),
                                                           timeout=60)
    except urllib.error.HTTPError as error:
        return error


def is_loopback(host: str) -> bool:
    """Whether `host:port` is this machine, whose registries are spoken to without TLS, as nerdctl does."""
    return re.sub(r":\d+$", "", host) in ("localhost", "127.0.0.1", "[::1]")


class Registry:
    """The few questions that nerdctl does not put to a registry: the tags of a repository, and the descriptor of a
    reference. Plain http for this machine only, as nerdctl does; token and basic authentication."""

    TYPES = ", ".join((
        "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"))
    LIMIT = 8 << 20
    REDIRECTS = 5
    PAGES = 200

    def __init__(self, reference: Reference, credentials: Dict[str, str]):
        host, _, self.path = reference.repository.partition("/")
        self.host = "registry-1.docker.io" if host == "docker.io" else host
        self.credentials, self.authorization = credentials, ""

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

    def check(self) -> None:
        """Ask whether it takes the credentials at all; 401 where it refuses them."""
        status, headers, _ = self._send(self.host, "/v2/", "")
        if status == 401:
            status = self._send(self.host, "/v2/", self._authorize(headers.get("www-authenticate") or ""))[0]
        if status != 200:
            raise (Unauthorized if status == 401 else ApiError)(f"{self.host} answered {status}")

    def tags(self) -> List[str]:
        """All tags of the repository, which may come in pages."""
        found, path = [], "tags/list"
        for _ in range(self.PAGES):
            headers, body = self.ask(path)
            tags = shaped(parse_json(body), {"tags": [object]}).get("tags") or []
            found += [each for each in tags if isinstance(each, str)]
            query = next_query(headers.get("link") or "")
            if not query:
                return found
            path = f"tags/list?{query}"
        raise ApiError(f"{self.host}/{self.path} has more than {self.PAGES} pages of tags")

    def _basic(self) -> str:
        pair = f"{self.credentials.get('username', '')}:{self.credentials.get('password', '')}"
        return "Basic " + base64.b64encode(pair.encode()).decode() if self.credentials.get("username") else ""

    def _authorize(self, challenge: str) -> str:
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() != "bearer":
            return self._basic()
        fields = dict(re.findall(r'\b(\w+)="([^"]*)"', rest))
        realm = urllib.parse.urlsplit(fields.get("realm", ""))
        if realm.scheme not in ("http", "https") or not realm.netloc:
            return ""
        query = urllib.parse.urlencode({"service": fields.get("service", ""), "scope": f"repository:{self.path}:pull"})
        status, _, body = self._send(realm.netloc, f"{realm.path}?{query}", self._basic(), plain=realm.scheme == "http")
        if status != 200:
            return ""
        told = parse_json(body)
        return f"Bearer {told.get('token') or told.get('access_token') or ''}" if isinstance(told, dict) else ""

    def _send(self, host: str, path: str, authorization: str,
              plain: Optional[bool] = None) -> Tuple[int, Dict[str, str], bytes]:
        """GET, along a few redirects: blobs are often elsewhere. Nobody but `host` sees the authorization, or may ask
        for one."""
        if plain is None:
            plain = is_loopback(host)
        url, first = f"http{'' if plain else 's'}://{host}{path}", True
        for _ in range(1 + self.REDIRECTS):
            status, headers, body = self._get(url, authorization if first else "")
            if not first:
                headers.pop("www-authenticate", None)
            if status not in (301, 302, 303, 307, 308) or not headers.get("location"):
                return status, headers, body
            try:
                url = urllib.parse.urljoin(url, headers["location"])
                first = first and urllib.parse.urlsplit(url)[:2] == ("http" if plain else "https", host)
            except ValueError:
                raise ApiError(f"{host} redirects to what is no URL") from None
        raise ApiError(f"{host} redirects more than {self.REDIRECTS} times")

    def _get(self, url: str, authorization: str) -> Tuple[int, Dict[str, str], bytes]:
        scheme, host = urllib.parse.urlsplit(url)[:2]
        if scheme not in ("http", "https") or not host:
            raise ApiError(f"cannot ask {host or 'a registry'}: {scheme!r} is not http")
        headers = {"Accept": self.TYPES, "User-Agent": f"nerdctld/{VERSION}",
                   **({"Authorization": authorization} if authorization else {})}
        try:
            with open_url(url, headers, redirects=False) as response:
                told = {key.lower(): value for key, value in response.headers.items()}
                return response.status, told, response.read(self.LIMIT)
        except (OSError, ValueError, http.client.HTTPException) as error:
            # The ValueError is of a URL that is not ASCII.
            raise ApiError(f"cannot ask {host}: {getattr(error, 'reason', None) or error}") from None


def next_query(link: str) -> str:
    """The query of the next page in a Link header, "" where there is none. The rest of the link is that of this
    page."""
    for target, attributes in re.findall(r"<([^<>]*)>([^,<]*)", link):
        if re.search(r';\s*rel="?next\b', attributes, re.I):
            return target.partition("#")[0].partition("?")[2]
    return ""


@route("GET", "/distribution/{image}/json")
def image_distribution(engine: Engine, request: Request, name: str) -> Response:
    """What the registry has under a name: its descriptor and platforms; 401 and 404 as the registry says."""
    reference = parse_reference(name)
    registry = Registry(reference, decode_auth(request))
    headers, body = registry.ask(f"manifests/{reference.digest or reference.tag}")
    manifest = shaped(parse_json(body), MANIFEST)
    media_type = manifest.get("mediaType") or headers.get("content-type") or ""
    digest = headers.get("docker-content-digest") or "sha256:" + sha256(body).hexdigest()
    if "manifests" in manifest:
        platforms = [each.get("platform") or {} for each in manifest["manifests"]]
        platforms = [each for each in platforms if each.get("os", "unknown") != "unknown"]
    else:
        _, config = registry.ask(f"blobs/{(manifest.get('config') or {}).get('digest')}")
        platforms = [shaped(parse_json(config), PLATFORM)]
    return Response(200, {"Descriptor": {"mediaType": media_type, "digest": digest, "size": len(body)},
                          "Platforms": platforms})


@route("POST", "/images/create")
def image_create(engine: Engine, request: Request) -> Response:
    """Pull (`fromImage`, all tags where there is none) or import (`fromSrc`, with `changes`), as a progress stream."""
    if request.value("fromSrc"):
        return image_import(engine, request)
    name, tag = request.value("fromImage"), request.value("tag")
    if not name:
        raise BadParameter("invalid reference format")
    reference = parse_reference(name, "")
    if tag:
        reference = parse_reference(f"{reference.repository}@{tag}" if ":" in tag else f"{reference.repository}:{tag}")
    platform = platform_text(parse_platform(request.value("platform"))) if request.value("platform") else ""
    request.read_body()

    def chunks() -> Iterator[bytes]:
        references = [reference]
        if not reference.tag and not reference.digest:
            tags = Registry(reference, decode_auth(request)).tags()
            references = [reference._replace(tag=each) for each in sorted(tags) if TAG.fullmatch(each)]
        with credentials_for(engine, request, reference.repository.partition("/")[0]) as environment:
            for each in references:
                yield from pull_image(engine, request, each, platform, environment)

    return Response(200, Stream(as_error_detail(chunks()), primed=True), "application/json")


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
        "name": row.get("Name") or "", "description": row.get("Description") or "",
        "star_count": int(row.get("StarCount") or row.get("Stars") or 0),
        "is_official": str(row.get("IsOfficial") or row.get("Official") or "").lower() in ("true", "[ok]"),
        "is_automated": False,
    } for row in rows])


def registry_has(registry: Registry, group: ImageGroup) -> bool:
    """Whether a registry has an image, or the part of it that is here: nerdctl does not say so of a layer."""
    for digest in dict.fromkeys((group.id, group.content.descriptor.get("digest"))):
        with contextlib.suppress(ApiError):
            registry.ask(f"manifests/{digest}")
            return True
    return False


@route("POST", "/images/{image}/push")
def image_push(engine: Engine, request: Request, name: str) -> Response:
    """Push one tag, or all tags of a repository, as a progress stream with the digest in `aux`; 404 for no such
    image."""
    tag = request.value("tag")
    reference = parse_reference(name, "")
    if tag:
        reference = parse_reference(f"{reference.repository}:{tag}")
    groups = engine.inventory.images.by_name()
    names = [reference.name] if reference.tag else sorted(
        each for each in groups if each.startswith(reference.repository + ":") and "@" not in each)
    if not names or names[0] not in groups:
        told = "tag does not exist" if reference.tag else "An image does not exist locally with the tag"
        raise NotFound(f"{told}: {familiar(reference.name if reference.tag else reference.repository)}")
    platforms = wanted_platforms(request)

    def chunks() -> Iterator[bytes]:
        yield message_line({"status": f"The push refers to repository [{reference.repository}]"})
        with credentials_for(engine, request, reference.repository.partition("/")[0]) as environment:
            for each in names:
                table = ProgressTable(PUSH_WORDS, registry_has(Registry(reference, decode_auth(request)), groups[each]))
                with engine.nerdctl.push(each, groups[each], platforms, environment, request.client) as process:
                    yield from follow_progress(process, table)
                    pushed = engine.nerdctl.pushed_digest(process)
                group, short = groups[each], each.rpartition(":")[2]
                digest = pushed or group.id
                descriptor = group.target.json if digest == group.id else group.content.descriptor
                size = descriptor.get("size") or 0
                yield message_line({"status": f"{short}: digest: {digest} size: {size}"})
                yield message_line({"progressDetail": {}, "aux": {"Tag": short, "Digest": digest, "Size": size}})
                engine.journal.emit("image", "push", familiar(each), {"name": familiar(each)})

    return Response(200, Stream(as_error_detail(chunks())), "application/json")


###############################################################################
# Build
###############################################################################


class ContextUnpacker(Unpacker):
    """Unpacks the tar of a build context. Owners are left out: BuildKit takes every file of a context as root's."""

    def __init__(self, root: str):
        super().__init__(root, [], owner=[-1, -1], user_namespace=bool(os.geteuid()))

    def entry(self, entry: Any, source: TarInput) -> None:
        """Unpack one entry. Folders must stay writable for what comes below them and for the cleaning up."""
        if entry.isdir():
            entry.mode |= 0o700
        super().entry(entry, source)


def unpack_context(blocks: Iterator[Any], root: str) -> None:
    """Unpack the tar of a build context (plain, gzip, bzip2, xz) below `root`, and nothing anywhere else. 400 for what
    is no tar, or names a place outside; 500 when the disk is full."""
    try:
        ContextUnpacker(root).unpack(TarInput(plain_blocks(blocks)))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ApiError("no space left on device while unpacking the build context (TMPDIR says where)") from None
        raise BadParameter(f"invalid build context: {error.strerror or error}") from None


def json_parameter(request: Request, name: str, shape: Any) -> Any:
    """A query parameter that is JSON of a shape, an empty value when absent; 400 otherwise."""
    text = request.value(name)
    return shaped(parse_json(text.encode("utf-8", "surrogateescape")) if text else None, shape, name)


def build_args(engine: Engine, request: Request) -> Tuple[List[str], List[str]]:
    """nerdctl's options of build but for Dockerfile and tags, and warnings about what nerdctl cannot express. 400
    for bad values, 501 for what would make another image than asked for."""
    # Without a value it is the client's own environment that is meant, and that is not here.
    own = {key: shaped(value, str, "buildargs") for key, value in json_parameter(
        request, "buildargs", Named(object)).items() if value is not None}
    arguments = ["--progress=rawjson", *_pairs(own, "--build-arg"),
                 *_pairs(json_parameter(request, "labels", Named(str)), "--label")]
    sources = json_parameter(request, "cachefrom", [str])
    if sources:
        # BuildKit would ask a registry for an image that is here, and it has the steps of what was built here anyway.
        here = engine.inventory.images.records()
        arguments += [f"--cache-from={each}" for each in sources if parse_reference(each).name not in here]
    arguments += [f"--add-host={each}" for value in request.values("extrahosts") for each in value.split(",") if each]
    arguments += _switch(request.flag("nocache"), "--no-cache") + _switch(request.flag("pull"), "--pull")
    arguments += _value(request.value("target"), "--target")
    arguments += [f"--platform={each}" for each in wanted_platforms(request)]
    mode = request.value("networkmode")
    arguments += [f"--network={mode}"] * (mode in ("host", "none")) + ["--allow=network.host"] * (mode == "host")
    refuse(
        (mode not in ("", "default", "bridge", "host", "none"),
         f"nerdctl cannot build in the network {mode!r}: only default, host and none"),
        (request.flag("squash"), "nerdctl cannot squash an image"),
        (request.value("outputs") not in ("", "[]", "null") and request.value("remote") != "client-session",
         "outputs are for BuildKit builds: use docker buildx"), kind=NotImplementedHere)
    limits = ("memory", "memswap", "cpushares", "cpusetcpus", "cpuperiod", "cpuquota", "shmsize", "ulimits",
              "cgroupparent")
    return arguments, [f"[Warning] {name} is not carried out: nerdctl cannot limit a build" for name in limits
                       if request.value(name) not in ("", "0", "[]", "null")]


def frontend_options(options: Iterable[str]) -> Tuple[Dict[str, str], List[str], List[str]]:
    """nerdctl's options of build for BuildKit's Dockerfile frontend: attributes, images with caches, entitlements."""
    told: Dict[str, List[str]] = collections.defaultdict(list)
    for flag, _, value in (option.partition("=") for option in options):
        told[flag].append(value)
    attributes = {f"{flag[2:]}:{key}": value for flag in ("--build-arg", "--label")
                  for key, _, value in (each.partition("=") for each in told[flag])}
    hosts = [each.replace(":", "=", 1) for each in told["--add-host"]]
    for key, values in (("target", told["--target"]), ("force-network-mode", told["--network"]),
                        ("no-cache", told["--no-cache"]), ("image-resolve-mode", ["pull"] * len(told["--pull"])),
                        ("add-hosts", hosts), ("platform", told["--platform"])):
        attributes.update({key: ",".join(values)} if values else {})
    return attributes, told["--cache-from"], told["--allow"]


def registry_config(request: Request) -> Dict[str, Dict[str, str]]:
    """The `auths` of an X-Registry-Config header: registry -> credentials."""
    text = request.headers.get("X-Registry-Config") or ""
    entries = header_json(text, {"auths": Named(AUTH)}).get("auths") or header_json(text, Named(AUTH))
    auths: Dict[str, Dict[str, str]] = {}
    for registry, entry in entries.items():
        auths.update(registry_auths(entry, re.sub(r"^https?://", "", registry).partition("/")[0]))
    return auths


def dockerfile_steps(text: str) -> List[str]:
    """The instructions of a Dockerfile, each in one line."""
    directive = re.match(r"(?:[ \t]*#[ \t]*\w+[ \t]*=.*\n)*?[ \t]*#[ \t]*escape[ \t]*=[ \t]*(\S)", text, re.I)
    escape, steps, begun = directive.group(1) if directive else "\\", [], ""
    lines = iter(text.splitlines())
    for line in lines:
        if re.match(r"\s*(#|$)", line):
            continue
        line = begun + (line if begun else line.lstrip())
        begun = line.rstrip()[:-1] if line.rstrip().endswith(escape) else ""
        if begun:
            continue
        steps.append(line.rstrip())
        words = re.findall(r"<<(-?)([\"']?)(\w+)\2", line) if re.match("(RUN|COPY|ADD) ", line, re.I) else ()
        for tabs, _, end in words:
            # A document of the step's own.
            next((each for each in lines if (each.lstrip("\t") if tabs else each) == end), None)
    return [*steps, begun] if begun else steps


class ClassicProgress:
    """BuildKit's progress of a build as the messages of Docker's classic builder: the steps of the Dockerfile in their
    order, each with its output. BuildKit tells of its steps by stage and number (`[stage-1 2/3] RUN …`)."""

    PLACE = re.compile(r"\[(?:[^\]]* )?(\d+)/\d+\] ")

    def __init__(self, dockerfile: str, labels: Iterable[str] = (), warnings: Iterable[str] = ()):
        self.steps = dockerfile_steps(dockerfile)
        # Of BuildKit's steps, by stage and number; all others are only settings of the image.
        self.places: Dict[Tuple[str, int], int] = {}
        names, count = [], 0
        stages = sum(step[:5].upper() == "FROM " for step in self.steps)
        for index, step in enumerate(self.steps):
            word, *rest = step.split()
            if word.upper() == "FROM":
                rest = [each for each in rest if not each.startswith("--")]
                inherits = rest[:1] and (rest[0].lower() in names or rest[0] == "scratch")
                names.append(rest[2].lower() if len(rest) > 2 else f"stage-{len(names)}" if stages > 1 else "")
                count = 0
            if word.upper() in ("RUN", "COPY", "ADD", "WORKDIR") or word.upper() == "FROM" and not inherits:
                count += 1
                self.places[names[-1] if names else "", count] = index
        self.steps += [f"LABEL {each}" for each in labels]
        # What stands before the first step.
        self.before = [{"stream": f"{each}\n"} for each in warnings]
        # BuildKit's steps by their digests, and of each of ours those that are not done, and what they have written.
        self.found: Dict[str, int] = {}
        self.cached: Set[str] = set()
        self.open: Dict[int, Set[str]] = collections.defaultdict(set)
        self.output: Dict[int, List[Dict[str, str]]] = collections.defaultdict(list)
        # The step that is being told of, whether its name was, and the last one that has begun.
        self.at, self.named, self.last = 0, False, -1

    def messages(self, status: Dict[str, Any]) -> Iterator[Dict[str, str]]:
        """The messages that are due after one of BuildKit's."""
        for vertex in status.get("vertexes") or ():
            self._vertex(vertex["digest"], vertex)
        for each in status.get("logs") or ():
            text = base64.b64decode(each.get("data") or "").decode(errors="replace")
            if each.get("vertex") in self.found:
                self.output[self.found[each["vertex"]]].append(
                    {"stream": f"\x1b[91m{text}\x1b[0m" if each.get("stream") == 2 else text})
        yield from self._tell(self.last)

    def _vertex(self, digest: str, vertex: Dict[str, Any]) -> None:
        place, name = self.PLACE.match(vertex.get("name") or ""), vertex.get("name") or ""
        if place:
            words = name[1:place.end() - 2].split()[:-1]
            # A platform stands before the stage where there are several.
            stage = next((each for each in words if "/" not in each), "")
            self.found.setdefault(digest, self.places.get((stage, int(place.group(1))), -1))
        elif name.startswith("[internal] load metadata for "):
            self.last = max(self.last, min(self.places.values(), default=-1))
        index = self.found.get(digest, -1)
        if index < 0:
            return
        if vertex.get("started"):
            self.last = max(self.last, index)
        if vertex.get("cached") and digest not in self.cached and self.steps[index][:5].upper() != "FROM ":
            self.cached.add(digest)
            self.output[index].append({"stream": " ---> Using cache\n"})
        if vertex.get("completed") and not vertex.get("error"):
            self.open[index].discard(digest)
        else:
            self.open[index].add(digest)

    def _tell(self, last: int) -> Iterator[Dict[str, str]]:
        """The names of steps up to `last`, and what they have written; one that is not done holds up the next."""
        while self.at <= last:
            if not self.named:
                yield from self.before
                self.before = []
                yield {"stream": f"Step {self.at + 1}/{len(self.steps)} : {self.steps[self.at]}"}
                yield {"stream": "\n"}
                self.named = True
            yield from self.output.pop(self.at, ())
            if self.open[self.at] or self.at == last:
                return
            self.at, self.named = self.at + 1, False

    def finish(self) -> Iterator[Dict[str, str]]:
        """What is left to tell of a build that has succeeded."""
        self.open.clear()
        yield from self._tell(len(self.steps) - 1)


# The fields of BuildKit's StatusResponse by their names in JSON, with those of the messages in it.
TRACE_FIELDS: Dict[str, Tuple[int, Dict[str, Tuple[int, Any]]]] = {
    "vertexes": (1, {"digest": (1, str), "inputs": (2, list), "name": (3, str), "cached": (4, int),
                     "started": (5, None), "completed": (6, None), "error": (7, str)}),
    "statuses": (2, {"id": (1, str), "vertex": (2, str), "name": (3, str), "current": (4, int), "total": (5, int),
                     "timestamp": (6, None), "started": (7, None), "completed": (8, None)}),
    "logs": (3, {"vertex": (1, str), "timestamp": (2, None), "stream": (3, int), "data": (4, bytes)}),
    "warnings": (4, {"vertex": (1, str), "level": (2, int), "short": (3, bytes), "url": (5, str)}),
}


def encode_trace(status: Dict[str, Any]) -> bytes:
    """BuildKit's StatusResponse of its progress in JSON."""
    def value_of(kind: Any, value: Any) -> Any:
        if kind is None:
            return numbered(divmod(nanoseconds_of(value) or 0, 10**9))
        return base64.b64decode(value) if kind is bytes else value

    return encode_message({number: [{fields[key][0]: value_of(fields[key][1], each[key])
                                     for key in fields if each.get(key)} for each in status.get(name) or ()]
                           for name, (number, fields) in TRACE_FIELDS.items()})


def build_failure(lines: Iterable[str]) -> Dict[str, Any]:
    """The last message of a failed build, from the last lines of its progress."""
    lines = list(lines)
    for line in reversed(lines):
        command, failed, rest = line.partition('process "')[2].rpartition(
            '" did not complete successfully: exit code: ')
        code = re.match(r"[0-9]{1,9}", rest)
        if failed and code:
            text = f"The command '{command}' returned a non-zero code: {code.group()}"
            return {"errorDetail": {"code": int(code.group()), "message": text}, "error": text}
    told = [line for line in lines if re.match(r"(error|ERROR):? ", line)]
    text = re.sub(r"^(error|ERROR):? ", "", told[-1]) if told else str(nerdctl_error("\n".join(lines)))
    return {"errorDetail": {"message": text}, "error": text}


def build_context(request: Request, folder: str) -> None:
    """Fill `folder` with the context of a build: the body unpacked, or what `remote` names (a tar, or a Dockerfile)."""
    remote = request.value("remote")
    if not remote or remote == "client-session":
        unpack_context(request.body.blocks(), folder)
        return
    if re.match(r"git://|git@|ssh://|github\.com/|https?://[^\s#]+\.git(#\S*)?$", remote):
        raise NotImplementedHere("nerdctl cannot build from a git repository: clone it, or use docker buildx")
    if not re.fullmatch(r"https?://\S+", remote):
        raise BadParameter(f"unable to prepare context: {remote!r} is not a URL")
    try:
        with open_url(remote) as answer:
            if answer.status != 200:
                raise BadParameter(f"unable to prepare context: cannot download {remote}: HTTP status {answer.status}")
            if (answer.headers.get("Content-Type") or "").startswith("text/plain"):
                data = answer.read((1 << 20) + 1)
                if len(data) > 1 << 20:
                    raise BadParameter("unable to prepare context: the Dockerfile is larger than 1 MiB")
                path = folder + os.path.normpath("/" + (request.value("dockerfile") or "Dockerfile"))
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(data)
            else:
                unpack_context(iter(lambda: answer.read(BLOCK), b""), folder)
    except (OSError, ValueError, http.client.HTTPException) as error:
        # The ValueError is urllib's for a URL that no request can be made of.
        raise BadParameter(f"unable to prepare context: cannot download {remote}: {error}") from None


def find_dockerfile(request: Request, folder: str) -> str:
    """The path of the Dockerfile; 400 when it is not in the context, or empty."""
    name = request.value("dockerfile") or "Dockerfile"
    refuse(("\0" in name, "Cannot locate specified Dockerfile: its name has a NUL byte"))
    path = os.path.realpath(os.path.join(folder, name.lstrip("/")))
    refuse((not path.startswith(os.path.realpath(folder) + "/"), f"Forbidden path outside the build context: {name}"),
           (not os.path.isfile(path), f"Cannot locate specified Dockerfile: {name}"))
    refuse((not os.path.getsize(path), f"the Dockerfile ({name}) cannot be empty"))
    return path


def build_messages(process: Process, progress: Callable[[Dict[str, Any]], Iterable[bytes]],
                   quiet: bool) -> Iterator[bytes]:
    """The messages of a running build, which `progress` makes of BuildKit's; if `quiet`, only where it fails. The last
    one tells of a failure; where nothing was told before, that is 400, and 503 where there is no buildkitd."""
    last: Deque[str] = collections.deque(maxlen=200)
    begun, held = False, []
    for line in process.lines(process.stderr):
        status = json_of(dict, line)
        if not status:
            last.append(line)
        for message in progress(status):
            begun = True
            if quiet:
                held.append(message)
            else:
                yield message
    if process.wait():
        # With BUILDKIT_HOST set, nerdctl ends without a word when nobody answers there.
        error = nerdctl_error("\n".join(last) or "no buildkit host is available")
        if isinstance(error, Unavailable):
            raise error
        failure = build_failure(last)
        if not begun:
            raise BadParameter(re.sub("^failed to solve: ", "", failure["error"]))
        yield from [*held, message_line(failure)]


def build_from_context(engine: Engine, request: Request) -> Response:
    """Build an image of a context that came with the request, or that it names. With version=2 the progress is
    BuildKit's own, else that of Docker's classic builder."""
    arguments, warnings = build_args(engine, request)
    auths = registry_config(request)
    tags = build_tags(request)
    names = tags or [f"{WORKING_NAME}build:{os.urandom(8).hex()}"]
    quiet, classic = request.flag("q"), request.value("version") != "2"

    def chunks() -> Iterator[bytes]:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(temporary_folder("build"))
            environment = stack.enter_context(credentials_folder(auths)) if auths else None
            build_context(request, folder)
            path = find_dockerfile(request, folder)
            with open(path, encoding="utf-8", errors="replace") as file:
                told = ClassicProgress(file.read(), [each.partition("=")[2] for each in arguments
                                                     if each.startswith("--label=")], warnings)
            if not told.steps:
                raise BadParameter("failed to parse Dockerfile: file with no instructions")
            stack.enter_context(engine.changing_images(names))
            process = stack.enter_context(engine.nerdctl.build([*arguments, f"--file={path}"], names, folder,
                                                               environment, request.client))
            yield from build_messages(
                process, lambda status: map(message_line, told.messages(status)) if classic
                else [trace_line(encode_trace(status))] if status else (), quiet)
            if process.wait():
                return
        group = engine.inventory.image(names[0])
        for name in names if tags else ():
            engine.tell_image("tag", group, familiar(name))
        if quiet:
            messages = [{"stream": group.id + "\n"}]
        elif not classic:
            messages = [{"id": "moby.image.id", "aux": {"ID": group.id}}]
        else:
            messages = [*told.finish(), {"aux": {"ID": group.id}}, {"stream": f"Successfully built {group.id[7:19]}\n"},
                        *({"stream": f"Successfully tagged {familiar(name)}\n"} for name in names if tags)]
        yield from map(message_line, messages)

    return Response(200, Stream(as_error_detail(chunks()), primed=True), "application/json")


def build_tags(request: Request) -> List[str]:
    """The names that an image is to get, in full; 400 for what is none."""
    tags = [parse_reference(each) for each in request.values("t") if each]
    if any(each.digest for each in tags):
        raise BadParameter("refusing to create a tag with a digest reference")
    return [each.name for each in tags]


def trace_line(message: Any) -> bytes:
    """A StatusResponse of BuildKit as clients of BuildKit read it in the stream of a build."""
    return message_line({"id": "moby.buildkit.trace", "aux": base64.b64encode(message).decode()})


def docker_cache(record: Dict[str, Any]) -> Dict[str, Any]:
    """A record of BuildKit's cache as Docker shows it."""
    return {
        "ID": record.get("id") or "", "Parents": record.get("parents") or None, "Type": record.get("recordType")
        or record.get("type") or "regular",
        "Description": record.get("description") or "", "InUse": bool(record.get("inUse")),
        "Shared": bool(record.get("shared")),
        "Size": record.get("size") or 0, "CreatedAt": record.get("createdAt") or ZERO_TIME,
        "LastUsedAt": record.get("lastUsedAt"),
        "UsageCount": record.get("usageCount") or 0,
    }


def cache_records(data: bytes) -> List[Dict[str, Any]]:
    """The records of BuildKit's cache that buildctl prints: one or a list of them a line, `null` for none."""
    return [each for row in parse_rows(data) for each in (row if isinstance(row, list) else [row]) if each]


def build_cache(engine: Engine) -> List[Dict[str, Any]]:
    """The records of BuildKit's cache; none where there is no buildctl or no buildkitd answers."""
    data = b""
    with contextlib.suppress(ApiError):
        data = engine.nerdctl.buildctl().run("du", "--format", "{{json .}}").stdout
    return list(map(docker_cache, cache_records(data)))


PRUNE_FILTERS = ("description", "id", "inuse", "label", "parent", "private", "shared", "type", "until", "unused-for")
NO_BUILDKIT = "install or start it with a containerd worker, or say where it is with --buildkit-host"


@route("POST", "/build/prune")
def build_prune(engine: Engine, request: Request) -> Response:
    """Remove build cache, by BuildKit's own filters and `until`; 503 without buildctl or a buildkitd that answers."""
    filters = request.filters(*PRUNE_FILTERS)
    arguments = ["prune", "--format", "{{json .}}", *_switch(request.flag("all"), "--all")]
    for key, values in filters.items():
        for value in values:
            if key in ("until", "unused-for"):
                age = (time.time_ns() - (until_limit([value]) or 0)) / 1e9
                arguments.append(f"--keep-duration={max(0, round(age))}s")
            else:
                arguments.append(f"--filter={key}=={value}" if key not in ("inuse", "private", "shared")
                                 else f"--filter={key}")
    reserved = request.integer("reserved-space") or request.integer("keep-storage")
    limit = request.integer("max-used-space")
    for flag, size in (("keep-storage", limit or reserved), ("keep-storage-min", reserved if limit else 0),
                       ("free-storage", request.integer("min-free-space"))):
        arguments += [f"--{flag}={size / 1e6:g}"] if size else []
    output = engine.nerdctl.buildctl().output(*arguments, timeout=600)
    if output.status:
        raise nerdctl_error(output.stderr) if "dial" not in output.stderr else Unavailable(
            f"buildkitd does not answer: {NO_BUILDKIT}")
    rows = cache_records(output.stdout)
    engine.journal.emit("builder", "prune", "", {"reclaimed": str(sum(row.get("size") or 0 for row in rows))})
    return Response(200, {"CachesDeleted": [row.get("id") for row in rows] or None,
                          "SpaceReclaimed": sum(row.get("size") or 0 for row in rows)})


###############################################################################
# Containers
###############################################################################

REQUEST_PART = 3900


def status_text(state: State, now: float) -> str:
    """The status as `docker ps` words it: `Up 5 minutes (healthy)`, `Exited (0) 2 hours ago`, `Created`."""
    if state.running:
        text = "Up " + human_duration(max(0.0, now - (state.started_at or 0) / 1e9))
        if state.kind == "paused":
            return text + " (Paused)"
        if state.health:
            text += f" (health: {state.health})" if state.health == "starting" else f" ({state.health})"
        return text
    if state.kind in ("exited", "restarting"):
        ended = f" {human_duration(max(0.0, now - state.finished_at / 1e9))} ago" if state.finished_at else ""
        return f"{state.kind.capitalize()} ({state.exit_code or 0}){ended}"
    return state.kind.capitalize()


def docker_mounts(container: Container) -> List[Dict[str, Any]]:
    """The mounts of a container as Docker shows them: of those in memory only what was asked for as a mount."""
    host, mounts = container.host_config, []
    shown = [os.path.normpath(each["Target"]) for each in host.get("Mounts") or []]
    binds = [each.split(":") for each in host.get("Binds") or []]
    modes = {**{os.path.normpath(parts[:2][-1]): "".join(parts[2:]) for parts in binds}, **dict.fromkeys(shown, "")}
    for each in container.mounts:
        target, kind = each["Destination"], each["Type"]
        mode = modes.get(target, "" if container.request else each["Mode"])
        if kind != "tmpfs":
            mounts.append({**each, "Mode": mode or "z" * (kind == "volume" and target in modes),
                           "Propagation": each["Propagation"] or "rprivate" * (kind == "bind")})
        elif target in shown:
            mounts.append({**each, "Source": "", "Mode": ""})
    return mounts


def request_labels(body: Dict[str, Any], old: Iterable[str] = ()) -> Dict[str, str]:
    """The create request as labels that fit nerdctl's 4096 bytes each, in place of those among `old` names."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True)
    parts = [text[start:start + REQUEST_PART] for start in range(0, len(text), REQUEST_PART)]
    return {**{key: "" for key in old if key.startswith(LABEL_REQUEST + ".")},
            **{f"{LABEL_REQUEST}.{number}": part for number, part in enumerate(parts)}}


def endpoint_id(container: Container, network: Dict[str, Any]) -> str:
    """The id of a container's endpoint in a network."""
    return sha256(f"{container.id}/{network.get('Id') or ''}".encode()).hexdigest()


def endpoint(container: Container, network: Dict[str, Any], address: Dict[str, Any],
             asked: Dict[str, Any]) -> Dict[str, Any]:
    """One entry of NetworkSettings.Networks: of a network as Docker shows it, the address of the container's interface
    in it, and the EndpointSettings that were asked for."""
    running = bool(address)
    identity = network.get("Id") or ""
    configs = (network.get("IPAM") or {}).get("Config") or []
    config, config6 = (next((each for each in configs if (":" in each.get("Subnet", "")) is six), {})
                       for six in (False, True))
    names = None if network.get("Name") in ("bridge", "host", "none") else list(dict.fromkeys(filter(None, (
        container.name, *(asked.get("Aliases") or []), container.id[:12], container.labels.get("nerdctl/hostname")))))
    return {
        "IPAMConfig": asked.get("IPAMConfig"), "Links": asked.get("Links"), "Aliases": asked.get("Aliases"),
        "DriverOpts": asked.get("DriverOpts"), "GwPriority": asked.get("GwPriority") or 0, "NetworkID": identity,
        "EndpointID": endpoint_id(container, network) if running else "",
        "Gateway": config.get("Gateway") or "" if running else "", "IPAddress": address.get("ip") or "",
        "MacAddress": (address.get("mac") if running or container.state.kind != "created" or container.state.error
                       else asked.get("MacAddress")) or "",
        "IPPrefixLen": address.get("prefix") or 0, "GlobalIPv6Address": address.get("ip6") or "",
        "IPv6Gateway": config6.get("Gateway") or "" if address.get("ip6") else "",
        "GlobalIPv6PrefixLen": address.get("prefix6") or 0, "DNSNames": names,
    }


def docker_networks(container: Container, networks: Dict[str, Dict[str, Any]]) -> Dict[str, Any]:
    """NetworkSettings.Networks: the container's networks by name, with the addresses of its interfaces."""
    addresses, found = noted_addresses(container), {}
    for name in network_names(container) if not network_mode(container).startswith("container:") else ():
        network = networks.get(name) or {}
        found[network.get("Name") or name] = endpoint(container, network, addresses.get(name, {}),
                                                      asked_endpoint(container, name))
    return found


def hooked_networks(endpoints: Dict[str, Dict[str, Any]], mac: str) -> Tuple[List[str], Dict[str, str]]:
    """Those of a container's networks, EndpointSettings by name, that nerdctl's hook attaches it to: it gives all of
    them the same address, so that where one has its own it is told of the first one only. And that address, with `mac`
    for one that has none, by nerdctl's words."""
    fixed = any(each.get("MacAddress") or any((each.get("IPAMConfig") or {}).values()) for each in endpoints.values())
    names = list(endpoints)[:1] if fixed else list(endpoints)
    only = endpoints[names[0]] if len(names) == 1 else {}
    address = only.get("IPAMConfig") or {}
    return names, {"ip": address.get("IPv4Address") or "", "ip6": address.get("IPv6Address") or "",
                   "mac-address": only.get("MacAddress") or mac * (len(names) == 1)}


def keep_networks(engine: Engine, container: Container, endpoints: Dict[str, Dict[str, Any]],
                  more: Dict[str, str]) -> None:
    """Keep which networks a container has, with their EndpointSettings by name, and `more` labels. attach_networks()
    does what nerdctl's hook does not."""
    names, request = list(endpoints), container.request
    hooked, address = hooked_networks(endpoints, request.get("MacAddress") or "")
    told = {"nerdctl/networks": json.dumps([*map(cni_name, hooked)] or ["none"]),
            **{f"nerdctl/{key}": value for key, value in address.items()}}
    labels = {**told, "nerdctl/networks": json.dumps([*map(cni_name, names)] or ["none"]),
              LABEL_ALONE: "" if names else "true", **more}
    if request:
        host = {**container.host_config, "NetworkMode": network_mode(container)}
        labels.update(request_labels({**request, "HostConfig": host, "NetworkingConfig": {
            "EndpointsConfig": endpoints}}, container.labels))
    annotations = {**(container.spec.get("annotations") or {}), **told}
    annotations = {key: value for key, value in annotations.items() if value or key not in told}
    engine.update(container, labels, {**container.spec, "annotations": annotations})


# Init processes that need no libc of the image.
STATIC_INITS = ("docker-init", "tini-static")
# What nerdctl puts in front of the command of a container with an init process: it has the name of the host's program.
INIT_WORDS = [[f"/sbin/{each}", "--"] for each in ("tini", *STATIC_INITS)]


def own_arguments(container: Container) -> List[str]:
    """The words of its command line without the init process that was asked for."""
    words = container.process.get("args") or []
    return words[2:] if container.host_config.get("Init") and words[:2] in INIT_WORDS else words


def open_ports(container: Container) -> List[Dict[str, Any]]:
    """The ports of a running container: those published, and those only exposed, without a port of the host."""
    shared = {"host", "none"} & set(network_names(container)) or network_mode(container).startswith("container:")
    if shared or not container.running:
        return []
    ports = container.ports
    published = {(each["PrivatePort"], each["Type"]) for each in ports}
    exposed = {(int_or_zero(number), kind or "tcp") for number, _, kind in (
        each.partition("/") for each in container.request.get("ExposedPorts") or {})}
    return ports + [{"PrivatePort": number, "Type": kind} for number, kind in sorted(exposed - published) if number]


def lasting_row(container: Container) -> Dict[str, Any]:
    """What `/containers/json` lists of a container that stays so until an event tells of it."""
    if "row" not in container.memo:
        program, words = own_arguments(container)[:1], own_arguments(container)[1:]
        container.memo["row"] = {
            "Id": container.id, "Names": ["/" + container.name], "Image": container.asked_image, "ImageID": "",
            "Command": " ".join([*program, *(f"'{each}'" if " " in each else each for each in words)]),
            "Created": container.created // 10**9, "Ports": open_ports(container), "Labels": container.visible_labels,
            "State": container.state.kind, "Status": "", "HostConfig": {"NetworkMode": network_mode(container)},
            "NetworkSettings": {}, "Mounts": docker_mounts(container),
        }
    return container.memo["row"]


def container_rows(engine: Engine, containers: Iterable[Container], among: Iterable[Container],
                   sizes: Dict[str, Tuple[int, int]], version: Tuple[int, int]) -> List[Dict[str, Any]]:
    """Containers, of all that there are, as `/containers/json` lists them, with their sizes where they are known."""
    named, networks = engine.inventory.images.by_name(), engine.inventory.networks()
    groups = {group.id: group for group in named.values()}
    rows, now, linked = [], time.time(), linked_names(among)
    for container in containers:
        image, shown = image_id(container, named), named.get(container.image)
        row = {**lasting_row(container), "ImageID": image, "Status": status_text(container.state, now),
               "NetworkSettings": {"Networks": docker_networks(container, networks)}}
        # As with dockerd, a name that stands for another image by now says nothing of this one.
        row.update({"Image": image} if image and (not shown or shown.id != image) else {})
        row["Names"] = [*row["Names"], *linked.get(container.id, ()), *linked.get(container.name, ())]
        annotations = container.host_config.get("Annotations")
        if annotations and version >= (1, 46):
            row["HostConfig"] = {**row["HostConfig"], "Annotations": annotations}
        if image in groups and version >= (1, 48):
            row["ImageManifestDescriptor"] = docker_manifest_descriptor(container_content(groups[image], container))
        if version >= (1, 52):
            row["Health"] = {"Status": container.state.health or "none", "FailingStreak": container.state.failing}
        if container.id in sizes:
            row["SizeRw"], row["SizeRootFs"] = sizes[container.id]
        rows.append(row)
    return rows


CONTAINER_FILTERS = ("ancestor", "before", "expose", "exited", "health", "id", "isolation", "is-task", "label", "name",
                     "network", "publish", "since", "status", "volume")
STATES = ("created", "running", "paused", "restarting", "removing", "exited", "dead")
HEALTH_STATES = ("none", "starting", "healthy", "unhealthy")


def check_container_filters(filters: Dict[str, List[str]]) -> None:
    """400 with dockerd's words for a filter value that cannot be."""
    for key, word, known in (("status", "state", STATES), ("health", "health", HEALTH_STATES)):
        for each in filters.get(key) or []:
            refuse((each not in known, f"invalid value for {word} ({each}): must be one of {', '.join(known)}"))
    for each in filters.get("exited") or []:
        refuse((not re.fullmatch(r"-?\d+", each), f"invalid filter 'exited={each}'"))


def match_port(ports: List[Dict[str, Any]], key: str, wanted: List[str]) -> bool:
    """Whether a publish or expose filter (`80`, `80/tcp`, `80-90`) names one of the ports."""
    for text in wanted:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?(?:/(\w+))?", text)
        refuse((not found, f"invalid filter: {text!r} is not a port"))
        low, high = int(found.group(1)), int(found.group(2) or found.group(1))
        if any(low <= port.get(key, -1) <= high and port["Type"] == (found.group(3) or "tcp") for port in ports):
            return True
    return False


def match_container(engine: Engine, container: Container, filters: Dict[str, List[str]], named: NameFilter) -> bool:
    """Whether a container passes the filters of the list but before, since and ancestor; `named` is that by name."""
    if not filters:
        return True
    state, networks = container.state, network_names(container)
    checks: Dict[str, Callable[[List[str]], bool]] = {
        "id": lambda wanted: any(container.id.startswith(each) for each in wanted),
        "name": lambda wanted: named.passes(container.name, "/" + container.name),
        "label": lambda wanted: match_labels(container.visible_labels, wanted),
        "status": lambda wanted: state.kind in wanted,
        "exited": lambda wanted: state.kind == "exited" and str(state.exit_code) in wanted,
        "health": lambda wanted: (state.health or "none") in wanted,
        "network": lambda wanted: any(each in networks or any(
            (engine.inventory.networks().get(name) or {}).get("Id", "").startswith(each) for name in networks)
            for each in wanted),
        "volume": lambda wanted: any(each in (mount.get("Name"), mount["Destination"], mount["Source"])
                                     for each in wanted for mount in container.mounts),
        "publish": lambda wanted: match_port(container.ports, "PublicPort", wanted),
        "expose": lambda wanted: match_port(container.ports, "PrivatePort", wanted),
        "isolation": lambda wanted: True,
        "is-task": lambda wanted: "false" in [each.lower() for each in wanted] or "0" in wanted,
    }
    return all(checks[key](wanted) for key, wanted in filters.items() if key in checks and wanted)


def list_containers(engine: Engine, among: Iterable[Container], filters: Dict[str, List[str]], everything: bool,
                    limit: int) -> List[Container]:
    """The containers of a list request, of all that there are, newest first."""
    check_container_filters(filters)
    named = NameFilter(filters.get("name") or [])
    table = sorted(among, key=lambda each: -each.created)
    for key, later in (("before", False), ("since", True)):
        for name in filters.get(key) or []:
            moment = engine.inventory.container(name).created
            table = [each for each in table if (each.created > moment if later else each.created < moment)]
    if filters.get("ancestor"):
        images, wanted = engine.inventory.images.by_name(), set()
        for name in filters["ancestor"]:
            with contextlib.suppress(ApiError):
                wanted.add(engine.inventory.image(name).id)
        table = [each for each in table if image_id(each, images) in wanted]
    if limit > 0 or filters.get("status") or filters.get("exited") or filters.get("before") or filters.get("since"):
        everything = True
    found = [each for each in table
             if (everything or each.running or each.state.kind == "restarting")
             and match_container(engine, each, filters, named)]
    return found[:limit] if limit > 0 else found


def container_sizes(engine: Engine, containers: Iterable[Container]) -> Dict[str, Tuple[int, int]]:
    """containerd's id -> bytes written (-1 where that cannot be found) and in all, read anew: no event has them."""
    found, below = {}, {}
    for container in containers:
        snapshotter, key = container.record.snapshotter, container.record.snapshot_key
        with contextlib.suppress(NotFound):
            parent, written = engine.containerd.snapshot_parent(snapshotter, key), -1
            # containerd fails where a path is longer than the kernel takes in one piece.
            with contextlib.suppress(ApiError):
                written = engine.containerd.snapshot_usage(snapshotter, key)
            found[container.id] = (written, max(written, 0) + layers_size(engine, snapshotter, parent, below))
    return found


def layers_size(engine: Engine, snapshotter: str, key: str, known: Dict[str, int]) -> int:
    """Bytes of a snapshot and all below it; `known` are those that were asked for before."""
    if key and key not in known:
        known[key] = engine.containerd.snapshot_usage(snapshotter, key) + layers_size(
            engine, snapshotter, engine.containerd.snapshot_parent(snapshotter, key), known)
    return known.get(key, 0)


@route("GET", "/containers/json")
def container_list(engine: Engine, request: Request) -> Response:
    """Containers, newest first: the running ones, or `all`; `limit`, `size`, and all of the API's filters."""
    filters = request.filters(*CONTAINER_FILTERS)
    limit = request.integer("limit", -1)
    containers = engine.inventory.containers().values()
    found = list_containers(engine, containers, filters, request.flag("all"), limit)
    sizes = container_sizes(engine, found) if request.flag("size") else {}
    return Response(200, container_rows(engine, found, containers, sizes, request.version) if found else [])


# The HostConfig of a container for which nothing was asked: Go's zero values, without what dockerd leaves out.
LEFT_OUT = ("Annotations", "Init", "KernelMemory", "Mounts", "StorageOpt", "Sysctls", "Tmpfs")
HOST_CONFIG: Dict[str, Any] = {
    **{key: shape() if isinstance(shape, type) else None for key, shape in HOST_CONFIG_FIELDS.items()
       if key not in LEFT_OUT},
    **{key: [] for key in ("BlkioWeightDevice", "Devices", "Dns", "DnsOptions", "DnsSearch", "MaskedPaths",
                           "ReadonlyPaths", "Ulimits")},
    "ConsoleSize": [0, 0], "MemorySwappiness": None, "PidsLimit": None, "Runtime": "runc", "ShmSize": 64 << 20,
}


# Field of a HostConfig -> where an OCI spec has it.
SPEC_FIELDS = {
    "BlkioWeight": "linux.resources.blockIO.weight", "CpuPeriod": "linux.resources.cpu.period",
    "CpuQuota": "linux.resources.cpu.quota", "CpuShares": "linux.resources.cpu.shares",
    "CpusetCpus": "linux.resources.cpu.cpus", "CpusetMems": "linux.resources.cpu.mems",
    "MaskedPaths": "linux.maskedPaths", "Memory": "linux.resources.memory.limit",
    "MemoryReservation": "linux.resources.memory.reservation", "MemorySwap": "linux.resources.memory.swap",
    "OomScoreAdj": "process.oomScoreAdj", "PidsLimit": "linux.resources.pids.limit",
    "ReadonlyPaths": "linux.readonlyPaths", "ReadonlyRootfs": "root.readonly",
}
# Docker's own name for what nerdctl runs containers with where nobody asks for another runtime.
DEFAULT_RUNTIME = {"io.containerd.runc.v2": "runc"}


def port_bindings(ports: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Docker's port map of a list of ports, with None for one that is only exposed."""
    found: Dict[str, Any] = {}
    for port in ports:
        places = found.setdefault(f"{port['PrivatePort']}/{port['Type']}", [] if "PublicPort" in port else None)
        if places is not None:
            places.append({"HostIp": port["IP"], "HostPort": str(port["PublicPort"])})
    return found


# What dockerd fills in where nothing is asked for, by 0 or "" too.
FILLED_IN = ("CgroupnsMode", "ConsoleSize", "IpcMode", "MemorySwap", "NetworkMode", "PidsLimit", "Runtime", "ShmSize")
# What an update changes, and bare `nerdctl update`, too.
UPDATED_FIELDS = ("NanoCpus", *(key for key, path in SPEC_FIELDS.items() if path.startswith("linux.resources.")))


def has_namespace(spec: Dict[str, Any], kind: str) -> bool:
    """Whether an OCI spec has a namespace of a kind, its own or that of another container: else it is the host's."""
    return any(each.get("type") == kind for each in (spec.get("linux") or {}).get("namespaces") or [])


def docker_host_config(container: Container, spec: Dict[str, Any]) -> Dict[str, Any]:
    """HostConfig: what the OCI spec and nerdctl's labels tell, under what the client asked for."""
    labels, logged = container.labels, json_of(dict, container.labels.get("nerdctl/log-config"))
    found = {**HOST_CONFIG, **{key: field_of(spec, path) or HOST_CONFIG[key] for key, path in SPEC_FIELDS.items()}}
    policy, _, tries = (labels.get("containerd.io/restart.policy") or "no").partition(":")
    found.update({
        "AutoRemove": labels.get("nerdctl/auto-remove") == "true",
        "IpcMode": json_of(dict, container.labels.get("nerdctl/ipc")).get("mode") or "private",
        "LogConfig": {"Type": logged.get("driver") or "json-file", "Config": logged.get("opts") or {}},
        "NetworkMode": network_mode(container),
        "PortBindings": {} if container.request else port_bindings(container.asked_ports),
        "Privileged": labels.get("nerdctl/privileged") == "true",
        "RestartPolicy": {"Name": policy, "MaximumRetryCount": int_or_zero(tries)},
        "Runtime": DEFAULT_RUNTIME.get(container.runtime, container.runtime) or found["Runtime"],
        "Binds": [f"{mount['Source']}:{mount['Destination']}" + ("" if mount["RW"] else ":ro")
                  for mount in container.mounts if mount["Type"] == "bind" and not container.request] or None,
        "CgroupnsMode": "private" if has_namespace(spec, "cgroup") else "host",
    })
    asked = container.host_config
    found["PidsLimit"] = found["PidsLimit"] and max(0, found["PidsLimit"])
    if found["CpuQuota"] > 0 and found["CpuPeriod"] and not (asked.get("CpuPeriod") or asked.get("CpuQuota")):
        found.update({"NanoCpus": found["CpuQuota"] * 10**9 // found["CpuPeriod"], "CpuPeriod": 0, "CpuQuota": 0})
    if asked:
        # nerdctl fills in what goes with the other one.
        found.update({key: 0 for key in ("CpuPeriod", "CpuQuota") if not asked.get(key)})
    for key, value in asked.items():
        if (key == "RestartPolicy" or key in UPDATED_FIELDS and found.get(key)
                or key in ("MemorySwappiness", "PidsLimit") and value < 0):
            # The spec has what it was changed to; or it is Docker's word for none.
            continue
        if key == "PortBindings":
            value = {port if "/" in port else port + "/tcp": [{"HostIp": "", "HostPort": "", **each} for each in places
                                                              or []]
                     for port, places in value.items()}
        if key == "LogConfig":
            value = {**value, "Type": value.get("Type") or found[key]["Type"], "Config": value.get("Config") or {}}
        if value or key not in FILLED_IN:
            found[key] = value
    if found["NetworkMode"] == "default":
        found["NetworkMode"] = network_mode(container)
    return found


def docker_config(container: Container, spec: Dict[str, Any], image: Dict[str, Any]) -> Dict[str, Any]:
    """Config: what the client asked for with the image's defaults under it, or what the OCI spec tells."""
    asked, process = container.request, spec.get("process") or {}
    arguments = process.get("args") or []
    entrypoint = image.get("Entrypoint") or None
    command = arguments
    if entrypoint and arguments[:len(entrypoint)] == entrypoint:
        command = arguments[len(entrypoint):]
    else:
        entrypoint = None
    if asked:
        entrypoint = asked.get("Entrypoint", image.get("Entrypoint"))
        entrypoint = None if entrypoint == [""] else entrypoint
        command = asked.get("Cmd") or (None if asked.get("Entrypoint") else image.get("Cmd"))
    if asked and image:
        names = {each.partition("=")[0] for each in asked.get("Env") or []}
        environment = [*(asked.get("Env") or []), *(each for each in image.get("Env") or []
                                                    if each.partition("=")[0] not in names)]
    else:
        # What has no value is no variable, and dockerd keeps it nevertheless.
        environment = [*(each for each in process.get("env") or [] if not each.startswith("HOSTNAME=")),
                       *(each for each in asked.get("Env") or [] if "=" not in each)]
    found = {
        "Hostname": spec.get("hostname") or container.labels.get("nerdctl/hostname") or "",
        "Domainname": asked.get("Domainname") or container.labels.get("nerdctl/domainname") or "",
        "User": asked.get("User") or container.labels.get("nerdctl/user") or image.get("User") or "",
        "AttachStdin": bool(asked.get("AttachStdin")),
        "AttachStdout": bool(asked.get("AttachStdout", not asked)),
        "AttachStderr": bool(asked.get("AttachStderr", not asked)),
        "Tty": bool(asked.get("Tty", process.get("terminal", False))), "OpenStdin": bool(asked.get("OpenStdin", False)),
        "StdinOnce": bool(asked.get("StdinOnce", False)),
        "Env": environment or None,
        "Cmd": command, "Image": container.asked_image, "Volumes": asked.get("Volumes") or image.get("Volumes"),
        "WorkingDir": asked.get("WorkingDir") or (image.get("WorkingDir") if asked else process.get("cwd")) or "",
        "Entrypoint": entrypoint,
        # nerdctl 1.7 does not keep those of the image.
        "Labels": {**(image.get("Labels") or {}), **container.visible_labels},
    }
    ports = {**{key: {} for key in port_bindings(container.asked_ports)}, **(image.get("ExposedPorts") or {}),
             **{key if "/" in key else key + "/tcp": {} for key in asked.get("ExposedPorts") or {}}}
    if ports:
        found["ExposedPorts"] = ports
    for key in ("Healthcheck", "StopSignal", "StopTimeout", "Shell", "MacAddress", "NetworkDisabled", "OnBuild"):
        if asked.get(key) or image.get(key) or key == "StopTimeout" and asked.get(key) is not None:
            found[key] = asked.get(key) or image.get(key) or asked[key]
    if not asked and container.health_check:
        found["Healthcheck"] = container.health_check
    return found


def docker_state(container: Container, out_of_memory: bool) -> Dict[str, Any]:
    """State, with times of RFC 3339, and with the health of a container with health checks that was started."""
    state = container.state
    found = {
        "Status": state.kind, "Running": state.running or state.kind == "restarting", "Paused": state.kind == "paused",
        "Restarting": state.kind == "restarting", "OOMKilled": out_of_memory, "Dead": state.kind == "dead",
        "Pid": state.pid, "ExitCode": state.exit_code or 0, "Error": state.error,
        "StartedAt": rfc3339(state.started_at), "FinishedAt": rfc3339(state.finished_at),
    }
    if state.health:
        found["Health"] = {"Status": state.health, "FailingStreak": state.failing, "Log": health_results(container)}
    return found


def docker_container(engine: Engine, container: Container, image: Optional[ImageGroup],
                     version: Tuple[int, int]) -> Dict[str, Any]:
    """A container as `/containers/{id}/json` shows it."""
    spec, arguments = container.spec, own_arguments(container) or [""]
    config = docker_config(container, spec, (image.config.get("config") or {}) if image else {})
    hosts = next((each["source"] for each in spec.get("mounts") or [] if each.get("destination") == "/etc/hosts"), "")
    driver = container.record.snapshotter or "overlayfs"
    found = {
        "Id": container.id, "Created": rfc3339(container.created), "Path": arguments[0], "Args": arguments[1:],
        "State": docker_state(container, container.id in engine.inventory.out_of_memory),
        "Image": image.id if image else image_id(container, {}),
        "ResolvConfPath": os.path.join(container.folder, "resolv.conf") if container.folder else "",
        "HostnamePath": os.path.join(container.folder, "hostname") if container.folder else "", "HostsPath": hosts,
        "LogPath": log_path(container), "Name": "/" + container.name,
        "RestartCount": int_or_zero(container.labels.get("containerd.io/restart.count") or ""),
        "Driver": driver, "Platform": "linux", "MountLabel": "", "ProcessLabel": "",
        "AppArmorProfile": (spec.get("process") or {}).get("apparmorProfile") or "",
        "ExecIDs": [each.id for each in list(engine.execs.values()) if each.code is None
                    and each.container.id == container.id] or None,
        "HostConfig": {**docker_host_config(container, spec), "Links": docker_links(engine, container)},
        "GraphDriver": {"Data": None, "Name": driver},
        "Mounts": docker_mounts(container), "Config": config,
        "NetworkSettings": network_settings(container, config, docker_networks(container, engine.inventory.networks()),
                                            version),
    }
    if version >= (1, 52):
        found["Storage"] = {"RootFS": {"Snapshot": {"Name": found.pop("GraphDriver")["Name"]}}}
    if version >= (1, 48) and image:
        found["ImageManifestDescriptor"] = docker_manifest_descriptor(container_content(image, container))
    return found


def docker_links(engine: Engine, container: Container) -> Optional[List[str]]:
    """HostConfig.Links: `/other:/name/alias` for each container in the default network that it is linked to, and as
    they were asked for in any other network."""
    known, found = engine.inventory.containers() if container.links else {}, []
    names = {each.name: each for each in known.values()}
    for alias, other in container.links.items():
        child = known.get(other) or names.get(other)
        found += [f"/{child.name}:/{container.name}/{alias}"] if child else []
    return found or (None if container.links else container.host_config.get("Links") or None)


def linked_names(containers: Iterable[Container]) -> Dict[str, List[str]]:
    """By their names and ids the names that these containers have for others, `/name/alias`."""
    found: Dict[str, List[str]] = {}
    for each in containers:
        for alias, other in each.links.items():
            found.setdefault(other, []).append(f"/{each.name}/{alias}")
    return found


def network_settings(container: Container, config: Dict[str, Any], attached: Dict[str, Any],
                     version: Tuple[int, int]) -> Dict[str, Any]:
    """NetworkSettings, before API 1.52 with the fields of the default network, if it is in that, once more, and before
    1.45 with the short id and the host name among the aliases of any other."""
    settings = {
        "SandboxID": sha256(container.id.encode()).hexdigest() if container.running else "", "SandboxKey": "",
        "Ports": port_bindings(open_ports(container)), "Networks": attached,
    }
    for name in attached.keys() - {"bridge", "host", "none"} if version < (1, 45) else ():
        more = [container.id[:12], config["Hostname"]]
        attached[name]["Aliases"] = list(dict.fromkeys([*(attached[name]["Aliases"] or []), *more]))
    if version < (1, 52) and "bridge" in attached:
        settings.update({key: attached["bridge"][key] for key in (
            "EndpointID", "Gateway", "GlobalIPv6Address", "GlobalIPv6PrefixLen", "IPAddress", "IPPrefixLen",
            "IPv6Gateway", "MacAddress")})
    return settings


def log_path(container: Container) -> str:
    """The json-file log of a container, "" where its log driver is another one."""
    driver = json_of(dict, container.labels.get("nerdctl/log-config")).get("driver") or "json-file"
    if driver != "json-file" or not container.folder or container.labels.get("nerdctl/log-uri") == "none":
        return ""
    return os.path.join(container.folder, container.id + "-json.log")


# As many results of health checks as Docker shows, and as much of the output of each. nerdctl keeps more.
HEALTH_RESULTS, HEALTH_OUTPUT = 5, 4096


def health_results(container: Container) -> List[Dict[str, Any]]:
    """The last results of a container's health checks, oldest first. nerdctl keeps one a line in a file."""
    found: List[Dict[str, Any]] = []
    with contextlib.suppress(OSError), open(os.path.join(container.folder, "health.json"), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (8 << 20)))
        for line in collections.deque(file, HEALTH_RESULTS):
            with contextlib.suppress(ValueError, TypeError):
                row = json.loads(line)
                found.append({**row, "Output": row["Output"][:HEALTH_OUTPUT] + "..."
                              if len(row["Output"]) > HEALTH_OUTPUT + 3 else row["Output"]})
    return found


def note_health(engine: Engine, container: Container, status: str = "starting", failing: int = 0, pid: int = 0) -> None:
    """Keep the health of a container's process where nerdctl keeps it, too, if that is news. Without a process, that of
    one which is about to start. Nothing for a container without health checks."""
    check = container.health_check
    told = json.dumps({"Status": status, "FailingStreak": failing, "Pid": pid,
                       "InStartPeriod": status == "starting" and bool(check.get("StartPeriod"))})
    if check and told != container.labels.get("nerdctl/healthstate"):
        engine.update(container, {"nerdctl/healthstate": told})


def image_of(engine: Engine, container: Container) -> Optional[ImageGroup]:
    """The image of a container, None when it is there no more."""
    images = engine.inventory.images
    return images.get().get(image_id(container, images.by_name()))


@route("GET", "/containers/{id}/json")
def container_inspect(engine: Engine, request: Request, name: str) -> Response:
    """One container in full; with `size` also the bytes it takes. 404 when there is none."""
    container = engine.inventory.container(name)
    told = docker_container(engine, container, image_of(engine, container), request.version)
    if request.flag("size"):
        told["SizeRw"], told["SizeRootFs"] = container_sizes(engine, [container]).get(container.id, (0, 0))
    return Response(200, told)


###############################################################################
# Mounts
###############################################################################

# nerdctl makes volumes, fills new ones from the image, and knows plain binds. What it does not know is put into the OCI
# spec behind it, with a place as its source that the daemon mounts before the container starts, and unmounts when
# nothing needs it any more. No place is inside of a folder that nerdctl removes with what is in it; and a start by
# anybody else fails where it is not there, instead of writing somewhere else.
LABEL_MOUNT = "nerdctld/mount."
MOUNT_OPTIONS = {"bind": "BindOptions", "volume": "VolumeOptions", "tmpfs": "TmpfsOptions", "image": "ImageOptions",
                 "cluster": "ClusterOptions"}
PROPAGATIONS = ("private", "rprivate", "shared", "rshared", "slave", "rslave")


class PlacedMount(NamedTuple):
    """A place that has to be mounted before a container starts, for its mount at `target`: a volume with its options,
    the view of an image (the key of a snapshot), or the part `subpath` of the folder `base`."""

    place: str
    target: str
    volume: str = ""
    image: str = ""
    base: str = ""
    subpath: str = ""


def placed_mounts(container: Container) -> List[PlacedMount]:
    """The places of a container, in the order in which they are to be mounted. Anybody can write a label."""
    found = []
    for number in itertools.count():
        text = container.labels.get(f"{LABEL_MOUNT}{number}")
        if text is None:
            return found
        with contextlib.suppress(ValueError, TypeError):
            made = PlacedMount(**json.loads(text))
            found += [made] if all(isinstance(each, str) for each in made) else []


def csv_word(text: str) -> str:
    """A value as one element of a flag that nerdctl splits at commas."""
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",\n]', text) or text != text.strip() else text


def other_container(find: Callable[[str], Container], name: str, start: str = "") -> Container:
    """A container that a request names; 400 and not 404 when there is none, which clients take for a missing image,
    with `start` before its words."""
    try:
        return find(name)
    except NotFound as error:
        raise BadParameter(f"{start}{error}") from None


BIND_MODES = (("ro", "rw"), ("z", "Z"), PROPAGATIONS, ("nocopy",), ("consistent", "cached", "delegated"))


def check_target(path: str, prefix: str) -> None:
    """400 for a place in a container where nothing can be mounted."""
    refuse((not path.startswith("/"), f"invalid mount path: '{path}' mount path must be absolute"),
           (os.path.normpath(path) in ("/", "//"), "invalid specification: destination can't be '/'"), start=prefix)


def parse_bind(text: str, driver: str = "") -> Dict[str, Any]:
    """One of HostConfig.Binds as a Mount of the API, with its `Mode`; 400 for what is none."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts[:2]):
        raise BadParameter(f"invalid volume specification: '{text}'")
    source, target, mode = ["", *parts, ""][:3] if len(parts) == 1 else [*parts, ""][:3]
    kind = "bind" if source.startswith("/") else "volume"
    check_target(target, f"invalid volume specification: '{text}': invalid mount config for type \"{kind}\": ")
    words = mode.split(",") if mode else []
    field, others = ("BindOptions", PROPAGATIONS) if kind == "volume" else ("VolumeOptions", ("nocopy",))
    refuse((set(words).intersection(others), f"invalid volume specification: '{text}': invalid mount config for type "
            f"\"{kind}\": field {field} must not be specified"),
           (any(len(set(group).intersection(words)) > 1 for group in BIND_MODES)
            or not set(words) <= {each for group in BIND_MODES for each in group}, f"invalid mode: {mode}"))
    options = {"NoCopy": "nocopy" in words, "DriverConfig": {"Name": driver}} if kind == "volume" else {
        "CreateMountpoint": True, "Propagation": next((each for each in words if each in PROPAGATIONS), "")}
    return {"Type": kind, "Source": source, "Target": target, "ReadOnly": "ro" in words, "Mode": mode,
            MOUNT_OPTIONS[kind]: options}


def check_mount(mount: Dict[str, Any]) -> None:
    """400 with dockerd's words for a mount that cannot be, 501 for one that nothing here has."""
    kind, target, source = (mount.get(key) or "" for key in ("Type", "Target", "Source"))
    prefix = f'invalid mount config for type "{kind}": '
    if kind == "cluster":
        raise NotImplementedHere(f"there are no mounts of type {kind} on this machine")
    refuse((kind not in MOUNT_OPTIONS, prefix + "mount type unknown"),
           *((each != kind and name in mount, f'{name} must not be specified on mount type "{kind}"')
             for each, name in MOUNT_OPTIONS.items()), (not target, prefix + "field Target must not be empty"))
    check_target(target, prefix)
    own = mount_options(mount)
    subpath, read_only = own.get("Subpath") or "", mount.get("ReadOnly")
    odd = next((each[0] for each in own.get("Options") or [] if each and each[0] not in ("exec", "noexec")), "")
    conflict = next((key for key in ("ReadOnlyNonRecursive", "ReadOnlyForceRecursive") if own.get(key)), "")
    refuse(
        (not source and kind in ("bind", "image"), "field Source must not be empty"),
        (source and kind == "tmpfs", "field Source must not be specified"),
        (kind == "bind" and not source.startswith("/"),
         f"invalid mount path: '{source}' mount path must be absolute"),
        (kind == "bind" and not own.get("CreateMountpoint") and not os.path.lexists(source),
         f"bind source path does not exist: {source}"),
        (kind == "bind" and (own.get("Propagation") or "private") not in PROPAGATIONS,
         f"invalid propagation mode: {own.get('Propagation')}"),
        (kind == "volume" and not source and read_only, "must not set ReadOnly mode when using anonymous volumes"),
        (subpath and kind == "volume" and not source, "must not set Subpath when using anonymous volumes"),
        (subpath.startswith("/") or os.path.normpath(subpath).startswith(".."),
         "subpath must be a relative path within the volume"),
        (any(not 1 <= len(each) <= 2 for each in own.get("Options") or []), "invalid option array length"),
        (odd, f"invalid option: {odd}"),
        (conflict and not read_only, f"mount options conflict: !ReadOnly && BindOptions.{conflict}"),
        (own.get("ReadOnlyNonRecursive") and own.get("ReadOnlyForceRecursive"),
         "mount options conflict: ReadOnlyNonRecursive && BindOptions.ReadOnlyForceRecursive"), start=prefix)
    if kind == "volume":
        driver = own.get("DriverConfig") or {}
        check_volume(source, source, driver.get("Name") or "", driver.get("Options") or {})


def mounts_from(text: str, find: Callable[[str], Container]) -> List[Dict[str, Any]]:
    """The mounts of another container, by one of HostConfig.VolumesFrom (its name, with a mode behind a colon)."""
    name, _, mode = text.partition(":")
    known = {"", "ro", "rw", "z", "Z", "cached", "delegated", "consistent"}
    refuse((not name, "volumes-from specification cannot be an empty string"),
           (not set(mode.split(",")) <= known, f"invalid mode: {mode}"))
    other, found = other_container(find, name), []
    parts = {each.target: each for each in placed_mounts(other)}
    for each in other.mounts:
        kind, target = each["Type"], each["Destination"]
        part = parts.get(target, PlacedMount("", ""))
        options: Dict[str, Any] = {"Subpath": part.subpath} if part.subpath else {}
        if kind == "volume":
            options["NoCopy"] = True
        elif kind == "bind":
            options = {"Propagation": each["Propagation"], "CreateMountpoint": True}
        elif kind != "image":
            continue
        found.append({"Type": kind, "Source": each.get("Name") or each["Source"], "Target": target,
                      "ReadOnly": "ro" in mode.split(",") or not each["RW"], MOUNT_OPTIONS[kind]: options})
    return found


def request_mounts(body: Dict[str, Any], find: Callable[[str], Container]) -> List[Dict[str, Any]]:
    """The mounts of a create request, but for Tmpfs, each as a Mount of the API: those of other containers first, in
    whose place others may come. 400 and 501 for what cannot be."""
    host = body.get("HostConfig") or {}
    driver = host.get("VolumeDriver") or ""
    asked = [parse_bind(each, driver) for each in host.get("Binds") or []]
    binds = len(asked)
    asked += [{**each, "Type": each.get("Type") or ""} for each in host.get("Mounts") or []]
    for path in host.get("Tmpfs") or {}:
        check_target(path, "")
    taken: List[str] = []
    memory = [os.path.normpath(path) for path in host.get("Tmpfs") or {}]
    for number, each in enumerate(asked):
        check_mount(each)
        target = os.path.normpath(each["Target"])
        refuse((target in taken or number < binds and target in memory, f"Duplicate mount point: {target}"))
        taken.append(target)
    taken += memory
    for path in body.get("Volumes") or {}:
        if os.path.normpath(path) not in taken:
            check_target(path, f"invalid volume specification: '{path}': ")
            check_volume(path, "", driver, {})
            asked.append({"Type": "volume", "Target": path})
            taken.append(os.path.normpath(path))
    others = {os.path.normpath(each["Target"]): each
              for text in host.get("VolumesFrom") or [] for each in mounts_from(text, find)}
    return [each for target, each in others.items() if target not in taken] + asked


def mount_options(mount: Dict[str, Any]) -> Dict[str, Any]:
    """The options of a Mount that belong to its type."""
    return mount.get(MOUNT_OPTIONS[mount["Type"]]) or {}


def is_untold(mount: Dict[str, Any]) -> bool:
    """Whether nerdctl is not told of a mount: it has none of its kind, would copy the image's files, or cannot read its
    paths."""
    options, paths = mount_options(mount), str(mount.get("Source") or "") + mount["Target"]
    return (mount.get("Type") == "image" or bool(options.get("Subpath") or options.get("NoCopy"))
            or any(each in paths for each in ':"'))


def mount_words(mounts: Iterable[Dict[str, Any]]) -> List[str]:
    """Words for those mounts that nerdctl makes."""
    words = []
    for mount in mounts:
        options, kind, told = mount_options(mount), mount["Type"], ["ro"] if mount.get("ReadOnly") else []
        if is_untold(mount):
            continue
        if kind == "tmpfs":
            told += [f"mode={options['Mode']:o}"] if options.get("Mode") else []
            told += [f"size={options['SizeBytes']}"] if options.get("SizeBytes") else []
            told += ["=".join(each) for each in options.get("Options") or []]
            words.append("--tmpfs=" + ":".join([mount["Target"], ",".join(told)] if told else [mount["Target"]]))
            continue
        if kind == "bind":
            told.append(options.get("Propagation") or "rprivate")
            told += ["bind"] if options.get("NonRecursive") else []
        told += [each for each in (mount.get("Mode") or "").split(",") if each in ("z", "Z")]
        places = [mount["Source"], mount["Target"]] if mount.get("Source") else [mount["Target"]]
        words.append("--volume=" + ":".join([*places, ",".join(told)] if told else places))
    return words


def check_volume(told: str, name: str, driver: str, options: Dict[str, str]) -> None:
    """404 for a volume driver other than local; 400 with dockerd's words for options that cannot be, and for a name, ""
    for none, that no volume can have. `told` is what the words call it."""
    if driver not in ("", "local"):
        raise NotFound(f'create {told}: error looking up volume plugin {driver}: plugin "{driver}" not found')
    needed = {"device": ("type",), "type": ("device",), "o": ("device", "type")}
    unknown = next((each for each in options if each not in ("type", "o", "device", "size")), "")
    missing = next((each for key in options for each in needed.get(key, ()) if each not in options), "")
    size = options.get("size") or ""
    refuse(
        (unknown, f'invalid option: "{unknown}"'),
        (size and not re.fullmatch(r"\d+(\.\d+)? ?([kmgtp]i?)?b?", size.lower()), f"invalid size: '{size}'"),
        (size.strip("0"), "quota size requested but no quota support"),
        (missing, f'missing required option: "{missing}"'),
        (len(name) == 1, "volume name is too short, names should be at least two alphanumeric characters"),
        (name and not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", name),
         f'"{name}" includes invalid characters for a local volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. '
         "If you intended to pass a host directory, use absolute path"), start=f"create {told}: ")


def make_volume(engine: Engine, name: str, options: Dict[str, str], labels: Dict[str, str]) -> Dict[str, Any]:
    """The volume of a name, made where there is none, with "" an anonymous one. A label keeps its options."""
    found = engine.inventory.volumes().get(name)
    if found is None:
        labels = {**labels, **({} if name else {ANONYMOUS: ""}),
                  **({"nerdctld/options": json.dumps(options)} if options else {})}
        name = name or os.urandom(32).hex()
        engine.nerdctl.run("volume", "create", *_pairs(labels, "--label"), "--", name)
        # nerdctl makes it 0700, so that no user but root could read what is in it.
        with contextlib.suppress(OSError):
            os.chmod(engine.inventory.volume_folder(name), 0o755)
        found = engine.inventory.volumes().get(name) or {}
        engine.journal.emit("volume", "create", name, {"driver": "local"})
    return found


def make_volumes(engine: Engine, mounts: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Make what a container's mounts need: folders of the host and volumes. The mounts, with the names of volumes."""
    made = []
    for mount in mounts:
        options = mount_options(mount)
        wanted = (options.get("DriverConfig") or {}).get("Options") or {}, options.get("Labels") or {}
        if mount["Type"] == "volume":
            name = make_volume(engine, mount.get("Source") or "", *wanted)["Name"]
            mount = {**mount, "Source": name, "Anonymous": not mount.get("Source")}
        make_source(mount)
        made.append(mount)
    return made


def make_source(mount: Dict[str, Any]) -> None:
    """Make the folder of the host that a Mount has, where that is wanted."""
    if mount["Type"] == "bind" and mount_options(mount).get("CreateMountpoint"):
        with contextlib.suppress(FileExistsError, PermissionError, NotADirectoryError):
            os.makedirs(mount["Source"], 0o755)


def renew_sources(host: Dict[str, Any]) -> None:
    """Make the host's folders of a HostConfig's Binds, as at creation; 400 for a source of its Mounts that is gone."""
    binds = [parse_bind(each) for each in host.get("Binds") or [] if each.startswith("/")]
    for each in binds + (host.get("Mounts") or []):
        if each.get("Type") == "bind":
            check_mount(each)
            make_source(each)


def volume_mounts(volume: Dict[str, Any]) -> List[Dict[str, Any]]:
    """How a volume is mounted by its options. The kernel wants the address of a server and not its name; of several
    dockerd takes the first one of IPv4."""
    options = volume["Options"]
    kind, device, words = options["type"], options["device"], options.get("o") or ""
    name = re.search(r"(?:^|,)addr=([^,]+)", words)
    host = re.match(r"(?:cifs:)?//([^/]+)", device) if kind == "cifs" and not name else name
    if kind in ("nfs", "cifs") and host:
        try:
            found = socket.getaddrinfo(host.group(1), None, type=socket.SOCK_STREAM)
            address = min(found, key=lambda each: each[0] != socket.AF_INET)[4][0]
        except OSError as error:
            raise ApiError(f"error while mounting volume '{volume['Mountpoint']}': error resolving passed in network "
                           f"volume address: lookup {host.group(1)}: {error.strerror}") from None
        if name:
            words = words[:name.start(1)] + address + words[name.end(1):]
        else:
            device = device[:host.start(1)] + address + device[host.end(1):]
    return [{"type": kind, "source": device, "options": words.split(",")}]


def mount_order(engine: Engine, made: PlacedMount) -> Dict[str, Any]:
    """What mount_place() is told to mount."""
    if made.volume:
        volume = engine.inventory.volumes().get(made.volume)
        if volume is None or not has_file_system(volume):
            raise ApiError(f"error while mounting volume '{made.volume}': get {made.volume}: no such volume")
        return {"mounts": volume_mounts(volume)}
    if made.image:
        return {"mounts": [parse_mount(each) for each in engine.containerd.snapshot_mounts(*made.image.split(" ", 1))]}
    return {"base": made.base, "subpath": made.subpath}


def tree_error(process: Process, missing: Optional[ApiError] = None) -> ApiError:
    """What a process of ours (`nerdctld.py tree`) says went wrong; `missing`, if given, where a file is not there."""
    process.wait()
    lines = process.error_text().splitlines() or [f"it ended with status {process.popen.returncode}"]
    try:
        told = json.loads(lines[-1])
        error = ApiError(told["message"])
        error.status = told["status"]
    except (ValueError, LookupError, TypeError):
        return ApiError(f"the container's files cannot be reached: {lines[-1]}")
    return missing if missing and error.status == 404 else error


def carry_out_mount(engine: Engine, place: str, **order: Any) -> None:
    """Have mount_place() done by a process where containerd is; 500 with the words of dockerd and of the kernel where
    it fails, for a part of a folder 404 where it is not there and 400 where it is outside."""
    with engine.nerdctl.start_tree(engine.containerd.entering()) as process:
        process.write(json_bytes({"do": "mount", "place": place, **order}) + b"\n")
        if process.wait(SHORT_CALL) == 0:
            return
        failed = ApiError("it does not end") if process.popen.returncode is None else tree_error(process)
    words = str(failed)
    for each in order.get("mounts") or []:
        flags, data = mount_flags(each["options"])
        told = re.sub("(?<=password=)[^,]+", "********", ",".join(data))
        words = (f"mount {each['source']}:{place}" + (f", flags: {flags:#x}" if flags else "")
                 + (f", data: {told}" if told else "") + f": {words}")
    raise ApiError(words) if order.get("mounts") else failed


def mount_points(pid: Any) -> Set[str]:
    """Where something is mounted, as a process sees it."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return {re.sub(r"\\(\d{3})", lambda code: chr(int(code.group(1), 8)), line.split()[4]) for line in file}


def needs_places(container: Container) -> bool:
    """Whether a container runs, or will be started by containerd, also after a restart of the machine."""
    state = container.state
    return container.running or state.kind == "restarting" or (
        container.task is None and bool(state.started_at) and restarts_again(container.labels, 1))


def release_places(engine: Engine) -> None:
    """Unmount every place that neither a container nor a request needs."""
    folder = engine.inventory.places
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        place = os.path.join(folder, name)
        with engine.owner(place).lock:
            if not engine.held[place] and not any(
                    needs_places(each) and place in [made.place for made in placed_mounts(each)]
                    for each in engine.inventory.containers().values()):
                with contextlib.suppress(ApiError):
                    carry_out_mount(engine, place)


@contextlib.contextmanager
def mounted(engine: Engine, places: List[PlacedMount]) -> Iterator[None]:
    """Context in which these places are mounted, and after which those are that a container needs. 500 with dockerd's
    words for what the kernel does not mount."""
    if not places:
        yield
        return
    paths = [made.place for made in places]
    with engine.lock:
        engine.held.update(paths)
    try:
        for made in places:
            with engine.owner(made.place).lock:
                if made.place in mount_points(engine.containerd.rootless_pid() or "self"):
                    continue
                try:
                    carry_out_mount(engine, made.place, **mount_order(engine, made))
                except ApiError as error:
                    if not made.volume or str(error).startswith("error while"):
                        raise
                    raise ApiError(f"error while mounting volume '{made.place}': failed to mount local volume: "
                                   f"{error}") from None
        yield
    finally:
        with engine.lock:
            engine.held.subtract(paths)
        release_places(engine)


@contextlib.contextmanager
def fillable(engine: Engine, mounts: Iterable[Dict[str, Any]]) -> Iterator[List[Dict[str, Any]]]:
    """Context in which volumes with options are mounted where nerdctl has them, so that it fills new ones from the
    image: the mounts, of which nerdctl is not told where that cannot be; the start of the container will say why."""
    volumes, told = engine.inventory.volumes(), []
    with contextlib.ExitStack() as stack:
        for mount in mounts:
            volume = volumes.get(mount.get("Source") or "") or {}
            if not is_untold(mount) and mount.get("Type") != "bind" and has_file_system(volume):
                data, place = engine.inventory.volume_folder(volume["Name"]), volume["Mountpoint"]
                stack.enter_context(engine.owner(data).lock)
                try:
                    stack.enter_context(mounted(engine, [PlacedMount(place, "", volume["Name"])]))
                    order = [{"type": "none", "source": place, "options": ["bind"]}]
                    carry_out_mount(engine, data, mounts=order, keep=True)
                    # What nerdctl may remove must have nothing mounted in it for longer than this.
                    stack.callback(carry_out_mount, engine, data, keep=True)
                except ApiError:
                    mount = {**mount, "VolumeOptions": {**mount_options(mount), "NoCopy": True}}
            told.append(mount)
        yield told


def locked_flags(engine: Engine, path: str) -> List[str]:
    """Options that the mounts of a user's own containerd cannot be without: those of the file system they are on."""
    if not engine.containerd.rootless_pid():
        return []
    with contextlib.suppress(OSError):
        flags = os.statvfs(engine.containerd.root() + path).f_flag
        return [name for name in ("nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime")
                if flags & getattr(os, "ST_" + name.upper())]
    return []


def note_mount(labels: Dict[str, str], row: Dict[str, Any]) -> Dict[str, str]:
    """The label of a mount besides those that nerdctl noted in these: 2.3 has one a mount, any other nerdctl a list."""
    if "nerdctl/mounts.0" in labels:
        number = next(each for each in itertools.count() if f"nerdctl/mounts.{each}" not in labels)
        return {f"nerdctl/mounts.{number}": json.dumps(row)}
    return {"nerdctl/mounts": json.dumps([*json.loads(labels.get("nerdctl/mounts") or "[]"), row])}


def place_mount(engine: Engine, container: Container, mount: Dict[str, Any], number: int) -> List[PlacedMount]:
    """The places that a mount needs; its source is the last of them."""
    target, subpath = os.path.normpath(mount["Target"]), mount_options(mount).get("Subpath") or ""
    place = os.path.join(engine.inventory.places, f"{container.id}.{number}")
    if mount.get("Type") == "image":
        view = f"{container.record.snapshotter} nerdctld-{container.id}-{number}"
        found = [PlacedMount(place + ".image" * bool(subpath), target, image=view)]
    else:
        volume = engine.inventory.volumes().get(mount.get("Source") or "") or {}
        found = [PlacedMount(volume["Mountpoint"], target, volume["Name"])] if has_file_system(volume) else []
    base = found[0].place if found else volume.get("Mountpoint") or ""
    return [*found, PlacedMount(place, target, base=base, subpath=subpath)] if subpath else found


def untold_mount(engine: Engine, mount: Dict[str, Any], source: str) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """A mount that nerdctl was not told of, as the OCI spec has it and as nerdctl notes it in a label."""
    kind, options, target = mount["Type"], mount_options(mount), os.path.normpath(mount["Target"])
    read_only = kind == "image" or bool(mount.get("ReadOnly"))
    propagation = (options.get("Propagation") or "rprivate") if kind != "volume" else ""
    told = ["bind" if options.get("NonRecursive") else "rbind", *["ro"] * read_only, propagation or "rprivate",
            *locked_flags(engine, source)]
    mode = dict.fromkeys([*filter(None, (mount.get("Mode") or "").split(",")), *["ro"] * read_only])
    row = {"Type": kind, "Source": source, "Destination": target, "Mode": ",".join(mode),
           "RW": not read_only, "Propagation": propagation}
    if kind == "volume":
        row.update({"Name": mount["Source"], "Driver": "local"})
        row["Source"] = engine.inventory.volumes()[mount["Source"]]["Mountpoint"]
    elif kind == "image":
        row["Name"] = mount["Source"]
    return {"type": "bind", "source": source, "destination": target, "options": told}, row


def rewrite_container(engine: Engine, container: Container, spec: Dict[str, Any], labels: Dict[str, str]) -> Container:
    """Set the OCI spec and labels of a container, which nerdctl's hooks read as annotations; the container then."""
    annotations = {key: value for key, value in labels.items() if key.startswith("nerdctl/")}
    engine.update(container, labels, {**spec, "annotations": {**(spec.get("annotations") or {}), **annotations}})
    return engine.inventory.container(container.id)


def with_access(entry: Dict[str, Any], word: str) -> Dict[str, Any]:
    """A read-only mount of an OCI spec with `ro`, `rro` or `rw` in place of what it has."""
    options = [word if each in ("ro", "rro") else each for each in entry.get("options") or []]
    return {**entry, "options": options} if options else entry


def finish_container(engine: Engine, container: Container, spec: Dict[str, Any], own: Dict[str, str],
                     mounts: List[Dict[str, Any]], recursive: bool) -> Container:
    """Give a container that nerdctl has made this OCI spec, labels of its `own`, the mounts that nerdctl was not told
    of, and the places of those that the daemon mounts, `recursive` read-only ones with all that is mounted below them;
    the container as it is then."""
    spec, labels, views, places = json.loads(json.dumps(spec)), {**container.labels, **own}, {}, []
    for number, mount in enumerate(mounts):
        made, target = place_mount(engine, container, mount, number), os.path.normpath(mount["Target"])
        places += made
        source = made[-1].place if made else mount.get("Source") or ""
        if is_untold(mount):
            if mount["Type"] == "volume" and not made:
                source = engine.inventory.volumes()[mount["Source"]]["Mountpoint"]
            entry, row = untold_mount(engine, mount, source)
            spec["mounts"] = [each for each in spec.get("mounts") or [] if each.get("destination") != target] + [entry]
            labels.update(note_mount(labels, row))
        elif made:
            for each in spec.get("mounts") or []:
                each.update({"source": source} if each.get("destination") == target else {})
        if mount["Type"] != "tmpfs":
            # nerdctl 2.3 has the one for all, and the next one the other.
            word = "rro" if recursive and not mount_options(mount).get("ReadOnlyNonRecursive") else "ro"
            spec["mounts"] = [with_access(each, word) if each.get("destination") == target else each
                              for each in spec.get("mounts") or []]
        if mount.get("Anonymous"):
            others = json.loads(labels.get("nerdctl/anonymous-volumes") or "[]") or []
            labels["nerdctl/anonymous-volumes"] = json.dumps([*others, mount["Source"]])
        if mount.get("Type") == "image":
            snapshotter, key = made[0].image.split(" ", 1)
            labels[f"containerd.io/gc.ref.snapshot.{snapshotter}/{number}"] = key
            views[key] = mount["Source"]
    labels.update({f"{LABEL_MOUNT}{number}": json.dumps({key: each for key, each in made._asdict().items() if each})
                   for number, made in enumerate(places)})
    changed = {key: value for key, value in labels.items() if value != container.labels.get(key)}
    if not changed and spec == container.spec:
        return container
    # As nerdctl and dockerd have them: what is mounted in something comes after it.
    spec.get("mounts", []).sort(key=lambda each: os.path.normpath(each.get("destination") or "/").count("/"))
    container = rewrite_container(engine, container, spec, changed)
    for key, name in views.items():
        layers = chain_ids(engine.inventory.image(name).config)
        with engine.containerd.leased() as leased:
            leased.view_snapshot(container.record.snapshotter, key, layers[-1])
    return container


###############################################################################
# Create options
###############################################################################


def _listed(value: Optional[List[str]], flag: str) -> List[str]:
    """`FLAG=text` for each, with a flag that nerdctl splits at commas."""
    return [f"{flag}={csv_word(each)}" for each in value or [] if each]


def _limits(value: Optional[List[Dict[str, Any]]], flag: str) -> List[str]:
    """The weights or rates of devices as one `FLAG=path:number` each."""
    return [f"{flag}={each.get('Path')}:{each.get('Weight') or each.get('Rate') or 0}" for each in value or []]


def _oom_score(value: Optional[int], flag: str) -> List[str]:
    """As with dockerd 0 is an order, too: without one a container has what its shim has, below systemd nearly the
    least, so that everything else is killed before it. A user may not go below it."""
    return [f"{flag}={value or 0}"] if value or not os.geteuid() else []


# Field of the create request -> flag of nerdctl create, and how its value becomes words; functions do the rest.
CREATE_FLAGS: Tuple[Tuple[str, str, Callable[[Any, str], List[str]]], ...] = (
    ("User", "--user", _value), ("Tty", "--tty", _switch),
    ("OpenStdin", "--interactive", _switch), ("StopSignal", "--stop-signal", _value),
    ("WorkingDir", "--workdir", _value),
    ("HostConfig.CapAdd", "--cap-add", _listed),
    ("HostConfig.CapDrop", "--cap-drop", _listed), ("HostConfig.CgroupnsMode", "--cgroupns", _value),
    ("HostConfig.Dns", "--dns", _listed),
    ("HostConfig.DnsOptions", "--dns-option", _listed), ("HostConfig.DnsSearch", "--dns-search", _listed),
    ("HostConfig.ExtraHosts", "--add-host", _listed), ("HostConfig.GroupAdd", "--group-add", _listed),
    ("HostConfig.UTSMode", "--uts", _value),
    ("HostConfig.OomScoreAdj", "--oom-score-adj", _oom_score), ("HostConfig.Privileged", "--privileged", _switch),
    ("HostConfig.ReadonlyRootfs", "--read-only", _switch), ("HostConfig.Runtime", "--runtime", _value),
    ("HostConfig.UsernsMode", "--userns", _value),
    ("HostConfig.ShmSize", "--shm-size", _value), ("HostConfig.Sysctls", "--sysctl", _pairs),
    ("HostConfig.Annotations", "--annotation", _pairs), ("HostConfig.CgroupParent", "--cgroup-parent", _value),
    ("HostConfig.CpuShares", "--cpu-shares", _value), ("HostConfig.CpuPeriod", "--cpu-period", _value),
    ("HostConfig.CpuQuota", "--cpu-quota", _value), ("HostConfig.CpuRealtimePeriod", "--cpu-rt-period", _value),
    ("HostConfig.CpuRealtimeRuntime", "--cpu-rt-runtime", _value), ("HostConfig.CpusetCpus", "--cpuset-cpus", _value),
    ("HostConfig.CpusetMems", "--cpuset-mems", _value), ("HostConfig.Memory", "--memory", _value),
    ("HostConfig.MemoryReservation", "--memory-reservation", _value),
    ("HostConfig.MemorySwap", "--memory-swap", lambda value, flag: _value(max(-1, value or 0), flag)),
    ("HostConfig.KernelMemory", "--kernel-memory", _value),
    ("HostConfig.OomKillDisable", "--oom-kill-disable", _switch),
    ("HostConfig.PidsLimit", "--pids-limit", _value), ("HostConfig.BlkioWeight", "--blkio-weight", _value),
    ("HostConfig.BlkioWeightDevice", "--blkio-weight-device", _limits),
    ("HostConfig.BlkioDeviceReadBps", "--device-read-bps", _limits),
    ("HostConfig.BlkioDeviceWriteBps", "--device-write-bps", _limits),
    ("HostConfig.BlkioDeviceReadIOps", "--device-read-iops", _limits),
    ("HostConfig.BlkioDeviceWriteIOps", "--device-write-iops", _limits),
)
# Accepted by dockerd and without a counterpart in nerdctl.
IGNORED_FIELDS = ("StorageOpt", "CpuCount", "CpuPercent", "Cgroup")


def published_ports(body: Dict[str, Any], image: Dict[str, Any],
                    pick: Callable[[str, Iterable[int]], int]) -> List[Dict[str, Any]]:
    """What PortBindings and, with PublishAllPorts, every exposed port publish, as nerdctl keeps it; `pick` finds a port
    of the host where none is asked for, or one of several. 400 for what is no port."""
    host = body.get("HostConfig") or {}
    exposed = {**(image.get("ExposedPorts") or {}), **(body.get("ExposedPorts") or {})}
    ports: List[Dict[str, Any]] = []
    for key, places in {**dict.fromkeys(exposed if host.get("PublishAllPorts") else ()),
                        **(host.get("PortBindings") or {})}.items():
        found = re.fullmatch(r"(\d{1,5})(?:/(tcp|udp|sctp))?", key.lower())
        refuse((not found or int(found.group(1)) > 0xFFFF, f'invalid port specification: "{key}"'))
        inner, kind = int(found.group(1)), found.group(2) or "tcp"
        for place in places or [{}]:
            number, address = place.get("HostPort") or "", (place.get("HostIp") or "").strip("[]")
            ends = [int(each) for each in number.split("-")] if re.fullmatch(r"\d{1,5}(-\d{1,5})?", number) else [-1]
            if (number and not len(ends) - 1 <= ends[0] <= ends[-1] <= 65535
                    or not re.fullmatch(r"[0-9a-fA-F.:]*", address)):
                raise BadParameter(f'invalid port specification: "{number or address}"')
            outer = (pick(kind, ()) if number in ("", "0") else pick(kind, range(ends[0], ends[1] + 1))
                     if "-" in number else ends[0])
            port = {"HostPort": outer, "ContainerPort": inner, "Protocol": kind, "HostIP": address or "0.0.0.0"}
            ports += [port] if port not in ports else []
    return ports


def publish_args(ports: Iterable[Dict[str, Any]]) -> List[str]:
    """Words for published ports."""
    return [f"--publish={host_text(each['HostIP']) + ':' if each['HostIP'] != '0.0.0.0' else ''}"
            f"{each['HostPort']}:{each['ContainerPort']}/{each['Protocol']}" for each in ports]


def host_text(address: str) -> str:
    """An address as it stands in front of a port."""
    return f"[{address}]" if ":" in address else address


def unused_port(kind: str) -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as sock:
        sock.bind(("0.0.0.0", 0))
        return sock.getsockname()[1]


def is_bound(port: Dict[str, Any]) -> bool:
    """Whether a process of this machine has the address of a published port."""
    kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}.get(port["Type"])
    if kind is None:
        return False
    try:
        with socket.socket(socket.AF_INET6 if ":" in port["IP"] else socket.AF_INET, kind) as sock:
            if port["Type"] == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in port["IP"]:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((port["IP"], port["PublicPort"]))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def pick_port(engine: Engine, kind: str, among: Iterable[int]) -> int:
    """A free port of the host for a container, `among` these, if there are any, the first one. nerdctl's own choice
    leaves out what runs only, so that two containers that are created one after the other, and then started, would get
    the same; and a rootless nerdctl has none."""
    taken = {port["PublicPort"] for each in engine.inventory.containers().values() for port in each.ports
             if port["Type"] == kind}
    for port in among:
        if port not in taken and not is_bound({"IP": "0.0.0.0", "PublicPort": port, "Type": kind}):
            return port
    with engine.lock:
        taken.update(engine.picked)
        free = (each for each in (unused_port(kind) for _ in range(100)) if each not in taken)
        engine.picked.append(next(iter(among), 0) or next(free, 0) or unused_port(kind))
        return engine.picked[-1]


def tmpfs_args(host: Dict[str, Any]) -> List[str]:
    """Words for Tmpfs, but where one of Mounts is."""
    taken = {os.path.normpath(each.get("Target") or "") for each in host.get("Mounts") or []}
    return [f"--tmpfs={path}:{options}" if options else f"--tmpfs={path}"
            for path, options in (host.get("Tmpfs") or {}).items() if os.path.normpath(path) not in taken]


def health_check(body: Dict[str, Any], image: Dict[str, Any]) -> Dict[str, Any]:
    """The request's health check, with what the image says where it says nothing; {} for none. 400 for bad values."""
    asked = body.get("Healthcheck") or {}
    check = {**(image.get("Healthcheck") or {}), **{key: value for key, value in asked.items() if value}}
    test = check.get("Test") or []
    for key in ("Interval", "Timeout", "StartPeriod", "StartInterval"):
        refuse(((check.get(key) or 10**6) < 10**6, f"{key} in Healthcheck cannot be less than 1ms"))
    refuse(((check.get("Retries") or 0) < 0, "Retries in Healthcheck cannot be negative"))
    # One of another kind is none, as with dockerd.
    return check if test and test[0] in ("NONE", "CMD", "CMD-SHELL") else {}


# In the order of their numbers.
CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE").split()
SECURITY_OPTIONS = ("apparmor", "label", "no-new-privileges", "privileged-without-host-devices", "seccomp",
                    "systempaths", "writable-cgroups")


def security_args(host: Dict[str, Any]) -> List[str]:
    """Words for the security options; 400 with dockerd's words for what is none. dockerd also takes `name:value`, which
    nerdctl would drop in silence."""
    words = []
    for each in host.get("SecurityOpt") or []:
        name, sign, value = re.fullmatch("(?s)([^=:]*)([=:]?)(.*)", "label=disable" if each == "disable"
                                         else each).groups()
        known = name in SECURITY_OPTIONS and (sign or name not in ("apparmor", "label", "seccomp")) and (
            name != "systempaths" or value == "unconfined")
        if not known or name == "no-new-privileges" and sign and value.lower() not in ("1", "t", "true", "0", "f",
                                                                                       "false"):
            raise BadParameter(f'invalid --security-opt 2: "{each}"')
        if name == "seccomp":
            value = value.strip()
            if value == "builtin":
                continue
            if value != "unconfined":
                shaped(parse_json(value.encode()), Named(object))
        words.append(f"--security-opt={name}" + (f"={value}" if sign else ""))
    return words


@contextlib.contextmanager
def profile_files(engine: Engine, words: List[str]) -> Iterator[List[str]]:
    """Context in which a seccomp profile, which clients send as text, is the path of a file, as nerdctl takes it."""
    start = "--security-opt=seccomp="
    if not any(each.startswith(start + "{") for each in words):
        yield words
        return
    with temporary_folder("seccomp") as folder:
        path = os.path.join(folder, "profile.json")
        with open(path, "w", encoding="utf-8") as file:
            file.write(next(each for each in reversed(words) if each.startswith(start + "{"))[len(start):])
        yield [start + path if each.startswith(start + "{") else each for each in words]


def policy_word(host: Dict[str, Any]) -> str:
    """The restart policy as containerd has it, "" for none; 400 with dockerd's words where it cannot be."""
    policy = host.get("RestartPolicy") or {}
    name, count = policy.get("Name") or "", policy.get("MaximumRetryCount") or 0
    refuse(
        (name not in ("", "no", "always", "unless-stopped", "on-failure"),
         f"unknown policy '{name}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'"),
        (name == "on-failure" and count < 0, "maximum retry count cannot be negative"),
        (count and name not in ("", "on-failure"), "maximum retry count can only be used with 'on-failure'"
         + (" and cannot be negative" if count < 0 else "")), start="invalid restart policy: ")
    if name in ("", "no"):
        return name
    refuse((host.get("AutoRemove"), "can't create 'AutoRemove' container with restart policy"))
    return name + (f":{count}" if count else "")


def device_args(host: Dict[str, Any]) -> List[str]:
    """Words for GPUs and ulimits. The devices themselves are looked at when it starts."""
    words = []
    for request in host.get("DeviceRequests") or []:
        names, count = request.get("DeviceIDs") or [], request.get("Count", -1)
        if request.get("Driver") == "cdi":
            words += _listed(names, "--device")
        else:
            words += _listed(["device=" + ",".join(names) if names else "all" if count == -1 else str(count)], "--gpus")
    for limit in host.get("Ulimits") or []:
        soft, hard = limit.get("Soft") or 0, limit.get("Hard") or 0
        refuse((0 <= hard < soft, f"ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"))
        words.append(f"--ulimit={limit.get('Name') or ''}={soft}:{hard}")
    return words


# What dockerd refuses for a container that has the network of another one.
CONTAINER_NETWORK_CONFLICTS = (
    ("Hostname", "hostname and the network mode"), ("MacAddress", "mac-address and the network mode"),
    ("HostConfig.Links", "container type network can't be used with links. This would result in undefined behavior"),
    ("HostConfig.Dns", "dns and the network mode"),
    ("HostConfig.ExtraHosts", "custom host-to-IP mapping and the network mode"),
    ("HostConfig.PortBindings", "port publishing and the container type network mode"),
    ("HostConfig.PublishAllPorts", "port publishing and the container type network mode"),
    ("ExposedPorts", "port exposing and the container type network mode"))


def check_endpoint(network: Dict[str, Any], asked: Dict[str, Any]) -> None:
    """400 with dockerd's words for EndpointSettings that a network cannot carry out."""
    wrong, config = [], asked.get("IPAMConfig") or {}
    texts = {version: config.get(f"IPv{version}Address") or "" for version in (4, 6)}
    if network["Name"] in ("bridge", "host", "none"):
        wrong += ["user-specified IP address is supported on user-defined networks only"] * any(texts.values())
        wrong += ["network-scoped aliases are only supported for user-defined networks"] * bool(
            asked.get("Aliases"))
    for version, text in texts.items():
        if text:
            try:
                address = ipaddress.ip_address(text)
                if address.version != version or address.is_unspecified:
                    raise ValueError
            except ValueError:
                raise BadParameter(f"invalid IPv{version} address: {text}") from None
            if not any(address in ipaddress.ip_network(each["Subnet"], strict=False)
                       for each in field_of(network, "IPAM.Config") or []):
                wrong.append(f"no configured subnet contains IP address {text}")
    if not re.fullmatch("([0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5})?", asked.get("MacAddress") or ""):
        raise BadParameter(f"invalid MAC address: {asked['MacAddress']}")
    if wrong:
        raise BadParameter("invalid endpoint settings:\n" + "\n".join(wrong))


def network_asked(body: Dict[str, Any]) -> bool:
    """Whether a create request asks for networks, and not for that of the host or of another container, or none."""
    mode = (field_of(body, "HostConfig.NetworkMode") or "").partition(":")[0]
    return not body.get("NetworkDisabled") and mode not in ("host", "none", "container")


def asked_networks(body: Dict[str, Any], networks: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """The EndpointSettings of each network of a create request, that of its mode first; those that are not among
    `networks` by the name that the client has for them. As with dockerd, where EndpointsConfig names any, the mode is
    none besides."""
    endpoints = field_of(body, "NetworkingConfig.EndpointsConfig") or {}
    by_id = {each["Id"]: name for name, each in networks.items()}

    def named(key: str) -> str:
        key = field_of(body, "HostConfig.NetworkMode") or "default" if key == "default" else key
        return "bridge" if key == "default" else key if key in networks else by_id.get(key, key)

    found = {named(key): each or {} for key, each in endpoints.items()} or {named("default"): {}}
    return dict(sorted(found.items(), key=lambda each: each[0] != named("default")))


def network_args(body: Dict[str, Any], networks: Dict[str, Dict[str, Any]]) -> List[str]:
    """Words for the networks: the mode first, then what else EndpointsConfig names. `networks` by name; that of another
    container comes later."""
    host = body.get("HostConfig") or {}
    mode = host.get("NetworkMode") or ""
    endpoints = field_of(body, "NetworkingConfig.EndpointsConfig") or {}
    if body.get("NetworkDisabled"):
        mode = "none"
    if mode.startswith("container:"):
        refuse(*((field_of(body, key), words) for key, words in CONTAINER_NETWORK_CONFLICTS),
               start="conflicting options: ")
        refuse((mode == "container:", "invalid network mode: invalid container format container:<name|id>"))
        return ["--network=none"]
    if mode == "host" and host.get("Links"):
        raise BadParameter("conflicting options: host type networking can't be used with links. This would result in "
                           "undefined behavior")
    if mode in ("host", "none"):
        if ((endpoints.get(mode) or {}).get("IPAMConfig") or {}).get("IPv4Address"):
            raise BadParameter("user specified IP address is supported on user defined networks only")
        return [f"--network={mode}"]
    found = asked_networks(body, networks)
    for each in networks.keys() & found.keys():
        check_endpoint(networks[each], found[each])
    if not all(each in networks for each in found):
        # They may be there at its start.
        return ["--network=none"]
    names, address = hooked_networks(found, body.get("MacAddress") or "")
    return [*(f"--network={cni_name(name)}" for name in names),
            *(f"--{key}={value}" for key, value in address.items() if value)]


def namespace_args(host: Dict[str, Any], find: Callable[[str], Container]) -> List[str]:
    """Words for the IPC and PID namespaces but those of other containers, which it gets later."""
    words = []
    for key, flag in (("IpcMode", "--ipc"), ("PidMode", "--pid")):
        mode = host.get(key) or ""
        if mode.startswith("container:"):
            other_container(find, mode.partition(":")[2])
        elif mode:
            words.append(f"{flag}={'private' if mode == 'none' else mode}")
    return words


def init_args(host: Dict[str, Any]) -> List[str]:
    """Words for an init process. nerdctl's default, tini, needs the host's libc in the image; one without that is taken
    where there is one."""
    static = next(filter(shutil.which, STATIC_INITS), "")
    return ["--init", *_value(static, "--init-binary")] if host.get("Init") else []


LOG_OPTIONS = {
    "json-file": "max-size max-file compress labels labels-regex env env-regex tag log-path",
    "local": "max-size max-file compress", "journald": "labels labels-regex env env-regex tag",
    "syslog": "env env-regex labels labels-regex syslog-address syslog-facility syslog-tls-ca-cert syslog-tls-cert "
              "syslog-tls-key syslog-tls-skip-verify tag syslog-format",
    "fluentd": "env env-regex labels labels-regex tag fluentd-address fluentd-async fluentd-async-connect "
               "fluentd-async-reconnect-interval fluentd-buffer-limit fluentd-max-retries fluentd-request-ack "
               "fluentd-retry-wait fluentd-sub-second-precision fluentd-write-timeout",
}


# Log drivers, an option of theirs, what its value has to be, and dockerd's words for another one, which it says at the
# creation (400) or at the start (500). With most of these values nerdctl's logging program would end, or say nothing.
SIZE = r"(?i)\d+(\.\d+)? ?[kmgtp]?i?b?"
LOG_VALUES = (
    (tuple(LOG_OPTIONS), "mode", "|blocking|non-blocking", BadParameter, "logger: logging mode not supported: {0}"),
    (tuple(LOG_OPTIONS), "max-buffer-size", SIZE, BadParameter,
     "error parsing option max-buffer-size: invalid size: '{0}'"),
    (("syslog",), "syslog-address", r"|(unix|unixgram|udp|tcp|tcp\+tls)://.*", BadParameter,
     "syslog-address should be in form proto://address, got {0}"),
    (("syslog",), "syslog-facility",
     r"|\d{1,3}|kern|user|mail|daemon|auth|syslog|lpr|news|uucp|cron|authpriv|ftp|local[0-7]", BadParameter,
     "invalid syslog facility"),
    (("syslog",), "syslog-format", "|rfc3164|rfc5424|rfc5424micro", BadParameter, "Invalid syslog format"),
    (("json-file", "local"), "max-size", SIZE, ApiError, "invalid size: '{0}'"),
    (("json-file", "local"), "max-size", ".*[1-9].*", ApiError, "max-size must be a positive number"),
    (("json-file", "local"), "max-file", r"[+-]?\d{1,9}", ApiError, 'strconv.Atoi: parsing "{0}": invalid syntax'),
    (("json-file", "local"), "max-file", r"\+?0*[1-9]\d*", ApiError, "max-file cannot be less than 1"),
    (("json-file", "local"), "compress", "1|t|T|TRUE|true|True|0|f|F|FALSE|false|False", ApiError,
     'strconv.ParseBool: parsing "{0}": invalid syntax'),
)


def check_log(kind: str, options: Dict[str, str]) -> None:
    """400 and 500 with dockerd's words for a log driver that there is not, and for options that it refuses: with some
    of them the container would go on without a log."""
    known = (*LOG_OPTIONS.get(kind, " ".join(options)).split(), "mode", "max-buffer-size")
    unknown = next((each for each in options if each not in known), "")
    buffered = kind != "none" and "max-buffer-size" in options and options.get("mode") != "non-blocking"
    refuse((kind not in (*LOG_OPTIONS, "none"), f"logger: no log driver named '{kind}' is registered"),
           (unknown, f"unknown log opt '{unknown}' for "
            + ("log driver local" if kind == "local" else f"{kind} log driver")),
           (buffered, "logger: max-buffer-size option is only supported with 'mode=non-blocking'"))
    for kinds, name, pattern, error, words in LOG_VALUES:
        refuse((kind in kinds and name in options and not re.fullmatch(pattern, options[name]),
                words.format(options.get(name))),
               start="failed to initialize logging driver: " if error is ApiError else "", kind=error)


def log_args(host: Dict[str, Any]) -> List[str]:
    """Words for the log driver. Docker's `local` and `json-file` are one to nerdctl."""
    config = host.get("LogConfig") or {}
    kind, options = config.get("Type") or "json-file", config.get("Config") or {}
    check_log(kind, options)
    return _switch(kind not in ("local", "json-file"), f"--log-driver={kind}") + _pairs(options, "--log-opt")


def command_words(body: Dict[str, Any], image: Dict[str, Any]) -> Tuple[List[str], List[str]]:
    """Flags for the entrypoint, of which an empty one takes the image's away, and the words after the image. 400 where
    there is no command."""
    entrypoint, command = body.get("Entrypoint"), body.get("Cmd") or []
    if entrypoint == []:
        command = command or image.get("Cmd") or []
    own = (image.get("Entrypoint") or image.get("Cmd")) if entrypoint is None else any(entrypoint)
    if not command and not own:
        raise BadParameter("no command specified")
    return [] if entrypoint is None else [f"--entrypoint={each}" for each in entrypoint or [""]], list(command)


def check_config(body: Dict[str, Any], host: Dict[str, Any]) -> None:
    """400 with dockerd's words for what is no limit and cannot be."""
    folder, hostname = body.get("WorkingDir") or "/", body.get("Hostname") or ""
    for each in body.get("Env") or []:
        refuse((not each or each.startswith("="), f"invalid environment variable: {each}"))
    refuse((not folder.startswith("/"),
            f"the working directory '{folder}' is invalid, it needs to be an absolute path"),
           (len(hostname.encode()) > 64, f'hostname "{hostname}" is too long (maximum 64 bytes)'))
    if body.get("StopSignal"):
        signal_number(body["StopSignal"])
    refuse(("" in (host.get("Annotations") or {}),
            "invalid Annotations: the empty string is not permitted as an annotation key"))
    for each in body.get("ExposedPorts") or {}:
        number = re.fullmatch(r"([0-9]{1,18})(/(tcp|udp|sctp))?", each.lower())
        refuse((not number, f"invalid port '{each}': invalid syntax"),
               (number and int(number[1]) > 65535, f"invalid port '{each}': value out of range"))
    for each in host.get("ExtraHosts") or []:
        name, _, address = each.partition(":")
        refuse((not name or not address, f'bad format for add-host: "{each}"'))
        try:
            ipaddress.ip_address("::" if address == "host-gateway" else address.strip("[]"))
        except ValueError:
            raise BadParameter(f'invalid IP address in add-host: "{address}"') from None
    runtime = host.get("Runtime") or "runc"
    # A name of containerd's, or a path, is for containerd to know.
    known = runtime == "runc" or re.match(r"io\.containerd\.|/", runtime) or shutil.which(runtime)
    refuse(
        (not known, f"unknown or invalid runtime name: {runtime}"),
        *((not re.fullmatch(modes, host.get(key) or ""), f"invalid {word} mode: {host.get(key)}")
          for key, word, modes in (
              ("IpcMode", "IPC", "|none|private|shareable|host|container:.+"), ("PidMode", "PID", "|host|container:.+"),
              ("UTSMode", "UTS", "|host"), ("CgroupnsMode", "cgroup namespace", "|private|host"))),
        (host.get("UTSMode") == "host" and hostname, "conflicting options: hostname and the UTS mode"),
        (host.get("Isolation") not in (None, "", "default"),
         f"invalid isolation ({host.get('Isolation')}): linux only supports 'default'"))
    # nerdctl drops what is none in silence.
    for key, name in ((key, re.sub("^CAP_", "", each.upper())) for key in ("CapAdd", "CapDrop")
                      for each in host.get(key) or []):
        refuse((name not in (*CAPABILITIES, "ALL"), f'invalid {key}: unknown capability: "CAP_{name}"'))
    for each in host.get("Links") or []:
        refuse((not each, "empty string specified for links"),
               (not each.strip("/") or each.count(":") > 1, f"bad format for links: {each}"))


def check_sets(host: Dict[str, Any]) -> None:
    """400 with dockerd's words for processors or memory nodes that this machine has not."""
    for key, word, what, path in (("CpusetCpus", "cpus", "CPUs", "cpu"),
                                  ("CpusetMems", "mems", "memory nodes", "node")):
        wanted, there = host.get(key) or "", read_file(f"/sys/devices/system/{path}/online").strip()
        sets = []
        for text in (wanted, there):
            found = [re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", each.strip()) for each in text.split(",") if each]
            refuse((not all(found), f"Invalid value {wanted} for cpuset {word}: invalid format: {wanted}"))
            sets.append({number for each in found for number in range(int(each[1]), int(each[2] or each[1]) + 1)})
        refuse((there and not sets[0] <= sets[1],
                f"Requested {what} are not available - requested {wanted}, available: {there}"))


def check_limits(host: Dict[str, Any], update: bool = False) -> None:
    """400 with dockerd's words for limits that cannot be, of a create request's HostConfig or of an update."""
    memory, swap, reservation, cpus, period, quota, shm, oom, swappiness = (host.get(key) or 0 for key in (
        "Memory", "MemorySwap", "MemoryReservation", "NanoCpus", "CpuPeriod", "CpuQuota", "ShmSize", "OomScoreAdj",
        "MemorySwappiness"))
    shares = host.get("CpuShares") or 0
    least, processors = 6 << 20, os.cpu_count() or 1
    check_sets(host)
    refuse(
        (memory and memory < least, "Minimum memory limit allowed is 6MB"),
        (0 < swap < memory, "Minimum memoryswap limit should be larger than memory limit, see usage"),
        (swap > 0 and not memory and not update,
         "You should always set the Memory limit when using Memoryswap limit, see usage"),
        (not -1 <= swappiness <= 100, f"Invalid value: {swappiness}, valid memory swappiness range is 0-100"),
        (reservation and reservation < least, "Minimum memory reservation allowed is 6MB"),
        (0 < memory < reservation, "Minimum memory limit can not be less than memory reservation limit, see usage"),
        (cpus and period, "Conflicting options: Nano CPUs and CPU Period cannot both be set"),
        (cpus and quota, "Conflicting options: Nano CPUs and CPU Quota cannot both be set"),
        (not 0 <= cpus <= processors * 10**9,
         f"range of CPUs is from 0.01 to {processors}.00, as there are only {processors} CPUs available"),
        (period and not 1000 <= period <= 10**6,
         "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)"),
        (0 < quota < 1000, "CPU cfs quota can not be less than 1ms (i.e. 1000)"),
        (shares < 0, f"invalid CPU shares ({shares}): value must be a positive integer"),
        (host.get("IOMaximumBandwidth"),
         "invalid option: QoS maximum bandwidth configuration is not supported on linux"),
        (host.get("IOMaximumIOps"), "invalid option: QoS maximum IOPs configuration is not supported on linux"),
        (shm < 0, "SHM size can not be less than 0"),
        (not -1000 <= oom <= 1000, f"Invalid value {oom}, range for oom score adj is [-1000, 1000]"))


def create_args(body: Dict[str, Any], image: Dict[str, Any], networks: Dict[str, Dict[str, Any]],
                find: Callable[[str], Container],
                pick: Callable[[str, Iterable[int]], int]) -> Tuple[List[str], List[str]]:
    """argv between `create` and the image's name, and the words after it, of a create request; `image` is the image's
    own configuration, `pick` finds ports. 400 for bad values."""
    host = body.get("HostConfig") or {}
    check_config(body, host)
    check_limits(host)
    words = [word for path, flag, render in CREATE_FLAGS for word in render(field_of(body, path), flag)]
    if host.get("NanoCpus"):
        words.append(f"--cpus={host['NanoCpus'] / 1e9:g}")
    if host.get("MemorySwappiness", -1) >= 0:
        words.append(f"--memory-swappiness={host['MemorySwappiness']}")
    if body.get("StopTimeout") is not None:
        words.append(f"--stop-timeout={body['StopTimeout']}")
    labels = body.get("Labels") or {}
    if any(key.startswith(HIDDEN_LABELS[:2]) for key in labels):
        raise BadParameter("invalid label: names that begin with nerdctl/ are nerdctl's own")
    # A name without a value would be taken from the daemon's own environment: amended_spec() takes it away.
    words += [f"--env={each}" for each in body.get("Env") or [] if "=" in each]
    words += hostname_args(body) + publish_args(published_ports(body, image, pick))
    words += tmpfs_args(host) + device_args(host)
    words += [f"--restart={policy_word(host)}"] if policy_word(host) not in ("", "no") else []
    networked = network_args(body, networks)
    if "--network=host" not in networked and not os.geteuid():
        # As dockerd; before what the client asks for.
        words.insert(0, "--sysctl=net.ipv4.ping_group_range=0 2147483647")
    words += networked + namespace_args(host, find) + log_args(host)
    words += init_args(host) + security_args(host)
    words += _pairs(labels, "--label")
    flags, command = command_words(body, image)
    return words + flags, command


def create_warnings(body: Dict[str, Any]) -> List[str]:
    """What is accepted and not carried out, or dangerous, a sentence each."""
    host = body.get("HostConfig") or {}
    found = [f"{key} is not carried out: nerdctl has no such option" for key in IGNORED_FIELDS if host.get(key)]
    if (host.get("LogConfig") or {}).get("Type") == "local":
        found.append("the log driver local is not available: json-file is used")
    if host.get("NetworkMode") == "host" and host.get("PortBindings"):
        found.append("Published ports are discarded when using host network mode")
    if host.get("OomKillDisable") and not host.get("Memory"):
        found.append("OOM killer is disabled for the container, but no memory limit is set, this can result in the "
                     "system running out of resources.")
    endpoints = field_of(body, "NetworkingConfig.EndpointsConfig") or {}
    found += [f"the option {key} of network {network} is not carried out: nerdctl has none for one container"
              for network, one in endpoints.items()
              for key in one.get("DriverOpts") or {}]
    return found


###############################################################################
# Container create
###############################################################################

# Longer ones are no names of files, by which nerdctl keeps them.
CONTAINER_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,254}")


def check_name(engine: Engine, name: str) -> str:
    """A new container's name without its slash; 400 for what is none, 409 for one in use."""
    name = name[1:] if name.startswith("/") else name
    if not CONTAINER_NAME.fullmatch(name):
        raise BadParameter(f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    # nerdctl keeps the name of a container whose creation was killed, and the old one of one that is started after it
    # was renamed, also when that is gone. One that is being made has a folder, and a little time.
    store, namespace = engine.inventory.store, engine.nerdctl.namespace
    for folder in (os.path.join(store, "names", namespace), os.path.join(store, namespace)):
        # The second one is that of nerdctl 2.0 and 2.1. The lock is nerdctl's: the name may be another one's as soon as
        # it is let go.
        with contextlib.suppress(OSError), locked(folder), open(os.path.join(folder, name), encoding="ascii",
                                                                errors="replace") as file:
            identity = file.read(64)
            known = engine.inventory.containers().get(identity)
            if (known.name != name if known else time.time() - os.fstat(file.fileno()).st_mtime > SHORT_CALL
                    or not os.path.exists(os.path.join(store, "containers", namespace, identity))):
                os.unlink(file.name)
    for each in engine.inventory.containers().values():
        if each.name == name:
            raise Conflict(f'Conflict. The container name "/{name}" is already in use by container "{each.id}". '
                           "You have to remove (or rename) that container to be able to reuse that name.")
    return name


class Plan(NamedTuple):
    """What a container is made of: `words` between the command and the image, `image` its name, `command` the words
    after it, `request` what is kept of the request, `health` the health check if there is one, `mounts` the Mounts,
    `image_id` the image's id, `recursive` whether read-only ones are so with all that is mounted below them."""

    words: List[str]
    image: str
    command: List[str]
    request: Dict[str, Any]
    health: Dict[str, Any]
    mounts: Tuple[Dict[str, Any], ...]
    image_id: str
    recursive: bool


def shared_names(request: Dict[str, Any]) -> Dict[str, str]:
    """The names of the containers whose namespaces a create request wants to have, by the fields that name them."""
    host = request.get("HostConfig") or {}
    return {key: host[key].partition(":")[2] for key in ("NetworkMode", "IpcMode", "PidMode")
            if (host.get(key) or "").startswith("container:")}


def link_to(engine: Engine, text: str) -> str:
    """One of HostConfig.Links (`name:alias`) with the id in place of the name, which may change; 400 with dockerd's
    words where there is no such container."""
    name, _, alias = text.strip("/").partition(":")
    other = other_container(engine.inventory.container, name, f"could not get container for {name}: ")
    return f"{other.id}:{alias or name}"


def kept_request(engine: Engine, body: Dict[str, Any], image: Dict[str, Any]) -> Dict[str, Any]:
    """What is kept of a create request: with the ports that the image exposes, its health check and its shell, and with
    ids for the names of containers, which may change."""
    more = {"Healthcheck": health_check(body, image),
            "ExposedPorts": {**(image.get("ExposedPorts") or {}), **(body.get("ExposedPorts") or {})}}
    found = {**({"Shell": image["Shell"]} if image.get("Shell") else {}), **body,
             **{key: value for key, value in more.items() if value}}
    for key, name in shared_names(body).items():
        with contextlib.suppress(NotFound):
            found["HostConfig"] = {**found["HostConfig"], key: f"container:{engine.inventory.container(name).id}"}
    links = field_of(body, "HostConfig.Links")
    if links and (field_of(body, "HostConfig.NetworkMode") or "default") in ("default", "bridge"):
        found["HostConfig"] = {**found["HostConfig"], "Links": [link_to(engine, each) for each in links]}
    endpoints = field_of(found, "NetworkingConfig.EndpointsConfig")
    if isinstance(endpoints, dict):
        by_id = {each["Id"]: name for name, each in engine.inventory.networks().items()}
        named = {by_id.get(name, name): each for name, each in endpoints.items()}
        found["NetworkingConfig"] = {**found["NetworkingConfig"], "EndpointsConfig": named}
    return found


def plan_container(engine: Engine, body: Dict[str, Any], platform: str, recursive: bool) -> Plan:
    """The plan for a create request. 404 when there is no such image, 400 for bad values."""
    name = body.get("Image") or ""
    if not name:
        raise BadParameter("no command specified" if not body else "invalid reference format")
    group = engine.inventory.image(name)
    platform_content(group, platform, name)
    full = ""
    with contextlib.suppress(BadParameter):
        full = parse_reference(name).name
    image = group.config.get("config") or {}
    words, command = create_args(body, image, engine.inventory.networks(), engine.inventory.container,
                                 functools.partial(pick_port, engine))
    for key in image.get("Labels") or {}:
        # nerdctl takes an image's labels over, and would have orders from it.
        if key.startswith(HIDDEN_LABELS[:2]) and key != "nerdctl/healthcheck":
            raise BadParameter(f"image {name} has the label {key}: names that begin with nerdctl/ are nerdctl's own")
    if platform:
        words.append(f"--platform={platform_text(parse_platform(platform))}")
    return Plan(words, full if full in group.names else group.name, command, kept_request(engine, body, image),
                health_check(body, image), tuple(request_mounts(body, engine.inventory.container)), group.id,
                recursive)


def make_container(engine: Engine, plan: Plan, name: str, later: str) -> Container:
    """Create a container and return what is known of it without asking. `later` says what it lacks, "" for nothing."""
    told = {**request_labels(plan.request), LABEL_IMAGE: plan.image_id, **({LABEL_LATER: later} if later else {})}
    labels, names = [f"--label={key}={value}" for key, value in told.items()], [f"--name={name}"] if name else []
    with fillable(engine, plan.mounts) as mounts, profile_files(engine, plan.words) as words:
        output = engine.nerdctl.run("create", "--pull=never", *names, *words, *mount_words(mounts), *labels,
                                    "--", plan.image, *plan.command)
    real = output.stdout.decode().strip().rpartition("\n")[2]
    if not re.fullmatch(r"[0-9a-f]{64}", real):
        raise ApiError(f"nerdctl created a container and printed no id: {real[:100]!r}")
    engine.inventory.records.invalidate(real)
    container, health = Container(engine.containerd.get_container(real)), json.dumps(plan.health)
    # Where nerdctl keeps it, word by word, and also by one that has no flags for it.
    own = {"nerdctl/healthcheck": health} if plan.health and len(health) <= REQUEST_PART else {}
    domain = plan.request.get("Domainname") or ""
    own.update({"nerdctl/domainname": domain} if HOST_NAME.fullmatch(domain) else {})
    try:
        spec = own_files(container, amended_spec(container.spec, plan.request), plan.request)
        return finish_container(engine, container, spec, own, mounts, plan.recursive)
    except BaseException:
        engine.nerdctl.output("rm", "--force", "--volumes", "--", real)
        engine.inventory.records.invalidate(real)
        raise


def set_hostname(spec: Dict[str, Any], name: str) -> None:
    """Give a container's OCI spec a host name."""
    if has_namespace(spec, "uts"):
        spec["hostname"] = name
    process = spec.get("process") or {}
    process["env"] = [f"HOSTNAME={name}" if each.startswith("HOSTNAME=") else each for each in process.get("env") or []]


NETWORK_FILES = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf")


def share_network_files(container: Container, spec: Dict[str, Any], other: Container) -> None:
    """Give a container the host name of another one, and its files of the network, in place of those that nerdctl made
    for it; what a client has mounted there stays, and is hidden by none of its own."""
    own = tuple(folder + "/" for folder in (container.folder, hosts_folder(container)) if folder)
    mounts = [each for each in spec.get("mounts") or [] if not (each.get("destination") in NETWORK_FILES
                                                                and str(each.get("source")).startswith(own))]
    taken = [each.get("destination") for each in mounts]
    spec["mounts"] = mounts + [each for each in other.spec.get("mounts") or []
                               if each.get("destination") in NETWORK_FILES and each["destination"] not in taken]
    set_hostname(spec, other.spec.get("hostname") or "")


def own_files(container: Container, spec: Dict[str, Any], request: Dict[str, Any]) -> Dict[str, Any]:
    """The OCI spec of a new container with the files that dockerd gives it: the file by which programs know that they
    are in a container, the lines of the host's hosts file where it has the host's network and no hosts of its own, and
    its own host name also where nerdctl was told an alias for it, by which others find it while no daemon runs."""
    if not container.folder:
        return spec
    places = [each.get("destination") for each in spec.get("mounts") or []]
    if any(places.count(each) > 1 for each in NETWORK_FILES):
        share_network_files(container, spec, container)
    mark, name = os.path.join(container.folder, "dockerenv"), os.path.join(container.folder, "hostname")
    with contextlib.suppress(OSError), open(mark, "w", encoding="ascii") as file:
        os.fchmod(file.fileno(), 0o755)
        spec.setdefault("mounts", []).append({"destination": "/.dockerenv", "type": "bind", "source": mark,
                                              "options": ["bind", "rprivate", "ro"]})
    if network_names(container) == ["host"] and not container.host_config.get("ExtraHosts"):
        with contextlib.suppress(OSError), open("/etc/hosts", encoding="utf-8", errors="surrogateescape") as file:
            told = file.read(LARGEST_HOSTS // 2).splitlines()
            rewrite_hosts(hosts_folder(container), lambda lines: lines + told)
    if not request.get("Hostname") and hostname_args(request):
        set_hostname(spec, container.id[:12])
        with contextlib.suppress(OSError), open(name, "w", encoding="ascii") as file:
            file.write(container.id[:12] + "\n")
    return spec


# With the host's IPC namespace nerdctl takes the host's mount of it, which there need not be.
MQUEUE = {"type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}


def amended_spec(spec: Dict[str, Any], request: Dict[str, Any]) -> Dict[str, Any]:
    """The OCI spec of a new container with what a create request asks for and nerdctl has no options for."""
    host, linux = request.get("HostConfig") or {}, dict(spec.get("linux") or {})
    process, asked = spec.get("process") or {}, request.get("Env") or []
    gone = {each for each in asked if "=" not in each} - {each.partition("=")[0] for each in asked if "=" in each}
    environment = [each for each in process.get("env") or [] if each.partition("=")[0] not in gone]
    if not host.get("Privileged"):
        linux.update({name: host[key] for key, name in (("MaskedPaths", "maskedPaths"),
                                                        ("ReadonlyPaths", "readonlyPaths")) if key in host})
    sysctls = dict(linux.get("sysctl") or {})
    if request.get("Domainname") and has_namespace(spec, "uts"):
        sysctls["kernel.domainname"] = request["Domainname"]
    open_cgroups = any(each.split("=")[0] == "writable-cgroups" and each.lower().partition("=")[2] in (
        "", "1", "t", "true") for each in host.get("SecurityOpt") or [])
    mounts = [with_access(each, "rw") if open_cgroups and each.get("destination") == "/sys/fs/cgroup" else
              {**each, **MQUEUE} if each.get("source") == "/dev/mqueue" and not os.path.exists("/dev/mqueue") else each
              for each in spec.get("mounts") or []
              if host.get("IpcMode") != "none" or each.get("destination") != "/dev/shm"]
    found = {"linux": {**linux, **({"sysctl": sysctls} if sysctls else {})}, "mounts": mounts,
             "process": {**process, **({"env": environment} if environment else {})}}
    found = {**spec, **{key: value for key, value in found.items() if value}}
    if not has_namespace(spec, "uts"):
        # nerdctl gives it a host name nevertheless, with which no runtime starts it.
        found.pop("hostname", None)
    with contextlib.suppress(ApiError):
        # Its start tells what is wrong with them.
        found = with_devices(found, host)
    return found


def host_devices(path: str, target: str) -> List[Dict[str, Any]]:
    """The device at a path of the host, or those in the folder there, as an OCI spec has them, with `target` in place
    of the path; 500 with dockerd's words where there is none."""
    real, found = os.path.realpath(path), []
    places = [real, *(os.path.join(folder, name) for folder, _, names in os.walk(real) for name in names)]
    for place in places:
        try:
            status = os.lstat(place)
        except OSError as error:
            failure = error.strerror.lower()
            continue
        kind, failure = "c" * stat.S_ISCHR(status.st_mode) or "b" * stat.S_ISBLK(status.st_mode), "not a device node"
        if kind:
            found.append({"path": target + place[len(real):], "type": kind, "major": os.major(status.st_rdev),
                          "minor": os.minor(status.st_rdev), "fileMode": stat.S_IMODE(status.st_mode),
                          "uid": status.st_uid, "gid": status.st_gid})
    if not found:
        raise ApiError(f'error gathering device information while adding custom device "{path}": {failure}')
    return found


def device_rule(text: str) -> Dict[str, Any]:
    """One of DeviceCgroupRules (`c 1:* rwm`) as an OCI spec has it; 500 with dockerd's words for what is none."""
    found = re.fullmatch(r"([acb]) ([0-9]{1,9}|\*):([0-9]{1,9}|\*) ([rwm]{1,3})", text)
    if not found:
        raise ApiError(f"invalid device cgroup rule format: '{text}'")
    numbers = {name: int(each) for name, each in zip(("major", "minor"), found.groups()[1:3]) if each != "*"}
    return {"allow": True, "type": found[1], **numbers, "access": found[4]}


def with_devices(spec: Dict[str, Any], host: Dict[str, Any]) -> Dict[str, Any]:
    """The OCI spec of a container with the devices of its HostConfig as they are now, in place of those that it had of
    them. 500 with dockerd's words where one is not there, or a rule is none."""
    if not host.get("Devices") and not host.get("DeviceCgroupRules"):
        return spec
    linux, places, nodes, rules = spec.get("linux") or {}, (), [], []
    for each in host.get("Devices") or []:
        path = each.get("PathOnHost") or ""
        target = os.path.normpath("/" + (each.get("PathInContainer") or path).lstrip("/"))
        found, places = host_devices(path, target), (*places, target)
        nodes += found
        rules += [{"allow": True, **{key: node[key] for key in ("type", "major", "minor")},
                   "access": each.get("CgroupPermissions") or "rwm"} for node in found]
    rules += map(device_rule, host.get("DeviceCgroupRules") or [])
    kept = [each for each in linux.get("devices") or [] if not (each["path"] + "/").startswith(
        tuple(each + "/" for each in places))]
    had = [each for each in linux.get("devices") or [] if each not in kept]
    allowed = [each for each in (linux.get("resources") or {}).get("devices") or [] if each not in rules and not any(
        {**each, "access": ""}.items() <= {**node, "allow": True, "access": ""}.items() for node in had)]
    return {**spec, "linux": {**linux, "devices": kept + nodes, "resources": {
        **(linux.get("resources") or {}), "devices": allowed + rules * (not host.get("Privileged"))}}}


# What `nerdctl create` refuses and dockerd only at the start -> the words that it is made without, and dockerd's words,
# "" for what it gets then.
REFUSED_LATER = (
    ("port is already allocated", "--publish=", ""),
    ("no users found", "--user=", "unable to find user {user}: no matching entries in passwd file"),
    ("no groups found", "--user=", "unable to find group {group}: no matching entries in group file"),
    ("unable to find group (.*)", "--group-add=", "Unable to find group {0}: no matching entries in group file"),
    ("no known GPU vendor", "--gpus=", "failed to discover GPU vendor from CDI: no known GPU vendor found"),
    ("bad format for device path: ([^:]*)", "--device-", "stat {0}: no such file or directory"))


def refused_later(request: Dict[str, Any], message: str) -> Tuple[str, str]:
    """How the words begin that a container has to be made without, where nerdctl refused them with this message, and
    what its start is to say of that, "" for none of both."""
    user, _, group = (request.get("User") or "").partition(":")
    for pattern, words, told in REFUSED_LATER:
        found = re.search(pattern, message)
        if found:
            return words, told.format(*found.groups(), user=user, group=group)
    return "", ""


def create_container(engine: Engine, plan: Plan, name: str) -> Container:
    """Create a container. Where it is to have namespaces of others, or ports that others have now, `nerdctl create`
    makes it without them, since it wants these others to run and those ports to be free; it gets them in place, for
    its start."""
    absent = "--network=none" in plan.words and network_asked(plan.request)
    plan = plan._replace(mounts=tuple(make_volumes(engine, plan.mounts)))
    try:
        try:
            container = make_container(engine, plan, name, "1" if absent or shared_names(plan.request) else "")
        except ApiError as error:
            without, told = refused_later(plan.request, str(error))
            if not without:
                raise
            words = [each for each in plan.words if not each.startswith(without)]
            container = make_container(engine, plan._replace(words=words), name, told or "1")
    except BaseException:
        for mount in plan.mounts:
            if mount.get("Anonymous"):
                engine.nerdctl.output("volume", "rm", "--", mount["Source"])
        raise
    asked = field_of(container.request, "NetworkingConfig.EndpointsConfig") or {}
    # The rest of them, where nerdctl could be told of the first one only.
    rest = [each for each in asked if each not in ("default", *network_names(container))]
    if rest and len(network_names(container)) == 1 and not {"host", "none"} & set(network_names(container)):
        names = network_names(container) + rest
        keep_networks(engine, container, {name: asked_endpoint(container, name) for name in names}, {})
        container = engine.inventory.container(container.id)
    if LABEL_LATER in container.labels:
        try:
            container = complete_container(engine, container)
        except (ApiError, OSError) as error:
            # Its start does it.
            log(f"{container.name}: {error}")
    return container


def give_ports(engine: Engine, container: Container) -> Dict[str, str]:
    """Publish the ports that a create request asks for; the labels that are to be set for it. nerdctl has them in a
    file, which its `create` always writes, and before 2.1.3 in a label."""
    mappings = published_ports(container.request, {}, functools.partial(pick_port, engine))
    path = os.path.join(container.folder, "network-config.json")
    if not os.path.exists(path):
        return {"nerdctl/ports": json.dumps(mappings)} if mappings else {}
    with locked(container.folder):
        with open(path + ".new", "w", encoding="ascii", opener=lambda *words: os.open(*words, 0o600)) as file:
            json.dump({"portMappings": mappings}, file)
        os.replace(path + ".new", path)
    return {}


def complete_container(engine: Engine, container: Container) -> Container:
    """Give a container the networks, namespaces and ports that `nerdctl create` made it without: it is as if nerdctl
    had done so, and a bare `nerdctl start` finds it so. 404 while one of its networks is not there."""
    if container.labels[LABEL_LATER] != "1":
        told = container.labels[LABEL_LATER]
        raise (BadParameter if told.startswith("unable") else ApiError)(told)
    if network_names(container) == ["none"] and network_asked(container.request):
        known = engine.inventory.networks()
        endpoints = asked_networks(container.request, known)
        refuse(*((name not in known, f"network {name} not found") for name in endpoints),
               start="failed to set up container networking: ", kind=NotFound)
        keep_networks(engine, container, endpoints, {})
        container = engine.inventory.container(container.id)
    spec, labels = json.loads(container.record.spec), {LABEL_LATER: ""}
    for key, name in shared_names(container.request).items():
        other = engine.inventory.container(name)
        if key == "NetworkMode":
            labels.update({"nerdctl/networks": json.dumps([f"container:{other.id}"]), "nerdctl/hostname": ""})
            share_network_files(container, spec, other)
        elif key == "PidMode":
            labels["nerdctl/pid-container"] = other.id
        else:
            noted = json_of(dict, container.labels.get("nerdctl/ipc"))
            labels["nerdctl/ipc"] = json.dumps({**noted, "mode": "container", "victimContainerId": other.id})
    return rewrite_container(engine, container, spec, {**give_ports(engine, container), **labels})


def joined_containers(container: Container) -> Dict[str, str]:
    """The ids of the containers whose namespaces a container has, by kinds of the OCI spec, from nerdctl's labels."""
    network, ipc = (network_names(container) or [""])[0], json_of(dict, container.labels.get("nerdctl/ipc"))
    # The label of a process id namespace alone does not tell: nerdctl takes those of the image over.
    joins = str(container.host_config.get("PidMode") or "").startswith("container:") or any(
        each.get("type") == "pid" and each.get("path") for each in field_of(container.spec, "linux.namespaces") or [])
    found = {"network": network[len("container:"):] if network.startswith("container:") else "",
             "ipc": str(ipc.get("victimContainerId")) if ipc.get("mode") == "container" else "",
             "pid": container.labels.get("nerdctl/pid-container") or "" if joins else ""}
    return {kind: identity for kind, identity in found.items() if identity}


def shares_host(engine: Engine, container: Container, kind: str) -> bool:
    """Whether a container has a namespace of the host, by itself or by way of others."""
    other = engine.inventory.containers().get(joined_containers(container).get(kind, ""))
    return not has_namespace(container.spec, kind) or other is not None and shares_host(engine, other, kind)


# dockerd's words for a container whose namespaces are wanted and that does not run.
NOT_JOINED = {"network": "cannot join network of a non running container: {0}",
              "ipc": "can't join IPC of container {0}: container {0} is not running",
              "pid": "container {0} is not running"}


def join_namespaces(engine: Engine, container: Container) -> Container:
    """Put the namespaces of other containers, as they are now, into the OCI spec of a container. 404 and 409 with
    dockerd's words where there is no such container, or it does not run."""
    spec = json.loads(container.record.spec)
    linux = spec.get("linux") or {}
    for kind, identity in joined_containers(container).items():
        other = engine.inventory.container(identity)
        if not other.running:
            raise Conflict(NOT_JOINED[kind].format(other.id))
        host = shares_host(engine, other, kind)
        path = f"/proc/{other.task.pid}/ns/{'net' if kind == 'network' else kind}"
        linux["namespaces"] = [each for each in linux.get("namespaces") or [] if each.get("type") != kind]
        linux["namespaces"] += [] if host else [{"type": kind, "path": path}]
        if kind == "network" and host:
            # What nerdctl sets for any container may not be set on the host.
            asked = container.host_config.get("Sysctls") or {}
            linux["sysctl"] = {key: value for key, value in (linux.get("sysctl") or {}).items()
                               if not key.startswith("net.") or key in asked}
        elif kind == "ipc":
            shared = {each.get("destination"): each for each in other.spec.get("mounts") or []}
            if (shared.get("/dev/shm") or {}).get("type") != "bind":
                raise ApiError(f"can't join IPC of container {other.id}: non-shareable IPC (hint: use "
                               "IpcMode:shareable for the donor container)")
            spec["mounts"] = [shared.get(each.get("destination"), each)
                              if each.get("destination") in ("/dev/shm", "/dev/mqueue") else each
                              for each in spec.get("mounts") or []]
    return container if spec == container.spec else rewrite_container(engine, container, spec, {})


def renew_shm(container: Container) -> None:
    """Mount an empty /dev/shm that others may share with a container, as nerdctl does at creation and each start."""
    ipc = json_of(dict, container.labels.get("nerdctl/ipc"))
    path = str(ipc.get("hostShmPath") or "")
    if ipc.get("mode") != "shareable" or not path or os.geteuid():
        return
    with contextlib.suppress(FileNotFoundError):
        while os.path.ismount(path):
            libc_call("umount2", os.fsencode(path), MNT_DETACH)
    os.makedirs(path, 0o700, exist_ok=True)
    size = str(ipc.get("shmSize") or HOST_CONFIG["ShmSize"]).lower().rstrip("ib")
    mount_all([{"type": "tmpfs", "source": "/dev/shm",
                     "options": ["nosuid", "nodev", "noexec", "mode=1777", f"size={size}"]}], path)


def overlap(one: Dict[str, Any], other: Dict[str, Any]) -> bool:
    """Whether two published ports (of Docker's lists) cannot be there at once."""
    addresses = {one["IP"], other["IP"]}
    return (one["PublicPort"] == other["PublicPort"] and one["Type"] == other["Type"]
            and len({":" in each for each in addresses}) == 1
            and (len(addresses) == 1 or not addresses.isdisjoint(("0.0.0.0", "::"))))


def take_down_network(engine: Engine, container: Container) -> None:
    """Take down what nerdctl's hook set up for a container's last run: its networks, and a process that holds its
    ports. dockerd does so at its end, and nerdctl when its task is deleted, which may be long after. To be called by
    its owner, any number of times."""
    if not os.path.exists(os.path.join(hosts_folder(container), "meta.json")):
        return
    # The hook gives the container's name up, too, which it is to keep.
    annotations = {**(container.spec.get("annotations") or {}), "nerdctl/name": container.id}
    with temporary_folder("bundle") as folder:
        with open(os.path.join(folder, "config.json"), "w", encoding="ascii") as file:
            json.dump({"root": {"path": "rootfs"}}, file)
        state = {"ociVersion": "1.0.2", "id": container.id, "status": "stopped", "bundle": folder,
                 "annotations": annotations}
        output = engine.nerdctl.output("internal", "oci-hook", "postStop", data=json.dumps(state).encode())
    if output.status:
        log(f"{container.name}: its network was not taken down: {nerdctl_error(output.stderr)}")


def taken_port(engine: Engine, container: Container) -> str:
    """The address of a port of a container that others have, "" for none: then its ports are claimed, until its start
    has come to an end. Containers that have ended have none."""
    mine = container.ports
    for each in engine.inventory.containers().values() if mine else ():
        if (each.id != container.id and each.state.kind == "exited" and each.task is not None
                and any(itertools.starmap(overlap, itertools.product(mine, each.ports)))):
            owner = engine.owner(each.id)
            # Mostly it is being taken down just now; who starts it may wait for this one in turn.
            if owner.lock.acquire(timeout=2.0):
                try:
                    take_down_network(engine, each)
                finally:
                    owner.lock.release()
    others = [port for each in (engine.inventory.containers().values() if mine else ()) for port in each.ports
              if each.id != container.id and (each.running or each.state.kind == "restarting")]
    with engine.lock:
        others += [port for identity, ports in engine.claimed.items() if identity != container.id for port in ports]
        for port in mine:
            if any(overlap(port, each) for each in others) or is_bound(port):
                return f"{host_text(port['IP'])}:{port['PublicPort']}"
        engine.claimed[container.id] = mine
    return ""


def claim_ports(engine: Engine, container: Container) -> Container:
    """Make sure that nobody else has the ports of a container, which nerdctl only looks for when it is created; where
    the client left the choice it gets others. 500 with dockerd's words where they are taken."""
    taken = taken_port(engine, container)
    if taken and container.request:
        container = rewrite_container(engine, container, container.spec, give_ports(engine, container))
        taken = taken_port(engine, container)
    if taken:
        raise ApiError(f"driver failed programming external connectivity on endpoint {container.name} "
                       f"({container.id}): Bind for {taken} failed: port is already allocated")
    return container


def prepare_start(engine: Engine, container: Container) -> Container:
    """What `nerdctl start` does before it makes a task, and what was left for later when a container was created; the
    container as it is then. To be called by the owner of a container that does not run. 404, 409 and 500 where it
    cannot have the namespaces or the ports of its request."""
    if LABEL_LATER in container.labels:
        container = complete_container(engine, container)
    renew_sources(container.host_config)
    spec = with_devices(container.spec, container.host_config)
    if spec != container.spec:
        container = rewrite_container(engine, container, spec, {})
    release_networks(engine, container)
    if container.ports and container.task is not None:
        # At a restart a process of its last run has them.
        take_down_network(engine, container)
    container = claim_ports(engine, join_namespaces(engine, container))
    renew_shm(container)
    if container.task is not None:
        with contextlib.suppress(NotFound):
            engine.containerd.delete_task(container.id)
        engine.inventory.records.invalidate(container.id)
    return container


RESTART_LABEL = "containerd.io/restart."


def hold_policy(engine: Engine, container: Container) -> None:
    """Before somebody ends a container: containerd's restart monitor is to leave it alone, whatever its policy is.
    Without a status it does not look at a container; resume_policy(), or `nerdctl start`, sets it again."""
    if any(RESTART_LABEL + key in container.labels for key in ("policy", "status")):
        engine.update(container, {RESTART_LABEL + "status": "", RESTART_LABEL + "explicitly-stopped": "true"})


def resume_policy(engine: Engine, container: Container) -> None:
    """Once a container was started: containerd's restart monitor carries its policy out, and counts from 0 again."""
    if RESTART_LABEL + "policy" in container.labels:
        engine.update(container, {RESTART_LABEL + "status": "running", RESTART_LABEL + "explicitly-stopped": "false",
                                  RESTART_LABEL + "count": ""})


def policy_labels(container: Container, policy: str) -> Dict[str, str]:
    """The labels of another restart policy, as `nerdctl create --restart` writes it, or with "no" of none."""
    status = "running" if container.running or container.state.kind == "restarting" else ""
    if policy == "no":
        return {RESTART_LABEL + key: "" for key in ("policy", "status", "loguri")}
    return {RESTART_LABEL + "policy": policy, RESTART_LABEL + "status": status,
            RESTART_LABEL + "loguri": container.labels.get("nerdctl/log-uri") or "",
            **({RESTART_LABEL + "explicitly-stopped": "false"} if status else {})}


@route("POST", "/containers/create")
def container_create(engine: Engine, request: Request) -> Response:
    """Create a container; 201 with its id and warnings. 404 for no such image, 409 for a name in use, 400 for bad
    values. Query options other than name and platform, which some clients repeat there, are ignored."""
    body = request.json(CREATE_REQUEST)
    if not body:
        raise BadParameter("config cannot be empty in order to create a container")
    # From API 1.44 on, as dockerd does where the kernel can.
    recursive = request.version >= (1, 44) and tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 12)
    plan = plan_container(engine, body, request.value("platform"), recursive)
    name = check_name(engine, request.value("name")) if request.value("name") else ""
    return Response(201, {"Id": create_container(engine, plan, name).id, "Warnings": create_warnings(body)})


###############################################################################
# Process streams
###############################################################################

# Where a client is on the streams of a container's process, or may come for its stdin, they are FIFOs which this daemon
# reads and writes. They are in nerdctl's folder of the container, where the next daemon finds them. All other
# containers write to nerdctl's logging program, and clients are sent what that has written.
STDOUT, STDERR = 1, 2
FIFO_FOLDER = "nerdctld-"
Packing = Callable[[int, bytes], Tuple[bytes, ...]]


def multiplexed(kind: int, data: bytes) -> Tuple[bytes, ...]:
    """Output of a stream as a frame of Docker's own."""
    return struct.pack(">B3xI", kind, len(data)), data


def as_it_is(kind: int, data: bytes) -> Tuple[bytes, ...]:
    """Output of a stream as the process wrote it."""
    return (data,)


class DetachKeys:
    """Finds the keys that detach a client from a terminal."""

    def __init__(self, text: str):
        self.sequence = b""
        for key in (text or "ctrl-p,ctrl-q").split(","):
            found = re.fullmatch(r"ctrl-([a-z@\[\\\]^_])", key)
            if not found and len(key) != 1:
                raise BadParameter(f"Invalid detach keys ({text}) provided")
            self.sequence += bytes([ord(found.group(1).upper()) & 0x1F]) if found else key.encode("latin-1", "replace")
        self.matched = 0

    def feed(self, data: bytes) -> Tuple[bytes, bool]:
        """What is to be passed on of some input, and whether the keys were typed."""
        data = self.sequence[:self.matched] + data
        before, keys, _ = data.partition(self.sequence)
        if keys:
            return before, True
        # Its end may be the beginning of them.
        self.matched = max(size for size in range(len(self.sequence)) if data.endswith(self.sequence[:size]))
        return data[:len(data) - self.matched], False


class Attachment:
    """A client on the streams of a container or exec: which of them it wants, and how they are packed for it. Output
    waits here until the client takes it, also before its connection has been handed over."""

    # How many bytes may wait before the process that writes them has to wait, too: as many as with dockerd.
    MOST = 1 << 20

    def __init__(self, stdout: bool, stderr: bool, pack: Packing, stdin: bool = False):
        self.connection: Optional[Connection] = None
        self.wanted = {STDOUT: stdout, STDERR: stderr}
        self.pack, self.stdin = pack, stdin
        self.lock = threading.Lock()
        self.waiting: List[bytes] = []
        self.size = 0
        self.gone = False
        # Set when there is nothing more to come, or the client has left.
        self.done = threading.Event()
        # Set when it is known what streams it is on: `streams`, or none.
        self.ready = threading.Event()
        self.streams: Optional["ProcessStreams"] = None

    @property
    def full(self) -> bool:
        """Whether it takes no more for now."""
        return self.size > self.MOST and not self.gone

    def connect(self, connection: Connection) -> None:
        """The client's connection is there."""
        with self.lock:
            self.connection = connection
        self.send()
        if self.done.is_set():
            connection.stop_input()
        if self.streams:
            self.streams.wake()

    def put(self, kind: int, data: bytes) -> None:
        """Send some output, or as much of it as the client takes now."""
        if self.wanted[kind] and data:
            self.send(*self.pack(kind, data))

    def send(self, *parts: bytes) -> None:
        """Send some bytes behind all that waits, or without any what waits, as much as the client takes now."""
        with self.lock:
            # Behind something that the client did not take it takes nothing either.
            due = self.connection and not (parts and self.waiting)
            if not self.gone:
                self.waiting += parts
                self.size += sum(map(len, parts))
            if due and self.waiting:
                try:
                    rest = self.connection.send_now(*self.waiting)
                    self.waiting, self.size = [rest] if rest else [], len(rest)
                except ClientGone:
                    self.leave()

    def drain(self) -> None:
        """Send all that waits, however long the client takes for it."""
        while self.size and not self.gone and self.connection:
            poller = select.poll()
            poller.register(self.connection.sock, select.POLLOUT)
            poller.poll(1000)
            self.send()

    def leave(self) -> None:
        """The client is there no more: what waits for it to take more goes on."""
        self.gone = True
        self.finish()
        if self.streams:
            self.streams.wake()

    def finish(self) -> None:
        """There is nothing more to come; whoever waits for input from the client need not any more."""
        self.done.set()
        self.ready.set()
        if self.connection:
            self.connection.stop_input()


class ProcessStreams:
    """The FIFOs of one process: its output goes to the log, `keep(kind, data)`, and to every attachment, and their
    input to it, which with `once` ends with that of the first. `close_stdin()` has containerd end its input, `on_end()`
    is called when all output has come, before the clients are told. With `found`, they are those of a process that
    runs already, in this folder."""

    # How long after the end of the process output may come that others hold open; dockerd waits as long.
    LINGER = 2.0

    def __init__(self, folder: str, stdin: bool, terminal: bool, once: bool,
                 keep: Optional[Callable[[int, bytes], None]] = None,
                 close_stdin: Callable[[], None] = lambda: None, on_end: Callable[[], None] = lambda: None,
                 found: str = ""):
        self.lock = threading.Lock()
        self.attachments: List[Attachment] = []
        self.keep, self.tell_stdin_closed, self.on_end = keep, close_stdin, on_end
        self.once = once
        self.started, self.ended = threading.Event(), threading.Event()
        self.exited_at: Optional[float] = None
        names = [name for name, wanted in (("stdin", stdin), ("stdout", True), ("stderr", not terminal))
                 if (os.path.exists(os.path.join(found, name)) if found else wanted)]
        self.folder = found
        self.descriptors: Dict[str, int] = {}
        self.waker: Tuple[int, ...] = ()
        try:
            if not found:
                self.folder = tempfile.mkdtemp(prefix=FIFO_FOLDER, dir=folder)
            # Whose daemon lives holds the lock: another one leaves it alone.
            self.descriptors["folder"] = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self.descriptors["folder"], fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in names:
                path = os.path.join(self.folder, name)
                if not found:
                    os.mkfifo(path, 0o600)
                # For writing so that it can be opened before anybody reads.
                mode = os.O_RDWR if name == "stdin" else os.O_RDONLY
                self.descriptors[name] = os.open(path, mode | os.O_NONBLOCK)
                enlarge_pipe(self.descriptors[name])
            self.waker = os.pipe()
        except OSError as error:
            self._close(remove=bool(self.folder) and not found)
            raise ApiError(f"cannot open FIFOs for the streams of a process: {error}") from None
        for end in self.waker:
            os.set_blocking(end, False)
        self.paths = TaskStreams(*(os.path.join(self.folder, name) if name in names else ""
                                   for name in ("stdin", "stdout", "stderr")), terminal)
        threading.Thread(target=self._follow, name="streams", daemon=True).start()

    def join(self, attachment: Attachment) -> bool:
        """Add a client; whether there is still something to come."""
        with self.lock:
            if self.ended.is_set():
                return False
            attachment.streams = self
            attachment.ready.set()
            # One that was there from the beginning may ask before the process runs.
            if attachment not in self.attachments:
                self.attachments = [*self.attachments, attachment]
            return True

    def begin(self) -> None:
        """The process runs: its input can be ended."""
        self.started.set()

    def exited(self, moment: Optional[float] = None) -> None:
        """The process has ended, just now or at a moment: output is waited for a little longer."""
        self.exited_at = time.monotonic() if moment is None else moment
        self.started.set()
        self.wake()

    def abandon(self) -> None:
        """There is, or will be, no process."""
        self.exited(0.0)

    def wake(self) -> None:
        """Have the thread that passes output on look again."""
        with self.lock, contextlib.suppress(OSError):
            if not self.ended.is_set():
                os.write(self.waker[1], b".")

    def write(self, data: bytes, attachment: Attachment) -> bool:
        """Pass input of a client on, of one that has left what is taken at once; False when none is taken any more."""
        view = memoryview(data)
        while view:
            with self.lock:
                descriptor = self.descriptors.get("stdin", -1)
                if descriptor < 0 or self.exited_at is not None:
                    return False
                with contextlib.suppress(BlockingIOError):
                    view = view[os.write(descriptor, view):]
                    continue
                if attachment.done.is_set():
                    return False
                # A number of its own: the end may come while it is waited for.
                descriptor = os.dup(descriptor)
            try:
                poller = select.poll()
                poller.register(descriptor, select.POLLOUT)
                poller.poll(100)
            finally:
                os.close(descriptor)
        return True

    def close_stdin(self) -> None:
        """End the input of the process, which finds the end when it has read what came before."""
        self.started.wait()
        with self.lock:
            descriptor = self.descriptors.pop("stdin", None)
            if descriptor is None:
                return
            os.close(descriptor)
        # The process may have ended by now.
        with contextlib.suppress(ApiError):
            self.tell_stdin_closed()

    def _follow(self) -> None:
        for step in (self._pass_on, self.on_end):
            try:
                step()
            except Exception:
                log(traceback.format_exc())
        with self.lock:
            attachments, self.attachments = self.attachments, []
            self._close()
            self.ended.set()
        for attachment in attachments:
            attachment.finish()

    def _pass_on(self) -> None:
        """Pass output on to its end. While a client is full nothing is read."""
        outputs = {self.descriptors[name]: kind for name, kind in (("stdout", STDOUT), ("stderr", STDERR))
                   if name in self.descriptors}
        late = 0
        while outputs and late < 1 << 20:
            poller = select.poll()
            poller.register(self.waker[0], select.POLLIN)
            behind = {each.connection.sock.fileno(): each for each in self.attachments
                      if each.size and each.connection and not each.gone}
            # One that is being closed has no number any more.
            behind.pop(-1, None)
            for descriptor in behind:
                poller.register(descriptor, select.POLLOUT)
            held = any(each.full for each in self.attachments)
            for descriptor in () if held else outputs:
                poller.register(descriptor, select.POLLIN)
            limit = None
            if self.exited_at is not None and not held:
                limit = max(0.0, self.exited_at + self.LINGER - time.monotonic()) * 1000
            ready = poller.poll(limit)
            if not ready:
                return
            for descriptor, _ in ready:
                if descriptor in outputs:
                    data = os.read(descriptor, BLOCK)
                    # What a pipe holds is all that the process itself can have written.
                    late += len(data) if limit == 0 else 0
                    if data and self.keep:
                        self.keep(outputs[descriptor], data)
                    for each in self.attachments:
                        each.put(outputs[descriptor], data)
                    if not data:
                        del outputs[descriptor]
                elif descriptor in behind:
                    behind[descriptor].send()
                else:
                    os.read(descriptor, 4096)
            if any(each.gone for each in self.attachments):
                with self.lock:
                    self.attachments = [each for each in self.attachments if not each.gone]

    def _close(self, remove: bool = True) -> None:
        for descriptor in [*self.descriptors.values(), *self.waker]:
            os.close(descriptor)
        self.descriptors.clear()
        if remove:
            remove_tree(self.folder)


def pump_stdin(attachment: Attachment, keys: Optional[DetachKeys]) -> bool:
    """Pass a client's input, if it is wanted, on until it ends, the client leaves or detaches. Whether it was detached
    by its keys: then it counts as gone."""
    streams = attachment.streams if attachment.stdin else None
    # To its end, which comes when the client has left: it may have sent something before.
    for data in iter(lambda: attachment.connection.recv(65536), b"") if streams else ():
        data, detached = keys.feed(data) if keys else (data, False)
        if not streams.write(data, attachment):
            break
        if detached:
            attachment.leave()
            return True
    if streams and streams.once:
        streams.close_stdin()
    return False


class JsonLog:
    """Appends to a json-file log as nerdctl's logging program does, whose lock it holds as long: `most` bytes a file, 0
    for any number, and `files` of them."""

    KINDS = {STDOUT: "stdout", STDERR: "stderr"}

    def __init__(self, path: str, most: int = 0, files: int = 1):
        self.path, self.most, self.files = path, most, files
        self.file = open(path, "ab", buffering=0)
        self.lock_file = os.open(os.path.join(os.path.dirname(path), "logger-lock"), os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.decoders = {kind: codecs.getincrementaldecoder("utf-8")("replace") for kind in self.KINDS}

    def __call__(self, kind: int, data: bytes, final: bool = False) -> None:
        """Write some output of a stream: a line of JSON for each line, and for what is none yet."""
        tail = f',"stream":"{self.KINDS[kind]}","time":"{rfc3339(time.time_ns())}"}}\n'
        encode = json.encoder.encode_basestring
        lines = re.findall(r"[^\n]*\n|[^\n]+", self.decoders[kind].decode(data, final))
        block = "".join([f'{{"log":{encode(line)}{tail}' for line in lines]).encode()
        try:
            if self.most and self.file.tell() and self.file.tell() + len(block) > self.most:
                self._rotate()
            self.file.write(block)
        except OSError as error:
            # The process is to go on without its log.
            log(f"{self.path}: {error}")

    def _rotate(self) -> None:
        names = [self.path, *(f"{self.path}.{number}" for number in range(1, self.files))]
        for old, new in reversed(list(zip(names, names[1:]))):
            with contextlib.suppress(FileNotFoundError):
                os.replace(old, new)
        if self.files < 2:
            # Not cut short: whoever reads it would not see that it begins anew.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        # The old one stays where there can be no new one.
        file = open(self.path, "ab", buffering=0)
        self.file.close()
        self.file = file

    def close(self) -> None:
        """Write what was held back of a character, and let the log go."""
        for kind, decoder in self.decoders.items():
            if decoder.getstate()[0]:
                self(kind, b"", final=True)
        self.file.close()
        os.close(self.lock_file)


def open_log(nerdctl: Nerdctl, container: Container) -> Any:
    """What writes a container's log: called with the stream and its bytes, and closed at the end. None for no log."""
    options = container.read_file("log-config.json").get("opts") or {}
    path, uri = log_path(container), container.labels.get("nerdctl/log-uri") or ""
    if path:
        return JsonLog(path, size_bytes(str(options.get("max-size") or "")),
                       int_or_zero(str(options.get("max-file") or "")) or 1)
    return nerdctl.start_logger(uri, container.id) if uri.startswith("binary://") else None


class LogLine(NamedTuple):
    """A line of a container's log: when it was written, as the log has it; STDOUT or STDERR; and its bytes."""

    stamp: str
    kind: int
    text: bytes

    @property
    def time(self) -> int:
        """Nanoseconds since 1970."""
        return nanoseconds_of(self.stamp) or 0


NO_LINE = LogLine("", STDOUT, b"")


def parse_log_lines(lines: List[bytes]) -> List[LogLine]:
    """The lines of a json-file log, without what is none."""
    try:
        # One text for all of them is read in a third of the time.
        return [LogLine(row["time"], STDERR if row["stream"] == "stderr" else STDOUT,
                        row["log"].encode("utf-8", "surrogatepass"))
                for row in json.loads(b"[" + b",".join(lines) + b"]")]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        half = len(lines) // 2
        return parse_log_lines(lines[:half]) + parse_log_lines(lines[half:]) if half else []


class LogFile:
    """A json-file log, which may come later, that is read while it is written and rotated: from the beginning of what
    rotation has left of it, or from its end."""

    def __init__(self, path: str, at_end: bool = False):
        self.path, self.rest = path, b""
        # What is read, and what is to be read after it, before what will be at the path then.
        self.files: List[Any] = []
        if self._open(path):
            if at_end:
                self.files[0].seek(0, os.SEEK_END)
            else:
                self._open_older()

    def _open(self, path: str) -> bool:
        with contextlib.suppress(OSError):
            self.files.append(open(path, "rb", buffering=0))
            return True
        return False

    def _open_older(self) -> None:
        """Open the files that rotation has put aside, too. Their numbers do not tell which is the oldest: nerdctl's
        grow, and the daemon's do so with age."""
        folder, name = os.path.split(self.path)
        newest = self.files[0]
        for each in os.listdir(folder):
            if re.fullmatch(re.escape(name) + r"\.\d+", each) and self._open(os.path.join(folder, each)):
                # It may have been put aside meanwhile.
                if os.path.samestat(os.fstat(self.files[-1].fileno()), os.fstat(newest.fileno())):
                    self.files.pop().close()
        self.files.sort(key=lambda each: (each is newest, os.fstat(each.fileno()).st_mtime_ns))

    def seek_tail(self, count: int) -> None:
        """Go to where the last `count` lines begin."""
        position, ends, data, first = 0, 0, b"", len(self.files)
        while first and ends <= count:
            first -= 1
            position = self.files[first].seek(0, os.SEEK_END)
            while position > 0 and ends <= count:
                size = min(65536, position)
                position = self.files[first].seek(position - size)
                data = self.files[first].read(size)
                ends += data.count(b"\n")
                self.files[first].seek(position)
        for _ in range(first):
            self.files.pop(0).close()
        if ends > count:
            # They begin in the block that was read last.
            self.files[0].seek(position + len(b"\n".join(data.split(b"\n")[:ends - count])) + 1)

    def lines(self) -> List[LogLine]:
        """What was written since the last call, at most some 256 KiB of it; [] when there is nothing new."""
        data = self.files[0].read(BLOCK) if self.files else b""
        while not data and self._goes_on():
            data = self.files[0].read(BLOCK)
        if not data:
            return []
        *whole, self.rest = (self.rest + data).split(b"\n")
        # Not empty while there is more to read.
        return parse_log_lines([line for line in whole if line]) or [NO_LINE]

    def _goes_on(self) -> bool:
        """Whether there is more behind the end of the file: a new one in its place, or itself if it was cut short."""
        if len(self.files) == 1:
            try:
                now, mine = os.stat(self.path), os.fstat(self.files[0].fileno())
            except OSError:
                return False
            if now.st_ino == mine.st_ino:
                return now.st_size < self.files[0].tell() and self.files[0].seek(0) == 0
            if mine.st_size > self.files[0].tell():
                # It was written to after we looked and before it was put aside.
                return True
        if self.files:
            self.files.pop(0).close()
        return bool(self.files) or self._open(self.path)

    def close(self) -> None:
        """Let the files go."""
        while self.files:
            self.files.pop().close()


def log_is_complete(container: Container) -> bool:
    """Whether nobody writes to a container's log: its logging process holds a lock while it has the output open."""
    try:
        with locked(os.path.join(container.folder, "logger-lock"), 0.0, fcntl.LOCK_SH):
            return True
    except OSError as error:
        return not isinstance(error, BlockingIOError)


def follow_log(engine: Engine, container: Container, file: LogFile, follow: bool,
               stop: Callable[[], bool]) -> Iterator[LogLine]:
    """The lines of a log from where `file` stands; with `follow` until the container's run has ended and all of it is
    read, or `stop()`. Yields a line without text now and then, for the caller to look around."""
    pause = 0.002
    patience = time.monotonic() + 2.0
    while not stop() and not engine.closing.is_set():
        runs, limit = run_state(engine, container)
        if runs and follow:
            patience = time.monotonic() + 2.0
        complete = log_is_complete(container)
        lines = [line for line in file.lines() if not limit or line.time < limit]
        if lines:
            pause = 0.002
            yield from lines
            continue
        if limit or (not follow if runs else complete or time.monotonic() > patience):
            return
        yield NO_LINE
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def run_state(engine: Engine, container: Container) -> Tuple[bool, int]:
    """Whether the run of a container that was seen, or if it did not run then, any run goes on; and when the next one
    has begun, in nanoseconds since 1970, 0 if it has not: as with dockerd, that is not followed."""
    if not engine.feed.live:
        return not log_is_complete(container), 0
    with contextlib.suppress(ApiError):
        now = engine.inventory.containers().get(container.id)
        if now and now.running:
            again = container.running and container.task.pid != now.task.pid
            return not again, (now.state.started_at or 1) * again
    return False, 0


def end_exec(engine: Engine, identity: str, name: str) -> bool:
    """Take a command away, killed if need be, whatever has become of it; whether there is nothing left of it."""
    for _ in range(2):
        try:
            engine.containerd.delete_exec(identity, name)
            return True
        except NotFound:
            return True
        except ApiError:
            with contextlib.suppress(ApiError):
                engine.containerd.kill_task(identity, signal.SIGKILL, name)
                engine.containerd.wait_process(identity, name, 5.0)
    return False


def exec_name(folder: str) -> str:
    """The id of a command of the daemon's own with its FIFOs in this folder: the next daemon finds what is left."""
    return sha256(os.path.basename(folder).encode()).hexdigest()


def fifo_folders(container: Container) -> List[str]:
    """The folders with FIFOs of a container's processes."""
    with contextlib.suppress(OSError):
        return [os.path.join(container.folder, name) for name in os.listdir(container.folder or os.devnull)
                if name.startswith(FIFO_FOLDER)]
    return []


def sweep_streams(engine: Engine, container: Container) -> None:
    """Remove the FIFOs that another daemon has left of processes which nobody can reach any more, in a container that
    the caller owns."""
    for folder in fifo_folders(container):
        if container.running and container.task.stdout == os.path.join(folder, "stdout"):
            continue
        try:
            with locked(folder, 0.0):
                pass
        except OSError:
            # A daemon that lives holds the lock of those that it has made.
            continue
        with contextlib.suppress(ApiError):
            # While nobody reads them containerd can neither start the command nor end it, nor tell of its container's
            # end: for half a minute.
            streams = ProcessStreams("", False, False, False, found=folder)
            end_exec(engine, container.id, exec_name(folder))
            streams.abandon()
        remove_tree(folder)


###############################################################################
# Container lifecycle
###############################################################################


def auto_removed(container: Container) -> bool:
    """Whether it is to be removed at its end."""
    return bool((container.request.get("HostConfig") or {}).get("AutoRemove"))


def has_stdin(container: Container) -> bool:
    """Whether a container was made with stdin open. Of one that others made only a terminal tells it."""
    return bool(container.request.get("OpenStdin") if container.request else is_terminal(container))


def is_terminal(container: Container) -> bool:
    """Whether a container has a pseudo-terminal."""
    return bool(container.request.get("Tty") if container.request else container.process.get("terminal"))


def open_streams(engine: Engine, container: Container, found: str = "") -> ProcessStreams:
    """FIFOs for a container's process, or those that it has already in a folder, with its log."""
    try:
        keep = open_log(engine.nerdctl, container)
    except OSError as error:
        raise ApiError(f"failed to initialize logging driver: {error}") from None

    def ended() -> None:
        if keep:
            keep.close()
        engine.leave_streams(container.id, streams)
        if engine.supervisor:
            engine.supervisor.changed.put(container.id)

    try:
        tty = is_terminal(container)
        streams = ProcessStreams(container.folder or tempfile.gettempdir(), has_stdin(container), tty,
                                 bool(container.request.get("StdinOnce")) and not tty, keep,
                                 functools.partial(engine.containerd.close_stdin, container.id), ended, found)
    except BaseException:
        if keep:
            keep.close()
        raise
    engine.owner(container.id).streams = streams
    return streams


def find_streams(engine: Engine, container: Container) -> Optional[ProcessStreams]:
    """The FIFOs of a container's process, None for none. Those of a daemon that has ended become this one's."""
    owner = engine.owner(container.id)
    if owner.streams is None and container.running and f"/{FIFO_FOLDER}" in container.task.stdout:
        with contextlib.suppress(ApiError), engine.owning(container.id) as now:
            if owner.streams is None and now.running and now.task.stdout == container.task.stdout:
                streams = open_streams(engine, now, os.path.dirname(now.task.stdout))
                streams.begin()
                if not runs(engine, now):
                    # Its end was told before there was anybody to hear of it.
                    streams.exited()
    return owner.streams


def log_streams(container: Container) -> TaskStreams:
    """The streams of a container's process that writes to nerdctl's logging program only."""
    uri = container.labels.get("nerdctl/log-uri") or ""
    uri = uri if uri.startswith("binary://") else ""
    return TaskStreams("", uri, uri, is_terminal(container))


def runtime_error(error: ApiError) -> ApiError:
    """What containerd's runtime says of a process that it could not start, with the words and the status of dockerd."""
    if isinstance(error, (Unavailable, NotImplementedHere)):
        return error
    told = nerdctl_error(f'time="" level=fatal msg={json.dumps(str(error))}')
    hint = refused_start(str(told))[1]
    return told if hint is None else BadParameter(str(told) + hint)


# Files in a container's folder: while its process is being made, and once a daemon was killed meanwhile. containerd may
# still be carrying that out, or taking it back, the network may be up, and a shim be left which it has forgotten.
BEING_MADE, CUT_OFF = "nerdctld.making", "nerdctld.cut-off"
# How long containerd may take for that, in seconds.
UNDER_WAY = 10.0


def was_cut_off(container: Container) -> bool:
    """Whether a daemon was killed while it had a container's process made. One that lives has the file locked."""
    with contextlib.suppress(OSError), locked(os.path.join(container.folder or os.devnull, BEING_MADE), 0.0):
        return True
    return False


def make_task(engine: Engine, container: Container, streams: TaskStreams) -> int:
    """Make a container's process; its process id. What is left of one that was cut off goes first."""
    cut_off, deadline = was_cut_off(container), time.monotonic() + UNDER_WAY
    note, left = (os.path.join(container.folder or os.devnull, each) for each in (BEING_MADE, CUT_OFF))
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            open(left if cut_off else note, "w", encoding="ascii").close()
            held.enter_context(locked(note))
        try:
            while True:
                if cut_off:
                    take_down_network(engine, container)
                try:
                    return engine.containerd.create_task(container.record, streams)
                except ApiError:
                    if not cut_off or time.monotonic() > deadline:
                        raise
                with contextlib.suppress(ApiError):
                    engine.containerd.delete_task(container.id)
                time.sleep(0.1)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(note)


def end_leftovers(namespace: str, identity: str) -> None:
    """Kill what is left of a container that is gone: its shims and what they have started, its logging program, and
    what is in its cgroup."""
    parents, dying = {}, []
    for name in filter(str.isdigit, os.listdir("/proc")):
        stat_line, command, groups, environment = (read_file(f"/proc/{name}/{each}")
                                                   for each in ("stat", "cmdline", "cgroup", "environ"))
        parents[int(name)] = (stat_line.rpartition(")")[2].split()[1:2] or [""])[0]
        shim = os.path.basename(command.partition("\0")[0]).startswith("containerd-shim") and (
            f"-namespace\0{namespace}\0-id\0{identity}\0" in command)
        if shim or identity in groups or f"CONTAINER_ID={identity}\0" in environment:
            dying.append(int(name))
    for each in dying:
        dying += [child for child, parent in parents.items() if parent == str(each) and child not in dying]
    for each in dying:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)


def start_task(engine: Engine, container: Container, streams: TaskStreams) -> None:
    """Make a container's process and start it, or leave nothing of it."""
    pid = make_task(engine, container, streams)
    try:
        attach_networks(engine, container, pid)
        engine.hosts.refresh(container)
        size = container.host_config.get("ConsoleSize") or []
        if streams.terminal and len(size) == 2 and all(size):
            engine.containerd.resize_terminal(container.id, *size)
        engine.containerd.start_task(container.id)
    except BaseException:
        engine.owner(container.id).unstarted = pid
        with contextlib.suppress(ApiError):
            release_networks(engine, engine.inventory.container(container.id))
        with contextlib.suppress(ApiError):
            engine.containerd.delete_task(container.id)
        raise


def start_refused(engine: Engine, container: Container, error: ApiError) -> None:
    """After a start that failed: a container that was to be removed at its end is removed now, unless it runs, by
    another hand, or it was containerd that could not be reached for it."""
    spared = isinstance(error, (Unavailable, NotImplementedHere))
    if auto_removed(container) and not spared:
        with contextlib.suppress(ApiError):
            remove_container(engine, container, force=False, volumes=True)
    if engine.supervisor:
        engine.supervisor.changed.put(container.id)
    engine.tasks.failed(container.id, refused_start(str(error))[0], spared and auto_removed(container))


def start_container(engine: Engine, container: Container) -> None:
    """Start a container that does not run and that the caller owns: on FIFOs where clients wait on its streams or may
    come for its stdin."""
    waiting, streams, count = engine.take_waiting(container.id), None, engine.tasks.count
    try:
        container = prepare_start(engine, container)
        note_health(engine, container)
        if waiting or has_stdin(container):
            streams = open_streams(engine, container)
            for each in waiting:
                streams.join(each)
        with mounted(engine, placed_mounts(container)):
            try:
                start_task(engine, container, streams.paths if streams else log_streams(container))
            except ApiError as error:
                raise runtime_error(error) from None
    except BaseException as error:
        note_error(engine, container, str(error))
        if streams:
            streams.abandon()
        for each in waiting:
            each.finish()
        engine.claimed.pop(container.id, None)
        if isinstance(error, ApiError):
            start_refused(engine, container, error)
        raise
    if streams:
        streams.begin()
    resume_policy(engine, container)
    # From here on events tell of its state.
    engine.tasks.started_since(container.id, count, engine.tasks.LATE if engine.feed.live else 0.0)
    engine.claimed.pop(container.id, None)


def note_error(engine: Engine, container: Container, message: str) -> None:
    """Keep with a container why it could not be started, where nerdctl keeps it too, and what is left of its last run,
    if anything."""
    with contextlib.suppress(ApiError):
        task = engine.containerd.get_task(container.id)
        engine.update(container, {"nerdctl/error": message[:3000], LABEL_REFUSED: str(task.pid) if task else ""})


@route("POST", "/containers/{id}/start")
def container_start(engine: Engine, request: Request, name: str) -> None:
    """Start it; 204, 304 when it runs already, 400 when its command cannot be run."""
    if len(request.read_body()) > 7:
        raise BadParameter("starting container with non-empty request body was deprecated since API v1.22 and removed "
                           "in v1.24")
    if request.value("checkpoint"):
        if not CONTAINER_NAME.fullmatch(request.value("checkpoint")):
            raise BadParameter(f'invalid checkpoint ID "{request.value("checkpoint")}", only '
                               "[a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
        raise BadParameter("checkpoint is only supported in experimental mode")
    gone = Conflict("container is marked for removal and cannot be started")
    with engine.owning(name, gone=gone) as container:
        if container.state.kind == "paused":
            raise Conflict("cannot start a paused container, try unpause instead")
        if container.running:
            raise NotModified()
        start_container(engine, container)
    engine.hosts.refresh()


def stop_seconds(request: Request, container: Container) -> float:
    """How long a container is given to end by itself; Docker's -1 is for ever."""
    # nerdctl does not keep a StopTimeout of 0.
    asked = request.integer("t") if request.value("t") else container.request.get("StopTimeout")
    if asked is None:
        asked = int_or_zero(container.labels.get("nerdctl/stop-timeout") or "") or 10
    return asked if asked >= 0 else 10.0**6


def stop_signal(container: Container, asked: str = "") -> int:
    """The number of the signal that a container is asked to end with; 400 for one that there is not."""
    return signal_number(asked or container.labels.get("io.containerd.image.config.stop-signal") or "TERM")


def kill_task(engine: Engine, container: Container, number: int, ends: bool) -> bool:
    """Send a container a signal that is to end it, or any other; one that is paused heeds only one that `ends` it.
    False where it has ended meanwhile."""
    count = engine.tasks.count
    try:
        engine.containerd.kill_task(container.id, number)
    except ApiError as error:
        # Its process may have ended a moment before containerd tells of it.
        if runs(engine, container) and not (isinstance(error, NotFound) and engine.tasks.ended_since(
                container.id, count, engine.tasks.DYING)):
            raise
        return False
    if ends and container.state.kind == "paused":
        # It may have ended by now, also where events have not told of it yet.
        with contextlib.suppress(ApiError):
            engine.containerd.resume_task(container.id)
    return True


def runs(engine: Engine, container: Container) -> bool:
    """Whether a container runs, read anew."""
    engine.inventory.records.invalidate(container.id)
    now = engine.inventory.containers().get(container.id)
    return now is not None and now.running


def stop_container(engine: Engine, request: Request, container: Container) -> None:
    """Stop a container that runs, as a request says. It may take its time to end, and others may want it to end sooner:
    this owns it no more."""
    number, seconds = stop_signal(container, request.value("signal")), stop_seconds(request, container)
    count = engine.tasks.count
    with engine.changing(container):
        engine.tell(container, "kill", signal=str(number))
        sent = kill_task(engine, container, number, ends=True)
        if sent and not engine.tasks.ended_since(container.id, count, seconds):
            engine.tell(container, "kill", signal=str(int(signal.SIGKILL)))
            kill_task(engine, container, signal.SIGKILL, ends=True)
            if not engine.tasks.ended_since(container.id, count, engine.tasks.DYING) and runs(engine, container):
                raise ApiError(f"cannot stop container: {container.id}: tried to kill container, but did not receive "
                               "an exit event")
    engine.tell(container, "stop")


@route("POST", "/containers/{id}/stop")
def container_stop(engine: Engine, request: Request, name: str) -> None:
    """Stop it within `t` seconds, then kill it; 204, 304 when it does not run."""
    request.read_body()
    request.integer("t")
    with engine.owning(name) as container:
        # In the middle of a restart it counts as one that runs.
        if not (container.running or container.state.kind == "restarting" or engine.owner(container.id).restarting):
            raise NotModified()
        stop_signal(container, request.value("signal"))
        hold_policy(engine, container)
    if container.running:
        stop_container(engine, request, container)


@route("POST", "/containers/{id}/restart")
def container_restart(engine: Engine, request: Request, name: str) -> None:
    """Stop it if it runs, and start it; 204."""
    request.read_body()
    request.integer("t")
    with engine.owning(name) as container:
        stop_signal(container, request.value("signal"))
        count = engine.tasks.count
        # Until it is started again here, nobody else is to do so.
        hold_policy(engine, container)
    with engine.restarting(container):
        streams = engine.owner(container.id).streams
        if container.running:
            stop_container(engine, request, container)
        if streams:
            streams.ended.wait(5)
        with engine.owning(container.id) as container:
            # Another start, or restart, may have come first.
            if not (container.running and engine.tasks.started_since(container.id, count)):
                try:
                    start_container(engine, container)
                except ApiError as error:
                    raise type(error)(f"Cannot restart container {container.id}: {error}") from None
    engine.hosts.refresh()
    engine.tell(container, "restart")


def require_running(container: Container, paused: str = "") -> None:
    """409 with dockerd's words unless it runs, and with these, if any, where it is paused."""
    kind = container.state.kind
    refuse((kind == "restarting", f"Container {container.id} is restarting, wait until the container is running"),
           (not container.running, f"container {container.id} is not running"),
           (paused and kind == "paused", paused), kind=Conflict)


@route("POST", "/containers/{id}/kill")
def container_kill(engine: Engine, request: Request, name: str) -> None:
    """Send it a signal, of which one that waits for its restart ends; 204, 409 when it does not run."""
    request.read_body()
    with engine.owning(name) as container:
        number = signal_number(request.value("signal") or "KILL")
        if container.state.kind == "restarting":
            return hold_policy(engine, container)
        if not container.running:
            if request.version < (1, 20):
                return
            raise Conflict(f"cannot kill container: {name}: container {container.id} is not running")
        count, ends = engine.tasks.count, number == signal.SIGKILL
        with contextlib.suppress(BadParameter):
            ends = ends or number == stop_signal(container)
        engine.tell(container, "kill", signal=str(number))
        if ends:
            hold_policy(engine, container)
        try:
            kill_task(engine, container, number, ends)
        except ApiError as error:
            raise ApiError(f"cannot kill container: {name}: {error}") from None
    if number == signal.SIGKILL:
        # As dockerd does: who is told that it was killed finds it so.
        engine.tasks.ended_since(container.id, count, engine.tasks.DYING)


@route("POST", "/containers/{id}/pause")
def container_pause(engine: Engine, request: Request, name: str) -> None:
    """Freeze it; 204, 409 when it does not run or is paused already."""
    with engine.owning(name) as container:
        require_running(container, f"container {container.id} is already paused")
        engine.containerd.pause_task(container.id)


@route("POST", "/containers/{id}/unpause")
def container_unpause(engine: Engine, request: Request, name: str) -> None:
    """Let it go on; 204, 409 when it is not paused."""
    with engine.owning(name) as container:
        if container.state.kind != "paused":
            raise Conflict(f"container {container.id} is not paused")
        engine.containerd.resume_task(container.id)


@route("POST", "/containers/{id}/rename")
def container_rename(engine: Engine, request: Request, name: str) -> None:
    """Give it another name; 204, 409 for one in use."""
    with engine.owning(name) as container:
        wanted = request.value("name").lstrip("/")
        refuse((not request.value("name"), "Neither old nor new names may be empty"),
               (wanted == container.name, "Renaming a container with the same name as its current name"))
        engine.nerdctl.run("rename", "--", container.id, check_name(engine, wanted))
    engine.tell(engine.inventory.container(container.id), "rename", oldName="/" + container.name)


# One of these is there where the kernel has weights for block devices; dockerd discards them where it has none.
BLKIO_WEIGHTS = ("/sys/fs/cgroup/blkio/blkio.weight", "/sys/fs/cgroup/blkio/blkio.bfq.weight",
                 "/sys/fs/cgroup/cgroup.controllers")


def updated_resources(asked: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """The limits of an update as the resources of an OCI spec."""
    values, found = {**asked}, {}
    if asked.get("NanoCpus"):
        values.update(CpuPeriod=10**5, CpuQuota=asked["NanoCpus"] // 10**4)
    for key, path in SPEC_FIELDS.items():
        if path.startswith("linux.resources.") and values.get(key):
            kind, name = path.split(".")[2:]
            found.setdefault(kind, {})[name] = values[key]
    return found


def check_update(container: Container, asked: Dict[str, Any]) -> None:
    """409 with dockerd's words for an update that what a container has already does not allow."""
    now = docker_host_config(container, container.spec)
    pairs = (("NanoCpus", "CpuPeriod", "Nano CPUs", "CPU Period"), ("NanoCpus", "CpuQuota", "Nano CPUs", "CPU Quota"),
             ("CpuPeriod", "NanoCpus", "CPU Period", "NanoCPUs"), ("CpuQuota", "NanoCpus", "CPU Quota", "NanoCPUs"))
    for wanted, other, name, taken in pairs:
        if (asked.get(wanted) or 0) > 0 and now[other] > 0:
            raise Conflict(f"Conflicting options: {name} cannot be updated as {taken} has already been set")
    if asked.get("Memory") and not asked.get("MemorySwap") and asked["Memory"] > now["MemorySwap"]:
        raise Conflict("Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the "
                       "same time")
    if auto_removed(container) and policy_word(asked) not in ("", "no"):
        raise Conflict("Restart policy cannot be updated because AutoRemove is enabled for the container")


@route("POST", "/containers/{id}/update")
def container_update(engine: Engine, request: Request, name: str) -> Response:
    """Change its limits or restart policy; 200 with warnings."""
    body = request.json({**RESOURCES, "RestartPolicy": RESTART_POLICY})
    check_limits(body, update=True)
    if not any(map(os.path.exists, BLKIO_WEIGHTS)):
        body.pop("BlkioWeight", None)
    if body.get("PidsLimit") is not None:
        body["PidsLimit"] = max(0, body["PidsLimit"]) or -1
    policy, changed = policy_word(body), updated_resources(body)
    with engine.owning(name) as container:
        spec, labels = container.spec, policy_labels(container, policy) if policy else {}
        try:
            check_update(container, body)
            if changed and container.running:
                engine.containerd.update_task(container.id, changed)
        except ApiError as error:
            raise type(error)(f"Cannot update container {container.id}: {error}") from None
        if changed:
            linux = spec.get("linux") or {}
            resources = linux.get("resources") or {}
            resources = {**resources, **{key: {**(resources.get(key) or {}), **values}
                                         for key, values in changed.items()}}
            spec = {**spec, "linux": {**linux, "resources": resources}}
            asked = {key: body[key] for key in UPDATED_FIELDS if body.get(key)}
            if container.request:
                labels.update(request_labels({**container.request, "HostConfig": {**container.host_config, **asked}},
                                             container.labels))
        if labels or changed:
            engine.update(container, labels, spec if changed else None)
    engine.tell(container, "update")
    return Response(200, {"Warnings": None})


@route("POST", "/containers/{id}/wait")
def container_wait(engine: Engine, request: Request, name: str) -> Response:
    """Wait for `condition` (not-running, next-exit, removed); the head goes out at once, the exit status when it is
    so."""
    request.read_body()
    condition = request.value("condition") or "not-running"
    if condition not in ("not-running", "next-exit", "removed"):
        raise BadParameter(f"invalid condition: \"{condition}\"")
    container = engine.inventory.container(name)
    since = engine.tasks.count

    def chunks() -> Iterator[bytes]:
        yield b""
        gone = threading.Event()
        with request.client.when_gone(lambda: (gone.set(), engine.tasks.wake())):
            status = engine.tasks.wait(container, condition, since, lambda: gone.is_set() or engine.closing.is_set())
        if status is not None:
            yield json_bytes({"StatusCode": status}) + b"\n"

    return Response(200, Stream(chunks()), "application/json")


def end_task(engine: Engine, container: Container, connection: socket.socket) -> None:
    """Kill a container's task where it runs, and have containerd take it away."""
    count = engine.tasks.count
    with contextlib.suppress(ApiError):
        if container.running and kill_task(engine, container, signal.SIGKILL, ends=True):
            engine.tasks.ended_since(container.id, count, engine.tasks.DYING)
        engine.containerd.delete_task(container.id, connection)


def remove_container(engine: Engine, container: Container, force: bool, volumes: bool) -> None:
    """Remove a container that the caller owns, and its anonymous volumes if asked. When it returns, it is gone."""
    words = ["rm", *(["--force"] if force else []), *(["--volumes"] if volumes else []), "--", container.id]
    engine.owner(container.id).removing = True
    sweep_streams(engine, container)
    release_networks(engine, container)
    cut_off = was_cut_off(container) or os.path.exists(os.path.join(container.folder or os.devnull, CUT_OFF))
    if cut_off:
        take_down_network(engine, container)
    how: Dict[str, Any] = {}
    with contextlib.ExitStack() as held:
        if container.task and not cut_off and (force or not container.running):
            # nerdctl does it, too, once it has started. It keeps the connection open should this daemon be killed.
            connection = held.enter_context(engine.containerd.dial())
            how = {"keep": (connection.fileno(),), "meanwhile": lambda: end_task(engine, container, connection)}
        for pause in (0.01, 0.5, 0.0):
            output, how = engine.nerdctl.run(*words, **how), {}
            # nerdctl's status is 0 too where it could not with --force, and in 1.7 where the task went away meanwhile.
            try:
                engine.containerd.get_container(container.id)
            except NotFound:
                break
            if not pause:
                raise nerdctl_error(output.stderr)
            # Somebody else has just started it.
            time.sleep(pause)
    if cut_off:
        end_leftovers(engine.nerdctl.namespace, container.id)
    engine.forget(container)
    if placed_mounts(container):
        release_places(engine)


def remove_link(engine: Engine, name: str) -> None:
    """Let a container no longer have a name for another one, `name/alias`, nor the line of its hosts file; 404 where it
    has none."""
    child = engine.inventory.container(name)
    parent, _, alias = name.strip("/").partition("/")
    if not alias or parent == child.name:
        raise ApiError("Conflict, cannot remove the default link name of the container")
    with engine.owning(parent) as container:
        kept = [f"{other}:{each}" for each, other in container.links.items() if each != alias]
        request = {**container.request, "HostConfig": {**container.host_config, "Links": kept}}
        engine.update(container, request_labels(request, container.labels))
    engine.hosts.refresh()


@route("DELETE", "/containers/{id}")
def container_delete(engine: Engine, request: Request, name: str) -> None:
    """Remove it (`force`, `v` for anonymous volumes); 204, 409 while it runs."""
    gone = Conflict(f"removal of container {name} is already in progress")
    if request.flag("link"):
        remove_link(engine, name)
        return
    with engine.owning(name, gone=gone) as container:
        if (container.running or container.state.kind == "restarting") and not request.flag("force"):
            word = container.state.kind
            raise Conflict(f'cannot remove container "/{container.name}": container is {word}: '
                           + ("unpause and then stop the container before removing or force remove" if word == "paused"
                              else "stop the container before removing or force remove"))
        if container.running:
            engine.tell(container, "kill", signal=str(int(signal.SIGKILL)))
        remove_container(engine, container, request.flag("force"), request.flag("v"))


def prunable(engine: Engine, container: Container) -> bool:
    """Whether a container does not run, and is not about to."""
    return (container.state.kind in ("created", "exited", "dead")
            and not engine.owner(container.id).restarting)


@route("POST", "/containers/prune")
def container_prune(engine: Engine, request: Request) -> Response:
    """Remove all containers that do not run, by the filters until, label and label!."""
    filters = request.filters("until", "label", "label!")
    common = prune_filter(filters)
    found = [each for each in engine.inventory.containers().values()
             if prunable(engine, each) and common(each.visible_labels, each.created)]
    deleted, reclaimed = [], 0
    sizes = container_sizes(engine, found)
    for each in found:
        with contextlib.suppress(ApiError), engine.owning(each.id) as container:
            if not prunable(engine, container):
                continue
            remove_container(engine, container, force=False, volumes=False)
            deleted.append(container.id)
            reclaimed += sizes.get(container.id, (0, 0))[0]
    engine.journal.emit("container", "prune", "", {"reclaimed": str(reclaimed)})
    return Response(200, {"ContainersDeleted": deleted or None, "SpaceReclaimed": reclaimed})


###############################################################################
# Streams
###############################################################################

RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"


def stream_type(tty: bool, version: Tuple[int, int]) -> str:
    """The media type of a stream of output: frames have a name of their own from API 1.42 on."""
    return RAW_STREAM if tty or version < (1, 42) else MULTIPLEXED_STREAM


def log_lines(engine: Engine, request: Request, container: Container) -> Iterator[LogLine]:
    """The lines of a container's log that a logs request asks for."""
    follow = request.flag("follow") and container.running
    since, until = request.timestamp("since"), request.timestamp("until")
    first, last = max(0, since or 0), max(0, until or 0)
    # What is no number means all of them.
    tail = int(request.value("tail")) if re.fullmatch(r"\+?[0-9]{1,18}", request.value("tail")) else None
    wanted = {STDOUT: request.flag("stdout"), STDERR: request.flag("stderr")}
    gone = threading.Event()
    with request.client.when_gone(gone.set), contextlib.ExitStack() as stack:
        path = log_path(container)
        if path and os.access(path, os.R_OK):
            file = LogFile(path)
            stack.callback(file.close)
            if tail is not None:
                file.seek_tail(tail)
            source = follow_log(engine, container, file, follow, gone.is_set)
        else:
            source = nerdctl_log(engine, request, container, follow, tail)
        for line in source:
            if last and line.text and line.time > last:
                return
            if not line.text or (wanted[line.kind] and (not first or line.time >= first)):
                yield line


def nerdctl_log(engine: Engine, request: Request, container: Container, follow: bool,
                tail: Optional[int]) -> Iterator[LogLine]:
    """The same where the log is no file that can be read from here. nerdctl prints both streams as they were."""
    arguments = ["logs", "--timestamps", *_switch(follow, "--follow"), *_switch(tail is not None, f"--tail={tail}")]
    with engine.nerdctl.start(*arguments, "--", container.id, client=request.client) as process:
        for text in process.lines():
            moment, _, rest = text.partition(" ")
            yield LogLine(moment, STDOUT, rest.encode("utf-8", "surrogateescape") + b"\n")
        process.check()


def log_details(container: Container) -> bytes:
    """What `details` puts before each line: the labels and variables that the log options name."""
    options = (container.host_config.get("LogConfig") or {}).get("Config") or {}
    environment = dict(each.partition("=")[::2] for each in container.request.get("Env") or [])
    found = {key: known[key] for name, known in (("labels", container.visible_labels), ("env", environment))
             for key in str(options.get(name) or "").split(",") if key in known}
    return ",".join(f"{urllib.parse.quote(key)}={urllib.parse.quote(value)}" for key,
                    value in sorted(found.items())).encode() + b" "


@route("GET", "/containers/{id}/logs")
def container_logs(engine: Engine, request: Request, name: str) -> Response:
    """Its output so far, and with `follow` what is to come: frames, or bytes as they are for a terminal."""
    if not request.flag("stdout") and not request.flag("stderr"):
        raise BadParameter("Bad parameters: you must choose at least one stream")
    request.timestamp("since"), request.timestamp("until")
    container = engine.inventory.container(name)
    if (container.host_config.get("LogConfig") or {}).get("Type") == "none":
        raise NotImplementedHere("configured logging driver does not support reading")
    tty = is_terminal(container)
    pack = as_it_is if tty else multiplexed
    details = log_details(container) if request.flag("details") else b""
    follow = request.flag("follow")

    def chunks() -> Iterator[bytes]:
        if follow:
            yield b""
        parts: List[bytes] = []
        for line in log_lines(engine, request, container):
            if line.text:
                text = details + line.text
                if request.flag("timestamps"):
                    # With all nine digits.
                    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(line.time // 10**9))
                    text = f"{moment}.{line.time % 10**9:09d}Z ".encode() + text
                parts += pack(line.kind, text)
            if parts and (not line.text or len(parts) > 500):
                yield b"".join(parts)
                parts = []
        yield b"".join(parts)

    # What there is already begins at once, so an error before it can still be told.
    return Response(200, Stream(chunks(), primed=not follow), stream_type(tty, request.version))


def websocket_frame(kind: int, data: bytes) -> Tuple[bytes, bytes]:
    """A frame of RFC 6455, by the number of its kind, as a server sends it."""
    size = len(data)
    length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big") if size < 65536 else (
        b"\x7f" + size.to_bytes(8, "big"))
    return bytes([0x80 | kind]) + length, data


class WebSocket(Connection):
    """A connection whose input comes in WebSocket frames (RFC 6455). They are answered by way of the attachment, behind
    the whole frames that wait there."""

    def __init__(self, connection: Connection, attachment: Attachment):
        super().__init__(connection.sock, connection.early)
        self.attachment = attachment
        self.closed = False

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = super().recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def recv(self, size: int = 65536) -> bytes:
        """The payload of the next frame with data; b"" when the client has closed or broken the rules."""
        try:
            while not self.closed:
                first, second = self._exactly(2)
                length = second & 0x7F
                if length > 125:
                    length = int.from_bytes(self._exactly(2 if length == 126 else 8), "big")
                kind = first & 0x0F
                if not second & 0x80 or length > 1 << 20 or first & 0x70 or (kind >= 8 and length > 125):
                    self._close((1002).to_bytes(2, "big"))
                    break
                mask, data = self._exactly(4), self._exactly(length)
                data = bytes(each ^ mask[index % 4] for index, each in enumerate(data))
                if kind == 8:
                    self._close(data[:2])
                # A client that does not read gets no answer either.
                elif kind == 9 and not self.attachment.full:
                    self.attachment.send(*websocket_frame(10, data))
                elif kind in (0, 1, 2) and data:
                    return data
        except EOFError:
            # Also when nothing more is wanted of it: then it is told goodbye.
            pass
        return b""

    def _close(self, status: bytes) -> None:
        self.closed = True
        self.attachment.send(*websocket_frame(8, status))

    def drop_input(self) -> None:
        """Read until the client closes."""
        while self.recv():
            pass
        self.attachment.leave()

    def close(self) -> None:
        """Say goodbye, if the client is still there and has read everything else."""
        if not self.closed and not self.attachment.size:
            with contextlib.suppress(ClientGone):
                self.send_now(*websocket_frame(8, (1000).to_bytes(2, "big")))


def send_log(engine: Engine, container: Container, attachment: Attachment, file: LogFile, follow: bool = True,
             until: int = 0) -> None:
    """Send an attached client what is written to a container's log, to its end, which is the client's, or up to a
    moment, in nanoseconds since 1970."""
    try:
        with contextlib.closing(file):
            for line in follow_log(engine, container, file, follow, attachment.done.is_set):
                if until and line.text and line.time > until:
                    break
                attachment.put(line.kind, line.text)
                attachment.drain()
    finally:
        if not until:
            attachment.finish()


class AttachRequest:
    """A client that attaches to a container, whose output is sent as it is, in frames or as `pack` has it. From here on
    it is waited for, so that a start that comes right behind loses nothing. 404, 409, or 501 where its stdin is out of
    reach."""

    def __init__(self, engine: Engine, request: Request, name: str, pack: Optional[Packing] = None):
        self.engine, self.request, self.since = engine, request, engine.tasks.count
        self.keys = DetachKeys(request.value("detachKeys"))
        self.container = container = engine.inventory.container(name)
        kind = container.state.kind
        refuse((kind == "paused", "container is paused, unpause the container before attach"),
               (kind == "restarting", "container is restarting, wait until the container is running"), kind=Conflict)
        self.tty, self.stream, self.logs = is_terminal(container), request.flag("stream"), request.flag("logs")
        stdin = request.flag("stdin") and self.stream and has_stdin(container)
        if stdin and container.running and find_streams(engine, container) is None:
            raise NotImplementedHere("this container's stdin cannot be reached: nerdctl itself, or containerd by the "
                                     "restart policy, has started it: attach with --no-stdin, or use exec")
        self.attachment = Attachment(request.flag("stdout"), request.flag("stderr"),
                                     pack or (as_it_is if self.tty else multiplexed), stdin)
        self.waits, self.began = self.stream and not container.running, time.time_ns()
        if self.waits:
            engine.add_waiting(container.id, self.attachment)

    def abandon(self) -> None:
        """The client has left."""
        self.attachment.leave()
        self.engine.leave_waiting(self.container.id, self.attachment)

    def serve(self, connection: Connection) -> None:
        """Serve the client to its end."""
        engine, container, attachment = self.engine, self.container, self.attachment
        try:
            if self.waits and self.logs:
                # Before the connection: what a process that starts meanwhile writes is for later.
                past = Attachment(attachment.wanted[STDOUT], attachment.wanted[STDERR], attachment.pack)
                past.connect(connection)
                send_log(engine, container, past, LogFile(log_path(container)), follow=False, until=self.began)
            attachment.connect(connection)
            if self.stream or self.logs:
                engine.tell(container, "attach")
                with self.request.client.when_gone(attachment.leave, half=False):
                    self._begin(self.logs and not self.waits)
                    if pump_stdin(attachment, self.keys if self.tty else None):
                        engine.tell(container, "detach")
                    attachment.done.wait()
                    attachment.drain()
        finally:
            self.abandon()

    def _begin(self, logs: bool) -> None:
        """Have it sent what comes from the streams of the container's process, or from its log."""
        engine, container, attachment = self.engine, self.container, self.attachment
        file = LogFile(log_path(container), at_end=not logs)
        streams = find_streams(engine, container)
        if logs or (container.running and not (streams and streams.join(attachment))):
            attachment.streams = streams
            attachment.ready.set()
            threading.Thread(target=send_log, args=(engine, container, attachment, file, self.stream),
                             name="attach", daemon=True).start()
        elif not container.running:
            self._await_start(file)

    def _await_start(self, file: LogFile) -> None:
        """Hold the client until somebody starts the container: on FIFOs, which then have taken it, or (a bare nerdctl,
        say) without any, when its log is as good."""
        engine, identity = self.engine, self.container.id
        while not self.attachment.ready.wait(0.2):
            streams = engine.owner(identity).streams
            if streams and streams.join(self.attachment):
                return
            if streams is None and engine.tasks.started_since(identity, self.since):
                send_log(engine, self.container, self.attachment, file)
            elif engine.feed.live and identity not in engine.inventory.containers():
                self.attachment.finish()


@route("POST", "/containers/{id}/attach")
def container_attach(engine: Engine, request: Request, name: str) -> Response:
    """Take the connection over for the container's streams; also before its start. 404, 409, or 501 where its stdin is
    out of reach."""
    found = AttachRequest(engine, request, name)
    return Response(101, Hijack(found.serve, abandon=found.abandon), stream_type(found.tty, request.version))


def websocket_key(request: Request) -> str:
    """The key of a WebSocket handshake; 400 with dockerd's words where it is none."""
    upgrade, connection = (request.headers.get(each) or "" for each in ("Upgrade", "Connection"))
    key = request.headers.get("Sec-WebSocket-Key") or ""
    refuse((upgrade.lower() != "websocket" or "upgrade" not in connection.lower(), "not websocket protocol"),
           (not key, "mismatch challenge/response"),
           (request.headers.get("Sec-WebSocket-Version") != "13", "missing or bad WebSocket Version"))
    return key


@route("GET", "/containers/{id}/attach/ws")
def container_attach_websocket(engine: Engine, request: Request, name: str) -> Response:
    """The same over a WebSocket, without frames of our own: output in binary messages."""
    engine.inventory.container(name)
    key = websocket_key(request)
    found = AttachRequest(engine, request, name, lambda kind, data: websocket_frame(2, data))
    accept = base64.b64encode(sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()

    def serve_frames(connection: Connection) -> None:
        sock = WebSocket(connection, found.attachment)
        if not found.attachment.stdin:
            # Somebody has to answer pings and notice the closing.
            threading.Thread(target=sock.drop_input, name="websocket", daemon=True).start()
        found.serve(sock)
        sock.close()

    return Response(101, Hijack(serve_frames, protocol="websocket", abandon=found.abandon), "",
                    {"Sec-WebSocket-Accept": accept})


@route("POST", "/containers/{id}/resize")
def container_resize(engine: Engine, request: Request, name: str) -> Response:
    """Tell the container's terminal its size in characters; 200. 409 when it does not run."""
    size = terminal_size(request)
    container = engine.inventory.container(name)
    require_running(container)
    if is_terminal(container):
        engine.containerd.resize_terminal(container.id, *size)
    return Response(200)


def terminal_size(request: Request) -> Tuple[int, int]:
    """Height and width of a resize; 400 with dockerd's words for what is no size."""
    for name, word in (("h", "height"), ("w", "width")):
        text = request.value(name)
        if not re.fullmatch("[0-9]{1,18}", text) or int(text) >= 1 << 32:
            problem = "value out of range" if re.fullmatch("[0-9]+", text) else "invalid syntax"
            raise BadParameter(f'invalid resize {word} "{text}": strconv.ParseUint: parsing "{text}": {problem}')
    return int(request.value("h")), int(request.value("w"))


###############################################################################
# Exec
###############################################################################


class Exec:
    """A command to be run, running or run in a container. `code` is its exit status, None before its end."""

    def __init__(self, container: Container, config: Dict[str, Any]):
        self.id = os.urandom(32).hex()
        self.container, self.config = container, config
        self.command, self.tty = config["Cmd"], bool(config.get("Tty"))
        self.started = self.running = False
        self.code: Optional[int] = None
        self.pid, self.size = 0, (0, 0)
        # Set when it has ended, or could not be started.
        self.done = threading.Event()


EXECS_KEPT = 1000
EXEC_START = {"Detach": bool, "Tty": bool, "ConsoleSize": [UNSIGNED]}
EXEC_CREATE = {"User": str, "Privileged": bool, "Tty": bool, "ConsoleSize": [UNSIGNED], "AttachStdin": bool,
               "AttachStderr": bool, "AttachStdout": bool, "DetachKeys": str, "Env": [str], "WorkingDir": str,
               "Cmd": [str]}


def account_rows(container: Container, path: str) -> List[List[str]]:
    """The lines of a running container's /etc/passwd or /etc/group, as fields; [] where it cannot be read."""
    root, data = f"/proc/{container.state.pid}/root", b""
    with contextlib.suppress(OSError), opened_below(root, path, follow=True) as (descriptor, _):
        # The container's own: it may be a FIFO, on which one would wait for ever, or without an end. So may be what the
        # kernel makes up, such as /proc/kmsg, which has no size.
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_size:
            with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                data = file.read(min(found.st_size, 1 << 20))
    return [line.split(":") for line in data.decode("utf-8", "replace").splitlines()]


def account_number(text: str) -> int:
    """The number of a user or group in such a line; as with dockerd 0 for what is none, 400 for one out of range."""
    found = int(text[:20]) if re.fullmatch("[+-]?[0-9]+", text) else 0
    if not 0 <= found < 1 << 31:
        raise BadParameter("uids and gids must be in range 0-2147483647")
    return found


def find_user(container: Container, text: str) -> Dict[str, Any]:
    """The user of an OCI process for `user`, `uid`, `user:group` …, also in the groups that the container was given;
    400 with dockerd's words where the container has none of that name."""
    name, _, group = text.partition(":")
    passwd, groups = account_rows(container, "/etc/passwd"), account_rows(container, "/etc/group")

    def group_id(group: str) -> int:
        row = next((each for each in groups if len(each) > 2 and group in (each[0], each[2])), None)
        if row is None and not re.fullmatch(r"\d{1,10}", group):
            raise BadParameter(f"unable to find group {group}: no matching entries in group file")
        return account_number(row[2] if row else group)

    row = next((each for each in passwd if len(each) > 3 and name in (each[0], each[2])), None)
    if row is None and not re.fullmatch(r"\d{1,10}", name or "0"):
        raise BadParameter(f"unable to find user {name}: no matching entries in passwd file")
    found = {"uid": account_number(row[2] if row else name), "gid": account_number(row[3]) if row else 0}
    more = set(map(group_id, container.host_config.get("GroupAdd") or []))
    if group:
        found["gid"] = group_id(group)
    elif row:
        more.update(account_number(each[2]) for each in groups if len(each) > 3 and row[0] in each[3].split(","))
    # Without its own group in the list a process would not be refused what is refused to that group (CVE-2022-2995).
    return {**found, "additionalGids": sorted({found["gid"], *more})}


def exec_process(instance: Exec, container: Container) -> Dict[str, Any]:
    """The command as a process of an OCI spec: what is not asked for is that of the container's own process."""
    config, own = instance.config, container.process
    process = {**own, "args": instance.command, "terminal": instance.tty,
               "cwd": config.get("WorkingDir") or own.get("cwd") or "/"}
    process.pop("consoleSize", None)
    if instance.tty and all(instance.size):
        process["consoleSize"] = dict(zip(("height", "width"), instance.size))
    environment = {each.partition("=")[0]: each for each in own.get("env") or []}
    if instance.tty:
        environment.setdefault("TERM", "TERM=xterm")
    for each in config.get("Env") or []:
        key, sign, _ = each.partition("=")
        if sign:
            environment[key] = each
        else:
            environment.pop(key, None)
    process["env"] = list(environment.values())
    if config.get("User"):
        process["user"] = find_user(container, config["User"])
    if config.get("Privileged"):
        bounds = int(re.search(r"^CapBnd:\s*(\w+)", read_file("/proc/self/status"), re.M)[1], 16)
        # On a machine that lacks some itself, the runtime refuses these.
        every = ["CAP_" + each for bit, each in enumerate(CAPABILITIES) if bounds >> bit & 1]
        process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), every)
        process.pop("apparmorProfile", None)
    return process


def docker_exec(instance: Exec) -> Dict[str, Any]:
    """An exec as `/exec/{id}/json` shows it, with the bytes of its detach keys."""
    config, command, keys = instance.config, instance.command, instance.config.get("DetachKeys")
    process = {"tty": instance.tty, "entrypoint": command[0], "arguments": command[1:],
               "privileged": bool(config.get("Privileged"))}
    if config.get("User"):
        process["user"] = config["User"]
    return {
        "ID": instance.id, "Running": instance.running, "ExitCode": instance.code, "ProcessConfig": process,
        "OpenStdin": bool(config.get("AttachStdin")), "OpenStderr": bool(config.get("AttachStderr")),
        "OpenStdout": bool(config.get("AttachStdout")), "CanRemove": False, "ContainerID": instance.container.id,
        "DetachKeys": base64.b64encode(DetachKeys(keys).sequence if keys else b"").decode(), "Pid": instance.pid,
    }


@route("POST", "/containers/{id}/exec")
def exec_create(engine: Engine, request: Request, name: str) -> Response:
    """Prepare a command; 201 with its id. 409 when the container does not run, 400 for no command or no such user."""
    config = request.json(EXEC_CREATE)
    if not config.get("Cmd"):
        raise BadParameter("No exec command specified")
    container = engine.inventory.container(name)
    instance = Exec(container, config)
    require_running(container, f"container {name} is paused, unpause the container before exec")
    if config.get("User"):
        find_user(container, config["User"])
    DetachKeys(config.get("DetachKeys") or "")
    keep_exec(engine, instance)
    return Response(201, {"Id": instance.id})


def keep_exec(engine: Engine, instance: Exec) -> None:
    """From now on clients can ask for a command."""
    with engine.lock:
        engine.execs[instance.id] = instance
        for old in [each for each in engine.execs.values() if not each.running][:-EXECS_KEPT]:
            engine.execs.pop(old.id, None)
    engine.tell(instance.container, "exec_create: " + " ".join(instance.command), execID=instance.id)


def find_exec(engine: Engine, name: str) -> Exec:
    """The exec of an id; 404 with dockerd's words."""
    instance = engine.execs.get(name)
    if instance is None:
        raise NotFound(f"No such exec instance: {name}")
    return instance


def run_exec(engine: Engine, instance: Exec, streams: TaskStreams, ended: Callable[[], Any] = lambda: None) -> None:
    """Start the command; `done` is set, and `ended()` called, when it has ended, `code` being its exit status then.
    ApiError when it cannot be started."""
    identity = instance.container.id
    with engine.lock:
        check_unstarted(instance)
        instance.started = instance.running = True
    engine.tell(instance.container, "exec_start: " + " ".join(instance.command), execID=instance.id)
    try:
        container = engine.inventory.container(identity)
        require_running(container)
        process = exec_process(instance, container)
        try:
            engine.containerd.add_exec(identity, instance.id, process, streams)
            instance.pid = engine.containerd.start_task(identity, instance.id)
        except ApiError as error:
            with contextlib.suppress(ApiError):
                engine.containerd.delete_exec(identity, instance.id)
            raise runtime_error(error) from None
    except BaseException as error:
        instance.running, instance.code = False, 127 if refused_start(str(error))[0] == 127 else 126
        instance.done.set()
        raise
    threading.Thread(target=await_exec, args=(engine, instance, ended), name="exec", daemon=True).start()


def await_exec(engine: Engine, instance: Exec, ended: Callable[[], Any]) -> None:
    """Wait for the end of a command, and have containerd close its streams."""
    identity, code = instance.container.id, None
    while code is None and not engine.closing.is_set():
        try:
            code = engine.containerd.wait_process(identity, instance.id)
        except Unavailable:
            # It goes on without a containerd that is being restarted.
            engine.closing.wait(0.2)
        except ApiError:
            # The container has ended: nobody knows more.
            code = 137
    instance.code = 137 if code is None else code
    instance.running = False
    engine.tell(instance.container, "exec_die", execID=instance.id, exitCode=str(instance.code))
    instance.done.set()
    ended()
    # It waits for those who hold the streams open, which is of no interest to the client.
    with contextlib.suppress(ApiError):
        engine.containerd.delete_exec(identity, instance.id)


def run_in_container(engine: Engine, container: Container, config: Dict[str, Any], timeout: float,
                     most: int) -> Tuple[int, bytes]:
    """Run a command in a container; its exit status, -1 for one that was killed after `timeout` seconds, and its
    output, of which more than `most` bytes become `...`. ApiError when it cannot be started. When it returns, nothing
    is left of it: where the container is paused in the middle, that is when it goes on."""
    output = bytearray()
    streams = ProcessStreams(container.folder or tempfile.gettempdir(), False, False, False,
                             keep=lambda kind, data: output.extend(data[:max(0, most + 1 - len(output))]))
    instance = Exec(container, config)
    instance.id = exec_name(streams.folder)
    try:
        keep_exec(engine, instance)
        run_exec(engine, instance, streams.paths, streams.exited)
        ended = instance.done.wait(timeout)
        while not instance.done.is_set():
            with contextlib.suppress(ApiError):
                engine.containerd.kill_task(container.id, signal.SIGKILL, instance.id)
            instance.done.wait(5.0)
        streams.ended.wait(streams.LINGER + 1)
    finally:
        # Before the streams: while nobody reads them containerd can neither start a command nor end it.
        while not end_exec(engine, container.id, instance.id) and not engine.closing.wait(1.0):
            pass
        streams.abandon()
    return instance.code if ended else -1, bytes(output[:most]) + b"..." * (len(output) > most)


def check_unstarted(instance: Exec) -> None:
    """409 with dockerd's words for a command that was started before."""
    if instance.started:
        raise Conflict(f"exec command {instance.id} is already running" if instance.running
                       else f"exec command {instance.id} has already run")


@route("POST", "/exec/{id}/start")
def exec_start(engine: Engine, request: Request, name: str) -> Response:
    """Run it: with its streams on this connection, or detached (200 once it runs). 409 when it has run, or the
    container stopped."""
    options = request.json(EXEC_START)
    instance = find_exec(engine, name)
    container = engine.inventory.container(instance.container.id)
    require_running(container, f"container {container.id} is paused, unpause the container before exec")
    check_unstarted(instance)
    size = options.get("ConsoleSize") or instance.config.get("ConsoleSize") or []
    if len(size) == 2:
        instance.size = (size[0], size[1])
    if options.get("Detach"):
        # A terminal has to be copied to somewhere.
        run_exec(engine, instance, TaskStreams(stdout="/dev/null" if instance.tty else "", terminal=instance.tty))
        return Response(200, b"")
    # As with dockerd, this request says how the output is packed, whether or not the command has a terminal.
    raw = options.get("Tty")
    return Response(101, Hijack(functools.partial(serve_exec, engine, request, instance, raw)),
                    stream_type(raw, request.version))


def serve_exec(engine: Engine, request: Request, instance: Exec, raw: bool, connection: Connection) -> None:
    """Run a command with its streams on a client's connection, to its end or until the client leaves."""
    config = instance.config
    attachment = Attachment(bool(config.get("AttachStdout")), bool(config.get("AttachStderr")) and not raw,
                            as_it_is if raw else multiplexed, bool(config.get("AttachStdin")))
    attachment.connect(connection)
    keys = DetachKeys(config.get("DetachKeys") or "") if instance.tty else None
    with request.client.when_gone(attachment.leave, half=False):
        streams = None
        try:
            streams = ProcessStreams(instance.container.folder or tempfile.gettempdir(), attachment.stdin,
                                     instance.tty, not instance.tty,
                                     close_stdin=functools.partial(engine.containerd.close_stdin,
                                                                   instance.container.id, instance.id),
                                     on_end=instance.done.wait)
            streams.join(attachment)
            run_exec(engine, instance, streams.paths, streams.exited)
        except ApiError as error:
            # Whatever the client wants: there is no other place for it.
            attachment.wanted[STDOUT] = True
            attachment.put(STDOUT, (str(error) + "\r\n").encode())
            attachment.drain()
            if streams:
                streams.abandon()
            return
        streams.begin()
        pump_stdin(attachment, keys)
        attachment.done.wait()
        attachment.drain()


@route("POST", "/exec/{id}/resize")
def exec_resize(engine: Engine, request: Request, name: str) -> Response:
    """Tell its terminal its size, which one that is not started yet gets at its start; 200, 409 when it has ended."""
    size, instance = terminal_size(request), find_exec(engine, name)
    if instance.started and not instance.running:
        raise Conflict(f"exec command {instance.id} is not running")
    instance.size = size
    if instance.running and instance.tty:
        with contextlib.suppress(NotFound, Conflict):
            engine.containerd.resize_terminal(instance.container.id, *instance.size, instance.id)
    return Response(200)


@route("GET", "/exec/{id}/json")
def exec_inspect(engine: Engine, request: Request, name: str) -> Response:
    """Whether it runs, and its exit status."""
    return Response(200, docker_exec(find_exec(engine, name)))


###############################################################################
# Supervision
###############################################################################


class Supervisor:
    """Carries out what nerdctl leaves to somebody: `--rm` of what was made by `create`, and health checks."""

    def __init__(self, engine: "Engine"):
        self.engine = engine
        # By the ids of containers that run; with None of those whose health nobody checks now.
        self.cared: Dict[str, Optional[HealthMonitor]] = {}
        self.changed: queue.Queue = queue.Queue()
        threading.Thread(target=self._reap, name="supervisor", daemon=True).start()

    def look(self) -> None:
        """Take over what a daemon before this one has left; for the start of the daemon."""
        with contextlib.suppress(ApiError):
            for container in self.engine.inventory.containers().values():
                with contextlib.suppress(ApiError, OSError):
                    find_streams(self.engine, container)
                    if fifo_folders(container):
                        with self.engine.owning(container.id) as now:
                            sweep_streams(self.engine, now)
                if needs_places(container) and not container.running:
                    # After a restart of the machine containerd starts it, as soon as it can be started.
                    with contextlib.suppress(ApiError, OSError), mounted(self.engine, placed_mounts(container)):
                        pass
            self.changed.put("")
            self.engine.hosts.refresh()

    def hold(self, container: Container) -> None:
        """Care for a container that runs or is being restarted."""
        watch = self.cared.get(container.id)
        if watch and (watch.pid != container.state.pid or container.state.kind != "running"):
            watch.stop.set()
            watch = None
        if container.health_check and container.state.kind == "running" and not watch:
            watch = HealthMonitor(self.engine, container)
        if watch or container.health_check or auto_removed(container):
            self.cared[container.id] = watch

    def release(self, identity: str) -> None:
        """A container needs no care any more."""
        watch = self.cared.pop(identity, None)
        if watch:
            watch.stop.set()

    def on_event(self, event: Optional[ContainerdEvent]) -> None:
        """Note the starts and ends of containers; the work is done in a thread of its own."""
        if event is None or event.ends_container or event.topic in ("/containers/delete", "/tasks/start",
                                                                    "/tasks/paused", "/tasks/resumed"):
            self.changed.put(event.container if event else "")

    def _reap(self) -> None:
        while True:
            real = self.changed.get()
            try:
                if not real and self.engine.feed.socket:
                    # Before every change is told, what is read is not kept, and in the way of the first client's reads.
                    self.engine.feed.wait_live(1.0)
                self._settle(real)
            except Unavailable:
                # All of them are looked at when containerd is there again.
                pass
            except ApiError as error:
                log(f"{real[:12]}: {error}")
            except Exception:
                log(traceback.format_exc())

    def _settle(self, real: str) -> None:
        """After the end of a container (any, for ""): remove it if it is to be, and stop caring for what does not run.
        After its start: care for it. While it is paused nobody checks its health."""
        table = self.engine.inventory.containers()
        for container in [table[real]] if real in table else list(table.values()) if not real else []:
            if container.running or container.state.kind == "restarting":
                self.hold(container)
                if container.state.kind == "paused":
                    # As with dockerd, it is so until the next check.
                    note_health(self.engine, container, "unhealthy", container.state.failing, container.state.pid)
            elif container.state.kind != "created" and self._end(container):
                self.release(container.id)
        if real not in table:
            # Removed by somebody else.
            release_places(self.engine)
        known = {each.id for each in self.engine.inventory.containers().values()}
        for identity in [each for each in self.cared if each not in known]:
            self.release(identity)

    def _end(self, container: Container) -> bool:
        """After the end of a container: remove it if it is to be, or give back what others want. Whether it is done."""
        owner = self.engine.owner(container.id)
        removed, streams, moment = auto_removed(container) and not owner.restarting, owner.streams, time.monotonic()
        # Output of a process that has ended may still come, at whose end the container is looked at again; for a client
        # that does not read nobody waits longer than dockerd does.
        if removed and streams and not streams.ended.wait(
                max(0.0, (streams.exited_at or moment) + streams.LINGER - moment)):
            return False
        code = container.state.exit_code
        if removed and code is not None and container.id not in self.engine.tasks.ends:
            # Seen and not told, before the feed was live: with the container its exit status would be gone.
            self.engine.tasks.failed(container.id, code)
        if placed_mounts(container):
            release_places(self.engine)
        # Ports, or networks that the daemon attached it to, others may want.
        if removed or container.ports or attached_networks(container):
            with contextlib.suppress(NotFound), self.engine.owning(container.id) as now:
                if now.running or owner.restarting:
                    # Started again meanwhile.
                    return False
                if removed:
                    remove_container(self.engine, now, force=True, volumes=True)
                else:
                    release_networks(self.engine, now)
                    take_down_network(self.engine, now)
        return True


class HealthMonitor:
    """Checks the health of a process of a container, in a thread of its own, until `stop` is set."""

    # Where systemd has the timers of containers that a `nerdctl start` of root has started.
    TIMERS = "/run/systemd/transient"

    def __init__(self, engine: Engine, container: Container):
        self.engine, self.id, self.pid = engine, container.id, container.state.pid
        self.stop = threading.Event()
        threading.Thread(target=self._run, args=(container,), name="health", daemon=True).start()

    def _run(self, container: Container) -> None:
        check, seen = container.health_check, container.state.health
        age = process_age(container)
        pause = check_pause(check, age, seen == "starting")
        # The first one comes so long after the start.
        pause -= age if age < pause else 0.0
        while not self.stop.wait(pause):
            try:
                container = self.engine.inventory.container(self.id)
                # nerdctl checks it itself where there is a timer.
                if container.state.kind == "running" and not os.path.exists(f"{self.TIMERS}/{self.id}.timer"):
                    self._check(container)
                container = self.engine.inventory.container(self.id)
                if container.state.kind == "running" and container.state.health != seen:
                    seen = container.state.health
                    self.engine.tell(container, f"health_status: {seen}")
            except NotFound:
                return
            except (ApiError, OSError) as error:
                if not self.stop.is_set():
                    log(f"health check of {self.id[:12]}: {error}")
            except Exception:
                log(traceback.format_exc())
            pause = check_pause(check, process_age(container), seen == "starting")

    def _check(self, container: Container) -> None:
        """Run the check once and keep its result, unless the container was stopped or paused, or containerd away."""
        check, missed = container.health_check, self.engine.tasks.missed
        age, began, timeout = process_age(container), time.time_ns(), check.get("Timeout", 30 * 10**9)
        try:
            code, output = run_in_container(self.engine, container, {"Cmd": health_command(container)}, timeout / 1e9,
                                            HEALTH_OUTPUT)
            text = output.decode("utf-8", "replace")
            if code < 0:
                text = f"Health check exceeded timeout ({go_duration(timeout)})" + (f": {text}" if text else "")
        except Unavailable:
            raise
        except ApiError as error:
            code, text = -1, str(error)
        self.engine.inventory.records.invalidate(self.id)
        now = self.engine.inventory.container(self.id)
        if (now.state.kind == "running" and now.state.pid == self.pid and not self.stop.is_set()
                and self.engine.tasks.missed == missed):
            keep_result(now, {"Start": rfc3339(began), "End": rfc3339(time.time_ns()), "ExitCode": code,
                              "Output": text})
            note_health(self.engine, now, *next_health(check, now.state.health, now.state.failing, code, age), self.pid)


def process_age(container: Container) -> float:
    """How long ago a container was started, in seconds."""
    return max(0.0, time.time() - (container.state.started_at or 0) / 1e9)


def check_pause(check: Dict[str, Any], age: float, starting: bool) -> float:
    """Seconds between two health checks: as with dockerd StartInterval (or 5) while it starts in the start period."""
    if starting and age < check.get("StartPeriod", 0) / 1e9:
        return check.get("StartInterval", 5 * 10**9) / 1e9
    return check.get("Interval", 30 * 10**9) / 1e9


def next_health(check: Dict[str, Any], health: str, failing: int, code: int, age: float) -> Tuple[str, int]:
    """The health of a container, and how many checks have failed one after the other, after one more which began at
    this age and ended with this exit status."""
    if code == 0:
        return "healthy", 0
    if health == "starting" and age < check.get("StartPeriod", 0) / 1e9:
        return health, failing
    return "unhealthy" if failing + 1 >= check.get("Retries", 3) else health, failing + 1


def health_command(container: Container) -> List[str]:
    """The words of a health check's command line."""
    kind, *words = container.health_check["Test"]
    shell = container.request.get("Shell") or ["/bin/sh", "-c"]
    return shell + words if kind == "CMD-SHELL" else words


def go_duration(nanoseconds: int) -> str:
    """A duration as Go prints it, such as 1m30s or 1.5s."""
    if nanoseconds < 10**9:
        return f"{nanoseconds / 1e6:g}ms"
    minutes, rest = divmod(nanoseconds, 60 * 10**9)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest / 1e9:.9g}s"


def keep_result(container: Container, result: Dict[str, Any]) -> None:
    """Add a result to the last ones of a container's health checks, in the file where nerdctl keeps them."""
    rows = [*health_results(container), result][-HEALTH_RESULTS:]
    path = os.path.join(container.folder, "health.json")
    try:
        with open(path + ".new", "w", encoding="utf-8", opener=functools.partial(os.open, mode=0o600)) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(path + ".new", path)
    except OSError as error:
        log(f"{path}: {error}")


###############################################################################
# Archive
###############################################################################

# Bits of Go's FileMode, which X-Docker-Container-Path-Stat has.
GO_MODES = ((stat.S_ISDIR, 1 << 31), (stat.S_ISLNK, 1 << 27), (stat.S_ISFIFO, 1 << 25), (stat.S_ISSOCK, 1 << 24),
            (stat.S_ISBLK, 1 << 26), (stat.S_ISCHR, 1 << 26 | 1 << 21), (stat.S_ISUID.__and__, 1 << 23),
            (stat.S_ISGID.__and__, 1 << 22), (stat.S_ISVTX.__and__, 1 << 20))


def go_mode(mode: int) -> int:
    """A POSIX mode as Go's FileMode."""
    return mode & 0o777 | sum(bits for test, bits in GO_MODES if test(mode))


def stat_header(found: PathStat) -> Dict[str, str]:
    """The X-Docker-Container-Path-Stat header."""
    name, target = (os.fsencode(each).decode("utf-8", "replace") for each in (found.name, found.target))
    told = {"name": name, "size": found.size, "mode": go_mode(found.mode), "mtime": rfc3339(found.mtime),
            "linkTarget": target}
    return {"X-Docker-Container-Path-Stat": base64.b64encode(json_bytes(told)).decode()}


# Where nerdctl mounts what is not of the container.
MOUNT_POINTS = ("/.dockerenv", "/dev", "/dev/shm", "/proc", "/sys", *NETWORK_FILES)


def is_tree_mount(mount: Dict[str, Any]) -> bool:
    """Whether a mount of an OCI spec belongs to a container's tree: binds do, and while it runs its tmpfs, but neither
    the /dev of the runtime nor what the kernel makes up."""
    kind, place = mount.get("type"), os.path.normpath(mount["destination"])
    bind = kind == "bind" or bool({"bind", "rbind"} & set(mount.get("options") or ()))
    return (bind or kind == "tmpfs" and place != "/dev") and not (place + "/").startswith(("/proc/", "/sys/"))


def mount_to_read(mount: Dict[str, Any]) -> Dict[str, Any]:
    """A mount of a snapshot for reading: an overlay without its upper folder of its own. With it the kernel would clear
    its work folder, in which another mount of it, such as that of a container that starts, may be making a file."""
    options = dict(each.partition("=")[::2] for each in mount["options"])
    upper = options.pop("upperdir", "")
    if mount["type"] != "overlay" or not upper:
        return mount
    options["lowerdir"] = upper + ":" + options["lowerdir"]
    kept = (each for each in options.items() if each[0] not in ("workdir", "volatile"))
    return {**mount, "options": [key + "=" * bool(value) + value for key, value in kept]}


def find_tree(engine: Engine, container: Container, stored: bool, writes: bool) -> Dict[str, Any]:
    """Where the tree of a container is, as enter_tree() is told, or with `stored` its snapshot in any case; `owner` is
    the user that it runs as. One that was never started has no files of nerdctl's yet: those of another container may
    be unpacked into it."""
    user, fresh = container.process.get("user") or {}, container.state.kind == "created"
    found = {"pid": 0 if stored else running_pid(engine, container), "owner": [user.get("uid", 0), user.get("gid", 0)],
             "read_only": bool((container.spec.get("root") or {}).get("readonly")), "binds": []}
    for each in container.spec.get("mounts") or []:
        place, stopped = each["destination"], not found["pid"]
        if is_tree_mount(each) and not (stopped and (each.get("type") == "tmpfs" or fresh and place in MOUNT_POINTS)):
            fixed = bool({"ro", "rro"} & set(each.get("options") or ()))
            found["binds"].append((each["source"] if stopped else place, place, fixed))
    if not found["pid"]:
        mounts = map(parse_mount, engine.containerd.snapshot_mounts(container.record.snapshotter,
                                                                    container.record.snapshot_key))
        found["mounts"] = list(mounts if writes else map(mount_to_read, mounts))
    return found


def running_pid(engine: Engine, container: Container) -> int:
    """The process of a container that runs or is paused, 0 else, as containerd has it now."""
    task = engine.containerd.get_task(container.id)
    return task.pid if task and task.status in ("running", "paused", "pausing") else 0


@contextlib.contextmanager
def opened_tree(engine: Engine, container: Container, missing: ApiError,
                order: Dict[str, Any]) -> Iterator[Tuple[Process, List[Any], bytes]]:
    """A process in a container's tree that carries out an order: it, its answer, and what it wrote after that.
    `missing` is raised where the path is not there."""
    for last in (False, False, True):
        with contextlib.ExitStack() as stack:
            if order["do"] == "unpack" and not running_pid(engine, container):
                # As with dockerd: one at a time, and none while it starts.
                container = stack.enter_context(engine.owning(container.id))
            found = find_tree(engine, container, order["do"] == "changes", order["do"] == "unpack")
            if not found["pid"]:
                stack.enter_context(mounted(engine, placed_mounts(container)))
                found["folder"] = stack.enter_context(temporary_folder("tree"))
            process = stack.enter_context(engine.nerdctl.start_tree(engine.containerd.entering()))
            process.write(json_bytes({**found, "user_namespace": bool(os.geteuid()), **order}) + b"\n")
            head, end, rest = b"", b"", b""
            for data in iter(process.read, b""):
                head, end, rest = (head + data).partition(b"\n")
                if end:
                    break
            # A process id may be another's by now. It was the container's when the tree was entered if it still is.
            ended = found["pid"] and running_pid(engine, container) != found["pid"]
            if not ended:
                if not end:
                    raise tree_error(process, missing)
                yield process, json.loads(head), rest
                return
            if last:
                raise Conflict(f"container {container.name} has just ended")


def check_path(text: str) -> str:
    """A path in a container, absolute and, as dockerd has it, without `.` and `..` but for a dot or slash at its end;
    400 without one."""
    refuse((not text, "path cannot be empty"), ("\0" in text, "invalid path: it has a NUL byte"))
    end = re.search(r"/?\.?$", text if "/" in text else "/" + text).group()
    return os.path.normpath("/" + text.lstrip("/")).rstrip("/") + (end if end.startswith("/") else "") or "/"


def running_root(engine: Engine, container: Container) -> Tuple[str, Set[str]]:
    """The root of a running container, "" where it is out of sight, and what is mounted in it and not of its tree."""
    root, own = f"/proc/{container.state.pid}/root/", container.spec.get("mounts") or []
    places = tuple(os.path.normpath(each["destination"]) + "/" for each in own if is_tree_mount(each))
    # It may have just ended.
    with contextlib.suppress(OSError):
        if container.state.pid and os.access(root, os.X_OK):
            return root, {each for each in mount_points(container.state.pid) if not (each + "/").startswith(places)}
    return "", set()


def not_there(name: str, path: str) -> NotFound:
    """The 404 for a path that a container, by the name that the client used, does not have."""
    return NotFound(f"Could not find the file {path} in container {name}")


def path_stat(engine: Engine, container: Container, path: str, name: str) -> PathStat:
    """The stat of a path in a container; 404 where there is none, with the client's `name` of the container."""
    # It takes a hundredth of the time that a process takes, which a path needs that what is mounted stands in front of.
    root, barred = running_root(engine, container)
    try:
        if root:
            return stat_below(root, path, barred)
    except FileNotFoundError:
        raise not_there(name, path) from None
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise path_error(path, error) from None
    with opened_tree(engine, container, not_there(name, path), {"do": "stat", "path": path}) as (_, told, _):
        return PathStat(*told)


@route("HEAD", "/containers/{id}/archive")
def archive_stat(engine: Engine, request: Request, name: str) -> Response:
    """What a path in a container is, in a header; 404 where there is none."""
    container = engine.inventory.container(name)
    return Response(200, None, "", stat_header(path_stat(engine, container, check_path(request.value("path")), name)))


@route("GET", "/containers/{id}/archive")
def archive_get(engine: Engine, request: Request, name: str) -> Response:
    """A path in a container as a tar, with its stat in a header; 404 where there is none."""
    return packed(engine, name, check_path(request.value("path")), "archive-path")


def packed_tree(engine: Engine, name: str, order: Dict[str, Any], event: str) -> Iterator[Any]:
    """The answer to an order that packs, and then the tar; `event` tells of it in the end."""
    container, missing = engine.inventory.container(name), not_there(name, order["path"])
    with opened_tree(engine, container, missing, order) as (process, told, data):
        yield told
        yield data
        yield from iter(process.read, b"")
        if process.wait():
            raise tree_error(process, missing)
    engine.tell(container, event)


def packed(engine: Engine, name: str, path: str, event: str) -> Response:
    """A path in a container, as a client names it, as a tar; 404 where there is none. `event` tells of it."""
    tar = packed_tree(engine, name, {"do": "pack", "path": path}, event)
    return Response(200, Stream(tar), "application/x-tar", stat_header(PathStat(*next(tar))))


@route("POST", "/containers/{id}/copy")
def container_copy(engine: Engine, request: Request, name: str) -> Response:
    """A file, or what is in a folder, as a tar for clients of before API 1.24; from then on 404."""
    if request.version >= (1, 24):
        raise NotFound("page not found")
    path = request.json({"Resource": str}).get("Resource") or ""
    if not path:
        raise BadParameter("Path cannot be empty")
    path = check_path(path)
    found = path_stat(engine, engine.inventory.container(name), path, name)
    if found.target:
        path, found = found.target, path_stat(engine, engine.inventory.container(name), found.target, name)
    return packed(engine, name, path.rstrip("/") + "/." if stat.S_ISDIR(found.mode) else path, "copy")


@route("PUT", "/containers/{id}/archive")
def archive_put(engine: Engine, request: Request, name: str) -> Response:
    """Unpack a tar into a folder of a container; 200. 404 where there is no such folder, 400 where it is none or
    read-only, and for an archive that is broken, breaks off or leads outside: what came whole before that is
    unpacked."""
    container = engine.inventory.container(name)
    path = check_path(request.value("path"))
    order = {"do": "unpack", "path": path, "keep": request.flag("noOverwriteDirNonDir")}
    image = image_of(engine, container)
    user = container.labels.get("nerdctl/user") or image and field_of(image.config, "config.User")
    if not (request.flag("copyUIDGID") and user):
        order["owner"] = None
    missing = not_there(name, path)
    with opened_tree(engine, container, missing, order) as (process, _, _):
        process.feed(plain_blocks(request.body.blocks()))
        if process.wait():
            raise tree_error(process, missing)
    engine.tell(container, "extract-to-dir")
    return Response(200)


@route("GET", "/containers/{id}/export")
def container_export(engine: Engine, request: Request, name: str) -> Response:
    """Its whole file system as a tar, without volumes."""
    tar = packed_tree(engine, name, {"do": "export", "path": "/"}, "export")
    next(tar)
    return Response(200, Stream(tar), "application/octet-stream")


@route("GET", "/containers/{id}/changes")
def container_changes(engine: Engine, request: Request, name: str) -> Response:
    """What differs from its image: paths with the kinds 0 changed, 1 added, 2 deleted."""
    container = engine.inventory.container(name)
    snapshotter, key = container.record.snapshotter, container.record.snapshot_key
    with engine.containerd.leased() as containerd:
        parent = containerd.snapshot_parent(snapshotter, key)
        with containerd.snapshot("View", snapshotter, parent) as (_, below):
            order = {"do": "changes", "path": "/", "below": [parse_mount(each) for each in below],
                     "ignored": MOUNT_POINTS}
            with opened_tree(engine, container, not_there(name, "/"), order) as (_, found, _):
                return Response(200, [{"Path": path, "Kind": kind} for path, kind in found] or b"null\n")


def base_of(engine: Engine, container: Container, parent: str) -> Optional[ImageGroup]:
    """The image that has the snapshot `parent` below a container, first the one that it was made of: its name may
    stand for another one by now. None where there is none any more."""
    found = [group for group in engine.inventory.images.get().values() if chain_ids(group.config)[-1:] == [parent]]
    wanted = image_id(container, engine.inventory.images.by_name())
    return next((group for group in found if group.id == wanted), found[0] if found else None)


def commit_layers(containerd: Containerd, container: Container,
                  base: ImageContent) -> Tuple[List[Dict[str, Any]], List[str]]:
    """The layers of a container's file system and the digests of their tars: those of the image below it, and one with
    what differs from it, unless nothing does."""
    snapshotter, key = container.record.snapshotter, container.record.snapshot_key
    layers, diff_ids = list(base.layers), list((base.config.get("rootfs") or {}).get("diff_ids") or [])
    parent = "".join(chain_ids(base.config)[-1:])
    with containerd.snapshot("View", snapshotter, parent) as (_, below):
        layer, diff_id = containerd.make_layer(below, containerd.snapshot_mounts(snapshotter, key))
    # Of a tar without entries, where nothing differs.
    if diff_id != "sha256:" + sha256(bytes(1024)).hexdigest():
        layers.append(layer.json)
        diff_ids.append(diff_id)
        containerd.unpack_layer(layer, snapshotter, parent, chain_ids({"rootfs": {"diff_ids": diff_ids}})[-1])
    return layers, diff_ids


@route("POST", "/commit")
def image_commit(engine: Engine, request: Request) -> Response:
    """Make an image of a container, whatever its state; 201 with its id. Its config is that of the container, above it
    that of the body, above that the instructions of `changes`."""
    asked = image_config(request.json(CONFIG))
    changes, repository = request.values("changes"), request.value("repo")
    target = parse_reference(f"{repository}:{request.value('tag')}" if repository and request.value("tag")
                             else repository).name if repository else ""
    working = target or f"{WORKING_NAME}commit:{os.urandom(8).hex()}"
    with engine.owning(request.value("container")) as container, engine.containerd.leased() as containerd:
        snapshotter, key = container.record.snapshotter, container.record.snapshot_key
        base = base_of(engine, container, containerd.snapshot_parent(snapshotter, key))
        content = base.content if base else NO_CONTENT
        own = docker_config(container, container.spec, content.config.get("config") or {})
        config = merged_config(apply_changes(asked or image_config(own), changes), image_config(own))
        frozen = request.flag("pause", True) and container.state.kind == "running"
        try:
            if frozen:
                engine.containerd.pause_task(container.id)
        except ApiError:
            frozen = False
        try:
            layers, diff_ids = commit_layers(containerd, container, content)
        finally:
            # It may have been killed meanwhile, or been told to go on.
            with contextlib.suppress(ApiError):
                if frozen:
                    engine.containerd.resume_task(container.id)
        now, author = rfc3339(time.time_ns()), request.value("author")
        step = {"created": now, "created_by": " ".join(own["Cmd"] or []), "author": author,
                "comment": request.value("comment"), "empty_layer": len(layers) == len(content.layers)}
        machine = GO_ARCHITECTURES.get(os.uname().machine, os.uname().machine)
        image = {
            "os": "linux", "architecture": machine, **content.config, "config": config, "created": now,
            "author": author or content.config.get("author") or "", "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [*(content.config.get("history") or []), {key: value for key, value in step.items() if value}],
        }
        with engine.changing_images([working]):
            write_image(containerd, snapshotter, working, image, layers, base.id if base else "")
    group = engine.inventory.image(working)
    if target:
        engine.tell_image("tag", group, familiar(target))
    engine.tell(container, "commit", comment=request.value("comment"), imageID=group.id, imageRef=familiar(target))
    return Response(201, {"Id": group.id})


###############################################################################
# Statistics
###############################################################################


def read_number(path: str) -> int:
    """The number in a file, 0 for none (and for `max`)."""
    return int_or_zero(read_file(path).strip())


def read_table(path: str) -> Dict[str, int]:
    """The `name number` lines of a file."""
    return {name: int(value) for name, _, value in (line.partition(" ") for line in read_file(path).splitlines())
            if value.isdigit()}


def cgroup_folders(pid: int) -> Dict[str, str]:
    """Where the cgroups of a process are mounted, by controller; "" is the one of version 2."""
    found = {}
    for line in read_file(f"/proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if not controller:
                for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
                    if os.path.isfile(os.path.join(root, "cgroup.controllers")):
                        found[""] = root + path
            elif "=" not in controller and os.path.isdir(f"/sys/fs/cgroup/{controller}{path}"):
                found[controller] = f"/sys/fs/cgroup/{controller}{path}"
    return found


def cpu_stats(folders: Dict[str, str]) -> Dict[str, Any]:
    """`cpu_stats`: nanoseconds used by the container, and by the whole machine."""
    if "cpuacct" in folders:
        total = read_number(folders["cpuacct"] + "/cpuacct.usage")
        ticks = read_table(folders["cpuacct"] + "/cpuacct.stat")
        scale = 10**9 // os.sysconf("SC_CLK_TCK")
        user, system = ticks.get("user", 0) * scale, ticks.get("system", 0) * scale
        throttled = read_table(folders.get("cpu", folders["cpuacct"]) + "/cpu.stat")
        waited = throttled.get("throttled_time", 0)
        more = {"percpu_usage": list(map(int, read_file(folders["cpuacct"] + "/cpuacct.usage_percpu").split()))}
    else:
        told = throttled = read_table(folders.get("", "") + "/cpu.stat")
        total, user, system = (told.get(key, 0) * 1000 for key in ("usage_usec", "user_usec", "system_usec"))
        waited, more = told.get("throttled_usec", 0) * 1000, {}
    machine = read_file("/proc/stat").partition("\n")[0].split()[1:8]
    return {
        "cpu_usage": {"total_usage": total, "usage_in_kernelmode": system, "usage_in_usermode": user, **more},
        "system_cpu_usage": sum(map(int, machine)) * (10**9 // os.sysconf("SC_CLK_TCK")),
        "online_cpus": os.cpu_count() or 1,
        "throttling_data": {"periods": throttled.get("nr_periods", 0),
                            "throttled_periods": throttled.get("nr_throttled", 0), "throttled_time": waited},
    }


def memory_total() -> int:
    """Bytes of memory of the machine."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", read_file("/proc/meminfo"), re.M)
    return int(found.group(1)) * 1024 if found else 0


def memory_stats(folders: Dict[str, str]) -> Dict[str, Any]:
    """`memory_stats` of either version of cgroups; the limit is the machine's memory where there is none."""
    total, folder = memory_total(), folders.get("memory", folders.get("", "")) + "/memory."
    usage, limit = ("usage_in_bytes", "limit_in_bytes") if "memory" in folders else ("current", "max")
    found = {"usage": read_number(folder + usage), "stats": read_table(folder + "stat"),
             "limit": min(read_number(folder + limit), total) or total}
    if "memory" in folders:
        failures = read_number(folder + "failcnt")
        found.update({"max_usage": read_number(folder + "max_usage_in_bytes"), **({"failcnt": failures} if failures
                                                                                  else {})})
    return found


def pids_stats(folders: Dict[str, str]) -> Dict[str, int]:
    """`pids_stats`; without a limit there is none in it."""
    folder = folders.get("pids", folders.get("", ""))
    found = {"current": read_number(folder + "/pids.current")}
    limit = read_number(folder + "/pids.max")
    return {**found, "limit": limit} if limit else found


def blkio_stats(folders: Dict[str, str]) -> Dict[str, Any]:
    """`blkio_stats`: bytes and operations a device."""
    rows: List[Dict[str, Any]] = []
    operations: List[Dict[str, Any]] = []
    if "blkio" in folders:
        for name, target in (("blkio.throttle.io_service_bytes_recursive", rows),
                             ("blkio.throttle.io_serviced_recursive", operations)):
            for major, minor, word, value in re.findall(r"^(\d+):(\d+) (Read|Write) (\d+)$",
                                                        read_file(f"{folders['blkio']}/{name}"), re.M):
                target.append({"major": int(major), "minor": int(minor), "op": word.lower(), "value": int(value)})
    else:
        for major, minor, rest in re.findall(r"^(\d+):(\d+) (.*)$", read_file(folders.get("", "") + "/io.stat"), re.M):
            told = dict(re.findall(r"(\w+)=(\d+)", rest))
            for target, keys in ((rows, ("rbytes", "wbytes")), (operations, ("rios", "wios"))):
                target += [{"major": int(major), "minor": int(minor), "op": word, "value": int(told.get(key, 0))}
                           for word, key in zip(("read", "write"), keys)]
    empty = dict.fromkeys(("io_queue_recursive", "io_service_time_recursive", "io_wait_time_recursive",
                           "io_merged_recursive", "io_time_recursive", "sectors_recursive"))
    return {"io_service_bytes_recursive": rows or None, "io_serviced_recursive": operations or None, **empty}


def network_stats(pid: int) -> Dict[str, Dict[str, int]]:
    """`networks`: bytes and packets of each interface of a process's network namespace but the loopback."""
    fields = [way + each for way in ("rx_", "tx_") for each in ("bytes", "packets", "errors", "dropped")]
    found = {}
    for name, numbers in re.findall(r"^\s*(\S+):\s*(.*)$", read_file(f"/proc/{pid}/net/dev"), re.M):
        if name != "lo":
            values = numbers.split()
            found[name] = dict(zip(fields, map(int, values[:4] + values[8:12])))
    return found


def docker_stats(container: Container, pid: int, before: Dict[str, Any]) -> Dict[str, Any]:
    """One sample of a container's statistics; `before` is the sample before it, {} for none. Of a container that does
    not run only zeros, as dockerd has it."""
    folders = cgroup_folders(pid) if pid else {}
    idle = {"cpu_usage": {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0},
            "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0}}
    found: Dict[str, Any] = {
        "name": "/" + container.name, "id": container.id, "os_type": "linux",
        "read": rfc3339(time.time_ns()) if pid else ZERO_TIME, "preread": before.get("read") or ZERO_TIME,
        "num_procs": 0, "storage_stats": {},
        "pids_stats": pids_stats(folders) if pid else {}, "blkio_stats": blkio_stats(folders),
        "cpu_stats": cpu_stats(folders) if pid else idle, "precpu_stats": before.get("cpu_stats") or idle,
        "memory_stats": memory_stats(folders) if pid else {},
    }
    if pid and network_mode(container) != "host":
        found["networks"] = network_stats(pid)
    return found


@route("GET", "/containers/{id}/stats")
def container_stats(engine: Engine, request: Request, name: str) -> Response:
    """Its use of the machine, a sample a second; with stream=0 one, with one-shot=1 without the sample before it."""
    container = engine.inventory.container(name)
    stream, one_shot = request.flag("stream", True), request.flag("one-shot")
    if stream and one_shot:
        raise BadParameter("cannot have stream=true and one-shot=true")

    def chunks() -> Iterator[bytes]:
        gone = threading.Event()
        before: Dict[str, Any] = {}
        with request.client.when_gone(gone.set):
            while not gone.is_set() and not engine.closing.is_set():
                now = engine.inventory.containers().get(container.id)
                if now is None:
                    return
                found = docker_stats(now, now.state.pid, before)
                runs = found["read"] != ZERO_TIME
                # The only sample that is asked for has one before it.
                if stream or one_shot or before or not runs:
                    yield json_bytes(found) + b"\n"
                    if not stream:
                        return
                before = found if runs else {}
                gone.wait(1.0)

    return Response(200, Stream(chunks(), primed=True), "application/json")


def parse_top(text: str, pids: Set[int]) -> Dict[str, Any]:
    """ps's table as titles and the rows of these processes; what is left of a row goes to the last column. 500 with
    dockerd's words where it does not tell their numbers."""
    lines = [line for line in text.splitlines() if line.strip()]
    titles = lines[0].split() if lines else []
    if "PID" not in titles:
        raise ApiError("Couldn't find PID field in ps output")
    rows = [line.split(None, len(titles) - 1) for line in lines[1:]]
    at = titles.index("PID")
    return {"Titles": titles, "Processes": [row for row in rows if len(row) > at and int_or_zero(row[at]) in pids]}


@route("GET", "/containers/{id}/top")
def container_top(engine: Engine, request: Request, name: str) -> Response:
    """Its processes as ps on the host shows them, with `ps_args`; 409 when it does not run."""
    container = engine.inventory.container(name)
    require_running(container)
    try:
        words = shlex.split(request.value("ps_args") or "-ef")
    except ValueError as error:
        raise BadParameter(f"invalid ps_args: {error}") from None
    for word in words:
        refuse((re.search(r"pid=[^,]", word), f'specifying "{word}" is not allowed'))
    output = engine.nerdctl.program("ps").output(*words, timeout=20)
    if output.status:
        raise ApiError("ps: " + (output.stderr.strip().partition("\n")[0] or f"exit status {output.status}"))
    found = parse_top(output.stdout.decode(errors="replace"), engine.containerd.list_pids(container.id))
    engine.tell(container, "top")
    return Response(200, found)


###############################################################################
# Networks
###############################################################################

NETWORK_FILTERS = ("dangling", "driver", "id", "label", "name", "scope", "type", "partial-match")
PREDEFINED = ("bridge", "host", "none")


@route("GET", "/networks/")
@route("GET", "/networks")
def network_list(engine: Engine, request: Request) -> Response:
    """Networks; bridge, host and none are always there."""
    filters = request.filters(*NETWORK_FILTERS)
    dangling, kinds = flag_filter(filters, "dangling"), filters.get("type") or []
    refuse((not set(kinds) <= {"custom", "builtin"}, f"invalid filter: 'type'='{''.join(kinds[:1])}'"))
    used = {*PREDEFINED, *(name for each in engine.inventory.containers().values() if each.running
                           for name in network_names(each))} if dangling is not None else ()
    named, known = NameFilter(filters.get("name") or []), NameFilter(filters.get("id") or [])
    return Response(200, [
        each for each in engine.inventory.networks().values()
        if (dangling is None or dangling == (each["Name"] not in used))
        and (not filters.get("driver") or each["Driver"] in filters["driver"])
        and named.passes(each["Name"]) and known.passes(each["Id"])
        and (not filters.get("scope") or each["Scope"] in filters["scope"])
        and (not kinds or ("builtin" if each["Name"] in PREDEFINED else "custom") in kinds)
        and match_labels(each["Labels"], filters.get("label") or [])])


def find_network(engine: Engine, name: str) -> Dict[str, Any]:
    """The network of a name, an id or the beginning of one; 404 and 400 with dockerd's words."""
    networks = list(engine.inventory.networks().values())
    exact = [each for key in ("Name", "Id") for each in networks if each[key] == name]
    found = exact[:1] or [each for each in networks if each["Id"].startswith(name)]
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
    members, networks = {}, engine.inventory.networks()
    for container in engine.inventory.containers().values():
        if container.running and network["Name"] in network_names(container):
            told = docker_networks(container, networks).get(network["Name"]) or {}
            members[container.id] = {
                "Name": container.name, "EndpointID": told.get("EndpointID") or "",
                "MacAddress": told.get("MacAddress") or "",
                "IPv4Address": f"{told['IPAddress']}/{told['IPPrefixLen']}" if told.get("IPAddress") else "",
                "IPv6Address": f"{told['GlobalIPv6Address']}/{told['GlobalIPv6PrefixLen']}"
                if told.get("GlobalIPv6Address") else "",
            }
    return Response(200, {**network, "Containers": members})


def network_create_args(body: Dict[str, Any], name: str) -> List[str]:
    """argv of `network create`. 400 for bad values, 501 for what nerdctl has not."""
    driver, ipam = body.get("Driver") or "bridge", body.get("IPAM") or {}
    if body.get("Scope") == "swarm":
        raise Forbidden("cannot create a swarm scoped network when swarm is not active")
    for plugin, known in ((driver, ("bridge", "macvlan", "ipvlan")),
                          (ipam.get("Driver") or "default", ("default", "host-local", "dhcp"))):
        refuse((plugin not in known, f'plugin "{plugin}" not found'), kind=NotFound)
    if body.get("ConfigOnly") or field_of(body, "ConfigFrom.Network") or body.get("Ingress"):
        raise NotImplementedHere("nerdctl has neither config-only nor ingress networks")
    words = ["network", "create", f"--driver={driver}"]
    ranges, spare = [], {}
    for config in ipam.get("Config") or []:
        words += _value(config.get("Subnet"), "--subnet") + _value(config.get("Gateway"), "--gateway")
        words += _value(config.get("IPRange"), "--ip-range")
        ranges += [config["IPRange"]] if config.get("IPRange") else []
        for host, text in (config.get("AuxiliaryAddresses") or {}).items():
            with contextlib.suppress(ValueError):
                if ipaddress.ip_address(text) in ipaddress.ip_network(config.get("Subnet") or "::/128", strict=False):
                    spare.setdefault(config["Subnet"], {})[host] = text
                    continue
            raise BadParameter(f"no matching subnet for aux-address {host}={text}")
    words += _switch(ipam.get("Driver") == "dhcp", "--ipam-driver=dhcp")
    words += _switch(body.get("Internal"), "--internal") + _switch(body.get("EnableIPv6"), "--ipv6")
    options = body.get("Options") or {}
    # What nerdctl does not carry out is only kept.
    words += _pairs({DRIVER_OPTIONS[key]: value for key, value in options.items() if key in DRIVER_OPTIONS}, "--opt")
    labels = body.get("Labels") or {}
    # nerdctl keeps none of them.
    labels.update({"nerdctld/options": json.dumps(options)} if options else {})
    labels.update({"nerdctld/ip-range": ranges[0]} if ranges else {})
    more = {"Options": ipam.get("Options"), "AuxiliaryAddresses": spare}
    labels.update({"nerdctld/ipam": json.dumps(more)} if spare or more["Options"] != {} else {})
    return [*words, *_pairs(labels, "--label"), "--", name]


# Docker's driver options that the CNI plugins know, under the plugins' names.
DRIVER_OPTIONS = {"com.docker.network.driver.mtu": "mtu", "com.docker.network.bridge.enable_ip_masquerade": "ip-masq",
                  "com.docker.network.bridge.enable_icc": "icc", "parent": "parent", "macvlan_mode": "macvlan_mode",
                  "ipvlan_mode": "ipvlan_mode", "mtu": "mtu"}


@route("POST", "/networks/create")
def network_create(engine: Engine, request: Request) -> Response:
    """Make a network; 201 with its id. 409 for a name in use, 403 for a pre-defined name or a subnet in use."""
    body = request.json({
        "Name": str, "Driver": str, "Scope": str, "EnableIPv4": bool, "EnableIPv6": bool, "Internal": bool,
        "Attachable": bool, "Ingress": bool, "ConfigOnly": bool, "ConfigFrom": {"Network": str}, "Options": Named(str),
        "Labels": Named(str), "IPAM": {"Driver": str, "Options": Named(str), "Config": [
            {"Subnet": str, "IPRange": str, "Gateway": str, "AuxiliaryAddresses": Named(str)}]}})
    name = body.get("Name") or ""
    refuse((not name, "name is required"), (not name.strip(), "invalid name: name is empty"),
           (len(name) > 200 or network_name(cni_name(name)) != name or len(cni_name(name)) > 200,
            f'invalid network name: "{name}": nerdctl has it as the name of a file'))
    if name in ("bridge", "host", "none", "default"):
        raise Forbidden(f"operation is not permitted on predefined {name} network")
    if name in engine.inventory.networks():
        raise Conflict(f"network with name {name} already exists")
    configs = field_of(body, "IPAM.Config") or []
    if body.get("EnableIPv6") and not any(":" in (each.get("Subnet") or "") for each in configs):
        body["IPAM"] = {**(body.get("IPAM") or {}), "Config": [*configs, {"Subnet": local_subnet(engine)}]}
    arguments = network_create_args(body, cni_name(name))
    try:
        engine.nerdctl.run(*arguments)
        route_ipv6(engine, cni_name(name))
    except ApiError as error:
        if re.search(r"overlaps with other one|subnet .* overlap", str(error)):
            raise Forbidden("invalid pool request: Pool overlaps with other one on this address space") from None
        raise
    network = find_network(engine, name)
    engine.journal.emit("network", "create", network["Id"], {"name": name, "type": network["Driver"]})
    return Response(201, {"Id": network["Id"], "Warning": keep_spare(engine, network)})


# Where the plugin host-local notes which container has an address, in a file of its name.
ADDRESSES = "/var/lib/cni/networks"


def keep_spare(engine: Engine, network: Dict[str, Any], kept: bool = True) -> str:
    """Keep a network's auxiliary addresses from containers, or (not `kept`) give them up; a warning if it fails."""
    folder = engine.containerd.root() + os.path.join(ADDRESSES, cni_name(network["Name"]))
    for path in (os.path.join(folder, address) for config in network["IPAM"]["Config"] or []
                 for address in (config.get("AuxiliaryAddresses") or {}).values()):
        try:
            if kept:
                os.makedirs(folder, 0o755, exist_ok=True)
                with open(path, "x", encoding="ascii") as file:
                    file.write("nerdctld\r\nauxiliary")
            else:
                os.unlink(path)
        except OSError as error:
            if kept:
                return f"auxiliary addresses are shown and not kept free: {error}"
    return ""


def local_subnet(engine: Engine) -> str:
    """A /64 of this machine's own range of local addresses (RFC 4193) that no network has."""
    taken = {each.get("Subnet") for network in engine.inventory.networks().values()
             for each in network["IPAM"]["Config"] or []}
    digits = "fd" + sha256(engine.containerd.uuid().encode()).hexdigest()[:10]
    found = (str(ipaddress.ip_network(f"{digits[:4]}:{digits[4:8]}:{digits[8:]}:{number:x}::/64"))
             for number in range(1 << 16))
    return next(each for each in found if each not in taken)


def route_ipv6(engine: Engine, name: str) -> None:
    """Give a network of ours with IPv6 a default route for it, where it has one for IPv4: nerdctl writes that alone."""
    for path in (os.path.join(cni_folder(), engine.nerdctl.namespace, f"nerdctl-{name}.conflist"),
                 os.path.join(cni_folder(), f"nerdctl-{name}.conflist")):
        config = read_json_file(path)
        ipam = (config.get("plugins") or [{}])[0].get("ipam") or {}
        routes, ranges = ipam.get("routes") or [], ipam.get("ranges") or []
        if {"dst": "0.0.0.0/0"} in routes and any(":" in each.get("subnet", "") for row in ranges for each in row):
            routes.append({"dst": "::/0"})
            with open(path + ".new", "w", encoding="utf-8") as file:
                json.dump(config, file, indent=2)
            os.replace(path + ".new", path)
            return


def remove_network(engine: Engine, network: Dict[str, Any]) -> None:
    """Remove a network; 403 with dockerd's words for a pre-defined one or one with running containers."""
    name = network["Name"]
    users = [f'name:"{each.name}" id:"{endpoint_id(each, network)[:12]}"'
             for each in engine.inventory.containers().values() if each.running and name in network_names(each)]
    refuse((name in PREDEFINED, f"{name} is a pre-defined network and cannot be removed"),
           (users, f"error while removing network: network {name} has active endpoints ({', '.join(users)})"),
           kind=Forbidden)
    for patient in (True, True, False):
        try:
            engine.nerdctl.run("network", "rm", "--", cni_name(name))
            break
        except ApiError as error:
            # It asks for every task of every namespace, and fails where one of them ends meanwhile or is slow.
            if not patient or not re.search("task .*not found|deadline exceeded", str(error)):
                raise
    keep_spare(engine, network, kept=False)
    engine.journal.emit("network", "destroy", network["Id"], {"name": name, "type": network["Driver"]})


@route("DELETE", "/networks/{id}")
def network_delete(engine: Engine, request: Request, name: str) -> None:
    """Remove a network; 204."""
    remove_network(engine, find_network(engine, name))


@route("POST", "/networks/prune")
def network_prune(engine: Engine, request: Request) -> Response:
    """Remove the networks that no running container has, by the filters until, label and label!."""
    filters = request.filters("until", "label", "label!")
    common, deleted = prune_filter(filters), []
    for network in list(engine.inventory.networks().values()):
        if (network["Name"] in PREDEFINED or network["Id"] in ("", made_up_id(network["Name"]))
                or not common(network["Labels"], nanoseconds_of(network["Created"]) or 0)):
            continue
        with contextlib.suppress(ApiError):
            remove_network(engine, network)
            deleted.append(network["Name"])
    engine.journal.emit("network", "prune", "", {"reclaimed": "0"})
    return Response(200, {"NetworksDeleted": deleted or None})


def check_connection(network: Dict[str, Any], container: Container) -> None:
    """400 with dockerd's words where a container cannot have a network beside those that it has."""
    names = network_names(container)
    refuse(
        (network["Name"] == "host",
         "cannot connect container to host network - container must be created in host network mode"),
        (any(each.partition(":")[0] in ("host", "container", "ns") for each in (*names, network_mode(container))),
         "container sharing network namespace with another container or host cannot be connected to any other network"),
        (names and "none" in (*names, network["Name"]),
         "container cannot be connected to multiple networks with one of the networks in private (none) mode"))


@contextlib.contextmanager
def rewiring(engine: Engine, body: Dict[str, Any]) -> Iterator[Tuple[Container, Dict[str, Dict[str, Any]]]]:
    """Context of a change of the networks of a request's container: it, and its EndpointSettings by network."""
    name = body.get("Container") or ""
    gone = ApiError(f"Container {name} is marked for removal and cannot be connected or disconnected to the network")
    with engine.owning(name, gone) as container:
        yield container, {each: asked_endpoint(container, each) for each in network_names(container)}
    engine.hosts.refresh()


@route("POST", "/networks/{id}/connect")
def network_connect(engine: Engine, request: Request, name: str) -> Response:
    """Put a container into a network, whatever its state; 403 for one that runs and is in it, 400 for networks that
    cannot be together."""
    body = request.json({"Container": str, "EndpointConfig": ENDPOINT})
    asked = dict(body.get("EndpointConfig") or {})
    if request.version < (1, 54):
        asked.pop("MacAddress", None)
    engine.inventory.container(body.get("Container") or "")
    network = find_network(engine, name)
    check_endpoint(network, asked)
    with rewiring(engine, body) as (container, endpoints):
        if network["Name"] in endpoints:
            if container.running:
                raise Forbidden(f"endpoint with name {container.name} already exists in network {network['Name']}")
            return Response(200)
        check_connection(network, container)
        pid, labels = container.task.pid if container.running and network["Name"] != "none" else 0, {}
        try:
            labels = attach_network(engine, container, network["Name"], asked, pid) if pid else {}
        except (ApiError, OSError):
            # Where it has just ended, its next start attaches it.
            container = engine.inventory.container(container.id)
            if container.running and os.path.exists(f"/proc/{pid}/net/dev"):
                raise
        keep_networks(engine, container, {**endpoints, network["Name"]: asked}, labels)
        if container.running:
            engine.tell_network(container, network, "connect")
    return Response(200)


@route("POST", "/networks/{id}/disconnect")
def network_disconnect(engine: Engine, request: Request, name: str) -> Response:
    """Take a container out of a network, whatever its state; 500 as with dockerd for one that is not in it. With
    `Force`, or where it does not run, the network may be gone."""
    body = request.json({"Container": str, "Force": bool})
    force = body.get("Force")
    with rewiring(engine, body) as (container, endpoints):
        try:
            network = find_network(engine, name)
        except NotFound:
            if container.running and not force:
                raise
            network = {"Name": name}
        if network["Name"] not in endpoints:
            article = "" if container.running and "Id" in network else "the "
            raise ApiError(f"container {container.id} is not connected to {article}network {network['Name']}")
        if network["Name"] == "host":
            raise BadParameter("cannot disconnect container from host network - container was created in host network "
                               "mode")
        del endpoints[network["Name"]]
        running = container.running and "Id" in network and network["Name"] != "none"
        labels = detach_network(engine, container, network["Name"]) if running else {}
        keep_networks(engine, container, endpoints, labels)
        if container.running:
            engine.tell_network(container, network, "disconnect")
    return Response(200)


###############################################################################
# Volumes
###############################################################################


def volume_users(engine: Engine) -> collections.Counter:
    """Volume name -> number of containers that mount it."""
    return collections.Counter(mount["Name"] for container in engine.inventory.containers().values()
                               for mount in container.mounts if mount.get("Name"))


@route("GET", "/volumes")
def volume_list(engine: Engine, request: Request) -> Response:
    """Volumes, by the filters dangling, driver, label and name."""
    filters = request.filters("dangling", "driver", "label", "name")
    dangling = flag_filter(filters, "dangling")
    users = volume_users(engine) if dangling is not None else {}
    named = NameFilter(filters.get("name") or [])
    found = [
        volume for volume in engine.inventory.volumes().values()
        if (dangling is None or dangling == (volume["Name"] not in users))
        and (not filters.get("driver") or volume["Driver"] in filters["driver"])
        and named.passes(volume["Name"])
        and match_labels(volume["Labels"] or {}, filters.get("label") or [])
    ]
    return Response(200, {"Volumes": found, "Warnings": None})


def find_volume(engine: Engine, name: str) -> Dict[str, Any]:
    """The volume of a name; 404 with dockerd's words."""
    volume = engine.inventory.volumes().get(name)
    if volume is None:
        raise NotFound(f"get {name}: no such volume")
    return volume


@route("GET", "/volumes/{name}")
def volume_inspect(engine: Engine, request: Request, name: str) -> Response:
    """One volume."""
    return Response(200, find_volume(engine, name))


@route("POST", "/volumes/create")
def volume_create(engine: Engine, request: Request) -> Response:
    """Make a volume, or find the one of that name; 201. 404 for a driver other than local, 400 for options that the
    driver has not."""
    body = request.json({"Name": str, "Driver": str, "DriverOpts": Named(str), "Labels": Named(str),
                         "ClusterVolumeSpec": Named(object)})
    name, driver = body.get("Name") or "", body.get("Driver") or ""
    labels, options = body.get("Labels") or {}, body.get("DriverOpts") or {}
    check_volume(name, name, driver, options)
    if body.get("ClusterVolumeSpec"):
        raise Unavailable(NO_SWARM)
    return Response(201, make_volume(engine, name, options, labels))


def remove_volume(engine: Engine, name: str) -> None:
    """Remove a volume; 409 with dockerd's words while a container has it."""
    users = [each.id for each in engine.inventory.containers().values()
             if any(mount.get("Name") == name for mount in each.mounts)]
    if users:
        raise Conflict(f"remove {name}: volume is in use - [{', '.join(users)}]")
    engine.nerdctl.run("volume", "rm", "--", name)
    engine.journal.emit("volume", "destroy", name, {"driver": "local"})


@route("DELETE", "/volumes/{name}")
def volume_delete(engine: Engine, request: Request, name: str) -> None:
    """Remove a volume; 204, with `force` also when there is none; 409 while it is in use."""
    if not request.flag("force") or name in engine.inventory.volumes():
        find_volume(engine, name)
        remove_volume(engine, name)


@route("POST", "/volumes/prune")
def volume_prune(engine: Engine, request: Request) -> Response:
    """Remove the volumes that no container has: the anonymous ones, with the filter `all` every one. As with dockerd,
    those with options stay: what is in them is mostly not of this machine."""
    filters = request.filters("all", "label", "label!")
    everything = flag_filter(filters, "all", request.version < (1, 42))
    used, common, deleted, reclaimed = volume_users(engine), prune_filter(filters), [], 0
    found = [volume for volume in list(engine.inventory.volumes().values())
             if volume["Name"] not in used and not volume["Options"] and common(volume["Labels"] or {})
             and (everything or ANONYMOUS in (volume["Labels"] or {}))]
    sizes = volume_sizes(engine) if found else {}
    for volume in found:
        with contextlib.suppress(ApiError):
            remove_volume(engine, volume["Name"])
            deleted.append(volume["Name"])
            reclaimed += sizes.get(volume["Name"], 0)
    engine.journal.emit("volume", "prune", "", {"reclaimed": str(reclaimed)})
    return Response(200, {"VolumesDeleted": deleted or None, "SpaceReclaimed": reclaimed})


def volume_sizes(engine: Engine) -> Dict[str, int]:
    """Volume name -> bytes in it, of those without options."""
    return {name: folder_size(volume["Mountpoint"]) for name, volume in engine.inventory.volumes().items()
            if not volume["Options"]}


def folder_size(path: str) -> int:
    """Bytes of the files in a folder and all below it; what cannot be seen, or goes meanwhile, counts nothing."""
    sizes = {}
    for folder, links, files in os.walk(path):
        for name in files + links:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(folder, name))
                sizes.update({} if stat.S_ISDIR(found.st_mode) else {found.st_ino: found.st_size})
    return sum(sizes.values())


@route("GET", "/system/df")
def system_df(engine: Engine, request: Request) -> Response:
    """What images, containers, volumes and build cache take; `type` restricts it. Sizes are read anew, no event tells
    of them."""
    objects, answer = ("container", "image", "volume", "build-cache"), {}
    kinds = [each for each in request.values("type") if each and request.version >= (1, 42)] or objects
    for each in kinds:
        refuse((each not in objects, f"unknown object type: {each}"))
    engine.inventory.images.look_again()
    groups = list(engine.inventory.images.get().values())
    if "image" in kinds:
        users, shared = image_users(engine), shared_sizes(groups)
        answer.update({"LayersSize": images_size(engine)} if groups else {})
        answer["Images"] = [docker_image_row(group, request.version, len(users.get(group.id, [])),
                                             shared.get(group.id, 0)) for group in groups]
    if "container" in kinds:
        containers = list_containers(engine, engine.inventory.containers().values(), {}, True, -1)
        sizes = {**dict.fromkeys((each.id for each in containers), (0, 0)), **container_sizes(engine, containers)}
        answer["Containers"] = container_rows(engine, containers, containers, sizes, request.version)
        for row in answer["Containers"]:
            row.pop("ImageManifestDescriptor", None)
    if "volume" in kinds:
        users, sizes = volume_users(engine), volume_sizes(engine)
        answer["Volumes"] = [{**volume, "UsageData": {"Size": sizes.get(name, 0), "RefCount": users.get(name, 0)}}
                             for name, volume in engine.inventory.volumes().items() if not volume["Options"]]
    if "build-cache" in kinds:
        answer["BuildCache"] = build_cache(engine)
        if request.version < (1, 42):
            answer["BuilderSize"] = sum(each["Size"] for each in answer["BuildCache"])
    if request.version >= (1, 52):
        # Who asks for `verbose` knows the new fields.
        answer = {**({} if request.flag("verbose") else answer), **usage_summaries(answer)}
    return Response(200, answer)


# A list of `/system/df` -> its summary since API 1.52: whether an item is in use, its size, whether that is its own.
USAGES: Dict[str, Tuple[str, Callable[..., Any], Callable[..., int], Callable[..., Any]]] = {
    "Images": ("ImageUsage", lambda row: row["Containers"] > 0, lambda row: row["Size"] - row["SharedSize"],
               lambda row: not row["Containers"]),
    "Containers": ("ContainerUsage", lambda row: row["State"] in ("running", "paused", "restarting"),
                   lambda row: row["SizeRw"], lambda row: True),
    "Volumes": ("VolumeUsage", lambda row: row["UsageData"]["RefCount"], lambda row: row["UsageData"]["Size"],
                lambda row: True),
    "BuildCache": ("BuildCacheUsage", lambda row: row["InUse"], lambda row: row["Size"], lambda row: not row["Shared"]),
}


def usage_summaries(answer: Dict[str, Any]) -> Dict[str, Any]:
    """The summaries of an answer's lists, as API 1.52 has them: what is 0 is left out."""
    found = {}
    for key, (name, is_active, size, is_own) in USAGES.items():
        if key in answer:
            rows = answer[key]
            idle = [row for row in rows if not is_active(row)]
            told = {"ActiveCount": len(rows) - len(idle), "TotalCount": len(rows), "Items": rows,
                    "TotalSize": answer.get("LayersSize", 0) if key == "Images" else sum(map(size, rows)),
                    "Reclaimable": sum(size(row) for row in idle if is_own(row))}
            found[name] = {key: value for key, value in told.items() if value}
    return found


###############################################################################
# Swarm and plugins
###############################################################################


@route("GET", "/plugins")
def plugin_list(engine: Engine, request: Request) -> Response:
    """No plugins."""
    request.filters("capability", "enabled")
    return Response(200, [])


# What is refused on a machine without swarm, plugins or experimental features, in dockerd's words where it has them,
# and the methods and paths of the requests for it.
REFUSALS: Tuple[Tuple[Type[ApiError], str, Tuple[str, ...]], ...] = (
    (Unavailable, NO_SWARM, (
        "GET /swarm", "POST /swarm/update", "GET /swarm/unlockkey", "POST /swarm/unlock", "GET /nodes",
        "GET /nodes/{id}", "DELETE /nodes/{id}", "POST /nodes/{id}/update", "GET /services", "POST /services/create",
        "GET /services/{id}", "DELETE /services/{id}", "POST /services/{id}/update", "GET /services/{id}/logs",
        "GET /tasks", "GET /tasks/{id}", "GET /tasks/{id}/logs", "GET /secrets", "POST /secrets/create",
        "GET /secrets/{id}", "DELETE /secrets/{id}", "POST /secrets/{id}/update", "GET /configs",
        "POST /configs/create", "GET /configs/{id}", "DELETE /configs/{id}", "POST /configs/{id}/update")),
    (Unavailable, "This node is not part of a swarm", ("POST /swarm/leave",)),
    (NotImplementedHere, "swarm mode is not available: nerdctl has none", ("POST /swarm/init", "POST /swarm/join")),
    (Unavailable, "volume update only valid for cluster volumes, but swarm is unavailable", ("PUT /volumes/{name}",)),
    (NotImplementedHere, "This experimental feature is disabled by default. Start the Docker daemon in experimental "
     "mode in order to enable it.", (
         "GET /containers/{id}/checkpoints", "POST /containers/{id}/checkpoints",
         "DELETE /containers/{id}/checkpoints/{any}")),
    (NotFound, 'plugin "{0}" not found', ("GET /plugins/{image}/json", "DELETE /plugins/{image}")),
    (NotImplementedHere, "Docker plugins are not available: nerdctl has none", (
        "GET /plugins/privileges", "POST /plugins/pull", "POST /plugins/create", "POST /plugins/{image}/enable",
        "POST /plugins/{image}/disable", "POST /plugins/{image}/upgrade", "POST /plugins/{image}/push",
        "POST /plugins/{image}/set")),
)


def refusing(kind: Type[ApiError], words: str) -> Callable[..., Response]:
    """A handler that refuses whatever is asked of it; the name in its path takes the place of `{0}`."""
    def refuse(engine: Engine, request: Request, name: str = "") -> Response:
        raise kind(words.format(name))

    return refuse


for _kind, _words, _routes in REFUSALS:
    for _route in _routes:
        route(*_route.split(" "))(refusing(_kind, _words))
        # Before those with fewer words, which take any name.
        ROUTES.insert(0, ROUTES.pop())


###############################################################################
# Relay
###############################################################################

# `docker build` of today speaks gRPC with the builder itself. On /grpc the client is the HTTP/2 client of buildkitd's
# services, and the daemon stands between the two. On /session the roles are turned: the client is the HTTP/2 server,
# and what it sends is carried inside one call of buildkitd's Control/Session, whose HTTP/2 client is the daemon.


class Bridge:
    """What stands between a client and buildkitd, if there is one: `client_out` and `server_out` wait to be sent,
    `over` says that nothing more comes. Its kinds, which do no I/O, have `from_client` and `from_server` for what was
    received, `client_ended` and `server_ended` for the end of a connection, and `replenish`, which opens windows when
    something was sent."""

    # As much may wait for one side before the other is no longer read; in bytes.
    LIMIT = 1 << 20
    # How long the client is answered after buildkitd's end, and buildkitd sent the rest after the client's; in seconds.
    LINGER = 10.0

    def __init__(self, client_out: SendBuffer, server_out: SendBuffer):
        self.client_out = client_out
        self.server_out = server_out
        self.over = False

    def room(self) -> Tuple[bool, bool]:
        """Whether more may be read from the client, and from buildkitd."""
        return len(self.server_out) < self.LIMIT, len(self.client_out) < self.LIMIT

    def carry(self, client: socket.socket, server: Optional[socket.socket], early: bytes = b"") -> None:
        """Carry bytes, first those that were read `early`, until one side has ended; then close buildkitd's."""
        for sock in filter(None, (client, server)):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            sock.setblocking(False)
        try:
            self.from_client(early)
            self._loop(client, server)
        except (ValueError, TypeError, GrpcError) as error:
            log(f"build: {error}")
            with contextlib.suppress(OSError):
                self.client_out.send(client)
        finally:
            if server:
                server.close()

    def _loop(self, client: socket.socket, server: Optional[socket.socket]) -> None:
        deadline = None if server else time.monotonic() + self.LINGER
        while True:
            try:
                self.client_out.send(client)
            except OSError:
                return
            if self.over and not self.client_out or deadline and time.monotonic() > deadline:
                return
            try:
                if server:
                    self.server_out.send(server)
            except OSError:
                # What it has said before its end is still to be read.
                self.server_out.clear()
            self.replenish()
            readable = self._wait(client, server, 1000 if deadline else None)
            if server in readable and not self._receive(server, self.from_server):
                server.close()
                server, deadline = None, time.monotonic() + self.LINGER
                self.server_out.clear()
                self.server_ended()
            if client in readable and not self._receive(client, self.from_client):
                self.client_ended()
                with contextlib.suppress(OSError):
                    if server:
                        server.settimeout(self.LINGER)
                        self.server_out.send(server)
                return

    def _wait(self, client: socket.socket, server: Optional[socket.socket],
              timeout: Optional[int]) -> List[socket.socket]:
        """Wait until something can be done; the sockets from which something, or their end, can be read."""
        poller, sides = select.poll(), {}
        for sock, room, out in zip((client, server), self.room(), (self.client_out, self.server_out)):
            if sock:
                poller.register(sock, (select.POLLIN if room else 0) | (select.POLLOUT if out else 0))
                sides[sock.fileno()] = sock
        return [sides[descriptor] for descriptor, event in poller.poll(timeout) if event & ~select.POLLOUT]

    @staticmethod
    def _receive(sock: socket.socket, feed: Callable[[bytes], None]) -> bool:
        """Take what has come; False at the end."""
        try:
            data = sock.recv(BLOCK)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        if data:
            feed(data)
        return len(data) > 0


class GrpcProxy(Bridge):
    """/grpc: two HTTP/2 connections, each stream of the one with the same number on the other.

    `prepare(message)` takes a SolveRequest and returns the one to send and, unless it is None, a function to be called
    with buildkitd's answer; its ApiError ends the stream. The whole connection waits for it."""

    SERVICE = "/moby.buildkit.v1.Control/"
    MAX_REQUEST = 1 << 25

    def __init__(self, prepare: Callable[[bytes], Tuple[bytes, Optional[Callable[[bytes], None]]]]):
        self.prepare = prepare
        self.client, self.server = Http2Connection(client=False), Http2Connection(client=True)
        super().__init__(self.client.out, self.server.out)
        # Of Solve and Status: the path and what has come of the request.
        self.requests: Dict[int, Tuple[str, bytearray]] = {}
        self.answers: Dict[int, Tuple[bytearray, Callable[[bytes], None]]] = {}
        # The build that a stream belongs to, and those that were refused: their progress would be waited for in vain.
        self.builds: Dict[int, bytes] = {}
        self.refused: Set[bytes] = set()
        self.failure: Optional[ApiError] = None

    def from_client(self, data: bytes) -> None:
        """Bytes of the client."""
        for kind, number, value, ended in self.client.feed(data):
            if self.failure:
                send_grpc_status(self.client, number, self.failure)
            elif kind == RST_STREAM:
                self._forget(number)
                self.server.reset(number, value)
            elif number in self.requests:
                self._collect(number, value if kind == DATA else b"", ended)
            elif kind == DATA:
                self.server.send_data(number, bytes(value), ended)
            elif kind == HEADERS:
                path = dict(value).get(":path", "")
                if path in (self.SERVICE + "Solve", self.SERVICE + "Status") and not ended:
                    self.requests[number] = path, bytearray()
                self.server.send_headers(number, value, ended)

    def _collect(self, number: int, data: Any, ended: bool) -> None:
        """Take a part of a request, and send it on when it is whole."""
        path, request = self.requests[number]
        request += data
        if not ended and len(request) <= self.MAX_REQUEST:
            return
        del self.requests[number]
        message = bytes(request[5:])
        try:
            if not ended or request[:5] != grpc_message(message)[:5]:
                raise ValueError("not one uncompressed message")
            build = next((field.value for field in decode_fields(message) if field.number == 1), b"")
        except ValueError:
            self.server.send_data(number, bytes(request), ended)
            return
        self.builds[number] = build
        if build in self.refused:
            self._refuse(number, None)
        elif path.endswith("Status"):
            self.server.send_data(number, bytes(request), True)
        else:
            self._solve(number, build, message)

    def _solve(self, number: int, build: bytes, message: bytes) -> None:
        """Prepare a SolveRequest and send it, or refuse it and all else that is of its build."""
        try:
            message, answered = self.prepare(message)
        except Exception as error:
            if not isinstance(error, ApiError):
                log(traceback.format_exc())
                error = ApiError("internal error: see the log of nerdctld")
            self.refused.add(build)
            for other in [other for other, its in self.builds.items() if its == build]:
                self._refuse(other, error if other == number else None)
            return
        if answered:
            self.answers[number] = bytearray(), answered
        self.server.send_data(number, grpc_message(message), True)

    def _refuse(self, number: int, error: Optional[ApiError]) -> None:
        send_grpc_status(self.client, number, error)
        self.server.reset(number, CANCEL)
        self._forget(number)

    def _forget(self, number: int) -> None:
        for table in (self.requests, self.answers, self.builds):
            table.pop(number, None)

    def from_server(self, data: bytes) -> None:
        """Bytes of buildkitd."""
        for kind, number, value, ended in self.server.feed(data):
            answer, answered = self.answers.get(number, (bytearray(), None))
            if kind == DATA and answered:
                answer += value
            if ended and kind != RST_STREAM and answered:
                # Before the client learns that its image is there.
                answered(bytes(answer[5:]))
            if ended:
                self._forget(number)
            if kind == HEADERS:
                self.client.send_headers(number, value, ended)
            elif kind == DATA:
                self.client.send_data(number, bytes(value), ended)
            elif kind == GOAWAY:
                self.client.go_away(number, value)
            elif number in self.client.streams and not self.client.streams[number].ending:
                self.client.reset(number, value)

    def replenish(self) -> None:
        """Open the windows of each stream by what no longer waits on the other side."""
        for receiver, sender in ((self.client, self.server), (self.server, self.client)):
            for number in list(receiver.streams):
                receiver.replenish(number, sender.streams[number].queued if number in sender.streams else 0)

    def client_ended(self) -> None:
        """The client is gone: buildkitd notices by the end of its own connection."""

    def server_ended(self, error: Optional[ApiError] = None) -> None:
        """buildkitd is gone or was never there: end every stream with the reason, those to come too."""
        self.failure = error or Unavailable("buildkitd has ended: see its log, and build again when it is back")
        for number in list(self.client.streams):
            send_grpc_status(self.client, number, self.failure)
            self._forget(number)


class SessionBridge(Bridge):
    """/session: the client's bytes are messages of one call of Control/Session, and those of its answer are bytes."""

    # A message that fits into one frame, with 8 bytes in front. For one of more than 32 KB, grpc-go (1.84) clears a
    # buffer of 1 MB, whatever its size.
    PIECE = 16384 - 8

    def __init__(self, headers: Iterable[Tuple[str, str]]):
        self.connection = grpc_client(GrpcProxy.SERVICE + "Session", headers, window=1 << 22)
        self.decoder = GrpcDecoder()
        super().__init__(SendBuffer(), self.connection.out)

    def room(self) -> Tuple[bool, bool]:
        stream = self.connection.streams.get(1)
        # Of buildkitd there never comes more than its window.
        return len(self.server_out) + (stream.queued if stream else 0) < self.LIMIT, True

    def from_client(self, data: bytes) -> None:
        """Bytes of the client."""
        view = memoryview(data)
        for start in range(0, len(data), self.PIECE):
            self.connection.send_data(1, grpc_message(encode_field(1, view[start:start + self.PIECE])))

    def from_server(self, data: bytes) -> None:
        """Bytes of buildkitd."""
        for kind, _, value, ended in self.connection.feed(data):
            for message in self.decoder.feed(value) if kind == DATA else ():
                for field in decode_fields(memoryview(message)):
                    if field.number == 1:
                        self.client_out += field.value
            self.over = self.over or ended

    def replenish(self) -> None:
        """Let buildkitd send what the client has room for."""
        self.connection.replenish(1, len(self.client_out))

    def client_ended(self) -> None:
        """The client has said all."""
        self.connection.send_data(1, b"", end=True)

    def server_ended(self) -> None:
        """buildkitd is gone: so is the session."""
        self.over = True


###############################################################################
# BuildKit
###############################################################################

WORKER_LABEL = "org.mobyproject.buildkit.worker.containerd."


def full_names(text: str) -> List[str]:
    """The tags of a build, joined by commas, in full; 400 for what is no tag."""
    names = []
    for each in filter(None, (part.strip() for part in text.split(","))):
        try:
            reference = parse_reference(each)
        except BadParameter as error:
            raise BadParameter(f"invalid tag {each!r}: {error}") from None
        refuse((reference.digest, f"invalid tag {each!r}: a tag of a build has no digest"))
        names.append(reference.name)
    return names


def rewrite_exporter(exporter: bytes) -> Tuple[bytes, Optional[List[str]]]:
    """An exporter as buildkitd knows it: `moby` becomes `image` with the attributes that dockerd gives it, others stay.
    With it the names it puts into the image store, None when it puts nothing there. 400 for a bad name."""
    parts = list(decode_fields(exporter))
    kind = "".join(str(each.value, "utf-8") for each in parts if each.number == 1)
    attributes = dict(decode_map_entry(each.value) for each in parts if each.number == 2)
    if kind == "image":
        names = [each for each in attributes.get("name", "").split(",") if each]
        return exporter, None if attributes.get("store", "").lower() in ("0", "f", "false") else names
    if kind != "moby":
        return exporter, None
    names = full_names(attributes.get("name", ""))
    wanted = {"unpack": "true", "dangling-name-prefix": "moby-dangling"}
    changed = {**({"name": ",".join(names)} if names else {}),
               **{key: value for key, value in wanted.items() if key not in attributes},
               # Spelled so in BuildKit.
               "danging-name-empty-only": "true"}
    kept = [each.raw for each in parts
            if each.number != 1 and not (each.number == 2 and decode_map_entry(each.value)[0] in changed)]
    return b"".join([encode_field(1, b"image"), *kept, encode_field(2, changed)]), names


def rewrite_solve(message: bytes) -> Tuple[bytes, Optional[List[str]]]:
    """A SolveRequest as buildkitd understands it, with its other fields untouched, and the names it puts into the image
    store, None when it puts nothing there. 400 for a bad name, ValueError for what is no SolveRequest."""
    parts = list(decode_fields(message))
    exporters = [each.value for each in parts if each.number == 13]
    if not exporters:
        # The one exporter of older clients.
        old = [encode_field(1 if each.number == 3 else 2, each.value) for each in parts if each.number in (3, 4)]
        exporters = [b"".join(old)] if old else []
    rewritten = [rewrite_exporter(each) for each in exporters]
    stored = [names for _, names in rewritten if names is not None]
    told = [name for names in stored for name in names] if stored else None
    if [each for each, _ in rewritten] == exporters:
        return message, told
    kept = [each.raw for each in parts if each.number not in (3, 4, 13)]
    return b"".join([*kept, *(encode_field(13, each) for each, _ in rewritten)]), told


def dial(address: str) -> socket.socket:
    """A connection to a buildkitd; 503 with the reason."""
    kind, _, place = address.partition("://")
    try:
        if kind == "unix":
            return unix_connection(place, 5.0)
        if kind == "tcp":
            host, _, port = place.rstrip("/").rpartition(":")
            sock = socket.create_connection((host.strip("[]"), int(port)), 5.0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
    except (OSError, ValueError, OverflowError) as error:
        raise Unavailable(f"{address}: {getattr(error, 'strerror', None) or error}") from None
    raise Unavailable(f"{address}: only unix://PATH and tcp://HOST:PORT can be reached")


def dial_buildkit(nerdctl: Nerdctl) -> Tuple[socket.socket, str]:
    """A connection to the buildkitd that nerdctl would use, and its address; 503 when there is none."""
    reasons = []
    for address in dict.fromkeys(nerdctl.buildkit_addresses()):
        try:
            return dial(address), address
        except Unavailable as error:
            reasons.append(str(error))
    raise Unavailable(f"buildkitd does not answer ({'; '.join(reasons)}): {NO_BUILDKIT}")


def parse_workers(message: bytes) -> List[Dict[str, str]]:
    """The labels of each worker of a ListWorkersResponse, the worker that builds first."""
    return [dict(decode_map_entry(label.value) for label in decode_fields(record.value) if label.number == 2)
            for record in decode_fields(message) if record.number == 1]


def list_workers(address: str, timeout: float = 10.0) -> List[Dict[str, str]]:
    """The labels of a buildkitd's workers; 503 when it does not tell them in time."""
    try:
        with dial(address) as sock:
            return parse_workers(grpc_call(sock, GrpcProxy.SERVICE + "ListWorkers", b"", timeout=timeout))
    except (OSError, ValueError, GrpcError) as error:
        raise Unavailable(f"buildkitd at {address} does not tell its workers ({error}): see its log") from None


def worker_complaint(workers: List[Dict[str, str]], namespace: str, containerd: str) -> str:
    """Why nerdctl, over the containerd of this UUID, would not see an image of the first worker, "" if it would."""
    labels = workers[0] if workers else {}
    found, uuid = labels.get(WORKER_LABEL + "namespace"), labels.get(WORKER_LABEL + "uuid")
    if found is None:
        what = "has no containerd worker, or not as its first"
    elif found != namespace:
        what = f"builds for the containerd namespace {found!r}"
    elif uuid and containerd and uuid != containerd:
        what = "builds for another containerd"
    else:
        return ""
    return (f"buildkitd {what}, so that nerdctl would never see the image: in buildkitd.toml, write `enabled = false` "
            f"under [worker.oci], and `enabled = true`, `namespace = \"{namespace}\"` and containerd's `address` under "
            "[worker.containerd], and restart buildkitd")


def solved_digest(answer: bytes) -> str:
    """The image's digest in a SolveResponse, "" when there is none."""
    with contextlib.suppress(ValueError, TypeError):
        results = dict(decode_map_entry(each.value) for each in decode_fields(answer) if each.number == 1)
        return results.get("containerimage.digest", "")
    return ""


def prepare_solve(engine: Engine, address: str, message: bytes) -> Tuple[bytes, Optional[Callable[[bytes], None]]]:
    """What a GrpcProxy asks of a SolveRequest. 400 for a bad tag; 409 when the image would get lost; 503 when buildkitd
    does not say where it would go."""
    try:
        message, names = rewrite_solve(message)
    except (ValueError, TypeError):
        return message, None
    if names is None:
        return message, None
    containerd = engine.containerd.uuid()
    complaint = worker_complaint(list_workers(address), engine.nerdctl.namespace, containerd)
    if complaint:
        raise Conflict(complaint)
    before, kept = engine.inventory.images.records(), engine.keep_images(names)

    def answered(answer: bytes) -> None:
        digest = solved_digest(answer)
        engine.drop_images(kept)
        # A name that is new is told by containerd.
        for name in [each for each in names if each in before] if digest else ():
            if before[name].target.digest != digest:
                engine.journal.emit("image", "untag", before[name].target.digest, {"name": familiar(name)})
            engine.journal.emit("image", "tag", digest, {"name": familiar(name)})

    return message, answered


def session_solve(engine: Engine, request: Request, reference: str) -> bytes:
    """The SolveRequest of a build whose context a client's session has. 400 for bad values, 501 for what BuildKit
    cannot."""
    attributes, caches, allowed = frontend_options(build_args(engine, request)[0])
    attributes = {"filename": request.value("dockerfile") or "Dockerfile", "image-resolve-mode": "local", **attributes}
    tags = build_tags(request)
    exporters = json_parameter(request, "outputs", [{"Type": str, "Attrs": Named(str)}]) or [
        {"Type": "moby", "Attrs": {"name": ",".join(tags)} if tags else {}}]
    return encode_message({
        1: reference, 5: request.value("session"), 6: "dockerfile.v0", 7: attributes,
        8: {4: [{1: "registry", 2: {"ref": each}} for each in caches]}, 9: allowed,
        13: [{1: each.get("Type") or "moby", 2: each.get("Attrs") or {}} for each in exporters]})


def build_in_session(engine: Engine, request: Request) -> Response:
    """Build an image of a context in a client's session, as the docker command before buildx does it."""
    reference = request.value("buildid") or os.urandom(16).hex()
    message = session_solve(engine, request, reference)
    server, address = dial_buildkit(engine.nerdctl)
    server.close()
    message, answered = prepare_solve(engine, address, message)
    quiet = request.flag("q")

    def solve(sock: socket.socket, result: "queue.SimpleQueue[Any]") -> None:
        try:
            result.put(grpc_call(sock, GrpcProxy.SERVICE + "Solve", message, timeout=None))
        except (OSError, ValueError, GrpcError) as error:
            result.put(error)

    def chunks() -> Iterator[bytes]:
        result: "queue.SimpleQueue[Any]" = queue.SimpleQueue()
        with dial(address) as solving, dial(address) as telling:
            def hang_up() -> None:
                for sock in (solving, telling):
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

            with request.client.when_gone(hang_up):
                threading.Thread(target=solve, args=(solving, result), name="solve", daemon=True).start()
                # Where it breaks off, so does the build, which has the reason.
                with contextlib.suppress(OSError, ValueError, GrpcError):
                    for each in grpc_stream(telling, GrpcProxy.SERVICE + "Status", encode_field(1, reference)):
                        if not quiet:
                            yield trace_line(each)
                answer = result.get()
        if not isinstance(answer, bytes):
            raise ApiError(str(answer))
        if answered:
            answered(answer)
        digest = solved_digest(answer)
        if digest:
            yield message_line({"stream": digest + "\n"} if quiet else {"id": "moby.image.id", "aux": {"ID": digest}})

    return Response(200, Stream(as_error_detail(chunks()), primed=True), "application/json")


@contextlib.contextmanager
def when_gone_or_cancelled(engine: Engine, name: str, when_gone: Callable[..., Any], callback: Callable[[], Any],
                           half: bool = True) -> Iterator[None]:
    """What `when_gone` is to the client of a build, whose id is `name`: `/build/cancel` ends it as if it had left."""
    with when_gone(callback, half):
        engine.builds.append((name, callback))
        try:
            yield
        finally:
            engine.builds.remove((name, callback))


@route("POST", "/build/cancel")
def build_cancel(engine: Engine, request: Request) -> Response:
    """End the build that was begun with this `id` as its `buildid`, if it runs."""
    if not request.value("id"):
        raise BadParameter("build ID not provided")
    for name, end in list(engine.builds):
        if name == request.value("id"):
            end()
    return Response(200)


@route("POST", "/build")
def image_build(engine: Engine, request: Request) -> Response:
    """Build an image from a tar, a URL or a client's session: progress as a stream, the id in `aux`, a failure as its
    last message."""
    if request.value("buildid"):
        request.client.when_gone = functools.partial(when_gone_or_cancelled, engine, request.value("buildid"),
                                                     request.client.when_gone)
    if request.value("remote") == "client-session":
        return build_in_session(engine, request)
    return build_from_context(engine, request)


def check_upgrade(request: Request, refusal: Type[ApiError]) -> None:
    """Refuse what does not ask for HTTP/2 on its connection, in dockerd's words. As there, only Upgrade counts."""
    protocol = request.headers.get("Upgrade") or ""
    refuse((not protocol, "no upgrade proto in request"),
           (protocol != "h2c", f"protocol {protocol} not supported"), kind=refusal)


def grpc_hijack(engine: Engine) -> Hijack:
    """Carries a client's gRPC to buildkitd; where there is none, it answers with the reason."""
    try:
        server, address = dial_buildkit(engine.nerdctl)
        failure = None
    except ApiError as error:
        server, address, failure = None, "", error

    def serve(connection: Connection) -> None:
        proxy = GrpcProxy(functools.partial(prepare_solve, engine, address))
        if failure:
            log(f"build: {failure}")
            proxy.server_ended(failure)
        proxy.carry(connection.sock, server, connection.early)

    return Hijack(serve, protocol="h2c")


@route("POST", "/grpc")
def buildkit_grpc(engine: Engine, request: Request) -> Response:
    """101, then buildkitd. 101 also without one: after anything else clients would set up a builder of their own. 500,
    as dockerd has it here, without an upgrade to h2c."""
    check_upgrade(request, ApiError)
    return Response(101, grpc_hijack(engine))


@route("POST", "/session")
def buildkit_session(engine: Engine, request: Request) -> Response:
    """101, then a session of buildkitd; without a buildkitd one that ends at once. 400 without an upgrade to h2c."""
    check_upgrade(request, BadParameter)
    headers = [(name, value) for name, value in request.headers.items()
               if name.lower().startswith("x-docker-expose-session-")]
    server = None
    with contextlib.suppress(ApiError):
        server, _ = dial_buildkit(engine.nerdctl)

    def serve(connection: Connection) -> None:
        if server:
            SessionBridge(headers).carry(connection.sock, server, connection.early)

    return Response(101, Hijack(serve, protocol="h2c"))


###############################################################################
# HTTP server
###############################################################################


class Body:
    """The body of a request, read as it comes: Content-Length or chunked. The 100 that a client waits for is sent with
    the first read. ClientGone when it breaks off."""

    def __init__(self, handler: "RequestHandler", length: Optional[int], chunked: bool, expects: bool):
        self.handler = handler
        self.left = length or 0
        self.chunked = chunked
        self.expects = expects
        self.ended = not chunked and not length

    def read(self, size: int = BLOCK) -> bytes:
        """Up to `size` bytes as soon as there are any, b"" at the end."""
        if self.ended:
            return b""
        try:
            self.invite()
            if self.chunked and not self.left:
                text = self._line().partition(b";")[0].strip()
                refuse((not re.fullmatch(rb"[0-9a-fA-F]{1,15}", text), "malformed chunked encoding"))
                self.left = int(text, 16)
                if not self.left:
                    # Behind the last chunk come trailers, up to an empty line.
                    refuse((all(self._line() for _ in range(100)), "malformed chunked encoding"))
                    self.ended = True
                    return b""
            data = self.handler.rfile.read1(min(size, self.left))
            if not data:
                raise ClientGone()
            self.left -= len(data)
            if not self.left:
                self.ended = not self.chunked
                refuse((self.chunked and self._line(), "malformed chunked encoding"))
        except (OSError, BadParameter, ClientGone) as error:
            self.ended = self.handler.close_connection = True
            if isinstance(error, OSError):
                raise ClientGone() from None
            raise
        return data

    def blocks(self) -> Iterator[bytes]:
        """The rest of the body as it comes."""
        return iter(self.read, b"")

    def invite(self) -> None:
        """Send the 100 that the client waits for, if it does."""
        if self.expects and not self.ended:
            self.expects = False
            self.handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def drain(self, limit: int, seconds: float) -> bool:
        """Read and drop what is left, within bounds; whether the end was reached."""
        if self.expects and not self.ended:
            return False
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ClientGone, ApiError, OSError):
            self.handler.connection.settimeout(seconds)
            for block in self.blocks():
                limit -= len(block)
                if limit < 0 or time.monotonic() > deadline:
                    break
        with contextlib.suppress(OSError):
            self.handler.connection.settimeout(None)
        return self.ended

    def _line(self) -> bytes:
        line = self.handler.rfile.readline(4097)
        if not line.endswith(b"\n"):
            refuse((len(line) > 4096, "malformed chunked encoding"))
            raise ClientGone()
        return line.rstrip(b"\r\n")


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
            events = select.EPOLLONESHOT | (select.EPOLLRDHUP if half else 0)
            # Modified for a second one too: the one shot may have been for the first.
            (self.poller.register if len(callbacks) == 1 else self.poller.modify)(descriptor, events)
        try:
            yield
        finally:
            with self.lock:
                callbacks.remove(callback)
                if not callbacks:
                    del self.watched[descriptor]
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


# http.client takes no line over 64 kB and no more than 100: it is the whole head that dockerd bounds.
vars(http.client).update(_MAXLINE=1 << 20, _MAXHEADERS=1 << 20)


class HeadReader:
    """Reads the lines of a request's head, up to as many bytes as dockerd takes."""

    def __init__(self, file: Any):
        self.file, self.left = file, 1 << 20

    def readline(self, _size: int = -1) -> bytes:
        """One line; http.server answers 431 to what is raised beyond the limit."""
        line = self.file.readline(self.left + 1)
        self.left -= len(line)
        if self.left < 0:
            raise http.client.LineTooLong("header")
        return line


BROKEN_HEAD = (email.errors.MissingHeaderBodySeparatorDefect, email.errors.FirstHeaderLineIsContinuationDefect)


class RequestHandler(http.server.BaseHTTPRequestHandler):
    """One connection. Every method of every request goes through serve()."""

    protocol_version = "HTTP/1.1"
    rbufsize = 65536
    # dockerd gives a client five minutes for the head of a request.
    timeout = 300

    def version_string(self) -> str:
        return f"nerdctld/{VERSION} (linux)"

    def log_message(self, *_) -> None:
        pass

    def handle_expect_100(self) -> bool:
        self.expects = True
        return True

    def handle_one_request(self) -> None:
        """Wait for a request, and serve it."""
        file, self.requestline, self.command, self.request_version = self.rfile, "", "", ""
        try:
            self.rfile = HeadReader(file)
            self.server.wait(self.connection)
            self.raw_requestline = self.rfile.readline()
            self.close_connection = True
            if self.raw_requestline:
                with self.server.working(self.connection):
                    self.serve_head(file)
        except http.client.LineTooLong:
            self.send_error(431)
        except (ConnectionError, ClientGone, socket.timeout):
            self.close_connection = True
        finally:
            self.rfile = file

    def serve_head(self, file: Any) -> None:
        """Serve what begins with a line that was read."""
        if self.raw_requestline == b"PRI * HTTP/2.0\r\n":
            self.rfile = file
            self.serve_grpc()
        elif self.parse_request():
            self.rfile = file
            if self.request_version == "HTTP/0.9":
                self.send_error(400, "malformed HTTP request")
            else:
                self.serve()

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """An error that http.server found in the head of a request."""
        self.close_connection = True
        self.requestline = getattr(self, "requestline", "")
        self.request_version = "HTTP/1.1"
        status = 400 if code in (501, 505) else code
        self.send_whole(Response(status, {"message": message or "malformed request"}))

    def serve_grpc(self) -> None:
        """HTTP/2 with prior knowledge, as of buildctl and of buildx's remote driver: BuildKit's gRPC."""
        self.close_connection = True
        self.connection.setblocking(False)
        early = self.raw_requestline + self.rfile.peek()
        self.connection.setblocking(True)
        with contextlib.suppress(ClientGone, OSError):
            grpc_hijack(self.server.engine).serve(Connection(self.connection, early))

    def serve(self) -> None:
        """Read one request, dispatch it, send the response."""
        began = time.monotonic()
        self.connection.settimeout(None)
        server = self.server
        body = None
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
            took = (time.monotonic() - began) * 1000
            log(f"{self.command} {self.path.partition('?')[0]} -> {status} in {took:.1f} ms")
        if not self.close_connection:
            self.connection.settimeout(self.timeout)

    def make_body(self) -> Body:
        """The body as the headers announce it; 400 for framing that could be read in two ways."""
        # Around a value stand blanks and tabs only; what else Python takes for a space is a part of it.
        lengths = [each.strip(" \t") for each in self.headers.get_all("Content-Length") or []]
        codings = [each.strip(" \t").lower() for each in self.headers.get_all("Transfer-Encoding") or []]
        expects, self.expects = getattr(self, "expects", False), False
        if any(isinstance(each, BROKEN_HEAD) for each in self.headers.defects):
            # What comes after such a line Python takes for no header: also what tells the length of the body.
            self.close_connection = True
            raise BadParameter("malformed HTTP request")
        if codings:
            if codings != ["chunked"] or lengths:
                self.close_connection = True
                raise BadParameter("unsupported transfer encoding")
            return Body(self, None, True, expects)
        if len(set(lengths)) > 1 or (lengths and not re.fullmatch(r"[0-9]{1,18}", lengths[0])):
            self.close_connection = True
            raise BadParameter("bad Content-Length")
        return Body(self, int(lengths[0]) if lengths else None, False, expects)

    def make_request(self, body: Body) -> Request:
        """The request as handlers see it; 400 for a path or query that is not text."""
        target = self.path
        if not target.startswith("/"):
            # Absolute form, as proxies send it.
            target = re.sub(r"^[a-z]+://[^/]*", "", target, flags=re.I) or "/"
        raw_path, _, raw_query = target.partition("?")
        found = re.search("%(?![0-9A-Fa-f]{2}).{0,2}", target)
        if found:
            raise BadParameter(f'invalid URL escape "{found.group()}"')
        if ";" in raw_query:
            raise BadParameter("invalid semicolon separator in query")
        try:
            path = urllib.parse.unquote(raw_path, errors="strict")
            query = urllib.parse.parse_qs(raw_query, keep_blank_values=True, errors="surrogateescape",
                                          max_num_fields=1000)
            # Only the name of a file may be no text.
            "".join(itertools.chain(query, *(query[each] for each in query if each != "path"))).encode()
        except (UnicodeDecodeError, ValueError):
            raise BadParameter("malformed URL") from None
        if re.search(r"[\x00-\x1f\x7f]", path):
            raise BadParameter("malformed URL: it has control characters")
        version, path = split_version(path)
        client = Client()
        client.when_gone = functools.partial(self.server.hangups.watch, self.connection)
        return Request(self.command, re.sub("//+", "/", path), version, query, self.headers, body, client)

    def respond(self, response: Response, body: Optional[Body]) -> int:
        """Send a response of any kind; returns its status, which for a primed stream is known only here."""
        unread = body is not None and not body.ended
        if isinstance(response.body, Stream):
            return self.send_stream(response, body)
        if isinstance(response.body, Hijack):
            if unread and not body.chunked:
                # dockerode sends its options once more as a body: they are not input for the container.
                body.drain(JSON_LIMIT, 2.0)
            return self.send_hijack(response)
        # What the handler left unread must not be taken for the next request.
        if unread and not body.drain(1 << 18, 0.2):
            self.close_connection = True
        self.send_whole(response)
        if unread and not body.ended:
            # The answer came before the end of the body: to close now would reset what the client has not read of it.
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
            body.expects = False
            body.drain(1 << 26, 2.0)
        return response.status

    def head(self, status: str, headers: Dict[str, str]) -> bytes:
        """Status line and headers, with those that every answer has."""
        found = {"Api-Version": "%d.%d" % API_NEWEST, "Docker-Experimental": "false", "Ostype": "linux",
                 "Server": self.version_string(), **headers}
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in found.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def response_head(self, response: Response, framing: Dict[str, str]) -> bytes:
        """The head of a response, with the headers that say where its body ends."""
        headers = {"Date": self.date_time_string(),
                   **({"Content-Type": response.media_type} if response.media_type else {}), **response.headers,
                   **({"Connection": "close"} if self.close_connection else {}), **framing}
        return self.head(f"{response.status} {http.client.responses.get(response.status, 'Unknown')}", headers)

    def send_whole(self, response: Response) -> None:
        """A response whose body is at hand."""
        body = b"" if response.status in (204, 304) else response.body or b""
        length = {} if response.status in (204, 304) else {"Content-Length": str(len(body))}
        head = self.response_head(response, length)
        with contextlib.suppress(OSError):
            self.wfile.write(head if self.command == "HEAD" else head + body)
            return
        self.close_connection = True

    def send_stream(self, response: Response, body: Optional[Body]) -> int:
        """A body made while it is sent, chunked (HTTP/1.0: until the end of the connection)."""
        stream = response.body
        first = []
        try:
            if stream.primed:
                first = [next(stream.chunks, b"")]
            # As much as the kernel gives: a fifth more bytes go through.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            chunked = self.request_version != "HTTP/1.0"
            self.close_connection |= not chunked
            if body is not None:
                # What makes the stream may read the body later, and inside of the answer there is no place for a 100.
                body.invite()
            self.wfile.write(self.response_head(response, {"Transfer-Encoding": "chunked"} if chunked else {}))
            connection = Connection(self.connection)
            for chunk in filter(None, itertools.chain(first, stream.chunks)):
                connection.send(*((b"%x\r\n" % len(chunk), chunk, b"\r\n") if chunked else (chunk,)))
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
        except ApiError as error:
            if stream.primed and not first:
                stream.close()
                return self.respond(error_response(error), body)
            # Too late for a status: the missing end of the chunks tells the client.
            log(f"{self.command} {self.path.partition('?')[0]}: broken off: {error}")
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

    def send_hijack(self, response: Response) -> int:
        """Hand the connection over, as dockerd does it: 101 where there is a header Upgrade, else 200 until the end."""
        self.close_connection = True
        self.connection.setblocking(False)
        early = self.rfile.peek()
        self.connection.setblocking(True)
        upgraded = "Upgrade" in self.headers
        headers = {"Connection": "Upgrade", "Upgrade": response.body.protocol} if upgraded else {}
        if response.media_type:
            headers["Content-Type"] = response.media_type if upgraded else RAW_STREAM
        try:
            self.wfile.write(self.head("101 UPGRADED" if upgraded else "200 OK", {**headers, **response.headers}))
        except OSError:
            response.body.abandon()
            return 499
        try:
            response.body.serve(Connection(self.connection, early))
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
    # handle_request() is called when there is one.
    timeout = 0

    def __init__(self, engine: "Engine", listener: socket.socket):
        super().__init__("", RequestHandler, bind_and_activate=False)
        # The constructor makes a socket even so.
        self.socket.close()
        self.socket = listener
        # Somebody else who has the socket of systemd may be faster; what is accepted does block.
        listener.setblocking(False)
        self.engine = engine
        self.hangups = Hangups()
        self.lock = threading.Lock()
        self.active = 0
        self.last_used = time.monotonic()
        # Connections on which a request may come.
        self.waiting: Set[socket.socket] = set()

    def wait(self, connection: socket.socket, begins: bool = True) -> None:
        """A connection waits for a request, or does so no more."""
        with self.lock:
            (self.waiting.add if begins else self.waiting.discard)(connection)

    def drain(self, seconds: float) -> None:
        """Let requests that run, or were sent by now, come to their end, and take no others."""
        deadline = time.monotonic() + seconds
        while (self.active or self.waiting) and time.monotonic() < deadline:
            with self.lock:
                for each in self.waiting:
                    with contextlib.suppress(OSError):
                        # What has come already can be read nevertheless.
                        each.shutdown(socket.SHUT_RD)
            time.sleep(0.02)

    @contextlib.contextmanager
    def working(self, connection: socket.socket) -> Iterator[None]:
        """Counts a request while it runs, for the end and for --idle-timeout."""
        with self.lock:
            self.active += 1
            self.waiting.discard(connection)
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
            found = super().get_request()
            # Its request is still to come, and may have before its thread has begun.
            self.last_used = time.monotonic()
            self.wait(found[0])
            return found
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

    def shutdown_request(self, request) -> None:
        self.wait(request, False)
        super().shutdown_request(request)

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
    try:
        os.set_inheritable(3, False)
        listener = socket.socket(fileno=3)
    except OSError as error:
        raise StartError(f"file descriptor 3 is not a socket: {error.strerror}") from None
    refuse((listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM, "not a unix stream socket"),
           (not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN), "not listening"),
           start="file descriptor 3 is ", kind=StartError)
    listener.setblocking(True)
    return listener


def own_socket(path: str, group: str = "") -> socket.socket:
    """A listening socket at `path`, 0660 from its first moment, and of a group. StartError when somebody answers there
    already, there is no such group or the place cannot be used; a stale socket is replaced."""
    start, elsewhere = f"cannot listen on {path}: ", "choose another place with -H unix://PATH"
    allowed = f"root, or as a member of {group}" if group else "root"

    def refused(error: OSError) -> StartError:
        return StartError(f"{start}{error.strerror or error}: "
                          f"{f'run nerdctld as {allowed}, or ' * isinstance(error, PermissionError)}{elsewhere}")
    folder = os.path.dirname(path) or "."
    refuse((not os.path.isdir(folder), f"{folder} is not a folder: make it, or {elsewhere}"),
           (os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode),
            f"it is in the way and not a socket: remove it, or {elsewhere}"), start=start, kind=StartError)
    try:
        unix_connection(path, 5.0).close()
        raise StartError(f"{start}another daemon is listening there: end it, or {elsewhere}")
    except (ConnectionRefusedError, FileNotFoundError):
        pass
    except OSError as error:
        raise refused(error) from None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Made under another name and moved into place: nobody can connect before the mode is right, and of two daemons that
    # start at once one is left.
    temporary = f"{path}.{os.getpid()}"
    before = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        listener.bind(temporary)
        if group:
            shutil.chown(temporary, group=group)
        os.chmod(temporary, 0o660)
        listener.listen(1024)
        os.rename(temporary, path)
    except (OSError, LookupError) as error:
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, LookupError):
            raise StartError(f"there is no group {group}: make it (groupadd --system {group})") from None
        raise refused(error) from None
    finally:
        os.umask(before)
    return listener


def default_socket_path() -> str:
    """/var/run/nerdctl.sock for root, $XDG_RUNTIME_DIR/nerdctl.sock for anybody else."""
    return os.path.join(runtime_folder() if os.geteuid() else "/var/run", "nerdctl.sock")


def socket_path(address: str) -> str:
    """The path in `unix:///run/x.sock` (or a bare path); StartError for another kind of address."""
    path = re.sub("^unix://", "", address)
    refuse((not path.startswith("/"),
            f"cannot listen on {path!r}: only unix:///PATH is served (use ssh for another host)"), kind=StartError)
    return path


def notify_systemd(message: str, address: str) -> None:
    """Tell systemd, where it asked for it, that the daemon is READY or STOPPING."""
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(message.encode())


def dial_stdio(path: str) -> int:
    """Join stdin and stdout to the socket, with half-closes: the far end of `docker -H ssh://`. The exit status."""
    try:
        sock = unix_connection(path)
    except OSError as error:
        advice = ("be root or in the group that it belongs to" if isinstance(error, PermissionError)
                  else f"start nerdctld (systemctl {'--user ' * bool(os.geteuid())}start nerdctl.socket), or name its "
                  "socket with -H unix://PATH")
        log(f"cannot connect to {path}: {error.strerror}: {advice}")
        return 1

    def inwards() -> None:
        with contextlib.suppress(OSError):
            for data in iter(lambda: os.read(0, 65536), b""):
                sock.sendall(data)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    threading.Thread(target=inwards, daemon=True).start()
    with contextlib.suppress(OSError):
        for data in iter(lambda: sock.recv(65536), b""):
            write_all(1, data)
    return 0


###############################################################################
# ctr
###############################################################################

# Where nerdctl is not installed, containerd's API and its own ctr carry the images. ctr promises no stable output: only
# the names of what it loaded and the progress of layers are read of it, which are alike from 1.6 to 2.3.
NO_NERDCTL = "nerdctl is not installed"
CTR_ONLY = f"{NO_NERDCTL}: over containerd's ctr there are images, listings and builds only"
K3S_SOCKET = "/run/k3s/containerd/containerd.sock"


def buildctl_args(options: List[str], names: List[str], folder: str) -> List[str]:
    """argv of a build by buildctl with nerdctl's options, which writes the archive of the image to stdout."""
    path = next((each for each in options if each.startswith("--file=")), "").partition("=")[2]
    attributes, caches, allowed = frontend_options(options)
    return ["build", "--progress=rawjson", "--frontend=dockerfile.v0", f"--local=context={folder}",
            f"--local=dockerfile={os.path.dirname(path)}", f"--opt=filename={os.path.basename(path)}",
            *(f"--opt={key}={value}" for key, value in attributes.items()),
            *(f"--import-cache=type=registry,ref={each}" for each in caches), *(f"--allow={each}" for each in allowed),
            f'--output=type=docker,"name={",".join(names)}",dest=-']


def registry_login(host: str, environment: Optional[Dict[str, str]]) -> Tuple[str, str]:
    """User and password for a registry in DOCKER_CONFIG's config.json, ("", "") for none; 501 for an identity token."""
    folder = (environment or os.environ).get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    told = read_json_file(os.path.join(folder, "config.json"))
    for key, entry in (told.get("auths") or {}).items():
        if re.sub(r"^https?://(index\.(?=docker\.io))?", "", key).partition("/")[0] == host:
            if entry.get("identitytoken"):
                raise NotImplementedHere(f"{NO_NERDCTL}, and ctr cannot be given the identity token for {host}")
            user, _, password = base64.b64decode(entry.get("auth") or "").decode().partition(":")
            return user, password
    return "", ""


class Ctr(Nerdctl):
    """Does without nerdctl what containerd's API, its ctr and buildctl can do; whatever would start another command of
    nerdctl is 501. `command` is the argv in front: "ctr", or "k3s" and "ctr"."""

    def __init__(self, command: List[str], containerd: Containerd, snapshotter: str = "", buildkit_host: str = "",
                 debug: bool = False):
        super().__init__(command, containerd.namespace, containerd.address, snapshotter, buildkit_host, debug)
        self.containerd = containerd
        self.options = [f"--address={containerd.address}", f"--namespace={self.namespace}"]

    def start(self, *arguments: str, **_: Any) -> Process:
        """501, since this is no nerdctl."""
        raise NotImplementedHere(f"{NO_NERDCTL}, and containerd's ctr cannot do what `nerdctl {arguments[0]}` does: "
                                 "install nerdctl for running containers, networks and volumes")

    def _read(self, *words: str) -> str:
        """The stdout of a short ctr."""
        with super().start(*words) as process:
            return b"".join(iter(process.read, b"")).decode(errors="replace")

    def _images(self, verb: str, *words: str, **how: Any) -> Process:
        """A running `ctr images`, with --local where this ctr has that: the transfer service, which it uses otherwise,
        does not say what it loads, and its progress is mixed into what is saved."""
        local = ["--local"] if "--local" in self._read("images", verb, "--help") else []
        return super().start("images", verb, *local, *words, **how)

    @contextlib.contextmanager
    def _transfer(self, verb: str, name: str, options: List[str], environment: Optional[Dict[str, str]],
                  client: Client) -> Iterator[Process]:
        """A running pull or push. The password goes in by a terminal: ctr takes it from there or from its command line,
        where everybody could read it."""
        user, password = registry_login(name.partition("/")[0], environment)
        hosts = ["--hosts-dir=/etc/containerd/certs.d"] if os.path.isdir("/etc/containerd/certs.d") else []
        words = [*hosts, *options, *_value(user, "--user"), "--", name]
        with contextlib.ExitStack() as stack:
            stdin = subprocess.DEVNULL
            if user:
                master, stdin = pty.openpty()
                for each in (master, stdin):
                    stack.callback(os.close, each)
                tty.setraw(stdin)
                os.write(master, password.encode() + b"\n")
            yield stack.enter_context(self._images(verb, *words, stdin=stdin, client=client))

    def version(self) -> Dict[str, Any]:
        """Versions of ctr and containerd; in the place of nerdctl's that there is none."""
        own, (version, revision) = "".join(self._read("--version").split()[-1:]), self.containerd.version()
        server = {"Name": "containerd", "Version": version, "Details": {"GitCommit": revision}}
        return {"Client": {"Version": f"{NO_NERDCTL}: ctr {own}", "Components": [{"Name": "ctr", "Version": own}]},
                "Server": {"Components": [server]}}

    def info(self) -> Dict[str, Any]:
        """What is known of the machine, with a warning. Limits are told as there: clients would warn of each, and no
        container is run."""
        unified = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        limits = ("MemoryLimit", "SwapLimit", "CpuCfsPeriod", "CpuCfsQuota", "CPUShares", "CPUSet", "PidsLimit",
                  "IPv4Forwarding", "OomKillDisable")
        return {
            **dict.fromkeys(limits, True), "Driver": self.snapshotter, "CgroupVersion": "2" if unified else "1",
            "CgroupDriver": "systemd" if unified and os.path.isdir("/run/systemd/system") else "cgroupfs",
            "MemTotal": memory_total(), "Warnings": [f"WARNING: {CTR_ONLY}"],
        }

    def login(self, host: str, user: str, password: str, environment: Dict[str, str]) -> None:
        """Have a registry check credentials. Nothing is kept: clients send theirs with each request."""
        Registry(Reference(host + "/login", "", ""), {"username": user, "password": password}).check()

    def pull(self, name: str, platform: str, unpack: bool, environment: Optional[Dict[str, str]],
             client: Client) -> ContextManager[Process]:
        """A running pull. ctr unpacks for any platform."""
        options = [*_value(platform, "--platform"), f"--snapshotter={self.snapshotter}"]
        return self._transfer("pull", name, options, environment, client)

    def push(self, name: str, group: ImageGroup, platforms: List[str], environment: Optional[Dict[str, str]],
             client: Client) -> ContextManager[Process]:
        """A running push; of an index that is here in part, or for a platform, of one manifest in its place."""
        described, options = [each.descriptor for each in group.whole], []
        listed = [each for each in group.contents if each.descriptor["digest"] != group.id]
        if platforms and listed or len(described) < len(listed):
            wanted = tuple(platforms) or ""
            chosen = next((each for each in described if platform_text(each.get("platform")).startswith(wanted)), None)
            if chosen is None:
                raise NotFound(f"{familiar(name)} has no content here for {', '.join(platforms) or 'any platform'}")
            options = [f"--manifest={chosen['digest']}", f"--manifest-type={chosen['mediaType']}"]
        return self._transfer("push", name, options, environment, client)

    def pushed_digest(self, process: Process) -> str:
        """The digest of the manifest that was pushed in the place of an index, "" for none."""
        return next((word.partition("=")[2] for word in process.argv if word.startswith("--manifest=")), "")

    def load(self, platforms: List[str]) -> ContextManager[Process]:
        """A running load of the archive on its stdin; what has no name there becomes import-DATE@DIGEST."""
        options = ["--digests", "--skip-digest-for-named", f"--snapshotter={self.snapshotter}",
                   *([f"--platform={each}" for each in platforms] or ["--all-platforms"])]
        return self._images("import", *options, "--", "-", stdin=subprocess.PIPE)

    @contextlib.contextmanager
    def build(self, options: List[str], names: List[str], folder: str, environment: Optional[Dict[str, str]],
              client: Client) -> Iterator[Process]:
        """A running buildctl, its progress on stderr, from which ctr loads the image: so it does not matter which
        worker and namespace buildkitd has."""
        words = buildctl_args(options, names, folder)
        with self.load([]) as loading:
            with self.buildctl().start(*words, stdout=loading.stdin, stderr=subprocess.PIPE, environment=environment,
                                       client=client) as building:
                loading.close_stdin()
                yield building
                if not building.wait():
                    loading.check()


###############################################################################
# Checks
###############################################################################

# Those that nerdctl puts into the networks it makes, and what each container gets.
NEEDED_PLUGINS = ("bridge", "firewall", "host-local", "loopback", "portmap", "tuning")


class Finding(NamedTuple):
    """Something the daemon needs: its name, the version or place that was found, and what does not work for want of it,
    with what to do, "" for nothing."""

    name: str
    found: str
    trouble: str = ""


def first_numbers(version: str) -> Tuple[int, ...]:
    """(2, 3) of v2.3.5."""
    return tuple(int(each) for each in re.findall(r"\d+", version)[:2])


def check_containerd(engine: Engine, whole: bool) -> Iterator[Finding]:
    """containerd, its snapshotter and runtime, and nerdctl, whose version is asked if it matters or for the `whole`."""
    version = ""
    try:
        version, _ = engine.containerd.version()
        yield Finding("containerd", f"{version} at {engine.containerd.address}")
    except ApiError as error:
        yield Finding("containerd", "", str(error))
    old, told = bool(version) and first_numbers(version) < (1, 7), {}
    try:
        told = engine.inventory.tools() if version and (whole or old) else {}
        own = (told.get("Client") or {}).get("Version") or shutil.which(engine.nerdctl.command[0]) or ""
        trouble = f"load, save, tag, push, pull and import do not work: nerdctl {own} needs containerd 1.7 or newer"
        yield Finding("nerdctl", own, own and old and first_numbers(own) >= (2, 3) and trouble
                      or not own and "nothing works: install nerdctl on PATH, or say where it is with --nerdctl" or "")
    except ApiError as error:
        yield Finding("nerdctl", "", str(error))
    runc = next((each.get("Version") for each in (told.get("Server") or {}).get("Components") or []
                 if each.get("Name") == "runc"), "") or shutil.which("runc", path=system_path()["PATH"]) or ""
    yield Finding("runc", runc, "" if runc else "no container can be started: install runc")
    with contextlib.suppress(ApiError):
        complaint = engine.containerd.snapshotter_complaint(engine.nerdctl.snapshotter)
        yield Finding("snapshotter", engine.nerdctl.snapshotter, complaint and (
            f"images cannot be unpacked: containerd's snapshotter {engine.nerdctl.snapshotter} does not work "
            f"({complaint}): mend that (modprobe overlay), or take another (--snapshotter native)"))


def check_programs(engine: Engine) -> Iterator[Finding]:
    """What nerdctl makes networks with, and what shows processes."""
    with contextlib.suppress(ApiError):
        folder = plugins_folder(engine)
        lacking = [each for each in NEEDED_PLUGINS if not os.path.exists(os.path.join(engine.containerd.root() + folder,
                                                                                      each))]
        yield Finding("CNI plugins", folder, lacking and (
            f"containers have no networks but host and none: there is no {', '.join(lacking)} in {folder}: install the "
            "CNI plugins (containernetworking-plugins)") or "")
    for name, trouble in (("iptables", "bridge networks and published ports do not work: install iptables"),
                          ("ps", "top does not work: install procps")):
        path = shutil.which(name, path=system_path()["PATH"]) or ""
        yield Finding(name, path, "" if path else trouble)


def check_cgroups(engine: Engine) -> Finding:
    """The version of cgroups, which matters to what an ordinary user runs."""
    unified = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
    return Finding("cgroups", "v2" if unified else "v1", "" if unified or os.geteuid() == 0 else (
        "rootless containers have no limits and no top: boot with systemd.unified_cgroup_hierarchy=1 for cgroup v2"))


def check_buildkit(engine: Engine) -> Finding:
    """The buildkitd of builds, and whether it puts images where nerdctl looks."""
    try:
        sock, address = dial_buildkit(engine.nerdctl)
        sock.close()
        # Over ctr images are loaded, whatever the worker.
        complaint = "" if isinstance(engine.nerdctl, Ctr) else worker_complaint(
            list_workers(address), engine.nerdctl.namespace, engine.containerd.uuid())
        if not complaint and not shutil.which("buildctl"):
            complaint = "buildctl is not on PATH: install it for builds without the buildx plugin"
        return Finding("BuildKit", address, complaint)
    except ApiError as error:
        return Finding("BuildKit", "", f"nothing can be built: {error}")


def check(engine: Engine, whole: bool = True) -> List[Finding]:
    """What there is of all that the daemon needs, and what is not as it should be."""
    if isinstance(engine.nerdctl, Ctr):
        first = [each._replace(trouble=CTR_ONLY, found="") if each.name == "nerdctl" else each
                 for each in check_containerd(engine, whole) if each.name != "runc"]
        return [*first, check_buildkit(engine)]
    return [*check_containerd(engine, whole), *check_programs(engine), check_cgroups(engine), check_buildkit(engine)]


def print_check(engine: Engine) -> int:
    """Print the findings, one a line; the exit status, 1 where something does not work."""
    found = [Finding("Python", "%d.%d.%d" % sys.version_info[:3]), *check(engine)]
    for each in found:
        print(f"{'warning' if each.trouble else 'ok':8}{each.name:13}{each.found}", end="")
        print(f"{': ' if each.found else ''}{each.trouble}" if each.trouble else "")
    return int(any(each.trouble for each in found))


###############################################################################
# Command line
###############################################################################

EXAMPLES = """\
ways to run it:
  systemctl enable --now nerdctl.socket           with the units, as root: /run/nerdctl.sock
  systemctl --user enable --now nerdctl.socket    with the units, rootless: $XDG_RUNTIME_DIR/nerdctl.sock
  nerdctld --detach                               by hand: clients can connect when it returns; not yet after `&`
  nerdctld --namespace k8s.io                     for the containers of a Kubernetes node
  nerdctld --nerdctl ctr                          without nerdctl: images, listings and builds
  nerdctld --check                                say what is there, and what does not work; 1 when something does not
  docker -H ssh://user@host ps                    from elsewhere: runs nerdctld dial-stdio there, by the file nerdctl
"""


class Parser(argparse.ArgumentParser):
    """Says in one line what cannot be understood."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        log(f"{message}: see {self.prog} --help")
        sys.exit(2)


def parse_args(argv: List[str]) -> argparse.Namespace:
    """The options; ends with status 2 and a line for what cannot be understood."""
    environment, settings = os.environ.get, nerdctl_settings()
    parser = Parser(prog="nerdctld", description="Docker Engine API on a unix socket, carried out by nerdctl.",
                    epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["dial-stdio", "check"], help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="say what is there, and what does not work; also `check`")
    parser.add_argument("-H", "--addr", metavar="unix://PATH", default="",
                        help=f"socket to listen on (default: the one systemd hands over, else {default_socket_path()})")
    parser.add_argument("-G", "--group", default="", help="group that may use a socket of its own")
    parser.add_argument("-d", "--detach", action="store_true", help="go on in the background once clients can connect")
    parser.add_argument("--nerdctl", metavar="COMMAND", default=environment("NERDCTL") or "",
                        help="nerdctl to run, or a ctr (default: $NERDCTL, nerdctl, or without that containerd's ctr)")
    parser.add_argument("--namespace", help="containerd namespace (default: %(default)s)",
                        default=environment("CONTAINERD_NAMESPACE") or settings.get("namespace") or "default")
    parser.add_argument("--address", default=environment("CONTAINERD_ADDRESS") or settings.get("address") or "",
                        help="containerd's socket")
    parser.add_argument("--snapshotter", default=environment("CONTAINERD_SNAPSHOTTER") or "",
                        help="containerd snapshotter")
    parser.add_argument("--buildkit-host", default=environment("BUILDKIT_HOST") or "", help="buildkitd's address")
    parser.add_argument("--idle-timeout", metavar="SECONDS", type=float, default=0.0,
                        help="end after so long without use, when started by a socket unit")
    parser.add_argument("--debug", action="store_true", help="log each request and each nerdctl command with its time")
    parser.add_argument("--version", action="version", version=f"nerdctld {VERSION}")
    options = parser.parse_args(argv)
    try:
        if options.nerdctl and not shlex.split(options.nerdctl):
            parser.error("--nerdctl: no command")
    except ValueError as error:
        parser.error(f"--nerdctl: {error}")
    if not re.fullmatch(r"[A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*", options.namespace):
        parser.error(f"--namespace: {options.namespace!r} is not a containerd namespace")
    if not options.idle_timeout >= 0:
        parser.error(f"--idle-timeout: {options.idle_timeout:g} is not a time")
    return options


def listen(address: str, group: str = "") -> Tuple[socket.socket, str]:
    """The listening socket and, where it is our own and so ours to remove, its path."""
    listener = inherited_socket()
    if listener:
        return listener, ""
    path = socket_path(address) if address else default_socket_path()
    return own_socket(path, group), path


def detach() -> None:
    """Go on as a process of a session of its own, and let the one that was started end."""
    if os.fork():
        os._exit(0)
    os.setsid()
    with open(os.devnull, "r+b") as null:
        for each in (0, 1):
            os.dup2(null.fileno(), each)


def watch_signals() -> int:
    """From now on SIGTERM and SIGINT make the returned descriptor readable instead of ending the process."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    # Written to at once whichever thread the kernel picks, while a handler would wait for the main thread to wake up.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def serve_until_told(server: Server, idle_timeout: float, signals: int) -> None:
    """Serve until a signal or, with a timeout, until idle for so long."""
    # serve_forever() looks every so often whether it is to end: an idle daemon would not sleep, and its end would wait.
    poller = select.poll()
    for each in (server.fileno(), signals):
        poller.register(each, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poller.poll(min(1000.0, idle_timeout * 250) if idle_timeout else None)]
        if signals in ready:
            break
        if ready:
            server.handle_request()
        elif server.idle_seconds() >= idle_timeout:
            log(f"idle for {idle_timeout:g} seconds: ending")
            break


def make_engine(options: argparse.Namespace) -> Engine:
    """The engine over nerdctl or, where that is missing or a ctr was named, over ctr, with a warning in the log."""
    known = (["nerdctl"], ["ctr"], ["k3s", "ctr"])
    command = shlex.split(options.nerdctl) or next((each for each in known if shutil.which(each[0])), known[0])
    if os.path.basename(command[-1]) != "ctr":
        nerdctl = Nerdctl(command, options.namespace, options.address, options.snapshotter, options.buildkit_host,
                          options.debug)
        return Engine(nerdctl, Containerd(options.address, options.namespace))
    log(f"warning: {NO_NERDCTL}: images, listings and builds go by {shlex.join(command)}, everything else is answered "
        "with 501")
    default = K3S_SOCKET if os.path.basename(command[0]) == "k3s" else ""
    containerd = Containerd(options.address or default, options.namespace)
    return Engine(Ctr(command, containerd, options.snapshotter, options.buildkit_host, options.debug), containerd)


def look_around(engine: Engine) -> None:
    """What a daemon does when it has begun: it finds what is to be cared for, and says what will not work."""
    # What is read once every change is told is kept; before, it would only be in the way of the first client's reads.
    engine.feed.wait_live()
    engine.supervisor.look()
    engine.troubles = lambda: [each.trouble for each in check(engine) if each.trouble]
    for each in check(engine, whole=False):
        if each.trouble:
            log(f"warning: {each.trouble}")


def main(argv: Optional[List[str]] = None) -> int:
    """Run the daemon; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_args(argv)
    notify = os.environ.pop("NOTIFY_SOCKET", "")
    try:
        if options.command == "dial-stdio":
            return dial_stdio(socket_path(options.addr) if options.addr else default_socket_path())
        if options.check or options.command == "check":
            return print_check(make_engine(options))
        signals = watch_signals()
        listener, path = listen(options.addr, options.group)
        inode = os.lstat(path).st_ino if path else 0
        log(f"listening on {path or 'the socket of systemd'}, namespace {options.namespace}")
        if options.detach:
            detach()
    except StartError as error:
        log(str(error))
        return 1
    # The collector need not look at the program itself each time that a long list is made.
    gc.freeze()
    engine = make_engine(options)
    sweep_temporary()
    engine.supervisor = Supervisor(engine)
    engine.feed.start()
    server = Server(engine, listener)
    notify_systemd("READY=1", notify)
    threading.Thread(target=look_around, args=(engine,), name="look", daemon=True).start()
    serve_until_told(server, 0.0 if path else options.idle_timeout, signals)
    notify_systemd("STOPPING=1", notify)
    with contextlib.suppress(OSError):
        if path and os.lstat(path).st_ino == inode:
            os.unlink(path)
    # Streams of events would last until their clients leave.
    engine.hang_up()
    server.drain(10.0)
    engine.close()
    listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
