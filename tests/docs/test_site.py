"""Links and anchors of every page lead somewhere, and the site builds without a warning where Zensical is installed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import DOCS, ROOT, Page, all_pages, navigation, read_page

LINK = re.compile(r"(?<!`)!?\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")
HTML_LINK = re.compile(r"""(?:src|href)=["']([^"'#]+)(?:#([^"']*))?["']""")


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a Markdown text, as GitHub and Zensical both name those that these pages have."""
    without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = set()
    for title in re.findall(r"^#+ (.+)$", without_blocks, re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", title.replace("`", "").lower())
        found.add(re.sub(r"\s", "-", plain.strip()))
    return found


def broken_links(page: Page) -> Iterator[str]:
    for target in LINK.findall(page.prose):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        if not path.exists():
            yield f"{page.name}: {target} does not exist"
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            yield f"{page.name}: {target} has no such heading"


def test_the_checker_finds_broken_links() -> None:
    text = "# A page\n\n[x](data.md) [y](nowhere.md) [w](data.md#packing) [v](data.md#b) ![p](pictures/none.svg)\n"
    broken = [fault.split()[1] for fault in broken_links(Page(DOCS / "index.md", text))]
    assert broken == ["nowhere.md", "data.md#b", "pictures/none.svg"]
    assert anchors("# A `page` of 2, or so\n```\n# no heading\n```\n") == {"a-page-of-2-or-so"}


@pytest.mark.parametrize("page", [*all_pages(), read_page("CHANGELOG.md")], ids=lambda page: page.name)
def test_links_and_anchors(page: Page) -> None:
    assert list(broken_links(page)) == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from a copy of docs/, since Zensical keeps a cache beside its settings."""
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("Zensical is not installed; pip install 'lumina-ds[docs]' brings it")
    copy = tmp_path_factory.mktemp("site") / "docs"
    shutil.copytree(DOCS, copy, ignore=shutil.ignore_patterns(".cache", "site"))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(copy / "zensical.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arning" not in done.stdout + done.stderr, done.stdout + done.stderr
    return copy / "site"


@pytest.mark.slow
def test_the_site_has_every_page(site: Path) -> None:
    built = {path.name for path in site.glob("*.html")} - {"404.html"}
    assert built == {name.replace(".md", ".html") for name in navigation()}


@pytest.mark.slow
def test_links_of_the_built_site(site: Path) -> None:
    """Every file that a built page names is there, and every anchor."""
    broken, seen = [], 0
    for page in sorted(site.glob("*.html")):
        for target, anchor in HTML_LINK.findall(page.read_text(encoding="utf-8")):
            if re.match(r"\w+:|//", target) or page.name == "404.html":
                continue
            seen += 1
            path = (page.parent / target).resolve()
            path = path / "index.html" if path.is_dir() else path
            if not path.exists():
                broken.append(f"{page.name}: {target}")
            elif anchor and path.suffix == ".html" and f'id="{anchor}"' not in path.read_text(encoding="utf-8"):
                broken.append(f"{page.name}: {target}#{anchor}")
    assert broken == [] and seen > 500


@pytest.mark.slow
def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("Zensical is not installed; pip install 'lumina-ds[docs]' brings it")
    settings = '[project]\nsite_name = "x"\ndocs_dir = "."\nsite_dir = "site"\nnav = [{ "A" = "index.md" }]\n'
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/zensical.toml").write_text(settings)
    (tmp_path / "docs/index.md").write_text("# A\n\n[b](nowhere.md)\n")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(tmp_path / "docs/zensical.toml")]
    assert subprocess.run(command, capture_output=True, timeout=120, cwd=ROOT).returncode != 0
