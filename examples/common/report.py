"""``report.html``: what a run gave, on one page without other files."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.metrics import LABELS

STYLE = """body{font:15px sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}
figure{display:inline-block;margin:.5em;vertical-align:top}img{max-width:500px}
table{border-collapse:collapse}td{padding:.15em .8em;border-bottom:1px solid #ddd}
pre{background:#f4f4f4;padding:.6em;white-space:pre-wrap}"""


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """The page of the run in ``folder`` with the contents of its ``metrics.json``."""
    args, floors, looks = report["args"], report.get("floors", {}), report["evaluations"]
    over_time, curves = (sorted(folder.glob(name)) for name in ("*_[0-9]*.png", "loss*.png"))
    others = sorted(set(folder.glob("*.png")) - set(over_time) - set(curves))
    cost = ("steps", "seconds", "cpu_seconds", "loss_share")
    scores = [(LABELS.get(k, k), v, floors.get(k, "")) for k, v in report["metrics"].items()]
    parts = {
        "Metrics": _table([("", "this run", "real images"), *scores]),
        "Pictures": _figures(others),
        "Over time": _figures(over_time),
        "Curves": _figures(curves) + _table([*looks[:1], *map(dict.values, looks)]),
        "Cost": _table((name, report[name]) for name in cost),
        "Settings": _table([*args.items(), *report["versions"].items()]),
    }
    title = html.escape(f"{folder.name}: {args.get('data', '')} {args['preset']}")
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    command = f"<h1>{title}</h1><pre>{html.escape(args['command'])}</pre>"
    body = "\n".join(f"<h2>{name}</h2>{part}" for name, part in parts.items() if part)
    (folder / "report.html").write_text(f"{head}{command}\n{body}\n", encoding="utf-8")


def _figures(paths: Iterable[Path]) -> str:
    figure = "<figure><figcaption>{}</figcaption><img src='data:image/png;base64,{}'></figure>"
    data = ((path.stem, base64.b64encode(path.read_bytes()).decode()) for path in paths)
    return "\n".join(figure.format(*named) for named in data)


def _table(rows: Iterable[Iterable[Any]]) -> str:
    lines = ["".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if lines else ""


def _cell(value: Any) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
