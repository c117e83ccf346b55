"""Surrogates under SB3's own loss: the gradients of the written-out losses, figures that stay true, and refusals."""

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer

from agents import (
    CISPO,
    GSPO,
    ClipHigher,
    DualClip,
    EngineRollouts,
    LMPolicy,
    SequenceRolloutBuffer,
    SoftGate,
    TextVecEnv,
)
from agents.models import sampling
from agents.models.token_sets import AllowedTokens
from agents.policies.surrogates import NO_CLIP, Terms
from tests.helpers.engines import InProcess
from tests.helpers.models import collect, disturb, few
from tests.helpers.training import TOKENIZER, same_weights, tiny_agent, tiny_config, tiny_env, weights
from textenv import AllowedMask

pytestmark = pytest.mark.filterwarnings("ignore:.*sequences in 1 minibatches:UserWarning")
SAME = 1e-12
LENGTHS = (1, 6, 3, 2, 6, 4)
STEPS, LANES = 6, 8
MASK = AllowedMask(tuple(range(3, 30)))


def fading(terms):
    """A surrogate of one's own: the gradient fades out as the ratio moves from 1 to 0.5 or 1.5."""
    distances = (terms.ratios - 1).abs()
    return terms.ratios * (1 - distances / 0.5).clamp(min=0)


# The losses as papers write them: of the tokens of one sequence, (n,), by log-probabilities, old ones and advantages.


def clipped(ratios, advantages, low, high):
    return torch.min(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)


def clip_higher(new, old, advantages):
    return -clipped((new - old).exp(), advantages, 0.1, 0.15)


def dual_clip(new, old, advantages):
    usual = clipped((new - old).exp(), advantages, 0.1, 0.1)
    return -torch.where(advantages < 0, torch.max(usual, 1.2 * advantages), usual)


def cispo(new, old, advantages):
    return -(new - old).exp().detach().clamp(max=1.1) * advantages * new


def cispo_with_both_bounds(new, old, advantages):
    return -(new - old).exp().detach().clamp(0.95, 1.1) * advantages * new


def gspo(new, old, advantages):
    return -clipped((new - old).mean().exp().expand(len(new)), advantages, 0.01, 0.02)


def gspo_of_tokens(new, old, advantages):
    """The paper's form for advantages that differ from token to token."""
    ratios = (new - old).mean().exp().detach() * (new - new.detach()).exp()
    return -clipped(ratios, advantages, 0.01, 0.02)


def soft_gate(new, old, advantages):
    temperatures = torch.where(advantages > 0, 1.0, 1.05 * torch.ones_like(advantages))  # 1.05 in float64
    return -advantages * torch.sigmoid(temperatures * ((new - old).exp() - 1)) * 4 / temperatures


def own_loss(new, old, advantages):
    ratios = (new - old).exp().detach()
    return -advantages * ratios * (1 - (ratios - 1).abs() / 0.5).clamp(min=0) * new


LOSSES = {
    "ClipHigher": (ClipHigher(0.1, 0.15), clip_higher),
    "DualClip": (DualClip(0.1, 0.1, 1.2), dual_clip),
    "CISPO": (CISPO(high=0.1), cispo),
    "CISPO, two bounds": (CISPO(0.05, 0.1), cispo_with_both_bounds),
    "GSPO": (GSPO(0.01, 0.02), gspo),
    "SoftGate": (SoftGate(), soft_gate),
    "own": (fading, own_loss),
}
AGGREGATIONS = {
    "token": lambda losses: torch.cat(losses).mean(),
    "sequence": lambda losses: torch.stack([loss.mean() for loss in losses]).mean(),
    "constant": lambda losses: torch.stack([loss.sum() / STEPS for loss in losses]).mean(),
}


def in_float64(monkeypatch, model):
    """Have a model's update compute in float64; the numbers that the buffer keeps of a rollout are float32."""

    def log_softmax(logits, allowed):
        return torch.log_softmax(sampling._masked(logits, allowed), dim=-1)

    monkeypatch.setattr(sampling, "_log_softmax", log_softmax)
    monkeypatch.setattr(sampling.Sampling, "adjust", lambda self, logits, tokens, counts: logits)  # without `float`
    model.policy.double()


def rollout_of(
    surrogate, aggregation="token", per_sequence=False, masked=False, engine=None, sampling=None, **buffer_kwargs
):
    """Return an agent after a rollout of ragged texts, with changed weights and advantages that no factor rounds."""
    rows = [{"prompt": "abc"[: 1 + i % 3], "max_new_tokens": n} for i, n in enumerate(LENGTHS)]
    env = tiny_env(prompts=rows, max_new_tokens=STEPS, stop_ids=(), **({"mask": MASK} if masked else {}))
    model = tiny_agent(
        env,
        LANES,
        MaskablePPO if masked else PPO,
        lm=tiny_config(initializer_range=0.3),
        n_epochs=1,
        batch_size=STEPS * LANES,
        vf_coef=0.0,
        max_grad_norm=1e9,
        policy_kwargs={"surrogate": surrogate, "optimizer_class": torch.optim.SGD, **(sampling or {})},
        rollout_buffer_kwargs={"aggregation": aggregation, "normalize_advantage": False, **buffer_kwargs},
    )
    buffer = collect(model, *([EngineRollouts(engine)] if engine else []))
    rng = np.random.default_rng(0)
    for part in (trained := buffer.trained):
        n = len(part.actions)
        divisor = {"token": 1, "sequence": n, "constant": STEPS}[aggregation]
        # Whole numbers times the divisors of the factor: products with it are exact in the buffer's float32.
        part.advantages[:] = rng.integers(-20, 21, size=1 if per_sequence else n) * divisor * len(trained) / 256
    disturb(model.policy.lm, 0.02)
    return model


def gradient(model, loss):
    """Return the gradient of a loss by all weights of the model."""
    model.policy.zero_grad()
    loss.backward()
    return gradients(model)


def gradients(model):
    return {name: w.grad.clone() for name, w in model.policy.named_parameters() if w.grad is not None}


def written_out(model, loss, aggregation):
    """Return the gradient of a loss over the rollout's sequences, each of which the model alone reads, in float64."""
    buffer, losses = model.rollout_buffer, []
    for i in range(len(buffer.trained)):
        segment, part = buffer.trained.segment(i), buffer.trained.transitions(i)
        ids = torch.as_tensor(segment.tokens).long()[None]  # (1, T)
        logits = model.policy.backbone.model(input_ids=ids).logits[0, part.cols.astype(int), : len(TOKENIZER)]  # (n, V)
        if buffer.is_masked:
            allowed = AllowedTokens(buffer.token_sets, part.allowed).dense(torch.device("cpu"))  # (n, V)
            assert 1 <= int(allowed.sum(dim=1).max()) < len(TOKENIZER)
            logits = logits.masked_fill(~allowed, -torch.inf)
        new = torch.log_softmax(logits, -1)[range(len(part.actions)), part.actions.astype(int)]
        assert new.dtype == torch.float64
        arrays = (part.log_probs, part.behaviour_log_probs, part.advantages)
        old, behaviour, advantages = (torch.as_tensor(array).double() for array in arrays)
        losses.append(loss(new, old, advantages * (old - behaviour).exp().clamp(max=2.0)))
    return gradient(model, AGGREGATIONS[aggregation](losses))


def largest_difference(first, second):
    names = {name for name in {*first, *second} if "critic" not in name}
    return max(float((first[name] - second[name]).abs().max()) for name in names)


def size(gradients):
    return max(float(part.abs().max()) for part in gradients.values())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_e13_ppos_own_loss_has_the_gradient_of_the_written_out_one(name, aggregation, monkeypatch):
    surrogate, loss = LOSSES[name]
    model = rollout_of(surrogate, aggregation, per_sequence=name == "GSPO")
    in_float64(monkeypatch, model)
    expected = written_out(model, loss, aggregation)
    ratio_loss = written_out(model, lambda new, old, a: -(new - old).exp() * a, aggregation)
    start = weights(model)
    model.train()
    assert largest_difference(gradients(model), expected) <= SAME < 1e-3 < size(expected)
    assert largest_difference(expected, ratio_loss) > 1e-3, "the surrogate changes the gradient"
    assert not same_weights(weights(model), start)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["ClipHigher", "GSPO"])
def test_e13_with_masks_and_in_micro_batches_as_well(name, masked, monkeypatch):
    """MaskablePPO, and forwards of a few sequences: a sequence's ratio needs the whole minibatch."""
    surrogate, loss = LOSSES[name]
    model = rollout_of(surrogate, "sequence", name == "GSPO", masked, micro_batch_tokens=16)
    in_float64(monkeypatch, model)
    expected = written_out(model, loss, "sequence")
    (batch, *_) = next(iter(model.rollout_buffer.get()))
    assert len(list(model.policy.lm.chunks(batch))) > 3
    model.train()
    assert largest_difference(gradients(model), expected) <= SAME < 1e-3 < size(expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", few(LOSSES, 1))
def test_e13_with_the_importance_weights_of_an_engine_as_well(name, aggregation, monkeypatch):
    """They multiply the advantages, and leave ratios alone: those are of the policy before and after the update."""
    surrogate, loss = LOSSES[name] if name != "GSPO" else (LOSSES[name][0], gspo_of_tokens)
    engine = InProcess(tiny_config(initializer_range=0.3), heat=1.5)
    model = rollout_of(surrogate, aggregation, engine=engine)
    in_float64(monkeypatch, model)
    expected = written_out(model, loss, aggregation)
    model.train()
    assert largest_difference(gradients(model), expected) <= 1e-6 * size(expected), "the buffer's weights are float32"
    for part in model.rollout_buffer.trained:
        part.behaviour_log_probs[:] = part.log_probs
    assert largest_difference(written_out(model, loss, aggregation), expected) > 1e-2 * size(expected)


@pytest.mark.parametrize("name", few(LOSSES, 1))
@pytest.mark.parametrize("sampling", [{"top_k": 5}, {"top_p": 0.7, "temperature": 1.0}])
def test_e13_within_a_sampling_support_as_well(sampling, name, monkeypatch):
    """Both probabilities of a ratio are those over the tokens that the rollout could sample."""
    surrogate, loss = LOSSES[name]
    model = rollout_of(surrogate, "sequence", per_sequence=name == "GSPO", sampling=sampling)
    in_float64(monkeypatch, model)
    expected = written_out(model, loss, "sequence")
    model.train()
    assert largest_difference(gradients(model), expected) <= SAME < 1e-3 < size(expected)


def test_weights_by_hand():
    ratios = torch.tensor([0.5, 0.85, 1.0, 1.25, 4.0, 0.5, 4.0])
    signs = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    terms = Terms(ratios.log(), torch.zeros(7), signs, rows, torch.tensor([3, 4]))

    def of(surrogate):
        return [round(number, 4) for number in surrogate(terms).tolist()]

    assert of(ClipHigher(0.2, 0.28)) == [0, 0.85, 1, 1.25, 0, 0.5, 4]
    assert of(DualClip(0.2, 0.2, 3.0)) == [0, 0.85, 1, 0, 0, 0.5, 0]
    assert of(CISPO(high=0.2)) == [0.5, 0.85, 1, 1.2, 1.2, 0.5, 1.2]
    assert of(CISPO(0.2, 0.2)) == [0.8, 0.85, 1, 1.2, 1.2, 0.8, 1.2]
    # The geometric means are 0.425 ** (1 / 3) = 0.7518 and 10 ** (1 / 4) = 1.7783.
    assert of(GSPO(0.2, 0.9)) == [0, 0, 0.7518, 1.7783, 1.7783, 1.7783, 1.7783]
    assert of(GSPO(0.3, 0.5)) == [0.7518, 0.7518, 0.7518, 0, 0, 0, 1.7783]
    # 4 p (1 - p) r with p = sigmoid(0.25) = 0.5622 and sigmoid(-1.05 * 0.15) = 0.4607
    assert SoftGate()(terms)[1:4].tolist() == pytest.approx([0.84475, 1.0, 1.23067], abs=1e-5)
    assert CISPO(high=0.2).is_clipped(terms, CISPO(high=0.2)(terms)).sum() == 3


def test_with_ppos_bounds_it_is_ppo_to_the_last_bit():
    """So is an agent without a surrogate: the log-probabilities are those of the model, with their own gradient."""
    runs = []
    for options in ({"clip_range": 0.2}, {"policy_kwargs": {"surrogate": ClipHigher(0.2, 0.2)}}):
        model = tiny_agent(n_envs=8, n_epochs=4, learning_rate=3e-2, **options)
        model.learn(3 * 8 * 4)
        runs.append((weights(model), model.logger.name_to_value))
    (plain, figures), (ours, our_figures) = runs
    assert same_weights(plain, ours)
    assert figures["train/approx_kl"] == our_figures["train/approx_kl"] > 1e-3
    assert figures["train/clip_fraction"] > 0 == our_figures["train/clip_fraction"], "SB3's own clip never acts"


@pytest.mark.parametrize("name", LOSSES)
def test_figures_and_target_kl_are_those_of_the_policy(name):
    """SB3's divergence does not read the surrogate, and stops an update of any."""
    surrogate = LOSSES[name][0]
    logged = {}

    def run(**kwargs):
        model = tiny_agent(n_envs=8, n_epochs=4, policy_kwargs={"surrogate": surrogate}, **kwargs)
        model.learn(8 * 4)
        model.policy.surrogate.record(model)  # as the next rollout would
        logged.update(model.logger.name_to_value)
        return model._n_updates

    assert run() == 4
    assert logged["train/approx_kl"] > 0 and logged["train/aggregation"] == "token"
    assert 0 <= logged["train/surrogate_clip_fraction"] <= 1 and logged["train/surrogate_weight"] > 0
    assert run(target_kl=1e-9) == 2, "the first step after one that changed the policy is not taken"


def test_what_the_log_calls_clipped():
    model = rollout_of(ClipHigher(0.1, 0.15))
    terms = []
    model.policy.surrogate.function = lambda given: terms.append(given) or ClipHigher(0.1, 0.15)(given)
    model.train()
    ratios, advantages = terms[0].ratios, terms[0].advantages
    cut = ((ratios > 1.15) & (advantages > 0)) | ((ratios < 0.9) & (advantages < 0))
    model.policy.surrogate.record(model)
    logged = model.logger.name_to_value
    assert logged["train/surrogate_clip_fraction"] == pytest.approx(float(cut.float().mean())) != 0
    assert logged["train/surrogate_weight"] == pytest.approx(float(ratios.masked_fill(cut, 0).mean()))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_what_sb3_logs_of_the_loss(name, aggregation):
    """Its policy loss is the mean of -A r, whatever the surrogate, and its own clip never acts."""
    surrogate, terms = LOSSES[name][0], []
    model = rollout_of(lambda given: terms.append(given) or surrogate(given), aggregation)
    model.train()
    logged = model.logger.name_to_value
    assert logged["train/clip_fraction"] == 0
    expected = -float((terms[0].advantages * terms[0].ratios).mean())
    assert logged["train/policy_gradient_loss"] == pytest.approx(expected, rel=1e-5) != 0
    assert logged["train/approx_kl"] > 1e-4, "the divergence is that of the policy, which has changed"


def by_hand(algorithm=PPO, buffer=SequenceRolloutBuffer, surrogate=CISPO(), buffer_kwargs=None, **kwargs):  # noqa: B008
    kwargs = {"n_steps": 4, "normalize_advantage": False, "device": "cpu", **kwargs}
    if algorithm is PPO:
        kwargs = {"batch_size": 16, "clip_range": NO_CLIP, **kwargs}
    policy_kwargs = {"lm": tiny_config(), "surrogate": surrogate}
    env = TextVecEnv(tiny_env(), 4)
    options = {"rollout_buffer_class": buffer, "rollout_buffer_kwargs": buffer_kwargs, "policy_kwargs": policy_kwargs}
    return algorithm(LMPolicy, env, **options, **kwargs)


def test_an_algorithm_whose_loss_it_does_not_fit_is_refused(tmp_path):
    model = by_hand()
    model.save(tmp_path / "model")
    assert PPO.load(tmp_path / "model", device="cpu").policy.surrogate.function == CISPO()
    with pytest.raises(ValueError, match=r"Expected clip_range=1e\+09 of PPO with surrogate=CISPO.*, got 0.2, which"):
        by_hand(clip_range=0.2)
    with pytest.raises(ValueError, match=r"got 0\.0, which would clip again"):
        by_hand(clip_range=lambda progress: progress * NO_CLIP)
    with pytest.raises(ValueError, match="Expected normalize_advantage=False of PPO with surrogate=CISPO"):
        by_hand(normalize_advantage=True)
    with pytest.raises(ValueError, match="surrogate=None and aggregation='sequence', got True"):
        by_hand(surrogate=None, normalize_advantage=True, buffer_kwargs={"aggregation": "sequence"})
    with pytest.raises(ValueError, match="Expected rollout_buffer_class=SequenceRolloutBuffer with surrogate=CISPO"):
        by_hand(buffer=RolloutBuffer)
    with pytest.raises(ValueError, match=r"Expected PPO or MaskablePPO with surrogate=CISPO.*, got A2C: it takes one"):
        by_hand(A2C)
    with pytest.raises(ValueError, match=r"Expected PPO or MaskablePPO with surrogate=GSPO.*, got TRPO: it bounds its"):
        tiny_agent(algorithm=TRPO, policy_kwargs={"surrogate": GSPO()})


def test_wrong_weights_and_bounds_are_refused():
    model = tiny_agent(policy_kwargs={"surrogate": lambda terms: terms.ratios.mean()})
    with pytest.raises(ValueError, match=r"Expected a weight for each of 16 tokens from .*, got \(\)"):
        model.learn(16)
    for build in (lambda: ClipHigher(-0.1), lambda: GSPO(high=-1.0), lambda: CISPO(low=-0.2), lambda: DualClip(-1.0)):
        with pytest.raises(ValueError, match="Expected `low` and `high` of 0 or more"):
            build()
    with pytest.raises(ValueError, match=r"Expected `most` above 1, got 0.5"):
        DualClip(most=0.5)
    with pytest.raises(ValueError, match="Expected temperatures above 0"):
        SoftGate(positive=0.0)
