"""Every file of a run damaged at every byte in turn: it reads as it was, or a sentence names it."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmark_rows import PLAIN
from faults.scale import each_damage, scaled
from training.test_training_resume import config, loader, train
from training.tiny_lm import tiny_lm

pytest.importorskip("safetensors")

from aajr_kernels import files
from aajr_kernels.backends.selfcheck_record import Record
from aajr_kernels.training import Diagnostics, read_rows
from aajr_kernels.training.checkpoints import Checkpoint, Checkpoints, Damaged
from aajr_kernels.training.record import Recorder
from bench import row as bench_files
from bench.row import Row
from experiments.store import Store, read


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A whole run."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aajr_kernels.training.report._figure", lambda *_: False)
        train(tiny_lm(), loader(), out, settings=config(diagnostics=Diagnostics(every=2)))
    return out


def all_of(checkpoint: Checkpoint) -> tuple[object, ...]:
    def plain(tree):
        if isinstance(tree, torch.Tensor):
            return tree.dtype, tuple(tree.shape), tree.tolist()
        if isinstance(tree, dict):
            return {key: plain(value) for key, value in tree.items()}
        return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else repr(tree)

    return checkpoint.step, repr(checkpoint.config), plain(checkpoint.weights()), plain(checkpoint.state())


def outcome(read: Callable[[], object]) -> tuple[object, str]:
    """What was read, and the message if that failed."""
    try:
        return read(), ""
    except (ValueError, Damaged) as error:
        return None, str(error)


@scaled(quick=12)
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.safetensors"])
def test_a_damaged_checkpoint_is_as_it_was_or_refused(name, drawn, run):
    path = Checkpoints(run / "checkpoints").newest().path
    whole, content = all_of(Checkpoint(path)), (path / name).read_bytes()
    refused = 0
    try:
        for place, damaged in each_damage(content, drawn(range(len(content)))):
            (path / name).write_bytes(damaged)
            read_back, message = outcome(lambda: all_of(Checkpoint(path)))
            assert read_back == whole or name in message or "its format is" in message, f"byte {place}"
            refused += bool(message)
    finally:
        (path / name).write_bytes(content)
    assert refused


@scaled(quick=40)
@pytest.mark.parametrize("name", Recorder.FILES)
def test_a_damaged_row_is_as_it_was_or_named_and_no_other_row_changes(name, drawn, run):
    path = run / name
    content, rows = path.read_bytes(), read_rows(path)
    assert len(rows) >= 3
    try:
        for place, damaged in each_damage(content, drawn(range(len(content)))):
            path.write_bytes(damaged)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                left = read_rows(path)
            number = content[:place].count(b"\n")
            if left != rows:
                assert said and all(name in str(warning.message) for warning in said), f"byte {place}"
                # an end of a line that is lost joins two
                others = [row for i, row in enumerate(rows) if i not in (number, number + 1)]
                assert [row for row in left if row in others] == others and all(r in rows for r in left)
    finally:
        path.write_bytes(content)


@scaled(quick=6)
def test_a_run_goes_on_over_damaged_rows_and_keeps_the_file_as_it_was(drawn, run, tmp_path):
    content = (run / "metrics.jsonl").read_bytes()
    path, rows = tmp_path / "metrics.jsonl", read_rows(run / "metrics.jsonl")
    path.write_bytes(content)
    for _, damaged in each_damage(content, drawn(range(len(content)))):
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kept = Recorder(tmp_path, rows[-1]["step"], tensorboard=False).rows
        copies = list(tmp_path.glob("metrics.damaged-*.jsonl"))
        if kept != rows:
            assert said and "metrics.jsonl, line" in str(said[0].message)
            assert [copy.read_bytes() for copy in copies] == [damaged]
        assert read_rows(path) == kept
        for copy in copies:
            copy.unlink()


@scaled(quick=40)
def test_damaged_results_of_an_experiment_are_as_they_were_or_named(drawn, tmp_path):
    path = tmp_path / "rows.jsonl"
    store = Store(path, "squares", {"numbers": [1, 2, 3]})
    for n in (1, 2, 3):
        store.add(f"n{n}", [{"number": n, "square": n * n}, {"number": -n, "square": n * n}], 0.0)
    content, whole = path.read_bytes(), read(path)
    for place, damaged in each_damage(content, drawn(range(len(content)))):
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            left, message = outcome(lambda: read(path))
        if left is None:
            assert path.name in message
        elif left != whole:
            header, rows = left
            assert said and all(path.name in str(warning.message) for warning in said), f"byte {place}"
            assert header == whole[0] and all(row in whole[1] for row in rows)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(run, tmp_path):
    """It would have removed the checkpoints and every row."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    for path in Checkpoints(tmp_path / "checkpoints").paths():
        (path / "manifest.json").write_bytes(b"")
    with (
        pytest.warns(RuntimeWarning, match="is skipped"),
        pytest.raises(ValueError, match="all of them damaged"),
    ):
        train(tiny_lm(), loader(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows
    assert len(Checkpoints(tmp_path / "checkpoints").paths()) == 2


def test_a_changed_number_in_a_manifest_is_seen(run, tmp_path):
    """Its digits decide on the rate, the place in the data and the random states."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    manifest = Checkpoints(tmp_path / "checkpoints").newest().path / "manifest.json"
    text = manifest.read_text()
    changed = re.sub(r'"step": 6', '"step": 4', text, count=1)
    assert changed != text and json.loads(changed)["step"] == 4
    manifest.write_text(changed)
    with pytest.raises(Damaged, match="does not have its checksum"):
        Checkpoint(manifest.parent)


def without_checksum(path: Path, **changes) -> None:
    """As earlier versions wrote it."""
    content = json.loads(path.read_text())
    del content["crc32"]
    path.write_text(json.dumps(content | changes))


def test_a_checkpoint_from_before_checksums_of_manifests_is_read(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    newest = Checkpoints(tmp_path / "checkpoints").newest()
    expected = all_of(newest)
    without_checksum(newest.path / "manifest.json", format=1)
    assert all_of(Checkpoint(newest.path)) == expected
    without_checksum_again = json.loads((newest.path / "manifest.json").read_text()) | {"format": 2}
    (newest.path / "manifest.json").write_text(json.dumps(without_checksum_again))
    with pytest.raises(Damaged, match="without its checksum"):
        Checkpoint(newest.path)


def test_rows_from_before_checksums_are_read_and_continued_as_they_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    files.append_rows(path, [{"step": 3}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("count", [1, 2])
def test_rows_appended_to_a_damaged_file_are_read(count, tmp_path):
    """Also if the only row was damaged in the name of its checksum."""
    path, rows = tmp_path / "rows.jsonl", [{"step": n, "loss": n / 3} for n in range(1, count + 1)]
    files.append_rows(path, rows)
    content = path.read_bytes()
    for place, damaged in each_damage(content, range(len(content))):
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            files.append_rows(path, [{"step": 9, "loss": 0.5}])
            left = read_rows(path)
        assert {"step": 9, "loss": 0.5} in left, f"byte {place}"
        assert left == [*rows, {"step": 9, "loss": 0.5}] or said, f"byte {place}"
        assert all(row in [*rows, {"step": 9, "loss": 0.5}] for row in left)


@scaled(quick=40)
def test_a_damaged_row_of_a_benchmark_is_as_it_was_or_named(drawn, tmp_path):
    path, rows = tmp_path / "rows.jsonl", [Row(**PLAIN), Row(**PLAIN | {"min_ms": 2.5, "length": 64})]
    bench_files.append_rows(path, rows)
    content = path.read_bytes()
    for place, damaged in each_damage(content, drawn(range(len(content)))):
        path.write_bytes(damaged)
        left, message = outcome(lambda: bench_files.read_rows(path))
        assert left == rows or message.startswith("rows.jsonl, line "), f"byte {place}"


@scaled(quick=60)
def test_a_kernel_that_failed_its_check_never_passed_after_damage(drawn, tmp_path):
    path = tmp_path / "device.jsonl"
    record = Record("device", path)
    for key, reason in (("good", ""), ("bad", "wrong in float16"), ("open", None)):
        record.begin(key)
        record.end(key, reason)
    content = path.read_bytes()
    for place, damaged in each_damage(content, drawn(range(len(content)))):
        path.write_bytes(damaged)
        read_back = Record("device", path)
        assert read_back.outcome("bad") != "" and read_back.outcome("open") != "", f"byte {place}"


@scaled(quick=30)
def test_a_damaged_objective_of_a_trainer_is_as_it_was_or_named(drawn, tmp_path):
    path, state = (
        tmp_path / "objective.json",
        {"multiplier": {"scale": 0.25, "window": [[1.5, 2]], "log": None}},
    )
    path.write_text(files.sealed(state))
    content = path.read_bytes()
    for place, damaged in each_damage(content, drawn(range(len(content)))):
        path.write_bytes(damaged)
        left, message = outcome(lambda: files.read_object(path))
        assert left == state or str(path) in message, f"byte {place}"
    path.write_text(json.dumps(state))
    assert files.read_object(path) == state, "one from before checksums"


def test_what_was_read_from_a_checkpoint_does_not_depend_on_its_files(run, tmp_path):
    """Not pages of them: they would keep the room of removed checkpoints, and change with what overwrites them."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    checkpoint = Checkpoints(tmp_path / "checkpoints").newest()
    expected = all_of(checkpoint)
    weights, state = checkpoint.weights(), checkpoint.state()
    for name in ("model.safetensors", "state.safetensors"):
        size = (checkpoint.path / name).stat().st_size
        with (checkpoint.path / name).open("r+b") as file:
            file.write(bytes(size))

    class Read:
        step, config = checkpoint.step, checkpoint.config
        weights, state = staticmethod(lambda: weights), staticmethod(lambda: state)

    assert all_of(Read) == expected
