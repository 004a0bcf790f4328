"""Pages of the site that lie outside of docs/, and links between them and docs/.

Links in Markdown are those that work in the repository. README.md is the site's first page; scripts
that a page links to become pages that show them, other files are copied.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()([^()\s#:]+)(?=(?:#[^()\s]*)?\))")
OPTIONS = re.compile(r"^<!-- options of (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files outside of docs/ that the site's pages are, or link to."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    sources = [PAGES.get(path, path) for path in PAGES] + [
        file.src_uri for file in files.documentation_pages()
    ]
    linked = {
        target
        for uri in sources
        for link in LINK.findall((ROOT / in_repository(uri)).read_text())
        if (target := outside(uri, link)) and target not in PAGES
    }
    for target in sorted(linked):
        source = (ROOT / target).read_text() if target.endswith(".py") else None
        if source is None:
            file = File.generated(config, site_uri(target), abs_src_path=str(ROOT / target))
        else:
            page = f"---\nsearch: {{exclude: true}}\n---\n# {target}\n\n```python\n{source}```\n"
            file = File.generated(config, site_uri(target), content=page)
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that hold in the repository into those that hold on the site, and list options."""
    uri = page.file.src_uri
    markdown = OPTIONS.sub(lambda match: options_of(match[1]), markdown)
    if uri.startswith("source/"):
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(uri)), match[0]))
        if not (ROOT / target).is_file():
            return match[0]  # mkdocs says so
        return posixpath.relpath(site_uri(target), posixpath.dirname(uri) or ".")

    return LINK.sub(rewritten, markdown)


def options_of(name: str) -> str:
    """A table of what a configuration of lion_models declares, which griffe does not read."""
    import lion_models
    from lion_models.base.options import declared

    rows = [f"| `{each.name}` | {declared(each).text(each.default)} |"
            for each in dataclasses.fields(getattr(lion_models, name))]  # fmt: skip
    return "\n".join(["| option | |", "| --- | --- |", *rows])


def in_repository(uri: str) -> str:
    """The path in the repository of a page of the site."""
    return next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")


def site_uri(path: str) -> str:
    """The page of the site, or file in it, of a path in the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" + (".md" if path.endswith(".py") else "")


def outside(uri: str, link: str) -> str | None:
    """The path of a file outside of docs/ that a page links to."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(uri)), link))
    is_there = not target.startswith(("docs/", "..")) and (ROOT / target).is_file()
    return target if is_there else None
