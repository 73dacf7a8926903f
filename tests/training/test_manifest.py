import json
import random
import re

import pytest

from effscale.training import manifest
from effscale.training.manifest import MANIFEST, digest_part, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("model/0", "model/1", "run.json"):
        (tmp_path / name).write_text(f"content of {name}")
    write_manifest(tmp_path)
    assert verify_manifest(tmp_path) is None
    return tmp_path


def test_any_flipped_bit_of_a_manifest_is_found_and_none_crashes(folder):
    whole = (folder / MANIFEST).read_bytes()
    flips = [(place, bit) for place in range(len(whole)) for bit in range(8)]
    for place, bit in random.Random(0).sample(flips, 300):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        (folder / MANIFEST).write_bytes(damaged)
        assert isinstance(verify_manifest(folder), str), bytes(damaged)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        ("[]", "no valid 'files'"),
        ('{"files": []}', "no valid 'files'"),
        ('{"files": {}}', "lists no files"),
        ('{"files": {"run.json": 3}}', "no valid 'bytes'"),
        ('{"files": {"run.json": {"bytes": "3", "blake2b": ""}}}', "no valid 'bytes'"),
        ('{"files": {"run.json": {"bytes": 19}}}', "no valid 'blake2b'"),
        ('{"files": {"../run.json": {"bytes": 19, "blake2b": ""}}}', "outside the folder"),
        ('{"files": {"/run.json": {"bytes": 19, "blake2b": ""}}}', "outside the folder"),
        (
            '{"files": {"' + 5000 * "a" + '": {"bytes": 19, "blake2b": ""}}}',
            "cannot be read|missing",
        ),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_what_is_no_manifest_is_unsound(folder, text, reason):
    (folder / MANIFEST).write_text(text)
    assert re.search(reason, verify_manifest(folder))


def test_a_name_that_became_another_leaves_no_file_unchecked(folder):
    """With model/0 renamed to model/1 in the manifest, nothing would vouch for model/0."""
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("model/0", "model/1"))
    assert len(json.loads((folder / MANIFEST).read_text())["files"]) == 2
    assert "twice" in verify_manifest(folder)


def test_a_lost_entry_is_found_and_manifests_from_before_this_was_recorded_are_valid(folder):
    content = json.loads((folder / MANIFEST).read_text())
    lost = content["files"].pop("model/0")
    (folder / MANIFEST).write_text(json.dumps(content))
    assert "entries have changed" in verify_manifest(folder)
    older = {"files": {"model/0": lost, **content["files"]}}
    (folder / MANIFEST).write_text(json.dumps(older))
    assert verify_manifest(folder) is None


def test_processes_share_the_work(folder, monkeypatch):
    """Each reads its part once, what one of them left out is read by the first, and the damage that one finds is found."""
    parts = [digest_part(folder, index, 2) for index in range(2)]
    assert sorted(map(len, parts)) == [1, 2]
    alone = (folder / MANIFEST).read_bytes()
    read = []
    digest = manifest.digest
    monkeypatch.setattr(manifest, "digest", lambda path: read.append(path.name) or digest(path))
    write_manifest(folder, parts[0] | parts[1])
    assert (read, (folder / MANIFEST).read_bytes()) == ([], alone)
    write_manifest(folder, parts[0])
    assert ({*read}, (folder / MANIFEST).read_bytes()) == (
        {name.rpartition("/")[2] for name in parts[1]},
        alone,
    )
    victim = folder / next(iter(parts[1]))
    victim.write_text(victim.read_text().swapcase())
    found = [verify_manifest(folder, index, 2) for index in range(2)]
    assert found[0] is None
    assert "has changed" in found[1]
