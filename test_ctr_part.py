# SPDX-License-Identifier: Apache-2.0
"""Tests of the section "ctr" of nerdctld.py: to be merged into test_nerdctld.py.

TestCtr runs anywhere: a scripted ctr replays what the real ones printed. TestCtrLive runs the same commands of the docker
client over the real nerdctl and over every ctr there is, against the containerd of this machine ($CONTAINERD_ADDRESS)."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest

import nerdctld

HERE = pathlib.Path(__file__).resolve().parent
DIGESTS = {
    "<M>": "sha256:4cfb279d3e24cb56dbe0b862229787c57fbc395c31e22f34917e17e9443a4892",
    "<C>": "sha256:4e848621cfa6a3a51a22d2d9a7f5a1ecb7f5a0b203f3a0eb45efdb3c050758bf",
    "<L>": "sha256:79df1f41608a3f38b48a83fe14064950d9924360817997b533735fd9961ebb17",
    "<N>": "sha256:92e0d612118245b002c9a33acd1eb15daf8ad298730ec75dd5cdfd6e31da203c",
}

# Version, command, status, stdout, stderr. Names and digests are shortened (DIGESTS has them in full), the specs of containers
# cut down to what is read. A word in capitals in front, or brackets behind, tell the state it was recorded in.
RECORDED = [
    ("ctr 1.6.20", "images pull --help", 0,
     '   --plain-http                      allow connections using plain HTTP\n',
     ''),
    ("ctr 1.6.20", "EMPTY images ls", 0,
     'REF TYPE DIGEST SIZE PLATFORMS LABELS \n',
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
    ("ctr 1.6.20", "images ls", 0,
     'REF                                                                                       TYPE                        '
     '                         DIGEST                                                                  SIZE     PLATFORMS   '
     'LABELS \n'
     'import-2026-11-24@<N> application/vnd.oci.image.manifest.v1+json           <N> 10.8 KiB linux/amd64 -      \n'
     'localhost:5000/bb:1                                                                       application/vnd.docker.distr'
     'ibution.manifest.v2+json <M> 2.0 MiB  linux/amd64 -      \n',
     ''),
    ("ctr 1.6.20", "containers ls -q", 0,
     'c1\n'
     'c2\n'
     'c3\n',
     ''),
    ("ctr 1.6.20", "containers info -- c1", 0,
     '{"ID":"c1","Labels":{"base":"busybox","io.containerd.image.config.stop-signal":"SIGTERM"},"Image":"localhost:5000/bb:1'
     '","Runtime":{"Name":"io.containerd.runc.v2","Options":{"type_url":"containerd.runc.v1.Options"}},"SnapshotKey":"c1","S'
     'napshotter":"overlayfs","CreatedAt":"2026-11-24T04:25:39.375812276Z","UpdatedAt":"2026-11-24T04:25:39.375812276Z","Ext'
     'ensions":null,"Spec":{"ociVersion":"1.0.2-dev","process":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"args":["/bin/'
     'sh","-c","sleep 1000"],"env":["PATH=/bin"],"cwd":"/"},"root":{"path":"rootfs"},"mounts":[{"destination":"/proc","type"'
     ':"proc","source":"proc","options":["nosuid","noexec","nodev"]}],"linux":{"resources":{"devices":[{"allow":false,"acces'
     's":"rwm"}],"cpu":{"shares":1024}},"cgroupsPath":"/rec/c1","namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"uts"},{'
     '"type":"mount"},{"type":"network"}],"maskedPaths":["/proc/acpi"]}}}',
     ''),
    ("ctr 1.6.20", "containers info -- c2", 0,
     '{"ID":"c2","Labels":{"base":"busybox","io.containerd.image.config.stop-signal":"SIGTERM"},"Image":"localhost:5000/bb:1'
     '","Runtime":{"Name":"io.containerd.runc.v2","Options":{"type_url":"containerd.runc.v1.Options"}},"SnapshotKey":"c2","S'
     'napshotter":"overlayfs","CreatedAt":"2026-11-24T04:25:39.477316561Z","UpdatedAt":"2026-11-24T04:25:39.477316561Z","Ext'
     'ensions":null,"Spec":{"process":{"args":["/bin/sh","-c","exit 3"]}}}',
     ''),
    ("ctr 1.6.20", "containers info -- c3", 0,
     '{"ID":"c3","Labels":{"base":"busybox","io.containerd.image.config.stop-signal":"SIGTERM"},"Image":"localhost:5000/bb:1'
     '","Runtime":{"Name":"io.containerd.runc.v2","Options":{"type_url":"containerd.runc.v1.Options"}},"SnapshotKey":"c3","S'
     'napshotter":"overlayfs","CreatedAt":"2026-11-24T04:25:39.584883479Z","UpdatedAt":"2026-11-24T04:25:39.584883479Z","Ext'
     'ensions":null,"Spec":{"process":{"args":["/bin/true"]}}}',
     ''),
    ("ctr 1.6.20", "containers info -- nope", 1,
     '',
     'ctr: container "nope" in namespace "rec": not found'),
    ("ctr 1.6.20", "tasks ls", 0,
     'TASK          PID      STATUS    \n'
     'c1    19686    RUNNING\n'
     'c2    19734    STOPPED\n',
     ''),
    ("ctr 1.6.20", "snapshots ls", 0,
     'KEY                                                                     PARENT                                        '
     '                          KIND      \n'
     'c1                                                              <L> Active    \n'
     'c2                                                              <L> Active    \n'
     'c3                                                              <L> Active    \n'
     '<L>                                                                         Committed \n',
     ''),
    ("ctr 1.6.20", "snapshots usage -b -- <L>", 0,
     'KEY                                                                     SIZE    INODES \n'
     '<L> 2019328 278    \n',
     ''),
    ("ctr 1.6.20", "snapshots usage -b -- c1 <L>", 0,
     'KEY                                                                     SIZE    INODES \n'
     'c1                                                              20480   5      \n'
     '<L> 2019328 278    \n',
     ''),
    ("ctr 1.6.20", "content get <M>", 0,
     '{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{"mediaType":"applicati'
     'on/vnd.docker.container.image.v1+json","digest":"<C>","size":333},"layers":[{"mediaType":"application/vnd.docker.image'
     '.rootfs.diff.tar","digest":"<L>","size":2129920}]}',
     ''),
    ("ctr 1.6.20", "content get <C>", 0,
     '{"architecture":"amd64","os":"linux","created":"2023-11-14T22:13:20Z","config":{"Env":["PATH=/bin"],"Cmd":["sh"],"Labe'
     'ls":{"base":"busybox"}},"rootfs":{"type":"layers","diff_ids":["<L>"]},"history":[{"created":"2023-11-14T22:13:20Z","cr'
     'eated_by":"busybox-static"}]}',
     ''),
    ("ctr 1.6.20", "content ls -q", 0,
     '<M>\n'
     '<C>\n'
     '<L>\n',
     ''),
    ("ctr 1.6.20", "content get sha256:0000000000000000000000000000000000000000000000000000000000000000", 1,
     '',
     'ctr: content digest sha256:0000000000000000000000000000000000000000000000000000000000000000: not found'),
    ("ctr 1.6.20", "version", 0,
     'Client:\n'
     '  Version:  1.6.20~ds1\n'
     '  Revision: 1.6.20~ds1-1+deb12u3\n'
     '  Go version: go1.19.8\n'
     '\n'
     'Server:\n'
     '  Version:  1.6.20~ds1\n'
     '  Revision: 1.6.20~ds1-1+deb12u3\n'
     '  UUID: 8e1eb5fe-5854-4f85-b784-6fe8b459b32f\n',
     ''),
    ("ctr 1.6.20", "images tag --force -- nope a:1", 1,
     '',
     'ctr: image "nope": not found'),
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
    ("ctr 1.6.20", "images rm --sync -- nope", 0,
     '',
     'time="2026-11-24T04:25:41Z" level=warning msg="nope: image not found"'),
    ("ctr 1.6.20", "PAUSED tasks ls", 0,
     'TASK          PID      STATUS    \n'
     'c1    19686    PAUSED\n'
     'c2    19734    STOPPED\n',
     ''),
    ("ctr 1.6.20", "events", 0,
     '2026-11-24 04:25:42.294534749 +0000 UTC rec /images/create {"name":"localhost:5000/bb:9"}\n'
     '2026-11-24 04:25:42.320623912 +0000 UTC rec /images/delete {"name":"localhost:5000/bb:9"}\n'
     '2026-11-24 04:25:42.347396478 +0000 UTC rec /tasks/paused {"container_id":"c1"}\n'
     '2026-11-24 04:25:42.388598426 +0000 UTC rec /tasks/resumed {"container_id":"c1"}\n',
     ''),
    ("ctr 1.6.20", "DOWN images ls", 1,
     '',
     'ctr: failed to dial "/run/containerd/containerd.sock": context deadline exceeded: connection error: desc = "transport:'
     ' error while dialing: dial unix:///run/containerd/containerd.sock: timeout"'),
    ("ctr 1.6.20", "STALE images ls", 1,
     '',
     'ctr: failed to dial "/run/containerd/containerd.sock": connection error: desc = "transport: error while dialing: dial '
     'unix /run/containerd/containerd.sock: connect: connection refused"'),
    ("ctr 2.3.1", "images pull --help", 0,
     '   --plain-http                           Allow connections using plain HTTP (default: false)\n'
     '   --local                                Fetch content from local client rather than using transfer service (default:'
     ' false)\n',
     ''),
    ("ctr 2.3.1", "EMPTY images ls", 0,
     'REF TYPE DIGEST SIZE PLATFORMS LABELS \n',
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
    ("ctr 2.3.1", "images ls", 0,
     'REF                                                                                       TYPE                        '
     '                         DIGEST                                                                  SIZE     PLATFORMS   '
     'LABELS \n'
     'import-2026-11-24@<N> application/vnd.oci.image.manifest.v1+json           <N> 10.8 KiB linux/amd64 -      \n'
     'localhost:5000/bb:1                                                                       application/vnd.docker.distr'
     'ibution.manifest.v2+json <M> 2.0 MiB  linux/amd64 -      \n',
     ''),
    ("ctr 2.3.1", "containers ls -q", 0,
     'c1\n'
     'c2\n'
     'c3\n',
     ''),
    ("ctr 2.3.1", "containers info -- c1", 0,
     '{"ID":"c1","Labels":{"base":"busybox","io.containerd.image.config.stop-signal":"SIGTERM"},"Image":"localhost:5000/bb:1'
     '","Runtime":{"Name":"io.containerd.runc.v2","Options":{"type_url":"containerd.runc.v1.Options"}},"SnapshotKey":"c1","S'
     'napshotter":"overlayfs","CreatedAt":"2026-11-24T04:25:56.679214312Z","UpdatedAt":"2026-11-24T04:25:56.679214312Z","Ext'
     'ensions":{},"SandboxID":"","Spec":{"ociVersion":"1.3.0","process":{"user":{"uid":0,"gid":0,"additionalGids":[0]},"args'
     '":["/bin/sh","-c","sleep 1000"],"env":["PATH=/bin"],"cwd":"/"},"root":{"path":"rootfs"},"mounts":[{"destination":"/pro'
     'c","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]}],"linux":{"resources":{"devices":[{"allow":fal'
     'se,"access":"rwm"}],"cpu":{"shares":1024}},"cgroupsPath":"/rec/c1","namespaces":[{"type":"pid"},{"type":"ipc"},{"type"'
     ':"uts"},{"type":"mount"},{"type":"network"}],"maskedPaths":["/proc/acpi"]}}}',
     ''),
    ("ctr 2.3.1", "containers info -- c2", 0,
     '{"ID":"c2","Labels":{"base":"busybox","io.containerd.image.config.stop-signal":"SIGTERM"},"Image":"localhost:5000/bb:1'
     '","Runtime":{"Name":"io.containerd.runc.v2","Options":{"type_url":"containerd.runc.v1.Options"}},"SnapshotKey":"c2","S'
     'napshotter":"overlayfs","CreatedAt":"2026-11-24T04:25:56.871539256Z","UpdatedAt":"2026-11-24T04:25:56.871539256Z","Ext'
     'ensions":{},"SandboxID":"","Spec":{"process":{"args":["/bin/sh","-c","exit 3"]}}}',
     ''),
    ("ctr 2.3.1", "containers info -- c3", 0,
     '{"ID":"c3","Labels":{"base":"busybox","io.containerd.image.config.stop-signal":"SIGTERM"},"Image":"localhost:5000/bb:1'
     '","Runtime":{"Name":"io.containerd.runc.v2","Options":{"type_url":"containerd.runc.v1.Options"}},"SnapshotKey":"c3","S'
     'napshotter":"overlayfs","CreatedAt":"2026-11-24T04:25:57.03407928Z","UpdatedAt":"2026-11-24T04:25:57.03407928Z","Exten'
     'sions":{},"SandboxID":"","Spec":{"process":{"args":["/bin/true"]}}}',
     ''),
    ("ctr 2.3.1", "containers info -- nope", 1,
     '',
     'ctr: container "nope" in namespace "rec": not found'),
    ("ctr 2.3.1", "tasks ls", 0,
     'TASK          PID      STATUS    \n'
     'c2    20619    STOPPED\n'
     'c1    20566    RUNNING\n',
     ''),
    ("ctr 2.3.1", "snapshots ls", 0,
     'KEY                                                                     PARENT                                        '
     '                          KIND      \n'
     'c1                                                              <L> Active    \n'
     'c2                                                              <L> Active    \n'
     'c3                                                              <L> Active    \n'
     '<L>                                                                         Committed \n',
     ''),
    ("ctr 2.3.1", "snapshots usage -b -- <L>", 0,
     'KEY                                                                     SIZE    INODES \n'
     '<L> 2019328 278    \n',
     ''),
    ("ctr 2.3.1", "snapshots usage -b -- c1 <L>", 0,
     'KEY                                                                     SIZE    INODES \n'
     'c1                                                              20480   5      \n'
     '<L> 2019328 278    \n',
     ''),
    ("ctr 2.3.1", "content get <M>", 0,
     '{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{"mediaType":"applicati'
     'on/vnd.docker.container.image.v1+json","digest":"<C>","size":333},"layers":[{"mediaType":"application/vnd.docker.image'
     '.rootfs.diff.tar","digest":"<L>","size":2129920}]}',
     ''),
    ("ctr 2.3.1", "content get <C>", 0,
     '{"architecture":"amd64","os":"linux","created":"2023-11-14T22:13:20Z","config":{"Env":["PATH=/bin"],"Cmd":["sh"],"Labe'
     'ls":{"base":"busybox"}},"rootfs":{"type":"layers","diff_ids":["<L>"]},"history":[{"created":"2023-11-14T22:13:20Z","cr'
     'eated_by":"busybox-static"}]}',
     ''),
    ("ctr 2.3.1", "content ls -q", 0,
     '<M>\n'
     '<C>\n'
     '<L>\n',
     ''),
    ("ctr 2.3.1", "content get sha256:0000000000000000000000000000000000000000000000000000000000000000", 1,
     '',
     'ctr: content digest sha256:0000000000000000000000000000000000000000000000000000000000000000: not found'),
    ("ctr 2.3.1", "version", 0,
     'Client:\n'
     '  Version:  v2.3.1\n'
     '  Revision: \n'
     '  Go version: go1.26.8\n'
     '\n'
     'Server:\n'
     '  Version:  v2.3.1\n'
     '  Revision: \n'
     '  UUID: 16f7ae04-a9a5-49b1-9999-0f05f4c7cfab\n',
     ''),
    ("ctr 2.3.1", "images tag --local --force -- nope a:1", 1,
     '',
     'ctr: image "nope": not found'),
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
    ("ctr 2.3.1", "images rm --sync -- nope", 0,
     '',
     'time="2026-11-24T04:25:58Z" level=warning msg="nope: image not found"'),
    ("ctr 2.3.1", "PAUSED tasks ls", 0,
     'TASK          PID      STATUS    \n'
     'c1    20566    PAUSED\n'
     'c2    20619    STOPPED\n',
     ''),
    ("ctr 2.3.1", "events", 0,
     '2026-11-24 04:25:59.759536401 +0000 UTC rec /images/create {"name":"localhost:5000/bb:9"}\n'
     '2026-11-24 04:25:59.780492403 +0000 UTC rec /images/delete {"name":"localhost:5000/bb:9"}\n'
     '2026-11-24 04:25:59.80931909 +0000 UTC rec /tasks/paused {"container_id":"c1"}\n'
     '2026-11-24 04:25:59.85340943 +0000 UTC rec /tasks/resumed {"container_id":"c1"}\n',
     ''),
    ("ctr 2.3.1", "DOWN images ls", 1,
     '',
     'ctr: cannot access socket /run/containerd/containerd.sock: stat /run/containerd/containerd.sock: no such file or direc'
     'tory'),
    ("ctr 2.3.1", "STALE images ls", 1,
     '',
     'time="2026-11-24T04:26:03Z" level=warning msg="Failed to check deprecations" error="connection error: desc = \\"transpo'
     'rt: Error while dialing: dial unix /run/containerd/containerd.sock: connect: connection refused\\""\n'
     'ctr: failed to list images: connection error: desc = "transport: Error while dialing: dial unix /run/containerd/contai'
     'nerd.sock: connect: connection refused"'),
]


def expand(text):
    """A recording with its digests in full."""
    for short, digest in DIGESTS.items():
        text = text.replace(short, digest)
    return text


RECORDINGS = {version: {expand(command): (status, expand(stdout), expand(stderr)) for of, command, status, stdout, stderr in RECORDED if of == version}
              for version in ("ctr 1.6.20", "ctr 2.3.1")}
BASE = "localhost:5000/bb:1"
JSON = "{{json .}}"

SCRIPT = '''#!%s -SE
import json, os, sys
folder = os.path.dirname(os.path.abspath(__file__))
words = [each for each in sys.argv[1:] if not each.startswith(("--namespace=", "--address="))]
call = {"argv": words, "tty": sys.stdin.isatty(), "line": sys.stdin.readline() if sys.stdin.isatty() else ""}
with open(os.path.join(folder, "calls.jsonl"), "a") as file:
    file.write(json.dumps(call) + chr(10))
words = [each for each in words if not each.startswith("--user=")]
rules = json.load(open(os.path.join(folder, "rules.json")))
key = "images pull --help" if words[-1] == "--help" else " ".join(words)
status, stdout, stderr = rules.get(key, [1, "", "ctr: not in the script: " + " ".join(words)])
sys.stdout.write(stdout)
sys.stdout.flush()
sys.stderr.write(stderr)
sys.exit(status)
'''


class ScriptedCtr:
    """A ctr that replays the recordings of a version and notes its calls."""

    def __init__(self, folder, version):
        self.folder, self.version, self.rules = folder, version, dict(RECORDINGS[version])
        self.program = folder / "ctr"
        self.program.write_text(SCRIPT % sys.executable)
        self.program.chmod(0o755)
        self.local = ["--local"] if "2." in version else []
        self.write()

    def write(self):
        """Make what is in `rules` what it answers."""
        (self.folder / "rules.json").write_text(json.dumps(self.rules))

    def on(self, command, stdout="", stderr="", status=0):
        """From now on `command` answers so."""
        self.rules[expand(command)] = (status, expand(stdout), expand(stderr))
        self.write()

    def calls(self):
        """The calls so far but for questions about flags: argv, whether stdin was a terminal, the first line read from it."""
        with contextlib.suppress(FileNotFoundError):
            found = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
            return [each for each in found if each["argv"][-1] != "--help"]
        return []

    def argv(self):
        """Their command lines as strings."""
        return [" ".join(each["argv"]) for each in self.calls()]


@pytest.fixture(params=sorted(RECORDINGS))
def ctr(request, tmp_path):
    """A scripted ctr of each version."""
    before = signal.getsignal(signal.SIGPIPE)
    yield ScriptedCtr(tmp_path, request.param)
    signal.signal(signal.SIGPIPE, before)


@pytest.fixture
def run(ctr, capfd, monkeypatch):
    """Runs `nerdctld.py nerdctl WORDS`: status, stdout and stderr."""
    monkeypatch.setenv("DOCKER_CONFIG", str(ctr.folder))

    def call(*words):
        status = nerdctld.ctr_main([f"--ctr={ctr.program}", f"--address={ctr.program}", "--namespace=rec", *words])
        return (status, *capfd.readouterr())

    return call


def rows(answer):
    """The JSON values a command printed; it must have succeeded."""
    status, stdout, stderr = answer
    assert (status, stderr) == (0, "")
    return nerdctld.parse_rows(stdout.encode())


def error(answer):
    """The ApiError the daemon makes of a command that failed."""
    assert answer[0] == 1
    return nerdctld.nerdctl_error(answer[2])


class TestCtr:
    def test_images(self, run):
        images = nerdctld.parse_images(rows(run("images", "--no-trunc", "--format", JSON)))
        assert [(each.name, each.id) for each in images] == [("import-2026-11-24@" + DIGESTS["<N>"], DIGESTS["<N>"]), (BASE, DIGESTS["<M>"])]

    def test_no_images(self, ctr, run):
        ctr.on("images ls", *ctr.rules["EMPTY images ls"][1:2])
        assert rows(run("images", "--no-trunc", "--format", JSON)) == []

    def test_image_inspect(self, run):
        (found,) = rows(run("image", "inspect", "--mode=native", "--format", JSON, "--", BASE, "nope"))
        group = nerdctld.ImageGroup(DIGESTS["<M>"])
        group.names, group.detail = [BASE], found
        image = nerdctld.docker_image(group, (1, 50))
        assert (image["Architecture"], image["Size"]) == ("amd64", 2019328 + 2129920 + 333 + 422)
        assert image["Descriptor"] == {"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "digest": DIGESTS["<M>"], "size": 422}
        assert image["RootFS"]["Layers"] == [DIGESTS["<L>"]] and group.digests == [DIGESTS["<M>"], DIGESTS["<M>"], DIGESTS["<C>"]]

    def test_image_that_is_not_all_here(self, ctr, run):
        ctr.on("content get <C>", stderr="ctr: content digest <C>: not found", status=1)
        assert isinstance(error(run("image", "inspect", "--mode=native", "--format", JSON, "--", BASE)), nerdctld.NotFound)

    def test_index(self, ctr, run):
        # No recording: the index is made here of the recorded manifest and of others whose content is not here.
        index = {"manifests": [{"digest": "sha256:" + "1" * 64, "platform": {"os": "linux", "architecture": "s390x"}},
                               {"digest": DIGESTS["<M>"], "mediaType": "m", "platform": {"os": "linux", "architecture": "amd64"}}]}
        text = json.dumps(index)
        digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        ctr.on("images ls", f"REF TYPE DIGEST SIZE PLATFORMS LABELS\na/b:1 index {digest} 2.0 MiB - -\n")
        ctr.on("content get " + digest, text)
        (found,) = rows(run("image", "inspect", "--mode=native", "--format", JSON, "--", "a/b:1"))
        assert found["Image"]["Target"] == {"mediaType": "index", "digest": digest, "size": len(text)}
        assert found["ManifestDesc"]["digest"] == DIGESTS["<M>"] and found["size"] == 2019328
        push = " ".join(["images push", *ctr.local, f"--manifest={DIGESTS['<M>']} --manifest-type=m -- a/b:1"])
        ctr.on(push)
        assert re.search(r"reduced-platform image \(m, " + DIGESTS["<M>"], run("push", "--", "a/b:1")[2])
        assert ctr.argv()[-1] == push

    def test_history(self, run):
        assert rows(run("history", "--no-trunc", "--format", JSON, "--", BASE)) == [{"CreatedBy": "busybox-static", "Size": "2019328B"}]
        assert isinstance(error(run("history", "--no-trunc", "--format", JSON, "--", "nope")), nerdctld.NotFound)

    def test_version_and_info_say_so(self, ctr, run):
        version = ctr.version.split()[1]
        (told,) = rows(run("version", "--format", JSON))
        components = {each["Name"]: each["Version"] for each in nerdctld.docker_version(told, "", (1, 50))["Components"]}
        assert version in components["containerd"] and version in components["ctr"]
        assert components["nerdctl"].startswith("nerdctl is not installed: ctr ")
        info = nerdctld.docker_info(rows(run("info", "--format", JSON))[0], "")
        assert info["Warnings"] == ["WARNING: nerdctl is not installed: over containerd's ctr there are images, listings and builds only"]
        assert re.fullmatch(r"[0-9a-f-]{36}", info["ID"]) and version in info["ContainerdCommit"]["ID"] and info["MemTotal"] > 0

    def test_ps(self, ctr, run):
        table = nerdctld.parse_containers(rows(run("ps", "-a", "--no-trunc", "--format", nerdctld.CONTAINER_ROW)))
        assert {key: (each.state, each.status) for key, each in table.items()} == {
            "c3": ("created", "Created"), "c2": ("exited", "Exited"), "c1": ("running", "Up")}
        row = nerdctld.docker_container_row(table["c1"], DIGESTS["<M>"], {}, time.time(), (1, 50))
        assert (row["Command"], row["Image"], row["Labels"]) == ("/bin/sh -c sleep 1000", BASE, {"base": "busybox"})
        ctr.on("tasks ls", *ctr.rules["PAUSED tasks ls"][1:2])
        (one,) = rows(run("ps", "-a", "--no-trunc", "--filter", "id=c1", "--format", nerdctld.CONTAINER_ROW))
        assert one[0]["Status"] == "Paused"
        ctr.on("containers info -- gone", stderr='ctr: container "gone" in namespace "rec": not found', status=1)
        assert rows(run("ps", "-a", "--no-trunc", "--filter", "id=gone", "--format", nerdctld.CONTAINER_ROW)) == []

    def test_ps_size(self, run):
        size = '{"ID":{{json .ID}},"Size":{{json .Size}}}'
        assert rows(run("ps", "-a", "--no-trunc", "--size", "--filter=id=c1", "--format", size)) == [{"ID": "c1", "Size": "20480B (virtual 2039808B)"}]

    def test_image_names_of_kubernetes(self):
        group = nerdctld.ImageGroup(DIGESTS["<M>"])
        group.names = [BASE, BASE[:-2] + "@" + DIGESTS["<M>"], DIGESTS["<C>"]]
        assert (group.repo_tags, group.repo_digests) == ([BASE], [BASE[:-2] + "@" + DIGESTS["<M>"]])

    def test_names_of_kubernetes(self, ctr, run):
        told = json.loads(ctr.rules["containers info -- c1"][1])
        told["Labels"] = {"io.kubernetes.pod.namespace": "kube-system", "io.kubernetes.pod.name": "dns", "io.kubernetes.container.name": "main"}
        ctr.on("containers info -- c1", json.dumps(told))
        (one,) = rows(run("ps", "-a", "--no-trunc", "--filter", "id=c1", "--format", nerdctld.CONTAINER_ROW))
        assert one[0]["Names"] == "k8s://kube-system/dns/main"

    @pytest.mark.parametrize("name, state, code", [("c1", "running", 0), ("c2", "exited", 255), ("c3", "created", 0)])
    def test_container_inspect(self, run, name, state, code):
        (detail,) = rows(run("container", "inspect", "--mode=native", "--format", nerdctld.INSPECT_FORMAT, "--", name))
        row, labels = rows(run("ps", "-a", "--no-trunc", "--filter", "id=" + name, "--format", nerdctld.CONTAINER_ROW))[0]
        told = nerdctld.docker_container(nerdctld.Container(row, labels), detail, {}, None, None, (1, 50))
        assert (told["State"]["Status"], told["State"]["ExitCode"], told["Path"][:5]) == (state, code, "/bin/")
        assert (told["State"]["Pid"] > 0) is (state == "running")
        if name == "c1":
            assert told["HostConfig"]["CpuShares"] == 1024 and told["HostConfig"]["MaskedPaths"] == ["/proc/acpi"] and told["Config"]["Env"] == ["PATH=/bin"]

    def test_events(self, run):
        status, stdout, _ = run("events", "--format", JSON)
        found = [nerdctld.parse_event(line, "rec") for line in stdout.splitlines()]
        assert status == 0 and found[1::2] == [None] * 4
        assert [(each.topic, each.payload) for each in found[::2]] == [
            ("/images/create", {"name": "localhost:5000/bb:9"}), ("/images/delete", {"name": "localhost:5000/bb:9"}),
            ("/tasks/paused", {"container_id": "c1"}), ("/tasks/resumed", {"container_id": "c1"})]
        assert found[0].time > 1795494300 * 10**9

    def test_networks_and_volumes_are_none(self, run):
        assert run("network", "ls", "--format", JSON) == run("volume", "ls", "--size", "--format", JSON) == (0, "", "")

    def test_load(self, ctr, run):
        assert nerdctld.parse_loaded(run("load", "--all-platforms")[1]) == [BASE]
        command = " ".join(["images import", *ctr.local, "--digests --skip-digest-for-named --all-platforms -- -"])
        assert ctr.argv()[0] == command
        ctr.on(command, ctr.rules["images import (nameless)"][1])
        old, new = "import-2026-11-24@" + DIGESTS["<N>"], "import@" + DIGESTS["<N>"]
        tag = " ".join(["images tag", *ctr.local, "--force --", old, new])
        ctr.on(tag)
        ctr.on("images rm --sync -- " + old)
        assert nerdctld.parse_loaded(run("load", "--all-platforms")[1]) == [new]
        assert [each for each in ctr.argv() if each != "images ls"][-2:] == [tag, "images rm --sync -- " + old]
        ctr.on(command, *ctr.rules["images import (garbage)"][1:], status=1)
        assert str(error(run("load", "--all-platforms"))) == "unexpected EOF"
        ctr.on(command, "Importing	elapsed: 0.1 s")
        assert "this ctr is not known" in str(error(run("load", "--all-platforms")))

    def test_tag(self, ctr, run):
        assert run("tag", "--", BASE, BASE) == (0, "", "") and ctr.calls() == []
        assert str(error(run("tag", "--", "nope", "a:1"))) == "No such image: nope"

    def test_rmi(self, ctr, run):
        ctr.on("images rm --sync -- " + BASE, BASE + "\n")
        assert run("rmi", "--force", "--", BASE)[::2] == (0, "")
        assert str(error(run("rmi", "--", BASE, "nope"))) == "No such image: nope"
        assert ctr.argv().count("images rm --sync -- " + BASE) == 1

    def test_words_that_look_like_flags(self, ctr, run):
        tag = " ".join(["images tag", *ctr.local, "--force -- --all -x"])
        ctr.on(tag)
        assert run("tag", "--", "--all", "-x")[0] == 0 and ctr.argv() == [tag]

    def test_pull_and_push(self, ctr, run):
        status, stdout, _ = run("pull", "--", BASE)
        table = nerdctld.ProgressTable(nerdctld.PULL_WORDS)
        told = [each["status"] for line in stdout.splitlines() for each in table.messages(line)]
        assert status == 0 and told[-1] == "Pull complete" and all(not call["tty"] for call in ctr.calls())
        assert run("push", "--", BASE)[0] == 0 and ctr.argv()[-1] == " ".join(["images push", *ctr.local, "--", BASE])
        missing = error(run("pull", "--", "localhost:5000/nope:1"))
        assert isinstance(missing, nerdctld.NotFound) and str(missing) == "failed to resolve image: localhost:5000/nope:1: not found"
        assert isinstance(error(run("push", "--", "localhost:5000/nope:1")), nerdctld.NotFound)

    def test_password_goes_by_a_terminal(self, ctr, run):
        (ctr.folder / "config.json").write_text(json.dumps({"auths": {"https://localhost:5000/v2/": {"auth": "dTpwOjEgMg=="}}}))
        assert run("pull", "--", BASE)[0] == 0
        call = ctr.calls()[-1]
        assert call["argv"] == ["images", "pull", *ctr.local, "--user=u", "--", BASE] and (call["tty"], call["line"]) == (True, "p:1 2\n")
        (ctr.folder / "config.json").write_text(json.dumps({"auths": {"localhost:5000": {"identitytoken": "secret"}}}))
        refused = error(run("pull", "--", BASE))
        assert isinstance(refused, nerdctld.NotImplementedHere) and "secret" not in str(refused)

    def test_docker_hub_in_the_config(self, ctr, run):
        (ctr.folder / "config.json").write_text(json.dumps({"auths": {nerdctld.INDEX_SERVER: {"auth": "dTpw"}, "other": {"auth": "eDp5"}}}))
        assert [nerdctld.docker_login(each) for each in ("docker.io", "other", "none")] == [("u", "p"), ("x", "y"), ("", "")]

    def test_save(self, ctr, run):
        ctr.on(" ".join(["images export", *ctr.local, "--platform=linux/amd64 -- -", BASE]), "tar")
        assert run("save", "--platform=linux/amd64", "--", BASE) == (0, "tar", "")
        assert str(error(run("save", "--", "nope"))) == "No such image: nope"

    @pytest.mark.parametrize("words", [["run", "-d", "x"], ["exec", "c1", "sh"], ["network", "create", "n"], ["volume", "inspect", "v"], ["cp"], [],
                                       ["images", "--format", "table"], ["images"]])
    def test_what_needs_nerdctl(self, run, words):
        refused = error(run(*words))
        assert isinstance(refused, nerdctld.NotImplementedHere) and str(refused).startswith("nerdctl is not installed, and ")

    def test_unknown_flag(self, run):
        assert str(error(run("images", "--tree"))) == "unknown flag: --tree"
        assert isinstance(error(run("images", "--tree")), nerdctld.BadParameter)

    @pytest.mark.parametrize("state", ["DOWN images ls", "STALE images ls"])
    def test_containerd_is_down(self, ctr, run, state):
        ctr.rules["images ls"] = ctr.rules[state]
        ctr.write()
        assert isinstance(error(run("images", "--format", JSON)), nerdctld.Unavailable)

    def test_no_socket(self, ctr, run):
        down = error(run(f"--address={ctr.folder}/none.sock", "images", "--format", JSON))
        assert isinstance(down, nerdctld.Unavailable) and f"{ctr.folder}/none.sock" in str(down) and ctr.calls() == []

    @pytest.mark.parametrize("text", ["", "NAME DIGEST\n", "REF TYPE DIGEST\nx y z\n"])
    def test_unexpected_table(self, ctr, run, text):
        ctr.on("images ls", text)
        assert "this ctr is not known: " in str(error(run("images", "--format", JSON)))

    def test_unexpected_content(self, ctr, run):
        ctr.on("content get <M>", "{}")
        assert "is not what its digest says" in str(error(run("image", "inspect", "--mode=native", "--format", JSON, "--", BASE)))

    def test_build(self, ctr, run, monkeypatch, tmp_path):
        noted = tmp_path / "buildctl.txt"
        (tmp_path / "buildctl").write_text(f"#!/bin/sh\nfor each; do echo \"$each\"; done > {noted}\nexit ${{BUILT:-0}}\n")
        (tmp_path / "buildctl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("BUILDKIT_HOST", "unix:///b.sock")
        words = ["build", "--progress=plain", "--build-arg=A=-1", "--label=a=b", "--no-cache", "--pull", "--target=t", "--add-host=h:::1",
                 "--add-host=g:1.2.3.4", f"--file={tmp_path}/x/D", "--tag=docker.io/library/a:1", "--tag=b.c/d:2", "--", str(tmp_path)]
        ctr.on(" ".join(["images import", *ctr.local, "--digests --skip-digest-for-named --all-platforms -- -"]), "unpacking localhost:5000/bb:1 (<M>)...done\n")
        assert run(*words)[0] == 0
        assert noted.read_text().splitlines() == [
            "--addr=unix:///b.sock", "build", "--progress=plain", "--frontend=dockerfile.v0", f"--local=context={tmp_path}", f"--local=dockerfile={tmp_path}/x",
            "--opt=filename=D", "--opt=build-arg:A=-1", "--opt=label:a=b", "--opt=target=t", "--no-cache", "--opt=image-resolve-mode=pull",
            "--opt=add-hosts=h=::1,g=1.2.3.4", '--output=type=docker,"name=docker.io/library/a:1,b.c/d:2",dest=-']
        monkeypatch.setenv("BUILT", "1")
        ctr.on(" ".join(["images import", *ctr.local, "--digests --skip-digest-for-named --all-platforms -- -"]), stderr="ctr: unrecognized image format", status=1)
        assert run(*words)[::2][0] == 1 and "exit status 1" in run(*words)[2]
        (tmp_path / "buildctl").unlink()
        monkeypatch.setenv("PATH", str(tmp_path))
        assert isinstance(error(run(*words)), nerdctld.Unavailable)

    def test_daemon_takes_it_by_itself(self, ctr, monkeypatch, capfd):
        monkeypatch.setenv("PATH", "/nowhere")
        assert nerdctld.nerdctl_command() == ["nerdctl"]
        monkeypatch.setenv("PATH", str(ctr.folder))
        command = nerdctld.nerdctl_command()
        assert capfd.readouterr()[1].count("warning: nerdctl is not installed") == 1
        assert command[0] == sys.executable and command[-1] == "nerdctl" and nerdctld.Nerdctl(command).local
        done = subprocess.run([*command, f"--address={ctr.program}", "images", "--format", JSON], stdout=subprocess.PIPE, timeout=30)
        assert len(done.stdout.splitlines()) == 2
        (ctr.folder / "nerdctl").symlink_to(ctr.program)
        assert nerdctld.nerdctl_command() == ["nerdctl"]

    def test_k3s(self, tmp_path, monkeypatch):
        (tmp_path / "k3s").write_text("")
        (tmp_path / "k3s").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert nerdctld.find_ctr() == ["k3s", "ctr"]
        assert nerdctld.Ctr(["k3s", "ctr"], "k8s.io", "", "").command == ["k3s", "ctr", "--namespace=k8s.io"]


def programs():
    """What the live tests run over: nerdctl, and every version of ctr on PATH (ctr, k3s's, and Debian's own beside it)."""
    found = {"nerdctl": "nerdctl"} if shutil.which("nerdctl") else {}
    for path in dict.fromkeys([shutil.which("ctr"), "/usr/bin/ctr"]):
        if path and os.path.exists(path):
            version = subprocess.run([path, "--version"], stdout=subprocess.PIPE, timeout=10).stdout.decode().split()[-1]
            found.setdefault("ctr " + version, f"{sys.executable} -IS {HERE / 'nerdctld.py'} nerdctl --ctr={path}")
    return found


PROGRAMS = programs()
REGISTRY = "localhost:5000"


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
        if not answers(*REGISTRY.split(":")):
            pytest.skip(f"needs a registry on {REGISTRY}")
        name = f"{REGISTRY}/nerdctld-test/hello:{os.getpid()}"
        docker("tag", "hello:1", name)
        digest = re.search(r"digest: (sha256:[0-9a-f]{64}) size: \d+", docker("push", name)).group(1)
        docker("rmi", name)
        told = docker("pull", name)
        assert f"Digest: {digest}\n" in told and f"Status: Downloaded newer image for {name}" in told
        assert "Image is up to date" in docker("pull", name)
        assert f"{name.rpartition(':')[0]}@{digest}" in docker.json("image", "inspect", name)[0]["RepoDigests"]
        docker("rmi", name)
        assert "not found" in docker("pull", f"{REGISTRY}/nerdctld-test/nope:1", status=1)
        assert "does not exist locally" in docker("push", f"{REGISTRY}/nerdctld-test/nope:1", status=1)

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
