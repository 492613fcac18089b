"""What `sllmctl doctor` looks at in what lies on the disk: the database, who may reach what, and what was left behind."""

from __future__ import annotations

import os
import shlex
import sqlite3
import stat
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec.structs import replace

from sllmctl.cli.findings import Finding, existing, read_text, seen
from sllmctl.cli.format import age, size
from sllmctl.cli.looks import Check, Look

if TYPE_CHECKING:
    from sllmctl.config import Settings

__all__ = [
    "Database",
    "Leftover",
    "Reach",
    "check_state",
    "database",
    "database_facts",
    "generation",
    "leftover_facts",
    "leftovers",
    "permissions",
    "reach",
    "schema_revision",
    "state_disk",
    "wal",
]

_CHECK_S = 5.0
_CHECK_STEPS = 10_000
_WAL_WARN_BYTES = 64 << 20
_STATE_FAULT_BYTES, _STATE_WARN_BYTES = 64 << 20, 1 << 30
_FEW_FILES = 0.01
_LEFT_WARN_BYTES = 1 << 30
_FRESH_S = 3600.0
_NAMED = 5


class Database(msgspec.Struct, frozen=True):
    """What a look at the file shows; ``why`` says more where it is unreadable, unchecked or damaged.

    "empty": a file without tables, which the first start fills. "foreign": with tables, but none of ours. "unchecked": not
    looked through, or not to its end.
    """

    path: Path
    state: Literal["absent", "empty", "foreign", "unreadable", "unchecked", "damaged", "whole"] = "whole"
    why: str = ""
    revision: str | None = None
    cluster: str = ""
    generation: int = 0
    size_bytes: int = 0
    wal_bytes: int = 0
    backup: Path | None = None


class Reach(msgspec.Struct, frozen=True):
    """Who may reach a file of ours: its owner, and the rights of others that the directories above it let through."""

    path: Path
    owner: int
    others: int
    secret: bool


class Leftover(msgspec.Struct, frozen=True):
    """``held``: a process works on it."""

    path: Path
    size_bytes: int
    age_s: float
    held: bool


class _Identity(msgspec.Struct, frozen=True):
    cluster: str = ""
    generation: int = 0


def check_state(settings: Settings, file: Path | None, *, running: bool) -> list[Check]:
    """Checks of the state directory and the node's directories; ``file`` is the configuration that was read, if any."""
    from sllmctl.bundle import old_builds, unpacked_root
    from sllmctl.state.engines import database_path
    from sllmctl.state.migrate import revisions

    _, path = database_path(settings.database_url)
    run, data = Path(settings.node.run_dir), Path(settings.node.data_dir)
    identity = data / "identity.json"
    secrets = (settings.admin_socket, run / "agent.sock", run / "agent.token", run / "node.json", path)
    head, known = revisions()
    facts = Look(lambda: database_facts(path, settings.state_dir / "backups"))

    def reached() -> Finding:
        found = [reach(each, secret=True) for each in secrets]
        found += [reach(each, secret=False) for each in (settings.state_dir, run, data, *([file] if file else []))]
        return permissions([each for each in found if each is not None], os.geteuid())

    def room() -> Finding:
        above = existing(path.parent)
        return state_disk(above, os.statvfs(above))

    def left() -> Finding:
        root = unpacked_root()
        builds = [] if root is None else [_leftover(each, set()) for each in old_builds(root)]
        return leftovers([*leftover_facts(data), *builds], settings.node.remote.keep_partial_s)

    return [
        ("database", lambda: database(facts.get())),
        ("schema", lambda: schema_revision(facts.get(), head, known, running=running)),
        ("wal", lambda: wal(facts.get())),
        ("generation", lambda: generation(facts.get(), identity, _identity(identity))),
        ("permissions", reached),
        ("state_disk", room),
        ("leftovers", left),
    ]


def database_facts(path: Path, backups: Path) -> Database:
    """Read without a lock that a manager would wait for, and without a trace.

    Without a write-ahead log nobody has it open, and it is read as a file that stands still. With one, its index is only read
    too; where that is missing SQLite would make it, so that is left to the next start.
    """
    log, index = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
    if not seen(path):
        return Database(path, "absent")
    facts = Database(
        path,
        size_bytes=path.stat().st_size,
        wal_bytes=log.stat().st_size if seen(log) else 0,
        backup=_newest(backups),
    )
    if seen(log) and not seen(index):
        return replace(facts, state="unchecked", why="its write-ahead log has no index (-shm), which the next start makes")
    how = "mode=ro&readonly_shm=1" if seen(log) else "immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True, timeout=_CHECK_S)) as connection:
            return _looked_through(connection, facts)
    except sqlite3.Error as error:
        damaged = error.sqlite_errorname.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR"))
        return replace(facts, state="damaged" if damaged else "unreadable", why=str(error))


def _looked_through(connection: sqlite3.Connection, facts: Database) -> Database:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "alembic_version" not in tables:
        return replace(facts, state="foreign" if tables else "empty")
    (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone() or (None,)
    cluster = connection.execute("SELECT uuid, generation FROM cluster").fetchone() or ("", 0)
    facts = replace(facts, revision=revision, cluster=cluster[0], generation=cluster[1])
    deadline = time.monotonic() + _CHECK_S
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _CHECK_STEPS)
    try:
        (damage,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname != "SQLITE_INTERRUPT":
            raise
        return replace(facts, state="unchecked", why=f"that takes over {_CHECK_S:g} s; no damage so far")
    return facts if damage == "ok" else replace(facts, state="damaged", why=" ".join(damage.split()))


def database(facts: Database) -> Finding:
    """SQLite's own quick check, as far as it comes within its time."""
    match facts.state:
        case "absent" | "empty":
            return Finding("database", "ok", f"{facts.path} is made at the first start")
        case "foreign":
            text = f"{facts.path} holds tables of something else"
            return Finding("database", "fault", text, "name another file in database_url, or move that one away")
        case "unreadable":
            advice = "it may be another user's, as the findings of permissions and state_dir tell, or its disk fail (`dmesg`)"
            return Finding("database", "fault", f"{facts.path} cannot be read: {facts.why}", advice)
        case "unchecked":
            advice = f'`sqlite3 {_quoted(facts.path)} "PRAGMA quick_check"` takes its time'
            return Finding("database", "warn", f"{facts.path} was not looked through: {facts.why}", advice)
        case "damaged":
            advice = "stop the manager, move it and its -wal and -shm away together"
            if facts.backup is not None:
                advice += f", and put the newest backup in its place: `{_restore(facts.path, facts.backup)}`"
            return Finding("database", "fault", f"{facts.path} is damaged: {facts.why}", advice)
    return Finding("database", "ok", f"{facts.path} is whole, {size(facts.size_bytes)}")


def schema_revision(facts: Database, head: str | None, known: set[str], *, running: bool) -> Finding:
    """An older one is migrated, after a backup, by the next start; a newer one is refused."""
    if facts.state in ("absent", "empty"):
        return Finding("schema", "ok", f"the first start makes revision {head}")
    if facts.revision is None:
        return Finding("schema", "ok", "not known: the finding of the database says why")
    if facts.revision == head:
        return Finding("schema", "ok", f"schema revision {head}")
    if facts.revision not in known:
        text = f"the database has schema revision {facts.revision}, which this build (revision {head}) does not know"
        advice = "run the newer sllmctl that wrote it"
        if facts.backup is not None:
            advice += f"; or stop it, move the database and its -wal and -shm away, and `{_restore(facts.path, facts.backup)}`"
        return Finding("schema", "fault", text, advice)
    text = f"schema revision {facts.revision} is older than this build's {head}"
    if running:
        return Finding("schema", "warn", f"{text}: an older manager runs", "restart it with this build: `sllmctl serve`")
    return Finding("schema", "ok", f"{text}; the next start migrates it, after a backup")


def wal(facts: Database) -> Finding:
    """It grows while a reader stays in one transaction, and is folded in when the manager ends."""
    if facts.wal_bytes <= _WAL_WARN_BYTES:
        return Finding("wal", "ok", f"the write-ahead log has {size(facts.wal_bytes)}")
    text = f"the write-ahead log of {facts.path} has grown to {size(facts.wal_bytes)}"
    advice = f"end what keeps reading it (`sudo fuser -v {_quoted(facts.path)}-wal`), then restart the manager"
    return Finding("wal", "warn", text, advice)


def generation(facts: Database, path: Path, identity: _Identity | Exception | None) -> Finding:
    """A node takes no manager of another cluster, and none older than the newest that it has seen: a restored database is.

    ``identity``: what the node has written down in ``path``, or why that cannot be read.
    """
    if isinstance(identity, PermissionError):
        return Finding("generation", "ok", f"not known: {path} is not this user's to read")
    if isinstance(identity, Exception):
        advice = f"restore it, or `rm {_quoted(path)}`: then the node takes the next manager that comes"
        return Finding("generation", "fault", f"{path} cannot be read, and so no node starts: {identity}", advice)
    if identity is None or not identity.cluster:
        return Finding("generation", "ok", "the node has met no manager yet")
    if facts.state in ("absent", "empty"):
        text = f"the node in {path.parent} belongs to cluster {identity.cluster}, and a start without a database makes another"
        return Finding(
            "generation", "fault", text, f"put the database back, or `rm {_quoted(path)}` gives the node to the new one"
        )
    if not facts.cluster:
        return Finding("generation", "ok", "not known: the finding of the database says why")
    if identity.cluster != facts.cluster:
        text = f"the node in {path.parent} belongs to cluster {identity.cluster}, the database to {facts.cluster}"
        return Finding("generation", "fault", text, f"`rm {_quoted(path)}` gives it to this cluster, or set node.data_dir")
    if identity.generation > facts.generation:
        text = f"the node has seen manager generation {identity.generation}, the database is at {facts.generation}"
        advice = f"an older database was put back? Then stop node and manager, and `rm {_quoted(path)}`"
        return Finding("generation", "fault", f"{text}: it takes no older manager", advice)
    return Finding("generation", "ok", f"manager generation {facts.generation}; the node has seen {identity.generation}")


def permissions(found: Sequence[Reach], user: int) -> Finding:
    """What others can read or write that steers the manager or opens the node, and what is not this user's."""
    foreign = [each for each in found if each.owner != user and (each.owner != 0 or each.secret) and user != 0]
    if foreign:
        text = ", ".join(f"{each.path} (user {each.owner})" for each in foreign)
        paths = _quoted(*(each.path for each in foreign))
        return Finding(
            "permissions", "fault", f"not this user's: {text}", f"`sudo chown -R {user} {paths}`, or run as that user"
        )
    open_to = [each for each in found if each.others & (0o066 if each.secret else 0o022)]
    if open_to:
        text = ", ".join(f"{each.path} ({each.others:03o})" for each in open_to)
        paths = _quoted(*(each.path for each in open_to))
        steered = any(each.secret or each.others & 0o002 for each in open_to)
        return Finding("permissions", "fault" if steered else "warn", f"others can reach: {text}", f"`chmod go-rwx {paths}`")
    return Finding("permissions", "ok", f"{len(found)} files and directories, reached by their owner alone")


def reach(path: Path, *, secret: bool) -> Reach | None:
    """The facts of one path; None where there is nothing, or nothing that may be looked at."""
    try:
        status = path.stat()
        others = stat.S_IMODE(status.st_mode) & 0o077
        for above in path.resolve().parents:
            mode = above.stat().st_mode
            others &= (0o070 if mode & 0o010 else 0) | (0o007 if mode & 0o001 else 0)
    except OSError:
        return None
    return Reach(path, status.st_uid, others, secret)


def state_disk(path: Path, figures: os.statvfs_result) -> Finding:
    """Without room the manager can write no intent, and so starts nothing."""
    free = figures.f_bavail * figures.f_frsize
    text = f"{size(free)} free for the database at {path}"
    advice = f"free some (`du -xh {_quoted(path)} | sort -h | tail` names the largest), or set state_dir"
    if free < _STATE_FAULT_BYTES:
        return Finding("state_disk", "fault", text, advice)
    if figures.f_files and figures.f_favail < _FEW_FILES * figures.f_files:
        text = f"{figures.f_favail} of {figures.f_files} files (inodes) are left at {path}"
        return Finding("state_disk", "fault" if not figures.f_favail else "warn", text, "remove what made so many files")
    return Finding("state_disk", "warn" if free < _STATE_WARN_BYTES else "ok", text, advice if free < _STATE_WARN_BYTES else "")


def leftover_facts(data: Path) -> list[Leftover]:
    """What lies in the node's directories of things under way, and whether a process holds it (flock, by /proc/locks)."""
    held = {line.split()[5].rpartition(":")[2] for line in read_text(Path("/proc/locks")).splitlines() if "FLOCK" in line}
    found = []
    for directory in (data / "tmp", data / "partial"):
        try:
            within = sorted(directory.iterdir())
        except OSError:
            continue  # there is none, or it is not ours to look at, which is another finding
        found += [_leftover(path, held) for path in within if path.is_dir() and not path.is_symlink()]
    return found


def leftovers(found: Sequence[Leftover], keep_s: float) -> Finding:
    """What was broken off: kept to be gone on with, then swept by the next ingest, fetch or agent, which may never come."""
    left = [each for each in found if not each.held and each.age_s > _FRESH_S]
    total = sum(each.size_bytes for each in left)
    if not left:
        return Finding("leftovers", "ok", "nothing was left behind")
    shown = ", ".join(f"{each.path} ({size(each.size_bytes)}, {age(each.age_s)})" for each in left[:_NAMED])
    text = f"{size(total)} left behind: {shown}" + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else "")
    if total < _LEFT_WARN_BYTES and all(each.age_s < keep_s for each in left):
        return Finding("leftovers", "ok", f"{text}; the same ingest or fetch goes on with it")
    paths = _quoted(*(each.path for each in left))
    return Finding("leftovers", "warn", text, f"ingest or fetch it again, which goes on with it, or `rm -r {paths}`")


def _quoted(*paths: Path) -> str:
    return shlex.join(str(path) for path in paths)


def _leftover(path: Path, held: set[str]) -> Leftover:
    total, newest = 0, 0.0
    for directory, _, files in os.walk(path):
        for each in (directory, *(os.path.join(directory, name) for name in files)):  # noqa: PTH118
            try:
                status = os.lstat(each)
            except OSError:
                continue  # it is going just now
            total += status.st_blocks * 512
            newest = max(newest, status.st_mtime)
    try:
        inode = str(path.stat().st_ino)
    except OSError:
        inode = ""
    return Leftover(path, total, max(0.0, time.time() - newest), inode in held)


def _identity(path: Path) -> _Identity | Exception | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Identity)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        return error


def _newest(backups: Path) -> Path | None:
    try:
        return max(backups.glob("*.db"), key=lambda each: each.stat().st_mtime, default=None)
    except OSError:
        return None


def _restore(path: Path, backup: Path) -> str:
    return f"cp -p {_quoted(backup, path)}"
