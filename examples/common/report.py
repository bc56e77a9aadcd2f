"""``report.html``: what a run gave, on one page without other files."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.metrics import LABELS

STYLE = """body{font:15px sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}
figure{display:inline-block;margin:.5em;vertical-align:top}img{max-width:500px}
table{border-collapse:collapse}
td,th{padding:.15em .8em;text-align:left;border-bottom:1px solid #ddd}
pre{background:#f4f4f4;padding:.6em;white-space:pre-wrap}"""
SHOWN_SEPARATELY = {"command", "resume", "stop_at"}


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """The page of the run in ``folder`` with the contents of its ``metrics.json``."""
    args = report["args"]
    over_time = sorted(folder.glob("*_[0-9]*.png"))
    curves = sorted(folder.glob("loss*.png"))
    others = sorted(set(folder.glob("*.png")) - set(over_time) - set(curves))
    share = report.get("loss_share")
    cost = [
        ("steps", report["steps"]),
        ("seconds", report["seconds"]),
        ("CPU seconds", report["cpu_seconds"]),
        ("share of a step spent in the loss", "not measured" if share is None else f"{share:.1%}"),
    ]
    floors = report.get("floors", {})
    scores = [
        (LABELS.get(key, key), _number(value), _number(floors.get(key, "")))
        for key, value in report["metrics"].items()
    ]
    parts = [
        f"<pre>{html.escape(args['command'])}</pre>",
        "<h2>Metrics</h2>",
        _table(("", "this run", "real images"), scores),
        "<h2>Pictures</h2>",
        *map(_figure, others),
        "<h2>Over time</h2>" if over_time else "",
        *map(_figure, over_time),
        "<h2>Curves</h2>",
        *map(_figure, curves),
        _evaluations(report["evaluations"]),
        "<h2>Cost</h2>",
        _table(("", ""), cost),
        "<h2>Settings</h2>",
        _table(("", ""), [(k, v) for k, v in args.items() if k not in SHOWN_SEPARATELY]),
        _table(("", ""), report["versions"].items()),
    ]
    title = html.escape(f"{folder.name}: {args.get('data', '')} {args['preset']}")
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    body = "\n".join(filter(None, parts))
    (folder / "report.html").write_text(f"{head}<h1>{title}</h1>\n{body}\n", encoding="utf-8")


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f"<img src='data:image/png;base64,{data}'>"
    return f"<figure><figcaption>{path.stem}</figcaption>{image}</figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr>"] if any(header) else []
    for row in rows:
        lines.append(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _evaluations(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    names = list(entries[0])
    return _table(names, [[_number(entry.get(name, "")) for name in names] for entry in entries])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
