"""What this book adds to Sphinx: code that leads to its source, sources that lead to their chapter, reading times."""

import math
import re
from pathlib import Path

from docutils import nodes
from sphinx.directives.code import LiteralInclude
from sphinx.ext.viewcode import viewcode_anchor
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode
from sphinx_codeautolink.extension.directive import SkipMarker

CHAPTER = re.compile(r"^Chapter: :doc:`/(.+)`", re.MULTILINE)
LOOKED_UP = {f"book/{name}" for name in ("api", "bibliography", "glossary", "runs", "status", "welcome")}
SOURCE = re.compile(r"(?:\.\./)*(tpbook(?:/\w+)+)\.py")


def module_of(file):
    """The module that `tpbook/methods/evit.py`, perhaps with `../` in front, holds; None for other files."""
    match = SOURCE.fullmatch(file)
    return match and match[1].removesuffix("/__init__").replace("/", ".")


def source_of(env, module):
    """What viewcode keeps of a module: [code, tags, who uses what of it, its name]; made where nobody has asked yet."""
    sources = vars(env).setdefault("_viewcode_modules", {})
    if not sources.get(module):
        file = Path(env.srcdir, *module.split("."))
        analyzer = ModuleAnalyzer.for_file(file / "__init__.py" if file.is_dir() else file.with_suffix(".py"), module)
        analyzer.find_tags()
        sources[module] = analyzer.code, analyzer.tags, {}, module
    return sources[module]


def add_sources(app, env):
    """Give every file of the package its page, also where nothing of it is described."""
    for path in Path(env.srcdir).glob("tpbook/**/*.py"):
        source_of(env, module_of(path.relative_to(env.srcdir).as_posix()))


class Include(LiteralInclude):
    """`literalinclude` that notes which object of the package it shows, for `name_shown`."""

    def run(self):
        shown = super().run()
        if module := module_of(self.arguments[0]):
            for block in shown:
                block["module"], block["name"] = module, self.options.get("pyobject")
            shown.insert(0, SkipMarker("next"))  # a fragment, which codeautolink could not parse
        return shown


def name_shown(app, document):
    """Put the name of the object, and a link to its source, over code that is shown from the package."""
    env = app.env
    for block in list(document.findall(nodes.literal_block)):
        module, name = block.get("module"), block.get("name")
        if not name:
            continue
        # viewcode makes an anchor of each object that somebody uses, and there a link back to who does
        source_of(env, module)[2].setdefault(name, env.docname)
        line = nodes.paragraph("", "", nodes.literal("", f"{module}.{name}"), classes=["shown"])
        line["ids"] = [f"{module}.{name}"]
        line += viewcode_anchor(reftarget=f"_modules/{module.replace('.', '/')}", refid=name, refdoc=env.docname)
        block.parent.insert(block.parent.index(block), line)


def link_names(app, document, docname):
    """Inline code that names something of the package leads to its description, a file of it to the source."""
    objects = app.env.get_domain("py").objects
    linked = {id(literal) for link in document.findall(nodes.reference) for literal in link.findall(nodes.literal)}
    for literal in list(document.findall(nodes.literal)):
        if id(literal) in linked:
            continue
        text = literal.astext()
        name = re.split(r"[(\[ ]", text)[0].rstrip(".")
        if module := module_of(text):
            target = f"_modules/{module.replace('.', '/')}", ""
        elif name.startswith("tpbook.") and name in objects:
            target = objects[name].docname, objects[name].node_id
        else:
            continue
        literal.replace_self(make_refnode(app.builder, docname, *target, literal.deepcopy()))


def is_open(node):
    """Whether a reader sees it without opening a fold."""
    while node := node.parent:
        if node.get("design_component") == "dropdown-body":
            return False
    return True


def minutes(document):
    """How long a page takes: 200 words of prose a minute; a figure, table, equation or code block a quarter each.

    What is folded takes no time, and a table is looked at, not read.
    """
    prose, blocks = (nodes.paragraph, nodes.term), (nodes.figure, nodes.table, nodes.math_block, nodes.literal_block)
    shown = [node for node in document.findall(lambda n: isinstance(n, prose + blocks)) if is_open(node)]
    read = [node for node in shown if isinstance(node, prose) and not isinstance(node.parent, nodes.entry)]
    words = sum(len(node.astext().split()) for node in read)
    return math.ceil(words / 200 + sum(isinstance(node, blocks) for node in shown) / 4)


BACK = re.compile(r'id="([\w.]+)">(\s*)<a class="viewcode-back" href="([^"]*/([\w-]+)\.html)#[\w.]*"')


def lead_back(body, module, objects):
    """Mend viewcode's links from source to description, where it mixes up `tpbook.engine.prune` and `tpbook.prune`."""

    def mend(match):
        name, space, address, page = match.groups()
        described = [
            described.node_id for full, described in objects.items()
            if full.startswith("tpbook.") and full.endswith(f".{name}") and described.docname.endswith(f"/{page}")
        ]  # fmt: skip
        exact = f"{module}.{name}"  # so is the place called where its code is shown
        place = exact if exact in described or not described else described[0]
        return f'id="{name}">{space}<a class="viewcode-back" href="{address}#{place}"'

    return BACK.sub(mend, body)


def complete(app, pagename, templatename, context, document):
    """Reading time under a chapter's title; on a source's page, its chapter. No script that the book does not use."""
    for files in ("script_files", "css_files"):  # no cell runs in the page, and the theme declares thebe twice
        context[files] = [
            file for file in context[files] if "thebe" not in f"{file}{getattr(file, 'attributes', '')}".lower()
        ]
    if "body" in context:  # the list that sphinxcontrib-bibtex announces holds more than items
        context["body"] = context["body"].replace('<div role="list" class="citation-list">', "<div>")
    if pagename == "_modules/index":  # viewcode puts lists into lists, which no reader of screens takes
        head, *modules = context["body"].split("<li>")
        flat = "".join(f"<li>{module}" for module in modules)
        context["body"] = re.sub("</?ul>", "", head) + f"<ul>{re.sub('</?ul>', '', flat)}</ul>"
    if pagename.startswith("_modules/tpbook"):
        module = pagename.removeprefix("_modules/").replace("/", ".")
        context["body"] = lead_back(context["body"], module, app.env.get_domain("py").objects)
        package = module.rpartition(".")[0] or module
        named = CHAPTER.findall(source_of(app.env, module)[0]) or CHAPTER.findall(source_of(app.env, package)[0])
        chapters = [
            f'<a href="{app.builder.get_relative_uri(pagename, chapter)}">{app.env.titles[chapter].astext()}</a>'
            for chapter in named
        ]
        line = f"Explained in {' and '.join(chapters)}." if chapters else ""
    elif document is not None and pagename.startswith("book/") and pagename not in LOOKED_UP:
        line = f"{minutes(document)} min read"
    else:
        return
    context["body"] = context["body"].replace("</h1>", f'</h1>\n<p class="under-title">{line}</p>', 1)


def in_the_dark(app, document):
    """A drawing that has a variant for dark pages beside it, `NAME-dark.svg`: both, of which book.css shows one."""
    here = Path(app.env.doc2path(app.env.docname)).parent
    for image in list(document.findall(nodes.image)):
        dark = re.sub(r"\.svg$", "-dark.svg", image["uri"])
        if dark != image["uri"] and (here / dark).exists():
            other = image.deepcopy()
            other["uri"] = dark
            image["classes"] += ["dark-light", "in-light"]  # the theme lays no white ground under dark-light
            other["classes"] += ["dark-light", "in-dark"]
            image.parent.insert(image.parent.index(image) + 1, other)


def setup(app):
    app.add_directive("literalinclude", Include, override=True)
    app.connect("env-updated", add_sources)
    app.connect("doctree-read", in_the_dark, priority=400)  # before Sphinx copies what a page shows
    app.connect("doctree-read", name_shown, priority=600)  # after viewcode
    app.connect("doctree-resolved", link_names)
    app.connect("html-page-context", complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
