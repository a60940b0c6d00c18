"""A chapter's notebooks are a click away at its top and bottom, and it from theirs; *Next* walks the chapters alone."""

import re
from html import escape
from pathlib import Path

import nbformat
from sphinx.util.docutils import SphinxDirective

CHAPTER = re.compile(r"\]\(\.\./(book/[\w-]+)\.md")


def chapter_of(notebook):
    """The chapter that a notebook's first cell links to first: path → "book/evit"."""
    first = nbformat.read(notebook, as_version=4).cells[0].source
    if not (named := CHAPTER.search(first)):
        raise ValueError(f"{notebook}: its first cell must link to its chapter, as in [EViT](../book/evit.md)")
    return named[1]


def find(app, env, docnames):
    """Note which notebook belongs to which chapter, in the order of the contents."""
    listed = re.findall(r"notebooks/[\w-]+", Path(env.srcdir, app.config.external_toc_path).read_text())
    env.chapters = {run: chapter_of(Path(env.srcdir, f"{run}.ipynb")) for run in listed}


class Runs(SphinxDirective):
    """All notebooks, each beside its chapter."""

    def run(self):
        rows = [f"| [](/{run}.ipynb) | [](/{chapter}.md) |" for run, chapter in self.env.chapters.items()]
        return self.parse_text_to_nodes("\n".join(["| notebook | chapter |", "|---|---|", *rows]))


def lines(app, pagename):
    """The other half of a page, as HTML: for its top and for its bottom. "" and "" where it has none."""
    chapters, titles = app.env.chapters, app.env.titles

    def link(target, words=None):
        words = escape(words or titles[target].astext())
        return f'<a href="{app.builder.get_relative_uri(pagename, target)}">{words}</a>'

    if pagename in chapters:
        return f"For {link(chapters[pagename])}", f"Back to the chapter: {link(chapters[pagename])}"
    runs = [run for run, chapter in chapters.items() if chapter == pagename]
    if not runs:
        return "", ""
    return " · ".join(map(link, runs)), f"What computed this page: {', '.join(map(link, runs))}"


def complete(app, pagename, templatename, context, document):
    """Put the links in, and take the notebooks out of the walk."""
    chapters = app.env.chapters
    for way in ("prev", "next"):
        there = context.get(way)
        if there and (pagename in chapters or leads_to(there["link"], chapters)):
            context[way] = None
    above, below = lines(app, pagename)
    if not above or "body" not in context:
        return
    body, found = re.subn(r'(<p class="under-title">[^<]*)', rf"\g<1> · {above}", context["body"], count=1)
    if not found:
        body = body.replace("</h1>", f'</h1>\n<p class="under-title">{above}</p>', 1)
    context["body"] = f'{body}\n<p class="run-link">{below}</p>'


def leads_to(link, chapters):
    return any(link.endswith(f"{run}.html") for run in chapters)


def setup(app):
    app.add_directive("runs", Runs)
    app.connect("env-before-read-docs", find)
    app.connect("html-page-context", complete, priority=600)  # after edition.py, which writes the line under the title
    return {"parallel_read_safe": True, "parallel_write_safe": True}
