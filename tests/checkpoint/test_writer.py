import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_runs import CONFIG, ONE_BLOCK, RUN, assert_same, assert_whole, run, writer
from paths import HELPERS
from toy_checkpoint import ToyConfig, ToyRun, toy_block, toy_outer, toy_params

from cluscomp_jax.checkpoint import orbax_items, run_folder
from cluscomp_jax.checkpoint.reader import CheckpointWriter, load_checkpoint, open_checkpoint, save_checkpoint
from cluscomp_jax.checkpoint.run_folder import AlreadyFinished
from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime import atomic


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


class Killed(BaseException):
    pass


class Bomb:
    """Counts the steps that change the disk, and stops the program before or after the one it is set to.

    A kill stops all later steps too, as no clean-up runs in a killed process; an exception lets them go on.
    """

    STEPS = (
        (os, "replace"),
        (orbax_items, "write_item"),
        (shutil, "rmtree"),
        *((Path, n) for n in ("unlink", "mkdir", "rmdir")),
    )

    def __init__(self, monkeypatch, *, kill):
        self.steps, self.fuse, self.kill = 0, None, kill
        for module, name in self.STEPS:
            monkeypatch.setattr(module, name, self.around(getattr(module, name)))
        monkeypatch.setattr(atomic, "sync", lambda path: None)

    def around(self, function):
        def stepped(*args, **kwargs):
            self.step()
            result = function(*args, **kwargs)
            self.step()
            return result

        return stepped

    def step(self):
        self.steps += 1
        if self.fuse is not None and (self.steps == self.fuse or (self.kill and self.steps > self.fuse)):
            raise Killed


def write_quick_item(folder, arrays):
    """Stands in for orbax, which is slow where the test repeats it a hundred times; in two steps, like orbax."""
    folder.mkdir()
    (folder / "names").write_text(json.dumps(list(arrays)))
    (folder / "sub").mkdir()
    for k, array in enumerate(arrays.values()):
        (folder / "sub" / str(k)).write_bytes(array.tobytes())


def read_quick_item(folder, expected):
    names = json.loads((folder / "names").read_text())
    assert set(names) == set(expected)
    raw = [(folder / "sub" / str(k)).read_bytes() for k in range(len(names))]
    specs = [expected[name] for name in names]
    return {n: np.frombuffer(b, s[1]).reshape(s[0]) for n, b, s in zip(names, raw, specs, strict=True)}


@pytest.mark.parametrize("kill", [True, False])
def test_a_run_stopped_at_any_step_never_loads_and_always_resumes(tmp_path, monkeypatch, kill):
    monkeypatch.setattr(orbax_items, "write_item", write_quick_item)
    monkeypatch.setattr(orbax_items, "read_item", read_quick_item)
    bomb = Bomb(monkeypatch, kill=kill)
    out = tmp_path / "out"
    for fuse in itertools.count(1):
        bomb.steps, bomb.fuse = 0, fuse
        try:
            run(out, ONE_BLOCK)
        except Killed:
            bomb.fuse = None
        else:
            break
        if (out / "manifest.json").exists():
            assert_same(load_checkpoint(out).params, toy_params(ONE_BLOCK))
            with pytest.raises(AlreadyFinished):
                run(out, ONE_BLOCK)
        else:
            with pytest.raises(InputError):
                open_checkpoint(out)
            run(out, ONE_BLOCK)
        assert_whole(out, ONE_BLOCK)
        shutil.rmtree(out)
    assert_whole(out, ONE_BLOCK)
    assert fuse > 40


@pytest.mark.parametrize("kill", [True, False])
def test_a_run_that_stored_nothing_and_is_stopped_at_any_step_of_tidying_up_starts_anew(tmp_path, monkeypatch, kill):
    bomb = Bomb(monkeypatch, kill=kill)
    monkeypatch.setattr(orbax_items, "write_item", write_quick_item)
    monkeypatch.setattr(orbax_items, "read_item", read_quick_item)
    out = tmp_path / "out"
    for fuse in itertools.count(1):
        bomb.steps, bomb.fuse = 0, fuse
        try:
            with writer(out, config=ONE_BLOCK, fingerprint="another") as w:
                (w.work_path / "stale").write_text("of another run")
        except Killed:
            bomb.fuse = None
        else:
            break
        if (out / "run.json").exists():
            shutil.rmtree(out)
            continue
        with writer(out, config=ONE_BLOCK) as w:
            assert not list(w.work_path.iterdir())
        run(out, ONE_BLOCK)
        assert_whole(out, ONE_BLOCK)
        shutil.rmtree(out)
    assert not out.exists()
    assert fuse > 10


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import checkpoint_runs
from cluscomp_jax.runtime import atomic
publish = atomic.publish
def killed(aside, final):
    if final.name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(aside, final)
atomic.publish = killed
checkpoint_runs.run(Path(sys.argv[1]))
"""


def test_a_killed_process_leaves_what_it_finished(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, str(out), str(HELPERS), "00001"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with writer(out) as w:
        assert w.resumed
        assert w.finished_blocks == 1
        assert not w.outer_finished
        assert (w.work_path / "activations").stat().st_size == 1000
    run(out)
    assert_whole(out)


def test_a_run_that_stored_nothing_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="it is missing"), writer(tmp_path / "out") as w:
        w.store_block(0, {"norm": {"weight": toy_outer(CONFIG)["model"]["norm"]["weight"]}})
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with writer(tmp_path / "empty"):
        pass
    assert not list((tmp_path / "empty").iterdir())


def test_a_run_that_stored_nothing_takes_the_parents_it_made_along_unless_they_are_in_use(tmp_path):
    with writer(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b" / "out").is_dir()
    assert not list(tmp_path.iterdir())
    with writer(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "other").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/other"]
    with writer(tmp_path / "a" / "out"):
        pass
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


def test_a_run_that_logged_before_its_first_block_resumes(tmp_path):
    out = tmp_path / "out"
    with writer(out):
        (out / "metrics.jsonl").write_text("{}")
    with writer(out) as w:
        assert w.resumed
    assert (out / "metrics.jsonl").exists()


def test_a_finished_run_is_not_run_again(tmp_path):
    out = tmp_path / "out"
    run(out)
    before = contents(out)
    with pytest.raises(AlreadyFinished, match="already finished"):
        run(out)
    with pytest.raises(InputError, match=r"finished checkpoint of another run.*other weights"):
        writer(out, fingerprint="g")
    with pytest.raises(InputError, match=r"finished checkpoint of another run.*seed is 42 there, 7 here"):
        writer(out, seed=7)
    assert contents(out) == before


def test_saving_the_same_again_says_so_and_another_model_is_refused(tmp_path):
    save_checkpoint(tmp_path / "out", toy_params(CONFIG), RUN)
    with pytest.raises(AlreadyFinished):
        save_checkpoint(tmp_path / "out", toy_params(CONFIG), RUN)
    with pytest.raises(InputError, match="another run"):
        save_checkpoint(tmp_path / "out", toy_params(CONFIG), dataclasses.replace(RUN, seed=1))


@pytest.fixture
def unfinished(tmp_path):
    out = tmp_path / "out"
    with writer(out) as w:
        w.store_block(0, toy_block(CONFIG, 0))
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "g"}, "another unfinished run.*same settings, but other weights"),
        ({"seed": 7}, "seed is 42 there, 7 here"),
        ({"config": ToyConfig(num_blocks=2, d=16)}, r"model\.d is 12 there, 16 here"),
    ],
)
def test_another_run_does_not_take_over_an_unfinished_one(unfinished, change, message):
    before = contents(unfinished)
    with pytest.raises(InputError, match=message):
        writer(unfinished, **change)
    assert contents(unfinished) == before


def test_an_unfinished_run_does_not_load(unfinished):
    with pytest.raises(InputError, match="an unfinished run; repeat the command"):
        open_checkpoint(unfinished)


def test_a_second_process_is_locked_out(unfinished):
    first = writer(unfinished)
    with pytest.raises(InputError, match="another process is writing there"):
        writer(unfinished)
    first.close()
    writer(unfinished).close()


def finishing_meanwhile(monkeypatch, out, *, before):
    """Lets another process finish the run in `out` between the look at the folder and the lock on it."""
    real = run_folder._lock

    def lock(path, folder):
        monkeypatch.setattr(run_folder, "_lock", real)  # the other process and all later claims have the real one
        if before:
            run(out)
            out.joinpath("work").mkdir()
            return real(path, folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        run(out)  # the lock it had is gone, and its file is no longer in the folder
        monkeypatch.setattr(os, "open", lambda *args, real=os.open: given.pop() if given else real(*args))
        given = [descriptor]
        return real(path, folder)

    monkeypatch.setattr(run_folder, "_lock", lock)


@pytest.mark.parametrize("before", [True, False], ids=["before the file is opened", "after it"])
def test_a_process_that_finishes_while_another_looks_is_not_run_again(unfinished, monkeypatch, before):
    finishing_meanwhile(monkeypatch, unfinished, before=before)
    with pytest.raises(AlreadyFinished, match="already finished there"):
        writer(unfinished)
    assert_whole(unfinished)


def test_what_differs_is_named(tmp_path):
    def begin(**inputs):
        digest = json.dumps(inputs)
        run_config = ToyRun(seed=42).to_dict()
        with CheckpointWriter(
            tmp_path / "out", model_config=CONFIG, run_config=run_config, fingerprint=digest, inputs=inputs
        ) as begun:
            begun.store_block(0, toy_block(CONFIG, 0))

    begin(weights="a" * 64, device="cpu")
    with pytest.raises(InputError, match=r"\(same settings, but other weights, device is cpu there, NVIDIA here\)"):
        begin(weights="b" * 64, device="NVIDIA")


@pytest.mark.parametrize("name", ["notes.txt", "work/notes.txt", "blocks/00000/x"])
def test_a_folder_of_someone_elses_is_not_touched(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="not empty and not an unfinished run"):
        writer(tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_file_in_the_place_of_the_folder_is_not_touched(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        writer(tmp_path / "out")
    with pytest.raises(InputError, match="cannot be written to"):
        writer(tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{}", '{"format_version": 1, "fingerprint": 1}', '{"format_version": 2}'])
def test_a_damaged_run_file_is_refused(unfinished, text):
    (unfinished / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json"):
        writer(unfinished)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: shutil.rmtree(out / "work"), "records"),
        (lambda out: (out / "blocks/00000/_METADATA").unlink(), "_METADATA is missing"),
        (lambda out: (out / "blocks/00000/more").write_text(""), "more is not in the manifest"),
        (lambda out: (out / "blocks/00000").rename(out / "blocks/00001"), "some are missing"),
    ],
)
def test_a_damaged_unfinished_run_is_not_resumed(unfinished, damage, message):
    damage(unfinished)
    with pytest.raises(InputError, match=message):
        writer(unfinished)
    with pytest.raises(InputError, match=message):  # and the lock was given back
        writer(unfinished)


def test_a_damaged_block_is_not_read_back(unfinished):
    path = unfinished / "blocks/00000/norm.weight/0"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with writer(unfinished) as w, pytest.raises(InputError, match="SHA-256"):
        w.load_block(0)


def test_blocks_are_stored_in_order_and_all_before_the_end(tmp_path):
    with writer(tmp_path / "out") as w:
        with pytest.raises(InputError, match="block 1 cannot be stored; 0 of 2 are"):
            w.store_block(1, toy_block(CONFIG, 1))
        with pytest.raises(InputError, match="block 0 is not finished"):
            w.load_block(0)
        for i in range(2):
            w.store_block(i, toy_block(CONFIG, i))
        with pytest.raises(InputError, match="block 2 cannot be stored"):
            w.store_block(2, toy_block(CONFIG, 2))
        with pytest.raises(InputError, match="rest has not been stored"):
            w.finish(provenance={}, metrics={})
        w.store_outer(toy_outer(CONFIG))
        with pytest.raises(InputError, match=r"provenance\.key is a object"):
            w.finish(provenance={"key": object()}, metrics={})
        w.finish(provenance={"path": Path("a/b")}, metrics={"error": [toy_outer(CONFIG)["model"]["norm"]["weight"][0]]})
    fields = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (fields["provenance"], fields["metrics"]) == ({"path": "a/b"}, {"error": [1.0]})


def test_a_tokenizer_folder_gives_its_tokenizer_files_alone(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    names = ["tokenizer.json", "chat_template.jinja"]
    for name in [*names, "model.safetensors", "tokenization_custom.py"]:
        (model / name).write_text(name)
    save_checkpoint(tmp_path / "out", toy_params(CONFIG), RUN, tokenizer=model)
    carried = open_checkpoint(tmp_path / "out").tokenizer_path
    assert contents(carried) == {name: name.encode() for name in names}
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no tokenizer file"):
        save_checkpoint(tmp_path / "out2", toy_params(CONFIG), RUN, tokenizer=tmp_path / "none")
