"""The bank as a command: `python -m tests.agents.diagnosis.bank FOLDER` trains its runs, and prints what is found."""

import argparse
import time

from .page import catalogue_table, write_section
from .runs import Bank, cases, place_of, table


def main():
    """Train all cases into a folder, print the findings of each, and on request write the tables of docs/doctor.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/doctor.md")
    chosen = parser.parse_args()
    bank, results = Bank(chosen.folder), []
    for case in [*cases(), *cases(held_out=True)]:
        start, cpu = time.monotonic(), time.process_time()
        found = bank.diagnosed(case, place_of(chosen.folder, case))
        results.append((case, found))
        verdict = "right" if (found[0].id if found else None) == case.cause else "WRONG"
        named = ", ".join(f"{finding.id} {finding.weight}" for finding in found)
        took = f"{time.monotonic() - start:.0f} s, {time.process_time() - cpu:.1f} of CPU"
        print(f"{verdict}  {case.name} [{case.cause}]: {named} ({took})", flush=True)
    if chosen.write:
        write_section("catalogue", catalogue_table())
        write_section("bank", table(results))


if __name__ == "__main__":
    main()
