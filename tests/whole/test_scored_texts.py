"""One reading of a text by all that score it: rewards, the training of a reward model, `score_texts` and the critic.

`seen` records the tokens that a Llama really reads, padding left out. The expected tokens are written by hand.
"""

import itertools

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from agents import Labelled, Ranking, RewardModelCritic, score_texts, train_reward_model
from agents.supervised.classifier import _free_pad_id
from agents.supervised.preferences import chat_pair
from agents.supervised.ranking_data import Example, common_closing
from tests.textenv.prompts.test_chat import SPACED
from tests.textenv.prompts.test_chat import tokenizer_with as chat_tokenizer
from textenv import EndReason, Preds, Prompt
from textenv.episodes.completion import Turn
from textenv.prompts.prompts import PromptReader
from textenv.rewards.classifier import Classifier
from textenv.rewards.likelihood import Likelihood
from textenv.rewards.preference import Preference
from textenv.rewards.text_reader import READ_AS, ReadAs, TextReader

WORDS = ["<unk>", "<bos>", "<eos>", "<user>", "<bot>", "<pad>", *"abcdefghijklmnop"]
BOS, EOS, USER, BOT = 1, 2, 3, 4
A, B, D, E, F = (WORDS.index(letter) for letter in "abdef")
KINDS = {"adds BOS": "<bos> $A", "adds EOS": "$A <eos>", "adds both": "<bos> $A <eos>", "adds none": None}
TEMPLATES = {"none": ("", ""), "BOS": ("<bos> ", ""), "EOS": ("", "<eos> "), "both": ("<bos> ", "<eos> ")}
SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SHAPE, num_attention_heads=2, initializer_range=0.5)
ONE_SCORE = LlamaConfig(**SHAPE, num_attention_heads=2, initializer_range=0.5, num_labels=1)
ASKED = [{"role": "user", "content": "a b"}]
SCORED = [*ASKED, {"role": "assistant", "content": "d e"}]


def make_tokenizer(kind="adds none", template="none", pad="<eos>"):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if KINDS[kind]:
        special = [("<bos>", BOS), ("<eos>", EOS)]
        words.post_processor = processors.TemplateProcessing(single=KINDS[kind], special_tokens=special)
    opening, closing = TEMPLATES[template]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token=pad
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    tokenizer.chat_template = (
        opening
        + "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} {% else %}<bot> {{ m.content }} "
        + closing
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
    )
    return tokenizer


def written(tokenizer, text, prompt, end_reason=EndReason.LENGTH):
    """Return a completion as a policy with the same tokenizer writes it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += [EOS] if end_reason is EndReason.EOS else []
    return Preds(tokenizer, ids, context=prompt.ids[-4:], end_reason=end_reason)


@pytest.fixture
def seen(monkeypatch):
    """The texts that any Llama reads, as lists of token ids without padding."""
    texts, forward = [], LlamaModel.forward

    def spy(self, input_ids=None, attention_mask=None, **kwargs):
        is_text = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        texts.extend(row[own.bool()].tolist() for row, own in zip(input_ids, is_text))
        return forward(self, input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", spy)
    return texts


def trained(tokenizer, data, folder, **kwargs):
    options = {"n_epochs": 1, "learning_rate": 1e-3, "progress_bar": False, **kwargs}
    return train_reward_model(CONFIG, tokenizer, data, folder, **options).folder


def load(folder):
    return LlamaForSequenceClassification.from_pretrained(folder).eval()


def all_readings(tokenizer, folder, prompt, preds, scored, seen):
    """Return the tokens and the score of a text in each reader of a trained model; the likelihood has no score."""
    model, row = load(folder), ([prompt], [preds], [True])
    classifier = Classifier(folder, label=0, output="logit", reads="whole")
    likelihood = Likelihood(LlamaForCausalLM(CONFIG), tokenizer=tokenizer)
    critic = RewardModelCritic(str(folder)).build(hidden_size=16)
    ids = torch.tensor([[*prompt.ids.tolist(), *preds.ids.tolist()]])
    last = torch.tensor([0]), torch.tensor([ids.shape[1] - 1])
    readers = {
        "score_texts": lambda: score_texts(model, tokenizer, [scored])[0],
        "Preference": lambda: Preference(folder).score(*row)[0],
        "Classifier": lambda: classifier.score(*row)[0],
        "Likelihood": lambda: likelihood.score(*row) and None,
        "critic": lambda: critic(critic.read(ids, *last)).item(),
    }
    readings = {}
    for name, score in readers.items():
        seen.clear()
        value = score()
        readings[name] = (seen[-1], value)
    return readings


def assert_all_equal(readings, expected):
    assert {name: ids for name, (ids, _) in readings.items()} == dict.fromkeys(readings, expected)
    scores = [score for _, score in readings.values() if score is not None]
    assert len(scores) == 4 and scores == pytest.approx([scores[0]] * 4, abs=1e-4)


def test_rows_of_texts_and_of_conversations_together_are_all_read_as_texts(seen, tmp_path):
    """One model reads in one way: the tokenizer's BOS stands in front of the conversations, too."""
    tokenizer = make_tokenizer("adds BOS")
    row = {"prompt": ASKED, "chosen": "d e", "rejected": "d f"}
    data = [chat_pair(row, tokenizer, "row 1"), Ranking((" d e", " d f"), prompt="a b")]
    folder = trained(tokenizer, data, tmp_path / "model")
    expected = [BOS, USER, A, B, BOT, D, E]
    assert expected in seen and [BOS, A, B, D, E] in seen
    seen.clear()
    prompt = PromptReader(tokenizer).read(ASKED)
    for reward in (Preference(folder), Preference(folder, chat=True)):
        reward(prompt, written(tokenizer, "d e", prompt), True)
    assert [ids for ids in seen if ids != expected] == [] and len(seen) == 2


PADS = dict(zip(itertools.product(KINDS, TEMPLATES), itertools.cycle(["<eos>", None, "<pad>"])))


@pytest.mark.parametrize("pad", ["<eos>", None, "<pad>"])
@pytest.mark.parametrize("kind", KINDS)
def test_c11_all_readers_read_a_text_alike(kind, pad, seen, tmp_path):
    tokenizer = make_tokenizer(kind, pad=pad)
    expected = [BOS] * ("both" in kind or "BOS" in kind) + [A, B, D, E]
    folder = trained(tokenizer, [Ranking((" d e", " d f"), prompt="a b")], tmp_path / "model")
    assert expected in seen and [*expected[:-1], F] in seen
    prompt = PromptReader(tokenizer).read("a b")
    preds = written(tokenizer, " d e", prompt)
    assert_all_equal(all_readings(tokenizer, folder, prompt, preds, "a b d e", seen), expected)


@pytest.mark.parametrize(("kind", "template", "pad"), [(*pair, pad) for pair, pad in PADS.items()])
def test_c11_all_readers_read_a_conversation_alike(kind, template, pad, seen, tmp_path):
    """BOS stands there as often as the template writes it, and nothing closes the text before the policy does."""
    tokenizer = make_tokenizer(kind, template, pad)
    expected = [BOS] * (template in ("BOS", "both")) + [USER, A, B, BOT, D, E]
    row = {"prompt": ASKED, "chosen": "d e", "rejected": "d f"}
    folder = trained(tokenizer, [chat_pair(row, tokenizer, "row 1")], tmp_path / "model")
    assert expected in seen and [*expected[:-1], F] in seen
    assert ReadAs.of(load(folder).config) == ReadAs(closing=(), is_chat=True)
    prompt = PromptReader(tokenizer).read(ASKED)
    preds = written(tokenizer, "d e", prompt)
    assert_all_equal(all_readings(tokenizer, folder, prompt, preds, SCORED, seen), expected)
    seen.clear()
    in_chat = Preference(folder, chat=True).score([prompt, Prompt("a b")], [preds, preds], [True, True])
    assert seen == [expected, expected] and in_chat == pytest.approx([in_chat[0]] * 2)


@pytest.mark.parametrize(("kind", "template", "pad"), [(*pair, pad) for pair, pad in PADS.items()])
def test_c11_a_model_of_others_reads_what_its_authors_code_gives_it(kind, template, pad, seen):
    """transformers' own encoding, with BOS once; the score is that of the last token, also where that is the pad."""
    tokenizer = make_tokenizer(kind, template, pad)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(ONE_SCORE).eval()
    prompt, chat = (PromptReader(tokenizer).read(source) for source in ("a b", ASKED))
    preds = written(tokenizer, " d e", prompt)
    plain = [BOS] * ("both" in kind or "BOS" in kind) + [A, B, D, E] + [EOS] * ("both" in kind or "EOS" in kind)
    rendered = tokenizer.apply_chat_template(SCORED, tokenize=True, return_dict=False)
    reward = Preference(model, tokenizer=tokenizer)
    for reader in (reward, Classifier(model, 0, output="logit", reads="whole", tokenizer=tokenizer)):
        seen.clear()
        scores = reader.score([prompt, chat], [preds, written(tokenizer, "d e", chat)], [True, True])
        assert sorted(seen) == sorted([plain, rendered])
        with torch.no_grad():
            hidden = [model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in (plain, rendered)]
            alone = model.score(torch.stack(hidden))[:, 0].tolist()
        assert scores == pytest.approx(alone, abs=1e-5)
    assert score_texts(model, tokenizer, ["a b d e", SCORED]) == pytest.approx(scores, abs=1e-5)


def test_a_text_that_begins_with_bos_and_ends_with_eos_gets_no_second_ones():
    reader = TextReader(make_tokenizer("adds both"), 9)
    assert reader.encode("a b") == reader.encode("<bos> a b <eos>") == [BOS, A, B, EOS]
    assert reader.encode("") == [BOS, EOS]
    assert TextReader(make_tokenizer("adds both"), 9, read_as=ReadAs(closing=(EOS,))).encode("a <eos>") == [BOS, A, EOS]
    assert TextReader(make_tokenizer("adds both"), 9, read_as=ReadAs()).encode("a b") == [BOS, A, B]


@pytest.mark.parametrize("pad", ["<unk>", "<eos>", None])
def test_texts_that_all_close_are_scored_at_the_closing_token(pad, seen, tmp_path):
    """Texts of chats that were rendered beforehand: a reward that reads a chat, or a text, closes it as well."""
    tokenizer = make_tokenizer("adds BOS", "EOS", pad)
    pairs = [Ranking((f"<user> a <bot> d {x} <eos>", f"<user> a <bot> e {x} <eos>")) for x in "fgh"]
    folder = trained(tokenizer, pairs, tmp_path / "model")
    assert ReadAs.of(load(folder).config) == ReadAs(closing=(EOS,), is_chat=False)
    expected = [BOS, USER, A, BOT, D, F, EOS]
    assert expected in seen
    texts = ["<user> a <bot> d f <eos>", "<user> a <bot> d f"]
    [score, without] = score_texts(load(folder), tokenizer, texts)
    assert score == pytest.approx(without)
    preds = written(tokenizer, "d f", Prompt("a"))
    for prompt, chat in ((Prompt("a"), True), (Prompt("<user> a <bot> "), False)):
        seen.clear()
        assert Preference(folder, chat=chat)(prompt, preds, True) == pytest.approx(score, abs=1e-5)
        assert seen == [expected]
    with pytest.raises(ValueError, match=r"at the text's own last token, got .* at the closing \['<eos>'\] behind it"):
        RewardModelCritic(str(folder)).build(hidden_size=16)


def test_what_closes_all_texts_is_special_tokens_and_the_space_behind_them():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\n"])  # id 22
    for texts, closing in (
        ([[A, EOS, 22], [B, EOS, 22]], (EOS, 22)),
        ([[A, BOT, EOS], [B, BOT, EOS]], (BOT, EOS)),
        ([[A, EOS, D], [B, EOS, D]], ()),  # a word behind it: all texts end alike by chance
        ([[A, 0], [B, 0]], ()),  # an unknown word
        ([[A, EOS], [B]], ()),
        ([[A, EOS], [A, EOS]], ()),  # one text does not show where it ends
    ):
        assert common_closing(tokenizer, [Example(texts, [])]) == closing


def test_a_critic_refuses_a_published_model_whose_tokenizer_closes_texts(tmp_path):
    for kind in ("adds EOS", "adds BOS"):
        LlamaForSequenceClassification(ONE_SCORE).save_pretrained(tmp_path)
        make_tokenizer(kind).save_pretrained(tmp_path)
        if kind == "adds EOS":
            with pytest.raises(ValueError, match=r"at the closing \['<eos>'\] behind it"):
                RewardModelCritic(str(tmp_path)).build(hidden_size=16)
        else:
            RewardModelCritic(str(tmp_path)).build(hidden_size=16)


@pytest.mark.parametrize("kind", KINDS)
def test_c11_normalised_scores_of_the_training_texts_have_mean_0_and_deviation_1(kind, tmp_path):
    tokenizer = make_tokenizer(kind)
    pairs = [Ranking((f" d {x}", f" e {x}"), prompt=prompt) for prompt in "abc" for x in "fghij"]
    folder = trained(tokenizer, pairs, tmp_path / "model", n_epochs=4, learning_rate=3e-3)
    rows = [(PromptReader(tokenizer).read(pair.prompt), text) for pair in pairs for text in pair.texts]
    preds = [written(tokenizer, text, prompt) for prompt, text in rows]
    prompts, dones = [prompt for prompt, _ in rows], [True] * len(rows)
    scores = Preference(folder, stats="stored").score(prompts, preds, dones)
    assert abs(np.mean(scores)) < 1e-4 and abs(np.std(scores) - 1) < 1e-4
    as_trained = score_texts(load(folder), tokenizer, [prompt + text for prompt, text in rows])
    np.testing.assert_allclose(Preference(folder).score(prompts, preds, dones), as_trained, atol=1e-5)


# Conversations.


def test_turns_and_replies_follow_the_messages_of_the_prompt():
    tokenizer = make_tokenizer(template="EOS")
    reader, prompt = TextReader(tokenizer, 40), PromptReader(tokenizer).read(ASKED)
    preds = Preds(tokenizer, [F], context=[BOT], closed=[Turn("d", "e")])
    whole = reader.whole(prompt, preds)
    assert reader.text(whole) == "<user> a b <bot> d <eos> <user> e <bot> f <eos> "
    assert reader.whole(Prompt("a"), preds) == "ad\nf"  # no chat: the policy's turns alone
    assert prompt.messages == ASKED
    begun = PromptReader(tokenizer).read([*ASKED, {"role": "assistant", "content": "d"}])
    joined = reader.whole(begun, Preds(tokenizer, [F], context=[D]))
    assert [message["role"] for message in joined] == ["user", "assistant"] and joined[1]["content"].startswith("d")


def test_the_space_that_a_template_writes_in_front_of_an_answer_stands_there_once():
    """The policy has written it; the rendering of its text as a message would write it again."""
    tokenizer = chat_tokenizer(SPACED)
    [good, _], prompt, *_ = chat_pair({"prompt": ASKED, "chosen": "good day", "rejected": "bad"}, tokenizer, "row 1")
    read = PromptReader(tokenizer).read(ASKED)
    reader = TextReader(tokenizer, 99, read_as=ReadAs(is_chat=True))
    assert good == " good day" and prompt == read == "<s>[INST] a b [/INST]"
    trained = reader.encode(prompt + good)
    for text in (" good day", "good day"):
        preds = Preds(tokenizer, tokenizer.encode(text, add_special_tokens=False), context=read.ids[-4:])
        assert reader.text(reader.whole(read, preds)) == prompt + good
        assert reader.encode(reader.whole(read, preds)) == trained
        reward = Likelihood(
            LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 300}, num_attention_heads=2)), tokenizer=tokenizer
        )
        ids, counts = reward._encode(read, preds)
        assert ids == trained and sum(counts) == len(" good day")
    two = Preds(tokenizer, tokenizer.encode(" yes"), context=read.ids[-4:], closed=[Turn(" no", "so?")])
    assert reader.text(reader.whole(read, two)) == "<s>[INST] a b [/INST] no </s><s>[INST] so? [/INST] yes"


def test_a_model_trained_on_texts_or_without_template_reads_a_chat_as_its_text():
    tokenizer = make_tokenizer()
    prompt = PromptReader(tokenizer).read(ASKED)
    preds = written(tokenizer, "d", prompt)
    assert TextReader(tokenizer, 9, read_as=ReadAs()).whole(prompt, preds) == "<user> a b <bot>  d"
    tokenizer.chat_template = None
    assert TextReader(tokenizer, 9).whole(prompt, preds) == "<user> a b <bot>  d"


def test_the_likelihood_counts_the_answers_of_a_conversation_and_the_end_token():
    tokenizer = make_tokenizer("adds both", "both")
    prompt = PromptReader(tokenizer).read(ASKED)
    reward = Likelihood(LlamaForCausalLM(CONFIG), tokenizer=tokenizer)
    preds = Preds(tokenizer, [F, EOS], context=[BOT], closed=[Turn("d", "e")], end_reason=EndReason.EOS)
    ids = [BOS, USER, A, B, BOT, D, EOS, USER, E, BOT, F, EOS]
    assert reward._encode(prompt, preds) == (ids, [token in (D, F) or place == 11 for place, token in enumerate(ids)])
    empty = Preds(tokenizer, [EOS], context=[BOT], end_reason=EndReason.EOS)
    assert reward._encode(prompt, empty) == ([BOS, USER, A, B, BOT, EOS], [False] * 5 + [True])
    short = Likelihood(reward.model, tokenizer=tokenizer, max_length=4)
    plain = Preds(tokenizer, [D, E], context=[B])
    assert short._encode(Prompt("a b"), plain) == ([BOS, B, D, E], [False, False, True, True])


# Length.


def test_a_reward_cuts_texts_where_the_training_did_and_keeps_bos(seen, tmp_path):
    tokenizer = make_tokenizer("adds both")
    data = [Labelled("a b d e", 1.0), Labelled("a b d f", 0.0)]
    folder = trained(tokenizer, data, tmp_path / "model", max_tokens=3)
    assert [BOS, D, E] in seen and [BOS, D, F] in seen
    seen.clear()
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than max_length=3"):
        prompt = PromptReader(tokenizer).read("a b")
        Preference(folder)(prompt, written(tokenizer, " d e", prompt), True)
    assert seen == [[BOS, D, E]]
    with pytest.raises(ValueError, match="leave room beside the 2 special tokens around a text, got 2"):
        TextReader(tokenizer, 2).encode("a")
    assert TextReader(tokenizer, 4, "right").encode("a b d") == [BOS, A, B, EOS]


# Padding in training, and the record in a config.


def test_a_classifier_is_trained_with_a_pad_token_with_which_no_text_ends():
    assert _free_pad_id(5, [1, 2], 9) == 5
    assert _free_pad_id(2, [0, 2], 9) == 1
    with pytest.raises(ValueError, match="texts that end with every token"):
        _free_pad_id(0, [0, 1], 2)


@pytest.mark.parametrize("entry", [{}, 3, {"closing": [2]}, {"closing": ["a"], "is_chat": True}])
def test_a_damaged_record_is_named(entry):
    with pytest.raises(ValueError, match=f"`closing`, and `is_chat`, in {READ_AS} of a config"):
        ReadAs.of(LlamaConfig(**{READ_AS: entry}))
