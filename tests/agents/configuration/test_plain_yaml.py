"""The bounds of a configuration file: few values after aliases are written out, few levels, few names in a list."""

from itertools import pairwise

import pytest

from tests.helpers.command import refused

LAUGHS = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefgh")]
MERGES = [f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}" for a, b in pairwise("abcdefgh")]
BEYOND = {
    "laughs": ("\n".join(["a: &a [x, x, x]", *LAUGHS]), "Expected at most 50,000 values"),
    "merges": ("\n".join(["a: &a {x: 1}", *MERGES]), "Expected at most 50,000 values"),
    "depth": ("env: " + "[" * 100_000, "at most 64 deep"),
    "itself": ("env: &a {args: *a}", "which contains itself"),
    "many names": (f"loggers: [{', '.join(['curves'] * 1001)}]", "at most 1,000 names in a list"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_configuration_beyond_the_bounds_is_refused_in_one_line(name, tmp_path, model, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    text, message = BEYOND[name]
    (tmp_path / "c.yml").write_text(text)
    err = refused(capfd, "train", "c.yml", "--model.name", model, "--device=cpu", "--out=run", "--quiet")
    assert message in " ".join(err.split()), err
    assert err.startswith("textenv: ")
