"""HTML built from values: whatever is not markup is escaped, and every tag is closed."""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

from medmoco.printing import visible
from medmoco.report.run_folder import Run, finite
from medmoco.report.script import SCRIPT
from medmoco.report.style import STYLE

# Characters that are easily mistaken for others in source code.
DASH = "\N{EN DASH}"  # stands where there is no value
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"
VOID_ELEMENTS = {"br", "img", "input", "link", "meta", "source"}


class Markup(str):
    """A string that is HTML already and is not escaped again."""


NOTHING = Markup("")


def text(value: object) -> Markup:
    """Escapes a value for element content and quoted attributes, and makes it `visible`."""
    return Markup(html.escape(visible(value), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Markup is kept, None is left out, everything else is escaped."""
    return Markup("".join(p if isinstance(p, Markup) else text(p) for p in parts if p is not None))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """`element("td", 3, class_="number")` gives `<td class="number">3</td>`.

    A trailing underscore of an attribute is dropped, others become dashes; True gives an attribute
    without a value, None and False none at all.
    """
    written = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{text(value)}"')
    opening = f"<{name}{''.join(written)}>"
    return Markup(opening if name in VOID_ELEMENTS else f"{opening}{join(children)}</{name}>")


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def section(anchor: str, title: str, *children: object) -> Markup:
    heading = element("h2", title, id=f"{anchor}-title")
    return element("section", heading, *children, id=anchor, aria_labelledby=f"{anchor}-title")


def number(value: object, digits: int = 3) -> str:
    """A figure for a table cell, a dash where there is none."""
    known = finite(value)
    return DASH if known is None else f"{known:.{digits}f}"


def of_run(name: str, several: bool, sentence: str) -> str:
    """A sentence on a run: with the run's name before it where the page shows several."""
    return f"{name}: {sentence}" if several else sentence[:1].upper() + sentence[1:]


def model_head(name: str, run: Run, runs: Sequence[Run]) -> Markup:
    """A column's heading: the model, with its run where the page shows several."""
    return join([name, element("small", run.name) if len(runs) > 1 else None])


def note(kind: str, *content: object) -> Markup:
    """A paragraph set off from the text; `kind` is warn or good."""
    return element("div", element("p", *content), class_=f"note {kind}")


def details(summary: str, *children: object) -> Markup:
    return element("details", element("summary", summary), *children)


def command_line(command: str) -> Markup:
    # Lines may break between words alone: a flag broken at its dashes is hard to read.
    words = [element("span", word) for word in command.split(" ")]
    code = element("code", Markup(" ".join(words)))
    return element("pre", code, tabindex=0, role="region", aria_label="command")


def table(
    caption: str,
    columns: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    kind: str = "numbers",
    marked: Iterable[int] = (),
) -> Markup:
    """A table whose first column names the row; it scrolls sideways in a narrow window.

    Args:
        caption: says what the table shows; stands above it and names it for screen readers.
        columns: headings, the first one that of the row names.
        rows: cells, as many as columns.
        kind: "numbers" aligns the cells after the first to the right, "words" breaks long ones.
        marked: indices of rows that stand out.
    """
    head = element("tr", *(element("th", c, scope="col") for c in columns))
    outstanding = set(marked)
    body = [
        element(
            "tr",
            element("th", cells[0], scope="row"),
            *(element("td", cell) for cell in cells[1:]),
            class_="marked" if i in outstanding else None,
        )
        for i, cells in enumerate(rows)
    ]
    return framed_table(caption, [head], body, kind)


def framed_table(
    caption: str, head: Sequence[Markup], body: Sequence[Markup], kind: str = "numbers"
) -> Markup:
    """The table around head and body rows, inside a frame that scrolls and takes the focus."""
    whole = element(
        "table",
        element("caption", caption),
        element("thead", *head),
        element("tbody", *body),
        class_=kind,
    )
    return element("div", whole, class_="frame", tabindex=0, role="region", aria_label=caption)


def page(title: str, *content: object, scripted: bool = False) -> Markup:
    """A whole document that loads nothing, with the report's script if it is `scripted`.

    Its policy forbids all but pictures inside the page, this style sheet and this script.
    """
    scripts = f"script-src {_digest(SCRIPT)}; " if scripted else ""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content=f"default-src 'none'; img-src data:; style-src {_digest(STYLE)}; {scripts}"
            "base-uri 'none'; form-action 'none'",
        ),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    script = element("script", Markup(SCRIPT)) if scripted else None
    body = element("body", element("main", *content), script)
    return Markup(f"<!doctype html>\n{element('html', head, body, lang='en')}\n")


def _digest(content: str) -> str:
    """What a Content-Security-Policy calls inline content by."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
