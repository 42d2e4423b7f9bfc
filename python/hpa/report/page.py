"""The report of a run as one self-contained HTML page.

No script, no external resource: style and drawings are inline, pictures are data URLs, and a content security policy
in the page forbids everything else, so it reads the same offline, in an archive and in an e-mail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from hpa.report import tables
from hpa.report.events import Run, load_run
from hpa.report.figures import (
    Style,
    drawn,
    glance,
    kept_columns,
    legend,
    safety_over_time,
    skill_over_time,
    styles_of,
    task_over_time,
    trade_off,
)
from hpa.report.layers import LayerMeans, block_shares, layer_means
from hpa.report.markup import Child, Html, el, join
from hpa.report.samples import Sample, gather_samples, picture
from hpa.report.story import control_sentences, headline, lead_sentences, missing, task_count
from hpa.report.summary import METRICS, Group, groups
from hpa.storage import write_file

__all__ = ["build_report", "figure_for_readme"]

_README_LABELS = 6
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def build_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder, from its event lines alone, and return its path.

    A run that is not finished gives a report that says at the top what is missing.  The page is written beside and
    renamed, so a reader never meets half of one.

    Raises:
        FileNotFoundError: if the folder holds no ``events.jsonl``.
    """
    run = load_run(run_dir)
    path = run.folder / "report.html"
    write_file(path, "<!DOCTYPE html>\n" + _page(run) + "\n")
    return path


def figure_for_readme(
    run_dir: str | Path, path: str | Path, condition: str | None = None, labels: Sequence[str] | None = None
) -> Path:
    """Write one small drawing: safety over time, and the trade-off between safety and forgetting.

    The SVG carries its own style, in light and dark, and needs nothing else.

    Args:
        path: where to, a name that ends in ``.svg``.
        condition: the condition to draw; the first one unless named.
        labels: the rows to draw; the first of each method and a few controls unless named.

    Raises:
        FileNotFoundError: if the folder holds no ``events.jsonl``.
        ValueError: if ``path`` is no ``.svg``, or the run has no such condition or label.
    """
    run, target = load_run(run_dir), Path(path)
    if target.suffix != ".svg":
        raise ValueError(f"path: expected a name that ends in .svg, got {target.name!r}")
    chosen = run.condition(condition)
    known = [group.label for group in groups(run, chosen)]
    for label in labels or ():
        if label not in known:
            raise ValueError(f"labels: expected some of {known}, got {label!r}")
    shown = labels if labels is not None else [group.label for group in drawn(run, chosen, _README_LABELS)]
    styles = styles_of(run)
    left = safety_over_time(run, chosen, styles, 470, 300, shown)
    right = trade_off(run, chosen, styles, "BWT", 390, 300, shown)
    drawing = el(
        "svg",
        el("title", headline(run)),
        el("style", Html(_style("plot.css"))),
        el("rect", width="920", height="356", rx="6", style="fill:var(--paper)"),
        el("text", "Attacks that succeed, after each task", x="16", y="28", class_="head"),
        el("text", "Attacks that succeed, against forgetting", x="508", y="28", class_="head"),
        el("g", _inline(left, 16, 40, 470, 300)),
        el("g", _inline(right, 508, 40, 390, 300)),
        xmlns="http://www.w3.org/2000/svg",
        viewBox="0 0 920 356",
        width="920",
        height="356",
        role="img",
    )
    write_file(target, drawing + "\n")
    return target


def _page(run: Run) -> Html:
    styles = styles_of(run)
    sections = [
        ("results", "Results", "Results", _results(run, styles)),
        ("safety", "Safety", "Safety over the sequence", _safety(run, styles)),
        ("trade-off", "Trade-off", "Safety against skill", _trade(run, styles)),
        ("tasks", "Tasks", "Each task over the sequence", _tasks(run, styles)),
        ("answers", "Answers", "Answers before and after", _samples(run)),
        ("edit", "The edit", "Inside the edit", _layers(run)),
        ("reading", "How to read", "How to read this page", _reading(run)),
        ("provenance", "Provenance", "Where the numbers come from", _provenance(run)),
    ]
    shown = [section for section in sections if section[-1] is not None]
    body = el(
        "div",
        el(
            "header",
            el("p", f"Run “{run.name}”", class_="kicker"),
            el("h1", headline(run)),
            el("p", " ".join(lead_sentences(run)), class_="lead") if run.conditions else None,
            _missing(run),
            _facts(run),
            el("nav", [el("a", short, href=f"#{key}") for key, short, _, _ in shown], aria_label="Sections"),
        ),
        el(
            "main",
            [
                el("section", el("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
                for key, _, title, content in shown
            ],
            id="main",
        ),
        el("footer", el("p", f"Made from {run.events} event lines of this run by hpa-ext.", class_="quiet")),
        class_="page",
    )
    return el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("meta", name="color-scheme", content="light dark"),
            el("title", f"{run.name}: what was learned, forgotten and kept safe"),
            el("link", rel="icon", href="data:,"),
            el("style", Html(_style("plot.css") + _style("page.css"))),
        ),
        el("body", el("a", "Skip to the results", href="#main", class_="skip"), body),
        lang="en",
    )


def _facts(run: Run) -> Html:
    """What was run, in a few short pairs."""
    info = run.info
    judge = info.get("judge")
    told_judge = (
        " ".join(str(judge[key]) for key in ("name", "version") if key in judge)
        if isinstance(judge, Mapping)
        else judge
    )
    labels = {branch.label: branch.control for branch in run.branches}
    controls = sum(labels.values())
    pairs: list[tuple[str, Any]] = [
        ("Scenario", info.get("scenario")),
        ("Model", info.get("model")),
        ("Tasks, in this order", ", ".join(run.tasks)),
        ("Base skills", ", ".join(run.base_tasks)),
        ("Conditions", ", ".join(run.conditions)),
        (
            "Methods",
            f"{len(labels) - controls}, and {controls} control{'' if controls == 1 else 's'}" if labels else None,
        ),
        ("Seeds", ", ".join(str(seed) for seed in run.seeds)),
        ("Judge of refusals", told_judge),
        ("Machine", info.get("machine")),
        ("Versions", _versions(run)),
        ("Date", _date(info.get("created"))),
    ]
    return el("dl", [el("div", el("dt", name), el("dd", str(value))) for name, value in pairs if value], class_="facts")


def _versions(run: Run) -> str | None:
    versions = run.info.get("versions")
    return (
        ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, Mapping) else None
    )


def _missing(run: Run) -> Html | None:
    gaps = missing(run)
    if not gaps:
        return None
    return el(
        "div",
        el("h2", "This run is not complete"),
        el("ul", [el("li", gap) for gap in gaps]),
        class_="missing",
        role="note",
        aria_label="What is missing",
    )


def _results(run: Run, styles: Mapping[str, Style]) -> Html | None:
    if not run.conditions:
        return None
    parts: list[Child] = [
        _prose(
            """
            AP is skill on all tasks at the end, BWT what became of earlier tasks (negative: forgotten), MASR the share
            of harmful requests that got through. Arrows show which way is better; the best mean of a column is bold.
            """
        )
    ]
    for condition in run.conditions:
        parts.append(_part_title(run, condition))
        parts.append(tables.summary_html(run, condition, styles))
        sentences = control_sentences(run, condition)
        if sentences:
            parts.append(el("p", el("b", "What the controls allow. "), " ".join(sentences)))
        parts.append(
            _figure(
                _glance(run, condition, styles),
                "Small marks are seeds, the large one is their mean. ",
                el("span", class_="dot"),
                "The dotted line is the aligned model; open grey marks are controls.",
            )
        )
        difference = tables.difference_table(run, condition)
        details = [difference, tables.set_table(run, condition, styles)]
        parts.append(el("details", el("summary", f"Differences, and each safety set by itself ({condition})"), details))
    parts.append(el("details", el("summary", "Every sequence by itself"), tables.seed_table(run)))
    start = tables.alignment_table(run)
    if start is not None:
        parts += [el("h3", "Before the first task"), start]
    return join(*parts)


def _glance(run: Run, condition: str, styles: Mapping[str, Style]) -> Html:
    keys = ("AP", "BWT", "MASR", "base_skill")
    return join(
        el("div", glance(run, condition, styles, keys, 1072, 4), class_="wide big"),
        el("div", glance(run, condition, styles, keys, 350, 2), class_="narrow big"),
    )


def _safety(run: Run, styles: Mapping[str, Style]) -> Html | None:
    if not any(branch.evaluations for branch in run.branches):
        return None
    return join(
        _key(run, styles),
        _figure(
            _per_condition(run, lambda name, width: safety_over_time(run, name, styles, width, 0.66 * width), 520),
            "Share of held-out harmful requests that got through after each task (MASR, lower is better): the mean "
            "over seeds, with the range of the seeds as a band for the methods. ",
            el("span", class_="dot"),
            "The dotted line is the aligned model all sequences start from.",
        ),
    )


def _key(run: Run, styles: Mapping[str, Style]) -> Html:
    """The key to the figures over time, and a word on the labels they have no room for."""
    shown = {group.label for condition in run.conditions for group in drawn(run, condition)}
    keys = legend({label: style for label, style in styles.items() if label in shown})
    left_out = [label for label in styles if label not in shown]
    if not left_out or not shown:
        return keys
    note = "For want of room these are in the tables and in the plots against MASR only: "
    return join(keys, el("p", note, "; ".join(left_out), ".", class_="quiet"))


def _trade(run: Run, styles: Mapping[str, Style]) -> Html | None:
    if not any(run.complete(branch) for branch in run.branches):
        return None
    return join(
        _figure(
            _per_condition(run, lambda name, width: trade_off(run, name, styles, "BWT", width, 0.78 * width), 520),
            "Each small mark is one seed, the large one its method's mean. Right: earlier tasks are remembered. "
            "Down: harmful requests are refused. The lower right corner is the place to be.",
        ),
        _figure(
            _per_condition(run, lambda name, width: trade_off(run, name, styles, "AP", width, 0.78 * width), 520),
            "The same against AP, the skill on all tasks at the end: a method that learns nothing forgets nothing "
            "either, and shows it here.",
        ),
    )


def _tasks(run: Run, styles: Mapping[str, Style]) -> Html | None:
    if not any(branch.evaluations for branch in run.branches):
        return None
    numbers = ", ".join(f"{number} {task}" for number, task in enumerate(run.tasks, start=1))
    parts: list[Child] = [_key(run, styles)]
    for condition in run.conditions:
        parts.append(_part_title(run, condition))
        parts.append(
            _figure(
                el("div", _task_panels(run, condition, styles), class_="small"),
                f"Accuracy in percent after each step of the sequence ({numbers}). The dot at 0 is the aligned "
                "model, before any task; a line begins when its task has just been learned. Bands are the range of the "
                "seeds.",
            )
        )
        parts.append(
            el(
                "details",
                el("summary", f"Accuracy matrix of every method ({condition})"),
                _prose(
                    """
                    A row after each task, a column a task, in percent, mean over seeds. Read a column downward to see
                    what became of a task; the last row is the final model, and its mean is AP.
                    """,
                    "quiet",
                ),
                tables.accuracy_matrices(run, condition),
                open="" if condition == run.conditions[0] else None,
            )
        )
    return join(*parts)


def _task_panels(run: Run, condition: str, styles: Mapping[str, Style]) -> list[Html]:
    """A panel a task, then the mean of the tasks so far and the base skills."""
    panels = []
    for index in range(len(run.tasks)):
        panels.append(
            _both(lambda width, index=index: task_over_time(run, condition, styles, index, width), 250, 165)  # type: ignore[misc]
        )
    for key in ("AP", "base_skill"):
        panels.append(
            _both(lambda width, key=key: skill_over_time(run, condition, styles, key, width), 250, 165)  # type: ignore[misc]
        )
    return [el("div", panel) for panel in panels]


def _samples(run: Run) -> Html | None:
    parts: list[Child] = []
    titles = {"task": "Tasks", "base": "Base skills", "safety": "Harmful requests", "benign": "Benign look-alikes"}
    for condition in run.conditions:
        found = gather_samples(run, condition)
        if found is None:
            continue
        cards: list[Html] = []
        for family in dict.fromkeys(sample.family for sample in found.samples):
            cards.append(el("h4", titles.get(family, family)))
            members = [_card(run, sample) for sample in found.samples if sample.family == family]
            cards.append(el("div", members, class_="cards"))
        note = _prose(
            f"""
            Seed {found.seed}, {len(found.samples)} of {found.stored} stored samples: the first of each kind, not
            chosen by how they came out.
            """,
            "quiet",
        )
        if len(run.conditions) == 1:
            parts += [note, *cards]
        else:
            open_ = None if parts else ""
            parts.append(el("details", el("summary", f"Condition: {condition}"), note, cards, open=open_))
    intro = _prose(
        """
        The same prompt, asked of the aligned model and of each method's final model. A check mark means the answer is
        what one wants: right, a harmful request refused, a harmless one answered.
        """
    )
    return join(intro, *parts) if parts else None


def _card(run: Run, sample: Sample) -> Html:
    source = picture(run, sample.image) if sample.image else None
    name = sample.set_name.replace("_", " ")
    if source:
        shown = el("img", src=source, alt=f"picture of the sample: {name}", width="68", height="68")
    else:
        shown = el("div", "picture missing" if sample.image else "text only", class_="noimage")
    expected = el("p", f"expected: {sample.reference}", class_="quiet") if sample.family in ("task", "base") else None
    return el(
        "article",
        el(
            "div",
            shown,
            el(
                "div",
                el("p", name, class_="quiet"),
                el("p", f"“{sample.prompt}”"),
                expected,
            ),
            class_="ask",
        ),
        el(
            "dl",
            [
                (
                    el("dt", answer.label),
                    el("dd", answer.text or "(nothing)"),
                    el("dd", _verdict(sample.family, answer.verdict), class_="verdict"),
                )
                for answer in sample.answers
            ],
        ),
        class_="card",
    )


def _verdict(family: str, verdict: str) -> Html:
    """The judge's word, marked by whether it is what one wants of this kind of request."""
    wanted = {"task": "correct", "base": "correct", "safety": "refused", "benign": "complied"}.get(family)
    words = {"complied": "answered", "empty": "said nothing"}
    good = verdict == wanted
    return el("span", f"{'✓' if good else '✗'} {words.get(verdict, verdict)}", class_="good" if good else "bad")


def _layers(run: Run) -> Html | None:
    found = [
        (group, layers)
        for condition in run.conditions
        for group in groups(run, condition)
        if not group.control and (layers := layer_means(group))
    ]
    # What chooses columns comes first: there is most to see.
    found.sort(key=lambda pair: block_shares(pair[0]) is None)
    if not found:
        return None
    intro = _prose(
        """
        What the edits did to each linear layer of the language model, as mean over tasks and seeds. The paper's rule
        puts back a share p of the columns, less the deeper the layer: first columns that only safety needs, then those
        of the overlap with the task by a balance score, whose weight alpha adapts to the layer. The projection
        coefficient is the share of the old weights found in the update, which the rule takes out. The least-squares
        rule filters the update instead, so that safety's inputs and past tasks' inputs are answered as before.
        """
    )
    return join(intro, [_layers_of(group, layers, first=not number) for number, (group, layers) in enumerate(found)])


def _layers_of(group: Group, layers: list[LayerMeans], *, first: bool) -> Html:
    shares = block_shares(group)
    chart: Html | None = None
    if shares is not None:
        chart = _figure(
            _both(
                lambda width: kept_columns(
                    shares.blocks,
                    shares.safety,
                    shares.shared,
                    shares.budget,
                    width,
                    0.5 * width if width < 400 else 210,
                ),
                620,
            ),
            el("span", class_="swatch"),
            "columns of the safety focus alone  ",
            el("span", class_="swatch pale"),
            "columns of the overlap  ",
            el("span", class_="dash"),
            "the share p that the rule allows",
        )
    maps = tables.layer_maps(layers)
    return el(
        "details",
        el("summary", f"{group.label}, {group.condition}"),
        chart,
        maps,
        el("details", el("summary", f"All {len(layers)} layers as a table"), tables.layer_table(layers)),
        open="" if first else None,
    )


def _reading(run: Run) -> Html:
    divided = "the number of all tasks" if run.info.get("bwt_denominator") == "T" else "the number of earlier tasks"
    meanings = []
    for metric in METRICS:
        more = f" The sum is divided by {divided}." if metric.key == "BWT" else ""
        meanings.append((el("dt", f"{metric.title} {metric.arrow}"), el("dd", metric.meaning, more)))
    return join(
        _prose(
            f"""
            The model was first aligned to refuse harmful requests. It then learned {task_count(run)}, one after
            another, each by fine-tuning on that task alone. After each task a method may edit the weights; then the
            tasks so far, the safety sets and the benign look-alikes are asked again, with samples that were not
            trained on.
            """
        ),
        _prose(
            """
            Plain fine-tuning edits nothing. A control edits without the idea under test: as many columns at random,
            the columns that changed most, the whole update made smaller, or simply a lower learning rate. A method
            earns a claim only in what no control does as well.
            """
        ),
        el("dl", meanings, class_="meanings"),
        _prose(
            """
            ± is the sample standard deviation over seeds, not an error of the mean. The interval beside MASR is the
            95 % Wilson interval at the number of prompts of one seed, because all seeds answer the same prompts; it
            says how far another set of prompts of this kind could move the rate. Differences are taken within a seed,
            where both methods start from the same aligned model.
            """
        ),
        _prose(
            """
            A refusal is what the judge named above calls one: it looks for words. Rates from other judges or other
            prompts cannot be compared with these. An empty answer counts as answered and is counted apart.
            """
        ),
    )


def _provenance(run: Run) -> Html:
    return join(
        _prose(
            f"""
            Everything on this page is computed from events.jsonl in the folder of the run ({run.events} events);
            nothing is typed in by hand.
            """
        ),
        el("details", el("summary", "Settings of each method"), tables.method_table(run)) if run.branches else None,
        el("details", el("summary", "Time"), time) if (time := tables.time_table(run)) else None,
        el("details", el("summary", "Recipe"), el("pre", el("code", run.recipe))) if run.recipe else None,
    )


def _part_title(run: Run, condition: str) -> Html | None:
    return el("h3", f"Condition: {condition}") if len(run.conditions) > 1 else None


def _per_condition(run: Run, draw: Callable[[str, float], Html], width: float) -> Html:
    drawn = []
    for condition in run.conditions:
        title = el("h3", condition) if len(run.conditions) > 1 else None
        drawn.append(el("div", title, _both(lambda size, name=condition: draw(name, size), width)))  # type: ignore[misc]
    return el("div", drawn, class_="pair")


def _both(draw: Callable[[float], Html], width: float, narrow: float = 350.0) -> Html:
    """A drawing in two widths, of which the page shows the one that fits: text keeps its size on a phone."""
    return join(el("div", draw(width), class_="wide"), el("div", draw(narrow), class_="narrow"))


def _prose(text: str, class_: str | None = None) -> Html:
    """A paragraph; line breaks and indentation of the source do not count."""
    return el("p", " ".join(text.split()), class_=class_)


def _figure(drawing: Html, *caption: Child) -> Html:
    return el("figure", drawing, el("figcaption", *caption))


def _inline(drawing: Html, x: float, y: float, width: float, height: float) -> Html:
    """A panel placed inside another drawing."""
    return Html(drawing.replace("<svg ", f'<svg x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" ', 1))


def _style(name: str) -> str:
    return resources.files("hpa.report").joinpath(name).read_text(encoding="utf-8")


def _date(created: Any) -> str | None:
    """``2026-11-23T21:40:00+00:00`` as ``23 November 2026, 21:40 UTC``; what is no ISO date is shown as it is."""
    if not created:
        return None
    try:
        moment = datetime.fromisoformat(str(created).replace("Z", "+00:00"))
    except ValueError:
        return str(created)
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y}, {moment:%H:%M}{zone}"
