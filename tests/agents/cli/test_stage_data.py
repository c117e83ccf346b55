"""The stages before PPO on a task's data set: training and held-out parts, refusals, and learning."""

import json
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from agents.cli import stage_data
from agents.cli.options import ClassifierConfig, RewardModelConfig, SFTConfig
from agents.cli.prompt_files import prompts_for
from agents.cli.stage_data import SOLVED, TEXTS, read_labels, read_preferences, read_texts
from agents.cli.stages import fresh_config
from agents.errors import CommandError
from agents.small_models.tokenizers import EOS_TOKEN
from agents.supervised.preferences import Ranking
from tests.agents.supervised.test_reward_model_controls import press_ctrl_c, weights_of
from tests.helpers import fakes
from tests.helpers.command import run, small_model
from tests.helpers.task_data import write_data
from tests.textenv.prompts.test_chat import CHATML, tokenizer_with
from textenv import TASKS, CharTokenizer, Preds, Prompt
from textenv.feedback.store import FeedbackStore
from textenv.rewards.preference import Preference
from textenv.tasks.dailydialog import INTENTS, DailyDialog, read_dialogues, split_dialogues
from textenv.tasks.hh import HH, hold_out, read_pairs
from textenv.tasks.zh_reviews import PROMPTS, ZhReviews, read_rankings, split_rankings

TINY = '{"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "vocab_size": 300, "n_positions": 64}'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "sets")


@pytest.fixture(autouse=True)
def few_random_texts(monkeypatch):
    monkeypatch.setattr(stage_data, "N_RANDOM_TEXTS", 200)


def joined(text):
    return text if isinstance(text, str) else "".join(text)


@pytest.mark.parametrize("task", TEXTS)
def test_texts_are_in_one_part_only(data, task):
    parts = read_texts(SFTConfig(task=task, data=str(data.get(task))))
    train, held_out = ([joined(text) for text in part] for part in parts)
    assert not set(train) & set(held_out)
    assert 0.08 < len(held_out) / len(train + held_out) < 0.12


@pytest.fixture
def reasoning(monkeypatch):
    for module, content in fakes.reasoning_gym().items():
        monkeypatch.setitem(sys.modules, module, content)


ITEMS = {"name": "chain_sum", "config": {"max_terms": 2, "max_digits": 1}, "size": 90, "n_held_out": 10}


def test_solved_items_are_pairs_in_one_part_only(reasoning):
    train, held_out = read_texts(SFTConfig(task="ReasoningGym", task_args=ITEMS))
    assert (len(train), len(held_out), len(set(held_out))) == (90, 10, 10) and not {*train} & {*held_out}
    assert held_out[0] == ("State the final answer to the following arithmetic problem: 0 - 4 =\nAnswer:", " -4")
    [pair, *_] = read_texts(SFTConfig(task="ReasoningGym", task_args={**ITEMS, "chat": True})).held_out
    assert pair == ([{"role": "user", "content": held_out[0][0].removesuffix("\nAnswer:")}], "-4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ReasoningGym"}, "Expected the argument 'name' for task_args of the task ReasoningGym, got none"),
        ({"task": "ReasoningGym", "task_args": {**ITEMS, "sise": 3}}, "got 'sise': did you mean 'size'"),
        ({"task": "ReasoningGym", "task_args": ITEMS, "data": "x"}, "Expected no `data` and no `held_out`"),
        ({"task": "Dates", "task_args": ITEMS}, "Expected task_args with --task ReasoningGym only, got them with"),
        ({"data": "x", "task_args": ITEMS}, "Expected task_args with --task ReasoningGym only, got them without"),
        ({"task": "ReasoningGim"}, "Expected `task` to be one of .*, ReasoningGym for this stage"),
    ],
)  # fmt: skip
def test_task_args_that_do_not_fit_are_refused(reasoning, options, message):
    with pytest.raises((CommandError, ValueError), match=message):
        read_texts(SFTConfig(**options))


def test_a_file_may_have_chats_as_prompts(tmp_path):
    chat = [{"role": "user", "content": "hello there"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": chat, "reference": "hi"}) + "\n")
    assert read_texts(SFTConfig(data=str(tmp_path / "rows.jsonl"))).train == [(chat, "hi")]


def test_every_task_of_a_data_set_has_texts():
    assert {*TEXTS, SOLVED} == TASKS.keys() - {"Text"}


def test_texts_are_as_their_tasks_go_on_from_prompts(data):
    texts = {task: read_texts(SFTConfig(task=task, data=str(data.get(task)))).train[0] for task in TEXTS}
    assert re.fullmatch(r"the \w+ is a \w+ thing to see \d+", texts["Reviews"])
    assert texts["DailyDialog"].endswith("\n") and "__eou__" not in texts["DailyDialog"]
    assert re.fullmatch(r"\n\nHuman: question .*\n\nAssistant: kind words \d+", texts["HH"])
    assert len(texts["ZhReviews"][0]) == 1 and len(texts["ZhReviews"][1]) > 4
    assert texts["Dates"].startswith(EOS_TOKEN) and texts["IncreasingNumbers"].startswith(EOS_TOKEN)


def letters_of(folder):
    texts = [file.read_text(encoding="utf-8") for file in folder.iterdir()]
    return CharTokenizer("".join(sorted({*"".join([*texts, *PROMPTS]), "\n"})))


@pytest.mark.parametrize(
    ("env", "rows", "parts"),
    [
        (DailyDialog, read_dialogues, split_dialogues),
        (HH, read_pairs, lambda pairs: hold_out(pairs, 6)),
        (ZhReviews, read_rankings, lambda rows: split_rankings(rows, {"train": 0.9, "held_out": 0.1}).values()),
    ],
)
def test_an_environment_takes_the_same_parts(data, env, rows, parts):
    folder = data[env.__name__]
    options = {"tokenizer": letters_of(folder), "reward": lambda prompt, preds, done: 0.0, "max_prompt_tokens": 400}
    prompts = [env(folder, part=part, **options).prompts for part in ("train", "held_out")]
    assert prompts == [env(part, **options).prompts for part in parts(rows(folder))]
    assert len(prompts[0]) > len(prompts[1]) > 0
    with pytest.raises(ValueError, match="Expected `part` to be one of"):
        env(folder, part="test", **options)


def test_labels_and_preferences_of_tasks(data):
    labels = read_labels(ClassifierConfig(task="Reviews", data=str(data["Reviews"])))
    assert {label for text, label in labels.train if "great" in text} == {"positive"}
    intents = read_labels(ClassifierConfig(task="DailyDialog", data=str(data["DailyDialog"])))
    assert {label for text, label in intents.train if text.startswith("Please")} == {"directive"}
    pairs = read_preferences(RewardModelConfig(task="HH", data=str(data["HH"])), CharTokenizer()).train
    assert pairs[0].prompt.endswith("Assistant:") and pairs[0].texts[0].startswith(" kind")
    rankings = read_preferences(RewardModelConfig(task="ZhReviews", data=str(data["ZhReviews"])), CharTokenizer()).train
    assert len(rankings[0].texts) == 4 and "非常满意" in rankings[0].texts[0]


def test_two_reward_models_learn_from_the_two_halves_of_the_training_data(data, tmp_path):
    whole, first, second = (
        read_preferences(RewardModelConfig(task="HH", data=str(data["HH"]), half=half), CharTokenizer())
        for half in (None, "first", "second")
    )
    assert first.train + second.train == whole.train and abs(len(first.train) - len(second.train)) <= 1
    assert first.held_out == second.held_out == whole.held_out
    assert not {pair.prompt for pair in first.train} & {pair.prompt for pair in second.train}
    (tmp_path / "one.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    with pytest.raises(CommandError, match="Expected at least two examples with half=first, got 1"):
        pairs_of(tmp_path / "one.jsonl", half="first")


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (read_texts, SFTConfig(task="Text", data="x"), "`task` to be one of Reviews, DailyDialog, .* got 'Text'"),
        (read_labels, ClassifierConfig(task="HH", data="x"), "`task` to be one of Reviews, DailyDialog for this"),
        (
            lambda config: read_preferences(config, CharTokenizer()),
            RewardModelConfig(task="HH"),
            "--data FOLDER, the data set of the task HH, got none",
        ),
        (read_texts, SFTConfig(task="HH", data="x", held_out="y"), "`held_out` without `task`"),
    ],
)
def test_what_a_stage_cannot_read_is_refused(read, config, message):
    with pytest.raises(CommandError, match=message):
        read(config)


HH_OPENING = "\n\nHuman: Hi\n\nAssistant:"


def pairs_of(data, **options):
    return read_preferences(RewardModelConfig(data=str(data), **options), CharTokenizer())


def test_files_of_another_encoding(tmp_path):
    path = tmp_path / "rows.CSV"
    path.write_bytes("text,label\n很好,1\n不好,0\n".encode("gb18030"))
    both = {"data": str(path), "held_out": str(path)}
    rows = [("很好", "1"), ("不好", "0")]
    assert read_labels(ClassifierConfig(**both, encoding="gb18030")) == (rows, rows)
    assert read_texts(SFTConfig(**both, encoding="gb18030")) == (["很好", "不好"],) * 2
    assert pairs_of(**both, encoding="gb18030") == ([("很好", 1.0), ("不好", 0.0)],) * 2
    for read in (
        lambda: read_labels(ClassifierConfig(**both)),
        lambda: read_texts(SFTConfig(**both)),
        lambda: pairs_of(**both),
    ):
        with pytest.raises(CommandError, match=r"Expected UTF-8 in '.*rows.CSV', got the byte 0xba in line 2: .*enco"):
            read()


def test_prompts_of_another_encoding(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("你好\n".encode("utf-16"))
    assert prompts_for("generate", "demo", str(path), "utf-16") == ["你好"]
    with pytest.raises(CommandError, match=r"Expected UTF-8 in '.*prompts.txt', got .* as in encoding='utf-16'"):
        prompts_for("generate", "demo", str(path), "utf-8")


@pytest.mark.parametrize("line", ['{"text": "so \\ud83d"}', '"so \\ud83d"'])
def test_a_lone_surrogate_is_refused_with_its_row(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'"fine"\n{line}\n')
    with pytest.raises(CommandError, match=r"whole characters in the column text of row 2 of .*rows.jsonl, got a lone"):
        read_texts(SFTConfig(data=str(path)))


def test_pairs_of_conversations_are_read_from_a_file(tmp_path):
    question = {"role": "user", "content": "hi"}
    rows = [
        {name: [question, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")},
        {"prompt": "It was ", "chosen": "good", "rejected": "bad"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = RewardModelConfig(data=str(path), held_out=str(path))
    opened = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    expected = [Ranking(("chosen", "rejected"), opened, is_chat=True), Ranking(("good", "bad"), "It was ")]
    assert read_preferences(config, tokenizer_with(CHATML)) == (expected, expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": None}, "Expected a text in the column rejected of row 2 of {}, got None"),
        ({"chosen": "", "rejected": "b"}, "Expected a text in the column chosen of row 2 of {}, got an empty one"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "a text in the column prompt of row 2 of {}, got None"),
        ({"chosen": ["a"], "rejected": "b"}, "a list of messages in the column chosen of row 2 of {}, got ['a']"),
        ({"chosen": "\n\nHuman: x", "rejected": ""}, "a text in the column rejected of row 2 of {}, got an empty one"),
    ],
)
def test_cells_that_are_no_answer_are_named(tmp_path, row, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"chosen": "a", "rejected": "b"}, row])))
    with pytest.raises(CommandError, match=re.escape(message.format(path))):
        pairs_of(path)


def test_a_dialogue_of_hh_without_a_shared_opening_is_named_by_its_row(tmp_path):
    dialogues = [
        {"chosen": f"{opening} a", "rejected": f"{HH_OPENING} b"} for opening in (HH_OPENING, "x" + HH_OPENING)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(dialogues[0]))
    assert pairs_of(path).train == [Ranking((" a", " b"), HH_OPENING)]
    path.write_text("\n".join(map(json.dumps, dialogues)))
    with pytest.raises(CommandError, match=rf"Expected the dialogues of row 2 of {path} to share the opening"):
        pairs_of(path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_layer": 2}, "model_type of a fresh model, such as gpt2, got None"),
        ({"model_type": "gpt22"}, "as gpt2, got 'gpt22'"),
        (
            {"model_type": "gpt2", "n_layers": 2, "width": 1},
            "sizes of gpt2, got n_layers, width, which its config does not have",
        ),
    ],
)
def test_fresh_models_that_are_none(sizes, message):
    with pytest.raises(CommandError, match=message):
        fresh_config(sizes)


def test_a_model_is_given_or_fresh(data, tmp_path, capsys):
    words = [
        "--task",
        "Reviews",
        "--data",
        data["Reviews"],
        "--model",
        "gpt2",
        "--fresh",
        TINY,
        "--out",
        tmp_path / "m",
    ]
    for verb in ("sft", "classifier", "reward-model"):
        assert run(verb, *words) == 2
        assert "Expected either `model` or `fresh`, got 'gpt2' and" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fresh_model_and_its_tokenizer_learn_from_a_task(data, tmp_path, capsys):
    words = ["--task", "Reviews", "--data", data["Reviews"], "--fresh", TINY, "--learning_rate", "1e-2", "--quiet"]
    assert run("sft", *words, "--out", tmp_path / "tuned", "--n_epochs", "4", "--packing", "true") == 0
    before, after = re.search(r"held out: loss (\S+) -> (\S+),", capsys.readouterr().out).groups()
    assert float(after) < float(before) - 0.5
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").config
    assert (config.n_layer, config.n_embd, config.eos_token_id) == (1, 16, 0)
    characters = ["--task", "ZhReviews", "--data", data["ZhReviews"], "--fresh", TINY, "--n_epochs", "0.1", "--quiet"]
    assert run("sft", *characters, "--fresh_tokenizer", "characters", "--out", tmp_path / "zh") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "zh")
    assert tokenizer.decode(tokenizer.encode("很好，非常满意")) == "很好，非常满意"
    assert len(tokenizer.encode("很好，非常满意")) == 7
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "zh").config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_a_classifier_of_a_task_or_of_a_file(data, tmp_path, capsys):
    model = small_model(tmp_path / "small")
    sizes = '{"model_type": "distilbert", "n_layers": 1, "dim": 16, "hidden_dim": 16, "n_heads": 1}'
    words = ["--learning_rate", "1e-2", "--batch_size", "8", "--n_epochs", "6", "--quiet", "--fresh", sizes]
    assert run("classifier", *words, "--out", tmp_path / "none", "--task", "Reviews", "--data", data["Reviews"]) == 2
    assert "Expected --tokenizer NAME with `fresh`" in capsys.readouterr().err
    rows = [{"text": f"the lamp is {word}", "label": word} for word in ("great", "awful")] * 40
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words += ["--tokenizer", model, "--out", tmp_path / "made"]
    assert run("classifier", *words, "--data", tmp_path / "rows.jsonl", "--held_out", tmp_path / "rows.jsonl") == 0
    assert re.search(r"held out: accuracy 1\.000 \[0\.9\d\d, 1\.000\] of 80 texts", capsys.readouterr().out)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "made").config
    assert config.id2label == {0: "awful", 1: "great"}
    assert run("classifier", *words, "--data", tmp_path / "rows.jsonl", "--labels", "[great, good]") == 2
    assert "Expected labels among great, good, got 'awful'" in capsys.readouterr().err
    words = ["--model", model, "--task", "DailyDialog", "--data", data["DailyDialog"], "--n_epochs", "0.1", "--quiet"]
    assert run("classifier", *words, "--out", tmp_path / "intents", "--max_tokens", "16") == 0
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "intents").config
    assert tuple(config.id2label.values()) == INTENTS


SCORER = '{"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 32}'


def write_preferences(folder, better, worse):
    """Write one preference as pairs, as labels and as a person's answers; return the options that name each source."""
    prompts = [f"{number} the {thing} was " for thing in ("lamp", "phone") for number in range(16)]
    pairs = [{"prompt": prompt, "chosen": f"{better} .", "rejected": f"{worse} ."} for prompt in prompts]
    labels = [{"text": f"{prompt}{word} .", "label": n} for prompt in prompts for word, n in ((better, 1), (worse, 0))]
    for name, rows in (("pairs", pairs), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with FeedbackStore(str(folder / "answers.db")) as store:
        for prompt in prompts:
            store.add(prompt, [f"{better} .", f"{worse} ."], kind="compare")
        while (item := store.next("ann")) is not None:
            store.choose(item, "a" if item.completions[0] == f"{better} ." else "b")
    sources = {name: ["--data", folder / f"{name}.jsonl"] for name in ("pairs", "labels")}
    return {**sources, "feedback": ["--from-feedback", folder / "answers.db"]}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["pairs", "labels", "feedback"])
@pytest.mark.parametrize(
    ("better", "worse"), [("great", "awful"), ("awful", "great")]
)  # the reverse data teach the reverse
def test_a_fresh_reward_model_ranks_as_it_was_told_and_is_a_reward(better, worse, source, tmp_path):
    sources, model = write_preferences(tmp_path, better, worse), small_model(tmp_path / "small")
    words = ["--fresh", SCORER, "--tokenizer", model, *sources[source], "--out", tmp_path / "scorer", "--quiet"]
    assert run("reward-model", *words, "--learning_rate", "1e-2", "--n_epochs", "8", "--batch_size", "8") == 0
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").config
    assert (config.n_layer, config.n_positions, config.vocab_size) == (1, 32, len(AutoTokenizer.from_pretrained(model)))
    reward, tokenizer = Preference(str(tmp_path / "scorer"), stats="stored"), AutoTokenizer.from_pretrained(model)
    scores = [
        reward(Prompt("3 the lamp was "), Preds(tokenizer, tokenizer.encode(f"{word} .")), True)
        for word in (better, worse)
    ]
    assert scores[0] > scores[1] + 1.0  # standard deviations of the training texts' scores


def test_a_fresh_reward_model_needs_a_tokenizer(tmp_path, capsys):
    sources = write_preferences(tmp_path, "great", "awful")
    assert run("reward-model", "--fresh", SCORER, *sources["pairs"], "--out", tmp_path / "scorer") == 2
    assert "Expected --tokenizer NAME with `fresh`, got none" in capsys.readouterr().err


@pytest.mark.parametrize("is_fresh", [False, True])
def test_a_reward_model_goes_on_after_ctrl_c(is_fresh, tmp_path, monkeypatch, capsys):
    model = small_model(tmp_path / "small")
    sources = write_preferences(tmp_path, "great", "awful")
    words = [*sources["pairs"], *(["--fresh", SCORER, "--tokenizer", model] if is_fresh else ["--model", model])]
    words += ["--batch_size", "4", "--quiet"]
    assert run("reward-model", *words, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, step=3)
        assert run("reward-model", *words, "--out", tmp_path / "parts") == 130
    assert "interrupted: the same command with --resume continues" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        asked = press_ctrl_c(patch, step=99)
        assert run("reward-model", *words, "--out", tmp_path / "parts", "--resume") == 0
    assert len(asked) == 5  # of 8
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
