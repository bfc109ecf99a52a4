#!/usr/bin/env bash
# pydantic's ByteSize checks the unit, but ignores every character behind it, also in strict mode.
#
# Expected: a size with other text behind its unit is refused, as "7 apples" is ("could not interpret byte unit").
#   A setting "500MB/s" is a rate, "1.5 GB of 2 GB" names two sizes, and "10 MB, at most" is a sentence.
# Seen: each of them is accepted as the size in front: the pattern is matched at the start of the text only, and not to its end.
#   What is not accepted is an exponent ("1e3MB"), since there the letter takes the place of the unit.
# Who is concerned: programs that read sizes from settings or requests. A rate given for a size, or two sizes in the place of
#   one, pass without a word. Check the text yourself before ByteSize sees it.
# Versions: pydantic 2.14.4, Python 3.11, Linux. Seen on 2026-11-28.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pydantic==2.14.4

"$folder/venv/bin/python" - <<'PROGRAM'
import sys

from pydantic import VERSION, ByteSize, TypeAdapter, ValidationError

print("pydantic", VERSION)
sizes = TypeAdapter(ByteSize)
expected = {"500MB/s": 500_000_000, "1.5 GB of 2 GB": 1_500_000_000, "10 MB, at most": 10_000_000, "7 apples": None, "1e3MB": None}
seen = {}
for strict in (False, True):
    for text in expected:
        try:
            seen[text] = int(sizes.validate_python(text, strict=strict))
        except ValidationError:
            seen[text] = None
        print(f"strict={strict!s:5} {text!r:18} -> {'refused' if seen[text] is None else seen[text]}")
    if seen != expected:
        sys.exit("the behaviour has changed")
PROGRAM
