"""Fail if a test was skipped, except for the reasons that are given: python no_skips.py JUNIT.xml [REASON ...]."""

import sys
import xml.etree.ElementTree as ElementTree


def main(report: str, *allowed: str) -> int:
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [(case.get("name"), reason.get("message", "")) for case in cases for reason in case.iter("skipped")]
    wrong = [(name, reason) for name, reason in skipped if not any(words in reason for words in allowed)]
    for name, reason in wrong:
        print(f"skipped, and must not be: {name}: {reason}")
    print(f"{len(cases)} tests, {len(skipped)} skipped, {len(wrong)} of them without leave")
    return 1 if wrong or len(cases) == len(skipped) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
