"""The explorer, small, in any chapter: a few methods, on a few pictures, out of the states of the explorer's own page.

    ```{explorer} etps; dtps; random
    :ratio: 0.5
    ```

It begins with the first of the methods, on the first set of pictures that has it.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

DATA = re.compile(r'<script type="application/json" id="explorer-data">(.*?)</script>', re.DOTALL)
PAGE = """<div class="mini-explorer"><p>With JavaScript the explorer stands here.</p>
<script type="application/json">{data}</script></div>
<p class="mini-more"><a href="{page}">More pictures, every method, and one of your own: the explorer</a></p>
<link rel="stylesheet" href="{static}/explorer.css">
<script src="{static}/explorer.js" defer></script>
<script src="{static}/mini.js" defer></script>
"""


def part(data, methods, pictures, ratio):
    """Of an explorer's data what a small one shows.

    Args:
        data: as `tpbook.book.states.page` takes it.
        methods: names; the first set of pictures that knows the first is taken, of the others those that it knows.
        pictures: how many.
        ratio: where the slider begins.

    Returns:
        dict of the same form, without what computes in the page or was timed.

    Raises:
        ValueError: no set knows the first method.
    """
    of = next((group for group in data["sets"] if methods[0] in group["methods"]), None)
    if of is None:
        raise ValueError(f"no set of the explorer's pictures has states of {methods[0]!r}")
    known = [name for name in methods if name in of["methods"]]
    states = [{name: image[name] for name in known} for image in of["states"][:pictures]]
    costs = {name: [cost and {k: cost[k] for k in cost if k not in ("times", "speed")} for cost in of["costs"][name]]
             for name in known}  # fmt: skip
    said = {c for image in states for several in image.values() for state in several if state for c, _ in state["top"]}
    group = {key: value for key, value in of.items() if key not in ("onnx", "shape")}
    group |= {"images": of["images"][:pictures], "states": states, "costs": costs, "methods": dict.fromkeys(known, {})}
    group |= {"classes": {c: of["classes"][c] for c in sorted(said)}, "missing": ""}
    shown = {name: data["methods"][name] for name in known}
    return {**data, "methods": shown, "sets": [group], "start": {"method": methods[0], "ratio": ratio}}


class MiniExplorer(SphinxDirective):
    required_arguments, final_argument_whitespace = 1, True
    option_spec = {"pictures": directives.positive_int, "ratio": float}

    def run(self):
        source = Path(self.env.srcdir, "results/explorer.html")
        self.env.note_dependency(str(source))
        methods = [name.strip() for name in self.arguments[0].split(";")]
        data = json.loads(DATA.search(source.read_text(encoding="utf-8"))[1])
        try:
            small = part(data, methods, self.options.get("pictures", 4), self.options.get("ratio", 0.5))
        except ValueError as error:
            raise self.error(str(error)) from error
        text = json.dumps(small, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        up = "../" * self.env.docname.count("/")
        page = f"explorer.html?method={methods[0]}"
        return [nodes.raw("", PAGE.format(data=text, page=page, static=f"{up}_static"), format="html")]


def setup(app):
    app.add_directive("explorer", MiniExplorer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
