"""What qat_lm.py found, in a few numbers: perplexities of the test text, and what was won back of what
rounding loses.

In: the record that is written as JSON. Out: rows by format, and their Markdown.

    summary(found)["int2[g32]"]   ->   {"rounded": 23.6, "trained": [19.4, 0.02], "recovered": 0.81, ..}

Shares are of the loss, in nats a token. There are two floats to hold a model against: `base`, which all of
them were made from, and `longer`, that model trained on in floats for as many steps on the same batches.
"recovered" is against the base, "recovered_strictly" against the better of the two;
"recovered_longer" is of what rounding takes from `longer`.
"""

from __future__ import annotations

import math
from typing import Any

from qat_report import Curve, spread, won_back

FLOAT = "float"


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Of what is there yet."""
    floats = found[FLOAT]
    if "base" not in floats:
        return {}
    base = floats["base"]["test"]
    rows: dict[str, Any] = {FLOAT: {"file": floats["file"]["test"], "base": base}}
    best = base
    if floats.get("runs"):
        rows[FLOAT]["longer"] = spread([run["judged"]["test"] for run in floats.get("runs", [])])
        best = min(base, rows[FLOAT]["longer"][0])
    for name, row in found["formats"].items():
        if "rounded" not in row:
            continue
        rounded = row["rounded"]["test"]
        rows[name] = {"rounded": rounded}

        def share(value: float, of: float, rounded: float = rounded) -> float | None:
            return won_back(math.log(of), math.log(rounded), math.log(value))

        if row.get("runs"):
            tests = [run["judged"]["test"] for run in row["runs"]]
            mean, _ = rows[name]["trained"] = spread(tests)
            rows[name] |= {"seeds": len(tests), "rate": row["runs"][0]["rate"]}
            rows[name] |= {"recovered": share(mean, base), "recovered_strictly": share(mean, best)}
            if row.get("longer_rounded"):
                pairs = [row["longer_rounded"].get(str(run["seed"])) for run in floats.get("runs", [])]
                known = [one["test"] for one in pairs if one is not None]
                if known:
                    again = rows[name]["longer_rounded"] = spread(known)[0]
                    rows[name]["recovered_longer"] = share(mean, rows[FLOAT]["longer"][0], again)
            rows[name]["recovered_each"] = [share(test, base) for test in tests]
            apart = [run["judged"]["divergence"] for run in row["runs"]]
            rows[name]["divergence"] = [row["rounded"]["divergence"], spread(apart)[0]]
        if row.get("algorithms"):
            text = min(row["algorithms"], key=lambda text: row["algorithms"][text]["validation"])
            solved = row["algorithms"][text]["test"]
            rows[name] |= {"algorithm": text, "solved": solved, "solved_recovered": share(solved, base)}
    return rows


def joined(found: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`found` with the floats that another run went on with, which is right where both have the same base.

    ValueError: the bases are not the same numbers.
    """
    if found[FLOAT]["base"] != other[FLOAT]["base"]:
        raise ValueError(f"the bases differ: {found[FLOAT]['base']} and {other[FLOAT]['base']}")
    formats = {
        name: row | {"longer_rounded": other["formats"].get(name, {}).get("longer_rounded", {})}
        for name, row in found["formats"].items()
    }
    whole = found | {FLOAT: other[FLOAT], "formats": formats, "options_of_longer": other["options"]}
    return whole | {"summary": summary(whole)}


def table(rows: dict[str, Any]) -> str:
    """The summary in Markdown."""
    if not rows:
        return ""
    said = {
        name: f"{value[0] if isinstance(value, list) else value:.3f}" for name, value in rows[FLOAT].items()
    }
    lines = [
        "Float: " + ", ".join(f"{name} {value}" for name, value in said.items()) + ".",
        "",
        "| format | rounded | best algorithm | won back | trained | won back | strictly | of longer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if name == FLOAT:
            continue
        solved = f"{row['solved']:.3f} (`{row['algorithm']}`)" if "solved" in row else ""
        trained = "{:.3f} ± {:.3f}".format(*row["trained"]) if "trained" in row else ""
        names = ("solved_recovered", "recovered", "recovered_strictly", "recovered_longer")
        shares = ["" if row.get(one) is None else f"{100 * row[one]:.0f}%" for one in names]
        cells = [name, f"{row['rounded']:.3f}", solved, shares[0], trained, *shares[1:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(found: dict[str, Any]) -> list[Curve]:
    """The losses of the first seed, for floats that went on and for each format."""
    rows = [("float", found[FLOAT]), *found["formats"].items()]
    return [Curve(name, 0, row["runs"][0]["curve"]) for name, row in rows if row.get("runs")]
