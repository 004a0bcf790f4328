"""The site builds without a warning, asks no network for anything, and has the whole API."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deqcore
from tests.support.pages import PAGES, ROOT, text

pytest.importorskip("mkdocs", reason="pip install 'deqcore[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert not built.stderr.strip(), built.stderr
    return folder


def test_site_has_every_page_and_asks_no_network(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\ssrc=[\"']?https?:[^>]+", html)
        fetched += re.findall(r"<link\b[^>]*\shref=[\"']?https?:[^>]+", html)
        assert not fetched, f"{page}: {fetched}"


@pytest.mark.parametrize("name", [name for name in deqcore.__all__ if name != "__version__"])
def test_api_pages_have_every_public_name(name: str):
    pages = [text(page) for page in PAGES if page.startswith("docs/api/")]
    entries = re.findall(r"^::: (deqcore\..*)$", "\n".join(pages), flags=re.MULTILINE)
    # A function that is called like its module is to be found in that.
    assert entries.count(f"deqcore.{name}") + entries.count(f"deqcore.{name}.{name}") == 1


def test_docstrings_have_one_markup():
    """Markdown, which the API pages render; no roles or tables of reStructuredText."""
    for path in [*ROOT.glob("deqcore/**/*.py"), *ROOT.glob("lion_models/**/*.py")]:
        source = path.read_text(encoding="utf-8")
        for found in (r":(class|func|meth|mod|attr):`", r"(?m)::$", r"(?m)^ *=+  =+ *$"):
            assert not re.search(found, source), f"{path.relative_to(ROOT)} has {found}"
