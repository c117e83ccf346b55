"""MaskablePPO of sb3-contrib, unmodified: sampled, scored and trained under the env's masks (invariants A1, A5, E8)."""

import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TRPO, MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3 import A2C, PPO

from agents import (
    KLPenalty,
    LoRA,
    MaskableLMPolicy,
    MaskableSequenceRolloutBuffer,
    SampleTable,
    SeparateCritic,
    TextVecEnv,
    TrainingWarnings,
    generate,
    load_checkpoint,
    make_agent,
    save_checkpoint,
)
from tests.helpers.models import CheckRatio, collect, few, make_ppo, tiny
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import TOKENIZER, run_state, same_weights, tiny_agent, tiny_config, tiny_env, weights
from textenv import MaskError

N_TOKENS = len(TOKENIZER)
VOWELS, CONSONANTS = TOKENIZER.encode("aeiou"), TOKENIZER.encode("bcdfg")


def letters(prompt, preds):
    """Allow vowels and consonants in turn; the prompt's length decides which begin, the text's whether it may end."""
    ids = (VOWELS, CONSONANTS)[(len(prompt) + len(preds)) % 2]
    return ids if len(preds) < 2 else [0, *ids[: len(preds)]]


def is_allowed(prompt, ids):
    """Return whether `letters` allows a text, token by token."""
    return all(token in letters(prompt, ids[:position]) for position, token in enumerate(ids))


def follows(prompt, preds, done):
    """Reward texts that the mask allows, and the letter a."""
    return is_allowed(prompt, preds.ids) + 0.1 * preds.text.count("a") if done else 0.0


def masked_env(mask=letters, max_new_tokens=6, **kwargs):
    return tiny_env(reward=follows, max_new_tokens=max_new_tokens, mask=mask, **kwargs)


def masked_agent(env=None, **kwargs):
    settings = {"n_epochs": 2, "n_steps": 8, "batch_size": 32, **kwargs}
    return tiny_agent(env or masked_env(), algorithm=MaskablePPO, **settings)


def samples_of(model):
    return next(iter(model.rollout_buffer.get()))


class Written(CheckRatio):
    """Keeps the texts of all episodes, as well as the ratios."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def _on_step(self):
        self.texts += [(info["prompt"], TOKENIZER.encode(info["text"])) for info in self.locals["infos"] if info]
        return True


SAMPLING = [{}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}, {"top_p": 0.6, "top_p_lag": 1}]


@pytest.mark.parametrize("temperature", few([0.7, 1.0, 1.3], 1))
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_a1_a5_the_ratio_is_one_and_forbidden_tokens_have_no_probability(sampling, temperature):
    """Over updates and episodes that straddle rollouts; entropies and gradients are finite."""
    model, seen = masked_agent(policy_kwargs={"temperature": temperature, **sampling}), Written()
    model.learn(4 * 32, callback=seen)
    assert len(seen.largest) == 4 and max(seen.largest) < 1e-5
    assert len(seen.texts) > 10 and all(is_allowed(prompt, ids) for prompt, ids in seen.texts)
    samples = samples_of(model)
    allowed = samples.observations.allowed.dense(torch.device("cpu"))
    assert (allowed.sum(dim=1) <= (3 if "top_k" in sampling else 6)).all()
    probabilities = model.policy.get_distribution(samples.observations).distribution.probs
    assert (probabilities[~allowed] == 0).all()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(32))
    values, log_probs, entropies = model.policy.evaluate_actions(samples.observations, samples.actions)
    assert (entropies >= -1e-6).all() and (entropies <= np.log(6) + 1e-5).all()
    model.policy.zero_grad()
    (values.sum() + log_probs.sum() + entropies.sum()).backward()
    assert all(weight.grad.isfinite().all() for weight in model.policy.parameters() if weight.grad is not None)


def test_a1_without_the_stored_masks_the_ratio_is_not_one():
    """The control: scored under the whole vocabulary, the ratio is the mask's share of the probability."""
    model = masked_agent()
    collect(model)
    samples = samples_of(model)
    samples.observations.allowed = None
    with torch.no_grad():
        log_probs = model.policy.evaluate_actions(samples.observations, samples.actions)[1]
    assert (log_probs - samples.old_log_prob).exp().mean() < 0.3


def test_a5_a_head_row_of_a_token_that_is_never_allowed_does_not_move():
    """With untied embeddings, no gradient reaches the row, from the loss or from the entropy bonus."""
    env = masked_env(lambda prompt, preds: [0, *VOWELS])
    model = masked_agent(env, lm=tiny_config(tie_word_embeddings=False), ent_coef=0.1)
    head = model.policy.backbone.model.get_output_embeddings().weight
    before = head.detach().clone()
    model.learn(3 * 32)
    moved = (head != before).any(dim=1)
    assert moved[[0, *VOWELS]].all() and moved.sum() == 1 + len(VOWELS)


def test_a5_a_row_in_which_nothing_is_allowed_raises():
    model = masked_agent()
    observations = torch.as_tensor(model.env.reset())
    masks = np.stack(model.env.env_method("action_masks"))
    masks[2] = False
    actions = torch.ones(4, dtype=torch.long)
    match = "Expected every row of `action_masks` to allow a token, got none in row 2"
    for ask in (
        lambda: model.policy.forward(observations, action_masks=masks),
        lambda: model.predict(observations.numpy(), action_masks=masks),
        lambda: model.policy.evaluate_actions(observations, actions, torch.as_tensor(masks)),
        lambda: model.policy.get_distribution(observations, masks),
    ):
        with pytest.raises(ValueError, match=match):
            ask()
    with pytest.raises(ValueError, match=r"of shape \(4, 33\), got \(4, 32\)"):
        model.predict(observations.numpy(), action_masks=masks[:, 1:])
    with pytest.raises(MaskError, match="Expected a token to be allowed"):
        masked_agent(masked_env(lambda prompt, preds: VOWELS if len(preds) < 2 else [])).learn(32)


def by_buffer(buffer_class, seed=0, **kwargs):
    """Return MaskablePPO with the given buffer class, which `make_agent` would choose itself."""
    settings = {"batch_size": 48, "n_epochs": 1, "normalize_advantage": False, "learning_rate": 0.05, **kwargs}
    return make_ppo(
        env=masked_env(),
        rollout_buffer_class=buffer_class,
        algorithm=MaskablePPO,
        policy_class=MaskableLMPolicy,
        seed=seed,
        **settings,
    )


def test_a_rollout_scores_as_with_the_stock_buffer():
    """One forward per sequence gives the values, log-probabilities, entropies and gradients of one per token."""
    results = []
    for buffer_class in (MaskableSequenceRolloutBuffer, MaskableRolloutBuffer):
        model = by_buffer(buffer_class, policy_kwargs={"temperature": 0.7})
        model.policy.set_training_mode(False)
        _, callback = model._setup_learn(48, None)
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, 12)
        samples = samples_of(model)
        values, log_probs, entropies = model.policy.evaluate_actions(
            samples.observations, samples.actions.flatten(), samples.action_masks
        )
        # The two buffers return transitions in different orders: sort them by old log-probability and return.
        order = np.lexsort(np.round([samples.old_log_prob.numpy(), samples.returns.numpy()], 3))
        per_token = torch.stack([values.flatten(), log_probs, entropies, samples.old_log_prob, samples.returns])
        (values.square().mean() + log_probs.mean() + entropies.mean()).backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.policy.parameters()])
        results.append((per_token[:, order].detach(), gradients))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
    assert results[0][1].abs().max() > 0.01


@pytest.mark.parametrize("policy_kwargs", [{}, {"temperature": 1.3}, {"repetition_penalty": 1.5}], ids=str)
def test_training_ends_in_the_parameters_of_the_stock_buffer(policy_kwargs):
    """Three rollouts with three epochs each and an entropy bonus; the stock buffer is the slow reference."""
    ends = []
    for buffer_class in (MaskableSequenceRolloutBuffer, MaskableRolloutBuffer):
        model = by_buffer(buffer_class, n_epochs=3, ent_coef=0.1, policy_kwargs=policy_kwargs)
        before = weights(model)
        model.learn(3 * 48)
        ends.append(weights(model))
    assert max(float((before[name] - ends[0][name]).abs().max()) for name in before) > 0.01
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], atol=1e-5, rtol=0)


def test_the_stock_buffer_with_a_support_is_refused():
    with pytest.raises(ValueError, match=r"top_k, top_p, min_p.*SequenceRolloutBuffer"):
        by_buffer(MaskableRolloutBuffer, policy_kwargs={"top_k": 2}).learn(48)


@pytest.mark.parametrize("policy_kwargs", [{}, {"top_p": 0.7}], ids=str)
def test_e8_masks_of_waiting_segments_survive_a_checkpoint(tmp_path, policy_kwargs):
    """A run resumes bit for bit, and the checkpoint holds only the masks of waiting segments."""
    options = {
        "n_envs": 8,
        "n_steps": 5,
        "batch_size": 40,
        "policy_kwargs": policy_kwargs,
        "rollout_buffer_kwargs": {"complete_episodes": True},
    }
    model = masked_agent(**options)
    model.learn(3 * 40)
    buffer = model.rollout_buffer
    assert sum((part.allowed > 0).sum() for part in buffer.waiting.values()) > 0
    expected = {lane: buffer.token_sets.dense(part.allowed) for lane, part in buffer.waiting.items()}
    save_checkpoint(model, tmp_path / "saved")
    other = masked_agent(**options)
    load_checkpoint(other, tmp_path / "saved")
    assert run_state(model) == run_state(other)
    for lane, part in other.rollout_buffer.waiting.items():
        assert (other.rollout_buffer.token_sets.dense(part.allowed) == expected[lane]).all()
    for run in (model, other):
        seen = Written()
        run.learn(2 * 40, reset_num_timesteps=False, callback=seen)
        assert max(seen.largest) < 1e-5
    assert run_state(model) == run_state(other)


def test_masks_of_trained_segments_are_forgotten():
    """Even when some segments always wait, masks of earlier rollouts are not kept."""
    count = iter(range(10**6))

    def mask(prompt, preds):
        number = next(count)
        return np.array([bit < 3 or bool(number >> bit - 3 & 1) for bit in range(N_TOKENS)])

    options = {"n_envs": 8, "n_steps": 5, "batch_size": 40, "rollout_buffer_kwargs": {"complete_episodes": True}}
    model = masked_agent(masked_env(mask), **options)
    sizes = []
    for _ in range(6):
        model.learn(40, reset_num_timesteps=False)
        sizes.append(len(model.rollout_buffer.token_sets.sets))
        assert model.rollout_buffer.waiting
    assert min(sizes) > 40 and max(sizes) <= 1 + 40 + 8 * 5


def test_a_saved_model_is_loaded_and_goes_on(tmp_path):
    model = masked_agent()
    model.learn(32)
    model.save(tmp_path / "model.zip")
    loaded = MaskablePPO.load(tmp_path / "model.zip", env=TextVecEnv(masked_env(), 4), device="cpu")
    assert type(loaded.policy) is MaskableLMPolicy and type(loaded.rollout_buffer) is MaskableSequenceRolloutBuffer
    assert same_weights(weights(model), weights(loaded))
    observations = loaded.env.reset()
    masks = get_action_masks(loaded.env)
    chosen = [agent.predict(observations, deterministic=True, action_masks=masks)[0] for agent in (model, loaded)]
    assert (chosen[0] == chosen[1]).all() and masks[np.arange(4), chosen[0]].all()
    seen = Written()
    loaded.learn(64, callback=seen)
    assert max(seen.largest) < 1e-5 and not same_weights(weights(model), weights(loaded))


def test_predict_takes_masks():
    """Greedy prediction takes the best allowed token of one row or many; without masks, the best of all tokens."""
    model = masked_agent(lm=tiny(n_positions=32))
    observations = model.env.reset()
    masks = get_action_masks(model.env)
    logits = model.policy.get_distribution(torch.as_tensor(observations)).log_probabilities.detach()
    best = logits.masked_fill(~torch.as_tensor(masks), -np.inf).argmax(dim=1).numpy()
    assert (model.predict(observations, deterministic=True, action_masks=masks)[0] == best).all()
    assert model.predict(observations[1], deterministic=True, action_masks=masks[1])[0] == best[1]
    assert (model.predict(observations, deterministic=True)[0] == logits.argmax(dim=1).numpy()).all()
    assert (best != logits.argmax(dim=1).numpy()).any()
    drawn = np.stack([model.predict(observations, action_masks=masks)[0] for _ in range(50)])
    assert masks[np.arange(4), drawn].all() and len(np.unique(drawn)) > 5


@pytest.mark.parametrize("vectorised", [True, False])
def test_evaluate_policy_of_sb3_contrib(vectorised):
    """In lanes and in a single env; without masks, the same policy hardly ever writes allowed texts."""
    model = masked_agent()
    env = TextVecEnv(masked_env(), 3) if vectorised else masked_env()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single env has no Monitor
        rewards, lengths = evaluate_policy(model, env, 12, deterministic=False, return_episode_rewards=True)
        unmasked, _ = evaluate_policy(model, env, 12, deterministic=False, use_masking=False)
    assert len(rewards) == 12 and min(rewards) >= 1 and max(lengths) <= 6
    assert unmasked < 0.3
    with pytest.raises(ValueError, match="does not support action masking"):
        evaluate_policy(model, TextVecEnv(tiny_env(), 2), 2)


def test_generate_and_sample_tables_take_the_mask(capsys):
    model = masked_agent()
    options = {"mask": letters, "max_new_tokens": 6}
    texts = generate(model, ["ab", "cde"], TOKENIZER, 20, n_envs=7, **options)
    assert all(is_allowed(text.prompt, text.ids) for text in texts) and len({text.text for text in texts}) > 10
    assert texts == generate(model, ["ab", "cde"], TOKENIZER, 20, n_envs=7, **options)
    free = generate(model, ["ab", "cde"], TOKENIZER, 20, max_new_tokens=6)
    assert not any(is_allowed(text.prompt, text.ids) for text in free)
    model.learn(1, callback=SampleTable(["ab"], TOKENIZER, **options))
    assert f"ab{generate(model, ['ab'], TOKENIZER, **options)[0].text} " in capsys.readouterr().out


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_c2_the_penalty_is_zero_where_policy_and_reference_agree(estimator):
    """After updates, it is the divergence of both over the allowed tokens, by enumeration (C2)."""
    model, penalty = masked_agent(policy_kwargs={"temperature": 0.7}), KLPenalty(0.1, estimator=estimator)
    buffer = collect(model, penalty)
    assert (penalty._divergence(buffer, buffer.view()) == 0).all()
    penalty._start = None  # compute the divergence, which is otherwise known to be 0 before training
    assert np.abs(penalty._divergence(buffer, buffer.view())).max() < 1e-6
    model.train()
    buffer = collect(model, penalty)
    view = buffer.view()
    allowed = view.batch.allowed.dense(torch.device("cpu"))
    everything = view.batch[:]
    everything.allowed = None
    ours, theirs = (
        lm.distribution(everything).log_probabilities.detach().masked_fill(~allowed, -np.inf).log_softmax(-1)
        for lm in (model.policy.lm, penalty.reference)
    )
    ratio = (ours - theirs).gather(1, view.actions[:, None])[:, 0]
    by_hand = {
        "k1": ratio,
        "k2": ratio**2 / 2,
        "k3": (-ratio).exp() - 1 + ratio,
        "exact": torch.where(allowed, ours.exp() * (ours - theirs), 0.0).sum(dim=1),
    }[estimator]
    assert by_hand.abs().max() > 1e-3
    torch.testing.assert_close(torch.as_tensor(penalty._divergence(buffer, view)), by_hand, atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO])
def test_make_agent_refuses_algorithms_that_know_no_masks(algorithm):
    with pytest.raises(ValueError, match=f"MaskablePPO.*for an env with `mask`, got {algorithm.__name__}.*forbids"):
        make_agent(masked_env(), tiny_config(), n_envs=4, algorithm=algorithm)


def test_masks_take_little_memory():
    """For a vocabulary of 152,000 and 128 steps of 64 lanes, the stock buffer takes 4.6 GiB."""
    n_tokens, n_steps, n_envs = 152_000, 128, 64
    masks = np.random.default_rng(0).random((4, n_tokens)) < np.array([[0.5], [0.9], [1e-4], [1e-3]])
    allowed = torch.as_tensor(masks[np.arange(n_envs) % 4])
    tracemalloc.start()
    space = spaces.Box(-2, n_tokens - 1, (8,), np.int64)
    buffer = MaskableSequenceRolloutBuffer(n_steps, space, spaces.Discrete(n_tokens), "cpu", n_envs=n_envs)
    empty = tracemalloc.get_traced_memory()[0]
    row = np.full((n_envs, 8), -1)
    row[:, :2] = 3, -2
    for _ in range(n_steps):
        numbers = torch.zeros(n_envs)
        numbers.allowed = allowed
        buffer.add(row, np.zeros(n_envs), np.zeros(n_envs), np.zeros(n_envs), torch.zeros(n_envs), numbers)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = sum(token_set.nbytes for token_set in buffer.token_sets.sets) + buffer.allowed.nbytes
    assert kept < 100_000 and now - empty < 1 << 20 and peak < 16 << 20
    assert (buffer.token_sets.dense(buffer.allowed[-1, :4]) == masks).all()


MODELS = {
    "encoder-decoder": (tiny_seq2seq("t5"), {}),
    "separate critic": (tiny_config(), {"critic": SeparateCritic(tiny_config(n_embd=8))}),
    "lora": (tiny_config(), {"train": LoRA(r=2)}),
    "popart": (tiny_config(), {"value_norm": "popart"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_train_under_masks(name):
    lm, policy_kwargs = MODELS[name]
    model, seen = masked_agent(lm=lm, policy_kwargs=policy_kwargs), Written()
    before = weights(model)
    model.learn(2 * 32, callback=[seen, KLPenalty(0.05)])
    after = weights(model)
    assert not same_weights(before, after) and all(weight.isfinite().all() for weight in after.values())
    assert max(seen.largest) < 1e-5 and all(is_allowed(prompt, ids) for prompt, ids in seen.texts)


def test_doctor_and_warnings_know_masks():
    """Neither reports masks as a fault, nor calls the reward on a forbidden text."""

    def strict(prompt, preds, done):
        assert is_allowed(prompt, preds.ids)
        return 0.1 * len(preds)

    env = tiny_env(reward=strict, mask=letters, max_new_tokens=6)
    model = masked_agent(env, policy_kwargs={"top_k": 3}, check=True, learning_rate=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(2 * 32, callback=TrainingWarnings())
