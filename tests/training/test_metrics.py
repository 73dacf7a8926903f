import contextlib
import io
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from effscale.atomic import DiskFullError
from effscale.training import ConsoleWriter, JsonlWriter, MultiWriter, TensorBoardWriter, read_jsonl
from effscale.training.metrics import MetricsWriter
from effscale.training.plotting import drawn


def test_lines_survive_and_a_half_written_one_does_not(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(1, 6):
        writer.write(step, {"loss": 1 / step}, {"tokens_per_second": 10.0})
        # What is written is there at once, for whoever looks or whatever kills the process.
        assert read_jsonl(path)[-1] == {"step": step, "loss": 1 / step}
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 3, 4, 5]
    writer = JsonlWriter(path)
    writer.write(6, {"loss": 0.1})
    writer.close()
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("resume_step", [0, 3, 5, 9])
def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path, resume_step):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(1, 6):
        writer.write(step, {"loss": 0.1 * step}, {"tokens_per_second": 1.0 * step})
    writer.close()
    whole = path.read_bytes()
    writer = JsonlWriter(path, resume_step=resume_step)
    for step in range(resume_step + 1, 6):
        writer.write(step, {"loss": 0.1 * step}, {"tokens_per_second": 7.0})
    writer.close()
    assert path.read_bytes() == whole
    assert [record["step"] for record in read_jsonl(writer.timing_path)] == [1, 2, 3, 4, 5]


def test_lost_records_are_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\x00p": 2}\n{"step": "3"}\n{"step": 4}\n')
    JsonlWriter(path, resume_step=4).close()
    assert "removing 2 lines that are not records" in caplog.text
    assert read_jsonl(path) == [{"step": 1}, {"step": 4}]
    caplog.clear()
    JsonlWriter(path, resume_step=4).close()
    assert not caplog.text
    JsonlWriter(path, resume_step=0).close()
    assert "removing 2 records, as the run starts again at step 0" in caplog.text
    path.unlink()
    JsonlWriter(path, resume_step=4).close()
    assert "metrics.jsonl is missing: the records up to step 4 are lost" in caplog.text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_named(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer._file.close()
    writer._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(DiskFullError, match=r"the disk is full .*metrics\.jsonl"):
        writer.write(1, {"loss": 1.0})
    with contextlib.suppress(OSError):
        writer._file.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_named_by_events_and_figures(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    records = writer._writer._py_recordio_writer
    records._writer.close()
    records._writer = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(DiskFullError, match="the disk is full"):
        writer.write(1, {"loss": 1.0})
    with contextlib.suppress(OSError):
        records._writer.close()
    full = tmp_path / "loss.png"
    full.symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"the disk is full .*loss\.png"), drawn(full):
        pass


def test_speed_is_kept_apart_and_values_without_a_number_are_null(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(
        1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 3}, {"tokens_per_second": 5.0}
    )
    writer.close()
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "loss": null, "grad_norm": null, "tokens": 3}\n'
    assert json.loads((tmp_path / "timing.jsonl").read_text()) == {
        "step": 1,
        "tokens_per_second": 5.0,
    }


def test_metrics_that_are_arrays_are_lists(tmp_path):
    """From a step as they are, too: arrays on the device and on the host, of any number of dimensions."""
    loads = np.array([[0.1, 0.9], [np.nan, 2.0]], np.float32)
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loads": jnp.asarray(loads), "first": loads[0], "loss": jnp.float32(0.1)})
    writer.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loads": [[0.1, 0.9], [None, 2.0]], "first": [0.1, 0.9], "loss": 0.1}
    ]


def test_tensorboard_events_can_be_read_back(tmp_path):
    from tensorboardX import proto
    from tensorboardX.record_writer import masked_crc32c  # noqa: F401, the reader below relies on this framing

    writer = TensorBoardWriter(tmp_path, resume_step=4)
    loads = np.array([0.5, 0.125], np.float32)
    writer.write(5, {"loss": 0.25, "loads": loads}, {"tokens_per_second": 100.0})
    writer.close()
    (file,) = tmp_path.iterdir()
    content, events = file.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        events.append(proto.event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    scalars = {
        value.tag: (event.step, value.simple_value)
        for event in events
        for value in event.summary.value
    }
    assert scalars == {
        "loss": (5, 0.25),
        "loads/0": (5, 0.5),
        "loads/1": (5, 0.125),
        "tokens_per_second": (5, 100.0),
    }


def test_without_a_terminal_lines_come_now_and_then():
    out = io.StringIO()
    writer = ConsoleWriter(100, every_seconds=3600.0, console=Console(file=out, width=200))
    for step in range(1, 101):
        metrics = {"loss": 2.0, "grad_norm": 1.0, "aux_loss": 0.25, "expert_loss": [0.5, 0.5]}
        writer.write(step, metrics, {"tokens_per_second": 12345.0})
        if step == 50:
            writer.write(step, {"val_loss": 1.5})
    writer.close()
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/100", "step 50/100", "step 100/100"]
    assert "loss 2.0000" in lines[0]
    assert "12,345 tokens/s" in lines[0]
    assert "left" in lines[0]
    assert "val_loss 1.5000" in lines[2]  # the last evaluation stays in sight
    assert "grad_norm" not in out.getvalue()
    assert "expert_loss" not in out.getvalue()  # an array has no place on a line


def test_on_a_terminal_there_is_a_bar():
    out = io.StringIO()
    writer = ConsoleWriter(
        10, start_step=5, console=Console(file=out, force_terminal=True, width=120)
    )
    writer.write(6, {"loss": 2.0}, {"tokens_per_second": 1000.0})
    writer.close()
    text = out.getvalue()
    assert "6/10" in text
    assert "loss 2.0000" in text
    assert "1,000 tokens/s" in text


class Recorder:
    def __init__(self, fails=False):
        self.calls, self.fails = [], fails

    def write(self, step, values, timing=None):
        self.calls.append((step, values, timing))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")
        if self.fails:
            raise OSError("no")


def test_many_writers_as_one():
    first, second = Recorder(fails=True), Recorder()
    assert isinstance(first, MetricsWriter)
    writer = MultiWriter([first, second])
    writer.write(1, {"loss": 1.0}, {"t": 2.0})
    writer.flush()
    with pytest.raises(OSError, match="no"):
        writer.close()
    assert first.calls == second.calls == [(1, {"loss": 1.0}, {"t": 2.0}), "flush", "close"]
