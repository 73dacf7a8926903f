import errno
import os
import pathlib
import subprocess
import sys

import pytest

from effscale import atomic as module
from effscale.atomic import atomic_file, atomic_folder
from effscale.data import DiskFullError
from effscale.data.writer import TokenStoreWriter


def test_the_folder_appears_when_the_block_ends(tmp_path):
    with atomic_folder(tmp_path / "deep" / "a") as work:
        (work / "file").write_text("x")
        assert not (tmp_path / "deep" / "a").exists()
    assert (tmp_path / "deep" / "a" / "file").read_text() == "x"


def fail_in_folder(folder, content, error, **options):
    with atomic_folder(folder, **options) as work:
        (work / "file").write_text(content)
        raise error


def test_an_exception_leaves_nothing_and_the_old_folder_in_place(tmp_path):
    with atomic_folder(tmp_path / "a") as work:
        (work / "file").write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        fail_in_folder(tmp_path / "a", "new", RuntimeError("stop"), overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "old"


def write_to_a_full_disk(folder, buffering):
    with TokenStoreWriter(folder, vocab_size=10) as writer:
        # /dev/full answers every write with ENOSPC, as a full disk would.
        writer._tokens._stream.close()
        writer._tokens._stream = open("/dev/full", "wb", buffering=buffering)  # noqa: SIM115
        writer.add_document([1, 2, 3] * 100)


# The small buffer fails at a write, the large one at the last flush.
@pytest.mark.parametrize("buffering", [16, 1 << 16])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, buffering):
    message = r"the disk is full .*store.*incomplete files were removed"
    with pytest.raises(DiskFullError, match=message) as caught:
        write_to_a_full_disk(tmp_path / "store", buffering)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_once_also_where_one_write_is_part_of_another(tmp_path):
    full = OSError(errno.ENOSPC, "no space left")
    with (
        pytest.raises(DiskFullError) as caught,
        atomic_folder(tmp_path / "outer") as work,
        atomic_file(work / "inner"),
    ):
        raise full
    assert str(caught.value).count("the disk is full") == 1
    assert f"while writing '{tmp_path}/outer'" in str(caught.value)


def test_other_errors_of_the_system_pass_through(tmp_path):
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")


KILLED = """
import os, signal, sys
from effscale.data.writer import TokenStoreWriter
with TokenStoreWriter(sys.argv[1], vocab_size=10) as writer:
    writer.add_document([1, 2, 3])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "store")], check=False)
    assert process.returncode < 0
    assert not (tmp_path / "store").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".store.tmp-")
    own = tmp_path / module._temporary_name(pathlib.Path("store"), "tmp")
    own.mkdir()
    with TokenStoreWriter(tmp_path / "store", vocab_size=10) as writer:
        writer.add_document([1])
    # The folder of a living process, such as this one, stays.
    assert {entry.name for entry in tmp_path.iterdir()} == {"store", own.name}


def test_the_slower_of_two_writers_is_told(tmp_path):
    slow = atomic_folder(tmp_path / "a")
    (slow.__enter__() / "file").write_text("slow")
    with atomic_folder(tmp_path / "a") as fast:
        (fast / "file").write_text("fast")
    with pytest.raises(FileExistsError, match="another process"):
        slow.__exit__(None, None, None)
    assert (tmp_path / "a" / "file").read_text() == "fast"
    assert os.listdir(tmp_path) == ["a"]


def test_the_old_folder_returns_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("old")
    rename = os.rename

    def fail_once(source, target):
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with (
        pytest.raises(OSError, match="input/output"),
        atomic_folder(tmp_path / "a", overwrite=True),
    ):
        pass
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
