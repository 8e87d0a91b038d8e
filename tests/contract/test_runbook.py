"""The runbook has an entry for every reason, and every link in docs/ leads somewhere."""

import re
from pathlib import Path

import pytest

from tunesmith_api.keys import Reason

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = ROOT / "docs/runbook"
PAGES = sorted(path for path in RUNBOOK.glob("*.md") if path.name != "README.md")
# [text](target); targets on the web are not looked at
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)")


def entries():
    for page in PAGES:
        for part in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]:
            reason, _, text = part.partition("\n")
            yield page, reason.strip(), text


def test_every_reason_has_one_entry_and_no_entry_is_of_no_reason():
    documented = [reason for _, reason, _ in entries()]
    assert sorted(documented) == sorted(reason.value for reason in Reason)


def sources():
    for folder in ("operator", "trainer_image"):
        yield from (path.read_text() for path in (ROOT / folder).rglob("*.py"))


def test_none_is_promised_that_nothing_ever_says():
    code = "\n".join(sources())
    assert [reason for reason in Reason if not re.search(rf"\bReason\.{reason.name}\b", code)] == []


@pytest.mark.parametrize("reason", [reason.value for reason in Reason])
def test_the_entry_says_what_it_means_how_to_see_it_and_what_to_do(reason):
    (text,) = [text for _, name, text in entries() if name == reason]
    for part in ("Means", "See", "Do"):
        found = re.search(rf"\*\*{part}\.\*\* (.+)", text)
        assert found, f"{reason} lacks {part}"
        assert len(found[1]) > 7, f"{reason}: {part}"


def test_the_index_leads_to_every_entry():
    links = set(re.findall(r"\]\((\w+\.md#\w+)\)", (RUNBOOK / "README.md").read_text()))
    assert links == {f"{page.name}#{reason.lower()}" for page, reason, _ in entries()}


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path}"
        if anchor and target.suffix == ".md":
            assert anchor[1:] in anchors(target), f"{page.name}: {path}{anchor}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    named = re.findall(r"\b(?:manifests|charts|crds|operator|trainer_image|tests|docs)/[\w./-]*\w", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]
