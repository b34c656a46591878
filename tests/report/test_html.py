"""The HTML page: self-contained, escaped, with bars that add up."""

import re
from html.parser import HTMLParser

import pytest
import torch
from models import TwoConvs
from torch import nn

import qconvert

CLIP = torch.zeros(1, 2, 4, 6, 6)
_VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(params=["report", "profile", "report without operations"])
def document(request):
    model = TwoConvs()
    converted = qconvert.binarize(model, "bitorch", report=False)
    if request.param == "profile":
        return qconvert.profile(converted, CLIP)
    return qconvert.compare(model, converted, CLIP if request.param == "report" else None)


def test_page_is_whole_and_self_contained(document):
    text = document.to_html()
    page = _Page(text)
    assert text.startswith("<!doctype html>")
    assert {"src", "href", "srcset", "data", "action"}.isdisjoint(name for _, attributes in page.tags for name in attributes)
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in page.tags)
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert ("meta", {"charset": "utf-8"}) in page.tags
    assert sum(tag == "title" for tag, _ in page.tags) == 1


def test_page_shows_every_layer_total_and_note(document):
    page = _Page(document.to_html())
    for table in (document.layer_table(), document.totals_table()):
        assert set(table.headers) <= set(page.texts)
        assert {row[0] for row in table.rows if row[0]} <= set(page.texts)
    assert set(document.notes()) <= set(page.texts)
    assert document.title in page.texts


def test_exact_numbers_are_one_hover_away():
    titles = {attributes.get("title") for _, attributes in _Page(qconvert.profile(TwoConvs(), CLIP).to_html()).tags}
    assert f"{8 * 4 * 6 * 6 * 2 * 27:,}" in titles


def test_bars_of_a_column_add_up_to_the_whole(document):
    sections = document.to_html().split("<h2>Where the ")[1:]
    assert sections
    for section in sections:
        widths = [float(width) for width in re.findall(r'class="fill" style="width:([\d.]+)%"', section)]
        assert sum(widths) == pytest.approx(100, abs=0.005 * len(widths))
        assert widths == sorted(widths, reverse=True)


def test_bar_is_the_layers_share():
    page = qconvert.profile(TwoConvs(), CLIP).to_html()
    first, second, head = 8 * 4 * 6 * 6 * 2 * 27, 4 * 2 * 3 * 3 * 8 * 9, 3 * 4
    flops = page.split("<h2>Where the FLOPs are</h2>")[1].split("<h2>")[0]
    shares = [f"{100 * macs / (first + second + head):.2f}" for macs in (first, second, head)]
    assert re.findall(r'title="(\w+)".*?width:([\d.]+)%', flops) == list(
        zip(("first", "second", "head"), shares, strict=True)
    )


def test_columns_without_numbers_have_no_bars():
    without = qconvert.profile(TwoConvs()).to_html()
    assert "<h2>Where the bits are</h2>" in without
    assert "<h2>Where the FLOPs are</h2>" not in without
    # a float model has no bit operations
    assert "<h2>Where the BOPs are</h2>" not in qconvert.profile(TwoConvs(), CLIP).to_html()


def test_bars_of_many_layers_end_in_the_sum_of_the_rest():
    model = nn.Sequential(*(nn.Conv3d(1, 1, 1) for _ in range(50)))
    bars = qconvert.profile(model).to_html().split("<h2>Where the bits are</h2>")[1].split("<h2>")[0]
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bars)]
    rest = int(re.search(r">(\d+) more layers<", bars)[1])
    assert 0 < rest < 50
    assert widths == [2.0] * (50 - rest) + [2.0 * rest]


def test_names_and_reasons_are_escaped():
    evil = "<b onclick='x'>&\"name"
    model = type("<Evil>&", (nn.Sequential,), {})()
    model.add_module(evil, nn.Conv3d(1, 1, 1))
    rules = {"rule": [{"weight": "sign", "reason": "<script>alert(1)</script> & 'so on'"}]}
    report = qconvert.compare(model, qconvert.binarize(model, rules, report=False), torch.zeros(1, 1, 2, 2, 2))
    page = _Page(report.to_html())
    assert {"b", "script", "evil"}.isdisjoint(tag for tag, _ in page.tags)
    text = "".join(page.texts)
    assert evil in text
    assert "<script>alert(1)</script> & 'so on'" in text
    assert "<Evil>&: 1 Conv3d found" in text
    assert {"class", "style", "title", "lang", "charset"} >= {name for _, attributes in page.tags for name in attributes}
