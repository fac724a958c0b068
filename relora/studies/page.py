"""A page of headings, text, tables and pictures, written as Markdown and as HTML."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Page:
    """A list of blocks, which can be written as Markdown and as HTML."""

    title: str
    blocks: list[tuple[str, Any]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.blocks.append(("heading", text))

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self.blocks.append(("paragraph", text))

    def listing(self, items: Sequence[str]) -> None:
        """Add a list, one bullet for each text."""
        self.blocks.append(("listing", list(items)))

    def code(self, text: str) -> None:
        """Add preformatted text, for example a command."""
        self.blocks.append(("code", text))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table. The first column is text, the other columns are numbers."""
        self.blocks.append(("table", (list(header), [list(row) for row in rows])))

    def figure(self, file: str, caption: str) -> None:
        """Add a picture. `file` lies in the folder of the page."""
        self.blocks.append(("figure", (file, caption)))

    def markdown(self) -> str:
        """Return the text of report.md."""
        return (
            "\n\n".join([f"# {_no_html(self.title)}", *(_markdown(kind, content) for kind, content in self.blocks)])
            + "\n"
        )

    def html(self, folder: Path) -> str:
        """Return the text of report.html, which includes the pictures from `folder`."""
        body = "\n".join(_html(kind, content, folder) for kind, content in self.blocks)
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
            f"<style>{CSS}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
        )


CSS = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:90rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;display:block;overflow-x:auto}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top;white-space:nowrap}"
    "th{white-space:normal;min-width:4.5rem;vertical-align:bottom}th:first-child,td:first-child{text-align:left}img{max-width:100%}"
    "figure{margin:1.5rem 0}"
    "figcaption{color:#555}pre{background:#f5f5f5;padding:.8rem;overflow-x:auto}"
)


def _no_html(text: str) -> str:
    """Escape text for Markdown, where "<" begins HTML and "&" may begin a character reference."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _markdown(kind: str, content: Any) -> str:
    if kind == "heading":
        return f"## {_no_html(content)}"
    if kind == "listing":
        return "\n".join(f"- {_no_html(item)}" for item in content)
    if kind == "code":
        return "\n".join(f"    {line}" for line in content.splitlines())
    if kind == "table":
        header, rows = content
        cells = [[_no_html(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
        rule = ["---", *["---:"] * (len(header) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
    if kind == "figure":
        caption = _no_html(content[1])
        return f"![{caption}]({content[0]})\n\n{caption}"
    return _no_html(content)


def _html(kind: str, content: Any, folder: Path) -> str:
    def escaped(text: str) -> str:
        return html.escape(text, quote=False)

    if kind == "heading":
        return f"<h2>{escaped(content)}</h2>"
    if kind == "listing":
        return f"<ul>{''.join(f'<li>{escaped(item)}</li>' for item in content)}</ul>"
    if kind == "code":
        return f"<pre>{escaped(content)}</pre>"
    if kind == "table":
        header, rows = content
        head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    if kind == "figure":
        data = base64.b64encode((folder / content[0]).read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(content[1])}">'
        return f"<figure>{image}<figcaption>{escaped(content[1])}</figcaption></figure>"
    return f"<p>{escaped(content)}</p>"
