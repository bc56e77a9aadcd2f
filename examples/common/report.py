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
    args, share, floors = report["args"], report.get("loss_share"), report.get("floors", {})
    looks: Sequence[dict[str, Any]] = report["evaluations"]
    over_time, curves = (sorted(folder.glob(name)) for name in ("*_[0-9]*.png", "loss*.png"))
    others = sorted(set(folder.glob("*.png")) - set(over_time) - set(curves))
    cost = {
        "steps": report["steps"],
        "seconds": report["seconds"],
        "CPU seconds": report["cpu_seconds"],
        "share of a step spent in the loss": "not measured" if share is None else f"{share:.1%}",
    }
    scores = [(LABELS.get(k, k), v, floors.get(k, "")) for k, v in report["metrics"].items()]
    parts = {
        "": f"<pre>{html.escape(args['command'])}</pre>",
        "Metrics": _table(scores, ("", "this run", "real images")),
        "Pictures": _figures(others),
        "Over time": _figures(over_time),
        "Curves": _figures(curves) + _table(map(dict.values, looks), *looks[:1]),
        "Cost": _table(cost.items()),
        "Settings": _table((k, v) for k, v in args.items() if k not in SHOWN_SEPARATELY)
        + _table(report["versions"].items()),
    }
    title = html.escape(f"{folder.name}: {args.get('data', '')} {args['preset']}")
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    body = "\n".join(f"<h2>{name}</h2>{part}" for name, part in parts.items() if part)
    (folder / "report.html").write_text(f"{head}<h1>{title}</h1>\n{body}\n", encoding="utf-8")


def _figures(paths: Iterable[Path]) -> str:
    figure = "<figure><figcaption>{}</figcaption><img src='data:image/png;base64,{}'></figure>"
    data = ((path.stem, base64.b64encode(path.read_bytes()).decode()) for path in paths)
    return "\n".join(figure.format(*named) for named in data)


def _table(rows: Iterable[Iterable[Any]], header: Iterable[str] = ()) -> str:
    lines = [_row("th", header), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>" if any(lines) else ""


def _row(tag: str, cells: Iterable[Any]) -> str:
    texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
    row = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
    return f"<tr>{row}</tr>" if row else ""
