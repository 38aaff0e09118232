"""README.md and docs: links that lead somewhere, and a README short enough to be read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if not link.startswith("http")]
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_a_screen_and_a_half():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1500


def test_flags_that_pages_name_are_flags_of_a_script():
    scripts = [*ROOT.glob("*.py"), *(ROOT / "benchmark").glob("*.py")]
    known = set(re.findall(r"^    (\w+): ", "\n".join(script.read_text() for script in scripts), re.MULTILINE))
    others = "help logdir cuda target_kl no_deps nproc_per_node rl_library algo env conf_file agent max_iterations gpu_ids"
    others = set(others.split())
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]+)", page.read_text()):
            name = flag.replace("-", "_")
            assert {name, name.removeprefix("no_")} & (known | others), f"{page.name}: --{flag}"
