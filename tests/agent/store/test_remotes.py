"""The three kinds of remote, each against what it is made for: a directory, an HTTP server, an S3 server."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from agent.store.remote import api, directory, pace, wire
from agent.store.remote import s3 as s3_module
from agent.store.remote import web as web_module
from agent.store.remote.api import STEADY_BYTES, Interrupted, Remote, read_into
from agent.store.remote.open import open_remote
from schema.errors import Cancelled, InvalidCheckpoint, InvalidInput, NotFound, OutOfSpace, SllmError, Unauthorised, Unreachable
from schema.remote import RemoteSettings, check_remote_url
from tests.remotes import S3_ENVIRONMENT, WebServer, cut, s3_server, web_server

SETTINGS = RemoteSettings(connect_s=60, read_s=60, part_s=60, attempts=3, longest_delay_s=0.01)
DATA = os.urandom(40 << 20)
NUMBERED = b"".join(number.to_bytes(4, "big") for number in range(10240))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as endpoint:
        yield endpoint


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "web" / "a").mkdir(parents=True)
    (tmp_path / "web" / "a" / "file").write_bytes(DATA)
    with web_server(tmp_path / "web") as server:
        yield server


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.slow), "http"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """A remote with ``a/file`` on it, written through it where it can be."""
    if request.param == "http":
        remote = open_remote(request.getfixturevalue("web").url, SETTINGS)
    elif request.param == "s3":
        remote = s3_remote(request.getfixturevalue("s3"), "all", monkeypatch)
    else:
        (tmp_path / "share").mkdir()
        remote = open_remote(f"file://{tmp_path}/share", SETTINGS)
    if request.param != "http":
        wrote: list[int] = []
        remote.write("a/file", len(DATA), lambda offset, length: memoryview(DATA)[offset : offset + length], wrote.append)
        assert sum(wrote) == len(DATA)
    yield remote
    remote.close()


def s3_remote(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Remote:
    import boto3

    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=bucket)
    client.close()
    settings = RemoteSettings(s3_endpoint=endpoint, connect_s=60, read_s=60, attempts=3, longest_delay_s=0.01)
    return open_remote(f"s3://{bucket}/some/where", settings)


def test_a_directory_is_written_in_parts_side_by_side_and_keeps_none_of_a_write_that_failed(tmp_path: Path) -> None:
    remote = open_remote(f"file://{tmp_path}", SETTINGS)
    together = threading.Barrier(3, timeout=60)

    def parts(offset: int, length: int) -> memoryview:
        together.wait()
        return memoryview(DATA)[offset : offset + length]

    remote.write("file", len(DATA), parts, lambda size: None)
    assert (tmp_path / "file").read_bytes() == DATA

    def fail(offset: int, length: int) -> memoryview:
        if offset:
            raise InvalidCheckpoint(f"the bytes at {offset} are wrong")
        return memoryview(DATA)[:length]

    with pytest.raises(InvalidCheckpoint, match="are wrong"):
        remote.write("other", len(DATA), fail, lambda size: None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_written_is_read_by_ranges(remote: Remote) -> None:
    view = memoryview(bytearray(3 << 20))
    for offset in (0, 1, (32 << 20) - 5, len(DATA) - len(view)):
        read_into(remote, "a/file", offset, view)
        assert view == DATA[offset : offset + len(view)]
    assert remote.size("a/file") == len(DATA)
    assert remote.size("a/other") is None
    assert remote.read("a/file", len(DATA)) == DATA
    with pytest.raises(InvalidCheckpoint, match=r"a/file has .*bytes"):
        remote.read("a/file", 1 << 20)


def test_what_is_missing_or_of_another_size_is_said_by_its_name(remote: Remote) -> None:
    view = memoryview(bytearray(10))
    with pytest.raises(NotFound, match="a/other does not exist"):
        read_into(remote, "a/other", 0, view)
    with pytest.raises(InvalidCheckpoint, match="its manifest says 12"), remote.open("a/file", 0, 10, total_bytes=12) as body:
        body.fill(view)
    with pytest.raises((Interrupted, InvalidCheckpoint), match="a/file"):
        read_into(remote, "a/file", len(DATA) - 5, view)
    with pytest.raises((Interrupted, InvalidCheckpoint), match="a/file"):
        read_into(remote, "a/file", len(DATA) + 5, view)


def test_an_aborted_remote_does_nothing_more(remote: Remote) -> None:
    remote.abort()
    with pytest.raises(Cancelled):
        read_into(remote, "a/file", 0, memoryview(bytearray(10)))


def test_a_directory_and_s3_say_what_they_have_and_http_cannot(remote: Remote) -> None:
    if remote.url.startswith("http"):
        with pytest.raises(InvalidInput, match="cannot be asked"):
            remote.children("a")
        with pytest.raises(InvalidInput, match="only read"):
            remote.write("b", 1, lambda offset, length: memoryview(b"x"), lambda count: None)
        return
    remote.write("a/b/c", 1, lambda offset, length: memoryview(b"x"), lambda count: None)
    assert remote.children("a") == ["b"]
    assert remote.children("nowhere") == []


def test_connections_are_used_again(web: WebServer) -> None:
    remote = open_remote(web.url, SETTINGS)
    for offset in range(20):
        read_into(remote, "a/file", offset, memoryview(bytearray(1000)))
    assert remote.read("a/file", len(DATA)) == DATA
    remote.close()
    assert web.connections == 1


def test_a_server_without_ranges_is_refused_by_name(web: WebServer) -> None:
    web.honour_ranges = False
    remote = open_remote(web.url, SETTINGS)
    with pytest.raises(InvalidInput, match="ignores Range requests"):
        read_into(remote, "a/file", 4096, memoryview(bytearray(10)))
    view = memoryview(bytearray(len(DATA)))
    read_into(remote, "a/file", 0, view)  # all of it is what was asked for
    assert view == DATA
    remote.close()


def test_statuses_bodies_and_ranges_that_are_wrong(web: WebServer) -> None:
    remote = open_remote(web.url, SETTINGS)
    view = memoryview(bytearray(1000))
    for status, kind in ((401, Unauthorised), (403, Unauthorised), (503, Interrupted), (429, Interrupted), (418, Unreachable)):
        web.fault = lambda handler, path, count, status=status: handler.answer(status, b"secret") is None
        with pytest.raises(kind, match=str(status)) as caught:
            read_into(remote, "a/file", 0, view)
        assert "secret" not in str(caught.value)
    web.fault = lambda handler, path, count: cut(handler, 206, 1000, DATA[:600], len(DATA)) is None
    with pytest.raises(Interrupted, match="after 600 bytes"):
        read_into(remote, "a/file", 0, view)
    web.fault = lambda handler, path, count: cut(handler, 206, 600, DATA[:600], len(DATA)) is None
    with pytest.raises(Interrupted, match="600 of the 1000 bytes"):
        read_into(remote, "a/file", 0, view)

    def absurd(handler: Any, path: str, count: int) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-999/{'9' * 5000}")  # more digits than int() takes
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.close_connection = True
        return True

    web.fault = absurd
    with pytest.raises(InvalidInput, match="another range"):
        read_into(remote, "a/file", 0, view)
    web.fault = None
    read_into(remote, "a/file", 0, view)
    assert view == DATA[:1000]
    remote.close()


def test_redirects_are_followed_so_far(web: WebServer) -> None:
    def lead(handler: object, path: str, count: int) -> bool:
        if path == "a/file":
            return False
        target = "/a/file" if path == "one" else f"/{path}"
        handler.send_response(302)  # type: ignore[attr-defined]
        handler.send_header("Location", target)  # type: ignore[attr-defined]
        handler.send_header("Content-Length", "0")  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        return True

    web.fault = lead
    remote = open_remote(web.url, SETTINGS)
    view = memoryview(bytearray(1000))
    read_into(remote, "one", 500, view)
    assert view == DATA[500:1500]
    with pytest.raises(Unreachable, match="more than 5 times"):
        read_into(remote, "round", 0, view)
    remote.close()


def test_redirects_to_what_is_no_plain_address(web: WebServer) -> None:
    targets = {
        "plain": "/é è".encode().decode("latin-1"),
        "broken": "//[1/",
        "port": "http://a:x/",
        "file": "file:///etc/passwd",
    }

    def lead(handler: object, path: str, count: int) -> bool:
        if path not in targets:
            handler.answer(200 if path == quote("é è") else 404, DATA[:1000])  # type: ignore[attr-defined]
            return True
        handler.send_response(302)  # type: ignore[attr-defined]
        handler.send_header("Location", targets[path])  # type: ignore[attr-defined]
        handler.send_header("Content-Length", "0")  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        return True

    web.fault = lead
    remote = open_remote(web.url, SETTINGS)
    assert remote.size("plain") == 1000
    for path in ("broken", "port", "file"):
        with pytest.raises((InvalidInput, Unreachable)):
            remote.size(path)
    remote.close()


def test_a_server_that_trickles_cannot_outlast_the_deadline(web: WebServer) -> None:
    web.block_bytes, web.pause_s = 1000, 0.02
    remote = open_remote(web.url, SETTINGS)
    deadline = time.monotonic() + 0.4
    with pytest.raises(Interrupted, match="in time"), remote.open("a/file", 0, 1 << 20, deadline=deadline) as body:
        body.fill(memoryview(bytearray(1 << 20)))
    with pytest.raises(Interrupted, match="in time"):
        remote.read("a/file", len(DATA), 0.2)
    remote.close()


@pytest.mark.parametrize("times", [0.5, 2.0])
def test_a_small_file_may_come_slowly_but_not_stand_still(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    """Over a link on which `STEADY_BYTES` take so many times ``part_s``, by a clock that runs as they come."""
    now, part_s, receive = [0.0], 10.0, pace._Receives.readinto

    def slowly(self: Any, buffer: Any) -> int | None:
        count = receive(self, buffer)
        now[0] += (count or 0) / STEADY_BYTES * part_s * times
        return count

    monkeypatch.setattr(pace._Receives, "readinto", slowly)
    for module in (api, web_module, wire):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with contextlib.closing(open_remote(web.url, SETTINGS)) as remote:
        if times < 1:
            assert remote.read("a/file", len(DATA), part_s) == DATA
            assert now[0] > 50 * part_s
        else:
            with pytest.raises(Interrupted, match="in time"):
                remote.read("a/file", len(DATA), part_s)


ENDLESS = {
    "a header": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "answers that say to go on": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n", b"x"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_a_server_sends_without_end_is_not_read_for_ever(kind: str) -> None:
    first, again = ENDLESS[kind]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            with contextlib.suppress(OSError), connection:
                connection.recv(1000)
                connection.sendall(first)
                while True:
                    connection.sendall(again)
                    time.sleep(0.005)  # as a slow server sends

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        remote = open_remote(f"http://127.0.0.1:{listener.getsockname()[1]}", msgspec.structs.replace(SETTINGS, read_s=0.3))
        begun = time.monotonic()
        with pytest.raises(Interrupted, match="in time"):
            remote.read("a", 1 << 20, 0.3 if kind == "a chunk" else None)
        assert time.monotonic() - begun < 60
        remote.close()
        thread.join(60)
        assert not thread.is_alive()


def test_a_share_that_is_slow_may_be_tried_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA[:5000])
    remote = open_remote(f"file://{tmp_path}", SETTINGS)
    with pytest.raises(Interrupted, match="in time"), remote.open("file", 0, 5000, deadline=time.monotonic() - 1) as body:
        body.fill(memoryview(bytearray(5000)))
    remote.close()


def test_an_abort_wakes_what_waits_for_a_silent_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        remote = open_remote(f"http://127.0.0.1:{listener.getsockname()[1]}", RemoteSettings(read_s=100))
        failure: list[SllmError] = []

        def read() -> None:
            try:
                read_into(remote, "a", 0, memoryview(bytearray(10)))
            except SllmError as error:
                failure.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        connection, _ = listener.accept()
        connection.recv(1000)
        remote.abort()
        thread.join(60)
        connection.close()
        assert not thread.is_alive()
        assert isinstance(failure[0], Cancelled)
        remote.close()


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    import ssl
    import subprocess

    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"],
        check=True, capture_output=True,
    )  # fmt: skip
    (tmp_path / "file").write_bytes(DATA[:5000])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with web_server(tmp_path, context) as server:
        url = server.url.replace("http:", "https:")
        remote = open_remote(url, SETTINGS)
        with pytest.raises(Unreachable, match="certificate is not valid") as caught:
            read_into(remote, "file", 0, memoryview(bytearray(10)))
        assert not isinstance(caught.value, Interrupted)
        remote.close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
            patch.setenv("HOME", str(tmp_path))
            netrc = tmp_path / ".netrc"
            netrc.write_text("machine 127.0.0.1 login me password mine\n")
            netrc.chmod(0o600)
            seen: list[str | None] = []
            server.fault = lambda handler, path, count: seen.append(handler.headers.get("Authorization")) is not None
            remote = open_remote(url, SETTINGS)
            view = memoryview(bytearray(1000))
            read_into(remote, "file", 100, view)
            assert view == DATA[100:1100]
            assert seen == ["Basic bWU6bWluZQ=="]
            remote.close()
            netrc.write_text("default login me password mine\n")
            remote = open_remote(url, SETTINGS)
            read_into(remote, "file", 0, memoryview(bytearray(10)))
            assert seen[1:] == [None], "what is meant for no host in particular would go to any"
            remote.close()

            def refuse(handler: Any, path: str, count: int) -> bool:
                handler.answer(401, b"")
                return True

            server.fault = refuse
            for text, mode, says in (
                ("machine other login me password mine\n", 0o600, "as an entry for 127.0.0.1 in the ~/.netrc of its user"),
                ("machine 127.0.0.1 login me password mine\n", 0o644, "is not used: ~/.netrc access too permissive"),
                ("machine 127.0.0.1 login me\npassword: mine\n", 0o600, "is not used: line 2 of it cannot be understood"),
            ):
                netrc.write_text(text)
                netrc.chmod(mode)
                remote = open_remote(url, SETTINGS)
                with pytest.raises(Unauthorised) as refused:
                    read_into(remote, "file", 0, memoryview(bytearray(10)))
                assert says in str(refused.value)
                assert "mine" not in str(refused.value)
                remote.close()


@pytest.mark.slow
def test_no_credential_is_in_what_s3_says(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = s3_remote(s3, "secrets", monkeypatch)
    for path in ("a", "b/c"):
        with pytest.raises(NotFound) as caught:
            read_into(remote, path, 0, memoryview(bytearray(10)))
        assert f"s3://secrets/some/where/{path}" in str(caught.value)
        assert "testing" not in str(caught.value)
        assert "Signature" not in str(caught.value)
    remote.close()


@pytest.mark.slow
def test_uploads_that_were_broken_off_are_ended_and_no_others(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    s3_remote(s3, "broken", monkeypatch).close()
    client = boto3.client("s3", endpoint_url=s3)
    file = f"{'a' * 64}/exec2/partition_0.bin"
    keys = [f"some/where/{file}", f"some/where/{file}.other", "some/where/else", f"some/{file}"]

    def begin(key: str) -> str:
        upload = str(client.create_multipart_upload(Bucket="broken", Key=key)["UploadId"])
        client.upload_part(Bucket="broken", Key=key, UploadId=upload, PartNumber=1, Body=b"x")
        return upload

    def there() -> set[str]:
        return {each["UploadId"] for each in client.list_multipart_uploads(Bucket="broken").get("Uploads", ())}

    uploads = [begin(key) for key in keys]

    def write() -> None:
        remote = s3_remote(s3, "broken", monkeypatch)
        remote.write(file, len(DATA), lambda offset, length: memoryview(DATA)[offset : offset + length], lambda count: None)
        assert remote.size(file) == len(DATA)
        remote.close()

    write()
    assert there() == {*uploads}, "they may be going on, at another node"
    monkeypatch.setattr(s3_module, "STALE_S", -60.0)
    write()
    assert there() == {*uploads[2:]}
    client.close()


@pytest.mark.slow
@pytest.mark.parametrize("why", ["ReadTimeoutError", "ConnectTimeoutError"])
@pytest.mark.parametrize("made", [True, False, None])
def test_an_upload_whose_last_answer_is_lost_is_there_if_the_store_says_so(
    s3: str, monkeypatch: pytest.MonkeyPatch, made: bool | None, why: str
) -> None:
    """``made``: whether it is there; None where the store does not say."""
    from botocore import exceptions
    from botocore.client import BaseClient

    remote = s3_remote(s3, f"lost-{made}-{why}".lower(), monkeypatch)
    remote.write(
        "a/file", len(DATA), lambda offset, length: memoryview(bytes(len(DATA)))[offset : offset + length], lambda _: None
    )
    real = BaseClient._make_api_call

    def lost(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        completes = operation == "CompleteMultipartUpload"
        answer = real(client, operation, arguments) if made or not completes else None
        if completes:
            raise getattr(exceptions, why)(endpoint_url=s3)
        if made is None and operation == "HeadObject":
            raise exceptions.EndpointConnectionError(endpoint_url=s3)
        return answer

    monkeypatch.setattr(BaseClient, "_make_api_call", lost)
    with contextlib.nullcontext() if made else pytest.raises(SllmError, match=rf"does not answer \({why}\)"):
        remote.write("a/file", len(DATA), lambda offset, length: memoryview(DATA)[offset : offset + length], lambda _: None)
    assert remote.read("a/file", len(DATA)) == (DATA if made else bytes(len(DATA)))
    remote.close()


def test_what_s3_says_means() -> None:
    kinds = {
        ("NoSuchUpload", 404): Interrupted,  # another publish took it for broken off
        ("NoSuchKey", 404): NotFound,
        ("XMinioStorageFull", 507): OutOfSpace,
        ("", 503): Interrupted,
        ("AccessDenied", 403): Unauthorised,
    }
    for (code, status), kind in kinds.items():
        assert isinstance(s3_module._explain(code, status, "s3://a/b"), kind), code
    assert "no such bucket; make it" in s3_module._explain("NoSuchBucket", 404, "s3://a/b").message


def test_s3_without_credentials_or_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    nobody = socket.socket()
    nobody.bind(("127.0.0.1", 0))  # and does not listen, so that nobody else does there
    settings = RemoteSettings(s3_endpoint=f"http://127.0.0.1:{nobody.getsockname()[1]}", attempts=1)
    remote = open_remote("s3://bucket", settings)
    with pytest.raises(Unauthorised, match="no credentials for S3"):
        remote.size("a")
    remote.close()
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    remote = open_remote("s3://bucket", settings)
    with pytest.raises(Interrupted, match="does not answer"):
        remote.size("a")
    with pytest.raises(Interrupted):
        read_into(remote, "a", 0, memoryview(bytearray(10)))
    remote.close()
    nobody.close()


def test_nodes_that_write_the_same_to_a_share_do_not_meet(tmp_path: Path) -> None:
    """As two nodes whose processes have the same number."""
    first, second = (open_remote(f"file://{tmp_path}", SETTINGS) for _ in range(2))

    def source(offset: int, length: int) -> memoryview:
        if length == 5000:
            second.write("a/b/file", 4999, lambda offset, length: memoryview(DATA)[:length], lambda count: None)
        return memoryview(DATA)[offset : offset + length]

    first.write("a/b/file", 5000, source, lambda count: None)
    assert (tmp_path / "a/b/file").read_bytes() == DATA[:5000]
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["file"]


def test_what_a_killed_publish_left_in_a_share_goes(tmp_path: Path) -> None:
    remote = open_remote(f"file://{tmp_path}", SETTINGS)
    (tmp_path / "a/b").mkdir(parents=True)
    old, young, other = (tmp_path / "a/b" / name for name in (".0123456789ab.part", ".ab0123456789.part", ".hidden.part"))
    for path in (old, young, other):
        path.write_bytes(b"x")
    for path in (old, other):
        os.utime(path, (0, time.time() - 4000))
    remote.write("a/b/file", 5000, lambda offset, length: memoryview(DATA)[offset : offset + length], lambda count: None)
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"file", young.name, other.name}
    remote.close()


_KILLED = """
import signal, sys
from agent.store.remote import directory
from agent.store.remote.open import open_remote
from schema.remote import RemoteSettings

directory._WRITE_BYTES, directory._WRITERS = 4096, 1
data = b"".join(number.to_bytes(4, "big") for number in range(10240))

def source(offset, length):
    if offset == 6 * 4096:
        print("there", flush=True)
        signal.pause()
    return memoryview(data)[offset : offset + length]

open_remote(sys.argv[1], RemoteSettings()).write("a/b/file", len(data), source, lambda count: None)
"""


def _left_by_a_killed_write(share: Path) -> Path:
    """The file of a write to a/b/file of this share, which was killed when some of it was there."""
    with subprocess.Popen([sys.executable, "-c", _KILLED, f"file://{share}"], stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"there\n"
        killed.kill()
    (left,) = (share / "a/b").iterdir()
    return left


def test_a_write_to_a_share_goes_on_with_what_a_killed_one_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are compared: what is not right, or not there, is written anew."""
    url, data = f"file://{tmp_path}", NUMBERED
    left = _left_by_a_killed_write(tmp_path)
    assert left.read_bytes() == data[: 6 * 4096]
    with left.open("r+b") as file:
        file.seek(2 * 4096 + 17)
        file.write(b"wrong")
    monkeypatch.setattr(directory, "_WRITE_BYTES", 4096)
    written: list[int] = []
    real = os.pwrite

    def watched(descriptor: int, view: memoryview, offset: int) -> int:
        written.append(offset // 4096)
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    remote, counted = open_remote(url, SETTINGS), 0

    def count(size: int) -> None:
        nonlocal counted
        counted += size

    remote.write("a/b/file", len(data), lambda offset, length: memoryview(data)[offset : offset + length], count)
    assert sorted(written) == [2, 6, 7, 8, 9]
    assert counted == len(data)
    assert (tmp_path / "a/b/file").read_bytes() == data
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["file"]
    remote.close()


def test_what_a_write_goes_on_with_is_not_taken_for_left_however_long_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what lies there already nothing is written, which alone would tell others that somebody is at it."""
    url, data = f"file://{tmp_path}", NUMBERED
    left = _left_by_a_killed_write(tmp_path)
    left.write_bytes(data)
    monkeypatch.setattr(directory, "_WRITE_BYTES", 4096)
    monkeypatch.setattr(directory, "_WRITERS", 1)
    remote, other = (open_remote(url, SETTINGS) for _ in range(2))
    long_ago = (0, time.time() - 4000)
    os.utime(left, long_ago)

    def source(offset: int, length: int) -> memoryview:
        other.write("a/b/other", 4, lambda offset, length: memoryview(data)[:4], lambda count: None)
        (part,) = (tmp_path / "a/b").glob(".*.file.part")
        os.utime(part, long_ago)  # so long did this part take
        return memoryview(data)[offset : offset + length]

    remote.write("a/b/file", len(data), source, lambda count: None)
    assert (tmp_path / "a/b/file").read_bytes() == data
    for each in (remote, other):
        each.close()


def test_a_cancel_is_heard_while_what_was_left_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, data = f"file://{tmp_path}", NUMBERED
    left = _left_by_a_killed_write(tmp_path)
    left.write_bytes(data)  # nothing of it need be written
    monkeypatch.setattr(directory, "_WRITE_BYTES", 4096)
    remote = open_remote(url, SETTINGS)
    with pytest.raises(Cancelled):
        remote.write(
            "a/b/file", len(data), lambda offset, length: memoryview(data)[offset : offset + length], lambda _: remote.abort()
        )
    assert not list((tmp_path / "a/b").iterdir())
    remote.close()


def test_a_write_to_a_share_that_is_interrupted_goes_on_and_one_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_WRITE_BYTES", 4096)
    monkeypatch.setattr(directory, "_WRITERS", 1)
    remote, data, written = open_remote(f"file://{tmp_path}", SETTINGS), NUMBERED, list[int]()
    real, codes = os.pwrite, [errno.EIO, errno.ENOSPC]

    def breaking(descriptor: int, view: memoryview, offset: int) -> int:
        if offset == 4 * 4096 and codes:
            raise OSError(codes[0], os.strerror(codes.pop(0)))
        written.append(offset // 4096)
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", breaking)

    def write() -> None:
        remote.write("file", len(data), lambda offset, length: memoryview(data)[offset : offset + length], lambda count: None)

    with pytest.raises(Interrupted):
        write()
    assert written[:4] == [0, 1, 2, 3]
    with pytest.raises(OutOfSpace):
        write()
    assert len(written) == len({*written}), "what was there is not written again"
    assert list(tmp_path.iterdir()) == []
    write()
    assert (tmp_path / "file").read_bytes() == data
    remote.close()


def test_a_share_that_is_not_mounted_is_no_empty_one(tmp_path: Path) -> None:
    remote = open_remote(f"file://{tmp_path}/share", SETTINGS)
    for ask in (
        lambda: remote.size("a"),
        lambda: remote.children("a"),
        lambda: remote.write("a", 1, lambda offset, length: memoryview(b"x"), lambda count: None),
    ):
        with pytest.raises(NotFound, match="mount the share"):
            ask()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/a", "/a/b", "file://host/a", "file:a", "http://", "https:///a", "s3://", "http://me:secret@host/a",
        "s3://key:secret@bucket", "https://host/a?token=secret", "https://host/a#b", "http://host:port/", "file:///a/../b",
        "http://host/a b", "http://[::1/", "s3://b/\n", "",
    ],
)  # fmt: skip
def test_urls_that_are_no_remote(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_remote_url(url)
    assert "secret" not in str(caught.value)


def test_a_url_has_one_form() -> None:
    assert check_remote_url("s3://bucket/a/") == "s3://bucket/a"
    assert check_remote_url("file:///srv/models") == "file:///srv/models"
    assert check_remote_url("https://host") == "https://host"
