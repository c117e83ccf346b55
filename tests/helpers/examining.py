"""Helpers for the doctor's tests: a healthy agent, broken models, and reports of single checks."""

from transformers import AutoModelForCausalLM

from agents import Report
from agents.doctor import examine as doctor
from agents.doctor.sample import Subject
from tests.helpers.models import tiny
from tests.helpers.training import tiny_agent, tiny_env

LONG = {"prompts": ("abcdefgh", "ab", "cde"), "max_new_tokens": 4}


class Broken:
    """A model spec whose `build` breaks the model by a given function."""

    def __init__(self, break_it, config=None):
        self.break_it, self.config = break_it, config

    def build(self):
        model = AutoModelForCausalLM.from_config(self.config or tiny())
        self.break_it(model)
        return model


def agent(lm=None, env=None, n_envs=8, **kwargs):
    """Return an agent that passes every check by default; its weights are large, so that nothing agrees by chance."""
    return tiny_agent(env or tiny_env(**LONG), n_envs=n_envs, lm=lm or tiny(), **{"learning_rate": 1e-3, **kwargs})


def one(name, model, env=None):
    """Return the report of a single check of settings or of the reward; `doctor.check` runs all checks."""
    subject = Subject(model.policy, env or model.get_env().env, model)
    (check,) = [check for check in doctor.SETTING_CHECKS if check.__name__ == f"check_{name}"]
    return Report(tuple(check(subject)))


def statuses(report, status):
    return {finding.name for finding in report.findings if finding.status == status}


def assert_names(report, name, status, *words):
    """Assert that a report has a finding of that name and status, and the words in measurement, cause or cure."""
    matching = [finding for finding in report.findings if finding.name == name and finding.status == status]
    assert matching, str(report)
    assert matching[0].cause and matching[0].cure
    for word in words:
        assert any(word in str(finding) for finding in matching), str(report)
