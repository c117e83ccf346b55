"""The guides for users of other libraries: their snippets run, and the steered prompt is steered."""

import ast
import re

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.docs.snippets import N_TOKENS, run_for_one_rollout, snippets
from tests.helpers.command import ROOT
from tests.helpers.models import seldom

EXAMPLES = ROOT / "examples"
PAGES = ["from_trl.md", "from_rl4lms.md", "from_openrl.md", "from_textrl.md"]
STEERING = "## Steering one prompt"


def page(name):
    return (EXAMPLES / name).read_text(encoding="utf-8")


def steering():
    """Return the two snippets of the page that make a model and steer it."""
    making, steering = snippets(page("from_textrl.md").partition(STEERING)[2].partition("\n## ")[0])
    return making, steering


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*sequences in", "ignore:.*WordNet")
@pytest.mark.parametrize("name", PAGES)
def test_the_snippets_of_a_page_run(hub, name):
    pytest.importorskip("nltk")
    text = page(name)
    head, _, rest = text.partition(STEERING)
    blocks = snippets(head)
    assert len(blocks) >= 2 and len(snippets(rest)) == 2 * (name == "from_textrl.md")
    names = run_for_one_rollout(blocks, name)
    assert names["model"].num_timesteps == names["model"].n_steps * names["model"].n_envs  # it trained on one rollout
    for folder in re.findall(r"^export\(.*?, \"([^\"]+)\"\)", "\n".join(blocks), flags=re.MULTILINE):
        kind = AutoModelForSeq2SeqLM if "t5" in folder else AutoModelForCausalLM
        assert kind.from_pretrained(hub / folder).config.vocab_size == N_TOKENS


@pytest.fixture(scope="module")
def fan(tmp_path_factory):
    """Run the page up to its model of favourable reviews; return the folder and the namespace."""
    folder, names = tmp_path_factory.mktemp("fan"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(
            "from transformers import AutoTokenizer\nfrom agents import make_agent\nfrom textenv import TextEnv", names
        )
        exec(compile(steering()[0], "from_textrl.md", "exec"), names)
    return folder, names


@pytest.mark.parametrize("seed", seldom(range(3)))
def test_one_prompt_is_steered(fan, monkeypatch, seed):
    folder, names = fan
    monkeypatch.chdir(folder)
    block = steering()[1]
    assert block.count("seed=0") == 1
    exec(compile(block.replace("seed=0", f"seed={seed}"), "from_textrl.md", "exec"), names)
    assert names["before"].figures["reward"].value <= 0.2
    assert names["after"].figures["reward"].value >= 0.8


@pytest.mark.parametrize("name", PAGES)
def test_every_import_of_a_page_works(name):
    imports = [
        node for node in ast.walk(ast.parse("\n".join(snippets(page(name))))) if isinstance(node, ast.ImportFrom)
    ]
    assert {node.module.partition(".")[0] for node in imports} >= {"agents", "textenv", "transformers"}
    for node in imports:
        exec(ast.unparse(node), {})
