"""Charts as SVG that read on light and on dark. No library draws so little so well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

ROW, WIDTH, RIGHT, TOP = 22, 430, 130, 66
LETTER = 6.4
"""How wide one is, at the most, on average."""
OURS, THEIRS, FLOOR = "#2f855a", "#718096", "#c05621"
Row = tuple[str, float, float, str]
"""Name, value (a median), the far end (its p99; 0 if there is none), colour."""


def _left(rows: Sequence[Row]) -> int:
    """Room for the longest name."""
    return 16 + math.ceil(LETTER * max(len(name) for name, *_ in rows))


def dots(title: str, unit: str, rows: Sequence[Row]) -> str:
    """On a logarithmic scale, for what differs by powers of ten: there a bar's length would mean nothing."""
    left = _left(rows)
    values = [v for _, low, high, _ in rows for v in (low, high) if v > 0]
    least = math.floor(math.log10(min(values)))
    most = max(math.ceil(math.log10(max(values) * 1.0001)), least + 1)

    def x(value: float) -> float:
        return left + WIDTH * max(0.0, math.log10(max(value, 10**least)) - least) / (most - least)

    def mark(low: float, high: float, y: int, colour: str) -> Iterator[str]:
        if high > low:
            yield (
                f'<line x1="{x(low):.1f}" y1="{y + 8.5}" x2="{x(high):.1f}" y2="{y + 8.5}" stroke="{colour}" stroke-width="2"/>'
            )
        yield f'<circle cx="{x(low):.1f}" cy="{y + 8.5}" r="5" fill="{colour}"/>'

    return _chart(title, unit, rows, x, [10**n for n in range(least, most + 1)], mark)


def bars(title: str, unit: str, rows: Sequence[Row]) -> str:
    """From zero on."""
    left = _left(rows)
    top = max(low for _, low, _, _ in rows)
    step = 10 ** math.floor(math.log10(top))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if top / s <= 8)
    most = math.ceil(top / step) * step

    def x(value: float) -> float:
        return left + WIDTH * value / most

    def mark(low: float, high: float, y: int, colour: str) -> Iterator[str]:
        width = max(1.0, x(low) - left)
        yield f'<rect x="{left}" y="{y + 2}" width="{width:.1f}" height="13" rx="2" fill="{colour}"/>'

    return _chart(title, unit, rows, x, [n * step for n in range(round(most / step) + 1)], mark)


def _chart(
    title: str,
    unit: str,
    rows: Sequence[Row],
    x: Callable[[float], float],
    scale: Sequence[float],
    mark: Callable[[float, float, int, str], Iterator[str]],
) -> str:
    left = _left(rows)
    height = TOP + ROW * len(rows) + 26
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + WIDTH + RIGHT} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        "<style>text{fill:#2d3748}@media (prefers-color-scheme: dark){text{fill:#e2e8f0}}</style>",
        f'<text x="0" y="18" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    at = 0.0
    for word, colour in (("botlease", OURS), ("others", THEIRS), ("floor", FLOOR)):
        if any(c == colour for *_, c in rows):
            out.append(f'<circle cx="{at + 5:.1f}" cy="36" r="4" fill="{colour}"/>')
            out.append(f'<text x="{at + 15:.1f}" y="40">{word}</text>')
            at += 40 + LETTER * len(word)
    for value in scale:
        at = x(value)
        out.append(
            f'<line x1="{at:.1f}" y1="{TOP - 8}" x2="{at:.1f}" y2="{height - 20}" stroke="#a0aec0" stroke-width=".5"/>'
        )
        out.append(f'<text x="{at:.1f}" y="{height - 6}" text-anchor="middle">{_number(value)}</text>')
    out.append(f'<text x="{left + WIDTH + 24}" y="{height - 6}">{escape(unit)}</text>')
    for n, (name, low, high, colour) in enumerate(rows):
        y = TOP + ROW * n
        weight = ' font-weight="600"' if colour == OURS else ""
        out.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end"{weight}>{escape(name)}</text>')
        out += mark(low, high, y, colour)
        far = f" / {_number(high)}" if high > low else ""
        out.append(f'<text x="{x(max(low, high)) + 8:.1f}" y="{y + 12}">{_number(low)}{far}</text>')
    return "\n".join([*out, "</svg>", ""])


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if value >= 10_000:
        return f"{value / 1000:,.0f} k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}".rstrip("0").rstrip(".") if value >= 1 else f"{value:.2g}"
