"""Every writer of output folders over every content that may be there: nothing foreign is ever deleted."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config

from agents import Ranking, RewardCurves, export, save_checkpoint, sft, train_classifier, train_reward_model
from agents.checkpoints.output_folders import MARK, OutputFolderError, check_output, output_folder
from agents.files import write_text
from tests.helpers.command import run, settings, small_model
from tests.helpers.models import make_ppo
from textenv.feedback import exchange
from textenv.feedback.store import FeedbackStore

TEXTS = ["good film", "bad film", "good phone", "bad phone"]
SHAPE = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 32}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished run, a small model and data for the writers."""
    folder = tmp_path_factory.mktemp("home")
    model = small_model(folder / "model")
    assert run("train", *settings(model, folder / "runs" / "a", rollouts=1), "--quiet") == 0
    write_text(folder / "texts.txt", "\n".join(TEXTS) + "\n")
    rows = {
        "labels": [{"text": text, "label": text.split()[0]} for text in TEXTS],
        "pairs": [{"prompt": "a ", "chosen": text, "rejected": "bad"} for text in TEXTS],
    }
    for name, lines in rows.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return folder


def tokenizer(home):
    return AutoTokenizer.from_pretrained(home / "model")


def by_export(home, folder, overwrite):
    export(make_ppo().policy, None, folder, overwrite=overwrite)


def by_save_checkpoint(home, folder, overwrite):
    model = make_ppo()
    model.learn(model.n_steps * model.n_envs)
    save_checkpoint(model, folder, overwrite=overwrite)


def by_tune(home, folder, overwrite):
    sft.tune(home / "model", TEXTS, folder, tokenizer=tokenizer(home), overwrite=overwrite, progress_bar=False)


def by_train_classifier(home, folder, overwrite):
    words = tokenizer(home)
    config = GPT2Config(vocab_size=len(words), pad_token_id=0, **SHAPE)
    labels = [0, 1, 0, 1]
    train_classifier(config, words, TEXTS, labels, folder, n_epochs=1, overwrite=overwrite, progress_bar=False)


def by_train_reward_model(home, folder, overwrite):
    words, pairs = tokenizer(home), [Ranking((text, "bad")) for text in TEXTS]
    config = GPT2Config(vocab_size=len(words), pad_token_id=0, **SHAPE)
    train_reward_model(config, words, pairs, folder, overwrite=overwrite, progress_bar=False)


def by_command(*words):
    """Return a writer that runs the command and raises `OutputFolderError` for an exit code other than 0."""

    def write(home, folder, overwrite):
        filled = [str(word).format(home=home, folder=folder) for word in words]
        code = run(*filled, *(["--overwrite"] if overwrite else []))
        if code:
            raise OutputFolderError(code)

    return write


STAGE = ("--out", "{folder}", "--quiet", "--model", "{home}/model", "--data")
WRITERS = {
    "export": ("language model", by_export),
    "save_checkpoint": ("checkpoint", by_save_checkpoint),
    "tune": ("language model", by_tune),
    "train_classifier": ("classifier", by_train_classifier),
    "train_reward_model": ("reward model", by_train_reward_model),
    "textenv export": ("language model", by_command("export", "{home}/runs/a", "{folder}")),
    "textenv export --sb3-zip": ("language model", by_command("export", "{home}/runs/a", "{folder}", "--sb3-zip")),
    "textenv sft": ("language model", by_command("sft", *STAGE, "{home}/texts.txt")),
    "textenv classifier": ("classifier", by_command("classifier", *STAGE, "{home}/labels.jsonl")),
    "textenv reward-model": ("reward model", by_command("reward-model", *STAGE, "{home}/pairs.jsonl")),
}


def earlier(folder, kind, more=()):
    with output_folder(folder, kind) as beside:
        (beside / "part").mkdir()
        write_text(beside / "part" / "weights", "old")
    for name in more:
        write_text(folder / name, "mine")


def foreign(folder, kind, home):
    for name in ("a_chapter.tex", "data.csv", "notes.md", "thesis.tex"):
        write_text(folder / name, "mine")


def another_kind(folder, kind, home):
    earlier(folder, "checkpoint" if kind != "checkpoint" else "classifier")


def broken_mark(folder, kind, home):
    earlier(folder, kind)
    (folder / MARK).write_text('["' + kind)


def linked(folder, kind, home):
    foreign(folder.with_name("elsewhere"), kind, home)
    folder.symlink_to(folder.with_name("elsewhere"))


def a_run(folder, kind, home):
    earlier(folder, kind, ["run.json"])


REFUSED = {  # what fills the folder, a pattern of the error, and whether `overwrite=True` is refused too
    "foreign": (foreign, "a_chapter.tex, data.csv, notes.md and 1 more", True),
    "another kind": (another_kind, "an earlier (checkpoint|classifier)", True),
    "a broken mark": (broken_mark, f"{MARK.replace('.', '[.]')}|part", True),
    "a link to foreign": (linked, "a_chapter.tex", True),
    "a run": (a_run, "is a run", True),
    "earlier with notes": (
        lambda folder, kind, home: earlier(folder, kind, ["notes.md"]),
        "notes.md, no part",
        True,
    ),
    "earlier": (lambda folder, kind, home: earlier(folder, kind), "--overwrite", False),
}


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_and_stays(writer, case, home, tmp_path, capsys):
    kind, write = WRITERS[writer]
    make, said, always = REFUSED[case]
    folder = tmp_path / "out"
    make(folder, kind, home)
    before = contents(tmp_path)
    for overwrite in (False, True) if always else (False,):
        with pytest.raises(OutputFolderError) as refused:
            write(home, folder, overwrite)
        message = str(refused.value) if write.__name__ != "write" else capsys.readouterr().err
        assert re.search(said, message), message
        assert contents(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_working_directory_the_home_folder_and_those_above_are_refused(
    writer, overwrite, home, tmp_path, monkeypatch, capsys
):
    here, at_home = tmp_path / "work" / "here", tmp_path / "users" / "me"
    at_home.mkdir(parents=True)
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(at_home))
    for folder in (here, here.parent, at_home, at_home.parent, tmp_path):
        with pytest.raises(OutputFolderError):
            WRITERS[writer][1](home, folder, overwrite)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("target", ["runs/a", "runs", "runs/a/checkpoints", "."])
def test_a_run_is_not_exported_over_itself(target, home, capsys):
    before = contents(home)
    assert run("export", home / "runs" / "a", home / target, "--overwrite") == 2
    assert "Expected a" in capsys.readouterr().err
    assert contents(home) == before


def check_written(writer, kind, write, home, folder, overwrite):
    write(home, folder, overwrite)
    mark = json.loads((folder / MARK).read_text())
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert mark["kind"] == kind and sorted(mark["files"]) == written
    assert ("sb3.zip" in written) == ("--sb3-zip" in writer)
    assert not (folder / "part").exists()


@pytest.mark.parametrize("writer", [name for name in WRITERS if not name.startswith("textenv")])
def test_what_is_absent_empty_or_an_earlier_output_is_written(writer, home, tmp_path):
    torch.manual_seed(0)
    kind, write = WRITERS[writer]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    for name in ("absent", "empty"):
        check_written(writer, kind, write, home, tmp_path / name, False)
    earlier(tmp_path / "earlier", kind)
    check_written(writer, kind, write, home, tmp_path / "earlier", True)
    check_written(writer, kind, write, home, tmp_path / "link", True)  # the folder that the link points to is replaced
    assert (tmp_path / "link").is_symlink()


@pytest.mark.slow
@pytest.mark.parametrize("writer", [name for name in WRITERS if name.startswith("textenv")])
def test_the_command_writes_the_same(writer, home, tmp_path):
    test_what_is_absent_empty_or_an_earlier_output_is_written(writer, home, tmp_path)


def test_an_earlier_output_is_not_replaced_by_half_of_one(tmp_path):
    earlier(tmp_path / "out", "classifier")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="disk"), output_folder(tmp_path / "out", "classifier", overwrite=True) as beside:
        write_text(beside / "weights", "new")
        raise OSError("the disk is full")
    assert contents(tmp_path) == before


def test_a_folder_to_keep_is_safe_from_outputs_at_or_above_it(tmp_path):
    kept = tmp_path / "runs" / "mine"
    for folder in (kept, kept.parent, tmp_path):
        with pytest.raises(OutputFolderError, match=r"which is( above)? the folder .*runs/mine"):
            check_output(folder, "checkpoint", overwrite=True, keep=[kept])
    assert check_output(tmp_path / "runs" / "other", "checkpoint", keep=[kept]) == tmp_path / "runs" / "other"


def test_a_picture_and_a_file_of_answers_replace_nothing_else(home, tmp_path, capsys):
    thesis = tmp_path / "thesis.pdf"
    thesis.write_text("mine")
    assert run("compare", home / "runs" / "a", "--out", thesis) == 2
    assert "Expected a new file, or a PNG to replace" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="or a PNG to replace"):
        RewardCurves(thesis)._on_training_start()
    with (
        FeedbackStore(tmp_path / "answers.db") as store,
        pytest.raises(FileExistsError, match="overwrite=True replaces"),
    ):
        exchange.export(store, thesis, "pairs")
    assert thesis.read_text() == "mine"
    for _ in range(2):  # its own picture is replaced
        assert run("compare", home / "runs" / "a", "--out", tmp_path / "compare.png") == 0


@pytest.mark.parametrize("write", [by_tune, by_train_classifier, by_train_reward_model])
def test_the_folder_of_states_beside_an_output_is_not_cleared_where_it_is_not_ours(write, home, tmp_path):
    write_text(tmp_path / ".out.training" / "thesis.tex", "mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"where a stage keeps its states, got one with thesis\.tex"):
        write(home, tmp_path / "out", True)
    assert contents(tmp_path) == before
