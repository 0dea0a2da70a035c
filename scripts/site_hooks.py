"""Additions to the configuration of `mkdocs build`: the repository's other Markdown files as pages, and their links.

The pages link to one another as files of the repository, so that they can be read there. On the site, README,
CONTRIBUTING, CHANGELOG and the READMEs of bench and examples are pages too, and a link to any other file becomes its
path as code.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: file of the repository -> page of the site
EXTRA = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
}
_LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
)


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside docs/."""
    from mkdocs.structure.files import File

    for source, page in EXTRA.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to where the site has what they mean."""
    here = {page_name: source for source, page_name in EXTRA.items()}.get(page.file.src_uri)
    source = here or f"docs/{page.file.src_uri}"
    return rewritten(markdown, source, page.file.src_uri)


def rewritten(markdown: str, source: str, page: str) -> str:
    """The text of a file of the repository as that of a page; code blocks stay as they are."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else _LINK.sub(lambda m: _link(m, source, page), part)
        for part in parts
    )


def _link(match: re.Match[str], source: str, page: str) -> str:
    target = match["target"]
    if "://" in target or target.startswith("mailto:"):
        return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path in EXTRA:
        place = EXTRA[path]
    elif path.startswith("docs/"):
        place = path.removeprefix("docs/")
    else:
        return match["text"] if match["text"].startswith("`") else f"{match['text']} (`{path}`)"
    relative = posixpath.relpath(place, posixpath.dirname(page) or ".")
    return f"{match['image']}[{match['text']}]({relative}{match['anchor'] or ''})"
