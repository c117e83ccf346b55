"""All stages in Python on a tiny model: supervised tuning, a reward model, and PPO with four models."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from agents import (
    KLPenalty,
    LoRA,
    Pretrained,
    Ranking,
    RewardModelCritic,
    generate,
    make_agent,
    score_texts,
    sft,
    train_reward_model,
    word_tokenizer,
)
from tests.helpers.models import tiny
from textenv import TextEnv, demo
from textenv.rewards.reward_stats import RewardStats

TOKENIZER = word_tokenizer(demo.vocabulary())


class Preference:
    """A reward that scores a finished text with a frozen reward model, and normalises the score."""

    def __init__(self, folder):
        self.model = AutoModelForSequenceClassification.from_pretrained(folder)
        self.stats = RewardStats.load(folder)

    def __call__(self, prompt, preds, done):
        if not done:
            return 0.0
        return self.stats.normalised(float(score_texts(self.model, TOKENIZER, [prompt + preds.text])[0]))


@pytest.mark.slow
def test_supervised_tuning_then_a_reward_model_then_ppo_with_four_models(tmp_path):
    texts = demo.reviews(1400, seed=1)
    config = tiny("llama", vocab_size=len(TOKENIZER), initializer_range=0.1)
    quiet = {"progress_bar": False, "learning_rate": 1e-2}
    tuned = sft.tune(
        config, texts[:350], tmp_path / "sft", tokenizer=TOKENIZER, held_out=texts[350:400], n_epochs=3, **quiet
    )
    assert tuned.held_out_loss < 0.5 * tuned.held_out_loss_before
    ranked = [sorted(pair, key=demo.score, reverse=True) for pair in zip(texts[::2], texts[1::2])]
    pairs = [Ranking(pair) for pair in ranked if demo.score(pair[0]) > demo.score(pair[1])]
    trained = train_reward_model(
        tmp_path / "sft", TOKENIZER, pairs[:-100], tmp_path / "reward", held_out=pairs[-100:], n_epochs=3, **quiet
    )
    assert trained.held_out.low > 0.5

    env = TextEnv(demo.prompts(), TOKENIZER, reward=Preference(tmp_path / "reward"), max_new_tokens=12)
    model = make_agent(
        env,
        Pretrained(str(tmp_path / "sft")),
        n_envs=32,
        seed=0,
        device="cpu",
        learning_rate=2e-2,
        policy_kwargs={
            "critic": RewardModelCritic(str(tmp_path / "reward"), normalise=True),
            "train": LoRA(r=8),
        },
    )
    KLPenalty(0.01).attach(model)
    lm = model.policy.lm
    frozen = {name: weight.clone() for name, weight in lm.backbone.named_parameters() if not weight.requires_grad}
    critic = lm.critic.linear.weight.clone()
    judge = {name: weight.clone() for name, weight in env.reward.model.state_dict().items()}
    before = mean_score(model, env.reward)
    model.learn(32 * 12 * 16)
    after = mean_score(model, env.reward)
    assert after > before + 0.3, (before, after)
    assert frozen and all(torch.equal(lm.backbone.get_parameter(name), weight) for name, weight in frozen.items())
    assert not torch.equal(lm.critic.linear.weight, critic)
    assert all(torch.equal(env.reward.model.state_dict()[name], weight) for name, weight in judge.items())
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict()  # the reference is the tuned model
    assert any(np.array_equal(weight, start.get(name.removeprefix("model."), ())) for name, weight in frozen.items())


def mean_score(model, reward):
    prompts = demo.prompts() * 2
    texts = generate(model, prompts, TOKENIZER, max_new_tokens=12)
    return float(np.mean([reward(text.prompt, text, True) for text in texts]))
