"""Encoder-decoders: building, loading, training, resuming, export, generation and refusals."""

import shutil

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from transformers import AutoModelForSeq2SeqLM, UMT5Config

from agents import KLPenalty, Pretrained
from agents.build import make_agent
from agents.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from agents.checkpoints.hf_export import export
from agents.evaluation.generation import generate
from agents.evaluation.sample_table import SampleTable
from agents.models.seq2seq import Seq2SeqBackbone
from agents.models.sequences import SequenceBatch
from agents.policies.actor_critic import LMActorCritic
from tests.helpers.models import N_TOKENS, CheckRatio, collect, few, make_policy, make_ppo, observe, seldom
from tests.helpers.seq2seq import T5, expected_logits, tiny_seq2seq
from tests.helpers.training import TOKENIZER, run_state, tiny_agent, tiny_env
from textenv import CharTokenizer, TextEnv

ROWS = observe([([5, 6, 7, 8, 9, 4], [1, 2]), ([3], []), ([2, 2, 8], [7, 7, 7, 7, 1])])
FAMILIES = ("t5", "t5 untied", "bart")


def log_probabilities(policy):
    with torch.no_grad():
        return policy.get_distribution(ROWS).log_probabilities


def saved(folder, family):
    torch.manual_seed(3)
    AutoModelForSeq2SeqLM.from_config(tiny_seq2seq(family)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_and_a_spec_load_the_whole_model(family, tmp_path):
    path = saved(tmp_path, family)
    expected = expected_logits(AutoModelForSeq2SeqLM.from_pretrained(path), ROWS).log_softmax(-1)
    for lm in (path, Pretrained(path)):
        policy = make_policy(lm)
        assert isinstance(policy.lm.backbone, Seq2SeqBackbone)
        torch.testing.assert_close(log_probabilities(policy), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_without_its_folder(family, tmp_path):
    path = saved(tmp_path / "model", family)
    model = make_ppo(Pretrained(path))
    before = log_probabilities(model.policy)
    model.learn(48)
    trained = log_probabilities(model.policy)
    assert not torch.equal(before, trained)
    model.save(tmp_path / "agent.zip")
    shutil.rmtree(path)
    assert torch.equal(log_probabilities(PPO.load(tmp_path / "agent.zip", device="cpu").policy), trained)


def test_the_bias_of_the_logits_is_part_of_them_when_loaded_later(tmp_path):
    """`final_logits_bias` is zero in a fresh model, but may be loaded later, so it must always be added."""
    model = make_ppo(tiny_seq2seq("bart"))
    lm = model.policy.lm.backbone.model
    lm.final_logits_bias.copy_(torch.linspace(-3, 3, lm.final_logits_bias.shape[1])[None])
    expected = expected_logits(lm, ROWS).log_softmax(-1)
    model.save(tmp_path / "agent.zip")
    for policy in (model.policy, PPO.load(tmp_path / "agent.zip", device="cpu").policy):
        torch.testing.assert_close(log_probabilities(policy), expected, atol=1e-5, rtol=0)


def test_a_head_that_does_something_else_runs_the_whole_model():
    """UMT5 scales its logits without a flag in its config, so the probe must find it."""
    shape = {name: value for name, value in T5.items() if name != "tie_word_embeddings"}
    config = UMT5Config(**{**shape, "tie_word_embeddings": True})
    with pytest.warns(UserWarning, match="does not decode exactly"):
        model = make_ppo(config)
    assert not model.policy.lm.backbone.head_is_linear
    expected = expected_logits(model.policy.lm.backbone.model, ROWS).log_softmax(-1)
    torch.testing.assert_close(log_probabilities(model.policy), expected, atol=1e-5, rtol=0)
    check = CheckRatio()
    collect(model, check)
    assert check.largest[0] < 1e-5


# Training


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_sb3_trains_it_unmodified(family, algorithm):
    """All weights are trained, with micro-batches, a KL penalty and a sample table."""
    model = tiny_agent(lm=tiny_seq2seq(family), algorithm=algorithm, rollout_buffer_kwargs={"micro_batch_tokens": 16})
    before = {name: weight.clone() for name, weight in model.policy.named_parameters()}
    model.learn(48, callback=[KLPenalty(0.1), SampleTable(["ab", "c"], TOKENIZER, max_new_tokens=4)])
    unmoved = [name for name, weight in model.policy.named_parameters() if torch.equal(weight, before[name])]
    assert unmoved == []


@pytest.mark.filterwarnings("ignore:.* sequences in 1 minibatches:UserWarning")  # counts waiting segments
@pytest.mark.parametrize("family", few(["t5", "bart"], 1))
def test_e8_a_resumed_run_is_the_run(family, tmp_path):
    """Episodes of 7 tokens straddle rollouts of 5."""

    def agent():
        options = {"n_steps": 5, "rollout_buffer_kwargs": {"complete_episodes": True}}
        return tiny_agent(tiny_env(max_new_tokens=7), lm=tiny_seq2seq(family), **options)

    through = agent().learn(60, callback=KLPenalty(0.1))
    save_checkpoint(through, tmp_path / "run")
    through.learn(60, callback=KLPenalty(0.1), reset_num_timesteps=False)
    resumed = agent()
    load_checkpoint(resumed, tmp_path / "run")
    resumed.learn(60, callback=KLPenalty(0.1), reset_num_timesteps=False)
    assert run_state(resumed) == run_state(through)


def test_autocast():
    model = make_ppo(tiny_seq2seq("t5"), policy_kwargs={"autocast": "bfloat16"})
    check = CheckRatio()
    collect(model, check)
    assert check.largest[0] < 0.2  # rounding of 16 bits
    model.learn(48)
    assert all(weight.isfinite().all() for weight in model.policy.parameters())


# Texts that it writes


@pytest.mark.parametrize("family", FAMILIES)
def test_e9_the_exported_folder_writes_the_same(family, tmp_path):
    tokenizer = CharTokenizer()
    larger = {} if family == "bart" else {"initializer_factor": 3.0}  # the texts differ then
    model = make_ppo(tiny_seq2seq(family, vocab_size=len(tokenizer), **larger))
    model.learn(48)
    export(model, None, tmp_path / "model")
    lm, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    texts = ["a", "bcd", "hello you", "no"]
    ours = generate(model, texts, tokenizer, max_new_tokens=8, deterministic=True, n_envs=2)
    for text, generation in zip(texts, ours):
        ids = torch.tensor([tokenizer.encode(text)])
        written = lm.generate(input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=8, do_sample=False)
        # `generate` of transformers puts the decoder's start token in front.
        assert written[0, 1 : 1 + len(generation.ids)].tolist() == generation.ids
    assert len({tuple(generation.ids) for generation in ours}) > 1


def test_generate_cached_or_not_is_the_same():
    prompts = ["a", "bcd", "efghijk", "lm", "nopq"]
    fast, slow = (make_policy(tiny_seq2seq("bart"), cache=cache) for cache in (True, False))
    written = [generate(p, prompts, CharTokenizer(), n=3, max_new_tokens=6, n_envs=4) for p in (fast, slow)]
    assert [one.ids for one in written[0]] == [one.ids for one in written[1]]


# Refusals


def test_each_half_has_its_own_limit():
    config = tiny_seq2seq("bart", max_position_embeddings=8)

    def agent(n_prompt, n_new):
        env = TextEnv(["a" * n_prompt], CharTokenizer(), reward=lambda *args: 0.0, max_new_tokens=n_new)
        return make_agent(env, config, n_envs=8, device="cpu")

    agent(8, 7).learn(8 * 7)
    with pytest.raises(ValueError, match=r"Expected prompts to fit the encoder's 8 positions, got up to 9 tokens: .*"):
        agent(9, 3)
    with pytest.raises(ValueError, match=r"completions to fit the decoder's 8 positions, .* up to 8 tokens: .*max_new"):
        agent(3, 8)
    policy = make_policy(config)
    for rows in (observe([([1] * 9, [])]), observe([([1], [1] * 9)])):
        with pytest.raises(ValueError, match=r"positions, .*got up to 9 tokens"):
            policy.predict(rows.numpy())
        with pytest.raises(ValueError, match=r"positions, .*got up to 9 tokens"):
            policy.get_distribution(rows)
    with pytest.raises(ValueError, match="the encoder's 8 positions"):
        generate(policy, ["a" * 9], CharTokenizer())
    with pytest.warns(UserWarning, match="at most 7 tokens, not 64"):
        assert len(generate(policy, ["a" * 8], CharTokenizer(), stop_ids=())[0].ids) == 7


def test_no_token_to_begin_with():
    with pytest.raises(ValueError, match="Expected a config with `decoder_start_token_id`, got None: set it"):
        make_policy(tiny_seq2seq("t5", decoder_start_token_id=None))


def test_too_few_embedding_rows():
    with pytest.raises(ValueError, match=rf"at least the {N_TOKENS} tokens of the tokenizer, got 20 embedding rows"):
        make_policy(tiny_seq2seq("t5", vocab_size=20))


def test_a_batch_without_its_prompts_lengths():
    policy = make_policy(tiny_seq2seq())
    batch = SequenceBatch(torch.ones(1, 3, dtype=torch.long), np.array([3]), np.array([0]), np.array([2]))
    with pytest.raises(ValueError, match="Expected `n_prompt` of the SequenceBatch, got None"):
        policy.evaluate_actions(batch, torch.tensor([1]))
    batch.n_prompt = np.array([2])
    policy.evaluate_actions(batch, torch.tensor([1]))
    batch.cols = np.array([0])
    with pytest.raises(ValueError, match="Expected columns from a prompt's last token on, got one 1 before it"):
        policy.evaluate_actions(batch, torch.tensor([1]))


def test_an_empty_prompt_is_read_as_the_token_that_begins():
    policy = make_policy(tiny_seq2seq("bart", decoder_start_token_id=5))
    rows = observe([([], [3, 4]), ([1, 2], [3])])
    expected = expected_logits(policy.lm.backbone.model, observe([([5], [3, 4]), ([1, 2], [3])])).log_softmax(-1)
    torch.testing.assert_close(policy.get_distribution(rows).log_probabilities, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        _, logits = policy.lm.rollout_cache.read(*policy.lm._unpack(rows))
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="to have at least one token"):
        TextEnv([""], CharTokenizer(), reward=lambda *args: 0.0)


def test_a_closing_token_in_a_prompt_of_ids_is_read():
    """`TextEnv` drops an end token that the tokenizer adds behind a text prompt; a prompt of ids keeps its own."""
    tokenizer = CharTokenizer()
    closed = [*tokenizer.encode("ab"), tokenizer.eos_token_id]
    model = make_ppo(tiny_seq2seq("t5"), prompts=[closed])
    collect(model)
    segment = model.rollout_buffer.segments[0]
    assert segment.tokens[: segment.n_prompt].tolist() == closed


def test_causal_models_are_not_asked_for_prompts(monkeypatch):
    """Causal models do not compute where prompts end."""
    monkeypatch.setattr("agents.policies.actor_critic.prompt_lengths", None)
    assert isinstance(make_policy().lm, LMActorCritic)
    collect(make_ppo())


# It learns


LETTERS = "abcdefg"


def emits_the_letter(reward_on: bool) -> float:
    """Train, and return the share of samples that are the prompt's letter, which is at one of three positions."""
    tokenizer = CharTokenizer(LETTERS + "x")
    prompts = [text for letter in LETTERS for text in (letter, "x" + letter, letter + "xx")]

    def reward(prompt, preds, done):
        return float(reward_on and preds.text == str(prompt).strip("x"))

    env = TextEnv(prompts, tokenizer, reward=reward, max_new_tokens=1, stop_ids=())
    config = tiny_seq2seq("t5", vocab_size=len(tokenizer), d_model=32, num_layers=1, num_decoder_layers=1)
    model = make_agent(
        env, config, n_envs=256, device="cpu", seed=0, learning_rate=5e-3, ent_coef=0.1 if reward_on else 0.0
    )
    model.learn(256 * 30)
    written = generate(model, prompts, tokenizer, n=10, max_new_tokens=1, stop_ids=())
    return float(np.mean([one.text == str(one.prompt).strip("x") for one in written]))


@pytest.mark.parametrize("reward_on", seldom([True, False]))
def test_e11_it_learns_to_read_the_prompt(reward_on):
    share = emits_the_letter(reward_on)
    assert share > 0.9 if reward_on else share < 0.35
