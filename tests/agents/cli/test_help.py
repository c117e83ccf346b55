"""The help of the command and of its verbs: groups by what a person wants to do, which hold each argument once."""

from collections import Counter
from itertools import chain

import pytest
from jsonargparse import ArgumentParser

from agents.cli.arguments import make_parser
from agents.cli.help_groups import GROUPS, VERB_GROUPS, overview, regroup
from agents.cli.main import VERBS
from agents.cli.options import RateConfig, StageConfig

LONG = [name for name, verb in VERBS.items() if verb.config and issubclass(verb.config, tuple(GROUPS))]


def parser_of(name):
    verb = VERBS[name]
    return make_parser(name, verb.usage, verb.config, verb.options)


def groups_of(parser):
    """Return the arguments by the title of their group, without empty groups."""
    groups = {group.title: [action.dest for action in group._group_actions] for group in parser._action_groups}
    return {title: dests for title, dests in groups.items() if dests}


def test_every_verb_is_in_one_group_of_the_overview():
    assert Counter(chain(*VERB_GROUPS.values())) == Counter(list(VERBS))


@pytest.mark.parametrize("width", [80, 120])
def test_the_overview_is_as_wide_as_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = overview(VERBS).splitlines()
    assert width - 15 < max(map(len, lines)) < width
    assert "use a model:" in lines and "  chat          chat with a model in the terminal" in lines


@pytest.mark.parametrize("verb", LONG)
def test_every_argument_of_a_long_help_is_in_one_of_its_groups(verb):
    parser = parser_of(verb)
    (table,) = (table for kind, table in GROUPS.items() if issubclass(VERBS[verb].config, kind))
    groups = groups_of(parser)
    assert list(groups) == [title for title in table if title in groups]  # no others, in this order
    assert Counter(chain(*groups.values())) == Counter(action.dest for action in parser._actions)


def test_the_groups_name_arguments_that_exist():
    for kind, table in GROUPS.items():
        parsers = [parser_of(name) for name in LONG if issubclass(VERBS[name].config, kind)]
        known = {action.dest for parser in parsers for action in parser._actions}
        assert set(chain(*table.values())) - known == set()


def test_a_group_takes_its_arguments_from_several_sections():
    groups = groups_of(parser_of("train"))
    assert groups["choose the critic, and how it learns"] == [
        "model.critic",
        "model.critic_model",
        "model.value_norm",
        "model.critic_lr_scale",
        "algorithm.critic_lambda",
        "algorithm.critic_warmup",
    ]
    assert groups["choose the model, and the weights that learn"][:2] == ["model", "model.name"]


def test_a_short_help_is_left_as_it_is():
    assert list(groups_of(parser_of("show"))) == ["positional arguments", "options", "only on the command line"]


@pytest.mark.parametrize(
    ("kind", "argument", "title"),
    [
        (StageConfig, "--data", "choose the data"),
        (RateConfig, "--data", "options"),  # in no group: it stays where it was
    ],
)
def test_an_argument_that_no_group_names_is_kept(kind, argument, title):
    parser = ArgumentParser()
    parser.add_argument(argument)
    regroup(parser, kind)
    assert argument.strip("-") in groups_of(parser)[title]
