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
