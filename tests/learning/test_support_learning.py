"""Learning with restricted sampling: top-k, NLPO's lagged top-p and the env's mask (E11)."""

import numpy as np
import pytest
from sb3_contrib import MaskablePPO

from agents.build import make_agent
from agents.evaluation.generation import generate
from tests.helpers.models import few
from tests.helpers.training import tiny_config
from tests.learning.test_learning import PROMPTS, TASKS, TOKENIZER, build, learn
from textenv import AllowedMask, TextEnv

# There are 8 tokens. If the lagged copy is far behind, its mask can exclude a token for good before it was ever tried.
SUPPORTS = {"top_k": {"top_k": 5}, "nlpo": {"top_p": 0.9, "top_p_lag": 2}}


@pytest.mark.parametrize("support", few(reversed(SUPPORTS), 1))
@pytest.mark.parametrize(
    ("name", "budget", "seed"),
    [
        ("always", 1, 0),
        *(pytest.param("always", 1, seed, marks=pytest.mark.slow) for seed in (1, 2, 3)),
        pytest.param("copy", 2, 0, marks=pytest.mark.slow),  # at first, the token to copy is often excluded
    ],
)
def test_e11_it_learns_within_a_support(support, name, budget, seed):
    """The bar is that of full sampling, and the stored supports still exclude tokens at the end."""
    task = TASKS[name]
    model = build(task, policy_kwargs=SUPPORTS[support], seed=seed)
    before, after = learn(model, task, iterations=budget * task.iterations)
    assert before < 0.35 and after > 0.9
    samples = next(iter(model.rollout_buffer.get()))
    allowed = samples.observations.allowed.dense(samples.actions.device)
    assert allowed.sum(dim=1).float().mean() < allowed.shape[1] - 1


@pytest.mark.slow
@pytest.mark.parametrize("support", SUPPORTS)
def test_e11_within_a_support_it_does_not_learn_with_the_reward_switched_off(support):
    task = TASKS["always"]
    model = build(task, reward=lambda prompt, preds, done: 0.0, policy_kwargs=SUPPORTS[support])
    before, after = learn(model, task)
    assert after < 0.35 and abs(after - before) < 0.15


@pytest.mark.parametrize(("letters", "is_learned"), [("acdeg", True), ("abdeg", False)])
def test_e11_under_a_mask_it_learns_what_the_mask_allows(letters, is_learned):
    """The share of c goes from a fifth to nearly 1 if c is allowed; if it is forbidden, c is never written."""
    task, mask = TASKS["always"], AllowedMask(TOKENIZER.encode(letters))

    def score(prompt, preds, done):
        return task.score(str(prompt), preds.text, preds.ids) if done else 0.0

    env = TextEnv(PROMPTS, TOKENIZER, reward=score, mask=mask, **task.env)
    lm = tiny_config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, initializer_range=0.1)
    model = make_agent(env, lm, algorithm=MaskablePPO, seed=0, device="cpu", batch_size=128, **task.agent)
    means = []
    for n_tokens in (0, task.iterations * model.n_steps * model.n_envs):
        if n_tokens:
            model.learn(n_tokens)
        samples = generate(model, PROMPTS, TOKENIZER, 4, mask=mask, **task.env)
        means.append(np.mean([sample.text.count("c") / 4 for sample in samples]))
        assert set("".join(sample.text for sample in samples)) <= set(letters)
    assert (means[0] < 0.35 and means[1] > 0.9) if is_learned else means == [0.0, 0.0]
