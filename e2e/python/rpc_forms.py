"""The guest daemon's RPC in the forms the SDKs do not use: gRPC, and Connect with binary messages.

The SDKs speak Connect with JSON. Programs made from the protocol files speak gRPC or binary Connect;
they must find the same services, the same errors and the same streams. The clients here are not
ours: gRPC's own, and protobuf's own encoding over plain HTTP.
"""

import importlib
import os
import struct
import sys
import tempfile
import urllib.parse
from pathlib import Path

import grpc
import grpc_tools
import raw
from checks import Suite, equal, true, until
from grpc_tools import protoc
from guest_target import target

CALL_S = 60
PROTO_FOLDER = Path(__file__).resolve().parents[2] / "crates/wire/proto"
SERVICES = ("process", "filesystem")
END_OF_STREAM = 0x02


def compile_protocol(folder):
    """Makes message classes and stubs from our protocol files, and imports them."""
    own = Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{PROTO_FOLDER}", f"-I{own}"]
    arguments += [f"--python_out={folder}", f"--grpc_python_out={folder}"]
    code = protoc.main(arguments + [f"{name}.proto" for name in SERVICES])
    if code != 0:
        raise RuntimeError(f"protoc ended with {code}")
    sys.path.insert(0, folder)
    kinds = ("pb2", "pb2_grpc")
    return [importlib.import_module(f"{name}_{kind}") for name in SERVICES for kind in kinds]


class Client:
    """One daemon, by gRPC (`stubs`) and by binary Connect (`unary`, `stream`)."""

    def __init__(self, url, headers, modules):
        self.pb, process_grpc, self.fs_pb, filesystem_grpc = modules
        self.url, self.headers = url, headers
        self.channel = grpc.insecure_channel(urllib.parse.urlsplit(url).netloc)
        self.metadata = [(name.lower(), value) for name, value in headers.items()]
        self.process = process_grpc.ProcessStub(self.channel)
        self.filesystem = filesystem_grpc.FilesystemStub(self.channel)

    def options(self):
        return {"metadata": self.metadata, "timeout": CALL_S}

    def unary(self, procedure, message, answer):
        headers = {**self.headers, "Content-Type": "application/proto"}
        body = message.SerializeToString()
        found = raw.request(self.url, "POST", f"/{procedure}", body, headers, CALL_S)
        if found.status == 200:
            equal(found.headers.get("content-type"), "application/proto", "content type")
            return answer.FromString(found.body)
        return found

    def stream(self, procedure, message, answer):
        """The messages of a server stream, then the bytes of its last frame."""
        headers = {**self.headers, "Content-Type": "application/connect+proto"}
        headers["Connect-Protocol-Version"] = "1"
        body = message.SerializeToString()
        body = struct.pack(">BI", 0, len(body)) + body
        found = raw.request(self.url, "POST", f"/{procedure}", body, headers, CALL_S)
        equal(found.status, 200, "status")
        equal(found.headers.get("content-type"), "application/connect+proto", "content type")
        rest, messages, last = found.body, [], None
        while rest:
            flags, length = struct.unpack(">BI", rest[:5])
            payload, rest = rest[5 : 5 + length], rest[5 + length :]
            if flags & END_OF_STREAM:
                last = payload
            else:
                messages.append(answer.FromString(payload))
        return messages, last


def shell(client, script, **fields):
    config = client.pb.ProcessConfig(cmd="/bin/sh", args=["-c", script])
    return client.pb.StartRequest(process=config, **fields)


def summary(messages):
    """Output, error output and end of a process, from its stream of events."""
    out, err, end = b"", b"", None
    for message in messages:
        kind = message.event.WhichOneof("event")
        out += message.event.data.stdout
        err += message.event.data.stderr
        if kind == "end":
            end = message.event.end
    true(end is not None, "the stream has an end event")
    return out, err, end


SCRIPT = "echo out; echo err >&2; exit 3"


def process_by_grpc(client):
    messages = list(client.process.Start(shell(client, SCRIPT, stdin=False), **client.options()))
    true(messages[0].event.start.pid > 0, "the first event is the start")
    out, err, end = summary(messages)
    equal((out, err), (b"out\n", b"err\n"), "output")
    equal((end.exit_code, end.exited, end.status), (3, True, "exit status 3"), "end")


def process_by_connect(client):
    request = shell(client, SCRIPT, stdin=False)
    messages, last = client.stream("process.Process/Start", request, client.pb.StartResponse)
    out, err, end = summary(messages)
    equal((out, err, end.exit_code), (b"out\n", b"err\n", 3), "output and end")
    equal(last, b"{}", "the last frame")


def killed_by_grpc(client):
    events = client.process.Start(shell(client, "exec sleep 600", tag="form"), **client.options())
    pid = next(events).event.start.pid
    listed = client.process.List(client.pb.ListRequest(), **client.options()).processes
    equal([found.tag for found in listed if found.pid == pid], ["form"], "listed")
    selector = client.pb.ProcessSelector(tag="form")
    request = client.pb.SendSignalRequest(process=selector, signal=client.pb.SIGNAL_SIGKILL)
    client.process.SendSignal(request, **client.options())
    _, _, end = summary(events)
    found = (end.exit_code, end.exited, end.status)
    equal(found, (-1, False, "signal: killed"), "end")


def input_stream_by_grpc(client):
    pb = client.pb
    events = client.process.Start(shell(client, "exec cat", stdin=True), **client.options())
    selector = pb.ProcessSelector(pid=next(events).event.start.pid)

    def pieces():
        start = pb.StreamInputRequest.StartEvent(process=selector)
        yield pb.StreamInputRequest(start=start)
        for number in range(100):
            piece = pb.ProcessInput(stdin=b"%04d\n" % number)
            data = pb.StreamInputRequest.DataEvent(input=piece)
            yield pb.StreamInputRequest(data=data)

    client.process.StreamInput(pieces(), **client.options())
    client.process.CloseStdin(pb.CloseStdinRequest(process=selector), **client.options())
    out, _, end = summary(events)
    equal(out, b"".join(b"%04d\n" % number for number in range(100)), "echoed")
    equal(end.exit_code, 0, "exit code")


def errors(client):
    missing = "/nonexistent/file"
    try:
        client.filesystem.Stat(client.fs_pb.StatRequest(path=missing), **client.options())
        raise AssertionError("a missing file was found by gRPC")
    except grpc.RpcError as error:
        equal(error.code(), grpc.StatusCode.NOT_FOUND, "gRPC code")
        true(missing in error.details(), f"the text names the path: {error.details()!r}")
    request = client.fs_pb.StatRequest(path=missing)
    found = client.unary("filesystem.Filesystem/Stat", request, client.fs_pb.StatResponse)
    equal((found.status, found.json()["code"]), (404, "not_found"), "Connect error")
    try:
        client.channel.unary_unary("/process.Process/Fork")(b"", **client.options())
        raise AssertionError("a method that does not exist was answered")
    except grpc.RpcError as error:
        equal(error.code(), grpc.StatusCode.UNIMPLEMENTED, "unknown method")


def entry_by_connect(client, folder):
    pb, path = client.fs_pb, f"{folder}/made"
    make = pb.MakeDirRequest(path=path)
    made = client.unary("filesystem.Filesystem/MakeDir", make, pb.MakeDirResponse).entry
    stat = pb.StatRequest(path=path)
    found = client.unary("filesystem.Filesystem/Stat", stat, pb.StatResponse).entry
    equal((found.name, found.path, found.type), ("made", path, pb.FILE_TYPE_DIRECTORY), "entry")
    equal(found.permissions, "drwxr-xr-x", "permissions")
    true(found.modified_time.seconds > 1_700_000_000, "the time is set")
    equal(made.path, path, "made")


def watch_by_grpc(client, folder):
    pb = client.fs_pb
    events = client.filesystem.WatchDir(pb.WatchDirRequest(path=folder), **client.options())
    equal(next(events).WhichOneof("event"), "start", "first event")
    create = pb.MakeDirRequest(path=f"{folder}/seen")
    client.filesystem.MakeDir(create, **client.options())
    change = next(events).filesystem
    equal((change.name, change.type), ("seen", pb.EVENT_TYPE_CREATE), "change")
    events.cancel()


def deadline_by_grpc(client):
    options = {**client.options(), "timeout": 2}
    try:
        list(client.process.Start(shell(client, "exec sleep 600", tag="late"), **options))
        raise AssertionError("the stream ended before the process")
    except grpc.RpcError as error:
        equal(error.code(), grpc.StatusCode.DEADLINE_EXCEEDED, "code")

    def is_gone():
        listed = client.process.List(client.pb.ListRequest(), **client.options()).processes
        return all(found.tag != "late" for found in listed)

    until(10, "the deadline killed the process", is_gone)


def run(suite, client, folder):
    make = client.fs_pb.MakeDirRequest(path=folder)
    client.filesystem.MakeDir(make, **client.options())
    for body in (process_by_grpc, process_by_connect, killed_by_grpc, input_stream_by_grpc):
        suite.check(body.__name__, body, client)
    suite.check("errors", errors, client)
    suite.check("entry_by_connect", entry_by_connect, client, folder)
    suite.check("watch_by_grpc", watch_by_grpc, client, folder)
    suite.check("deadline_by_grpc", deadline_by_grpc, client)
    remove = client.fs_pb.RemoveRequest(path=folder)
    client.filesystem.Remove(remove, **client.options())
    client.channel.close()


def main():
    where = target()
    with tempfile.TemporaryDirectory() as folder, where, Suite("rpc", not where.native) as suite:
        modules = compile_protocol(folder)
        url, headers = os.environ["E2B_SANDBOX_URL"], {}
        if not where.native:
            sandbox = raw.RawSandbox(suite.tag)
            headers = raw.routed(sandbox.id, token=sandbox.token)
        run(suite, Client(url, headers, modules), where.base)


main()
