"""The report: one page that needs nothing else, whose numbers are the manifest's, beside timelines that add up."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from onelaunch.compiler.reports.data import Report, gather
from onelaunch.compiler.reports.page import render, write_report
from onelaunch.runtime.artifact import Artifact

VOID = {"meta", "link", "br", "img", "hr", "input"}
SECONDS = {"import": 0.25, "fuse": 1.5}


class Page(HTMLParser):
    """Tags that do not close, references, marked facts, text and identifiers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.facts: dict[str, str] = {}
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.ids += [found["id"] or ""] if "id" in found else []
        if "data-key" in found:
            self.facts[found["data-key"] or ""] = found["data-value"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def opened(gpu_artifact: tuple[Path, Path]) -> Artifact:
    return Artifact.open(gpu_artifact[1])


@pytest.fixture(scope="module")
def folder(opened: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(opened, tmp_path_factory.mktemp("report"), SECONDS, 40.0).parent


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(page: Page, folder: Path) -> None:
    assert (page.wrong, page.open) == ([], [])
    assert "script" not in page.tags
    text = (folder / "report.html").read_text()
    assert not re.search(r"url\(|@import|https?:", text)
    beside = {link for link in page.links if not link.startswith(("#", "data:,"))}
    assert beside == {p.name for p in folder.glob("timeline-*.json")}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", " ".join(page.words))


def test_its_numbers_are_the_manifests(page: Page, opened: Artifact) -> None:
    raw = opened.manifest.raw
    assert float(page.facts["weights_per_step"]) == raw["bytes"]["weights_per_step"]
    assert int(page.facts["workspace_bytes"]) == raw["workspace_bytes"]
    assert int(page.facts["weights_bytes"]) == sum(w["bytes"] for w in raw["weights"])
    assert page.facts["targets"].split() == list(raw["targets"])
    text = " ".join(page.words)
    for entry in raw["targets"]["sm_90"]["entries"].values():
        assert str(entry["registers"]) in text
        assert f"{entry['shared']:,}" in text


def test_every_phase_is_drawn_and_listed_for_every_target(page: Page, opened: Artifact) -> None:
    found = gather_once(opened)
    text = " ".join(page.words)
    for view in found.targets:
        assert {p["phase"] for p in view.phases} == {p.phase for p in view.step.phases}
        for p in view.phases:
            assert p["phase"] in text
            if p["bytes"] and p["operations"]:
                assert f"{p['section']}.{p['phase']}: " in text  # a label of the roofline
    assert len(re.findall(r"worker \d", text)) >= 4


def test_timelines_add_up_to_the_modelled_step(folder: Path) -> None:
    for path in folder.glob("timeline-*.json"):
        document = json.loads(path.read_text())
        ends = [e["ts"] + e["dur"] for e in document["traceEvents"] if e["ph"] == "X"]
        assert max(ends) == pytest.approx(document["otherData"]["us"])


def test_what_a_model_is_called_is_text_not_markup(opened: Artifact) -> None:
    found = gather_once(opened)
    found.overview["name"] = "<b>&x"
    page = Page(render(found, {view.name: "t.json" for view in found.targets}))
    assert (page.wrong, page.open) == ([], [])
    assert "<b>&x" in "".join(page.words)


def gather_once(opened: Artifact, known: list[Report] = []) -> Report:  # noqa: B006  disassembles a cubin: seconds
    if not known:
        known.append(gather(opened, SECONDS, 40.0))
    return known[0]
