"""Tables in Markdown, from results alone."""

from __future__ import annotations

from collections.abc import Callable

from reporting import markdown
from results_of_runs import BASELINES, COUNTERPARTS, Results, Row

FORWARD, BACKWARD = "forward", "forward + backward"
SHORT = {FORWARD: "forward", BACKWARD: "with backward"}


def seconds(value: float) -> str:
    """With three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size or unit == "us":
            return f"{digits(value / size)} {unit}"
    raise AssertionError


def size(count: float) -> str:
    """Bytes with a unit; nothing where torch's counter has seen none."""
    if count == 0:
        return ""
    for unit, step in (("GB", 1e9), ("MB", 1e6)):
        if count >= step:
            return f"{digits(count / step)} {unit}"
    return f"{digits(count / 1e3)} kB"


def digits(value: float) -> str:
    """Three significant ones, never in powers of ten."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def environment(results: dict[str, Results]) -> str:
    """Machine and versions; the commit of each subject."""
    one = next(iter(results.values()))
    versions = ", ".join(f"{name} {version}" for name, version in one.machine["versions"].items() if version)
    commits = ", ".join(f"{r.subject.replace('_', ' ')} `{str(r.commit['id'])[:7]}`" for r in results.values())
    kept = "freed pages kept" if one.machine["pages kept"] else "freed pages given back"
    return (
        f"{one.machine['device']} ({one.machine['instructions']}), threads: {one.machine['threads']}, {kept}, "
        f"Python {one.machine['python']}.\nVersions: {versions}.\nCommits: {commits}."
    )


def full(results: Results, case: str) -> str:
    """Every entry of a case with all that is known of it."""
    ways = results.ways(case)
    head = [""]
    for way in ways:
        head += [SHORT[way], "IQR", "ratio", "memory", "of bound"]
    lines = []
    for name in results.names(case):
        cells = [name]
        for way in ways:
            cells += _cells(results, results.find(case, way, name))
        lines.append(cells)
    return markdown(head, lines)


def _cells(results: Results, row: Row | None) -> list[str]:
    if row is None:
        return [""] * 5
    ratio = results.ratio(row)
    share = row.info["fraction_of_bound"]
    return [
        seconds(row.median),
        f"{row.spread:.0%}",
        "" if ratio is None else digits(ratio[0]),
        size(row.info["peak_bytes"]),
        "" if share is None else f"{share:.0%}",
    ]


def fulls(results: Results, starts: str) -> str:
    """The tables of all cases whose titles begin so."""
    parts = []
    for case in results.cases():
        if case.startswith(starts):
            named = {row.info["reference"] for row in results.rows if row.case == case}
            parts.append(f"{case}; ratios to *{named.pop()}*:\n\n{full(results, case)}")
            parts += _missing(results, case)
    return "\n\n".join(parts)


def _missing(results: Results, case: str) -> list[str]:
    """Who is not in the table, and why."""
    reasons = dict.fromkeys(f"{a['name']}: {a['reason']}" for a in results.absent if a["group"].startswith(case))
    notes = dict.fromkeys(f"{r.name}: {r.info['note']}" for r in results.rows if r.case == case and r.info["note"])
    lines = [f"- {line}" for line in notes] + [f"- absent: {line}" for line in reasons]
    return ["\n".join(lines)] if lines else []


Cell = Callable[[Results, str, str], str]


def against(name: str, other: str) -> Cell:
    """How many times as long an entry takes as another."""

    def cell(results: Results, case: str, way: str) -> str:
        row = results.find(case, way, name)
        ratio = row and results.ratio(row, other)
        return digits(ratio[0]) if ratio else ""

    return cell


def share_of_bound(name: str) -> Cell:
    """The bound over the time."""

    def cell(results: Results, case: str, way: str) -> str:
        row = results.find(case, way, name)
        return f"{row.info['fraction_of_bound']:.0%}" if row else ""

    return cell


def time_of(name: str) -> Cell:
    """An entry's median."""

    def cell(results: Results, case: str, way: str) -> str:
        row = results.find(case, way, name)
        return seconds(row.median) if row else ""

    return cell


def pivot(results: Results, starts: str, columns: dict[str, Cell], ways: tuple[str, ...] = (FORWARD, BACKWARD)) -> str:
    """One line for each case whose title begins so; nothing if there is none."""
    head = [""] + [f"{column}, {SHORT[way]}" if len(ways) > 1 else column for way in ways for column in columns]
    lines = [
        [case.removeprefix(starts), *(cell(results, case, way) for way in ways for cell in columns.values())]
        for case in results.cases()
        if case.startswith(starts)
    ]
    lines = [line for line in lines if any(line[1:])]
    return markdown(head, lines) if lines else ""


def sides_of(results: Results, curve: str) -> list[int]:
    """Sizes at which a curve was measured."""
    starts = f"{curve}, side "
    return [int(case.removeprefix(starts)) for case in results.cases() if case.startswith(starts)]


def curve(results: Results, title: str, way: str) -> str:
    """Seconds and memory of all entries over the side of the grid, and where each ends."""
    sides = sorted(set(sides_of(results, title)))
    names = results.names(f"{title}, side {sides[0]}")
    lines = []
    for side in sides:
        cells = [str(side)]
        for name in names:
            row = results.find(f"{title}, side {side}", way, name)
            cells.append(f"{seconds(row.median)}, {size(row.info['peak_bytes'])}" if row else "")
        if any(cells[1:]):
            lines.append(cells)
    return markdown(["side", *names], lines)


def ends(results: Results, title: str, way: str) -> str:
    """Why curves end."""
    found = [
        f"{a['name']} at {a['group'].removeprefix(f'{title}, side ').removesuffix(f', {way}')}: {a['reason']}"
        for a in results.absent
        if a["group"].startswith(f"{title}, side ") and a["group"].endswith(f", {way}")
        if not (way == FORWARD and a["group"].endswith(BACKWARD))
    ]
    return f"Ended ({SHORT[way]}): " + "; ".join(found) + "." if found else ""


def crossing(results: Results, title: str, way: str, dense: str, sparse: str) -> str:
    """From which size on sparse is faster, and how much at the last that both reach."""
    pairs = []
    for side in sorted(set(sides_of(results, title))):
        one, two = (results.find(f"{title}, side {side}", way, name) for name in (dense, sparse))
        if one and two:
            pairs.append((side, one.median / two.median))
    faster = [side for side, ratio in pairs if ratio > 1.0]
    if not pairs:
        return ""
    side, ratio = pairs[-1]
    first = f"from side {faster[0]} on" if faster else "nowhere"
    what = f"{title.removeprefix('curve, ')}, {SHORT[way]}"
    return f"- {what}: *{sparse}* is faster than *{dense}* {first}, {digits(ratio)} times at {side}"


def losses(results: dict[str, Results]) -> str:
    """Every case in which somebody else's entry is faster than its counterpart, or than the fastest of ours."""
    lines = [
        line
        for found in results.values()
        for case in found.cases()
        for way in found.ways(case)
        if (line := _loss([r for r in found.rows if (r.case, r.way) == (case, way)], f"{case}, {SHORT[way]}"))
    ]
    return "\n".join(lines) if lines else "None."


def _loss(rows: list[Row], title: str) -> str:
    contenders = [r for r in rows if not r.info["yardstick"] and r.name not in BASELINES]
    peers, mine = ([r for r in contenders if r.is_peer is flag] for flag in (True, False))
    if not peers or not mine:
        return ""
    best = min(peers, key=lambda r: r.median)
    counterpart = COUNTERPARTS.get(best.name)
    own = min((r for r in mine if counterpart in (None, r.name)), key=lambda r: r.median)
    times = own.median / best.median
    return f"- {title}: *{best.name}* is {digits(times)} times as fast as *{own.name}*" if times > 1.0 else ""


def first_calls(results: Results) -> str:
    """Seconds to the first result of a process."""
    lines = [[row.name, seconds(row.median), seconds(row.info["wall_seconds"])] for row in results.rows]
    return markdown(["", "processor", "wall"], lines)
