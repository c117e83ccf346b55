"""What the doctor's tests share: a healthy agent, a broken model, and how a report is asked."""

from transformers import AutoModelForCausalLM

from agents import Report
from agents.doctor import examine as doctor
from agents.doctor.sample import Subject
from tests.helpers.models import tiny
from tests.helpers.training import tiny_agent, tiny_env

LONG = {"prompts": ("abcdefgh", "ab", "cde"), "max_new_tokens": 4}


class Broken:
    """A spec of a model with something wrong in it."""

    def __init__(self, break_it, config=None):
        self.break_it, self.config = break_it, config

    def build(self):
        model = AutoModelForCausalLM.from_config(self.config or tiny())
        self.break_it(model)
        return model


def agent(lm=None, env=None, n_envs=8, **kwargs):
    """What passes every check, unless told otherwise; its weights are large, so that nothing agrees by chance."""
    return tiny_agent(env or tiny_env(**LONG), n_envs=n_envs, lm=lm or tiny(), **{"learning_rate": 1e-3, **kwargs})


def one(name, model, env=None):
    """The report of one check of settings, or of the reward; `doctor.check` runs them all."""
    subject = Subject(model.policy, env or model.get_env().env, model)
    (check,) = [check for check in doctor.SETTING_CHECKS if check.__name__ == f"check_{name}"]
    return Report(tuple(check(subject)))


def statuses(report, status):
    return {finding.name for finding in report.findings if finding.status == status}


def assert_names(report, name, status, *words):
    """The report names the check with that status, and says the words in measurement, cause or cure."""
    found = [finding for finding in report.findings if finding.name == name and finding.status == status]
    assert found, str(report)
    assert found[0].cause and found[0].cure
    for word in words:
        assert any(word in str(finding) for finding in found), str(report)
