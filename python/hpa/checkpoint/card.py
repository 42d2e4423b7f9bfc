"""What goes with an edited checkpoint for people: a section of its model card, and one page with the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hpa.report.markup import NOTHING, Child, Html, el, join, short_number

__all__ = ["write_card", "write_report"]

_BEGIN, _END = "<!-- hpa: begin -->", "<!-- hpa: end -->"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("p", "p, %", "share of columns the rule may put back at this depth"),
    ("kept", "Kept", "columns put back"),
    ("overlap", "Overlap", "columns in focus of both safety and task"),
    ("alpha", "Alpha", "balance coefficient"),
    ("projection", "c", "coefficient of the orthogonal adjustment"),
    ("kept_change_share", "Change undone", "share of the squared change that the kept columns held"),
    ("update_left", "Update left", "share of the squared update that is left"),
    (
        "kept_inputs_change_left",
        "Safety change left",
        "of the update's effect on safety and memory inputs, what is left",
    ),
    ("task_change_lost", "Task change lost", "of the update's effect on the task's inputs, what is lost"),
    ("change_norm", "Change", "Frobenius norm of the update before the edit"),
)


def write_card(existing: bytes, summary: Mapping[str, Any]) -> str:
    """The model card's text: the one of the tuned model, or none, with a section on this edit at its end."""
    text = existing.decode("utf-8")
    if _BEGIN in text and _END in text:
        text = text[: text.index(_BEGIN)] + text[text.index(_END) + len(_END) :]
    if not text.strip():
        text = "---\nlibrary_name: transformers\n---\n\n# Edited checkpoint\n"
    edits = [edit for edit in summary["layers"] if "skipped" not in edit]
    kept = [edit["kept"] / edit["cols"] for edit in edits if "kept" in edit and edit["cols"]]
    left = [edit["update_left"] for edit in edits if "update_left" in edit]
    lines = [
        _BEGIN,
        "## Safety edit after fine-tuning",
        "",
        (
            f"The weights were edited by `hpa` {summary['hpa']} with the method `{summary['method']}` "
            "(Harmonious Parameter Adaptation, arXiv 2511.20158, and relatives): the update of a fine-tuning is held "
            "back where it disturbs what the model knew about refusing harmful requests."
        ),
        "",
        f"- before the fine-tuning: `{Path(summary['before']).name}`; after it: `{Path(summary['after']).name}`",
        f"- layers edited: {len(edits)} of {len(summary['layers'])} linear layers in {summary['blocks']} blocks",
    ]
    if kept:
        lines.append(f"- columns put back: {100 * sum(kept) / len(kept):.1f} % on average")
    if left:
        lines.append(f"- squared update left: {100 * sum(left) / len(left):.1f} % on average")
    for role, data in summary["statistics"].items():
        lines.append(f"- {role} set: {data.get('samples', '?')} samples of `{data.get('file', '?')}`")
    options = ", ".join(
        f"{key}={value}" for key, value in summary["options"].items() if isinstance(value, (int, float, str))
    )
    lines += [
        f"- options: {options or 'none'}",
        "",
        (
            "Numbers for each layer are in `hpa.json` and `report.html`; checksums are in `hpa-manifest.json`. An edit "
            "makes a model safer than its fine-tuning left it, not safe: test it on your own requests."
        ),
        _END,
        "",
    ]
    return text.rstrip("\n") + "\n\n" + "\n".join(lines)


def write_report(summary: Mapping[str, Any]) -> str:
    """One self-contained page: what was done to which layer and tensor."""
    edits: Sequence[Mapping[str, Any]] = summary["layers"]
    done = [edit for edit in edits if "skipped" not in edit]
    body = el(
        "main",
        el("h1", f"{Path(summary['after']).name}, edited by {summary['method']}"),
        el(
            "p",
            f"{len(done)} of {len(edits)} linear layers in {summary['blocks']} decoder blocks were edited. "
            f"Before: {summary['before']}. After: {summary['after']}.",
        ),
        _chart(done, "kept", "Columns put back, share of each block", lambda edit: edit["kept"] / max(1, edit["cols"])),
        _chart(done, "update_left", "Squared update left, mean of each block", lambda edit: edit["update_left"]),
        _chart(
            done,
            "kept_change_share",
            "Squared change undone, mean of each block",
            lambda edit: edit["kept_change_share"],
        ),
        el("h2", "Layers"),
        _layers(edits),
        el("h2", "Settings"),
        _pairs({"method": summary["method"], **summary["options"]}),
        [
            (el("h2", f"Calibration: {role} set"), _pairs({**data, **summary["calibration"].get(role, {})}))
            for role, data in summary["statistics"].items()
        ],
        el("h2", "Tensors"),
        _fates(summary["tensors"]),
        el("h2", "Files not copied") if summary["files_not_copied"] else None,
        _pairs(summary["files_not_copied"]) if summary["files_not_copied"] else None,
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"hpa adapt: {Path(summary['after']).name}"),
        el("style", Html(resources.files("hpa.checkpoint").joinpath("page.css").read_text(encoding="utf-8"))),
    )
    return "<!DOCTYPE html>\n" + el("html", head, el("body", body), lang="en") + "\n"


def _chart(edits: Sequence[Mapping[str, Any]], key: str, title: str, value: Any) -> Child:
    """Bars, one a decoder block: the mean over its layers."""
    blocks: dict[int, list[float]] = {}
    for edit in edits:
        if key in edit:
            blocks.setdefault(int(edit["block"]), []).append(float(value(edit)))
    if not blocks:
        return None
    means = {block: sum(values) / len(values) for block, values in sorted(blocks.items())}
    top = max(*means.values(), 1e-9)
    width, height, left = 720.0, 150.0, 44.0
    step = (width - left) / len(means)
    bars = []
    for index, (block, mean) in enumerate(means.items()):
        tall = mean / top * (height - 20)
        bars.append(
            el(
                "rect",
                el("title", f"block {block}: {100 * mean:.1f} %"),
                x=left + index * step + step * 0.1,
                y=height - tall,
                width=step * 0.8,
                height=tall,
                class_="bar",
            )
        )
    every = max(1, len(means) // 16)
    labels = [
        el("text", str(block), x=left + (index + 0.5) * step, y=height + 14, class_="tick")
        for index, block in enumerate(means)
        if index % every == 0
    ]
    drawing = el(
        "svg",
        el("line", x1=left, y1=height, x2=width, y2=height, class_="axis"),
        el("text", f"{100 * top:.0f} %", x=left - 6, y=24, class_="scale"),
        el("text", "0", x=left - 6, y=height, class_="scale"),
        bars,
        labels,
        viewBox=f"0 0 {width:.0f} {height + 20:.0f}",
        role="img",
    )
    return el("figure", el("figcaption", title), drawing)


def _layers(edits: Sequence[Mapping[str, Any]]) -> Html:
    shown = [column for column in _COLUMNS if any(column[0] in edit for edit in edits)]
    head = el("tr", el("th", "Layer"), el("th", "Size"), [el("th", name, title=meaning) for _, name, meaning in shown])
    rows = []
    for edit in edits:
        cells: list[Child] = [el("td", edit["name"]), el("td", f"{edit['rows']} x {edit['cols']}")]
        if "skipped" in edit:
            cells.append(el("td", f"left as trained: {edit['skipped']}", colspan=str(max(1, len(shown)))))
        else:
            cells += [el("td", _number(edit.get(key))) for key, _, _ in shown]
        rows.append(el("tr", cells))
    return el("div", el("table", el("thead", head), el("tbody", rows)), class_="wide")


def _fates(tensors: Sequence[Mapping[str, str]]) -> Html:
    counts: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        counts.setdefault((tensor["fate"], tensor["reason"]), []).append(tensor["name"])
    rows = [
        el("tr", el("td", fate), el("td", reason), el("td", str(len(names))), el("td", _some(names)))
        for (fate, reason), names in sorted(counts.items())
    ]
    head = el("tr", el("th", "Fate"), el("th", "Reason"), el("th", "Tensors"), el("th", "Among them"))
    return el("div", el("table", el("thead", head), el("tbody", rows)), class_="wide")


def _pairs(values: Mapping[str, Any]) -> Html:
    return el("table", el("tbody", [el("tr", el("th", key), el("td", str(value))) for key, value in values.items()]))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _number(value: Any) -> Child:
    if value is None:
        return NOTHING
    if isinstance(value, (int, str)):
        return str(value)
    return join(short_number(value, 4))
