"""The soak of `bench/soak.py`, in short: all its requirements of a daemon under a mixed load with faults hold."""

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "bench/soak.py"
SECONDS = 6  # and about 15 to start, to settle twice, and to stop; `make torture` takes minutes


def test_under_a_mixed_load_with_faults_no_byte_is_wrong_no_read_fails_and_nothing_grows() -> None:
    done = subprocess.run(
        [sys.executable, SOAK, "--json", "--minutes", f"{SECONDS / 60}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["what"]: row["value"] for row in json.loads(done.stdout[done.stdout.index("[\n") :])}
    assert rows["objects read"] > 0
    assert rows["starts of the daemon"] == 3
    assert rows["faults of the origin"] > 0
