"""The doctor's cures: each piece of advice can be followed, and the finding is gone afterwards."""

import ast
import dataclasses
import re

import pytest
import torch
import yaml
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from torch import nn
from torch.nn import functional

from agents import KLPenalty, LMPolicy, LoRA, Pretrained, Report, SequenceRolloutBuffer, TextVecEnv, word_tokenizer
from agents.doctor import examine as doctor
from agents.doctor import setting_checks
from agents.doctor.sample import Subject
from tests.agents.doctor.test_doctor_settings import OpeningTokenizer
from tests.helpers.command import ROOT
from tests.helpers.examining import LONG, Broken, agent
from tests.helpers.models import tiny
from tests.helpers.training import tiny_env
from textenv import CharTokenizer, TextEnv

MODULES = ("examine", "model_checks", "setting_checks", "trial_checks")
MESSAGES = [{"role": "user", "content": "hello"}]


def no_reward(prompt, preds, done):
    return 0.0


def env_of(prompts, tokenizer, **kwargs):
    return TextEnv(prompts, tokenizer, **{"reward": no_reward, "max_new_tokens": 4, **kwargs})


def changed(change, model=None):
    """Apply a change to a built agent, healthy by default; return the agent."""
    model = model or agent()
    change(model)
    return model


def language_model(model):
    return model.policy.lm.backbone.model


def hooked(change):
    """Return a model spec whose last hidden state is `change(module, output)`."""
    return Broken(
        lambda model: model.transformer.ln_f.register_forward_hook(lambda module, inputs, out: change(module, out))
    )


def random_on_long_texts(share):
    """Return a change for `hooked`: dropout that ignores the mode, on texts too long for the probe to notice."""
    return lambda module, out: functional.dropout(out, share) if out.shape[1] > 5 else out


def lying_cache(model):
    def hook(module, args, kwargs, output):
        if kwargs.get("use_cache") and output[0].shape[1] == 1 and kwargs["position_ids"].max() > 5:
            output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    model.base_model.register_forward_hook(hook, with_kwargs=True)


def sees_padding(module, out):
    return out if out.shape[1] < 6 else out - out.mean(dim=1, keepdim=True)


def with_reference(**kwargs):
    model = agent()
    KLPenalty(0.1, **kwargs).attach(model)
    return model


def chatty(prompts):
    tokenizer = word_tokenizer(["user", "assistant", "hello", ":", "end"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} end{% endfor %}"
    return agent(tiny(eos_token_id=tokenizer.eos_token_id), env_of(prompts, tokenizer))


def stock(buffer):
    settings = {"n_steps": 4, "batch_size": 32, "rollout_buffer_class": buffer, "policy_kwargs": {"lm": tiny()}}
    return PPO(LMPolicy, TextVecEnv(tiny_env(), 8), normalize_advantage=False, device="cpu", **settings)


def stops_outside():
    env = tiny_env()
    env.rules = dataclasses.replace(env.rules, stop_ids=(99,))
    return agent(env=env)


def warped(model):
    config = language_model(model).generation_config
    config.temperature, config.top_k, config.repetition_penalty, config.no_repeat_ngram_size = 0.7, 5, 1.2, 2


def unwarped(model):
    warped(model)
    language_model(model).generation_config.no_repeat_ngram_size = None


SAMPLING = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2}
LONG_TEXTS = {"max_new_tokens": 64}
MODEL_FINDINGS = ("ratio", "rollout", "padding", "cache", "head", "dropout", "divergence", "weights")


def ends_at_7(model):
    language_model(model).generation_config.eos_token_id = [0, 7, 50256]  # 0 and 7 are tokens of the env, 50256 is not


def nan_weights(model):
    language_model(model).transformer.ln_f.weight.data.fill_(torch.nan)


def raises_on_whole_texts(module, out):
    if out.shape[1] > 8:  # a rollout reads shorter prompts
        raise RuntimeError("no gradient for you")
    return out


def repeats(model, size=2):
    language_model(model).generation_config.no_repeat_ngram_size = size


def few_positions(model):
    language_model(model).config.n_positions = 8


def in_16_bits(model):
    language_model(model).to(torch.bfloat16)


def frozen(model):
    model.requires_grad_(False)


def all_but_the_head_frozen(model):
    frozen(model)
    model.lm_head.requires_grad_(True)


def unlike_head(model):
    model.policy.lm.backbone.head_is_linear = True


def other_critic(model):
    model.policy.lm.critic.linear = nn.Linear(16, 1)


# The finding's name, words of its cure, a subject that has it, and subjects cured in each way that the words name.
CASES = [
    ("ratio", "cache=False", lambda: agent(Broken(lying_cache)), [
        lambda: agent(Broken(lying_cache), policy_kwargs={"cache": False})]),
    ("ratio", "Correct what the message names", lambda: agent(hooked(raises_on_whole_texts)), [agent]),
    ("rollout", "Correct what the message names", lambda: changed(nan_weights), [agent]),
    ("padding", "Use a causal language model", lambda: agent(hooked(sees_padding)), [agent]),
    ("cache", "cache=False", lambda: agent(Broken(lying_cache)), [
        lambda: agent(Broken(lying_cache), policy_kwargs={"cache": False})]),
    ("head", "Build the policy anew", lambda: changed(unlike_head, agent(tiny("cohere"))), [
        lambda: agent(tiny("cohere"))]),
    ("dropout", "Set the probability of that noise to 0", lambda: agent(hooked(random_on_long_texts(0.3))), [
        lambda: agent(hooked(random_on_long_texts(0.0)))]),
    ("divergence", "Give KLPenalty no reference", lambda: with_reference(reference=agent(seed=1).policy.lm), [
        with_reference]),
    ("weights", "Set requires_grad in the spec's build(), or pass policy_kwargs=dict(train=LoRA())", lambda: agent(
        Broken(frozen)), [
        lambda: agent(Broken(all_but_the_head_frozen)),
        lambda: agent(Broken(frozen), policy_kwargs={"train": LoRA()})]),
    ("weights", "autocast='bfloat16'", lambda: changed(in_16_bits, agent(policy_kwargs={"autocast": "bfloat16"})), [
        lambda: agent(policy_kwargs={"autocast": "bfloat16"})]),
    ("weights", "before the policy is built", lambda: changed(other_critic), [agent]),
    ("stop tokens", "Give the env stop_ids of this tokenizer", stops_outside, [
        lambda: agent(env=tiny_env(stop_ids=[0]))]),
    ("stop tokens", "stop_ids=[...] or stop_strings=[...]", lambda: agent(env=tiny_env(stop_ids=[])), [
        lambda: agent(env=tiny_env(stop_ids=[0])),
        lambda: agent(tiny(eos_token_id=None), tiny_env(stop_ids=[], stop_strings=["z"]))]),
    ("stop tokens", "Give the env stop_ids=[0, 7]", lambda: changed(ends_at_7), [
        lambda: changed(ends_at_7, agent(env=tiny_env(stop_ids=[0, 7])))]),
    ("stop tokens", "Give its config eos_token_id=0", lambda: agent(tiny(eos_token_id=50256)), [
        lambda: agent(tiny(eos_token_id=0))]),
    ("stop tokens", "Encode prompts without the end token", lambda: agent(env=tiny_env(prompts=[[1, 0]])), [
        lambda: agent(env=tiny_env(prompts=[[1]]))]),
    ("opening tokens", "Pass texts, or ids with the opening tokens once", lambda: agent(
        env=env_of([[1]], OpeningTokenizer())), [
        lambda: agent(env=env_of(["a"], OpeningTokenizer())),
        lambda: agent(env=env_of([[27, 1]], OpeningTokenizer()))]),
    ("generation config", "Pass policy_kwargs=dict(temperature=0.7, top_k=5, repetition_penalty=1.2)",
        lambda: changed(warped), [
        lambda: changed(unwarped, agent(policy_kwargs=SAMPLING))]),
    ("generation config", "to None in the generation_config", lambda: changed(repeats), [
        lambda: changed(lambda model: repeats(model, None), changed(repeats))]),
    ("chat template", "lists of messages", lambda: chatty(["hello"]), [lambda: chatty([MESSAGES])]),
    ("vocabulary", "Use the model's own tokenizer", lambda: (agent(), env_of(["a"], CharTokenizer("abc"))), [
        lambda: agent(tiny(), env_of(["a"], CharTokenizer("abc")))]),
    ("vocabulary", "Load model and tokenizer from the same checkpoint", lambda: agent(tiny(vocab_size=80)), [
        lambda: agent(tiny(vocab_size=33))]),
    ("positions", "Lower max_prompt_tokens or max_new_tokens", lambda: changed(few_positions), [
        lambda: agent(tiny(n_positions=8), tiny_env(**LONG, max_prompt_tokens=4, truncation_side="left")),
        lambda: agent(tiny(n_positions=9), tiny_env(**{**LONG, "max_new_tokens": 1}))]),
    ("prompts", "Raise max_prompt_tokens, or drop the long ones", lambda: agent(env=tiny_env(
        prompts=("abcd", "a"), max_prompt_tokens=2, truncation_side="left")), [
        lambda: agent(env=tiny_env(prompts=("abcd", "a"), max_prompt_tokens=4)),
        lambda: agent(env=tiny_env(prompts=("a",), max_prompt_tokens=2))]),
    ("discount", "Pass gamma=1.0", lambda: agent(env=tiny_env(**LONG_TEXTS), gamma=0.99), [
        lambda: agent(env=tiny_env(**LONG_TEXTS), gamma=1.0)]),
    ("learning rate", "1e-4 to 1e-3", lambda: agent(learning_rate=0.1), [
        lambda: agent(learning_rate=1e-3), lambda: agent(learning_rate=1e-4)]),
    ("learning rate", "1e-4 to 1e-3", lambda: agent(learning_rate=0.0), [lambda: agent(learning_rate=1e-4)]),
    ("batches", "Build with make_agent, or pass rollout_buffer_class=SequenceRolloutBuffer",
        lambda: stock(RolloutBuffer), [agent, lambda: stock(SequenceRolloutBuffer)]),
    ("batches", "Pass a divisor of n_steps * n_envs", lambda: agent(batch_size=7), [lambda: agent(batch_size=16)]),
    ("batches", "Pass batch_size=16 or more", lambda: agent(batch_size=8), [
        lambda: agent(batch_size=16), lambda: agent(batch_size=32)]),
    ("batches", "Raise n_envs, and batch_size with it", lambda: agent(n_envs=2), [
        lambda: agent(n_envs=4, batch_size=16)]),
    ("batches", "Raise n_envs.", lambda: agent(n_envs=2, algorithm=A2C), [lambda: agent(n_envs=4, algorithm=A2C)]),
    ("batches", "Pass normalize_advantage=False", lambda: agent(normalize_advantage=True), [
        lambda: agent(normalize_advantage=False)]),
    ("batches", "Pass n_steps=4, or rollout_buffer_kwargs=dict(complete_episodes=True)", lambda: agent(n_steps=2), [
        lambda: agent(n_steps=4), lambda: agent(n_steps=2, rollout_buffer_kwargs={"complete_episodes": True})]),
    ("reward", "Return a finite number", lambda: agent(env=tiny_env(lambda prompt, preds, done: None)), [
        lambda: agent(env=tiny_env(no_reward)), lambda: agent(env=tiny_env(lambda *_: {"part": 1.0}))]),
    ("reward", "Scale rewards to about -1 to 1", lambda: agent(env=tiny_env(lambda *_: 1e4)), [
        lambda: agent(env=tiny_env(lambda *_: 1e4 / 1e4))]),
]  # fmt: skip


def examine(name, subject):
    """Return the doctor's report on a subject; for a finding about settings, of the fast checks of settings alone."""
    model, *env = subject if isinstance(subject, tuple) else (subject,)
    if name in MODEL_FINDINGS:
        return doctor.check(model, *env)
    examined = Subject(model.policy, *(env or [model.get_env().env]), model)
    return Report(tuple(finding for check in doctor.SETTING_CHECKS for finding in doctor._run(check, examined)))


def cures(report, name):
    return [finding.cure for finding in report.findings if finding.name == name and finding.cure]


def params():
    for name, words, ill, cured in CASES:
        marks = [pytest.mark.slow] if name in MODEL_FINDINGS else []
        yield pytest.param(name, words, ill, cured, id=f"{name}: {words:.30}", marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "words", "ill", "cured"), list(params()))
def test_what_a_cure_says_is_accepted_and_helps(name, words, ill, cured):
    report = examine(name, ill())
    assert any(words in cure for cure in cures(report, name)), str(report)
    for healthy in cured:
        report = examine(name, healthy())
        assert not any(words in cure for cure in cures(report, name)), str(report)
        assert not report.failed, str(report)


def written_cures():
    """Return every cure in the doctor's source, with `{}` for each formatted value."""
    written = []
    for module in MODULES:
        tree = ast.parse((ROOT / "agents" / "doctor" / f"{module}.py").read_text())
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding" and len(node.args) == 5:
                    written += texts(node.args[4], function)
    return written


def texts(node, function):
    """Return the texts that an expression may have; a name has those that the function assigns to it."""
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)]
    if isinstance(node, ast.IfExp):
        return texts(node.body, function) + texts(node.orelse, function)
    if not isinstance(node, ast.Name):  # an entry of a table, which the test of learning rates covers
        return []
    nodes = [other for other in ast.walk(function) if isinstance(other, ast.Assign)]
    assigned = [other.value for other in nodes if names(other.targets[0]) == {node.id}]
    return [text for value in assigned for text in texts(value, function)]


def names(target):
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def test_every_cure_is_tried():
    cases = [words for _, words, *_ in CASES]
    written = written_cures()
    assert len(written) > 30
    parts = {cure: [part for part in cure.split("{}") if len(part) > 5] for cure in written}
    tried = [cure for cure in written if any(part in words or words in part for part in parts[cure] for words in cases)]
    assert [cure for cure in written if cure not in tried] == []


@pytest.mark.parametrize(("small", "usual"), [(10**7, "3e-4 to 4e-3"), (0, "1e-6 to 1e-5 is usual; 1e-4 for adapters")])
def test_only_a_model_that_has_a_language_forgets_it(small, usual, tmp_path, monkeypatch):
    monkeypatch.setattr(setting_checks, "SMALL_MODEL", small)
    fresh = agent(learning_rate=0.1)
    (finding,) = examine("learning rate", fresh).warnings
    assert "forgets" not in finding.cause and "Steps of this size" in finding.cause
    language_model(fresh).save_pretrained(tmp_path / "model")
    lm = Pretrained(str(tmp_path / "model"))
    (finding,) = examine("learning rate", agent(lm, learning_rate=0.1)).warnings
    assert "forgets its language" in finding.cause and usual in finding.cure
    for rate in re.findall(r"\de-\d", usual):
        assert not examine("learning rate", agent(lm, learning_rate=float(rate))).warnings


def test_no_ready_configuration_has_a_learning_rate_that_is_warned_of():
    paths = (ROOT / "examples" / "configs").glob("*.yml")
    algorithms = {path.stem: yaml.safe_load(path.read_text()).get("algorithm", {}) for path in paths}
    rates = {name: values["learning_rate"] for name, values in algorithms.items() if "learning_rate" in values}
    assert len(rates) >= 10
    most = setting_checks.USUAL_RATES["small"][
        0
    ]  # the large configurations train adapters, whose usual rates are as high
    assert [name for name, rate in rates.items() if rate > most] == []
