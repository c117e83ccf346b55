"""The doctor: healthy models pass, training is the same with and without it, and each check can fail."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from stable_baselines3 import A2C
from torch.nn import functional

from agents import DoctorError, Finding, KLPenalty, Report, make_agent
from agents.doctor import examine as doctor
from agents.doctor import model_checks, setting_checks, trial_checks
from agents.doctor.sample import Subject
from tests.helpers.examining import LONG, Broken, agent, assert_names, statuses
from tests.helpers.models import FAMILIES, tiny
from tests.helpers.training import run_state, tiny_config, tiny_env

# Healthy models.


FEW = ("gpt2", "llama", "gemma2", "mamba")  # learned positions, rotary ones, a soft cap, no cache


@pytest.mark.parametrize(
    "family", [*FEW, *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family not in FEW)]
)
@pytest.mark.filterwarnings("ignore:.*does not decode exactly from cached")
def test_healthy_models_pass(family):
    report = doctor.check(agent(tiny(family)))
    assert report.ok and not report.warnings, str(report)
    assert statuses(report, "skipped") == ({"cache"} if family == "mamba" else set())
    assert len(report.findings) == len(doctor.SETTING_CHECKS) + len(doctor.MODEL_CHECKS)


def test_a2c_and_a_policy_with_its_env_pass():
    model = agent(algorithm=A2C)
    assert doctor.check(model).ok
    report = doctor.check(model.policy, model.get_env().env)
    assert report.ok and statuses(report, "skipped") == {"discount", "learning rate", "batches"}


def test_what_cannot_be_examined_is_refused():
    with pytest.raises(ValueError, match="Expected the env that the policy acts in"):
        doctor.check(agent().policy)
    with pytest.raises(TypeError, match="Expected a model with an LMPolicy"):
        doctor.check(A2C("MlpPolicy", "CartPole-v1", device="cpu"))


@pytest.mark.parametrize(("max_new_tokens", "score_at"), [(1, "rollout_end"), (2, "step"), (40, "done")])
def test_envs_of_other_shapes_pass(max_new_tokens, score_at):
    env = tiny_env(prompts=("a",), max_new_tokens=max_new_tokens, score_at=score_at)
    assert doctor.check(agent(env=env)).ok


def test_half_precision_passes_within_its_tolerance():
    assert doctor.check(agent(policy_kwargs={"autocast": "bfloat16"}, lm=tiny_config())).ok


def test_every_check_is_run():
    modules = (setting_checks, model_checks, trial_checks)
    written = {name for module in modules for name in vars(module) if name.startswith("check_")}
    assert written == {check.__name__ for check in (*doctor.SETTING_CHECKS, *doctor.MODEL_CHECKS)}


# The doctor leaves no trace.


@pytest.mark.parametrize("value_norm", [None, "popart"])
def test_training_is_the_same_with_and_without(value_norm):
    states = []
    for check in (False, True):
        model = agent(check=check, policy_kwargs={"value_norm": value_norm})
        model.learn(3 * 32)
        states.append(run_state(model))
    assert states[0] == states[1]


@pytest.mark.parametrize("value_norm", [None, "norm"])
def test_a_trained_model_is_left_as_it_was(value_norm):
    model = agent(
        env=tiny_env(lambda prompt, preds, done: 1e3 * len(preds), **LONG), policy_kwargs={"value_norm": value_norm}
    )
    model.learn(2 * 32)
    before, modes = run_state(model), [module.training for module in model.policy.modules()]
    gradients = [weight.grad for weight in model.policy.parameters()]
    caches = model.policy.lm.rollout_cache, model.policy.lm.predict_cache
    env_state = model.get_env().env.np_random.bit_generator.state
    assert doctor.check(model).ok
    assert run_state(model) == before
    assert modes == [module.training for module in model.policy.modules()]
    assert all(a is b for a, b in zip(gradients, [weight.grad for weight in model.policy.parameters()]))
    assert caches == (model.policy.lm.rollout_cache, model.policy.lm.predict_cache)
    assert model.get_env().env.np_random.bit_generator.state == env_state


def test_a_model_that_raises_is_left_as_it_was():
    def raises_on_whole_texts(model):
        def hook(module, inputs):
            if inputs[0].shape[1] > 8:  # whole texts, which the update reads; a rollout reads shorter prompts
                torch.rand(3)
                raise RuntimeError("no gradient for you")

        model.transformer.h[0].register_forward_pre_hook(hook)

    model = agent(Broken(raises_on_whole_texts))
    before = torch.get_rng_state()
    report = doctor.check(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert_names(report, "ratio", "failed", "no gradient for you")


def test_make_agent_raises_naming_what_failed():
    with pytest.raises(DoctorError, match=r"(?s)failures of reward.*finite number") as error:
        make_agent(tiny_env(lambda prompt, preds, done: np.nan), tiny(), n_envs=8, device="cpu", check=True)
    assert "cure:" in str(error.value)


def test_make_agent_warns_of_what_may_go_badly():
    with pytest.warns(UserWarning, match="learning rate: 1.0e-01"):
        agent(learning_rate=0.1, check=True)


# Each check can fail.


def hook_output(change):
    """Return a function that makes a model's last hidden state `change(module, output)`."""
    return lambda model: model.transformer.ln_f.register_forward_hook(lambda module, inputs, out: change(module, out))


def test_a6_dropout_by_a_function_is_named():
    # Only on longer sequences: the probe at a policy's construction would refuse the model.
    broken = Broken(hook_output(lambda module, out: functional.dropout(out, 0.3 if out.shape[1] > 5 else 0.0)))
    report = doctor.check(agent(broken))
    assert_names(report, "dropout", "failed", "draws random numbers")
    assert "ratio" in statuses(report, "failed")


def test_b1_a_model_that_sees_padding_is_named():
    # Only on longer sequences: the probe at a policy's construction has four tokens and would refuse the model.
    broken = Broken(hook_output(lambda module, out: out if out.shape[1] < 6 else out - out.mean(dim=1, keepdim=True)))
    assert_names(doctor.check(agent(broken)), "padding", "failed", "not causal")


def test_a7_a_cache_that_lies_is_named():
    def lies_after_a_while(model):
        def hook(module, args, kwargs, output):
            if kwargs.get("use_cache") and output[0].shape[1] == 1 and kwargs["position_ids"].max() > 5:
                output.last_hidden_state = output.last_hidden_state * 1.5
            return output

        model.base_model.register_forward_hook(hook, with_kwargs=True)

    report = doctor.check(agent(Broken(lies_after_a_while)))
    assert_names(report, "cache", "failed", "cache=False")
    assert "ratio" in statuses(report, "failed") and "padding" in statuses(report, "ok")
    report = doctor.check(agent(Broken(lies_after_a_while), policy_kwargs={"cache": False}))
    assert report.ok and "cache" in statuses(report, "skipped")


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_a_head_wrongly_taken_for_linear_is_named(family):
    # Fresh weights give small logits, which a soft cap of 50 hardly changes.
    options = {"initializer_range": 0.02, "final_logit_softcapping": 50.0} if family == "gemma2" else {}
    model = agent(tiny(family, **options))
    assert not model.policy.lm.backbone.head_is_linear
    model.policy.lm.backbone.head_is_linear = True
    assert_names(doctor.check(model), "head", "failed", "scales, shifts or caps")


def test_c2_another_reference_is_named():
    model = agent()
    KLPenalty(0.1).attach(model)
    assert doctor.check(model).ok
    KLPenalty(0.1, reference=agent(seed=1).policy.lm).attach(model)
    assert_names(doctor.check(model), "divergence", "failed", "another model")


def test_weights_that_cannot_learn_are_named():
    frozen = Broken(lambda model: model.requires_grad_(False))
    assert_names(doctor.check(agent(frozen)), "weights", "failed", "frozen")
    model = agent()
    model.policy.lm.critic.linear = torch.nn.Linear(16, 1)
    assert_names(doctor.check(model), "weights", "failed", "not in the optimizer")


def test_weights_of_16_bits_are_named():
    model = agent(policy_kwargs={"autocast": "bfloat16"})
    model.policy.lm.backbone.model.to(torch.bfloat16)
    assert_names(doctor.check(model), "weights", "failed", "16 bits")


def test_weights_that_are_not_numbers_are_named():
    model = agent()
    model.policy.lm.backbone.model.transformer.ln_f.weight.data.fill_(torch.nan)
    assert_names(doctor.check(model), "rollout", "failed")


# Time and memory, by hand.


def test_the_time_of_an_iteration(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(trial_checks.time, "perf_counter", lambda: float(next(clock)))
    (finding,) = [finding for finding in doctor.check(agent(n_epochs=2)).findings if finding.name == "time"]
    # Each timed call takes 1 s. Rollout: 4 decode steps and a prefill. Update: 2 epochs of 8 rows, 1 s for 4 rows.
    assert "decode 1000.00 ms a step of 8 rows, prefill 1000.0 ms, update 62.500 ms a token" in finding.measured
    assert "about 9 s an iteration (5 rollout, 4 update)" in finding.measured


def test_the_memory_of_training():
    model = agent(policy_kwargs={"optimizer_class": torch.optim.AdamW})
    n_weights = sum(weight.numel() for weight in model.policy.parameters())
    (finding,) = [finding for finding in doctor.check(model).findings if finding.name == "memory"]
    columns = 8 + 4  # the longest prompt and the completion
    mib = {
        "weights": 4 * n_weights,
        "gradients": 4 * n_weights,
        "optimizer": 8 * n_weights,
        "keys and values": 2 * 2 * 16 * 4 * 8 * columns,  # layers, keys and values, width, bytes, rows, columns
        "kept prompts": 2 * 2 * 16 * 4 * 8 * columns // 4,  # as many as a quarter of the rows' columns hold
        "logits": 3 * 4 * 8 * 4 * 33,  # copies, bytes, rows, tokens a row, vocabulary
    }
    for name, size in mib.items():
        assert f"{name} {size / 2**20:.3g} MiB" in finding.measured
    assert finding.measured.startswith(f"{sum(mib.values()) / 2**20:.3g} MiB")


def spied_trial(samples_per_prompt):
    """Return what the trial of time says of 8 rows and the tokens that its forwards read: prefill and update."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    prompts = [(letters[i:] + letters)[:24] for i in range(8)]
    env = tiny_env(prompts=prompts, max_new_tokens=4, samples_per_prompt=samples_per_prompt)
    model = agent(env=env)
    read = []
    model.policy.backbone.model.transformer.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    subject = Subject(model.policy, env, model)
    with doctor.undisturbed(model.policy, env):
        prefill = trial_checks._time_decoding(subject, 8)[0]
        n_prefill = model.policy.lm.rollout_cache.prefill_tokens
    read.clear()
    with doctor.undisturbed(model.policy, env):
        update = trial_checks._time_update(subject)
    n_update = sum(read) // 2  # it is done twice
    (finding,) = trial_checks.check_time(subject, None)
    return finding.measured, (n_prefill, n_update), (prefill.is_read, update.is_read)


def test_the_timed_rows_share_prompts_as_those_of_training():
    """Prompts of 24 tokens, of which the prefill reads 23, and 4 more, of which the update reads 3."""
    whole, read, shares = spied_trial(1)
    assert read == (8 * 23, 4 * (24 + 3)) and shares == (1.0, 1.0) and "samples" not in whole
    grouped, read, shares = spied_trial(4)
    assert read == (2 * 23, 24 + 4 * 3) and shares == (0.25, 36 / (4 * 27))
    said = "each prompt is read once for its 4 samples: 25% of the tokens of the prefill and 33% of the tokens of the"
    assert f"{said} update are read" in grouped


def groups_of_update(samples_per_prompt, batch_size, prompt_tokens):
    env = tiny_env(samples_per_prompt=samples_per_prompt)
    model = agent(env=env, n_steps=8, batch_size=batch_size)
    return trial_checks._update_groups(Subject(model.policy, env, model), prompt_tokens)


@pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")
def test_the_timed_update_shares_where_that_of_training_does():
    """Sharing begins at 64 tokens, which a group of 4 with a prompt of 9 does not save, but three groups do."""
    assert groups_of_update(4, 64, 9) == (12, 4)
    assert groups_of_update(4, 32, 9) == (8, 4)  # a minibatch of 32 tokens has two groups of texts of 4
    assert groups_of_update(8, 16, 100) == (4, 4)  # or half of a group of 8
    assert groups_of_update(2, 64, 100) == (4, 2)
    assert groups_of_update(1, 64, 100) == (4, 1)


# The report.


def test_the_report_prints_plain_and_as_a_table():
    report = Report((Finding("reward", "failed", "[bold]nan", "it divides", "do not"), Finding("ratio", "ok", "0")))
    assert not report.ok and [finding.name for finding in report.failed] == ["reward"]
    plain = "failed  reward            [bold]nan\n" + " " * 26 + "cause: it divides\n" + " " * 26 + "cure: do not\n"
    assert str(report) == plain + "ok      ratio             0"
    file = io.StringIO()
    report.print(Console(file=file))
    assert file.getvalue() == f"{report}\n"
    file = io.StringIO()
    report.print(Console(file=file, force_terminal=True, width=100))
    assert "it divides" in file.getvalue() and "┃" in file.getvalue() and "[bold]nan" in file.getvalue()


def test_the_report_raises_on_demand():
    Report((Finding("ratio", "warning", "0"),)).raise_if_failed()
    with pytest.raises(DoctorError, match=r"(?s)failures of a, b:.*cause: why.*cure: how"):
        Report((Finding("a", "failed", "1", "why", "how"), Finding("b", "failed", "2"))).raise_if_failed()
