"""References of the KL penalty: estimators by enumeration, the adaptive coefficient, each kind of reference (C2-C5)."""

import json

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO

from agents import (
    AdaptiveCoef,
    KLPenalty,
    LastLayers,
    LoRA,
    Pretrained,
    TextVecEnv,
    load_checkpoint,
    make_agent,
    save_checkpoint,
    word_tokenizer,
)
from agents.models.sampling import Sampling
from agents.models.sequences import SequenceBatch
from agents.policies import actor_critic as actor_critic_module
from agents.policies.reference import (
    build_reference,
    copy_of,
    divergences,
    fingerprint,
    log_probs,
    own_tensors,
    start_of,
)
from agents.steps.kl_penalty import estimate
from tests.helpers.models import N_TOKENS, disturb, make_policy, observe, tiny
from tests.helpers.training import Recorder, run_state, tiny_agent, tiny_config, tiny_env
from textenv import CharTokenizer, TextEnv
from textenv.rewards import Zero

ROWS = [([3, 1], [2, 5]), ([4], []), ([7, 8, 9, 1, 2], [3])]


def batch_of(rows=ROWS):
    return SequenceBatch.from_observations(observe(rows))


def every_token(reference, policy, batch):
    """Return log pi_ref of each token of the vocabulary at each transition, (N, V), one token at a time."""
    n = len(batch)
    return torch.stack(
        [log_probs(reference, policy, batch, torch.full((n,), token)) for token in range(N_TOKENS)], dim=1
    )


def test_c3_the_estimators_by_hand():
    log_ratio = torch.tensor([0.0, np.log(2.0), -np.log(2.0)], dtype=torch.float64)
    assert estimate(log_ratio, "k1").tolist() == log_ratio.tolist()
    assert estimate(log_ratio, "k2").tolist() == pytest.approx([0, np.log(2) ** 2 / 2, np.log(2) ** 2 / 2])
    # exp(-r) - 1 + r: 1/2 - 1 + log 2, and 2 - 1 - log 2. With the other sign of r they would be exchanged.
    assert estimate(log_ratio, "k3").tolist() == pytest.approx([0, np.log(2) - 0.5, 1 - np.log(2)])


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_c3_the_means_by_enumeration_are_the_divergence(temperature):
    """E[k1] = E[k3] = exact = KL over all tokens; k3 >= 0; E[k2] is close while the divergence is small (C3)."""
    policy = make_policy(temperature=temperature).lm
    reference, batch = start_of(policy), batch_of()
    disturb(policy.backbone, 0.01)
    ours = policy.distribution(batch).log_probabilities.double()
    theirs = every_token(reference, policy, batch).double()
    probability, log_ratio = ours.exp(), ours - theirs
    kl = torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(1)
    assert (kl > 1e-4).all()
    for name in ("k1", "k3"):
        assert torch.allclose((probability * estimate(log_ratio, name)).sum(1), kl, atol=1e-6)
    assert (estimate(log_ratio, "k3") >= 0).all() and (estimate(log_ratio, "k1") < 0).any()
    assert torch.allclose((probability * estimate(log_ratio, "k2")).sum(1), kl, rtol=0.2)
    assert torch.allclose(divergences(reference, policy, batch).double(), kl, atol=1e-6)


def test_c3_the_gradient_of_the_expected_penalty_by_enumeration():
    """As a reward, k1, k3 and the exact divergence give the score-function gradient E[f grad log pi].

    For k1 this is the gradient of KL(pi, ref). For k3 it is the gradient of KL(pi, ref) minus that of KL(ref, pi); both
    are computed below by autograd. The exact divergence is the same for all tokens at a position, so it gives no
    gradient there, and acts only through earlier tokens.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    theirs = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)

    def gradient(scalar):
        return torch.autograd.grad(scalar, logits)[0]

    def score_function(values):
        ours = logits.log_softmax(0)
        return gradient((ours.exp().detach() * values.detach() * ours).sum())

    log_ratio = (logits.log_softmax(0) - theirs).detach()
    forward = gradient((logits.log_softmax(0).exp() * (logits.log_softmax(0) - theirs)).sum())
    backward = gradient((theirs.exp() * (theirs - logits.log_softmax(0))).sum())
    assert torch.allclose(score_function(estimate(log_ratio, "k1")), forward)
    assert torch.allclose(score_function(estimate(log_ratio, "k3")), forward - backward)
    exact = (log_ratio.add(theirs).exp() * log_ratio).sum()
    assert torch.allclose(score_function(exact.expand(7)), torch.zeros(7, dtype=torch.float64))


def test_exact_divergence_in_parts_is_that_in_one(monkeypatch):
    """In parts of at most two transitions, and finite for tokens that are impossible under both models."""
    policy = make_policy().lm
    reference, batch = start_of(policy), batch_of()
    disturb(policy.backbone)
    whole, sizes = divergences(reference, policy, batch), []
    original = actor_critic_module.TokenDistribution

    def spy(logits, temperature):
        sizes.append(len(logits))
        logits[:, 4] = -torch.inf
        return original(logits, temperature)

    monkeypatch.setattr(actor_critic_module, "MAX_LOGITS", 2 * N_TOKENS)
    parts = divergences(reference, policy, batch)
    assert torch.allclose(parts, whole, atol=1e-6)
    monkeypatch.setattr(actor_critic_module, "TokenDistribution", spy)
    assert torch.isfinite(divergences(reference, policy, batch)).all()
    assert max(sizes) == 2


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (6.6, 1.02), (100.0, 1.04), (0.0, 0.96), (5.4, 0.98)])
def test_c4_the_coefficient_by_hand(kl, factor):
    """Unchanged at the target; else times 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon; n / horizon is 1/5."""
    assert AdaptiveCoef(0.1, 6.0, 100).next(0.3, kl, 20) == pytest.approx(0.3 * factor, rel=1e-12)


@pytest.mark.parametrize("estimator, clip", [("k1", None), ("k3", 0.05), ("exact", None)])
def test_c4_it_is_fed_what_the_rewards_were_charged(estimator, clip):
    model, recorder = tiny_agent(n_steps=6), Recorder()
    control = AdaptiveCoef(0.3, 0.5, 40)
    penalty, coefs = KLPenalty(control, estimator=estimator, clip=clip), []

    class Watch(Recorder):
        def _on_rollout_start(self):
            coefs.append(penalty.coef)

    model.learn(24 * 5, callback=[penalty, recorder, Watch()])
    coefs.append(penalty.coef)
    assert len(set(coefs[1:])) == 5
    for rollout in range(5):
        steps = range(6 * rollout, 6 * rollout + 6)
        ended = [info for step in steps for info, done in zip(recorder.infos[step], recorder.dones[step]) if done]
        charged = sum(info["episode"]["r"] for info in ended) - recorder.rewards[rollout].sum()
        expected = control.next(coefs[rollout], charged / coefs[rollout] / len(ended), len(ended))
        assert coefs[rollout + 1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("train", ["all", LoRA(), LastLayers(1)], ids=["all", "lora", "last"])
def test_c4_e8_a_resumed_run_goes_on_with_coefficient_and_reference(train, algorithm, tmp_path):
    def build(seed=0):
        kwargs = {"policy_kwargs": {"train": train}, "n_steps": 5, "algorithm": algorithm}
        return tiny_agent(seed=seed, **kwargs), KLPenalty(AdaptiveCoef(0.1, 0.01, 10), estimator="k3")

    model, penalty = build()
    model.learn(40, callback=penalty)
    save_checkpoint(model, tmp_path / "saved")
    model.learn(40, callback=penalty, reset_num_timesteps=False)
    resumed, again = build()  # checkpoints leave out a frozen base; a config draws it again by the same seed
    load_checkpoint(resumed, tmp_path / "saved")
    resumed.learn(40, callback=again, reset_num_timesteps=False)
    assert again.coef == penalty.coef != 0.1
    expected = run_state(model)
    assert run_state(resumed) == expected
    stored = json.loads((tmp_path / "saved" / "state.json").read_text())["steps"]["KLPenalty"]
    assert stored["coef"] != 0.1


def test_clip_bounds_what_a_token_is_charged():
    model, recorder = tiny_agent(n_steps=6), Recorder()
    model.learn(24 * 4, callback=[KLPenalty(2.0, clip=0.01), recorder])
    scores = np.zeros_like(recorder.stacked("rewards"))
    for info, transitions in recorder.episodes():
        scores[transitions[-1]] = info["episode"]["r"]
    charged = scores - recorder.stacked("rewards")
    finished = np.zeros_like(scores, dtype=bool)
    for _, transitions in recorder.episodes():
        finished[tuple(zip(*transitions))] = True
    assert np.abs(charged[finished]).max() == pytest.approx(0.02, abs=1e-5)


@pytest.mark.parametrize("train", ["all", "head", LastLayers(1), LoRA()], ids=["all", "head", "last", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_c5_each_start_says_what_a_whole_frozen_copy_says(family, train):
    """Log-probabilities and exact divergences agree to 1e-6, after the policy has changed."""
    policy = make_policy(tiny(family), train=train).lm
    reference, whole, batch = start_of(policy), copy_of(policy), batch_of()
    disturb(policy.backbone)
    actions = torch.tensor([5, 6, 7])
    expected = log_probs(whole, policy, batch, actions)
    assert torch.allclose(log_probs(reference, policy, batch, actions), expected, atol=1e-6)
    assert not torch.allclose(policy.log_probs(batch, actions), expected, atol=1e-3)
    assert torch.allclose(divergences(reference, policy, batch), divergences(whole, policy, batch), atol=1e-6)
    assert policy.log_probs(batch, actions).grad_fn is not None, "the policy's adapters are on again, and trained"


def test_the_start_holds_only_what_is_trained_a_second_time():
    for train, expected in (("all", None), (LastLayers(1), "transformer.h.1."), ("head", "wte"), (LoRA(), "nothing")):
        policy = make_policy(train=train).lm
        own = [name for name, tensor in own_tensors(start_of(policy), policy).items() if tensor.is_floating_point()]
        trained = [name for name, weight in policy.backbone.named_parameters("backbone") if weight.requires_grad]
        assert own == ([] if expected == "nothing" else trained)
        assert expected is None or all(expected in name for name in own)


@pytest.mark.parametrize("estimator", ["k1", "exact"])
@pytest.mark.parametrize("train", ["all", LastLayers(1), LoRA()], ids=["all", "last", "lora"])
def test_c5_what_the_reference_says_never_changes(train, estimator):
    """Through training; the reference's weights are checked too, which for LoRA are the policy's frozen base (C5)."""
    model, penalty = tiny_agent(policy_kwargs={"train": train}), KLPenalty(0.1, estimator=estimator)
    policy, batch, actions = model.policy.lm, batch_of(), torch.tensor([5, 6, 7])
    before = policy.log_probs(batch, actions).detach()
    frozen = {name: weight.clone() for name, weight in policy.named_parameters() if not weight.requires_grad}
    model.learn(64, callback=penalty)
    assert torch.equal(log_probs(penalty.reference, policy, batch, actions), before)
    assert not torch.allclose(policy.log_probs(batch, actions), before, atol=1e-4)
    assert all(torch.equal(policy.get_parameter(name), weight) for name, weight in frozen.items())
    assert (penalty.reference is policy) == isinstance(train, LoRA)
    if penalty.reference is not policy:
        assert all(not weight.requires_grad and weight.grad is None for weight in penalty.reference.parameters())


def test_another_checkpoint_as_reference(tmp_path):
    """Given as a path, a spec or a config, of another family; uses the policy's vocabulary and temperature."""
    other = make_policy(tiny("llama"), seed=3)
    other.lm.backbone.model.save_pretrained(tmp_path / "other")
    for reference in (str(tmp_path / "other"), Pretrained(str(tmp_path / "other"))):
        model = tiny_agent(policy_kwargs={"temperature": 0.5})
        penalty, recorder = KLPenalty(0.2, reference=reference), Recorder()
        model.learn(32, callback=[penalty, recorder])
        assert penalty.reference.sampling.temperature == 0.5 and penalty.reference.backbone.vocab_size == N_TOKENS
        assert not any(weight.requires_grad for weight in penalty.reference.parameters())
        other.lm.sampling = Sampling(temperature=0.5)
        batch, actions = batch_of(), torch.tensor([5, 6, 7])
        expected = other.lm.log_probs(batch, actions)
        assert torch.allclose(log_probs(penalty.reference, model.policy.lm, batch, actions), expected, atol=1e-6)
        save_checkpoint(model, tmp_path / "saved", overwrite=True)
        resumed = tiny_agent(policy_kwargs={"temperature": 0.5})
        load_checkpoint(resumed, tmp_path / "saved")
        with pytest.raises(ValueError, match="Expected the `reference` that was saved, got another"):
            resumed.learn(16, callback=KLPenalty(0.2), reset_num_timesteps=False)
    model = tiny_agent()
    model.learn(16, callback=KLPenalty(0.2, reference=tiny_config(n_layer=1)))


def test_c5_a_teacher_given_by_name_is_not_saved_but_must_be_the_same(tmp_path):
    """A checkpoint has its fingerprint; a resumed run loads the name, and goes on as if uninterrupted."""
    for number in (1, 2):
        make_policy(tiny("llama"), seed=number).lm.backbone.model.save_pretrained(tmp_path / f"teacher{number}")
    teacher = str(tmp_path / "teacher1")

    def attached():
        model, penalty = tiny_agent(gamma=0.0, vf_coef=0.0), KLPenalty(1.0, reference=teacher)
        return model, penalty

    model, penalty = attached()
    model.learn(32, callback=penalty)
    save_checkpoint(model, tmp_path / "saved")
    assert penalty.state_dict()[0] == {}
    assert (tmp_path / "saved" / "step_KLPenalty.safetensors").stat().st_size < 200
    model.learn(32, callback=penalty, reset_num_timesteps=False)
    resumed, again = attached()
    load_checkpoint(resumed, tmp_path / "saved")
    resumed.learn(32, callback=again, reset_num_timesteps=False)
    assert run_state(resumed) == run_state(model)
    other = tiny_agent()
    load_checkpoint(other, tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"`reference` that was saved, got another: its weights differ\. Pass the same"
    ):
        other.learn(16, callback=KLPenalty(1.0, reference=str(tmp_path / "teacher2")), reset_num_timesteps=False)


def test_a_token_has_one_id_for_policy_and_reference(tmp_path):
    """More tokens, fewer tokens and no tokenizer are accepted; a token of another id is refused by name."""
    words = ["a", "good", "film", "plot"]
    model = make_policy(tiny("gpt2")).lm.backbone.model

    def teacher(folder, own_words):
        model.save_pretrained(tmp_path / folder)
        if own_words is not None:
            word_tokenizer(own_words).save_pretrained(tmp_path / folder)
        return str(tmp_path / folder)

    def attach(reference, tokenizer=None):
        env = TextEnv(["a"], tokenizer or word_tokenizer(words), reward=Zero(), max_new_tokens=4)
        agent = make_agent(env, tiny_config(vocab_size=6), n_envs=8, device="cpu")
        KLPenalty(1.0, reference=reference).attach(agent)

    for folder, own_words in {"same": words, "more": [*words, "so"], "fewer": words[:3], "none": None}.items():
        attach(teacher(folder, own_words))
        attach(Pretrained(str(tmp_path / folder)))
    other = teacher("other", ["a", "film", "good", "plot"])
    attach(other, CharTokenizer("abc"))  # without `get_vocab`
    for reference in (other, Pretrained(other)):
        with pytest.raises(ValueError, match=r"whose tokenizer has others for 2 of 6 ids, such as 'film' in place of"):
            attach(reference)


def test_the_fingerprint_is_of_the_weights():
    first, same, other = (make_policy(tiny("llama"), seed=seed).lm for seed in (1, 1, 2))
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    with torch.no_grad():
        next(same.parameters()).flatten()[0] += 1e-3
    assert fingerprint(first) != fingerprint(same)


def test_a_reference_that_does_not_fit_is_refused():
    policy = make_policy().lm
    with pytest.raises(ValueError, match="at least the 33 tokens of the tokenizer, got 12"):
        build_reference(tiny(vocab_size=12), policy, 16)
    with pytest.raises(ValueError, match="Expected prompt and completion to fit the model's 8 positions"):
        build_reference(tiny(n_positions=8), policy, 16)


def test_a_loaded_lora_policy_needs_no_reference(tmp_path):
    """A LoRA policy contains its start, so the penalty of a loaded model has the reference of the saved run."""
    model = tiny_agent(policy_kwargs={"train": LoRA()})
    start = model.policy.lm.log_probs(batch_of(), torch.tensor([5, 6, 7])).detach()
    model.learn(32)
    model.save(tmp_path / "model.zip")
    loaded, penalty = PPO.load(tmp_path / "model.zip", env=TextVecEnv(tiny_env(), 4)), KLPenalty(0.1)
    loaded.learn(16, callback=penalty, reset_num_timesteps=False)
    of_reference = log_probs(penalty.reference, loaded.policy.lm, batch_of(), torch.tensor([5, 6, 7]))
    assert torch.allclose(of_reference, start, atol=1e-6)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"`estimator` to be one of \['k1', 'k2', 'k3', 'exact'\], got 'k4'"):
        KLPenalty(0.1, estimator="k4")
    with pytest.raises(ValueError, match="Expected `clip` to be positive or None, got 0"):
        KLPenalty(0.1, clip=0)
    with pytest.raises(ValueError, match="Expected `target` to be positive, got -1"):
        AdaptiveCoef(0.1, -1, 100)
