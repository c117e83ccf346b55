"""Data sets of Hugging Face: reading by name or from a folder, row by row, and errors."""

import gc
import os
import subprocess
import sys

import pytest

from tests.helpers.command import ROOT
from textenv import Prompt, TextVectorEnv, read_dataset

datasets = pytest.importorskip("datasets", reason='pip install "textenv[hub]"')

ROWS = [{"q": "abc"[: 1 + i % 3], "answers": ["x", "yz"], "n": i} for i in range(7)]


def n_prompts():
    """Return the number of prompts in memory."""
    gc.collect()
    return sum(type(thing) is Prompt for thing in gc.get_objects())


@pytest.fixture
def write(tmp_path):
    """Write rows as the training split of a folder in the layout of the hub; return the folder."""

    def make(kind, rows=ROWS):
        folder = tmp_path / kind
        folder.mkdir()
        data, path = datasets.Dataset.from_list(list(rows)), str(folder / f"train.{kind}")
        {"parquet": data.to_parquet, "jsonl": data.to_json, "csv": data.to_csv}[kind](path)
        return folder

    return make


@pytest.fixture
def read(tmp_path):
    """`read_dataset` with a cache of its own."""
    return lambda name, *args, **kwargs: read_dataset(name, *args, cache_dir=str(tmp_path / "cache"), **kwargs)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_folder_is_read_with_its_columns(write, read, make_env, kind):
    env = make_env(read(write(kind)), prompt_column="q", references_column="answers")
    assert list(env.prompts) == [row["q"] for row in ROWS] and env.max_prompt_tokens == 3
    assert env.prompts[6].row == ROWS[6] and env.prompts[6].references == ["x", "yz"] and env.prompts[6].number == 6


def test_a_csv_folder_and_a_part_of_a_split(write, read, make_env):
    rows = [{"prompt": "ab", "note": "x"}, {"prompt": "c", "note": "y"}]
    folder = write("csv", rows)
    assert [prompt.row for prompt in make_env(read(str(folder))).prompts] == rows
    assert len(read(folder, "train[:1]")) == 1


def test_rows_stay_on_disk(read, write, make_env):
    """All 5,000 rows are checked, but only those in the lanes are kept as prompts in memory."""
    data = read(write("parquet", [{"prompt": "ab" * (1 + i % 2)} for i in range(5_000)]))
    before = n_prompts()
    envs = TextVectorEnv(make_env(data, max_new_tokens=1), 4)
    assert envs.env.max_prompt_tokens == 4 and envs.env.prompts.rows is data
    envs.reset(seed=0)
    for _ in range(10):
        envs.step(envs.action_space.sample())
    assert n_prompts() - before < 20


def test_the_same_as_a_list(read, write, make_env):
    def play(prompts):
        envs = TextVectorEnv(make_env(prompts, prompt_column="q", max_new_tokens=2, samples_per_prompt=2), 3)
        observations = [envs.reset(seed=3)[0].tolist()]
        observations += [envs.step([1 + step % 3] * 3)[0].tolist() for step in range(40)]
        return observations, envs.lanes.state_dict()[1]["dealt"]

    assert play(read(write("jsonl"))) == play(ROWS)


def test_a_bad_row_is_found_at_once(read, write, make_env):
    data = read(write("jsonl", [{"prompt": "a"}, {"prompt": ""}]))
    with pytest.raises(ValueError, match="Expected prompt 1 to have at least one token"):
        make_env(data)


def test_a_missing_split_names_those_there_are(read, write):
    with pytest.raises(ValueError, match=r"with the split 'test', got '.*jsonl', tried as both: .*\['train'\]"):
        read(write("jsonl"), "test")


def test_a_folder_without_data(read, tmp_path):
    with pytest.raises(
        ValueError, match=r"Expected a folder of .parquet, .jsonl or .csv files or .* EmptyDatasetError"
    ):
        read(tmp_path)


def test_a_file_is_refused_with_the_way_to_pass_it_to_the_env(read, write):
    with pytest.raises(ValueError, match=r"A single file needs no data set: TextEnv\(prompts=path\)"):
        read(write("jsonl") / "train.jsonl")


def test_a_name_in_place_of_prompts_is_refused_with_the_cure(make_env):
    with pytest.raises(ValueError, match=r"hub is textenv.read_dataset\('someone/reviews'\)"):
        make_env("someone/reviews")


@pytest.mark.slow
def test_offline_a_name_says_so_and_a_folder_is_read(write):
    """The libraries read HF_HUB_OFFLINE when they are loaded, so the test starts a process."""
    folder = write("jsonl")
    code = (
        "import sys; from textenv import read_dataset; print(len(read_dataset(sys.argv[1])))\n"
        "try: read_dataset('nobody/nothing', 'test')\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", code, str(folder)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    number, error = run.stdout.strip().split("\n", 1)
    assert number == "7"
    assert "split 'test', got 'nobody/nothing', tried as both: ConnectionError" in error and "Offline" in error


def test_chats_of_a_data_set_are_lists_of_messages(write, read):
    messages = [{"role": "user", "content": "hi"}]
    assert read(write("parquet", [{"prompt": messages}]))[0]["prompt"] == messages


def test_rows_without_a_length_are_refused(write, read, make_env):
    with pytest.raises(ValueError, match=r"a length and rows by number, got IterableDataset: .* without streaming"):
        make_env(read(write("jsonl"), streaming=True))
    with pytest.raises(ValueError, match="rows by number, got generator: make a list of it"):
        make_env(text for text in ["a"])
