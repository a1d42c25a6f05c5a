# SPDX-License-Identifier: Apache-2.0
"""Tests of the container side of nerdctld.py, in the order of its sections: to be merged into test_nerdctld.py."""

import base64
import bz2
import fcntl
import gzip
import io
import json
import lzma
import os
import re
import select
import socket
import stat
import struct
import tarfile
import termios
import threading
import time

import pytest

import nerdctld
from test_nerdctld import BASE, HERE, ID, ask, engine, fatal, furnished, scripted, until  # noqa: F401

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
        return nerdctld.Container({"ID": "f" * 64, "Names": "other"}, {nerdctld.LABEL_ID: "e" * 64})

    words, _ = nerdctld.create_args({**BODY, **body}, image or {}, networks, find)
    return [each for each in words if each != "--network=bridge"]


def host(**fields):
    """A create request with these fields in HostConfig."""
    return {"HostConfig": fields}


class TestContainerCreate:
    FIELDS = [
        ({"Domainname": "d.test"}, "--domainname=d.test"), ({"User": "1:2"}, "--user=1:2"), ({"Tty": True}, "--tty"), ({"OpenStdin": True}, "--interactive"),
        ({"StopSignal": "SIGINT"}, "--stop-signal=SIGINT"), ({"WorkingDir": "/w"}, "--workdir=/w"), ({"Hostname": "h"}, "--hostname=h"),
        ({"StopTimeout": 0}, "--stop-timeout=0"), ({"Env": ["A=b c", "B="]}, "--env=A=b c", "--env=B="), ({"Labels": {"k": "v,w"}}, "--label=k=v,w"),
        ({"Volumes": {"/v": {}}}, "--volume=/v"), ({"Entrypoint": ["a"]}, "--entrypoint=a"),
        (host(VolumesFrom=["x:ro"]), "--volumes-from=x:ro"), (host(CapAdd=["NET_ADMIN"]), "--cap-add=NET_ADMIN"), (host(CapDrop=["ALL"]), "--cap-drop=ALL"),
        (host(CgroupnsMode="host"), "--cgroupns=host"), (host(Dns=["1.1.1.1"]), "--dns=1.1.1.1"), (host(DnsOptions=["a:1"]), "--dns-option=a:1"),
        (host(DnsSearch=["x.test"]), "--dns-search=x.test"), (host(ExtraHosts=["a:1.2.3.4"]), "--add-host=a:1.2.3.4"), (host(GroupAdd=["5"]), "--group-add=5"),
        (host(UTSMode="host"), "--uts=host"), (host(OomScoreAdj=-5), "--oom-score-adj=-5"), (host(Privileged=True), "--privileged"),
        (host(ReadonlyRootfs=True), "--read-only"), (host(Runtime="runc"), "--runtime=runc"), (host(SecurityOpt=["a=b,c"]), "--security-opt=a=b,c"),
        (host(UsernsMode="host"), "--userns=host"), (host(ShmSize=64), "--shm-size=64"), (host(Sysctls={"a.b": "1"}), "--sysctl=a.b=1"),
        (host(Annotations={"a": "b"}), "--annotation=a=b"), (host(CgroupParent="/p"), "--cgroup-parent=/p"), (host(CpuShares=5), "--cpu-shares=5"),
        (host(CpuPeriod=5), "--cpu-period=5"), (host(CpuQuota=5), "--cpu-quota=5"), (host(CpuRealtimePeriod=5), "--cpu-rt-period=5"),
        (host(CpuRealtimeRuntime=5), "--cpu-rt-runtime=5"), (host(CpusetCpus="0-1"), "--cpuset-cpus=0-1"), (host(CpusetMems="0"), "--cpuset-mems=0"),
        (host(Memory=5), "--memory=5"), (host(MemoryReservation=5), "--memory-reservation=5"), (host(MemorySwap=-1), "--memory-swap=-1"),
        (host(KernelMemory=5), "--kernel-memory=5"), (host(OomKillDisable=True), "--oom-kill-disable"), (host(PidsLimit=5), "--pids-limit=5"),
        (host(BlkioWeight=5), "--blkio-weight=5"), (host(Init=True), "--init"), (host(NanoCpus=1500000000), "--cpus=1.5"),
        (host(MemorySwappiness=0), "--memory-swappiness=0"), (host(MemorySwappiness=-1),),
        (host(PidMode="host"), "--pid=host"), (host(IpcMode="container:other"), "--ipc=container:" + "f" * 64),
        (host(LogConfig={"Type": "journald", "Config": {"tag": "x"}}), "--log-driver=journald", "--log-opt=tag=x"),
        (host(LogConfig={"Type": "local", "Config": {"max-size": "1m"}}), "--log-opt=max-size=1m"), (host(Tmpfs={"/t": "size=1", "/u": ""}), "--tmpfs=/t:size=1", "--tmpfs=/u"),
        (host(Ulimits=[{"Name": "nofile", "Soft": 1, "Hard": -1}]), "--ulimit=nofile=1:-1"),
        (host(Devices=[{"PathOnHost": "/dev/a", "PathInContainer": "/dev/b", "CgroupPermissions": "rwm"}]), "--device=/dev/a:/dev/b:rwm"),
        (host(DeviceRequests=[{"Count": -1, "Capabilities": [["gpu"]]}]), "--gpus=all"), (host(DeviceRequests=[{"Count": 2}]), "--gpus=2"),
        (host(DeviceRequests=[{"DeviceIDs": ["0", "1"]}]), '--gpus="device=0,1"'), (host(DeviceRequests=[{"Driver": "cdi", "DeviceIDs": ["v/c=x"]}]), "--device=v/c=x"),
        (host(BlkioDeviceReadBps=[{"Path": "/dev/a", "Rate": 5}]), "--device-read-bps=/dev/a:5"), (host(BlkioWeightDevice=[{"Path": "/dev/a", "Weight": 5}]), "--blkio-weight-device=/dev/a:5"),
        (host(RestartPolicy={"Name": "always"}), "--restart=always"), (host(RestartPolicy={"Name": "on-failure", "MaximumRetryCount": 3}), "--restart=on-failure:3"),
        (host(RestartPolicy={"Name": "no"}),), ({"Env": ["PATH", "=x"]},),
    ]

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
        body = {"Volumes": {"/b": {}, "/c": {}}, **host(Binds=["/a:/b:ro,cached,z", "v:/d:nocopy"], Mounts=[{"Type": "volume", "Source": "v", "Target": "/c"}])}
        assert words_of(body) == ["--volume=/a:/b:ro,z", "--volume=v:/d", "--mount=type=volume,target=/c,source=v"]

    def test_health(self):
        check = {"Test": ["CMD", "a", "b c"], "Interval": 10**9, "Timeout": 2 * 10**9, "StartPeriod": 10**6, "Retries": 4}
        words = ["--health-cmd=a 'b c'", "--health-interval=1000000000ns", "--health-timeout=2000000000ns", "--health-start-period=1000000ns", "--health-retries=4"]
        assert words_of({"Healthcheck": check}) == words == words_of({}, {"Healthcheck": check})
        assert words_of({"Healthcheck": {"Test": ["CMD-SHELL", "a | b"]}}) == ["--health-cmd=a | b"]
        assert words_of({"Healthcheck": {"Test": ["NONE"]}}, {"Healthcheck": check}) == ["--no-healthcheck"]
        assert words_of({"Healthcheck": {"Retries": 9}}, {"Healthcheck": check})[-1] == "--health-retries=9"

    @pytest.mark.parametrize("body, words", [
        (host(NetworkMode="one"), ["--network=one"]), (host(NetworkMode="1" * 64), ["--network=one"]), (host(NetworkMode="default"), []), (host(NetworkMode="none"), ["--network=none"]),
        (host(NetworkMode="container:other"), ["--network=container:" + "f" * 64]), ({"NetworkDisabled": True}, ["--network=none"]),
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
        (host(NetworkMode="nosuch"), "network nosuch not found"), ({"Labels": {"nerdctl/x": "y"}}, "nerdctl's own"), ({"Healthcheck": {"Test": ["ODD"]}}, "unknown health check type"),
        ({"Healthcheck": {"Test": ["CMD", "a"], "Interval": 5}}, "cannot be less than 1ms"), ({"Healthcheck": {"Test": ["CMD", "a"], "Retries": -1}}, "negative"), ({"Volumes": {"v": {}}}, "absolute"),
        ({"Env": ["A=\0"]}, "NUL")])
    def test_refused(self, furnished, scripted, body, message):
        scripted.on("create", stdout="9" * 64 + "\n")
        answer = ask(furnished, "POST", "/containers/create", {**BODY, **body})
        assert answer.status == 400 and message in answer.message
        assert not scripted.calls("create")

    @pytest.mark.parametrize("body", [host(Mounts=[{"Type": "image", "Source": "x", "Target": "/t"}]), host(Mounts=[{"Type": "volume", "Source": "v", "Target": "/t", "VolumeOptions": {"Subpath": "s"}}])])
    def test_beyond_nerdctl(self, furnished, body):
        assert ask(furnished, "POST", "/containers/create", {**BODY, **body}).status == 501

    def test_create(self, furnished, scripted):
        scripted.on("create", stdout="9" * 64 + "\n")
        answer = ask(furnished, "POST", "/containers/create?name=/new&Image=ignored&Cmd=sh&Cmd=-c", {**BODY, "Labels": {"a": "b"}, "Env": []})
        assert (answer.status, answer.json) == (201, {"Id": "9" * 64, "Warnings": []})
        request = {"Image": BASE, "Cmd": ["true"], "Labels": {"a": "b"}, "Env": []}
        words = scripted.argv("create")
        kept = [each for each in words if each.startswith("--label=nerdctld/request.0=")]
        assert json.loads(kept[0].partition("=")[2].partition("=")[2]) == request
        assert words == ["create", "--pull=never", "--name=new", "--network=bridge", "--label=a=b", *kept, "--", BASE, "true"]

    def test_words_of_a_user_are_no_flags(self, furnished, scripted):
        scripted.on("create", stdout="9" * 64 + "\n")
        assert ask(furnished, "POST", "/containers/create", {"Image": BASE, "Cmd": ["--rm", "-x"]}).status == 201
        words = scripted.argv("create")
        assert words[words.index("--"):] == ["--", BASE, "--rm", "-x"]

    def test_platform(self, furnished, scripted):
        scripted.on("create", stdout="9" * 64 + "\n")
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

    def test_no_command(self, furnished, monkeypatch):
        group = furnished.snapshot.image(BASE)
        monkeypatch.setattr(furnished.snapshot, "image", lambda name: group)
        monkeypatch.setitem(group.config["config"], "Cmd", None)
        answer = ask(furnished, "POST", "/containers/create", {"Image": BASE})
        assert (answer.status, answer.message) == (400, "no command specified")

    @pytest.mark.parametrize("message, status", [("bind for :80 failed: port is already allocated", 500), ('name "x" is already used by ID "y"', 409), ('image not available: "x"', 404),
                                                 ("unknown flag: --odd", 400)])
    def test_nerdctl_refuses(self, furnished, scripted, message, status):
        scripted.on("create", stderr=fatal(message), status=1)
        assert ask(furnished, "POST", "/containers/create", BODY).status == status

    @pytest.mark.parametrize("body, words", [
        (host(DeviceCgroupRules=["a"]), "DeviceCgroupRules is not carried out"), (host(StorageOpt={"size": "1"}), "StorageOpt"), (host(LogConfig={"Type": "local"}), "json-file is used"),
        ({"Healthcheck": {"StartInterval": 10**9}}, "StartInterval"),
        ({"NetworkingConfig": {"EndpointsConfig": {"one": {"IPAMConfig": {"IPv4Address": "1.2.3.4"}}, "two": {}}}}, "several networks")])
    def test_warnings(self, body, words):
        found, = nerdctld.create_warnings(body)
        assert words in found

    def test_hidden_labels(self):
        labels = {"a": "b", "nerdctl/x": "1", **nerdctld.request_labels({"Image": "x"}), nerdctld.LABEL_ID: "e" * 64, "containerd.io/restart.policy": "no"}
        container = nerdctld.Container({"ID": "f" * 64}, labels)
        assert container.visible_labels == {"a": "b"} and (container.id, container.real) == ("e" * 64, "f" * 64)


###############################################################################
# Sessions
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
        part = sock.recv(65536)
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


class TestSessions:
    FATAL = b'time="2026-11-24T00:00:00Z" level=fatal msg="exec failed with exit code 3"\n'

    @pytest.mark.parametrize("text", [b"", b"out\n", b"no line end", b'time="x" level=fatal msg="of the program"\nmore\n', b'time="', b'a time="b" c\n', b'time="x" level=info msg=y\n'])
    def test_trailing_error_is_kept_back_on_all_splits(self, text):
        whole = text + self.FATAL
        for first in range(len(whole) + 1):
            for second in {first, (first + len(whole)) // 2, len(whole)}:
                trailing = nerdctld.TrailingError()
                parts = b"".join(trailing.feed(each) for each in (whole[:first], whole[first:second], whole[second:]) if each)
                rest, message = trailing.finish(True)
                assert (parts + rest, message) == (text, "exec failed with exit code 3"), (first, second)

    @pytest.mark.parametrize("text", [b"a\n" + FATAL, FATAL + b"b", b'time="', b'time="x" level=fatal', b"", FATAL[:-1]])
    def test_nothing_is_kept_back_of_a_success(self, text):
        trailing = nerdctld.TrailingError()
        parts = b"".join(trailing.feed(text[each:each + 1]) for each in range(len(text)))
        assert parts + trailing.finish(False)[0] == text

    def test_what_cannot_be_the_line_goes_at_once(self):
        trailing = nerdctld.TrailingError()
        assert trailing.feed(b"prompt> ") == b"prompt> "
        assert trailing.feed(b'time="x" level=info msg=y\n') == b'time="x" level=info msg=y\n'
        assert trailing.feed(b'time="' + b"x" * 9000) == b'time="' + b"x" * 9000

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
        assert file.lines() == [nerdctld.LogLine(1795478407500000000, nerdctld.STDERR, "é\n".encode())]
        assert self.texts(file) == []
        with open(path, "a") as more:
            more.write(line[20:] + "no json\n" + self.log_line("b\n"))
        assert self.texts(file) == ["é\n".encode(), b"b\n"]
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
        stat_of = os.stat

        def late(name, *more, **options):
            if path.exists() and not (tmp_path / "log.1").exists():
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

    def test_terminal(self):
        terminal = nerdctld.Terminal(24, 80)
        try:
            assert struct.unpack("HHHH", fcntl.ioctl(terminal.slave, termios.TIOCGWINSZ, bytes(8)))[:2] == (24, 80)
            terminal.resize(50, 132)
            assert struct.unpack("HHHH", fcntl.ioctl(terminal.slave, termios.TIOCGWINSZ, bytes(8)))[:2] == (50, 132)
            os.write(terminal.slave, b"a\nb")
            assert os.read(terminal.master, 10) == b"a\nb"
            os.write(terminal.master, b"\x03x\n")
            assert os.read(terminal.slave, 10) == b"\x03x\n"
        finally:
            os.close(terminal.master)
            os.close(terminal.slave)

    def session(self, script, stdin=False, attachments=(), **options):
        """A session over a shell script, with an end that is waited for."""
        ends = []
        session = nerdctld.Session(attachments, on_end=lambda *end: ends.append(end), **options)
        session.run(nerdctld.Nerdctl(["/bin/sh", "-c", script, "sh"]), [], stdin=stdin, lasting=False)
        return session, ends

    def attached(self, **options):
        connection, far = pair()
        attachment = nerdctld.Attachment(True, True, True, **options)
        attachment.connect(connection)
        return attachment, connection, far

    def test_streams_in_frames(self):
        attachment, connection, far = self.attached()
        session, ends = self.session("printf out; sleep 0.2; printf err >&2; sleep 0.2; echo 'time=\"x\" level=fatal msg=\"1 errors:\"' >&2; exit 1", attachments=[attachment])
        assert session.ended.wait(10) and attachment.done.is_set()
        connection.sock.close()
        assert unframe(drain(far)) == [(1, b"out"), (2, b"err")] and ends == [(1, "1 errors:")]

    def test_input_and_its_end(self):
        attachment, connection, far = self.attached(stdin=True)
        session, ends = self.session("cat; exit 7", stdin=True, attachments=[attachment])
        far.sendall(b"x" * 300000)
        far.shutdown(socket.SHUT_WR)
        data = []
        reader = threading.Thread(target=lambda: data.append(drain(far)))
        reader.start()
        assert nerdctld.pump_stdin(attachment, session, None) is False
        assert session.ended.wait(10)
        connection.sock.close()
        reader.join(10)
        assert unframe(data[0]) == [(1, b"x" * 300000)] and ends[0][0] == 7

    def test_input_that_is_opened_more_than_once(self):
        first, second = self.attached(stdin=True), self.attached(stdin=True)
        session, _ = self.session("head -n 1", stdin=True, attachments=[first[0], second[0]], once=False)
        first[2].shutdown(socket.SHUT_WR)
        assert nerdctld.pump_stdin(first[0], session, None) is False
        assert not session.ended.wait(0.3)
        second[2].sendall(b"line\n")
        second[2].shutdown(socket.SHUT_WR)
        nerdctld.pump_stdin(second[0], session, None)
        assert session.ended.wait(10)
        for each in (first, second):
            each[1].sock.close()
            assert unframe(drain(each[2])) == [(1, b"line\n")]

    def test_a_client_that_left_does_not_stop_the_others(self):
        first, second = self.attached(), self.attached()
        first[2].close()
        session, _ = self.session("for each in 1 2 3 4; do echo $each; sleep 0.1; done", attachments=[first[0], second[0]])
        assert session.ended.wait(10) and first[0].gone
        second[1].sock.close()
        assert unframe(drain(second[2])) == [(1, b"1\n2\n3\n4\n")]

    def test_joining_an_ended_one(self):
        session, _ = self.session("true")
        assert session.ended.wait(10)
        assert session.join(self.attached()[0]) is False

    def test_terminal_of_a_session(self):
        attachment, connection, far = self.attached(stdin=True)
        attachment.framed = False
        session, ends = self.session("stty -echo 2>/dev/null; read line; stty size; echo got $line; exit 4", stdin=True, attachments=[attachment], terminal=nerdctld.Terminal(33, 99))
        far.sendall(b"abc\n")
        threading.Thread(target=nerdctld.pump_stdin, args=(attachment, session, None), daemon=True).start()
        assert session.ended.wait(10) and ends[0][0] == 4
        connection.sock.close()
        assert b"33 99" in drain(far)


###############################################################################
# Container lifecycle
###############################################################################

NAMES = ("start", "stop", "restart", "kill", "pause", "unpause", "rename", "update", "rm", "top", "diff")


def identity(engine, name):
    """The id of one of the recorded containers."""
    return engine.snapshot.container(name).id


@pytest.fixture
def willing(furnished, scripted):
    """The recorded containers, over a nerdctl that does as it is told."""
    for name in NAMES:
        scripted.on(name)
    return furnished


class TestContainerLifecycle:
    @pytest.mark.parametrize("method, path, status, words", [
        ("POST", "tstnew/start", 204, "start -- {id}"), ("POST", "tstweb/start", 304, ""), ("POST", "tstpaused/start", 409, ""), ("POST", "nosuch/start", 404, ""),
        ("POST", "tstweb/stop", 204, "stop -- {id}"), ("POST", "tstweb/stop?t=3&signal=int", 204, "stop --time=3 --signal=SIGINT -- {id}"), ("POST", "tstweb/stop?t=-1", 204, "stop --time=1000000 -- {id}"),
        ("POST", "tstweb/stop?t=0", 204, "stop --time=0 -- {id}"), ("POST", "tstdone/stop", 304, ""), ("POST", "tstnew/stop", 304, ""), ("POST", "tstweb/stop?t=x", 400, ""), ("POST", "nosuch/stop", 404, ""),
        ("POST", "tstweb/kill", 204, "kill --signal=SIGKILL -- {id}"), ("POST", "tstweb/kill?signal=USR1", 204, "kill --signal=SIGUSR1 -- {id}"), ("POST", "tstweb/kill?signal=10", 204, "kill --signal=10 -- {id}"),
        ("POST", "tstweb/kill?signal=nosuch", 400, ""), ("POST", "tstweb/kill?signal=0", 400, ""), ("POST", "tstweb/kill?signal=-9", 400, ""), ("POST", "tstweb/kill?signal=RTMIN%2B3", 204, "kill --signal=SIGRTMIN+3 -- {id}"),
        ("POST", "tstdone/kill", 409, ""), ("POST", "tstweb/pause", 204, "pause -- {id}"), ("POST", "tstpaused/pause", 409, ""), ("POST", "tstdone/pause", 409, ""),
        ("POST", "tstpaused/unpause", 204, "unpause -- {id}"), ("POST", "tstweb/unpause", 409, ""), ("POST", "tstweb/rename?name=other", 204, "rename -- {id} other"),
        ("POST", "tstweb/rename?name=/other", 204, "rename -- {id} other"), ("POST", "tstweb/rename?name=tstdone", 409, ""), ("POST", "tstweb/rename?name=", 400, ""), ("POST", "tstweb/rename?name=tstweb", 400, ""),
        ("POST", "tstweb/rename?name=-x", 400, ""), ("POST", "tstdone/restart?t=1", 204, "start -- {id}"), ("DELETE", "tstdone", 204, "rm -- {id}"), ("DELETE", "tstweb", 409, ""),
        ("DELETE", "tstpaused", 409, ""), ("DELETE", "tstweb?force=1&v=true", 204, "rm --force --volumes -- {id}"), ("DELETE", "nosuch?force=1", 404, ""), ("DELETE", "tstdone?link=1", 501, "")])
    def test_argv(self, willing, scripted, method, path, status, words):
        name = re.split("[/?]", path)[0]
        real = identity(willing, name) if name != "nosuch" else ""
        assert ask(willing, method, "/containers/" + path).status == status
        changes = [each["argv"] for each in scripted.calls() if each["argv"][0] in NAMES]
        assert changes[-1:] == ([words.format(id=real).split()] if words else [])

    def test_restart_of_a_running_one(self, willing, scripted):
        ask(willing, "POST", "/containers/tstweb/restart?t=1")
        assert [each["argv"][0] for each in scripted.calls() if each["argv"][0] in NAMES] == ["stop", "start"]
        assert scripted.argv("stop")[1] == "--time=1"

    @pytest.mark.parametrize("path, message", [
        ("POST tstdone/kill", "cannot kill container: tstdone: container {id} is not running"), ("POST tstdone/pause", "container {id} is not running"), ("POST tstpaused/pause", "container {id} is already paused"),
        ("DELETE tstweb", 'cannot remove container "/tstweb": container is running: stop the container before removing or force remove'),
        ("DELETE tstpaused", 'cannot remove container "/tstpaused": container is paused: unpause and then stop'), ("POST tstweb/kill?signal=x", "invalid signal: x"),
        ("POST tstweb/wait?condition=x", "invalid condition")])
    def test_words(self, willing, path, message):
        method, _, path = path.partition(" ")
        name = re.split("[/?]", path)[0]
        assert message.format(id=identity(willing, name)) in ask(willing, method, "/containers/" + path).message

    @pytest.mark.parametrize("message, status", [("executable file not found in $PATH", 400), ('exec: "/etc": permission denied', 400), ("bind for :80 failed: port is already allocated", 500), ("odd", 500)])
    def test_start_that_fails(self, willing, scripted, message, status):
        scripted.on("start", stderr=fatal(message), status=1)
        assert ask(willing, "POST", "/containers/tstnew/start").status == status

    def test_update(self, willing, scripted):
        real = identity(willing, "tstweb")
        answer = ask(willing, "POST", "/containers/tstweb/update", {"Memory": 64, "NanoCpus": 5 * 10**8, "RestartPolicy": {"Name": "no"}, "PidsLimit": 0, "BlkioDeviceReadBps": None})
        assert (answer.status, answer.json) == (200, {"Warnings": None})
        assert scripted.argv("update") == ["update", "--memory=64", "--cpus=0.5", "--restart=no", "--", real]
        assert ask(willing, "POST", "/containers/tstweb/update", {"RestartPolicy": {"Name": "odd"}}).status == 400

    def tell(self, engine, topic, real, **payload):
        engine.feed._tell(nerdctld.parse_event(json.dumps({"Timestamp": "2026-11-24T03:57:09.7Z", "Namespace": "default", "Topic": topic, "Event": json.dumps({"container_id": real, "id": real, **payload})}), "default"))

    def waiting(self, engine, target):
        """The answer of a wait that is under way, in a list; and its thread."""
        found = []
        thread = threading.Thread(target=lambda: found.append(ask(engine, "POST", target)), daemon=True)
        thread.start()
        return found, thread

    @pytest.mark.parametrize("query", ["", "?condition=not-running", "?condition=next-exit"])
    def test_wait_for_the_end(self, willing, query):
        real = identity(willing, "tstweb")
        found, thread = self.waiting(willing, "/containers/tstweb/wait" + query)
        time.sleep(0.3)
        self.tell(willing, "/tasks/exit", real, id="anexec", exit_status=1)
        time.sleep(0.2)
        assert not found
        self.tell(willing, "/tasks/exit", real, exit_status=9)
        thread.join(10)
        assert (found[0].status, found[0].json) == (200, {"StatusCode": 9})

    def test_wait_for_one_that_is_not_running(self, willing):
        assert ask(willing, "POST", "/containers/tstdone/wait").json == {"StatusCode": 3}
        assert ask(willing, "POST", "/containers/tstnew/wait", {"condition": ""}).json == {"StatusCode": 0}

    def test_next_exit_of_one_that_was_never_started(self, willing):
        real = identity(willing, "tstnew")
        found, thread = self.waiting(willing, "/containers/tstnew/wait?condition=next-exit")
        time.sleep(0.5)
        assert not found
        self.tell(willing, "/tasks/exit", real, exit_status=2)
        thread.join(10)
        assert found[0].json == {"StatusCode": 2}

    def test_wait_for_the_removal(self, willing, scripted):
        real = identity(willing, "tstweb")
        found, thread = self.waiting(willing, "/containers/tstweb/wait?condition=removed")
        time.sleep(0.3)
        self.tell(willing, "/tasks/exit", real, exit_status=5)
        time.sleep(0.3)
        assert not found
        scripted.on("ps")
        willing.snapshot.containers.remove(real)
        self.tell(willing, "/containers/delete", real)
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

    def test_listing_while_a_container_goes(self, willing, scripted):
        gone = f'container "{ID}" in namespace "default": not found'
        with pytest.raises(nerdctld.NotFound, match="No such container: " + ID):
            raise nerdctld.nerdctl_error(fatal(gone))
        answers = [nerdctld.NotFound("No such container: x"), [1]]

        def read():
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        assert nerdctld.steadily(read) == [1]


###############################################################################
# Streams
###############################################################################


def client_frame(payload, kind=2, mask=b"\1\2\3\4", final=0x80):
    """A WebSocket frame as clients send it."""
    size = len(payload)
    head = bytes([final | kind]) + (bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big") if size < 65536 else b"\xff" + size.to_bytes(8, "big"))
    return head + mask + bytes(each ^ mask[index % 4] for index, each in enumerate(payload))


class TestStreams:
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

    def test_logs_of_a_terminal(self, logged, monkeypatch):
        monkeypatch.setattr(nerdctld, "is_terminal", lambda *_: True)
        assert ask(logged, "GET", "/containers/tstdone/logs?stdout=1&stderr=1").body == b"a\nb\ncd\n"

    @pytest.mark.parametrize("query, status", [("", 400), ("stdout=0&stderr=0", 400), ("stdout=1&tail=x", 400), ("stdout=1&since=x", 400)])
    def test_logs_refuse(self, logged, query, status):
        assert ask(logged, "GET", "/containers/tstdone/logs?" + query).status == status
        assert ask(logged, "GET", "/containers/nosuch/logs?stdout=1").status == 404

    def test_details(self):
        request = {"Image": "x", "Env": ["E=1"], "HostConfig": {"LogConfig": {"Config": {"labels": "a,none", "env": "E"}}}}
        container = nerdctld.Container({"ID": "1" * 64}, {"a": "b c", **nerdctld.request_labels(request)})
        assert nerdctld.log_details(container) == b"E=1,a=b%20c "

    @pytest.mark.parametrize("path, status", [("tstpaused/attach?stream=1", 409), ("nosuch/attach?stream=1", 404), ("tstpaused/attach/ws?stream=1", 400), ("tstweb/attach/ws", 400), ("tstweb/resize?h=a&w=1", 400),
                                              ("tstdone/resize?h=1&w=1", 409), ("tstweb/resize?h=1&w=1", 200), ("tstweb/resize?h=70000&w=1", 400)])
    def test_answers(self, furnished, path, status):
        assert ask(furnished, "GET" if "/ws" in path else "POST", "/containers/" + path).status == status

    @pytest.mark.parametrize("tty, status, held, refused", [(False, "Up", False, True), (True, "Up", False, True), (True, "Up", True, False), (False, "Exited (0) 1 second ago", False, True),
                                                            (True, "Exited (0) 1 second ago", False, False), (False, "Created", False, False)])
    def test_input_out_of_reach(self, tty, status, held, refused):
        container = nerdctld.Container({"ID": "1" * 64, "Status": status}, nerdctld.request_labels({"OpenStdin": True}))
        if refused:
            with pytest.raises(nerdctld.NotImplementedHere):
                nerdctld.check_attach(container, True, tty, container.running, held)
        else:
            nerdctld.check_attach(container, True, tty, container.running, held)
        nerdctld.check_attach(container, False, tty, container.running, held)

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
        sender = threading.Thread(target=sock.send, args=(payload[:1], payload[1:]))
        sender.start()
        data = b""
        while len(data) < size + (2 if size < 126 else 4 if size < 65536 else 10):
            data += far.recv(65536)
        sender.join(5)
        assert data[0] == 0x82 and data[-size:] == payload
        assert data[1] == (size if size < 126 else 126 if size < 65536 else 127)

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
        assert sock.recv() == b"" and sock.closed
        sock.sock.close()
        assert drain(far) in (b"", b"\x88\x02\x03\xea")


###############################################################################
# Exec
###############################################################################


class TestExec:
    def create(self, engine, config, name="tstweb"):
        return ask(engine, "POST", f"/containers/{name}/exec", config)

    @pytest.mark.parametrize("config, words", [
        ({}, []), ({"AttachStdin": True, "Tty": True}, ["--interactive", "--tty"]), ({"User": "1", "WorkingDir": "/w"}, ["--user=1", "--workdir=/w"]), ({"Privileged": True}, ["--privileged"]),
        ({"Env": ["A=b", "PATH"]}, ["--env=A=b"])])
    def test_argv(self, furnished, config, words):
        instance = nerdctld.Exec(furnished.snapshot.container("tstweb"), {"Cmd": ["a", "--b"], **config})
        assert nerdctld.exec_args(instance) == ["exec", *words, "--", ID, "a", "--b"]

    @pytest.mark.parametrize("config, name, status, message", [
        ({"Cmd": []}, "tstweb", 400, "No exec command specified"), ({}, "tstweb", 400, "No exec command"), ({"Cmd": ["a"]}, "tstdone", 409, "is not running"), ({"Cmd": ["a"]}, "tstpaused", 409, "unpause the container before exec"),
        ({"Cmd": ["a"]}, "nosuch", 404, "No such container: nosuch"), ({"Cmd": ["a"], "DetachKeys": "zz"}, "tstweb", 400, "invalid detach keys"), ({"Cmd": ["a"], "Tty": 1}, "tstweb", 400, "Tty")])
    def test_refused(self, furnished, config, name, status, message):
        answer = self.create(furnished, config, name)
        assert answer.status == status and message in answer.message

    def test_inspect(self, furnished):
        name = self.create(furnished, {"Cmd": ["a", "b"], "User": "u", "AttachStdout": True, "Privileged": True}).json["Id"]
        told = ask(furnished, "GET", f"/exec/{name}/json").json
        assert (told["ID"], told["ContainerID"], told["Running"], told["ExitCode"], told["OpenStdout"]) == (name, ID, False, None, True)
        assert told["ProcessConfig"] == {"tty": False, "entrypoint": "a", "arguments": ["b"], "privileged": True, "user": "u"}

    @pytest.mark.parametrize("path", ["GET /exec/x/json", "POST /exec/x/start", "POST /exec/x/resize?h=1&w=1"])
    def test_none(self, furnished, path):
        answer = ask(furnished, *path.split())
        assert (answer.status, answer.message) == (404, "No such exec instance: x")

    def test_detached(self, furnished, scripted):
        scripted.on("exec", stderr=fatal("exec failed with exit code 4"), status=1)
        name = self.create(furnished, {"Cmd": ["a"], "AttachStdin": True}).json["Id"]
        assert ask(furnished, "POST", f"/exec/{name}/start", {"Detach": True}).status == 200
        assert scripted.argv("exec") == ["exec", "--", ID, "a"]
        told = ask(furnished, "GET", f"/exec/{name}/json").json
        assert (told["Running"], told["ExitCode"]) == (False, 4)
        answer = ask(furnished, "POST", f"/exec/{name}/start", {"Detach": True})
        assert (answer.status, answer.message) == (409, f"exec command {name} has already run")

    def test_detached_that_cannot_run(self, furnished, scripted):
        scripted.on("exec", stderr=fatal('exec: "nosuch": executable file not found in $PATH'), status=1)
        name = self.create(furnished, {"Cmd": ["nosuch"]}).json["Id"]
        assert ask(furnished, "POST", f"/exec/{name}/start", {"Detach": True}).status == 400
        assert ask(furnished, "GET", f"/exec/{name}/json").json["ExitCode"] == 127

    @pytest.mark.parametrize("message, code, told", [
        ("exec failed with exit code 42", 42, False), ('exec: "x": executable file not found in $PATH', 127, True), ("stat /x: no such file or directory", 127, True), ("permission denied", 126, True), ("odd", 126, True), ("", 1, False)])
    def test_exit_status(self, message, code, told):
        assert nerdctld.exec_failure(message) == (code, message if told else "")

    def test_user_that_is_not_there(self, furnished, monkeypatch):
        furnished.snapshot.detail(furnished.snapshot.container("tstweb"))
        monkeypatch.setattr(furnished.snapshot, "detail", lambda container: {"Task": {"Pid": os.getpid()}})
        nerdctld.check_user(furnished, None, "root")
        nerdctld.check_user(furnished, None, "12345:6")
        with pytest.raises(nerdctld.BadParameter, match="unable to find user nosuchuser: no matching entries in passwd file"):
            nerdctld.check_user(furnished, None, "nosuchuser:x")

    def test_old_ones_are_forgotten(self, furnished, scripted, monkeypatch):
        monkeypatch.setattr(nerdctld, "EXECS_KEPT", 3)
        scripted.on("exec")
        for _ in range(6):
            name = self.create(furnished, {"Cmd": ["a"]}).json["Id"]
            ask(furnished, "POST", f"/exec/{name}/start", {"Detach": True})
        assert len(furnished.execs) <= 4 and name in furnished.execs


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


class TestArchive:
    @pytest.mark.parametrize("mode, told", [
        (stat.S_IFREG | 0o644, 0o644), (stat.S_IFDIR | 0o1777, 1 << 31 | 1 << 20 | 0o777), (stat.S_IFLNK | 0o777, 1 << 27 | 0o777), (stat.S_IFIFO | 0o600, 1 << 25 | 0o600), (stat.S_IFSOCK, 1 << 24),
        (stat.S_IFBLK, 1 << 26), (stat.S_IFCHR, 1 << 26 | 1 << 21), (stat.S_IFREG | 0o6755, 1 << 23 | 1 << 22 | 0o755)])
    def test_modes(self, mode, told):
        assert nerdctld.go_mode(mode) == told

    @pytest.mark.parametrize("path, name, size, mode, target", [
        ("/etc/file", "file", 5, 1 << 23 | 0o751, ""), ("etc/file", "file", 5, 1 << 23 | 0o751, ""), ("/abs/file", "file", 5, 1 << 23 | 0o751, ""), ("/rel", "rel", 8, 1 << 27 | 0o777, "/etc/file"),
        ("/etc/up", "up", 10, 1 << 27 | 0o777, "/etc/sub"), ("/out", "out", 15, 1 << 27 | 0o777, "/secret"), ("/dangling", "dangling", 7, 1 << 27 | 0o777, "/nowhere"), ("/fifo", "fifo", 0, 1 << 25, ""),
        ("/abs/../etc/./file", "file", 5, 1 << 23 | 0o751, ""), ("/../../etc/file", "file", 5, 1 << 23 | 0o751, "")])
    def test_stat(self, rooted, path, name, size, mode, target):
        answer = ask(rooted, "HEAD", "/containers/tstweb/archive?path=" + path)
        told = told_stat(answer)
        assert (answer.status, told["name"], told["size"], told["linkTarget"]) == (200, name, size, target)
        assert told["mode"] & ~0o777 == mode & ~0o777 and (target or name == "fifo" or told["mode"] == mode)

    @pytest.mark.parametrize("path, status", [("/no", 404), ("/etc/no/x", 404), ("/etc/file/x", 404), ("/dangling/x", 404), ("/out/", 404), ("/loop/x", 400), ("", 400), ("a%00b", 400), ("/out/x", 404)])
    def test_no_stat(self, rooted, path, status):
        assert ask(rooted, "HEAD", "/containers/tstweb/archive?path=" + path).status == status

    def test_folders_behind_links(self, rooted):
        for path in ("/", "/abs/", "/deep/", "/etc/up/"):
            assert told_stat(ask(rooted, "HEAD", "/containers/tstweb/archive?path=" + path))["mode"] & 1 << 31, path

    def test_a_link_never_leads_out(self, rooted, tmp_path):
        with pytest.raises(OSError):
            nerdctld.stat_below(str(tmp_path / "root"), "/out/")

    def test_get(self, rooted, scripted):
        scripted.on("cp", stdout=tar_with("etc/", "etc/file").decode())
        answer = ask(rooted, "GET", "/containers/tstweb/archive?path=/etc")
        assert answer.status == 200 and names_of(answer.body) == ["etc", "etc/file"] and told_stat(answer)["name"] == "etc"
        assert scripted.argv("cp") == ["cp", "--", ID + ":/etc", "-"]

    def test_get_of_a_link(self, rooted, scripted):
        answer = ask(rooted, "GET", "/containers/tstweb/archive?path=/rel")
        with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
            entry, = tar.getmembers()
        assert (entry.name, entry.linkname, entry.issym()) == ("rel", "etc/file", True) and not scripted.calls("cp")

    @pytest.mark.parametrize("path, came, names", [("/", ["./", "./etc/", "./etc/file"], ["/", "/etc", "/etc/file"]), ("/abs/", ["etc/", "etc/file"], ["abs", "abs/file"]), ("/etc/.", ["./", "./file"], [".", "./file"])])
    def test_names_are_those_that_were_asked_for(self, rooted, scripted, path, came, names):
        scripted.on("cp", stdout=tar_with(*came).decode())
        answer = ask(rooted, "GET", "/containers/tstweb/archive?path=" + path)
        assert names_of(answer.body) == names
        assert scripted.argv("cp")[2] == ID + ":" + (path if path != "/" else "/.")

    def test_content_of_a_renamed_archive(self, rooted, scripted):
        scripted.on("cp", stdout=tar_with("etc/", "etc/" + "long" * 40, link=("etc/l", "x")).decode())
        answer = ask(rooted, "GET", "/containers/tstweb/archive?path=/abs/")
        with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
            assert tar.extractfile("abs/" + "long" * 40).read() == b"etc/" + b"long" * 40
            assert tar.getmember("abs/l").linkname == "x"
        assert len(answer.body) % 512 == 0

    def test_of_one_that_does_not_run(self, furnished, scripted):
        real = identity(furnished, "tstdone")
        scripted.on("cp", stdout=tar_with("file").decode())
        told = told_stat(ask(furnished, "HEAD", "/containers/tstdone/archive?path=/etc/file"))
        assert (told["name"], told["size"], told["mode"]) == ("file", 4, 0o644)
        assert scripted.argv("cp") == ["cp", "--", real + ":/etc/file", "-"]

    def test_link_of_one_that_does_not_run(self, furnished, scripted):
        real = identity(furnished, "tstdone")
        scripted.on("cp", stdout=tar_with("busybox").decode())
        scripted.on(["cp", "--", real + ":/bin/."], stdout=tar_with("./", "./busybox", link=("./sh", "busybox")).decode())
        answer = ask(furnished, "HEAD", "/containers/tstdone/archive?path=/bin/sh")
        told = told_stat(answer)
        assert (told["name"], told["linkTarget"], told["mode"] & 1 << 27) == ("sh", "/bin/busybox", 1 << 27)
        assert names_of(ask(furnished, "GET", "/containers/tstdone/archive?path=/bin/sh").body) == ["sh"]

    def test_none_of_one_that_does_not_run(self, furnished, scripted):
        scripted.on("cp", stderr=fatal("unable to copy: source does not exist"), status=1)
        real = identity(furnished, "tstdone")
        answer = ask(furnished, "GET", "/containers/tstdone/archive?path=/no")
        assert (answer.status, answer.message) == (404, f"Could not find the file /no in container {real}")

    @pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
    def test_put(self, rooted, scripted, pack):
        scripted.on("cp", reads=True)
        data = tar_with("some-name")
        assert ask(rooted, "PUT", "/containers/tstweb/archive?path=/etc&noOverwriteDirNonDir=true", pack(data)).status == 200
        call = scripted.calls("cp")[-1]
        assert call["argv"] == ["cp", "--", "-", ID + ":/etc"] and call["stdin"] == len(data) and call["text"].startswith("some-name\0")

    def test_put_of_nothing(self, rooted, scripted):
        scripted.on("cp", reads=True)
        assert ask(rooted, "PUT", "/containers/tstweb/archive?path=/etc", b"").status == 200
        assert scripted.calls("cp")[-1]["stdin"] == 1024

    @pytest.mark.parametrize("body", [b"\x1f\x8b" + bytes(100), b"BZh9" + bytes(100), b"\xfd7zXZ" + bytes(100)])
    def test_put_of_what_is_broken(self, rooted, scripted, body):
        scripted.on("cp", reads=True)
        assert ask(rooted, "PUT", "/containers/tstweb/archive?path=/etc", body).status == 400

    @pytest.mark.parametrize("path, status, message", [("/etc/file", 404, "Could not find the file /etc/file in container"), ("/no", 404, "Could not find the file /no in container"), ("", 400, "path cannot be empty")])
    def test_put_refuses(self, rooted, path, status, message):
        answer = ask(rooted, "PUT", "/containers/tstweb/archive?path=" + path, tar_with("x"))
        assert answer.status in (status, 400) and (answer.status == 400 or message in answer.message)

    def test_changes(self, furnished, scripted):
        scripted.on("diff", stdout="C /\nA /dev\nC /etc\nA /etc/hosts\nC /tmp\nA /tmp/d\nC /tmp/d\nA /tmp/a b\nD /bin/vi\n\n")
        assert ask(furnished, "GET", "/containers/tstweb/changes").json == [
            {"Path": "/bin/vi", "Kind": 2}, {"Path": "/tmp", "Kind": 0}, {"Path": "/tmp/a b", "Kind": 1}, {"Path": "/tmp/d", "Kind": 1}]
        scripted.on("diff", stdout="C /etc\nA /etc/x\n")
        assert [each["Path"] for each in ask(furnished, "GET", "/containers/tstweb/changes").json] == ["/etc", "/etc/x"]
        scripted.on("diff")
        assert ask(furnished, "GET", "/containers/tstweb/changes").body == b"null\n"

    def test_export(self, furnished, scripted):
        scripted.on("export", stdout="a tar")
        assert ask(furnished, "GET", "/containers/tstdone/export").body == b"a tar"
        assert scripted.argv("export") == ["export", "--", identity(furnished, "tstdone")]


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
        one = {"cpuacct": folder_of(tmp_path / "1", cpuacct__usage="5000\n", cpuacct__stat="user 3\nsystem 4\n", cpu__stat="nr_periods 7\nnr_throttled 2\nthrottled_time 9\n")}
        two = {"": folder_of(tmp_path / "2", cpu__stat="usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 7\nnr_throttled 2\nthrottled_usec 9\n")}
        tick = 10**9 // os.sysconf("SC_CLK_TCK")
        assert nerdctld.cpu_stats(one)["cpu_usage"] == {"total_usage": 5000, "usage_in_usermode": 3 * tick, "usage_in_kernelmode": 4 * tick}
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

    def test_top(self, furnished, scripted):
        scripted.on("top", stdout="PID CMD\n1 sleep 10\n22 sh -c a  b\n")
        assert ask(furnished, "GET", "/containers/tstweb/top?ps_args=-o pid,cmd").json == {"Titles": ["PID", "CMD"], "Processes": [["1", "sleep 10"], ["22", "sh -c a  b"]]}
        assert scripted.argv("top") == ["top", ID, "-o", "pid,cmd"]
        assert ask(furnished, "GET", "/containers/tstdone/top").status == 409
        assert ask(furnished, "GET", "/containers/tstweb/top?ps_args='").status == 400


###############################################################################
# Networks, volumes: made, connected, removed
###############################################################################


class TestNetworkChanges:
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

    def test_remove(self, furnished, scripted):
        assert ask(furnished, "DELETE", "/networks/bridge").message == "bridge is a pre-defined network and cannot be removed"
        answer = ask(furnished, "DELETE", "/networks/tstnet")
        assert answer.status == 403 and 'has active endpoints (name:"tstweb"' in answer.message
        assert ask(furnished, "DELETE", "/networks/nosuch").status == 404
        scripted.on("ps")
        scripted.on("network rm")
        assert ask(furnished, "DELETE", "/networks/tstnet").status == 204
        assert scripted.argv("network rm") == ["network", "rm", "--", "tstnet"]

    def test_prune(self, furnished, scripted):
        scripted.on("network rm")
        assert ask(furnished, "POST", "/networks/prune").json == {"NetworksDeleted": None}
        scripted.on("ps")
        assert ask(furnished, "POST", '/networks/prune?filters={"label":["x"]}').json == {"NetworksDeleted": None}
        assert ask(furnished, "POST", "/networks/prune").json == {"NetworksDeleted": ["tstnet"]}

    @pytest.mark.parametrize("path, body, status", [
        ("tstnet/connect", {"Container": "tstweb"}, 403), ("bridge/connect", {"Container": "tstweb"}, 501), ("bridge/connect", {"Container": "nosuch"}, 404), ("nosuch/connect", {"Container": "tstweb"}, 404),
        ("bridge/disconnect", {"Container": "tstweb"}, 403), ("tstnet/disconnect", {"Container": "tstweb"}, 501), ("bridge/connect", {"Container": "tstnew"}, 501), ("bridge/connect", {}, 400)])
    def test_connect_refuses(self, furnished, path, body, status):
        assert ask(furnished, "POST", "/networks/" + path, body).status == status

    def test_connect_makes_a_new_container(self, furnished, scripted):
        request = {"Image": BASE, "Cmd": ["true"], "HostConfig": {"NetworkMode": "bridge"}, "NetworkingConfig": {"EndpointsConfig": {"bridge": {}}}}
        labels = {"nerdctl/networks": '["bridge"]', **nerdctld.request_labels(request)}
        scripted.on("ps", stdout=json.dumps([{"ID": "5" * 64, "Names": "mine", "Image": BASE, "Status": "Created", "CreatedAt": "2026-11-24T00:00:00Z"}, labels]) + "\n")
        scripted.on("rm")
        scripted.on("create", stdout="6" * 64 + "\n")
        assert ask(furnished, "POST", "/networks/tstnet/connect", {"Container": "mine", "EndpointConfig": {"Aliases": ["other"]}}).status == 200
        words = scripted.argv("create")
        assert [each for each in words if each.startswith(("--network", "--name", "--hostname", "--label=nerdctld/id"))] == [
            "--name=mine", "--label=nerdctld/id=" + "5" * 64, "--hostname=other", "--network=bridge", "--network=tstnet"]
        assert scripted.argv("rm") == ["rm", "--volumes", "--", "5" * 64]


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

    def test_remove(self, furnished, scripted):
        answer = ask(furnished, "DELETE", "/volumes/tstvol")
        assert (answer.status, answer.message) == (409, f"remove tstvol: volume is in use - [{ID}]")
        assert ask(furnished, "DELETE", "/volumes/nosuch").status == 404
        assert ask(furnished, "DELETE", "/volumes/nosuch?force=1").status == 204
        scripted.on("ps")
        scripted.on("volume rm")
        assert ask(furnished, "DELETE", "/volumes/tstvol").status == 204
        assert scripted.argv("volume rm") == ["volume", "rm", "--", "tstvol"]

    @pytest.mark.parametrize("target, deleted", [
        ("/v1.50/volumes/prune", None), ('/v1.50/volumes/prune?filters={"all":["true"]}', ["tstvol"]), ("/v1.41/volumes/prune", ["tstvol"]), ('/v1.50/volumes/prune?filters={"all":["1"],"label":["x"]}', None)])
    def test_prune(self, furnished, scripted, target, deleted):
        scripted.on("volume rm")
        assert ask(furnished, "POST", target).json["VolumesDeleted"] is None
        scripted.on("ps")
        assert ask(furnished, "POST", target).json["VolumesDeleted"] == deleted
