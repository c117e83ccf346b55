"""KL in the loss: the gradient of PPO's own loss against the written-out one, what it is for, and refusals."""

from functools import partial

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO

from agents import CISPO, AdaptiveCoef, CriticWarmup, KLPenalty, LoRA, load_checkpoint, save_checkpoint
from agents.configuration.config import EnvConfig, KLConfig, ModelConfig, TrainConfig
from agents.models.sampling import TokenDistribution, score_tokens
from agents.policies.kl_loss import KLLoss
from agents.policies.reference import divergences, reader
from agents.policies.surrogates import NO_CLIP
from agents.rollout.trained_sequences import TrainedSequences
from agents.runs.assemble import training_callbacks
from tests.agents.policies.test_surrogates import MASK, gradient, gradients, in_float64, largest_difference, size
from tests.helpers.models import collect, disturb
from tests.helpers.training import TOKENIZER, run_state, same_weights, tiny_agent, tiny_config, tiny_env, weights
from textenv.checks.trust import Trust

pytestmark = pytest.mark.filterwarnings("ignore:.*sequences in 1 minibatches:UserWarning")
SAME = 1e-12
COEF = 0.25
OTHER = tiny_config(initializer_range=0.3)
# Powers of 2: float32 holds the weights of tokens, such as N / (S n_i), without rounding.
STEPS, LANES, SEQUENCES, LENGTHS = 8, 8, 16, (1, 8, 2, 4, 1, 2)
AGGREGATIONS = {
    "token": lambda losses: torch.cat(losses).mean(),
    "sequence": lambda losses: torch.stack([loss.mean() for loss in losses]).mean(),
    "constant": lambda losses: torch.stack([loss.sum() / STEPS for loss in losses]).mean(),
}


@pytest.mark.parametrize("masked", [False, True])
def test_the_divergence_and_its_gradient_beside_those_of_autograd(masked, monkeypatch):
    rng = torch.Generator().manual_seed(1)
    logits, other = (torch.randn(6, 9, generator=rng) for _ in range(2))
    logits[0, 3] = -torch.inf  # of some models, and of a token that a mask may allow
    actions, allowed = torch.arange(6), torch.rand(6, 9, generator=rng) < 0.6 if masked else None
    if masked:
        allowed[range(6), actions] = True
    outer = torch.randn(3, 6, generator=rng)
    others = TokenDistribution(other, allowed).log_probabilities
    results = []
    for lean in (True, False):
        free = logits.clone().requires_grad_()
        if lean:
            scored = score_tokens(free, actions, allowed, others)
        else:
            own = TokenDistribution(free, allowed)
            kl = (own.log_probabilities.softmax(-1) * (own.log_probabilities - others)).sum(-1)
            scored = (own.log_prob(actions), own.entropy(), kl)
        results.append([*scored, *torch.autograd.grad([(outer * torch.stack(scored)).sum()], free)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)
    # The others do not depend on the third result.
    for ours, alone in zip(score_tokens(logits, actions, allowed, others), score_tokens(logits, actions, allowed)):
        assert torch.equal(ours, alone)


# The loss of SB3's own `train`, against the written-out loss, in float64.


def rollout_with(estimator, aggregation="token", masked=False, algorithm=PPO, coef=COEF, policy=None, **kwargs):
    """Return an agent after a rollout of ragged texts, with changed weights, and its penalty in the loss."""
    rows = [{"prompt": "abc"[: 1 + i % 3], "max_new_tokens": n} for i, n in enumerate(LENGTHS)]
    env = tiny_env(prompts=rows, max_new_tokens=STEPS, stop_ids=(), **({"mask": MASK} if masked else {}))
    ppo = {} if algorithm is A2C else {"n_epochs": 1, "batch_size": STEPS * LANES}
    buffer_kwargs = {"aggregation": aggregation, "normalize_advantage": False, "complete_episodes": True}
    buffer_kwargs |= kwargs.pop("buffer", {})
    model = tiny_agent(
        env,
        LANES,
        MaskablePPO if masked else algorithm,
        lm=OTHER,
        vf_coef=0.0,
        max_grad_norm=1e9,
        policy_kwargs={"optimizer_class": torch.optim.SGD, **(policy or {})},
        rollout_buffer_kwargs=buffer_kwargs,
        **ppo,
        **kwargs,
    )
    penalty = KLPenalty(coef, reference=OTHER, estimator=estimator, where="loss")
    trained = collect(model, penalty).trained
    chosen = trained._sequences[:SEQUENCES]
    assert len(chosen) == SEQUENCES
    model.rollout_buffer.trained = TrainedSequences(trained._rollout, chosen, 0)
    rng = np.random.default_rng(0)
    for part in model.rollout_buffer.trained:
        part.advantages[:] = rng.integers(-20, 21, size=len(part.actions)) / 16
    disturb(model.policy.lm, 0.02)
    return model, penalty


def log_probabilities(lm, segment, part, masked):
    """Return a model's log-probabilities at a sequence's transitions, (n, V), by a plain forward."""
    ids = torch.as_tensor(segment.tokens).long()[None]  # (1, T)
    logits = (
        lm.backbone.model(input_ids=ids).logits[0, part.cols.astype(int), : len(TOKENIZER)] / lm.sampling.temperature
    )
    if masked:
        allowed = torch.zeros(len(TOKENIZER), dtype=torch.bool)
        allowed[3:30] = True
        logits = logits.masked_fill(~allowed, -1e30)
    return torch.log_softmax(logits, -1)


def written_out(model, penalty, aggregation="token", ent_coef=0.0, policy_loss=None):
    """Return the gradient of PPO's loss plus the term over the rollout's sequences, each read alone, in float64."""
    buffer, losses, entropies = model.rollout_buffer, [], []
    for i in range(len(buffer.trained)):
        segment, part = buffer.trained.segment(i), buffer.trained.transitions(i)
        own = log_probabilities(model.policy.lm, segment, part, buffer.is_masked)  # (n, V)
        with torch.no_grad():
            theirs = log_probabilities(penalty.reference, segment, part, buffer.is_masked)
        chosen = range(len(part.actions)), part.actions.astype(int)
        new, old = own[chosen], torch.as_tensor(part.log_probs).double()
        assert new.dtype == torch.float64
        advantages = torch.as_tensor(part.advantages).double()
        ratios = (new - old).exp()
        loss = -torch.min(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
        if policy_loss is not None:
            loss = policy_loss(new, old, advantages)
        if penalty.estimator == "exact":
            kl = (own.exp() * (own - theirs)).sum(-1)
        else:
            reference = torch.as_tensor(part.reference_log_probs).double()
            torch.testing.assert_close(reference, theirs[chosen], atol=1e-5, rtol=1e-5)
            kl = ratios.detach() * (new - reference) ** 2 / 2
        losses.append(loss + penalty.coef * kl)
        entropies.append(-(own.exp() * own).sum(-1))
    return gradient(model, AGGREGATIONS[aggregation](losses) - ent_coef * torch.cat(entropies).mean())


def check(monkeypatch, model, penalty, **kwargs):
    """Check that `train` steps along the written-out gradient, and that the term is a part of it that counts."""
    in_float64(monkeypatch, model)
    penalty.reference.double()
    expected = written_out(model, penalty, **kwargs)
    coef, penalty.coef = penalty.coef, 0.0
    without = written_out(model, penalty, **kwargs)
    penalty.coef = coef
    model.train()
    trained = gradients(model)
    assert largest_difference(trained, expected) <= SAME < 1e-3 < size(expected)
    assert largest_difference(expected, without) > 1e-3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["exact", "k2"])
def test_e14_ppos_own_loss_has_the_gradient_of_the_written_out_one(estimator, aggregation, monkeypatch):
    """Whatever the entropy's coefficient: the term needs none of SB3's own."""
    ent_coef = 0.1 if aggregation == "sequence" else 0.0
    model, penalty = rollout_with(estimator, aggregation, ent_coef=ent_coef)
    check(monkeypatch, model, penalty, aggregation=aggregation, ent_coef=ent_coef)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("estimator", ["exact", "k2"])
def test_e14_with_masks_and_in_micro_batches_as_well(estimator, masked, monkeypatch):
    model, penalty = rollout_with(estimator, "sequence", masked, buffer={"micro_batch_tokens": 12})
    (batch, *_) = next(iter(model.rollout_buffer.get()))
    assert len(list(model.policy.lm.chunks(batch))) > 3 and model.rollout_buffer.is_masked == masked
    check(monkeypatch, model, penalty, aggregation="sequence")


@pytest.mark.parametrize("estimator", ["exact", "k2"])
def test_e14_beside_a_surrogate_and_in_a2c(estimator, monkeypatch):
    def cispo(new, old, advantages):
        return -(new - old).exp().detach().clamp(max=1.1) * advantages * new

    model, penalty = rollout_with(estimator, policy={"surrogate": CISPO(high=0.1)}, clip_range=NO_CLIP)
    check(monkeypatch, model, penalty, policy_loss=cispo)
    model, penalty = rollout_with(estimator, algorithm=A2C, n_steps=STEPS)
    check(monkeypatch, model, penalty, policy_loss=lambda new, old, advantages: -advantages * new)


@pytest.mark.parametrize("options", [{"buffer": {"micro_batch_tokens": 16}}, {"vocabulary": 64}], ids=str)
def test_same_gradient_however_the_reference_is_read(options, monkeypatch):
    """In parts of a minibatch, and in parts of the vocabulary's logits: to 1e-6."""
    trained = []
    for parts in ({}, options):
        if "vocabulary" in parts:
            monkeypatch.setattr("agents.policies.actor_critic.MAX_LOGITS", 64)
        model, _ = rollout_with("exact", buffer=parts.get("buffer", {}))
        model.train()
        trained.append(gradients(model))
    assert largest_difference(*trained) < 1e-6 < 1e-2 < size(trained[0])


def test_same_with_adapters_as_by_a_copy_and_the_warm_up_still_holds_them(monkeypatch):
    """LoRA: the reference is the policy with its adapters off, while its own forward has them on."""
    trained, start = [], None
    for reference in (None, "copy"):
        model = tiny_agent(n_epochs=1, policy_kwargs={"train": LoRA(r=2)})
        start = model.policy.lm if reference else None
        penalty = KLPenalty(1.0, reference=start, estimator="exact", where="loss")
        collect(model, penalty)
        with torch.no_grad():
            torch.manual_seed(3)
            for name, weight in model.policy.lm.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.3)
        model.policy.lm.drop_caches()
        model.train()
        trained.append(gradients(model))
        assert any("lora_A" in name for name in trained[-1])
    assert largest_difference(*trained) < 1e-6 < 1e-3 < size(trained[0])
    model = tiny_agent(policy_kwargs={"train": LoRA(r=2)})
    before = weights(model)
    model.learn(32, callback=[CriticWarmup(2), KLPenalty(1.0, estimator="exact", where="loss")])
    assert {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])} == {
        "lm.critic.linear.weight",
        "lm.critic.linear.bias",
    }


def test_of_a_reference_that_shares_no_prompts_the_same():
    """The policy reads a prompt once for all its samples; a reference may have to read whole sequences."""
    env = tiny_env(prompts=["abcdefghijkl", "mnopqrstuvwx"], samples_per_prompt=4, stop_ids=())
    model = tiny_agent(env, n_envs=8, n_epochs=1)
    penalty = KLPenalty(1.0, reference=OTHER, estimator="exact", where="loss")
    batch = collect(model, penalty).view().batch
    results = []
    for shares in (True, False):
        penalty.reference.may_share_prompts = shares
        batch.term = KLLoss(partial(reader, penalty.reference, model.policy.lm)).term(*np.zeros((3, len(batch))), "cpu")
        assert any(chunk.shared is not None for chunk in model.policy.lm.chunks(batch))
        results.append(model.policy.lm.evaluate(batch, torch.zeros(len(batch), dtype=torch.long))[3])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    assert results[0].min() > 1e-3


# What it is for, logs and refusals.


def figures_after(coef, estimator="exact"):
    """Return the last figures after training for a reward of one letter."""
    env = tiny_env(lambda prompt, preds, done: float(sum(preds.ids < 10)) if done else 0.0, stop_ids=())
    model = tiny_agent(env, 16, lm=tiny_config(n_layer=1), n_epochs=2, vf_coef=0.0)
    penalty = KLPenalty(coef, estimator=estimator, where="loss")
    model.learn(10 * 64, callback=penalty, log_interval=None)
    return model.logger.name_to_value


def test_it_holds_the_policy_near_its_start():
    """A reward of 10 of 33 letters draws it away; the negative control has a coefficient of 0."""
    free, exact, k2 = figures_after(0.0), figures_after(4.0), figures_after(4.0, "k2")
    assert max(exact["kl/token"], k2["kl/token"]) < 0.1 < 0.5 < free["kl/token"]
    assert exact["train/kl_loss"] == pytest.approx(exact["kl/token"], abs=0.05) and "kl/penalty" not in exact


def test_the_rewards_are_those_of_the_task():
    model, penalty = tiny_agent(), KLPenalty(1.0, reference=OTHER, estimator="k2", where="loss")
    buffer = collect(model, penalty)
    assert not buffer.penalties.any() and np.array_equal(buffer.rewards, buffer.task_rewards)
    # A later rollout without the step has no term.
    buffer.before_returns, buffer.expected_steps = [], []
    assert buffer.kl_loss is not None
    assert collect(model).kl_loss is None and next(iter(buffer.get())).observations.term is None


def test_the_logged_term_is_its_mean_and_sb3s_figures_are_its_own():
    figures = []
    for coef in (0.0, 5.0):
        model, _ = rollout_with("exact", coef=coef)
        model.train()
        figures.append(dict(model.logger.name_to_value))
        mean = model.rollout_buffer.kl_loss.mean()
    assert [shown.pop("kl/coef") for shown in figures] == [0.0, 5.0]
    assert figures[0] == figures[1] and figures[0]["train/loss"] != 0
    model, penalty = rollout_with("exact")
    samples = next(iter(model.rollout_buffer.get()))
    with torch.no_grad():
        kl = divergences(penalty.reference, model.policy.lm, samples.observations)
    assert mean == pytest.approx(float(kl.mean()), rel=1e-5) and model.rollout_buffer.kl_loss.mean() is None


def test_the_coefficient_is_that_of_the_rollout_and_adapts():
    model = tiny_agent()
    penalty = KLPenalty(AdaptiveCoef(0.5, 0.01, 8), reference=OTHER, estimator="k2", where="loss")
    buffer = collect(model, penalty)
    assert buffer.kl_loss.coef == 0.5 < penalty.coef
    before = penalty.coef
    assert collect(model, penalty).kl_loss.coef == before


@pytest.mark.parametrize("estimator", ["exact", "k2"])
def test_e8_resumed_bit_for_bit_with_waiting_texts(estimator, tmp_path):
    """Texts wait for their group over a checkpoint; k2 needs the reference's log-probabilities of their tokens."""

    def agent():
        env = tiny_env(samples_per_prompt=4)
        model = tiny_agent(env, 6, n_steps=3, rollout_buffer_kwargs={"advantage": "grpo_mean"})
        return model, KLPenalty(AdaptiveCoef(0.5, 0.1, 8), estimator=estimator, where="loss")

    whole, penalty = agent()
    whole.learn(18 * 3, callback=penalty)
    save_checkpoint(whole, tmp_path / "checkpoint")
    waiting = [*whole.rollout_buffer.waiting.values()]
    waiting += [episode.part for episode in whole.rollout_buffer.waiting_episodes.values()]
    assert waiting and all(np.isfinite(part.reference_log_probs).all() == (estimator == "k2") for part in waiting)
    whole.learn(18 * 3, callback=penalty, reset_num_timesteps=False)
    resumed, again = agent()
    load_checkpoint(resumed, tmp_path / "checkpoint")
    resumed.learn(18 * 3, callback=again, reset_num_timesteps=False)
    assert same_weights(weights(whole), weights(resumed)) and penalty.coef == again.coef != 0.5
    assert run_state(whole) == run_state(resumed)


def test_tokens_that_were_sampled_before_the_penalty_have_no_term():
    loss, device = KLLoss(None), torch.device("cpu")
    loss.coef = 2.0
    old, reference = np.array([-1.0, -2.0], dtype=np.float32), np.array([np.inf, -1.0], dtype=np.float32)
    term = loss.term(np.ones(2), old, reference, device)
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    term.added_to([new, new, new], new).sum().backward()
    # The sum's own gradient is 1; that of 2 * mean((new - reference)^2 / 2) is -1 at the second token.
    assert new.grad.tolist() == [1.0, 0.0] and loss.mean() == pytest.approx(0.25)


def test_a_configuration_has_it_too():
    config = TrainConfig(EnvConfig("textenv/Reviews-v0"), ModelConfig("org/gpt2"))
    config.kl = KLConfig(0.5, estimator="k2", where="loss")
    (penalty,) = (step for step in training_callbacks(config, Trust()) if isinstance(step, KLPenalty))
    assert (penalty.where, penalty.estimator, penalty.coef) == ("loss", "k2", 0.5)


def test_refusals():
    with pytest.raises(
        ValueError, match="Expected estimator='exact' or 'k2' with where='loss', got 'k1': its gradient"
    ):
        KLPenalty(0.1, where="loss")
    with pytest.raises(ValueError, match=r"got 'k3': its gradient is that of .* KL\(ref, pi\)"):
        KLPenalty(0.1, estimator="k3", where="loss")
    with pytest.raises(ValueError, match=r"Expected clip=None with where='loss', got 5\.0"):
        KLPenalty(0.1, estimator="k2", clip=5.0, where="loss")
    with pytest.raises(ValueError, match="Expected `where` to be one of"):
        KLPenalty(0.1, where="rewards")
    with pytest.raises(ValueError, match="Expected where='reward' of KLPenalty with TRPO"):
        tiny_agent(algorithm=TRPO).learn(16, callback=KLPenalty(0.1, estimator="k2", where="loss"))
