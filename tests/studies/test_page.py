import html
from html.parser import HTMLParser
from pathlib import Path

from relora.studies.page import Page

ODD = "<script>alert(1)</script> & <b>a|b</b> &lt;"


class Tags(HTMLParser):
    """Collects tags and text, as a browser sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_is_never_html_in_either_form_of_a_page(tmp_path: Path) -> None:
    (tmp_path / "curve.png").write_bytes(b"")
    page = Page(ODD)
    page.heading(ODD)
    page.paragraph(ODD)
    page.listing([ODD])
    page.table([ODD, "x"], [[ODD, "1"]])
    page.figure("curve.png", ODD)
    for written in (page.markdown(), page.html(tmp_path)):
        seen = Tags()
        seen.feed(written)
        assert not {"script", "b"} & set(seen.tags)
    # What a reader sees of the Markdown is the text itself.
    assert html.unescape(page.markdown().replace("\\|", "|")).count(ODD) == 7 + 1  # a caption is written twice


def test_a_command_stays_as_it_is_typed_in_markdown() -> None:
    page = Page("x")
    page.code("relora report x > a.txt && less a.txt < b")
    assert "    relora report x > a.txt && less a.txt < b" in page.markdown()
