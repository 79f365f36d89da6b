"""Fault table: a rank ends by itself with a code, an exception, or a signal."""

from __future__ import annotations


def test_exit_code_is_kept_and_the_culprit_named(job):
    """Row 1: one rank calls sys.exit(3) while the others work."""
    job.script("""
        import os, sys, time
        if os.environ["RANK"] == "3":
            print("about to give up", file=sys.stderr)
            sys.exit(3)
        time.sleep(600)
    """)
    assert job.run("-n", "4", "train.py") == 3
    assert job.failure.startswith("rank 3 on algo-1 exited with code 3: about to give up")
    assert "last lines of stderr of rank 3:\nabout to give up" in job.failure
    assert job.failure_json["detail"]["culprit"]["rank"] == 3
    assert set(job.failure_json["detail"]["victims"]) == {"0", "1", "2"}
