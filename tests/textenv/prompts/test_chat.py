"""Chats as prompts: the tokens of the chat template, special tokens once, and replies between turns."""

import json

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from agents import evaluate, generate, word_tokenizer
from tests.helpers.training import tiny_agent, tiny_config
from textenv import TextEnv
from textenv.prompts.prompts import PromptReader

# Like the templates of Qwen and Llama 3; Llama 3's trims contents and writes BOS itself.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = "<s>" + CHATML.replace("m.content", "m.content | trim")
# Like Llama 2's: no opening of the assistant's turn, and a space in front of its text.
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('Start with the user') }}{% endif %}" + CHATML
SPECIAL = ["<eos>", "<s>", "<|im_start|>", "<|im_end|>"]
EOS, BOS, START, END = range(4)
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
OPEN = [*CHAT, {"role": "assistant", "content": "well "}]
SHOWN = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"


def tokenizer_with(template=None, opens=False):
    """Make a tokenizer of bytes, four special tokens and a chat template; with `opens`, a text begins with BOS."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Fast(models.BPE({word: i for i, word in enumerate(words)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    if opens:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="<eos>",
        bos_token="<s>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=template,
    )


def template_ids(tokenizer, messages, **kwargs):
    """Return the tokens that transformers makes of messages."""
    options = {"add_generation_prompt": True, **kwargs}
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def no_reward(prompt, preds, done):
    return 0.0


def chat_env(prompts=(CHAT,), template=CHATML, opens=False, cls=TextEnv, **kwargs):
    if cls is TextEnv:
        kwargs.setdefault("reward", no_reward)
    settings = {"max_new_tokens": 12, "stop_ids": [END], **kwargs}
    return cls(list(prompts), tokenizer_with(template, opens), **settings)


# Prompts


@pytest.mark.parametrize("opens", [False, True], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("template", [CHATML, TRIMMED, SPACED], ids=["chatml", "trimmed", "spaced"])
def test_tokens_are_those_of_the_template(template, opens):
    tokenizer = tokenizer_with(template, opens)
    prompt = PromptReader(tokenizer).read(CHAT)
    assert prompt.ids.tolist() == template_ids(tokenizer, CHAT)
    assert prompt == tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt.ids.tolist().count(BOS) == template.count("<s>")


def test_the_text_is_the_rendering_and_the_row_keeps_the_messages():
    prompt = PromptReader(tokenizer_with(CHATML)).read(CHAT)
    assert prompt == SHOWN and prompt.messages == CHAT and prompt.row == {"prompt": CHAT}
    assert PromptReader(tokenizer_with(CHATML)).read(prompt).ids.tolist() == prompt.ids.tolist()
    assert PromptReader(tokenizer_with(CHATML)).read("hello").messages is None


def test_an_assistants_last_message_is_continued():
    tokenizer = tokenizer_with(TRIMMED)
    prompt = PromptReader(tokenizer).read(OPEN)
    expected = template_ids(tokenizer, OPEN, add_generation_prompt=False, continue_final_message=True)
    assert prompt.ids.tolist() == expected and prompt.endswith("assistant\nwell")


def test_rows_files_and_bare_chats(tmp_path):
    rows = [{"messages": CHAT, "answer": "yes", "max_new_tokens": 3}, {"messages": OPEN, "answer": "no"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for prompts in (rows, path):
        env = TextEnv(prompts, tokenizer_with(CHATML), reward=no_reward, max_new_tokens=4,
                      prompt_column="messages", references_column="answer")  # fmt: skip
        first, second = env.prompts
        assert first == SHOWN and first.row == rows[0] and first.references == ["yes"] and first.max_new_tokens == 3
        assert second.messages == OPEN and second.endswith("assistant\nwell ")
    path.write_text(json.dumps(CHAT) + "\n")
    assert list(TextEnv(path, tokenizer_with(CHATML), reward=no_reward).prompts) == [SHOWN]


def test_a_chat_is_cut_only_on_request():
    """A BOS that the template writes is kept; otherwise none is added."""
    tokenizer = tokenizer_with(TRIMMED, opens=True)
    ids = template_ids(tokenizer, CHAT)
    with pytest.raises(ValueError, match=rf"at most max_prompt_tokens=20 tokens, got {len(ids)}"):
        PromptReader(tokenizer, max_prompt_tokens=20).read(CHAT)
    left = PromptReader(tokenizer, max_prompt_tokens=20, truncation_side="left").read(CHAT)
    assert left.ids.tolist() == [BOS, *ids[-19:]] and left.messages == CHAT
    bare = tokenizer_with(CHATML, opens=True)
    cut = PromptReader(bare, max_prompt_tokens=20, truncation_side="left").read(CHAT)
    assert cut.ids.tolist() == template_ids(bare, CHAT)[-20:]


@pytest.mark.parametrize(
    "message",
    [
        {"from": "human", "value": "hi"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"content": "hi"},
        "hi",
    ],
)
def test_another_format_of_messages_is_refused(message):
    with pytest.raises(
        ValueError,
        match=r"Expected message 1 of prompt 0 to have the texts 'role' and .*Rename the keys",
    ):
        chat_env([[CHAT[0], message]])


@pytest.mark.parametrize("make", [tokenizer_with, lambda: word_tokenizer(["hi"])])
def test_a_tokenizer_without_a_template_is_refused(make):
    with pytest.raises(ValueError, match="Expected a tokenizer with a chat template for prompt 0, which is a list of"):
        TextEnv([CHAT], make(), reward=no_reward)


def test_a_tokenizer_that_knows_no_templates_is_refused(make_env):
    with pytest.raises(ValueError, match=r"got CharTokenizer without one. Take the tokenizer of a chat model"):
        make_env([CHAT])


def test_an_error_of_the_template_names_the_prompt():
    with pytest.raises(ValueError, match="The chat template refuses prompt 1: TemplateError: Start with the user"):
        chat_env([CHAT[1:], CHAT], template=ALTERNATING)


def test_an_empty_chat_and_a_chat_in_place_of_a_list_of_chats():
    with pytest.raises(ValueError, match=r"Expected prompt 0 to have at least one token, got \[\]"):
        chat_env([[]])
    with pytest.raises(ValueError, match=r"'content'\].* A chat is one prompt: a list of its messages"):
        chat_env(CHAT)


def test_generate_and_evaluate_take_chats():
    env = chat_env([CHAT, "plain"], max_new_tokens=4)
    model = tiny_agent(env, lm=tiny_config(vocab_size=len(env.tokenizer), n_positions=160))
    (generation,) = generate(model, [CHAT], env.tokenizer, max_new_tokens=4)
    assert generation.prompt == SHOWN and generation.prompt.messages == CHAT and 1 <= len(generation.ids) <= 4
    rows = [{"prompt": CHAT, "answer": "yes"}, {"prompt": OPEN, "answer": "no"}]
    result = evaluate(model, rows, env.tokenizer, references_column="answer", max_new_tokens=4)
    assert [sample.prompt.references for sample in result.generations] == [["yes"], ["no"]]
    assert str(result.generations[0].prompt) == SHOWN


# Replies


class Talk(TextEnv):
    """An env that answers with the number of the turn."""

    def get_reward(self, prompt, preds, done):
        return 0.0

    def respond(self, prompt, preds):
        return f"turn {len(preds.turns)}"


def talk(*texts, template=CHATML, prompt=CHAT, **kwargs):
    """Write one text per turn, special tokens included; return the env and the observed tokens."""
    settings = {"max_new_tokens": 60, "max_turns": 3, "max_response_tokens": 90, **kwargs}
    env = chat_env([prompt], template, cls=Talk, **settings)
    observation = env.reset()[0]
    for text in texts:
        for token in env.tokenizer.encode(text, add_special_tokens=False):
            observation = env.step(token)[0]
    return env, [token for token in observation.tolist() if token >= 0]


def conversation(*said, start=CHAT):
    """Return the messages of a conversation in which the policy writes these texts."""
    messages = list(start)
    for turn, text in enumerate(said, 1):
        if messages[-1]["role"] == "assistant":
            messages[-1] = {"role": "assistant", "content": messages[-1]["content"] + text}
        else:
            messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": f"turn {turn}"})
    return messages


@pytest.mark.parametrize("template", [CHATML, TRIMMED], ids=["chatml", "trimmed"])
@pytest.mark.parametrize("said", [["hi"], ["hi", "you"]], ids=["one", "two"])
def test_a_reply_is_the_templates_text_between_two_turns(template, said):
    """The observation equals the rendering of the whole conversation, token for token."""
    env, tokens = talk(*(text + "<|im_end|>" for text in said), template=template)
    assert tokens == template_ids(env.tokenizer, conversation(*said))


def test_a_reply_behind_an_opened_answer():
    env, tokens = talk("hi<|im_end|>", prompt=OPEN)
    assert tokens == template_ids(env.tokenizer, conversation("hi", start=OPEN))


def test_the_policys_spaces_stay_though_the_template_would_trim_them():
    env, tokens = talk(" hi <|im_end|>", template=TRIMMED)
    text = env.tokenizer.decode(tokens)
    assert "assistant\n hi <|im_end|>\n<|im_start|>user\nturn 1<|im_end|>\n<|im_start|>assistant\n" in text


def test_a_turn_that_ended_otherwise_is_closed_by_the_template():
    """After a stop string or another end token, the template's end of turn is observed."""
    for ending, options in (("!", {"stop_strings": ["!"]}), ("<eos>", {"stop_ids": [EOS]})):
        env, tokens = talk("hi" + ending, **options)
        text = env.tokenizer.decode(tokens)
        assert text.endswith(f"hi{ending}<|im_end|>\n<|im_start|>user\nturn 1<|im_end|>\n<|im_start|>assistant\n")
    env, tokens = talk("hi<|im_end|>", stop_ids=[], stop_strings=["<|im_end|>"])  # as a stop string
    assert tokens == template_ids(env.tokenizer, conversation("hi"))


def test_turns_show_the_replies_content_alone():
    env, _ = talk("hi<|im_end|>", "you")
    assert [tuple(turn) for turn in env._lanes.preds(0).turns] == [("hi", "turn 1"), ("you", None)]


def test_a_template_that_rewrites_what_came_before_is_refused():
    with pytest.raises(
        ValueError, match=r"keeps earlier messages as they are.*'.*0A1place.* another way. Give prompts"
    ):
        talk("hi<|im_end|>", template=SPACED)


def test_a_reply_to_a_text_is_observed_as_it_is():
    env, tokens = talk("hi<|im_end|>", prompt="hello")
    assert env.tokenizer.decode(tokens) == "hellohi<|im_end|>turn 1"


@pytest.mark.parametrize("value", ["ab \ud83d", [{"role": "user", "content": "ab \ud83d"}]])
def test_a_lone_surrogate_is_refused_in_texts_and_chats(value):
    reader = PromptReader(tokenizer_with(CHATML))
    assert "ab 🙂" in reader.read([{"role": "user", "content": "ab 🙂"}])
    with pytest.raises(ValueError, match=r"whole characters in prompt 7, got a lone surrogate in '.*ab \\ud83d"):
        reader.read(value, 7)
