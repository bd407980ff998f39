"""Uses the chat page in a browser: an answer streams in, one is stopped, conversations stay, nothing foreign is loaded.

Usage: page.py WINDLASS MODEL [FOLDER]. Needs playwright and Debian's chromium; screenshots go to FOLDER.
"""

import sys
from pathlib import Path

from playwright.sync_api import Page, Route, expect, sync_playwright

from server import running


def on_and_on(route: Route) -> None:
    """Lets a request pass, asking for an answer that does not end by itself."""
    route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})


def use(page: Page, url: str, shots: Path | None) -> None:
    """The whole way through the page."""
    foreign = []
    page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith((url, "data:")) else None)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    # Whether a tiny model has anything to say is its own; the test's answers must not be empty.
    page.route("**/v1/chat/completions", on_and_on)
    page.goto(url)
    expect(page.locator("#model")).to_have_text("tiny")
    page.locator("summary").click()
    page.get_by_label("Most tokens of an answer").fill("60")
    page.get_by_label("Seed").fill("1")
    page.get_by_label("Message", exact=True).fill("Once there was one.")
    page.keyboard.press("Enter")
    expect(page.locator(".tally")).to_contain_text("tokens/s", timeout=20_000)
    said = page.locator("article.assistant div").first.inner_text()
    assert said.strip(), "the answer is empty"
    if shots:
        shots.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=shots / "light.png")
    page.get_by_label("Light or dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    if shots:
        page.screenshot(path=shots / "dark.png")
    # What an answer says is never markup.
    page.get_by_label("Message", exact=True).fill("<img src=x onerror=alert(1)> `code`")
    page.keyboard.press("Enter")
    expect(page.locator(".tally")).to_have_count(2, timeout=20_000)
    assert page.locator("article img").count() == 0
    # An answer that does not come is given up.
    page.route("**/v1/chat/completions", lambda route: None)
    page.get_by_label("Message", exact=True).fill("stop")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".tally").last).to_have_text("stopped")
    page.reload()
    assert page.locator("nav li").count() == 1
    page.locator("nav li button").first.click()
    expect(page.locator("article.assistant")).to_have_count(3)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".empty")).to_be_visible()
    page.set_viewport_size({"width": 390, "height": 780})
    if shots:
        page.screenshot(path=shots / "small.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    assert not foreign, foreign
    assert not problems, problems


def main() -> None:
    shots = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    with running(sys.argv[1], sys.argv[2], key=None) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        use(browser.new_page(), url, shots)
        browser.close()
    print("page: as Chromium has it")


if __name__ == "__main__":
    main()
