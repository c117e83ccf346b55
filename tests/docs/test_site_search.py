"""The search of the site in a browser, from files: it finds Chinese words, and pages in both languages."""

import shutil

import pytest

from tests.helpers.browsing import Browser, need_browser
from tests.helpers.command import ROOT

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of a site that has the Chinese pages and one English one, with the search of mkdocs.yml."""
    pytest.importorskip("jieba", reason='needs jieba: pip install "textenv[docs]"')
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason='needs mkdocs: pip install "textenv[docs]"')
    from mkdocs.config import load_config
    from mkdocs.utils.yaml import yaml_load

    folder = tmp_path_factory.mktemp("site")
    for part in ("zh", "assets"):
        shutil.copytree(ROOT / "docs" / part, folder / "docs" / part)
    shutil.copy(ROOT / "docs/concepts.md", folder / "docs/index.md")
    settings = yaml_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))  # mkdocs' own: it knows the tag !ENV
    for key in ("hooks", "nav", "validation"):
        del settings[key]
    settings["plugins"] = [plugin for plugin in settings["plugins"] if plugin == "offline" or "search" in plugin]
    settings["site_dir"] = str(folder / "built")
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    mkdocs.build(load_config(str(folder / "mkdocs.yml")))
    return folder / "built"


@pytest.fixture(scope="module")
def browser():
    need_browser()
    visitor = Browser()
    yield visitor
    visitor.close()


def titles_found(browser, site, words):
    """Type words into the search, and return the titles of the pages that it finds."""
    browser.driver.get((site / "zh/index.html").as_uri())
    browser.run("document.querySelector('.md-search__input').focus()")
    browser.one(".md-search__input").send_keys(words)
    browser.until(lambda: "match" in browser.texts(".md-search-result__meta")[0], "the search to answer")
    return [title.replace("\u200b", "") for title in browser.texts(".md-search-result__article h1")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # jieba's and the theme's
def test_the_search_finds_chinese_and_english_words_from_files(browser, site):
    assert titles_found(browser, site, "奖励函数")[0] == "自定义奖励"
    assert "人类反馈" in titles_found(browser, site, "打分")
    assert titles_found(browser, site, "价值网络") == ["textenv"]
    assert titles_found(browser, site, "gradient flows") == ["Concepts"]
    assert titles_found(browser, site, "咖啡") == []
    assert browser.complaints() == []
