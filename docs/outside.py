"""A hook of MkDocs: what the documents show from elsewhere in the repository (results, plots, examples) goes into the site too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\]\(\.\./([^)#]+)")
_FOLDER = "repository"  # of the site


def on_files(files: Any, config: Any) -> Any:
    """Adds the files that documents link to outside of docs/."""
    from mkdocs.structure.files import File

    root = Path(config.docs_dir).parent
    linked = {m[1] for f in files.documentation_pages() for m in _LINK.finditer(f.content_string)}
    for name in sorted(linked):
        if (root / name).is_file():  # a broken link stays one, and --strict says so
            files.append(File.generated(config, f"{_FOLDER}/{name}", abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links go to where the files are in the site."""
    return _LINK.sub(rf"]({_FOLDER}/\1", markdown)
