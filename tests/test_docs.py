"""What is made from the formats and from raw output is up to date in the documents."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_made_documents_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
