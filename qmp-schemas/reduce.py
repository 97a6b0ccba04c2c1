#!/usr/bin/env python3
"""Reduces an answer of `query-qmp-schema` to what used.json lists.

    reduce.py VERSION <ANSWER >qemu-VERSION.json

The answer names its types by numbers that change with every build; here each is resolved to the type itself. Its form:
QEMU's qapi/introspect.json. What used.json lists and the answer lacks is left out: tests/schemas.rs compares.
"""

import json
import os
import sys

FEATURES = ("deprecated", "unstable")


def load(text):
    """The list of a bare answer, or of the reply that holds it in a transcript of a QMP session."""
    for line in text.splitlines():
        message = json.loads(line)
        answer = message.get("return") if isinstance(message, dict) else message
        if isinstance(answer, list) and answer:
            return answer
    sys.exit("reduce.py: no answer of query-qmp-schema on standard input")


class Schema:
    def __init__(self, entries):
        self.types = {(e["meta-type"] in ("command", "event"), e["name"]): e for e in entries}

    def type(self, name):
        return self.types[(False, name)]

    def top(self, name, kind):
        entry = self.types.get((True, name))
        return entry if entry and entry["meta-type"] == kind else None

    def describe(self, name, used):
        """What `used` mentions of a type."""
        entry = self.type(name)
        kind = entry["meta-type"]
        if kind == "builtin":
            return entry["json-type"]
        if kind == "enum":
            values = [m["name"] for m in entry.get("members", [])] or entry["values"]
            return {"enum": [v for v in used.get("values", []) if v in values]}
        if kind == "array":
            return {"list": self.describe(entry["element-type"], used)}
        if kind == "alternate":
            return {"either": [self.describe(m["type"], used) for m in entry["members"]]}
        out = {"members": self.members(entry, used)}
        cases = {v["case"]: v["type"] for v in entry.get("variants", [])}
        wanted = used.get("variants", {})
        if wanted:
            out["tag"] = entry.get("tag")
            out["variants"] = {c: self.describe(cases[c], u) for c, u in wanted.items() if c in cases}
        return out

    def members(self, entry, used):
        found = {m["name"]: m for m in entry["members"]}
        out = {}
        for name, below in used.get("members", {}).items():
            if name not in found:
                continue
            member = found[name]
            out[name] = {"type": self.describe(member["type"], below)}
            if "default" in member:
                out[name]["optional"] = True
            self.mark(out[name], member)
        return out

    @staticmethod
    def mark(out, entry):
        features = [f for f in entry.get("features", []) if f in FEATURES]
        if features:
            out["features"] = features


def reduce(schema, used, version):
    commands, events = {}, {}
    for name, wanted in used["commands"].items():
        entry = schema.top(name, "command")
        if entry is None:
            continue
        out = commands[name] = {}
        for key, side in (("arguments", "arg-type"), ("returns", "ret-type")):
            if key in wanted:
                out[key] = schema.describe(entry[side], wanted[key])
        schema.mark(out, entry)
    for name, wanted in used["events"].items():
        entry = schema.top(name, "event")
        if entry is None:
            continue
        out = events[name] = {}
        if "data" in wanted:
            out["data"] = schema.describe(entry["arg-type"], wanted["data"])
        schema.mark(out, entry)
    return {"qemu": version, "commands": commands, "events": events}


def write(value, indent=0, width=160):
    """JSON with short objects on one line, so that a change is a changed line."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or not value or len(flat) + 2 * indent <= width and indent > 1:
        return flat
    pad = "  " * (indent + 1)
    rows = [f"{pad}{json.dumps(k)}: {write(v, indent + 1, width)}" for k, v in value.items()]
    return "{\n" + ",\n".join(rows) + "\n" + "  " * indent + "}"


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "used.json"), encoding="utf-8") as file:
        used = json.load(file)
    print(write(reduce(Schema(load(sys.stdin.read())), used, sys.argv[1])))


if __name__ == "__main__":
    main()
