"""MkDocs hooks: the site holds the pages of results/ beside those of docs/.

Pages link to each other by their places in the repository (../results/loops.md), so that the links work on a code
host too. Here they are turned into places within the site, where results/ lies below docs/.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {".md", ".png", ".gif", ".html", ".patch"}
"""Kinds of files in results/ that the site holds; the raw CSV files stay in the repository."""
LINK = re.compile(r"(\]\()([^)\s#:]+)([)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures of results/."""
    for path in sorted((ROOT / "results").rglob("*")):
        if path.suffix in SHOWN:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between docs/ and results/ into links within the site."""
    place = page.file.src_uri
    in_repository = place if place.startswith("results/") else f"docs/{place}"

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), match[2]))
        target = target.removeprefix("docs/") if target.startswith(("docs/", "results/")) else target
        return match[1] + os.path.relpath(target, posixpath.dirname(place) or ".") + match[3]

    return LINK.sub(moved, markdown)
