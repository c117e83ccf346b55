"""Learning from people: raters with a known taste answer through the real store, and a model learns the taste.

The taste is the share of positive mood words in a demo review, with noise; raters who answer at random are the control.
"""

import contextlib
import io
import json

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agents import Pretrained, demo_model, generate, score_texts
from agents.cli.options import RateConfig, RateOptions
from agents.cli.rate import ask
from agents.cli.rate_training import FirstEpisodes, learn, make_trainee
from agents.cli.trained_model import open_writer
from tests.helpers.command import run
from tests.helpers.models import seldom
from tests.helpers.people import Crowd, Rater, mood
from textenv import TextEnv, demo
from textenv.feedback.store import FeedbackStore
from textenv.rewards.human import HumanReward

TRAINING = {
    "env.max_new_tokens": 32,
    "env.args": '{"score_at": "rollout_end"}',
    "algorithm.learning_rate": 1.5e-3,
    "algorithm.schedule": "linear",
    "algorithm.batch_size": 512,
    "algorithm.args": '{"target_kl": 0.05}',
    "total_tokens": 20_000,
    "loggers": "[]",
    "device": "cpu",
    "samples": 0,
}
SEED_OF_TEXTS = 1000


def collect(db, n_prompts, seed, is_random):
    """Let the demo's model write four texts per prompt, and a rater rank them."""
    writer = open_writer(str(demo_model()), None, RateOptions())
    prompts = (demo.prompts() * 5)[:n_prompts]
    with FeedbackStore(db, seed=seed) as store:
        ask(store, writer, prompts, RateConfig(model="demo", kind="rank", db=db, seed=seed))
        assert Rater(store, is_random=is_random, seed=seed).answer_all() == n_prompts


def taste(folder, seed=7):
    """Return the mean taste of 200 texts of a model."""
    writer = open_writer(str(folder), None, RateOptions())
    texts = generate(writer.policy, demo.prompts() * 5, writer.tokenizer, max_new_tokens=32, seed=seed)
    return float(np.mean([mood(str(sample.prompt) + sample.text) for sample in texts]))


def held_out_accuracy(folder):
    """Return the share of 300 pairs of new texts that the reward model ranks like the taste without noise."""
    writer = open_writer(str(demo_model()), None, RateOptions())
    written = generate(writer.policy, demo.prompts() * 18, writer.tokenizer, 2, max_new_tokens=32, seed=SEED_OF_TEXTS)
    texts = [str(sample.prompt) + sample.text for sample in written]
    pairs = [pair for pair in zip(texts[::2], texts[1::2]) if mood(pair[0]) != mood(pair[1])][:300]
    assert len(pairs) == 300
    scorer = AutoModelForSequenceClassification.from_pretrained(folder)
    scores = score_texts(scorer, AutoTokenizer.from_pretrained(folder), [text for pair in pairs for text in pair])
    wanted = [mood(first) > mood(second) for first, second in pairs]
    return float(np.mean((scores[::2] > scores[1::2]) == wanted))


def train(out, reward, seed):
    settings = {**TRAINING, "env.reward": json.dumps(reward), "seed": seed, "out": out}
    assert run("train", *(f"--{name}={value}" for name, value in settings.items()), "--quiet") == 0


@pytest.mark.parametrize("case", seldom([(0, False), (0, True), (1, False), (1, True)]))
def test_200_answers_teach_a_reward_model_and_it_teaches_the_policy(tmp_path, case):
    """`textenv rate`, `reward-model --from-feedback`, `train`; with random answers, nothing is learned."""
    seed, is_random = case
    db = str(tmp_path / "ratings.db")
    collect(db, 200, seed, is_random)
    words = ["--learning_rate", "3e-3", "--n_epochs", "10", "--seed", seed, "--out", tmp_path / "scorer", "--quiet"]
    assert run("reward-model", "--from-feedback", db, *words) == 0
    accuracy = held_out_accuracy(tmp_path / "scorer")
    scorer = {"id": "preference", "args": {"model": str(tmp_path / "scorer"), "stats": "stored"}}
    train(tmp_path / "run", scorer, seed)
    before, after = taste(demo_model()), taste(tmp_path / "run" / "model")
    print(f"random={is_random} seed={seed}: accuracy {accuracy:.3f}, taste {before:.3f} -> {after:.3f}")
    assert abs(before - 0.5) < 0.1
    if is_random:
        assert 0.3 < accuracy < 0.7 and after < before + 0.2
    else:
        assert accuracy >= 0.8 and after > before + 0.3


@pytest.mark.long
@pytest.mark.parametrize("is_random", [False, True])
def test_a_learned_reward_folds_in_answers_while_the_policy_trains(tmp_path, is_random):
    db, seed = str(tmp_path / "ratings.db"), 0
    collect(db, 40, seed, is_random)
    learner = {"learning_rate": 3e-3, "n_epochs": 6, "seed": seed}
    reward = {"db": db, "kind": "rank", "every": 40, "n_asked": 20}
    reward["learned"] = {"id": "agents.supervised.learned_reward:LearnedReward", "args": learner}
    with FeedbackStore(db, seed=seed) as store, Crowd(Rater(store, is_random=is_random, seed=seed)) as crowd:
        train(tmp_path / "run", {"id": "human", "args": reward}, seed)
    before, after = taste(demo_model()), taste(tmp_path / "run" / "model")
    print(f"random={is_random}: {crowd.n_answers} answers meanwhile, taste {before:.3f} -> {after:.3f}")
    assert crowd.n_answers > 40
    assert after < before + 0.2 if is_random else after > before + 0.25


@pytest.mark.parametrize("is_random", seldom([False, True]))
def test_scoring_four_samples_an_update_by_hand(tmp_path, is_random):
    """The loop of `textenv rate --train`: 200 scores, 50 updates."""
    folder, seed = str(demo_model()), 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with FeedbackStore(tmp_path / "ratings.db", seed=seed) as store:
        rater = Rater(store, is_random=is_random, seed=seed)
        reward = FirstEpisodes(HumanReward(tmp_path / "ratings.db"))
        reward.human.attend = lambda items: rater.answer_all()
        env = TextEnv(demo.prompts(), tokenizer, reward=reward, max_new_tokens=32, seed=seed)
        agent = make_trainee(env, Pretrained(folder), RateConfig(n=4, learning_rate=1e-3, kl=0.1, seed=seed))
        with contextlib.redirect_stdout(io.StringIO()):
            learn(agent, reward, tmp_path, "session", 50)
    written = generate(agent, demo.prompts() * 5, tokenizer, max_new_tokens=32, seed=7)
    before, after = taste(folder), float(np.mean([mood(str(sample.prompt) + sample.text) for sample in written]))
    n_scores = sum(map(len, reward.scores))
    print(f"random={is_random}: {n_scores} scores, taste {before:.3f} -> {after:.3f}")
    assert n_scores == 200
    assert after < before + 0.2 if is_random else after > before + 0.25
