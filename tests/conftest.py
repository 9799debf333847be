"""Shared pieces of the tests, and the closing line that says how many passed."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def golden():
    "Read one of the reference files: golden('x.json') or golden('x.safetensors')."
    folder = Path(__file__).parent / "golden"
    return lambda name: (
        json.loads((folder / name).read_text()) if name.endswith(".json") else load_file(folder / name)
    )


def pytest_configure(config):
    "Hide GPUs unless `-m gpu` selects the tests that need one: the others compare results of a CPU."
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


LONGEST = ("test_viewer", "test_clusters", "test_demo", "test_processes", "test_repository")


def pytest_collection_modifyitems(items):
    """Put the longest tests first and the quick ones last, in each half of the list.

    A worker of pytest-xdist starts with one half. One that is done takes tests of the other, but not its
    next one: with long tests at the end, it would wait for two of them.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if item not in slow]
    slow.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
    s, q = len(slow) // 2, len(quick) // 2
    items[:] = slow[:s] + quick[:q] + slow[s:] + quick[q:]


def pytest_sessionstart(session):
    session.config.started = time.time()


def pytest_terminal_summary(terminalreporter, config):
    for file in sorted((ROOT / "runs" / "screenshots").glob("*.png")):
        if file.stat().st_mtime > config.started:
            terminalreporter.write_line(f"screenshot saved: {file.relative_to(ROOT)}")


def pytest_unconfigure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    count = {
        outcome: len(reporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped")
    }
    if count["skipped"]:
        print(f"\n{count['skipped']} skipped")
    print(f"\n{count['passed']} passed, {count['failed'] + count['error']} failed")
