"""A small, safe HTML writer: every text is escaped, nothing is loaded from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Html:
    """Markup that is ready to be written. Only this module's functions make it."""

    markup: str


Content = Html | str


def element(tag: str, *children: Content, **attributes: str) -> Html:
    """``<tag …>children</tag>``; texts and attribute values are escaped.

    >>> element("p", "a < b", class_="note").markup
    '<p class="note">a &lt; b</p>'
    """
    words = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
    )
    return Html(f"<{tag}{words}>{join(children).markup}</{tag}>")


def join(children: Iterable[Content]) -> Html:
    """Several pieces, one after the other."""
    return Html("".join(one.markup if isinstance(one, Html) else escape(one) for one in children))


def section(title: str, *children: Content) -> Html:
    """A part of the page under its heading."""
    return element("section", element("h2", title), *children)


def paragraph(*children: Content) -> Html:
    """One paragraph."""
    return element("p", *children)


def note(text: str) -> Html:
    """A paragraph in small print."""
    return element("p", text, class_="note")


def listed(items: Iterable[Content]) -> Html:
    """A bullet list."""
    return element("ul", *(element("li", one) for one in items))


def terms(pairs: Iterable[tuple[str, Content]]) -> Html:
    """A description list: what is named, and what is said of it."""
    return element(
        "dl", *(element("div", element("dt", name), element("dd", said)) for name, said in pairs)
    )


def data_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 1
) -> Html:
    """A table with a caption; the first ``names`` columns are text, the others figures.

    It scrolls by itself on a narrow screen, and is reachable by keyboard for that.
    """
    kinds = ["name" if number < names else "figure" for number in range(len(headings))]
    head = element(
        "tr",
        *(
            element("th", one, scope="col", class_=kind)
            for one, kind in zip(headings, kinds, strict=True)
        ),
    )
    body = [
        element(
            "tr",
            element("th", cells[0], scope="row", class_="name"),
            *(
                element("td", one, class_=kind)
                for one, kind in zip(cells[1:], kinds[1:], strict=True)
            ),
        )
        for cells in rows
    ]
    table = element(
        "table", element("caption", title), element("thead", head), element("tbody", *body)
    )
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=title)


def picture(png: bytes, *, alt: str, caption: Content) -> Html:
    """An embedded PNG on a white card, with its caption."""
    data = base64.b64encode(png).decode("ascii")
    image = Html(f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">')
    return element("figure", image, element("figcaption", caption))


def page(title: str, *children: Content) -> str:
    """A whole document that needs no script, no font and no network."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{element('main', *children).markup}</body></html>\n"
    )


_STYLE = """
:root { --ink: #1b1f24; --soft: #4c5661; --paper: #ffffff; --card: #f3f5f7; --line: #d5dae0;
  --accent: #0b5c8f; --alarm: #9a1b1b; --alarm-paper: #fdeeee; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #aeb7c0; --paper: #15181c;
  --card: #1f242a; --line: #3a424b; --accent: #7cc4f2; --alarm: #ffb3ad; --alarm-paper: #3a1a1a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
p, li, dd { max-width: 46rem; }
.answer { font-size: 1.15rem; border-left: 4px solid var(--accent); background: var(--card);
  padding: .9rem 1.1rem; margin: 0 0 1rem; max-width: none; }
.alarm { border: 2px solid var(--alarm); background: var(--alarm-paper); color: var(--alarm);
  padding: .8rem 1rem; max-width: none; }
.note { color: var(--soft); font-size: .9rem; }
dl { margin: 0; }
dl div { display: grid; grid-template-columns: 11rem 1fr; gap: .2rem 1rem; padding: .3rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
.scroll { overflow-x: auto; margin: 1rem 0 1.4rem; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; } thead th { color: var(--soft); font-size: .9rem; }
.name { text-align: left; } .figure { text-align: right; }
figure { margin: 1.4rem 0; }
img { display: block; width: 100%; max-width: 50rem; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .5rem; max-width: 46rem; }
code, pre { font-family: ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", monospace;
  font-size: .88em; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem .9rem; white-space: pre-wrap; }
@media (max-width: 36rem) { dl div { grid-template-columns: 1fr; } }
@media print {
  :root { --ink: #000; --soft: #333; --paper: #fff; --card: #fff; --line: #999;
    --accent: #000; --alarm: #000; --alarm-paper: #fff; }
  main { max-width: none; padding: 0; } body { font-size: 10pt; }
  figure, tr, dl div, .answer, .alarm { break-inside: avoid; } h2 { break-after: avoid; }
  th, td { white-space: normal; padding: .2rem .4rem; } .scroll { overflow: visible; }
}
"""
