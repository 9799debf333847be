"""The documentation site builds, and every link inside it leads to a page and a place on it."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest
from children import ROOT

pytestmark = pytest.mark.slow


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


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("material", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("docs") / "site"
    line = [sys.executable, ROOT / "tools" / "docs.py", "--out", folder]
    run = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return folder


def test_every_internal_link_leads_somewhere(site):
    pages = {file.resolve(): Page(file) for file in site.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if target.startswith(("http:", "https:", "mailto:", "data:")) or file.name == "404.html":
                continue
            other = (file.parent / unquote(target)).resolve() if target else file
            if not other.exists():
                broken.append(f"{file.relative_to(site)}: {link}")
            elif anchor and other in pages and unquote(anchor) not in pages[other].places:
                broken.append(f"{file.relative_to(site)}: {link}")
    assert not broken, broken
    assert all(page.headings == 1 for file, page in pages.items() if file.name != "404.html")


def test_every_notebook_module_and_term_has_its_place(site):
    notebooks = [file.relative_to(ROOT / "nbs") for file in (ROOT / "nbs").rglob("*.ipynb")]
    notebooks = [file for file in notebooks if ".ipynb_checkpoints" not in file.parts]
    for file in notebooks:
        if file.name != "index.ipynb":
            assert (site / "notebooks" / file.with_suffix(".html")).exists(), file
    for module in (ROOT / "bitvae").glob("[a-z]*.py"):
        assert (site / "api" / f"bitvae.{module.stem}.html").exists(), module
    assert "token map" in (site / "glossary.html").read_text()
    assert (site / "index.html").read_text().count("<img") > 8
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_no_page_asks_another_host(site):
    "Fonts, styles and scripts come with the site."
    for file in site.rglob("*.html"):
        links = [link for link in Page(file).links if link.endswith((".js", ".css", ".png", ".woff2"))]
        assert not [link for link in links if link.startswith("http")], file
