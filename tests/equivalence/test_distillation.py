"""On-policy distillation: the gradient of PPO's own loss by enumeration of all texts."""

import numpy as np
import pytest
import torch

from agents import KLPenalty, LoRA, RolloutStep, make_agent
from tests.helpers.training import tiny_config
from textenv import CharTokenizer, TextEnv
from textenv.rewards import Zero

TOKENIZER = CharTokenizer("ab")
V, LENGTH = len(TOKENIZER), 3
PROMPTS = ("ab", "b")
TEXTS = np.indices((V,) * LENGTH).reshape(LENGTH, -1)  # all texts of three tokens, (3, 27)
TEACHER = tiny_config(vocab_size=V, n_layer=2, n_embd=12, initializer_range=0.6)


class Weighted(RolloutStep):
    """Weighs each text by its probability, so that the sum over all texts is the mean over samples."""

    key = "Weighted"

    def __call__(self, buffer):
        buffer.penalties *= np.exp(buffer.log_probs.sum(axis=0))  # (T, B) times (B,)


def agent_of(gamma, train):
    env = TextEnv(
        [prompt for prompt in PROMPTS for _ in TEXTS.T],
        TOKENIZER,
        reward=Zero(),
        max_new_tokens=LENGTH,
        stop_ids=(),
        order="sequential",
    )
    n_envs = len(PROMPTS) * TEXTS.shape[1]
    return make_agent(
        env,
        tiny_config(vocab_size=V, n_layer=1, n_embd=8, initializer_range=0.5),
        n_envs=n_envs,
        batch_size=n_envs * LENGTH,
        n_epochs=1,
        vf_coef=0.0,
        max_grad_norm=1e9,
        gamma=gamma,
        gae_lambda=1.0,
        policy_kwargs={"train": train, "temperature": 0.8},
        rollout_buffer_kwargs={"normalize_advantage": False},
        seed=0,
        device="cpu",
    )


def gradient_of_ppo(model, penalty):
    """Return the gradient of PPO's own loss on all texts, times the number of transitions."""
    policy, weights, found = model.policy, [w for w in model.policy.parameters() if w.requires_grad], []

    def write_each_text(obs):
        step = np.flatnonzero(obs[0].numpy() == -2)[0]
        n_written = int((obs[0, step + 1 :] >= 0).sum())
        actions = torch.as_tensor(np.tile(TEXTS[n_written], len(PROMPTS)))
        with torch.no_grad():
            return actions, policy.get_distribution(obs).log_prob(actions)

    def keep():
        n = len(model.rollout_buffer.trained.or_segments().counts) * LENGTH
        found.append([torch.zeros_like(w) if w.grad is None else w.grad * n for w in weights])

    policy.take_tokens_from(write_each_text)
    policy.optimizer.step = keep
    model.learn(model.n_steps * model.n_envs, callback=[penalty, Weighted()])
    assert len(found) == 1
    return torch.cat([grad.flatten() for grad in found[0]])


def log_rows(lm, prompt, ids):
    """Return the log-probabilities of the vocabulary at each token of a text, (LENGTH, V), by one plain forward."""
    row = torch.tensor([[*TOKENIZER.encode(prompt), *ids[:-1]]])
    logits = lm.backbone.model(input_ids=row).logits[0, -LENGTH:, :V]
    return torch.log_softmax(logits / 0.8, dim=-1)


def written_out(model, teacher, gamma):
    """Return the gradient of the loss, text by text.

    With gamma 0 that is the mean over texts of the sum of KL(student, teacher) at each of their tokens, with the texts
    held fixed; with gamma 1 that of the divergence of whole texts.
    """
    lm, loss = model.policy.lm, torch.zeros(())
    for prompt in PROMPTS:
        for ids in TEXTS.T.tolist():
            ours = log_rows(lm, prompt, ids)
            with torch.no_grad():
                theirs = log_rows(teacher, prompt, ids)
            of_text = ours[range(LENGTH), ids].sum()
            if gamma == 0:
                loss = loss + of_text.exp().detach() * (ours.exp() * (ours - theirs)).sum()
            else:
                loss = loss + of_text.exp() * (of_text - theirs[range(LENGTH), ids].sum())
    weights = [w for w in model.policy.parameters() if w.requires_grad]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(grads, weights)])


@pytest.mark.parametrize("train", ["all", LoRA(r=2)], ids=["all", "lora"])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_gradient_is_that_of_the_reverse_divergence_of_each_token(gamma, train):
    """Of each token alone with gamma 0, and of whole texts with gamma 1; prompts are read once for all their texts."""
    model = agent_of(gamma, train)
    penalty = KLPenalty(1.0, reference=TEACHER)
    got = gradient_of_ppo(model, penalty)
    expected, other = (written_out(model, penalty.reference, g) for g in (gamma, 1.0 - gamma))
    assert torch.allclose(got, expected, atol=1e-6 * float(expected.abs().max()) + 1e-7)
    assert (expected - other).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
def test_other_estimators_have_another_gradient(estimator):
    model, penalty = agent_of(0.0, "all"), KLPenalty(1.0, reference=TEACHER, estimator=estimator)
    got = gradient_of_ppo(model, penalty)
    expected = written_out(model, penalty.reference, 0.0)
    assert (got - expected).norm() > 0.1 * expected.norm()
