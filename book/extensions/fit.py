"""Python that a page shows, in lines of at most `WIDTH` characters; the sources themselves are up to 120 wide.

Lines that are short enough stay. A long one is broken where the fewest brackets are open, a string at a space; the
comment at its end goes above it. What runs is the same.
"""

import io
import re
import tokenize
from typing import NamedTuple

from docutils import nodes

WIDTH = 76
LANGUAGES = {"python", "python3", "ipython", "ipython3"}
FOR_TOOLS = re.compile(r"  # (?:fmt: \w+|noqa.*)$", re.MULTILINE)
STRING = re.compile(r"([a-zA-Z]*)(['\"])(?!\2\2).*\2")
OPERATORS = set("for if else and or is in not + - * / % @ | & == < >".split())
SHORT = 36  # a line that ends before is worth breaking only for want of a better place


class Token(NamedTuple):
    start: int
    end: int
    text: str
    depth: int  # brackets open before it
    said: bool = False  # a part of a docstring


def fit(code):
    """The same code in lines of `WIDTH`, as far as there are places to break them; what is no Python stays."""
    lines, i, goes_on = FOR_TOOLS.sub("", code).split("\n"), 0, False
    while i < len(lines):
        if len(lines[i]) <= WIDTH:
            i, goes_on = i + 1, False
            continue
        try:
            tokens = tokens_of(lines).get(i + 1, [])
        except (tokenize.TokenError, SyntaxError):
            return code
        *lines[i : i + 1], goes_on = broken(lines[i], tokens, goes_on)
        i += goes_on or len(lines[i]) > WIDTH and not lines[i].lstrip().startswith("#")
    return "\n".join(lines)


def tokens_of(lines):
    """Number of a line → its tokens; none where a text of several lines passes through, unless it is a docstring."""
    found, depth, fstrings, fresh = {}, 0, [], True
    for kind, text, (row, start), (last, end), _ in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        name = tokenize.tok_name[kind]
        if name == "FSTRING_START":  # from Python 3.12 on it comes in parts
            fstrings.append((row, start))
            continue
        if name == "FSTRING_END":
            row, start = fstrings.pop()
            text = lines[row - 1][start:end]
        if fstrings or name in ("NL", "ENDMARKER"):
            continue
        if name in ("NEWLINE", "INDENT", "DEDENT"):
            fresh = True
            continue
        said = fresh and name == "STRING" and text.endswith(('"""', "'''"))
        depth -= text in (")", "]", "}")
        if row == last:
            found.setdefault(row, []).append(Token(start, end, text, depth, said))
        elif said:
            found |= {line: [Token(0, len(lines[line - 1]), "", depth, True)] for line in range(row, last + 1)}
        depth += text in ("(", "[", "{")
        fresh = fresh and name == "COMMENT"
    return found


def broken(line, tokens, goes_on):
    """A line that is too long, up to its best break, and the rest, or the comment at its end and what is before it.

    Args:
        line: longer than `WIDTH`.
        tokens: of the line.
        goes_on: whether it is the rest of another.

    Returns:
        One or two lines, and whether the last is the rest of one that was broken.
    """
    indent = line[: len(line) - len(line.lstrip())]
    if tokens and (tokens[0].said or tokens[-1].text.startswith("#")):
        if len(tokens) > 1 and not tokens[0].said:
            return indent + tokens[-1].text, line[: tokens[-1].start].rstrip(), False
        space = line.rfind(" ", len(indent) + 2, WIDTH + 1)
        rest = indent + "# " * (not tokens[0].said) + line[space + 1 :]
        return (line, False) if space < 0 else (line[:space], rest, False)
    cost, end, start, slash, beside = min(places(tokens), default=(9, 0, 0, "", False))
    after = indent if goes_on or beside else indent + " " * (8 if line.endswith(":") else 4)
    if cost > 5 and (found := in_string(tokens)):
        space, quote, prefix, slash = found
        return line[:space] + quote + slash, after + prefix + quote + line[space:], True
    return (line[:-end] + slash, after + line[start:], True) if start else (line, False)


def places(tokens):
    """Where to break between tokens, the best place least.

    Yields:
        A cost, − the line's end, the next one's start, a backslash where one is needed, whether both are of one list.
    """
    targets = False  # between `for` and `in`
    for before, after in zip(tokens, tokens[1:]):
        targets = before.text == "for" or targets and before.text != "in"
        slash = "" if after.depth else " \\"
        if before.end + len(slash) > WIDTH or after.text in (")", "]", "}", ",", ":", "."):
            continue
        spaced, opens = after.start > before.end, before.text in ("(", "[", "{")
        value = before.text == ":" and spaced and after.depth
        if before.text == "," or after.text in OPERATORS and spaced or opens or value:
            cost = after.depth + 3 * bool(slash) + 1.5 * (opens or value) + 0.5 * (after.text in OPERATORS)
            beside = before.text == "," and 0 < after.depth == tokens[0].depth
            yield cost + 4 * (before.end < SHORT) + 2 * targets, -before.end, after.start, slash, beside


def in_string(tokens):
    """Where to break a string of one line: (column of a space or brace, its quote, its prefix, backslash); or None."""
    for token in tokens:
        string = STRING.fullmatch(token.text)
        if not string or not token.start < WIDTH < token.end:
            continue
        (prefix, quote), slash, depth, found = string.groups(), "" if token.depth else " \\", 0, None
        for i, sign in enumerate(token.text):
            end = token.start + i
            if sign in " {" and not depth and i > len(prefix) + 1 and end + 1 + len(slash) <= WIDTH:
                found = end, quote, prefix, slash
            depth += ("f" in prefix.lower()) * ((sign == "{") - (sign == "}"))
        return found
    return None


def fit_code(app, document):
    """Code cells, code blocks and code of the package that a page shows."""
    for block in document.findall(nodes.literal_block):
        if block.get("language") in LANGUAGES and (code := fit(block.astext())) != block.astext():
            block.rawsource = code
            block[:] = [nodes.Text(code)]


def setup(app):
    app.connect("doctree-read", fit_code, priority=300)  # before codeautolink reads them
    return {"parallel_read_safe": True, "parallel_write_safe": True}
