"""Names of models: requests to the hub, their time limit, and the error for a name that does not exist."""

import io
import threading

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from agents import Pretrained, SeparateCritic
from agents.models.pretrained import build_model
from tests.helpers.command import run
from textenv.huggingface import weights as model_loading
from textenv.huggingface.weights import check_name
from textenv.rewards.preference import Preference
from textenv.text.named_tokenizer import read_tokenizer


@pytest.fixture
def asked(monkeypatch):
    """Replace the hub; return the names it was asked for, and a list with the error that it raises, or None."""
    seen, answer = [], [None]

    def model_info(self, name, timeout):
        seen.append(name)
        if answer[0] is not None:
            raise answer[0]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    model_loading._look_up.cache_clear()
    yield seen, answer
    model_loading._look_up.cache_clear()


def status(kind, code):
    return kind("no", response=httpx2.Response(code, request=httpx2.Request("GET", "https://hub.test")))


def test_the_hub_is_asked_once_for_a_model(asked):
    for _ in range(2):
        check_name("someone/some-model")
    assert asked[0] == ["someone/some-model"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (status(RepositoryNotFoundError, 401), "https://huggingface.co has no such model, or a private one"),
        (httpx2.ConnectError("Name or service not known"), "cannot be reached: Name or service not known"),
    ],
)
def test_a_missing_model_is_refused_after_one_request(asked, answer, reason):
    seen, answers = asked
    answers[0] = answer
    with pytest.raises(ValueError, match=rf"Expected the folder .* got 'nonsense': there is no such folder.*{reason}"):
        check_name("nonsense")
    assert seen == ["nonsense"]


def test_a_gated_model_is_left_to_transformers(asked):
    asked[1][0] = status(GatedRepoError, 403)
    check_name("someone/gated")


def test_the_wait_for_a_hub_that_does_not_answer_is_limited(asked, monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, timeout: end.wait())
    monkeypatch.setattr(model_loading, "LOOK_UP_SECONDS", 0.05)
    with pytest.raises(ValueError, match=r"cannot be reached: no answer within 0\.05 s"):
        check_name("nonsense")
    end.set()


def test_a_downloaded_model_needs_no_request(asked, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--known" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--someone--known" / "refs").mkdir()
    (tmp_path / "models--someone--known" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    check_name("someone/known")
    assert asked[0] == []


@pytest.mark.parametrize("name", ["./nowhere", "runs/reviews/sft", "a b"])
def test_invalid_names_cause_no_request(asked, name):
    with pytest.raises(ValueError, match="no model on the hub can have this name"):
        check_name(name)
    assert asked[0] == []


OFFLINE = "got 'nonsense': there is no such folder, and it was not downloaded before, and HF_HUB_OFFLINE forbids"
LOADS = {
    "model": lambda: build_model("nonsense"),
    "spec": lambda: Pretrained("nonsense").build(),
    "critic": lambda: SeparateCritic("nonsense").build(8),
    "reward": lambda: Preference("nonsense"),
    "tokenizer": lambda: read_tokenizer("nonsense"),
}


@pytest.mark.parametrize("what", LOADS)
def test_offline_no_request_is_made(asked, what, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=OFFLINE):
        LOADS[what]()
    assert asked[0] == []


def test_arguments_that_look_elsewhere_are_left_to_transformers(asked, tmp_path):
    with pytest.raises(OSError, match="find them in the cached files"):
        Pretrained("nonsense", cache_dir=str(tmp_path), local_files_only=True).build()
    assert asked[0] == []


SMALL = ["--algorithm.n_envs", "8", "--evaluation.n_prompts", "2"]
VERBS = {  # commands, with {} in the place of the model's name
    "generate": ["generate", "{}", "--prompts", "p.txt"],
    "chat": ["chat", "{}"],
    "rate": ["rate", "{}", "--prompts", "p.txt"],
    "sft": ["sft", "--model", "{}", "--data", "p.txt", "--out", "out"],
    "classifier": ["classifier", "--model", "{}", "--data", "labels.jsonl", "--out", "out"],
    "reward-model": ["reward-model", "--model", "{}", "--data", "labels.jsonl", "--out", "out"],
    "train": ["train", "--model.name", "{}", "--dry-run"],
    "tokenizer": ["train", "--model.tokenizer", "{}", "--dry-run"],
    "reference": ["train", "--kl.reference", "{}", "--dry-run", *SMALL],
    "critic": ["train", "--model.critic", "separate", "--model.critic_model", "{}", "--dry-run", *SMALL],
    "doctor": ["doctor", "--model.name", "{}"],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("this phone is\nthe lamp was\n")
    rows = (f'{{"text": "the lamp was {word} .", "label": {number}}}' for number, word in enumerate(("bad", "great")))
    (tmp_path / "labels.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_lists_what_a_name_may_be(verb, here, asked, capsys):
    asked[1][0] = httpx2.ConnectError("no network")
    assert run(*(word.format("nonsense") for word in VERBS[verb])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "got 'nonsense': there is no such folder, " in error
    assert '"demo"' in error and "cannot be reached: no network" in error
    assert ("the folder of a run" in error) == (verb in ("generate", "chat", "rate"))
    assert asked[0] == ["nonsense"]
    assert {path.name for path in here.iterdir()} <= {"p.txt", "labels.jsonl", "ratings.db"}


def test_a_run_in_place_of_a_model_is_refused_with_the_cure(here, capsys):
    (here / "run").mkdir()
    (here / "run" / "run.json").write_text("{}")
    assert run("train", "--model.name", "run", "--dry-run") == 2
    assert "got 'run', that of a run: its model is run/model" in capsys.readouterr().err
    assert run("generate", ".", "--prompts", "p.txt") == 2
    assert "with run.json, or of a model, with config.json, got ., with neither" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("train", "tokenizer")])
def test_demo_is_a_model_in_every_verb(verb, here, asked, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("this phone is\n"))
    words = [word.format("demo") for word in VERBS[verb]]
    code = run(*words)
    assert code == 0 or (verb == "doctor" and code == 1), capsys.readouterr().err
    assert asked[0] == []


def test_demo_is_a_model_in_python_too(asked):
    shape = build_model("demo").config
    assert (shape.n_layer, shape.n_positions) == (2, 64)
    assert SeparateCritic("demo").build(64).trunk.config.n_embd == 64
    assert asked[0] == []
