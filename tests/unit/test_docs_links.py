"""Links from one document to another lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)")


def test_every_link_between_documents_leads_somewhere() -> None:
    links = [(document, link) for document in DOCUMENTS for link in LINK.findall(document.read_text(encoding="utf-8"))]
    assert len(links) > 20
    lost = [f"{document.name}: {link}" for document, link in links if not (document.parent / link).exists()]
    assert lost == []
