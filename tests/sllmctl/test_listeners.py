import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from schema.errors import Conflict, InvalidInput
from sllmctl.listeners import bind_tcp, bind_unix


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="sl") as name:
        yield Path(name)


def test_a_taken_port_is_a_conflict_that_names_it() -> None:
    with bind_tcp("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(Conflict, match=f"port {port}"):
            bind_tcp("127.0.0.1", port)


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(InvalidInput, match="cannot listen"):
        bind_tcp(host, 0, anywhere=True)


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "host", ["0.0.0.0", pytest.param("::", marks=pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6"))]
)
def test_an_address_that_others_reach_takes_consent(host: str) -> None:
    with pytest.raises(InvalidInput, match="without_keys"):
        bind_tcp(host, 0)
    bind_tcp(host, 0, anywhere=True).close()


def test_the_admin_socket_is_for_its_owner_alone(directory: Path) -> None:
    with bind_unix(directory / "admin.sock"):
        assert stat.S_IMODE((directory / "admin.sock").stat().st_mode) == 0o600


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(directory: Path) -> None:
    path = directory / "admin.sock"
    bind_unix(path).close()
    assert path.exists()
    with bind_unix(path), pytest.raises(Conflict, match="another manager"):
        bind_unix(path)


def test_a_file_in_the_way_is_kept(directory: Path) -> None:
    path = directory / "admin.sock"
    path.write_text("precious")
    with pytest.raises(Conflict, match="not a socket"):
        bind_unix(path)
    assert path.read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_refused(directory: Path) -> None:
    with pytest.raises(InvalidInput, match="longer than"):
        bind_unix(directory / ("x" * 100))


def test_a_directory_that_is_not_there_is_named(directory: Path) -> None:
    with pytest.raises(InvalidInput, match="missing"):
        bind_unix(directory / "missing" / "admin.sock")


def test_a_bound_port_accepts(directory: Path) -> None:
    with bind_tcp("127.0.0.1", 0) as server, socket.create_connection(server.getsockname()[:2], timeout=60):
        pass
