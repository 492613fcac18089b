"""A node's logs, page by page: tails, ages, files put aside meanwhile, and writers that are dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.config import NodeConfig
from agent.daemon.logs import NodeLogs
from schema.link import LogChunk, ReadLog
from schema.logs import stamp


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    (tmp_path / "log" / "instances").mkdir(parents=True)
    return NodeConfig(run_dir=str(tmp_path), data_dir=str(tmp_path))


def put(config: NodeConfig, name: str, *lines: str) -> Path:
    path = config.log_path / "instances" / f"{name}.log"
    with path.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))
    return path


def texts(chunk: LogChunk) -> list[str]:
    assert chunk.fault is None
    return [f"{line.source}:{line.text}" for line in chunk.lines]


def after(chunk: LogChunk, **wanted: str) -> ReadLog:
    return ReadLog(op="x", cursors=chunk.cursors, **wanted)


def test_the_last_lines_of_each_instance_then_what_is_written(config: NodeConfig) -> None:
    logs = NodeLogs(config)
    put(config, "m@i1", "a", "b", "c")
    put(config, "m@i2", "d")
    put(config, "mm@i3", "other")
    first = logs.read(ReadLog(op="x", model="m", tail=2))
    assert texts(first) == ["i1:b", "i1:c", "i2:d"]
    assert not first.more
    assert texts(second := logs.read(after(first, model="m"))) == []
    put(config, "m@i2", "e")
    put(config, "m@i4", "new")
    assert texts(third := logs.read(after(second, model="m"))) == ["i2:e", "i4:new"]
    assert texts(logs.read(after(third, model="m"))) == []
    assert texts(logs.read(ReadLog(op="x", instance="i3", tail=9))) == ["i3:other"]
    assert texts(logs.read(ReadLog(op="x", model="m", tail=0))) == []


def test_a_line_is_told_of_once_it_is_whole(config: NodeConfig) -> None:
    logs = NodeLogs(config)
    path = put(config, "m@i", "a")
    with path.open("a") as file:
        file.write("half")
    first = logs.read(ReadLog(op="x", instance="i", tail=9))
    assert texts(first) == ["i:a"]
    put(config, "m@i", " done")
    assert texts(logs.read(after(first, instance="i"))) == ["i:half done"]


def test_what_was_put_aside_is_read_to_its_end_first(config: NodeConfig) -> None:
    logs = NodeLogs(config)
    path = put(config, "m@i", "a", "b")
    first = logs.read(ReadLog(op="x", instance="i", tail=1))
    put(config, "m@i", "c")
    path.replace(f"{path}.1")
    put(config, "m@i", "d")
    assert texts(logs.read(after(first, instance="i"))) == ["i:c", "i:d"]
    assert texts(logs.read(ReadLog(op="x", instance="i", tail=3))) == ["i:b", "i:c", "i:d"]


def test_only_what_is_young_enough(config: NodeConfig) -> None:
    logs = NodeLogs(config)
    now = time.time()
    put(config, "m@i", f"{stamp(now - 7200)} old", f"{stamp(now)} new", "  its trace")
    assert [line[-5:] for line in texts(logs.read(ReadLog(op="x", instance="i", tail=9, newer_s=3600)))] == ["Z new", "trace"]
    assert len(texts(logs.read(ReadLog(op="x", instance="i", tail=9, newer_s=1e308)))) == 3


def test_more_than_a_page_comes_in_pages(config: NodeConfig) -> None:
    logs = NodeLogs(config)
    put(config, "m@i", *(f"{n:06} {'x' * 1000}" for n in range(1000)))
    put(config, "m@j", "other")
    chunk = logs.read(ReadLog(op="x", model="m", tail=1000))
    found, pages = texts(chunk), 1
    while chunk.more:
        chunk = logs.read(after(chunk, model="m"))
        found, pages = found + texts(chunk), pages + 1
    assert [line[2:8] for line in found] == [f"{n:06}" for n in range(1000)] + ["other"]
    assert pages > 3


def test_faults_are_told(config: NodeConfig) -> None:
    logs = NodeLogs(config)
    for wanted, code in ((ReadLog(op="x", instance="none"), "not_found"), (ReadLog(op="x", process="../x"), "invalid_input")):
        chunk = logs.read(wanted)
        assert chunk.fault is not None
        assert chunk.fault.code == code


def test_old_logs_of_what_is_gone_are_removed(config: NodeConfig) -> None:
    for number in range(70):
        os.utime(put(config, f"m@i{number}", "x"), (number, number))
    NodeLogs(config).tidy(running={"i2"}, ended={"i3"})
    left = sorted(int(path.name[3:-4]) for path in (config.log_path / "instances").iterdir())
    assert left == [2, 3, *range(7, 70)], "one that has been quiet for long keeps its own"


WRITER = """
import logging, pathlib, sys
from agent.config import NodeConfig
from agent.logs import OutputFile, write_to
from schema.logs import LineFormatter, install
path = pathlib.Path(sys.argv[1])
write_to(path)
install(OutputFile(path, 2000), LineFormatter("worker", "console"), "info")
for number in range(100):
    logging.getLogger("x").info("line %d", number)
    print("printed", number, flush=True)
"""


def test_a_process_keeps_its_own_file_within_bounds_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    subprocess.run([sys.executable, "-c", WRITER, str(path)], check=True, timeout=60)
    kept = (tmp_path / "w.log.1").read_text() + path.read_text()
    assert path.stat().st_size < 2200
    assert len(kept) < 4400
    numbers = [int(line.rpartition(" ")[2]) for line in kept.splitlines()]
    assert numbers == sorted(numbers)
    assert numbers[-2:] == [99, 99]
    assert len(numbers) == 2 * len(set(numbers)) or numbers.count(numbers[0]) == 1
