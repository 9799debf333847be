"""The documentation site builds, and every link inside it leads to a page and a place on it."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest
from children import ROOT

from bitvae.cli import COMMANDS

pytestmark = pytest.mark.slow
LOADED = (".js", ".css", ".png", ".svg", ".woff2")


class Page(HTMLParser):
    "The links of a page and the places on it."

    def __init__(self, file):
        super().__init__()
        self.links, self.places, self.headings = [], set(), 0
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.headings += tag == "h1"
        self.places |= {attributes.get("id"), attributes.get("name")} - {None}
        for name in ("href", "src"):
            if attributes.get(name):
                self.links.append(attributes[name])


def broken_links(site, pages):
    "Return the links inside the site that lead nowhere."
    broken = []
    for file, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if target.startswith(("http:", "https:", "mailto:", "data:")) or file.name == "404.html":
                continue
            other = (file.parent / unquote(target)).resolve() if target else file
            if not other.exists() or anchor and other in pages and unquote(anchor) not in pages[other].places:
                broken.append(f"{file.relative_to(site)}: {link}")
    return broken


def test_site(tmp_path):
    "One test, so that parallel runs build the site once."
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("material", reason="needs the extra docs")
    site = (tmp_path / "site").resolve()
    line = [sys.executable, ROOT / "tools" / "docs.py", "--out", site]
    run = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    pages = {file: Page(file) for file in site.rglob("*.html")}
    assert not broken_links(site, pages)
    assert all(page.headings == 1 for file, page in pages.items() if file.name != "404.html")
    files = {link for page in pages.values() for link in page.links if link.endswith(LOADED)}
    assert not [file for file in files if file.startswith("http")]  # nothing is loaded from elsewhere

    notebooks = [file.relative_to(ROOT / "nbs") for file in (ROOT / "nbs").rglob("*.ipynb")]
    for file in notebooks:
        if ".ipynb_checkpoints" not in file.parts and file.name != "index.ipynb":
            assert site / "notebooks" / file.with_suffix(".html") in pages, file
    for module in (ROOT / "bitvae").glob("[a-z]*.py"):
        assert site / "api" / f"bitvae.{module.stem}.html" in pages, module
    api = (site / "api" / "bitvae.bits.html").read_text()
    assert "<code>fields</code></td>\n<td></td>\n<td>of <code>Bits</code>, such as" in api
    commands = (site / "commands.html").read_text()
    assert all(f">bitvae {name}<" in commands for name in COMMANDS) and "--protocols" in commands
    assert "<summary>Imports of the examples</summary>" in (site / "notebooks" / "20_plots.html").read_text()
    assert "token map" in (site / "glossary.html").read_text()
    assert (site / "index.html").read_text().count("<img") > 8
    assert (site / "search" / "search_index.json").stat().st_size > 100_000
