"""Checks the built site: ``python docs/check.py docs/_build``, which ``make docs`` ends with.

Every internal link and its anchor lead somewhere, and nothing is loaded from the network. Where a
Chromium is installed it draws each page at the width of a desktop and of a phone: no picture is
missing, and nothing leaves the window that does not scroll.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

WIDTHS = {"desktop": 1280, "phone": 390}

# Draws the pages one after the other in a frame and leaves what it found in its title.
DRAW = r"""<body><script>
const found = [];
async function draw(page, name, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
  const drawn = new Promise(done => frame.onload = done);
  frame.src = page;
  document.body.append(frame);
  await drawn;
  const shown = frame.contentDocument;
  for (const image of shown.images)
    if (image.complete && !image.naturalWidth) found.push(`${page}: ${image.src} is not drawn`);
  const view = frame.contentWindow;
  const scrolls = box => box.localName != "article" && (
    /auto|scroll/.test(view.getComputedStyle(box).overflowX) || scrolls(box.parentElement));
  const leaves = box => box.getBoundingClientRect().right > width + 1 && !scrolls(box);
  for (const box of shown.querySelectorAll("article *"))
    if (leaves(box) && !leaves(box.parentElement))
      found.push(`${page}: ${box.localName}.${box.className} is too wide for a ${name}: `
                 + box.textContent.trim().slice(0, 60).replace(/\s+/g, " "));
  frame.remove();
}
(async () => {
  for (const page of PAGES)
    for (const [name, width] of Object.entries(WIDTHS)) await draw(page, name, width);
  document.title = "drawn";
  document.body.textContent = JSON.stringify(found);
})();
</script></body>"""


class Page(HTMLParser):
    """The ids of a page, and what it links to and loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        loads = tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload")
        if "src" in given or loads:
            self.loaded.append(given["src"] if "src" in given else given["href"])


def dead_links(site: Path) -> list[str]:
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        found += [
            f"{name}: loads {url} from the network"
            for url in page.loaded
            if re.match(r"(https?:)?//", url)
        ]
        for link in {*page.links, *page.loaded}:
            target, anchor = urldefrag(link)
            if re.match(r"[a-z]+:|//", target):
                continue
            to = (path.parent / unquote(target.split("?")[0])).resolve() if target else path
            missing = to in pages and anchor and unquote(anchor) not in pages[to].ids
            if not to.exists() or missing:
                found.append(f"{name}: {link} leads nowhere")
    return found


def badly_drawn(site: Path, browser: str) -> list[str]:
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))

    class Server(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/draw":
                return super().do_GET()
            values = {"PAGES": pages, "WIDTHS": WIDTHS}
            script = re.sub("PAGES|WIDTHS", lambda name: json.dumps(values[name[0]]), DRAW)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(script.encode())
            return None

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Server, directory=site)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/draw"
        run = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        run += ["--virtual-time-budget=600000", address]
        drawn = subprocess.run(run, capture_output=True, text=True, timeout=300).stdout
        server.shutdown()
    result = re.search(r"<body>(\[.*\])</body>", drawn, re.DOTALL)
    if "<title>drawn" not in drawn or not result:
        return [f"{browser} did not draw the pages: {drawn[-300:]!r}"]
    return list(json.loads(html.unescape(result[1])))


def main() -> int:
    site = Path(sys.argv[1])
    found = dead_links(site)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser:
        found += badly_drawn(site, browser)
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
