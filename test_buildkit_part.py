"""The sections gRPC, Relay and BuildKit: pure tests on bytes, and live ones with the stock clients."""

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import pytest

import nerdctld

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


def map_entry(number, key, value):
    """An entry of a map of strings in field `number`."""
    return nerdctld.field(number, nerdctld.field(1, key.encode()) + nerdctld.field(2, value.encode()))


def exporter(kind, *rest, **attributes):
    """An exporter of a SolveRequest, with `_` for the dashes of its attributes."""
    parts = [map_entry(2, key.replace("_", "-"), value) for key, value in attributes.items()]
    return nerdctld.field(1, kind.encode()) + b"".join(parts) + b"".join(rest)


def solve(*exporters, rest=b"", reference=b"abc123"):
    """A SolveRequest."""
    return nerdctld.field(1, reference) + rest + b"".join(nerdctld.field(13, each) for each in exporters)


def read_exporters(message):
    """What a SolveRequest asks for, as (kind, attributes)."""
    found = []
    for each in nerdctld.fields(message):
        if each.number == 13:
            parts = list(nerdctld.fields(each.value))
            found.append((next(part.value for part in parts if part.number == 1).decode(),
                          dict(nerdctld.read_entry(part.value) for part in parts if part.number == 2)))
    return found


def grpc(message):
    """A gRPC message, uncompressed."""
    return struct.pack(">BI", 0, len(message)) + message


def keep(message):
    """Lets every request through as it is."""
    return message, None


def rewrite(message):
    """The rewrite alone, without a look at the worker."""
    return nerdctld.rewrite_solve(message)[0], None


class Peer:
    """One end of an HTTP/2 connection that keeps to its windows strictly. `out` is what it has sent and nobody has taken."""

    def __init__(self, server, initial=65535):
        self.out = bytearray(b"" if server else nerdctld.PREFACE)
        self.frames = nerdctld.Frames(nerdctld.PREFACE if server else b"")
        self.server = server
        self.out += nerdctld.frame(nerdctld.SETTINGS, 0, 0, struct.pack(">HI", 4, initial) if server else b"")
        # What it may still send.
        self.connection, self.first, self.streams, self.waiting, self.ending = 65535, 65535, {}, {}, set()
        # What it may still receive.
        self.own, self.own_first, self.own_streams = 65535, initial, {}
        self.uncredited = {}
        self.received, self.ended, self.reset, self.heads = {}, set(), {}, {}

    def open(self, stream, data, end=True):
        """Begin a stream and send its data as windows allow."""
        self.out += nerdctld.header_frames(stream, [(":path", "/x")])
        self.streams[stream], self.waiting[stream] = self.first, bytearray(data)
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
                self.out += nerdctld.frame(nerdctld.DATA, 0, stream, bytes(data[:room]))
                del data[:room]
            if not data:
                del self.waiting[stream]
                if stream in self.ending:
                    self.out += nerdctld.frame(nerdctld.DATA, nerdctld.END_STREAM, stream)

    def change(self, initial):
        """Announce another first window."""
        self.own_streams = {stream: left + initial - self.own_first for stream, left in self.own_streams.items()}
        self.own_first = initial
        self.out += nerdctld.frame(nerdctld.SETTINGS, 0, 0, struct.pack(">HI", 4, initial))

    def credit(self):
        """Make room again for all that was received."""
        for stream, size in self.uncredited.items():
            self.own += size
            self.out += nerdctld.credit(0, size)
            if stream not in self.ended:
                self.own_streams[stream] += size
                self.out += nerdctld.credit(stream, size)
        self.uncredited = {}

    def feed(self, data):
        """Take bytes; a window that is not kept to fails the test."""
        for each in self.frames.feed(bytes(data)):
            payload = bytes(each.raw[9:])
            if each.kind == nerdctld.DATA:
                left = self.own_streams.setdefault(each.stream, self.own_first)
                assert len(payload) <= self.own and len(payload) <= max(left, 0), "sent beyond the window"
                self.own -= len(payload)
                self.own_streams[each.stream] -= len(payload)
                self.uncredited[each.stream] = self.uncredited.get(each.stream, 0) + len(payload)
                self.received.setdefault(each.stream, bytearray()).extend(payload)
            elif each.kind == nerdctld.HEADERS:
                self.own_streams.setdefault(each.stream, self.own_first)
                self.heads.setdefault(each.stream, []).append(payload)
            elif each.kind == nerdctld.WINDOW_UPDATE:
                if not each.stream:
                    self.connection += each.number
                elif each.stream in self.streams:
                    self.streams[each.stream] += each.number
            elif each.kind == nerdctld.SETTINGS and not each.flags & nerdctld.ACK:
                for key, value in struct.iter_unpack(">HI", payload):
                    if key == 4:
                        self.streams = {stream: left + value - self.first for stream, left in self.streams.items()}
                        self.first = value
                self.out += nerdctld.frame(nerdctld.SETTINGS, nerdctld.ACK, 0)
            elif each.kind == nerdctld.RESET:
                self.reset[each.stream] = int.from_bytes(payload, "big")
            if each.ends:
                self.ended.add(each.stream)
        self.push()

    def take(self):
        """What it has sent since the last time."""
        data = bytes(self.out)
        self.out.clear()
        return data


def settle(client, splice, server, credits=True, piece=5000, rounds=2000):
    """Carry bytes to and fro, in pieces, until nobody has any left; the server credits what it gets when `credits`."""
    def carry(data, to):
        for at in range(0, len(data), piece):
            to(data[at:at + piece])

    for _ in range(rounds):
        moved = False
        for source, to in ((client.take(), splice.from_client), (server.take(), splice.from_server),
                           (bytes(splice.to_client), client.feed), (bytes(splice.to_server), server.feed)):
            if source:
                moved = True
                if to == client.feed:
                    del splice.to_client[:len(source)]
                elif to == server.feed:
                    del splice.to_server[:len(source)]
                carry(source, to)
        if credits and server.uncredited:
            server.credit()
            moved = True
        if not moved:
            return
    raise AssertionError("bytes go round without an end")


class TestBuildKit:
    """gRPC, Relay and BuildKit on bytes."""

    @pytest.mark.parametrize("number, data", [(0, b"\0"), (1, b"\1"), (127, b"\x7f"), (128, b"\x80\1"), (300, b"\xac\2"),
                                              (2**64 - 1, b"\xff" * 9 + b"\1")])
    def test_varint(self, number, data):
        assert nerdctld.varint(number) == data
        assert nerdctld.read_varint(b"x" + data + b"y", 1) == (number, 1 + len(data))

    @pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 11])
    def test_varint_that_is_none(self, data):
        with pytest.raises(ValueError):
            nerdctld.read_varint(data, 0)

    def test_fields(self):
        data = b"\x08\x96\x01" + nerdctld.field(2, b"testing") + b"\x19" + b"8" * 8 + b"\x25" + b"4" * 4
        found = list(nerdctld.fields(data))
        assert [(each.number, each.value) for each in found] == [(1, 150), (2, b"testing"), (3, b"8" * 8), (4, b"4444")]
        assert b"".join(each.raw for each in found) == data
        assert [bytes(each.raw) for each in nerdctld.fields(memoryview(data))] == [each.raw for each in found]

    @pytest.mark.parametrize("data", [b"\x0a\x05abc", b"\x0b", b"\x00\x01", b"\x09abc", b"\x0a"])
    def test_fields_of_no_message(self, data):
        with pytest.raises(ValueError):
            list(nerdctld.fields(data))

    def test_frames_come_whole_from_any_pieces(self):
        data = nerdctld.PREFACE + nerdctld.frame(4, 0, 0) + nerdctld.header_frames(1, [("a", "b" * 40000)]) + nerdctld.frame(0, 1, 1, b"xyz")
        for size in (1, 7, 9, 16390, len(data)):
            frames, found = nerdctld.Frames(nerdctld.PREFACE), []
            for at in range(0, len(data), size):
                found += [each._replace(raw=bytes(each.raw)) for each in frames.feed(data[at:at + size])]
            assert [(each.kind, each.stream) for each in found] == [(-1, 0), (4, 0), (1, 1), (0, 1)]
            assert b"".join(each.raw for each in found) == data
            assert found[-1].ends and found[-1].data == b"xyz" and not found[2].ends and frames.rest == b""

    def test_frames_of_something_else(self):
        with pytest.raises(ValueError):
            nerdctld.Frames(nerdctld.PREFACE).feed(b"GET / HTTP/1.1\r\n")

    def test_headers_without_end_are_given_up(self):
        frames = nerdctld.Frames()
        with pytest.raises(ValueError):
            for _ in range(40):
                frames.feed(nerdctld.frame(nerdctld.CONTINUATION if frames.rest else nerdctld.HEADERS, 0, 1, b"x" * 1000000))

    def test_padding(self):
        padded = nerdctld.frame(nerdctld.DATA, nerdctld.PADDED, 1, b"\x03abc\0\0\0")
        assert nerdctld.Frames().feed(padded)[0].data == b"abc"

    def test_header_block(self):
        assert nerdctld.header_block([("te", "trailers")]) == b"\x10\x02te\x08trailers"
        assert nerdctld.header_block([("a", "x" * 127)]) == b"\x10\x01a\x7f\x00" + b"x" * 127
        assert nerdctld.header_block([("a", "x" * 400)]) == b"\x10\x01a\x7f\x91\x02" + b"x" * 400

    def test_grpc_end(self):
        whole = nerdctld.grpc_end(5, nerdctld.Conflict("a\nb \u00e9 100%"))
        assert whole[3:9] == b"\x01\x05\0\0\0\x05"
        assert b":status\x03200" in whole and b"grpc-status\x019" in whole and b"a%0Ab %C3%A9 100%25" in whole
        assert b":status" not in nerdctld.grpc_end(5, nerdctld.Conflict("x"), begun=True)
        assert b"grpc-status\x010" in nerdctld.grpc_end(5, None)

    def test_sender_keeps_to_windows(self):
        out = bytearray()
        sender = nerdctld.Sender(out)
        sender.windows[1] = 20000
        sender.push(1, b"a" * 30000, b"b" * 10000, end=True)
        assert [len(each.raw) - 9 for each in nerdctld.Frames().feed(out)] == [16384, 3616]
        assert sender.waiting == 20000 and sender.connection == 45535 and sender.owed == 20000
        out.clear()
        assert sender.settings(struct.pack(">HIHI", 4, 75535, 5, 100000)) == 10000
        sender.flush()
        assert [len(each.raw) - 9 for each in nerdctld.Frames().feed(out)] == [10000]
        out.clear()
        sender.windows[1] += 70000
        sender.flush()
        last, = nerdctld.Frames().feed(out)
        assert last.ends and last.data == b"b" * 10000 and not sender.waiting and not sender.queues

    def test_sender_ends_without_data(self):
        out = bytearray()
        sender = nerdctld.Sender(out)
        sender.connection = 0
        sender.push(1, end=True)
        assert out == nerdctld.frame(0, 1, 1)

    # --- the rewrite ---

    def test_rewrite_of_a_recorded_solve(self):
        message, names = nerdctld.rewrite_solve(SOLVE_TAGGED[5:])
        assert names == ["docker.io/library/bxm:1"]
        assert read_exporters(message) == [("image", {
            "prefer-image-digest": "true", "name": "docker.io/library/bxm:1", "unpack": "true",
            "dangling-name-prefix": "moby-dangling", "danging-name-empty-only": "true"})]
        before = [each.raw for each in nerdctld.fields(SOLVE_TAGGED[5:]) if each.number not in (3, 4, 13)]
        assert [each.raw for each in nerdctld.fields(message) if each.number != 13] == before
        assert not [each for each in nerdctld.fields(message) if each.number in (3, 4)]

    @pytest.mark.parametrize("recorded", [SOLVE_LOCAL, SOLVE_PROBE, STATUS])
    def test_what_stores_nothing_stays(self, recorded):
        assert nerdctld.rewrite_solve(recorded[5:]) == (recorded[5:], None)

    def test_rewrite_of_the_deprecated_fields(self):
        old = nerdctld.field(1, b"r") + nerdctld.field(3, b"moby") + map_entry(4, "name", "a,localhost:5000/b:2") + map_entry(4, "push", "true")
        message, names = nerdctld.rewrite_solve(old)
        assert names == ["docker.io/library/a:latest", "localhost:5000/b:2"]
        (kind, attributes), = read_exporters(message)
        assert kind == "image" and attributes["name"] == ",".join(names) and attributes["push"] == "true"
        assert not [each for each in nerdctld.fields(message) if each.number in (3, 4)]

    def test_rewrite_keeps_what_the_client_set(self):
        message, _ = nerdctld.rewrite_solve(solve(exporter("moby", unpack="false", dangling_name_prefix="mine")))
        assert read_exporters(message) == [("image", {"unpack": "false", "dangling-name-prefix": "mine", "danging-name-empty-only": "true"})]

    def test_rewrite_of_several_exporters(self):
        local = exporter("local", dest="x")
        message, names = nerdctld.rewrite_solve(solve(local, exporter("moby", name="x"), exporter("moby")))
        kinds = read_exporters(message)
        assert [kind for kind, _ in kinds] == ["local", "image", "image"] and names == ["docker.io/library/x:latest"]
        assert "name" not in kinds[2][1]
        assert next(each.value for each in nerdctld.fields(message) if each.number == 13) == local

    def test_unknown_fields_stay_byte_for_byte(self):
        # A varint that is longer than it must be would not survive a decode and an encode.
        odd = b"\xf8\x7f\x81\x80\x00" + nerdctld.field(900, b"\xff\0x") + b"\xfd\x7f1234"
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

    # --- which streams are held ---

    @pytest.mark.parametrize("recorded", [SOLVE_TAGGED, SOLVE_LOCAL, SOLVE_PROBE, STATUS])
    def test_solve_is_recognised_and_awaited(self, recorded):
        assert nerdctld.like_solve(recorded[:80]) is True
        end = 7 + recorded[6]
        assert all(nerdctld.like_solve(recorded[:size]) is None for size in range(end))

    @pytest.mark.parametrize("recorded", PASSED)
    def test_other_calls_pass(self, recorded):
        assert nerdctld.like_solve(recorded) is False
        client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True)
        client.open(1, recorded, end=False)
        settle(client, splice, server, credits=False)
        assert bytes(server.received[1]) == recorded and not splice.held and not splice.sender.windows

    def test_compressed_messages_pass(self):
        assert nerdctld.like_solve(b"\1" + SOLVE_TAGGED[1:80]) is False

    @pytest.mark.parametrize("piece", [1, 3, 9, 100, 100000])
    def test_pieces_make_no_difference(self, piece):
        client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True)
        client.open(1, STATUS)
        client.open(3, SOLVE_TAGGED)
        client.open(5, PASSED[1], end=False)
        settle(client, splice, server, piece=piece)
        assert bytes(server.received[1]) == STATUS and bytes(server.received[5]) == PASSED[1]
        assert bytes(server.received[3]) == grpc(nerdctld.rewrite_solve(SOLVE_TAGGED[5:])[0])
        assert server.ended == {1, 3} and client.connection == server.own == 65535

    def test_first_frame_of_few_bytes(self):
        client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True)
        client.open(1, SOLVE_TAGGED[:3], end=False)
        client.open(3, PASSED[0][:2], end=False)
        settle(client, splice, server)
        assert 1 not in server.received and splice.held
        for stream, rest in ((1, SOLVE_TAGGED[3:]), (3, PASSED[0][2:])):
            client.waiting[stream] = bytearray(rest)
            client.ending.add(stream)
        client.push()
        settle(client, splice, server)
        assert bytes(server.received[1]) == grpc(rewrite(SOLVE_TAGGED[5:])[0]) and bytes(server.received[3]) == PASSED[0]

    # --- windows ---

    @pytest.mark.parametrize("kilobytes", [20, 60, 64, 65, 100, 300, 700])
    @pytest.mark.parametrize("initial", [65535, 1 << 20, 16384])
    def test_big_requests(self, kilobytes, initial):
        """A request far larger than every window arrives whole, and both sides end with the same view of the connection."""
        message = solve(exporter("moby", name="x"), rest=map_entry(7, "build-arg:A", "a" * (kilobytes << 10)))
        client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True, initial)
        settle(client, splice, server)
        client.open(1, grpc(message))
        client.open(3, STATUS)
        settle(client, splice, server)
        assert bytes(server.received[1]) == grpc(rewrite(message)[0]) and bytes(server.received[3]) == STATUS
        assert server.ended == {1, 3}
        assert client.connection == server.own == 65535 and splice.sender.owed == 0 and not splice.sender.queues

    def test_server_that_credits_late(self):
        """While buildkitd takes nothing, no more than its window is sent; other streams wait for the same window and no
        byte of theirs is lost or sent beyond it."""
        message = solve(exporter("moby", name="x"), rest=map_entry(7, "a", "a" * 200000))
        other = b"\0\0\x03\x0d\x40" + b"\xff" * 200000
        client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True)
        client.open(1, grpc(message))
        settle(client, splice, server, credits=False)
        assert server.own == 0 and not client.waiting
        client.open(3, other)
        client.open(5, STATUS)
        settle(client, splice, server, credits=False)
        assert server.own == 0
        settle(client, splice, server)
        assert bytes(server.received[1]) == grpc(rewrite(message)[0])
        assert bytes(server.received[3]) == other and bytes(server.received[5]) == STATUS
        assert client.connection == server.own == 65535

    @pytest.mark.parametrize("changed", [1, 16384, 1 << 20])
    def test_first_window_that_changes_midway(self, changed):
        message = solve(exporter("moby", name="x"), rest=map_entry(7, "a", "a" * 300000))
        client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True)
        settle(client, splice, server)
        client.open(1, grpc(message)[:100000], end=False)
        settle(client, splice, server, credits=False)
        server.change(changed)
        settle(client, splice, server, credits=False)
        client.waiting[1] = bytearray(grpc(message)[100000:])
        client.ending.add(1)
        client.push()
        settle(client, splice, server, credits=False)
        # With credits of one byte it would take too long.
        server.change(max(changed, 16384))
        settle(client, splice, server)
        assert bytes(server.received[1]) == grpc(rewrite(message)[0])
        assert client.connection == server.own

    def test_client_that_takes_back_a_held_request(self):
        message = grpc(solve(exporter("moby", name="x"), rest=map_entry(7, "a", "a" * 300000)))
        for sent in (50000, len(message)):
            client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True)
            client.open(1, message[:sent], end=False)
            client.open(3, b"\0\0\0\0\x05" + b"\xff" * 70000)
            settle(client, splice, server, credits=False)
            client.waiting.pop(1, None)
            client.out += nerdctld.frame(nerdctld.RESET, 0, 1, struct.pack(">I", 8))
            settle(client, splice, server)
            assert server.reset == {1: 8} and len(server.received[3]) == 70005
            assert client.connection == server.own == 65535
            assert not (splice.held or splice.sender.queues or splice.sender.windows) and list(splice.begun) == [3]

    def test_server_that_ends_a_held_stream_early(self):
        message = grpc(solve(exporter("moby", name="x"), rest=map_entry(7, "a", "a" * 300000)))
        client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True)
        client.open(1, message)
        settle(client, splice, server, credits=False)
        server.out += nerdctld.grpc_end(1, nerdctld.ApiError("no"))
        settle(client, splice, server)
        assert 1 in client.ended and not splice.sender.queues and not splice.answers
        client.open(3, STATUS)
        settle(client, splice, server)
        assert bytes(server.received[3]) == STATUS and client.connection == server.own == 65535

    def test_streams_leave_nothing_behind(self):
        client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True)
        for stream in range(1, 401, 2):
            client.open(stream, random.Random(stream).choice([STATUS, SOLVE_TAGGED, PASSED[1]]))
            settle(client, splice, server)
            server.out += nerdctld.grpc_end(stream, None)
            settle(client, splice, server)
        assert client.ended == server.ended == set(range(1, 401, 2)) and client.connection == server.own == 65535
        for table in (splice.begun, splice.fresh, splice.held, splice.answers, splice.builds, splice.sender.windows, splice.sender.queues):
            assert not table

    def test_padded_frames(self):
        client, splice, server = Peer(False), nerdctld.Splice(rewrite), Peer(True)
        client.open(1, b"", end=False)
        client.out += nerdctld.frame(nerdctld.DATA, nerdctld.PADDED | 1, 1, b"\x05" + PASSED[0] + b"\0" * 5)
        client.connection -= 6 + len(PASSED[0])
        settle(client, splice, server)
        assert bytes(server.received[1]) == PASSED[0] and client.connection == server.own == 65535

    # --- answers in place of buildkitd ---

    def refusing(self, message):
        raise nerdctld.Conflict("write this")

    def test_refused_solve(self):
        """The Solve ends with the reason, the progress of the same build without one, and other streams go on."""
        refuse = lambda message: self.refusing(message) if read_exporters(message) else (message, None)  # noqa: E731
        client, splice, server = Peer(False), nerdctld.Splice(refuse), Peer(True)
        reference = SOLVE_TAGGED[7:7 + SOLVE_TAGGED[6]]
        progress = grpc(nerdctld.field(1, reference))
        client.open(1, progress)
        client.open(3, STATUS)
        client.open(5, SOLVE_TAGGED)
        settle(client, splice, server)
        client.open(7, progress)
        settle(client, splice, server)
        assert client.ended == {1, 5, 7} and server.reset == {1: 8, 5: 8, 7: 8} and 5 not in server.received
        assert b"grpc-status\x019" in client.heads[5][0] and b"write this" in client.heads[5][0]
        assert b"grpc-status\x010" in client.heads[1][0] and b"grpc-status\x010" in client.heads[7][0]
        assert client.connection == server.own == 65535

    def test_answer_is_given_to_who_asked(self):
        told = []
        client, splice, server = Peer(False), nerdctld.Splice(lambda message: (message, told.append)), Peer(True)
        client.open(1, SOLVE_TAGGED)
        settle(client, splice, server)
        answer = map_entry(1, "containerimage.digest", "sha256:1")
        server.out += nerdctld.header_frames(1, [(":status", "200")]) + nerdctld.frame(0, 0, 1, grpc(answer)[:9])
        server.out += nerdctld.frame(0, 0, 1, grpc(answer)[9:]) + nerdctld.header_frames(1, [("grpc-status", "0")], 1)
        settle(client, splice, server)
        assert told == [answer] and nerdctld.solved_digest(answer) == "sha256:1" and bytes(client.received[1]) == grpc(answer)
        assert nerdctld.solved_digest(b"") == nerdctld.solved_digest(b"\x0b") == nerdctld.solved_digest(b"\x08\x01") == ""

    def test_server_that_dies(self):
        client, splice, server = Peer(False), nerdctld.Splice(keep), Peer(True)
        client.open(1, STATUS)
        client.open(3, SOLVE_TAGGED)
        settle(client, splice, server)
        server.out += nerdctld.header_frames(1, [(":status", "200")])
        settle(client, splice, server)
        splice.server_ended()
        client.open(5, STATUS)
        settle(client, splice, Peer(True))
        assert client.ended == {1, 3, 5}
        assert b":status" not in client.heads[1][1] and b"grpc-status\x0214" in client.heads[1][1]
        assert b":status" in client.heads[3][0] and b"buildkitd has ended" in client.heads[5][0]

    def test_server_that_never_was(self):
        """Over sockets: SETTINGS first, then every call ends with the reason; the client's end ends the relay."""
        ours, theirs = socket.socketpair()
        splice = nerdctld.Splice(keep)
        splice.server_ended(nerdctld.Unavailable("start it"))
        thread = threading.Thread(target=nerdctld.relay, args=(splice, ours, None, nerdctld.PREFACE[:5]), daemon=True)
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
    def relayed(self, joint, early=b""):
        """The two far ends of a relay, and its thread."""
        client, near = socket.socketpair()
        far, server = socket.socketpair()
        thread = threading.Thread(target=nerdctld.relay, args=(joint, near, far, early), daemon=True)
        thread.start()
        try:
            yield client, server, thread
        finally:
            for each in (client, server):
                each.close()
            thread.join(10)
            assert not thread.is_alive()
            near.close()
            far.close()

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
                    with contextlib.suppress(BlockingIOError):
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
        client.open(1, grpc(message))
        early = client.take()[:100]
        client.__init__(False)
        client.open(1, grpc(message))
        del client.out[:100]
        with self.relayed(nerdctld.Splice(rewrite), early) as (near, far, _):
            self.drive([(near, client), (far, server)], lambda: 1 in server.ended)
        assert bytes(server.received[1]) == grpc(rewrite(message)[0])

    def test_session_carries_bytes_both_ways(self):
        """What the client writes arrives in BytesMessages within the windows, and the other way round."""
        sent = random.Random(1).randbytes(400000)
        back = grpc(nerdctld.field(1, sent[::-1]))
        server = Peer(True)
        got = bytearray()
        with self.relayed(nerdctld.Session([("X-Docker-Expose-Session-Uuid", "u")])) as (near, far, thread):
            writer = threading.Thread(target=near.sendall, args=(sent,), daemon=True)
            writer.start()
            reader = threading.Thread(target=self.collect, args=(near, got), daemon=True)
            reader.start()
            answered = []

            def done():
                if 1 in server.heads and not answered:
                    answered.append(True)
                    server.out += nerdctld.header_frames(1, [(":status", "200")])
                    server.out += b"".join(nerdctld.frame(0, 0, 1, back[at:at + 16384]) for at in range(0, len(back), 16384))
                return len(self.session_bytes(server)) == len(sent) and len(got) == len(sent)

            self.drive([(far, server)], done)
            assert self.session_bytes(server) == sent and got == sent[::-1]
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
        data, at, found = bytes(server.received.get(1, b"")), 0, b""
        while len(data) >= at + 5:
            size = int.from_bytes(data[at + 1:at + 5], "big")
            if len(data) < at + 5 + size:
                break
            found += b"".join(each.value for each in nerdctld.fields(data[at + 5:at + 5 + size]))
            at += 5 + size
        return found

    def test_session_holds_no_memory(self):
        """While the client does not read, buildkitd is credited for nothing; while buildkitd does not, the client is not
        read."""
        session = nerdctld.Session([])
        message = grpc(nerdctld.field(1, b"x" * 100000))
        for _ in range(60):
            session.from_server(nerdctld.frame(0, 0, 1, message))
        session.to_server.clear()
        session.flushed()
        assert not session.to_server
        session.to_client.clear()
        session.flushed()
        assert session.to_server
        session.from_client(b"x" * (2 << 20))
        assert session.room() == (False, True)

    @pytest.mark.parametrize("joint", [nerdctld.Splice(keep), nerdctld.Session([])])
    def test_relay_ends_with_either_side(self, joint):
        with self.relayed(joint) as (near, far, thread):
            near.close()
            thread.join(10)
            assert not thread.is_alive()

    def test_session_ends_with_buildkitd(self):
        with self.relayed(nerdctld.Session([])) as (near, far, thread):
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
        record = nerdctld.field(1, b"id") + map_entry(2, "a", "b") + map_entry(2, "c", "d") + b"\x18\x01"
        assert nerdctld.parse_workers(nerdctld.field(1, record) + nerdctld.field(1, b"")) == [{"a": "b", "c": "d"}, {}]

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
                    sock.sendall(nerdctld.header_frames(1, [(":status", "200")]) + nerdctld.frame(0, 0, 1, grpc(nerdctld.field(1, record)))
                                 + nerdctld.header_frames(1, [("grpc-status", "0")], 1))

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

    def engine(self, path, namespace="ns"):
        """An Engine whose nerdctl knows its containerd and nothing else."""
        engine = nerdctld.Engine(nerdctld.Nerdctl(["false"], namespace, buildkit_host="unix://" + path))
        engine.snapshot.info = nerdctld.Cached(lambda: {"ID": "u"}, lambda: True)
        engine.snapshot.names = nerdctld.Cached(lambda: [nerdctld.Image("docker.io/library/x:latest", "sha256:old", 0, 0, "")], lambda: True)
        return engine

    def test_wrong_worker_is_refused(self, tmp_path):
        path = str(tmp_path / "b.sock")
        with self.fake_buildkitd(path, {nerdctld.WORKER_LABEL + "namespace": "buildkit"}):
            with pytest.raises(nerdctld.Conflict) as caught:
                nerdctld.prepare_solve(self.engine(path), "unix://" + path, SOLVE_TAGGED[5:])
        assert "'buildkit'" in str(caught.value)
        # What leaves no image is not looked at.
        assert nerdctld.prepare_solve(self.engine(path), "unix://" + path, SOLVE_LOCAL[5:]) == (SOLVE_LOCAL[5:], None)

    def test_image_events(self, tmp_path):
        """A name that is taken over is told as untag and tag; one that is new is left to containerd's own event."""
        path = str(tmp_path / "b.sock")
        engine = self.engine(path)
        request = solve(exporter("moby", name="x,new"))
        with self.fake_buildkitd(path, {nerdctld.WORKER_LABEL + "namespace": "ns", nerdctld.WORKER_LABEL + "uuid": "u"}):
            with engine.journal.subscribe() as (_, queue):
                _, answered = nerdctld.prepare_solve(engine, "unix://" + path, request)
                assert engine.snapshot.names.fresh()
                answered(map_entry(1, "containerimage.digest", "sha256:new"))
                assert not engine.snapshot.names.fresh()
                events = [queue.get_nowait() for _ in range(queue.qsize())]
        assert [(each["Action"], each["Actor"]["ID"], each["Actor"]["Attributes"]["name"]) for each in events] == [
            ("untag", "sha256:old", "x:latest"), ("tag", "sha256:new", "x:latest")]

    # --- the two endpoints ---

    @pytest.mark.parametrize("path", ["/grpc", "/session"])
    def test_endpoints_answer_101_without_buildkitd(self, path, tmp_path):
        """Anything else would make clients set up a builder of their own."""
        response = nerdctld.dispatch(self.engine(str(tmp_path / "none.sock")), nerdctld.Request("POST", path))
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


# --- live -------------------------------------------------------------------------------------------------------------

REGISTRY = "localhost:5000"
BASE = REGISTRY + "/bb:1"
NAMESPACE = "nerdctld-buildkit-test"


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
                [sys.executable, nerdctld.__file__, "-H", self.docker_host, "--namespace", NAMESPACE, "--buildkit-host", self.address],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        self.wait_for(self.docker_host)

    def start_buildkitd(self, *arguments, namespace=NAMESPACE, name="root"):
        """Run buildkitd with a containerd worker, or with what `arguments` say."""
        config = self.folder / "buildkitd.toml"
        config.write_text(f'insecure-entitlements = ["network.host"]\n[registry."{REGISTRY}"]\n  http = true\n')
        arguments = arguments or ("--oci-worker=false", "--containerd-worker=true", f"--containerd-worker-namespace={namespace}")
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
        done = subprocess.run(["nerdctl", "--namespace", NAMESPACE, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
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
        for namespace in (NAMESPACE, NAMESPACE + "-2"):
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
            assert self.runs(mark)
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
        ("foreign", ("--oci-worker=false", "--containerd-worker=true", f"--containerd-worker-namespace={NAMESPACE}-2"), f"'{NAMESPACE}-2'"),
    ])
    def test_worker_that_would_lose_the_image(self, builder, context, name, arguments, words, tmp_path):
        builder.stop_buildkitd()
        builder.start_buildkitd(*arguments, name=name)
        try:
            text = builder.run("build", "-t", "live:lost", str(context), status=1, timeout=30)[1]
            assert words in text and f'namespace = "{NAMESPACE}"' in text and "[worker.oci]" in text
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
