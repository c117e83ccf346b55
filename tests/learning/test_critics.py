"""Learning with critics: a task with a separate critic, and values of large returns."""

import pytest
import torch
from transformers import GPT2ForSequenceClassification

from agents import RewardModelCritic, SeparateCritic
from tests.helpers.training import tiny_config
from tests.learning.test_learning import LETTERS, TASKS, TOKENIZER, build, learn

OWN = tiny_config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, initializer_range=0.1)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """Train a reward model briefly on the task's score, the share of "c" in a text; return its folder."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, num_labels=1)
    model = GPT2ForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(1, len(LETTERS) + 1, (64, 6))
        scores = (ids[:, 2:] == TOKENIZER.encode("c")[0]).float().mean(dim=1)
        values = model.score(model.transformer(ids).last_hidden_state[:, -1]).squeeze(-1)
        loss = (values - scores).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    folder = tmp_path_factory.mktemp("reward_model")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["separate", "reward model"])
def test_e11_it_learns_with_a_separate_critic(kind, reward_model):
    task = TASKS["always"]
    critic = SeparateCritic(OWN) if kind == "separate" else RewardModelCritic(reward_model)
    before, after = learn(build(task, policy_kwargs={"critic": critic}), task)
    assert before < 0.35 and after > 0.9


def explained(value_norm):
    """Return the explained variance after training with returns of about 100 and an almost fixed policy."""
    task = TASKS["always"]

    def reward(prompt, preds, done):
        return 100.0 * (preds.text.count("c") + preds.text.count("d")) if done else 0.0

    policy_kwargs = {"critic": SeparateCritic(OWN), "value_norm": value_norm, "critic_lr_scale": 100.0}
    model = build(task, reward=reward, policy_kwargs=policy_kwargs, **{"learning_rate": 1e-4, "vf_coef": 1.0})
    model.learn(15 * model.n_steps * model.n_envs)
    return float(model.logger.name_to_value["train/explained_variance"])


@pytest.mark.slow
@pytest.mark.parametrize("value_norm", ["popart", "norm"])
def test_large_returns_are_learnt_with_normalised_values(value_norm):
    assert explained(value_norm) > 0.25


@pytest.mark.slow
def test_large_returns_are_not_learnt_without_normalisation():
    assert explained(None) < 0.05
