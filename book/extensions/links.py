"""Names in code link to the API: sphinx-codeautolink is given the code of a page, not the page, which takes longer."""

import re
import tempfile
from pathlib import Path

from sphinx_codeautolink import extension
from sphinx_codeautolink.extension import resolve

CODE = re.compile(
    r'<div class="(?:highlight-|doctest)[^"]*"><div class="highlight"><pre>.*?</pre></div>\s*</div>', re.DOTALL
)
whole_page = extension.link_html


def link_html(document, out_dir, *args, **kwargs):
    """As sphinx-codeautolink's, of a page that holds nothing but the code; the rest stays as it was written."""
    page = Path(out_dir, f"{document}.html")
    text = page.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, f"{document}.html")
        small.parent.mkdir(parents=True, exist_ok=True)
        small.write_text("\n".join(CODE.findall(text)), "utf-8")
        whole_page(document, folder, *args, **kwargs)
        linked = iter(CODE.findall(small.read_text("utf-8")))
    page.write_text(CODE.sub(lambda found: next(linked), text), "utf-8")


def setup(app):
    extension.link_html = link_html
    resolve.populate_type_checking = lambda module: None  # imports half of transformers, and finds no link more
    return {"parallel_read_safe": True, "parallel_write_safe": True}
