#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""nerdctld: the Docker Engine API on a unix socket, carried out by nerdctl.

The way of a request, in one direction only:

    socket -> request -> route -> handler -> argv -> nerdctl -> parser -> Docker JSON -> response

Sections, each using only what stands above it:

    Errors · Tree · Requests, responses · Routes · nerdctl process · Conversions · gRPC · Events · Snapshot ·
    Engine · System · Images · Build · Containers · Container create · Sessions · Container lifecycle · Streams · Exec ·
    Archive · Statistics · Networks · Volumes · Swarm and plugins · Relay · BuildKit · HTTP server ·
    Sockets · ctr · Command line

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
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

# A process in a container's tree ends with the section Tree and needs none of the others, which would take most of its time.
TREE = __name__ == "__main__" and sys.argv[1:2] == ["tree"]
if not TREE:
    import argparse
    import base64
    import calendar
    import collections
    import copy
    import functools
    import getopt
    import io
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
    import termios
    import threading
    import time
    import traceback
    import tty
    import urllib.parse
    import zlib

    # OpenSSL is 5 of 25 MB: `hashlib` loads it for what Python has itself, and `http.client` for https, which only a question
    # to a registry needs.
    try:
        from _sha2 import sha256
    except ImportError:
        try:
            from _sha256 import sha256
        except ImportError:
            from hashlib import sha256
    OPENSSL_LATER = "ssl" not in sys.modules
    if OPENSSL_LATER:
        sys.modules["ssl"] = None  # type: ignore[assignment]
    import http.client
    import http.server

    if OPENSSL_LATER:
        del sys.modules["ssl"]

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
# Tree
###############################################################################

# A container's files are reached in one way: by a process of this file (`nerdctld.py tree`) that has the container's tree for
# its root folder, takes one order (JSON, a line on stdin), answers with a line of JSON and goes on with a tar on stdin or stdout.
# The kernel keeps it inside; and since `/proc` of the host, where a container has it, leads out of every root folder by its links
# (`/proc/1/root`), no path is ever left to the kernel either: each step is opened by itself, and links are read as text.
CLONE_NEWNS = 0x20000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
MOUNT_FLAGS = {"ro": MS_RDONLY, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21,
               "bind": MS_BIND, "rbind": MS_BIND | MS_REC, "rw": 0, "defaults": 0}
# What the kernel makes up, which dockerd does not see as files of a container.
KERNEL_MOUNTS = ("proc", "sysfs", "cgroup", "cgroup2", "mqueue", "devpts")


LINKS_FOLLOWED = 40


@contextlib.contextmanager
def opened_below(root: str, path: str, follow: bool = False) -> Iterator[Tuple[int, List[str], str]]:
    """A path below a root folder as an O_PATH descriptor, with the names on the way to it and, for a link at its end that
    is not to be followed, where that leads. Links are taken as inside of the root, and each step is opened by itself, so
    that nobody inside can lead it out. FileNotFoundError and other OSErrors as lstat has."""
    left = [part for part in path.split("/") if part]
    stack = [os.open(root, os.O_PATH | os.O_DIRECTORY)]
    names: List[str] = []
    links, last = 0, ""
    try:
        while left:
            part = left.pop(0)
            if part in (".", ".."):
                if part == ".." and names:
                    os.close(stack.pop())
                    names.pop()
                continue
            entry = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=stack[-1])
            stack.append(entry)
            names.append(part)
            mode = os.fstat(entry).st_mode
            if stat.S_ISLNK(mode):
                target = os.readlink("", dir_fd=entry)
                if not (left or follow or path.endswith("/")):
                    last = target
                    break
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
        yield stack[-1], names, last
    finally:
        for each in stack:
            os.close(each)


class PathStat(NamedTuple):
    """What clients are told of a path in a container: `mode` as POSIX has it, `mtime` in nanoseconds since 1970."""

    name: str
    size: int
    mode: int
    mtime: int
    target: str


def path_stat_of(path: str, names: List[str], found: os.stat_result, target: str) -> PathStat:
    """The stat of what a path led to: `names` on the way to it, and the target of a link at its end."""
    if not target:
        return PathStat(os.path.basename(path.rstrip("/")) or "/", found.st_size, found.st_mode, found.st_mtime_ns, "")
    resolved = target if target.startswith("/") else "/" + "/".join([*names[:-1], target])
    return PathStat(names[-1], len(target), found.st_mode, found.st_mtime_ns, os.path.normpath(resolved))


def stat_below(root: str, path: str) -> PathStat:
    """The stat of a path below a root folder, with links taken as inside of it. FileNotFoundError and other OSErrors as lstat has."""
    with opened_below(root, path) as (descriptor, names, target):
        return path_stat_of(path, names, os.fstat(descriptor), target)


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


def mount_snapshot(mounts: List[Dict[str, Any]], target: str) -> None:
    """Mount what containerd's snapshotter names, in this process's own mount namespace."""
    for each in mounts:
        kind, source, options = each["type"], each["source"], each["options"]
        prefix, dot, rest = kind.partition(".")
        if dot and prefix in ("fuse", "fuse3"):
            helper = [f"mount.{prefix}", source, target, *itertools.chain.from_iterable(("-o", option) for option in options), "-t", rest]
            import subprocess

            subprocess.run(helper, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
            continue
        flags, data = 0, []
        for option in options:
            if option in MOUNT_FLAGS:
                flags |= MOUNT_FLAGS[option]
            elif option.startswith("lowerdir=") and ":" in option:
                # All options together may have one page: the names of many layers only fit in as relative ones.
                layers = option[len("lowerdir="):].split(":")
                common = os.path.commonpath(layers)
                os.chdir(common)
                data.append("lowerdir=" + ":".join(os.path.relpath(layer, common) for layer in layers))
            else:
                data.append(option)
        mount(source, target, kind, flags, ",".join(data))
        if flags & MS_BIND and flags & MS_RDONLY:
            mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def make_below(root: str, path: str, file: bool = False) -> None:
    """Make what is missing of a folder below a root, 0755 and root's as dockerd does; with `file` its last part as an empty file."""
    parts = [part for part in path.split("/") if part]
    for count in range(1, len(parts) + 1):
        try:
            with opened_below(root, "/".join(parts[:count]), follow=True):
                pass
        except FileNotFoundError:
            with opened_below(root, "/".join(parts[:count - 1]), follow=True) as (folder, _, _):
                if file and count == len(parts):
                    os.close(os.open(parts[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder))
                else:
                    os.mkdir(parts[count - 1], 0o755, dir_fd=folder)


def mount_binds(root: str, binds: List[Tuple[str, str, bool]]) -> None:
    """Mount volumes and binds (source, destination, whether read-only) below the root of a container that does not run, where
    they will be once it does."""
    for source, destination, read_only in binds:
        if not os.path.exists(source):
            continue
        make_below(root, destination, not os.path.isdir(source))
        with opened_below(root, destination, follow=True) as (descriptor, _, _):
            mount(source, f"/proc/self/fd/{descriptor}", None, MS_BIND | MS_REC)
        if read_only:
            with opened_below(root, destination, follow=True) as (descriptor, _, _):
                mount(None, f"/proc/self/fd/{descriptor}", None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def enter_tree(order: Dict[str, Any]) -> None:
    """Make a container's tree this process's root folder: that of its running process, or its snapshot, which is mounted for
    this process alone and gone with it however it ends."""
    if order.get("pid"):
        root = os.open(f"/proc/{order['pid']}/root", os.O_PATH | os.O_DIRECTORY)
        # In the same namespace, so that what is mounted in the container can be neither removed nor replaced.
        namespace = os.open(f"/proc/{order['pid']}/ns/mnt", os.O_RDONLY)
        libc_call("setns", namespace, CLONE_NEWNS)
        os.close(namespace)
    else:
        libc_call("unshare", CLONE_NEWNS)
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        mount_snapshot(order["mounts"], order["folder"])
        mount_binds(order["folder"], order["binds"])
        if order["read_only"]:
            mount(None, order["folder"], None, MS_REMOUNT | MS_BIND | MS_RDONLY)
        root = os.open(order["folder"], os.O_PATH | os.O_DIRECTORY)
    # From here on no import may find a file: it would be the container's.
    sys.path.clear()
    sys.meta_path.clear()
    os.fchdir(root)
    os.chroot(".")
    os.chdir("/")
    os.close(root)


class TarInput:
    """A tar on a descriptor, as the file that tarfile reads headers from, forward only."""

    # How much tarfile may read for one entry, besides its content: long names, attributes, maps of sparse files.
    HEADER = 16 << 20

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.buffer = memoryview(bytearray(1 << 20))
        self.left = self.buffer[:0]
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
            self.left = self.buffer[:os.readv(self.descriptor, [self.buffer])]
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
            while piece:
                piece = piece[os.write(target, piece):]
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
    """Unpacks a tar into a folder (`names`, its path in parts) below `root`, by dockerd's rules. `keep` refuses to put a folder in
    the place of what is none and the reverse; `owner`, if any, gets everything; in a user namespace devices are left out."""

    def __init__(self, root: str, names: List[str], keep: bool = False, owner: Optional[List[int]] = None, user_namespace: bool = False):
        self.root, self.names, self.keep, self.owner, self.user_namespace = root, names, keep, owner, user_namespace
        self.target = "/" + "/".join(names)
        self.opened: Tuple[str, int] = ("", -1)
        self.folders: List[Tuple[str, Tuple[int, int]]] = []

    def unpack(self, source: TarInput) -> None:
        """Unpack all of it; 400 for what is no tar, breaks off or leads outside, OSError for what the file system refuses."""
        import tarfile

        try:
            if not source.more():
                return
            tar = tarfile.TarFile(fileobj=source, mode="r", encoding="utf-8", errors="surrogateescape")
            for entry in iter(tar.next, None):
                tar.members.clear()
                self.entry(entry, source)
                source.spent = 0
        except tarfile.TarError as error:
            raise BadParameter(f"invalid archive: {error}") from None
        # tarfile takes a header that it cannot read for the end.
        if source.last.strip(b"\0") or len(source.last) not in (0, tarfile.BLOCKSIZE):
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
                raise BadParameter(f'invalid hardlink "{os.path.normpath(self.target + "/" + name)}" -> "{name}"' if link
                                   else f'"{name}" is outside of "{self.target}"')
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        return self.names + parts

    def folder(self, path: str) -> int:
        """A folder as an O_PATH descriptor, made where it is missing; it holds until the next one is asked for."""
        if self.opened[1] < 0 or self.opened[0] != path:
            if self.opened[1] >= 0:
                os.close(self.opened[1])
            self.opened = ("", -1)
            for missing in (False, True):
                try:
                    with opened_below(self.root, path, follow=True) as (descriptor, _, _):
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
        making = verb = {b"1": "link", b"2": "symlink", b"3": "mknod", b"4": "mknod", b"5": "mkdir", b"6": "mknod"}.get(entry.type, "open")
        try:
            folder, name = self.folder("/".join(parts[:-1])), parts[-1]
            verb = "unlinkat"
            there = self.clear(folder, name, entry.isdir(), path)
            verb = making
            if entry.isdir():
                self.make_folder(entry, folder, name, there)
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
        """Give an open file or folder the owner, attributes and mode of its entry, in the order in which none undoes another."""
        os.fchown(descriptor, *(self.owner or (entry.uid, entry.gid)))
        for key, value in entry.pax_headers.items():
            if key.startswith("SCHILY.xattr."):
                try:
                    os.setxattr(descriptor, key[len("SCHILY.xattr."):].encode("utf-8", "surrogateescape"), value.encode("utf-8", "surrogateescape"))
                except OSError as error:
                    # Not every file system, and not every user, can have each of them.
                    if error.errno not in (errno.ENOTSUP, errno.EPERM):
                        raise
        os.fchmod(descriptor, entry.mode & 0o7777)

    def make_folder(self, entry: Any, folder: int, name: str, there: bool) -> None:
        """Make a folder, or give the one that is there what the entry says; its times come at the end."""
        if not there:
            os.mkdir(name, 0o700, dir_fd=folder)
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
        try:
            self.settle(entry, descriptor)
        finally:
            os.close(descriptor)

    def make_file(self, entry: Any, folder: int, name: str, source: TarInput) -> None:
        """Make a file; what a sparse one leaves out stays a hole."""
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        with os.fdopen(descriptor, "wb", 0):
            if entry.sparse is None:
                source.copy(descriptor, entry.size)
            else:
                for offset, size in entry.sparse:
                    os.lseek(descriptor, offset, os.SEEK_SET)
                    source.copy(descriptor, size)
                os.ftruncate(descriptor, entry.size)
            self.settle(entry, descriptor)
            os.utime(descriptor, ns=entry_times(entry))

    def make_other(self, entry: Any, folder: int, name: str, path: str) -> None:
        """Make a link, a FIFO or a device."""
        kinds = {b"3": stat.S_IFCHR, b"4": stat.S_IFBLK, b"6": stat.S_IFIFO}
        if entry.issym():
            if self.names and not (os.path.normpath(os.path.dirname(path) + "/" + entry.linkname) + "/").startswith(self.target + "/"):
                raise BadParameter(f'invalid symlink "{path}" -> "{entry.linkname}"')
            os.symlink(entry.linkname, name, dir_fd=folder)
        elif entry.islnk():
            *above, last = self.place(entry.linkname, link=True)
            with opened_below(self.root, "/".join(above), follow=True) as (descriptor, _, _):
                os.link(last, name, src_dir_fd=descriptor, dst_dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(os.lstat(name, dir_fd=folder).st_mode):
                # The chown below would take the set-user-ID bit off the file that has both names.
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
                with os.fdopen(descriptor, "rb", 0):
                    self.settle(entry, descriptor)
                    os.utime(descriptor, ns=entry_times(entry))
                return
        elif entry.type in kinds:
            try:
                os.mknod(name, kinds[entry.type] | entry.mode & 0o7777, os.makedev(entry.devmajor, entry.devminor), dir_fd=folder)
            except PermissionError:
                if self.user_namespace:
                    return
                raise
        else:
            raise BadParameter(f"unhandled tar header type {entry.type[0]}")
        os.chown(name, *(self.owner or (entry.uid, entry.gid)), dir_fd=folder, follow_symlinks=False)
        os.utime(name, ns=entry_times(entry), dir_fd=folder, follow_symlinks=False)


def remove_entry(folder: int, name: str) -> None:
    """Remove a file, or a folder with all that is in it, from an open folder. No link is followed."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
        try:
            for each in os.listdir(descriptor):
                remove_entry(descriptor, each)
        finally:
            os.close(descriptor)
        os.rmdir(name, dir_fd=folder)


class Packer:
    """Writes files below `root` as a tar to a descriptor, by dockerd's rules. What stands at the paths of `made_up` the kernel
    makes up: of those only the folder is told."""

    def __init__(self, root: str, output: int, made_up: Iterable[str] = ()):
        self.root, self.output, self.made_up = root, output, set(made_up)
        self.pending = bytearray()
        # Device and inode -> name of what has several names.
        self.linked: Dict[Tuple[int, int], str] = {}

    def pack(self, path: str, tell: Callable[[PathStat], Any]) -> None:
        """Write the file at a path, or the folder with all that is in it; entries begin with the last part of the path. What is
        there is told first."""
        with opened_below(self.root, path) as (_, names, _):
            pass
        last = path.rstrip("/").rpartition("/")[2]
        name = last if last == "." else os.path.basename(os.path.normpath(path)) or "/"
        with opened_below(self.root, "/".join(names[:-1])) as (folder, _, _):
            entry = names[-1] if names else "."
            found = os.lstat(entry, dir_fd=folder)
            tell(path_stat_of(path, names, found, os.readlink(entry, dir_fd=folder) if stat.S_ISLNK(found.st_mode) else ""))
            self.entry(folder, entry, name, "/" + "/".join(names))
        self.pending += bytes(1024)
        self.flush()

    def flush(self) -> None:
        """Write out what is pending."""
        view = memoryview(self.pending)
        while view:
            view = view[os.write(self.output, view):]
        self.pending = bytearray()

    def entry(self, folder: int, name: str, told: str, path: str) -> None:
        """Write one entry, by the name `told`, and what is below it; one that is gone meanwhile is left out, and a socket, which
        no tar can have."""
        found = os.lstat(name, dir_fd=folder)
        if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
            flags = os.O_DIRECTORY if stat.S_ISDIR(found.st_mode) else os.O_NONBLOCK | os.O_NOCTTY
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=folder)
            try:
                found = os.fstat(descriptor)
                if stat.S_ISDIR(found.st_mode):
                    self.header(found, told)
                    for each in sorted(os.listdir(descriptor)) if path not in self.made_up else ():
                        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                            self.entry(descriptor, each, f"{told.rstrip('/')}/{each}", f"{path.rstrip('/')}/{each}")
                elif stat.S_ISREG(found.st_mode):
                    self.file(descriptor, found, told)
            finally:
                os.close(descriptor)
        elif stat.S_ISLNK(found.st_mode):
            self.header(found, told, os.readlink(name, dir_fd=folder))
        elif not stat.S_ISSOCK(found.st_mode):
            self.header(found, told)

    def header(self, found: os.stat_result, told: str, link: str = "", attributes: Optional[Dict[str, str]] = None) -> None:
        """Write the header of an entry; one with a `link` that is not symbolic is another name of that file."""
        import tarfile

        entry = tarfile.TarInfo(told)
        kinds = ((stat.S_ISDIR, tarfile.DIRTYPE), (stat.S_ISLNK, tarfile.SYMTYPE), (stat.S_ISFIFO, tarfile.FIFOTYPE),
                 (stat.S_ISCHR, tarfile.CHRTYPE), (stat.S_ISBLK, tarfile.BLKTYPE))
        entry.type = next((kind for test, kind in kinds if test(found.st_mode)), tarfile.LNKTYPE if link else tarfile.REGTYPE)
        entry.size = found.st_size if entry.type == tarfile.REGTYPE else 0
        entry.mode, entry.uid, entry.gid, entry.mtime, entry.linkname = found.st_mode, found.st_uid, found.st_gid, int(found.st_mtime), link
        if entry.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            entry.devmajor, entry.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
        entry.pax_headers = attributes or {}
        self.pending += entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        if len(self.pending) > 1 << 18:
            self.flush()

    def file(self, descriptor: int, found: os.stat_result, told: str) -> None:
        """Write an open file, as long as it was when its header was written."""
        if found.st_nlink > 1:
            first = self.linked.setdefault((found.st_dev, found.st_ino), told)
            if first != told:
                self.header(found, told, first)
                return
        attributes = {}
        with contextlib.suppress(OSError):
            attributes["SCHILY.xattr.security.capability"] = os.getxattr(descriptor, "security.capability").decode("utf-8", "surrogateescape")
        self.header(found, told, attributes=attributes)
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
    """The folder that a path leads to below a root, its own path in parts; 400 where nothing can be unpacked into it."""
    with opened_below(root, path, follow=True) as (descriptor, names, _):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise BadParameter("extraction point is not a directory")
        if os.fstatvfs(descriptor).f_flag & os.ST_RDONLY:
            own = "/".join(["", *names, ""])
            inside = any(own.startswith(os.path.normpath(each).rstrip("/") + "/") for each in volumes)
            raise BadParameter("mounted volume is marked read-only" if inside else "container rootfs is marked read-only")
        return names


def carry_out(order: Dict[str, Any], source: TarInput) -> None:
    """Enter the tree and do what is ordered: `stat`, `pack` or `unpack`."""
    import resource
    # Whatever is needed later: from the tree on nothing can be imported.
    import tarfile  # noqa: F401

    try:
        enter_tree(order)
    except OSError as error:
        raise ApiError(f"the container's files cannot be reached: {error.strerror or error}") from None
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    sys.setrecursionlimit(10000)
    os.umask(0)
    path, tell = order["path"], lambda value: os.write(1, json.dumps(value).encode() + b"\n")
    if order["do"] == "unpack":
        names = folder_for("/", path, [destination for _, destination, _ in order["binds"]])
        tell([])
        Unpacker("/", names, order["keep"], order["owner"], order["user_namespace"]).unpack(source)
        # What stands behind its end is nobody's, but was sent.
        while os.readv(0, [source.buffer]):
            pass
    elif order["do"] == "pack":
        Packer("/", 1, order["made_up"]).pack(path, tell)
    else:
        tell(stat_below("/", path))


def tree_main() -> int:
    """`nerdctld.py tree`: the exit status. A failure is a line of JSON on stderr, its status and its message."""
    for descriptor in (0, 1):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, 1031, 1 << 20)
    order: Dict[str, Any] = {}
    try:
        source = TarInput(0)
        order.update(json.loads(source.line()))
        carry_out(order, source)
        return 0
    except ApiError as error:
        status, message = error.status, str(error)
    except OSError as error:
        # That of an entry in the archive says where; any other is about the path that was asked for.
        status, message = 500, error.strerror or str(error)
        if message == os.strerror(error.errno or 0):
            status = {errno.ENOENT: 404, errno.ENOTDIR: 404, errno.ELOOP: 400}.get(error.errno, 500)
            message = f"{order.get('path')}: {message.lower()}"
    except Exception as error:
        # No traceback: it would read the container's files.
        status, message = 500, repr(error)
    os.write(2, json.dumps({"status": status, "message": message}).encode() + b"\n")
    return 1


if TREE:
    sys.exit(tree_main())


###############################################################################
# Requests, responses
###############################################################################


class Client:
    """The far end of a request, as a handler may see it: whether it is still there."""

    def when_gone(self, callback: Callable[[], Any], half: bool = True):
        """Context in which `callback` is called, from another thread, once the client has left; with `half` also when
        it only stops sending, which is an end for everything but a hijacked connection. A client that cannot be watched is
        taken to stay."""
        return contextlib.nullcontext()


class Fields(Dict[str, Any]):
    """The JSON object of a request. A field that is not there under its own name is found without regard to case, as Go
    finds it: some clients write `detachKeys`."""

    def __missing__(self, name: str) -> Any:
        for key, value in self.items():
            if key.lower() == name.lower():
                return value
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, `default` where there is none."""
        try:
            return self[name]
        except KeyError:
            return default


class Request:
    """One request. `version` is a pair such as (1, 44); `query` maps each name to its list of values; `body` has
    `read(n)` and `readinto(view)`; `headers` compares names without case."""

    def __init__(self, method: str, path: str, version: Tuple[int, int] = API_NEWEST, query: Optional[Dict[str, List[str]]] = None,
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
        return Fields(value)

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
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadParameter(f"invalid JSON: {str(error).splitlines()[0][:200]}") from None
    if b"\\ud" in data or b"\\uD" in data:
        # Half of a surrogate pair is no text that could be given to a process.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadParameter("invalid JSON: it has half of a surrogate pair") from None
    return value


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


class Piped(NamedTuple):
    """A piece of a stream that is still in a pipe: `size` bytes, all there, which the kernel moves on without a copy."""

    descriptor: int
    size: int
    # Less than this is copied sooner than moved.
    WORTH = 1 << 15

    def move(self, target: int) -> None:
        """Move all of it to another descriptor; OSError when nobody reads there."""
        left = self.size
        while left:
            left -= os.splice(self.descriptor, target, left)


class Stream:
    """A body that is made while it is sent.

    `chunks` yields bytes, and Piped of pipes that it goes on with afterwards; a generator is closed in any case, so its own
    `finally` does the cleaning up, and while it waits for something else than the client it stands in `request.client.when_gone()`. A `primed` stream yields its
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

    def __init__(self, serve: Callable[["Connection"], None], protocol: str = "tcp", abandon: Callable[[], None] = lambda: None):
        self.serve = serve
        self.protocol = protocol
        # Called instead of serve where the client has left already.
        self.abandon = abandon


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

    def stop_input(self) -> None:
        """Let a recv() that waits return with the end of file."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

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
    """A line of the route table: the paths that begin with `prefix` and match `pattern`, which is compiled when it is first
    needed. All at once took a tenth of the way to the first answer."""

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
        if each.method == method and path.startswith(each.prefix):
            found = re.fullmatch(each.pattern, path)
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
NERDCTL_ERRORS: List[Tuple[str, type, str]] = [
    (r"cannot access containerd socket \"?([^\"\s:]+)", Unavailable,
     "containerd is not running at {0}: start it (systemctl start containerd), or say where it is with --address"),
    (r"(?:connection error|failed to dial|connection refused|error reading server preface).*?(containerd\.sock)", Unavailable,
     "containerd does not answer: see systemctl status containerd"),
    (r"nerdctl is not installed, and", NotImplementedHere, ""),
    (r"connection error: desc = \"transport: Error while dialing: dial unix (?!\S*buildkit)(\S+): ", Unavailable,
     "containerd does not answer at {0}: see systemctl status containerd"),
    (r"rootless containerd not running", Unavailable,
     "rootless containerd is not running: containerd-rootless-setuptool.sh install sets it up"),
    (r"(?:no buildkit host is available|failed to ping to host|buildctl.* executable file not found|"
     r"could not connect to buildkit|listing workers)", Unavailable,
     "buildkitd does not answer: start it with a containerd worker, or say where it is with --buildkit-host"),
    (r"no image was built", ApiError,
     "no image was built where nerdctl looks for it: buildkitd's first worker has to be a containerd worker in nerdctl's namespace (buildkitd.toml)"),
    (r"executable file not found in \$PATH", BadParameter, ""),
    (r"exec: \"[^\"]*\": (?:permission denied|stat \S+: no such file or directory)|permission denied: unknown", BadParameter, ""),
    (r"(?:no such container:? |no container found for: |no running task found for container |container not found: )"
     r"\"?([^\s\"]+)", NotFound, "No such container: {0}"),
    (r"container \"([0-9a-f]{64})\" in namespace \"[^\"]*\": not found", NotFound, "No such container: {0}"),
    (r"image not available: \"?([^\"\s]+)", NotFound, "No such image: {0}"),
    (r"no such image:? \"?([^\s\"]+)", NotFound, "No such image: {0}"),
    (r"image \"([^\"]+)\": not found", NotFound, "No such image: {0}"),
    (r"no such object:? ([^\s\]]+)", NotFound, "No such object: {0}"),
    (r"unauthorized|no basic auth credentials|authorization failed|401 Unauthorized", Unauthorized, ""),
    (r"(?:access denied|insufficient_scope|403 Forbidden)", NotFound, ""),
    (r"failed to resolve (?:image|reference):? \"?([^\s\"]+?)\"?:(?: \S+:)? not found", NotFound, 'failed to resolve reference "{0}": {0}: not found'),
    (r"no network found matching: (\S+)", NotFound, "network {0} not found"),
    (r"no such network: [\\\\\"]*([^\\\\\"\s]+)", NotFound, "network {0} not found"),
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
]
LOGRUS = re.compile(r'^time="[^"]*" level=(\w+) msg=(?:"((?:[^"\\]|\\.)*)"|(\S+))(?: error="((?:[^"\\]|\\.)*)")?')
LOGRUS_TTY = re.compile(r"^(FATA|ERRO|WARN|INFO|DEBU)\[\d+\] (.*)")
GO_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
SHORT_CALL = 120.0
# How long a nerdctl that mounts a container's files may take to end by itself.
UNMOUNTING = 10.0


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
    fatal = [re.sub(r"^\d+ errors:\n(?=.)", "", message) for level, message in lines if level == "fatal"]
    if fatal and not re.match(r"^(\d+ errors?:?|.*\d+ errors?:)\s*$", fatal[-1].strip()):
        return re.sub(r"^1 errors:\s*", "", fatal[-1].strip())
    for wanted in (("error",), ("",), ("warning",)):
        told = [message.strip() for level, message in lines if level in wanted]
        if told:
            return "; ".join(told[-3:])
    return (fatal[-1].strip() if fatal else "") or "nerdctl failed without a word"


def nerdctl_error(stderr: str) -> ApiError:
    """The ApiError for what nerdctl wrote on stderr before it ended with a status other than 0."""
    message = re.sub("^(?=failed to create shim task)", "failed to create task for container: ", nerdctl_message(stderr))
    # Some fatal lines only say that there was an error, and the lines before say which.
    for text in (message, "\n".join(parse_logrus(line)[1] for line in stderr[-4096:].splitlines())):
        for pattern, kind, words in NERDCTL_ERRORS:
            found = re.search(pattern, text, re.S)
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

    # How long it may take to end when it is asked to, in seconds.
    GRACE = 2.0

    def __init__(self, runner: "Nerdctl", argv: List[str], environment: Dict[str, str], stdin: Any, stdout: Any, stderr: Any,
                 client: Client, lasting: bool = False, mounts: bool = False, descriptors: Tuple[int, ...] = ()):
        self.runner = runner
        self.argv = argv
        self.lasting, self.mounts = lasting, mounts
        self.began = time.monotonic()
        self.messages = None
        if stderr is None:
            self.messages = stderr = os.memfd_create("stderr")
        self.relays: List[subprocess.Popen] = []
        try:
            pipes = [self._relay() if lasting and each == subprocess.PIPE else each for each in (stdout, stderr)]
            self.popen = subprocess.Popen(
                argv, stdin=stdin, stdout=pipes[0], stderr=pipes[1], env=environment, bufsize=0, start_new_session=True, pass_fds=descriptors
            )
        except OSError as error:
            self.popen = None
            self._release()
            raise runner.missing(error) from None
        finally:
            for relay in self.relays:
                with contextlib.suppress(OSError):
                    relay.stdin.close()
        self.stdin = self.popen.stdin
        self.stdout, self.stderr = self.popen.stdout, self.popen.stderr
        if self.relays:
            self.stdout, self.stderr = (relay.stdout for relay in self.relays)
        runner.processes.add(self)
        self.watch = contextlib.nullcontext() if mounts else client.when_gone(self.kill)
        self.watch.__enter__()

    def _relay(self) -> Any:
        """The input of a process that passes everything on to us and, once we are gone, drops it: nerdctl must not be
        stopped by a broken pipe, nor its container by a full one. A plain pipe where there is no such tee."""
        if not find_tee():
            return subprocess.PIPE
        self.relays.append(subprocess.Popen([find_tee(), "-p", "/dev/null"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True))
        return self.relays[-1].stdin

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

    def spoil(self, seconds: float = 5.0) -> None:
        """End an archive on stdin that broke off so that it cannot be taken for the whole, and let the process fail by
        itself. A nerdctl that is killed leaves what it had begun in containerd for a day, and in the way of the next
        archive with a file of that name."""
        # No whole number of a tar's blocks.
        self.write(b"\xff" * 100003)
        self.close_stdin()
        self.wait(seconds)

    def read(self, size: int = BLOCK) -> bytes:
        """Up to `size` bytes of stdout as soon as there are any; b"" at its end."""
        return os.read(self.stdout.fileno(), size)

    def pieces(self, kept: int = 0) -> Iterator[Any]:
        """Stdout to its end as bytes, and as Piped what is not worth to be read here. The last `kept` bytes come as bytes."""
        descriptor = self.stdout.fileno()
        with contextlib.suppress(OSError):
            # The two processes at its ends change places less often. fcntl has the name F_SETPIPE_SZ from Python 3.10 on.
            fcntl.fcntl(descriptor, 1031, 1 << 20)
        pause, total = 0.0005, 0
        while True:
            if total > 1 << 20 and waiting_bytes(descriptor) < Piped.WORTH + kept:
                # nerdctl writes 32 KiB at a time or less: to be woken by each would cost both of us more than they are worth.
                poll_readable(descriptor, None)
                time.sleep(pause)
                found = waiting_bytes(descriptor)
                pause = min(2 * pause, 0.004) if found < BLOCK else max(pause / 2, 0.00025) if found > 2 * BLOCK else pause
            waiting = waiting_bytes(descriptor) - kept
            if waiting >= Piped.WORTH and hasattr(os, "splice"):
                total += waiting
                yield Piped(descriptor, waiting)
                continue
            data = self.read()
            if not data:
                return
            total += len(data)
            yield data

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
        if self.mounts:
            self._close_pipes()
            self.wait(UNMOUNTING)
        if self.popen.returncode is None and self.popen.poll() is None:
            self.kill(signal.SIGTERM)
            if self.wait(self.GRACE) is None:
                self.kill()
                self.popen.wait()
        self._close_pipes()
        if self in self.runner.processes:
            self.runner.tell(self)
        self._release()
        self.runner.processes.discard(self)

    def _close_pipes(self) -> None:
        for each in (self.stdin, self.stdout, self.stderr):
            if each:
                with contextlib.suppress(OSError):
                    each.close()

    def _release(self) -> None:
        """Reap the relays and let the memory of stderr go."""
        for relay in self.relays:
            with contextlib.suppress(OSError):
                relay.stdin.close()
                relay.stdout.close()
            # Nobody writes to it any more but a descendant of nerdctl that kept the pipe.
            with contextlib.suppress(subprocess.TimeoutExpired):
                relay.wait(2.0)
                continue
            relay.kill()
            relay.wait()
        if self.messages is not None:
            os.close(self.messages)
            self.messages = None


def poll_readable(descriptor: int, timeout: Optional[float]) -> bool:
    """Whether a descriptor becomes readable (or ends) within `timeout` seconds. No limit on its number, unlike select."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(None if timeout is None else max(0, int(timeout * 1000))))


def waiting_bytes(descriptor: int) -> int:
    """How much can be read from a pipe at once."""
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


class Nerdctl:
    """Runs nerdctl: the only place that starts a process. `command` is the argv in front ("nerdctl", or "lima nerdctl"
    as two words). Short calls wait in a queue for one of a few places; streams have places of their own."""

    def __init__(self, command: List[str], namespace: str = "", address: str = "", snapshotter: str = "",
                 buildkit_host: str = "", debug: bool = False):
        self.command = list(command)
        self.namespace = namespace or "default"
        self.address = address
        self.debug = debug
        # Whether it is a nerdctl of this machine, so that what it keeps of its networks can be read.
        self.keeps = len(self.command) == 1
        # Whether nerdctl's files are files of this machine: also those of this file in the place of nerdctl.
        self.local = self.keeps or self.command[0] == sys.executable
        self.options = [f"--namespace={self.namespace}"]
        if address:
            self.options.append(f"--address={address}")
        if snapshotter:
            self.options.append(f"--snapshotter={snapshotter}")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("LISTEN_", "NOTIFY_SOCKET"))}
        if buildkit_host:
            self.environment["BUILDKIT_HOST"] = buildkit_host
        # A listing is one question to containerd after the other: on one thread it costs nerdctl a fifth less.
        self.listing = {} if "GOMAXPROCS" in self.environment else {"GOMAXPROCS": "1"}
        self.places = threading.BoundedSemaphore(max(4, 2 * (os.cpu_count() or 1)))
        # Those that mostly wait for something else stand in nobody's way.
        self.waiting_places = threading.BoundedSemaphore(64)
        self.processes: set = set()

    def missing(self, error: OSError) -> ApiError:
        """The ApiError for a nerdctl, or a buildctl, that could not be started."""
        if error.errno == errno.E2BIG:
            return BadParameter("invalid value: it is longer than a command line may be")
        if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
            advice = "install nerdctl on PATH, or say where it is with --nerdctl"
            if self.command[0] == "buildctl":
                advice = "install BuildKit's buildctl on PATH, and start a buildkitd"
            return Unavailable(f"{self.command[0]} cannot be run ({error.strerror}): {advice}")
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
            said = process.error_text() if process.popen.returncode > 0 else ""
            log(f"{shlex.join(process.argv)} -> {process.popen.returncode} in {took:.0f} ms{' ' + nerdctl_message(said) if said else ''}")

    def start(self, *arguments: str, stdin: Any = subprocess.DEVNULL, stdout: Any = subprocess.PIPE, stderr: Any = None,
              environment: Optional[Dict[str, str]] = None, client: Client = Client(), lasting: bool = False,
              mounts: bool = False) -> Process:
        """A running process for a stream. stderr None keeps it in memory for check(). It is killed when `client`
        leaves; a `lasting` one goes on when the daemon ends. One that `mounts` a container's files would leave them mounted
        if it was killed: it finds its pipes closed, and has a while to end by itself."""
        merged = {**self.environment, **environment} if environment else self.environment
        return Process(self, self.argv(arguments), merged, stdin, stdout, stderr, client, lasting, mounts)

    def start_own(self, command: str, before: Iterable[str] = (), client: Client = Client()) -> Process:
        """This file as a process of its own, `nerdctld.py COMMAND`, with its standard streams as pipes and errors in memory;
        `before` is the argv of a program that starts it. It is killed when `client` leaves."""
        code = own_bytecode()
        argv = [*before, sys.executable, "-IS", f"/proc/self/fd/{code}", command]
        return Process(self, argv, self.environment, subprocess.PIPE, subprocess.PIPE, None, client, descriptors=(code,))

    def output(self, *arguments: str, data: bytes = b"", timeout: float = SHORT_CALL,
               environment: Optional[Dict[str, str]] = None, waits: bool = False) -> Output:
        """Run to the end, whatever its status. 503 when no place becomes free or it does not end within `timeout`. One that
        mostly `waits` takes no place of those that work."""
        places = self.waiting_places if waits else self.places
        if not places.acquire(timeout=timeout):
            raise Unavailable("too many nerdctl processes are running")
        try:
            return self._output(arguments, data, timeout, environment)
        finally:
            places.release()

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
            environment: Optional[Dict[str, str]] = None, waits: bool = False) -> Output:
        """Run to the end; the ApiError of the table above for a status other than 0."""
        output = self.output(*arguments, data=data, timeout=timeout, environment=environment, waits=waits)
        if output.status:
            raise nerdctl_error(output.stderr)
        return output

    def rows(self, *arguments: str, timeout: float = SHORT_CALL) -> List[Any]:
        """The JSON values that a command with a `{{json …}}` format prints, one a line."""
        return parse_rows(self.run(*arguments, timeout=timeout, environment=self.listing).stdout)

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
        """End every process that is still running, but for those that hold a container or will find their pipes closed."""
        ending = [process for process in list(self.processes) if not (process.lasting or process.mounts)]
        for process in ending:
            process.kill(signal.SIGTERM)
        deadline = time.monotonic() + 2.0
        for process in ending:
            if process.wait(max(0.0, deadline - time.monotonic())) is None:
                process.kill()


@functools.lru_cache(maxsize=None)
def own_bytecode() -> int:
    """A descriptor of this file as bytecode in memory: compiling it would be half of the time of each process that runs it."""
    import importlib.util
    import marshal

    compiled = os.memfd_create("nerdctld.pyc")
    os.write(compiled, importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(__loader__.get_code(__name__)))
    return compiled


@functools.lru_cache(maxsize=None)
def find_tee() -> str:
    """A tee that goes on when its reader has left (GNU's -p), "" where there is none."""
    path = shutil.which("tee") or ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if path and subprocess.run([path, "-p", "/dev/null"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, timeout=5).returncode == 0:
            return path
    return ""


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
        """The folder of this process, made anew where somebody (systemd-tmpfiles) has removed it."""
        with self.lock:
            if not self._ours():
                self.path = tempfile.mkdtemp(prefix=f"{self.PREFIX}{os.getpid()}-")
            return self.path

    def _ours(self) -> bool:
        # Its name is known by now: whoever may write beside it could have made another.
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        return False

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
    """Remove a folder with everything in it, also where a build context has folders that may not be written. Nothing outside
    of it is touched, wherever links lead, and it may be gone."""
    def make_writable(function, name, _):
        with contextlib.suppress(OSError):
            for each in (os.path.dirname(name), name):
                if (each + "/").startswith(path + "/") and stat.S_ISDIR(os.lstat(each).st_mode):
                    os.chmod(each, 0o700)
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


def int_or_zero(text: str) -> int:
    """The number that a text is, 0 for any other text."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


def string_list(value: Any, what: str) -> List[str]:
    """A JSON array of strings, [] for null; a lone string is taken as a list of one, as Docker does; 400 otherwise."""
    if isinstance(value, str):
        return [value]
    return [typed(each, str, what) for each in typed(value, list, what)]


def string_map(value: Any, what: str) -> Dict[str, str]:
    """A JSON object of strings, {} for null; 400 otherwise."""
    return {key: typed(each, str, what) for key, each in typed(value, dict, what).items()}


###############################################################################
# gRPC
###############################################################################

# As much of protobuf, HTTP/2 and gRPC as it takes to speak with BuildKit and, for what nerdctl has no command for, containerd.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM = ACK = 1
END_HEADERS, PADDED = 4, 8
# Length and kind, flags, stream.
FRAME_HEAD = struct.Struct(">IBI")
WINDOW = 65535
GRPC_CODES = {400: 3, 409: 9, 503: 14}


class Field(NamedTuple):
    """A field of a protobuf message: its number, its value (bytes, or an int for a varint) and all of its bytes."""

    number: int
    value: Any
    raw: bytes


def varint(number: int) -> bytes:
    """A number as protobuf and HPACK write it, seven bits a byte."""
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def read_varint(data: bytes, at: int) -> Tuple[int, int]:
    """The number that begins at `at`, and where it ends; ValueError for one that is cut short or has over ten bytes."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise ValueError("not a varint")


def field(number: int, value: bytes) -> bytes:
    """A field that holds bytes, text or a message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def fields(data: Any) -> Iterator[Field]:
    """The fields of a message, bytes or a view of them, in order; ValueError for what is no message."""
    at = 0
    while at < len(data):
        tag, start = read_varint(data, at)
        wire, value = tag & 7, b""
        if wire == 0:
            value, end = read_varint(data, start)
        elif wire in (1, 5):
            end = start + (8 if wire == 1 else 4)
        elif wire == 2:
            size, start = read_varint(data, start)
            end = start + size
        else:
            raise ValueError("not a protobuf message")
        if not tag >> 3 or end > len(data):
            raise ValueError("not a protobuf message")
        yield Field(tag >> 3, value if wire == 0 else data[start:end], data[at:end])
        at = end


def read_entry(data: bytes) -> Tuple[str, str]:
    """Key and value of an entry of a map of strings."""
    found = {each.number: each.value for each in fields(data)}
    return str(found.get(1, b""), "utf-8"), str(found.get(2, b""), "utf-8")


class Frame(NamedTuple):
    """An HTTP/2 frame: `raw` is all of it, a header block with its continuations. `kind` -1 is the preface."""

    kind: int
    flags: int
    stream: int
    raw: Any

    @property
    def ends(self) -> bool:
        """Whether its sender says nothing more on the stream."""
        return self.kind == RESET or self.kind in (DATA, HEADERS) and bool(self.flags & END_STREAM)

    @property
    def data(self) -> Any:
        """What it carries, without padding."""
        return self.raw[10:len(self.raw) - self.raw[9]] if self.kind == DATA and self.flags & PADDED else self.raw[9:]

    @property
    def number(self) -> int:
        """The increment of a WINDOW_UPDATE."""
        return int.from_bytes(self.raw[9:13], "big") & 0x7FFFFFFF


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """The bytes of a frame."""
    return FRAME_HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def credit(stream: int, size: int) -> bytes:
    """A WINDOW_UPDATE; nothing for 0 bytes."""
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", size)) if size > 0 else b""


def header_block(headers: Iterable[Tuple[str, str]]) -> bytes:
    """Headers in HPACK, all as literals that are kept in no table, so that they may stand between anybody else's."""
    def text(value: str) -> bytes:
        data = value.encode("latin-1", "replace")
        return (varint(len(data)) if len(data) < 127 else b"\x7f" + varint(len(data) - 127)) + data

    return b"".join(b"\x10" + text(name) + text(value) for name, value in headers)


def header_frames(stream: int, headers: Iterable[Tuple[str, str]], flags: int = 0) -> bytes:
    """HEADERS and as many CONTINUATIONs as the smallest limit of a frame demands."""
    block = header_block(headers)
    parts = [block[at:at + 16384] for at in range(0, len(block), 16384)]
    return b"".join(frame(CONTINUATION if at else HEADERS, (0 if at else flags) | (END_HEADERS if at + 1 == len(parts) else 0), stream, part)
                    for at, part in enumerate(parts))


def grpc_end(stream: int, error: Optional[ApiError], begun: bool = False) -> bytes:
    """The end of a gRPC stream, with an error or without; `begun` when the answer's headers were sent before."""
    headers = [] if begun else [(":status", "200"), ("content-type", "application/grpc")]
    headers.append(("grpc-status", str(GRPC_CODES.get(error.status, 13)) if error else "0"))
    if error:
        headers.append(("grpc-message", urllib.parse.quote(str(error), safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}")))
    return header_frames(stream, headers, END_STREAM)


class Frames:
    """Cuts bytes, as they come, into frames."""

    LIMIT = 1 << 25

    def __init__(self, preface: bytes = b""):
        self.preface = preface
        self.rest = b""

    def feed(self, data: Any) -> List[Frame]:
        """The frames that are complete by now, as views of `data`; ValueError for what is not HTTP/2."""
        data = b"".join((self.rest, data)) if self.rest else data
        found, at = [], 0
        if self.preface:
            if data[:len(self.preface)] != self.preface[:len(data)]:
                raise ValueError("not HTTP/2")
            if len(data) >= len(self.preface):
                found.append(Frame(-1, 0, 0, self.preface))
                at, self.preface = len(self.preface), b""
        view = memoryview(data)
        while not self.preface and len(data) >= at + 9:
            head, flags, stream = FRAME_HEAD.unpack_from(data, at)
            kind, end = head & 255, at + 9 + (head >> 8)
            while kind == HEADERS and not flags & END_HEADERS and len(data) >= end + 9:
                head, more, _ = FRAME_HEAD.unpack_from(data, end)
                flags, end = flags | more & END_HEADERS, end + 9 + (head >> 8)
            if end > len(data) or kind == HEADERS and not flags & END_HEADERS:
                break
            found.append(Frame(kind, flags, stream & 0x7FFFFFFF, view[at:end]))
            at = end
        self.rest = data[at:]
        if len(self.rest) > self.LIMIT:
            raise ValueError("an HTTP/2 header block has no end")
        return found


class Outbox:
    """Bytes that wait to be sent, in the pieces that they came in, so that they are not copied on their way: what is added
    may not change afterwards."""

    # Below this a piece is copied: it may be a small part of something large that it would keep in memory.
    SMALL = 1 << 12
    # As many pieces as go at once; Linux takes 1024.
    MOST = 512

    def __init__(self, first: bytes = b""):
        self.pieces: Deque[Any] = collections.deque()
        self.size = 0
        self += first

    def __iadd__(self, data: Any) -> "Outbox":
        if data:
            self.pieces.append(bytes(data) if len(data) < self.SMALL else memoryview(data))
            self.size += len(data)
        return self

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)

    def clear(self) -> None:
        """Drop everything."""
        self.pieces.clear()
        self.size = 0

    def take(self, count: int) -> List[Any]:
        """The first `count` bytes, taken out, in pieces."""
        found = []
        self.size -= count
        while count:
            piece = self.pieces.popleft()
            if len(piece) > count:
                self.pieces.appendleft(piece[count:])
                piece = piece[:count]
            found.append(piece)
            count -= len(piece)
        return found

    def send(self, sock: socket.socket) -> None:
        """Send what the socket takes at once; its errors, BlockingIOError among them, are the caller's."""
        self.take(sock.sendmsg(itertools.islice(self.pieces, self.MOST)))


class Sender:
    """DATA towards buildkitd, appended to `out` as its windows have room; the rest waits here. Sizes are in bytes."""

    def __init__(self, out: Outbox):
        self.out = out
        self.connection = self.initial = WINDOW
        self.frame_size = 16384
        # Only streams on which more or other data is sent than the client sends: of all others it minds the window.
        self.windows: Dict[int, int] = {}
        self.queues: Dict[int, Outbox] = {}
        self.ending: set = set()
        # What was sent on those streams. The client must not be credited for it a second time.
        self.owed = 0

    @property
    def waiting(self) -> int:
        """How much waits for room."""
        return sum(map(len, self.queues.values())) if self.queues else 0

    def push(self, stream: int, *parts: Any, end: bool = False) -> None:
        """Send data on a stream now or later."""
        queue = self.queues.setdefault(stream, Outbox())
        for each in parts:
            queue += each
        if end:
            self.ending.add(stream)
            if not queue:
                self.out += frame(DATA, END_STREAM, stream)
        self._send(stream, queue)

    def flush(self) -> None:
        """Send what there is room for by now."""
        for stream, queue in list(self.queues.items()):
            self._send(stream, queue)

    def _send(self, stream: int, queue: Outbox) -> None:
        """Put what there is room for into frames."""
        room = min(self.connection, self.windows.get(stream, self.connection), len(queue))
        if room > 0:
            self._cut(stream, queue.take(room), room, END_STREAM if stream in self.ending and not queue else 0)
            self.sent(stream, room)
        if not queue:
            self.ending.discard(stream)
            del self.queues[stream]

    def sent(self, stream: int, size: int) -> None:
        """Take what is sent from the windows."""
        self.connection -= size
        if stream in self.windows:
            self.windows[stream] -= size
            self.owed += size

    def _cut(self, stream: int, pieces: List[Any], left: int, flags: int) -> None:
        """`left` bytes in pieces as frames, the last with `flags`. 30,000 of them are 500 MB: what is done for each counts."""
        full, space = FRAME_HEAD.pack(self.frame_size << 8 | DATA, 0, stream), 0
        for piece in pieces:
            at, end = 0, len(piece)
            while at < end:
                if not space:
                    space = min(left, self.frame_size)
                    left -= space
                    self.out += full if left else FRAME_HEAD.pack(space << 8 | DATA, flags, stream)
                part = piece[at:at + space]
                self.out += part
                at += len(part)
                space -= len(part)

    def settings(self, payload: bytes) -> int:
        """Heed a SETTINGS frame; by how much the window of every stream has changed."""
        change = 0
        for key, value in struct.iter_unpack(">HI", bytes(payload[:len(payload) // 6 * 6])):
            if key == 5:
                self.frame_size = max(16384, value)
            elif key == 4:
                change += value - self.initial
                self.windows = {stream: window + value - self.initial for stream, window in self.windows.items()}
                self.initial = value
        return change

    def forget(self, stream: int) -> int:
        """Drop a stream; how many bytes of the client's own wait no more."""
        left = len(self.queues.pop(stream, b""))
        self.ending.discard(stream)
        return 0 if self.windows.pop(stream, None) is not None else left


class Mould:
    """Messages of one stream, each a field of bytes and a frame of its own, whose heads stand before they have their
    content: what a socket receives between them is sent on as it lies there. A large build context is tens of thousands.

    A message that fits into one frame is unpacked where it lies; for one of more than 32 KB grpc-go (1.84) clears a buffer
    of 1 MB, whatever its size."""

    # A frame's head, gRPC's, the tag, and a length that has three bytes where fewer would do, too.
    HEAD = struct.Struct(">IBIBIBBBB")
    OVERHEAD = HEAD.size - FRAME_HEAD.size
    FRAMES, SPACE = 16, 16384 - OVERHEAD

    def __init__(self, sender: Sender, stream: int, number: int):
        self.sender, self.stream, self.tag = sender, stream, number << 3 | 2
        step = self.HEAD.size + self.SPACE
        self.data = memoryview(bytearray(self.FRAMES * step))
        self.spaces = [self.data[at + self.HEAD.size:at + step] for at in range(0, len(self.data), step)]
        for count in range(self.FRAMES):
            self._head(count, self.SPACE)
        # Which head may be that of a short frame.
        self.last = 0

    def _head(self, count: int, size: int) -> None:
        self.HEAD.pack_into(self.data, count * (self.HEAD.size + self.SPACE), size + self.OVERHEAD << 8 | DATA, 0, self.stream,
                            0, size + 4, self.tag, size & 127 | 128, size >> 7 & 127 | 128, size >> 14)

    @property
    def room(self) -> int:
        """How many bytes may come now: none, before all that came is sent."""
        sender = self.sender
        if sender.out.size or sender.queues:
            return 0
        count, rest = divmod(min(sender.connection, sender.windows[self.stream]), self.OVERHEAD + self.SPACE)
        return max(0, count * self.SPACE + max(0, rest - self.OVERHEAD))

    def spaces_for(self, room: int) -> List[memoryview]:
        """Where up to `room` bytes belong."""
        self._head(self.last, self.SPACE)
        count, rest = divmod(room, self.SPACE)
        if count >= self.FRAMES:
            return self.spaces
        return [*self.spaces[:count], self.spaces[count][:rest]]

    def seal(self, size: int) -> memoryview:
        """The frames of the messages of which `size` bytes have come."""
        self.last = last = (size - 1) // self.SPACE
        self._head(last, size - last * self.SPACE)
        self.sender.sent(self.stream, size + self.OVERHEAD * (last + 1))
        return self.data[:size + self.HEAD.size * (last + 1)]

    def carry(self, source: socket.socket, target: socket.socket) -> bool:
        """Receive what there is room for and send it; what does not go at once is left to `sender.out`. False at the end of
        what comes; OSError of either socket."""
        size = source.recvmsg_into(self.spaces_for(self.room))[0]
        if not size:
            return False
        message = self.seal(size)
        try:
            sent = target.send(message)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent < len(message):
            self.sender.out += message[sent:]
        return True


class Call:
    """One gRPC call as the HTTP/2 client of a connection of its own, without I/O: `out` is to be written to it."""

    WINDOW = 1 << 22
    LONGEST = 1 << 26

    def __init__(self, method: str, headers: Iterable[Tuple[str, str]] = ()):
        self.frames = Frames()
        self.body = bytearray()
        self.received = 0
        self.ended = False
        settings = struct.pack(">HIHI", 2, 0, 4, self.WINDOW)
        # Without an authority or a content type buildkitd refuses the call; with an upper-case name too.
        first = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "localhost"),
                 ("content-type", "application/grpc"), ("te", "trailers")]
        self.out = Outbox(PREFACE + frame(SETTINGS, 0, 0, settings) + credit(0, self.WINDOW - WINDOW))
        self.sender = Sender(self.out)
        self.sender.windows[1] = WINDOW
        self.out += header_frames(1, [*first, *((name.lower(), value) for name, value in headers)])

    def send(self, *parts: Any) -> None:
        """Send a message that is the sum of its parts."""
        self.sender.push(1, struct.pack(">BI", 0, sum(map(len, parts))), *parts)

    def finish(self) -> None:
        """Say that no more messages come."""
        self.sender.push(1, end=True)

    def feed(self, data: bytes) -> List[bytes]:
        """The messages that are complete by now; `ended` is set with the last. ValueError for what is not gRPC."""
        sender = self.sender
        for each in self.frames.feed(data):
            kind = each.kind
            if kind == WINDOW_UPDATE:
                if each.stream:
                    sender.windows[1] += each.number
                else:
                    sender.connection += each.number
            elif kind == DATA:
                self.received += len(each.raw) - 9
                self.body += each.data
            elif kind == PING and not each.flags & ACK:
                self.out += frame(PING, ACK, 0, bytes(each.data))
            elif kind == SETTINGS and not each.flags & ACK:
                sender.settings(each.data)
                self.out += frame(SETTINGS, ACK, 0)
            if each.flags & END_STREAM or kind == RESET:
                self.ended = self.ended or each.ends and each.stream == 1
        if sender.queues:
            sender.flush()
        return self._messages() if self.body else []

    def _messages(self) -> List[bytes]:
        found, at = [], 0
        while len(self.body) >= at + 5:
            end = at + 5 + int.from_bytes(self.body[at + 1:at + 5], "big")
            if self.body[at] or end - at > self.LONGEST:
                raise ValueError("buildkitd sent a message that is compressed or too long")
            if len(self.body) < end:
                break
            with memoryview(self.body) as view:
                found.append(bytes(view[at + 5:end]))
            at = end
        del self.body[:at]
        return found

    def consumed(self) -> None:
        """Make room for more, since what came has been used up."""
        if self.received >= self.WINDOW // 4:
            self.out += credit(0, self.received) + credit(1, self.received)
            self.received = 0


def unary(sock: socket.socket, method: str, message: bytes = b"", headers: Iterable[Tuple[str, str]] = (), timeout: float = 10.0) -> Optional[bytes]:
    """The answer to one message, None when there is none in time. OSError and ValueError when the connection breaks or
    does not speak gRPC."""
    call, deadline = Call(method, headers), time.monotonic() + timeout
    call.send(message)
    call.finish()
    while not call.ended:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        sock.sendall(bytes(call.out))
        call.out.clear()
        data = sock.recv(BLOCK)
        messages = call.feed(data)
        if messages:
            return messages[0]
        if not data:
            break
    return None


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


# What BuildKit calls the container of a step; nobody else gives such ids.
BUILD_STEP = re.compile(r"[0-9a-z]{25}")


def parse_event(line: str, namespace: str) -> Optional[ContainerdEvent]:
    """A line of `nerdctl events --format {{json .}}`; None for an empty line, for other namespaces and for the steps of a
    build that is under way."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
        if row.get("Namespace") != namespace:
            return None
        payload = json.loads(row.get("Event") or "{}") or {}
        event = ContainerdEvent(row["Topic"], nanoseconds_of(row.get("Timestamp") or "") or time.time_ns(), payload)
        return None if BUILD_STEP.fullmatch(event.container) and not payload.get("image") else event
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
    # A listener that is further behind is let go: its client does not read.
    BEHIND = 8192

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
            for each in list(self.queues):
                if each.qsize() >= self.BEHIND:
                    self.queues.remove(each)
                    each.put(ApiError(f"the client is {self.BEHIND} events behind"))
                else:
                    each.put(event)

    @contextlib.contextmanager
    def subscribe(self) -> Iterator[Tuple[List[dict], queue.Queue]]:
        """What is kept, oldest first, and a queue of everything after it. None in the queue means the end, an ApiError that
        it has an end here because nobody read it."""
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
# Snapshot
###############################################################################

# Labels of ours on a container: never shown to clients. The id that clients know a container by, where that is not
# containerd's (a container that was made anew); the create request, in parts of less than 4096 bytes.
LABEL_ID = "nerdctld/id"
LABEL_REQUEST = "nerdctld/request"
# Made without its ports, since another container had them, or without the namespaces of another one that did not run: it
# gets them at its first start.
LABEL_LATER = "nerdctld/later"
# In front of the name of a container while another one takes its place.
ASIDE = "nerdctld-aside."
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
        self.began = 0.0
        self.stamped: Any = None
        # How often it was dropped, now and when what is kept was begun to be read.
        self.drops = 0
        self.read_at = -1

    @property
    def valid(self) -> bool:
        """Whether nothing was dropped since what is kept was begun to be read."""
        return self.read_at == self.drops

    def drop(self) -> None:
        """What is kept is no longer so. Called after a change, also while a read is under way."""
        self.drops += 1

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
            began, drops, stamped = time.monotonic(), self.drops, self.stamp()
            value = self.read()
            self.value, self.began, self.stamped, self.read_at = value, began, stamped, drops
            return value


def sound(request: Dict[str, Any]) -> Dict[str, Any]:
    """A kept create request without what is not of its type, since anybody can write a label: one container must not spoil the
    list of all."""
    def keep(where: Any, **kinds: type) -> Dict[str, Any]:
        for key in [key for key, kind in kinds.items() if not isinstance(where.get(key), kind)]:
            where.pop(key, None)
        for key in [key for key, kind in kinds.items() if kind is list and key in where]:
            where[key] = [each for each in where[key] if isinstance(each, (dict, int) if key in ("Mounts", "ConsoleSize") else str)]
        return where

    keep(request, HostConfig=dict, NetworkingConfig=dict, Labels=dict, ExposedPorts=dict, Healthcheck=dict, Volumes=dict, Env=list)
    host = keep(request.get("HostConfig") or {}, RestartPolicy=dict, LogConfig=dict, Mounts=list, Binds=list, Links=list, NetworkMode=str, ConsoleSize=list)
    keep(host.get("LogConfig") or {}, Config=dict)
    host.update({"Mounts": [each for each in host["Mounts"] if isinstance(each, dict) and isinstance(each.get("Target"), str)]} if "Mounts" in host else {})
    endpoints = keep(request.get("NetworkingConfig") or {}, EndpointsConfig=dict).get("EndpointsConfig") or {}
    for name in [name for name, each in endpoints.items() if not isinstance(each, dict)]:
        endpoints[name] = {}
    for each in endpoints.values():
        keep(each, Aliases=list, Links=list)
    return request


def end_status(status: str, labels: Dict[str, str]) -> str:
    """A status such as `Exited (1) …` as nerdctl's `ps` would word it: `Restarting (1) …` where containerd will start the
    container again by its restart policy. Another status as it is."""
    found = re.match(r"(?:Exited|Restarting)( \((\d+)\).*)", status)
    if not found:
        return status
    name, _, most = (labels.get("containerd.io/restart.policy") or "always").partition(":")
    count = labels.get("containerd.io/restart.count") or ""
    again = labels.get("containerd.io/restart.status") == "running" and (
        name == "always" or name == "unless-stopped" and labels.get("containerd.io/restart.explicitly-stopped") != "true"
        or name == "on-failure" and found.group(2) != "0" and (not int_or_zero(most) or int_or_zero(count) < int_or_zero(most)))
    return ("Restarting" if again else "Exited") + found.group(1)


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

    def with_status(self, status: str) -> "Container":
        """The same with another status, and nothing worked out from the one before."""
        other = copy.copy(self)
        other.status, other.memo, other.read_at = end_status(status, self.labels), {}, time.time()
        return other

    def with_labels(self, labels: Dict[str, str]) -> "Container":
        """The same with other labels, one of which is its name."""
        other = copy.copy(self)
        other.labels, other.name, other.memo, other.status = labels, labels.get("nerdctl/name") or self.name, {}, end_status(self.status, labels)
        return other

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
    def request(self) -> Dict[str, Any]:
        """The create request that it was made with, {} for one that others made."""
        if "request" not in self.memo:
            parts = itertools.takewhile(lambda part: part is not None, (self.labels.get(f"{LABEL_REQUEST}.{number}") for number in itertools.count())) \
                if LABEL_REQUEST + ".0" in self.labels else ()
            found = None
            with contextlib.suppress(ValueError):
                found = json.loads("".join(parts) or "{}")
            self.memo["request"] = Fields(sound(found) if isinstance(found, dict) else {})
        return self.memo["request"]

    @property
    def host_config(self) -> Dict[str, Any]:
        """The HostConfig of that request."""
        return self.request.get("HostConfig") or {}

    @property
    def visible_labels(self) -> Dict[str, str]:
        """The labels a client set."""
        asked = self.request.get("Labels")
        # containerd drops those without a value.
        empty = {key: value for key, value in asked.items() if value == ""} if isinstance(asked, dict) else {}
        return {**empty, **{key: value for key, value in self.labels.items() if not key.startswith(HIDDEN_LABELS)}}

    @property
    def folder(self) -> str:
        """Where nerdctl keeps what belongs to it (log, hosts, lifecycle), "" when unknown."""
        return self.labels.get("nerdctl/state-dir") or ""


CONTAINER_ROW = "[{{json .}},{{json .LabelsMap}}]"


def steadily(read: Callable[[], List[Any]]) -> List[Any]:
    """What `read` has of a listing of containers. nerdctl fails as a whole when any of them goes while it lists, so it is
    asked again then."""
    for _ in range(10):
        with contextlib.suppress(NotFound):
            return read()
    return read()


def parse_containers(rows: List[Any]) -> Dict[str, Container]:
    """Rows of `ps --no-trunc --format CONTAINER_ROW` as real id -> Container, newest first, without the steps of builds."""
    return {row["ID"]: Container(row, labels) for row, labels in rows
            if row.get("ID") and (row.get("Image") or not BUILD_STEP.fullmatch(row["ID"]))}


class ContainerTable:
    """All containers by real id. Containers that events or writes named are read anew one by one, or all together when
    that is cheaper."""

    FEW = 1
    # Whoever asks while containers come and go without end is not kept for ever.
    ROUNDS = 20

    def __init__(self, nerdctl: Nerdctl, feed: EventFeed):
        self.nerdctl = nerdctl
        self.feed = feed
        # Real id -> when it was marked as changed; taken out only after it was read, so that nobody is given what was before.
        self.changed: Dict[str, int] = {}
        self.marks = itertools.count(1)
        self.unlabelled = False
        self.whole = Cached(self._read_all, lambda: feed.live)
        self.lock = threading.Lock()
        self.patching = threading.Lock()
        self.patched: Dict[str, str] = {}
        self.gone: Dict[str, None] = {}
        # Containers that are being made anew under the same id: shown as they were for as long as there is none.
        self.ghosts: Dict[str, Container] = {}
        # Those whose place another one takes, or has taken: shown to nobody.
        self.asides: Dict[str, Container] = {}
        # Set once all of them have been read.
        self.read = threading.Event()

    def drop(self, real: str = "") -> None:
        """One container is no longer as it was, or any may be."""
        if real:
            self.changed[real] = next(self.marks)
        else:
            self.whole.drop()

    def get(self) -> Dict[str, Container]:
        """All containers as they are now, by real id, newest first."""
        table = self._get()
        if self.ghosts:
            there = {each.id for each in table.values()}
            table = {**{each.real: each for each in list(self.ghosts.values()) if each.id not in there}, **table}
        return table

    def known(self) -> Dict[str, Container]:
        """All containers as events and our own writes tell of them: ids, names and states are right, something else may not
        be so yet, and one that somebody else made may not be there. Costs no process while the feed is live."""
        if self.feed.live and self.whole.valid and not self.ghosts:
            self.feed.keep()
            return self.whole.value
        return self.get()

    def patch(self, real: str, status: str = "", labels: Optional[Dict[str, str]] = None) -> None:
        """The state or the labels of a container have changed so; its row is still to be read anew."""
        with self.patching:
            if status:
                self.patched[real] = status
            table = self.whole.value
            if table and real in table:
                now = table[real].with_labels(labels) if labels else table[real]
                self.whole.value = {**table, real: now.with_status(status) if status else now}
        self.changed[real] = next(self.marks)

    def add(self, container: Container) -> None:
        """A container was made, of which not everything is known yet."""
        with self.patching:
            if self.whole.value is not None:
                self.whole.value = {container.real: container, **self.whole.value}
        self.changed[container.real] = next(self.marks)

    def remove(self, real: str) -> None:
        """A container is gone for good; a reading that is under way may still have it."""
        with self.patching:
            self.gone[real] = None
            if len(self.gone) > 4096:
                self.gone.pop(next(iter(self.gone)))
            if self.whole.value is not None:
                self.whole.value = {key: each for key, each in self.whole.value.items() if key != real}
        self.changed.pop(real, None)

    def _settled(self, table: Dict[str, Container]) -> Dict[str, Container]:
        """What was read, with what events told while it was."""
        self.asides.update({real: each for real, each in table.items() if each.name.startswith(ASIDE)})
        found = {real: each for real, each in table.items() if real not in self.gone and not each.name.startswith(ASIDE)}
        for real, status in self.patched.items():
            if real in found:
                found[real] = found[real].with_status(status)
        return found

    def _get(self) -> Dict[str, Container]:
        self.feed.keep()
        if not self.changed and self.whole.fresh():
            return self.whole.value
        asked = time.monotonic()
        with self.lock:
            if len(self.changed) > self.FEW:
                self.whole.drop()
            self.whole.get(asked)
            with self.patching:
                self.whole.value = self._settled(self.whole.value)
            for _ in range(self.ROUNDS):
                marked = list(self.changed.items())
                if not marked:
                    break
                real, mark = marked[0]
                self.patched.pop(real, None)
                try:
                    found = self._read_one(real)
                except BaseException:
                    self.whole.drop()
                    raise
                with self.patching:
                    self.whole.value = self._settled(self._with(self.whole.value, real, found))
                self._unmark([(real, mark)])
            return self.whole.value

    def _read_all(self) -> Dict[str, Container]:
        marked = list(self.changed.items())
        self.patched.clear()
        found = parse_containers(self._steady_rows())
        with self.patching:
            found = self._settled(found)
        self._unmark(marked)
        self.read.set()
        return found

    def _unmark(self, marked: List[Tuple[str, int]]) -> None:
        """These were read, and need it no more unless they were marked again meanwhile."""
        for real, mark in marked:
            if self.changed.get(real) == mark:
                self.changed.pop(real, None)

    def _steady_rows(self, *options: str) -> List[Any]:
        return steadily(lambda: self._rows(*options))

    def _rows(self, *options: str) -> List[Any]:
        arguments = ("ps", "-a", "--no-trunc", *options, "--format")
        if not self.unlabelled:
            try:
                return self.nerdctl.rows(*arguments, CONTAINER_ROW)
            except ApiError as error:
                if "LabelsMap" not in str(error):
                    raise
                self.unlabelled = True
        # nerdctl 1.7 has the labels of `ps` only as a string that cannot be taken apart for sure.
        rows = self.nerdctl.rows(*arguments, "{{json .}}")
        names = [row["ID"] for row in rows]
        told = self.nerdctl.rows("container", "inspect", "--mode=native", "--format", "[{{json .ID}},{{json .Labels}}]", "--", *names) if names else []
        labels = dict(told)
        return [(row, labels.get(row["ID"])) for row in rows]

    def _read_one(self, real: str) -> Optional[Container]:
        return parse_containers(self._steady_rows("--filter", "id=" + real)).get(real)

    def _with(self, table: Dict[str, Container], real: str, found: Optional[Container]) -> Dict[str, Container]:
        result = dict(table)
        if found is None:
            result.pop(real, None)
        elif real in result:
            result[real] = found
        else:
            result = dict(sorted({**result, real: found}.items(), key=lambda item: -item[1].created))
        return result


class Image(NamedTuple):
    """One name of an image: `name` in full, with registry and tag or digest, as containerd has it; `id` the digest of its
    target, which is the id clients see."""

    name: str
    id: str


# What nerdctl's push makes for itself and takes away again.
REDUCED = "-tmp-reduced-platform"


class ImageChange:
    """A change of our own to images: how many events containerd told of each name since it began, and, as nerdctl says,
    what each name stands for after it."""

    def __init__(self) -> None:
        self.events: collections.Counter = collections.Counter()
        self.after: Dict[str, Tuple[str, int]] = {}

    def became(self, name: str, identity: str, events: int = 1) -> None:
        """A name stands for this digest now, or for nothing when it is ""; nerdctl changed it so many times."""
        self.after[name] = (identity, events)

    def touched(self, name: str) -> None:
        """A name may stand for something else now."""
        self.after[name] = ("", 0)


class ImageTable:
    """All names of images, in the order of the names. Those that events or writes named are read anew by themselves, or all
    together when that is cheaper; what a write of our own made of a name needs no reading, when the events that came of
    it are just as many as that write makes: then nobody else changed the name meanwhile."""

    FEW = 8
    ROUNDS = 20
    # How long the events of a write that has ended are waited for, in seconds.
    LATE = 0.1

    def __init__(self, read: Callable[[], List[Image]], inspect: Callable[[List[str]], List[Image]], feed: EventFeed):
        self.inspect = inspect
        self.feed = feed
        self.whole = Cached(lambda: self._read_all(read), lambda: feed.live)
        # Name -> when it was marked as changed; taken out only after it was read.
        self.changed: Dict[str, int] = {}
        self.marks = itertools.count(1)
        self.edits = 0
        self.changes: List[ImageChange] = []
        self.lock = threading.Lock()
        self.told = threading.Condition()

    def drop(self) -> None:
        """Any name may have changed."""
        self.whole.drop()

    def fresh(self) -> bool:
        """Whether what is known is so."""
        return not self.changed and self.whole.fresh()

    def stamp(self) -> Tuple:
        """The same as long as nothing has changed."""
        return self.whole.began, self.edits

    def get(self) -> List[Image]:
        """All names as they are now."""
        self.feed.keep()
        if self.fresh():
            return list(self.whole.value.values())
        asked = time.monotonic()
        with self.lock:
            if len(self.changed) > self.FEW:
                self.whole.drop()
            self.whole.get(asked)
            for _ in range(self.ROUNDS):
                marked = dict(self.changed)
                if not marked:
                    break
                self._read_some(marked)
            return list(self.whole.value.values())

    def last(self, name: str) -> str:
        """The id that a name was last known to stand for, "" for none."""
        known = (self.whole.value or {}).get(name)
        return known.id if known else ""

    def on_event(self, topic: str, name: str) -> None:
        """Note what containerd tells of a name."""
        if name.endswith(REDUCED):
            return
        with self.told:
            for change in self.changes:
                change.events[name] += 1
            if not name:
                self.whole.drop()
            elif topic != "/images/delete" or not self._put(name, ""):
                self.changed[name] = next(self.marks)
            self.told.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[ImageChange]:
        """Context of a write of our own. Whoever reads after it sees it; what it did not tell of makes everything read anew."""
        change = ImageChange()
        with self.told:
            self.changes.append(change)
        whole = False
        try:
            yield change
            whole = bool(change.after) and self.feed.live
        finally:
            with self.told:
                if whole:
                    self.told.wait_for(lambda: all(change.events[name] >= count for name, (_, count) in change.after.items()), self.LATE)
                    self._settle(change)
                else:
                    self.whole.drop()
                self.changes.remove(change)

    def _settle(self, change: ImageChange) -> None:
        for name, (identity, count) in change.after.items():
            if count and change.events[name] == count and self._put(name, identity):
                self.changed.pop(name, None)
            else:
                self.changed[name] = next(self.marks)

    def _put(self, name: str, identity: str) -> bool:
        """Note what a name stands for; False while somebody reads, who may have read it before."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            if self.whole.value is not None:
                self._replace({name: identity})
            return True
        finally:
            self.lock.release()

    def _replace(self, after: Dict[str, str]) -> None:
        names = {**{name: image.id for name, image in self.whole.value.items()}, **after}
        self.whole.value = {name: Image(name, names[name]) for name in sorted(names) if names[name]}
        self.edits += 1

    def _read_all(self, read: Callable[[], List[Image]]) -> Dict[str, Image]:
        marked = dict(self.changed)
        found = {image.name: image for image in sorted(read())}
        self._unmark(marked)
        return found

    def _read_some(self, marked: Dict[str, int]) -> None:
        found = {image.name: image.id for image in self.inspect(sorted(marked))}
        if all(name in found for name in marked):
            self._replace({name: found[name] for name in marked})
            self._unmark(marked)
        else:
            # It is gone, or its content is.
            self.whole.drop()
            self.whole.get()

    def _unmark(self, marked: Dict[str, int]) -> None:
        with self.told:
            for name, mark in marked.items():
                if self.changed.get(name) == mark:
                    del self.changed[name]


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
        # What nerdctl leaves of an image that was removed by force under a running container has no name.
        if name != ":" and not name.endswith(REDUCED):
            found.setdefault(name, Image(name, row.get("Digest") or row.get("ID") or ""))
    return list(found.values())


# Names that stand for none: of nerdctl's load, of BuildKit, of Kubernetes (`sha256:…`, the digest of the configuration), and
# our own for imports and commits without one. containerd keeps no image without a name.
WORKING_NAME = "nerdctld.invalid/"
NAMELESS = (WORKING_NAME, "import/", "moby-dangling/", "sha256:", "sha256/")


def is_nameless(name: str) -> bool:
    """Whether a name in containerd is none that people would know."""
    return name.endswith(REDUCED) or (name.partition("@")[0] + "/").startswith(NAMELESS) or name.startswith(NAMELESS)


def with_health_check(told: Dict[str, Any]) -> Dict[str, Any]:
    """An image's configuration with the health check that nerdctl keeps as a label, since OCI has no field for it."""
    config = told.get("config") or {}
    if "nerdctl/healthcheck" not in (config.get("Labels") or {}):
        return told
    labels = dict(config["Labels"])
    with contextlib.suppress(ValueError):
        return {**told, "config": {**config, "Healthcheck": json.loads(labels.pop("nerdctl/healthcheck")), "Labels": labels}}
    return told


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
        return with_health_check(self.detail.get("ImageConfig") or {})

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
    return sha256(f"nerdctld network {name}".encode()).hexdigest()


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
        "Internal": driver == "bridge" and not plugin.get("isGateway"), "Attachable": False, "Ingress": False,
        "ConfigFrom": {"Network": ""}, "ConfigOnly": False, "Options": options,
        "Labels": {key: value for key, value in labels.items() if not key.startswith(HIDDEN_LABELS)},
    }


ANONYMOUS = "com.docker.volume.anonymous"


def parse_volume(row: Dict[str, Any]) -> Dict[str, Any]:
    """A row of `volume inspect` as Docker shows a volume. Those that nerdctl made for a container carry no label, but a
    name that nobody would type."""
    labels, options = row.get("Labels") or {}, None
    if not labels and re.fullmatch(r"[0-9a-f]{64}", row.get("Name") or ""):
        labels = {ANONYMOUS: ""}
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


def config_folder(name: str) -> str:
    """A folder of configuration, for the user this daemon runs as."""
    base = "/etc" if os.geteuid() == 0 else os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, name)


@functools.lru_cache(maxsize=None)
def nerdctl_settings() -> Dict[str, str]:
    """The texts that nerdctl's own configuration file sets: address, namespace, data_root, cni_netconfpath and others. {}
    where there is none; one that nerdctl cannot read it complains of itself."""
    found = {}
    with contextlib.suppress(OSError):
        with open(os.environ.get("NERDCTL_TOML") or os.path.join(config_folder("nerdctl"), "nerdctl.toml"), encoding="utf-8", errors="replace") as file:
            for key, _, value in re.findall(r"""^\s*(\w+)\s*=\s*(["'])([^"'\\]*)\2\s*(?:#.*)?$""", file.read(), re.MULTILINE):
                found[key] = value
    return found


def cni_folder() -> str:
    """Where nerdctl keeps networks."""
    return os.environ.get("NETCONFPATH") or nerdctl_settings().get("cni_netconfpath") or config_folder("cni/net.d")


def data_root() -> str:
    """Where nerdctl keeps its data, for the user this daemon runs as."""
    base = "/var/lib" if os.geteuid() == 0 else os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return nerdctl_settings().get("data_root") or os.path.join(base, "nerdctl")


def kept_networks(*folders: str) -> List[Dict[str, Any]]:
    """The networks that nerdctl keeps in these folders, as `network inspect --mode=native` tells them but for their members.
    OSError or ValueError for what cannot be read from here, or is none."""
    rows = []
    for folder in folders:
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            path = os.path.join(folder, name)
            if not name.endswith((".conf", ".conflist", ".json")) or os.path.isdir(path):
                continue
            with open(path, "rb") as file:
                native = json.load(file)
            if not (isinstance(native, dict) and isinstance(native.get("name"), str) and isinstance(native.get("plugins"), list)):
                raise ValueError(path)
            identity = native.get("nerdctlID")
            rows.append({"CNI": native, "NerdctlID": identity if isinstance(identity, str) else None, "File": path})
    return rows


class Snapshot:
    """What reads are answered from: filled from nerdctl when asked, dropped by events and by our own writes. Nothing is
    kept while the event feed is not live."""

    AGE = 5.0

    def __init__(self, nerdctl: Nerdctl, feed: EventFeed):
        self.nerdctl = nerdctl
        self.feed = feed
        self.containers = ContainerTable(nerdctl, feed)
        self.names = ImageTable(self._read_images, self._inspect_images, feed)
        self.groups = Cached(self._group_images, self.names.fresh, self.names.stamp)
        self.details: Dict[str, Dict[str, Any]] = {}
        # Images whose content is not here, and when that was seen.
        self.hollow: Dict[str, float] = {}
        self.version = Cached(self._read_version, lambda: self._recent(self.version))
        self.info = Cached(self._read_info, lambda: self._recent(self.info))
        self.networks = Cached(self._read_networks, lambda: True, self._network_stamp)
        self.volumes = Cached(self._read_volumes, lambda: True, self._volume_stamp)

    def _network_stamp(self) -> Any:
        """Changes whenever nerdctl beside us changes a network; never the same twice where that cannot be seen."""
        folder = cni_folder()
        stamp = modified(folder, os.path.join(folder, self.nerdctl.namespace))
        return stamp if stamp[0] and self.nerdctl.local else object()

    @property
    def store(self) -> str:
        """nerdctl's own folder for this containerd: the hash of its address is in the name."""
        address = self.nerdctl.address.replace("unix://", "", 1) or "/run/containerd/containerd.sock"
        return os.path.join(data_root(), sha256(os.path.realpath(address).encode()).hexdigest()[:8])

    def _volume_stamp(self) -> Any:
        """The same for volumes."""
        stamp = modified(os.path.join(self.store, "volumes", self.nerdctl.namespace))
        return stamp if stamp[0] and self.nerdctl.local else object()

    def _read_networks(self) -> Dict[str, Dict[str, Any]]:
        """Docker-shaped networks by name; bridge, host and none are always among them."""
        found = {each["Name"]: each for each in map(parse_network, self._network_rows())}
        for name in ("bridge", "host", "none"):
            found.setdefault(name, parse_network({"CNI": {"name": name}}))
        return {name: found[name] for name in sorted(found)}

    def _network_rows(self) -> List[Dict[str, Any]]:
        folder = cni_folder()
        if self.nerdctl.keeps and os.path.isdir(folder):
            # nerdctl's own `network inspect` inspects every container that runs in one, 13 ms each.
            with contextlib.suppress(OSError, ValueError):
                return kept_networks(folder, os.path.join(folder, self.nerdctl.namespace))
        names = [row["Name"] for row in self.nerdctl.rows("network", "ls", "--format", "{{json .}}")
                 # These two are nothing but names, and nerdctl 1.7 refuses to inspect them.
                 if row.get("Name") not in (None, "", "host", "none")]
        return self.nerdctl.rows("network", "inspect", "--mode=native", "--format", "{{json .}}", "--", *names) if names else []

    def _read_volumes(self) -> Dict[str, Dict[str, Any]]:
        """Docker-shaped volumes by name."""
        names = [row["Name"] for row in self.nerdctl.rows("volume", "ls", "--format", "{{json .}}") if row.get("Name")]
        if not names:
            return {}
        return {each["Name"]: each for each in map(parse_volume, self.nerdctl.rows("volume", "inspect", "--format", "{{json .}}", "--", *names))}

    # What sends no event is believed for a short time.
    def _recent(self, kept: Cached) -> bool:
        return time.monotonic() - kept.began < self.AGE

    def _read_version(self) -> Dict[str, Any]:
        rows = self.nerdctl.rows("version", "--format", "{{json .}}", timeout=10)
        return rows[0] if rows else {}

    def _read_info(self) -> Dict[str, Any]:
        rows = self.nerdctl.rows("info", "--format", "{{json .}}", timeout=20)
        return rows[0] if rows else {}

    def _read_images(self) -> List[Image]:
        return parse_images(self.nerdctl.rows("images", "--no-trunc", "--format", "{{json .}}"))

    def _group_images(self) -> Dict[str, ImageGroup]:
        groups: Dict[str, ImageGroup] = {}
        for image in self.names.get():
            groups.setdefault(image.id, ImageGroup(image.id)).names.append(image.name)
        soon = time.monotonic() - self.AGE
        self._read_details([group for identity, group in groups.items() if identity not in self.details and self.hollow.get(identity, 0.0) < soon])
        self.details = {identity: self.details[identity] for identity in groups if identity in self.details}
        self.hollow = {identity: self.hollow[identity] for identity in groups if identity in self.hollow}
        for identity, group in groups.items():
            group.detail = self.details.get(identity, {})
        return groups

    def _read_details(self, groups: List[ImageGroup]) -> None:
        """What is behind a digest never changes, so it is read once."""
        for start in range(0, len(groups), 50):
            part = groups[start:start + 50]
            self._inspect_images([group.names[0] for group in part])
            missing = [group for group in part if group.id not in self.details]
            for group in missing if len(part) > 1 else ():
                self._inspect_images(group.names[:1])
        self.hollow.update({group.id: time.monotonic() for group in groups if group.id not in self.details})

    def _inspect_images(self, names: List[str]) -> List[Image]:
        """Read the details of images; what these names stand for (and the other names of the same images), without those
        that are gone or whose content is."""
        output = self.nerdctl.output("image", "inspect", "--mode=native", "--format", "{{json .}}", "--", *names)
        found = []
        for line in output.stdout.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                image = Image(entry["Image"]["Name"], entry["Image"]["Target"]["digest"])
                self.details[image.id] = entry
                found.append(image)
        return found

    def on_event(self, event: Optional[ContainerdEvent]) -> None:
        """Drop what an event of containerd makes untrue; everything when the feed begins or breaks."""
        if event is None:
            self.containers.drop()
            self.names.drop()
        elif event.topic.startswith("/images/"):
            self.names.on_event(event.topic, event.payload.get("name") or "")
        elif event.container and not event.topic.startswith("/tasks/exec-"):
            status = {"/tasks/start": "Up", "/tasks/paused": "Paused", "/tasks/resumed": "Up"}.get(event.topic)
            if event.topic == "/tasks/exit":
                if event.payload.get("id") not in (None, "", event.container):
                    return
                status = f"Exited ({event.payload.get('exit_status') or 0}) Less than a second ago"
            if event.topic == "/containers/delete":
                self.containers.remove(event.container)
            elif status or event.topic == "/containers/update":
                self.containers.patch(event.container, status or "", typed(event.payload.get("labels"), dict, "labels"))
            else:
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
        return self._choose(self.containers.get(), name)

    def find(self, name: str) -> Container:
        """The same for something to be done to it: whatever is named by its whole id or its name needs no new reading,
        since its state is known from events."""
        wanted = name.lstrip("/")
        found = [each for each in self.containers.known().values() if wanted in (each.id, each.name)] if wanted else []
        return found[0] if len(found) == 1 else self.container(name)

    def _choose(self, table: Dict[str, Container], name: str) -> Container:
        wanted = name.lstrip("/")
        if not wanted:
            raise BadParameter("invalid container name or ID: value is empty")
        prefixed = []
        for each in table.values():
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


class Tasks:
    """What events tell of the starts and ends of containers, in the order of a count, for those who wait for them."""

    KEPT = 4096
    # How long the event of what nerdctl has done may take, and the end of what was killed; in seconds.
    LATE, DYING = 2.0, 5.0

    def __init__(self, feed: EventFeed, snapshot: Snapshot):
        self.feed = feed
        self.snapshot = snapshot
        self.condition = threading.Condition()
        self.count = 1
        self.starts: Dict[str, int] = {}
        self.execs: Dict[str, int] = {}
        self.ends: Dict[str, Tuple[int, int]] = {}
        self.reals: Dict[str, str] = {}
        # The count when something may have happened that no event told of.
        self.missed = 0
        feed.listeners.append(self.on_event)

    def now(self) -> int:
        """The count as it stands."""
        return self.count

    def wake(self) -> None:
        """Let everyone look again."""
        with self.condition:
            self.count += 1
            self.condition.notify_all()

    def on_event(self, event: Optional[ContainerdEvent]) -> None:
        """Note an event of the feed."""
        with self.condition:
            self.count += 1
            if event is None:
                self.missed = self.count
            else:
                if event.topic == "/tasks/start":
                    self._note(self.starts, event.container, self.count)
                elif event.topic == "/tasks/exec-started":
                    self._note(self.execs, event.container, self.count)
                elif event.topic == "/tasks/exit" and event.payload.get("id") in (None, "", event.container):
                    self._note(self.ends, event.container, (self.count, event.payload.get("exit_status") or 0))
            self.condition.notify_all()

    def failed(self, real: str, status: int) -> None:
        """A container could not be started, or its end was not told: for those who wait, it ended with this status."""
        with self.condition:
            self.count += 1
            self._note(self.ends, real, (self.count, status))
            self.condition.notify_all()

    def rename(self, identity: str, real: str) -> None:
        """The container that clients know by an id is another one now."""
        with self.condition:
            if self.reals.get(identity) != real:
                self._note(self.reals, identity, real)
                self.count += 1
                self.condition.notify_all()

    def _note(self, table: Dict[str, Any], key: str, value: Any) -> None:
        table.pop(key, None)
        table[key] = value
        if len(table) > self.KEPT:
            table.pop(next(iter(table)))

    def started_since(self, real: str, count: int, wait: float = 0.0) -> bool:
        """Whether a container was started after the count stood so, or is within `wait` seconds."""
        with self.condition:
            return bool(self.condition.wait_for(lambda: self.starts.get(real, 0) > count, wait))

    def ended_since(self, real: str, count: int, wait: float = 0.0) -> bool:
        """Whether a container has ended after the count stood so, or does within `wait` seconds."""
        with self.condition:
            return bool(self.condition.wait_for(lambda: self.ends.get(real, (0, 0))[0] > count, wait))

    def exec_since(self, real: str, count: int) -> bool:
        """Whether a command in a container was started after the count stood so."""
        return self.execs.get(real, 0) > count

    def wait(self, container: Container, condition: str, since: int, gone: Callable[[], bool]) -> Optional[int]:
        """Wait as `POST /containers/{id}/wait` says; the exit status, None when there is nobody to be told."""
        began, failures = time.time_ns(), 0
        while not gone():
            seen = self.count
            try:
                status = self._status(container, condition, since, began)
                failures = 0
            except ApiError:
                # Too late for another answer than the status: a nerdctl that fails once on a busy machine is asked again.
                failures += 1
                if failures > 20:
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

    def _look(self, container: Container) -> Optional[Container]:
        return next((each for each in self.snapshot.containers.get().values() if each.id == container.id), None)

    def _last_end(self, container: Container, condition: str, since: int) -> Optional[Tuple[int, int]]:
        """The end that events have told of and that meets the condition: its place in the count and the exit status."""
        ends = [self.ends[real] for real in (container.real, self.reals.get(container.id, "")) if real in self.ends]
        last = max((end for end in ends if end[0] > since), default=None)
        if last is None and condition == "not-running" and "containerd.io/restart.policy" not in container.labels:
            # It has ended already, and was not started again.
            begun = max(self.missed, *(self.starts.get(real, 0) for real in (container.real, self.reals.get(container.id, ""))))
            last = max((end for end in ends if end[0] > begun), default=None)
        return last

    def _status(self, container: Container, condition: str, since: int, began: int) -> Optional[int]:
        """The exit status if the condition is met."""
        last = self._last_end(container, condition, since)
        if last and condition != "removed":
            return last[1]
        now = self._look(container)
        if now is None and container.real not in self.snapshot.containers.gone:
            # nerdctl's list now and then leaves a container out while its task begins or ends.
            time.sleep(0.1)
            self.snapshot.containers.drop()
            now = self._look(container)
        if now is None:
            # It may have ended, and been removed, while it was looked for.
            with self.condition:
                self.condition.wait_for(lambda: self._last_end(container, condition, since), 1.0 if self.feed.live else 0.0)
                last = self._last_end(container, condition, since)
            return last[1] if last else 0
        if condition == "removed" or now.running or now.state == "restarting":
            return None
        try:
            task = ((self.snapshot.detail(now).get("Task") or {}).get("Status")) or {}
        except NotFound:
            # It went meanwhile, or is being made anew: to be looked at again.
            return None
        if condition == "not-running" or (nanoseconds_of(task.get("ExitTime") or "") or 0) > began:
            return task.get("ExitStatus") or 0
        return None


class Engine:
    """What handlers share: nerdctl, the event feed, Docker's events and the snapshot."""

    def __init__(self, nerdctl: Nerdctl):
        self.nerdctl = nerdctl
        self.workspace = Workspace()
        self.feed = EventFeed(nerdctl)
        self.journal = Journal()
        self.snapshot = Snapshot(nerdctl, self.feed)
        self.started = time.time()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.tasks = Tasks(self.feed, self.snapshot)
        # By the ids that clients know: what holds a container's streams, and who waits for its start.
        self.sessions: Dict[str, Any] = {}
        self.waiting: Dict[str, List[Any]] = {}
        self.execs: Dict[str, Any] = {}
        # Containers that files were copied into, that are being made anew, that are being restarted.
        self.touched: set = set()
        # Containers that ended and were taken out of networks then, and which these are.
        self.apart: Dict[str, set] = {}
        # Ports of the host that were given to containers lately: the rows of `ps` may not tell them yet.
        self.picked: collections.deque = collections.deque(maxlen=256)
        self.replaced: Dict[str, str] = {}
        self.restarts: collections.Counter = collections.Counter()
        self.caretaker: Any = None
        self.hosts = Hosts(self)
        self.quiet: collections.Counter = collections.Counter()
        self.known: Dict[str, Tuple[str, Dict[str, str]]] = {}
        # What events that are kept tell of containers that were removed.
        self.departed: Dict[str, Tuple[str, Dict[str, str]]] = {}
        self.begun: Dict[str, int] = {}
        # Containers behind an id that clients know by another: their making and going is no event.
        self.hidden: Dict[str, None] = {}
        # Real ids of containers that are being stopped. One event is told after the other, also by handlers.
        self.stopping: set = set()
        self.telling = threading.RLock()
        self.feed.listeners.append(self.on_event)

    def busy(self) -> bool:
        """Whether something depends on the daemon although no request is running."""
        return self.feed.needs > 0 or bool(self.sessions) or any(each.running for each in list(self.execs.values()))

    def leave_session(self, identity: str, session: Any) -> None:
        """A session holds a container's streams no more; one that came after it stays."""
        with self.lock:
            if self.sessions.get(identity) is session:
                del self.sessions[identity]

    def hang_up(self) -> None:
        """The daemon is about to end: those who only follow something are let go."""
        self.closing.set()
        self.journal.close()
        self.tasks.wake()
        with self.lock:
            clients = [each for waiting in self.waiting.values() for each in waiting]
            clients += [each for session in self.sessions.values() for each in session.attachments]
        for each in clients:
            each.leave()

    def close(self) -> None:
        """End everything that was started and remove every temporary file."""
        self.hang_up()
        self.feed.close()
        self.nerdctl.end_all()
        self.workspace.remove()

    @contextlib.contextmanager
    def changing_images(self) -> Iterator[ImageChange]:
        """Context of our own change to images, which is told what it made of their names: what containerd says meanwhile is
        told by the handler in Docker's words."""
        self._count(self.quiet, "images", 1)
        try:
            with self.snapshot.names.changing() as change:
                yield change
        finally:
            # The events of the change itself come a little later.
            timer = threading.Timer(0.3, self._count, (self.quiet, "images", -1))
            timer.daemon = True
            timer.start()

    def _count(self, counter: collections.Counter, key: str, more: int) -> None:
        """Change a count that several threads change; what is 0 is not in it."""
        with self.lock:
            counter[key] += more
            if not counter[key]:
                del counter[key]

    @contextlib.contextmanager
    def changing(self, container: Container) -> Iterator[None]:
        """Context of our own change to a container: whoever reads after it sees it."""
        try:
            yield
        finally:
            self.snapshot.containers.drop(container.real)

    def add_waiting(self, identity: str, attachment: Any) -> None:
        """A client waits for the start of a container."""
        with self.lock:
            self.waiting.setdefault(identity, []).append(attachment)

    def leave_waiting(self, identity: str, attachment: Any) -> None:
        """It waits no more."""
        with self.lock:
            left = [each for each in self.waiting.pop(identity, []) if each is not attachment]
            if left:
                self.waiting[identity] = left

    def take_waiting(self, identity: str) -> List[Any]:
        """Those who wait for the start of a container and are still there, for the one who starts it."""
        with self.lock:
            return [each for each in self.waiting.pop(identity, []) if not each.gone]

    @contextlib.contextmanager
    def replacing(self, container: Container) -> Iterator[None]:
        """Context in which a container is made anew under the id that clients know: for them it is there all the time."""
        with self.lock:
            if container.id in self.replaced:
                raise Conflict(f"container {container.id} is being started already")
            self.replaced[container.id] = container.real
        self.snapshot.containers.ghosts[container.id] = container
        self.hidden[container.real] = None
        try:
            yield
        finally:
            self.snapshot.containers.ghosts.pop(container.id, None)
            self.replaced.pop(container.id, None)

    @contextlib.contextmanager
    def restarting(self, container: Container) -> Iterator[None]:
        """Context of a restart, in which the end of a container is not the end of it."""
        self._count(self.restarts, container.id, 1)
        try:
            yield
        finally:
            self._count(self.restarts, container.id, -1)

    def hold_if_needed(self, container: Container) -> None:
        """A container is about to start: somebody has to look after it."""
        if self.caretaker:
            self.caretaker.hold(container)

    def forget(self, container: Container) -> None:
        """A container was removed."""
        self.touched.discard(container.id)
        self.apart.pop(container.id, None)
        with self.lock:
            self.departed[container.real] = self.actor(container)
            for real in list(self.departed)[:-Journal.KEPT]:
                del self.departed[real]
            for identity in [each.id for each in self.execs.values() if each.container.id == container.id]:
                self.execs.pop(identity, None)

    def actor(self, container: Container, **more: str) -> Tuple[str, Dict[str, str]]:
        """Id and attributes of a container in an event: its labels, image and name."""
        return container.id, {**container.visible_labels, "image": container.image, "name": container.name, **more}

    def tell(self, container: Container, action: str, **more: str) -> None:
        """Emit an event of a container."""
        with self.telling:
            identity, attributes = self.actor(container)
            if not container.runtime:
                # Just made, and not read yet.
                attributes = self.known.get(container.real, (identity, attributes))[1]
            self.journal.emit("container", action, identity, {**attributes, **more})

    @contextlib.contextmanager
    def being_stopped(self, container: Container, number: int) -> Iterator[None]:
        """Context in which a container is sent a signal, and another one if it goes on."""
        self.tell(container, "kill", signal=str(number))
        self.stopping.add(container.real)
        try:
            yield
        finally:
            self.stopping.discard(container.real)

    def on_event(self, event: Optional[ContainerdEvent]) -> None:
        """Pass on an event of containerd, and tell Docker's event for it. Only while somebody listens are containers and
        images looked up, since that costs a process."""
        with self.telling:
            name = (event.payload.get("name") or "") if event and event.topic.startswith("/images/") else ""
            before = self.snapshot.names.last(name) if name else ""
            self.snapshot.on_event(event)
            if name and self.quiet["images"] <= 0 and not is_nameless(name):
                self._image_event(event, name, before)
            elif event and event.container:
                self._container_event(event)

    def _image_event(self, event: ContainerdEvent, name: str, identity: str) -> None:
        action = {"/images/create": "tag", "/images/delete": "untag"}.get(event.topic)
        if action == "tag" and self.journal.queues:
            with contextlib.suppress(ApiError):
                identity = next((each.id for each in self.snapshot.names.get() if each.name == name), "")
        if action:
            self.journal.emit("image", action, identity or familiar(name), {"name": familiar(name)}, event.time)

    def _container_event(self, event: ContainerdEvent) -> None:
        action = {
            "/containers/create": "create", "/tasks/start": "start", "/tasks/exit": "die", "/tasks/paused": "pause",
            "/tasks/resumed": "unpause", "/tasks/oom": "oom", "/containers/delete": "destroy",
        }.get(event.topic)
        if action is None or (action == "die" and event.payload.get("id") not in (None, "", event.container)):
            return
        identity, attributes = self._actor_of(event.container, gone=action == "destroy")
        if (action == "destroy" and self.hidden.pop(event.container, self) is None) or (action == "create" and identity != event.container):
            return
        if action == "start":
            self.begun[event.container] = event.time
        elif action == "die":
            if event.container in self.stopping and event.payload.get("exit_status") == 128 + signal.SIGKILL:
                self.journal.emit("container", "kill", identity, {**attributes, "signal": str(int(signal.SIGKILL))}, event.time)
            began = self.begun.pop(event.container, event.time)
            attributes = {**attributes, "exitCode": str(event.payload.get("exit_status") or 0),
                          "execDuration": str(max(0, event.time - began) // 10**9)}
        elif action == "destroy":
            self.known.pop(event.container, None)
        self.journal.emit("container", action, identity, attributes, event.time)

    def completed(self, kept: List[Dict[str, Any]]) -> Iterator[Dict[str, Any]]:
        """Kept events, those of containers with what is known of them: nobody asked while nobody listened."""
        actors: Optional[Dict[str, Tuple[str, Dict[str, str]]]] = None
        for event in kept:
            actor = event["Actor"]
            if event["Type"] == "container" and "name" not in actor["Attributes"]:
                if actors is None:
                    actors = dict(self.departed)
                    with contextlib.suppress(ApiError):
                        for container in self.snapshot.containers.get().values():
                            actors[container.real] = actors[container.id] = self.actor(container)
                identity, attributes = actors.get(actor["ID"], (actor["ID"], {}))
                event = {**event, "Actor": {"ID": identity, "Attributes": {**attributes, **actor["Attributes"]}}}
            yield event

    def _actor_of(self, real: str, gone: bool) -> Tuple[str, Dict[str, str]]:
        """Id and attributes of a container that an event names, as they were last known where it is gone."""
        if not self.journal.queues:
            return self.known.get(real, (real, {}))
        if not gone:
            with contextlib.suppress(ApiError):
                container = self.snapshot.containers.known().get(real) or self.snapshot.containers.get().get(real)
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
            "InsecureRegistryCIDRs": ["127.0.0.0/8", "::1/128"],
            "IndexConfigs": {"docker.io": {"Name": "docker.io", "Mirrors": [], "Secure": True, "Official": True}}, "Mirrors": [],
        },
        "ServerVersion": VERSION, "Runtimes": {"io.containerd.runc.v2": runtime, "runc": runtime}, "DefaultRuntime": "runc",
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
        value = parse_json(base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4)))
    except (ValueError, BadParameter):
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
                                       data=password.encode(), timeout=60, environment=environment, waits=True)
    if output.status:
        error = nerdctl_error(output.stderr)
        if isinstance(error, Unavailable):
            raise error
        if re.search(r"401|[Uu]nauthorized|incorrect username|authentication (?:is )?required|denied", output.stderr):
            raise Unauthorized(f"Get \"https://{host}/v2/\": unauthorized: incorrect username or password")
        raise ApiError(str(error))
    return Response(200, {"Status": "Login Succeeded"})


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
            if not any(each == text or re.fullmatch(re.escape(each) + r":[^:/]+", text) for each in wanted for text in told):
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
    """A stream of events: the kept ones since `since`, then new ones until `until` or until the client leaves. It breaks off
    when the client does not read it."""
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
            for event in engine.completed(kept) if since is not None else ():
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
                if isinstance(event, ApiError):
                    raise event
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


def match_reference(names: List[str], patterns: List[str]) -> List[str]:
    """Those of an image's names that fit a pattern of the `reference` filter: with or without tag or digest, `*` not
    across slashes."""
    globs = [re.compile("".join({"*": "[^/]*", "?": "[^/]"}.get(each, re.escape(each)) for each in pattern)) for pattern in patterns]
    found = []
    for name in names:
        bare = name.partition("@")[0]
        head, colon, tail = bare.rpartition(":")
        bare = head if colon and "/" not in tail else bare
        if any(glob.fullmatch(each) for glob in globs for each in (name, bare, "docker.io/" + name, "docker.io/library/" + bare)):
            found.append(name)
    return found


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
                or (filters.get("reference") and not match_reference([*group.repo_tags, *group.repo_digests], filters["reference"]))
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
        for key in ("RepoTags", "RepoDigests") if filters.get("reference") else ():
            row[key] = match_reference(row[key], filters["reference"])
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
    if version >= (1, 52):
        # From here on dockerd leaves out what is empty, and the driver where containerd has the images.
        del image["GraphDriver"]
        image["Config"] = {key: value for key, value in image["Config"].items() if value}
        image = {key: value for key, value in image.items() if value or key not in ("Parent", "Comment", "DockerVersion", "Author")}
    return image


def check_platform(group: ImageGroup, text: str, name: str) -> None:
    """404 with the name that the client used, unless the image is here for the platform of a `platform` parameter (JSON, or os/architecture)."""
    if not text:
        return
    if text.startswith("{"):
        wanted = typed(parse_json(text.encode()), dict, "platform")
        system, architecture, variant = (wanted.get(key) or "" for key in ("os", "architecture", "variant"))
    else:
        system, architecture, variant = (text.split("/") + ["", ""])[:3]
    have = docker_platform(group)
    if (system or "linux") != have["os"] or architecture != have["architecture"] or (variant and variant != have.get("variant", variant)):
        asked = "/".join(each for each in (system or "linux", architecture, variant) if each)
        raise NotFound(f"image with reference {name} was found but does not provide the specified platform ({asked})")


@route("GET", "/images/{image}/json")
def image_inspect(engine: Engine, request: Request, name: str) -> Response:
    """One image; 404 when there is none of that name, id or platform."""
    group = engine.snapshot.image(name)
    check_platform(group, request.value("platform"), name)
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
    check_platform(group, request.value("platform"), name)
    rows = group.detail.get("History")
    if rows is None:
        rows = engine.nerdctl.rows("history", "--no-trunc", "--format", "{{json .}}", "--", group.names[0])
        # Kept like the rest of what is behind a digest.
        group.detail["History"] = rows
    # nerdctl gives a size to each step; those of steps with a layer are in the order of the history.
    steps = list(reversed(group.config.get("history") or []))
    sizes = [size_bytes(row.get("Size") or "") for row, step in zip(rows, steps) if not step.get("empty_layer")]
    return Response(200, docker_history(group, sizes))


PROGRESS_LINE = re.compile(
    r"(?P<kind>manifest|config|layer|index|attestation)-(?P<digest>sha256:[0-9a-f]+):?\s+(?P<state>[a-z ]+?)\s*"
    r"(?:\|.*\|\s*(?:(?P<current>[\d.]+ ?[KMGT]?i?B)/(?P<total>[\d.]+ ?[KMGT]?i?B))?\s*)?$")
# Below the layers, a line for each name that was set: the descriptor it stands for.
TARGET_LINE = re.compile(r"application/[\w.+-]+ (sha256:[0-9a-f]{64})\s*$", re.M)
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
        # What the names that nerdctl has set stand for.
        self.targets: Dict[str, None] = {}

    def messages(self, line: str) -> List[Dict[str, Any]]:
        """The messages that a line of output makes due, [] for most."""
        target = TARGET_LINE.match(line)
        if target:
            self.targets[target.group(1)] = None
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
    with engine.changing_images() as change:
        table = ProgressTable(PULL_WORDS)
        yield from run_progress(engine, request, pull_args(reference, platform), environment, table, begin)
        if len(table.targets) == 1 and not platform:
            change.became(reference.name, *table.targets)
        else:
            change.touched(reference.name)
    group = engine.snapshot.image(reference.name)
    name = familiar(reference.name)
    yield message_line({"status": f"Digest: {group.id}"})
    word = "Image is up to date" if before == group.id else "Downloaded newer image"
    yield message_line({"status": f"Status: {word} for {name}"})
    engine.journal.emit("image", "pull", name, {**group.labels, "name": name})


class TlsConnection(http.client.HTTPConnection):
    """An HTTP connection by TLS to a host whose certificate the system trusts."""

    default_port = 443

    def connect(self) -> None:
        """Connect; OSError where that fails or the certificate is not good."""
        import ssl

        super().connect()
        # Behind a proxy `host` is the proxy.
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self._tunnel_host or self.host)


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

    def tags(self) -> List[str]:
        """All tags of the repository, which may come in pages."""
        found, path = [], "tags/list"
        for _ in range(self.PAGES):
            headers, body = self.ask(path)
            found += [each for each in typed(parse_json(body), dict, "tags").get("tags") or [] if isinstance(each, str)]
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
        """GET, along a few redirects: blobs are often elsewhere. Nobody but `host` sees the authorization, or may ask for one."""
        if plain is None:
            plain = (host.rpartition(":")[0] or host) in ("localhost", "127.0.0.1", "[::1]")
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
        scheme, host, path, query, _ = urllib.parse.urlsplit(url)
        if scheme not in ("http", "https") or not host:
            raise ApiError(f"cannot ask {host or 'a registry'}: {scheme!r} is not http")
        headers = {"Accept": self.TYPES, "User-Agent": f"nerdctld/{VERSION}", **({"Authorization": authorization} if authorization else {})}
        kind = TlsConnection if scheme == "https" else http.client.HTTPConnection
        try:
            with contextlib.closing(kind(host, timeout=30)) as connection:
                connection.request("GET", (path or "/") + (f"?{query}" if query else ""), headers=headers)
                response = connection.getresponse()
                body = response.read(self.LIMIT)
                return response.status, {key.lower(): value for key, value in response.getheaders()}, body
        except (OSError, ValueError, http.client.HTTPException) as error:
            # The ValueError is of a URL that is not ASCII.
            raise ApiError(f"cannot ask {host}: {error}") from None


def next_query(link: str) -> str:
    """The query of the next page in a Link header, "" where there is none. The rest of the link is that of this page."""
    for target, attributes in re.findall(r"<([^>]*)>([^,<]*)", link):
        if re.search(r';\s*rel="?next\b', attributes, re.I):
            return target.partition("#")[0].partition("?")[2]
    return ""


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
    digest = headers.get("docker-content-digest") or "sha256:" + sha256(body).hexdigest()
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
            tags = registry_of(request, reference).tags()
            references = [reference._replace(tag=each) for each in sorted(tags) if TAG.fullmatch(each)]
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


def remove_extra_names(engine: Engine, base: str, before: Iterable[str]) -> None:
    """Take away the names `base@sha256:…` that nerdctl's load and import leave beside the ones asked for."""
    known = set(before)
    extra = [image.name for image in engine.snapshot.names.get() if image.name not in known and image.name.startswith(base + "@sha256:")]
    if extra:
        with engine.changing_images() as change:
            engine.nerdctl.output("rmi", "--", *extra)
            for name in extra:
                change.became(name, "")


def parse_loaded(text: str) -> List[str]:
    """The names that `nerdctl load` says it loaded, each once. nerdctl 2.3 sometimes leaves out the last of its
    `Loaded image:` lines (3 of 25 times on a busy machine), but names it in its progress."""
    told = [*re.findall(r"^Loaded image: (\S+)", text, re.M), *re.findall(r"^(\S+:\S+)[ \t]+saved[ \t]*$", ANSI.sub("", text), re.M)]
    return list(dict.fromkeys(told))


def note_loaded(change: ImageChange, text: str, extra: str) -> None:
    """Tell what a load made of the names, as far as its output says so: the names `extra@sha256:…`, which it sets beside the
    others, have their digest in them, and what is left is of the others when it is one. nerdctl sets a name as often as it
    says that it was loaded."""
    often = collections.Counter(re.findall(r"^Loaded image: (\S+)", text, re.M))
    names = parse_loaded(text)
    own = {name: name.partition("@")[2] for name in names if name.startswith(extra + "@sha256:")}
    left = set(TARGET_LINE.findall(ANSI.sub("", text))) - set(own.values())
    for name in names:
        identity = own.get(name) or (next(iter(left)) if len(left) == 1 else "")
        if identity and often[name]:
            change.became(name, identity, often[name])
        else:
            change.touched(name)


def loaded_names(engine: Engine, told: List[str], before: Iterable[str]) -> List[str]:
    """The names with a tag that an archive brought. nerdctl now and then ends before it has told all of them, so new names
    count too, and where there are none the one that the index of the archive has."""
    known, after = set(before), [image.name for image in engine.snapshot.names.get()]
    found = [name for name in [*told, *(each for each in after if each not in known)] if "@sha256:" not in name]
    groups = {} if found else engine.snapshot.image_groups()
    for name in [] if found else told:
        manifest = groups[name.partition("@")[2]].detail.get("ManifestDesc") if name.partition("@")[2] in groups else {}
        noted = ((manifest or {}).get("annotations") or {}).get("io.containerd.image.name")
        found += [noted] if noted in after else []
    return list(dict.fromkeys(found))


@route("POST", "/images/load")
def image_load(engine: Engine, request: Request) -> Response:
    """Load an archive; a stream with `Loaded image: …` for each name in it, and with the bytes read unless `quiet`."""
    platform = request.value("platform")
    arguments = ["load", *([f"--platform={platform_words(platform)}"] if platform else ["--all-platforms"])]

    def chunks() -> Iterator[bytes]:
        before = [image.name for image in engine.snapshot.names.get()]
        with engine.changing_images() as change:
            # Not ended when the client leaves: that is seen when the body breaks off, and what has come whole is loaded.
            with engine.nerdctl.start(*arguments, stdin=subprocess.PIPE) as process:
                taken, told = 0, time.monotonic()
                try:
                    for block in request.body.blocks():
                        if not process.write(block):
                            break
                        taken += len(block)
                        if not request.flag("quiet") and time.monotonic() - told > 0.5:
                            told = time.monotonic()
                            yield message_line({"status": "Loading layer", "id": "archive", "progressDetail": {"current": taken, "total": taken},
                                                "progress": decimal_size(taken)})
                except BaseException:
                    process.spoil()
                    raise
                process.close_stdin()
                text = b"".join(iter(process.read, b"")).decode(errors="replace")
                process.check()
            note_loaded(change, text, "import")
        loaded = parse_loaded(text)
        named = loaded_names(engine, loaded, before)
        if named:
            remove_extra_names(engine, "import", before)
        names = {name: group for group in engine.snapshot.image_groups().values() for name in group.names}
        for each in named or loaded:
            group = names.get(each) or names.get(each.partition(" ")[0])
            if "@sha256:" in each:
                yield message_line({"stream": f"Loaded image ID: {group.id if group else each.partition('@')[2]}\n"})
            else:
                yield message_line({"stream": f"Loaded image: {familiar(each)}\n"})
            engine.journal.emit("image", "load", group.id if group else each, {"name": familiar(each)})

    def told() -> Iterator[bytes]:
        # As with dockerd, an archive that cannot be loaded is told of in the stream, where clients look for it.
        yield b""
        yield from chunks()

    return Response(200, Stream(as_error_detail(told())), "application/json")


def as_error_detail(chunks: Iterator[bytes]) -> Iterator[bytes]:
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
        engine.nerdctl.run("build", "--progress=plain", "--provenance=false", f"--tag={target}", "--", folder, timeout=600, waits=True)


def image_import(engine: Engine, request: Request) -> Response:
    """Import a tar of a root file system (the body, or a URL) as an image; its id as the one message."""
    source, repository, tag = request.value("fromSrc"), request.value("repo"), request.value("tag")
    target = parse_reference(f"{repository}:{tag}" if tag and repository else repository) if repository else None
    if target and target.digest:
        raise BadParameter("cannot import digest reference")
    if source != "-" and not re.match(r"https?://", source):
        source = "http://" + source
    lines = change_lines(request.values("changes"))
    # nerdctl 1.7 has no --message.
    arguments = ["import", *([f"--message={request.value('message')}"] if request.value("message") else [])]
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
        remove_extra_names(engine, working, before)
        if lines:
            with engine.changing_images():
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


ARCHIVE_END = bytes(1024)
SAVE_ATTEMPTS = 4


def whole_archive(engine: Engine, request: Request, arguments: List[str]) -> Iterator[bytes]:
    """The tar that `nerdctl save` writes, to its end. nerdctl 2.3 sometimes ends, with status 0, before it has written all
    of it (2 of 30 times on a busy machine): then it is run again for the rest, which is the same each time."""
    sent, tail = 0, b""
    for attempt in range(SAVE_ATTEMPTS):
        with engine.nerdctl.start(*arguments, client=request.client) as process:
            seen, again = 0, b""
            for block in process.pieces(len(ARCHIVE_END)) if not sent else iter(process.read, b""):
                if isinstance(block, Piped):
                    seen, sent = seen + block.size, sent + block.size
                    yield block
                    continue
                known = min(len(block), max(0, sent - seen))
                again = (again + block[:known])[-len(ARCHIVE_END):]
                seen += len(block)
                if known and seen >= sent and again != tail:
                    raise ApiError("nerdctl did not write the whole archive")
                if known < len(block):
                    tail = (tail + block[known:])[-len(ARCHIVE_END):]
                    sent += len(block) - known
                    yield block[known:]
            process.check()
        if tail == ARCHIVE_END:
            return
    raise ApiError("nerdctl did not write the whole archive")


def save_images(engine: Engine, request: Request, names: List[str]) -> Response:
    """Stream the archive of images, all looked up before the first byte."""
    if not names:
        raise BadParameter("no images given")
    platform = request.value("platform")
    wanted = list(dict.fromkeys(each for name in names for each in expand_names(engine, name)))
    if platform:
        for name in wanted:
            check_platform(engine.snapshot.image(name), platform, name)
    arguments = ["save", *([f"--platform={platform_words(platform)}"] if platform else []), "--", *wanted]

    def chunks() -> Iterator[bytes]:
        yield from whole_archive(engine, request, arguments)
        for name in wanted:
            # Too late for an error: somebody may have removed it meanwhile.
            with contextlib.suppress(ApiError):
                engine.journal.emit("image", "save", engine.snapshot.image(name).id, {"name": familiar(name)})

    return Response(200, Stream(chunks(), primed=True), "application/x-tar")


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
    with engine.changing_images() as change:
        engine.nerdctl.run("rmi", *(["--force"] if force else []), "--", *names)
        # By force it leaves an image without a name under a running container.
        for name in names if not force else ():
            change.became(name, "")
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
    with engine.changing_images() as change:
        engine.nerdctl.run("tag", "--", group.names[0], target.name)
        change.became(target.name, group.id)
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
    with engine.changing_images() as change:
        if len(own) == len(lines):
            engine.nerdctl.run("commit", *arguments, *(f"--change={line}" for line in lines), "--", container.real, working, timeout=600, waits=True)
        else:
            before = f"{WORKING_NAME}commit:{os.urandom(8).hex()}"
            engine.nerdctl.run("commit", *arguments, "--", container.real, before, timeout=600, waits=True)
            try:
                apply_changes(engine, before, working, lines)
            finally:
                engine.nerdctl.output("rmi", "--force", "--", before)
                change.touched(before)
        change.touched(working)
    group = engine.snapshot.image(working)
    engine.tell(container, "commit", comment=request.value("comment"), imageID=group.id, imageRef=familiar(target))
    return Response(201, {"Id": group.id})


def dockerfile_word(text: str) -> str:
    """A word of a Dockerfile in which BuildKit finds this text again: no JSON, and no variables."""
    return '"' + re.sub(r'[\\"$]', r"\\\g<0>", text) + '"'


def config_changes(config: Dict[str, Any]) -> List[str]:
    """The Dockerfile instructions for the fields of a container config in the body of a commit."""
    lines = []
    for key, word in (("Cmd", "CMD"), ("Entrypoint", "ENTRYPOINT")):
        if config.get(key):
            lines.append(f"{word} {json.dumps(string_list(config[key], key), ensure_ascii=False)}")
    pairs = [("ENV", *each.partition("=")[::2]) for each in string_list(config.get("Env"), "Env")]
    pairs += [("LABEL", *each) for each in string_map(config.get("Labels"), "Labels").items()]
    lines += [f"{word} {dockerfile_word(key)}={dockerfile_word(value)}" for word, key, value in pairs]
    lines += [f"EXPOSE {dockerfile_word(each)}" for each in typed(config.get("ExposedPorts"), dict, "ExposedPorts")]
    # Variables are looked for in what the JSON says.
    lines += [f"VOLUME {json.dumps([dockerfile_word(each)], ensure_ascii=False)}" for each in typed(config.get("Volumes"), dict, "Volumes")]
    for key, word in (("User", "USER"), ("WorkingDir", "WORKDIR"), ("StopSignal", "STOPSIGNAL")):
        if config.get(key):
            lines.append(f"{word} {dockerfile_word(typed(config[key], str, key))}")
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
            member = None
            try:
                for member in archive:
                    unpack_member(archive, member, root)
            except tarfile.ReadError as error:
                # `docker build -f -` leaves out what fills the last block. That the body is whole HTTP tells.
                stream = archive.fileobj
                if str(error) != "unexpected end of data" or member is None or stream.comptype != "tar" or stream.pos < member.offset_data + member.size:
                    raise
    except tarfile.TarError as error:
        raise BadParameter(f"invalid build context: {error}") from None
    except (EOFError, UnicodeError, ValueError, TypeError, OverflowError, zlib.error) as error:
        # The TypeError is tarfile's for a gzip header that breaks off.
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
        value = parse_json(base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4)))
    except (ValueError, BadParameter):
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
    try:
        with open_url(remote) as answer:
            source = io.BufferedReader(answer, 1 << 20) if not isinstance(answer, io.BufferedIOBase) else answer
            if (answer.headers.get("Content-Type") or "").startswith("text/plain"):
                data = source.read(REMOTE_LIMIT + 1)
                if len(data) > REMOTE_LIMIT:
                    raise BadParameter("unable to prepare context: the Dockerfile is larger than 1 MiB")
                with open(inside(folder, request.value("dockerfile") or "Dockerfile"), "wb") as file:
                    file.write(data)
            else:
                unpack_context(source, folder)
    except (OSError, ValueError, http.client.HTTPException) as error:
        # The ValueError is urllib's for a URL that no request can be made of.
        raise BadParameter(f"unable to prepare context: cannot download {remote}: {error}") from None


def open_url(url: str) -> Any:
    """The answer to a GET, along redirects and through the proxies of the environment; urllib's errors. https has a handler
    here: urllib has none, since http.client was loaded without OpenSSL."""
    import urllib.request

    class TlsHandler(urllib.request.AbstractHTTPHandler):
        # Before that of a Python that has one.
        handler_order = 400
        https_request = urllib.request.AbstractHTTPHandler.do_request_

        def https_open(self, request: Any) -> Any:
            return self.do_open(TlsConnection, request)

    return urllib.request.build_opener(TlsHandler).open(url, timeout=60)


def dockerfile_args(request: Request, folder: str) -> List[str]:
    """The flag for the Dockerfile; 400 when it is not in the context."""
    name = request.value("dockerfile") or "Dockerfile"
    if "\0" in name:
        raise BadParameter("Cannot locate specified Dockerfile: its name has a NUL byte")
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
    # With BUILDKIT_HOST set, nerdctl ends without a word when nobody answers there.
    error = nerdctl_error("\n".join(lines) or "no buildkit host is available")
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
    """The records of BuildKit's cache; none where there is no buildctl or no buildkitd answers."""
    try:
        output = engine.nerdctl.buildctl("du", "--format", "{{json .}}")
    except Unavailable:
        return []
    if output.status:
        return []
    found = []
    for row in parse_rows(output.stdout):
        # An empty cache is `null`.
        found += [docker_cache(each) for each in (row if isinstance(row, list) else [row]) if each]
    return found


PRUNE_FILTERS = ("description", "id", "inuse", "label", "parent", "private", "shared", "type", "until", "unused-for")


@route("POST", "/build/prune")
def build_prune(engine: Engine, request: Request) -> Response:
    """Remove build cache, by BuildKit's own filters and `until`; 503 where there is no buildctl or no buildkitd answers."""
    filters = request.filters(*PRUNE_FILTERS)
    arguments = ["prune", "--format", "{{json .}}", *(["--all"] if request.flag("all") else [])]
    for key, values in filters.items():
        for value in values:
            if key in ("until", "unused-for"):
                arguments.append(f"--keep-duration={max(0, round(time.time() - (until_limit([value]) or 0)))}s")
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
PORT_RANGE = re.compile(r"(?:(?P<ip>.*):)?(?P<host>\d+)(?:-(?P<host_end>\d+))?->(?P<port>\d+)(?:-(?P<end>\d+))?(?:/(?P<kind>\w+))?")
REQUEST_PART = 3900


def parse_ports(text: str) -> List[Dict[str, Any]]:
    """The `Ports` of nerdctl's ps (`0.0.0.0:8000-8001->80-81/tcp, …`) as Docker's list. Of several in a row it tells the
    address only with the first and the protocol only with the last: `0.0.0.0:1->80, 2->80/tcp`."""
    ports: List[Dict[str, Any]] = []
    untold: List[Dict[str, Any]] = []
    address = "0.0.0.0"
    for found in filter(None, (PORT_RANGE.fullmatch(part.strip()) for part in text.split(","))):
        first, host = int(found.group("port")), int(found.group("host"))
        address = (found.group("ip") or address).strip("[]")
        untold += [{"IP": address, "PrivatePort": first + offset, "PublicPort": host + offset, "Type": "tcp"}
                   for offset in range(int(found.group("end") or first) - first + 1)]
        if found.group("kind"):
            ports += [{**each, "Type": found.group("kind")} for each in untold]
            untold = []
    return ports + untold


def parse_ago(text: str) -> Optional[int]:
    """Seconds of nerdctl's `5 minutes ago`; None where there is none."""
    found = AGO.search(text)
    if not found:
        return None
    number = found.group(1).lower()
    return (int(number) if number.isdigit() else 0 if number.startswith("less") else 1) * UNIT_SECONDS[found.group(2).lower()]


@functools.lru_cache(maxsize=256)
def parse_status(text: str) -> Dict[str, Any]:
    """nerdctl's status in parts: `code` (None while it never ended), `health` ("" for none), `ago` in seconds. All who ask
    for the same text share one dict."""
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


def docker_mounts(container: Container) -> List[Dict[str, Any]]:
    """The mounts of a container as Docker shows them: of those in memory only what was asked for as a mount."""
    host = container.host_config
    shown = {each["Target"] for each in host.get("Mounts") or []}
    modes = {parts[1]: parts[2] if len(parts) > 2 else "" for parts in (each.split(":") for each in host.get("Binds") or []) if len(parts) > 1}
    mounts = []
    for each in parse_mounts(container.labels):
        if each["Type"] == "bind":
            mode = "" if each["Destination"] in shown else modes.get(each["Destination"], each["Mode"])
            mounts.append({**each, "Mode": mode, "Propagation": each["Propagation"] or "rprivate"})
        elif each["Type"] != "tmpfs":
            mounts.append({**each, "Mode": "z"} if each["Destination"] in shown else each)
        elif each["Destination"] in shown:
            mounts.append({**each, "Source": "", "Mode": ""})
    return mounts


def network_names(container: Container) -> List[str]:
    """The names of the networks a container was given, in the order of its interfaces."""
    if "network names" not in container.memo:
        names = None
        with contextlib.suppress(ValueError):
            names = json.loads(container.labels.get("nerdctl/networks") or "[]")
        container.memo["network names"] = [str(each) for each in names] if isinstance(names, list) else []
    return container.memo["network names"]


def network_mode(container: Container) -> str:
    """Docker's NetworkMode: the name of the first network, host, none or container:ID."""
    asked = str(container.host_config.get("NetworkMode"))
    names = network_names(container)
    return asked if asked.startswith("container:") else names[0] if names else "bridge"


def request_labels(body: Dict[str, Any]) -> Dict[str, str]:
    """The create request as labels that fit nerdctl's 4096 bytes each."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True)
    parts = [text[start:start + REQUEST_PART] for start in range(0, len(text), REQUEST_PART)]
    return {f"{LABEL_REQUEST}.{number}": part for number, part in enumerate(parts)}


def endpoint(container: Container, network: Dict[str, Any], address: Dict[str, Any], asked: Dict[str, Any]) -> Dict[str, Any]:
    """One entry of NetworkSettings.Networks. `network` is the snapshot's, `address` of its interface, `asked` the
    request's EndpointSettings."""
    running = bool(address)
    identity = network.get("Id") or ""
    config = next((each for each in (network.get("IPAM") or {}).get("Config") or [] if ":" not in (each.get("Subnet") or ":")), {})
    return {
        "IPAMConfig": asked.get("IPAMConfig"), "Links": asked.get("Links"), "Aliases": asked.get("Aliases"), "DriverOpts": asked.get("DriverOpts"),
        "GwPriority": 0, "NetworkID": identity,
        "EndpointID": sha256(f"{container.id}/{identity}".encode()).hexdigest() if running else "",
        "Gateway": config.get("Gateway") or "" if running else "", "IPAddress": address.get("ip") or "",
        "MacAddress": (address if running else {} if was_started(container) else {"mac": asked.get("MacAddress")}).get("mac") or "",
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
    asked = typed(container.request.get("NetworkingConfig"), dict, "NetworkingConfig").get("EndpointsConfig") or {}
    found = {}
    if network_mode(container).startswith("container:"):
        return found
    for number, name in enumerate(each for each in network_names(container) if not each.startswith("container:")):
        network = networks.get(name) or {}
        address = addresses[number] if number < len(addresses) else {}
        wanted = asked.get(name) or asked.get(network.get("Id")) or (asked.get("default") if name == "bridge" else None) or {}
        found[network.get("Name") or name] = endpoint(container, network, address, wanted)
    return found


def parse_hosts_note(note: Dict[str, Any], names: List[str]) -> List[Dict[str, Any]]:
    """parse_addresses() of what nerdctl noted of a running container for the hosts files of its peers: CNI's results, by
    the names of networks."""
    found = []
    for result in filter(None, map((note.get("Networks") or {}).get, names)):
        mac = next((each.get("mac") for each in result.get("interfaces") or [] if each.get("sandbox")), "")
        interface = {"Name": "eth0", "HardwareAddr": mac, "Addrs": [each.get("address") or "" for each in result.get("ips") or []]}
        found += parse_addresses({"NetNS": {"Interfaces": [interface]}})
    return found


def hosts_folder(container: Container) -> str:
    """Where nerdctl keeps a container's hosts file and notes its addresses, "" where that is not known."""
    if container.folder.count("/") < 3:
        return ""
    containers, namespace, name = container.folder.rsplit("/", 2)
    return os.path.join(os.path.dirname(containers), "etchosts", namespace, name)


def noted_addresses(container: Container) -> List[Dict[str, Any]]:
    """parse_addresses() of a container without a process, [] where nerdctl's files are not readable from here."""
    folder = hosts_folder(container)
    if container.running and folder:
        with contextlib.suppress(OSError, ValueError):
            with open(os.path.join(folder, "meta.json"), "rb") as file:
                return parse_hosts_note(json.load(file), network_names(container))
    return []


def listed_networks(container: Container, networks: Dict[str, Dict[str, Any]]) -> Dict[str, Any]:
    """docker_networks() with such addresses as are known without a process; worked out once as long as `networks` are these."""
    detail = container.memo.get("detail")
    known = container.memo.get("listed networks")
    if known is None or known[0] is not networks or known[1] is not detail:
        addresses = parse_addresses(detail.get("Task")) if detail else noted_addresses(container)
        known = container.memo["listed networks"] = (networks, detail, docker_networks(container, networks, addresses))
    return known[2]


# Init processes that need no libc of the image.
STATIC_INITS = ("docker-init", "tini-static")
# What nerdctl puts in front of the command of a container with an init process: it has the name of the host's program.
INIT_WORDS = [[f"/sbin/{each}", "--"] for each in ("tini", *STATIC_INITS)]


def has_init(container: Container) -> bool:
    """Whether an init process was asked for."""
    return bool(container.host_config.get("Init"))


def quoted_command(command: str, container: Container) -> str:
    """The command of `ps` as Docker words it: words with spaces in quotes, as far as the request tells which those are."""
    quoted = lambda words: " ".join(f"'{each}'" if " " in each else each for each in words)
    asked = container.request
    if has_init(container):
        command = re.sub("^(?:" + "|".join(map(" ".join, INIT_WORDS)) + ") ", "", command)
    head, tail = (string_list(asked.get(key), key) if isinstance(asked.get(key), list) else [] for key in ("Entrypoint", "Cmd"))
    if tail and command.endswith(" ".join(tail)):
        command = command[:len(command) - len(" ".join(tail))] + quoted(tail)
    if head and command.startswith(" ".join(head)):
        command = quoted(head) + command[len(" ".join(head)):]
    return command


def open_ports(container: Container) -> List[Dict[str, Any]]:
    """The ports of a running container: those published, and those that are only exposed, without a port of the host."""
    if not container.running:
        return []
    ports = parse_ports(container.ports)
    published = {(each["PrivatePort"], each["Type"]) for each in ports}
    if network_mode(container) in ("host", "none") or network_mode(container).startswith("container:"):
        return ports
    exposed = (each.partition("/") for each in container.request.get("ExposedPorts") or {})
    rest = sorted({(int_or_zero(number), kind or "tcp") for number, _, kind in exposed if int_or_zero(number)} - published)
    return ports + [{"PrivatePort": number, "Type": kind} for number, kind in rest]


def lasting_row(container: Container) -> Dict[str, Any]:
    """What `/containers/json` lists of a container that stays so as long as nerdctl's own row does."""
    if "row" not in container.memo:
        try:
            command = json.loads(container.command) if container.command.startswith('"') else container.command
        except ValueError:
            command = container.command.strip('"')
        container.memo["row"] = {
            "Id": container.id, "Names": ["/" + container.name], "Image": shown_image(container), "ImageID": "",
            "Command": quoted_command(command, container),
            "Created": container.created // 10**9, "Ports": open_ports(container), "Labels": container.visible_labels,
            "State": container.state, "Status": "", "HostConfig": {"NetworkMode": network_mode(container)},
            "NetworkSettings": {}, "Mounts": docker_mounts(container),
        }
    return container.memo["row"]


def docker_container_row(container: Container, image_id: str, networks: Dict[str, Any], now: float, version: Tuple[int, int]) -> Dict[str, Any]:
    """A container as `/containers/json` lists it."""
    row = {**lasting_row(container), "ImageID": image_id, "Status": status_text(container, now), "NetworkSettings": {"Networks": networks}}
    if version >= (1, 52):
        health = parse_status(container.status)["health"]
        row["Health"] = {"Status": health or "none", "FailingStreak": 0}
    return row


def shown_image(container: Container) -> str:
    """The image as the client named it, else as people write it."""
    return container.request.get("Image") or familiar(container.image)


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


def match_container(engine: Engine, container: Container, filters: Dict[str, List[str]]) -> bool:
    """Whether a container passes the filters of the list, but for before and since."""
    if not filters:
        return True
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
    found = [each for each in table if (everything or each.running or each.state == "restarting") and match_container(engine, each, filters)]
    return found[:limit] if limit > 0 else found


def container_sizes(engine: Engine, container: Optional[Container] = None) -> Dict[str, Tuple[int, int]]:
    """Real id -> bytes written and bytes in all, of one container or of all; read anew, since no event tells of them."""
    arguments = ["ps", "-a", "--no-trunc", "--size", *([f"--filter=id={container.real}"] if container else [])]
    found = {}
    for row in steadily(lambda: engine.nerdctl.rows(*arguments, "--format", '{"ID":{{json .ID}},"Size":{{json .Size}}}')):
        written, _, whole = (row.get("Size") or "").partition(" (virtual ")
        found[row["ID"]] = (size_bytes(written), size_bytes(whole.rstrip(")")))
    return found


def ahead(read: Callable[[], Any]) -> Callable[[], Any]:
    """Begin to read something in a thread of its own: a function that waits for it, and gives its value or its error."""
    found: List[Any] = []

    def run() -> None:
        try:
            found.append(read())
        except BaseException as error:
            found.append(error)

    def wait() -> Any:
        thread.join()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    thread = threading.Thread(target=run, name="ahead", daemon=True)
    thread.start()
    return wait


@route("GET", "/containers/json")
def container_list(engine: Engine, request: Request) -> Response:
    """Containers, newest first: the running ones, or `all`; `limit`, `size`, and all of the API's filters."""
    filters = request.filters(*CONTAINER_FILTERS)
    limit = request.integer("limit", -1)
    read_names, read_networks = engine.snapshot.names.get, engine.snapshot.networks.get
    if not engine.snapshot.containers.whole.fresh():
        # The first answer costs three processes, and the time of the longest.
        read_names, read_networks = ahead(read_names), ahead(read_networks)
    found = list_containers(engine, filters, request.flag("all"), limit)
    sizes = container_sizes(engine) if request.flag("size") else {}
    images = {image.name: image.id for image in read_names()} if found else {}
    networks = read_networks() if found else {}
    rows, now = [], time.time()
    for container in found:
        row = docker_container_row(container, images.get(container.image, ""), listed_networks(container, networks), now, request.version)
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
    "RestartPolicy": {"MaximumRetryCount": 0, "Name": "no"}, "Runtime": "runc", "SecurityOpt": None, "ShmSize": 67108864,
    "UTSMode": "", "Ulimits": [], "UsernsMode": "", "VolumeDriver": "", "VolumesFrom": None,
}


# Docker's own name for what nerdctl runs containers with where nobody asks for another runtime.
DEFAULT_RUNTIME = {"io.containerd.runc.v2": "runc"}


def held_policy(container: Container) -> str:
    """The restart policy of a container that hold_down() has given another one, "" for any other."""
    labels = container.labels
    if labels.get("containerd.io/restart.policy") != "unless-stopped" or labels.get("containerd.io/restart.explicitly-stopped") != "true":
        return ""
    if os.path.isdir(container.folder):
        with contextlib.suppress(OSError):
            with open(hold_note(container), encoding="ascii", errors="replace") as file:
                text = file.read(64)
                return text if re.fullmatch(r"always|on-failure(:\d+)?", text) else ""
        return ""
    asked = container.host_config.get("RestartPolicy") or {}
    if asked.get("Name") not in ("always", "on-failure"):
        return ""
    return asked["Name"] + (f":{asked['MaximumRetryCount']}" if asked.get("MaximumRetryCount") else "")


def hold_note(container: Container) -> str:
    """Where the policy of a container that is held down is noted: beside what nerdctl keeps of it, and gone with that."""
    return os.path.join(container.folder, "nerdctld.restart")


def note_policy(container: Container, policy: str) -> None:
    """Note the policy that a start is to give back, or with "" that there is none, where nerdctl's folder is within reach."""
    if not container.folder:
        return
    with contextlib.suppress(OSError):
        if policy:
            with open(hold_note(container), "w", encoding="ascii") as file:
                file.write(policy)
        else:
            os.unlink(hold_note(container))


def restart_policy(container: Container) -> Dict[str, Any]:
    """Docker's RestartPolicy from containerd's label."""
    name, _, count = (held_policy(container) or container.labels.get("containerd.io/restart.policy") or "no").partition(":")
    return {"Name": name, "MaximumRetryCount": int(count) if count.isdigit() else 0}


def port_bindings(container: Container) -> Dict[str, Any]:
    """Docker's port map of what is published."""
    found: Dict[str, Any] = {}
    for port in parse_ports(container.ports):
        found.setdefault(f"{port['PrivatePort']}/{port['Type']}", []).append({"HostIp": port["IP"], "HostPort": str(port["PublicPort"])})
    return found


UPDATED_FIELDS = ("NanoCpus", "CpuShares", "CpusetCpus", "CpusetMems", "Memory", "MemoryReservation", "MemorySwap", "PidsLimit")


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
        "RestartPolicy": restart_policy(container), "Runtime": DEFAULT_RUNTIME.get(container.runtime, container.runtime) or found["Runtime"],
        "Binds": [f"{mount['Source']}:{mount['Destination']}" + ("" if mount["RW"] else ":ro")
                  for mount in parse_mounts(labels) if mount["Type"] == "bind" and not container.request] or None,
        "CgroupnsMode": "private" if any(each.get("type") == "cgroup" for each in spec.get("namespaces") or []) else "host",
    })
    asked = container.host_config
    if found["CpuQuota"] > 0 and found["CpuPeriod"] and not (asked.get("CpuPeriod") or asked.get("CpuQuota")):
        found.update({"NanoCpus": found["CpuQuota"] * 10**9 // found["CpuPeriod"], "CpuPeriod": 0, "CpuQuota": 0})
    for key, value in asked.items():
        if key == "RestartPolicy" and isinstance(value, dict) or key in UPDATED_FIELDS and found.get(key):
            # `docker update` changes it later, and what nerdctl tells follows.
            continue
        if key == "PortBindings" and isinstance(value, dict):
            value = {port if "/" in port else port + "/tcp": [{"HostIp": "", "HostPort": "", **each} for each in places or []]
                     for port, places in value.items()}
        if key == "LogConfig" and isinstance(value, dict):
            value = {**value, "Type": value.get("Type") or found[key]["Type"], "Config": value.get("Config") or {}}
        if value not in (None, "", 0, [], {}) or key not in found:
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
        entrypoint = asked["Entrypoint"] if asked.get("Entrypoint") is not None else image.get("Entrypoint")
        command = asked.get("Cmd") or (None if asked.get("Entrypoint") is not None else image.get("Cmd"))
    found = {
        "Hostname": container.labels.get("nerdctl/hostname") or spec.get("hostname") or "", "Domainname": container.labels.get("nerdctl/domainname") or "",
        "User": container.labels.get("nerdctl/user") or image.get("User") or "", "AttachStdin": bool(asked.get("AttachStdin")),
        "AttachStdout": bool(asked.get("AttachStdout", not asked)), "AttachStderr": bool(asked.get("AttachStderr", not asked)),
        "Tty": bool(asked.get("Tty", process.get("terminal", False))), "OpenStdin": bool(asked.get("OpenStdin", False)),
        "StdinOnce": bool(asked.get("StdinOnce", False)),
        # What has no value is no variable, and dockerd keeps it nevertheless.
        "Env": [*(each for each in process.get("env") or [] if not each.startswith("HOSTNAME=")),
                *(each for each in string_list(asked.get("Env"), "Env") if "=" not in each)] or None,
        "Cmd": command, "Image": shown_image(container), "Volumes": asked.get("Volumes") or image.get("Volumes"),
        "WorkingDir": asked.get("WorkingDir") or process.get("cwd") or "", "Entrypoint": entrypoint,
        "Labels": container.visible_labels,
    }
    ports = {**{key: {} for key in port_bindings(container)}, **(image.get("ExposedPorts") or {}),
             **{key if "/" in key else key + "/tcp": {} for key in asked.get("ExposedPorts") or {}}}
    if ports:
        found["ExposedPorts"] = ports
    for key in ("Healthcheck", "StopSignal", "StopTimeout", "Shell", "MacAddress", "NetworkDisabled", "OnBuild"):
        if asked.get(key) or image.get(key) or key == "StopTimeout" and asked.get(key) is not None:
            found[key] = asked.get(key) or image.get(key) or asked[key]
    return found


def refused_code(error: str) -> int:
    """The exit code that Docker gives a container whose start failed with these words."""
    return 127 if re.search("executable file not found|no such file or directory", error) else 126 if "denied" in error else 128


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
    began, code, error = started_at(container), status.get("ExitStatus") or 0 if state in ("exited", "restarting") else 0, ""
    if not task and began:
        # nerdctl never takes an error back: only one of this time counts. Without, the task went with a restart of the machine,
        # and containerd remembers no more.
        error = container.labels.get("nerdctl/error") or "" if began / 1e9 > time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) else ""
        state, code, began = ("created", refused_code(error), None) if error else ("exited", 0, began)
    found = {
        "Status": state, "Running": state in ("running", "paused", "restarting"), "Paused": state == "paused", "Restarting": state == "restarting",
        "OOMKilled": bool(container.memo.get("oom")), "Dead": False, "Pid": task.get("Pid") or 0 if state in ("running", "paused") else 0,
        "ExitCode": code, "Error": error,
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
    if has_init(container) and arguments[:2] in INIT_WORDS:
        arguments = arguments[2:]
    first = next(iter(attached.values()), {})
    hosts = next((each["source"] for each in spec.get("mounts") or [] if each.get("destination") == "/etc/hosts"), "")
    ports: Dict[str, Any] = {key: None for key in config.get("ExposedPorts") or {}}
    ports.update(port_bindings(container) if container.running else {})
    settings = {
        "SandboxID": sha256(container.id.encode()).hexdigest() if container.running else "", "SandboxKey": "", "Ports": ports, "Networks": attached,
    }
    if version < (1, 51):
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
        "Mounts": docker_mounts(container), "Config": config, "NetworkSettings": settings,
    }
    if version >= (1, 52):
        found["Storage"] = {"RootFS": {"Snapshot": {"Name": found.pop("GraphDriver")["Name"]}}}
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
    """State.Health of a container with a health check, None without and before its first start."""
    if not container.labels.get("nerdctl/healthcheck") or not was_started(container):
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
    told["ExecIDs"] = [each.id for each in list(engine.execs.values()) if each.running and each.container.id == container.id] or None
    if request.flag("size"):
        told["SizeRw"], told["SizeRootFs"] = container_sizes(engine, container).get(container.real, (0, 0))
    return Response(200, told)


###############################################################################
# Container create
###############################################################################


def csv_word(text: str) -> str:
    """A value as one element of a flag that nerdctl splits at commas."""
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",\n]', text) or text != text.strip() else text


def _text(value: Any, flag: str, what: str) -> List[str]:
    """A string as `FLAG=text`."""
    text = typed(value, str, what)
    return [f"{flag}={text}"] if text else []


def _each(value: Any, flag: str, what: str) -> List[str]:
    """A list as one `FLAG=element` each."""
    return [f"{flag}={each}" for each in string_list(value, what)]


def _listed(value: Any, flag: str, what: str) -> List[str]:
    """The same for a flag that nerdctl splits at commas."""
    return [f"{flag}={csv_word(each)}" for each in string_list(value, what)]


def _number(value: Any, flag: str, what: str) -> List[str]:
    """A number other than 0."""
    number = typed(value, int, what)
    return [f"{flag}={number}"] if number else []


def _switch(value: Any, flag: str, what: str) -> List[str]:
    """The flag alone for true."""
    return [flag] if typed(value, bool, what) else []


def _pairs(value: Any, flag: str, what: str) -> List[str]:
    """An object as one `FLAG=key=value` each."""
    return [f"{flag}={key}={each}" for key, each in string_map(value, what).items()]


# Field of the create request -> flag of nerdctl create, and how its value becomes words. What needs more than that is in
# the functions below.
CREATE_FLAGS: Tuple[Tuple[str, str, Callable[[Any, str, str], List[str]]], ...] = (
    ("Domainname", "--domainname", _text), ("User", "--user", _text), ("Tty", "--tty", _switch),
    ("OpenStdin", "--interactive", _switch), ("StopSignal", "--stop-signal", _text), ("WorkingDir", "--workdir", _text),
    ("HostConfig.CapAdd", "--cap-add", _listed),
    ("HostConfig.CapDrop", "--cap-drop", _listed), ("HostConfig.CgroupnsMode", "--cgroupns", _text), ("HostConfig.Dns", "--dns", _listed),
    ("HostConfig.DnsOptions", "--dns-option", _listed), ("HostConfig.DnsSearch", "--dns-search", _listed),
    ("HostConfig.ExtraHosts", "--add-host", _listed), ("HostConfig.GroupAdd", "--group-add", _listed), ("HostConfig.UTSMode", "--uts", _text),
    ("HostConfig.OomScoreAdj", "--oom-score-adj", _number), ("HostConfig.Privileged", "--privileged", _switch),
    ("HostConfig.ReadonlyRootfs", "--read-only", _switch), ("HostConfig.Runtime", "--runtime", _text),
    ("HostConfig.UsernsMode", "--userns", _text),
    ("HostConfig.ShmSize", "--shm-size", _number), ("HostConfig.Sysctls", "--sysctl", _pairs),
    ("HostConfig.Annotations", "--annotation", _pairs), ("HostConfig.CgroupParent", "--cgroup-parent", _text),
    ("HostConfig.CpuShares", "--cpu-shares", _number), ("HostConfig.CpuPeriod", "--cpu-period", _number),
    ("HostConfig.CpuQuota", "--cpu-quota", _number), ("HostConfig.CpuRealtimePeriod", "--cpu-rt-period", _number),
    ("HostConfig.CpuRealtimeRuntime", "--cpu-rt-runtime", _number), ("HostConfig.CpusetCpus", "--cpuset-cpus", _text),
    ("HostConfig.CpusetMems", "--cpuset-mems", _text), ("HostConfig.Memory", "--memory", _number),
    ("HostConfig.MemoryReservation", "--memory-reservation", _number), ("HostConfig.MemorySwap", "--memory-swap", _number),
    ("HostConfig.KernelMemory", "--kernel-memory", _number), ("HostConfig.OomKillDisable", "--oom-kill-disable", _switch),
    ("HostConfig.PidsLimit", "--pids-limit", _number), ("HostConfig.BlkioWeight", "--blkio-weight", _number),
)
# Accepted by dockerd and without a counterpart in nerdctl.
IGNORED_FIELDS = ("DeviceCgroupRules", "Links", "StorageOpt", "CpuCount", "CpuPercent", "IOMaximumIOps", "IOMaximumBandwidth", "Cgroup")


def field_of(body: Dict[str, Any], path: str) -> Any:
    """The value at `HostConfig.Memory`; None when it is not there."""
    for key in path.split("."):
        body = typed(body, dict, "the body").get(key)
        if body is None:
            return None
    return body


def port_args(body: Dict[str, Any], image: Dict[str, Any], pick: Optional[Callable[[str], int]] = None) -> List[str]:
    """`--publish` words for PortBindings and, with PublishAllPorts, for every exposed port; `pick` finds a port of the host
    where none is asked for. 400 for what is no port."""
    host = typed(body.get("HostConfig"), dict, "HostConfig")
    for each in typed(body.get("ExposedPorts"), dict, "ExposedPorts"):
        if not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?(/(tcp|udp|sctp))?", each):
            raise BadParameter(f"invalid port specification: {each}")
    bindings = dict(typed(host.get("PortBindings"), dict, "PortBindings"))
    if typed(host.get("PublishAllPorts"), bool, "PublishAllPorts"):
        exposed = {**(image.get("ExposedPorts") or {}), **typed(body.get("ExposedPorts"), dict, "ExposedPorts")}
        bindings = {**{key: [{}] for key in exposed}, **bindings}
    words = []
    for key, places in bindings.items():
        found = re.fullmatch(r"(\d{1,5}(?:-\d{1,5})?)(?:/(tcp|udp|sctp))?", key.lower())
        if not found:
            raise BadParameter(f"invalid port specification: {key!r}")
        for place in typed(places, list, "PortBindings") or [{}]:
            place = typed(place, dict, "PortBindings")
            number, address = str(place.get("HostPort") or ""), typed(place.get("HostIp"), str, "HostIp").strip("[]")
            if not re.fullmatch(r"(\d{1,5}(-\d{1,5})?)?", number) or not re.fullmatch(r"[0-9a-fA-F.:]*", address):
                raise BadParameter(f"invalid port specification: {address}:{number}->{key}")
            if number in ("", "0") and (pick or os.geteuid()) and "-" not in found.group(1):
                # A rootless nerdctl picks no port by itself.
                number = str((pick or free_port)(found.group(2) or "tcp"))
            number = "" if number == "0" else number
            place_words = [f"[{address}]" if ":" in address else address, number] if address else [number] if number else []
            words.append("--publish=" + ":".join([*place_words, found.group(1)]) + "/" + (found.group(2) or "tcp"))
    return list(dict.fromkeys(words))


def free_port(kind: str, taken: Iterable[int] = ()) -> int:
    """A port of this machine that nobody uses now and that is none of `taken`."""
    for _ in range(100):
        port = unused_port(kind)
        if port not in taken:
            break
    return port


def unused_port(kind: str) -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as sock:
        sock.bind(("0.0.0.0", 0))
        return sock.getsockname()[1]


def pick_port(engine: Engine, kind: str) -> int:
    """A free port of the host for a container. nerdctl's own choice leaves out what runs, so that two containers that are
    created one after the other, and then started, would get the same."""
    taken = {port["PublicPort"] for each in engine.snapshot.containers.get().values() for port in parse_ports(each.ports)}
    with engine.lock:
        engine.picked.append(free_port(kind, taken.union(engine.picked)))
        return engine.picked[-1]


def mount_word(mount: Dict[str, Any]) -> str:
    """The value of `--mount` for one of HostConfig.Mounts. 400 for what cannot be, 501 for what nerdctl has not."""
    kind = typed(mount.get("Type"), str, "Type") or "volume"
    target, source = typed(mount.get("Target"), str, "Target"), typed(mount.get("Source"), str, "Source")
    if kind not in ("bind", "volume", "tmpfs"):
        if kind in ("image", "cluster", "npipe"):
            raise NotImplementedHere(f"nerdctl has no mounts of type {kind}")
        raise BadParameter(f"invalid mount config for type \"{kind}\": mount type unknown")
    if not target:
        raise BadParameter(f"invalid mount config for type \"{kind}\": field Target must not be empty")
    if not target.startswith("/"):
        raise BadParameter(f"invalid mount config for type \"{kind}\": invalid mount path: '{target}' mount path must be absolute")
    words = [f"type={kind}", f"target={target}"]
    if kind == "bind":
        options = typed(mount.get("BindOptions"), dict, "BindOptions")
        if not source:
            raise BadParameter('invalid mount config for type "bind": field Source must not be empty')
        if not os.path.lexists(source) and not options.get("CreateMountpoint"):
            raise BadParameter(f'invalid mount config for type "bind": bind source path does not exist: {source}')
        words += [f"bind-propagation={options['Propagation']}"] if options.get("Propagation") else []
        words += ["bind-nonrecursive"] if options.get("NonRecursive") else []
    elif kind == "tmpfs":
        options = typed(mount.get("TmpfsOptions"), dict, "TmpfsOptions")
        words += [f"tmpfs-size={options['SizeBytes']}"] if options.get("SizeBytes") else []
        words += [f"tmpfs-mode={options['Mode']:o}"] if isinstance(options.get("Mode"), int) and options["Mode"] else []
    elif typed(mount.get("VolumeOptions"), dict, "VolumeOptions").get("Subpath"):
        raise NotImplementedHere("nerdctl cannot mount a part of a volume")
    if source and kind != "tmpfs":
        words.append(f"source={source}")
    if typed(mount.get("ReadOnly"), bool, "ReadOnly"):
        words.append("readonly")
    return ",".join(map(csv_word, words))


def check_volume_name(name: str) -> None:
    """400 for what no volume can be called."""
    if len(name) == 1:
        raise BadParameter(f"create {name}: volume name is too short, names should be at least two alphanumeric characters")
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", name):
        raise BadParameter(f'create {name}: "{name}" includes invalid characters for a local volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. '
                           "If you intended to pass a host directory, use absolute path")


def created_bind(mount: Dict[str, Any]) -> str:
    """The word for a bind whose source is to be made, as only `--volume` does it; "" for any other mount."""
    mount_word(mount)
    options, source = typed(mount.get("BindOptions"), dict, "BindOptions"), mount.get("Source") or ""
    if mount.get("Type") != "bind" or not options.get("CreateMountpoint") or os.path.lexists(source) or ":" in source + mount["Target"]:
        return ""
    kept = [each for each in ("ro" if mount.get("ReadOnly") else "", options.get("Propagation") or "") if each]
    return "--volume=" + ":".join([source, mount["Target"], *([",".join(kept)] if kept else [])])


BIND_MODE = re.compile(r"|r[ow]|[zZ]|nocopy|cached|delegated|consistent|r?(?:shared|slave|private)|r?bind")


def bind_word(text: str) -> str:
    """The value of `--volume` for one of HostConfig.Binds, without the options that change nothing on Linux."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts[:2]):
        raise BadParameter(f"invalid volume specification: '{text}'")
    if not parts[:2][-1].startswith("/"):
        raise BadParameter(f"invalid volume specification: '{text}': invalid mount config: mount path must be absolute")
    if len(parts) > 1 and not parts[0].startswith("/"):
        check_volume_name(parts[0])
    if len(parts) == 3:
        if not all(BIND_MODE.fullmatch(each) for each in parts[2].split(",")):
            raise BadParameter(f"invalid mode: {parts[2]}")
        kept = [each for each in parts[2].split(",") if each and each not in ("nocopy", "cached", "delegated", "consistent")]
        parts[2:] = [",".join(kept)] if kept else []
    return ":".join(parts)


def mount_args(body: Dict[str, Any], image: Dict[str, Any]) -> List[str]:
    """Words for Binds, Mounts, Tmpfs and the anonymous Volumes."""
    host = typed(body.get("HostConfig"), dict, "HostConfig")
    words = [f"--volume={bind_word(each)}" for each in string_list(host.get("Binds"), "Binds")]
    mounts = [typed(each, dict, "Mounts") for each in typed(host.get("Mounts"), list, "Mounts")]
    targets = [os.path.normpath((each.split(":") + [""])[1] or each) for each in string_list(host.get("Binds"), "Binds")]
    targets += [os.path.normpath(str(each.get("Target"))) for each in mounts]
    for target in [each for each in targets if targets.count(each) > 1]:
        raise BadParameter(f"Duplicate mount point: {target}")
    words += [created_bind(each) or f"--mount={mount_word(each)}" for each in mounts]
    for path, options in string_map(host.get("Tmpfs"), "Tmpfs").items():
        words.append(f"--tmpfs={path}:{options}" if options else f"--tmpfs={path}")
    taken = {(each.split(":") + [""])[1] or each for each in string_list(host.get("Binds"), "Binds")} | {each.get("Target") for each in mounts}
    for path in typed(body.get("Volumes"), dict, "Volumes"):
        if path not in taken:
            if not path.startswith("/"):
                raise BadParameter(f"invalid volume specification: '{path}': mount path must be absolute")
            words.append(f"--volume={path}")
    return words


def health_check(body: Dict[str, Any], image: Dict[str, Any]) -> Dict[str, Any]:
    """The request's health check, with what the image says where it says nothing."""
    asked = typed(body.get("Healthcheck"), dict, "Healthcheck")
    return {**(image.get("Healthcheck") or {}), **{key: value for key, value in asked.items() if value}}


def health_args(body: Dict[str, Any], image: Dict[str, Any]) -> List[str]:
    """Words for the health check."""
    check = health_check(body, image)
    test = string_list(check.get("Test"), "Healthcheck.Test")
    if test[:1] == ["NONE"]:
        return ["--no-healthcheck"]
    if not test:
        return []
    if test[0] not in ("CMD", "CMD-SHELL"):
        raise BadParameter(f"unknown health check type: {test[0]!r}")
    words = ["--health-cmd=" + (" ".join(test[1:]) if test[0] == "CMD-SHELL" else shlex.join(test[1:]))]
    for key, flag in (("Interval", "--health-interval"), ("Timeout", "--health-timeout"), ("StartPeriod", "--health-start-period")):
        duration = typed(check.get(key), int, key)
        if duration and duration < 10**6:
            raise BadParameter(f"{key} in Healthcheck cannot be less than 1ms")
        words += [f"{flag}={duration}ns"] if duration else []
    if typed(check.get("Retries"), int, "Retries") < 0:
        raise BadParameter("Retries in Healthcheck cannot be negative")
    return words + _number(check.get("Retries"), "--health-retries", "Retries")


CAPABILITIES = frozenset(
    "ALL AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL "
    "LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN "
    "SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM".split())
SECURITY_OPTIONS = ("apparmor", "label", "no-new-privileges", "privileged-without-host-devices", "seccomp", "systempaths", "writable-cgroups")


def check_privileges(host: Dict[str, Any]) -> None:
    """400 with dockerd's words for capabilities that there are not; nerdctl drops them in silence."""
    for key in ("CapAdd", "CapDrop"):
        for each in string_list(host.get(key), key):
            name = re.sub("^CAP_", "", each.upper())
            if name not in CAPABILITIES:
                raise BadParameter(f'invalid {key}: unknown capability: "CAP_{name}"')


def security_args(host: Dict[str, Any]) -> List[str]:
    """Words for the security options; 400 with dockerd's words for what is none. dockerd also takes `name:value`, which
    nerdctl would drop in silence."""
    words = []
    for each in string_list(host.get("SecurityOpt"), "SecurityOpt"):
        name, sign, value = re.fullmatch("(?s)([^=:]*)([=:]?)(.*)", "label=disable" if each == "disable" else each).groups()
        known = name in SECURITY_OPTIONS and (sign or name not in ("apparmor", "label", "seccomp"))
        if not known or name == "no-new-privileges" and sign and value.lower() not in ("1", "t", "true", "0", "f", "false"):
            raise BadParameter(f'invalid --security-opt 2: "{each}"')
        if name == "seccomp":
            value = value.strip()
            if value == "builtin":
                continue
            if value != "unconfined" and not value.startswith("{"):
                raise BadParameter("invalid --security-opt 2: the seccomp profile is not JSON")
        words.append(f"--security-opt={name}" + (f"={value}" if sign else ""))
    return words


@contextlib.contextmanager
def profile_files(engine: Engine, words: List[str]) -> Iterator[List[str]]:
    """Context in which a seccomp profile, which clients send as its text, is the path of a file, as nerdctl takes it."""
    start = "--security-opt=seccomp="
    if not any(each.startswith(start + "{") for each in words):
        yield words
        return
    if not engine.nerdctl.local:
        raise NotImplementedHere("a seccomp profile cannot be given to a nerdctl on another machine")
    with engine.workspace.temporary("seccomp") as folder:
        path = os.path.join(folder, "profile.json")
        with open(path, "w", encoding="utf-8") as file:
            file.write(next(each for each in reversed(words) if each.startswith(start + "{"))[len(start):])
        yield [start + path if each.startswith(start + "{") else each for each in words]


def restart_args(host: Dict[str, Any]) -> List[str]:
    """Words for the restart policy; 400 with dockerd's words where it cannot be."""
    policy = typed(host.get("RestartPolicy"), dict, "RestartPolicy")
    name, count = typed(policy.get("Name"), str, "RestartPolicy.Name"), typed(policy.get("MaximumRetryCount"), int, "MaximumRetryCount")
    if name in ("", "no"):
        if count and name:
            raise BadParameter("invalid restart policy: maximum retry count cannot be used with 'no'")
        return []
    if name not in ("always", "unless-stopped", "on-failure"):
        raise BadParameter(f"invalid restart policy: unknown policy '{name}'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'")
    if count and name != "on-failure":
        raise BadParameter("invalid restart policy: maximum retry count can only be used with 'on-failure'")
    if typed(host.get("AutoRemove"), bool, "AutoRemove"):
        raise BadParameter("can't create 'AutoRemove' container with restart policy")
    return [f"--restart={name}" + (f":{count}" if count else "")]


def device_args(host: Dict[str, Any]) -> List[str]:
    """Words for devices, their limits, GPUs and ulimits."""
    words = []
    for each in typed(host.get("Devices"), list, "Devices"):
        device = typed(each, dict, "Devices")
        parts = [typed(device.get(key), str, key) for key in ("PathOnHost", "PathInContainer", "CgroupPermissions")]
        words.append("--device=" + csv_word(":".join(part for part in parts if part)))
    for each in typed(host.get("DeviceRequests"), list, "DeviceRequests"):
        request = typed(each, dict, "DeviceRequests")
        if request.get("Driver") == "cdi":
            words += [f"--device={csv_word(name)}" for name in string_list(request.get("DeviceIDs"), "DeviceIDs")]
            continue
        names = string_list(request.get("DeviceIDs"), "DeviceIDs")
        words.append("--gpus=" + (csv_word("device=" + ",".join(names)) if names else
                                  "all" if request.get("Count") in (-1, None) else str(typed(request.get("Count"), int, "Count"))))
    for key, flag, value in (("BlkioWeightDevice", "--blkio-weight-device", "Weight"), ("BlkioDeviceReadBps", "--device-read-bps", "Rate"),
                             ("BlkioDeviceWriteBps", "--device-write-bps", "Rate"), ("BlkioDeviceReadIOps", "--device-read-iops", "Rate"),
                             ("BlkioDeviceWriteIOps", "--device-write-iops", "Rate")):
        for each in typed(host.get(key), list, key):
            words.append(f"{flag}={typed(each, dict, key).get('Path')}:{typed(each.get(value), int, value)}")
    for each in typed(host.get("Ulimits"), list, "Ulimits"):
        limit = typed(each, dict, "Ulimits")
        soft, hard = typed(limit.get("Soft"), int, "Soft"), typed(limit.get("Hard"), int, "Hard")
        if 0 <= hard < soft:
            raise BadParameter(f"ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}")
        words.append(f"--ulimit={typed(limit.get('Name'), str, 'Name')}={soft}:{hard}")
    return words


def network_args(body: Dict[str, Any], networks: Dict[str, Dict[str, Any]], find: Callable[[str], Container]) -> List[str]:
    """Words for the networks: the mode first, then what else EndpointsConfig names. `networks` by name; `find` looks up a
    container, for `container:NAME`."""
    host = typed(body.get("HostConfig"), dict, "HostConfig")
    mode = typed(host.get("NetworkMode"), str, "NetworkMode")
    endpoints = typed(typed(body.get("NetworkingConfig"), dict, "NetworkingConfig").get("EndpointsConfig"), dict, "EndpointsConfig")
    if body.get("NetworkDisabled"):
        mode = "none"
    if mode.startswith("container:"):
        return [f"--network=container:{other_container(find, mode.partition(':')[2]).real}"]
    if mode in ("host", "none"):
        if (typed(endpoints.get(mode), dict, "EndpointsConfig").get("IPAMConfig") or {}).get("IPv4Address"):
            raise BadParameter("user specified IP address is supported on user defined networks only")
        return [f"--network={mode}"]
    if mode in ("", "default") and [each for each in endpoints if each != "default"]:
        mode = next(each for each in endpoints if each != "default")
    by_id = {each["Id"]: name for name, each in networks.items()}
    names, first = [], {}
    for key in dict.fromkeys([mode or "default", *endpoints]):
        name = "bridge" if key == "default" else key if key in networks else by_id.get(key, "")
        if not name:
            # 400 and not dockerd's 404, which clients take for a missing image.
            raise BadParameter(f"network {key} not found")
        if name not in names:
            names.append(name)
            first = first or typed(endpoints.get(key), dict, "EndpointsConfig")
    words = [f"--network={csv_word(name)}" for name in names]
    if len(names) == 1:
        address = typed(first.get("IPAMConfig"), dict, "IPAMConfig")
        words += _text(address.get("IPv4Address"), "--ip", "IPv4Address") + _text(address.get("IPv6Address"), "--ip6", "IPv6Address")
        words += _text(first.get("MacAddress") or body.get("MacAddress"), "--mac-address", "MacAddress")
    return words


def hostname_args(body: Dict[str, Any]) -> List[str]:
    """Words for the host name: what is asked for or, since nerdctl has no network aliases and its containers find each
    other by host name, the alias that a compose service has for its name."""
    name = typed(body.get("Hostname"), str, "Hostname")
    mode = typed(field_of(body, "HostConfig.NetworkMode"), str, "NetworkMode")
    if not name and not mode.startswith(("host", "container:")):
        endpoints = typed(field_of(body, "NetworkingConfig.EndpointsConfig"), dict, "EndpointsConfig")
        aliases = [each for endpoint in endpoints.values() for each in string_list(typed(endpoint, dict, "EndpointsConfig").get("Aliases"), "Aliases")]
        service = typed(body.get("Labels"), dict, "Labels").get("com.docker.compose.service")
        wanted = service if service in aliases else next(iter(aliases), "")
        name = wanted if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62})", wanted or "") else ""
    return [f"--hostname={name}"] if name else []


def other_container(find: Callable[[str], Container], name: str) -> Container:
    """A container that a request names; 400 and not 404 when there is none, which clients take for a missing image."""
    try:
        return find(name)
    except NotFound as error:
        raise BadParameter(str(error)) from None


def namespace_args(host: Dict[str, Any], find: Callable[[str], Container]) -> List[str]:
    """Words for the IPC and PID namespaces, in which a container is named by its real id, and for what of /proc is hidden."""
    words = []
    for key, flag in (("IpcMode", "--ipc"), ("PidMode", "--pid")):
        mode = typed(host.get(key), str, key)
        if mode.startswith("container:"):
            mode = f"container:{other_container(find, mode.partition(':')[2]).real}"
        words += [f"{flag}={mode}"] if mode else []
    if host.get("MaskedPaths") == [] and host.get("ReadonlyPaths") == []:
        words.append("--security-opt=systempaths=unconfined")
    return words


def init_args(host: Dict[str, Any]) -> List[str]:
    """Words for an init process. nerdctl's default, tini, needs the host's libc in the image; one without that is taken
    where there is one."""
    if not typed(host.get("Init"), bool, "Init"):
        return []
    static = next((each for each in STATIC_INITS if shutil.which(each)), "")
    return ["--init", *([f"--init-binary={static}"] if static else [])]


def volumes_from_args(host: Dict[str, Any], find: Callable[[str], Container]) -> List[str]:
    """Words for the mounts of other containers, with `:ro` or `:rw` behind their names, which nerdctl's flag does not know."""
    words = []
    for each in string_list(host.get("VolumesFrom"), "VolumesFrom"):
        name, _, mode = each.partition(":")
        if mode not in ("", "ro", "rw"):
            raise BadParameter(f"invalid mode: {mode}")
        container = other_container(find, name)
        if not mode:
            words.append(f"--volumes-from={container.real}")
            continue
        for mount in parse_mounts(container.labels):
            if mount.get("Type") in ("bind", "volume"):
                source = mount.get("Name") or mount.get("Source") or ""
                words.append(f"--volume={source}:{mount['Destination']}" + (":ro" if mode == "ro" or not mount.get("RW", True) else ""))
    return words


def log_args(host: Dict[str, Any]) -> List[str]:
    """Words for the log driver. Docker's `local` and `json-file` are one to nerdctl."""
    config = typed(host.get("LogConfig"), dict, "LogConfig")
    kind = typed(config.get("Type"), str, "LogConfig.Type")
    if kind not in ("", "local", "json-file", "journald", "fluentd", "syslog", "none"):
        raise BadParameter(f"logger: no log driver named '{kind}' is registered")
    words = [f"--log-driver={kind}"] if kind not in ("", "local", "json-file") else []
    return words + _pairs(config.get("Config"), "--log-opt", "LogConfig.Config")


def unset_variables(body: Dict[str, Any], image: Dict[str, Any]) -> List[str]:
    """Variables of the image that the request wants to be gone: it has their names without a value."""
    asked = string_list(body.get("Env"), "Env")
    given = {each.partition("=")[0] for each in asked if "=" in each}
    return [name for name in (each.partition("=")[0] for each in image.get("Env") or []) if name in asked and name not in given]


def environment_args(body: Dict[str, Any], image: Dict[str, Any]) -> List[str]:
    """Words for the environment. A name without a value would be taken from the daemon's own environment, so it is left
    out; where the image has a value for it, an empty one comes nearest to none."""
    words = [f"--env={each}" for each in string_list(body.get("Env"), "Env") if "=" in each.lstrip("=")]
    return words + [f"--env={each}=" for each in unset_variables(body, image)]


def command_words(body: Dict[str, Any], image: Dict[str, Any]) -> Tuple[List[str], List[str]]:
    """Flags for the entrypoint, and the words after the image."""
    entrypoint, command = body.get("Entrypoint"), string_list(body.get("Cmd"), "Cmd")
    if entrypoint is None:
        return [], command
    words = [each for each in string_list(entrypoint, "Entrypoint")]
    if words in ([], [""]):
        # Docker takes an empty one as not given, but for one empty word, which takes the image's away.
        return (["--entrypoint="], command or list(image.get("Cmd") or [])) if words else ([], command)
    return [f"--entrypoint={each}" for each in words], command


def check_limits(host: Dict[str, Any], update: bool = False) -> None:
    """400 with dockerd's words for limits that cannot be, of a create request's HostConfig or of an update."""
    memory, swap, reservation, cpus, period, quota, shm, oom, swappiness = (typed(host.get(key), int, key) for key in (
        "Memory", "MemorySwap", "MemoryReservation", "NanoCpus", "CpuPeriod", "CpuQuota", "ShmSize", "OomScoreAdj", "MemorySwappiness"))
    least, processors = 6 << 20, os.cpu_count() or 1
    for wrong, message in (
        (memory and memory < least, "Minimum memory limit allowed is 6MB"),
        (0 < swap < memory, "Minimum memoryswap limit should be larger than memory limit, see usage"),
        (swap > 0 and not memory and not update, "You should always set the Memory limit when using Memoryswap limit, see usage"),
        (not -1 <= swappiness <= 100, f"Invalid value: {swappiness}, valid memory swappiness range is 0-100"),
        (reservation and reservation < least, "Minimum memory reservation allowed is 6MB"),
        (0 < memory < reservation, "Minimum memory limit can not be less than memory reservation limit, see usage"),
        (cpus and period, "Conflicting options: Nano CPUs and CPU Period cannot both be set"),
        (cpus and quota, "Conflicting options: Nano CPUs and CPU Quota cannot both be set"),
        (not 0 <= cpus <= processors * 10**9,
         f"Range of CPUs is from 0.01 to {processors}.00, as there are only {processors} CPUs available"),
        (period and not 1000 <= period <= 10**6, "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)"),
        (0 < quota < 1000, "CPU cfs quota can not be less than 1ms (i.e. 1000)"),
        (shm < 0, "SHM size can not be less than 0"),
        (not -1000 <= oom <= 1000, f"Invalid value {oom}, range for oom score adj is [-1000, 1000]"),
    ):
        if wrong:
            raise BadParameter(message)


def create_args(body: Dict[str, Any], image: Dict[str, Any], networks: Dict[str, Dict[str, Any]], find: Callable[[str], Container],
                pick: Optional[Callable[[str], int]] = None) -> Tuple[List[str], List[str]]:
    """argv between `create` and the image's name, and the words after it, of a create request; `image` is the image's own
    configuration, `pick` finds ports. 400 for bad values."""
    host = typed(body.get("HostConfig"), dict, "HostConfig")
    check_limits(host)
    check_privileges(host)
    words: List[str] = []
    for path, flag, render in CREATE_FLAGS:
        words += render(field_of(body, path), flag, path)
    if host.get("NanoCpus"):
        words.append(f"--cpus={typed(host['NanoCpus'], int, 'NanoCpus') / 1e9:g}")
    if isinstance(host.get("MemorySwappiness"), int) and host["MemorySwappiness"] >= 0:
        words.append(f"--memory-swappiness={host['MemorySwappiness']}")
    if body.get("StopTimeout") is not None:
        words.append(f"--stop-timeout={typed(body['StopTimeout'], int, 'StopTimeout')}")
    labels = string_map(body.get("Labels"), "Labels")
    if any(key.startswith(HIDDEN_LABELS[:2]) for key in labels):
        raise BadParameter("invalid label: names that begin with nerdctl/ are nerdctl's own")
    words += environment_args(body, image) + hostname_args(body) + port_args(body, image, pick) + mount_args(body, image) + health_args(body, image)
    words += restart_args(host) + device_args(host) + network_args(body, networks, find) + namespace_args(host, find) + log_args(host)
    words += init_args(host) + volumes_from_args(host, find) + security_args(host)
    words += [f"--label={key}={value}" for key, value in labels.items()]
    flags, command = command_words(body, image)
    return words + flags, command


def create_warnings(body: Dict[str, Any], image: Dict[str, Any], name: str = "", local: bool = False) -> List[str]:
    """What is accepted and not carried out, a sentence each; `local` where nerdctl's files are at hand."""
    host = typed(body.get("HostConfig"), dict, "HostConfig")
    found = [f"{key} is not carried out: nerdctl has no such option" for key in IGNORED_FIELDS if host.get(key) and not (local and key == "Links")]
    if typed(host.get("LogConfig"), dict, "LogConfig").get("Type") == "local":
        found.append("the log driver local is not available: json-file is used")
    if typed(body.get("Healthcheck"), dict, "Healthcheck").get("StartInterval") and os.path.isdir("/run/systemd/system"):
        found.append("StartInterval of the health check is not carried out: nerdctl has none")
    endpoints = typed(field_of(body, "NetworkingConfig.EndpointsConfig"), dict, "EndpointsConfig")
    if len(endpoints) > 1 and any((typed(each, dict, "EndpointsConfig").get("IPAMConfig") or {}).get("IPv4Address") for each in endpoints.values()):
        found.append("addresses are not carried out for several networks: nerdctl sets one for a single network")
    found += [f"the option {key} of network {network} is not carried out: nerdctl has none for one container" for network, one in endpoints.items()
              for key in typed(typed(one, dict, "EndpointsConfig").get("DriverOpts"), dict, "DriverOpts")]
    aliases = [each for one in endpoints.values() for each in string_list(typed(one, dict, "EndpointsConfig").get("Aliases"), "Aliases")]
    known = {word.partition("=")[2] for word in hostname_args(body)} | {typed(body.get("Hostname"), str, "Hostname"), name}
    found += [f"the network alias {each} is not carried out: nerdctl has none" for each in dict.fromkeys(aliases)
              # A client that replaces a container renames the new one later.
              if not local and each not in known and not name.endswith("_" + each)]
    found += [f"the variable {each} of the image is empty and not gone: nerdctl cannot take one away" for each in unset_variables(body, image)]
    return found


CONTAINER_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")


def check_name(engine: Engine, name: str) -> str:
    """A new container's name without its slash; 400 for what is none, 409 for one in use."""
    name = name[1:] if name.startswith("/") else name
    if not CONTAINER_NAME.fullmatch(name):
        raise BadParameter(f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    for each in engine.snapshot.containers.get().values():
        if each.name == name:
            raise Conflict(f'Conflict. The container name "/{name}" is already in use by container "{each.id}". '
                           "You have to remove (or rename) that container to be able to reuse that name.")
    return name


# Objects of a create request whose keys are users' words, and mean something without a value too.
NAMED_FIELDS = {"Annotations", "Config", "DriverOpts", "EndpointsConfig", "ExposedPorts", "Labels", "Options", "PortBindings", "StorageOpt", "Sysctls",
                "Tmpfs", "Volumes"}
# Fields in which nothing is said by None, and something by 0 or an empty list.
TELLING_FIELDS = {"Entrypoint", "MemorySwappiness", "StopTimeout"}


def slim(value: Any, named: bool = False) -> Any:
    """A request without its empty fields, as it is kept: a container made of it is the same."""
    if not isinstance(value, dict):
        return value
    found = {key: slim(each, key in NAMED_FIELDS) for key, each in value.items()}
    return found if named else {key: each for key, each in found.items() if each not in (None, "", 0, False, {}) or key in TELLING_FIELDS and each is not None}


class Plan(NamedTuple):
    """What a container is made of: `words` between the command and the image, `image` its name, `command` the words after
    it, `request` what is kept of the request, `health` the health check if there is one, `environment` the image's."""

    words: List[str]
    image: str
    command: List[str]
    request: Dict[str, Any]
    health: Dict[str, Any] = {}
    environment: Tuple[str, ...] = ()


SHARED_NAMESPACES = (("NetworkMode", "--network"), ("IpcMode", "--ipc"), ("PidMode", "--pid"))


def shared_namespaces(engine: Engine, request: Dict[str, Any]) -> Dict[str, Container]:
    """The containers whose namespaces a create request wants to have, by nerdctl's flags."""
    host = typed(request.get("HostConfig"), dict, "HostConfig")
    modes = ((flag, typed(host.get(key), str, key)) for key, flag in SHARED_NAMESPACES)
    return {flag: other_container(engine.snapshot.container, mode.partition(":")[2]) for flag, mode in modes if mode.startswith("container:")}


def kept_request(engine: Engine, body: Dict[str, Any], image: Dict[str, Any]) -> Dict[str, Any]:
    """What is kept of a create request: with the ports that the image exposes, and with ids for the names of containers, which
    may change."""
    found = slim(body)
    exposed = typed(body.get("ExposedPorts"), dict, "ExposedPorts")
    if image.get("ExposedPorts"):
        found["ExposedPorts"] = {**image["ExposedPorts"], **exposed}
    others = shared_namespaces(engine, body)
    if others:
        found["HostConfig"] = {**slim(body.get("HostConfig")), **{key: f"container:{others[flag].id}" for key, flag in SHARED_NAMESPACES if flag in others}}
    endpoints = field_of(found, "NetworkingConfig.EndpointsConfig")
    if isinstance(endpoints, dict):
        by_id = {each["Id"]: name for name, each in engine.snapshot.networks.get().items()}
        found["NetworkingConfig"] = {**found["NetworkingConfig"], "EndpointsConfig": {by_id.get(name, name): each for name, each in endpoints.items()}}
    return found


def plan_container(engine: Engine, body: Dict[str, Any], platform: str = "") -> Plan:
    """The plan for a create request. 404 when there is no such image, 400 for bad values."""
    name = typed(body.get("Image"), str, "Image")
    if not name:
        raise BadParameter("no command specified" if not body else "invalid reference format")
    group = engine.snapshot.image(name)
    check_platform(group, platform, name)
    full = ""
    with contextlib.suppress(BadParameter):
        full = parse_reference(name).name
    image = group.config.get("config") or {}
    words, command = create_args(body, image, engine.snapshot.networks.get(), engine.snapshot.container,
                                 functools.partial(pick_port, engine) if engine.nerdctl.local else None)
    if not command and not body.get("Entrypoint") and not image.get("Cmd") and not image.get("Entrypoint"):
        raise BadParameter("no command specified")
    if platform:
        words.append(f"--platform={platform_words(platform)}")
    return Plan(words, full if full in group.names else group.names[0], command, kept_request(engine, body, image), health_check(body, image),
                tuple(image.get("Env") or ()))


def make_container(engine: Engine, plan: Plan, name: str, *more: str) -> Container:
    """Create a container and return what is known of it without asking; `more` are further flags."""
    labels = [f"--label={key}={value}" for key, value in request_labels(plan.request).items()]
    names = [f"--name={name}"] if name else []
    with profile_files(engine, plan.words) as words:
        output = engine.nerdctl.run("create", "--pull=never", *names, *more, *words, *labels, "--", plan.image, *plan.command)
    real = output.stdout.decode().strip().rpartition("\n")[2]
    if not re.fullmatch(r"[0-9a-f]{64}", real):
        raise ApiError(f"nerdctl created a container and printed no id: {real[:100]!r}")
    labels = dict(each.partition("=")[2].partition("=")[::2] for each in [*labels, *more, *plan.words] if each.startswith("--label="))
    labels["nerdctl/networks"] = json.dumps([each.partition("=")[2] for each in plan.words if each.startswith("--network=")] or ["bridge"])
    if plan.health:
        labels["nerdctl/healthcheck"] = json.dumps(plan.health)
    if engine.nerdctl.local:
        labels["nerdctl/state-dir"] = os.path.join(engine.snapshot.store, "containers", engine.nerdctl.namespace, real)
    row = {"ID": real, "Names": name, "Image": plan.image, "Status": "Created", "CreatedAt": rfc3339(time.time_ns())}
    container = Container(row, labels)
    engine.snapshot.containers.add(container)
    return container


@contextlib.contextmanager
def making_anew(engine: Engine, container: Container, made: Callable[[], str]) -> Iterator[None]:
    """Context in which another container takes the place of one that was never started, under the id that clients know.
    Until there is one (`made()` is its real id) the old one is kept under another name: it comes back if none was made,
    and `settle_aside` finds it if the daemon is killed meanwhile."""
    try:
        with engine.replacing(container):
            engine.nerdctl.run("rename", container.real, ASIDE + container.name)
            try:
                yield
            finally:
                if not made():
                    engine.nerdctl.run("rename", container.real, container.name)
                    engine.hidden.pop(container.real, None)
                engine.snapshot.containers.drop()
    finally:
        if made():
            with contextlib.suppress(NotFound):
                engine.nerdctl.run("rm", "--volumes", "--", container.real)
            engine.snapshot.containers.asides.pop(container.real, None)


def make_anew(engine: Engine, container: Container, plan: Plan, marks: Iterable[str] = ()) -> Container:
    """Put a new container by a plan in the place of one that was never started; `marks` are labels it gets."""
    made: List[Container] = []
    with making_anew(engine, container, lambda: made[0].real if made else ""):
        made.append(create_container(engine, plan, container.name, f"--label={LABEL_ID}={container.id}", *(f"--label={each}=1" for each in marks)))
    return made[0]


def create_container(engine: Engine, plan: Plan, name: str, *more: str) -> Container:
    """Create a container; where others have its ports now, or where it is to have the namespaces of one that does not run,
    for the time being without them: nerdctl looks for these at once, and Docker at the start."""
    absent = [flag for flag, other in shared_namespaces(engine, plan.request).items() if not other.running]
    if absent:
        kept = [each for each in plan.words if not each.startswith(tuple(f"{flag}=container:" for flag in absent))]
        plan, more = plan._replace(words=kept + ["--network=none"] * ("--network" in absent)), (*more, f"--label={LABEL_LATER}=1")
    if f"--label={LABEL_LATER}=1" not in more:
        try:
            return make_container(engine, plan, name, *more)
        except ApiError as error:
            if "port is already allocated" not in str(error):
                raise
        more = (*more, f"--label={LABEL_LATER}=1")
    return make_container(engine, plan._replace(words=[each for each in plan.words if not each.startswith("--publish=")]), name, *more)


def settle_aside(engine: Engine, container: Container) -> None:
    """For the start of the daemon: what a killed one had put aside goes where its place was taken, and comes back where not.
    A `nerdctl run` that outlived that daemon may still be about to take it."""
    for pause in (0.5, 2.0, 0.0):
        try:
            engine.snapshot.containers.drop()
            if any(each.id == container.id for each in engine.snapshot.containers.get().values()):
                engine.nerdctl.run("rm", "--volumes", "--", container.real)
            else:
                engine.nerdctl.run("rename", container.real, container.name[len(ASIDE):])
                engine.snapshot.containers.drop()
            engine.snapshot.containers.asides.pop(container.real, None)
            return
        except ApiError as error:
            log(f"{container.name}: {error}")
            time.sleep(pause)


@route("POST", "/containers/create")
def container_create(engine: Engine, request: Request) -> Response:
    """Create a container; 201 with its id and warnings. 404 for no such image, 409 for a name in use, 400 for bad values.
    Query options other than name and platform, which some clients repeat there, are ignored."""
    body = request.json(required=True)
    if not body:
        raise BadParameter("config cannot be empty in order to create a container")
    plan = plan_container(engine, body, request.value("platform"))
    name = check_name(engine, request.value("name")) if request.value("name") else ""
    for each in string_list(field_of(body, "HostConfig.Links"), "Links"):
        if not each.strip("/"):
            raise BadParameter(f"invalid link: {each!r}")
    warnings = create_warnings(body, {"Env": list(plan.environment)}, name, engine.nerdctl.local)
    return Response(201, {"Id": create_container(engine, plan, name).id, "Warnings": warnings})


###############################################################################
# Sessions
###############################################################################

# A container that is started with a client on its streams is held by one nerdctl process: `start -a`, `start -a -i` on a
# pseudo-terminal or, since `start` has no stdin without one, `run -i` with the same request. All others are started
# detached, and their output is read from the log file.
STDOUT, STDERR = 1, 2
# What stands before a piece of output: its stream and its length.
FRAME = struct.Struct(">B3xI")
# nerdctl looks for its own detach keys, and would leave the container with Docker's default ones.
NO_DETACH_KEYS = "--detach-keys=" + ",".join(["ctrl-@"] * 8)
FATAL_LINE = re.compile(rb'time="[^"\n]*" level=fatal msg=.*\n?\Z')
# A signal (the SIGCHLD of its own logger too) that it passed on to a process which had ended by then.
SIGNAL_LINE = rb'time="[^"\n]*" level=error msg="forward signal [^"\n]*" error=[^\n]*\n'
SIGNAL_LINES = re.compile(rb"(?:" + SIGNAL_LINE + rb")*")
TRAILING_SIGNAL_LINES = re.compile(rb"(?:" + SIGNAL_LINE + rb")+\Z")


# What nerdctl warns of while it makes a container, before anything else is on its stderr.
LEADING_WARNINGS = re.compile(
    rb'(?:time="[^"\n]*" level=warning msg="(?:volume \\"[^"\n]*\\" already exists|kernel support for cgroup |cgroup manager is set to |Limiting oom_score_adj |'
    rb'Disabling the OOM killer |unknown security-opt|Label \\"|multiple images are found )[^\n]*\n)+')


class TrailingError:
    """Keeps nerdctl's own lines out of a stream of stderr that it shares with a process: its warnings at the beginning, and
    its last lines. What may be those is held back until more comes or the stream has ended."""

    MARK = b'time="'
    LEVELS = (b'" level=fatal msg=', b'" level=error msg="forward signal ')
    LIMIT = 8192

    def __init__(self) -> None:
        self.held = b""
        self.beginning = True

    def feed(self, data: bytes) -> bytes:
        """What may be passed on now."""
        data = self.held + data
        if self.beginning:
            warnings = LEADING_WARNINGS.match(data)
            data = data[warnings.end():] if warnings else data
            self.beginning = not data
        start = data.rfind(self.MARK)
        if start < 0 and len(data) >= select.PIPE_BUF:
            # nerdctl writes its line at once, so that only the end of a full buffer can part it.
            start = next((len(data) - size for size in range(len(self.MARK) - 1, 0, -1) if data.endswith(self.MARK[:size])), -1)
        if start >= 0 and len(data) - start < self.LIMIT and self._possible(data[start:]):
            before = TRAILING_SIGNAL_LINES.search(data, max(0, len(data) - self.LIMIT), start)
            start = before.start() if before else start
            self.held = data[start:]
            return data[:start]
        self.held = b""
        return data

    def _possible(self, line: bytes) -> bool:
        """Whether a line is nerdctl's, or the beginning of it."""
        end = line.find(b'"', len(self.MARK))
        rest = line[end:] if end >= 0 else b""
        if b"\n" in line[:-1] or (not rest and line.endswith(b"\n")):
            return False
        return any(rest.startswith(level) or level.startswith(rest) for level in self.LEVELS)

    def finish(self, failed: bool) -> Tuple[bytes, str]:
        """At the end of the stream: what is still to be passed on, and nerdctl's own message, "" for none. `failed` says
        whether nerdctl ended with a status other than 0, and so has said something."""
        held, self.held = self.held, b""
        last = held[SIGNAL_LINES.match(held).end():]
        if failed and FATAL_LINE.match(last):
            return b"", parse_logrus(last.decode(errors="replace").rstrip("\n"))[1]
        return held if last else b"", ""


class DetachKeys:
    """Finds the keys that detach a client from a terminal."""

    def __init__(self, text: str):
        self.sequence = b""
        for key in (text or "ctrl-p,ctrl-q").split(","):
            found = re.fullmatch(r"ctrl-([a-z@\[\\\]^_])", key)
            if not found and len(key) != 1:
                raise BadParameter(f"invalid detach keys: {text!r}")
            self.sequence += bytes([ord(found.group(1).upper()) & 0x1F]) if found else key.encode("latin-1", "replace")
        self.matched = 0

    def feed(self, data: bytes) -> Tuple[bytes, bool]:
        """What is to be passed on of some input, and whether the keys were typed."""
        out = bytearray()
        for byte in data:
            if byte == self.sequence[self.matched]:
                self.matched += 1
                if self.matched == len(self.sequence):
                    return bytes(out), True
            else:
                out += self.sequence[: self.matched]
                self.matched = 1 if byte == self.sequence[0] else 0
                if not self.matched:
                    out.append(byte)
        return bytes(out), False


class Attachment:
    """A client on the streams of a container or exec: which of them it wants, and whether in frames."""

    def __init__(self, stdout: bool, stderr: bool, framed: bool, stdin: bool = False):
        # The client is waited for before its connection has been handed over.
        self.connection: Optional[Connection] = None
        self.connected = threading.Event()
        self.wanted = {STDOUT: stdout, STDERR: stderr}
        self.framed = framed
        self.stdin = stdin
        self.gone = False
        # Set when there is nothing more to come, or the client has left.
        self.done = threading.Event()
        # Set when a session has taken it, or there will be none.
        self.ready = threading.Event()
        self.session: Any = None

    def connect(self, connection: Connection) -> None:
        """The client's connection is there."""
        self.connection = connection
        self.connected.set()

    def put(self, kind: int, data: bytes) -> None:
        """Send some output; a client that has left is marked so."""
        if self.gone or not self.wanted[kind] or not data:
            return
        if not self.connected.wait(60):
            self.leave()
            return
        try:
            if self.framed:
                self.connection.send(FRAME.pack(kind, len(data)), data)
            else:
                self.connection.send(data)
        except ClientGone:
            self.leave()

    def leave(self) -> None:
        """The client is there no more."""
        self.gone = True
        self.finish()

    def finish(self) -> None:
        """There is nothing more to come; whoever waits for input from the client need not any more."""
        self.done.set()
        self.ready.set()
        self.connected.set()
        if self.connection:
            self.connection.stop_input()


class Terminal:
    """A pseudo-terminal; nerdctl gets `slave` as its stdin and stdout, and is told of every new size."""

    def __init__(self, height: int = 0, width: int = 0):
        self.lock = threading.Lock()
        self.master, self.slave = pty.openpty()
        # The container's own terminal makes line ends and echoes.
        tty.setraw(self.slave)
        self.pid, self.began = 0, 0.0
        if height and width:
            self.resize(height, width)

    def resize(self, height: int, width: int) -> None:
        """Set the size in characters."""
        with self.lock, contextlib.suppress(OSError):
            if self.master >= 0:
                fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height & 0xFFFF, width & 0xFFFF, 0, 0))
        self.signal()
        # nerdctl looks at the size, starts the process, and listens for the signal some time after that.
        for seconds in (0.3, 1.0) if self.pid and time.monotonic() < self.began + 5.0 else ():
            timer = threading.Timer(seconds, self.signal)
            timer.daemon = True
            timer.start()

    def signal(self) -> None:
        """Have nerdctl look at the size."""
        with self.lock, contextlib.suppress(OSError):
            if self.pid:
                os.kill(self.pid, signal.SIGWINCH)

    def pass_size(self, path: str) -> None:
        """Give another terminal the same size, where this one has any."""
        with self.lock, contextlib.suppress(OSError):
            size = fcntl.ioctl(self.master, termios.TIOCGWINSZ, bytes(8)) if self.master >= 0 else bytes(8)
            if any(size[:4]):
                descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
                try:
                    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, size)
                finally:
                    os.close(descriptor)

    def started(self, process: Process) -> None:
        """nerdctl runs: from now on only it holds the other end."""
        os.close(self.slave)
        self.pid, self.began = process.popen.pid, process.began

    def ended(self) -> None:
        """nerdctl is about to be reaped: its number may soon be another's."""
        with self.lock:
            self.pid = 0

    def close(self) -> None:
        """Nobody is to be told of sizes any more."""
        with self.lock:
            os.close(self.master)
            self.master = -1


class Input:
    """The way to a process's stdin: `file` is where it is written to, `once` whether it ends with the first client's input,
    `on_end` is called after its end."""

    def __init__(self, file: Any, once: bool = True, on_end: Callable[[], None] = lambda: None):
        self.lock = threading.Lock()
        self.file, self.once, self.on_end = file, once, on_end

    def write(self, data: bytes) -> bool:
        """Pass data on; False when none is taken any more."""
        with self.lock:
            # A number of its own: a write may last, and the end come meanwhile.
            if self.file.closed:
                return False
            descriptor = os.dup(self.file.fileno())
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(descriptor, view):]
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def close_stdin(self, force: bool = False) -> None:
        """End of the input of one client: of the process too, where it was opened for one client only."""
        if (self.once or force) and self.close():
            self.on_end()

    def close(self) -> bool:
        """Let it go without a word; whether it was open."""
        with self.lock, contextlib.suppress(OSError):
            was_open = not self.file.closed
            self.file.close()
            return was_open
        return False


class Session:
    """A nerdctl process with the streams of one container (or exec): its output goes to every attachment, and their
    input to it. `on_end(status, message)` is called once, in its thread, when it has ended and before the clients are
    told; `message` is nerdctl's own, "" for none."""

    def __init__(self, attachments: Iterable[Attachment], terminal: Optional[Terminal] = None, once: bool = True,
                 on_end: Callable[[int, str], None] = lambda status, message: None):
        self.lock = threading.Lock()
        self.attachments = list(attachments)
        self.terminal = terminal
        self.once = once
        self.on_end = on_end
        self.process: Optional[Process] = None
        self.input: Optional[Input] = None
        self.outputs: Dict[int, int] = {}
        self.ended = threading.Event()
        self.status: Optional[int] = None
        self.message = ""
        # Where the count of task events stood when it was begun.
        self.begun = 0
        # Set when input may be passed on.
        self.taking = threading.Event()

    def run(self, nerdctl: Nerdctl, arguments: List[str], stdin: bool, lasting: bool, held: bool = False) -> None:
        """Start nerdctl with these arguments. A `lasting` one outlives the daemon. Input for one that is `held` waits for
        `taking`: nerdctl 2.3 forgets an end of file that it reads before its process runs, which then waits for it for ever."""
        if self.terminal:
            try:
                self.process = nerdctl.start(*arguments, stdin=self.terminal.slave, stdout=self.terminal.slave, lasting=lasting)
            except ApiError:
                self.terminal.close()
                os.close(self.terminal.slave)
                raise
            self.terminal.started(self.process)
            self.input = Input(open(self.terminal.master, "wb", buffering=0, closefd=False), False) if stdin else None
            self.outputs = {self.terminal.master: STDOUT}
        else:
            self.process = nerdctl.start(*arguments, stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stderr=subprocess.PIPE, lasting=lasting)
            self.input = Input(self.process.stdin, self.once) if stdin else None
            self.outputs = {self.process.stdout.fileno(): STDOUT, self.process.stderr.fileno(): STDERR}
        if not held:
            self.taking.set()
        for attachment in self.attachments:
            attachment.session = self
            attachment.ready.set()
        threading.Thread(target=self._follow, name="session", daemon=True).start()

    def take_input(self, target: Optional[Input]) -> None:
        """Let input through, to this target, unless the process has ended."""
        with self.lock:
            if not self.taking.is_set():
                self.input = target
                self.taking.set()
                return
        if target:
            target.close()

    def join(self, attachment: Attachment) -> bool:
        """Add a client; whether there is still something to come."""
        with self.lock:
            if self.ended.is_set():
                return False
            attachment.session = self
            attachment.ready.set()
            # One that was there from the beginning may ask before nerdctl runs.
            if attachment not in self.attachments:
                self.attachments = [*self.attachments, attachment]
            return True

    def write(self, data: bytes) -> bool:
        """Input for the process; False when it takes none any more."""
        self.taking.wait()
        return self.input is not None and self.input.write(data)

    def close_stdin(self, force: bool = False) -> None:
        """End of the input of one client."""
        self.taking.wait()
        if self.input:
            self.input.close_stdin(force)

    def put(self, kind: int, data: bytes) -> None:
        """Send output to everyone who is there."""
        for attachment in self.attachments:
            attachment.put(kind, data)
        if any(each.gone for each in self.attachments):
            with self.lock:
                self.attachments = [each for each in self.attachments if not each.gone]

    def _follow(self) -> None:
        trailing = TrailingError()
        poller = select.poll()
        for descriptor in self.outputs:
            poller.register(descriptor, select.POLLIN)
        left = dict(self.outputs)
        try:
            while left:
                for descriptor, _ in poller.poll():
                    try:
                        data = os.read(descriptor, BLOCK)
                    except OSError:
                        # A pseudo-terminal whose other end is closed.
                        data = b""
                    if not data:
                        poller.unregister(descriptor)
                        del left[descriptor]
                        continue
                    kind = self.outputs[descriptor]
                    self.put(kind, trailing.feed(data) if kind == STDERR else data)
            if self.terminal:
                self.terminal.ended()
            self.status = self.process.wait()
            rest, self.message = trailing.finish(bool(self.status))
            self.put(STDERR, rest)
            if self.terminal and self.status:
                self.message = nerdctl_message(self.process.error_text())
        except Exception:
            log(traceback.format_exc())
        finally:
            self._end()

    def _end(self) -> None:
        with self.lock:
            self.taking.set()
        if self.input:
            self.input.close()
        self.process.close()
        if self.terminal:
            self.terminal.close()
        try:
            self.on_end(self.status if self.status is not None else 1, self.message)
        except Exception:
            log(traceback.format_exc())
        with self.lock:
            self.ended.set()
            attachments, self.attachments = self.attachments, []
        for attachment in attachments:
            attachment.finish()


def pump_stdin(attachment: Attachment, session: Any, keys: Optional[DetachKeys]) -> bool:
    """Pass a client's input on, to a Session or an Input, until it ends, the client leaves or detaches. Whether it was
    detached by its keys."""
    while not attachment.done.is_set():
        data = attachment.connection.recv(65536)
        if not data:
            session.close_stdin()
            return False
        detached = False
        if keys:
            data, detached = keys.feed(data)
        if data and not session.write(data):
            session.close_stdin(force=True)
        if detached:
            return True
    return False


class LogLine(NamedTuple):
    """A line of a container's log: when it was written, as the log has it; STDOUT or STDERR; and what was written, as bytes."""

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
        return [LogLine(row["time"], STDERR if row["stream"] == "stderr" else STDOUT, row["log"].encode("utf-8", "surrogatepass"))
                for row in json.loads(b"[" + b",".join(lines) + b"]")]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        if len(lines) < 2:
            return []
        half = len(lines) // 2
        return parse_log_lines(lines[:half]) + parse_log_lines(lines[half:])


class LogFile:
    """A json-file log that is read while it is written and rotated."""

    def __init__(self, path: str):
        self.path = path
        self.file: Any = None
        self.rest = b""

    def open(self, at_end: bool = False) -> "LogFile":
        """Open it if it is there already."""
        with contextlib.suppress(OSError):
            self.file = open(self.path, "rb", buffering=0)
            if at_end:
                self.file.seek(0, os.SEEK_END)
        return self

    def seek_tail(self, count: int) -> None:
        """Go to where the last `count` lines begin."""
        if not self.file:
            return
        position = self.file.seek(0, os.SEEK_END)
        found = 0
        while position > 0 and found <= count:
            size = min(65536, position)
            position -= size
            self.file.seek(position)
            data = self.file.read(size)
            found += data.count(b"\n")
        self.file.seek(position)
        surplus = found - count
        while surplus > 0:
            block = self.file.read(65536)
            for _ in range(block.count(b"\n")):
                index = block.index(b"\n") + 1
                position += index
                block = block[index:]
                surplus -= 1
                if not surplus:
                    break
            else:
                position += len(block)
            if not block and surplus:
                break
        self.file.seek(position)

    def lines(self) -> List[LogLine]:
        """What was written since the last call, at most some 256 KiB of it; [] when there is nothing new."""
        if self.file is None:
            self.open()
            if self.file is None:
                return []
        data = self.file.read(BLOCK)
        if not data and self._rotated():
            # The old one may have grown before it was put aside.
            data = self.file.read(BLOCK)
            if not data:
                self.close()
                self.open()
                data = self.file.read(BLOCK) if self.file else b""
        if not data:
            return []
        *whole, self.rest = (self.rest + data).split(b"\n")
        # Not empty while there is more to read.
        return parse_log_lines([line for line in whole if line]) or [NO_LINE]

    def _rotated(self) -> bool:
        """Whether the file was put aside for a new one; one that was cut short is read from its beginning."""
        try:
            now, mine = os.stat(self.path), os.fstat(self.file.fileno())
        except OSError:
            return False
        if now.st_ino == mine.st_ino:
            if now.st_size >= self.file.tell():
                return False
            self.file.seek(0)
            return True
        if mine.st_size > self.file.tell():
            # Written after we looked and before it was put aside.
            return True
        self.close()
        self.open()
        return self.file is not None

    def close(self) -> None:
        """Let the file go."""
        if self.file:
            self.file.close()
            self.file = None


def log_is_complete(container: Container) -> bool:
    """Whether nobody writes to a container's log: its logging process holds a lock while the container's output is open."""
    try:
        descriptor = os.open(os.path.join(container.folder, "logger-lock"), os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def follow_log(engine: Engine, container: Container, file: LogFile, follow: bool, stop: Callable[[], bool]) -> Iterator[LogLine]:
    """The lines of a log from where `file` stands; with `follow` until the container has ended and all is read, or
    `stop()`. Yields a line without text now and then, for the caller to look around."""
    pause = 0.002
    patience = time.monotonic() + 2.0
    while not stop() and not engine.closing.is_set():
        complete = log_is_complete(container)
        lines = file.lines()
        if lines:
            pause = 0.002
            yield from lines
            continue
        if complete and not (follow and may_run(engine, container)):
            return
        if not follow and time.monotonic() > patience:
            return
        if not follow and may_run(engine, container):
            return
        yield NO_LINE
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def may_run(engine: Engine, container: Container) -> bool:
    """Whether a container runs, or may be started again by its restart policy, as far as is known without a process."""
    if not engine.feed.live:
        return not log_is_complete(container)
    with contextlib.suppress(ApiError):
        now = engine.snapshot.containers.known().get(container.real)
        return now is not None and now.state in ("running", "paused", "restarting")
    return False


###############################################################################
# Container lifecycle
###############################################################################


def is_terminal(engine: Engine, container: Container) -> bool:
    """Whether a container has a pseudo-terminal."""
    asked = container.request
    if asked:
        return bool(asked.get("Tty"))
    return bool((((engine.snapshot.detail(container).get("Spec") or {}).get("process")) or {}).get("terminal"))


def has_stdin(container: Container) -> bool:
    """Whether a container was made with stdin open."""
    return bool(container.request.get("OpenStdin"))


def was_started(container: Container) -> bool:
    """Whether a container has run before."""
    return container.state != "created" or started_at(container) is not None


def wait_started(engine: Engine, session: Session, real: Callable[[], str]) -> None:
    """Wait until the task of a session's container has begun; the ApiError when nerdctl says that it cannot."""
    while True:
        if engine.tasks.started_since(real(), session.begun):
            return
        if session.ended.wait(0.0 if session.ended.is_set() else 0.05):
            if not session.status or session.message.strip() == "1 errors:" or engine.tasks.started_since(real(), session.begun, engine.tasks.LATE / 4):
                return
            if session.message:
                raise nerdctl_error(f'time="" level=fatal msg={json.dumps(session.message)}')
            return
        if not engine.feed.live and real():
            engine.snapshot.containers.drop(real())
            now = engine.snapshot.containers.get().get(real())
            if now is not None and now.running:
                return


def start_container(engine: Engine, container: Container) -> None:
    """Start a container that does not run, held by a session where clients wait on its streams or may come for its stdin."""
    if container.id in engine.apart:
        raise NotImplementedHere(f"this container was disconnected from {', '.join(sorted(engine.apart[container.id]))} after it ran, and nerdctl can only "
                                 "start it with all its networks: create it anew")
    before = container.real
    waiting = engine.take_waiting(container.id)
    tty, stdin = is_terminal(engine, container), has_stdin(container)
    piped, held = stdin and not tty, held_policy(container)
    try:
        with engine.feed.needed():
            if held:
                engine.nerdctl.run("update", f"--restart={held}", "--", container.real)
            by_run = piped and not reaches_input(engine.nerdctl)
            if LABEL_LATER in container.labels and not was_started(container):
                check_shared(engine, container)
                container = container if by_run else made_whole(engine, container)
            engine.hosts.refresh(container)
            if by_run and not was_started(container):
                start_with_stdin(engine, engine.snapshot.container(container.id), waiting)
            elif by_run and any(each.stdin for each in waiting):
                # Told here and not to the attach, of whose errors clients show no more than the number.
                raise NotImplementedHere("without containerd's socket nerdctl can give stdin without a terminal only at the first start of a "
                                         "container: create it anew, or start it without --interactive")
            elif waiting or piped:
                start_attached(engine, container, waiting, tty, piped or any(each.stdin for each in waiting))
            else:
                count = engine.tasks.now()
                engine.nerdctl.run("start", "--", container.real)
                # From here on events tell of its state.
                engine.tasks.started_since(container.real, count, engine.tasks.LATE if engine.feed.live else 0.0)
        if held:
            note_policy(container, "")
    except BaseException:
        for each in waiting:
            each.finish()
        if held:
            # Or containerd would try again by itself.
            with contextlib.suppress(ApiError):
                engine.nerdctl.run("update", "--restart=unless-stopped", "--", container.real)
        raise
    finally:
        if container.real != before:
            engine.snapshot.containers.drop(container.real)


def check_shared(engine: Engine, container: Container) -> None:
    """409 with dockerd's words where a container is to have the namespaces of one that does not run."""
    for flag, other in shared_namespaces(engine, container.request).items():
        if not other.running:
            raise Conflict(f"cannot join {flag[2:]} of a non running container: {other.id}")


def made_whole(engine: Engine, container: Container) -> Container:
    """The container that takes the place of one that was made without its ports or namespaces; 500 where others still have
    the ports."""
    if container.id in engine.touched:
        raise NotImplementedHere("files were copied into this container, and its ports were taken, or the container whose namespaces it has did not "
                                 "run, when it was created: nerdctl cannot add them later")
    plan = plan_container(engine, container.request)._replace(image=container.image)
    made: List[Container] = []
    with making_anew(engine, container, lambda: made[0].real if made else ""):
        made.append(make_container(engine, plan, container.name, f"--label={LABEL_ID}={container.id}"))
    engine.tasks.rename(container.id, made[0].real)
    return made[0]


def new_terminal(container: Container) -> Terminal:
    """A pseudo-terminal of the size that the client of a container has."""
    size = container.host_config.get("ConsoleSize") or [0, 0]
    return Terminal(*[each for each in size if isinstance(each, int)][:2])


@contextlib.contextmanager
def sized_early(engine: Engine, real: str, terminal: Optional[Terminal]) -> Iterator[None]:
    """Context in which a container gets the size of its terminal between its creation by the runtime and its start: nerdctl
    tells it after the start, when a program that asks at once has seen none."""
    def on_event(event: Optional[ContainerdEvent]) -> None:
        if event is not None and event.topic == "/tasks/create" and event.container == real:
            terminal.pass_size(f"/proc/{event.payload.get('pid')}/fd/0")

    if terminal is None or not engine.nerdctl.local:
        yield
        return
    engine.feed.listeners.append(on_event)
    try:
        yield
    finally:
        engine.feed.listeners.remove(on_event)


def dial_containerd(nerdctl: Nerdctl) -> Tuple[socket.socket, str]:
    """A connection to containerd, and what its paths begin with as they are seen from here; OSError when there is none."""
    address, root = nerdctl.address.replace("unix://", "", 1) or "/run/containerd/containerd.sock", ""
    if not nerdctl.local:
        raise OSError("it is on another machine")
    if os.geteuid() and not nerdctl.address:
        # The user's own, in a mount namespace of its own.
        runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
        with open(f"{runtime}/containerd-rootless/child_pid", encoding="ascii") as file:
            root = f"/proc/{file.read().strip()}/root"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(5.0)
        sock.connect(root + address)
    except BaseException:
        sock.close()
        raise
    return sock, root


def ask_tasks(nerdctl: Nerdctl, method: str, message: bytes) -> Tuple[bytes, str]:
    """What containerd's Tasks answers to a message, b"" for nothing or an error, and the root of its paths. OSError and
    ValueError when it cannot be asked."""
    sock, root = dial_containerd(nerdctl)
    with sock:
        return unary(sock, "/containerd.services.tasks.v1.Tasks/" + method, message, [("containerd-namespace", nerdctl.namespace)], 5.0) or b"", root


def end_input(nerdctl: Nerdctl, real: str) -> None:
    """Tell containerd that a container gets no more input. `nerdctl start --attach` gives it a stdin that nobody ends, and a
    program that reads it would wait for ever; no command of nerdctl's closes it."""
    try:
        ask_tasks(nerdctl, "CloseIO", field(1, real.encode()) + varint(3 << 3) + varint(1))
    except (OSError, ValueError) as error:
        if nerdctl.debug:
            log(f"{real[:12]}: its input was not ended: {error}")


def open_input(engine: Engine, container: Container) -> Optional[Input]:
    """The way to the stdin of a container that was started by `nerdctl start --attach`, which makes the named pipe and writes
    nothing to it; None where it has none or is out of reach."""
    try:
        answer, root = ask_tasks(engine.nerdctl, "Get", field(1, container.real.encode()))
        process = next((each.value for each in fields(answer) if each.number == 1), b"")
        path = next((each.value for each in fields(process) if each.number == 5), b"").decode()
        if not path.startswith("/"):
            return None
        # Without a reader there is nobody to wait for.
        descriptor = os.open(root + path, os.O_WRONLY | os.O_NONBLOCK)
    except (OSError, ValueError, TypeError) as error:
        if engine.nerdctl.debug:
            log(f"{container.real[:12]}: its stdin cannot be reached: {error}")
        return None
    os.set_blocking(descriptor, True)
    once = bool(container.request.get("StdinOnce"))
    return Input(os.fdopen(descriptor, "wb", 0), once, lambda: end_input(engine.nerdctl, container.real))


def reaches_input(nerdctl: Nerdctl) -> bool:
    """Whether containerd is there for `open_input`."""
    try:
        dial_containerd(nerdctl)[0].close()
    except OSError:
        return False
    return True


def start_attached(engine: Engine, container: Container, waiting: List[Attachment], tty: bool, stdin: bool) -> None:
    """Start a container with clients on its streams, or with a stdin that they may come for."""
    session = Session(waiting, new_terminal(container) if tty else None, on_end=lambda *_: engine.leave_session(container.id, session))
    session.begun = engine.tasks.now()
    arguments = ["start", "--attach", *(["--interactive"] if tty and stdin else []), *([NO_DETACH_KEYS] if tty else []), "--", container.real]
    engine.sessions[container.id] = session
    with sized_early(engine, container.real, session.terminal):
        try:
            session.run(engine.nerdctl, arguments, stdin=tty and stdin, lasting=True, held=stdin and not tty)
        except BaseException:
            engine.leave_session(container.id, session)
            raise
        target = None
        try:
            wait_started(engine, session, lambda: container.real)
            target = open_input(engine, container) if stdin and not tty else None
        finally:
            session.take_input(target)
    if not tty and target is None and engine.nerdctl.local:
        end_input(engine.nerdctl, container.real)


def start_with_stdin(engine: Engine, container: Container, waiting: List[Attachment]) -> None:
    """Start a container that was made with stdin and without a terminal, where containerd is out of reach, by putting a new
    one in its place: only `nerdctl run` carries stdin. The id that clients know stays on it as a label."""
    if container.id in engine.touched:
        raise NotImplementedHere("files were copied into this container before its first start, and without containerd's socket nerdctl can only give "
                                 "stdin to a container that it makes and starts at once: create it without --interactive, or copy the files after the start")
    plan = plan_container(engine, container.request)._replace(image=container.image)
    labels = {**request_labels(plan.request), LABEL_ID: container.id}
    once = bool(plan.request.get("StdinOnce"))
    with engine.workspace.temporary("run") as folder, profile_files(engine, plan.words) as words:
        note = os.path.join(folder, "id")

        def real() -> str:
            with contextlib.suppress(OSError):
                with open(note, encoding="ascii") as file:
                    found = file.read().strip()
                if found:
                    engine.tasks.rename(container.id, found)
                    return found
            return ""

        session = Session(waiting, once=once, on_end=lambda *_: engine.leave_session(container.id, session))
        session.begun = engine.tasks.now()
        arguments = ["run", "--pull=never", f"--cidfile={note}", f"--name={container.name}", *words,
                     *(f"--label={key}={value}" for key, value in labels.items()), "--", plan.image, *plan.command]
        with making_anew(engine, container, real):
            engine.sessions[container.id] = session
            try:
                session.run(engine.nerdctl, arguments, stdin=True, lasting=True, held=True)
                wait_started(engine, session, real)
            except BaseException:
                engine.leave_session(container.id, session)
                raise
            finally:
                session.taking.set()


def start_refused(engine: Engine, container: Container, error: ApiError) -> None:
    """After a start that failed: a container that was to be removed at its end is removed now."""
    if auto_removed(container):
        with contextlib.suppress(ApiError):
            # Another one may have taken its place.
            remove_container(engine, engine.snapshot.container(container.id), force=True, volumes=True)
    engine.tasks.failed(container.real, refused_code(str(error)))


@route("POST", "/containers/{id}/start")
def container_start(engine: Engine, request: Request, name: str) -> Response:
    """Start it; 204, 304 when it runs already, 400 when its command cannot be run."""
    request.json() if request.body else None
    container = engine.snapshot.find(name)
    if container.state == "paused":
        raise Conflict("cannot start a paused container, try unpause instead")
    if container.running:
        raise NotModified()
    engine.hold_if_needed(container)
    count = engine.tasks.now()
    with engine.changing(container):
        try:
            start_container(engine, container)
        except ApiError as error:
            start_refused(engine, container, error)
            raise
        if not engine.tasks.ended_since(container.real, count):
            engine.snapshot.containers.patch(container.real, "Up")
    engine.hosts.refresh()
    return Response(204)


def stop_args(request: Request, container: Container) -> Tuple[List[str], float]:
    """Flags for the seconds and the signal of a stop, and how long nerdctl may take for it."""
    # nerdctl does not keep a StopTimeout of 0.
    seconds = request.integer("t") if request.value("t") else container.request.get("StopTimeout")
    signal_name = request.value("signal")
    arguments = []
    if seconds is not None:
        # Docker's -1 is for ever.
        seconds = seconds if seconds >= 0 else 10**6
        arguments.append(f"--time={seconds}")
    if signal_name:
        arguments.append(f"--signal={check_signal(signal_name)}")
    return arguments, SHORT_CALL + min(seconds or 0, 86400)


def stop_signal(request: Request, container: Container) -> int:
    """The number of the signal that a container is asked to end with."""
    return signal_number(check_signal(request.value("signal") or container.labels.get("io.containerd.image.config.stop-signal") or "TERM"))


def check_signal(text: str) -> str:
    """The name of a signal, given by name or number; 400 with dockerd's words for anything else."""
    name = text.upper()
    if re.fullmatch(r"[0-9]{1,9}", name):
        if 0 < int(name) <= 64:
            return named_signal(int(name))
    else:
        bare = name[3:] if name.startswith("SIG") else name
        if hasattr(signal, "SIG" + bare) or re.fullmatch(r"RTM(IN|AX)([+-]\d{1,2})?", bare):
            return "SIG" + bare
    raise BadParameter(f"invalid signal: {text}")


def hold_down(engine: Engine, container: Container) -> None:
    """Before somebody ends a container: give it the one restart policy under which containerd heeds that. Under `always` and,
    with an exit status, `on-failure` it would start it again some seconds later. start_container() takes that back."""
    now = container.labels.get("containerd.io/restart.policy") or ""
    asked = restart_args(container.host_config)
    if now == "always" or now.startswith("on-failure") and (asked == [f"--restart={now}"] or os.path.isdir(container.folder)):
        note_policy(container, now)
        try:
            engine.nerdctl.run("update", "--restart=unless-stopped", "--", container.real)
        except ApiError as error:
            note_policy(container, "")
            # It is to be ended all the same.
            log(f"{container.name}: its restart policy stays: {error}")


def named_signal(number: int) -> str:
    """The name of a signal's number, which nerdctl needs: `kill --signal=9` is "invalid signal: SIG9" to it. The number itself
    for those two that have none."""
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    if number < signal.SIGRTMIN:
        return str(number)
    # The names that containerd knows meet in the middle.
    return f"SIGRTMIN+{number - signal.SIGRTMIN}" if number < 50 else f"SIGRTMAX-{signal.SIGRTMAX - number}"


@route("POST", "/containers/{id}/stop")
def container_stop(engine: Engine, request: Request, name: str) -> Response:
    """Stop it within `t` seconds, then kill it; 204, 304 when it does not run."""
    read_limited(request.body, JSON_LIMIT)
    container = engine.snapshot.find(name)
    arguments, longest = stop_args(request, container)
    if not container.running and container.state != "restarting":
        raise NotModified()
    count = engine.tasks.now()
    with engine.changing(container), engine.being_stopped(container, stop_signal(request, container)):
        hold_down(engine, container)
        engine.nerdctl.run("stop", *arguments, "--", container.real, timeout=longest, waits=True)
        engine.tasks.ended_since(container.real, count, engine.tasks.LATE if engine.feed.live else 0.0)
    engine.tell(container, "stop")
    return Response(204)


@route("POST", "/containers/{id}/restart")
def container_restart(engine: Engine, request: Request, name: str) -> Response:
    """Stop it if it runs, and start it; 204."""
    read_limited(request.body, JSON_LIMIT)
    container = engine.snapshot.find(name)
    arguments, longest = stop_args(request, container)
    with engine.changing(container), engine.restarting(container):
        if container.running:
            with engine.being_stopped(container, stop_signal(request, container)):
                engine.nerdctl.run("stop", *arguments, "--", container.real, timeout=longest, waits=True)
            engine.tell(container, "stop")
            session = engine.sessions.get(container.id)
            if session:
                session.ended.wait(5)
        engine.snapshot.containers.drop(container.real)
        start_container(engine, engine.snapshot.container(container.id))
    engine.hosts.refresh()
    engine.tell(container, "restart")
    return Response(204)


def require_running(container: Container) -> None:
    """409 with dockerd's words unless it runs."""
    if not container.running:
        raise Conflict(f"container {container.id} is not running")


@route("POST", "/containers/{id}/kill")
def container_kill(engine: Engine, request: Request, name: str) -> Response:
    """Send it a signal; 204, 409 when it does not run."""
    read_limited(request.body, JSON_LIMIT)
    container = engine.snapshot.find(name)
    word = check_signal(request.value("signal") or "KILL")
    if not container.running:
        raise Conflict(f"cannot kill container: {name}: container {container.id} is not running")
    count = engine.tasks.now()
    engine.tell(container, "kill", signal=str(signal_number(word)))
    with engine.changing(container), engine.feed.needed():
        if word in ("SIGKILL", ends_by(container)):
            hold_down(engine, container)
        engine.nerdctl.run("kill", f"--signal={word}", "--", container.real)
        if word == "SIGKILL" and engine.feed.live:
            # As dockerd does: who is told that it was killed finds it so.
            engine.tasks.ended_since(container.real, count, engine.tasks.DYING)
    return Response(204)


def ends_by(container: Container) -> str:
    """The name of the signal by which a container is stopped, "" for one that there is not."""
    with contextlib.suppress(BadParameter):
        return check_signal(container.labels.get("io.containerd.image.config.stop-signal") or "TERM")
    return ""


def signal_number(word: str) -> int:
    """The number of a signal as check_signal() gives it, 0 for one this machine does not know by name."""
    real_time = re.fullmatch(r"SIG(RTMIN|RTMAX)([+-]\d+)?", word)
    if real_time:
        return int(getattr(signal, "SIG" + real_time.group(1))) + int(real_time.group(2) or 0)
    return int(word) if word.isdigit() else int(getattr(signal, word, 0))


@route("POST", "/containers/{id}/pause")
def container_pause(engine: Engine, request: Request, name: str) -> Response:
    """Freeze it; 204, 409 when it does not run or is paused already."""
    container = engine.snapshot.find(name)
    require_running(container)
    if container.state == "paused":
        raise Conflict(f"container {container.id} is already paused")
    with engine.changing(container):
        engine.nerdctl.run("pause", "--", container.real)
        engine.snapshot.containers.patch(container.real, "Paused")
    return Response(204)


@route("POST", "/containers/{id}/unpause")
def container_unpause(engine: Engine, request: Request, name: str) -> Response:
    """Let it go on; 204, 409 when it is not paused."""
    container = engine.snapshot.find(name)
    if container.state != "paused":
        raise Conflict(f"container {container.id} is not paused")
    with engine.changing(container):
        engine.nerdctl.run("unpause", "--", container.real)
        engine.snapshot.containers.patch(container.real, "Up")
    return Response(204)


@route("POST", "/containers/{id}/rename")
def container_rename(engine: Engine, request: Request, name: str) -> Response:
    """Give it another name; 204, 409 for one in use."""
    container = engine.snapshot.container(name)
    if not request.value("name"):
        raise BadParameter("Neither old nor new names may be empty")
    wanted = request.value("name").lstrip("/")
    if wanted == container.name:
        raise BadParameter("Renaming a container with the same name as its current name")
    with engine.changing(container):
        engine.nerdctl.run("rename", "--", container.real, check_name(engine, wanted))
    engine.tell(engine.snapshot.container(container.id), "rename", oldName="/" + container.name)
    return Response(204)


UPDATE_FLAGS = tuple((path.partition(".")[2], flag, render) for path, flag, render in CREATE_FLAGS
                     if flag in ("--cpu-shares", "--cpu-period", "--cpu-quota", "--cpuset-cpus", "--cpuset-mems", "--memory",
                                 "--memory-reservation", "--memory-swap", "--pids-limit", "--blkio-weight", "--kernel-memory"))


@route("POST", "/containers/{id}/update")
def container_update(engine: Engine, request: Request, name: str) -> Response:
    """Change its limits or restart policy; 200 with warnings."""
    container = engine.snapshot.container(name)
    body = request.json(required=True)
    check_limits(body, update=True)
    words: List[str] = []
    for key, flag, render in UPDATE_FLAGS:
        words += render(body.get(key), flag, key)
    if body.get("NanoCpus"):
        # nerdctl 2.3.5 update takes --cpus and does nothing.
        words += ["--cpu-period=100000", f"--cpu-quota={typed(body['NanoCpus'], int, 'NanoCpus') // 10**4}"]
    if body.get("RestartPolicy"):
        policy = restart_args({"RestartPolicy": body["RestartPolicy"], "AutoRemove": auto_removed(container)})
        words += policy or (["--restart=no"] if typed(body["RestartPolicy"], dict, "RestartPolicy").get("Name") == "no" else [])
    if words:
        with engine.changing(container):
            engine.nerdctl.run("update", *words, "--", container.real)
        if body.get("RestartPolicy"):
            note_policy(container, "")
    engine.tell(container, "update")
    return Response(200, {"Warnings": None})


@route("POST", "/containers/{id}/wait")
def container_wait(engine: Engine, request: Request, name: str) -> Response:
    """Wait for `condition` (not-running, next-exit, removed); the head goes out at once, the exit status when it is so."""
    read_limited(request.body, JSON_LIMIT)
    condition = request.value("condition") or "not-running"
    if condition not in ("not-running", "next-exit", "removed"):
        raise BadParameter(f"invalid condition: \"{condition}\"")
    container = engine.snapshot.find(name)
    since = engine.tasks.now()
    engine.feed.keep()

    def chunks() -> Iterator[bytes]:
        yield b""
        gone = threading.Event()
        with engine.feed.needed(), request.client.when_gone(lambda: (gone.set(), engine.tasks.wake())):
            status = engine.tasks.wait(container, condition, since, lambda: gone.is_set() or engine.closing.is_set())
        if status is not None:
            yield json_bytes({"StatusCode": status}) + b"\n"

    return Response(200, Stream(chunks()), "application/json")


def remove_container(engine: Engine, container: Container, force: bool, volumes: bool) -> None:
    """Remove a container, and its anonymous volumes if asked."""
    engine.sessions.pop(container.id, None)
    with engine.changing(container):
        engine.nerdctl.run("rm", *(["--force"] if force else []), *(["--volumes"] if volumes else []), "--", container.real)
    engine.snapshot.containers.remove(container.real)
    if volumes:
        engine.snapshot.volumes.drop()
    engine.forget(container)


@route("DELETE", "/containers/{id}")
def container_delete(engine: Engine, request: Request, name: str) -> Response:
    """Remove it (`force`, `v` for anonymous volumes); 204, 409 while it runs."""
    container = engine.snapshot.find(name)
    if request.flag("link"):
        raise NotImplementedHere("nerdctl has no links")
    if (container.running or container.state == "restarting") and not request.flag("force"):
        word = "paused" if container.state == "paused" else container.state
        raise Conflict(f'cannot remove container "/{container.name}": container is {word}: '
                       + ("unpause and then stop the container before removing or force remove" if word == "paused"
                          else "stop the container before removing or force remove"))
    if container.running:
        engine.tell(container, "kill", signal=str(int(signal.SIGKILL)))
    remove_container(engine, container, request.flag("force"), request.flag("v"))
    return Response(204)


@route("POST", "/containers/prune")
def container_prune(engine: Engine, request: Request) -> Response:
    """Remove all containers that do not run, by the filters until, label and label!."""
    filters = request.filters("until", "label", "label!")
    limit = until_limit(filters.get("until") or [])
    found = [each for each in engine.snapshot.containers.get().values()
             if each.state in ("created", "exited", "dead") and each.id not in engine.sessions
             and match_labels(each.visible_labels, filters.get("label") or [])
             and not any(match_labels(each.visible_labels, [label]) for label in filters.get("label!") or [])
             and (limit is None or each.created / 1e9 <= limit)]
    deleted, reclaimed = [], 0
    sizes = container_sizes(engine) if found else {}
    for container in found:
        with contextlib.suppress(ApiError):
            remove_container(engine, container, force=False, volumes=False)
            deleted.append(container.id)
            reclaimed += sizes.get(container.real, (0, 0))[0]
    engine.journal.emit("container", "prune", "", {"reclaimed": str(reclaimed)})
    return Response(200, {"ContainersDeleted": deleted or None, "SpaceReclaimed": reclaimed})


class Caretaker:
    """Carries out what nerdctl leaves to somebody: `--rm` of a container that was made by `create`, and health checks
    where no systemd runs their timers. It holds the event feed as long as there is something to care for."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.lock = threading.Lock()
        self.cared: Dict[str, Any] = {}
        self.changed: queue.Queue = queue.Queue()
        engine.feed.listeners.append(self.on_event)
        threading.Thread(target=self._reap, name="caretaker", daemon=True).start()

    def look(self) -> None:
        """Find what is to be cared for among the containers there are; for the start of the daemon."""
        with contextlib.suppress(ApiError):
            # Who was waiting for the daemon to start is answered first, and what is read for that is enough here.
            self.engine.snapshot.containers.read.wait(0.5)
            table = self.engine.snapshot.containers.whole.value or self.engine.snapshot.containers.get()
            for container in list(self.engine.snapshot.containers.asides.values()):
                if container.id not in self.engine.replaced:
                    settle_aside(self.engine, container)
            for container in table.values():
                if container.running or container.state == "restarting":
                    self.hold(container)
                elif auto_removed(container) and was_started(container):
                    self.changed.put(container.real)
            self.engine.hosts.refresh()

    def hold(self, container: Container) -> None:
        """Care for a container that runs, or is about to."""
        checked = needs_checks(container)
        with self.lock:
            if container.id in self.cared or not (auto_removed(container) or checked):
                return
            self.cared[container.id] = stack = contextlib.ExitStack()
            stack.enter_context(self.engine.feed.needed())
            if checked:
                stop = threading.Event()
                stack.callback(stop.set)
                threading.Thread(target=self._watch_health, args=(container.id, stop), name="health", daemon=True).start()

    def release(self, identity: str) -> None:
        """A container needs no care any more."""
        with self.lock:
            stack = self.cared.pop(identity, None)
        if stack:
            stack.close()

    def on_event(self, event: Optional[ContainerdEvent]) -> None:
        """Note the starts and ends of containers; called in the feed's thread, so the work is done elsewhere."""
        if event is None:
            if self.cared:
                self.changed.put("")
        elif event.topic in ("/tasks/exit", "/containers/delete") and event.payload.get("id") in (None, "", event.container):
            self.changed.put(event.container)
        elif event.topic == "/tasks/start":
            # By a restart policy, or by somebody else; whom we start is cared for already.
            known = (self.engine.snapshot.containers.whole.value or {}).get(event.container)
            if known is None or known.id not in self.cared and (auto_removed(known) or needs_checks(known)):
                self.changed.put(event.container)

    def _reap(self) -> None:
        while True:
            real = self.changed.get()
            try:
                self._settle(real)
            except ApiError as error:
                log(f"{real[:12]}: {error}")
            except Exception:
                log(traceback.format_exc())

    def _settle(self, real: str) -> None:
        """After the end of a container (any, for ""): remove it if it is to be, and stop caring for what does not run. After
        its start: care for it."""
        if not real and not self.cared:
            return
        table = self.engine.snapshot.containers.known()
        for container in [table[real]] if real in table else list(table.values()) if not real else []:
            if container.running:
                self.hold(container)
            if container.running or container.state in ("restarting", "created") or container.id in self.engine.replaced:
                continue
            if auto_removed(container) and container.id not in self.engine.restarts:
                session = self.engine.sessions.get(container.id)
                if session:
                    session.ended.wait(10)
                code = parse_status(container.status)["code"]
                if code is not None and container.real not in self.engine.tasks.ends:
                    # Seen and not told, before the feed was live: with the container its exit status would be gone.
                    self.engine.tasks.failed(container.real, code)
                with contextlib.suppress(NotFound):
                    remove_container(self.engine, container, force=True, volumes=True)
            self.release(container.id)
        known = {each.id for each in self.engine.snapshot.containers.known().values()}
        for identity in [each for each in self.cared if each not in known and each not in self.engine.replaced]:
            self.release(identity)

    def _watch_health(self, identity: str, stop: threading.Event) -> None:
        pause = 0.0
        while not stop.wait(pause):
            try:
                pause = self._check(identity)
            except NotFound:
                return
            except (ApiError, ValueError) as error:
                pause = 5.0
                log(f"health check of {identity[:12]}: {error}")

    def _check(self, identity: str) -> float:
        """Run one health check; the seconds until the next."""
        container = self.engine.snapshot.container(identity)
        if not container.running:
            return 1.0
        check = json.loads(container.labels.get("nerdctl/healthcheck") or "{}")
        check.setdefault("StartInterval", typed(container.request.get("Healthcheck"), dict, "Healthcheck").get("StartInterval"))
        began = started_at(container)
        age = time.time() - began / 1e9 if began else 0.0
        before = (container_health(self.engine, container) or {}).get("Status")
        interval = check_pause(check, age, before == "starting")
        if container.state == "paused":
            return interval
        if began and age < interval - 0.02:
            # The first check comes an interval after the start.
            return interval - age
        output = self.engine.nerdctl.output("container", "healthcheck", container.real, timeout=interval + 600, waits=True)
        if output.status and self.engine.nerdctl.debug:
            log(f"health check of {identity[:12]}: {nerdctl_message(output.stderr)}")
        self.engine.snapshot.containers.drop(container.real)
        with contextlib.suppress(NotFound):
            after = (container_health(self.engine, self.engine.snapshot.container(identity)) or {}).get("Status")
            if after and after != before:
                self.engine.tell(container, f"health_status: {after}")
            interval = check_pause(check, age, after == "starting")
        return interval


def check_pause(check: Dict[str, Any], age: float, starting: bool) -> float:
    """Seconds between two health checks: as dockerd has it, StartInterval (or 5) as long as the start period lasts and the
    container is starting."""
    if starting and age < (check.get("StartPeriod") or 0) / 1e9:
        return (check.get("StartInterval") or 5 * 10**9) / 1e9
    return (check.get("Interval") or 30 * 10**9) / 1e9


def auto_removed(container: Container) -> bool:
    """Whether it is to be removed at its end."""
    return bool((container.request.get("HostConfig") or {}).get("AutoRemove"))


def needs_checks(container: Container) -> bool:
    """Whether it has health checks that nobody else runs."""
    if os.path.isdir("/run/systemd/system") or not container.labels.get("nerdctl/healthcheck"):
        return False
    with contextlib.suppress(ValueError, AttributeError):
        return (json.loads(container.labels["nerdctl/healthcheck"]).get("Test") or ["NONE"])[0] != "NONE"
    return False


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
    follow = request.flag("follow") and container.state in ("running", "paused", "restarting")
    since, until = request.timestamp("since"), request.timestamp("until")
    first = int(since * 10**9) if since and since > 0 else 0
    last = int(until * 10**9) if until and until > 0 else 0
    tail = tail_count(request)
    wanted = {STDOUT: request.flag("stdout"), STDERR: request.flag("stderr")}
    gone = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.enter_context(request.client.when_gone(gone.set))
        if follow:
            stack.enter_context(engine.feed.needed())
        path = log_path(container)
        if path and os.access(path, os.R_OK):
            file = LogFile(path).open()
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


def nerdctl_log(engine: Engine, request: Request, container: Container, follow: bool, tail: Optional[int]) -> Iterator[LogLine]:
    """The same where the log is no file that can be read from here. nerdctl prints both streams as they were."""
    arguments = ["logs", "--timestamps", *(["--follow"] if follow else []), *([f"--tail={tail}"] if tail is not None else [])]
    with engine.nerdctl.start(*arguments, "--", container.real, client=request.client) as process:
        for text in process.lines():
            moment, _, rest = text.partition(" ")
            yield LogLine(moment, STDOUT, rest.encode("utf-8", "surrogateescape") + b"\n")
        process.check()


def tail_count(request: Request) -> Optional[int]:
    """How many lines from the end are asked for, None for all of them."""
    text = request.value("tail")
    if text in ("", "all") or text.startswith("-"):
        return None
    return request.integer("tail")


def log_details(container: Container) -> bytes:
    """What `details` puts before each line: the labels and variables that the log options name."""
    options = typed(container.host_config.get("LogConfig"), dict, "LogConfig").get("Config") or {}
    environment = dict(each.partition("=")[::2] for each in string_list(container.request.get("Env"), "Env"))
    found = {key: container.visible_labels[key] for key in str(options.get("labels") or "").split(",") if key in container.visible_labels}
    found.update({key: environment[key] for key in str(options.get("env") or "").split(",") if key in environment})
    return ",".join(f"{urllib.parse.quote(key)}={urllib.parse.quote(value)}" for key, value in sorted(found.items())).encode() + b" "


@route("GET", "/containers/{id}/logs")
def container_logs(engine: Engine, request: Request, name: str) -> Response:
    """Its output so far, and with `follow` what is to come: frames, or bytes as they are for a terminal."""
    container = engine.snapshot.find(name)
    if not request.flag("stdout") and not request.flag("stderr"):
        raise BadParameter("Bad parameters: you must choose at least one stream")
    tail_count(request)
    request.timestamp("since"), request.timestamp("until")
    if (container.host_config.get("LogConfig") or {}).get("Type") == "none":
        raise NotImplementedHere("configured logging driver does not support reading")
    tty = is_terminal(engine, container)
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
                    text = rfc3339_full(line.time).encode() + b" " + text
                parts.append(text if tty else FRAME.pack(line.kind, len(text)) + text)
            if parts and (not line.text or len(parts) > 500):
                yield b"".join(parts)
                parts = []
        yield b"".join(parts)

    # What there is already begins at once, so an error before it can still be told.
    return Response(200, Stream(chunks(), primed=not follow), stream_type(tty, request.version))


def rfc3339_full(nanoseconds: int) -> str:
    """A timestamp with all nine digits, as logs have them."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(nanoseconds // 10**9)) + f".{nanoseconds % 10**9:09d}Z"


def check_attach(container: Container, stdin: bool, held: bool) -> None:
    """501 with a reason where a client's input could not reach a running container."""
    if stdin and has_stdin(container) and container.running and not held:
        raise NotImplementedHere("this container's stdin cannot be reached: nerdctl itself started it, or another run of nerdctld had its terminal: "
                                 "attach with --no-stdin, or use exec")


class WebSocket(Connection):
    """A connection whose bytes travel in WebSocket frames (RFC 6455)."""

    def __init__(self, connection: Connection):
        super().__init__(connection.sock, connection.early)
        self.lock = threading.Lock()
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
                if length == 126:
                    length = int.from_bytes(self._exactly(2), "big")
                elif length == 127:
                    length = int.from_bytes(self._exactly(8), "big")
                kind = first & 0x0F
                if not second & 0x80 or length > 1 << 20 or first & 0x70 or (kind >= 8 and length > 125):
                    self._frame(8, (1002).to_bytes(2, "big"))
                    break
                mask, data = self._exactly(4), self._exactly(length)
                data = bytes(each ^ mask[index % 4] for index, each in enumerate(data))
                if kind == 8:
                    self._frame(8, data[:2])
                    break
                if kind == 9:
                    self._frame(10, data)
                elif kind in (0, 1, 2) and data:
                    return data
        except (EOFError, ClientGone):
            pass
        self.closed = True
        return b""

    def _frame(self, kind: int, data: bytes) -> None:
        size = len(data)
        head = bytes([0x80 | kind]) + (bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big") if size < 65536
                                       else b"\x7f" + size.to_bytes(8, "big"))
        with self.lock:
            super().send(head, data)

    def send(self, *parts: bytes) -> None:
        """All parts as one binary frame."""
        self._frame(2, b"".join(parts))

    def drop_input(self) -> None:
        """Read until the client closes."""
        while self.recv():
            pass

    def close(self) -> None:
        """Say goodbye, if the client is still there."""
        if not self.closed:
            with contextlib.suppress(ClientGone):
                self._frame(8, (1000).to_bytes(2, "big"))


def follow_attached(engine: Engine, container: Container, attachment: Attachment, file: LogFile, follow: bool = True) -> None:
    """Send an attached client what is written to a container's log, to its end."""
    try:
        with engine.feed.needed(), contextlib.closing(file):
            for line in follow_log(engine, container, file, follow, attachment.done.is_set):
                attachment.put(line.kind, line.text)
    except Exception:
        log(traceback.format_exc())
    finally:
        attachment.finish()


def send_past(engine: Engine, container: Container, attachment: Attachment, until: int) -> None:
    """Send a client what a container wrote up to a moment, in nanoseconds since 1970."""
    with contextlib.closing(LogFile(log_path(container)).open()) as file:
        for line in follow_log(engine, container, file, False, attachment.done.is_set):
            if line.text and line.time > until:
                break
            attachment.put(line.kind, line.text)


def await_session(engine: Engine, container: Container, attachment: Attachment, file: LogFile, since: int) -> None:
    """Hold a client that attached before the start until a session has taken it, or the container was started without
    one (by a bare nerdctl, say), when its log is as good."""
    while not attachment.ready.wait(0.2):
        session = engine.sessions.get(container.id)
        if session and session.join(attachment):
            return
        if session is None and engine.tasks.started_since(container.real, since):
            follow_attached(engine, container, attachment, file)
        elif engine.feed.live and container.id not in engine.replaced:
            try:
                engine.snapshot.find(container.id)
            except ApiError:
                attachment.finish()


def serve_attachment(engine: Engine, request: Request, container: Container, attachment: Attachment, logs: bool,
                     keys: Optional[DetachKeys]) -> None:
    """Serve an attached client to its end: by the session that holds the container, or from its log."""
    engine.tell(container, "attach")
    file = LogFile(log_path(container)).open(at_end=not logs)
    since = engine.tasks.now()
    session = engine.sessions.get(container.id)
    with request.client.when_gone(attachment.leave, half=False), engine.feed.needed():
        if logs or (container.running and not (session and session.join(attachment))):
            attachment.session = session
            attachment.ready.set()
            threading.Thread(target=follow_attached, args=(engine, container, attachment, file, request.flag("stream")),
                             name="attach", daemon=True).start()
        elif not container.running:
            await_session(engine, container, attachment, file, since)
        with contextlib.ExitStack() as stack:
            target: Any = attachment.session
            if target is None and attachment.stdin and not is_terminal(engine, container):
                # Started by another daemon.
                target = open_input(engine, container)
                if target:
                    stack.callback(target.close)
            if target is not None and attachment.stdin and pump_stdin(attachment, target, keys):
                attachment.leave()
                engine.tell(container, "detach")
            attachment.done.wait()


def attach(engine: Engine, request: Request, name: str, framed: bool) -> Tuple[Attachment, Callable[[Connection], None], Callable[[], None], str]:
    """What the two ways to attach share: the client, how it is served, what is done where it has left before that, and the
    media type. From here on it is waited for, so that a start that comes right behind loses nothing."""
    container, tty, keys = prepare_attach(engine, request, name)
    stream, logs = request.flag("stream"), request.flag("logs")
    attachment = Attachment(request.flag("stdout"), request.flag("stderr"), framed and not tty, request.flag("stdin") and stream and has_stdin(container))
    waits, began = stream and not container.running, time.time_ns()
    if waits:
        engine.add_waiting(container.id, attachment)

    def abandon() -> None:
        attachment.leave()
        engine.leave_waiting(container.id, attachment)

    def serve(connection: Connection) -> None:
        try:
            if waits and logs:
                # Before the connection: what a session that begins meanwhile has to tell is for later.
                past = Attachment(attachment.wanted[STDOUT], attachment.wanted[STDERR], attachment.framed)
                past.connect(connection)
                send_past(engine, container, past, began)
            attachment.connect(connection)
            if stream or logs:
                serve_attachment(engine, request, container, attachment, logs and not waits, keys)
        finally:
            abandon()

    return attachment, serve, abandon, stream_type(tty, request.version)


def prepare_attach(engine: Engine, request: Request, name: str) -> Tuple[Container, bool, Optional[DetachKeys]]:
    """The container of an attach, whether it has a terminal, and the keys that detach from it; 404, 409 and 501 where it
    cannot be."""
    container = engine.snapshot.find(name)
    if container.state == "paused":
        raise Conflict("container is paused, unpause the container before attach")
    if container.state == "restarting":
        raise Conflict("container is restarting, wait until the container is running")
    tty = is_terminal(engine, container)
    stdin = request.flag("stdin") and request.flag("stream")
    held = container.id in engine.sessions
    if stdin and not held and not tty and has_stdin(container) and container.running:
        found = open_input(engine, container)
        held = found is not None and found.close()
    check_attach(container, stdin, held)
    return container, tty, DetachKeys(request.value("detachKeys")) if tty and stdin else None


@route("POST", "/containers/{id}/attach")
def container_attach(engine: Engine, request: Request, name: str) -> Response:
    """Take the connection over for the container's streams; also before its start. 404, 409, or 501 where its stdin is
    out of reach."""
    _, serve, abandon, media_type = attach(engine, request, name, framed=True)
    return Response(101, Hijack(serve, abandon=abandon), media_type)


WEBSOCKET_KEY = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


@route("GET", "/containers/{id}/attach/ws")
def container_attach_websocket(engine: Engine, request: Request, name: str) -> Response:
    """The same over a WebSocket, without frames of our own: output in binary messages."""
    key = request.headers.get("Sec-WebSocket-Key") or ""
    if "websocket" not in (request.headers.get("Upgrade") or "").lower() or not key:
        raise BadParameter("not a websocket handshake")
    attachment, serve, abandon, _ = attach(engine, request, name, framed=False)
    import hashlib

    accept = base64.b64encode(hashlib.sha1((key + WEBSOCKET_KEY).encode()).digest()).decode()

    def serve_frames(connection: Connection) -> None:
        sock = WebSocket(connection)
        if not attachment.stdin:
            # Somebody has to answer pings and notice the closing.
            threading.Thread(target=lambda: (sock.drop_input(), attachment.leave()), name="websocket", daemon=True).start()
        serve(sock)
        sock.close()

    return Response(101, Hijack(serve_frames, protocol="websocket", abandon=abandon), "", {"Sec-WebSocket-Accept": accept})


@route("POST", "/containers/{id}/resize")
def container_resize(engine: Engine, request: Request, name: str) -> Response:
    """Tell the container's terminal its size in characters; 200. Without a session there is no terminal to be told."""
    height, width = request.integer("h"), request.integer("w")
    container = engine.snapshot.find(name)
    session = engine.sessions.get(container.id)
    if session is None:
        require_running(container)
    resize(session, height, width)
    return Response(200)


def resize(session: Optional[Session], height: int, width: int) -> None:
    """Resize a session's terminal, if it has one; 400 for no size."""
    if not (0 <= height < 65536 and 0 <= width < 65536):
        raise BadParameter("invalid resize: height and width must fit in 16 bits")
    if session and session.terminal:
        session.terminal.resize(height, width)


###############################################################################
# Exec
###############################################################################


class Exec:
    """A command to be run, running or run in a container. `code` is its exit status, None before its end."""

    def __init__(self, container: Container, config: Dict[str, Any]):
        self.id = os.urandom(32).hex()
        self.container = container
        self.config = config
        self.session: Optional[Session] = None
        self.started = False
        self.running = False
        self.code: Optional[int] = None
        self.size = (0, 0)

    @property
    def tty(self) -> bool:
        """Whether it has a terminal."""
        return bool(self.config.get("Tty"))


EXECS_KEPT = 1000


def exec_args(instance: Exec) -> List[str]:
    """argv of nerdctl exec."""
    config = instance.config
    words = ["exec"]
    words += _switch(config.get("AttachStdin"), "--interactive", "AttachStdin") + _switch(config.get("Tty"), "--tty", "Tty")
    words += _text(config.get("User"), "--user", "User") + _text(config.get("WorkingDir"), "--workdir", "WorkingDir")
    words += _switch(config.get("Privileged"), "--privileged", "Privileged") + environment_args(config, {})
    return [*words, "--", instance.container.real, *string_list(config.get("Cmd"), "Cmd")]


def exec_failure(message: str) -> Tuple[int, str]:
    """The exit status of a command from nerdctl's last words, and the error for the client where it never ran, "" else."""
    found = re.search(r"exec failed with exit code (\d+)", message)
    if found:
        return int(found.group(1)), ""
    if re.search(r"executable file not found|no such file or directory", message):
        return 127, message
    if re.search(r"permission denied", message):
        return 126, message
    return 126 if message else 1, message


def docker_exec(instance: Exec) -> Dict[str, Any]:
    """An exec as `/exec/{id}/json` shows it."""
    config, command = instance.config, string_list(instance.config.get("Cmd"), "Cmd")
    process = {"tty": instance.tty, "entrypoint": command[0], "arguments": command[1:], "privileged": bool(config.get("Privileged"))}
    if config.get("User"):
        process["user"] = config["User"]
    return {
        "ID": instance.id, "Running": instance.running, "ExitCode": instance.code, "ProcessConfig": process,
        "OpenStdin": bool(config.get("AttachStdin")), "OpenStderr": bool(config.get("AttachStderr")),
        "OpenStdout": bool(config.get("AttachStdout")), "CanRemove": False, "ContainerID": instance.container.id,
        "DetachKeys": config.get("DetachKeys") or "", "Pid": 0,
    }


def check_user(engine: Engine, container: Container, user: str) -> None:
    """400 with dockerd's words for a user that the container's /etc/passwd does not have, where it can be read."""
    name = user.partition(":")[0]
    if not name or name.isdigit():
        return
    pid = (engine.snapshot.detail(container).get("Task") or {}).get("Pid") or 0
    try:
        with opened_below(f"/proc/{pid}/root", "/etc/passwd", follow=True) as (descriptor, _, _):
            lines = []
            # The container's own: it may be a FIFO, on which nerdctl would wait for ever, or without an end.
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                    lines = file.read(1 << 20).splitlines()
    except OSError:
        return
    if any(line.partition(b":")[0] == name.encode() for line in lines):
        return
    raise BadParameter(f"unable to find user {name}: no matching entries in passwd file")


@route("POST", "/containers/{id}/exec")
def exec_create(engine: Engine, request: Request, name: str) -> Response:
    """Prepare a command; 201 with its id. 409 when the container does not run, 400 for no command or an unknown user."""
    config = request.json(required=True)
    container = engine.snapshot.find(name)
    if not string_list(config.get("Cmd"), "Cmd"):
        raise BadParameter("No exec command specified")
    if container.state == "paused":
        raise Conflict(f"container {name} is paused, unpause the container before exec")
    require_running(container)
    instance = Exec(container, config)
    exec_args(instance)
    DetachKeys(typed(config.get("DetachKeys"), str, "DetachKeys"))
    check_user(engine, container, typed(config.get("User"), str, "User"))
    with engine.lock:
        engine.execs[instance.id] = instance
        for old in [each for each in engine.execs.values() if each.started and not each.running][:max(0, len(engine.execs) - EXECS_KEPT)]:
            engine.execs.pop(old.id, None)
    engine.tell(container, "exec_create: " + " ".join(string_list(config["Cmd"], "Cmd")), execID=instance.id)
    return Response(201, {"Id": instance.id})


def find_exec(engine: Engine, name: str) -> Exec:
    """The exec of an id; 404 with dockerd's words."""
    instance = engine.execs.get(name)
    if instance is None:
        raise NotFound(f"No such exec instance: {name}")
    return instance


def begin_exec(engine: Engine, instance: Exec, attachments: List[Attachment]) -> Session:
    """Run the command, with these clients on its streams."""
    def ended(status: int, message: str) -> None:
        code, text = exec_failure(message) if status else (0, "")
        instance.code, instance.running = code, False
        for attachment in session.attachments if text else ():
            attachment.put(STDOUT, (text + "\r\n").encode())
        engine.tell(instance.container, "exec_die", execID=instance.id, exitCode=str(code))

    with engine.lock:
        if instance.started:
            raise Conflict(f"exec command {instance.id} is already running" if instance.running
                           else f"exec command {instance.id} has already run")
        instance.started = instance.running = True
    engine.tell(instance.container, "exec_start: " + " ".join(string_list(instance.config["Cmd"], "Cmd")), execID=instance.id)
    try:
        session = instance.session = Session(attachments, Terminal(*instance.size) if instance.tty else None, on_end=ended)
        session.run(engine.nerdctl, exec_args(instance), stdin=bool(instance.config.get("AttachStdin")), lasting=not attachments, held=not instance.tty)
    except BaseException:
        instance.running, instance.code = False, 126
        raise
    return session


def has_opened_stdin(pid: int) -> bool:
    """Whether a nerdctl writes to the FIFO of an exec's stdin (`…/exec-ID-stdin`): it can when the shim reads there, which it
    does once the command runs."""
    with contextlib.suppress(OSError):
        for each in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError, AttributeError):
                if os.readlink(f"/proc/{pid}/fd/{each}").endswith("-stdin"):
                    with open(f"/proc/{pid}/fdinfo/{each}", encoding="ascii") as file:
                        flags = int(re.search(r"flags:\s*([0-7]+)", file.read()).group(1), 8)
                    if flags & os.O_ACCMODE == os.O_WRONLY and not flags & os.O_PATH:
                        return True
    return False


def take_input(engine: Engine, instance: Exec, session: Session, attachment: Attachment, since: int) -> None:
    """Let the input of a client through when the command of a session runs, or one of the two has ended."""
    seen = None
    while not (session.ended.wait(0.004) or attachment.done.is_set() or has_opened_stdin(session.process.popen.pid)):
        # What cannot be looked at (nerdctl runs elsewhere) is believed from events, with a moment more.
        if seen is None and engine.tasks.exec_since(instance.container.real, since):
            seen = time.monotonic()
        if seen is not None and time.monotonic() > seen + (2.0 if engine.nerdctl.local else 0.1):
            break
    session.taking.set()


def exec_begun(engine: Engine, instance: Exec, session: Session, since: int) -> None:
    """Wait until a detached command runs; the ApiError when it cannot be started."""
    until = time.monotonic() + 5.0
    while time.monotonic() < until and not engine.tasks.exec_since(instance.container.real, since):
        if session.ended.wait(0.02):
            if exec_failure(session.message)[1] and session.status:
                raise nerdctl_error(f'time="" level=fatal msg={json.dumps(session.message)}')
            return


@route("POST", "/exec/{id}/start")
def exec_start(engine: Engine, request: Request, name: str) -> Response:
    """Run it: with its streams on this connection, or detached (200 once it runs). 409 when it has run, or the container
    stopped."""
    options = request.json()
    instance = find_exec(engine, name)
    container = engine.snapshot.find(instance.container.id)
    require_running(container)
    size = typed(options.get("ConsoleSize") or instance.config.get("ConsoleSize"), list, "ConsoleSize")
    if len(size) == 2 and all(isinstance(each, int) for each in size):
        instance.size = (size[0], size[1])
    if typed(options.get("Detach"), bool, "Detach"):
        instance.config = {**instance.config, "AttachStdin": False}
        with engine.feed.needed():
            since = engine.tasks.now()
            exec_begun(engine, instance, begin_exec(engine, instance, []), since)
        return Response(200, b"")
    if instance.started:
        raise Conflict(f"exec command {instance.id} is already running" if instance.running else f"exec command {instance.id} has already run")

    # As with dockerd, this request says how the output is packed, whether or not the command has a terminal.
    raw = typed(options.get("Tty"), bool, "Tty")

    def serve(connection: Connection) -> None:
        config = instance.config
        attachment = Attachment(bool(config.get("AttachStdout")), bool(config.get("AttachStderr")) and not raw, not raw, bool(config.get("AttachStdin")))
        attachment.connect(connection)
        keys = DetachKeys(typed(config.get("DetachKeys"), str, "DetachKeys")) if instance.tty and attachment.stdin else None
        with contextlib.ExitStack() as stack:
            if attachment.stdin and not engine.nerdctl.local:
                stack.enter_context(engine.feed.needed())
            stack.enter_context(request.client.when_gone(attachment.leave, half=False))
            since = engine.tasks.now()
            try:
                session = begin_exec(engine, instance, [attachment])
            except ApiError as error:
                attachment.put(STDOUT, (str(error) + "\r\n").encode())
                return
            if attachment.stdin and not session.taking.is_set():
                take_input(engine, instance, session, attachment, since)
            if attachment.stdin and pump_stdin(attachment, session, keys):
                attachment.leave()
            attachment.done.wait()
        session.taking.set()
        if attachment.gone:
            session.close_stdin(force=True)

    return Response(101, Hijack(serve), stream_type(raw, request.version))


@route("POST", "/exec/{id}/resize")
def exec_resize(engine: Engine, request: Request, name: str) -> Response:
    """Tell its terminal its size; 200, also when it has ended meanwhile."""
    instance = find_exec(engine, name)
    instance.size = (request.integer("h"), request.integer("w"))
    resize(instance.session, *instance.size)
    return Response(200)


@route("GET", "/exec/{id}/json")
def exec_inspect(engine: Engine, request: Request, name: str) -> Response:
    """Whether it runs, and its exit status."""
    return Response(200, docker_exec(find_exec(engine, name)))


###############################################################################
# Archive
###############################################################################

# Bits of Go's FileMode, which X-Docker-Container-Path-Stat has.
GO_MODES = ((stat.S_ISDIR, 1 << 31), (stat.S_ISLNK, 1 << 27), (stat.S_ISFIFO, 1 << 25), (stat.S_ISSOCK, 1 << 24),
            (stat.S_ISBLK, 1 << 26), (stat.S_ISCHR, 1 << 26 | 1 << 21))
def go_mode(mode: int) -> int:
    """A POSIX mode as Go's FileMode."""
    found = mode & 0o777
    for test, bits in GO_MODES:
        if test(mode):
            found |= bits
    for bit, flag in ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20)):
        if mode & bit:
            found |= flag
    return found


def stat_header(found: PathStat) -> Dict[str, str]:
    """The X-Docker-Container-Path-Stat header."""
    told = {**found._asdict(), "mode": go_mode(found.mode), "mtime": rfc3339(found.mtime)}
    told["linkTarget"] = told.pop("target")
    return {"X-Docker-Container-Path-Stat": base64.b64encode(json_bytes(told)).decode()}


def ask_containerd(nerdctl: Nerdctl, service: str, method: str, message: bytes) -> bytes:
    """What a service of containerd (`tasks.v1.Tasks`) answers, b"" for nothing or an error; 501 where it is out of reach."""
    try:
        sock, _ = dial_containerd(nerdctl)
        with sock:
            return unary(sock, f"/containerd.services.{service}/{method}", message, [("containerd-namespace", nerdctl.namespace)], 10.0) or b""
    except (OSError, ValueError) as error:
        raise NotImplementedHere(f"the files of containers are reached with containerd's help, and its socket cannot be reached: {error}") from None


def running_pid(nerdctl: Nerdctl, real: str) -> int:
    """The process of a container that runs or is paused, 0 else."""
    answer = ask_containerd(nerdctl, "tasks.v1.Tasks", "Get", field(1, real.encode()))
    process = next((each.value for each in fields(answer) if each.number == 1), b"")
    told = {each.number: each.value for each in fields(process) if each.number in (3, 4)}
    return told.get(3, 0) if told.get(4) in (2, 4, 5) else 0


def find_tree(nerdctl: Nerdctl, real: str) -> Dict[str, Any]:
    """Where the tree of a container is, as enter_tree() is told; `owner` is the user that it runs as."""
    answer = ask_containerd(nerdctl, "containers.v1.Containers", "Get", field(1, real.encode()))
    container = next((each.value for each in fields(answer) if each.number == 1), None)
    if container is None:
        raise NotFound(f"No such container: {real}")
    told = {each.number: bytes(each.value) for each in fields(container) if each.number in (5, 6, 7)}
    spec = json.loads(next((bytes(each.value) for each in fields(told.get(5, b"")) if each.number == 2), b"{}"))
    mounts = spec.get("mounts") or []
    user = (spec.get("process") or {}).get("user") or {}
    found = {"pid": running_pid(nerdctl, real), "owner": [user.get("uid", 0), user.get("gid", 0)],
             "made_up": [each["destination"] for each in mounts if each.get("type") in KERNEL_MOUNTS],
             "binds": [(each["source"], each["destination"], bool({"ro", "rro"} & set(each.get("options") or ()))) for each in mounts
                       if each.get("type") == "bind" or {"bind", "rbind"} & set(each.get("options") or ())]}
    if not found["pid"]:
        key = field(1, told.get(6, b"")) + field(2, told.get(7, b""))
        answer = ask_containerd(nerdctl, "snapshots.v1.Snapshots", "Mounts", key)
        found["mounts"] = [parse_mount(each.value) for each in fields(answer) if each.number == 1]
        if not found["mounts"]:
            raise ApiError(f"containerd does not tell where the files of container {real} are")
        found["read_only"] = bool((spec.get("root") or {}).get("readonly"))
    return found


def parse_mount(message: Any) -> Dict[str, Any]:
    """One of the mounts of a snapshot."""
    values: Dict[int, List[str]] = {1: [], 2: [], 4: []}
    for each in fields(message):
        values.setdefault(each.number, []).append(bytes(each.value).decode("utf-8", "surrogateescape"))
    return {"type": "".join(values[1]), "source": "".join(values[2]), "options": values[4]}


def rootless_argv(nerdctl: Nerdctl) -> List[str]:
    """argv in front of a program that is to run where a user's own containerd does; [] for root's."""
    if not os.geteuid():
        return []
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    try:
        with open(f"{runtime}/containerd-rootless/child_pid", encoding="ascii") as file:
            return ["nsenter", "-U", "--preserve-credentials", "-m", "-t", file.read().strip(), "--"]
    except OSError as error:
        raise NotImplementedHere(f"the files of containers are reached in the namespaces of rootless containerd, and there are none: {error}") from None


def tree_error(process: Process, missing: ApiError) -> ApiError:
    """What a process in a container's tree says went wrong, `missing` where a file is not there."""
    process.wait()
    lines = process.error_text().splitlines() or [f"it ended with status {process.popen.returncode}"]
    try:
        told = json.loads(lines[-1])
        error = ApiError(told["message"])
        error.status = told["status"]
    except (ValueError, LookupError, TypeError):
        return ApiError(f"the container's files cannot be reached: {lines[-1]}")
    return missing if error.status == 404 else error


@contextlib.contextmanager
def opened_tree(engine: Engine, container: Container, missing: ApiError, order: Dict[str, Any]) -> Iterator[Tuple[Process, List[Any], bytes]]:
    """A process in a container's tree that carries out an order: it, its answer, and what it wrote after that. `missing` is raised
    where the path is not there."""
    found = find_tree(engine.nerdctl, container.real)
    with contextlib.ExitStack() as stack:
        if not found["pid"]:
            found["folder"] = stack.enter_context(engine.workspace.temporary("tree"))
        process = stack.enter_context(engine.nerdctl.start_own("tree", rootless_argv(engine.nerdctl)))
        process.write(json_bytes({**found, "user_namespace": bool(os.geteuid()), **order}) + b"\n")
        head, end, rest = b"", b"", b""
        for data in iter(process.read, b""):
            head, end, rest = (head + data).partition(b"\n")
            if end:
                break
        # A process id may be another's by now. It was the container's when the tree was entered if it still is.
        if found["pid"] and running_pid(engine.nerdctl, container.real) != found["pid"]:
            raise Conflict(f"container {container.name} has just ended")
        if not end:
            raise tree_error(process, missing)
        yield process, json.loads(head), rest


def check_path(text: str) -> str:
    """A path in a container, absolute; 400 without one."""
    if not text:
        raise BadParameter("path cannot be empty")
    if "\0" in text:
        raise BadParameter("invalid path: it has a NUL byte")
    return "/" + text.lstrip("/")


def container_root(engine: Engine, container: Container) -> str:
    """The root of a running container as this process may see it, "" else."""
    if not container.running or not engine.nerdctl.local:
        return ""
    pid = (engine.snapshot.detail(container).get("Task") or {}).get("Pid") or 0
    root = f"/proc/{pid}/root/"
    return root if pid and os.access(root, os.X_OK) else ""


def not_there(name: str, path: str) -> NotFound:
    """The 404 for a path that a container, by the name that the client used, does not have."""
    return NotFound(f"Could not find the file {path} in container {name}")


def path_stat(engine: Engine, container: Container, path: str, name: str) -> PathStat:
    """The stat of a path in a container; 404 where there is none, with the `name` that the client gave the container."""
    root = container_root(engine, container)
    if not root:
        with opened_tree(engine, container, not_there(name, path), {"do": "stat", "path": path}) as (_, told, _):
            return PathStat(*told)
    try:
        return stat_below(root, path)
    except (FileNotFoundError, NotADirectoryError):
        raise not_there(name, path) from None
    except OSError as error:
        raise BadParameter(f"{path}: {error.strerror}") from None


@route("HEAD", "/containers/{id}/archive")
def archive_stat(engine: Engine, request: Request, name: str) -> Response:
    """What a path in a container is, in a header; 404 where there is none."""
    container = engine.snapshot.find(name)
    return Response(200, None, "", stat_header(path_stat(engine, container, check_path(request.value("path")), name)))


@route("GET", "/containers/{id}/archive")
def archive_get(engine: Engine, request: Request, name: str) -> Response:
    """A path in a container as a tar, with its stat in a header; 404 where there is none."""
    container = engine.snapshot.find(name)
    path = check_path(request.value("path"))

    def chunks() -> Iterator[Any]:
        with opened_tree(engine, container, not_there(name, path), {"do": "pack", "path": path}) as (process, told, data):
            yield PathStat(*told)
            yield data
            yield from process.pieces()
            if process.wait():
                raise tree_error(process, not_there(name, path))
        engine.tell(container, "archive-path")

    tar = chunks()
    found = next(tar)
    return Response(200, Stream(tar), "application/x-tar", stat_header(found))


def decompressor(head: bytes) -> Optional[Callable[[], Any]]:
    """What makes decompressors for a body that begins so; None for one that is not packed."""
    if head.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(31)
    if head.startswith(b"BZh"):
        import bz2

        return bz2.BZ2Decompressor
    if head.startswith(b"\xfd7zXZ"):
        import lzma

        return lzma.LZMADecompressor
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
    """The content of compressed blocks, of one stream or of several in a row, which also zeros may stand between; 400 for
    one that breaks off."""
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


def plain_blocks(body: Any) -> Iterator[Any]:
    """The blocks of a tar body, unpacked where it came as gzip, bzip2 or xz; 400 for a broken one."""
    blocks, first = body.blocks(), b""
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
    except (zlib.error, OSError, ValueError, EOFError) as error:
        raise BadParameter(f"invalid archive: {error}") from None
    except Exception as error:
        if type(error).__name__ != "LZMAError":
            raise
        raise BadParameter(f"invalid archive: {error}") from None


def runs_as_user(engine: Engine, container: Container) -> bool:
    """Whether a user is named for a container, by its request or its image."""
    image = image_of(engine, container)
    return bool(container.labels.get("nerdctl/user") or image and (image.config.get("config") or {}).get("User"))


@route("PUT", "/containers/{id}/archive")
def archive_put(engine: Engine, request: Request, name: str) -> Response:
    """Unpack a tar into a folder of a container; 200. 404 where there is no such folder, 400 where it is none or read-only, and for
    an archive that is broken, breaks off or leads outside: what came before that is unpacked."""
    container = engine.snapshot.find(name)
    path = check_path(request.value("path"))
    order = {"do": "unpack", "path": path, "keep": request.flag("noOverwriteDirNonDir")}
    if not (request.flag("copyUIDGID") and runs_as_user(engine, container)):
        order["owner"] = None
    missing = not_there(name, path)
    with opened_tree(engine, container, missing, order) as (process, _, _):
        for block in plain_blocks(request.body):
            if not process.write(block):
                break
        process.close_stdin()
        if process.wait():
            raise tree_error(process, missing)
    engine.touched.add(container.id)
    engine.tell(container, "extract-to-dir")
    return Response(200)


@route("GET", "/containers/{id}/export")
def container_export(engine: Engine, request: Request, name: str) -> Response:
    """Its whole file system as a tar."""
    container = engine.snapshot.find(name)

    def chunks() -> Iterator[bytes]:
        # Go ends a program that finds its stdout closed; the same pipe by another number is an error to it, and it unmounts.
        output = ["--output=/dev/stdout"] if engine.nerdctl.local else []
        with engine.nerdctl.start("export", *output, "--", container.real, mounts=True) as process:
            yield from process.pieces()
            process.check()
        engine.tell(container, "export")

    return Response(200, Stream(chunks(), primed=True), "application/octet-stream")


@route("GET", "/containers/{id}/changes")
def container_changes(engine: Engine, request: Request, name: str) -> Response:
    """What differs from its image: paths with the kinds 0 changed, 1 added, 2 deleted."""
    container = engine.snapshot.find(name)
    text = engine.nerdctl.run("diff", "--", container.real).stdout.decode("utf-8", "surrogateescape")
    return Response(200, parse_changes(text) or json_null())


# Where nerdctl mounts what is not of the container.
MOUNT_POINTS = ("/dev", "/proc", "/sys", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf")


def parse_changes(text: str) -> List[Dict[str, Any]]:
    """The lines of nerdctl's diff, without the root and the mount points that every container gets, which Docker does
    not tell."""
    kinds = {"C": 0, "A": 1, "D": 2}
    found: Dict[str, int] = {}
    for line in text.splitlines():
        kind, _, path = line.partition(" ")
        if kind in kinds and path.startswith("/") and path != "/" and not (kind == "A" and path in MOUNT_POINTS):
            # It tells a folder that was added once more as changed.
            found[path] = max(kinds[kind], found.get(path, 0))
    if found.get("/etc") == 0 and not any(path.startswith("/etc/") for path in found):
        # It has changed by those mount points alone.
        del found["/etc"]
    return [{"Path": path, "Kind": found[path]} for path in sorted(found)]


def json_null() -> bytes:
    """The JSON null, which dockerd has for an empty list here."""
    return b"null\n"


###############################################################################
# Statistics
###############################################################################


def read_file(path: str) -> str:
    """A small file, "" when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def read_number(path: str) -> int:
    """The number in a file, 0 for none (and for `max`)."""
    text = read_file(path).strip()
    return int(text) if text.isdigit() else 0


def read_table(path: str) -> Dict[str, int]:
    """The `name number` lines of a file."""
    return {name: int(value) for name, _, value in (line.partition(" ") for line in read_file(path).splitlines()) if value.isdigit()}


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
        waited, more = throttled.get("throttled_time", 0), {"percpu_usage": [int(each) for each in read_file(folders["cpuacct"] + "/cpuacct.usage_percpu").split()]}
    else:
        told = throttled = read_table(folders.get("", "") + "/cpu.stat")
        total, user, system = told.get("usage_usec", 0) * 1000, told.get("user_usec", 0) * 1000, told.get("system_usec", 0) * 1000
        waited, more = told.get("throttled_usec", 0) * 1000, {}
    machine = read_file("/proc/stat").partition("\n")[0].split()[1:8]
    return {
        "cpu_usage": {"total_usage": total, "usage_in_kernelmode": system, "usage_in_usermode": user, **more},
        "system_cpu_usage": sum(map(int, machine)) * (10**9 // os.sysconf("SC_CLK_TCK")), "online_cpus": os.cpu_count() or 1,
        "throttling_data": {"periods": throttled.get("nr_periods", 0), "throttled_periods": throttled.get("nr_throttled", 0), "throttled_time": waited},
    }


def memory_total() -> int:
    """Bytes of memory of the machine."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", read_file("/proc/meminfo"), re.M)
    return int(found.group(1)) * 1024 if found else 0


def memory_stats(folders: Dict[str, str]) -> Dict[str, Any]:
    """`memory_stats` of either version of cgroups; the limit is the machine's memory where there is none."""
    total = memory_total()
    if "memory" in folders:
        folder = folders["memory"]
        limit = read_number(folder + "/memory.limit_in_bytes")
        found = {"usage": read_number(folder + "/memory.usage_in_bytes"), "max_usage": read_number(folder + "/memory.max_usage_in_bytes"),
                 "stats": read_table(folder + "/memory.stat"), "failcnt": read_number(folder + "/memory.failcnt"), "limit": min(limit, total) or total}
        return {key: value for key, value in found.items() if value or key != "failcnt"}
    folder = folders.get("", "")
    limit = read_number(folder + "/memory.max")
    return {"usage": read_number(folder + "/memory.current"), "stats": read_table(folder + "/memory.stat"), "limit": min(limit, total) or total}


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
        for name, target in (("blkio.throttle.io_service_bytes_recursive", rows), ("blkio.throttle.io_serviced_recursive", operations)):
            for major, minor, word, value in re.findall(r"^(\d+):(\d+) (Read|Write) (\d+)$", read_file(f"{folders['blkio']}/{name}"), re.M):
                target.append({"major": int(major), "minor": int(minor), "op": word.lower(), "value": int(value)})
    else:
        for major, minor, rest in re.findall(r"^(\d+):(\d+) (.*)$", read_file(folders.get("", "") + "/io.stat"), re.M):
            told = dict(re.findall(r"(\w+)=(\d+)", rest))
            for target, keys in ((rows, ("rbytes", "wbytes")), (operations, ("rios", "wios"))):
                target += [{"major": int(major), "minor": int(minor), "op": word, "value": int(told.get(key, 0))}
                           for word, key in zip(("read", "write"), keys)]
    empty = {key: None for key in ("io_queue_recursive", "io_service_time_recursive", "io_wait_time_recursive", "io_merged_recursive",
                                   "io_time_recursive", "sectors_recursive")}
    return {"io_service_bytes_recursive": rows or None, "io_serviced_recursive": operations or None, **empty}


NETWORK_FIELDS = ("rx_bytes", "rx_packets", "rx_errors", "rx_dropped", None, None, None, None, "tx_bytes", "tx_packets", "tx_errors", "tx_dropped")


def network_stats(pid: int) -> Dict[str, Dict[str, int]]:
    """`networks`: bytes and packets of each interface of a process's network namespace but the loopback."""
    found = {}
    for name, numbers in re.findall(r"^\s*(\S+):\s*(.*)$", read_file(f"/proc/{pid}/net/dev"), re.M):
        if name != "lo":
            found[name] = {field: int(value) for field, value in zip(NETWORK_FIELDS, numbers.split()) if field}
    return found


EMPTY_CPU = {"cpu_usage": {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0},
             "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0}}


def docker_stats(container: Container, pid: int, before: Dict[str, Any]) -> Dict[str, Any]:
    """One sample of a container's statistics; `before` is the sample before it, {} for none. Of a container that does
    not run only zeros, as dockerd has it."""
    folders = cgroup_folders(pid) if pid else {}
    found: Dict[str, Any] = {
        "name": "/" + container.name, "id": container.id, "os_type": "linux", "read": rfc3339(time.time_ns()) if pid else ZERO_TIME,
        "preread": before.get("read") or ZERO_TIME, "num_procs": 0, "storage_stats": {},
        "pids_stats": pids_stats(folders) if pid else {}, "blkio_stats": blkio_stats(folders),
        "cpu_stats": cpu_stats(folders) if pid else EMPTY_CPU, "precpu_stats": before.get("cpu_stats") or EMPTY_CPU,
        "memory_stats": memory_stats(folders) if pid else {},
    }
    if pid and network_mode(container) != "host":
        found["networks"] = network_stats(pid)
    return found


@route("GET", "/containers/{id}/stats")
def container_stats(engine: Engine, request: Request, name: str) -> Response:
    """Its use of the machine, a sample a second; with stream=0 one, with one-shot=1 one without the sample before it."""
    container = engine.snapshot.find(name)
    stream, one_shot = request.flag("stream", True), request.flag("one-shot")
    if stream and one_shot:
        raise BadParameter("cannot have stream=true and one-shot=true")

    def sample(before: Dict[str, Any]) -> Dict[str, Any]:
        now = engine.snapshot.container(container.id)
        pid = (engine.snapshot.detail(now).get("Task") or {}).get("Pid") or 0 if now.running else 0
        return docker_stats(now, pid, before)

    def chunks() -> Iterator[bytes]:
        gone = threading.Event()
        before: Dict[str, Any] = {}
        with engine.feed.needed(), request.client.when_gone(gone.set):
            while not gone.is_set() and not engine.closing.is_set():
                try:
                    found = sample(before)
                except NotFound:
                    return
                if not stream and not one_shot and not before and found["read"] != ZERO_TIME:
                    before = found
                    gone.wait(1.0)
                    continue
                yield json_bytes(found) + b"\n"
                if not stream:
                    return
                before = found if found["read"] != ZERO_TIME else {}
                gone.wait(1.0)

    return Response(200, Stream(chunks(), primed=True), "application/json")


def parse_top(text: str) -> Dict[str, Any]:
    """ps's table as titles and rows; what is left of a row goes to the last column."""
    lines = [line for line in text.splitlines() if line.strip()]
    titles = lines[0].split() if lines else []
    return {"Titles": titles, "Processes": [line.split(None, len(titles) - 1) for line in lines[1:]]}


@route("GET", "/containers/{id}/top")
def container_top(engine: Engine, request: Request, name: str) -> Response:
    """Its processes as ps on the host shows them, with `ps_args`; 409 when it does not run."""
    container = engine.snapshot.find(name)
    require_running(container)
    try:
        words = shlex.split(request.value("ps_args"))
    except ValueError as error:
        raise BadParameter(f"invalid ps_args: {error}") from None
    found = parse_top(engine.nerdctl.run("top", container.real, *words).stdout.decode(errors="replace"))
    engine.tell(container, "top")
    return Response(200, found)


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
            try:
                detail = engine.snapshot.detail(container)
            except NotFound:
                # It has gone since it was listed.
                continue
            told = docker_networks(container, engine.snapshot.networks.get(), parse_addresses(detail.get("Task"))).get(network["Name"]) or {}
            members[container.id] = {
                "Name": container.name, "EndpointID": told.get("EndpointID") or "", "MacAddress": told.get("MacAddress") or "",
                "IPv4Address": f"{told['IPAddress']}/{told['IPPrefixLen']}" if told.get("IPAddress") else "",
                "IPv6Address": f"{told['GlobalIPv6Address']}/{told['GlobalIPv6PrefixLen']}" if told.get("GlobalIPv6Address") else "",
            }
    return Response(200, {**network, "Containers": members})


def network_create_args(body: Dict[str, Any], name: str) -> List[str]:
    """argv of `network create`. 400 for bad values, 501 for what nerdctl has not."""
    driver = typed(body.get("Driver"), str, "Driver") or "bridge"
    if driver not in ("bridge", "macvlan", "ipvlan"):
        raise NotFound(f'plugin "{driver}" not found')
    if body.get("ConfigOnly") or (typed(body.get("ConfigFrom"), dict, "ConfigFrom").get("Network")) or body.get("Ingress"):
        raise NotImplementedHere("nerdctl has neither config-only nor ingress networks")
    words = ["network", "create", f"--driver={driver}"]
    ipam = typed(body.get("IPAM"), dict, "IPAM")
    if typed(ipam.get("Driver"), str, "IPAM.Driver") not in ("", "default", "host-local", "dhcp"):
        raise BadParameter(f"could not resolve IPAM driver \"{ipam['Driver']}\"")
    ranges = []
    for each in typed(ipam.get("Config"), list, "IPAM.Config"):
        config = typed(each, dict, "IPAM.Config")
        for key, flag in (("Subnet", "--subnet"), ("Gateway", "--gateway"), ("IPRange", "--ip-range")):
            words += _text(config.get(key), flag, key)
        ranges += [config["IPRange"]] if config.get("IPRange") else []
    if ipam.get("Driver") == "dhcp":
        words.append("--ipam-driver=dhcp")
    words += _switch(body.get("Internal"), "--internal", "Internal") + _switch(body.get("EnableIPv6"), "--ipv6", "EnableIPv6")
    options = string_map(body.get("Options"), "Options")
    words += network_options(options)
    labels = string_map(body.get("Labels"), "Labels")
    # nerdctl keeps neither.
    labels.update({"nerdctld/options": json.dumps(options)} if options else {})
    labels.update({"nerdctld/ip-range": ranges[0]} if ranges else {})
    return [*words, *(f"--label={key}={value}" for key, value in labels.items()), "--", name]


# Docker's driver options that the CNI plugins know, under the plugins' names.
DRIVER_OPTIONS = {"com.docker.network.driver.mtu": "mtu", "com.docker.network.bridge.enable_ip_masquerade": "ip-masq",
                  "com.docker.network.bridge.enable_icc": "icc", "parent": "parent", "macvlan_mode": "macvlan_mode", "ipvlan_mode": "ipvlan_mode",
                  "mtu": "mtu"}


def network_options(options: Dict[str, str]) -> List[str]:
    """`--opt` words for the options that nerdctl carries out; the rest is only kept."""
    return [f"--opt={DRIVER_OPTIONS[key]}={value}" for key, value in options.items() if key in DRIVER_OPTIONS]


@route("POST", "/networks/create")
def network_create(engine: Engine, request: Request) -> Response:
    """Make a network; 201 with its id. 409 for a name in use, 403 for a pre-defined name or a subnet in use."""
    body = request.json(required=True)
    name = typed(body.get("Name"), str, "Name")
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", name):
        raise BadParameter(f'invalid network name: "{name}": only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed' if name else "name is required")
    if name in ("bridge", "host", "none", "default"):
        raise Forbidden(f"operation is not permitted on predefined {name} network")
    if name in engine.snapshot.networks.get():
        raise Conflict(f"network with name {name} already exists")
    arguments = network_create_args(body, name)
    try:
        engine.nerdctl.run(*arguments)
    except ApiError as error:
        if re.search(r"overlaps with other one|subnet .* overlap", str(error)):
            raise Forbidden("invalid pool request: Pool overlaps with other one on this address space") from None
        raise
    finally:
        engine.snapshot.networks.drop()
    network = find_network(engine, name)
    engine.journal.emit("network", "create", network["Id"], {"name": name, "type": network["Driver"]})
    spare = any(typed(each, dict, "IPAM.Config").get("AuxiliaryAddresses") for each in typed(field_of(body, "IPAM.Config"), list, "IPAM.Config"))
    return Response(201, {"Id": network["Id"], "Warning": "auxiliary addresses are not carried out: nerdctl has none" if spare else ""})


def network_users(engine: Engine, name: str) -> List[Container]:
    """The containers that were given a network."""
    return [each for each in engine.snapshot.containers.get().values() if name in network_names(each)]


def remove_network(engine: Engine, network: Dict[str, Any]) -> None:
    """Remove a network; 403 with dockerd's words for a pre-defined one or one with running containers."""
    if network["Name"] in ("bridge", "host", "none"):
        raise Forbidden(f"{network['Name']} is a pre-defined network and cannot be removed")
    users = network_users(engine, network["Name"])
    if any(each.running for each in users):
        names = ", ".join(f'name:"{each.name}" endpoint:"{each.id[:12]}"' for each in users if each.running)
        raise Forbidden(f"error while removing network: network {network['Name']} id {network['Id']} has active endpoints ({names})")
    try:
        engine.nerdctl.run("network", "rm", "--", network["Name"])
    finally:
        engine.snapshot.networks.drop()
    engine.journal.emit("network", "destroy", network["Id"], {"name": network["Name"], "type": network["Driver"]})


@route("DELETE", "/networks/{id}")
def network_delete(engine: Engine, request: Request, name: str) -> Response:
    """Remove a network; 204."""
    remove_network(engine, find_network(engine, name))
    return Response(204)


@route("POST", "/networks/prune")
def network_prune(engine: Engine, request: Request) -> Response:
    """Remove the networks that no container has, by the filters until, label and label!."""
    filters = request.filters("until", "label", "label!", "dangling")
    limit = until_limit(filters.get("until") or [])
    deleted = []
    for network in list(engine.snapshot.networks.get().values()):
        made = (nanoseconds_of(network["Created"]) or 0) / 1e9
        if (network["Name"] in ("bridge", "host", "none") or not network["Id"] or network["Id"] == made_up_id(network["Name"])
                or network_users(engine, network["Name"]) or not match_labels(network["Labels"], filters.get("label") or [])
                or any(match_labels(network["Labels"], [each]) for each in filters.get("label!") or []) or (limit is not None and made > limit)):
            continue
        with contextlib.suppress(ApiError):
            remove_network(engine, network)
            deleted.append(network["Name"])
    engine.journal.emit("network", "prune", "", {"reclaimed": "0"})
    return Response(200, {"NetworksDeleted": deleted or None})


def rewire(engine: Engine, network: Dict[str, Any], container: Container, settings: Optional[Dict[str, Any]]) -> None:
    """Put a container that was never started into a network (with these EndpointSettings) or out of it (None), by making
    it anew: nerdctl has no other way. 501 for one that was started."""
    name = network["Name"]
    word = "connect" if settings is not None else "disconnect"
    if was_started(container) or not container.request:
        raise NotImplementedHere(f"nerdctl cannot {word} a container that was started (or made by others) and a network: give it its networks "
                                 "when it is created")
    if container.id in engine.touched:
        raise NotImplementedHere(f"files were copied into this container, and nerdctl cannot {word} it without making it anew: {word} it first")
    body = dict(container.request)
    endpoints = dict(typed(typed(body.get("NetworkingConfig"), dict, "NetworkingConfig").get("EndpointsConfig"), dict, "EndpointsConfig"))
    host = dict(typed(body.get("HostConfig"), dict, "HostConfig"))
    # The networks it has now, by name.
    endpoints = {each: endpoints.get(each) or endpoints.get("default") or {} for each in network_names(container)}
    if settings is not None:
        endpoints[name] = settings
    else:
        endpoints.pop(name, None)
    host["NetworkMode"] = next(iter(endpoints), "none")
    body.update({"HostConfig": host, "NetworkingConfig": {"EndpointsConfig": endpoints}})
    plan = plan_container(engine, body)._replace(image=container.image)
    make_anew(engine, container, plan, [LABEL_LATER] if LABEL_LATER in container.labels else [])


HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")


def wanted_names(container: Container) -> Tuple[Dict[str, List[str]], Dict[str, List[str]]]:
    """The names by which a container asked to be found in each network and that nerdctl does not give it, and those by which it
    asked to find others: container -> names."""
    if "names" not in container.memo:
        asked, aliases, links = container.request, {}, {}
        known = {container.name, str(asked.get("Hostname") or ""), *(each.partition("=")[2] for each in hostname_args(asked))}
        told = list(container.host_config.get("Links") or [])
        for network, one in (field_of(asked, "NetworkingConfig.EndpointsConfig") or {}).items():
            aliases[network] = [each for each in one.get("Aliases") or [] if HOST_NAME.fullmatch(each) and each not in known]
            told += one.get("Links") or []
        for each in told:
            other, _, alias = each.strip("/").partition(":")
            if HOST_NAME.fullmatch(alias or other):
                links.setdefault(other, []).append(alias or other)
        container.memo["names"] = aliases, links
    return container.memo["names"]


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Context that holds the lock of a folder, as nerdctl takes it; OSError when somebody keeps it for two seconds."""
    descriptor, until = os.open(folder, os.O_RDONLY), time.monotonic() + 2.0
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


class Hosts:
    """Network aliases and links, which nerdctl has not: lines in the hosts files that it keeps for containers. What stands there
    outside of its own part it leaves alone, except for comments, so that a name marks the lines that are ours."""

    MARK = "alias.nerdctld"
    # The container can write to its file, and make it as large as it likes.
    MOST = 1 << 20

    def __init__(self, engine: Engine):
        self.engine = engine
        self.lock = threading.Lock()
        self.used = False
        self.due = threading.Event()
        engine.feed.listeners.append(self.on_event)

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
            # By itself it asks for no feed, which would never end then.
            if self.engine.feed.live:
                self.refresh()

    def refresh(self, starting: Optional[Container] = None) -> None:
        """Write to the files of running containers, or to that of one which is about to start, how it finds the others."""
        if not self.engine.nerdctl.local:
            return
        running = [each for each in self.engine.snapshot.containers.known().values() if each.running]
        named = [each for each in [*running, *([starting] if starting else [])] if any(map(any, (each.values() for each in wanted_names(each))))]
        if not named and not self.used:
            return
        with self.lock, contextlib.suppress(OSError, ValueError):
            self.used = bool(named)
            places = [(each, dict(zip((name for name in network_names(each) if not name.startswith("container:")), noted_addresses(each)))) for each in running]
            for store, group in itertools.groupby([starting] if starting else running, lambda each: os.path.dirname(hosts_folder(each))):
                with locked(store):
                    for each in group:
                        self._write(each, self._lines(each, places))

    def _lines(self, container: Container, places: List[Tuple[Container, Dict[str, Dict[str, Any]]]]) -> List[str]:
        mine, links, lines = set(network_names(container)), wanted_names(container)[1], []
        for other, addresses in places:
            linked = [name for key in (other.name, other.id, other.id[:12]) for name in links.get(key, ())]
            for network in mine.intersection(addresses):
                names = wanted_names(other)[0].get("default" if network == "bridge" else network, []) + linked
                ips = [addresses[network].get(key) for key in ("ip", "ip6")] if names else []
                lines += [" ".join([ip, *dict.fromkeys(names), self.MARK]) for ip in ips if ip]
        return sorted(lines)

    def _write(self, container: Container, lines: List[str]) -> None:
        # In place, since it is mounted into the container.
        with contextlib.suppress(OSError), open(os.path.join(hosts_folder(container), "hosts"), "r+", encoding="utf-8", errors="surrogateescape") as file:
            if os.fstat(file.fileno()).st_size > self.MOST:
                return
            before = file.read().splitlines()
            after = [each for each in before if not each.rstrip().endswith(self.MARK)] + lines
            if after != before:
                file.seek(0)
                file.write("".join(each + "\n" for each in after))
                file.truncate()


@route("POST", "/networks/{id}/connect")
def network_connect(engine: Engine, request: Request, name: str) -> Response:
    """Put a container into a network; 501 for one that was started already, 403 for one that is in it."""
    body = request.json(required=True)
    network = find_network(engine, name)
    container = engine.snapshot.container(typed(body.get("Container"), str, "Container"))
    if network["Name"] in engine.apart.get(container.id, ()):
        engine.apart[container.id].discard(network["Name"])
        if not engine.apart[container.id]:
            del engine.apart[container.id]
        return Response(200)
    if network["Name"] in network_names(container):
        raise Forbidden(f"endpoint with name {container.name} already exists in network {network['Name']}")
    rewire(engine, network, container, typed(body.get("EndpointConfig"), dict, "EndpointConfig"))
    engine.journal.emit("network", "connect", network["Id"], {"container": container.id, "name": network["Name"], "type": network["Driver"]})
    return Response(200)


@route("POST", "/networks/{id}/disconnect")
def network_disconnect(engine: Engine, request: Request, name: str) -> Response:
    """Take a container out of a network; 501 for one that runs, 403 for one that is not in it. One that ran before cannot be
    started any more."""
    body = request.json(required=True)
    network = find_network(engine, name)
    container = engine.snapshot.container(typed(body.get("Container"), str, "Container"))
    if network["Name"] not in network_names(container) or network["Name"] in engine.apart.get(container.id, ()):
        raise Forbidden(f"container {container.id} is not connected to network {network['Name']}")
    if was_started(container) and not container.running:
        engine.apart.setdefault(container.id, set()).add(network["Name"])
    else:
        rewire(engine, network, container, None)
    engine.journal.emit("network", "disconnect", network["Id"], {"container": container.id, "name": network["Name"], "type": network["Driver"]})
    return Response(200)


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


@route("POST", "/volumes/create")
def volume_create(engine: Engine, request: Request) -> Response:
    """Make a volume, or find the one of that name; 201. 404 for a driver other than local, 501 for driver options."""
    body = request.json(required=True)
    name, driver = typed(body.get("Name"), str, "Name"), typed(body.get("Driver"), str, "Driver")
    labels, options = string_map(body.get("Labels"), "Labels"), string_map(body.get("DriverOpts"), "DriverOpts")
    if driver not in ("", "local"):
        raise NotFound(f'create {name}: error looking up volume plugin {driver}: plugin "{driver}" not found')
    if name:
        check_volume_name(name)
    if typed(body.get("ClusterVolumeSpec"), dict, "ClusterVolumeSpec"):
        raise Unavailable(NO_SWARM)
    found = engine.snapshot.volumes.get().get(name) if name else None
    if found is None:
        if options:
            raise NotImplementedHere("nerdctl's volumes are folders: they take no driver options")
        if not name:
            name = os.urandom(32).hex()
            labels = {**labels, ANONYMOUS: ""}
        try:
            engine.nerdctl.run("volume", "create", *(f"--label={key}={value}" for key, value in labels.items()), "--", name)
        finally:
            engine.snapshot.volumes.drop()
        found = find_volume(engine, name)
        engine.journal.emit("volume", "create", name, {"driver": "local"})
    return Response(201, found)


def remove_volume(engine: Engine, name: str) -> None:
    """Remove a volume; 409 with dockerd's words while a container has it."""
    users = [each.id for each in engine.snapshot.containers.get().values() if any(mount.get("Name") == name for mount in parse_mounts(each.labels))]
    if users:
        raise Conflict(f"remove {name}: volume is in use - [{', '.join(users)}]")
    try:
        engine.nerdctl.run("volume", "rm", "--", name)
    finally:
        engine.snapshot.volumes.drop()
    engine.journal.emit("volume", "destroy", name, {"driver": "local"})


@route("DELETE", "/volumes/{name}")
def volume_delete(engine: Engine, request: Request, name: str) -> Response:
    """Remove a volume; 204, with `force` also when there is none; 409 while it is in use."""
    try:
        find_volume(engine, name)
    except NotFound:
        if request.flag("force"):
            return Response(204)
        raise
    remove_volume(engine, name)
    return Response(204)


def is_anonymous(volume: Dict[str, Any]) -> bool:
    """Whether a volume was made without a name."""
    return ANONYMOUS in (volume["Labels"] or {})


@route("POST", "/volumes/prune")
def volume_prune(engine: Engine, request: Request) -> Response:
    """Remove the volumes that no container has: the anonymous ones, with the filter `all` every one."""
    filters = request.filters("all", "label", "label!")
    everything = flag_filter(filters, "all", request.version < (1, 42))
    used, deleted, reclaimed = volume_users(engine), [], 0
    found = [volume for volume in list(engine.snapshot.volumes.get().values())
             if volume["Name"] not in used and (everything or is_anonymous(volume))
             and match_labels(volume["Labels"] or {}, filters.get("label") or [])
             and not any(match_labels(volume["Labels"] or {}, [each]) for each in filters.get("label!") or [])]
    sizes = volume_sizes(engine) if found else {}
    for volume in found:
        with contextlib.suppress(ApiError):
            remove_volume(engine, volume["Name"])
            deleted.append(volume["Name"])
            reclaimed += sizes.get(volume["Name"], 0)
    engine.journal.emit("volume", "prune", "", {"reclaimed": str(reclaimed)})
    return Response(200, {"VolumesDeleted": deleted or None, "SpaceReclaimed": reclaimed})


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
# Relay
###############################################################################

# `docker build` of today speaks gRPC with the builder itself. On /grpc the client is the HTTP/2 client and buildkitd the
# server: bytes pass as they are, but for the Solve requests that ask for dockerd's own exporter. On /session the roles are
# turned: what the client sends is carried inside one call of buildkitd's Control/Session, whose HTTP/2 client is here.


def like_solve(data: bytes) -> Optional[bool]:
    """Whether a stream that begins with `data` may be a Solve: an uncompressed message that begins with a reference, which
    is a short word. None when more has to be seen. Status looks the same."""
    if data[:1] not in (b"", b"\0") or data[5:6] not in (b"", b"\x0a") or data[6:7] == b"\0" or data[6:7] > b"\x40":
        return False
    if len(data) < 7:
        return None
    word = data[7:7 + data[6]]
    if word and not re.fullmatch(rb"[A-Za-z0-9]+", word):
        return False
    return True if len(word) == data[6] else None


class Splice:
    """/grpc: the client's frames to buildkitd and buildkitd's to the client, without I/O.

    `prepare(message)` takes a SolveRequest and returns the one to send and, unless it is None, a function to be called with
    buildkitd's answer; its ApiError ends the stream. Such a request can be larger than the windows: it is taken off the
    client at once and sent as buildkitd has room, so that on its stream both windows are ours to keep."""

    HELD = 1 << 25
    over, mould = False, None

    def __init__(self, prepare: Callable[[bytes], Tuple[bytes, Optional[Callable[[bytes], None]]]]):
        self.prepare = prepare
        self.to_client, self.to_server = Outbox(), Outbox()
        self.client_frames, self.server_frames = Frames(PREFACE), Frames()
        self.sender = Sender(self.to_server)
        self.fresh: set = set()
        self.begun: Dict[int, bool] = {}
        self.held: Dict[int, bytearray] = {}
        self.answers: Dict[int, Tuple[bytearray, Callable[[bytes], None]]] = {}
        # The build that a stream belongs to, and those that were refused: who follows their progress would wait in vain.
        self.builds: Dict[int, bytes] = {}
        self.refused: set = set()
        self.lost: Optional[ApiError] = None
        self.greeted = False

    def room(self) -> Tuple[bool, bool]:
        """Whether more may be read from the client, and from buildkitd."""
        return len(self.to_server) + self.sender.waiting < 4 * BLOCK, len(self.to_client) < 4 * BLOCK

    def flushed(self) -> None:
        """Nothing depends on what was written."""

    def from_client(self, data: bytes) -> None:
        """Bytes of the client."""
        for each in self.client_frames.feed(data):
            if self.lost:
                self._answer_alone(each)
            elif each.kind == DATA:
                self._client_data(each)
            else:
                if each.kind == HEADERS and each.stream not in self.begun:
                    self.begun[each.stream] = False
                    if not each.ends:
                        self.fresh.add(each.stream)
                elif each.kind == RESET:
                    self._forget(each.stream)
                self.to_server += each.raw

    def _client_data(self, each: Frame) -> None:
        stream, data, size = each.stream, each.data, len(each.raw) - 9
        if stream not in self.begun:
            # It has ended on the other side meanwhile.
            self.to_client += credit(0, size)
            return
        if stream in self.fresh and size:
            self.fresh.discard(stream)
            if like_solve(bytes(data[:80])) is not False:
                self.held[stream] = bytearray()
                self.sender.windows[stream] = self.sender.initial
        if stream in self.sender.windows:
            self.to_client += credit(0, size) + (b"" if each.ends else credit(stream, size))
            if stream in self.held:
                self.held[stream] += data
                self._release(stream, each.ends)
            else:
                self.sender.push(stream, data, end=each.ends)
        elif size == len(data) <= self.sender.connection and stream not in self.sender.queues:
            self.sender.connection -= size
            self.to_server += each.raw
        else:
            # Of padding buildkitd sees nothing, so that it will not credit it.
            self.to_client += credit(0, size - len(data)) + (b"" if each.ends else credit(stream, size - len(data)))
            self.sender.push(stream, data, end=each.ends)

    def _release(self, stream: int, end: bool) -> None:
        """Let a held request go, if it is complete or turns out to be something else."""
        held = self.held[stream]
        like, size = like_solve(bytes(held[:80])), 5 + int.from_bytes(held[1:5], "big")
        if not end and like is not False and size <= self.HELD and len(held) < max(size, 5):
            return
        message = bytes(self.held.pop(stream))
        if like and len(message) >= size:
            build = self.builds[stream] = message[7:7 + message[6]]
            if build in self.refused:
                self._refuse(stream, None)
                return
            try:
                solve, answered = self.prepare(message[5:size])
            except ApiError as error:
                self.refused.add(build)
                for each in [each for each, its in self.builds.items() if its == build]:
                    self._refuse(each, error if each == stream else None)
                return
            message = struct.pack(">BI", 0, len(solve)) + solve + message[size:]
            if answered:
                self.answers[stream] = (bytearray(), answered)
        self.sender.push(stream, message, end=end)

    def _refuse(self, stream: int, error: Optional[ApiError]) -> None:
        self.to_client += grpc_end(stream, error, self.begun.get(stream, False))
        self.to_server += frame(RESET, 0, stream, struct.pack(">I", 8))
        self._forget(stream)

    def _answer_alone(self, each: Frame) -> None:
        """Answer a frame of the client in place of a buildkitd that is not there."""
        if each.kind == HEADERS:
            self.to_client += grpc_end(each.stream, self.lost)
        elif each.kind in (SETTINGS, PING) and not each.flags & ACK:
            self.to_client += frame(each.kind, ACK, 0, bytes(each.data) if each.kind == PING else b"")

    def from_server(self, data: bytes) -> None:
        """Bytes of buildkitd."""
        self.greeted = True
        for each in self.server_frames.feed(data):
            if each.kind == WINDOW_UPDATE:
                self._server_credit(each)
                continue
            self.to_client += each.raw
            if each.kind == SETTINGS and not each.flags & ACK:
                change = self.sender.settings(each.data)
                # The client's view of a window that is kept here must not shrink with it.
                self.to_client += b"".join(credit(stream, -change) for stream in self.sender.windows)
                self.sender.flush()
            elif each.kind == HEADERS and each.stream in self.begun:
                self.begun[each.stream] = True
            elif each.kind == DATA and each.stream in self.answers:
                answer = self.answers[each.stream][0]
                answer += each.data[:max(0, self.HELD - len(answer))]
            if each.ends:
                if each.stream in self.answers:
                    answer, answered = self.answers[each.stream]
                    answered(bytes(answer[5:]))
                self._forget(each.stream)

    def _server_credit(self, each: Frame) -> None:
        if each.stream == 0:
            swallowed = min(self.sender.owed, each.number)
            self.sender.owed -= swallowed
            self.sender.connection += each.number
            self.to_client += credit(0, each.number - swallowed)
        elif each.stream in self.sender.windows:
            self.sender.windows[each.stream] += each.number
        else:
            self.to_client += each.raw
            return
        self.sender.flush()

    def _forget(self, stream: int) -> None:
        self.fresh.discard(stream)
        for table in (self.begun, self.held, self.answers, self.builds):
            table.pop(stream, None)
        self.to_client += credit(0, self.sender.forget(stream))

    def client_ended(self) -> None:
        """The client is gone: buildkitd notices by the end of its own connection."""

    def server_ended(self, error: Optional[ApiError] = None) -> None:
        """buildkitd is gone or was never there: end every stream with the reason, those to come too."""
        self.lost = error or Unavailable("buildkitd has ended: see its log, and build again when it is back")
        if not self.greeted:
            self.to_client += frame(SETTINGS, 0, 0)
        for stream, begun in self.begun.items():
            self.to_client += grpc_end(stream, self.lost, begun)
        for table in (self.begun, self.held, self.answers, self.builds):
            table.clear()


class BuildSession:
    """/session: what the client sends as messages of one call, and back, without I/O."""

    def __init__(self, headers: Iterable[Tuple[str, str]]):
        self.call = Call("/moby.buildkit.v1.Control/Session", headers)
        self.to_client, self.to_server = Outbox(), self.call.out
        self.mould = Mould(self.call.sender, 1, 1)
        self.over = False

    def room(self) -> Tuple[bool, bool]:
        """Whether more may be read from the client, and from buildkitd: always, since its window is bounded."""
        return self.mould.room > 0, True

    def flushed(self) -> None:
        """Let buildkitd send more when the client has taken most of what came."""
        if self.to_client.size < BLOCK:
            self.call.consumed()

    def from_client(self, data: bytes) -> None:
        """Bytes of the client: one message."""
        self.call.send(varint(1 << 3 | 2) + varint(len(data)), data)

    def from_server(self, data: bytes) -> None:
        """Bytes of buildkitd."""
        for message in self.call.feed(data):
            for each in fields(memoryview(message)):
                if each.number == 1:
                    self.to_client += each.value
        self.over = self.call.ended

    def client_ended(self) -> None:
        """The client has said all."""
        self.call.finish()

    def server_ended(self) -> None:
        """buildkitd is gone: so is the session."""
        self.over = True


class End:
    """One end of a relay: a socket that does not block, what is to be written to it, and who takes what is read."""

    def __init__(self, sock: socket.socket, out: Outbox, feed: Callable[[bytes], None], mould: Optional[Mould] = None):
        self.sock = sock
        self.descriptor = sock.fileno()
        self.out = out
        self.feed = feed
        self.mould = mould
        self.broken = False
        self.awaited: Optional[int] = None
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    def take(self, other: Optional["End"]) -> bool:
        """Take what has come, straight on to the other end where there is a mould; False at the end."""
        try:
            if self.mould and other and self.mould.room:
                return self.mould.carry(self.sock, other.sock)
            data = self.sock.recv(BLOCK)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        if data:
            self.feed(data)
        return len(data) > 0

    def watch(self, poller: Any, room: bool) -> None:
        """Have the poller wait for what may be done next: to read if there is `room`, and to write what is left."""
        awaited = (select.POLLIN if room else 0) | (select.POLLOUT if self.out.size else 0)
        if awaited != self.awaited:
            self.awaited = awaited
            poller.register(self.sock, awaited)

    def flush(self) -> None:
        """Write as much as goes; what nobody can take any more is dropped, and the end is `broken`."""
        while self.out.size:
            try:
                if not self.broken:
                    self.out.send(self.sock)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.broken = True
            if self.broken:
                self.out.clear()


def relay(joint: Any, client: socket.socket, server: Optional[socket.socket], early: bytes = b"") -> None:
    """Carry bytes between the two through a Splice or a Session until one of them has ended. After buildkitd's end the
    client is answered for a few seconds more."""
    near = End(client, joint.to_client, joint.from_client, joint.mould)
    far = End(server, joint.to_server, joint.from_server) if server else None
    deadline = None if far else time.monotonic() + 10.0
    poller = select.poll()
    # This thread has no hurry to interrupt those it carries for: what comes meanwhile it carries at one go.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    if early:
        joint.from_client(early)
    while True:
        if near.out.size:
            near.flush()
        if near.broken or joint.over and not near.out.size or deadline and time.monotonic() > deadline:
            return
        joint.flushed()
        if far and far.out.size:
            far.flush()
        near_room, far_room = joint.room()
        near.watch(poller, near_room)
        if far:
            far.watch(poller, far_room)
        for descriptor, what in poller.poll(1000 if deadline else None):
            if not what & ~select.POLLOUT:
                continue
            end = near if descriptor == near.descriptor else far
            if end.take(far):
                continue
            if end is near:
                joint.client_ended()
                if far:
                    far.flush()
                return
            poller.unregister(server)
            far, deadline = None, time.monotonic() + 10.0
            joint.server_ended()


###############################################################################
# BuildKit
###############################################################################

NO_BUILDKIT = "start it with a containerd worker, or say where it is with --buildkit-host"
WORKER_LABEL = "org.mobyproject.buildkit.worker.containerd."


def full_names(text: str) -> List[str]:
    """The tags of a build, joined by commas, in full; 400 for what is no tag."""
    names = []
    for each in filter(None, (part.strip() for part in text.split(","))):
        try:
            reference = parse_reference(each)
        except BadParameter as error:
            raise BadParameter(f"invalid tag {each!r}: {error}") from None
        if reference.digest:
            raise BadParameter(f"invalid tag {each!r}: a tag of a build has no digest")
        names.append(reference.name)
    return names


def rewrite_exporter(exporter: bytes) -> Tuple[bytes, Optional[List[str]]]:
    """An exporter as buildkitd knows it: `moby` becomes `image` with the attributes that dockerd gives it, any other stays.
    With it the names it puts into the image store, None when it puts nothing there. 400 for a bad name."""
    parts, kind, attributes = list(fields(exporter)), "", {}
    for each in parts:
        if each.number == 1:
            kind = str(each.value, "utf-8")
        elif each.number == 2:
            key, value = read_entry(each.value)
            attributes[key] = value
    if kind == "image":
        names = [each for each in attributes.get("name", "").split(",") if each]
        return exporter, None if attributes.get("store", "").lower() in ("0", "f", "false") else names
    if kind != "moby":
        return exporter, None
    names = full_names(attributes.get("name", ""))
    changed = {"name": ",".join(names)} if names else {}
    for key, value in (("unpack", "true"), ("dangling-name-prefix", "moby-dangling")):
        if key not in attributes:
            changed[key] = value
    # Spelled so in BuildKit.
    changed["danging-name-empty-only"] = "true"
    kept = [each.raw for each in parts if each.number != 1 and not (each.number == 2 and read_entry(each.value)[0] in changed)]
    added = [field(2, field(1, key.encode()) + field(2, value.encode())) for key, value in changed.items()]
    return b"".join([field(1, b"image"), *kept, *added]), names


def rewrite_solve(message: bytes) -> Tuple[bytes, Optional[List[str]]]:
    """A SolveRequest as buildkitd understands it, with its other fields untouched, and the names it puts into the image
    store, None when it puts nothing there. 400 for a bad name, ValueError for what is no SolveRequest."""
    parts = list(fields(message))
    exporters = [each.value for each in parts if each.number == 13]
    if not exporters:
        # The one exporter of older clients.
        old = [field(1 if each.number == 3 else 2, each.value) for each in parts if each.number in (3, 4)]
        exporters = [b"".join(old)] if old else []
    rewritten = [rewrite_exporter(each) for each in exporters]
    stored = [names for _, names in rewritten if names is not None]
    told = [name for names in stored for name in names] if stored else None
    if [each for each, _ in rewritten] == exporters:
        return message, told
    kept = [each.raw for each in parts if each.number not in (3, 4, 13)]
    return b"".join([*kept, *(field(13, each) for each, _ in rewritten)]), told


def dial(address: str, timeout: float = 5.0) -> socket.socket:
    """A connection to a buildkitd; 503 with the reason."""
    kind, _, place = address.partition("://")
    try:
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(timeout)
                sock.connect(place)
            except BaseException:
                sock.close()
                raise
            return sock
        if kind == "tcp":
            host, _, port = place.rstrip("/").rpartition(":")
            sock = socket.create_connection((host.strip("[]"), int(port)), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
    except (OSError, ValueError, OverflowError) as error:
        raise Unavailable(f"{address}: {getattr(error, 'strerror', None) or error}") from None
    raise Unavailable(f"{address}: only unix://PATH and tcp://HOST:PORT can be reached")


def dial_buildkit(nerdctl: Nerdctl) -> Tuple[socket.socket, str]:
    """A connection to the buildkitd that nerdctl would use, and its address; 503 when there is none."""
    reasons = []
    for address in nerdctl.buildkit_addresses():
        try:
            return dial(address), address
        except Unavailable as error:
            reasons.append(str(error))
    raise Unavailable(f"buildkitd does not answer ({'; '.join(reasons)}): {NO_BUILDKIT}")


def parse_workers(message: bytes) -> List[Dict[str, str]]:
    """The labels of each worker of a ListWorkersResponse, the worker that builds first."""
    return [dict(read_entry(label.value) for label in fields(record.value) if label.number == 2)
            for record in fields(message) if record.number == 1]


def list_workers(address: str, timeout: float = 10.0) -> List[Dict[str, str]]:
    """The labels of a buildkitd's workers; 503 when it does not tell them in time."""
    with contextlib.suppress(OSError, ValueError), dial(address) as sock:
        answer = unary(sock, "/moby.buildkit.v1.Control/ListWorkers", timeout=timeout)
        if answer is not None:
            return parse_workers(answer)
    raise Unavailable(f"buildkitd at {address} does not tell its workers: see its log")


def worker_complaint(workers: List[Dict[str, str]], namespace: str, containerd: str) -> str:
    """Why nerdctl would not see an image built by the first of these workers, "" when it would. `containerd` is the UUID of
    nerdctl's."""
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
    return (f"buildkitd {what}, so that nerdctl would never see the image: in buildkitd.toml, write `enabled = false` under [worker.oci], and "
            f"`enabled = true`, `namespace = \"{namespace}\"` and containerd's `address` under [worker.containerd], and restart buildkitd")


def solved_digest(answer: bytes) -> str:
    """The image's digest in a SolveResponse, "" when there is none."""
    with contextlib.suppress(ValueError, TypeError):
        return dict(read_entry(each.value) for each in fields(answer) if each.number == 1).get("containerimage.digest", "")
    return ""


def replaced_images(engine: Engine, names: List[str]) -> Dict[str, str]:
    """The ids of the images that have these names now. Only told while somebody listens to events: it costs a process."""
    if not engine.journal.queues:
        return {}
    with contextlib.suppress(ApiError):
        return {each.name: each.id for each in engine.snapshot.names.get() if each.name in names}
    return {}


def prepare_solve(engine: Engine, address: str, message: bytes) -> Tuple[bytes, Optional[Callable[[bytes], None]]]:
    """What a Splice asks of a SolveRequest. 400 for a bad tag; 409 when the image would get lost; 503 when buildkitd
    does not say where it would go."""
    try:
        message, names = rewrite_solve(message)
    except (ValueError, TypeError):
        return message, None
    if names is None:
        return message, None
    containerd = engine.snapshot.info.get().get("ID") or ""
    complaint = worker_complaint(list_workers(address), engine.nerdctl.namespace, containerd)
    if complaint:
        raise Conflict(complaint)
    before = replaced_images(engine, names)

    def answered(answer: bytes) -> None:
        engine.snapshot.names.drop()
        digest = solved_digest(answer)
        # A name that is new is told by containerd.
        for name in names if digest else ():
            if before.get(name, digest) != digest:
                engine.journal.emit("image", "untag", before[name], {"name": familiar(name)})
            if name in before:
                engine.journal.emit("image", "tag", digest, {"name": familiar(name)})

    return message, answered


@route("POST", "/grpc")
def buildkit_grpc(engine: Engine, request: Request) -> Response:
    """101, then buildkitd. 101 also without one: after anything else clients would set up a builder of their own."""
    try:
        server, address = dial_buildkit(engine.nerdctl)
        failure = None
    except ApiError as error:
        server, address, failure = None, "", error

    def serve(connection: Connection) -> None:
        splice = Splice(functools.partial(prepare_solve, engine, address))
        if failure:
            log(f"build: {failure}")
            splice.server_ended(failure)
        else:
            # Known by the time that the client comes to its build.
            ahead(engine.snapshot.info.get)
        join(splice, connection, server)

    return Response(101, Hijack(serve, protocol="h2c"))


@route("POST", "/session")
def buildkit_session(engine: Engine, request: Request) -> Response:
    """101, then a session of buildkitd; without a buildkitd one that ends at once."""
    headers = [(name, value) for name, value in request.headers.items() if name.lower().startswith("x-docker-expose-session-")]
    server = None
    with contextlib.suppress(ApiError):
        server, _ = dial_buildkit(engine.nerdctl)

    def serve(connection: Connection) -> None:
        if server:
            join(BuildSession(headers), connection, server)

    return Response(101, Hijack(serve, protocol="h2c"))


def join(joint: Any, connection: Connection, server: Optional[socket.socket]) -> None:
    """Relay until the end and close buildkitd's side."""
    try:
        relay(joint, connection.sock, server, connection.early)
    except ValueError as error:
        log(f"build: {error}")
    finally:
        if server:
            server.close()


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
        try:
            if self.expects:
                self.expects = False
                self.handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
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
            events = select.EPOLLONESHOT | (select.EPOLLRDHUP if half else 0)
            # Modified for a second one too: the one shot may have been for the first.
            (self.poller.register if len(callbacks) == 1 else self.poller.modify)(descriptor, events)
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

    def when_gone(self, callback: Callable[[], Any], half: bool = True):
        return self.handler.server.hangups.watch(self.handler.connection, callback, half)


class HeadReader:
    """Reads the lines of a request's head, up to as many bytes as dockerd takes."""

    LIMIT = 1 << 20

    def __init__(self, file: Any):
        self.file = file
        self.left = self.LIMIT

    def readline(self, size: int) -> bytes:
        """One line; http.server answers 431 to what is raised beyond the limit."""
        line = self.file.readline(size)
        self.left -= len(line)
        if self.left < 0:
            raise http.client.LineTooLong("header")
        return line


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

    def parse_request(self) -> bool:
        file, self.rfile = self.rfile, HeadReader(self.rfile)
        try:
            return super().parse_request()
        finally:
            self.rfile = file

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
        # Around a value stand blanks and tabs only; what else Python takes for a space is a part of it.
        lengths = [each.strip(" \t") for each in self.headers.get_all("Content-Length") or []]
        codings = [each.strip(" \t").lower() for each in self.headers.get_all("Transfer-Encoding") or []]
        expects, self.expects = getattr(self, "expects", False), False
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
        if body is None or body.ended or isinstance(response.body, Stream):
            return
        if isinstance(response.body, Hijack):
            # dockerode sends its options once more as a body: they are not input for the container.
            body.drain(JSON_LIMIT, 2.0) if not body.chunked else None
        elif not body.drain(1 << 18, 0.2):
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
            # As much as the kernel gives: a fifth more bytes go through.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
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

    def send_chunk(self, chunk: Any, chunked: bool) -> None:
        """One chunk, bytes or Piped, in as few system calls as its size allows."""
        if isinstance(chunk, Piped):
            self.wfile.write(b"%x\r\n" % chunk.size if chunked else b"")
            chunk.move(self.connection.fileno())
            self.wfile.write(b"\r\n" if chunked else b"")
        elif not chunked:
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
        told = {"Api-Version": "%d.%d" % API_NEWEST, "Docker-Experimental": "false", "Ostype": "linux", "Server": self.version_string(),
                **response.headers}
        lines += [f"{name}: {value}" for name, value in told.items()]
        try:
            self.wfile.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        except OSError:
            response.body.abandon()
            return 499
        try:
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
    # handle_request() is called when there is one.
    timeout = 0

    def __init__(self, engine: "Engine", listener: socket.socket):
        super().__init__("", RequestHandler, bind_and_activate=False)
        # The constructor makes a socket even so.
        self.socket.close()
        self.socket = listener
        # Somebody else who has the socket of systemd may be faster; what is accepted does block.
        listener.setblocking(False)
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
    try:
        os.set_inheritable(3, False)
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
        if any(digest != "sha256:" + sha256(data).hexdigest() for digest, data in found.items()):
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
    "ps": ("no-trunc size filter=", CONTAINER_ROW, '{"ID":{{json .ID}},"Size":{{json .Size}}}'), "container inspect": ("mode=", INSPECT_FORMAT, "{{json .State}}"),
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
    return [sys.executable, "-IS", f"/proc/{os.getpid()}/fd/{own_bytecode()}", "nerdctl"]


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
    link = lambda below, layer: "sha256:" + sha256(f"{below} {layer}".encode()).hexdigest()
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
        """One container as INSPECT_FORMAT has it, or an empty State: ctr tells none, and for an unknown exit code containerd says 255."""
        told, (pid, status) = json.loads(self.run("containers", "info", "--", words[0])), self.tasks().get(words[0], (0, ""))
        task = {"Pid": pid, "Status": {"Status": status.lower(), "ExitStatus": 255 if status == "STOPPED" else 0}} if status else None
        found = {**told, "Runtime": told["Runtime"]["Name"], "Task": task, "Spec": {**told["Spec"], **(told["Spec"].get("linux") or {})}}
        return [found if flags["format"][-1] == INSPECT_FORMAT else {}]

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
    environment, settings = os.environ.get, nerdctl_settings()
    parser = argparse.ArgumentParser(
        prog="nerdctld", description="Docker Engine API on a unix socket, carried out by nerdctl.",
        epilog="dial-stdio joins standard input and output to the socket, for docker -H ssh://.")
    parser.add_argument("command", nargs="?", choices=["dial-stdio"], help=argparse.SUPPRESS)
    parser.add_argument("-H", "--addr", metavar="unix://PATH", default="",
                        help=f"socket to listen on (default: the one systemd hands over, else {default_socket_path()})")
    parser.add_argument("--nerdctl", metavar="COMMAND", default=environment("NERDCTL") or "",
                        help='nerdctl to run, such as "lima nerdctl" (default: $NERDCTL, nerdctl, or where that is missing containerd\'s ctr)')
    parser.add_argument("--namespace", default=environment("CONTAINERD_NAMESPACE") or settings.get("namespace") or "default",
                        help="containerd namespace (default: %(default)s)")
    parser.add_argument("--address", default=environment("CONTAINERD_ADDRESS") or settings.get("address") or "", help="containerd's socket")
    parser.add_argument("--snapshotter", default=environment("CONTAINERD_SNAPSHOTTER") or "", help="containerd snapshotter")
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
    return options


def listen(address: str) -> Tuple[socket.socket, str]:
    """The listening socket and, where it is our own and so ours to remove, its path."""
    listener = inherited_socket()
    if listener:
        return listener, ""
    path = socket_path(address) if address else default_socket_path()
    return own_socket(path), path


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
    """Serve until a signal or, with a timeout, until idle for so long; then let running requests end, for a bounded
    time."""
    # serve_forever() looks every so often whether it is to end: an idle daemon would never sleep, and its end would wait.
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
        signals = watch_signals()
        listener, path = listen(options.addr)
        inode = os.lstat(path).st_ino if path else 0
    except StartError as error:
        log(str(error))
        return 1
    nerdctl = Nerdctl(shlex.split(options.nerdctl) or nerdctl_command(), options.namespace, options.address, options.snapshotter,
                      options.buildkit_host, options.debug)
    engine = Engine(nerdctl)
    engine.workspace.sweep()
    engine.caretaker = Caretaker(engine)
    server = Server(engine, listener)
    notify_systemd("READY=1", notify)
    threading.Thread(target=engine.caretaker.look, name="look", daemon=True).start()
    log(f"listening on {path or 'the socket of systemd'}, namespace {nerdctl.namespace}")
    serve_until_told(server, 0.0 if path else options.idle_timeout, signals)
    notify_systemd("STOPPING=1", notify)
    if path:
        with contextlib.suppress(OSError):
            if os.lstat(path).st_ino == inode:
                os.unlink(path)
    # Streams of events would last until their clients leave.
    engine.hang_up()
    deadline = time.monotonic() + 10.0
    while server.active and time.monotonic() < deadline:
        time.sleep(0.02)
    engine.close()
    listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
