import errno
import logging
import os
import subprocess
import sys

import pytest

from effscale.locks import LockedError, ProcessLock, locked

HOLD = (
    "import sys; from effscale.locks import ProcessLock\n"
    "lock = ProcessLock(sys.argv[1], 'working'); lock.acquire(); print('held', flush=True); sys.stdin.read()"
)


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        mine = ProcessLock(tmp_path / "lock", "writing x")
        with pytest.raises(
            LockedError, match=rf"another process \(pid {holder.pid} on .*\) is writing x"
        ):
            mine.acquire()
        holder.kill()
        mine.acquire(wait=True)
    assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()
    mine.release()


def test_a_reentrant_lock_is_free_after_as_many_releases(tmp_path):
    first, second = (ProcessLock(tmp_path / "lock", "working", reentrant=True) for _ in range(2))
    first.acquire()
    second.acquire()
    first.release()
    other = ProcessLock(tmp_path / "lock", "working")
    with pytest.raises(LockedError):
        other.acquire()
    second.release()
    other.acquire()
    other.release()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path / "cache" / "x", "building x"):
        pass
    assert "x.lock cannot be locked" in caplog.text
    assert "nothing stops another process from building x" in caplog.text
