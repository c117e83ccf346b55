"""rl_zoo3 as a client: environments, policies and algorithms made its way, and real runs of its scripts."""

import csv
import importlib.machinery
import os
import re
import subprocess
import sys
import types

import gymnasium
import numpy as np
import pytest
import yaml
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from agents import LMPolicy, MaskableLMPolicy, SequenceRolloutBuffer, TextVecEnv, make_agent, word_tokenizer
from agents.zoo import main as zoo
from agents.zoo.algorithms import TokenMaskablePPO, TokenPPO
from tests.helpers.command import ROOT
from tests.helpers.training import tiny_agent, tiny_config, tiny_env
from textenv import demo
from textenv.lanes.rendering import picture
from textenv.tasks.demo import Demo
from textenv.text.named_tokenizer import WordTokenizer, read_tokenizer

REAL = pytest.mark.library
CONFIGS = sorted((ROOT / "examples" / "zoo").glob("*.yml"))
DEMO = "textenv/Demo-v0"


def lm(**kwargs):
    return tiny_config(vocab_size=len(read_tokenizer("demo")), **kwargs)


def dummy(n_envs=4, **kwargs):
    """Return environments as rl_zoo3 makes them: one by one, each in a Monitor."""
    return make_vec_env(lambda **options: gymnasium.spec(DEMO).make(**options), n_envs, seed=0, env_kwargs=kwargs)


# Environments of plain values


def test_an_environment_is_made_of_plain_values_and_registered_on_import():
    code = f"import textenv, gymnasium, sys; gymnasium.spec({DEMO!r}); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr
    kwargs = yaml.safe_load("{max_new_tokens: 3, banned: [but, great], prompts: [this phone is], seed: 1}")
    env = gymnasium.make(DEMO, **kwargs)
    env.reset(seed=0)
    allowed = env.unwrapped.action_masks()
    tokenizer = env.unwrapped.tokenizer
    assert [tokenizer.words[i] for i in np.flatnonzero(~allowed) if i > 1] == ["but", "great"]


def test_a_tokenizer_by_folder(tmp_path):
    word_tokenizer(["good", "film"]).save_pretrained(tmp_path / "words")
    env = gymnasium.make(
        "textenv/Text-v0", prompts=["good"], tokenizer=str(tmp_path / "words"), reward={"name": "length", "target": 2}
    )
    assert env.action_space.n == 4
    assert gymnasium.make("textenv/Dates-v0", tokenizer=str(tmp_path / "words")).action_space.n == 4
    with pytest.raises(
        ValueError, match=r"Expected 'demo' or a tokenizer's name, folder or GGUF file, got '.*nowhere'"
    ):
        read_tokenizer(str(tmp_path / "nowhere"))


def test_the_reward_is_the_mood_of_the_whole_review_at_its_end():
    env = Demo(prompts=["this phone is"], max_new_tokens=4)
    env.reset(seed=0)
    ids = env.tokenizer.encode("great but awful .")
    rewards = [env.step(token)[1] for token in ids]
    assert rewards == [0.0, 0.0, 0.0, 0.5]


# Rendering


def test_human_prints_what_a_terminal_may_show_and_rgb_array_draws_it(capsys):
    words = ["\x1b[2Jx", "film"]
    env = gymnasium.make(
        "textenv/Text-v0", prompts=["film"], tokenizer=WordTokenizer(words), reward={"name": "length", "target": 2}
    )
    env.unwrapped.render_mode = "human"
    env.reset()
    env.step(2)
    assert capsys.readouterr().out.splitlines()[-1] == r"film | \x1b[2Jx"
    drawn = gymnasium.make(DEMO, render_mode="rgb_array", prompts=["this phone is"])
    drawn.reset()
    first = drawn.render()
    drawn.step(drawn.unwrapped.tokenizer.encode("great")[0])
    second = drawn.render()
    assert first.shape == second.shape == (360, 640, 3) and first.dtype == np.uint8
    assert (first != second).any() and np.array_equal(second, picture("this phone is | great"))
    with pytest.raises(ValueError, match=r"Expected `render_mode` to be one of .*, got 'movie'"):
        Demo(render_mode="movie")


def test_lanes_are_drawn_as_well():
    vec_env = TextVecEnv(Demo(render_mode="rgb_array"), 4)
    vec_env.reset()
    images = vec_env.get_images()
    assert len(images) == 4 and vec_env.render().shape == (720, 1280, 3)
    assert dummy(2, render_mode="rgb_array").render_mode == "rgb_array"


def test_a_long_text_is_drawn_to_its_end_and_no_line_leaves_the_picture():
    ink = lambda text: (picture(text) < 128).any(axis=2)  # noqa: E731
    for text in ("word " * 400, "W" * 300, "a\nb\n" * 30):
        dark = ink(text)
        assert dark.any() and not dark[:, -12:].any() and not dark[-8:].any()
    assert not np.array_equal(ink("word " * 400 + "end"), ink("word " * 400 + "fin"))
    assert np.array_equal(ink("one two"), ink("one two"))


# Policies


def test_the_policy_swallows_what_a_search_gives_to_every_policy():
    kwargs = {"lm": lm(), "net_arch": {"pi": [64], "vf": [64]}, "activation_fn": nn.Tanh}
    model = PPO(LMPolicy, dummy(2), n_steps=4, batch_size=4, policy_kwargs=kwargs, device="cpu", seed=0)
    plain = PPO(LMPolicy, dummy(2), n_steps=4, batch_size=4, policy_kwargs={"lm": lm()}, device="cpu", seed=0)
    shapes = [[tuple(weight.shape) for weight in agent.policy.parameters()] for agent in (model, plain)]
    assert shapes[0] == shapes[1]
    model.learn(8)


# Algorithms by name


def test_token_ppo_is_what_make_agent_makes():
    settings = {"learning_rate": 1e-2, "seed": 0, "device": "cpu"}
    ours = TokenPPO(LMPolicy, dummy(8, max_new_tokens=6), policy_kwargs={"lm": lm()}, **settings)
    theirs = make_agent(Demo(max_new_tokens=6), lm(), n_envs=8, **settings)
    for name in ("n_steps", "batch_size", "n_epochs", "gamma", "vf_coef", "normalize_advantage", "max_grad_norm"):
        assert vars(ours)[name] == vars(theirs)[name], name
    assert isinstance(ours.rollout_buffer, SequenceRolloutBuffer) and ours.rollout_buffer.normalize_advantage
    before = ours.policy.lm.backbone.model.get_input_embeddings().weight.clone()
    ours.learn(48)
    theirs.learn(48)
    pairs = zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True)
    assert all((one == other).all() for one, other in pairs)
    assert (ours.policy.lm.backbone.model.get_input_embeddings().weight != before).any()


@pytest.mark.filterwarnings("ignore:.*sequences in")
def test_token_ppo_loads_and_trains_on(tmp_path):
    env = dummy(4, max_new_tokens=4, score_at="rollout_end")
    model = TokenPPO(LMPolicy, env, n_minibatches=2, policy_kwargs={"lm": lm()}, device="cpu", seed=0).learn(16)
    assert model.batch_size == 8
    model.save(tmp_path / "model.zip")
    again = TokenPPO.load(tmp_path / "model.zip", env=dummy(4, max_new_tokens=4, score_at="rollout_end"), device="cpu")
    assert isinstance(again.get_env(), TextVecEnv) and again.batch_size == 8
    assert all((one == other).all() for one, other in zip(model.policy.parameters(), again.policy.parameters()))
    again.learn(16)


def test_token_maskable_ppo_writes_nothing_that_is_banned():
    banned = sorted(demo.POSITIVE)[:20]
    env = dummy(8, max_new_tokens=6, banned=banned)
    model = TokenMaskablePPO(MaskableLMPolicy, env, policy_kwargs={"lm": lm()}, device="cpu", seed=0).learn(96)
    view = model.rollout_buffer.view()
    written = {env.envs[0].unwrapped.tokenizer.words[int(token)] for token in view.actions}
    assert len(written) > 10 and not written & set(banned)
    with pytest.raises(AttributeError, match="Expected `mask` to be given to Demo"):
        TokenMaskablePPO(MaskableLMPolicy, dummy(2), policy_kwargs={"lm": lm()})


def test_what_lanes_cannot_do_is_refused():
    with pytest.raises(TypeError, match=r"in no wrapper, got VecNormalize.*leave out --vec-env"):
        TokenPPO(LMPolicy, VecNormalize(dummy(2), norm_obs=False), policy_kwargs={"lm": lm()})
    with pytest.raises(ValueError, match=r"`n_minibatches` to divide n_steps \* n_envs = 8, got 3"):
        TokenPPO(LMPolicy, dummy(2, max_new_tokens=4), n_minibatches=3, policy_kwargs={"lm": lm()})
    model = TokenPPO(LMPolicy, TextVecEnv(tiny_env(), 4), policy_kwargs={"lm": tiny_config()}, device="cpu")
    assert model.batch_size == tiny_agent().batch_size


# The search


class FakeTrial:
    """A trial that draws one end of each range, and keeps the parameters that it was asked for."""

    def __init__(self, end):
        self.end, self.params = end, {}

    def suggest_float(self, name, low, high, *, log=False):
        assert 0 < low < high
        self.params[name] = (low, high)[self.end]
        return self.params[name]

    def suggest_categorical(self, name, choices):
        self.params[name] = choices[-self.end]
        return self.params[name]


@pytest.mark.filterwarnings("ignore:.*sequences in")
@pytest.mark.parametrize("end", [0, 1])
def test_what_a_search_draws_is_taken_by_the_algorithm(end):
    trial = FakeTrial(end)
    drawn = zoo.sample_token_ppo(trial, 0, 8, {})
    assert "policy_kwargs" not in drawn and drawn == zoo.convert_token_ppo(trial.params)
    assert 1e-6 <= drawn["learning_rate"] <= 2e-3 and 0.8 <= drawn["gae_lambda"] < 1
    model = TokenPPO(LMPolicy, dummy(8, max_new_tokens=4), policy_kwargs={"lm": lm()}, device="cpu", **drawn)
    model.learn(32)
    assert model.gamma == 1.0


def test_register_adds_to_the_tables_and_evaluations_sample(monkeypatch):
    made = {name: types.ModuleType(name) for name in ("rl_zoo3", "rl_zoo3.utils", "rl_zoo3.hyperparams_opt")}
    manager = made["rl_zoo3.exp_manager"] = types.ModuleType("rl_zoo3.exp_manager")

    class TrialEval(EvalCallback):
        def __init__(self, eval_env, trial, **kwargs):
            super().__init__(eval_env, **kwargs)
            self.trial = trial

    made["rl_zoo3.utils"].ALGOS, manager.EvalCallback, manager.TrialEvalCallback = {"ppo": PPO}, EvalCallback, TrialEval
    made["rl_zoo3.hyperparams_opt"].HYPERPARAMS_SAMPLER = {}
    made["rl_zoo3.hyperparams_opt"].HYPERPARAMS_CONVERTER = {}
    for name, module in made.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    zoo.register()
    assert list(made["rl_zoo3.utils"].ALGOS) == ["ppo", "token_ppo", "token_maskable_ppo"]
    assert made["rl_zoo3.hyperparams_opt"].HYPERPARAMS_SAMPLER.keys() == set(zoo.ALGORITHMS)
    assert made["rl_zoo3.hyperparams_opt"].HYPERPARAMS_CONVERTER["token_ppo"] is zoo.convert_token_ppo
    zoo.evaluate_samples(masked=True)
    env = dummy(1, banned=["but"])
    plain, trial = manager.EvalCallback(env, deterministic=True), manager.TrialEvalCallback(env, "trial")
    for callback in (plain, trial):
        assert isinstance(callback, MaskableEvalCallback) and not callback.deterministic and callback.use_masking
    assert isinstance(trial, TrialEval) and trial.trial == "trial"


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configurations_name_what_is_there(path):
    [(name, settings)] = yaml.safe_load(path.read_text()).items()
    module, _, policy = settings["policy"].rpartition(".")
    assert name == DEMO and issubclass(getattr(importlib.import_module(module), policy), LMPolicy)
    assert path.stem in ("ppo", *zoo.ALGORITHMS) and f"examples/zoo/{path.name}" in path.read_text()


def script(monkeypatch, name, called):
    """Put a fake rl_zoo3 module in place, whose function of the same name notes the command line."""
    module = types.ModuleType(f"rl_zoo3.{name}")
    setattr(module, name, lambda: called.append([name, *sys.argv]))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_the_first_word_is_the_script_and_the_others_are_its_own(monkeypatch):
    called, evaluated = [], []
    script(monkeypatch, "train", called)
    script(monkeypatch, "enjoy", called)
    monkeypatch.setattr(zoo, "register", lambda: None)
    monkeypatch.setattr(zoo, "evaluate_samples", lambda masked: evaluated.append(masked))
    for words in ("train --algo token_ppo -f logs", "enjoy --algo token_ppo --stochastic", "train --algo ppo"):
        monkeypatch.setattr(sys, "argv", ["zoo.py", *words.split()])
        zoo.main()
    assert called == [
        ["train", "agents.zoo train", "--algo", "token_ppo", "-f", "logs"],
        ["enjoy", "agents.zoo enjoy", "--algo", "token_ppo", "--stochastic"],
        ["train", "agents.zoo train", "--algo", "ppo"],
    ]
    assert evaluated == [False]  # `enjoy` has --stochastic for it, and plain PPO is left as rl_zoo3 has it
    for words in ([], ["--algo", "token_ppo"], ["play"]):
        monkeypatch.setattr(sys, "argv", ["zoo.py", *words])
        with pytest.raises(SystemExit, match=r"Expected `python -m agents.zoo train\|enjoy ...`, got"):
            zoo.main()


def test_enjoying_is_masked(monkeypatch, tmp_path):
    banned = sorted(demo.POSITIVE)[:20]
    model = TokenMaskablePPO(
        MaskableLMPolicy, dummy(2, banned=banned), policy_kwargs={"lm": lm()}, device="cpu", seed=0
    )
    model.save(tmp_path / "model.zip")
    enjoy = script(monkeypatch, "enjoy", [])
    enjoy.create_test_env, enjoy.ALGOS = dummy, {}
    zoo.enjoy_masked()
    env = enjoy.create_test_env(4, banned=banned)
    masked = enjoy.ALGOS["token_maskable_ppo"].load(tmp_path / "model.zip", device="cpu", seed=0)
    unmasked = TokenMaskablePPO.load(tmp_path / "model.zip", device="cpu", seed=0)
    words, written = env.envs[0].unwrapped.tokenizer.words, {}
    for agent in (masked, unmasked):
        observations, taken = env.reset(), set()
        for _ in range(60):
            actions, _ = agent.predict(observations, deterministic=False)
            taken |= {words[action] for action in actions}
            observations = env.step(actions)[0] if agent is masked else env.reset()
        written[agent] = taken
    assert len(written[masked]) > 10 and not written[masked] & set(banned)
    assert written[unmasked] & set(banned)  # the control: plain rl_zoo3 passes no mask


def episodes(folder):
    """Return the reward and length of each episode in a folder's monitor files, sorted."""
    texts = [path.read_text().splitlines()[1:] for path in folder.glob("*.monitor.csv")]
    return sorted((float(row["r"]), int(row["l"])) for lines in texts for row in csv.DictReader(lines))


@pytest.mark.parametrize("score_at", ["step", "rollout_end"])
def test_the_monitors_of_lanes_have_a_row_an_episode(score_at, tmp_path):
    kwargs = {"max_new_tokens": 4, "score_at": score_at}
    make = gymnasium.spec(DEMO).make
    env = make_vec_env(lambda **options: make(**options), 4, seed=0, monitor_dir=str(tmp_path), env_kwargs=kwargs)
    model = TokenPPO(LMPolicy, env, n_steps=16, policy_kwargs={"lm": lm()}, device="cpu", seed=0)
    seen = []
    model.learn(128, callback=lambda local, _: seen.extend(i for i in local["infos"] if "episode" in i) or True)
    wanted = sorted((info["episode"]["r"], info["episode"]["l"]) for info in seen)
    assert np.allclose(episodes(tmp_path), wanted) and len(wanted) >= 32 and wanted[-1][0] > 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{lane}.monitor.csv" for lane in range(4)}


# Real runs of rl_zoo3


def train(tmp_path, algorithm, *words):
    small = ["n_envs:2", "batch_size:64"] if algorithm == "ppo" else ["n_envs:8", "n_minibatches:1"]
    config = str(ROOT / "examples" / "zoo" / f"{algorithm}.yml")
    return run(
        *(tmp_path, "train", algorithm, "--conf-file", config, "-n", "128", "--seed", "0", "--eval-episodes", "8"),
        *(*words, "-params", *small, "n_steps:32"),
    )


def run(tmp_path, script, algorithm, *words):
    module = [f"rl_zoo3.{script}"] if algorithm == "ppo" else ["agents.zoo", script]
    command = [sys.executable, "-m", *module, "--algo", algorithm, "--env", DEMO, "--gym-packages", "textenv"]
    command += ["-f", "logs", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@REAL
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "token_ppo", "token_maskable_ppo"])
def test_rl_zoo3_trains_evaluates_resumes_and_enjoys(algorithm, tmp_path):
    pytest.importorskip("rl_zoo3", reason="rl_zoo3 is not installed")
    mask = ["--env-kwargs", "banned:['but']"] if algorithm == "token_maskable_ppo" else []
    said = train(tmp_path, algorithm, "--eval-freq", "64", *mask)
    assert "Eval num_timesteps=" in said and "Saving to" in said
    saved = next((tmp_path / "logs" / algorithm).glob("textenv-Demo-v0_1/textenv-Demo-v0.zip"))
    assert len(episodes(saved.parent)) >= 8
    assert "Loading pretrained agent" in train(tmp_path, algorithm, "--trained-agent", str(saved), *mask)
    one_prompt = ["--env-kwargs", "prompts:['our old radio was']"]  # the mask comes from the saved run's settings
    greedy = rewards(run(tmp_path, "enjoy", algorithm, "-n", "120", "--no-render", *one_prompt))
    sampled = rewards(said := run(tmp_path, "enjoy", algorithm, "-n", "300", "--stochastic", *one_prompt))
    assert len(greedy) >= 4 and len(set(greedy)) == 1 and len(set(sampled)) > 1
    assert "our old radio was | " in said
    if mask:
        assert "but" not in said.split()


def rewards(said):
    return [float(line.removeprefix("Episode Reward:")) for line in said.splitlines() if line.startswith("Episode R")]


@REAL
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", sorted(zoo.ALGORITHMS))
def test_the_trials_of_a_search_differ(algorithm, tmp_path):
    pytest.importorskip("rl_zoo3", reason="rl_zoo3 is not installed")
    mask = ["--env-kwargs", "banned:['but']"] if algorithm == "token_maskable_ppo" else []
    said = train(tmp_path, algorithm, "-optimize", "--n-trials", "3", "--no-optim-plots", *mask)
    values = [float(value) for value in re.findall(r"finished with value: ([\d.]+)", said)]
    assert len(values) == 3 and len(set(values)) > 1 and max(values) < 1
    assert "gamma" not in said and "net_arch" not in said and "Writing report" in said
